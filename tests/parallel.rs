//! No lock of ours is held while the driver works: what one container's start or end takes, another's does not wait for. By the
//! shipped binaries on simulated GPUs of which one call takes seconds.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use common::{World, binaries, config, feed, state, text, token_in, wait_for};
use serde_json::{Value, json};

const A30: &str = "a30-24gb";
const CREATE: &str = "nvmlDeviceCreateGpuInstance*";
const DESTROY: &str = "nvmlGpuInstanceDestroy";
/// How long the driver takes for the one call: longer than everything else in a test.
const SLOW: &str = "4000";
const IN_TIME: Duration = Duration::from_secs(30);

fn ask(profile: &str, gpu: &str) -> Value {
    config(json!({"mig.profile": profile, "mig.gpu": gpu}), &[])
}

fn precreate(world: &World, profile: &str, gpu: &str) -> Output {
    world.hook(&["precreate"], ask(profile, gpu).to_string().as_bytes())
}

fn granted(world: &World, profile: &str, gpu: &str) -> String {
    let output = precreate(world, profile, gpu);
    assert!(output.status.success(), "{}", text(&output));
    token_in(&output.stdout)
}

fn hook(world: &World, args: &[&str]) -> Command {
    let mut command = Command::new(binaries().join("mig-hook"));
    command.arg("--config").arg(world.config()).args(args);
    command
}

fn start(mut command: Command, stdin: &[u8]) -> Child {
    let input = tempfile::tempfile().unwrap();
    std::io::Write::write_all(&mut &input, stdin).unwrap();
    std::io::Seek::rewind(&mut &input).unwrap();
    command.stdin(input).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

/// One whose slice is being cut, for seconds.
fn cutting(world: &World, profile: &str, gpu: &str) -> Child {
    world.fault(CREATE, &["--nth", "1", "--delay-ms", SLOW]);
    let child = start(hook(world, &["precreate"]), ask(profile, gpu).to_string().as_bytes());
    wait_for("the slow cut", IN_TIME, || states(world).iter().any(|state| state == "pending"));
    wait_for("the driver's part of it", IN_TIME, || has_fired(world));
    child
}

/// One whose slice is being destroyed, for seconds.
fn ending(world: &World, token: &str) -> Child {
    world.fault(DESTROY, &["--nth", "1", "--delay-ms", SLOW]);
    let state = state("c", 0, &world.path("bundle"));
    let child = start(hook(world, &["poststop", "--lease", token]), &state);
    wait_for("the driver's part of the end", IN_TIME, || has_fired(world));
    child
}

fn has_fired(world: &World) -> bool {
    let faults: Value = serde_json::from_str(&world.sim("faults", &["--json"])).unwrap();
    faults["faults"].as_array().unwrap().iter().any(|fault| fault["fired"] == 1)
}

fn states(world: &World) -> Vec<String> {
    let mut states: Vec<String> =
        world.leases().iter().map(|lease| lease["state"].as_str().unwrap().to_owned()).collect();
    states.sort();
    states
}

fn finish(child: Child) -> Output {
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", text(&output));
    output
}

fn end(world: &World, token: &str) {
    let output = world.hook(&["poststop", "--lease", token], &state("c", 0, &world.path("bundle")));
    assert!(output.status.success(), "{}", text(&output));
}

#[test]
fn while_one_slice_is_cut_others_are_cut_and_destroyed() {
    let world = World::new(&[A30, A30]);
    let old = granted(&world, "1g.6gb", "1");
    let slow = cutting(&world, "2g.12gb", "0");
    let (here, there) = (granted(&world, "1g.6gb", "0"), granted(&world, "2g.12gb", "1"));
    end(&world, &old);
    // Who looks at what is there sees it, and leaves it alone.
    let gc = world.migctl(&["gc"]);
    assert!(gc.status.success() && text(&gc).contains("it is being cut"), "{}", text(&gc));
    let plan = world.migctl(&["plan", "4g.24gb"]);
    assert!(plan.status.code() == Some(75) && text(&plan).contains("a container being created"), "{}", text(&plan));
    assert_eq!(states(&world), ["active", "active", "pending"], "all of that went on meanwhile");
    let slow = token_in(&finish(slow).stdout);
    world.assert_consistent(&[], "afterwards");
    assert_eq!(states(&world), ["active", "active", "active"]);
    [slow, here, there].iter().for_each(|token| end(&world, token));
    world.assert_clean("at the end");
}

#[test]
fn while_one_slice_is_destroyed_others_are_cut_also_on_the_same_gpu() {
    let world = World::new(&[A30, A30]);
    let old = granted(&world, "2g.12gb", "0");
    let slow = ending(&world, &old);
    let (here, there) = (granted(&world, "2g.12gb", "0"), granted(&world, "2g.12gb", "1"));
    assert_eq!(states(&world), ["active", "active", "releasing"]);
    finish(slow);
    world.assert_consistent(&[], "afterwards");
    [here, there].iter().for_each(|token| end(&world, token));
    world.assert_clean("at the end");
}

#[test]
fn who_needs_the_room_of_what_is_being_destroyed_waits_for_it_and_gets_it() {
    let world = World::new(&[A30]);
    let old = granted(&world, "4g.24gb", "0");
    let slow = ending(&world, &old);
    let next = granted(&world, "4g.24gb", "0");
    finish(slow);
    end(&world, &next);
    world.assert_clean("at the end");
}

#[test]
fn room_that_is_being_cut_is_nobody_elses() {
    let world = World::new(&[A30]);
    let slow = cutting(&world, "4g.24gb", "0");
    let refused = precreate(&world, "1g.6gb", "0");
    assert_eq!(refused.status.code(), Some(75), "{}", text(&refused));
    assert!(text(&refused).contains("a container being created"), "{}", text(&refused));
    end(&world, &token_in(&finish(slow).stdout));
    world.assert_clean("at the end");
}

#[test]
fn a_second_poststop_waits_for_the_first_or_leaves_it_to_it() {
    let world = World::new(&[A30]);
    let token = granted(&world, "1g.6gb", "0");
    let slow = ending(&world, &token);
    end(&world, &token);
    finish(slow);
    world.assert_clean("at the end");
}

#[test]
fn a_cut_that_is_killed_in_the_driver_is_cleared_up_by_the_next_one() {
    let world = World::new(&[A30]);
    let mut slow = cutting(&world, "4g.24gb", "0");
    slow.kill().unwrap();
    slow.wait().unwrap();
    let next = granted(&world, "4g.24gb", "0");
    assert_eq!(world.path("state/claims").read_dir().unwrap().count(), 1, "of the one lease that there is");
    end(&world, &next);
    world.assert_clean("at the end");
    assert_eq!(world.path("state/claims").read_dir().unwrap().count(), 0);
}

#[test]
fn an_administrator_changes_things_when_nothing_is_under_way() {
    let world = World::new(&[A30, A30]);
    let slow = cutting(&world, "2g.12gb", "0");
    let created = world.migctl(&["create", "1g.6gb", "--gpu", "1"]);
    assert!(created.status.success(), "{}", text(&created));
    assert_eq!(states(&world), ["active", "static"], "it has waited");
    end(&world, &token_in(&finish(slow).stdout));
    assert_eq!(states(&world), ["static"]);
}

#[test]
fn whose_slice_is_being_cut_stands_in_no_line_and_is_back_in_its_place_if_that_fails() {
    let world = World::new(&[A30]);
    let held = granted(&world, "4g.24gb", "0");
    let waiting = |world: &World| world.document(&["queue"])["waiting"].as_array().unwrap().len();
    let wait = config(json!({"mig.profile": "2g.12gb", "mig.wait": "20s"}), &[]).to_string();
    let waiter = start(hook(&world, &["precreate"]), wait.as_bytes());
    wait_for("a place in the line", IN_TIME, || waiting(&world) == 1);
    world.fault(CREATE, &["--nth", "1", "--delay-ms", "3000"]);
    world.fault(CREATE, &["--nth", "1", "--fail", "INSUFFICIENT_RESOURCES"]);
    end(&world, &held);
    wait_for("its cut", IN_TIME, || states(&world) == ["pending"]);
    assert_eq!(waiting(&world), 0);
    // It overtakes nobody, and nobody bars it.
    let beside = feed(&mut hook(&world, &["precreate"]), ask("2g.12gb", "0").to_string().as_bytes());
    assert!(beside.status.success(), "{}", text(&beside));
    let served = token_in(&finish(waiter).stdout);
    world.assert_consistent(&[], "afterwards");
    [served, token_in(&beside.stdout)].iter().for_each(|token| end(&world, token));
    world.assert_clean("at the end");
}
