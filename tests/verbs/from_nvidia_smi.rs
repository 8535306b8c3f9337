//! docs/from-nvidia-smi.md: every command of ours on that page runs.

use std::process::Command;

use crate::common::{World, binaries, blocks, run, text};
use crate::{code, repository};

/// The commands of ours on the page in their order: in code spans of the second column, and in blocks.
fn commands() -> Vec<String> {
    let page = std::fs::read_to_string(repository("docs/from-nvidia-smi.md")).unwrap();
    let rows = page.lines().filter(|line| line.starts_with('|'));
    let spans = rows.flat_map(|row| row.split('`').skip(1).step_by(2)).map(str::to_owned);
    let blocks = blocks(&page, "sh").join("\n");
    let lines = blocks.lines().map(|line| line.split("  #").next().unwrap().trim().to_owned());
    spans.chain(lines).filter_map(|command| command.strip_prefix("migctl ").map(str::to_owned)).collect()
}

#[test]
fn every_command_of_the_page_runs() {
    let world = World::new(&["a100-sxm4-80gb", "h100-sxm-80gb"]);
    let commands = commands();
    assert!(commands.len() > 25, "the reader of the page is broken: {commands:#?}");
    let mut verbs: Vec<&str> = Vec::new();
    for command in &commands {
        let line =
            format!("exec {} --config {} {command}", binaries().join("migctl").display(), world.config().display());
        let output = run(Command::new("/bin/sh").args(["-c", &line]));
        assert_eq!(code(&output), 0, "migctl {command}: {}", text(&output));
        verbs.push(command.split(' ').next().unwrap());
    }
    for verb in
        ["mode", "profiles", "create", "list", "destroy", "adopt", "reserve", "cordon", "drain", "uncordon", "gc"]
    {
        assert!(verbs.contains(&verb), "{verb} is not on the page");
    }
    world.assert_clean("at the end of the page");
}
