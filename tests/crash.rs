//! kill -9 at every call of the driver, and at every step in the state directory, on every way in and out: one
//! `migctl gc` later no instance is leaked, no lease lost, nothing held twice, and no foreign slice touched.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::ffi::OsString;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Output};

use common::{World, binaries, config, feed, os, run, skip, state, text, token_in};
use serde_json::{Value, json};

/// Every call that changes a GPU: what it has done may be durable when its caller dies.
const MUTATORS: [&str; 4] = [
    "nvmlDeviceCreateGpuInstance*",
    "nvmlGpuInstanceCreateComputeInstance*",
    "nvmlComputeInstanceDestroy",
    "nvmlGpuInstanceDestroy",
];

/// More calls than one run makes on one small GPU.
const MANY: usize = 300;

#[derive(Clone, Copy, PartialEq)]
enum Way {
    Podman,
    Shim,
}

/// One A30 with a foreign slice at its end, and a container that wants another.
struct Stage {
    world: World,
    way: Way,
    foreign: Vec<Value>,
}

impl Stage {
    fn new(way: Way) -> Stage {
        let world = World::new(&["a30-24gb"]);
        world.recording_runtime(0);
        world.sim("make", &["--gpu", "0", "--profile", "1g.6gb", "--start", "3"]);
        let foreign = world.instances();
        Stage { world, way, foreign }
    }

    fn wanted(&self) -> Value {
        config(json!({"mig.profile": "2g.12gb"}), &[])
    }

    /// The same, where what has ended stays idle.
    fn with_idle(way: Way) -> Stage {
        let stage = Stage::new(way);
        stage.world.settings("[slices]\nidle_ttl = \"1h\"");
        stage
    }

    /// Leaves an idle slice of that profile behind, and nothing else.
    fn leave_idle(&self, profile: &str) {
        self.clear_idle();
        let output = self.world.orphaned_precreate(&config(json!({"mig.profile": profile}), &[]));
        let token = token_in(&output.stdout);
        self.world.hook(&["poststop", "--lease", &token], &state("c0", 0, &self.world.path("bundle")));
        let leases = self.world.assert_consistent(&self.foreign, "idle");
        assert_eq!((leases.len(), &leases[0]["state"]), (1, &json!("idle")), "{leases:#?}");
    }

    /// migctl changes nothing while something idle is there.
    fn clear_idle(&self) {
        for verb in ["cordon", "uncordon"] {
            assert!(self.world.migctl(&[verb, "0"]).status.success());
        }
        self.assert_nothing_left("without what was idle");
    }

    fn fresh_bundle(&self) {
        self.world.bundle("bundle", &self.wanted());
    }

    /// Starts a container up to where the engine would take over. Whoever asked is dead afterwards.
    fn acquire(&self) -> Output {
        match self.way {
            Way::Podman => self.world.orphaned_precreate(&self.wanted()),
            Way::Shim => {
                let bundle = self.world.path("bundle").display().to_string();
                self.world.shim(&["create", "--bundle", &bundle, "c1"])
            }
        }
    }

    fn must_acquire(&self, when: &str) -> String {
        let output = self.acquire();
        assert!(output.status.success(), "acquire {when}: {}", text(&output));
        match self.way {
            Way::Podman => token_in(&output.stdout),
            Way::Shim => token_in(&std::fs::read(self.world.path("bundle/config.json")).unwrap()),
        }
    }

    fn release(&self, token: &str) -> Output {
        match self.way {
            Way::Podman => {
                self.world.hook(&["poststop", "--lease", token], &state("c1", 0, &self.world.path("bundle")))
            }
            Way::Shim => self.world.shim(&["delete", "c1"]),
        }
    }

    fn must_release(&self, token: &str, when: &str) {
        let output = self.release(token);
        assert!(output.status.success(), "release {when}: {}", text(&output));
        self.assert_nothing_left(when);
    }

    fn gc(&self, when: &str) {
        let output = self.world.migctl(&["gc"]);
        assert!(output.status.success(), "gc {when}: {}", text(&output));
    }

    fn assert_nothing_left(&self, when: &str) {
        assert_eq!(self.world.leases(), Vec::<Value>::new(), "leases left {when}");
        assert_eq!(self.world.instances(), self.foreign, "instances left, or a foreign one touched, {when}");
    }

    /// What any container may expect of a machine where nothing is left over.
    fn assert_serves_the_next(&self, when: &str) {
        let token = self.must_acquire(when);
        let leases = self.world.assert_consistent(&self.foreign, when);
        assert_eq!(
            (leases.len(), &leases[0]["state"], &leases[0]["token"]),
            (1, &json!("active"), &json!(token)),
            "{when}"
        );
        let output = self.release(&token);
        assert!(output.status.success(), "release {when}: {}", text(&output));
    }

    /// Kills `act` at its `nth` call of `call`. False when it ended before it came so far; then it must have succeeded.
    fn killed(&self, call: &str, nth: usize, how: &str, act: impl FnOnce() -> Output) -> bool {
        self.world.sim("clear-faults", &[]);
        self.world.fault(call, &["--nth", &nth.to_string(), "--kill", how]);
        let output = act();
        if !is_killed(&output) {
            assert!(output.status.success(), "{call} {nth} {how}: {}", text(&output));
            self.world.sim("clear-faults", &[]);
        }
        is_killed(&output)
    }

    /// `act` killed before every call that it makes, and after each that changes a GPU; `check` after each. `act` starts
    /// from what `prepare` gives.
    fn at_every_call<T>(
        &self,
        least: usize,
        prepare: impl Fn() -> T,
        act: impl Fn(&T) -> Output,
        check: impl Fn(&T, &str),
    ) {
        let mut calls = 0;
        for nth in 1..MANY {
            let prepared = prepare();
            if !self.killed("*", nth, "before", || act(&prepared)) {
                self.gc("after the run that was not killed"); // whoever asked is dead
                break;
            }
            check(&prepared, &format!("after a kill at call {nth}"));
            calls = nth;
        }
        assert!((least..MANY - 1).contains(&calls), "killed at {calls} calls only");
        let mut changes = 0;
        for call in MUTATORS {
            let prepared = prepare();
            if self.killed(call, 1, "after", || act(&prepared)) {
                check(&prepared, &format!("after a kill past {call}"));
                changes += 1;
            }
        }
        assert!(changes >= 2, "killed past {changes} changes only");
    }
}

fn is_killed(output: &Output) -> bool {
    output.status.signal() == Some(9) || output.status.code() == Some(128 + 9)
}

fn kill_acquire(way: Way) {
    let stage = Stage::new(way);
    stage.at_every_call(
        60,
        || stage.fresh_bundle(),
        |()| stage.acquire(),
        |(), when| {
            stage.gc(when);
            stage.assert_nothing_left(when);
            stage.assert_serves_the_next(when); // from the bundle as the killed run left it
        },
    );
}

fn kill_release(way: Way) {
    let stage = Stage::new(way);
    let prepare = || {
        stage.fresh_bundle();
        stage.must_acquire("before")
    };
    stage.at_every_call(
        30,
        prepare,
        |token| stage.release(token),
        |_, when| {
            stage.gc(when);
            stage.assert_nothing_left(when);
        },
    );
    stage.assert_serves_the_next("at the end");
}

#[test]
fn podmans_precreate_killed_at_every_call_leaves_nothing() {
    kill_acquire(Way::Podman);
}

#[test]
fn the_shims_create_killed_at_every_call_leaves_nothing() {
    kill_acquire(Way::Shim);
}

#[test]
fn poststop_killed_at_every_call_leaves_nothing() {
    kill_release(Way::Podman);
}

#[test]
fn the_shims_delete_killed_at_every_call_leaves_nothing() {
    kill_release(Way::Shim);
}

#[test]
fn an_acquire_that_evicts_killed_at_every_call_leaves_nothing() {
    let stage = Stage::with_idle(Way::Podman);
    stage.at_every_call(
        60,
        || stage.leave_idle("2g.12gb+me"),
        |()| stage.acquire(),
        |(), when| {
            stage.gc(when);
            let leases = stage.world.assert_consistent(&stage.foreign, when);
            assert!(leases.len() <= 1 && leases.iter().all(|lease| lease["state"] == "idle"), "{when}: {leases:#?}");
            stage.assert_serves_the_next(when);
        },
    );
}

#[test]
fn two_kills_in_a_row_leave_nothing() {
    // The second comes while the next acquire clears up after the first, or a little further on.
    let stage = Stage::new(Way::Podman);
    let prepare = || {
        stage.gc("before");
        assert!(stage.killed("nvmlGpuInstanceCreateComputeInstance*", 1, "before", || stage.acquire()));
    };
    let nothing_left = |(): &(), when: &str| {
        stage.gc(when);
        stage.assert_nothing_left(when);
    };
    stage.at_every_call(60, prepare, |()| stage.acquire(), nothing_left);
}

#[test]
fn gc_killed_at_every_call_is_finished_by_the_next() {
    let stage = Stage::new(Way::Podman);
    // Half a slice, and a whole one of which its lease does not know yet.
    let halves: [(&str, &str, usize); 2] =
        [("nvmlGpuInstanceCreateComputeInstance", "before", 1), ("nvmlGpuInstanceCreateComputeInstance", "after", 2)];
    for (call, how, changes) in halves {
        let prepare = || assert!(stage.killed(call, 1, how, || stage.acquire()));
        let mut killed_at = 0;
        for nth in 1..MANY {
            prepare();
            if !stage.killed("*", nth, "before", || stage.world.migctl(&["gc"])) {
                break;
            }
            let when = format!("after a kill of gc at call {nth}");
            stage.gc(&when);
            stage.assert_nothing_left(&when);
            killed_at = nth;
        }
        assert!((30..MANY - 1).contains(&killed_at), "killed at {killed_at} calls only");
        stage.assert_nothing_left("after the gc that was not killed");
        let past = MUTATORS.iter().filter(|call| {
            prepare();
            let killed = stage.killed(call, 1, "after", || stage.world.migctl(&["gc"]));
            stage.gc(call);
            stage.assert_nothing_left(call);
            killed
        });
        assert_eq!(past.count(), changes);
    }
    stage.assert_serves_the_next("at the end");
}

#[test]
fn a_lease_that_was_whole_when_the_hook_died_stays_while_its_owner_lives() {
    let stage = Stage::new(Way::Podman);
    // This process owns it: podman may still be about to fail the create, and has not answered yet.
    let act = || stage.world.hook(&["precreate"], stage.wanted().to_string().as_bytes());
    assert!(stage.killed("nvmlShutdown", 1, "before", act));
    stage.gc("while its owner lives");
    let leases = stage.world.assert_consistent(&stage.foreign, "while its owner lives");
    assert_eq!((leases.len(), &leases[0]["state"]), (1, &json!("active")));
    stage.must_release(leases[0]["token"].as_str().unwrap(), "after its poststop");
}

#[test]
fn several_slices_are_all_or_nothing_wherever_the_kill_comes() {
    let stage = Stage::new(Way::Podman);
    let wanted = config(json!({"mig.profile": "2x1g.6gb"}), &[]).to_string();
    for call in ["nvmlDeviceCreateGpuInstance*", "nvmlGpuInstanceCreateComputeInstance*"] {
        for (nth, how) in [(1, "before"), (1, "after"), (2, "before"), (2, "after")] {
            let when = format!("{how} {call} {nth}");
            assert!(stage.killed(call, nth, how, || stage.world.hook(&["precreate"], wanted.as_bytes())), "{when}");
            stage.gc(&when);
            stage.assert_nothing_left(&when);
        }
    }
}

// ---- what migctl cuts and destroys ----

impl Stage {
    fn migctl(&self, args: &[&str]) -> Output {
        self.world.migctl(args)
    }

    /// Everything on the GPU is foreign or kept by one record that says what it is, and nothing else is recorded.
    fn assert_kept(&self, when: &str) -> usize {
        let leases = self.world.leases();
        assert!(leases.iter().all(|lease| lease["state"] == "static"), "{when}: {leases:#?}");
        let instances = self.world.instances();
        assert_eq!(instances.len(), self.foreign.len() + leases.len(), "{when}: {instances:#?} {leases:#?}");
        for lease in &leases {
            let slices = lease["slices"].as_array().unwrap();
            let here = |gi: &&Value| gi["id"] == slices[0]["gi"] && gi["placement"] == slices[0]["placement"];
            let gi = instances.iter().find(here).unwrap_or_else(|| panic!("{when}: {lease}"));
            let uuids = |values: &[Value]| values.iter().map(|value| value["uuid"].clone()).collect::<Vec<Value>>();
            assert_eq!(uuids(gi["compute_instances"].as_array().unwrap()), uuids(slices), "{when}");
        }
        leases.len()
    }
}

#[test]
fn create_killed_at_every_call_leaves_all_of_it_or_nothing() {
    for (request, whole) in [("2x1g.6gb", 2), ("2x1c.2g.12gb", 1)] {
        let stage = Stage::new(Way::Podman);
        stage.at_every_call(
            60,
            || {
                for lease in stage.world.leases() {
                    let output = stage.migctl(&["destroy", &format!("0/{}", lease["slices"][0]["gi"])]);
                    assert!(output.status.success(), "{}", text(&output));
                }
                stage.assert_nothing_left("before");
            },
            |()| stage.migctl(&["create", request]),
            |(), when| {
                stage.gc(when);
                let kept = stage.assert_kept(when);
                assert!(kept == 0 || kept == whole, "{request} {when}: {kept} kept");
            },
        );
    }
}

#[test]
fn destroy_killed_at_every_call_leaves_it_whole_or_gone() {
    let stage = Stage::new(Way::Podman);
    stage.at_every_call(
        60,
        || {
            if stage.world.leases().is_empty() {
                let output = stage.migctl(&["create", "2x1c.2g.12gb"]);
                assert!(output.status.success(), "{}", text(&output));
            }
            format!("0/{}", stage.world.leases()[0]["slices"][0]["gi"])
        },
        |place| stage.migctl(&["destroy", place]),
        |_, when| {
            stage.gc(when);
            stage.assert_kept(when);
        },
    );
}

#[test]
fn destroy_of_a_foreign_one_killed_at_every_call_leaves_it_untouched_or_gone() {
    let mut stage = Stage::new(Way::Podman);
    stage.foreign = vec![];
    stage.world.sim("destroy", &["--gpu", "0", "--gi", &stage.world.instances()[0]["id"].to_string()]);
    stage.at_every_call(
        60,
        || {
            if stage.world.instances().is_empty() {
                stage.world.sim("make", &["--gpu", "0", "--profile", "1g.6gb"]);
            }
            format!("0/{}", stage.world.instances()[0]["id"])
        },
        |place| stage.migctl(&["destroy", place]),
        |_, when| {
            stage.gc(when);
            assert_eq!(stage.world.leases(), Vec::<Value>::new(), "{when}");
            let left = stage.world.instances();
            assert!(left.iter().all(|gi| gi["compute_instances"].as_array().unwrap().len() == 1), "{when}: {left:#?}");
        },
    );
}

#[test]
fn adopt_killed_at_every_call_leaves_a_record_or_none() {
    let stage = Stage::new(Way::Podman);
    let place = format!("0/{}", stage.foreign[0]["id"]);
    let mut calls = 0;
    for nth in 1..MANY {
        let output = stage.migctl(&["adopt", "--undo", "--all"]);
        assert!(output.status.success(), "{}", text(&output));
        if !stage.killed("*", nth, "before", || stage.migctl(&["adopt", &place])) {
            break;
        }
        let when = format!("after a kill at call {nth}");
        stage.gc(&when);
        assert_eq!(stage.world.instances(), stage.foreign, "{when}");
        assert!(stage.world.leases().iter().all(|lease| lease["state"] == "static"), "{when}");
        calls = nth;
    }
    assert!((30..MANY - 1).contains(&calls), "killed at {calls} calls only");
}

// ---- commands and jobs ----

const JOB: &str = "batch:1";

impl Stage {
    fn start_job(&self) -> Output {
        let sign = "no such process";
        self.migctl(&["job", "start", "--key", JOB, "--uid", "4711", "--gid", "4711", "--sign", sign, "2g.12gb"])
    }

    fn end_job(&self) -> Output {
        self.migctl(&["job", "end", "--key", JOB])
    }

    /// Neither a lease nor an instance, nor a file or a cgroup of any lease that there ever was.
    fn assert_no_trace(&self, when: &str) {
        self.assert_nothing_left(when);
        for dir in ["holders", "intents", "public"] {
            let entries = std::fs::read_dir(self.world.path("state").join(dir)).into_iter().flatten();
            // The temporary file of a killed writer is the next one's.
            let left: Vec<_> =
                entries.map(|e| e.unwrap().path()).filter(|path| !path.ends_with(".write.tmp")).collect();
            assert!(left.is_empty(), "{when}: {left:?}");
        }
        for token in self.world.audit().iter().filter_map(|line| line["token"].as_str()) {
            let cgroup = format!("mig-hook-{token}");
            let hierarchies =
                ["", "devices", "unified"].map(|name| Path::new("/sys/fs/cgroup").join(name).join(&cgroup));
            assert!(!hierarchies.iter().any(|dir| dir.exists()), "{when}: {cgroup}");
        }
    }

    /// What a batch system may expect of the node: that its job can be started again, and ended.
    fn assert_serves_the_job(&self, when: &str) {
        let output = self.start_job();
        assert!(output.status.success(), "start {when}: {}", text(&output));
        let leases = self.world.assert_consistent(&self.foreign, when);
        assert_eq!((leases.len(), &leases[0]["state"]), (1, &json!("active")), "{when}");
        let public = common::document(&self.world.path(&format!("state/public/{JOB}.json")));
        assert_eq!(public["token"], leases[0]["token"], "{when}");
        let output = self.end_job();
        assert!(output.status.success(), "end {when}: {}", text(&output));
        self.assert_no_trace(when);
    }
}

#[test]
fn run_killed_at_every_call_leaves_nothing() {
    let stage = Stage::new(Way::Podman);
    let nothing_left = |(): &(), when: &str| {
        stage.gc(when);
        stage.assert_no_trace(when);
    };
    stage.at_every_call(100, || (), |()| stage.migctl(&["run", "2g.12gb", "--", "true"]), nothing_left);
    stage.assert_no_trace("at the end");
}

#[test]
fn the_start_of_a_job_killed_at_every_call_is_made_good_by_the_next() {
    let stage = Stage::new(Way::Podman);
    let check = |(): &(), when: &str| {
        stage.gc(when);
        // Whole, for a job that may be about to begin, or gone.
        let leases = stage.world.assert_consistent(&stage.foreign, when);
        assert!(leases.iter().all(|lease| lease["state"] == "active") && leases.len() <= 1, "{when}: {leases:#?}");
        stage.assert_serves_the_job(when);
    };
    stage.at_every_call(60, || assert!(stage.end_job().status.success()), |()| stage.start_job(), check);
}

#[test]
fn the_end_of_a_job_killed_at_every_call_leaves_nothing() {
    let stage = Stage::new(Way::Podman);
    stage.at_every_call(
        30,
        || assert!(stage.start_job().status.success()),
        |()| stage.end_job(),
        |(), when| {
            stage.gc(when);
            stage.assert_no_trace(when);
        },
    );
    stage.assert_serves_the_job("at the end");
}

// ---- steps in the file system ----

/// strace's words for a kill at the `nth` of these system calls: everywhere, or on one path only.
fn strace(call: &str, path: Option<&Path>, nth: usize) -> Vec<OsString> {
    let mut words = os(&["-f", "-qqq", "-o", "/dev/null"]);
    if let Some(path) = path {
        words.extend(["-P".into(), path.into()]);
    }
    let kill = format!("inject={call}:signal=SIGKILL:when={nth}");
    words.extend(["-e".into(), format!("trace={call}").into(), "-e".into(), kill.into()]);
    words
}

fn has_strace(what: &str) -> bool {
    let works = Command::new("strace").args(["-f", "-qqq", "-o", "/dev/null", "/bin/true"]).output();
    let works = works.is_ok_and(|output| output.status.success());
    if !works {
        skip(what, "strace is not installed, or may not trace here");
    }
    works
}

/// `mig-hook` killed at every rename, removal and write, and when it opens the store's temporary file. `act` gets the words that
/// start it under strace.
fn at_every_file_step<T>(
    stage: &Stage,
    least: usize,
    prepare: impl Fn() -> T,
    act: impl Fn(&T, &mut Command) -> Output,
    check: impl Fn(&T, &str),
) {
    let temporary = stage.world.path("state/.write.tmp");
    let everywhere = ["rename", "unlink", "write"].map(|call| (call, None));
    let steps = [&everywhere[..], &[("openat", Some(temporary.as_path()))]].concat();
    at_every_step(stage, "mig-hook", &steps, least, prepare, act, check);
}

/// The same for another program of ours, at these system calls: each everywhere, or on one path only.
fn at_every_step<T>(
    stage: &Stage,
    program: &str,
    calls: &[(&str, Option<&Path>)],
    least: usize,
    prepare: impl Fn() -> T,
    act: impl Fn(&T, &mut Command) -> Output,
    check: impl Fn(&T, &str),
) {
    let mut steps = 0;
    for (call, path) in calls {
        for nth in 1..MANY {
            let prepared = prepare();
            let mut command = Command::new("strace");
            command.args(strace(call, *path, nth)).arg(binaries().join(program)).arg("--config");
            let output = act(&prepared, command.arg(stage.world.config()));
            let when = format!("after a kill at {call} {nth}");
            assert!(is_killed(&output) || output.status.success(), "{when}: {}", text(&output));
            check(&prepared, &when);
            if !is_killed(&output) {
                break;
            }
            steps += 1;
        }
    }
    assert!((least..MANY).contains(&steps), "killed at {steps} steps only");
}

#[test]
fn precreate_killed_at_every_step_in_the_file_system_leaves_nothing() {
    if !has_strace("kills in the file system at precreate") {
        return;
    }
    let stage = Stage::new(Way::Podman);
    let stdin = stage.wanted().to_string().into_bytes();
    at_every_file_step(
        &stage,
        15,
        || (),
        |(), command| feed(command.arg("precreate"), &stdin), // strace is the owner, and dead
        |(), when| {
            stage.gc(when);
            stage.assert_nothing_left(when);
        },
    );
    stage.assert_serves_the_next("at the end");
}

#[test]
fn idle_slices_are_given_and_left_whole_wherever_the_kill_comes() {
    if !has_strace("kills in the file system with idle slices") {
        return;
    }
    let stage = Stage::with_idle(Way::Podman);
    let (wanted, ended) = (stage.wanted().to_string().into_bytes(), state("c1", 0, &stage.world.path("bundle")));
    let check = |when: &str| {
        stage.gc(when);
        let leases = stage.world.assert_consistent(&stage.foreign, when);
        assert!(leases.len() <= 1 && leases.iter().all(|lease| lease["state"] == "idle"), "{when}: {leases:#?}");
        stage.assert_serves_the_next(when);
    };
    at_every_file_step(
        &stage,
        10,
        || stage.leave_idle("2g.12gb"),
        |(), command| feed(command.arg("precreate"), &wanted),
        |(), when| check(when),
    );
    at_every_file_step(
        &stage,
        8,
        || {
            stage.clear_idle();
            stage.must_acquire("before")
        },
        |token, command| feed(command.args(["poststop", "--lease", token]), &ended),
        |_, when| check(when),
    );
}

/// What migctl does for commands and jobs.
const CHANGES: [(&str, Option<&Path>); 7] = [
    ("rename", None),
    ("unlink", None),
    ("mkdir", None),
    ("mkdirat", None),
    ("rmdir", None),
    ("lchown", None),
    ("fchmod", None),
];

#[test]
fn run_killed_at_every_step_in_the_file_system_leaves_nothing() {
    if !has_strace("kills in the file system at run") {
        return;
    }
    let stage = Stage::new(Way::Podman);
    at_every_step(
        &stage,
        "migctl",
        &CHANGES,
        20,
        || (),
        |(), command| run(command.args(["run", "2g.12gb", "--", "/bin/true"])),
        |(), when| {
            stage.gc(when);
            stage.assert_no_trace(when);
        },
    );
}

#[test]
fn a_job_killed_at_every_step_in_the_file_system_is_made_good_by_the_next_start_and_end() {
    if !has_strace("kills in the file system at job start and job end") {
        return;
    }
    let stage = Stage::new(Way::Podman);
    let job = ["--key", JOB, "--uid", "4711", "--gid", "4711", "--sign", "no such process", "2g.12gb"];
    at_every_step(
        &stage,
        "migctl",
        &CHANGES,
        15,
        || assert!(stage.end_job().status.success()),
        |(), command| run(command.args(["job", "start"]).args(job)),
        |(), when| {
            stage.gc(when);
            stage.assert_serves_the_job(when);
        },
    );
    at_every_step(
        &stage,
        "migctl",
        &CHANGES,
        8,
        || assert!(stage.start_job().status.success()),
        |(), command| run(command.args(["job", "end", "--key", JOB])),
        |(), when| {
            stage.gc(when);
            // Killed before it said anything, it never came.
            let again = stage.end_job();
            assert!(again.status.success(), "end {when}: {}", text(&again));
            stage.assert_no_trace(when);
        },
    );
}

/// poststop killed at every step; `check` after one `migctl gc`.
fn kill_poststop_in_the_file_system(what: &str, check: impl Fn(&Stage, &str)) {
    if !has_strace(what) {
        return;
    }
    let stage = Stage::new(Way::Podman);
    let stdin = state("c1", 0, &stage.world.path("bundle"));
    at_every_file_step(
        &stage,
        15,
        || stage.must_acquire("before"),
        |token, command| feed(command.args(["poststop", "--lease", token]), &stdin),
        |_, when| {
            stage.gc(when);
            check(&stage, when);
        },
    );
}

#[test]
fn poststop_killed_at_every_step_in_the_file_system_leaves_nothing() {
    kill_poststop_in_the_file_system("kills in the file system at poststop", Stage::assert_nothing_left);
}

#[test]
fn no_file_of_a_lease_is_left_wherever_the_kill_comes() {
    kill_poststop_in_the_file_system("files left by a kill", |stage, when| {
        let dirs = ["leases", "index", "intents"].map(|dir| stage.world.path("state").join(dir));
        let left: Vec<_> =
            dirs.iter().flat_map(|dir| std::fs::read_dir(dir).unwrap()).map(|e| e.unwrap().path()).collect();
        assert!(left.is_empty(), "{when}: {left:?}");
    });
}

#[test]
fn create_runtime_killed_at_every_step_in_the_file_system_keeps_the_lease_whole() {
    if !has_strace("kills in the file system at createRuntime") {
        return;
    }
    let stage = Stage::new(Way::Podman);
    stage.fresh_bundle();
    let mut init = Command::new("sleep").arg("300").spawn().unwrap();
    let stdin = state("c1", init.id(), &stage.world.path("bundle"));
    at_every_file_step(
        &stage,
        6,
        || {
            // This process owns it, so that gc keeps it whether it was bound or not.
            let output = stage.world.hook(&["precreate"], stage.wanted().to_string().as_bytes());
            assert!(output.status.success(), "{}", text(&output));
            token_in(&output.stdout)
        },
        |token, command| feed(command.args(["createRuntime", "--lease", token]), &stdin),
        |token, when| {
            stage.gc(when);
            let leases = stage.world.assert_consistent(&stage.foreign, when);
            assert_eq!((leases.len(), &leases[0]["state"]), (1, &json!("active")), "{when}");
            stage.must_release(token, when);
        },
    );
    init.kill().unwrap();
    init.wait().unwrap();
}

#[test]
fn the_bundle_of_a_killed_create_has_the_old_config_or_the_new() {
    if !has_strace("kills in the bundle") {
        return;
    }
    let stage = Stage::new(Way::Shim);
    let bundle = stage.world.path("bundle");
    let (mut kept, mut replaced) = (0, 0);
    for call in ["openat", "write", "rename", "fchown", "fchmod"] {
        for nth in 1..MANY {
            stage.fresh_bundle();
            let mut command = Command::new("strace");
            // Every second openat is the driver's; those on the config and on what replaces it are what counts here.
            let path = (call == "openat").then(|| bundle.join("config.json"));
            command.args(strace(call, path.as_deref(), nth)).arg(binaries().join("mig-runtime"));
            command.arg("--mig-config").arg(stage.world.config()).args(["create", "--bundle"]);
            let output = run(command.arg(&bundle).arg("c1"));
            let now: Value = serde_json::from_slice(&std::fs::read(bundle.join("config.json")).unwrap()).unwrap();
            match now == stage.wanted() {
                true => kept += 1,
                false => {
                    assert!(now["annotations"]["mig.lease"].is_string(), "half a config: {now}");
                    replaced += 1;
                }
            }
            stage.gc("after a kill in the bundle");
            stage.assert_nothing_left("after a kill in the bundle");
            if !is_killed(&output) {
                assert!(output.status.success(), "{}", text(&output));
                break;
            }
        }
    }
    assert!(kept > 5 && replaced > 5, "{kept} kept, {replaced} replaced");
}
