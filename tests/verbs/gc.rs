//! `migctl gc`.

use serde_json::{Value, json};

use crate::common::{Init, World, text};
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
    assert_eq!(document(&world, &["gc"]), json!({"version": 1, "dry_run": false, "actions": []}));
}

#[test]
fn a_dry_run_says_what_gc_would_do_and_does_nothing() {
    let world = World::new(&["a100-sxm4-80gb"]);
    let nothing = world.migctl(&["gc", "--dry-run"]);
    assert!(nothing.status.success() && !world.path("state").exists(), "{}", text(&nothing));
    world.recording_runtime(0);
    let (_bundle, _living) = world.living("living", &asked("1g.10gb"));
    let (_bundle, dead) = world.living("dead", &asked("1g.10gb"));
    let (_bundle, used) = world.living("used", &asked("1g.10gb"));
    let (_bundle, held) = world.living("held", &asked("1g.10gb"));
    for process in [dead, used, held] {
        drop(process);
    }
    let of = |container: &str| {
        let leases = world.leases();
        leases.into_iter().find(|lease| lease["holder"]["container"] == container).unwrap()
    };
    let process = Init::start();
    let pid = process.pid().to_string();
    let gi = of("used")["slices"][0]["gi"].to_string();
    world.sim("hold", &["--gpu", "0", "--gi", &gi, "--pid", &pid]);
    world.edit_lease(of("held")["token"].as_str().unwrap(), |lease| lease["state"] = json!("quarantined"));
    let _open = world.open_capability(of("held")["token"].as_str().unwrap());
    let before = (world.leases(), world.machine());
    let output = world.migctl(&["gc", "--dry-run", "--json"]);
    assert_eq!(code(&output), 75, "one is busy: {}", text(&output));
    let told: Value = serde_json::from_slice(&output.stdout).unwrap();
    schema("gc", &told);
    assert_eq!((world.leases(), world.machine()), before, "nothing was done");
    let mut actions: Vec<(&str, &str, &str)> = told["actions"]
        .as_array()
        .unwrap()
        .iter()
        .map(|a| {
            let words = ["container", "result", "reason"].map(|key| a[key].as_str().unwrap());
            (words[0], words[1], words[2])
        })
        .collect();
    actions.sort_unstable();
    let [dead, held, living, used] = actions[..] else { panic!("{told:#}") };
    assert_eq!((dead.0, dead.1), ("dead", "freed"), "{told:#}");
    let us = std::process::id();
    assert!(held.1 == "kept" && held.2.contains(&format!("process {us} (")), "{told:#}");
    assert!(held.2.ends_with("has it open"), "{told:#}");
    assert_eq!((living.0, living.1), ("living", "kept"), "{told:#}");
    assert_eq!(used.1, "busy", "{told:#}");
    assert!(used.2.ends_with(&format!("process {pid} (sleep) uses it")), "{told:#}");
    assert!(text(&world.migctl(&["gc", "--dry-run"])).contains("would be freed"));
}
