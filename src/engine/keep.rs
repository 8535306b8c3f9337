//! Slices that an administrator keeps: cut for nobody yet, or given to us. A container that gets one has a lease of its own
//! beside the record that keeps it, and leaves the slice as it was.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::cut::Cut;
use crate::gpu::{Device, Instance};
use crate::host;
use crate::lease::{Lease, Slice, State, Step, Way};
use crate::request::{GpuSelector, Want};
use crate::store::Lock;

use super::choose::usable;
use super::{ACQUIRE_LOCK_WAIT, Action, Engine, Failure, RELEASE_PAUSES, action, audit, audited, new_holder};

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
    /// For messages.
    pub fn sentence(&self, device: &Device) -> String {
        let reason = self.reason.as_deref().map(|reason| format!(" ({reason})")).unwrap_or_default();
        format!("{} is cordoned{reason}; migctl uncordon {} opens it again", device.label(), device.index)
    }
}

/// A GPU instance by GPU UUID and id.
pub type Place = (String, u32);

/// What became of one GPU instance that was to be destroyed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Destroyed {
    /// It is gone.
    Done,
    /// The driver calls it in use: it is as it was.
    Unchanged(String),
    /// Its compute instances are gone, it is not: gc goes on with it.
    Half(String),
}

impl Engine<'_> {
    /// Cuts GPU instances and keeps them, all or none, at the best placements or all from `start` on. One record each. A
    /// cordoned GPU is used only when it is named.
    pub fn create(
        &self,
        cuts: &[Cut],
        gpu: Option<&GpuSelector>,
        start: Option<u32>,
        reserved_for: Option<u32>,
    ) -> Result<Vec<Lease>, Failure> {
        let lock = self.store.lock(ACQUIRE_LOCK_WAIT)?;
        self.store.begin_boot(&lock, &host::boot_id()?)?;
        self.reap(&lock)?;
        let cordons = if gpu.is_some() { Cordons::new() } else { self.cordons()? };
        let mut devices = usable(self.managed_gpus()?, gpu, &cordons, &[])?;
        if let Some(start) = start {
            for profile in devices.iter_mut().flat_map(|device| &mut device.profiles) {
                profile.placements.retain(|placement| placement.start == start);
            }
            devices.iter_mut().for_each(|device| device.profiles.retain(|profile| !profile.placements.is_empty()));
        }
        self.create_locked(&lock, cuts, &devices, reserved_for)
    }

    /// The same under a lock that is held already, with leases in step.
    pub(super) fn create_locked(
        &self,
        lock: &Lock,
        cuts: &[Cut],
        devices: &[Device],
        reserved_for: Option<u32>,
    ) -> Result<Vec<Lease>, Failure> {
        let wants: Vec<Want> = cuts.iter().map(|cut| cut.want.clone()).collect();
        let before = self.leases()?;
        let places = self.place(devices, &before, &wants)?;
        let mut pending = Vec::new();
        for (cut, place) in cuts.iter().zip(places) {
            let slices = match cut.computes.as_slice() {
                [] => vec![place],
                computes => computes.iter().map(|c| place.clone().with_compute(Some(*c))).collect(),
            };
            let lease = self.new_lease(&new_holder(Way::Create, std::process::id()), slices)?;
            pending.push(Lease { reserved_for, ..lease });
        }
        for at in 0..pending.len() {
            let cut = self
                .store
                .put(lock, &pending[at].token, &pending[at])
                .map_err(Failure::from)
                .and_then(|()| self.cut(lock, &mut pending[at], &before).map_err(|(_, failure)| failure));
            if let Err(failure) = cut {
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
            audit("create", &lease.holder, json!({"token": lease.token, "slices": audited(lease)}));
        }
        self.look_afresh(lock);
        Ok(pending)
    }

    /// Destroys GPU instances with their compute instances, whoever cut them. Refuses up front, and changes nothing, when
    /// one is held or in use, unless forced; a holder whose slice is destroyed all the same keeps its minors until it ends.
    pub fn destroy_instances(&self, places: &[Place], force: bool) -> Result<Vec<Destroyed>, Failure> {
        let lock = self.store.lock(ACQUIRE_LOCK_WAIT)?;
        self.store.begin_boot(&lock, &host::boot_id()?)?;
        self.reap(&lock)?;
        self.destroy_locked(&lock, places, force)
    }

    /// The same under a lock that is held already, with leases in step.
    pub(super) fn destroy_locked(&self, lock: &Lock, places: &[Place], force: bool) -> Result<Vec<Destroyed>, Failure> {
        let devices = self.managed_gpus()?;
        let mut found = Vec::new();
        let mut refusals = Vec::new();
        for (gpu, gi) in places {
            let Some((device, instance)) = find(&devices, gpu, *gi) else {
                return Err(Failure::BadRequest(format!(
                    "there is no GPU instance {gi} on {gpu}; nothing was destroyed"
                )));
            };
            refusals.extend(self.why_not_destroy(device, instance)?);
            found.push((device, instance));
        }
        if !force && !refusals.is_empty() {
            return Err(Failure::NoRoom(format!("{}; nothing was destroyed", refusals.join("; "))));
        }
        let destroyed = found.into_iter().map(|(device, instance)| self.destroy_one(lock, device, instance)).collect();
        self.look_afresh(lock);
        destroyed
    }

    /// Why a GPU instance should stay, if it should.
    pub fn why_not_destroy(&self, device: &Device, instance: &Instance) -> Result<Option<String>, Failure> {
        let name = format!("GPU instance {} on {}", instance.id, device.label());
        let leases = self.leases()?;
        let holder =
            leases.iter().filter(|lease| lease.state != State::Static).find(|lease| is_of(lease, device, instance));
        if let Some(lease) = holder {
            return Ok(Some(format!("{name} is held by {}", lease.held_by())));
        }
        let user = self.user_in(&device.uuid, device.minor, instance)?;
        Ok(user.map(|pid| format!("{name} is in use by process {pid} ({})", host::process_name(pid))))
    }

    fn destroy_one(&self, lock: &Lock, device: &Device, instance: &Instance) -> Result<Destroyed, Failure> {
        let mut before = self.leases()?;
        before.retain(|lease| is_of(lease, device, instance));
        let kept = before.iter().position(|lease| lease.state == State::Static).map(|at| before.remove(at));
        // With all of its compute instances as they are now: they may be a rival's work of this minute.
        let mut record = match &kept {
            Some(kept) => kept.clone(),
            None => self.new_lease(&new_holder(Way::Adopt, std::process::id()), Vec::new())?,
        };
        record.slices = slices_of(device, instance).ok_or_else(|| unlisted(device, instance))?;
        for slice in &mut record.slices {
            slice.ours = true;
        }
        let mut pauses = RELEASE_PAUSES.iter();
        loop {
            let done = self.free(lock, record.clone(), "destroyed by migctl");
            let half = || {
                self.gpu
                    .instances(&device.uuid)
                    .map(|all| all.iter().all(|i| i.id != instance.id || i.compute.is_empty()))
            };
            match done.result {
                "freed" => break,
                "busy" if half()? => return Ok(Destroyed::Half(done.reason)),
                "busy" => match pauses.next() {
                    // Nobody else can go on meanwhile: half a second is what a destroy itself takes.
                    Some(pause) => std::thread::sleep((*pause).min(Duration::from_millis(300))),
                    None => {
                        match &kept {
                            Some(kept) => self.store.put(lock, &kept.token, kept)?,
                            None => self.store.remove(lock, &record.token, None)?,
                        }
                        return Ok(Destroyed::Unchanged(done.reason));
                    }
                },
                _ => return Ok(Destroyed::Half(done.reason)),
            }
        }
        for mut lease in before {
            lease.state = State::Quarantined;
            lease.reason = Some("its slice was destroyed by migctl".into());
            for slice in lease.slices.iter_mut().filter(|slice| slice.is_at(&device.uuid, instance)) {
                slice.step = Step::Gone;
            }
            self.store.put(lock, &lease.token, &lease)?;
        }
        audit("destroy", &new_holder(Way::Create, std::process::id()), json!({"slices": audited(&record)}));
        Ok(Destroyed::Done)
    }

    /// Keeps an existing GPU instance that mig-hook did not create. It may be in use: then it is given to nobody yet.
    pub fn adopt(&self, gpu: &str, gi: u32) -> Result<Lease, Failure> {
        let lock = self.store.lock(ACQUIRE_LOCK_WAIT)?;
        self.store.begin_boot(&lock, &host::boot_id()?)?;
        let devices = self.managed_gpus()?;
        let Some((device, instance)) = find(&devices, gpu, gi) else {
            return Err(Failure::BadRequest(format!("there is no GPU instance {gi} on {gpu}")));
        };
        let name = format!("GPU instance {gi} on {}", device.label());
        if let Some(lease) = self.leases()?.iter().find(|lease| is_of(lease, device, instance)) {
            let why = if lease.state == State::Static {
                "kept already".into()
            } else {
                format!("held by {}", lease.held_by())
            };
            return Err(Failure::NoRoom(format!("{name} is {why}")));
        }
        if instance.compute.is_empty() {
            return Err(Failure::BadRequest(format!(
                "{name} has no compute instance, so nobody could use it; migctl destroy {}/{gi} takes it away",
                device.index
            )));
        }
        let slices = slices_of(device, instance).ok_or_else(|| unlisted(device, instance))?;
        let lease = self.new_lease(&new_holder(Way::Adopt, std::process::id()), slices)?;
        let lease = Lease { state: State::Static, slices: self.with_minors(lease.slices)?, ..lease };
        self.store.put(&lock, &lease.token, &lease)?;
        audit("adopt", &lease.holder, json!({"token": lease.token, "slices": audited(&lease)}));
        self.look_afresh(&lock);
        Ok(lease)
    }

    fn with_minors(&self, mut slices: Vec<Slice>) -> Result<Vec<Slice>, Failure> {
        for slice in &mut slices {
            if let (Some(gi), Some(ci)) = (slice.gi, slice.ci) {
                slice.gi_minor = Some(self.host.instance_minor(slice.gpu_minor, gi)?);
                slice.ci_minor = Some(self.host.compute_minor(slice.gpu_minor, gi, ci)?);
            }
        }
        Ok(slices)
    }

    /// Forgets kept slices that are not there any more: the GPU was reset, or another tool destroyed them.
    pub(super) fn drop_vanished(
        &self,
        lock: &Lock,
        devices: &[Device],
        leases: &mut Vec<Lease>,
    ) -> Result<Vec<Action>, Failure> {
        let mut dropped = Vec::new();
        for lease in take_vanished(devices, leases) {
            self.store.remove(lock, &lease.token, None)?;
            let why = "it is not there any more: its GPU was reset, or another tool destroyed it";
            audit("lost", &lease.holder, json!({"token": lease.token, "reason": why, "slices": audited(&lease)}));
            dropped.push(action(&lease, "freed", why));
        }
        Ok(dropped)
    }

    /// Kept slices that have gone, and the CDI spec, where there is either: done when the leases themselves are in step. A
    /// failure stops nothing.
    pub(super) fn look_afresh(&self, lock: &Lock) -> Vec<Action> {
        let look = || {
            let mut leases = self.leases()?;
            if self.settings.cdi_spec.is_none() && leases.iter().all(|lease| lease.state != State::Static) {
                return Ok(Vec::new());
            }
            let devices = self.managed_devices()?;
            let dropped = self.drop_vanished(lock, &devices, &mut leases)?;
            self.publish(lock, &devices, &leases);
            Ok(dropped)
        };
        look().unwrap_or_else(|failure: Failure| {
            tracing::warn!("kept slices and the CDI spec were not looked at: {failure}");
            Vec::new()
        })
    }

    /// The GPUs that are closed to new holders.
    pub fn cordons(&self) -> Result<Cordons, Failure> {
        Ok(self.store.cordons()?)
    }

    /// Closes a GPU to new holders, or opens it again with `None`. What runs there goes on. False when it was so already.
    pub fn cordon(&self, gpu: &str, cordon: Option<Cordon>) -> Result<bool, Failure> {
        let lock = self.store.lock(ACQUIRE_LOCK_WAIT)?;
        self.store.begin_boot(&lock, &host::boot_id()?)?;
        let mut cordons = self.cordons()?;
        let changed = match cordon {
            Some(cordon) if !cordons.contains_key(gpu) => cordons.insert(gpu.to_owned(), cordon).is_none(),
            Some(_) => false,
            None => cordons.remove(gpu).is_some(),
        };
        self.store.put_cordons(&lock, &cordons)?;
        Ok(changed)
    }
}

/// A GPU instance of these GPUs.
fn find<'a>(devices: &'a [Device], gpu: &str, gi: u32) -> Option<(&'a Device, &'a Instance)> {
    let device = devices.iter().find(|device| device.uuid == gpu)?;
    Some((device, device.instances.iter().find(|instance| instance.id == gi)?))
}

/// Whether a lease has, or keeps, that GPU instance.
fn is_of(lease: &Lease, device: &Device, instance: &Instance) -> bool {
    lease.slices.iter().any(|slice| slice.is_at(&device.uuid, instance))
}

/// A GPU instance as a record has it: a slice for each compute instance, or one without. `None` for an unknown profile.
fn slices_of(device: &Device, instance: &Instance) -> Option<Vec<Slice>> {
    if instance.compute.is_empty() {
        let planned = Slice::planned(device, device.profile(instance.profile)?, instance.placement);
        return Some(vec![Slice { gi: Some(instance.id), step: Step::DestroyingInstance, ..planned }]);
    }
    instance.compute.iter().map(|compute| Slice::located(device, instance, compute)).collect()
}

fn unlisted(device: &Device, instance: &Instance) -> Failure {
    let (label, gi, profile) = (device.label(), instance.id, instance.profile.0);
    Failure::BadRequest(format!("GPU instance {gi} has profile {profile}, which {label} does not list"))
}

/// Takes out of `leases` the kept slices that are not there any more.
pub(super) fn take_vanished(devices: &[Device], leases: &mut Vec<Lease>) -> Vec<Lease> {
    let vanished = |lease: &mut Lease| {
        lease.state == State::Static && lease.slices.iter().any(|slice| has_vanished(slice, devices))
    };
    leases.extract_if(.., vanished).collect()
}

/// Whether a slice that was there is not, on a GPU that was read.
fn has_vanished(slice: &Slice, devices: &[Device]) -> bool {
    let Some(device) = devices.iter().find(|device| device.uuid == slice.gpu) else { return false };
    let same = |instance: &Instance| {
        slice.is_at(&device.uuid, instance) && instance.compute.iter().any(|c| Some(&c.uuid) == slice.uuid.as_ref())
    };
    !device.is_closed() && !device.instances.iter().any(same)
}
