//! The driver's files in a config, by the shipped binaries on a simulated machine with a driver tree. Real containers are in
//! tests/containers/driver.rs.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Output;

use common::{World, binaries, config, document, run, text};
use serde_json::{Value, json};

const A100: &str = "a100-sxm4-80gb";
const VERSION: &str = "580.95.05";
const NATIVE: &str =
    if cfg!(target_arch = "aarch64") { "usr/lib/aarch64-linux-gnu" } else { "usr/lib/x86_64-linux-gnu" };
const OWN: &str = "/dev/mig-hook/lib64";

/// Two A100 and a whole driver tree.
fn machine() -> World {
    World::with(&[A100, A100], &["--driver-files"])
}

fn asked(env: &[&str]) -> Value {
    config(json!({"mig.profile": "1g.10gb", "mig.gpu": "0"}), env)
}

fn precreate(world: &World, config: &Value) -> Output {
    world.hook(&["precreate"], config.to_string().as_bytes())
}

/// What podman would hand to its runtime.
fn edited(world: &World, env: &[&str]) -> Value {
    let output = precreate(world, &asked(env));
    assert!(output.status.success(), "{}", text(&output));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Destination to source below the machine, of every mount that is ours.
fn mounts(world: &World, config: &Value) -> BTreeMap<String, String> {
    let root = world.path("m").canonicalize().unwrap();
    let mounts = config["mounts"].as_array().unwrap().iter().filter(|mount| mount["type"] == "bind");
    let pair = |mount: &Value| {
        let source = Path::new(mount["source"].as_str().unwrap()).canonicalize().unwrap();
        let source = source.strip_prefix(&root).unwrap_or_else(|_| panic!("{mount} is not of the driver's root"));
        (mount["destination"].as_str().unwrap().to_owned(), source.display().to_string())
    };
    mounts.map(pair).collect()
}

fn variables(config: &Value, name: &str) -> Vec<String> {
    let env = config["process"]["env"].as_array().unwrap().iter().map(|var| var.as_str().unwrap().to_owned());
    env.filter_map(|var| var.strip_prefix(&format!("{name}=")).map(str::to_owned)).collect()
}

fn refused(world: &World, env: &[&str], code: i32, words: &[&str]) {
    let output = precreate(world, &asked(env));
    assert_eq!(output.status.code(), Some(code), "{}", text(&output));
    for word in words {
        assert!(text(&output).contains(word), "{word}: {}", text(&output));
    }
    assert!(world.instances().is_empty() && !world.path("state/leases").exists() || world.leases().is_empty());
}

#[test]
fn cuda_and_the_tools_are_mounted_read_only_and_found_first() {
    let world = machine();
    let config = edited(&world, &["PATH=/bin", "LD_LIBRARY_PATH=/usr/local/cuda/compat"]);
    let mounts = mounts(&world, &config);
    let own = |name: &str| mounts.get(&format!("{OWN}/{name}")).map(String::as_str);
    let cuda = format!("{NATIVE}/libcuda.so.{VERSION}");
    for name in ["libcuda.so.1", "libcuda.so", &format!("libcuda.so.{VERSION}")] {
        assert_eq!(own(name), Some(cuda.as_str()), "{name}");
    }
    let nvml = format!("{NATIVE}/libnvidia-ml.so.{VERSION}");
    assert_eq!(own("libnvidia-ml.so.1"), Some(nvml.as_str()));
    assert_eq!(own("libnvidia-nvvm70.so.4"), Some(format!("{NATIVE}/libnvidia-nvvm70.so.4").as_str()));
    for (dir, name) in [(NATIVE, "libcuda.so.1"), ("usr/lib64", "libcuda.so.1"), ("usr/lib64", "libnvidia-nvvm.so.4")] {
        assert!(mounts.contains_key(&format!("/{dir}/{name}")), "{dir}/{name}: {mounts:#?}");
    }
    assert_eq!(mounts["/usr/bin/nvidia-cuda-mps-control"], "usr/bin/nvidia-cuda-mps-control");
    assert_eq!(mounts["/etc/OpenCL/vendors/nvidia.icd"], "etc/OpenCL/vendors/nvidia.icd");
    assert_eq!(
        mounts[&format!("/lib/firmware/nvidia/{VERSION}/gsp_ga10x.bin")],
        format!("usr/lib/firmware/nvidia/{VERSION}/gsp_ga10x.bin")
    );
    assert_eq!(mounts["/run/nvidia-persistenced/socket"], "run/nvidia-persistenced/socket");
    for part in ["libGLX", "nvcuvid", "lib32", "i386", "vulkan", "libnvidia-gtk"] {
        assert!(!mounts.keys().any(|at| at.contains(part)), "{part}: {mounts:#?}");
    }
    for mount in config["mounts"].as_array().unwrap().iter().filter(|mount| mount["type"] == "bind") {
        let options = mount["options"].as_array().unwrap();
        let socket = mount["destination"].as_str().unwrap().ends_with("/socket");
        assert_eq!(options.contains(&json!("ro")), !socket, "{mount}");
        assert!(["nosuid", "nodev", "rbind", "rprivate"].iter().all(|o| options.contains(&json!(o))), "{mount}");
    }
    assert_eq!(variables(&config, "LD_LIBRARY_PATH"), [format!("{OWN}:/usr/local/cuda/compat")]);
    assert_eq!(variables(&config, "NVIDIA_VISIBLE_DEVICES"), ["void"]);
    let hooks = config["hooks"].as_object().unwrap();
    assert!(hooks.keys().all(|stage| stage == "createRuntime" || stage == "poststop"), "{hooks:#?}");
}

#[test]
fn parts_are_chosen_by_the_container() {
    let world = machine();
    let given = |said: &str| {
        let config = edited(&world, &[&format!("NVIDIA_DRIVER_CAPABILITIES={said}")]);
        (mounts(&world, &config).into_keys().collect::<Vec<_>>().join("\n"), variables(&config, "LD_LIBRARY_PATH"))
    };
    let (video, _) = given("compute,video");
    assert!(video.contains("libnvcuvid.so.1") && video.contains("/vdpau/") && !video.contains("nvidia-debugdump"));
    let (all, dirs) = given("all");
    for part in ["libGLX_nvidia.so.0", "libEGL_nvidia.so.0", "vulkan/icd.d", "gbm/nvidia-drm_gbm.so", "egl-gbm.so.1"] {
        assert!(all.contains(part), "{part}");
    }
    if cfg!(target_arch = "x86_64") {
        assert!(
            all.contains("/dev/mig-hook/lib32/libcuda.so.1") && all.contains("/usr/lib/i386-linux-gnu/libcuda.so.1")
        );
        assert_eq!(dirs, [format!("{OWN}:/dev/mig-hook/lib32")]);
    }
    let one = World::with(&[A100], &["--driver-files"]);
    refused(&one, &["NVIDIA_DRIVER_CAPABILITIES=compute,cuda"], 65, &["\"cuda\"", "compute, compat32", "all"]);
}

/// MIG slices of A100 and H100 can't draw; those of this board can, when they are asked for so.
#[test]
fn a_slice_that_can_draw_gets_what_draws() {
    let world = World::with(&["rtx-pro-6000-blackwell-se"], &["--driver-files"]);
    let profiles = world.document(&["profiles"]).to_string();
    assert!(profiles.contains("1g.24gb+gfx"), "{profiles}");
    for (profile, draws) in [("1g.24gb", false), ("1g.24gb+gfx", true)] {
        let output = precreate(&world, &config(json!({"mig.profile": profile}), &[]));
        assert!(output.status.success(), "{}", text(&output));
        let config: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(mounts(&world, &config).contains_key(&format!("{OWN}/libGLX_nvidia.so.0")), draws, "{profile}");
    }
}

#[test]
fn the_shim_edits_as_precreate_does_and_sessions_get_the_directory() {
    let world = machine();
    world.recording_runtime(0);
    let (dir, init) = world.living("c1", &asked(&["LD_LIBRARY_PATH=/a"]));
    let config = document(&dir.join("config.json"));
    assert!(mounts(&world, &config).contains_key(&format!("{OWN}/libcuda.so.1")));
    let process = |env: &[&str]| {
        let file = world.write("process.json", &json!({"args": ["x"], "cwd": "/", "env": env}).to_string());
        let root = world.path("root").display().to_string();
        let output = world.shim(&["--root", &root, "exec", "--process", file.to_str().unwrap(), "c1"]);
        assert!(output.status.success(), "{}", text(&output));
        variables(&json!({"process": document(&file)}), "LD_LIBRARY_PATH")
    };
    assert_eq!(process(&["LD_LIBRARY_PATH=/a"]), [format!("{OWN}:/a")]);
    assert_eq!(process(&[]), [OWN]);
    drop(init);
}

#[test]
fn a_host_without_driver_libraries_leaves_it_to_the_images() {
    let world = World::new(&[A100]);
    let config = edited(&world, &["NVIDIA_DRIVER_CAPABILITIES=whatever"]);
    assert!(mounts(&world, &config).is_empty());
    assert!(variables(&config, "LD_LIBRARY_PATH").is_empty());
}

#[test]
fn only_the_running_version_is_given() {
    let world = machine();
    let dir = world.path("m").join(NATIVE);
    std::fs::copy(dir.join(format!("libcuda.so.{VERSION}")), dir.join("libcuda.so.575.1.2")).unwrap();
    std::fs::remove_file(dir.join("libcuda.so.1")).unwrap();
    std::os::unix::fs::symlink("libcuda.so.575.1.2", dir.join("libcuda.so.1")).unwrap();
    let config = edited(&world, &[]);
    let all = mounts(&world, &config);
    assert_eq!(all[&format!("{OWN}/libcuda.so.1")], format!("{NATIVE}/libcuda.so.{VERSION}"));
    assert!(!all.values().any(|source| source.contains("575")), "{all:#?}");
}

#[test]
fn other_gpus_are_hidden_in_proc() {
    let world = machine();
    let config = edited(&world, &[]);
    assert_eq!(
        config["linux"]["maskedPaths"],
        json!(["/proc/driver/nvidia/gpus/0000:0f:00.0", "/proc/driver/nvidia/capabilities/gpu1"])
    );
}

#[test]
fn sockets_are_those_of_the_settings() {
    let world = machine();
    for name in ["run/nvidia-fabricmanager/socket", "tmp/nvidia-mps/control"] {
        let path = world.path("m").join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::hard_link(world.path("m/run/nvidia-persistenced/socket"), path).unwrap();
    }
    let sockets = |list: &str| {
        world.driver_settings(list, "");
        let config = edited(&world, &[]);
        let all = mounts(&world, &config).into_keys();
        all.filter(|at| at.ends_with("/socket") || at == "/tmp/nvidia-mps").collect::<Vec<_>>()
    };
    assert_eq!(sockets(""), ["/run/nvidia-persistenced/socket"]);
    assert_eq!(sockets("sockets = []"), Vec::<String>::new());
    assert_eq!(
        sockets("sockets = [\"mps\", \"fabricmanager\"]"),
        ["/run/nvidia-fabricmanager/socket", "/tmp/nvidia-mps"]
    );
}

// ---- beside NVIDIA's own tools ----

/// A runtime that keeps what it was given: its command line, and the config as it found it.
fn stand_in(world: &World) -> PathBuf {
    let dir = world.path("rt");
    std::fs::create_dir_all(&dir).unwrap();
    world.script(
        "rt/nvidia-container-runtime",
        &format!(
            "printf '%s\\n' \"$@\" > {d}/argv\nwhile [ $# -gt 0 ]; do\n  case $1 in --bundle) cp \"$2/config.json\" {d}/;; esac\n  \
             shift\ndone",
            d = dir.display()
        ),
    )
}

#[test]
fn a_stacked_nvidia_runtime_is_told_the_slice() {
    let world = machine();
    world.driver_settings("files = \"none\"", "");
    let runtime = stand_in(&world);
    let config = asked(&["NVIDIA_VISIBLE_DEVICES=all", "NVIDIA_DRIVER_CAPABILITIES=any,thing"]);
    let bundle = world.bundle("b", &config);
    let output = run(world
        .shim_command(&["--mig-runtime", runtime.to_str().unwrap(), "--root", "/r", "create", "--bundle"])
        .arg(&bundle)
        .arg("c1"));
    assert!(output.status.success(), "{}", text(&output));
    let given = document(&world.path("rt/config.json"));
    let uuid = world.instances()[0]["compute_instances"][0]["uuid"].as_str().unwrap().to_owned();
    assert_eq!(variables(&given, "NVIDIA_VISIBLE_DEVICES"), [uuid.as_str()]);
    assert_eq!(variables(&given, "CUDA_VISIBLE_DEVICES"), [uuid.as_str()]);
    assert_eq!(variables(&given, "NVIDIA_DRIVER_CAPABILITIES"), ["any,thing"], "for it to judge");
    assert!(mounts(&world, &given).is_empty() && variables(&given, "LD_LIBRARY_PATH").is_empty());
    let argv = std::fs::read_to_string(world.path("rt/argv")).unwrap();
    assert_eq!(argv, format!("--root\n/r\ncreate\n--bundle\n{}\nc1\n", bundle.display()));
}

/// A spec as `nvidia-ctk cdi generate` writes it for this machine (cmd/nvidia-ctk/cdi/generate/generate_test.go).
fn nvidia_ctk(world: &World, version: &str) -> String {
    let root = world.path("m").display().to_string();
    let mut text = format!(
        "---\ncdiVersion: 0.5.0\nkind: nvidia.com/gpu\ndevices:\n    - name: \"0\"\n      containerEdits:\n        deviceNodes:\n            - path: \
         /dev/nvidia0\n    - name: \"1\"\n      containerEdits:\n        deviceNodes:\n            - path: /dev/nvidia1\n    - name: all\n      \
         containerEdits:\n        deviceNodes:\n            - path: /dev/nvidia0\n            - path: /dev/nvidia1\ncontainerEdits:\n    env:\n        - \
         NVIDIA_CTK_LIBCUDA_DIR=/{NATIVE}\n        - NVIDIA_VISIBLE_DEVICES=void\n    deviceNodes:\n        - path: /dev/nvidia-modeset\n        - path: \
         /dev/nvidia-uvm\n        - path: /dev/nvidiactl\n    hooks:\n"
    );
    let hooks = [
        &["create-symlinks", "--link", "libcuda.so.1::/lib/x86_64-linux-gnu/libcuda.so"][..],
        &["enable-cuda-compat", "--host-driver-version=580.95.05"],
        &["update-ldcache", "--folder", "/lib/x86_64-linux-gnu"],
        &["disable-device-node-modification"],
    ];
    for words in hooks {
        text += "        - hookName: createContainer\n          path: /usr/bin/nvidia-cdi-hook\n          args:\n            - nvidia-cdi-hook\n";
        text.extend(words.iter().map(|word| format!("            - {word}\n")));
        text += "          env:\n            - NVIDIA_CTK_DEBUG=false\n";
    }
    text += "    mounts:\n";
    let library = |name: &str| format!("{NATIVE}/{name}.so.{version}");
    let files = [
        (library("libcuda"), "ro"),
        (library("libnvidia-ml"), "ro"),
        (library("libnvcuvid"), "ro"),
        ("usr/bin/nvidia-debugdump".to_owned(), "ro"),
        ("run/nvidia-persistenced/socket".to_owned(), "noexec"),
    ];
    for (path, first) in files {
        text += &format!(
            "        - hostPath: {root}/{path}\n          containerPath: /{path}\n          options:\n            - {first}\n"
        );
        text.extend(["nosuid", "nodev", "rbind", "rprivate"].map(|option| format!("            - {option}\n")));
    }
    text
}

#[test]
fn a_spec_of_nvidias_says_which_files() {
    let world = machine();
    let spec = world.write("nvidia.yaml", &nvidia_ctk(&world, VERSION));
    world.driver_settings(&format!("files = \"cdi\"\ncdi_spec = \"{}\"", spec.display()), "");
    let config = edited(&world, &[]);
    let destinations: Vec<String> = mounts(&world, &config).into_keys().collect();
    let mut expected: Vec<String> = ["libcuda", "libnvidia-ml"]
        .iter()
        .flat_map(|name| {
            let own = [format!("{OWN}/{name}.so.1"), format!("{OWN}/{name}.so.{VERSION}")];
            own.into_iter().chain(["usr/lib64", NATIVE].map(|dir| format!("/{dir}/{name}.so.1")))
        })
        .chain([OWN.to_owned(), "/usr/lib64".into(), format!("/{NATIVE}")].map(|dir| format!("{dir}/libcuda.so")))
        .chain(["/usr/bin/nvidia-debugdump", "/run/nvidia-persistenced/socket"].map(str::to_owned))
        .collect();
    expected.sort();
    assert_eq!(destinations, expected);
    // Nodes are given one by one, and no hook of theirs is taken over.
    let devices: Vec<&str> =
        config["linux"]["devices"].as_array().unwrap().iter().map(|d| d["path"].as_str().unwrap()).collect();
    assert!(!devices.contains(&"/dev/nvidia1") && !devices.contains(&"/dev/nvidia-modeset"), "{devices:?}");
    assert!(config["hooks"].get("createContainer").is_none(), "{:#}", config["hooks"]);
    assert!(!config.to_string().contains("nvidia-cdi-hook"));
    assert_eq!(variables(&config, "LD_LIBRARY_PATH"), [OWN]);
    // The same as JSON, which nvidia-ctk also writes.
    let yaml: Value = serde_saphyr::from_str(&nvidia_ctk(&world, VERSION)).unwrap();
    let json = world.write("nvidia.json", &yaml.to_string());
    world.driver_settings(&format!("files = \"cdi\"\ncdi_spec = \"{}\"", json.display()), "");
    assert_eq!(mounts(&world, &edited(&world, &[])).into_keys().collect::<Vec<_>>(), expected);
}

#[test]
fn a_spec_that_is_missing_stale_or_anothers_refuses_the_container_and_names_what_makes_one() {
    let world = World::with(&[A100], &["--driver-files"]);
    let remedy = "nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml";
    let at = |path: &Path| world.driver_settings(&format!("files = \"cdi\"\ncdi_spec = \"{}\"", path.display()), "");
    at(Path::new("/nonexistent.yaml"));
    refused(&world, &[], 69, &["/nonexistent.yaml", "cannot be read", remedy]);
    at(&world.write("nvidia.yaml", &nvidia_ctk(&world, "570.1.2")));
    refused(&world, &[], 69, &["libcuda.so.570.1.2", "another driver", remedy]);
    at(&world.write("x.yaml", "cdiVersion: 0.5.0\nkind: example.com/gpu\ndevices: []\n"));
    refused(&world, &[], 69, &["no driver files of the kind nvidia.com/gpu", remedy]);
    at(&world.write("y.yaml", "- no\n- spec: [\n"));
    refused(&world, &[], 69, &["y.yaml", remedy]);
}

#[test]
fn our_own_spec_carries_the_files_too() {
    let world = machine();
    world.settings("[slices]\nforeign = \"idle\"");
    world.sim("make", &["--gpu", "0", "--profile", "1g.10gb"]);
    let spec = world.document(&["cdi"]);
    let mounts = spec["containerEdits"]["mounts"].as_array().unwrap();
    let destinations: Vec<&str> = mounts.iter().map(|mount| mount["containerPath"].as_str().unwrap()).collect();
    assert!(destinations.contains(&"/usr/lib64/libcuda.so.1") && destinations.contains(&"/usr/bin/nvidia-debugdump"));
    assert!(!destinations.iter().any(|at| at.starts_with("/dev/")), "{destinations:?}");
    for mount in mounts {
        assert!(Path::new(mount["hostPath"].as_str().unwrap()).exists(), "{mount}");
        assert!(mount["options"].as_array().unwrap().contains(&json!("rbind")), "{mount}");
    }
    assert!(!spec.to_string().contains("LD_LIBRARY_PATH"), "an engine would replace the image's");
    world.driver_settings("files = \"none\"", "[slices]\nforeign = \"idle\"");
    assert_eq!(world.document(&["cdi"]).get("containerEdits"), None);
}

#[test]
fn doctor_says_what_there_is() {
    let said = |world: &World| text(&world.migctl(&["doctor"]));
    let world = machine();
    assert!(said(&world).contains("containers get what they need of"), "{}", said(&world));
    world.driver_settings("files = \"cdi\"\ncdi_spec = \"/nonexistent.yaml\"", "");
    let stale = said(&world);
    assert!(
        stale.contains("fail  driver.files = \"cdi\"") && stale.contains("          write one with: nvidia-ctk"),
        "{stale}"
    );
    world.driver_settings("files = \"none\"", "");
    assert!(said(&world).contains("from the NVIDIA runtime"));
}

/// Its nvidia-smi, outside of any container: the machine's own files answer.
#[test]
fn the_trees_nvidia_smi_lists_slices() {
    let world = machine();
    world.sim("make", &["--gpu", "1", "--profile", "2g.20gb"]);
    let uuid = world.instances()[0]["compute_instances"][0]["uuid"].as_str().unwrap().to_owned();
    let mut command = std::process::Command::new(world.path("m/usr/bin/nvidia-smi"));
    let output = run(command.arg("-L").env("LD_LIBRARY_PATH", world.path("m").join(NATIVE)));
    assert!(text(&output).contains(&format!("MIG 2g.20gb         Device  0: (UUID: {uuid})")), "{}", text(&output));
    assert!(binaries().join("nvml-sim-smi").is_file());
}
