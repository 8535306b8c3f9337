//! The engine against a model that knows only who holds which slices: any sequence of asking, binding, giving back, dying,
//! clearing up, and others cutting beside us. On the simulator, through the real NVML loader; what is there is read from the
//! simulated driver, not from our records.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::collections::BTreeMap;
use std::path::PathBuf;

use common::{Init, World};
use mig_hook::config::Settings;
use mig_hook::engine::{self, Binding, Engine, Failure, Released};
use mig_hook::gpu::nvml::Nvml;
use mig_hook::gpu::{Device, Gpu, Instance, Placement, Profile};
use mig_hook::lease::Way;
use mig_hook::request;
use proptest::prelude::*;
use serde_json::Value;

/// Sequences that are tried, where PROPTEST_CASES does not say another number.
const CASES: u32 = 48;
const PROFILES: [&str; 5] = ["1g.10gb", "2g.20gb", "3g.40gb", "4g.40gb", "7g.80gb"];

#[derive(Debug, Clone, Copy)]
enum Step {
    /// A container asks for so many of that profile.
    Ask { profile: usize, count: usize },
    /// The container of the n-th lease is made.
    Bind(usize),
    /// It ends, and says so.
    Release(usize),
    /// Another container says that it ends.
    ReleaseWrongly(usize),
    /// Its engine, or its first process, is killed.
    Kill(usize),
    /// gc.
    Reconcile,
    /// Another tool cuts a slice.
    ForeignCut { profile: usize, place: usize },
    /// Another tool destroys one of its own.
    ForeignDestroy(usize),
    /// Another tool destroys one of ours.
    Rob(usize),
}

fn step() -> impl Strategy<Value = Step> {
    let which = 0..8_usize;
    prop_oneof![
        6 => (prop_oneof![Just(0), Just(0), 0..PROFILES.len()], 1..=3_usize)
            .prop_map(|(profile, count)| Step::Ask { profile, count: count.min(if profile > 2 { 2 } else { 3 }) }),
        4 => which.clone().prop_map(Step::Bind),
        2 => which.clone().prop_map(Step::Release),
        1 => which.clone().prop_map(Step::ReleaseWrongly),
        3 => which.clone().prop_map(Step::Kill),
        2 => Just(Step::Reconcile),
        2 => (0..PROFILES.len(), 0..8_usize).prop_map(|(profile, place)| Step::ForeignCut { profile, place }),
        1 => which.clone().prop_map(Step::ForeignDestroy),
        1 => which.prop_map(Step::Rob),
    ]
}

/// What somebody holds: GPU, where, and the UUID.
type Window = (String, Placement, String);

struct Held {
    token: String,
    slices: Vec<Window>,
    /// Engine, or first process once there is one.
    process: Init,
    container: Option<String>,
    /// Another tool has destroyed something of it.
    robbed: bool,
}

struct Model {
    world: World,
    gpu: Nvml,
    settings: Settings,
    held: Vec<Held>,
    foreign: Vec<Window>,
    /// What another tool has destroyed of ours.
    robbed: Vec<Window>,
    containers: usize,
}

fn overlap(a: &Window, b: &Window) -> bool {
    a.0 == b.0 && a.1.mask() & b.1.mask() != 0
}

fn windows(devices: &[Device]) -> Vec<Window> {
    let of = |device: &Device, instance: &Instance| {
        let uuid = instance.compute.first().map_or(String::new(), |compute| compute.uuid.clone());
        (device.uuid.clone(), instance.placement, uuid)
    };
    devices.iter().flat_map(|device| device.instances.iter().map(move |instance| of(device, instance))).collect()
}

fn named<'a>(device: &'a Device, name: &str) -> &'a Profile {
    device.profiles.iter().find(|profile| profile.name == name).unwrap()
}

impl Model {
    fn new(idle: bool) -> Model {
        let world = World::new(&["a100-sxm4-80gb", "a100-sxm4-80gb"]);
        world.settings(if idle { "[slices]\nidle_ttl = \"1h\"" } else { "" });
        let settings = Settings::load(Some(&world.config())).unwrap();
        let gpu = Nvml::at(&settings.nvml);
        Model { world, gpu, settings, held: Vec::new(), foreign: Vec::new(), robbed: Vec::new(), containers: 0 }
    }

    fn engine(&self) -> Engine<'_> {
        Engine::open(&self.settings, &self.gpu).unwrap()
    }

    /// The n-th of those that it can be, counted around.
    fn nth(&self, n: usize, fits: impl Fn(&Held) -> bool) -> Option<usize> {
        let fitting: Vec<usize> = (0..self.held.len()).filter(|at| fits(&self.held[*at])).collect();
        fitting.get(n % fitting.len().max(1)).copied()
    }

    fn take(&mut self, step: Step) {
        let chosen = match step {
            Step::Bind(n) => self.nth(n, |held| held.container.is_none()),
            Step::ReleaseWrongly(n) => self.nth(n, |held| held.container.is_some()),
            Step::Rob(n) => self.nth(n, |held| !held.robbed),
            Step::Release(n) | Step::Kill(n) => self.nth(n, |_| true),
            _ => None,
        };
        match (step, chosen) {
            (Step::Ask { profile, count }, _) => self.ask(PROFILES[profile], count),
            (Step::Bind(_), Some(at)) => self.bind(at),
            (Step::Release(_), Some(at)) => self.release(at),
            (Step::ReleaseWrongly(_), Some(at)) => {
                let outcome = self.engine().release(&self.held[at].token, Some("somebody-else"), "it says so");
                assert!(matches!(outcome, Err(Failure::Stale(_))), "{outcome:?}");
            }
            (Step::Kill(_), Some(at)) => drop(self.held.remove(at)),
            (Step::Reconcile, _) => self.reconcile(),
            (Step::ForeignCut { profile, place }, _) => self.cut_beside(PROFILES[profile], place),
            (Step::ForeignDestroy(n), _) if !self.foreign.is_empty() => {
                let gone = self.foreign.remove(n % self.foreign.len());
                self.destroy(&gone);
            }
            (Step::Rob(_), Some(at)) => {
                let gone = self.held[at].slices[0].clone();
                self.destroy(&gone);
                self.robbed.push(gone);
                self.held[at].robbed = true;
            }
            _ => {} // nobody is there for it
        }
    }

    fn ask(&mut self, profile: &str, count: usize) {
        let request = request::typed(&format!("{count}x{profile}"), None).unwrap();
        let process = Init::start();
        let holder = engine::new_holder(Way::Precreate, process.pid());
        let taken: Vec<Window> =
            self.foreign.iter().chain(self.held.iter().flat_map(|held| &held.slices)).cloned().collect();
        match self.engine().acquire(&request, &holder) {
            Ok(lease) => {
                let given = lease.slices.iter().map(|s| (s.gpu.clone(), s.placement, s.uuid.clone().unwrap()));
                let slices: Vec<Window> = given.collect();
                assert!(
                    slices.len() == count && lease.slices.iter().all(|slice| slice.profile_name == profile),
                    "{lease:?}"
                );
                for (n, slice) in slices.iter().enumerate() {
                    let others = taken.iter().chain(&slices[..n]);
                    let held = others.filter(|other| overlap(slice, other)).collect::<Vec<_>>();
                    assert!(held.is_empty(), "{slice:?} is given, but held: {held:?}");
                }
                self.held.push(Held { token: lease.token, slices, process, container: None, robbed: false });
            }
            Err(Failure::NoRoom(why)) => {
                let devices = self.gpu.devices().unwrap();
                let free = |device: &Device, at: &Placement| {
                    let window = (device.uuid.clone(), *at, String::new());
                    !taken.iter().any(|other| overlap(&window, other))
                };
                let fits = devices.iter().any(|d| named(d, profile).placements.iter().any(|at| free(d, at)));
                assert!(count > 1 || !fits, "{profile} is refused, but fits beside {taken:?}: {why}");
            }
            Err(other) => panic!("{profile}: {other}"),
        }
    }

    fn bind(&mut self, at: usize) {
        self.containers += 1;
        let container = format!("c{}", self.containers);
        let process = Init::start();
        let binding = Binding {
            container: container.clone(),
            pid: process.pid(),
            bundle: Some(self.world.path("m")),
            runtime_root: None,
            runtime: None,
        };
        match self.engine().confirm(&self.held[at].token, &binding) {
            Ok(_) => {
                let held = &mut self.held[at];
                held.process = process; // the engine may end now
                held.container = Some(container);
            }
            // What was robbed may have been found out.
            Err(Failure::Stale(_)) if self.held[at].robbed => {}
            Err(other) => panic!("{other}"),
        }
    }

    fn release(&mut self, at: usize) {
        let Held { token, process, container, .. } = self.held.remove(at);
        drop(process);
        let outcome = self.engine().release(&token, container.as_deref(), "it has ended").unwrap();
        assert!(matches!(outcome, Released::Done | Released::Unknown), "{outcome:?}");
        assert_eq!(self.engine().release(&token, container.as_deref(), "again").unwrap(), Released::Unknown);
    }

    fn reconcile(&self) {
        self.engine().reconcile().unwrap();
        let records = self.records();
        let tokens: Vec<&str> = self.held.iter().map(|held| held.token.as_str()).collect();
        for (token, lease) in &records {
            let is_idle = lease["state"] == "idle" && self.settings.idle_ttl.as_secs() > 0;
            assert!(is_idle || tokens.contains(&token.as_str()), "nobody has it: {lease}");
        }
        for held in &self.held {
            assert!(records.contains_key(&held.token), "the lease of a living holder is gone: {}", held.token);
        }
    }

    fn cut_beside(&mut self, profile: &str, place: usize) {
        let devices = self.gpu.devices().unwrap();
        let device = &devices[place % devices.len()];
        let profile = named(device, profile);
        let at = profile.placements[place % profile.placements.len()];
        // Cut again at the same place, it would be the same to everybody: ids and UUIDs come again.
        let window = (device.uuid.clone(), at, String::new());
        if self.robbed.iter().any(|slice| overlap(slice, &window)) {
            return;
        }
        if let Ok(instance) = self.gpu.create_instance(&device.uuid, profile.id, at) {
            let compute = self.gpu.create_compute(&device.uuid, instance.id, None).unwrap();
            self.foreign.push((device.uuid.clone(), at, compute.uuid));
        }
    }

    fn destroy(&self, window: &Window) {
        let instances = self.gpu.instances(&window.0).unwrap();
        let instance = instances.iter().find(|instance| instance.placement == window.1).unwrap();
        self.gpu.destroy_compute(&window.0, instance.id, instance.compute[0].id).unwrap();
        self.gpu.destroy_instance(&window.0, instance.id).unwrap();
    }

    /// Each lease by token, as the files say.
    fn records(&self) -> BTreeMap<String, Value> {
        let files = std::fs::read_dir(self.world.path("state/leases")).into_iter().flatten();
        let read = |path: PathBuf| serde_json::from_slice::<Value>(&std::fs::read(path).unwrap()).unwrap();
        files
            .map(|file| read(file.unwrap().path()))
            .map(|lease| (lease["token"].as_str().unwrap().into(), lease))
            .collect()
    }

    /// What must hold at any moment.
    fn check(&self) {
        let there = windows(&self.gpu.devices().unwrap());
        for foreign in &self.foreign {
            assert!(there.contains(foreign), "a foreign slice was touched: {foreign:?} is not in {there:?}");
        }
        for held in self.held.iter().filter(|held| !held.robbed) {
            for slice in &held.slices {
                assert!(there.contains(slice), "{} has lost {slice:?}: {there:?}", held.token);
            }
        }
        let all: Vec<&Window> = self.foreign.iter().chain(self.held.iter().flat_map(|held| &held.slices)).collect();
        for (n, one) in all.iter().enumerate() {
            let twice = all[..n].iter().find(|other| overlap(one, other));
            assert!(twice.is_none(), "{one:?} is held twice: {twice:?}");
        }
    }

    /// Everybody ends: what is left is not ours, or kept for the next.
    fn end(mut self) {
        self.held.clear();
        self.reconcile();
        let slices = self.records().into_values().flat_map(|lease| lease["slices"].as_array().unwrap().clone());
        let kept = slices.map(|slice| {
            let placement = serde_json::from_value(slice["placement"].clone()).unwrap();
            (slice["gpu"].as_str().unwrap().to_owned(), placement, slice["uuid"].as_str().unwrap().to_owned())
        });
        let mut accounted: Vec<Window> = self.foreign.iter().cloned().chain(kept).collect();
        let mut there = windows(&self.gpu.devices().unwrap());
        there.sort();
        accounted.sort();
        assert_eq!(there, accounted, "instances = leases + foreign ones");
    }
}

fn configured() -> ProptestConfig {
    let said = ProptestConfig::default();
    let cases = if std::env::var_os("PROPTEST_CASES").is_some() { said.cases } else { CASES };
    ProptestConfig { cases, failure_persistence: None, ..said }
}

proptest! {
    #![proptest_config(configured())]

    #[test]
    fn nothing_is_held_twice_or_left_and_nothing_foreign_is_touched(
        idle in any::<bool>(),
        steps in proptest::collection::vec(step(), 1..24),
    ) {
        let mut model = Model::new(idle);
        for step in steps {
            model.take(step);
            model.check();
        }
        model.end();
    }
}
