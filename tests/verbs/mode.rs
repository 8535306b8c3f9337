//! `migctl mode`.

use serde_json::{Value, json};

use crate::common::{World, text};
use crate::{code, document, schema, shown, snapshot, stdout};

fn off(boards: &[&str]) -> World {
    World::with(boards, &["--seed", "mode", "--mig", "off"])
}

fn mode(world: &World, gpu: usize) -> String {
    document(world, &["mode", "status"])["gpus"][gpu]["mig"].as_str().unwrap().to_owned()
}

/// Calls of SetMigMode, by the simulator.
fn asked_for(world: &World, act: impl FnOnce()) -> u64 {
    world.sim("count", &["on"]);
    act();
    let counts: Value = serde_json::from_str(&world.sim("counts", &["--json"])).unwrap();
    let text = counts.to_string();
    u64::from(text.contains("nvmlDeviceSetMigMode"))
}

#[test]
fn hopper_changes_at_once_and_ampere_at_a_reset() {
    let world = off(&["a100-sxm4-80gb", "h100-sxm-80gb"]);
    let mut said = shown(&world, &["mode", "status"]);
    said += &shown(&world, &["mode", "on", "1"]);
    said += &shown(&world, &["mode", "on", "1"]);
    said += &shown(&world, &["mode", "on", "all"]);
    assert_eq!((mode(&world, 0), mode(&world, 1)), ("enable-pending".into(), "on".into()));
    assert_eq!(asked_for(&world, || assert_eq!(code(&world.migctl(&["mode", "on", "0", "1"])), 75)), 0);
    // While it is pending, it may be taken back.
    said += &shown(&world, &["mode", "off", "0"]);
    assert_eq!(mode(&world, 0), "off");
    assert_eq!(code(&world.migctl(&["mode", "on", "0"])), 75);
    world.sim("reset", &["--gpu", "0"]);
    said += &shown(&world, &["mode", "on", "0"]);
    assert_eq!(mode(&world, 0), "on");
    said += &shown(&world, &["mode", "off", "1"]);
    snapshot(&world, "mode", &said);
    let changes: Vec<Value> =
        world.audit().iter().filter(|line| line["event"] == "mode").map(|line| line["after"].clone()).collect();
    assert_eq!(changes, [json!("on"), json!("enable-pending"), json!("off"), json!("enable-pending"), json!("off")]);
    for args in [&["mode"][..], &["mode", "on"], &["mode", "maybe", "0"], &["mode", "on", "x"]] {
        assert_eq!(code(&world.migctl(args)), 64, "{args:?}");
    }
    assert_eq!(code(&world.migctl(&["mode", "on", "9"])), 65);
}

#[test]
fn clients_in_the_way_are_named() {
    for (board, mig) in [("h100-sxm-80gb", "off"), ("a100-sxm4-80gb", "enable-pending")] {
        let world = off(&[board]);
        let me = std::process::id();
        world.sim("hold", &["--gpu", "0", "--pid", &me.to_string()]);
        let output = world.migctl(&["mode", "on", "0", "--json"]);
        assert_eq!(code(&output), 75, "{}", text(&output));
        let answer: Value = serde_json::from_slice(&output.stdout).unwrap();
        schema("mode", &answer);
        let gpu = &answer["gpus"][0];
        assert_eq!((&gpu["outcome"], &gpu["mig"]), (&json!("in-use"), &json!(mig)), "{answer:#}");
        assert_eq!(gpu["clients"][0]["pid"], me);
        let next = gpu["next"].to_string();
        assert!(next.contains(&format!("end process {me}")), "{next}");
        assert_eq!(next.contains("gpu-reset"), mig == "enable-pending", "{next}");
        // One that no list shows.
        world.sim("unhold", &["--gpu", "0"]);
        world.sim("hold", &["--gpu", "0"]);
        let said = text(&world.migctl(&["mode", "on", "0"]));
        assert!(mig != "off" || said.contains("no process shows it"), "{said}");
    }
}

#[test]
fn it_is_not_turned_off_over_slices() {
    let world = World::with(&["h100-sxm-80gb", "h100-sxm-80gb"], &["--seed", "mode"]);
    stdout(&world.migctl(&["create", "1g.10gb,2g.20gb", "--gpu", "0"]));
    let asked = asked_for(&world, || {
        snapshot(&world, "mode-off-refused", &shown(&world, &["mode", "off", "all"]));
    });
    assert_eq!(asked, 0, "nothing is changed when one of them can't be");
    assert_eq!((mode(&world, 0), mode(&world, 1)), ("on".into(), "on".into()));
    stdout(&world.migctl(&["destroy", "--all", "--gpu", "0"]));
    stdout(&world.migctl(&["mode", "off", "all"]));
    let output = world.migctl(&["create", "1g.10gb"]);
    assert!(code(&output) == 65 && text(&output).contains("migctl mode on 0"), "{}", text(&output));
    stdout(&world.migctl(&["mode", "on", "all"]));
    stdout(&world.migctl(&["create", "1g.10gb"]));
    world.fault("nvmlDeviceSetMigMode", &["--fail", "NO_PERMISSION"]);
    let output = world.migctl(&["mode", "off", "1"]);
    assert_eq!(code(&output), 77, "{}", text(&output));
}
