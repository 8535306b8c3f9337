//! `migctl gc`.

use serde_json::{Value, json};

use crate::common::{World, text};
use crate::{asked, code, document, schema, shown, snapshot};

#[test]
fn gc_says_what_it_did_with_each_lease() {
    let world = World::new(&["a100-sxm4-80gb"]);
    world.recording_runtime(0);
    let (_bundle, living) = world.living("living", &asked("1g.10gb"));
    let (_bundle, dead) = world.living("dead", &asked("1g.10gb"));
    drop(dead);
    let done = document(&world, &["gc"]);
    let mut actions: Vec<(&str, &str)> = done["actions"]
        .as_array()
        .unwrap()
        .iter()
        .map(|a| (a["container"].as_str().unwrap(), a["result"].as_str().unwrap()))
        .collect();
    actions.sort_unstable();
    assert_eq!(actions, [("dead", "freed"), ("living", "kept")]);
    assert_eq!(world.lease()["holder"]["container"], "living");
    snapshot(&world, "gc-kept", &shown(&world, &["gc"]));
    drop(living);
    // What the driver calls in use is tried again, said, and not lost.
    let gi = world.instances()[0]["id"].to_string();
    world.sim("hold", &["--gpu", "0", "--gi", &gi]);
    let output = world.migctl(&["gc", "--json"]);
    assert_eq!(code(&output), 75, "{}", text(&output));
    let busy: Value = serde_json::from_slice(&output.stdout).unwrap();
    schema("gc", &busy);
    assert_eq!(busy["actions"][0]["result"], "busy", "{busy:#}");
    snapshot(&world, "gc-busy", &shown(&world, &["gc"]));
    assert_eq!(world.lease()["state"], "releasing");
    world.sim("unhold", &["--gpu", "0", "--gi", &gi]);
    snapshot(&world, "gc-freed", &shown(&world, &["gc"]));
    world.assert_clean("after gc");
    snapshot(&world, "gc-nothing", &shown(&world, &["gc"]));
    assert_eq!(document(&world, &["gc"]), json!({"version": 1, "actions": []}));
}
