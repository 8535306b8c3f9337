//! `migctl doctor`: a machine without a driver, one where all is well, and many where something is not.

use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Output};
use std::sync::{Mutex, MutexGuard};

use serde_json::{Value, json};

use crate::common::{DEMO, Init, World, binaries, installed, run, skip, text};
use crate::{asked, code, schema, snapshot};

/// One patient at a time: a test starts a process that doctor knows by its name.
static PROCESSES: Mutex<()> = Mutex::new(());

/// A host below which podman and docker know mig-hook, with everything that this takes.
struct Patient {
    world: World,
    _log: UnixDatagram,
    _alone: MutexGuard<'static, ()>,
}

const HOOK: &str = r#"{"version": "1.0.0", "hook": {"path": "/usr/libexec/oci/hooks.d/mig-hook", "args": ["mig-hook", "precreate"]},
  "when": {"annotations": {"^mig\\.": ""}}, "stages": ["precreate"]}"#;
const CONTAINERS: &str = "[engine]\nhooks_dir = [\"/usr/share/mig-hook/hooks.d/podman\"]\n[engine.runtimes]\nmig = \
                          [\"/usr/bin/mig-runtime\"]\n";
const HOOK_FILE: &str = "host/usr/share/mig-hook/hooks.d/podman/mig-hook.json";

impl Patient {
    /// Nothing but a world and a place to log to.
    fn bare(world: World) -> Patient {
        let alone = PROCESSES.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let log = UnixDatagram::bind(world.path("log.sock")).unwrap();
        Patient { world, _log: log, _alone: alone }
    }

    fn new(boards: &[&str], options: &[&str]) -> Patient {
        let world = World::with(boards, &[&["--seed", "doctor"], options].concat());
        let programs = ["bin/mig-runtime", "libexec/mig-hook/mig-engine", "libexec/oci/hooks.d/mig-hook"];
        for program in programs.iter().chain(&["bin/podman", "bin/dockerd", "sbin/runc"]) {
            world.script(&format!("host/usr/{program}"), "");
        }
        world.write(HOOK_FILE, HOOK);
        world.write("host/etc/containers/containers.conf.d/50-mig-hook.conf", CONTAINERS);
        let runtime =
            json!({"path": "/usr/bin/mig-runtime", "runtimeArgs": ["--mig-env", "--mig-runtime=/usr/sbin/runc"]});
        let daemon = json!({"runtimes": {"mig": runtime}});
        world.write("host/etc/docker/daemon.json", &daemon.to_string());
        Patient::bare(world)
    }

    fn run(&self, more: &[&str]) -> Output {
        let host = self.world.path("host").display().to_string();
        self.world.migctl(&[&["doctor", "--root", &host], more].concat())
    }

    /// The document, held against its schema and the exit code against its status.
    fn document(&self) -> Value {
        verified(&self.run(&["--json"]))
    }

    /// Everything that is neither ok nor left out.
    fn faults(&self) -> Vec<String> {
        let document = self.document();
        let checks = document["checks"].as_array().unwrap();
        let faults = checks.iter().filter(|c| c["status"] == "warn" || c["status"] == "fail");
        faults.map(|c| c["id"].as_str().unwrap().to_owned()).collect()
    }

    /// The only fault, which is of that id and status: what is said of it, with the remedy.
    fn only(&self, id: &str, status: &str) -> String {
        let check = self.check(id);
        assert_eq!((check["status"].as_str().unwrap(), self.faults()), (status, vec![id.to_owned()]), "{check:#}");
        said(&check)
    }

    fn check(&self, id: &str) -> Value {
        let document = self.document();
        let checks = document["checks"].as_array().unwrap();
        checks.iter().find(|check| check["id"] == id).unwrap_or_else(|| panic!("no {id} in {document:#}")).clone()
    }

    /// As a terminal shows it, less what differs between machines.
    fn snapshot(&self, name: &str) {
        let output = self.run(&[]);
        assert!(output.stderr.is_empty(), "{}", text(&output));
        let shown = String::from_utf8(output.stdout.clone()).unwrap();
        let cgroup = |line: &str| line.contains("cgroup v") && line.starts_with("  ok");
        let shown: Vec<&str> =
            shown.lines().map(|line| if cgroup(line) { "  ok    cgroup [version]" } else { line }).collect();
        let shown = shown.join("\n").replace(env!("CARGO_PKG_VERSION"), "[version]");
        let mut shown = shown + &format!("\n[exit {}]\n", code(&output));
        for key in ["caps", "uvm"] {
            let major = self.world.machine()["majors"][key].to_string();
            shown = shown.replace(&format!("major {major}"), &format!("major [{key}]"));
            shown = shown.replace(&format!(" {major}:"), &format!(" [{key}]:"));
        }
        snapshot(&self.world, name, &shown);
    }
}

fn verified(output: &Output) -> Value {
    assert!(output.stderr.is_empty(), "{}", text(output));
    let document: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {}", text(output)));
    schema("doctor", &document);
    let mut ids: Vec<&str> = document["checks"].as_array().unwrap().iter().map(|c| c["id"].as_str().unwrap()).collect();
    let all = ids.len();
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), all, "an id is there twice: {document:#}");
    for check in document["checks"].as_array().unwrap() {
        let needs = ["warn", "fail"].contains(&check["status"].as_str().unwrap());
        assert_eq!(check["remedy"].is_string(), needs, "{check:#}");
    }
    let expected = match document["status"].as_str().unwrap() {
        "ok" => 0,
        "warn" => 1,
        _ => 69,
    };
    assert_eq!(code(output), expected, "{document:#}");
    document
}

fn said(check: &Value) -> String {
    format!("{}\n{}", check["found"].as_str().unwrap(), check["remedy"].as_str().unwrap_or_default())
}

fn can_make_nodes(what: &str) -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        skip(what, "not root: neither device nodes nor slices are to be seen");
    }
    root
}

#[test]
fn a_bare_machine_has_no_driver() {
    let bare = Patient::bare(World::new(&["a30-24gb"]));
    let dir = bare.world.path("none").display().to_string();
    std::fs::create_dir(&dir).unwrap();
    std::fs::create_dir(bare.world.path("host")).unwrap();
    bare.world.write(
        "config.toml",
        &format!(
            "state_dir = \"{dir}/state\"\n[driver]\nroot = \"{dir}\"\nproc_root = \"{dir}/proc\"\n[log]\nsocket = \"{}\"\n",
            bare.world.path("log.sock").display()
        ),
    );
    if can_make_nodes("doctor's page on a bare machine") {
        bare.snapshot("doctor-bare");
    }
    assert!(said(&bare.check("driver.module")).contains("install the NVIDIA driver"));
    assert!(said(&bare.check("driver.library")).contains("libnvidia-ml"));
    assert_eq!(bare.check("gpu.any")["status"], "skip");
    assert!(!bare.world.path("none/state").exists(), "looking makes nothing");
}

#[test]
fn all_is_well_on_the_demo_machine() {
    if !can_make_nodes("doctor on the demo machine") {
        return;
    }
    let demo = Patient::new(&DEMO, &[]);
    assert_eq!(demo.faults(), Vec::<String>::new());
    demo.snapshot("doctor-demo");
    // With containers, kept and foreign slices it still is.
    demo.world.recording_runtime(0);
    let (_bundle, _init) = demo.world.living("web", &asked("1g.10gb,2g.20gb"));
    demo.world.sim("make", &["--gpu", "2", "--profile", "3g.40gb"]);
    assert_eq!(demo.faults(), Vec::<String>::new());
    assert_eq!(demo.check("gpu.0.slices")["found"], "GPU 0: slices: 2 held");
    assert_eq!(demo.check("gpu.2.slices")["found"], "GPU 2: slices: 1 foreign");
    assert_eq!(demo.check("state.leases")["found"], "1 lease, each with a living holder");
}

#[test]
fn a_broken_machine_names_every_fault_with_its_remedy() {
    if !can_make_nodes("doctor on a broken machine") {
        return;
    }
    let broken = Patient::new(&DEMO, &["--mig", "off"]);
    let world = &broken.world;
    world.sim("mode", &["--gpu", "0", "on"]);
    std::fs::create_dir_all(world.path("state/leases")).unwrap();
    std::fs::set_permissions(world.path("state"), std::fs::Permissions::from_mode(0o755)).unwrap();
    std::fs::remove_file(world.path("m/dev/nvidia1")).unwrap();
    world.write("m/dev/nvidia1", "");
    world.write("host/etc/lsf.conf", "LSF_MANAGE_MIG=Y\n");
    world.write("host/etc/slurm/gres.conf", "AutoDetect=nvml\n");
    std::fs::remove_file(world.path("host/usr/libexec/oci/hooks.d/mig-hook")).unwrap();
    world.settings("[requests]\nopen_device_rules = true\n[limits]\ngpus = [\"0\", \"1\", \"9\"]");
    broken.snapshot("doctor-broken");
    let faults = [
        "gpu.0.mig-mode",
        "gpu.1.mig-mode",
        "gpu.any",
        "nodes.nvidia1",
        "settings.gpus",
        "state.directory",
        "install.programs",
        "engine.podman.hook",
        "exposure.device-rules",
        "rival.slurm",
        "rival.lsf",
    ];
    assert_eq!(broken.faults(), faults);
}

#[test]
fn a_mode_that_waits_for_a_reset() {
    let machine = Patient::new(&["a100-sxm4-80gb", "h100-sxm-80gb"], &["--mig", "off"]);
    machine.world.sim("mode", &["--gpu", "0", "on"]);
    machine.world.sim("mode", &["--gpu", "1", "on"]);
    let check = machine.check("gpu.0.mig-mode");
    assert_eq!(check["status"], "warn");
    assert!(said(&check).contains("goes on with the next reset") && said(&check).contains("--gpu-reset -i 0"));
    assert_eq!(machine.check("gpu.1.mig-mode")["status"], "ok");
    machine.world.sim("reset", &["--gpu", "0"]);
    assert_eq!(machine.check("gpu.0.mig-mode")["status"], "ok");
}

#[test]
fn a_state_directory_that_others_can_open_or_own() {
    if !can_make_nodes("doctor on a state directory") {
        return;
    }
    let machine = Patient::new(&["a30-24gb"], &[]);
    machine.world.recording_runtime(0);
    let (_bundle, _init) = machine.world.living("c1", &asked("1g.6gb"));
    let state = machine.world.path("state");
    std::fs::set_permissions(&state, std::fs::Permissions::from_mode(0o755)).unwrap();
    assert!(machine.only("state.directory", "fail").contains("chmod 700"));
    // As the first job leaves it.
    std::fs::set_permissions(&state, std::fs::Permissions::from_mode(0o711)).unwrap();
    assert_eq!(machine.faults(), Vec::<String>::new());
    std::fs::set_permissions(&state, std::fs::Permissions::from_mode(0o700)).unwrap();
    chown(&state, Some(12345), None).unwrap();
    assert!(machine.only("state.directory", "fail").contains("belongs to uid 12345"));
    chown(&state, Some(0), None).unwrap();
    assert_eq!(machine.faults(), Vec::<String>::new());
    // A record of another version, and one of an earlier boot.
    let token = machine.world.lease()["token"].as_str().unwrap().to_owned();
    std::fs::write(state.join("boot_id"), "another").unwrap();
    assert!(machine.only("state.boot", "warn").contains("migctl gc"));
    std::fs::write(state.join("boot_id"), std::fs::read("/proc/sys/kernel/random/boot_id").unwrap()).unwrap();
    machine.world.edit_lease(&token, |lease| lease["version"] = json!(9));
    let unreadable = machine.check(&format!("state.lease.{token}"));
    assert!(unreadable["status"] == "fail" && said(&unreadable).contains("version 9"), "{unreadable:#}");
}

#[test]
fn a_lease_whose_container_is_dead() {
    if !can_make_nodes("doctor on a stale lease") {
        return;
    }
    let machine = Patient::new(&["a30-24gb"], &[]);
    machine.world.recording_runtime(0);
    let (_bundle, init) = machine.world.living("web", &asked("1g.6gb"));
    drop(init);
    let stale = machine.only("state.leases", "warn");
    assert!(stale.contains("1g.6gb of container web") && stale.contains("migctl gc"), "{stale}");
    assert_eq!(machine.world.leases().len(), 1, "doctor frees nothing");
    machine.world.document(&["gc"]);
    assert_eq!(machine.faults(), Vec::<String>::new());
}

#[test]
fn a_slice_that_the_driver_does_not_let_go() {
    if !can_make_nodes("doctor on a slice in use") {
        return;
    }
    let machine = Patient::new(&["a30-24gb"], &[]);
    machine.world.recording_runtime(0);
    let (_bundle, init) = machine.world.living("web", &asked("1g.6gb"));
    let token = machine.world.lease()["token"].as_str().unwrap().to_owned();
    let gi = machine.world.instances()[0]["id"].to_string();
    let holder = format!("holder.{token}.0");

    // A process of nobody's, which the driver lists.
    let user = Init::start();
    machine.world.sim("hold", &["--gpu", "0", "--gi", &gi, "--pid", &user.pid().to_string()]);
    let outside = machine.only(&holder, "warn");
    assert!(outside.contains(&format!("also open in sleep (pid {})", user.pid())), "{outside}");
    assert!(outside.contains(&format!("kill {}\n", user.pid())), "{outside}");
    machine.world.sim("unhold", &["--gpu", "0", "--gi", &gi]);

    // One that the driver does not list, and that can't be seen either.
    machine.world.sim("hold", &["--gpu", "0", "--gi", &gi]);
    drop(init);
    assert_eq!(code(&machine.world.migctl(&["release", &token])), 75);
    let stuck = machine.only(&holder, "warn");
    assert!(stuck.contains("no process is to be seen") && stuck.contains("fuser -v /dev/nvidia0"), "{stuck}");
    machine.world.sim("unhold", &["--gpu", "0", "--gi", &gi]);
    machine.world.document(&["gc"]);
    assert_eq!(machine.faults(), Vec::<String>::new());
}

#[test]
fn a_process_with_another_s_capability_open() {
    let machine = Patient::new(&["a30-24gb"], &[]);
    machine.world.recording_runtime(0);
    let (_bundle, _init) = machine.world.living("web", &asked("1g.6gb"));
    let lease = machine.world.lease();
    let open = machine.world.open_capability(lease["token"].as_str().unwrap());
    let found = machine.only(&format!("holder.{}.0", lease["token"].as_str().unwrap()), "warn");
    assert!(found.contains(&format!("(pid {})", std::process::id())), "{found}");
    drop(open);
    assert_eq!(machine.faults(), Vec::<String>::new());
}

#[test]
fn nodes_that_are_not_what_they_are_called() {
    if !can_make_nodes("doctor on wrong nodes") {
        return;
    }
    let machine = Patient::new(&["a30-24gb"], &[]);
    let dir = machine.world.path("m/dev/nvidia-caps");
    std::fs::create_dir(&dir).unwrap();
    let major = machine.world.machine()["majors"]["caps"].as_u64().unwrap();
    let node = |name: &str, major: u64, minor: u64, mode: &str| {
        let command = &mut Command::new("mknod");
        let made =
            run(command.args(["-m", mode]).arg(dir.join(name)).arg("c").args([major, minor].map(|n| n.to_string())));
        assert!(made.status.success(), "{}", text(&made));
    };
    node("nvidia-cap12", major, 12, "444");
    assert_eq!(machine.faults(), Vec::<String>::new());
    node("nvidia-cap13", major - 1, 13, "444");
    let wrong = machine.only("nodes.capabilities", "fail");
    assert!(wrong.contains(&format!("nvidia-cap13 is device {}:13", major - 1)) && wrong.contains("rm -r "), "{wrong}");
    std::fs::remove_file(dir.join("nvidia-cap13")).unwrap();
    node("nvidia-cap1", major, 1, "444");
    assert!(machine.only("nodes.config", "fail").contains("every user may cut"));
    std::fs::set_permissions(dir.join("nvidia-cap1"), std::fs::Permissions::from_mode(0o400)).unwrap();
    std::fs::set_permissions(&dir, std::fs::Permissions::from_mode(0o700)).unwrap();
    assert!(machine.only("nodes.caps-directory", "warn").contains("chmod 755"));
}

#[test]
fn a_driver_that_is_not_whole() {
    if !can_make_nodes("doctor on parts of a driver") {
        return;
    }
    let machine = Patient::new(&["a30-24gb"], &[]);
    let edit = |file: &str, from: &str, to: &str| {
        let path = machine.world.path(file);
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.contains(from), "{text}");
        std::fs::write(path, text.replace(from, to)).unwrap();
    };
    edit("m/proc/devices", "nvidia-uvm", "other-uvm");
    assert!(machine.only("driver.uvm", "fail").contains("modprobe nvidia-uvm"));
    machine.world.script("m/usr/bin/nvidia-modprobe", "");
    assert!(machine.only("driver.uvm", "warn").contains("nvidia-modprobe -u -c 0"));
    edit("m/proc/devices", "other-uvm", "nvidia-uvm");
    edit("m/proc/driver/nvidia/version", "580.95.05", "570.10.01");
    let mixed = machine.only("driver.version", "fail");
    assert!(mixed.contains("570.10.01") && mixed.contains("580.95.05") && mixed.contains("reboot"), "{mixed}");
    machine.world.write("m/usr/lib/libnvidia-ml.so.1", "no library");
    let library = machine.check("driver.library");
    assert!(library["status"] == "fail" && said(&library).contains("dmesg | grep -i nvrm"), "{library:#}");
    assert_eq!(machine.check("gpu.any")["status"], "skip");
    std::fs::remove_file(machine.world.path("m/proc/driver/nvidia/version")).unwrap();
    assert!(said(&machine.check("driver.module")).contains("modprobe nvidia"));

    drop(machine);
    let old = Patient::new(&["a30-24gb"], &["--driver-version", "470.82.01"]);
    assert!(old.only("driver.version", "warn").contains("older than branch 535"));
}

#[test]
fn a_gpu_that_is_lost() {
    let machine = Patient::new(&["a30-24gb", "a30-24gb"], &[]);
    let lost = |times: &str| {
        machine
            .world
            .fault("nvmlDeviceGetHandleByIndex_v2", &["--nth", "1", "--times", times, "--fail", "GPU_IS_LOST"]);
    };
    lost("1");
    let one = machine.check("gpu.unseen");
    assert!(one["status"] == "fail" && said(&one).contains("needs a reset or a reboot"), "{one:#}");
    lost("2");
    let all = machine.check("gpu.any");
    assert!(all["status"] == "fail" && said(&all).contains("the GPU is lost"), "{all:#}");
    assert!(!machine.faults().iter().any(|id| id.starts_with("gpu.")));
}

#[test]
fn settings_that_cannot_be_used_are_a_finding() {
    let machine = Patient::new(&["a30-24gb"], &[]);
    let config = machine.world.config();
    machine.world.settings("[limits]\nprofile = []");
    let wrong = machine.check("settings.file");
    assert!(wrong["status"] == "fail" && said(&wrong).contains("limits.profiles"), "{wrong:#}");
    machine.world.settings("");
    std::fs::set_permissions(&config, std::fs::Permissions::from_mode(0o666)).unwrap();
    assert!(said(&machine.check("settings.file")).contains("chmod 644"));
    std::fs::remove_file(&config).unwrap();
    assert!(said(&machine.check("settings.file")).contains("config.toml"));
}

#[test]
fn engines_whose_entries_lead_nowhere() {
    if !can_make_nodes("doctor on engines") {
        return;
    }
    let machine = Patient::new(&["a30-24gb"], &[]);
    let world = &machine.world;
    world.write(HOOK_FILE, &HOOK.replace("/usr/libexec", "/opt/libexec"));
    let hook = machine.only("engine.podman.hook", "fail");
    assert!(hook.contains("/opt/libexec/oci/hooks.d/mig-hook, which is not there"), "{hook}");
    world.write(HOOK_FILE, HOOK);

    // A dockerd that was not reloaded, and one that was.
    let listener = |answer: &'static str| {
        let path = world.path("host/run/docker.sock");
        let _ = std::fs::remove_file(&path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        let listener = UnixListener::bind(path).unwrap();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                use std::io::{Read, Write};
                let mut stream = stream.unwrap();
                let mut request = [0; 1024];
                let _ = stream.read(&mut request);
                let _ = stream.write_all(format!("HTTP/1.0 200 OK\r\n\r\n{answer}").as_bytes());
            }
        });
    };
    listener(r#"{"Runtimes": {"runc": {}}}"#);
    assert!(machine.only("engine.docker.mig", "warn").contains("systemctl reload docker"));
    listener(r#"{"Runtimes": {"runc": {}, "mig": {}}}"#);
    assert_eq!(machine.faults(), Vec::<String>::new());

    let daemon = std::fs::read_to_string(world.path("host/etc/docker/daemon.json")).unwrap();
    world.write("host/etc/docker/daemon.json", &daemon.replace("/usr/sbin/runc", "/usr/sbin/nvidia-container-runtime"));
    assert!(machine.only("engine.docker.mig", "fail").contains("migctl configure docker --name mig"));
    world.write("host/etc/docker/daemon.json", &daemon.replacen('{', "{\"default-runtime\": \"mig\", ", 1));
    let exposed = machine.only("exposure.environment", "fail");
    assert!(exposed.contains("every image's ENV") && exposed.contains("--default"), "{exposed}");
    world.write("host/etc/docker/daemon.json", "{oops");
    assert!(machine.only("engine.docker.file", "warn").contains("not valid JSON"));
    std::fs::remove_file(world.path("host/etc/docker/daemon.json")).unwrap();
    std::fs::remove_file(world.path("host/usr/bin/dockerd")).unwrap();

    // CRI-O does not start with our precreate hook in its own directory.
    world.script("host/usr/bin/crio", "");
    world.write("host/usr/share/containers/oci/hooks.d/mig.json", HOOK);
    assert!(machine.only("engine.crio.hooks", "fail").contains("does not start"));
    std::fs::remove_dir_all(world.path("host/usr/share/containers")).unwrap();
    std::fs::remove_dir_all(world.path("host/etc/containers")).unwrap();
    assert!(machine.only("engine.any", "warn").contains("migctl configure podman"));
}

#[test]
fn rivals_are_named() {
    if !can_make_nodes("doctor on rivals") {
        return;
    }
    let machine = Patient::new(&["a30-24gb"], &[]);
    let write = |path: &str, text: &str| machine.world.write(&format!("host/{path}"), text);
    let remove = |path: PathBuf| std::fs::remove_file(path).unwrap();
    for (file, text, id, status, part) in [
        ("etc/lsf.conf", "LSF_MANAGE_MIG=Y\n", "rival.lsf", "fail", "LSF_MANAGE_MIG=N"),
        ("etc/slurm/gres.conf", "NodeName=n1 AutoDetect=nvml\n", "rival.slurm", "warn", "AutoDetect=off"),
        (
            "etc/systemd/system/multi-user.target.wants/nvidia-mig-manager.service",
            "",
            "rival.mig-manager",
            "warn",
            "systemctl disable --now nvidia-mig-manager",
        ),
        ("var/lib/kubelet/device-plugins/nvidia-gpu.sock", "", "rival.kubernetes", "warn", "limits.gpus"),
    ] {
        let path = write(file, text);
        let found = machine.only(id, status);
        assert!(found.contains(part), "{found}");
        remove(path);
    }
    std::fs::copy("/bin/sleep", machine.world.path("nv-hostengine")).unwrap();
    let mut engine = Command::new(machine.world.path("nv-hostengine")).arg("600").spawn().unwrap();
    let found = machine.only("rival.dcgm", "warn");
    engine.kill().unwrap();
    engine.wait().unwrap();
    assert!(found.contains(&format!("nv-hostengine (pid {})", engine.id())), "{found}");
    assert!(found.contains("systemctl stop nvidia-dcgm"), "{found}");
    assert_eq!(machine.faults(), Vec::<String>::new());
}

/// What a site has of its own. Slurm's files as `migctl slurm config` makes them are beside it.
const SLURM: &str = "ClusterName=mini\nTaskPlugin=task/affinity,task/cgroup\nEpilog=/etc/slurm/epilog.d/*\n\
                     PrologEpilogTimeout=120\nGresTypes=gpu\nNodeFeaturesPlugins=node_features/helpers\n\
                     Include nodes.conf\nInclude mig-hook.conf\n";

/// Slurm as it should be on this machine.
fn slurm(world: &World) {
    world.script("host/usr/sbin/slurmd", "");
    for stage in ["prolog", "task-prolog"] {
        world.script(&format!("host/usr/libexec/mig-hook/slurm/{stage}"), &format!("exec migctl slurm {stage}"));
    }
    world.script("host/etc/slurm/epilog.d/50-mig", "exec /usr/bin/migctl slurm epilog");
    world.write("host/etc/hostname", "n7.example.org\n");
    let conf = world.write("host/etc/slurm/slurm.conf", SLURM).display().to_string();
    let dir = world.path("host/etc/slurm").display().to_string();
    let made = world.migctl(&["slurm", "config", "--name", "n7", "--slurm-conf", &conf, "--dir", &dir]);
    assert!(made.status.success(), "{}", text(&made));
    let read = |file: &str| std::fs::read_to_string(world.path("host/etc/slurm").join(file)).unwrap();
    let lines = read("mig-hook.conf");
    let gres = lines.lines().find_map(|line| line.strip_prefix("# NodeName=n7 Gres=")).unwrap();
    world.write(
        "host/etc/slurm/nodes.conf",
        &format!("NodeName=n[1-9] CPUs=4 \\ # all alike\n  Gres={gres} State=UNKNOWN\n"),
    );
    let runtime = binaries().join("mig-runtime").display().to_string();
    world.write("host/etc/slurm/oci.conf", &read("oci.conf").replace(&runtime, "/usr/bin/mig-runtime"));
    world.write("host/etc/slurm/cgroup.conf", "ConstrainDevices=yes\n");
    world.write("host/etc/slurm/helpers.conf", "Feature=nps1,nps2 Helper=/usr/local/bin/nps\n");
}

/// Changes something in one of Slurm's files.
fn change(world: &World, file: &str, from: &str, to: &str) {
    let path = world.path("host/etc/slurm").join(file);
    let text = std::fs::read_to_string(&path).unwrap();
    assert!(text.contains(from), "{from} in {text}");
    std::fs::write(&path, text.replace(from, to)).unwrap();
}

#[test]
fn slurm_as_it_should_be_and_with_every_fault() {
    if !can_make_nodes("doctor on Slurm") {
        return;
    }
    let machine = Patient::new(&DEMO, &[]);
    let world = &machine.world;
    world.script("host/usr/sbin/slurmd", "");
    assert!(said(&machine.check("slurm.conf")).contains("SLURM_CONF"));
    world.write("host/etc/slurm/slurm.conf", "ClusterName=mini\n");
    assert!(said(&machine.check("slurm.conf")).contains("knows nothing of mig-hook"));
    assert_eq!(machine.faults(), Vec::<String>::new());
    slurm(world);
    assert_eq!(machine.faults(), Vec::<String>::new());
    machine.snapshot("doctor-slurm");

    let of_us = |from, to| change(world, "mig-hook.conf", from, to);
    of_us("PrologFlags=Contain", "PrologFlags=Alloc");
    of_us("proctrack/cgroup", "proctrack/linuxproc");
    of_us("migc,", "");
    of_us("JobSubmitPlugins=lua\n", "");
    of_us("\nProlog=/usr/libexec/mig-hook/slurm/prolog", "\nProlog=/etc/slurm/site-prolog");
    change(world, "slurm.conf", "TaskPlugin=task/affinity,task/cgroup", "TaskPlugin=task/none");
    change(world, "slurm.conf", "Timeout=120", "Timeout=20\nInclude gone.conf");
    world.script("host/etc/slurm/site-prolog", "# migctl slurm prolog");
    let epilog = world.path("host/etc/slurm/epilog.d/50-mig");
    std::fs::set_permissions(&epilog, std::fs::Permissions::from_mode(0o777)).unwrap();
    std::fs::remove_file(world.path("host/usr/libexec/mig-hook/slurm/task-prolog")).unwrap();
    change(world, "nodes.conf", "migc:21", "gpu:1g.10gb:2,migc:28");
    world.write(
        "host/etc/slurm/gres.conf",
        "Name=gpu Type=1g.10gb MultipleFiles=/dev/nvidia0,/dev/nvidia-caps/nvidia-cap21\n",
    );
    change(world, "cgroup.conf", "yes", "no");
    change(world, "oci.conf", " KILL", "");
    change(world, "helpers.conf", "nps1,nps2", "mig=on,mig=off");
    machine.snapshot("doctor-slurm-broken");
    let faults = [
        "slurm.conf",
        "slurm.prolog",
        "slurm.epilog",
        "slurm.task-prolog",
        "slurm.prolog-flags",
        "slurm.proctrack",
        "slurm.task-plugin",
        "slurm.devices",
        "slurm.lua",
        "slurm.timeout",
        "slurm.gres-types",
        "slurm.node",
        "slurm.oci",
        "slurm.features",
        "rival.slurm",
    ];
    assert_eq!(machine.faults(), faults);
}

#[test]
fn slurm_s_faults_one_by_one() {
    if !can_make_nodes("doctor on faults of Slurm") {
        return;
    }
    let machine = Patient::new(&["a30-24gb"], &[]);
    let world = &machine.world;
    for (file, from, to, id, status, part) in [
        ("mig-hook.conf", "\nProlog=/usr", "\n#Prolog=/usr", "slurm.prolog", "fail", "jobs get no slice"),
        ("slurm.conf", "Epilog=/etc/slurm/epilog.d/*\n", "", "slurm.epilog", "warn", "Epilog is not set"),
        ("mig-hook.conf", "TaskProlog=", "TaskEpilog=", "slurm.task-prolog", "fail", "call migctl slurm task-prolog"),
        ("mig-hook.conf", "PrologFlags=Contain\n", "", "slurm.prolog-flags", "fail", "PrologFlags=Contain"),
        ("mig-hook.conf", "proctrack/cgroup", "proctrack/pgid", "slurm.proctrack", "warn", "proctrack/pgid"),
        ("slurm.conf", ",task/cgroup", "", "slurm.task-plugin", "warn", "task/cgroup"),
        ("mig-hook.conf", "CliFilterPlugins=lua", "", "slurm.lua", "warn", "--gres=mig:PROFILE"),
        ("slurm.conf", "Timeout=120", "Timeout=29", "slurm.timeout", "warn", "at least 30"),
        ("mig-hook.conf", "gpu,mig,migc", "gpu,migc", "slurm.gres-types", "fail", "no mig:"),
        ("mig-hook.conf", ",mig2g12gbme", "", "slurm.gres-types", "fail", "no mig2g12gbme:"),
        (
            "slurm.conf",
            "Include nodes.conf",
            "include old/%c.conf",
            "slurm.conf",
            "warn",
            "/host/etc/slurm/old/mini.conf",
        ),
        ("nodes.conf", "migc:4", "migc:5", "slurm.node", "fail", "only migc:4,migm:4"),
        ("nodes.conf", "mig2g12gbme:1", "mig2g12gbme:2", "slurm.node", "fail", "mig2g12gbme:2, and its GPUs only"),
        ("nodes.conf", "migm:4", "migm:3", "slurm.node", "warn", "Gres=migc:4,migm:4,mig1g6gbme:1,mig2g12gbme:1 in"),
        ("nodes.conf", ",mig2g12gbme:1", "", "slurm.node", "fail", "never start here"),
        ("cgroup.conf", "yes", "no", "slurm.devices", "warn", "ConstrainDevices=yes"),
        ("oci.conf", " KILL", " TERM", "slurm.oci", "warn", "ignores TERM"),
        ("oci.conf", "--mig-job slurm:mini:%j", "", "slurm.oci", "fail", "--mig-job"),
        ("oci.conf", "RunTimeRun", "RunTimeCreate", "slurm.oci", "fail", "the step hangs"),
        (
            "oci.conf",
            "/usr/bin/mig-runtime",
            "/opt/mig-runtime",
            "slurm.oci",
            "fail",
            "/opt/mig-runtime, which is not there",
        ),
        ("helpers.conf", "nps1", "mig=on", "slurm.features", "warn", "reboots the node"),
        ("gres.conf", "Name=migc", "AutoDetect=NVML Name=migc", "rival.slurm", "warn", "AutoDetect=off"),
        (
            "gres.conf",
            "NodeName=n7 Name=migc",
            "Name=gpu File=/dev/nvidia[0-3]\nNodeName=n7 Name=migc",
            "rival.slurm",
            "fail",
            "gpu: /dev/nvidia[0-3]",
        ),
    ] {
        slurm(world);
        change(world, file, from, to);
        if from.starts_with("Include") {
            assert_eq!(machine.check("slurm.node")["status"], "skip", "no NodeName is known");
        }
        let found = machine.only(id, status);
        assert!(found.contains(part), "{file}, {to}: {found}");
    }
    // What our settings ask of Slurm's.
    slurm(world);
    world.settings("[jobs]\nconfine = true\nwait = \"5m\"");
    assert!(machine.only("slurm.timeout", "fail").contains("at least 330"));
    assert!(said(&machine.check("slurm.devices")).contains("their own slices only"));
    world.settings("[jobs]\nconfine = true");
    world.write("host/etc/slurm/cgroup.conf", "");
    assert!(machine.only("slurm.devices", "warn").contains("every job is refused"));
    world.settings("");
    // GPUs that are not ours may be Slurm's.
    slurm(world);
    world.write("host/etc/slurm/gres.conf", "Name=gpu File=/dev/nvidia1\n");
    assert_eq!(machine.faults(), Vec::<String>::new());
}

#[test]
fn this_very_machine_is_looked_at_whatever_is_on_it() {
    let world = World::new(&["a30-24gb"]);
    let runtime = world.script("rt/my-runc", "echo 'runc version 1.1.11'");
    world.settings(&format!("[runtime]\npath = \"{}\"", runtime.display()));
    let document = verified(&world.migctl(&["doctor", "--json"]));
    let old = document["checks"].as_array().unwrap().iter().find(|c| said(c).contains("rt/my-runc")).unwrap();
    assert!(old["id"].as_str().unwrap().starts_with("runtime.runc") && old["status"] == "warn", "{old:#}");
    assert!(said(old).contains("CVE-2024-21626") && said(old).contains("backported"), "{old:#}");
    let programs = document["checks"].as_array().unwrap().iter().find(|c| c["id"] == "install.programs").unwrap();
    assert_eq!(programs["status"], "ok", "{programs:#}");
}

#[test]
fn nothing_that_lies_in_its_way_makes_it_fail() {
    let machine = Patient::new(&["a30-24gb"], &[]);
    let world = &machine.world;
    let files = [
        "host/etc/docker/daemon.json",
        "host/etc/containers/containers.conf.d/50-mig-hook.conf",
        "host/etc/containerd/config.toml",
        "host/etc/crio/crio.conf",
        "host/etc/slurm/slurm.conf",
        "host/etc/slurm/gres.conf",
        "host/etc/slurm/oci.conf",
        "host/etc/lsf.conf",
        HOOK_FILE,
        "m/proc/devices",
        "m/proc/driver/nvidia/version",
    ];
    for garbage in
        ["", "\0\u{1}\u{fffd}{[", "[[[", "{\"a\": [1, {}], \"runtimes\": 3}", "version = 1\n", "GresTypes=migc\n"]
    {
        for file in files {
            world.write(file, garbage);
        }
        machine.document();
    }
    for file in files.iter().filter(|file| file.starts_with("host/")) {
        std::fs::remove_file(world.path(file)).unwrap();
        assert!(run(Command::new("mkfifo").arg(world.path(file))).status.success());
    }
    machine.world.write("state", "no directory");
    assert!(code(&machine.run(&[])) == 69);
}

#[test]
fn who_is_not_root_is_told_so_and_sees_the_rest() {
    if !can_make_nodes("doctor without root") {
        return;
    }
    let machine = Patient::new(&["a30-24gb"], &[]);
    machine.world.recording_runtime(0);
    let (_bundle, _init) = machine.world.living("web", &asked("1g.6gb"));
    std::fs::set_permissions(machine.world.path(""), std::fs::Permissions::from_mode(0o755)).unwrap();
    let host = machine.world.path("host");
    let mut command = Command::new(binaries().join("migctl"));
    command
        .arg("--config")
        .arg(machine.world.config())
        .args(["doctor", "--json", "--root"])
        .arg(host)
        .uid(65534)
        .gid(65534);
    let Ok(child) = command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped()).spawn() else {
        return skip("doctor without root", "our binaries are not for everybody here");
    };
    let document = verified(&child.wait_with_output().unwrap());
    let check = |id: &str| document["checks"].as_array().unwrap().iter().find(|c| c["id"] == id).unwrap().clone();
    assert!(said(&check("system.user")).contains("sudo migctl doctor"));
    assert_eq!(
        (check("state.directory")["status"].clone(), check("holder.slices")["status"].clone()),
        (json!("skip"), json!("skip"))
    );
    assert_eq!(check("gpu.0.mig-mode")["status"], "ok");
}

#[test]
fn colour_is_for_terminals_that_want_it() {
    let machine = Patient::new(&["a30-24gb"], &[]);
    assert!(!text(&machine.run(&[])).contains('\x1b'));
    if !installed("script") {
        return skip("doctor's colours", "no script(1) to make a terminal");
    }
    let (migctl, config) = (binaries().join("migctl"), machine.world.config());
    let line = format!(
        "{} --config {} doctor --root {}",
        migctl.display(),
        config.display(),
        machine.world.path("host").display()
    );
    let on_terminal =
        |more: &str| text(&run(Command::new("script").args(["-qec", &format!("{more}{line}"), "/dev/null"])));
    assert!(on_terminal("").contains("\x1b[32mok"), "{}", on_terminal(""));
    assert!(!on_terminal("NO_COLOR=1 ").contains("\x1b[3"));
}

#[test]
fn a_root_that_is_not_there_is_a_wrong_command_line() {
    let world = World::new(&["a30-24gb"]);
    let output = world.migctl(&["doctor", "--root", "/nonexistent/root"]);
    assert!(code(&output) == 64 && text(&output).contains("/nonexistent/root"), "{}", text(&output));
}
