//! The driver tree, and what its library shows where the machine's files are not.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, unsafe_code)]

mod common;

use std::ffi::{CStr, CString};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::process::Command;

use common::{Lib, NO_PERMISSION, NOT_FOUND, SUCCESS, Sim};
use serde_json::Value;

const A100: &str = "a100-sxm4-80gb";
const VERSION: &str = "580.95.05";
const DIR: &str = nvidia_ml::driver::LIBRARY_DIR;

/// What a stub that is loaded by this name says of itself.
fn loaded(path: &Path) -> String {
    let name = CString::new(path.as_os_str().as_bytes()).unwrap();
    // SAFETY: the stubs have no code that could run.
    let library = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW) };
    assert!(!library.is_null(), "{}", path.display());
    let symbol = CString::new(nvidia_ml::elf::SYMBOL).unwrap();
    // SAFETY: the library is loaded, and stays.
    let text = unsafe { libc::dlsym(library, symbol.as_ptr()) };
    assert!(!text.is_null(), "{}", path.display());
    // SAFETY: the symbol is a C string in the library.
    unsafe { CStr::from_ptr(text.cast()) }.to_str().unwrap().to_owned()
}

#[test]
fn stubs_are_loaded_by_their_sonames() {
    let sim = Sim::new(&["--gpu", A100, "--driver-files"]);
    let dir = sim.dir().join(DIR);
    assert_eq!(loaded(&dir.join("libcuda.so.1")), format!("libcuda.so.{VERSION} of nvml-sim {VERSION}"));
    assert_eq!(loaded(&dir.join("libnvidia-nvvm.so.4")), format!("libnvidia-nvvm.so.{VERSION} of nvml-sim {VERSION}"));
    assert_eq!(loaded(&dir.join("libnvidia-nvvm70.so.4")), format!("libnvidia-nvvm70.so.4 of nvml-sim {VERSION}"));
    assert!(sim.dir().join("run/nvidia-persistenced/socket").metadata().unwrap().file_type().is_socket());
    assert!(sim.dir().join(format!("lib/firmware/nvidia/{VERSION}/gsp_ga10x.bin")).is_file());
    assert!(sim.dir().join("usr/bin/nvidia-smi").is_file());
    assert_eq!(sim.client().name(sim.client().gpu(0)).unwrap(), "NVIDIA A100-SXM4-80GB", "its library as ever");
}

#[test]
fn parts_may_be_missing() {
    let sim = Sim::new(&["--gpu", A100, "--driver-files", "compute,video"]);
    let there = |name: &str| sim.dir().join(name).exists();
    assert!(there(&format!("{DIR}/libcuda.so.1")) && there(&format!("{DIR}/libnvcuvid.so.1")));
    assert!(there(&format!("{DIR}/libnvidia-cfg.so.1")), "utility is always there");
    assert!(!there(&format!("{DIR}/libGLX_nvidia.so.0")) && !there("usr/lib/i386-linux-gnu"));
    assert!(!there("usr/share/vulkan"));
    let plain = Sim::one(A100);
    assert!(!plain.dir().join("etc").exists() && plain.library().symlink_metadata().unwrap().is_file());
}

/// What a child sees that can open some nodes: the MIG devices of each GPU. By itself it has nothing to do.
#[test]
fn contained() {
    let Some(library) = std::env::var_os("SIM_CONTAINED") else { return };
    let lib = Lib::load(library.as_ref());
    assert_eq!(call!(lib, nvmlInit_v2()), SUCCESS);
    println!(); // the harness has begun a line
    let mut count = 0;
    assert_eq!(call!(lib, nvmlDeviceGetCount_v2(&mut count)), SUCCESS);
    for index in 0..count {
        let gpu = lib.gpu(index);
        println!("sees {}", lib.uuid(gpu).unwrap());
        let devices = (0..7).map_while(|index| lib.mig(gpu, index).ok());
        devices.for_each(|device| println!("sees {} {}", lib.uuid(device).unwrap(), lib.name(device).unwrap()));
        assert_eq!(lib.create_gi(gpu, 19), Err(NO_PERMISSION));
    }
    assert!(matches!(lib.by_uuid(&std::env::var("SIM_OTHER").unwrap()), Err(NOT_FOUND)));
}

#[test]
fn where_only_the_library_is_one_sees_what_one_can_open() {
    need_root!();
    let sim = Sim::new(&["--gpu", A100, "--gpu", A100, "--minors", "1,0", "--driver-files"]);
    let make = |gpu: &str, profile: &str| {
        let made = sim.cli("make", &["--gpu", gpu, "--profile", profile, "--json"]);
        serde_json::from_str::<Value>(&made).unwrap()["uuid"].as_str().unwrap().to_owned()
    };
    let other = make("1", "1g.20gb");
    let own = make("1", "2g.20gb");
    make("0", "1g.10gb");
    let machine = sim.json("show");
    let gpu = &machine["gpus"][1];
    let mine =
        gpu["gpu_instances"].as_array().unwrap().iter().find(|gi| gi["compute_instances"][0]["uuid"] == own.as_str());
    let mine = mine.unwrap();
    let (nvidia, caps) = (&machine["majors"]["nvidia"], &machine["majors"]["caps"]);
    let home = tempfile::tempdir().unwrap();
    let library = home.path().join("libnvidia-ml.so.1");
    std::fs::hard_link(sim.dir().join(format!("{DIR}/libnvidia-ml.so.{VERSION}")), &library).unwrap();
    // As a container has it: a /dev of its own with its own nodes.
    let script = format!(
        "mount -t tmpfs tmpfs /dev && mkdir /dev/nvidia-caps || exit 77\n\
         mknod /dev/nvidiactl c {nvidia} 255 && mknod /dev/nvidia0 c {nvidia} 0 || exit 77\n\
         mknod /dev/nvidia-caps/nvidia-cap{gi} c {caps} {gi}; mknod /dev/nvidia-caps/nvidia-cap{ci} c {caps} {ci}\n\
         \"$0\" --exact contained --nocapture --test-threads=1 || exit 1\n\
         \"$1\"",
        gi = mine["cap_minor"],
        ci = mine["compute_instances"][0]["cap_minor"],
    );
    let mut command = Command::new("unshare");
    command.args(["--mount", "--propagation", "private", "sh", "-c", &script]).arg(std::env::current_exe().unwrap());
    command.arg(env!("CARGO_BIN_EXE_nvml-sim-smi")).env("LD_LIBRARY_PATH", home.path());
    command.env("SIM_CONTAINED", &library).env("SIM_OTHER", &other);
    let output = command.output().unwrap();
    if matches!(output.status.code(), Some(77)) {
        eprintln!("SKIP: no mount namespace with nodes of its own here");
        return;
    }
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    let seen: Vec<&str> = said.lines().filter_map(|line| line.strip_prefix("sees ")).collect();
    let parent = gpu["uuid"].as_str().unwrap();
    assert_eq!(seen, [parent.to_owned(), format!("{own} NVIDIA A100-SXM4-80GB MIG 2g.20gb")]);
    let listed: Vec<&str> = said.lines().filter(|line| line.contains("(UUID: ")).collect();
    assert_eq!(
        listed,
        [
            format!("GPU 0: NVIDIA A100-SXM4-80GB (UUID: {parent})"),
            format!("  MIG 2g.20gb         Device  0: (UUID: {own})")
        ]
    );
}
