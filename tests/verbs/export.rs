//! `migctl export`, and that what it prints is what is there.

use serde_json::{Value, json};

use crate::apply::{changes, fixture};
use crate::common::{World, text};
use crate::{code, document, schema, shown, snapshot, stdout};

/// A config of mig-parted that people have, with boards that it is for.
const REAL: [(&str, &str, &[&str]); 16] = [
    ("dgx-a100.yaml", "all-disabled", &["a100-sxm4-40gb", "a100-sxm4-40gb"]),
    ("dgx-a100.yaml", "all-enabled", &["a100-sxm4-40gb", "a100-sxm4-40gb"]),
    ("dgx-a100.yaml", "all-1g.5gb", &["a100-sxm4-40gb", "a100-sxm4-40gb"]),
    ("dgx-a100.yaml", "all-2g.10gb", &["a100-sxm4-40gb"]),
    ("dgx-a100.yaml", "all-3g.20gb", &["a100-sxm4-40gb"]),
    ("dgx-a100.yaml", "all-balanced", &["a100-sxm4-40gb"]),
    ("dgx-a100.yaml", "custom-config", &["a100-sxm4-40gb"; 8]),
    ("dgx-station.yaml", "balanced-k8s-dgx-station-80", &["a100-sxm4-80gb"; 4]),
    (
        "every-board.yaml",
        "all-balanced",
        &[
            "a100-sxm4-40gb",
            "a100-sxm4-80gb",
            "a30-24gb",
            "h100-sxm-80gb",
            "h200-141gb",
            "gh200-96gb",
            "rtx-pro-6000-blackwell-se",
        ],
    ),
    ("every-board.yaml", "all-1g.10gb", &["h100-sxm-80gb", "a100-sxm4-40gb", "a30-24gb"]),
    ("every-board.yaml", "all-1g.10gb.me", &["h100-pcie-80gb"]),
    ("every-board.yaml", "all-1g.24gb-me", &["rtx-pro-6000-blackwell-se"]),
    ("every-board.yaml", "all-1g.24gb.me.all", &["rtx-pro-6000-blackwell-se"]),
    ("every-board.yaml", "all-2g.12gb", &["a30-24gb", "a30-24gb"]),
    ("every-board.yaml", "all-7g.80gb", &["a100-sxm4-80gb", "h100-sxm-80gb"]),
    ("shared.yaml", "shared", &["a100-sxm4-80gb"]),
];

#[test]
fn real_configs_apply_assert_and_export_round_trip() {
    for (file, config, boards) in REAL {
        let world = World::with(boards, &["--ampere-reset", "auto"]);
        let file = fixture(file);
        let when = format!("{config} of {file}");
        let done = document(&world, &["apply", &file, "--config", config]);
        assert!(done["gpus"].as_array().unwrap().iter().all(|gpu| gpu["outcome"] != "pending"), "{when}: {done:#}");
        schema("assert", &document(&world, &["assert", &file, "--config", config]));
        let cut = world.instances();
        for json in [false, true] {
            let export = stdout(&world.migctl(if json { &["export", "--json"] } else { &["export"] }));
            let path = world.write("exported", &export).display().to_string();
            world.sim("count", &["on"]);
            let again = document(&world, &["apply", &path]);
            assert!(
                again["gpus"].as_array().unwrap().iter().all(|gpu| gpu["outcome"] == "unchanged"),
                "{when}: {again:#}\n{export}"
            );
            assert_eq!(changes(&world), 0, "{when}\n{export}");
            assert_eq!(world.instances(), cut, "{when}");
            assert_eq!(code(&world.migctl(&["assert", &path])), 0, "{when}");
        }
        assert_eq!(code(&world.migctl(&["assert", &file, "--config", config])), 0, "{when}");
        // And away again, from whatever it was.
        document(&world, &["apply", &fixture("dgx-a100.yaml"), "--config", "all-enabled"]);
        assert_eq!(world.instances(), Vec::<Value>::new(), "{when}");
    }
}

#[test]
fn the_same_is_said_once_and_boards_are_told_apart() {
    let world = World::with(&["a100-sxm4-40gb", "a100-sxm4-40gb", "a30-24gb", "a30-24gb"], &["--seed", "export"]);
    document(&world, &["apply", &fixture("every-board.yaml"), "--config", "all-balanced"]);
    snapshot(&world, "export-boards", &shown(&world, &["export"]));
    world.sim("destroy", &["--gpu", "3", "--gi", &last_gi(&world)]);
    snapshot(&world, "export-one-differs", &shown(&world, &["export", "--config", "a site's"]));
    let json: Value = serde_json::from_str(&stdout(&world.migctl(&["export", "--json"]))).unwrap();
    assert_eq!((&json["version"], json["mig-configs"]["current"].as_array().unwrap().len()), (&json!("v1"), 3));
    let same = World::new(&["h100-sxm-80gb", "h100-sxm-80gb"]);
    let file = stdout(&same.migctl(&["export"]));
    assert_eq!(
        file,
        "version: v1\nmig-configs:\n  current:\n    - devices: all\n      mig-enabled: true\n      mig-devices: {}\n"
    );
}

fn last_gi(world: &World) -> String {
    let machine = world.machine();
    machine["gpus"][3]["gpu_instances"].as_array().unwrap().last().unwrap()["id"].to_string()
}

#[test]
fn gpus_that_are_not_managed_are_left_out() {
    let world = World::new(&["a30-24gb", "a30-24gb"]);
    world.settings("[limits]\ngpus = [\"1\"]");
    let export = stdout(&world.migctl(&["export"]));
    assert!(export.contains("devices: [1]"), "{export}");
}

#[test]
fn what_the_format_cannot_say_is_told() {
    let world = World::new(&["a30-24gb"]);
    world.fault("nvmlGpuInstanceCreateComputeInstance*", &["--kill", "before"]);
    assert!(world.migctl(&["create", "1g.6gb"]).status.code().is_none());
    let output = world.migctl(&["export"]);
    assert!(output.status.success(), "{}", text(&output));
    assert!(text(&output).contains("has no compute instance and is left out"), "{}", text(&output));
}
