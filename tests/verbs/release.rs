//! `migctl release`.

use std::os::unix::net::UnixDatagram;

use serde_json::{Value, json};

use crate::common::{World, text};
use crate::{asked, code, document, schema, shown, snapshot, stdout};

#[test]
fn release_is_for_containers_that_have_ended() {
    let world = World::new(&["a100-sxm4-80gb"]);
    world.recording_runtime(0);
    let (_bundle, init) = world.living("c1", &asked("1g.10gb"));
    let token = world.lease()["token"].as_str().unwrap().to_owned();
    for name in ["c1", &token, &token[..8]] {
        let output = world.migctl(&["release", name]);
        assert_eq!(code(&output), 77, "{}", text(&output));
        assert!(text(&output).contains("container c1 is alive"), "{}", text(&output));
    }
    snapshot(&world, "release-alive", &shown(&world, &["release", "c1"]));
    assert_eq!(world.instances().len(), 1);
    drop(init);
    let journal = UnixDatagram::bind(world.path("log.sock")).unwrap();
    journal.set_nonblocking(true).unwrap();
    let answer = document(&world, &["release", "c1"]);
    let mut line = [0; 4096];
    let length = journal.recv(&mut line).expect("a release by hand is in the journal, too");
    assert!(String::from_utf8_lossy(&line[..length]).contains("\"event\":\"release\""));
    assert_eq!(answer, json!({"version": 1, "token": token, "outcome": "done"}));
    world.assert_clean("after release");
    let audit = world.audit();
    assert_eq!(audit.len(), 2, "{audit:#?}");
    assert_eq!((&audit[1]["event"], &audit[1]["token"]), (&json!("release"), &json!(token)));
    snapshot(&world, "release-unknown", &shown(&world, &["release", "c1"]));
}

#[test]
fn release_takes_a_beginning_that_fits_only_one() {
    let world = World::new(&["a100-sxm4-80gb"]);
    world.recording_runtime(0);
    let (_b, first) = world.living("train-1", &asked("1g.10gb"));
    let (_b, second) = world.living("train-2", &asked("1g.10gb"));
    let (_b, third) = world.living("web", &asked("1g.10gb"));
    drop((first, second, third));
    snapshot(&world, "release-ambiguous", &shown(&world, &["release", "train"]));
    let output = world.migctl(&["release", ""]);
    assert!(code(&output) == 65 && text(&output).contains("no lease"), "{}", text(&output));
    assert_eq!(world.leases().len(), 3);
    snapshot(&world, "release-done", &shown(&world, &["release", "we"]));
    assert!(world.leases().iter().all(|l| l["holder"]["container"] != "web"));
    assert_eq!(stdout(&world.migctl(&["release", "train-1"])).lines().count(), 1);
    assert_eq!(world.lease()["holder"]["container"], "train-2");
    assert_eq!(world.instances().len(), 1);
}

#[test]
fn release_of_what_the_driver_calls_in_use_is_finished_later() {
    let world = World::new(&["a100-sxm4-80gb"]);
    world.recording_runtime(0);
    drop(world.living("c1", &asked("1g.10gb")));
    let gi = world.instances()[0]["id"].to_string();
    world.sim("hold", &["--gpu", "0", "--gi", &gi]);
    let output = world.migctl(&["release", "c1", "--json"]);
    assert_eq!(code(&output), 75, "{}", text(&output));
    let answer: Value = serde_json::from_slice(&output.stdout).unwrap();
    schema("release", &answer);
    assert_eq!(answer["outcome"], "busy");
    snapshot(&world, "release-busy", &shown(&world, &["release", "c1"]));
    world.sim("unhold", &["--gpu", "0", "--gi", &gi]);
    assert_eq!(document(&world, &["release", "c1"])["outcome"], "done");
    world.assert_clean("after release");
}
