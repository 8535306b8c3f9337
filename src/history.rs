//! Who held which slices, and how long: audit lines in, holds out. A grant and the release of the same token make a
//! hold. Pure.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};

use crate::lease::{Lease, Slice, State};
use crate::profile;

/// A later time in a line is damage: the first millisecond of the year 9999.
const LATEST_MS: u64 = 253_370_764_800_000;
/// Milliseconds of an hour.
const HOUR_MS: f64 = 3_600_000.0;

/// An audit line, as far as it is of interest here. `audit_…` of the engine writes them.
#[derive(Debug, Deserialize)]
struct Line {
    event: String,
    time_ms: u64,
    boot: Option<String>,
    token: Option<String>,
    container: Option<String>,
    image: Option<String>,
    job: Option<String>,
    command: Option<String>,
    uid: Option<u32>,
    #[serde(default)]
    slices: Vec<Part>,
    reason: Option<String>,
    held_ms: Option<u64>,
}

/// One slice of a hold.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Part {
    /// `GPU-…` of the parent.
    pub gpu: String,
    /// Its NVML index at the time.
    pub gpu_index: Option<u32>,
    /// `1g.10gb`.
    pub profile: String,
    /// Memory of the profile in MiB.
    #[serde(default)]
    pub memory_mib: u64,
    /// `MIG-…`. It comes again with the next slice at the same place.
    pub uuid: Option<String>,
}

/// How a hold ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum End {
    /// The slices were given back.
    Released,
    /// Not yet: a lease stands.
    Holding,
    /// It was not written down.
    Unknown,
}

/// What a container held, from grant to release.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hold {
    /// The lease.
    pub token: String,
    /// Who, as far as known.
    pub who: Who,
    /// Milliseconds since 1970.
    pub start_ms: u64,
    /// Milliseconds, until now for one that goes on; `None` where the end is not known.
    pub held_ms: Option<u64>,
    /// How it ended.
    pub end: End,
    /// Why it ended, in words.
    pub reason: Option<String>,
    /// What was held, in the order asked.
    pub slices: Vec<Part>,
    boot: Option<String>,
}

/// Who held, or was refused.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Who {
    /// Login uid of who started the container.
    pub uid: Option<u32>,
    /// Container id.
    pub container: Option<String>,
    /// Its image, where the engine told it.
    pub image: Option<String>,
    /// Key of the job.
    pub job: Option<String>,
    /// Program of the command.
    pub command: Option<String>,
}

/// What a line completes.
#[derive(Debug, PartialEq, Eq)]
pub enum Entry {
    /// A release.
    Hold(Hold),
    /// A request that was refused at that time, in milliseconds since 1970.
    Refusal(Who, u64),
}

/// A line that is no audit line.
#[derive(Debug, PartialEq, Eq)]
pub struct Unreadable;

/// What the leases of this machine say of grants without a release.
#[derive(Debug)]
pub enum Standing<'a> {
    /// These stand, on this boot. `own_log`: the lines are this machine's, so that a lease without a grant is only one
    /// that was given before they begin.
    Known {
        /// All of them.
        leases: &'a [Lease],
        /// This boot.
        boot: &'a str,
        /// Whether the lines are this machine's.
        own_log: bool,
    },
    /// Only root can tell.
    Hidden,
}

/// Grants that wait for their releases.
#[derive(Debug, Default)]
pub struct Ledger {
    open: HashMap<String, Hold>,
}

impl Ledger {
    /// Takes in one line.
    pub fn read(&mut self, line: &[u8]) -> Result<Option<Entry>, Unreadable> {
        let line: Line = serde_json::from_slice(line).map_err(|_| Unreadable)?;
        if line.time_ms >= LATEST_MS {
            return Err(Unreadable);
        }
        let who =
            Who { uid: line.uid, container: line.container, image: line.image, job: line.job, command: line.command };
        match (line.event.as_str(), line.token) {
            ("refusal", _) => Ok(Some(Entry::Refusal(who, line.time_ms))),
            ("grant", Some(token)) => {
                let hold = Hold {
                    token: token.clone(),
                    who,
                    start_ms: line.time_ms,
                    held_ms: None,
                    end: End::Unknown,
                    reason: None,
                    slices: line.slices,
                    boot: line.boot,
                };
                self.open.insert(token, hold);
                Ok(None)
            }
            ("release", Some(token)) => {
                self.open.remove(&token);
                let held_ms = line.held_ms.ok_or(Unreadable)?;
                Ok(Some(Entry::Hold(Hold {
                    token,
                    who,
                    start_ms: line.time_ms.saturating_sub(held_ms),
                    held_ms: Some(held_ms),
                    end: End::Released,
                    reason: line.reason,
                    slices: line.slices,
                    boot: line.boot,
                })))
            }
            ("grant" | "release", None) => Err(Unreadable),
            _ => Ok(None),
        }
    }

    /// The holds without a release: those that go on, and those whose end is not known.
    pub fn close(mut self, standing: &Standing<'_>, now_ms: u64) -> Vec<Hold> {
        let (leases, this_boot, own_log) = match standing {
            Standing::Known { leases, boot, own_log } => (*leases, Some(*boot), *own_log),
            Standing::Hidden => ([].as_slice(), None, false),
        };
        let mut holds = Vec::new();
        for lease in leases.iter().filter(|lease| lease.granted_boot_ms.is_some()) {
            let granted = self.open.remove(&lease.token);
            if granted.is_some() || own_log {
                let start_ms = granted.map_or(lease.created_ms, |hold| hold.start_ms);
                holds.push(going_on(lease, start_ms, now_ms));
            }
        }
        for mut hold in self.open.into_values() {
            let reason = match (this_boot, &hold.boot) {
                (None, _) => "not released in this log; whether it goes on is shown to root only",
                (Some(this), Some(then)) if this != then => "not released before the machine was restarted",
                (Some(_), _) => "not released in this log, and no lease of it stands here",
            };
            hold.reason = Some(reason.to_owned());
            holds.push(hold);
        }
        holds
    }
}

fn going_on(lease: &Lease, start_ms: u64, now_ms: u64) -> Hold {
    let holder = &lease.holder;
    let part = |slice: &Slice| Part {
        gpu: slice.gpu.clone(),
        gpu_index: Some(slice.gpu_index),
        profile: slice.profile_name.clone(),
        memory_mib: slice.memory_mib,
        uuid: slice.uuid.clone(),
    };
    let reason = match lease.state {
        State::Releasing | State::Quarantined => lease.reason.clone(),
        State::Pending | State::Active | State::Static | State::Idle => None,
    };
    Hold {
        token: lease.token.clone(),
        who: Who {
            uid: holder.uid,
            container: holder.container.clone(),
            image: holder.image.clone(),
            job: holder.job.clone(),
            command: holder.command.clone(),
        },
        start_ms,
        held_ms: Some(now_ms.saturating_sub(start_ms)),
        end: End::Holding,
        reason,
        slices: lease.slices.iter().map(part).collect(),
        boot: None,
    }
}

/// What is asked of the history.
#[derive(Debug, Default)]
pub struct Selection {
    /// From then on, in milliseconds since 1970.
    pub since_ms: Option<u64>,
    /// Up to then.
    pub until_ms: Option<u64>,
    /// Of that user.
    pub uid: Option<u32>,
    /// Of images with that in their name.
    pub image: Option<String>,
    /// Of containers whose id begins so.
    pub container: Option<String>,
}

impl Selection {
    /// Milliseconds of a hold that count: those in the period. `None` for a hold that is not meant. Of one whose end is
    /// not known nothing counts, and it belongs to when it began.
    pub fn counted(&self, hold: &Hold) -> Option<u64> {
        if !self.is_of(&hold.who) {
            return None;
        }
        let Some(held) = hold.held_ms else { return self.is_at(hold.start_ms).then_some(0) };
        let end = hold.start_ms.saturating_add(held);
        let (since, until) = (self.since_ms.unwrap_or(0), self.until_ms.unwrap_or(u64::MAX));
        let touches = end >= since && hold.start_ms < until;
        touches.then(|| end.min(until).saturating_sub(hold.start_ms.max(since)))
    }

    /// Whether a refusal is meant.
    pub fn includes(&self, who: &Who, time_ms: u64) -> bool {
        self.is_of(who) && self.is_at(time_ms)
    }

    fn is_at(&self, time_ms: u64) -> bool {
        self.since_ms.is_none_or(|since| time_ms >= since) && self.until_ms.is_none_or(|until| time_ms < until)
    }

    fn is_of(&self, who: &Who) -> bool {
        let has = |value: &Option<String>, fits: fn(&str, &str) -> bool, wanted: &Option<String>| {
            wanted.as_deref().is_none_or(|wanted| value.as_deref().is_some_and(|value| fits(value, wanted)))
        };
        self.uid.is_none_or(|uid| who.uid == Some(uid))
            && has(&who.image, |image, part| image.contains(part), &self.image)
            && has(&who.container, |id, beginning| id.starts_with(beginning), &self.container)
    }
}

/// What holds come to.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Sums {
    /// How many.
    pub holds: u64,
    /// How many of them go on.
    pub holding: u64,
    /// How many of them have no known end. They count no hours.
    pub unknown_ends: u64,
    /// Hours times slices, in the period.
    pub slice_hours: f64,
    /// Hours times memory of the profiles in GiB (2^30 bytes), in the period.
    pub gib_hours: f64,
    /// Hours times compute slices (3 of `3g.40gb`, 1 of `1c.3g.40gb`), in the period.
    pub compute_slice_hours: f64,
}

impl Sums {
    /// Adds these slices of a hold, of whose time that much counts.
    pub fn add<'a>(&mut self, hold: &Hold, slices: impl Iterator<Item = &'a Part>, counted_ms: u64) {
        self.holds += 1;
        self.holding += u64::from(hold.end == End::Holding);
        self.unknown_ends += u64::from(hold.end == End::Unknown);
        let hours = counted_ms as f64 / HOUR_MS;
        for slice in slices {
            self.slice_hours += hours;
            self.gib_hours += hours * slice.memory_mib as f64 / 1024.0;
            self.compute_slice_hours += hours * f64::from(compute_slices(&slice.profile));
        }
    }
}

fn compute_slices(profile: &str) -> u32 {
    profile::split_compute(profile).map_or_else(|| profile::compute_slices(profile), |(slices, _)| slices)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lease::{Way, tests::lease};

    const HOUR: u64 = 3_600_000;

    fn slices(profiles: &[(&str, u64)]) -> String {
        let slice = |(profile, mib): &(&str, u64)| {
            format!(
                r#"{{"gpu":"GPU-a","gpu_index":0,"profile":"{profile}","memory_mib":{mib},"placement":{{"start":0,"size":1}},"uuid":"MIG-{profile}"}}"#
            )
        };
        profiles.iter().map(slice).collect::<Vec<_>>().join(",")
    }

    fn grant(token: &str, time_ms: u64, boot: &str) -> String {
        format!(
            r#"{{"event":"grant","time_ms":{time_ms},"container":null,"image":null,"uid":1000,"way":"precreate","boot":"{boot}","request":"1g.10gb","token":"{token}","slices":[{}]}}"#,
            slices(&[("1g.10gb", 9728)])
        )
    }

    fn release(token: &str, time_ms: u64, held_ms: u64, profiles: &[(&str, u64)]) -> String {
        format!(
            r#"{{"event":"release","time_ms":{time_ms},"container":"web","image":"nginx:1","uid":1000,"way":"precreate","boot":"b","token":"{token}","reason":"its container has ended","slices":[{}],"held_ms":{held_ms}}}"#,
            slices(profiles)
        )
    }

    fn hold(line: &str) -> Hold {
        match Ledger::default().read(line.as_bytes()) {
            Ok(Some(Entry::Hold(hold))) => hold,
            other => panic!("{other:?}"),
        }
    }

    fn standing(token: &str) -> Lease {
        let mut lease = lease(State::Active, Way::Shim);
        (lease.token, lease.created_ms, lease.granted_boot_ms) = (token.into(), 5 * HOUR, Some(1));
        lease.holder.container = Some("later".into());
        lease
    }

    #[test]
    fn a_release_is_a_hold_with_or_without_its_grant() {
        let mut ledger = Ledger::default();
        assert_eq!(ledger.read(grant("t", 10 * HOUR, "b").as_bytes()), Ok(None));
        let line = release("t", 12 * HOUR + 7, 2 * HOUR, &[("1g.10gb", 9728)]);
        let Ok(Some(Entry::Hold(with))) = ledger.read(line.as_bytes()) else { panic!() };
        assert_eq!((with.start_ms, with.held_ms, with.end), (10 * HOUR + 7, Some(2 * HOUR), End::Released));
        assert_eq!(with, hold(&line));
        assert_eq!(ledger.close(&Standing::Hidden, 0), []);
    }

    #[test]
    fn what_has_no_release_goes_on_only_where_a_lease_stands() {
        let read = || {
            let mut ledger = Ledger::default();
            for line in [grant("on", HOUR, "now"), grant("lost", HOUR, "now"), grant("before", HOUR, "then")] {
                ledger.read(line.as_bytes()).unwrap();
            }
            ledger
        };
        let ends = |standing: &Standing<'_>| {
            let mut holds = read().close(standing, 3 * HOUR);
            holds.sort_by(|a, b| a.token.cmp(&b.token));
            let end = |h: Hold| (h.token, h.end, h.held_ms, h.who.container, h.reason.unwrap_or_default());
            holds.into_iter().map(end).collect::<Vec<_>>()
        };
        let leases = [standing("on"), standing("unlogged")];
        let known = |own_log| Standing::Known { leases: &leases, boot: "now", own_log };
        let of_others = ends(&known(false));
        assert_eq!(of_others.len(), 3, "a lease of this machine is in no log of others: {of_others:?}");
        assert!(of_others[0].1 == End::Unknown && of_others[0].4.contains("restarted"), "{of_others:?}");
        assert!(of_others[1].1 == End::Unknown && of_others[1].4.contains("no lease of it stands"), "{of_others:?}");
        assert_eq!(of_others[2].1, End::Holding);
        assert_eq!((of_others[2].2, of_others[2].3.as_deref()), (Some(2 * HOUR), Some("later")));
        let own = ends(&known(true));
        assert_eq!((own.len(), own[3].0.as_str(), own[3].1), (4, "unlogged", End::Holding));
        assert!(ends(&Standing::Hidden).iter().all(|h| h.1 == End::Unknown && h.4.contains("root")));
    }

    #[test]
    fn only_what_lies_in_the_period_counts() {
        let hold = hold(&release("t", 10 * HOUR, 4 * HOUR, &[("1g.10gb", 9728)])); // 6 to 10
        let counted = |since: Option<u64>, until: Option<u64>| {
            let ms = |hours: Option<u64>| hours.map(|hours| hours * HOUR);
            let selection = Selection { since_ms: ms(since), until_ms: ms(until), ..Selection::default() };
            selection.counted(&hold).map(|ms| ms / HOUR)
        };
        for (since, until, expected) in [
            (None, None, Some(4)),
            (Some(8), None, Some(2)),
            (None, Some(7), Some(1)),
            (Some(7), Some(9), Some(2)),
            (Some(11), None, None),
            (None, Some(6), None),
        ] {
            assert_eq!(counted(since, until), expected, "{since:?} to {until:?}");
        }
        let unknown = Hold { held_ms: None, end: End::Unknown, ..hold };
        let since = |ms| Selection { since_ms: Some(ms), ..Selection::default() }.counted(&unknown);
        assert_eq!((since(6 * HOUR), since(7 * HOUR)), (Some(0), None));
    }

    #[test]
    fn by_user_image_and_container() {
        let hold = hold(&release("t", 10 * HOUR, HOUR, &[("1g.10gb", 9728)]));
        let yes = |selection: Selection| selection.counted(&hold).is_some();
        let s = |text: &str| Some(text.to_owned());
        assert!(yes(Selection { uid: Some(1000), image: s("nginx"), container: s("we"), ..Selection::default() }));
        assert!(!yes(Selection { uid: Some(0), ..Selection::default() }));
        assert!(!yes(Selection { image: s("apache"), ..Selection::default() }));
        assert!(!yes(Selection { container: s("eb"), ..Selection::default() }));
    }

    #[test]
    fn hours_of_slices_memory_and_compute_slices() {
        let hold = hold(&release("t", 10 * HOUR, 2 * HOUR, &[("3g.40gb", 40 << 10), ("1c.3g.40gb", 20 << 10)]));
        let mut sums = Sums::default();
        sums.add(&hold, hold.slices.iter(), HOUR / 2);
        assert_eq!((sums.holds, sums.slice_hours, sums.gib_hours, sums.compute_slice_hours), (1, 1.0, 30.0, 2.0));
    }

    #[test]
    fn damage_is_told_and_other_events_are_not_damage() {
        let mut ledger = Ledger::default();
        let whole = release("t", HOUR, 1, &[]);
        for cut in (1..whole.len()).filter(|cut| whole.is_char_boundary(*cut)) {
            assert_eq!(ledger.read(&whole.as_bytes()[..cut]), Err(Unreadable), "{}", &whole[..cut]);
        }
        for damaged in ["", "null", "[]", "{}", r#"{"event":"grant","time_ms":1}"#, r#"{"event":"grant","time_ms":-1}"#]
        {
            assert_eq!(ledger.read(damaged.as_bytes()), Err(Unreadable), "{damaged}");
        }
        assert_eq!(ledger.read(&grant("t", LATEST_MS, "b").into_bytes()), Err(Unreadable));
        assert_eq!(ledger.read(br#"{"event":"create","time_ms":1,"token":"t","slices":[],"more":{}}"#), Ok(None));
        assert!(matches!(ledger.read(br#"{"event":"refusal","time_ms":1}"#), Ok(Some(Entry::Refusal(_, 1)))));
    }
}
