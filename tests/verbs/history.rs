//! `migctl history`.

use std::io::Write;
use std::process::{Command, Output};

use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::{Value, json};

use crate::common::{World, binaries, config, feed, text};
use crate::{asked, code, document, schema, snapshot, stdout};

const HOUR: u64 = 3_600_000;
/// 2026-01-31 12:00 UTC.
const NOON: u64 = 1_769_860_800_000;

/// A line as the engine writes it; `tests/hook.rs` and the test of real leases below hold the two together.
fn line(event: &str, time_ms: u64, token: &str, more: Value) -> String {
    let mut line = json!({
        "event": event, "time_ms": time_ms, "container": null, "image": null, "uid": 0, "way": "shim", "boot": "then",
        "token": token, "slices": [slice("1g.10gb", 9728)],
    });
    line.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    format!("{line}\n")
}

fn slice(profile: &str, memory_mib: u64) -> Value {
    json!({
        "gpu": "GPU-0", "gpu_index": 0, "profile": profile, "memory_mib": memory_mib,
        "placement": {"start": 0, "size": 1}, "uuid": "MIG-0",
    })
}

fn held(end_ms: u64, hours: u64, container: &str, image: &str, uid: u32, slices: &[Value]) -> String {
    let token = format!("{end_ms:032x}");
    let who = json!({"container": container, "image": image, "uid": uid});
    let with = |more: Value| {
        let mut all = who.clone();
        all.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        all
    };
    let reason = "its container has ended";
    line("grant", end_ms - hours * HOUR, &token, with(json!({"slices": slices})))
        + &line("release", end_ms, &token, with(json!({"slices": slices, "held_ms": hours * HOUR, "reason": reason})))
}

/// Four holds, a refusal, and a grant without an end.
fn log() -> String {
    let refusal = json!({"event": "refusal", "time_ms": NOON, "container": "x", "image": "nginx:1", "uid": 0, "way": "shim",
                         "request": "7g.80gb", "reason": "no room"});
    [
        held(NOON, 2, "web", "nginx:1", 0, &[slice("1g.10gb", 9728)]),
        held(
            NOON + HOUR,
            1,
            &"3f0a".repeat(16),
            "pytorch:2",
            4_000_000,
            &[slice("3g.40gb", 40_448), slice("1g.10gb", 9728)],
        ),
        format!("{refusal}\n"),
        line("create", NOON, "kept", json!({})),
        held(NOON + 30 * HOUR, 30, "long", "pytorch:2", 0, &[slice("1c.3g.40gb", 40_448)]),
        line("grant", NOON + 31 * HOUR, &"5".repeat(32), json!({"container": "crashed", "image": "nginx:1"})),
    ]
    .concat()
}

/// `migctl history` where the clock on the wall shows UTC.
fn history(world: &World, args: &[&str]) -> Output {
    history_of(world, args, b"")
}

fn history_of(world: &World, args: &[&str], stdin: &[u8]) -> Output {
    let mut command = Command::new(binaries().join("migctl"));
    command.env("TZ", "UTC").arg("--config").arg(world.config()).arg("history").args(args);
    feed(&mut command, stdin)
}

fn shown(world: &World, args: &[&str]) -> String {
    format!("$ migctl history {}\n{}", args.join(" "), stdout(&history(world, args)))
}

#[test]
fn what_was_held_and_what_it_comes_to() {
    let world = World::new(&["a100-sxm4-80gb"]);
    world.write("audit.jsonl", &log());
    for (name, args) in [
        ("history", &[][..]),
        ("history-by-user", &["--by", "user"]),
        ("history-by-image", &["--by", "image"]),
        ("history-by-profile", &["--by", "profile"]),
        ("history-by-container", &["--by", "container"]),
        ("history-last", &["--last", "1"]),
        ("history-of", &["--user", "root", "--image", "nginx"]),
    ] {
        snapshot(&world, name, &shown(&world, args));
    }
    let all = document(&world, &["history"]);
    let states: Vec<(&str, &str)> = all["holds"]
        .as_array()
        .unwrap()
        .iter()
        .map(|h| (h["start"].as_str().unwrap(), h["state"].as_str().unwrap()))
        .collect();
    let expected = [
        ("2026-01-31T10:00:00Z", "released"),
        ("2026-01-31T12:00:00Z", "released"),
        ("2026-01-31T12:00:00Z", "released"),
        ("2026-02-01T19:00:00Z", "unknown"),
    ];
    assert_eq!(states, expected);
    let sums = &all["total"];
    assert_eq!((&sums["holds"], &sums["unknown_ends"], &all["refusals"]), (&json!(4), &json!(1), &json!(1)));
    assert_eq!(sums["slice_hours"], json!(2.0 + 2.0 + 30.0));
    assert_eq!(sums["compute_slice_hours"], json!(2.0 + 4.0 + 30.0));
    assert_eq!(sums["gib_hours"], json!(19.0 + (39.5 + 9.5) + 30.0 * 39.5));
    for by in ["user", "image", "profile", "container"] {
        let grouped = document(&world, &["history", "--by", by]);
        assert_eq!(grouped["total"], all["total"], "{by}");
        let groups = grouped["groups"].as_array().unwrap();
        let sum = |field: &str| groups.iter().map(|g| g[field].as_f64().unwrap()).sum::<f64>();
        assert_eq!(json!(sum("slice_hours")), all["total"]["slice_hours"], "{by}: {groups:#?}");
        assert_eq!(json!(sum("gib_hours")), all["total"]["gib_hours"], "{by}: {groups:#?}");
    }
}

#[test]
fn the_part_in_the_period_counts() {
    let world = World::new(&["a100-sxm4-80gb"]);
    world.write("audit.jsonl", &log());
    let of = |args: &[&str]| document(&world, &[&["history"], args].concat())["total"]["slice_hours"].clone();
    assert_eq!(of(&["--since", "2026-02-01T12:00:00Z"]), 6.0);
    assert_eq!(of(&["--since", "2026-01-31T11:00:00Z", "--until", "2026-01-31T12:30:00Z"]), 1.0 + 2.0 * 0.5 + 0.5);
    assert_eq!(of(&["--until", "2026-01-31T10:00:00Z"]), 0.0);
    assert_eq!(of(&["--since", "1h"]), 0.0);
    assert_eq!(of(&["--container", "3f0a"]), 2.0);
    let none = stdout(&history(&world, &["--since", "1h"]));
    assert_eq!(none, "no holds\n");
    for args in [
        &["--since", "yesterday"][..],
        &["--user", "no-such-user"],
        &["--by", "gpu"],
        &["--since", "2026-02-01", "--until", "2026-01-01"],
    ] {
        let output = history(&world, args);
        assert_eq!(code(&output), 64, "{args:?}: {}", text(&output));
    }
}

#[test]
fn real_leases_are_followed_from_grant_to_release() {
    let world = World::new(&["a100-sxm4-80gb"]);
    world.recording_runtime(0);
    let annotations = json!({"mig.profile": "1g.10gb", "org.opencontainers.image.ref.name": "x"});
    let (_b1, ended) = world.living("ended", &config(annotations, &[]));
    let (_b2, _alive) = world.living("alive", &asked("2g.20gb"));
    let (_b3, lost) = world.living("lost", &asked("1g.10gb"));
    let (_b4, unlogged) = world.living("unlogged", &asked("1g.10gb"));
    drop(ended);
    stdout(&world.migctl(&["gc"]));
    // A lease whose record is lost, and one whose grant is.
    let token = |container: &str| {
        let leases = world.leases();
        let lease = leases.iter().find(|lease| lease["holder"]["container"] == container).unwrap();
        lease["token"].as_str().unwrap().to_owned()
    };
    std::fs::remove_file(world.lease_file(&token("lost"))).unwrap();
    let unlogged_token = token("unlogged");
    let kept: Vec<String> =
        world.audit().iter().filter(|l| l["token"] != unlogged_token.as_str()).map(Value::to_string).collect();
    world.write("audit.jsonl", &(kept.join("\n") + "\n"));

    let all = document(&world, &["history"]);
    let row = |container: &str| {
        let holds = all["holds"].as_array().unwrap();
        holds
            .iter()
            .find(|hold| hold["container"] == container)
            .unwrap_or_else(|| panic!("{container}: {all:#}"))
            .clone()
    };
    assert_eq!(
        (&row("ended")["state"], &row("ended")["slices"][0]["profile"]),
        (&json!("released"), &json!("1g.10gb"))
    );
    assert!(row("ended")["held_ms"].as_u64().unwrap() < 60_000 && row("ended")["end"].is_string());
    assert_eq!(row("ended")["slices"][0]["memory_mib"], 9728);
    assert_eq!(row("ended")["slices"][0]["gpu_index"], 0);
    assert_eq!(row("alive")["state"], "holding");
    assert_eq!(row("unlogged")["state"], "holding");
    assert_eq!(row("lost")["state"], "unknown");
    assert!(row("lost")["reason"].as_str().unwrap().contains("no lease of it stands"), "{:#}", row("lost"));
    assert_eq!((&all["total"]["holds"], &all["total"]["holding"]), (&json!(4), &json!(2)));
    let shown = stdout(&history(&world, &[]));
    let line = |container: &str| shown.lines().find(|line| line.contains(container)).unwrap().to_owned();
    assert!(line("alive").ends_with("still held") && line("alive").contains("2g.20gb"), "{shown}");
    assert!(shown.contains("4 holds: ") && shown.contains("1 has no known end and counts no hours"), "{shown}");

    // The same lines by standard input, among others of the journal: a lease without a grant in them is not theirs.
    let journal = format!("mig-hook started\n{}\n<6>something else\n", kept.join("\n"));
    let output = history_of(&world, &["--from", "-", "--json"], journal.as_bytes());
    let piped: Value = serde_json::from_str(&stdout(&output)).unwrap();
    schema("history", &piped);
    assert_eq!((&piped["total"]["holds"], &piped["unreadable_lines"]), (&json!(3), &json!(0)), "{piped:#}");
    assert_eq!(piped["files"], json!(["-"]));
    drop((lost, unlogged));
}

#[test]
fn rotated_neighbours_are_read_and_damage_is_told() {
    let world = World::new(&["a100-sxm4-80gb"]);
    let lines = log();
    let lines: Vec<&str> = lines.split_inclusive('\n').collect();
    let mut packed = GzEncoder::new(Vec::new(), Compression::default());
    packed.write_all(lines[..2].concat().as_bytes()).unwrap();
    let packed = packed.finish().unwrap();
    std::fs::write(world.path("audit.jsonl.2.gz"), &packed).unwrap();
    world.write("audit.jsonl.1", &lines[2..5].concat());
    // What a full disk leaves: a line without its end, and the next one on it.
    let (half, _) = lines[6].split_at(lines[6].len() / 2);
    world.write("audit.jsonl", &format!("{half}{}not json\n\n{}", lines[5], lines[6..].concat()));
    let all = document(&world, &["history"]);
    assert_eq!((&all["total"]["holds"], &all["unreadable_lines"]), (&json!(4), &json!(2)), "{all:#}");
    assert_eq!(all["total"]["slice_hours"], 34.0);
    let files: Vec<&str> =
        all["files"].as_array().unwrap().iter().map(|f| f.as_str().unwrap().rsplit('/').next().unwrap()).collect();
    assert_eq!(files, ["audit.jsonl.2.gz", "audit.jsonl.1", "audit.jsonl"]);
    snapshot(&world, "history-damaged", &shown(&world, &["--by", "image"]));
    // One that ends too early: what comes before counts, the rest is told.
    std::fs::write(world.path("audit.jsonl.2.gz"), &packed[..packed.len() / 2]).unwrap();
    let all = document(&world, &["history"]);
    assert!(all["damaged"][0].as_str().unwrap().contains("audit.jsonl.2.gz: "), "{all:#}");
    assert!(stdout(&history(&world, &[])).contains("not read to its end: "));
    let one = document(&world, &["history", "--from", world.path("audit.jsonl.1").to_str().unwrap()]);
    assert_eq!(one["total"]["holds"], 1, "{one:#}");
}

#[test]
fn without_an_audit_file_it_is_said_how_to_get_one() {
    let world = World::new(&["a100-sxm4-80gb"]);
    assert_eq!(stdout(&history(&world, &[])), "no holds\n", "nothing was logged yet");
    world.write("config.toml", &format!("state_dir = \"{}\"", world.path("state").display()));
    let output = history(&world, &[]);
    assert_eq!(code(&output), 64, "{}", text(&output));
    snapshot(&world, "history-no-audit-file", &text(&output));
    let output = history(&world, &["--from", "/nonexistent/audit.jsonl"]);
    assert!(code(&output) == 74 && text(&output).contains("/nonexistent/audit.jsonl"), "{}", text(&output));
}
