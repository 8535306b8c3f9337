//! `migctl apply`: makes GPUs what a config of mig-parted says, changing only what differs.

use std::cell::OnceCell;
use std::io::IsTerminal;

use anyhow::Result;
use serde::Serialize;

use crate::config::Settings;
use crate::engine::{Change, Engine, Target};
use crate::gpu::nvml::Nvml;
use crate::gpu::{Instance, MigMode};
use crate::mig_parted::listed;
use crate::report::{self, Exit};

use super::config_file::{Source, notes};
use super::interrupt::Interrupt;
use super::target::{Named, Shown};

/// Arguments of `migctl apply`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    source: Source,
    /// Only show what would change
    #[arg(long)]
    dry_run: bool,
    /// Only turn MIG mode on and off as the config says
    #[arg(long)]
    mode_only: bool,
}

/// The document of `migctl apply`.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(super) struct Answer {
    /// Name of the config.
    config: String,
    /// Nothing was changed.
    dry_run: bool,
    /// The GPUs that it is about, by index.
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
    /// What became of it.
    outcome: Outcome,
    /// MIG mode now; of a dry run what it would be.
    mig: MigMode,
    /// GPU instances that were wanted and there: nothing was done to them.
    stayed: Vec<Stayed>,
    /// GPU instances that were not wanted, or had to make room.
    destroyed: Vec<Shown>,
    /// GPU instances that were wanted and not there.
    cut: Vec<Shown>,
    /// What to do next.
    next: Option<String>,
}

#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
struct Stayed {
    #[serde(flatten)]
    slice: Shown,
    /// It is kept by mig-hook from now on: until now it was foreign, or would have gone with its container.
    adopted: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
enum Outcome {
    /// It was so already.
    Unchanged,
    /// It is so now.
    Changed,
    /// It will be so after a reset and, where MIG is to be on, the same apply once more.
    Pending,
}

/// Ends with 75 while a GPU waits for its reset.
pub(super) fn run(settings: &Settings, args: &Args, json: bool) -> Result<Exit> {
    let config = args.source.read()?;
    let nvml = Nvml::at(&settings.nvml);
    let engine = Engine::open(settings, &nvml)?;
    let meant = config.on(&engine.managed_gpus()?, args.mode_only)?;
    let changes = match args.dry_run {
        true => engine.plan_apply(&meant.targets)?,
        false => match apply(&engine, &meant.targets) {
            Ok(changes) => changes,
            Err((Some(signal), error)) => {
                eprintln!("migctl: {}", report::sentence(&error));
                return Ok(signal);
            }
            Err((None, error)) => return Err(error),
        },
    };
    let waiting: Vec<u32> =
        changes.iter().filter(|c| c.mig == MigMode::EnablePending).map(|c| c.device.index).collect();
    let rows = meant.targets.iter().zip(&changes).map(|(target, change)| row(target, change, &waiting));
    let gpus: Vec<Row> = rows.collect();
    let answer =
        Answer { config: config.name, dry_run: args.dry_run, gpus, unnamed: meant.unnamed, absent: meant.absent };
    super::print(&answer, json, text)?;
    let pending = answer.gpus.iter().any(|row| row.outcome == Outcome::Pending);
    Ok(if pending { Exit::NoRoom } else { Exit::Ok })
}

/// Applies, with each step on a terminal; a signal is obeyed between two steps, and what was done by then is rolled back.
fn apply(engine: &Engine<'_>, targets: &[Target]) -> Result<Vec<Change>, (Option<Exit>, anyhow::Error)> {
    let terminal = std::io::stderr().is_terminal();
    let interrupt = OnceCell::new();
    let watch = |step: &str| {
        if terminal {
            eprintln!("{step}");
        }
        // Before the first step a signal ends us as ever: nothing is done yet, and the lock may be waited for.
        interrupt.get_or_init(Interrupt::begin).as_ref().is_ok_and(|interrupt| interrupt.came().is_none())
    };
    engine.apply(targets, &watch).map_err(|failure| {
        let signal = interrupt.get().and_then(|held| held.as_ref().ok()).and_then(Interrupt::came);
        (signal, failure.into())
    })
}

/// `waiting`: GPUs whose MIG mode is on only after a reset. Until then no slice of any GPU is touched.
fn row(target: &Target, change: &Change, waiting: &[u32]) -> Row {
    let device = &change.device;
    let stayed = |(instance, adopted): &(Instance, bool)| Stayed {
        slice: Shown::of_instance(device, instance),
        adopted: *adopted,
    };
    let pending = matches!(change.mig, MigMode::EnablePending | MigMode::DisablePending);
    let same = change.destroyed.is_empty() && change.cut.is_empty() && change.mig == change.before;
    let again = if target.mig { ", and then the same apply again" } else { "" };
    let to_cut = target.names.as_ref().filter(|names| !names.is_empty() && target.mig);
    let (outcome, next) = match (pending, waiting, to_cut) {
        (true, ..) => {
            let reset = format!("nvidia-smi --gpu-reset -i {}, which takes all slices of the GPU away", device.index);
            (Outcome::Pending, Some(format!("{reset}; or a reboot{again}")))
        }
        (false, [_, ..], _) if target.names.is_some() => {
            let others: Vec<String> = waiting.iter().map(u32::to_string).collect();
            (Outcome::Pending, Some(format!("the same apply again, after the reset of GPU {}", others.join(", "))))
        }
        // Of a dry run: what a GPU offers is known once MIG is on.
        (false, _, Some(names)) if device.mig != MigMode::On => {
            (Outcome::Changed, Some(format!("with MIG on: {}, as far as it offers them", listed(names))))
        }
        _ if same => (Outcome::Unchanged, None),
        _ => (Outcome::Changed, None),
    };
    Row {
        gpu: Named::of(device),
        outcome,
        mig: change.mig,
        stayed: change.stayed.iter().map(stayed).collect(),
        destroyed: change.destroyed.iter().map(|instance| Shown::of_instance(device, instance)).collect(),
        cut: change.cut.iter().filter_map(|slices| Shown::of_slices(slices)).collect(),
        next,
    }
}

fn text(answer: &Answer) -> String {
    let mut out = String::new();
    for row in &answer.gpus {
        let would = if answer.dry_run { "would be " } else { "" };
        let mode = match row.mig {
            MigMode::On => "MIG on",
            MigMode::Off => "MIG off",
            MigMode::Unsupported => "no MIG",
            MigMode::EnablePending => "MIG off, and on after a reset",
            MigMode::DisablePending => "MIG on, and off after a reset",
        };
        let verdict = match row.outcome {
            Outcome::Unchanged => "as it is".to_owned(),
            Outcome::Changed => format!("{would}changed"),
            Outcome::Pending => "waits for a reset".into(),
        };
        out += &format!("{}, {mode}: {verdict}\n", row.gpu.label());
        let mut rows: Vec<Vec<String>> = Vec::new();
        let mut add = |slice: &Shown, what: String| {
            rows.extend(slice.rows().into_iter().map(|row| [row, vec![what.clone()]].concat()));
        };
        row.destroyed.iter().for_each(|slice| add(slice, format!("{would}destroyed")));
        row.stayed
            .iter()
            .for_each(|s| add(&s.slice, if s.adopted { format!("stays, {would}kept now") } else { "stays".into() }));
        row.cut.iter().for_each(|slice| add(slice, format!("{would}cut")));
        out += &super::table(&rows);
        if let Some(next) = &row.next {
            out += &format!("  next: {next}\n");
        }
    }
    out + &notes(&answer.config, &answer.unnamed, &answer.absent)
}
