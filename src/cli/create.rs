//! `migctl create`: cuts slices that stay, for whoever asks for them.

use anyhow::Result;
use serde::Serialize;

use crate::config::Settings;
use crate::cut;
use crate::engine::Engine;
use crate::gpu::nvml::Nvml;
use crate::report::Exit;
use crate::request::GpuSelector;

use super::target::{self, Shown};

/// Arguments of `migctl create`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// What to cut: 3g.40gb, 2x1g.10gb,3g.40gb, an amount of memory as 8GiB, or compute instances that share a GPU
    /// instance, as 2x1c.3g.40gb; all of it or nothing
    #[arg(value_name = "REQUEST")]
    request: String,
    /// On this GPU: index, UUID or PCI address; a cordoned one, too
    #[arg(long, value_name = "GPU", value_parser = super::gpu_selector)]
    gpu: Option<GpuSelector>,
    /// From this memory slice on; for one GPU instance only
    #[arg(long, value_name = "N")]
    start: Option<u32>,
    /// Only show where it would be cut
    #[arg(long)]
    dry_run: bool,
}

/// The document of `migctl create`.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(super) struct Answer {
    /// The GPU instances, in the order asked.
    created: Vec<Shown>,
    /// Nothing was cut.
    dry_run: bool,
}

pub(super) fn run(settings: &Settings, args: &Args, json: bool) -> Result<Exit> {
    let cuts = cut::parse(&args.request)?;
    let nvml = Nvml::at(&settings.nvml);
    let engine = if args.dry_run { Engine::look(settings, &nvml) } else { Engine::open(settings, &nvml)? };
    let gpu = args.gpu.as_ref();
    if let Some(gpu) = gpu {
        target::find_gpu(&engine.managed_gpus()?, gpu)?;
    }
    let made = match args.dry_run {
        true => engine.plan_create(&cuts, gpu, args.start)?,
        false => engine.create(&cuts, gpu, args.start)?.into_iter().map(|lease| lease.slices).collect(),
    };
    let created = made.iter().filter_map(|slices| Shown::of_slices(slices)).collect();
    super::print(&Answer { created, dry_run: args.dry_run }, json, text)?;
    Ok(Exit::Ok)
}

fn text(answer: &Answer) -> String {
    let rows: Vec<Vec<String>> = answer.created.iter().flat_map(Shown::rows).collect();
    let title = if answer.dry_run { "would be created" } else { "created, and kept until migctl destroy" };
    format!("{title}:\n{}{}", super::table(&rows), usage(&answer.created))
}

/// How to use them, shown for the first of each kind.
pub(super) fn usage(slices: &[Shown]) -> String {
    let mut out = String::new();
    if let Some(uuid) = slices.iter().find_map(Shown::whole) {
        out += &format!(
            "a container that asks for such a profile gets it; to name it:\n  \
             podman run --annotation mig.uuid={uuid} IMAGE\n  \
             docker run --runtime mig -e MIG_UUID={uuid} IMAGE\n"
        );
    }
    let shared = slices.iter().filter(|slice| slice.whole().is_none()).flat_map(|slice| &slice.devices);
    if let Some(uuid) = shared.filter_map(|device| device.uuid.as_deref()).next() {
        out += &format!(
            "a part of a GPU instance is given to no container by mig-hook; a program gets it by\n  \
             CUDA_VISIBLE_DEVICES={uuid} PROGRAM\n"
        );
    }
    out
}
