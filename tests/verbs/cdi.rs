//! `migctl cdi` and the spec that is kept true; the hooks of a spec without a container. Real ones are in
//! tests/containers/cdi.rs.

use std::path::PathBuf;
use std::process::Output;

use crate::common::{Init, World, config, state, text, wait_for};
use serde_json::{Value, json};

const OFFERED: &str = "[slices]\nforeign = \"idle\"";

/// One A100 with two slices that somebody else cut, which may be given.
fn machine() -> World {
    let world = World::new(&["a100-sxm4-80gb"]);
    world.settings(OFFERED);
    for profile in ["1g.10gb", "2g.20gb"] {
        world.sim("make", &["--gpu", "0", "--profile", profile]);
    }
    world
}

fn uuids(world: &World) -> Vec<String> {
    let uuid = |i: &Value| i["compute_instances"][0]["uuid"].as_str().unwrap().to_owned();
    world.instances().iter().map(uuid).collect()
}

fn names(spec: &Value) -> Vec<String> {
    let devices = spec["devices"].as_array().unwrap().iter();
    devices.map(|d| d["name"].as_str().unwrap().to_owned()).collect()
}

fn code(output: &Output) -> i32 {
    output.status.code().unwrap()
}

fn spec_in(path: &PathBuf) -> Option<Value> {
    std::fs::read(path).ok().map(|bytes| serde_json::from_slice(&bytes).unwrap())
}

/// A config with a cgroup, as engines write them.
fn ordinary() -> Value {
    let mut config = config(json!({}), &[]);
    config["linux"]["cgroupsPath"] = json!("/engine/container");
    config
}

/// A container that a runtime is creating: it waits for its hooks.
struct Created {
    id: &'static str,
    bundle: PathBuf,
    init: Init,
}

impl Created {
    fn new(world: &World, id: &'static str) -> Created {
        Created { id, bundle: world.bundle(id, &ordinary()), init: Init::start() }
    }

    /// Runs a hook of the spec, as a runtime does: poststop when the first process has ended.
    fn hook(&self, world: &World, stage: &str, uuid: &str) -> Output {
        if stage == "poststop" {
            let pid = nix::unistd::Pid::from_raw(self.init.pid().cast_signed());
            nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
            let dead = || mig_hook::host::process(self.init.pid()).is_none();
            wait_for("the end of the first process", std::time::Duration::from_secs(20), dead);
        }
        world.hook(&[stage, "--slice", uuid], &state(self.id, self.init.pid(), &self.bundle))
    }
}

#[test]
fn slices_that_exist_are_offered_with_their_nodes_and_hooks() {
    let world = machine();
    let spec = world.document(&["cdi"]);
    assert_eq!((&spec["kind"], &spec["cdiVersion"]), (&json!("mig-hook.io/slice"), &json!("0.5.0")));
    assert_eq!(names(&spec), uuids(&world));
    let machine = world.machine();
    for (device, instance) in spec["devices"].as_array().unwrap().iter().zip(world.instances()) {
        let (uuid, edits) = (device["name"].as_str().unwrap(), &device["containerEdits"]);
        let compute = &instance["compute_instances"][0];
        let numbers = |node: &Value| (node["major"].clone(), node["minor"].clone());
        let nodes: Vec<(Value, Value)> = edits["deviceNodes"].as_array().unwrap().iter().map(numbers).collect();
        let majors = &machine["majors"];
        for wanted in [
            (majors["nvidia"].clone(), json!(255)),
            (majors["nvidia"].clone(), json!(0)),
            (majors["uvm"].clone(), json!(0)),
            (majors["caps"].clone(), instance["cap_minor"].clone()),
            (majors["caps"].clone(), compute["cap_minor"].clone()),
        ] {
            assert!(nodes.contains(&wanted), "{wanted:?} is not in {nodes:?}");
        }
        assert_eq!(nodes.len(), 6);
        for node in edits["deviceNodes"].as_array().unwrap() {
            let (path, on_host) = (node["path"].as_str().unwrap(), node["hostPath"].as_str().unwrap());
            assert_eq!(on_host, world.path("m").join(&path[1..]).to_str().unwrap());
            assert_eq!((&node["permissions"], &node["type"]), (&json!("rw"), &json!("c")));
        }
        assert!(edits["env"].as_array().unwrap().contains(&json!(format!("CUDA_VISIBLE_DEVICES={uuid}"))));
        for (hook, stage) in edits["hooks"].as_array().unwrap().iter().zip(["createRuntime", "poststop"]) {
            assert_eq!(hook["hookName"], stage);
            let args = json!(["mig-hook", "--config", world.config(), stage, "--slice", uuid]);
            assert_eq!(hook["args"], args);
            assert!(PathBuf::from(hook["path"].as_str().unwrap()).is_file());
            assert!(!hook["env"].as_array().unwrap().is_empty());
        }
    }
    assert_eq!(text(&world.migctl(&["cdi"])), text(&world.migctl(&["cdi", "--output", "-"])));
}

#[test]
fn what_may_not_be_given_is_not_offered() {
    let world = machine();
    world.settings("");
    let output = world.migctl(&["cdi"]);
    assert!(code(&output) == 75 && text(&output).contains("slices.foreign"), "{}", text(&output));
    assert!(output.stdout.is_empty());

    // Half a slice, and one that was cut for a container.
    let foreign = uuids(&world);
    world.settings(OFFERED);
    world.sim("make", &["--gpu", "0", "--profile", "1g.10gb", "--no-ci"]);
    let container = world.hook(&["precreate"], config(json!({"mig.profile": "1g.20gb"}), &[]).to_string().as_bytes());
    assert!(container.status.success(), "{}", text(&container));
    assert_eq!(world.instances().len(), 4);
    assert_eq!(names(&world.document(&["cdi"])), foreign);

    // A profile, and a GPU, that nobody may have.
    world.settings(&format!("{OFFERED}\n[limits]\nprofiles = [\"2g.20gb\"]"));
    let offered = &world.document(&["cdi"])["devices"][0]["containerEdits"]["env"];
    assert!(offered.as_array().unwrap().contains(&json!("MIG_DEVICE_PROFILES=2g.20gb")));
    assert_eq!(names(&world.document(&["cdi"])).len(), 1);
    world.settings(&format!("{OFFERED}\n[limits]\ngpus = [\"5\"]"));
    let output = world.migctl(&["cdi"]);
    assert!(code(&output) == 77 && text(&output).contains("limits.gpus"), "{}", text(&output));
}

#[test]
fn what_is_kept_is_offered_whatever_foreign_ones_may_be() {
    let world = machine();
    let foreign = uuids(&world);
    world.settings("");
    let made = world.document(&["create", "1g.10gb"])["created"][0]["devices"][0]["uuid"].clone();
    assert_eq!(names(&world.document(&["cdi"])), [made.as_str().unwrap()]);
    let adopted = world.migctl(&["adopt", "--all"]);
    assert!(adopted.status.success(), "{}", text(&adopted));
    let offered = names(&world.document(&["cdi"]));
    assert!(foreign.iter().all(|uuid| offered.contains(uuid)) && offered.len() == foreign.len() + 1, "{offered:?}");
    // Taken by its hooks, it is kept as before.
    let one = Created::new(&world, "one");
    let output = one.hook(&world, "createRuntime", made.as_str().unwrap());
    assert!(output.status.success(), "{}", text(&output));
    assert_eq!(world.leases().len(), foreign.len() + 2);
    let output = one.hook(&world, "poststop", made.as_str().unwrap());
    assert!(output.status.success(), "{}", text(&output));
    assert_eq!((world.leases().len(), uuids(&world).len()), (foreign.len() + 1, foreign.len() + 1));
}

#[test]
fn a_spec_is_taken_once_and_stays_offered() {
    let world = machine();
    let slices = uuids(&world);
    let (one, two) = (Created::new(&world, "one"), Created::new(&world, "two"));
    let output = one.hook(&world, "createRuntime", &slices[0]);
    assert!(output.status.success(), "{}", text(&output));
    let lease = world.lease();
    assert_eq!((&lease["holder"]["way"], &lease["holder"]["container"]), (&json!("cdi"), &json!("one")));
    assert_eq!((&lease["slices"][0]["uuid"], &lease["slices"][0]["ours"]), (&json!(slices[0]), &json!(false)));

    let output = two.hook(&world, "createRuntime", &slices[0]);
    assert!(code(&output) == 75 && text(&output).contains("is held by container one"), "{}", text(&output));
    assert_eq!(names(&world.document(&["cdi"])), slices, "what is held is refused by us, not unknown to the engine");
    // Its own poststop, as runc runs it after a failed create, frees nothing of the other's.
    assert!(two.hook(&world, "poststop", &slices[0]).status.success());
    assert_eq!(world.leases().len(), 1);

    // A late one of an earlier life with this id and bundle finds the container alive.
    let late = world.hook(&["poststop", "--slice", &slices[0]], &state("one", 0, &one.bundle));
    assert_eq!((code(&late), world.leases().len()), (0, 1));
    assert!(one.hook(&world, "poststop", &slices[0]).status.success());
    assert_eq!((world.leases().len(), uuids(&world)), (0, slices.clone()), "what is not ours is not destroyed");
    let two = Created::new(&world, "two");
    assert!(two.hook(&world, "createRuntime", &slices[0]).status.success());
    // Without poststop, gc sees that the container is gone.
    drop(two.init);
    assert_eq!(world.document(&["gc"])["actions"][0]["result"], "freed");
    assert_eq!(uuids(&world), slices);
    let events: Vec<_> = world.audit().iter().map(|line| line["event"].as_str().unwrap().to_owned()).collect();
    assert_eq!(events, ["grant", "refusal", "release", "grant", "release"]);
}

/// A config as an engine writes it from our spec: the nodes' rules and the hooks of these slices, and one rule more.
fn given(world: &World, slices: &[String], more: Value) -> Value {
    let mut config = ordinary();
    let spec = world.document(&["cdi"]);
    let devices = spec["devices"].as_array().unwrap().iter();
    let (mut rules, mut hooks) = (vec![json!({"allow": false, "access": "rwm"})], vec![]);
    for device in devices.filter(|d| slices.iter().any(|s| d["name"] == json!(s))) {
        let edits = &device["containerEdits"];
        for node in edits["deviceNodes"].as_array().unwrap() {
            let (major, minor) = (&node["major"], &node["minor"]);
            rules.push(json!({"allow": true, "type": "c", "major": major, "minor": minor, "access": "rw"}));
        }
        hooks.push(edits["hooks"][0].clone());
    }
    rules.push(more);
    config["linux"]["resources"]["devices"] = json!(rules);
    config["hooks"] = json!({"createRuntime": hooks});
    config
}

#[test]
fn a_container_that_reaches_more_than_its_devices_is_refused() {
    let world = machine();
    let slices = uuids(&world);
    let (nothing, majors) = (json!({"allow": false, "type": "b", "access": "rwm"}), world.machine()["majors"].clone());
    let neighbour = world.instances()[1]["cap_minor"].clone();
    let cases = [
        (json!({"allow": true, "access": "rwm"}), Some("a *:*")),
        (json!({"allow": true, "type": "c", "major": majors["caps"], "minor": neighbour, "access": "r"}), Some("\"c ")),
        (nothing.clone(), None),
    ];
    for (rule, refused) in cases {
        let container = Created::new(&world, "one");
        world.bundle("one", &given(&world, &slices[..1], rule));
        let output = container.hook(&world, "createRuntime", &slices[0]);
        match refused {
            Some(words) => {
                assert_eq!(code(&output), 77, "{}", text(&output));
                assert!(text(&output).contains("other slices than its own"), "{}", text(&output));
                assert!(text(&output).contains(words), "{}", text(&output));
                assert_eq!(world.leases(), Vec::<Value>::new());
            }
            None => assert!(output.status.success(), "{}", text(&output)),
        }
        assert!(container.hook(&world, "poststop", &slices[0]).status.success());
    }

    let loose = Created::new(&world, "loose");
    let mut config = ordinary();
    config["linux"].as_object_mut().unwrap().remove("cgroupsPath");
    world.bundle("loose", &config);
    let output = loose.hook(&world, "createRuntime", &slices[0]);
    assert!(code(&output) == 77 && text(&output).contains("without a cgroup"), "{}", text(&output));

    // Two slices: one is no stranger to the other, as many as the limit allows.
    for (limit, fits) in [(2, true), (1, false)] {
        world.settings(&format!("{OFFERED}\n[limits]\nslices_per_container = {limit}"));
        let both = Created::new(&world, "both");
        world.bundle("both", &given(&world, &slices, nothing.clone()));
        assert!(both.hook(&world, "createRuntime", &slices[0]).status.success());
        let output = both.hook(&world, "createRuntime", &slices[1]);
        assert_eq!(output.status.success(), fits, "{}", text(&output));
        assert!(fits || text(&output).contains("slices_per_container"), "{}", text(&output));
        for slice in &slices {
            assert!(both.hook(&world, "poststop", slice).status.success());
        }
        assert_eq!(world.leases(), Vec::<Value>::new());
    }
}

#[test]
fn a_lease_has_a_spec_of_its_own_without_hooks() {
    let world = machine();
    let job = Created::new(&world, "job");
    assert!(job.hook(&world, "createRuntime", &uuids(&world)[1]).status.success());
    let token = world.lease()["token"].as_str().unwrap().to_owned();
    for name in [token.as_str(), "job"] {
        let spec = world.document(&["cdi", "--lease", name]);
        assert_eq!(names(&spec), [token.as_str()]);
        let edits = &spec["devices"][0]["containerEdits"];
        assert_eq!(edits.get("hooks"), None);
        assert!(edits["env"].as_array().unwrap().contains(&json!(format!("MIG_DEVICE_UUIDS={}", uuids(&world)[1]))));
    }
    let file = world.path("lease.json");
    assert!(world.migctl(&["cdi", "--lease", &token, "--output", file.to_str().unwrap()]).status.success());
    assert_eq!(names(&spec_in(&file).unwrap()), [token]);
    let output = world.migctl(&["cdi", "--lease", "nobody"]);
    assert!(code(&output) == 65 && text(&output).contains("nobody"), "{}", text(&output));
}

#[test]
fn a_file_is_replaced_only_when_it_is_ours() {
    let world = machine();
    let path = world.path("cdi/mig-hook.json");
    let write = || world.migctl(&["cdi", "--output", path.to_str().unwrap()]);
    assert!(write().status.success());
    assert_eq!(names(&spec_in(&path).unwrap()), uuids(&world));
    world.sim("reboot", &[]);
    let output = write();
    assert!(output.status.success() && !path.exists(), "a spec without devices is none: {}", text(&output));
    std::fs::write(&path, "{\"kind\": \"nvidia.com/gpu\"}").unwrap();
    let output = write();
    assert!(code(&output) == 74 && text(&output).contains("not a CDI spec of mig-hook"), "{}", text(&output));
    assert!(path.exists());
}

#[test]
fn a_spec_that_is_switched_on_follows_every_change() {
    let world = machine();
    let path = world.path("run/cdi/mig-hook.json");
    world.settings(&format!("{OFFERED}\n[cdi]\nspec = \"{}\"", path.display()));
    let offered = || spec_in(&path).map(|spec| names(&spec));
    world.document(&["gc"]);
    assert_eq!(offered(), Some(uuids(&world)));

    // What somebody else does is seen at the next acquire, also at one that is refused, and by gc.
    let slices = uuids(&world);
    let gi = world.instances()[0]["id"].to_string();
    world.sim("destroy", &["--gpu", "0", "--gi", &gi]);
    assert_eq!(offered(), Some(slices.clone()), "nobody of ours has looked");
    let late = Created::new(&world, "late");
    let output = late.hook(&world, "createRuntime", &slices[0]);
    assert!(code(&output) == 65 && text(&output).contains("there is no MIG slice"), "{}", text(&output));
    assert_eq!(offered(), Some(slices[1..].to_vec()));
    world.sim("make", &["--gpu", "0", "--profile", "3g.40gb"]);
    assert!(late.hook(&world, "createRuntime", &slices[1]).status.success());
    assert_eq!(offered(), Some(uuids(&world)));
    // A container's own slices come and go without it.
    let before = offered();
    let container = world.hook(&["precreate"], config(json!({"mig.profile": "1g.10gb"}), &[]).to_string().as_bytes());
    assert!(container.status.success());
    assert_eq!(offered(), before);
    assert!(late.hook(&world, "poststop", &slices[1]).status.success());
    assert_eq!(offered(), before);
    world.sim("reset", &["--gpu", "0"]);
    world.migctl(&["gc"]);
    assert_eq!(offered(), None);
}

#[test]
fn a_spec_that_cannot_be_written_stops_no_container() {
    let world = machine();
    let blocked = world.write("file", "").join("mig-hook.json");
    world.settings(&format!("{OFFERED}\n[cdi]\nspec = \"{}\"", blocked.display()));
    let one = Created::new(&world, "one");
    assert!(one.hook(&world, "createRuntime", &uuids(&world)[0]).status.success());
    let output = world.migctl(&["gc"]);
    assert!(output.status.success(), "{}", text(&output));
    assert!(text(&output).contains("the CDI spec is not up to date: cannot write"), "{}", text(&output));
}

#[test]
fn who_asks_in_two_ways_is_refused_rather_than_given_half() {
    let world = machine();
    let mut config = given(&world, &uuids(&world)[..1], json!({"allow": false, "type": "b", "access": "rwm"}));
    config["annotations"] = json!({"mig.profile": "1g.10gb"});
    let output = world.hook(&["precreate"], config.to_string().as_bytes());
    assert_eq!(code(&output), 77, "{}", text(&output));
    assert!(text(&output).contains("by annotation or environment, and by --device"), "{}", text(&output));
    assert_eq!(world.leases(), Vec::<Value>::new());
}
