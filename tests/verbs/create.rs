//! `migctl create`, and what containers get of what is kept.

use serde_json::{Value, json};

use crate::common::{World, config, text};
use crate::{asked, code, document, shown, snapshot, stdout};

fn seeded(boards: &[&str]) -> World {
    World::with(boards, &["--seed", "create"])
}

/// The UUID of the only compute instance of each GPU instance.
fn uuids(world: &World) -> Vec<String> {
    let uuid = |gi: &Value| gi["compute_instances"][0]["uuid"].as_str().unwrap().to_owned();
    world.instances().iter().map(uuid).collect()
}

fn states(world: &World) -> Vec<String> {
    let mut states: Vec<String> =
        world.leases().iter().map(|lease| lease["state"].as_str().unwrap().to_owned()).collect();
    states.sort();
    states
}

#[test]
fn what_is_created_is_kept_and_named() {
    let world = seeded(&["a100-sxm4-80gb", "h100-sxm-80gb"]);
    snapshot(&world, "create-dry-run", &shown(&world, &["create", "2x1g.10gb,3g.40gb", "--gpu", "0", "--dry-run"]));
    assert!(!world.path("state").exists() && world.instances().is_empty(), "a dry run makes nothing");
    snapshot(&world, "create", &shown(&world, &["create", "2x1g.10gb,3g.40gb", "--gpu", "0"]));
    assert_eq!(states(&world), ["static"; 3]);
    let made = document(&world, &["create", "1g.20gb", "--gpu", "1", "--start", "2"]);
    let slice = &made["created"][0];
    assert_eq!((&slice["gpu_index"], &slice["start"], &slice["size"]), (&json!(1), &json!(2), &json!(2)));
    assert_eq!(made["dry_run"], false);
    let uuid = slice["devices"][0]["uuid"].as_str().unwrap();
    assert!(uuids(&world).contains(&uuid.to_owned()));
    assert!(stdout(&world.migctl(&["create", "8GiB"])).contains("1g.10gb"));
    stdout(&world.migctl(&["gc"]));
    assert_eq!((states(&world), world.instances().len()), (vec!["static".to_owned(); 5], 5), "gc leaves them");
    let created = world.audit();
    assert_eq!(created.len(), 5);
    assert!(created.iter().all(|line| line["event"] == "create" && line["slices"][0]["uuid"].is_string()));
    // They have no container that could be released.
    let token = world.leases()[0]["token"].as_str().unwrap().to_owned();
    let output = world.migctl(&["release", &token]);
    assert!(code(&output) == 65 && text(&output).contains("migctl destroy"), "{}", text(&output));
}

#[test]
fn what_cannot_be_cut_is_refused_with_what_can_and_nothing_is_left() {
    let world = seeded(&["a100-sxm4-80gb"]);
    let mut said = String::new();
    for (args, exit) in [
        (&["create", "1g.5gb"][..], 65),
        (&["create", "1g.20gb", "--start", "1"], 65),
        (&["create", "2x1g.10gb", "--start", "0"], 65),
        (&["create", "3c.4g.40gb"], 65),
        (&["create", "4c.3g.40gb"], 65),
        (&["create", "1g.10gb|2g.20gb"], 65),
        (&["create", "2x7g.80gb"], 65),
        (&["create", "1g.10gb", "--gpu", "3"], 65),
        (&["create", "1g.10gb", "--gpu", "first"], 64),
        (&["create"], 64),
    ] {
        assert_eq!(code(&world.migctl(args)), exit, "{args:?}");
        if exit == 65 {
            said += &shown(&world, args);
        }
    }
    snapshot(&world, "create-refused", &said);
    world.assert_clean("after refusals");
}

#[test]
fn all_of_it_or_nothing() {
    let world = World::new(&["a100-sxm4-80gb"]);
    world.recording_runtime(0);
    let (_bundle, _init) = world.living("web", &asked("4g.40gb"));
    let output = world.migctl(&["create", "1g.10gb,3g.40gb,1g.10gb"]);
    assert!(code(&output) == 75 && text(&output).contains("container web"), "{}", text(&output));
    assert_eq!(world.instances().len(), 1);
    // Where the driver fails half-way, what was cut is taken back.
    for call in ["nvmlDeviceCreateGpuInstance*", "nvmlGpuInstanceCreateComputeInstance*"] {
        world.fault(call, &["--nth", "2", "--fail", "UNKNOWN"]);
        let output = world.migctl(&["create", "2x1g.10gb"]);
        assert!(code(&output) == 69 && text(&output).contains("Unknown Error"), "{call}: {}", text(&output));
        assert_eq!((world.instances().len(), world.leases().len()), (1, 1), "{call}");
    }
    assert_eq!(stdout(&world.migctl(&["create", "3x1g.10gb"])).matches("MIG-").count(), 5);
}

#[test]
fn a_container_gets_a_kept_slice_before_one_is_cut_and_leaves_it() {
    let world = World::new(&["a100-sxm4-80gb"]);
    world.recording_runtime(0);
    stdout(&world.migctl(&["create", "1g.10gb"]));
    let kept = uuids(&world);
    for round in ["first", "restarted"] {
        let (_bundle, web) = world.living("web", &asked("1g.10gb"));
        assert_eq!((uuids(&world), states(&world)), (kept.clone(), vec!["active".into(), "static".into()]), "{round}");
        let held = world.leases().into_iter().find(|lease| lease["state"] == "active").unwrap();
        assert_eq!((&held["slices"][0]["uuid"], &held["slices"][0]["ours"]), (&json!(kept[0]), &json!(false)));
        let row = &document(&world, &["list"])["gpus"][0]["slices"][0];
        assert_eq!((&row["state"], &row["container"]), (&json!("held"), &json!("web")), "{round}");
        // A second one is cut, and goes with its container.
        let (_bundle, second) = world.living("second", &asked("1g.10gb"));
        assert_eq!(world.instances().len(), 2, "{round}");
        drop((web, second));
        stdout(&world.migctl(&["gc"]));
        assert_eq!((uuids(&world), states(&world)), (kept.clone(), vec!["static".into()]), "{round}");
    }
    let by_name = config(json!({"mig.uuid": kept[0]}), &[]);
    let (_bundle, named) = world.living("named", &by_name);
    let bundle = world.bundle("late", &by_name);
    let output = world.shim(&["create", "--bundle", bundle.to_str().unwrap(), "late"]);
    assert!(code(&output) == 75 && text(&output).contains("is held by container named"), "{}", text(&output));
    drop(named);
    // A process that the driver lists in it is somebody's: it is passed over, and refused by name.
    let gi = world.instances()[0]["id"].to_string();
    stdout(&world.migctl(&["gc"]));
    world.sim("hold", &["--gpu", "0", "--gi", &gi, "--pid", &std::process::id().to_string()]);
    let output = world.shim(&["create", "--bundle", bundle.to_str().unwrap(), "late"]);
    assert!(code(&output) == 75 && text(&output).contains("in use by process"), "{}", text(&output));
    let (_bundle, _other) = world.living("other", &asked("1g.10gb"));
    assert_eq!(world.instances().len(), 2);
}

#[test]
fn compute_instances_share_a_gpu_instance_that_no_container_is_given() {
    let world = seeded(&["a100-sxm4-80gb"]);
    world.recording_runtime(0);
    snapshot(&world, "create-shared", &shown(&world, &["create", "2x1c.3g.40gb"]));
    let [instance] = world.instances().try_into().unwrap();
    assert_eq!(instance["compute_instances"].as_array().unwrap().len(), 2);
    let [lease] = world.leases().try_into().unwrap();
    let part = |at: usize| (lease["slices"][at]["profile_name"].clone(), lease["slices"][at]["compute_slices"].clone());
    assert_eq!([part(0), part(1)], [(json!("1c.3g.40gb"), json!(1)), (json!("1c.3g.40gb"), json!(1))]);
    let uuid = instance["compute_instances"][1]["uuid"].as_str().unwrap();
    let bundle = world.bundle("c", &config(json!({"mig.uuid": uuid}), &[]));
    let output = world.shim(&["create", "--bundle", bundle.to_str().unwrap(), "c"]);
    assert!(text(&output).contains("is one of 2 compute instances"), "{}", text(&output));
    let (_bundle, _init) = world.living("whole", &asked("3g.40gb"));
    assert_eq!(world.instances().len(), 2, "a whole one is cut for it");
    let output = world.migctl(&["cdi"]);
    assert_eq!(code(&output), 75, "no part is offered by name: {}", text(&output));
}

#[test]
fn what_a_reset_has_taken_is_kept_no_longer() {
    let world = World::new(&["a100-sxm4-80gb", "a100-sxm4-80gb"]);
    world.recording_runtime(0);
    stdout(&world.migctl(&["create", "1g.10gb", "--gpu", "0"]));
    stdout(&world.migctl(&["create", "2x1c.3g.40gb", "--gpu", "1"]));
    world.sim("reset", &["--gpu", "0"]);
    let (_bundle, init) = world.living("web", &asked("1g.10gb"));
    assert_eq!(states(&world), ["active", "static"], "the container is not given what is not there");
    drop(init);
    stdout(&world.migctl(&["gc"]));
    assert_eq!(states(&world), ["static"]);
    assert!(world.audit().iter().any(|line| line["event"] == "lost"));
    world.sim("reset", &["--gpu", "1"]);
    let done = document(&world, &["gc"]);
    assert!(done["actions"].to_string().contains("not there any more"), "{done}");
    world.assert_clean("after the resets");
}

#[test]
fn what_is_kept_no_more_takes_no_room() {
    let world = seeded(&["a100-sxm4-80gb"]);
    stdout(&world.migctl(&["create", "7g.80gb"]));
    world.sim("destroy", &["--gpu", "0", "--gi", "0"]);
    assert!(stdout(&world.migctl(&["create", "7g.80gb", "--dry-run"])).contains("7g.80gb"));
    stdout(&world.migctl(&["create", "7g.80gb"]));
    assert_eq!((states(&world), world.instances().len()), (vec!["static".to_owned()], 1));
}
