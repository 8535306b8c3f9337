//! What users ask for, and what Slurm makes of it.

use std::collections::BTreeSet;

use crate::cluster::{Cluster, SOON};
use crate::common::{text, wait_for};

/// One A100.
const SMALL: &[&[&str]] = &[&["a100-sxm4-80gb"]];

/// What is said against a command that must fail.
fn refused(cluster: &Cluster, program: &str, args: &[&str]) -> String {
    let output = cluster.run(program, args);
    assert!(!output.status.success(), "{program} {args:?}: {}", text(&output));
    String::from_utf8(output.stderr).unwrap()
}

/// A command that does nothing.
fn nothing(program: &str) -> &'static [&'static str] {
    if program == "sbatch" { &["--wrap=true"] } else { &["true"] }
}

/// MIG UUIDs in a text, in the order in which they come.
pub fn uuids(text: &str) -> Vec<String> {
    let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '-');
    words.filter(|word| word.starts_with("MIG-")).map(str::to_owned).collect()
}

#[test]
fn a_job_has_its_slice_in_every_step_and_gives_it_back() {
    let cluster = Cluster::new(SMALL);
    let shown = cluster.out("srun", &["--gres=mig:1g.10gb", "--comment=mine", "sh", "-c", "env; echo $SLURM_JOB_ID"]);
    let uuid = uuids(&shown)[0].clone();
    for line in [
        format!("CUDA_VISIBLE_DEVICES={uuid}"),
        format!("NVIDIA_VISIBLE_DEVICES={uuid}"),
        format!("MIG_UUID={uuid}"),
        "MIG_DEVICE_PROFILES=1g.10gb".into(),
    ] {
        assert!(shown.lines().any(|l| l == line), "{line} is not in\n{shown}");
    }
    let job = cluster.job(shown.trim().lines().last().unwrap());
    assert_eq!((&*job["Comment"], &*job["TresPerNode"]), ("mig=1g.10gb", "gres:migc:1,gres:migm:1"));
    cluster.assert_clean("after srun");

    let script = "echo batch $CUDA_VISIBLE_DEVICES\nsrun sh -c 'echo step $CUDA_VISIBLE_DEVICES'\n\
                  srun --gres=mig:3g.40gb sh -c 'echo asked $CUDA_VISIBLE_DEVICES'\nsrun --gres=none sh -c 'echo none $CUDA_VISIBLE_DEVICES'";
    let job = cluster.batch(&[], &format!("#SBATCH --gres=mig:3g.40gb\n{script}"));
    cluster.wait_state(&job, "COMPLETED", SOON);
    let output = cluster.output(&job);
    let seen: BTreeSet<String> = uuids(&output).into_iter().collect();
    assert_eq!((output.lines().count(), seen.len()), (4, 1), "{output}");
    cluster.assert_clean("after sbatch");

    let shown = cluster.out("salloc", &["--gres=mig:1g.10gb:2", "srun", "sh", "-c", "echo $CUDA_VISIBLE_DEVICES"]);
    assert_eq!(uuids(&shown).len(), 2, "{shown}");
    cluster.assert_clean("after salloc");
    assert!(uuids(&cluster.out("srun", &["env"])).is_empty(), "who asks for nothing gets nothing");
}

#[test]
fn requests_that_mean_nothing_are_refused_at_once_in_one_line() {
    let cluster = Cluster::new(SMALL);
    let all = "profiles are 1g.10gb, 1g.10gb+me, 1g.20gb, 2g.20gb, 3g.40gb, 4g.40gb, 7g.80gb";
    for program in ["srun", "sbatch", "salloc"] {
        let said = refused(&cluster, program, &[&["--gres=mig:9g.10gb"], nothing(program)].concat());
        let line = format!("error: mig: no profile 9g.10gb in this cluster; {all}");
        // srun is told by cli_filter.lua, which Slurm puts its own name before.
        let told = said.lines().filter(|l| l.replace("lua: ", "").ends_with(&line)).count();
        assert_eq!(told, 1, "{program}: {said}");
    }
    for (args, why) in [
        (&["--gres=mig:2"][..], "mig: say which slice"),
        (&["--gres=migc:1,migm:1"], "mig: ask for slices with --gres=mig:PROFILE"),
        (&["--gres=migc:1,migm:1", "--comment=mig=7g.80gb"], "mig: ask for slices with --gres=mig:PROFILE"),
        (&["--comment=mig=7g.80gb"], "mig: a comment has no word mig="),
        (&["--gres=mig:1g.10gb", "--comment=x mig=7g.80gb"], "mig: a comment has no word mig="),
    ] {
        for program in ["srun", "sbatch"] {
            let said = refused(&cluster, program, &[args, nothing(program)].concat());
            assert!(said.contains(why), "{program} {args:?}: {said}");
        }
    }
    // More than a node has: Slurm's own words.
    let said = refused(&cluster, "srun", &["--gres=mig:7g.80gb:2", "true"]);
    assert!(said.contains("Requested node configuration is not available"), "{said}");
    assert_eq!(cluster.out("squeue", &["-h"]), "");
    cluster.assert_clean("after refusals");
}

#[test]
fn what_a_job_asked_for_stays() {
    let cluster = Cluster::new(SMALL);
    let job = cluster.batch(&["--hold", "--gres=mig:1g.10gb", "--comment=mine"], "true");
    let job = job.as_str();
    for change in ["comment=mig=7g.80gb", "comment=mine", "gres=migc:7,migm:8", "gres=mig:7g.80gb"] {
        refused(&cluster, "scontrol", &["update", &format!("jobid={job}"), change]);
    }
    let plain = cluster.batch(&["--hold"], "true");
    for change in ["comment=mig=7g.80gb", "gres=migc:1,migm:1"] {
        refused(&cluster, "scontrol", &["update", &format!("jobid={plain}"), change]);
    }
    cluster.out("scontrol", &["update", &format!("jobid={job}"), "comment=mig=1g.10gb other", "name=changed"]);
    let known = cluster.job(job);
    assert_eq!((&*known["Comment"], &*known["TresPerNode"]), ("mig=1g.10gb", "gres:migc:1,gres:migm:1"));
    assert_eq!(known["JobName"], "changed");
}

#[test]
fn mixed_profiles_are_packed_without_static_partitions() {
    let cluster = Cluster::new(&[&["a100-sxm4-80gb"], &["a100-sxm4-80gb"]]);
    let wait = "until [ -e go ]; do sleep 0.1; done; echo $CUDA_VISIBLE_DEVICES";
    let asked = ["3g.40gb", "4g.40gb", "2g.20gb", "2g.20gb", "1g.10gb", "1g.10gb", "1g.10gb"];
    let jobs: Vec<String> = asked.iter().map(|p| cluster.batch(&[&format!("--gres=mig:{p}")], wait)).collect();
    let last = cluster.batch(&["--gres=mig:7g.80gb"], wait);
    cluster.wait_leases(jobs.len());
    jobs.iter().for_each(|job| assert_eq!(cluster.job_state(job), "RUNNING", "{job} of {jobs:?}"));
    assert_eq!(cluster.job_state(&last), "PENDING", "no GPU is empty");
    assert_eq!(cluster.job(&last)["Reason"], "Resources");
    std::fs::write(cluster.path("home/go"), "").unwrap();
    jobs.iter().chain([&last]).for_each(|job| cluster.wait_state(job, "COMPLETED", SOON * 2));
    let got: BTreeSet<String> = jobs.iter().flat_map(|job| uuids(&cluster.output(job))).collect();
    assert_eq!(got.len(), jobs.len(), "each had its own");
    cluster.assert_clean("after all");
}

#[test]
fn nodes_with_several_gpus_start_no_more_than_has_room() {
    let cluster = Cluster::new(&[&["a100-sxm4-80gb", "a100-sxm4-80gb"]]);
    // 14 compute slices and 16 memory slices would let three in.
    let jobs =
        ["4g.40gb"; 3].map(|p| cluster.batch(&[&format!("--gres=mig:{p}")], "until [ -e go ]; do sleep 0.1; done"));
    cluster.wait_leases(2);
    jobs[..2].iter().for_each(|job| assert_eq!(cluster.job_state(job), "RUNNING"));
    assert_eq!(cluster.job_state(&jobs[2]), "PENDING");
    // And beside them what fits beside them.
    assert_eq!(uuids(&cluster.out("srun", &["--gres=mig:3g.40gb:2", "env"])).len() % 2, 0);
    std::fs::write(cluster.path("home/go"), "").unwrap();
    jobs.iter().for_each(|job| cluster.wait_state(job, "COMPLETED", SOON));
    cluster.assert_clean("after all");
}

#[test]
fn jobs_go_where_their_profile_is_offered() {
    let cluster = Cluster::new(&[&["a100-sxm4-80gb"], &["a30-24gb"]]);
    for (profile, node) in [("1g.10gb", 0), ("1g.6gb", 1), ("4g.24gb", 1), ("3g.40gb", 0), ("1g.6gb+me", 1)] {
        let on = cluster.out("srun", &[&format!("--gres=mig:{profile}"), "sh", "-c", "echo $SLURMD_NODENAME"]);
        assert_eq!(on.trim(), cluster.nodes[node].name, "{profile}");
    }
    // A job of two nodes has its slices on each.
    let said = refused(&cluster, "srun", &["-N2", "--gres=mig:1g.10gb", "true"]);
    assert!(said.contains("Requested node configuration is not available"), "{said}");
    cluster.assert_clean("after all");
}

#[test]
fn a_job_of_two_nodes_has_slices_on_each() {
    let cluster = Cluster::new(&[&["a100-sxm4-80gb"], &["a100-sxm4-80gb"]]);
    let shown =
        cluster.out("srun", &["-N2", "--gres=mig:2g.20gb", "sh", "-c", "echo $SLURMD_NODENAME $CUDA_VISIBLE_DEVICES"]);
    let got: BTreeSet<String> = uuids(&shown).into_iter().collect();
    assert_eq!((shown.lines().count(), got.len()), (2, 2), "{shown}");
    cluster.assert_clean("after it");
}

#[test]
fn every_task_of_an_array_has_a_slice_of_its_own() {
    let cluster = Cluster::new(&[&["a100-sxm4-80gb"], &["a100-sxm4-80gb"]]);
    let script = "echo $CUDA_VISIBLE_DEVICES > got-$SLURM_ARRAY_TASK_ID; until [ -e go ]; do sleep 0.1; done";
    cluster.batch(&["--array=1-16", "--gres=mig:1g.10gb"], script);
    cluster.wait_leases(14);
    let of = |n: usize| std::fs::read_to_string(cluster.path(&format!("home/got-{n}"))).unwrap_or_default();
    let got = || (1..=16).flat_map(|n| uuids(&of(n))).collect::<BTreeSet<String>>().len();
    wait_for("tasks", SOON, || got() == 14);
    assert_eq!(cluster.out("squeue", &["-h", "-r", "-t", "PD", "-o", "%i"]).lines().count(), 2, "14 have room at once");
    std::fs::write(cluster.path("home/go"), "").unwrap();
    wait_for("the rest", SOON, || cluster.out("squeue", &["-h"]).is_empty());
    assert!((1..=16).all(|n| uuids(&of(n)).len() == 1));
    cluster.assert_clean("after the array");
}

#[test]
fn steps_share_what_their_job_has() {
    let cluster = Cluster::new(SMALL);
    let script = "srun --exact -n1 --gres=mig:1g.10gb sh -c 'touch one; until [ -e two ]; do sleep 0.1; done' &\n\
                  srun --exact -n1 --gres=mig:1g.10gb sh -c 'touch two; until [ -e one ]; do sleep 0.1; done' &\nwait\n\
                  srun --gres=mig:3g.40gb true || echo refused";
    let job = cluster.batch(&["-n2", "--gres=mig:1g.10gb:2"], script);
    cluster.wait_state(&job, "COMPLETED", SOON);
    let output = cluster.output(&job);
    assert!(cluster.path("home/one").exists() && cluster.path("home/two").exists(), "{output}");
    assert!(output.contains("is more than the job's gres_per_node") && output.contains("refused"), "{output}");
    cluster.assert_clean("after the job");
}
