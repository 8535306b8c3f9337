//! `migctl`: argv, stdout and exit codes of the command for people and scripts. One verb a file.

use std::ffi::OsString;
use std::fmt::Display;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Result;
use clap::{Arg, ArgMatches, Command, CommandFactory, FromArgMatches, Parser, Subcommand};
use serde::Serialize;

use crate::config::Settings;
use crate::engine::{Failure, leases_in};
use crate::first;
use crate::gpu::nvml::Nvml;
use crate::gpu::{ComputeInstance, Device, Gpu, Instance, MigDevice, Placement};
use crate::host;
use crate::lease::Lease;
use crate::profile;
use crate::report::{self, Exit};
use crate::request::{self, GpuSelector};
use crate::store::{Store, StoreError};

use habits::{Habit, Smi};

mod adopt;
mod apply;
mod assert;
mod cdi;
mod completions;
mod config_file;
mod configure;
mod cordon;
mod create;
mod destroy;
mod doctor;
mod drain;
mod export;
mod gc;
mod habits;
mod history;
mod holder;
mod interrupt;
mod job;
mod leases;
mod list;
mod map;
mod metrics;
mod mode;
mod plan;
mod profiles;
mod queue;
mod release;
mod reserve;
mod run;
mod slurm;
mod target;
mod top;

/// Version of every verb's `--json` document.
const JSON_VERSION: u32 = 1;
/// The option that names the settings file, as clap knows it.
const SETTINGS: &str = "config";

/// See and free the MIG slices that containers hold, and make engines give them.
#[derive(Debug, Parser)]
#[command(name = "migctl", version = first::VERSION, max_term_width = 100)]
pub struct Args {
    /// Settings file [default: /etc/mig-hook/config.toml, which may be missing]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Print a JSON document instead of text
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Show GPUs, the slices on them, and who holds which
    List(list::Args),
    /// Show the profiles that GPUs offer, and how many of each are free
    Profiles(profiles::Args),
    /// Draw each GPU's memory slices, and who has them
    Map(map::Args),
    /// Watch the slices: the map, live, with memory, utilisation and processes
    Top(top::Args),
    /// Show what is recorded of each holder
    Leases,
    /// Tell what a container with a request would get and where, or why it would get nothing
    Plan(plan::Args),
    /// Give back the slices of a container that has ended
    Release(release::Args),
    /// Free what nobody holds any more, and finish what was interrupted
    Gc(gc::Args),
    /// Cut slices that stay, for whoever asks for them
    Create(create::Args),
    /// Take GPU instances away, with their compute instances
    Destroy(destroy::Args),
    /// Give existing GPU instances to mig-hook
    Adopt(adopt::Args),
    /// Have slices for the containers of one user only
    Reserve(reserve::Args),
    /// Close GPUs to new containers
    Cordon(cordon::Args),
    /// Open GPUs again that were cordoned or drained
    Uncordon(cordon::OpenArgs),
    /// Close GPUs to new containers and wait until nobody is left on them
    Drain(drain::Args),
    /// Turn MIG mode on or off, or show it
    Mode(mode::Args),
    /// Show who held which slices, and how long
    History(history::Args),
    /// Print or write what monitoring wants to know, as OpenMetrics text
    Metrics(metrics::Args),
    /// Make GPUs what a config of mig-parted says, changing only what differs
    Apply(apply::Args),
    /// Print the slices that there are as a config of mig-parted
    Export(export::Args),
    /// Check whether GPUs are what a config of mig-parted says
    Assert(assert::Args),
    /// Show who waits for room and for what, or take one out of the line
    Queue(queue::Args),
    /// Run a command with slices of its own, from its start to its end
    Run(run::Args),
    /// Give slices to the jobs of a batch system: for its prologs and epilogs
    Job(job::Args),
    /// What Slurm calls on a node, and what its files have to say
    Slurm(slurm::Args),
    /// Print or write the CDI spec of the slices that a container may name
    Cdi(cdi::Args),
    /// Register mig-hook with a container engine, or take it out again
    Configure(configure::Args),
    /// Look for what is wrong on this machine, and say what mends it
    Doctor(doctor::Args),
    /// Print the script that makes a shell complete migctl's command line
    Completions(completions::Args),
}

/// Parses the command line, runs the verb, and turns the outcome into an exit code.
pub fn main() -> ExitCode {
    let mut argv: Vec<OsString> = std::env::args_os().collect();
    let words: Vec<String> = argv.iter().skip(1).map(|word| word.to_string_lossy().into_owned()).collect();
    match habits::translate(&words) {
        Some(Habit::Run(ours)) => {
            eprintln!("migctl: this is `migctl {}`", ours.join(" "));
            argv.truncate(1);
            argv.extend(ours.into_iter().map(OsString::from));
        }
        Some(Habit::Smi(smi)) => return told(&smi, &words),
        None => {}
    }
    let args = match command().try_get_matches_from(argv).and_then(|matches| parsed(&matches)) {
        Ok(args) => args,
        Err(error) => {
            let _ = error.print();
            let code = if error.use_stderr() { Exit::Usage } else { Exit::Ok };
            return ExitCode::from(code as u8);
        }
    };
    match run(&args) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("migctl: {}", report::sentence(&error));
            ExitCode::from(report::exit_code(&error) as u8)
        }
    }
}

/// Tells what a command line of nvidia-smi is here. The driver is asked where there is one: it knows what its ids mean.
fn told(smi: &Smi, words: &[String]) -> ExitCode {
    let config = words.iter().position(|word| word == "--config").and_then(|at| words.get(at + 1));
    let settings = Settings::load(config.map(Path::new)).unwrap_or_default();
    let devices = Nvml::at(&settings.nvml).devices().unwrap_or_default();
    eprintln!("migctl: that is for nvidia-smi; here it is:");
    for line in smi.ours(&devices).iter().flat_map(|line| line.lines()) {
        eprintln!("  {line}");
    }
    ExitCode::from(Exit::Usage as u8)
}

/// The command line. `--config FILE` is understood before a verb and after it, but for the verbs with a `--config` of their
/// own: after these it is theirs.
fn command() -> Command {
    fn with(command: Command, settings: &Arg) -> Command {
        command.mut_subcommands(|verb| {
            let own = verb.get_arguments().any(|arg| arg.get_long() == Some("config"));
            let verb = if own { verb } else { verb.arg(settings.clone()) };
            with(verb, settings)
        })
    }
    let command = Args::command();
    let settings = command.get_arguments().find(|arg| arg.get_id() == SETTINGS).cloned();
    match settings {
        Some(settings) => with(command, &settings),
        None => command,
    }
}

/// What a command line says. Of several settings files the last one counts.
fn parsed(matches: &ArgMatches) -> Result<Args, clap::Error> {
    let mut args = Args::from_arg_matches(matches)?;
    let mut below = matches.subcommand();
    while let Some((_, matches)) = below {
        let named = matches.try_get_one::<PathBuf>(SETTINGS).ok().flatten();
        args.config = named.cloned().or(args.config);
        below = matches.subcommand();
    }
    Ok(args)
}

fn run(args: &Args) -> Result<u8> {
    let settings = || -> Result<Settings> {
        let settings = Settings::load(args.config.as_deref())?;
        report::start_logging(&settings, true);
        Ok(settings)
    };
    let exit = match &args.verb {
        Verb::List(verb) => list::run(&settings()?, verb, args.json),
        Verb::Profiles(verb) => profiles::run(&settings()?, verb, args.json),
        Verb::Map(verb) => map::run(&settings()?, verb, args.json),
        Verb::Top(verb) if verb.takes_the_screen(args.json) => {
            top::run(&Settings::load(args.config.as_deref())?, verb, false)
        }
        Verb::Top(verb) => top::run(&settings()?, verb, args.json),
        Verb::Leases => leases::run(&settings()?, args.json),
        Verb::Plan(verb) => plan::run(&settings()?, verb, args.json),
        Verb::Release(verb) => release::run(&settings()?, verb, args.json),
        Verb::Gc(gc) => gc::run(&settings()?, gc, args.json),
        Verb::Create(verb) => create::run(&settings()?, verb, args.json),
        Verb::Destroy(verb) => destroy::run(&settings()?, verb, args.json),
        Verb::Adopt(verb) => adopt::run(&settings()?, verb, args.json),
        Verb::Reserve(verb) => reserve::run(&settings()?, verb, args.json),
        Verb::Cordon(verb) => cordon::run(&settings()?, verb, args.json),
        Verb::Uncordon(verb) => cordon::open(&settings()?, verb, args.json),
        Verb::Drain(verb) => drain::run(&settings()?, verb, args.json),
        Verb::Mode(verb) => mode::run(&settings()?, verb, args.json),
        Verb::History(verb) => history::run(&settings()?, verb, args.json),
        Verb::Metrics(verb) => metrics::run(&settings()?, verb, args.json),
        Verb::Apply(verb) => apply::run(&settings()?, verb, args.json),
        Verb::Export(verb) => export::run(&settings()?, verb, args.json),
        Verb::Assert(verb) => assert::run(&settings()?, verb, args.json),
        Verb::Queue(verb) => queue::run(&settings()?, verb, args.json),
        // A CDI spec is JSON in any case.
        Verb::Cdi(verb) => cdi::run(&settings()?, verb),
        Verb::Configure(verb) => configure::run(&settings()?, verb, args.json),
        // These work whatever is in the settings.
        Verb::Doctor(verb) => doctor::run(args.config.as_deref(), verb, args.json),
        Verb::Completions(verb) => completions::run(verb, args.json),
        Verb::Slurm(verb) => slurm::run(args.config.as_deref(), verb, args.json),
        Verb::Job(verb) => job::run(args.config.as_deref(), settings, verb, args.json),
        Verb::Run(verb) => return run::run(&settings()?, verb), // its exit code is the command's
    };
    Ok(exit? as u8)
}

/// A verb's document with its version.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
struct Document<'a, T: Serialize> {
    /// Another number says that something here has changed its meaning or has gone.
    #[cfg_attr(test, schemars(extend("const" = JSON_VERSION)))]
    version: u32,
    #[serde(flatten)]
    body: &'a T,
}

/// Prints a document as JSON, or as the text that is a view of it. The text may be styled (anstyle): it is shown so on a
/// terminal only, and not where NO_COLOR or TERM=dumb says otherwise.
fn print<T: Serialize>(body: &T, json: bool, text: impl Fn(&T) -> String) -> Result<()> {
    let mut shown = match json {
        true => serde_json::to_string_pretty(&Document { version: JSON_VERSION, body })?,
        false => match anstream::AutoStream::choice(&std::io::stdout()) {
            anstream::ColorChoice::Never => plain(&text(body)),
            _ => text(body),
        },
    };
    if !shown.is_empty() && !shown.ends_with('\n') {
        shown.push('\n');
    }
    write(shown.as_bytes())
}

/// Writes to standard output. A closed pipe (`| head`) is no error.
fn write(bytes: &[u8]) -> Result<()> {
    match std::io::stdout().lock().write_all(bytes) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(()),
    }
}

/// `1 lease`, `2 leases`.
fn counted<N: Display + From<u8> + PartialEq>(number: N, thing: &str) -> String {
    let s = if number == N::from(1) { "" } else { "s" };
    format!("{number} {thing}{s}")
}

/// The word of a state, as the JSON documents spell it.
fn word<T: Serialize>(state: T) -> String {
    serde_json::to_value(state).ok().and_then(|word| word.as_str().map(str::to_owned)).unwrap_or_default()
}

/// What others wrote (names, files, versions), on one line: it must not steer the terminal of who reads it.
fn printable(text: &str) -> String {
    text.replace(host::steers, "\u{fffd}")
}

/// A text without its styles.
fn plain(text: &str) -> String {
    anstream::adapter::strip_str(text).to_string()
}

/// A text in a style.
fn styled(style: anstyle::Style, text: &str) -> String {
    format!("{style}{text}{style:#}")
}

/// Rows in columns as wide as their widest cell, two spaces apart. Numbers, of which the first row has none, end where the
/// others of their column do.
fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |cell: &String| plain(cell).chars().count();
    let widest = |n: usize| rows.iter().filter_map(|row| row.get(n)).map(width).max().unwrap_or(0);
    let numbers =
        |n: usize| rows.len() > 1 && rows[1..].iter().filter_map(|row| row.get(n)).all(|cell| is_number(cell));
    let form: Vec<(usize, bool)> = (0..columns).map(|n| (widest(n), numbers(n))).collect();
    let line = |row: &Vec<String>| {
        let cells = row.iter().zip(&form).map(|(cell, (widest, right))| {
            let space = " ".repeat(widest - width(cell));
            if *right { format!("{space}{cell}") } else { format!("{cell}{space}") }
        });
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned() + "\n"
    };
    rows.iter().map(line).collect()
}

fn is_number(cell: &str) -> bool {
    let text = plain(cell);
    text.chars().all(|c| c.is_ascii_digit() || "-/. ".contains(c))
}

/// The GPUs as whoever asks may see them: where the driver hides instances, those that have a MIG device, without their
/// placement.
fn visible(gpu: &dyn Gpu, only: &[GpuSelector]) -> Result<Vec<Device>> {
    let mut devices = gpu.devices()?;
    if let Some(wanted) = only.iter().find(|wanted| !devices.iter().any(|device| wanted.matches(device))) {
        let present: Vec<String> = devices.iter().map(|d| format!("{} {}", d.label(), d.uuid)).collect();
        let present = if present.is_empty() { "none".to_owned() } else { present.join(", ") };
        return Err(Failure::BadRequest(format!("no GPU here is {wanted}; there is {present}")).into());
    }
    devices.retain(|device| only.is_empty() || only.iter().any(|wanted| wanted.matches(device)));
    for device in devices.iter_mut().filter(|device| device.is_closed()) {
        for mig in gpu.mig_devices(&device.uuid)? {
            add_instance(device, mig);
        }
    }
    Ok(devices)
}

fn add_instance(device: &mut Device, mig: MigDevice) {
    let (part, whole) = match profile::split_compute(&mig.profile) {
        Some((slices, whole)) => (Some(slices), whole),
        None => (None, mig.profile.as_str()),
    };
    let Some(profile) = profile::resolve_name(device, whole) else { return };
    let (id, slices, sms) = (profile.id, part.unwrap_or(profile.slices), profile.sms);
    let compute = ComputeInstance { id: mig.compute, slices, sms, uuid: mig.uuid };
    match device.instances.iter_mut().find(|instance| instance.id == mig.instance) {
        Some(instance) => instance.compute.push(compute),
        None => device.instances.push(Instance {
            id: mig.instance,
            profile: id,
            placement: Placement::UNKNOWN,
            compute: vec![compute],
        }),
    }
}

/// A GPU as people name it on the command line.
fn gpu_selector(text: &str) -> Result<GpuSelector, String> {
    GpuSelector::parse(text).ok_or_else(|| "name a GPU by its index, UUID (GPU-…) or PCI address (07:00.0)".to_owned())
}

/// Seconds to wait for room, as in `mig.wait`.
fn wait(text: &str) -> Result<u32, String> {
    request::parse_wait(text).ok_or_else(|| "say how long as 30s, 10m or 1h".to_owned())
}

/// The state, where there is any and this user may read it.
fn readable_state(settings: &Settings) -> Result<Option<Store>, StoreError> {
    match Store::existing(&settings.state_dir) {
        Err(StoreError::NotRoot { .. }) => Ok(None),
        store => store,
    }
}

/// What is recorded; nothing where there is no state yet, or none for this user to read.
fn recorded(settings: &Settings) -> Result<Vec<Lease>> {
    match readable_state(settings)? {
        Some(store) => Ok(leases_in(&store)?),
        None => Ok(Vec::new()),
    }
}

/// Milliseconds as `45s`, `12m`, `3h05m`, `2d04h`.
fn duration(ms: u64) -> String {
    let seconds = ms / 1000;
    match (seconds / 86_400, seconds / 3_600 % 24, seconds / 60 % 60) {
        (0, 0, 0) => format!("{seconds}s"),
        (0, 0, minutes) => format!("{minutes}m"),
        (0, hours, minutes) => format!("{hours}h{minutes:02}m"),
        (days, hours, _) => format!("{days}d{hours:02}h"),
    }
}

#[cfg(test)]
mod schema;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        command().debug_assert();
    }

    #[test]
    fn durations_and_columns() {
        assert_eq!(duration(45_000), "45s");
        assert_eq!(duration(3_900_000), "1h05m");
        assert_eq!(duration(187_200_000), "2d04h");
        let rows = |rows: &[&[&str]]| {
            table(&rows.iter().map(|row| row.iter().map(|c| (*c).into()).collect()).collect::<Vec<_>>())
        };
        assert_eq!(rows(&[&["a", "b"], &["ccc", "d"]]), "a    b\nccc  d\n");
        assert_eq!(
            rows(&[&["NAME", "USED MiB"], &["a", "7 / 100"], &["b", "-"]]),
            "NAME  USED MiB\na      7 / 100\nb            -\n"
        );
        let bold = styled(anstyle::Style::new().bold(), "a");
        assert_eq!(
            rows(&[&[bold.as_str(), "b"], &["ccc", "d"]]),
            format!("{bold}    b\nccc  d\n"),
            "styles have no width"
        );
        assert_eq!(plain(&bold), "a");
    }
}
