//! `migctl gc`: brings leases and GPUs back in step, as every acquire does first.

use anyhow::Result;
use serde::Serialize;

use crate::config::Settings;
use crate::engine::{Action, Engine};
use crate::gpu::nvml::Nvml;
use crate::report::Exit;

/// Free what nobody holds any more, and finish what was interrupted
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Only tell what would become of each lease, and why
    #[arg(long)]
    dry_run: bool,
}

/// The document of `migctl gc`.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(super) struct Report {
    /// Whether nothing was done.
    dry_run: bool,
    /// One for each lease that there was.
    actions: Vec<Action>,
}

/// Ends with 75 while something could not be freed, so that a timer's log shows it.
pub(super) fn run(settings: &Settings, args: &Args, json: bool) -> Result<Exit> {
    let nvml = Nvml::at(&settings.nvml);
    let actions = match args.dry_run {
        true => Engine::look(settings, &nvml).foresee()?,
        false => Engine::open(settings, &nvml)?.reconcile()?,
    };
    let report = Report { dry_run: args.dry_run, actions };
    super::print(&report, json, text)?;
    let stuck = report.actions.iter().any(|a| !matches!(a.result, "kept" | "freed"));
    Ok(if stuck { Exit::NoRoom } else { Exit::Ok })
}

fn text(report: &Report) -> String {
    if report.actions.is_empty() {
        return "no leases: nothing to do\n".into();
    }
    let word = |a: &Action| if report.dry_run { format!("would be {}", a.result) } else { a.result.to_owned() };
    let row = |a: &Action| vec![word(a), a.token.clone(), a.holder.clone(), a.reason.clone()];
    super::table(&report.actions.iter().map(row).collect::<Vec<_>>())
}
