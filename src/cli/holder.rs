//! Who has a slice, as documents and tables show it.

use serde::Serialize;

use crate::engine;
use crate::host;
use crate::lease::{Lease, State, Way};
use crate::names::{self, Named};

/// Who has a slice, or what keeps it. All of it is null for a slice that nobody told us of.
#[derive(Debug, Clone, Default, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(super) struct Holder {
    /// The lease that it belongs to.
    pub token: Option<String>,
    /// How the lease came to be.
    pub way: Option<Way>,
    /// Who has it, in words for people: `trainer (docker)`, `kept for alice`.
    pub holder: Option<String>,
    /// Id of the container that has it, where known.
    pub container: Option<String>,
    /// What its engine calls that container.
    pub name: Option<String>,
    /// Its pod in Kubernetes, as `NAMESPACE/POD`.
    pub pod: Option<String>,
    /// Its engine: `docker`, `podman`, `containerd`, `cri-o`.
    pub engine: Option<String>,
    /// Its image, where the engine tells it.
    pub image: Option<String>,
    /// Key of the job that has it, as `slurm:CLUSTER:ID`.
    pub job: Option<String>,
    /// Its first process; of a job any that lives.
    pub pid: Option<u32>,
    /// Login uid of who started it, or cut the slice; the user of a job.
    pub uid: Option<u32>,
    /// The name of that user, where this machine knows it.
    pub user: Option<String>,
    /// Of a kept slice: the only user whose containers get it.
    pub reserved_for: Option<u32>,
    /// Milliseconds since the lease was made.
    pub held_ms: Option<u64>,
}

impl Holder {
    /// What is recorded, and what the engines' files and the users' database add to it.
    pub fn of(lease: &Lease) -> Holder {
        let known = &lease.holder;
        let named = match (&known.bundle, &known.container) {
            (Some(bundle), Some(container)) => names::look_up(bundle, container),
            _ => Named::default(),
        };
        Holder {
            token: Some(lease.token.clone()),
            way: Some(known.way),
            holder: Some(sentence(lease, &named)),
            container: known.container.clone(),
            image: known.image.clone(),
            job: known.job.clone(),
            pid: engine::init_of(known).map(|init| init.pid),
            uid: known.uid,
            user: known.uid.and_then(host::user_name),
            reserved_for: lease.reserved_for,
            held_ms: Some(host::boot_ms().saturating_sub(lease.created_boot_ms)),
            name: named.name,
            pod: named.pod,
            engine: named.engine,
        }
    }

    /// `pid 4242, alice, 3h05m`.
    pub fn details(&self) -> String {
        let pid = self.pid.map(|pid| format!("pid {pid}"));
        let user = self.user.clone().or(self.uid.map(|uid| format!("uid {uid}")));
        [pid, user, self.held_ms.map(super::duration)].into_iter().flatten().collect::<Vec<_>>().join(", ")
    }
}

fn sentence(lease: &Lease, named: &Named) -> String {
    if lease.state == State::Static {
        let whom = lease.reserved_for.map(|uid| host::user_name(uid).unwrap_or_else(|| format!("uid {uid}")));
        return whom.map_or_else(|| "kept for anybody".to_owned(), |whom| format!("kept for {whom}"));
    }
    if lease.state == State::Idle {
        let watched = lease.reason.as_ref().map(|watched| format!(": {watched}"));
        return format!("idle, for the next of its profile{}", watched.unwrap_or_default());
    }
    called(named, lease.held_by())
}

/// `trainer (docker)`, or what it is called without an engine's files.
pub(super) fn called(named: &Named, otherwise: String) -> String {
    let called = [named.pod.as_deref(), named.name.as_deref()].into_iter().flatten().collect::<Vec<_>>().join("/");
    let who = if called.is_empty() { otherwise } else { called };
    match &named.engine {
        Some(engine) => format!("{who} ({engine})"),
        None => who,
    }
}
