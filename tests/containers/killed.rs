//! Processes of the engines that are killed, and what becomes of the slice.

use std::fs::File;
use std::path::Path;
use std::process::Stdio;

use nix::fcntl::{Flock, FlockArg};

use crate::common::{run, skip, text, wait_for};
use crate::{Engine, SOON, Site, kill, must};

#[test]
fn a_killed_first_process_frees_its_slice_at_once() {
    for runtime in ["runc", "crun"] {
        let Some(site) = Site::new(&["podman", runtime]) else { continue };
        let podman = site.podman(runtime);
        let id = podman.start(&["mig.profile=1g.10gb"]);
        kill(podman.pid(&id));
        site.clean("after kill -9 of the first process, without gc");
        podman.ok(&["rm", "-f", &id]);
    }
}

#[test]
fn a_container_outlives_its_conmon_and_keeps_its_slice_until_it_ends() {
    conmon(Site::new(&["podman"]));
}

pub fn conmon(site: Option<Site>) {
    let Some(site) = site else { return };
    let podman = site.podman("runc");
    let id = podman.start(&["mig.profile=1g.10gb"]);
    let init = podman.pid(&id);
    let conmon = std::fs::read_to_string(podman.inspect(&id, ".ConmonPidFile")).unwrap();
    kill(conmon.trim().parse().unwrap());
    assert_eq!(site.gc(), ["kept"], "its first process lives");
    assert_eq!((site.leases().len(), site.instances().len()), (1, 1));
    kill(init);
    wait_for("what nobody calls poststop for is freed by gc", SOON, || site.gc() == ["freed"]);
    site.assert_clean("after gc");
    run(&mut podman.command(&["rm", "-f", "-t", "0", &id]));
    site.assert_clean("after rm");
}

/// podman 4.3 calls no poststop then, later ones do.
#[test]
fn what_podman_removes_after_its_conmon_was_killed_is_freed_by_gc_at_the_latest() {
    for runtime in ["runc", "crun"] {
        let Some(site) = Site::new(&["podman", runtime]) else { continue };
        let podman = site.podman(runtime);
        let id = podman.start(&["mig.profile=1g.10gb"]);
        let conmon = std::fs::read_to_string(podman.inspect(&id, ".ConmonPidFile")).unwrap();
        kill(conmon.trim().parse().unwrap());
        assert_eq!(site.gc(), ["kept"], "its first process lives");
        run(&mut podman.command(&["rm", "-f", "-t", "0", &id]));
        wait_for("gc frees it", SOON, || !site.gc().contains(&"kept".to_owned()));
        site.assert_clean("after gc");
    }
}

/// A first process that the kernel kills for its memory.
fn out_of_memory(engine: &Engine, when: &str) {
    let options = ["-d", "--memory", "32m", "--memory-swap", "32m"];
    let mut command = engine.request(&["mig.profile=1g.10gb"], &options, &["tail", "/dev/zero"]);
    // conmon leaves a file `oom` where it was started.
    let id = must(command.current_dir(engine.site.path("")));
    wait_for("its end", SOON, || engine.inspect(id.trim(), ".State.Running") == "false");
    // SIGKILL, and none of ours. podman 4.3 has .State.OOMKilled, but leaves it false.
    assert_eq!(engine.inspect(id.trim(), ".State.ExitCode"), "137");
    engine.site.clean(when);
    assert_eq!((engine.site.audited("grant"), engine.site.audited("release")), (1, 1));
    engine.ok(&["rm", id.trim()]);
}

/// Whether a container's memory can be limited here.
fn memory_is_limited() -> bool {
    let controllers = std::fs::read_to_string("/sys/fs/cgroup/cgroup.controllers").unwrap_or_default();
    let there = Path::new("/sys/fs/cgroup/memory").is_dir() || controllers.split_whitespace().any(|c| c == "memory");
    if !there {
        skip("out of memory", "there is no memory controller");
    }
    there
}

#[test]
fn one_that_is_out_of_memory_frees_its_slice_at_once() {
    for runtime in ["runc", "crun"] {
        let Some(site) = Site::new(&["podman", runtime]) else { continue };
        if memory_is_limited() {
            out_of_memory(&site.podman(runtime), "after an OOM kill, without gc");
        }
    }
    let Some(site) = Site::new(&["docker"]) else { return };
    if memory_is_limited() {
        out_of_memory(&site.docker(&["--mig-env"]), "after an OOM kill, without gc");
    }
}

#[test]
fn a_podman_killed_while_the_slice_is_cut_leaves_nothing() {
    let Some(site) = Site::new(&["podman"]) else { return };
    let podman = site.podman("runc");
    site.fault("nvmlGpuInstanceCreateComputeInstance*", &["--delay-ms", "1500"]);
    let mut command = podman.request(&["mig.profile=1g.10gb"], &["-d"], &["sleep", "600"]);
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    wait_for("a GPU instance", SOON, || !site.instances().is_empty());
    child.kill().unwrap();
    child.wait().unwrap();
    wait_for("the hook's end", SOON, || {
        crate::pids_of(&["mig-engine", &site.shown("config.toml"), "precreate"]).is_empty()
    });
    site.gc();
    site.assert_clean("after gc");
}

#[test]
fn a_hook_killed_while_it_cuts_fails_the_container_and_gc_undoes_the_half() {
    let Some(site) = Site::new(&["podman"]) else { return };
    let podman = site.podman("runc");
    for (call, when) in [
        ("nvmlDeviceCreateGpuInstance*", "after"),
        ("nvmlGpuInstanceCreateComputeInstance*", "before"),
        ("nvmlGpuInstanceCreateComputeInstance*", "after"),
    ] {
        site.fault(call, &["--kill", when]);
        let output = run(&mut podman.request(&["mig.profile=1g.10gb"], &["--rm"], &["true"]));
        assert_eq!(output.status.code(), Some(126), "{}", text(&output));
        assert_eq!((site.leases().len(), site.instances().len()), (1, 1), "killed {when} {call}");
        assert_eq!(site.gc(), ["freed"], "killed {when} {call}");
        site.assert_clean("after gc");
    }
}

/// The worst case of the engines' table: podman dies while its container is being created, the container waits for ever
/// to be started, and the bundle is gone.
fn orphan(runtime: &str) {
    let Some(site) = Site::new(&["podman", runtime]) else { return };
    let podman = site.podman(runtime);
    // A hook of the test's before ours holds the create until we have our lock: then ours has to wait.
    let gate = site.script(
        "gate",
        &format!("touch {0}/reached; until test -e {0}/go; do sleep 0.05; done", site.path("").display()),
    );
    let hook = serde_json::json!({
        "version": "1.0.0", "hook": {"path": gate}, "when": {"always": true}, "stages": ["createRuntime"],
    });
    site.write("hooks.d/gate.json", &hook.to_string());
    let name = format!("orphan-{runtime}-{}", std::process::id());
    let mut command = podman.request(&["mig.profile=1g.10gb"], &["-d", "--name", &name], &["sleep", "600"]);
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    wait_for("the first hook", SOON, || site.path("reached").exists());
    let lock = File::options().write(true).open(site.path("state/lock")).unwrap();
    let lock = Flock::lock(lock, FlockArg::LockExclusive).unwrap();
    site.write("go", "");
    let token = site.lease()["token"].as_str().unwrap().to_owned();
    wait_for("our hook", SOON, || !crate::pids_of(&["mig-engine", "createRuntime", &token]).is_empty());
    child.kill().unwrap();
    child.wait().unwrap();
    drop(lock);
    wait_for("the container is bound", SOON, || !site.lease()["holder"]["init"].is_null());
    // Not before crun's create is over: what it writes into a directory that is removed meanwhile is lost.
    let id = site.lease()["holder"]["container"].as_str().unwrap().to_owned();
    wait_for("the end of create", SOON, || {
        text(&run(std::process::Command::new(runtime).args(["state", &id]))).contains("\"created\"")
    });
    assert_eq!(site.gc(), ["kept"], "it could still be started");
    run(&mut podman.command(&["rm", "-f", "-t", "0", &name]));

    if site.leases().is_empty() {
        // This podman ended it properly.
        return site.clean("after rm");
    }
    assert_eq!(site.gc(), ["kept"], "the bundle has been gone for less than a minute");
    assert!(!site.lease()["holder"]["bundle_missing_boot_ms"].is_null(), "{:#}", site.lease());
    site.edit_lease(&token, |lease| lease["holder"]["bundle_missing_boot_ms"] = 1.into());
    let init = site.lease()["holder"]["init"]["pid"].clone();
    let actions = site.document(&["gc"]);
    assert_eq!(actions["actions"][0]["result"], "freed", "{runtime}: {actions:#}\n{:#}", site.lease());
    site.assert_clean("after gc");
    wait_for("its first process is gone", SOON, || !std::path::Path::new(&format!("/proc/{init}/exe")).exists());
}

#[test]
fn a_podman_killed_between_create_and_start_leaves_an_orphan_that_gc_deletes() {
    orphan("runc");
}

#[test]
fn a_podman_killed_between_create_and_start_leaves_an_orphan_that_gc_deletes_crun() {
    orphan("crun");
}
