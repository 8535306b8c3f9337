//! `migctl destroy`.

use std::io::Write;
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use crate::common::{World, binaries, installed, skip, text};
use crate::{asked, code, document, schema, shown, snapshot, stdout};

fn seeded() -> World {
    let world = World::with(&["a100-sxm4-80gb"], &["--seed", "destroy"]);
    world.recording_runtime(0);
    world
}

fn gis(world: &World) -> Vec<u64> {
    world.instances().iter().map(|gi| gi["id"].as_u64().unwrap()).collect()
}

#[test]
fn every_way_to_name_what_goes() {
    let world = seeded();
    stdout(&world.migctl(&["create", "5x1g.10gb"]));
    assert_eq!(gis(&world), [7, 8, 11, 12, 13]);
    let uuid = world.instances()[4]["compute_instances"][0]["uuid"].as_str().unwrap().to_owned();
    snapshot(&world, "destroy", &shown(&world, &["destroy", "0/7", "0/7", &uuid]));
    let gone = document(&world, &["destroy", "8", "--gpu", "0"]);
    assert_eq!((&gone["slices"][0]["outcome"], &gone["slices"][0]["gi"]), (&json!("destroyed"), &json!(8)));
    assert_eq!((gis(&world), world.leases().len()), (vec![11, 12], 2));
    let mut said = String::new();
    for (args, exit) in [
        (&["destroy", "0/11", "0/7"][..], 65),
        (&["destroy", "MIG-00000000-0000-5000-8000-000000000000"], 65),
        (&["destroy", "7"], 64),
        (&["destroy", "seven"], 64),
        (&["destroy", "0/11", "--gpu", "3"], 65),
        (&["destroy", "0/11", "--all"], 64),
        (&["destroy"], 64),
    ] {
        assert_eq!(code(&world.migctl(args)), exit, "{args:?}");
        if !args.contains(&"--all") && args.len() > 1 {
            said += &shown(&world, args);
        }
    }
    snapshot(&world, "destroy-unknown", &said);
    assert_eq!(gis(&world), [11, 12], "one that is not there, and nothing is destroyed");
    stdout(&world.migctl(&["destroy", "--all"]));
    world.assert_clean("after all of it");
    assert_eq!(stdout(&world.migctl(&["destroy", "--all"])), "no GPU instances: nothing to do\n");
    let destroyed = world.audit().iter().filter(|line| line["event"] == "destroy").count();
    assert_eq!(destroyed, 5);
}

#[test]
fn one_that_is_held_stays_with_all_the_others_unless_forced() {
    let world = seeded();
    stdout(&world.migctl(&["create", "1g.10gb,2g.20gb"]));
    let (_bundle, init) = world.living("web", &asked("1g.10gb"));
    stdout(&world.migctl(&["gc"])); // which learns of its first process
    let before = (world.instances(), world.leases());
    let output = world.migctl(&["destroy", "--all"]);
    let said = text(&output);
    assert_eq!(code(&output), 75, "{said}");
    let process = format!("held by container web, process {} (sleep)", init.pid());
    assert!(said.contains(&process) && said.contains("nothing was destroyed"), "{said}");
    assert_eq!((world.instances(), world.leases()), before);

    stdout(&world.migctl(&["destroy", "--all", "--force"]));
    assert_eq!(world.instances(), Vec::<Value>::new());
    let lease = world.lease();
    assert_eq!((&lease["state"], &lease["holder"]["container"]), (&json!("quarantined"), &json!("web")));
    // Its nodes are in the container still: until that ends, nobody else gets their numbers.
    let minors = |slice: &Value| [slice["gi_minor"].clone(), slice["ci_minor"].clone()];
    let held = minors(&lease["slices"][0]);
    stdout(&world.migctl(&["gc"]));
    assert_eq!(world.lease()["state"], "quarantined", "while its first process lives");
    let output = world.migctl(&["create", "7x1g.10gb"]);
    assert_eq!(code(&output), 75, "one place of seven is not free: {}", text(&output));
    stdout(&world.migctl(&["create", "6x1g.10gb"]));
    let others: Vec<Value> = world.leases().into_iter().filter(|lease| lease["state"] == "static").collect();
    assert_eq!(others.len(), 6);
    assert!(others.iter().all(|other| !minors(&other["slices"][0]).iter().any(|minor| held.contains(minor))));
    drop(init);
    stdout(&world.migctl(&["create", "1g.10gb"]));
    assert_eq!((world.instances().len(), world.leases().len()), (7, 7));
}

#[test]
fn what_a_process_uses_is_refused_and_the_driver_has_the_last_word() {
    let world = seeded();
    stdout(&world.migctl(&["create", "1g.10gb"]));
    let (gi, me) = (world.instances()[0]["id"].to_string(), std::process::id().to_string());
    let place = format!("0/{gi}");
    world.sim("hold", &["--gpu", "0", "--gi", &gi, "--pid", &me]);
    let before = (world.instances(), world.leases());
    let output = world.migctl(&["destroy", &place]);
    assert!(code(&output) == 75 && text(&output).contains(&format!("in use by process {me}")), "{}", text(&output));
    let output = world.migctl(&["destroy", &place, "--force", "--json"]);
    assert_eq!(code(&output), 75);
    let answer: Value = serde_json::from_slice(&output.stdout).unwrap();
    schema("destroy", &answer);
    assert_eq!(answer["slices"][0]["outcome"], "unchanged", "{answer}");
    assert_eq!((world.instances(), world.leases()), before, "a kept one is kept as it was");
    world.sim("unhold", &["--gpu", "0", "--gi", &gi]);
    // Its compute instance goes, the GPU instance does not: gc goes on.
    world.fault("nvmlGpuInstanceDestroy", &["--times", "3", "--fail", "IN_USE"]);
    snapshot(&world, "destroy-half", &shown(&world, &["destroy", &place]));
    assert_eq!(world.lease()["state"], "releasing");
    stdout(&world.migctl(&["gc"]));
    world.assert_clean("after gc");
}

#[test]
fn foreign_and_half_made_ones_go_too() {
    let world = seeded();
    world.sim("make", &["--gpu", "0", "--profile", "3g.40gb"]);
    world.sim("make", &["--gpu", "0", "--profile", "1g.10gb", "--no-ci"]);
    // An agent that no list shows.
    let gi = world.instances().iter().find(|gi| gi["compute_instances"][0].is_null()).unwrap()["id"].to_string();
    world.sim("hold", &["--gpu", "0", "--gi", &gi]);
    let before = world.instances();
    let output = world.migctl(&["destroy", &format!("0/{gi}")]);
    assert!(code(&output) == 75 && text(&output).contains("unchanged"), "{}", text(&output));
    assert_eq!((world.instances(), world.leases()), (before, vec![]), "no record is left of what is not ours");
    world.sim("unhold", &["--gpu", "0", "--gi", &gi]);
    snapshot(&world, "destroy-all", &shown(&world, &["destroy", "--all", "--gpu", "0"]));
    world.assert_clean("after all of it");
}

#[test]
fn one_of_several_compute_instances_goes_alone() {
    let world = seeded();
    stdout(&world.migctl(&["create", "3x1c.3g.40gb"]));
    let computes = || world.instances()[0]["compute_instances"].as_array().unwrap().clone();
    let uuid = computes()[2]["uuid"].as_str().unwrap().to_owned();
    let output = world.migctl(&["destroy", "0/2/0", "0/2/1"]);
    assert!(code(&output) == 64 && text(&output).contains("0/2"), "{}", text(&output));
    assert_eq!(stdout(&world.migctl(&["destroy", "0/2/0"])), "destroyed 0/2 1c.3g.40gb at 4:4\n");
    assert_eq!((computes().len(), world.lease()["slices"].as_array().unwrap().len()), (2, 2));
    world.fault("nvmlComputeInstanceDestroy", &["--fail", "IN_USE"]);
    let before = (computes(), world.lease());
    assert_eq!(code(&world.migctl(&["destroy", &uuid])), 75);
    assert_eq!((computes(), world.lease()), before);
    let gone = document(&world, &["destroy", &uuid]);
    assert_eq!(gone["slices"][0]["devices"][0]["uuid"], json!(uuid));
    assert_eq!(computes().len(), 1);
    // The last one is the whole.
    stdout(&world.migctl(&["destroy", "0/2/1"]));
    world.assert_clean("after the last one");
}

#[test]
fn a_person_is_asked_before_everything_goes() {
    if !installed("script") {
        return skip("a_person_is_asked_before_everything_goes", "no script (util-linux)");
    }
    let world = seeded();
    stdout(&world.migctl(&["create", "2x1g.10gb"]));
    let answer = |line: &str| {
        let command =
            format!("{} --config {} destroy --all", binaries().join("migctl").display(), world.config().display());
        let mut child = Command::new("script")
            .args(["-qec", &command, "/dev/null"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.as_mut().unwrap().write_all(line.as_bytes()).unwrap();
        text(&child.wait_with_output().unwrap())
    };
    let said = answer("n\n");
    assert!(said.contains("destroy all of these? [y/N]") && said.contains("nothing was destroyed"), "{said}");
    assert_eq!(world.instances().len(), 2);
    answer("y\n");
    world.assert_clean("after yes");
}

#[test]
fn history_reads_what_it_says_of_a_part() {
    let world = seeded();
    stdout(&world.migctl(&["create", "2x1c.3g.40gb"]));
    let gi = gis(&world)[0];
    stdout(&world.migctl(&["destroy", &format!("0/{gi}/0")]));
    let line = world.audit().pop().unwrap();
    assert_eq!((&line["event"], &line["slices"][0]["profile"]), (&json!("destroy"), &json!("1c.3g.40gb")));
    let said = stdout(&world.migctl(&["history"]));
    assert!(!said.contains("could not be read"), "{said}");
}

#[test]
fn a_holder_whose_create_is_under_way_keeps_its_minors() {
    let world = seeded();
    let precreate = world.hook(&["precreate"], asked("1g.10gb").to_string().as_bytes());
    assert!(precreate.status.success(), "{}", text(&precreate));
    stdout(&world.migctl(&["destroy", "--all", "--force"]));
    stdout(&world.migctl(&["gc"]));
    // Its owner, this test, lives: a container may yet come of it.
    assert_eq!(world.lease()["state"], "quarantined");
}
