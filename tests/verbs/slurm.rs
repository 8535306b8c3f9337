//! `migctl slurm config`: what it prints and writes. That Slurm does what it says is in tests/slurm.rs.

use serde_json::json;

use crate::common::{World, binaries, run, text};
use crate::{code, document, shown, snapshot, stdout};
use std::process::Command;

const CONFIG: [&str; 6] = ["slurm", "config", "--cluster", "mini", "--name", "node1"];

/// A machine with a low-level runtime, which oci.conf names.
fn machine(boards: &[&str]) -> World {
    let world = World::with(boards, &["--seed", "slurm"]);
    world.recording_runtime(0);
    world
}

#[test]
fn facts_are_those_of_the_driver() {
    let world = machine(&["a100-sxm4-80gb", "a30-24gb"]);
    let facts = document(&world, &CONFIG);
    assert_eq!((&facts["node"], &facts["cluster"]), (&json!("node1"), &json!("mini")));
    let sizes = |n: usize| (facts["gpus"][n]["compute_slices"].clone(), facts["gpus"][n]["memory_slices"].clone());
    assert_eq!((sizes(0), sizes(1)), ((json!(7), json!(8)), (json!(4), json!(4))));
    let offers = facts["gpus"][0]["profiles"].as_array().unwrap();
    let big = offers.iter().find(|offer| offer["name"] == "3g.40gb").unwrap();
    assert_eq!(
        big,
        &json!({"name": "3g.40gb", "compute_slices": 3, "memory_slices": 4, "total": 2,
                "placements": [{"start": 0, "size": 4}, {"start": 4, "size": 4}]})
    );
    let name = document(&world, &CONFIG[..4])["node"].clone();
    let host = String::from_utf8(run(Command::new("uname").arg("-n")).stdout).unwrap();
    assert_eq!(name, host.trim().split('.').next().unwrap());
}

#[test]
fn texts_for_one_node() {
    let world = machine(&["a100-sxm4-80gb", "a100-sxm4-80gb"]);
    for file in ["slurm.conf", "gres.conf", "oci.conf", "job_submit.lua", "cli_filter.lua"] {
        let alone = shown(&world, &[&CONFIG[..], &["--file", file]].concat());
        // The programs are in src/slurm; here it is what differs from cluster to cluster.
        let part = alone.split("\nlocal mig = {}").next().unwrap();
        snapshot(&world, &format!("slurm-{file}"), part);
        let all = stdout(&world.migctl(&CONFIG));
        assert!(all.contains(&format!("==> {file} <==\n{}", alone.split_once('\n').unwrap().1)), "{all}");
    }
}

#[test]
fn a_controller_has_the_files_of_several_node_types() {
    let world = machine(&["a100-sxm4-80gb", "a100-sxm4-80gb"]);
    let other = machine(&["a30-24gb", "a30-24gb"]);
    let name = ["slurm", "config", "--cluster", "mini", "--name", "node2", "--json"];
    let facts = world.write("node2.json", &stdout(&other.migctl(&name))).display().to_string();
    let texts = |file: &str| shown(&world, &[&CONFIG[..], &["--node", &facts, "--file", file]].concat());
    let lua = texts("job_submit.lua");
    let part = format!("{}\n{}\n{}", texts("slurm.conf"), texts("gres.conf"), lua.split("\nlocal mig").next().unwrap());
    snapshot(&world, "slurm-two-types", &part);

    let twice = world.migctl(&[&CONFIG[..], &["--node", &facts, "--node", &facts]].concat());
    assert_eq!(code(&twice), 65, "{}", text(&twice));
    assert!(text(&twice).contains("is of node node2, which is there already"), "{}", text(&twice));
    for wrong in ["{}", "no json", r#"{"version": 2, "node": "n", "cluster": "c", "gpus": []}"#] {
        world.write("node2.json", wrong);
        let refused = world.migctl(&[&CONFIG[..], &["--node", &facts]].concat());
        assert_eq!(code(&refused), 65, "{}", text(&refused));
    }
}

#[test]
fn files_of_others_are_left_alone() {
    let world = machine(&["a30-24gb"]);
    let dir = world.path("etc");
    std::fs::create_dir(&dir).unwrap();
    let into = [&CONFIG[..], &["--dir", dir.to_str().unwrap()]].concat();
    assert_eq!(stdout(&world.migctl(&into)), "");
    let names = || {
        let mut names: Vec<String> =
            dir.read_dir().unwrap().map(|f| f.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    };
    assert_eq!(names(), ["cli_filter.lua", "gres.conf", "job_submit.lua", "mig-hook.conf", "oci.conf"]);
    assert_eq!(stdout(&world.migctl(&into)), "", "and again");
    world.write("etc/gres.conf", "Name=gpu File=/dev/nvidia0\n");
    world.write("etc/mig-hook.conf", "# Made by migctl slurm config long ago\n");
    let refused = world.migctl(&into);
    assert_eq!(code(&refused), 65, "{}", text(&refused));
    assert!(
        text(&refused).contains("etc/gres.conf is not of our making, and nothing was written"),
        "{}",
        text(&refused)
    );
    assert_eq!(std::fs::read_to_string(dir.join("mig-hook.conf")).unwrap(), "# Made by migctl slurm config long ago\n");
    assert_eq!(std::fs::read_to_string(dir.join("gres.conf")).unwrap(), "Name=gpu File=/dev/nvidia0\n");
}

#[test]
fn what_is_missing_is_told() {
    let world = machine(&["a30-24gb"]);
    let conf = world.write("slurm.conf", "ClusterName=Site\nPrologFlags=X11\n").display().to_string();
    assert_eq!(document(&world, &["slurm", "config", "--slurm-conf", &conf])["cluster"], "site");
    world.write("slurm.conf", "PrologFlags=X11\n");
    let refused = world.migctl(&["slurm", "config", "--slurm-conf", &conf]);
    assert_eq!(code(&refused), 64, "{}", text(&refused));
    assert!(text(&refused).contains("pass --cluster NAME"), "{}", text(&refused));
    let absent = world.migctl(&["slurm", "config", "--slurm-conf", "/no/such/slurm.conf"]);
    assert!(text(&absent).contains("cannot read /no/such/slurm.conf"), "{}", text(&absent));

    let off = World::with(&["a30-24gb"], &["--mig", "off"]);
    let refused = off.migctl(&CONFIG);
    assert_eq!(code(&refused), 65, "{}", text(&refused));
    assert!(text(&refused).contains("no GPU here has MIG on"), "{}", text(&refused));

    // What the settings keep from containers is not offered to jobs.
    world.settings("[limits]\nprofiles = [\"1g.6gb\"]");
    let offers = document(&world, &CONFIG)["gpus"][0]["profiles"].clone();
    assert_eq!(offers.as_array().unwrap().iter().map(|o| &o["name"]).collect::<Vec<_>>(), ["1g.6gb"]);
    assert!(binaries().join("mig-runtime").is_file());
}
