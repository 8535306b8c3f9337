//! GPUs that are closed to new holders, and who is still on them.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::gpu::Device;
use crate::host;
use crate::lease::{Holder, Lease, State, Way, short};
use crate::names;

use super::{Engine, Failure, audit, init_of, new_holder};

/// A GPU that is closed to new holders.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cordon {
    /// Why, in the administrator's words.
    pub reason: Option<String>,
    /// Milliseconds since 1970.
    pub since_ms: u64,
    /// Login uid of who did it.
    pub uid: Option<u32>,
}

/// By GPU UUID. Kept until the end of the boot.
pub type Cordons = BTreeMap<String, Cordon>;

impl Cordon {
    /// One of this moment, by whoever runs us.
    pub fn now(reason: Option<String>) -> Cordon {
        Cordon { reason, since_ms: host::wall_ms(), uid: host::user(std::process::id()) }
    }

    /// For messages.
    pub fn sentence(&self, device: &Device) -> String {
        let reason = self.reason.as_deref().map(|reason| format!(" ({reason})")).unwrap_or_default();
        format!("{} is cordoned{reason}; migctl uncordon {} opens it again", device.label(), device.index)
    }
}

/// Somebody who is still on a GPU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Occupant {
    /// GPU instances that it has there; empty for a process that has none of its own.
    pub gis: Vec<u32>,
    /// The container, where known.
    pub container: Option<String>,
    /// Who it is in words, where it has a lease.
    pub holder: Option<String>,
    /// Its first process, or the process itself, where known.
    pub pid: Option<u32>,
    /// That process's name.
    pub process: Option<String>,
    /// Has ended, and the driver still calls its slice in use.
    pub releasing: bool,
    /// What ends it, as far as known.
    pub end_with: Option<String>,
}

impl Engine<'_> {
    /// The GPUs that are closed to new holders.
    pub fn cordons(&self) -> Result<Cordons, Failure> {
        Ok(if self.is_outlived()? { Cordons::new() } else { self.store.cordons()? })
    }

    /// Closes a GPU to new holders, or opens it again with `None`. What runs there goes on. False when it was so already; a
    /// new reason replaces the old one.
    pub fn cordon(&self, gpu: &str, cordon: Option<Cordon>) -> Result<bool, Failure> {
        let lock = self.lock_for_change()?;
        let mut cordons = self.cordons()?;
        let reason = cordon.as_ref().and_then(|cordon| cordon.reason.clone());
        let event = if cordon.is_some() { "cordon" } else { "uncordon" };
        let before = cordons.get(gpu).cloned();
        let changed = match (cordon, before) {
            (Some(new), Some(old)) if new.reason.is_none() || new.reason == old.reason => false,
            (Some(new), _) => {
                cordons.insert(gpu.to_owned(), new);
                true
            }
            (None, _) => cordons.remove(gpu).is_some(),
        };
        if changed {
            self.store.put_cordons(&lock, &cordons)?;
            audit(event, &new_holder(Way::Create, std::process::id()), json!({"gpu": gpu, "reason": reason}));
        }
        Ok(changed)
    }

    /// Who is on a GPU, after what has ended there was given back: holders of slices, and processes that the driver lists.
    pub fn occupants(&self, device: &Device) -> Result<Vec<Occupant>, Failure> {
        let lock = self.lock_for_change()?;
        self.look_afresh(&lock);
        let leases = self.leases()?;
        drop(lock);
        let here =
            |lease: &&Lease| lease.state != State::Static && lease.slices.iter().any(|slice| slice.gpu == device.uuid);
        let mut occupants: Vec<Occupant> = leases.iter().filter(here).map(|l| holder(l, &device.uuid)).collect();
        for process in self.gpu.processes(&device.uuid)? {
            let known = occupants
                .iter()
                .any(|o| o.pid == Some(process.pid) || process.instance.is_some_and(|gi| o.gis.contains(&gi)));
            if !known && process.pid != std::process::id() {
                occupants.push(Occupant {
                    gis: process.instance.into_iter().collect(),
                    container: None,
                    holder: None,
                    pid: Some(process.pid),
                    process: Some(host::process_name(process.pid)).filter(|name| !name.is_empty()),
                    releasing: false,
                    end_with: None,
                });
            }
        }
        Ok(occupants)
    }
}

/// What stops a container, where its engine is known; a command, or a job of Slurm's.
pub(super) fn stop_command(holder: &Holder) -> Option<String> {
    if let Some(id) = holder.job.as_deref().and_then(|key| key.strip_prefix("slurm:")?.rsplit_once(':')) {
        return id.1.bytes().all(|b| b.is_ascii_digit()).then(|| format!("scancel {}", id.1));
    }
    if let Some(init) = holder.init.filter(|init| holder.way == Way::Run && host::alive(*init)) {
        return Some(format!("kill {}", init.pid));
    }
    let (bundle, id) = (holder.bundle.as_deref()?, holder.container.as_deref()?);
    let named = names::look_up(bundle, id);
    // It will be copied into a shell: a name that says more there than a name is left out.
    let plain = |name: &&str| name.bytes().all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b));
    let who = named.name.as_deref().filter(plain).unwrap_or(short(id));
    match (named.engine.as_deref()?, named.pod.as_deref().and_then(|pod| pod.split_once('/'))) {
        (_, Some((namespace, pod))) => {
            [namespace, pod].iter().all(plain).then(|| format!("kubectl delete pod -n {namespace} {pod}"))
        }
        (engine @ ("docker" | "podman"), None) => Some(format!("{engine} stop {who}")),
        _ => None,
    }
}

fn holder(lease: &Lease, gpu: &str) -> Occupant {
    let mut gis: Vec<u32> = lease.slices.iter().filter(|slice| slice.gpu == gpu).filter_map(|slice| slice.gi).collect();
    gis.dedup();
    let init = init_of(&lease.holder).filter(|init| host::alive(*init));
    Occupant {
        gis,
        container: lease.holder.container.clone(),
        holder: Some(lease.held_by()),
        pid: init.map(|init| init.pid),
        process: init.map(|init| host::process_name(init.pid)).filter(|name| !name.is_empty()),
        releasing: lease.state == State::Releasing,
        end_with: stop_command(&lease.holder),
    }
}
