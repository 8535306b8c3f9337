//! `migctl profiles`: what GPUs offer, and what of it is free.

use std::collections::BTreeMap;

use anstyle::Style;
use anyhow::Result;
use serde::Serialize;

use crate::config::Settings;
use crate::gpu::nvml::Nvml;
use crate::gpu::{Device, Engines, Gpu, MigMode, Placement, Profile, ProfileId, Split};
use crate::inventory;
use crate::lease::Lease;
use crate::report::Exit;
use crate::request::GpuSelector;

/// Arguments of `migctl profiles`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Only this GPU, by index, UUID or PCI address
    #[arg(value_name = "GPU", value_parser = super::gpu_selector)]
    gpu: Option<GpuSelector>,
}

/// The document of `migctl profiles`.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(super) struct Profiles {
    /// In the order of their PCI addresses.
    gpus: Vec<Offer>,
}

#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
struct Offer {
    /// NVML index.
    index: u32,
    /// `GPU-…`.
    uuid: String,
    /// Product name.
    name: String,
    mig: MigMode,
    /// By size. Empty unless MIG is on: the driver tells them only then.
    profiles: Vec<Offered>,
}

#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
struct Offered {
    /// As containers and `migctl create` ask for it.
    name: String,
    /// The driver's id, as `nvidia-smi mig -cgi` takes it. Another board has other ids.
    id: ProfileId,
    /// Placements that are free now; null where we may not know. Each for itself: not how many more fit together.
    free: Option<u32>,
    /// How many there may be on an empty GPU.
    total: u32,
    /// Every placement that the GPU allows, taken or not; empty where we may not know.
    placements: Vec<Placement>,
    /// Compute slices.
    slices: u32,
    /// Memory.
    memory_mib: u64,
    /// Multiprocessors.
    sms: u32,
    /// Engines beside them.
    engines: Engines,
    /// Whether instances may reach other GPUs' memory.
    p2p: bool,
    /// The ways in which compute instances may share an instance. The driver tells them of an instance that exists: null
    /// where there is none, or we may not know.
    splits: Option<Vec<Split>>,
}

pub(super) fn run(settings: &Settings, args: &Args, json: bool) -> Result<Exit> {
    let nvml = Nvml::at(&settings.nvml);
    let devices = super::visible(&nvml, args.gpu.as_slice())?;
    let leases = super::recorded(settings)?;
    let gpus = devices.iter().map(|device| offer(&nvml, device, &leases)).collect();
    super::print(&Profiles { gpus }, json, text)?;
    Ok(Exit::Ok)
}

fn offer(gpu: &dyn Gpu, device: &Device, leases: &[Lease]) -> Offer {
    let mut profiles: Vec<Offered> = device.profiles.iter().map(|p| offered(gpu, device, leases, p)).collect();
    profiles.sort_by(|a, b| (a.slices, a.memory_mib, &a.name).cmp(&(b.slices, b.memory_mib, &b.name)));
    Offer { index: device.index, uuid: device.uuid.clone(), name: device.name.clone(), mig: device.mig, profiles }
}

fn offered(gpu: &dyn Gpu, device: &Device, leases: &[Lease], profile: &Profile) -> Offered {
    let made = device.instances.iter().find(|instance| instance.profile == profile.id);
    Offered {
        name: profile.name.clone(),
        id: profile.id,
        free: (!device.is_closed()).then(|| inventory::free(device, leases, profile)),
        total: profile.max_instances,
        placements: profile.placements.clone(),
        slices: profile.slices,
        memory_mib: profile.memory_mib,
        sms: profile.sms,
        engines: profile.engines,
        p2p: profile.p2p,
        splits: made.and_then(|instance| gpu.splits(&device.uuid, instance.id).ok()),
    }
}

const BOLD: Style = Style::new().bold();
const FAINT: Style = Style::new().dimmed();
const TITLES: [&str; 14] = [
    "",
    "PROFILE",
    "ID",
    "FREE",
    "MEMORY GiB",
    "SM",
    "CE",
    "DEC",
    "ENC",
    "OFA",
    "JPG",
    "P2P",
    "PLACEMENTS",
    "SHARED AS",
];

fn text(body: &Profiles) -> String {
    let gpus: Vec<String> = body.gpus.iter().map(gpu_text).collect();
    match gpus.is_empty() {
        true => "no NVIDIA GPU\n".into(),
        false => gpus.join("\n"),
    }
}

fn gpu_text(gpu: &Offer) -> String {
    let title = super::styled(BOLD, &format!("GPU {}  {}", gpu.index, gpu.name));
    let title = format!("{title}  {}\n", gpu.uuid);
    if gpu.profiles.is_empty() {
        let why = match gpu.mig {
            MigMode::Unsupported => "no MIG on this board".to_owned(),
            MigMode::EnablePending => "MIG is on after a reset; the driver tells profiles only then".to_owned(),
            _ => format!("MIG is off; migctl mode on {} turns it on", gpu.index),
        };
        return format!("{title}  {why}\n");
    }
    let mut rows = vec![TITLES.map(str::to_owned).to_vec()];
    rows.extend(gpu.profiles.iter().map(row));
    let table = super::table(&rows);
    let (header, rest) = table.split_once('\n').unwrap_or_default();
    format!("{title}{}\n{rest}", super::styled(FAINT, header))
}

fn row(profile: &Offered) -> Vec<String> {
    let free = profile.free.map_or("-".to_owned(), |free| free.to_string());
    let engines = profile.engines;
    let mut row = vec![
        String::new(),
        profile.name.clone(),
        profile.id.0.to_string(),
        format!("{free} / {}", profile.total),
        format!("{:.2}", profile.memory_mib as f64 / 1024.0),
        profile.sms.to_string(),
    ];
    let counts = [engines.copy, engines.decoders, engines.encoders, engines.ofa, engines.jpeg];
    row.extend(counts.map(|count| count.to_string()));
    row.push(if profile.p2p { "yes" } else { "no" }.to_owned());
    row.push(placements(&profile.placements));
    row.push(profile.splits.as_deref().map(|splits| shares(profile.slices, splits)).unwrap_or_default());
    row
}

/// `{0,2,4}:2`, as `nvidia-smi mig -lgipp` writes them.
fn placements(all: &[Placement]) -> String {
    let mut starts: BTreeMap<u32, Vec<String>> = BTreeMap::new();
    for placement in all {
        starts.entry(placement.size).or_default().push(placement.start.to_string());
    }
    let of_size = |(size, starts): (u32, Vec<String>)| match starts.as_slice() {
        [start] => format!("{start}:{size}"),
        several => format!("{{{}}}:{size}", several.join(",")),
    };
    let sizes: Vec<String> = starts.into_iter().map(of_size).collect();
    if sizes.is_empty() { "-".into() } else { sizes.join(" ") }
}

/// `3x1c, 2c`: the parts that an instance may be made of, beside all of it.
fn shares(whole: u32, splits: &[Split]) -> String {
    let part = |split: &Split| match split.max_instances {
        1 => format!("{}c", split.slices),
        most => format!("{most}x{}c", split.slices),
    };
    splits.iter().rev().filter(|split| split.slices < whole).map(part).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn placements_and_shares_are_short() {
        let at =
            |starts: &[u32], size| starts.iter().map(|start| Placement { start: *start, size }).collect::<Vec<_>>();
        assert_eq!(placements(&at(&[0, 4], 4)), "{0,4}:4");
        assert_eq!(placements(&at(&[0], 8)), "0:8");
        assert_eq!(placements(&[at(&[0], 1), at(&[2, 4], 2)].concat()), "0:1 {2,4}:2");
        assert_eq!(placements(&[]), "-");
        let split = |slices, max_instances| Split { slices, sms: 14 * slices, max_instances };
        assert_eq!(shares(3, &[split(3, 1), split(2, 1), split(1, 3)]), "3x1c, 2c");
        assert_eq!(shares(1, &[split(1, 1)]), "");
    }
}
