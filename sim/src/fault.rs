//! What a machine has been told to do wrong, and when.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::code::Code;

/// Most faults armed at a time.
pub const MAX_FAULTS: usize = 64;

/// Calls that change instances or modes: the ones that `serialise` puts in a row.
pub const MUTATORS: [&str; 7] = [
    "nvmlDeviceSetMigMode",
    "nvmlDeviceCreateGpuInstance",
    "nvmlDeviceCreateGpuInstanceWithPlacement",
    "nvmlGpuInstanceDestroy",
    "nvmlGpuInstanceCreateComputeInstance",
    "nvmlGpuInstanceCreateComputeInstanceWithPlacement",
    "nvmlComputeInstanceDestroy",
];

/// What a fault does to a call.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Action {
    /// Return this code and do nothing.
    Fail(u32),
    /// Take this many milliseconds longer.
    DelayMs(u64),
    /// SIGKILL the caller before anything happens.
    KillBefore,
    /// SIGKILL the caller when the effect is durable, before the call returns.
    KillAfter,
}

/// One armed fault.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Fault {
    /// Exported name, a prefix ending in `*`, or `*` for every call.
    pub call: String,
    /// Fires first at this matching call, counted from 1.
    pub nth: u64,
    /// For this many consecutive matching calls; `u64::MAX` means for ever.
    pub times: u64,
    /// Only calls about the GPU of this NVML index, and about what lies on it.
    pub gpu: Option<usize>,
    /// What happens.
    pub action: Action,
}

impl Fault {
    /// Whether it still waits, or fires on.
    pub fn armed(&self, tally: &Tally) -> bool {
        tally.counted < self.nth.saturating_sub(1).saturating_add(self.times)
    }

    fn means(&self, call: &str, gpu: Option<usize>) -> bool {
        matches(&self.call, call) && (self.gpu.is_none() || self.gpu == gpu)
    }
}

/// How often a fault's call was seen, and how often it fired.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize)]
pub struct Tally {
    /// Matching calls while it was armed.
    pub counted: u64,
    /// Times it fired.
    pub fired: u64,
}

/// A delay on every matching call.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Latency {
    /// As in [`Fault::call`].
    pub call: String,
    /// Milliseconds.
    pub ms: u64,
}

/// What waits for what while a slow change is under way.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Scope {
    /// Changes of the same GPU.
    Gpu,
    /// All changes.
    System,
}

/// Everything that the machine has been told.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Plan {
    /// By slot in the tally.
    pub faults: Vec<Fault>,
    /// Standing delays.
    pub latencies: Vec<Latency>,
    /// What a slow change holds up.
    pub serialise: Option<Scope>,
    /// Count calls by function.
    pub counting: bool,
    /// Enumerate MIG devices as they were at nvmlInit.
    pub stale: bool,
}

/// What is to happen to one call.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Verdict {
    /// Sleep before the effect.
    pub delay: Duration,
    /// Return this instead of doing anything.
    pub fail: Option<Code>,
    /// Die first.
    pub kill_before: bool,
    /// Die last.
    pub kill_after: bool,
}

/// Whether a call is meant by a pattern.
pub fn matches(pattern: &str, call: &str) -> bool {
    match pattern.strip_suffix('*') {
        Some(prefix) => call.starts_with(prefix),
        None => pattern == call,
    }
}

impl Plan {
    /// Decides about one call, of that GPU if it is about one, and counts it.
    pub fn judge(&self, call: &str, gpu: Option<usize>, tallies: &mut [Tally]) -> Verdict {
        let mut verdict = Verdict::default();
        for latency in self.latencies.iter().filter(|latency| matches(&latency.call, call)) {
            verdict.delay += Duration::from_millis(latency.ms);
        }
        for (fault, tally) in self.faults.iter().zip(tallies) {
            if !fault.means(call, gpu) || !fault.armed(tally) {
                continue;
            }
            tally.counted += 1;
            if tally.counted < fault.nth {
                continue;
            }
            tally.fired += 1;
            match fault.action {
                Action::Fail(code) => verdict.fail = verdict.fail.or(Some(Code(code))),
                Action::DelayMs(ms) => verdict.delay += Duration::from_millis(ms),
                Action::KillBefore => verdict.kill_before = true,
                Action::KillAfter => verdict.kill_after = true,
            }
        }
        verdict
    }

    /// Whether a call has to be looked at, at all.
    pub fn active(&self, tallies: &[Tally]) -> bool {
        self.counting
            || !self.latencies.is_empty()
            || self.serialise.is_some()
            || self.faults.iter().zip(tallies).any(|(fault, tally)| fault.armed(tally))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(call: &str, nth: u64, times: u64, action: Action) -> Plan {
        Plan { faults: vec![Fault { call: call.into(), nth, times, gpu: None, action }], ..Plan::default() }
    }

    #[test]
    fn a_fault_fires_at_the_nth_call_and_disarms() {
        let plan = plan("nvmlGpuInstanceDestroy", 2, 3, Action::Fail(19));
        let mut tallies = [Tally::default()];
        let fired: Vec<bool> =
            (0..7).map(|_| plan.judge("nvmlGpuInstanceDestroy", None, &mut tallies).fail.is_some()).collect();
        assert_eq!(fired, [false, true, true, true, false, false, false]);
        assert_eq!(tallies, [Tally { counted: 4, fired: 3 }]);
        assert!(!plan.active(&tallies));
        assert_eq!(plan.judge("nvmlComputeInstanceDestroy", None, &mut tallies), Verdict::default());
    }

    #[test]
    fn a_star_means_every_call_and_for_ever_never_ends() {
        let plan = plan("*", 1, u64::MAX, Action::KillBefore);
        let mut tallies = [Tally::default()];
        for call in ["nvmlInit_v2", "nvmlShutdown"] {
            assert!(plan.judge(call, None, &mut tallies).kill_before);
        }
        assert!(plan.active(&tallies));
    }

    #[test]
    fn a_prefix_covers_the_variants_of_a_call() {
        assert!(matches("nvmlDeviceCreateGpuInstance*", "nvmlDeviceCreateGpuInstanceWithPlacement"));
        assert!(!matches("nvmlDeviceCreateGpuInstance", "nvmlDeviceCreateGpuInstanceWithPlacement"));
    }

    #[test]
    fn delays_add_up_and_the_first_failure_wins() {
        let mut plan = plan("*", 1, 1, Action::DelayMs(20));
        plan.latencies.push(Latency { call: "*".into(), ms: 5 });
        plan.faults.extend([19, 23].map(|code| Fault {
            call: "*".into(),
            nth: 1,
            times: 1,
            gpu: None,
            action: Action::Fail(code),
        }));
        let verdict = plan.judge("nvmlInit_v2", None, &mut [Tally::default(); 3]);
        assert_eq!((verdict.delay, verdict.fail), (Duration::from_millis(25), Some(Code::IN_USE)));
    }
}
