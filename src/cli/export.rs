//! `migctl export`: the slices as they are, as a config of mig-parted.

use anyhow::Result;

use crate::config::Settings;
use crate::engine::managed;
use crate::gpu::nvml::Nvml;
use crate::gpu::{Device, Gpu};
use crate::mig_parted;
use crate::report::Exit;

use super::config_file::present;

/// Arguments of `migctl export`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Name of the config in the file
    #[arg(
        id = "layout",
        short = 'c',
        long = "config",
        alias = "config-label",
        value_name = "NAME",
        default_value = "current"
    )]
    name: String,
}

/// Prints YAML, or the same as JSON. Its version is the format's.
pub(super) fn run(settings: &Settings, args: &Args, json: bool) -> Result<Exit> {
    let nvml = Nvml::at(&settings.nvml);
    let all = nvml.devices()?;
    let mut shown = Vec::new();
    for device in managed(settings, all.clone())? {
        warn_of_half_made(&device);
        let names = present(&nvml, &device)?;
        shown.push((device, names));
    }
    let file = mig_parted::export(&args.name, &shown, &all);
    let text = match json {
        true => serde_json::to_string_pretty(&file)? + "\n",
        false => file.to_string(),
    };
    super::write(text.as_bytes())?;
    Ok(Exit::Ok)
}

fn warn_of_half_made(device: &Device) {
    for instance in device.instances.iter().filter(|instance| instance.compute.is_empty()) {
        eprintln!(
            "migctl: GPU instance {}/{} has no compute instance and is left out: the format has no way to say it",
            device.index, instance.id
        );
    }
}
