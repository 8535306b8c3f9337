//! Engines that read what `migctl configure` wrote.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::{Value, json};

use crate::common::{binaries, run, text, wait_for};
use crate::{DAEMON, ENGINES, Engine, IMAGE, Probe, SOON, Site, must};

#[test]
fn docker_reads_it_and_forgets_it() {
    let Some(site) = Site::new(&["docker"]) else { return };
    let others = site.docker(&[]); // another runtime in the file, whatever tests run
    let held = DAEMON.lock().unwrap();
    let file = site.dir.join("daemon.json");
    let before = std::fs::read(&file).unwrap();
    let name = "configured";
    let configure = |more: &[&str]| {
        let args = [&["configure", "docker", "--name", name, "--file", file.to_str().unwrap()], more].concat();
        let done = site.document(&args);
        if done["next"] == "systemctl reload docker" && done["dry_run"] == false {
            must(Command::new(ENGINES).arg("reload"));
        }
        done
    };
    let docker =
        Engine { site: &site, program: site.dir.join("bin/docker"), env: vec![], runtime: Some(name.to_owned()) };
    let unknown = |when: &str| {
        let output = run(&mut docker.request(&[], &["--rm"], &["true"]));
        assert!(!output.status.success() && text(&output).contains(name), "{when}: {}", text(&output));
    };

    configure(&["--dry-run"]);
    assert_eq!(std::fs::read(&file).unwrap(), before);
    unknown("after a dry run");
    let done = configure(&[]);
    assert_eq!(done["next"], "systemctl reload docker", "{done:#}");
    let id = docker.start(&["mig.profile=1g.10gb"]);
    let seen = docker.probe(&id);
    site.assert_given(&seen, &["1g.10gb"]);
    docker.assert_confined(&id, &seen);
    docker.ok(&["restart", "-t", "0", &id]);
    assert_eq!(site.leases().len(), 1);
    docker.ok(&["rm", "-f", &id]);
    site.clean("after rm -f");
    let nothing = Probe::read(&must(&mut docker.request(&[], &["--rm"], &["mig-probe"])));
    assert!(nothing.is_empty(), "{nothing:?}");
    assert_eq!(configure(&[])["outcome"], "unchanged");

    let done = configure(&["--remove"]);
    assert_eq!((&done["outcome"], &done["next"]), (&json!("restored"), &json!("systemctl reload docker")));
    assert_eq!(std::fs::read(&file).unwrap(), before, "byte for byte");
    unknown("after --remove");
    must(&mut others.request(&[], &["--rm"], &["true"]));
    drop(held);
}

/// An /etc of its own, and mig-hook installed below a prefix: podman finds both where it always does.
struct Podman<'a> {
    site: &'a Site,
    etc: PathBuf,
    prefix: PathBuf,
}

impl Podman<'_> {
    fn new(site: &Site) -> Podman<'_> {
        let (etc, prefix) = (site.path("etc"), site.path("usr"));
        must(Command::new("cp").args(["-a", "/etc"]).arg(&etc));
        let settings =
            std::fs::read_to_string(site.dir.join("podman/containers.conf")).unwrap() + "runtime = \"runc\"\n";
        site.write("etc/containers/containers.conf", &settings);
        let ours = site.write("etc/mig-hook/config.toml", &std::fs::read_to_string(site.config()).unwrap());
        std::fs::set_permissions(ours, PermissionsExt::from_mode(0o644)).unwrap();
        let mut make = Command::new("make");
        make.args(["--silent", "install"]).current_dir(env!("CARGO_MANIFEST_DIR"));
        let places = [("PREFIX", &prefix), ("SYSCONFDIR", &etc), ("DIST", &binaries())];
        must(make.args(places.map(|(name, path)| format!("{name}={}", path.display()))));
        Podman { site, etc, prefix }
    }

    /// A command that sees that /etc.
    fn inside(&self, program: &Path, args: &[&str]) -> Output {
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-c", "mount --bind \"$0\" /etc && exec \"$@\""]).arg(&self.etc);
        command.env_remove("CONTAINERS_CONF").env("HOME", self.site.dir.join("home"));
        command.env("CONTAINERS_STORAGE_CONF", self.site.dir.join("podman/storage.conf"));
        run(command.arg(program).args(args))
    }

    fn configure(&self, more: &[&str]) -> Value {
        let args = [&["configure", "podman", "--json"], more].concat();
        let output = self.inside(&self.prefix.join("bin/migctl"), &args);
        assert!(output.status.success(), "{}", text(&output));
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// podman's command line as far as its verb.
    fn line(&self) -> Vec<String> {
        let store = |name: &str| self.site.dir.join("podman").join(name).display().to_string();
        let program = crate::installed("podman").display().to_string();
        let dirs = [("--root", "root"), ("--runroot", "run"), ("--tmpdir", "tmp")];
        let options = dirs.into_iter().flat_map(|(option, name)| [option.to_owned(), store(name)]);
        [program].into_iter().chain(options).chain(["--storage-driver".into(), "vfs".into()]).collect()
    }

    /// A shell script that sees that /etc; `podman` and `run` in it are podman and its `run` with a request.
    fn script(&self, script: &str) -> Output {
        let group = self.site.cgroup("");
        let run = format!(
            "podman() {{ {} \"$@\"; }}\n\
             run() {{ podman $global run --cgroup-parent {} --annotation mig.profile=1g.10gb \"$@\"; }}\n{script}",
            self.line().join(" "),
            group.trim_end_matches('/')
        );
        self.inside(Path::new("/bin/sh"), &["-c", &run])
    }

    fn podman(&self, global: &str, command: &str) -> Output {
        self.script(&format!("global='{global}'; run --rm {IMAGE} {command}"))
    }

    fn given(&self, global: &str, when: &str) {
        let output = self.podman(global, "mig-probe");
        assert!(output.status.success(), "{when}: {}", text(&output));
        let seen = Probe::read(&text(&output));
        assert_eq!(seen.variable("MIG_DEVICE_PROFILES"), "1g.10gb", "{when}");
        let allowed = seen.nodes.values().filter(|(_, verdict)| verdict == "allowed").count();
        assert_eq!((allowed, seen.nodes.len()), (6, 6), "{when}: {seen:?}");
        self.site.clean(when);
    }
}

#[test]
fn podman_reads_it_and_forgets_it() {
    let Some(site) = Site::new(&["podman"]) else { return };
    let podman = Podman::new(&site);
    let nothing = |when: &str| {
        let output = podman.podman("", "mig-probe");
        assert!(output.status.success() && Probe::read(&text(&output)).is_empty(), "{when}: {}", text(&output));
    };
    nothing("before");
    let drop_in = podman.etc.join("containers/containers.conf.d/50-mig-hook.conf");
    let done = podman.configure(&[]);
    assert_eq!(done["file"], "/etc/containers/containers.conf.d/50-mig-hook.conf");
    assert!(!done["notes"].to_string().contains("make install"), "the hook is there: {done:#}");
    let written = std::fs::read_to_string(&drop_in).unwrap();
    assert!(written.contains(podman.prefix.join("share/mig-hook/hooks.d/podman").to_str().unwrap()), "{written}");
    podman.given("", "by the hook");
    // Hook and shim together: one lease.
    podman.given("--runtime mig", "by --runtime mig");
    assert_eq!((site.audited("grant"), site.audited("release")), (2, 2));
    let session = format!(
        "global='--runtime mig'; id=$(run -d {IMAGE} sleep 600) && podman exec $id mig-probe; podman rm -f -t 0 $id"
    );
    let seen = Probe::read(&text(&podman.script(&session)));
    assert_eq!(seen.variable("MIG_DEVICE_PROFILES"), "1g.10gb", "podman exec by --runtime mig sees the variables");
    site.clean("after rm -f");
    assert_eq!(podman.configure(&[])["outcome"], "unchanged");
    assert_eq!(podman.configure(&["--remove"])["outcome"], "restored");
    assert!(!drop_in.exists());
    nothing("after --remove");
    let output = podman.podman("--runtime mig", "true");
    assert!(!output.status.success(), "podman knows no such runtime any more: {}", text(&output));
}

#[test]
fn a_hooks_directory_of_others_still_counts_for_podman() {
    let Some(site) = Site::new(&["podman"]) else { return };
    let podman = Podman::new(&site);
    let seen = site.path("seen");
    let other = site.script("other", &format!("cat >/dev/null; echo hooked >>{}", seen.display()));
    let hook = json!({"version": "1.0.0", "hook": {"path": other}, "when": {"always": true}, "stages": ["poststop"]});
    site.write("others/hook.json", &hook.to_string());
    let set = format!("[engine]\nhooks_dir = [\"{}\"]\n", site.path("others").display());
    site.write("etc/containers/containers.conf.d/10-others.conf", &set);
    podman.configure(&[]);
    podman.given("", "beside another hook");
    assert_eq!(std::fs::read_to_string(seen).unwrap(), "hooked\n", "theirs ran, too");
}

/// A containerd of its own with CRI, by that configuration; what it says of its plugins.
fn cri_of(site: &Site, config: &Path) -> String {
    let socket = site.path("c.sock");
    let log = std::fs::File::create(site.path("containerd.log")).unwrap();
    let mut command = Command::new(crate::installed("containerd"));
    command.arg("--config").arg(config).arg("--address").arg(&socket);
    command.arg("--root").arg(site.path("c-root")).arg("--state").arg(site.path("c-state"));
    let mut daemon = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().unwrap();
    let mut plugins = String::new();
    wait_for("containerd", SOON, || {
        let output = run(Command::new(crate::installed("ctr")).arg("-a").arg(&socket).args(["plugins", "ls"]));
        plugins = text(&output);
        output.status.success()
    });
    daemon.kill().unwrap();
    daemon.wait().unwrap();
    plugins
}

#[test]
fn containerd_reads_it_and_cri_loads() {
    let Some(site) = Site::new(&["containerd", "ctr"]) else { return };
    let opt = format!("[plugins.\"io.containerd.internal.v1.opt\"]\n  path = \"{}\"\n", site.shown("opt"));
    let quiet = format!("[ttrpc]\n  address = \"{}\"\n{opt}", site.shown("c.ttrpc"));
    let defaults = must(Command::new(crate::installed("containerd")).args(["config", "default"]));
    let whole = defaults
        .replace("/opt/containerd", &site.shown("opt"))
        .replace("SystemdCgroup = false", "SystemdCgroup = true");
    for (name, before, systemd) in [("small.toml", format!("version = 2\n{quiet}"), false), ("whole.toml", whole, true)]
    {
        let file = site.write(name, &before);
        // Not by the site's settings: containerd hands on no options, and migctl says so.
        let configure = |more: &[&str]| {
            let mut migctl = Command::new(binaries().join("migctl"));
            must(migctl.args(["configure", "containerd", "--json", "--file"]).arg(&file).args(more))
        };
        configure(&[]);
        let dump =
            must(Command::new(crate::installed("containerd")).arg("--config").arg(&file).args(["config", "dump"]));
        let dump: toml::Table = dump.parse().unwrap();
        // containerd 2 knows both names, and shows the newer.
        let plugins =
            ["io.containerd.cri.v1.runtime", "io.containerd.grpc.v1.cri"].map(|name| dump["plugins"].get(name));
        let containerd = plugins.into_iter().flatten().find_map(|plugin| plugin.get("containerd")).unwrap();
        let handlers = &containerd["runtimes"];
        let mig = &handlers["mig"];
        assert_eq!(mig["options"]["BinaryName"].as_str(), binaries().join("mig-runtime").to_str(), "{name}");
        assert_eq!(mig["pod_annotations"].as_array().map(Vec::len), Some(2), "{name}");
        assert_eq!(mig["container_annotations"], mig["pod_annotations"], "{name}");
        let driver = |handler: &toml::Value| handler["options"].get("SystemdCgroup").and_then(toml::Value::as_bool);
        assert_eq!(driver(mig).unwrap_or(false), systemd, "{name}");
        assert_eq!(handlers["runc"]["runtime_type"].as_str(), Some("io.containerd.runc.v2"), "{name}");

        let plugins = cri_of(&site, &file);
        let cri = plugins.lines().find(|line| line.split_whitespace().nth(1) == Some("cri"));
        assert!(cri.is_some_and(|line| line.trim_end().ends_with("ok")), "{name}: {plugins}");
        configure(&["--remove"]);
        assert_eq!(std::fs::read_to_string(&file).unwrap(), before, "{name}: byte for byte");
    }
}
