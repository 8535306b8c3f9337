//! `migctl reserve`.

use std::os::unix::fs::MetadataExt;

use serde_json::{Value, json};

use crate::common::{World, config, skip, text};
use crate::{asked, code, document, shown, snapshot, stdout};

/// The user whose containers those of these tests are.
fn me() -> u32 {
    mig_hook::host::user(std::process::id()).unwrap()
}

/// A machine, where device nodes can be made.
fn machine(what: &str) -> Option<World> {
    let world = World::with(&["a100-sxm4-80gb"], &["--seed", "reserve"]);
    world.recording_runtime(0);
    if !world.path("m/dev/nvidia0").exists() {
        skip(what, "no device nodes can be made here");
        return None;
    }
    Some(world)
}

/// Owner and mode of the nodes of a lease's capabilities.
fn nodes(world: &World, lease: &Value) -> Vec<(u32, u32)> {
    let minors = ["gi_minor", "ci_minor"].map(|key| lease["slices"][0][key].as_u64().unwrap());
    let node = |minor| {
        let meta = world.path(&format!("m/dev/nvidia-caps/nvidia-cap{minor}")).symlink_metadata().unwrap();
        (meta.uid(), meta.mode() & 0o777)
    };
    minors.map(node).to_vec()
}

fn kept(world: &World) -> Value {
    world.leases().into_iter().find(|lease| lease["state"] == "static").unwrap()
}

#[test]
fn one_users_containers_get_it_and_nobody_else() {
    let Some(world) = machine("one_users_containers_get_it_and_nobody_else") else { return };
    let other = me() + 4242;
    stdout(&world.migctl(&["create", "1g.10gb"]));
    let reserved = document(&world, &["reserve", "1g.10gb", "--uid", &other.to_string()]);
    assert_eq!((&reserved["uid"], world.instances().len()), (&json!(other), 1), "the free kept one");
    assert_eq!(kept(&world)["reserved_for"], other);
    assert_eq!(nodes(&world, &kept(&world)), [(other, 0o400), (other, 0o400)]);
    let uuid = reserved["slices"][0]["devices"][0]["uuid"].as_str().unwrap().to_owned();

    let (_bundle, _init) = world.living("stranger", &asked("1g.10gb"));
    assert_eq!(world.instances().len(), 2, "a stranger's is cut");
    let bundle = world.bundle("named", &config(json!({"mig.uuid": uuid}), &[]));
    let output = world.shim(&["create", "--bundle", bundle.to_str().unwrap(), "named"]);
    let refused = format!("is reserved for uid {other}");
    assert!(code(&output) == 75 && text(&output).contains(&refused), "{}", text(&output));

    // As if nvidia-modprobe had opened them: the next look closes them.
    let minor = kept(&world)["slices"][0]["gi_minor"].to_string();
    let path = world.path(&format!("m/dev/nvidia-caps/nvidia-cap{minor}"));
    std::os::unix::fs::chown(&path, Some(0), Some(0)).unwrap();
    stdout(&world.migctl(&["gc"]));
    assert_eq!(nodes(&world, &kept(&world)), [(other, 0o400), (other, 0o400)]);

    let output = world.migctl(&["reserve", &uuid, "--uid", &me().to_string()]);
    assert!(code(&output) == 75 && text(&output).contains("--end"), "{}", text(&output));
    snapshot(&world, "reserve-end", &shown(&world, &["reserve", &uuid, "--end"]));
    assert_eq!(nodes(&world, &kept(&world)), [(0, 0o444), (0, 0o444)]);
    assert!(kept(&world)["reserved_for"].is_null());
    let (_bundle, _init) = world.living("late", &asked("1g.10gb"));
    assert_eq!(world.instances().len(), 2, "it is for everybody again");
    let output = world.migctl(&["reserve", &uuid, "--uid", &other.to_string()]);
    assert!(code(&output) == 75 && text(&output).contains("held by container late"), "{}", text(&output));
}

#[test]
fn a_user_gets_the_own_one_first() {
    let Some(world) = machine("a_user_gets_the_own_one_first") else { return };
    stdout(&world.migctl(&["create", "1g.10gb"]));
    stdout(&world.migctl(&["adopt", "--all"]));
    let made = document(&world, &["reserve", "1g.10gb,1g.10gb", "--uid", &me().to_string()]);
    assert_eq!((made["slices"].as_array().unwrap().len(), world.instances().len()), (2, 2), "one is cut");
    stdout(&world.migctl(&["create", "1g.10gb"]));
    assert_eq!(world.instances().len(), 3);
    let own: Vec<&str> =
        made["slices"].as_array().unwrap().iter().map(|s| s["devices"][0]["uuid"].as_str().unwrap()).collect();
    let (_bundle, _first) = world.living("first", &asked("1g.10gb"));
    let (_bundle, _second) = world.living("second", &asked("1g.10gb"));
    let active: Vec<Value> = world.leases().into_iter().filter(|lease| lease["state"] == "active").collect();
    assert!(active.iter().all(|lease| own.contains(&lease["slices"][0]["uuid"].as_str().unwrap())), "{active:#?}");
}

#[test]
fn what_has_gone_leaves_no_node_to_its_user() {
    let Some(world) = machine("what_has_gone_leaves_no_node_to_its_user") else { return };
    let uid = "4242";
    for end in ["destroy", "reset", "give-up"] {
        if end == "give-up" {
            world.sim("make", &["--gpu", "0", "--profile", "2g.20gb"]);
            stdout(&world.migctl(&["adopt", "--all"]));
        }
        snapshot(&world, "reserve", &shown(&world, &["reserve", "2g.20gb", "--uid", uid]));
        let lease = kept(&world);
        assert_eq!(nodes(&world, &lease), [(4242, 0o400), (4242, 0o400)]);
        match end {
            "destroy" => drop(stdout(&world.migctl(&["destroy", "--all"]))),
            "reset" => {
                world.sim("reset", &["--gpu", "0"]);
                stdout(&world.migctl(&["gc"]));
            }
            _ => drop(stdout(&world.migctl(&["adopt", "--undo", "--all"]))),
        }
        assert_eq!(nodes(&world, &lease), [(0, 0o444), (0, 0o444)], "after {end}");
        assert_eq!(world.leases(), Vec::<Value>::new(), "after {end}");
    }
}

#[test]
fn what_cannot_be_reserved_is_refused() {
    let Some(world) = machine("what_cannot_be_reserved_is_refused") else { return };
    world.sim("make", &["--gpu", "0", "--profile", "1g.10gb"]);
    let foreign = world.instances()[0]["compute_instances"][0]["uuid"].as_str().unwrap().to_owned();
    let mut said = String::new();
    for (args, exit) in [
        (&["reserve", &foreign, "--uid", "4242"][..], 65),
        (&["reserve", "2x1c.3g.40gb", "--uid", "4242"], 65),
        (&["reserve", "1g.5gb", "--uid", "4242"], 65),
        (&["reserve", "1g.10gb", "--end"], 64),
    ] {
        assert_eq!(code(&world.migctl(args)), exit, "{args:?}");
        said += &shown(&world, args);
    }
    snapshot(&world, "reserve-refused", &said);
    assert_eq!(code(&world.migctl(&["reserve", "1g.10gb", "--uid", "no-such-user-here"])), 64);
    assert_eq!(code(&world.migctl(&["reserve", "1g.10gb"])), 64);
    assert_eq!((world.leases(), world.instances().len()), (vec![], 1));
}
