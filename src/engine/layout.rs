//! A layout put into effect on several GPUs: what differs is destroyed and cut, all of it or nothing.
//!
//! MIG modes that are to be on come first, since only then is known what a GPU offers; then what goes, what comes, and the
//! modes that are to be off. Each change is written down before it is made, as everywhere. New slices stay Pending until all
//! of them are there: what a kill leaves of them goes at the next look, and the same layout applied again finishes it.

use crate::gpu::{Device, Instance, MigMode};
use crate::layout::{self, New, Plan, Present, Refusal, Use, described};
use crate::lease::{Lease, Slice, State, Step, Way};
use crate::mig_parted::Names;
use crate::placement::Window;
use crate::store::Lock;

use super::destroy::Destroyed;
use super::keep::{kept, name_of, slices_of};
use super::mode::{Changed, Client};
use super::users::Users;
use super::{Engine, Failure, audit, idle, new_holder};

/// What one GPU shall be like.
#[derive(Debug, Clone)]
pub struct Target {
    /// `GPU-…`.
    pub gpu: String,
    /// MIG mode.
    pub mig: bool,
    /// Its MIG devices; `None`: whatever is there.
    pub names: Option<Names>,
}

/// What was, or would be, changed on one GPU.
#[derive(Debug, Clone)]
pub struct Change {
    /// As it was, with MIG on where it is turned on.
    pub device: Device,
    /// MIG mode before.
    pub before: MigMode,
    /// MIG mode now. A pending one waits for a reset of the GPU; then nothing else was done where it is to be on.
    pub mig: MigMode,
    /// Left alone, with whether it is kept from now on where it was not before.
    pub stayed: Vec<(Instance, bool)>,
    /// Gone.
    pub destroyed: Vec<Instance>,
    /// New ones, a list of slices for each.
    pub cut: Vec<Vec<Slice>>,
}

impl Change {
    /// Whether the GPU is as it was, and kept as it was.
    fn is_none(&self) -> bool {
        let kept_anew = self.stayed.iter().any(|(_, anew)| *anew);
        self.before == self.mig && !kept_anew && self.destroyed.is_empty() && self.cut.is_empty()
    }
}

/// Told each step before it is made; answers whether to go on.
pub type Watch<'w> = &'w dyn Fn(&str) -> bool;

/// What is planned for one GPU.
struct Todo<'t> {
    target: &'t Target,
    device: Device,
    plan: Plan,
}

/// What was done, to be undone when something later fails.
enum Done {
    /// MIG was not so before.
    Mode { gpu: String, on: bool },
    /// Destroyed, or begun to be, with the record that kept it.
    Destroyed { device: Device, instance: Instance, kept: Option<Lease> },
    /// Cut, or begun to be.
    Cut(Lease),
}

impl Engine<'_> {
    /// Makes GPUs what they shall be, changing only what differs. Refuses up front, and changes nothing, where something in
    /// use would have to go, or where it does not fit. What fails in the middle is rolled back.
    pub fn apply(&self, targets: &[Target], watch: Watch<'_>) -> Result<Vec<Change>, Failure> {
        let lock = self.lock_for_change()?;
        let mut leases = self.leases()?;
        let before = self.managed_gpus()?;
        self.settle_vanished(&lock, &before, &mut leases)?;
        let mut done = Vec::new();
        let outcome = match self.change(&lock, targets, &before, &leases, watch, &mut done) {
            Err(failure) if !done.is_empty() => {
                let undone = self.undo(&lock, &before, done, watch);
                Err(Failure::RolledBack { failure: Box::new(failure), undone })
            }
            Err(Failure::BadRequest(why)) => Err(Failure::BadRequest(format!("{why}; nothing was changed"))),
            Err(Failure::NoRoom(why)) => Err(Failure::NoRoom(format!("{why}; nothing was changed"))),
            Err(failure) => Err(failure),
            Ok(changes) => self.keep_all(&lock, changes),
        };
        if !outcome.as_ref().is_ok_and(|changes| changes.iter().all(Change::is_none)) {
            self.look_afresh(&lock);
            drop(lock);
            self.store.ring(); // who waits for room may have it now
        }
        outcome
    }

    /// What `apply` would do as things stand. Changes nothing, not even what ended holders left. A GPU whose MIG mode is
    /// off yet has nothing to cut here: what it offers is known once the mode is on.
    pub fn plan_apply(&self, targets: &[Target]) -> Result<Vec<Change>, Failure> {
        let mut leases = self.leases()?;
        leases.retain(|lease| lease.state == State::Static || self.is_alive(lease));
        let mut devices = self.managed_gpus()?;
        idle::take_out(&mut devices, &mut leases, |_| true);
        let todos = self.todos(targets, &devices, &leases)?;
        let change = |todo: &Todo<'_>| {
            let cut = todo.plan.come.iter().filter_map(|new| slices_for(&todo.device, new)).collect();
            let mig = if todo.target.mig { MigMode::On } else { mode_off(&todo.device) };
            let mut change = changed(todo, todo.device.mig, mig, cut);
            for (instance, adopted) in &mut change.stayed {
                *adopted &= !leases.iter().any(|lease| keeps(lease, &todo.device, instance));
            }
            change
        };
        Ok(todos.iter().map(change).collect())
    }

    /// Everything but the records of what stays.
    fn change(
        &self,
        lock: &Lock,
        targets: &[Target],
        before: &[Device],
        leases: &[Lease],
        watch: Watch<'_>,
        done: &mut Vec<Done>,
    ) -> Result<Vec<Change>, Failure> {
        let mut todos = self.todos(targets, before, leases)?;
        if todos.iter().any(|todo| todo.target.mig && todo.device.mig != MigMode::On) {
            for todo in todos.iter().filter(|todo| todo.target.mig) {
                self.turn(lock, &todo.device, true, watch, done)?;
            }
            let now = self.managed_gpus()?;
            let pending =
                |todo: &Todo<'_>| todo.target.mig && mode_of(&now, &todo.device.uuid) == MigMode::EnablePending;
            if todos.iter().any(pending) {
                return Ok(todos.iter().map(|todo| untouched(todo, &now)).collect());
            }
            todos = self.todos(targets, &now, leases)?;
        }
        for todo in &todos {
            for instance in instances(&todo.device, &todo.plan.go) {
                self.take_away(lock, &todo.device, instance, leases, watch, done)?;
            }
        }
        let others = self.leases()?;
        let mut cuts = Vec::new();
        for todo in &todos {
            let mut cut = Vec::new();
            for new in &todo.plan.come {
                let moved = new.moved_from.and_then(|n| todo.device.instances.get(n));
                let keeps = |lease: &&Lease| moved.is_some_and(|moved| keeps(lease, &todo.device, moved));
                let reserved_for = leases.iter().find(keeps).and_then(|lease| lease.reserved_for);
                let slices = slices_for(&todo.device, new).unwrap_or_default();
                let lease = self.new_lease(&new_holder(Way::Create, std::process::id()), slices)?;
                cut.push(self.cut_new(lock, Lease { reserved_for, ..lease }, &others, watch, done)?);
            }
            cuts.push(cut);
        }
        for todo in todos.iter().filter(|todo| !todo.target.mig) {
            self.turn(lock, &todo.device, false, watch, done)?;
        }
        let now = match done.is_empty() {
            true => before.to_vec(),
            false => self.managed_gpus()?,
        };
        let change = |(todo, cut): (&Todo<'_>, Vec<Vec<Slice>>)| {
            let mode = |devices| mode_of(devices, &todo.target.gpu);
            changed(todo, mode(before), mode(&now), cut)
        };
        let changes = todos.iter().zip(cuts).map(change).collect();
        for step in done.iter_mut() {
            if let Done::Cut(lease) = step {
                lease.state = State::Static;
                self.store.put(lock, &lease.token, lease)?;
                audit("create", &lease.holder, kept(lease));
            }
        }
        Ok(changes)
    }

    /// What is to be done on each GPU, or why it can't be: every reason there is.
    fn todos<'t>(&self, targets: &'t [Target], devices: &[Device], leases: &[Lease]) -> Result<Vec<Todo<'t>>, Failure> {
        let mut todos = Vec::new();
        let mut never = false;
        let mut refusals = Vec::new();
        let users = self.users();
        for target in targets {
            let Some(device) = devices.iter().find(|device| device.uuid == target.gpu) else {
                return Err(Failure::BadRequest(format!("there is no GPU {} any more", target.gpu)));
            };
            match self.plan_one(target, device, leases, &users)? {
                Ok(plan) => todos.push(Todo { target, device: device.clone(), plan }),
                Err(Refusal::Never(why)) => {
                    never = true;
                    refusals.push(why);
                }
                Err(Refusal::NotNow(why)) => refusals.push(why),
            }
        }
        match (refusals.is_empty(), never) {
            (true, _) => Ok(todos),
            (false, true) => Err(Failure::BadRequest(refusals.join("; and "))),
            (false, false) => Err(Failure::NoRoom(refusals.join("; and "))),
        }
    }

    fn plan_one(
        &self,
        target: &Target,
        device: &Device,
        leases: &[Lease],
        users: &Users<'_>,
    ) -> Result<Result<Plan, Refusal>, Failure> {
        if target.mig && device.mig == MigMode::Unsupported {
            return Ok(Err(Refusal::Never(format!("{} has no MIG", device.label()))));
        }
        let Some(names) = &target.names else {
            let everything = Plan { stay: (0..device.instances.len()).collect(), ..Plan::default() };
            return Ok(match self.why_not_mode(device, target.mig) {
                Some(why) if device.mig != MigMode::Unsupported => Err(Refusal::NotNow(why.to_string())),
                _ => Ok(everything),
            });
        };
        if !matches!(device.mig, MigMode::On | MigMode::DisablePending) {
            return Ok(Ok(Plan::default()));
        }
        let used = device.instances.iter().map(|instance| self.used(leases, users, device, instance));
        let used = used.collect::<Result<_, Failure>>()?;
        Ok(layout::plan(&Present { device, used, reserved: reserved(leases, device) }, names, self.policy()))
    }

    fn used(&self, leases: &[Lease], users: &Users<'_>, device: &Device, instance: &Instance) -> Result<Use, Failure> {
        let mut of_it = leases.iter().filter(|lease| lease.is_at(&device.uuid, instance));
        let leaving = |lease: &&Lease| {
            matches!(lease.state, State::Releasing | State::Quarantined) && lease.has_cut(&device.uuid, instance)
        };
        if let Some(lease) = of_it.clone().find(leaving) {
            let (name, why) = (name_of(device, instance), lease.reason.as_deref().unwrap_or("its holder has ended"));
            return Ok(Use::Ending(format!("{name} is on its way out ({why}); migctl gc goes on with it")));
        }
        Ok(match self.why_held(leases, users, device, instance)? {
            Some(why) => Use::Busy(why),
            None => Use::Idle { kept: of_it.any(|lease| lease.state == State::Static) },
        })
    }

    /// Turns MIG on or off where it is not so. A mode that waits for a reset is no failure.
    fn turn(
        &self,
        lock: &Lock,
        device: &Device,
        on: bool,
        watch: Watch<'_>,
        done: &mut Vec<Done>,
    ) -> Result<(), Failure> {
        let word = if on { "on" } else { "off" };
        let so = if on { device.mig == MigMode::On } else { mode_off(device) == device.mig };
        if so {
            return Ok(());
        }
        go_on(watch, &format!("GPU {}: turning MIG {word}", device.index))?;
        let in_the_way = match self.set_mode_locked(lock, &device.uuid, on)? {
            (Changed::Already, _) => return Ok(()),
            (Changed::Done | Changed::Pending, _) => {
                done.push(Done::Mode { gpu: device.uuid.clone(), on: !on });
                return Ok(());
            }
            (Changed::InUse(clients), _) => blockers(&clients),
            (Changed::Refused(why), _) => why,
        };
        // A request that could not be met may stay pending.
        done.push(Done::Mode { gpu: device.uuid.clone(), on: !on });
        Err(Failure::NoRoom(format!("MIG of {} could not be turned {word}: {in_the_way}", device.label())))
    }

    fn take_away(
        &self,
        lock: &Lock,
        device: &Device,
        instance: &Instance,
        leases: &[Lease],
        watch: Watch<'_>,
        done: &mut Vec<Done>,
    ) -> Result<(), Failure> {
        go_on(watch, &format!("GPU {}: destroying {}", device.index, described(device, instance)))?;
        let kept = leases.iter().find(|lease| keeps(lease, device, instance)).cloned();
        let destroyed = self.destroy_one(lock, device, instance);
        let name = name_of(device, instance);
        if !matches!(destroyed, Ok(Destroyed::Unchanged(_))) {
            done.push(Done::Destroyed { device: device.clone(), instance: instance.clone(), kept });
        }
        match destroyed? {
            Destroyed::Done => Ok(()),
            Destroyed::Unchanged(why) | Destroyed::Half(why) => {
                Err(Failure::NoRoom(format!("{name} could not be destroyed: {why}")))
            }
        }
    }

    fn cut_new(
        &self,
        lock: &Lock,
        mut lease: Lease,
        others: &[Lease],
        watch: Watch<'_>,
        done: &mut Vec<Done>,
    ) -> Result<Vec<Slice>, Failure> {
        let place =
            |slice: &Slice| format!("GPU {}: cutting {} at {}", slice.gpu_index, lease.profiles(), slice.placement);
        go_on(watch, &lease.slices.first().map(place).unwrap_or_default())?;
        let cut = self.cut_to_keep(lock, &mut lease, others);
        let slices = lease.slices.clone();
        done.push(Done::Cut(lease));
        cut.map(|()| slices)
    }

    /// Undoes what was done, the last first, and tells what became of it as the driver then shows it.
    fn undo(&self, lock: &Lock, before: &[Device], done: Vec<Done>, watch: Watch<'_>) -> String {
        let mut troubles: Vec<String> = Vec::new();
        watch("rolling back"); // nothing stops it any more
        for step in done.into_iter().rev() {
            troubles.extend(self.undo_one(lock, step).err().map(|failure| failure.to_string()));
        }
        let left = self.managed_gpus().map(|now| left_over(before, &now));
        let troubles = troubles.join("; ");
        match left {
            Ok(left) if left.is_empty() => "rolled back: everything is as it was".into(),
            Ok(left) => format!("and not all of it could be rolled back ({troubles}): {left}"),
            Err(failure) => format!("and what became of the roll-back can't be read: {failure} ({troubles})"),
        }
    }

    fn undo_one(&self, lock: &Lock, step: Done) -> Result<(), Failure> {
        match step {
            Done::Mode { gpu, on } => match self.set_mode_locked(lock, &gpu, on)? {
                (Changed::Already | Changed::Done, _) => Ok(()),
                (Changed::Pending, device) => {
                    Err(Failure::NoRoom(format!("{} has its MIG mode back after a reset only", device.label())))
                }
                (Changed::InUse(clients), _) => Err(Failure::NoRoom(blockers(&clients))),
                (Changed::Refused(why), _) => Err(Failure::NoRoom(why)),
            },
            Done::Cut(lease) => {
                let freed = self.free(lock, lease, "not all of the layout could be applied");
                if freed.result == "freed" { Ok(()) } else { Err(Failure::NoRoom(freed.reason)) }
            }
            Done::Destroyed { device, instance, kept } => self.restore(lock, &device, &instance, kept),
        }
    }

    /// Cuts again, at its place, what was destroyed or half destroyed, and keeps it if it was kept. At the same place it has
    /// the same UUIDs.
    fn restore(&self, lock: &Lock, device: &Device, was: &Instance, kept_by: Option<Lease>) -> Result<(), Failure> {
        let now = self.gpu.instances(&device.uuid)?.into_iter().find(|i| i.placement == was.placement);
        if now.as_ref().is_some_and(|now| (now.id, now.profile) != (was.id, was.profile)) {
            return Err(Failure::NoRoom(format!(
                "on {} another tool has cut where {} was",
                device.label(),
                described(device, was)
            )));
        }
        let leases = self.leases()?;
        let (begun, others): (Vec<Lease>, Vec<Lease>) =
            leases.into_iter().partition(|lease| lease.is_at(&device.uuid, was));
        let record = match (&kept_by, begun.into_iter().next()) {
            (Some(kept), _) => kept.clone(),
            (None, Some(begun)) => begun,
            (None, None) => self.new_lease(&new_holder(Way::Adopt, std::process::id()), Vec::new())?,
        };
        let mut lease = Lease { state: State::Pending, reason: None, ..record };
        lease.slices = slices_of(device, was)?;
        for slice in &mut lease.slices {
            let there =
                now.iter().flat_map(|now| &now.compute).any(|compute| Some(&compute.uuid) == slice.uuid.as_ref());
            slice.ours = true;
            slice.gi = now.as_ref().map(|now| now.id);
            slice.step = if there { Step::Whole } else { Step::Planned };
        }
        match (was.compute.is_empty(), &now) {
            (true, Some(_)) => {}
            (true, None) => {
                let claim = self.claim_new(lock, &lease)?;
                self.cut_instance(&claim, &mut lease, 0)?;
            }
            (false, _) => self.cut_to_keep(lock, &mut lease, &others)?,
        }
        match kept_by {
            None => self.store.remove(lock, &lease.token, None)?,
            Some(before) => {
                for slice in &mut lease.slices {
                    slice.ours = before.slices.iter().any(|s| s.ours && s.shares(slice));
                }
                let lease = Lease { state: State::Static, slices: lease.slices, ..before };
                self.store.put(lock, &lease.token, &lease)?;
                audit("create", &lease.holder, kept(&lease));
            }
        }
        Ok(())
    }

    /// Keeps what stays: also after the end of a container that it was cut for.
    fn keep_all(&self, lock: &Lock, mut changes: Vec<Change>) -> Result<Vec<Change>, Failure> {
        let mut leases = self.leases()?;
        for Change { device, stayed, .. } in &mut changes {
            for (instance, adopted) in stayed.iter_mut().filter(|(_, wanted)| *wanted) {
                *adopted = self.keep_one(lock, &mut leases, device, instance)?;
            }
        }
        Ok(changes)
    }

    /// The record that keeps it comes first: killed between the two, the container's end destroys the slice, and nothing is
    /// left without a record.
    fn keep_one(
        &self,
        lock: &Lock,
        leases: &mut [Lease],
        device: &Device,
        instance: &Instance,
    ) -> Result<bool, Failure> {
        let mut of_it: Vec<&mut Lease> =
            leases.iter_mut().filter(|lease| lease.is_at(&device.uuid, instance)).collect();
        let adopted = of_it.iter().all(|lease| lease.state != State::Static);
        let here = |slice: &&mut Slice| slice.ours && slice.is_at(&device.uuid, instance);
        let gives_up = |lease: &mut Lease| lease.slices.iter_mut().filter(here).map(|s| s.ours = false).count() > 0;
        of_it.retain_mut(|lease| lease.state != State::Static && gives_up(lease));
        if adopted {
            let mut slices = self.with_minors(slices_of(device, instance)?)?;
            for slice in &mut slices {
                slice.ours = !of_it.is_empty();
            }
            let record = self.new_lease(&new_holder(Way::Adopt, std::process::id()), slices)?;
            let record = Lease { state: State::Static, ..record };
            self.store.put(lock, &record.token, &record)?;
            audit("adopt", &record.holder, kept(&record));
        }
        for lease in of_it {
            self.store.put(lock, &lease.token, lease)?;
        }
        Ok(adopted)
    }
}

fn go_on(watch: Watch<'_>, step: &str) -> Result<(), Failure> {
    if watch(step) { Ok(()) } else { Err(Failure::Interrupted) }
}

/// The mode that a GPU has when MIG is off: some have no MIG at all.
fn mode_off(device: &Device) -> MigMode {
    match device.mig {
        MigMode::Unsupported => MigMode::Unsupported,
        _ => MigMode::Off,
    }
}

fn mode_of(devices: &[Device], gpu: &str) -> MigMode {
    devices.iter().find(|device| device.uuid == gpu).map_or(MigMode::Unsupported, |device| device.mig)
}

fn instances<'d>(device: &'d Device, indices: &[usize]) -> Vec<&'d Instance> {
    indices.iter().filter_map(|n| device.instances.get(*n)).collect()
}

fn keeps(lease: &Lease, device: &Device, instance: &Instance) -> bool {
    lease.state == State::Static && lease.is_at(&device.uuid, instance)
}

/// Windows of leases where no instance is: their minors are held, and what is to come there is a rival's.
fn reserved(leases: &[Lease], device: &Device) -> Vec<Window> {
    let slices = leases.iter().filter(|lease| lease.state != State::Static).flat_map(|lease| &lease.slices);
    let here = slices.filter(|slice| slice.gpu == device.uuid);
    let empty = here.filter(|slice| !device.instances.iter().any(|instance| slice.is_at(&device.uuid, instance)));
    empty.map(|slice| Window { profile: Some(slice.profile), placement: slice.placement }).collect()
}

fn slices_for(device: &Device, new: &New) -> Option<Vec<Slice>> {
    let whole = Slice::planned(device, device.profile(new.profile)?, new.placement);
    Some(match new.computes.as_slice() {
        [] => vec![whole],
        computes => computes.iter().map(|compute| whole.clone().with_compute(Some(*compute))).collect(),
    })
}

/// A plan that was followed.
fn changed(todo: &Todo<'_>, before: MigMode, mig: MigMode, cut: Vec<Vec<Slice>>) -> Change {
    let wanted = todo.target.names.is_some();
    Change {
        before,
        mig,
        stayed: instances(&todo.device, &todo.plan.stay).into_iter().map(|i| (i.clone(), wanted)).collect(),
        destroyed: instances(&todo.device, &todo.plan.go).into_iter().cloned().collect(),
        cut,
        device: todo.device.clone(),
    }
}

/// Nothing but modes was changed.
fn untouched(todo: &Todo<'_>, now: &[Device]) -> Change {
    let mig = mode_of(now, &todo.target.gpu);
    Change { stayed: Vec::new(), destroyed: Vec::new(), ..changed(todo, todo.device.mig, mig, Vec::new()) }
}

fn blockers(clients: &[Client]) -> String {
    let names: Vec<String> = clients.iter().map(|c| format!("process {} ({})", c.pid, c.name)).collect();
    match names.is_empty() {
        true => "the driver says that a client uses it, and no process shows it; a monitoring agent may".into(),
        false => format!("it is in use by {}", names.join(", ")),
    }
}

/// How GPUs differ from what they were: by the driver's own word, not by what we think to have done.
fn left_over(before: &[Device], now: &[Device]) -> String {
    let same = |a: &Instance, b: &Instance| {
        let uuids = |i: &Instance| i.compute.iter().map(|c| c.uuid.clone()).collect::<Vec<_>>();
        (a.id, a.profile, a.placement, uuids(a)) == (b.id, b.profile, b.placement, uuids(b))
    };
    let mut differences = Vec::new();
    for was in before {
        let Some(is) = now.iter().find(|device| device.uuid == was.uuid) else {
            differences.push(format!("{} can't be reached any more", was.label()));
            continue;
        };
        let missing = was.instances.iter().filter(|old| !is.instances.iter().any(|new| same(old, new)));
        let new = is.instances.iter().filter(|new| !was.instances.iter().any(|old| same(old, new)));
        let list =
            |of: &Device, all: Vec<&Instance>| all.iter().map(|i| described(of, i)).collect::<Vec<_>>().join(", ");
        let (missing, new) = (list(was, missing.collect()), list(is, new.collect()));
        let mode = (was.mig != is.mig).then(|| format!("MIG mode is {:?} and was {:?}", is.mig, was.mig));
        let missing = (!missing.is_empty()).then(|| format!("is without {missing}"));
        let new = (!new.is_empty()).then(|| format!("has {new}"));
        let all: Vec<String> = [missing, new, mode].into_iter().flatten().collect();
        if !all.is_empty() {
            differences.push(format!("{} {}", was.label(), all.join(", ")));
        }
    }
    differences.join("; ")
}
