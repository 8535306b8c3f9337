//! `migctl uncordon`.

use serde_json::json;

use crate::common::World;
use crate::{asked, document, shown, snapshot, stdout};

#[test]
fn what_is_open_again_gets_containers() {
    let world = World::new(&["a100-sxm4-80gb", "a100-sxm4-80gb"]);
    world.recording_runtime(0);
    stdout(&world.migctl(&["cordon", "0"]));
    snapshot(&world, "uncordon", &shown(&world, &["uncordon", "all"]));
    let (_bundle, _init) = world.living("web", &asked("1g.10gb"));
    let again = document(&world, &["uncordon", "0"]);
    assert_eq!((&again["gpus"][0]["changed"], &again["gpus"][0]["cordoned"]), (&json!(false), &json!(false)));
    let events: Vec<_> = world.audit().iter().map(|line| line["event"].clone()).collect();
    assert_eq!(events, ["cordon", "uncordon", "grant"]);
}
