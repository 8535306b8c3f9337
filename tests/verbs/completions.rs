//! `migctl completions`: scripts that the shells themselves take, and what bash then offers.

use std::process::Command;

use crate::common::{World, binaries, feed, installed, run, skip, text};
use crate::documented::verbs;
use crate::{code, stdout};

fn script(shell: &str) -> String {
    stdout(&run(Command::new(binaries().join("migctl")).args(["completions", shell])))
}

/// What bash offers for the last word of a command line.
fn offered(line: &[&str]) -> Vec<String> {
    const ASK: &str = r#"
        . /dev/stdin
        COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
        function=$(complete -p migctl | sed 's/.* -F \([^ ]*\) .*/\1/')
        "$function" migctl "${COMP_WORDS[-1]}" "${COMP_WORDS[-2]}"
        printf '%s\n' "${COMPREPLY[@]}""#;
    let mut command = Command::new("bash");
    let output = feed(command.args(["--norc", "-c", ASK, "bash"]).args(line), script("bash").as_bytes());
    assert!(output.status.success() && output.stderr.is_empty(), "{line:?}: {}", text(&output));
    String::from_utf8(output.stdout).unwrap().lines().map(str::to_owned).collect()
}

#[test]
fn bash_completes_verbs_options_and_engines() {
    if !installed("bash") {
        return skip("bash_completes_verbs_options_and_engines", "no bash");
    }
    assert_eq!(offered(&["migctl", "rel"]), ["release"]);
    assert_eq!(offered(&["migctl", "--json", "rel"]), ["release"]);
    let all = offered(&["migctl", ""]);
    for verb in verbs() {
        assert!(all.contains(&verb), "{verb} is not offered: {all:?}");
    }
    let engines = offered(&["migctl", "configure", ""]);
    for engine in ["docker", "podman", "containerd", "crio"] {
        assert!(engines.contains(&engine.to_owned()), "{engine} is not offered: {engines:?}");
    }
    assert_eq!(offered(&["migctl", "configure", "docker", "--dry"]), ["--dry-run"]);
}

#[test]
fn other_shells_read_their_scripts() {
    for (shell, definition) in [("zsh", "#compdef migctl"), ("fish", "complete -c migctl")] {
        let script = script(shell);
        assert!(script.contains(definition) && script.contains("release"), "{script}");
        if !installed(shell) {
            skip("other_shells_read_their_scripts", &format!("no {shell}"));
            continue;
        }
        let output = feed(Command::new(shell).args(["-n", "/dev/stdin"]), script.as_bytes());
        assert!(output.status.success() && output.stderr.is_empty(), "{shell}: {}", text(&output));
    }
}

#[test]
fn it_asks_neither_settings_nor_gpu_and_has_no_document() {
    let world = World::new(&["a100-sxm4-80gb"]);
    world.write("config.toml", "not = [settings");
    std::fs::remove_dir_all(world.path("m")).unwrap();
    assert_eq!(stdout(&world.migctl(&["completions", "fish"])), script("fish"));
    let json = world.migctl(&["completions", "bash", "--json"]);
    assert!(code(&json) == 64 && text(&json).contains("no JSON document"), "{}", text(&json));
    let unknown = world.migctl(&["completions", "csh"]);
    assert!(code(&unknown) == 64 && text(&unknown).contains("bash, zsh, fish"), "{}", text(&unknown));
}
