//! `migctl cordon`.

use serde_json::json;

use crate::common::{DEMO, World, text};
use crate::{asked, code, document, shown, snapshot, stdout};

#[test]
fn a_cordoned_gpu_gets_no_new_containers_and_keeps_those_it_has() {
    let world = World::with(&DEMO, &["--seed", "cordon"]);
    world.recording_runtime(0);
    let (_bundle, _init) = world.living("before", &asked("7g.80gb"));
    let at = world.lease()["slices"][0]["gpu_index"].to_string();
    assert_eq!(at, "0");
    snapshot(&world, "cordon", &shown(&world, &["cordon", "0", "2", "--reason", "fan change"]));
    let (_bundle, _second) = world.living("second", &asked("7g.80gb"));
    let on: Vec<_> = world.leases().iter().map(|lease| lease["slices"][0]["gpu_index"].clone()).collect();
    assert!(on.contains(&json!(1)) && !on.contains(&json!(2)), "{on:?}");
    let refused = |config| {
        let bundle = world.bundle("refused", &config);
        let output = world.shim(&["create", "--bundle", bundle.to_str().unwrap(), "refused"]);
        assert_eq!(code(&output), 75, "{}", text(&output));
        text(&output)
    };
    let mut by_name = asked("1g.10gb");
    by_name["annotations"]["mig.gpu"] = json!("2");
    let said = refused(by_name);
    assert!(said.contains("is cordoned (fan change); migctl uncordon 2 opens it again"), "{said}");
    stdout(&world.migctl(&["cordon", "all"]));
    assert!(refused(asked("1g.10gb")).contains("cordoned"), "all of them");
    // An administrator who names it may cut there; a slice that is kept there goes to nobody.
    let output = world.migctl(&["create", "1g.10gb"]);
    assert!(code(&output) == 75 && text(&output).contains("cordoned"), "{}", text(&output));
    stdout(&world.migctl(&["create", "1g.10gb", "--gpu", "2"]));
    assert!(refused(asked("1g.10gb")).contains("cordoned"), "the kept one is on a cordoned GPU");

    let again = document(&world, &["cordon", "2", "--reason", "fan change"]);
    assert_eq!((&again["gpus"][0]["changed"], &again["gpus"][0]["cordoned"]), (&json!(false), &json!(true)));
    assert_eq!(document(&world, &["cordon", "2", "--reason", "other"])["gpus"][0]["changed"], true);
    assert_eq!(world.audit().iter().filter(|line| line["event"] == "cordon").count(), 4);
    for args in [&["cordon"][..], &["cordon", "x"], &["cordon", "0", "--reason", "two\nlines"]] {
        assert_eq!(code(&world.migctl(args)), 64, "{args:?}");
    }
    assert_eq!(code(&world.migctl(&["cordon", "7"])), 65);
}
