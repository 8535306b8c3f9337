//! A machine in a temporary directory, and the calls on its library.

#![allow(dead_code, unsafe_code, missing_docs)]

use std::ffi::{CString, c_char};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::ptr::null_mut;

use nvml_wrapper_sys::bindings::*;
use serde_json::Value;

pub const SUCCESS: u32 = 0;
pub const UNINITIALIZED: u32 = 1;
pub const INVALID_ARGUMENT: u32 = 2;
pub const NOT_SUPPORTED: u32 = 3;
pub const NO_PERMISSION: u32 = 4;
pub const NOT_FOUND: u32 = 6;
pub const INSUFFICIENT_SIZE: u32 = 7;
pub const TIMEOUT: u32 = 10;
pub const RESET_REQUIRED: u32 = 16;
pub const IN_USE: u32 = 19;
pub const INSUFFICIENT_RESOURCES: u32 = 23;
pub const UNKNOWN: u32 = 999;

/// Calls a function of the library through its table entry.
#[macro_export]
macro_rules! call {
    ($lib:expr, $name:ident($($arg:expr),*)) => {{
        let function = $lib.$name.as_ref().expect(concat!(stringify!($name), " is not exported"));
        // SAFETY: the tests hand over pointers to live values, or null where they expect a refusal.
        #[allow(clippy::macro_metavars_in_unsafe)]
        unsafe { function($($arg),*) }
    }};
}

/// Skips a test that only root can run.
#[macro_export]
macro_rules! need_root {
    () => {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("SKIP: only root may cut slices; run the tests as root");
            return;
        }
    };
}

pub struct Sim {
    home: tempfile::TempDir,
}

impl Sim {
    pub fn new(args: &[&str]) -> Self {
        let home = tempfile::tempdir().unwrap();
        // An unprivileged client has to reach the library.
        fs::set_permissions(home.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let sim = Self { home };
        let mut create = vec!["--seed", "test"];
        create.extend(args);
        sim.cli("create", &create);
        sim
    }

    pub fn one(board: &str) -> Self {
        Self::new(&["--gpu", board])
    }

    pub fn dir(&self) -> PathBuf {
        self.home.path().join("m")
    }

    pub fn library(&self) -> PathBuf {
        self.dir().join("usr/lib/libnvidia-ml.so.1")
    }

    pub fn try_cli(&self, command: &str, args: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_nvml-sim")).arg(command).arg(self.dir()).args(args).output().unwrap()
    }

    pub fn cli(&self, command: &str, args: &[&str]) -> String {
        let output = self.try_cli(command, args);
        assert!(output.status.success(), "{command} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    pub fn json(&self, command: &str) -> Value {
        serde_json::from_str(&self.cli(command, &["--json"])).unwrap()
    }

    /// Ids of the GPU instances on a GPU.
    pub fn gis(&self, gpu: usize) -> Vec<u64> {
        let shown = self.json("show");
        let gis = shown["gpus"][gpu]["gpu_instances"].as_array().unwrap();
        gis.iter().map(|gi| gi["id"].as_u64().unwrap()).collect()
    }

    pub fn proc(&self, path: &str) -> PathBuf {
        self.dir().join("proc/driver").join(path)
    }

    pub fn load(&self) -> Lib {
        Lib::load(&self.library())
    }

    pub fn client(&self) -> Lib {
        let lib = self.load();
        assert_eq!(call!(lib, nvmlInit_v2()), SUCCESS);
        lib
    }
}

pub struct Lib(NvmlLib);

impl std::ops::Deref for Lib {
    type Target = NvmlLib;
    fn deref(&self) -> &NvmlLib {
        &self.0
    }
}

pub type Answer<T> = Result<T, u32>;

fn answer<T>(code: u32, value: T) -> Answer<T> {
    if code == SUCCESS { Ok(value) } else { Err(code) }
}

impl Lib {
    pub fn load(path: &Path) -> Self {
        // SAFETY: the library has no constructors.
        Self(unsafe { NvmlLib::new(path) }.unwrap())
    }

    pub fn gpu(&self, index: u32) -> nvmlDevice_t {
        let mut device = null_mut();
        assert_eq!(call!(self, nvmlDeviceGetHandleByIndex_v2(index, &mut device)), SUCCESS);
        device
    }

    pub fn create_gi(&self, device: nvmlDevice_t, profile: u32) -> Answer<nvmlGpuInstance_t> {
        let mut gi = null_mut();
        answer(call!(self, nvmlDeviceCreateGpuInstance(device, profile, &mut gi)), gi)
    }

    pub fn place_gi(&self, device: nvmlDevice_t, profile: u32, start: u32, size: u32) -> Answer<nvmlGpuInstance_t> {
        let (mut gi, place) = (null_mut(), nvmlGpuInstancePlacement_t { start, size });
        answer(call!(self, nvmlDeviceCreateGpuInstanceWithPlacement(device, profile, &place, &mut gi)), gi)
    }

    pub fn create_ci(&self, gi: nvmlGpuInstance_t, profile: u32) -> Answer<nvmlComputeInstance_t> {
        let mut ci = null_mut();
        answer(call!(self, nvmlGpuInstanceCreateComputeInstance(gi, profile, &mut ci)), ci)
    }

    pub fn destroy_gi(&self, gi: nvmlGpuInstance_t) -> u32 {
        call!(self, nvmlGpuInstanceDestroy(gi))
    }

    pub fn destroy_ci(&self, ci: nvmlComputeInstance_t) -> u32 {
        call!(self, nvmlComputeInstanceDestroy(ci))
    }

    pub fn gi_info(&self, gi: nvmlGpuInstance_t) -> Answer<nvmlGpuInstanceInfo_t> {
        let mut info = zeroed();
        answer(call!(self, nvmlGpuInstanceGetInfo(gi, &mut info)), info)
    }

    pub fn ci_info(&self, ci: nvmlComputeInstance_t) -> Answer<nvmlComputeInstanceInfo_t> {
        let mut info = zeroed();
        answer(call!(self, nvmlComputeInstanceGetInfo_v2(ci, &mut info)), info)
    }

    pub fn gi_by_id(&self, device: nvmlDevice_t, id: u32) -> Answer<nvmlGpuInstance_t> {
        let mut gi = null_mut();
        answer(call!(self, nvmlDeviceGetGpuInstanceById(device, id, &mut gi)), gi)
    }

    pub fn mode(&self, device: nvmlDevice_t) -> (u32, u32) {
        let (mut current, mut pending) = (9, 9);
        assert_eq!(call!(self, nvmlDeviceGetMigMode(device, &mut current, &mut pending)), SUCCESS);
        (current, pending)
    }

    pub fn uuid(&self, device: nvmlDevice_t) -> Answer<String> {
        let mut text = [0; 96];
        answer(call!(self, nvmlDeviceGetUUID(device, text.as_mut_ptr(), 96)), ()).map(|()| string(&text))
    }

    pub fn name(&self, device: nvmlDevice_t) -> Answer<String> {
        let mut text = [0; 96];
        answer(call!(self, nvmlDeviceGetName(device, text.as_mut_ptr(), 96)), ()).map(|()| string(&text))
    }

    pub fn by_uuid(&self, uuid: &str) -> Answer<nvmlDevice_t> {
        let (uuid, mut device) = (CString::new(uuid).unwrap(), null_mut());
        answer(call!(self, nvmlDeviceGetHandleByUUID(uuid.as_ptr(), &mut device)), device)
    }

    /// The MIG device handle at an index.
    pub fn mig(&self, device: nvmlDevice_t, index: u32) -> Answer<nvmlDevice_t> {
        let mut mig = null_mut();
        answer(call!(self, nvmlDeviceGetMigDeviceHandleByIndex(device, index, &mut mig)), mig)
    }

    /// GI id and CI id of all MIG devices in index order.
    pub fn migs(&self, device: nvmlDevice_t) -> Vec<(u32, u32)> {
        (0..7)
            .map_while(|index| self.mig(device, index).ok())
            .map(|mig| {
                let (mut gi, mut ci) = (99, 99);
                assert_eq!(call!(self, nvmlDeviceGetGpuInstanceId(mig, &mut gi)), SUCCESS);
                assert_eq!(call!(self, nvmlDeviceGetComputeInstanceId(mig, &mut ci)), SUCCESS);
                (gi, ci)
            })
            .collect()
    }

    pub fn set_mode(&self, device: nvmlDevice_t, on: u32) -> Answer<u32> {
        let mut status = 99;
        answer(call!(self, nvmlDeviceSetMigMode(device, on, &mut status)), status)
    }

    /// Process, GI id and CI id of all clients.
    pub fn processes(&self, device: nvmlDevice_t) -> Answer<Vec<(u32, u32, u32)>> {
        let (mut count, mut room) = (8, [zeroed::<nvmlProcessInfo_v2_st>(); 8]);
        let code = call!(self, nvmlDeviceGetComputeRunningProcesses_v3(device, &mut count, room.as_mut_ptr().cast()));
        let found = room.iter().take(count as usize);
        answer(code, found.map(|one| (one.pid, one.gpuInstanceId, one.computeInstanceId)).collect())
    }
}

/// A struct of plain numbers, all nought.
pub fn zeroed<T: Copy>() -> T {
    // SAFETY: used for NVML structs only, which hold numbers and raw pointers.
    unsafe { std::mem::zeroed() }
}

pub fn string(text: &[c_char]) -> String {
    text.iter().take_while(|byte| **byte != 0).map(|byte| *byte as u8 as char).collect()
}
