//! Who has slices open that should not: a slice is destroyed only when nobody has.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;

use super::gpus::Gpus;
use super::{Check, listed};
use crate::config::Settings;
use crate::host;
use crate::lease::{Lease, Slice, State};

/// Programs that watch GPUs, by the name that the kernel keeps, and what stops them.
const AGENTS: [(&str, &str); 4] = [
    ("nv-hostengine", "systemctl stop nvidia-dcgm"),
    ("dcgm-exporter", "systemctl stop dcgm-exporter"),
    ("nvidia-persiste", "systemctl stop nvidia-persistenced"),
    ("nvidia_gpu_expo", "systemctl stop nvidia_gpu_exporter"),
];

/// A process that has a slice open, or that the driver lists in it.
#[derive(Debug, Clone)]
struct Process {
    pid: u32,
    name: String,
    /// Whether it only watches: one of `slices.agents`.
    watches: bool,
}

/// A slice of a lease, with the processes in it that are not of its container.
struct Held<'a> {
    /// Which of its lease's slices it is.
    number: usize,
    lease: &'a Lease,
    slice: &'a Slice,
    outsiders: Vec<Process>,
}

pub(super) fn checks(gpus: &Gpus, settings: &Settings, leases: &[Lease]) -> Vec<Check> {
    let id = "holder.slices";
    if !nix::unistd::geteuid().is_root() {
        return vec![Check::skip(id, "open devices of other users are shown to root only")];
    }
    let devices = fs::read_to_string(settings.proc_root.join("devices")).unwrap_or_default();
    let minors: BTreeSet<u32> = leases.iter().flat_map(Lease::minors).collect();
    let open = match host::major(&devices, "nvidia-caps") {
        Some(major) if !minors.is_empty() => host::openers_of(major),
        _ => vec![],
    };
    // What is kept, or was there before us, is not destroyed when a container ends.
    let ended = leases.iter().filter(|lease| lease.state != State::Static);
    let slices = ended.flat_map(|lease| lease.slices.iter().enumerate().map(move |(n, slice)| (lease, n, slice)));
    let held = slices.filter(|(_, _, slice)| slice.ours).map(|(lease, number, slice)| {
        let outsiders = outsiders(lease, slice, &open, gpus, &settings.agents);
        Held { number, lease, slice, outsiders }
    });
    let checks: Vec<Check> = held.filter_map(|held| verdict(&held)).collect();
    match checks.is_empty() {
        true => vec![Check::ok(id, "nothing stands in the way of destroying a slice when its container ends")],
        false => checks,
    }
}

fn outsiders(
    lease: &Lease,
    slice: &Slice,
    open: &[(u32, BTreeSet<u32>)],
    gpus: &Gpus,
    agents: &[PathBuf],
) -> Vec<Process> {
    let minors: BTreeSet<u32> = [slice.gi_minor, slice.ci_minor].into_iter().flatten().collect();
    let with_open = open.iter().filter(|(_, theirs)| !theirs.is_disjoint(&minors)).map(|(pid, _)| *pid);
    let gpu = gpus.seen().iter().find(|gpu| gpu.device.uuid == slice.gpu);
    let listed = gpu.into_iter().flat_map(|gpu| &gpu.processes);
    let listed = listed.filter(|process| slice.gi.is_some() && process.instance == slice.gi).map(|process| process.pid);
    let pids: BTreeSet<u32> = with_open.chain(listed).collect();
    let outside = pids.into_iter().filter(|pid| !is_of_container(lease, *pid));
    let described = |pid| Process { pid, name: host::process_name(pid), watches: host::is_agent(pid, agents) };
    outside.map(described).collect()
}

/// Whether a process is in the container of a living lease.
fn is_of_container(lease: &Lease, pid: u32) -> bool {
    let holder = &lease.holder;
    lease.state == State::Active
        && (holder.init.is_some_and(|init| init.pid == pid)
            || holder.cgroup.as_deref().is_some_and(|cgroup| host::is_in_cgroup(pid, cgroup)))
}

fn verdict(held: &Held) -> Option<Check> {
    let Held { number, lease, slice, outsiders } = held;
    let id = format!("holder.{}.{number}", lease.token);
    let name = format!("slice {} at {} of GPU {}", slice.profile_name, slice.placement, slice.gpu_index);
    let who: Vec<String> = outsiders.iter().map(|p| format!("{} (pid {})", p.name, p.pid)).collect();
    let remedy = stop(outsiders, slice.gpu_minor);
    let found = match (lease.state, who.is_empty()) {
        (State::Static, _) | (State::Pending | State::Active | State::Idle, true) => return None,
        (State::Idle, false) => {
            format!("{name} is idle, and can't be destroyed for another profile: it is open in {}", listed(&who))
        }
        (State::Pending | State::Active, false) if outsiders.iter().all(|process| process.watches) => format!(
            "{name}, of {}, is also open in {}, which only watches it: when its container ends it stays, idle, for the next of \
             its profile",
            lease.held_by(),
            listed(&who)
        ),
        (State::Pending | State::Active, false) => format!(
            "{name}, of {}, is also open in {}: it can't be destroyed while that lasts",
            lease.held_by(),
            listed(&who)
        ),
        (State::Releasing, true) => format!(
            "{name}, of {}, is still to be destroyed; no process is to be seen that has it open",
            lease.held_by()
        ),
        (State::Releasing, false) => {
            format!("{name}, of {}, can't be destroyed: it is open in {}", lease.held_by(), listed(&who))
        }
        (State::Quarantined, _) => {
            format!("{name} is quarantined: {}", lease.reason.as_deref().unwrap_or("no reason is recorded"))
        }
    };
    Some(Check::warn(id, found, remedy))
}

fn stop(outsiders: &[Process], gpu_minor: u32) -> String {
    if outsiders.is_empty() {
        return format!(
            "run: migctl gc\nif it stays in use, an agent keeps a handle, often DCGM or an exporter: fuser -v \
             /dev/nvidia{gpu_minor} names it; stop it, then: migctl gc"
        );
    }
    let command = |process: &Process| {
        let agent = AGENTS.iter().find(|(name, _)| *name == process.name);
        agent.map_or_else(|| format!("kill {}", process.pid), |(_, command)| (*command).to_owned())
    };
    let mut commands: Vec<String> = outsiders.iter().map(command).collect();
    commands.dedup();
    format!("stop it: {}\nthen free what is over: migctl gc", commands.join(" && "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::{Placement, ProfileId};
    use crate::lease::tests::lease;
    use crate::lease::{Step, Way};

    fn slice() -> Slice {
        Slice {
            gpu: "GPU-a".into(),
            gpu_index: 0,
            gpu_minor: 3,
            profile: ProfileId(19),
            profile_name: "1g.10gb".into(),
            memory_mib: 0,
            placement: Placement { start: 4, size: 1 },
            compute_slices: None,
            ours: true,
            step: Step::Whole,
            gi: Some(7),
            ci: Some(0),
            uuid: None,
            gi_minor: None,
            ci_minor: None,
        }
    }

    fn said(state: State, names: &[&str]) -> Option<String> {
        let (lease, slice) = (lease(state, Way::Shim), slice());
        let watches = |name: &str| name == "nv-hostengine";
        let process = |name: &&str| Process { pid: 9, name: (*name).to_owned(), watches: watches(name) };
        let outsiders = names.iter().map(process).collect();
        let check = verdict(&Held { number: 4, lease: &lease, slice: &slice, outsiders })?;
        assert_eq!(check.id, "holder.t.4");
        Some(format!("{}\n{}", check.found, check.remedy.unwrap()))
    }

    #[test]
    fn a_slice_in_use_by_its_container_alone_is_no_finding() {
        assert_eq!(said(State::Active, &[]), None);
        assert_eq!(said(State::Pending, &[]), None);
    }

    #[test]
    fn who_blocks_a_destroy_is_named_with_what_stops_it() {
        let agent = said(State::Releasing, &["nv-hostengine"]).unwrap();
        assert!(
            agent.contains("open in nv-hostengine (pid 9)") && agent.contains("systemctl stop nvidia-dcgm"),
            "{agent}"
        );
        let watched = said(State::Active, &["nv-hostengine"]).unwrap();
        assert!(watched.contains("which only watches it") && watched.contains("nvidia-dcgm"), "{watched}");
        let besides = said(State::Active, &["nv-hostengine", "nsys"]).unwrap();
        assert!(besides.contains("it can't be destroyed while that lasts"), "{besides}");
        assert!(said(State::Idle, &["nv-hostengine"]).unwrap().contains("is idle, and can't be destroyed"));
        assert_eq!(said(State::Idle, &[]), None);
        let other = said(State::Active, &["nsys"]).unwrap();
        assert!(other.contains("also open in nsys (pid 9)") && other.contains("kill 9\n"), "{other}");
        let nobody = said(State::Releasing, &[]).unwrap();
        assert!(nobody.contains("no process is to be seen") && nobody.contains("fuser -v /dev/nvidia3"), "{nobody}");
        assert!(said(State::Quarantined, &[]).unwrap().contains("quarantined: no reason"));
    }
}
