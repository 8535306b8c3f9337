//! Taking GPU instances away on purpose: kept ones, foreign ones, and by force those that somebody has.

use std::collections::BTreeSet;

use serde_json::json;

use crate::gpu::{ComputeInstance, Device, Instance};
use crate::host;
use crate::lease::{Lease, State, Step, Way};
use crate::store::Lock;

use super::cordon::stop_command;
use super::freeing::{Obstacle, obstacle};
use super::keep::{find, name_of, slices_of};
use super::users::Users;
use super::{Engine, Failure, RELEASE_PAUSES, audit, audited, init_of, new_holder};

/// Why a record of what is destroyed on purpose is Releasing.
const WHY: &str = "destroyed by migctl";

/// A GPU instance by GPU UUID and id.
pub type Place = (String, u32);

/// What became of one GPU instance that was to be destroyed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Destroyed {
    /// It is gone.
    Done,
    /// The driver calls it in use: it is as it was.
    Unchanged(String),
    /// Compute instances are gone, it is not: gc goes on with it.
    Half(String),
}

impl Engine<'_> {
    /// Destroys GPU instances with their compute instances, whoever cut them. Refuses up front, and changes nothing, when
    /// one is held or in use, unless forced; a holder whose slice is destroyed all the same keeps its minors until it ends.
    pub fn destroy_instances(&self, places: &[Place], force: bool) -> Result<Vec<Destroyed>, Failure> {
        let lock = self.lock_for_change()?;
        self.destroy_locked(&lock, places, force)
    }

    /// The same under a lock that is held already, with leases in step.
    pub(super) fn destroy_locked(&self, lock: &Lock, places: &[Place], force: bool) -> Result<Vec<Destroyed>, Failure> {
        let devices = self.managed_gpus()?;
        let mut found = Vec::new();
        let mut refusals = Vec::new();
        let (leases, users) = (self.leases()?, self.users());
        for (gpu, gi) in places {
            let (device, instance) = find(&devices, gpu, *gi)?;
            refusals.extend(self.why_held(&leases, &users, device, instance)?);
            found.push((device, instance));
        }
        if !force && !refusals.is_empty() {
            return Err(refused(&refusals));
        }
        let destroyed = found.into_iter().map(|(device, instance)| self.destroy_one(lock, device, instance)).collect();
        self.look_afresh(lock);
        destroyed
    }

    /// Destroys one of several compute instances. Refuses when a process uses it, forced or not as the driver decides.
    pub fn destroy_compute(&self, gpu: &str, gi: u32, ci: u32, force: bool) -> Result<Destroyed, Failure> {
        let lock = self.lock_for_change()?;
        let devices = self.managed_gpus()?;
        let (device, instance) = find(&devices, gpu, gi)?;
        let name = format!("{}/{ci}", name_of(device, instance));
        let (kept, holders): (Vec<Lease>, Vec<Lease>) = self
            .leases()?
            .into_iter()
            .filter(|lease| lease.is_at(&device.uuid, instance))
            .partition(|lease| lease.state == State::Static);
        if let Some(lease) = holders.first() {
            // It has the GPU instance whole, as whoever shares it with a rival's compute instance does.
            return Err(Failure::NoRoom(format!("{name} is held by {}", lease.held_by())));
        }
        let minors: BTreeSet<u32> = self.host.compute_minor(device.minor, gi, ci).into_iter().collect();
        if let Some(pid) = host::holders_of(self.host.majors()?.caps, &minors).first().filter(|_| !force) {
            return Err(refused(&[format!("{name} is in use by process {pid} ({})", host::process_name(*pid))]));
        }
        // Left out of its record first: a record of what is not there is dropped, with all its other slices.
        for lease in &kept {
            let mut less = lease.clone();
            less.slices.retain(|slice| slice.ci != Some(ci));
            self.store.put(&lock, &lease.token, &less)?;
        }
        let mut what = self.new_lease(&new_holder(Way::Create, std::process::id()), slices_of(device, instance)?)?;
        what.slices.retain(|slice| slice.ci == Some(ci));
        let busy = match what.slices.first() {
            Some(slice) => obstacle(slice, self.gpu.destroy_compute(gpu, gi, ci)),
            None => Ok(None), // it has just gone
        };
        if !matches!(busy, Ok(None)) {
            for lease in &kept {
                self.store.put(&lock, &lease.token, lease)?;
            }
        }
        if let Some(Obstacle::Busy(why) | Obstacle::Held(why)) = busy? {
            return Ok(Destroyed::Unchanged(why));
        }
        audit("destroy", &what.holder, json!({"slices": audited(&what)}));
        self.look_afresh(&lock);
        Ok(Destroyed::Done)
    }

    /// Why a GPU instance should stay, if it should, with what ends the reason as far as known.
    pub fn why_not_destroy(&self, device: &Device, instance: &Instance) -> Result<Option<String>, Failure> {
        self.why_held(&self.leases()?, &self.users(), device, instance)
    }

    /// The same of what was looked at already.
    pub(super) fn why_held(
        &self,
        leases: &[Lease],
        users: &Users<'_>,
        device: &Device,
        instance: &Instance,
    ) -> Result<Option<String>, Failure> {
        let name = name_of(device, instance);
        let holder = leases.iter().filter(|lease| !lease.is_spare()).find(|lease| lease.is_at(&device.uuid, instance));
        if let Some(lease) = holder {
            let init = init_of(&lease.holder).filter(|init| host::alive(*init));
            let process = init.map(|i| format!("process {} ({})", i.pid, host::process_name(i.pid)));
            let remedy = stop_command(&lease.holder).map(|command| format!("end it with: {command}"));
            let known: Vec<String> = process.into_iter().chain(remedy).collect();
            let known = if known.is_empty() { String::new() } else { format!(", {}", known.join("; ")) };
            return Ok(Some(format!("{name} is held by {}{known}", lease.held_by())));
        }
        let user = users.of(&device.uuid, device.minor, instance)?;
        Ok(user.map(|pid| format!("{name} is in use by process {pid} ({})", host::process_name(pid))))
    }

    /// Takes one away, whoever has it.
    pub(super) fn destroy_one(&self, lock: &Lock, device: &Device, instance: &Instance) -> Result<Destroyed, Failure> {
        let mut holders = self.leases()?;
        holders.retain(|lease| lease.is_at(&device.uuid, instance));
        let kept = holders.iter().position(|lease| lease.state == State::Static).map(|at| holders.remove(at));
        let idle: Vec<Lease> = holders.extract_if(.., |lease| lease.state == State::Idle).collect();
        // With all of its compute instances as they are now: they may be a rival's work of this minute. Releasing, since
        // what is to become of it is decided: gc goes on where we are killed.
        let mut record = match &kept {
            Some(kept) => kept.clone(),
            None => self.new_lease(&new_holder(Way::Adopt, std::process::id()), Vec::new())?,
        };
        record.state = State::Releasing;
        record.slices = slices_of(device, instance)?;
        for slice in &mut record.slices {
            slice.ours = true;
            slice.gi_minor = self.host.instance_minor(device.minor, instance.id).ok();
            slice.ci_minor = slice.ci.and_then(|ci| self.host.compute_minor(device.minor, instance.id, ci).ok());
        }
        let mut pauses = RELEASE_PAUSES.iter();
        let failed = loop {
            let done = self.free(lock, record.clone(), WHY);
            match (done.result, pauses.next()) {
                ("freed", _) => break None,
                // Nobody else can go on meanwhile: less than a second, as a destroy itself may take.
                (_, Some(pause)) => std::thread::sleep(*pause),
                (_, None) => break Some(done.reason.trim_start_matches(WHY).trim_start_matches("; ").to_owned()),
            }
        };
        if let Some(why) = failed {
            let now = self.gpu.instances(&device.uuid)?;
            let ids = |compute: &[ComputeInstance]| compute.iter().map(|c| c.id).collect::<Vec<u32>>();
            if !now.iter().any(|i| i.id == instance.id && ids(&i.compute) == ids(&instance.compute)) {
                return Ok(Destroyed::Half(why));
            }
            match &kept {
                Some(kept) => self.store.put(lock, &kept.token, kept)?,
                None => self.store.remove(lock, &record.token, None)?,
            }
            return Ok(Destroyed::Unchanged(why));
        }
        for lease in idle {
            self.store.remove(lock, &lease.token, None)?;
        }
        for mut lease in holders {
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
}

fn refused(reasons: &[String]) -> Failure {
    Failure::NoRoom(format!("{}; nothing was destroyed", reasons.join("; and ")))
}
