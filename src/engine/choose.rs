//! Which slices a request gets: existing ones where they may be taken, else the best placements for new ones. Reads GPU
//! and leases; changes nothing.

use crate::config::Foreign;
use crate::gpu::{Device, Instance, MigMode};
use crate::lease::{Lease, Slice, State};
use crate::placement::{self, Choice, Held, Policy, Reason, Room, Window};
use crate::profile;
use crate::request::{GpuSelector, Request, Want};

use super::{Cordons, Engine, Failure};

impl Engine<'_> {
    /// The GPUs that we manage, with the profiles that containers may ask for.
    pub(super) fn managed_devices(&self) -> Result<Vec<Device>, Failure> {
        let mut devices = self.managed_gpus()?;
        if let Some(allowed) = &self.settings.profiles {
            devices.iter_mut().for_each(|d| d.profiles.retain(|p| allowed.contains(&p.name)));
        }
        Ok(devices)
    }

    /// The GPUs that we manage, with everything that they offer.
    pub fn managed_gpus(&self) -> Result<Vec<Device>, Failure> {
        let mut devices = self.gpu.devices()?;
        if devices.is_empty() {
            return Err(Failure::BadRequest("this machine has no NVIDIA GPU".into()));
        }
        if let Some(managed) = &self.settings.gpus {
            devices.retain(|d| managed.iter().any(|name| names_device(name, d)));
            if devices.is_empty() {
                return Err(Failure::NotAllowed(format!(
                    "limits.gpus names no GPU of this machine: {}",
                    managed.join(", ")
                )));
            }
        }
        Ok(devices)
    }

    /// Those of them that may serve the request.
    pub(super) fn usable_devices(
        &self,
        devices: Vec<Device>,
        request: &Request,
        unusable: &[(String, String)],
    ) -> Result<Vec<Device>, Failure> {
        let mut devices = usable(devices, request.gpu.as_ref(), &self.cordons()?, unusable)?;
        if devices.iter().any(Device::is_closed) {
            for want in request.alternatives.iter().flatten() {
                let Want::Uuid(uuid) = want else { continue };
                let Some((gpu, instance)) = self.gpu.instance_of(uuid)? else { continue };
                devices
                    .iter_mut()
                    .filter(|d| d.uuid == gpu && d.is_closed())
                    .for_each(|d| d.instances.push(instance.clone()));
            }
        }
        Ok(devices)
    }

    /// The slices for the first alternative that can be met: existing ones where they may be taken, else new ones.
    pub(super) fn choose(
        &self,
        devices: &[Device],
        leases: &[Lease],
        request: &Request,
        uid: Option<u32>,
    ) -> Result<Vec<Slice>, Failure> {
        let mut refusals = Vec::new();
        for wants in &request.alternatives {
            match self.choose_all(devices, leases, wants, uid) {
                Ok(slices) => return Ok(slices),
                Err(refusal) => refusals.push(refusal),
            }
        }
        // One sentence each; the kind of the least final one: what may fit later is worth another try.
        let text = refusals.iter().map(ToString::to_string).collect::<Vec<_>>().join("; or else ");
        if refusals.iter().any(|r| matches!(r, Failure::NoRoom(_))) {
            Err(Failure::NoRoom(text))
        } else if refusals.iter().any(|r| matches!(r, Failure::NotAllowed(_))) {
            Err(Failure::NotAllowed(text))
        } else {
            Err(Failure::BadRequest(text))
        }
    }

    fn choose_all(
        &self,
        devices: &[Device],
        leases: &[Lease],
        wants: &[Want],
        uid: Option<u32>,
    ) -> Result<Vec<Slice>, Failure> {
        let mut found: Vec<Option<Slice>> = Vec::new();
        for want in wants {
            let slice = self.locate(devices, leases, want, &found, uid)?;
            found.push(slice);
        }
        let to_cut: Vec<Want> =
            wants.iter().zip(&found).filter(|(_, f)| f.is_none()).map(|(want, _)| want.clone()).collect();
        if !to_cut.is_empty() && devices.iter().all(Device::is_closed) {
            let config = self.settings.dev_root.join("nvidia-caps/nvidia-cap1");
            return Err(Failure::NotAllowed(format!(
                "cutting a slice needs root, or the driver's capability mig/config: ask the administrator to let you open \
                 {} (setfacl -m u:UID:r), or to cut a slice for you that mig.uuid names",
                config.display()
            )));
        }
        let mut cut = self.place(devices, leases, &to_cut)?.into_iter();
        Ok(found.into_iter().filter_map(|slice| slice.or_else(|| cut.next())).collect())
    }

    /// An existing slice for `want`: named by UUID, or of that profile and kept for whoever asks (a user's own before
    /// others), or idle where the settings let foreign ones go.
    fn locate(
        &self,
        devices: &[Device],
        leases: &[Lease],
        want: &Want,
        found: &[Option<Slice>],
        uid: Option<u32>,
    ) -> Result<Option<Slice>, Failure> {
        let wanted = |device: &Device, instance: &Instance, uuid: &str| match want {
            Want::Uuid(name) => name.eq_ignore_ascii_case(uuid) || *name == old_uuid(device, instance),
            Want::Profile(name) => {
                device.profile(instance.profile).is_some_and(|p| p.name == *name && instance.is_whole(p))
            }
            Want::Memory { bytes } => profile::resolve_memory(device, *bytes)
                .is_some_and(|p| p.id == instance.profile && instance.is_whole(p)),
        };
        let by_name = matches!(want, Want::Uuid(_));
        let kept_here = |device: &Device, instance: &Instance| {
            let here = |lease: &&Lease| lease.slices.iter().any(|s| s.is_at(&device.uuid, instance));
            leases.iter().filter(|lease| lease.state == State::Static).find(here)
        };
        let instances = devices.iter().flat_map(|device| device.instances.iter().map(move |i| (device, i)));
        let mut fitting: Vec<(&Device, &Instance, Option<&Lease>)> = Vec::new();
        for (device, instance) in instances {
            match instance.compute.as_slice() {
                [compute] if wanted(device, instance, &compute.uuid) => {
                    fitting.push((device, instance, kept_here(device, instance)));
                }
                several if several.iter().any(|c| by_name && wanted(device, instance, &c.uuid)) => {
                    return Err(Failure::BadRequest(format!(
                        "{want} is one of {} compute instances of GPU instance {} on {}; a container is given a whole GPU \
                         instance",
                        several.len(),
                        instance.id,
                        device.label()
                    )));
                }
                _ => {}
            }
        }
        fitting.sort_by_key(|(_, _, kept)| match kept {
            Some(kept) if kept.reserved_for.is_some() => 0,
            Some(_) => 1,
            None => 2,
        });
        for (device, instance, kept) in fitting {
            if !by_name && kept.is_none() && self.settings.foreign == Foreign::Refuse {
                continue;
            }
            match self.in_the_way(device, instance, kept, leases, found, uid)? {
                None => return Ok(Slice::located(device, instance, &instance.compute[0])),
                Some(why) if by_name => return Err(Failure::NoRoom(format!("slice {want} {why}"))),
                Some(_) => {}
            }
        }
        match by_name {
            true => Err(Failure::BadRequest(format!(
                "there is no MIG slice {want} on the GPUs that may serve this container"
            ))),
            false => Ok(None),
        }
    }

    /// Why an existing slice can't be given.
    fn in_the_way(
        &self,
        device: &Device,
        instance: &Instance,
        kept: Option<&Lease>,
        leases: &[Lease],
        found: &[Option<Slice>],
        uid: Option<u32>,
    ) -> Result<Option<String>, Failure> {
        let same = |s: &Slice| s.is_at(&device.uuid, instance);
        let mut holders = leases.iter().filter(|lease| lease.state != State::Static);
        if let Some(lease) = holders.find(|lease| lease.slices.iter().any(same)) {
            return Ok(Some(format!("is held by {}", lease.held_by())));
        }
        if found.iter().flatten().any(same) {
            return Ok(Some("is named twice".into()));
        }
        if let Some(owner) = kept.and_then(|kept| kept.reserved_for).filter(|owner| Some(*owner) != uid) {
            return Ok(Some(format!("is reserved for uid {owner}")));
        }
        // What a user without root may take is what the modes of the nodes let open.
        if kept.is_none() && self.settings.foreign == Foreign::Refuse && self.settings.rootless.is_none() {
            return Ok(Some(
                "was not created by mig-hook and may be somebody's; migctl adopt gives it to mig-hook, and setting \
                 slices.foreign = \"idle\" lets idle ones be taken"
                    .into(),
            ));
        }
        Ok(self.user_in(&device.uuid, device.minor, instance)?.map(|pid| format!("is in use by process {pid}")))
    }

    /// New slices for all of `wants`, at the best placements.
    pub(super) fn place(&self, devices: &[Device], leases: &[Lease], wants: &[Want]) -> Result<Vec<Slice>, Failure> {
        let rooms = rooms(devices, leases);
        let policy = Policy::named(&self.settings.policy).unwrap_or_default();
        let placed =
            placement::candidates(&rooms, wants).and_then(|candidates| placement::place(&rooms, &candidates, policy));
        match placed {
            Ok(choices) => Ok(choices.iter().filter_map(|choice| planned(devices, choice)).collect()),
            Err(refusal) => Err(match refusal.reason {
                Reason::NotOffered { .. } | Reason::NeverFits => {
                    Failure::BadRequest(refusal.explain(|_| String::new()))
                }
                Reason::NoRoom | Reason::Fragmented => Failure::NoRoom(refusal.explain(|held| holder_of(held, leases))),
            }),
        }
    }
}

/// Those GPUs on which something may be placed: the one that is named, MIG on, not cordoned, not found unusable.
pub(super) fn usable(
    mut devices: Vec<Device>,
    gpu: Option<&GpuSelector>,
    cordons: &Cordons,
    unusable: &[(String, String)],
) -> Result<Vec<Device>, Failure> {
    if let Some(wanted) = gpu {
        let present: Vec<String> = devices.iter().map(|d| format!("{} {}", d.label(), d.uuid)).collect();
        devices.retain(|d| wanted.matches(d));
        if devices.is_empty() {
            let present = present.join(", ");
            return Err(Failure::BadRequest(format!("mig.gpu names no GPU here: {wanted}; there are {present}")));
        }
    }
    let mut off: Vec<String> = devices.iter().filter(|d| d.mig != MigMode::On).map(mode_sentence).collect();
    devices.retain(|d| d.mig == MigMode::On);
    if devices.is_empty() {
        return Err(Failure::BadRequest(off.join("; ")));
    }
    off.extend(devices.iter().filter_map(|d| Some(cordons.get(&d.uuid)?.sentence(d))));
    devices.retain(|d| !cordons.contains_key(&d.uuid));
    if devices.is_empty() {
        return Err(Failure::NoRoom(off.join("; ")));
    }
    devices.retain(|d| !unusable.iter().any(|(uuid, _)| *uuid == d.uuid));
    if devices.is_empty() {
        let reasons: Vec<String> = unusable.iter().map(|(gpu, why)| format!("{gpu}: {why}")).collect();
        return Err(Failure::NoRoom(reasons.join("; ")));
    }
    Ok(devices)
}

/// The GPUs with what leases hold on them besides the instances that exist.
fn rooms<'a>(devices: &'a [Device], leases: &[Lease]) -> Vec<Room<'a>> {
    let room = |device: &'a Device| {
        let slices = leases.iter().flat_map(|lease| &lease.slices).filter(|s| s.gpu == device.uuid);
        let window = |s: &Slice| Window { profile: Some(s.profile), placement: s.placement };
        Room { device, occupied: slices.map(window).collect() }
    };
    devices.iter().map(room).collect()
}

fn names_device(name: &str, device: &Device) -> bool {
    GpuSelector::parse(name).is_some_and(|selector| selector.matches(device))
}

fn mode_sentence(device: &Device) -> String {
    let (what, remedy) = match device.mig {
        MigMode::Unsupported => ("has no MIG", "a GPU with MIG is needed".to_owned()),
        MigMode::EnablePending => {
            ("has MIG enabled only after a reset", format!("run: nvidia-smi --gpu-reset -i {}", device.index))
        }
        _ => ("has MIG mode off", format!("an administrator can turn it on: migctl mode on {}", device.index)),
    };
    format!("{} {what}; {remedy}", device.label())
}

/// The UUID format of drivers before branch 470.
fn old_uuid(device: &Device, instance: &Instance) -> String {
    let compute = instance.compute.first().map_or(0, |c| c.id);
    format!("MIG-{}/{}/{compute}", device.uuid, instance.id)
}

/// The slice that a choice means; `None` never, since choices are made from these devices.
fn planned(devices: &[Device], choice: &Choice) -> Option<Slice> {
    let device = devices.iter().find(|d| d.uuid == choice.gpu)?;
    Some(Slice::planned(device, device.profile(choice.profile)?, choice.placement))
}

/// Who has a taken window.
fn holder_of(held: &Held, leases: &[Lease]) -> String {
    let here = |lease: &&Lease| lease.slices.iter().any(|s| s.gpu == held.gpu && s.placement == held.placement);
    let holder = leases.iter().filter(here).min_by_key(|lease| lease.state == State::Static);
    holder.map_or("not created by mig-hook".into(), Lease::held_by)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_policy_that_the_settings_accept_is_one() {
        for name in crate::config::POLICIES {
            assert_eq!(serde_json::to_value(Policy::named(name).unwrap()).unwrap(), name);
        }
    }
}
