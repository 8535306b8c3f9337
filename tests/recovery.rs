//! What becomes of a lease after every kind of end, and the bounds that are promised: the crash table and the limits of
//! docs/architecture.md, row by row, on the simulator.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Child, Command, Output};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use common::{World, config, run, state, text, token_in, wait_for};
use nix::fcntl::{Flock, FlockArg};
use serde_json::{Value, json};

const NO_ROOM: Option<i32> = Some(75);
const IO: Option<i32> = Some(74);
const A100: &str = "a100-sxm4-80gb";
const CREATE: &str = "nvmlDeviceCreateGpuInstanceWithPlacement";
const CREATE_COMPUTE: &str = "nvmlGpuInstanceCreateComputeInstance";
const DESTROY: &str = "nvmlGpuInstanceDestroy";
const DESTROY_COMPUTE: &str = "nvmlComputeInstanceDestroy";

fn ask(profile: &str) -> Value {
    config(json!({"mig.profile": profile}), &[])
}

/// podman's precreate hook, owned by this process.
fn precreate(world: &World, profile: &str) -> Output {
    world.hook(&["precreate"], ask(profile).to_string().as_bytes())
}

fn granted(world: &World, profile: &str) -> String {
    let output = precreate(world, profile);
    assert!(output.status.success(), "{}", text(&output));
    token_in(&output.stdout)
}

fn bind(world: &World, token: &str, id: &str, pid: u32) -> Output {
    world.hook(&["createRuntime", "--lease", token], &state(id, pid, &world.path("bundle")))
}

fn poststop(world: &World, token: &str, id: &str) -> Output {
    let output = world.hook(&["poststop", "--lease", token], &state(id, 0, &world.path("bundle")));
    assert!(output.status.success(), "poststop never fails: {}", text(&output));
    output
}

fn lease(world: &World, token: &str) -> Value {
    world.leases().into_iter().find(|l| l["token"] == token).unwrap_or_else(|| panic!("no lease {token}"))
}

/// The exit code of `migctl gc`, and result and reason for each lease.
fn gc(world: &World) -> (Option<i32>, Vec<(String, String)>) {
    let output = world.migctl(&["gc", "--json"]);
    let document: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("gc: {}", text(&output)));
    let word = |action: &Value, key: &str| action[key].as_str().unwrap().to_owned();
    let actions = document["actions"].as_array().unwrap();
    (output.status.code(), actions.iter().map(|a| (word(a, "result"), word(a, "reason"))).collect())
}

/// One gc that ends well and does `result` to the only lease, for a reason with these words.
fn gc_does(world: &World, result: &str, reason: &str) {
    let (code, actions) = gc(world);
    let fits = matches!(actions.as_slice(), [(did, why)] if did == result && why.contains(reason));
    assert!(code == Some(0) && fits, "wanted {result} ({reason}): {code:?} {actions:?}");
}

fn set_u64(value: &mut Value, change: impl FnOnce(u64) -> u64) {
    *value = change(value.as_u64().unwrap()).into();
}

/// A process that does nothing, killed in the end.
struct Sleeper(Child);

impl Sleeper {
    fn new() -> Sleeper {
        Sleeper(Command::new("sleep").arg("300").spawn().unwrap())
    }
}

impl Drop for Sleeper {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A lease bound to container `c1`, whose init is a sleeper and has no cgroup of its own.
fn bound(world: &World, profile: &str) -> (String, Sleeper) {
    let (token, init) = (granted(world, profile), Sleeper::new());
    world.bundle("bundle", &ask(profile));
    let output = bind(world, &token, "c1", init.0.id());
    assert!(output.status.success(), "{}", text(&output));
    world.edit_lease(&token, |l| l["holder"]["cgroup"] = Value::Null);
    (token, init)
}

/// Compute instances of each GPU instance.
fn shape(world: &World) -> Vec<usize> {
    world.instances().iter().map(|gi| gi["compute_instances"].as_array().unwrap().len()).collect()
}

// ---- the crash table ----

#[test]
fn a_slice_that_was_being_cut_is_taken_away_again() {
    let rows: [(&str, &str, &str, &str, &[usize]); 5] = [
        (CREATE, "before", "pending", "creating-instance", &[]),
        (CREATE, "after", "pending", "creating-instance", &[0]),
        (CREATE_COMPUTE, "before", "pending", "creating-compute", &[0]),
        (CREATE_COMPUTE, "after", "pending", "creating-compute", &[1]),
        ("nvmlShutdown", "before", "active", "whole", &[1]),
    ];
    let world = World::new(&["a30-24gb"]);
    for (call, how, state, step, left) in rows {
        world.fault(call, &["--kill", how]);
        assert!(!world.orphaned_precreate(&ask("1g.6gb")).status.success(), "{call} {how}");
        let leases = world.leases();
        let recorded = (leases.len(), &leases[0]["state"], &leases[0]["slices"][0]["step"], shape(&world));
        assert_eq!(recorded, (1, &json!(state), &json!(step), left.to_vec()), "{call} {how}");
        gc_does(&world, "freed", "died");
        world.assert_clean(&format!("after {call} {how}"));
    }
}

#[test]
fn a_slice_that_was_being_taken_away_is_finished() {
    let rows: [(&str, &str, &str, &[usize]); 4] = [
        (DESTROY_COMPUTE, "before", "destroying-compute", &[1]),
        (DESTROY_COMPUTE, "after", "destroying-compute", &[0]),
        (DESTROY, "before", "destroying-instance", &[0]),
        (DESTROY, "after", "destroying-instance", &[]),
    ];
    let world = World::new(&["a30-24gb"]);
    for (call, how, step, left) in rows {
        let token = granted(&world, "1g.6gb");
        world.fault(call, &["--kill", how]);
        let killed = world.hook(&["poststop", "--lease", &token], &state("c1", 0, Path::new("/b")));
        assert!(!killed.status.success(), "{call} {how}");
        let now = lease(&world, &token);
        let recorded = (&now["state"], &now["slices"][0]["step"], shape(&world));
        assert_eq!(recorded, (&json!("releasing"), &json!(step), left.to_vec()), "{call} {how}");
        gc_does(&world, "freed", "ended");
        world.assert_clean(&format!("after {call} {how}"));
    }
}

#[test]
fn a_lease_that_planned_only_touches_nobody_in_its_place() {
    let world = World::new(&["a30-24gb"]);
    world.fault(CREATE, &["--kill", "before"]);
    world.orphaned_precreate(&ask("1g.6gb"));
    let lease = world.leases().remove(0);
    let start = lease["slices"][0]["placement"]["start"].to_string();
    world.edit_lease(lease["token"].as_str().unwrap(), |l| l["slices"][0]["step"] = "planned".into());
    world.sim("make", &["--gpu", "0", "--profile", "1g.6gb", "--start", &start, "--no-ci"]);
    let foreign = world.instances();
    gc_does(&world, "freed", "died");
    assert_eq!((world.instances(), world.leases()), (foreign, vec![]));
}

#[test]
fn a_rivals_slice_in_the_place_of_a_half_made_one_stays() {
    let world = World::new(&["a30-24gb"]);
    world.fault(CREATE, &["--kill", "before"]);
    world.orphaned_precreate(&ask("1g.6gb"));
    let start = world.leases()[0]["slices"][0]["placement"]["start"].to_string();
    world.sim("make", &["--gpu", "0", "--profile", "1g.6gb", "--start", &start]);
    let foreign = world.instances();
    gc_does(&world, "freed", "died");
    assert_eq!((world.instances(), world.leases()), (foreign, vec![]));
}

#[test]
fn a_whole_half_made_slice_that_is_busy_at_recovery_is_freed_later() {
    // The lease does not know the compute instance yet: it must still be known for ours at the second try.
    let world = World::new(&["a30-24gb"]);
    world.fault(CREATE_COMPUTE, &["--kill", "after"]);
    world.orphaned_precreate(&ask("1g.6gb"));
    world.fault(DESTROY_COMPUTE, &["--fail", "IN_USE", "--times", "1"]);
    gc(&world);
    gc(&world);
    world.assert_clean("after a busy recovery");
}

#[test]
fn a_container_that_never_started_frees_its_slice_with_its_owner() {
    let world = World::new(&["a30-24gb"]);
    assert!(world.orphaned_precreate(&ask("1g.6gb")).status.success());
    assert_eq!(shape(&world), [1]);
    gc_does(&world, "freed", "died before a container was started");
    world.assert_clean("after gc");
    let token = granted(&world, "1g.6gb");
    gc_does(&world, "kept", "being created");
    poststop(&world, &token, "c1");
    world.assert_clean("after poststop");
}

#[test]
fn a_container_gone_without_poststop_is_noticed_and_a_zombie_is_gone() {
    let world = World::new(&["a30-24gb"]);
    let (_token, mut init) = bound(&world, "1g.6gb");
    gc_does(&world, "kept", "alive");
    init.0.kill().unwrap(); // not waited for
    let stat = format!("/proc/{}/stat", init.0.id());
    wait_for("a zombie", Duration::from_secs(5), || std::fs::read_to_string(&stat).unwrap().contains(") Z "));
    gc_does(&world, "freed", "gone");
    world.assert_clean("after gc");

    let (_token, init) = bound(&world, "1g.6gb");
    drop(init);
    let next = granted(&world, "4g.24gb"); // an acquire clears up as gc does
    assert_eq!(world.assert_consistent(&[], "after the next acquire").len(), 1);
    poststop(&world, &next, "c2");
    world.assert_clean("in the end");
}

#[test]
fn a_reused_pid_is_not_taken_for_the_container() {
    let world = World::new(&["a30-24gb"]);
    let (token, _init) = bound(&world, "1g.6gb");
    world.edit_lease(&token, |l| set_u64(&mut l["holder"]["init"]["start"], |start| start - 1));
    gc_does(&world, "freed", "gone");
    world.assert_clean("after gc");
}

#[test]
fn a_slice_whose_device_a_process_still_has_open_is_kept() {
    let world = World::new(&["a30-24gb"]);
    let (token, init) = bound(&world, "1g.6gb");
    drop(init);
    let open = world.open_capability(&token);
    gc_does(&world, "kept", "devices open");
    assert_eq!((world.leases().len(), world.instances().len()), (1, 1), "while it is open");
    drop(open);
    gc_does(&world, "freed", "gone");
    world.assert_clean("after gc");
}

/// A container that was created through the shim, whose engine died: init lives, the bundle is gone. The stand-in
/// runtime answers `state` from `rt/state` and writes down what it deletes.
fn orphan(world: &World) -> (String, Sleeper) {
    let d = world.path("rt").display().to_string();
    let answer = "case \" $* \" in *' state '*) cat \"$d/state\";; *' delete '*) echo \"$*\" >> \"$d/deleted\";; esac";
    let runtime = world.script("rt/runtime", &format!("d={d}\n{answer}"));
    world.settings(&format!("[runtime]\npath = \"{}\"", runtime.display()));
    world.write("rt/state", r#"{"ociVersion": "1.0.2", "id": "c1", "status": "created"}"#);
    let (bundle, pid_file) = (world.bundle("bundle", &ask("1g.6gb")), world.path("pid"));
    let mut command = world.shim_command(&["--root", &d, "create", "--bundle"]);
    let output = run(command.arg(&bundle).arg("--pid-file").arg(&pid_file).arg("c1"));
    assert!(output.status.success(), "{}", text(&output));
    let init = Sleeper::new();
    std::fs::write(pid_file, init.0.id().to_string()).unwrap();
    (world.leases()[0]["token"].as_str().unwrap().to_owned(), init)
}

#[test]
fn an_orphan_is_deleted_only_when_its_bundle_was_missing_twice_a_minute_apart() {
    let world = World::new(&["a30-24gb"]);
    let (token, _init) = orphan(&world);
    gc_does(&world, "kept", "alive");
    std::fs::rename(world.path("bundle"), world.path("moved")).unwrap();
    gc_does(&world, "kept", "again in a minute");
    gc_does(&world, "kept", "again in a minute");
    let missing = "bundle_missing_boot_ms";
    assert!(lease(&world, &token)["holder"][missing].is_u64());

    world.edit_lease(&token, |l| set_u64(&mut l["holder"][missing], |ms| ms.saturating_sub(60_001)));
    // Another mount namespace: the bundle may be there after all.
    let namespace = lease(&world, &token)["holder"]["mount_namespace"].clone();
    world.edit_lease(&token, |l| l["holder"]["mount_namespace"] = "mnt:[1]".into());
    gc_does(&world, "kept", "mount namespace");
    world.edit_lease(&token, |l| l["holder"]["mount_namespace"] = namespace);
    // The runtime does not agree, or knows nothing.
    for other in [r#"{"status": "running"}"#, ""] {
        world.write("rt/state", other);
        gc_does(&world, "kept", "alive");
    }
    assert_eq!(world.recorded("deleted"), None);
    assert_eq!(world.assert_consistent(&[], "before it is an orphan")[0]["state"], "active");

    world.write("rt/state", r#"{"status": "created"}"#);
    gc_does(&world, "freed", "abandoned");
    let deleted = format!("--root {} delete --force c1\n", world.path("rt").display());
    assert_eq!(world.recorded("deleted"), Some(deleted));
    world.assert_clean("after gc");
}

#[test]
fn a_bundle_that_came_back_begins_the_minute_anew() {
    let world = World::new(&["a30-24gb"]);
    let (token, _init) = orphan(&world);
    let (bundle, moved) = (world.path("bundle"), world.path("moved"));
    std::fs::rename(&bundle, &moved).unwrap();
    gc_does(&world, "kept", "again in a minute");
    world.edit_lease(&token, |l| {
        set_u64(&mut l["holder"]["bundle_missing_boot_ms"], |ms| ms.saturating_sub(60_001));
    });
    std::fs::rename(&moved, &bundle).unwrap();
    gc_does(&world, "kept", "alive");
    std::fs::rename(&bundle, &moved).unwrap();
    gc_does(&world, "kept", "again in a minute");
    assert_eq!(world.recorded("deleted"), None);
}

#[test]
fn an_unbound_lease_is_freed_after_two_minutes_though_its_owner_lives() {
    let world = World::new(&["a30-24gb"]);
    let token = granted(&world, "1g.6gb");
    let age = |ms: u64| world.edit_lease(&token, |l| set_u64(&mut l["created_boot_ms"], |t| t.saturating_sub(ms)));
    age(60_000);
    gc_does(&world, "kept", "being created");
    age(61_000);
    gc_does(&world, "freed", "120 s");
    world.assert_clean("after gc");
    let init = Sleeper::new();
    let late = bind(&world, &token, "c1", init.0.id());
    assert!(late.status.code() == NO_ROOM && text(&late).contains("freed before"), "{}", text(&late));
    world.assert_clean("after the late container");
    poststop(&world, &token, "c1");
}

// ---- identity ----

#[test]
fn poststop_may_come_twice_and_from_everybody_at_once() {
    let world = World::new(&["a30-24gb"]);
    let token = granted(&world, "1g.6gb");
    let other = granted(&world, "1g.6gb");
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| poststop(&world, &token, "c1"));
        }
    });
    poststop(&world, &token, "c1");
    let leases = world.assert_consistent(&[], "after five poststops");
    assert_eq!(leases.iter().map(|l| &l["token"]).collect::<Vec<_>>(), [&json!(other)]);
}

#[test]
fn poststop_with_another_containers_id_releases_nothing() {
    let world = World::new(&["a30-24gb"]);
    let (token, init) = bound(&world, "1g.6gb");
    let output = poststop(&world, &token, "c2");
    assert!(text(&output).contains("nothing was released"), "{}", text(&output));
    assert_eq!(world.assert_consistent(&[], "after a stranger's poststop")[0]["state"], "active");
    gc_does(&world, "kept", "alive");
    let stolen = bind(&world, &token, "c2", init.0.id());
    assert!(stolen.status.code() == NO_ROOM && text(&stolen).contains("c1"), "{}", text(&stolen));
    poststop(&world, &token, "c1");
    world.assert_clean("after its own");
}

#[test]
fn a_lease_of_which_the_end_was_announced_can_not_be_bound() {
    let world = World::new(&["a30-24gb"]);
    let token = granted(&world, "1g.6gb");
    let intents = world.path("state/intents");
    std::fs::rename(intents.join(format!("{token}.ready")), intents.join(format!("{token}.released"))).unwrap();
    let init = Sleeper::new();
    let output = bind(&world, &token, "c1", init.0.id());
    assert!(output.status.code() == NO_ROOM && text(&output).contains("being released"), "{}", text(&output));
    gc_does(&world, "freed", "ended");
    world.assert_clean("after gc");
}

// ---- a rival ----

#[test]
fn whose_room_a_rival_takes_at_the_last_moment_is_told_so_or_waits_on() {
    for wait in [json!(null), json!("20s")] {
        let world = World::new(&["a30-24gb"]);
        world.fault(CREATE, &["--delay-ms", "1500"]);
        let mut asked = ask("4g.24gb");
        if wait.is_string() {
            asked["annotations"]["mig.wait"] = wait.clone();
        }
        let output = std::thread::scope(|scope| {
            let hook = scope.spawn(|| world.hook(&["precreate"], asked.to_string().as_bytes()));
            let step = || world.leases().first().map(|l| l["slices"][0]["step"] == "creating-instance");
            wait_for("a call on its way", Duration::from_secs(10), || step() == Some(true));
            world.sim("make", &["--gpu", "0", "--profile", "1g.6gb"]);
            if wait.is_string() {
                let line = || world.document(&["queue"])["waiting"].as_array().unwrap().len();
                wait_for("a place in the line", Duration::from_secs(10), || line() == 1);
                world.sim("destroy", &["--gpu", "0", "--gi", &world.instances()[0]["id"].to_string()]);
            }
            hook.join().unwrap()
        });
        if wait.is_string() {
            assert!(output.status.success(), "{}", text(&output));
            world.assert_consistent(&[], "when the rival's slice has gone");
        } else {
            assert_eq!(output.status.code(), NO_ROOM, "{}", text(&output));
            assert!(
                text(&output).contains("no room for 4g.24gb: GPU 0 (NVIDIA A30) holds 1g.6gb at"),
                "{}",
                text(&output)
            );
        }
    }
}

// ---- quarantine ----

#[test]
fn a_half_made_slice_that_somebody_uses_is_quarantined() {
    let world = World::new(&[A100]);
    world.fault(CREATE_COMPUTE, &["--kill", "before"]);
    world.orphaned_precreate(&ask("3g.40gb"));
    let (token, gi) = (world.leases()[0]["token"].clone(), world.leases()[0]["slices"][0]["gi"].to_string());
    let user = Sleeper::new();
    world.sim("hold", &["--gpu", "0", "--gi", &gi, "--pid", &user.0.id().to_string()]);
    for _ in 0..2 {
        let (code, actions) = gc(&world);
        assert_eq!((code, actions.len(), actions[0].0.as_str()), (NO_ROOM, 1, "quarantined"), "{actions:?}");
        assert!(actions[0].1.contains(&user.0.id().to_string()), "the process is named: {actions:?}");
    }
    assert_eq!(world.leases()[0]["state"], "quarantined");
    let listed = &world.document(&["list"])["gpus"][0]["slices"][0];
    assert_eq!((&listed["state"], &listed["token"]), (&json!("quarantined"), &token));
    let whole = precreate(&world, "7g.80gb");
    assert!(whole.status.code() == NO_ROOM && text(&whole).contains("quarantined"), "{}", text(&whole));
    let beside = granted(&world, "3g.40gb");
    assert_eq!(world.assert_consistent(&[], "beside a quarantined one").len(), 2);
    poststop(&world, &beside, "c1");
    world.sim("unhold", &["--gpu", "0", "--gi", &gi]);
    gc_does(&world, "freed", "nothing holds it any more");
    world.assert_clean("when nothing holds it");
}

// ---- state that is not as it was ----

#[test]
fn after_another_boot_leases_are_forgotten_and_instances_foreign() {
    let world = World::new(&["a30-24gb"]);
    let token = granted(&world, "1g.6gb");
    let foreign = world.instances();
    world.write("state/boot_id", "00000000-0000-0000-0000-000000000000\n");
    assert_eq!(gc(&world), (Some(0), vec![]));
    assert_eq!((world.leases(), world.instances()), (vec![], foreign.clone()));
    assert_eq!(world.document(&["list"])["gpus"][0]["slices"][0]["state"], "foreign");
    poststop(&world, &token, "c1");
    granted(&world, "1g.6gb");
    assert_eq!(world.assert_consistent(&foreign, "in the new boot").len(), 1);
}

#[test]
fn a_record_of_another_version_stops_everything_and_stays() {
    let world = World::new(&["a30-24gb"]);
    let token = granted(&world, "1g.6gb");
    let path = world.lease_file(&token);
    let good = std::fs::read(&path).unwrap();
    let newer = String::from_utf8(good.clone()).unwrap().replace("\"version\":1", "\"version\":7").into_bytes();
    let cut_short = good[..good.len() / 2].to_vec();
    // An orphan, so that there would be something to do.
    let (other, init) = bound(&world, "1g.6gb");
    drop(init);
    for (bad, says) in [(newer, "version 7"), (cut_short, "damaged")] {
        std::fs::write(&path, &bad).unwrap();
        let instances = world.instances();
        let files = || -> BTreeMap<_, _> {
            let entries = std::fs::read_dir(world.path("state/leases")).unwrap().map(|e| e.unwrap().path());
            entries.map(|path| (path.clone(), std::fs::read(path).unwrap())).collect()
        };
        let before = files();
        let outputs =
            [precreate(&world, "1g.6gb"), world.migctl(&["gc"]), world.migctl(&["list"]), world.migctl(&["leases"])];
        for output in outputs {
            let (code, said) = (output.status.code(), text(&output));
            assert!(code == IO && said.contains(says) && said.contains(&token), "{said}");
        }
        assert!(text(&poststop(&world, &token, "c1")).contains(says));
        assert_eq!((files(), world.instances()), (before, instances));
    }
    std::fs::write(&path, good).unwrap();
    poststop(&world, &token, "c1");
    poststop(&world, &other, "c1");
    world.assert_clean("when it can be read again");
}

#[test]
fn a_lock_that_is_held_is_waited_for_so_long_and_no_longer() {
    let world = World::new(&["a30-24gb"]);
    let (ended, starting) = (granted(&world, "1g.6gb"), granted(&world, "1g.6gb"));
    let init = Sleeper::new();
    let file = std::fs::OpenOptions::new().read(true).write(true).open(world.path("state/lock")).unwrap();
    let lock = Flock::lock(file, FlockArg::LockExclusive).unwrap();
    std::thread::scope(|scope| {
        let bound = scope.spawn(|| bind(&world, &starting, "c2", init.0.id()));
        let begun = Instant::now();
        poststop(&world, &ended, "c1");
        let took = begun.elapsed();
        assert!((Duration::from_secs(4)..Duration::from_secs(8)).contains(&took), "{took:?}");
        assert_eq!(lease(&world, &ended)["state"], "active", "it had no lock");
        assert!(world.path("state/intents").join(format!("{ended}.released")).exists(), "but announced the end");
        let bound = bound.join().unwrap();
        let holder = format!("held by process {}", std::process::id());
        assert!(bound.status.code() == NO_ROOM && text(&bound).contains(&holder), "{}", text(&bound));
    });
    drop(lock);
    let (code, actions) = gc(&world);
    let results: Vec<&str> = actions.iter().map(|(result, _)| result.as_str()).collect();
    assert_eq!((code, results.len()), (Some(0), 2), "{actions:?}");
    assert!(results.contains(&"freed") && results.contains(&"kept"), "{actions:?}");
    assert_eq!(lease(&world, &starting)["holder"]["container"], Value::Null);
    poststop(&world, &starting, "c2");
    world.assert_clean("in the end");
}

// ---- many at once ----

#[test]
fn twenty_at_once_on_a_gpu_of_seven() {
    let world = World::new(&[A100]);
    let outputs: Vec<Output> = std::thread::scope(|scope| {
        let hooks: Vec<_> = (0..20).map(|_| scope.spawn(|| precreate(&world, "1g.10gb"))).collect();
        hooks.into_iter().map(|hook| hook.join().unwrap()).collect()
    });
    let (given, refused): (Vec<_>, Vec<_>) = outputs.iter().partition(|output| output.status.success());
    assert_eq!(given.len(), 7, "{}", refused.iter().map(|o| text(o)).collect::<String>());
    assert!(refused.iter().all(|output| output.status.code() == NO_ROOM && output.stdout.is_empty()));
    let leases = world.assert_consistent(&[], "after twenty");
    assert_eq!((leases.len(), world.instances().len()), (7, 7));
    let uuids: std::collections::BTreeSet<String> = given
        .iter()
        .map(|output| serde_json::from_slice::<Value>(&output.stdout).unwrap()["process"]["env"].to_string())
        .collect();
    assert_eq!(uuids.len(), 7, "no UUID twice: {uuids:?}");
}

#[test]
fn thirty_at_once_over_and_over_never_share_a_slice() {
    const LONG: Duration = Duration::from_secs(4);
    let world = World::new(&common::DEMO);
    let profiles = ["1g.10gb", "2g.20gb", "3g.40gb"];
    // What the containers believe to hold, and which of them. The simulator is the judge.
    let held: Mutex<BTreeMap<String, usize>> = Mutex::default();
    let until = Instant::now() + LONG;
    let (given, looks) = std::thread::scope(|scope| {
        let container = |n: usize| {
            let (world, held) = (&world, &held);
            move || {
                let mut given = 0;
                while Instant::now() < until {
                    let output = precreate(world, profiles[n % profiles.len()]);
                    if !output.status.success() {
                        assert_eq!(output.status.code(), NO_ROOM, "{}", text(&output));
                        continue;
                    }
                    let config: Value = serde_json::from_slice(&output.stdout).unwrap();
                    let env = config["process"]["env"].as_array().unwrap();
                    let uuid = env.iter().find_map(|v| v.as_str().unwrap().strip_prefix("MIG_DEVICE_UUIDS=")).unwrap();
                    let before = held.lock().unwrap().insert(uuid.to_owned(), n);
                    assert_eq!(before, None, "{n} was given {uuid}, which another holds");
                    std::thread::yield_now();
                    assert_eq!(held.lock().unwrap().remove(uuid), Some(n));
                    poststop(world, &token_in(&output.stdout), &format!("c{n}"));
                    given += 1;
                }
                given
            }
        };
        let containers: Vec<_> = (0..30).map(|n| scope.spawn(container(n))).collect();
        let mut looks = 0;
        while Instant::now() < until {
            // Nobody gives back what is listed while we look.
            let held = held.lock().unwrap();
            let there: Vec<String> = world
                .instances()
                .iter()
                .flat_map(|gi| gi["compute_instances"].as_array().unwrap().clone())
                .map(|ci| ci["uuid"].as_str().unwrap().to_owned())
                .collect();
            for uuid in held.keys() {
                assert_eq!(there.iter().filter(|u| *u == uuid).count(), 1, "{uuid} is held and not there");
            }
            looks += held.len();
            drop(held);
            std::thread::yield_now();
        }
        let given: usize = containers.into_iter().map(|c| c.join().unwrap()).sum();
        (given, looks)
    });
    assert!(given > 30, "only {given} grants in {LONG:?}");
    eprintln!("{given} grants, {looks} looks at held slices");
    gc(&world);
    world.assert_clean("when all have ended");
}
