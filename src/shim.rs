//! `mig-runtime`, second stage: a container that asks for a slice, or holds one, on its way to the low-level runtime.
//!
//! Ends in `execv`, so that pid, signals and exit code stay the runtime's; only `delete` of a leased container waits for
//! the runtime, since the slice may be given back only after it.

use std::ffi::OsString;
use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::Value;

use crate::bundle;
use crate::config::Settings;
use crate::edits;
use crate::engine::{self, Engine, Released};
use crate::first::{self, Own, Plan, Verb};
use crate::gpu::{Gpu, nvml::Nvml};
use crate::handover::{self, Sigpipe};
use crate::hook;
use crate::host;
use crate::injection;
use crate::lease::{Holder, Way};
use crate::report::{self, Misused, Refused};
use crate::request::{self, Request};
use crate::runtime;

mod job;

/// Does what the command line asks for, then becomes the runtime. Returns an exit code when it could not.
pub fn main(args: Vec<OsString>, pipe: Sigpipe) -> i32 {
    let env = handover::unwrap_environment();
    let plan = first::plan(args);
    let settings = match Settings::load(plan.own.config.as_deref()) {
        Ok(settings) => settings,
        // A broken settings file must not keep anybody from deleting a container.
        Err(error) if !matches!(plan.verb, Verb::Create | Verb::Run | Verb::Restore) => {
            eprintln!("mig-runtime: {error}; going on without");
            // The first stage read as much when it saw the lease: the same runtime, and the same leases.
            let outline = first::Outline::read(plan.own.config.as_deref());
            let default = Settings::default();
            Settings { runtime: outline.runtime.path, state_dir: first::state_dir(outline.state_dir), ..default }
        }
        Err(error) => return refuse(&plan, &error.into()),
    };
    report::start_logging(&settings, false);
    let nvml = Nvml::at(&settings.nvml); // loads nothing before it is asked something
    let prepared = match (plan.verb, &plan.own.job) {
        (Verb::State | Verb::Kill | Verb::Delete, Some(_)) if plan.id.is_some() => {
            return job::manage(&plan, &settings, &env, pipe).unwrap_or_else(|error| refuse(&plan, &error));
        }
        (Verb::Create | Verb::Run, Some(key)) => job::create(&plan, &settings, key).map(|()| None),
        (_, Some(_)) => job::check_root(&plan).map(|()| None),
        (Verb::Create | Verb::Run, None) => create(&plan, &settings, &nvml),
        (Verb::Restore, None) => restore(&plan).map(|()| None),
        (Verb::Exec, None) => {
            if let Err(error) = exec(&plan, &settings, &nvml) {
                tracing::warn!("the process gets no environment of its slice: {}", report::sentence(&error));
            }
            Ok(None)
        }
        (Verb::Delete, None) => return delete(&plan, &settings, &nvml, &env, pipe),
        (Verb::State | Verb::Kill | Verb::Other, None) => Ok(None),
    };
    match prepared {
        Err(error) => refuse(&plan, &error),
        Ok(token) => {
            pipe.restore();
            let error = first::hand_over(&plan, settings.runtime.as_deref(), &env);
            let _ = Sigpipe::ignore();
            if let (Some(token), Ok(engine)) = (token, Engine::open(&settings, &nvml)) {
                hook::give_back(&engine, &token);
            }
            refuse(&plan, &Refused(error).into())
        }
    }
}

/// The reason on stderr, in the runtime's log and in the journal; nothing was started.
fn refuse(plan: &Plan, error: &anyhow::Error) -> i32 {
    let message = format!("mig: {}", report::sentence(error));
    eprintln!("mig-runtime: {message}");
    tracing::error!("{message}");
    // Of what root does for a job, the job's user may own the directory.
    let job_of_a_user = plan.own.job.is_some() && nix::unistd::geteuid().is_root();
    if let Some(log) = plan.log.as_ref().filter(|_| !job_of_a_user) {
        report::to_runtime_log(log, plan.log_json, &message);
    }
    report::exit_code(error) as i32
}

/// Edits the config of a container that asks for slices. The token of what was acquired, to be given back should the
/// hand-over fail.
fn create(plan: &Plan, settings: &Settings, nvml: &Nvml) -> Result<Option<String>> {
    check_options(&plan.own)?;
    let path = first::config_path(plan);
    let shown = path.display().to_string();
    let config = bundle::parse(&bundle::read(&path)?, &shown)?;
    let asked = requested(plan.own.env, settings, &config.value).inspect_err(|error| {
        if let Ok(holder) = holder(plan, settings, &config.value) {
            engine::audit_refusal(&holder, None, &report::sentence(error));
        }
    });
    let Some(request) = asked? else {
        return match edits::marked(&config.value) {
            Some(_) => Err(Refused(format!("{shown} is marked with {} but asks for no slice", edits::LEASE)).into()),
            None => Ok(None),
        };
    };
    let mut value = config.certain(&shown)?;
    let holder = holder(plan, settings, &value)?;
    let engine = Engine::open(settings, nvml)?;
    let believable = |token: &&str| first::plain_name(token) && edits::carries_lease(&value, token);
    if let Some(token) = edits::marked(&value).filter(believable)
        && engine.take_over(token, &holder)?
    {
        return Ok(None); // podman's hook was here before us and releases by the same token
    }
    let prepared = hook::prepare(settings, &mut value, &holder, &request, !plan.no_cgroup)?;
    let lease = engine.acquire(&request, &holder)?;
    let token = lease.token.clone();
    let bind = holder.pid_file.is_none() || !enforces_rules(holder.runtime.as_deref());
    let put = hook::edit(settings, &lease, prepared, &mut value, bind)
        .and_then(|()| Ok(bundle::replace(&path, &value)?))
        .inspect_err(|_| hook::give_back(&engine, &token));
    put.map(|()| Some(token))
}

fn check_options(own: &Own) -> Result<(), Misused> {
    if !own.unknown.is_empty() {
        let unknown = own.unknown.join(", ");
        let valid = "--mig-env, --mig-config, --mig-runtime and --mig-job";
        return Err(Misused(format!("unknown option {unknown}; valid are {valid}")));
    }
    match own.are_wrong() {
        true => {
            Err(Misused("--mig-env and --mig-job exclude each other: a job's containers get what the job has".into()))
        }
        false => Ok(()),
    }
}

/// Annotations win over the environment, which counts only for an entry with `--mig-env`: an image's ENV and a user's
/// `-e` look the same here, so the user must have chosen this runtime by name.
pub(crate) fn requested(environment: bool, settings: &Settings, config: &Value) -> Result<Option<Request>> {
    let annotated = request::from_annotations(hook::annotations(config), hook::container_name(config))?;
    if annotated.is_some() || !environment {
        return Ok(annotated);
    }
    let vars = config.pointer("/process/env").and_then(Value::as_array);
    let environment = request::from_env(vars.into_iter().flatten().filter_map(Value::as_str))?;
    match environment {
        Some(_) if !settings.environment => Err(Refused(
            "requests in the environment are switched off here (requests.environment); use an annotation".into(),
        )
        .into()),
        other => Ok(other),
    }
}

fn holder(plan: &Plan, settings: &Settings, config: &Value) -> Result<Holder> {
    let id = plan.id.as_ref().and_then(|id| id.to_str()).filter(|id| first::plain_name(id));
    let id = id.ok_or_else(|| {
        let given: String = plan.id.clone().unwrap_or_default().to_string_lossy().chars().take(60).collect();
        Refused(format!("the container id {given:?} is not a plain name"))
    })?;
    let absolute = |path: &PathBuf| std::path::absolute(path).ok();
    let mut holder = engine::new_holder(Way::Shim, std::process::id());
    holder.container = Some(id.to_owned());
    holder.bundle = Some(bundle::directory(plan.bundle.as_deref()).context("cannot tell where the bundle is")?);
    holder.runtime_root = plan.root.clone();
    holder.runtime = first::low_level_runtime(plan, settings.runtime.as_deref()).ok();
    holder.pid_file = plan.pid_file.as_ref().and_then(absolute);
    holder.pid_file_before = holder.pid_file.as_deref().and_then(host::pid_file).map(|file| file.stamp);
    hook::describe(&mut holder, config);
    Ok(holder)
}

/// Runtimes that are known to enforce device rules; of others the createRuntime hook looks whether they did.
fn enforces_rules(runtime: Option<&Path>) -> bool {
    let name = runtime.and_then(Path::file_name);
    name.is_some_and(|name| name == "runc" || name == "crun")
}

/// A restore reuses the edited config of a container whose slice is long given back, and GPU state can't be restored.
fn restore(plan: &Plan) -> Result<()> {
    let path = first::config_path(plan);
    let shown = path.display().to_string();
    Err(Refused(format!(
        "{shown} asks for a MIG slice; a checkpointed container can't get its GPU state back, so it is not restored"
    ))
    .into())
}

/// Adds the slice's environment to a process that joins its container: engines build it from the image's.
fn exec(plan: &Plan, settings: &Settings, nvml: &Nvml) -> Result<()> {
    let (Some(file), Some(id)) = (&plan.process, plan.id.as_ref().and_then(|id| id.to_str())) else { return Ok(()) };
    let Some(lease) = Engine::open(settings, nvml)?.lease_of(plan.root.as_deref(), id)? else { return Ok(()) };
    let mut process = bundle::load(file)?;
    edits::set_environment(&mut process, &hook::environment(settings, &lease.uuids(), &lease.profiles()))
        .map_err(Refused)?;
    let config = lease.holder.bundle.as_ref().and_then(|bundle| bundle::load(&bundle.join("config.json")).ok());
    let dirs = config.map_or_else(Vec::new, |config| injection::library_dirs_in(&config));
    edits::prepend_library_path(&mut process, &dirs).map_err(Refused)?;
    Ok(bundle::replace(file, &process)?)
}

/// Deletes by the runtime, then releases if that worked or the container is over anyway: a plain `delete` of a running
/// container fails, and it lives on. Engines call this after every end, also after a failed create, where crun and youki
/// run no poststop hook.
fn delete(plan: &Plan, settings: &Settings, nvml: &Nvml, env: &[OsString], pipe: Sigpipe) -> i32 {
    let low_level = match first::low_level_runtime(plan, settings.runtime.as_deref()) {
        Ok(low_level) => low_level,
        Err(reason) => return refuse(plan, &Refused(reason).into()),
    };
    let taken = leased(plan, settings, nvml);
    // The driver takes milliseconds to open, and the runtime as many to delete.
    let open_driver = || {
        if taken.is_some() {
            let _ = nvml.driver_version();
        }
    };
    let code = match runtime::run(&low_level, &plan.rest, env, pipe, open_driver) {
        Ok(code) => code,
        Err(error) => {
            return refuse(plan, &anyhow::Error::from(error).context(format!("cannot start {}", low_level.display())));
        }
    };
    if let Err(error) = release_after_delete(plan, settings, nvml, code == 0) {
        tracing::error!("after delete: {}", report::sentence(&error));
    }
    code
}

/// Has the poststop hook of a container with a lease leave its end to us.
fn leased(plan: &Plan, settings: &Settings, nvml: &Nvml) -> Option<File> {
    let engine = Engine::open(settings, nvml).ok()?;
    engine.take_end(&engine.lease_of(plan.root.as_deref(), plan.id.as_ref()?.to_str()?).ok()??.token)
}

fn release_after_delete(plan: &Plan, settings: &Settings, nvml: &Nvml, deleted: bool) -> Result<()> {
    let Some(id) = plan.id.as_ref().and_then(|id| id.to_str()) else { return Ok(()) };
    let engine = Engine::open(settings, nvml)?;
    let Some(lease) = engine.lease_of(plan.root.as_deref(), id)? else { return Ok(()) };
    if !deleted && !engine.is_over(&lease) {
        return Ok(());
    }
    match engine.release(&lease.token, Some(id), "its container was deleted")? {
        Released::Busy { reason } => {
            tracing::warn!(token = %lease.token, "the slice is not free yet, the next acquire or migctl gc goes on with it: {reason}")
        }
        outcome => tracing::debug!(token = %lease.token, ?outcome, "delete"),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn plan(line: &str) -> Plan {
        first::plan(line.split_whitespace().map(OsString::from))
    }

    #[test]
    fn the_environment_counts_only_for_an_entry_that_says_so() {
        let config = json!({"process": {"env": ["MIG_PROFILE=1g.10gb"]}});
        let settings = Settings::default();
        assert!(requested(false, &settings, &config).unwrap().is_none());
        assert!(requested(true, &settings, &config).unwrap().is_some());
        let off = Settings { environment: false, ..settings };
        assert!(requested(true, &off, &config).is_err());
    }

    #[test]
    fn an_annotation_wins_over_the_environment() {
        let config = json!({"annotations": {"mig.profile": "2g.20gb"}, "process": {"env": ["MIG_PROFILE=!!"]}});
        let request = requested(true, &Settings::default(), &config).unwrap().unwrap();
        assert_eq!(request.to_string(), "mig.profile=2g.20gb");
    }

    #[test]
    fn an_id_that_is_no_plain_name_is_refused() {
        for id in ["../c1", "a/b", ".."] {
            let error =
                holder(&plan(&format!("create --bundle /b {id}")), &Settings::default(), &json!({})).unwrap_err();
            assert!(error.to_string().contains("not a plain name"), "{error}");
        }
        assert_eq!(
            host::process(std::process::id()),
            holder(&plan("create -b /b c1"), &Settings::default(), &json!({})).unwrap().owner
        );
    }
}
