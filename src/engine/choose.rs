//! Which slices a request gets: existing ones where they may be taken, else the best placements for new ones. Reads GPU
//! and leases; changes nothing. What `acquire` does and what `plan` tells are decided here.

use serde::Serialize;

use crate::config::{Foreign, Settings};
use crate::gpu::{Device, GpuError, Instance, MigMode};
use crate::lease::{Lease, Slice, State};
use crate::placement::{self, Choice, Held, NoPlace, Policy, Reason, Room, Window};
use crate::profile;
use crate::request::{GpuSelector, Request, Want};

use super::{Cordons, Engine, Failure, idle};

/// What kind of refusal it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// The settings, or the lack of privilege, forbid it.
    NotAllowed,
    /// There is no GPU, or none that is meant.
    NoGpu,
    /// MIG mode is off, or the GPU has none.
    MigOff,
    /// No GPU that may serve it offers such a slice.
    NotOffered,
    /// Offered, but more than these GPUs hold when nothing else runs.
    NeverFits,
    /// The slice that is named does not exist, or is one of several in a GPU instance.
    NoSuchSlice,
    /// The slice that is named is held.
    Held,
    /// The slice that is named is kept for another user.
    Reserved,
    /// The slice that is named was not created by mig-hook, nor given to it.
    Foreign,
    /// A process uses the slice that is named.
    InUse,
    /// Something has to end first.
    NoRoom,
    /// Enough is free, but not in the right places.
    Fragmented,
    /// An administrator has closed the GPUs to new holders.
    Cordoned,
    /// Others wait for it, who were overtaken as often as may be.
    Barrier,
    /// The driver has just refused on every GPU.
    Failing,
}

/// Why an alternative of a request, or all of it, can't be met as things are.
#[derive(Debug, Clone, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Refusal {
    /// What kind of refusal it is.
    pub kind: Kind,
    /// The whole sentence.
    pub sentence: String,
}

/// Why nothing was chosen.
#[derive(Debug)]
pub(super) enum Unmet {
    /// The answer is no: one refusal for each alternative, or one for them all.
    Refused(Vec<Refusal>),
    /// There is no answer.
    Failed(Failure),
}

/// The slices for one alternative of a request.
#[derive(Debug)]
pub(super) struct Chosen {
    /// One for each want, in their order.
    pub slices: Vec<Slice>,
    /// Why the alternatives before it were not taken, each in turn.
    pub passed: Vec<Refusal>,
    /// Tokens of the idle ones that have to go first.
    pub evicted: Vec<String>,
}

/// The process that uses an existing GPU instance, if one does.
pub(super) type UserOf<'f> = &'f dyn Fn(&Device, &Instance) -> Result<Option<u32>, Failure>;

impl Refusal {
    pub(super) fn new(kind: Kind, sentence: impl Into<String>) -> Refusal {
        Refusal { kind, sentence: sentence.into() }
    }

    /// One for several: a sentence each, and of the least final kind, since what may fit later is worth another try.
    pub(super) fn joined(refusals: &[Refusal]) -> Refusal {
        let kind = refusals.iter().map(|refusal| refusal.kind).min_by_key(|kind| kind.finality());
        let sentences: Vec<&str> = refusals.iter().map(|refusal| refusal.sentence.as_str()).collect();
        Refusal::new(kind.unwrap_or(Kind::NoRoom), sentences.join("; or else "))
    }
}

/// Whether another try may help.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Finality {
    Later,
    Forbidden,
    Never,
}

impl Kind {
    fn finality(self) -> Finality {
        match self {
            Kind::NotAllowed => Finality::Forbidden,
            Kind::NoGpu | Kind::MigOff | Kind::NotOffered | Kind::NeverFits | Kind::NoSuchSlice => Finality::Never,
            Kind::Held | Kind::Reserved | Kind::Foreign | Kind::InUse => Finality::Later,
            Kind::NoRoom | Kind::Fragmented | Kind::Cordoned | Kind::Barrier | Kind::Failing => Finality::Later,
        }
    }
}

impl From<Refusal> for Failure {
    fn from(refusal: Refusal) -> Failure {
        match refusal.kind.finality() {
            Finality::Later => Failure::NoRoom(refusal.sentence),
            Finality::Forbidden => Failure::NotAllowed(refusal.sentence),
            Finality::Never => Failure::BadRequest(refusal.sentence),
        }
    }
}

impl From<Unmet> for Failure {
    fn from(unmet: Unmet) -> Failure {
        match unmet {
            Unmet::Refused(refusals) => Refusal::joined(&refusals).into(),
            Unmet::Failed(failure) => failure,
        }
    }
}

impl From<Refusal> for Unmet {
    fn from(refusal: Refusal) -> Unmet {
        Unmet::Refused(vec![refusal])
    }
}

impl From<Failure> for Unmet {
    fn from(failure: Failure) -> Unmet {
        Unmet::Failed(failure)
    }
}

impl From<GpuError> for Unmet {
    fn from(error: GpuError) -> Unmet {
        Unmet::Failed(error.into())
    }
}

impl Engine<'_> {
    /// The GPUs that we manage, with the profiles that containers may ask for.
    pub(super) fn managed_devices(&self) -> Result<Vec<Device>, Unmet> {
        let mut devices = self.managed()?;
        if let Some(allowed) = &self.settings.profiles {
            devices.iter_mut().for_each(|d| d.profiles.retain(|p| allowed.contains(&p.name)));
        }
        Ok(devices)
    }

    /// The GPUs that we manage, with everything that they offer.
    pub fn managed_gpus(&self) -> Result<Vec<Device>, Failure> {
        Ok(self.managed()?)
    }

    fn managed(&self) -> Result<Vec<Device>, Unmet> {
        let devices = self.gpu.devices()?;
        Ok(managed_of(self.settings, devices).map_err(|refusal| self.with_left_out(refusal))?)
    }

    /// A refusal may be for the lack of a GPU that fails now: that is said, and no reason never to ask again.
    fn with_left_out(&self, refusal: Refusal) -> Refusal {
        let left_out: Vec<String> =
            self.gpu.left_out().iter().map(|(index, why)| format!("; GPU {index} is left out: {why}")).collect();
        match refusal.kind.finality() {
            _ if left_out.is_empty() => refusal,
            Finality::Never => Refusal::new(Kind::Failing, refusal.sentence + &left_out.concat()),
            _ => Refusal::new(refusal.kind, refusal.sentence + &left_out.concat()),
        }
    }

    /// Refuses what the settings forbid, whatever is there.
    pub(super) fn check_limits(&self, request: &Request) -> Result<(), Refusal> {
        let most = request.alternatives.iter().map(Vec::len).max().unwrap_or(0);
        let limit = self.settings.slices_per_container;
        if most > limit as usize {
            let why = format!("{request} asks for {most} slices; limits.slices_per_container allows {limit}");
            return Err(Refusal::new(Kind::NotAllowed, why));
        }
        let Some(allowed) = &self.settings.profiles else { return Ok(()) };
        let names = request.alternatives.iter().flatten().filter_map(|want| match want {
            Want::Profile(name) => Some(name),
            _ => None,
        });
        match names.into_iter().find(|name| !allowed.contains(name)) {
            None => Ok(()),
            Some(name) => {
                let why = format!("profile {name} is not allowed here; limits.profiles allows {}", allowed.join(", "));
                Err(Refusal::new(Kind::NotAllowed, why))
            }
        }
    }

    /// The slices for a request on these GPUs with these leases.
    pub(super) fn decide(
        &self,
        devices: Vec<Device>,
        leases: &[Lease],
        request: &Request,
        uid: Option<u32>,
        unusable: &[(String, String)],
    ) -> Result<Chosen, Unmet> {
        let users = self.users();
        let user_of = |device: &Device, instance: &Instance| users.besides_agents(&device.uuid, device.minor, instance);
        let chosen = self
            .usable_devices(devices, request, unusable)
            .and_then(|devices| self.choose(&devices, leases, request, uid, &user_of));
        chosen.map_err(|unmet| match unmet {
            Unmet::Refused(mut refusals) => {
                let last = refusals.pop().map(|refusal| self.with_left_out(refusal));
                Unmet::Refused(refusals.into_iter().chain(last).collect())
            }
            failed => failed,
        })
    }

    /// Those GPUs that may serve the request.
    pub(super) fn usable_devices(
        &self,
        devices: Vec<Device>,
        request: &Request,
        unusable: &[(String, String)],
    ) -> Result<Vec<Device>, Unmet> {
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
    fn choose(
        &self,
        devices: &[Device],
        leases: &[Lease],
        request: &Request,
        uid: Option<u32>,
        user_of: UserOf<'_>,
    ) -> Result<Chosen, Unmet> {
        let mut passed = Vec::new();
        for wants in &request.alternatives {
            match self.choose_all(devices, leases, wants, uid, user_of) {
                Ok(slices) => return Ok(Chosen { slices, passed, evicted: Vec::new() }),
                Err(Unmet::Refused(refusals)) => {
                    let choose = |devices: &[Device], leases: &[Lease]| {
                        self.choose_all(devices, leases, wants, uid, user_of).ok()
                    };
                    if let Some((slices, evicted)) = idle::evicting(devices, leases, choose) {
                        return Ok(Chosen { slices, passed, evicted });
                    }
                    passed.extend(refusals);
                }
                Err(failed) => return Err(failed),
            }
        }
        Err(Unmet::Refused(passed))
    }

    fn choose_all(
        &self,
        devices: &[Device],
        leases: &[Lease],
        wants: &[Want],
        uid: Option<u32>,
        user_of: UserOf<'_>,
    ) -> Result<Vec<Slice>, Unmet> {
        let found = self.existing(devices, leases, wants, uid, user_of)?;
        let to_cut = missing(wants, &found);
        if !to_cut.is_empty() && devices.iter().all(Device::is_closed) {
            let config = self.settings.dev_root.join("nvidia-caps/nvidia-cap1");
            let why = format!(
                "cutting a slice needs root, or the driver's capability mig/config: ask the administrator to let you open \
                 {} (setfacl -m u:UID:r), or to cut a slice for you that mig.uuid names",
                config.display()
            );
            return Err(Refusal::new(Kind::NotAllowed, why).into());
        }
        let mut cut = self.place(devices, leases, &to_cut)?.into_iter();
        Ok(found.into_iter().filter_map(|slice| slice.or_else(|| cut.next())).collect())
    }

    /// The existing slices that serve some of the wants.
    pub(super) fn existing(
        &self,
        devices: &[Device],
        leases: &[Lease],
        wants: &[Want],
        uid: Option<u32>,
        user_of: UserOf<'_>,
    ) -> Result<Vec<Option<Slice>>, Unmet> {
        let mut found: Vec<Option<Slice>> = Vec::new();
        for want in wants {
            let slice = self.locate(devices, leases, want, &found, uid, user_of)?;
            found.push(slice);
        }
        Ok(found)
    }

    /// An existing slice for `want`: named by UUID, or of that profile and a user's own, idle, or kept for whoever asks, in
    /// this order; or unused where the settings let foreign ones go.
    fn locate(
        &self,
        devices: &[Device],
        leases: &[Lease],
        want: &Want,
        found: &[Option<Slice>],
        uid: Option<u32>,
        user_of: UserOf<'_>,
    ) -> Result<Option<Slice>, Unmet> {
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
            leases.iter().find(|lease| lease.is_spare() && lease.is_at(&device.uuid, instance))
        };
        let instances = devices.iter().flat_map(|device| device.instances.iter().map(move |i| (device, i)));
        let mut fitting: Vec<(&Device, &Instance, Option<&Lease>)> = Vec::new();
        for (device, instance) in instances {
            match instance.compute.as_slice() {
                [compute] if wanted(device, instance, &compute.uuid) => {
                    fitting.push((device, instance, kept_here(device, instance)));
                }
                several if several.iter().any(|c| by_name && wanted(device, instance, &c.uuid)) => {
                    let why = format!(
                        "{want} is one of {} compute instances of GPU instance {} on {}; a container is given a whole GPU \
                         instance",
                        several.len(),
                        instance.id,
                        device.label()
                    );
                    return Err(Refusal::new(Kind::NoSuchSlice, why).into());
                }
                _ => {}
            }
        }
        fitting.sort_by_key(|(_, _, kept)| match kept {
            Some(kept) if kept.reserved_for.is_some() => 0,
            Some(kept) if kept.state == State::Idle => 1,
            Some(_) => 2,
            None => 3,
        });
        for (device, instance, kept) in fitting {
            if !by_name && kept.is_none() && self.settings.foreign == Foreign::Refuse {
                continue;
            }
            let refusal = match self.in_the_way(device, instance, kept, leases, found, uid) {
                None => match user_of(device, instance) {
                    Ok(user) => user.map(|pid| (Kind::InUse, format!("is in use by process {pid}"))),
                    Err(failure) => Some((Kind::Failing, format!("can't be looked at: {failure}"))),
                },
                refusal => refusal,
            };
            match refusal {
                None => {
                    // Of an idle one the new holder's end disposes, as it did when it was cut.
                    let ours = kept.is_some_and(|kept| kept.state == State::Idle);
                    let located = Slice::located(device, instance, &instance.compute[0]);
                    return Ok(located.map(|slice| Slice { ours, ..slice }));
                }
                Some((kind, why)) if by_name => return Err(Refusal::new(kind, format!("slice {want} {why}")).into()),
                Some(_) => {}
            }
        }
        match by_name {
            true => {
                let why = format!("there is no MIG slice {want} on the GPUs that may serve this container");
                Err(Refusal::new(Kind::NoSuchSlice, why).into())
            }
            false => Ok(None),
        }
    }

    /// Why an existing slice can't be given, processes aside.
    fn in_the_way(
        &self,
        device: &Device,
        instance: &Instance,
        kept: Option<&Lease>,
        leases: &[Lease],
        found: &[Option<Slice>],
        uid: Option<u32>,
    ) -> Option<(Kind, String)> {
        let mut holders = leases.iter().filter(|lease| !lease.is_spare());
        if let Some(lease) = holders.find(|lease| lease.is_at(&device.uuid, instance)) {
            return Some((Kind::Held, format!("is held by {}", lease.held_by())));
        }
        if found.iter().flatten().any(|slice| slice.is_at(&device.uuid, instance)) {
            return Some((Kind::Held, "is named twice".into()));
        }
        if let Some(owner) = kept.and_then(|kept| kept.reserved_for).filter(|owner| Some(*owner) != uid) {
            return Some((Kind::Reserved, format!("is reserved for uid {owner}")));
        }
        // What a user without root may take is what the modes of the nodes let open.
        if kept.is_none() && self.settings.foreign == Foreign::Refuse && self.settings.rootless.is_none() {
            let why = "was not created by mig-hook and may be somebody's; migctl adopt gives it to mig-hook, and setting \
                       slices.foreign = \"idle\" lets idle ones be taken";
            return Some((Kind::Foreign, why.into()));
        }
        None
    }

    /// New slices for all of `wants`, at the best placements.
    pub(super) fn place(&self, devices: &[Device], leases: &[Lease], wants: &[Want]) -> Result<Vec<Slice>, Refusal> {
        let rooms = rooms(devices, leases);
        let policy = self.policy();
        let placed =
            placement::candidates(&rooms, wants).and_then(|candidates| placement::place(&rooms, &candidates, policy));
        match placed {
            Ok(choices) => Ok(choices.iter().filter_map(|choice| planned(devices, choice)).collect()),
            Err(no_place) => Err(refused(&no_place, leases)),
        }
    }

    pub(super) fn policy(&self) -> Policy {
        Policy::named(&self.settings.policy).unwrap_or_default()
    }
}

/// The wants for which nothing was found.
pub(super) fn missing(wants: &[Want], found: &[Option<Slice>]) -> Vec<Want> {
    wants.iter().zip(found).filter(|(_, found)| found.is_none()).map(|(want, _)| want.clone()).collect()
}

/// A refusal of the placement, in words.
pub(super) fn refused(no_place: &NoPlace, leases: &[Lease]) -> Refusal {
    let kind = match no_place.reason {
        Reason::NotOffered { .. } => Kind::NotOffered,
        Reason::NeverFits => Kind::NeverFits,
        Reason::NoRoom => Kind::NoRoom,
        Reason::Fragmented => Kind::Fragmented,
    };
    Refusal::new(kind, no_place.explain(|held| holder_of(held, leases)))
}

/// Those GPUs that the settings let us manage.
pub fn managed(settings: &Settings, devices: Vec<Device>) -> Result<Vec<Device>, Failure> {
    Ok(managed_of(settings, devices)?)
}

fn managed_of(settings: &Settings, mut devices: Vec<Device>) -> Result<Vec<Device>, Refusal> {
    if devices.is_empty() {
        return Err(Refusal::new(Kind::NoGpu, "this machine has no NVIDIA GPU"));
    }
    devices.retain(|device| is_managed(settings, device));
    if devices.is_empty() {
        let names = settings.gpus.iter().flatten().cloned().collect::<Vec<_>>().join(", ");
        let why = format!("limits.gpus names no GPU of this machine: {names}");
        return Err(Refusal::new(Kind::NotAllowed, why));
    }
    Ok(devices)
}

/// Those GPUs on which something may be placed: the one that is named, MIG on, not cordoned, not found unusable.
pub(super) fn usable(
    mut devices: Vec<Device>,
    gpu: Option<&GpuSelector>,
    cordons: &Cordons,
    unusable: &[(String, String)],
) -> Result<Vec<Device>, Refusal> {
    if let Some(wanted) = gpu {
        let present: Vec<String> = devices.iter().map(|d| format!("{} {}", d.label(), d.uuid)).collect();
        devices.retain(|d| wanted.matches(d));
        if devices.is_empty() {
            let present = present.join(", ");
            return Err(Refusal::new(Kind::NoGpu, format!("mig.gpu names no GPU here: {wanted}; there are {present}")));
        }
    }
    let mut off: Vec<String> = devices.iter().filter(|d| d.mig != MigMode::On).map(mode_sentence).collect();
    devices.retain(|d| d.mig == MigMode::On);
    if devices.is_empty() {
        return Err(Refusal::new(Kind::MigOff, off.join("; ")));
    }
    off.extend(devices.iter().filter_map(|d| Some(cordons.get(&d.uuid)?.sentence(d))));
    devices.retain(|d| !cordons.contains_key(&d.uuid));
    if devices.is_empty() {
        return Err(Refusal::new(Kind::Cordoned, off.join("; ")));
    }
    devices.retain(|d| !unusable.iter().any(|(uuid, _)| *uuid == d.uuid));
    if devices.is_empty() {
        let reasons: Vec<String> = unusable.iter().map(|(_, why)| why.clone()).collect();
        return Err(Refusal::new(Kind::Failing, reasons.join("; ")));
    }
    Ok(devices)
}

/// The GPUs with what leases hold on them besides the instances that exist.
pub fn rooms<'a>(devices: &'a [Device], leases: &[Lease]) -> Vec<Room<'a>> {
    let room = |device: &'a Device| {
        let slices = leases.iter().flat_map(|lease| &lease.slices).filter(|s| s.gpu == device.uuid);
        let window = |s: &Slice| Window { profile: Some(s.profile), placement: s.placement };
        Room { device, occupied: slices.map(window).collect() }
    };
    devices.iter().map(room).collect()
}

/// Whether the settings give that GPU to us (`limits.gpus`).
pub fn is_managed(settings: &Settings, device: &Device) -> bool {
    let names = |name: &String| GpuSelector::parse(name).is_some_and(|selector| selector.matches(device));
    settings.gpus.as_ref().is_none_or(|managed| managed.iter().any(names))
}

pub(super) fn mode_sentence(device: &Device) -> String {
    let (what, remedy) = match device.mig {
        MigMode::Unsupported => ("has no MIG", "a GPU with MIG is needed".to_owned()),
        MigMode::EnablePending => {
            ("has MIG enabled only after a reset", format!("run: nvidia-smi --gpu-reset -i {}", device.index))
        }
        MigMode::DisablePending => {
            ("has MIG on only until a reset", format!("migctl mode on {} leaves it on", device.index))
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
    holder.map_or("not created by mig-hook".into(), standing)
}

/// A lease's holder and how it stands with it, as `container web` or `kept`.
fn standing(lease: &Lease) -> String {
    match (lease.state, lease.reserved_for) {
        (State::Static, Some(uid)) => format!("reserved for uid {uid}"),
        (State::Static, None) => "kept".into(),
        (State::Idle, _) => lease.reason.as_ref().map_or("idle".into(), |watched| format!("idle: {watched}")),
        (State::Quarantined, _) => format!("{}, quarantined", lease.held_by()),
        (State::Releasing, _) => {
            let ended = if lease.holder.container.is_some() { ", which has ended" } else { "" };
            let in_the_way = lease.reason.as_deref().and_then(|reason| reason.split_once("; ")).map(|(_, why)| why);
            let why = in_the_way.map_or_else(String::new, |why| format!(": {why}"));
            format!("{}{ended}{why}", lease.held_by())
        }
        (State::Pending | State::Active, _) => lease.held_by(),
    }
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
