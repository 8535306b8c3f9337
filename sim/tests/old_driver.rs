//! The library of an old driver: nothing beyond what every client has to require.

#![cfg(feature = "old-driver")]
#![allow(unsafe_code, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::*;

#[test]
fn a_slice_is_cut_without_any_optional_symbol() {
    need_root!();
    let sim = Sim::one("a100-sxm4-80gb");
    let lib = sim.client();
    for missing in [
        lib.nvmlDeviceGetGpuInstanceProfileInfoV.is_err(),
        lib.nvmlDeviceGetGpuInstanceProfileInfoByIdV.is_err(),
        lib.nvmlGpuInstanceGetComputeInstanceProfileInfoV.is_err(),
        lib.nvmlDeviceGetHandleByUUIDV.is_err(),
        lib.nvmlDeviceGetMemoryInfo_v2.is_err(),
        lib.nvmlDeviceSetMigMode.is_err(),
        lib.nvmlDeviceCreateGpuInstance.is_err(),
        lib.nvmlDeviceGetMigDeviceHandleByIndex.is_err(),
    ] {
        assert!(missing);
    }
    let gi = lib.place_gi(lib.gpu(0), 19, 6, 1).unwrap();
    let ci = lib.create_ci(gi, 0).unwrap();
    let uuid = lib.uuid(lib.ci_info(ci).unwrap().device).unwrap();
    assert!(lib.by_uuid(&uuid).is_ok());
    assert_eq!((lib.destroy_ci(ci), lib.destroy_gi(gi)), (SUCCESS, SUCCESS));
}
