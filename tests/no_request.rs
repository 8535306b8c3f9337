//! A container that asks for nothing costs nothing and notices nothing: shown by strace, and by comparing what the low-level
//! runtime gets with what it gets without us.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::path::Path;
use std::process::{Command, Output};

use common::{World, binaries, config, feed, installed, run, skip, text};
use serde_json::{Value, json};

/// Program calls that succeeded, and every open and lock, of a traced command.
struct Trace {
    execs: Vec<String>,
    lines: Vec<String>,
}

fn trace(world: &World, command: &Command) -> (Output, Trace) {
    let file = world.path("strace");
    let mut traced = Command::new("strace");
    traced.args(["-f", "-qq", "-s", "4096", "-o"]).arg(&file);
    traced.args([
        "-e",
        "trace=execve,execveat,open,openat,openat2,creat,flock,fcntl,clone,clone3,fork,vfork,connect,sendto",
    ]);
    traced.arg(command.get_program()).args(command.get_args());
    traced.current_dir(command.get_current_dir().unwrap_or(Path::new("/")));
    let output = run(&mut traced);
    let text = std::fs::read_to_string(&file).unwrap();
    let lines: Vec<String> = text.lines().map(str::to_owned).collect();
    let execs = lines.iter().filter(|l| l.contains("execve") && l.ends_with("= 0")).cloned().collect();
    (output, Trace { execs, lines })
}

/// Configs that ask for nothing through a runtime entry without `--mig-env`.
fn silent_configs() -> Vec<(&'static str, Value)> {
    vec![
        ("no annotation", config(json!({}), &["PATH=/bin"])),
        ("annotations null", config(Value::Null, &["PATH=/bin"])),
        ("other annotations", config(json!({"migrate": "yes", "x.mig.profile": "1g.10gb"}), &[])),
        ("an image's ENV", config(json!({}), &["MIG_PROFILE=1g.10gb", "NVIDIA_VISIBLE_DEVICES=all"])),
        (
            "a Kubernetes sandbox",
            config(json!({"mig.profile": "1g.10gb", "io.kubernetes.cri.container-type": "sandbox"}), &[]),
        ),
        (
            "a CRI-O sandbox",
            config(json!({"mig.profile": "1g.10gb", "io.kubernetes.cri-o.ContainerType": "sandbox"}), &[]),
        ),
    ]
}

/// Rust's own start-up, which our binaries do without, puts /dev/null in the place of closed standard descriptors.
#[test]
fn closed_standard_descriptors_never_become_a_lease_or_the_driver() {
    let world = World::new(&["a100-sxm4-80gb"]);
    world.recording_runtime(0);
    let bundle = world.bundle("b", &config(json!({"mig.profile": "1g.10gb"}), &[]));
    let trace = world.path("trace");
    let shim = binaries().join("mig-runtime");
    if !installed("strace") {
        return skip("closed_standard_descriptors_never_become_a_lease_or_the_driver", "strace is not installed");
    }
    let script = format!(
        "exec strace -f -e trace=openat,open -o {} {} --mig-config {} create --bundle {} c1 <&- >&- 2>&-",
        trace.display(),
        shim.display(),
        world.config().display(),
        bundle.display()
    );
    let status = Command::new("/bin/sh").args(["-c", &script]).status().unwrap();
    assert!(status.success());
    let traced = std::fs::read_to_string(&trace).unwrap();
    let low = |line: &&str| [" = 0", " = 1", " = 2"].iter().any(|end| line.ends_with(end));
    let runtime = world.path("rt").display().to_string();
    let ours: Vec<&str> = traced.lines().take_while(|line| !line.contains(&runtime)).collect();
    assert!(ours.iter().any(|line| line.contains("libnvidia-ml")), "the trace shows nothing: {traced}");
    // The loader of a dynamic program opens and closes its libraries before any code of ours runs.
    let loader = |line: &str| ["ld.so.cache", "libc.so", "libgcc_s.so", "libm.so"].iter().any(|lib| line.contains(lib));
    let taken: Vec<&&str> = ours.iter().filter(|l| low(l) && !l.contains("/dev/null") && !loader(l)).collect();
    assert!(taken.is_empty(), "{taken:#?}");
}

#[test]
fn without_a_request_the_shim_is_one_execve_and_touches_nothing() {
    if !installed("strace") {
        return skip("no_request: strace", "strace is not installed");
    }
    let world = World::new(&["a100-sxm4-80gb"]);
    world.settings("[runtime]\npath = \"/bin/true\"");
    let bundle = world.bundle("b", &config(json!({}), &["MIG_PROFILE=1g.10gb"]));
    let b = bundle.to_str().unwrap();
    let before = std::fs::read(bundle.join("config.json")).unwrap();
    let lines: [&[&str]; 8] = [
        &["--root", "/r", "create", "--bundle", b, "--pid-file", "/p", "c1"],
        &["--root", "/r", "run", "-b", b, "c1"],
        &["--root", "/r", "start", "c1"],
        &["--root", "/r", "state", "c1"],
        &["--root", "/r", "kill", "c1", "15"],
        &["--root", "/r", "delete", "--force", "c1"],
        &["--root", "/r", "exec", "--process", "/p", "c1"],
        &["--version"],
    ];
    for line in lines {
        let (output, trace) = trace(&world, &world.shim_command(line));
        assert!(output.status.success(), "{line:?}: {}", text(&output));
        assert_eq!(trace.execs.len(), 2, "ourselves and the runtime: {:#?}", trace.execs);
        let argv: Vec<String> = [&["/bin/true"], line].concat().iter().map(|w| format!("\"{w}\"")).collect();
        let expected = format!("execve(\"/bin/true\", [{}]", argv.join(", "));
        assert!(trace.execs[1].contains(&expected), "{expected} is not {}", trace.execs[1]);
        for line in &trace.lines {
            let bad = [
                "libnvidia",
                "/state/",
                "flock(",
                "F_SETLK",
                "O_CREAT",
                "O_WRONLY",
                "O_RDWR",
                "clone",
                "fork",
                "sendto",
            ];
            assert!(!bad.iter().any(|b| line.contains(b)), "{line}");
        }
    }
    assert_eq!(std::fs::read(bundle.join("config.json")).unwrap(), before);
    assert!(!world.path("state").exists(), "not even the state directory is made");
}

#[test]
fn a_config_that_asks_for_nothing_stays_as_it_is_byte_for_byte() {
    let world = World::new(&["a100-sxm4-80gb"]);
    world.probing_runtime(0);
    for (name, config) in silent_configs() {
        let bundle = world.bundle("b", &config);
        let path = bundle.join("config.json");
        let before = std::fs::read(&path).unwrap();
        for verb in ["create", "run"] {
            let output = world.shim(&[verb, "--bundle", bundle.to_str().unwrap(), "c1"]);
            assert!(output.status.success() && output.stderr.is_empty(), "{name}: {}", text(&output));
            assert_eq!(std::fs::read(&path).unwrap(), before, "{name}");
            assert!(world.recorded("cmdline").is_some_and(|argv| argv.contains(verb)), "{name}: the runtime ran");
        }
    }
    assert!(!world.path("state").exists());
    assert!(world.audit().is_empty());
}

#[test]
fn a_key_for_another_container_of_the_pod_costs_neither_lock_nor_gpu() {
    let world = World::new(&["a100-sxm4-80gb"]);
    world.probing_runtime(0);
    let pod = json!({"mig.profile/train": "1g.10gb", "io.kubernetes.cri.container-name": "sidecar"});
    let bundle = world.bundle("b", &config(pod, &[]));
    let before = std::fs::read(bundle.join("config.json")).unwrap();
    let output = world.shim(&["create", "--bundle", bundle.to_str().unwrap(), "c1"]);
    assert!(output.status.success(), "{}", text(&output));
    assert_eq!(std::fs::read(bundle.join("config.json")).unwrap(), before);
    assert!(!world.path("state").exists());
}

#[test]
fn duplicate_keys_without_a_request_are_the_runtimes_business() {
    let world = World::new(&["a100-sxm4-80gb"]);
    world.probing_runtime(0);
    let odd = r#"{"ociVersion":"1.0.2","process":{"env":[]},"annotations":{"a":"1"},"annotations":{"b":"2"},"Linux":{},"x":1,"x":2}"#;
    let path = world.write("b/config.json", odd);
    let output = world.shim(&["create", "--bundle", world.path("b").to_str().unwrap(), "c1"]);
    assert!(output.status.success(), "{}", text(&output));
    assert_eq!(std::fs::read_to_string(path).unwrap(), odd);
    assert!(world.recorded("cmdline").is_some());
    let output = world.hook(&["precreate"], odd.as_bytes());
    assert_eq!((output.status.code(), String::from_utf8_lossy(&output.stdout).as_ref()), (Some(0), odd));
}

#[test]
fn precreate_without_a_request_returns_the_very_bytes() {
    let world = World::new(&["a100-sxm4-80gb"]);
    let spaced =
        b" {\n\t\"ociVersion\" : \"1.0.2\",\"x\":1.50, \"process\":{\"env\":[\"MIG_PROFILE=1g.10gb\"]}}\n\n".to_vec();
    for bytes in [spaced, serde_json::to_vec(&config(json!({"run.oci.keep": "1"}), &[])).unwrap()] {
        let output = world.hook(&["precreate"], &bytes);
        assert!(output.status.success() && output.stderr.is_empty(), "{}", text(&output));
        assert_eq!(String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&bytes));
    }
    assert!(!world.path("state").exists());
}

/// What a probing runtime saw, less what differs from process to process.
fn seen(world: &World) -> [String; 3] {
    let of = |what| world.recorded(what).unwrap_or_else(|| panic!("the runtime was not started: no {what}"));
    let signals: Vec<String> = of("status")
        .lines()
        .filter(|l| ["SigBlk", "SigIgn", "SigCgt", "Umask", "NoNewPrivs", "CapEff"].iter().any(|k| l.starts_with(k)))
        .map(str::to_owned)
        .collect();
    [of("cmdline"), of("environ"), signals.join("\n")]
}

/// Runs `command` behind a wrapper such as `env --ignore-signal=PIPE`.
fn behind(wrapper: &[&str], command: &Command) -> Command {
    let mut wrapped = Command::new(wrapper[0]);
    wrapped.args(&wrapper[1..]).arg(command.get_program()).args(command.get_args());
    wrapped
        .env_clear()
        .env("PATH", "/usr/bin:/bin")
        .env("ODD", "two\nlines=ä")
        .env("LD_BIND_NOW", "1")
        .env("EMPTY", "");
    wrapped
}

#[test]
fn the_runtime_notices_no_difference() {
    let world = World::new(&["a100-sxm4-80gb"]);
    let runtime = world.probing_runtime(7);
    let bundle = world.bundle("b", &config(json!({}), &[]));
    let line = ["--root", "/r", "--log", "/nonexistent/l", "create", "--bundle", bundle.to_str().unwrap(), "c 1", ""];
    let wrappers: [&[&str]; 5] = [
        &["env"],
        &["env", "--ignore-signal=PIPE"],
        &["env", "--default-signal=PIPE"],
        &["env", "--block-signal=USR1,PIPE,TERM"],
        &["sh", "-c", "umask 077; exec \"$@\"", "sh"],
    ];
    for wrapper in wrappers {
        let mut plain = Command::new(&runtime);
        plain.args(line);
        let output = run(&mut behind(wrapper, &plain));
        assert_eq!(output.status.code(), Some(7));
        let without = seen(&world);
        std::fs::remove_file(world.path("rt/pid")).unwrap();
        let mut command = behind(wrapper, &world.shim_command(&line));
        let child = command.stdin(std::process::Stdio::null()).stdout(std::process::Stdio::piped());
        let child = child.stderr(std::process::Stdio::piped()).spawn().unwrap();
        let pid = child.id();
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(7), "{wrapper:?}: {}", text(&output));
        assert_eq!(seen(&world), without, "{wrapper:?}");
        assert_eq!(world.recorded("pid").unwrap().trim(), pid.to_string(), "the process stays the same");
    }
    assert!(!world.path("state").exists());
}

#[test]
fn descriptors_reach_the_runtime_only_when_passed_on_purpose() {
    let world = World::new(&["a100-sxm4-80gb"]);
    world.probing_runtime(0);
    for (name, request) in [("plain", json!({})), ("leased", json!({"mig.profile": "1g.10gb"}))] {
        let cases: [(&[&str], &str, &[&str]); 5] = [
            (&["create"], "", &[]),
            (&["create", "--preserve-fds", "1"], "", &["3"]),
            (&["create", "--preserve-fds=2"], "", &["3", "4"]),
            (&["create"], "2", &["3", "4"]),
            (&["create", "--preserve-fds", "3"], "2", &["3", "4", "7"]),
        ];
        for (n, (verb, listen, kept)) in cases.into_iter().enumerate() {
            let bundle = world.bundle(&format!("{name}{n}"), &config(request.clone(), &[]));
            let id = format!("{name}{n}");
            let line = [verb, &["--bundle", bundle.to_str().unwrap(), &id]].concat();
            let shim = world.shim_command(&line);
            let mut command = Command::new("sh");
            command
                .args(["-c", "exec 3</ 4</ 7</ 9</; exec \"$@\"", "sh"])
                .arg(shim.get_program())
                .args(shim.get_args());
            if !listen.is_empty() {
                command.env("LISTEN_FDS", listen);
            }
            let output = run(&mut command);
            assert!(output.status.success(), "{}", text(&output));
            let fds = world.recorded("fd").unwrap();
            // From 10 on they are the shell's own.
            let above: Vec<&str> = fds.lines().filter(|fd| fd.len() == 1 && !["0", "1", "2"].contains(fd)).collect();
            assert_eq!(above, kept, "{name} {line:?} LISTEN_FDS={listen}: {fds:?}");
        }
    }
}

#[test]
fn a_container_that_asks_is_seen_by_the_same_means() {
    if !installed("strace") {
        return skip("no_request: strace of a request", "strace is not installed");
    }
    let world = World::new(&["a100-sxm4-80gb"]);
    world.settings("[runtime]\npath = \"/bin/true\"");
    let bundle = world.bundle("b", &config(json!({"mig.profile": "1g.10gb"}), &[]));
    let (output, trace) = trace(&world, &world.shim_command(&["create", "--bundle", bundle.to_str().unwrap(), "c1"]));
    assert!(output.status.success(), "{}", text(&output));
    assert_eq!(trace.execs.len(), 3, "ourselves, the engine, the runtime: {:#?}", trace.execs);
    assert!(trace.execs[1].contains("mig-engine\", [\"mig-engine\", \"shim\""), "{}", trace.execs[1]);
    for sign in ["libnvidia-ml.so.1", "flock(", "/state/lock", "O_CREAT"] {
        assert!(trace.lines.iter().any(|l| l.contains(sign)), "the checks above would not see {sign}");
    }
}

/// Registered for every container (containerd's base_runtime_spec), the hook reads the State and that is all: alone in its
/// directory it could start no engine.
#[test]
fn a_hook_for_every_container_ends_in_its_first_stage() {
    let world = World::new(&["a100-sxm4-80gb"]);
    world.write("config.toml", "this is no settings file");
    let alone = world.path("alone");
    std::fs::create_dir(&alone).unwrap();
    std::fs::copy(binaries().join("mig-hook"), alone.join("mig-hook")).unwrap();
    let hook = |stage: &str, annotations: &Value| {
        let state = json!({"ociVersion": "1.0.2", "id": "c1", "pid": 1, "bundle": "/b", "annotations": annotations});
        let mut command = Command::new(alone.join("mig-hook"));
        command.arg("--config").arg(world.config()).arg(stage);
        feed(&mut command, format!("{state:#}\n").as_bytes())
    };
    for stage in ["createRuntime", "prestart", "poststop"] {
        let sandbox = json!({"mig.profile": "1g.10gb", "io.kubernetes.cri.container-type": "sandbox"});
        for silent in [json!({}), Value::Null, json!({"migrate": "1"}), sandbox] {
            let output = hook(stage, &silent);
            assert_eq!(text(&output), "exit status: 0\n", "{stage} {silent}");
        }
        let output = hook(stage, &json!({"mig.profile": "1g.10gb"}));
        assert!(!output.status.success() && text(&output).contains("mig-engine"), "{}", text(&output));
    }
    assert!(!world.path("state").exists());
}
