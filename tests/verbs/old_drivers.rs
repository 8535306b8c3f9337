//! Drivers that lack calls which newer ones have: what is cut, given and told there, and what isn't.

use serde_json::{Value, json};

use crate::common::{World, text};
use crate::{asked, code, document};

fn world(version: &str) -> World {
    let world = World::with(&["a100-sxm4-80gb"], &["--driver-version", version, "--driver-files"]);
    world.recording_runtime(0);
    world
}

/// What the doctor says under this id.
fn doctor(world: &World, id: &str) -> Value {
    let output = world.migctl(&["doctor", "--json"]);
    let found: Value = serde_json::from_slice(&output.stdout).unwrap();
    let checks = found["checks"].as_array().unwrap().clone();
    checks.into_iter().find(|check| check["id"] == id).unwrap_or_default()
}

#[test]
fn slices_are_cut_and_given_with_the_calls_of_r470_and_r535() {
    for (version, advice) in [("470.256.02", "warn"), ("535.261.03", "")] {
        let world = world(version);
        let names: Vec<Value> = document(&world, &["profiles"])["gpus"][0]["profiles"]
            .as_array()
            .unwrap()
            .iter()
            .map(|profile| profile["name"].clone())
            .collect();
        let all = ["1g.10gb", "1g.10gb+me", "1g.20gb", "2g.20gb", "3g.40gb", "4g.40gb", "7g.80gb"];
        assert!(all.iter().all(|name| names.contains(&json!(name))), "{version}: {names:?}");

        let (_bundle, init) = world.living("c1", &asked("1g.10gb"));
        let made = world.instances().remove(0);
        world.sim("hold", &["--gpu", "0", "--gi", &made["id"].to_string(), "--pid", &init.pid().to_string()]);
        let slice = document(&world, &["list"])["gpus"][0]["slices"][0].clone();
        assert_eq!(slice["uuid"], made["compute_instances"][0]["uuid"], "{version}");
        assert_eq!(slice["processes"][0]["pid"], init.pid(), "{version}: {slice:#}");
        let busy = world.migctl(&["release", "c1"]);
        assert_eq!(code(&busy), 77, "{version}: {}", text(&busy));
        world.sim("unhold", &["--gpu", "0", "--gi", &made["id"].to_string()]);
        drop(init);
        document(&world, &["release", "c1"]);

        document(&world, &["create", "3g.40gb"]);
        document(&world, &["create", "2g.20gb"]);
        assert_eq!(world.instances().len(), 2, "{version}");
        document(&world, &["destroy", "--all", "--yes"]);
        world.assert_clean(version);
        let checked = doctor(&world, "driver.version");
        assert_eq!(checked["status"].as_str().unwrap_or_default(), advice, "{version}: {checked:#}");
        assert_eq!(checked.to_string().contains("memory in use counts what the driver keeps"), advice == "warn");
    }
}

#[test]
fn a_driver_without_a_call_that_is_needed_is_named_with_it() {
    let world = world("460.106.00");
    let wanted = "the NVIDIA driver 460.106.00 has no nvmlDeviceGetGpuInstancePossiblePlacements_v2; a driver of branch 535 or \
                  newer is needed";
    for verb in [&["list"][..], &["create", "1g.10gb"], &["plan", "1g.10gb"]] {
        let output = world.migctl(verb);
        assert!(!output.status.success() && text(&output).contains(wanted), "{verb:?}: {}", text(&output));
    }
    let bundle = world.bundle("c1", &asked("1g.10gb"));
    let output = world.shim(&["create", "--bundle", bundle.to_str().unwrap(), "c1"]);
    assert!(!output.status.success() && text(&output).contains(wanted), "{}", text(&output));
    assert_eq!(world.recorded("argv"), None, "the runtime was not called");
    assert_eq!(doctor(&world, "driver.library")["status"], "fail");
}
