//! GPUs, the slices on them and who has which: what the driver reports, joined with the leases. Pure.

use std::collections::BTreeSet;

use crate::gpu::{Device, Instance, Profile};
use crate::lease::{Lease, Slice, State};

/// One GPU with everything on it.
#[derive(Debug)]
pub struct Gpu<'a> {
    /// As the driver reports it.
    pub device: &'a Device,
    /// Its GPU instances, in id order.
    pub slices: Vec<Occupied<'a>>,
    /// Slices that leases record here and the driver does not have: the GPU was reset, or another tool destroyed them.
    pub lost: Vec<(&'a Lease, &'a Slice)>,
}

/// A GPU instance and what we know of it.
#[derive(Debug)]
pub struct Occupied<'a> {
    /// As the driver reports it.
    pub instance: &'a Instance,
    /// Its profile, where the GPU lists it.
    pub profile: Option<&'a Profile>,
    /// The record that keeps it, if it is Static.
    pub kept: Option<&'a Lease>,
    /// The lease of a holder.
    pub lease: Option<&'a Lease>,
}

/// How a GPU instance stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum Standing {
    /// A holder has it, or is being given it.
    Held,
    /// Kept, and free for whoever asks.
    Static,
    /// Kept, and free for the containers of one user.
    Reserved,
    /// Its holder has ended; it is kept for the next one who asks for its profile, and goes when its room is needed.
    Idle,
    /// Its holder has ended; it is to be destroyed, or given back, as soon as the driver lets us.
    Releasing,
    /// Neither usable nor surely ours to destroy.
    Quarantined,
    /// Not created by mig-hook, nor given to it.
    Foreign,
    /// A lease has it and the driver does not: the GPU was reset, or another tool destroyed it.
    Lost,
}

impl Occupied<'_> {
    /// How it stands.
    pub fn standing(&self) -> Standing {
        match (self.lease.map(|lease| lease.state), self.kept) {
            (Some(State::Idle), _) => Standing::Idle,
            (Some(State::Releasing), _) => Standing::Releasing,
            (Some(State::Quarantined), _) => Standing::Quarantined,
            (Some(_), _) => Standing::Held,
            (None, Some(kept)) if kept.reserved_for.is_some() => Standing::Reserved,
            (None, Some(_)) => Standing::Static,
            (None, None) => Standing::Foreign,
        }
    }
}

/// Joins the GPUs with the leases.
pub fn inventory<'a>(devices: &'a [Device], leases: &'a [Lease]) -> Vec<Gpu<'a>> {
    devices.iter().map(|device| gpu(device, leases)).collect()
}

fn gpu<'a>(device: &'a Device, leases: &'a [Lease]) -> Gpu<'a> {
    let occupied = |instance: &'a Instance| {
        let mut of_it = leases.iter().filter(|lease| lease.is_at(&device.uuid, instance));
        let kept = of_it.clone().find(|lease| lease.state == State::Static);
        let lease = of_it.find(|lease| lease.state != State::Static);
        Occupied { instance, profile: device.profile(instance.profile), kept, lease }
    };
    let recorded = leases.iter().flat_map(|lease| lease.slices.iter().map(move |slice| (lease, slice)));
    let lost = recorded.filter(|(lease, slice)| {
        slice.gpu == device.uuid
            && !matches!(lease.state, State::Pending | State::Releasing)
            && !device.instances.iter().any(|instance| slice.is_at(&device.uuid, instance))
    });
    // Where the driver hides instances, nothing can be missed.
    let lost = if device.is_closed() { Vec::new() } else { lost.collect() };
    Gpu { device, slices: device.instances.iter().map(occupied).collect(), lost }
}

/// How many placements of a profile are free now: of neither an instance nor a lease, and no more than the GPU allows of
/// that profile. Each for itself, as the driver counts (nvmlDeviceGetGpuInstanceRemainingCapacity): two free placements may
/// overlap, so it is not how many more fit together, and engines that a profile shares out (`+me`) may be short all the same.
pub fn free(device: &Device, leases: &[Lease], profile: &Profile) -> u32 {
    // What is idle goes as soon as its room is needed.
    let is_idle = |lease: &&Lease| lease.state == State::Idle;
    let stays = |instance: &&Instance| !leases.iter().filter(is_idle).any(|lease| lease.is_at(&device.uuid, instance));
    let instances = device.instances.iter().filter(stays).map(|instance| (instance.profile, instance.placement));
    let held = leases.iter().filter(|lease| !is_idle(lease));
    let slices = held.flat_map(|lease| &lease.slices).filter(|slice| slice.gpu == device.uuid);
    let windows: BTreeSet<_> = instances.chain(slices.map(|slice| (slice.profile, slice.placement))).collect();
    let taken = windows.iter().fold(0, |taken, (_, placement)| taken | placement.mask());
    let made = windows.iter().filter(|(id, _)| *id == profile.id).count();
    let free = profile.placements.iter().filter(|placement| placement.mask() & taken == 0).count();
    free.min((profile.max_instances as usize).saturating_sub(made)) as u32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::{ComputeInstance, Engines, Placement, ProfileId};
    use crate::lease::{Way, tests::lease};

    fn device(starts: &[u32]) -> Device {
        let placement = |start| Placement { start, size: 1 };
        let compute = |id: u32| ComputeInstance { id: 0, slices: 1, sms: 14, uuid: format!("MIG-{id}") };
        let instance = |(id, start): (u32, &u32)| Instance {
            id,
            profile: ProfileId(19),
            placement: placement(*start),
            compute: vec![compute(id)],
        };
        Device {
            profiles: vec![Profile {
                id: ProfileId(19),
                name: "1g.10gb".into(),
                slices: 1,
                memory_mib: 9728,
                sms: 14,
                engines: Engines::default(),
                p2p: false,
                max_instances: 7,
                placements: (0..7).map(placement).collect(),
            }],
            instances: (7..).zip(starts).map(instance).collect(),
            ..crate::gpu::tests::device(0)
        }
    }

    fn of(device: &Device, state: State, start: u32) -> Lease {
        let planned = Slice::planned(device, &device.profiles[0], Placement { start, size: 1 });
        Lease { slices: vec![planned], ..lease(state, Way::Shim) }
    }

    #[test]
    fn every_standing() {
        let device = device(&[0, 1, 2, 3, 4, 5]);
        let reserved = Lease { reserved_for: Some(1000), ..of(&device, State::Static, 3) };
        let leases = [
            of(&device, State::Active, 0),
            of(&device, State::Static, 1),
            of(&device, State::Static, 2),
            of(&device, State::Active, 2),
            reserved,
            of(&device, State::Releasing, 4),
            of(&device, State::Active, 6),
        ];
        let devices = [device];
        let gpus = inventory(&devices, &leases);
        let standings: Vec<Standing> = gpus[0].slices.iter().map(Occupied::standing).collect();
        use Standing::{Foreign, Held, Releasing, Reserved, Static};
        assert_eq!(standings, [Held, Static, Held, Reserved, Releasing, Foreign]);
        assert!(gpus[0].slices[2].kept.is_some() && gpus[0].slices[2].lease.is_some());
        let lost: Vec<Placement> = gpus[0].lost.iter().map(|(_, slice)| slice.placement).collect();
        assert_eq!(lost, [Placement { start: 6, size: 1 }]);
    }

    #[test]
    fn free_is_what_neither_instances_nor_leases_take_and_the_limit_leaves() {
        let mut device = device(&[0, 1]);
        let leases = [of(&device, State::Active, 1), of(&device, State::Pending, 5)];
        assert_eq!(free(&device, &leases, &device.profiles[0]), 4);
        device.profiles[0].max_instances = 4;
        assert_eq!(free(&device, &leases, &device.profiles[0]), 1, "three of four are made or about to be");
        device.profiles[0].max_instances = 2;
        assert_eq!(free(&device, &leases, &device.profiles[0]), 0);
    }
}
