//! Waiting in line for room: who is next is decided by `queue`, under the lock and by whoever looks; only the one whose
//! turn it is takes it, so that nobody cuts for another. Nobody waits holding the lock.
//!
//! A waiter looks when its bell rings (a lease went, a cordon changed), when the one before it in the line has gone, and
//! every 10 s, since containers also end without a hook. Of the many that a bell wakes the first looks for them all and
//! marks those whose turn it is; the others find that and go back to sleep.

use std::fs::File;
use std::os::fd::AsFd;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::gpu::{Device, MigMode};
use crate::handover;
use crate::host;
use crate::lease::{Holder, Lease, State, Way};
use crate::profile;
use crate::queue::{self, Gpus, Line, OVERTAKES_PER_GPU, Ticket, Turn, Waiter, scan};
use crate::request::{Request, Want, format_alternatives, format_wait};
use crate::store::{Bell, Lock, Rung, Store};

use super::choose::{Chosen, Kind, Refusal, Unmet};
use super::plan::may_pass;
use super::{ACQUIRE_LOCK_WAIT, Engine, Failure, idle};

/// Longest wait in a hook or the shim. The hooks that we register have 120 s, for this and twice for the lock; whoever wants
/// to wait longer is not a container's start.
pub const CONTAINER_WAIT: Duration = Duration::from_secs(20);
/// Longest wait for the lock of one who has waited in line.
const WAITER_LOCK_WAIT: Duration = Duration::from_secs(20);
/// Pause between two looks when nothing rings.
const LOOK: Duration = Duration::from_secs(10);
/// The same for the first in the line while a slice that is being freed is still in use: doubled from here up to `LOOK`.
const BUSY_LOOK: Duration = Duration::from_millis(20);
/// Pause after a turn that came to nothing because the driver would not have it.
const FAILED_TURN: Duration = Duration::from_secs(1);

/// Who looks at the line, and since when it has had the lock.
#[derive(Debug, Clone, Copy)]
pub(super) struct Look {
    /// Its ticket; without one it stands at the end.
    pub ticket: Option<u64>,
    /// In ms since boot: what changed before that is seen.
    pub begun_boot_ms: u64,
}

impl Look {
    /// By one who has just got the lock.
    pub(super) fn now(ticket: Option<u64>) -> Look {
        Look { ticket, begun_boot_ms: host::boot_ms() }
    }
}

/// The line as it was found.
struct Survey {
    waiters: Vec<Waiter>,
    line: Line,
    /// For each in it what it would get, or why it gets nothing; `None` where that was not asked.
    decisions: Vec<Option<Result<Chosen, Unmet>>>,
    /// The leases, with those of everybody whose turn it is.
    leases: Vec<Lease>,
}

/// One who waits, and for what.
#[derive(Debug)]
pub struct Standing {
    /// As recorded.
    pub ticket: Ticket,
    /// Whether nobody may overtake it any more.
    pub is_barrier: bool,
    /// What it waits for, in words; `None`: it is its turn.
    pub waits_for: Option<String>,
}

/// A place in the line of this process.
struct Place {
    number: u64,
    bell: Bell,
    since_boot_ms: u64,
    until_boot_ms: u64,
    /// Readable when nobody wants it any more: the process on whose behalf, or signals.
    asker: Option<File>,
}

/// The living waiters of a store, first come first; less those for whom something is being cut.
pub fn tickets_in(store: &Store) -> Result<Vec<Ticket>, Failure> {
    let mut tickets = Vec::new();
    for number in store.tickets()?.into_iter().filter(|number| store.bell_of(*number).is_some()) {
        tickets.extend(store.ticket::<Ticket>(number, queue::VERSION)?.filter(|ticket| !ticket.served));
    }
    Ok(tickets)
}

impl Engine<'_> {
    /// Gives what is asked for at once, or when it is its turn, or refuses when its time is over.
    pub(super) fn acquire_in_turn(
        &self,
        request: &Request,
        holder: &Holder,
        cancel: Option<File>,
    ) -> Result<Lease, Failure> {
        let Some(limit) = self.longest_wait(request, holder.way) else {
            return self.acquire_at_once(request, holder, cancel.as_ref());
        };
        let (lock, _) = self.enter_and_reap()?;
        match self.acquire_locked(lock, request, holder, Look::now(None))? {
            (lock, Err(Failure::NoRoom(reason))) => {
                let place =
                    Place { asker: cancel.or_else(asker), ..self.line_up(&lock, request, holder, limit, &reason)? };
                drop(lock);
                self.wait(place, request, holder)
            }
            (_, outcome) => outcome,
        }
    }

    /// `None`: it does not wait.
    pub(super) fn longest_wait(&self, request: &Request, way: Way) -> Option<Duration> {
        let bound = match way {
            Way::Precreate | Way::Shim | Way::Classic | Way::Cdi => CONTAINER_WAIT,
            Way::Run | Way::Job => self.settings.max_wait,
            Way::Create | Way::Adopt => Duration::ZERO, // migctl's own, which ask for nothing
        };
        let wanted = Duration::from_secs(request.wait_s?.into());
        Some(wanted.min(bound).min(self.settings.max_wait)).filter(|wait| !wait.is_zero())
    }

    /// Takes the last place, under the lock under which there was no room.
    fn line_up(
        &self,
        lock: &Lock,
        request: &Request,
        holder: &Holder,
        limit: Duration,
        reason: &str,
    ) -> Result<Place, Failure> {
        let before = self.living_tickets(lock)?;
        let most = self.settings.queue_length;
        if before.len() >= most as usize {
            let full = format!("{} wait in line already, and queue.length allows {most}", before.len());
            return Err(Failure::NoRoom(format!("{reason}; {full}")));
        }
        let gpus = self.managed_gpus()?.iter().filter(|gpu| gpu.mig == MigMode::On).count();
        let per_node = OVERTAKES_PER_GPU.saturating_mul(u32::try_from(gpus).unwrap_or(u32::MAX));
        let since_boot_ms = host::boot_ms();
        let until_boot_ms = since_boot_ms.saturating_add(milliseconds(limit));
        let (number, bell) = self.store.line_up(lock)?;
        let ticket = Ticket {
            version: queue::VERSION,
            number,
            request: request.clone(),
            holder: holder.clone(),
            since_boot_ms,
            until_boot_ms,
            overtaken: 0,
            limit: self.settings.overtakes.unwrap_or(per_node),
            turn_boot_ms: None,
            served: false,
        };
        self.store.put_ticket(lock, number, &ticket)?;
        tracing::info!(ticket = number, place = before.len() + 1, "waits in line for {request}: {reason}");
        Ok(Place { number, bell, since_boot_ms, until_boot_ms, asker: None })
    }

    fn wait(&self, mut place: Place, request: &Request, holder: &Holder) -> Result<Lease, Failure> {
        let number = place.number;
        let (mut pause, mut busy_pause) = (BUSY_LOOK, BUSY_LOOK);
        loop {
            let before = self.store.tickets()?.into_iter().rfind(|n| *n < number);
            let bell_before = before.and_then(|n| self.store.bell_of(n));
            // It went between the two look-ups: then this is the time to look.
            let gone = before.is_some() && bell_before.is_none();
            let left = Duration::from_millis(place.until_boot_ms.saturating_sub(host::boot_ms()));
            let limit = if gone { Duration::ZERO } else { pause.min(left) };
            let rung = place.bell.wait(bell_before.as_ref(), place.asker.as_ref(), limit);
            let woken_ms = host::boot_ms();
            let lock = self.store.enter(WAITER_LOCK_WAIT)?;
            let ticket = self.own_ticket(number)?;
            if rung == Rung::Abandoned {
                self.store.remove_ticket(&lock, number)?;
                self.store.ring();
                return Err(Failure::Stale("it waited for room, and who asked for it has ended meanwhile".into()));
            }
            let is_over = woken_ms >= place.until_boot_ms;
            // Whoever has looked since then has looked for us.
            let since = match rung == Rung::No && !gone {
                true => woken_ms.saturating_sub(milliseconds(pause)),
                false => woken_ms,
            };
            if !is_over && ticket.turn_boot_ms.is_none() && self.store.scanned() > since {
                continue;
            }
            let (lock, actions) = self.reap(lock)?;
            let busy = actions.iter().any(|action| action.result == "busy");
            self.own_ticket(number)?;
            let (lock, outcome) = self.acquire_locked(lock, request, holder, Look::now(Some(number)))?;
            if is_over || !matches!(outcome, Err(Failure::NoRoom(_))) {
                let line = self.living_tickets(&lock)?;
                self.store.remove_ticket(&lock, number)?;
                self.store.ring();
                return outcome.map_err(|failure| self.too_late(&place, request, &line, failure));
            }
            let had_turn = self.own_ticket(number)?.turn_boot_ms.is_some();
            drop(lock);
            if had_turn {
                std::thread::sleep(FAILED_TURN);
            }
            // Nobody rings when the driver lets go: the first in the line tries again soon.
            (pause, busy_pause) = match busy && before.is_none() {
                true => (busy_pause.min(LOOK), busy_pause.min(LOOK) * 2),
                false => (LOOK, BUSY_LOOK),
            };
        }
    }

    fn own_ticket(&self, number: u64) -> Result<Ticket, Failure> {
        let taken = || Failure::Stale("its place in line was taken away by migctl queue cancel".into());
        self.store.ticket::<Ticket>(number, queue::VERSION)?.ok_or_else(taken)
    }

    /// Takes a waiter out of the line while what it was given is being cut, or puts it back to its place.
    pub(super) fn serve(&self, lock: &Lock, look: Look, served: bool) -> Result<(), Failure> {
        let Some(number) = look.ticket else { return Ok(()) };
        let ticket = Ticket { served, ..self.own_ticket(number)? };
        Ok(self.store.put_ticket(lock, number, &ticket)?)
    }

    /// The refusal of one whose time is over.
    fn too_late(&self, place: &Place, request: &Request, line: &[Ticket], failure: Failure) -> Failure {
        let Failure::NoRoom(reason) = failure else { return failure };
        let waited = seconds(place.until_boot_ms.saturating_sub(place.since_boot_ms));
        let at = line.iter().position(|ticket| ticket.number == place.number).unwrap_or(0) + 1;
        let cut = match request.wait_s {
            Some(asked) if asked > waited && Duration::from_secs(waited.into()) == CONTAINER_WAIT => {
                format!(", the longest for a container's start though mig.wait={}", format_wait(asked))
            }
            Some(asked) if asked > waited => ", the longest that queue.max_wait allows".into(),
            _ => String::new(),
        };
        let (waited, of) = (format_wait(waited.max(1)), line.len());
        Failure::NoRoom(format!("waited {waited} in line{cut} (place {at} of {of}): {reason}"))
    }

    /// The living waiters, less those for whom something is being cut; the dead are taken out.
    pub(super) fn living_tickets(&self, lock: &Lock) -> Result<Vec<Ticket>, Failure> {
        let mut tickets = Vec::new();
        for number in self.store.tickets()? {
            // The record of a dead one is not read: another version of mig-hook may have written it.
            match self.store.bell_of(number) {
                Some(_) => {
                    let ticket = self.store.ticket::<Ticket>(number, queue::VERSION)?;
                    tickets.extend(ticket.filter(|ticket| !ticket.served));
                }
                None => self.store.remove_ticket(lock, number)?,
            }
        }
        Ok(tickets)
    }

    /// What the request gets now, with everybody's turn who stands before it; and those whom it overtakes by that.
    pub(super) fn decide_in_turn(
        &self,
        lock: &Lock,
        devices: Vec<Device>,
        leases: &[Lease],
        asked: (&Request, &Holder),
        unusable: &[(String, String)],
        look: Look,
    ) -> Result<(Chosen, Vec<u64>), Unmet> {
        let (request, holder) = asked;
        let tickets = self.living_tickets(lock)?;
        if tickets.is_empty() {
            return Ok((self.decide(devices, leases, request, holder.uid, unusable)?, Vec::new()));
        }
        let own = tickets.iter().position(|ticket| Some(ticket.number) == look.ticket).unwrap_or(tickets.len());
        let mut line: Vec<(&Request, &Holder)> = tickets.iter().map(|t| (&t.request, &t.holder)).collect();
        if own == tickets.len() {
            line.push(asked);
        }
        let mut survey = self.survey(&devices, leases, &tickets, &line, Some((own, unusable)));
        self.mark_turns(lock, &tickets, &survey, look)?;
        self.turn_of(own, devices, &tickets, &line, &mut survey, unusable)
    }

    /// What one who does not wait would get at the end of the line, and how many stand in it. Leaves no trace.
    pub(super) fn decide_at_the_end(
        &self,
        devices: Vec<Device>,
        leases: &[Lease],
        asked: (&Request, &Holder),
    ) -> (usize, Result<Chosen, Unmet>) {
        let tickets = match tickets_in(&self.store) {
            Ok(tickets) if tickets.is_empty() => {
                return (0, self.decide(devices, leases, asked.0, asked.1.uid, &[]));
            }
            Ok(tickets) => tickets,
            Err(failure) => return (0, Err(failure.into())),
        };
        let own = tickets.len();
        let line: Vec<(&Request, &Holder)> =
            tickets.iter().map(|t| (&t.request, &t.holder)).chain(std::iter::once(asked)).collect();
        let mut survey = self.survey(&devices, leases, &tickets, &line, Some((own, &[])));
        let turn = self.turn_of(own, devices, &tickets, &line, &mut survey, &[]);
        (own, turn.map(|(chosen, _)| chosen))
    }

    /// What the one at that place gets, and whom it overtakes by that.
    fn turn_of(
        &self,
        own: usize,
        devices: Vec<Device>,
        tickets: &[Ticket],
        line: &[(&Request, &Holder)],
        survey: &mut Survey,
        unusable: &[(String, String)],
    ) -> Result<(Chosen, Vec<u64>), Unmet> {
        if let Turn::Now(gpus) = &survey.line.turns[own]
            && let Some(Ok(chosen)) = survey.decisions[own].take()
        {
            let passed = survey.line.passed_over(&survey.waiters, own, gpus);
            return Ok((chosen, passed.into_iter().map(|at| tickets[at].number).collect()));
        }
        Err(self.why_not(devices, tickets, line, survey, own, unusable))
    }

    /// Records that those are overtaken so many times more.
    pub(super) fn count_overtakes(&self, lock: &Lock, numbers: &[u64], times: i32) -> Result<(), Failure> {
        for number in numbers {
            if let Some(mut ticket) = self.store.ticket::<Ticket>(*number, queue::VERSION)? {
                ticket.overtaken = ticket.overtaken.saturating_add_signed(times);
                self.store.put_ticket(lock, *number, &ticket)?;
            }
        }
        Ok(())
    }

    /// Looks at the whole line. `own`: the one that looks, and the GPUs that are of no use to it.
    fn survey(
        &self,
        devices: &[Device],
        leases: &[Lease],
        tickets: &[Ticket],
        line: &[(&Request, &Holder)],
        own: Option<(usize, &[(String, String)])>,
    ) -> Survey {
        let now = host::boot_ms();
        let mut wishes: Vec<(Request, Option<u32>, Gpus)> = Vec::new();
        let mut waiters: Vec<Waiter> = Vec::new();
        for (at, (request, holder)) in line.iter().enumerate() {
            let bare = Request { wait_s: None, ..(*request).clone() };
            let known = wishes.iter().position(|(wish, uid, _)| *wish == bare && *uid == holder.uid);
            let wish = known.unwrap_or_else(|| {
                let usable = self.could_use(devices, leases, &bare, holder.uid);
                wishes.push((bare, holder.uid, usable));
                wishes.len() - 1
            });
            let ticket = tickets.get(at);
            waiters.push(Waiter {
                wish,
                usable: wishes[wish].2.clone(),
                overtaken: ticket.map_or(0, |ticket| ticket.overtaken),
                limit: ticket.map_or(u32::MAX, |ticket| ticket.limit),
                asleep: own.is_none_or(|(own, _)| own != at) && ticket.is_some_and(|ticket| ticket.is_asleep(now)),
            });
        }
        let (mut devices, mut leases) = (devices.to_vec(), leases.to_vec());
        let mut decisions: Vec<Option<Result<Chosen, Unmet>>> = line.iter().map(|_| None).collect();
        let line = scan(&waiters, |at, closed| {
            let (request, holder) = line[at];
            let unusable = own.filter(|(own, _)| *own == at).map(|(_, unusable)| unusable).unwrap_or_default();
            let left_out = left_out(unusable, closed);
            let decided = self.decide(devices.clone(), &leases, request, holder.uid, &left_out);
            let gpus = decided.as_ref().ok().map(|chosen| chosen.slices.iter().map(|s| s.gpu.clone()).collect());
            if let Ok(chosen) = &decided {
                idle::take_out(&mut devices, &mut leases, |lease| chosen.evicted.contains(&lease.token));
            }
            if let Ok(chosen) = &decided
                && let Ok(lease) = self.new_lease(holder, chosen.slices.clone())
            {
                leases.push(lease);
            }
            decisions[at] = Some(decided);
            gpus
        });
        Survey { waiters, line, decisions, leases }
    }

    /// The GPUs that a request could use if every holder ended: not cordoned, offering what it wants, and with room for it
    /// beside what is kept.
    fn could_use(&self, devices: &[Device], leases: &[Lease], request: &Request, uid: Option<u32>) -> Gpus {
        let (kept, held): (Vec<Lease>, Vec<Lease>) =
            leases.iter().cloned().partition(|lease| lease.state == State::Static);
        let mut emptied = devices.to_vec();
        for device in &mut emptied {
            let gpu = device.uuid.clone();
            let ours = held.iter().flat_map(|lease| &lease.slices).filter(|slice| slice.ours);
            let goes: Vec<_> = ours.filter(|slice| slice.gpu == gpu).collect();
            device.instances.retain(|instance| !goes.iter().any(|slice| slice.is_at(&gpu, instance)));
        }
        let usable = self.usable_devices(emptied, request, &[]).unwrap_or_default();
        let wants: Vec<&Want> = request.alternatives.iter().flatten().collect();
        let serves = |device: &&Device| wants.iter().any(|want| self.could_serve(device, &kept, want, uid));
        usable.iter().filter(serves).map(|device| device.uuid.clone()).collect()
    }

    fn could_serve(&self, device: &Device, kept: &[Lease], want: &Want, uid: Option<u32>) -> bool {
        let profile = match want {
            Want::Profile(name) => profile::resolve_name(device, name),
            Want::Memory { bytes } => profile::resolve_memory(device, *bytes),
            Want::Uuid(uuid) => {
                let computes = device.instances.iter().flat_map(|instance| &instance.compute);
                return computes.into_iter().any(|compute| compute.uuid.eq_ignore_ascii_case(uuid));
            }
        };
        let for_it = kept.iter().filter(|l| l.reserved_for.is_none() || l.reserved_for == uid);
        let mut whole = for_it.flat_map(|l| &l.slices).filter(|s| s.gpu == device.uuid && s.compute_slices.is_none());
        let room = || self.place(std::slice::from_ref(device), kept, std::slice::from_ref(want)).is_ok();
        profile.is_some_and(|profile| whole.any(|s| s.profile == profile.id) || room())
    }

    /// Notes whose turn it is, and that all have been looked at; calls those whose turn has come.
    fn mark_turns(&self, lock: &Lock, tickets: &[Ticket], survey: &Survey, look: Look) -> Result<(), Failure> {
        let mut call = false;
        for (ticket, turn) in tickets.iter().zip(&survey.line.turns) {
            let since = match turn {
                Turn::Asleep => continue,
                Turn::Now(_) => Some(ticket.turn_boot_ms.unwrap_or_else(host::boot_ms)),
                Turn::Waits => None,
            };
            if since != ticket.turn_boot_ms {
                call |= since.is_some() && look.ticket != Some(ticket.number);
                let marked = Ticket { turn_boot_ms: since, ..ticket.clone() };
                self.store.put_ticket(lock, ticket.number, &marked)?;
            }
        }
        self.store.put_scanned(lock, look.begun_boot_ms)?;
        if call {
            self.store.ring();
        }
        Ok(())
    }

    /// Why it is not the turn of the one at that place.
    fn why_not(
        &self,
        devices: Vec<Device>,
        tickets: &[Ticket],
        line: &[(&Request, &Holder)],
        survey: &mut Survey,
        at: usize,
        unusable: &[(String, String)],
    ) -> Unmet {
        let closed = survey.line.closed_to(&survey.waiters, at);
        let remedy = if at < tickets.len() { "" } else { "; with mig.wait this one would wait in line" };
        let ticket = survey.line.barrier_before(&survey.waiters, at).and_then(|n| tickets.get(n));
        let barrier = ticket.map(|ticket| barrier_sentence(ticket) + remedy);
        let wanted = format_alternatives(&line[at].0.alternatives);
        let by_barrier = |why: &str| Refusal::new(Kind::Barrier, format!("no room for {wanted}: {why}")).into();
        if let Some(sentence) = &barrier
            && survey.waiters[at].usable.is_subset(&closed)
        {
            return by_barrier(sentence);
        }
        let leases = &survey.leases;
        let decide = |closed: &Gpus| {
            self.decide(devices.clone(), leases, line[at].0, line[at].1.uid, &left_out(unusable, closed))
        };
        let refusal = match survey.decisions[at].take().unwrap_or_else(|| decide(&closed)) {
            Err(Unmet::Refused(refusals)) => Refusal::joined(&refusals),
            Err(failed) => return failed,
            Ok(_) => Refusal::new(Kind::Barrier, "those who wait longer take what is free"),
        };
        // What is too much for the GPUs that are open may be none for all of them.
        let is_final = |refusal: &Refusal| !may_pass(refusal.kind);
        let needs_closed = barrier.is_some()
            && is_final(&refusal)
            && !matches!(decide(&Gpus::new()), Err(Unmet::Refused(all)) if is_final(&Refusal::joined(&all)));
        match barrier {
            Some(sentence) if needs_closed => by_barrier(&sentence),
            Some(sentence) => Refusal::new(refusal.kind, format!("{}; {sentence}", refusal.sentence)).into(),
            None => refusal.into(),
        }
    }

    /// Everybody in the line, and what each waits for. Changes nothing, and needs no lock.
    pub fn line(&self) -> Result<Vec<Standing>, Failure> {
        let tickets = tickets_in(&self.store)?;
        if tickets.is_empty() {
            return Ok(Vec::new());
        }
        let (devices, leases) = (self.managed_devices().map_err(Failure::from)?, self.leases()?);
        let line: Vec<(&Request, &Holder)> = tickets.iter().map(|t| (&t.request, &t.holder)).collect();
        let mut survey = self.survey(&devices, &leases, &tickets, &line, None);
        let standing = |at: usize| {
            let is_barrier = survey.line.is_barrier(&survey.waiters, at);
            let waits_for = match survey.line.turns[at] {
                Turn::Now(_) => None,
                Turn::Asleep => Some("it has not moved since its turn came: is it stopped?".into()),
                Turn::Waits => {
                    let unmet = self.why_not(devices.clone(), &tickets, &line, &mut survey, at, &[]);
                    Some(Failure::from(unmet).to_string())
                }
            };
            Standing { ticket: tickets[at].clone(), is_barrier, waits_for }
        };
        Ok((0..tickets.len()).map(standing).collect())
    }

    /// Takes one out of the line: it is refused. `None` where nobody has that number.
    pub fn cancel(&self, number: u64) -> Result<Option<Ticket>, Failure> {
        let lock = self.store.lock(ACQUIRE_LOCK_WAIT)?;
        let Some(ticket) = self.living_tickets(&lock)?.into_iter().find(|ticket| ticket.number == number) else {
            return Ok(None);
        };
        self.store.ring();
        self.store.remove_ticket(&lock, number)?;
        Ok(Some(ticket))
    }
}

/// GPUs that are not to be looked at, with the reason: those that failed, and those that barriers close.
fn left_out(unusable: &[(String, String)], closed: &Gpus) -> Vec<(String, String)> {
    let closed = closed.iter().map(|gpu| (gpu.clone(), "others wait for it".to_owned()));
    unusable.iter().cloned().chain(closed).collect()
}

fn seconds(ms: u64) -> u32 {
    u32::try_from(ms.div_ceil(1000)).unwrap_or(u32::MAX)
}

fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// Who stands in the way, for the refusal of one behind it.
fn barrier_sentence(ticket: &Ticket) -> String {
    let waited = seconds(host::boot_ms().saturating_sub(ticket.since_boot_ms));
    let times = if ticket.overtaken == 1 { "once".into() } else { format!("{} times", ticket.overtaken) };
    format!(
        "ticket {} ({}) has waited {} for {} and was overtaken {times}, as often as it may be: nobody behind it starts \
         before it does",
        ticket.number,
        ticket.held_by(),
        format_wait(waited.max(1)),
        format_alternatives(&ticket.request.alternatives)
    )
}

/// Lets that time go by, or less where it is cancelled meanwhile.
pub(super) fn is_cancelled_within(time: Duration, cancel: Option<&File>) -> bool {
    let mut polled: Vec<PollFd> = cancel.iter().map(|cancel| PollFd::new(cancel.as_fd(), PollFlags::POLLIN)).collect();
    let limit = PollTimeout::try_from(time).unwrap_or(PollTimeout::MAX);
    poll(&mut polled, limit).is_ok_and(|readable| readable > 0)
}

/// The process that waits for us, as long as it is our parent.
fn asker() -> Option<File> {
    let parent = host::parent(std::process::id())?;
    let process = handover::process(parent).ok()?;
    (host::parent(std::process::id()) == Some(parent)).then_some(process)
}

#[cfg(test)]
mod tests {
    use super::super::{BIND_LOCK_WAIT, BUSY_LIMIT, RELEASE_LOCK_WAIT, RELEASE_PAUSES, RELOCK_WAIT};
    use super::*;
    use crate::lease;

    #[test]
    fn the_bounds_that_are_documented_are_those_of_the_code() {
        let ms = Duration::from_millis;
        let bounds = [
            ACQUIRE_LOCK_WAIT,
            BIND_LOCK_WAIT,
            RELEASE_LOCK_WAIT,
            RELOCK_WAIT,
            CONTAINER_WAIT,
            WAITER_LOCK_WAIT,
            BUSY_LIMIT,
            RELEASE_PAUSES.iter().sum(),
            ms(lease::UNBOUND_LIMIT_MS),
            ms(lease::JOB_START_LIMIT_MS),
            ms(lease::ORPHAN_WAIT_MS),
        ];
        let page = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/reliability.md");
        let page = std::fs::read_to_string(page).unwrap();
        let table = page.split("\n## Bounds\n").nth(1).unwrap();
        let rows = table.lines().filter_map(|line| line.strip_prefix("| ")?.strip_suffix(" s |")?.rsplit(" | ").next());
        let told: Vec<Duration> = rows.map(|seconds| Duration::from_secs_f64(seconds.parse().unwrap())).collect();
        assert_eq!(told, bounds);
    }

    #[test]
    fn every_hook_that_waits_has_the_time_for_it() {
        let longest = ACQUIRE_LOCK_WAIT + CONTAINER_WAIT + WAITER_LOCK_WAIT + RELOCK_WAIT + Duration::from_secs(10);
        for file in ["hooks/mig-hook-precreate.json.in", "hooks/crio/mig-hook-create.json.in"] {
            let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(file);
            let hook: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
            let timeout = Duration::from_secs(hook["hook"]["timeout"].as_u64().unwrap());
            assert!(timeout >= longest, "{file}: {timeout:?} is less than {longest:?}");
        }
    }
}
