//! `migctl cdi`: the CDI spec of the slices that a container may name, or of one lease.

use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::config::{Foreign, Settings};
use crate::engine::{Engine, Failure};
use crate::gpu::nvml::Nvml;
use crate::report::Exit;

/// Arguments of `migctl cdi`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Only what this lease holds, as one device of that name, for use within the job or container that has it
    #[arg(long, value_name = "TOKEN|CONTAINER")]
    lease: Option<String>,
    /// Write to a file, in one step and only when it changes; without a slice the file is removed [default: -]
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
}

pub(super) fn run(settings: &Settings, args: &Args) -> Result<Exit> {
    let nvml = Nvml::at(&settings.nvml);
    let engine = Engine::open(settings, &nvml)?;
    let lease = args.lease.as_deref().map(|name| super::release::find(&engine.leases()?, name)).transpose()?;
    let file = args.output.as_deref().filter(|path| *path != Path::new("-"));
    let offered = match (file, &lease) {
        (Some(path), lease) => engine.write_cdi_spec(path, lease.as_ref())?,
        (None, lease) => {
            let spec = engine.cdi_spec(lease.as_ref())?;
            if let Some(spec) = &spec {
                super::print(&spec.text()?, false, String::clone)?;
            }
            spec.is_some()
        }
    };
    if !offered && file.is_none() {
        let why = match settings.foreign {
            Foreign::Refuse => "those that mig-hook did not create are offered with slices.foreign = \"idle\" only",
            Foreign::Idle => "no MIG slice exists but those cut for containers",
        };
        return Err(Failure::NoRoom(format!("no slice may be named by a container: {why}")).into());
    }
    Ok(Exit::Ok)
}
