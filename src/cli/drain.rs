//! `migctl drain`: closes GPUs to new holders and waits until nobody is left on them. Ends nobody.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use anyhow::Result;
use serde::Serialize;

use crate::config::Settings;
use crate::engine::{Cordon, Engine, Occupant};
use crate::gpu::Device;
use crate::gpu::nvml::Nvml;
use crate::report::Exit;

use super::cordon;
use super::interrupt::Interrupt;
use super::target::{self, Named};

/// Pause between two looks: each reads every lease and asks the driver.
const PAUSE: Duration = Duration::from_secs(1);

/// Arguments of `migctl drain`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Index, UUID or PCI address; or all
    #[arg(value_name = "GPU", required = true)]
    gpus: Vec<String>,
    /// Give up after this time, as 10m or 2h; 0s only looks [default: wait for ever]
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    wait: Option<Duration>,
    /// Why, for those who are refused
    #[arg(long, value_name = "TEXT")]
    reason: Option<String>,
}

/// The document of `migctl drain`.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(super) struct Answer {
    /// Those that were named; all of them stay cordoned.
    gpus: Vec<Row>,
    /// How long it waited.
    waited_ms: u64,
    /// A signal (Ctrl-C) ended the wait.
    interrupted: bool,
}

#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
struct Row {
    #[serde(flatten)]
    gpu: Named,
    /// Who is still there; empty: it is drained.
    remaining: Vec<Occupant>,
}

/// Ends with 75 when somebody is left, and with the code of a signal that ended the wait.
pub(super) fn run(settings: &Settings, args: &Args, json: bool) -> Result<Exit> {
    let reason = cordon::checked(args.reason.as_deref())?;
    let nvml = Nvml::at(&settings.nvml);
    let engine = Engine::open(settings, &nvml)?;
    let devices = engine.managed_gpus()?;
    let gpus = target::find_gpus(&devices, &args.gpus)?;
    for device in &gpus {
        engine.cordon(&device.uuid, Some(Cordon::now(reason.clone())))?;
    }
    let interrupt = Interrupt::begin()?;
    let started = Instant::now();
    let mut signal = None;
    let rows = loop {
        let rows = gpus.iter().map(|device| look(&engine, device)).collect::<Result<Vec<Row>>>()?;
        let left = args.wait.map_or(Some(PAUSE), |wait| wait.checked_sub(started.elapsed()));
        let Some(left) = left.filter(|left| !left.is_zero()) else { break rows };
        if rows.iter().all(|row| row.remaining.is_empty()) || signal.is_some() {
            break rows;
        }
        progress(&rows, started.elapsed());
        signal = interrupt.wait(left.min(PAUSE));
    };
    clear_progress();
    let waited_ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
    let answer = Answer { gpus: rows, waited_ms, interrupted: signal.is_some() };
    super::print(&answer, json, text)?;
    let drained = answer.gpus.iter().all(|row| row.remaining.is_empty());
    Ok(if drained { Exit::Ok } else { signal.unwrap_or(Exit::NoRoom) })
}

fn look(engine: &Engine<'_>, device: &Device) -> Result<Row> {
    Ok(Row { gpu: Named::of(device), remaining: engine.occupants(device)? })
}

/// One line on a terminal, written over again; nothing in a pipe.
fn progress(rows: &[Row], waited: Duration) {
    let mut stderr = std::io::stderr().lock();
    if stderr.is_terminal() {
        let who: Vec<String> = rows.iter().flat_map(|row| row.remaining.iter().map(who)).collect();
        let waited = humantime::format_duration(Duration::from_secs(waited.as_secs()));
        let line: String = format!("waiting for {} ({waited})", who.join(", ")).chars().take(100).collect();
        let _ = write!(stderr, "\r\x1b[K{line}");
        let _ = stderr.flush();
    }
}

fn clear_progress() {
    let mut stderr = std::io::stderr().lock();
    if stderr.is_terminal() {
        let _ = write!(stderr, "\r\x1b[K");
    }
}

fn who(occupant: &Occupant) -> String {
    match (&occupant.holder, occupant.pid) {
        (Some(holder), _) if occupant.releasing => format!("{holder}, which has ended"),
        (Some(holder), _) => holder.clone(),
        (None, Some(pid)) => format!("process {pid} ({})", occupant.process.as_deref().unwrap_or("?")),
        (None, None) => "a container being created".into(),
    }
}

fn text(answer: &Answer) -> String {
    let mut out = String::new();
    for row in &answer.gpus {
        let label = row.gpu.label();
        if row.remaining.is_empty() {
            out += &format!("{label} is drained; migctl uncordon {} opens it again\n", row.gpu.index);
            continue;
        }
        let why = if answer.interrupted { "interrupted; " } else { "" };
        out += &format!("{why}{label} stays cordoned, and there are still:\n");
        for occupant in &row.remaining {
            let gis: Vec<String> = occupant.gis.iter().map(|gi| format!("{}/{gi}", row.gpu.index)).collect();
            let place = if gis.is_empty() { String::new() } else { format!(" in {}", gis.join(", ")) };
            let end = occupant.end_with.as_deref().map(|end| format!("; end it with: {end}")).unwrap_or_default();
            out += &format!("  {}{place}{end}\n", who(occupant));
        }
    }
    out
}
