//! What a machine looks like, for people and for test checkers.

use std::path::Path;

use serde::Serialize;

use crate::board::Span;
use crate::fault::{Action, Fault, Latency, Plan, Scope, Tally};
use crate::rules;
use crate::state::{Config, Hold, Load, Majors, State, ci_cap_minor, gi_cap_minor};

/// A machine.
#[derive(Debug, Serialize)]
pub struct Report {
    root: String,
    driver_version: String,
    majors: Majors,
    gpus: Vec<GpuReport>,
    holds: Vec<Hold>,
}

#[derive(Debug, Serialize)]
struct GpuReport {
    index: usize,
    minor: u32,
    board: String,
    name: String,
    uuid: String,
    pci_bus_id: String,
    memory_mib: u64,
    id_map: crate::state::IdMap,
    mig_current: bool,
    mig_pending: bool,
    persistence: bool,
    load: Load,
    gpu_instances: Vec<GiReport>,
}

#[derive(Debug, Serialize)]
struct GiReport {
    id: u32,
    profile_id: u32,
    profile: String,
    placement: Span,
    memory_mib: u64,
    cap_minor: u32,
    birth: u32,
    held: bool,
    load: Load,
    compute_instances: Vec<CiReport>,
}

#[derive(Debug, Serialize)]
struct CiReport {
    id: u32,
    profile_id: u32,
    profile: String,
    placement: Span,
    cap_minor: u32,
    birth: u32,
    uuid: String,
    load: Load,
}

impl Report {
    /// Describes a machine.
    pub fn new(root: &Path, config: &Config, state: &State) -> Self {
        Self {
            root: root.display().to_string(),
            driver_version: config.driver_version.clone(),
            majors: config.majors,
            gpus: (0..config.gpus.len()).filter_map(|index| gpu(config, state, index)).collect(),
            holds: state.holds.clone(),
        }
    }

    /// For people.
    pub fn text(&self) -> String {
        let mut lines = vec![format!("{} (driver {})", self.root, self.driver_version)];
        for gpu in &self.gpus {
            let mode = match (gpu.mig_current, gpu.mig_pending) {
                (true, true) => "MIG on",
                (false, false) => "MIG off",
                (false, true) => "MIG off, on after a reset",
                (true, false) => "MIG on, off after a reset",
            };
            lines.push(format!("GPU {} (minor {}): {} {}: {mode}", gpu.index, gpu.minor, gpu.name, gpu.uuid));
            for gi in &gpu.gpu_instances {
                let held = if gi.held { ", held" } else { "" };
                lines.push(format!(
                    "  gi{}: {} at {}, nvidia-cap{}{held}",
                    gi.id, gi.profile, gi.placement, gi.cap_minor
                ));
                for ci in &gi.compute_instances {
                    lines.push(format!("    ci{}: {}, nvidia-cap{}, {}", ci.id, ci.profile, ci.cap_minor, ci.uuid));
                }
            }
        }
        for hold in self.holds.iter().filter(|hold| hold.gi.is_none()) {
            lines.push(format!("GPU {} is held as a whole", hold.gpu));
        }
        lines.join("\n")
    }
}

fn gpu(config: &Config, state: &State, index: usize) -> Option<GpuReport> {
    let (fixed, board, gpu) = (config.gpus.get(index)?, config.board(index)?, state.gpus.get(index)?);
    let gpu_instances = gpu.gis.iter().filter_map(|gi| {
        let profile = board.profile(gi.profile)?;
        let compute_instances = gi.cis.iter().filter_map(|ci| {
            Some(CiReport {
                id: ci.id,
                profile_id: ci.profile,
                profile: rules::ci_profile(profile, ci.profile, crate::code::Code::UNKNOWN).ok()?.name.clone(),
                placement: ci.span,
                cap_minor: ci_cap_minor(fixed.minor, gi.id, ci.id),
                birth: ci.birth,
                uuid: config.mig_uuid(index, gi.id, ci.id),
                load: ci.load,
            })
        });
        Some(GiReport {
            id: gi.id,
            profile_id: gi.profile,
            profile: profile.name.clone(),
            placement: gi.span,
            memory_mib: profile.memory_mib,
            cap_minor: gi_cap_minor(fixed.minor, gi.id),
            birth: gi.birth,
            held: state.held(index, gi.id),
            load: gi.load,
            compute_instances: compute_instances.collect(),
        })
    });
    Some(GpuReport {
        index,
        minor: fixed.minor,
        board: board.key.clone(),
        name: board.name.clone(),
        uuid: fixed.uuid.clone(),
        pci_bus_id: fixed.bus_id(),
        memory_mib: board.memory_mib,
        id_map: fixed.id_map,
        mig_current: gpu.current,
        mig_pending: gpu.pending,
        persistence: gpu.persistence,
        load: gpu.load,
        gpu_instances: gpu_instances.collect(),
    })
}

/// What the machine has been told to do wrong.
#[derive(Debug, Serialize)]
pub struct Orders {
    faults: Vec<FaultReport>,
    latencies: Vec<Latency>,
    serialise: Option<Scope>,
    counting: bool,
    stale: bool,
}

#[derive(Debug, Serialize)]
struct FaultReport {
    call: String,
    nth: u64,
    /// Absent means for ever.
    times: Option<u64>,
    /// Absent means any GPU.
    #[serde(skip_serializing_if = "Option::is_none")]
    gpu: Option<usize>,
    action: Action,
    counted: u64,
    fired: u64,
    armed: bool,
}

impl Orders {
    /// Describes the orders of a machine.
    pub fn new(plan: &Plan, tallies: &[Tally]) -> Self {
        let report = |(fault, tally): (&Fault, &Tally)| FaultReport {
            call: fault.call.clone(),
            nth: fault.nth,
            times: Some(fault.times).filter(|times| *times != u64::MAX),
            gpu: fault.gpu,
            action: fault.action,
            counted: tally.counted,
            fired: tally.fired,
            armed: fault.armed(tally),
        };
        Self {
            faults: plan.faults.iter().zip(tallies).map(report).collect(),
            latencies: plan.latencies.clone(),
            serialise: plan.serialise,
            counting: plan.counting,
            stale: plan.stale,
        }
    }

    /// For people.
    pub fn text(&self) -> String {
        let mut lines = Vec::new();
        for fault in &self.faults {
            let action = match fault.action {
                Action::Fail(code) => format!("return {}", crate::code::Code(code).name()),
                Action::DelayMs(ms) => format!("take {ms} ms longer"),
                Action::KillBefore => "kill the caller before the effect".into(),
                Action::KillAfter => "kill the caller after the effect".into(),
            };
            let times = match fault.times {
                None => "for ever".into(),
                Some(1) => "once".into(),
                Some(times) => format!("{times} times"),
            };
            let armed = if fault.armed { "armed" } else { "spent" };
            let of = fault.gpu.map_or_else(String::new, |gpu| format!(" of GPU {gpu}"));
            lines.push(format!(
                "{}{of}: {action} from call {} on, {times}: {armed}, counted {}, fired {}",
                fault.call, fault.nth, fault.counted, fault.fired
            ));
        }
        lines.extend(self.latencies.iter().map(|latency| format!("{}: {} ms each", latency.call, latency.ms)));
        lines.extend(self.serialise.map(|scope| match scope {
            Scope::Gpu => "changes of one GPU wait for each other".to_owned(),
            Scope::System => "all changes wait for each other".to_owned(),
        }));
        if self.counting {
            lines.push("calls are counted".into());
        }
        if self.stale {
            lines.push("MIG devices are enumerated as nvmlInit found them".into());
        }
        if lines.is_empty() { "nothing is armed".into() } else { lines.join("\n") }
    }
}
