//! `migctl apply`.

use std::collections::BTreeSet;
use std::io::Write;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use serde_json::{Value, json};

use crate::common::{World, binaries, feed, run, text, wait_for};
use crate::{asked, code, document, repository, schema, shown, snapshot};

/// Calls that change a GPU.
pub const MUTATORS: [&str; 5] = [
    "nvmlDeviceCreateGpuInstance",
    "nvmlGpuInstanceCreateComputeInstance",
    "nvmlComputeInstanceDestroy",
    "nvmlGpuInstanceDestroy",
    "nvmlDeviceSetMigMode",
];

pub fn fixture(name: &str) -> String {
    repository(&format!("tests/fixtures/mig-parted/{name}")).display().to_string()
}

/// The same copied into the world: its path is no other on another machine.
pub fn copied(world: &World, name: &str) -> String {
    world.write(name, &std::fs::read_to_string(fixture(name)).unwrap()).display().to_string()
}

/// A config file of one entry for all GPUs.
fn file(world: &World, devices: &str) -> String {
    let text = format!(
        "version: v1\nmig-configs:\n  c:\n    - devices: all\n      mig-enabled: true\n      mig-devices: {devices}\n"
    );
    world.write("layout.yaml", &text).display().to_string()
}

/// How often calls that change a GPU were made since counting was turned on.
pub fn changes(world: &World) -> u64 {
    let counts: Value = serde_json::from_str(&world.sim("counts", &["--json"])).unwrap();
    let all = counts.as_object().unwrap_or_else(|| panic!("{counts}"));
    all.iter().filter(|(call, _)| MUTATORS.iter().any(|m| call.starts_with(m))).filter_map(|(_, n)| n.as_u64()).sum()
}

/// Profiles with their starts, GPU by GPU.
fn layout(world: &World) -> Vec<Vec<(String, u64)>> {
    let listed = world.document(&["list"]);
    let slices = |gpu: &Value| {
        let mut all: Vec<(String, u64)> = gpu["slices"]
            .as_array()
            .unwrap()
            .iter()
            .map(|s| (s["profile"].as_str().unwrap().to_owned(), s["start"].as_u64().unwrap()))
            .collect();
        all.sort();
        all
    };
    listed["gpus"].as_array().unwrap().iter().map(slices).collect()
}

fn apply(world: &World, devices: &str) -> Output {
    world.migctl(&["apply", &file(world, devices)])
}

fn applied(world: &World, devices: &str) -> Value {
    document(world, &["apply", &file(world, devices)])
}

fn count(document: &Value, what: &str) -> Vec<usize> {
    document["gpus"].as_array().unwrap().iter().map(|gpu| gpu[what].as_array().unwrap().len()).collect()
}

#[test]
fn one_slice_more_beside_a_busy_one_leaves_the_busy_one_alone() {
    let world = World::with(&["a100-sxm4-80gb"], &["--seed", "apply"]);
    world.recording_runtime(0);
    let (_bundle, init) = world.living("web", &asked("3g.40gb"));
    document(&world, &["gc"]); // learns the pid of the container
    let before = world.instances();
    let lease = world.lease();
    world.sim("count", &["on"]);
    let done = applied(&world, "{3g.40gb: 1, 1g.10gb: 1}");
    assert_eq!((count(&done, "stayed"), count(&done, "cut"), count(&done, "destroyed")), (vec![1], vec![1], vec![0]));
    let counts: Value = serde_json::from_str(&world.sim("counts", &["--json"])).unwrap();
    for destroys in ["nvmlComputeInstanceDestroy", "nvmlGpuInstanceDestroy"] {
        assert_eq!(counts.get(destroys).and_then(Value::as_u64).unwrap_or(0), 0, "{counts}");
    }
    assert_eq!(changes(&world), 2, "one GPU instance and its compute instance: {counts}");
    let after = world.instances();
    assert_eq!(after.len(), 2);
    assert!(after.contains(&before[0]), "the same instance, id, UUID and minors: {before:?} {after:?}");
    assert!(std::path::Path::new(&format!("/proc/{}", init.pid())).exists());
    let kept = world.leases().into_iter().find(|l| l["token"] == lease["token"]).unwrap();
    assert_eq!((&kept["holder"], &kept["state"]), (&lease["holder"], &lease["state"]));
    // It stays after the end of the container that it was cut for.
    drop(init);
    document(&world, &["gc"]);
    assert!(world.instances().contains(&before[0]));
    let states: BTreeSet<String> = world.leases().iter().map(|l| l["state"].to_string()).collect();
    assert_eq!(states, BTreeSet::from(["\"static\"".into()]));
    world.sim("count", &["on"]);
    let again = applied(&world, "{3g.40gb: 1, 1g.10gb: 1}");
    assert_eq!((&again["gpus"][0]["outcome"], changes(&world)), (&json!("unchanged"), 0));
}

#[test]
fn what_people_see() {
    let world = World::with(&["a100-sxm4-80gb", "h100-sxm-80gb"], &["--seed", "apply"]);
    world.recording_runtime(0);
    let config = world.write(
        "site.yaml",
        "version: v1\nmig-configs:\n  day:\n    - devices: [0]\n      mig-enabled: true\n      mig-devices:\n        \"1g.10gb\": 2\n        \"3g.40gb\": 1\n  \
         night:\n    - devices: [0, 5]\n      mig-enabled: true\n      mig-devices:\n        \"1g.10gb\": 1\n        \"1c.4g.40gb\": 2\n",
    );
    let config = config.display().to_string();
    snapshot(&world, "apply-dry-run", &shown(&world, &["apply", &config, "--config", "day", "--dry-run"]));
    assert_eq!(world.instances(), Vec::<Value>::new());
    let (_bundle, init) = world.living("web", &asked("1g.10gb"));
    snapshot(&world, "apply-done", &shown(&world, &["apply", &config, "--config", "day"]));
    snapshot(&world, "apply-unchanged", &shown(&world, &["apply", &config, "--config", "day"]));
    snapshot(&world, "apply-moves", &shown(&world, &["apply", &config, "-c", "night"]));
    let (_bundle, other) = world.living("db", &asked("1g.10gb"));
    let busy = world.write(
        "busy.yaml",
        "version: v1\nmig-configs:\n  big:\n    - devices: all\n      mig-enabled: true\n      mig-devices: {7g.80gb: 1}\n",
    );
    let told = shown(&world, &["apply", &busy.display().to_string()]);
    let pids = [init.pid(), other.pid()].map(|pid| format!("process {pid} "));
    let told = pids.iter().fold(told, |told, pid| told.replace(pid, "process [pid] "));
    snapshot(&world, "apply-busy", &told);
}

#[test]
fn a_busy_one_that_is_not_wanted_refuses_all_and_changes_nothing() {
    let world = World::new(&["a100-sxm4-80gb", "h100-sxm-80gb"]);
    world.recording_runtime(0);
    let (_bundle, _init) = world.living("web", &asked("1g.10gb"));
    world.sim("make", &["--gpu", "1", "--profile", "2g.20gb", "--start", "0"]);
    document(&world, &["gc"]); // learns the pid of the container
    let (machine, leases) = (world.machine(), world.leases());
    world.sim("count", &["on"]);
    let output = apply(&world, "{7g.80gb: 1}");
    assert_eq!(code(&output), 75, "{}", text(&output));
    let said = text(&output);
    assert!(said.contains("held by container web") && said.contains("nothing was changed"), "{said}");
    assert_eq!((changes(&world), world.machine(), world.leases()), (0, machine.clone(), leases.clone()));
    // A process that only the driver lists, and a hold that nobody lists, are busy, too.
    world.sim("hold", &["--gpu", "1", "--gi", &world.instances()[1]["id"].to_string(), "--pid", "1"]);
    let output = world.migctl(&["apply", &file(&world, "{1g.10gb: 1}")]);
    assert_eq!(code(&output), 75, "{}", text(&output));
    assert!(text(&output).contains("in use by process 1"), "{}", text(&output));
    assert_eq!((changes(&world), world.leases()), (0, leases));
}

#[test]
fn foreign_ones_that_match_are_adopted_and_others_go() {
    let world = World::new(&["h100-sxm-80gb"]);
    world.sim("make", &["--gpu", "0", "--profile", "1g.10gb", "--start", "2"]);
    world.sim("make", &["--gpu", "0", "--profile", "1g.10gb", "--start", "3"]);
    world.sim("make", &["--gpu", "0", "--profile", "2g.20gb", "--start", "4"]);
    let done = applied(&world, "{1g.10gb: 3}");
    assert_eq!((count(&done, "stayed"), count(&done, "cut"), count(&done, "destroyed")), (vec![2], vec![1], vec![1]));
    assert!(done["gpus"][0]["stayed"].as_array().unwrap().iter().all(|s| s["adopted"] == true), "{done:#}");
    let mut ways: Vec<String> = world.leases().iter().map(|l| l["holder"]["way"].to_string()).collect();
    ways.sort();
    assert_eq!(ways, ["\"adopt\"", "\"adopt\"", "\"create\""]);
    let again = applied(&world, "{1g.10gb: 3}");
    assert!(again["gpus"][0]["stayed"].as_array().unwrap().iter().all(|s| s["adopted"] == false), "{again:#}");
}

#[test]
fn idle_ones_are_moved_where_the_rest_does_not_fit_and_busy_ones_never() {
    let world = World::new(&["a100-sxm4-80gb"]);
    world.recording_runtime(0);
    for start in ["0", "4"] {
        assert!(world.migctl(&["create", "1g.10gb", "--gpu", "0", "--start", start]).status.success());
    }
    let at_four = world.instances().into_iter().find(|gi| gi["placement"]["start"] == 4).unwrap();
    let done = applied(&world, "{1g.10gb: 2, 4g.40gb: 1}");
    assert_eq!((count(&done, "stayed"), count(&done, "cut"), count(&done, "destroyed")), (vec![1], vec![2], vec![1]));
    assert!(world.instances().contains(&at_four), "only the one in the way was moved");
    // The same with holders: told who is in the way, and nothing changed.
    let world = World::new(&["a100-sxm4-80gb"]);
    world.recording_runtime(0);
    assert!(world.migctl(&["create", "1g.10gb", "--gpu", "0", "--start", "0"]).status.success());
    let (_bundle, _init) = world.living("web", &asked("1g.10gb"));
    let machine = world.machine();
    let output = apply(&world, "{1g.10gb: 1, 4g.40gb: 1}");
    assert_eq!(code(&output), 75, "{}", text(&output));
    assert!(text(&output).contains("held by container web"), "{}", text(&output));
    assert_eq!(world.machine(), machine);
}

#[test]
fn a_reserved_slice_that_moves_stays_reserved() {
    let world = World::new(&["a100-sxm4-80gb"]);
    assert!(world.migctl(&["create", "1g.10gb", "--gpu", "0", "--start", "0"]).status.success());
    let output = world.migctl(&["reserve", "--uid", "1000", "1g.10gb"]);
    assert!(output.status.success(), "{}", text(&output));
    applied(&world, "{1g.10gb: 1, 4g.40gb: 1}");
    let reserved: Vec<Value> = world.leases().into_iter().filter(|l| l["reserved_for"] == 1000).collect();
    assert_eq!(reserved.len(), 1);
    assert_ne!(reserved[0]["slices"][0]["placement"]["start"], 0);
}

#[test]
fn impossible_layouts_are_told_before_anything_is_changed() {
    let world = World::new(&["a100-sxm4-80gb", "a30-24gb"]);
    world.sim("make", &["--gpu", "0", "--profile", "1g.10gb", "--start", "0"]);
    let before = ids(&world);
    for (devices, said) in [
        ("{4g.40gb: 2}", "2x4g.40gb is more than GPU 0 (NVIDIA A100-SXM4-80GB) holds"),
        ("{1g.10gb: 8}", "8x1g.10gb is more than GPU 0"),
        ("{1g.10gb: 1}", "profile 1g.10gb is not offered by GPU 1 (NVIDIA A30); it offers"),
        ("{9g.90gb: 1}", "not offered by GPU 0"),
    ] {
        let output = apply(&world, devices);
        assert_eq!(code(&output), 65, "{}", text(&output));
        assert!(text(&output).contains(said), "{devices}: {}", text(&output));
    }
    // What only the driver knows is rolled back: a 4g.40gb has no compute instance of three slices.
    let output = apply_to(&world, 0, "{3c.4g.40gb: 1, 1g.10gb: 1}");
    assert_eq!(code(&output), 65, "{}", text(&output));
    let said = text(&output);
    assert!(said.contains("no compute instance of 3c") && said.contains("rolled back"), "{said}");
    assert_eq!((ids(&world), world.leases()), (before, Vec::new()));
}

/// Instances with their places and UUIDs.
fn ids(world: &World) -> Vec<(Value, Value, Value)> {
    let id = |gi: &Value| (gi["id"].clone(), gi["placement"].clone(), gi["compute_instances"][0]["uuid"].clone());
    world.instances().iter().map(id).collect()
}

fn apply_to(world: &World, gpu: u32, devices: &str) -> Output {
    let text = format!(
        "version: v1\nmig-configs:\n  c:\n    - devices: [{gpu}]\n      mig-enabled: true\n      mig-devices: {devices}\n"
    );
    world.migctl(&["apply", &world.write("one.yaml", &text).display().to_string()])
}

#[test]
fn bad_files_are_refused_with_the_place() {
    let world = World::new(&["a30-24gb"]);
    for (text, exit, said) in [
        ("version: v1\nmig-config: {}\n", 65, "line 2: unknown field `mig-config`"),
        (
            "version: v1\nmig-configs: {a: [{devices: all, mig-enabled: false}], b: [{devices: all, mig-enabled: false}]}\n",
            65,
            "name one with --config: a, b",
        ),
        (
            "version: v1\nmig-configs: {a: [{devices: [7], mig-enabled: false}]}\n",
            65,
            "is about no GPU of this machine",
        ),
    ] {
        let path = world.write("bad.yaml", text).display().to_string();
        let output = world.migctl(&["apply", &path]);
        assert_eq!(code(&output), exit, "{}", crate::common::text(&output));
        let shown = crate::common::text(&output);
        assert!(shown.contains(said) && shown.contains(&path), "{shown}");
    }
    let output = world.migctl(&["apply", &world.path("none.yaml").display().to_string()]);
    assert_eq!(code(&output), 74, "{}", text(&output));
    assert_eq!(code(&world.migctl(&["apply"])), 64);
    let huge = world.write("huge.yaml", &" ".repeat(2 << 20)).display().to_string();
    assert_eq!(code(&world.migctl(&["apply", &huge])), 65);
}

#[test]
fn a_file_comes_by_standard_input_and_by_mig_parteds_own_options() {
    let world = World::new(&["a30-24gb"]);
    let text = "version: v1\nmig-configs:\n  one-off:\n  - devices: all\n    mig-enabled: true\n    mig-devices:\n      1g.6gb: 4\n";
    let migctl = |args: &[&str]| {
        let mut command = Command::new(binaries().join("migctl"));
        command.arg("--config").arg(world.config()).args(args);
        command
    };
    let output = feed(&mut migctl(&["apply", "-f", "-"]), text.as_bytes());
    assert!(output.status.success(), "{}", crate::common::text(&output));
    assert_eq!(layout(&world)[0].len(), 4);
    let output = feed(&mut migctl(&["assert", "-f", "-", "-c", "one-off"]), text.as_bytes());
    assert!(output.status.success(), "{}", crate::common::text(&output));
    let json = r#"{"version": "v1", "mig-configs": {"j": [{"devices": "all", "mig-enabled": true, "mig-devices": {"2g.12gb": 2}}]}}"#;
    let output = feed(&mut migctl(&["apply", "-", "--config", "j"]), json.as_bytes());
    assert!(output.status.success(), "{}", crate::common::text(&output));
    assert_eq!(layout(&world)[0], [("2g.12gb".to_owned(), 0), ("2g.12gb".to_owned(), 2)]);
}

#[test]
fn compute_instances_share_and_are_counted_by_name() {
    let world = World::new(&["a100-sxm4-80gb"]);
    let shared = fixture("shared.yaml");
    let done = document(&world, &["apply", &shared, "--config", "shared"]);
    assert_eq!(count(&done, "cut"), [2], "{done:#}");
    let computes: Vec<usize> =
        world.instances().iter().map(|gi| gi["compute_instances"].as_array().unwrap().len()).collect();
    assert_eq!(computes.iter().sum::<usize>(), 5);
    world.sim("count", &["on"]);
    document(&world, &["apply", &shared, "--config", "shared"]);
    assert_eq!(changes(&world), 0);
    let next = document(&world, &["apply", &shared, "--config", "partly-shared"]);
    assert_eq!((count(&next, "cut"), count(&next, "stayed")), (vec![3], vec![0]), "{next:#}");
}

#[test]
fn only_managed_gpus_are_touched_and_cordoned_ones_may_be() {
    let world = World::new(&["a30-24gb", "a30-24gb"]);
    world.settings("[limits]\ngpus = [\"1\"]");
    assert!(world.migctl(&["cordon", "1"]).status.success());
    let done = applied(&world, "{2g.12gb: 1}");
    assert_eq!(done["gpus"].as_array().unwrap().len(), 1);
    assert_eq!(layout(&world).iter().map(Vec::len).collect::<Vec<_>>(), [0, 1]);
    let output = apply_to(&world, 0, "{}");
    assert_eq!(code(&output), 65, "{}", text(&output));
}

#[test]
fn modes_are_turned_on_and_off_at_once_where_the_board_can() {
    let world = World::with(&["h100-sxm-80gb"], &["--mig", "off"]);
    let every = fixture("every-board.yaml");
    let done = document(&world, &["apply", &every, "--config", "all-balanced"]);
    assert_eq!((&done["gpus"][0]["mig"], count(&done, "cut")), (&json!("on"), vec![4]));
    let done = document(&world, &["apply", &every, "--config", "all-disabled"]);
    assert_eq!((&done["gpus"][0]["mig"], count(&done, "destroyed")), (&json!("off"), vec![4]));
    world.assert_clean("after all-disabled");
    // What turns out to be impossible once the mode is on leaves it off.
    let output = apply(&world, "{4g.40gb: 2}");
    assert_eq!(code(&output), 65, "{}", text(&output));
    assert!(text(&output).contains("rolled back"), "{}", text(&output));
    assert_eq!(world.document(&["list"])["gpus"][0]["mig"], "off");
    let on = document(&world, &["apply", &every, "--config", "all-balanced", "--mode-only"]);
    assert_eq!((&on["gpus"][0]["mig"], count(&on, "cut")), (&json!("on"), vec![0]));
    assert_eq!(on["gpus"][0]["outcome"], "changed");
}

#[test]
fn a_mode_that_waits_for_a_reset_is_told_and_nothing_else_done() {
    let world = World::with(&["a100-sxm4-80gb", "h100-sxm-80gb"], &["--mig", "off", "--seed", "apply"]);
    let every = copied(&world, "every-board.yaml");
    let output = world.migctl(&["apply", &every, "--config", "all-balanced", "--json"]);
    assert_eq!(code(&output), 75, "{}", text(&output));
    let pending: Value = serde_json::from_slice(&output.stdout).unwrap();
    schema("apply", &pending);
    assert_eq!([&pending["gpus"][0]["outcome"], &pending["gpus"][1]["outcome"]], ["pending", "pending"]);
    snapshot(&world, "apply-pending", &shown(&world, &["apply", &every, "--config", "all-balanced"]));
    assert_eq!(world.instances(), Vec::<Value>::new());
    world.sim("reset", &["--gpu", "0"]);
    document(&world, &["apply", &every, "--config", "all-balanced"]);
    assert_eq!(layout(&world).iter().map(Vec::len).collect::<Vec<_>>(), [4, 4]);
    let output = world.migctl(&["apply", &every, "--config", "all-disabled"]);
    assert_eq!(code(&output), 75, "{}", text(&output));
    assert_eq!(world.instances(), Vec::<Value>::new());
    world.sim("reset", &["--gpu", "0"]);
    assert!(document(&world, &["apply", &every, "--config", "all-disabled"])["gpus"][0]["outcome"] == "unchanged");
}

#[test]
fn clients_in_the_way_of_a_mode_are_named_and_nothing_changes() {
    for board in ["h100-sxm-80gb", "a100-sxm4-80gb"] {
        let world = World::with(&[board], &["--mig", "off"]);
        world.sim("hold", &["--gpu", "0", "--pid", "1"]);
        let before = world.document(&["list"]);
        let output = world.migctl(&["apply", &fixture("every-board.yaml"), "--config", "all-balanced"]);
        assert_eq!(code(&output), 75, "{board}: {}", text(&output));
        assert!(text(&output).contains("process 1 ("), "{board}: {}", text(&output));
        assert_eq!(world.document(&["list"]), before, "{board}");
    }
}

#[test]
fn a_failure_in_the_middle_is_rolled_back_to_the_same_slices() {
    for (call, nth) in [
        ("nvmlDeviceCreateGpuInstance*", "1"),
        ("nvmlDeviceCreateGpuInstance*", "2"),
        ("nvmlGpuInstanceCreateComputeInstance*", "1"),
        ("nvmlGpuInstanceCreateComputeInstance*", "2"),
        ("nvmlGpuInstanceDestroy", "2"),
        ("nvmlComputeInstanceDestroy", "2"),
    ] {
        let world = World::new(&["a100-sxm4-80gb"]);
        applied(&world, "{1g.10gb: 1, 3g.40gb: 1}");
        world.sim("make", &["--gpu", "0", "--profile", "2g.20gb", "--start", "2"]);
        let before = ids(&world);
        let kept = |world: &World| -> BTreeSet<String> {
            world.leases().iter().map(|l| format!("{} {}", l["token"], l["slices"])).collect()
        };
        let records = kept(&world);
        // A destroy is tried again at once; what is cut is not.
        let times = if call.ends_with("Destroy") { "forever" } else { "1" };
        world.fault(call, &["--nth", nth, "--times", times, "--fail", if times == "1" { "23" } else { "19" }]);
        let output = apply(&world, "{4g.40gb: 1, 1g.10gb: 1, 2g.20gb: 1}");
        assert!(!output.status.success(), "{call} {nth}");
        let said = text(&output);
        assert!(said.contains("rolled back: everything is as it was"), "{call} {nth}: {said}");
        world.sim("clear-faults", &[]);
        assert_eq!(ids(&world), before, "{call} {nth}");
        assert_eq!(kept(&world), records, "{call} {nth}");
        applied(&world, "{4g.40gb: 1, 1g.10gb: 1, 2g.20gb: 1}");
    }
}

#[test]
fn a_roll_back_that_fails_says_what_stands() {
    let world = World::with(&["a100-sxm4-80gb"], &["--seed", "apply"]);
    applied(&world, "{3g.40gb: 1, 1g.10gb: 1}");
    world.fault("nvmlDeviceCreateGpuInstance*", &["--nth", "1", "--times", "5", "--fail", "15"]);
    let output = apply(&world, "{7g.80gb: 1}");
    assert!(!output.status.success());
    let said = text(&output);
    assert!(said.contains("not all of it could be rolled back"), "{said}");
    assert!(said.contains("is without") && said.contains("3g.40gb at"), "{said}");
    world.sim("clear-faults", &[]);
    document(&world, &["gc"]);
    applied(&world, "{7g.80gb: 1}");
}

#[test]
fn a_signal_ends_it_between_two_steps_with_all_undone() {
    for (signal, exit) in [("-INT", 130), ("-TERM", 143)] {
        let world = World::new(&["a100-sxm4-80gb"]);
        applied(&world, "{3g.40gb: 1}");
        let before = world.instances();
        let path = file(&world, "{1g.10gb: 7}");
        world.sim("latency", &["--call", "nvmlDeviceCreateGpuInstance*", "--ms", "150"]);
        let mut command = Command::new(binaries().join("migctl"));
        command.arg("--config").arg(world.config()).args(["apply", &path]);
        let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        wait_for("the first new slices", Duration::from_secs(20), || {
            world
                .instances()
                .iter()
                .filter(|gi| gi["compute_instances"].as_array().is_some_and(|c| !c.is_empty()))
                .count()
                > 1
        });
        assert!(run(Command::new("kill").arg(signal).arg(child.id().to_string())).status.success());
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(exit), "{}", text(&output));
        assert!(text(&output).contains("interrupted; rolled back"), "{}", text(&output));
        let uuids = |gis: &[Value]| gis.iter().map(|g| g["compute_instances"][0]["uuid"].clone()).collect::<Vec<_>>();
        assert_eq!(uuids(&world.instances()), uuids(&before));
    }
}

#[test]
fn progress_is_for_a_terminal() {
    let world = World::new(&["a30-24gb"]);
    let output = apply(&world, "{2g.12gb: 2}");
    assert!(output.stderr.is_empty(), "{}", text(&output));
    let mut child = Command::new("script")
        .args([
            "-qec",
            &format!(
                "{} --config {} apply {} >/dev/null",
                binaries().join("migctl").display(),
                world.config().display(),
                file(&world, "{1g.6gb: 4}")
            ),
            "/dev/null",
        ])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().flush().unwrap();
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(said.contains("GPU 0: destroying 2g.12gb at 0:2") && said.contains("GPU 0: cutting 1g.6gb at"), "{said}");
}

#[test]
fn killed_at_any_change_nothing_is_lost_and_applying_again_finishes() {
    let mut killed = 0;
    let calls = MUTATORS[..4].iter().flat_map(|call| ["before", "after"].map(|how| (call, how)));
    for (call, how) in calls {
        for nth in 1.. {
            // Kept, foreign and held ones; some stay, one moves, some go.
            let world = World::new(&["a100-sxm4-80gb"]);
            world.recording_runtime(0);
            let (_bundle, init) = world.living("web", &asked("1g.10gb"));
            for (profile, start) in [("1g.10gb", "1"), ("2g.20gb", "2")] {
                assert!(world.migctl(&["create", profile, "--gpu", "0", "--start", start]).status.success());
            }
            world.sim("make", &["--gpu", "0", "--profile", "2g.20gb", "--start", "4"]);
            let held = world.instances().into_iter().find(|gi| gi["placement"]["start"] == 6).unwrap();
            world.fault(&format!("{call}*"), &["--nth", &nth.to_string(), "--kill", how]);
            let path = file(&world, "{1g.10gb: 2, 4g.40gb: 1, 1c.2g.20gb: 0}");
            let output = world.migctl(&["apply", &path]);
            let died = output.status.code().is_none();
            let when = format!("killed {how} {call} {nth}");
            world.sim("clear-faults", &[]);
            killed += usize::from(died);
            if died {
                let next = world.migctl(&["gc"]);
                assert!(next.status.success(), "{when}: {}", text(&next));
                let leases = world.leases();
                assert!(leases.iter().all(|l| l["state"] == "static" || l["state"] == "active"), "{when}: {leases:#?}");
                let made: Vec<Value> = world.instances();
                let recorded = |gi: &Value| {
                    leases
                        .iter()
                        .flat_map(|l| l["slices"].as_array().unwrap())
                        .any(|s| s["placement"] == gi["placement"])
                };
                let foreign = |gi: &Value| gi["placement"]["start"] == 4 && gi["placement"]["size"] == 2;
                assert!(made.iter().all(|gi| recorded(gi) || foreign(gi)), "{when}: {made:#?} {leases:#?}");
            } else {
                assert!(output.status.success(), "{when}: {}", text(&output));
            }
            let done = applied(&world, "{1g.10gb: 2, 4g.40gb: 1}");
            assert_eq!(
                done["gpus"][0]["outcome"],
                if died { done["gpus"][0]["outcome"].clone() } else { json!("unchanged") }
            );
            assert!(world.instances().contains(&held), "{when}: the one in use was touched");
            assert_eq!(world.instances().len(), 3, "{when}");
            drop(init);
            document(&world, &["gc"]);
            assert_eq!(world.instances().len(), 3, "{when}: what is kept stays after its container");
            assert!(world.migctl(&["assert", &file(&world, "{1g.10gb: 2, 4g.40gb: 1}")]).status.success(), "{when}");
            if !died {
                break;
            }
        }
    }
    assert!(killed > 15, "only {killed} kills: the faults did not fire");
}

/// strace's words for a kill at the `nth` rename: every record of ours comes by one, or goes by an unlink.
fn killed_at(call: &str, nth: usize) -> Command {
    let mut command = Command::new("strace");
    command.args(["-f", "-qqq", "-o", "/dev/null", "-e", &format!("trace={call}")]);
    command.args(["-e", &format!("inject={call}:signal=SIGKILL:when={nth}")]);
    command
}

#[test]
fn killed_at_any_record_the_slice_in_use_stays_and_applying_again_finishes() {
    if !run(killed_at("rename", 9).arg("/bin/true")).status.success() {
        return crate::common::skip("kills at the records of apply", "strace is not installed, or may not trace here");
    }
    let mut killed = 0;
    for call in ["rename", "unlink"] {
        for nth in 1.. {
            let world = World::new(&["a30-24gb"]);
            world.recording_runtime(0);
            let (_bundle, init) = world.living("web", &asked("1g.6gb"));
            world.sim("make", &["--gpu", "0", "--profile", "1g.6gb", "--start", "1"]);
            let held = world.instances().into_iter().find(|gi| gi["placement"]["start"] != 1).unwrap();
            let path = file(&world, "{1g.6gb: 1, 1g.6gb+me: 1, 2g.12gb: 1}");
            let output = run(killed_at(call, nth)
                .arg(binaries().join("migctl"))
                .arg("--config")
                .arg(world.config())
                .args(["apply", &path]));
            let when = format!("killed at {call} {nth}");
            let died = output.status.code() != Some(0);
            assert!(died || output.stderr.is_empty(), "{when}: {}", text(&output));
            killed += usize::from(died);
            assert!(world.instances().contains(&held), "{when}");
            applied(&world, "{1g.6gb: 1, 1g.6gb+me: 1, 2g.12gb: 1}");
            drop(init);
            document(&world, &["gc"]);
            assert!(world.instances().contains(&held), "{when}: it stays after its container");
            let states: Vec<String> = world.leases().iter().map(|l| l["state"].to_string()).collect();
            assert_eq!(states, ["\"static\""; 3], "{when}");
            if !died {
                break;
            }
        }
    }
    assert!(killed > 8, "only {killed} kills");
}

#[test]
fn what_a_quarantined_holder_has_left_is_not_cut_again() {
    let world = World::new(&["a100-sxm4-80gb"]);
    world.recording_runtime(0);
    let (_bundle, _init) = world.living("web", &asked("1g.10gb"));
    assert!(world.migctl(&["gc"]).status.success()); // which learns of its first process
    assert!(world.migctl(&["destroy", "--all", "--force"]).status.success());
    let held = world.lease()["slices"][0]["placement"].clone();
    let output = world.migctl(&["apply", &file(&world, "{1g.10gb: 1}"), "--config", "c"]);
    assert_eq!(code(&output), 0, "{}", text(&output));
    let instances = world.instances();
    assert!(instances.len() == 1 && instances[0]["placement"] != held, "{instances:?} beside {held}");
}
