//! `migctl slurm task-prolog`: what each task of a job gets into its environment. Runs as the job's user.

use anyhow::Result;

use crate::config::Settings;
use crate::engine;
use crate::job;
use crate::report::{self, Exit};

/// slurmd reads lines of standard output: `export NAME=value` sets a variable, `unset NAME` removes one, `print` is for the
/// user (slurm.conf(5), TaskProlog). An exit code other than 0 fails the job, and nothing else.
pub(super) fn run(settings: &Settings) -> Result<Exit> {
    let job = super::key().and_then(|key| Ok(engine::published_job(&settings.state_dir, &key)?));
    match job {
        Ok(None) => {
            let stale = job::inherited(|name| std::env::var(name).ok());
            let lines: String = stale.iter().map(|name| format!("unset {name}\n")).collect();
            crate::cli::write(lines.as_bytes())?;
            Ok(Exit::Ok)
        }
        Ok(Some(job)) => {
            let lines: String =
                job.environment().iter().map(|(name, value)| format!("export {name}={value}\n")).collect();
            crate::cli::write(lines.as_bytes())?;
            Ok(Exit::Ok)
        }
        Err(error) => {
            let why = report::sentence(&error).replace(char::is_control, " ");
            crate::cli::write(format!("print migctl: {why}\n").as_bytes())?;
            Ok(report::exit_code(&error))
        }
    }
}
