//! Containers that want what is another's. More attacks: hostile.rs, driver.rs, classic.rs; all of them: docs/security.md.

use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

use crate::common::{attack, run, text, wait_for};
use crate::rootless::House;
use crate::{Engine, Probe, SOON, Site, must};

/// Makes nodes for devices and keeps a descriptor to each, opened with O_PATH: no device rule is asked about that.
const GRAB: &str = r#"
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>
int main(int argc, char **argv)
{
    for (int i = 1; i < argc; i++) {
        unsigned major, minor;
        char path[32];
        snprintf(path, sizeof path, "/tmp/grab%d", i);
        if (sscanf(argv[i], "%u:%u", &major, &minor) != 2 || mknod(path, S_IFCHR | 0666, makedev(major, minor)) != 0 ||
            open(path, O_PATH) < 0) {
            perror(argv[i]);
            return 1;
        }
    }
    puts("grabbed");
    fflush(stdout);
    pause();
}
"#;

/// Of a slice that outlives its container, and that nobody gets as long as somebody has it open.
fn a_path_to_a_device(engine: &Engine) {
    let site = engine.site;
    let (source, program) = (site.write("grab.c", GRAB), site.path("grab"));
    let built = Command::new("cc").args(["-static", "-o"]).arg(&program).arg(source).output();
    if !built.is_ok_and(|output| output.status.success()) {
        return crate::common::skip("a path to a neighbour's device", "no C compiler with a static libc");
    }
    let made = site.migctl(&["create", "--gpu", "0", "1g.10gb"]);
    assert!(made.status.success(), "{}", text(&made));
    let victim = engine.start(&["mig.profile=1g.10gb", "mig.gpu=0"]);
    let lease = site.leases().into_iter().find(|lease| lease["state"] == "active").expect("the slice is given");
    let (slice, caps) = (&lease["slices"][0], site.machine()["majors"]["caps"].clone());
    let minors = [&slice["gi_minor"], &slice["ci_minor"]].map(|minor| format!("{caps}:{minor}"));
    let program = format!("{}:/grab:ro", program.display());
    let words = ["/grab", &minors[0], &minors[1]];
    attack("O_PATH descriptors of a neighbour's capabilities");
    let attacker = must(&mut engine.request(&[], &["-d", "--cap-add", "MKNOD", "-v", &program], &words));
    let attacker = attacker.trim();
    wait_for("the attacker", SOON, || text(&engine.run(&["logs", attacker])).contains("grabbed"));
    engine.ok(&["kill", &victim]);
    wait_for("the victim's end", SOON, || site.leases().iter().all(|lease| lease["state"] == "static"));
    let next = engine.start(&["mig.profile=1g.10gb", "mig.gpu=0"]);
    assert_eq!(site.instances().len(), 1, "the slice that was kept is given again");
    for id in [&victim, &next, attacker] {
        engine.remove(id);
    }
}

#[test]
fn a_path_to_a_neighbours_device_holds_nothing_under_podman() {
    let Some(site) = Site::new(&["podman"]) else { return };
    a_path_to_a_device(&site.podman("runc"));
}

#[test]
fn a_path_to_a_neighbours_device_holds_nothing_under_docker() {
    let Some(site) = Site::new(&["docker"]) else { return };
    a_path_to_a_device(&site.docker(&["--mig-env"]));
}

/// Files below `dir` that any process but this one has open.
fn open_below(dir: &Path) -> Vec<String> {
    let processes = std::fs::read_dir("/proc").unwrap().flatten();
    let others = processes.filter(|p| {
        let name = p.file_name().to_string_lossy().into_owned();
        name.parse::<u32>().is_ok_and(|pid| pid != std::process::id())
    });
    let files = others.flat_map(|p| std::fs::read_dir(p.path().join("fd")).into_iter().flatten().flatten());
    let targets = files.filter_map(|fd| Some((fd.path(), std::fs::read_link(fd.path()).ok()?)));
    targets
        .filter(|(_, to)| to.starts_with(dir))
        .map(|(fd, to)| format!("{} -> {}", fd.display(), to.display()))
        .collect()
}

/// Neither leases, claims and signs of life, nor the driver's devices: whoever has one of those open could keep a slice from
/// being freed (docs/decisions/0012-claims.md).
#[test]
fn nothing_of_ours_is_open_while_a_container_runs() {
    let Some(site) = Site::new(&["podman", "docker", "crun"]) else { return };
    for engine in [site.podman("runc"), site.podman("crun"), site.podman_by_shim(""), site.docker(&["--mig-env"])] {
        attack("descriptors of the state and of the driver, in every process");
        let id = engine.start(&["mig.profile=1g.10gb"]);
        engine.probe(&id);
        for dir in ["state", "m"] {
            assert_eq!(open_below(&site.path(dir)), Vec::<String>::new(), "{dir}");
        }
        engine.ok(&["kill", &id]);
        site.clean("after kill");
        engine.remove(&id);
    }
    let _held = std::fs::File::open(site.path("state/lock")).unwrap();
    let mut sleep =
        Command::new("sleep").arg("60").stdin(std::fs::File::open(site.path("state/lock")).unwrap()).spawn().unwrap();
    assert_eq!(open_below(&site.path("state")).len(), 1, "one that is there is seen");
    sleep.kill().unwrap();
    sleep.wait().unwrap();
}

/// Tries each device by a node in each place that a container can make ready for it. A line `WHERE DEVICE VERDICT` each.
const REMOUNT: &str = r#"
mkdir -p /tmp/fresh
mount -t tmpfs -o dev,suid,exec tmpfs /tmp/fresh 2>/dev/null && echo mounted
mount -o remount,rw,dev / 2>/dev/null
mount -o remount,rw,dev /dev 2>/dev/null
mount -o remount,rw /sys/fs/cgroup 2>/dev/null
list=/sys/fs/cgroup/devices/devices.allow
if [ -e $list ] && { echo a >$list; } 2>/dev/null; then echo "opened $list"; fi
for place in /tmp/fresh /dev / /tmp; do
    for device; do
        node=$place/attack
        mknod "$node" c "${device%:*}" "${device#*:}" 2>/dev/null || { echo "$place $device no-node"; continue; }
        case $(dd if="$node" of=/dev/null bs=1 count=1 2>&1) in
            *'Operation not permitted'* | *'Permission denied'*) echo "$place $device denied" ;;
            *) echo "$place $device OPENED" ;;
        esac
        rm "$node"
    done
done
echo tried
"#;

/// A neighbour's capabilities, cap1 and cap2, the other GPUs: by nodes on mounts of one's own.
fn remounts(engine: &Engine) {
    let site = engine.site;
    site.sim("make", &["--gpu", "0", "--profile", "2g.20gb"]);
    for (n, capability) in ["MKNOD", "SYS_ADMIN"].into_iter().enumerate() {
        let options = ["-d", "--cap-add", "MKNOD", "--cap-add", capability, "--security-opt", "seccomp=unconfined"];
        let request = ["mig.profile=1g.10gb", "mig.gpu=0"];
        let id = must(&mut engine.request(&request, &options, &["sh", "-c", crate::PROBE_AND_WAIT]));
        let id = id.trim();
        let others = site.others(&engine.probe(id));
        assert!(others.len() >= 7, "{others:?}");
        let mut words = vec!["exec", id, "sh", "-c", REMOUNT, "sh"];
        words.extend(others.iter().map(String::as_str));
        let said = engine.ok(&words);
        attack(&format!("nodes of {} devices on four mounts with CAP_{capability}", others.len()));
        assert!(said.contains("\ntried") && !said.contains("OPENED") && !said.contains("opened"), "{said}");
        assert_eq!(said.contains("mounted"), n == 1, "with CAP_SYS_ADMIN there is a mount of its own: {said}");
        assert!(said.matches(" denied").count() >= others.len() * (n + 1), "{said}");
        engine.assert_confined(id, &engine.probe(id));
        engine.ok(&["kill", id]);
        site.clean_but(1);
        engine.remove(id);
    }
}

#[test]
fn mounts_of_ones_own_open_nothing_under_podman() {
    let Some(site) = Site::new(&["podman"]) else { return };
    remounts(&site.podman("runc"));
}

#[test]
fn mounts_of_ones_own_open_nothing_under_docker() {
    let Some(site) = Site::new(&["docker"]) else { return };
    remounts(&site.docker(&["--mig-env"]));
}

/// Root of a user namespace, which may mount and make what it likes there.
#[test]
fn a_user_namespace_opens_its_own_slice_and_no_other() {
    let Some(site) = Site::new(&["podman", "crun"]) else { return };
    let Some(house) = House::new(&site) else { return };
    site.sim("make", &["--gpu", "0", "--profile", "2g.20gb"]);
    for runtime in ["runc", "crun"] {
        let podman = house.root(runtime);
        let others = site.others(&Probe::default());
        let script = format!("mig-probe; set -- {}; {REMOUNT}", others.join(" "));
        let options = ["--rm", "--uidmap", "0:100000:65536", "--cap-add", "MKNOD", "--cap-add", "SYS_ADMIN"];
        attack(&format!("nodes of {} devices on four mounts in a user namespace", others.len()));
        let request = ["mig.profile=1g.10gb", "mig.gpu=0"];
        let output = run(&mut podman.request(&request, &options, &["sh", "-c", &script]));
        let said = text(&output);
        assert!(output.status.success() && said.contains("\ntried"), "{runtime}: {said}");
        assert!(!said.contains("OPENED") && !said.contains("opened"), "{runtime}: {said}");
        let seen = Probe::read(&said);
        assert_eq!(seen.nodes.len(), 6, "{runtime}: its own nodes and no other: {said}");
        site.clean_but(1);
    }
}

/// What an image says of itself is not what its user asks for.
#[test]
fn an_image_asks_for_nothing() {
    let Some(site) = Site::new(&["podman", "docker"]) else { return };
    let tar = site.dir.join("rootfs.tar").display().to_string();
    let changes = [
        "ENV MIG_PROFILE=7g.80gb",
        "ENV MIG_UUID=all",
        "ENV NVIDIA_VISIBLE_DEVICES=all",
        "ENV NVIDIA_DRIVER_CAPABILITIES=all",
        "LABEL mig.profile=7g.80gb",
        "LABEL io.kubernetes.cri.image-name=x",
    ];
    for engine in [site.podman("runc"), site.podman_by_shim(""), site.docker(&[])] {
        let image = format!("localhost/grabbing-{}", std::process::id());
        let mut import = vec!["import"];
        import.extend(changes.iter().flat_map(|change| ["--change", change]));
        import.extend([tar.as_str(), &image]);
        engine.ok(&import);
        attack("ENV and LABEL of an image");
        let output = run(&mut engine.request(&[], &["--rm", &image], &["mig-probe"]));
        assert!(output.status.success(), "{}", text(&output));
        assert_eq!(Probe::read(&text(&output)).nodes.len(), 0, "{}", text(&output));
        assert!(!site.path("state").exists(), "no state was made");
    }
}

/// The mark of an edited config, said by somebody who has learnt a neighbour's token.
#[test]
fn a_neighbours_lease_is_not_had_by_its_token() {
    let Some(site) = Site::new(&["podman", "docker"]) else { return };
    for engine in [site.podman("runc"), site.podman_by_shim("")] {
        let victim = engine.start(&["mig.profile=1g.10gb"]);
        let lease = site.lease();
        let mark = format!("mig.lease={}", lease["token"].as_str().unwrap());
        for requests in [&[mark.as_str()][..], &["mig.profile=1g.10gb", &mark]] {
            attack(&format!("{requests:?}"));
            let output = run(&mut engine.request(requests, &["--rm"], &["mig-probe"]));
            let seen = Probe::read(&text(&output));
            let own = seen.variables.get("MIG_DEVICE_UUIDS").cloned().unwrap_or_default();
            assert_ne!(json!(own), lease["slices"][0]["uuid"], "{requests:?}");
            assert!(seen.nodes.is_empty() || requests.len() == 2, "{requests:?}: {}", text(&output));
            site.gc();
            let left = site.lease();
            for kept in ["/token", "/state", "/holder/container", "/slices"] {
                assert_eq!(left.pointer(kept), lease.pointer(kept), "{requests:?}: the victim keeps what it has");
            }
        }
        engine.ok(&["kill", &victim]);
        site.clean("after kill");
        engine.remove(&victim);
    }
    assert_eq!(site.leases(), Vec::<Value>::new());
}
