//! Libraries of old drivers: what they lack, and that a client who asks for no more cuts slices all the same.

#![allow(unsafe_code, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::ffi::{CString, c_void};
use std::mem::transmute;
use std::os::unix::ffi::OsStrExt;
use std::process::Command;

use common::*;
use nvidia_ml::branch;
use nvml_wrapper_sys::bindings::{nvmlDevice_t, nvmlProcessInfo_v2_st};

const A100: &str = "a100-sxm4-80gb";

type Processes = extern "C" fn(nvmlDevice_t, *mut u32, *mut nvmlProcessInfo_v2_st) -> u32;

/// What dlsym(3) finds under these names.
fn found(sim: &Sim, calls: &[&str]) -> Vec<*mut c_void> {
    let path = CString::new(sim.library().as_os_str().as_bytes()).unwrap();
    // SAFETY: the library has no constructors.
    let library = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW) };
    assert!(!library.is_null());
    let names = calls.iter().map(|call| CString::new(*call).unwrap());
    // SAFETY: the library is loaded, and stays.
    names.map(|name| unsafe { libc::dlsym(library, name.as_ptr()) }).collect()
}

#[test]
fn a_driver_exports_the_calls_of_its_branch_and_no_others() {
    for (version, age) in [("470.256.02", 470), ("535.261.03", 535), ("580.95.05", 580)] {
        let sim = Sim::new(&["--gpu", A100, "--driver-version", version]);
        let missing = branch::missing(age);
        let calls: Vec<&str> = nvidia_ml::calls::names().into_iter().chain(["nvmlErrorString"]).collect();
        for (call, found) in calls.iter().zip(found(&sim, &calls)) {
            assert_eq!(!found.is_null(), !missing.contains(call), "{version} {call}");
        }
    }
}

#[test]
fn a_slice_is_cut_with_the_calls_of_r470() {
    need_root!();
    let sim = Sim::new(&["--gpu", A100, "--driver-version", "470.256.02", "--driver-files"]);
    let lib = sim.client();
    assert!(lib.nvmlDeviceGetGpuInstanceProfileInfoV.is_err() && lib.nvmlDeviceGetMemoryInfo_v2.is_err());
    let gi = lib.place_gi(lib.gpu(0), 19, 6, 1).unwrap();
    let ci = lib.create_ci(gi, 0).unwrap();
    let mig = lib.ci_info(ci).unwrap().device;
    let uuid = lib.uuid(mig).unwrap();
    assert!(uuid.starts_with("MIG-") && !uuid.starts_with("MIG-GPU-") && lib.by_uuid(&uuid).is_ok(), "{uuid}");

    // The second form of the list is the newest there, and the third has the same layout.
    sim.cli("hold", &["--gpu", "0", "--gi", "13", "--pid", "77"]);
    let (mut count, mut room) = (8, [zeroed::<nvmlProcessInfo_v2_st>(); 8]);
    assert!(lib.nvmlDeviceGetComputeRunningProcesses_v3.is_err());
    // SAFETY: the type is that of its prototype.
    let list =
        unsafe { transmute::<*mut c_void, Processes>(found(&sim, &["nvmlDeviceGetComputeRunningProcesses_v2"])[0]) };
    assert_eq!(list(mig, &mut count, room.as_mut_ptr()), SUCCESS);
    assert_eq!((count, room[0].pid, room[0].gpuInstanceId), (1, 77, 13));
    sim.cli("unhold", &["--gpu", "0", "--gi", "13"]);
    assert_eq!((lib.destroy_ci(ci), lib.destroy_gi(gi)), (SUCCESS, SUCCESS));
}

#[test]
fn mig_devices_are_named_as_their_driver_does() {
    let named = |version: &str| {
        let sim = Sim::new(&["--gpu", A100, "--driver-version", version]);
        sim.cli("make", &["--gpu", "0", "--profile", "1g.10gb"])
    };
    assert!(named("460.106.00").contains("MIG-GPU-"));
    assert!(!named("470.256.02").contains("MIG-GPU-"));
}

#[test]
fn a_driver_older_than_a_board_is_refused() {
    let sim = Sim::one(A100);
    for (board, version, wanted) in [
        ("h100-sxm-80gb", "470.256.02", "driver 470 does not know Hopper; use 520 or later"),
        ("b200-180gb", "535.261.03", "driver 535 does not know Blackwell; use 570 or later"),
        (A100, "440.33", "driver 440 does not know Ampere; use 450 or later"),
    ] {
        let other = sim.dir().with_file_name("other");
        let output = Command::new(env!("CARGO_BIN_EXE_nvml-sim"))
            .arg("create")
            .arg(other)
            .args(["--gpu", board, "--driver-version", version])
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && text.contains(wanted), "{text}");
    }
}
