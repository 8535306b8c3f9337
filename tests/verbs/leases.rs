//! `migctl leases`.

use std::os::unix::process::CommandExt;
use std::process::Command;

use serde_json::json;

use crate::common::{DEMO, World, binaries, run, text};
use crate::{asked, code, document, shown, snapshot, stdout};

#[test]
fn nothing_recorded_is_said_without_making_state() {
    let world = World::new(&DEMO);
    assert_eq!(stdout(&world.migctl(&["leases"])), "no leases\n");
    assert_eq!(document(&world, &["leases"]), json!({"version": 1, "leases": [], "holders": []}));
    assert!(!world.path("state").exists(), "looking makes nothing");
}

#[test]
fn text_is_a_view_of_the_document() {
    let world = World::new(&DEMO);
    world.recording_runtime(0);
    let (_b1, web) = world.living("web", &asked("1g.10gb"));
    let (_b2, train) = world.living("train", &asked("2x2g.20gb"));
    let document = document(&world, &["leases"]);
    let leases = stdout(&world.migctl(&["leases"]));
    let titles: Vec<&str> = leases.lines().next().unwrap().split_whitespace().collect();
    assert_eq!(titles, ["TOKEN", "STATE", "GPU", "SLICES", "HOLDER", "PID", "USER", "WAY", "SINCE"]);
    assert_eq!(leases.lines().count(), 3);
    let holders = document["holders"].as_array().unwrap();
    for (lease, holder) in document["leases"].as_array().unwrap().iter().zip(holders) {
        assert_eq!(lease["token"], holder["token"]);
        let row = leases.lines().find(|l| l.contains(lease["token"].as_str().unwrap())).unwrap();
        assert!(row.contains("active") && row.contains(lease["slices"][0]["profile_name"].as_str().unwrap()), "{row}");
        let pid = if holder["container"] == "web" { web.pid() } else { train.pid() };
        assert_eq!(holder["pid"], pid);
        let words: Vec<&str> = row.split_whitespace().collect();
        let container = holder["container"].as_str().unwrap();
        assert!(row.contains(&format!("container {container} ")) && words.contains(&pid.to_string().as_str()), "{row}");
        assert!(words.contains(&"shim") && words.contains(&holder["user"].as_str().unwrap()), "{row}");
    }
    assert!(leases.contains("2g.20gb,2g.20gb"), "{leases}");
    assert!(leases.lines().all(|l| l == l.trim_end()), "no spaces at line ends: {leases}");
}

#[test]
fn who_may_not_read_the_state_is_told_so() {
    let world = World::new(&["a100-sxm4-80gb"]);
    world.recording_runtime(0);
    let (_bundle, _init) = world.living("web", &asked("1g.10gb"));
    let dir = world.path("m").parent().unwrap().to_owned();
    assert!(run(Command::new("chmod").args(["a+x"]).arg(&dir)).status.success());
    let program = world.path("migctl");
    assert!(run(Command::new("cp").arg(binaries().join("migctl")).arg(&program)).status.success());
    let output = run(Command::new(&program).arg("--config").arg(world.config()).arg("leases").uid(65534).gid(65534));
    assert!(code(&output) == 77 && !text(&output).contains("no leases"), "{}", text(&output));
}

#[test]
fn what_people_see() {
    let world = World::with(&["a100-sxm4-80gb"], &["--seed", "leases"]);
    assert!(world.migctl(&["create", "2x1g.10gb"]).status.success());
    snapshot(&world, "leases", &shown(&world, &["leases"]));
}
