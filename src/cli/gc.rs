//! `migctl gc`: brings leases and GPUs back in step, as every acquire does first.

use anyhow::Result;
use serde::Serialize;

use crate::config::Settings;
use crate::engine::{Action, Engine};
use crate::gpu::nvml::Nvml;
use crate::report::Exit;

/// The document of `migctl gc`.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(super) struct Report {
    /// One for each lease that there was.
    actions: Vec<Action>,
}

/// Ends with 75 while something could not be freed, so that a timer's log shows it.
pub(super) fn run(settings: &Settings, json: bool) -> Result<Exit> {
    let nvml = Nvml::at(&settings.nvml);
    let report = Report { actions: Engine::open(settings, &nvml)?.reconcile()? };
    super::print(&report, json, text)?;
    let stuck = report.actions.iter().any(|a| !matches!(a.result, "kept" | "freed"));
    Ok(if stuck { Exit::NoRoom } else { Exit::Ok })
}

fn text(report: &Report) -> String {
    if report.actions.is_empty() {
        return "no leases: nothing to do\n".into();
    }
    let row = |a: &Action| vec![a.result.to_owned(), a.token.clone(), a.holder.clone(), a.reason.clone()];
    super::table(&report.actions.iter().map(row).collect::<Vec<_>>())
}
