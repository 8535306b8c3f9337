//! `migctl reserve`: slices for the containers of one user, who alone may open their nodes.

use anyhow::{Result, bail};
use serde::Serialize;

use crate::config::Settings;
use crate::cut;
use crate::engine::Engine;
use crate::gpu::nvml::Nvml;
use crate::host;
use crate::lease::Lease;
use crate::report::{Exit, Misused};
use crate::request::GpuSelector;

use super::target::{self, Shown};

/// Arguments of `migctl reserve`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// What is wanted, as for create: free kept ones are taken first, then new ones cut; or one that exists: MIG-…, GPU/GI
    /// (0/7), or GI beside --gpu
    #[arg(value_name = "REQUEST|SLICE")]
    what: String,
    /// The user, by name or number
    #[arg(long, value_name = "USER|UID", value_parser = target::user, required_unless_present = "end")]
    uid: Option<u32>,
    /// On this GPU: index, UUID or PCI address
    #[arg(long, value_name = "GPU", value_parser = super::gpu_selector)]
    gpu: Option<GpuSelector>,
    /// The slice that is named is for everybody again
    #[arg(long, conflicts_with = "uid")]
    end: bool,
}

/// The document of `migctl reserve`.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(super) struct Answer {
    /// For whom; null when a reservation was ended.
    uid: Option<u32>,
    /// The GPU instances.
    slices: Vec<Shown>,
}

pub(super) fn run(settings: &Settings, args: &Args, json: bool) -> Result<Exit> {
    let nvml = Nvml::at(&settings.nvml);
    let engine = Engine::open(settings, &nvml)?;
    let leases = reserved(&engine, args)?;
    let slices = leases.iter().filter_map(|lease| Shown::of_slices(&lease.slices)).collect();
    super::print(&Answer { uid: args.uid, slices }, json, text)?;
    Ok(Exit::Ok)
}

fn reserved(engine: &Engine<'_>, args: &Args) -> Result<Vec<Lease>> {
    let devices = engine.managed_gpus()?;
    if target::is_existing(&args.what) {
        let found = target::find_slice(&devices, &args.what, args.gpu.as_ref())?;
        if found.compute.is_some() {
            bail!(Misused(format!(
                "{} is one of several compute instances; what is reserved is their GPU instance, {}/{}",
                args.what, found.device.index, found.instance.id
            )));
        }
        return Ok(vec![engine.reserve_for(&found.device.uuid, found.instance.id, args.uid)?]);
    }
    let Some(uid) = args.uid else {
        bail!(Misused(format!("{} names no slice; --end is for one: MIG-… or GPU/GI", args.what)));
    };
    if let Some(gpu) = &args.gpu {
        target::find_gpu(&devices, gpu)?;
    }
    Ok(engine.reserve(&cut::parse(&args.what)?, args.gpu.as_ref(), uid)?)
}

fn text(answer: &Answer) -> String {
    let rows: Vec<Vec<String>> = answer.slices.iter().flat_map(Shown::rows).collect();
    let rows = super::table(&rows);
    let Some(uid) = answer.uid else { return format!("for everybody again:\n{rows}") };
    let uuid = answer.slices.iter().find_map(Shown::whole).unwrap_or("MIG-…");
    let name = host::user_name(uid).map_or_else(|| format!("uid {uid}"), |name| format!("{name} (uid {uid})"));
    format!(
        "reserved for {name}, who alone may open the nodes:\n{rows}that user's podman gets it by\n  podman run \
         --annotation mig.uuid={uuid} IMAGE\n"
    )
}
