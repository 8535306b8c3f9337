//! `migctl slurm`: what Slurm's Prolog, TaskProlog and Epilog call, on top of `migctl job`, and what its files have to say.
//!
//! A Prolog or Epilog that fails drains the node: so these two end with 0 whatever happens, and what went wrong is told to
//! the job, by its TaskProlog, and to the log.

use std::path::Path;

use anyhow::{Context, Result, anyhow};

use crate::config::{ConfigError, Settings};
use crate::first;
use crate::job::Key;
use crate::report::{self, Exit};

mod config;
mod epilog;
mod prolog;
mod task_prolog;

/// Arguments of `migctl slurm`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, clap::Subcommand)]
enum Verb {
    /// As Prolog: give the job what its comment asks for (mig=1g.10gb)
    Prolog,
    /// As TaskProlog: print the variables of the job's slices, or why it has none
    TaskProlog,
    /// As Epilog: take back what the job has
    Epilog,
    /// Print what slurm.conf, gres.conf, oci.conf, job_submit.lua and cli_filter.lua have to say
    Config(config::Args),
}

/// The job that Slurm calls us for.
struct Job {
    key: Key,
    id: u32,
    uid: u32,
    gid: u32,
    node: String,
}

impl Job {
    /// From the environment of a Prolog or Epilog (slurm.conf(5), "Prolog and Epilog scripts").
    fn of_environment() -> Result<Job> {
        let number =
            |name: &str| -> Result<u32> { variable(name)?.parse().with_context(|| format!("{name} is no number")) };
        Ok(Job {
            key: key()?,
            id: number("SLURM_JOB_ID")?,
            uid: number("SLURM_JOB_UID")?,
            gid: number("SLURM_JOB_GID")?,
            node: variable("SLURMD_NODENAME")?,
        })
    }
}

fn variable(name: &str) -> Result<String> {
    let value = std::env::var(name).ok().filter(|value| !value.is_empty());
    value.ok_or_else(|| anyhow!("{name} is not set: this is called by slurmd, as its Prolog, TaskProlog or Epilog"))
}

fn key() -> Result<Key> {
    Key::of_slurm(&variable("SLURM_CLUSTER_NAME")?, &variable("SLURM_JOB_ID")?).map_err(|why| anyhow!(why))
}

pub(super) fn run(config: Option<&Path>, args: &Args, json: bool) -> Result<Exit> {
    match &args.verb {
        Verb::Prolog => {
            let (settings, broken) = settings(config);
            Ok(said(prolog::run(&settings, broken)))
        }
        Verb::Epilog => Ok(said(epilog::run(&settings(config).0))),
        Verb::TaskProlog => task_prolog::run(&settings(config).0),
        Verb::Config(args) => {
            let settings = Settings::load(config)?;
            report::start_logging(&settings, true);
            config::run(&settings, args, json)
        }
    }
}

/// Settings that serve even where the file does not: its jobs are refused then, and told so, where they look for it.
fn settings(config: Option<&Path>) -> (Settings, Option<ConfigError>) {
    let (settings, broken) = match Settings::load(config) {
        Ok(settings) => (settings, None),
        Err(error) => {
            let outline = first::Outline::read(config);
            let state_dir = first::state_dir(outline.state_dir);
            (Settings { state_dir, ..Settings::default() }, Some(error))
        }
    };
    report::start_logging(&settings, false);
    (settings, broken)
}

/// What went wrong, in slurmd's log and ours, and never in the exit code.
fn said(outcome: Result<()>) -> Exit {
    if let Err(error) = outcome {
        let why = report::sentence(&error);
        eprintln!("migctl: {why}");
        tracing::error!("{why}");
    }
    Exit::Ok
}
