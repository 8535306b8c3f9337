//! `migctl job`: what people and batch systems see. Its life is in tests/jobs.rs and tests/slurm.

use crate::common::{World, skip, text};
use crate::{code, document, snapshot, stdout};

fn machine(what: &str) -> Option<World> {
    let world = World::with(&["a100-sxm4-80gb"], &["--seed", "job"]);
    if !world.path("m/dev/nvidia0").exists() {
        skip(what, "no device nodes can be made here");
        return None;
    }
    Some(world)
}

fn start<'a>(key: &'a str, request: &'a str) -> Vec<&'a str> {
    vec!["job", "start", "--key", key, "--uid", "4711", "--gid", "4711", request]
}

#[test]
fn a_job_from_its_start_to_its_end() {
    let Some(world) = machine("a_job_from_its_start_to_its_end") else { return };
    let started = document(&world, &start("pbs:7", "1g.10gb,2g.20gb"));
    assert_eq!(started["slices"].as_array().unwrap().len(), 2);
    assert_eq!(started["environment"]["MIG_JOB"], "pbs:7");
    assert_eq!(document(&world, &["job", "env", "--key", "pbs:7"]), started, "what root was told, the job is");
    let mut said = stdout(&world.migctl(&["leases"]));
    for format in ["shell", "slurm", "docker"] {
        said += &format!("{format}:\n{}", stdout(&world.migctl(&["job", "env", "--key", "pbs:7", "--format", format])));
    }
    said += &stdout(&world.migctl(&["job", "end", "--key", "pbs:7"]));
    said += &stdout(&world.migctl(&["job", "end", "--key", "pbs:7"]));
    snapshot(&world, "job", &said);
    world.assert_clean("after its end");
    let ended = document(&world, &["job", "end", "--key", "pbs:7"]);
    assert!(ended["token"].is_null() && ended.get("released").is_none(), "{ended}");
}

#[test]
fn a_refusal_is_told_to_the_job() {
    let Some(world) = machine("a_refusal_is_told_to_the_job") else { return };
    let mut said = String::new();
    for (args, expected) in [
        (start("pbs:8", "2x7g.80gb"), 65),
        (vec!["job", "env", "--key", "pbs:8"], 75),
        (vec!["job", "end", "--key", "pbs:8"], 0),
        (vec!["job", "env", "--key", "pbs:8"], 65),
        (start("../pbs", "1g.10gb"), 64),
        (start("pbs:9", "1g"), 65),
    ] {
        let output = world.migctl(&args);
        assert_eq!(code(&output), expected, "{args:?}: {}", text(&output));
        let shown = text(&output);
        said += &format!("migctl {}\n  {}\n", args.join(" "), shown.lines().nth(1).unwrap_or_default());
    }
    snapshot(&world, "job-refused", &said);
    world.assert_clean("after all");
}
