//! What migctl cuts, destroys and keeps for itself; several slices at once; and a create whose engine lives on.

use std::process::Output;

use serde_json::{Value, json};

use crate::common::{config, text, token_in};
use crate::points::has_strace;
use crate::stage::{Act, Stage, Way, is_killed};
use crate::tries::{Least, Recovery, kill_everywhere};

const CHANGES: Least = Least { system: 12, driver: 60, changes: 2 };

fn stage(what: &str) -> Option<Stage> {
    has_strace(what).then(|| Stage::new(Way::Podman, false))?
}

impl Stage {
    fn must(&self, args: &[&str]) -> Output {
        let output = self.world.migctl(args);
        assert!(output.status.success(), "{args:?}: {}", text(&output));
        output
    }

    /// gc; or a container that may find no room, and ends.
    fn recover(&self, recovery: Recovery, profile: &str, when: &str) {
        if recovery == Recovery::Gc {
            return self.gc(when);
        }
        let output = self.world.orphaned_precreate(&config(json!({"mig.profile": profile}), &[]));
        match output.status.code() {
            Some(0) => self.end_of(&token_in(&output.stdout), when),
            code => assert_eq!(code, Some(75), "{when}: {}", text(&output)),
        }
    }

    fn end_of(&self, token: &str, when: &str) {
        let state = crate::common::state("c1", 0, &self.world.path("bundle"));
        let output = self.world.hook(&["poststop", "--lease", token], &state);
        assert!(output.status.success(), "{when}: {}", text(&output));
    }

    /// Everything on the GPU is foreign or kept by one record that says what it is, and nothing else is recorded.
    fn assert_kept(&self, when: &str) -> usize {
        let leases = self.others();
        assert!(leases.iter().all(|lease| lease["state"] == "static"), "{when}: {leases:#?}");
        let instances = self.world.instances();
        assert_eq!(instances.len(), self.foreign.len() + leases.len(), "{when}: {instances:#?} {leases:#?}");
        for lease in &leases {
            let slices = lease["slices"].as_array().unwrap();
            let here = |gi: &&Value| gi["id"] == slices[0]["gi"] && gi["placement"] == slices[0]["placement"];
            let gi = instances.iter().find(here).unwrap_or_else(|| panic!("{when}: {lease}"));
            let uuids = |values: &[Value]| values.iter().map(|value| value["uuid"].clone()).collect::<Vec<Value>>();
            assert_eq!(uuids(gi["compute_instances"].as_array().unwrap()), uuids(slices), "{when}");
        }
        leases.len()
    }

    fn place(&self, gi: &Value) -> String {
        format!("0/{gi}")
    }

    fn destroy_all(&self) {
        for lease in self.others() {
            self.must(&["destroy", &self.place(&lease["slices"][0]["gi"])]);
        }
    }
}

fn create(request: &str, whole: usize) {
    let Some(stage) = stage(&format!("kills at create {request}")) else { return };
    kill_everywhere(
        &format!("create {request}"),
        &stage,
        CHANGES,
        || {
            stage.destroy_all();
            ((), Act::migctl(&["create", request]))
        },
        |(), recovery, when| {
            stage.check_moment(when);
            stage.recover(recovery, "2g.12gb", when);
            let kept = stage.assert_kept(when);
            assert!(kept <= whole, "{when}: {kept} kept");
        },
        |(), when| assert_eq!(stage.assert_kept(when), whole),
    );
}

/// Each has a record of its own: those before the kill may stand.
#[test]
fn create_of_several_leaves_each_whole_or_nothing() {
    create("2x1g.6gb", 2);
}

#[test]
fn create_of_parts_leaves_all_of_it_or_nothing() {
    create("2x1c.2g.12gb", 1);
}

#[test]
fn destroy_leaves_it_whole_or_gone() {
    let Some(stage) = stage("kills at destroy") else { return };
    kill_everywhere(
        "destroy",
        &stage,
        CHANGES,
        || {
            if stage.others().is_empty() {
                stage.must(&["create", "2x1c.2g.12gb"]);
            }
            ((), Act::migctl(&["destroy", &stage.place(&stage.others()[0]["slices"][0]["gi"])]))
        },
        |(), recovery, when| {
            stage.check_moment(when);
            stage.recover(recovery, "4g.24gb", when);
            stage.assert_kept(when);
        },
        |(), when| assert_eq!(stage.assert_kept(when), 0),
    );
}

#[test]
fn destroy_of_a_foreign_one_leaves_it_untouched_or_gone() {
    let Some(mut stage) = stage("kills at destroy of a foreign slice") else { return };
    stage.world.sim("destroy", &["--gpu", "0", "--gi", &stage.foreign[0]["id"].to_string()]);
    stage.foreign = vec![];
    let untouched = |when: &str| {
        assert_eq!(stage.others(), Vec::<Value>::new(), "{when}");
        let left = stage.world.instances();
        assert!(left.iter().all(|gi| gi["compute_instances"].as_array().unwrap().len() == 1), "{when}: {left:#?}");
    };
    kill_everywhere(
        "destroy of a foreign one",
        &stage,
        CHANGES,
        || {
            if stage.world.instances().is_empty() {
                stage.world.sim("make", &["--gpu", "0", "--profile", "1g.6gb"]);
            }
            ((), Act::migctl(&["destroy", &stage.place(&stage.world.instances()[0]["id"])]))
        },
        |(), recovery, when| {
            stage.recover(recovery, "4g.24gb", when);
            untouched(when);
        },
        |(), _| assert_eq!(stage.world.instances(), Vec::<Value>::new()),
    );
}

#[test]
fn adopt_leaves_a_record_or_none() {
    let Some(stage) = stage("kills at adopt") else { return };
    let place = stage.place(&stage.foreign[0]["id"]);
    kill_everywhere(
        "adopt",
        &stage,
        Least { system: 12, driver: 30, changes: 0 },
        || {
            stage.must(&["adopt", "--undo", "--all"]);
            ((), Act::migctl(&["adopt", &place]))
        },
        |(), recovery, when| {
            stage.recover(recovery, "4g.24gb", when);
            assert_eq!(stage.world.instances(), stage.foreign, "{when}");
            assert!(stage.others().iter().all(|lease| lease["state"] == "static"), "{when}");
        },
        |(), _| assert_eq!(stage.others().len(), 1),
    );
}

#[test]
fn several_slices_are_all_or_nothing() {
    let Some(stage) = stage("kills with several slices") else { return };
    let wanted = config(json!({"mig.profile": "2x1g.6gb"}), &[]).to_string().into_bytes();
    let nothing_left = |tokens: &[String], when: &str| stage.check_no_trace(tokens, when);
    kill_everywhere(
        "several slices",
        &stage,
        Least { changes: 4, ..CHANGES },
        || ((), Act::new("mig-hook", &["precreate"], wanted.clone())),
        |(), recovery, when| {
            stage.check_moment(when);
            let tokens = stage.tokens();
            // Whole, they may be half of the room of the next one.
            stage.recover(recovery, "2g.12gb", when);
            nothing_left(&tokens, when);
        },
        |(), when| {
            stage.gc(when);
            nothing_left(&[], when);
        },
    );
}

#[test]
fn a_lease_that_was_whole_when_the_hook_died_stays_while_its_owner_lives() {
    let stage = Stage::new(Way::Podman, true).unwrap();
    // This process owns it: podman may still be about to fail the create, and has not answered yet.
    stage.world.fault("nvmlShutdown", &["--kill", "before"]);
    let wanted = config(json!({"mig.profile": "2g.12gb"}), &[]);
    let output = stage.world.hook(&["precreate"], wanted.to_string().as_bytes());
    assert!(is_killed(&output), "{}", text(&output));
    stage.gc("while its owner lives");
    let leases = stage.check_settled("while its owner lives");
    assert_eq!((leases.len(), &leases[0]["state"]), (1, &json!("active")));
    stage.end_of(leases[0]["token"].as_str().unwrap(), "after its poststop");
    stage.check_no_trace(&[], "after its poststop");
}
