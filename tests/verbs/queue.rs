//! `migctl queue`. What waiting itself does is in tests/waiting.rs.

use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};

use crate::common::{World, binaries, config, text, wait_for};
use crate::{asked, code, document, schema, shown, snapshot, stdout};

/// podman's precreate hook, waiting; killed in the end.
pub struct Waiting(Child);

impl Waiting {
    pub fn start(world: &World, profile: &str) -> Waiting {
        let before = document(world, &["queue"])["waiting"].as_array().unwrap().len();
        let config = world.write("asked", &config(json!({"mig.profile": profile, "mig.wait": "20s"}), &[]).to_string());
        let mut command = Command::new(binaries().join("mig-hook"));
        command.arg("--config").arg(world.config()).arg("precreate").stdin(std::fs::File::open(config).unwrap());
        let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        wait_for("a place in the line", Duration::from_secs(15), || {
            document(world, &["queue"])["waiting"].as_array().unwrap().len() > before
        });
        Waiting(child)
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn queue_shows_who_waits_for_what_and_takes_one_out() {
    let world = World::with(&["a30-24gb"], &["--seed", "queue"]);
    snapshot(&world, "queue-nobody", &shown(&world, &["queue"]));
    assert!(!world.path("state").exists(), "looking makes nothing");
    let runtime = world.recording_runtime(0);
    world.settings(&format!("[runtime]\npath = \"{}\"\n[queue]\novertakes = 1", runtime.display()));
    let (_bundle, _init) = world.living("web", &asked("2g.12gb"));
    let _large = Waiting::start(&world, "4g.24gb");
    let (_bundle2, _init2) = world.living("db", &asked("1g.6gb"));
    let small = Waiting::start(&world, "1g.6gb");
    snapshot(&world, "queue", &shown(&world, &["queue"]));
    assert_eq!(
        shown(&world, &["queue"]).lines().skip(1).count(),
        shown(&world, &["queue", "list"]).lines().skip(1).count()
    );
    assert_eq!(document(&world, &["list"])["waiting"], 2);
    assert!(stdout(&world.migctl(&["list"])).ends_with("\n\n2 requests wait for room: migctl queue\n"));
    let listed = document(&world, &["queue"]);
    let rows = listed["waiting"].as_array().unwrap();
    let brief = |row: &Value| {
        json!([
            row["ticket"],
            row["position"],
            row["request"],
            row["overtaken"],
            row["limit"],
            row["barrier"],
            row["way"]
        ])
    };
    let expected = [
        json!([1, 1, "mig.profile=4g.24gb", 1, 1, true, "precreate"]),
        json!([2, 2, "mig.profile=1g.6gb", 0, 1, false, "precreate"]),
    ];
    assert_eq!(rows.iter().map(brief).collect::<Vec<_>>(), expected);
    let cancelled = document(&world, &["queue", "cancel", "2"]);
    assert_eq!(cancelled, json!({"version": 1, "cancelled": 2}));
    schema("queue", &cancelled);
    drop(small);
    snapshot(&world, "queue-cancel", &shown(&world, &["queue", "cancel", "1"]));
    snapshot(&world, "queue-cancel-unknown", &shown(&world, &["queue", "cancel", "7"]));
    for args in [&["queue", "cancel"][..], &["queue", "cancel", "x"], &["queue", "cancel", "-1"]] {
        let output = world.migctl(args);
        assert_eq!(code(&output), 64, "{}", text(&output));
    }
}
