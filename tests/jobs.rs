//! Jobs of a batch system, as shipped, on simulated GPUs: `migctl job`, and the verbs that Slurm calls, called by hand. What is
//! public of a job, who learns it, and how long the job has its slices. The cgroups are real.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::collections::BTreeMap;
use std::io::Read;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use common::cgroup::{Cgroup, V1};
use common::{World, binaries, installed, run, skip, text, wait_for};
use serde_json::{Value, json};

const A30: &str = "a30-24gb";
const IN_TIME: Duration = Duration::from_secs(20);
/// A user without any rights, and another one.
const USER: u32 = 65534;
const OTHER: u32 = 4242;
/// How a batch system's own processes are called here.
const SIGN: &str = "no such process: [15.";
const KEY: &str = "slurm:mini:15";

fn code(output: &Output) -> i32 {
    output.status.code().unwrap_or_else(|| panic!("{}", text(output)))
}

// ---- a site with a user ----

/// A world in which a user can reach the settings and a copy of migctl.
fn site(boards: &[&str]) -> World {
    let world = World::new(boards);
    std::fs::set_permissions(world.path(""), std::fs::Permissions::from_mode(0o755)).unwrap();
    // By another process: what a test beside this one forks would have it open for writing, and then nobody can run it.
    let copied = run(Command::new("cp").arg(binaries().join("migctl")).arg(world.path("migctl")));
    assert!(copied.status.success(), "{}", text(&copied));
    world
}

/// migctl as that user calls it, with these variables and no others of ours.
fn call(world: &World, uid: u32, args: &[&str], variables: &[(&str, &str)]) -> Output {
    let mut command = Command::new(world.path("migctl"));
    command.arg("--config").arg(world.config()).args(args).env_clear().env("PATH", "/usr/bin:/bin");
    command.envs(variables.iter().copied()).current_dir("/");
    if uid != 0 {
        command.uid(uid).gid(uid);
    }
    run(&mut command)
}

/// `migctl job start` for the job of that number.
fn start(world: &World, key: &str, uid: u32, more: &[&str]) -> Output {
    let uid = uid.to_string();
    world.migctl(&[&["job", "start", "--key", key, "--uid", &uid, "--gid", &uid], more].concat())
}

fn started(world: &World, key: &str, uid: u32, more: &[&str]) -> Value {
    let output = start(world, key, uid, &[more, &["--json"]].concat());
    assert_eq!(code(&output), 0, "{}", text(&output));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn end(world: &World, key: &str) -> Output {
    world.migctl(&["job", "end", "--key", key])
}

fn public(world: &World, key: &str) -> Option<Value> {
    let text = std::fs::read(world.path("state/public").join(format!("{key}.json"))).ok()?;
    Some(serde_json::from_slice(&text).unwrap())
}

fn uuid(lease: &Value) -> &str {
    lease["slices"][0]["uuid"].as_str().unwrap()
}

fn assert_nothing_left(world: &World, when: &str) {
    world.assert_clean(when);
    for dir in ["holders", "intents", "index", "public"] {
        let left: Vec<PathBuf> =
            std::fs::read_dir(world.path("state").join(dir)).into_iter().flatten().map(|e| e.unwrap().path()).collect();
        assert_eq!(left, Vec::<PathBuf>::new(), "{when}");
    }
}

/// What every request does first: whatever nobody holds any more is freed. What became of the lease of a token?
fn looked_after(world: &World, token: &Value) -> Option<Value> {
    let output = world.migctl(&["run", "1g.6gb", "--", "true"]);
    assert_eq!(code(&output), 0, "{}", text(&output));
    world.leases().into_iter().find(|lease| lease["token"] == *token)
}

/// A lease as it would be so much later.
fn age(world: &World, token: &Value, ms: u64) {
    world.edit_lease(token.as_str().unwrap(), |lease| {
        lease["created_boot_ms"] = json!(lease["created_boot_ms"].as_u64().unwrap() - ms);
    });
}

const MINUTES_10: u64 = 600_000;

/// Whether this machine has been up for long enough to have seen something ten minutes ago.
fn up_for_long(what: &str) -> bool {
    let long = mig_hook::host::boot_ms() > MINUTES_10 + 60_000;
    if !long {
        skip(what, "the machine has just been started");
    }
    long
}

// ---- a batch system's processes ----

/// Ended and reaped with the value.
struct Process(Child);

impl Process {
    fn in_cgroup(cgroup: &Cgroup) -> Process {
        Process(cgroup.start(Command::new("sleep").arg("600").stdout(Stdio::null())))
    }

    /// One that calls itself that, of that user.
    fn called(name: &str, uid: u32) -> Process {
        let mut command = Command::new("bash");
        command.args(["-c", "exec -a \"$0\" sleep 600", name]).stdin(Stdio::null()).stdout(Stdio::null());
        let process = Process(command.uid(uid).gid(uid).current_dir("/").spawn().unwrap());
        let named = || mig_hook::host::command_line(process.0.id()).first().is_some_and(|word| word == name);
        wait_for(name, IN_TIME, named);
        process
    }

    fn pid(&self) -> u32 {
        self.0.id()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

// ---- what a job learns ----

#[test]
fn a_jobs_processes_learn_what_it_has_and_nobody_else_does() {
    let world = site(&[A30]);
    let answer = started(&world, KEY, USER, &["--sign", SIGN, "1g.6gb,2g.12gb"]);
    let lease = world.lease();
    assert_eq!((&answer["key"], &answer["token"]), (&json!(KEY), &lease["token"]));
    let holder = &lease["holder"];
    assert_eq!(
        (&holder["way"], &holder["job"], &holder["uid"], &holder["sign"]),
        (&json!("job"), &json!(KEY), &json!(USER), &json!(SIGN))
    );
    let uuids: Vec<&str> = lease["slices"].as_array().unwrap().iter().map(|s| s["uuid"].as_str().unwrap()).collect();
    let expected: BTreeMap<&str, String> = BTreeMap::from([
        ("CUDA_VISIBLE_DEVICES", uuids.join(",")),
        ("NVIDIA_VISIBLE_DEVICES", uuids.join(",")),
        ("MIG_UUID", uuids.join(",")),
        ("MIG_DEVICE_UUIDS", uuids.join(",")),
        ("MIG_DEVICE_PROFILES", "1g.6gb,2g.12gb".into()),
        ("MIG_LEASE", lease["token"].as_str().unwrap().into()),
        ("MIG_JOB", KEY.into()),
    ]);
    assert_eq!(answer["environment"], json!(expected));
    let lines = |form: fn(&str, &str) -> String| -> String { expected.iter().map(|(n, v)| form(n, v)).collect() };
    for (format, lines) in [
        (&[][..], lines(|name, value| format!("export {name}='{value}'\n"))),
        (&["--format", "shell"], lines(|name, value| format!("export {name}='{value}'\n"))),
        (&["--format", "slurm"], lines(|name, value| format!("export {name}={value}\n"))),
        (&["--format", "docker"], lines(|name, value| format!("{name}={value}\n"))),
    ] {
        let of_it = call(&world, USER, &[&["job", "env", "--key", KEY], format].concat(), &[]);
        assert_eq!((code(&of_it), String::from_utf8_lossy(&of_it.stdout).as_ref()), (0, lines.as_str()), "{format:?}");
        let in_it = call(&world, USER, &[&["job", "env"], format].concat(), &[("MIG_JOB", KEY)]);
        assert_eq!(in_it.stdout, of_it.stdout, "{}", text(&in_it));
    }
    let documents: [Value; 2] = [USER, 0].map(|uid| {
        serde_json::from_slice(&call(&world, uid, &["job", "env", "--key", KEY, "--json"], &[]).stdout).unwrap()
    });
    assert!(documents.iter().all(|document| *document == answer), "{documents:#?}");

    for (uid, args, variables, exit, said) in [
        (OTHER, &["job", "env", "--key", KEY][..], &[][..], 77, "job slurm:mini:15 is another user's"),
        (OTHER, &["job", "env"], &[("MIG_JOB", KEY)], 77, "job slurm:mini:15 is another user's"),
        (USER, &["job", "env", "--key", "slurm:mini:16"], &[], 65, "no job slurm:mini:16 has slices here"),
        (USER, &["job", "env"], &[], 65, "this process is in no job that has slices here"),
        (USER, &["job", "env"], &[("MIG_JOB", "../leases/x")], 65, "this process is in no job"),
        (USER, &["job", "end", "--key", KEY], &[], 77, ""),
        (USER, &["job", "start", "--key", "k", "--uid", "0", "1g.6gb"], &[], 77, ""),
        (0, &["job", "start", "--key", "../x", "--uid", "0", "1g.6gb"], &[], 64, "a job's key has 1 to 128 letters"),
        (0, &["job", "start", "--key", "k", "--uid", "no-such-user", "1g.6gb"], &[], 64, "no-such-user"),
        (0, &["job", "start", "--key", "k", "--uid", "98765", "1g.6gb"], &[], 64, "name it with --gid"),
        (0, &["job", "start", "--key", "k", "--uid", "0", "--sign", "", "1g.6gb"], &[], 64, "--sign"),
        (0, &["job", "start", "--key", "k", "--uid", "0", "--cgroup", "/", "1g.6gb"], &[], 64, "the whole cgroup tree"),
        (0, &["job", "start", "--key", "k", "--uid", "0", "--cgroup", "", "1g.6gb"], &[], 64, "begin with /"),
        (0, &["job", "start", "--key", "k", "--uid", "0", "--cgroup", "job_1", "1g.6gb"], &[], 64, "begin with /"),
        (0, &["job", "start", "--key", "k", "--uid", "0", "--confine", "1g.6gb"], &[], 64, "--cgroup"),
        (0, &["job", "start", "--key", "k", "--uid", "0", "--pid", "4194304", "1g.6gb"], &[], 64, "--pid"),
        (0, &["job", "start", "--key", "k", "--uid", "0", "1g.10gb"], &[], 65, "not offered"),
    ] {
        let output = call(&world, uid, args, variables);
        assert_eq!(code(&output), exit, "{args:?}: {}", text(&output));
        assert!(output.stdout.is_empty() && text(&output).contains(said), "{args:?}: {}", text(&output));
    }
    assert_eq!(world.leases(), [lease], "none of them has changed anything");
    assert_eq!(code(&end(&world, "k")), 0, "what the last one was refused for is public");
    assert_eq!(code(&end(&world, KEY)), 0);
    assert_nothing_left(&world, "after the job");
}

#[test]
fn what_is_public_is_the_jobs_group_and_nothing_else_is_open() {
    let world = site(&[A30]);
    assert_eq!(code(&world.migctl(&["gc"])), 0);
    let mode = |path: &str| {
        let meta = world.path(path).symlink_metadata().unwrap();
        (meta.mode() & 0o7777, meta.uid(), meta.gid())
    };
    assert_eq!(mode("state").0, 0o700, "nothing is public yet");
    let output =
        world.migctl(&["job", "start", "--key", KEY, "--uid", "65534", "--gid", "4711", "--sign", SIGN, "1g.6gb"]);
    assert_eq!(code(&output), 0, "{}", text(&output));
    assert_eq!((mode("state").0, mode("state/public").0), (0o711, 0o711));
    assert_eq!(mode("state/public/slurm:mini:15.json"), (0o640, 0, 4711));
    for closed in ["leases", "holders", "queue", "intents", "index", "claims"] {
        assert_eq!(mode(&format!("state/{closed}")).0, 0o700, "{closed}");
    }
    let lease = world.lease();
    let record = public(&world, KEY).unwrap();
    let slice = &lease["slices"][0];
    assert_eq!(
        record["slices"],
        json!([{"uuid": slice["uuid"], "profile": "1g.6gb", "gpu": slice["gpu"], "gpu_index": 0, "memory_mib": slice["memory_mib"]}])
    );
    assert_eq!((&record["uid"], &record["token"], &record["refusal"]), (&json!(USER), &lease["token"], &Value::Null));
    // The nodes are there, and are those devices.
    let nodes = record["nodes"].as_array().unwrap();
    let caps = [&slice["gi_minor"], &slice["ci_minor"]].map(|minor| json!(format!("nvidia-caps/nvidia-cap{minor}")));
    assert!(caps.iter().all(|path| nodes.iter().any(|node| node["path"] == *path)), "{nodes:#?}");
    assert!(nodes.iter().any(|node| node["path"] == "nvidiactl") && nodes.iter().any(|node| node["path"] == "nvidia0"));
    for node in nodes {
        let meta = world.path("m/dev").join(node["path"].as_str().unwrap()).symlink_metadata().unwrap();
        let number = nix::sys::stat::makedev(node["major"].as_u64().unwrap(), node["minor"].as_u64().unwrap());
        assert_eq!(meta.rdev(), number, "{node}");
    }
    assert_eq!(code(&end(&world, KEY)), 0);
    assert_nothing_left(&world, "after the job");
}

#[test]
fn what_users_see_does_not_depend_on_what_is_public() {
    let world = site(&[A30]);
    // The driver's own files and library are everybody's.
    let open = run(Command::new("chmod").args(["-R", "a+rX"]).arg(world.path("m")));
    assert!(open.status.success(), "{}", text(&open));
    assert_eq!(code(&world.migctl(&["create", "1g.6gb"])), 0);
    let verbs: [&[&str]; 10] = [
        &["list"],
        &["map"],
        &["top", "--once"],
        &["profiles"],
        &["leases"],
        &["queue"],
        &["plan", "1g.6gb"],
        &["gc"],
        &["metrics"],
        &["run", "1g.6gb", "--", "true"],
    ];
    let seen = || verbs.map(|verb| call(&world, USER, verb, &[])).map(|output| (code(&output), output.stdout));
    let before = seen();
    started(&world, KEY, USER, &["--sign", SIGN, "2g.12gb"]);
    assert_eq!(code(&end(&world, KEY)), 0);
    assert_eq!(world.path("state").metadata().unwrap().mode() & 0o777, 0o711);
    for ((verb, before), after) in verbs.iter().zip(before).zip(seen()) {
        assert_eq!(before, after, "{verb:?}");
    }
}

#[test]
fn where_nothing_is_public_there_is_no_job() {
    let world = site(&[A30]);
    let env = |variables: &[(&str, &str)]| call(&world, USER, &["job", "env"], variables);
    assert_eq!(code(&env(&[("MIG_JOB", KEY)])), 65, "there is no state");
    assert_eq!(code(&world.migctl(&["gc"])), 0);
    let output = env(&[("MIG_JOB", KEY)]);
    assert!(code(&output) == 65 && text(&output).contains("in no job that has slices"), "closed: {}", text(&output));
    // Of Slurm's variables and ours, Slurm's count: ours may be inherited from the job that submitted this one.
    started(&world, KEY, USER, &["--sign", SIGN, "1g.6gb"]);
    let other = [("SLURM_CLUSTER_NAME", "mini"), ("SLURM_JOB_ID", "16"), ("MIG_JOB", KEY)];
    assert_eq!((code(&env(&other)), code(&env(&other[2..]))), (65, 0));
    assert_eq!(code(&end(&world, KEY)), 0);
}

#[test]
fn a_refusal_is_told_to_the_job_and_forgotten_with_it() {
    let world = site(&[A30]);
    started(&world, "big", OTHER, &["4g.24gb"]);
    let env = || call(&world, USER, &["job", "env", "--key", KEY], &[]);
    for forgotten_by in ["its end", "a day", "a start that succeeds"] {
        let output = start(&world, KEY, USER, &["--sign", SIGN, "1g.6gb"]);
        assert!(code(&output) == 75 && text(&output).contains("no room for 1g.6gb"), "{}", text(&output));
        let refusal = public(&world, KEY).unwrap();
        assert_eq!((&refusal["token"], &refusal["slices"], &refusal["nodes"]), (&Value::Null, &json!([]), &json!([])));
        let told = env();
        assert_eq!(code(&told), 75, "{}", text(&told));
        let why = "migctl: job slurm:mini:15 was refused: no room for 1g.6gb: GPU 0 (NVIDIA A30) holds 4g.24gb at 0:4 (job big)";
        assert!(text(&told).contains(why), "{}", text(&told));
        assert_eq!(code(&world.migctl(&["gc"])), 0);
        assert!(public(&world, KEY).is_some(), "not by gc at once");
        match forgotten_by {
            "its end" => assert_eq!(code(&end(&world, KEY)), 0),
            "a day" => {
                let file = world.path("state/public/slurm:mini:15.json");
                let file = std::fs::File::options().write(true).open(file).unwrap();
                file.set_modified(std::time::SystemTime::now() - Duration::from_secs(25 * 3600)).unwrap();
                assert_eq!(code(&world.migctl(&["gc"])), 0);
                assert!(public(&world, "big").is_some(), "a job that lives is remembered");
            }
            _ => {
                assert_eq!(code(&end(&world, "big")), 0);
                started(&world, KEY, USER, &["--sign", SIGN, "1g.6gb"]);
                assert_eq!(code(&env()), 0);
                assert_eq!(code(&end(&world, KEY)), 0);
            }
        }
        assert!(public(&world, KEY).is_none() && code(&env()) == 65, "{forgotten_by}");
    }
    assert_nothing_left(&world, "in the end");
}

#[test]
fn a_job_waits_as_long_as_it_may() {
    let world = site(&[A30]);
    started(&world, "first", OTHER, &["4g.24gb"]);
    let output = start(&world, KEY, USER, &["--wait", "1s", "1g.6gb"]);
    assert!(code(&output) == 75 && text(&output).contains("waited 1s in line"), "{}", text(&output));
    world.settings("[jobs]\nwait = \"30s\"");
    let mut waits = Command::new(binaries().join("migctl"));
    waits.arg("--config").arg(world.config()).args(["job", "start", "--key", KEY, "--uid", "65534", "--gid", "65534"]);
    let mut waits =
        Process(waits.args(["--sign", SIGN, "1g.6gb"]).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap());
    wait_for("a place", IN_TIME, || world.document(&["queue"])["waiting"][0]["way"] == "job");
    let waiting = world.document(&["queue"])["waiting"][0].clone();
    assert!(waiting["left_ms"].as_u64().unwrap() > 20_000, "{waiting:#}");
    assert_eq!(code(&end(&world, "first")), 0);
    assert!(waits.0.wait().unwrap().success());
    assert_eq!(world.lease()["holder"]["job"], KEY);
    assert_eq!(code(&end(&world, KEY)), 0);
    assert_nothing_left(&world, "in the end");
}

// ---- how long it has them ----

#[test]
fn a_job_lives_as_long_as_a_process_is_in_its_cgroup() {
    let Some(cgroup) = Cgroup::new("a_job_lives_as_long_as_a_process_is_in_its_cgroup") else { return };
    let world = site(&[A30]);
    // By its path, its directory, and the end of its path.
    let end_of_path = format!("/{}", cgroup.path().rsplit('/').next().unwrap());
    for name in [cgroup.path(), cgroup.dir().display().to_string(), end_of_path] {
        let token = started(&world, KEY, USER, &["--cgroup", &name, "1g.6gb"])["token"].clone();
        let before = looked_after(&world, &token).expect("it is being started");
        assert_eq!(before["holder"]["init"], Value::Null);
        let process = Process::in_cgroup(&cgroup);
        let lease = looked_after(&world, &token).unwrap();
        assert_eq!(lease["holder"]["init"]["pid"], process.pid(), "{name}");
        let second = Process::in_cgroup(&cgroup);
        drop(process);
        let lease = looked_after(&world, &token).expect("another one lives");
        assert_eq!(lease["holder"]["init"]["pid"], second.pid());
        drop(second);
        assert_eq!(looked_after(&world, &token), None, "it was seen, and has ended: {name}");
        let ended =
            world.audit().into_iter().rfind(|line| line["event"] == "release" && line["token"] == token).unwrap();
        assert_eq!((&ended["reason"], &ended["job"]), (&json!("its job has ended"), &json!(KEY)));
        assert_nothing_left(&world, &name);
    }
}

#[test]
fn a_job_lives_as_long_as_the_process_that_was_named() {
    let world = site(&[A30]);
    let process = Process::called("a job", USER);
    let token = started(&world, KEY, USER, &["--pid", &process.pid().to_string(), "1g.6gb"])["token"].clone();
    assert!(looked_after(&world, &token).is_some());
    drop(process);
    assert_eq!(looked_after(&world, &token), None);
    assert_nothing_left(&world, "after its process");
}

#[test]
fn a_job_lives_as_long_as_its_sign_is_seen_and_only_root_gives_it() {
    let test = "a_job_lives_as_long_as_its_sign_is_seen_and_only_root_gives_it";
    if !up_for_long(test) {
        return;
    }
    let world = site(&[A30]);
    let sign = format!("batchd: [{}.", std::process::id());
    let token = started(&world, KEY, USER, &["--sign", &sign, "1g.6gb"])["token"].clone();
    let false_one = Process::called(&format!("{sign}0]"), USER);
    let lease = looked_after(&world, &token).unwrap();
    assert_eq!(lease["holder"]["init"], Value::Null, "a user can call himself what he likes");
    let true_one = Process::called(&format!("{sign}batch]"), 0);
    let lease = looked_after(&world, &token).unwrap();
    assert_eq!(lease["holder"]["init"]["pid"], true_one.pid());
    age(&world, &token, MINUTES_10 + 1000);
    assert!(looked_after(&world, &token).is_some());
    drop(true_one);
    assert_eq!(looked_after(&world, &token), None, "the user's own does not count");
    drop(false_one);
    assert_nothing_left(&world, "after its sign");
}

#[test]
fn a_job_of_which_nothing_was_seen_has_ten_minutes() {
    if !up_for_long("a_job_of_which_nothing_was_seen_has_ten_minutes") {
        return;
    }
    let world = site(&[A30]);
    let token = started(&world, KEY, USER, &["--sign", SIGN, "--cgroup", "/no/such/job", "1g.6gb"])["token"].clone();
    age(&world, &token, MINUTES_10 - 30_000);
    assert!(looked_after(&world, &token).is_some(), "its batch system may still be starting it");
    age(&world, &token, 31_000);
    assert_eq!(looked_after(&world, &token), None);
    let ended = world.audit().into_iter().rfind(|line| line["event"] == "release" && line["token"] == token).unwrap();
    assert_eq!(ended["reason"], "no process of its job was seen for 10 minutes");
    assert_nothing_left(&world, "after ten minutes");
}

#[test]
fn a_job_that_nobody_can_see_lives_until_it_is_ended() {
    if !up_for_long("a_job_that_nobody_can_see_lives_until_it_is_ended") {
        return;
    }
    let world = site(&[A30]);
    let token = started(&world, KEY, USER, &["1g.6gb"])["token"].clone();
    age(&world, &token, MINUTES_10 + 1000);
    assert!(looked_after(&world, &token).is_some());
    assert_eq!(started(&world, KEY, USER, &["1g.6gb"])["token"], token, "and is the same when it is started again");
    assert_eq!(code(&end(&world, KEY)), 0);
    assert_nothing_left(&world, "after its end");
}

// ---- the same number again ----

#[test]
fn a_job_that_is_alive_keeps_what_it_has() {
    let Some(cgroup) = Cgroup::new("a_job_that_is_alive_keeps_what_it_has") else { return };
    let world = site(&[A30]);
    let alive = ["--cgroup", &cgroup.path(), "1g.6gb"];
    let first = started(&world, KEY, USER, &alive);
    let process = Process::in_cgroup(&cgroup);
    assert_eq!(started(&world, KEY, USER, &alive), first, "started again");
    let env = call(&world, USER, &["job", "env", "--key", KEY], &[]);
    for (uid, request, exit, said) in [
        (OTHER, "1g.6gb", 75, "another job slurm:mini:15, of uid 65534 and with 1g.6gb, is still running here"),
        (USER, "2g.12gb", 75, "another job slurm:mini:15, of uid 65534 and with 1g.6gb, is still running here"),
    ] {
        let output = start(&world, KEY, uid, &["--cgroup", &cgroup.path(), request]);
        assert!(code(&output) == exit && text(&output).contains(said), "{}", text(&output));
        let now = call(&world, USER, &["job", "env", "--key", KEY], &[]);
        assert_eq!((now.status, &now.stdout), (env.status, &env.stdout), "what it has stays public");
    }
    // Something is in the way of telling the job what it has: that is no reason to take it away.
    std::fs::remove_file(world.path("state/public/slurm:mini:15.json")).unwrap();
    std::fs::create_dir(world.path("state/public/.write.tmp")).unwrap();
    let output = start(&world, KEY, USER, &alive);
    assert_eq!(code(&output), 74, "{}", text(&output));
    std::fs::remove_dir(world.path("state/public/.write.tmp")).unwrap();
    assert_eq!(world.lease()["state"], "active");
    assert_eq!(started(&world, KEY, USER, &alive), first);
    drop(process);
    assert_eq!(code(&end(&world, KEY)), 0);
    assert_nothing_left(&world, "in the end");
}

#[test]
fn what_cannot_be_told_to_a_new_job_is_taken_back() {
    let world = site(&[A30]);
    assert_eq!(code(&world.migctl(&["gc"])), 0);
    std::fs::create_dir_all(world.path("state/public/.write.tmp")).unwrap();
    let output = start(&world, KEY, USER, &["1g.6gb"]);
    assert_eq!(code(&output), 74, "{}", text(&output));
    assert!(text(&output).contains("; nothing is left of it"), "{}", text(&output));
    std::fs::remove_dir(world.path("state/public/.write.tmp")).unwrap();
    assert_nothing_left(&world, "after a refusal");
}

#[test]
fn a_number_that_comes_again_is_another_job() {
    let world = site(&[A30]);
    let process = Process::called("the first", USER);
    let first = started(&world, KEY, USER, &["--pid", &process.pid().to_string(), "1g.6gb"]);
    drop(process);
    // Its end was never told, and nobody has looked since.
    let second = started(&world, KEY, OTHER, &["--sign", SIGN, "2g.12gb"]);
    let lease = world.lease();
    assert_ne!(first["token"], second["token"]);
    assert_eq!((&lease["token"], &lease["holder"]["uid"]), (&second["token"], &json!(OTHER)));
    let reason = |token: &Value| {
        let line = world.audit().into_iter().find(|line| line["event"] == "release" && line["token"] == *token);
        line.unwrap()["reason"].clone()
    };
    assert_eq!(reason(&first["token"]), "another job of the same number has begun");
    assert_eq!(code(&call(&world, USER, &["job", "env", "--key", KEY], &[])), 77);
    assert_eq!(code(&call(&world, OTHER, &["job", "env", "--key", KEY], &[])), 0);
    // Of the second nothing was seen yet: a third is another one, too.
    let third = started(&world, KEY, OTHER, &["--sign", SIGN, "2g.12gb"]);
    assert_eq!(world.lease()["token"], third["token"]);
    assert_eq!(public(&world, KEY).unwrap()["token"], third["token"]);
    assert_eq!(code(&end(&world, KEY)), 0);
    assert_nothing_left(&world, "in the end");
}

#[test]
fn a_job_whose_end_was_announced_is_not_alive() {
    let Some(cgroup) = Cgroup::new("a_job_whose_end_was_announced_is_not_alive") else { return };
    let world = site(&[A30]);
    let alive = ["--cgroup", &cgroup.path(), "1g.6gb"];
    let first = started(&world, KEY, USER, &alive);
    let _process = Process::in_cgroup(&cgroup);
    // Who ended it did not get the lock.
    assert!(mig_hook::store::Store::at(&world.path("state")).announce(first["token"].as_str().unwrap()));
    let second = started(&world, KEY, USER, &alive);
    assert_ne!(first["token"], second["token"]);
    let states = |world: &World| {
        let state =
            |lease: Value| (lease["token"].as_str().unwrap().to_owned(), lease["state"].as_str().unwrap().to_owned());
        world.leases().into_iter().map(state).collect::<BTreeMap<_, _>>()
    };
    let token = |answer: &Value| answer["token"].as_str().unwrap().to_owned();
    let expected = BTreeMap::from([(token(&first), "releasing".to_owned()), (token(&second), "active".to_owned())]);
    assert_eq!(states(&world), expected);
    assert_eq!(public(&world, KEY).unwrap()["token"], second["token"]);
    drop(_process);
    assert_eq!(looked_after(&world, &first["token"]), None);
    assert_eq!(public(&world, KEY).unwrap()["token"], second["token"], "the end of the first is not the second's");
    assert_eq!(code(&end(&world, KEY)), 0);
    assert_nothing_left(&world, "in the end");
}

// ---- its end ----

#[test]
fn an_end_may_come_twice_and_for_what_never_was() {
    let world = site(&[A30]);
    started(&world, KEY, USER, &["--sign", SIGN, "1g.6gb"]);
    let ends = [
        end(&world, KEY),
        end(&world, KEY),
        end(&world, "never"),
        start(&world, KEY, USER, &["1g.6gb"]),
        end(&world, KEY),
    ];
    assert!(ends.iter().all(|output| code(output) == 0), "{ends:#?}");
    let said = |output: &Output| String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(said(&ends[0]), "what job slurm:mini:15 had is free\n");
    assert_eq!(said(&ends[1]), "job slurm:mini:15 has nothing here\n");
    assert_eq!(said(&ends[2]), "job never has nothing here\n");
    assert_nothing_left(&world, "in the end");
}

#[test]
fn while_a_process_has_it_open_the_slice_is_nobodys() {
    let world = site(&[A30]);
    let token = started(&world, KEY, USER, &["--sign", SIGN, "1g.6gb"])["token"].clone();
    let open = world.open_capability(token.as_str().unwrap());
    for _ in 0..2 {
        let output = end(&world, KEY);
        assert_eq!(code(&output), 75, "{}", text(&output));
        assert!(text(&output).contains("is freed by migctl gc later"), "{}", text(&output));
        assert_eq!(world.lease()["state"], "releasing");
        assert!(public(&world, KEY).is_none(), "nobody else is to learn of it");
    }
    assert_eq!(looked_after(&world, &token).unwrap()["state"], "releasing");
    drop(open);
    assert_eq!(code(&world.migctl(&["gc"])), 0);
    assert_nothing_left(&world, "when it is closed");
}

#[test]
fn what_a_job_leaves_in_its_cgroup_keeps_the_slice() {
    let Some(cgroup) = Cgroup::new("what_a_job_leaves_in_its_cgroup_keeps_the_slice") else { return };
    let world = site(&[A30]);
    let token = started(&world, KEY, USER, &["--cgroup", &cgroup.path(), "1g.6gb"])["token"].clone();
    let left = Process::in_cgroup(&cgroup);
    let output = end(&world, KEY);
    assert!(code(&output) == 75 && text(&output).contains("(sleep) is in its cgroup"), "{}", text(&output));
    assert_eq!(looked_after(&world, &token).unwrap()["state"], "releasing");
    drop(left);
    assert_eq!(looked_after(&world, &token), None);
    assert_nothing_left(&world, "after the last process");
}

// ---- confinement ----

/// How a node opens for a process in that cgroup.
fn opens(cgroup: &Cgroup, node: &Path) -> &'static str {
    let mut command = Command::new("cat");
    let command =
        command.arg(node).env("LC_ALL", "C").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = cgroup.start(command);
    let mut said = String::new();
    child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    child.wait().unwrap();
    match said {
        said if said.contains("No such device or address") => "opens",
        said if said.contains("Operation not permitted") => "denied",
        said => panic!("{}: {said}", node.display()),
    }
}

#[test]
fn a_confined_job_opens_its_own_slices_and_no_other() {
    let test = "a_confined_job_opens_its_own_slices_and_no_other";
    let Some(cgroup) = Cgroup::new(test) else { return };
    let world = site(&[A30, A30]);
    let nodes = |answer: &Value| -> Vec<PathBuf> {
        let of = |node: &Value| world.path("m/dev").join(node["path"].as_str().unwrap());
        answer["nodes"].as_array().unwrap().iter().map(of).collect()
    };
    let other = nodes(&started(&world, "other", OTHER, &["--gpu", "1", "1g.6gb"]));
    if !other[0].exists() {
        return skip(test, "no device nodes can be made here");
    }
    let path = cgroup.path();
    for setting in [false, true] {
        let more: &[&str] = if setting { &[] } else { &["--confine"] };
        world.settings(if setting { "[jobs]\nconfine = true" } else { "" });
        let args = [&["--cgroup", &path, "--gpu", "0"], more, &["1g.6gb"]].concat();
        let own = nodes(&started(&world, KEY, USER, &args));
        for node in &own {
            assert_eq!(opens(&cgroup, node), "opens", "{}", node.display());
        }
        for node in other.iter().filter(|node| !own.contains(node)) {
            assert_eq!(opens(&cgroup, node), "denied", "{}", node.display());
        }
        assert_eq!(other.iter().filter(|node| !own.contains(node)).count(), 3, "a GPU and two capabilities");
        assert_eq!(code(&end(&world, KEY)), 0);
    }
    let output = start(&world, KEY, USER, &["--sign", SIGN, "1g.6gb"]);
    assert!(code(&output) == 77 && text(&output).contains("jobs.confine is set: name the cgroup"), "{}", text(&output));
    assert_eq!(code(&end(&world, "other")), 0);
    assert_eq!(code(&end(&world, KEY)), 0);
    assert_nothing_left(&world, "in the end");
}

#[test]
fn a_job_that_cannot_be_confined_gets_nothing() {
    let world = site(&[A30]);
    if Path::new(V1).is_dir() {
        // Of another hierarchy.
        let output = start(&world, KEY, USER, &["--cgroup", "/sys/fs/cgroup/memory/job", "--confine", "1g.6gb"]);
        assert!(
            code(&output) == 64 && text(&output).contains("is not below /sys/fs/cgroup/devices"),
            "{}",
            text(&output)
        );
    }
    let Some(cgroup) = Cgroup::new("a_job_that_cannot_be_confined_gets_nothing") else { return };
    // A file of the kernel's is in the place of its cgroup.
    let no_cgroup = format!("{}/cgroup.procs/job", cgroup.path());
    let output = start(&world, KEY, USER, &["--cgroup", &no_cgroup, "--confine", "1g.6gb"]);
    assert!(text(&output).contains("cgroup.procs is a link or a file; nothing is left of it"), "{}", text(&output));
    assert!(public(&world, KEY).unwrap()["refusal"].is_string());
    assert_eq!(code(&end(&world, KEY)), 0);
    assert_nothing_left(&world, "after a refusal");
}

// ---- what Slurm calls ----

/// The environment of a Prolog or an Epilog of job 15 (slurm.conf(5)), and of its tasks.
const SLURM: [(&str, &str); 7] = [
    ("SLURM_CLUSTER_NAME", "mini"),
    ("SLURM_JOB_ID", "15"),
    ("SLURM_JOB_UID", "65534"),
    ("SLURM_JOB_GID", "65534"),
    ("SLURM_JOB_USER", "nobody"),
    ("SLURMD_NODENAME", "no-such-node"),
    ("SLURM_JOB_RESTART_COUNT", "0"),
];

/// As slurmd calls it: whatever happens it ends with 0. What it has said.
fn slurmd(world: &World, verb: &str, comment: Option<&str>) -> String {
    let variables: Vec<(&str, &str)> =
        SLURM.into_iter().chain(comment.map(|text| ("SLURM_JOB_COMMENT", text))).collect();
    let output = call(world, 0, &["slurm", verb], &variables);
    assert!(code(&output) == 0 && output.stdout.is_empty(), "{verb}: {}", text(&output));
    String::from_utf8(output.stderr).unwrap()
}

fn task_prolog(world: &World, more: &[(&str, &str)]) -> Output {
    let variables: Vec<(&str, &str)> = SLURM[..2].iter().copied().chain(more.iter().copied()).collect();
    call(world, USER, &["slurm", "task-prolog"], &variables)
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

#[test]
fn a_job_of_slurms_has_its_slices_from_prolog_to_epilog() {
    let world = site(&[A30]);
    assert_eq!(slurmd(&world, "epilog", None), "", "one that was never begun");
    for comment in ["mig=1g.6gb,2g.12gb", "for the paper; mig=1g.6gb,2g.12gb mig=4g.24gb"] {
        assert_eq!(slurmd(&world, "prolog", Some(comment)), "");
        let lease = world.lease();
        let holder = &lease["holder"];
        assert_eq!((&holder["job"], &holder["uid"]), (&json!(KEY), &json!(USER)));
        assert_eq!((&holder["sign"], &holder["cgroup"]), (&json!("slurmstepd: [15."), &Value::Null));
        let output = task_prolog(&world, &[]);
        assert_eq!(code(&output), 0, "{}", text(&output));
        let uuids: Vec<&str> =
            lease["slices"].as_array().unwrap().iter().map(|s| s["uuid"].as_str().unwrap()).collect();
        for name in ["CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "MIG_UUID", "MIG_DEVICE_UUIDS"] {
            assert!(stdout(&output).contains(&format!("export {name}={}\n", uuids.join(","))), "{}", text(&output));
        }
        assert!(stdout(&output).contains("export MIG_JOB=slurm:mini:15\n"), "{}", text(&output));
        assert!(stdout(&output).lines().all(|line| line.starts_with("export ")), "{}", text(&output));
        let root = world.path("state/runtime/nobody").symlink_metadata().unwrap();
        assert_eq!((root.mode() & 0o7777, root.uid(), root.gid()), (0o700, USER, USER));
        for _ in 0..2 {
            assert_eq!(slurmd(&world, "epilog", None), "");
            assert_nothing_left(&world, "after the epilog");
        }
        let output = task_prolog(&world, &[]);
        assert!(code(&output) == 0 && output.stdout.is_empty(), "{}", text(&output));
    }
}

#[test]
fn a_job_that_asks_for_nothing_inherits_nothing() {
    let world = site(&[A30]);
    assert_eq!(slurmd(&world, "prolog", Some("for the paper")), "");
    assert_eq!(slurmd(&world, "prolog", None), "");
    assert_nothing_left(&world, "after a prolog that was asked for nothing");
    let inherited = [
        ("MIG_UUID", "MIG-1"),
        ("MIG_LEASE", "t"),
        ("CUDA_VISIBLE_DEVICES", "MIG-1"),
        ("NVIDIA_VISIBLE_DEVICES", "all"),
    ];
    let output = task_prolog(&world, &inherited);
    assert_eq!(
        (code(&output), stdout(&output).as_str()),
        (0, "unset CUDA_VISIBLE_DEVICES\nunset MIG_UUID\nunset MIG_LEASE\n")
    );
    let output = task_prolog(&world, &[("CUDA_VISIBLE_DEVICES", "0")]);
    assert_eq!((code(&output), stdout(&output).as_str()), (0, ""), "Slurm's own");
    // Not what an earlier job of that number has left either.
    slurmd(&world, "prolog", Some("mig=1g.6gb"));
    assert_eq!(slurmd(&world, "prolog", None), "");
    assert_nothing_left(&world, "after the next of that number");
}

#[test]
fn a_refusal_fails_the_job_alone() {
    let world = site(&[A30]);
    started(&world, "other", OTHER, &["4g.24gb"]);
    for (comment, said) in [
        ("mig=1g.6gb", "no room for 1g.6gb: GPU 0 (NVIDIA A30) holds 4g.24gb at 0:4 (job other)"),
        ("mig=1g.10gb", "1g.10gb"),
        ("mig=no-profile", "'no-profile': it is not"),
        ("mig=", "REQUEST"),
        ("mig=1g.6gb\u{7f}", "REQUEST"),
    ] {
        let log = slurmd(&world, "prolog", Some(comment));
        assert!(log.contains(said) && log.lines().count() == 1, "{comment}: {log}");
        let output = task_prolog(&world, &[]);
        assert_ne!(code(&output), 0);
        let line = stdout(&output);
        assert!(
            line.starts_with("print migctl: job slurm:mini:15 was refused: ") && line.contains(said),
            "{comment}: {line}"
        );
        assert!(line.ends_with('\n') && !line.trim_end().contains(char::is_control), "{line:?}");
        assert_eq!(slurmd(&world, "epilog", None), "");
        assert!(public(&world, KEY).is_none());
    }
    assert_eq!(code(&end(&world, "other")), 0);
    assert_nothing_left(&world, "in the end");
}

#[test]
fn whatever_is_wrong_on_the_node_prolog_and_epilog_end_well() {
    let world = site(&[A30]);
    // A setting that means nothing: the job is told.
    std::fs::write(world.config(), std::fs::read_to_string(world.config()).unwrap() + "[jobs]\nwiat = \"5m\"\n")
        .unwrap();
    let log = slurmd(&world, "prolog", Some("mig=1g.6gb"));
    assert!(log.contains("jobs.wait") && log.lines().count() == 1, "{log}");
    let output = task_prolog(&world, &[]);
    assert!(code(&output) != 0 && stdout(&output).contains("jobs.wait"), "{}", text(&output));
    slurmd(&world, "prolog", None);
    slurmd(&world, "epilog", None);
    assert!(public(&world, KEY).is_none());
    world.settings("");
    // slurmd's variables are missing.
    for verb in ["prolog", "epilog"] {
        let output = call(&world, 0, &["slurm", verb], &SLURM[..2]);
        assert!(code(&output) == 0 && text(&output).contains("SLURM_JOB_UID is not set"), "{}", text(&output));
    }
    let output = call(&world, USER, &["slurm", "task-prolog"], &[]);
    assert!(
        code(&output) != 0 && stdout(&output).starts_with("print migctl: SLURM_CLUSTER_NAME is not set"),
        "{}",
        text(&output)
    );
    // No driver.
    world.settings("");
    let proc_root = world.path("m/proc");
    std::fs::rename(&proc_root, world.path("m/gone")).unwrap();
    slurmd(&world, "prolog", Some("mig=1g.6gb"));
    let output = task_prolog(&world, &[]);
    assert!(
        code(&output) != 0 && stdout(&output).starts_with("print migctl: job slurm:mini:15 was refused: "),
        "{}",
        text(&output)
    );
    std::fs::rename(world.path("m/gone"), &proc_root).unwrap();
    slurmd(&world, "epilog", None);
    assert_nothing_left(&world, "in the end");
}

#[test]
fn slices_do_not_depend_on_the_directory_for_containers() {
    let world = site(&[A30]);
    assert_eq!(code(&world.migctl(&["gc"])), 0);
    world.write("state/runtime", "in the way");
    let socket = UnixDatagram::bind(world.path("log.sock")).unwrap();
    slurmd(&world, "prolog", Some("mig=1g.6gb"));
    assert_eq!(code(&task_prolog(&world, &[])), 0);
    socket.set_nonblocking(true).unwrap();
    let mut bytes = [0; 4096];
    let said = |bytes: &mut [u8]| socket.recv(bytes).map(|n| String::from_utf8_lossy(&bytes[..n]).into_owned());
    let lines: Vec<String> = std::iter::from_fn(|| said(&mut bytes).ok()).collect();
    let expected = "job slurm:mini:15: its steps can't run in containers: cannot";
    assert!(lines.iter().any(|line| line.contains(expected)), "{lines:#?}");
    slurmd(&world, "epilog", None);
    assert_nothing_left(&world, "in the end");
}

#[test]
fn a_requeued_job_is_another_one_also_where_the_epilog_never_came() {
    if !installed("bash") {
        return skip("a_requeued_job_is_another_one_also_where_the_epilog_never_came", "no bash");
    }
    let world = site(&[A30]);
    slurmd(&world, "prolog", Some("mig=1g.6gb"));
    let first = world.lease();
    // Its step daemon is seen, and killed: no Epilog for minutes.
    let stepd = Process::called("slurmstepd: [15.batch]", 0);
    let seen = looked_after(&world, &first["token"]).unwrap();
    assert_eq!(seen["holder"]["init"]["pid"], stepd.pid());
    slurmd(&world, "prolog", Some("mig=1g.6gb"));
    assert_eq!(world.lease()["token"], first["token"], "the prolog of a job that is alive changes nothing");
    drop(stepd);
    slurmd(&world, "prolog", Some("mig=2g.12gb"));
    let second = world.lease();
    assert_ne!(second["token"], first["token"]);
    let output = task_prolog(&world, &[]);
    assert!(stdout(&output).contains(&format!("export MIG_UUID={}\n", uuid(&second))), "{}", text(&output));
    slurmd(&world, "epilog", None);
    assert_nothing_left(&world, "in the end");
}

#[test]
fn a_prolog_waits_as_long_as_the_settings_say() {
    let world = site(&[A30]);
    world.settings("[jobs]\nwait = \"1s\"");
    started(&world, "other", OTHER, &["4g.24gb"]);
    let log = slurmd(&world, "prolog", Some("mig=1g.6gb"));
    assert!(log.contains("waited 1s in line (place 1 of 1)"), "{log}");
    slurmd(&world, "epilog", None);
    assert_eq!(code(&end(&world, "other")), 0);
    assert_nothing_left(&world, "in the end");
}

#[test]
fn the_cgroup_of_a_job_of_slurms_is_found_confined_and_taken_away() {
    let test = "the_cgroup_of_a_job_of_slurms_is_found_confined_and_taken_away";
    // As slurmd has it: at the top on cgroup v1, in the scope of slurmstepd on v2.
    let node = format!("mig-test-{}", std::process::id());
    let (mount, path, of_job) = match Path::new(V1).is_dir() {
        true => (V1, format!("/slurm_{node}"), format!("uid_{USER}/job_15")),
        false => ("/sys/fs/cgroup", format!("/system.slice/{node}_slurmstepd.scope"), "job_15".to_owned()),
    };
    let slurm = PathBuf::from(format!("{mount}{path}"));
    if std::fs::create_dir_all(&slurm).is_err() {
        return skip(test, "no cgroup can be made here");
    }
    let world = site(&[A30, A30]);
    world.settings("[jobs]\nconfine = true");
    let called = |verb: &str, variables: &[(&str, &str)]| {
        let variables: Vec<(&str, &str)> = SLURM[..5].iter().copied().chain(variables.iter().copied()).collect();
        let output = call(&world, 0, &["slurm", verb], &variables);
        assert_eq!((code(&output), text(&output).lines().count()), (0, 1), "{}", text(&output));
    };
    let other = started(&world, "other", OTHER, &["--cgroup", &format!("{path}/other"), "--gpu", "1", "1g.6gb"]);
    let nodes = |answer: &Value| -> Vec<PathBuf> {
        let of = |node: &Value| world.path("m/dev").join(node["path"].as_str().unwrap());
        answer["nodes"].as_array().unwrap().iter().map(of).collect()
    };
    let here = [("SLURMD_NODENAME", node.as_str()), ("SLURM_JOB_COMMENT", "mig=1g.6gb")];
    called("prolog", &here);
    let dir = slurm.join(&of_job);
    let job = Cgroup::at(&dir);
    let record = public(&world, KEY).unwrap();
    let lease = world.leases().into_iter().find(|lease| lease["holder"]["job"] == KEY).unwrap();
    assert_eq!(lease["holder"]["cgroup"], format!("{path}/{of_job}"));
    if nodes(&record)[0].exists() {
        for node in nodes(&record) {
            assert_eq!(opens(&job, &node), "opens", "{}", node.display());
        }
        for node in nodes(&other).iter().filter(|node| !nodes(&record).contains(node)) {
            assert_eq!(opens(&job, node), "denied", "{}", node.display());
        }
    }
    called("epilog", &here);
    assert!(!dir.exists(), "Slurm forgets what it has not made");
    assert!(dir.parent() == Some(&slurm) || !dir.parent().unwrap().exists(), "and its user's");
    // One that asks for nothing opens none.
    called("prolog", &here[..1]);
    for node in nodes(&other)
        .iter()
        .filter(|node| node.ends_with("nvidia1") || node.starts_with(world.path("m/dev/nvidia-caps")))
    {
        assert_eq!(opens(&job, node), "denied", "{}", node.display());
    }
    called("epilog", &here);
    assert!(!dir.exists());
    assert_eq!(code(&end(&world, "other")), 0);
    std::fs::remove_dir(slurm.join("other")).unwrap();
    std::fs::remove_dir(&slurm).unwrap();
    let _ = std::fs::remove_dir(slurm.parent().unwrap()); // stays where it is somebody's
    // No cgroup of slurmd's: no slice either.
    let log = slurmd(&world, "prolog", Some("mig=1g.6gb"));
    assert!(log.contains("jobs.confine is set, but slurmd has no cgroup here"), "{log}");
    assert_ne!(code(&task_prolog(&world, &[])), 0);
    slurmd(&world, "prolog", None);
    assert_ne!(code(&task_prolog(&world, &[])), 0, "nor anything else");
    slurmd(&world, "epilog", None);
    assert_nothing_left(&world, "in the end");
}
