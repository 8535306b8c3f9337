//! Slices that an administrator keeps: cut for nobody yet, or given to us. A container that gets one has a lease of its own
//! beside the record that keeps it, and leaves the slice as it was.

use serde_json::json;

use crate::cut::Cut;
use crate::gpu::{Device, GpuError, Instance};
use crate::lease::{Lease, Slice, State, Step, Way};
use crate::profile;
use crate::request::{GpuSelector, Want};
use crate::store::Lock;

use super::choose::usable;
use super::cutting::NotCut;
use super::{ACQUIRE_LOCK_WAIT, Action, Cordons, Engine, Failure, action, audit, audited, idle, new_holder};

/// Why a slice is lost.
pub(super) const VANISHED: &str = "it is not there any more: its GPU was reset, or another tool destroyed it";

impl Engine<'_> {
    /// Cuts GPU instances and keeps them, all or none, at the best placements. One record each. `start`: the first memory
    /// slice of a single one. A cordoned GPU is used only when it is named.
    pub fn create(&self, cuts: &[Cut], gpu: Option<&GpuSelector>, start: Option<u32>) -> Result<Vec<Lease>, Failure> {
        let lock = self.lock_for_change()?;
        let devices = self.to_cut_on(cuts, gpu, start)?;
        self.create_locked(&lock, cuts, &devices, None)
    }

    /// The slices that `create` would cut as things stand, a list for each GPU instance. Changes nothing.
    pub fn plan_create(
        &self,
        cuts: &[Cut],
        gpu: Option<&GpuSelector>,
        start: Option<u32>,
    ) -> Result<Vec<Vec<Slice>>, Failure> {
        let (mut devices, mut leases) = (self.to_cut_on(cuts, gpu, start)?, self.leases()?);
        idle::take_out(&mut devices, &mut leases, |_| true);
        self.take_vanished(&devices, &mut leases);
        self.planned(cuts, &devices, &leases)
    }

    /// The lock, with nothing under way and the records of this boot, of those that live: an administrator finds nothing in
    /// the way that is there for nobody.
    pub(super) fn lock_for_change(&self) -> Result<Lock, Failure> {
        drop(self.enter_and_reap()?);
        let lock = self.store.lock_alone(ACQUIRE_LOCK_WAIT)?;
        for lease in self.leases()?.into_iter().filter(|lease| lease.state == State::Idle) {
            self.free(&lock, lease, "migctl is about to change something");
        }
        Ok(lock)
    }

    /// Destroys what is idle, where a verb looks at the GPUs before it changes them.
    pub fn clear_idle(&self) -> Result<(), Failure> {
        self.lock_for_change().map(drop)
    }

    /// The GPUs on which something may be cut, with those placements that count.
    fn to_cut_on(&self, cuts: &[Cut], gpu: Option<&GpuSelector>, start: Option<u32>) -> Result<Vec<Device>, Failure> {
        let cordons = if gpu.is_some() { Cordons::new() } else { self.cordons()? };
        let devices = usable(self.managed_gpus()?, gpu, &cordons, &[])?;
        match (start, cuts) {
            (None, _) => Ok(devices),
            (Some(start), [cut]) => starting_at(devices, &cut.want, start),
            (Some(_), several) => Err(Failure::BadRequest(format!(
                "a start is for one GPU instance, and this asks for {}; cut them one after the other",
                several.len()
            ))),
        }
    }

    fn planned(&self, cuts: &[Cut], devices: &[Device], leases: &[Lease]) -> Result<Vec<Vec<Slice>>, Failure> {
        let wants: Vec<Want> = cuts.iter().map(|cut| cut.want.clone()).collect();
        let places = self.place(devices, leases, &wants)?;
        let slices = |(cut, place): (&Cut, Slice)| match cut.computes.as_slice() {
            [] => vec![place],
            computes => computes.iter().map(|c| place.clone().with_compute(Some(*c))).collect(),
        };
        Ok(cuts.iter().zip(places).map(slices).collect())
    }

    /// The same as `create` under a lock that is held already, with leases in step. `reserved_for`: the only user who gets
    /// them.
    pub(super) fn create_locked(
        &self,
        lock: &Lock,
        cuts: &[Cut],
        devices: &[Device],
        reserved_for: Option<u32>,
    ) -> Result<Vec<Lease>, Failure> {
        let mut before = self.leases()?;
        self.settle_vanished(lock, devices, &mut before)?;
        let mut pending = Vec::new();
        for slices in self.planned(cuts, devices, &before)? {
            let lease = self.new_lease(&new_holder(Way::Create, std::process::id()), slices)?;
            pending.push(Lease { reserved_for, ..lease });
        }
        for at in 0..pending.len() {
            if let Err(failure) = self.cut_to_keep(lock, &mut pending[at], &before) {
                for lease in pending.drain(..=at) {
                    self.free(lock, lease, "not all of what was asked for could be cut");
                }
                return Err(failure);
            }
        }
        // Until here a kill leaves nothing: whoever comes next destroys what is Pending.
        for lease in &mut pending {
            lease.state = State::Static;
            self.store.put(lock, &lease.token, lease)?;
            audit("create", &lease.holder, kept(lease));
        }
        self.look_afresh(lock);
        self.store.ring(); // who waits may have them
        Ok(pending)
    }

    /// Writes down what is to be cut, and cuts it.
    pub(super) fn cut_to_keep(&self, lock: &Lock, lease: &mut Lease, others: &[Lease]) -> Result<(), Failure> {
        let claim = self.claim_new(lock, lease)?;
        match self.cut(&claim, lease) {
            Err(NotCut { failure: Failure::OnGpu { error: GpuError::NotOffered(why), .. }, .. }) => {
                return Err(Failure::BadRequest(why));
            }
            Err(not_cut) => return Err(not_cut.failure),
            Ok(()) => self.check_minors(lease, others)?,
        }
        if lease.reserved_for.is_some() {
            self.store.put(lock, &lease.token, lease)?; // the minors of its nodes
            self.close_nodes(lease)?;
        }
        Ok(())
    }

    /// Keeps an existing GPU instance that mig-hook did not create. It may be in use: then it is given to nobody yet.
    pub fn adopt(&self, gpu: &str, gi: u32) -> Result<Lease, Failure> {
        let lock = self.lock_for_change()?;
        let devices = self.managed_gpus()?;
        let (device, instance) = find(&devices, gpu, gi)?;
        let name = name_of(device, instance);
        for lease in self.leases()?.iter().filter(|lease| lease.is_at(&device.uuid, instance)) {
            if lease.state == State::Static {
                return Err(Failure::NoRoom(format!("{name} is kept already")));
            }
            if lease.has_cut(&device.uuid, instance) {
                let who = lease.held_by();
                return Err(Failure::NoRoom(format!("{name} was cut for {who}, and is destroyed when that ends")));
            }
        }
        if instance.compute.is_empty() {
            return Err(Failure::BadRequest(format!(
                "{name} has no compute instance, so nobody could use it; migctl destroy {}/{gi} takes it away",
                device.index
            )));
        }
        let slices = slices_of(device, instance)?;
        let lease = self.new_lease(&new_holder(Way::Adopt, std::process::id()), slices)?;
        let lease = Lease { state: State::Static, slices: self.with_minors(lease.slices)?, ..lease };
        self.store.put(&lock, &lease.token, &lease)?;
        audit("adopt", &lease.holder, kept(&lease));
        self.look_afresh(&lock);
        self.store.ring();
        Ok(lease)
    }

    /// Gives an adopted GPU instance up again: it stays, and is nobody's.
    pub fn give_up(&self, gpu: &str, gi: u32) -> Result<Lease, Failure> {
        let lock = self.lock_for_change()?;
        let devices = self.managed_gpus()?;
        let (device, instance) = find(&devices, gpu, gi)?;
        let lease = self.kept_at(device, instance)?;
        if lease.holder.way != Way::Adopt {
            let (name, place) = (name_of(device, instance), format!("{}/{gi}", device.index));
            return Err(Failure::BadRequest(format!(
                "{name} was cut by migctl, not adopted; migctl destroy {place} takes it away"
            )));
        }
        if lease.reserved_for.is_some() {
            self.open_nodes(&lease)?;
        }
        self.store.remove(&lock, &lease.token, None)?;
        audit("give-up", &new_holder(Way::Adopt, std::process::id()), kept(&lease));
        self.look_afresh(&lock);
        Ok(lease)
    }

    /// Has GPU instances for the containers of one user only: free kept ones, then new ones; all or none.
    pub fn reserve(&self, cuts: &[Cut], gpu: Option<&GpuSelector>, uid: u32) -> Result<Vec<Lease>, Failure> {
        if let Some(cut) = cuts.iter().find(|cut| !cut.computes.is_empty()) {
            return Err(Failure::BadRequest(format!(
                "{cut} is a part of a GPU instance; what is reserved is a whole one, {}",
                cut.want
            )));
        }
        let lock = self.lock_for_change()?;
        let devices = self.to_cut_on(cuts, gpu, None)?;
        let mut leases = self.leases()?;
        self.settle_vanished(&lock, &devices, &mut leases)?;
        let (mut found, mut to_cut) = (Vec::new(), Vec::new());
        for cut in cuts {
            match self.free_kept(&devices, &leases, &cut.want, &found)? {
                Some(lease) => found.push(lease),
                None => to_cut.push(cut.clone()),
            }
        }
        let mut reserved = Vec::new();
        let marked = found.into_iter().try_for_each(|lease| {
            reserved.push(self.mark(&lock, lease, Some(uid))?);
            Ok(())
        });
        let cut = marked.and_then(|()| match to_cut.is_empty() {
            true => Ok(Vec::new()),
            false => self.create_locked(&lock, &to_cut, &devices, Some(uid)),
        });
        match cut {
            Ok(cut) => reserved.extend(cut),
            Err(failure) => {
                for lease in reserved {
                    self.mark(&lock, lease, None)?;
                }
                return Err(failure);
            }
        }
        Ok(reserved)
    }

    /// Has a kept GPU instance for the containers of that user only, or with `None` for everybody again.
    pub fn reserve_for(&self, gpu: &str, gi: u32, owner: Option<u32>) -> Result<Lease, Failure> {
        let lock = self.lock_for_change()?;
        let devices = self.managed_gpus()?;
        let (device, instance) = find(&devices, gpu, gi)?;
        let lease = self.kept_at(device, instance)?;
        let name = name_of(device, instance);
        if let (Some(theirs), Some(uid)) = (lease.reserved_for, owner)
            && theirs != uid
        {
            return Err(Failure::NoRoom(format!("{name} is reserved for uid {theirs}; end that first, with --end")));
        }
        // Its holder may be somebody else, who would keep it in spite of the reservation.
        if owner.is_some()
            && lease.reserved_for.is_none()
            && let Some(why) = self.why_not_destroy(device, instance)?
        {
            return Err(Failure::NoRoom(why));
        }
        self.mark(&lock, lease, owner)
    }

    /// The record that keeps a GPU instance.
    fn kept_at(&self, device: &Device, instance: &Instance) -> Result<Lease, Failure> {
        let mut leases = self.leases()?.into_iter();
        leases.find(|lease| lease.state == State::Static && lease.is_at(&device.uuid, instance)).ok_or_else(|| {
            let (name, place) = (name_of(device, instance), format!("{}/{}", device.index, instance.id));
            Failure::BadRequest(format!("{name} is not kept; migctl adopt {place} gives it to mig-hook"))
        })
    }

    /// A kept GPU instance that is whole, for everybody, and that nobody has or uses.
    fn free_kept(
        &self,
        devices: &[Device],
        leases: &[Lease],
        want: &Want,
        taken: &[Lease],
    ) -> Result<Option<Lease>, Failure> {
        let users = self.users();
        for device in devices {
            let Some(profile) = profile::resolve(device, want) else { continue };
            for instance in device.instances.iter().filter(|i| i.profile == profile.id && i.is_whole(profile)) {
                let mut of_it = leases.iter().filter(|lease| lease.is_at(&device.uuid, instance));
                let (Some(kept), None) = (of_it.next(), of_it.next()) else { continue };
                let free = kept.state == State::Static && kept.reserved_for.is_none() && !taken.contains(kept);
                if free && users.besides_agents(&device.uuid, device.minor, instance)?.is_none() {
                    return Ok(Some(kept.clone()));
                }
            }
        }
        Ok(None)
    }

    /// Writes down for whom a kept slice is, and lets that user alone open its nodes, or everybody. In an order in which the
    /// next look at the records closes what a killed run left open.
    fn mark(&self, lock: &Lock, before: Lease, owner: Option<u32>) -> Result<Lease, Failure> {
        let lease = Lease { reserved_for: owner, ..before.clone() };
        if owner.is_none() && before.reserved_for.is_some() {
            self.open_nodes(&lease)?;
        }
        self.store.put(lock, &lease.token, &lease)?;
        if owner.is_some()
            && let Err(failure) = self.close_nodes(&lease)
        {
            self.open_nodes(&lease)?;
            self.store.put(lock, &before.token, &before)?;
            return Err(failure);
        }
        if owner != before.reserved_for {
            self.store.ring();
            audit("reserve", &new_holder(lease.holder.way, std::process::id()), kept(&lease));
        }
        Ok(lease)
    }

    /// Lets the owner of a reserved slice alone open its capability nodes.
    fn close_nodes(&self, lease: &Lease) -> Result<(), Failure> {
        let majors = self.host.majors()?;
        for capability in lease.slices.iter().flat_map(Slice::capabilities) {
            self.host.own_capability(majors.caps, capability, lease.reserved_for)?;
        }
        Ok(())
    }

    /// Lets everybody open them again, as the driver has it; also of a slice that is not there any more: its numbers come
    /// again.
    pub(super) fn open_nodes(&self, lease: &Lease) -> Result<(), Failure> {
        let majors = self.host.majors()?;
        for capability in lease.slices.iter().flat_map(Slice::capabilities) {
            self.host.own_capability(majors.caps, capability, None)?;
        }
        Ok(())
    }

    /// Slices that are there, with the minors that they have now.
    pub(super) fn with_minors(&self, mut slices: Vec<Slice>) -> Result<Vec<Slice>, Failure> {
        for slice in &mut slices {
            if let (Some(gi), Some(ci)) = (slice.gi, slice.ci) {
                slice.gi_minor = Some(self.host.instance_minor(slice.gpu_minor, gi)?);
                slice.ci_minor = Some(self.host.compute_minor(slice.gpu_minor, gi, ci)?);
            }
        }
        Ok(slices)
    }

    /// Gives the nodes of a slice that has gone back to everybody. A /dev that can't be written stops no end of a lease.
    pub(super) fn open_nodes_or_warn(&self, lease: &Lease) {
        if let Err(failure) = self.open_nodes(lease) {
            tracing::warn!("the nodes of lease {} stay one user's: {failure}", lease.token);
        }
    }

    /// Forgets kept slices that are not there any more, and puts the leases of those that somebody has into quarantine: their
    /// minors stay theirs, and what lies in their place from now on is another's.
    pub(super) fn settle_vanished(
        &self,
        lock: &Lock,
        devices: &[Device],
        leases: &mut Vec<Lease>,
    ) -> Result<Vec<Action>, Failure> {
        let mut dropped = Vec::new();
        for lease in self.take_vanished(devices, leases) {
            if lease.reserved_for.is_some() {
                self.open_nodes_or_warn(&lease);
            }
            self.store.remove(lock, &lease.token, None)?;
            audit("lost", &lease.holder, json!({"token": lease.token, "reason": VANISHED, "slices": audited(&lease)}));
            dropped.push(action(&lease, "freed", VANISHED));
        }
        for lease in leases.iter_mut().filter(|lease| self.has_vanished(lease, devices)) {
            for slice in lease.slices.iter_mut().filter(|slice| self.is_gone(slice, devices)) {
                slice.step = step_of_lost(slice, devices);
            }
            lease.state = State::Quarantined;
            lease.reason = Some(VANISHED.into());
            self.store.put(lock, &lease.token, lease)?;
            audit("lost", &lease.holder, json!({"token": lease.token, "reason": VANISHED, "slices": audited(lease)}));
            dropped.push(action(lease, "quarantined", VANISHED));
        }
        Ok(dropped)
    }

    /// Takes out of `leases` the kept and the idle slices that are not there any more.
    pub(super) fn take_vanished(&self, devices: &[Device], leases: &mut Vec<Lease>) -> Vec<Lease> {
        leases.extract_if(.., |lease| lease.is_spare() && self.has_vanished(lease, devices)).collect()
    }

    /// Whether a slice that a lease should have is not there.
    pub(super) fn has_vanished(&self, lease: &Lease, devices: &[Device]) -> bool {
        let should_be_there = lease.is_spare() || lease.state == State::Active;
        should_be_there && lease.slices.iter().any(|slice| self.is_gone(slice, devices))
    }

    /// Whether a slice that was there is not, on a GPU that was read: also asked for by itself, since what goes and comes while
    /// a GPU is read may be missed.
    fn is_gone(&self, slice: &Slice, devices: &[Device]) -> bool {
        let Some(device) = devices.iter().find(|device| device.uuid == slice.gpu) else { return false };
        let is_it = |instance: &Instance| {
            slice.is_at(&device.uuid, instance) && instance.compute.iter().any(|c| Some(&c.uuid) == slice.uuid.as_ref())
        };
        let seen = device.is_closed() || device.instances.iter().any(is_it);
        let there = |gi| self.gpu.instance(&slice.gpu, gi).map(|there| there.is_some_and(|instance| is_it(&instance)));
        !seen && slice.gi.is_none_or(|gi| matches!(there(gi), Ok(false)))
    }

    /// Slices that have gone, nodes of reserved ones, and the CDI spec, where there is any: done when the leases
    /// themselves are in step. A failure stops nothing.
    pub(super) fn look_afresh(&self, lock: &Lock) -> Vec<Action> {
        let look = || {
            let mut leases = self.leases()?;
            let may_be_lost = |lease: &Lease| lease.is_spare() || lease.state == State::Active;
            if self.settings.cdi_spec.is_none() && !leases.iter().any(may_be_lost) {
                return Ok(Vec::new());
            }
            let devices = self.managed_devices()?;
            let dropped = self.settle_vanished(lock, &devices, &mut leases)?;
            let reserved = leases.iter().filter(|lease| lease.state == State::Static && lease.reserved_for.is_some());
            reserved.into_iter().try_for_each(|lease| self.close_nodes(lease))?;
            self.publish(lock, &devices, &leases);
            Ok(dropped)
        };
        look().unwrap_or_else(|failure: Failure| {
            tracing::warn!("whether slices are still there was not looked at: {failure}");
            Vec::new()
        })
    }
}

/// What there is left to do of a slice that is lost: a GPU instance without compute instances is still ours.
fn step_of_lost(slice: &Slice, devices: &[Device]) -> Step {
    let bare = |i: &Instance| Some(i.id) == slice.gi && i.profile == slice.profile && i.compute.is_empty();
    let here = devices.iter().filter(|device| device.uuid == slice.gpu);
    match here.flat_map(|device| &device.instances).any(|i| i.placement == slice.placement && bare(i)) {
        true => Step::DestroyingInstance,
        false => Step::Gone,
    }
}

/// A GPU instance of these GPUs.
pub(super) fn find<'a>(devices: &'a [Device], gpu: &str, gi: u32) -> Result<(&'a Device, &'a Instance), Failure> {
    let device = devices.iter().find(|device| device.uuid == gpu);
    let found = device.and_then(|device| Some((device, device.instances.iter().find(|i| i.id == gi)?)));
    found.ok_or_else(|| {
        let on = device.map_or_else(|| gpu.to_owned(), Device::label);
        Failure::BadRequest(format!("there is no GPU instance {gi} on {on}"))
    })
}

/// `GPU instance 0/7`, as every verb names it.
pub(super) fn name_of(device: &Device, instance: &Instance) -> String {
    format!("GPU instance {}/{}", device.index, instance.id)
}

/// A GPU instance as a record has it: a slice for each compute instance, or one without.
pub(super) fn slices_of(device: &Device, instance: &Instance) -> Result<Vec<Slice>, Failure> {
    let slices = || -> Option<Vec<Slice>> {
        if instance.compute.is_empty() {
            let planned = Slice::planned(device, device.profile(instance.profile)?, instance.placement);
            return Some(vec![Slice { gi: Some(instance.id), step: Step::DestroyingInstance, ..planned }]);
        }
        instance.compute.iter().map(|compute| Slice::located(device, instance, compute)).collect()
    };
    slices().ok_or_else(|| {
        let (label, profile) = (device.label(), instance.profile.0);
        Failure::BadRequest(format!("{} has profile {profile}, which {label} does not list", name_of(device, instance)))
    })
}

/// The GPUs whose profile for `want` can start there, with that placement only.
fn starting_at(mut devices: Vec<Device>, want: &Want, start: u32) -> Result<Vec<Device>, Failure> {
    let offering = |device: &Device| profile::resolve(device, want).map(|profile| profile.id);
    let starts = |device: &Device| {
        let profile = profile::resolve(device, want)?;
        let starts: Vec<String> = profile.placements.iter().map(|at| at.start.to_string()).collect();
        Some(format!("{} starts at {} on {}", profile.name, starts.join(", "), device.label()))
    };
    let known: Vec<String> = devices.iter().filter_map(starts).collect();
    if known.is_empty() {
        return Ok(devices); // none offers it, which placing tells better
    }
    for device in &mut devices {
        let wanted = offering(device);
        for profile in device.profiles.iter_mut().filter(|profile| Some(profile.id) == wanted) {
            profile.placements.retain(|placement| placement.start == start);
        }
    }
    devices.retain(|device| profile::resolve(device, want).is_some_and(|profile| !profile.placements.is_empty()));
    match devices.is_empty() {
        true => Err(Failure::BadRequest(format!("{want} cannot start at {start}: {}", known.join("; ")))),
        false => Ok(devices),
    }
}

/// What the audit tells of a record.
pub(super) fn kept(lease: &Lease) -> serde_json::Value {
    json!({"token": lease.token, "reserved_for": lease.reserved_for, "slices": audited(lease)})
}
