//! What has to change on a GPU so that it has the slices that are wanted: what stays, what goes, what comes, and where. Pure.
//!
//! Only what differs is changed. What is in use stays in any case, or nothing is changed at all. What is wanted and idle stays
//! too, as long as the rest fits around it; otherwise as few as possible are moved.

use crate::cut::{self, Cut};
use crate::gpu::{Device, Instance, Placement, ProfileId};
use crate::mig_parted::{Names, less, listed, names_of, one_by_one};
use crate::placement::{self, Choice, NoPlace, Policy, Reason, Room, Window};
use crate::profile;
use crate::request::Want;

/// A GPU as it is.
#[derive(Debug)]
pub struct Present<'a> {
    /// As the driver reports it, MIG on.
    pub device: &'a Device,
    /// How each of its instances is used, in their order.
    pub used: Vec<Use>,
    /// Room that leases hold where no instance is.
    pub reserved: Vec<Window>,
}

/// How a GPU instance is used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Use {
    /// By nobody.
    Idle {
        /// A record keeps it: it goes after those that nobody knows.
        kept: bool,
    },
    /// By somebody, in a sentence: it may not be touched.
    Busy(String),
    /// By nobody much longer, in a sentence: it is on its way out, and can neither stay nor be replaced yet.
    Ending(String),
}

impl Use {
    /// The sentence, for one in use.
    fn by(&self) -> Option<&str> {
        match self {
            Use::Busy(why) => Some(why),
            Use::Idle { .. } | Use::Ending(_) => None,
        }
    }
}

/// What to do with the GPU instances of one GPU; indices are those of `device.instances`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    /// Left alone.
    pub stay: Vec<usize>,
    /// Destroyed.
    pub go: Vec<usize>,
    /// Cut.
    pub come: Vec<New>,
}

/// A GPU instance that is to be cut.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct New {
    /// Its profile.
    pub profile: ProfileId,
    /// Where.
    pub placement: Placement,
    /// Compute slices of each of its compute instances; empty: one that has all of it.
    pub computes: Vec<u32>,
    /// Index of the one that goes for it: it is the same, only elsewhere.
    pub moved_from: Option<usize>,
}

/// Why a GPU can't be made so.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refusal {
    /// Never: not offered, or more than it holds.
    Never(String),
    /// Not now: somebody uses what would have to go.
    NotNow(String),
}

/// What to do so that the GPU has `wanted` and nothing else.
pub fn plan(present: &Present<'_>, wanted: &Names, policy: Policy) -> Result<Plan, Refusal> {
    check_possible(present.device, wanted, policy)?;
    let busy = check_use(present, wanted)?;
    let rest = || less(wanted, &names(present.device, &busy));
    let attempt = |stay: &[usize]| place(present, stay, &less(wanted, &names(present.device, stay)), policy);
    let mut sets = attempts(present, &busy, &rest()).into_iter();
    // Mostly everything that is wanted may stay where it is.
    if let Some(all) = sets.next()
        && let Ok(come) = attempt(&all)
    {
        return Ok(whole_plan(present, all, come));
    }
    let beside_busy = attempt(&busy).map_err(|refusal| no_place(present, &refusal))?;
    match sets.find_map(|stay| attempt(&stay).ok().map(|come| (stay, come))) {
        Some((stay, come)) => Ok(whole_plan(present, stay, come)),
        None => Ok(whole_plan(present, busy, beside_busy)),
    }
}

/// The MIG devices of some instances.
fn names(device: &Device, of: &[usize]) -> Names {
    names_of(device, of.iter().filter_map(|n| device.instances.get(*n)))
}

/// Whether the GPU could have all of it, with nothing else on it.
fn check_possible(device: &Device, wanted: &Names, policy: Policy) -> Result<(), Refusal> {
    for name in wanted.keys() {
        let whole = profile::split_compute(name).map_or(name.as_str(), |(_, whole)| whole);
        if profile::resolve_name(device, whole).is_none() {
            return Err(Refusal::Never(profile::not_offered(&format!("profile {whole}"), &[device])));
        }
    }
    let empty = Present { device, used: Vec::new(), reserved: Vec::new() };
    match place(&empty, &[], wanted, policy) {
        Err(refusal) if refusal.reason == Reason::NeverFits => {
            Err(Refusal::Never(format!("{} is more than {} holds", listed(wanted), device.label())))
        }
        _ => Ok(()),
    }
}

/// The instances that are in use, if all of them may stay.
fn check_use(present: &Present<'_>, wanted: &Names) -> Result<Vec<usize>, Refusal> {
    let device = present.device;
    let mut busy = Vec::new();
    let mut against = Vec::new();
    for (n, (instance, used)) in device.instances.iter().zip(&present.used).enumerate() {
        match used {
            Use::Idle { .. } => {}
            Use::Ending(why) => against.push(why.clone()),
            Use::Busy(why) if instance.compute.is_empty() => against.push(why.clone()),
            Use::Busy(_) => busy.push(n),
        }
    }
    for (name, surplus) in less(&names(device, &busy), wanted) {
        let of_it = busy.iter().filter(|n| names(device, &[**n]).contains_key(&name));
        let users: Vec<&str> = of_it.filter_map(|n| present.used.get(*n)).filter_map(Use::by).collect();
        let wanted = wanted.get(&name).copied().unwrap_or(0);
        let wanted = if wanted == 0 { "no".to_owned() } else { format!("only {wanted}") };
        let end = if users.len() == surplus { String::new() } else { format!("; {surplus} of them must end first") };
        against.push(format!("{wanted} {name} is wanted, and {}{end}", users.join(", and ")));
    }
    match against.is_empty() {
        true => Ok(busy),
        false => Err(Refusal::NotNow(format!("{}: {}", device.label(), against.join("; ")))),
    }
}

/// What might stay: what is busy and, of the idle ones that are wanted, each selection; the largest first, then those with
/// the most that are kept.
fn attempts(present: &Present<'_>, busy: &[usize], rest: &Names) -> Vec<Vec<usize>> {
    /// No board has as many instances; of more, the last would be taken for not wanted.
    const MOST: usize = 16;
    let wanted = |set: &[usize]| less(&names(present.device, set), rest).is_empty();
    let whole = |n: usize| present.device.instances.get(n).is_some_and(|instance| !instance.compute.is_empty());
    let mut idle: Vec<usize> =
        (0..present.used.len()).filter(|n| !busy.contains(n) && whole(*n) && wanted(&[*n])).collect();
    idle.truncate(MOST);
    let kept = |n: &&usize| present.used.get(**n) == Some(&Use::Idle { kept: true });
    let set = |mask: u32| -> Vec<usize> {
        idle.iter().enumerate().filter(|(bit, _)| mask >> bit & 1 == 1).map(|(_, n)| *n).collect()
    };
    let mut sets: Vec<Vec<usize>> = (0..1 << idle.len()).map(set).filter(|set| wanted(set)).collect();
    sets.sort_by_cached_key(|set| std::cmp::Reverse((set.len(), set.iter().filter(kept).count())));
    sets.into_iter().map(|set| [busy, &set].concat()).collect()
}

/// Places what is missing beside what stays.
fn place(present: &Present<'_>, stay: &[usize], missing: &Names, policy: Policy) -> Result<Vec<New>, NoPlace> {
    let mut device = present.device.clone();
    device.instances = stay.iter().filter_map(|n| present.device.instances.get(*n).cloned()).collect();
    let rooms = [Room { device: &device, occupied: present.reserved.clone() }];
    let (cuts, wants) = cuts(missing);
    let choices = placement::place(&rooms, &placement::candidates(&rooms, &wants)?, policy)?;
    let new = |(cut, choice): (&Cut, Choice)| New {
        profile: choice.profile,
        placement: choice.placement,
        computes: cut.computes.clone(),
        moved_from: None,
    };
    Ok(cuts.iter().zip(choices).map(new).collect())
}

fn cuts(missing: &Names) -> (Vec<Cut>, Vec<Want>) {
    let wants: Vec<Want> = one_by_one(missing).into_iter().map(Want::Profile).collect();
    let cuts = cut::packed(&wants);
    let wants = cuts.iter().map(|cut| cut.want.clone()).collect();
    (cuts, wants)
}

fn whole_plan(present: &Present<'_>, mut stay: Vec<usize>, mut come: Vec<New>) -> Plan {
    stay.sort_unstable();
    let go: Vec<usize> = (0..present.used.len()).filter(|n| !stay.contains(n)).collect();
    let mut left = go.clone();
    for new in &mut come {
        let same = |n: &usize| {
            let Some(instance) = present.device.instances.get(*n) else { return false };
            instance.profile == new.profile && computes(present.device, instance).as_ref() == Some(&new.computes)
        };
        new.moved_from = left.iter().position(same).map(|at| left.remove(at));
    }
    Plan { stay, go, come }
}

/// Compute slices of each compute instance; empty for one that has all, `None` for a half-made instance.
pub fn computes(device: &Device, instance: &Instance) -> Option<Vec<u32>> {
    let mut slices: Vec<u32> = instance.compute.iter().map(|compute| compute.slices).collect();
    slices.sort_unstable_by(|a, b| b.cmp(a));
    match device.profile(instance.profile) {
        _ if slices.is_empty() => None,
        Some(profile) if instance.is_whole(profile) => Some(Vec::new()),
        _ => Some(slices),
    }
}

/// `3g.40gb at 4:4`, or `1c.3g.40gb,2c.3g.40gb at 4:4` for one that is shared.
pub fn described(device: &Device, instance: &Instance) -> String {
    let name = match device.profile(instance.profile) {
        Some(profile) if instance.compute.is_empty() => format!("{} without compute instance", profile.name),
        Some(profile) => {
            instance.compute.iter().map(|c| profile::device_name(profile, c)).collect::<Vec<_>>().join(",")
        }
        None => format!("profile {}", instance.profile.0),
    };
    format!("{name} at {}", instance.placement)
}

fn no_place(present: &Present<'_>, refusal: &NoPlace) -> Refusal {
    let holder = |held: &placement::Held| {
        let here = present.device.instances.iter().zip(&present.used).find(|(i, _)| i.placement == held.placement);
        here.and_then(|(_, used)| used.by()).unwrap_or("a lease").to_owned()
    };
    Refusal::NotNow(refusal.explain(holder))
}

/// What is wanted and missing on a GPU with these MIG devices, and what is there beyond it.
pub fn differences(device: &Device, present: &Names, wanted: &Names) -> (Names, Names) {
    let mut surplus = less(present, wanted);
    for instance in device.instances.iter().filter(|instance| instance.compute.is_empty()) {
        let profile = device.profile(instance.profile).map_or("unknown", |profile| profile.name.as_str());
        *surplus.entry(format!("{profile} without compute instance")).or_default() += 1;
    }
    (less(wanted, present), surplus)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::{ComputeInstance, Engines, Profile};
    use proptest::prelude::*;

    /// Name, compute slices, limit, size in memory slices, starts.
    type Row = (&'static str, u32, u32, u32, &'static [u32]);

    const A100: [Row; 6] = [
        ("1g.10gb", 1, 7, 1, &[0, 1, 2, 3, 4, 5, 6]),
        ("1g.10gb+me", 1, 1, 1, &[0, 1, 2, 3, 4, 5, 6]),
        ("2g.20gb", 2, 3, 2, &[0, 2, 4]),
        ("3g.40gb", 3, 2, 4, &[0, 4]),
        ("4g.40gb", 4, 1, 4, &[0]),
        ("7g.80gb", 7, 1, 8, &[0]),
    ];
    const A30: [Row; 4] = [
        ("1g.6gb", 1, 4, 1, &[0, 1, 2, 3]),
        ("1g.6gb+me", 1, 1, 1, &[0, 1, 2, 3]),
        ("2g.12gb", 2, 2, 2, &[0, 2]),
        ("4g.24gb", 4, 1, 4, &[0]),
    ];
    const RTX_PRO_6000: [Row; 4] = [
        ("1g.24gb", 1, 4, 3, &[0, 3, 6, 9]),
        ("1g.24gb-me", 1, 4, 3, &[0, 3, 6, 9]),
        ("2g.48gb", 2, 2, 6, &[0, 6]),
        ("4g.96gb", 4, 1, 12, &[0]),
    ];

    /// A GPU with instances as `("3g.40gb", 4, &[])`: profile, start, compute slices of its compute instances.
    fn gpu(rows: &[Row], instances: &[(&str, u32, &[u32])]) -> Device {
        let profile = |(id, row): (u32, &Row)| Profile {
            id: ProfileId(id),
            name: row.0.into(),
            slices: row.1,
            memory_mib: 1000,
            sms: 14 * row.1,
            engines: Engines::default(),
            p2p: false,
            max_instances: row.2,
            placements: row.4.iter().map(|start| Placement { start: *start, size: row.3 }).collect(),
        };
        let profiles: Vec<Profile> = (0..).zip(rows).map(profile).collect();
        let instance = |(id, (name, start, computes)): (u32, &(&str, u32, &[u32]))| {
            let profile = profiles.iter().find(|p| p.name == *name).unwrap();
            let whole = [profile.slices];
            let computes = if computes.is_empty() { &whole } else { *computes };
            let compute = |(ci, slices): (u32, &u32)| ComputeInstance {
                id: ci,
                slices: *slices,
                sms: 14,
                uuid: format!("MIG-{id}-{ci}"),
            };
            Instance {
                id,
                profile: profile.id,
                placement: *profile.placements.iter().find(|p| p.start == *start).unwrap(),
                compute: (0..).zip(computes).map(compute).collect(),
            }
        };
        Device {
            name: "A".into(),
            instances: (0..).zip(instances).map(instance).collect(),
            profiles,
            ..crate::gpu::tests::device(0)
        }
    }

    /// All idle, but those of that number.
    fn present<'a>(device: &'a Device, busy: &[usize]) -> Present<'a> {
        let used = |n| match busy.contains(&n) {
            true => Use::Busy(format!("GPU instance 0/{n} is held by container c{n}")),
            false => Use::Idle { kept: true },
        };
        Present { device, used: (0..device.instances.len()).map(used).collect(), reserved: Vec::new() }
    }

    fn wanted(names: &[(&str, usize)]) -> Names {
        names.iter().map(|(name, count)| ((*name).to_owned(), *count)).collect()
    }

    fn planned(device: &Device, busy: &[usize], names: &[(&str, usize)]) -> Result<Plan, Refusal> {
        plan(&present(device, busy), &wanted(names), Policy::default())
    }

    fn starts(plan: &Plan) -> Vec<u32> {
        plan.come.iter().map(|new| new.placement.start).collect()
    }

    #[test]
    fn one_more_beside_a_busy_one_leaves_that_alone() {
        let device = gpu(&A100, &[("3g.40gb", 4, &[])]);
        let plan = planned(&device, &[0], &[("3g.40gb", 1), ("1g.10gb", 1)]).unwrap();
        assert_eq!((plan.stay, plan.go, plan.come.len()), (vec![0], vec![], 1));
    }

    #[test]
    fn of_several_equal_ones_the_busy_stay_then_the_kept() {
        let device = gpu(&A100, &[("1g.10gb", 0, &[]), ("1g.10gb", 1, &[]), ("1g.10gb", 2, &[])]);
        let mut present = present(&device, &[2]);
        present.used[0] = Use::Idle { kept: false };
        let plan = plan(&present, &wanted(&[("1g.10gb", 2)]), Policy::default()).unwrap();
        assert_eq!((plan.stay, plan.go, plan.come), (vec![1, 2], vec![0], vec![]));
    }

    #[test]
    fn idle_ones_are_moved_only_where_the_rest_does_not_fit_otherwise() {
        let device = gpu(&A100, &[("1g.10gb", 0, &[]), ("1g.10gb", 4, &[]), ("1g.10gb", 5, &[])]);
        let plan = planned(&device, &[2], &[("1g.10gb", 3), ("4g.40gb", 1)]).unwrap();
        assert_eq!((&plan.stay, &plan.go), (&vec![1, 2], &vec![0]));
        assert_eq!(plan.come.iter().filter_map(|new| new.moved_from).collect::<Vec<_>>(), [0]);
        assert_eq!(starts(&plan).into_iter().min(), Some(0), "the 4g lies where the 1g was");
        let stuck = planned(&device, &[0, 2], &[("1g.10gb", 3), ("4g.40gb", 1)]).unwrap_err();
        let Refusal::NotNow(why) = stuck else { panic!("{stuck:?}") };
        assert!(why.contains("fragmented") && why.contains("container c0"), "{why}");
    }

    #[test]
    fn what_is_busy_and_not_wanted_refuses_all_of_it() {
        let device = gpu(&A100, &[("1g.10gb", 0, &[]), ("1g.10gb", 1, &[]), ("2g.20gb", 4, &[])]);
        let Err(Refusal::NotNow(why)) = planned(&device, &[0, 1, 2], &[("1g.10gb", 1), ("3g.40gb", 1)]) else {
            panic!()
        };
        assert_eq!(
            why,
            "GPU 0 (A): only 1 1g.10gb is wanted, and GPU instance 0/0 is held by container c0, and GPU instance 0/1 is held \
             by container c1; 1 of them must end first; no 2g.20gb is wanted, and GPU instance 0/2 is held by container c2"
        );
    }

    #[test]
    fn what_no_gpu_holds_is_told_apart_from_what_has_no_room_now() {
        let device = gpu(&A100, &[("1g.10gb", 0, &[])]);
        let never = |names: &[(&str, usize)]| match planned(&device, &[0], names) {
            Err(Refusal::Never(why)) => why,
            other => panic!("{other:?}"),
        };
        assert_eq!(never(&[("4g.40gb", 2)]), "2x4g.40gb is more than GPU 0 (A) holds");
        assert!(never(&[("5g.50gb", 1)]).contains("profile 5g.50gb is not offered by GPU 0 (A)"));
        let Err(Refusal::NotNow(why)) = planned(&device, &[0], &[("1g.10gb", 1), ("4g.40gb", 1), ("2g.20gb", 1)])
        else {
            panic!()
        };
        assert!(why.contains("container c0"), "{why}");
    }

    #[test]
    fn shared_instances_are_counted_by_their_compute_instances() {
        let device = gpu(&A100, &[("3g.40gb", 4, &[2, 1]), ("3g.40gb", 0, &[1])]);
        let same = planned(&device, &[], &[("1c.3g.40gb", 2), ("2c.3g.40gb", 1)]).unwrap();
        assert_eq!((same.stay.len(), same.go.len(), same.come.len()), (2, 0, 0));
        let other = planned(&device, &[0], &[("1c.3g.40gb", 1), ("2c.3g.40gb", 1), ("4g.40gb", 1)]).unwrap();
        assert_eq!((other.stay, other.go, other.come.len()), (vec![0], vec![1], 1));
        let packed = planned(&gpu(&A100, &[]), &[], &[("1c.3g.40gb", 2), ("2c.3g.40gb", 2)]).unwrap();
        let computes: Vec<Vec<u32>> = packed.come.into_iter().map(|new| new.computes).collect();
        assert_eq!(computes, [[2, 1], [2, 1]]);
    }

    #[test]
    fn a_half_made_instance_goes_and_one_on_its_way_out_is_waited_for() {
        let mut device = gpu(&A100, &[("3g.40gb", 4, &[])]);
        device.instances[0].compute.clear();
        let plan = planned(&device, &[], &[("3g.40gb", 1)]).unwrap();
        assert_eq!((plan.go, plan.come.len()), (vec![0], 1));
        assert_eq!(
            differences(&device, &Names::new(), &Names::new()).1,
            wanted(&[("3g.40gb without compute instance", 1)])
        );
        let mut present = present(&device, &[]);
        present.used[0] = Use::Ending("is being released".into());
        let refused = super::plan(&present, &wanted(&[("3g.40gb", 1)]), Policy::default());
        assert!(matches!(refused, Err(Refusal::NotNow(why)) if why.contains("is being released")));
    }

    /// A board; instances by number of a spot, busy or not, shared or not; wishes by number of a profile, with how many.
    type Case = (&'static [Row], Vec<(usize, bool, bool)>, Vec<(usize, usize)>);

    fn cases() -> impl Strategy<Value = Case> {
        let board = prop_oneof![Just(&A100[..]), Just(&A30[..]), Just(&RTX_PRO_6000[..])];
        let instances = prop::collection::vec((0..40usize, any::<bool>(), any::<bool>()), 0..6);
        (board, instances, prop::collection::vec((0..6usize, 0..3usize), 0..4))
    }

    /// The GPU after a plan.
    fn after(device: &Device, plan: &Plan) -> Device {
        let mut after = device.clone();
        after.instances = plan.stay.iter().map(|n| device.instances[*n].clone()).collect();
        for new in &plan.come {
            let slices = device.profile(new.profile).unwrap().slices;
            let computes = if new.computes.is_empty() { vec![slices] } else { new.computes.clone() };
            let compute =
                |(id, slices): (u32, u32)| ComputeInstance { id, slices, sms: 1, uuid: format!("MIG-new-{id}") };
            after.instances.push(Instance {
                id: 100 + after.instances.len() as u32,
                profile: new.profile,
                placement: new.placement,
                compute: (0..).zip(computes).map(compute).collect(),
            });
        }
        after
    }

    /// Whether a GPU can have these instances at once.
    fn possible(device: &Device) -> bool {
        let mut mask = 0;
        device.instances.iter().all(|instance| {
            let profile = device.profile(instance.profile).unwrap();
            let alike = device.instances.iter().filter(|other| other.profile == profile.id).count();
            let free = mask & instance.placement.mask() == 0;
            mask |= instance.placement.mask();
            let compute: u32 = instance.compute.iter().map(|c| c.slices).sum();
            free && profile.placements.contains(&instance.placement)
                && alike <= profile.max_instances as usize
                && compute <= profile.slices
        })
    }

    /// Every way to have `wanted` beside what is busy, tried one by one.
    fn can_be(device: &Device, left: &[String]) -> bool {
        let Some((name, rest)) = left.split_first() else { return true };
        let profile = profile::resolve_name(device, name).unwrap();
        profile.placements.iter().any(|at| {
            let mut next = device.clone();
            let compute = ComputeInstance { id: 0, slices: profile.slices, sms: 1, uuid: String::new() };
            next.instances.push(Instance { id: 0, profile: profile.id, placement: *at, compute: vec![compute] });
            possible(&next) && can_be(&next, rest)
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(400))]
        #[test]
        fn plans_touch_nothing_busy_can_be_cut_and_leave_nothing_out(case in cases()) {
            let (rows, instances, wishes) = case;
            let mut device = gpu(rows, &[]);
            let mut busy = Vec::new();
            for (pick, is_busy, shared) in instances {
                let spots: Vec<(&str, u32)> = rows.iter().flat_map(|row| row.4.iter().map(|start| (row.0, *start))).collect();
                let (name, start) = spots[pick % spots.len()];
                let share: &[u32] = if shared && rows.iter().any(|row| row.0 == name && row.1 > 1) { &[1] } else { &[] };
                let mut next = device.clone();
                let mut one = gpu(rows, &[(name, start, share)]).instances.remove(0);
                one.id = next.instances.len() as u32;
                next.instances.push(one);
                if possible(&next) {
                    device = next;
                    if is_busy {
                        busy.push(device.instances.len() - 1);
                    }
                }
            }
            let mut names: Names = wishes.iter().filter(|(_, count)| *count > 0)
                .map(|(row, count)| (rows[row % rows.len()].0.to_owned(), *count)).collect();
            if wishes.len() > 2 {
                for (name, count) in names_of(&device, &device.instances) {
                    *names.entry(name).or_default() += count;
                }
            }
            let present = present(&device, &busy);
            match plan(&present, &names, Policy::default()) {
                Ok(plan) => {
                    prop_assert!(busy.iter().all(|n| plan.stay.contains(n)), "{plan:?}");
                    let made = after(&device, &plan);
                    prop_assert!(possible(&made), "{made:#?}");
                    prop_assert_eq!(names_of(&made, &made.instances), names.clone());
                    let used = vec![Use::Idle { kept: true }; made.instances.len()];
                    let again = super::plan(&Present { device: &made, used, reserved: vec![] }, &names, Policy::default());
                    prop_assert!(again.is_ok_and(|again| again.go.is_empty() && again.come.is_empty()));
                    if names_of(&device, &device.instances) == names {
                        prop_assert!(plan.go.is_empty() && plan.come.is_empty(), "{plan:?}");
                    }
                    // Nothing that goes could have stayed at no cost; where compute instances are packed anew, more goes.
                    let wants_all = less(&names_of(&device, &device.instances), &names).is_empty();
                    let moved = plan.come.iter().filter(|new| new.moved_from.is_some()).count();
                    let packed = plan.come.iter().any(|new| !new.computes.is_empty());
                    prop_assert!(!wants_all || packed || plan.go.len() == moved, "{plan:?}");
                }
                Err(refusal) => {
                    let held = names_of(&device, busy.iter().map(|n| &device.instances[*n]));
                    let mut bare = device.clone();
                    bare.instances = busy.iter().map(|n| device.instances[*n].clone()).collect();
                    let rest = one_by_one(&less(&names, &held));
                    let plain = rest.iter().all(|name| profile::split_compute(name).is_none());
                    prop_assert!(
                        !less(&held, &names).is_empty() || !plain || !can_be(&bare, &rest),
                        "refused though it can be: {refusal:?}\n{names:?}\n{device:#?}"
                    );
                }
            }
        }
    }
}
