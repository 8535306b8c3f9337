//! Giving back what a lease has: begun and recorded under the lock, done by whoever has claimed the lease, without the lock
//! where others may go on.

use std::time::Duration;

use crate::container;
use crate::gpu::{ComputeInstance, Device, GpuError, Instance};
use crate::host;
use crate::lease::{Lease, Slice, State, Step, Verdict, Way};
use crate::store::{Claim, Lock};

use super::keep::VANISHED;
use super::{
    Action, Engine, Failure, action, audit_release, has_just_ended, index_of, on, process_in_words, user_in_words,
};

/// Why an orphan goes.
pub(super) const ABANDONED: &str = "it was created and abandoned by its engine";
/// Longest wait for the lock of one who had it and gave it up to work: nobody has it for long meanwhile.
pub(super) const RELOCK_WAIT: Duration = Duration::from_secs(10);

/// What stands in the way of destroying a slice.
pub(super) enum Obstacle {
    /// Try again later.
    Busy(String),
    /// Who only watches it has it open, and may for ever: it may stay for the next holder.
    Watched(String),
    /// Not surely ours, or gone without its holder, and something holds it.
    Held(String),
}

/// What a slice's end takes.
pub(super) enum ToDestroy {
    /// Nothing is there, or nothing is ours.
    Nothing,
    /// Something is in the way.
    Not(Obstacle),
    /// This GPU instance, with its compute instances.
    Instance(Instance),
}

/// A lease that is being freed.
pub(super) struct Ending {
    lease: Lease,
    why: String,
    /// A killed process left it: how far that got is only known as "at least to the step before".
    recovering: bool,
    claim: Claim,
    /// How far it came.
    result: Result<Option<Obstacle>, Failure>,
}

/// A lease that was to be freed.
pub(super) enum Begun {
    /// It is over already, one way or another.
    Done(Action),
    /// Its slices are to be destroyed.
    Ending(Box<Ending>),
}

impl Engine<'_> {
    /// Destroys a lease's slices, one try, and forgets it when nothing is left. What is in the way stays recorded.
    pub(super) fn free(&self, lock: &Lock, lease: Lease, why: &str) -> Action {
        match self.begin_to_free(lock, lease, why) {
            Begun::Done(action) => action,
            Begun::Ending(mut ending) => {
                self.destroy_all(&mut ending);
                self.end_freeing(lock, *ending)
            }
        }
    }

    /// The same without the lock while the driver works, and with it again.
    pub(super) fn free_apart(&self, lock: Lock, begun: Vec<Begun>) -> Result<(Lock, Vec<Action>), Failure> {
        let (mut actions, mut endings) = (Vec::new(), Vec::new());
        for begun in begun {
            match begun {
                Begun::Done(action) => actions.push(action),
                Begun::Ending(ending) => endings.push(ending),
            }
        }
        if endings.is_empty() {
            return Ok((lock, actions));
        }
        drop(lock);
        endings.iter_mut().for_each(|ending| self.destroy_all(ending));
        let lock = self.store.lock(RELOCK_WAIT)?;
        actions.extend(endings.into_iter().map(|ending| self.end_freeing(&lock, *ending)));
        Ok((lock, actions))
    }

    /// Records that a lease goes. What may stay for the next holder is over with that.
    pub(super) fn begin_to_free(&self, lock: &Lock, lease: Lease, why: &str) -> Begun {
        match self.store.claim(lock, &lease.token) {
            Ok(Some(claim)) => self.begin_claimed(lock, claim, lease, why),
            Ok(None) => Begun::Done(action(&lease, "busy", &format!("{why}; another process is at work on it"))),
            Err(error) => Begun::Done(action(&lease, "failed", &format!("{why}; {error}"))),
        }
    }

    /// The same for one who has claimed it already.
    pub(super) fn begin_claimed(&self, lock: &Lock, claim: Claim, mut lease: Lease, why: &str) -> Begun {
        if self.may_stay_idle(&lease) {
            let kept = self.keep_idle(lock, &lease, why, None).map(|()| action(&lease, "freed", why));
            return Begun::Done(kept.unwrap_or_else(|failure| failed(&lease, why, &failure)));
        }
        let before = lease.state;
        lease.state = State::Releasing;
        lease.reason = Some(why.to_owned());
        lease.ended_ms.get_or_insert_with(host::wall_ms);
        // Whatever became of its slices, nobody else gets their minors while a process has them.
        let remaining = (before == State::Quarantined).then(|| self.remaining(&lease)).flatten();
        let result = match remaining {
            Some(process) => Ok(Some(Obstacle::Held(process))),
            None => self.store.put(lock, &lease.token, &lease).map(|()| None).map_err(Failure::from),
        };
        let recovering = is_left_halfway(before);
        Begun::Ending(Box::new(Ending { lease, why: why.to_owned(), recovering, claim, result }))
    }

    /// What `reconcile` would do with each lease as things stand. Changes nothing and tries nothing, so that of what the driver
    /// calls in use only those are known whom it lists.
    pub fn foresee(&self) -> Result<Vec<Action>, Failure> {
        let leases = if self.is_outlived()? { Vec::new() } else { self.leases()? };
        let devices = if leases.is_empty() { Vec::new() } else { self.gpu.devices().unwrap_or_default() };
        let foresee = |lease: Lease| {
            self.foresee_one(lease.clone(), &devices)
                .unwrap_or_else(|failure| action(&lease, "failed", &failure.to_string()))
        };
        Ok(leases.into_iter().map(foresee).collect())
    }

    fn foresee_one(&self, lease: Lease, devices: &[Device]) -> Result<Action, Failure> {
        let (lease, _, verdict) = self.examine(lease);
        let why = match verdict {
            Verdict::Keep(_) if self.has_vanished(&lease, devices) => {
                let result = if lease.is_spare() { "freed" } else { "quarantined" };
                return Ok(action(&lease, result, VANISHED));
            }
            Verdict::Keep(reason) => return Ok(self.kept(&lease, reason)),
            Verdict::UnderWay(reason) => return Ok(action(&lease, "busy", reason)),
            Verdict::Free(why) => why,
            Verdict::Orphan => {
                match self.abandoned(&lease, lease.holder.bundle_missing_boot_ms.unwrap_or_else(host::boot_ms)) {
                    Err(why) => return Ok(action(&lease, "kept", why)),
                    Ok(_) => ABANDONED,
                }
            }
        };
        let users = self.users();
        for (at, slice) in lease.slices.iter().enumerate() {
            let in_the_way = match self.to_destroy(&lease, at, is_left_halfway(lease.state))? {
                ToDestroy::Nothing => None,
                ToDestroy::Not(obstacle) => Some(obstacle),
                ToDestroy::Instance(instance) => match users.of(&slice.gpu, slice.gpu_minor, &instance)? {
                    None => None,
                    Some(pid) if self.may_stay_watched(&lease, &users)? => Some(Obstacle::Watched(watching(pid))),
                    Some(pid) => Some(Obstacle::Busy(format!("{} uses it", user_in_words(pid)))),
                },
            };
            match in_the_way {
                None => {}
                Some(Obstacle::Busy(what)) => return Ok(action(&lease, "busy", &format!("{why}; {what}"))),
                Some(Obstacle::Watched(what)) => return Ok(watched(&lease, why, &what)),
                Some(Obstacle::Held(what)) => return Ok(action(&lease, "quarantined", &what)),
            }
        }
        Ok(action(&lease, "freed", why))
    }

    fn destroy_all(&self, ending: &mut Ending) {
        for at in 0..ending.lease.slices.len() {
            if let Ok(None) = ending.result {
                ending.result = self.destroy(&ending.claim, &mut ending.lease, at, ending.recovering);
            }
        }
    }

    /// Records how it ended.
    fn end_freeing(&self, lock: &Lock, ending: Ending) -> Action {
        let Ending { mut lease, why, result, .. } = ending;
        let done = match result {
            Ok(None) => self.forget(lock, &lease).map(|()| action(&lease, "freed", &why)),
            Ok(Some(Obstacle::Busy(what))) => Ok(self.not_yet(lock, &mut lease, "busy", format!("{why}; {what}"))),
            Ok(Some(Obstacle::Watched(what))) => {
                self.keep_idle(lock, &lease, &why, Some(&what)).map(|()| watched(&lease, &why, &what))
            }
            Ok(Some(Obstacle::Held(what))) => {
                lease.state = State::Quarantined;
                lease.reason = Some(what.clone());
                let put = self.store.put(lock, &lease.token, &lease).map_err(Failure::from);
                put.map(|()| action(&lease, "quarantined", &what))
            }
            Err(failure) => Ok(self.not_yet(lock, &mut lease, "failed", format!("{why}; {failure}"))),
        };
        let action = done.unwrap_or_else(|failure| failed(&lease, &why, &failure));
        tracing::debug!(token = %action.token, result = action.result, reason = %action.reason, "freeing a lease");
        action
    }

    /// A lease that stays on its way out, with what is in the way for those who look at it.
    fn not_yet(&self, lock: &Lock, lease: &mut Lease, result: &'static str, reason: String) -> Action {
        lease.reason = Some(reason.clone());
        if let Err(error) = self.store.put(lock, &lease.token, lease) {
            tracing::warn!("what is in the way of lease {} was not written down: {error}", lease.token);
        }
        action(lease, result, &reason)
    }

    /// Destroys one slice if it is there and ours. `recovering`: a killed process left it, so that nothing may hold it.
    fn destroy(
        &self,
        claim: &Claim,
        lease: &mut Lease,
        at: usize,
        recovering: bool,
    ) -> Result<Option<Obstacle>, Failure> {
        let slice = lease.slices[at].clone();
        let instance = match self.to_destroy(lease, at, recovering)? {
            ToDestroy::Nothing => return Ok(None),
            ToDestroy::Not(obstacle) => return Ok(Some(obstacle)),
            ToDestroy::Instance(instance) => instance,
        };
        lease.slices[at].gi = Some(instance.id);
        for compute in &instance.compute {
            // Known for ours from here on, also to the run after a kill or a refusal.
            lease.slices[at].ci = Some(compute.id);
            lease.slices[at].uuid = Some(compute.uuid.clone());
            lease.slices[at].step = Step::DestroyingCompute;
            self.store.put_claimed(claim, lease)?;
            if let Some(busy) = obstacle(&slice, self.gpu.destroy_compute(&slice.gpu, instance.id, compute.id))? {
                return self.by_whom(busy, lease, &slice, &instance).map(Some);
            }
        }
        lease.slices[at].step = Step::DestroyingInstance;
        self.store.put_claimed(claim, lease)?;
        if let Some(busy) = obstacle(&slice, self.gpu.destroy_instance(&slice.gpu, instance.id))? {
            return self.by_whom(busy, lease, &slice, &instance).map(Some);
        }
        for other in lease.slices.iter_mut().filter(|other| other.shares(&slice)) {
            other.step = Step::Gone;
        }
        Ok(None)
    }

    /// What the driver calls in use, with the process that uses it where one is to be seen.
    fn by_whom(
        &self,
        obstacle: Obstacle,
        lease: &Lease,
        slice: &Slice,
        instance: &Instance,
    ) -> Result<Obstacle, Failure> {
        let Obstacle::Busy(what) = obstacle else { return Ok(obstacle) };
        let users = self.users();
        Ok(match users.of(&slice.gpu, slice.gpu_minor, instance)? {
            // Nobody is to be seen for a moment also where the driver has not let go yet of who has ended.
            None if has_just_ended(lease.ended_ms) || !self.may_stay_watched(lease, &users)? => Obstacle::Busy(what),
            None => {
                users.agent_on(slice.gpu_minor)?.map_or(Obstacle::Busy(what), |pid| Obstacle::Watched(watching(pid)))
            }
            Some(pid) if self.may_stay_watched(lease, &users)? => Obstacle::Watched(watching(pid)),
            Some(pid) => Obstacle::Busy(format!("{what}; {} uses it", user_in_words(pid))),
        })
    }

    /// What there is to destroy of one slice, before anything is touched.
    pub(super) fn to_destroy(&self, lease: &Lease, at: usize, recovering: bool) -> Result<ToDestroy, Failure> {
        let slice = &lease.slices[at];
        if matches!(slice.step, Step::Planned | Step::Gone) {
            return Ok(ToDestroy::Nothing);
        }
        if !slice.ours || lease.holder.way.is_bare() {
            // The next one must find nobody in it. Of a container the runtime has seen to that.
            if let Some(process) = self.remaining(lease) {
                return Ok(ToDestroy::Not(Obstacle::Busy(process)));
            }
            if !slice.ours {
                return Ok(ToDestroy::Nothing);
            }
        }
        let Some(instance) = self.still_ours(lease, at)? else { return Ok(ToDestroy::Nothing) };
        if (recovering || matches!(slice.step, Step::CreatingInstance | Step::CreatingCompute))
            && let Some(pid) = self.users().besides_agents(&slice.gpu, slice.gpu_minor, &instance)?
        {
            let name = format!("slice {} on GPU {}", slice.profile_name, slice.gpu_index);
            return Ok(ToDestroy::Not(Obstacle::Held(format!("{name} is half-made, and process {pid} uses it"))));
        }
        Ok(ToDestroy::Instance(instance))
    }

    /// The GPU instance that a slice's record means, if it exists and nobody else can have made it since.
    fn still_ours(&self, lease: &Lease, at: usize) -> Result<Option<Instance>, Failure> {
        let slice = &lease.slices[at];
        let there = match slice.gi {
            Some(gi) => self.gpu.instance(&slice.gpu, gi).map_err(on(slice))?.into_iter().collect(),
            None => self.gpu.instances(&slice.gpu).map_err(on(slice))?,
        };
        let same = |i: &Instance| i.placement == slice.placement && i.profile == slice.profile;
        let Some(instance) = there.into_iter().find(same) else { return Ok(None) };
        let here = || lease.slices.iter().filter(|other| other.shares(slice));
        let known = |c: &ComputeInstance| here().any(|s| s.uuid.as_ref() == Some(&c.uuid));
        let unknown = instance.compute.iter().filter(|c| !known(c)).count();
        let strangers = match slice.step {
            // We had not come to the compute instance, or had destroyed it: one that is there is a rival's.
            Step::CreatingInstance | Step::DestroyingInstance => !instance.compute.is_empty(),
            // One compute instance may have been made and not been recorded.
            _ => unknown > usize::from(here().any(|s| s.step == Step::CreatingCompute)),
        };
        if strangers {
            tracing::warn!(gpu = %slice.gpu, placement = %slice.placement, "the GPU instance here is another's now; it stays");
        }
        Ok((!strangers).then_some(instance))
    }

    pub(super) fn forget(&self, lock: &Lock, lease: &Lease) -> Result<(), Failure> {
        if lease.reserved_for.is_some() {
            self.open_nodes_or_warn(lease);
        }
        if let Some(key) = &lease.holder.job {
            // A later job of the same number has its own.
            let of_another = |other: &Lease| other.token != lease.token && other.holder.job.as_ref() == Some(key);
            if !self.leases()?.iter().any(of_another) {
                self.store.unpublish(lock, key)?;
            }
        }
        if let Some(path) = lease.holder.cgroup.as_deref().filter(|_| lease.holder.way == Way::Run) {
            match container::remove(path) {
                Ok(true) => {}
                Ok(false) => tracing::warn!("the cgroup {path} is left behind: a process is in it"),
                Err(error) => tracing::warn!("a cgroup is left behind: {error}"),
            }
        }
        self.store.remove(lock, &lease.token, index_of(&lease.holder).as_deref())?;
        audit_release(lease);
        Ok(())
    }
}

/// Whether a killed process may have left it, so that more exists than is recorded, or less.
pub(super) fn is_left_halfway(state: State) -> bool {
    matches!(state, State::Pending | State::Quarantined)
}

/// Of a lease whose slices stay, since they can't be destroyed.
fn watched(lease: &Lease, why: &str, what: &str) -> Action {
    action(lease, "kept", &format!("{why}; {what}: idle, for the next one who asks for its profile"))
}

fn watching(agent: u32) -> String {
    format!("{}, which only watches, has it open", process_in_words(agent))
}

fn failed(lease: &Lease, why: &str, failure: &Failure) -> Action {
    action(lease, "failed", &format!("{why}; {failure}"))
}

/// Not found is done; in use is for later; anything else is an error.
pub(super) fn obstacle(slice: &Slice, result: Result<(), GpuError>) -> Result<Option<Obstacle>, Failure> {
    match result {
        Ok(()) | Err(GpuError::NotFound { .. }) => Ok(None),
        Err(busy @ GpuError::InUse { .. }) => Ok(Some(Obstacle::Busy(on(slice)(busy).to_string()))),
        Err(other) => Err(on(slice)(other)),
    }
}
