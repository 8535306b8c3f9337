//! Real containers: runc, crun, podman, docker and containerd with our binaries as they are, on a simulated machine.
//!
//! They live in the engines' world of scripts/engines.sh, with a machine of its own for each test. A run that finds itself
//! outside starts itself again inside. What this machine can't run is noted as skipped, with the reason.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "containers/attack.rs"]
mod attack;
#[path = "containers/cdi.rs"]
mod cdi;
#[path = "containers/cgroup2.rs"]
mod cgroup2;
#[path = "containers/classic.rs"]
mod classic;
mod common;
#[path = "containers/compose.rs"]
mod compose;
#[path = "containers/configured.rs"]
mod configured;
#[path = "containers/containerd.rs"]
mod containerd;
#[path = "containers/cri.rs"]
mod cri;
#[path = "containers/crowd.rs"]
mod crowd;
#[path = "containers/daemon.rs"]
mod daemon;
#[path = "containers/docker.rs"]
mod docker;
#[path = "containers/driver.rs"]
mod driver;
#[path = "containers/hostile.rs"]
mod hostile;
#[path = "containers/killed.rs"]
mod killed;
#[path = "containers/kubernetes.rs"]
mod kubernetes;
#[path = "containers/names.rs"]
mod names;
#[path = "containers/podman.rs"]
mod podman;
#[path = "containers/pods.rs"]
mod pods;
#[path = "containers/rootless.rs"]
mod rootless;
#[path = "containers/runtimes.rs"]
mod runtimes;
#[path = "containers/systemd.rs"]
mod systemd;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Deref;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::{LazyLock, Mutex};
use std::time::{Duration, Instant};

use common::{DEMO, World, binaries, run, text, wait_for};
use serde_json::{Value, json};

const ENGINES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/engines.sh");
const IMAGE: &str = "localhost/busybox";
/// How long an engine may take to notice an end.
const SOON: Duration = Duration::from_secs(20);
/// What most containers do: say what they see, then wait.
const PROBE_AND_WAIT: &str = "mig-probe; echo probed; exec sleep 600";

/// The directory of the engines' world; why there is none.
static WORLD: LazyLock<Result<PathBuf, String>> = LazyLock::new(|| {
    if let Some(dir) = std::env::var_os("ENG_DIR") {
        return Ok(dir.into());
    }
    let why = Command::new(ENGINES).arg("why-not").output().map_err(|e| format!("{ENGINES}: {e}"))?;
    let why = String::from_utf8_lossy(&why.stdout).trim().to_owned();
    if !why.is_empty() {
        return Err(why);
    }
    let mut command = Command::new(ENGINES);
    command.args(["isolate", ENGINES, "with", "podman docker"]).args(std::env::args_os());
    Err(format!("cannot start again in the engines' world: {}", command.exec()))
});

/// Held while daemon.json is changed: how many runtimes were added to it.
static DAEMON: Mutex<u32> = Mutex::new(0);

/// Notes that this test, or what is left of it, can't run here.
fn skip(why: &str) -> Option<Site> {
    common::skip(std::thread::current().name().unwrap_or("containers"), why);
    None
}

/// Whether cgroup v2 is all that this world has.
fn cgroup_v2() -> bool {
    Path::new("/sys/fs/cgroup/cgroup.controllers").exists()
}

/// A simulated machine of its own, settings, state, and the engines to run containers with.
struct Site {
    world: World,
    dir: PathBuf,
}

impl Deref for Site {
    type Target = World;
    fn deref(&self) -> &World {
        &self.world
    }
}

impl Site {
    /// The machine of the demo. `None`, and noted, where real containers or one of these engines can't be had.
    fn new(engines: &[&str]) -> Option<Site> {
        Site::with(engines, &[])
    }

    /// The same with more options for `nvml-sim create`.
    fn with(engines: &[&str], options: &[&str]) -> Option<Site> {
        Site::of(&DEMO, engines, options)
    }

    /// The same with these boards.
    fn of(boards: &[&str], engines: &[&str], options: &[&str]) -> Option<Site> {
        let dir = match WORLD.as_ref() {
            Ok(dir) => dir.clone(),
            Err(why) => return skip(why),
        };
        let there = |engine: &str| match engine {
            "podman" | "docker" | "ctr" => dir.join("bin").join(engine).exists(),
            runtime => found(runtime).is_some(),
        };
        if !dir.join("rootfs.tar").exists() {
            return skip("the image could not be made");
        }
        if let Some(missing) = ["runc"].iter().chain(engines).find(|engine| !there(engine)) {
            return skip(&format!("{missing} is not installed or does not work here"));
        }
        let site = Site { world: World::with(boards, options), dir };
        site.settings(&format!("[runtime]\npath = \"{}\"", installed("runc").display()));
        let hook = include_str!("../hooks/mig-hook-precreate.json.in");
        let mut hook: Value = serde_json::from_str(hook).unwrap();
        hook["hook"]["path"] = json!(binaries().join("mig-hook"));
        hook["hook"]["args"] = json!(["mig-hook", "--config", site.config(), "precreate"]);
        site.write("hooks.d/mig-hook-precreate.json", &hook.to_string());
        let world = std::fs::read_to_string(site.dir.join("podman/containers.conf")).unwrap_or_default();
        let hooks = site.dir.join("podman/hooks.d").display().to_string();
        site.write("containers.conf", &world.replace(&hooks, &site.shown("hooks.d")));
        Some(site)
    }

    /// The same on cgroup v2. Where that is not what this world has, the test is started again in one that does, and is
    /// over here. One that runs nowhere else has `on_cgroup_v2` in its name, by which scripts/test-engines knows it.
    fn on_cgroup_v2(engines: &[&str]) -> Option<Site> {
        if WORLD.is_err() || cgroup_v2() {
            return Site::new(engines);
        }
        let why = must(Command::new(ENGINES).arg("why-not").env("ENG_CGROUPS", "2"));
        if !why.is_empty() {
            return skip(why.trim());
        }
        let needed: Vec<&str> = engines.iter().copied().filter(|e| ["podman", "docker"].contains(e)).collect();
        let mut again = Command::new(ENGINES);
        again.env("ENG_CGROUPS", "2").args(["isolate", ENGINES, "with", &needed.join(" ")]);
        again.arg(std::env::current_exe().unwrap()).args(["--exact", std::thread::current().name().unwrap()]);
        // More than one, or the test would run in the main thread and not know its name.
        again.args(["--test-threads", "2"]);
        let output = again.stdin(Stdio::null()).output().unwrap();
        let said = text(&output);
        // Set in, so that whoever counts results counts one.
        assert!(
            output.status.success() && said.contains("test result: ok. 1 passed"),
            "on cgroup v2:\n    {}",
            said.replace('\n', "\n    ")
        );
        None
    }

    /// podman with our precreate hook in a directory that containers.conf names, and that runtime below it.
    fn podman(&self, runtime: &str) -> Engine<'_> {
        let env = vec![("ENG_RUNTIME", runtime.to_owned()), ("ENG_CONF", self.shown("containers.conf"))];
        Engine { site: self, program: self.dir.join("bin/podman"), env, runtime: None }
    }

    /// The same with a store of this test's own: every podman that starts takes the others' directories from mapped users
    /// again.
    fn podman_alone(&self, runtime: &str) -> Engine<'_> {
        let store = self.dir.join(self.path("").file_name().unwrap());
        std::fs::create_dir_all(&store).unwrap();
        let mut podman = self.podman(runtime);
        podman.env.push(("ENG_STORE", store.display().to_string()));
        podman.ok(&["import", "-q", &self.dir.join("rootfs.tar").display().to_string(), IMAGE]);
        podman
    }

    /// podman without our hook, and our shim with these options as the runtime `mig` of its containers.conf.
    fn podman_by_shim(&self, options: &str) -> Engine<'_> {
        let world = std::fs::read_to_string(self.dir.join("podman/containers.conf")).unwrap();
        let runtimes = format!("{world}[engine.runtimes]\nmig = [{:?}]\n", self.wrapper(options));
        let conf = self.write("by-shim.conf", &runtimes).display().to_string();
        let env = vec![("ENG_RUNTIME", "mig".to_owned()), ("ENG_CONF", conf)];
        Engine { site: self, program: self.dir.join("bin/podman"), env, runtime: None }
    }

    /// docker with our shim, with these options, as a runtime that is chosen for each container that asks.
    fn docker(&self, options: &[&str]) -> Engine<'_> {
        let mut count = DAEMON.lock().unwrap();
        *count += 1;
        let name = format!("mig{count}");
        let file = self.dir.join("daemon.json");
        let mut settings: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
        let mut args = vec![format!("--mig-config={}", self.config().display())];
        args.extend(options.iter().map(|o| (*o).to_owned()));
        settings["runtimes"][&name] = json!({"path": binaries().join("mig-runtime"), "runtimeArgs": args});
        std::fs::write(&file, settings.to_string()).unwrap();
        must(Command::new(ENGINES).arg("reload"));
        Engine { site: self, program: self.dir.join("bin/docker"), env: vec![], runtime: Some(name) }
    }

    /// For engines that take a runtime's path and no options for it: a script that adds ours.
    fn wrapper(&self, options: &str) -> PathBuf {
        let (shim, config) = (binaries().join("mig-runtime"), self.config());
        self.script(
            "mig-runtime",
            &format!("exec {} --mig-config {} {options} \"$@\"", shim.display(), config.display()),
        )
    }

    fn shown(&self, relative: &str) -> String {
        self.path(relative).display().to_string()
    }

    /// Below which our containers' cgroups are: where the engines' world looks for what is left. No two tests share one.
    fn cgroup(&self, name: &str) -> String {
        let [world, site] = [&self.dir, &self.path("")].map(|path| path.file_name().unwrap().display().to_string());
        format!("/{world}/{site}-{name}")
    }

    /// Waits until nothing is leased and nothing is cut.
    fn clean(&self, when: &str) {
        let until = Instant::now() + SOON;
        while Instant::now() < until && !(self.leases().is_empty() && self.instances().is_empty()) {
            std::thread::sleep(Duration::from_millis(50));
        }
        self.assert_clean(when);
    }

    /// The same but for instances of others, as many.
    fn clean_but(&self, foreign: usize) {
        wait_for("the slices' end", SOON, || self.leases().is_empty() && self.instances().len() == foreign);
    }

    /// `migctl gc`: the results, a word for each lease.
    fn gc(&self) -> Vec<String> {
        let body = self.document(&["gc"]);
        let actions = body["actions"].as_array().unwrap().iter();
        actions.map(|a| a["result"].as_str().unwrap().to_owned()).collect()
    }

    /// How many audit lines of that event there are.
    fn audited(&self, event: &str) -> usize {
        self.audit().iter().filter(|line| line["event"] == event).count()
    }

    /// A container saw these slices, in this order, as the simulator and our records know them; every node of them opens,
    /// and there is no other.
    fn assert_given(&self, probe: &Probe, profiles: &[&str]) {
        let machine = self.machine();
        let majors = &machine["majors"];
        let uuids: Vec<&str> = probe.variable("MIG_DEVICE_UUIDS").split(',').collect();
        let mut nodes = BTreeMap::from([
            ("/dev/nvidiactl".to_owned(), format!("{}:255", majors["nvidia"])),
            ("/dev/nvidia-uvm".to_owned(), format!("{}:0", majors["uvm"])),
            ("/dev/nvidia-uvm-tools".to_owned(), format!("{}:1", majors["uvm"])),
        ]);
        let mut found = Vec::new();
        for (gpu, instance) in instances_of(&machine) {
            let compute = &instance["compute_instances"][0];
            let uuid = compute["uuid"].as_str().unwrap();
            if !uuids.contains(&uuid) {
                continue;
            }
            let minor = &gpu["minor"];
            nodes.insert(format!("/dev/nvidia{minor}"), format!("{}:{minor}", majors["nvidia"]));
            for cap in [&instance["cap_minor"], &compute["cap_minor"]] {
                nodes.insert(format!("/dev/nvidia-caps/nvidia-cap{cap}"), format!("{}:{cap}", majors["caps"]));
            }
            found.push(uuid.to_owned());
        }
        assert_eq!(found.iter().collect::<BTreeSet<_>>().len(), profiles.len(), "slices of {probe:?}\n{machine:#}");
        let expected: BTreeMap<String, (String, String)> =
            nodes.into_iter().map(|(path, device)| (path, (device, "allowed".to_owned()))).collect();
        assert_eq!(probe.nodes, expected);
        let variables = BTreeMap::from(
            [
                ("CUDA_VISIBLE_DEVICES", uuids.join(",")),
                ("NVIDIA_VISIBLE_DEVICES", "void".to_owned()),
                ("MIG_DEVICE_UUIDS", uuids.join(",")),
                ("MIG_DEVICE_PROFILES", profiles.join(",")),
            ]
            .map(|(key, value)| (key.to_owned(), value)),
        );
        assert_eq!(probe.variables, variables);
        let leases = self.leases();
        let slices: Vec<&Value> = leases.iter().flat_map(|l| l["slices"].as_array().unwrap()).collect();
        for (uuid, profile) in uuids.iter().zip(profiles) {
            let slice = slices.iter().find(|s| s["uuid"] == **uuid).unwrap_or_else(|| panic!("{uuid} in {leases:#?}"));
            assert_eq!(slice["profile_name"], *profile, "{slice:#}");
        }
    }

    /// Devices that a container with these nodes must not open: the other GPUs, every other slice that there is, the
    /// capabilities for configuring (1) and for watching (2), and one of a slice that is not there.
    fn others(&self, probe: &Probe) -> Vec<String> {
        let machine = self.machine();
        let (nvidia, caps) = (&machine["majors"]["nvidia"], &machine["majors"]["caps"]);
        let gpus = machine["gpus"].as_array().unwrap().iter().map(|gpu| format!("{nvidia}:{}", gpu["minor"]));
        let mut devices: BTreeSet<String> = gpus.collect();
        devices.extend(["1", "2", "4000"].map(|minor| format!("{caps}:{minor}")));
        for (_, instance) in instances_of(&machine) {
            devices.insert(format!("{caps}:{}", instance["cap_minor"]));
            devices.insert(format!("{caps}:{}", instance["compute_instances"][0]["cap_minor"]));
        }
        devices.into_iter().filter(|device| probe.nodes.values().all(|(own, _)| own != device)).collect()
    }

    /// A container may open what it was given, and nothing else: `try_devices` makes a node for each device in it and
    /// tries to open that.
    fn assert_confined(&self, probe: &Probe, try_devices: impl Fn(&[String]) -> BTreeMap<String, String>) {
        let own: Vec<String> = probe.nodes.values().map(|(device, _)| device.clone()).collect();
        let others = self.others(probe);
        let verdicts = try_devices(&[own.clone(), others.clone()].concat());
        let expected: BTreeMap<String, String> = own
            .into_iter()
            .map(|d| (d, "allowed".into()))
            .chain(others.into_iter().map(|d| (d, "denied".into())))
            .collect();
        assert_eq!(verdicts, expected);
    }
}

fn instances_of(machine: &Value) -> impl Iterator<Item = (&Value, &Value)> {
    let gpus = machine["gpus"].as_array().unwrap().iter();
    gpus.flat_map(|gpu| gpu["gpu_instances"].as_array().unwrap().iter().map(move |instance| (gpu, instance)))
}

/// podman or docker.
struct Engine<'a> {
    site: &'a Site,
    program: PathBuf,
    env: Vec<(&'static str, String)>,
    /// docker's name for our shim: then requests are variables; with podman they are annotations.
    runtime: Option<String>,
}

impl Engine<'_> {
    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command.envs(self.env.iter().map(|(k, v)| (k, v))).args(args);
        command
    }

    fn run(&self, args: &[&str]) -> Output {
        run(&mut self.command(args))
    }

    /// Takes a container away. podman fails where the mount of its /dev/shm is in a mount namespace that somebody has just
    /// made, for as long as that lives: containers of other tests.
    fn remove(&self, id: &str) {
        let busy = || {
            let output = run(&mut self.command(&["rm", "-f", id]));
            assert!(output.status.success() || text(&output).contains("resource busy"), "{}", text(&output));
            !output.status.success()
        };
        common::wait_for("the end of its mounts", Duration::from_secs(20), || !busy());
    }

    /// Standard output of what must succeed.
    fn ok(&self, args: &[&str]) -> String {
        must(&mut self.command(args))
    }

    /// podman before 5.0 reads --annotation as a line of CSV: https://github.com/containers/podman/pull/20945
    fn reads_csv(&self) -> bool {
        let version = self.ok(&["--version"]);
        version.trim_start_matches("podman version ").split('.').next().unwrap().parse::<u32>().unwrap() < 5
    }

    /// The options by which this engine's user asks, `mig.profile=1g.10gb` and so on.
    fn asking(&self, requests: &[&str]) -> Vec<String> {
        let variable = |request: &&str| {
            let (key, value) = request.split_once('=').unwrap();
            format!("{}={value}", key.to_uppercase().replace('.', "_"))
        };
        let csv = self.runtime.is_none() && self.reads_csv();
        let annotation = |r: &&str| if csv && r.contains(',') { format!("\"{r}\"") } else { (*r).to_owned() };
        match &self.runtime {
            None => requests.iter().flat_map(|r| ["--annotation".into(), annotation(r)]).collect(),
            Some(name) => {
                let given = requests.iter().flat_map(|r| ["-e".into(), variable(r)]);
                ["--runtime".into(), name.clone()].into_iter().chain(given).collect()
            }
        }
    }

    /// The command line of `run OPTIONS IMAGE COMMAND` with a request.
    fn request(&self, requests: &[&str], options: &[&str], words: &[&str]) -> Command {
        let mut command = self.command(&["run"]);
        command.args(self.asking(requests)).args(options);
        // The image last before the command, unless the options name another.
        if !options.last().is_some_and(|last| last.starts_with("localhost/")) {
            command.arg(IMAGE);
        }
        command.args(words);
        command
    }

    /// Starts a container that tells what it sees and waits. Its id. It may make nodes, so that it can try what it was
    /// not given.
    fn start(&self, requests: &[&str]) -> String {
        self.start_with(requests, PROBE_AND_WAIT)
    }

    fn start_with(&self, requests: &[&str], script: &str) -> String {
        must(&mut self.request(requests, &["-d", "--cap-add", "MKNOD"], &["sh", "-c", script])).trim().to_owned()
    }

    /// What the first process of a container saw.
    fn probe(&self, id: &str) -> Probe {
        let mut log = String::new();
        wait_for("the container's probe", SOON, || {
            log = text(&self.run(&["logs", id]));
            log.contains("\nprobed")
        });
        Probe::read(&log)
    }

    /// Makes a node for each device in a running container and tries to open it: device to verdict.
    fn try_devices(&self, id: &str, devices: &[String]) -> BTreeMap<String, String> {
        let mut args = vec!["exec", id, "mig-probe"];
        args.extend(devices.iter().map(String::as_str));
        Probe::verdicts(&self.ok(&args))
    }

    /// The container may open what it was given, and nothing else.
    fn assert_confined(&self, id: &str, probe: &Probe) {
        self.site.assert_confined(probe, |devices| self.try_devices(id, devices));
    }

    /// A field of `inspect`.
    fn inspect(&self, id: &str, field: &str) -> String {
        self.ok(&["inspect", "--format", &format!("{{{{{field}}}}}"), id]).trim().to_owned()
    }

    /// Why docker can't be asked by annotation: that needs API 1.43 (docker 24).
    fn hears_annotations(&self) -> Result<(), String> {
        let api = self.ok(&["version", "--format", "{{.Server.APIVersion}} {{.Client.APIVersion}}"]);
        let minor = |version: &str| version.trim_start_matches("1.").parse::<u32>().unwrap();
        match api.split_whitespace().map(minor).min() {
            Some(43..) => Ok(()),
            _ => Err(format!("docker's API is {} here, and has annotations from 1.43 on", api.trim())),
        }
    }

    fn pid(&self, id: &str) -> u32 {
        self.inspect(id, ".State.Pid").parse().unwrap()
    }

    /// The container's command line is refused with these words; nothing is held for it.
    fn assert_refused(&self, requests: &[&str], options: &[&str], words: &[&str]) -> Output {
        let before = (self.site.leases().len(), self.site.instances().len());
        let output = run(&mut self.request(requests, options, &["true"]));
        assert!(!output.status.success(), "{requests:?} {options:?} should be refused: {}", text(&output));
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        for word in words {
            assert!(said.contains(word), "{requests:?} {options:?}: {word:?} is not in: {said}");
        }
        assert_eq!((self.site.leases().len(), self.site.instances().len()), before, "{requests:?} {options:?}");
        output
    }
}

/// What mig-probe says (scripts/engines.sh).
#[derive(Debug, Default)]
struct Probe {
    /// Path to device and verdict.
    nodes: BTreeMap<String, (String, String)>,
    variables: BTreeMap<String, String>,
}

impl Probe {
    fn read(said: &str) -> Probe {
        let mut probe = Probe::default();
        for line in said.lines() {
            let words: Vec<&str> = line.split_whitespace().collect();
            match (words.as_slice(), line.split_once('=')) {
                ([path, device, verdict @ ..], _) if path.starts_with("/dev/") => {
                    probe.nodes.insert((*path).to_owned(), ((*device).to_owned(), verdict.join(" ")));
                }
                (_, Some((key, value))) if key.starts_with(|c: char| c.is_ascii_uppercase()) => {
                    probe.variables.insert(key.to_owned(), value.to_owned());
                }
                _ => {}
            }
        }
        probe
    }

    fn verdicts(said: &str) -> BTreeMap<String, String> {
        let words = said.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
        let foreign = words.filter(|w| w.first() == Some(&"foreign") && w.len() > 2);
        foreign.map(|w| (w[1].to_owned(), w[2..].join(" "))).collect()
    }

    fn variable(&self, name: &str) -> &str {
        self.variables.get(name).unwrap_or_else(|| panic!("no {name}: {self:?}"))
    }

    fn is_empty(&self) -> bool {
        self.nodes.is_empty() && self.variables.is_empty()
    }
}

/// Standard output of a command that must succeed.
fn must(command: &mut Command) -> String {
    let output = run(command);
    assert!(output.status.success(), "{command:?}: {}", text(&output));
    String::from_utf8(output.stdout).unwrap()
}

/// Waits for a command whose children may keep its standard output (`runc create`: the container itself). What it and
/// they have said until then.
fn detached(command: &mut Command, log: &Path) -> (bool, String) {
    let file = std::fs::File::create(log).unwrap();
    let mut child =
        command.stdin(Stdio::null()).stdout(file.try_clone().unwrap()).stderr(file).spawn().expect("it starts");
    let mut status = None;
    wait_for("the command", Duration::from_secs(60), || {
        status = child.try_wait().unwrap();
        status.is_some()
    });
    (status.unwrap().success(), std::fs::read_to_string(log).unwrap())
}

fn kill(pid: u32) {
    must(Command::new("kill").args(["-KILL", &pid.to_string()]));
}

/// Pids of the processes whose command line has all these words.
fn pids_of(words: &[&str]) -> Vec<u32> {
    let processes = std::fs::read_dir("/proc").unwrap().flatten();
    let pid = |entry: std::fs::DirEntry| {
        let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
        let line = String::from_utf8_lossy(&std::fs::read(entry.path().join("cmdline")).ok()?).replace('\0', " ");
        (pid != std::process::id() && words.iter().all(|word| line.contains(word))).then_some(pid)
    };
    processes.filter_map(pid).collect()
}

/// A program of the machine's, absolute; or what the engines' world has in its place.
fn found(program: &str) -> Option<PathBuf> {
    // The other wrappers there stand for engines with all their settings.
    let ours = WORLD.as_ref().ok().map(|dir| dir.join("bin")).filter(|_| program == "crun");
    let dirs = ["/usr/bin", "/usr/sbin", "/usr/local/bin", "/usr/local/sbin"].map(PathBuf::from);
    ours.into_iter().chain(dirs).map(|dir| dir.join(program)).find(|path| path.exists())
}

fn installed(program: &str) -> PathBuf {
    found(program).unwrap_or_else(|| panic!("no {program}"))
}
