//! A dockerd that is stopped, killed and started again, and one whose default runtime is our shim.

use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};

use crate::common::{binaries, run, skip, text, wait_for};
use crate::{ENGINES, Engine, IMAGE, PROBE_AND_WAIT, Probe, SOON, Site, kill, must};

/// A dockerd of the test's own. Its containers are in the world's containerd, and go with the world at the latest.
struct Daemon<'a> {
    site: &'a Site,
    process: Child,
}

impl<'a> Daemon<'a> {
    /// With these settings, the runtimes `mig` (by name, with `--mig-env`) and `default`, and the image.
    fn new(site: &'a Site, mut settings: Value) -> Daemon<'a> {
        let config = format!("--mig-config={}", site.config().display());
        let runtime = |args: &[&str]| json!({"path": binaries().join("mig-runtime"), "runtimeArgs": args});
        settings["runtimes"] = json!({"mig": runtime(&[&config, "--mig-env"]), "default": runtime(&[&config])});
        site.write("daemon.json", &settings.to_string());
        let daemon = Daemon { site, process: start(site) };
        daemon.docker().ok(&["import", &site.dir.join("rootfs.tar").display().to_string(), IMAGE]);
        daemon
    }

    fn docker(&self) -> Engine<'a> {
        let env = vec![("ENG_DOCKER", self.site.shown("docker"))];
        Engine { site: self.site, program: self.site.dir.join("bin/docker"), env, runtime: Some("mig".to_owned()) }
    }

    fn end(&mut self, signal: &str) {
        must(Command::new("kill").args([signal, &self.process.id().to_string()]));
        wait_for("dockerd's end", SOON, || self.process.try_wait().unwrap().is_some());
    }

    fn start_again(&mut self) {
        self.process = start(self.site);
    }
}

impl Drop for Daemon<'_> {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn start(site: &Site) -> Child {
    let log = std::fs::File::options().create(true).append(true).open(site.path("dockerd.log")).unwrap();
    let mut command = Command::new(ENGINES);
    command.arg("dockerd").args([site.path("docker"), site.path("daemon.json")]);
    command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
    let mut process = command.spawn().unwrap();
    let client = site.dir.join("bin/docker");
    wait_for("dockerd", SOON, || {
        let ended = process.try_wait().unwrap();
        assert!(ended.is_none(), "{}", std::fs::read_to_string(site.path("dockerd.log")).unwrap());
        run(Command::new(&client).env("ENG_DOCKER", site.path("docker")).arg("version")).status.success()
    });
    process
}

const ASK: [&str; 1] = ["mig.profile=1g.10gb"];

#[test]
fn with_live_restore_a_container_keeps_its_slice_while_dockerd_is_away() {
    let Some(site) = Site::new(&["docker"]) else { return };
    let mut daemon = Daemon::new(&site, json!({"live-restore": true}));
    let docker = daemon.docker();
    for signal in ["-TERM", "-KILL"] {
        let (lives, dies) = (docker.start(&ASK), docker.start(&ASK));
        let seen = docker.probe(&lives);
        let init = docker.pid(&dies);
        daemon.end(signal);
        assert_eq!(site.gc(), ["kept", "kept"], "kill {signal}: both live on");
        kill(init);
        wait_for("gc frees what ends while nobody looks", SOON, || site.gc().contains(&"freed".to_owned()));
        assert_eq!(site.gc(), ["kept"]);
        daemon.start_again();
        wait_for("dockerd sees the end", SOON, || docker.inspect(&dies, ".State.Running") == "false");
        assert_eq!(site.gc(), ["kept"], "kill {signal}: dockerd is back");
        site.assert_given(&seen, &["1g.10gb"]);
        assert_eq!(Probe::read(&docker.ok(&["exec", &lives, "mig-probe"])).variables, seen.variables);
        docker.ok(&["stop", "-t", "0", &lives]);
        site.clean("after stop: at once");
        docker.ok(&["rm", &lives, &dies]);
    }
    assert_eq!((site.audited("grant"), site.audited("release")), (4, 4));
}

#[test]
fn without_live_restore_the_slices_go_with_dockerd_or_when_it_is_back() {
    let Some(site) = Site::new(&["docker"]) else { return };
    let mut daemon = Daemon::new(&site, json!({}));
    let docker = daemon.docker();
    let life = "trap 'exit 0' TERM; mig-probe; echo probed; sleep 600 & wait";
    docker.start_with(&ASK, life);
    daemon.end("-TERM");
    site.assert_clean("after dockerd has stopped: at once");

    daemon.start_again();
    let once = docker.start_with(&ASK, life);
    let options = ["-d", "--restart=always"];
    let again = must(&mut docker.request(&ASK, &options, &["sh", "-c", life])).trim().to_owned();
    let before = tokens(&site);
    daemon.end("-KILL");
    assert_eq!(site.gc(), ["kept", "kept"], "both live on");
    daemon.start_again();
    wait_for("a new life for one, none for the other", SOON, || site.audited("grant") == 4 && site.leases().len() == 1);
    assert!(!before.contains(&tokens(&site)[0]), "a new slice for a new life");
    assert_eq!(docker.inspect(&once, ".State.Running"), "false");
    docker.ok(&["rm", "-f", &once, &again]);
    site.assert_clean("after rm -f: at once");
}

fn tokens(site: &Site) -> Vec<String> {
    site.leases().iter().map(|lease| lease["token"].to_string()).collect()
}

/// Nobody has chosen the runtime then: what an image's ENV or `-e` says must not count.
#[test]
fn as_the_default_runtime_it_hears_annotations_and_no_environment() {
    let Some(site) = Site::new(&["docker"]) else { return };
    let daemon = Daemon::new(&site, json!({"default-runtime": "default"}));
    let docker = daemon.docker();
    let tar = site.dir.join("rootfs.tar").display().to_string();
    docker.ok(&["import", "--change", "ENV MIG_PROFILE=1g.10gb", &tar, "localhost/asking"]);
    for options in [&["-e", "MIG_PROFILE=1g.10gb", IMAGE][..], &["localhost/asking"]] {
        let said = docker.ok(&[&["run", "--rm"], options, &["mig-probe"]].concat());
        assert!(Probe::read(&said).is_empty(), "{options:?}: {said}");
    }
    let plain = docker.ok(&["run", "-d", IMAGE, "sh", "-c", PROBE_AND_WAIT]).trim().to_owned();
    assert!(docker.probe(&plain).is_empty());
    docker.ok(&["restart", "-t", "0", &plain]);
    docker.ok(&["exec", &plain, "true"]);
    docker.ok(&["rm", "-f", &plain]);
    assert!(!site.path("state").exists(), "no state was made");

    let id = docker.start(&ASK);
    site.assert_given(&docker.probe(&id), &["1g.10gb"]);
    docker.ok(&["rm", "-f", &id]);
    site.assert_clean("after rm -f of one that chose its runtime by name: at once");
    if let Err(why) = docker.hears_annotations() {
        return skip("an annotation to the default runtime", &why);
    }
    let output = docker.run(&["run", "--rm", "--annotation", ASK[0], IMAGE, "mig-probe"]);
    assert_eq!(Probe::read(&text(&output)).variable("MIG_DEVICE_PROFILES"), "1g.10gb", "{}", text(&output));
    site.clean("after --rm: at once");
}
