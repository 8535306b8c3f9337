//! Wrong, hostile and unlucky input: a clear refusal with its exit code, nothing allocated, nothing lost.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use common::{DEMO, World, attack, binaries, config, document, feed, installed, run, skip, state, text};
use serde_json::{Value, json};

/// Exit codes, as `report::Exit`.
const BAD_REQUEST: i32 = 65;
const UNAVAILABLE: i32 = 69;
const IO: i32 = 74;
const NO_ROOM: i32 = 75;
const NOT_ALLOWED: i32 = 77;
const CONFIG: i32 = 78;

/// Most characters of a stranger's text that a message may quote.
const QUOTED: usize = 100;

fn assert_message(name: &str, message: &str) {
    let line = message.strip_suffix('\n').unwrap_or(message);
    assert!(!line.is_empty(), "{name}: no reason is given");
    let raw = line.chars().find(|c| c.is_control() || ('\u{200b}'..='\u{202e}').contains(c));
    assert_eq!(raw, None, "{name}: a raw character in {line:?}");
    for filler in ["A", "Ä", "1", "x"] {
        let long = filler.repeat(QUOTED + 1);
        assert!(!line.contains(&long), "{name}: more than {QUOTED} characters are quoted in {} bytes", line.len());
    }
    assert!(line.len() < 1500, "{name}: {} bytes of message: {line}", line.len());
}

fn assert_refusal(name: &str, output: &Output, expected: i32, words: &[&str]) {
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(expected), "{name}: {stderr}");
    for word in words {
        assert!(stderr.contains(word), "{name}: {word:?} is not in: {stderr}");
    }
    assert!(output.stdout.is_empty(), "{name}: {}", text(output));
    assert_message(name, &stderr);
}

fn create(world: &World, own: &[&str], bundle: &Path, more: &[&str], id: &str) -> Output {
    let log = world.path("log.json");
    let global = ["--log", log.to_str().unwrap(), "--log-format", "json"];
    world.shim(&[own, &global, &["create", "--bundle", bundle.to_str().unwrap()], more, &[id]].concat())
}

/// `config` is refused by the shim: the runtime is not started, the file stays byte for byte, the reason is in its log.
fn refused_by_shim(world: &World, name: &str, own: &[&str], config: &[u8], expected: i32, words: &[&str]) {
    let bundle = world.path("b");
    std::fs::create_dir_all(&bundle).unwrap();
    let _ = std::fs::remove_file(world.path("log.json"));
    std::fs::write(bundle.join("config.json"), config).unwrap();
    let output = create(world, own, &bundle, &[], "c1");
    assert_refusal(&format!("{name} (shim)"), &output, expected, words);
    assert!(std::fs::read(bundle.join("config.json")).unwrap() == config, "{name}: the config was changed");
    assert_eq!(std::fs::read_dir(&bundle).unwrap().count(), 1, "{name}: a file is left beside the config");
    assert_eq!(world.recorded("argv"), None, "{name}: the runtime was started");
    let record = document(&world.path("log.json"));
    assert_message(name, record["msg"].as_str().unwrap());
}

/// precreate as the child of a shell without stderr: a refusal is also said to the parent, which here would be this test.
fn precreate(world: &World, config: &[u8]) -> Output {
    let mut shell = Command::new("sh");
    shell.args(["-c", "exec 3>&2 2>/dev/null; sh -c 'exec \"$@\" 2>&3 3>&-' sh \"$@\"; exit $?", "sh"]);
    shell.arg(binaries().join("mig-hook")).arg("--config").arg(world.config()).arg("precreate");
    feed(&mut shell, config)
}

/// `config` is refused by both ways in.
fn refused(world: &World, name: &str, config: &[u8], expected: i32, words: &[&str]) {
    assert_refusal(&format!("{name} (precreate)"), &precreate(world, config), expected, words);
    refused_by_shim(world, name, &[], config, expected, words);
}

#[test]
fn requests_that_cannot_be_met_or_read_say_what_is_wrong_and_what_is_valid() {
    let world = World::new(&DEMO);
    world.recording_runtime(0);
    let long = "A".repeat(10_000);
    let (long_key, long_unicode) = (format!("mig.{long}"), "Ä".repeat(5_000));
    let uuid = "MIG-aca87b1e-f22b-5b07-8b5e-6bd4e1e4a3a5";
    let p = "mig.profile";
    let cases: Vec<(&str, Value, i32, Vec<&str>)> = vec![
        ("unknown profile", json!({p: "9g.90gb"}), BAD_REQUEST, vec!["9g.90gb", "1g.10gb", "7g.80gb"]),
        ("another model's profile", json!({p: "1g.5gb"}), BAD_REQUEST, vec!["1g.5gb", "1g.10gb"]),
        ("more than the machine", json!({p: "8x7g.80gb"}), BAD_REQUEST, vec!["7g.80gb"]),
        ("more than the GPU", json!({p: "8x1g.10gb", "mig.gpu": "0"}), BAD_REQUEST, vec!["1g.10gb"]),
        ("too much memory", json!({"mig.memory": "500GiB"}), BAD_REQUEST, vec!["500GiB"]),
        ("no GPU of that index", json!({p: "1g.10gb", "mig.gpu": "3"}), BAD_REQUEST, vec!["mig.gpu", "GPU 0", "GPU-"]),
        ("no such slice", json!({"mig.uuid": uuid}), BAD_REQUEST, vec![uuid]),
        ("half a profile", json!({p: "1g"}), BAD_REQUEST, vec![p, "'1g'", "1g.10gb"]),
        ("upper case", json!({p: "1G.10GB"}), BAD_REQUEST, vec!["lower case"]),
        ("compute slice", json!({p: "1c.3g.40gb"}), BAD_REQUEST, vec!["1c.3g.40gb"]),
        ("path", json!({p: "../../x"}), BAD_REQUEST, vec![p, "../../x"]),
        ("empty", json!({p: ""}), BAD_REQUEST, vec![p, "empty"]),
        ("spaces", json!({p: "   "}), BAD_REQUEST, vec![p, "empty"]),
        ("comma at the end", json!({p: "1g.10gb,"}), BAD_REQUEST, vec!["missing"]),
        ("bar in front", json!({p: "|1g.10gb"}), BAD_REQUEST, vec!["missing"]),
        ("none of them", json!({p: "0x1g.10gb"}), BAD_REQUEST, vec!["from 1 to 64"]),
        ("a thousand", json!({p: "1000x1g.10gb"}), BAD_REQUEST, vec!["from 1 to 64"]),
        ("overflow", json!({p: "99999999999999999999999x1g.10gb"}), BAD_REQUEST, vec!["from 1 to 64"]),
        ("memory without unit", json!({"mig.memory": "8"}), BAD_REQUEST, vec!["GiB"]),
        ("negative memory", json!({"mig.memory": "-8GiB"}), BAD_REQUEST, vec!["mig.memory"]),
        ("10 kB", json!({p: long}), BAD_REQUEST, vec!["10000 bytes"]),
        ("10 kB of another alphabet", json!({p: long_unicode}), BAD_REQUEST, vec!["10000 bytes"]),
        ("10 kB of a GPU", json!({p: "1g.10gb", "mig.gpu": long}), BAD_REQUEST, vec!["mig.gpu"]),
        ("10 kB of a key", json!({(long_key): "1"}), BAD_REQUEST, vec!["unknown annotation mig.A", p]),
        ("NUL", json!({p: "1g.10gb\0"}), BAD_REQUEST, vec!["control characters"]),
        ("escape sequence", json!({p: "\u{1b}[31m1g.10gb"}), BAD_REQUEST, vec!["control characters"]),
        ("two lines", json!({p: "1g.10gb\nlevel=info msg=ok"}), BAD_REQUEST, vec!["control characters"]),
        ("unicode digits", json!({p: "１g.１０gb"}), BAD_REQUEST, vec!["not plain ASCII"]),
        ("text from right to left", json!({p: "\u{202e}bg01.g1"}), BAD_REQUEST, vec!["not plain ASCII"]),
        ("escape sequence in a key", json!({"mig.\u{1b}[31m": "1"}), BAD_REQUEST, vec!["unknown annotation"]),
        ("escape sequence in a name", json!({"mig.profile/\u{1b}[31m": "1"}), BAD_REQUEST, vec!["mig.profile/"]),
        ("typo", json!({"mig.profil": "1g.10gb"}), BAD_REQUEST, vec!["mig.profil;", "valid are mig.profile"]),
        ("typo beside a good one", json!({p: "1g.10gb", "mig.gpus": "0"}), BAD_REQUEST, vec!["mig.gpus", "mig.gpu"]),
        (
            "profile and memory",
            json!({p: "1g.10gb", "mig.memory": "8GiB"}),
            BAD_REQUEST,
            vec![p, "mig.memory", "contradict"],
        ),
        ("slice and profile", json!({"mig.uuid": uuid, p: "1g.10gb"}), BAD_REQUEST, vec!["mig.uuid", p, "contradict"]),
        ("GPU alone", json!({"mig.gpu": "0"}), BAD_REQUEST, vec!["mig.gpu", "also ask for a profile"]),
    ];
    for (name, annotations, expected, words) in &cases {
        let asked = config(annotations.clone(), &["PATH=/bin"]);
        refused(&world, name, &serde_json::to_vec_pretty(&asked).unwrap(), *expected, words);
    }
    // The same through the environment, where that counts.
    let env: [(&str, Vec<&str>, Vec<&str>); 4] = [
        ("grammar", vec!["MIG_PROFILE=1g"], vec!["MIG_PROFILE", "'1g'"]),
        ("twice", vec!["MIG_PROFILE=1g.10gb", "MIG_PROFILE=2g.20gb"], vec!["MIG_PROFILE", "twice"]),
        ("two keys", vec!["MIG_PROFILE=1g.10gb", "MIG_MEMORY=8GiB"], vec!["MIG_PROFILE", "MIG_MEMORY"]),
        ("control", vec!["MIG_PROFILE=\u{1b}]0;owned\u{7}"], vec!["control characters"]),
    ];
    for (name, vars, words) in env {
        let asked = serde_json::to_vec(&config(json!({}), &vars)).unwrap();
        refused_by_shim(&world, name, &["--mig-env"], &asked, BAD_REQUEST, &words);
    }
    world.assert_clean("after refusals only");
}

#[test]
fn every_refusal_is_one_audit_line() {
    let world = World::new(&["a100-sxm4-80gb"]);
    world.recording_runtime(0);
    let p = "mig.profile";
    for annotations in
        [json!({p: "1g.5gb"}), json!({p: "9x1g.10gb"}), json!({p: "1g"}), json!({"mig.profil": "1g.10gb"})]
    {
        let bundle = world.bundle("b", &config(annotations.clone(), &[]));
        let output = create(&world, &[], &bundle, &[], "c1");
        assert!(!output.status.success());
        let audit = world.audit();
        assert_eq!(audit.len(), 1, "{annotations}: {audit:#?}");
        assert_eq!((&audit[0]["event"], &audit[0]["container"]), (&json!("refusal"), &json!("c1")), "{audit:#?}");
        assert!(!audit[0]["reason"].as_str().unwrap().is_empty());
        std::fs::remove_file(world.path("audit.jsonl")).unwrap();
    }
}

#[test]
fn configs_that_cannot_be_read_are_refused_and_stay_as_they_are() {
    let world = World::new(&["a100-sxm4-80gb"]);
    world.recording_runtime(0);
    let asks = r#""annotations":{"mig.profile":"1g.10gb"},"process":{"env":[]},"linux":{"cgroupsPath":"/none"}"#;
    let long = "A".repeat(10_000);
    let deep = format!("{{{asks},\"x\":{}{}}}", "[".repeat(50_000), "]".repeat(50_000));
    let cases: Vec<(&str, String, i32, Vec<&str>)> = vec![
        ("empty", String::new(), BAD_REQUEST, vec!["not valid JSON"]),
        ("half", format!("{{{asks}"), BAD_REQUEST, vec!["not valid JSON"]),
        ("two documents", format!("{{{asks}}} {{}}"), BAD_REQUEST, vec!["not valid JSON"]),
        ("nested for ever", deep, BAD_REQUEST, vec!["not valid JSON", "recursion limit"]),
        ("too large", format!("{{{asks},\"x\":\"{}\"}}", "y".repeat(17 << 20)), BAD_REQUEST, vec!["larger than"]),
        ("a key twice", format!("{{{asks},\"linux\":{{}}}}"), BAD_REQUEST, vec!["\"linux\" is there twice"]),
        (
            "annotations twice",
            format!("{{{asks},\"annotations\":{{\"mig.profile\":\"1g.10gb\"}}}}"),
            BAD_REQUEST,
            vec!["\"annotations\" is there twice"],
        ),
        (
            "another case",
            format!("{{{asks},\"Linux\":{{}}}}"),
            BAD_REQUEST,
            vec!["\"Linux\" is a case variant of \"linux\""],
        ),
        (
            "another case, deeper",
            format!("{{{asks},\"hooks\":{{\"Poststop\":[]}}}}"),
            BAD_REQUEST,
            vec!["\"Poststop\"", "\"poststop\""],
        ),
        ("a long key twice", format!("{{{asks},\"{long}\":1,\"{long}\":2}}"), BAD_REQUEST, vec!["is there twice"]),
        (
            "an escape sequence twice",
            format!("{{{asks},\"\\u001b[31m\":1,\"\\u001b[31m\":2}}"),
            BAD_REQUEST,
            vec!["is there twice"],
        ),
        ("no process", format!("{{{}}}", asks.replace("process", "x")), BAD_REQUEST, vec!["process"]),
        ("env of another kind", format!("{{{}}}", asks.replace("[]", "{}")), BAD_REQUEST, vec!["process.env"]),
        (
            "devices of another kind",
            format!("{{{}}}", asks.replace("\"/none\"", "\"/none\",\"devices\":7")),
            BAD_REQUEST,
            vec!["devices is not an array"],
        ),
    ];
    for (name, config, expected, words) in &cases {
        refused(&world, name, config.as_bytes(), *expected, words);
    }
    // To precreate that is a container without a cgroup.
    let linux = br#"{"annotations":{"mig.profile":"1g.10gb"},"process":{},"linux":[]}"#;
    refused_by_shim(&world, "linux of another kind", &[], linux, BAD_REQUEST, &["linux"]);
    refused(&world, "no text", b"{\"annotations\":{\"mig.profile\":\"\xff\"}}", BAD_REQUEST, &["not valid JSON"]);
    world.assert_clean("after refusals only");
}

#[test]
fn a_config_that_is_missing_or_no_file_is_named() {
    let world = World::new(&["a100-sxm4-80gb"]);
    world.recording_runtime(0);
    std::fs::create_dir_all(world.path("empty")).unwrap();
    std::fs::create_dir_all(world.path("dir/config.json")).unwrap();
    for bundle in ["empty", "dir", "nowhere"] {
        let output = create(&world, &[], &world.path(bundle), &[], "c1");
        let named = world.path(bundle).join("config.json");
        assert_refusal(bundle, &output, IO, &[named.to_str().unwrap(), "--bundle"]);
        assert_eq!(world.recorded("argv"), None);
    }
    let bundle = world.bundle("b", &config(json!({"mig.profile": "1g.10gb"}), &[]));
    let output = create(&world, &[], &bundle, &["--config", "other.json"], "c1");
    assert_refusal("--config", &output, IO, &["other.json"]);
    world.assert_clean("after refusals only");
}

#[test]
fn an_unknown_field_is_no_mistake() {
    let world = World::new(&["a100-sxm4-80gb"]);
    world.recording_runtime(0);
    let mut asked = config(json!({"mig.profile": "1g.10gb"}), &[]);
    asked["linux"]["newField"] = json!({"a": [1e3, -0.0, 18446744073709551615_u64], "": null});
    asked["linux"]["resources"]["unified"] = json!({"memory.max": "1"});
    let bundle = world.bundle("b", &asked);
    assert!(create(&world, &[], &bundle, &[], "c1").status.success());
    let edited = document(&bundle.join("config.json"));
    for at in ["/x-future", "/linux/newField", "/linux/resources/unified", "/root", "/linux/namespaces"] {
        assert_eq!(edited.pointer(at).unwrap().to_string(), asked.pointer(at).unwrap().to_string(), "{at}");
    }
}

#[test]
fn container_ids_that_are_no_plain_names_are_refused() {
    let world = World::new(&["a100-sxm4-80gb"]);
    world.recording_runtime(0);
    let bundle = world.bundle("b", &config(json!({"mig.profile": "1g.10gb"}), &[]));
    let before = std::fs::read(bundle.join("config.json")).unwrap();
    let long = "A".repeat(10_000);
    for id in ["a/b", "..", ".", "../../../etc/x", "/abs", "a b", "", "ä", "\u{1b}[31m", "two\nlines", &long] {
        let output = create(&world, &[], &bundle, &[], id);
        assert_refusal(id, &output, NOT_ALLOWED, &["container id", "plain name"]);
    }
    let output = world.shim(&["create", "--bundle", bundle.to_str().unwrap()]);
    assert_refusal("no id", &output, NOT_ALLOWED, &["container id"]);
    assert_eq!(std::fs::read(bundle.join("config.json")).unwrap(), before);
    assert_eq!(world.recorded("argv"), None);
    world.assert_clean("after refusals only");
    let inside: Vec<PathBuf> =
        std::fs::read_dir(world.path("state").parent().unwrap()).unwrap().map(|e| e.unwrap().path()).collect();
    assert!(inside.iter().all(|p| !p.ends_with("x")), "{inside:?}");
}

#[test]
fn a_hostile_state_is_refused_in_a_clean_sentence() {
    let world = World::new(&["a100-sxm4-80gb"]);
    let long = "A".repeat(10_000);
    let token = "0123456789abcdef0123456789abcdef";
    let hostile = |field: &str, value: Value| {
        let mut state: Value = serde_json::from_slice(&state("c1", 1, &world.path("b"))).unwrap();
        state[field] = value;
        state.to_string().into_bytes()
    };
    let states = [
        ("id with control characters", hostile("id", json!("\u{1b}[31m"))),
        ("10 kB of id", hostile("id", json!(long))),
        ("status with control characters", hostile("status", json!("\u{1b}[31mcreated"))),
        ("10 kB of status", hostile("status", json!(long))),
        ("10 kB of pid", hostile("pid", json!(long))),
        ("negative pid", hostile("pid", json!(-5))),
        ("annotations of another kind", hostile("annotations", json!({"a": [long]}))),
        ("17 MB", hostile("x", json!("y".repeat(17 << 20)))),
    ];
    for (name, state) in states {
        attack(&format!("a State with {name}"));
        let output = world.hook(&["createRuntime", "--lease", token], &state);
        assert!(output.status.code().is_some_and(|c| c != 0), "{name}: {}", text(&output));
        assert_message(name, &String::from_utf8_lossy(&output.stderr));
    }
}

/// Unmounts when dropped.
struct Mount(PathBuf);

impl Mount {
    fn tmpfs(at: &Path, size: &str) -> Option<Mount> {
        let options = format!("size={size}");
        let output = Command::new("mount").args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(at).output().ok()?;
        output.status.success().then(|| Mount(at.to_owned()))
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}

#[test]
fn a_bundle_that_cannot_be_written_keeps_its_config_and_the_slice_is_given_back() {
    let world = World::new(&["a100-sxm4-80gb"]);
    world.recording_runtime(0);
    let bundle = world.path("b");
    std::fs::create_dir_all(&bundle).unwrap();
    let Some(mount) = Mount::tmpfs(&bundle, "4k") else {
        return skip("bad_input: full disk", "a tmpfs can't be mounted here");
    };
    let path = bundle.join("config.json");
    let before = config(json!({"mig.profile": "1g.10gb"}), &[]).to_string();
    let _ = std::fs::write(&path, &before);
    for (name, options, word) in
        [("full disk", "remount,size=4k", "No space left"), ("read-only", "remount,ro", "Read-only")]
    {
        assert!(Command::new("mount").args(["-o", options]).arg(&mount.0).status().unwrap().success());
        let output = create(&world, &[], &bundle, &[], "c1");
        assert_refusal(
            name,
            &output,
            IO,
            &["cannot rewrite", path.to_str().unwrap(), "the original is untouched", word],
        );
        assert_eq!(std::fs::read_to_string(&path).unwrap(), before, "{name}");
        assert_eq!(std::fs::read_dir(&bundle).unwrap().count(), 1, "{name}");
        assert_eq!(world.recorded("argv"), None);
        world.assert_clean(name);
    }
}

#[test]
fn a_full_state_directory_refuses_before_anything_is_cut() {
    let world = World::new(&["a100-sxm4-80gb"]);
    world.recording_runtime(0);
    let dir = world.path("state");
    std::fs::create_dir_all(&dir).unwrap();
    let Some(_mount) = Mount::tmpfs(&dir, "4k") else {
        return skip("bad_input: full state directory", "a tmpfs can't be mounted here");
    };
    std::fs::set_permissions(&dir, std::fs::Permissions::from_mode(0o700)).unwrap();
    std::fs::write(dir.join("filler"), [0; 4096]).unwrap();
    let asked = config(json!({"mig.profile": "1g.10gb"}), &[]).to_string();
    refused(&world, "full state", asked.as_bytes(), IO, &[dir.to_str().unwrap(), "No space left"]);
    assert_eq!(world.instances(), Vec::<Value>::new());
    std::fs::remove_file(dir.join("filler")).unwrap();
    world.assert_clean("after refusals only");
}

#[test]
fn a_machine_that_can_not_serve_says_what_is_missing() {
    let asked = config(json!({"mig.profile": "1g.10gb"}), &[]).to_string();
    let check = |world: &World, name: &str, expected: i32, words: &[&str]| {
        world.recording_runtime(0);
        refused(world, name, asked.as_bytes(), expected, words);
        assert_eq!(world.leases(), Vec::<Value>::new(), "{name}");
    };
    let world = World::new(&["a100-sxm4-80gb"]);
    let library = world.path("m/usr/lib/libnvidia-ml.so.1");
    let away = world.path("away");
    std::fs::rename(&library, &away).unwrap();
    check(&world, "no driver", UNAVAILABLE, &["libnvidia-ml.so.1", "driver"]);
    std::fs::write(&library, "not a library").unwrap();
    check(&world, "a broken library", UNAVAILABLE, &[library.to_str().unwrap()]);
    std::fs::rename(&away, &library).unwrap();

    let devices = world.path("m/proc/devices");
    let kept = std::fs::read(&devices).unwrap();
    std::fs::remove_file(&devices).unwrap();
    check(&world, "no /proc/devices", UNAVAILABLE, &[devices.to_str().unwrap(), "driver"]);
    std::fs::write(&devices, "Character devices:\n  1 mem\n").unwrap();
    check(&world, "module not loaded", UNAVAILABLE, &[devices.to_str().unwrap(), "modprobe nvidia"]);
    std::fs::write(&devices, "Character devices:\n195 nvidia\n236 nvidia-caps\n").unwrap();
    check(&world, "no nvidia-uvm", UNAVAILABLE, &["nvidia-uvm", "modprobe nvidia-uvm"]);
    std::fs::write(&devices, kept).unwrap();
    world.assert_clean("without its files");

    world.sim("fault", &["--call", "nvmlInit*", "--times", "forever", "--fail", "DRIVER_NOT_LOADED"]);
    check(&world, "driver not loaded", UNAVAILABLE, &["driver"]);
    world.sim("clear-faults", &[]);
    world.sim("fault", &["--call", "nvmlDeviceCreateGpuInstance*", "--times", "forever", "--fail", "NO_PERMISSION"]);
    check(&world, "no permission from the driver", NOT_ALLOWED, &["root"]);
    world.sim("clear-faults", &[]);
    world.assert_clean("after faults");

    check(&World::with(&DEMO, &["--mig", "off"]), "MIG off", BAD_REQUEST, &["MIG mode off", "migctl mode on 0"]);
    let pending = World::with(&["a100-sxm4-80gb"], &["--mig", "off"]);
    pending.sim("mode", &["--gpu", "0", "on"]);
    check(&pending, "MIG pending", BAD_REQUEST, &["after a reset", "nvidia-smi --gpu-reset -i 0"]);
    let mixed = World::new(&["a100-sxm4-80gb", "h100-sxm-80gb"]);
    mixed.sim("mode", &["--gpu", "1", "off"]);
    let asked = config(json!({"mig.profile": "1g.10gb", "mig.gpu": "1"}), &[]).to_string();
    mixed.recording_runtime(0);
    refused(&mixed, "MIG off on the GPU that is asked for", asked.as_bytes(), BAD_REQUEST, &["GPU 1", "MIG"]);
    mixed.assert_clean("after refusals only");
}

#[test]
fn a_full_machine_names_the_holders_and_touches_nobody() {
    let world = World::new(&["a100-sxm4-80gb"]);
    world.recording_runtime(0);
    let (_bundle, _init) = world.living("trainer", &config(json!({"mig.profile": "7g.80gb"}), &[]));
    std::fs::remove_file(world.path("rt/argv")).unwrap();
    let asked = config(json!({"mig.profile": "1g.10gb"}), &[]).to_string();
    refused(&world, "full", asked.as_bytes(), NO_ROOM, &["1g.10gb", "container trainer"]);
    assert_eq!((world.leases().len(), world.instances().len()), (1, 1));
}

#[test]
fn an_ordinary_user_is_told_that_root_is_needed() {
    if !installed("setpriv") {
        return skip("bad_input: no permission", "setpriv is not installed");
    }
    let world = World::new(&["a100-sxm4-80gb"]);
    world.recording_runtime(0);
    std::fs::set_permissions(world.config().parent().unwrap(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let bundle = world.bundle("b", &config(json!({"mig.profile": "1g.10gb"}), &[]));
    let before = std::fs::read(bundle.join("config.json")).unwrap();
    let user = ["--reuid", "65534", "--regid", "65534", "--clear-groups"];
    if !run(Command::new("setpriv").args(user).arg(binaries().join("migctl")).arg("--help")).status.success() {
        return skip("bad_input: no permission", "uid 65534 can't run our binaries here");
    }
    let shim = world.shim_command(&["create", "--bundle", bundle.to_str().unwrap(), "c1"]);
    for made in [false, true] {
        if made {
            std::fs::create_dir_all(world.path("state")).unwrap();
            std::fs::set_permissions(world.path("state"), std::fs::Permissions::from_mode(0o700)).unwrap();
        }
        let mut list = Command::new("setpriv");
        list.args(user).arg(binaries().join("migctl")).arg("--config").arg(world.config()).arg("list");
        let listed = text(&run(&mut list));
        assert!(listed.contains("are shown to root only"), "{listed}");
        let output = run(Command::new("setpriv").args(user).arg(shim.get_program()).args(shim.get_args()));
        assert_refusal("as nobody", &output, NOT_ALLOWED, &[world.path("state").to_str().unwrap(), "root"]);
        assert_eq!(std::fs::read(bundle.join("config.json")).unwrap(), before);
        assert_eq!(world.recorded("argv"), None);
    }
    world.assert_clean("after refusals only");
}

#[test]
fn state_that_is_not_understood_is_left_alone() {
    let world = World::new(&["a100-sxm4-80gb"]);
    world.recording_runtime(0);
    let (_bundle, init) = world.living("c1", &config(json!({"mig.profile": "1g.10gb"}), &[]));
    std::fs::remove_file(world.path("rt/argv")).unwrap();
    let token = world.lease()["token"].as_str().unwrap().to_owned();
    drop(init); // its slice could be freed, were the state understood
    let record = world.path(&format!("state/leases/{token}.json"));
    let good = std::fs::read_to_string(&record).unwrap();
    let asked = config(json!({"mig.profile": "1g.10gb"}), &[]).to_string();
    let mut newer = document(&record);
    newer["version"] = json!(9);
    let mut more = document(&record);
    more["x-unknown"] = json!(1);
    let cases = [
        ("a newer version", newer.to_string(), "version 9"),
        ("no version", "{}".to_owned(), "no version"),
        ("a field that is not known", more.to_string(), "x-unknown"),
        ("half a record", good[..good.len() / 2].to_owned(), token.as_str()),
        ("an empty record", String::new(), token.as_str()),
    ];
    for (name, text, word) in cases {
        std::fs::write(&record, &text).unwrap();
        refused(&world, name, asked.as_bytes(), IO, &[record.to_str().unwrap(), "nothing was touched", word]);
        for verb in ["gc", "leases"] {
            let output = world.migctl(&[verb]);
            assert_refusal(&format!("{name}, migctl {verb}"), &output, IO, &["nothing was touched"]);
        }
        assert_eq!(std::fs::read_to_string(&record).unwrap(), text, "{name}");
        assert_eq!(world.instances().len(), 1, "{name}: the slice stays");
    }
    std::fs::write(&record, good).unwrap();
    assert_eq!(world.migctl(&["gc"]).status.code(), Some(0));
    world.assert_clean("after gc with the state put right");
}

#[test]
fn a_state_directory_that_others_could_change_is_refused() {
    let world = World::new(&["a100-sxm4-80gb"]);
    world.recording_runtime(0);
    let dir = world.path("state");
    std::fs::create_dir_all(&dir).unwrap();
    let asked = config(json!({"mig.profile": "1g.10gb"}), &[]).to_string();
    for mode in [0o755, 0o770, 0o777] {
        std::fs::set_permissions(&dir, std::fs::Permissions::from_mode(mode)).unwrap();
        refused(&world, "mode", asked.as_bytes(), IO, &[dir.to_str().unwrap(), "0700", &format!("{mode:04o}")]);
    }
    std::fs::remove_dir_all(&dir).unwrap();
    std::fs::write(&dir, "").unwrap();
    refused(&world, "a file in its place", asked.as_bytes(), IO, &[dir.to_str().unwrap()]);
    std::fs::remove_file(&dir).unwrap();
    world.assert_clean("after refusals only");
}

#[test]
fn settings_that_are_wrong_are_refused_by_name() {
    let world = World::new(&["a100-sxm4-80gb"]);
    world.recording_runtime(0);
    let good = std::fs::read_to_string(world.config()).unwrap();
    let asked = config(json!({"mig.profile": "1g.10gb"}), &[]).to_string();
    let file = world.config();
    let file = file.to_str().unwrap();
    let cases = [
        ("typo", "[limits]\nprofile = []", "nearest valid one is limits.profiles"),
        ("unknown table", "[drivers]\nx = 1", "nearest valid one is driver."),
        ("wrong kind", "[limits]\nprofiles = 3", "profiles"),
        ("unknown policy", "[placement]\npolicy = \"best\"", "scc"),
        ("relative path", "[slices]\nforeign = \"maybe\"", "idle"),
        ("no TOML", "[limits", "config.toml"),
    ];
    for (name, more, word) in cases {
        world.write("config.toml", &format!("{good}\n{more}\n"));
        refused(&world, name, asked.as_bytes(), CONFIG, &[file, word]);
        assert_refusal(name, &world.migctl(&["gc"]), CONFIG, &[file, word]);
    }
    world.write("config.toml", &good);
    std::fs::set_permissions(world.config(), std::fs::Permissions::from_mode(0o666)).unwrap();
    refused(&world, "writable by others", asked.as_bytes(), CONFIG, &[file, "0666", "0644"]);
    std::fs::set_permissions(world.config(), std::fs::Permissions::from_mode(0o644)).unwrap();
    std::fs::rename(world.config(), world.path("away")).unwrap();
    refused_by_shim_without_settings(&world, asked.as_bytes(), file);
    std::fs::rename(world.path("away"), world.config()).unwrap();
    assert!(!world.path("state").exists(), "nothing was touched");
}

fn refused_by_shim_without_settings(world: &World, asked: &[u8], file: &str) {
    let output = precreate(world, asked);
    assert_refusal("a file that is named and missing", &output, CONFIG, &[file, "cannot read the settings file"]);
    refused_by_shim(world, "a file that is named and missing", &[], asked, CONFIG, &[file]);
}
