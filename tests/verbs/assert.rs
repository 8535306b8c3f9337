//! `migctl assert`.

use std::os::unix::process::CommandExt;
use std::process::Command;

use serde_json::{Value, json};

use crate::apply::{copied, fixture};
use crate::common::{World, binaries, run, text};
use crate::{code, document, schema, shown, snapshot};

fn told(world: &World, args: &[&str]) -> Value {
    let output = world.migctl(&[args, &["--json"]].concat());
    assert!([0, 1].contains(&code(&output)), "{}", text(&output));
    let told: Value = serde_json::from_slice(&output.stdout).unwrap();
    schema("assert", &told);
    assert_eq!(told["holds"], code(&output) == 0);
    told
}

#[test]
fn what_differs_is_told_for_each_gpu() {
    let world = World::with(&["a100-sxm4-80gb", "h100-sxm-80gb", "a30-24gb"], &["--seed", "assert"]);
    let every = copied(&world, "every-board.yaml");
    let is = |name: &str| told(&world, &["assert", &every, "--config", name]);
    assert_eq!(is("all-enabled")["holds"], true);
    // A GPU instance without a compute instance is one that apply would take away.
    world.fault("nvmlGpuInstanceCreateComputeInstance*", &["--kill", "before"]);
    assert!(world.migctl(&["create", "1g.6gb", "--gpu", "2"]).status.code().is_none());
    assert_eq!(is("all-enabled")["gpus"][2]["surplus"], json!({"1g.6gb without compute instance": 1}));
    document(&world, &["gc"]);
    world.sim("make", &["--gpu", "0", "--profile", "3g.40gb", "--start", "4"]);
    let different = is("all-balanced");
    assert_eq!(different["gpus"][0]["missing"], json!({"1g.10gb": 2, "2g.20gb": 1}));
    assert_eq!(different["gpus"][0]["surplus"], json!({}));
    assert_eq!(is("all-enabled")["gpus"][0]["surplus"], json!({"3g.40gb": 1}));
    snapshot(&world, "assert-differs", &shown(&world, &["assert", &every, "--config", "all-balanced"]));
    document(&world, &["apply", &every, "--config", "all-balanced"]);
    snapshot(&world, "assert-holds", &shown(&world, &["assert", &every, "--config", "all-balanced"]));
    assert_eq!(told(&world, &["assert", &every, "--config", "all-disabled", "--mode-only"])["holds"], false);
    assert_eq!(told(&world, &["assert", &every, "--config", "all-enabled", "--mode-only"])["holds"], true);
}

#[test]
fn a_file_is_checked_without_a_gpu() {
    let world = World::new(&["a30-24gb"]);
    world.settings("");
    let every = fixture("every-board.yaml");
    std::fs::remove_dir_all(world.path("m")).unwrap();
    let output = world.migctl(&["assert", &every, "--config", "all-balanced", "--valid-config"]);
    assert!(output.status.success(), "{}", text(&output));
    let output = world.migctl(&["assert", &every, "--config", "all-balance", "--valid-config"]);
    assert_eq!(code(&output), 65, "{}", text(&output));
    assert!(text(&output).contains("all-balanced"), "the others are named: {}", text(&output));
    told(&world, &["assert", &every, "-c", "all-balanced", "--valid-config"]);
}

#[test]
fn a_user_without_root_may_ask() {
    if !nix::unistd::geteuid().is_root() {
        return crate::common::skip("a_user_without_root_may_ask", "not root");
    }
    let world = World::new(&["a30-24gb"]);
    for path in ["m", "."] {
        run(Command::new("chmod").args(["-R", "go+rX"]).arg(world.path(path)));
    }
    let every = copied(&world, "every-board.yaml");
    let ask = |more: &[&str]| {
        let mut command = Command::new(binaries().join("migctl"));
        command.arg("--config").arg(world.config()).arg("assert").arg(&every).args(["-c", "all-enabled"]).args(more);
        run(command.uid(65534).gid(65534))
    };
    let mode = ask(&["--mode-only"]);
    if text(&mode).contains("ermission denied") {
        return crate::common::skip("a_user_without_root_may_ask", "nobody may not read the build directory");
    }
    assert_eq!(code(&mode), 0, "{}", text(&mode));
    assert_eq!(code(&ask(&[])), 0);
    world.sim("make", &["--gpu", "0", "--profile", "2g.12gb", "--start", "0"]);
    let slices = ask(&[]);
    assert_eq!(code(&slices), 1, "{}", text(&slices));
    assert!(text(&slices).contains("not wanted: 2g.12gb"), "{}", text(&slices));
}
