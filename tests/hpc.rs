//! packaging/hpc: the scripts that other batch systems and container engines call, as they are shipped, on a simulated
//! machine with the shipped migctl. PBS, LSF, enroot and Sarus themselves are not here: docs/hpc.md says what was read.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use common::{World, binaries, blocks, installed, run, skip, text, wait_for};
use serde_json::{Value, json};

const PROGRAM: &str = "/usr/bin/migctl";
/// A user and a group that are on every machine.
const NOBODY: u32 = 65534;
/// An A100's seven 1g slices, all of them.
const EVERYTHING: &str = "7x1g.10gb";

/// A file of packaging/hpc that calls this world's migctl.
fn shipped(world: &World, file: &str) -> PathBuf {
    let migctl = world.script(
        "migctl",
        &format!("exec {} --config {} \"$@\"", binaries().join("migctl").display(), world.config().display()),
    );
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("packaging/hpc").join(file);
    let script = std::fs::read_to_string(&source).unwrap();
    assert!(script.contains(PROGRAM), "{file} does not call {PROGRAM}");
    let copy = world.write(file, &script.replace(PROGRAM, migctl.to_str().unwrap()));
    std::fs::set_permissions(&copy, source.metadata().unwrap().permissions()).unwrap();
    copy
}

fn machine() -> World {
    World::with(&["a100-sxm4-80gb"], &["--seed", "hpc"])
}

/// Gives a job of this user what it asks for, and says which slices these are.
fn start(world: &World, key: &str, request: &str) -> String {
    let uid = nix::unistd::geteuid().to_string();
    let answer = world.document(&["job", "start", "--key", key, "--uid", &uid, request]);
    answer["environment"]["CUDA_VISIBLE_DEVICES"].as_str().unwrap().to_owned()
}

/// Lets others than root read what a test has made, where they can run our binaries at all.
fn open_to_all(world: &World, what: &str) -> bool {
    if !nix::unistd::geteuid().is_root() {
        skip(what, "not root: there is only one user here");
        return false;
    }
    std::fs::set_permissions(world.path(""), std::fs::Permissions::from_mode(0o755)).unwrap();
    let mut other = Command::new(binaries().join("migctl"));
    let runs = other.arg("--version").uid(NOBODY).gid(NOBODY).output().is_ok_and(|output| output.status.success());
    if !runs {
        skip(what, "our binaries are not for everybody here");
    }
    runs
}

// ---- enroot ----

/// What 95-mig-hook.sh makes of a container's environment file.
struct Enroot {
    output: Output,
    environ: Vec<String>,
}

impl Enroot {
    /// enroot starts an image of NVIDIA's, whose ENV has NVIDIA_VISIBLE_DEVICES=all.
    fn starts(world: &World, variables: &[(&str, &str)]) -> Enroot {
        Enroot::with(world, Command::new("bash"), variables)
    }

    fn with(world: &World, mut bash: Command, variables: &[(&str, &str)]) -> Enroot {
        let hook = shipped(world, "enroot/95-mig-hook.sh");
        let file = world.write("environ", "NVIDIA_VISIBLE_DEVICES=all\nTERM=xterm\n");
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o666)).unwrap();
        bash.arg(hook).env_clear().env("PATH", std::env::var_os("PATH").unwrap());
        bash.env("ENROOT_PID", "1").env("ENROOT_ROOTFS", "/nowhere").env("ENROOT_ENVIRON", &file);
        let output = run(bash.envs(variables.iter().copied()));
        let environ = std::fs::read_to_string(file).unwrap().lines().map(str::to_owned).collect();
        Enroot { output, environ }
    }

    /// As enroot-switchroot and 98-nvidia.sh read it: the last line counts.
    fn variable(&self, name: &str) -> &str {
        let value = |line: &'_ String| line.split_once('=').filter(|(n, _)| *n == name).map(|(n, _)| n.len() + 1);
        self.environ.iter().rev().find_map(|line| Some(&line[value(line)?..])).unwrap_or("")
    }

    fn left_alone(&self) {
        assert!(self.output.status.success(), "{}", text(&self.output));
        assert!(self.output.stderr.is_empty(), "{}", text(&self.output));
        assert_eq!(self.environ, ["NVIDIA_VISIBLE_DEVICES=all", "TERM=xterm"]);
    }

    fn refused(&self, why: &str) {
        assert_eq!(self.output.status.code(), Some(1), "{}", text(&self.output));
        let said = String::from_utf8_lossy(&self.output.stderr);
        assert!(said.starts_with("95-mig-hook: ") && said.contains(why) && said.lines().count() == 1, "{said}");
    }
}

const JOB: [(&str, &str); 2] = [("SLURM_CLUSTER_NAME", "mini"), ("SLURM_JOB_ID", "7")];

#[test]
fn an_enroot_container_gets_the_slices_of_its_job() {
    let world = machine();
    let uuids = start(&world, "slurm:mini:7", "1g.10gb,2g.20gb");
    let slurm = Enroot::starts(&world, &JOB);
    assert!(slurm.output.status.success(), "{}", text(&slurm.output));
    for name in ["NVIDIA_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES", "MIG_UUID"] {
        assert_eq!(slurm.variable(name), uuids, "{:#?}", slurm.environ);
    }
    assert_eq!((slurm.variable("MIG_JOB"), slurm.variable("TERM")), ("slurm:mini:7", "xterm"));
    // What migctl started is known by MIG_JOB.
    let other = Enroot::starts(&world, &[("MIG_JOB", "slurm:mini:7"), ("SLURM_JOB_ID", "8")]);
    assert_eq!(other.variable("NVIDIA_VISIBLE_DEVICES"), uuids);
}

#[test]
fn an_enroot_container_of_nobody_s_job_is_left_alone() {
    let world = machine();
    Enroot::starts(&world, &[]).left_alone();
    Enroot::starts(&world, &JOB).left_alone();
    start(&world, "slurm:mini:8", "1g.10gb");
    Enroot::starts(&world, &JOB).left_alone();
}

#[test]
fn what_enroot_s_own_environment_says_is_one_of_the_job_s_slices_or_nothing() {
    let world = machine();
    let uuids = start(&world, "slurm:mini:7", "2x1g.10gb");
    let with = |value: &str| Enroot::starts(&world, &[&JOB[..], &[("NVIDIA_VISIBLE_DEVICES", value)]].concat());
    let (_, second) = uuids.split_once(',').unwrap();
    let one = with(second);
    assert_eq!((one.variable("CUDA_VISIBLE_DEVICES"), one.variable("NVIDIA_VISIBLE_DEVICES")), (second, second));
    assert_eq!(one.variable("MIG_UUID"), uuids);
    assert_eq!(with(&uuids).variable("CUDA_VISIBLE_DEVICES"), uuids);
    assert_eq!(with("").variable("CUDA_VISIBLE_DEVICES"), uuids);
    with("void").left_alone();
    with("none").left_alone();
    for other in ["all", "0", "MIG-00000000-0000-0000-0000-000000000000", &format!("{second},all"), "*"] {
        with(other).refused("is no slice of this job");
    }
}

#[test]
fn a_job_that_was_refused_gets_no_enroot_container_and_the_reason() {
    let world = machine();
    start(&world, "slurm:mini:6", EVERYTHING);
    let uid = nix::unistd::geteuid().to_string();
    let refused = world.migctl(&["job", "start", "--key", "slurm:mini:7", "--uid", &uid, "3g.40gb"]);
    assert_eq!(refused.status.code(), Some(75), "{}", text(&refused));
    let enroot = Enroot::starts(&world, &JOB);
    enroot.refused("job slurm:mini:7 was refused: no room for 3g.40gb");
    assert_eq!(enroot.environ.len(), 2, "{:#?}", enroot.environ);
}

#[test]
fn pyxis_starts_enroot_as_root_of_a_namespace_of_the_user_s() {
    let world = machine();
    if !open_to_all(&world, "enroot's hook as another user") || !installed("unshare") {
        return;
    }
    let job = |key: &str, uid: u32| {
        let id = uid.to_string();
        world.document(&["job", "start", "--key", key, "--uid", &id, "--gid", &id, "1g.10gb"])
    };
    let uuid = job("slurm:mini:7", NOBODY)["environment"]["MIG_UUID"].as_str().unwrap().to_owned();
    job("slurm:mini:8", NOBODY - 1);
    for how in ["--map-root-user", "--map-current-user"] {
        let bash = |id: &str| {
            let mut command = Command::new("unshare");
            command.args(["--user", how, "bash"]).uid(NOBODY).gid(NOBODY);
            Enroot::with(&world, command, &[("SLURM_CLUSTER_NAME", "mini"), ("SLURM_JOB_ID", id)])
        };
        let own = bash("7");
        if text(&own.output).contains("unshare failed") {
            return skip("enroot's hook in a user namespace", "users may make none here");
        }
        assert_eq!(own.variable("NVIDIA_VISIBLE_DEVICES"), uuid, "{how}: {}", text(&own.output));
        bash("8").refused("another user's");
    }
}

// ---- PBS ----

/// What PBS's MoM would do after the hook. `None`: no Python is here.
fn pbs(world: &World, event: &Value) -> Option<Value> {
    mom(&shipped(world, "pbs/mig_hook.py"), event)
}

fn mom(hook: &Path, event: &Value) -> Option<Value> {
    if !installed("python3") {
        skip("the hook of PBS", "no python3");
        return None;
    }
    let mut command = Command::new("python3");
    command.arg("-B").arg(hook).env("PBS_EVENT", event.to_string());
    command.env("PYTHONPATH", Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/hpc"));
    let output = run(&mut command);
    assert!(output.status.success(), "{}", text(&output));
    Some(serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {}", text(&output))))
}

fn of_job(kind: &str, id: &str, resources: Value) -> Value {
    let user = nix::unistd::User::from_uid(nix::unistd::geteuid()).unwrap().unwrap().name;
    json!({"type": kind, "job": {"id": id, "euser": user, "resources": resources}})
}

fn accepted(verdict: &Value) {
    assert_eq!((&verdict["accepted"], &verdict["deleted"]), (&json!(true), &json!(false)), "{verdict:#}");
    assert_eq!(verdict["log"], json!([]), "{verdict:#}");
}

#[test]
fn a_pbs_job_has_its_slices_from_begin_to_end() {
    let world = machine();
    let asked = json!({"mig": "1g.10gb,2g.20gb"});
    let Some(begun) = pbs(&world, &of_job("EXECJOB_BEGIN", "12[3].server", asked.clone())) else { return };
    accepted(&begun);
    let lease = world.lease();
    assert_eq!(lease["holder"]["job"], "pbs:12[3].server");
    let uuids: Vec<&str> = lease["slices"].as_array().unwrap().iter().map(|s| s["uuid"].as_str().unwrap()).collect();

    let launched = pbs(&world, &of_job("EXECJOB_LAUNCH", "12[3].server", asked)).unwrap();
    accepted(&launched);
    // A comma within a value is escaped, as class pbs_env of OpenPBS has it.
    assert_eq!(launched["env"]["CUDA_VISIBLE_DEVICES"], uuids.join("\\,"));
    assert_eq!(launched["env"]["MIG_JOB"], "pbs:12[3].server");

    for _ in 0..2 {
        accepted(&pbs(&world, &of_job("EXECJOB_END", "12[3].server", json!({}))).unwrap());
        world.assert_clean("after the job's end");
    }
}

#[test]
fn a_pbs_job_that_asks_for_nothing_is_left_alone() {
    let world = machine();
    for resources in [json!({}), json!({"mig": null}), json!({"mig": ""})] {
        for kind in ["EXECJOB_BEGIN", "EXECJOB_LAUNCH", "EXECJOB_END"] {
            let Some(verdict) = pbs(&world, &of_job(kind, "1.server", resources.clone())) else { return };
            accepted(&verdict);
            assert_eq!(verdict["env"], json!({}));
        }
    }
    world.assert_clean("though nothing was asked for");
}

#[test]
fn a_pbs_job_without_room_is_queued_again_and_a_wrong_one_deleted() {
    let world = machine();
    start(&world, "pbs:1.server", EVERYTHING);
    let begin = |profile: &str| pbs(&world, &of_job("EXECJOB_BEGIN", "2.server", json!({"mig": profile})));
    let Some(full) = begin("3g.40gb") else { return };
    assert_eq!((&full["accepted"], &full["deleted"]), (&json!(false), &json!(false)), "{full:#}");
    assert!(full["message"].as_str().unwrap().contains("no room for 3g.40gb"), "{full:#}");
    for wrong in ["9g.90gb", "--help", "'; touch x"] {
        let verdict = begin(wrong).unwrap();
        assert_eq!((&verdict["accepted"], &verdict["deleted"]), (&json!(false), &json!(true)), "{verdict:#}");
        assert_ne!(verdict["message"], "");
    }
    assert_eq!(world.leases().len(), 1);
    let nothing = pbs(&world, &of_job("EXECJOB_LAUNCH", "2.server", json!({}))).unwrap();
    accepted(&nothing);
}

#[test]
fn what_a_pbs_job_left_is_freed_when_mom_knows_it_no_more() {
    let world = machine();
    let keys = ["pbs:1.server", "pbs:2.server", "slurm:mini:3"];
    keys.iter().for_each(|key| drop(start(&world, key, "1g.10gb")));
    let periodic = || pbs(&world, &json!({"type": "EXECHOST_PERIODIC", "job_list": ["1.server"]}));
    let jobs = || -> Vec<String> {
        let mut jobs: Vec<String> =
            world.leases().iter().map(|lease| lease["holder"]["job"].as_str().unwrap().to_owned()).collect();
        jobs.sort();
        jobs
    };
    let Some(young) = periodic() else { return };
    accepted(&young);
    assert_eq!(jobs(), keys, "a job that has just begun need not be in the list");
    for lease in world.leases() {
        let begun = lease["created_boot_ms"].as_i64().unwrap() - 700_000;
        world.edit_lease(lease["token"].as_str().unwrap(), |lease| lease["created_boot_ms"] = json!(begun.max(0)));
    }
    let uptime = std::fs::read_to_string("/proc/uptime").unwrap();
    if uptime.split('.').next().unwrap().parse::<u64>().unwrap() < 700 {
        return skip("leases of ended jobs of PBS", "this machine has not been up for 700 s");
    }
    let old = periodic().unwrap();
    assert_eq!(old["log"], json!(["job pbs:2.server is unknown here: its slices are freed"]));
    assert_eq!(jobs(), ["pbs:1.server", "slurm:mini:3"]);
}

#[test]
fn a_host_of_pbs_without_mig_hook_runs_what_does_not_ask() {
    let world = machine();
    let hook = shipped(&world, "pbs/mig_hook.py");
    std::fs::remove_file(world.path("migctl")).unwrap();
    let Some(asks) = mom(&hook, &of_job("EXECJOB_BEGIN", "1.server", json!({"mig": "1g.10gb"}))) else { return };
    assert!(asks["deleted"] == true && asks["message"].as_str().unwrap().contains("no mig-hook"), "{asks:#}");
    for kind in ["EXECJOB_BEGIN", "EXECJOB_LAUNCH", "EXECJOB_END"] {
        accepted(&mom(&hook, &of_job(kind, "1.server", json!({}))).unwrap());
    }
    accepted(&mom(&hook, &json!({"type": "EXECHOST_PERIODIC", "job_list": []})).unwrap());
}

// ---- LSF ----

/// A job of LSF's, which asks in its environment; LSFUSER and the numbers are LSF's.
fn lsf(world: &World, script: &str, profile: Option<&str>, index: &str, words: &[&str]) -> Output {
    let user = nix::unistd::User::from_uid(nix::unistd::geteuid()).unwrap().unwrap().name;
    let queue = &blocks(include_str!("../docs/hpc.md"), "lsf")[0];
    assert!(queue.lines().any(|line| line.ends_with(&format!(" /usr/share/mig-hook/hpc/lsf/{script}"))), "{queue}");
    let mut command = Command::new(shipped(world, &format!("lsf/{script}")));
    command.args(words).current_dir("/").env_clear().env("PATH", "/bin:/usr/bin:/sbin:/usr/sbin");
    command.env("LSB_JOBID", "77").env("LSB_JOBINDEX", index).env("LSFUSER", user);
    if let Some(profile) = profile {
        command.env("MIG_PROFILE", profile);
    }
    run(&mut command)
}

#[test]
fn an_lsf_job_has_its_slices_from_pre_exec_to_post_exec() {
    let world = machine();
    for (index, key) in [("0", "lsf:77"), ("3", "lsf:77[3]")] {
        let pre = lsf(&world, "pre-exec", Some("2g.20gb"), index, &[]);
        assert!(pre.status.success(), "{}", text(&pre));
        let lease = world.lease();
        assert_eq!(lease["holder"]["job"], key);
        let words = ["sh", "-c", "echo \"$CUDA_VISIBLE_DEVICES $1\"; exit 9", "sh", "a b"];
        let job = lsf(&world, "job-starter", Some("2g.20gb"), index, &words);
        let uuid = lease["slices"][0]["uuid"].as_str().unwrap();
        assert_eq!(
            (job.status.code(), String::from_utf8_lossy(&job.stdout).trim()),
            (Some(9), &*format!("{uuid} a b"))
        );
        for _ in 0..2 {
            let post = lsf(&world, "post-exec", Some("2g.20gb"), index, &[]);
            assert!(post.status.success(), "{}", text(&post));
            world.assert_clean("after post-exec");
        }
    }
}

#[test]
fn an_lsf_job_without_room_is_queued_again_and_a_wrong_one_is_told_why() {
    let world = machine();
    start(&world, "lsf:1", EVERYTHING);
    assert_eq!(lsf(&world, "pre-exec", Some("3g.40gb"), "0", &[]).status.code(), Some(1));
    for wrong in ["9g.90gb", "--help", "$(touch x)", "1g.10gb; touch x"] {
        let pre = lsf(&world, "pre-exec", Some(wrong), "0", &[]);
        assert!(pre.status.success(), "{}", text(&pre));
        let job = lsf(&world, "job-starter", Some(wrong), "0", &["echo", "was run"]);
        assert_eq!(job.status.code(), Some(75), "{}", text(&job));
        assert!(job.stdout.is_empty() && text(&job).contains("job lsf:77 was refused"), "{}", text(&job));
    }
    assert_eq!(world.leases().len(), 1);
    assert!(lsf(&world, "post-exec", None, "0", &[]).status.success());
}

#[test]
fn an_lsf_job_that_asks_for_nothing_is_left_alone() {
    let world = machine();
    for profile in [None, Some("")] {
        assert!(lsf(&world, "pre-exec", profile, "0", &[]).status.success());
        let job = lsf(&world, "job-starter", profile, "0", &["sh", "-c", "echo \"${CUDA_VISIBLE_DEVICES-unset}\""]);
        assert_eq!(String::from_utf8_lossy(&job.stdout), "unset\n");
        assert!(lsf(&world, "post-exec", profile, "0", &[]).status.success());
    }
    world.assert_clean("though nothing was asked for");
}

// ---- Sarus ----

/// A config as Sarus writes it (src/runtime/OCIBundleConfig.cpp of 1.7), with the hooks of hooksDir whose condition holds.
fn sarus_config(world: &World, annotations: &Value, script: &str) -> Value {
    let of_hooks_dir = |file: &str| -> Value {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("packaging/hpc/sarus").join(file);
        let mut hook = common::document(&path);
        // What Sarus's hook.schema.json requires; it takes no other version.
        assert_eq!(hook["version"], "1.0.0");
        assert!(hook["when"]["annotations"].is_object() && hook["stages"].as_array().unwrap().len() == 1);
        let args = hook["hook"]["args"].as_array_mut().unwrap();
        args.splice(1..1, [json!("--config"), json!(world.config())]);
        hook["hook"]["path"] = json!(binaries().join("mig-hook"));
        hook
    };
    let mut hooks = json!({});
    for file in ["10-mig-hook-create.json", "10-mig-hook-poststop.json"] {
        let hook = of_hooks_dir(file);
        let (key, value) = hook["when"]["annotations"].as_object().unwrap().iter().next().unwrap();
        // Sarus matches key and value as a whole (boost::regex_match).
        assert_eq!((key.as_str(), value), ("mig\\..*", &json!(".*")));
        if annotations.as_object().unwrap().keys().any(|key| key.starts_with("mig.")) {
            hooks[hook["stages"][0].as_str().unwrap()] = json!([hook["hook"]]);
        }
    }
    json!({
        "ociVersion": "1.0.0",
        "process": {
            "terminal": false, "user": {"uid": NOBODY, "gid": NOBODY}, "args": ["sh", "-c", script], "cwd": "/",
            "env": ["PATH=/bin"], "capabilities": {}, "noNewPrivileges": true,
        },
        "root": {"path": "rootfs", "readonly": false},
        "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}],
        "linux": {
            "resources": {"cpu": {}},
            "namespaces": [{"type": "pid"}, {"type": "mount"}],
            "rootfsPropagation": "slave",
        },
        "hooks": hooks,
        "annotations": annotations,
    })
}

#[test]
fn sarus_s_containers_take_a_slice_by_annotation() {
    let world = machine();
    let Some(image) = image(&world) else { return };
    if !nix::unistd::geteuid().is_root() || !installed("runc") {
        return skip("hooks of Sarus", "no runc, or not root");
    }
    let sarus = |annotations: Value, script: &str| {
        let bundle = world.bundle("sarus", &sarus_config(&world, &annotations, script));
        std::fs::remove_dir_all(bundle.join("rootfs")).unwrap();
        assert!(run(Command::new("cp").arg("-a").arg(&image).arg(bundle.join("rootfs"))).status.success());
        // Sarus, too, mounts /dev in a mount namespace of its own (Runtime::setupDevFilesystem).
        let dev = "mount -t tmpfs -o nosuid,mode=755 tmpfs rootfs/dev && exec runc --root \"$0\" run container-x";
        run(Command::new("unshare").args(["-m", "sh", "-c", dev]).arg(world.path("runc")).current_dir(bundle))
    };
    let script = "cat /run/mig-hook/uuids; ls /dev/nvidia-caps | wc -l; exit 3";
    let output = sarus(json!({"mig.profile": "2g.20gb", "com.hooks.logging.level": "2"}), script);
    let said = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(3), "{}", text(&output));
    assert!(said.starts_with("MIG-") && said.trim().ends_with("\n2"), "{}", text(&output));
    let granted: Vec<Value> = world.audit().into_iter().filter(|line| line["event"] == "grant").collect();
    assert_eq!(granted.len(), 1, "{granted:#?}");
    world.assert_clean("after the container's end");

    let refused = sarus(json!({"mig.profile": "9g.90gb"}), script);
    assert!(!refused.status.success() && text(&refused).contains("9g.90gb"), "{}", text(&refused));
    let other = sarus(json!({"com.hooks.logging.level": "2"}), "ls /dev/nvidia-caps || exit 4");
    assert_eq!(other.status.code(), Some(4), "{}", text(&other));
    world.assert_clean("though nothing was asked for");
}

// ---- Charliecloud ----

/// An image directory: busybox, and the places that ch-run mounts onto.
fn image(world: &World) -> Option<PathBuf> {
    if !installed("busybox") {
        skip("images", "no busybox");
        return None;
    }
    let root = world.path("image");
    for dir in ["bin", "dev", "proc", "sys", "tmp", "etc", "home", "root", "run", "mnt", "usr/bin", "var"] {
        std::fs::create_dir_all(root.join(dir)).unwrap();
    }
    for file in ["passwd", "group", "hosts", "resolv.conf"] {
        std::fs::write(root.join("etc").join(file), "").unwrap();
    }
    let mut install = Command::new("sh");
    install.args([
        "-c",
        "cp \"$(command -v busybox)\" \"$0/bin\" && for name in sh env sleep cat ls wc; do ln -s busybox \"$0/bin/$name\"; done",
    ]);
    assert!(run(install.arg(&root)).status.success());
    Some(root)
}

#[test]
fn charliecloud_runs_an_image_with_a_slice_of_its_own() {
    let world = machine();
    let Some(image) = image(&world) else { return };
    if !nix::unistd::geteuid().is_root() {
        return skip("migctl run -- ch-run", "not root");
    }
    if !installed("ch-run") {
        return skip("migctl run -- ch-run", "no Charliecloud");
    }
    let ch_run = |script: &str| {
        let mut command = Command::new(binaries().join("migctl"));
        command.arg("--config").arg(world.config()).args(["run", "1g.10gb", "--", "ch-run"]).arg(&image);
        command.args(["--", "sh", "-c", script]).env("USER", "root");
        command
    };
    let output = run(&mut ch_run("echo $CUDA_VISIBLE_DEVICES; exit 7"));
    assert_eq!(output.status.code(), Some(7), "{}", text(&output));
    let uuid = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    assert!(uuid.starts_with("MIG-") && !uuid.contains(','), "{}", text(&output));
    world.assert_clean("after ch-run");

    let mut waiting = ch_run("exec sleep 60").stdin(Stdio::null()).spawn().unwrap();
    wait_for("the slice of ch-run", Duration::from_secs(20), || world.leases().len() == 1);
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(waiting.id().cast_signed()), nix::sys::signal::SIGTERM).unwrap();
    assert!(!waiting.wait().unwrap().success());
    world.assert_clean("after ch-run was ended");
}

#[test]
fn charliecloud_in_a_job_has_the_slices_of_the_job() {
    let world = machine();
    let Some(image) = image(&world) else { return };
    if !installed("ch-run") {
        return skip("ch-run in a job", "no Charliecloud");
    }
    if !open_to_all(&world, "ch-run as the user of a job") {
        return;
    }
    assert!(run(Command::new("chmod").arg("-R").arg("a+rX").arg(&image)).status.success());
    let id = NOBODY.to_string();
    let job = ["job", "start", "--key", "slurm:mini:7", "--uid", &id, "--gid", &id, "2g.20gb"];
    let uuid = world.document(&job)["environment"]["MIG_UUID"].as_str().unwrap().to_owned();
    let mut command = Command::new(binaries().join("migctl"));
    command.arg("--config").arg(world.config()).args(["run", "--", "ch-run"]).arg(&image);
    command.args(["--", "sh", "-c", "echo $CUDA_VISIBLE_DEVICES"]);
    command.env("USER", "nobody").env("HOME", "/").envs(JOB).uid(NOBODY).gid(NOBODY);
    let output = run(&mut command);
    if text(&output).contains("can't init user") || text(&output).contains("unshare") {
        return skip("ch-run as a user", "users may make no namespaces here");
    }
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), uuid, "{}", text(&output));
    assert_eq!(world.leases().len(), 1, "it is the job's still");
}
