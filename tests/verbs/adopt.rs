//! `migctl adopt`.

use serde_json::{Value, json};

use crate::common::{World, text};
use crate::{asked, code, document, shown, snapshot, stdout};

fn machine() -> World {
    let world = World::with(&["a100-sxm4-80gb"], &["--seed", "adopt"]);
    world.recording_runtime(0);
    world.sim("make", &["--gpu", "0", "--profile", "1g.10gb"]);
    world
}

#[test]
fn an_adopted_slice_is_given_and_outlives_whoever_gets_it() {
    let world = machine();
    let foreign = world.instances();
    let uuid = foreign[0]["compute_instances"][0]["uuid"].as_str().unwrap().to_owned();
    let uuid = uuid.as_str();
    let (_bundle, other) = world.living("before", &asked("1g.10gb"));
    assert_eq!(world.instances().len(), 2, "a foreign one is not taken");
    drop(other);
    stdout(&world.migctl(&["gc"]));
    let adopted = document(&world, &["adopt", uuid]);
    assert_eq!(adopted["slices"][0]["outcome"], "adopted", "{adopted}");
    let lease = world.lease();
    assert_eq!((&lease["state"], &lease["holder"]["way"]), (&json!("static"), &json!("adopt")));
    assert_eq!(lease["slices"][0]["ours"], false);
    let (_bundle, init) = world.living("web", &asked("1g.10gb"));
    assert_eq!(world.instances(), foreign);
    drop(init);
    stdout(&world.migctl(&["gc"]));
    assert_eq!((world.instances(), world.leases().len()), (foreign.clone(), 1));
    // Given up while somebody has it: he keeps it, and it is foreign afterwards.
    let (_bundle, init) = world.living("web", &asked("1g.10gb"));
    snapshot(&world, "adopt-undo", &shown(&world, &["adopt", "--undo", "--all"]));
    assert_eq!(world.lease()["state"], "active");
    // And adopted again at that.
    stdout(&world.migctl(&["adopt", uuid]));
    drop(init);
    stdout(&world.migctl(&["gc"]));
    assert_eq!((world.instances(), world.lease()["state"].clone()), (foreign, json!("static")));
    stdout(&world.migctl(&["destroy", uuid]));
    world.assert_clean("after destroy, which ends an adopted one too");
}

#[test]
fn all_that_can_be_is_adopted_and_the_rest_is_named() {
    let world = machine();
    world.sim("make", &["--gpu", "0", "--profile", "1g.10gb", "--no-ci"]);
    let (_bundle, _init) = world.living("web", &asked("1g.10gb"));
    snapshot(&world, "adopt-all", &shown(&world, &["adopt", "--all"]));
    let mut states: Vec<Value> = world.leases().iter().map(|lease| lease["state"].clone()).collect();
    states.sort_by_key(Value::to_string);
    assert_eq!(states, [json!("active"), json!("static")]);
    // By name it is a failure.
    let held = world.leases().into_iter().find(|lease| lease["state"] == "active").unwrap();
    let held = held["slices"][0]["uuid"].as_str().unwrap().to_owned();
    let output = world.migctl(&["adopt", &held]);
    assert!(code(&output) == 75 && text(&output).contains("was cut for container web"), "{}", text(&output));
    assert_eq!(code(&world.migctl(&["adopt"])), 64);
    let created = document(&world, &["create", "2g.20gb"]);
    let created = created["created"][0]["devices"][0]["uuid"].as_str().unwrap();
    let output = world.migctl(&["adopt", "--undo", created]);
    assert!(code(&output) == 65 && text(&output).contains("migctl destroy"), "{}", text(&output));
}

#[test]
fn a_busy_one_is_adopted_and_given_when_it_is_free() {
    let world = machine();
    let gi = world.instances()[0]["id"].to_string();
    world.sim("hold", &["--gpu", "0", "--gi", &gi, "--pid", &std::process::id().to_string()]);
    stdout(&world.migctl(&["adopt", &format!("0/{gi}")]));
    let (_bundle, first) = world.living("first", &asked("1g.10gb"));
    assert_eq!(world.instances().len(), 2, "another one was cut");
    world.sim("unhold", &["--gpu", "0", "--gi", &gi]);
    let (_bundle, _second) = world.living("second", &asked("1g.10gb"));
    assert_eq!(world.instances().len(), 2, "it is free now");
    drop(first);
}
