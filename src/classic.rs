//! The classic hook: createRuntime (or prestart) and poststop as an administrator or a CDI spec registers them, for engines
//! that let nobody edit the config. There is no token in the config: the lease is found by the container's id and bundle.

use std::path::Path;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::bundle;
use crate::config::Settings;
use crate::container::{Cgroup, Live, Node};
use crate::edits;
use crate::engine::{self, Binding, Engine, Failure};
use crate::first;
use crate::gpu::nvml::Nvml;
use crate::hook;
use crate::host::{self, Majors};
use crate::lease::{Holder, Lease, Slice, Way};
use crate::report::{self, Refused};
use crate::request;

/// Takes what a container asks for while its runtime creates it, and puts it into the container. `slice`: a CDI spec's hook
/// takes just this one, whose nodes are in the config already.
pub(crate) fn create(settings: &Settings, slice: Option<&str>) -> Result<()> {
    let state = hook::state()?;
    let holder = holder(&hook::binding(&state)?, &state.value, way(slice))?;
    let asked = match slice {
        Some(uuid) => request::from_annotations([("mig.uuid", uuid)].into_iter(), None),
        None if hook::is_sandbox(&state.value) => Ok(None),
        None => request::from_annotations(hook::annotations(&state.value), hook::container_name(&state.value)),
    };
    let asked = asked.inspect_err(|error| engine::audit_refusal(&holder, None, &error.to_string()));
    let Some(request) = asked? else { return Ok(()) };
    let nvml = Nvml::at(&settings.nvml);
    let engine = Engine::open(settings, &nvml)?;
    let held = engine.leases_of_hooks(way(slice), &state.id, state.bundle.as_deref())?;
    // Where precreate or the shim edited the config, its container is served already; and where this hook was registered
    // for createRuntime and prestart, by its first call.
    if slice.is_none() {
        if let Some(token) = edits::marked(&state.value).filter(|token| first::plain_name(token))
            && engine.serves(token, &state.id)?
        {
            return Ok(());
        }
        if held.iter().any(|lease| lease.holder.init == holder.init) {
            return Ok(());
        }
    }
    if !held.is_empty() {
        engine.bury_former_life(&holder)?;
    }
    let site = match slice {
        Some(_) => None,
        None => Some(Site::of(settings, &holder).inspect_err(|error| {
            engine::audit_refusal(&holder, Some(&request), &report::sentence(error));
        })?),
    };
    let lease = engine.acquire(&request, &holder)?;
    let given = site.map_or(Ok(()), |site| site.give(settings, &lease));
    let fit = slice.map_or(Ok(()), |uuid| check(settings, &engine, &holder, uuid)).inspect_err(|error| {
        engine::audit_refusal(&holder, Some(&request), &report::sentence(error));
    });
    given.and(fit).inspect_err(|_| hook::give_back(&engine, &lease.token))
}

/// Refuses a container that would reach more than the slices that `--device` gave it, which the engine has written into its
/// config already. One hook runs for each of them; the last one looks, when all are held.
fn check(settings: &Settings, engine: &Engine, holder: &Holder, slice: &str) -> Result<()> {
    let bundle = holder.bundle.as_deref().unwrap_or(Path::new("."));
    let mut config = bundle::load(&bundle.join("config.json"))?;
    if edits::claimed(&config).last().is_some_and(|last| *last != slice) {
        return Ok(());
    }
    let container = holder.container.as_deref().unwrap_or_default();
    let held: Vec<Slice> =
        engine.leases_of_hooks(Way::Cdi, container, Some(bundle))?.into_iter().flat_map(|lease| lease.slices).collect();
    let limit = settings.slices_per_container;
    if held.len() > limit as usize {
        return Err(Refused(format!(
            "the container was given {} slices; limits.slices_per_container allows {limit}",
            held.len()
        ))
        .into());
    }
    let host = engine::host_of(settings);
    let majors = host.majors()?;
    let nodes = engine::nodes_of(&host, &held, majors);
    hook::check_modes(settings, &nodes)?;
    edits::drop_rules_of(&mut config, &nodes);
    let named = config.pointer("/linux/cgroupsPath").is_some_and(Value::is_string);
    hook::check_dev(&config, Some(bundle))?;
    hook::check_rules(settings, &config, majors, named || holder.cgroup.is_some())?;
    holder.init.map_or(Ok(()), |init| hook::check_live_rules(settings, init.pid))
}

/// Releases what this very container took by such hooks. May come twice, or for a container that never asked.
pub(crate) fn end(settings: &Settings, slice: Option<&str>) -> Result<()> {
    let state = hook::state()?;
    let nvml = Nvml::at(&settings.nvml);
    let engine = Engine::open(settings, &nvml)?;
    for lease in engine.leases_of_hooks(way(slice), &state.id, state.bundle.as_deref())? {
        // Ids and bundles come again: the one whose first process lives is of another life.
        let over = !lease.holder.init.is_some_and(host::alive);
        if over && slice.is_none_or(|uuid| lease.uuids() == uuid) {
            hook::release(&engine, &lease.token, &state.id)?;
        }
    }
    Ok(())
}

fn way(slice: Option<&str>) -> Way {
    if slice.is_some() { Way::Cdi } else { Way::Classic }
}

/// A holder that is bound from the start: its first process exists when the hook runs.
fn holder(binding: &Binding, state: &Value, way: Way) -> Result<Holder> {
    let owner = host::parent(std::process::id()).context("cannot tell which process runs this hook")?;
    let mut holder = engine::new_holder(way, owner);
    hook::describe(&mut holder, state);
    engine::bind(&mut holder, binding);
    Ok(holder)
}

/// Where a container's slices go: looked at, and found fit, before anything is acquired.
struct Site {
    live: Live,
    cgroup: Cgroup,
    majors: Majors,
}

impl Site {
    fn of(settings: &Settings, holder: &Holder) -> Result<Site> {
        if settings.rootless.is_some() {
            return Err(Refused(
                "without root no node can be made in a container; register podman's precreate hook instead".into(),
            )
            .into());
        }
        let bundle = holder.bundle.as_deref().ok_or_else(|| {
            Refused("the runtime does not say where the container's bundle is (crun before 1.27); update it".into())
        })?;
        let path = bundle.join("config.json");
        let config = bundle::load(&path)?;
        hook::check_dev(&config, Some(bundle))?;
        let majors = engine::host_of(settings).majors()?;
        // Not stripped: what the config allows is allowed by now.
        hook::check_rules(settings, &config, majors, true)?;
        let init =
            holder.init.ok_or_else(|| Failure::BadRequest("the pid in the State is of no living process".into()))?;
        let text = |at: &str| config.pointer(at).and_then(Value::as_str);
        let no_root = || Failure::BadRequest(format!("{} has no root.path", path.display()));
        let root = text("/root/path").ok_or_else(no_root)?;
        let live = Live::of(init.pid, &bundle.join(root), edits::has_tmpfs(&config, "/run"))?;
        let cgroup = Cgroup::of(init.pid, text("/linux/cgroupsPath"))?;
        if let Some(why) = cgroup.open()?.filter(|_| !settings.open_device_rules) {
            return Err(Refused(hook::open_sentence(&why)).into());
        }
        // Alive before and after, so the files looked at in between were its own.
        if !host::alive(init) {
            return Err(Failure::BadRequest("the container's first process has ended".into()).into());
        }
        Ok(Site { live, cgroup, majors })
    }

    /// Nodes, then what tells the container its slices, then the rules that open the nodes.
    fn give(&self, settings: &Settings, lease: &Lease) -> Result<()> {
        let nodes: Vec<Node> = engine::nodes_of(&engine::host_of(settings), &lease.slices, self.majors)
            .into_iter()
            .map(live_node)
            .collect();
        self.live.make_nodes(&nodes)?;
        let environment = hook::environment(settings, &lease.uuids(), &lease.profiles());
        let uuids = lease.uuids().replace(',', "\n") + "\n";
        self.live.tell(&[("uuids", uuids), ("environment", environment.join("\n") + "\n")])?;
        Ok(self.cgroup.allow(&nodes)?)
    }
}

fn live_node(node: edits::Node) -> Node {
    let edits::Node { name, major, minor, mode } = node;
    Node { path: name, major, minor, mode: mode.mode, uid: mode.uid, gid: mode.gid }
}
