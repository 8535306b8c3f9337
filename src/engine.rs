//! The order of effects: acquire, confirm, release, reconcile. The only file that orders lease, GPU and lock.
//!
//! Every step is written down before it is done, so that the next run can finish what a killed one began. Requests and
//! answers are plain values; nothing here knows an engine or a hook stage.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::Serialize;
use serde_json::{Value, json};

use crate::config::{ConfigError, Settings};
use crate::container::ContainerError;
use crate::first::index_name;
use crate::gpu::{Gpu, GpuError};
use crate::host::{self, Host, HostError, PidFile, ProcessId};
use crate::lease::{Facts, Holder, Init, Lease, ORPHAN_WAIT_MS, Slice, State, VERSION, Verdict, Way, verdict};
use crate::request::Request;
use crate::runtime;
use crate::store::{Claim, Lock, Store, StoreError};

mod choose;
mod cordon;
mod cutting;
mod destroy;
mod driver;
mod freeing;
mod idle;
mod job;
mod keep;
mod layout;
mod mode;
mod offer;
mod plan;
mod users;
mod wait;

pub use choose::{Kind, Refusal, is_managed, managed, rooms};
pub use cordon::{Cordon, Cordons, Occupant};
use cutting::NotCut;
pub use destroy::{Destroyed, Place};
pub use driver::driver_files;
use freeing::{ABANDONED, Begun, RELOCK_WAIT};
pub use job::published_job;
pub use layout::{Change, Target, Watch};
pub use mode::{Changed, Client};
pub use offer::{make_host_nodes, make_known_to_systemd, nodes_of};
pub use plan::{
    Alternative, Count, FitsNow, Freed, GpuRoom, HeldSlice, Keeps, Occupier, Outcome, Plan, Planned, ProfileRoom,
    Source,
};
use wait::Look;
pub use wait::{CONTAINER_WAIT, Standing, tickets_in};

/// Longest wait for the lock in acquire and reconcile.
pub const ACQUIRE_LOCK_WAIT: Duration = Duration::from_secs(60);
/// Longest wait for the lock in confirm: createRuntime hooks have 30 s.
pub const BIND_LOCK_WAIT: Duration = Duration::from_secs(15);
/// Longest wait for the lock in release: engines give poststop little time, and what is announced is not lost.
pub const RELEASE_LOCK_WAIT: Duration = Duration::from_secs(5);
/// How long acquire and reconcile go on trying to destroy what the driver calls in use. Never while holding the lock.
const BUSY_LIMIT: Duration = Duration::from_secs(10);
/// Pauses between a release's tries: three within a second.
const RELEASE_PAUSES: [Duration; 2] = [Duration::from_millis(200), Duration::from_millis(500)];
/// Placements tried in one acquire when the driver refuses what looked free (a rival tool, a busy GPU).
const PLACEMENT_TRIES: usize = 4;

/// Why nothing was given.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The request can't be understood, or names what no GPU here offers.
    #[error("{0}")]
    BadRequest(String),
    /// The settings forbid it.
    #[error("{0}")]
    NotAllowed(String),
    /// It would fit another time.
    #[error("{0}")]
    NoRoom(String),
    /// The lease is not, or no longer, what the caller thinks.
    #[error("{0}")]
    Stale(String),
    /// A signal came; nothing, or not all, was done.
    #[error("interrupted")]
    Interrupted,
    /// It failed in the middle.
    #[error("{failure}; {undone}")]
    RolledBack {
        /// What failed.
        failure: Box<Failure>,
        /// What became of what had been done by then.
        undone: String,
    },
    /// The driver failed.
    #[error(transparent)]
    Gpu(#[from] GpuError),
    /// The driver failed with one GPU.
    #[error("GPU {index}: {error}")]
    OnGpu {
        /// NVML index.
        index: u32,
        /// How.
        error: GpuError,
    },
    /// The driver's files are not as they should be.
    #[error(transparent)]
    Host(#[from] HostError),
    /// Our own state can't be used.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// This installation is not whole.
    #[error(transparent)]
    Setup(#[from] ConfigError),
    /// The cgroup of a command or a job is not as it should be.
    #[error(transparent)]
    Cgroup(#[from] ContainerError),
    /// The driver's files can't be given as the settings say.
    #[error("{0}")]
    Driver(String),
    /// A CDI spec can't be written.
    #[error("cannot write the CDI spec {path}: {source}")]
    Spec {
        /// The file.
        path: String,
        /// Why.
        source: std::io::Error,
    },
}

/// What a createRuntime hook knows of the container.
#[derive(Debug, Clone)]
pub struct Binding {
    /// Container id.
    pub container: String,
    /// Pid of init.
    pub pid: u32,
    /// Bundle directory, if it is to be believed (crun before 1.27 may say `/`).
    pub bundle: Option<PathBuf>,
    /// `--root` of the runtime.
    pub runtime_root: Option<PathBuf>,
    /// The runtime's program.
    pub runtime: Option<PathBuf>,
}

/// What became of a release.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case", tag = "outcome")]
pub enum Released {
    /// No such lease: somebody else has released it, or it never was.
    Unknown,
    /// Slices destroyed, lease gone.
    Done,
    /// The driver calls a slice in use: it stays Releasing until the next acquire or gc.
    Busy {
        /// In words.
        reason: String,
    },
    /// The lock was not free; the end is announced, the next acquire or gc finishes it.
    Announced,
}

/// What reconcile did with one lease.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Action {
    /// The lease.
    pub token: String,
    /// Its container, where known.
    pub container: Option<String>,
    /// Who has it, in words.
    pub holder: String,
    /// `kept`, `freed`, `busy`, `quarantined` or `failed`.
    pub result: &'static str,
    /// In words.
    pub reason: String,
    /// Milliseconds since 1970 when the end of its holder was noticed.
    #[serde(skip)]
    ended_ms: Option<u64>,
}

impl Action {
    /// Whether it is worth to look again in a moment: its holder has just ended. What a process has left behind keeps open may
    /// stay so for days.
    fn may_soon_be_free(&self) -> bool {
        self.result == "busy" && has_just_ended(self.ended_ms)
    }
}

/// Leases on one machine's GPUs.
#[derive(Debug)]
pub struct Engine<'a> {
    settings: &'a Settings,
    store: Store,
    host: Host,
    gpu: &'a dyn Gpu,
}

impl<'a> Engine<'a> {
    /// Opens the state; touches neither lock nor GPU.
    pub fn open(settings: &'a Settings, gpu: &'a dyn Gpu) -> Result<Engine<'a>, Failure> {
        let store = Store::open(&settings.state_dir)?;
        Ok(Engine { settings, store, host: host_of(settings), gpu })
    }

    /// The same to look only: makes nothing, and finds no leases where there is no state.
    pub fn look(settings: &'a Settings, gpu: &'a dyn Gpu) -> Engine<'a> {
        Engine { settings, store: Store::at(&settings.state_dir), host: host_of(settings), gpu }
    }

    /// Gives what `request` asks for to `holder`, all of it or nothing. Who waits in line for it does so as long as the
    /// process lives that has started this one.
    pub fn acquire(&self, request: &Request, holder: &Holder) -> Result<Lease, Failure> {
        self.acquire_unless(request, holder, None)
    }

    /// The same, but it is `cancel` that ends the wait, by being readable.
    pub fn acquire_unless(&self, request: &Request, holder: &Holder, cancel: Option<File>) -> Result<Lease, Failure> {
        let allowed = self.check_limits(request).map_err(Failure::from);
        let outcome = allowed.and_then(|()| self.acquire_in_turn(request, holder, cancel));
        match &outcome {
            Ok(lease) => audit_grant(request, lease),
            Err(failure) => audit_refusal(holder, Some(request), &failure.to_string()),
        }
        outcome
    }

    fn acquire_at_once(&self, request: &Request, holder: &Holder, cancel: Option<&File>) -> Result<Lease, Failure> {
        let deadline = Instant::now() + BUSY_LIMIT;
        let mut pause = Duration::from_millis(20);
        loop {
            let (lock, actions) = self.enter_and_reap()?;
            let busy = actions.iter().any(Action::may_soon_be_free);
            match self.acquire_locked(lock, request, holder, Look::now(None))? {
                // What ended a moment ago may be about to make room: the driver lets go a little later.
                (lock, Err(Failure::NoRoom(_))) if busy && Instant::now() + pause < deadline => drop(lock),
                (_, outcome) => return outcome,
            }
            if wait::is_cancelled_within(pause, cancel) {
                return Err(Failure::Interrupted);
            }
            pause = (pause * 2).min(Duration::from_millis(500));
        }
    }

    /// Decides under the lock, cuts without it, and has it again at the end. The outer error: it has not.
    fn acquire_locked(
        &self,
        mut lock: Lock,
        request: &Request,
        holder: &Holder,
        look: Look,
    ) -> Result<(Lock, Result<Lease, Failure>), Failure> {
        let mut unusable: Vec<(String, String)> = Vec::new();
        // Places that give capability minors which somebody still has.
        let mut barred: Vec<Lease> = Vec::new();
        let mut refused: Vec<Vec<Slice>> = Vec::new();
        let mut last = None;
        for _ in 0..PLACEMENT_TRIES {
            let mut leases = self.leases()?;
            let chosen = self.managed_devices().and_then(|devices| {
                self.settle_vanished(&lock, &devices, &mut leases)?;
                self.publish(&lock, &devices, &leases);
                leases.extend(barred.iter().cloned());
                self.decide_in_turn(&lock, devices, &leases, (request, holder), &unusable, look)
            });
            let (chosen, overtaken) = match chosen {
                // What the driver said says more than that no GPU is left to try.
                Err(unmet) => return Ok((lock, Err(last.unwrap_or_else(|| unmet.into())))),
                Ok(chosen) => chosen,
            };
            let planned = chosen.slices.clone();
            let mut lease = self.new_lease(holder, chosen.slices)?;
            let claim = self.claim_new(&lock, &lease)?;
            self.store.ready_intent(&lock, &lease.token)?;
            let evicted = self.begin_to_evict(&lock, &mut leases, &chosen.evicted);
            self.take_over_idle(&lock, leases, &lease)?;
            self.serve(&lock, look, true)?;
            self.count_overtakes(&lock, &overtaken, 1)?;
            let (back, cut) = self.make(lock, &claim, &mut lease, evicted)?;
            lock = back;
            let leases = self.leases()?;
            let cut = cut.and_then(|()| {
                let free = self.check_minors(&lease, &leases);
                if free.is_err() {
                    barred.push(Lease { state: State::Quarantined, ..lease.clone() });
                }
                Ok(free?)
            });
            match cut {
                Ok(()) => {
                    lease.state = State::Active;
                    lease.granted_boot_ms = Some(host::boot_ms());
                    self.store.put(&lock, &lease.token, &lease)?;
                    self.index(&lock, &lease)?;
                    return Ok((lock, Ok(lease)));
                }
                Err(NotCut { failure, gpu }) => {
                    let undone = self.begin_claimed(&lock, claim, lease, "it could not be cut");
                    lock = self.free_apart(lock, vec![undone])?.0;
                    self.serve(&lock, look, false)?;
                    self.count_overtakes(&lock, &overtaken, -1)?;
                    // A taken placement is seen when the GPU is read again. A GPU in another trouble is left out, and one that
                    // refuses the same again.
                    let no_room = matches!(failure, Failure::OnGpu { error: GpuError::NoRoom { .. }, .. });
                    if !no_room || refused.contains(&planned) {
                        unusable.extend(gpu.map(|gpu| (gpu, failure.to_string())));
                        last = Some(failure);
                    }
                    refused.push(planned);
                }
            }
        }
        let never = || Failure::NoRoom("no room: the driver refuses every placement that looks free".into());
        Ok((lock, Err(last.unwrap_or_else(never))))
    }

    /// Destroys what has to go and cuts what is planned, without the lock: others plan and cut meanwhile.
    fn make(
        &self,
        lock: Lock,
        claim: &Claim,
        lease: &mut Lease,
        evicted: Vec<Begun>,
    ) -> Result<(Lock, Result<(), NotCut>), Failure> {
        let (lock, evicted) = self.free_apart(lock, evicted)?;
        if let Some(left) = evicted.iter().find(|action| action.result != "freed") {
            let why = format!("an idle slice does not make room: {}", left.reason);
            return Ok((lock, Err(Failure::NoRoom(why).into())));
        }
        drop(lock);
        let cut = self.cut(claim, lease);
        Ok((self.store.lock(RELOCK_WAIT)?, cut))
    }

    /// Writes a new lease down, and claims it.
    fn claim_new(&self, lock: &Lock, lease: &Lease) -> Result<Claim, Failure> {
        self.store.put(lock, &lease.token, lease)?;
        let stale = || Failure::Stale(format!("another process is at work on lease {}", lease.token));
        self.store.claim(lock, &lease.token)?.ok_or_else(stale)
    }

    fn new_lease(&self, holder: &Holder, slices: Vec<Slice>) -> Result<Lease, Failure> {
        Ok(Lease {
            version: VERSION,
            token: host::token()?,
            state: State::Pending,
            reason: None,
            created_boot_ms: host::boot_ms(),
            created_ms: host::wall_ms(),
            granted_boot_ms: None,
            ended_ms: None,
            idle_until_boot_ms: None,
            holder: holder.clone(),
            reserved_for: None,
            slices,
        })
    }

    /// Binds the container that was started with a lease. Fails, and so fails the container's create, when the lease is
    /// gone, on its way out, or another container's.
    pub fn confirm(&self, token: &str, binding: &Binding) -> Result<Lease, Failure> {
        let lock = self.store.lock(BIND_LOCK_WAIT)?;
        let stale = |why: String| Failure::Stale(format!("lease {token} {why}; start the container again"));
        let Some(mut lease) = self.store.get::<Lease>(token, VERSION)? else {
            return Err(stale("was freed before the container was created".into()));
        };
        if lease.state == State::Quarantined {
            return Err(stale(format!("has lost its slice: {}", lease.reason.unwrap_or_default())));
        }
        if lease.state != State::Active || self.store.announced(token) {
            return Err(stale("is being released".into()));
        }
        match &lease.holder.container {
            Some(other) if *other != binding.container => return Err(stale(format!("is held by {}", lease.held_by()))),
            _ => {}
        }
        bind(&mut lease.holder, binding);
        self.store.put(&lock, token, &lease)?;
        self.index(&lock, &lease)?;
        Ok(lease)
    }

    /// Takes over the lease that a config is marked with: one that a living owner has just made and nobody has bound.
    pub fn take_over(&self, token: &str, holder: &Holder) -> Result<bool, Failure> {
        let lock = self.store.lock(ACQUIRE_LOCK_WAIT)?;
        let Some(mut lease) = self.store.get::<Lease>(token, VERSION)? else { return Ok(false) };
        let unbound = lease.state == State::Active && lease.holder.container.is_none();
        if !unbound || self.store.announced(token) || !lease.holder.owner.is_some_and(host::alive) {
            return Ok(false);
        }
        lease.holder = Holder { way: lease.holder.way, owner: lease.holder.owner, ..holder.clone() };
        self.store.put(&lock, token, &lease)?;
        self.index(&lock, &lease)?;
        Ok(true)
    }

    /// Gives back what `token` holds, if it is `container`'s where one is named. Idempotent: unknown is success.
    pub fn release(&self, token: &str, container: Option<&str>, why: &str) -> Result<Released, Failure> {
        let Some(lease) = self.store.get::<Lease>(token, VERSION)? else { return Ok(Released::Unknown) };
        if lease.state == State::Static {
            return Err(Failure::Stale(format!("{token} keeps a slice; only migctl destroy ends that")));
        }
        if let (Some(given), Some(holder)) = (container, &lease.holder.container)
            && given != holder
        {
            let who = lease.held_by();
            return Err(Failure::Stale(format!(
                "lease {token} belongs to {who}, not to container {given}: nothing was released"
            )));
        }
        self.store.announce(token);
        let outcome = self.release_announced(token, why);
        if !matches!(outcome, Ok(Released::Done)) {
            self.store.ring();
        }
        match outcome {
            Err(Failure::Store(StoreError::Busy { .. })) => Ok(Released::Announced),
            outcome => outcome,
        }
    }

    fn release_announced(&self, token: &str, why: &str) -> Result<Released, Failure> {
        let begun = Instant::now();
        let mut pauses = RELEASE_PAUSES.iter();
        loop {
            let lock = self.store.enter(RELEASE_LOCK_WAIT)?;
            let Some(lease) = self.store.get::<Lease>(token, VERSION)? else { return Ok(Released::Done) };
            if self.store.is_claimed(token) {
                drop(lock);
                self.store.wait_for_claim(token, RELEASE_LOCK_WAIT.saturating_sub(begun.elapsed()))?;
                continue;
            }
            let ending = self.begin_to_free(&lock, lease, why);
            let (lock, actions) = self.free_apart(lock, vec![ending])?;
            drop(lock);
            match (actions.into_iter().next(), pauses.next()) {
                (Some(action), _) if ["freed", "kept"].contains(&action.result) => return Ok(Released::Done),
                (Some(action), Some(pause)) if action.result == "busy" => std::thread::sleep(*pause),
                (action, _) => {
                    return Ok(Released::Busy { reason: action.map(|action| action.reason).unwrap_or_default() });
                }
            }
        }
    }

    /// Has a holder's poststop hook leave its end to this process: see [`Store::take_end`].
    pub fn take_end(&self, token: &str) -> Option<File> {
        self.store.take_end(token)
    }

    /// Brings leases and GPUs back in step: finishes what was begun, frees what nobody holds. One entry a lease.
    pub fn reconcile(&self) -> Result<Vec<Action>, Failure> {
        let deadline = Instant::now() + BUSY_LIMIT;
        let mut pause = Duration::from_millis(50);
        let mut freed: Vec<Action> = Vec::new();
        loop {
            let (lock, mut actions) = self.enter_and_reap()?;
            let news = self.look_afresh(&lock);
            actions.retain(|action| !news.iter().any(|new| new.token == action.token));
            actions.extend(news);
            self.forget_refusals(&lock)?;
            self.living_tickets(&lock)?;
            drop(lock);
            let busy = actions.iter().any(|action| action.result == "busy");
            if !busy || Instant::now() + pause > deadline {
                actions.splice(0..0, freed);
                return Ok(actions);
            }
            freed.extend(actions.into_iter().filter(|action| action.result == "freed"));
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_secs(1));
        }
    }

    /// The lock, with the records of this boot and of those that live.
    fn enter_and_reap(&self) -> Result<(Lock, Vec<Action>), Failure> {
        let lock = self.store.enter(ACQUIRE_LOCK_WAIT)?;
        self.store.begin_boot(&lock, &host::boot_id()?)?;
        self.reap(lock)
    }

    /// One look at every lease, one try for each that is to go, without the lock. An unreadable one stops us before anything
    /// is touched.
    fn reap(&self, lock: Lock) -> Result<(Lock, Vec<Action>), Failure> {
        let mut begun = Vec::new();
        for lease in self.leases()? {
            let (lease, news, verdict) = self.examine(lease);
            if news {
                self.store.put(&lock, &lease.token, &lease)?;
            }
            begun.push(match verdict {
                Verdict::Keep(reason) => Begun::Done(self.kept(&lease, reason)),
                Verdict::UnderWay(reason) => Begun::Done(action(&lease, "busy", reason)),
                Verdict::Free(reason) => self.begin_to_free(&lock, lease, reason),
                Verdict::Orphan => self.orphan(&lock, lease)?,
            });
        }
        self.free_apart(lock, begun)
    }

    /// A lease with what the world shows of its holder now, whether that is news, and what is to become of it.
    fn examine(&self, mut lease: Lease) -> (Lease, bool, Verdict) {
        // A bundle that is back was only moved: the minute begins anew.
        let back = lease.holder.bundle.as_deref().is_none_or(Path::exists)
            && lease.holder.bundle_missing_boot_ms.take().is_some();
        let learned = self.learn_init(&mut lease);
        let verdict = verdict(&lease, self.facts(&lease));
        (lease, learned || back, verdict)
    }

    /// Whether the state is of another boot: then it counts for nothing.
    fn is_outlived(&self) -> Result<bool, Failure> {
        Ok(match self.store.boot()? {
            Some(boot) => boot != host::boot_id()?,
            None => false,
        })
    }

    /// Every lease. Unreadable ones are an error: what we don't understand we leave alone, all of it.
    pub fn leases(&self) -> Result<Vec<Lease>, Failure> {
        leases_in(&self.store)
    }

    /// A shim's lease learns its init from the pid file that the runtime wrote, that of a command or a job from what is
    /// alive of it. True when it did.
    fn learn_init(&self, lease: &mut Lease) -> bool {
        let holder = &mut lease.holder;
        if !matches!(lease.state, State::Active | State::Quarantined) {
            return false;
        }
        if holder.way.is_bare() {
            return job::learn_member(holder);
        }
        if holder.init.is_some() {
            return false;
        }
        let Some(file) = written_pid_file(holder) else { return false };
        let Some(process) = file.process else { return false };
        let elsewhere = holder.cgroup.as_deref().is_some_and(|wanted| !host::is_in_cgroup(process.pid, wanted));
        // In doubt it is taken for init: a slice that is kept too long is a smaller harm than one freed under a container.
        if elsewhere && file.seems_reused {
            return false;
        }
        holder.init = Some(process);
        holder.cgroup = host::own_cgroup(process.pid).or(holder.cgroup.take());
        holder.mount_namespace = host::mount_namespace(std::process::id());
        true
    }

    fn facts(&self, lease: &Lease) -> Facts {
        let holder = &lease.holder;
        let init = match holder.init {
            Some(process) if host::alive(process) => Init::Alive,
            Some(_) => Init::Dead,
            None if written_pid_file(holder).is_some() => Init::Dead,
            None => Init::Unknown,
        };
        // Looking through every process is for the few leases whose end depends on it.
        let on_its_own = lease.state == State::Quarantined || holder.way.is_bare();
        let unsure = init == Init::Dead || (on_its_own && init != Init::Alive);
        Facts {
            announced: self.store.announced(&lease.token),
            owner_alive: holder.owner.is_some_and(host::alive),
            init,
            held: unsure && self.held(lease),
            bundle_exists: holder.bundle.as_deref().is_none_or(Path::exists),
            age_ms: host::boot_ms().saturating_sub(lease.created_boot_ms),
            claimed: matches!(lease.state, State::Pending | State::Releasing) && self.store.is_claimed(&lease.token),
            idle_is_over: lease.idle_until_boot_ms.is_some_and(|until| host::boot_ms() >= until),
        }
    }

    /// Whether a process of its holder lives, or has what it has open.
    fn held(&self, lease: &Lease) -> bool {
        self.remaining(lease).is_some()
    }

    /// Such a process, in words.
    fn remaining(&self, lease: &Lease) -> Option<String> {
        let having_open = || self.users().keeping_open(&lease.minors().collect()).ok().flatten();
        self.occupant(lease).or_else(|| Some(format!("{} has it open", user_in_words(having_open()?))))
    }

    /// A process in its cgroup, or of the tree of `migctl run`, in words.
    fn occupant(&self, lease: &Lease) -> Option<String> {
        let in_cgroup = lease.holder.cgroup.as_deref().and_then(|c| host::processes_in(c).first().copied());
        let in_tree =
            || self.store.is_held(&lease.token).then(|| "a process that its command has left is alive".into());
        in_cgroup.map(|pid| format!("{} is in its cgroup", process_in_words(pid))).or_else(in_tree)
    }

    /// A lease that stays, with what keeps it where that is not its holder's being alive.
    fn kept(&self, lease: &Lease, reason: &str) -> Action {
        let by = (lease.state == State::Quarantined).then(|| self.remaining(lease)).flatten();
        action(lease, "kept", &by.map_or_else(|| reason.to_owned(), |by| format!("{reason}: {by}")))
    }

    /// A container that was created, whose engine died, and that nobody can start any more: its bundle is gone. The
    /// runtime must agree, and the bundle must be missing twice, a minute apart.
    fn orphan(&self, lock: &Lock, mut lease: Lease) -> Result<Begun, Failure> {
        let now = host::boot_ms();
        let since = *lease.holder.bundle_missing_boot_ms.get_or_insert(now);
        self.store.put(lock, &lease.token, &lease)?;
        let kept = |why| Begun::Done(action(&lease, "kept", why));
        Ok(match self.abandoned(&lease, since) {
            Err(why) => kept(why),
            Ok((program, id)) if runtime::delete_force(program, lease.holder.runtime_root.as_deref(), id) => {
                self.begin_to_free(lock, lease, ABANDONED)
            }
            Ok(_) => kept("its container is abandoned, but its runtime does not delete it"),
        })
    }

    /// The runtime and the id of a container whose bundle is missing `since` then, if it may be deleted; else why not.
    fn abandoned<'l>(&self, lease: &'l Lease, since: u64) -> Result<(&'l Path, &'l str), &'static str> {
        let holder = &lease.holder;
        let waited = host::boot_ms().saturating_sub(since) >= ORPHAN_WAIT_MS;
        let here = holder.mount_namespace == host::mount_namespace(std::process::id());
        let (Some(program), Some(id)) = (&holder.runtime, &holder.container) else {
            return Err("its bundle is gone, but which runtime started it is not known");
        };
        if !waited || !here {
            return Err("its bundle is gone; it is looked at again in a minute, from its mount namespace");
        }
        match runtime::status(program, holder.runtime_root.as_deref(), id).as_deref() {
            Some("created") => Ok((program, id)),
            _ => Err("its container is alive, though its bundle is gone"),
        }
    }

    fn index(&self, lock: &Lock, lease: &Lease) -> Result<(), Failure> {
        match index_of(&lease.holder) {
            Some(name) => Ok(self.store.index(lock, &name, &lease.token)?),
            None => Ok(()),
        }
    }

    /// The leases that a container's own hooks took, without a token in its config: by id and, since ids come again under
    /// other runtime roots, by bundle where both are known.
    pub fn leases_of_hooks(&self, way: Way, container: &str, bundle: Option<&Path>) -> Result<Vec<Lease>, Failure> {
        let mut leases = self.leases()?;
        leases.retain(|lease| {
            let holder = &lease.holder;
            let bundles = holder.bundle.as_deref().zip(bundle);
            holder.way == way
                && holder.container.as_deref() == Some(container)
                && bundles.is_none_or(|(theirs, given)| theirs == given)
        });
        Ok(leases)
    }

    /// Of what an earlier life of this container has left, whose end nobody told: the processes that are in its cgroup now are
    /// those of the new one, and hold nothing of the old.
    pub fn bury_former_life(&self, holder: &Holder) -> Result<(), Failure> {
        let lock = self.store.lock(ACQUIRE_LOCK_WAIT)?;
        let container = holder.container.as_deref().unwrap_or_default();
        for mut lease in self.leases_of_hooks(holder.way, container, holder.bundle.as_deref())? {
            let dead = lease.holder.init.is_some_and(|init| !host::alive(init));
            if dead && lease.holder.cgroup == holder.cgroup && !self.store.is_claimed(&lease.token) {
                lease.holder.cgroup = None;
                self.store.put(&lock, &lease.token, &lease)?;
            }
        }
        Ok(())
    }

    /// Whether a lease stands that this container has, or is about to be bound to.
    pub fn serves(&self, token: &str, container: &str) -> Result<bool, Failure> {
        let lease = self.store.get::<Lease>(token, VERSION)?;
        Ok(lease.is_some_and(|lease| {
            lease.state == State::Active
                && !self.store.announced(token)
                && lease.holder.container.as_deref().is_none_or(|id| id == container)
        }))
    }

    /// The lease of a container of the shim's, by runtime root and id.
    pub fn lease_of(&self, root: Option<&Path>, id: &str) -> Result<Option<Lease>, Failure> {
        let Some(token) = index_name(root, id).and_then(|name| self.store.indexed(&name)) else { return Ok(None) };
        Ok(self.store.get::<Lease>(&token, VERSION)?.filter(|lease| lease.holder.container.as_deref() == Some(id)))
    }

    /// Whether somebody still stands behind a lease, so that its slices must stay.
    pub fn is_alive(&self, lease: &Lease) -> bool {
        matches!(self.examine(lease.clone()).2, Verdict::Keep(_) | Verdict::Orphan)
    }

    /// Whether a lease's container is surely over: init dead and nothing left in its cgroup or with its devices open.
    pub fn is_over(&self, lease: &Lease) -> bool {
        let mut lease = lease.clone();
        self.learn_init(&mut lease);
        let facts = self.facts(&lease);
        facts.init == Init::Dead && !facts.held
    }
}

/// The leases of a store; those that vanish while it is read have ended.
pub fn leases_in(store: &Store) -> Result<Vec<Lease>, Failure> {
    let mut leases = Vec::new();
    for token in store.tokens()? {
        leases.extend(store.get::<Lease>(&token, VERSION)?);
    }
    Ok(leases)
}

/// The host with the driver's files where the settings say.
pub fn host_of(settings: &Settings) -> Host {
    Host::at(&settings.proc_root, &settings.dev_root, &settings.driver_root)
}

/// The first process of a container: as it was bound, or as its pid file says by now.
pub fn init_of(holder: &Holder) -> Option<ProcessId> {
    holder.init.or_else(|| written_pid_file(holder)?.process)
}

/// The pid file that the runtime has written for this container; not one that lay there before.
fn written_pid_file(holder: &Holder) -> Option<PidFile> {
    let file = host::pid_file(holder.pid_file.as_deref()?)?;
    (Some(&file.stamp) != holder.pid_file_before.as_ref()).then_some(file)
}

fn index_of(holder: &Holder) -> Option<String> {
    index_name(holder.runtime_root.as_deref(), holder.container.as_deref()?)
}

/// Names the GPU of a slice with what the driver says of it.
fn on(slice: &Slice) -> impl FnOnce(GpuError) -> Failure {
    let index = slice.gpu_index;
    move |error| Failure::OnGpu { index, error }
}

/// Whether the end of a holder was noticed so lately that the driver may be about to let go.
fn has_just_ended(ended_ms: Option<u64>) -> bool {
    ended_ms.is_some_and(|ended| Duration::from_millis(host::wall_ms().saturating_sub(ended)) < BUSY_LIMIT)
}

fn process_in_words(pid: u32) -> String {
    format!("process {pid} ({})", host::process_name(pid))
}

/// The same with its cgroup, which says whose it is: a container's, a service's, a login's.
fn user_in_words(pid: u32) -> String {
    let cgroup = host::own_cgroup(pid).map(|cgroup| format!(" of cgroup {cgroup}"));
    process_in_words(pid) + &cgroup.unwrap_or_default()
}

fn action(lease: &Lease, result: &'static str, reason: &str) -> Action {
    Action {
        token: lease.token.clone(),
        container: lease.holder.container.clone(),
        holder: lease.held_by(),
        result,
        reason: reason.to_owned(),
        ended_ms: lease.ended_ms,
    }
}

/// Grants, refusals and releases are one line each with target `audit`; where it goes is the way in's business. What a
/// line says is read again by `history`.
fn audit_grant(request: &Request, lease: &Lease) {
    let more = json!({"request": request.to_string(), "token": lease.token, "slices": audited(lease)});
    audit("grant", &lease.holder, more);
}

/// The audit line of a refusal; without a request where it could not be read.
pub fn audit_refusal(holder: &Holder, request: Option<&Request>, reason: &str) {
    audit("refusal", holder, json!({"request": request.map(ToString::to_string), "reason": reason}));
}

fn audit_release(lease: &Lease) {
    let Some(granted) = lease.granted_boot_ms else { return };
    audit(
        "release",
        &lease.holder,
        json!({
            "token": lease.token, "reason": lease.reason, "slices": audited(lease),
            "held_ms": host::boot_ms().saturating_sub(granted),
        }),
    );
}

fn audited(lease: &Lease) -> Value {
    let slice = |s: &Slice| {
        json!({
            "gpu": s.gpu, "gpu_index": s.gpu_index, "profile": s.profile_name, "memory_mib": s.memory_mib,
            "placement": s.placement, "uuid": s.uuid,
        })
    };
    lease.slices.iter().map(slice).collect()
}

fn audit(event: &str, holder: &Holder, mut more: Value) {
    let who = json!({
        "event": event, "time_ms": host::wall_ms(), "container": holder.container, "image": holder.image,
        "job": holder.job, "command": holder.command, "uid": holder.uid, "way": holder.way, "boot": host::boot_id().ok(),
    });
    if let (Some(line), Value::Object(who)) = (more.as_object_mut(), who) {
        let rest = std::mem::replace(line, who);
        line.extend(rest);
    }
    tracing::info!(target: "audit", "{more}");
}

/// What a createRuntime hook adds to what is known of a holder.
pub fn bind(holder: &mut Holder, binding: &Binding) {
    holder.container = Some(binding.container.clone());
    holder.init = host::process(binding.pid);
    holder.cgroup = host::own_cgroup(binding.pid).or(holder.cgroup.take());
    holder.bundle = binding.bundle.clone().or(holder.bundle.take());
    holder.runtime_root = binding.runtime_root.clone().or(holder.runtime_root.take());
    holder.runtime = binding.runtime.clone().or(holder.runtime.take());
    holder.mount_namespace = host::mount_namespace(std::process::id());
}

/// What is known of a holder at the start: who asks, and how.
pub fn new_holder(way: Way, owner: u32) -> Holder {
    Holder {
        owner: host::process(owner),
        mount_namespace: host::mount_namespace(std::process::id()),
        uid: host::user(owner),
        ..Holder::new(way)
    }
}
