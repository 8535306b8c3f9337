//! One A30 with a foreign slice, a living neighbour, and a holder that comes by one of the ways in.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use mig_hook::container::{ContainerError, Own};
use mig_hook::first::is_locked;
use mig_hook::handover::in_cgroup;
use mig_hook::host;
use serde_json::{Value, json};

use crate::common::{Init, World, binaries, config, feed, os, skip, state, text, token_in, wait_for};
use crate::points::{Point, injector, recorder};

pub const JOB: &str = "batch:1";
/// What every holder here wants: the only room that foreign slice and neighbour leave.
pub const WANTED: &str = "2g.12gb";
/// What is idle in that room, of another profile.
const OTHER: &str = "2g.12gb+me";
const SOON: Duration = Duration::from_secs(20);
/// A character device of a major for local use: that a cgroup denies it makes it one with rules.
const DENIED: (u32, u32) = (254, 255);

#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Way {
    Podman,
    Shim,
    /// A createRuntime hook that was registered by hand.
    Classic,
    /// The hooks of our CDI spec. What they give was there before: the foreign slice.
    Cdi,
    Run,
    Job,
}

pub struct Stage {
    pub world: World,
    pub way: Way,
    pub foreign: Vec<Value>,
    neighbour: Option<(Value, Init)>,
    /// Where containers live whose first process is there when the hook runs.
    cgroup: Option<Cgroup>,
    /// Files of the state when nothing but the neighbour is there.
    files: BTreeSet<PathBuf>,
    /// Of the host's /dev at the beginning.
    nodes: BTreeSet<PathBuf>,
}

/// A program of ours with its arguments and its standard input.
pub struct Act {
    program: &'static str,
    args: Vec<OsString>,
    stdin: Vec<u8>,
}

impl Act {
    pub fn new(program: &'static str, args: &[&str], stdin: Vec<u8>) -> Act {
        Act { program, args: os(args), stdin }
    }

    pub fn migctl(args: &[&str]) -> Act {
        Act::new("migctl", args, Vec::new())
    }
}

/// A holder, as far as it has come.
pub struct Holder {
    pub token: Option<String>,
    /// Its first process, which the world sees.
    init: Option<Init>,
    /// What has asked for it, where that must live on.
    _owner: Option<Init>,
}

impl Holder {
    fn of(init: Option<Init>) -> Holder {
        Holder { token: None, init, _owner: None }
    }

    /// Kills its first process.
    pub fn die(&mut self) {
        self.init = None;
    }

    fn pid(&self) -> u32 {
        self.init.as_ref().map_or(0, Init::pid)
    }
}

impl Stage {
    /// `None`, and noted, where this way can't be gone here. `neighbour`: whether one takes the rest of the room.
    pub fn new(way: Way, neighbour: bool) -> Option<Stage> {
        let world = World::new(&["a30-24gb"]);
        let cgroup = match way {
            Way::Classic | Way::Cdi => Some(Cgroup::make()?),
            _ => None,
        };
        world.sim("make", &["--gpu", "0", "--profile", "1g.6gb", "--start", "3"]);
        let foreign = world.instances();
        let nodes = files_in(&[world.path("m/dev")]);
        let files = BTreeSet::new();
        let mut stage = Stage { world, way, foreign, neighbour: None, cgroup, files, nodes };
        stage.fresh_bundle();
        if neighbour {
            let config = config(json!({"mig.profile": "1g.6gb"}), &[]);
            let output = stage.world.orphaned_precreate(&config);
            assert!(output.status.success(), "{}", text(&output));
            let (init, bundle) = (Init::start(), stage.world.bundle("neighbour", &config));
            let hook = ["createRuntime", "--lease", &token_in(&output.stdout)];
            let bound = stage.world.hook(&hook, &state("neighbour", init.pid(), &bundle));
            assert!(bound.status.success(), "{}", text(&bound));
            stage.neighbour = Some((stage.world.lease(), init));
        }
        stage.settings(false);
        stage.gc("at the beginning");
        stage.files = stage.files_now();
        Some(stage)
    }

    /// `idle`: whether what has ended stays for the next one.
    pub fn settings(&self, idle: bool) {
        let slices = match self.way {
            Way::Cdi => "foreign = \"idle\"",
            _ if idle => "idle_ttl = \"1h\"",
            _ => "",
        };
        let cdi = match self.way {
            Way::Cdi => format!("[cdi]\nspec = \"{}\"", self.world.path("cdi/mig-hook.json").display()),
            _ => String::new(),
        };
        self.world.settings(&format!("[runtime]\npath = \"/bin/true\"\n[slices]\n{slices}\n{cdi}"));
    }

    /// The config of a container that asks, or that a CDI spec gives its slice.
    fn wanted(&self) -> Value {
        let annotations = if self.way == Way::Cdi { json!({}) } else { json!({"mig.profile": WANTED}) };
        config(annotations, &[])
    }

    fn slice(&self) -> String {
        self.foreign[0]["compute_instances"][0]["uuid"].as_str().unwrap().to_owned()
    }

    fn bundle(&self) -> PathBuf {
        self.world.path("bundle")
    }

    pub fn fresh_bundle(&self) {
        self.world.bundle("bundle", &self.wanted());
    }

    fn pid_file(&self) -> PathBuf {
        self.world.path("pid")
    }

    // ---- acts ----

    /// A State with the annotations of the config.
    fn state(&self, pid: u32) -> Vec<u8> {
        let mut state: Value = serde_json::from_slice(&state("c1", pid, &self.bundle())).unwrap();
        state["annotations"] = self.wanted()["annotations"].clone();
        state.to_string().into_bytes()
    }

    /// Who asks, before it does, and how.
    pub fn asking(&self) -> (Holder, Act) {
        let bundle = self.bundle().display().to_string();
        let pid_file = self.pid_file().display().to_string();
        let hook = |args: &[&str], pid| Act::new("mig-hook", args, self.state(pid));
        match self.way {
            Way::Podman => {
                (Holder::of(None), Act::new("mig-hook", &["precreate"], self.wanted().to_string().into_bytes()))
            }
            Way::Shim => {
                let _ = std::fs::remove_file(self.pid_file());
                let args = ["create", "--bundle", &bundle, "--pid-file", &pid_file, "c1"];
                (Holder::of(None), Act::new("mig-runtime", &args, Vec::new()))
            }
            Way::Classic => {
                let holder = Holder::of(Some(self.cgroup.as_ref().unwrap().container(&self.world)));
                let act = hook(&["createRuntime"], holder.pid());
                (holder, act)
            }
            Way::Cdi => {
                let holder = Holder::of(Some(self.cgroup.as_ref().unwrap().process()));
                let act = hook(&["createRuntime", "--slice", &self.slice()], holder.pid());
                (holder, act)
            }
            Way::Run => (Holder::of(None), Act::migctl(&["run", WANTED, "--", "/bin/true"])),
            Way::Job => {
                let holder = Holder::of(Some(Init::start()));
                let pid = holder.pid().to_string();
                let args = ["job", "start", "--key", JOB, "--uid", "4711", "--gid", "4711", "--pid", &pid, WANTED];
                (holder, Act::migctl(&args))
            }
        }
    }

    /// A holder that has got what it asked for. Whoever asked for it is dead, its first process lives.
    pub fn granted(&self, when: &str) -> Holder {
        if self.way == Way::Run {
            return self.running(when);
        }
        let (mut holder, act) = self.asking();
        let output = self.perform(&act, None);
        assert!(output.status.success(), "acquire {when}: {}", text(&output));
        let lease = self.others().into_iter().find(|lease| lease["state"] == "active");
        let lease = lease.unwrap_or_else(|| panic!("no lease {when}: {}", text(&output)));
        holder.token = Some(lease["token"].as_str().unwrap().to_owned());
        match self.way {
            Way::Podman => {
                holder.init = Some(Init::start());
                let output = self.perform(&self.binding(&holder), None);
                assert!(output.status.success(), "bind {when}: {}", text(&output));
            }
            Way::Shim => {
                let init = Init::start();
                std::fs::write(self.pid_file(), init.pid().to_string()).unwrap();
                holder.init = Some(init);
            }
            _ => {}
        }
        holder
    }

    /// A command that runs until its wrapper is killed.
    fn running(&self, when: &str) -> Holder {
        let mut command = Command::new(binaries().join("migctl"));
        command.arg("--config").arg(self.world.config()).args(["run", WANTED, "--", "/bin/sleep", "600"]);
        let wrapper = Init::from(command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap());
        let is_seen = |lease: &Value| lease["holder"]["cgroup"].is_string() && lease["holder"]["init"].is_object();
        let in_cgroup = |lease: &Value| !host::processes_in(lease["holder"]["cgroup"].as_str().unwrap()).is_empty();
        let runs = || self.others().iter().any(|lease| is_seen(lease) && in_cgroup(lease));
        wait_for(&format!("a command {when}"), SOON, runs);
        let token = self.others()[0]["token"].as_str().unwrap().to_owned();
        Holder { token: Some(token), init: Some(wrapper), _owner: None }
    }

    /// One whose container is being created: the hook that binds it has not run. Whoever asked lives.
    pub fn unbound(&self) -> Holder {
        let init = Some(Init::start());
        if self.way == Way::Podman {
            let output = self.world.hook(&["precreate"], self.wanted().to_string().as_bytes());
            assert!(output.status.success(), "{}", text(&output));
            return Holder { token: Some(token_in(&output.stdout)), init, _owner: None };
        }
        let runtime =
            self.world.script("rt/runtime", &format!(": > {}; exec sleep 600", self.world.path("rt/up").display()));
        let _ = std::fs::remove_file(self.world.path("rt/up"));
        self.world.settings(&format!("[runtime]\npath = \"{}\"", runtime.display()));
        let bundle = self.bundle();
        let mut command = self.world.shim_command(&["create", "--bundle", bundle.to_str().unwrap(), "c1"]);
        let owner = Init::from(command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap());
        wait_for("the runtime", SOON, || self.world.path("rt/up").exists());
        self.settings(false);
        let token = token_in(&std::fs::read(bundle.join("config.json")).unwrap());
        Holder { token: Some(token), init, _owner: Some(owner) }
    }

    pub fn binding(&self, holder: &Holder) -> Act {
        let token = holder.token.as_deref().unwrap();
        Act::new("mig-hook", &["createRuntime", "--lease", token], self.state(holder.pid()))
    }

    pub fn releasing(&self, holder: &Holder) -> Act {
        let hook = |args: &[&str]| Act::new("mig-hook", args, self.state(0));
        match self.way {
            Way::Podman => hook(&["poststop", "--lease", holder.token.as_deref().unwrap()]),
            Way::Shim => Act::new("mig-runtime", &["delete", "c1"], Vec::new()),
            Way::Classic => hook(&["poststop"]),
            Way::Cdi => hook(&["poststop", "--slice", &self.slice()]),
            Way::Job => Act::migctl(&["job", "end", "--key", JOB]),
            Way::Run => Act::migctl(&["release", holder.token.as_deref().unwrap()]),
        }
    }

    pub fn must_release(&self, mut holder: Holder, when: &str) {
        holder.die();
        self.wait_for_processes();
        let output = self.perform(&self.releasing(&holder), None);
        assert!(output.status.success(), "release {when}: {}", text(&output));
    }

    pub fn gc(&self, when: &str) {
        let output = self.world.migctl(&["gc"]);
        assert!(output.status.success(), "gc {when}: {}", text(&output));
    }

    /// Leaves an idle slice behind, of the profile that is wanted or of another one in its room.
    pub fn leave_idle(&self, same: bool) {
        let profile = if same { WANTED } else { OTHER };
        let output = self.world.orphaned_precreate(&config(json!({"mig.profile": profile}), &[]));
        assert!(output.status.success(), "{}", text(&output));
        let ended = ["poststop", "--lease", &token_in(&output.stdout)];
        self.world.hook(&ended, &state("c0", 0, &self.bundle()));
        let idle = self.others();
        assert_eq!((idle.len(), &idle[0]["state"]), (1, &json!("idle")), "{idle:#?}");
    }

    /// migctl changes nothing while something idle is there.
    pub fn clear_idle(&self) {
        for verb in ["cordon", "uncordon"] {
            let output = self.world.migctl(&[verb, "0"]);
            assert!(output.status.success(), "{}", text(&output));
        }
    }

    // ---- running and killing ----

    /// Runs it to its end, or to `point`. Its parent ends with it.
    pub fn perform(&self, act: &Act, point: Option<&Point>) -> Output {
        let nth;
        let parent = match point {
            Some(Point::System(call, nth)) => injector(call, *nth, "signal=SIGKILL"),
            Some(Point::Before(n)) => {
                nth = n.to_string();
                self.world.fault("*", &["--nth", &nth, "--kill", "before"]);
                orphaned()
            }
            Some(Point::After(call, n)) => {
                nth = n.to_string();
                self.world.fault(call, &["--nth", &nth, "--kill", "after"]);
                orphaned()
            }
            None => orphaned(),
        };
        let output = self.under(&parent, act);
        if matches!(point, Some(Point::Before(_) | Point::After(..))) {
            self.world.sim("clear-faults", &[]);
        }
        output
    }

    /// Runs it with its changing system calls recorded: see [`crate::points::changes`].
    pub fn record(&self, act: &Act) -> Output {
        self.under(&recorder(&self.record_file()), act)
    }

    pub fn record_file(&self) -> PathBuf {
        self.world.path("trace")
    }

    /// Runs it as a child of what these words start.
    pub fn under(&self, parent: &[OsString], act: &Act) -> Output {
        let mut command = Command::new(&parent[0]);
        command.args(&parent[1..]).arg(binaries().join(act.program));
        let option = if act.program == "mig-runtime" { "--mig-config" } else { "--config" };
        feed(command.arg(option).arg(self.world.config()).args(&act.args), &act.stdin)
    }

    /// What a killed wrapper leaves behind is killed by the kernel, in its own time: in its cgroup, or on the way there.
    pub fn wait_for_processes(&self) {
        for lease in self.others() {
            let in_tree = self.world.path("state/holders").join(lease["token"].as_str().unwrap());
            wait_for("the end of a tree", SOON, || !is_locked(&in_tree));
            let Some(cgroup) = lease["holder"]["cgroup"].as_str() else { continue };
            wait_for("an empty cgroup", SOON, || host::processes_in(cgroup).is_empty());
        }
    }

    // ---- what is there ----

    /// The records on disk but the neighbour's, by nobody's leave.
    pub fn others(&self) -> Vec<Value> {
        let files = std::fs::read_dir(self.world.path("state/leases")).unwrap().map(|entry| entry.unwrap().path());
        let leases = files.filter_map(|path| std::fs::read(path).ok());
        let mut leases: Vec<Value> = leases.map(|text| serde_json::from_slice(&text).unwrap()).collect();
        leases.retain(|lease| self.neighbour.as_ref().is_none_or(|(own, _)| own["token"] != lease["token"]));
        leases
    }

    /// Names of these.
    pub fn tokens(&self) -> Vec<String> {
        self.others().iter().map(|lease| lease["token"].as_str().unwrap().to_owned()).collect()
    }

    /// What must hold at any moment, also between a kill and what makes it good: nobody's slice was touched, nothing was cut
    /// that is not recorded, and of no slice two records say that it is held.
    pub fn check_moment(&self, when: &str) {
        self.check_bystanders(when);
        let others = self.others();
        let slices = |lease: &Value| lease["slices"].as_array().unwrap().clone();
        for gi in self.world.instances().iter().filter(|gi| !self.foreign.contains(gi)) {
            let records = others.iter().chain(self.neighbour.as_ref().map(|(own, _)| own));
            let of_it: Vec<&Value> =
                records.filter(|lease| slices(lease).iter().any(|s| s["placement"] == gi["placement"])).collect();
            assert!(!of_it.is_empty(), "{gi} is in no record {when}: {others:#?}");
            let begun = |lease: &Value| slices(lease).iter().any(|slice| slice["step"] != "planned");
            let holds = |lease: &Value| lease["state"] == "active" || (lease["state"] == "pending" && begun(lease));
            assert!(of_it.iter().filter(|lease| holds(lease)).count() <= 1, "{gi} is held twice {when}: {of_it:#?}");
        }
    }

    /// Foreign slice and neighbour are as they were, and the bundle has its old config or a whole new one.
    fn check_bystanders(&self, when: &str) {
        if self.way == Way::Shim {
            let config = crate::common::document(&self.bundle().join("config.json"));
            let edited = config["annotations"]["mig.lease"].is_string() && config["hooks"]["poststop"].is_array();
            assert!(edited || config == self.wanted(), "half a config {when}: {config}");
        }
        let instances = self.world.instances();
        assert!(
            self.foreign.iter().all(|gi| instances.contains(gi)),
            "a foreign slice was touched {when}: {instances:#?}"
        );
        let Some((lease, _)) = &self.neighbour else { return };
        let now: Value = crate::common::document(&self.world.lease_file(lease["token"].as_str().unwrap()));
        assert_eq!(now["slices"], lease["slices"], "{when}");
        assert_eq!(now["state"], "active", "the neighbour {when}");
        let slice = &lease["slices"][0];
        let there = instances.iter().any(|gi| gi["compute_instances"][0]["uuid"] == slice["uuid"]);
        assert!(there, "the neighbour's slice has gone {when}: {instances:#?}");
    }

    /// The same when everything is over: leases are instances. The leases but the neighbour's.
    pub fn check_settled(&self, when: &str) -> Vec<Value> {
        self.check_bystanders(when);
        self.world.assert_consistent(&self.foreign, when);
        self.others()
    }

    /// Nothing but the neighbour, and no file or cgroup of any lease that there was.
    pub fn check_no_trace(&self, tokens: &[String], when: &str) {
        assert_eq!(self.check_settled(when), Vec::<Value>::new(), "leases left {when}");
        let left: Vec<PathBuf> = self.files_now().difference(&self.files).cloned().collect();
        assert!(left.is_empty(), "{when}: {left:?}");
        for token in tokens {
            let cgroup = format!("mig-hook-{token}");
            let hierarchies =
                ["", "devices", "unified"].map(|name| Path::new("/sys/fs/cgroup").join(name).join(&cgroup));
            assert!(!hierarchies.iter().any(|dir| dir.exists()), "{when}: {cgroup}");
        }
    }

    /// Files of the state and of the directory of CDI specs, but those of which there is one only, and the next writer's.
    fn files_now(&self) -> BTreeSet<PathBuf> {
        const ONLY: [&str; 7] = ["lock", "alone", "boot_id", "cordons.json", "last", "scanned", ".write.tmp"];
        let mut files = files_in(&[self.world.path("state"), self.world.path("cdi")]);
        files.retain(|path| !ONLY.iter().any(|name| path.ends_with(name)));
        files
    }

    /// Takes the nodes away that were made since: it is the first holder again.
    pub fn fresh_dev(&self) {
        for path in files_in(&[self.world.path("m/dev")]).difference(&self.nodes) {
            std::fs::remove_file(path).unwrap();
            let _ = std::fs::remove_dir(path.parent().unwrap()); // if it is empty
        }
    }
}

fn files_in(dirs: &[PathBuf]) -> BTreeSet<PathBuf> {
    let (mut files, mut dirs) = (BTreeSet::new(), dirs.to_vec());
    while let Some(dir) = dirs.pop() {
        for entry in std::fs::read_dir(&dir).into_iter().flatten().map(Result::unwrap) {
            match entry.file_type().unwrap().is_dir() {
                true => dirs.push(entry.path()),
                false => drop(files.insert(entry.path())),
            }
        }
    }
    files
}

pub fn is_killed(output: &Output) -> bool {
    output.status.signal() == Some(9) || output.status.code() == Some(128 + 9)
}

/// A parent that ends with its child.
fn orphaned() -> Vec<OsString> {
    os(&["/bin/sh", "-c", "\"$@\"; exit $?", "sh"])
}

/// A cgroup with device rules, for containers of which no runtime has made one.
struct Cgroup(Own);

impl Cgroup {
    fn make() -> Option<Cgroup> {
        let name = std::thread::current().name().unwrap_or("main").replace("::", "-");
        let no = |why: &dyn std::fmt::Display| {
            skip(
                &format!("kills with the classic hook ({name})"),
                &format!("no cgroup with device rules can be made: {why}"),
            );
            None
        };
        let made = Own::make(&format!("{name}-{}", std::process::id()), |_| Ok::<(), ContainerError>(()));
        let cgroup = match made {
            Ok(own) => Cgroup(own),
            Err(error) => return no(&error),
        };
        // v1 takes one list of all that is allowed; v2 a program.
        let list = cgroup.0.dir().join("devices.deny");
        let ruled = match list.exists() {
            true => std::fs::write(list, "a").map_err(|error| error.to_string()),
            false => cgroup.0.confine(&[], &[DENIED]).map_err(|error| error.to_string()),
        };
        match ruled {
            Ok(()) => Some(cgroup),
            Err(error) => no(&error),
        }
    }

    fn process(&self) -> Init {
        let mut command = Command::new("sleep");
        in_cgroup(command.arg("600"), self.0.procs().unwrap());
        Init::from(command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap())
    }

    /// The first process of a container between its mounts and its pivot.
    fn container(&self, world: &World) -> Init {
        let (rootfs, up) = (world.path("bundle/rootfs"), world.path("up"));
        let _ = std::fs::remove_dir_all(rootfs.join("run"));
        std::fs::create_dir_all(rootfs.join("dev")).unwrap();
        let _ = std::fs::remove_file(&up);
        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation", "private", "sh", "-c"]);
        command.arg("mount -t tmpfs dev \"$1/dev\" && : > \"$2\" && exec sleep 600").arg("sh").args([&rootfs, &up]);
        in_cgroup(&mut command, self.0.procs().unwrap());
        let init = Init::from(command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap());
        wait_for("a container", SOON, || up.exists());
        init
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        for _ in 0..100 {
            if self.0.remove().unwrap_or(true) {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}
