//! `migctl destroy`: takes GPU instances away, with their compute instances, whoever cut them.

use std::io::{IsTerminal, Write};

use anyhow::{Result, bail};
use serde::Serialize;

use crate::config::Settings;
use crate::engine::{Destroyed, Engine, Place};
use crate::gpu::Device;
use crate::gpu::nvml::Nvml;
use crate::report::{Exit, Misused};
use crate::request::GpuSelector;

use super::target::{self, Found, Shown};

/// Arguments of `migctl destroy`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// GPU/GI (0/7), GI beside --gpu, or MIG-…; GPU/GI/CI (0/7/1) or MIG-… for one of several compute instances
    #[arg(value_name = "SLICE", required_unless_present = "all")]
    slices: Vec<String>,
    /// Every GPU instance of all GPUs, or of --gpu: also those that mig-hook did not create, like nvidia-smi mig -dci and
    /// -dgi. On a terminal it is asked for first
    #[arg(long, conflicts_with = "slices")]
    all: bool,
    /// The GPU: index, UUID or PCI address
    #[arg(long, value_name = "GPU", value_parser = super::gpu_selector)]
    gpu: Option<GpuSelector>,
    /// Also what somebody holds or uses, as far as the driver lets it go. The container stays and finds its GPU gone
    #[arg(long)]
    force: bool,
    /// Don't ask
    #[arg(long, short)]
    yes: bool,
}

/// The document of `migctl destroy`.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(super) struct Answer {
    /// One for each that was to be destroyed.
    slices: Vec<Row>,
}

#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
struct Row {
    #[serde(flatten)]
    slice: Shown,
    /// What became of it.
    outcome: Outcome,
    /// Why it is not gone.
    reason: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
enum Outcome {
    /// It is gone.
    Destroyed,
    /// The driver calls it in use; it is as it was.
    Unchanged,
    /// A part is gone; migctl gc goes on with it.
    Half,
}

pub(super) fn run(settings: &Settings, args: &Args, json: bool) -> Result<Exit> {
    let nvml = Nvml::at(&settings.nvml);
    let engine = Engine::open(settings, &nvml)?;
    let devices = engine.managed_gpus()?;
    let found = if args.all { target::every_slice(&devices, args.gpu.as_ref())? } else { named(&devices, args)? };
    if args.all && !args.yes && !found.is_empty() && !agreed(&found)? {
        eprintln!("nothing was destroyed");
        return Ok(Exit::Ok);
    }
    let outcomes = match found.iter().find_map(|found| Some((found, found.compute?))) {
        Some((one, ci)) => vec![engine.destroy_compute(&one.device.uuid, one.instance.id, ci, args.force)?],
        None if found.is_empty() => Vec::new(),
        None => {
            let places: Vec<Place> = found.iter().map(|f| (f.device.uuid.clone(), f.instance.id)).collect();
            engine.destroy_instances(&places, args.force)?
        }
    };
    let answer = Answer { slices: found.iter().zip(outcomes).map(|(found, outcome)| row(found, outcome)).collect() };
    super::print(&answer, json, text)?;
    let gone = answer.slices.iter().all(|row| row.outcome == Outcome::Destroyed);
    Ok(if gone { Exit::Ok } else { Exit::NoRoom })
}

fn named<'a>(devices: &'a [Device], args: &Args) -> Result<Vec<Found<'a>>> {
    let mut found: Vec<Found<'a>> = Vec::new();
    for name in &args.slices {
        let one = target::find_slice(devices, name, args.gpu.as_ref())?;
        let same = |other: &Found<'_>| other.device.uuid == one.device.uuid && other.instance.id == one.instance.id;
        if found.iter().any(|other| same(other) && other.compute == one.compute) {
            continue;
        }
        found.push(one);
    }
    if found.len() > 1
        && let Some(part) = found.iter().find(|f| f.compute.is_some())
    {
        bail!(Misused(format!(
            "one of several compute instances is destroyed by itself: name it alone, or the whole GPU instance, {}/{}",
            part.device.index, part.instance.id
        )));
    }
    Ok(found)
}

/// Whether a person at a terminal agrees; nobody else is asked.
fn agreed(found: &[Found<'_>]) -> Result<bool> {
    let mut stderr = std::io::stderr().lock();
    if !std::io::stdin().is_terminal() {
        return Ok(true);
    }
    let rows: Vec<Vec<String>> =
        found.iter().flat_map(|found| Shown::of_instance(found.device, found.instance).rows()).collect();
    write!(stderr, "{}destroy all of these? [y/N] ", super::table(&rows))?;
    stderr.flush()?;
    let mut answer = String::new();
    std::io::stdin().read_line(&mut answer)?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}

fn row(found: &Found<'_>, outcome: Destroyed) -> Row {
    let mut slice = Shown::of_instance(found.device, found.instance);
    if found.compute.is_some() {
        slice.devices.retain(|device| device.ci == found.compute);
    }
    let (outcome, reason) = match outcome {
        Destroyed::Done => (Outcome::Destroyed, None),
        Destroyed::Unchanged(why) => (Outcome::Unchanged, Some(why)),
        Destroyed::Half(why) => (Outcome::Half, Some(why)),
    };
    Row { slice, outcome, reason }
}

fn text(answer: &Answer) -> String {
    if answer.slices.is_empty() {
        return "no GPU instances: nothing to do\n".into();
    }
    let line = |row: &Row| {
        let of: Vec<&str> = row.slice.devices.iter().map(|device| device.profile.as_str()).collect();
        let of = if of.is_empty() { row.slice.profile.clone() } else { of.join(",") };
        let what = format!("{} {of} at {}:{}", row.slice.id(), row.slice.start, row.slice.size);
        let why = row.reason.as_deref().unwrap_or_default();
        match row.outcome {
            Outcome::Destroyed => format!("destroyed {what}\n"),
            Outcome::Unchanged => format!("unchanged {what}: {why}\n"),
            Outcome::Half => format!("half destroyed {what}: {why}; migctl gc goes on with it\n"),
        }
    };
    answer.slices.iter().map(line).collect()
}
