//! `migctl list`: GPUs, their slices, and who holds which.

use std::collections::HashMap;

use anstyle::{AnsiColor, Style};
use anyhow::Result;
use serde::Serialize;

use super::holder::Holder;
use crate::config::Settings;
use crate::engine::{Cordons, tickets_in};
use crate::gpu::nvml::Nvml;
use crate::gpu::{ComputeInstance, Device, Engines, Gpu, GpuProcess, MigDevice, MigMode, Placement, Reading};
use crate::host;
use crate::inventory::{self, Occupied, Standing, inventory};
use crate::lease::{Lease, Slice};
use crate::profile;
use crate::report::Exit;
use crate::request::GpuSelector;

/// Arguments of `migctl list`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Only this GPU, by index, UUID or PCI address
    #[arg(value_name = "GPU", value_parser = super::gpu_selector)]
    gpu: Option<GpuSelector>,
}

/// The document of `migctl list`.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(super) struct Listing {
    /// Of the NVIDIA driver.
    driver_version: String,
    /// Whether we are root: to others the driver shows only slices that are whole, and not where they lie.
    privileged: bool,
    /// In the order of their PCI addresses.
    gpus: Vec<GpuRow>,
    /// Requests that wait for room: see `migctl queue`.
    waiting: usize,
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
    /// Why the GPU is closed to new holders; null where it is open, empty where nobody said why.
    cordoned: Option<String>,
    /// Memory in use, where the driver tells.
    memory_used_mib: Option<u64>,
    /// Memory there is, where the driver tells.
    memory_total_mib: Option<u64>,
    /// Uncorrected ECC errors since the driver was loaded. Null while MIG is on: then slices have counts of their own.
    ecc_errors: Option<u64>,
    /// Whether ECC is on, where the driver tells.
    ecc: Option<bool>,
    /// By GPU-instance and compute-instance id, then those that are lost.
    slices: Vec<SliceRow>,
}

#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
struct SliceRow {
    /// GPU-instance id; null only of a lost one that was never made.
    gi: Option<u32>,
    /// Compute-instance id; null while the GPU instance has none.
    ci: Option<u32>,
    /// Index of the MIG device on its GPU, as nvidia-smi shows it. It changes when another one goes.
    device: Option<u32>,
    /// `1g.10gb`, `1c.3g.40gb` for a part of a GPU instance, or `profile N` where the GPU no longer offers it.
    profile: String,
    /// First memory slice; null where we may not know.
    start: Option<u32>,
    /// Memory slices; null where we may not know.
    size: Option<u32>,
    /// Memory of the profile.
    memory_mib: u64,
    /// Memory in use, by all compute instances of the GPU instance together.
    memory_used_mib: Option<u64>,
    /// Memory there is, for all compute instances of the GPU instance together.
    memory_total_mib: Option<u64>,
    /// Multiprocessors.
    sms: Option<u32>,
    /// Uncorrected errors of its caches and registers since the driver was loaded.
    ecc_errors: Option<u64>,
    /// Engines, shared by all compute instances of the GPU instance.
    engines: Option<Engines>,
    /// `MIG-…` of the compute instance.
    uuid: Option<String>,
    /// How it stands; null where only root could know.
    state: Option<Standing>,
    #[serde(flatten)]
    held: Holder,
    /// Processes that the driver lists in it.
    processes: Vec<ProcessRow>,
}

/// A process on a slice.
#[derive(Debug, Clone, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(super) struct ProcessRow {
    /// Host pid.
    pub pid: u32,
    /// Its short name, as in ps.
    pub name: String,
    /// Its user, where this machine knows the name.
    pub user: Option<String>,
    /// GPU memory that it uses, where the driver tells.
    pub memory_mib: Option<u64>,
}

/// What the driver tells of one GPU beside what is on it.
struct Told<'a> {
    gpu: &'a dyn Gpu,
    privileged: bool,
    migs: HashMap<(u32, u32), MigDevice>,
    processes: Vec<GpuProcess>,
}

pub(super) fn run(settings: &Settings, args: &Args, json: bool) -> Result<Exit> {
    let nvml = Nvml::at(&settings.nvml);
    let devices = super::visible(&nvml, args.gpu.as_slice())?;
    let leases = super::recorded(settings)?;
    let (cordons, waiting) = match super::readable_state(settings)? {
        Some(store) => (store.cordons()?, tickets_in(&store)?.len()),
        None => (Cordons::new(), 0),
    };
    let privileged = nix::unistd::geteuid().is_root();
    let row = |gpu: &inventory::Gpu<'_>| gpu_row(gpu, &told_of(&nvml, gpu.device, privileged), &cordons);
    let gpus = inventory(&devices, &leases).iter().map(row).collect();
    super::print(&Listing { driver_version: nvml.driver_version()?, privileged, gpus, waiting }, json, text)?;
    Ok(Exit::Ok)
}

fn gpu_row(gpu: &inventory::Gpu<'_>, told: &Told<'_>, cordons: &Cordons) -> GpuRow {
    let device = gpu.device;
    let reading = reading(told.gpu, &device.uuid);
    let there = gpu.slices.iter().flat_map(|slice| slice_rows(slice, told));
    let lost = gpu.lost.iter().map(|(lease, slice)| lost_row(lease, slice));
    GpuRow {
        index: device.index,
        minor: device.minor,
        uuid: device.uuid.clone(),
        name: device.name.clone(),
        pci_bus_id: device.pci_bus_id.clone(),
        mig: device.mig,
        cordoned: cordons.get(&device.uuid).map(|cordon| cordon.reason.clone().unwrap_or_default()),
        memory_used_mib: reading.memory_used_mib,
        memory_total_mib: reading.memory_total_mib,
        ecc_errors: reading.ecc_errors,
        ecc: reading.ecc,
        slices: there.chain(lost).collect(),
    }
}

/// What can't be read is not shown: a listing is not the place to fail for it.
fn told_of<'a>(gpu: &'a dyn Gpu, device: &Device, privileged: bool) -> Told<'a> {
    let migs = if device.instances.is_empty() { Vec::new() } else { gpu.mig_devices(&device.uuid).unwrap_or_default() };
    Told {
        gpu,
        privileged,
        migs: migs.into_iter().map(|mig| ((mig.instance, mig.compute), mig)).collect(),
        processes: gpu.processes(&device.uuid).unwrap_or_default(),
    }
}

pub(super) fn reading(gpu: &dyn Gpu, uuid: &str) -> Reading {
    gpu.reading(uuid).unwrap_or_else(|error| {
        tracing::debug!("{uuid} tells nothing: {error}");
        Reading::default()
    })
}

/// A row for each compute instance, or one without.
fn slice_rows(slice: &Occupied<'_>, told: &Told<'_>) -> Vec<SliceRow> {
    match slice.instance.compute.as_slice() {
        [] => vec![slice_row(slice, None, told)],
        several => several.iter().map(|compute| slice_row(slice, Some(compute), told)).collect(),
    }
}

fn slice_row(slice: &Occupied<'_>, compute: Option<&ComputeInstance>, told: &Told<'_>) -> SliceRow {
    let instance = slice.instance;
    let reading = compute.map(|compute| reading(told.gpu, &compute.uuid)).unwrap_or_default();
    let name = slice.profile.map(|p| compute.map_or_else(|| p.name.clone(), |c| profile::device_name(p, c)));
    let placement = Some(instance.placement).filter(|placement| *placement != Placement::UNKNOWN);
    let inside = |process: &&GpuProcess| {
        let same = compute.is_none_or(|compute| process.compute.is_none_or(|id| id == compute.id));
        process.instance == Some(instance.id) && same
    };
    SliceRow {
        gi: Some(instance.id),
        ci: compute.map(|c| c.id),
        device: compute.and_then(|c| told.migs.get(&(instance.id, c.id))).map(|mig| mig.index),
        profile: name.unwrap_or_else(|| format!("profile {}", instance.profile.0)),
        start: placement.map(|placement| placement.start),
        size: placement.map(|placement| placement.size),
        memory_mib: slice.profile.map_or(0, |p| p.memory_mib),
        memory_used_mib: reading.memory_used_mib,
        memory_total_mib: reading.memory_total_mib,
        sms: reading.sms.or(compute.map(|c| c.sms)).or(slice.profile.map(|p| p.sms)),
        ecc_errors: reading.ecc_errors,
        engines: reading.engines.or(slice.profile.map(|p| p.engines)),
        uuid: compute.map(|c| c.uuid.clone()),
        state: Some(slice.standing()).filter(|state| told.privileged || *state != Standing::Foreign),
        held: slice.lease.or(slice.kept).map(Holder::of).unwrap_or_default(),
        processes: told.processes.iter().filter(inside).map(process_row).collect(),
    }
}

/// A process as it is shown.
pub(super) fn process_row(process: &GpuProcess) -> ProcessRow {
    ProcessRow {
        pid: process.pid,
        name: host::process_name(process.pid),
        user: host::user(process.pid).and_then(host::user_name),
        memory_mib: process.memory_mib,
    }
}

fn lost_row(lease: &Lease, slice: &Slice) -> SliceRow {
    let placement = Some(slice.placement).filter(|placement| *placement != Placement::UNKNOWN);
    SliceRow {
        gi: slice.gi,
        ci: slice.ci,
        device: None,
        profile: slice.profile_name.clone(),
        start: placement.map(|placement| placement.start),
        size: placement.map(|placement| placement.size),
        memory_mib: slice.memory_mib,
        memory_used_mib: None,
        memory_total_mib: None,
        sms: None,
        ecc_errors: None,
        engines: None,
        uuid: slice.uuid.clone(),
        state: Some(Standing::Lost),
        held: Holder::of(lease),
        processes: Vec::new(),
    }
}

const BOLD: Style = Style::new().bold();
const FAINT: Style = Style::new().dimmed();
const TITLES: [&str; 15] = [
    "GI",
    "CI",
    "DEV",
    "PROFILE",
    "AT",
    "MEMORY MiB",
    "SM",
    "ECC",
    "CE",
    "DEC",
    "ENC",
    "OFA",
    "JPG",
    "STATE",
    "HOLDER",
];

fn text(listing: &Listing) -> String {
    let gpus: Vec<String> = listing.gpus.iter().map(|gpu| gpu_text(gpu, listing.privileged)).collect();
    let waiting = match listing.waiting {
        0 => String::new(),
        1 => "\none request waits for room: migctl queue\n".into(),
        several => format!("\n{several} requests wait for room: migctl queue\n"),
    };
    match gpus.is_empty() {
        true => "no NVIDIA GPU\n".into(),
        false => gpus.join("\n") + &waiting,
    }
}

fn gpu_text(gpu: &GpuRow, privileged: bool) -> String {
    let title = super::styled(BOLD, &format!("GPU {}  {}", gpu.index, gpu.name));
    let mut out = format!("{title}  {}\n       {}\n", gpu.uuid, facts(gpu).join(", "));
    if !gpu.slices.is_empty() {
        out += &slices_text(&gpu.slices);
    } else if matches!(gpu.mig, MigMode::On | MigMode::DisablePending) {
        out += if privileged {
            "  no slices\n"
        } else {
            "  no slices (those without a MIG device are shown to root only)\n"
        };
    }
    out
}

/// What is to be said of a GPU as a whole.
fn facts(gpu: &GpuRow) -> Vec<String> {
    let mode = match gpu.mig {
        MigMode::On => "MIG on",
        MigMode::Off => "MIG off",
        MigMode::Unsupported => "no MIG",
        MigMode::EnablePending => "MIG off, on after a reset",
        MigMode::DisablePending => "MIG on, off after a reset",
    };
    let mut facts = vec![gpu.pci_bus_id.clone(), mode.to_owned()];
    if let (Some(used), Some(total)) = (gpu.memory_used_mib, gpu.memory_total_mib) {
        facts.push(format!("{used} of {total} MiB in use"));
    }
    if gpu.ecc == Some(false) {
        facts.push("ECC off".into());
    }
    if let Some(errors) = gpu.ecc_errors.filter(|errors| *errors > 0) {
        facts.push(super::styled(AnsiColor::Red.on_default(), &format!("{errors} uncorrected ECC errors")));
    }
    match gpu.cordoned.as_deref() {
        None => {}
        Some("") => facts.push(super::styled(AnsiColor::Yellow.on_default(), "cordoned")),
        Some(why) => facts.push(super::styled(AnsiColor::Yellow.on_default(), &format!("cordoned: {why}"))),
    }
    facts
}

/// Two lines for each slice: its figures, and under them what people copy and ask for next.
fn slices_text(slices: &[SliceRow]) -> String {
    let indented = |mut cells: Vec<String>| {
        cells.insert(0, String::new());
        cells
    };
    let widest = slices.iter().map(|slice| total_mib(slice).to_string().len()).max().unwrap_or(0);
    let mut rows = vec![indented(TITLES.map(str::to_owned).to_vec())];
    rows.extend(slices.iter().map(|slice| indented(figures(slice, widest))));
    let table = super::table(&rows);
    let mut lines = table.lines();
    let header = lines.next().unwrap_or_default();
    let [profile, holder] = ["PROFILE", "HOLDER"].map(|title| header.find(title).unwrap_or(0));
    let mut out = super::styled(FAINT, header) + "\n";
    for (line, slice) in lines.zip(slices) {
        let uuid = slice.uuid.as_deref().unwrap_or("no MIG device");
        let width = holder.saturating_sub(profile);
        let under = format!("{:profile$}{uuid:width$}{}", "", details(slice));
        out += &format!("{line}\n{}\n", under.trim_end());
    }
    out
}

fn total_mib(slice: &SliceRow) -> u64 {
    slice.memory_total_mib.unwrap_or(slice.memory_mib)
}

fn figures(slice: &SliceRow, widest_total: usize) -> Vec<String> {
    let number = |n: Option<u32>| n.map_or("-".to_owned(), |n| n.to_string());
    let engine = |of: fn(&Engines) -> u32| number(slice.engines.as_ref().map(of));
    let used = slice.memory_used_mib.map_or("-".to_owned(), |used| used.to_string());
    vec![
        number(slice.gi),
        number(slice.ci),
        number(slice.device),
        slice.profile.clone(),
        slice.start.zip(slice.size).map_or("-".to_owned(), |(start, size)| format!("{start}:{size}")),
        format!("{used} / {:widest_total$}", total_mib(slice)),
        number(slice.sms),
        slice.ecc_errors.map_or("-".to_owned(), |errors| errors.to_string()),
        engine(|e| e.copy),
        engine(|e| e.decoders),
        engine(|e| e.encoders),
        engine(|e| e.ofa),
        engine(|e| e.jpeg),
        slice.state.map_or("-".to_owned(), |state| super::styled(colour(state), &super::word(state))),
        holder(slice),
    ]
}

fn colour(state: Standing) -> Style {
    match state {
        Standing::Held => AnsiColor::Green.on_default(),
        Standing::Static | Standing::Idle | Standing::Reserved => AnsiColor::Cyan.on_default(),
        Standing::Releasing | Standing::Foreign => AnsiColor::Yellow.on_default(),
        Standing::Quarantined | Standing::Lost => AnsiColor::Red.on_default(),
    }
}

/// Its holder, or who runs in it.
fn holder(slice: &SliceRow) -> String {
    match (&slice.held.holder, slice.processes.as_slice()) {
        (Some(holder), _) => holder.clone(),
        (None, []) => String::new(),
        (None, [one]) => one.name.clone(),
        (None, [one, others @ ..]) => format!("{} and {} more", one.name, others.len()),
    }
}

fn details(slice: &SliceRow) -> String {
    match (&slice.held.holder, slice.processes.first()) {
        (None, Some(process)) => {
            let pid = format!("pid {}", process.pid);
            [Some(pid), process.user.clone()].into_iter().flatten().collect::<Vec<_>>().join(", ")
        }
        _ => slice.held.details(),
    }
}
