//! Leases of bare processes: jobs of batch systems, by their key, and what is alive of jobs and commands.

use std::fs::File;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::container::Own;
use crate::edits;
use crate::gpu::MigMode;
use crate::host::{self, ProcessId};
use crate::job::{self, Key, Node, Public};
use crate::lease::{Holder, Init, Lease, State, VERSION, Verdict};
use crate::request::Request;
use crate::store::{Lock, Store, StoreError};

use super::{ACQUIRE_LOCK_WAIT, BIND_LOCK_WAIT, Engine, Failure, Released, make_host_nodes, nodes_of};

/// Milliseconds after which a refusal that nobody has ended is forgotten: a day.
const REFUSAL_LIMIT_MS: u64 = 24 * 3600 * 1000;

/// How long the end of a job waits for its last processes. Slurm drains a node whose Epilog takes longer than
/// PrologEpilogTimeout, for which doctor wants 30 s.
const LAST_PROCESS_LIMIT: Duration = Duration::from_secs(10);
const LAST_PROCESS_PAUSE: Duration = Duration::from_millis(300);

impl Engine<'_> {
    /// Records the process that runs a command, and the cgroup that the command is to have.
    ///
    /// # Errors
    /// [`Failure::Stale`] when the lease has gone meanwhile.
    pub fn attach(&self, token: &str, init: ProcessId, cgroup: &str) -> Result<(), Failure> {
        let lock = self.store.lock(ACQUIRE_LOCK_WAIT)?;
        let lease = self.store.get::<Lease>(token, VERSION)?.filter(|lease| lease.state == State::Active);
        let Some(mut lease) = lease.filter(|_| !self.store.announced(token)) else {
            return Err(Failure::Stale(format!("lease {token} was freed before its command was started")));
        };
        lease.holder.init = Some(init);
        lease.holder.cgroup = Some(cgroup.to_owned());
        Ok(self.store.put(&lock, token, &lease)?)
    }

    /// A descriptor that keeps a lease for whoever has it open: see [`Store::hold`](crate::store::Store::hold).
    pub fn hold(&self, token: &str) -> Result<File, Failure> {
        Ok(self.store.hold(token)?)
    }

    /// Gives a job what it asks for, makes its nodes on the host, confines its cgroup where one is named for that, and lets
    /// its group know; or the refusal.
    /// A job that is alive keeps what it has; one of the same key that is not is another one, and its slices are freed.
    ///
    /// # Errors
    /// As [`Engine::acquire`]. What it is refused for is public then, where that could be written. [`Failure::Stale`] while
    /// another job of that key is alive, whose slices stay public.
    pub fn start_job(
        &self,
        key: &Key,
        gid: u32,
        request: &Request,
        holder: &Holder,
        confine: Option<&Path>,
    ) -> Result<Public, Failure> {
        let uid = holder.uid.unwrap_or_default();
        if let Some(lease) = self.lease_of_living(key)? {
            let theirs = lease.holder.uid.unwrap_or_default();
            if theirs == uid && Public::granted(key, uid, &lease, vec![]).meets(request) {
                return self.tell_job(key, gid, uid, &lease, confine);
            }
            let has = lease.profiles();
            return Err(Failure::Stale(format!(
                "another job {key}, of uid {theirs} and with {has}, is still running here; if it is not: migctl job end --key {key}"
            )));
        }
        let given = self.give_to_job(key, request, holder).and_then(|lease| {
            let told = self.tell_job(key, gid, uid, &lease, confine);
            told.map_err(|failure| self.take_from_job(&lease, failure))
        });
        if let Err(failure) = &given {
            self.refuse_job(key, gid, uid, &failure.to_string());
        }
        given
    }

    /// Lets a job know that it has got nothing, and why.
    pub fn refuse_job(&self, key: &Key, gid: u32, uid: u32, why: &str) {
        if let Err(failure) = self.publish_job(gid, &Public::refused(key, uid, Some(why.to_owned()))) {
            tracing::error!(job = key.as_str(), "its refusal can't be made known to it: {failure}");
        }
    }

    /// What a job has that is alive, or of which nobody could see whether it is.
    fn lease_of_living(&self, key: &Key) -> Result<Option<Lease>, Failure> {
        let is_alive = |lease: &Lease| {
            let (lease, _, verdict) = self.examine(lease.clone());
            let is_seen = || !lease.holder.is_observable() || self.facts(&lease).init == Init::Alive;
            lease.state == State::Active && matches!(verdict, Verdict::Keep(_)) && is_seen()
        };
        Ok(self.leases_of_job(key)?.into_iter().find(is_alive))
    }

    fn give_to_job(&self, key: &Key, request: &Request, holder: &Holder) -> Result<Lease, Failure> {
        for old in self.leases_of_job(key)? {
            self.release(&old.token, None, "another job of the same number has begun")?;
        }
        let holder = Holder { job: Some(key.to_string()), ..holder.clone() };
        self.acquire(request, &holder)
    }

    fn tell_job(
        &self,
        key: &Key,
        gid: u32,
        uid: u32,
        lease: &Lease,
        confine: Option<&Path>,
    ) -> Result<Public, Failure> {
        let public = Public::granted(key, uid, lease, self.nodes_for(lease)?);
        if let Some(cgroup) = confine {
            self.confine(Some(lease), &Own::at(cgroup)?)?;
        }
        self.publish_job(gid, &public)?;
        Ok(public)
    }

    fn take_from_job(&self, lease: &Lease, failure: Failure) -> Failure {
        let undone = match self.release(&lease.token, None, "its job could not be started with it") {
            Ok(Released::Done | Released::Unknown) => "nothing is left of it".into(),
            Ok(_) => "its slices are freed by the next gc".into(),
            Err(also) => format!("its slices are not freed: {also}"),
        };
        Failure::RolledBack { failure: Box::new(failure), undone }
    }

    /// Makes the nodes of a lease on the host, and lists them.
    pub fn nodes_for(&self, lease: &Lease) -> Result<Vec<Node>, Failure> {
        let majors = self.host.majors()?;
        make_host_nodes(&self.host, &lease.slices, majors)?;
        let node = |node: edits::Node| Node { path: node.name, major: node.major, minor: node.minor };
        Ok(nodes_of(&self.host, &lease.slices, majors).into_iter().map(node).collect())
    }

    /// Keeps what runs in a cgroup from opening slices, but those of a lease: every capability of the driver, and the GPUs
    /// in MIG mode that are ours to give. Others are none of our business.
    pub fn confine(&self, lease: Option<&Lease>, cgroup: &Own) -> Result<(), Failure> {
        let majors = self.host.known_majors()?;
        let slices = lease.map(|lease| lease.slices.as_slice()).unwrap_or_default();
        let own = nodes_of(&self.host, slices, majors).into_iter().filter(|_| !slices.is_empty());
        let allowed: Vec<(u32, u32)> = own.map(|node| (node.major, node.minor)).collect();
        let caps = self.host.capability_minors()?.into_iter().map(|minor| (majors.caps, minor));
        let managed = self.managed_gpus()?.into_iter().filter(|gpu| gpu.mig == MigMode::On);
        let denied: Vec<(u32, u32)> = caps.chain(managed.map(|gpu| (majors.nvidia, gpu.minor))).collect();
        Ok(cgroup.confine(&allowed, &denied)?)
    }

    fn publish_job(&self, gid: u32, public: &Public) -> Result<(), Failure> {
        let lock = self.store.lock(ACQUIRE_LOCK_WAIT)?;
        Ok(self.store.publish(&lock, &public.key, gid, public)?)
    }

    /// Takes back what a job has, and what is public of it. Idempotent: what never was is success. `None`: it had nothing.
    pub fn end_job(&self, key: &Key) -> Result<Option<Released>, Failure> {
        let mut outcome = None;
        let deadline = Instant::now() + LAST_PROCESS_LIMIT;
        for lease in self.leases_of_job(key)? {
            let mut released = self.release(&lease.token, None, "its job has ended")?;
            // The last processes of a job may be on their way out.
            while matches!(released, Released::Busy { .. }) && Instant::now() < deadline {
                std::thread::sleep(LAST_PROCESS_PAUSE);
                released = self.release(&lease.token, None, "its job has ended")?;
            }
            // The worst of several is told.
            if matches!(outcome, None | Some(Released::Done | Released::Unknown)) {
                outcome = Some(released);
            }
        }
        // A refusal. Most jobs ask for nothing, and wait for nobody's lock.
        if self.store.published_ms(key.as_str()).is_some() {
            let lock = self.store.lock(BIND_LOCK_WAIT)?;
            self.store.unpublish(&lock, key.as_str())?;
        }
        Ok(outcome)
    }

    /// The leases that a job has; usually one.
    pub fn leases_of_job(&self, key: &Key) -> Result<Vec<Lease>, Failure> {
        let mut leases = self.leases()?;
        leases.retain(|lease| lease.holder.job.as_deref() == Some(key.as_str()));
        Ok(leases)
    }

    /// What is public of jobs that have no lease, and won't be asked for any more.
    pub(super) fn forget_refusals(&self, lock: &Lock) -> Result<(), Failure> {
        let leases = self.leases()?;
        for key in self.store.publications()? {
            let held = leases.iter().any(|lease| lease.holder.job.as_deref() == Some(&key));
            if !held && self.store.published_ms(&key).is_some_and(|age| age > REFUSAL_LIMIT_MS) {
                self.store.unpublish(lock, &key)?;
            }
        }
        Ok(())
    }
}

/// What is public of a job; `None` where there is nothing: it asked for nothing, or is over.
///
/// # Errors
/// [`Failure::NoRoom`] when it was refused, [`Failure::NotAllowed`] when it is another user's.
pub fn published_job(state_dir: &Path, key: &Key) -> Result<Option<Public>, Failure> {
    let others = || Failure::NotAllowed(format!("job {key} is another user's"));
    let public = match Store::at(state_dir).published::<Public>(key.as_str(), job::VERSION) {
        Err(StoreError::NotRoot { .. }) => return Err(others()),
        public => public?,
    };
    let user = nix::unistd::geteuid();
    match public {
        Some(public) if !user.is_root() && user.as_raw() != public.uid => Err(others()),
        Some(Public { refusal: Some(why), .. }) => Err(Failure::NoRoom(format!("job {key} was refused: {why}"))),
        public => Ok(public),
    }
}

/// Looks for a living process of a job or a command in the place of one that has ended. True when there is one.
pub(super) fn learn_member(holder: &mut Holder) -> bool {
    if holder.init.is_some_and(host::alive) {
        return false;
    }
    let in_cgroup = || host::processes_in(holder.cgroup.as_deref()?).into_iter().find_map(host::process);
    let Some(member) = in_cgroup().or_else(|| host::process_called(holder.sign.as_deref()?)) else { return false };
    holder.init = Some(member);
    true
}
