//! `mig-hook`: podman's precreate, and the hooks that an edited config carries.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use common::{Init, World, binaries, config, document, feed, installed, run, skip, state, text};
use serde_json::{Value, json};

fn asked() -> Value {
    config(json!({"mig.profile": "1g.10gb"}), &["PATH=/bin"])
}

fn code(output: &Output) -> i32 {
    output.status.code().unwrap_or_else(|| panic!("{}", text(output)))
}

/// A precreate that must succeed: the edited config and its token.
fn precreate(world: &World) -> (Value, String) {
    let output = world.hook(&["precreate"], asked().to_string().as_bytes());
    assert_eq!(code(&output), 0, "{}", text(&output));
    let edited: Value = serde_json::from_slice(&output.stdout).unwrap();
    let token = edited["annotations"]["mig.lease"].as_str().unwrap().to_owned();
    (edited, token)
}

fn bind(world: &World, token: &str, id: &str, pid: u32) -> Output {
    world.hook(&["createRuntime", "--lease", token], &state(id, pid, &world.path("b")))
}

fn poststop(world: &World, token: &str, stdin: &[u8]) -> Output {
    world.hook(&["poststop", "--lease", token], stdin)
}

#[test]
fn precreate_prints_the_edited_config_and_nothing_else() {
    let world = World::new(&["a100-sxm4-80gb"]);
    let output = world.hook(&["precreate"], serde_json::to_vec_pretty(&asked()).unwrap().as_slice());
    assert_eq!((code(&output), output.stderr.as_slice()), (0, &b""[..]), "{}", text(&output));
    let edited: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(edited["x-future"], asked()["x-future"]);
    let keys = |v: &Value| v.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
    assert_eq!(keys(&edited)[..keys(&asked()).len()], keys(&asked()), "in their order");
    let token = &world.lease()["token"];
    assert_eq!(edited["annotations"]["mig.lease"], *token);
    for stage in ["createRuntime", "poststop"] {
        let [hook] = edited["hooks"][stage].as_array().unwrap().as_slice() else { panic!("{edited:#}") };
        assert_eq!(hook["args"], json!(["mig-hook", "--config", world.config(), stage, "--lease", token]));
        assert!(Path::new(hook["path"].as_str().unwrap()).is_absolute() && !hook["env"].as_array().unwrap().is_empty());
    }
    let owner = &world.lease()["holder"]["owner"]["pid"];
    assert_eq!(*owner, std::process::id(), "the process that runs the hook, as podman would");
}

#[test]
fn a_container_without_a_cgroup_is_refused_since_nothing_enforces_its_device_rules() {
    let world = World::new(&["a100-sxm4-80gb"]);
    let mut config = asked();
    config["linux"].as_object_mut().unwrap().remove("cgroupsPath");
    let output = world.hook(&["precreate"], config.to_string().as_bytes());
    assert_eq!(code(&output), 77, "{}", text(&output));
    assert!(text(&output).contains("without a cgroup") && text(&output).contains("--cgroups=disabled"));
    world.assert_clean("after the refusal");
    world.settings("[requests]\nopen_device_rules = true");
    let output = world.hook(&["precreate"], config.to_string().as_bytes());
    assert_eq!(code(&output), 0, "{}", text(&output));
}

#[test]
fn the_hooks_that_were_written_run_as_written() {
    let world = World::new(&["a100-sxm4-80gb"]);
    let (edited, _) = precreate(&world);
    let init = Init::start();
    for stage in ["createRuntime", "poststop"] {
        let hook = &edited["hooks"][stage][0];
        let args: Vec<&str> = hook["args"].as_array().unwrap().iter().map(|a| a.as_str().unwrap()).collect();
        let mut command = Command::new(hook["path"].as_str().unwrap());
        command.args(&args[1..]).env_clear().current_dir("/");
        for whole in hook["env"].as_array().unwrap() {
            let (key, value) = whole.as_str().unwrap().split_once('=').unwrap();
            command.env(key, value);
        }
        let output = feed(&mut command, &state("c1", init.pid(), &world.path("b")));
        assert_eq!(code(&output), 0, "{stage}: {}", text(&output));
        if stage == "createRuntime" {
            assert_eq!(world.lease()["holder"]["container"], "c1");
        }
    }
    world.assert_clean("after the written poststop");
}

#[test]
fn create_runtime_binds_the_container_once() {
    let world = World::new(&["a100-sxm4-80gb"]);
    let (_, token) = precreate(&world);
    let init = Init::start();
    assert_eq!(code(&bind(&world, &token, "c1", init.pid())), 0);
    let holder = world.lease()["holder"].clone();
    assert_eq!((&holder["container"], &holder["init"]["pid"]), (&json!("c1"), &json!(init.pid())));
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", init.pid())).unwrap();
    let start: u64 = stat.rsplit_once(')').unwrap().1.split_whitespace().nth(19).unwrap().parse().unwrap();
    assert_eq!(holder["init"]["start"], start, "a pid alone may be another process by then");
    assert_eq!(holder["bundle"], json!(world.path("b")));

    let other = bind(&world, &token, "c2", init.pid());
    assert!(code(&other) == 75 && text(&other).contains("is held by container c1"), "{}", text(&other));
    assert_eq!(world.lease()["holder"], holder, "the failed bind changed nothing");
    let again = bind(&world, &token, "c1", init.pid());
    assert_eq!(code(&again), 0, "the same container may say it twice: {}", text(&again));
}

#[test]
fn a_bind_that_can_not_be_believed_fails_the_create() {
    let world = World::new(&["a100-sxm4-80gb"]);
    let (_, token) = precreate(&world);
    let bundle = world.path("b");
    let cases: [(&str, Output, i32, &str); 9] = [
        ("unknown token", bind(&world, "00000000000000000000000000000000", "c1", 1), 75, "was freed"),
        ("no token", world.hook(&["createRuntime", "--lease"], &state("c1", 1, &bundle)), 64, "--lease"),
        (
            "a path as token",
            world.hook(&["createRuntime", "--lease", "../lock"], &state("c1", 1, &bundle)),
            64,
            "token",
        ),
        ("no State", world.hook(&["createRuntime", "--lease", &token], b""), 65, "State"),
        ("no JSON", world.hook(&["createRuntime", "--lease", &token], b"{\"id\":"), 65, "State"),
        ("pid 0", bind(&world, &token, "c1", 0), 65, "pid"),
        ("an id that is a path", bind(&world, &token, "../c1", 1), 77, "plain name"),
        (
            "createContainer",
            world.hook(&["createContainer", "--lease", &token], &state("c1", 1, &bundle)),
            77,
            "createContainer",
        ),
        (
            "startContainer",
            world.hook(&["startContainer", "--lease", &token], &state("c1", 1, &bundle)),
            77,
            "startContainer",
        ),
    ];
    for (name, output, expected, word) in cases {
        assert_ne!(code(&output), 0, "{name}");
        assert!(text(&output).contains(word), "{name}: {}", text(&output));
        assert_eq!(code(&output), expected, "{name}: {}", text(&output));
        assert!(output.stdout.is_empty(), "{name}");
    }
    assert_eq!(world.lease()["holder"]["container"], Value::Null);
    let typo = world.hook(&["precreat"], b"{}");
    assert!(
        code(&typo) == 64 && text(&typo).contains("precreate, createRuntime, prestart and poststop"),
        "{}",
        text(&typo)
    );
    assert_eq!(code(&poststop(&world, &token, &state("c1", 0, &bundle))), 0);
}

#[test]
fn a_token_that_was_freed_meanwhile_fails_the_create() {
    let world = World::new(&["a100-sxm4-80gb"]);
    let (_, token) = precreate(&world);
    assert_eq!(code(&poststop(&world, &token, &state("c1", 0, &world.path("b")))), 0);
    world.assert_clean("after poststop");
    let output = bind(&world, &token, "c1", std::process::id());
    assert!(code(&output) == 75 && text(&output).contains("start the container again"), "{}", text(&output));
}

/// The State as crun 1.28 sends it: pretty-printed, with a field of its own and pid 0.
fn crun_state(id: &str, bundle: &Path) -> Vec<u8> {
    let annotations: serde_json::Map<String, Value> = (0..200).map(|n| (format!("k{n}"), json!("v"))).collect();
    let state = json!({
        "ociVersion": "1.0", "id": id, "pid": 0, "root": bundle.join("rootfs"), "bundle": bundle, "status": "stopped",
        "annotations": annotations,
    });
    serde_json::to_vec_pretty(&state).unwrap()
}

#[test]
fn poststop_releases_what_the_token_and_the_container_hold_and_nothing_else() {
    let world = World::new(&["a100-sxm4-80gb"]);
    let (_, token) = precreate(&world);
    let (_, other) = precreate(&world);
    let init = Init::start();
    let bundle = world.path("b");
    assert_eq!(code(&bind(&world, &token, "c1", init.pid())), 0);
    assert_eq!(code(&bind(&world, &other, "c2", init.pid())), 0);
    // A forged State with our token, and our State with another token.
    let output = poststop(&world, &token, &state("c2", 0, &bundle));
    assert!(code(&output) == 0 && text(&output).contains("nothing was released"), "{}", text(&output));
    assert_eq!((world.leases().len(), world.instances().len()), (2, 2));
    drop(init);
    let output = poststop(&world, &token, &crun_state("c1", &bundle));
    assert_eq!(code(&output), 0, "{}", text(&output));
    assert_eq!(world.lease()["token"], other.as_str());
    assert_eq!(world.instances().len(), 1);
    assert_eq!(code(&poststop(&world, &token, &crun_state("c1", &bundle))), 0, "a second one");
    assert_eq!(code(&poststop(&world, &other, &state("c2", 0, &bundle))), 0);
    world.assert_clean("after both");
    let events: Vec<Value> = world.audit().iter().map(|l| l["event"].clone()).collect();
    assert_eq!(events, ["grant", "grant", "release", "release"]);
}

#[test]
fn poststop_ends_with_0_whatever_happens() {
    let world = World::new(&["a100-sxm4-80gb"]);
    let (_, token) = precreate(&world);
    let good = state("c1", 0, &world.path("b"));
    let many = b"{\n\"x\": 1,\n".repeat(100_000);
    let cases: [(&str, &[&str], &[u8]); 12] = [
        ("empty stdin", &["poststop", "--lease", &token], b""),
        ("no JSON", &["poststop", "--lease", &token], b"\xff\xfe{"),
        ("JSON of another kind", &["poststop", "--lease", &token], b"[1]"),
        ("a megabyte of lines", &["poststop", "--lease", &token], &many),
        ("unknown token", &["poststop", "--lease", "0123456789abcdef0123456789abcdef"], &good),
        ("unknown token, many lines", &["poststop", "--lease", "0123456789abcdef0123456789abcdef"], &many),
        ("a path as token", &["poststop", "--lease", "../../lock"], &good),
        ("no token", &["poststop"], &good),
        ("no value", &["poststop", "--lease"], &good),
        ("unknown option", &["poststop", "--what", "--lease", &token], &good),
        ("missing settings", &["--config", "/nonexistent/config.toml", "poststop", "--lease", &token], &good),
        ("settings that are a directory", &["--config", "/", "poststop", "--lease", &token], &good),
    ];
    for (name, args, stdin) in cases {
        let output = world.hook(args, stdin);
        assert_eq!(code(&output), 0, "{name}: {}", text(&output));
        assert!(output.stdout.is_empty(), "{name}");
        assert_eq!(world.leases().len(), 1, "{name}");
    }
    let toml = std::fs::read_to_string(world.config()).unwrap();
    for (name, broken) in [("no TOML", "state_dir ="), ("an unknown key", &format!("nonsense = 1\n{toml}"))] {
        world.write("config.toml", broken);
        assert_eq!(code(&poststop(&world, &token, &good)), 0, "{name}");
    }
    world.write("config.toml", &toml);
    // The driver is away.
    let library = world.path("m/usr/lib/libnvidia-ml.so.1");
    let away = world.path("away.so");
    std::fs::rename(&library, &away).unwrap();
    let output = poststop(&world, &token, &good);
    assert_eq!(code(&output), 0, "{}", text(&output));
    std::fs::rename(&away, &library).unwrap();
    assert_eq!(code(&world.migctl(&["gc"])), 0);
    world.assert_clean("after gc, which finishes what poststop announced");
}

#[test]
fn hooks_work_with_every_signal_blocked_as_crun_starts_them() {
    let world = World::new(&["a100-sxm4-80gb"]);
    let blocked = |args: &[&str], stdin: &[u8]| {
        let mut command = Command::new("env");
        command.arg("--block-signal").arg(binaries().join("mig-hook")).arg("--config").arg(world.config()).args(args);
        feed(&mut command, stdin)
    };
    let output = blocked(&["precreate"], asked().to_string().as_bytes());
    assert_eq!(code(&output), 0, "{}", text(&output));
    let edited: Value = serde_json::from_slice(&output.stdout).unwrap();
    let token = edited["annotations"]["mig.lease"].as_str().unwrap();
    let init = Init::start();
    assert_eq!(code(&blocked(&["createRuntime", "--lease", token], &state("c1", init.pid(), &world.path("b")))), 0);
    drop(init);
    assert_eq!(code(&blocked(&["poststop", "--lease", token], &crun_state("c1", &world.path("b")))), 0);
    world.assert_clean("after poststop");

    // And they can be ended: a runtime's timeout sends SIGTERM before SIGKILL.
    let mut command = Command::new("env");
    command.arg("--block-signal").arg(binaries().join("mig-hook")).arg("--config").arg(world.config()).arg("precreate");
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let status = format!("/proc/{}/status", child.id());
    common::wait_for("the hook unblocks its signals", std::time::Duration::from_secs(10), || {
        let text = std::fs::read_to_string(&status).unwrap();
        text.contains("Name:\tmig-engine") && text.contains("SigBlk:\t0000000000000000")
    });
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn a_refused_precreate_reaches_the_parents_stderr_since_podman_throws_its_own_away() {
    let world = World::new(&["a100-sxm4-80gb"]);
    let config = config(json!({"mig.profile": "8x7g.80gb"}), &[]);
    let stdin = world.write("config.json", &config.to_string());
    let said = world.path("podman.err");
    // The inner shell becomes the hook; redirecting for it in the outer one could change that one's own descriptors.
    let script = format!(
        "exec 2>{}; sh -c 'exec \"$@\" precreate <{} 2>/dev/null' sh \"$@\"; exit $?",
        said.display(),
        stdin.display()
    );
    let hook = binaries().join("mig-hook");
    let mut parent = Command::new("sh");
    parent.args(["-c", &script, "sh"]).arg(hook).arg("--config").arg(world.config());
    let output = run(&mut parent);
    assert_ne!(code(&output), 0);
    assert!(output.stdout.is_empty(), "a refused precreate prints no config");
    let said = std::fs::read_to_string(said).unwrap();
    assert!(said.starts_with("mig-hook: ") && said.contains("7g.80gb"), "{said:?}");
    assert_eq!(said.lines().count(), 1, "{said:?}");
    world.assert_clean("after a refusal");
}

#[test]
fn a_precreate_whose_reader_is_gone_gives_the_slice_back() {
    let world = World::new(&["a100-sxm4-80gb"]);
    let stdin = world.write("config.json", &asked().to_string());
    let hook = || {
        let mut command = Command::new(binaries().join("mig-hook"));
        command.arg("--config").arg(world.config()).arg("precreate").stdin(std::fs::File::open(&stdin).unwrap());
        command.stderr(Stdio::piped());
        command
    };
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    for (name, stdout) in [("a full disk", Stdio::from(full)), ("a closed pipe", Stdio::from(writer))] {
        let output = hook().stdout(stdout).spawn().unwrap().wait_with_output().unwrap();
        assert!(!output.status.success(), "{name}");
        assert!(text(&output).contains("cannot write the edited config"), "{name}: {}", text(&output));
        world.assert_clean(name);
    }
}

#[test]
fn the_engine_is_started_with_an_environment_that_no_loader_reads() {
    if !installed("strace") {
        return skip("hook: the engine's environment", "strace is not installed");
    }
    let world = World::new(&["a100-sxm4-80gb"]);
    world.settings("[runtime]\npath = \"/bin/true\"");
    let bundle = world.bundle("b", &asked());
    let evil = [
        "LD_LIBRARY_PATH=/evil",
        "LD_BIND_NOW=1",
        "LD_DEBUG_OUTPUT=/evil/x",
        "GCONV_PATH=/evil",
        "GLIBC_TUNABLES=glibc.malloc.check=1",
        "RUST_BACKTRACE=full",
        "RUST_LOG=trace",
        "PATH=/evil",
        "BASH_ENV=/evil",
    ];
    let config = world.config();
    let hook = [binaries().join("mig-hook"), "--config".into(), config.clone(), "precreate".into()];
    let shim = [
        binaries().join("mig-runtime"),
        "--mig-config".into(),
        config,
        "create".into(),
        "-b".into(),
        bundle,
        "c1".into(),
    ];
    for line in [&hook[..], &shim[..]] {
        let file = world.path("strace");
        let mut command = Command::new("strace");
        command.args(["-f", "-qq", "-v", "-s", "4096", "-e", "trace=execve", "-o"]).arg(&file);
        command.args(evil.iter().flat_map(|e| ["-E", e])).args(line);
        let output = feed(&mut command, asked().to_string().as_bytes());
        assert_eq!(code(&output), 0, "{}", text(&output));
        let trace = std::fs::read_to_string(&file).unwrap();
        let execs: Vec<&str> = trace.lines().filter(|l| l.contains("execve(")).collect();
        let engine = execs.iter().find(|l| l.contains("[\"mig-engine\"")).unwrap_or_else(|| panic!("{trace}"));
        let given = engine.rsplit_once('[').unwrap().1;
        for variable in evil {
            let name = variable.split_once('=').unwrap().0;
            assert!(!given.contains(&format!("\"{name}=")), "{name} reaches the engine: {engine}");
        }
        if line == shim {
            let runtime = execs.last().unwrap().rsplit_once('[').unwrap().1;
            for variable in evil {
                assert!(runtime.contains(&format!("\"{variable}\"")), "{variable} is lost: {runtime}");
            }
        } else {
            assert!(given.starts_with(']'), "a hook's engine needs no environment at all: {given}");
        }
    }
}

/// Compiles C; `None` where there is no compiler.
fn compile(world: &World, name: &str, source: &str, options: &[&str]) -> Option<PathBuf> {
    let file = world.write(&format!("src/{name}.c"), source);
    let out = world.path(&format!("src/{name}"));
    let output = Command::new("cc").args(options).arg("-o").arg(&out).arg(&file).output().ok()?;
    output.status.success().then_some(out)
}

/// The environment attacks of CVE-2025-23266 and its kin, on the binaries as shipped: only static first stages withstand
/// LD_PRELOAD, and cargo's are not static.
#[test]
fn nothing_in_the_environment_or_the_directory_makes_us_run_what_is_not_ours() {
    const NAME: &str = "hook: LD_PRELOAD and its kin";
    if std::env::var_os("MIG_TEST_DIST").is_none() {
        return skip(NAME, "MIG_TEST_DIST is not set: cargo's first stages are not static");
    }
    let world = World::new(&["a100-sxm4-80gb"]);
    let canary = world.path("canary");
    let library = format!(
        "#include <fcntl.h>\n#include <unistd.h>\n__attribute__((constructor)) static void hit(void) {{ \
         close(open(\"{}\", O_CREAT | O_WRONLY, 0600)); }}\nunsigned la_version(unsigned v) {{ return v; }}\n\
         int gconv_init(void *p) {{ return 0; }}\nint gconv(void) {{ return 0; }}\n",
        canary.display()
    );
    // Static, so that the attack, which the runtime must get unchanged, does not work on the stand-in itself.
    let recorder = format!(
        "#include <stdio.h>\nextern char **environ;\nint main(void) {{ FILE *f = fopen(\"{}\", \"w\"); \
         for (char **e = environ; *e; e++) fprintf(f, \"%s%c\", *e, 0); return fclose(f); }}\n",
        world.path("environ").display()
    );
    let evil_library = compile(&world, "evil.so", &library, &["-shared", "-fPIC"]);
    let runtime = compile(&world, "recorder", &recorder, &["-static"]);
    let (Some(evil_library), Some(runtime)) = (evil_library, runtime) else {
        return skip(NAME, "no C compiler with a static libc");
    };
    let evil = world.path("evil");
    std::fs::create_dir_all(evil.join("tls")).unwrap();
    for name in [
        "libnvidia-ml.so.1",
        "libnvidia-ml.so",
        "libc.so.6",
        "libgcc_s.so.1",
        "libm.so.6",
        "ld-linux-x86-64.so.2",
        "evil.so",
        "UTF-8.so",
    ] {
        std::fs::copy(&evil_library, evil.join(name)).unwrap();
        std::fs::copy(&evil_library, evil.join("tls").join(name)).unwrap();
    }
    world.write("evil/gconv-modules", "module UTF-8// INTERNAL evil 1\nmodule INTERNAL UTF-8// evil 1\n");
    world.write("evil/config.toml", "state_dir = \"/nonexistent\"");
    for program in ["mig-engine", "runc", "crun", "sh", "nvidia-modprobe", "nvidia-smi"] {
        world.script(&format!("evil/{program}"), &format!("touch {}", canary.display()));
    }
    world.settings(&format!("[runtime]\npath = \"{}\"", runtime.display()));
    let so = evil.join("evil.so");
    let (so, dir) = (so.display(), evil.display());
    let attack: Vec<String> = vec![
        format!("LD_PRELOAD={so}"),
        format!("LD_AUDIT={so}"),
        format!("LD_LIBRARY_PATH={dir}:."),
        format!("GCONV_PATH={dir}"),
        "GLIBC_TUNABLES=glibc.malloc.check=3".into(),
        "RUST_BACKTRACE=full".into(),
        "RUST_LOG=trace".into(),
        format!("PATH={dir}:."),
        format!("LOCPATH={dir}"),
        format!("BASH_ENV={dir}/sh"),
        format!("ENV={dir}/sh"),
        "LC_ALL=xx.UTF-8".into(),
    ];
    let attacked = |command: &mut Command| {
        command.env_clear().current_dir(&evil);
        for whole in &attack {
            let (key, value) = whole.split_once('=').unwrap();
            command.env(key, value);
        }
    };
    let hook = |args: &[&str], stdin: &[u8]| {
        let mut command = Command::new(binaries().join("mig-hook"));
        command.arg("--config").arg(world.config()).args(args);
        attacked(&mut command);
        let output = feed(&mut command, stdin);
        assert_eq!(code(&output), 0, "{args:?}: {}", text(&output));
        assert!(!canary.exists(), "{args:?} ran what is not ours");
        output
    };
    let output = hook(&["precreate"], asked().to_string().as_bytes());
    let edited: Value = serde_json::from_slice(&output.stdout).unwrap();
    let token = edited["annotations"]["mig.lease"].as_str().unwrap();
    let init = Init::start();
    hook(&["createRuntime", "--lease", token], &state("c1", init.pid(), &evil));
    drop(init);
    hook(&["poststop", "--lease", token], &state("c1", 0, &evil));
    world.assert_clean("after poststop");

    let bundle = world.bundle("b", &asked());
    let silent = world.bundle("silent", &config(json!({}), &[]));
    for line in [
        &["create", "-b", bundle.to_str().unwrap(), "c1"][..],
        &["delete", "c1"],
        &["create", "-b", silent.to_str().unwrap(), "c2"],
    ] {
        let _ = std::fs::remove_file(world.path("environ"));
        let mut command = world.shim_command(line);
        attacked(&mut command);
        let output = run(&mut command);
        assert_eq!(code(&output), 0, "{line:?}: {}", text(&output));
        assert!(!canary.exists(), "{line:?} ran what is not ours");
        let mut given: Vec<String> =
            std::fs::read_to_string(world.path("environ")).unwrap().split_terminator('\0').map(str::to_owned).collect();
        let mut expected = attack.clone();
        given.sort();
        expected.sort();
        assert_eq!(given, expected, "{line:?}: the runtime gets the environment unchanged");
    }
    assert_eq!(document(&bundle.join("config.json"))["annotations"]["mig.profile"], "1g.10gb");

    let mut control = Command::new("/bin/true");
    run(control.env("LD_PRELOAD", evil.join("evil.so")));
    assert!(canary.exists(), "the attack works where it can");
}

/// Loading and starting NVML is what costs most on a real machine.
#[test]
fn nvml_is_started_once_a_process_also_when_what_was_cut_is_undone() {
    let world = World::new(&["a100-sxm4-80gb"]);
    world.recording_runtime(0);
    let starts = || {
        let counts: Value = serde_json::from_str(&world.sim("counts", &["--json"])).unwrap();
        world.sim("count", &["on"]); // from nought again
        let starts = counts.as_object().unwrap().iter().filter(|(call, _)| call.starts_with("nvmlInit"));
        starts.map(|(_, n)| n.as_u64().unwrap()).sum::<u64>()
    };
    world.sim("count", &["on"]);
    let asking = config(json!({"mig.profile": "1g.10gb"}), &[]);
    let output = world.hook(&["precreate"], asking.to_string().as_bytes());
    assert!(output.status.success(), "{}", text(&output));
    assert_eq!(starts(), 1, "precreate");
    let token = world.lease()["token"].as_str().unwrap().to_owned();
    world.hook(&["poststop", "--lease", &token], &state("c1", 1, &world.path("b")));
    assert_eq!(starts(), 1, "poststop");
    world.assert_clean("after poststop");
    let mut broken = asking;
    broken["process"] = json!([]);
    let bundle = world.bundle("b", &broken).display().to_string();
    assert!(!world.shim(&["create", "--bundle", &bundle, "c1"]).status.success());
    assert_eq!(starts(), 1, "a create that undoes what it cut");
    world.assert_clean("after the undone create");
    world.hook(&["poststop", "--lease", &token], &state("c1", 1, &world.path("b")));
    assert_eq!(starts(), 0, "a second poststop");
}

/// The classic hook believes a State only where the container behind it is one.
#[test]
fn a_classic_hook_takes_nothing_for_what_is_no_container() {
    let world = World::new(&["a100-sxm4-80gb"]);
    let init = Init::start();
    let bundle = world.bundle("b", &asked());
    let state = |pid: u32, bundle: &Path| {
        let annotations = json!({"mig.profile": "1g.10gb"});
        let state =
            json!({"ociVersion": "1.0.2", "id": "c1", "pid": pid, "bundle": bundle, "annotations": annotations});
        state.to_string().into_bytes()
    };
    let open = world.bundle("open", &{
        let mut config = asked();
        config["linux"]["resources"]["devices"] = json!([{"allow": true, "access": "rwm"}]);
        config
    });
    let twice = world.bundle("twice", &asked());
    std::fs::write(twice.join("config.json"), r#"{"root":{},"root":{}}"#).unwrap();
    let cases = [
        ("the host's namespaces", state(init.pid(), &bundle), 77, "shares the host's file systems"),
        ("no such process", state(4_000_000, &bundle), 65, "no living process"),
        ("crun's bundle", state(init.pid(), Path::new("/")), 77, "where the container's bundle is"),
        ("no config", state(init.pid(), &world.path("nowhere")), 74, "nowhere/config.json"),
        ("open rules", state(init.pid(), &open), 77, "--privileged"),
        ("a key twice", state(init.pid(), &twice), 65, "is there twice"),
    ];
    for (name, state, expected, word) in cases {
        let output = world.hook(&["createRuntime"], &state);
        assert_eq!(code(&output), expected, "{name}: {}", text(&output));
        assert!(text(&output).contains(word), "{name}: {}", text(&output));
        world.assert_clean(name);
    }
    assert_eq!(world.audit().iter().filter(|line| line["event"] == "refusal").count(), 6);
    let output = world.hook(&["poststop"], &state(init.pid(), &bundle));
    assert_eq!(code(&output), 0, "poststop of what holds nothing: {}", text(&output));
}

/// What the State calls our token is an annotation, and may be an image's: never a path.
#[test]
fn a_token_in_the_state_is_no_path() {
    let world = World::new(&["a100-sxm4-80gb"]);
    let (_, token) = precreate(&world);
    let init = Init::start();
    let lease = std::fs::read(world.path("state/leases").join(format!("{token}.json"))).unwrap();
    std::fs::write(world.path("forged.json"), lease).unwrap();
    let forged = world.path("forged").display().to_string();
    let mut asked: Value = serde_json::from_slice(&state("c1", init.pid(), &world.path("b"))).unwrap();
    asked["annotations"] = json!({"mig.profile": "1g.10gb", "mig.lease": forged});
    let output = world.hook(&["createRuntime"], asked.to_string().as_bytes());
    assert_ne!(code(&output), 0, "it is not taken for a container that is served: {}", text(&output));
}
