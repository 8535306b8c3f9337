//! Who is next: those who wait for room, in the order of their arrival, and how far later ones may go before them. Pure.
//!
//! Strict order wastes more than any placement rule can win back: while a large request waits for a GPU to drain, nothing
//! behind it starts. So whatever fits is started, looking from the head of the line, at every arrival and every release.
//! Each start counts one overtake for every earlier one that is passed over. One that was overtaken K times is a
//! **barrier**: nobody behind it starts before it does. So nobody is ever overtaken more than K times. K is 8 for each GPU
//! of the node: nearly as good as overtaking without a bound (docs/queue.md has the figures).
//!
//! Only what takes something away counts. A start on GPUs that an earlier one could not use in any case, even with every
//! holder gone (another GPU than its `mig.gpu`, another model, one that is cordoned or full of kept slices), is no overtake
//! of it, and a barrier closes the GPUs that it could use and no others. So one who waits for a cordoned GPU is in nobody's
//! way.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::lease::Holder;
use crate::request::Request;

/// Version of a ticket's record. Another one on disk is refused and left alone.
pub const VERSION: u64 = 1;
/// Overtakes that a waiter bears for each GPU of the node, where the settings say nothing.
pub const OVERTAKES_PER_GPU: u32 = 8;
/// Milliseconds that one whose turn it is may take to start. Then it is taken for asleep (stopped by a signal, say): room
/// is not kept for it any longer, until it moves.
pub const TAKE_UP_MS: u64 = 5_000;

/// UUIDs of GPUs.
pub type Gpus = BTreeSet<String>;

/// One who waits, as it is on disk: `queue/NUMBER.json`, described field by field in docs/state.md.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ticket {
    /// Of the record: [`VERSION`].
    pub version: u64,
    /// Its name, and its place: later ones have greater numbers. Counted from 1 in each boot.
    pub number: u64,
    /// What is asked for.
    pub request: Request,
    /// For whom.
    pub holder: Holder,
    /// Milliseconds since boot when it came.
    pub since_boot_ms: u64,
    /// Milliseconds since boot when it gives up.
    pub until_boot_ms: u64,
    /// How often a later one has started on GPUs that it could have used.
    pub overtaken: u32,
    /// How often that may be.
    pub limit: u32,
    /// Milliseconds since boot when it was found that it may start.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub turn_boot_ms: Option<u64>,
    /// What it was given is being cut: it is in line again only if that fails.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub served: bool,
}

impl Ticket {
    /// Whether it was its turn long ago, and it has not moved.
    pub fn is_asleep(&self, boot_ms: u64) -> bool {
        self.turn_boot_ms.is_some_and(|since| boot_ms.saturating_sub(since) > TAKE_UP_MS)
    }

    /// Who waits, for messages: `container 3f0a…`.
    pub fn held_by(&self) -> String {
        self.holder.name_of_beginner()
    }
}

/// One in the line, as the rule sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Waiter {
    /// Equal numbers ask for the same: in one scan, what there is no room for once there is no room for again.
    pub wish: usize,
    /// The GPUs that it could use if every holder ended.
    pub usable: Gpus,
    /// How often it was overtaken.
    pub overtaken: u32,
    /// How often it may be.
    pub limit: u32,
    /// Not to be counted with: it did not take its turn.
    pub asleep: bool,
}

/// What the scan found for one in the line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Turn {
    /// It may start now, on these GPUs.
    Now(Gpus),
    /// There is no room for it on the GPUs that are open to it.
    Waits,
    /// It was left out.
    Asleep,
}

/// The line after a scan.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Line {
    /// For each in the line.
    pub turns: Vec<Turn>,
    /// How often each is overtaken when all those have started whose turn it is.
    pub overtaken: Vec<u32>,
}

/// Looks at the line from its head. `fit` finds room for the one at that place on GPUs that are not among those closed to
/// it, keeps that room from then on, and names the GPUs; it may only find less as more is kept.
pub fn scan(waiters: &[Waiter], mut fit: impl FnMut(usize, &Gpus) -> Option<Gpus>) -> Line {
    let mut line = Line { turns: Vec::new(), overtaken: waiters.iter().map(|waiter| waiter.overtaken).collect() };
    let mut hopeless: BTreeSet<usize> = BTreeSet::new();
    let mut barriers: BTreeSet<usize> = BTreeSet::new();
    let (mut closed, nothing) = (Gpus::new(), Gpus::new());
    for (at, waiter) in waiters.iter().enumerate() {
        if waiter.asleep {
            line.turns.push(Turn::Asleep);
            continue;
        }
        // One that can use no GPU takes nothing away either, should there be something for it all the same.
        let shut = if waiter.usable.is_empty() { &nothing } else { &closed };
        let shut_out = !waiter.usable.is_empty() && waiter.usable.is_subset(shut);
        let found = if shut_out || hopeless.contains(&waiter.wish) { None } else { fit(at, shut) };
        let delayed = match found {
            Some(gpus) => {
                let passed_over = line.passed_over(waiters, at, &gpus);
                passed_over.iter().for_each(|n| line.overtaken[*n] += 1);
                line.turns.push(Turn::Now(gpus));
                passed_over
            }
            None => {
                hopeless.insert(waiter.wish);
                line.turns.push(Turn::Waits);
                vec![at]
            }
        };
        for n in delayed.into_iter().filter(|n| line.overtaken[*n] >= waiters[*n].limit) {
            if barriers.insert(n) {
                closed.extend(waiters[n].usable.iter().cloned());
            }
        }
    }
    line
}

impl Line {
    /// Whether the one at that place waits and may not be overtaken any more.
    pub fn is_barrier(&self, waiters: &[Waiter], at: usize) -> bool {
        let in_somebodys_way = !waiters[at].usable.is_empty();
        matches!(self.turns[at], Turn::Waits) && in_somebodys_way && self.overtaken[at] >= waiters[at].limit
    }

    /// The first barrier before the one at that place that closes GPUs to it.
    pub fn barrier_before(&self, waiters: &[Waiter], at: usize) -> Option<usize> {
        let closes = |n: &usize| !waiters[*n].usable.is_disjoint(&waiters[at].usable);
        (0..at).find(|n| self.is_barrier(waiters, *n) && closes(n))
    }

    /// The GPUs that those before the one at that place close to it.
    pub fn closed_to(&self, waiters: &[Waiter], at: usize) -> Gpus {
        let barriers = (0..at).filter(|n| self.is_barrier(waiters, *n) && !waiters[at].usable.is_empty());
        barriers.flat_map(|n| waiters[n].usable.iter().cloned()).collect()
    }

    /// The places of those that the one at `at` overtakes when it starts on these GPUs.
    pub fn passed_over(&self, waiters: &[Waiter], at: usize, gpus: &Gpus) -> Vec<usize> {
        let waits = |n: &usize| matches!(self.turns[*n], Turn::Waits) && !waiters[*n].usable.is_disjoint(gpus);
        (0..at).filter(waits).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn gpus(names: &[u32]) -> Gpus {
        names.iter().map(|n| format!("GPU-{n}")).collect()
    }

    /// One who wants `size` of a GPU's eight slices, on one of these GPUs.
    fn waiter(size: usize, usable: &[u32], overtaken: u32) -> Waiter {
        let wish = size * 8 + usable.iter().map(|n| 1 << n).sum::<usize>();
        Waiter { wish, usable: gpus(usable), overtaken, limit: 2, asleep: false }
    }

    fn size(waiter: &Waiter) -> usize {
        waiter.wish / 8
    }

    /// A scan on GPUs with so many slices free: the first that has enough is taken.
    fn scan_of(waiters: &[Waiter], free: &[usize]) -> Line {
        let mut free = free.to_vec();
        scan(waiters, |at, closed| {
            let name = |n: usize| format!("GPU-{n}");
            let open = |n: &usize| waiters[at].usable.contains(&name(*n)) && !closed.contains(&name(*n));
            let gpu = (0..free.len()).filter(open).find(|n| free[*n] >= size(&waiters[at]))?;
            free[gpu] -= size(&waiters[at]);
            Some(Gpus::from([name(gpu)]))
        })
    }

    #[test]
    fn whatever_fits_starts_and_those_passed_over_are_counted() {
        let line = scan_of(&[waiter(7, &[0], 0), waiter(1, &[0], 0), waiter(7, &[0], 1), waiter(1, &[0], 0)], &[3]);
        assert_eq!(line.turns, [Turn::Waits, Turn::Now(gpus(&[0])), Turn::Waits, Turn::Now(gpus(&[0]))]);
        assert_eq!(line.overtaken, [2, 0, 2, 0]);
    }

    #[test]
    fn nobody_passes_a_barrier_also_one_that_becomes_it_in_this_scan() {
        let line = scan_of(&[waiter(7, &[0], 1), waiter(1, &[0], 0), waiter(1, &[0], 0)], &[3]);
        assert_eq!(line.turns, [Turn::Waits, Turn::Now(gpus(&[0])), Turn::Waits]);
        // Also one that was looked at before it became that.
        let waiters = [waiter(7, &[0], 1), waiter(5, &[0, 1], 0), waiter(1, &[0], 0), waiter(1, &[1], 0)];
        let line = scan_of(&waiters, &[3, 3]);
        assert_eq!([0, 1, 2, 3].map(|at| line.barrier_before(&waiters, at)), [None, Some(0), Some(0), Some(1)]);
        let strict = Waiter { limit: 0, ..waiter(7, &[0], 0) };
        assert_eq!(scan_of(&[strict, waiter(1, &[0], 0)], &[3]).turns, [Turn::Waits, Turn::Waits]);
    }

    #[test]
    fn a_barrier_that_starts_is_none_any_more() {
        let line = scan_of(&[waiter(7, &[0], 2), waiter(1, &[0], 0)], &[8]);
        assert_eq!(line.turns, [Turn::Now(gpus(&[0])), Turn::Now(gpus(&[0]))]);
    }

    #[test]
    fn what_takes_nothing_away_is_no_overtake_and_is_not_stopped() {
        // The first may use GPU 0 only, the second none: cordoned.
        let line =
            scan_of(&[waiter(7, &[0], 2), waiter(7, &[], 2), waiter(1, &[0, 1], 0), waiter(1, &[0], 0)], &[3, 3]);
        assert_eq!(line.turns, [Turn::Waits, Turn::Waits, Turn::Now(gpus(&[1])), Turn::Waits]);
        assert_eq!(line.overtaken, [2, 2, 0, 0]);
    }

    #[test]
    fn one_that_sleeps_through_its_turn_keeps_nothing() {
        let asleep = Waiter { asleep: true, ..waiter(1, &[0], 2) };
        let line = scan_of(&[asleep, waiter(1, &[0], 0)], &[1]);
        assert_eq!((line.turns, line.overtaken), (vec![Turn::Asleep, Turn::Now(gpus(&[0]))], vec![2, 0]));
        let mut ticket = ticket();
        assert!(!ticket.is_asleep(u64::MAX));
        ticket.turn_boot_ms = Some(1_000);
        assert!(!ticket.is_asleep(1_000 + TAKE_UP_MS) && ticket.is_asleep(1_001 + TAKE_UP_MS));
    }

    fn ticket() -> Ticket {
        let request = crate::request::typed("1g.10gb", None).unwrap();
        let holder = Holder::new(crate::lease::Way::Shim);
        let (since_boot_ms, until_boot_ms) = (0, 0);
        Ticket {
            version: VERSION,
            number: 1,
            request,
            holder,
            since_boot_ms,
            until_boot_ms,
            overtaken: 0,
            limit: 8,
            turn_boot_ms: None,
            served: false,
        }
    }

    /// What happens to a node: somebody comes (size, GPUs it may use), one who holds ends, one who waits gives up.
    #[derive(Debug, Clone)]
    enum Event {
        Comes(usize, Vec<u32>),
        Ends(prop::sample::Index),
        GivesUp(prop::sample::Index),
    }

    fn event() -> impl Strategy<Value = Event> {
        let usable = prop::sample::subsequence(vec![0, 1, 2], 0..=3);
        let comes = (prop::sample::select(vec![1_usize, 1, 1, 2, 4, 8]), usable).prop_map(|(s, u)| Event::Comes(s, u));
        prop_oneof![
            6 => comes,
            4 => any::<prop::sample::Index>().prop_map(Event::Ends),
            1 => any::<prop::sample::Index>().prop_map(Event::GivesUp),
        ]
    }

    proptest! {
        #[test]
        fn nobody_starves_equals_keep_their_order_and_nothing_that_may_start_waits(
            events in prop::collection::vec(event(), 1..120),
            limit in 0_u32..6,
        ) {
            let mut line: Vec<(usize, Waiter)> = vec![]; // with when it came
            let mut held: Vec<(usize, usize)> = vec![]; // GPU, slices
            // Counted by the test itself, for each that ever came.
            let mut overtaken: Vec<u32> = vec![];
            for event in events {
                match event {
                    Event::Comes(size, usable) => {
                        line.push((overtaken.len(), Waiter { limit, ..waiter(size, &usable, 0) }));
                        overtaken.push(0);
                    }
                    Event::Ends(which) if !held.is_empty() => drop(held.remove(which.index(held.len()))),
                    Event::GivesUp(which) if !line.is_empty() => drop(line.remove(which.index(line.len()))),
                    _ => {}
                }
                let free = |held: &[(usize, usize)]| {
                    [0, 1, 2].map(|gpu| 8 - held.iter().filter(|(g, _)| *g == gpu).map(|(_, s)| s).sum::<usize>())
                };
                let waiters: Vec<Waiter> = line.iter().map(|(_, waiter)| waiter.clone()).collect();
                let scanned = scan_of(&waiters, &free(&held));
                let mut left: Vec<(usize, Waiter)> = vec![];
                for (at, ((came, waiter), turn)) in line.into_iter().zip(&scanned.turns).enumerate() {
                    let Turn::Now(on) = turn else {
                        left.push((came, Waiter { overtaken: scanned.overtaken[at], ..waiter }));
                        continue;
                    };
                    let gpu: usize = on.first().unwrap()[4..].parse().unwrap();
                    held.push((gpu, size(&waiter)));
                    for (earlier, passed) in &left {
                        if passed.usable.contains(&format!("GPU-{gpu}")) {
                            overtaken[*earlier] += 1;
                        }
                        prop_assert!(passed.wish != waiter.wish, "{came} started before {earlier}, which asks for the same");
                    }
                }
                line = left;
                                for (at, (came, waiter)) in line.iter().enumerate() {
                    prop_assert_eq!(overtaken[*came], waiter.overtaken);
                    prop_assert!(waiter.overtaken <= limit, "{} was overtaken {} times", came, waiter.overtaken);
                    let closed: Gpus = line[..at]
                        .iter()
                        .filter(|(_, earlier)| earlier.overtaken >= limit)
                        .flat_map(|(_, earlier)| earlier.usable.clone())
                        .collect();
                    let free = free(&held);
                    let open = (0..3).filter(|gpu| {
                        let name = format!("GPU-{gpu}");
                        waiter.usable.contains(&name) && !closed.contains(&name)
                    });
                    let fits = open.into_iter().any(|gpu| free[gpu] >= size(waiter));
                    prop_assert!(!fits, "{} waits though it fits and may start", came);
                }
            }
        }
    }
}
