//! `migctl run`: what people see. How it lives and ends is in tests/run.rs.

use crate::common::{World, skip, text};
use crate::{code, snapshot, stdout};

fn machine(what: &str) -> Option<World> {
    let world = World::with(&["a100-sxm4-80gb"], &["--seed", "run"]);
    if !world.path("m/dev/nvidia0").exists() {
        skip(what, "no device nodes can be made here");
        return None;
    }
    Some(world)
}

#[test]
fn a_command_has_its_slices_and_lists_itself_as_their_holder() {
    let Some(world) = machine("a_command_has_its_slices_and_lists_itself_as_their_holder") else { return };
    let migctl =
        format!("{} --config {}", crate::common::binaries().join("migctl").display(), world.config().display());
    let script = format!("env | grep -E '^(CUDA|NVIDIA|MIG)_' | sort; echo ==; echo $PPID; {migctl} list");
    let said = stdout(&world.migctl(&["run", "2x1g.10gb", "--", "sh", "-c", &script]));
    let (variables, list) = said.split_once("==\n").unwrap();
    // What the caller has comes through too: here what cargo and the suite set.
    let own = |line: &&str| line.split_once('=').is_some_and(|(name, _)| std::env::var_os(name).is_none());
    snapshot(&world, "run", &variables.lines().filter(own).map(|line| format!("{line}\n")).collect::<String>());
    let (pid, list) = list.split_once('\n').unwrap();
    assert_eq!(list.matches(&format!("sh (process {pid})")).count(), 2, "{said}");
    world.assert_clean("after its end");
}

#[test]
fn what_it_says_when_nothing_is_started() {
    let Some(world) = machine("what_it_says_when_nothing_is_started") else { return };
    let mut said = String::new();
    for (args, expected) in [
        (&["run", "--", "true"][..], 64),
        (&["run", "1g.10gb"], 64),
        (&["run", "--gpu", "0", "--", "true"], 64),
        (&["run", "--wait", "soon", "1g.10gb", "--", "true"], 64),
        (&["run", "9g.90gb", "--", "true"], 65),
        (&["run", "--gpu", "7", "1g.10gb", "--", "true"], 65),
        (&["run", "2x7g.80gb", "--", "true"], 65),
        (&["run", "1g.10gb", "--", "no-such-program"], 127),
        (&["run", "1g.10gb", "--", "/etc/passwd"], 126),
    ] {
        let output = world.migctl(args);
        assert_eq!(code(&output), expected, "{args:?}: {}", text(&output));
        let first = String::from_utf8(output.stderr).unwrap().lines().next().unwrap_or_default().to_owned();
        said += &format!("migctl {}\n  {first}\n", args.join(" "));
    }
    snapshot(&world, "run-nothing", &said);
    world.assert_clean("after all");
}

#[test]
fn the_variables_for_a_shell() {
    let Some(world) = machine("the_variables_for_a_shell") else { return };
    snapshot(&world, "run-shell", &stdout(&world.migctl(&["run", "--shell", "1g.10gb"])));
}
