//! `migctl job`: slices for a job of a batch system, by the key that it has there. What has a prolog and an epilog calls
//! this; `migctl slurm` is built on it.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Result, bail};
use serde::Serialize;

use crate::config::Settings;
use crate::container;
use crate::engine::{self, Engine, Failure, Released};
use crate::first::{self, Outline};
use crate::gpu::nvml::Nvml;
use crate::host;
use crate::job::{self, Key, Node, Part, Public};
use crate::lease::{Holder, Way};
use crate::report::{Exit, Misused, Refused};
use crate::request;

/// Arguments of `migctl job`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, clap::Subcommand)]
enum Verb {
    /// Give a job slices, for its processes to learn by `migctl job env`
    Start(Start),
    /// Print the variables that the processes of a job need
    Env(Env),
    /// Take back what a job has; nothing is wrong when it has nothing
    End(End),
}

#[derive(Debug, clap::Args)]
struct Start {
    /// What the batch system calls it, as pbs:123.server or slurm:CLUSTER:15
    #[arg(long, value_name = "KEY", value_parser = Key::parse)]
    key: Key,
    /// Its user, by name or number
    #[arg(long, value_name = "USER|UID", value_parser = super::target::user)]
    uid: u32,
    /// The group whose members may read what it has [default: the user's own]
    #[arg(long, value_name = "GID")]
    gid: Option<u32>,
    /// Its cgroup, by its directory, as it stands in /proc/PID/cgroup, or by the end of that: the job lives as long as a
    /// process is in it
    #[arg(long, value_name = "CGROUP", value_parser = cgroup)]
    cgroup: Option<String>,
    /// It lives as long as this process
    #[arg(long, value_name = "PID")]
    pid: Option<u32>,
    /// It lives as long as a process of root's whose command line begins so
    #[arg(long, value_name = "TEXT", value_parser = clap::builder::NonEmptyStringValueParser::new())]
    sign: Option<String>,
    /// Wait in line for room, at most so long [default: jobs.wait of the settings]
    #[arg(long, value_name = "TIME", value_parser = super::wait)]
    wait: Option<u32>,
    /// On this GPU: index, UUID or PCI address
    #[arg(long, value_name = "GPU")]
    gpu: Option<String>,
    /// Keep its processes from opening other slices: --cgroup, named whole, is made where it is missing, and gets device
    /// rules [default: jobs.confine of the settings]
    #[arg(long, requires = "cgroup")]
    confine: bool,
    /// What it shall have: 1g.10gb, 2x1g.10gb,3g.40gb, 2g.20gb|1g.20gb, 8GiB, MIG-…
    #[arg(value_name = "REQUEST")]
    request: String,
}

#[derive(Debug, clap::Args)]
struct Env {
    /// Its key [default: the job that this process is in: MIG_JOB, or Slurm's variables]
    #[arg(long, value_name = "KEY", value_parser = Key::parse)]
    key: Option<Key>,
    /// For whom the lines are
    #[arg(long, value_name = "FORMAT", default_value = "shell")]
    format: Format,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Format {
    /// export NAME='VALUE', for a POSIX shell's eval
    Shell,
    /// export NAME=VALUE, as Slurm reads the output of a TaskProlog
    Slurm,
    /// NAME=VALUE, as docker and podman read an --env-file, and enroot its environment
    Docker,
}

#[derive(Debug, clap::Args)]
struct End {
    /// Its key
    #[arg(long, value_name = "KEY", value_parser = Key::parse)]
    key: Key,
}

/// The document of `migctl job`.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(super) struct Answer {
    /// The job's key.
    key: String,
    /// Its lease; null when it has none.
    token: Option<String>,
    /// Its slices, in the order asked.
    slices: Vec<Part>,
    /// The device nodes that it needs, on the host.
    nodes: Vec<Node>,
    /// The variables that its processes get.
    environment: BTreeMap<String, String>,
    /// What became of what it had, for `end`; null when it had nothing.
    #[serde(skip_serializing_if = "Option::is_none")]
    released: Option<Released>,
}

impl Answer {
    fn of(public: Public) -> Answer {
        let environment = public.environment().into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
        let Public { key, token, slices, nodes, .. } = public;
        Answer { key, token, slices, nodes, environment, released: None }
    }
}

pub(super) fn run(
    config: Option<&Path>,
    settings: impl Fn() -> Result<Settings>,
    args: &Args,
    json: bool,
) -> Result<Exit> {
    match &args.verb {
        Verb::Start(args) => start(&settings()?, args, json),
        // A user namespace has settings of its own, and the job is root's: enroot calls from one.
        Verb::Env(args) => env(&first::state_dir_of_root(Outline::read(config).state_dir), args, json),
        Verb::End(args) => end(&settings()?, args, json),
    }
}

fn start(settings: &Settings, args: &Start, json: bool) -> Result<Exit> {
    let gid = match args.gid.or_else(|| host::group_of(args.uid)) {
        Some(gid) => gid,
        None => {
            bail!(Misused(format!("uid {} is not known here, so its group isn't either: name it with --gid", args.uid)))
        }
    };
    let init = match args.pid.map(host::process) {
        Some(None) => bail!(Misused("the process that --pid names is not there".into())),
        named => named.flatten(),
    };
    let confine = args.cgroup.as_deref().filter(|_| args.confine || settings.confine);
    if settings.confine && confine.is_none() {
        bail!(Refused("jobs.confine is set: name the cgroup of the job with --cgroup".into()));
    }
    let mut request = request::typed(&args.request, args.gpu.as_deref())?;
    request.wait_s = args.wait.or_else(|| waiting(settings));
    let holder = Holder {
        uid: Some(args.uid),
        init,
        cgroup: args.cgroup.clone(),
        sign: args.sign.clone(),
        ..engine::new_holder(Way::Job, std::os::unix::process::parent_id())
    };
    let nvml = Nvml::at(&settings.nvml);
    let engine = Engine::open(settings, &nvml)?;
    let public = engine.start_job(&args.key, gid, &request, &holder, confine.map(Path::new))?;
    super::print(&Answer::of(public), json, |answer| lines(&answer.environment, Format::Shell))?;
    Ok(Exit::Ok)
}

fn cgroup(text: &str) -> Result<String, String> {
    container::path_of(text).map_err(|error| error.to_string())
}

/// Seconds that a job waits for room where nothing else is said.
pub(super) fn waiting(settings: &Settings) -> Option<u32> {
    u32::try_from(settings.job_wait.as_secs()).ok().filter(|seconds| *seconds > 0)
}

fn env(state_dir: &Path, args: &Env, json: bool) -> Result<Exit> {
    let job = match &args.key {
        Some(key) => engine::published_job(state_dir, key)?,
        None => of_this_process(state_dir)?,
    };
    let Some(job) = job else {
        let which =
            args.key.as_ref().map_or_else(|| "this process is in no job that".into(), |key| format!("no job {key}"));
        bail!(Failure::BadRequest(format!("{which} has slices here")));
    };
    super::print(&Answer::of(job), json, |answer| lines(&answer.environment, args.format))?;
    Ok(Exit::Ok)
}

fn end(settings: &Settings, args: &End, json: bool) -> Result<Exit> {
    let nvml = Nvml::at(&settings.nvml);
    let released = Engine::open(settings, &nvml)?.end_job(&args.key)?;
    let nothing = Answer::of(Public::refused(&args.key, 0, None));
    let answer = Answer { released, environment: BTreeMap::new(), ..nothing };
    super::print(&answer, json, |answer| match &answer.released {
        None => format!("job {} has nothing here\n", answer.key),
        Some(Released::Done | Released::Unknown) => format!("what job {} had is free\n", answer.key),
        Some(Released::Busy { reason }) => {
            format!("what job {} had is freed by migctl gc later: {reason}\n", answer.key)
        }
        Some(Released::Announced) => {
            format!("what job {} had is freed by migctl gc: the lock was not free\n", answer.key)
        }
    })?;
    Ok(if matches!(answer.released, None | Some(Released::Done | Released::Unknown)) { Exit::Ok } else { Exit::NoRoom })
}

/// The job that this process belongs to, by what its environment says, where something is public of it.
///
/// # Errors
/// When it was refused, or is another user's.
pub(super) fn of_this_process(state_dir: &Path) -> Result<Option<Public>> {
    let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    // Slurm's own say where we are; ours may be inherited from the job that has submitted this one.
    let of_slurm = variable("SLURM_CLUSTER_NAME").zip(variable("SLURM_JOB_ID"));
    let key = match (of_slurm, variable(job::KEY)) {
        (Some((cluster, id)), _) => Key::of_slurm(&cluster, &id),
        (None, Some(key)) => Key::parse(&key),
        (None, None) => return Ok(None),
    };
    match key {
        Ok(key) => Ok(engine::published_job(state_dir, &key)?),
        Err(_) => Ok(None), // not one that we have given
    }
}

fn lines(environment: &BTreeMap<String, String>, format: Format) -> String {
    let line = |(name, value): (&String, &String)| match format {
        Format::Shell => format!("export {name}='{value}'\n"),
        Format::Slurm => format!("export {name}={value}\n"),
        Format::Docker => format!("{name}={value}\n"),
    };
    environment.iter().map(line).collect()
}
