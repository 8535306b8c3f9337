//! The classic hook: createRuntime and poststop as an administrator registers them, with runtimes and engines that let nobody
//! edit the config.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use crate::common::{attack, binaries, document, run, text, wait_for};
use crate::runtimes::bundle;
use crate::{Probe, SOON, Site, detached, installed, kill, must};

/// What a container says of its slice: its nodes, and the variables that it finds in a file.
const PROBE: &str = "mig-probe; cat /run/mig-hook/environment";

/// Devices that nobody has: one that the config allows by itself, with its whole major (of others runc 1.1 tells systemd only
/// where /proc/devices or /dev/char has them), and one that it does not.
pub const ALLOWED: &str = "10:250";
pub const DENIED: &str = "99:7";

/// An entry of a config's hooks, as an administrator writes it.
pub fn entry(site: &Site, stage: &str) -> Value {
    json!({
        "path": binaries().join("mig-hook"),
        "args": ["mig-hook", "--config", site.config(), stage],
        "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"],
    })
}

/// A bundle with a root of its own, whose config carries our hooks and no edit.
pub fn hooked(site: &Site, name: &str, request: Value, words: &[&str]) -> PathBuf {
    let dir = bundle(site, name, request, words);
    must(Command::new("cp").arg("-a").arg(site.dir.join("rootfs")).arg(dir.join("rootfs")));
    change(&dir, |config| {
        config["root"]["path"] = json!("rootfs");
        let rule = json!({"allow": true, "type": "c", "major": 10, "access": "rw"});
        config["linux"]["resources"]["devices"].as_array_mut().unwrap().push(rule);
        config["hooks"] =
            json!({"createRuntime": [entry(site, "createRuntime")], "poststop": [entry(site, "poststop")]});
    });
    dir
}

pub fn change(bundle: &Path, how: impl FnOnce(&mut Value)) {
    let mut config = document(&bundle.join("config.json"));
    how(&mut config);
    std::fs::write(bundle.join("config.json"), config.to_string()).unwrap();
}

/// A runtime's command line.
pub fn call(site: &Site, runtime: &str, words: &[&str]) -> Command {
    let mut command = Command::new(installed(runtime));
    command.arg("--root").arg(site.path("root")).args(words);
    command
}

/// By a caller who lets nobody else read what he makes: that is not for the container.
fn created(site: &Site, runtime: &str, dir: &Path, id: &str) -> (bool, String) {
    let bundle = dir.display().to_string();
    let mut command = Command::new("sh");
    command.args(["-c", "umask 077; exec \"$@\"", "sh"]);
    command.args(words_of(&call(site, runtime, &["create", "--bundle", &bundle, id])));
    detached(&mut command, &site.path("log"))
}

/// Why containers were refused, as the audit file says: crun keeps what a hook prints to itself.
pub fn refusals(site: &Site) -> String {
    let lines = site.audit().into_iter().filter(|line| line["event"] == "refusal");
    lines.map(|line| format!("{}\n", line["reason"].as_str().unwrap())).collect()
}

pub fn given_while_it_is_created(site: Option<Site>, runtime: &str) {
    let Some(site) = site else { return };
    site.sim("make", &["--gpu", "0", "--profile", "1g.10gb"]);
    let before = site.instances();
    let dir = hooked(&site, "c1", json!({"mig.profile": "2g.20gb", "mig.gpu": "0"}), &["sleep", "600"]);
    let untouched = std::fs::read(dir.join("config.json")).unwrap();
    let (there, said) = created(&site, runtime, &dir, "c1");
    assert!(there, "{said}\n{}", refusals(&site));
    assert_eq!(std::fs::read(dir.join("config.json")).unwrap(), untouched);
    let lease = site.lease();
    assert_eq!((&lease["holder"]["container"], &lease["holder"]["way"]), (&json!("c1"), &json!("classic")));
    must(&mut call(&site, runtime, &["start", "c1"]));

    let probed = || Probe::read(&must(&mut call(&site, runtime, &["exec", "c1", "sh", "-c", PROBE])));
    let seen = probed();
    site.assert_given(&seen, &["2g.20gb"]);
    let uuids = must(&mut call(&site, runtime, &["exec", "c1", "cat", "/run/mig-hook/uuids"]));
    assert_eq!(uuids.trim(), seen.variable("MIG_DEVICE_UUIDS"));
    let modes = ["exec", "c1", "stat", "-c", "%a", "/dev/nvidia-caps", "/dev/mig-hook", "/run/mig-hook/uuids"];
    assert_eq!(must(&mut call(&site, runtime, &modes)), "755\n755\n644\n");
    // Every other slice is closed, and what the config's own rules close or open is as it was.
    let mut others = site.others(&seen);
    assert!(others.len() >= 7, "{others:?}");
    others.push(DENIED.to_owned());
    let mut words = vec!["exec", "--cap", "CAP_MKNOD", "c1", "mig-probe", ALLOWED];
    words.extend(others.iter().map(String::as_str));
    let mut verdicts = Probe::verdicts(&must(&mut call(&site, runtime, &words)));
    assert_ne!(verdicts.remove(ALLOWED).unwrap(), "denied");
    assert_eq!(verdicts.len(), others.len());
    assert!(verdicts.values().all(|verdict| verdict == "denied"), "{verdicts:?}");
    must(&mut call(
        &site,
        runtime,
        &["exec", "c1", "sh", "-c", "echo x > /dev/null && head -c 1 /dev/urandom > /dev/null"],
    ));

    let nothing = site.write("nothing.json", "{}").display().to_string();
    must(&mut call(&site, runtime, &["update", "--resources", &nothing, "c1"]));
    assert_eq!(probed().nodes, seen.nodes, "after update");

    must(&mut call(&site, runtime, &["kill", "c1", "KILL"]));
    wait_for("the container's end", SOON, || run(&mut call(&site, runtime, &["delete", "c1"])).status.success());
    assert_eq!(
        (site.leases(), site.instances()),
        (vec![], before),
        "freed when delete returns, the neighbour untouched"
    );
}

#[test]
fn given_while_runc_creates_it() {
    given_while_it_is_created(Site::new(&["runc"]), "runc");
}

#[test]
fn given_while_crun_creates_it() {
    given_while_it_is_created(Site::new(&["crun"]), "crun");
}

fn words_of(command: &Command) -> Vec<std::ffi::OsString> {
    std::iter::once(command.get_program()).chain(command.get_args()).map(Into::into).collect()
}

#[test]
fn a_container_that_asks_for_nothing_is_left_alone() {
    let Some(site) = Site::new(&["runc", "crun"]) else { return };
    site.write("config.toml", "this is no settings file");
    for runtime in ["runc", "crun"] {
        let dir = hooked(&site, runtime, json!({"migration": "1"}), &["sh", "-c", "ls /dev; ls /run; mig-probe"]);
        let output = run(&mut call(&site, runtime, &["run", "--bundle", &dir.display().to_string(), runtime]));
        assert!(output.status.success(), "{}", text(&output));
        assert!(!text(&output).contains("nvidia") && !text(&output).contains("mig"), "{}", text(&output));
    }
    assert!(!site.path("state").exists(), "no state was made");
}

/// Registered for both stages that may do it, the hook takes one slice.
#[test]
fn both_stages_take_one_slice() {
    let Some(site) = Site::new(&["runc"]) else { return };
    let dir = hooked(&site, "c1", json!({"mig.profile": "1g.10gb"}), &["sh", "-c", "mig-probe; exec sleep 600"]);
    change(&dir, |config| config["hooks"]["prestart"] = json!([entry(&site, "prestart")]));
    let (there, said) = created(&site, "runc", &dir, "c1");
    assert!(there, "{said}");
    assert_eq!((site.leases().len(), site.instances().len()), (1, 1));
    must(&mut call(&site, "runc", &["delete", "--force", "c1"]));
    site.assert_clean("after delete");
}

/// What can't be given safely is refused before anything is cut, with the reason.
#[test]
fn unsafe_containers_are_refused() {
    let Some(site) = Site::new(&["runc", "crun"]) else { return };
    let canary = site.path("canary");
    std::fs::create_dir(&canary).unwrap();
    type Change<'a> = &'a dyn Fn(&Path, &mut Value);
    let mount = |config: &mut Value, mount: Value| config["mounts"].as_array_mut().unwrap().push(mount);
    let bind = |at: &str| json!({"destination": at, "type": "bind", "source": canary, "options": ["rbind"]});
    let cases: [(&str, Change, &str); 6] = [
        (
            "open",
            &|_, c| c["linux"]["resources"]["devices"] = json!([{"allow": true, "access": "rwm"}]),
            "--privileged",
        ),
        (
            "gpu",
            &|_, c| {
                let rule = json!({"allow": true, "type": "c", "major": 195, "minor": 0, "access": "rw"});
                c["linux"]["resources"]["devices"].as_array_mut().unwrap().push(rule);
            },
            "c 195:0",
        ),
        ("bound", &|_, c| mount(c, bind("/dev")), "over the container's /dev"),
        (
            "bare",
            &|_, c| {
                let below_dev = |m: &Value| m["destination"].as_str().unwrap().starts_with("/dev");
                c["mounts"].as_array_mut().unwrap().retain(|m| !below_dev(m));
            },
            "no tmpfs of its own",
        ),
        (
            "link",
            &|dir, _| {
                must(Command::new("rmdir").arg(dir.join("rootfs/dev")));
                std::os::unix::fs::symlink(&canary, dir.join("rootfs/dev")).unwrap();
            },
            "symbolic link",
        ),
        (
            "users",
            &|_, c| {
                c["linux"]["namespaces"].as_array_mut().unwrap().push(json!({"type": "user"}));
                for map in ["uidMappings", "gidMappings"] {
                    c["linux"][map] = json!([{"containerID": 0, "hostID": 100_000, "size": 65536}]);
                }
            },
            "user namespace",
        ),
    ];
    for (runtime, (name, how, word)) in ["runc", "crun"].into_iter().flat_map(|r| cases.iter().map(move |c| (r, c))) {
        let id = format!("{runtime}-{name}");
        let dir = hooked(&site, &id, json!({"mig.profile": "1g.10gb"}), &["true"]);
        change(&dir, |config| how(&dir, config));
        let told = refusals(&site).lines().count();
        let (there, said) = created(&site, runtime, &dir, &id);
        assert!(!there, "{id}: {said}");
        let why: Vec<String> = refusals(&site).lines().skip(told).map(str::to_owned).collect();
        // crun 1.8 fails by itself at a /dev that leads out.
        let by_us = why.len() == 1 && why[0].contains(word);
        assert!(by_us || id == "crun-link" && why.is_empty(), "{id}: {why:?}\n{said}");
        if runtime == "runc" {
            assert!(said.contains(word), "{id}: {said}");
        }
        run(&mut call(&site, runtime, &["delete", "--force", &id]));
        site.assert_clean(&id);
    }
}

/// After acquire: the file that tells the slice can't be put there.
#[test]
fn a_slice_that_cannot_be_told_is_given_back() {
    let Some(site) = Site::new(&["runc", "crun"]) else { return };
    let canary = site.path("canary");
    std::fs::create_dir(&canary).unwrap();
    type Change<'a> = &'a dyn Fn(&Path, &mut Value);
    let cases: [(&str, Change, &str); 4] = [
        ("file", &|dir, _| drop(std::fs::write(dir.join("rootfs/run"), "")), "/run/mig-hook"),
        ("link", &|dir, _| std::os::unix::fs::symlink(&canary, dir.join("rootfs/run")).unwrap(), "/run/mig-hook"),
        (
            "bound",
            &|_, c| {
                let bind = json!({"destination": "/run", "type": "bind", "source": canary, "options": ["rbind"]});
                c["mounts"].as_array_mut().unwrap().push(bind);
            },
            "mounted from elsewhere",
        ),
        (
            "theirs",
            &|dir, _| {
                std::fs::create_dir_all(dir.join("rootfs/run/mig-hook/x")).unwrap();
            },
            "/run/mig-hook",
        ),
    ];
    for (runtime, (name, how, word)) in ["runc", "crun"].into_iter().flat_map(|r| cases.iter().map(move |c| (r, c))) {
        let id = format!("{runtime}-{name}");
        let dir = hooked(&site, &id, json!({"mig.profile": "1g.10gb"}), &["true"]);
        change(&dir, |config| how(&dir, config));
        let (there, said) = created(&site, runtime, &dir, &id);
        assert!(!there && (runtime == "crun" || said.contains(word)), "{id}: {said}");
        site.assert_clean(&id);
        assert_eq!(std::fs::read_dir(&canary).unwrap().count(), 0, "{id}");
        run(&mut call(&site, runtime, &["delete", "--force", &id]));
    }
    assert_eq!((site.audited("grant"), site.audited("release")), (8, 8));
}

/// The hook itself is killed while it cuts.
#[test]
fn a_killed_hook_fails_the_create_and_leaves_nothing() {
    let Some(site) = Site::new(&["runc", "crun"]) else { return };
    let calls = ["nvmlDeviceCreateGpuInstance*", "nvmlGpuInstanceCreateComputeInstance*"];
    for (runtime, fault) in ["runc", "crun"].into_iter().flat_map(|r| calls.map(|call| (r, call))) {
        let id = format!("{runtime}-{}", fault.len());
        let dir = hooked(&site, &id, json!({"mig.profile": "1g.10gb"}), &["true"]);
        site.fault(fault, &["--kill", "after"]);
        let (there, said) = created(&site, runtime, &dir, &id);
        assert!(!there, "{id}: {said}");
        run(&mut call(&site, runtime, &["delete", "--force", &id]));
        site.gc(); // crun calls no poststop hook when a create fails
        site.assert_clean(&id);
    }
    assert_eq!(site.audited("grant"), 0);
}

/// Links of an image are not followed, and a /run of the container's own will do.
#[test]
fn images_lead_nowhere() {
    let Some(site) = Site::new(&["runc", "crun"]) else { return };
    let canary = site.path("canary");
    std::fs::create_dir(&canary).unwrap();
    type Change<'a> = &'a dyn Fn(&Path, &mut Value);
    let cases: [(&str, Change); 4] = [
        ("run", &|dir, _| {
            std::fs::create_dir(dir.join("rootfs/run")).unwrap();
            std::os::unix::fs::symlink(&canary, dir.join("rootfs/run/mig-hook")).unwrap();
        }),
        ("inside", &|dir, _| {
            std::fs::create_dir_all(dir.join("rootfs/var/run")).unwrap();
            std::os::unix::fs::symlink("/var/run", dir.join("rootfs/run")).unwrap();
        }),
        ("caps", &|dir, _| std::os::unix::fs::symlink(&canary, dir.join("rootfs/dev/nvidia-caps")).unwrap()),
        ("tmpfs", &|_, c| {
            let tmpfs = json!({"destination": "/run", "type": "tmpfs", "source": "tmpfs"});
            c["mounts"].as_array_mut().unwrap().push(tmpfs);
        }),
    ];
    for (runtime, (name, how)) in ["runc", "crun"].into_iter().flat_map(|r| cases.iter().map(move |c| (r, c))) {
        attack(&format!("an image before the classic hook: {name}"));
        let id = format!("{runtime}-{name}");
        let dir = hooked(&site, &id, json!({"mig.profile": "1g.10gb"}), &["sh", "-c", PROBE]);
        change(&dir, |config| how(&dir, config));
        let output = run(&mut call(&site, runtime, &["run", "--bundle", &dir.display().to_string(), &id]));
        assert!(output.status.success(), "{id}: {}", text(&output));
        let seen = Probe::read(&text(&output));
        assert_eq!((seen.variable("MIG_DEVICE_PROFILES"), seen.nodes.len()), ("1g.10gb", 6), "{id}");
        assert_eq!(std::fs::read_dir(&canary).unwrap().count(), 0, "{id}");
        site.assert_clean(&id);
    }
}

/// podman without a precreate hook, with the hooks.d files that CRI-O gets.
fn under_podman(runtime: &str) {
    let Some(site) = Site::new(&["podman", runtime]) else { return };
    let mut podman = site.podman(runtime);
    for (name, text) in [
        ("create", include_str!("../../hooks/crio/mig-hook-create.json.in")),
        ("poststop", include_str!("../../hooks/crio/mig-hook-poststop.json.in")),
    ] {
        let mut hook: Value = serde_json::from_str(text).unwrap();
        hook["hook"]["path"] = json!(binaries().join("mig-hook"));
        let config = [json!("--config"), json!(site.config())];
        hook["hook"]["args"].as_array_mut().unwrap().splice(1..1, config);
        site.write(&format!("classic.d/mig-hook-{name}.json"), &hook.to_string());
    }
    podman.env.retain(|(key, _)| *key != "ENG_HOOKS_DIR");
    podman.env.push(("ENG_HOOKS_DIR", site.shown("classic.d")));
    let probe = |id: &str| Probe::read(&podman.ok(&["exec", id, "sh", "-c", PROBE]));
    let id = podman.start(&["mig.profile=2g.20gb"]);
    let seen = probe(&id);
    site.assert_given(&seen, &["2g.20gb"]);
    podman.assert_confined(&id, &seen);
    podman.ok(&["restart", "-t", "0", &id]);
    site.assert_given(&probe(&id), &["2g.20gb"]);
    podman.ok(&["stop", "-t", "0", &id]);
    site.clean("after stop");
    podman.ok(&["start", &id]);
    assert_eq!(site.leases().len(), 1);
    kill(podman.pid(&id));
    site.clean("after kill -9 of its first process");
    podman.ok(&["rm", "-f", &id]);
    podman.assert_refused(&["mig.profile=3g.13gb"], &[], &[]);
    podman.assert_refused(&["mig.profile=1g.10gb"], &["--privileged"], &[]);
    assert!(refusals(&site).contains("3g.13gb") && refusals(&site).contains("--privileged"), "{}", refusals(&site));
    let output = run(&mut podman.request(&["mig.profile=1g.10gb"], &["--rm"], &["/nonexistent"]));
    assert!(!output.status.success());
    site.gc(); // crun calls no poststop hook when a create fails
    site.clean("after a command that is not there");
}

#[test]
fn podman_with_runc() {
    under_podman("runc");
}

#[test]
fn podman_with_crun() {
    under_podman("crun");
}

/// The spec for containerd's base_runtime_spec, made as docs/engines.md says.
#[test]
fn containerd_with_a_base_spec() {
    let Some(site) = Site::new(&["docker", "ctr"]) else { return };
    let ctr = |words: &[&str]| {
        let mut command = Command::new(site.dir.join("bin/ctr"));
        command.args(words);
        command
    };
    let page = include_str!("../../docs/engines.md");
    let filter = page.split_once("ctr oci spec | jq '").unwrap().1.split_once("' >").unwrap().0;
    let plain = site.write("plain.json", &must(&mut ctr(&["oci", "spec"])));
    let base: Value = serde_json::from_str(&must(Command::new("jq").arg(filter).arg(plain))).unwrap();
    let id = site.path("").file_name().unwrap().display().to_string();
    let dir = hooked(&site, "spec", json!({"mig.profile": "2g.20gb"}), &["sleep", "600"]);
    change(&dir, |config| {
        let ours = std::mem::replace(config, base);
        for key in ["annotations", "root", "process"] {
            config[key] = ours[key].clone();
        }
        config["root"]["path"] = json!(dir.join("rootfs"));
        config["linux"]["cgroupsPath"] = ours["linux"]["cgroupsPath"].clone();
        for stage in ["createRuntime", "poststop"] {
            assert_eq!(config["hooks"][stage][0]["path"], "/usr/libexec/oci/hooks.d/mig-hook");
            assert_eq!(config["hooks"][stage][0]["args"], json!(["mig-hook", stage]));
            config["hooks"][stage] = ours["hooks"][stage].clone();
        }
    });
    must(&mut ctr(&["run", "-d", "--null-io", "--config", &dir.join("config.json").display().to_string(), &id]));
    let seen = Probe::read(&must(&mut ctr(&["task", "exec", "--exec-id", "e1", &id, "sh", "-c", PROBE])));
    site.assert_given(&seen, &["2g.20gb"]);
    must(&mut ctr(&["task", "kill", "-s", "KILL", &id]));
    wait_for("the task's end", SOON, || run(&mut ctr(&["task", "delete", &id])).status.success());
    site.clean("after task delete");
    must(&mut ctr(&["container", "delete", &id]));
}
