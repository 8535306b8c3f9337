//! What a container with a request would get now, and when nothing, why: the decision of `acquire` on what is there less
//! what it would free first. Changes nothing.

use serde::Serialize;

use crate::gpu::{Device, Instance, MigMode, Placement};
use crate::host;
use crate::inventory::Standing;
use crate::lease::{Holder, Lease, Slice, State, Verdict, Way};
use crate::placement::{self, Candidates, Choice, Policy, Room};
use crate::profile;
use crate::request::{Request, Want, format_wants};

use super::choose::{Chosen, Kind, Refusal, Unmet, missing, refused, rooms};
use super::freeing::{ABANDONED, ToDestroy, is_left_halfway};
use super::users::Users;
use super::{ACQUIRE_LOCK_WAIT, Engine, Failure, idle};

/// Most sets of holders whose end would make room.
const MAX_SETS: usize = 8;
/// Sets of holders that are looked at in the search for the smallest: all there are of one GPU's holders, and of some GPUs'.
const MAX_LOOKS: usize = 4_000;
/// Placements tried in each of these looks.
const TRIALS: u32 = 200;

/// What a request would get, or why it would get nothing.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Plan {
    /// How it ends.
    pub outcome: Outcome,
    /// Why a container's create would be refused: the very sentence; or what could not be looked at.
    pub refusal: Option<Refusal>,
    /// The user whose container it would be: slices that are reserved for this uid count.
    pub uid: Option<u32>,
    /// Policy that chooses among the places.
    pub policy: Policy,
    /// What the container would get, in the order of the request; empty unless it fits.
    pub slices: Vec<Planned>,
    /// Those of them that exist, with the minors of their capabilities.
    #[serde(skip)]
    pub existing: Vec<Slice>,
    /// What could still be cut on the GPUs on which something new would be cut.
    pub keeps: Vec<Keeps>,
    /// The alternatives of a request that has several, as far as they were looked at, and why each of these does not fit.
    pub refused_alternatives: Vec<Alternative>,
    /// What every create frees first, whatever it asks for: leases whose holders have ended.
    pub freed_first: Vec<Freed>,
    /// The GPUs that mig-hook manages, with what they offer to containers, less what would be freed first.
    pub gpus: Vec<GpuRoom>,
    /// Who has something on the GPUs that may serve a request that does not fit.
    #[serde(skip)]
    pub holders: Vec<Occupier>,
    /// The smallest sets of holders whose end would make it fit, as positions in `holders`, those with the least memory
    /// first; each set is enough by itself. At most eight; where there are too many to look at, one that has no holder to
    /// spare; none where none is known.
    pub ends: Vec<Vec<usize>>,
    /// How many wait in line for room (`migctl queue`): what is made is theirs first.
    pub in_line: usize,
    /// How long the request would wait in line before it is refused, by its `mig.wait` and the settings.
    pub would_wait_s: Option<u64>,
    /// What would fit now instead: the largest profiles of which one slice does. Not told while others wait for room.
    pub fits_now: Vec<FitsNow>,
}

/// An alternative that does not fit.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Alternative {
    /// As the request has it.
    pub wanted: String,
    /// Why it does not fit.
    #[serde(flatten)]
    pub refusal: Refusal,
}

/// How a plan ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// The container would get its slices.
    Fits,
    /// Its create would fail.
    Refused,
    /// Nothing speaks against it, but an ordinary user is not shown all of it.
    Unknown,
}

/// Where a slice comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum Source {
    /// It is cut for the container.
    New,
    /// It exists, kept for whoever asks.
    Kept,
    /// It exists, left by a holder that has ended, and not destroyed yet.
    Idle,
    /// It exists, kept for this user.
    Reserved,
    /// It exists, and mig-hook did not create it.
    Foreign,
}

/// A slice that a container would get.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Planned {
    /// What it is for, as the request has it.
    pub wanted: String,
    /// Where it comes from.
    pub source: Source,
    /// UUID of its GPU.
    pub gpu: String,
    /// NVML index of its GPU.
    pub gpu_index: u32,
    /// Product name of its GPU.
    pub gpu_name: String,
    /// Its profile.
    pub profile: String,
    /// Memory of the profile.
    pub memory_mib: u64,
    /// Its placement in memory slices; of size 0 where a user without root is not shown it.
    pub placement: Placement,
    /// Its GPU instance, if it exists. Of a new one the driver decides.
    pub gi: Option<u32>,
    /// Its compute instance, if it exists.
    pub ci: Option<u32>,
    /// Its UUID, if it exists.
    pub uuid: Option<String>,
    /// Why this one, or why there, in a line.
    pub why: String,
}

/// A number of slices of one profile.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Count {
    /// Its name.
    pub profile: String,
    /// How many, when nothing of another profile is cut.
    pub count: u32,
}

/// What a GPU has room for once the request is served.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Keeps {
    /// NVML index of the GPU.
    pub gpu_index: u32,
    /// One or the other of these, largest first: profiles without attribute, less those that another one outdoes in memory,
    /// compute and number.
    pub profiles: Vec<Count>,
}

/// A slice that a lease, or somebody without one, has.
#[derive(Debug, Clone, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct HeldSlice {
    /// NVML index of its GPU.
    pub gpu_index: u32,
    /// Its profile.
    pub profile: String,
    /// Its placement in memory slices.
    pub placement: Placement,
    /// Its GPU instance, where it has one.
    pub gi: Option<u32>,
}

/// A lease that every create frees first.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Freed {
    /// Its token.
    pub token: String,
    /// Who had it, in words.
    pub name: String,
    /// Why it is freed.
    pub reason: String,
    /// What it has.
    pub slices: Vec<HeldSlice>,
}

/// A GPU with what it offers to containers.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct GpuRoom {
    /// NVML index.
    pub index: u32,
    /// `GPU-…`.
    pub uuid: String,
    /// Product name.
    pub name: String,
    /// MIG mode now.
    pub mig: MigMode,
    /// Why nothing may be placed here now: MIG mode, a cordon, or the request names another GPU.
    pub closed: Option<Refusal>,
    /// Memory slices in all; `null` where the driver does not show them to this user.
    pub memory_slices: Option<u32>,
    /// Memory slices that are free.
    pub free_memory_slices: Option<u32>,
    /// What containers may ask for here.
    pub profiles: Vec<ProfileRoom>,
}

/// A profile on one GPU.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct ProfileRoom {
    /// Its name.
    pub name: String,
    /// Its memory.
    pub memory_mib: u64,
    /// How many more fit together now, when nothing of another profile is cut.
    pub fits: Option<u32>,
    /// How many the GPU holds at most.
    pub total: u32,
}

/// Somebody who has slices.
#[derive(Debug)]
pub struct Occupier {
    /// Its lease, or the record that keeps the slices; none of a slice that mig-hook knows nothing of.
    pub lease: Option<Lease>,
    /// How its slices stand.
    pub standing: Standing,
    /// A process that the driver lists in a slice that mig-hook knows nothing of.
    pub pid: Option<u32>,
    /// What it has.
    pub slices: Vec<HeldSlice>,
    /// What ends it, where migctl does.
    pub command: Option<String>,
}

/// A profile of which a slice fits now.
#[derive(Debug, PartialEq, Eq, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct FitsNow {
    /// Its name.
    pub profile: String,
    /// Its memory: `mig.memory` up to that much fits, too.
    pub memory_mib: u64,
}

/// What is there.
#[derive(Debug, Clone)]
struct Scene {
    devices: Vec<Device>,
    leases: Vec<Lease>,
}

/// Somebody whose end makes room.
#[derive(Debug, Clone, Copy)]
enum Occupant<'a> {
    /// A lease, or a record that keeps slices.
    Lease(&'a Lease),
    /// An instance that nobody has recorded.
    Foreign(&'a Device, &'a Instance),
}

impl Engine<'_> {
    /// What `acquire` would do for a container of that user. The driver may still refuse, and a capability that belongs to
    /// another lease be met, when it comes to cutting: then acquire goes on to other places.
    pub fn plan(&self, request: &Request, uid: Option<u32>) -> Result<Plan, Failure> {
        let mut plan = self.blank(uid);
        if let Err(refusal) = self.check_limits(request) {
            return Ok(plan.refused(request, vec![refusal]));
        }
        let lock = self.store.lock_existing(ACQUIRE_LOCK_WAIT)?;
        let leases = if self.is_outlived()? { Vec::new() } else { self.leases()? };
        let devices = match self.managed_devices() {
            Ok(devices) => devices,
            Err(Unmet::Refused(refusals)) => return Ok(plan.refused(request, refusals)),
            Err(Unmet::Failed(failure)) => return Err(failure),
        };
        let mut scene = Scene { devices, leases };
        plan.freed_first = self.take_ended(&mut scene)?;
        self.take_vanished(&scene.devices, &mut scene.leases);
        let holder = Holder { uid, ..Holder::new(Way::Shim) };
        let (in_line, decided) = self.decide_at_the_end(scene.devices.clone(), &scene.leases, (request, &holder));
        drop(lock);
        plan.in_line = in_line;
        plan.freed_first.extend(take_evicted(&mut scene, decided.as_ref().ok()));
        let usable = self.usable_devices(scene.devices.clone(), request, &[]).unwrap_or_default();
        plan.gpus = self.gpu_rooms(&scene, &usable)?;
        match decided {
            Ok(chosen) => self.explain_choice(&mut plan, request, &scene, &usable, chosen)?,
            Err(Unmet::Failed(failure)) => return Err(failure),
            Err(Unmet::Refused(refusals)) => {
                plan = plan.refused(request, refusals);
                if plan.refusal.as_ref().is_some_and(|refusal| may_pass(refusal.kind)) {
                    plan.would_wait_s = self.longest_wait(request, holder.way).map(|wait| wait.as_secs());
                }
                self.explain_refusal(&mut plan, request, &scene, usable, uid)?;
            }
        }
        Ok(plan)
    }

    /// The same for a user who is shown neither leases nor, by the driver, instances: whether anything speaks against it.
    pub fn plan_unprivileged(&self, request: &Request, uid: Option<u32>) -> Result<Plan, Failure> {
        let mut plan = self.blank(uid);
        if let Err(refusal) = self.check_limits(request) {
            return Ok(plan.refused(request, vec![refusal]));
        }
        let devices = match self.managed_devices() {
            Ok(devices) => devices,
            Err(Unmet::Refused(refusals)) => return Ok(plan.refused(request, refusals)),
            Err(Unmet::Failed(failure)) => return Err(failure),
        };
        let scene = Scene { devices, leases: Vec::new() };
        let usable = super::choose::usable(scene.devices.clone(), request.gpu.as_ref(), &Default::default(), &[]);
        plan.gpus = rooms_of(&scene, usable.as_deref().unwrap_or_default(), |_| None);
        let usable = match usable {
            Ok(usable) => usable,
            Err(refusal) => return Ok(plan.refused(request, vec![refusal])),
        };
        let rooms = rooms(&usable, &[]);
        let mut refusals = Vec::new();
        let mut possible = false;
        for wants in &request.alternatives {
            let unheard_of = |want: &&Want| match want {
                Want::Uuid(uuid) => self.gpu.instance_of(uuid).is_ok_and(|found| found.is_none()),
                _ => false,
            };
            let to_cut: Vec<Want> = wants.iter().filter(|want| !matches!(want, Want::Uuid(_))).cloned().collect();
            if let Some(want) = wants.iter().find(unheard_of) {
                let why = format!("there is no MIG slice {want} on the GPUs that may serve this container");
                refusals.push(Refusal::new(Kind::NoSuchSlice, why));
            } else if let Err(no_place) = placement::candidates(&rooms, &to_cut) {
                refusals.push(refused(&no_place, &[]));
            } else {
                possible = true;
            }
        }
        if !possible {
            return Ok(plan.refused(request, refusals));
        }
        plan.outcome = Outcome::Unknown;
        let state = self.settings.state_dir.display();
        let why = format!(
            "only root is shown who holds what ({state}) and, by the driver, which slices exist and where there is room"
        );
        plan.refusal = Some(Refusal::new(Kind::NotAllowed, why));
        Ok(plan)
    }

    fn blank(&self, uid: Option<u32>) -> Plan {
        Plan {
            outcome: Outcome::Fits,
            refusal: None,
            uid,
            policy: self.policy(),
            slices: Vec::new(),
            existing: Vec::new(),
            keeps: Vec::new(),
            refused_alternatives: Vec::new(),
            freed_first: Vec::new(),
            gpus: Vec::new(),
            holders: Vec::new(),
            ends: Vec::new(),
            in_line: 0,
            would_wait_s: None,
            fits_now: Vec::new(),
        }
    }

    /// Takes out of the scene what reap would free, with the instances that would be destroyed. A slice in which the driver
    /// lists a process stays: it would be called in use.
    fn take_ended(&self, scene: &mut Scene) -> Result<Vec<Freed>, Failure> {
        let mut ended = Vec::new();
        for lease in std::mem::take(&mut scene.leases) {
            let (lease, _, verdict) = self.examine(lease);
            let reason = match verdict {
                Verdict::Keep(_) | Verdict::UnderWay(_) => None,
                Verdict::Free(reason) => Some(reason),
                Verdict::Orphan => {
                    let since = lease.holder.bundle_missing_boot_ms.unwrap_or_else(host::boot_ms);
                    self.abandoned(&lease, since).is_ok().then_some(ABANDONED)
                }
            };
            let instances = match reason {
                // What can't be read now is not destroyed now.
                Some(_) => self.instances_of_ended(&lease).unwrap_or_else(|failure| {
                    tracing::warn!("lease {} stays for now: {failure}", lease.token);
                    None
                }),
                None => None,
            };
            let (Some(reason), Some(instances)) = (reason, instances) else {
                scene.leases.push(lease);
                continue;
            };
            for device in &mut scene.devices {
                device.instances.retain(|i| !instances.contains(&(device.uuid.clone(), i.id)));
            }
            let slices = lease.slices.iter().map(held_slice).collect();
            let (token, name) = (lease.token.clone(), lease.held_by());
            ended.push(Freed { token, name, reason: reason.to_owned(), slices });
        }
        Ok(ended)
    }

    /// The GPU instances that would be destroyed with a lease; `None` where something is in the way.
    fn instances_of_ended(&self, lease: &Lease) -> Result<Option<Vec<(String, u32)>>, Failure> {
        let mut instances = Vec::new();
        for (at, slice) in lease.slices.iter().enumerate() {
            match self.to_destroy(lease, at, is_left_halfway(lease.state))? {
                ToDestroy::Nothing => {}
                ToDestroy::Not(_) => return Ok(None),
                ToDestroy::Instance(instance) => {
                    let uses = |p: &crate::gpu::GpuProcess| p.instance == Some(instance.id);
                    if self.gpu.processes(&slice.gpu)?.iter().any(uses) {
                        return Ok(None);
                    }
                    instances.push((slice.gpu.clone(), instance.id));
                }
            }
        }
        Ok(Some(instances))
    }

    fn gpu_rooms(&self, scene: &Scene, usable: &[Device]) -> Result<Vec<GpuRoom>, Failure> {
        let cordons = self.cordons()?;
        Ok(rooms_of(scene, usable, |device| Some(cordons.get(&device.uuid)?.sentence(device))))
    }

    /// What the container gets and why, and what that leaves.
    fn explain_choice(
        &self,
        plan: &mut Plan,
        request: &Request,
        scene: &Scene,
        usable: &[Device],
        chosen: Chosen,
    ) -> Result<(), Failure> {
        let Some(wants) = request.alternatives.get(chosen.passed.len()) else { return Ok(()) };
        let is_new = |slice: &&Slice| slice.uuid.is_none();
        let to_cut: Vec<Want> =
            wants.iter().zip(&chosen.slices).filter(|(_, s)| is_new(s)).map(|(want, _)| want.clone()).collect();
        let choice = |slice: &Slice| Choice {
            gpu: slice.gpu.clone(),
            profile: slice.profile,
            profile_name: slice.profile_name.clone(),
            placement: slice.placement,
        };
        let choices: Vec<Choice> = chosen.slices.iter().filter(is_new).map(choice).collect();
        let before = rooms(usable, &scene.leases);
        let reasons = placement::candidates(&before, &to_cut)
            .map(|candidates| placement::reasons(&before, &candidates, &choices, plan.policy))
            .unwrap_or_default();
        let mut reasons = reasons.into_iter();
        for (want, slice) in wants.iter().zip(&chosen.slices) {
            let source = source(slice, &scene.leases);
            let why = match source {
                Source::New => reasons.next().unwrap_or_default(),
                _ if matches!(want, Want::Uuid(_)) => "it is named by its UUID".into(),
                Source::Kept => "it is there already, kept for whoever asks".into(),
                Source::Idle => "it is there already, left by a holder that has ended".into(),
                Source::Reserved => "it is there already, kept for this user".into(),
                Source::Foreign => "it is there already, idle, and slices.foreign = \"idle\" lets it be taken".into(),
            };
            let gpu_name = usable.iter().find(|d| d.uuid == slice.gpu).map(|d| d.name.clone()).unwrap_or_default();
            plan.slices.push(Planned {
                wanted: want.to_string(),
                source,
                gpu: slice.gpu.clone(),
                gpu_index: slice.gpu_index,
                gpu_name,
                profile: slice.profile_name.clone(),
                memory_mib: slice.memory_mib,
                placement: slice.placement,
                gi: slice.gi,
                ci: slice.ci,
                uuid: slice.uuid.clone(),
                why,
            });
        }
        for (device, mut room) in usable.iter().zip(before) {
            let new = chosen.slices.iter().filter(is_new).filter(|slice| slice.gpu == device.uuid);
            let windows: Vec<_> =
                new.map(|s| placement::Window { profile: Some(s.profile), placement: s.placement }).collect();
            if !windows.is_empty() {
                room.occupied.extend(windows);
                plan.keeps.push(Keeps { gpu_index: device.index, profiles: still_possible(&room) });
            }
        }
        plan.refused_alternatives = alternatives(request, chosen.passed);
        let existing = chosen.slices.into_iter().filter(|slice| !is_new(&slice)).collect();
        plan.existing = self.with_minors(existing)?;
        Ok(())
    }

    /// Who holds the room, whose end would make it, and what would fit instead.
    fn explain_refusal(
        &self,
        plan: &mut Plan,
        request: &Request,
        scene: &Scene,
        usable: Vec<Device>,
        uid: Option<u32>,
    ) -> Result<(), Failure> {
        let users = self.users();
        let on_usable = Scene { devices: usable, leases: scene.leases.clone() };
        let occupants = occupants(&on_usable);
        for occupant in &occupants {
            plan.holders.push(self.occupier(*occupant, scene)?);
        }
        // What others wait for, or what they keep closed, nobody's end opens.
        let is_room_missing = !self.would_fit(&on_usable, request, uid, &[], &users)?;
        if is_room_missing && plan.refusal.as_ref().is_some_and(|refusal| may_pass(refusal.kind)) {
            let one_gpu = request.alternatives.iter().all(|wants| wants.len() == 1);
            let groups = groups(&occupants, &on_usable.devices, one_gpu);
            let mut failed = None;
            plan.ends = smallest_sets(
                &groups,
                |n| memory_of(&occupants[n]),
                |set| {
                    let ending: Vec<Occupant<'_>> = set.iter().map(|n| occupants[*n]).collect();
                    self.would_fit(&without(&on_usable, &ending), request, uid, &ending, &users).unwrap_or_else(
                        |failure| {
                            failed = Some(failure);
                            false
                        },
                    )
                },
            );
            if let Some(failure) = failed {
                return Err(failure);
            }
        }
        if plan.in_line > 0 {
            return Ok(()); // what fits is for those who wait
        }
        let kept = |name: &str| {
            let mut kept = on_usable.leases.iter().filter(|lease| lease.state == State::Static);
            kept.any(|lease| lease.slices.iter().any(|slice| slice.profile_name == name))
        };
        let mut fitting = Vec::new();
        for profile in on_usable.devices.iter().flat_map(|device| &device.profiles) {
            // One with an attribute is nothing to cut in another's stead, but may be there.
            if (profile::has_attribute(&profile.name) && !kept(&profile.name))
                || fitting.iter().any(|p: &&crate::gpu::Profile| p.name == profile.name)
            {
                continue;
            }
            let one =
                Request { alternatives: vec![vec![Want::Profile(profile.name.clone())]], gpu: None, wait_s: None };
            if self.would_fit(&on_usable, &one, uid, &[], &users)? {
                fitting.push(profile);
            }
        }
        let outdone = |p: &crate::gpu::Profile| {
            fitting.iter().any(|q| {
                (q.memory_mib, q.slices) != (p.memory_mib, p.slices)
                    && q.memory_mib >= p.memory_mib
                    && q.slices >= p.slices
            })
        };
        let largest = fitting.iter().filter(|p| !outdone(p));
        plan.fits_now = largest.map(|p| FitsNow { profile: p.name.clone(), memory_mib: p.memory_mib }).collect();
        plan.fits_now.sort_by(|a, b| (b.memory_mib, &a.profile).cmp(&(a.memory_mib, &b.profile)));
        Ok(())
    }

    /// Whether one of the alternatives could be met, when the processes of those who are `ending` have gone with them.
    fn would_fit(
        &self,
        scene: &Scene,
        request: &Request,
        uid: Option<u32>,
        ending: &[Occupant<'_>],
        users: &Users<'_>,
    ) -> Result<bool, Failure> {
        let user_of = |device: &Device, instance: &Instance| {
            let theirs = |occupant: &Occupant<'_>| match occupant {
                Occupant::Lease(lease) => lease.is_at(&device.uuid, instance),
                Occupant::Foreign(..) => false,
            };
            if ending.iter().any(theirs) {
                return Ok(None);
            }
            users.besides_agents(&device.uuid, device.minor, instance)
        };
        let rooms = rooms(&scene.devices, &scene.leases);
        for wants in &request.alternatives {
            let found = match self.existing(&scene.devices, &scene.leases, wants, uid, &user_of) {
                Ok(found) => found,
                Err(Unmet::Refused(_)) => continue,
                Err(Unmet::Failed(failure)) => return Err(failure),
            };
            let candidates: Result<Vec<Candidates<'_>>, _> = placement::candidates(&rooms, &missing(wants, &found));
            if candidates.is_ok_and(|candidates| placement::fits(&rooms, &candidates, self.policy(), TRIALS)) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn occupier(&self, occupant: Occupant<'_>, scene: &Scene) -> Result<Occupier, Failure> {
        let lease = match occupant {
            Occupant::Lease(lease) => lease,
            Occupant::Foreign(device, instance) => {
                let listed = self.gpu.processes(&device.uuid)?.into_iter().find(|p| p.instance == Some(instance.id));
                return Ok(Occupier {
                    lease: None,
                    standing: Standing::Foreign,
                    pid: listed.map(|process| process.pid),
                    slices: vec![foreign_slice(device, instance)],
                    command: Some(format!("migctl destroy {}/{}", device.index, instance.id)),
                });
            }
        };
        let slices: Vec<HeldSlice> = lease.slices.iter().map(held_slice).collect();
        let destroy = || {
            let mut places: Vec<String> =
                slices.iter().filter_map(|s| Some(format!("{}/{}", s.gpu_index, s.gi?))).collect();
            places.dedup();
            format!("migctl destroy {}", places.join(" "))
        };
        // Whoever uses a kept slice has to end before it can be destroyed.
        let used = |other: &Lease| {
            other.state != State::Static && other.slices.iter().any(|s| lease.slices.iter().any(|own| own.shares(s)))
        };
        Ok(Occupier {
            lease: Some(lease.clone()),
            standing: match lease.state {
                State::Pending | State::Active => Standing::Held,
                State::Static if lease.reserved_for.is_some() => Standing::Reserved,
                State::Static => Standing::Static,
                State::Idle => Standing::Idle,
                State::Releasing => Standing::Releasing,
                State::Quarantined => Standing::Quarantined,
            },
            pid: None,
            command: match lease.state {
                State::Static if !scene.leases.iter().any(used) => Some(destroy()),
                State::Static => Some(format!("{}, when who uses it has ended", destroy())),
                State::Releasing | State::Quarantined => Some("migctl gc, when nothing uses it any more".into()),
                State::Pending | State::Active | State::Idle => None,
            },
            slices,
        })
    }
}

impl Plan {
    fn refused(mut self, request: &Request, refusals: Vec<Refusal>) -> Plan {
        self.outcome = Outcome::Refused;
        self.refusal = Some(Refusal::joined(&refusals));
        if refusals.len() > 1 {
            self.refused_alternatives = alternatives(request, refusals);
        }
        self
    }

    /// The failure that a container's create would end with.
    pub fn failure(&self) -> Option<Failure> {
        self.refusal.clone().map(Failure::from)
    }
}

/// The refusals of the first alternatives, each with what it is about.
fn alternatives(request: &Request, refusals: Vec<Refusal>) -> Vec<Alternative> {
    let named = |(wants, refusal): (&Vec<Want>, Refusal)| Alternative { wanted: format_wants(wants), refusal };
    request.alternatives.iter().zip(refusals).map(named).collect()
}

/// Whether the end of somebody may help.
pub(super) fn may_pass(kind: Kind) -> bool {
    matches!(Failure::from(Refusal::new(kind, "")), Failure::NoRoom(_))
}

fn source(slice: &Slice, leases: &[Lease]) -> Source {
    if slice.uuid.is_none() {
        return Source::New;
    }
    let there = |lease: &&Lease| lease.is_spare() && lease.slices.iter().any(|own| is_same(own, slice));
    match leases.iter().find(there).map(|lease| (lease.state, lease.reserved_for)) {
        Some((State::Idle, _)) => Source::Idle,
        Some((_, Some(_))) => Source::Reserved,
        Some((_, None)) => Source::Kept,
        None => Source::Foreign,
    }
}

/// What goes to make room, out of the scene: those that were chosen to. Of a request that does not fit all that is idle, which
/// is in nobody's way.
fn take_evicted(scene: &mut Scene, chosen: Option<&Chosen>) -> Vec<Freed> {
    let goes = |lease: &Lease| chosen.is_none_or(|chosen| chosen.evicted.contains(&lease.token));
    let gone = idle::take_out(&mut scene.devices, &mut scene.leases, goes);
    let freed = |lease: Lease| Freed {
        name: lease.held_by(),
        reason: "its room is needed".into(),
        slices: lease.slices.iter().map(held_slice).collect(),
        token: lease.token,
    };
    gone.into_iter().filter(|_| chosen.is_some()).map(freed).collect()
}

fn is_same(one: &Slice, other: &Slice) -> bool {
    one.gpu == other.gpu && one.uuid == other.uuid
}

fn held_slice(slice: &Slice) -> HeldSlice {
    let (gpu_index, profile) = (slice.gpu_index, slice.profile_name.clone());
    HeldSlice { gpu_index, profile, placement: slice.placement, gi: slice.gi }
}

fn foreign_slice(device: &Device, instance: &Instance) -> HeldSlice {
    let profile =
        device.profile(instance.profile).map_or_else(|| format!("profile {}", instance.profile.0), |p| p.name.clone());
    HeldSlice { gpu_index: device.index, profile, placement: instance.placement, gi: Some(instance.id) }
}

fn rooms_of(scene: &Scene, usable: &[Device], cordon: impl Fn(&Device) -> Option<String>) -> Vec<GpuRoom> {
    let row = |room: &Room<'_>| {
        let device = room.device;
        let shown = !device.profiles.is_empty() && !device.is_closed();
        let (slices, free) = placement::memory_slices(room);
        let closed = || match (device.mig, cordon(device)) {
            (MigMode::On, None) => {
                Refusal::new(Kind::NoGpu, format!("the request names another than {}", device.label()))
            }
            (MigMode::On, Some(cordon)) => Refusal::new(Kind::Cordoned, cordon),
            _ => Refusal::new(Kind::MigOff, super::choose::mode_sentence(device)),
        };
        let serves = usable.iter().any(|other| other.uuid == device.uuid);
        GpuRoom {
            index: device.index,
            uuid: device.uuid.clone(),
            name: device.name.clone(),
            mig: device.mig,
            closed: (!serves).then(closed),
            memory_slices: shown.then_some(slices),
            free_memory_slices: shown.then_some(free),
            profiles: device
                .profiles
                .iter()
                .map(|profile| ProfileRoom {
                    name: profile.name.clone(),
                    memory_mib: profile.memory_mib,
                    fits: shown.then(|| placement::remaining(room, profile)),
                    total: profile.max_instances,
                })
                .collect(),
        }
    };
    rooms(&scene.devices, &scene.leases).iter().map(row).collect()
}

/// What could still be cut, see [`Keeps`].
fn still_possible(room: &Room<'_>) -> Vec<Count> {
    let plain = room.device.profiles.iter().filter(|p| !profile::has_attribute(&p.name));
    let mut possible: Vec<_> =
        plain.map(|p| (p, placement::remaining(room, p))).filter(|(_, count)| *count > 0).collect();
    possible.sort_by_key(|(p, _)| std::cmp::Reverse((p.memory_mib, p.slices)));
    let outdone = |(p, count): &(&crate::gpu::Profile, u32)| {
        possible
            .iter()
            .any(|(q, more)| q.id != p.id && q.memory_mib >= p.memory_mib && q.slices >= p.slices && more >= count)
    };
    let counts = possible.iter().filter(|one| !outdone(one));
    counts.map(|(p, count)| Count { profile: p.name.clone(), count: *count }).collect()
}

/// Everybody who has something on these GPUs, in the order of where.
fn occupants(scene: &Scene) -> Vec<Occupant<'_>> {
    let here = |slice: &Slice| scene.devices.iter().any(|device| device.uuid == slice.gpu);
    let leases = scene.leases.iter().filter(|lease| lease.slices.iter().any(here)).map(Occupant::Lease);
    let instances = scene.devices.iter().flat_map(|device| device.instances.iter().map(move |i| (device, i)));
    let recorded =
        |device: &Device, instance: &Instance| scene.leases.iter().any(|lease| lease.is_at(&device.uuid, instance));
    let foreign = instances.filter(|(device, i)| !recorded(device, i)).map(|(device, i)| Occupant::Foreign(device, i));
    let place = |occupant: &Occupant<'_>| {
        let (gpu, placement, kept) = match occupant {
            Occupant::Lease(lease) => {
                let first = lease.slices.iter().find(|slice| here(slice));
                let (gpu, placement) = first.map_or(("", Placement::UNKNOWN), |s| (&s.gpu, s.placement));
                (gpu, placement, lease.state == State::Static)
            }
            Occupant::Foreign(device, instance) => (device.uuid.as_str(), instance.placement, false),
        };
        (scene.devices.iter().position(|device| device.uuid == gpu), placement, kept)
    };
    let mut occupants: Vec<Occupant<'_>> = leases.chain(foreign).collect();
    occupants.sort_by_key(place);
    occupants
}

/// The scene when these have ended: an instance goes with the lease that cut it, or with what keeps it.
fn without(scene: &Scene, ending: &[Occupant<'_>]) -> Scene {
    let mut after = scene.clone();
    for occupant in ending {
        match occupant {
            Occupant::Lease(lease) => {
                after.leases.retain(|other| other.token != lease.token);
                let goes = |slice: &&Slice| slice.ours || lease.state == State::Static;
                for slice in lease.slices.iter().filter(goes) {
                    for device in &mut after.devices {
                        device.instances.retain(|instance| !slice.is_at(&device.uuid, instance));
                    }
                }
            }
            Occupant::Foreign(device, instance) => {
                for other in after.devices.iter_mut().filter(|other| other.uuid == device.uuid) {
                    other.instances.retain(|i| i.id != instance.id);
                }
            }
        }
    }
    after
}

/// Memory slices that somebody has.
fn memory_of(occupant: &Occupant<'_>) -> u32 {
    match occupant {
        Occupant::Lease(lease) => lease.slices.iter().map(|slice| slice.placement.size).sum(),
        Occupant::Foreign(_, instance) => instance.placement.size,
    }
}

/// Among whom sets are looked for: for one slice, all who end for it are on one GPU.
fn groups(occupants: &[Occupant<'_>], devices: &[Device], one_gpu: bool) -> Vec<Vec<usize>> {
    if !one_gpu {
        return vec![(0..occupants.len()).collect()];
    }
    let on = |device: &Device, occupant: &Occupant<'_>| match occupant {
        Occupant::Lease(lease) => lease.slices.iter().any(|slice| slice.gpu == device.uuid),
        Occupant::Foreign(theirs, _) => theirs.uuid == device.uuid,
    };
    devices.iter().map(|device| (0..occupants.len()).filter(|n| on(device, &occupants[*n])).collect()).collect()
}

/// The smallest sets within a group that are `enough`: fewest members, those with the least `weight` first. Where that
/// would take too many looks, one set without a member to spare.
fn smallest_sets(
    groups: &[Vec<usize>],
    weight: impl Fn(usize) -> u32,
    mut enough: impl FnMut(&[usize]) -> bool,
) -> Vec<Vec<usize>> {
    let mut looks = 0;
    let mut found: Vec<Vec<usize>> = Vec::new();
    let largest = groups.iter().map(Vec::len).max().unwrap_or(0);
    for size in 1..=largest {
        for group in groups {
            let mut positions: Vec<usize> = (0..size).collect();
            while positions.last().is_some_and(|last| *last < group.len()) {
                if looks == MAX_LOOKS {
                    return if found.is_empty() { spare_none(groups, weight, enough) } else { sorted(found, weight) };
                }
                looks += 1;
                let set: Vec<usize> = positions.iter().map(|at| group[*at]).collect();
                if !found.contains(&set) && enough(&set) {
                    found.push(set);
                }
                if !advance(&mut positions, group.len()) {
                    break;
                }
            }
        }
        if !found.is_empty() {
            break;
        }
    }
    sorted(found, weight)
}

/// The next combination in lexical order; false after the last.
fn advance(positions: &mut [usize], count: usize) -> bool {
    let size = positions.len();
    let Some(at) = (0..size).rev().find(|at| positions[*at] < count - size + at) else { return false };
    positions[at] += 1;
    for next in at + 1..size {
        positions[next] = positions[next - 1] + 1;
    }
    true
}

fn sorted(mut sets: Vec<Vec<usize>>, weight: impl Fn(usize) -> u32) -> Vec<Vec<usize>> {
    sets.sort_by_key(|set| set.iter().map(|n| weight(*n)).sum::<u32>());
    sets.truncate(MAX_SETS);
    sets
}

/// Ends everybody, then lets each stay who can, the light ones first, so that few have to end.
fn spare_none(
    groups: &[Vec<usize>],
    weight: impl Fn(usize) -> u32,
    mut enough: impl FnMut(&[usize]) -> bool,
) -> Vec<Vec<usize>> {
    let mut ending: Vec<usize> = groups.concat();
    ending.sort_unstable();
    ending.dedup();
    if !enough(&ending) {
        return Vec::new();
    }
    let mut light_first = ending.clone();
    light_first.sort_by_key(|n| weight(*n));
    for one in light_first {
        let rest: Vec<usize> = ending.iter().copied().filter(|n| *n != one).collect();
        if enough(&rest) {
            ending = rest;
        }
    }
    vec![ending]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_combination_comes_once() {
        let mut positions = vec![0, 1];
        let mut seen = vec![positions.clone()];
        while advance(&mut positions, 4) {
            seen.push(positions.clone());
        }
        assert_eq!(seen, [[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]]);
        assert!(!advance(&mut [0], 1));
    }

    #[test]
    fn the_smallest_sets_are_found_within_groups() {
        let weight = |n: usize| [4, 1, 2, 1, 1, 1][n];
        let groups = [vec![0, 1, 2], vec![3, 4, 5]];
        let single = smallest_sets(&groups, weight, |set| set.contains(&0) || set.contains(&2) || set.len() == 3);
        assert_eq!(single, [[2], [0]], "the lightest first");
        let pairs = smallest_sets(&groups, weight, |set| set.len() == 2 && !set.contains(&0));
        assert_eq!(pairs, [vec![3, 4], vec![3, 5], vec![4, 5], vec![1, 2]]);
        assert_eq!(smallest_sets(&groups, weight, |_| false), Vec::<Vec<usize>>::new());
        assert_eq!(smallest_sets(&[], weight, |_| true), Vec::<Vec<usize>>::new());
    }

    #[test]
    fn too_many_to_look_at_give_one_set_without_a_spare() {
        let groups = [(0..60).collect::<Vec<usize>>()];
        let mut looks = 0;
        let sets = smallest_sets(
            &groups,
            |n| n as u32,
            |set| {
                looks += 1;
                set.iter().filter(|n| **n >= 40).count() >= 5
            },
        );
        assert_eq!(sets, [[55, 56, 57, 58, 59]]);
        assert!(looks <= MAX_LOOKS + 61, "{looks}");
    }
}
