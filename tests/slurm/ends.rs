//! Every way in which a job ends, or seems to: no lease and no instance is left, and the node stays open to others.
//!
//! The rows are those of a table that was made with this Slurm before there was a mig-hook (when its Epilog comes, late, or
//! never). Those that wait for Slurm's slow clocks are ignored; `make test-slurm-slow` runs them.

use std::process::Child;
use std::time::Duration;

use crate::cluster::{Cluster, SOON};
use crate::common::{text, wait_for};

const SMALL: &[&[&str]] = &[&["a100-sxm4-80gb"]];
/// For as long as a test wants.
const HOLD: &str = "touch began-$SLURM_JOB_ID; until [ -e go ]; do sleep 0.1; done; touch ended-$SLURM_JOB_ID";

/// A job that holds a slice of that profile until `go`; it has begun.
fn holding(cluster: &Cluster, more: &[&str], profile: &str) -> String {
    let job = cluster.batch(&[more, &[&format!("--gres=mig:{profile}")]].concat(), HOLD);
    cluster.wait_for_file(&format!("began-{job}"));
    job
}

fn go(cluster: &Cluster) {
    std::fs::write(cluster.path("home/go"), "").unwrap();
}

fn end_of(child: Child) -> (Option<i32>, String) {
    let output = child.wait_with_output().unwrap();
    (output.status.code(), text(&output))
}

/// `migctl` on the first node.
fn migctl(cluster: &Cluster, args: &[&str]) -> String {
    text(&cluster.nodes[0].world.migctl(args))
}

#[test]
fn cancelled_in_every_way() {
    let cluster = Cluster::new(SMALL);
    let deaf = "trap '' TERM; touch began-$SLURM_JOB_ID; while :; do sleep 0.1; done";
    for (script, signal) in [(HOLD, &[][..]), (HOLD, &["--signal=KILL"]), (deaf, &[])] {
        let job = cluster.batch(&["--gres=mig:1g.10gb"], script);
        cluster.wait_for_file(&format!("began-{job}"));
        cluster.out("scancel", &[signal, &[&job]].concat());
        cluster.assert_clean(&format!("after scancel {signal:?} of {script}"));
    }
    let srun = cluster.start("srun", &["--gres=mig:1g.10gb", "sleep", "600"]);
    let token = cluster.wait_leases(1)[0]["token"].clone();
    assert!(token.is_string());
    cluster.out("scancel", &["-u", "migtest"]);
    assert_ne!(end_of(srun).0, Some(0));
    cluster.assert_clean("after scancel of srun");
    // An array, in the middle.
    let array = cluster.batch(&["--array=1-4", "--gres=mig:1g.10gb"], HOLD);
    cluster.wait_leases(4);
    cluster.out("scancel", &[&array]);
    cluster.assert_clean("after scancel of an array");
}

#[test]
fn a_job_without_steps_keeps_its_slice_until_it_ends() {
    let cluster = Cluster::new(SMALL);
    let salloc = cluster.start("salloc", &["--gres=mig:1g.10gb", "sh", "-c", HOLD]);
    let token = cluster.wait_leases(1)[0]["token"].clone();
    for _ in 0..3 {
        migctl(&cluster, &["gc"]);
        std::thread::sleep(Duration::from_millis(300));
    }
    let lease = cluster.leases().remove(0);
    assert_eq!((&lease["token"], &lease["state"]), (&token, &"active".into()));
    assert!(lease["holder"]["init"].is_object(), "a process of the job is known: {lease:#}");
    go(&cluster);
    assert_eq!(end_of(salloc).0, Some(0));
    cluster.assert_clean("after salloc");
}

#[test]
fn a_time_limit() {
    // Slurm looks at it every half minute.
    let cluster = Cluster::new(SMALL);
    let job = cluster.batch(&["--gres=mig:2g.20gb", "--time=0:05"], "sleep 600");
    cluster.wait_leases(1);
    cluster.wait_state(&job, "TIMEOUT", Duration::from_secs(180));
    cluster.assert_clean("after its time limit");
}

#[test]
fn a_refusal_fails_that_job_alone_and_says_why_in_one_line() {
    let cluster = Cluster::new(SMALL);
    migctl(&cluster, &["cordon", "0", "--reason", "a fan is broken"]);
    let (code, said) = end_of(cluster.start("srun", &["--gres=mig:1g.10gb", "echo", "it ran"]));
    assert!(code != Some(0) && !said.contains("it ran"), "{said}");
    let told: Vec<&str> = said.lines().filter(|line| line.contains("migctl: ")).collect();
    assert!(told.len() == 1 && told[0].contains("a fan is broken"), "{said}");
    let batch = cluster.batch(&["--gres=mig:1g.10gb"], "echo it ran");
    cluster.wait_state(&batch, "FAILED", SOON);
    let said = cluster.output(&batch);
    assert!(said.contains("a fan is broken") && !said.contains("it ran"), "{said}");
    assert_eq!(cluster.out("srun", &["echo", "others run"]).trim(), "others run");
    cluster.assert_clean("after refusals");

    migctl(&cluster, &["uncordon", "0"]);
    assert!(cluster.out("srun", &["--gres=mig:1g.10gb", "env"]).contains("MIG_LEASE="));
    cluster.assert_clean("after one that was not refused");

    // Settings that can't be read: the job is told where its TaskProlog looks.
    let world = &cluster.nodes[0].world;
    let settings = std::fs::read_to_string(world.config()).unwrap();
    std::fs::write(world.config(), format!("{settings}\n[limits]\nslices = 3\n")).unwrap();
    let (code, said) = end_of(cluster.start("srun", &["--gres=mig:1g.10gb", "echo", "it ran"]));
    assert!(code != Some(0) && said.contains("unknown key limits.slices"), "{said}");
    assert_eq!(cluster.out("srun", &["echo", "others run"]).trim(), "others run");
    std::fs::write(world.config(), settings).unwrap();
    cluster.assert_clean("after broken settings");
}

#[test]
fn a_requeued_job_gives_back_and_gets_again() {
    // Slurm waits with the second start until the first one's credential has expired.
    let cluster = Cluster::with(SMALL, "AuthInfo=socket=@DIR@/run/munge,cred_expire=5", "");
    let job = cluster.batch(&["--requeue", "--gres=mig:1g.10gb"], &format!("echo run $SLURM_RESTART_COUNT; {HOLD}"));
    let first = cluster.wait_leases(1)[0]["token"].clone();
    cluster.wait_state(&job, "RUNNING", SOON);
    cluster.out("scontrol", &["requeue", &job]);
    wait_for("its slice to be free", SOON, || cluster.leases().is_empty());
    cluster.wait_state(&job, "RUNNING", Duration::from_secs(240));
    let second = cluster.wait_leases(1)[0]["token"].clone();
    assert_ne!(first, second);
    go(&cluster);
    cluster.wait_state(&job, "COMPLETED", SOON);
    cluster.assert_clean("after the second run");
}

#[test]
fn slurmd_is_killed_and_comes_back_while_the_job_runs() {
    let cluster = Cluster::new(SMALL);
    let job = holding(&cluster, &[], "1g.10gb");
    let token = cluster.wait_leases(1)[0]["token"].clone();
    cluster.end_slurmd(0, "KILL");
    migctl(&cluster, &["gc"]);
    cluster.start_slurmd(0);
    migctl(&cluster, &["gc"]);
    assert_eq!(cluster.leases()[0]["token"], token, "the job lives, and keeps its slice");
    go(&cluster);
    cluster.wait_state(&job, "COMPLETED", SOON);
    cluster.assert_clean("after the job");
}

#[test]
fn slurmd_is_away_when_the_job_ends() {
    let cluster = Cluster::new(SMALL);
    let job = holding(&cluster, &[], "1g.10gb");
    cluster.end_slurmd(0, "KILL");
    go(&cluster);
    cluster.wait_for_file(&format!("ended-{job}"));
    migctl(&cluster, &["gc"]);
    assert_eq!(cluster.leases().len(), 1, "Slurm still holds the job together");
    cluster.start_slurmd(0);
    cluster.wait_state(&job, "COMPLETED", SOON);
    cluster.assert_clean("after slurmd is back");
}

#[test]
fn slurmctld_is_away_when_the_job_ends() {
    let cluster = Cluster::new(SMALL);
    let job = holding(&cluster, &[], "1g.10gb");
    cluster.end_slurmctld("TERM");
    go(&cluster);
    cluster.wait_for_file(&format!("ended-{job}"));
    cluster.start_slurmctld();
    cluster.wait_state(&job, "COMPLETED", SOON * 2);
    cluster.assert_clean("after slurmctld is back");
}

/// Slurm forgets the job, never calls its Epilog, and gives its number to another one.
#[test]
fn slurmctld_is_killed_right_after_the_submission() {
    let cluster = Cluster::new(SMALL);
    let job = holding(&cluster, &[], "1g.10gb");
    let first = cluster.wait_leases(1)[0]["token"].clone();
    cluster.end_slurmctld("KILL");
    cluster.start_slurmctld();
    wait_for("slurmctld", SOON, || cluster.node_state(0).starts_with("IDLE") || !cluster.job(&job).is_empty());
    migctl(&cluster, &["gc"]);
    assert_eq!(cluster.leases().first().map(|lease| &lease["token"]), Some(&first), "its processes live");
    go(&cluster);
    // Then Slurm has given it up, or takes it for an orphan and ends it.
    wait_for("gc to free it", SOON, || {
        migctl(&cluster, &["gc"]);
        cluster.leases().is_empty()
    });
    std::fs::remove_file(cluster.path("home/go")).unwrap();
    // Whichever number the next one has.
    let next = cluster.batch(&["--gres=mig:1g.10gb"], HOLD);
    let second = cluster.wait_leases(1)[0]["token"].clone();
    assert_ne!(first, second, "job {next} after job {job}");
    go(&cluster);
    cluster.wait_state(&next, "COMPLETED", SOON);
    cluster.assert_clean("after both");
}

#[test]
fn a_job_uses_what_it_has_by_migctl_run() {
    let cluster = Cluster::new(SMALL);
    let run = format!("{} run", cluster.path("bin/migctl").display());
    let script = format!(
        "echo $MIG_UUID; {run} 1g.10gb -- sh -c 'echo $MIG_UUID; exit 7'; echo $?; {run} 3g.40gb -- true; echo $?"
    );
    let said = cluster.out("srun", &["--gres=mig:1g.10gb", "sh", "-c", &script]);
    let lines: Vec<&str> = said.lines().collect();
    assert!(lines.len() == 4 && lines[0] == lines[1] && lines[0].starts_with("MIG-"), "{said}");
    assert_eq!((lines[2], lines[3]), ("7", "65"), "its own exit code, and a request that the job does not meet");
    cluster.assert_clean("after it");
}

#[test]
fn confined_jobs_open_their_own_slices_only() {
    let cluster = Cluster::with(SMALL, "", "[jobs]\nconfine = true");
    let caps = cluster.nodes[0].world.path("m/dev/nvidia-caps").display().to_string();
    // What the kernel says of each capability node: ENXIO where it may be opened (there is no such driver), else EPERM.
    let look = format!(
        "for node in {caps}/*; do (exec 3<$node) 2>&1 | sed 's/.*cannot open //'; done; (exec 3</dev/null) && echo null; {HOLD}"
    );
    let look = look.as_str();
    let one = holding(&cluster, &[], "1g.10gb");
    let two = cluster.batch(&["--gres=mig:2g.20gb"], look);
    cluster.wait_state(&two, "RUNNING", SOON);
    wait_for("what it has looked at", SOON, || cluster.output(&two).contains("null"));
    let said = cluster.output(&two);
    let count = |what: &str| said.lines().filter(|line| line.ends_with(what)).count();
    assert_eq!((count("Operation not permitted"), count("No such device or address")), (2, 2), "{said}");
    let plain = cluster.batch(&[], look);
    wait_for("what it has looked at", SOON, || cluster.output(&plain).contains("null"));
    let said = cluster.output(&plain);
    assert_eq!(said.lines().filter(|line| line.ends_with("Operation not permitted")).count(), 4, "{said}");
    go(&cluster);
    for job in [&one, &two, &plain] {
        cluster.wait_state(job, "COMPLETED", SOON);
    }
    cluster.assert_clean("after all");
}

/// Of a job that is cancelled while its Prolog runs Slurm forgets the cgroup that we have made for it.
#[test]
fn cancelled_during_its_prolog() {
    let cluster = Cluster::with(SMALL, "", "[jobs]\nconfine = true\nwait = \"1h\"");
    migctl(&cluster, &["cordon", "0"]);
    let waiting = cluster.batch(&["--gres=mig:1g.10gb"], HOLD);
    wait_for("its Prolog to wait in line", SOON, || {
        cluster.nodes[0].world.document(&["queue"])["waiting"].as_array().is_some_and(|line| line.len() == 1)
    });
    cluster.out("scancel", &[&waiting]);
    migctl(&cluster, &["uncordon", "0"]);
    cluster.assert_clean("after scancel in the Prolog");
}

/// Slurm 22.05 does not miss a slurmstepd while the one of the extern step, which `PrologFlags=Contain` makes, is there: not
/// in 420 s, watched.
#[test]
fn slurmstepd_is_killed() {
    let cluster = Cluster::new(SMALL);
    let job = holding(&cluster, &["--no-requeue"], "1g.10gb");
    let token = cluster.wait_leases(1)[0]["token"].clone();
    let kept = |why: &str| {
        for _ in 0..3 {
            migctl(&cluster, &["gc"]);
            std::thread::sleep(Duration::from_secs(1));
        }
        assert_eq!(cluster.leases()[0]["token"], token, "{why}");
    };
    cluster.kill_stepds("/step_batch");
    kept("the payload lives, and keeps its slice");
    go(&cluster);
    kept("the job goes on, says Slurm");
    cluster.out("scancel", &[&job]);
    cluster.assert_clean("after scancel");
}

#[test]
#[ignore = "slow: the node is given up after its SlurmdTimeout"]
fn the_node_comes_back_without_its_job() {
    let cluster = Cluster::with(SMALL, "SlurmdTimeout=30", "");
    holding(&cluster, &["--no-requeue"], "1g.10gb");
    cluster.end_slurmd(0, "KILL");
    cluster.kill_stepds("/");
    cluster.kill_jobs();
    wait_for("gc to free it", SOON, || {
        migctl(&cluster, &["gc"]);
        cluster.leases().is_empty()
    });
    cluster.start_slurmd(0);
    cluster.assert_clean_within(Duration::from_secs(300), "when the node is back");
}
