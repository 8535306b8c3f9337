//! `migctl slurm prolog`: gives a job on this node what job_submit.lua wrote into its comment.

use std::path::Path;

use anyhow::{Context, Result, anyhow};

use crate::config::{ConfigError, Settings};
use crate::container::{self, Own, is_cgroup};
use crate::engine::{self, Engine};
use crate::gpu::nvml::Nvml;
use crate::lease::{Holder, Way};
use crate::report;
use crate::request::{self, Request};
use crate::slurm;
use crate::store::Store;

use super::Job;

pub(super) fn run(settings: &Settings, broken: Option<ConfigError>) -> Result<()> {
    let job = Job::of_environment()?;
    // Also a job that asks for no slice may have a step in a container. Only such a step is in want of it.
    if let Err(error) = runtime_root(settings, &job) {
        tracing::error!("job {}: its steps can't run in containers: {}", job.key, report::sentence(&error));
    }
    let comment = std::env::var("SLURM_JOB_COMMENT").unwrap_or_default();
    let nvml = Nvml::at(&settings.nvml);
    let engine = Engine::open(settings, &nvml)?;
    let refuse = |why: &str| engine.refuse_job(&job.key, job.gid, job.uid, why);
    let cgroup = slurm::cgroup_of_job(&job.node, job.uid, job.id, is_cgroup);
    if let Some(cgroup) = cgroup.as_ref().filter(|_| settings.confine) {
        // Of an earlier job with that number, which was cancelled before it had a process: its rules are not this one's.
        container::remove_job(cgroup);
    }
    let Some(asked) = slurm::request_in(&comment) else {
        let earlier = engine.end_job(&job.key).context("what an earlier job of the same number had is not free");
        if settings.confine {
            confine_nothing(&engine, cgroup.as_deref()).inspect_err(|error| refuse(&report::sentence(error)))?;
        }
        return earlier.map(drop);
    };
    let request = match (typed(settings, asked), broken) {
        (Ok(request), None) => request,
        (_, Some(broken)) => {
            refuse(&broken.to_string());
            return Err(broken.into());
        }
        (Err(error), None) => {
            refuse(&report::sentence(&error));
            return Err(error);
        }
    };
    let confine = match settings.confine {
        true => Some(cgroup.as_deref().ok_or_else(no_cgroup).inspect_err(|error| refuse(&report::sentence(error)))?),
        false => None,
    };
    let sign = Some(format!("slurmstepd: [{}.", job.id));
    let slurmd = engine::new_holder(Way::Job, std::os::unix::process::parent_id());
    let holder = Holder { uid: Some(job.uid), cgroup: cgroup.clone(), sign, ..slurmd };
    engine
        .start_job(&job.key, job.gid, &request, &holder, confine.map(Path::new))
        .with_context(|| format!("job {}", job.key))?;
    Ok(())
}

fn runtime_root(settings: &Settings, job: &Job) -> Result<()> {
    let user = super::variable("SLURM_JOB_USER")?;
    Store::open(&settings.state_dir)?.runtime_root(&user, job.uid, job.gid)?;
    Ok(())
}

/// A job that asks for no slice opens none.
fn confine_nothing(engine: &Engine<'_>, cgroup: Option<&str>) -> Result<()> {
    let cgroup = cgroup.ok_or_else(no_cgroup)?;
    Ok(engine.confine(None, &Own::at(Path::new(cgroup))?)?)
}

fn no_cgroup() -> anyhow::Error {
    anyhow!("jobs.confine is set, but slurmd has no cgroup here with device rules; see migctl doctor")
}

fn typed(settings: &Settings, asked: &str) -> Result<Request> {
    let request = request::typed(asked, None)?;
    Ok(Request { wait_s: crate::cli::job::waiting(settings), ..request })
}
