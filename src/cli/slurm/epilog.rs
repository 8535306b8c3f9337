//! `migctl slurm epilog`: takes back what a job has. It may have nothing, and this may come late, twice, or never.

use anyhow::{Context, Result};

use crate::config::Settings;
use crate::container;
use crate::engine::{Engine, Released};
use crate::gpu::nvml::Nvml;
use crate::slurm;

use super::Job;

pub(super) fn run(settings: &Settings) -> Result<()> {
    let job = Job::of_environment()?;
    let nvml = Nvml::at(&settings.nvml);
    let released = Engine::open(settings, &nvml)?.end_job(&job.key).with_context(|| format!("job {}", job.key))?;
    if let Some(Released::Busy { reason }) = released {
        tracing::warn!(job = job.key.as_str(), "its slices are freed later: {reason}");
    }
    // A job that was cancelled during its Prolog never gets processes, and Slurm forgets the cgroup that we made for it.
    if let Some(cgroup) =
        slurm::cgroup_of_job(&job.node, job.uid, job.id, container::is_cgroup).filter(|_| settings.confine)
    {
        container::remove_job(&cgroup);
    }
    Ok(())
}
