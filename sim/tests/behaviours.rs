//! The behaviours that a client may rely on, through the C ABI of a machine's own copy of the library.

#![allow(unsafe_code, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::ffi::{CStr, CString, c_void};
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::ptr::{null, null_mut};
use std::time::{Duration, Instant};

use common::*;
use nvml_wrapper_sys::bindings::*;
use serde_json::Value;

const A100: &str = "a100-sxm4-80gb";
const H100: &str = "h100-sxm-80gb";

/// A process of its own: this test binary again, running `child` below.
fn child(sim: &Sim, job: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "child_process", "--nocapture", "--test-threads=1"]);
    command.env("SIM_LIBRARY", sim.library()).env("SIM_JOB", job);
    command
}

fn run_child(sim: &Sim, job: &str) -> Output {
    child(sim, job).output().unwrap()
}

fn assert_ran(output: &Output) {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// What the child processes of the other tests run; by itself it has nothing to do.
#[test]
fn child_process() {
    let Some(library) = std::env::var_os("SIM_LIBRARY") else { return };
    let lib = Lib::load(library.as_ref());
    assert_eq!(call!(lib, nvmlInit_v2()), SUCCESS);
    let gpu = lib.gpu(0);
    match std::env::var("SIM_JOB").unwrap().as_str() {
        "create" => {
            let gi = lib.create_gi(gpu, 19).unwrap();
            lib.create_ci(gi, 0).unwrap();
        }
        "churn" => {
            for _ in 0..25 {
                let Ok(gi) = lib.create_gi(gpu, 19) else { continue };
                let ci = lib.create_ci(gi, 0).unwrap();
                assert_eq!(lib.destroy_ci(ci), SUCCESS);
                assert_eq!(lib.destroy_gi(gi), SUCCESS);
            }
        }
        "slow" => {
            lib.create_gi(gpu, 19).unwrap();
        }
        "nobody" => {
            assert_eq!(lib.create_gi(gpu, 19), Err(NO_PERMISSION));
            assert_eq!(lib.place_gi(gpu, 19, 0, 1), Err(NO_PERMISSION));
            assert_eq!(lib.gi_by_id(gpu, 13), Err(NO_PERMISSION));
            assert_eq!(lib.set_mode(gpu, 0), Err(NO_PERMISSION));
            let mut count = 0;
            let mut room = [null_mut(); 7];
            assert_eq!(call!(lib, nvmlDeviceGetGpuInstances(gpu, 19, room.as_mut_ptr(), &mut count)), NO_PERMISSION);
            assert_eq!(
                call!(lib, nvmlDeviceGetGpuInstancePossiblePlacements_v2(gpu, 19, null_mut(), &mut count)),
                NO_PERMISSION
            );
            assert_eq!(call!(lib, nvmlDeviceGetGpuInstanceRemainingCapacity(gpu, 19, &mut count)), NO_PERMISSION);
            assert_eq!(lib.mode(gpu), (1, 1));
            let mig = lib.mig(gpu, 0).unwrap();
            assert!(lib.uuid(mig).unwrap().starts_with("MIG-"));
            let mut info: nvmlGpuInstanceProfileInfo_t = zeroed();
            assert_eq!(call!(lib, nvmlDeviceGetGpuInstanceProfileInfo(gpu, 0, &mut info)), SUCCESS);
        }
        "chdir" => {
            std::env::set_current_dir("/").unwrap();
            lib.create_gi(gpu, 19).unwrap();
        }
        "delegate" => {
            let gi = lib.create_gi(gpu, 19).unwrap();
            let ci = lib.create_ci(gi, 0).unwrap();
            assert_eq!(lib.destroy_ci(ci), SUCCESS);
            assert_eq!(lib.destroy_gi(gi), SUCCESS);
        }
        job => panic!("no job {job}"),
    }
    assert_eq!(call!(lib, nvmlShutdown()), SUCCESS);
}

#[test]
fn the_state_is_shared_by_all_processes() {
    need_root!();
    let sim = Sim::one(A100);
    let lib = sim.client();
    assert_eq!(lib.migs(lib.gpu(0)), []);
    assert_ran(&run_child(&sim, "create"));
    assert_eq!(lib.migs(lib.gpu(0)), [(13, 0)]);
    sim.cli("make", &["--gpu", "0", "--profile", "1g.10gb"]);
    assert_eq!(lib.migs(lib.gpu(0)), [(11, 0), (13, 0)]);
}

#[test]
fn racing_processes_leave_no_trace() {
    need_root!();
    let sim = Sim::one(A100);
    let children: Vec<_> =
        (0..6).map(|_| child(&sim, "churn").stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()).collect();
    for child in children {
        assert_ran(&child.wait_with_output().unwrap());
    }
    assert_eq!(sim.gis(0), [0; 0]);
    assert_eq!(fs::read_dir(sim.proc("nvidia/capabilities/gpu0/mig")).unwrap().count(), 0);
}

#[test]
fn a_killed_client_leaves_the_state_whole() {
    need_root!();
    let sim = Sim::one(A100);
    let call = "nvmlDeviceCreateGpuInstance";
    sim.cli("fault", &["--call", call, "--kill", "before"]);
    assert_eq!(run_child(&sim, "create").status.signal(), Some(9));
    assert_eq!(sim.gis(0), [0; 0]);
    sim.cli("fault", &["--call", call, "--kill", "after"]);
    assert_eq!(run_child(&sim, "create").status.signal(), Some(9));
    assert_eq!(sim.gis(0), [13]);
    assert!(sim.client().mig(sim.client().gpu(0), 0).is_err(), "there is no compute instance yet");
    let faults = sim.json("faults");
    for fault in [0, 1] {
        assert_eq!(faults["faults"][fault]["fired"], 1);
        assert_eq!(faults["faults"][fault]["armed"], false);
    }
    assert_ran(&run_child(&sim, "create"));
    assert_eq!(sim.gis(0), [11, 13]);
}

#[test]
fn a_client_may_die_anywhere() {
    need_root!();
    let sim = Sim::one(A100);
    for round in 0..40 {
        let mut child = child(&sim, "churn").stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        std::thread::sleep(Duration::from_micros(2000 + 700 * round));
        child.kill().unwrap();
        child.wait().unwrap();
        let left = sim.gis(0);
        let mig = sim.proc("nvidia/capabilities/gpu0/mig");
        let shown: Vec<_> = fs::read_dir(&mig).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(shown.len(), left.len(), "round {round}: {shown:?}");
        for gi in left {
            assert!(mig.join(format!("gi{gi}/access")).exists());
            sim.cli("destroy", &["--gpu", "0", "--gi", &gi.to_string()]);
        }
    }
    assert_ran(&run_child(&sim, "churn"));
}

#[test]
fn only_root_cuts_but_all_may_look() {
    need_root!();
    let sim = Sim::one(A100);
    sim.cli("make", &["--gpu", "0", "--profile", "1g.10gb"]);
    assert_ran(&child(&sim, "nobody").uid(65534).gid(65534).output().unwrap());
    sim.cli("count", &["on"]);
    assert_ran(&child(&sim, "nobody").uid(65534).gid(65534).output().unwrap());
    assert_eq!(sim.json("counts")["nvmlDeviceSetMigMode"], 1, "calls of unprivileged clients count too");
}

#[test]
fn who_can_open_the_capability_for_configuring_cuts() {
    need_root!();
    let sim = Sim::one(A100);
    sim.cli("make", &["--gpu", "0", "--profile", "1g.10gb"]);
    let caps = sim.dir().join("dev/nvidia-caps");
    let major = sim.json("show")["majors"]["caps"].to_string();
    std::fs::create_dir(&caps).unwrap();
    let node = caps.join("nvidia-cap1");
    let mknod = |minor: &str| {
        let _ = std::fs::remove_file(&node);
        let mut command = Command::new("mknod");
        let made = command.args(["-m", "400"]).arg(&node).args(["c", &major, minor]).status().unwrap().success();
        made && std::os::unix::fs::chown(&node, Some(65534), None).is_ok()
    };
    if !mknod("2") {
        eprintln!("SKIP: no device nodes can be made here");
        return;
    }
    for dir in ["usr/lib/nvml-sim", "proc/driver/nvidia/capabilities/gpu0/mig"] {
        std::fs::set_permissions(sim.dir().join(dir), std::fs::Permissions::from_mode(0o777)).unwrap();
    }
    let as_nobody = |job| child(&sim, job).uid(65534).gid(65534).output().unwrap();
    assert_ran(&as_nobody("nobody")); // the capability for watching is not it
    assert!(mknod("1"));
    assert_ran(&as_nobody("delegate"));
    std::fs::set_permissions(&node, std::fs::Permissions::from_mode(0o000)).unwrap();
    assert_ran(&as_nobody("nobody"));
}

#[test]
fn uid_0_of_somebody_elses_user_namespace_is_not_root() {
    need_root!();
    let sim = Sim::one(A100);
    sim.cli("make", &["--gpu", "0", "--profile", "1g.10gb"]);
    let inside = child(&sim, "nobody");
    let mut command = Command::new("setpriv");
    command.args(["--reuid", "65534", "--regid", "65534", "--clear-groups", "unshare", "--user", "--map-root-user"]);
    if !command.arg("true").output().is_ok_and(|output| output.status.success()) {
        eprintln!("SKIP: nobody may make a user namespace here");
        return;
    }
    let mut command = Command::new("setpriv");
    command.args(["--reuid", "65534", "--regid", "65534", "--clear-groups", "unshare", "--user", "--map-root-user"]);
    command.arg(inside.get_program()).args(inside.get_args());
    command.envs(inside.get_envs().filter_map(|(key, value)| Some((key, value?))));
    assert_ran(&command.output().unwrap());
}

#[test]
fn the_library_needs_init_and_counts_its_users() {
    let sim = Sim::one(A100);
    let lib = sim.load();
    let mut count = 0;
    assert_eq!(call!(lib, nvmlDeviceGetCount_v2(&mut count)), UNINITIALIZED);
    assert_eq!(call!(lib, nvmlShutdown()), UNINITIALIZED);
    assert_eq!(call!(lib, nvmlInit_v2()), SUCCESS);
    assert_eq!(call!(lib, nvmlInitWithFlags(1)), SUCCESS);
    assert_eq!(call!(lib, nvmlShutdown()), SUCCESS);
    assert_eq!(call!(lib, nvmlDeviceGetCount_v2(&mut count)), SUCCESS);
    assert_eq!(count, 1);
    assert_eq!(call!(lib, nvmlShutdown()), SUCCESS);
    assert_eq!(call!(lib, nvmlDeviceGetCount_v2(&mut count)), UNINITIALIZED);
    assert_eq!(call!(lib, nvmlShutdown()), UNINITIALIZED);
    let text = call!(lib, nvmlErrorString(19));
    // SAFETY: the text is a constant of the library.
    assert_eq!(unsafe { CStr::from_ptr(text) }, c"In use by another client");
}

#[test]
fn a_library_without_a_machine_has_no_driver() {
    let sim = Sim::one(A100);
    let bare = sim.dir().join("bare.so");
    fs::copy(sim.library(), &bare).unwrap();
    let lib = Lib::load(&bare);
    assert_eq!(call!(lib, nvmlInit_v2()), 9);
}

#[test]
fn bad_arguments_are_refused_without_effect() {
    need_root!();
    let sim = Sim::one(A100);
    let lib = sim.client();
    let gpu = lib.gpu(0);
    let mut device = null_mut();
    assert_eq!(call!(lib, nvmlDeviceGetHandleByIndex_v2(1, &mut device)), INVALID_ARGUMENT);
    assert_eq!(call!(lib, nvmlDeviceGetHandleByIndex_v2(0, null_mut())), INVALID_ARGUMENT);
    assert_eq!(call!(lib, nvmlDeviceGetCount_v2(null_mut())), INVALID_ARGUMENT);
    assert_eq!(call!(lib, nvmlDeviceCreateGpuInstance(gpu, 19, null_mut())), INVALID_ARGUMENT);
    let mut gi = null_mut();
    assert_eq!(call!(lib, nvmlDeviceCreateGpuInstanceWithPlacement(gpu, 19, null(), &mut gi)), INVALID_ARGUMENT);
    assert_eq!(sim.gis(0), [0; 0]);
    assert_eq!(lib.uuid(null_mut()), Err(INVALID_ARGUMENT));
    assert_eq!(lib.gi_info(gpu.cast()).map(|info| info.id), Err(INVALID_ARGUMENT));
    let mut short = [0; 8];
    assert_eq!(call!(lib, nvmlDeviceGetUUID(gpu, short.as_mut_ptr(), 8)), INSUFFICIENT_SIZE);
    let mut v1: nvmlGpuInstanceProfileInfo_t = zeroed();
    assert_eq!(call!(lib, nvmlDeviceGetGpuInstanceProfileInfo(gpu, 99, &mut v1)), INVALID_ARGUMENT);
    assert_eq!(call!(lib, nvmlDeviceGetGpuInstanceProfileInfo(gpu, 6, &mut v1)), NOT_SUPPORTED);
    let mut v2: nvmlGpuInstanceProfileInfo_v2_t = zeroed();
    for version in [0, 0x0100_0098, 0x0200_0090, 0x0400_0098] {
        v2.version = version;
        assert_eq!(call!(lib, nvmlDeviceGetGpuInstanceProfileInfoV(gpu, 0, &mut v2)), INVALID_ARGUMENT);
    }
    assert_eq!(lib.by_uuid("GPU-00000000-0000-0000-0000-000000000000"), Err(NOT_FOUND));
    assert_eq!(lib.by_uuid("rubbish"), Err(INVALID_ARGUMENT));
    assert_eq!(lib.create_gi(gpu, 3).err(), Some(INVALID_ARGUMENT));
    let mut number = 0;
    assert_eq!(call!(lib, nvmlDeviceGetGpuInstanceId(gpu, &mut number)), NOT_SUPPORTED);
    assert_eq!(lib.gi_by_id(gpu, 13), Err(NOT_FOUND));
}

#[test]
fn stale_handles_are_refused_even_when_the_id_is_back() {
    need_root!();
    let sim = Sim::one(A100);
    let lib = sim.client();
    let gi = lib.create_gi(lib.gpu(0), 19).unwrap();
    let ci = lib.create_ci(gi, 0).unwrap();
    let mig = lib.ci_info(ci).unwrap().device;
    assert_eq!((lib.destroy_ci(ci), lib.destroy_gi(gi)), (SUCCESS, SUCCESS));
    let again = lib.create_gi(lib.gpu(0), 19).unwrap();
    assert_eq!(lib.gi_info(again).unwrap().id, 13);
    assert_eq!(lib.gi_info(gi).map(|info| info.id), Err(INVALID_ARGUMENT));
    assert_eq!(lib.uuid(mig), Err(INVALID_ARGUMENT));
    assert_eq!(lib.destroy_gi(gi), INVALID_ARGUMENT);
    assert_eq!(lib.destroy_ci(ci), INVALID_ARGUMENT);
    assert_eq!(lib.create_ci(gi, 0), Err(INVALID_ARGUMENT));
}

#[test]
fn every_layout_of_the_profile_structs_is_filled() {
    need_root!();
    let sim = Sim::one(H100);
    let lib = sim.client();
    let gpu = lib.gpu(0);
    let mut v1: nvmlGpuInstanceProfileInfo_t = zeroed();
    assert_eq!(call!(lib, nvmlDeviceGetGpuInstanceProfileInfo(gpu, 9, &mut v1)), SUCCESS);
    assert_eq!((v1.id, v1.instanceCount, v1.multiprocessorCount, v1.memorySizeMB), (15, 4, 26, 20096));
    let mut v2: nvmlGpuInstanceProfileInfo_v2_t = zeroed();
    v2.version = 0x0200_0098;
    assert_eq!(call!(lib, nvmlDeviceGetGpuInstanceProfileInfoV(gpu, 9, &mut v2)), SUCCESS);
    assert_eq!((v2.id, v2.sliceCount, v2.memorySizeMB, string(&v2.name)), (15, 1, 20096, "MIG 1g.20gb".into()));
    let mut v3: nvmlGpuInstanceProfileInfo_v3_t = zeroed();
    v3.version = 0x0300_0098;
    assert_eq!(call!(lib, nvmlDeviceGetGpuInstanceProfileInfoV(gpu, 9, (&raw mut v3).cast())), SUCCESS);
    assert_eq!((v3.id, v3.sliceCount, v3.memorySizeMB, string(&v3.name)), (15, 1, 20096, "MIG 1g.20gb".into()));
    v2.version = 0x0200_0098;
    assert_eq!(call!(lib, nvmlDeviceGetGpuInstanceProfileInfoByIdV(gpu, 9, &mut v2)), SUCCESS);
    assert_eq!(string(&v2.name), "MIG 3g.40gb");

    let gi = lib.create_gi(gpu, 15).unwrap();
    let mut v1: nvmlComputeInstanceProfileInfo_t = zeroed();
    assert_eq!(call!(lib, nvmlGpuInstanceGetComputeInstanceProfileInfo(gi, 0, 0, &mut v1)), NOT_SUPPORTED);
    assert_eq!(call!(lib, nvmlGpuInstanceGetComputeInstanceProfileInfo(gi, 7, 1, &mut v1)), INVALID_ARGUMENT);
    assert_eq!(call!(lib, nvmlGpuInstanceGetComputeInstanceProfileInfo(gi, 9, 0, &mut v1)), INVALID_ARGUMENT);
    assert_eq!(call!(lib, nvmlGpuInstanceGetComputeInstanceProfileInfo(gi, 7, 0, &mut v1)), SUCCESS);
    assert_eq!((v1.id, v1.sliceCount, v1.multiprocessorCount, v1.sharedJpegCount), (7, 1, 26, 1));
    let mut v2: nvmlComputeInstanceProfileInfo_v2_t = zeroed();
    v2.version = 0x0200_0088;
    assert_eq!(call!(lib, nvmlGpuInstanceGetComputeInstanceProfileInfoV(gi, 7, 0, &mut v2)), SUCCESS);
    assert_eq!((v2.id, string(&v2.name)), (7, "MIG 1g.20gb".into()));
    let mut v3: nvmlComputeInstanceProfileInfo_v3_t = zeroed();
    v3.version = 0x0300_008c;
    let at = (&raw mut v3).cast();
    assert_eq!(call!(lib, nvmlGpuInstanceGetComputeInstanceProfileInfoV(gi, 7, 0, at)), SUCCESS);
    assert_eq!((v3.id, string(&v3.name)), (7, "MIG 1g.20gb".into()));
}

#[test]
fn a_handle_is_found_by_a_versioned_uuid() {
    let sim = Sim::one(A100);
    let lib = sim.client();
    let uuid = lib.uuid(lib.gpu(0)).unwrap();
    let find = |kind: u32, value: &[u8]| {
        let mut bytes = [0_u8; 52];
        bytes[..4].copy_from_slice(&0x0100_0034_u32.to_ne_bytes());
        bytes[4..8].copy_from_slice(&kind.to_ne_bytes());
        bytes[8..8 + value.len()].copy_from_slice(value);
        let mut device = null_mut();
        let code = call!(lib, nvmlDeviceGetHandleByUUIDV(bytes.as_ptr().cast(), &mut device));
        (code, device)
    };
    assert_eq!(find(1, uuid.as_bytes()), (SUCCESS, lib.gpu(0)));
    let hex = uuid.replace("GPU-", "").replace('-', "");
    let binary: Vec<u8> = (0..32).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap()).collect();
    assert_eq!(find(2, &binary), (SUCCESS, lib.gpu(0)));
    assert_eq!(find(3, &binary).0, INVALID_ARGUMENT);
}

#[test]
fn thirteen_published_series_of_instances_come_out_identical() {
    need_root!();
    let captures: Value = serde_json::from_str(include_str!("facts/captures.json")).unwrap();
    let captures = captures.as_array().unwrap();
    assert_eq!(captures.len(), 13);
    for capture in captures {
        let words = ["board", "id_map"].map(|key| capture[key].as_str().unwrap());
        let sim = Sim::new(&["--gpu", words[0], "--gi-map", words[1]]);
        let lib = sim.client();
        let series = capture["profiles"].as_array().unwrap().iter().zip(capture["ids"].as_array().unwrap());
        for (profile, id) in series {
            let made = lib.create_gi(lib.gpu(0), profile.as_u64().unwrap() as u32);
            let made = made.map(|gi| u64::from(lib.gi_info(gi).unwrap().id));
            assert_eq!(made, id.as_u64().ok_or(INSUFFICIENT_RESOURCES), "{capture}");
        }
    }
}

/// As go-nvlib makes it of sizes: eighths of the board's memory, rounded up, of its size in GiB.
fn rounded_name(slices: u32, memory: u64, total: u64, suffix: &str) -> String {
    let eighths = (memory * 8).div_ceil(total);
    let gib = (eighths * total.div_ceil(1024) * 2 + 8) / 16;
    format!("{slices}g.{gib}gb{suffix}")
}

#[test]
fn seventy_three_published_profile_names_come_out_identical() {
    let facts: Vec<Vec<&str>> = include_str!("facts/names.txt")
        .lines()
        .filter(|line| !line.starts_with('#'))
        .map(|line| line.split(' ').collect())
        .collect();
    assert_eq!(facts.len(), 73);
    for board in facts.chunk_by(|one, other| one[0] == other[0]) {
        let sim = Sim::one(board[0][0]);
        let lib = sim.client();
        for fact in board {
            let [id, memory, total] = [1, 2, 3].map(|at| fact[at].parse::<u64>().unwrap());
            let mut info: nvmlGpuInstanceProfileInfo_v2_t = zeroed();
            info.version = 0x0200_0098;
            assert_eq!(call!(lib, nvmlDeviceGetGpuInstanceProfileInfoByIdV(lib.gpu(0), id as u32, &mut info)), SUCCESS);
            assert_eq!((string(&info.name), info.memorySizeMB), (format!("MIG {}", fact[4]), memory), "{fact:?}");
            assert_eq!(memory_mib(&lib, 0), total, "{fact:?}");
            let suffix = fact[4].find(['+', '-']).map_or("", |at| &fact[4][at..]);
            assert_eq!(rounded_name(info.sliceCount, memory, total, suffix), fact[4]);
        }
    }
}

fn memory_mib(lib: &Lib, gpu: u32) -> u64 {
    let mut memory: nvmlMemory_t = zeroed();
    assert_eq!(call!(lib, nvmlDeviceGetMemoryInfo(lib.gpu(gpu), &mut memory)), SUCCESS);
    memory.total >> 20
}

#[test]
fn capacity_and_placements_are_told() {
    need_root!();
    let sim = Sim::one(A100);
    let lib = sim.client();
    let gpu = lib.gpu(0);
    lib.place_gi(gpu, 5, 0, 4).unwrap();
    let left = [19, 20, 15, 14, 9, 5, 0].map(|profile| {
        let mut count = 99;
        assert_eq!(call!(lib, nvmlDeviceGetGpuInstanceRemainingCapacity(gpu, profile, &mut count)), SUCCESS);
        count
    });
    assert_eq!(left, [3, 1, 2, 1, 1, 0, 0]);
    let (mut count, mut room) = (0, [nvmlGpuInstancePlacement_t { start: 9, size: 9 }; 7]);
    let placements = room.as_mut_ptr();
    assert_eq!(call!(lib, nvmlDeviceGetGpuInstancePossiblePlacements_v2(gpu, 14, placements, &mut count)), SUCCESS);
    let spans: Vec<_> = room[..count as usize].iter().map(|place| (place.start, place.size)).collect();
    assert_eq!(spans, [(0, 2), (2, 2), (4, 2)]);
}

#[test]
fn mig_devices_come_with_compute_instances_and_their_index_shifts() {
    need_root!();
    let sim = Sim::one(A100);
    let lib = sim.client();
    let gpu = lib.gpu(0);
    let small = lib.create_gi(gpu, 19).unwrap();
    assert_eq!(lib.mig(gpu, 0), Err(NOT_FOUND));
    assert_eq!(lib.mig(gpu, 7), Err(INVALID_ARGUMENT));
    lib.create_ci(small, 0).unwrap();
    let large = lib.place_gi(gpu, 9, 0, 4).unwrap();
    let (first, second) = (lib.create_ci(large, 0).unwrap(), lib.create_ci(large, 0).unwrap());
    assert_eq!(lib.migs(gpu), [(1, 0), (1, 1), (13, 0)]);
    let mut index = 9;
    assert_eq!(call!(lib, nvmlDeviceGetIndex(lib.ci_info(second).unwrap().device, &mut index)), SUCCESS);
    assert_eq!(index, 1);
    assert_eq!(lib.name(lib.ci_info(second).unwrap().device).unwrap(), "NVIDIA A100-SXM4-80GB MIG 1c.3g.40gb");
    assert_eq!(lib.destroy_ci(first), SUCCESS);
    assert_eq!(lib.migs(gpu), [(1, 1), (13, 0)]);
    lib.create_ci(large, 0).unwrap();
    assert_eq!(lib.migs(gpu), [(1, 0), (1, 1), (13, 0)], "the lowest free id is taken");
    let (mut count, mut room) = (0, [null_mut(); 3]);
    let found = room.as_mut_ptr();
    assert_eq!(call!(lib, nvmlGpuInstanceGetComputeInstances(large, 0, found, &mut count)), SUCCESS);
    assert_eq!(count, 2);
    assert_eq!(call!(lib, nvmlGpuInstanceGetComputeInstanceRemainingCapacity(large, 0, &mut count)), SUCCESS);
    assert_eq!(count, 1);
    assert_eq!(lib.create_ci(large, 1), Err(INSUFFICIENT_RESOURCES));
}

#[test]
fn a_uuid_depends_on_the_position_alone() {
    need_root!();
    let sim = Sim::one(A100);
    let lib = sim.client();
    let cut = || {
        let gi = lib.create_gi(lib.gpu(0), 19).unwrap();
        let ci = lib.create_ci(gi, 0).unwrap();
        let uuid = lib.uuid(lib.ci_info(ci).unwrap().device).unwrap();
        (gi, ci, uuid)
    };
    let (gi, ci, first) = cut();
    assert_eq!((first.len(), &first[..4], &first[18..19]), (40, "MIG-", "5"));
    assert_eq!(lib.uuid(lib.by_uuid(&first).unwrap()), Ok(first.clone()));
    let old = format!("MIG-{}/13/0", lib.uuid(lib.gpu(0)).unwrap());
    assert_eq!(lib.uuid(lib.by_uuid(&old).unwrap()), Ok(first.clone()));
    let (_, _, other) = cut();
    assert_ne!(first, other);
    lib.destroy_ci(ci);
    lib.destroy_gi(gi);
    assert_eq!(lib.by_uuid(&first), Err(NOT_FOUND));
    assert_eq!(cut().2, first);
    let old = Sim::new(&["--gpu", A100, "--uuid-format", "old"]);
    old.cli("make", &["--gpu", "0", "--profile", "19"]);
    let lib = old.client();
    let uuid = lib.uuid(lib.mig(lib.gpu(0), 0).unwrap()).unwrap();
    assert!(uuid.starts_with("MIG-GPU-") && uuid.ends_with("/13/0"), "{uuid}");
}

#[test]
fn ampere_switches_at_a_reset_and_hopper_at_once() {
    need_root!();
    let sim = Sim::new(&["--gpu", A100, "--gpu", H100, "--mig", "off"]);
    let lib = sim.client();
    let (a100, h100) = (lib.gpu(0), lib.gpu(1));
    let mut most = 9;
    assert_eq!(call!(lib, nvmlDeviceGetMaxMigDeviceCount(a100, &mut most)), SUCCESS);
    assert_eq!(most, 0);
    assert_eq!(lib.create_gi(a100, 19), Err(NOT_SUPPORTED));
    assert_eq!(lib.set_mode(a100, 2), Err(INVALID_ARGUMENT));
    assert_eq!(lib.set_mode(a100, 1), Ok(RESET_REQUIRED));
    assert_eq!(lib.mode(a100), (0, 1));
    assert_eq!(lib.create_gi(a100, 19), Err(NOT_SUPPORTED));
    sim.cli("reset", &["--gpu", "0"]);
    assert_eq!(lib.mode(a100), (1, 1));
    lib.create_gi(a100, 19).unwrap();
    assert_eq!(lib.set_mode(a100, 0), Ok(IN_USE));
    assert_eq!(lib.mode(a100), (1, 0));
    assert_eq!(lib.set_mode(a100, 1), Ok(SUCCESS));

    assert_eq!(lib.set_mode(h100, 1), Ok(SUCCESS));
    let gi = lib.create_gi(h100, 19).unwrap();
    assert_eq!(lib.set_mode(h100, 0), Ok(IN_USE));
    assert_eq!(lib.mode(h100), (1, 1));
    assert_eq!(lib.destroy_gi(gi), SUCCESS);
    sim.cli("reboot", &[]);
    assert_eq!((lib.mode(a100), lib.mode(h100)), ((1, 1), (0, 0)));
    assert_eq!(sim.gis(0), [0; 0]);
    let auto = Sim::new(&["--gpu", A100, "--mig", "off", "--ampere-reset", "auto"]);
    let lib = auto.client();
    auto.cli("hold", &["--gpu", "0"]);
    assert_eq!(lib.set_mode(lib.gpu(0), 1), Ok(IN_USE));
    auto.cli("unhold", &["--gpu", "0"]);
    assert_eq!(lib.set_mode(lib.gpu(0), 1), Ok(SUCCESS));
    assert_eq!(lib.mode(lib.gpu(0)), (1, 1));
}

#[test]
fn a_held_instance_is_in_use_whether_or_not_a_process_is_listed() {
    need_root!();
    let sim = Sim::one(A100);
    let lib = sim.client();
    let gpu = lib.gpu(0);
    let gi = lib.create_gi(gpu, 19).unwrap();
    let ci = lib.create_ci(gi, 0).unwrap();
    let mig = lib.ci_info(ci).unwrap().device;
    assert_eq!(lib.destroy_gi(gi), IN_USE);
    sim.cli("hold", &["--gpu", "0", "--gi", "13"]);
    assert_eq!(lib.processes(gpu), Ok(vec![]));
    assert_eq!(lib.destroy_ci(ci), IN_USE);
    sim.cli("unhold", &["--gpu", "0", "--gi", "13"]);
    sim.cli("hold", &["--gpu", "0", "--gi", "13", "--pid", "4242"]);
    sim.cli("hold", &["--gpu", "0", "--pid", "17"]);
    assert_eq!(lib.processes(gpu), Ok(vec![(4242, 13, 0), (17, u32::MAX, u32::MAX)]));
    assert_eq!(lib.processes(mig), Ok(vec![(4242, 13, 0)]));
    let mut count = 0;
    let nowhere = null_mut();
    assert_eq!(call!(lib, nvmlDeviceGetComputeRunningProcesses_v3(gpu, &mut count, nowhere)), INSUFFICIENT_SIZE);
    assert_eq!(count, 2);
    assert_eq!(lib.destroy_ci(ci), IN_USE);
    sim.cli("unhold", &["--gpu", "0", "--gi", "13"]);
    assert_eq!((lib.destroy_ci(ci), lib.destroy_gi(gi)), (SUCCESS, SUCCESS));
    assert_eq!(lib.create_gi(gpu, 19), Err(IN_USE), "the first instance needs an idle GPU");
    sim.cli("unhold", &["--gpu", "0"]);
    lib.create_gi(gpu, 19).unwrap();
    assert!(!sim.try_cli("hold", &["--gpu", "0", "--gi", "7"]).status.success());
}

/// Used and total memory in MiB, told alike by both calls.
fn memory(lib: &Lib, device: nvmlDevice_t) -> (u64, u64) {
    let mut old: nvmlMemory_t = zeroed();
    assert_eq!(call!(lib, nvmlDeviceGetMemoryInfo(device, &mut old)), SUCCESS);
    let mut new = nvmlMemory_v2_t { version: 0x0200_0028, ..zeroed() };
    assert_eq!(call!(lib, nvmlDeviceGetMemoryInfo_v2(device, &mut new)), SUCCESS);
    assert_eq!((old.used, old.total, old.free), (new.used, new.total, new.free));
    assert_eq!(old.used + old.free, old.total);
    (old.used >> 20, old.total >> 20)
}

/// An error counter: type, counter, location as numbered in nvml.h.
fn errors(lib: &Lib, device: nvmlDevice_t, kind: u32, counter: u32, place: u32) -> Answer<u64> {
    let mut count = 99;
    match call!(lib, nvmlDeviceGetMemoryErrorCounter(device, kind, counter, place, &mut count)) {
        SUCCESS => Ok(count),
        code => Err(code),
    }
}

const UNCORRECTED: u32 = 1;
const VOLATILE: u32 = 0;
const DRAM: u32 = 2;
const SRAM: u32 = 7;

#[test]
fn memory_is_shared_within_an_instance_and_summed_on_its_gpu() {
    need_root!();
    let sim = Sim::one(A100);
    let lib = sim.client();
    let gpu = lib.gpu(0);
    let gi = lib.create_gi(gpu, 9).unwrap();
    lib.create_ci(gi, 0).unwrap();
    lib.create_ci(gi, 0).unwrap();
    let (first, second) = (lib.mig(gpu, 0).unwrap(), lib.mig(gpu, 1).unwrap());
    let (id, total) = (lib.gi_info(gi).unwrap().id.to_string(), memory(&lib, first).1);
    assert_eq!((memory(&lib, first), memory(&lib, gpu).0), ((0, 40192), 0));
    sim.cli("load", &["--gpu", "0", "--gi", &id, "--memory", "1000"]);
    sim.cli("load", &["--gpu", "0", "--gi", &id, "--ci", "1", "--memory", "500"]);
    sim.cli("hold", &["--gpu", "0", "--gi", &id, "--pid", "7", "--memory", "250"]);
    sim.cli("hold", &["--gpu", "0", "--gi", &id]);
    assert_eq!((memory(&lib, first), memory(&lib, second)), ((1750, total), (1750, total)));
    sim.cli("load", &["--gpu", "0", "--memory", "100"]);
    assert_eq!(memory(&lib, gpu), (1850, 81920));
    sim.cli("load", &["--gpu", "0", "--gi", &id, "--memory", "99999"]);
    assert_eq!(memory(&lib, first), (total, total), "no more than there is");
    sim.cli("load", &["--gpu", "0", "--gi", &id, "--off"]);
    assert_eq!(memory(&lib, first).0, 750);
    sim.cli("unhold", &["--gpu", "0", "--gi", &id]);
    sim.cli("destroy", &["--gpu", "0", "--gi", &id]);
    assert_eq!(memory(&lib, gpu).0, 100, "an instance takes its figures with it");
    lib.create_ci(lib.create_gi(gpu, 9).unwrap(), 2).unwrap();
    assert_eq!(memory(&lib, lib.mig(gpu, 0).unwrap()).0, 0);
    assert!(!sim.try_cli("load", &["--gpu", "0", "--gi", &id, "--ci", "5", "--sm", "1"]).status.success());
    assert!(!sim.try_cli("load", &["--gpu", "0"]).status.success(), "no figure");
}

#[test]
fn errors_are_counted_for_a_mig_device_outside_dram_and_for_a_gpu_with_mig_off() {
    need_root!();
    let sim = Sim::one(H100);
    let lib = sim.client();
    let gpu = lib.gpu(0);
    let gi = lib.create_gi(gpu, 19).unwrap();
    let ci = lib.create_ci(gi, 0).unwrap();
    let mig = lib.ci_info(ci).unwrap().device;
    let id = lib.gi_info(gi).unwrap().id.to_string();
    sim.cli("load", &["--gpu", "0", "--gi", &id, "--ecc", "3"]);
    assert_eq!(errors(&lib, mig, UNCORRECTED, VOLATILE, SRAM), Ok(3));
    for (kind, counter, place) in [(0, VOLATILE, SRAM), (UNCORRECTED, 1, SRAM), (UNCORRECTED, VOLATILE, DRAM)] {
        assert_eq!(errors(&lib, mig, kind, counter, place), Err(NOT_SUPPORTED));
    }
    assert_eq!(errors(&lib, gpu, UNCORRECTED, VOLATILE, SRAM), Err(NOT_SUPPORTED), "MIG is on");
    assert_eq!((lib.destroy_ci(ci), lib.destroy_gi(gi)), (SUCCESS, SUCCESS));
    assert_eq!(lib.set_mode(gpu, 0), Ok(0));
    sim.cli("load", &["--gpu", "0", "--ecc", "5"]);
    assert_eq!(errors(&lib, gpu, UNCORRECTED, VOLATILE, SRAM), Ok(5));
    assert_eq!(errors(&lib, gpu, UNCORRECTED, VOLATILE, DRAM), Ok(0));
    let mut mode = 9;
    assert_eq!((call!(lib, nvmlDeviceGetPersistenceMode(gpu, &mut mode)), mode), (SUCCESS, 1));
    sim.cli("persistence", &["--gpu", "0", "off"]);
    assert_eq!((call!(lib, nvmlDeviceGetPersistenceMode(gpu, &mut mode)), mode), (SUCCESS, 0));
}

#[test]
fn two_samples_of_an_instance_tell_its_utilisation_from_hopper_on() {
    need_root!();
    let sim = Sim::new(&["--gpu", H100, "--gpu", A100]);
    let lib = sim.client();
    let support = |gpu| {
        let mut support = nvmlGpmSupport_t { version: 1, isSupportedDevice: 9 };
        assert_eq!(call!(lib, nvmlGpmQueryDeviceSupport(gpu, &mut support)), SUCCESS);
        support.isSupportedDevice
    };
    let (hopper, ampere) = (lib.gpu(0), lib.gpu(1));
    assert_eq!((support(hopper), support(ampere)), (1, 0));
    let sample = || {
        let mut sample = null_mut();
        assert_eq!(call!(lib, nvmlGpmSampleAlloc(&mut sample)), SUCCESS);
        sample
    };
    let (before, after) = (sample(), sample());
    let made = [hopper, ampere].map(|gpu| lib.gi_info(lib.create_gi(gpu, 19).unwrap()).unwrap().id);
    assert_eq!(call!(lib, nvmlGpmMigSampleGet(ampere, made[1], before)), NOT_SUPPORTED);
    assert_eq!(call!(lib, nvmlGpmMigSampleGet(hopper, 0, before)), INVALID_ARGUMENT, "no such instance");
    let mut request: nvmlGpmMetricsGet_t = zeroed();
    (request.version, request.numMetrics, request.sample1, request.sample2) = (1, 3, before, after);
    for (metric, id) in request.metrics.iter_mut().zip([2, 10, 3]) {
        metric.metricId = id;
    }
    assert_eq!(call!(lib, nvmlGpmMetricsGet(&mut request)), INVALID_ARGUMENT, "nothing was sampled");
    let id = made[0].to_string();
    assert_eq!(call!(lib, nvmlGpmMigSampleGet(hopper, made[0], before)), SUCCESS);
    sim.cli("load", &["--gpu", "0", "--gi", &id, "--sm", "80", "--dram", "30"]);
    assert_eq!(call!(lib, nvmlGpmMigSampleGet(hopper, made[0], after)), SUCCESS);
    assert_eq!(call!(lib, nvmlGpmMetricsGet(&mut request)), SUCCESS);
    let told = [0, 1, 2].map(|n: usize| (request.metrics[n].nvmlReturn, request.metrics[n].value));
    assert_eq!(told, [(SUCCESS, 40.0), (SUCCESS, 15.0), (NOT_SUPPORTED, 0.0)]);
    assert_eq!(call!(lib, nvmlGpmSampleFree(before)), SUCCESS);
    assert_eq!(call!(lib, nvmlGpmSampleFree(before)), INVALID_ARGUMENT, "it is gone");
    assert_eq!(call!(lib, nvmlGpmMetricsGet(&mut request)), INVALID_ARGUMENT);
}

#[test]
fn a_state_without_figures_is_read() {
    let sim = Sim::one(A100);
    let state = sim.dir().join("usr/lib/nvml-sim/state.json");
    fs::write(&state, r#"{"births":0,"gpus":[{"current":true,"pending":true,"gis":[]}],"holds":[]}"#).unwrap();
    let lib = sim.client();
    assert_eq!(memory(&lib, lib.gpu(0)), (0, 81920));
    assert_eq!(sim.json("show")["gpus"][0]["persistence"], true);
}

#[test]
fn a_fault_fails_the_calls_it_was_told_to() {
    need_root!();
    let sim = Sim::one(A100);
    let lib = sim.client();
    let gi = lib.create_gi(lib.gpu(0), 19).unwrap();
    let ci = lib.create_ci(gi, 0).unwrap();
    sim.cli("fault", &["--call", "nvmlGpuInstanceDestroy", "--nth", "1", "--times", "3", "--fail", "IN_USE"]);
    assert_eq!(lib.destroy_ci(ci), SUCCESS);
    let seen: Vec<u32> = (0..4).map(|_| lib.destroy_gi(gi)).collect();
    assert_eq!(seen, [IN_USE, IN_USE, IN_USE, SUCCESS]);
    let fault = &sim.json("faults")["faults"][0];
    assert_eq!((&fault["counted"], &fault["fired"], &fault["armed"]), (&3.into(), &3.into(), &false.into()));
    sim.cli("clear-faults", &[]);
    sim.cli("fault", &["--call", "*", "--nth", "2", "--times", "forever", "--fail", "15"]);
    let mut count = 0;
    let seen: Vec<u32> = (0..3).map(|_| call!(lib, nvmlDeviceGetCount_v2(&mut count))).collect();
    assert_eq!(seen, [SUCCESS, 15, 15]);
    assert_eq!(call!(lib, nvmlInit_v2()), 15);
    sim.cli("clear-faults", &[]);
    assert_eq!(call!(lib, nvmlDeviceGetCount_v2(&mut count)), SUCCESS);
    for bad in [&["--call", "nvmlNoSuchCall", "--fail", "19"][..], &["--call", "*", "--fail", "BUSY"], &["--call", "*"]]
    {
        assert!(!sim.try_cli("fault", bad).status.success(), "{bad:?}");
    }
}

#[test]
fn a_fault_of_one_gpu_leaves_the_other() {
    need_root!();
    let sim = Sim::new(&["--gpu", A100, "--gpu", A100]);
    let lib = sim.client();
    let (first, second) = (lib.gpu(0), lib.gpu(1));
    let (gi, other) = (lib.create_gi(first, 19).unwrap(), lib.create_gi(second, 19).unwrap());
    let uuids = [lib.uuid(first).unwrap(), lib.uuid(second).unwrap()];
    sim.cli("fault", &["--call", "*", "--gpu", "0", "--times", "forever", "--fail", "4242"]);
    let mut device = std::ptr::null_mut();
    let by_index: Vec<u32> = (0..2).map(|gpu| call!(lib, nvmlDeviceGetHandleByIndex_v2(gpu, &mut device))).collect();
    assert_eq!(by_index, [4242, SUCCESS]);
    assert_eq!(uuids.map(|uuid| lib.by_uuid(&uuid).err()), [Some(4242), None]);
    assert_eq!([first, second].map(|gpu| lib.create_gi(gpu, 19).err()), [Some(4242), None], "by the GPU's handle");
    assert_eq!([gi, other].map(|gi| lib.create_ci(gi, 0).err()), [Some(4242), None], "by that of what lies on it");
    let mut count = 0;
    assert_eq!(call!(lib, nvmlDeviceGetCount_v2(&mut count)), SUCCESS, "about no GPU");
    assert!(sim.cli("faults", &[]).contains("* of GPU 0"));
    sim.cli("clear-faults", &[]);
    lib.create_ci(gi, 0).unwrap();
    assert!(!sim.try_cli("fault", &["--call", "*", "--gpu", "2", "--fail", "19"]).status.success());
}

#[test]
fn a_failed_compute_instance_leaves_its_gpu_instance() {
    need_root!();
    let sim = Sim::one(A100);
    let lib = sim.client();
    let call = "nvmlGpuInstanceCreateComputeInstance*";
    sim.cli("fault", &["--call", call, "--fail", "INSUFFICIENT_RESOURCES"]);
    let gi = lib.create_gi(lib.gpu(0), 19).unwrap();
    assert_eq!(lib.create_ci(gi, 0), Err(INSUFFICIENT_RESOURCES));
    assert_eq!(sim.gis(0), [13]);
    assert_eq!(lib.migs(lib.gpu(0)), []);
    lib.create_ci(gi, 0).unwrap();
}

#[test]
fn a_stale_enumeration_lasts_until_the_next_init() {
    need_root!();
    let sim = Sim::one(A100);
    sim.cli("make", &["--gpu", "0", "--profile", "19"]);
    sim.cli("stale", &["on"]);
    let lib = sim.client();
    sim.cli("destroy", &["--gpu", "0", "--gi", "13"]);
    let mig = lib.mig(lib.gpu(0), 0).unwrap();
    assert_eq!(lib.uuid(mig), Err(INVALID_ARGUMENT));
    assert_eq!(lib.gi_by_id(lib.gpu(0), 13), Err(NOT_FOUND));
    assert_eq!((call!(lib, nvmlShutdown()), call!(lib, nvmlInit_v2())), (SUCCESS, SUCCESS));
    assert_eq!(lib.mig(lib.gpu(0), 0), Err(NOT_FOUND));
}

#[test]
fn slow_changes_wait_for_each_other_only_when_told_to() {
    need_root!();
    // Two processes cut at the same time, one on GPU 0 and one on `gpu`.
    let both = |scope: &str, gpu: u32| {
        let sim = Sim::new(&["--gpu", A100, "--gpu", A100]);
        sim.cli("latency", &["--call", "nvmlDeviceCreateGpuInstance*", "--ms", "400"]);
        sim.cli("serialise", &[scope]);
        let lib = sim.client();
        let other = child(&sim, "slow").stdout(Stdio::null()).spawn().unwrap();
        let start = Instant::now();
        lib.create_gi(lib.gpu(gpu), 19).unwrap();
        assert!(other.wait_with_output().unwrap().status.success());
        start.elapsed()
    };
    let (one, two) = (Duration::from_millis(400), Duration::from_millis(800));
    assert!((one..two).contains(&both("off", 0)));
    assert!((one..two).contains(&both("gpu", 1)));
    assert!(both("gpu", 0) >= two);
    assert!(both("system", 1) >= two);
}

#[test]
fn calls_are_counted_by_name() {
    let sim = Sim::one(A100);
    let lib = sim.client();
    lib.gpu(0);
    assert_eq!(sim.json("counts"), serde_json::json!({}));
    sim.cli("count", &["on"]);
    let (gpu, other) = (lib.gpu(0), sim.client());
    lib.mode(gpu);
    other.mode(gpu);
    sim.cli("count", &["off"]);
    lib.mode(gpu);
    let wanted = serde_json::json!({"nvmlInit_v2": 1, "nvmlDeviceGetHandleByIndex_v2": 1, "nvmlDeviceGetMigMode": 2});
    assert_eq!(sim.json("counts"), wanted);
}

#[test]
fn proc_follows_the_instances_and_is_mended() {
    need_root!();
    let sim = Sim::new(&["--gpu", A100, "--gpu", H100, "--minors", "1,0"]);
    let lib = sim.client();
    let mut minor = 9;
    assert_eq!(call!(lib, nvmlDeviceGetMinorNumber(lib.gpu(0), &mut minor)), SUCCESS);
    assert_eq!(minor, 1);
    let gi = lib.create_gi(lib.gpu(0), 9).unwrap();
    lib.create_ci(gi, 0).unwrap();
    let second = lib.create_ci(gi, 0).unwrap();
    let home = sim.proc("nvidia/capabilities/gpu1/mig/gi2");
    let access = fs::read_to_string(home.join("access")).unwrap();
    assert_eq!(access, "DeviceFileMinor: 156\nDeviceFileMode: 292\nDeviceFileModify: 1\n");
    let access = fs::read_to_string(home.join("ci1/access")).unwrap();
    assert_eq!(access, "DeviceFileMinor: 158\nDeviceFileMode: 292\nDeviceFileModify: 1\n");
    let minors = fs::read_to_string(sim.proc("nvidia-caps/mig-minors")).unwrap();
    assert!(minors.contains("\ngpu1/gi2/access 156\n") && minors.contains("\ngpu1/gi2/ci1/access 158\n"));
    assert_eq!(home.join("access").metadata().unwrap().permissions().mode() & 0o777, 0o444);
    assert_eq!(home.metadata().unwrap().permissions().mode() & 0o777, 0o555);
    let config = sim.proc("nvidia/capabilities/mig/config");
    assert_eq!(config.metadata().unwrap().permissions().mode() & 0o777, 0o400);
    assert_eq!(lib.destroy_ci(second), SUCCESS);
    assert!(home.join("ci0").exists() && !home.join("ci1").exists());

    // As if a process had died between the state and the tree, both ways.
    fs::remove_dir_all(&home).unwrap();
    fs::create_dir_all(sim.proc("nvidia/capabilities/gpu0/mig/gi9/ci0")).unwrap();
    fs::create_dir(sim.proc("nvidia/capabilities/gpu0/mig/.gi7.new")).unwrap();
    lib.create_gi(lib.gpu(1), 19).unwrap();
    assert!(home.join("ci0/access").exists());
    let mig = sim.proc("nvidia/capabilities/gpu0/mig");
    let left: Vec<_> = fs::read_dir(mig).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["gi13"]);
    fs::remove_dir_all(&home).unwrap();
    sim.cli("show", &[]);
    assert!(home.exists());
}

#[test]
fn device_nodes_are_made_once_and_only_those_of_the_driver() {
    need_root!();
    let sim = Sim::new(&["--gpu", A100, "--gpu", H100, "--minors", "3,0"]);
    let dev = sim.dir().join("dev");
    let Ok(node) = dev.join("nvidia3").metadata() else {
        eprintln!("SKIP: no permission to make device nodes here");
        return;
    };
    assert!(node.file_type().is_char_device());
    assert_eq!((nix::libc::major(node.rdev()), nix::libc::minor(node.rdev())), (195, 3));
    let majors = sim.json("show")["majors"].clone();
    let uvm = dev.join("nvidia-uvm").metadata().unwrap().rdev();
    assert_eq!(majors["uvm"], nix::libc::major(uvm));
    let devices = fs::read_to_string(sim.dir().join("proc/devices")).unwrap();
    assert!(devices.contains(&format!("{:3} nvidia-caps\n", majors["caps"].as_u64().unwrap())));
    sim.cli("make", &["--gpu", "0", "--profile", "19"]);
    assert!(!dev.join("nvidia-caps").exists(), "somebody else makes capability nodes");
    fs::create_dir(dev.join("nvidia-caps")).unwrap();
    fs::write(dev.join("nvidia-caps/nvidia-cap525"), "").unwrap();
    sim.cli("destroy", &["--gpu", "0", "--gi", "13"]);
    assert!(dev.join("nvidia-caps/nvidia-cap525").exists(), "and nobody removes them");
    sim.cli("reboot", &[]);
    assert!(!dev.join("nvidia-caps").exists());
}

#[test]
fn several_machines_live_in_one_process() {
    need_root!();
    let (one, two) = (Sim::one(A100), Sim::one(H100));
    let (first, second) = (one.client(), two.client());
    first.create_gi(first.gpu(0), 19).unwrap();
    assert_eq!(second.gi_by_id(second.gpu(0), 13), Err(NOT_FOUND));
    assert_eq!(second.name(second.gpu(0)).unwrap(), "NVIDIA H100 80GB HBM3");
}

#[test]
fn a_relative_path_survives_chdir() {
    need_root!();
    let sim = Sim::one(A100);
    let mut command = child(&sim, "chdir");
    command.current_dir(sim.dir()).env("SIM_LIBRARY", "usr/lib/libnvidia-ml.so.1");
    assert_ran(&command.output().unwrap());
    assert_eq!(sim.gis(0), [13]);
}

#[test]
fn devices_are_found_by_bus_id() {
    let sim = Sim::new(&["--gpu", A100, "--gpu", H100]);
    let lib = sim.client();
    for text in ["00000000:0F:00.0", "0000:0f:00.0", "0F:00.0"] {
        let (bus, mut device) = (CString::new(text).unwrap(), null_mut());
        assert_eq!(call!(lib, nvmlDeviceGetHandleByPciBusId_v2(bus.as_ptr(), &mut device)), SUCCESS, "{text}");
        assert_eq!(device, lib.gpu(1));
    }
    let (bus, mut device) = (CString::new("0000:AA:00.0").unwrap(), null_mut());
    assert_eq!(call!(lib, nvmlDeviceGetHandleByPciBusId_v2(bus.as_ptr(), &mut device)), NOT_FOUND);
    let mut pci: nvmlPciInfo_t = zeroed();
    assert_eq!(call!(lib, nvmlDeviceGetPciInfo_v3(lib.gpu(0), &mut pci)), SUCCESS);
    assert_eq!((string(&pci.busId), pci.pciDeviceId), ("00000000:07:00.0".into(), 0x20b2_10de));
}

#[test]
fn every_board_makes_a_machine_and_cuts_each_usable_profile() {
    let boards = Command::new(env!("CARGO_BIN_EXE_nvml-sim")).args(["boards", "--json"]).output().unwrap();
    let boards: Value = serde_json::from_slice(&boards.stdout).unwrap();
    for board in boards.as_array().unwrap() {
        let sim = Sim::one(board["key"].as_str().unwrap());
        for profile in board["profiles"].as_array().unwrap() {
            let name = profile["name"].as_str().unwrap();
            let made: Value =
                serde_json::from_str(&sim.cli("make", &["--gpu", "0", "--profile", name, "--json"])).unwrap();
            assert!(made["uuid"].is_string(), "{} {name}", board["key"]);
            sim.cli("destroy", &["--gpu", "0", "--gi", &made["gpu_instance"].to_string()]);
        }
    }
}

/// The board that sim/README.md describes, in a file.
fn described(dir: &Path, edit: impl FnOnce(&mut Value)) -> String {
    let page = include_str!("../README.md");
    let text = page.split("```json\n").nth(1).unwrap().split("```").next().unwrap();
    let mut board: Value = serde_json::from_str(text).unwrap();
    edit(&mut board);
    let file = dir.join("own.json");
    fs::write(&file, board.to_string()).unwrap();
    file.to_str().unwrap().to_owned()
}

#[test]
fn a_board_that_nobody_knows_is_cut_as_it_is_described() {
    need_root!();
    let dir = tempfile::tempdir().unwrap();
    let sim = Sim::one(&described(dir.path(), |_| ()));
    let lib = sim.client();
    assert_eq!(lib.name(lib.gpu(0)).unwrap(), "NVIDIA Fifths 40GB");
    // The largest first, from the left: ids 0 and 1 are the two places of 3g.
    let id = |made: Answer<nvmlGpuInstance_t>| made.map(|gi| lib.gi_info(gi).unwrap().id);
    assert_eq!(id(lib.place_gi(lib.gpu(0), 9, 2, 3)), Ok(1));
    assert_eq!(id(lib.create_gi(lib.gpu(0), 9)), Err(INSUFFICIENT_RESOURCES));
    assert_eq!(
        [19, 19, 19].map(|profile| id(lib.create_gi(lib.gpu(0), profile))),
        [Ok(2), Ok(3), Err(INSUFFICIENT_RESOURCES)]
    );
    assert_eq!(lib.place_gi(lib.gpu(0), 19, 1, 2), Err(INVALID_ARGUMENT));

    // As NVIDIA's bindings see it.
    let python = std::env::var("PYTHON").unwrap_or_else(|_| "python3".into());
    let script = "import pynvml as nv; nv.nvmlInit(); gpu = nv.nvmlDeviceGetHandleByIndex(0)\n\
                  gi = nv.nvmlDeviceGetGpuInstanceById(gpu, 1); ci = nv.nvmlGpuInstanceCreateComputeInstance(gi, 2)\n\
                  mig = nv.nvmlComputeInstanceGetInfo(ci).device\n\
                  print(nv.nvmlDeviceGetName(mig), nv.nvmlDeviceGetAttributes(mig).multiprocessorCount)\n\
                  print(nv.nvmlDeviceGetGpuInstanceProfileInfo(gpu, 2, version=2).name)";
    if !Command::new(&python).args(["-c", "import pynvml"]).output().is_ok_and(|output| output.status.success()) {
        eprintln!("SKIP: {python} cannot import pynvml; `pip install nvidia-ml-py`, or set PYTHON");
        return;
    }
    let output =
        Command::new(&python).args(["-c", script]).env("LD_LIBRARY_PATH", sim.dir().join("usr/lib")).output().unwrap();
    assert_ran(&output);
    let said = String::from_utf8(output.stdout).unwrap();
    assert_eq!(said, "NVIDIA Fifths 40GB MIG 3g.24gb 60\nMIG 3g.24gb\n");
}

#[test]
fn a_description_that_is_wrong_is_refused_with_a_sentence() {
    let dir = tempfile::tempdir().unwrap();
    let says = |file: &str, wanted: &str| {
        let output = Command::new(env!("CARGO_BIN_EXE_nvml-sim"))
            .arg("create")
            .arg(dir.path().join("m"))
            .args(["--gpu", file])
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && text.contains(wanted), "{text}");
        assert!(!dir.path().join("m").exists(), "nothing is made");
    };
    says("missing.json", "reading missing.json: No such file");
    let own = |edit: fn(&mut Value)| described(dir.path(), edit);
    says(&own(|board| board["colour"] = "green".into()), "unknown field `colour`, expected one of `key`");
    says(&own(|board| drop(board.as_object_mut().unwrap().remove("grid"))), "missing field `grid`");
    says(
        &own(|board| board["mode"] = "never".into()),
        "unknown variant `never`, expected `reset-persistent` or `immediate`",
    );
    says(&own(|board| board["grid"] = 2.into()), "profile 1g.8gb: the placement 2:1 reaches beyond 2 memory slices");
    says(&own(|board| board["grid"] = 2.into()), "`nvml-sim boards a30-24gb --json` prints one to begin with");
}

#[test]
fn a_gpu_that_nobody_uses_tells_what_its_board_is() {
    need_root!();
    let sim = Sim::new(&["--gpu", H100, "--gpu", "b200-180gb"]);
    let lib = sim.client();
    let (h100, b200) = (lib.gpu(0), lib.gpu(1));
    let mut number = 0;
    assert_eq!(call!(lib, nvmlDeviceGetPowerManagementLimit(h100, &mut number)), SUCCESS);
    assert_eq!(number, 700_000);
    assert_eq!(call!(lib, nvmlDeviceGetPowerManagementLimit(b200, &mut number)), NOT_SUPPORTED, "nobody knows");
    assert_eq!(call!(lib, nvmlDeviceGetNumGpuCores(h100, &mut number)), NOT_SUPPORTED, "MIG is on");
    assert_eq!(lib.set_mode(h100, 0), Ok(0));
    assert_eq!(call!(lib, nvmlDeviceGetNumGpuCores(h100, &mut number)), SUCCESS);
    assert_eq!(number, 16_896);
    let (mut events, mut seen) = (null_mut(), zeroed());
    assert_eq!(call!(lib, nvmlEventSetCreate(&mut events)), SUCCESS);
    assert_eq!(call!(lib, nvmlDeviceRegisterEvents(h100, 8, events)), SUCCESS);
    assert_eq!(call!(lib, nvmlDeviceRegisterEvents(h100, 1 << 40, events)), NOT_SUPPORTED);
    assert_eq!(call!(lib, nvmlEventSetWait_v2(events, &mut seen, 1)), TIMEOUT);
    assert_eq!(call!(lib, nvmlEventSetFree(null_mut())), INVALID_ARGUMENT);
}

#[test]
fn every_call_can_be_made_to_fail() {
    let sim = Sim::one(A100);
    let path = CString::new(sim.library().as_os_str().as_bytes()).unwrap();
    // SAFETY: the library has no constructors.
    let library = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW) };
    sim.client();
    sim.cli("fault", &["--call", "*", "--times", "forever", "--fail", "GPU_IS_LOST"]);
    for name in nvidia_ml::calls::names() {
        let symbol = CString::new(name).unwrap();
        // SAFETY: the library is loaded, and stays.
        let found = unsafe { libc::dlsym(library, symbol.as_ptr()) };
        assert!(!found.is_null(), "{name}");
        // SAFETY: a call that fails by order looks at none of its arguments.
        let call = unsafe { std::mem::transmute::<*mut c_void, extern "C" fn() -> u32>(found) };
        assert_eq!(call(), 15, "{name}");
    }
}

#[test]
fn mistakes_are_named_with_their_remedy() {
    let sim = Sim::one(A100);
    let says = |command: &str, args: &[&str], wanted: &str| {
        let output = sim.try_cli(command, args);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && text.contains(wanted), "{command} {args:?}: {text}");
    };
    says("create", &["--gpu", A100], "is not empty");
    says("create", &["--gpu", "a100"], "choose from a100-sxm4-40gb, a100-sxm4-80gb");
    says("make", &["--gpu", "0", "--profile", "9g.1gb"], "choose from 1g.10gb");
    says("make", &["--gpu", "4", "--profile", "19"], "has no GPU 4");
    says("destroy", &["--gpu", "0", "--gi", "4"], "there is no GPU instance 4 on GPU 0");
    says("unhold", &["--gpu", "0"], "nothing holds GPU 0");
    fs::remove_dir_all(sim.dir()).unwrap();
    says("show", &[], "holds no machine");
}

#[test]
fn nvml_wrapper_reads_the_machine() {
    need_root!();
    let sim = Sim::one(A100);
    sim.cli("make", &["--gpu", "0", "--profile", "1g.10gb"]);
    let library = sim.library();
    let page = include_str!("../README.md");
    assert!(
        page.contains("nvml_wrapper::Nvml::builder().lib_path(library.as_os_str()).init()"),
        "sim/README.md has another"
    );
    let nvml = nvml_wrapper::Nvml::builder().lib_path(library.as_os_str()).init().unwrap();
    assert_eq!(nvml.sys_driver_version().unwrap(), "580.95.05");
    let gpu = nvml.device_by_index(0).unwrap();
    assert_eq!(gpu.mig_mode().unwrap().current, 1);
    assert_eq!(gpu.profile_info(0).unwrap().id, 19);
    let mig = gpu.mig_device_by_index(0).unwrap();
    assert_eq!(mig.name().unwrap(), "NVIDIA A100-SXM4-80GB MIG 1g.10gb");
    assert_eq!(mig.mig_parent_device().unwrap().uuid().unwrap(), gpu.uuid().unwrap());
    assert_eq!(mig.attributes().unwrap().multiprocessor_count, 14);
    assert_eq!(mig.memory_info().unwrap().total, 9728 << 20);
}

#[test]
fn the_example_for_python_cuts_a_slice() {
    need_root!();
    let python = std::env::var("PYTHON").unwrap_or_else(|_| "python3".into());
    let import = Command::new(&python).args(["-c", "import pynvml"]).output();
    if !import.is_ok_and(|output| output.status.success()) {
        eprintln!("SKIP: {python} cannot import pynvml; `pip install nvidia-ml-py`, or set PYTHON");
        return;
    }
    let sim = Sim::one(A100);
    let page = include_str!("../README.md");
    let example =
        page.split("```").find(|block| block.contains("import pynvml")).unwrap().strip_prefix("sh\n").unwrap();
    let example = example.replace("/tmp/m", sim.dir().to_str().unwrap()).replace("python3", &python);
    let output = Command::new("sh").args(["-c", &example]).output().unwrap();
    assert_ran(&output);
    assert!(output.stdout.starts_with(b"MIG-"), "{output:?}");
}

#[test]
fn init_and_reads_are_cheap() {
    let sim = Sim::new(&["--gpu", A100, "--gpu", A100, "--gpu", H100, "--gpu", H100]);
    let lib = sim.load();
    let start = Instant::now();
    assert_eq!(call!(lib, nvmlInit_v2()), SUCCESS);
    let init = start.elapsed();
    let gpu = lib.gpu(0);
    let start = Instant::now();
    for _ in 0..1000 {
        lib.mode(gpu);
    }
    let reads = start.elapsed();
    eprintln!("init {init:?}, read {:?}", reads / 1000);
    // Generous, since a debug build on a busy machine has to pass.
    assert!(init < Duration::from_millis(50) && reads < Duration::from_millis(500), "{init:?} {reads:?}");
}
