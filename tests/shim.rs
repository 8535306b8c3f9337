//! `mig-runtime` for containers that ask for a slice or hold one.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use common::{DEMO, Init, World, binaries, config, document, run, text, wait_for};
use serde_json::{Value, json};

fn profile(name: &str) -> Value {
    json!({"mig.profile": name})
}

/// `create` of a bundle through the shim, with the runtime's root that [`World::living`] uses.
fn create(world: &World, own: &[&str], bundle: &Path, id: &str) -> Output {
    let root = world.path("root");
    let line = ["--root", root.to_str().unwrap(), "create", "--bundle", bundle.to_str().unwrap(), id];
    world.shim(&[own, &line].concat())
}

fn delete(world: &World, id: &str) -> Output {
    world.shim(&["--root", world.path("root").to_str().unwrap(), "delete", id])
}

fn code(output: &Output) -> i32 {
    output.status.code().unwrap_or_else(|| panic!("{}", text(output)))
}

/// A refusal: that exit code, those words in the message, the runtime not started, nothing held.
fn assert_refused(world: &World, output: &Output, expected: i32, words: &[&str]) {
    let shown = text(output);
    assert_eq!(code(output), expected, "{shown}");
    for word in words {
        assert!(shown.contains(word), "{word:?} is not in: {shown}");
    }
    assert_eq!(world.recorded("argv"), None, "the runtime was started: {shown}");
    world.assert_clean(&shown);
}

fn env_of(config: &Value) -> Vec<&str> {
    config["process"]["env"].as_array().unwrap().iter().map(|v| v.as_str().unwrap()).collect()
}

/// The devices that an edited config must have for the instances that the simulator shows: path, major, minor, mode.
fn expected_nodes(world: &World) -> Vec<(String, u64, u64, u64)> {
    let shown: Value = serde_json::from_str(&world.sim("show", &["--json"])).unwrap();
    let major = |name: &str| shown["majors"][name].as_u64().unwrap();
    let mut nodes = vec![("/dev/nvidiactl".to_owned(), major("nvidia"), 255, 0o666)];
    let mut caps = vec![];
    for gpu in shown["gpus"].as_array().unwrap() {
        let instances = gpu["gpu_instances"].as_array().unwrap();
        let minor = gpu["minor"].as_u64().unwrap();
        if !instances.is_empty() {
            nodes.push((format!("/dev/nvidia{minor}"), major("nvidia"), minor, 0o666));
        }
        for gi in instances {
            caps.extend([gi["cap_minor"].as_u64().unwrap(), gi["compute_instances"][0]["cap_minor"].as_u64().unwrap()]);
        }
    }
    nodes.push(("/dev/nvidia-uvm".to_owned(), major("uvm"), 0, 0o666));
    nodes.push(("/dev/nvidia-uvm-tools".to_owned(), major("uvm"), 1, 0o666));
    nodes.extend(caps.iter().map(|m| (format!("/dev/nvidia-caps/nvidia-cap{m}"), major("caps"), *m, 0o444)));
    nodes.sort();
    nodes
}

fn nodes_of(config: &Value) -> Vec<(String, u64, u64, u64)> {
    let number = |d: &Value, key: &str| d[key].as_u64().unwrap();
    let devices = config["linux"]["devices"].as_array().unwrap().iter();
    let node = |d: &Value| {
        assert_eq!(d["type"], "c");
        (d["path"].as_str().unwrap().to_owned(), number(d, "major"), number(d, "minor"), number(d, "fileMode"))
    };
    let mut nodes: Vec<_> = devices.map(node).collect();
    nodes.sort();
    nodes
}

/// Takes from an edited config what an edit adds, after checking it: what is left must be the original.
fn undo(world: &World, mut config: Value, bind: bool) -> Value {
    let token = config["annotations"].as_object_mut().unwrap().shift_remove("mig.lease").unwrap();
    assert_eq!(token, world.lease()["token"]);
    let object = config["linux"].as_object_mut().unwrap();
    let nodes = expected_nodes(world);
    assert_eq!(nodes_of(&json!({"linux": {"devices": object["devices"]}})), nodes);
    object.shift_remove("devices");
    let rules = config["linux"]["resources"]["devices"].as_array_mut().unwrap();
    let ours = rules.split_off(rules.len() - nodes.len());
    for (_, major, minor, _) in &nodes {
        let rule = json!({"allow": true, "type": "c", "major": major, "minor": minor, "access": "rw"});
        assert_eq!(ours.iter().filter(|r| **r == rule).count(), 1, "{ours:#?}");
    }
    let masked = config["linux"].as_object_mut().unwrap().shift_remove("maskedPaths").unwrap_or(json!([]));
    let machine = world.machine();
    let others = machine["gpus"].as_array().unwrap().iter().filter(|gpu| gpu["gpu_instances"] == json!([]));
    let hides = |gpu: &Value| format!("/proc/driver/nvidia/capabilities/gpu{}", gpu["minor"]);
    let hidden: Vec<Value> = others.map(|gpu| json!(hides(gpu))).collect();
    let of_capabilities = masked.as_array().unwrap().iter().filter(|path| path.to_string().contains("capabilities"));
    assert_eq!(of_capabilities.cloned().collect::<Vec<_>>(), hidden, "{masked}");
    assert_eq!(masked.as_array().unwrap().len(), 2 * hidden.len(), "{masked}");
    let env = config["process"]["env"].as_array_mut().unwrap();
    let ours = env.split_off(env.len() - 4);
    let uuid = &world.instances()[0]["compute_instances"][0]["uuid"].as_str().unwrap().to_owned();
    let expected = [
        format!("CUDA_VISIBLE_DEVICES={uuid}"),
        "NVIDIA_VISIBLE_DEVICES=void".into(),
        format!("MIG_DEVICE_UUIDS={uuid}"),
        "MIG_DEVICE_PROFILES=1g.10gb".into(),
    ];
    assert_eq!(ours, expected);
    let hooks = config.as_object_mut().unwrap().shift_remove("hooks").unwrap();
    let stages: Vec<&String> = hooks.as_object().unwrap().keys().collect();
    assert_eq!(stages, if bind { vec!["createRuntime", "poststop"] } else { vec!["poststop"] });
    for (stage, list) in hooks.as_object().unwrap() {
        let [hook] = list.as_array().unwrap().as_slice() else { panic!("{list}") };
        assert_eq!(hook["path"], binaries().canonicalize().unwrap().join("mig-hook").to_str().unwrap());
        let args = json!(["mig-hook", "--config", world.config(), stage, "--lease", token]);
        assert_eq!(hook["args"], args);
        assert!(!hook["env"].as_array().unwrap().is_empty(), "a hook without env inherits the runtime's");
        assert!(hook["timeout"].as_u64().unwrap() > 0);
    }
    config
}

#[test]
fn create_adds_exactly_the_slice_and_keeps_every_other_byte_of_meaning_and_order() {
    let world = World::new(&DEMO);
    let runc = world.recording_runtime(0);
    let other = world.path("rt/youki").display().to_string();
    std::fs::copy(runc, &other).unwrap();
    let annotated = config(profile("1g.10gb"), &["PATH=/bin"]);
    let asked_by_env = config(json!({}), &["PATH=/bin", "MIG_PROFILE=1g.10gb"]);
    let pid_file = world.path("pid");
    let pid_file = ["--pid-file", pid_file.to_str().unwrap()];
    type Case<'a> = (&'a str, &'a [&'a str], &'a Value, &'a str, &'a [&'a str], bool);
    let cases: [Case; 6] = [
        ("annotation", &[], &annotated, "create", &[], true),
        ("annotation, --pid-file", &[], &annotated, "create", &pid_file, false),
        ("annotation, --pid-file, not runc or crun", &["--mig-runtime", &other], &annotated, "create", &pid_file, true),
        ("annotation, run", &[], &annotated, "run", &[], true),
        ("environment", &["--mig-env"], &asked_by_env, "create", &[], true),
        ("environment, run", &["--mig-env"], &asked_by_env, "run", &pid_file, false),
    ];
    for (n, (name, own, asked, verb, more, bind)) in cases.into_iter().enumerate() {
        let id = format!("c{n}");
        let bundle = world.bundle(&id, asked);
        let mode = std::fs::Permissions::from_mode(0o640);
        std::fs::set_permissions(bundle.join("config.json"), mode).unwrap();
        let line = [&["--root", "/r", verb, "--bundle", bundle.to_str().unwrap()], more, &[&id]].concat();
        let output = world.shim(&[own, line.as_slice()].concat());
        assert_eq!(code(&output), 0, "{name}: {}", text(&output));
        assert_eq!(world.recorded("argv").unwrap().lines().collect::<Vec<_>>(), line, "{name}");
        let edited = document(&bundle.join("config.json"));
        assert_eq!(undo(&world, edited, bind).to_string(), asked.to_string(), "{name}");
        assert_eq!(bundle.join("config.json").metadata().unwrap().mode() & 0o7777, 0o640, "{name}");
        let files: Vec<_> = std::fs::read_dir(&bundle).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(files.len(), 2, "{name}: no temporary file is left: {files:?}");
        assert_eq!(world.migctl(&["gc"]).status.code(), Some(0), "{name}: the stand-in runtime left no container");
        world.assert_clean(name);
    }
}

#[test]
fn what_an_incoming_config_carries_of_ours_or_of_nvidia_is_stripped() {
    let world = World::new(&["a100-sxm4-80gb"]);
    world.recording_runtime(0);
    let shown: Value = serde_json::from_str(&world.sim("show", &["--json"])).unwrap();
    let caps = shown["majors"]["caps"].as_u64().unwrap();
    let mut forged = config(profile("1g.10gb"), &["NVIDIA_VISIBLE_DEVICES=all", "CUDA_VISIBLE_DEVICES=0", "X=1"]);
    forged["annotations"]["mig.lease"] = "0123456789abcdef0123456789abcdef".into();
    forged["hooks"] = json!({
        "createRuntime": [
            {"path": "/tmp/evil/mig-hook", "args": ["mig-hook", "createRuntime", "--lease", "0123456789abcdef0123456789abcdef"]},
            {"path": "/usr/bin/other"}],
        "poststop": [{"path": "/usr/libexec/oci/hooks.d/mig-hook", "args": ["mig-hook", "poststop", "--lease", "x"]}],
        "createContainer": [{"path": "/x/mig-hook"}],
    });
    forged["linux"]["devices"] = json!([
        {"path": "/dev/nvidia0", "type": "c", "major": 195, "minor": 0},
        {"path": "/dev/nvidia-caps/nvidia-cap1", "type": "c", "major": caps, "minor": 1},
        {"path": "/dev/innocent", "type": "c", "major": caps, "minor": 2},
        {"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229}]);
    let rules = forged["linux"]["resources"]["devices"].as_array_mut().unwrap();
    rules.push(json!({"allow": true, "type": "c", "major": caps, "access": "r"}));
    rules.push(json!({"allow": true, "type": "c", "major": 195, "minor": 0, "access": "rwm"}));
    rules.push(json!({"allow": true, "type": "c", "major": 10, "minor": 229, "access": "rwm"}));
    forged["mounts"]
        .as_array_mut()
        .unwrap()
        .push(json!({"destination": "/dev/nvidia3", "type": "bind", "source": "/dev/zero"}));
    let bundle = world.bundle("c1", &forged);
    let output = create(&world, &[], &bundle, "c1");
    assert_eq!(code(&output), 0, "{}", text(&output));

    let edited = document(&bundle.join("config.json"));
    let whole = edited.to_string();
    for gone in
        ["0123456789abcdef", "/tmp/evil", "/x/mig-hook", "/dev/innocent", "NVIDIA_VISIBLE_DEVICES=all", "nvidia3"]
    {
        assert!(!whole.contains(gone), "{gone} is still in {edited:#}");
    }
    assert_eq!(edited["hooks"]["createRuntime"][0], json!({"path": "/usr/bin/other"}));
    assert_eq!(edited["hooks"]["poststop"].as_array().unwrap().len(), 1);
    let mut nodes = expected_nodes(&world);
    assert_eq!(edited["linux"]["devices"][0]["path"], "/dev/fuse");
    let rest = json!({"linux": {"devices": edited["linux"]["devices"].as_array().unwrap()[1..]}});
    assert_eq!(nodes_of(&rest), nodes);
    let rules = edited["linux"]["resources"]["devices"].as_array().unwrap();
    assert_eq!(rules.len(), 3 + nodes.len(), "{rules:#?}");
    assert_eq!(rules[0], json!({"allow": false, "access": "rwm"}));
    nodes.retain(|(_, major, minor, _)| *major == caps && *minor < 3);
    assert!(nodes.is_empty(), "config and monitor are nobody's");
}

#[test]
fn an_edited_config_of_an_earlier_life_gets_a_slice_of_its_own() {
    let world = World::new(&["a100-sxm4-80gb"]);
    world.recording_runtime(0);
    let asked = config(profile("1g.10gb"), &["PATH=/bin"]);
    let bundle = world.bundle("c1", &asked);
    assert_eq!(code(&create(&world, &[], &bundle, "c1")), 0);
    let first = world.lease()["token"].clone();
    assert_eq!(code(&delete(&world, "c1")), 0);
    world.assert_clean("after delete");
    assert_eq!(code(&create(&world, &[], &bundle, "c1")), 0);
    assert_ne!(world.lease()["token"], first);
    let edited = document(&bundle.join("config.json"));
    assert!(!edited.to_string().contains(first.as_str().unwrap()), "nothing of the first lease is left");
    // Emptied lists may stay; everything else is what one edit adds.
    assert_eq!(undo(&world, edited, true).to_string(), asked.to_string());
}

#[test]
fn podmans_hook_and_the_shim_together_allocate_once() {
    let world = World::new(&["a100-sxm4-80gb"]);
    world.recording_runtime(0);
    // This test process is the hook's parent, as podman is: it lives, so the lease may be adopted.
    let asked = config(profile("1g.10gb"), &["PATH=/bin"]);
    let output = world.hook(&["precreate"], asked.to_string().as_bytes());
    assert_eq!(code(&output), 0, "{}", text(&output));
    let bundle = world.bundle("c1", &serde_json::from_slice(&output.stdout).unwrap());
    let before = std::fs::read(bundle.join("config.json")).unwrap();
    let token = world.lease()["token"].clone();
    assert_eq!(world.lease()["holder"]["container"], Value::Null);

    let output = create(&world, &[], &bundle, "c1");
    assert_eq!(code(&output), 0, "{}", text(&output));
    assert_eq!(std::fs::read(bundle.join("config.json")).unwrap(), before, "what precreate wrote stays");
    assert_eq!((world.lease()["token"].clone(), world.instances().len()), (token, 1));
    assert_eq!(world.lease()["holder"]["container"], "c1");

    // A second container with a copy of that config: the lease is bound, so the mark is not believed.
    let copy = world.bundle("c2", &serde_json::from_slice(&before).unwrap());
    assert_eq!(code(&create(&world, &[], &copy, "c2")), 0);
    assert_eq!(world.instances().len(), 2);
    assert_ne!(
        document(&copy.join("config.json"))["annotations"]["mig.lease"],
        document(&bundle.join("config.json"))["annotations"]["mig.lease"]
    );
    assert_eq!(code(&delete(&world, "c2")), 0);

    assert_eq!(code(&delete(&world, "c1")), 0);
    world.assert_clean("after the delete of an adopted lease");
}

#[test]
fn delete_releases_when_the_runtime_says_so_or_the_container_is_over() {
    let world = World::new(&["a100-sxm4-80gb"]);
    world.recording_runtime(0);
    let asked = config(profile("1g.10gb"), &[]);

    // The runtime deletes it.
    let (_bundle, init) = world.living("c1", &asked);
    drop(init);
    let output = delete(&world, "c1");
    assert_eq!(code(&output), 0, "{}", text(&output));
    let root = world.path("root");
    assert_eq!(
        world.recorded("argv").unwrap().lines().collect::<Vec<_>>(),
        ["--root", root.to_str().unwrap(), "delete", "c1"]
    );
    world.assert_clean("after delete");
    assert_eq!(code(&delete(&world, "c1")), 0, "a second one is the runtime's own business");

    // A plain delete of a running container fails, and it keeps what it has.
    let (_bundle, init) = world.living("c2", &asked);
    world.recording_runtime(3);
    assert_eq!(code(&delete(&world, "c2")), 3);
    assert_eq!((world.leases().len(), world.instances().len()), (1, 1));

    // The runtime fails, but there is no container any more.
    drop(init);
    assert_eq!(code(&delete(&world, "c2")), 3);
    world.assert_clean("after a failed delete of a dead container");
}

/// A low-level runtime that deletes as runc does: it calls the poststop hook, notes what is left, and does `more`.
fn deleting_runtime(world: &World, more: &str) {
    let (hook, config, dir) = (binaries().join("mig-hook"), world.config(), world.path(""));
    let (hook, config, dir) = (hook.display(), config.display(), dir.display());
    let runtime = world.script(
        "rt/runc",
        &format!(
            "case \" $* \" in *' delete '*) ;; *) exit 0 ;; esac\n\
             token=$(basename {dir}/state/leases/*.json .json)\n\
             echo '{{\"ociVersion\": \"1.0.2\", \"id\": \"c1\", \"status\": \"stopped\", \"bundle\": \"/b\"}}' |\n\
             {hook} --config {config} poststop --lease \"$token\" || exit 9\n\
             ls {dir}/state/leases {dir}/state/intents > {dir}/rt/left\n{more}"
        ),
    );
    world.settings(&format!("[runtime]\npath = \"{}\"", runtime.display()));
}

#[test]
fn the_poststop_hook_leaves_the_end_to_the_delete_that_waits_for_the_runtime() {
    let world = World::new(&["a30-24gb"]);
    deleting_runtime(&world, "");
    let (_, init) = world.living("c1", &config(profile("1g.6gb"), &[]));
    drop(init);
    assert_eq!(code(&delete(&world, "c1")), 0);
    let left = world.recorded("left").unwrap();
    assert!(left.contains(".json") && left.contains(".ready"), "the hook has not touched it: {left}");
    world.assert_clean("after delete");
}

#[test]
fn a_delete_that_is_killed_when_the_hook_has_left_the_end_to_it_is_made_good() {
    let world = World::new(&["a30-24gb"]);
    deleting_runtime(&world, "kill -9 $PPID");
    let (_, init) = world.living("c1", &config(profile("1g.6gb"), &[]));
    drop(init);
    assert!(!delete(&world, "c1").status.success());
    assert_eq!(world.lease()["state"], "active");
    assert!(world.migctl(&["gc"]).status.success());
    world.assert_clean("after gc");
}

#[test]
fn a_living_holder_of_the_device_keeps_the_slice_over_a_failed_delete() {
    let world = World::new(&["a100-sxm4-80gb"]);
    world.recording_runtime(1);
    let root = world.path("root");
    let bundle = world.bundle("c1", &config(profile("1g.10gb"), &[]));
    let _ = create(&world, &[], &bundle, "c1"); // no pid file: whether it lives is not known
    assert_eq!(code(&world.shim(&["--root", root.to_str().unwrap(), "delete", "c1"])), 1);
    assert_eq!(world.leases().len(), 1, "a runtime that failed and an unknown init: kept for gc to judge");
    assert_eq!(code(&world.migctl(&["gc"])), 0);
    world.assert_clean("after gc");
}

#[test]
fn delete_of_an_unknown_container_or_under_another_root_is_the_runtimes_alone() {
    let world = World::new(&["a100-sxm4-80gb"]);
    world.recording_runtime(0);
    let (_bundle, _init) = world.living("c1", &config(profile("1g.10gb"), &[]));
    for line in [&["--root", "/other", "delete", "c1"][..], &["delete", "c1"], &["delete", "c2"], &["delete", "../c1"]]
    {
        let mut command = world.shim_command(line);
        let child = command.stdout(Stdio::null()).spawn().unwrap();
        let pid = child.id();
        assert!(child.wait_with_output().unwrap().status.success());
        assert_eq!(world.recorded("pid").unwrap().trim(), pid.to_string(), "{line:?} is an execv");
        assert_eq!(world.recorded("argv").unwrap().lines().collect::<Vec<_>>(), line);
        assert_eq!(world.leases().len(), 1);
    }
}

#[test]
fn a_leased_create_is_the_runtime_in_the_same_process_with_the_same_signals() {
    let world = World::new(&["a100-sxm4-80gb"]);
    let runtime = world.probing_runtime(9);
    let signals = |status: &str| -> Vec<String> {
        status.lines().filter(|l| l.starts_with("SigBlk") || l.starts_with("SigIgn")).map(str::to_owned).collect()
    };
    for (n, wrapper) in ["--ignore-signal=PIPE", "--default-signal=PIPE", "--block-signal=USR1,PIPE"].iter().enumerate()
    {
        let id = format!("c{n}");
        let bundle = world.bundle(&id, &config(profile("1g.10gb"), &[]));
        let line = ["--root", "/r", "create", "--bundle", bundle.to_str().unwrap(), &id];
        let wrapped = |program: &Command| {
            let mut command = Command::new("env");
            command.args([wrapper, "-i", "LD_BIND_NOW=1", "ODD=two\nlines", "PATH=/usr/bin:/bin", "7=x"]);
            command.arg(program.get_program()).args(program.get_args());
            command
        };
        assert_eq!(run(&mut wrapped(Command::new(&runtime).args(line))).status.code(), Some(9));
        let of = |what: &str| world.recorded(what).unwrap();
        let without = (signals(&of("status")), of("cmdline"), of("environ"));
        let child = wrapped(&world.shim_command(&line)).stderr(Stdio::piped()).spawn().unwrap();
        let pid = child.id();
        let output = child.wait_with_output().unwrap();
        assert_eq!(code(&output), 9, "the exit code is the runtime's: {}", text(&output));
        assert_eq!(world.lease()["holder"]["owner"]["pid"], pid);
        assert_eq!(of("pid").trim(), pid.to_string());
        assert_eq!((signals(&of("status")), of("cmdline"), of("environ")), without, "{wrapper}");
        assert_eq!(code(&world.migctl(&["gc"])), 0);
    }
}

#[test]
fn a_leased_delete_runs_the_runtime_with_the_signals_and_environment_of_the_caller() {
    let world = World::new(&["a100-sxm4-80gb"]);
    let runtime = world.probing_runtime(0);
    for wrapper in ["--ignore-signal=PIPE", "--default-signal=PIPE"] {
        let (_bundle, init) = world.living("c1", &config(profile("1g.10gb"), &[]));
        drop(init);
        let root = world.path("root");
        let line = ["--root", root.to_str().unwrap(), "delete", "c1"];
        let wrapped = |program: &Command| {
            let mut command = Command::new("env");
            command.args([wrapper, "-i", "LD_BIND_NOW=1", "A=b", "PATH=/usr/bin:/bin"]);
            command.arg(program.get_program()).args(program.get_args());
            command
        };
        let seen = || {
            let of = |what: &str| world.recorded(what).unwrap();
            let ignored = of("status").lines().find(|l| l.starts_with("SigIgn")).unwrap().to_owned();
            let mut environ: Vec<String> = of("environ").split('\0').map(str::to_owned).collect();
            environ.sort();
            (ignored, of("cmdline"), environ)
        };
        run(&mut wrapped(Command::new(&runtime).args(line)));
        let without = seen();
        let output = run(&mut wrapped(&world.shim_command(&line)));
        assert_eq!(code(&output), 0, "{}", text(&output));
        assert_eq!(seen(), without, "{wrapper}");
        world.assert_clean("after delete");
    }
}

#[test]
fn exec_of_a_process_file_gets_the_slices_environment() {
    let world = World::new(&["a100-sxm4-80gb"]);
    world.recording_runtime(0);
    let (_bundle, _init) = world.living("c1", &config(profile("1g.10gb"), &[]));
    let uuid = world.lease()["slices"][0]["uuid"].as_str().unwrap().to_owned();
    let process =
        json!({"args": ["nvidia-smi"], "x": 1.5, "env": ["PATH=/bin", "NVIDIA_VISIBLE_DEVICES=all"], "cwd": "/"});
    let file = world.write("process.json", &process.to_string());
    let root = world.path("root");
    let line = ["--root", root.to_str().unwrap(), "exec", "--process", file.to_str().unwrap(), "--detach", "c1"];
    let output = world.shim(&line);
    assert_eq!(code(&output), 0, "{}", text(&output));
    assert_eq!(world.recorded("argv").unwrap().lines().collect::<Vec<_>>(), line);
    let edited = document(&file);
    let ours = [
        format!("CUDA_VISIBLE_DEVICES={uuid}"),
        "NVIDIA_VISIBLE_DEVICES=void".into(),
        format!("MIG_DEVICE_UUIDS={uuid}"),
        "MIG_DEVICE_PROFILES=1g.10gb".into(),
    ];
    assert_eq!(edited["env"], json!(["PATH=/bin", ours[0], ours[1], ours[2], ours[3]]));
    assert_eq!((&edited["x"], &edited["args"]), (&process["x"], &process["args"]));

    // Somebody else's process, and one that we can't read, pass through.
    std::fs::write(&file, process.to_string()).unwrap();
    assert_eq!(code(&world.shim(&["exec", "--process", file.to_str().unwrap(), "c1"])), 0);
    assert_eq!(document(&file), process);
    std::fs::write(&file, "{").unwrap();
    assert_eq!(code(&world.shim(&line)), 0, "the runtime says what is wrong with it");
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "{");
}

#[test]
fn restore_of_a_container_with_a_slice_is_refused() {
    let world = World::new(&["a100-sxm4-80gb"]);
    world.recording_runtime(0);
    let bundle = world.bundle("c1", &config(profile("1g.10gb"), &[]));
    let b = bundle.to_str().unwrap();
    let output = world.shim(&["restore", "--bundle", b, "--image-path", "/i", "c1"]);
    assert_refused(&world, &output, 77, &["not restored", "GPU state"]);
    let bundle = world.bundle("c2", &config(json!({}), &[]));
    assert_eq!(code(&world.shim(&["restore", "--bundle", bundle.to_str().unwrap(), "c2"])), 0);
}

#[test]
fn a_runtime_that_cannot_be_started_costs_no_slice() {
    let world = World::new(&["a100-sxm4-80gb"]);
    for runtime in [world.path("nowhere/runc"), world.write("not-executable", "x")] {
        world.settings(&format!("[runtime]\npath = \"{}\"", runtime.display()));
        let bundle = world.bundle("c1", &config(profile("1g.10gb"), &[]));
        let log = world.path("log.json");
        let output = world.shim(&[
            "--log",
            log.to_str().unwrap(),
            "--log-format",
            "json",
            "create",
            "-b",
            bundle.to_str().unwrap(),
            "c1",
        ]);
        assert_refused(&world, &output, 77, &[runtime.to_str().unwrap(), "--mig-runtime"]);
        assert!(std::fs::read_to_string(&log).unwrap().contains("cannot start the low-level runtime"));
        assert_eq!(world.audit().len(), 2, "a grant and a release");
        std::fs::remove_file(world.path("audit.jsonl")).unwrap();
    }
    // --mig-runtime wins over the settings.
    let pinned = world.script("pinned", &format!("echo \"$@\" > {}", world.path("pinned.argv").display()));
    let output = world.shim(&["--mig-runtime", pinned.to_str().unwrap(), "state", "c1"]);
    assert_eq!(code(&output), 0, "{}", text(&output));
    assert_eq!(std::fs::read_to_string(world.path("pinned.argv")).unwrap(), "state c1\n");
}

#[test]
fn a_refusal_reaches_stderr_the_log_socket_the_audit_file_and_the_runtimes_log() {
    let world = World::new(&["a100-sxm4-80gb"]);
    world.recording_runtime(0);
    let socket = UnixDatagram::bind(world.path("log.sock")).unwrap();
    socket.set_nonblocking(true).unwrap();
    let datagrams = || {
        let mut lines = vec![];
        let mut buffer = [0; 65536];
        while let Ok(n) = socket.recv(&mut buffer) {
            lines.push(String::from_utf8_lossy(&buffer[..n]).into_owned());
        }
        lines
    };
    let bundle = world.bundle("c1", &config(profile("1g.5gb"), &[]));
    let log = world.path("runtime.log");
    let record = |format: &[&str]| {
        let _ = std::fs::remove_file(&log);
        let _ = datagrams();
        let line = [&["--log", log.to_str().unwrap()], format, &["create", "--bundle", bundle.to_str().unwrap(), "c1"]]
            .concat();
        let output = world.shim(&line);
        assert_refused(&world, &output, 65, &["1g.5gb", "1g.10gb"]);
        (String::from_utf8(output.stderr).unwrap(), std::fs::read_to_string(&log).unwrap())
    };
    let (stderr, written) = record(&["--log-format", "json"]);
    let [line] = written.lines().collect::<Vec<_>>()[..] else { panic!("one record was expected: {written}") };
    let json: Value = serde_json::from_str(line).unwrap();
    assert_eq!(json["level"], "error");
    assert_eq!(format!("mig-runtime: {}\n", json["msg"].as_str().unwrap()), stderr, "the same sentence");
    assert!(json["time"].as_str().unwrap().ends_with('Z'));
    let sent = datagrams();
    let of = |word: &str| sent.iter().filter(|l| l.contains(word)).count();
    assert_eq!((of("\"event\":\"refusal\""), of("mig: ")), (1, 1), "{sent:#?}");
    assert!(sent.iter().all(|l| l.starts_with('<') && l.contains(">mig-hook[")), "{sent:#?}");
    let audit = world.audit();
    assert_eq!(audit.len(), 1, "{audit:#?}");
    assert_eq!(
        (&audit[0]["event"], &audit[0]["container"], &audit[0]["request"]),
        (&json!("refusal"), &json!("c1"), &json!("mig.profile=1g.5gb"))
    );

    let (_, written) = record(&[]);
    assert!(written.starts_with("time=\"") && written.contains(" level=error msg=\"mig: "), "{written}");
    assert_eq!(written.lines().count(), 1);

    // A link in the log's place is not followed.
    let canary = world.write("canary", "untouched");
    std::fs::remove_file(&log).unwrap();
    std::os::unix::fs::symlink(&canary, &log).unwrap();
    let line = ["--log", log.to_str().unwrap(), "create", "--bundle", bundle.to_str().unwrap(), "c1"];
    assert_refused(&world, &world.shim(&line), 65, &["1g.5gb"]);
    assert_eq!(std::fs::read_to_string(canary).unwrap(), "untouched");
}

#[test]
fn one_container_is_one_grant_line_and_one_release_line() {
    let world = World::new(&["a100-sxm4-80gb"]);
    world.recording_runtime(0);
    let mut asked = config(profile("2x1g.10gb"), &[]);
    asked["annotations"]["io.kubernetes.cri.image-name"] = "registry/train:1".into();
    let socket = UnixDatagram::bind(world.path("log.sock")).unwrap();
    socket.set_nonblocking(true).unwrap();
    let (_bundle, init) = world.living("c1", &asked);
    drop(init);
    assert_eq!(code(&delete(&world, "c1")), 0);
    assert_eq!(code(&delete(&world, "c1")), 0);
    assert_eq!(code(&world.migctl(&["gc"])), 0);
    let audit = world.audit();
    let events: Vec<&str> = audit.iter().map(|l| l["event"].as_str().unwrap()).collect();
    assert_eq!(events, ["grant", "release"]);
    for line in &audit {
        assert_eq!(
            (&line["container"], &line["image"], &line["way"]),
            (&json!("c1"), &json!("registry/train:1"), &json!("shim"))
        );
        assert_eq!(line["slices"].as_array().unwrap().len(), 2);
        assert!(line["time_ms"].is_u64() && line["uid"].is_u64());
        assert_eq!(line["token"], audit[0]["token"]);
    }
    assert!(audit[1]["held_ms"].is_u64() && audit[1]["reason"].is_string());
    let mut buffer = [0; 65536];
    let mut sent = vec![];
    while let Ok(n) = socket.recv(&mut buffer) {
        sent.push(String::from_utf8_lossy(&buffer[..n]).into_owned());
    }
    assert_eq!(sent.iter().filter(|l| l.contains("\"event\":\"grant\"")).count(), 1, "{sent:#?}");
    assert_eq!(sent.iter().filter(|l| l.contains("\"event\":\"release\"")).count(), 1, "{sent:#?}");
}

#[test]
fn device_rules_that_open_other_slices_are_refused_unless_the_settings_allow_them() {
    let rules = [
        ("--privileged", json!([{"allow": true, "access": "rwm"}]), "deny nothing"),
        (
            "--device-cgroup-rule c *:*",
            json!([{"allow": false, "access": "rwm"}, {"allow": true, "type": "c", "access": "rwm"}]),
            "c *:*",
        ),
        (
            "type a",
            json!([{"allow": false, "access": "rwm"}, {"allow": true, "type": "a", "major": -1, "minor": -1, "access": "r"}]),
            "a *:*",
        ),
    ];
    let world = World::new(&["a100-sxm4-80gb"]);
    let runtime = world.recording_runtime(0);
    for (name, rules, part) in &rules {
        let mut open = config(profile("1g.10gb"), &[]);
        open["linux"]["resources"]["devices"] = rules.clone();
        let bundle = world.bundle("c1", &open);
        let before = std::fs::read(bundle.join("config.json")).unwrap();
        let output = create(&world, &[], &bundle, "c1");
        assert_refused(&world, &output, 77, &[part, "--privileged", "requests.open_device_rules = true"]);
        assert_eq!(std::fs::read(bundle.join("config.json")).unwrap(), before, "{name}");
    }
    let bundle = world.bundle("c1", &config(profile("1g.10gb"), &[]));
    let output = create(&world, &["--cgroup-manager", "disabled"], &bundle, "c1");
    assert_refused(
        &world,
        &output,
        77,
        &["without a cgroup", "--cgroups=disabled", "requests.open_device_rules = true"],
    );
    world.settings(&format!("[runtime]\npath = \"{}\"\n[requests]\nopen_device_rules = true", runtime.display()));
    for (name, rules, _) in &rules {
        let mut open = config(profile("1g.10gb"), &[]);
        open["linux"]["resources"]["devices"] = rules.clone();
        let bundle = world.bundle("c1", &open);
        let output = create(&world, &[], &bundle, "c1");
        assert_eq!(code(&output), 0, "{name}: {}", text(&output));
        assert_eq!(code(&delete(&world, "c1")), 0);
    }
}

#[test]
fn the_settings_limit_what_may_be_asked() {
    let world = World::new(&DEMO);
    let runtime = world.recording_runtime(0);
    let with = |tables: &str| world.settings(&format!("[runtime]\npath = \"{}\"\n{tables}", runtime.display()));
    let uuid = serde_json::from_str::<Value>(&world.sim("show", &["--json"])).unwrap()["gpus"][1]["uuid"].clone();
    let managed = format!("[limits]\ngpus = [\"{}\"]", uuid.as_str().unwrap());
    let cases = [
        (
            "[limits]\nprofiles = [\"1g.10gb\", \"2g.20gb\"]",
            json!({"mig.profile": "7g.80gb"}),
            &["7g.80gb", "limits.profiles", "1g.10gb, 2g.20gb"][..],
            77,
        ),
        // An alternative that is not allowed counts, whichever would be taken.
        (
            "[limits]\nprofiles = [\"1g.10gb\"]",
            json!({"mig.profile": "1g.10gb|7g.80gb"}),
            &["7g.80gb", "limits.profiles"],
            77,
        ),
        (
            "[limits]\nslices_per_container = 2",
            json!({"mig.profile": "3x1g.10gb"}),
            &["asks for 3 slices", "limits.slices_per_container allows 2"],
            77,
        ),
        ("[limits]\nslices_per_container = 2", json!({"mig.memory": "1GiB,1GiB,1GiB"}), &["asks for 3 slices"], 77),
        ("[limits]\ngpus = [\"7\"]", json!({"mig.profile": "1g.10gb"}), &["limits.gpus names no GPU"], 77),
        (&managed, json!({"mig.profile": "1g.10gb", "mig.gpu": "0"}), &["mig.gpu names no GPU here"], 65),
        (&managed, json!({"mig.profile": "8x1g.10gb"}), &["1g.10gb"], 65),
    ];
    for (tables, annotations, words, expected) in &cases {
        with(tables);
        let bundle = world.bundle("c1", &config(annotations.clone(), &[]));
        let output = create(&world, &[], &bundle, "c1");
        assert_refused(&world, &output, *expected, words);
        let audit = world.audit();
        assert_eq!(audit.len(), 1, "{tables}: one refusal line: {audit:#?}");
        assert_eq!(audit[0]["event"], "refusal");
        std::fs::remove_file(world.path("audit.jsonl")).unwrap();
    }
    for (tables, annotations) in [
        ("[limits]\nprofiles = [\"1g.10gb\", \"2g.20gb\"]", json!({"mig.profile": "2g.20gb"})),
        ("[limits]\nprofiles = [\"2g.20gb\"]", json!({"mig.memory": "1GiB"})),
        ("[limits]\nslices_per_container = 2", json!({"mig.profile": "2x1g.10gb"})),
        (&managed, json!({"mig.profile": "7x1g.10gb"})),
    ] {
        with(tables);
        let bundle = world.bundle("c1", &config(annotations, &[]));
        let output = create(&world, &[], &bundle, "c1");
        assert_eq!(code(&output), 0, "{tables}: {}", text(&output));
        for slice in world.lease()["slices"].as_array().unwrap() {
            assert!(!tables.contains("gpus") || slice["gpu"] == uuid, "{slice}");
            assert!(!tables.contains("profiles") || slice["profile_name"] == "2g.20gb", "{slice}");
        }
        assert_eq!(code(&delete(&world, "c1")), 0);
    }
}

#[test]
fn requests_in_the_environment_count_only_where_the_entry_and_the_settings_say_so() {
    let world = World::new(&["a100-sxm4-80gb"]);
    let runtime = world.recording_runtime(0);
    world.settings(&format!("[runtime]\npath = \"{}\"\n[requests]\nenvironment = false", runtime.display()));
    let bundle = world.bundle("c1", &config(json!({}), &["MIG_PROFILE=1g.10gb"]));
    assert_refused(&world, &create(&world, &["--mig-env"], &bundle, "c1"), 77, &["requests.environment", "annotation"]);
    let bundle = world.bundle("c1", &config(profile("2g.20gb"), &["MIG_PROFILE=1g.10gb"]));
    assert_eq!(code(&create(&world, &["--mig-env"], &bundle, "c1")), 0);
    assert_eq!(world.lease()["slices"][0]["profile_name"], "2g.20gb", "the annotation wins");
}

#[test]
fn several_slices_alternatives_memory_gpu_and_existing_slices() {
    let world = World::new(&DEMO);
    world.recording_runtime(0);
    let gpus: Value = serde_json::from_str(&world.sim("show", &["--json"])).unwrap();
    let gpu = |n: usize, key: &str| gpus["gpus"][n][key].as_str().unwrap().to_owned();
    let cases = [
        (json!({"mig.profile": "2x1g.10gb, 2g.20gb"}), vec!["1g.10gb", "1g.10gb", "2g.20gb"], None),
        (json!({"mig.profile": "9g.90gb|1g.20gb"}), vec!["1g.20gb"], None),
        (json!({"mig.profile": "4x7g.80gb|3g.40gb"}), vec!["3g.40gb"], None),
        (json!({"mig.memory": "8GiB"}), vec!["1g.10gb"], None),
        (json!({"mig.memory": "15GB"}), vec!["1g.20gb"], None),
        (json!({"mig.profile": "1g.10gb", "mig.gpu": "2"}), vec!["1g.10gb"], Some(2)),
        (json!({"mig.profile": "1g.10gb", "mig.gpu": gpu(1, "uuid")}), vec!["1g.10gb"], Some(1)),
        (
            json!({"mig.profile": "2x1g.10gb", "mig.gpu": gpu(2, "pci_bus_id")[4..]}),
            vec!["1g.10gb", "1g.10gb"],
            Some(2),
        ),
    ];
    for (annotations, profiles, on) in cases {
        let bundle = world.bundle("c1", &config(annotations.clone(), &[]));
        let output = create(&world, &[], &bundle, "c1");
        assert_eq!(code(&output), 0, "{annotations}: {}", text(&output));
        let lease = world.lease();
        let slices = lease["slices"].as_array().unwrap();
        assert_eq!(
            slices.iter().map(|s| s["profile_name"].as_str().unwrap()).collect::<Vec<_>>(),
            profiles,
            "{annotations}"
        );
        if let Some(on) = on {
            assert!(slices.iter().all(|s| s["gpu"].as_str() == Some(&gpu(on, "uuid"))), "{annotations}: {slices:#?}");
        }
        let edited = document(&bundle.join("config.json"));
        assert_eq!(nodes_of(&edited), expected_nodes(&world), "{annotations}");
        let uuids: Vec<&str> = slices.iter().map(|s| s["uuid"].as_str().unwrap()).collect();
        assert!(env_of(&edited).contains(&format!("CUDA_VISIBLE_DEVICES={}", uuids.join(",")).as_str()), "{edited:#}");
        assert!(env_of(&edited).contains(&format!("MIG_DEVICE_PROFILES={}", profiles.join(",")).as_str()));
        assert_eq!(code(&delete(&world, "c1")), 0);
        world.assert_clean(&annotations.to_string());
    }
    // All or nothing: two of the three would fit on that GPU.
    let bundle = world.bundle("c1", &config(json!({"mig.profile": "3x3g.40gb", "mig.gpu": "0"}), &[]));
    std::fs::remove_file(world.path("rt/argv")).unwrap();
    assert_refused(&world, &create(&world, &[], &bundle, "c1"), 65, &["3g.40gb"]);
}

#[test]
fn a_second_slice_that_the_driver_refuses_undoes_the_first() {
    let world = World::new(&["a100-sxm4-80gb"]);
    world.recording_runtime(0);
    world.sim(
        "fault",
        &["--call", "nvmlDeviceCreateGpuInstance*", "--nth", "2", "--times", "forever", "--fail", "UNKNOWN"],
    );
    let bundle = world.bundle("c1", &config(profile("2x1g.10gb"), &[]));
    let output = create(&world, &[], &bundle, "c1");
    world.sim("clear-faults", &[]);
    assert_ne!(code(&output), 0);
    assert_eq!(world.recorded("argv"), None);
    world.assert_clean(&text(&output));
}

#[test]
fn foreign_slices_are_leased_only_where_the_settings_say_so_and_never_destroyed() {
    let world = World::new(&["a100-sxm4-80gb"]);
    let runtime = world.recording_runtime(0);
    let made: Value =
        serde_json::from_str(&world.sim("make", &["--gpu", "0", "--profile", "1g.10gb", "--json"])).unwrap();
    let uuid = made["uuid"].as_str().unwrap().to_owned();
    let asks = [json!({"mig.uuid": uuid}), profile("1g.10gb")];

    let bundle = world.bundle("c1", &config(asks[0].clone(), &[]));
    let output = create(&world, &[], &bundle, "c1");
    assert_eq!(code(&output), 75, "{}", text(&output));
    assert!(text(&output).contains("slices.foreign") && text(&output).contains(&uuid), "{}", text(&output));
    assert_eq!((world.leases().len(), world.instances().len()), (0, 1));

    world.settings(&format!("[runtime]\npath = \"{}\"\n[slices]\nforeign = \"idle\"", runtime.display()));
    for ask in asks {
        let (_bundle, init) = world.living("c1", &config(ask.clone(), &[]));
        assert_eq!(world.lease()["slices"][0]["uuid"].as_str(), Some(uuid.as_str()), "{ask}");
        assert_eq!(world.instances().len(), 1, "{ask}: nothing was cut");
        // Held: not given twice.
        let second = world.bundle("c2", &config(json!({"mig.uuid": uuid}), &[]));
        let output = create(&world, &[], &second, "c2");
        assert!(code(&output) == 75 && text(&output).contains("is held by container c1"), "{}", text(&output));
        drop(init);
        assert_eq!(code(&delete(&world, "c1")), 0);
        assert_eq!((world.leases().len(), world.instances().len()), (0, 1), "{ask}: it stays");
    }
    // In use by a process that the driver lists: not idle.
    let user = Init::start();
    let gi = made["gpu_instance"].to_string();
    world.sim("hold", &["--gpu", "0", "--gi", &gi, "--pid", &user.pid().to_string()]);
    let bundle = world.bundle("c3", &config(json!({"mig.uuid": uuid}), &[]));
    let output = create(&world, &[], &bundle, "c3");
    assert!(code(&output) == 75 && text(&output).contains("in use by process"), "{}", text(&output));
    assert_eq!(world.leases().len(), 0);
}

#[test]
fn a_broken_settings_file_stops_requests_and_nothing_else() {
    let world = World::new(&["a100-sxm4-80gb"]);
    let runtime = world.recording_runtime(0);
    let (_bundle, init) = world.living("held", &config(profile("1g.10gb"), &[]));
    let good = std::fs::read_to_string(world.config()).unwrap();
    let asking = world.bundle("asking", &config(profile("1g.10gb"), &[]));
    let silent = world.bundle("silent", &config(json!({}), &[]));
    // A key that this version does not know, and no TOML at all: then the runtime must be pinned by the entry.
    let pin = ["--mig-runtime", runtime.to_str().unwrap()];
    for (own, broken) in [(&[][..], format!("{good}\n[limits]\nprofile = []\n")), (&pin[..], "state_dir = ".to_owned())]
    {
        world.write("config.toml", &broken);
        let _ = std::fs::remove_file(world.path("rt/argv"));
        let output = create(&world, own, &asking, "c1");
        assert_eq!(code(&output), 78, "{}", text(&output));
        assert!(text(&output).contains(world.config().to_str().unwrap()), "{}", text(&output));
        assert_eq!(world.recorded("argv"), None);
        assert!(!document(&asking.join("config.json")).to_string().contains("mig.lease"));
        let root = world.path("root");
        let lines: [&[&str]; 6] = [
            &["state", "held"],
            &["kill", "held", "9"],
            &["start", "held"],
            &["exec", "--process", "/nonexistent", "held"],
            &["create", "--bundle", silent.to_str().unwrap(), "c2"],
            &["delete", "held"],
        ];
        for line in lines {
            let line = [&["--root", root.to_str().unwrap()], line].concat();
            let _ = std::fs::remove_file(world.path("rt/argv"));
            let output = world.shim(&[own, &line].concat());
            assert_eq!(code(&output), 0, "{line:?}: {}", text(&output));
            let argv = world
                .recorded("argv")
                .unwrap_or_else(|| panic!("{line:?} did not reach the runtime: {}", text(&output)));
            assert_eq!(argv.lines().collect::<Vec<_>>(), line);
        }
    }
    drop(init);
    world.write("config.toml", &good);
    assert_eq!(code(&world.migctl(&["gc"])), 0);
    world.assert_clean("after gc: what was deleted meanwhile is seen");
}

#[test]
fn odd_command_lines_mean_what_they_mean_to_the_runtime() {
    let world = World::new(&["a100-sxm4-80gb"]);
    world.recording_runtime(0);
    // crun's --config, seen from the working directory; the config.json in the bundle asks for nothing.
    let bundle = world.bundle("b", &config(json!({}), &[]));
    let silent = std::fs::read(bundle.join("config.json")).unwrap();
    let b = bundle.to_str().unwrap();
    let asked = config(profile("1g.10gb"), &[]);
    let cases: [(&str, &[&str], &str); 6] = [
        ("crun --config", &["create", "--config", "other.json", "--bundle", b, "c1"], "c1"),
        ("crun --config=", &["create", "--config=other.json", "-b", b, "c1"], "c1"),
        ("crun -f", &["create", "-f", "other.json", "-b", b, "c1"], "c1"),
        ("a container named create", &["create", "-f", "other.json", "-b", b, "create"], "create"),
        ("names cut short", &["create", "--conf", "other.json", "--bund", b, "c1"], "c1"),
        ("letters together", &["run", "-dfother.json", "-b", b, "c1"], "c1"),
    ];
    let other = world.path("here/other.json");
    for (name, line, id) in cases {
        world.write("here/other.json", &asked.to_string());
        let output = run(world.shim_command(line).current_dir(world.path("here")));
        assert_eq!(code(&output), 0, "{name}: {}", text(&output));
        assert_eq!(world.recorded("argv").unwrap().lines().collect::<Vec<_>>(), line, "{name}");
        assert_eq!(world.lease()["holder"]["container"], id, "{name}");
        assert!(document(&other)["annotations"]["mig.lease"].is_string(), "{name}");
        assert_eq!(std::fs::read(bundle.join("config.json")).unwrap(), silent, "{name}");
        assert_eq!(code(&world.shim(&["delete", id])), 0, "{name}");
        world.assert_clean(name);
    }
    // Without --bundle it is the current directory.
    std::fs::write(bundle.join("config.json"), asked.to_string()).unwrap();
    let output = run(world.shim_command(&["create", "c1"]).current_dir(&bundle));
    assert_eq!(code(&output), 0, "{}", text(&output));
    assert_eq!(world.lease()["holder"]["bundle"], b);
}

#[test]
fn an_option_of_ours_that_is_misspelt_is_refused_by_name() {
    let world = World::new(&["a100-sxm4-80gb"]);
    world.recording_runtime(0);
    let bundle = world.bundle("b", &config(json!({}), &[]));
    let output = create(&world, &["--mig-envv"], &bundle, "c1");
    assert_refused(&world, &output, 64, &["--mig-envv", "--mig-env, --mig-config, --mig-runtime and --mig-job"]);
}

/// A pid file that lies there from an earlier container says nothing about the one that is being created.
#[test]
fn an_old_pid_file_neither_frees_nor_keeps_the_slice() {
    let world = World::new(&["a100-sxm4-80gb"]);
    let go = world.path("go");
    let runtime = world.script("rt/slow", &format!("while [ ! -e {} ]; do sleep 0.02; done", go.display()));
    world.settings(&format!("[runtime]\npath = \"{}\"", runtime.display()));
    let mut dead = Command::new("/bin/true").spawn().unwrap();
    dead.wait().unwrap();
    for old in [dead.id(), std::process::id()] {
        let pid_file = world.write("pid", &old.to_string());
        let bundle = world.bundle("b", &config(profile("1g.10gb"), &[]));
        let args = ["create", "--bundle", bundle.to_str().unwrap(), "--pid-file", pid_file.to_str().unwrap(), "c1"];
        let mut creating = world.shim_command(&args).spawn().unwrap();
        wait_for("the lease", Duration::from_secs(10), || world.leases().iter().any(|l| l["state"] == "active"));
        let action = world.document(&["gc"])["actions"][0].clone();
        assert_eq!(action["reason"], "its container is being created", "pid file of {old}: {action}");
        assert_eq!(world.lease()["holder"]["init"], Value::Null, "pid file of {old}");
        world.write("go", "");
        assert!(creating.wait().unwrap().success());
        // The runtime ended and wrote none: nothing was started.
        assert_eq!(world.document(&["gc"])["actions"][0]["result"], "freed", "pid file of {old}");
        world.assert_clean("after gc");
        std::fs::remove_file(&go).unwrap();
    }
}

/// `log.level` is for log lines: who held what is written down at any level.
#[test]
fn audit_lines_do_not_depend_on_the_log_level() {
    let world = World::new(&["a100-sxm4-80gb"]);
    let runtime = world.recording_runtime(0);
    let settings = std::fs::read_to_string(world.config()).unwrap().replace("[log]\n", "[log]\nlevel = \"error\"\n");
    assert!(settings.contains("level = ") && settings.contains(runtime.to_str().unwrap()), "{settings}");
    std::fs::write(world.config(), settings).unwrap();
    let journal = UnixDatagram::bind(world.path("log.sock")).unwrap();
    journal.set_nonblocking(true).unwrap();
    let (_bundle, init) = world.living("c1", &config(profile("1g.10gb"), &[]));
    drop(init);
    assert_eq!(code(&delete(&world, "c1")), 0);
    let events: Vec<Value> = world.audit().iter().map(|line| line["event"].clone()).collect();
    assert_eq!(events, ["grant", "release"]);
    let mut buffer = [0; 65536];
    let mut sent = 0;
    while journal.recv(&mut buffer).is_ok() {
        sent += 1;
    }
    assert_eq!(sent, 2, "and nothing but these at this level");
}
