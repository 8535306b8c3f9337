//! `migctl cordon` and `uncordon`: closes GPUs to new holders, and opens them again. What runs there goes on.

use anyhow::{Result, bail};
use serde::Serialize;

use crate::config::Settings;
use crate::engine::{Cordon, Engine};
use crate::gpu::nvml::Nvml;
use crate::report::{Exit, Misused};

use super::target::{self, Named};

/// Most characters of a reason: it is a part of refusals.
const LONGEST_REASON: usize = 200;

/// Arguments of `migctl cordon`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Index, UUID or PCI address; or all
    #[arg(value_name = "GPU", required = true)]
    gpus: Vec<String>,
    /// Why, for those who are refused
    #[arg(long, value_name = "TEXT")]
    reason: Option<String>,
}

/// Arguments of `migctl uncordon`.
#[derive(Debug, clap::Args)]
pub(super) struct OpenArgs {
    /// Index, UUID or PCI address; or all
    #[arg(value_name = "GPU", required = true)]
    gpus: Vec<String>,
}

/// The document of `migctl cordon` and `migctl uncordon`.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(super) struct Answer {
    /// Those that were named.
    gpus: Vec<Row>,
}

#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
struct Row {
    #[serde(flatten)]
    gpu: Named,
    /// Closed to new holders.
    cordoned: bool,
    /// It was otherwise before, or for another reason.
    changed: bool,
}

pub(super) fn run(settings: &Settings, args: &Args, json: bool) -> Result<Exit> {
    let reason = checked(args.reason.as_deref())?;
    set(settings, &args.gpus, json, || Some(Cordon::now(reason.clone())))
}

pub(super) fn open(settings: &Settings, args: &OpenArgs, json: bool) -> Result<Exit> {
    set(settings, &args.gpus, json, || None)
}

/// A reason that may be shown to anybody.
pub(super) fn checked(reason: Option<&str>) -> Result<Option<String>> {
    match reason {
        Some(text) if text.chars().any(char::is_control) || text.chars().count() > LONGEST_REASON => {
            bail!(Misused(format!("a reason is one line of at most {LONGEST_REASON} characters")))
        }
        reason => Ok(reason.map(str::trim).filter(|text| !text.is_empty()).map(str::to_owned)),
    }
}

fn set(settings: &Settings, names: &[String], json: bool, cordon: impl Fn() -> Option<Cordon>) -> Result<Exit> {
    let nvml = Nvml::at(&settings.nvml);
    let engine = Engine::open(settings, &nvml)?;
    let devices = engine.managed_gpus()?;
    let mut gpus = Vec::new();
    for device in target::find_gpus(&devices, names)? {
        let cordon = cordon();
        let cordoned = cordon.is_some();
        let changed = engine.cordon(&device.uuid, cordon)?;
        gpus.push(Row { gpu: Named::of(device), cordoned, changed });
    }
    super::print(&Answer { gpus }, json, text)?;
    Ok(Exit::Ok)
}

fn text(answer: &Answer) -> String {
    let line = |row: &Row| {
        let state = match (row.cordoned, row.changed) {
            (true, true) => "cordoned: it gets no new containers",
            (true, false) => "cordoned already",
            (false, true) => "open again",
            (false, false) => "not cordoned",
        };
        format!("{} is {state}\n", row.gpu.label())
    };
    answer.gpus.iter().map(line).collect()
}
