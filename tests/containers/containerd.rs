//! containerd by `ctr`, with a daemon of each test's own: some are killed and started again.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use serde_json::json;

use crate::common::{run, text, wait_for};
use crate::{Probe, SOON, Site, installed, kill, must, pids_of};

/// A containerd with its files in the engines' world, not in the test's directory: where a test fails, its containers'
/// roots are still mounted below them.
pub(crate) struct Containerd<'a> {
    site: &'a Site,
    dir: PathBuf,
    daemon: Child,
}

impl<'a> Containerd<'a> {
    /// Without the CRI.
    fn new(site: &'a Site) -> Containerd<'a> {
        let off = "[\"io.containerd.grpc.v1.cri\", \"io.containerd.cri.v1.images\", \"io.containerd.cri.v1.runtime\"]";
        Containerd::with(site, &format!("version = 2\ndisabled_plugins = {off}"))
    }

    /// With these settings.
    pub(crate) fn with(site: &'a Site, settings: &str) -> Containerd<'a> {
        let dir = site.dir.join(unique("containerd"));
        std::fs::create_dir_all(&dir).unwrap();
        let at = dir.display();
        // Before the first table; and nothing outside the directory (/opt/containerd, /run/nri).
        let (version, rest) = settings.split_once('\n').unwrap();
        let text = format!(
            "{version}\nroot = \"{at}/root\"\nstate = \"{at}/state\"\n{rest}\n\
             [grpc]\naddress = \"{at}/c.sock\"\n[ttrpc]\naddress = \"{at}/c.ttrpc\"\n\
             [plugins.\"io.containerd.internal.v1.opt\"]\npath = \"{at}/opt\"\n\
             [plugins.\"io.containerd.nri.v1.nri\"]\ndisable = true\n"
        );
        std::fs::write(dir.join("config.toml"), text).unwrap();
        let daemon = daemon(&dir);
        let containerd = Containerd { site, dir, daemon };
        containerd.wait();
        containerd
    }

    fn wait(&self) {
        wait_for("containerd answers", SOON, || run(&mut self.ctr(&["version"])).status.success());
    }

    /// 1 or 2.
    pub(crate) fn major() -> u32 {
        let said = must(Command::new(installed("containerd")).arg("--version"));
        let version = said.split_whitespace().nth(2).unwrap().trim_start_matches('v');
        version.split('.').next().unwrap().parse().unwrap()
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.dir.join("c.sock")
    }

    pub(crate) fn ctr(&self, words: &[&str]) -> Command {
        let mut command = Command::new(installed("ctr"));
        command.arg("--address").arg(self.socket()).args(words);
        command
    }

    /// As by `kill -9`; the containers and their shims live on.
    pub(crate) fn kill(&mut self) {
        self.daemon.kill().unwrap();
        self.daemon.wait().unwrap();
    }

    pub(crate) fn start_again(&mut self) {
        self.daemon = daemon(&self.dir);
        self.wait();
    }

    /// `ctr run OPTIONS ROOTFS ID WORDS…`. ctr takes the path of a runtime and no options for it, hence the wrapper.
    fn run(&self, annotations: &[&str], options: &[&str], id: &str, words: &[&str]) -> Command {
        let mut command = self.ctr(&["run", "--runc-binary"]);
        command.arg(self.site.path("mig-runtime"));
        command.args(annotations.iter().flat_map(|a| ["--annotation", a]));
        // ctr asks for CPU shares unless told not to, and a cgroup v2 tree may have no such controller.
        command.args(["--cgroup", &self.site.cgroup(id), "--cpu-shares", "0"]);
        command.args(["--null-io", "--env", "PATH=/bin"]).args(options);
        command.arg("--rootfs").arg(self.site.dir.join("rootfs")).arg(id).args(words);
        command
    }

    /// A container with a slice, asleep.
    fn asleep(&self, id: &str) {
        must(&mut self.run(&[ASK], &["-d"], id, &["/bin/sleep", "600"]));
    }

    /// The container's output goes to containerd's log fifo; what it sees is taken from a session in it.
    fn probe(&self, id: &str) -> Probe {
        Probe::read(&must(&mut self.ctr(&["task", "exec", "--exec-id", &unique("x"), id, "/bin/mig-probe"])))
    }

    /// The pid and the status of a task.
    fn task(&self, id: &str) -> (u32, String) {
        let tasks = must(&mut self.ctr(&["task", "ls"]));
        let mut tasks = tasks.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
        let task = tasks.find(|words| words[0] == id).unwrap_or_else(|| panic!("no task {id}"));
        (task[1].parse().unwrap(), task[2].to_owned())
    }

    fn init(&self, id: &str) -> u32 {
        self.task(id).0
    }

    fn remove(&self, id: &str) {
        must(&mut self.ctr(&["container", "delete", id]));
    }
}

impl Drop for Containerd<'_> {
    fn drop(&mut self) {
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
    }
}

fn daemon(dir: &Path) -> Child {
    let log = File::options().create(true).append(true).open(dir.join("log")).unwrap();
    let mut command = Command::new(installed("containerd"));
    command.arg("--config").arg(dir.join("config.toml")).stdin(Stdio::null());
    command.stdout(log.try_clone().unwrap()).stderr(log).spawn().unwrap()
}

/// Names that no other test of this run uses: containerds share the directory of runc's states.
fn unique(name: &str) -> String {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    format!("{name}-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed))
}

pub(crate) fn shim_of(id: &str) -> u32 {
    let shims = pids_of(&["containerd-shim", &format!("-id {id} ")]);
    assert_eq!(shims.len(), 1, "the shim of {id}");
    shims[0]
}

const ASK: &str = "mig.profile=1g.10gb";

fn site() -> Option<Site> {
    let site = Site::new(&["containerd"])?;
    site.wrapper("");
    Some(site)
}

#[test]
fn one_that_asks_beside_one_that_does_not() {
    beside_one_that_does_not_ask(Site::new(&["containerd"]));
}

pub fn beside_one_that_does_not_ask(site: Option<Site>) {
    let Some(site) = site else { return };
    site.wrapper("");
    let containerd = Containerd::new(&site);
    let (asks, other) = (unique("asks"), unique("other"));
    must(&mut containerd.run(&[], &["-d"], &other, &["/bin/sleep", "600"]));
    assert!(!site.path("state").exists(), "what asks for nothing makes no state");
    containerd.asleep(&asks);
    assert_eq!(site.lease()["holder"]["container"], json!(asks));
    let seen = containerd.probe(&asks);
    site.assert_given(&seen, &["1g.10gb"]);
    site.assert_confined(&seen, |devices| {
        let exec = unique("x");
        let mut words = vec!["task", "exec", "--exec-id", &exec, &asks, "/bin/mig-probe"];
        words.extend(devices.iter().map(String::as_str));
        Probe::verdicts(&must(&mut containerd.ctr(&words)))
    });
    let nothing = containerd.probe(&other);
    assert!(nothing.is_empty(), "{nothing:?}");
    for id in [&asks, &other] {
        must(&mut containerd.ctr(&["task", "delete", "--force", id]));
        containerd.remove(id);
    }
    site.assert_clean("when task delete --force returns");
}

#[test]
fn every_end_gives_the_slice_back() {
    let Some(site) = site() else { return };
    let containerd = Containerd::new(&site);
    for code in [0, 3] {
        let output =
            run(&mut containerd.run(&[ASK], &["--rm"], &unique("exit"), &["/bin/sh", "-c", &format!("exit {code}")]));
        assert_eq!(output.status.code(), Some(code), "{}", text(&output));
        site.assert_clean(&format!("when run --rm returns with {code}"));
    }
    let bad = unique("bad");
    let output = run(&mut containerd.run(&[ASK], &[], &bad, &["/nonexistent"]));
    assert!(!output.status.success() && text(&output).contains("/nonexistent"), "{}", text(&output));
    site.assert_clean("after a command that is not there");

    // A stopped task that nobody deletes: containerd calls nothing then, gc sees that its first process is dead.
    for kill_init in [false, true] {
        let id = unique("stopped");
        containerd.asleep(&id);
        if kill_init {
            kill(containerd.init(&id));
        } else {
            must(&mut containerd.ctr(&["task", "kill", "--signal", "KILL", &id]));
        }
        wait_for("the end of the task", SOON, || containerd.task(&id).1 == "STOPPED");
        assert_eq!(site.leases().len(), 1, "held until the task is deleted, or gc comes");
        if kill_init {
            assert_eq!(site.gc(), ["freed"]);
            site.assert_clean("after gc");
        }
        must(&mut containerd.ctr(&["task", "delete", &id]));
        site.assert_clean("when task delete returns");
        // The same container again: a new create, a new slice.
        must(&mut containerd.ctr(&["task", "start", "--detach", "--null-io", &id]));
        site.assert_given(&containerd.probe(&id), &["1g.10gb"]);
        must(&mut containerd.ctr(&["task", "delete", "--force", &id]));
        site.assert_clean("when task delete --force returns");
        containerd.remove(&id);
    }
    assert_eq!(site.audited("grant"), site.audited("release"));
}

#[test]
fn a_refusal_is_in_ctrs_own_error() {
    let Some(site) = site() else { return };
    let containerd = Containerd::new(&site);
    let output = run(&mut containerd.run(&["mig.profile=3g.13gb"], &["--rm"], &unique("bad"), &["/bin/true"]));
    assert!(!output.status.success(), "{}", text(&output));
    for word in ["mig: ", "3g.13gb", "1g.10gb"] {
        assert!(text(&output).contains(word), "{word} is not in {}", text(&output));
    }
    site.assert_clean("after a refusal");
    // ctr can't pass --mig-env: the environment never counts.
    let id = unique("env");
    must(&mut containerd.run(&[], &["-d", "--env", "MIG_PROFILE=1g.10gb"], &id, &["/bin/sleep", "600"]));
    assert!(containerd.probe(&id).is_empty());
    must(&mut containerd.ctr(&["task", "delete", "--force", &id]));
    assert!(!site.path("state/leases").exists() || site.leases().is_empty());
}

#[test]
fn a_killed_shim_frees_its_slice() {
    let Some(site) = site() else { return };
    let containerd = Containerd::new(&site);
    let id = unique("shim");
    containerd.asleep(&id);
    kill(shim_of(&id));
    site.clean("after kill -9 of the containerd shim, without gc");
}

#[test]
fn a_container_outlives_a_killed_containerd_and_keeps_its_slice_until_it_ends() {
    let Some(site) = site() else { return };
    let mut containerd = Containerd::new(&site);
    let (first, second) = (unique("first"), unique("second"));
    containerd.asleep(&first);
    containerd.asleep(&second);
    let init = containerd.init(&second);
    containerd.kill();
    assert_eq!(site.gc(), ["kept", "kept"], "their first processes live");
    kill(init);
    wait_for("what ends while containerd is away is freed by gc", SOON, || site.gc().contains(&"freed".to_owned()));
    assert_eq!(site.lease()["holder"]["container"], json!(first));
    containerd.start_again();
    assert_eq!(site.gc(), ["kept"]);
    site.assert_given(&containerd.probe(&first), &["1g.10gb"]);
    must(&mut containerd.ctr(&["task", "delete", "--force", &first]));
    site.assert_clean("when task delete --force returns");
}

#[test]
fn when_everything_above_the_container_is_killed_containerd_cleans_up_at_its_next_start() {
    let Some(site) = site() else { return };
    let mut containerd = Containerd::new(&site);
    let id = unique("all");
    containerd.asleep(&id);
    let (shim, init) = (shim_of(&id), containerd.init(&id));
    containerd.kill();
    kill(shim);
    kill(init);
    containerd.start_again();
    site.clean("after containerd started again, without gc");
}

#[test]
fn a_create_killed_while_it_cuts_is_undone_by_gc() {
    let Some(site) = site() else { return };
    let mut containerd = Containerd::new(&site);
    let id = unique("cut");
    site.fault("nvmlGpuInstanceCreateComputeInstance*", &["--delay-ms", "1500"]);
    let mut command = containerd.run(&[ASK], &["-d"], &id, &["/bin/sleep", "600"]);
    let mut ctr = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    wait_for("a GPU instance", SOON, || !site.instances().is_empty());
    containerd.kill();
    kill(shim_of(&id));
    assert!(!ctr.wait().unwrap().success());
    // The runtime dies with its containerd shim (go-runc sets a parent-death signal): half a slice is left.
    wait_for("the end of the create", SOON, || pids_of(&["create", &id]).is_empty());
    assert_eq!((site.leases().len(), site.instances().len()), (1, 1));
    containerd.start_again();
    assert_eq!(site.gc(), ["freed"]);
    site.assert_clean("after gc");
}

#[test]
fn one_id_in_two_namespaces_is_two_containers() {
    let Some(site) = site() else { return };
    let containerd = Containerd::new(&site);
    let id = unique("same");
    let ctr = |namespace: &str, words: &[&str]| {
        let mut command = containerd.ctr(&["--namespace", namespace]);
        command.args(words);
        command
    };
    let wrapper = site.shown("mig-runtime");
    let root = site.dir.join("rootfs").display().to_string();
    for namespace in ["one", "two"] {
        let cgroup = site.cgroup(&format!("{id}-{namespace}"));
        let run = ["run", "--runc-binary", &wrapper, "--annotation", ASK, "--cgroup", &cgroup, "--cpu-shares", "0"];
        must(&mut ctr(
            namespace,
            &[&run[..], &["--null-io", "-d", "--rootfs", &root, &id, "/bin/sleep", "600"]].concat(),
        ));
    }
    let leases = site.leases();
    assert_eq!(leases.len(), 2, "{leases:#?}");
    assert!(leases.iter().all(|lease| lease["holder"]["container"] == json!(id)));
    must(&mut ctr("one", &["task", "delete", "--force", &id]));
    let left = site.lease();
    assert_eq!(left["holder"]["runtime_root"].as_str().unwrap().rsplit('/').next(), Some("two"));
    let uuid =
        must(&mut ctr("two", &["task", "exec", "--exec-id", "x", &id, "/bin/sh", "-c", "echo $MIG_DEVICE_UUIDS"]));
    assert_eq!(json!(uuid.trim()), left["slices"][0]["uuid"], "the second one's slice is its own");
    must(&mut ctr("two", &["task", "delete", "--force", &id]));
    site.assert_clean("after both");
}
