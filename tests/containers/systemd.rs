//! Containers in systemd's scopes. systemd writes the device rules of its units again at every daemon-reload, and what it
//! has not been told is lost then.

use std::path::Path;
use std::process::Command;

use serde_json::json;

use crate::classic::{ALLOWED, DENIED, call, change, hooked, refusals};
use crate::common::{binaries, run, text, wait_for};
use crate::runtimes::bundle;
use crate::{Probe, SOON, Site, detached, installed, must, skip};

/// systemd as the first process of namespaces of its own, on a cgroup2 tree. It gets a read-only root and no unit of this
/// machine's: one that starts with those empties /tmp and more.
struct Systemd(std::process::Child);

impl Systemd {
    const OUTER: &str = "
        mount --make-rprivate /
        umount -R /sys/fs/cgroup
        mount -t cgroup2 none /sys/fs/cgroup
        mkdir /sys/fs/cgroup/$2
        echo $$ > /sys/fs/cgroup/$2/cgroup.procs
        exec unshare --mount --pid --fork --kill-child=KILL --cgroup --uts --ipc sh -ec \"$3\" sh \"$1\" \"$4\"";
    const INNER: &str = "
        mount --make-rprivate /
        mount -t proc proc /proc
        umount /sys/fs/cgroup
        mount -t cgroup2 none /sys/fs/cgroup
        mount --bind $1 $1
        cd $2
        for node in null zero full random urandom tty kmsg; do cp -a /dev/$node .; done
        mkdir pts shm mqueue
        mount --bind /dev/pts pts
        mount -t tmpfs tmpfs shm
        ln -s pts/ptmx ptmx
        mount --rbind $2 /dev
        mount -o remount,bind,ro /
        if touch /root/read-only; then exit 1; fi
        mount -t tmpfs -o mode=755 tmpfs /run
        mkdir -p /run/units /run/none /run/dbus
        printf '[Unit]\\nWants=dbus.socket dbus.service\\n' > /run/units/own.target
        printf '[Unit]\\nDefaultDependencies=no\\n[Socket]\\nListenStream=/run/dbus/system_bus_socket\\n' > /run/units/dbus.socket
        printf '[Unit]\\nDefaultDependencies=no\\n[Service]\\nType=notify\\nExecStart=%s\\n' '/usr/bin/dbus-daemon --system --address=systemd: \
            --nofork --nopidfile --systemd-activation' > /run/units/dbus.service
        exec env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin container=test \
            SYSTEMD_UNIT_PATH=/run/systemd/system.control:/run/systemd/transient:/run/units \
            SYSTEMD_GENERATOR_PATH=/run/none SYSTEMD_ENVIRONMENT_GENERATOR_PATH=/run/none \
            /lib/systemd/systemd --system --unit=own.target --log-target=null";

    /// `None`, and noted, where it does not come up.
    fn start(site: &Site) -> Option<Systemd> {
        // One name, which begins as the engines' world looks for it.
        let name = site.cgroup("systemd").replace('/', "");
        let log = std::fs::File::create(site.path("systemd.log")).unwrap();
        let mut command = Command::new("unshare");
        command
            .args(["--mount", "sh", "-ec", Self::OUTER, "sh"])
            .arg(&site.dir)
            .args([&name, Self::INNER])
            .arg(site.path("m/dev"));
        command.stdin(std::process::Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        let mut systemd = Systemd(command.spawn().unwrap());
        let until = std::time::Instant::now() + SOON;
        while std::time::Instant::now() < until && systemd.0.try_wait().unwrap().is_none() {
            let state =
                systemd.pid().map(|_| run(&mut systemd.within(Command::new("systemctl").arg("is-system-running"))));
            if state.is_some_and(|output| output.status.success()) {
                return Some(systemd);
            }
            std::thread::sleep(std::time::Duration::from_millis(100));
        }
        let said = std::fs::read_to_string(site.path("systemd.log")).unwrap();
        crate::common::skip("classic: a systemd scope", &format!("systemd does not come up in namespaces: {said}"));
        None
    }

    fn pid(&self) -> Option<String> {
        let children = format!("/proc/{0}/task/{0}/children", self.0.id());
        let pid = std::fs::read_to_string(children).ok()?.trim().to_owned();
        (!pid.is_empty()).then_some(pid)
    }

    fn within(&self, command: &Command) -> Command {
        let mut wrapped = Command::new("nsenter");
        wrapped.args(["-m", "-p", "-C", "-u", "-i", "-t", &self.pid().unwrap_or_default()]);
        wrapped.arg(command.get_program()).args(command.get_args());
        wrapped
    }
}

impl Drop for Systemd {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A site on cgroup v2 whose containers are in scopes of its own systemd.
struct Scopes {
    systemd: Systemd,
    site: Site,
    runtime: &'static str,
}

impl Scopes {
    fn new(runtime: &'static str) -> Option<Scopes> {
        let site = Site::on_cgroup_v2(&[runtime])?;
        if !Path::new("/lib/systemd/systemd").exists() {
            skip("systemd is not installed");
            return None;
        }
        Some(Scopes { systemd: Systemd::start(&site)?, site, runtime })
    }

    fn within(&self, command: &Command) -> Command {
        self.systemd.within(command)
    }

    fn call(&self, words: &[&str]) -> Command {
        self.within(&call(&self.site, self.runtime, words))
    }

    /// Creates and starts what that command creates, in a scope called by its id. It opens all of its nodes.
    fn start(&self, bundle: &Path, id: &str, create: &Command) {
        change(bundle, |config| config["linux"]["cgroupsPath"] = json!(format!("system.slice:mig:{id}")));
        let (there, said) = detached(&mut self.within(create), &self.site.path("log"));
        let bus = || text(&run(&mut self.within(Command::new("systemctl").args(["status", "dbus.socket", "dbus"]))));
        assert!(there, "{said}\n{}{}", refusals(&self.site), bus());
        must(&mut self.call(&["start", id]));
        assert_eq!(self.own_nodes(id), 6, "{id}");
    }

    /// How many of its own nodes a container may open.
    fn own_nodes(&self, id: &str) -> usize {
        let seen = must(&mut self.call(&["exec", id, "mig-probe"]));
        let nodes = Probe::read(&seen).nodes;
        assert_eq!(nodes.len(), 6, "{seen}");
        nodes.values().filter(|(_, verdict)| verdict == "allowed").count()
    }

    /// The one called `kept` keeps its slice and no more over a daemon-reload; the one called `lost`, of which systemd was
    /// not told, is the control.
    fn reload(&self) {
        // It acts on a reload in its own time, but before the next.
        must(&mut self.within(Command::new("systemctl").arg("daemon-reload")));
        must(&mut self.within(Command::new("systemctl").arg("daemon-reload")));
        if self.forgets("mig-lost.scope") {
            // Those of the other one that are its own too stay open.
            wait_for("what systemd makes of a reload", SOON, || self.own_nodes("lost") < 6);
        }
        assert_eq!(self.own_nodes("kept"), 6, "after a reload");
        let other = format!("{}:1", self.site.machine()["majors"]["nvidia"]);
        let words = ["exec", "--cap", "CAP_MKNOD", "kept", "mig-probe", &other, DENIED];
        let verdicts = Probe::verdicts(&must(&mut self.call(&words)));
        assert!(verdicts.values().all(|verdict| verdict == "denied"), "{verdicts:?}");
    }

    /// crun 1.8 leaves devices to its own program, on a cgroup below the scope. systemd 252 was seen to write rules again at
    /// a reload, 257 not.
    fn forgets(&self, scope: &str) -> bool {
        let show = ["show", "--property=DevicePolicy", "--value", scope];
        let strict = must(&mut self.within(Command::new("systemctl").args(show))).trim() == "strict";
        let version = must(Command::new("systemctl").arg("--version"));
        let version = version.split_whitespace().nth(1).and_then(|v| v.parse().ok());
        strict && version.is_some_and(|version: u32| version <= 252)
    }

    fn end(&self) {
        for id in ["kept", "lost"] {
            must(&mut self.call(&["delete", "--force", id]));
        }
        self.site.assert_clean("after delete");
    }
}

/// Without what the hook tells systemd: systemctl does nothing there.
fn of_the_classic_hook(runtime: &'static str) {
    let Some(scopes) = Scopes::new(runtime) else { return };
    for id in ["kept", "lost"] {
        let dir = hooked(&scopes.site, id, json!({"mig.profile": "1g.10gb", "mig.gpu": "0"}), &["sleep", "600"]);
        let shown = dir.display().to_string();
        let mut create = call(&scopes.site, runtime, &["--systemd-cgroup", "create", "--bundle", &shown, id]);
        if id == "lost" {
            let mut muted = Command::new("unshare");
            let script = "mount --bind /bin/true /usr/bin/systemctl && exec \"$@\"";
            muted.args(["--mount", "sh", "-c", script, "sh"]).arg(create.get_program()).args(create.get_args());
            create = muted;
        }
        scopes.start(&dir, id, &create);
    }
    scopes.reload();
    let words = ["exec", "--cap", "CAP_MKNOD", "kept", "mig-probe", ALLOWED];
    let verdicts = Probe::verdicts(&must(&mut scopes.call(&words)));
    assert_ne!(verdicts[ALLOWED], "denied", "what the config allows besides");
    scopes.end();
}

/// runc 1.1.5 tells systemd only of devices that /dev/char has. Without: the links are made in another /dev.
fn of_the_shim(runtime: &'static str) {
    let Some(scopes) = Scopes::new(runtime) else { return };
    let site = &scopes.site;
    let settings = std::fs::read_to_string(site.config()).unwrap();
    let (here, there) = (site.shown("m/dev"), site.shown("another-dev"));
    std::fs::create_dir(&there).unwrap();
    let elsewhere = site.write("elsewhere.toml", &settings.replace(&here, &there));
    for (id, config) in [("kept", site.config()), ("lost", elsewhere)] {
        let dir = bundle(site, id, json!({"mig.profile": "1g.10gb", "mig.gpu": "0"}), &["sleep", "600"]);
        let mut create = Command::new(binaries().join("mig-runtime"));
        create.arg("--mig-config").arg(config).arg("--mig-runtime").arg(installed(runtime));
        create.arg("--root").arg(site.path("root")).args(["--systemd-cgroup", "create", "--bundle"]).arg(&dir).arg(id);
        scopes.start(&dir, id, &create);
    }
    scopes.reload();
    for id in ["kept", "lost"] {
        must(&mut scopes.call(&["kill", id, "KILL"]));
    }
    scopes.end();
}

#[test]
fn a_scope_of_runc_on_cgroup_v2_keeps_what_the_classic_hook_gave() {
    of_the_classic_hook("runc");
}

#[test]
fn a_scope_of_crun_on_cgroup_v2_keeps_what_the_classic_hook_gave() {
    of_the_classic_hook("crun");
}

#[test]
fn a_scope_of_runc_on_cgroup_v2_keeps_what_the_shim_gave() {
    of_the_shim("runc");
}

#[test]
fn a_scope_of_crun_on_cgroup_v2_keeps_what_the_shim_gave() {
    of_the_shim("crun");
}
