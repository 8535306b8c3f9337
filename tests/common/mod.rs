//! A throw-away world: a simulated machine, settings and state in a temporary directory, and our own binaries run in it.
//!
//! Binaries are the debug ones of this build, or those of the directory that `MIG_TEST_DIST` names (as shipped).

#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, clippy::panic)] // each test file uses its part

use std::ffi::{OsStr, OsString};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

pub mod cgroup;

/// Longest run of one of our binaries.
const LIMIT: Duration = Duration::from_secs(60);

pub struct World {
    dir: tempfile::TempDir,
}

/// Two A100-80 and an H100, as in the demo.
pub const DEMO: [&str; 3] = ["a100-sxm4-80gb", "a100-sxm4-80gb", "h100-sxm-80gb"];

/// The directory with mig-hook, mig-runtime, mig-engine, migctl, nvml-sim and libnvidia_ml.so.
pub fn binaries() -> PathBuf {
    match std::env::var_os("MIG_TEST_DIST") {
        Some(dist) => dist.into(),
        None => Path::new(env!("CARGO_BIN_EXE_migctl")).parent().unwrap().to_owned(),
    }
}

/// Notes a test, or a part of one, that this machine can't run: printed, and counted by scripts/test.
pub fn skip(what: &str, why: &str) {
    let line = format!("SKIP: {what}: {why}");
    eprintln!("{line}");
    if let Some(file) = std::env::var_os("MIG_TEST_SKIPS") {
        let mut file = std::fs::OpenOptions::new().append(true).create(true).open(file).unwrap();
        writeln!(file, "{line}").unwrap();
    }
}

/// Notes an attack that this test tries: scripts/test-attack counts them. A test that notes none counts as one.
pub fn attack(what: &str) {
    if let Some(file) = std::env::var_os("MIG_TEST_ATTACKS") {
        let mut file = std::fs::OpenOptions::new().append(true).create(true).open(file).unwrap();
        let line = format!("{}: {what}\n", std::thread::current().name().unwrap_or("?"));
        file.write_all(line.as_bytes()).unwrap();
    }
}

impl World {
    /// A machine with these boards, MIG on.
    pub fn new(boards: &[&str]) -> World {
        World::with(boards, &[])
    }

    /// The same with more options for `nvml-sim create`.
    pub fn with(boards: &[&str], options: &[&str]) -> World {
        World::at(tempfile::Builder::new().prefix("mig").tempdir().unwrap(), boards, options)
    }

    /// The same in a directory that the caller has made.
    pub fn at(dir: tempfile::TempDir, boards: &[&str], options: &[&str]) -> World {
        let world = World { dir };
        let mut args = vec!["create".to_owned(), world.path("m").display().to_string()];
        args.extend(boards.iter().flat_map(|b| ["--gpu".to_owned(), (*b).to_owned()]));
        args.extend(options.iter().map(|o| (*o).to_owned()));
        let output = run(Command::new(sim()).args(&args));
        assert!(output.status.success(), "nvml-sim create: {}", text(&output));
        world.settings("");
        world
    }

    pub fn path(&self, relative: &str) -> PathBuf {
        self.dir.path().join(relative)
    }

    /// The settings file: this machine, the recording runtime, and `more` TOML tables at the end.
    pub fn settings(&self, more: &str) {
        self.driver_settings("", more);
    }

    /// The same with more keys of the table `driver`.
    pub fn driver_settings(&self, driver: &str, more: &str) {
        let dir = self.dir.path().display();
        let text = format!(
            "state_dir = \"{dir}/state\"\n[driver]\nroot = \"{dir}/m\"\nproc_root = \"{dir}/m/proc\"\ndev_root = \"{dir}/m/dev\"\n\
             {driver}\n[log]\naudit_file = \"{dir}/audit.jsonl\"\nsocket = \"{dir}/log.sock\"\n{more}\n"
        );
        self.write("config.toml", &text);
    }

    pub fn config(&self) -> PathBuf {
        self.path("config.toml")
    }

    pub fn write(&self, relative: &str, text: &str) -> PathBuf {
        let path = self.path(relative);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, text).unwrap();
        path
    }

    pub fn script(&self, relative: &str, text: &str) -> PathBuf {
        let path = self.write(relative, &format!("#!/bin/sh\n{text}\n"));
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    // ---- the simulated machine ----

    /// `nvml-sim VERB MACHINE ARGS…`; fails the test unless it succeeds.
    pub fn sim(&self, verb: &str, args: &[&str]) -> String {
        let output = run(Command::new(sim()).arg(verb).arg(self.path("m")).args(args));
        assert!(output.status.success(), "nvml-sim {verb} {args:?}: {}", text(&output));
        String::from_utf8(output.stdout).unwrap()
    }

    /// Every GPU instance that exists, as the simulator itself says.
    pub fn instances(&self) -> Vec<Value> {
        let shown: Value = serde_json::from_str(&self.sim("show", &["--json"])).unwrap();
        let gpus = shown["gpus"].as_array().unwrap();
        gpus.iter().flat_map(|gpu| gpu["gpu_instances"].as_array().unwrap().clone()).collect()
    }

    // ---- our binaries ----

    /// `migctl --config … ARGS…`
    pub fn migctl(&self, args: &[&str]) -> Output {
        run(Command::new(binaries().join("migctl")).arg("--config").arg(self.config()).args(args))
    }

    /// The `--json` document of a migctl verb that must succeed.
    pub fn document(&self, args: &[&str]) -> Value {
        let output = self.migctl(&[args, &["--json"]].concat());
        assert!(output.status.success(), "migctl {args:?}: {}", text(&output));
        serde_json::from_slice(&output.stdout).unwrap()
    }

    pub fn leases(&self) -> Vec<Value> {
        self.document(&["leases"])["leases"].as_array().unwrap().clone()
    }

    /// Result and reason of one `migctl gc` that must succeed, for each lease.
    pub fn gc(&self) -> Vec<(String, String)> {
        let word = |action: &Value, key: &str| action[key].as_str().unwrap().to_owned();
        let actions = self.document(&["gc"])["actions"].clone();
        actions.as_array().unwrap().iter().map(|action| (word(action, "result"), word(action, "reason"))).collect()
    }

    /// Nothing is held and nothing is cut.
    pub fn assert_clean(&self, when: &str) {
        assert_eq!(self.leases(), Vec::<Value>::new(), "leases left {when}");
        assert_eq!(self.instances(), Vec::<Value>::new(), "instances left {when}");
    }

    /// `mig-hook --config … ARGS…` with that standard input.
    pub fn hook(&self, args: &[&str], stdin: &[u8]) -> Output {
        let mut command = Command::new(binaries().join("mig-hook"));
        command.arg("--config").arg(self.config()).args(args);
        feed(&mut command, stdin)
    }

    /// `mig-runtime --mig-config … ARGS…` not yet started.
    pub fn shim_command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(binaries().join("mig-runtime"));
        command.arg("--mig-config").arg(self.config()).args(args);
        command
    }

    pub fn shim(&self, args: &[&str]) -> Output {
        run(&mut self.shim_command(args))
    }

    /// A stand-in low-level runtime, named in the settings, that writes what it was given below `rt/` (argv, environment,
    /// open descriptors, SIGPIPE) and ends with `code`. For what a real runtime would not show; real ones are in
    /// tests/containers.rs.
    pub fn recording_runtime(&self, code: i32) -> PathBuf {
        let dir = self.path("rt");
        std::fs::create_dir_all(&dir).unwrap();
        let d = dir.display();
        let runtime = self.script(
            "rt/runc",
            &format!(
                "printf '%s\\n' \"$@\" > {d}/argv; env > {d}/env; ls -l /proc/self/fd > {d}/fd\n\
                 grep SigIgn /proc/self/status > {d}/sigign; echo $$ > {d}/pid\nexit {code}"
            ),
        );
        self.settings(&format!("[runtime]\npath = \"{}\"", runtime.display()));
        runtime
    }

    /// What the recording runtime was given; `None` when it was not started.
    pub fn recorded(&self, what: &str) -> Option<String> {
        std::fs::read_to_string(self.path("rt").join(what)).ok()
    }

    // ---- bundles ----

    /// A bundle whose config.json is `config`.
    pub fn bundle(&self, name: &str, config: &Value) -> PathBuf {
        let dir = self.path(name);
        std::fs::create_dir_all(dir.join("rootfs")).unwrap();
        std::fs::write(dir.join("config.json"), serde_json::to_vec_pretty(config).unwrap()).unwrap();
        dir
    }

    pub fn audit(&self) -> Vec<Value> {
        let text = std::fs::read_to_string(self.path("audit.jsonl")).unwrap_or_default();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }
}

/// A config as docker writes it, less what does not matter here, with these annotations and variables.
pub fn config(annotations: Value, env: &[&str]) -> Value {
    json!({
        "ociVersion": "1.0.2",
        "process": {"terminal": false, "user": {"uid": 0, "gid": 0}, "args": ["/bin/sh"], "env": env, "cwd": "/"},
        "root": {"path": "rootfs"},
        "mounts": [{"destination": "/dev", "type": "tmpfs", "source": "tmpfs"}],
        "annotations": annotations,
        "x-future": {"kept": [1, 2.5, null, "ü"]},
        "linux": {
            "cgroupsPath": "/mig-hook-tests/none",
            "resources": {"devices": [{"allow": false, "access": "rwm"}, {"allow": true, "type": "c", "access": "m"}]},
            "namespaces": [{"type": "mount"}, {"type": "pid"}],
        },
    })
}

/// The State that runc sends.
pub fn state(id: &str, pid: u32, bundle: &Path) -> Vec<u8> {
    let state = json!({"ociVersion": "1.0.2", "id": id, "status": "creating", "pid": pid, "bundle": bundle});
    state.to_string().into_bytes()
}

/// The simulator's tool, built by `cargo build -p mig-hook-sim`.
fn sim() -> PathBuf {
    let path = binaries().join("nvml-sim");
    assert!(path.is_file(), "{} is missing: run `cargo build --workspace` first, as `make test` does", path.display());
    path
}

/// Runs to the end within the limit; the output is captured.
pub fn run(command: &mut Command) -> Output {
    finish(spawn(command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped())), command)
}

/// Starts a program that may just have been written: a child that another test is about to start has the file open for
/// writing until it has become its own program (ETXTBSY).
fn spawn(command: &mut Command) -> Child {
    for _ in 0..100 {
        match command.spawn() {
            Err(error) if error.kind() == std::io::ErrorKind::ExecutableFileBusy => {
                std::thread::sleep(Duration::from_millis(10));
            }
            started => return started.unwrap(),
        }
    }
    command.spawn().unwrap()
}

/// The same with a standard input. A child that doesn't read it is fine.
pub fn feed(command: &mut Command, stdin: &[u8]) -> Output {
    let mut child = spawn(command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()));
    let mut pipe = child.stdin.take().unwrap();
    let stdin = stdin.to_vec();
    std::thread::spawn(move || drop(pipe.write_all(&stdin)));
    finish(child, command)
}

fn finish(child: Child, command: &Command) -> Output {
    let (pid, shown) = (child.id(), format!("{command:?}"));
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::spawn(move || sender.send(child.wait_with_output()));
    match receiver.recv_timeout(LIMIT) {
        Ok(output) => output.unwrap(),
        Err(_) => {
            let _ = Command::new("kill").args(["-9", &pid.to_string()]).status();
            panic!("{shown} did not end within {LIMIT:?}");
        }
    }
}

/// Both outputs, for messages and searches.
pub fn text(output: &Output) -> String {
    format!("{}\n{}{}", output.status, String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// Waits until `done`, looking every 20 ms, at most `limit`.
pub fn wait_for(what: &str, limit: Duration, mut done: impl FnMut() -> bool) {
    let until = Instant::now() + limit;
    while !done() {
        assert!(Instant::now() < until, "{what}: not within {limit:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

pub fn os(words: &[&str]) -> Vec<OsString> {
    words.iter().map(|w| OsStr::new(w).to_owned()).collect()
}

// ---- containers that live, and what a runtime really gets ----

/// A process that stands for a container's init. Ends with the value.
pub struct Init(Child);

impl Init {
    pub fn start() -> Init {
        Init(Command::new("sleep").arg("600").stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap())
    }

    pub fn in_cgroup(cgroup: &cgroup::Cgroup) -> Init {
        Init(cgroup.start(Command::new("sleep").arg("600").stdout(Stdio::null())))
    }

    pub fn pid(&self) -> u32 {
        self.0.id()
    }
}

impl From<Child> for Init {
    fn from(child: Child) -> Init {
        Init(child)
    }
}

impl Drop for Init {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl World {
    /// A stand-in low-level runtime, named in the settings, that copies what the kernel knows of it to `rt/`: `cmdline`,
    /// `environ`, `status`, `fd` (numbers, a line each), `pid`; and ends with `code`.
    pub fn probing_runtime(&self, code: i32) -> PathBuf {
        let dir = self.path("rt");
        std::fs::create_dir_all(&dir).unwrap();
        let d = dir.display();
        let runtime = self.script(
            "rt/probe",
            &format!(
                "ls /proc/$$/fd > {d}/fd; cat /proc/$$/cmdline > {d}/cmdline; cat /proc/$$/environ > {d}/environ\n\
                 cat /proc/self/status > {d}/status; echo $$ > {d}/pid\nexit {code}"
            ),
        );
        self.settings(&format!("[runtime]\npath = \"{}\"", runtime.display()));
        runtime
    }

    /// The only lease.
    pub fn lease(&self) -> Value {
        let mut leases = self.leases();
        assert_eq!(leases.len(), 1, "one lease was expected: {leases:#?}");
        leases.remove(0)
    }

    /// A container that was created through the shim (root `root`, a runtime in the settings) and lives: its pid file names
    /// a process.
    pub fn living(&self, id: &str, config: &Value) -> (PathBuf, Init) {
        let bundle = self.bundle(id, config);
        let pid_file = bundle.join("init.pid");
        let output = self.shim(&[
            "--root",
            self.path("root").to_str().unwrap(),
            "create",
            "--bundle",
            bundle.to_str().unwrap(),
            "--pid-file",
            pid_file.to_str().unwrap(),
            id,
        ]);
        assert!(output.status.success(), "create {id}: {}", text(&output));
        let init = Init::start();
        std::fs::write(pid_file, init.pid().to_string()).unwrap();
        (bundle, init)
    }
}

/// The blocks of a Markdown page in a language, in their order.
pub fn blocks(page: &str, language: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut lines = page.lines();
    while let Some(line) = lines.next() {
        let Some(of) = line.strip_prefix("```") else { continue };
        let block: Vec<&str> = lines.by_ref().take_while(|line| *line != "```").collect();
        if of == language {
            found.push(block.join("\n"));
        }
    }
    found
}

/// The JSON document in a file.
pub fn document(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// Whether a program is in the PATH.
pub fn installed(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|dir| dir.join(program).is_file())
}

// ---- crashes and recovery ----

impl World {
    /// Everything that the simulator knows of its machine.
    pub fn machine(&self) -> Value {
        serde_json::from_str(&self.sim("show", &["--json"])).unwrap()
    }

    /// Arms one fault: `nvml-sim fault --call CALL HOW…`.
    pub fn fault(&self, call: &str, how: &[&str]) {
        self.sim("fault", &[&["--call", call], how].concat());
    }

    /// The record of a lease, on disk.
    pub fn lease_file(&self, token: &str) -> PathBuf {
        self.path("state/leases").join(format!("{token}.json"))
    }

    /// Rewrites the record of a lease, as if time had gone by or something else had happened.
    pub fn edit_lease(&self, token: &str, edit: impl FnOnce(&mut Value)) {
        let path = self.lease_file(token);
        let mut lease: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        edit(&mut lease);
        std::fs::write(&path, lease.to_string()).unwrap();
    }

    /// Opens the capability of a lease's compute instance. No driver answers for a simulated one, so by this machine's numbers
    /// it is then /dev/full.
    pub fn open_capability(&self, token: &str) -> std::fs::File {
        let devices = self.path("m/proc/devices");
        let text = std::fs::read_to_string(&devices).unwrap();
        let caps = self.machine()["majors"]["caps"].to_string();
        std::fs::write(&devices, text.replace(&format!("{caps} nvidia-caps\n"), "1 nvidia-caps\n")).unwrap();
        self.edit_lease(token, |lease| lease["slices"][0]["ci_minor"] = json!(7));
        std::fs::File::open("/dev/full").unwrap()
    }

    /// `mig-hook precreate`, started by a shell that ends with it: the owner of what it leaves is dead.
    pub fn orphaned_precreate(&self, config: &Value) -> Output {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", "\"$@\"; exit $?", "sh"]).arg(binaries().join("mig-hook"));
        command.arg("--config").arg(self.config()).arg("precreate");
        feed(&mut command, config.to_string().as_bytes())
    }

    /// What must hold at any time: every instance is one of `foreign`, unchanged, or the one slice of one lease; every
    /// Active lease has what it says; nothing that is recorded overlaps. A foreign one may be lent to one lease. Returns the
    /// leases.
    pub fn assert_consistent(&self, foreign: &[Value], when: &str) -> Vec<Value> {
        let (leases, machine) = (self.leases(), self.machine());
        let instances: Vec<(&Value, &Value)> = machine["gpus"]
            .as_array()
            .unwrap()
            .iter()
            .flat_map(|gpu| gpu["gpu_instances"].as_array().unwrap().iter().map(move |gi| (&gpu["uuid"], gi)))
            .collect();
        let slices: Vec<(&Value, &Value)> =
            leases.iter().flat_map(|l| l["slices"].as_array().unwrap().iter().map(move |s| (l, s))).collect();
        for known in foreign {
            assert!(instances.iter().any(|(_, gi)| *gi == known), "a foreign slice was touched {when}: {known}");
        }
        for (gpu, gi) in instances.iter().filter(|(_, gi)| !foreign.contains(gi)) {
            let holders = slices.iter().filter(|(_, s)| s["gpu"] == **gpu && s["placement"] == gi["placement"]).count();
            assert_eq!(holders, 1, "{holders} leases for an instance {when}: {gi}\n{leases:#?}");
        }
        for (lease, slice) in slices.iter().filter(|(lease, _)| lease["state"] == "active") {
            let made = instances.iter().find(|(gpu, gi)| slice["gpu"] == **gpu && slice["gi"] == gi["id"]);
            let (_, gi) = made.unwrap_or_else(|| panic!("an Active lease without its instance {when}: {lease}"));
            assert_eq!((&gi["placement"], &gi["profile_id"]), (&slice["placement"], &slice["profile"]), "{when}");
            let compute = gi["compute_instances"].as_array().unwrap();
            assert_eq!(compute.len(), 1, "{when}: {gi}");
            assert_eq!((&compute[0]["id"], &compute[0]["uuid"]), (&slice["ci"], &slice["uuid"]), "{when}");
            assert_eq!(
                (&gi["cap_minor"], &compute[0]["cap_minor"]),
                (&slice["gi_minor"], &slice["ci_minor"]),
                "{when}"
            );
        }
        let mut taken: Vec<(&Value, std::ops::Range<u64>)> = Vec::new();
        let is_lent = |gpu: &Value, gi: &Value| {
            slices.iter().any(|(_, s)| s["ours"] == false && s["gpu"] == *gpu && s["placement"] == gi["placement"])
        };
        let foreign_places = instances
            .iter()
            .filter(|(gpu, gi)| foreign.contains(gi) && !is_lent(gpu, gi))
            .map(|(gpu, gi)| (*gpu, &gi["placement"]));
        for (gpu, at) in slices.iter().map(|(_, s)| (&s["gpu"], &s["placement"])).chain(foreign_places) {
            let start = at["start"].as_u64().unwrap();
            let span = start..start + at["size"].as_u64().unwrap();
            let clash = taken.iter().find(|(g, t)| *g == gpu && t.start < span.end && span.start < t.end);
            assert!(clash.is_none(), "{span:?} overlaps {clash:?} {when}\n{leases:#?}");
            taken.push((gpu, span));
        }
        leases
    }
}

/// The lease that an edited config is marked with.
pub fn token_in(config: &[u8]) -> String {
    let config: Value = serde_json::from_slice(config).unwrap();
    config["annotations"]["mig.lease"].as_str().unwrap().to_owned()
}
