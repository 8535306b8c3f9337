//! The classic hook: createRuntime and poststop as an administrator registers them, with runtimes and engines that let nobody
//! edit the config.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use crate::common::{binaries, document, run, text, wait_for};
use crate::runtimes::{bundle, on_v2};
use crate::{Probe, SOON, Site, detached, installed, kill, must};

/// What a container says of its slice: its nodes, and the variables that it finds in a file.
const PROBE: &str = "mig-probe; cat /run/mig-hook/environment";

/// An entry of a config's hooks, as an administrator writes it.
fn entry(site: &Site, stage: &str) -> Value {
    json!({
        "path": binaries().join("mig-hook"),
        "args": ["mig-hook", "--config", site.config(), stage],
        "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"],
    })
}

/// A bundle with a root of its own, whose config carries our hooks and no edit.
fn hooked(site: &Site, name: &str, request: Value, words: &[&str]) -> PathBuf {
    let dir = bundle(site, name, request, words);
    must(Command::new("cp").arg("-a").arg(site.dir.join("rootfs")).arg(dir.join("rootfs")));
    change(&dir, |config| {
        config["root"]["path"] = json!("rootfs");
        config["hooks"] =
            json!({"createRuntime": [entry(site, "createRuntime")], "poststop": [entry(site, "poststop")]});
    });
    dir
}

fn change(bundle: &Path, how: impl FnOnce(&mut Value)) {
    let mut config = document(&bundle.join("config.json"));
    how(&mut config);
    std::fs::write(bundle.join("config.json"), config.to_string()).unwrap();
}

/// A runtime's command line.
fn call(site: &Site, runtime: &str, words: &[&str]) -> Command {
    let mut command = Command::new(installed(runtime));
    command.arg("--root").arg(site.path("root")).args(words);
    command
}

fn created(site: &Site, runtime: &str, dir: &Path, id: &str) -> (bool, String) {
    let bundle = dir.display().to_string();
    detached(&mut call(site, runtime, &["create", "--bundle", &bundle, id]), &site.path("log"))
}

/// Why containers were refused, as the audit file says: crun keeps what a hook prints to itself.
fn refusals(site: &Site) -> String {
    let lines = site.audit().into_iter().filter(|line| line["event"] == "refusal");
    lines.map(|line| format!("{}\n", line["reason"].as_str().unwrap())).collect()
}

fn given_while_it_is_created(runtime: &str) {
    let Some(site) = Site::new(&[runtime]) else { return };
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
    // Every other slice is closed, and what the config's own rules close or open is as it was.
    let mut others = site.others(&seen);
    assert!(others.len() >= 7, "{others:?}");
    others.extend(["1:1".to_owned(), "10:229".to_owned()]);
    let mut words = vec!["exec", "--cap", "CAP_MKNOD", "c1", "mig-probe"];
    words.extend(others.iter().map(String::as_str));
    let verdicts = Probe::verdicts(&must(&mut call(&site, runtime, &words)));
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
    given_while_it_is_created("runc");
}

#[test]
fn given_while_crun_creates_it() {
    given_while_it_is_created("crun");
}

/// A cgroup v2 tree alone; a library that swallows what this machine may forbid to crun 1.8, which then ends.
fn runtime_on_v2(site: &Site, runtime: &str, words: &[&str]) -> Command {
    let command = call(site, runtime, words);
    if runtime != "crun" {
        return on_v2(&command);
    }
    let source = "#define _GNU_SOURCE\n#include <sys/resource.h>\nint setrlimit(__rlimit_resource_t r, const struct rlimit *l)\
                  { prlimit(0, r, l, 0); return 0; }\nint setrlimit64(__rlimit_resource_t r, const struct rlimit64 *l)\
                  { prlimit64(0, r, l, 0); return 0; }\n";
    let (file, library) = (site.write("limits.c", source), site.shown("limits.so"));
    must(Command::new("cc").args(["-shared", "-fPIC", "-o", &library]).arg(file));
    let mut with = Command::new("env");
    with.arg(format!("LD_PRELOAD={library}")).arg(command.get_program()).args(command.get_args());
    on_v2(&with)
}

fn given_on_v2(runtime: &str) {
    let Some(site) = Site::new(&[runtime]) else { return };
    let test = || std::thread::current().name().unwrap_or_default().to_owned();
    let possible = run(&mut on_v2(Command::new("test").args(["-w", "/sys/fs/cgroup/cgroup.procs"])));
    if !possible.status.success() {
        return crate::common::skip(&test(), "no cgroup v2 tree can be mounted");
    }
    if runtime == "crun" && !crate::common::installed("cc") {
        return crate::common::skip(&test(), "no C compiler");
    }
    site.sim("make", &["--gpu", "0", "--profile", "1g.10gb"]);
    let before = site.instances();
    let gpu = format!("{}:0", site.machine()["majors"]["nvidia"]);
    let mut others: Vec<String> = site.others(&Probe::default()).into_iter().filter(|d| *d != gpu).collect();
    others.extend(["1:1".to_owned(), "10:229".to_owned()]);
    let script = format!("{PROBE}; mig-probe {}; echo x > /dev/null && echo null", others.join(" "));
    let dir = hooked(&site, "v2", json!({"mig.profile": "2g.20gb", "mig.gpu": "0"}), &["sh", "-c", &script]);
    let output = run(&mut runtime_on_v2(&site, runtime, &["run", "--bundle", &dir.display().to_string(), "v2"]));
    let said = text(&output);
    assert!(output.status.success(), "{said}\n{}", refusals(&site));
    let seen = Probe::read(&said);
    assert_eq!(seen.nodes.len(), 6, "{seen:?}");
    assert!(seen.nodes.values().all(|(_, verdict)| verdict == "allowed"), "{seen:?}");
    assert_eq!(seen.variable("MIG_DEVICE_PROFILES"), "2g.20gb");
    let verdicts = Probe::verdicts(&said);
    assert_eq!(verdicts.len(), others.len(), "{said}");
    assert!(verdicts.values().all(|verdict| verdict == "denied"), "{verdicts:?}");
    assert!(said.contains("\nnull"), "{said}");
    assert_eq!((site.leases().len(), site.instances()), (0, before));
}

#[test]
fn given_on_cgroup_v2_by_runc() {
    given_on_v2("runc");
}

#[test]
fn given_on_cgroup_v2_by_crun() {
    given_on_v2("crun");
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
        assert!(why.len() == 1 && why[0].contains(word), "{id}: {why:?}\n{said}");
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
