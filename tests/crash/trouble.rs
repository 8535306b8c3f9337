//! State that can't be written, or is not as it was written: what fails says so, nothing is handed out that is not recorded,
//! and what comes after the trouble finds nothing lost.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use mig_hook::host;
use serde_json::{Value, json};

use crate::common::{Init, World, config, os, skip, state, text, token_in};
use crate::matrix::{Operation, Row};
use crate::points::{Change, Point, changes, injector};
use crate::stage::{Stage, WANTED, Way};
use crate::tries::{chosen, every, note};

const IO: Option<i32> = Some(74);
const A30: &str = "a30-24gb";

/// It may fail, but by itself and with a sentence; and what it gives is recorded.
fn check_outcome(stage: &Stage, output: &Output, when: &str) {
    let said = text(output);
    assert!(output.status.code().is_some_and(|code| code != 101), "{when}: {said}");
    assert!(!said.contains("panicked"), "{when}: {said}");
    // gc tells what became of each lease where it lists them.
    let told = ["mig-hook: ", "mig-runtime: ", "migctl: ", "\nfailed "].iter().any(|word| said.contains(word));
    assert!(output.status.success() || told, "{when} without a word: {said}");
    stage.check_moment(when);
    let given = output.status.success() && stage.way == Way::Podman && !output.stdout.is_empty();
    if let Ok(config) = serde_json::from_slice::<Value>(&output.stdout)
        && given
        && let Some(token) = config["annotations"]["mig.lease"].as_str()
    {
        let lease = stage.others().into_iter().find(|lease| lease["token"] == token);
        assert_eq!(lease.unwrap_or_default()["state"], "active", "{when}: given and not recorded");
    }
}

/// Every change that this makes in the state directory fails with `error`, one at a time.
fn fail_everywhere(operation: Operation, way: Way, error: &str) {
    let Some(row) = Row::new(operation, way) else { return };
    let stage = &row.stage;
    let (holder, act) = row.prepare();
    let output = stage.record(&act);
    assert!(output.status.success(), "{}", text(&output));
    row.end(holder, "after the run that was recorded");
    let state = stage.world.path("state").display().to_string();
    let mut all = changes(&stage.world, &stage.record_file());
    all.retain(|change| change.line.contains(&state));
    assert!(all.len() >= 10, "{} changes in the state", all.len());
    let name = format!("{error} at {}", row.name());
    let tried = chosen(&all, &name, 0);
    for Change { point, line } in &tried {
        let Point::System(call, nth) = point else { continue };
        let when = format!("{error} at {} {point} ({line})", row.name());
        let (mut holder, act) = row.prepare();
        let output = stage.under(&injector(call, *nth, &format!("error={error}")), &act);
        check_outcome(stage, &output, &when);
        let tokens = stage.tokens();
        holder.die();
        stage.wait_for_processes();
        stage.gc(&when);
        let idle = stage.check_settled(&when);
        assert!(idle.iter().all(|lease| lease["state"] == "idle"), "{when}: {idle:#?}");
        if way == Way::Job {
            // What it was refused for is public until then.
            stage.must_release(holder, &when);
        } else {
            row.end(holder, &when);
        }
        stage.check_no_trace(&tokens, &when);
    }
    assert!(!tried.is_empty());
    note(&format!("faults\t{name}\t{}\t{}", all.len(), tried.len()));
}

macro_rules! faults {
    ($($name:ident: $operation:ident, $way:ident;)*) => {
        $(#[test]
        fn $name() {
            for error in ["ENOSPC", "EIO"] {
                fail_everywhere(Operation::$operation, Way::$way, error);
            }
        })*
    };
}

faults! {
    acquire_by_podman_that_cannot_write: Acquire, Podman;
    acquire_by_the_shim_that_cannot_write: Acquire, Shim;
    acquire_by_a_job_that_cannot_write: Acquire, Job;
    a_command_that_cannot_write: Acquire, Run;
    eviction_by_podman_that_cannot_write: Evict, Podman;
    leaving_idle_by_podman_that_cannot_write: Leave, Podman;
    release_by_podman_that_cannot_write: Release, Podman;
    release_by_the_shim_that_cannot_write: Release, Shim;
    release_by_a_job_that_cannot_write: Release, Job;
    gc_that_cannot_write: Reconcile, Podman;
    gc_of_a_jobs_that_cannot_write: Reconcile, Job;
    gc_of_half_a_slice_that_cannot_write: FinishHalf, Podman;
}

/// A bind that can't be recorded fails the create; what it was to bind is as it was.
#[test]
fn confirm_that_cannot_write() {
    for error in ["ENOSPC", "EIO"] {
        let Some(row) = Row::new(Operation::Confirm, Way::Podman) else { return };
        let stage = &row.stage;
        let (holder, act) = row.prepare();
        assert!(stage.record(&act).status.success());
        row.end(holder, "recorded");
        let state = stage.world.path("state").display().to_string();
        let mut all = changes(&stage.world, &stage.record_file());
        all.retain(|change| change.line.contains(&state));
        let name = format!("{error} at {}", row.name());
        let tried = chosen(&all, &name, 0);
        for Change { point, line } in &tried {
            let Point::System(call, nth) = point else { continue };
            let when = format!("{error} at {point} ({line})");
            let (holder, act) = row.prepare();
            let output = stage.under(&injector(call, *nth, &format!("error={error}")), &act);
            check_outcome(stage, &output, &when);
            let lease = stage.others().remove(0);
            assert_eq!(lease["state"], "active", "{when}");
            let bound = lease["holder"]["container"] == "c1";
            assert!(bound || !output.status.success(), "{when}: told that it is bound, and not recorded");
            stage.gc(&when);
            assert_eq!(stage.check_settled(&when).len(), 1, "{when}");
            row.end(holder, &when);
            stage.check_no_trace(&[], &when);
        }
        note(&format!("faults\t{name}\t{}\t{}", all.len(), tried.len()));
    }
}

/// No file becomes longer than this, and a write stops there in the middle: with a signal that kills, or an error.
#[test]
fn files_that_end_in_the_middle_of_a_write() {
    let Some(row) = Row::new(Operation::Acquire, Way::Podman) else { return };
    let Some(ending) = Row::new(Operation::Release, Way::Podman) else { return };
    let (mut killed, mut failed) = (0, 0);
    for (row, limit) in
        [&row, &ending].into_iter().flat_map(|row| [0, 1, 36, 300, 600, 640, 700].map(|limit| (row, limit)))
    {
        for ignored in [false, true] {
            let stage = &row.stage;
            let when = format!("{} with files of {limit} bytes, ignored: {ignored}", row.name());
            let (mut holder, act) = row.prepare();
            let trap = if ignored { "trap '' XFSZ; \"$@\"; exit $?" } else { "\"$@\"; exit $?" };
            let size = format!("--fsize={limit}");
            let output = stage.under(&os(&["/bin/sh", "-c", trap, "sh", "prlimit", &size]), &act);
            let by_signal = output.status.code() == Some(128 + 25);
            if by_signal {
                assert!(!ignored, "{when}: {}", text(&output));
                killed += 1;
                stage.check_moment(&when);
            } else {
                check_outcome(stage, &output, &when);
                failed += usize::from(!output.status.success());
            }
            let tokens = stage.tokens();
            holder.die();
            stage.gc(&when);
            stage.check_no_trace(&tokens, &when);
        }
    }
    assert!(killed >= 5 && failed >= 3, "{killed} killed, {failed} failed");
    note(&format!("faults\tshort writes\t28\t{}", killed + failed));
}

// ---- a state directory that takes nothing ----

/// Runs this test again where it may mount what nobody else sees. False when it is that run; `None` where there is no such.
fn elsewhere(test: &str) -> Option<bool> {
    if std::env::var_os("MIG_TEST_MOUNTS").is_some() {
        return Some(false);
    }
    let unshare = |words: &[&str]| {
        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation", "private"]).args(words);
        command
    };
    if !unshare(&["mount", "-t", "tmpfs", "none", "/mnt"]).output().is_ok_and(|output| output.status.success()) {
        skip(test, "nothing can be mounted here");
        return None;
    }
    let mut again = unshare(&[]);
    again.arg(std::env::current_exe().unwrap()).args(["--test-threads", "2", "--exact", &format!("trouble::{test}")]);
    let output = again.env("MIG_TEST_MOUNTS", "1").output().unwrap();
    let said = text(&output);
    assert!(output.status.success() && said.contains("1 passed"), "    {}", said.replace('\n', "\n    "));
    Some(true)
}

fn mount(args: &[&str]) {
    let output = Command::new("mount").args(args).output().unwrap();
    assert!(output.status.success(), "mount {args:?}: {}", text(&output));
}

/// Two containers of one GPU, the state on a file system of its own. What happens while it takes nothing, and afterwards.
fn takes_nothing(stop: impl Fn(&Path), go_on: impl Fn(&Path), says: &str) {
    let world = World::new(&[A30]);
    let state = world.path("state");
    std::fs::create_dir(&state).unwrap();
    mount(&["-t", "tmpfs", "-o", "size=256k,mode=700", "none", state.to_str().unwrap()]);
    let ask = |profile: &str| config(json!({"mig.profile": profile}), &[]);
    let granted = |profile| {
        let output = world.hook(&["precreate"], ask(profile).to_string().as_bytes());
        assert!(output.status.success(), "{}", text(&output));
        token_in(&output.stdout)
    };
    let (ended, kept) = (granted(WANTED), granted("1g.6gb"));
    let (machine, leases) = (world.instances(), world.leases());
    stop(&state);

    for (what, output) in [
        ("precreate", world.hook(&["precreate"], ask("1g.6gb").to_string().as_bytes())),
        ("createRuntime", world.hook(&["createRuntime", "--lease", &kept], &state_of(&world, std::process::id()))),
        ("create", world.migctl(&["create", "1g.6gb"])),
        ("cordon", world.migctl(&["cordon", "0"])),
        ("job start", world.migctl(&["job", "start", "--key", "a:1", "--uid", "1", "--gid", "1", "1g.6gb"])),
    ] {
        assert!(output.status.code() == IO && text(&output).contains(says), "{what}: {}", text(&output));
        assert!(output.stdout.is_empty(), "{what}: {}", text(&output));
    }
    // Who looks sees what is there.
    for verb in ["list", "leases", "map", "queue", "metrics"] {
        let output = world.migctl(&[verb]);
        assert!(output.status.success(), "{verb}: {}", text(&output));
    }
    assert_eq!((world.instances(), world.leases()), (machine, leases), "nothing was changed");

    let output = world.hook(&["poststop", "--lease", &ended], &state_of(&world, 0));
    assert!(output.status.success(), "poststop never fails: {}", text(&output));
    go_on(&state);
    // What could be announced goes without another word; what could not, when it is told again.
    if !state.join("intents").join(format!("{ended}.released")).exists() {
        assert!(text(&output).contains(says), "{}", text(&output));
        world.hook(&["poststop", "--lease", &ended], &state_of(&world, 0));
    }
    let next = granted(WANTED); // an acquire is enough
    let leases = world.assert_consistent(&[], "afterwards");
    let mut tokens: Vec<&str> = leases.iter().map(|lease| lease["token"].as_str().unwrap()).collect();
    tokens.sort_unstable();
    let mut expected = [next.as_str(), kept.as_str()];
    expected.sort_unstable();
    assert_eq!(tokens, expected);
    for token in [next, kept] {
        world.hook(&["poststop", "--lease", &token], &state_of(&world, 0));
    }
    world.assert_clean("at the end");
}

fn state_of(world: &World, pid: u32) -> Vec<u8> {
    state("c1", pid, &world.path("bundle"))
}

#[test]
fn a_state_directory_that_is_full() {
    if elsewhere("a_state_directory_that_is_full") != Some(false) {
        return;
    }
    let fill = |state: &Path| {
        let mut file = std::fs::File::create(state.join("public.fill")).unwrap();
        while std::io::Write::write_all(&mut file, &[0; 512]).is_ok() {}
        // One page that a temporary file may have kept.
        let _ = std::fs::remove_file(state.join(".write.tmp"));
        while std::io::Write::write_all(&mut file, &[0; 512]).is_ok() {}
    };
    takes_nothing(fill, |state| std::fs::remove_file(state.join("public.fill")).unwrap(), "No space left");
}

#[test]
fn a_state_directory_that_is_read_only() {
    if elsewhere("a_state_directory_that_is_read_only") != Some(false) {
        return;
    }
    let again = |how: &'static str| move |state: &Path| mount(&["-o", how, state.to_str().unwrap()]);
    takes_nothing(again("remount,ro"), again("remount,rw"), "Read-only file system");
}

// ---- clocks and pids ----

fn granted(world: &World, profile: &str) -> String {
    let output = world.hook(&["precreate"], config(json!({"mig.profile": profile}), &[]).to_string().as_bytes());
    assert!(output.status.success(), "{}", text(&output));
    token_in(&output.stdout)
}

fn bound(world: &World, profile: &str, id: &str) -> (String, Init) {
    let (token, init) = (granted(world, profile), Init::start());
    let bundle = world.bundle(id, &config(json!({"mig.profile": profile}), &[]));
    let output = world.hook(&["createRuntime", "--lease", &token], &state(id, init.pid(), &bundle));
    assert!(output.status.success(), "{}", text(&output));
    (token, init)
}

/// What became of each lease, by token.
fn gc(world: &World) -> BTreeMap<String, String> {
    let word = |action: &Value, key: &str| action[key].as_str().unwrap().to_owned();
    let document = world.document(&["gc"]);
    let actions = document["actions"].as_array().unwrap();
    actions.iter().map(|action| (word(action, "token"), word(action, "result"))).collect()
}

/// Wall-clock times are for people. Whatever they say, what lives is kept and what is dead goes.
#[test]
fn a_wall_clock_that_jumps_decides_nothing() {
    let year_ms = 365 * 24 * 3600 * 1000;
    let now = host::wall_ms();
    for wall in [0, now.saturating_sub(10 * year_ms), now + 10 * year_ms, u64::MAX] {
        let world = World::new(&[A30]);
        let (alive, init) = bound(&world, "1g.6gb", "c1");
        let waiting = granted(&world, "1g.6gb");
        let (dead, gone) = bound(&world, "1g.6gb", "c3");
        for token in [&alive, &waiting, &dead] {
            world.edit_lease(token, |lease| lease["created_ms"] = json!(wall));
        }
        drop(gone);
        let done = gc(&world);
        let became = [&alive, &waiting, &dead].map(|token| done[token].as_str());
        assert_eq!(became, ["kept", "kept", "freed"], "{wall}");
        // The end of one that is busy was noticed then: how long others wait for it is bounded all the same.
        let gi = world.leases().iter().find(|lease| lease["token"] == *alive).unwrap()["slices"][0]["gi"].to_string();
        world.sim("hold", &["--gpu", "0", "--gi", &gi]);
        drop(init);
        world.hook(&["poststop", "--lease", &alive], &state("c1", 0, &world.path("c1")));
        world.edit_lease(&alive, |lease| lease["ended_ms"] = json!(wall));
        let refused = world.hook(&["precreate"], config(json!({"mig.profile": "4g.24gb"}), &[]).to_string().as_bytes());
        assert_eq!(refused.status.code(), Some(75), "{}", text(&refused));
        world.sim("unhold", &["--gpu", "0", "--gi", &gi]);
        assert_eq!(gc(&world)[&alive], "freed", "{wall}");
    }
}

/// On a clock that was far ahead when a lease was made, as after a restore from a checkpoint, it is as new, and not for ever:
/// it goes with whoever asked.
#[test]
fn a_boot_clock_that_was_ahead_keeps_nothing_of_the_dead() {
    let world = World::new(&[A30]);
    let mine = granted(&world, "1g.6gb");
    let output = world.orphaned_precreate(&config(json!({"mig.profile": "1g.6gb"}), &[]));
    let orphan = token_in(&output.stdout);
    for token in [&mine, &orphan] {
        world.edit_lease(token, |lease| {
            for key in ["created_boot_ms", "granted_boot_ms"] {
                lease[key] = json!(u64::MAX);
            }
        });
    }
    let done = gc(&world);
    assert_eq!((done[&mine].as_str(), done[&orphan].as_str()), ("kept", "freed"));
    world.hook(&["poststop", "--lease", &mine], &state("c1", 0, &world.path("bundle")));
    world.assert_clean("afterwards");
}

/// The whole machine in a time namespace whose boot clock is years ahead: pids, start times and bounds agree there.
#[test]
fn a_boot_clock_years_ahead_changes_nothing() {
    const TEST: &str = "a_boot_clock_years_ahead_changes_nothing";
    if std::env::var_os("MIG_TEST_AHEAD").is_some() {
        assert!(host::boot_ms() > 300_000_000_000, "{}", host::boot_ms());
        let world = World::new(&[A30]);
        let (alive, init) = bound(&world, "1g.6gb", "c1");
        let waiting = granted(&world, "1g.6gb");
        let done = gc(&world);
        assert_eq!((done[&alive].as_str(), done[&waiting].as_str()), ("kept", "kept"));
        world.edit_lease(&waiting, |lease| {
            lease["created_boot_ms"] = json!(lease["created_boot_ms"].as_u64().unwrap() - 121_000);
        });
        drop(init);
        let done = gc(&world);
        assert_eq!((done[&alive].as_str(), done[&waiting].as_str()), ("freed", "freed"));
        return world.assert_clean("afterwards");
    }
    let ahead = ["--fork", "--time", "--boottime", "315360000", "--monotonic", "315360000"];
    let unshare = || {
        let mut command = Command::new("unshare");
        command.args(ahead);
        command
    };
    if !unshare().arg("true").output().is_ok_and(|output| output.status.success()) {
        return skip(TEST, "no time namespace can be made here");
    }
    let mut again = unshare();
    again.arg(std::env::current_exe().unwrap()).args(["--test-threads", "2", "--exact", &format!("trouble::{TEST}")]);
    let output = again.env("MIG_TEST_AHEAD", "1").output().unwrap();
    assert!(output.status.success() && text(&output).contains("1 passed"), "{}", text(&output));
}

/// tests/recovery.rs has it for a container that podman started; here are the others.
#[test]
fn a_reused_pid_is_nobody_in_any_way_in() {
    for way in [Way::Shim, Way::Classic, Way::Cdi, Way::Run, Way::Job] {
        let Some(stage) = Stage::new(way, true) else { continue };
        stage.fresh_bundle();
        let mut holder = stage.granted("before");
        let token = holder.token.clone().unwrap();
        stage.gc("while it lives");
        assert_eq!(stage.others()[0]["state"], "active", "{way:?}");
        stage.world.edit_lease(&token, |lease| {
            let holder = &mut lease["holder"];
            for who in ["init", "owner"] {
                if let Some(start) = holder[who]["start"].as_u64() {
                    holder[who]["start"] = json!(start - 1);
                }
            }
            // The cgroup would tell that somebody is there, whoever that is.
            if way != Way::Run {
                holder["cgroup"] = Value::Null;
            }
        });
        if way == Way::Run {
            // Its wrapper is nobody; its tree is there, and keeps what it has.
            stage.gc("with a wrapper that is nobody");
            assert_eq!(stage.others()[0]["state"], "active");
            holder.die();
            stage.wait_for_processes();
        }
        if way == Way::Shim {
            stage.world.edit_lease(&token, |lease| drop(lease["holder"].as_object_mut().unwrap().remove("pid_file")));
        }
        stage.gc("when its pid is another's");
        stage.check_no_trace(&[token], &format!("{way:?}"));
    }
}

// ---- files that are not as they were written ----

/// What may be left of a file, or be there in its place.
fn spoilt(good: &[u8]) -> Vec<Vec<u8>> {
    let cut = |part: usize| good[..good.len() * part / 8].to_vec();
    let garbage = b"\0\xff{{{\n".to_vec();
    [vec![], cut(1), cut(4), cut(7), good[..good.len().saturating_sub(2)].to_vec(), garbage, vec![b'['; 100_000]].into()
}

fn files(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().map(|entry| entry.unwrap().path());
    entries.filter(|path| path.is_file()).map(|path| (path.clone(), std::fs::read(path).unwrap())).collect()
}

/// Verbs that change something, or decide by what is recorded.
const VERBS: [&[&str]; 21] = [
    &["gc"],
    &["gc", "--dry-run"],
    &["list"],
    &["leases"],
    &["map"],
    &["plan", "1g.6gb"],
    &["metrics"],
    &["cdi"],
    &["create", "1g.6gb"],
    &["adopt", "--all"],
    &["destroy", "PLACE"],
    &["reserve", "--uid", "0", "1g.6gb"],
    &["drain", "0"],
    &["cordon", "0"],
    &["mode", "off", "0"],
    &["run", "1g.6gb", "--", "/bin/true"],
    &["job", "start", "--key", "a:1", "--uid", "0", "--gid", "0", "1g.6gb"],
    &["job", "end", "--key", "a:1"],
    &["export"],
    &["apply", "LAYOUT"],
    &["profiles"],
];

/// A record that can't be read, of a later version or damaged: whoever would decide by it stops with the sentence and
/// changes nothing. What is another's alone ends as ever.
#[test]
fn a_lease_that_can_not_be_read_stops_every_verb() {
    let world = World::new(&[A30]);
    let token = granted(&world, "1g.6gb");
    let path = world.lease_file(&token);
    let good = std::fs::read(&path).unwrap();
    let later = String::from_utf8(good.clone()).unwrap().replace("\"version\":1", "\"version\":2").into_bytes();
    let more = String::from_utf8(good.clone()).unwrap().replacen('{', "{\"of_later\":1,", 1).into_bytes();
    world.write("layout.yaml", "version: v1\nmig-configs:\n  all:\n    - devices: all\n      mig-enabled: true\n      mig-devices: {\"1g.6gb\": 2}\n");
    let layout = world.path("layout.yaml").display().to_string();
    let place = format!("0/{}", world.instances()[0]["id"]);
    let mut stopped = 0;
    for (at, bad) in [vec![later, more], spoilt(&good)].concat().into_iter().enumerate() {
        std::fs::write(&path, &bad).unwrap();
        let (instances, before) = (world.instances(), files(&world.path("state/leases")));
        // Each verb with the first, some with the others.
        let verbs = VERBS.iter().filter(|verb| at == 0 || ["gc", "list", "run", "create"].contains(&verb[0]));
        for verb in verbs {
            let word = |word: &&'static str| match *word {
                "LAYOUT" => layout.clone(),
                "PLACE" => place.clone(),
                word => word.to_owned(),
            };
            let args: Vec<String> = verb.iter().map(word).collect();
            let args: Vec<&str> = args.iter().map(String::as_str).collect();
            let output = world.migctl(&args);
            let said = text(&output);
            // They tell of the GPUs alone.
            if ["profiles", "export"].contains(&verb[0]) && output.status.success() {
                continue;
            }
            assert!(output.status.code() == IO, "{at} {verb:?}: {said}");
            assert!(said.contains(&token) && said.contains("nothing was touched"), "{at} {verb:?}: {said}");
            stopped += 1;
        }
        let refused = world.hook(&["precreate"], config(json!({"mig.profile": "1g.6gb"}), &[]).to_string().as_bytes());
        assert!(refused.status.code() == IO && refused.stdout.is_empty(), "{at}: {}", text(&refused));
        let bind = world.hook(&["createRuntime", "--lease", &token], &state_of(&world, std::process::id()));
        assert!(bind.status.code() == IO, "{at}: {}", text(&bind));
        let end = world.hook(&["poststop", "--lease", &token], &state_of(&world, 0));
        assert!(end.status.success() && text(&end).contains(&token), "{at}: {}", text(&end));
        assert_eq!((world.instances(), files(&world.path("state/leases"))), (instances, before), "{at}");
    }
    // Nor is another's end stopped by it.
    std::fs::write(&path, &good).unwrap();
    let other = granted(&world, WANTED);
    std::fs::write(&path, b"").unwrap();
    let output = world.hook(&["poststop", "--lease", &other], &state_of(&world, 0));
    assert!(output.status.success() && !world.lease_file(&other).exists(), "{}", text(&output));
    assert_eq!(world.instances().len(), 1);
    std::fs::write(&path, good).unwrap();
    world.hook(&["poststop", "--lease", &token], &state_of(&world, 0));
    world.assert_clean("when it can be read again");
    note(&format!("faults\trecords that can't be read\t{stopped}\t{stopped}"));
}

/// Every other file of the state, and the spec for engines. Who can't do without one says so; nothing is lost or given twice,
/// and what lives is kept.
#[test]
fn other_files_that_are_not_as_they_were_written() {
    const SPEC: &str = "cdi/mig-hook.json";
    const NAMES: &str =
        "index intents claims claims.tmp holders public cordons last scanned ticket bell .write.tmp spec";
    let world = World::new(&[A30]);
    world.settings(&format!("[runtime]\npath = \"/bin/true\"\n[cdi]\nspec = \"{}\"", world.path(SPEC).display()));
    let job = ["job", "start", "--key", "a:1", "--uid", "1", "--gid", "1", "1g.6gb"];
    let precreate =
        |profile: &str| world.hook(&["precreate"], config(json!({"mig.profile": profile}), &[]).to_string().as_bytes());
    let mut tried = 0;
    for (at, name) in NAMES.split(' ').enumerate() {
        let all = spoilt(br#"{"version":1,"key":"a:1","uid":1,"token":null,"slices":[],"nodes":[],"refusal":null}"#);
        let some = if every() == 1 { 1 } else { 3 };
        for bad in all.iter().skip(at % some).step_by(some) {
            let when = format!("{name}: {:?}", String::from_utf8_lossy(&bad[..bad.len().min(40)]));
            assert!(world.migctl(&job).status.success(), "{when}");
            let bundle = world.bundle("bundle", &config(json!({"mig.profile": "1g.6gb"}), &[]));
            let pid_file = world.path("pid");
            let _ = std::fs::remove_file(&pid_file);
            let words =
                ["create", "--bundle", bundle.to_str().unwrap(), "--pid-file", pid_file.to_str().unwrap(), "c1"];
            let created = world.shim(&words);
            assert!(created.status.success(), "{when}: {}", text(&created));
            let init = Init::start();
            std::fs::write(&pid_file, init.pid().to_string()).unwrap();
            let token = token_in(&std::fs::read(bundle.join("config.json")).unwrap());
            let (leases, machine) = (world.leases(), world.instances());

            let state = world.path("state");
            let path = match name {
                "index" => files(&state.join("index")).into_keys().next().unwrap(),
                "intents" => state.join("intents").join(format!("{token}.ready")),
                "claims" => state.join("claims").join(&token),
                "claims.tmp" => state.join("claims").join(format!("{token}.tmp")),
                "holders" => state.join("holders").join(&token),
                "public" => state.join("public/a:1.json"),
                "cordons" => state.join("cordons.json"),
                "ticket" => state.join("queue/9.json"),
                "bell" => state.join("queue/9.bell"),
                "last" | "scanned" => state.join("queue").join(name),
                "spec" => world.path(SPEC),
                other => state.join(other),
            };
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(&path, bad).unwrap();

            // Nobody is given what another has, and what is refused is so with a word.
            let next = precreate(WANTED);
            let given = next.status.success();
            assert!(
                given || next.status.code() == IO && text(&next).contains(path.to_str().unwrap()),
                "{when}: {}",
                text(&next)
            );
            assert!(given || name == "cordons", "{when}: {}", text(&next));
            let now = world.assert_consistent(&[], &when);
            let still =
                |lease: &Value| now.iter().any(|other| other["token"] == lease["token"] && other["state"] == "active");
            assert!(leases.iter().all(still) && now.len() == leases.len() + usize::from(given), "{when}: {now:#?}");
            assert!(machine.iter().all(|gi| world.instances().contains(gi)), "{when}");
            let asked = world.migctl(&["job", "env", "--key", "a:1"]);
            assert!(name == "public" || asked.status.success(), "{when}: {}", text(&asked));
            assert!(!text(&asked).contains("panicked"), "{when}: {}", text(&asked));
            for verb in [&["gc", "--dry-run"][..], &["list"], &["queue"]] {
                let output = world.migctl(verb);
                assert!(output.status.code().is_some_and(|code| code != 101), "{when} {verb:?}: {}", text(&output));
            }
            if name == "cordons" {
                // It is an administrator's word: nobody else takes it back.
                std::fs::remove_file(&path).unwrap();
            }

            // The ends.
            if given {
                world.hook(&["poststop", "--lease", &token_in(&next.stdout)], &state_of(&world, 0));
            }
            drop(init);
            assert!(world.shim(&["delete", "c1"]).status.success(), "{when}");
            let ended = world.migctl(&["job", "end", "--key", "a:1"]);
            assert!(ended.status.success(), "{when}: {}", text(&ended));
            gc(&world);
            world.assert_clean(&when);
            // An index that names no lease is the next one's of that name.
            let left = ["leases", "intents", "claims", "holders", "public"].map(|dir| files(&state.join(dir)));
            let left: Vec<&PathBuf> =
                left.iter().flat_map(|files| files.keys()).filter(|path| !path.ends_with(".write.tmp")).collect();
            assert!(left.is_empty(), "{when}: {left:?}");
            for file in [path, world.path(SPEC)] {
                let _ = std::fs::remove_file(file);
            }
            tried += 1;
        }
    }
    note(&format!("faults\tother files that can't be read\t{tried}\t{tried}"));
}

/// Of which boot the state is can't be told: it counts for nothing, and what is cut is nobody's, so that nobody is given it.
#[test]
fn a_boot_id_that_is_not_one_makes_everything_foreign() {
    for bad in spoilt(host::boot_id().unwrap().as_bytes()) {
        let world = World::new(&[A30]);
        let (_token, _init) = bound(&world, WANTED, "c1");
        let machine = world.instances();
        std::fs::write(world.path("state/boot_id"), &bad).unwrap();
        assert!(gc(&world).is_empty());
        granted(&world, "1g.6gb");
        assert_eq!(world.assert_consistent(&machine, "afterwards").len(), 1);
        let refused = world.hook(&["precreate"], config(json!({"mig.profile": "4g.24gb"}), &[]).to_string().as_bytes());
        assert_eq!(refused.status.code(), Some(75), "{}", text(&refused));
    }
}
