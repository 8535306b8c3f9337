//! A Slurm cluster on this machine: a controller and some nodes, each with simulated GPUs, settings and state of its own.
//!
//! Made with what `migctl slurm config` prints and the scripts that `make install` brings, without systemd. All that it starts
//! ends with it.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::net::TcpListener;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU16, AtomicU32, Ordering};
use std::time::Duration;

use serde_json::Value;

use crate::common::{World, binaries, run, text, wait_for};

/// The user that scripts/test-slurm knows, whose jobs these are.
pub const USER: (&str, u32) = ("migtest", 61001);
/// Longest that Slurm may take to notice something at once.
pub const SOON: Duration = Duration::from_secs(60);

/// A cluster. Ends all of its processes.
pub struct Cluster {
    dir: tempfile::TempDir,
    pub name: String,
    pub nodes: Vec<Node>,
    munged: Child,
    slurmctld: RefCell<Option<Child>>,
}

/// A node with a machine of its own.
pub struct Node {
    pub name: String,
    pub world: World,
    slurmd: RefCell<Option<Child>>,
}

static STARTED: AtomicU32 = AtomicU32::new(0);

impl Cluster {
    /// A cluster with a node for each list of boards.
    pub fn new(nodes: &[&[&str]]) -> Cluster {
        Cluster::with(nodes, "", "")
    }

    /// The same with more lines in slurm.conf, and in the settings of mig-hook on every node.
    pub fn with(boards: &[&[&str]], slurm_conf: &str, settings: &'static str) -> Cluster {
        let world = std::env::var_os("ENG_DIR").filter(|_| std::env::var_os("MIG_TEST_SLURM").is_some());
        let world = PathBuf::from(world.expect("these tests are run by scripts/test-slurm"));
        // Names of cgroups come from this: one that nobody else on this machine has.
        let unique = world.file_name().unwrap().to_str().unwrap();
        let name = format!("{unique}-{}", STARTED.fetch_add(1, Ordering::Relaxed));
        let dir = tempfile::Builder::new().prefix("slurm").tempdir_in(&world).unwrap();
        open_to_users(dir.path());
        let nodes: Vec<Node> = boards
            .iter()
            .zip('a'..)
            .map(|(boards, letter)| {
                // In a directory of the node's name, as slurmd and slurmstepd can write it into a path.
                let name = format!("{name}{letter}");
                let own = tempfile::Builder::new().prefix(&name).rand_bytes(0).tempdir_in(dir.path()).unwrap();
                open_to_users(own.path());
                let node = Node { name, world: World::at(own, boards, &[]), slurmd: RefCell::new(None) };
                node.world.settings(settings);
                node
            })
            .collect();
        let at = |path: &str| dir.path().join(path);
        for path in ["etc", "state", "log", "bin", "scripts", "run", "home"] {
            std::fs::create_dir(at(path)).unwrap();
        }
        chown(at("home"), Some(USER.1), Some(USER.1)).unwrap();
        let munged = start_munged(dir.path());
        let cluster = Cluster { dir, name, nodes, munged, slurmctld: RefCell::new(None) };
        cluster.write_scripts();
        cluster.write_conf(slurm_conf);
        cluster.start_slurmctld();
        (0..cluster.nodes.len()).for_each(|n| cluster.start_slurmd(n));
        cluster.wait_idle("at the start");
        cluster
    }

    pub fn path(&self, relative: &str) -> PathBuf {
        self.dir.path().join(relative)
    }

    fn conf(&self) -> PathBuf {
        self.path("etc/slurm.conf")
    }

    /// packaging/slurm as installed, but that migctl reads the settings of the node that it is called on.
    fn write_scripts(&self) {
        let (here, bin) = (self.path("scripts"), self.path("bin"));
        let migctl = format!(
            "#!/bin/sh\nexec {}/migctl --config {}/$SLURMD_NODENAME/config.toml \"$@\"\n",
            binaries().display(),
            self.dir.path().display()
        );
        write_program(&bin.join("migctl"), &migctl);
        for name in ["prolog", "epilog", "task-prolog"] {
            let source = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("packaging/slurm/{name}.in"));
            let script = std::fs::read_to_string(source).unwrap().replace("@BINDIR@", bin.to_str().unwrap());
            write_program(&here.join(name), &script);
        }
    }

    /// Everything that Slurm reads.
    fn write_conf(&self, more: &str) {
        let (etc, dir) = (self.path("etc"), self.dir.path().display());
        let ports: Vec<u16> = free_ports(self.nodes.len() + 1);
        let base = format!(
            "ClusterName={}\nSlurmctldHost=localhost(127.0.0.1)\nSlurmctldPort={}\nSlurmUser=root\nSlurmdUser=root\n\
             AuthType=auth/munge\nAuthInfo=socket={dir}/run/munge\nMpiDefault=none\nTaskPlugin=task/cgroup\n\
             ProctrackType=proctrack/cgroup\nReturnToService=2\nStateSaveLocation={dir}/state\n\
             SlurmdSpoolDir={dir}/spool-%n\nSlurmctldPidFile={dir}/run/slurmctld.pid\nSlurmdPidFile={dir}/run/slurmd-%n.pid\n\
             SlurmctldLogFile={dir}/log/slurmctld\nSlurmdLogFile={dir}/log/slurmd-%n\nSlurmdDebug=debug\n\
             SelectType=select/cons_tres\nSelectTypeParameters=CR_CPU\nAccountingStorageType=accounting_storage/none\n\
             JobAcctGatherType=jobacct_gather/none\nKillWait=2\nUnkillableStepTimeout=30\nSlurmdParameters=config_overrides\n",
            self.name, ports[0]
        );
        std::fs::write(self.conf(), &base).unwrap();
        for node in &self.nodes {
            let facts = node.world.migctl(&self.config_of(&node.name, &["--json"]));
            assert!(facts.status.success(), "{}", text(&facts));
            std::fs::write(self.path(&format!("{}.json", node.name)), facts.stdout).unwrap();
        }
        let others: Vec<String> = self.nodes[1..]
            .iter()
            .flat_map(|node| ["--node".to_owned(), self.path(&format!("{}.json", node.name)).display().to_string()])
            .collect();
        let others: Vec<&str> = others.iter().map(String::as_str).collect();
        let first = &self.nodes[0];
        let into = [&["--dir", etc.to_str().unwrap()], &others[..]].concat();
        let written = first.world.migctl(&self.config_of(&first.name, &into));
        assert!(written.status.success(), "{}", text(&written));

        // One oci.conf serves all nodes of this machine: each has its settings and its state under its name.
        let oci = std::fs::read_to_string(etc.join("oci.conf")).unwrap();
        std::fs::write(etc.join("oci.conf"), oci.replace(&format!("/{}/", first.name), "/%n/")).unwrap();
        std::fs::write(
            etc.join("cgroup.conf"),
            "CgroupPlugin=cgroup/v1\nCgroupMountpoint=/sys/fs/cgroup\nConstrainCores=no\nConstrainRAMSpace=no\nConstrainDevices=yes\n",
        )
        .unwrap();

        let included = std::fs::read_to_string(etc.join("mig-hook.conf")).unwrap();
        let mut conf = base;
        for (node, port) in self.nodes.iter().zip(&ports[1..]) {
            let line = format!("# NodeName={} ", node.name);
            let gres = included.lines().find_map(|l| l.strip_prefix(&line)).expect("the Gres of each node");
            conf += &format!(
                "NodeName={} NodeAddr=127.0.0.1 Port={port} CPUs=64 RealMemory=4000 {gres} State=UNKNOWN\n",
                node.name
            );
        }
        conf += "PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP\nInclude mig-hook.conf\n";
        let scripts = self.path("scripts");
        for (key, script) in [("Prolog", "prolog"), ("Epilog", "epilog"), ("TaskProlog", "task-prolog")] {
            conf += &format!("{key}={}/{script}\n", scripts.display());
        }
        let more = more.replace("@DIR@", &dir.to_string());
        std::fs::write(self.conf(), conf + &more + "\n").unwrap();
    }

    fn config_of<'a>(&'a self, node: &'a str, more: &[&'a str]) -> Vec<&'a str> {
        let conf = self.dir.path().to_str().unwrap();
        // Leaked: a few bytes in a test program.
        let conf: &'static str = Box::leak(format!("{conf}/etc/slurm.conf").into_boxed_str());
        [&["slurm", "config", "--name", node, "--slurm-conf", conf], more].concat()
    }

    // ---- daemons ----

    pub fn start_slurmctld(&self) {
        let child = daemon(&self.conf(), &self.path("log/slurmctld.out"), "slurmctld", &["-D"]);
        assert!(self.slurmctld.replace(Some(child)).is_none(), "there is one already");
    }

    pub fn start_slurmd(&self, node: usize) {
        let node = &self.nodes[node];
        let log = self.path(&format!("log/slurmd-{}.out", node.name));
        let child = daemon(&self.conf(), &log, "slurmd", &["-D", "-N", &node.name]);
        assert!(node.slurmd.replace(Some(child)).is_none(), "there is one already");
    }

    /// Ends slurmctld by a signal.
    pub fn end_slurmctld(&self, signal: &str) {
        end(self.slurmctld.take().expect("it runs"), signal);
    }

    /// Ends the slurmd of a node by a signal. Jobs go on.
    pub fn end_slurmd(&self, node: usize, signal: &str) {
        end(self.nodes[node].slurmd.take().expect("it runs"), signal);
    }

    /// Kills each slurmstepd whose cgroup's path has that part, and nothing of the jobs themselves.
    pub fn kill_stepds(&self, part: &str) {
        let told = |pid: &str, file: &str| std::fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap_or_default();
        let is_it = |pid: &String| told(pid, "comm").trim() == "slurmstepd" && told(pid, "cgroup").contains(part);
        let found: Vec<String> = self.nodes.iter().flat_map(Node::processes).filter(is_it).collect();
        assert!(!found.is_empty(), "no slurmstepd in {:?}", self.nodes[0].processes());
        kill(&found);
    }

    /// Kills every process of every job.
    pub fn kill_jobs(&self) {
        self.nodes.iter().for_each(|node| kill(&node.processes()));
    }

    // ---- users ----

    /// A command of Slurm's by our user, with an environment of nothing else.
    pub fn user(&self, program: &str, args: &[&str]) -> Command {
        let mut command = Command::new(program);
        command.args(args).uid(USER.1).gid(USER.1).current_dir(self.path("home"));
        command.env_clear().env("PATH", "/usr/bin:/bin").env("HOME", self.path("home")).env("SLURM_CONF", self.conf());
        command.env("USER", USER.0);
        command
    }

    /// Runs a command of Slurm's by our user to its end.
    pub fn run(&self, program: &str, args: &[&str]) -> Output {
        run(&mut self.user(program, args))
    }

    /// What a command of Slurm's by our user prints that must succeed.
    pub fn out(&self, program: &str, args: &[&str]) -> String {
        let output = self.run(program, args);
        assert!(output.status.success(), "{program} {args:?}: {}\n{}", text(&output), self.logs());
        String::from_utf8(output.stdout).unwrap()
    }

    /// Starts a command of Slurm's by our user.
    pub fn start(&self, program: &str, args: &[&str]) -> Child {
        self.user(program, args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    }

    /// Submits a script with sbatch; the number of the job.
    pub fn batch(&self, args: &[&str], script: &str) -> String {
        let path = self.path(&format!("home/script-{}", STARTED.fetch_add(1, Ordering::Relaxed)));
        write_program(&path, &format!("#!/bin/sh\n{script}\n"));
        let out = self.path("home/out-%j").display().to_string();
        let all = [&["--parsable", "--output", &out], args, &[path.to_str().unwrap()]].concat();
        self.out("sbatch", &all).trim().to_owned()
    }

    /// Waits for a file that a job makes.
    pub fn wait_for_file(&self, name: &str) {
        let until = std::time::Instant::now() + SOON;
        while !self.path(&format!("home/{name}")).exists() {
            assert!(std::time::Instant::now() < until, "{name} is not there after {SOON:?}\n{}", self.logs());
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// What a job of sbatch has written.
    pub fn output(&self, job: &str) -> String {
        std::fs::read_to_string(self.path(&format!("home/out-{job}"))).unwrap_or_default()
    }

    /// What Slurm knows of a job: `JobState`, `Comment`, `TresPerNode`, `ExitCode`, …; empty when it knows none.
    pub fn job(&self, id: &str) -> BTreeMap<String, String> {
        fields(&self.run("scontrol", &["show", "job", "-o", id]))
    }

    pub fn job_state(&self, id: &str) -> String {
        self.job(id).remove("JobState").unwrap_or_default()
    }

    pub fn wait_state(&self, id: &str, state: &str, limit: Duration) {
        let until = std::time::Instant::now() + limit;
        while self.job_state(id) != state {
            let job = self.job(id);
            assert!(
                std::time::Instant::now() < until,
                "job {id} is not {state} within {limit:?}: {job:#?}\n{}\n{}",
                self.output(id),
                self.logs()
            );
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// `IDLE`, `MIXED`, `IDLE+DRAIN`, …
    pub fn node_state(&self, node: usize) -> String {
        let shown = self.run("scontrol", &["show", "node", "-o", &self.nodes[node].name]);
        fields(&shown).remove("State").unwrap_or_default()
    }

    // ---- slices ----

    /// Leases of all nodes.
    pub fn leases(&self) -> Vec<Value> {
        self.nodes.iter().flat_map(|node| node.world.leases()).collect()
    }

    /// Waits until a job has its slices: it has got through its Prolog.
    pub fn wait_leases(&self, number: usize) -> Vec<Value> {
        let until = std::time::Instant::now() + SOON;
        while self.leases().len() != number {
            assert!(std::time::Instant::now() < until, "{} leases, not {number}\n{}", self.leases().len(), self.logs());
            std::thread::sleep(Duration::from_millis(50));
        }
        self.leases()
    }

    fn wait_idle(&self, when: &str) {
        let idle = || (0..self.nodes.len()).all(|n| self.node_state(n) == "IDLE");
        let until = std::time::Instant::now() + SOON;
        while !idle() {
            let states: Vec<String> = (0..self.nodes.len()).map(|n| self.node_state(n)).collect();
            assert!(std::time::Instant::now() < until, "nodes are not idle {when}: {states:?}\n{}", self.logs());
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Soon no node has a lease, an instance, a process of a job, or anything public of one, and each is open to new jobs.
    pub fn assert_clean(&self, when: &str) {
        self.assert_clean_within(SOON, when);
    }

    pub fn assert_clean_within(&self, limit: Duration, when: &str) {
        let until = std::time::Instant::now() + limit;
        let left = || {
            let mut left: Vec<String> = Vec::new();
            for (n, node) in self.nodes.iter().enumerate() {
                left.extend(node.world.leases().iter().map(|lease| format!("lease {lease:#}")));
                left.extend(node.world.instances().iter().map(|instance| format!("instance {instance}")));
                // Slurm itself may leave empty cgroups behind.
                left.extend(node.processes().iter().map(|pid| format!("process {pid}")));
                left.extend(node.published().iter().map(|path| path.display().to_string()));
                left.extend(Some(self.node_state(n)).filter(|state| state != "IDLE"));
            }
            left
        };
        while !left().is_empty() {
            assert!(std::time::Instant::now() < until, "left {when} after {limit:?}: {:#?}\n{}", left(), self.logs());
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// What the daemons and the jobs said, less what they always say.
    pub fn logs(&self) -> String {
        let mut shown = String::new();
        let all = ["log", "home"].iter().flat_map(|dir| self.path(dir).read_dir().unwrap().map(|f| f.unwrap().path()));
        let mut files: Vec<PathBuf> = all.filter(|path| path.is_file()).collect();
        files.sort();
        for file in files {
            let text = std::fs::read(&file).unwrap_or_default();
            let text = String::from_utf8_lossy(&text);
            let lines: Vec<&str> = text.lines().filter(|line| !line.contains("mpi/pmix")).collect();
            let last = lines[lines.len().saturating_sub(60)..].join("\n");
            shown += &format!("---- {}\n{last}\n", file.display());
        }
        shown
    }
}

impl Node {
    /// The cgroups of jobs on this node.
    fn cgroups(&self) -> Vec<PathBuf> {
        let below = |path: PathBuf| -> Vec<PathBuf> {
            let entries = path.read_dir().into_iter().flatten().flatten().map(|entry| entry.path());
            entries.filter(|path| path.is_dir()).collect()
        };
        ["devices", "freezer"]
            .iter()
            .flat_map(|of| below(Path::new("/sys/fs/cgroup").join(of).join(format!("slurm_{}", self.name))))
            .collect()
    }

    /// What jobs of this node may read.
    fn published(&self) -> Vec<PathBuf> {
        let entries = self.world.path("state/public").read_dir().into_iter().flatten().flatten();
        entries.map(|entry| entry.path()).collect()
    }

    /// Processes in the cgroups of jobs here.
    pub fn processes(&self) -> Vec<String> {
        let mut found = Vec::new();
        let mut open: Vec<PathBuf> = self.cgroups();
        while let Some(dir) = open.pop() {
            let text = std::fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
            found.extend(text.lines().map(str::to_owned));
            open.extend(dir.read_dir().into_iter().flatten().flatten().map(|e| e.path()).filter(|p| p.is_dir()));
        }
        found
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        let daemons = self.nodes.iter().filter_map(|node| node.slurmd.take()).chain(self.slurmctld.take());
        daemons.for_each(|child| end(child, "KILL"));
        for node in &self.nodes {
            // slurmstepd and what it has started, until nobody is left to start more.
            for _ in 0..50 {
                let pids = node.processes();
                if pids.is_empty() {
                    break;
                }
                kill(&pids);
                std::thread::sleep(Duration::from_millis(50));
            }
            for of in ["devices", "freezer"] {
                let dir = Path::new("/sys/fs/cgroup").join(of).join(format!("slurm_{}", node.name));
                let _ =
                    Command::new("find").arg(dir).args(["-depth", "-type", "d", "-exec", "rmdir", "{}", "+"]).output();
            }
        }
        let _ = self.munged.kill();
        let _ = self.munged.wait();
    }
}

fn start_munged(dir: &Path) -> Child {
    let key = dir.join("run/munge.key");
    let seed: Vec<u8> = std::fs::read("/proc/sys/kernel/random/uuid").unwrap().repeat(2);
    std::fs::write(&key, seed).unwrap();
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o400)).unwrap();
    open_to_users(&dir.join("run"));
    std::fs::set_permissions(dir.join("run"), std::fs::Permissions::from_mode(0o755)).unwrap();
    let option = |name: &str, file: &str| format!("--{name}={}", dir.join(file).display());
    let child = Command::new("munged")
        .args(["--foreground", &option("socket", "run/munge"), &option("key-file", "run/munge.key")])
        .args([option("pid-file", "run/munged.pid"), option("seed-file", "run/seed"), option("log-file", "log/munged")])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(std::fs::File::create(dir.join("log/munged.out")).unwrap())
        .spawn()
        .unwrap();
    wait_for("munged's socket", SOON, || dir.join("run/munge").exists());
    child
}

fn daemon(conf: &Path, log: &Path, program: &str, args: &[&str]) -> Child {
    let log = std::fs::OpenOptions::new().create(true).append(true).open(log).unwrap();
    let mut command = Command::new(program);
    command.args(args).env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").env("SLURM_CONF", conf);
    command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log).spawn().unwrap()
}

fn kill(pids: &[String]) {
    let _ = Command::new("kill").arg("-KILL").args(pids).stderr(Stdio::null()).status();
}

fn end(mut child: Child, signal: &str) {
    let _ = Command::new("kill").args([&format!("-{signal}"), &child.id().to_string()]).status();
    child.wait().unwrap();
}

/// Ports that were free a moment ago, each given once. Not of those from which the kernel takes one for every connection
/// (32768 and up, ip_local_port_range in ip(7)): it may be taken again before Slurm has it.
fn free_ports(number: usize) -> Vec<u16> {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let first = 20_000 + (std::process::id() % 50) as u16 * 200;
    let ports = std::iter::repeat_with(|| first + NEXT.fetch_add(1, Ordering::Relaxed));
    ports.filter(|port| TcpListener::bind(("0.0.0.0", *port)).is_ok()).take(number).collect()
}

fn open_to_users(dir: &Path) {
    std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o711)).unwrap();
}

fn write_program(path: &Path, text: &str) {
    std::fs::write(path, text).unwrap();
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
}

/// `Key=value` pairs of `scontrol show -o`. A value with blanks in it is cut there.
fn fields(output: &Output) -> BTreeMap<String, String> {
    let text = String::from_utf8_lossy(&output.stdout);
    let pairs = text.split_whitespace().filter_map(|word| word.split_once('='));
    pairs.map(|(key, value)| (key.to_owned(), value.to_owned())).collect()
}
