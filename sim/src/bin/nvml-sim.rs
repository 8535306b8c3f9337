//! Makes and drives simulated MIG machines. See `README.md`.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail, ensure};
use clap::{ArgGroup, Parser, Subcommand, ValueEnum};
use serde::Serialize;

use nvidia_ml::board::{Board, Span, parse};
use nvidia_ml::calls;
use nvidia_ml::code::Code;
use nvidia_ml::describe;
use nvidia_ml::driver::{PARTS, Part};
use nvidia_ml::fault::{Action, Fault, Latency, MAX_FAULTS, Scope, matches};
use nvidia_ml::layout::{self, LIBRARY_DIR, Spec};
use nvidia_ml::load;
use nvidia_ml::report::{Orders, Report};
use nvidia_ml::rules;
use nvidia_ml::state::{AmpereReset, Gpu, Hold, IdMap, Load, UuidFormat};
use nvidia_ml::store::{Error, Machine};

const BOARDS: &str = include_str!("../../boards.json");
/// What a driver tree has as `nvidia-smi`.
const SMI: &str = "nvml-sim-smi";

#[derive(Parser)]
#[command(name = "nvml-sim", version = env!("NVML_SIM_VERSION"), about = "Simulated MIG machines for clients of libnvidia-ml.so.1")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Lay out a new machine as a driver root.
    Create {
        /// A directory that is empty or does not exist.
        dir: PathBuf,
        /// Key of a board (`nvml-sim boards`), or a file that describes one (its name ends in .json); once per GPU, in
        /// NVML index order.
        #[arg(long = "gpu", required = true, value_name = "KEY|FILE")]
        gpus: Vec<String>,
        /// MIG mode to start in.
        #[arg(long, value_enum, default_value = "on")]
        mig: Switch,
        /// Which instance ids the placements carry: one for all GPUs, or one per GPU.
        #[arg(long, value_enum, value_delimiter = ',')]
        gi_map: Vec<Map>,
        /// Device minors in NVML index order, for example 1,0,2.
        #[arg(long, value_delimiter = ',')]
        minors: Vec<u32>,
        /// How MIG devices are named: as since R470, or as before; by the driver version when not given.
        #[arg(long, value_enum)]
        uuid_format: Option<Format>,
        /// Driver version to report. The library has the calls that this driver has, as far as 470, 535 and 580 go.
        #[arg(long, default_value = "580.95.05")]
        driver_version: String,
        /// Whether SetMigMode resets an idle Ampere GPU itself, or leaves the mode pending.
        #[arg(long, value_enum, default_value = "manual")]
        ampere_reset: Reset,
        /// Same seed, same UUIDs; random by default.
        #[arg(long)]
        seed: Option<String>,
        /// The library to copy, instead of the one beside this program.
        #[arg(long)]
        library: Option<PathBuf>,
        /// Lay out the driver's user-space too, for those who give it to containers: all of it, or these parts beside
        /// `utility`.
        #[arg(long, value_enum, value_delimiter = ',', num_args = 0.., default_missing_value = "all")]
        driver_files: Vec<Files>,
    },
    /// List the boards and their profiles.
    Boards {
        /// Only this one.
        key: Option<String>,
        #[arg(long)]
        json: bool,
    },
    /// Show GPUs, instances, UUIDs and minors.
    Show {
        dir: PathBuf,
        #[arg(long)]
        json: bool,
    },
    /// Ask for a MIG mode, by the rules of the GPU.
    Mode {
        dir: PathBuf,
        #[arg(long)]
        gpu: usize,
        #[arg(value_enum)]
        mode: Switch,
        #[arg(long)]
        json: bool,
    },
    /// Reset a GPU: instances and clients are gone, a pending mode takes effect.
    Reset {
        dir: PathBuf,
        #[arg(long)]
        gpu: usize,
    },
    /// Reboot: all instances are gone; Ampere keeps its mode, later GPUs come up with MIG off.
    Reboot { dir: PathBuf },
    /// Cut an instance as a foreign tool would: a GPU instance with one compute instance.
    Make {
        dir: PathBuf,
        #[arg(long)]
        gpu: usize,
        /// Name or driver id, for example 1g.10gb or 19.
        #[arg(long)]
        profile: String,
        /// First memory slice; the driver's choice by default.
        #[arg(long)]
        start: Option<u32>,
        /// Leave out the compute instance.
        #[arg(long)]
        no_ci: bool,
        #[arg(long)]
        json: bool,
    },
    /// Destroy a GPU instance and its compute instances, as a foreign tool would.
    Destroy {
        dir: PathBuf,
        #[arg(long)]
        gpu: usize,
        #[arg(long)]
        gi: u32,
    },
    /// Keep a GPU instance busy, or the whole GPU without --gi.
    Hold {
        dir: PathBuf,
        #[arg(long)]
        gpu: usize,
        #[arg(long)]
        gi: Option<u32>,
        /// List this process as the client; without it none is listed.
        #[arg(long)]
        pid: Option<u32>,
        /// GPU memory that the process has, in MiB; a 64th of the GPU's by default.
        #[arg(long, requires = "pid", value_name = "MIB")]
        memory: Option<u64>,
    },
    /// Let go of what `hold` keeps busy: all clients of the instance, or of the whole GPU without --gi.
    Unhold {
        dir: PathBuf,
        #[arg(long)]
        gpu: usize,
        #[arg(long)]
        gi: Option<u32>,
    },
    /// Say what a GPU, a GPU instance or a compute instance is doing. What is not given stays as it is.
    #[command(group = ArgGroup::new("figure").required(true).multiple(true))]
    Load {
        dir: PathBuf,
        #[arg(long)]
        gpu: usize,
        #[arg(long)]
        gi: Option<u32>,
        #[arg(long, requires = "gi")]
        ci: Option<u32>,
        /// Memory in use, in MiB.
        #[arg(long, group = "figure", value_name = "MIB")]
        memory: Option<u64>,
        /// Multiprocessors that are busy, in percent.
        #[arg(long, group = "figure", value_name = "PERCENT", value_parser = clap::value_parser!(u32).range(..=100))]
        sm: Option<u32>,
        /// Memory bandwidth in use, in percent.
        #[arg(long, group = "figure", value_name = "PERCENT", value_parser = clap::value_parser!(u32).range(..=100))]
        dram: Option<u32>,
        /// Uncorrected volatile memory errors of its SRAM.
        #[arg(long, group = "figure", value_name = "N")]
        ecc: Option<u64>,
        /// First set all of them to nought.
        #[arg(long, group = "figure")]
        off: bool,
    },
    /// Set the persistence mode of a GPU.
    Persistence {
        dir: PathBuf,
        #[arg(long)]
        gpu: usize,
        #[arg(value_enum)]
        mode: Switch,
    },
    /// Make a call go wrong, counted from now over all processes.
    #[command(group = ArgGroup::new("action").required(true))]
    Fault {
        dir: PathBuf,
        /// Exported name, a prefix ending in `*`, or `*`.
        #[arg(long)]
        call: String,
        /// At this matching call.
        #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..))]
        nth: u64,
        /// And at the matching calls that follow, this many in all, or `forever`.
        #[arg(long, default_value = "1", value_parser = times)]
        times: u64,
        /// Only calls about this GPU, by NVML index, and about what lies on it.
        #[arg(long)]
        gpu: Option<usize>,
        /// Return this code without effect: number or name, for example 19 or IN_USE.
        #[arg(long, group = "action", value_parser = code)]
        fail: Option<Code>,
        /// Take longer.
        #[arg(long, group = "action")]
        delay_ms: Option<u64>,
        /// SIGKILL the caller before or after the effect.
        #[arg(long, group = "action", value_enum)]
        kill: Option<Kill>,
    },
    /// Show what is armed and what has fired.
    Faults {
        dir: PathBuf,
        #[arg(long)]
        json: bool,
    },
    /// Disarm and forget all faults.
    ClearFaults {
        dir: PathBuf,
        /// Also latencies, serialise and stale.
        #[arg(long)]
        all: bool,
    },
    /// Make every matching call take time; 0 ms takes it back.
    Latency {
        dir: PathBuf,
        /// Exported name, a prefix ending in `*`, or `*`.
        #[arg(long)]
        call: String,
        #[arg(long)]
        ms: u64,
    },
    /// Make changes wait for each other while they take their time.
    Serialise {
        dir: PathBuf,
        #[arg(value_enum)]
        scope: Turn,
    },
    /// Enumerate MIG devices as nvmlInit found them, as a driver was once seen to do.
    Stale {
        dir: PathBuf,
        #[arg(value_enum)]
        switch: Switch,
    },
    /// Count calls by function; `on` starts from nought.
    Count {
        dir: PathBuf,
        #[arg(value_enum)]
        switch: Switch,
    },
    /// Show the counts.
    Counts {
        dir: PathBuf,
        #[arg(long)]
        json: bool,
    },
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Switch {
    On,
    Off,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Files {
    All,
    Utility,
    Compute,
    Video,
    Graphics,
    Compat32,
}

impl Files {
    fn parts(self) -> Vec<Part> {
        match self {
            Files::All => PARTS.to_vec(),
            Files::Utility => vec![Part::Utility],
            Files::Compute => vec![Part::Utility, Part::Compute],
            Files::Video => vec![Part::Utility, Part::Video],
            Files::Graphics => vec![Part::Utility, Part::Graphics],
            Files::Compat32 => vec![Part::Utility, Part::Compat32],
        }
    }
}

#[derive(Clone, Copy, ValueEnum)]
enum Map {
    Canonical,
    Mirrored,
}

#[derive(Clone, Copy, ValueEnum)]
enum Format {
    New,
    Old,
}

#[derive(Clone, Copy, ValueEnum)]
enum Reset {
    Manual,
    Auto,
}

#[derive(Clone, Copy, ValueEnum)]
enum Kill {
    Before,
    After,
}

#[derive(Clone, Copy, ValueEnum)]
enum Turn {
    Gpu,
    System,
    Off,
}

fn times(text: &str) -> Result<u64, String> {
    match text.parse() {
        _ if text == "forever" => Ok(u64::MAX),
        Ok(times) if times > 0 => Ok(times),
        _ => Err("give a number from 1 on, or `forever`".into()),
    }
}

fn code(text: &str) -> Result<Code, String> {
    Code::parse(text).ok_or_else(|| "NVML has no such error; give its number or name, for example 19 or IN_USE".into())
}

fn main() -> ExitCode {
    match run(Cli::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("nvml-sim: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<()> {
    match command {
        Command::Create {
            dir,
            gpus,
            mig,
            gi_map,
            minors,
            uuid_format,
            driver_version,
            ampere_reset,
            seed,
            library,
            driver_files,
        } => {
            let parts: Vec<Part> = driver_files.into_iter().flat_map(Files::parts).collect();
            let smi = beside(SMI)?.filter(|_| !parts.is_empty());
            if smi.is_none() && !parts.is_empty() {
                eprintln!("nvml-sim: the driver tree has no nvidia-smi, since {SMI} is not beside this program");
            }
            let spec = Spec {
                boards: gpus.iter().map(pick).collect::<Result<_>>()?,
                mig: mig == Switch::On,
                id_maps: gi_map
                    .iter()
                    .map(|map| match map {
                        Map::Canonical => IdMap::Canonical,
                        Map::Mirrored => IdMap::Mirrored,
                    })
                    .collect(),
                minors,
                uuid_format: uuid_format.map(|format| match format {
                    Format::New => UuidFormat::New,
                    Format::Old => UuidFormat::Old,
                }),
                ampere_reset: match ampere_reset {
                    Reset::Manual => AmpereReset::Manual,
                    Reset::Auto => AmpereReset::Auto,
                },
                driver_version,
                seed: seed.map_or_else(random, Ok)?,
                library: library.map_or_else(library_beside, Ok)?,
                parts,
                smi,
            };
            for notice in layout::create(&dir, spec)? {
                eprintln!("nvml-sim: {notice}");
            }
            Ok(())
        }
        Command::Boards { key, json } => boards(key.as_deref(), json),
        Command::Show { dir, json } => show(&dir, json),
        Command::Mode { dir, gpu, mode, json } => set_mode(&dir, gpu, mode == Switch::On, json),
        Command::Reset { dir, gpu } => {
            Ok(open_gpu(&dir, gpu)?.change(|_, state| rules::reset(state, gpu)).map(drop)?)
        }
        Command::Reboot { dir } => {
            open(&dir)?.change(rules::reboot)?;
            layout::clear_cap_nodes(&dir)
        }
        Command::Make { dir, gpu, profile, start, no_ci, json } => make(&dir, gpu, &profile, start, no_ci, json),
        Command::Destroy { dir, gpu, gi } => destroy(&dir, gpu, gi),
        Command::Hold { dir, gpu, gi, pid, memory } => {
            open_instance(&dir, gpu, gi)?.change(|_, state| {
                state.holds.push(Hold { gpu, gi, pid, memory_mib: memory });
                Ok(())
            })?;
            Ok(())
        }
        Command::Unhold { dir, gpu, gi } => {
            let let_go = open_gpu(&dir, gpu)?.change(|_, state| {
                let before = state.holds.len();
                state.holds.retain(|hold| (hold.gpu, hold.gi) != (gpu, gi));
                Ok(before - state.holds.len())
            })?;
            ensure!(let_go > 0, "nothing holds {}; `nvml-sim show {}` lists holds", target(gpu, gi), dir.display());
            Ok(())
        }
        Command::Load { dir, gpu, gi, ci, memory, sm, dram, ecc, off } => {
            let set = |load: &mut Load| {
                if off {
                    *load = Load::default();
                }
                load::set(load, memory, sm, dram, ecc);
            };
            change_load(&dir, gpu, gi, ci, set)
        }
        Command::Persistence { dir, gpu, mode } => Ok(open_gpu(&dir, gpu)?.change(|_, state| {
            state.gpus[gpu].persistence = mode == Switch::On;
            Ok(())
        })?),
        Command::Fault { dir, call, nth, times, gpu, fail, delay_ms, kill } => {
            known_call(&call)?;
            let machine = match gpu {
                Some(gpu) => open_gpu(&dir, gpu)?,
                None => open(&dir)?,
            };
            let action = match (fail, delay_ms, kill) {
                (Some(code), ..) => Action::Fail(code.0),
                (_, Some(ms), _) => Action::DelayMs(ms),
                (.., Some(Kill::Before)) => Action::KillBefore,
                _ => Action::KillAfter,
            };
            machine.order(|plan, _| {
                ensure!(
                    plan.faults.len() < MAX_FAULTS,
                    "{MAX_FAULTS} faults are listed already; forget them with `nvml-sim clear-faults {}`",
                    dir.display()
                );
                plan.faults.push(Fault { call, nth, times, gpu, action });
                Ok(())
            })?
        }
        Command::Faults { dir, json } => {
            let machine = open(&dir)?;
            let snapshot = machine.snapshot()?;
            let orders = Orders::new(&snapshot.plan, &machine.tallies(snapshot.plan.faults.len())?);
            print(json, &orders, || orders.text())
        }
        Command::ClearFaults { dir, all } => Ok(open(&dir)?.order(|plan, tallies| {
            plan.faults.clear();
            tallies.clear();
            if all {
                plan.latencies.clear();
                plan.serialise = None;
                plan.stale = false;
            }
        })?),
        Command::Latency { dir, call, ms } => {
            known_call(&call)?;
            Ok(open(&dir)?.order(|plan, _| {
                plan.latencies.retain(|latency| latency.call != call);
                if ms > 0 {
                    plan.latencies.push(Latency { call, ms });
                }
            })?)
        }
        Command::Serialise { dir, scope } => Ok(open(&dir)?.order(|plan, _| {
            plan.serialise = match scope {
                Turn::Gpu => Some(Scope::Gpu),
                Turn::System => Some(Scope::System),
                Turn::Off => None,
            };
        })?),
        Command::Stale { dir, switch } => Ok(open(&dir)?.order(|plan, _| plan.stale = switch == Switch::On)?),
        Command::Count { dir, switch } => {
            let machine = open(&dir)?;
            if switch == Switch::On {
                machine.clear_counts(&calls::names())?;
            }
            Ok(machine.order(|plan, _| plan.counting = switch == Switch::On)?)
        }
        Command::Counts { dir, json } => {
            let counts = open(&dir)?.counts(&calls::names())?;
            let made: serde_json::Map<_, _> = counts
                .into_iter()
                .filter(|(_, count)| *count > 0)
                .map(|(name, count)| (name.to_owned(), count.into()))
                .collect();
            let text = || made.iter().map(|(name, count)| format!("{count:8} {name}")).collect::<Vec<_>>().join("\n");
            print(json, &made, text)
        }
    }
}

fn print(json: bool, value: &impl Serialize, text: impl FnOnce() -> String) -> Result<()> {
    let text = if json { serde_json::to_string_pretty(value)? } else { text() };
    // Not println!, which panics when the reader has had enough.
    match writeln!(std::io::stdout(), "{text}") {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(error).context("writing the answer"),
        _ => Ok(()),
    }
}

fn open(dir: &Path) -> Result<Machine> {
    Machine::open(&dir.join(LIBRARY_DIR)).map_err(|error| match error {
        Error::Io(_, error) if error.kind() == std::io::ErrorKind::NotFound => anyhow::anyhow!(
            "{dir} holds no machine; make one with `nvml-sim create {dir} --gpu KEY`",
            dir = dir.display()
        ),
        error => error.into(),
    })
}

fn open_gpu(dir: &Path, gpu: usize) -> Result<Machine> {
    let machine = open(dir)?;
    let count = machine.config.gpus.len();
    ensure!(gpu < count, "{} has no GPU {gpu}; use 0 to {}", dir.display(), count - 1);
    Ok(machine)
}

fn open_instance(dir: &Path, gpu: usize, gi: Option<u32>) -> Result<Machine> {
    let machine = open_gpu(dir, gpu)?;
    let found = gi.is_none_or(|gi| machine.snapshot().is_ok_and(|now| now.state.gpus[gpu].gi(gi).is_some()));
    ensure!(found, "there is no {}; `nvml-sim show {}` lists the instances", target(gpu, gi), dir.display());
    Ok(machine)
}

fn change_load(dir: &Path, gpu: usize, gi: Option<u32>, ci: Option<u32>, set: impl Fn(&mut Load)) -> Result<()> {
    let machine = open_instance(dir, gpu, gi)?;
    let changed = machine.change(|_, state| load_of(&mut state.gpus[gpu], gi, ci).map(&set).ok_or(Code::NOT_FOUND));
    changed.with_context(|| match ci {
        Some(ci) => format!("there is no compute instance {ci} in {}", target(gpu, gi)),
        None => format!("{} is as it was", target(gpu, gi)),
    })
}

fn load_of(gpu: &mut Gpu, gi: Option<u32>, ci: Option<u32>) -> Option<&mut Load> {
    let Some(gi) = gi else { return Some(&mut gpu.load) };
    let gi = gpu.gis.iter_mut().find(|known| known.id == gi)?;
    let Some(ci) = ci else { return Some(&mut gi.load) };
    gi.cis.iter_mut().find(|known| known.id == ci).map(|ci| &mut ci.load)
}

fn target(gpu: usize, gi: Option<u32>) -> String {
    gi.map_or_else(|| format!("GPU {gpu}"), |gi| format!("GPU instance {gi} on GPU {gpu}"))
}

fn known_call(pattern: &str) -> Result<()> {
    ensure!(
        calls::names().into_iter().any(|name| matches(pattern, name)),
        "the library exports no call `{pattern}`; give an NVML name such as nvmlGpuInstanceDestroy, or `*`"
    );
    Ok(())
}

fn all_boards() -> Result<Vec<Board>> {
    parse(BOARDS).context("reading the built-in board tables")
}

/// A known board, or one that a file describes.
fn pick(key: &String) -> Result<Board> {
    if key.ends_with(".json") { describe::read(Path::new(key)) } else { known_board(key) }
}

fn known_board(key: &str) -> Result<Board> {
    let all = all_boards()?;
    all.iter().find(|board| board.key == key).cloned().with_context(|| {
        let known: Vec<&str> = all.iter().map(|board| board.key.as_str()).collect();
        format!("there is no board `{key}`; choose from {}", known.join(", "))
    })
}

fn random() -> Result<String> {
    let mut seed = [0; 16];
    let mut source = fs::File::open("/dev/urandom").context("opening /dev/urandom")?;
    std::io::Read::read_exact(&mut source, &mut seed).context("reading /dev/urandom")?;
    Ok(seed.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Cargo leaves the library beside the program after a build, and in deps after a test run: the newer one is meant.
fn library_beside() -> Result<PathBuf> {
    let program = std::env::current_exe().context("finding this program")?;
    let home = program.parent().unwrap_or(Path::new("/"));
    let places = ["libnvidia_ml.so", "deps/libnvidia_ml.so", layout::LIBRARY].map(|name| home.join(name));
    let newest = places.iter().filter_map(|path| Some((fs::metadata(path).ok()?.modified().ok()?, path))).max();
    let (_, path) = newest.with_context(|| {
        format!("libnvidia_ml.so is not beside {}; build it with `cargo build` or give --library", program.display())
    })?;
    Ok(path.clone())
}

/// A program of ours, if it is there.
fn beside(name: &str) -> Result<Option<PathBuf>> {
    let program = std::env::current_exe().context("finding this program")?;
    Ok(Some(program.with_file_name(name)).filter(|path| path.is_file()))
}

fn boards(key: Option<&str>, json: bool) -> Result<()> {
    let line = |board: &Board| {
        let profiles: Vec<&str> = board.profiles.iter().map(|profile| profile.name.as_str()).collect();
        let unsourced: Vec<&str> = board.unsourced.iter().map(|profile| profile.name.as_str()).collect();
        let rest = if unsourced.is_empty() { String::new() } else { format!("; refused: {}", unsourced.join(" ")) };
        format!("{:26} {}: {}{rest}", board.key, board.name, profiles.join(" "))
    };
    match key {
        Some(key) => {
            let board = known_board(key)?;
            print(json, &board, || line(&board))
        }
        None => {
            let all = all_boards()?;
            print(json, &all, || all.iter().map(line).collect::<Vec<_>>().join("\n"))
        }
    }
}

fn show(dir: &Path, json: bool) -> Result<()> {
    let machine = open(dir)?;
    let state = machine.change(|_, state| Ok(state.clone()))?;
    let report = Report::new(dir, &machine.config, &state);
    print(json, &report, || report.text())
}

#[derive(Serialize)]
struct Mode {
    current: bool,
    pending: bool,
    /// 0 when the mode is in effect.
    activation_status: u32,
}

fn set_mode(dir: &Path, gpu: usize, on: bool, json: bool) -> Result<()> {
    let mode = open_gpu(dir, gpu)?.change(|config, state| {
        let status = rules::set_mode(config, state, gpu, on)?;
        let gpu = &state.gpus[gpu];
        let activation_status = status.err().map_or(0, |code| code.0);
        Ok(Mode { current: gpu.current, pending: gpu.pending, activation_status })
    })?;
    print(json, &mode, || {
        let word = if on { "on" } else { "off" };
        match mode.activation_status {
            0 => format!("GPU {gpu}: MIG is {word}"),
            code if mode.pending == on => format!(
                "GPU {gpu}: MIG will be {word} after `nvml-sim reset {} --gpu {gpu}` ({})",
                dir.display(),
                Code(code).name()
            ),
            code => format!("GPU {gpu}: MIG stays as it is; destroy its instances first ({})", Code(code).name()),
        }
    })
}

#[derive(Serialize)]
struct Made {
    gpu_instance: u32,
    placement: Span,
    compute_instance: Option<u32>,
    uuid: Option<String>,
}

fn make(dir: &Path, gpu: usize, wanted: &str, start: Option<u32>, no_ci: bool, json: bool) -> Result<()> {
    let machine = open_gpu(dir, gpu)?;
    let board = machine.config.board(gpu).context("the machine has no board table for this GPU")?;
    let by_id = wanted.parse().ok().and_then(|id| board.profile(id));
    let Some(profile) = by_id.or_else(|| board.profile_by_name(wanted)) else {
        let known: Vec<&str> = board.profiles.iter().map(|profile| profile.name.as_str()).collect();
        bail!("{} has no usable profile `{wanted}`; choose from {}", board.name, known.join(", "));
    };
    let at = start.map(|start| Span { start, size: profile.placements.first().map_or(0, |span| span.size) });
    let whole = profile.whole().filter(|_| !no_ci).map(|whole| whole.id);
    let (gi, ci) = machine
        .change(|config, state| {
            let gi = rules::create_gi(config, state, gpu, profile.id, at)?;
            let ci = whole.map(|id| rules::create_ci(config, state, gpu, gi, id, None)).transpose()?;
            Ok((state.gpus[gpu].gi(gi).cloned().ok_or(Code::UNKNOWN)?, ci))
        })
        .with_context(|| format!("no {wanted} made on GPU {gpu}"))?;
    let uuid = ci.map(|ci| machine.config.mig_uuid(gpu, gi.id, ci));
    let made = Made { gpu_instance: gi.id, placement: gi.span, compute_instance: ci, uuid };
    print(json, &made, || {
        format!("gi{} at {}{}", gi.id, gi.span, made.uuid.as_deref().map_or(String::new(), |uuid| format!(", {uuid}")))
    })
}

fn destroy(dir: &Path, gpu: usize, gi: u32) -> Result<()> {
    let machine = open_instance(dir, gpu, Some(gi))?;
    let done = machine.change(|_, state| {
        let cis = state.gpus[gpu].gi(gi).map_or(Vec::new(), |gi| gi.cis.clone());
        for ci in cis {
            rules::destroy_ci(state, gpu, gi, ci.id)?;
        }
        rules::destroy_gi(state, gpu, gi)
    });
    done.with_context(|| format!("{} not destroyed", target(gpu, Some(gi))))
}
