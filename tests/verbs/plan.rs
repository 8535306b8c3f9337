//! `migctl plan`: what it says, and that the containers get just that.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output};

use proptest::prelude::*;
use proptest::sample::Index;
use proptest::test_runner::TestRunner;
use serde_json::{Value, json};

use crate::common::{Init, World, binaries, config, run, skip, text};
use crate::queue::Waiting;
use crate::{asked, code, document, schema, shown, snapshot};

const A100: &str = "a100-sxm4-80gb";
const H100: &str = "h100-sxm-80gb";
const A30: &str = "a30-24gb";
const RTX: &str = "rtx-pro-6000-blackwell-se";

fn seeded(boards: &[&str]) -> World {
    let world = World::with(boards, &["--seed", "plan"]);
    world.recording_runtime(0);
    world
}

/// The document of a plan that is refused.
fn refused(world: &World, args: &[&str]) -> Value {
    let output = world.migctl(&[&["plan", "--json"], args].concat());
    let document: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{}", text(&output)));
    schema("plan", &document);
    assert_eq!((&document["outcome"], &document["exit_code"]), (&json!("refused"), &json!(code(&output))));
    document
}

/// Adds settings to those of the recording runtime.
fn more_settings(world: &World, more: &str) {
    world.settings(&format!("{more}\n[runtime]\npath = \"{}\"", world.path("rt/runc").display()));
}

fn keep(world: &World, slices: &str, uid: Option<u32>) -> bool {
    let uid = uid.map(|uid| uid.to_string());
    let args = match &uid {
        Some(uid) => vec!["reserve", slices, "--uid", uid],
        None => vec!["create", slices],
    };
    world.migctl(&args).status.success()
}

fn cordon(world: &World, index: usize) {
    let output = world.migctl(&["cordon", &index.to_string(), "--reason", "a fan is loud"]);
    assert_eq!(code(&output), 0, "{}", text(&output));
}

/// Every file below a directory, with its content.
fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        match entry.path() {
            path if path.is_dir() => found.extend(files(&path)),
            path if path.is_file() => {
                found.insert(path.display().to_string(), std::fs::read(&path).unwrap());
            }
            _ => {} // a bell of the line
        }
    }
    found
}

#[test]
fn what_fits_on_every_kind_of_board() {
    for (name, board, request) in [
        ("a100", A100, "2x1g.10gb,3g.40gb"),
        ("h100", H100, "40GiB"),
        ("a30", A30, "2g.12gb,1g.6gb"),
        ("rtx", RTX, "2g.48gb,1g.24gb"),
    ] {
        let world = seeded(&[board]);
        document(&world, &["plan", request]);
        snapshot(&world, &format!("plan-fits-{name}"), &shown(&world, &["plan", request]));
    }
}

#[test]
fn every_policy_says_why() {
    let world = seeded(&[A100, H100]);
    world.sim("make", &["--gpu", "0", "--profile", "3g.40gb"]);
    let mut said = String::new();
    for policy in ["scc", "first-fit", "driver", "binpack", "spread"] {
        more_settings(&world, &format!("[placement]\npolicy = \"{policy}\""));
        assert_eq!(document(&world, &["plan", "1g.10gb"])["policy"], policy);
        said += &format!("{policy}\n{}", shown(&world, &["plan", "1g.10gb"]));
    }
    snapshot(&world, "plan-policies", &said);
}

#[test]
fn a_plan_makes_and_changes_nothing() {
    let world = seeded(&[A100]);
    world.sim("make", &["--gpu", "0", "--profile", "4g.40gb"]);
    world.sim("count", &["on"]);
    assert_eq!(code(&world.migctl(&["plan", "1g.10gb"])), 0);
    assert_eq!(code(&world.migctl(&["plan", "7g.80gb"])), 75);
    assert!(!world.path("state").exists() && !world.path("audit.jsonl").exists());
    let (_bundle, init) = world.living("ended", &asked("1g.10gb"));
    drop(init);
    let (before, machine) = (files(&world.path("state")), world.machine());
    world.sim("count", &["on"]);
    assert_eq!(document(&world, &["plan", "1g.10gb"])["freed_first"][0]["name"], "container ended");
    assert_eq!(code(&world.migctl(&["plan", "7g.80gb"])), 75);
    assert_eq!((files(&world.path("state")), world.machine()), (before, machine));
    assert_only_looked(&world);
    cordon(&world, 0); // which destroys what has ended
    world.sim("count", &["on"]);
    assert_eq!(refused(&world, &["1g.10gb"])["refusal"]["kind"], "cordoned");
    std::fs::write(world.path("state/boot_id"), "another\n").unwrap();
    let outlived = refused(&world, &["7g.80gb"]);
    assert_eq!((&outlived["freed_first"], &outlived["refusal"]["kind"]), (&json!([]), &json!("no-room")));
    assert_eq!(outlived["holders"].as_array().unwrap().len(), 1, "the instance of nobody, on a GPU that is open");
    assert_only_looked(&world);
}

/// By the calls of the driver that were counted.
fn assert_only_looked(world: &World) {
    let calls = world.sim("counts", &["--json"]);
    assert!(calls.contains("nvmlDeviceGetMigMode"), "{calls}");
    assert!(!calls.contains("Create") && !calls.contains("Destroy") && !calls.contains("SetMig"), "{calls}");
}

#[test]
fn what_is_not_there_to_be_had() {
    let world = seeded(&[A100, A100, H100]);
    let mut said = String::new();
    for (request, kind, exit) in [
        (&["1g.5gb"][..], "not-offered", 65),
        (&["100GiB"], "not-offered", 65),
        (&["4x4g.40gb"], "never-fits", 65),
        (&["9x1g.10gb"], "not-allowed", 77),
        (&["1g.10gb", "--gpu", "7"], "no-gpu", 65),
        (&["MIG-00000000-0000-5000-8000-000000000000"], "no-such-slice", 65),
    ] {
        let plan = refused(&world, request);
        assert_eq!((&plan["refusal"]["kind"], &plan["exit_code"]), (&json!(kind), &json!(exit)), "{plan:#}");
        assert_eq!((&plan["ends"], &plan["holders"]), (&json!([]), &json!([])));
        said += &shown(&world, &[&["plan"], request].concat());
    }
    more_settings(&world, "[limits]\nprofiles = [\"1g.10gb\", \"2g.20gb\"]\ngpus = [\"2\"]");
    said += &shown(&world, &["plan", "3g.40gb"]);
    said += &shown(&world, &["plan", "40GiB"]);
    for wrong in ["1q.10gb", "1G.10GB", "2x", "MIG-x"] {
        let output = world.migctl(&["plan", wrong]);
        assert_eq!((code(&output), output.stdout.is_empty()), (65, true), "{wrong}: {}", text(&output));
        said += &shown(&world, &["plan", wrong]);
    }
    snapshot(&world, "plan-not-to-be-had", &said);
    let off = World::with(&[A30, A100], &["--mig", "off"]);
    assert_eq!(refused(&off, &["1g.6gb"])["refusal"]["kind"], "mig-off");
    snapshot(&off, "plan-mig-off", &shown(&off, &["plan", "1g.6gb"]));
}

#[test]
fn a_lease_with_two_slices_ends_as_one() {
    let world = seeded(&[A100]);
    let (_bundle, _big) = world.living("big", &asked("3g.40gb"));
    let (_bundle, _pair) = world.living("pair", &asked("2x1g.10gb"));
    let plan = refused(&world, &["4g.40gb"]);
    // Two windows are in the way, and one end frees both.
    assert_eq!((plan["ends"].as_array().unwrap().len(), plan["ends"][0].as_array().unwrap().len()), (1, 1));
    let at = plan["ends"][0][0].as_u64().unwrap() as usize;
    assert_eq!(plan["holders"][at]["container"], "pair");
    snapshot(&world, "plan-no-room", &shown(&world, &["plan", "4g.40gb"]));
    // And a greater request needs both.
    assert_eq!(refused(&world, &["7g.80gb"])["ends"][0].as_array().unwrap().len(), 2);
}

#[test]
fn fragmented_room_is_told_from_no_room() {
    let world = seeded(&[A100]);
    for start in ["0", "4"] {
        world.sim("make", &["--gpu", "0", "--profile", "1g.10gb", "--start", start]);
    }
    let plan = refused(&world, &["3g.40gb"]);
    assert_eq!(plan["refusal"]["kind"], "fragmented");
    assert_eq!(plan["ends"], json!([[0], [1]]));
    assert_eq!(plan["fits_now"], json!([{"profile": "2g.20gb", "memory_mib": 19968}]));
    let mut said = shown(&world, &["plan", "3g.40gb"]);
    said += &shown(&world, &["plan", "7g.80gb|4g.40gb"]);
    said += &shown(&world, &["plan", "30GiB"]);
    said += &shown(&world, &["plan", "7g.80gb|2g.20gb"]);
    snapshot(&world, "plan-fragmented", &said);
}

#[test]
fn kept_reserved_and_cordoned() {
    let world = seeded(&[A100, A30]);
    assert!(keep(&world, "2g.20gb,3g.40gb", None) && keep(&world, "1g.10gb", Some(1234)));
    let mut said = shown(&world, &["plan", "2g.20gb"]);
    let kept = document(&world, &["plan", "2g.20gb"]);
    assert_eq!((&kept["slices"][0]["source"], &kept["keeps"]), (&json!("kept"), &json!([])));
    said += &shown(&world, &["plan", "1g.10gb", "--as", "1234"]);
    said += &shown(&world, &["plan", "1g.10gb", "--as", "root"]);
    assert_eq!(document(&world, &["plan", "1g.10gb", "--as", "1234"])["slices"][0]["source"], "reserved");
    let uuid = document(&world, &["plan", "1g.10gb", "--as", "1234"])["slices"][0]["uuid"].clone();
    let plan = refused(&world, &[uuid.as_str().unwrap(), "--as", "0"]);
    assert_eq!(plan["refusal"]["kind"], "reserved");
    said += &shown(&world, &["plan", uuid.as_str().unwrap(), "--as", "0"]);
    // What is kept is in the way of anything greater; who uses it ends before it can.
    let (_bundle, _user) = world.living("user", &asked("3g.40gb"));
    said += &shown(&world, &["plan", "7g.80gb"]);
    said += &shown(&world, &["plan", "3g.40gb"]);
    cordon(&world, 1);
    let plan = refused(&world, &["1g.6gb"]);
    assert_eq!(plan["refusal"]["kind"], "not-offered", "the A30 is closed, and the A100 has none");
    said += &shown(&world, &["plan", "1g.6gb"]);
    said += &shown(&world, &["plan", "1g.6gb", "--gpu", "1"]);
    assert_eq!(refused(&world, &["1g.6gb", "--gpu", "1"])["refusal"]["kind"], "cordoned");
    snapshot(&world, "plan-kept", &said);
    let nobody = world.migctl(&["plan", "1g.10gb", "--as", "no-such-user"]);
    assert!(code(&nobody) == 64 && text(&nobody).contains("no-such-user"), "{}", text(&nobody));
}

#[test]
fn the_end_of_who_uses_a_kept_slice_is_enough_for_its_profile() {
    let world = seeded(&[A100]);
    assert!(keep(&world, "7g.80gb", None));
    let (_bundle, _user) = world.living("user", &asked("7g.80gb"));
    let plan = refused(&world, &["7g.80gb"]);
    assert_eq!(plan["ends"].as_array().unwrap().len(), 1, "{plan:#}");
    let at = plan["ends"][0][0].as_u64().unwrap() as usize;
    assert_eq!(plan["holders"][at]["container"], "user");
    let plan = refused(&world, &["1g.10gb"]);
    assert_eq!(plan["ends"][0].as_array().unwrap().len(), 2, "the container, and then what is kept: {plan:#}");
}

#[test]
fn what_has_ended_is_freed_first() {
    let world = seeded(&[A100]);
    let (_bundle, dead) = world.living("dead", &asked("2g.20gb,1g.10gb"));
    drop(dead);
    let plan = document(&world, &["plan", "7g.80gb"]);
    assert_eq!(plan["freed_first"][0]["slices"].as_array().unwrap().len(), 2);
    snapshot(&world, "plan-freed-first", &shown(&world, &["plan", "7g.80gb"]));
    assert_eq!(world.instances().len(), 2);
    // What the driver lists a process in is not freed.
    let gi = world.instances()[0]["id"].to_string();
    let process = Init::start();
    world.sim("hold", &["--gpu", "0", "--gi", &gi, "--pid", &process.pid().to_string()]);
    let plan = refused(&world, &["7g.80gb"]);
    assert_eq!((&plan["freed_first"], plan["holders"].as_array().unwrap().len()), (&json!([]), 1));
}

#[test]
fn a_slice_by_its_uuid() {
    let world = seeded(&[A100]);
    let (_bundle, _init) = world.living("web", &asked("1g.10gb"));
    world.sim("make", &["--gpu", "0", "--profile", "2g.20gb"]);
    let uuids: Vec<String> =
        world.instances().iter().map(|gi| gi["compute_instances"][0]["uuid"].as_str().unwrap().to_owned()).collect();
    let held = world.lease()["slices"][0]["uuid"].as_str().unwrap().to_owned();
    let foreign = uuids.iter().find(|uuid| **uuid != held).unwrap();
    assert_eq!(refused(&world, &[&held])["refusal"]["kind"], "held");
    assert_eq!(refused(&world, &[foreign])["refusal"]["kind"], "foreign");
    let mut said = shown(&world, &["plan", &held]) + &shown(&world, &["plan", foreign]);
    more_settings(&world, "[slices]\nforeign = \"idle\"");
    said += &shown(&world, &["plan", foreign]);
    let gi =
        world.instances().iter().find(|gi| gi["compute_instances"][0]["uuid"] == **foreign).unwrap()["id"].to_string();
    let process = Init::start();
    world.sim("hold", &["--gpu", "0", "--gi", &gi, "--pid", &process.pid().to_string()]);
    assert_eq!(refused(&world, &[foreign])["refusal"]["kind"], "in-use");
    snapshot(&world, "plan-by-uuid", &said);
}

#[test]
fn a_config_is_planned_for_as_it_is() {
    let world = seeded(&[A100]);
    let file = |config: &Value| world.write("c/config.json", &config.to_string()).display().to_string();
    let by_annotation = file(&asked("2g.20gb|1g.10gb"));
    assert_eq!(document(&world, &["plan", "--file", &by_annotation])["request"], "mig.profile=2g.20gb|1g.10gb");
    let by_environment = file(&config(json!({}), &["MIG_MEMORY=8GiB"]));
    assert_eq!(document(&world, &["plan", "--file", &by_environment])["request"], "mig.memory=8GiB");
    let nothing = world.migctl(&["plan", "--file", &file(&config(json!({}), &[]))]);
    assert!(code(&nothing) == 65 && text(&nothing).contains("asks for no slice"), "{}", text(&nothing));
    let mut open = asked("1g.10gb");
    open["linux"]["resources"]["devices"] = json!([{"allow": true, "access": "rwm"}]);
    let output = world.migctl(&["plan", "--file", &file(&open)]);
    assert!(code(&output) == 77 && text(&output).contains("--privileged"), "{}", text(&output));
    for wrong in [&["plan"][..], &["plan", "1g.10gb", "--file", &by_annotation], &["plan", "--gpu", "0"]] {
        assert_eq!(code(&world.migctl(wrong)), 64, "{wrong:?}");
    }
}

#[test]
fn those_who_wait_in_line_come_first() {
    let world = seeded(&[A30]);
    more_settings(&world, "[queue]\novertakes = 1");
    let (_bundle, _web) = world.living("web", &asked("2g.12gb"));
    let _large = Waiting::start(&world, "4g.24gb");
    let plan = document(&world, &["plan", "1g.6gb"]);
    assert_eq!((&plan["outcome"], &plan["in_line"]), (&json!("fits"), &json!(1)), "one may overtake");
    let (_bundle, _db) = world.living("db", &asked("1g.6gb"));
    let state = files(&world.path("state/queue"));
    let plan = refused(&world, &["1g.6gb"]);
    assert_eq!((&plan["refusal"]["kind"], &plan["ends"]), (&json!("barrier"), &json!([])), "{plan:#}");
    assert_eq!(files(&world.path("state/queue")), state, "no mark is left in the line");
    let real = world.hook(&["precreate"], asked("1g.6gb").to_string().as_bytes());
    assert_eq!(code(&real), 75, "{}", text(&real));
    let timeless = |sentence: &Value| sentence.as_str().unwrap().replace(|c: char| c.is_ascii_digit(), "");
    assert_eq!(timeless(&plan["refusal"]["sentence"]), timeless(&world.audit().last().unwrap()["reason"]));
    snapshot(&world, "plan-behind-a-barrier", &shown(&world, &["plan", "1g.6gb"]));
    let patient = json!({"mig.profile": "4g.24gb", "mig.wait": "1h"});
    let file = world.write("c/config.json", &config(patient, &[]).to_string()).display().to_string();
    let plan = refused(&world, &["--file", &file]);
    assert_eq!(plan["would_wait_s"], 20, "the longest for a container's start: {plan:#}");
}

/// migctl as another user would run it: our binary where that user can reach it.
fn as_nobody(world: &World, args: &[&str]) -> Output {
    let ours = world.path("migctl");
    if !ours.exists() {
        // By a process of its own: what this one has open for writing, a child of another test has open too, for a moment.
        let copied = run(Command::new("install").args(["-m", "755"]).arg(binaries().join("migctl")).arg(&ours));
        assert!(copied.status.success(), "{}", text(&copied));
    }
    std::fs::set_permissions(world.path("."), std::fs::Permissions::from_mode(0o755)).unwrap();
    let mut command = Command::new("setpriv");
    command.args(["--reuid", "65534", "--regid", "65534", "--clear-groups"]).arg(ours);
    run(command.arg("--config").arg(world.config()).args(args))
}

#[test]
fn an_ordinary_user_is_told_what_can_be_told() {
    let world = seeded(&[A100, A30]);
    let (_bundle, _init) = world.living("web", &asked("1g.10gb"));
    let output = as_nobody(&world, &["plan", "1g.10gb", "--json"]);
    let plan: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{}", text(&output)));
    schema("plan", &plan);
    assert_eq!((&plan["outcome"], &plan["exit_code"], code(&output)), (&json!("unknown"), &json!(77), 77));
    assert_eq!(plan["gpus"][0]["free_memory_slices"], Value::Null);
    let mut said = String::new();
    for request in ["1g.10gb", "1g.5gb", "12x1g.10gb", "MIG-00000000-0000-5000-8000-000000000000"] {
        let output = as_nobody(&world, &["plan", request]);
        said += &format!("$ migctl plan {request}\n{}", text(&output));
    }
    snapshot(&world, "plan-unprivileged", &said);
    assert_eq!(world.leases().len(), 1);
}

#[test]
fn without_root_the_slices_that_exist_are_planned_for() {
    let world = seeded(&[A100]);
    world.sim("make", &["--gpu", "0", "--profile", "1g.10gb"]);
    let made = &world.instances()[0];
    let uuid = made["compute_instances"][0]["uuid"].as_str().unwrap().to_owned();
    let minors = [&made["cap_minor"], &made["compute_instances"][0]["cap_minor"]].map(|minor| minor.to_string());
    as_nobody(&world, &["list"]);
    // A user's session directory of our own, and uid 0 in a user namespace, as in `podman unshare`.
    let rootless = |request: &str| {
        let plan = "mount -t tmpfs none /run/user && mkdir /run/user/65534 && chown 65534 /run/user/65534 && exec setpriv \
                    --reuid 65534 --regid 65534 --clear-groups unshare -r \"$@\"";
        let mut command = Command::new("unshare");
        command.args(["-m", "sh", "-c", plan, "sh"]).arg(world.path("migctl"));
        run(command.arg("--config").arg(world.config()).args(["plan", request]))
    };
    std::fs::create_dir_all("/run/user").unwrap();
    let first = rootless("1g.10gb");
    if text(&first).contains("unshare") || text(&first).contains("mount:") {
        return skip("plan in a user namespace", &text(&first));
    }
    assert!(code(&first) == 77 && text(&first).contains("mig/config"), "cutting: {}", text(&first));
    let missing = rootless(&uuid);
    assert!(text(&missing).contains("no device node"), "{}", text(&missing));
    let caps = world.path("m/dev/nvidia-caps");
    std::fs::create_dir_all(&caps).unwrap();
    let major = world.machine()["majors"]["caps"].to_string();
    for (minor, mode) in minors.iter().zip(["444", "400"]) {
        let node = caps.join(format!("nvidia-cap{minor}"));
        let made = run(Command::new("mknod").args(["-m", mode]).arg(&node).args(["c", &major, minor]));
        if !made.status.success() {
            return skip("nodes for a user namespace", &text(&made));
        }
    }
    let closed = rootless(&uuid);
    assert!(code(&closed) == 77 && text(&closed).contains("may not open"), "{}", text(&closed));
    let last = caps.join(format!("nvidia-cap{}", minors[1]));
    std::fs::set_permissions(&last, std::fs::Permissions::from_mode(0o444)).unwrap();
    let open = rootless(&uuid);
    assert!(code(&open) == 0 && text(&open).contains("it is named by its UUID"), "{}", text(&open));
}

// ---- the same as a real container ----

/// Something that happens on a machine before a request comes.
#[derive(Debug, Clone)]
enum Event {
    Foreign(Index, Index),
    Container(Index, usize, bool),
    Kept(Index, bool),
    Cordon(Index),
}

#[derive(Debug, Clone)]
struct Case {
    boards: Vec<&'static str>,
    policy: &'static str,
    foreign: bool,
    limited: bool,
    events: Vec<Event>,
    /// Alternatives of profiles, each a number of times.
    wants: Vec<Vec<(Index, usize)>>,
    gpu: Option<Index>,
    memory: bool,
    shim: bool,
}

fn cases() -> impl Strategy<Value = Case> {
    let index = any::<Index>;
    let event = prop_oneof![
        3 => (index(), index()).prop_map(|(profile, gpu)| Event::Foreign(profile, gpu)),
        6 => (index(), 1..3_usize, prop::bool::weighted(0.7)).prop_map(|(p, n, alive)| Event::Container(p, n, alive)),
        2 => (index(), any::<bool>()).prop_map(|(profile, reserved)| Event::Kept(profile, reserved)),
        1 => index().prop_map(Event::Cordon),
    ];
    let boards = prop::collection::vec(prop::sample::select(vec![A100, H100, A30, RTX]), 1..3);
    let policy = prop::sample::select(vec!["scc", "first-fit", "driver", "binpack", "spread"]);
    let wants = prop::collection::vec(prop::collection::vec((index(), 1..3_usize), 1..3), 1..3);
    let chances = (prop::bool::weighted(0.3), prop::bool::weighted(0.2), prop::bool::weighted(0.2), any::<bool>());
    (boards, policy, prop::collection::vec(event, 0..9), wants, prop::option::weighted(0.2, index()), chances).prop_map(
        |(boards, policy, events, wants, gpu, (foreign, limited, memory, shim))| Case {
            boards,
            policy,
            foreign,
            limited,
            events,
            wants,
            gpu,
            memory,
            shim,
        },
    )
}

/// Profiles without those whose media engines the driver counts: that is nothing that it tells beforehand.
fn profiles(boards: &[&str]) -> Vec<&'static str> {
    let of = |board: &&str| match *board {
        A30 => vec!["1g.6gb", "2g.12gb", "2g.12gb+me", "4g.24gb"],
        RTX => vec!["1g.24gb", "2g.48gb", "4g.96gb"],
        _ => vec!["1g.10gb", "1g.10gb+me", "1g.20gb", "2g.20gb", "3g.40gb", "4g.40gb", "7g.80gb"],
    };
    boards.iter().flat_map(of).collect()
}

/// Whether plan and a real container agree; in words where they don't.
fn agree(case: &Case) -> Result<(), String> {
    let world = World::new(&case.boards);
    world.recording_runtime(0);
    let all = profiles(&case.boards);
    let mut settings = format!("[placement]\npolicy = \"{}\"", case.policy);
    if case.foreign {
        settings += "\n[slices]\nforeign = \"idle\"";
    }
    more_settings(&world, &settings);
    let mut living = Vec::new();
    for (n, event) in case.events.iter().enumerate() {
        match event {
            Event::Foreign(profile, gpu) => {
                let gpu = gpu.index(case.boards.len()).to_string();
                let mut make = Command::new(binaries().join("nvml-sim"));
                make.arg("make").arg(world.path("m")).args(["--gpu", &gpu, "--profile", all[profile.index(all.len())]]);
                run(&mut make); // what does not fit does not happen
            }
            Event::Container(profile, count, alive) => {
                let bundle =
                    world.bundle(&format!("c{n}"), &asked(&format!("{count}x{}", all[profile.index(all.len())])));
                let (bundle, pid_file) = (bundle.to_str().unwrap().to_owned(), bundle.join("pid"));
                let created = world.shim(&[
                    "create",
                    "--bundle",
                    &bundle,
                    "--pid-file",
                    pid_file.to_str().unwrap(),
                    &format!("c{n}"),
                ]);
                if created.status.success() {
                    let init = Init::start();
                    std::fs::write(pid_file, init.pid().to_string()).unwrap();
                    living.extend(Some(init).filter(|_| *alive));
                }
            }
            Event::Kept(profile, reserved) => {
                keep(&world, all[profile.index(all.len())], reserved.then_some(4321));
            }
            Event::Cordon(gpu) => cordon(&world, gpu.index(case.boards.len())),
        }
    }
    if case.limited {
        more_settings(&world, &format!("{settings}\n[limits]\nprofiles = [\"{}\"]", all[0]));
    }
    let alternative = |wants: &Vec<(Index, usize)>| {
        let one = |(profile, count): &(Index, usize)| match case.memory {
            true => format!("{count}x{}GiB", 4 + profile.index(80)),
            false => format!("{count}x{}", all[profile.index(all.len())]),
        };
        wants.iter().map(one).collect::<Vec<_>>().join(",")
    };
    let request = case.wants.iter().map(alternative).collect::<Vec<_>>().join("|");
    let gpu = case.gpu.map(|gpu| gpu.index(case.boards.len()).to_string());

    let mut args = vec!["plan", "--json", &request];
    args.extend(gpu.iter().flat_map(|gpu| ["--gpu", gpu]));
    let before = (files(&world.path("state")), world.machine());
    let output = world.migctl(&args);
    let plan: Value = serde_json::from_slice(&output.stdout).map_err(|_| text(&output))?;
    schema("plan", &plan);
    if (files(&world.path("state")), world.machine()) != before {
        return Err("the plan changed something".into());
    }
    same_ends(&plan)?;

    let key = if case.memory { "mig.memory" } else { "mig.profile" };
    let mut annotations = json!({key: request});
    if let Some(gpu) = &gpu {
        annotations["mig.gpu"] = json!(gpu);
    }
    let asks = config(annotations, &[]);
    let tokens: Vec<Value> = world.leases().iter().map(|lease| lease["token"].clone()).collect();
    let real = match case.shim {
        true => {
            let bundle = world.bundle("real", &asks);
            world.shim(&["create", "--bundle", bundle.to_str().unwrap(), "real"])
        }
        false => world.hook(&["precreate"], asks.to_string().as_bytes()),
    };
    let differ = |what: &str| Err(format!("{what}: {}\n{request}\n{plan:#}\n{case:#?}", text(&real)));
    if plan["exit_code"] != code(&real) {
        return differ("another exit code");
    }
    if code(&real) != 0 {
        let audit = world.audit();
        let said = &audit.last().unwrap()["reason"];
        return if plan["refusal"]["sentence"] == *said { Ok(()) } else { differ(&format!("another sentence {said}")) };
    }
    let leases = world.leases();
    let lease = leases.iter().find(|l| !tokens.contains(&l["token"]) && l["state"] != "static").unwrap();
    let given = lease["slices"].as_array().unwrap();
    let planned = plan["slices"].as_array().unwrap();
    let same = |(planned, given): (&Value, &Value)| {
        let keys = ["gpu", "gpu_index", "placement", "memory_mib"];
        let existing = planned["source"] != "new";
        keys.iter().all(|key| planned[key] == given[key])
            && planned["profile"] == given["profile_name"]
            && (given["ours"] == !existing)
            && (!existing || (&planned["uuid"], &planned["gi"]) == (&given["uuid"], &given["gi"]))
    };
    match planned.len() == given.len() && planned.iter().zip(given).all(same) {
        true => Ok(()),
        false => differ(&format!("other slices {given:#?}")),
    }
}

/// Every set of holders is named by position, once, and the fewest come first.
fn same_ends(plan: &Value) -> Result<(), String> {
    let holders = plan["holders"].as_array().unwrap().len();
    let sets: Vec<Vec<u64>> = serde_json::from_value(plan["ends"].clone()).unwrap();
    let fine = sets.iter().all(|set| {
        set.len() == sets[0].len() && set.is_sorted_by(|a, b| a < b) && set.iter().all(|n| (*n as usize) < holders)
    });
    if fine && (sets.is_empty() || plan["outcome"] == "refused") { Ok(()) } else { Err(format!("odd sets: {plan:#}")) }
}

#[test]
fn a_container_gets_just_what_the_plan_says() {
    let count = std::env::var("MIG_TEST_PLANS").ok().and_then(|n| n.parse().ok()).unwrap_or(32);
    // Nothing is shrunk: each run takes a machine of its own.
    let settings =
        ProptestConfig { cases: count, max_shrink_iters: 40, failure_persistence: None, ..Default::default() };
    TestRunner::new(settings).run(&cases(), |case| agree(&case).map_err(TestCaseError::fail)).unwrap();
}

/// The end of each set that is named does make room, and no smaller one does.
#[test]
fn ends_that_are_named_make_room_in_truth() {
    let world = seeded(&[A100, A30]);
    let (_bundle, pair) = world.living("pair", &asked("1g.10gb,1g.6gb"));
    let (_bundle, _one) = world.living("one", &asked("4g.40gb"));
    let (_bundle, _half) = world.living("half", &asked("2g.12gb"));
    let (_bundle, _me) = world.living("me", &asked("1g.10gb+me"));
    let plan = refused(&world, &["4g.40gb"]);
    assert_eq!(plan["ends"].as_array().unwrap().len(), 1);
    let plan = refused(&world, &["2x2g.12gb|1g.10gb+me,1g.20gb"]);
    let named = |set: &Value| {
        let at = |n: &Value| plan["holders"][n.as_u64().unwrap() as usize]["container"].as_str().unwrap().to_owned();
        set.as_array().unwrap().iter().map(at).collect::<Vec<_>>()
    };
    let sets: Vec<Vec<String>> = plan["ends"].as_array().unwrap().iter().map(named).collect();
    let smallest = [["me", "pair"], ["pair", "half"], ["one", "me"]];
    assert_eq!(sets, smallest, "those with the least memory first: {plan:#}");
    let plan = refused(&world, &["4g.24gb"]);
    assert_eq!(named(&plan["ends"][0]), ["pair", "half"], "{plan:#}");
    drop(pair);
    assert_eq!(refused(&world, &["4g.24gb"])["ends"].as_array().unwrap().len(), 1);
}
