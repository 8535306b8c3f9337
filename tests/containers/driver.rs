//! The driver's files in real containers: loaded by real loaders, in images that lack them, that bring others, and that want
//! something of the host.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::{Value, json};

use crate::common::{World, document, run, skip, text};
use crate::hostile::{image, listing};
use crate::rootless::{House, UID};
use crate::runtimes::{bundle, shim, shown};
use crate::{Engine, Site, binaries, must};

const VERSION: &str = "580.95.05";
const OWN: &str = "/dev/mig-hook/lib64";
const TRIPLET: &str = if cfg!(target_arch = "aarch64") { "aarch64-linux-gnu" } else { "x86_64-linux-gnu" };
const ASK: [&str; 2] = ["mig.profile=1g.10gb", "mig.gpu=0"];

/// A site whose machine has the driver's files, and a neighbour on the GPU that is asked for.
fn site(engines: &[&str]) -> Option<Site> {
    let site = Site::with(engines, &["--driver-files"])?;
    // As the host's /usr/lib: everybody may read it, and mapped users must.
    std::fs::set_permissions(site.path(""), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    site.sim("make", &["--gpu", "0", "--profile", "1g.20gb"]);
    Some(site)
}

/// What is to lie over an image's root: the probe, linked for a C library, and that library. `None`, and noted, where there is
/// no compiler for it.
fn probe(site: &Site, compiler: &str) -> Option<PathBuf> {
    let root = site.path(compiler);
    if root.exists() {
        return Some(root);
    }
    let source = site.write("mig-driver-probe.c", include_str!("mig-driver-probe.c"));
    std::fs::create_dir_all(root.join("bin")).unwrap();
    let built =
        Command::new(compiler).arg("-o").arg(root.join("bin/mig-driver-probe")).arg(source).arg("-ldl").output();
    if !built.as_ref().is_ok_and(|output| output.status.success()) {
        skip("driver", &format!("{compiler} can't build the probe"));
        return None;
    }
    // The loader and what the libraries are linked with, at the places that they have on a Debian host.
    let needed = "for file in \"$@\"; do ldd \"$file\" 2>/dev/null | grep -oE '/[^ ]+' || true; done | sort -u";
    let library = site.path("m").join(format!("usr/lib/{TRIPLET}/libnvidia-ml.so.{VERSION}"));
    let mut files =
        must(Command::new("sh").args(["-c", needed, "sh"]).arg(root.join("bin/mig-driver-probe")).arg(library));
    if compiler == "musl-gcc" {
        files = format!("/lib/ld-musl-{}.so.1\n", if TRIPLET.starts_with("a") { "aarch64" } else { "x86_64" });
    }
    for dir in ["usr/lib", "usr/lib64"] {
        std::fs::create_dir_all(root.join(dir)).unwrap();
    }
    for (link, target) in [("lib", "usr/lib"), ("lib64", "usr/lib64")] {
        std::os::unix::fs::symlink(target, root.join(link)).unwrap();
    }
    for file in files.lines() {
        let to = root.join(file.trim_start_matches('/'));
        std::fs::create_dir_all(to.parent().unwrap()).unwrap();
        std::fs::copy(file, to).unwrap();
    }
    Some(root)
}

/// An image with the probe, and that change to it.
fn probing(engine: &Engine, compiler: &str, name: &str, change: &str, env: &[&str]) -> Option<String> {
    let root = probe(engine.site, compiler)?;
    let lay_over = format!("rm -rf lib lib64 usr && cp -a {}/. . && {change}", root.display());
    Some(image(engine, name, &lay_over, env))
}

/// What the probe said: which file each library is, and the slices that it sees.
fn said(output: &Output) -> (String, Vec<String>) {
    let all = text(output);
    assert!(output.status.success(), "{all}");
    let seen = all.lines().filter_map(|line| line.strip_prefix("sees "));
    let seen: Vec<String> = seen.map(|line| line.split(' ').next().unwrap().to_owned()).collect();
    (all, seen)
}

/// The UUIDs of the only lease.
fn leased(site: &Site) -> Vec<String> {
    let lease = site.lease();
    let slices = lease["slices"].as_array().unwrap().iter();
    slices.map(|slice| slice["uuid"].as_str().unwrap().to_owned()).collect()
}

fn assert_loaded(output: &Output, own: &[String]) {
    let (all, seen) = said(output);
    assert!(all.contains(&format!("which says: libcuda.so.{VERSION} of nvml-sim {VERSION}")), "{all}");
    assert_eq!(seen, own, "exactly its own: {all}");
}

/// Starts a container that waits, and runs the probe in it as its first process did, and in a session.
fn loaded_in(engine: &Engine, image: &str, options: &[&str]) {
    loaded_with_sessions(engine, image, options, true);
}

fn loaded_with_sessions(engine: &Engine, image: &str, options: &[&str], in_sessions: bool) {
    let site = engine.site;
    let options = [&["-d"], options, &[image]].concat();
    let script = "mig-driver-probe > /dev/shm/said 2>&1; echo $? > /dev/shm/code; exec sleep 600";
    let id = must(&mut engine.request(&ASK, &options, &["sh", "-c", script]));
    let id = id.trim();
    let own = leased(site);
    let first = "while [ ! -s /dev/shm/code ]; do sleep 0.05; done; cat /dev/shm/said; exit $(cat /dev/shm/code)";
    let first = engine.run(&["exec", id, "sh", "-c", first]);
    assert_loaded(&first, &own);
    assert!(text(&first).contains(&format!("libcuda.so.1 is {OWN}/libcuda.so.1")), "{}", text(&first));
    // podman gives a session none of our variables: there the loader's own directories serve.
    if in_sessions {
        assert_loaded(&engine.run(&["exec", id, "mig-driver-probe"]), &own);
    }
    let write =
        "for f in /dev/mig-hook/lib64/libcuda.so.1 /usr/bin/nvidia-debugdump; do echo x >>$f && exit 1; done; true";
    let output = engine.run(&["exec", id, "sh", "-c", write]);
    assert!(output.status.success(), "the host's files can't be written: {}", text(&output));
    engine.ok(&["kill", id]);
    engine.remove(id);
    site.clean_but(1);
}

/// In images without the driver, with another one, with a newer CUDA's own libcuda, and where nothing may be written.
fn everywhere(engine: &Engine) {
    let site = engine.site;
    let Some(plain) = probing(engine, "cc", "plain", "true", &[]) else { return };
    loaded_in(engine, &plain, &[]);
    loaded_in(engine, &plain, &["--read-only"]);
    // Of another driver, under the names that a loader finds first.
    let other = World::with(&["a100-sxm4-80gb"], &["--driver-files", "--driver-version", "535.1.1"]);
    let theirs = other.path("m").join(format!("usr/lib/{TRIPLET}"));
    let change = format!(
        "cp -a {theirs}/libcuda.so* {theirs}/libnvidia-ml.so* usr/lib/{TRIPLET}/ && mkdir -p usr/local/cuda/compat && \
         cp -L {theirs}/libcuda.so.1 usr/local/cuda/compat/",
        theirs = theirs.display()
    );
    let Some(foreign) = probing(engine, "cc", "foreign", &change, &[]) else { return };
    loaded_in(engine, &foreign, &[]);
    // An image that looks there first by a variable of its own does so in podman's sessions.
    let env = ["LD_LIBRARY_PATH=/usr/local/cuda/compat:/usr/local/nvidia/lib64"];
    let Some(compat) = probing(engine, "cc", "compat", &change, &env) else { return };
    loaded_with_sessions(engine, &compat, &[], engine.runtime.is_some());
    assert_eq!(site.audited("grant"), 4);
}

#[test]
fn loaded_under_podman_and_runc() {
    let Some(site) = site(&["podman"]) else { return };
    everywhere(&site.podman("runc"));
}

#[test]
fn loaded_under_podman_and_crun() {
    let Some(site) = site(&["podman", "crun"]) else { return };
    everywhere(&site.podman("crun"));
}

#[test]
fn loaded_under_docker() {
    let Some(site) = site(&["docker"]) else { return };
    everywhere(&site.docker(&["--mig-env"]));
}

#[test]
fn loaded_in_a_user_namespace() {
    for runtime in ["runc", "crun"] {
        let Some(site) = site(&["podman", runtime]) else { return };
        let Some(house) = House::new(&site) else { return };
        let podman = house.root(runtime);
        let Some(image) = probing(&podman, "cc", "mapped", "true", &[]) else { return };
        loaded_in(&podman, &image, &["--uidmap", "0:100000:65536", "--gidmap", "0:100000:65536"]);
    }
}

#[test]
fn loaded_without_root() {
    let Some(site) = site(&["podman", "crun"]) else { return };
    let Some(house) = House::new(&site) else { return };
    let Some(podman) = house.user("crun") else { return };
    let migctl = |args: &[&str]| {
        let mut command = Command::new(binaries().join("migctl"));
        must(command.arg("--config").arg(site.config()).args(args))
    };
    migctl(&["reserve", "1g.10gb", "--uid", &UID.to_string()]);
    let uuid = leased(&site)[0].clone();
    let Some(image) = probing(&podman, "cc", "users", "true", &[]) else { return };
    let output = run(&mut podman.request(&[&format!("mig.uuid={uuid}")], &["--rm", &image], &["mig-driver-probe"]));
    assert_loaded(&output, &[uuid]);
}

/// The stubs have no C library of their own and load anywhere; NVML, as NVIDIA's, is linked with glibc.
#[test]
fn musl_finds_what_is_injected() {
    let Some(site) = site(&["podman"]) else { return };
    let podman = site.podman("runc");
    let Some(image) = probing(&podman, "musl-gcc", "musl", "true", &[]) else { return };
    let output = run(&mut podman.request(&ASK, &["--rm", &image], &["mig-driver-probe"]));
    let all = text(&output);
    assert!(all.contains(&format!("libcuda.so.1 is {OWN}/libcuda.so.1, which says: libcuda.so.{VERSION} of")), "{all}");
    assert!(all.contains(&format!("{OWN}/libnvidia-ml.so.1")) || all.contains("libgcc_s.so.1"), "{all}");
    site.clean_but(1);
}

/// An image with no loader at all: the files are there, and the static nvidia-smi of the machine runs.
#[test]
fn nvidia_smi_in_any_image() {
    let Some(site) = site(&["podman", "docker"]) else { return };
    let smi = site.path("m/usr/bin/nvidia-smi");
    let dynamic = text(&run(Command::new("readelf").arg("-l").arg(&smi))).contains("INTERP");
    for engine in [site.podman("runc"), site.docker(&["--mig-env"])] {
        let id = must(&mut engine.request(&ASK, &["-d"], &["sleep", "600"]));
        let id = id.trim();
        let listed = engine.ok(&["exec", id, "ls", OWN]);
        for name in ["libcuda.so", "libcuda.so.1", "libnvidia-ml.so.1", "libnvidia-nvvm.so.4"] {
            assert!(listed.lines().any(|line| line == name), "{name}: {listed}");
        }
        let says = ["exec", id, "grep", "-ao", "libcuda.so.[0-9.]* of nvml-sim [0-9.]*", "/usr/lib64/libcuda.so.1"];
        assert_eq!(engine.ok(&says).trim(), format!("libcuda.so.{VERSION} of nvml-sim {VERSION}"));
        if dynamic {
            skip("driver: nvidia-smi without a loader", "this build's is dynamic: make build links it statically");
        } else {
            let said = engine.ok(&["exec", id, "nvidia-smi"]);
            let slices: Vec<&str> = said.lines().filter(|line| line.trim_start().starts_with("MIG ")).collect();
            let own = leased(&site);
            assert!(slices.len() == 1 && slices[0].contains(&own[0]), "{said}");
            assert!(said.contains("GPU 0:") && !said.contains("GPU 1:"), "{said}");
        }
        engine.ok(&["kill", id]);
        engine.remove(id);
        site.clean_but(1);
    }
}

/// A root file system that the runtime itself can't write: then everything is below /dev.
#[test]
fn where_the_root_cant_be_written_the_libraries_are_there_all_the_same() {
    let Some(site) = site(&["runc", "crun"]) else { return };
    let Some(over) = probe(&site, "cc") else { return };
    let root = site.path("root-ro");
    let made = "cp -a \"$1\" \"$3\" && cd \"$3\" && rm -rf lib lib64 usr && cp -a \"$2\"/. . && mount --bind . . && \
                mount -o remount,bind,ro \"$3\"";
    must(Command::new("sh").args(["-ec", made, "sh"]).arg(site.dir.join("rootfs")).args([&over, &root]));
    for runtime in ["runc", "crun"] {
        let dir = bundle(
            &site,
            &format!("ro-{runtime}"),
            json!({"mig.profile": "1g.10gb", "mig.gpu": "0"}),
            &["sh", "-c", "mig-driver-probe"],
        );
        let mut config = document(&dir.join("config.json"));
        config["root"] = json!({"path": root, "readonly": true});
        std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
        let output = run(&mut shim(&site, runtime, &["run", "--bundle", shown(&dir), runtime]));
        let (all, seen) = said(&output);
        assert!(all.contains(&format!("libcuda.so.1 is {OWN}/libcuda.so.1")) && seen.len() == 1, "{all}");
        site.clean_but(1);
    }
    must(Command::new("umount").arg(&root));
}

// ---- images that want something of the host ----

/// Every place of ours in an image as a link to a directory of the host, and whatever is there afterwards.
fn hostile(engine: &Engine) {
    let site = engine.site;
    let canary = site.path("canary");
    std::fs::create_dir(&canary).unwrap();
    site.write("canary/secret", "of the host");
    for name in ["libcuda.so.1", "libnvidia-ml.so.1", "nvidia-smi", "nvidia-debugdump", "nvidia.icd", "socket"] {
        site.write(&format!("canary/{name}"), "as it was");
    }
    let before = listing(&canary);
    let up = format!("../../../../../../../../../..{}", canary.display());
    let c = canary.display();
    let cases = [
        ("triplet", format!("mkdir -p usr/lib && ln -s {c} usr/lib/{TRIPLET}")),
        ("lib64", format!("mkdir -p usr && ln -s {up} usr/lib64")),
        ("usr", format!("rm -rf usr && ln -s {c} usr")),
        ("own", format!("mkdir -p dev && ln -s {c} dev/mig-hook")),
        ("bin", format!("mkdir -p usr && ln -s {up} usr/bin")),
        (
            "file",
            format!(
                "mkdir -p usr/lib64 usr/bin && ln -s {c}/libcuda.so.1 usr/lib64/libcuda.so.1 && ln -s {c}/nvidia-debugdump usr/bin/"
            ),
        ),
        ("firmware", format!("rm -rf lib && mkdir lib && ln -s {c} lib/firmware")),
        ("etc", format!("mkdir -p etc/OpenCL && ln -s {up} etc/OpenCL/vendors")),
        ("run", format!("rm -rf run && ln -s {c} run")),
        ("compat", format!("mkdir -p usr/local/cuda && ln -s {c} usr/local/cuda/compat")),
        ("cache", format!("mkdir -p etc && ln -s {c}/secret etc/ld.so.cache && ln -s {c} etc/ld.so.conf.d")),
        ("loop", "mkdir -p usr/lib && ln -s lib64 usr/lib64".to_owned()),
        ("directory", "mkdir -p usr/lib64/libcuda.so.1/x".to_owned()),
        ("fifo", "mkdir -p usr/lib64 && mkfifo usr/lib64/libcuda.so.1".to_owned()),
    ];
    // The image's variables, too, are the container's alone.
    let env = ["LD_LIBRARY_PATH=/proc/self/cwd:", "LD_PRELOAD=/proc/self/cwd/evil.so", "NVIDIA_VISIBLE_DEVICES=all"];
    let look = "find / -xdev -name secret 2>/dev/null; cat /usr/lib64/libcuda.so.1 /usr/bin/secret 2>/dev/null | head -c 99; \
                echo looked";
    for (name, change) in cases {
        crate::common::attack(&format!("an image: {name}"));
        let image = image(engine, name, &change, &env);
        let output = run(&mut engine.request(&ASK, &["--rm", &image], &["/bin/sh", "-c", look]));
        let all = text(&output);
        assert_eq!(listing(&canary), before, "{name}: nothing is made on the host: {all}");
        for file in &before {
            let content = std::fs::read_to_string(canary.join(file)).unwrap();
            assert_eq!(content, if file == "secret" { "of the host" } else { "as it was" }, "{name}: {file}");
        }
        // It runs with its slice, or is refused; but it sees nothing of the host's.
        assert!(!all.contains("of the host") && !all.contains("as it was"), "{name}: {all}");
        assert!(output.status.success() == all.contains("looked"), "{name}: {all}");
        site.gc();
        site.clean_but(1);
    }
}

#[test]
fn hostile_images_under_podman_and_runc() {
    let Some(site) = site(&["podman"]) else { return };
    hostile(&site.podman("runc"));
}

#[test]
fn hostile_images_under_podman_and_crun() {
    let Some(site) = site(&["podman", "crun"]) else { return };
    hostile(&site.podman("crun"));
}

#[test]
fn hostile_images_under_docker() {
    let Some(site) = site(&["docker"]) else { return };
    hostile(&site.docker(&["--mig-env"]));
}

/// Where mounts come from, and which stages have hooks, whatever the image is like.
#[test]
fn nothing_is_mounted_from_an_image() {
    let Some(site) = site(&["podman", "docker"]) else { return };
    for engine in [site.podman("runc"), site.docker(&["--mig-env"])] {
        let id = must(&mut engine.request(&ASK, &["-d"], &["sleep", "600"]));
        let bundle = PathBuf::from(site.lease()["holder"]["bundle"].as_str().unwrap());
        let config = document(&bundle.join("config.json"));
        let root = bundle.join(config["root"]["path"].as_str().unwrap()).canonicalize().unwrap();
        let ours = |mount: &&Value| {
            let at = mount["destination"].as_str().unwrap();
            at.starts_with(OWN) || at.contains("nvidia") || at.contains("libcuda")
        };
        let mounts: Vec<&Value> = config["mounts"].as_array().unwrap().iter().filter(ours).collect();
        assert!(mounts.len() > 40, "{mounts:#?}");
        for mount in mounts {
            let source = Path::new(mount["source"].as_str().unwrap()).canonicalize().unwrap();
            assert!(
                source.starts_with(site.path("m").canonicalize().unwrap()) && !source.starts_with(&root),
                "{mount}"
            );
        }
        assert!(["createContainer", "startContainer", "prestart"].iter().all(|stage| {
            let hooks = config["hooks"].get(stage).map(Value::to_string).unwrap_or_default();
            !hooks.contains("mig-hook") && !hooks.contains("nvidia")
        }));
        let hidden = config["linux"]["maskedPaths"].to_string();
        assert!(hidden.contains("/proc/driver/nvidia/capabilities/gpu1") && !hidden.contains("capabilities/gpu0"));
        engine.ok(&["kill", id.trim()]);
        engine.remove(id.trim());
        site.clean_but(1);
    }
}

/// Somebody who shares the root file system swaps a directory for a link to the host, again and again, while the runtime makes
/// the places for our mounts.
#[test]
fn a_root_that_changes_under_the_runtime() {
    let Some(site) = site(&["runc", "crun"]) else { return };
    let canary = site.path("canary");
    std::fs::create_dir(&canary).unwrap();
    site.write("canary/libcuda.so.1", "as it was");
    let root = site.path("swapped");
    must(Command::new("cp").arg("-a").arg(site.dir.join("rootfs")).arg(&root));
    std::fs::create_dir_all(root.join("usr/lib64")).unwrap();
    std::os::unix::fs::symlink(&canary, root.join("usr/swap")).unwrap();
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let (one, two) = (root.join("usr/lib64"), root.join("usr/swap"));
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                let at = nix::fcntl::AT_FDCWD;
                nix::fcntl::renameat2(at, &one, at, &two, nix::fcntl::RenameFlags::RENAME_EXCHANGE).unwrap();
            }
        });
        let mut ran = 0;
        for turn in 0..20 {
            let runtime = ["runc", "crun"][turn % 2];
            let name = format!("{runtime}-{turn}");
            let dir = bundle(
                &site,
                &name,
                json!({"mig.profile": "1g.10gb", "mig.gpu": "0"}),
                &["sh", "-c", "cat /usr/lib64/libcuda.so.1 | head -c 99"],
            );
            let mut config = document(&dir.join("config.json"));
            config["root"] = json!({"path": root, "readonly": false});
            std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
            let output = run(&mut shim(&site, runtime, &["run", "--bundle", shown(&dir), &name]));
            ran += usize::from(output.status.success());
            assert!(!text(&output).contains("as it was"), "{}", text(&output));
            let source = |mount: &Value| PathBuf::from(mount["source"].as_str().unwrap_or_default());
            let config = document(&dir.join("config.json"));
            assert!(config["mounts"].as_array().unwrap().iter().all(|mount| !source(mount).starts_with(&root)));
            run(&mut shim(&site, runtime, &["delete", "--force", &name]));
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        eprintln!("{ran} of 20 started");
    });
    assert_eq!(std::fs::read_to_string(canary.join("libcuda.so.1")).unwrap(), "as it was");
    // runc before 1.1.14 makes empty files there by itself, for any mount (CVE-2024-45310): but nothing has content.
    for left in listing(&canary).iter().filter(|name| *name != "libcuda.so.1") {
        assert_eq!(std::fs::read(canary.join(left)).unwrap_or_default(), b"", "{left}");
    }
    site.gc();
    site.clean_but(1);
}
