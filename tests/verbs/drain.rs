//! `migctl drain`.

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::common::{World, binaries, installed, skip, text, wait_for};
use crate::{asked, code, document, schema, shown, snapshot, stdout};

const SOON: Duration = Duration::from_secs(20);

fn machine() -> World {
    let world = World::with(&["a100-sxm4-80gb", "a100-sxm4-80gb"], &["--seed", "drain"]);
    world.recording_runtime(0);
    world
}

fn drain(world: &World, args: &[&str]) -> Child {
    let mut command = Command::new(binaries().join("migctl"));
    command.arg("--config").arg(world.config()).arg("drain").args(args);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

fn cordoned(world: &World) -> bool {
    world.path("state/cordons.json").exists()
}

#[test]
fn it_waits_for_the_last_one_and_gives_back_what_has_ended() {
    let world = machine();
    stdout(&world.migctl(&["create", "1g.10gb", "--gpu", "0"]));
    let (_bundle, web) = world.living("web", &asked("1g.10gb"));
    let (_bundle, db) = world.living("db", &asked("2g.20gb"));
    assert!(world.leases().iter().all(|lease| lease["slices"][0]["gpu_index"] == 0));
    let child = drain(&world, &["0", "--reason", "fan change"]);
    wait_for("the cordon", SOON, || cordoned(&world));
    drop(web);
    wait_for("what has ended is given back", SOON, || world.leases().len() == 2);
    drop(db);
    let output = child.wait_with_output().unwrap();
    assert_eq!(stdout(&output), "GPU 0 (NVIDIA A100-SXM4-80GB) is drained; migctl uncordon 0 opens it again\n");
    assert_eq!(world.lease()["state"], "static", "what is kept stays");
    let (_bundle, _init) = world.living("late", &asked("1g.10gb"));
    let on = world.leases().into_iter().find(|lease| lease["state"] == "active").unwrap();
    assert_eq!(on["slices"][0]["gpu_index"], 1, "it stays cordoned");
    assert_eq!(document(&world, &["drain", "0"])["gpus"][0]["remaining"], json!([]));
}

#[test]
fn who_is_left_is_named_when_time_is_up() {
    let world = machine();
    let (_bundle, init) = world.living("web", &asked("1g.10gb"));
    world.sim("make", &["--gpu", "0", "--profile", "2g.20gb"]);
    let foreign = world.instances().iter().find(|gi| gi["profile"] == "2g.20gb").unwrap()["id"].to_string();
    let me = std::process::id();
    world.sim("hold", &["--gpu", "0", "--gi", &foreign, "--pid", &me.to_string()]);
    let started = Instant::now();
    let output = world.migctl(&["drain", "0", "--wait", "1s"]);
    assert!(started.elapsed() >= Duration::from_secs(1));
    let said = text(&output);
    assert!(code(&output) == 75 && output.stderr.is_empty(), "{said}");
    for part in ["stays cordoned", "container web in 0/", &format!("process {me} (verbs"), &format!("in 0/{foreign}")] {
        assert!(said.contains(part), "{part}: {said}");
    }
    let output = world.migctl(&["drain", "0", "--wait", "0s", "--json"]);
    let left: Value = serde_json::from_slice(&output.stdout).unwrap();
    schema("drain", &left);
    assert_eq!(code(&output), 75);
    let remaining = left["gpus"][0]["remaining"].as_array().unwrap();
    assert_eq!(remaining.len(), 2, "{left:#}");
    assert_eq!((&remaining[0]["container"], &remaining[0]["pid"]), (&json!("web"), &json!(init.pid())));
    assert_eq!(remaining[1]["pid"], me);
    assert_eq!(code(&world.migctl(&["drain", "0", "--wait", "soon"])), 64);
}

#[test]
fn an_interrupt_leaves_it_cordoned_and_says_so() {
    let world = machine();
    let (_bundle, _init) = world.living("web", &asked("1g.10gb"));
    let child = drain(&world, &["0"]);
    wait_for("the cordon", SOON, || cordoned(&world));
    std::thread::sleep(Duration::from_millis(300)); // past the moment in which a signal is not caught yet
    let pid = nix::unistd::Pid::from_raw(child.id().cast_signed());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).unwrap();
    let output = child.wait_with_output().unwrap();
    let said = text(&output);
    assert!(code(&output) == 130 && said.contains("interrupted; GPU 0") && said.contains("stays cordoned"), "{said}");
    assert!(cordoned(&world) && world.leases().len() == 1);
}

#[test]
fn a_terminal_shows_who_is_waited_for() {
    if !installed("script") {
        return skip("a_terminal_shows_who_is_waited_for", "no script (util-linux)");
    }
    let world = machine();
    let (_bundle, _init) = world.living("web", &asked("1g.10gb"));
    let command =
        format!("{} --config {} drain 0 --wait 1s", binaries().join("migctl").display(), world.config().display());
    let output = Command::new("script").args(["-qec", &command, "/dev/null"]).stdin(Stdio::null()).output().unwrap();
    let said = text(&output);
    assert!(said.contains("\r\u{1b}[Kwaiting for container web"), "{said:?}");
}

#[test]
fn what_people_see() {
    let world = machine();
    let (_bundle, init) = world.living("web", &asked("1g.10gb"));
    stdout(&world.migctl(&["gc"])); // which learns of its first process
    let left = shown(&world, &["drain", "0", "--wait", "1s"]);
    drop(init);
    let drained = shown(&world, &["drain", "0"]);
    snapshot(&world, "drain", &format!("{left}\n{drained}").replace(&std::process::id().to_string(), "[pid]"));
}
