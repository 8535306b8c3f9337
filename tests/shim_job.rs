//! `mig-runtime --mig-job`: containers of a job, as Slurm runs them: by the job's user, and by root what ends them.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use common::{Init, World, binaries, config, document, installed, run, skip, text, wait_for};
use serde_json::{Value, json};

/// The job's user, whom this machine does not know.
const UID: u32 = 4711;
const KEY: &str = "slurm:mini:7";
const SOON: Duration = Duration::from_secs(20);

/// A world that this user may enter, with a job of the user's that lives as long as `_alive`.
struct Site {
    world: World,
    _alive: Init,
}

impl Site {
    /// `None`, and noted, where we are not root or the user can't run what is tested.
    fn new(boards: &[&str]) -> Option<Site> {
        Site::with(boards, &[])
    }

    /// The same with more options for `nvml-sim create`.
    fn with(boards: &[&str], options: &[&str]) -> Option<Site> {
        let name = std::thread::current().name().unwrap_or("shim_job").to_owned();
        if !nix::unistd::geteuid().is_root() || !installed("setpriv") {
            skip(&name, "it takes root and setpriv (Debian: util-linux)");
            return None;
        }
        let world = World::with(boards, options);
        for open in ["", "m"] {
            fs::set_permissions(world.path(open), Permissions::from_mode(0o755)).unwrap();
        }
        let probe = run(&mut as_user(Command::new(binaries().join("mig-engine")).arg("--version")));
        if !probe.status.success() {
            skip(&name, &format!("uid {UID} can't run our binaries here: {}", text(&probe).trim()));
            return None;
        }
        Some(Site { world, _alive: Init::start() })
    }

    /// What a Prolog does.
    fn start_job(&self, request: &str) -> Output {
        let (uid, pid) = (UID.to_string(), self._alive.pid().to_string());
        let args = ["job", "start", "--key", KEY, "--uid", &uid, "--gid", &uid, "--pid", &pid, request];
        self.world.migctl(&args)
    }

    fn job(boards: &[&str], request: &str) -> Option<Site> {
        let site = Site::new(boards)?;
        let output = site.start_job(request);
        assert!(output.status.success(), "{}", text(&output));
        Some(site)
    }

    /// The recording runtime, for the user to write to.
    fn recording(&self, code: i32) -> PathBuf {
        let runtime = self.world.recording_runtime(code);
        fs::set_permissions(self.world.path("rt"), Permissions::from_mode(0o777)).unwrap();
        runtime
    }

    /// A bundle as Slurm 22.05 makes it: the directory is the user's, config.json is root's.
    fn bundle(&self, config: &Value) -> PathBuf {
        let bundle = self.world.bundle("bundle", config);
        chown(&bundle, Some(UID), Some(UID)).unwrap();
        chown(bundle.join("config.json"), Some(0), Some(UID)).unwrap();
        fs::set_permissions(bundle.join("config.json"), Permissions::from_mode(0o750)).unwrap();
        bundle
    }

    /// The directory for what runtimes keep, of the user's as its Prolog makes it.
    fn root(&self) -> PathBuf {
        let root = self.world.path("roots/alice");
        if !root.exists() {
            fs::create_dir_all(&root).unwrap();
            fs::set_permissions(self.world.path("roots"), Permissions::from_mode(0o711)).unwrap();
            fs::set_permissions(&root, Permissions::from_mode(0o700)).unwrap();
            chown(&root, Some(UID), Some(UID)).unwrap();
        }
        root
    }

    /// `mig-runtime --mig-job KEY OWN… --root ROOT LINE…`, as root.
    fn shim(&self, own: &[&str], line: &[&str]) -> Command {
        let root = format!("--root={}", self.root().display());
        self.world.shim_command(&[&["--mig-job", KEY], own, &[&root], line].concat())
    }

    /// The same `run` of a bundle by the user, in the bundle, as Slurm does.
    fn run(&self, own: &[&str], bundle: &Path, id: &str) -> Command {
        let mut command = as_user(&self.shim(own, &["run", "--bundle", bundle.to_str().unwrap(), id]));
        command.current_dir(bundle);
        command
    }
}

/// The user's, with the environment of slurmd.
fn as_user(command: &Command) -> Command {
    let uid = UID.to_string();
    let mut user = Command::new("setpriv");
    user.args(["--reuid", &uid, "--regid", &uid, "--clear-groups"]).arg(command.get_program()).args(command.get_args());
    user.env_clear().env("PATH", "/usr/bin:/usr/sbin:/bin").env("HOME", "/root");
    user
}

fn code(output: &Output) -> i32 {
    output.status.code().unwrap_or_else(|| panic!("{}", text(output)))
}

/// As `runc spec --rootless` writes it.
fn rootless() -> Value {
    let mut config = config(json!({}), &["PATH=/bin", "NVIDIA_VISIBLE_DEVICES=all"]);
    config.as_object_mut().unwrap().shift_remove("annotations");
    config["linux"] = json!({
        "uidMappings": [{"containerID": 0, "hostID": UID, "size": 1}],
        "gidMappings": [{"containerID": 0, "hostID": UID, "size": 1}],
        "namespaces": [{"type": "pid"}, {"type": "mount"}, {"type": "user"}],
    });
    config
}

fn public(site: &Site) -> Value {
    document(&site.world.path(&format!("state/public/{KEY}.json")))
}

fn environment_of(site: &Site) -> Vec<String> {
    let public = public(site);
    let list = |key: &str| {
        let all = public["slices"].as_array().unwrap().iter();
        all.map(|slice| slice[key].as_str().unwrap()).collect::<Vec<_>>().join(",")
    };
    let (uuids, profiles) = (list("uuid"), list("profile"));
    vec![
        format!("CUDA_VISIBLE_DEVICES={uuids}"),
        "NVIDIA_VISIBLE_DEVICES=void".into(),
        format!("MIG_DEVICE_UUIDS={uuids}"),
        format!("MIG_DEVICE_PROFILES={profiles}"),
    ]
}

#[test]
fn a_jobs_container_gets_what_its_job_has_and_is_otherwise_as_it_was() {
    let Some(site) = Site::job(&["a100-sxm4-80gb", "a100-sxm4-80gb"], "2x1g.10gb") else { return };
    site.recording(7);
    let dev = site.world.path("m/dev");
    let asked = rootless();
    // A bundle that was made for another GPU, by whatever tool.
    let mut stale = asked.clone();
    let bind = |path: &str| json!({"destination": path, "type": "bind", "source": path, "options": ["bind"]});
    stale["mounts"].as_array_mut().unwrap().extend([bind("/dev/nvidia1"), bind("/dev/nvidia-caps")]);
    stale["hooks"] = json!({"poststop": [{"path": "/usr/libexec/oci/hooks.d/mig-hook", "args": ["mig-hook"]}]});
    for (name, config) in [("plain", &asked), ("stale", &stale)] {
        let bundle = site.bundle(config);
        let output = run(&mut site.run(&[], &bundle, "n1.7.0.0"));
        assert_eq!(code(&output), 7, "{name}: the runtime's exit code: {}", text(&output));
        let root = format!("--root={}", site.root().display());
        let line = [&root, "run", "--bundle", bundle.to_str().unwrap(), "n1.7.0.0"];
        assert_eq!(site.world.recorded("argv").unwrap().lines().collect::<Vec<_>>(), line);

        let mut edited = document(&bundle.join("config.json"));
        let mounts = edited["mounts"].as_array_mut().unwrap();
        let ours = mounts.split_off(asked["mounts"].as_array().unwrap().len());
        let nodes = public(&site)["nodes"].as_array().unwrap().clone();
        assert_eq!(nodes.len(), 4 + 4, "nvidiactl, one GPU, uvm and its tools, two slices");
        let expected: Vec<Value> = nodes
            .iter()
            .map(|node| {
                let path = node["path"].as_str().unwrap();
                let source = dev.join(path);
                json!({"destination": format!("/dev/{path}"), "type": "bind", "source": source, "options": ["bind"]})
            })
            .collect();
        assert_eq!(ours, expected);
        let env = edited["process"]["env"].as_array_mut().unwrap();
        assert_eq!(json!(env.split_off(1)), json!(environment_of(&site)));
        env.push("NVIDIA_VISIBLE_DEVICES=all".into());
        let masked = edited["linux"].as_object_mut().unwrap().shift_remove("maskedPaths").unwrap();
        let other = format!("gpu{}", 1 - nodes_minor(&nodes));
        assert!(masked[1].as_str().unwrap().ends_with(&other) && masked[2].is_null(), "the other GPU's: {masked}");
        if name == "stale" {
            assert_eq!(edited["hooks"], json!({"poststop": []}));
            edited.as_object_mut().unwrap().shift_remove("hooks");
        }
        assert_eq!(edited.to_string(), asked.to_string(), "{name}: everything else");

        let meta = bundle.join("config.json").metadata().unwrap();
        assert_eq!((meta.uid(), meta.gid(), meta.mode() & 0o7777), (UID, UID, 0o750), "{name}");
        let mut left: Vec<_> = fs::read_dir(&bundle).unwrap().map(|e| e.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, ["config.json", "rootfs"], "{name}: Slurm removes the directory with rmdir");
    }
    assert_eq!(site.world.leases().len(), 1, "the job's, and none of the containers");
}

/// Minor of the GPU among a job's nodes.
fn nodes_minor(nodes: &[Value]) -> u64 {
    let gpu =
        nodes.iter().find(|node| node["path"].as_str().unwrap().strip_prefix("nvidia").unwrap().parse::<u64>().is_ok());
    gpu.unwrap()["minor"].as_u64().unwrap()
}

#[test]
fn a_jobs_container_gets_the_drivers_files() {
    let Some(site) = Site::with(&["a100-sxm4-80gb"], &["--driver-files"]) else { return };
    assert!(site.start_job("1g.10gb").status.success());
    site.recording(0);
    let bundle = site.bundle(&rootless());
    let output = run(&mut site.run(&[], &bundle, "c1"));
    assert_eq!(code(&output), 0, "{}", text(&output));
    let edited = document(&bundle.join("config.json"));
    let destinations: Vec<&str> =
        edited["mounts"].as_array().unwrap().iter().map(|mount| mount["destination"].as_str().unwrap()).collect();
    assert!(destinations.contains(&"/dev/mig-hook/lib64/libcuda.so.1"), "{destinations:#?}");
    assert!(edited["process"]["env"].as_array().unwrap().contains(&json!("LD_LIBRARY_PATH=/dev/mig-hook/lib64")));
}

/// A config.json whose group the user is not in stays readable for nobody more than before.
#[test]
fn what_cannot_be_given_away_is_the_users_own() {
    let Some(site) = Site::job(&["a100-sxm4-80gb"], "1g.10gb") else { return };
    site.recording(0);
    let bundle = site.bundle(&rootless());
    let path = bundle.join("config.json");
    chown(&path, Some(0), Some(0)).unwrap();
    fs::set_permissions(&path, Permissions::from_mode(0o2764)).unwrap();
    let output = run(&mut site.run(&[], &bundle, "c1"));
    assert_eq!(code(&output), 0, "{}", text(&output));
    let meta = path.metadata().unwrap();
    assert_eq!((meta.uid(), meta.gid(), meta.mode() & 0o7777), (UID, UID, 0o704));
}

/// Without a user namespace, as a job of root's has it, the runtime makes the nodes and its rules must keep to them.
#[test]
fn a_container_of_roots_gets_nodes_and_rules() {
    let Some(site) = Site::job(&["a100-sxm4-80gb"], "1g.10gb") else { return };
    site.recording(0);
    let root = site.world.path("roots-own");
    let bundle = site.world.bundle("b", &config(json!({}), &[]));
    let line = ["--mig-job", KEY, "--root", root.to_str().unwrap(), "run", "c1", "-b", bundle.to_str().unwrap()];
    let output = site.world.shim(&line);
    assert_eq!(code(&output), 0, "{}", text(&output));
    let edited = document(&bundle.join("config.json"));
    let nodes = public(&site)["nodes"].as_array().unwrap().len();
    assert_eq!(edited["linux"]["devices"].as_array().unwrap().len(), nodes);
    assert_eq!(edited["linux"]["resources"]["devices"].as_array().unwrap().len(), 2 + nodes);
    assert_eq!((edited.get("hooks"), &edited["annotations"]), (None, &json!({})));

    let mut open = config(json!({}), &[]);
    open["linux"]["resources"]["devices"] = json!([{"allow": true, "access": "rwm"}]);
    let bundle = site.world.bundle("open", &open);
    let line = ["--mig-job", KEY, "run", "--bundle", bundle.to_str().unwrap(), "c1"];
    let output = site.world.shim(&line);
    assert!(code(&output) == 77 && text(&output).contains("deny nothing"), "{}", text(&output));
}

/// Alone in its directory, the first stage could start no engine.
#[test]
fn a_job_without_slices_costs_its_containers_nothing() {
    let Some(site) = Site::job(&["a100-sxm4-80gb"], "1g.10gb") else { return };
    site.recording(0);
    let alone = site.world.path("alone");
    fs::create_dir(&alone).unwrap();
    fs::copy(binaries().join("mig-runtime"), alone.join("mig-runtime")).unwrap();
    let bundle = site.bundle(&rootless());
    let before = fs::read(bundle.join("config.json")).unwrap();
    let line = |key: &str, program: &Path| {
        let mut command = Command::new(program);
        command.arg("--mig-job").arg(key).arg("--mig-config").arg(site.world.config());
        command.args(["run", "--bundle", bundle.to_str().unwrap(), "c1"]);
        run(&mut as_user(&command))
    };
    for program in [alone.join("mig-runtime"), binaries().join("mig-runtime")] {
        let output = line("slurm:mini:8", &program);
        assert_eq!(text(&output), "exit status: 0\n");
        assert_eq!(site.world.recorded("argv").unwrap().lines().next_back(), Some("c1"));
        assert_eq!(fs::read(bundle.join("config.json")).unwrap(), before);
        fs::remove_file(site.world.path("rt/argv")).unwrap();
    }
    let output = line(KEY, &alone.join("mig-runtime"));
    assert!(!output.status.success() && text(&output).contains("mig-engine"), "{}", text(&output));
    // A key that is plain only with brackets is the engine's to look at, and so is found to have nothing.
    let output = line("lsf:77[3]", &binaries().join("mig-runtime"));
    assert_eq!(text(&output), "exit status: 0\n");
    assert_eq!(fs::read(bundle.join("config.json")).unwrap(), before);
}

#[test]
fn what_a_jobs_container_cannot_have_stops_it_with_a_sentence() {
    let Some(site) = Site::job(&["a100-sxm4-80gb"], "1g.10gb") else { return };
    site.recording(0);
    let log = site.world.path("log.json");
    fs::write(&log, "").unwrap();
    chown(&log, Some(UID), None).unwrap();
    let logged = format!("--log={}", log.display());
    let refused = |own: &[&str], config: &Value, expected: i32, words: &[&str]| {
        let bundle = site.bundle(config);
        let before = fs::read(bundle.join("config.json")).unwrap();
        fs::write(&log, "").unwrap();
        let output = run(&mut site.run(&[own, &[&logged, "--log-format=json"]].concat(), &bundle, "c1"));
        let shown = text(&output);
        assert_eq!(code(&output), expected, "{shown}");
        let record: Value = serde_json::from_str(&fs::read_to_string(&log).unwrap()).unwrap();
        let sentence = format!("mig-runtime: {}\n", record["msg"].as_str().unwrap());
        assert_eq!(String::from_utf8_lossy(&output.stderr), sentence, "the same in the runtime's log");
        for word in words {
            assert!(shown.contains(word), "{word:?} is not in: {shown}");
        }
        assert_eq!(site.world.recorded("argv"), None, "the runtime was started: {shown}");
        assert_eq!(fs::read(bundle.join("config.json")).unwrap(), before, "{shown}");
        assert_eq!(fs::read_dir(&bundle).unwrap().count(), 2, "{shown}");
    };
    let plain = rootless();
    for key in ["", "../leases/x", ".hidden", "slurm mini", "a/b", &"x".repeat(129)] {
        refused(&["--mig-job", key], &plain, 64, &["--mig-job: a job's key has 1 to 128 letters"]);
        refused(&[&format!("--mig-job={key}")], &plain, 64, &["as slurm:cluster:15"]);
    }
    refused(&["--mig-env"], &plain, 64, &["--mig-env and --mig-job exclude each other"]);
    refused(&["--mig-jobs"], &plain, 64, &["--mig-jobs", "and --mig-job"]);

    let with = |at: &str, value: Value| {
        let mut config = plain.clone();
        config[at] = value;
        config
    };
    let annotated = with("annotations", json!({"a": "b", "mig.profile": "1g.10gb"}));
    refused(&[], &annotated, 77, &["config.json has the annotation \"mig.profile\"", "when the job is submitted"]);
    refused(&["--mig-job", "slurm:mini:8"], &annotated, 77, &["mig.profile"]);
    let host_dev = json!([{"destination": "/dev", "type": "bind", "source": "/dev", "options": ["rbind"]}]);
    refused(&[], &with("mounts", host_dev), 77, &["mounted over the container's /dev"]);
    refused(&[], &with("process", Value::Null), 65, &["process"]);

    let caps = site.world.path("m/dev/nvidia-caps");
    let cap = fs::read_dir(&caps).unwrap().next().unwrap().unwrap().path();
    fs::set_permissions(&cap, Permissions::from_mode(0o400)).unwrap();
    refused(&[], &plain, 77, &[&format!("uid {UID} may not open {}", cap.display()), "setfacl"]);
    fs::remove_file(&cap).unwrap();
    refused(&[], &plain, 69, &[cap.to_str().unwrap(), "is not there as device", "submit the job again"]);

    assert!(site.world.migctl(&["job", "end", "--key", KEY]).status.success());
    assert_eq!(site.start_job("7x7g.80gb").status.code(), Some(65));
    refused(&[], &plain, 75, &["job slurm:mini:7 was refused: ", "7g.80gb"]);
    let file = site.world.path(&format!("state/public/{KEY}.json"));
    chown(&file, None, Some(0)).unwrap();
    refused(&[], &plain, 77, &["job slurm:mini:7 is another user's"]);
    chown(&file, None, Some(UID)).unwrap();
    let text = fs::read_to_string(&file).unwrap().replace(&format!("\"uid\":{UID}"), "\"uid\":4712");
    fs::write(&file, text).unwrap();
    refused(&[], &plain, 77, &["job slurm:mini:7 is another user's"]); // of the same group
    fs::write(&file, "{").unwrap();
    refused(&[], &plain, 74, &["nothing was touched"]);
}

const STOPPED: &str = "\"status\":\"stopped\",\"pid\":0,\"bundle\":\"\"}";

/// Slurm asks for what never was (24.11: a wrong task number) and for what is over.
#[test]
fn of_what_is_not_there_state_says_that_it_has_stopped_and_the_rest_is_done() {
    let Some(site) = Site::new(&["a100-sxm4-80gb"]) else { return };
    site.recording(1);
    let unknown = |command: &mut Command, id: &str, verb: &str| {
        let output = run(command);
        let expected = match verb {
            "state" => format!("{{\"ociVersion\":\"1.0.2\",\"id\":{},{STOPPED}\n", json!(id)),
            _ => String::new(),
        };
        assert_eq!(text(&output), format!("exit status: 0\n{expected}"), "{verb} {id}");
        assert_eq!(site.world.recorded("argv"), None, "{verb} {id}");
    };
    let lines = |id: &'static str| {
        [vec!["state", id], vec!["kill", id, "KILL"], vec!["delete", "--force", id], vec!["delete", id]]
    };
    for id in ["n1.7.0.-1", "../../etc", "ö\"x", "a/b"] {
        for line in lines(id) {
            unknown(&mut site.shim(&[], &line), id, line[0]);
            unknown(&mut as_user(&site.shim(&[], &line)), id, line[0]);
        }
    }
    // No Prolog has made the directory: a runtime would, and as root's.
    let missing = site.world.path("roots/bob");
    for line in lines("c1") {
        let root = ["--mig-job", KEY, "--root", missing.to_str().unwrap()];
        unknown(&mut site.world.shim_command(&[&root, &line[..]].concat()), "c1", line[0]);
        assert!(!missing.exists());
    }
    // A key that is wrong, and settings that are, keep nobody from ending anything.
    fs::write(site.world.config(), "state_dir = ").unwrap();
    let runtime = site.world.path("rt/runc");
    for line in lines("c1") {
        let own = ["--mig-job", "../x", "--mig-runtime", runtime.to_str().unwrap()];
        let output = run(&mut site.shim(&own, &line));
        assert_eq!(code(&output), 0, "{}", text(&output));
        assert!(line[0] != "state" || String::from_utf8_lossy(&output.stdout).ends_with(&format!("{STOPPED}\n")));
    }
}

#[test]
fn what_the_runtime_says_of_a_container_is_passed_on_and_root_asks_as_its_user() {
    let Some(site) = Site::new(&["a100-sxm4-80gb"]) else { return };
    let rights = |of: &str| -> Vec<String> {
        let status = site.world.recorded("status").unwrap_or_else(|| panic!("{of}: the runtime was not started"));
        let lines =
            status.lines().filter(|l| ["Uid", "Gid", "Groups", "CapPrm", "CapEff"].iter().any(|k| l.starts_with(k)));
        lines.map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect()
    };
    let users = [
        "Uid: 4711 4711 4711 4711",
        "Gid: 65534 65534 65534 65534",
        "Groups:",
        "CapPrm: 0000000000000000",
        "CapEff: 0000000000000000",
    ];
    let roots = site.world.path("own");
    let id = "n1.7.0.0";
    for dir in [site.root().join(id), roots.join(id)] {
        fs::create_dir_all(dir).unwrap();
    }
    chown(site.root().join(id), Some(UID), None).unwrap();
    for verb in [&["state", id][..], &["kill", id, "KILL"], &["delete", "--force", id]] {
        site.world.probing_runtime(3);
        fs::set_permissions(site.world.path("rt"), Permissions::from_mode(0o777)).unwrap();
        let shim = site.shim(&[], verb);
        let mut command = Command::new("setpriv");
        command.args(["--groups", "4,27"]).arg(shim.get_program()).args(shim.get_args()).current_dir("/root");
        let output = run(&mut command);
        match verb[0] {
            "state" => assert!(text(&output).ends_with(&format!("{STOPPED}\n")), "{}", text(&output)),
            _ => assert_eq!(code(&output), 3, "{}", text(&output)),
        }
        assert_eq!(rights(verb[0]), users, "{verb:?}");
        let words: Vec<String> =
            site.world.recorded("cmdline").unwrap().split_terminator('\0').map(str::to_owned).collect();
        assert_eq!(words[words.len() - verb.len()..], *verb);
        fs::remove_file(site.world.path("rt/status")).unwrap();

        // What root owns all the way, nobody else can have written.
        let line = [&["--mig-job", KEY, "--root", roots.to_str().unwrap()], verb].concat();
        let output = site.world.shim(&line);
        assert_eq!(code(&output), if verb[0] == "state" { 0 } else { 3 }, "{}", text(&output));
        assert_eq!(rights(verb[0])[0], "Uid: 0 0 0 0", "{verb:?}");
        fs::remove_dir_all(site.world.path("rt")).unwrap();
    }
    let runtime = site.world.script("says", "echo '{ \"status\": \"running\",  \"pid\": 7}'; echo warning >&2");
    let output = run(&mut site.shim(&["--mig-runtime", runtime.to_str().unwrap()], &["state", id]));
    assert_eq!(
        text(&output),
        "exit status: 0\n{ \"status\": \"running\",  \"pid\": 7}\n",
        "and nothing that is no JSON"
    );
}

#[test]
fn root_does_nothing_else_in_a_users_directory_and_goes_through_no_link() {
    let Some(site) = Site::job(&["a100-sxm4-80gb"], "1g.10gb") else { return };
    site.recording(0);
    let bundle = site.bundle(&rootless());
    let b = bundle.to_str().unwrap();
    let log = site.root().join("log");
    let logged = format!("--log={}", log.display());
    for line in [
        &["run", "--bundle", b, "c1"][..],
        &["create", "-b", b, "c1"],
        &["start", "c1"],
        &["list"],
        &["exec", "c1", "sh"],
    ] {
        let output = run(&mut site.shim(&[], &[&[logged.as_str()], line].concat()));
        assert_eq!(code(&output), 77, "{line:?}: {}", text(&output));
        assert!(
            text(&output).contains("is uid 4711's") && text(&output).contains("run this as that user"),
            "{}",
            text(&output)
        );
        assert_eq!(site.world.recorded("argv"), None, "{line:?}");
        assert!(!log.exists(), "root writes no log into it either");
    }
    // The user's own business.
    for line in [&["start", "c1"][..], &["list"], &["--version"]] {
        fs::set_permissions(site.world.path("rt"), Permissions::from_mode(0o777)).unwrap();
        let output = run(&mut as_user(&site.shim(&[], line)));
        assert_eq!(code(&output), 0, "{line:?}: {}", text(&output));
        assert_eq!(site.world.recorded("argv").unwrap().lines().next_back(), line.last().copied());
        fs::remove_file(site.world.path("rt/argv")).unwrap();
    }
    symlink("/run", site.world.path("roots/link")).unwrap();
    let open = site.world.path("roots/open");
    fs::create_dir(&open).unwrap();
    fs::set_permissions(&open, Permissions::from_mode(0o777)).unwrap();
    for (dir, why) in [("roots/link/x", "is a link"), ("roots/open", "others than root may write")] {
        for line in [&["state", "c1"][..], &["kill", "c1", "KILL"], &["delete", "c1"], &["list"]] {
            let root = site.world.path(dir).display().to_string();
            fs::create_dir_all(open.join("c1")).unwrap();
            let output = site.world.shim(&[&["--mig-job", KEY, "--root", &root], line].concat());
            assert!(code(&output) != 0 && text(&output).contains(why), "{line:?}: {}", text(&output));
            assert_eq!(site.world.recorded("argv"), None, "{line:?}");
        }
    }
}

// ---- with a real runc ----

impl Site {
    /// A bundle that this user's runc runs: busybox, and a config as `runc spec --rootless` writes it there and then.
    fn real(request: Option<&str>) -> Option<Site> {
        let name = std::thread::current().name().unwrap_or("shim_job").to_owned();
        if let Some(missing) = ["runc", "busybox"].into_iter().find(|program| !installed(program)) {
            skip(&name, &format!("{missing} is not installed"));
            return None;
        }
        let site = match request {
            Some(request) => Site::job(&["a100-sxm4-80gb", "a100-sxm4-80gb"], request)?,
            None => Site::new(&["a100-sxm4-80gb"])?,
        };
        let bundle = site.real_bundle("probe", "exit 5");
        let mut plain = Command::new("runc");
        plain.args(["--root", site.root().to_str().unwrap(), "run", "--bundle", bundle.to_str().unwrap(), "probe"]);
        let output = run(&mut as_user(&plain));
        if output.status.code() != Some(5) {
            skip(&name, &format!("runc of uid {UID} does not work here: {}", text(&output).trim().replace('\n', "; ")));
            return None;
        }
        Some(site)
    }

    fn real_bundle(&self, name: &str, script: &str) -> PathBuf {
        let bundle = self.world.path(name);
        fs::create_dir_all(bundle.join("rootfs/bin")).unwrap();
        let path = std::env::var_os("PATH").unwrap();
        let mut busybox = std::env::split_paths(&path).map(|dir| dir.join("busybox"));
        fs::copy(busybox.find(|path| path.is_file()).unwrap(), bundle.join("rootfs/bin/busybox")).unwrap();
        for dir in [bundle.clone(), bundle.join("rootfs"), bundle.join("rootfs/bin")] {
            chown(dir, Some(UID), Some(UID)).unwrap();
        }
        let mut spec = as_user(Command::new("runc").args(["spec", "--rootless"]));
        let made = run(spec.current_dir(&bundle));
        assert!(made.status.success(), "{}", text(&made));
        let mut config = document(&bundle.join("config.json"));
        config["process"]["terminal"] = false.into();
        config["process"]["args"] = json!(["/bin/busybox", "sh", "-c", script]);
        let path = bundle.join("config.json");
        fs::remove_file(&path).unwrap();
        fs::write(&path, config.to_string()).unwrap();
        chown(&path, Some(0), Some(UID)).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o750)).unwrap();
        bundle
    }

    /// What root is told: exit code and standard output.
    fn asked(&self, line: &[&str]) -> (i32, String) {
        let output = run(self.shim(&[], line).current_dir("/root"));
        (code(&output), String::from_utf8(output.stdout).unwrap())
    }

    /// A container of the user's that lives, and who waits for it.
    fn living(&self, id: &str) -> (std::process::Child, Value) {
        let bundle = self.real_bundle(id, "exec busybox sleep 60");
        let mut command = self.run(&[], &bundle, id);
        let log = fs::File::create(self.world.path("log")).unwrap();
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().unwrap();
        let mut state = Value::Null;
        wait_for("the container", SOON, || {
            state = serde_json::from_str(&self.asked(&["state", id]).1).unwrap();
            state["status"] == "running"
        });
        (child, state)
    }
}

#[test]
fn runc_of_the_jobs_user_opens_the_jobs_nodes_and_no_others() {
    let Some(site) = Site::real(Some("1g.10gb")) else { return };
    // Another job's nodes, on the host.
    let other = site.world.migctl(&[
        "job",
        "start",
        "--key",
        "slurm:mini:8",
        "--uid",
        "1",
        "--gid",
        "1",
        "--pid",
        "1",
        "2g.20gb",
    ]);
    assert!(other.status.success(), "{}", text(&other));
    let script = "busybox env; busybox find /dev -name 'nvidia*' -type c | while read -r node; do \
                  echo \"node $node $( (: < \"$node\") 2>&1)\"; done; exit 42";
    let bundle = site.real_bundle("bundle", script);
    let output = run(&mut site.run(&[], &bundle, "n1.7.0.0"));
    let said = text(&output);
    assert_eq!(code(&output), 42, "{said}");
    for line in environment_of(&site) {
        assert_eq!(said.lines().filter(|l| *l == line).count(), 1, "{line} in {said}");
    }
    let mut nodes: Vec<(&str, &str)> =
        said.lines().filter_map(|line| line.strip_prefix("node /dev/")?.split_once(' ')).collect();
    nodes.sort_unstable();
    let public = public(&site);
    let mut expected: Vec<&str> =
        public["nodes"].as_array().unwrap().iter().map(|n| n["path"].as_str().unwrap()).collect();
    expected.sort_unstable();
    assert_eq!(nodes.iter().map(|(path, _)| *path).collect::<Vec<_>>(), expected);
    let on_host = fs::read_dir(site.world.path("m/dev/nvidia-caps")).unwrap().count();
    assert!(on_host > expected.iter().filter(|path| path.contains("cap")).count(), "the other job's are on the host");
    for (path, verdict) in nodes {
        assert!(verdict.contains("No such device or address"), "{path} is not allowed, or a device: {verdict}");
    }
    assert_eq!(fs::read_dir(site.root()).unwrap().count(), 0, "the runtime leaves nothing");
    assert_eq!(fs::read_dir(&bundle).unwrap().count(), 2);
}

#[test]
fn the_calls_of_slurm_22_05_and_of_24_11_end_a_container() {
    let Some(site) = Site::real(Some("1g.10gb")) else { return };
    let stopped = |id: &str| (0, format!("{{\"ociVersion\":\"1.0.2\",\"id\":\"{id}\",{STOPPED}\n"));
    let nothing = || (0, String::new());

    // 22.05, scancel: all of it by root.
    let id = "n1.7.0.0";
    let (mut child, state) = site.living(id);
    assert_eq!((&state["id"], state["pid"].as_u64().is_some()), (&json!(id), true), "{state}");
    assert_eq!(site.asked(&["kill", id, "KILL"]), nothing());
    assert_eq!(child.wait().unwrap().code(), Some(137), "{}", fs::read_to_string(site.world.path("log")).unwrap());
    assert_eq!(site.asked(&["state", id]), stopped(id));
    assert_eq!(site.asked(&["delete", "--force", id]), nothing());

    // 24.11: a wrong id, then delete; and what an ending by SIGKILL of the runtime leaves behind.
    let (mut child, state) = site.living("n1.7.1.0");
    assert_eq!(site.asked(&["state", "n1.7.1.-1"]), stopped("n1.7.1.-1"));
    assert_eq!(site.asked(&["kill", "n1.7.1.-1", "KILL"]), nothing());
    assert_eq!(site.asked(&["delete", "--force", "n1.7.1.-1"]), nothing());
    child.kill().unwrap();
    child.wait().unwrap();
    let init = state["pid"].as_u64().unwrap();
    assert!(Path::new(&format!("/proc/{init}")).exists(), "the container lives on");
    let (rc, said) = site.asked(&["state", "n1.7.1.0"]);
    assert!(rc == 0 && said.contains("\"status\": \"running\""), "{said}");
    assert_eq!(site.asked(&["delete", "--force", "n1.7.1.0"]), nothing());
    wait_for("the end of its processes", SOON, || {
        fs::read_to_string(format!("/proc/{init}/stat")).map_or(true, |stat| stat.contains(") Z "))
    });
    assert_eq!(site.asked(&["state", "n1.7.1.0"]), stopped("n1.7.1.0"));
    assert_eq!(fs::read_dir(site.root()).unwrap().count(), 0);
    assert_eq!(site.world.leases().len(), 1, "the job's, until its Epilog");
}

/// A user who writes whatever he likes where root's runtime would look.
#[test]
fn a_forged_state_harms_nobody() {
    let Some(site) = Site::real(None) else { return };
    let (mut child, _) = site.living("c1");
    let state: Value = document(&site.root().join("c1/state.json"));
    let forge = |id: &str, victim: &Init| {
        let stat = fs::read_to_string(format!("/proc/{}/stat", victim.pid())).unwrap();
        let start: u64 = stat.rsplit(") ").next().unwrap().split(' ').nth(19).unwrap().parse().unwrap();
        let mut forged = state.clone();
        forged["id"] = id.into();
        forged["init_process_pid"] = victim.pid().into();
        forged["init_process_start"] = start.into();
        let dir = site.root().join(id);
        fs::create_dir(&dir).unwrap();
        fs::write(dir.join("state.json"), forged.to_string()).unwrap();
        for path in [dir.clone(), dir.join("state.json")] {
            chown(path, Some(UID), Some(UID)).unwrap();
        }
    };
    let lives = |victim: &Init| {
        fs::read_to_string(format!("/proc/{}/stat", victim.pid())).is_ok_and(|stat| !stat.contains(") Z "))
    };

    // What would happen: root's own runc does what it finds there.
    let decoy = Init::start();
    forge("decoy", &decoy);
    let plain = run(Command::new("runc").args(["--root", site.root().to_str().unwrap(), "kill", "decoy", "KILL"]));
    wait_for(&format!("the end of the decoy: {}", text(&plain)), SOON, || !lives(&decoy));

    let victim = Init::start();
    forge("forged", &victim);
    for line in [
        &["kill", "forged", "KILL"][..],
        &["kill", "--all", "forged", "KILL"],
        &["delete", "forged"],
        &["delete", "--force", "forged"],
    ] {
        let output = run(&mut site.shim(&[], line));
        assert!(lives(&victim), "{line:?}: {}", text(&output));
    }
    let (rc, _) = site.asked(&["state", "forged"]);
    assert_eq!(rc, 0);
    assert!(lives(&victim));
    assert_eq!(site.asked(&["delete", "--force", "c1"]).0, 0);
    child.wait().unwrap();
}
