//! `migctl`: what people and scripts see.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::os::unix::net::UnixDatagram;
use std::process::{Command, Output, Stdio};

use common::{DEMO, World, binaries, config, run, text};
use serde_json::{Value, json};

fn asked(profile: &str) -> Value {
    config(json!({"mig.profile": profile}), &[])
}

fn code(output: &Output) -> i32 {
    output.status.code().unwrap_or_else(|| panic!("{}", text(output)))
}

fn stdout(output: &Output) -> String {
    assert_eq!(code(output), 0, "{}", text(output));
    assert!(output.stderr.is_empty(), "{}", text(output));
    String::from_utf8(output.stdout.clone()).unwrap()
}

#[test]
fn an_empty_machine_is_listed_without_state() {
    let world = World::new(&DEMO);
    let listed = stdout(&world.migctl(&["list"]));
    assert!(listed.starts_with("GPU 0  NVIDIA A100-SXM4-80GB  GPU-"), "{listed}");
    assert_eq!((listed.matches("GPU-").count(), listed.matches("no slices").count()), (3, 3), "{listed}");
    assert_eq!(stdout(&world.migctl(&["leases"])), "no leases\n");
    let document = world.document(&["list"]);
    assert_eq!(document["version"], 1);
    assert_eq!(document["gpus"].as_array().unwrap().len(), 3);
    assert_eq!(world.document(&["leases"]), json!({"version": 1, "leases": []}));
    assert!(!world.path("state").exists(), "looking makes nothing");
    assert_eq!(stdout(&world.migctl(&["gc"])), "no leases: nothing to do\n");
    assert_eq!(world.document(&["gc"]), json!({"version": 1, "actions": []}));
}

#[test]
fn text_is_a_view_of_the_documents() {
    let world = World::new(&DEMO);
    world.recording_runtime(0);
    let (_b1, _i1) = world.living("web", &asked("1g.10gb"));
    let engine_id = "3f0a".repeat(16);
    let (_b2, _i2) = world.living(&engine_id, &asked("2x2g.20gb"));
    world.sim("make", &["--gpu", "2", "--profile", "3g.40gb"]);
    world.sim("make", &["--gpu", "2", "--profile", "1g.10gb", "--no-ci"]);

    let document = world.document(&["list"]);
    let listed = stdout(&world.migctl(&["list"]));
    let mut seen = vec![];
    for gpu in document["gpus"].as_array().unwrap() {
        assert!(listed.contains(&format!(
            "GPU {}  {}  {}\n",
            gpu["index"],
            gpu["name"].as_str().unwrap(),
            gpu["uuid"].as_str().unwrap()
        )));
        for slice in gpu["slices"].as_array().unwrap() {
            let profile = slice["profile"].as_str().unwrap();
            let place = format!("at {}:{}", slice["start"], slice["size"]);
            let row = match slice["uuid"].as_str() {
                Some(uuid) => listed.lines().find(|l| l.contains(uuid)).unwrap(),
                None => listed.lines().find(|l| l.contains("no CI")).unwrap(),
            };
            let holder = match slice["container"].as_str() {
                Some("web") => "container web",
                Some(_) => "container 3f0a3f0a3f0a ",
                None => "foreign",
            };
            assert!(row.contains(profile) && row.contains(&place) && row.contains(holder), "{slice} is not {row}");
            seen.push((profile.to_owned(), slice["state"].as_str().unwrap().to_owned()));
        }
    }
    seen.sort();
    let expected =
        [("1g.10gb", "foreign"), ("1g.10gb", "held"), ("2g.20gb", "held"), ("2g.20gb", "held"), ("3g.40gb", "foreign")];
    assert_eq!(seen, expected.map(|(p, s)| (p.to_owned(), s.to_owned())));

    let leases = stdout(&world.migctl(&["leases"]));
    let titles: Vec<&str> = leases.lines().next().unwrap().split_whitespace().collect();
    assert_eq!(titles, ["TOKEN", "STATE", "CONTAINER", "SLICES", "GPU", "SINCE"]);
    assert_eq!(leases.lines().count(), 3);
    for lease in world.leases() {
        let row = leases.lines().find(|l| l.contains(lease["token"].as_str().unwrap())).unwrap();
        assert!(row.contains("active") && row.contains(lease["slices"][0]["profile_name"].as_str().unwrap()), "{row}");
    }
    assert!(leases.contains("2g.20gb,2g.20gb"), "{leases}");
    for text in [&listed, &leases] {
        assert!(text.lines().all(|l| l == l.trim_end()), "no spaces at line ends: {text}");
    }
}

#[test]
fn gc_says_what_it_did_with_each_lease() {
    let world = World::new(&["a100-sxm4-80gb"]);
    world.recording_runtime(0);
    let (_bundle, living) = world.living("living", &asked("1g.10gb"));
    let (_bundle, dead) = world.living("dead", &asked("1g.10gb"));
    drop(dead);
    let document = world.document(&["gc"]);
    assert_eq!(document["version"], 1);
    let mut actions: Vec<(&str, &str)> = document["actions"]
        .as_array()
        .unwrap()
        .iter()
        .map(|a| (a["container"].as_str().unwrap(), a["result"].as_str().unwrap()))
        .collect();
    actions.sort_unstable();
    assert_eq!(actions, [("dead", "freed"), ("living", "kept")]);
    assert_eq!(world.lease()["holder"]["container"], "living");
    let shown = stdout(&world.migctl(&["gc"]));
    assert!(
        shown.starts_with("kept ") && shown.contains("living") && shown.contains("its container is alive"),
        "{shown}"
    );
    drop(living);
    // What the driver calls in use is tried again, said, and not lost.
    let gi = world.instances()[0]["id"].to_string();
    world.sim("hold", &["--gpu", "0", "--gi", &gi]);
    let output = world.migctl(&["gc", "--json"]);
    assert_eq!(code(&output), 75, "{}", text(&output));
    let document: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(document["actions"][0]["result"], "busy", "{document:#}");
    assert_eq!(world.lease()["state"], "releasing");
    world.sim("unhold", &["--gpu", "0", "--gi", &gi]);
    assert_eq!(world.document(&["gc"])["actions"][0]["result"], "freed");
    world.assert_clean("after gc");
}

#[test]
fn release_is_for_containers_that_have_ended() {
    let world = World::new(&["a100-sxm4-80gb"]);
    world.recording_runtime(0);
    let (_bundle, init) = world.living("c1", &asked("1g.10gb"));
    let token = world.lease()["token"].as_str().unwrap().to_owned();
    for name in ["c1", &token, &token[..8]] {
        let output = world.migctl(&["release", name]);
        assert_eq!(code(&output), 77, "{}", text(&output));
        assert!(text(&output).contains("container c1 is alive"), "{}", text(&output));
    }
    assert_eq!(world.instances().len(), 1);
    drop(init);
    let journal = UnixDatagram::bind(world.path("log.sock")).unwrap();
    journal.set_nonblocking(true).unwrap();
    let document = world.document(&["release", "c1"]);
    let mut line = [0; 4096];
    let length = journal.recv(&mut line).expect("a release by hand is in the journal, too");
    assert!(String::from_utf8_lossy(&line[..length]).contains("\"event\":\"release\""));
    assert_eq!(document, json!({"version": 1, "token": token, "outcome": "done"}));
    world.assert_clean("after release");
    let audit = world.audit();
    assert_eq!(audit.len(), 2, "{audit:#?}");
    assert_eq!((&audit[1]["event"], &audit[1]["token"]), (&json!("release"), &json!(token)));
    let output = world.migctl(&["release", "c1"]);
    assert!(code(&output) == 65 && text(&output).contains("no lease or container \"c1\""), "{}", text(&output));
}

#[test]
fn release_takes_a_beginning_that_fits_only_one() {
    let world = World::new(&["a100-sxm4-80gb"]);
    world.recording_runtime(0);
    let (_b, first) = world.living("train-1", &asked("1g.10gb"));
    let (_b, second) = world.living("train-2", &asked("1g.10gb"));
    let (_b, third) = world.living("web", &asked("1g.10gb"));
    drop((first, second, third));
    let output = world.migctl(&["release", "train"]);
    assert!(code(&output) == 65 && text(&output).contains("fits more than one"), "{}", text(&output));
    let output = world.migctl(&["release", ""]);
    assert!(code(&output) == 65 && text(&output).contains("no lease"), "{}", text(&output));
    assert_eq!(world.leases().len(), 3);
    let token = world.leases().iter().find(|l| l["holder"]["container"] == "web").unwrap()["token"].clone();
    let shown = stdout(&world.migctl(&["release", "we"]));
    assert_eq!(shown, format!("lease {} is released\n", token.as_str().unwrap()));
    assert_eq!(stdout(&world.migctl(&["release", "train-1"])).lines().count(), 1);
    assert_eq!(world.lease()["holder"]["container"], "train-2");
    assert_eq!(world.instances().len(), 1);
}

#[test]
fn help_and_wrong_command_lines() {
    let migctl = |args: &[&str]| run(Command::new(binaries().join("migctl")).args(args));
    let help = stdout(&migctl(&["--help"]));
    for verb in ["list", "leases", "release", "gc", "cdi", "configure", "--json", "--config"] {
        assert!(help.contains(verb), "{verb} is not in: {help}");
    }
    assert!(help.lines().all(|l| l.chars().count() <= 100), "{help}");
    for verb in ["list", "leases", "release", "gc", "cdi", "configure"] {
        let help = stdout(&migctl(&[verb, "--help"]));
        assert!(help.contains("Usage: migctl ") && help.contains("--json"), "{help}");
    }
    assert!(stdout(&migctl(&["--version"])).starts_with("migctl 0."));
    let wrong: [&[&str]; 6] = [&["lst"], &[], &["list", "extra"], &["release"], &["--nonsense"], &["list", "--config"]];
    for args in wrong {
        let output = migctl(args);
        assert_eq!(code(&output), 64, "{args:?}: {}", text(&output));
        assert!(output.stdout.is_empty() && !output.stderr.is_empty(), "{args:?}: {}", text(&output));
    }
    assert!(text(&migctl(&["lst"])).contains("list"), "the nearest verb is named");
    let missing = migctl(&["--config", "/nonexistent/x.toml", "list"]);
    assert!(code(&missing) == 78 && text(&missing).contains("/nonexistent/x.toml"), "{}", text(&missing));
    let by_hand = run(&mut Command::new(binaries().join("mig-engine")));
    assert!(code(&by_hand) == 64 && text(&by_hand).contains("not by hand"), "{}", text(&by_hand));
}

#[test]
fn a_missing_driver_is_said_and_leases_need_none() {
    let world = World::new(&["a100-sxm4-80gb"]);
    world.recording_runtime(0);
    let (_bundle, _init) = world.living("c1", &asked("1g.10gb"));
    let library = world.path("m/usr/lib/libnvidia-ml.so.1");
    std::fs::rename(&library, world.path("away")).unwrap();
    let output = world.migctl(&["list"]);
    assert!(code(&output) == 69 && text(&output).contains("libnvidia-ml.so.1"), "{}", text(&output));
    assert_eq!(world.leases().len(), 1);
    std::fs::rename(world.path("away"), &library).unwrap();
}

#[test]
fn a_closed_pipe_is_no_error() {
    let world = World::new(&DEMO);
    for args in [&["list"][..], &["list", "--json"], &["leases"], &["gc"], &["--help"]] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let mut command = Command::new(binaries().join("migctl"));
        command
            .arg("--config")
            .arg(world.config())
            .args(args)
            .stdin(Stdio::null())
            .stdout(writer)
            .stderr(Stdio::piped());
        let output = command.spawn().unwrap().wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{args:?}: {}", text(&output));
        assert!(output.stderr.is_empty(), "{args:?}: {}", text(&output));
    }
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let mut command = Command::new(binaries().join("migctl"));
    let child = command.arg("--config").arg(world.config()).arg("list").stdout(full).stderr(Stdio::piped()).spawn();
    let output = child.unwrap().wait_with_output().unwrap();
    assert!(
        !output.status.success() && text(&output).contains("No space left"),
        "a full disk is one: {}",
        text(&output)
    );
}
