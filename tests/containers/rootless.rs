//! User namespaces: `--userns` and `--uidmap` of root's podman, and podman of a user without root. The runtime binds the
//! host's nodes there, so the /dev of these tests is the simulated machine's, in a mount namespace of their own.

use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};

use crate::common::{installed as in_path, run, skip, text};
use crate::{Engine, IMAGE, Probe, SOON, Site, binaries, must, wait_for};

/// A user of these tests, known in their mount namespace only.
pub const UID: u32 = 4242;

/// A mount namespace whose /dev is the simulated machine's, with an ordinary user in it.
pub struct House<'a> {
    site: &'a Site,
    holder: Child,
}

impl Drop for House<'_> {
    fn drop(&mut self) {
        // podman's pause process keeps the user's namespaces.
        let pause = self.enter(&["cat", &format!("/run/user/{UID}/libpod/tmp/pause.pid")]).output();
        if let Some(pid) = pause.ok().and_then(|o| String::from_utf8(o.stdout).ok()?.trim().parse::<u32>().ok()) {
            let _ = Command::new("kill").args(["-KILL", &pid.to_string()]).status();
        }
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}

impl<'a> House<'a> {
    /// `None`, and noted, where mounts or device nodes can't be made.
    pub fn new(site: &'a Site) -> Option<House<'a>> {
        let (dir, dev) = (site.path(""), site.path("m/dev"));
        for open in [&dir, &site.path("m")] {
            std::fs::set_permissions(open, std::fs::Permissions::from_mode(0o755)).unwrap();
        }
        let setup = format!(
            "set -e\n\
             cd {dev}\n\
             for node in null zero full random urandom tty; do cp -a /dev/$node .; done\n\
             mkdir pts shm mqueue && mount --bind /dev/pts pts && mount -t tmpfs tmpfs shm\n\
             ln -s pts/ptmx ptmx && ln -s /proc/self/fd fd\n\
             for file in passwd group subuid subgid; do cp /etc/$file {dir}/$file; done\n\
             echo 'migtest:x:{UID}:{UID}::{dir}/home:/bin/sh' >> {dir}/passwd\n\
             echo 'migtest:x:{UID}:' >> {dir}/group\n\
             echo 'containers:x:4243:65534::/:/bin/false' >> {dir}/passwd\n\
             for file in subuid subgid; do printf '%s\\n' migtest:200000:65536 containers:300000:65536 >> {dir}/$file; done\n\
             for file in passwd group subuid subgid; do mount --bind {dir}/$file /etc/$file; done\n\
             for dir in /run/user /run/cdi; do mkdir -p $dir && mount -t tmpfs -o mode=755 tmpfs $dir; done\n\
             install -d -o {UID} -g {UID} -m 700 /run/user/{UID} {dir}/home\n\
             mount --rbind {dev} /dev\n\
             touch {dir}/ready\n\
             exec sleep 3600",
            dir = dir.display(),
            dev = dev.display(),
        );
        let script = site.script("setup", &setup);
        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation", "private"]).arg(script);
        let log = std::fs::File::create(site.path("setup.log")).unwrap();
        let holder = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().unwrap();
        let mut house = House { site, holder };
        let (ready, mut ended) = (site.path("ready"), false);
        wait_for("the mount namespace", SOON, || {
            ended = house.holder.try_wait().unwrap().is_some();
            ended || ready.exists()
        });
        if ended {
            let why = std::fs::read_to_string(site.path("setup.log")).unwrap();
            note(&format!("no /dev of its own can be had: {}", why.trim().replace('\n', "; ")));
            return None;
        }
        Some(house)
    }

    /// A command in it, as root.
    fn enter(&self, words: &[&str]) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["--mount", &format!("--target={}", self.holder.id())]).args(words);
        command
    }

    /// podman of root in it, with our hook.
    pub fn root(&self, runtime: &str) -> Engine<'_> {
        let mut podman = self.site.podman_alone(runtime);
        let line = format!("exec nsenter --mount --target={} {} \"$@\"", self.holder.id(), podman.program.display());
        podman.program = self.site.script("podman-root", &line);
        podman
    }

    /// podman of the user, with our hook. `None`, and noted, where that can't be.
    pub fn user(&self, runtime: &str) -> Option<Engine<'_>> {
        let (site, home) = (self.site, self.site.path("home"));
        for tool in ["newuidmap", "setpriv"] {
            if !in_path(tool) {
                note(&format!("{tool} is not installed (Debian: uidmap, util-linux)"));
                return None;
            }
        }
        let conf = format!(
            "[containers]\nnetns = \"none\"\nlog_driver = \"k8s-file\"\n{}\
             [engine]\ncgroup_manager = \"cgroupfs\"\nevents_logger = \"file\"\n",
            ulimits(&site.dir)
        );
        site.write("containers.conf", &conf);
        let as_user = format!(
            "exec nsenter --mount --target={} setpriv --reuid {UID} --regid {UID} --clear-groups \
             env -i HOME={home} XDG_RUNTIME_DIR=/run/user/{UID} TMPDIR={home} PATH=/usr/bin:/usr/sbin:/bin \
             CONTAINERS_CONF={conf} PODMAN_IGNORE_CGROUPSV1_WARNING=1 sh -c 'cd; exec \"$@\"' sh",
            self.holder.id(),
            home = home.display(),
            conf = site.path("containers.conf").display(),
        );
        let shell = site.script("as-user", &format!("{as_user} \"$@\""));
        let probe = run(Command::new(&shell).arg(binaries().join("migctl")).arg("--version"));
        if !probe.status.success() {
            note(&format!("uid {UID} can't run our binaries here: {}", text(&probe).trim().replace('\n', "; ")));
            return None;
        }
        let podman = format!(
            "{as_user} /usr/bin/podman --root {home}/root --runroot {home}/run --storage-driver vfs --runtime {runtime} \
             --hooks-dir {hooks} \"$@\"",
            home = home.display(),
            hooks = site.path("hooks.d").display(),
        );
        let program = site.script("podman-user", &podman);
        let podman = Engine { site, program, env: vec![], runtime: None };
        let imported = podman.run(&["import", "-q", &site.dir.join("rootfs.tar").display().to_string(), IMAGE]);
        if !imported.status.success() {
            let why = text(&imported).trim().replace('\n', "; ");
            note(&format!("podman without root does not work here: {why}"));
            return None;
        }
        Some(podman)
    }

    /// What the user's leases are: `migctl` in the user's namespace.
    fn users_leases(&self, podman: &Engine) -> Vec<Value> {
        let said = podman.ok(&[
            "unshare",
            binaries().join("migctl").to_str().unwrap(),
            "--config",
            self.site.config().to_str().unwrap(),
            "--json",
            "leases",
        ]);
        serde_json::from_str::<Value>(&said).unwrap()["leases"].as_array().unwrap().clone()
    }

    /// Makes the nodes of capabilities, readable for all, as an administrator does.
    fn make_caps(&self, minors: impl IntoIterator<Item = u64>) {
        let caps = self.site.path("m/dev/nvidia-caps");
        std::fs::create_dir_all(&caps).unwrap();
        let major = self.site.machine()["majors"]["caps"].to_string();
        for minor in minors {
            let node = caps.join(format!("nvidia-cap{minor}"));
            must(Command::new("mknod").args(["-m", "444"]).arg(node).args(["c", &major, &minor.to_string()]));
        }
    }
}

fn note(why: &str) {
    skip(std::thread::current().name().unwrap_or("rootless"), why);
}

/// The limits that the engines' world has found for podman before 5.0.
fn ulimits(dir: &Path) -> String {
    let conf = std::fs::read_to_string(dir.join("podman/containers.conf")).unwrap();
    conf.lines().filter(|line| line.starts_with("default_ulimits")).map(|line| format!("{line}\n")).collect()
}

/// The nodes of a slice and nothing else are there and open.
fn assert_opens(said: &str) {
    let seen = Probe::read(said);
    assert_eq!(seen.nodes.len(), 6, "{said}");
    assert!(seen.nodes.values().all(|(_, verdict)| verdict == "allowed"), "{said}");
}

fn mapped(runtime: &str) {
    let Some(site) = Site::new(&["podman", runtime]) else { return };
    let Some(house) = House::new(&site) else { return };
    let podman = house.root(runtime);
    let caps = site.path("m/dev/nvidia-caps");
    assert!(!caps.exists());
    for options in [["--uidmap", "0:100000:65536"], ["--userns", "auto:size=1024"]] {
        let output =
            run(&mut podman.request(&["mig.profile=1g.10gb"], &[&["--rm"], &options[..]].concat(), &["mig-probe"]));
        assert!(output.status.success(), "{options:?}: {}", text(&output));
        assert_opens(&text(&output));
        site.clean(&format!("after {options:?}"));
    }
    if runtime == "runc" {
        let made: Vec<PathBuf> = std::fs::read_dir(&caps).unwrap().map(|e| e.unwrap().path()).collect();
        assert_eq!(made.len(), 2, "the GPU instance's and the compute instance's: {made:?}");
    }
}

#[test]
fn runc_with_a_user_namespace() {
    mapped("runc");
}

#[test]
fn crun_with_a_user_namespace() {
    mapped("crun");
}

fn a_slice_that_exists(runtime: &str) {
    let Some(site) = Site::new(&["podman", runtime]) else { return };
    let Some(house) = House::new(&site) else { return };
    let Some(podman) = house.user(runtime) else { return };
    site.sim("make", &["--gpu", "0", "--profile", "1g.10gb"]);
    let foreign = site.instances();
    let uuid = foreign[0]["compute_instances"][0]["uuid"].as_str().unwrap().to_owned();
    let ask = format!("mig.uuid={uuid}");
    let minors =
        [&foreign[0]["cap_minor"], &foreign[0]["compute_instances"][0]["cap_minor"]].map(|m| m.as_u64().unwrap());

    // Without its nodes, and with nodes that this user may not open.
    podman.assert_refused(&[&ask], &["--rm"], &["no device node", &format!("nvidia-cap{}", minors[0]), "mknod -m 444"]);
    house.make_caps(minors);
    let last = site.path(&format!("m/dev/nvidia-caps/nvidia-cap{}", minors[1]));
    std::fs::set_permissions(&last, std::fs::Permissions::from_mode(0o400)).unwrap();
    podman.assert_refused(&[&ask], &["--rm"], &["uid 4242 may not open", "setfacl"]);
    assert_eq!(house.users_leases(&podman), Vec::<Value>::new());
    chown(&last, Some(UID), None).unwrap();

    let id = podman.start_with(&[&ask], crate::PROBE_AND_WAIT);
    let seen = podman.probe(&id);
    assert_eq!(seen.variable("CUDA_VISIBLE_DEVICES"), uuid);
    assert_eq!(seen.variable("MIG_DEVICE_PROFILES"), "1g.10gb");
    assert_eq!(seen.nodes.len(), 6, "{seen:?}");
    assert!(seen.nodes.values().all(|(_, verdict)| verdict == "allowed"), "{seen:?}");
    let leases = house.users_leases(&podman);
    assert_eq!((leases.len(), &leases[0]["holder"]["container"]), (1, &json!(id)));
    assert_eq!((&leases[0]["slices"][0]["uuid"], &leases[0]["state"]), (&json!(uuid), &json!("active")));
    assert_eq!(site.leases(), Vec::<Value>::new(), "root's state is untouched");
    podman.assert_refused(&[&ask], &["--rm"], &[&format!("is held by container {}", &id[..12])]);
    podman.assert_refused(&["mig.profile=1g.10gb"], &["--rm"], &["mig/config", "nvidia-cap1", "mig.uuid"]);
    podman.assert_refused(
        &["mig.uuid=MIG-00000000-0000-5000-8000-000000000000"],
        &["--rm"],
        &["there is no MIG slice"],
    );

    podman.ok(&["rm", "-f", "-t", "0", &id]);
    wait_for("the end of the lease", SOON, || house.users_leases(&podman).is_empty());
    assert_eq!(site.instances(), foreign, "what somebody else cut stays");
    assert_opens(&must(&mut podman.request(&[&ask], &["--rm"], &["mig-probe"])));

    // The same by root's CDI spec.
    site.settings("[slices]\nforeign = \"idle\"");
    let spec = site.shown("spec.json");
    must(Command::new(binaries().join("migctl")).arg("--config").arg(site.config()).args(["cdi", "--output", &spec]));
    must(&mut house.enter(&["cp", &spec, "/run/cdi/mig-hook.json"]));
    let device = format!("mig-hook.io/slice={uuid}");
    let by_device = || podman.request(&[], &["--rm", "--device", &device], &["mig-probe"]);
    assert_opens(&must(&mut by_device()));
    std::fs::set_permissions(&last, std::fs::Permissions::from_mode(0o000)).unwrap();
    assert!(!run(&mut by_device()).status.success(), "nodes that this user may not open");
    podman.ok(&["unshare", binaries().join("migctl").to_str().unwrap(), "--config", &site.shown("config.toml"), "gc"]);
    assert_eq!(house.users_leases(&podman), Vec::<Value>::new());
}

#[test]
fn without_root_a_slice_that_exists() {
    a_slice_that_exists("crun");
}

#[test]
fn without_root_a_slice_that_exists_runc() {
    a_slice_that_exists("runc");
}

#[test]
fn without_root_a_slice_that_is_reserved() {
    let Some(site) = Site::new(&["podman", "crun"]) else { return };
    let Some(house) = House::new(&site) else { return };
    let Some(podman) = house.user("crun") else { return };
    let migctl = |args: &[&str]| {
        let mut command = Command::new(binaries().join("migctl"));
        must(command.arg("--config").arg(site.config()).args(args));
    };
    migctl(&["reserve", "1g.10gb", "--uid", "1"]);
    let uuid = site.instances()[0]["compute_instances"][0]["uuid"].as_str().unwrap().to_owned();
    let ask = format!("mig.uuid={uuid}");
    podman.assert_refused(&[&ask], &["--rm"], &["uid 4242 may not open"]);
    migctl(&["reserve", &uuid, "--end"]);
    migctl(&["reserve", &uuid, "--uid", &UID.to_string()]);
    assert_opens(&must(&mut podman.request(&[&ask], &["--rm"], &["mig-probe"])));
    migctl(&["reserve", &uuid, "--end"]);
    migctl(&["destroy", &uuid]);
    site.clean("after destroy");
}

#[test]
fn without_root_the_slice_of_ones_job() {
    let Some(site) = Site::new(&["podman", "crun"]) else { return };
    let Some(house) = House::new(&site) else { return };
    let Some(podman) = house.user("crun") else { return };
    let job = |args: &[&str]| {
        let mut command = Command::new(binaries().join("migctl"));
        command.arg("--config").arg(site.config()).arg("job").args(args).args(["--key", "pbs:7"]);
        must(&mut command)
    };
    job(&["start", "--uid", &UID.to_string(), "--gid", &UID.to_string(), "1g.10gb"]);
    let environment = job(&["env", "--format", "docker"]);
    let uuid = environment.lines().find_map(|line| line.strip_prefix("MIG_UUID=")).expect("MIG_UUID").to_owned();
    let said = must(&mut podman.request(&[&format!("mig.uuid={uuid}")], &["--rm"], &["sh", "-c", "env; mig-probe"]));
    assert_opens(&said);
    assert!(said.contains(&format!("CUDA_VISIBLE_DEVICES={uuid}")), "{said}");
    assert_eq!(site.leases()[0]["holder"]["job"], "pbs:7");
    job(&["end"]);
    site.clean("after the job's end");
}

#[test]
fn without_root_but_with_the_capability_for_configuring_slices_are_cut() {
    let Some(site) = Site::new(&["podman", "crun"]) else { return };
    let Some(house) = House::new(&site) else { return };
    let Some(podman) = house.user("crun") else { return };
    // What an administrator delegates: the capability, and the nodes of whatever may be cut on GPU 0, which never change.
    house.make_caps([1].into_iter().chain(3..138));
    let config = site.path("m/dev/nvidia-caps/nvidia-cap1");
    std::fs::set_permissions(&config, std::fs::Permissions::from_mode(0o400)).unwrap();
    chown(&config, Some(UID), None).unwrap();
    // The simulator keeps its machine in files, which the driver does not.
    for dir in ["usr/lib/nvml-sim", "proc/driver/nvidia/capabilities/gpu0/mig"] {
        std::fs::set_permissions(site.path("m").join(dir), std::fs::Permissions::from_mode(0o777)).unwrap();
    }
    let ask = ["mig.profile=2g.20gb", "mig.gpu=0"];
    let id = podman.start_with(&ask, crate::PROBE_AND_WAIT);
    let seen = podman.probe(&id);
    assert_eq!(seen.variable("MIG_DEVICE_PROFILES"), "2g.20gb");
    assert!(seen.nodes.len() == 6 && seen.nodes.values().all(|(_, verdict)| verdict == "allowed"), "{seen:?}");
    assert_eq!((site.instances().len(), house.users_leases(&podman).len()), (1, 1));
    podman.ok(&["stop", "-t", "0", &id]);
    wait_for("the end of the lease", SOON, || house.users_leases(&podman).is_empty() && site.instances().is_empty());
    podman.assert_refused(&["mig.profile=7g.81gb"], &["--rm"], &["7g.81gb", "7g.80gb"]);
}
