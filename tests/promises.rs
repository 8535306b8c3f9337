//! What the design promises and no other test shows. docs/reliability.md has all of it, with the test of each.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::process::Command;

use common::cgroup::Cgroup;
use common::{Init, World, binaries, config, installed, run, skip, state, text, token_in};
use serde_json::{Value, json};

const A30: &str = "a30-24gb";
/// A cgroup of the test's own has no device rules, as an engine's would.
const WITH_OPEN_RULES: &str = "[slices]\nidle_ttl = \"1h\"\n[requests]\nopen_device_rules = true";

fn granted(world: &World, profile: &str) -> String {
    let output = world.hook(&["precreate"], config(json!({"mig.profile": profile}), &[]).to_string().as_bytes());
    assert!(output.status.success(), "{}", text(&output));
    token_in(&output.stdout)
}

fn bind(world: &World, token: &str, init: &Init) {
    world.bundle("bundle", &config(json!({}), &[]));
    let output = world.hook(&["createRuntime", "--lease", token], &state("c1", init.pid(), &world.path("bundle")));
    assert!(output.status.success(), "{}", text(&output));
}

/// The lease of a container whose first process is dead, and what is left in its cgroup.
fn ended_but_for_one(world: &World, cgroup: &Cgroup) -> (String, Init) {
    world.settings(WITH_OPEN_RULES);
    let token = granted(world, "1g.6gb");
    let (init, left) = (Init::in_cgroup(cgroup), Init::in_cgroup(cgroup));
    bind(world, &token, &init);
    assert_eq!(world.lease()["holder"]["cgroup"], cgroup.path());
    (token, left)
}

#[test]
fn what_is_left_in_a_containers_cgroup_keeps_its_slice() {
    let Some(cgroup) = Cgroup::new("what is left in a container's cgroup") else { return };
    let world = World::new(&[A30]);
    let (_, left) = ended_but_for_one(&world, &cgroup);
    let actions = world.gc();
    assert!(matches!(&actions[..], [(kept, why)] if kept == "kept" && why.contains("cgroup")), "{actions:?}");
    drop(left);
    let actions = world.gc();
    assert!(matches!(&actions[..], [(freed, _)] if freed == "freed"), "{actions:?}");
    assert_eq!(world.lease()["state"], "idle");
}

#[test]
fn a_slice_is_given_again_only_when_nothing_is_left_in_the_cgroup_of_its_last_holder() {
    let Some(cgroup) = Cgroup::new("a slice that is given again") else { return };
    let world = World::new(&[A30]);
    let (token, _left) = ended_but_for_one(&world, &cgroup);
    // The runtime says that it is over. What it has not killed must not meet the next holder: the slice is cut anew.
    world.hook(&["poststop", "--lease", &token], &state("c1", 0, &world.path("bundle")));
    assert_eq!(world.leases(), Vec::<Value>::new(), "idle, though somebody may still be in it");
    world.assert_clean("after poststop");
}

/// A machine that is out of memory or descriptors must not be told from one on which everybody has died.
#[test]
fn a_first_process_that_can_not_be_looked_at_is_taken_for_alive() {
    if !installed("strace") {
        return skip("what can't be looked at", "strace is not installed");
    }
    let world = World::new(&[A30]);
    let (token, init) = (granted(&world, "1g.6gb"), Init::start());
    bind(&world, &token, &init);
    let (lease, instances) = (world.lease(), world.instances());
    let stat = format!("/proc/{}/stat", init.pid());
    for error in ["EMFILE", "ENOMEM", "EIO"] {
        let inject = format!("inject=openat:error={error}");
        let mut gc = Command::new("strace");
        gc.args(["-f", "-qqq", "-o", "/dev/null", "-P", &stat, "-e", "trace=openat", "-e", &inject]);
        let output = run(gc.arg(binaries().join("migctl")).arg("--config").arg(world.config()).arg("gc"));
        assert!(output.status.success(), "{error}: {}", text(&output));
        assert_eq!(
            (world.lease(), world.instances()),
            (lease.clone(), instances.clone()),
            "{error}: {}",
            text(&output)
        );
    }
}

#[test]
fn when_state_is_lost_every_instance_is_foreign_until_it_is_adopted() {
    let world = World::new(&[A30]);
    let (token, init) = (granted(&world, "1g.6gb"), Init::start());
    bind(&world, &token, &init);
    let there = world.instances();
    std::fs::remove_dir_all(world.path("state")).unwrap();
    let shown = || world.document(&["list"])["gpus"][0]["slices"][0]["state"].clone();
    assert_eq!((shown(), world.gc()), (json!("foreign"), vec![]));
    // Others find room beside it, or none.
    let beside = granted(&world, "1g.6gb");
    let refused = world.hook(&["precreate"], config(json!({"mig.profile": "4g.24gb"}), &[]).to_string().as_bytes());
    assert!(text(&refused).contains("not created by mig-hook"), "{}", text(&refused));
    // Its container ends, and nobody knows of it any more.
    let late = world.hook(&["poststop", "--lease", &token], &state("c1", 0, &world.path("bundle")));
    assert!(late.status.success(), "{}", text(&late));
    assert!(world.instances().contains(&there[0]), "what is not known to be ours is not destroyed");
    let adopted = world.migctl(&["adopt", &format!("0/{}", there[0]["id"])]);
    assert!(adopted.status.success(), "{}", text(&adopted));
    assert_eq!(shown(), "static");
    world.hook(&["poststop", "--lease", &beside], &state("c2", 0, &world.path("bundle")));
    let again = granted(&world, "1g.6gb");
    assert_eq!((world.instances(), world.leases().len()), (there, 2), "the adopted one is given");
    world.hook(&["poststop", "--lease", &again], &state("c2", 0, &world.path("bundle")));
}
