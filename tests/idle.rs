//! `slices.idle_ttl`: what ended containers leave for the next ones, by the shipped binaries on a simulated machine.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::time::Duration;

use common::{World, config, state, text, token_in, wait_for};
use serde_json::{Value, json};

const A30: &str = "a30-24gb";

fn machine(ttl: &str, boards: &[&str]) -> World {
    let world = World::new(boards);
    world.settings(&format!("[slices]\nidle_ttl = \"{ttl}\""));
    world
}

/// A container from its start to its end, which leaves its slices.
fn live_and_end(world: &World, annotations: Value) {
    let token = start(world, annotations);
    end(world, &token);
}

fn start(world: &World, annotations: Value) -> String {
    let output = world.hook(&["precreate"], config(annotations, &[]).to_string().as_bytes());
    assert!(output.status.success(), "{}", text(&output));
    token_in(&output.stdout)
}

fn end(world: &World, token: &str) {
    let output = world.hook(&["poststop", "--lease", token], &state("c", 0, &world.path("bundle")));
    assert!(output.status.success(), "{}", text(&output));
}

/// State and profiles of each lease, sorted.
fn standing(world: &World) -> Vec<(String, String)> {
    let leases = world.assert_consistent(&[], "now");
    let one = |lease: &Value| {
        let slices = lease["slices"].as_array().unwrap().iter().map(|s| s["profile_name"].as_str().unwrap());
        (lease["state"].as_str().unwrap().to_owned(), slices.collect::<Vec<_>>().join(","))
    };
    let mut standing: Vec<_> = leases.iter().map(one).collect();
    standing.sort();
    standing
}

fn are(expected: &[(&str, &str)]) -> Vec<(String, String)> {
    expected.iter().map(|(state, profile)| ((*state).to_owned(), (*profile).to_owned())).collect()
}

fn ask(profile: &str) -> Value {
    json!({"mig.profile": profile})
}

#[test]
fn the_next_of_a_profile_gets_what_is_there_and_nothing_is_cut() {
    let world = machine("1h", &[A30]);
    live_and_end(&world, ask("2g.12gb"));
    assert_eq!(standing(&world), are(&[("idle", "2g.12gb")]));
    let (before, idle) = (world.instances(), world.lease()["token"].clone());
    world.fault("nvmlDeviceCreateGpuInstance*", &["--nth", "1", "--fail", "UNKNOWN"]);
    let token = start(&world, ask("2g.12gb"));
    let lease = world.lease();
    assert_eq!((lease["token"].as_str().unwrap(), &lease["state"]), (token.as_str(), &json!("active")));
    assert_eq!((world.instances(), lease["slices"][0]["ours"].clone()), (before, json!(true)));
    end(&world, &token);
    assert_eq!(standing(&world), are(&[("idle", "2g.12gb")]), "again");
    assert_ne!(world.lease()["token"], idle);
    // The ended container's hooks come late, or twice.
    end(&world, &token);
    assert_eq!(standing(&world), are(&[("idle", "2g.12gb")]));
    let late = world.hook(&["createRuntime", "--lease", &token], &state("c", std::process::id(), &world.path("b")));
    assert!(!late.status.success(), "{}", text(&late));
}

#[test]
fn several_slices_are_each_for_itself() {
    let world = machine("1h", &[A30]);
    live_and_end(&world, ask("2x1g.6gb,2g.12gb"));
    assert_eq!(standing(&world), are(&[("idle", "1g.6gb"), ("idle", "1g.6gb"), ("idle", "2g.12gb")]));
    let one = start(&world, ask("1g.6gb"));
    assert_eq!(standing(&world), are(&[("active", "1g.6gb"), ("idle", "1g.6gb"), ("idle", "2g.12gb")]));
    end(&world, &one);
}

#[test]
fn what_is_idle_goes_when_its_room_is_needed_the_smallest_first_and_no_more() {
    let world = machine("1h", &[A30, A30]);
    let tokens: Vec<String> = ["2g.12gb", "1g.6gb", "1g.6gb"]
        .iter()
        .map(|profile| start(&world, json!({"mig.profile": profile, "mig.gpu": "0"})))
        .collect();
    let other = start(&world, json!({"mig.profile": "4g.24gb", "mig.gpu": "1"}));
    tokens.iter().for_each(|token| end(&world, token));
    let plan = world.document(&["plan", "2g.12gb+me"]);
    assert_eq!((&plan["outcome"], plan["freed_first"].as_array().unwrap().len()), (&json!("fits"), 2), "{plan:#}");
    let token = start(&world, ask("2g.12gb+me"));
    assert_eq!(
        standing(&world),
        are(&[("active", "2g.12gb+me"), ("active", "4g.24gb"), ("idle", "2g.12gb")]),
        "two of 1g go before one of 2g"
    );
    // Who could be served without loses nothing to nobody.
    assert!(!world.hook(&["precreate"], config(ask("4g.24gb"), &[]).to_string().as_bytes()).status.success());
    assert_eq!(standing(&world).len(), 3, "nothing is evicted for one who gets nothing all the same");
    end(&world, &token);
    end(&world, &other);
}

#[test]
fn it_goes_when_its_time_is_over() {
    let world = machine("1s", &[A30]);
    live_and_end(&world, ask("2g.12gb"));
    wait_for("the end of its time", Duration::from_secs(10), || {
        assert!(world.migctl(&["gc"]).status.success());
        world.leases().is_empty()
    });
    world.assert_clean("after its time");
}

#[test]
fn it_is_in_nobodys_way() {
    let world = machine("1h", &[A30]);
    let free = || -> Vec<Value> {
        let profiles = world.document(&["profiles"])["gpus"][0]["profiles"].clone();
        profiles.as_array().unwrap().iter().map(|profile| profile["free"].clone()).collect()
    };
    let before = free();
    live_and_end(&world, ask("4g.24gb"));
    assert_eq!(free(), before, "as free as before");
    let list = world.document(&["list"]);
    assert_eq!(list["gpus"][0]["slices"][0]["state"], "idle", "{list:#}");
    assert!(world.migctl(&["create", "1g.6gb", "--dry-run"]).status.success());
    assert!(world.migctl(&["create", "1g.6gb"]).status.success());
    assert_eq!(standing(&world), are(&[("static", "1g.6gb")]));
    assert!(world.migctl(&["destroy", "--all"]).status.success());
    live_and_end(&world, ask("4g.24gb"));
    assert!(world.migctl(&["mode", "off", "0"]).status.success() || world.leases().is_empty());
    world.assert_clean("after a change of the mode");
}

#[test]
fn what_is_not_surely_empty_or_on_a_closed_gpu_is_destroyed() {
    let world = machine("1h", &[A30]);
    let token = start(&world, ask("2g.12gb"));
    assert!(world.migctl(&["cordon", "0"]).status.success());
    end(&world, &token);
    world.assert_clean("on a cordoned GPU");
    assert!(world.migctl(&["uncordon", "0"]).status.success());
    // Given back by hand.
    live_and_end(&world, ask("2g.12gb"));
    let idle = world.lease()["token"].as_str().unwrap().to_owned();
    assert!(world.migctl(&["release", &idle]).status.success());
    world.assert_clean("after migctl release");
    // Somebody is in it.
    live_and_end(&world, ask("2g.12gb"));
    let gi = world.lease()["slices"][0]["gi"].to_string();
    world.sim("hold", &["--gpu", "0", "--gi", &gi, "--pid", &std::process::id().to_string()]);
    let token = start(&world, ask("2g.12gb"));
    assert_ne!(
        world.leases().iter().find(|l| l["token"] == token.as_str()).unwrap()["slices"][0]["gi"].to_string(),
        gi
    );
}
