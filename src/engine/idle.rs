//! What ended holders leave for the next one who asks for its profile (`slices.idle_ttl`): one record for each slice, so that
//! each is found by itself. It is in nobody's way: the cheapest ones go as soon as that makes room.

use std::time::Duration;

use crate::gpu::{Device, Instance};
use crate::host;
use crate::lease::{Holder, Lease, Slice, State, Step, Way};
use crate::store::Lock;

use super::users::Users;
use super::{Begun, Engine, Failure};

/// How long a slice that an agent has open is left alone before it is tried again to destroy it.
const AGENT_PAUSE: Duration = Duration::from_secs(10);

impl Engine<'_> {
    /// Whether what that holder has had may wait for the next one: whole, cut by us, on a GPU that takes new holders, and
    /// nobody is left in it.
    pub(super) fn may_stay_idle(&self, lease: &Lease) -> bool {
        !self.settings.idle_ttl.is_zero()
            && lease.state == State::Active
            && lease.slices.iter().all(|slice| is_ours_alone(slice) && slice.step == Step::Whole)
            && self.occupant(lease).is_none()
            && self.are_unused(&lease.slices, &self.users()).unwrap_or(false)
    }

    /// Whether what an ended holder has had may wait for the next one although it can't be destroyed: what is left is whole,
    /// cut by us, and nobody has it but who watches it.
    pub(super) fn may_stay_watched(&self, lease: &Lease, users: &Users<'_>) -> Result<bool, Failure> {
        let left: Vec<Slice> = lease.slices.iter().filter(|slice| slice.step != Step::Gone).cloned().collect();
        let is_a_holders = !matches!(lease.holder.way, Way::Create | Way::Adopt);
        Ok(is_a_holders
            && left.iter().all(is_ours_alone)
            && self.occupant(lease).is_none()
            && self.are_unused(&left, users)?)
    }

    /// Whether nobody has these slices open, on GPUs that take new holders.
    fn are_unused(&self, slices: &[Slice], users: &Users<'_>) -> Result<bool, Failure> {
        let cordons = self.cordons()?;
        for slice in slices {
            if cordons.contains_key(&slice.gpu) || !self.is_unused(slice, users)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn is_unused(&self, slice: &Slice, users: &Users<'_>) -> Result<bool, Failure> {
        let there = self.gpu.instances(&slice.gpu)?.into_iter().find(|instance| {
            slice.is_at(&slice.gpu, instance)
                && instance.compute.iter().map(|c| Some(&c.uuid)).eq([slice.uuid.as_ref()])
        });
        match there {
            Some(instance) => Ok(users.besides_agents(&slice.gpu, slice.gpu_minor, &instance)?.is_none()),
            None => Ok(false),
        }
    }

    /// Records each slice that is left for itself, then forgets the lease. Where a kill comes between, the lease is freed again,
    /// and finds its slices recorded. `agent`: what keeps them from being destroyed.
    pub(super) fn keep_idle(&self, lock: &Lock, lease: &Lease, why: &str, agent: Option<&str>) -> Result<(), Failure> {
        let leases = self.leases()?;
        let recorded = |slice: &Slice| {
            leases.iter().any(|other| other.state == State::Idle && other.slices.iter().any(|s| s.shares(slice)))
        };
        let ttl = if agent.is_some() { AGENT_PAUSE } else { self.settings.idle_ttl };
        let ttl = u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX);
        for slice in lease.slices.iter().filter(|slice| slice.step != Step::Gone && !recorded(slice)) {
            let slice = Slice { step: Step::Whole, ..slice.clone() };
            let idle = Lease {
                state: State::Idle,
                reason: agent.map(str::to_owned),
                idle_until_boot_ms: Some(host::boot_ms().saturating_add(ttl)),
                ..self.new_lease(&Holder::new(lease.holder.way), vec![slice])?
            };
            self.store.put(lock, &idle.token, &idle)?;
        }
        let ended = Lease { reason: Some(why.to_owned()), ..lease.clone() };
        self.forget(lock, &ended)
    }

    /// The records of idle slices that a new lease has: it is theirs now. Until it is Active a kill leaves both, and the next
    /// one destroys the slice.
    pub(super) fn take_over_idle(&self, lock: &Lock, leases: Vec<Lease>, lease: &Lease) -> Result<(), Failure> {
        let taken = |idle: &&Lease| {
            idle.state == State::Idle
                && idle.slices.iter().any(|slice| lease.slices.iter().any(|own| own.shares(slice)))
        };
        for idle in leases.iter().filter(taken) {
            self.store.remove(lock, &idle.token, None)?;
        }
        Ok(())
    }

    /// Records that these idle ones go.
    pub(super) fn begin_to_evict(&self, lock: &Lock, leases: &mut Vec<Lease>, tokens: &[String]) -> Vec<Begun> {
        let evicted = leases.extract_if(.., |lease| tokens.contains(&lease.token));
        evicted.map(|idle| self.begin_to_free(lock, idle, "its room is needed")).collect()
    }
}

/// Whether a slice is one that we cut, of all of its GPU instance.
fn is_ours_alone(slice: &Slice) -> bool {
    slice.ours && slice.compute_slices.is_none()
}

/// What `choose` finds where some of what is idle goes, the smallest first, and the tokens of that, less those that it can do
/// without.
pub(super) fn evicting<T>(
    devices: &[Device],
    leases: &[Lease],
    choose: impl Fn(&[Device], &[Lease]) -> Option<T>,
) -> Option<(T, Vec<String>)> {
    let here = |lease: &&Lease| lease.slices.iter().all(|slice| devices.iter().any(|d| d.uuid == slice.gpu));
    let mut idle: Vec<&Lease> = leases.iter().filter(|lease| lease.may_be_evicted()).filter(here).collect();
    let size = |lease: &Lease| lease.slices.iter().map(|slice| slice.placement.size).sum::<u32>();
    idle.sort_by_key(|lease| (size(lease), lease.idle_until_boot_ms));
    let without = |tokens: &[&str]| {
        let (mut devices, mut leases) = (devices.to_vec(), leases.to_vec());
        take_out(&mut devices, &mut leases, |lease| tokens.contains(&lease.token.as_str()));
        choose(&devices, &leases)
    };
    let tokens: Vec<&str> = idle.iter().map(|lease| lease.token.as_str()).collect();
    let enough = (1..=tokens.len()).find(|count| without(&tokens[..*count]).is_some())?;
    // The last one is needed. Of those before it stays what is not, the largest first.
    let mut evicted = tokens[..enough].to_vec();
    for token in tokens[..enough].iter().rev().skip(1) {
        let fewer: Vec<&str> = evicted.iter().copied().filter(|other| other != token).collect();
        if without(&fewer).is_some() {
            evicted = fewer;
        }
    }
    Some((without(&evicted)?, evicted.into_iter().map(str::to_owned).collect()))
}

/// Takes idle ones out of a picture of the GPUs, as if they were destroyed.
pub(super) fn take_out(devices: &mut [Device], leases: &mut Vec<Lease>, which: impl Fn(&Lease) -> bool) -> Vec<Lease> {
    let gone: Vec<Lease> = leases.extract_if(.., |lease| lease.may_be_evicted() && which(lease)).collect();
    for device in devices {
        let there = |instance: &Instance| gone.iter().any(|lease| lease.is_at(&device.uuid, instance));
        device.instances.retain(|instance| !there(instance));
    }
    gone
}
