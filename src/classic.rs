//! The classic hook: createRuntime (or prestart) and poststop as an administrator or a CDI spec registers them, for engines
//! that let nobody edit the config. There is no token in the config: the lease is found by the container's id and bundle.

use anyhow::{Context, Result};
use serde_json::Value;

use crate::config::Settings;
use crate::edits;
use crate::engine::{self, Binding, Engine};
use crate::gpu::nvml::Nvml;
use crate::hook::{self, State};
use crate::host;
use crate::lease::{Holder, Way};
use crate::request;

/// Takes what a container asks for while its runtime creates it. `slice`: a CDI spec's hook takes just this one, whose nodes
/// are in the config already.
pub(crate) fn create(settings: &Settings, slice: Option<&str>) -> Result<()> {
    let state = hook::state()?;
    let holder = holder(hook::binding(&state)?, &state.value, way(slice))?;
    let asked = match slice {
        Some(uuid) => request::from_annotations([("mig.uuid", uuid)].into_iter(), None),
        None if hook::is_sandbox(&state.value) => Ok(None),
        None => request::from_annotations(hook::annotations(&state.value), hook::container_name(&state.value)),
    };
    let asked = asked.inspect_err(|error| engine::audit_refusal(&holder, None, &error.to_string()));
    let Some(request) = asked? else { return Ok(()) };
    let nvml = Nvml::at(&settings.nvml);
    let engine = Engine::open(settings, &nvml)?;
    // Where precreate or the shim edited the config, its container is served already.
    if slice.is_none()
        && let Some(token) = edits::marked(&state.value)
        && engine.serves(token, &state.id)?
    {
        return Ok(());
    }
    engine.acquire(&request, &holder)?;
    Ok(())
}

/// Releases what this very container took by such hooks. May come twice, or for a container that never asked.
pub(crate) fn end(settings: &Settings, slice: Option<&str>) -> Result<()> {
    let state: State = hook::state()?;
    let nvml = Nvml::at(&settings.nvml);
    let engine = Engine::open(settings, &nvml)?;
    for lease in engine.leases_of_hooks(way(slice), &state.id, state.bundle.as_deref())? {
        if slice.is_none_or(|uuid| lease.uuids() == uuid) {
            hook::release(&engine, &lease.token, &state.id)?;
        }
    }
    Ok(())
}

fn way(slice: Option<&str>) -> Way {
    if slice.is_some() { Way::Cdi } else { Way::Classic }
}

/// A holder that is bound from the start: its first process exists when the hook runs.
fn holder(binding: Binding, state: &Value, way: Way) -> Result<Holder> {
    let owner = host::parent(std::process::id()).context("cannot tell which process runs this hook")?;
    let mut holder = engine::new_holder(way, owner);
    hook::describe(&mut holder, state);
    holder.container = Some(binding.container);
    holder.init = host::process(binding.pid);
    holder.cgroup = host::own_cgroup(binding.pid);
    holder.bundle = binding.bundle;
    holder.runtime_root = binding.runtime_root;
    holder.runtime = binding.runtime;
    Ok(holder)
}
