//! `migctl adopt`: gives existing GPU instances to mig-hook, which hands them to containers and never destroys them.

use anyhow::Result;
use serde::Serialize;

use crate::config::Settings;
use crate::engine::{Engine, Failure};
use crate::gpu::Device;
use crate::gpu::nvml::Nvml;
use crate::lease::{State, Way};
use crate::report::{self, Exit};
use crate::request::GpuSelector;

use super::target::{self, Found, Shown};

/// Arguments of `migctl adopt`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// MIG-…, GPU/GI (0/7), or GI beside --gpu
    #[arg(value_name = "SLICE", required_unless_present = "all")]
    slices: Vec<String>,
    /// Every one that mig-hook does not have yet, on all GPUs or on --gpu; what can't be adopted is skipped
    #[arg(long, conflicts_with = "slices")]
    all: bool,
    /// The GPU: index, UUID or PCI address
    #[arg(long, value_name = "GPU", value_parser = super::gpu_selector)]
    gpu: Option<GpuSelector>,
    /// The other way: adopted ones are nobody's again
    #[arg(long)]
    undo: bool,
}

/// The document of `migctl adopt`.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(super) struct Answer {
    /// One for each that was named or found.
    slices: Vec<Row>,
}

#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
struct Row {
    #[serde(flatten)]
    slice: Shown,
    /// What became of it.
    outcome: Outcome,
    /// Why it was skipped.
    reason: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
enum Outcome {
    /// It is mig-hook's to give.
    Adopted,
    /// It was adopted, and is nobody's now.
    GivenUp,
    /// Nothing has changed.
    Skipped,
}

pub(super) fn run(settings: &Settings, args: &Args, json: bool) -> Result<Exit> {
    let nvml = Nvml::at(&settings.nvml);
    let engine = Engine::open(settings, &nvml)?;
    let devices = engine.managed_gpus()?;
    let found = match args.all {
        true => candidates(&engine, &devices, args)?,
        false => {
            let find = |name: &String| target::find_slice(&devices, name, args.gpu.as_ref());
            args.slices.iter().map(find).collect::<Result<Vec<_>>>()?
        }
    };
    let mut exit = Exit::Ok;
    let mut slices = Vec::new();
    for Found { device, instance, .. } in found {
        let slice = Shown::of_instance(device, instance);
        let (done, outcome) = match args.undo {
            true => (engine.give_up(&device.uuid, instance.id), Outcome::GivenUp),
            false => (engine.adopt(&device.uuid, instance.id), Outcome::Adopted),
        };
        slices.push(match done {
            Ok(_) => Row { slice, outcome, reason: None },
            Err(failure @ (Failure::NoRoom(_) | Failure::BadRequest(_))) => {
                let reason = Some(failure.to_string());
                if !args.all {
                    exit = report::exit_code(&failure.into());
                }
                Row { slice, outcome: Outcome::Skipped, reason }
            }
            Err(failure) => return Err(failure.into()),
        });
    }
    super::print(&Answer { slices }, json, text)?;
    Ok(exit)
}

/// What `--all` means: those that no record has, or with `--undo` those that were adopted.
fn candidates<'a>(engine: &Engine<'_>, devices: &'a [Device], args: &Args) -> Result<Vec<Found<'a>>> {
    let leases = engine.leases()?;
    let mut found = target::every_slice(devices, args.gpu.as_ref())?;
    found.retain(|Found { device, instance, .. }| {
        let mut of_it = leases.iter().filter(|lease| lease.is_at(&device.uuid, instance));
        match args.undo {
            true => of_it.any(|lease| lease.state == State::Static && lease.holder.way == Way::Adopt),
            false => of_it.next().is_none(),
        }
    });
    Ok(found)
}

fn text(answer: &Answer) -> String {
    if answer.slices.is_empty() {
        return "no such slices: nothing to do\n".into();
    }
    let line = |row: &Row| {
        let what = format!("{} {} at {}:{}", row.slice.id(), row.slice.profile, row.slice.start, row.slice.size);
        match (row.outcome, &row.reason) {
            (Outcome::Adopted, _) => format!("adopted {what}\n"),
            (Outcome::GivenUp, _) => format!("given up {what}\n"),
            (Outcome::Skipped, reason) => format!("skipped {what}: {}\n", reason.as_deref().unwrap_or_default()),
        }
    };
    answer.slices.iter().map(line).collect()
}
