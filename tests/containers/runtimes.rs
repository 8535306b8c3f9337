//! runc and crun by themselves, through the shim.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use crate::common::{binaries, document, run, text, wait_for};
use crate::{Probe, SOON, Site, detached, installed, must};

/// A bundle as `runc spec` makes it, with the busybox root, a request, and a capability to make nodes.
pub fn bundle(site: &Site, name: &str, annotations: Value, words: &[&str]) -> PathBuf {
    let dir = site.path(name);
    std::fs::create_dir(&dir).unwrap();
    must(Command::new(installed("runc")).args(["spec", "--bundle"]).arg(&dir));
    let mut config = document(&dir.join("config.json"));
    config["root"] = json!({"path": site.dir.join("rootfs"), "readonly": true});
    config["process"]["terminal"] = json!(false);
    config["process"]["args"] = json!(words);
    for set in ["bounding", "effective", "permitted"] {
        config["process"]["capabilities"][set].as_array_mut().unwrap().push(json!("CAP_MKNOD"));
    }
    config["mounts"].as_array_mut().unwrap().push(json!({"destination": "/tmp", "type": "tmpfs", "source": "tmpfs"}));
    config["linux"]["cgroupsPath"] = json!(site.cgroup(name));
    config["annotations"] = annotations;
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
    dir
}

/// `mig-runtime OPTIONS --root ROOT WORDS…` for that low-level runtime.
pub fn shim(site: &Site, runtime: &str, words: &[&str]) -> Command {
    let mut command = Command::new(binaries().join("mig-runtime"));
    command.arg("--mig-config").arg(site.config()).arg("--mig-runtime").arg(installed(runtime));
    command.arg("--root").arg(site.path("root")).args(words);
    command
}

pub fn shown(path: &Path) -> &str {
    path.to_str().unwrap()
}

pub fn created_started_and_deleted(site: Option<Site>, runtime: &str) {
    let Some(site) = site else { return };
    // A neighbour that is not ours: its capabilities are there to be tried.
    site.sim("make", &["--gpu", "0", "--profile", "1g.10gb"]);
    let before = site.instances();
    let dir = bundle(&site, "c1", json!({"mig.profile": "2g.20gb", "mig.gpu": "0"}), &["sleep", "600"]);
    let pid_file = dir.join("pid");
    let create = ["create", "--bundle", shown(&dir), "--pid-file", shown(&pid_file), "c1"];
    let (created, said) = detached(&mut shim(&site, runtime, &create), &site.path("log"));
    if runtime == "youki" && !created {
        // Its default features have no device filter for cgroup v2: it would confine nothing, and is refused.
        assert!(said.contains("device rules of its cgroup deny nothing"), "{said}");
        assert_eq!((site.leases().len(), site.instances()), (0, before));
        crate::skip("this youki was built without cgroupsv2_devices: refused, as it should be");
        return;
    }
    assert!(created, "{said}");
    assert_eq!(site.lease()["holder"]["container"], "c1");
    must(&mut shim(&site, runtime, &["start", "c1"]));

    // By the environment of the config, and by a process file as engines write it, which does not know of the slice.
    let seen = Probe::read(&must(&mut shim(&site, runtime, &["exec", "c1", "mig-probe"])));
    site.assert_given(&seen, &["2g.20gb"]);
    let process = json!({
        "terminal": false, "user": {"uid": 0, "gid": 0}, "args": ["mig-probe"], "cwd": "/",
        "env": ["PATH=/bin", "CUDA_VISIBLE_DEVICES=all"],
    });
    let file = site.write("process.json", &process.to_string());
    let session = must(&mut shim(&site, runtime, &["exec", "--process", shown(&file), "c1"]));
    assert_eq!(Probe::read(&session).variables, seen.variables);

    let others = site.others(&seen);
    assert!(others.len() >= 7, "two GPUs, caps 1 and 2, two of the neighbour, one of nobody: {others:?}");
    let mut words = vec!["exec", "--cap", "CAP_MKNOD", "c1", "mig-probe"];
    words.extend(others.iter().map(String::as_str));
    let verdicts = Probe::verdicts(&must(&mut shim(&site, runtime, &words)));
    assert_eq!(verdicts.len(), others.len());
    assert!(verdicts.values().all(|verdict| verdict == "denied"), "{verdicts:?}");

    // A plain delete of a running container fails, and it keeps its slice.
    assert!(!run(&mut shim(&site, runtime, &["delete", "c1"])).status.success());
    assert_eq!(site.leases().len(), 1);
    must(&mut shim(&site, runtime, &["kill", "c1", "KILL"]));
    wait_for("the container's end", SOON, || run(&mut shim(&site, runtime, &["delete", "c1"])).status.success());
    assert_eq!(site.leases(), Vec::<Value>::new(), "freed when delete returns");
    assert_eq!(site.instances(), before, "the neighbour's slice is as it was");
}

#[test]
fn runc_create_start_delete() {
    created_started_and_deleted(Site::new(&["runc"]), "runc");
}

#[test]
fn runc_with_the_calls_of_old_drivers() {
    for version in ["470.256.02", "535.261.03"] {
        let site = Site::of(&["a100-sxm4-80gb"; 3], &["runc"], &["--driver-version", version]);
        created_started_and_deleted(site, "runc");
    }
}

#[test]
fn crun_create_start_delete() {
    created_started_and_deleted(Site::new(&["crun"]), "crun");
}

#[test]
fn a_deletion_by_force_and_a_create_that_fails() {
    let Some(site) = Site::new(&["runc", "crun"]) else { return };
    for runtime in ["runc", "crun"] {
        let (name, bad) = (format!("{runtime}-1"), format!("{runtime}-2"));
        let dir = bundle(&site, &name, json!({"mig.profile": "7g.80gb"}), &["sleep", "600"]);
        let pid_file = dir.join("pid");
        let create = ["create", "--bundle", shown(&dir), "--pid-file", shown(&pid_file), &name];
        let (created, said) = detached(&mut shim(&site, runtime, &create), &site.path("log"));
        assert!(created, "{said}");
        assert_eq!(site.gc(), ["kept"], "a created container may be started later");
        must(&mut shim(&site, runtime, &["delete", "--force", &name]));
        site.assert_clean(&format!("after {runtime} delete --force"));

        let dir = bundle(&site, &bad, json!({"mig.profile": "7g.80gb"}), &["/nonexistent"]);
        let pid_file = dir.join("pid");
        let create = ["create", "--bundle", shown(&dir), "--pid-file", shown(&pid_file), &bad];
        let (created, said) = detached(&mut shim(&site, runtime, &create), &site.path("log"));
        assert!(!created && said.contains("/nonexistent"), "{said}");
        // What an engine does next, for every container that it could not create.
        run(&mut shim(&site, runtime, &["delete", "--force", &bad]));
        site.assert_clean(&format!("after a create that failed under {runtime}"));
    }
}

#[test]
fn run_in_the_foreground() {
    let Some(site) = Site::new(&["runc", "crun"]) else { return };
    for runtime in ["runc", "crun"] {
        let script = "mig-probe; exit 7";
        let dir = bundle(&site, runtime, json!({"mig.profile": "1g.10gb,2g.20gb"}), &["sh", "-c", script]);
        let output = run(&mut shim(&site, runtime, &["run", "--bundle", shown(&dir), runtime]));
        assert_eq!(output.status.code(), Some(7), "the container's own exit code: {}", text(&output));
        let seen = Probe::read(&text(&output));
        assert_eq!(seen.variable("MIG_DEVICE_PROFILES"), "1g.10gb,2g.20gb");
        assert_eq!(seen.nodes.values().filter(|(_, verdict)| verdict == "allowed").count(), seen.nodes.len());
        site.assert_clean(&format!("when {runtime} run returns"));
    }
}

/// A runtime that enforces nothing, whatever the config says: one that lets runc have a config without rules.
#[test]
fn a_runtime_that_enforces_no_device_rules_is_refused() {
    if crate::cgroup_v2() {
        crate::skip(
            "on cgroup v2 runc makes a program of no rules too; one without any program is youki's (cgroup2::youki)",
        );
        return;
    }
    let Some(site) = Site::new(&["runc", "jq"]) else { return };
    let dir = bundle(&site, "c1", json!({"mig.profile": "1g.10gb"}), &["sleep", "600"]);
    let lax = site.script(
        "lax",
        &format!(
            "jq '.linux.resources.devices = [{{\"allow\": true, \"access\": \"rwm\"}}]' {dir}/config.json > {dir}/lax.json\n\
             mv {dir}/lax.json {dir}/config.json\nexec {runc} \"$@\"",
            dir = dir.display(),
            runc = installed("runc").display()
        ),
    );
    let mut create = Command::new(binaries().join("mig-runtime"));
    create.arg("--mig-config").arg(site.config()).arg("--mig-runtime").arg(lax);
    create.arg("--root").arg(site.path("root")).args(["create", "--bundle", shown(&dir), "c1"]);
    let (created, said) = detached(&mut create, &site.path("log"));
    assert!(!created && said.contains("device rules of its cgroup deny nothing"), "{said}");
    site.assert_clean("after the refusal");
    assert_eq!(["grant", "refusal", "release"].map(|event| site.audited(event)), [1, 1, 1]);
}
