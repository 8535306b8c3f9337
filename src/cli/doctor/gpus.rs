//! MIG mode, persistence mode and slices, GPU by GPU.

use std::collections::BTreeSet;
use std::fs;

use super::{Check, listed};
use crate::config::Settings;
use crate::engine::Cordons;
use crate::gpu::{Device, Gpu, GpuProcess, MigMode};
use crate::host;
use crate::inventory::{self, Occupied, Standing, inventory};
use crate::lease::Lease;
use crate::request::GpuSelector;

const UNUSABLE: &str = "see why: dmesg | grep -iE 'nvrm|xid'\na GPU that fell off the bus needs a reset or a reboot";

/// The GPUs, or why there is nothing to see.
pub(super) struct Gpus {
    pub list: Result<Vec<Seen>, Blind>,
    /// PCI addresses of the GPUs that the kernel module has.
    bound: Vec<String>,
}

/// Why there is nothing to see.
pub(super) enum Blind {
    /// NVML itself can't be used: told with the driver.
    Library,
    /// In words.
    Gpus(String),
}

/// One GPU, as it was seen.
#[derive(Debug)]
pub(super) struct Seen {
    pub device: Device,
    /// `limits.gpus` does not leave it out.
    pub managed: bool,
    pub persistence: Option<bool>,
    /// As the driver lists them; empty where it does not.
    pub processes: Vec<GpuProcess>,
    /// Who has the GPU's node open: pid and name. Looked for where that stands in the way of a mode change only.
    pub users: Vec<(u32, String)>,
}

impl Gpus {
    /// Those that were seen.
    pub fn seen(&self) -> &[Seen] {
        self.list.as_deref().unwrap_or_default()
    }
}

pub(super) fn read(gpu: &dyn Gpu, settings: &Settings) -> Gpus {
    let devices = fs::read_to_string(settings.proc_root.join("devices")).unwrap_or_default();
    let major = host::major(&devices, "nvidia").or(host::major(&devices, "nvidia-frontend"));
    let named = |name: &String, device: &Device| GpuSelector::parse(name).is_some_and(|gpu| gpu.matches(device));
    let seen = |device: Device| Seen {
        managed: settings.gpus.as_ref().is_none_or(|names| names.iter().any(|name| named(name, &device))),
        persistence: gpu.reading(&device.uuid).ok().and_then(|reading| reading.persistence),
        processes: gpu.processes(&device.uuid).unwrap_or_default(),
        users: match device.mig {
            MigMode::On | MigMode::Unsupported => vec![],
            _ => major.map_or_else(Vec::new, |major| users(major, device.minor)),
        },
        device,
    };
    let list = match gpu.driver_version() {
        Ok(_) => gpu.devices().map_err(|error| Blind::Gpus(error.to_string())),
        Err(_) => Err(Blind::Library),
    };
    let bound = fs::read_dir(settings.proc_root.join("driver/nvidia/gpus")).into_iter().flatten().flatten();
    let mut bound: Vec<String> = bound.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    bound.sort();
    Gpus { list: list.map(|list| list.into_iter().map(seen).collect()), bound }
}

fn users(major: u32, minor: u32) -> Vec<(u32, String)> {
    let pids = host::holders_of(major, &BTreeSet::from([minor]));
    pids.into_iter().map(|pid| (pid, host::process_name(pid))).collect()
}

pub(super) fn checks(gpus: &Gpus, settings: &Settings, leases: &[Lease], cordons: &Cordons) -> Vec<Check> {
    let privileged = nix::unistd::geteuid().is_root();
    let list = match &gpus.list {
        Err(Blind::Library) => return vec![Check::skip("gpu.any", "GPUs can't be seen without NVML")],
        Err(Blind::Gpus(error)) => {
            let found = format!("no GPU can be used: {error}");
            return vec![Check::fail("gpu.any", found, UNUSABLE)];
        }
        Ok(list) if list.is_empty() => {
            let remedy =
                "see whether the machine has one, and what the driver says: lspci -d 10de: ; dmesg | grep -i nvrm";
            return vec![Check::fail("gpu.any", "the driver finds no GPU", remedy)];
        }
        Ok(list) => list,
    };
    let mut checks = Vec::new();
    for gpu in list {
        checks.push(mode(gpu));
        if gpu.managed && gpu.device.mig != MigMode::Unsupported {
            checks.extend(persistence(gpu));
        }
        if gpu.device.mig == MigMode::On && privileged {
            let joined = inventory(std::slice::from_ref(&gpu.device), leases);
            checks.extend(joined.iter().flat_map(|gpu| [Some(slices(gpu)), lost(gpu)]).flatten());
        }
        if let Some(cordon) = cordons.get(&gpu.device.uuid) {
            checks.push(Check::skip(id(gpu, "cordon"), cordon.sentence(&gpu.device)));
        }
    }
    checks.extend(unseen(&gpus.bound, list));
    checks.extend(usable(list, settings.gpus.as_deref()));
    checks
}

/// GPUs that the kernel module has and NVML does not show: fallen off the bus, or not to be opened. `0000:07:00.0` is
/// `00000000:07:00.0` to NVML.
fn unseen(bound: &[String], list: &[Seen]) -> Option<Check> {
    let shown = |address: &&String| {
        list.iter().any(|gpu| gpu.device.pci_bus_id.to_ascii_lowercase().ends_with(&address.to_ascii_lowercase()))
    };
    let unseen: Vec<String> = bound.iter().filter(|address| !shown(address)).cloned().collect();
    (!unseen.is_empty()).then(|| {
        let found =
            format!("NVML does not show what the kernel module has: {}: lost, or not to be opened", listed(&unseen));
        Check::fail("gpu.unseen", found, UNUSABLE)
    })
}

fn id(gpu: &Seen, what: &str) -> String {
    format!("gpu.{}.{what}", gpu.device.index)
}

fn mode(gpu: &Seen) -> Check {
    let (id, label, n) = (id(gpu, "mig-mode"), gpu.device.label(), gpu.device.index);
    let stop = match gpu.users.as_slice() {
        [] => String::new(),
        users => {
            let users: Vec<String> = users.iter().map(|(pid, name)| format!("{name} (pid {pid})")).collect();
            format!("first stop what has it open: {}\nthen ", listed(&users))
        }
    };
    let reset = format!("{stop}run: nvidia-smi --gpu-reset -i {n}, or reboot");
    let pending = |on: &str| format!("{label}: MIG mode is pending: it goes {on} with the next reset of the GPU");
    match gpu.device.mig {
        MigMode::On => Check::ok(id, format!("{label}: MIG is on")),
        MigMode::Unsupported => Check::skip(id, format!("{label}: a board without MIG")),
        _ if !gpu.managed => Check::skip(id, format!("{label}: left out by limits.gpus")),
        MigMode::Off => {
            Check::warn(id, format!("{label}: MIG is off: no slices there"), format!("{stop}run: migctl mode on {n}"))
        }
        MigMode::EnablePending => Check::warn(id, pending("on"), reset),
        MigMode::DisablePending => {
            Check::warn(id, pending("off"), format!("to keep it on, run: migctl mode on {n}\nto have it off, {reset}"))
        }
    }
}

fn persistence(gpu: &Seen) -> Option<Check> {
    let (id, n) = (id(gpu, "persistence"), gpu.device.index);
    Some(match gpu.persistence? {
        true => Check::ok(id, format!("GPU {n}: persistence mode is on")),
        false => Check::warn(
            id,
            format!(
                "GPU {n}: persistence mode is off: the driver may let the GPU sleep, and every first use waits for it"
            ),
            format!("run: nvidia-smi -i {n} -pm 1; for good: systemctl enable --now nvidia-persistenced"),
        ),
    })
}

fn slices(gpu: &inventory::Gpu) -> Check {
    let (id, n) = (format!("gpu.{}.slices", gpu.device.index), gpu.device.index);
    let standings = [
        (Standing::Held, "held"),
        (Standing::Static, "kept"),
        (Standing::Idle, "idle"),
        (Standing::Reserved, "reserved"),
        (Standing::Releasing, "to be destroyed"),
        (Standing::Quarantined, "quarantined"),
        (Standing::Foreign, "foreign"),
    ];
    let count = |standing| gpu.slices.iter().filter(|slice| slice.standing() == standing).count();
    let words = standings.map(|(standing, word)| (count(standing), word));
    let words: Vec<String> = words.iter().filter(|(n, _)| *n > 0).map(|(n, word)| format!("{n} {word}")).collect();
    let found = match words.is_empty() {
        true => format!("GPU {n}: no slices now"),
        false => format!("GPU {n}: slices: {}", words.join(", ")),
    };
    let half = |slice: &&Occupied| slice.standing() == Standing::Foreign && slice.instance.compute.is_empty();
    let halves: Vec<u32> = gpu.slices.iter().filter(half).map(|slice| slice.instance.id).collect();
    if halves.is_empty() {
        return Check::ok(id, found);
    }
    let named: Vec<String> = halves.iter().map(|gi| format!("GPU instance {gi}")).collect();
    let commands: Vec<String> = halves.iter().map(|gi| format!("nvidia-smi mig -dgi -i {n} -gi {gi}")).collect();
    Check::warn(
        id,
        format!("{found}; {} without a compute instance: room that nobody can use", listed(&named)),
        format!("who made it may go on; else destroy it: {}", commands.join(" && ")),
    )
}

fn lost(gpu: &inventory::Gpu) -> Option<Check> {
    let name = |(lease, slice): &(&Lease, &crate::lease::Slice)| {
        format!("{} at {} of {}", slice.profile_name, slice.placement, lease.held_by())
    };
    let lost: Vec<String> = gpu.lost.iter().map(name).collect();
    (!lost.is_empty()).then(|| {
        Check::warn(
            format!("gpu.{}.lost", gpu.device.index),
            format!(
                "GPU {}: gone, though leases have them: {}: a reset, or another tool",
                gpu.device.index,
                listed(&lost)
            ),
            "end these containers: their processes have no GPU any more; then run: migctl gc",
        )
    })
}

/// Whether containers can get anything at all.
fn usable(list: &[Seen], limits: Option<&[String]>) -> Option<Check> {
    let id = "gpu.any";
    if !list.iter().any(|gpu| gpu.managed) {
        return Some(Check::fail(
            id,
            format!("limits.gpus names no GPU of this machine: {}", limits.unwrap_or_default().join(", ")),
            "name GPUs of `migctl list` in the settings, or take limits.gpus out",
        ));
    }
    let on = list.iter().any(|gpu| gpu.managed && gpu.device.mig == MigMode::On);
    let can = list.iter().find(|gpu| gpu.managed && gpu.device.mig != MigMode::Unsupported);
    match (on, can) {
        (true, _) => None,
        (false, Some(gpu)) => Some(Check::fail(
            id,
            "no GPU has MIG on now: every request is refused",
            format!("see above; GPU {} can have it", gpu.device.index),
        )),
        (false, None) => Some(Check::fail(
            id,
            "no GPU here has MIG: every request is refused",
            "MIG takes an A100, A30, H100 or newer board of that kind: migctl list shows what is here",
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Status;
    use super::*;
    use crate::gpu::{ComputeInstance, Instance, Placement, ProfileId};

    fn seen(index: u32, mig: MigMode) -> Seen {
        let device = Device { name: "NVIDIA A30".into(), mig, ..crate::gpu::tests::device(index) };
        Seen { device, managed: true, persistence: Some(true), processes: vec![], users: vec![] }
    }

    fn said(check: &Check) -> String {
        format!("{}\n{}", check.found, check.remedy.as_deref().unwrap_or_default())
    }

    #[test]
    fn a_pending_mode_names_who_has_the_gpu_open_and_the_reset() {
        let users = vec![(7, "nv-hostengine".to_owned()), (9, "python3".to_owned())];
        let check = mode(&Seen { users, ..seen(1, MigMode::EnablePending) });
        assert_eq!((check.id.as_str(), check.status), ("gpu.1.mig-mode", Status::Warn));
        assert!(said(&check).contains("goes on with the next reset"), "{check:?}");
        assert!(said(&check).contains("nv-hostengine (pid 7) and python3 (pid 9)"), "{check:?}");
        assert!(said(&check).contains("nvidia-smi --gpu-reset -i 1"), "{check:?}");
        assert!(said(&mode(&seen(0, MigMode::DisablePending))).contains("goes off with the next reset"));
        assert!(said(&mode(&seen(2, MigMode::Off))).contains("migctl mode on 2"));
        assert_eq!(mode(&Seen { managed: false, ..seen(2, MigMode::Off) }).status, Status::Skip);
    }

    #[test]
    fn persistence_is_told_where_the_driver_tells_it() {
        assert_eq!(persistence(&Seen { persistence: None, ..seen(0, MigMode::On) }), None);
        let off = persistence(&Seen { persistence: Some(false), ..seen(3, MigMode::On) }).unwrap();
        assert!(off.status == Status::Warn && said(&off).contains("nvidia-smi -i 3 -pm 1"), "{off:?}");
    }

    #[test]
    fn half_made_slices_of_others_are_named() {
        let mut gpu = seen(0, MigMode::On).device;
        let instance = |id, start, compute| Instance {
            id,
            profile: ProfileId(19),
            placement: Placement { start, size: 1 },
            compute,
        };
        let compute = vec![ComputeInstance { id: 0, slices: 1, sms: 14, uuid: "MIG-x".into() }];
        gpu.instances = vec![instance(7, 0, compute)];
        let check = |gpu: &Device| slices(&inventory(std::slice::from_ref(gpu), &[])[0]);
        let foreign = check(&gpu);
        assert_eq!((foreign.status, foreign.found.as_str()), (Status::Ok, "GPU 0: slices: 1 foreign"));
        gpu.instances.push(instance(8, 1, vec![]));
        assert!(said(&check(&gpu)).contains("nvidia-smi mig -dgi -i 0 -gi 8"));
    }

    #[test]
    fn a_gpu_that_nvml_does_not_show_is_named() {
        let mut gpu = seen(0, MigMode::On);
        gpu.device.pci_bus_id = "00000000:0F:00.0".into();
        let bound = ["0000:0f:00.0".to_owned(), "0000:47:00.0".to_owned()];
        assert_eq!(unseen(&bound[..1], std::slice::from_ref(&gpu)), None);
        let check = unseen(&bound, &[gpu]).unwrap();
        assert!(check.status == Status::Fail && check.found.contains("has: 0000:47:00.0:"), "{check:?}");
    }

    #[test]
    fn no_gpu_that_can_be_cut_is_a_failure() {
        assert_eq!(usable(&[seen(0, MigMode::Off), seen(1, MigMode::On)], None), None);
        let off = usable(&[seen(0, MigMode::Unsupported), seen(1, MigMode::Off)], None).unwrap();
        assert!(off.status == Status::Fail && said(&off).contains("GPU 1 can have it"), "{off:?}");
        assert!(said(&usable(&[seen(0, MigMode::Unsupported)], None).unwrap()).contains("no GPU here has MIG"));
        let other = [Seen { managed: false, ..seen(0, MigMode::On) }];
        assert!(said(&usable(&other, Some(&["7".into()])).unwrap()).contains("names no GPU of this machine: 7"));
    }
}
