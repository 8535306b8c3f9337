//! `mig-runtime --mig-job KEY`: what a batch system calls for the container of a job, as Slurm by its oci.conf.
//!
//! `run` and `create` come from the job's user, without a capability: nothing is leased, the container gets the slices that
//! its job has, and the job's end frees them. `state`, `kill` and `delete` come from root, also for what never was, and also
//! where the user can write what the runtime believes.

use std::ffi::{OsStr, OsString};
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::unistd::geteuid;
use serde_json::json;

use crate::bundle;
use crate::config::Settings;
use crate::edits;
use crate::engine::{self, Failure};
use crate::first::{self, Plan, Verb};
use crate::handover::Sigpipe;
use crate::hook::{self, Driver};
use crate::host::{self, HostError};
use crate::injection::Injection;
use crate::job::{Key, Node, Public};
use crate::report::{Misused, Refused};
use crate::runtime::{self, State};

/// How long the runtime may take for `state`, `kill` or `delete`, of which runc gives a container 10 s to die. A user could
/// have it wait for ever, and with it slurmd.
const LIMIT: Duration = Duration::from_secs(30);
/// Group of a user whom the machine does not know.
const NOGROUP: u32 = 65534;

/// Puts the slices of its job into the config of a container; without any, it stays as it is.
pub(super) fn create(plan: &Plan, settings: &Settings, key: &OsStr) -> Result<()> {
    super::check_options(&plan.own)?;
    check_root(plan)?;
    let key = Key::parse(&key.to_string_lossy()).map_err(|why| Misused(format!("--mig-job: {why}")))?;
    let job = engine::published_job(&settings.state_dir, &key)?;
    let path = first::config_path(plan);
    let shown = path.display().to_string();
    let config = bundle::parse(&bundle::read(&path)?, &shown)?;
    if let Some((asks, _)) = hook::annotations(&config.value).find(|(name, _)| first::ours(name)) {
        bail!(Refused(format!(
            "{shown} has the annotation {asks:?}, but a job's containers get the slices of their job: ask for them when the \
             job is submitted, and leave the annotation out"
        )));
    }
    let Some(job) = job else { return Ok(()) };
    let mut value = config.certain(&shown)?;
    let bundle = bundle::directory(plan.bundle.as_deref()).context("cannot tell where the bundle is")?;
    hook::check_dev(&value, Some(&bundle))?;
    let driver = Driver::of(settings, &value, Some(&bundle))?.injection(&job.profiles());
    edit(plan, settings, &job, &driver, &mut value)?;
    Ok(bundle::replace(&path, &value)?)
}

/// No hooks: nothing is leased, and the user could not run them.
fn edit(
    plan: &Plan,
    settings: &Settings,
    job: &Public,
    driver: &Injection,
    config: &mut serde_json::Value,
) -> Result<()> {
    let host = engine::host_of(settings);
    let majors = host.known_majors()?;
    edits::strip(config, majors);
    let on_host = |node: &Node| {
        let missing = || HostError::Content {
            path: settings.dev_root.join(&node.path).display().to_string(),
            what: format!(
                "is not there as device {}:{}, which a slice of job {} needs; submit the job again",
                node.major, node.minor, job.key
            ),
        };
        let mode = host.node_mode(&node.path, node.major, node.minor).ok_or_else(missing)?;
        Ok(edits::Node { name: node.path.clone(), major: node.major, minor: node.minor, mode })
    };
    let nodes = job.nodes.iter().map(on_host).collect::<Result<Vec<_>, HostError>>()?;
    if !geteuid().is_root() {
        hook::check_open(geteuid().as_raw(), &settings.dev_root, &nodes)?;
    }
    let put = if edits::has_user_namespace(config) {
        edits::bind_nodes(config, &nodes, &settings.dev_root)
    } else {
        hook::check_rules(settings, config, majors, !plan.no_cgroup)?;
        edits::make_nodes(config, &nodes)
    };
    put.map_err(Failure::BadRequest)?;
    let process = config.get_mut("process").ok_or_else(|| Failure::BadRequest("config has no process".into()))?;
    let environment = hook::environment(settings, &job.uuids(), &job.profiles());
    edits::set_environment(process, &environment).map_err(Failure::BadRequest)?;
    let own = nodes.iter().filter(|node| node.major == majors.nvidia).map(|node| node.minor);
    let masked = edits::masked_paths(&host.gpus(), own);
    Ok(edits::give_driver(config, driver, &masked).map_err(Failure::BadRequest)?)
}

/// Refuses root a `--root` of a user's: whatever the runtime does there, the user says to whom.
pub(super) fn check_root(plan: &Plan) -> Result<()> {
    let Some(root) = plan.root.as_ref().filter(|_| geteuid().is_root()) else { return Ok(()) };
    match runtime::look(root).context("cannot tell whose --root is")?.user {
        None => Ok(()),
        Some(uid) => bail!(Refused(format!(
            "--root {} is uid {uid}'s: there root does state, kill and delete, with that user's rights, and nothing else; run \
             this as that user",
            root.display()
        ))),
    }
}

/// `state`, `kill` and `delete`. Of what is not there, the first tells that it has stopped, since Slurm asks until it is told
/// so (src/slurmd/slurmstepd/container.c), and there is nothing to do for the others. The rest is the runtime's, with the
/// rights of whoever may have written what it reads.
pub(super) fn manage(plan: &Plan, settings: &Settings, env: &[OsString], pipe: Sigpipe) -> Result<i32> {
    let State { user, found } = state_of(plan).context("cannot tell whose --root is")?;
    let quiet = plan.verb == Verb::State;
    if !found {
        return if quiet { stopped(plan) } else { Ok(0) };
    }
    let low_level = first::low_level_runtime(plan, settings.runtime.as_deref()).map_err(Refused)?;
    let mut command = runtime::command(&low_level, &plan.rest, env);
    pipe.in_child(&mut command).stdin(Stdio::null());
    if quiet {
        command.stderr(Stdio::null()); // Slurm 22.05 reads both as one
    }
    if let Some(uid) = user {
        // The standard library drops the groups, then changes to this one, then to the user.
        command.gid(host::group_of(uid).unwrap_or(NOGROUP)).uid(uid).current_dir("/");
    }
    let mut child = command.spawn().with_context(|| format!("cannot start {}", low_level.display()))?;
    match runtime::end_within(LIMIT, &mut child)? {
        Some(0) => Ok(0),
        _ if quiet => stopped(plan),
        Some(code) => Ok(code),
        None => {
            bail!(Failure::NoRoom(format!("{} was not done within {LIMIT:?}, and was killed", low_level.display())))
        }
    }
}

fn state_of(plan: &Plan) -> std::io::Result<State> {
    let Some(root) = &plan.root else { return Ok(State { user: None, found: true }) }; // the runtime's own, for it to say
    match plan.id.as_ref().and_then(|id| id.to_str()).filter(|id| first::plain_name(id)) {
        None => Ok(State { user: None, found: false }), // no runtime makes one
        Some(id) if geteuid().is_root() => runtime::look(&root.join(id)),
        Some(id) => Ok(State { user: None, found: root.join(id).symlink_metadata().is_ok() }),
    }
}

/// What a runtime prints of a container that has ended.
fn stopped(plan: &Plan) -> Result<i32> {
    let id = plan.id.as_deref().unwrap_or_default().to_string_lossy();
    let state = json!({"ociVersion": "1.0.2", "id": id, "status": "stopped", "pid": 0, "bundle": ""});
    let mut out = std::io::stdout().lock();
    writeln!(out, "{state}").and_then(|()| out.flush()).context("cannot print the state")?;
    Ok(0)
}
