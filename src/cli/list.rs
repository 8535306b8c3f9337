//! `migctl list`: GPUs, their slices, and who holds which.

use anyhow::Result;
use serde::Serialize;

use crate::config::Settings;
use crate::engine::leases_in;
use crate::gpu::nvml::Nvml;
use crate::gpu::{Device, Gpu, Instance, MigMode};
use crate::host;
use crate::lease::{Lease, State, short};
use crate::report::Exit;
use crate::store::Store;

/// The document of `migctl list`.
#[derive(Debug, Serialize)]
struct Listing {
    driver_version: String,
    /// Whether we are root: to others the driver shows no slices.
    privileged: bool,
    gpus: Vec<GpuRow>,
}

#[derive(Debug, Serialize)]
struct GpuRow {
    index: u32,
    minor: u32,
    uuid: String,
    name: String,
    pci_bus_id: String,
    mig: MigMode,
    slices: Vec<SliceRow>,
}

#[derive(Debug, Serialize)]
struct SliceRow {
    gi: u32,
    ci: Option<u32>,
    profile: String,
    start: u32,
    size: u32,
    memory_mib: u64,
    sms: u32,
    uuid: Option<String>,
    /// `held`, `releasing`, `quarantined`, or `foreign`: not created by mig-hook.
    state: &'static str,
    token: Option<String>,
    container: Option<String>,
    image: Option<String>,
    uid: Option<u32>,
    held_ms: Option<u64>,
}

/// Lists. Without root there are GPUs to see, and no slices.
pub(super) fn run(settings: &Settings, json: bool) -> Result<Exit> {
    let leases = match Store::existing(&settings.state_dir) {
        Some(store) => leases_in(&store)?,
        None => vec![],
    };
    let nvml = Nvml::at(&settings.nvml);
    let gpus = nvml.devices()?.iter().map(|device| gpu_row(device, &leases)).collect();
    let privileged = nix::unistd::geteuid().is_root();
    super::print(&Listing { driver_version: nvml.driver_version()?, privileged, gpus }, json, text)?;
    Ok(Exit::Ok)
}

fn gpu_row(device: &Device, leases: &[Lease]) -> GpuRow {
    GpuRow {
        index: device.index,
        minor: device.minor,
        uuid: device.uuid.clone(),
        name: device.name.clone(),
        pci_bus_id: device.pci_bus_id.clone(),
        mig: device.mig,
        slices: device.instances.iter().map(|instance| slice_row(device, instance, leases)).collect(),
    }
}

fn slice_row(device: &Device, instance: &Instance, leases: &[Lease]) -> SliceRow {
    let here = |lease: &&Lease| {
        let mut slices = lease.slices.iter();
        slices.any(|s| {
            s.gpu == device.uuid && s.placement == instance.placement && s.gi.is_none_or(|gi| gi == instance.id)
        })
    };
    let lease = leases.iter().find(here);
    let profile = device.profile(instance.profile);
    let compute = instance.compute.first();
    SliceRow {
        gi: instance.id,
        ci: compute.map(|c| c.id),
        profile: profile.map_or_else(|| format!("profile {}", instance.profile.0), |p| p.name.clone()),
        start: instance.placement.start,
        size: instance.placement.size,
        memory_mib: profile.map_or(0, |p| p.memory_mib),
        sms: profile.map_or(0, |p| p.sms),
        uuid: compute.map(|c| c.uuid.clone()),
        state: match lease.map(|l| l.state) {
            None => "foreign",
            Some(State::Pending | State::Active) => "held",
            Some(State::Releasing) => "releasing",
            Some(State::Quarantined) => "quarantined",
        },
        token: lease.map(|l| l.token.clone()),
        container: lease.and_then(|l| l.holder.container.clone()),
        image: lease.and_then(|l| l.holder.image.clone()),
        uid: lease.and_then(|l| l.holder.uid),
        held_ms: lease.map(|l| host::boot_ms().saturating_sub(l.created_boot_ms)),
    }
}

fn text(listing: &Listing) -> String {
    let mut out = String::new();
    for gpu in &listing.gpus {
        let mode = match gpu.mig {
            MigMode::On => "",
            MigMode::Off => "  MIG off",
            MigMode::Unsupported => "  no MIG",
            MigMode::EnablePending => "  MIG on after a reset",
            MigMode::DisablePending => "  MIG off after a reset",
        };
        out += &format!("GPU {}  {}  {}{mode}\n", gpu.index, gpu.name, gpu.uuid);
        let rows: Vec<Vec<String>> = gpu.slices.iter().map(columns).collect();
        out += &super::table(&rows);
        if gpu.slices.is_empty() && gpu.mig == MigMode::On {
            out += if listing.privileged { "  no slices\n" } else { "  slices are shown to root only\n" };
        }
    }
    match out.is_empty() {
        true => "no NVIDIA GPU\n".into(),
        false => out,
    }
}

fn columns(slice: &SliceRow) -> Vec<String> {
    let holder = match (&slice.container, slice.state) {
        (Some(id), "held") => format!("container {}", short(id)),
        (None, "held") => "a container being created".into(),
        (Some(id), state) => format!("{state}, was container {}", short(id)),
        (None, state) => state.into(),
    };
    vec![
        format!("  {}", slice.profile),
        format!("at {}:{}", slice.start, slice.size),
        format!("GI {}", slice.gi),
        slice.ci.map_or("no CI".into(), |ci| format!("CI {ci}")),
        slice.uuid.clone().unwrap_or_else(|| "-".into()),
        holder,
        slice.held_ms.map_or(String::new(), super::duration),
    ]
}
