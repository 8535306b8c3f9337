//! Our record that a holder has slices, and what is to become of it. Pure: facts come in, a verdict goes out.
//!
//! On disk: `leases/<token>.json`, described field by field in docs/state.md.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::gpu::{ComputeInstance, Device, Instance, Placement, Profile, ProfileId};
use crate::host::{Capability, ProcessId};

/// Version of the record. Another one on disk is refused and left alone.
pub const VERSION: u64 = 1;
/// Milliseconds after which a slice whose container never bound it is freed, even if its owner lives on (podman as a
/// service does). A later createRuntime with that token fails.
pub const UNBOUND_LIMIT_MS: u64 = 120_000;
/// Milliseconds for which a job of which no process was seen yet is taken for one that its batch system is about to start:
/// other prologs may take their time (Slurm's own limit, PrologEpilogTimeout, is off by default).
pub const JOB_START_LIMIT_MS: u64 = 600_000;
/// Milliseconds between the two looks that must both find the bundle of a never-started container gone.
pub const ORPHAN_WAIT_MS: u64 = 60_000;

/// One lease.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Lease {
    /// Of the record: [`VERSION`].
    pub version: u64,
    /// Its name: 128 random bits as hex.
    pub token: String,
    /// Where it stands.
    pub state: State,
    /// Why it stands there, for Releasing and Quarantined. Of an Idle one: what keeps it from being destroyed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Milliseconds since boot when it was written first.
    pub created_boot_ms: u64,
    /// Milliseconds since 1970 when it was written first.
    pub created_ms: u64,
    /// Milliseconds since boot when it became Active: only what was granted is released in the audit's sense.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub granted_boot_ms: Option<u64>,
    /// Milliseconds since 1970 when its end was noticed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended_ms: Option<u64>,
    /// Who has it.
    pub holder: Holder,
    /// Of an Idle one: milliseconds since boot when it is destroyed, if nobody has asked for its profile by then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idle_until_boot_ms: Option<u64>,
    /// Of a Static one: the only user whose containers get it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reserved_for: Option<u32>,
    /// What it has, in the order asked.
    pub slices: Vec<Slice>,
}

/// States of a lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// Written before the GPU is touched. One that nobody has claimed is a dead process's.
    Pending,
    /// Every slice is whole.
    Active,
    /// Kept for whoever asks: cut by migctl, or given to it. A container that gets it has a lease of its own, and leaves it
    /// as it was. Only migctl ends it.
    Static,
    /// What an ended holder had, kept for a while for the next one who asks for its profile (`slices.idle_ttl`). It goes as
    /// soon as its room is needed.
    Idle,
    /// On its way out: to be destroyed as soon as the driver lets us.
    Releasing,
    /// Neither usable nor surely ours to destroy; nothing is placed there until it is resolved.
    Quarantined,
}

/// Which way in made the lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum Way {
    /// podman's precreate: the owner is podman, a createRuntime hook binds the container.
    Precreate,
    /// The runtime shim: the owner is the process that becomes the runtime.
    Shim,
    /// A createRuntime hook that puts the slice into the container itself. Bound from the start.
    Classic,
    /// A createRuntime hook of our CDI spec: the slice was named by `--device`. Bound from the start.
    Cdi,
    /// `migctl` cut it, for nobody yet.
    Create,
    /// `migctl adopt` was given it: it was there before us.
    Adopt,
    /// `migctl run`: a command and its descendants.
    Run,
    /// `migctl job start`, and Slurm's Prolog: a job of a batch system.
    Job,
}

impl Way {
    /// Whether processes of the host have the slice, and no container: nothing of ours is called when they end, and they
    /// may leave some behind that still have it.
    pub fn is_bare(self) -> bool {
        matches!(self, Way::Run | Way::Job)
    }
}

/// The container, process or job, as far as it is known yet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Holder {
    /// How it came.
    pub way: Way,
    /// Container id; unknown at precreate.
    pub container: Option<String>,
    /// Bundle directory.
    pub bundle: Option<PathBuf>,
    /// `--root` of the runtime.
    pub runtime_root: Option<PathBuf>,
    /// The low-level runtime's program.
    pub runtime: Option<PathBuf>,
    /// Where the runtime will write the pid of init.
    pub pid_file: Option<PathBuf>,
    /// Stamp of a file that lay there before, from another container: it says nothing about this one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pid_file_before: Option<String>,
    /// The process on whose behalf it was made.
    pub owner: Option<ProcessId>,
    /// The container's first process, once known. Of a job or a command: one of its processes that was alive when last
    /// looked at.
    pub init: Option<ProcessId>,
    /// Its cgroup in the hierarchy of the device rules; the end of that path until init is known.
    pub cgroup: Option<String>,
    /// Mount namespace of the runtime, as `mnt:[N]`.
    pub mount_namespace: Option<String>,
    /// Image name, where the engine tells it.
    pub image: Option<String>,
    /// Login uid of the owner; the user of a job.
    pub uid: Option<u32>,
    /// Of a job: its key, as `slurm:CLUSTER:ID`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub job: Option<String>,
    /// Of a job: the beginning of the command line of those processes of root that stand for it (`slurmstepd: [15.`), where
    /// it has no cgroup.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sign: Option<String>,
    /// Of a command: its program's name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub command: Option<String>,
    /// Milliseconds since boot when the bundle was first found missing while init lived.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bundle_missing_boot_ms: Option<u64>,
}

/// What was done to the GPU last: written immediately before each driver call, so that recovery knows what may exist.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum Step {
    /// Nothing yet.
    Planned,
    /// The GPU instance is about to be created.
    CreatingInstance,
    /// It exists; the compute instance is about to be created.
    CreatingCompute,
    /// Both exist.
    Whole,
    /// The compute instance is about to be destroyed.
    DestroyingCompute,
    /// It is gone; the GPU instance is about to be destroyed.
    DestroyingInstance,
    /// Nothing is left.
    Gone,
}

/// One slice of a lease. Identity is lease, GPU instance, placement and UUID together: ids and UUIDs come again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Slice {
    /// `GPU-…` of the parent.
    pub gpu: String,
    /// Its NVML index at the time, for people.
    pub gpu_index: u32,
    /// Its minor.
    pub gpu_minor: u32,
    /// Profile, as the driver numbers it.
    pub profile: ProfileId,
    /// Profile, as the driver names it.
    pub profile_name: String,
    /// Memory of the profile in MiB.
    pub memory_mib: u64,
    /// Where it sits.
    pub placement: Placement,
    /// False for a slice that this lease did not cut: its end destroys nothing.
    pub ours: bool,
    /// Compute slices of its compute instance, where that has not all of the GPU instance (the 1 of `1c.3g.40gb`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub compute_slices: Option<u32>,
    /// What was done last.
    pub step: Step,
    /// GPU-instance id.
    pub gi: Option<u32>,
    /// Compute-instance id.
    pub ci: Option<u32>,
    /// `MIG-…`.
    pub uuid: Option<String>,
    /// Minor of the GPU instance's capability.
    pub gi_minor: Option<u32>,
    /// Minor of the compute instance's capability.
    pub ci_minor: Option<u32>,
}

impl Holder {
    /// Nothing known but the way.
    pub fn new(way: Way) -> Holder {
        Holder {
            way,
            container: None,
            bundle: None,
            runtime_root: None,
            runtime: None,
            pid_file: None,
            pid_file_before: None,
            owner: None,
            init: None,
            cgroup: None,
            mount_namespace: None,
            image: None,
            uid: None,
            job: None,
            sign: None,
            command: None,
            bundle_missing_boot_ms: None,
        }
    }

    /// Who it is, for messages: `container 3f0a…`, `job slurm:mini:15`, `train.py (process 4242)`. `None`: not known yet.
    pub fn name(&self) -> Option<String> {
        if let Some(id) = &self.container {
            return Some(format!("container {}", short(id)));
        }
        if let Some(key) = &self.job {
            return Some(format!("job {key}"));
        }
        let process = self.init.or(self.owner).filter(|_| self.way == Way::Run)?;
        let command = self.command.as_deref().unwrap_or("a command");
        Some(format!("{command} (process {})", process.pid))
    }

    /// Whether it can be seen that a job is alive. What nobody could see ends only when it is said.
    pub fn is_observable(&self) -> bool {
        self.init.is_some() || self.cgroup.is_some() || self.sign.is_some()
    }

    /// Who is about to have it, for messages: its name, or `a container being created`.
    pub fn name_of_beginner(&self) -> String {
        self.name().unwrap_or_else(|| "a container being created".into())
    }
}

impl Slice {
    /// Its capabilities, as far as they are known.
    pub fn capabilities(&self) -> Vec<Capability> {
        let of = |minor: Option<u32>, ci| Some(Capability { minor: minor?, gpu: self.gpu_minor, gi: self.gi?, ci });
        let compute = self.ci.and_then(|ci| of(self.ci_minor, Some(ci)));
        of(self.gi_minor, None).into_iter().chain(compute).collect()
    }

    /// One that is to be cut.
    pub fn planned(device: &Device, profile: &Profile, placement: Placement) -> Slice {
        Slice {
            gpu: device.uuid.clone(),
            gpu_index: device.index,
            gpu_minor: device.minor,
            profile: profile.id,
            profile_name: profile.name.clone(),
            memory_mib: profile.memory_mib,
            placement,
            ours: true,
            compute_slices: None,
            step: Step::Planned,
            gi: None,
            ci: None,
            uuid: None,
            gi_minor: None,
            ci_minor: None,
        }
    }

    /// One that is there. `None` for a profile that the GPU does not list.
    pub fn located(device: &Device, instance: &Instance, compute: &ComputeInstance) -> Option<Slice> {
        let profile = device.profile(instance.profile)?;
        let planned = Slice::planned(device, profile, instance.placement);
        let (gi, ci, uuid) = (Some(instance.id), Some(compute.id), Some(compute.uuid.clone()));
        let slice = Slice { ours: false, step: Step::Whole, gi, ci, uuid, ..planned };
        Some(slice.with_compute((compute.slices < profile.slices).then_some(compute.slices)))
    }

    /// The same with a compute instance of only that many compute slices.
    pub fn with_compute(self, slices: Option<u32>) -> Slice {
        let profile_name = match slices {
            Some(slices) => format!("{slices}c.{}", self.profile_name),
            None => self.profile_name,
        };
        Slice { compute_slices: slices, profile_name, ..self }
    }

    /// Whether another slice lies in the same GPU instance.
    pub fn shares(&self, other: &Slice) -> bool {
        self.gpu == other.gpu && self.placement == other.placement && self.placement != Placement::UNKNOWN
    }

    /// Whether it lies where that instance of a GPU is.
    pub fn is_at(&self, gpu: &str, instance: &Instance) -> bool {
        let same = match [self.placement, instance.placement].contains(&Placement::UNKNOWN) {
            true => self.gi == Some(instance.id),
            false => self.placement == instance.placement,
        };
        self.gpu == gpu && same
    }
}

impl Lease {
    /// UUIDs of its slices, comma-separated.
    pub fn uuids(&self) -> String {
        self.slices.iter().filter_map(|s| s.uuid.as_deref()).collect::<Vec<_>>().join(",")
    }

    /// Profile names of its slices, comma-separated.
    pub fn profiles(&self) -> String {
        self.slices.iter().map(|s| s.profile_name.as_str()).collect::<Vec<_>>().join(",")
    }

    /// Capability minors of its slices: nobody else may have them while the holder lives.
    pub fn minors(&self) -> impl Iterator<Item = u32> + '_ {
        self.slices.iter().flat_map(|s| [s.gi_minor, s.ci_minor]).flatten()
    }

    /// Whether its slices are nobody's, and there for whoever asks.
    pub fn is_spare(&self) -> bool {
        matches!(self.state, State::Static | State::Idle)
    }

    /// Whether it goes as soon as its room is needed: idle, and nothing was in the way of destroying it.
    pub fn may_be_evicted(&self) -> bool {
        self.state == State::Idle && self.reason.is_none()
    }

    /// Whether one of its slices lies where that instance of a GPU is.
    pub fn is_at(&self, gpu: &str, instance: &Instance) -> bool {
        self.slices.iter().any(|slice| slice.is_at(gpu, instance))
    }

    /// Whether one that it cut lies there.
    pub fn has_cut(&self, gpu: &str, instance: &Instance) -> bool {
        self.slices.iter().any(|slice| slice.ours && slice.is_at(gpu, instance))
    }

    /// Who holds it, for messages: `container 3f0a…` or `a container being created`.
    pub fn held_by(&self) -> String {
        match (self.holder.name(), self.state) {
            (Some(name), _) => name,
            (None, State::Static) => "migctl".into(),
            (None, State::Idle) => "nobody (idle)".into(),
            (None, State::Pending | State::Active) => self.holder.name_of_beginner(),
            (None, State::Releasing | State::Quarantined) => "a container that has ended".into(),
        }
    }
}

/// The first twelve characters of an engine's container id, as engines show it.
pub fn short(id: &str) -> &str {
    match id.len() >= 32 && id.bytes().all(|b| b.is_ascii_hexdigit()) {
        true => &id[..12],
        false => id,
    }
}

/// What is known about a container's first process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Init {
    /// No pid is known: not bound, no pid file.
    Unknown,
    /// That very process lives.
    Alive,
    /// It is gone, or a zombie.
    Dead,
}

/// What the outside world says about a lease.
#[derive(Debug, Clone, Copy)]
pub struct Facts {
    /// A poststop hook has announced the end.
    pub announced: bool,
    /// The process that asked is alive.
    pub owner_alive: bool,
    /// The container's first process.
    pub init: Init,
    /// A living process is in the cgroup, has one of the minors open, or is of the tree of `migctl run`.
    pub held: bool,
    /// The bundle directory is there.
    pub bundle_exists: bool,
    /// Milliseconds since the lease was made.
    pub age_ms: u64,
    /// A process is at work on it: cutting or destroying what it has.
    pub claimed: bool,
    /// Whether the time is over for which it was to be kept idle.
    pub idle_is_over: bool,
}

/// What to do with a lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Leave it.
    Keep(&'static str),
    /// Leave it: somebody is about to free it.
    UnderWay(&'static str),
    /// Free its slices.
    Free(&'static str),
    /// Its container was created, never started, and can't be any more: delete it if the runtime agrees, then free.
    Orphan,
}

/// Decides by the table of docs/architecture.md.
pub fn verdict(lease: &Lease, facts: Facts) -> Verdict {
    match lease.state {
        State::Pending if facts.claimed => return Verdict::Keep("it is being cut"),
        State::Releasing if facts.claimed => return Verdict::UnderWay("it is being destroyed"),
        State::Pending => return Verdict::Free("the process that was cutting it died"),
        State::Releasing => return Verdict::Free("its holder has ended"),
        State::Quarantined if facts.held || facts.init == Init::Alive => {
            return Verdict::Keep("quarantined, and still held by a process");
        }
        // Its create may be under way: the container that comes of it has these minors.
        State::Quarantined if facts.init == Init::Unknown && is_awaited(lease, facts) => {
            return Verdict::Keep("quarantined, and its holder is being started");
        }
        State::Quarantined => return Verdict::Free("quarantined, and nothing holds it any more"),
        State::Static => return Verdict::Keep("kept until migctl destroys it"),
        State::Idle if facts.idle_is_over && lease.reason.is_some() => {
            return Verdict::Free("only a program that watches it kept it");
        }
        State::Idle if facts.idle_is_over => return Verdict::Free("idle for as long as slices.idle_ttl says"),
        State::Idle => return Verdict::Keep("idle, for the next one who asks for its profile"),
        State::Active if facts.announced => return Verdict::Free("its holder has ended"),
        State::Active => {}
    }
    match lease.holder.way {
        Way::Run => of_command(facts),
        Way::Job => of_job(lease, facts),
        _ => of_container(lease, facts),
    }
}

fn of_command(facts: Facts) -> Verdict {
    match facts.init {
        Init::Alive => Verdict::Keep("its command is running"),
        _ if facts.owner_alive => Verdict::Keep("its command is running"),
        _ if facts.held => Verdict::Keep("a process that its command has left behind is alive"),
        _ => Verdict::Free("its command has ended"),
    }
}

fn of_job(lease: &Lease, facts: Facts) -> Verdict {
    match facts.init {
        Init::Alive => Verdict::Keep("its job is running"),
        _ if facts.held => Verdict::Keep("its job has ended, but a process still has its devices open"),
        Init::Dead => Verdict::Free("its job has ended"),
        Init::Unknown if !lease.holder.is_observable() => Verdict::Keep("kept until migctl job end"),
        Init::Unknown if facts.age_ms <= JOB_START_LIMIT_MS => Verdict::Keep("its job is being started"),
        Init::Unknown => Verdict::Free("no process of its job was seen for 10 minutes"),
    }
}

fn of_container(lease: &Lease, facts: Facts) -> Verdict {
    match facts.init {
        Init::Alive if facts.bundle_exists || facts.owner_alive => Verdict::Keep("its container is alive"),
        Init::Alive => Verdict::Orphan,
        Init::Dead if facts.held => {
            Verdict::Keep("init is dead, but a process of its cgroup or with its devices open lives")
        }
        Init::Dead => Verdict::Free("its container is gone"),
        Init::Unknown if is_awaited(lease, facts) => Verdict::Keep("its container is being created"),
        Init::Unknown if facts.owner_alive => Verdict::Free("no container was started with it for 120 s"),
        Init::Unknown => Verdict::Free("the process that asked for it died before a container was started"),
    }
}

/// Whether a container may yet come of a lease that has none. The owner of a shim's lease becomes the runtime itself: while
/// it lives, `create` is under way.
fn is_awaited(lease: &Lease, facts: Facts) -> bool {
    match lease.holder.way {
        Way::Shim | Way::Run => facts.owner_alive,
        Way::Job => !lease.holder.is_observable() || facts.age_ms <= JOB_START_LIMIT_MS,
        _ => facts.owner_alive && facts.age_ms <= UNBOUND_LIMIT_MS,
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn lease(state: State, way: Way) -> Lease {
        let holder = Holder::new(way);
        let (token, created_boot_ms, created_ms) = ("t".to_owned(), 0, 0);
        Lease {
            version: VERSION,
            token,
            state,
            reason: None,
            created_boot_ms,
            created_ms,
            granted_boot_ms: None,
            ended_ms: None,
            idle_until_boot_ms: None,
            holder,
            reserved_for: None,
            slices: vec![],
        }
    }

    #[test]
    fn a_slice_is_where_its_placement_or_else_its_id_says() {
        let (here, there) = (Placement { start: 0, size: 1 }, Placement { start: 1, size: 1 });
        let instance = |id, placement| Instance { id, profile: ProfileId(19), placement, compute: vec![] };
        let slice = |placement, gi| Slice {
            gpu: "GPU-a".into(),
            gpu_index: 0,
            gpu_minor: 0,
            profile: ProfileId(19),
            profile_name: "1g.10gb".into(),
            memory_mib: 0,
            placement,
            ours: true,
            compute_slices: None,
            step: Step::Whole,
            gi,
            ci: None,
            uuid: None,
            gi_minor: None,
            ci_minor: None,
        };
        assert!(slice(here, None).is_at("GPU-a", &instance(7, here)));
        assert!(!slice(here, Some(7)).is_at("GPU-a", &instance(7, there)));
        assert!(!slice(here, None).is_at("GPU-b", &instance(7, here)));
        for (kept, seen) in [(Placement::UNKNOWN, here), (here, Placement::UNKNOWN)] {
            assert!(slice(kept, Some(7)).is_at("GPU-a", &instance(7, seen)));
            assert!(!slice(kept, Some(8)).is_at("GPU-a", &instance(7, seen)));
        }
    }

    #[test]
    fn the_table_of_verdicts() {
        use Init::{Alive, Dead, Unknown};
        let facts = |announced, owner_alive, init, held, bundle_exists, age_ms| Facts {
            announced,
            owner_alive,
            init,
            held,
            bundle_exists,
            age_ms,
            claimed: false,
            idle_is_over: age_ms > 60_000,
        };
        let cases = [
            // state, way, announced, owner, init, held, bundle, age → K(eep), F(ree), O(rphan)
            (State::Pending, Way::Precreate, false, true, Unknown, false, true, 0, 'F'),
            (State::Releasing, Way::Precreate, false, true, Alive, true, true, 0, 'F'),
            (State::Static, Way::Create, true, false, Unknown, true, true, 999_999, 'K'),
            (State::Idle, Way::Shim, false, false, Unknown, false, true, 60_000, 'K'),
            (State::Idle, Way::Shim, false, false, Unknown, false, true, 60_001, 'F'),
            (State::Quarantined, Way::Shim, true, false, Dead, true, true, 0, 'K'),
            (State::Quarantined, Way::Shim, false, false, Alive, false, true, 0, 'K'),
            (State::Quarantined, Way::Shim, false, false, Dead, false, true, 0, 'F'),
            (State::Quarantined, Way::Shim, false, true, Unknown, false, true, 999_999, 'K'),
            (State::Quarantined, Way::Precreate, false, true, Unknown, false, true, 120_000, 'K'),
            (State::Quarantined, Way::Precreate, false, true, Unknown, false, true, 120_001, 'F'),
            (State::Quarantined, Way::Shim, false, false, Unknown, false, true, 0, 'F'),
            (State::Active, Way::Precreate, true, true, Alive, true, true, 0, 'F'),
            (State::Active, Way::Precreate, false, false, Alive, true, true, 999_999, 'K'),
            (State::Active, Way::Precreate, false, true, Alive, true, false, 0, 'K'),
            (State::Active, Way::Precreate, false, false, Alive, true, false, 0, 'O'),
            (State::Active, Way::Shim, false, false, Dead, true, true, 0, 'K'),
            (State::Active, Way::Shim, false, false, Dead, false, true, 0, 'F'),
            (State::Active, Way::Precreate, false, true, Unknown, false, true, 120_000, 'K'),
            (State::Active, Way::Precreate, false, true, Unknown, false, true, 120_001, 'F'),
            (State::Active, Way::Shim, false, true, Unknown, false, true, 120_001, 'K'),
            (State::Active, Way::Precreate, false, false, Unknown, false, true, 0, 'F'),
            (State::Active, Way::Shim, false, false, Unknown, false, true, 0, 'F'),
        ];
        for (state, way, announced, owner, init, held, bundle, age, expected) in cases {
            let verdict = verdict(&lease(state, way), facts(announced, owner, init, held, bundle, age));
            let letter = match verdict {
                Verdict::Keep(_) | Verdict::UnderWay(_) => 'K',
                Verdict::Free(_) => 'F',
                Verdict::Orphan => 'O',
            };
            assert_eq!(letter, expected, "{state:?} {way:?} owner {owner} {init:?} bundle {bundle}: {verdict:?}");
        }
    }

    #[test]
    fn what_somebody_works_on_is_left_to_him() {
        let facts = Facts {
            announced: true,
            owner_alive: false,
            init: Init::Dead,
            held: false,
            bundle_exists: false,
            age_ms: u64::MAX,
            claimed: true,
            idle_is_over: false,
        };
        let verdict = |state, facts| verdict(&lease(state, Way::Precreate), facts);
        assert!(matches!(verdict(State::Pending, facts), Verdict::Keep(_)));
        assert!(matches!(verdict(State::Releasing, facts), Verdict::UnderWay(_)));
        for state in [State::Pending, State::Releasing] {
            assert!(matches!(verdict(state, Facts { claimed: false, ..facts }), Verdict::Free(_)));
        }
    }

    #[test]
    fn the_table_of_verdicts_for_commands_and_jobs() {
        use Init::{Alive, Dead, Unknown};
        let none = Holder::new(Way::Job);
        let seen = |way| Holder { cgroup: Some("/job_15".into()), ..Holder::new(way) };
        let late = JOB_START_LIMIT_MS + 1;
        let cases = [
            // holder, state, announced, owner, init, held, age → K(eep) or F(ree)
            (seen(Way::Run), State::Active, false, true, Unknown, false, late, 'K'),
            (seen(Way::Run), State::Active, false, false, Alive, false, late, 'K'),
            (seen(Way::Run), State::Active, false, false, Dead, true, late, 'K'),
            (seen(Way::Run), State::Active, false, false, Unknown, true, 0, 'K'),
            (seen(Way::Run), State::Active, false, false, Dead, false, 0, 'F'),
            (seen(Way::Run), State::Active, false, false, Unknown, false, 0, 'F'),
            (seen(Way::Run), State::Active, true, true, Alive, true, 0, 'F'),
            (seen(Way::Run), State::Quarantined, false, true, Unknown, false, late, 'K'),
            (seen(Way::Job), State::Active, false, false, Unknown, false, JOB_START_LIMIT_MS, 'K'),
            (seen(Way::Job), State::Active, false, false, Unknown, false, late, 'F'),
            (seen(Way::Job), State::Active, false, false, Unknown, true, late, 'K'),
            (seen(Way::Job), State::Active, false, false, Alive, false, late, 'K'),
            (seen(Way::Job), State::Active, false, false, Dead, false, 0, 'F'),
            (seen(Way::Job), State::Active, false, false, Dead, true, late, 'K'),
            (seen(Way::Job), State::Active, true, false, Alive, true, 0, 'F'),
            (seen(Way::Job), State::Quarantined, false, false, Unknown, false, 0, 'K'),
            (seen(Way::Job), State::Quarantined, false, false, Unknown, false, late, 'F'),
            (none.clone(), State::Quarantined, false, false, Unknown, false, late, 'K'),
            (none, State::Active, false, false, Unknown, false, late, 'K'),
        ];
        for (holder, state, announced, owner_alive, init, held, age_ms, expected) in cases {
            let (bundle_exists, claimed, idle_is_over) = (true, false, false);
            let facts = Facts { announced, owner_alive, init, held, bundle_exists, age_ms, claimed, idle_is_over };
            let lease = Lease { holder, ..lease(state, Way::Job) };
            let letter = if matches!(verdict(&lease, facts), Verdict::Keep(_)) { 'K' } else { 'F' };
            assert_eq!(letter, expected, "{:?} {state:?} owner {owner_alive} {init:?} held {held}", lease.holder);
        }
    }

    #[test]
    fn a_holder_is_named_by_what_is_known_of_it() {
        let process = Some(ProcessId { pid: 42, start: 1 });
        let run = Holder { owner: process, command: Some("train.py".into()), ..Holder::new(Way::Run) };
        assert_eq!(run.name().as_deref(), Some("train.py (process 42)"));
        let job = Holder { init: process, job: Some("slurm:mini:15".into()), ..Holder::new(Way::Job) };
        assert_eq!(job.name().as_deref(), Some("job slurm:mini:15"));
        assert_eq!(Holder { owner: process, ..Holder::new(Way::Precreate) }.name(), None);
    }

    #[test]
    fn the_record_round_trips_and_refuses_what_it_does_not_know() {
        let lease = lease(State::Active, Way::Shim);
        let mut value = serde_json::to_value(&lease).unwrap();
        assert_eq!(serde_json::from_value::<Lease>(value.clone()).unwrap(), lease);
        value["surprise"] = 1.into();
        assert!(serde_json::from_value::<Lease>(value).is_err());
    }

    #[test]
    fn only_engine_ids_are_shortened() {
        assert_eq!(short(&"a".repeat(64)), "aaaaaaaaaaaa");
        assert_eq!(short("my-container"), "my-container");
    }
}
