//! Attacks that need no container, and the pages that name tests: `make test-attack` runs those that docs/security.md names.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::collections::BTreeMap;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::{World, attack, binaries, config, feed, installed, run, skip, text};
use serde_json::{Value, json};

const SECURITY: &str = include_str!("../docs/security.md");
const RELIABILITY: &str = include_str!("../docs/reliability.md");

/// The tests that a page's tables name, as `BINARY::PATH`; `lib` for unit tests.
fn named(page: &str) -> Vec<&str> {
    let rows = page.lines().filter(|line| line.starts_with('|'));
    let names = rows.flat_map(|row| row.rsplit('|').nth(1).unwrap_or_default().split('`').skip(1).step_by(2));
    names.filter(|name| name.contains("::")).collect()
}

/// The file of a test, and the name of its function.
fn place(name: &str) -> (String, &str) {
    let parts: Vec<&str> = name.split("::").collect();
    let (function, binary, modules) = (parts[parts.len() - 1], parts[0], &parts[1..parts.len() - 1]);
    let file = match (binary, modules) {
        ("lib", [modules @ .., "tests"]) => format!("src/{}.rs", modules.join("/")),
        (binary, []) => format!("tests/{binary}.rs"),
        (binary, modules) => format!("tests/{binary}/{}.rs", modules.join("/")),
    };
    (file, function)
}

#[test]
fn every_test_that_a_page_names_is_there() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    for (page, least) in [(SECURITY, 60), (RELIABILITY, 40)] {
        let names = named(page);
        assert!(names.len() > least, "the tables are read wrongly: {names:?}");
        let missing = names.iter().filter(|name| {
            let (file, function) = place(name);
            let source = std::fs::read_to_string(root.join(&file)).unwrap_or_default();
            !source.contains(&format!("fn {function}("))
        });
        assert_eq!(missing.collect::<Vec<_>>(), Vec::<&&str>::new(), "named, and not there");
    }
}

#[test]
fn no_test_stands_for_two_attacks() {
    let names = named(SECURITY);
    let mut once = BTreeMap::new();
    names.iter().for_each(|name| *once.entry(name).or_insert(0) += 1);
    once.retain(|_, times| *times > 1);
    assert!(once.is_empty(), "named twice: {once:?}");
}

/// No attack is left out of the page.
#[test]
fn every_attack_is_on_the_page() {
    let names = named(SECURITY);
    let of = |binary: &str, source: &str| {
        let tests = source.split("#[test]\nfn ").skip(1).map(|rest| rest.split('(').next().unwrap().to_owned());
        tests.map(|test| format!("{binary}::{test}")).collect::<Vec<_>>()
    };
    let files = [
        ("containers::attack", include_str!("containers/attack.rs")),
        ("containers::hostile", include_str!("containers/hostile.rs")),
    ];
    for (binary, source) in files {
        let all = of(binary, source);
        assert!(!all.is_empty());
        let left_out: Vec<&String> = all.iter().filter(|test| !names.contains(&test.as_str())).collect();
        assert_eq!(left_out, Vec::<&String>::new());
    }
}

/// As many annotations and variables as fit into a config: refused or served, in bounded time, with a short sentence.
#[test]
fn floods_of_annotations_and_variables_end_soon() {
    let world = World::new(&["a30-24gb"]);
    world.recording_runtime(0);
    let many =
        |key: &str, n: usize| (0..n).map(|n| (format!("{key}{n}"), json!("1g.6gb"))).collect::<serde_json::Map<_, _>>();
    let mut strangers = many("io.example.", 200_000);
    strangers.insert("mig.profile".into(), json!("1g.6gb"));
    let mut named = many("mig.profile/c", 100_000);
    named.insert("io.kubernetes.cri.container-name".into(), json!("c99999"));
    let config = |name: &str, annotations: serde_json::Map<String, Value>, env: &[&str]| {
        (name.to_owned(), common::config(Value::Object(annotations), env))
    };
    let variables: Vec<String> = (0..100_000).map(|n| format!("MIG_X{n}=1g.6gb")).collect();
    let variables: Vec<&str> = variables.iter().map(String::as_str).collect();
    let cases = [
        (config("200000 unknown keys of ours", many("mig.x", 200_000), &[]), false),
        (config("200000 of strangers and one request", strangers, &[]), true),
        (config("a request for each of 100000 containers", named, &[]), true),
        (config("100000 variables", serde_json::Map::new(), &variables), true),
    ];
    for ((name, config), served) in cases {
        attack(&name);
        let bundle = world.bundle("b", &config);
        let begun = Instant::now();
        let output = world.shim(&["--mig-env", "create", "--bundle", bundle.to_str().unwrap(), "c1"]);
        assert!(begun.elapsed() < Duration::from_secs(20), "{name}: {:?}", begun.elapsed());
        assert_eq!(output.status.success(), served, "{name}: {}", text(&output).chars().take(2000).collect::<String>());
        assert!(output.stderr.len() < 1500, "{name}: {} bytes of message", output.stderr.len());
        assert!(world.shim(&["delete", "c1"]).status.success(), "{name}");
        world.assert_clean(&name);
    }
    let audit = std::fs::read_to_string(world.path("audit.jsonl")).unwrap();
    assert!(audit.lines().all(|line| line.len() < 4000), "audit lines stay short");
}

/// What a terminal would obey, or turn round.
fn raw(text: &str) -> Option<char> {
    text.chars().find(|c| *c != '\n' && (c.is_control() || ('\u{202a}'..='\u{202e}').contains(c)))
}

/// An image's name and what a process calls itself are theirs to choose, and an administrator reads them on a terminal.
#[test]
fn names_of_strangers_reach_no_terminal_raw() {
    let world = World::new(&["a30-24gb"]);
    world.recording_runtime(0);
    let image = "x\u{1b}]0;owned\u{7}\u{202e}\r\nroot: all is well";
    let annotations = json!({"mig.profile": "1g.6gb", "org.opencontainers.image.ref.name": image});
    let (_bundle, init) = world.living("web", &config(annotations, &[]));
    // What a container's process does with prctl(PR_SET_NAME).
    let mut process = Command::new("sh")
        .args(["-c", "printf 'a\\033[2J\\342\\200\\256b' > /proc/$$/comm; read line"])
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    common::wait_for("the name", Duration::from_secs(10), || {
        std::fs::read_to_string(format!("/proc/{}/comm", process.id())).unwrap().contains('\u{1b}')
    });
    let gi = world.instances()[0]["id"].to_string();
    world.sim("hold", &["--gpu", "0", "--gi", &gi, "--pid", &process.id().to_string()]);
    let verbs: [&[&str]; 12] = [
        &["list"],
        &["leases"],
        &["map"],
        &["map", "--svg"],
        &["top", "--once"],
        &["history"],
        &["history", "--by", "image"],
        &["plan", "4g.24gb"],
        &["destroy", "--all"],
        &["drain", "0", "--wait", "0s"],
        &["doctor"],
        &["gc"],
    ];
    for verb in verbs {
        attack(&format!("names in migctl {}", verb.join(" ")));
        let said = text(&world.migctl(verb));
        assert_eq!(raw(&said), None, "migctl {verb:?}: {said:?}");
    }
    process.stdin.take().unwrap().write_all(b"\n").unwrap();
    process.wait().unwrap();
    drop(init);
}

/// Mounted, with a server that never answers. Gone after the test, whatever its end.
struct Silent {
    at: std::path::PathBuf,
    server: std::process::Child,
}

impl Silent {
    /// `None` where there can be none.
    fn mount(world: &World) -> Option<Silent> {
        let at = world.path("silent");
        std::fs::create_dir(&at).unwrap();
        let script = "exec 9<>/dev/fuse && mount -i -t fuse -o fd=9,rootmode=40000,user_id=0,group_id=0 silent \"$1\" && \
                      touch \"$1.there\" && exec sleep 60";
        let mut server = Command::new("sh").args(["-c", script, "sh"]).arg(&at).stderr(Stdio::null()).spawn().unwrap();
        let mut ended = false;
        common::wait_for("the mount", Duration::from_secs(10), || {
            ended = server.try_wait().unwrap().is_some();
            ended || world.path("silent.there").exists()
        });
        (!ended).then_some(Silent { at, server })
    }
}

impl Drop for Silent {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
        let _ = Command::new("umount").arg("--lazy").arg(&self.at).status();
    }
}

/// Whoever looks for open devices meets the files of everybody.
#[test]
fn a_file_system_that_answers_nobody_keeps_nobody_waiting() {
    let world = World::new(&["a30-24gb"]);
    world.recording_runtime(0);
    let (_bundle, init) = world.living("web", &config(json!({"mig.profile": "1g.6gb"}), &[]));
    let Some(silent) = Silent::mount(&world) else {
        return skip("attack: a file system that does not answer", "no FUSE can be mounted here");
    };
    // To open it otherwise is to wait for its server.
    let flags = libc::O_PATH | libc::O_DIRECTORY;
    let open = std::fs::OpenOptions::new().read(true).custom_flags(flags).open(&silent.at).unwrap();
    drop(init);
    attack("an open file of a file system that does not answer");
    let begun = Instant::now();
    let output = world.migctl(&["doctor", "--json"]);
    assert!(text(&output).contains("holder."), "it has looked at open devices: {}", text(&output));
    assert_eq!(world.migctl(&["gc"]).status.code(), Some(0));
    assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
    world.assert_clean("after gc");
    drop(open);
    drop(silent);
}

/// The stages of the classic hook, and the shim's other verbs, as tests/hook.rs does it for those of an edited config.
#[test]
fn no_stage_heeds_the_environment_or_the_directory() {
    const NAME: &str = "attack: the environment of every stage";
    if std::env::var_os("MIG_TEST_DIST").is_none() {
        return skip(NAME, "MIG_TEST_DIST is not set: cargo's first stages are not static");
    }
    if !installed("cc") {
        return skip(NAME, "no C compiler");
    }
    let world = World::new(&["a30-24gb"]);
    world.settings("[runtime]\npath = \"/bin/false\"");
    let (canary, evil) = (world.path("canary"), world.path("evil"));
    let source = world.write(
        "evil/evil.c",
        &format!(
            "#include <fcntl.h>\n__attribute__((constructor)) static void hit(void) {{ open(\"{}\", O_CREAT | O_WRONLY, 0600); }}\n\
             unsigned la_version(unsigned v) {{ return v; }}\n",
            canary.display()
        ),
    );
    let library = evil.join("evil.so");
    let built = run(Command::new("cc").args(["-shared", "-fPIC", "-o"]).arg(&library).arg(source));
    assert!(built.status.success(), "{}", text(&built));
    for name in ["libnvidia-ml.so.1", "libc.so.6", "libgcc_s.so.1"] {
        std::fs::copy(&library, evil.join(name)).unwrap();
    }
    for program in ["mig-engine", "runc", "nvidia-modprobe", "busctl", "false"] {
        world.script(&format!("evil/{program}"), &format!("touch {}", canary.display()));
    }
    let attacked = |command: &mut Command, stdin: &[u8]| {
        let (so, dir) = (library.display(), evil.display());
        command.env_clear().current_dir(&evil).env("LD_PRELOAD", format!("{so}")).env("LD_AUDIT", format!("{so}"));
        command.env("LD_LIBRARY_PATH", format!("{dir}:.")).env("PATH", format!("{dir}:."));
        command
            .env("RUST_LOG", "trace")
            .env("RUST_BACKTRACE", "full")
            .env("DBUS_SYSTEM_BUS_ADDRESS", "unix:path=./bus");
        feed(command, stdin)
    };
    let state = json!({"ociVersion": "1.0.2", "id": "c1", "pid": std::process::id(), "bundle": evil,
        "annotations": {"mig.profile": "1g.6gb"}});
    for stage in ["precreate", "createRuntime", "prestart", "poststop", "createContainer", "startContainer", "nonsense"]
    {
        attack(&format!("environment and directory in {stage}"));
        let mut hook = Command::new(binaries().join("mig-hook"));
        let output = attacked(hook.arg("--config").arg(world.config()).arg(stage), state.to_string().as_bytes());
        assert!(!canary.exists(), "{stage} ran what is not ours: {}", text(&output));
    }
    let asked = world.bundle("b", &config(json!({"mig.profile": "1g.6gb"}), &[]));
    let asked = asked.to_str().unwrap();
    let process = world.write("process.json", "{}").display().to_string();
    let lines: [&[&str]; 8] = [
        &["create", "--bundle", asked, "c1"],
        &["run", "--bundle", asked, "c1"],
        &["restore", "--bundle", asked, "c1"],
        &["exec", "--process", &process, "c1"],
        &["state", "c1"],
        &["kill", "c1"],
        &["delete", "c1"],
        &["--mig-job", "slurm:x:1", "create", "--bundle", asked, "c1"],
    ];
    // /bin/false itself is dynamic: what it becomes under the attack is not ours, so it is told from us by a static one.
    let stand_in = world.write("stand-in.c", "int main(void) { return 1; }\n");
    let runtime = world.path("stand-in");
    let built = run(Command::new("cc").args(["-static", "-o"]).arg(&runtime).arg(stand_in));
    if !built.status.success() {
        return skip(NAME, "no static libc");
    }
    world.settings(&format!("[runtime]\npath = \"{}\"", runtime.display()));
    for line in lines {
        attack(&format!("environment and directory in {line:?}"));
        let output = attacked(&mut world.shim_command(line), b"");
        assert!(!canary.exists(), "{line:?} ran what is not ours: {}", text(&output));
    }
    run(Command::new("/bin/true").env("LD_PRELOAD", &library));
    assert!(canary.exists(), "the attack works where it can");
}
