//! `migctl top`: the map, live, with what each slice is doing.

use std::collections::BTreeMap;
use std::io::{ErrorKind, IsTerminal, Write};
use std::time::Duration;

use anyhow::{Result, bail};
use serde::Serialize;

use crate::config::Settings;
use crate::gpu::nvml::Nvml;
use crate::gpu::{Gpu, GpuProcess, Reading, Sample, Utilisation};
use crate::host;
use crate::report::{Exit, Misused};
use crate::request::GpuSelector;

use super::list::{ProcessRow, process_row};
use super::map::bar::{Block, Canvas, Line};
use super::map::{self, GpuMap, Map, Window};
use super::{Document, JSON_VERSION};

mod screen;

/// Time between the two samples that make the utilisation of a single frame; the driver wants 100 ms at least.
const APART: Duration = Duration::from_millis(250);
/// Least time between frames: they cost the driver some calls for each slice.
const FASTEST: Duration = Duration::from_millis(100);

/// Arguments of `migctl top`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Only these GPUs, by index, UUID or PCI address [default: all]
    #[arg(value_name = "GPU", value_parser = super::gpu_selector)]
    gpus: Vec<GpuSelector>,
    /// Time between two looks, as 500ms or 2s
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = humantime::parse_duration)]
    interval: Duration,
    /// Print one look and end, as is done where standard output is no terminal
    #[arg(long)]
    once: bool,
    /// Draw with ASCII characters, as is done where the locale is not UTF-8
    #[arg(long)]
    ascii: bool,
}

impl Args {
    /// Whether it is shown on this terminal until somebody ends it. A log line would then be in the way.
    pub(super) fn takes_the_screen(&self, json: bool) -> bool {
        !json && !self.once && std::io::stdout().is_terminal()
    }
}

/// The document of `migctl top`: that of `migctl map`, and what each slice is doing.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(super) struct Frame {
    /// Milliseconds since 1970.
    pub time_ms: u64,
    #[serde(flatten)]
    pub map: Map,
    /// One for each compute instance, and for each GPU instance without one, by GPU and place.
    pub slices: Vec<Live>,
}

/// What a slice is doing.
#[derive(Debug, Clone, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(super) struct Live {
    /// UUID of its GPU.
    pub gpu: String,
    /// NVML index of its GPU.
    pub gpu_index: u32,
    /// GPU-instance id.
    pub gi: u32,
    /// Compute-instance id; null while the GPU instance has none.
    pub ci: Option<u32>,
    /// `MIG-…` of the compute instance.
    pub uuid: Option<String>,
    /// `1g.10gb`, or `1c.3g.40gb` where it has a part of its GPU instance.
    pub profile: String,
    /// Who has it, for people.
    pub holder: String,
    /// How it stands.
    pub state: map::State,
    /// First memory slice.
    pub start: u32,
    /// Memory in use, in MiB, shared by the compute instances of a GPU instance; null where the driver does not tell.
    pub memory_used_mib: Option<u64>,
    /// Memory there is, in MiB.
    pub memory_total_mib: Option<u64>,
    /// Busy multiprocessors of the GPU instance, in percent; null before Hopper and in the first look.
    pub sm_percent: Option<f64>,
    /// Memory bandwidth in use, likewise.
    pub dram_percent: Option<f64>,
    /// Uncorrected memory errors.
    pub ecc_errors: Option<u64>,
    /// Processes in it, as the driver lists them.
    pub processes: Vec<ProcessRow>,
}

pub(super) fn run(settings: &Settings, args: &Args, json: bool) -> Result<Exit> {
    if args.interval < FASTEST {
        bail!(Misused(format!("--interval {:?} is too short: the least is {FASTEST:?}", args.interval)));
    }
    if args.takes_the_screen(json) {
        screen::run(settings, args)?;
    } else if json && !args.once {
        stream(settings, args)?;
    } else {
        let nvml = Nvml::at(&settings.nvml);
        let frame = Watch::new(settings, &nvml, &args.gpus).once()?;
        super::print(&frame, json, |frame| text(frame, &map::canvas(args.ascii, map::When::Never)))?;
    }
    Ok(Exit::Ok)
}

/// A document an interval, each in a line, until somebody ends it or nobody reads it any more.
fn stream(settings: &Settings, args: &Args) -> Result<()> {
    let nvml = Nvml::at(&settings.nvml);
    let mut watch = Watch::new(settings, &nvml, &args.gpus);
    loop {
        let line = serde_json::to_string(&Document { version: JSON_VERSION, body: &watch.look()? })? + "\n";
        match std::io::stdout().lock().write_all(line.as_bytes()) {
            Err(error) if error.kind() == ErrorKind::BrokenPipe => return Ok(()),
            written => written?,
        }
        std::thread::sleep(args.interval);
    }
}

// ---- looking ----

/// Looks at GPUs again and again. Takes no lock and writes nothing.
pub(super) struct Watch<'a> {
    settings: &'a Settings,
    gpu: &'a dyn Gpu,
    only: &'a [GpuSelector],
    /// The last sample of each GPU instance, by GPU UUID, id and start: an id comes again.
    samples: BTreeMap<(String, u32, u32), Sample<'a>>,
}

impl<'a> Watch<'a> {
    pub(super) fn new(settings: &'a Settings, gpu: &'a dyn Gpu, only: &'a [GpuSelector]) -> Watch<'a> {
        Watch { settings, gpu, only, samples: BTreeMap::new() }
    }

    /// One look that has everything: two where the driver needs two samples.
    fn once(&mut self) -> Result<Frame> {
        let frame = self.look()?;
        if self.samples.is_empty() {
            return Ok(frame);
        }
        std::thread::sleep(APART);
        self.look()
    }

    /// What there is now. What one slice does not tell, since it has just gone or the driver can't, is unknown.
    pub(super) fn look(&mut self) -> Result<Frame> {
        let map = map::read(self.settings, self.gpu, self.only)?;
        let mut before = std::mem::take(&mut self.samples);
        let mut slices = Vec::new();
        for gpu in &map.gpus {
            let processes = self.gpu.processes(&gpu.uuid).unwrap_or_default();
            for window in gpu.windows.iter().chain(&gpu.unplaced) {
                let Some(gi) = window.gi else { continue };
                let busy = self.utilisation(&mut before, &gpu.uuid, gi, window.start);
                slices.extend(self.live(gpu, window, gi, busy, &processes));
            }
        }
        Ok(Frame { time_ms: host::wall_ms(), map, slices })
    }

    fn utilisation(
        &mut self,
        before: &mut BTreeMap<(String, u32, u32), Sample<'a>>,
        gpu: &str,
        gi: u32,
        start: u32,
    ) -> Utilisation {
        let key = (gpu.to_owned(), gi, start);
        let Ok(Some(now)) = self.gpu.sample(gpu, gi) else { return Utilisation::default() };
        let busy = before.remove(&key).and_then(|then| self.gpu.utilisation(&then, &now).ok());
        self.samples.insert(key, now);
        busy.unwrap_or_default()
    }

    /// One for each compute instance, or one without.
    fn live(&self, gpu: &GpuMap, window: &Window, gi: u32, busy: Utilisation, processes: &[GpuProcess]) -> Vec<Live> {
        let whole = window.profile.clone().unwrap_or_default();
        let computes = window.compute_instances.iter().map(|c| (Some(c.ci), Some(c.uuid.clone()), c.profile.clone()));
        let mut computes: Vec<(Option<u32>, Option<String>, String)> = computes.collect();
        if computes.is_empty() {
            computes.push((None, None, whole));
        }
        let alone = computes.len() == 1;
        let mut lives = Vec::new();
        for (ci, uuid, profile) in computes {
            let reading = uuid.as_deref().and_then(|uuid| self.gpu.reading(uuid).ok());
            let Reading { memory_used_mib, memory_total_mib, ecc_errors, .. } = reading.unwrap_or_default();
            let here = |p: &&GpuProcess| p.instance == Some(gi) && (alone || p.compute.is_none() || p.compute == ci);
            lives.push(Live {
                gpu: gpu.uuid.clone(),
                gpu_index: gpu.index,
                gi,
                ci,
                uuid,
                profile,
                holder: window.who(),
                state: window.state,
                start: window.start,
                memory_used_mib,
                memory_total_mib: memory_total_mib.or(window.memory_mib),
                sm_percent: busy.sm,
                dram_percent: busy.dram,
                ecc_errors,
                processes: processes.iter().filter(here).map(process_row).collect(),
            });
        }
        lives
    }
}

// ---- text ----

/// One look as plain text: the picture, the slices, and all processes.
fn text(frame: &Frame, canvas: &Canvas) -> String {
    if frame.map.gpus.is_empty() {
        return "no NVIDIA GPU\n".into();
    }
    let mut out = String::new();
    for gpu in &frame.map.gpus {
        let lines = map::picture(gpu, canvas, |window| block(frame, gpu, window, canvas));
        out += &canvas.text(&lines);
        out.push('\n');
    }
    out += &canvas.text(&map::legend(&frame.map.gpus, canvas));
    if frame.slices.is_empty() {
        return out;
    }
    let mut rows = vec![TITLES.map(str::to_owned).to_vec()];
    rows.extend(frame.slices.iter().map(columns));
    out += &format!("\n{}", table(&rows, canvas));
    let mut rows = vec![["GPU", "GI", "CI", "PID", "USER", "MEMORY", "PROCESS"].map(str::to_owned).to_vec()];
    for live in &frame.slices {
        let place = [live.gpu_index.to_string(), live.gi.to_string(), number(live.ci)];
        rows.extend(live.processes.iter().map(|process| [&place[..], &process_columns(process)].concat()));
    }
    if rows.len() > 1 {
        out += &format!("\n{}", table(&rows, canvas));
    }
    out
}

fn table(rows: &[Vec<String>], canvas: &Canvas) -> String {
    let clean = |row: &Vec<String>| row.iter().map(|cell| canvas.clean(cell)).collect();
    super::table(&rows.iter().map(clean).collect::<Vec<_>>())
}

/// Titles of [`columns`].
const TITLES: [&str; 9] = ["GPU", "GI", "CI", "PROFILE", "HOLDER", "MEMORY", "SM", "DRAM", "PROCESSES"];

fn columns(live: &Live) -> Vec<String> {
    vec![
        live.gpu_index.to_string(),
        live.gi.to_string(),
        number(live.ci),
        live.profile.clone(),
        live.holder.clone(),
        memory(live),
        percent(live.sm_percent),
        percent(live.dram_percent),
        live.processes.len().to_string(),
    ]
}

fn process_columns(process: &ProcessRow) -> [String; 4] {
    let unknown = || "-".to_owned();
    let name = if process.name.is_empty() { unknown() } else { process.name.clone() };
    let memory = process.memory_mib.map_or_else(unknown, |mib| format!("{} GiB", gib(mib)));
    [process.pid.to_string(), process.user.clone().unwrap_or_else(unknown), memory, name]
}

fn number(number: Option<u32>) -> String {
    number.map_or_else(|| "-".into(), |n| n.to_string())
}

fn percent(percent: Option<f64>) -> String {
    percent.map_or_else(|| "-".into(), |p| format!("{p:.0}%"))
}

fn memory(live: &Live) -> String {
    match (live.memory_used_mib, live.memory_total_mib) {
        (Some(used), Some(total)) => format!("{}/{} GiB", gib(used), gib(total)),
        (None, Some(total)) => format!("-/{} GiB", gib(total)),
        _ => "-".into(),
    }
}

/// MiB as GiB: `0.4`, `9.5`, `39`.
fn gib(mib: u64) -> String {
    let gib = mib as f64 / 1024.0;
    if gib < 9.95 { format!("{gib:.1}") } else { format!("{gib:.0}") }
}

/// The box of a window: that of the map, with a gauge of its memory and what it is doing.
fn block(frame: &Frame, gpu: &GpuMap, window: &Window, canvas: &Canvas) -> Block {
    let mut block = map::block_of(window, canvas);
    let live = frame.slices.iter().find(|live| live.gpu == gpu.uuid && Some(live.gi) == window.gi);
    let Some(live) = live else { return block };
    if let (Some(used), Some(total)) = (live.memory_used_mib, live.memory_total_mib) {
        block.lines.push(Line::Gauge(used as f64 / total.max(1) as f64));
        let (used, total) = (gib(used), gib(total));
        block.lines.push(Line::Text(vec![
            format!("{used}/{total} GiB"),
            format!("{used}/{total}G"),
            format!("{used}G"),
        ]));
    }
    if let Some(sm) = live.sm_percent {
        let sm = format!("SM {sm:.0}%");
        let long = format!("{sm}, DRAM {}", percent(live.dram_percent));
        block.lines.push(Line::Text(vec![long, sm]));
    }
    block
}

#[cfg(test)]
mod tests {
    use super::*;

    fn live() -> Live {
        Live {
            gpu: "GPU-0".into(),
            gpu_index: 0,
            gi: 9,
            ci: Some(0),
            uuid: None,
            profile: "1g.10gb".into(),
            holder: "web".into(),
            state: map::State::Held,
            start: 2,
            memory_used_mib: Some(6000),
            memory_total_mib: Some(9728),
            sm_percent: Some(75.4),
            dram_percent: None,
            ecc_errors: None,
            processes: vec![],
        }
    }

    #[test]
    fn columns_say_what_is_known() {
        assert_eq!(columns(&live()).join("|"), "0|9|0|1g.10gb|web|5.9/9.5 GiB|75%|-|0");
        let unknown = Live { memory_used_mib: None, sm_percent: None, ci: None, ..live() };
        assert_eq!(columns(&unknown).join("|"), "0|9|-|1g.10gb|web|-/9.5 GiB|-|-|0");
        assert_eq!([gib(0), gib(400), gib(10188), gib(40192)], ["0.0", "0.4", "9.9", "39"]);
        let process = ProcessRow { pid: 7, user: None, name: String::new(), memory_mib: None };
        assert_eq!(process_columns(&process), ["7", "-", "-", "-"]);
    }
}
