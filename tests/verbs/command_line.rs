//! What all verbs share: help, wrong command lines, pipes.

use std::process::{Command, Stdio};

use crate::common::{DEMO, World, binaries, run, text};
use crate::documented::commands;
use crate::{code, stdout};

#[test]
fn help_and_wrong_command_lines() {
    let migctl = |args: &[&str]| run(Command::new(binaries().join("migctl")).args(args));
    let help = stdout(&migctl(&["--help"]));
    assert!(help.contains("--json") && help.contains("--config"), "{help}");
    for command in commands() {
        let words: Vec<&str> = command.words.iter().map(String::as_str).collect();
        let help = stdout(&migctl(&[&words, &["--help"][..]].concat()));
        assert!(
            help.contains(&[&["Usage: migctl"], &words[..]].concat().join(" ")) && help.contains("--json"),
            "{help}"
        );
        assert!(help.lines().all(|l| l.chars().count() <= 100), "{help}");
    }
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
fn every_program_tells_its_version_commit_and_target() {
    for (program, option) in [
        ("migctl", "--version"),
        ("mig-engine", "--version"),
        ("mig-hook", "--version"),
        ("mig-runtime", "--mig-version"),
        ("nvml-sim", "--version"),
    ] {
        let said = stdout(&run(Command::new(binaries().join(program)).arg(option)));
        let built = said
            .strip_prefix(&format!("{program} {} (", env!("CARGO_PKG_VERSION")))
            .unwrap_or_else(|| panic!("{said}"));
        let built: Vec<&str> = built.trim_end().trim_end_matches(')').split(", ").collect();
        assert!(built.last().unwrap().ends_with("-linux-gnu"), "{said}");
        // Plain `cargo build` names no commit; `make build` does, where there is a repository.
        if let [commit, _] = built[..] {
            let hash = commit.trim_end_matches("-changed");
            assert!(hash.len() == 12 && hash.bytes().all(|b| b.is_ascii_hexdigit()), "{said}");
        }
    }
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
