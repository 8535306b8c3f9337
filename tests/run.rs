//! `migctl run`, as shipped, on simulated GPUs: what the command gets and gives back, and that its slices are its own as long
//! as any of its processes lives, and no longer.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::io::{Read, Write};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::cgroup::own_cgroup;
use common::{Init, World, binaries, run, skip, text, wait_for};
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::SFlag;
use nix::unistd::Pid;
use portable_pty::{CommandBuilder, MasterPty, PtySize, native_pty_system};
use serde_json::{Value, json};

const A30: &str = "a30-24gb";
const IN_TIME: Duration = Duration::from_secs(20);
/// A user without any rights.
const USER: u32 = 65534;

// ---- processes ----

fn migctl(world: &World, args: &[&str]) -> Command {
    let mut command = Command::new(binaries().join("migctl"));
    command.arg("--config").arg(world.config()).args(args);
    command
}

fn piped(command: &mut Command) -> Child {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

fn signal(pid: u32, signal: Signal) {
    kill(Pid::from_raw(pid.cast_signed()), signal).unwrap();
}

fn lives(pid: u32) -> bool {
    mig_hook::host::process(pid).is_some()
}

/// Ends within the usual time; killed else.
fn end_of(mut child: Child) -> Output {
    let begun = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if begun.elapsed() > IN_TIME {
            child.kill().unwrap();
            panic!("it did not end: {}", text(&child.wait_with_output().unwrap()));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    child.wait_with_output().unwrap()
}

/// What a process has written to a file of the world, once it has.
fn written(world: &World, file: &str) -> String {
    let path = world.path(file);
    let read = || std::fs::read_to_string(&path).unwrap_or_default();
    wait_for(file, IN_TIME, || read().ends_with('\n'));
    read().trim().to_owned()
}

fn pid_in(world: &World, file: &str) -> u32 {
    written(world, file).parse().unwrap()
}

/// A process that is killed in the end.
struct Left(u32);

impl Drop for Left {
    fn drop(&mut self) {
        let _ = kill(Pid::from_raw(self.0.cast_signed()), Signal::SIGKILL);
        wait_for("the end of a killed process", IN_TIME, || !lives(self.0));
    }
}

// ---- what is there ----

fn line(world: &World) -> Vec<Value> {
    world.document(&["queue"])["waiting"].as_array().unwrap().clone()
}

fn in_line(world: &World, of: usize) {
    wait_for("a place in the line", IN_TIME, || line(world).len() == of);
}

fn files(world: &World, dir: &str) -> Vec<PathBuf> {
    std::fs::read_dir(world.path(dir)).into_iter().flatten().map(|entry| entry.unwrap().path()).collect()
}

/// No lease, no instance, no file that says that somebody lives, no cgroup of any lease that there ever was.
fn assert_nothing_left(world: &World, when: &str) {
    world.assert_clean(when);
    for dir in ["state/holders", "state/intents", "state/index", "state/public"] {
        assert_eq!(files(world, dir), Vec::<PathBuf>::new(), "{when}");
    }
    for token in world.audit().iter().filter_map(|line| line["token"].as_str()) {
        let cgroup = own_cgroup().join(format!("mig-hook-{token}"));
        assert!(!cgroup.exists(), "{} is left {when}", cgroup.display());
    }
}

/// The same after `migctl gc`, as soon as the last process has gone: one that is killed takes its time.
fn assert_nothing_left_for_gc(world: &World, when: &str) {
    wait_for(when, IN_TIME, || {
        let output = world.migctl(&["gc"]);
        assert!(output.status.success(), "{when}: {}", text(&output));
        world.leases().is_empty()
    });
    assert_nothing_left(world, when);
}

/// What every request does first: whatever nobody holds any more is freed.
fn look_after_others(world: &World) {
    let output = world.migctl(&["run", "1g.6gb", "--", "true"]);
    assert!(output.status.success(), "{}", text(&output));
}

/// A wrapper with a command that goes on until this is dropped.
struct Holder(Child);

impl Holder {
    fn start(world: &World, profile: &str) -> Holder {
        let before = world.leases().len();
        let command = ["run", profile, "--", "sleep", "600"];
        let holder = Holder(migctl(world, &command).stdin(Stdio::null()).spawn().unwrap());
        let seen = |lease: &&Value| !lease["holder"]["init"].is_null();
        wait_for("a holder", IN_TIME, || world.leases().iter().filter(seen).count() > before);
        holder
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Whether commands get a cgroup of their own here.
fn has_cgroups(what: &str) -> bool {
    let probe = own_cgroup().join(format!("mig-hook-tests-{:?}", std::thread::current().id()));
    let works = std::fs::create_dir_all(&probe).and_then(|()| std::fs::remove_dir(&probe)).is_ok();
    if !works {
        skip(what, "no cgroup can be made here");
    }
    works
}

// ---- the command ----

#[test]
fn the_exit_code_is_the_commands() {
    let world = World::new(&[A30]);
    let no_program = world.write("text", "no program");
    for (command, code, said) in [
        (&["sh", "-c", "exit 7"][..], 7, ""),
        (&["true"], 0, ""),
        (&["sh", "-c", "exit 255"], 255, ""),
        (&["sh", "-c", "kill -SEGV $$"], 139, ""),
        (&["sh", "-c", "kill -TERM $$"], 143, ""),
        (&["sh", "-c", "kill -KILL $$"], 137, ""),
        (&["/no/such/program"], 127, "migctl: cannot start /no/such/program: No such file"),
        (&["no-such-program-here"], 127, "migctl: cannot start no-such-program-here: No such file"),
        (&[no_program.to_str().unwrap()], 126, "Permission denied"),
        (&["/"], 126, "migctl: cannot start /: Permission denied"),
    ] {
        let output = world.migctl(&[&["run", "1g.6gb", "--"], command].concat());
        assert_eq!(output.status.code(), Some(code), "{command:?}: {}", text(&output));
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(stderr.contains(said) && stderr.is_empty() == said.is_empty(), "{command:?}: {stderr}");
        assert_nothing_left(&world, &format!("after {command:?}"));
    }
    let ends: Vec<Value> = world.audit().into_iter().filter(|line| line["event"] == "release").collect();
    assert_eq!(ends.len(), 10);
    assert!(ends.iter().all(|line| line["reason"] == "its command has ended" && line["way"] == "run"), "{ends:#?}");
}

#[test]
fn what_cannot_be_given_starts_nothing() {
    let world = World::new(&[A30]);
    let begun = world.path("begun").display().to_string();
    let holder = Holder::start(&world, "4g.24gb");
    for (request, code, said) in [
        (&["1g.6gb"][..], 75, "no room for 1g.6gb"),
        (&["1g.10gb"], 65, "not offered"),
        (&["--gpu", "7", "1g.6gb"], 65, "no GPU here"),
        (&[], 64, "what shall it have?"),
        (&["--gpu", "0"], 64, "--gpu says only where"),
    ] {
        let output = world.migctl(&[&["run"], request, &["--", "touch", &begun]].concat());
        assert_eq!(output.status.code(), Some(code), "{request:?}: {}", text(&output));
        assert!(text(&output).contains(said), "{request:?}: {}", text(&output));
    }
    assert!(!world.path("begun").exists());
    drop(holder);
    assert_nothing_left_for_gc(&world, "in the end");
}

#[test]
fn the_command_has_what_its_lease_says_and_no_more_than_its_starter_had() {
    let world = World::new(&[A30]);
    let script = "env > env; ls -l /proc/$$/fd > fd; exec grep ^Sig /proc/self/status > signals";
    let mut command = migctl(&world, &["run", "1g.6gb,2g.12gb", "--", "sh", "-c", script]);
    let output = run(command.current_dir(world.path("")).env("CUDA_VISIBLE_DEVICES", "0").env("KEPT", "yes"));
    assert!(output.status.success(), "{}", text(&output));
    let env = std::fs::read_to_string(world.path("env")).unwrap();
    let of = |name: &str| env.lines().find_map(|line| line.strip_prefix(&format!("{name}="))).unwrap_or_default();
    let grant = world.audit().into_iter().find(|line| line["event"] == "grant").unwrap();
    let uuids: Vec<&str> = grant["slices"].as_array().unwrap().iter().map(|s| s["uuid"].as_str().unwrap()).collect();
    for name in ["CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "MIG_UUID", "MIG_DEVICE_UUIDS"] {
        assert_eq!(of(name), uuids.join(","), "{name}");
    }
    assert_eq!((of("MIG_DEVICE_PROFILES"), of("KEPT"), of("MIG_JOB")), ("1g.6gb,2g.12gb", "yes", ""));
    assert_eq!(grant["token"], of("MIG_LEASE"));
    assert_eq!(grant["command"], "sh");
    let signals = std::fs::read_to_string(world.path("signals")).unwrap();
    assert_eq!((signal_set(&signals, "SigBlk"), signal_set(&signals, "SigIgn")), (0, 0), "{signals}");
    // Of ours only what says that it lives.
    let state = world.path("state").display().to_string();
    let open = std::fs::read_to_string(world.path("fd")).unwrap();
    let ours: Vec<&str> = open.lines().filter(|line| line.contains(&state)).collect();
    assert!(ours.len() == 1 && ours[0].contains("/holders/"), "{open}");
    assert_nothing_left(&world, "in the end");
}

// ---- signals ----

/// One of the sets in the text of /proc/PID/status, without those from 32 on.
fn signal_set(status: &str, name: &str) -> u64 {
    let set = status.lines().find_map(|line| line.strip_prefix(&format!("{name}:\t"))).unwrap();
    u64::from_str_radix(set, 16).unwrap() & 0x7fff_ffff
}

/// Notes each signal of these in `signals`, until it is told to end by SIGALRM.
fn noting(world: &World) -> String {
    let dir = world.path("").display().to_string();
    let traps: String = ["TERM", "INT", "HUP", "QUIT", "USR1", "USR2", "CONT"]
        .iter()
        .map(|name| format!("trap 'echo {name} >> {dir}/signals' {name}; "))
        .collect();
    format!("{traps} trap 'exit 5' ALRM; echo $$ > {dir}/pid; while :; do sleep 0.02; done")
}

fn noted(world: &World) -> Vec<String> {
    let text = std::fs::read_to_string(world.path("signals")).unwrap_or_default();
    text.lines().map(str::to_owned).collect()
}

#[test]
fn signals_are_handed_on_and_the_command_decides() {
    let world = World::new(&[A30]);
    let wrapper = piped(&mut migctl(&world, &["run", "1g.6gb", "--", "sh", "-c", &noting(&world)]));
    pid_in(&world, "pid");
    let mut expected: Vec<&str> = vec![];
    for (sent, name) in [
        (Signal::SIGTERM, "TERM"),
        (Signal::SIGINT, "INT"),
        (Signal::SIGHUP, "HUP"),
        (Signal::SIGQUIT, "QUIT"),
        (Signal::SIGUSR1, "USR1"),
        (Signal::SIGUSR2, "USR2"),
        (Signal::SIGCONT, "CONT"),
        (Signal::SIGTERM, "TERM"),
    ] {
        signal(wrapper.id(), sent);
        expected.push(name);
        wait_for(name, IN_TIME, || noted(&world).len() == expected.len());
    }
    assert_eq!(noted(&world), expected);
    signal(wrapper.id(), Signal::SIGALRM);
    let output = end_of(wrapper);
    assert_eq!(output.status.code(), Some(5), "{}", text(&output));
    assert_nothing_left(&world, "in the end");
}

#[test]
fn a_signal_that_ends_the_command_is_its_exit_code() {
    let world = World::new(&[A30]);
    for (sent, code) in
        [(Signal::SIGTERM, 143), (Signal::SIGINT, 130), (Signal::SIGUSR1, 138), (Signal::SIGVTALRM, 154)]
    {
        let wrapper = piped(&mut migctl(&world, &["run", "1g.6gb", "--", "sleep", "600"]));
        wait_for("the command", IN_TIME, || !children_of(wrapper.id()).is_empty());
        signal(wrapper.id(), sent);
        let output = end_of(wrapper);
        assert_eq!(output.status.code(), Some(code), "{}", text(&output));
        assert_nothing_left(&world, &format!("after {sent}"));
    }
}

/// Those that have become another program already.
fn children_of(pid: u32) -> Vec<u32> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    let all = text.split_whitespace().map(|pid| pid.parse().unwrap());
    all.filter(|child| mig_hook::host::program(*child) != mig_hook::host::program(pid)).collect()
}

#[test]
fn what_its_starter_ignores_is_ignored_while_it_waits_and_by_the_command() {
    let world = World::new(&[A30]);
    let first = Holder::start(&world, "4g.24gb");
    // nohup, and a background job of a shell without job control.
    let mut waits = Command::new("sh");
    waits.args(["-c", "trap '' HUP; \"$@\" & wait $!", "sh"]).arg(binaries().join("migctl"));
    waits.arg("--config").arg(world.config());
    let dir = world.path("").display().to_string();
    let script = format!("echo $$ > {dir}/pid; exec grep -e SigIgn -e SigBlk /proc/self/status");
    let shell = piped(waits.args(["run", "--wait", "1m", "1g.6gb", "--", "sh", "-c", &script]));
    in_line(&world, 1);
    let waiter = line(&world)[0]["pid"].as_u64().map(|pid| pid as u32).unwrap_or_else(|| children_of(shell.id())[0]);
    for sent in [Signal::SIGHUP, Signal::SIGINT, Signal::SIGQUIT] {
        signal(waiter, sent);
    }
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(line(&world).len(), 1, "it does not mind");
    drop(first);
    let output = end_of(shell);
    let said = text(&output);
    assert_eq!((signal_set(&said, "SigBlk"), signal_set(&said, "SigIgn")), (0, 0b111), "{said}");
    assert_nothing_left_for_gc(&world, "in the end");
}

#[test]
fn children_that_would_be_reaped_unseen_are_waited_for() {
    let world = World::new(&[A30]);
    let Ok(version) = Command::new("python3").arg("--version").output() else {
        return skip("children_that_would_be_reaped_unseen_are_waited_for", "no python3");
    };
    assert!(version.status.success());
    let ignore =
        "import os, signal, sys; signal.signal(signal.SIGCHLD, signal.SIG_IGN); os.execv(sys.argv[1], sys.argv[1:])";
    let mut command = Command::new("python3");
    command.args(["-c", ignore]).arg(binaries().join("migctl")).arg("--config").arg(world.config());
    let output = end_of(piped(command.args(["run", "1g.6gb", "--", "sh", "-c", "exit 9"])));
    assert_eq!(output.status.code(), Some(9), "{}", text(&output));
    assert_nothing_left(&world, "in the end");
}

/// A command on a terminal of its own, as a login shell starts it: leader of the session, in the foreground.
struct OnTerminal {
    child: Box<dyn portable_pty::Child + Send + Sync>,
    /// What is open of the terminal, but for a reader.
    keyboard: Option<(Box<dyn MasterPty + Send>, Box<dyn Write + Send>)>,
    shown: Arc<Mutex<String>>,
}

impl OnTerminal {
    /// On a terminal that nobody reads.
    fn unread(world: &World, args: &[&str]) -> OnTerminal {
        let pair = native_pty_system().openpty(PtySize { rows: 24, cols: 120, ..PtySize::default() }).unwrap();
        let mut command = CommandBuilder::new(binaries().join("migctl"));
        command.args(["--config", world.config().to_str().unwrap()]);
        command.args(args);
        let child = pair.slave.spawn_command(command).unwrap();
        let writer = pair.master.take_writer().unwrap();
        OnTerminal { child, keyboard: Some((pair.master, writer)), shown: Arc::default() }
    }

    fn start(world: &World, args: &[&str]) -> OnTerminal {
        let terminal = OnTerminal::unread(world, args);
        let mut reader = terminal.keyboard.as_ref().unwrap().0.try_clone_reader().unwrap();
        let shown = Arc::clone(&terminal.shown);
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(n @ 1..) = reader.read(&mut bytes) {
                shown.lock().unwrap().push_str(&String::from_utf8_lossy(&bytes[..n]));
            }
        });
        terminal
    }

    fn shown(&self) -> String {
        self.shown.lock().unwrap().clone()
    }

    fn press(&mut self, keys: &str) {
        self.keyboard.as_mut().unwrap().1.write_all(keys.as_bytes()).unwrap();
    }

    fn end(&mut self) -> portable_pty::ExitStatus {
        let begun = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            if begun.elapsed() > IN_TIME {
                self.child.kill().unwrap();
                panic!("it did not end: {}", self.shown());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

#[test]
fn control_c_on_a_terminal_reaches_the_command_once() {
    let world = World::new(&[A30]);
    let mut terminal = OnTerminal::start(&world, &["run", "1g.6gb", "--", "sh", "-c", &noting(&world)]);
    pid_in(&world, "pid");
    for n in 1..=3 {
        terminal.press("\x03");
        wait_for("SIGINT", IN_TIME, || noted(&world).len() >= n);
        std::thread::sleep(Duration::from_millis(150));
        assert_eq!(noted(&world), vec!["INT"; n]);
    }
    signal(terminal.child.process_id().unwrap(), Signal::SIGALRM);
    assert_eq!(terminal.end().exit_code(), 5);
    assert_nothing_left(&world, "in the end");
}

#[test]
fn the_command_learns_that_its_terminal_is_gone() {
    let world = World::new(&[A30]);
    let mut terminal = OnTerminal::unread(&world, &["run", "1g.6gb", "--", "sh", "-c", &noting(&world)]);
    let (pid, wrapper) = (Left(pid_in(&world, "pid")), terminal.child.process_id().unwrap());
    drop(terminal.keyboard.take());
    wait_for("SIGHUP", IN_TIME, || noted(&world).contains(&"HUP".into()));
    assert!(lives(pid.0) && lives(wrapper), "it is the command that decides");
    signal(wrapper, Signal::SIGALRM);
    assert_eq!(terminal.end().exit_code(), 5);
    assert_nothing_left(&world, "in the end");
}

#[test]
fn control_c_before_there_is_a_command_starts_none() {
    let world = World::new(&[A30]);
    // The first who needs nvidia-uvm has it loaded: that takes a while here, after the slice was cut.
    let devices = std::fs::read_to_string(world.path("m/proc/devices")).unwrap();
    world.write("uvm", &devices);
    let without: String =
        devices.lines().filter(|line| !line.contains("nvidia-uvm")).map(|l| format!("{l}\n")).collect();
    world.write("m/proc/devices", &without);
    let dir = world.path("").display().to_string();
    world.script(
        "m/usr/bin/nvidia-modprobe",
        &format!("trap '' INT; echo begun > {dir}/begun; sleep 1; cp {dir}/uvm {dir}/m/proc/devices"),
    );
    let started = format!("touch {dir}/started");
    let mut terminal = OnTerminal::start(&world, &["run", "1g.6gb", "--", "sh", "-c", &started]);
    assert_eq!(written(&world, "begun"), "begun");
    terminal.press("\x03");
    let status = terminal.end();
    assert!(status.signal().is_some(), "{status:?} {}", terminal.shown());
    assert!(!world.path("started").exists());
    assert_nothing_left(&world, "in the end");
}

// ---- a tree that outlives its first process ----

#[test]
fn the_command_dies_with_a_killed_wrapper() {
    let world = World::new(&[A30]);
    let script = format!("echo $$ > {}; exec sleep 600", world.path("pid").display());
    let wrapper = piped(&mut migctl(&world, &["run", "1g.6gb", "--", "sh", "-c", &script]));
    let command = pid_in(&world, "pid");
    let token = world.lease()["token"].as_str().unwrap().to_owned();
    if has_cgroups("the cgroup of a killed command") {
        assert!(own_cgroup().join(format!("mig-hook-{token}")).join("cgroup.procs").exists());
    }
    look_after_others(&world);
    assert_eq!(world.lease()["state"], "active");
    signal(wrapper.id(), Signal::SIGKILL);
    assert_eq!(end_of(wrapper).status.signal(), Some(9));
    wait_for("the end of the command", IN_TIME, || !lives(command));
    assert_nothing_left_for_gc(&world, "after kill -9 of the wrapper");
}

/// A grandchild that its parents leave behind, and what it does before it goes on for ever.
fn outlived_by(world: &World, what_it_does: &str) -> Left {
    let pid = world.path("pid").display().to_string();
    let _ = std::fs::remove_file(&pid);
    let script = format!(
        "setsid bash -c '{what_it_does}; echo $$ > {pid}; exec sleep 600' </dev/null >/dev/null 2>&1 &\n\
         until [ -s {pid} ]; do sleep 0.02; done; exit 3"
    );
    let output = world.migctl(&["run", "1g.6gb", "--", "bash", "-c", &script]);
    assert_eq!(output.status.code(), Some(3), "{}", text(&output));
    assert!(text(&output).contains("migctl: 1g.6gb is not free yet: its command has ended"), "{}", text(&output));
    Left(pid_in(world, "pid"))
}

/// While a grandchild lives its slice is nobody else's; a `migctl gc` after its end nothing is left.
fn assert_kept_as_long_as(world: &World, grandchild: Left, when: &str) {
    look_after_others(world);
    let lease = world.lease();
    assert_eq!((&lease["state"], world.instances().len()), (&json!("releasing"), 1), "{when}");
    assert!(lives(grandchild.0));
    drop(grandchild);
    assert_nothing_left_for_gc(world, when);
}

const CLOSES_ALL: &str = "for fd in $(ls /proc/$$/fd); do eval \"exec $fd>&-\"; done";

#[test]
fn what_a_command_leaves_behind_keeps_the_slice() {
    let world = World::new(&[A30]);
    let grandchild = outlived_by(&world, ":");
    // What has ended long ago is no reason to be patient with a refusal.
    world.edit_lease(world.lease()["token"].as_str().unwrap(), |lease| {
        lease["ended_ms"] = json!(lease["ended_ms"].as_u64().unwrap() - 10_001);
    });
    let begun = Instant::now();
    let refused = world.migctl(&["run", "4g.24gb", "--", "true"]);
    assert!(refused.status.code() == Some(75) && text(&refused).contains("bash (process"), "{}", text(&refused));
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    assert_kept_as_long_as(&world, grandchild, "left in a session of its own");
}

#[test]
fn what_has_closed_everything_keeps_it_by_its_cgroup() {
    if !has_cgroups("what_has_closed_everything_keeps_it_by_its_cgroup") {
        return;
    }
    let world = World::new(&[A30]);
    let grandchild = outlived_by(&world, CLOSES_ALL);
    let token = world.lease()["token"].as_str().unwrap().to_owned();
    assert!(!mig_hook::store::Store::at(&world.path("state")).is_held(&token), "nothing is open");
    assert_kept_as_long_as(&world, grandchild, "with nothing open");
}

#[test]
fn what_has_left_the_cgroup_keeps_it_by_what_it_has_open() {
    if !has_cgroups("what_has_left_the_cgroup_keeps_it_by_what_it_has_open") {
        return;
    }
    let world = World::new(&[A30]);
    let leaves = format!("echo $$ > {}", own_cgroup().join("cgroup.procs").display());
    let grandchild = outlived_by(&world, &leaves);
    let cgroup = world.lease()["holder"]["cgroup"].as_str().unwrap().to_owned();
    assert!(!mig_hook::host::is_in_cgroup(grandchild.0, &cgroup));
    assert_kept_as_long_as(&world, grandchild, "elsewhere");
}

#[test]
fn a_tree_whose_wrapper_was_killed_keeps_the_slice_until_it_is_gone() {
    let world = World::new(&[A30]);
    let pid = world.path("pid").display().to_string();
    // A second process is not the wrapper's child: the kernel does not kill it.
    let script = format!("setsid bash -c 'echo $$ > {pid}; exec sleep 600' >/dev/null 2>&1 & wait");
    let wrapper = piped(&mut migctl(&world, &["run", "1g.6gb", "--", "bash", "-c", &script]));
    let grandchild = Left(pid_in(&world, "pid"));
    signal(wrapper.id(), Signal::SIGKILL);
    end_of(wrapper);
    look_after_others(&world);
    let lease = world.lease();
    assert_eq!(lease["state"], "active", "{lease:#}");
    if has_cgroups("a process of the tree is found anew") {
        assert_eq!(lease["holder"]["init"]["pid"], grandchild.0, "it is found in the cgroup");
    }
    drop(grandchild);
    assert_nothing_left_for_gc(&world, "when the tree is gone");
}

#[test]
fn cgroups_that_a_command_makes_go_with_its_own() {
    if !has_cgroups("cgroups_that_a_command_makes_go_with_its_own") {
        return;
    }
    let world = World::new(&[A30]);
    let script = format!("mkdir -p {}/mig-hook-$MIG_LEASE/inner/most", own_cgroup().display());
    let output = world.migctl(&["run", "1g.6gb", "--", "sh", "-c", &script]);
    assert!(output.status.success() && output.stderr.is_empty(), "{}", text(&output));
    assert_nothing_left(&world, "in the end");
}

#[test]
fn without_cgroups_a_command_is_run_and_none_is_confined() {
    let world = World::new(&[A30]);
    let alone = |args: &[&str]| {
        let mut command = Command::new("unshare");
        let close = "mount -o remount,bind,ro \"$0\" && exec \"$@\"";
        let mount = own_cgroup();
        let mount = mount.ancestors().find(|dir| dir.parent().is_some_and(|up| up == Path::new("/sys/fs/cgroup")));
        let mount = mount.unwrap_or(Path::new("/sys/fs/cgroup"));
        command.args(["--mount", "sh", "-c", close]).arg(mount).arg(binaries().join("migctl"));
        command.arg("--config").arg(world.config()).args(args);
        run(&mut command)
    };
    if !alone(&["queue"]).status.success() {
        return skip("without_cgroups_a_command_is_run_and_none_is_confined", "no mount namespace");
    }
    let output = alone(&["run", "1g.6gb", "--", "sh", "-c", "exit 4"]);
    assert_eq!(output.status.code(), Some(4), "{}", text(&output));
    assert!(
        text(&output).contains("the command gets no cgroup of its own: cannot make the cgroup"),
        "{}",
        text(&output)
    );
    assert_nothing_left(&world, "after a command without a cgroup");
    let output = alone(&["run", "--confine", "1g.6gb", "--", "sh", "-c", "exit 4"]);
    assert_eq!(output.status.code(), Some(74), "{}", text(&output));
    assert!(text(&output).contains("the command can't be confined: cannot make the cgroup"), "{}", text(&output));
    assert_nothing_left(&world, "after a refusal");
}

// ---- confinement ----

/// How a node opens for `cat`.
fn opens(said: &str, node: &str) -> &'static str {
    match said.lines().find(|line| line.contains(&format!("/{node}:"))).unwrap_or_default() {
        line if line.contains("No such device or address") => "opens",
        line if line.contains("Operation not permitted") => "denied",
        line => panic!("{node}: {line:?} in {said}"),
    }
}

#[test]
fn a_confined_command_opens_its_own_slices_and_no_other() {
    let world = World::new(&[A30, A30, A30]);
    let test = "a_confined_command_opens_its_own_slices_and_no_other";
    let node = std::fs::metadata(world.path("m/dev/nvidia0"));
    if !node.is_ok_and(|meta| meta.file_type().is_char_device()) {
        return skip(test, "no device nodes can be made here");
    }
    if !has_cgroups(test) {
        return;
    }
    world.sim("mode", &["--gpu", "2", "off"]);
    let other = Holder::start(&world, "1g.6gb");
    let others = world.lease();
    let minors = |lease: &Value| ["gi_minor", "ci_minor"].map(|key| lease["slices"][0][key].as_u64().unwrap());
    let dev = world.path("m/dev").display().to_string();
    // The driver's own capabilities, and one that nobody has yet.
    let caps = std::fs::read_to_string(world.path("m/proc/driver/nvidia-caps/mig-minors")).unwrap();
    let unused: u64 =
        caps.lines().find(|l| l.starts_with("gpu1/gi3/access")).unwrap().rsplit(' ').next().unwrap().parse().unwrap();
    let majors = std::fs::read_to_string(world.path("m/proc/devices")).unwrap();
    let caps_major: u64 =
        majors.lines().find_map(|line| line.trim().strip_suffix(" nvidia-caps")).unwrap().parse().unwrap();
    for minor in [1, 2, unused] {
        let path = world.path(&format!("m/dev/nvidia-caps/nvidia-cap{minor}"));
        let device = nix::sys::stat::makedev(caps_major, minor);
        let _ = nix::sys::stat::mknod(&path, SFlag::S_IFCHR, nix::sys::stat::Mode::from_bits_truncate(0o444), device);
    }
    let tries = format!("LC_ALL=C cat {dev}/nvidia* {dev}/nvidia-caps/* 2>&1; true");
    let said_by = |args: &[&str]| {
        let output = world.migctl(&[&["run"], args, &["1g.6gb", "--", "sh", "-c", &tries]].concat());
        assert!(output.status.success(), "{}", text(&output));
        String::from_utf8(output.stdout).unwrap()
    };
    let open = said_by(&[]);
    assert!(!open.contains("not permitted"), "{open}");
    let confined_by_option = said_by(&["--gpu", "0", "--confine"]);
    world.settings("[jobs]\nconfine = true");
    let confined_by_setting = said_by(&["--gpu", "0"]);
    for said in [confined_by_option, confined_by_setting] {
        for node in ["nvidiactl", "nvidia0", "nvidia-uvm"] {
            assert_eq!(opens(&said, node), "opens", "{node}");
        }
        assert_eq!(opens(&said, "nvidia1"), "denied", "another GPU in MIG mode");
        assert_eq!(opens(&said, "nvidia2"), "opens", "none of our business");
        for minor in minors(&others).into_iter().chain([1, 2, unused]) {
            assert_eq!(opens(&said, &format!("nvidia-cap{minor}")), "denied", "{minor}");
        }
        // The two of its own, of which this world knows by now.
        let own = said.lines().filter(|line| line.contains("/nvidia-cap") && line.contains("No such device")).count();
        assert_eq!(own, 2, "{said}");
    }
    drop(other);
    assert_nothing_left_for_gc(&world, "in the end");
}

// ---- shells ----

/// A shell that takes a slice and says so: its environment in `env`, its pid in `pid`; ends when `go` is there. `takes` is what
/// it does for that, `MIGCTL` standing for the command.
fn shell(world: &World, program: &str, takes: &str) -> Child {
    for file in ["env", "pid", "go"] {
        let _ = std::fs::remove_file(world.path(file));
    }
    let migctl = format!("{} --config {}", binaries().join("migctl").display(), world.config().display());
    let dir = world.path("").display().to_string();
    let script = format!(
        "{}\necho $$ > {dir}/pid; until [ -e {dir}/go ]; do sleep 0.02; done; exit 6\n",
        takes.replace("MIGCTL", &migctl).replace("NOTE", &format!("env | grep -e MIG -e VISIBLE > {dir}/env")),
    );
    let file = world.write("script", &script);
    piped(Command::new(program).arg(file))
}

/// What the shell has taken is its own until it ends.
fn assert_held_by(world: &World, shell: Child, when: &str) {
    let pid = pid_in(world, "pid");
    look_after_others(world);
    let lease = world.lease();
    assert_eq!(
        (&lease["state"], &lease["holder"]["init"]["pid"]),
        (&json!("active"), &json!(pid)),
        "{when}: {lease:#}"
    );
    let env = std::fs::read_to_string(world.path("env")).unwrap();
    let uuid = lease["slices"][0]["uuid"].as_str().unwrap();
    for name in ["CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "MIG_UUID"] {
        assert!(env.contains(&format!("{name}={uuid}\n")), "{when}: {env}");
    }
    world.write("go", "");
    let output = end_of(shell);
    assert_eq!(output.status.code(), Some(6), "{when}: {}", text(&output));
    assert_nothing_left_for_gc(world, when);
}

#[test]
fn a_shell_holds_what_it_takes_until_it_ends() {
    let world = World::new(&[A30]);
    for program in ["bash", "dash"] {
        if !common::installed(program) {
            skip("a_shell_holds_what_it_takes_until_it_ends", &format!("no {program}"));
            continue;
        }
        for takes in [
            "eval \"$(MIGCTL run --shell 1g.6gb)\"; NOTE",
            "variables=$(MIGCTL run --shell 1g.6gb) || exit 9; eval \"$variables\"; NOTE",
            "eval \"$(MIGCTL run --shell 1g.6gb | cat)\"; NOTE",
            // A subshell can't be told from what $(…) starts: what it takes is the shell's.
            "(eval \"$(MIGCTL run --shell 1g.6gb)\"; NOTE)",
        ] {
            assert_held_by(&world, shell(&world, program, takes), &format!("{program}: {takes}"));
        }
        let takes =
            "if [ -z \"$AGAIN\" ]; then AGAIN=1 $0x \"$0\"; exit; fi; eval \"$(MIGCTL run --shell 1g.6gb)\"; NOTE";
        let takes = takes.replace("$0x", program);
        let outer = shell(&world, program, &takes);
        let inner = pid_in(&world, "pid");
        assert_ne!(outer.id(), inner);
        assert_held_by(&world, outer, "a shell that the same one has started with the same words");
    }
}

#[test]
fn another_process_can_be_named_to_hold_it() {
    let world = World::new(&[A30]);
    let other = Init::start();
    let pid = other.pid();
    let output = world.migctl(&["run", "--shell", "--pid", &pid.to_string(), "1g.6gb"]);
    assert!(output.status.success() && output.stderr.is_empty(), "{}", text(&output));
    let lease = world.lease();
    assert_eq!(lease["holder"]["init"]["pid"], pid);
    let lines = String::from_utf8(output.stdout).unwrap();
    assert!(lines.lines().all(|line| line.starts_with("export ") && line.ends_with('\'')), "{lines}");
    look_after_others(&world);
    assert_eq!(world.leases().len(), 1);
    drop(other);
    assert_nothing_left_for_gc(&world, "after the end of the process that was named");
    let output = world.migctl(&["run", "--shell", "--pid", &pid.to_string(), "1g.6gb"]);
    assert_eq!(output.status.code(), Some(64), "{}", text(&output));
    assert_nothing_left(&world, "after a refusal");
}

#[test]
fn what_makes_a_user_root_is_not_taken_for_the_shell() {
    let world = World::new(&[A30]);
    // A program that stays beside what it starts, as sudo does.
    let sudo = world.path("sudo");
    let timeout = String::from_utf8(run(Command::new("sh").args(["-c", "command -v timeout"])).stdout).unwrap();
    assert!(run(Command::new("cp").arg(timeout.trim()).arg(&sudo)).status.success());
    let takes = format!("eval \"$({} 60 MIGCTL run --shell 1g.6gb)\"; NOTE", sudo.display());
    assert_held_by(&world, shell(&world, "bash", &takes), "by way of sudo");
}

#[test]
fn variables_that_nobody_can_read_are_no_lease() {
    let world = World::new(&[A30]);
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let mut command = migctl(&world, &["run", "--shell", "1g.6gb"]);
    let child = command.stdin(Stdio::null()).stdout(full).stderr(Stdio::piped()).spawn().unwrap();
    let output = end_of(child);
    assert_eq!(output.status.code(), Some(74), "{}", text(&output));
    assert_nothing_left(&world, "after a refusal");
}

// ---- in a job ----

/// A world whose settings and programs a user can reach, and how that user calls migctl.
fn for_a_user(world: &World) -> impl Fn(&[&str], &[(&str, &str)]) -> Output {
    std::fs::set_permissions(world.path(""), std::fs::Permissions::from_mode(0o755)).unwrap();
    let program = world.path("migctl");
    // By another process: what a test beside this one forks would have it open for writing, and then nobody can run it.
    assert!(run(Command::new("cp").arg(binaries().join("migctl")).arg(&program)).status.success());
    let config = world.config();
    move |args, variables| {
        let mut command = Command::new(&program);
        command.arg("--config").arg(&config).args(args).env("PATH", "/usr/bin:/bin").envs(variables.iter().copied());
        run(command.uid(USER).gid(USER).current_dir("/"))
    }
}

const SLURM: [(&str, &str); 2] = [("SLURM_CLUSTER_NAME", "mini"), ("SLURM_JOB_ID", "15")];

#[test]
fn in_a_job_its_slices_are_used() {
    let world = World::new(&[A30]);
    let as_user = for_a_user(&world);
    let user = USER.to_string();
    let job = ["job", "start", "--key", "slurm:mini:15", "--uid", &user, "--gid", &user, "--sign", "no such process"];
    let started = world.document(&[&job[..], &["1g.6gb,2g.12gb"]].concat());
    let uuids = started["environment"]["MIG_UUID"].as_str().unwrap();
    let env = "echo $CUDA_VISIBLE_DEVICES $NVIDIA_VISIBLE_DEVICES $MIG_UUID $MIG_JOB $(id -u); exit 9";
    for variables in [&SLURM[..], &[("MIG_JOB", "slurm:mini:15")]] {
        for request in [&[][..], &["2g.12gb,1g.6gb"], &["--wait", "1s", "1g.6gb,2g.12gb"]] {
            let output = as_user(&[&["run"], request, &["--", "sh", "-c", env]].concat(), variables);
            assert_eq!(output.status.code(), Some(9), "{request:?}: {}", text(&output));
            let expected = format!("{uuids} {uuids} {uuids} slurm:mini:15 {USER}\n");
            assert_eq!(String::from_utf8_lossy(&output.stdout), expected, "{}", text(&output));
        }
    }
    let output = as_user(&["run", "--", "no-such-program-here"], &SLURM);
    assert_eq!(output.status.code(), Some(127), "{}", text(&output));
    let output = as_user(&["run", "--shell"], &SLURM);
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(said.contains(&format!("export CUDA_VISIBLE_DEVICES='{uuids}'\n")), "{}", text(&output));
    assert!(said.contains("export MIG_JOB='slurm:mini:15'\n"), "{said}");
    // Root in the job, too.
    let output = run(migctl(&world, &["run", "--", "sh", "-c", env]).envs(SLURM));
    assert_eq!(output.status.code(), Some(9), "{}", text(&output));
    assert_eq!(world.leases().len(), 1, "nothing was cut for any of them");
    assert!(world.migctl(&["job", "end", "--key", "slurm:mini:15"]).status.success());
    assert_nothing_left(&world, "after the job");
}

#[test]
fn what_a_job_does_not_have_is_refused() {
    let world = World::new(&[A30]);
    let as_user = for_a_user(&world);
    let user = USER.to_string();
    let start = |key: &str, uid: &str, request: &str| {
        world.migctl(&["job", "start", "--key", key, "--uid", uid, "--gid", uid, "--sign", "no such process", request])
    };
    // Nothing is public yet, and the state is closed.
    assert!(world.migctl(&["gc"]).status.success());
    let alone = as_user(&["run", "1g.6gb", "--", "true"], &SLURM);
    assert_eq!(alone.status.code(), Some(77), "{}", text(&alone));
    assert!(
        text(&alone).contains("--gres=mig:1g.10gb") && text(&alone).contains("migctl reserve --uid"),
        "{}",
        text(&alone)
    );

    assert!(start("slurm:mini:15", &user, "1g.6gb").status.success());
    assert!(start("slurm:mini:16", "4242", "1g.6gb").status.success());
    assert_eq!(start("slurm:mini:17", &user, "4g.24gb").status.code(), Some(75));
    let job = |id: &'static str| [("SLURM_CLUSTER_NAME", "mini"), ("SLURM_JOB_ID", id)];
    for (args, id, code, said) in [
        (&["run", "2g.12gb", "--", "true"][..], "15", 65, "job slurm:mini:15 has 1g.6gb, not 2g.12gb"),
        (&["run", "--gpu", "1", "1g.6gb", "--", "true"], "15", 65, "job slurm:mini:15 has 1g.6gb"),
        (&["run", "--confine", "--", "true"], "15", 64, "jobs.confine of the settings is for jobs"),
        (&["run", "--", "true"], "16", 77, "job slurm:mini:16 is another user's"),
        (&["run", "--shell"], "16", 77, "job slurm:mini:16 is another user's"),
        (&["run", "--", "true"], "17", 75, "job slurm:mini:17 was refused: no room for 4g.24gb"),
        (&["run", "1g.6gb", "--", "true"], "18", 77, "slices are cut by root"),
        (&["run", "--", "true"], "18", 64, "what shall it have?"),
    ] {
        let output = as_user(args, &job(id));
        assert_eq!(output.status.code(), Some(code), "{args:?} in {id}: {}", text(&output));
        assert!(text(&output).contains(said), "{args:?} in {id}: {}", text(&output));
    }
    for key in ["15", "16", "17"] {
        let output = world.migctl(&["job", "end", "--key", &format!("slurm:mini:{key}")]);
        assert!(output.status.success(), "{}", text(&output));
    }
    assert_nothing_left(&world, "after the jobs");
}

// ---- waiting ----

#[test]
fn a_waiter_that_is_ended_frees_its_place_at_once() {
    let world = World::new(&[A30]);
    world.settings("[queue]\novertakes = 0");
    let first = Holder::start(&world, "2g.12gb");
    let begun = world.path("begun").display().to_string();
    for sent in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGQUIT, Signal::SIGUSR1, Signal::SIGKILL] {
        let large = piped(&mut migctl(&world, &["run", "--wait", "1m", "4g.24gb", "--", "touch", &begun]));
        in_line(&world, 1);
        let small = piped(&mut migctl(&world, &["run", "--wait", "1m", "1g.6gb", "--", "sh", "-c", "exit 3"]));
        in_line(&world, 2);
        signal(large.id(), sent);
        // Nobody may overtake, so it is the freed place that lets the next one in.
        assert_eq!(end_of(small).status.code(), Some(3));
        let output = end_of(large);
        assert_eq!(output.status.signal(), Some(sent as i32), "{}", text(&output));
        assert_eq!(line(&world), Vec::<Value>::new());
    }
    let shell = format!(
        "{} --config {} run --wait 1m 4g.24gb -- true & wait $!; echo $?",
        binaries().join("migctl").display(),
        world.config().display()
    );
    let shell = piped(Command::new("bash").args(["-c", &shell]));
    in_line(&world, 1);
    signal(children_of(shell.id())[0], Signal::SIGTERM);
    let output = end_of(shell);
    assert!(String::from_utf8_lossy(&output.stdout).ends_with("143\n"), "{}", text(&output));
    assert!(!world.path("begun").exists());
    drop(first);
    assert_nothing_left_for_gc(&world, "in the end");
    assert_eq!(files(&world, "state/queue").len(), 2, "the last number, and the last look");
}

#[test]
fn control_c_ends_a_wait_on_a_terminal_that_shows_it() {
    let world = World::new(&[A30]);
    let first = Holder::start(&world, "4g.24gb");
    let mut terminal = OnTerminal::start(&world, &["run", "--wait", "2h", "1g.6gb", "--", "true"]);
    let bound = "waits in line, place 1 of 1, at most 1h: 2s"; // queue.max_wait
    wait_for("progress", IN_TIME, || terminal.shown().contains(bound));
    let shown = terminal.shown();
    assert!(shown.contains("\r\u{1b}[Kmigctl: waits in line, place 1 of 1, at most 1h: 1s"), "{shown:?}");
    terminal.press("\x03");
    let status = terminal.end();
    assert!(status.signal().is_some_and(|signal| signal.contains("Interrupt")), "{status:?}");
    wait_for("its line to be taken away", IN_TIME, || terminal.shown().ends_with("\r\u{1b}[K"));
    assert_eq!(line(&world), Vec::<Value>::new());
    // Also where the shell is to hold it.
    let holder = std::process::id().to_string();
    let mut terminal = OnTerminal::start(&world, &["run", "--wait", "1m", "--shell", "--pid", &holder, "1g.6gb"]);
    wait_for("progress", IN_TIME, || terminal.shown().contains("waits in line, place 1 of 1, at most 1m: 1s"));
    terminal.press("\x03");
    assert!(terminal.end().signal().is_some());
    drop(first);
    assert_nothing_left_for_gc(&world, "in the end");
}

#[test]
fn elsewhere_a_wait_is_told_once() {
    let world = World::new(&[A30]);
    let first = Holder::start(&world, "4g.24gb");
    let output = world.migctl(&["run", "--wait", "3s", "1g.6gb", "--", "true"]);
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(75), "{said}");
    let lines: Vec<&str> = said.lines().collect();
    assert_eq!(lines.len(), 2, "{said}");
    assert!(lines[0].starts_with("migctl: waits in line for mig.profile=1g.6gb mig.wait=3s: no room"), "{said}");
    assert!(lines[1].starts_with("migctl: waited 3s in line (place 1 of 1): no room for 1g.6gb: GPU 0"), "{said}");
    drop(first);
    assert_nothing_left_for_gc(&world, "in the end");
}

#[test]
fn a_wait_goes_on_when_its_starter_has_ended() {
    let world = World::new(&[A30]);
    let first = Holder::start(&world, "4g.24gb");
    let mut starter = Command::new("sh");
    starter.args(["-c", "nohup \"$@\" >/dev/null 2>&1 &", "sh"]).arg(binaries().join("migctl"));
    starter.arg("--config").arg(world.config()).args(["run", "--wait", "1m", "1g.6gb", "--", "sh", "-c"]);
    let output = run(starter.arg(format!("echo done > {}", world.path("done").display())));
    assert!(output.status.success(), "{}", text(&output));
    in_line(&world, 1);
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(line(&world).len(), 1);
    drop(first);
    assert_eq!(written(&world, "done"), "done");
    wait_for("the end of the wrapper", IN_TIME, || world.leases().is_empty());
    assert_nothing_left_for_gc(&world, "in the end");
}

#[test]
fn a_request_that_the_driver_holds_up_can_be_interrupted() {
    let world = World::new(&[A30]);
    let output = world.migctl(&["run", "4g.24gb", "--", "true"]);
    assert!(output.status.success(), "{}", text(&output));
    let first = Holder::start(&world, "4g.24gb");
    let gi = world.instances()[0]["id"].to_string();
    world.sim("hold", &["--gpu", "0", "--gi", &gi]);
    drop(first);
    // What has ended is still in use: a request without --wait is patient for ten seconds.
    let wrapper = piped(&mut migctl(&world, &["run", "1g.6gb", "--", "true"]));
    wait_for("a try", IN_TIME, || world.lease()["state"] == "releasing");
    let begun = Instant::now();
    std::thread::sleep(Duration::from_millis(500));
    signal(wrapper.id(), Signal::SIGTERM);
    assert_eq!(end_of(wrapper).status.signal(), Some(Signal::SIGTERM as i32));
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    world.sim("unhold", &["--gpu", "0", "--gi", &gi]);
    assert_nothing_left_for_gc(&world, "in the end");
}
