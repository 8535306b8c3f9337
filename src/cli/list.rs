//! `migctl list`: GPUs, their slices, and who holds which.

use anyhow::Result;
use serde::Serialize;

use crate::config::Settings;
use crate::engine::leases_in;
use crate::gpu::nvml::Nvml;
use crate::gpu::{Gpu, MigMode};
use crate::host;
use crate::inventory::{self, Occupied, Standing, inventory};
use crate::lease::short;
use crate::profile;
use crate::report::Exit;
use crate::store::Store;

/// The document of `migctl list`.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(super) struct Listing {
    /// Of the NVIDIA driver.
    driver_version: String,
    /// Whether we are root: to others the driver shows no slices.
    privileged: bool,
    /// In the order of their PCI addresses.
    gpus: Vec<GpuRow>,
}

#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
struct GpuRow {
    /// NVML index. Not the minor.
    index: u32,
    /// Minor of `/dev/nvidiaN`.
    minor: u32,
    /// `GPU-…`.
    uuid: String,
    /// Product name.
    name: String,
    /// As the driver writes it.
    pci_bus_id: String,
    mig: MigMode,
    /// By GPU-instance id. Empty where MIG is off, and for those who are not root.
    slices: Vec<SliceRow>,
}

#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
struct SliceRow {
    /// GPU-instance id.
    gi: u32,
    /// Compute-instance id; null while the GPU instance has none.
    ci: Option<u32>,
    /// `1g.10gb`, or `profile N` where the GPU no longer offers it.
    profile: String,
    /// First memory slice.
    start: u32,
    /// Memory slices.
    size: u32,
    /// Of the profile.
    memory_mib: u64,
    /// Multiprocessors of the profile.
    sms: u32,
    /// `MIG-…` of the compute instance.
    uuid: Option<String>,
    /// Who has it.
    state: Standing,
    /// The lease that it belongs to.
    token: Option<String>,
    /// Id of the container that holds it, where known.
    container: Option<String>,
    /// Its image, where the engine tells it.
    image: Option<String>,
    /// Login uid of who started it.
    uid: Option<u32>,
    /// Since the lease was made.
    held_ms: Option<u64>,
}

/// Lists. Without root there are GPUs to see, and no slices.
pub(super) fn run(settings: &Settings, json: bool) -> Result<Exit> {
    let leases = match Store::existing(&settings.state_dir) {
        Some(store) => leases_in(&store)?,
        None => vec![],
    };
    let nvml = Nvml::at(&settings.nvml);
    let devices = nvml.devices()?;
    let gpus = inventory(&devices, &leases).iter().map(gpu_row).collect();
    let privileged = nix::unistd::geteuid().is_root();
    super::print(&Listing { driver_version: nvml.driver_version()?, privileged, gpus }, json, text)?;
    Ok(Exit::Ok)
}

fn gpu_row(gpu: &inventory::Gpu<'_>) -> GpuRow {
    let device = gpu.device;
    GpuRow {
        index: device.index,
        minor: device.minor,
        uuid: device.uuid.clone(),
        name: device.name.clone(),
        pci_bus_id: device.pci_bus_id.clone(),
        mig: device.mig,
        slices: gpu.slices.iter().flat_map(slice_rows).collect(),
    }
}

/// A row for each compute instance, or one without.
fn slice_rows(slice: &Occupied<'_>) -> Vec<SliceRow> {
    let (instance, lease) = (slice.instance, slice.lease);
    let row = |compute: Option<&crate::gpu::ComputeInstance>| {
        let name = slice.profile.map(|p| compute.map_or_else(|| p.name.clone(), |c| profile::device_name(p, c)));
        SliceRow {
            gi: instance.id,
            ci: compute.map(|c| c.id),
            profile: name.unwrap_or_else(|| format!("profile {}", instance.profile.0)),
            start: instance.placement.start,
            size: instance.placement.size,
            memory_mib: slice.profile.map_or(0, |p| p.memory_mib),
            sms: compute.map(|c| c.sms).or(slice.profile.map(|p| p.sms)).unwrap_or(0),
            uuid: compute.map(|c| c.uuid.clone()),
            state: slice.standing(),
            token: lease.or(slice.kept).map(|l| l.token.clone()),
            container: lease.and_then(|l| l.holder.container.clone()),
            image: lease.and_then(|l| l.holder.image.clone()),
            uid: lease.and_then(|l| l.holder.uid),
            held_ms: lease.map(|l| host::boot_ms().saturating_sub(l.created_boot_ms)),
        }
    };
    match instance.compute.as_slice() {
        [] => vec![row(None)],
        several => several.iter().map(|compute| row(Some(compute))).collect(),
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
        (Some(id), Standing::Held) => format!("container {}", short(id)),
        (None, Standing::Held) => "a container being created".into(),
        (Some(id), state) => format!("{}, was container {}", super::word(state), short(id)),
        (None, state) => super::word(state),
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
