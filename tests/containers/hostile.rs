//! Images that want something of the host.

use std::path::Path;
use std::process::Command;

use serde_json::Value;

use crate::common::{document, run, text};
use crate::{Engine, PROBE_AND_WAIT, Probe, Site, must};

/// A library that leaves a mark on the host when it is loaded there.
fn evil(site: &Site, canary: &Path) -> Option<String> {
    let mark = canary.join("loaded").display().to_string();
    let source = format!(
        "#include <fcntl.h>\n__attribute__((constructor)) static void mark(void) {{ open(\"{mark}\", O_CREAT | O_WRONLY, 0600); }}\n"
    );
    let file = site.write("evil.c", &source);
    let library = site.shown("evil.so");
    let built = Command::new("cc").args(["-shared", "-fPIC", "-o", &library]).arg(file).output();
    if !built.is_ok_and(|output| output.status.success()) {
        crate::common::skip("hostile: LD_PRELOAD", "no C compiler to build a library with");
        return None;
    }
    must(Command::new("true").env("LD_PRELOAD", &library));
    assert!(Path::new(&mark).exists(), "the library does what it should when it is loaded");
    std::fs::remove_file(mark).unwrap();
    Some(library)
}

/// Imports an image: the busybox root with `change` (shell, in the root) done to it, and that environment.
pub fn image(engine: &Engine, name: &str, change: &str, env: &[&str]) -> String {
    let site = engine.site;
    let (root, tar) = (site.shown(&format!("{name}-root")), site.shown(&format!("{name}.tar")));
    let script = format!("cp -a \"$1\" \"$2\" && cd \"$2\" && {change} && tar -cf \"$3\" .");
    must(Command::new("sh").args(["-ec", &script, "sh"]).arg(site.dir.join("rootfs")).args([&root, &tar]));
    let image = format!("localhost/{name}-{}", site.path("").file_name().unwrap().to_str().unwrap().to_lowercase());
    let mut args = vec!["import".to_owned()];
    args.extend(env.iter().flat_map(|e| ["--change".to_owned(), format!("ENV {e}")]));
    args.extend([tar, image.clone()]);
    engine.ok(&args.iter().map(String::as_str).collect::<Vec<_>>());
    image
}

pub fn listing(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        std::fs::read_dir(dir).unwrap().flatten().map(|e| e.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

fn links_and_preloads(engine: &Engine) {
    let site = engine.site;
    let canary = site.path("canary");
    std::fs::create_dir(&canary).unwrap();
    site.write("canary/nvidia0", "as it was");
    let library = evil(site, &canary);
    let copy = library.map_or("true".to_owned(), |library| format!("cp {library} evil.so"));
    let env = ["LD_PRELOAD=/proc/self/cwd/evil.so", "LD_AUDIT=/proc/self/cwd/evil.so", "PATH=/proc/self/cwd:/bin"];
    let cases = [
        ("dev", format!("{copy} && rmdir dev && ln -s {} dev", canary.display())),
        ("caps", format!("{copy} && ln -s {} dev/nvidia-caps", canary.display())),
        ("node", format!("{copy} && ln -s {}/nvidia0 dev/nvidia0", canary.display())),
        ("up", format!("{copy} && rmdir dev && ln -s ../../../../../../../..{} dev", canary.display())),
    ];
    for (name, change) in cases {
        crate::common::attack(&format!("an image: {name}"));
        let image = image(engine, name, &change, &env);
        // runc 1.1 and crun 1.8 follow a link at /dev out of the container by themselves: what they leave there without
        // a request is not ours to answer for.
        run(&mut engine.command(&["run", "--rm", &image, "/bin/true"]));
        let without = listing(&canary);
        // Either it runs, with its own slice, or it is refused: but nothing of ours happens outside of it.
        let output = run(&mut engine.request(&["mig.profile=1g.10gb"], &["--rm", &image], &["/bin/mig-probe"]));
        if output.status.success() {
            let seen = Probe::read(&text(&output));
            assert_eq!(seen.variable("MIG_DEVICE_PROFILES"), "1g.10gb", "{name}");
        }
        assert_eq!(listing(&canary), without, "{name}: {}", text(&output));
        assert_eq!(std::fs::read_to_string(canary.join("nvidia0")).unwrap(), "as it was", "{name}");
        site.gc();
        site.clean(name);
        for left in without.iter().filter(|left| *left != "nvidia0") {
            std::fs::remove_file(canary.join(left)).unwrap();
        }
    }
}

#[test]
fn links_and_preloads_under_podman_and_runc() {
    let Some(site) = Site::new(&["podman"]) else { return };
    links_and_preloads(&site.podman("runc"));
}

#[test]
fn links_and_preloads_under_podman_and_crun() {
    let Some(site) = Site::new(&["podman", "crun"]) else { return };
    links_and_preloads(&site.podman("crun"));
}

#[test]
fn links_and_preloads_under_docker() {
    let Some(site) = Site::new(&["docker"]) else { return };
    links_and_preloads(&site.docker(&["--mig-env"]));
}

/// What the runtime is told: no mount from below the container's root, the nodes by number, and our hooks with an
/// environment of their own.
fn assert_plain(config: &Value, bundle: &Path) {
    let root = bundle.join(config["root"]["path"].as_str().unwrap());
    for mount in config["mounts"].as_array().unwrap() {
        let source = Path::new(mount["source"].as_str().unwrap_or_default());
        assert!(!source.starts_with(&root), "{mount}");
    }
    let caps = |d: &&Value| d["path"].as_str().is_some_and(|p| p.starts_with("/dev/nvidia-caps/"));
    assert_eq!(config["linux"]["devices"].as_array().unwrap().iter().filter(caps).count(), 2);
    let rules = config["linux"]["resources"]["devices"].as_array().unwrap();
    let allowed = rules.iter().filter(|r| r["allow"] == true && r["access"].as_str().is_some_and(|a| a.contains('r')));
    assert!(allowed.clone().all(|r| r["major"].is_u64() && r["minor"].is_u64() || r["major"] == 136), "{rules:#?}");
    let hooks = config["hooks"].as_object().unwrap();
    let ours = hooks.values().flat_map(|h| h.as_array().unwrap()).filter(|h| h.to_string().contains("mig-hook"));
    for hook in ours {
        assert!(
            !hook["env"].as_array().unwrap().is_empty() && hook["path"].as_str().unwrap().starts_with('/'),
            "{hook}"
        );
    }
    assert!(!hooks.contains_key("createContainer") && !hooks.contains_key("startContainer"), "{hooks:#?}");
}

#[test]
fn what_the_runtime_is_told() {
    let Some(site) = Site::new(&["podman", "docker"]) else { return };
    for engine in [site.podman("runc"), site.docker(&["--mig-env"])] {
        let id = must(&mut engine.request(&["mig.profile=1g.10gb"], &["-d"], &["sh", "-c", PROBE_AND_WAIT]));
        let bundle = site.lease()["holder"]["bundle"].as_str().unwrap().to_owned();
        assert_plain(&document(&Path::new(&bundle).join("config.json")), Path::new(&bundle));
        engine.ok(&["kill", id.trim()]);
        site.clean("after kill");
        engine.ok(&["rm", "-f", id.trim()]);
    }
}
