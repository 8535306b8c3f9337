//! `migctl assert`: whether GPUs are what a config of mig-parted says.

use anyhow::Result;
use serde::Serialize;

use crate::config::Settings;
use crate::engine::{Target, managed};
use crate::gpu::nvml::Nvml;
use crate::gpu::{Device, Gpu, MigMode};
use crate::layout::differences;
use crate::mig_parted::{Names, listed};
use crate::report::Exit;

use super::config_file::{Source, notes, present};
use super::target::Named;

/// Arguments of `migctl assert`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    source: Source,
    /// Only whether MIG mode is on and off as the config says
    #[arg(long)]
    mode_only: bool,
    /// Only whether the file is in order and has the config; asks no GPU
    #[arg(long)]
    valid_config: bool,
}

/// The document of `migctl assert`.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(super) struct Answer {
    /// Name of the config.
    config: String,
    /// Whether everything is so. With --valid-config: true.
    holds: bool,
    /// The GPUs that it is about, by index. With --valid-config none.
    gpus: Vec<Row>,
    /// Indices of managed GPUs that it says nothing of.
    unnamed: Vec<u32>,
    /// Indices that it names, of GPUs that are not here or not managed.
    absent: Vec<u32>,
}

#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
struct Row {
    #[serde(flatten)]
    gpu: Named,
    /// Whether it is as the config says.
    holds: bool,
    /// MIG mode now.
    mig: MigMode,
    /// Whether MIG mode shall be on.
    mig_wanted: bool,
    /// MIG devices that are wanted and not there, with their number.
    missing: Names,
    /// MIG devices that are there and not wanted, with their number; also GPU instances without a compute instance.
    surplus: Names,
}

/// Ends with 1 where something is not so.
pub(super) fn run(settings: &Settings, args: &Args, json: bool) -> Result<Exit> {
    let config = args.source.read()?;
    if args.valid_config {
        let answer =
            Answer { config: config.name, holds: true, gpus: Vec::new(), unnamed: Vec::new(), absent: Vec::new() };
        super::print(&answer, json, |answer| format!("config {} is in order", answer.config))?;
        return Ok(Exit::Ok);
    }
    let nvml = Nvml::at(&settings.nvml);
    let devices = managed(settings, nvml.devices()?)?;
    let meant = config.on(&devices, args.mode_only)?;
    let mut gpus = Vec::new();
    for target in &meant.targets {
        let device = devices.iter().find(|device| device.uuid == target.gpu);
        gpus.extend(device.map(|device| row(&nvml, device, target)).transpose()?);
    }
    let holds = gpus.iter().all(|row| row.holds);
    let answer = Answer { config: config.name, holds, gpus, unnamed: meant.unnamed, absent: meant.absent };
    super::print(&answer, json, text)?;
    Ok(if holds { Exit::Ok } else { Exit::NotSo })
}

fn row(nvml: &Nvml, device: &Device, target: &Target) -> Result<Row> {
    let mode_holds = match target.mig {
        true => device.mig == MigMode::On,
        false => matches!(device.mig, MigMode::Off | MigMode::Unsupported),
    };
    let (missing, surplus) = match &target.names {
        None => (Names::new(), Names::new()),
        Some(names) => differences(device, &present(nvml, device)?, names),
    };
    Ok(Row {
        gpu: Named::of(device),
        holds: mode_holds && missing.is_empty() && surplus.is_empty(),
        mig: device.mig,
        mig_wanted: target.mig,
        missing,
        surplus,
    })
}

fn text(answer: &Answer) -> String {
    let mut out = String::new();
    for row in &answer.gpus {
        let mut differences = Vec::new();
        match (row.mig_wanted, row.mig) {
            (true, MigMode::Unsupported) => differences.push("it has no MIG".to_owned()),
            (true, MigMode::Off) => differences.push("MIG is off".into()),
            (true, MigMode::EnablePending) => differences.push("MIG is on only after a reset".into()),
            (_, MigMode::DisablePending) => differences.push("MIG is off only after a reset".into()),
            (false, MigMode::On) => differences.push("MIG is on".into()),
            (false, MigMode::EnablePending) => differences.push("MIG is on after a reset".into()),
            (true, MigMode::On) | (false, MigMode::Off | MigMode::Unsupported) => {}
        }
        if !row.missing.is_empty() {
            differences.push(format!("missing: {}", listed(&row.missing)));
        }
        if !row.surplus.is_empty() {
            differences.push(format!("not wanted: {}", listed(&row.surplus)));
        }
        let verdict = match row.holds {
            true => format!("as {} says", answer.config),
            false => format!("not as {} says: {}", answer.config, differences.join("; ")),
        };
        out += &format!("{}: {verdict}\n", row.gpu.label());
    }
    out + &notes(&answer.config, &answer.unnamed, &answer.absent)
}
