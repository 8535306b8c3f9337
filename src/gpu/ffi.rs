//! Safe functions over the raw symbols of libnvidia-ml, one each: the only unsafe code for NVML.
//!
//! nvml-wrapper has no call that creates, lists or destroys instances, and its `possible_placements` always answers an
//! empty list, so these go to nvml-wrapper-sys. Always through the `Result` fields of `NvmlLib`: its methods of the
//! same names panic where the driver lacks the symbol.
#![allow(unsafe_code)]

use std::cell::Cell;
use std::ffi::{CStr, CString, c_char};
use std::marker::PhantomData;
use std::mem::{ManuallyDrop, MaybeUninit};
use std::path::Path;
use std::ptr;

use nvml_wrapper::bitmasks::InitFlags;
use nvml_wrapper::error::NvmlError;
use nvml_wrapper_sys::bindings::*;

use super::{Activation, Engines, GpuError, GpuProcess, Placement, ProfileId, Utilisation};

const SUCCESS: u32 = nvmlReturn_enum_NVML_SUCCESS;
pub(super) const INVALID_ARGUMENT: u32 = nvmlReturn_enum_NVML_ERROR_INVALID_ARGUMENT;
pub(super) const NOT_SUPPORTED: u32 = nvmlReturn_enum_NVML_ERROR_NOT_SUPPORTED;
const NO_PERMISSION: u32 = nvmlReturn_enum_NVML_ERROR_NO_PERMISSION;
const NOT_FOUND: u32 = nvmlReturn_enum_NVML_ERROR_NOT_FOUND;
const INSUFFICIENT_SIZE: u32 = nvmlReturn_enum_NVML_ERROR_INSUFFICIENT_SIZE;
pub(super) const FUNCTION_NOT_FOUND: u32 = nvmlReturn_enum_NVML_ERROR_FUNCTION_NOT_FOUND;
const GPU_IS_LOST: u32 = nvmlReturn_enum_NVML_ERROR_GPU_IS_LOST;
const IN_USE: u32 = nvmlReturn_enum_NVML_ERROR_IN_USE;
const INSUFFICIENT_RESOURCES: u32 = nvmlReturn_enum_NVML_ERROR_INSUFFICIENT_RESOURCES;
const RESET_REQUIRED: u32 = nvmlReturn_enum_NVML_ERROR_RESET_REQUIRED;
pub(super) const VERSION_MISMATCH: u32 = nvmlReturn_enum_NVML_ERROR_ARGUMENT_VERSION_MISMATCH;

/// Entries offered to calls that fill an array. Above any count that a driver reports (15 GPU-instance ids, 8
/// compute-instance ids), because `nvmlDeviceGetGpuInstances` is never told how long its buffer is.
const ROOM: usize = 64;

/// NVML, loaded and initialised.
#[derive(Debug)]
pub(super) struct Library {
    nvml: nvml_wrapper::Nvml,
    versioned_profiles: Cell<Option<bool>>,
}

/// A whole GPU, or the MIG device of a compute instance.
#[derive(Debug)]
pub(super) struct DeviceHandle<'lib>(nvmlDevice_t, PhantomData<&'lib Library>);

/// A GPU instance. Neither `Copy` nor `Clone`: NVML reuses handles after a destroy, which takes this by value.
#[derive(Debug)]
pub(super) struct GpuInstance<'lib>(nvmlGpuInstance_t, PhantomData<&'lib Library>);

/// A compute instance. Neither `Copy` nor `Clone`, as above.
#[derive(Debug)]
pub(super) struct ComputeInstance<'lib>(nvmlComputeInstance_t, PhantomData<&'lib Library>);

/// A buffer of performance counters (GPM). NVML frees it with the value.
#[derive(Debug)]
pub(super) struct Sample<'lib>(nvmlGpmSample_t, &'lib Library);

/// Where the driver counts memory errors.
#[derive(Debug, Clone, Copy)]
pub(super) enum ErrorsIn {
    /// Caches and registers.
    Sram,
    /// The GPU's memory.
    Dram,
}

/// What the driver says of one GPU-instance profile.
#[derive(Debug)]
pub(super) struct GpuInstanceProfile {
    pub id: ProfileId,
    pub slices: u32,
    pub max_instances: u32,
    pub sms: u32,
    pub engines: Engines,
    pub p2p: bool,
    pub memory_mib: u64,
    /// As reported, with the prefix `MIG `; `None` from a driver that knows only the first version of the struct.
    pub name: Option<String>,
}

/// What the driver says of one GPU instance.
#[derive(Debug)]
pub(super) struct GpuInstanceInfo {
    pub id: u32,
    pub profile: ProfileId,
    pub placement: Placement,
}

/// What the driver says of one compute-instance profile.
#[derive(Debug)]
pub(super) struct ComputeProfile {
    pub id: u32,
    pub slices: u32,
    pub max_instances: u32,
    pub sms: u32,
}

/// A function of the library with its name, for messages.
struct Function<F> {
    name: &'static str,
    call: F,
}

macro_rules! function {
    ($library:expr, $name:ident) => {
        $library.function(stringify!($name), &$library.nvml.lib().$name)?
    };
}

/// The engine counts of one of the structs for GPU-instance profiles, which have no type in common.
macro_rules! engines {
    ($info:expr) => {
        Engines {
            copy: $info.copyEngineCount,
            decoders: $info.decoderCount,
            encoders: $info.encoderCount,
            jpeg: $info.jpegCount,
            ofa: $info.ofaCount,
        }
    };
}

/// The first of these symbols that the library does not export.
macro_rules! first_missing {
    ($lib:expr, $($name:ident)*) => {
        [$((stringify!($name), $lib.$name.is_err())),*].into_iter().find(|(_, missing)| *missing).map(|(name, _)| name)
    };
}

impl Library {
    /// Loads that file and initialises NVML; no GPU in the machine is not an error.
    pub(super) fn open(path: &Path) -> Result<Library, GpuError> {
        let refused = |reason: String| GpuError::Library { path: path.display().to_string(), reason };
        if !path.is_absolute() {
            return Err(refused("the path is not absolute".to_owned()));
        }
        let nvml = nvml_wrapper::Nvml::builder().lib_path(path.as_os_str()).flags(InitFlags::NO_GPUS).init().map_err(
            |error| match error {
                NvmlError::LibRmVersionMismatch => GpuError::Changed { path: path.display().to_string() },
                error => refused(init_reason(&error)),
            },
        )?;
        // nvml-wrapper's Drop panics where nvmlShutdown is missing, so it must not run before that is known.
        let library = ManuallyDrop::new(Library { nvml, versioned_profiles: Cell::new(None) });
        let missing = first_missing!(library.nvml.lib(),
            nvmlShutdown nvmlErrorString nvmlSystemGetDriverVersion nvmlDeviceGetCount_v2
            nvmlDeviceGetHandleByIndex_v2 nvmlDeviceGetHandleByUUID nvmlDeviceGetUUID nvmlDeviceGetName
            nvmlDeviceGetMinorNumber nvmlDeviceGetMemoryInfo nvmlDeviceGetPciInfo_v3 nvmlDeviceGetMigMode
            nvmlDeviceGetGpuInstanceProfileInfo nvmlDeviceGetGpuInstancePossiblePlacements_v2
            nvmlDeviceCreateGpuInstanceWithPlacement nvmlGpuInstanceDestroy nvmlDeviceGetGpuInstances
            nvmlDeviceGetGpuInstanceById nvmlGpuInstanceGetInfo nvmlGpuInstanceGetComputeInstanceProfileInfo
            nvmlGpuInstanceCreateComputeInstance nvmlComputeInstanceDestroy nvmlGpuInstanceGetComputeInstances
            nvmlGpuInstanceGetComputeInstanceById nvmlComputeInstanceGetInfo_v2);
        match missing {
            Some(symbol) => Err(library.missing(symbol)),
            None => Ok(ManuallyDrop::into_inner(library)),
        }
    }

    /// Driver version, as `580.82.07`.
    pub(super) fn driver_version(&self) -> Result<String, GpuError> {
        let f = function!(self, nvmlSystemGetDriverVersion);
        let mut version = [0; NVML_SYSTEM_DRIVER_VERSION_BUFFER_SIZE as usize];
        // SAFETY: the pointer is to as many bytes as the length says.
        let code = unsafe { (f.call)(version.as_mut_ptr(), NVML_SYSTEM_DRIVER_VERSION_BUFFER_SIZE) };
        self.check(f.name, code)?;
        Ok(text(&version))
    }

    /// GPUs in the machine, those that this process may not open included.
    pub(super) fn device_count(&self) -> Result<u32, GpuError> {
        let f = function!(self, nvmlDeviceGetCount_v2);
        let mut count = 0;
        // SAFETY: the pointer is to one integer.
        let code = unsafe { (f.call)(&mut count) };
        self.check(f.name, code)?;
        Ok(count)
    }

    /// The GPU at that NVML index.
    pub(super) fn device_by_index(&self, index: u32) -> Result<DeviceHandle<'_>, GpuError> {
        let f = function!(self, nvmlDeviceGetHandleByIndex_v2);
        let mut device = ptr::null_mut();
        // SAFETY: the pointer is to one handle.
        let code = unsafe { (f.call)(index, &mut device) };
        self.check(f.name, code)?;
        Ok(DeviceHandle(device, PhantomData))
    }

    /// The GPU of that UUID.
    pub(super) fn device_by_uuid(&self, uuid: &str) -> Result<DeviceHandle<'_>, GpuError> {
        let f = function!(self, nvmlDeviceGetHandleByUUID);
        let uuid = CString::new(uuid).map_err(|_| GpuError::NotFound { call: f.name })?;
        let mut device = ptr::null_mut();
        // SAFETY: the string ends in NUL and outlives the call; the pointer is to one handle.
        let code = unsafe { (f.call)(uuid.as_ptr(), &mut device) };
        self.check(f.name, code)?;
        Ok(DeviceHandle(device, PhantomData))
    }

    /// `GPU-…`, or `MIG-…` of a MIG device.
    pub(super) fn uuid(&self, device: &DeviceHandle<'_>) -> Result<String, GpuError> {
        let f = function!(self, nvmlDeviceGetUUID);
        let mut uuid = [0; NVML_DEVICE_UUID_V2_BUFFER_SIZE as usize];
        // SAFETY: the handle is this library's; the pointer is to as many bytes as the length says.
        let code = unsafe { (f.call)(device.0, uuid.as_mut_ptr(), NVML_DEVICE_UUID_V2_BUFFER_SIZE) };
        self.check(f.name, code)?;
        Ok(text(&uuid))
    }

    /// The GPU of a MIG device.
    pub(super) fn parent(&self, mig: &DeviceHandle<'_>) -> Result<DeviceHandle<'_>, GpuError> {
        let f = function!(self, nvmlDeviceGetDeviceHandleFromMigDeviceHandle);
        let mut device = ptr::null_mut();
        // SAFETY: the handle is this library's; the pointer is to one handle.
        let code = unsafe { (f.call)(mig.0, &mut device) };
        self.check(f.name, code)?;
        Ok(DeviceHandle(device, PhantomData))
    }

    /// The GPU instance of a MIG device.
    pub(super) fn gpu_instance_id(&self, mig: &DeviceHandle<'_>) -> Result<u32, GpuError> {
        let f = function!(self, nvmlDeviceGetGpuInstanceId);
        let mut id = 0;
        // SAFETY: the handle is this library's; the pointer is to one integer.
        let code = unsafe { (f.call)(mig.0, &mut id) };
        self.check(f.name, code)?;
        Ok(id)
    }

    /// The compute instance of a MIG device.
    pub(super) fn compute_instance_id(&self, mig: &DeviceHandle<'_>) -> Result<u32, GpuError> {
        let f = function!(self, nvmlDeviceGetComputeInstanceId);
        let mut id = 0;
        // SAFETY: the handle is this library's; the pointer is to one integer.
        let code = unsafe { (f.call)(mig.0, &mut id) };
        self.check(f.name, code)?;
        Ok(id)
    }

    /// Product name; of a MIG device with ` MIG ` and its profile at the end.
    pub(super) fn name(&self, device: &DeviceHandle<'_>) -> Result<String, GpuError> {
        let f = function!(self, nvmlDeviceGetName);
        let mut name = [0; NVML_DEVICE_NAME_V2_BUFFER_SIZE as usize];
        // SAFETY: the handle is this library's; the pointer is to as many bytes as the length says.
        let code = unsafe { (f.call)(device.0, name.as_mut_ptr(), NVML_DEVICE_NAME_V2_BUFFER_SIZE) };
        self.check(f.name, code)?;
        Ok(text(&name))
    }

    /// The N of `/dev/nvidiaN`.
    pub(super) fn minor(&self, device: &DeviceHandle<'_>) -> Result<u32, GpuError> {
        let f = function!(self, nvmlDeviceGetMinorNumber);
        let mut minor = 0;
        // SAFETY: the handle is this library's; the pointer is to one integer.
        let code = unsafe { (f.call)(device.0, &mut minor) };
        self.check(f.name, code)?;
        Ok(minor)
    }

    /// `00000000:07:00.0`, and device and vendor id, as `0x20B210DE`.
    pub(super) fn pci(&self, device: &DeviceHandle<'_>) -> Result<(String, u32), GpuError> {
        let f = function!(self, nvmlDeviceGetPciInfo_v3);
        let mut info: nvmlPciInfo_t = zeroed();
        // SAFETY: the handle is this library's; the pointer is to one struct of the type that the symbol names.
        let code = unsafe { (f.call)(device.0, &mut info) };
        self.check(f.name, code)?;
        Ok((text(&info.busId), info.pciDeviceId))
    }

    /// Memory of a GPU or MIG device in bytes: used and total.
    pub(super) fn memory(&self, device: &DeviceHandle<'_>) -> Result<(u64, u64), GpuError> {
        let f = function!(self, nvmlDeviceGetMemoryInfo);
        let mut memory: nvmlMemory_t = zeroed();
        // SAFETY: the handle is this library's; the pointer is to one struct of the type that the symbol names.
        let code = unsafe { (f.call)(device.0, &mut memory) };
        self.check(f.name, code)?;
        Ok((memory.used, memory.total))
    }

    /// The same with what the driver keeps for itself left out of the used memory, as `nvidia-smi` shows it.
    pub(super) fn memory_of_clients(&self, device: &DeviceHandle<'_>) -> Result<(u64, u64), GpuError> {
        let f = function!(self, nvmlDeviceGetMemoryInfo_v2);
        let mut memory: nvmlMemory_v2_t = zeroed();
        memory.version = struct_version::<nvmlMemory_v2_t>(2);
        // SAFETY: the handle is this library's; the version word names the struct that the pointer is to.
        let code = unsafe { (f.call)(device.0, &mut memory) };
        self.check(f.name, code)?;
        Ok((memory.used, memory.total))
    }

    /// Uncorrected ECC errors since the driver was loaded.
    pub(super) fn uncorrected_errors(&self, device: &DeviceHandle<'_>, place: ErrorsIn) -> Result<u64, GpuError> {
        let f = function!(self, nvmlDeviceGetMemoryErrorCounter);
        let place = match place {
            ErrorsIn::Sram => nvmlMemoryLocation_enum_NVML_MEMORY_LOCATION_SRAM,
            ErrorsIn::Dram => nvmlMemoryLocation_enum_NVML_MEMORY_LOCATION_DRAM,
        };
        let kind = nvmlMemoryErrorType_enum_NVML_MEMORY_ERROR_TYPE_UNCORRECTED;
        let mut count = 0;
        // SAFETY: the handle is this library's; the pointer is to one integer.
        let code = unsafe { (f.call)(device.0, kind, nvmlEccCounterType_enum_NVML_VOLATILE_ECC, place, &mut count) };
        self.check(f.name, code)?;
        Ok(count)
    }

    /// Whether ECC is on.
    pub(super) fn ecc(&self, device: &DeviceHandle<'_>) -> Result<bool, GpuError> {
        let f = function!(self, nvmlDeviceGetEccMode);
        let (mut current, mut pending) = (0, 0);
        // SAFETY: the handle is this library's; both pointers are to one integer.
        let code = unsafe { (f.call)(device.0, &mut current, &mut pending) };
        self.check(f.name, code)?;
        Ok(current == nvmlEnableState_enum_NVML_FEATURE_ENABLED)
    }

    /// Whether the driver stays with the GPU while nobody uses it.
    pub(super) fn persistence(&self, device: &DeviceHandle<'_>) -> Result<bool, GpuError> {
        let f = function!(self, nvmlDeviceGetPersistenceMode);
        let mut mode = 0;
        // SAFETY: the handle is this library's; the pointer is to one integer.
        let code = unsafe { (f.call)(device.0, &mut mode) };
        self.check(f.name, code)?;
        Ok(mode == nvmlEnableState_enum_NVML_FEATURE_ENABLED)
    }

    /// Multiprocessors of a MIG device, and the engines of its GPU instance.
    pub(super) fn attributes(&self, mig: &DeviceHandle<'_>) -> Result<(u32, Engines), GpuError> {
        let f = function!(self, nvmlDeviceGetAttributes_v2);
        let mut found: nvmlDeviceAttributes_t = zeroed();
        // SAFETY: the handle is this library's; the pointer is to one struct of the type that the symbol names.
        let code = unsafe { (f.call)(mig.0, &mut found) };
        self.check(f.name, code)?;
        let engines = Engines {
            copy: found.sharedCopyEngineCount,
            decoders: found.sharedDecoderCount,
            encoders: found.sharedEncoderCount,
            jpeg: found.sharedJpegCount,
            ofa: found.sharedOfaCount,
        };
        Ok((found.multiprocessorCount, engines))
    }

    /// How many MIG devices a GPU may have; their indices are below. 0 with MIG off.
    pub(super) fn max_mig_devices(&self, device: &DeviceHandle<'_>) -> Result<u32, GpuError> {
        let f = function!(self, nvmlDeviceGetMaxMigDeviceCount);
        let mut count = 0;
        // SAFETY: the handle is this library's; the pointer is to one integer.
        let code = unsafe { (f.call)(device.0, &mut count) };
        self.check(f.name, code)?;
        Ok(count)
    }

    /// The MIG device at that index of a GPU; `None` where there is none.
    pub(super) fn mig_device(
        &self,
        device: &DeviceHandle<'_>,
        index: u32,
    ) -> Result<Option<DeviceHandle<'_>>, GpuError> {
        let f = function!(self, nvmlDeviceGetMigDeviceHandleByIndex);
        let mut mig = ptr::null_mut();
        // SAFETY: the GPU's handle is this library's; the pointer is to one handle.
        let code = unsafe { (f.call)(device.0, index, &mut mig) };
        if matches!(code, NOT_FOUND | INVALID_ARGUMENT) {
            return Ok(None);
        }
        self.check(f.name, code)?;
        Ok(Some(DeviceHandle(mig, PhantomData)))
    }

    /// Whether a GPU has performance counters to sample.
    pub(super) fn counts_performance(&self, device: &DeviceHandle<'_>) -> Result<bool, GpuError> {
        let f = function!(self, nvmlGpmQueryDeviceSupport);
        let mut support = nvmlGpmSupport_t { version: NVML_GPM_SUPPORT_VERSION, isSupportedDevice: 0 };
        // SAFETY: the handle is this library's; the pointer is to one struct of the type that the symbol names.
        let code = unsafe { (f.call)(device.0, &mut support) };
        self.check(f.name, code)?;
        Ok(support.isSupportedDevice != 0)
    }

    /// Reads the performance counters of a GPU instance.
    pub(super) fn sample(&self, device: &DeviceHandle<'_>, instance: u32) -> Result<Sample<'_>, GpuError> {
        let (alloc, get) = (function!(self, nvmlGpmSampleAlloc), function!(self, nvmlGpmMigSampleGet));
        function!(self, nvmlGpmSampleFree); // what can't be freed is not allocated
        let mut buffer = ptr::null_mut();
        // SAFETY: the pointer is to one handle.
        let code = unsafe { (alloc.call)(&mut buffer) };
        self.check(alloc.name, code)?;
        let sample = Sample(buffer, self);
        // SAFETY: both handles are this library's.
        let code = unsafe { (get.call)(device.0, instance, sample.0) };
        self.check(get.name, code)?;
        Ok(sample)
    }

    /// What two samples come to.
    pub(super) fn utilisation(&self, before: &Sample<'_>, after: &Sample<'_>) -> Result<Utilisation, GpuError> {
        let f = function!(self, nvmlGpmMetricsGet);
        let mut request: nvmlGpmMetricsGet_t = zeroed();
        (request.version, request.sample1, request.sample2) = (NVML_GPM_METRICS_GET_VERSION, before.0, after.0);
        let wanted = [
            nvmlGpmMetricId_t_NVML_GPM_METRIC_SM_UTIL,
            nvmlGpmMetricId_t_NVML_GPM_METRIC_GRAPHICS_UTIL,
            nvmlGpmMetricId_t_NVML_GPM_METRIC_DRAM_BW_UTIL,
        ];
        request.numMetrics = wanted.len() as u32;
        for (metric, id) in request.metrics.iter_mut().zip(wanted) {
            metric.metricId = id;
        }
        // SAFETY: the samples are live, since they are borrowed; the pointer is to one struct of the type that the
        // symbol names, of whose metrics the first `numMetrics` are read and written.
        let code = unsafe { (f.call)(&mut request) };
        self.check(f.name, code)?;
        let percent = |n: usize| Some(&request.metrics[n]).filter(|m| m.nvmlReturn == SUCCESS).map(|m| m.value);
        Ok(Utilisation { sm: percent(0), graphics: percent(1), dram: percent(2) })
    }

    /// MIG mode, current and pending; `None` of a board without MIG.
    pub(super) fn mig_mode(&self, device: &DeviceHandle<'_>) -> Result<Option<(bool, bool)>, GpuError> {
        let f = function!(self, nvmlDeviceGetMigMode);
        let (mut current, mut pending) = (0, 0);
        // SAFETY: the handle is this library's; both pointers are to one integer.
        let code = unsafe { (f.call)(device.0, &mut current, &mut pending) };
        if code == NOT_SUPPORTED {
            return Ok(None);
        }
        self.check(f.name, code)?;
        Ok(Some((current == NVML_DEVICE_MIG_ENABLE, pending == NVML_DEVICE_MIG_ENABLE)))
    }

    /// Asks for MIG mode on or off.
    pub(super) fn set_mig_mode(&self, device: &DeviceHandle<'_>, on: bool) -> Result<Activation, GpuError> {
        let f = function!(self, nvmlDeviceSetMigMode);
        let mode = if on { NVML_DEVICE_MIG_ENABLE } else { NVML_DEVICE_MIG_DISABLE };
        let mut activation = SUCCESS;
        // SAFETY: the handle is this library's; the pointer is to one integer.
        let code = unsafe { (f.call)(device.0, mode, &mut activation) };
        self.check(f.name, code)?;
        Ok(match activation {
            SUCCESS => Activation::Done,
            RESET_REQUIRED => Activation::ResetRequired,
            IN_USE => Activation::InUse,
            other => Activation::Other(format!("{} (NVML error {other})", self.error_text(other))),
        })
    }

    /// The GPU-instance profile at that enum index (not the driver's id); `None` where this GPU does not offer it.
    pub(super) fn gpu_instance_profile(
        &self,
        device: &DeviceHandle<'_>,
        index: u32,
    ) -> Result<Option<GpuInstanceProfile>, GpuError> {
        if self.versioned_profiles.get() == Some(false) {
            return self.gpu_instance_profile_v1(device, index);
        }
        let Ok(call) = &self.nvml.lib().nvmlDeviceGetGpuInstanceProfileInfoV else {
            self.versioned_profiles.set(Some(false));
            return self.gpu_instance_profile_v1(device, index);
        };
        let mut info: nvmlGpuInstanceProfileInfo_v2_t = zeroed();
        info.version = struct_version::<nvmlGpuInstanceProfileInfo_v2_t>(2);
        // SAFETY: the handle is this library's; the version word names the struct that the pointer is to.
        let code = unsafe { call(device.0, index, &mut info) };
        match code {
            NOT_SUPPORTED => Ok(None),
            // INVALID_ARGUMENT is the answer to an unknown struct version as well as to an unknown profile. Until one
            // call has succeeded, only the first version of the struct can tell which.
            INVALID_ARGUMENT | FUNCTION_NOT_FOUND | VERSION_MISMATCH if self.versioned_profiles.get().is_none() => {
                let profile = self.gpu_instance_profile_v1(device, index)?;
                if profile.is_some() {
                    self.versioned_profiles.set(Some(false));
                }
                Ok(profile)
            }
            INVALID_ARGUMENT => Ok(None),
            _ => {
                self.check("nvmlDeviceGetGpuInstanceProfileInfoV", code)?;
                self.versioned_profiles.set(Some(true));
                Ok(Some(GpuInstanceProfile {
                    id: ProfileId(info.id),
                    slices: info.sliceCount,
                    max_instances: info.instanceCount,
                    sms: info.multiprocessorCount,
                    engines: engines!(info),
                    p2p: info.isP2pSupported != 0,
                    memory_mib: info.memorySizeMB,
                    name: Some(text(&info.name)),
                }))
            }
        }
    }

    fn gpu_instance_profile_v1(
        &self,
        device: &DeviceHandle<'_>,
        index: u32,
    ) -> Result<Option<GpuInstanceProfile>, GpuError> {
        let f = function!(self, nvmlDeviceGetGpuInstanceProfileInfo);
        let mut info: nvmlGpuInstanceProfileInfo_t = zeroed();
        // SAFETY: the handle is this library's; the pointer is to one struct of the type that the symbol names.
        let code = unsafe { (f.call)(device.0, index, &mut info) };
        if matches!(code, NOT_SUPPORTED | INVALID_ARGUMENT) {
            return Ok(None);
        }
        self.check(f.name, code)?;
        Ok(Some(GpuInstanceProfile {
            id: ProfileId(info.id),
            slices: info.sliceCount,
            max_instances: info.instanceCount,
            sms: info.multiprocessorCount,
            engines: engines!(info),
            p2p: info.isP2pSupported != 0,
            memory_mib: info.memorySizeMB,
            name: None,
        }))
    }

    /// Every placement of a profile, occupied or not.
    pub(super) fn placements(&self, device: &DeviceHandle<'_>, profile: ProfileId) -> Result<Vec<Placement>, GpuError> {
        let f = function!(self, nvmlDeviceGetGpuInstancePossiblePlacements_v2);
        self.fill(f.name, nvmlGpuInstancePlacement_t { start: 0, size: 0 }, |buffer, count| {
            // SAFETY: the handle is this library's; `count` says how many entries `buffer` has room for.
            unsafe { (f.call)(device.0, profile.0, buffer, count) }
        })
        .map(|list| list.iter().map(|p| Placement { start: p.start, size: p.size }).collect())
    }

    /// GPU instances of one profile, of which the driver says that `max` may exist.
    pub(super) fn gpu_instances(
        &self,
        device: &DeviceHandle<'_>,
        profile: ProfileId,
        max: u32,
    ) -> Result<Vec<GpuInstance<'_>>, GpuError> {
        let f = function!(self, nvmlDeviceGetGpuInstances);
        let mut list = vec![ptr::null_mut(); ROOM.max(max as usize)];
        let mut count = 0;
        // SAFETY: the handle is this library's; `list` holds at least the profile's instanceCount entries, as this
        // function demands, and `count` is out only.
        let code = unsafe { (f.call)(device.0, profile.0, list.as_mut_ptr(), &mut count) };
        self.check(f.name, code)?;
        list.truncate(count as usize);
        Ok(list.into_iter().map(|handle| GpuInstance(handle, PhantomData)).collect())
    }

    /// The GPU instance of that id.
    pub(super) fn gpu_instance_by_id(&self, device: &DeviceHandle<'_>, id: u32) -> Result<GpuInstance<'_>, GpuError> {
        let f = function!(self, nvmlDeviceGetGpuInstanceById);
        let mut handle = ptr::null_mut();
        // SAFETY: the device handle is this library's; the pointer is to one handle.
        let code = unsafe { (f.call)(device.0, id, &mut handle) };
        self.check(f.name, code)?;
        Ok(GpuInstance(handle, PhantomData))
    }

    /// Id, profile and placement of a GPU instance.
    pub(super) fn gpu_instance_info(&self, instance: &GpuInstance<'_>) -> Result<GpuInstanceInfo, GpuError> {
        let f = function!(self, nvmlGpuInstanceGetInfo);
        let mut info: nvmlGpuInstanceInfo_t = zeroed();
        // SAFETY: the handle is this library's; the pointer is to one struct of the type that the symbol names.
        let code = unsafe { (f.call)(instance.0, &mut info) };
        self.check(f.name, code)?;
        Ok(GpuInstanceInfo {
            id: info.id,
            profile: ProfileId(info.profileId),
            placement: Placement { start: info.placement.start, size: info.placement.size },
        })
    }

    /// Creates a GPU instance at exactly that placement.
    pub(super) fn create_gpu_instance(
        &self,
        device: &DeviceHandle<'_>,
        profile: ProfileId,
        at: Placement,
    ) -> Result<GpuInstance<'_>, GpuError> {
        let f = function!(self, nvmlDeviceCreateGpuInstanceWithPlacement);
        let placement = nvmlGpuInstancePlacement_t { start: at.start, size: at.size };
        let mut handle = ptr::null_mut();
        // SAFETY: the device handle is this library's; the placement outlives the call; the pointer is to one handle.
        let code = unsafe { (f.call)(device.0, profile.0, &placement, &mut handle) };
        self.check(f.name, code)?;
        Ok(GpuInstance(handle, PhantomData))
    }

    /// Destroys a GPU instance.
    pub(super) fn destroy_gpu_instance(&self, instance: GpuInstance<'_>) -> Result<(), GpuError> {
        let f = function!(self, nvmlGpuInstanceDestroy);
        // SAFETY: the handle is this library's and, taken by value, not used again.
        let code = unsafe { (f.call)(instance.0) };
        self.check(f.name, code)
    }

    /// The compute-instance profile at that enum index; `None` where this GPU instance does not offer it.
    pub(super) fn compute_profile(
        &self,
        instance: &GpuInstance<'_>,
        index: u32,
    ) -> Result<Option<ComputeProfile>, GpuError> {
        let f = function!(self, nvmlGpuInstanceGetComputeInstanceProfileInfo);
        let mut info: nvmlComputeInstanceProfileInfo_t = zeroed();
        let engines = NVML_COMPUTE_INSTANCE_ENGINE_PROFILE_SHARED;
        // SAFETY: the handle is this library's; the pointer is to one struct of the type that the symbol names.
        let code = unsafe { (f.call)(instance.0, index, engines, &mut info) };
        if matches!(code, NOT_SUPPORTED | INVALID_ARGUMENT) {
            return Ok(None);
        }
        self.check(f.name, code)?;
        Ok(Some(ComputeProfile {
            id: info.id,
            slices: info.sliceCount,
            max_instances: info.instanceCount,
            sms: info.multiprocessorCount,
        }))
    }

    /// Compute instances of one profile in a GPU instance.
    pub(super) fn compute_instances(
        &self,
        instance: &GpuInstance<'_>,
        profile: &ComputeProfile,
    ) -> Result<Vec<ComputeInstance<'_>>, GpuError> {
        let f = function!(self, nvmlGpuInstanceGetComputeInstances);
        let mut list = vec![ptr::null_mut(); ROOM.max(profile.max_instances as usize)];
        let mut count = 0;
        // SAFETY: the handle is this library's; `list` holds at least the profile's instanceCount entries, as this
        // function demands, and `count` is out only.
        let code = unsafe { (f.call)(instance.0, profile.id, list.as_mut_ptr(), &mut count) };
        self.check(f.name, code)?;
        list.truncate(count as usize);
        Ok(list.into_iter().map(|handle| ComputeInstance(handle, PhantomData)).collect())
    }

    /// The compute instance of that id in a GPU instance.
    pub(super) fn compute_instance_by_id(
        &self,
        instance: &GpuInstance<'_>,
        id: u32,
    ) -> Result<ComputeInstance<'_>, GpuError> {
        let f = function!(self, nvmlGpuInstanceGetComputeInstanceById);
        let mut handle = ptr::null_mut();
        // SAFETY: the GPU instance's handle is this library's; the pointer is to one handle.
        let code = unsafe { (f.call)(instance.0, id, &mut handle) };
        self.check(f.name, code)?;
        Ok(ComputeInstance(handle, PhantomData))
    }

    /// Id and MIG device of a compute instance: the short way to its UUID.
    pub(super) fn compute_instance_info(
        &self,
        compute: &ComputeInstance<'_>,
    ) -> Result<(u32, DeviceHandle<'_>), GpuError> {
        let f = function!(self, nvmlComputeInstanceGetInfo_v2);
        let mut info: nvmlComputeInstanceInfo_t = zeroed();
        // SAFETY: the handle is this library's; the pointer is to one struct of the type that the symbol names.
        let code = unsafe { (f.call)(compute.0, &mut info) };
        self.check(f.name, code)?;
        Ok((info.id, DeviceHandle(info.device, PhantomData)))
    }

    /// Creates a compute instance.
    pub(super) fn create_compute_instance(
        &self,
        instance: &GpuInstance<'_>,
        profile: &ComputeProfile,
    ) -> Result<ComputeInstance<'_>, GpuError> {
        let f = function!(self, nvmlGpuInstanceCreateComputeInstance);
        let mut handle = ptr::null_mut();
        // SAFETY: the GPU instance's handle is this library's; the pointer is to one handle.
        let code = unsafe { (f.call)(instance.0, profile.id, &mut handle) };
        self.check(f.name, code)?;
        Ok(ComputeInstance(handle, PhantomData))
    }

    /// Destroys a compute instance.
    pub(super) fn destroy_compute_instance(&self, compute: ComputeInstance<'_>) -> Result<(), GpuError> {
        let f = function!(self, nvmlComputeInstanceDestroy);
        // SAFETY: the handle is this library's and, taken by value, not used again.
        let code = unsafe { (f.call)(compute.0) };
        self.check(f.name, code)
    }

    /// Processes on a GPU, each once; none where the driver can't tell. Before R510 the second form of the calls is the newest;
    /// its lists are laid out like the third's.
    pub(super) fn processes(&self, device: &DeviceHandle<'_>) -> Result<Vec<GpuProcess>, GpuError> {
        let lib = self.nvml.lib();
        let lists = [
            (
                "nvmlDeviceGetComputeRunningProcesses",
                &lib.nvmlDeviceGetComputeRunningProcesses_v3,
                &lib.nvmlDeviceGetComputeRunningProcesses_v2,
            ),
            (
                "nvmlDeviceGetGraphicsRunningProcesses",
                &lib.nvmlDeviceGetGraphicsRunningProcesses_v3,
                &lib.nvmlDeviceGetGraphicsRunningProcesses_v2,
            ),
            (
                "nvmlDeviceGetMPSComputeRunningProcesses",
                &lib.nvmlDeviceGetMPSComputeRunningProcesses_v3,
                &lib.nvmlDeviceGetMPSComputeRunningProcesses_v2,
            ),
        ];
        let mut found: Vec<GpuProcess> = Vec::new();
        for (name, call) in
            lists.iter().filter_map(|(name, new, old)| Some((*name, new.as_ref().or(old.as_ref()).ok()?)))
        {
            let empty = nvmlProcessInfo_t { pid: 0, usedGpuMemory: 0, gpuInstanceId: 0, computeInstanceId: 0 };
            let list = self.fill(name, empty, |buffer, count| {
                // SAFETY: the handle is this library's; `count` says how many entries `buffer` has room for.
                let code = unsafe { call(device.0, count, buffer) };
                if code != NOT_SUPPORTED {
                    return code;
                }
                *count = 0;
                SUCCESS
            })?;
            for process in list.iter().map(process) {
                let same =
                    |p: &GpuProcess| (p.pid, p.instance, p.compute) == (process.pid, process.instance, process.compute);
                if !found.iter().any(same) {
                    found.push(process);
                }
            }
        }
        Ok(found)
    }

    /// Calls `read` with a buffer and its length, and again with more room while it says INSUFFICIENT_SIZE.
    fn fill<T: Clone>(
        &self,
        name: &'static str,
        empty: T,
        read: impl Fn(*mut T, &mut u32) -> u32,
    ) -> Result<Vec<T>, GpuError> {
        let mut room = ROOM;
        loop {
            let mut buffer = vec![empty.clone(); room];
            let mut count = u32::try_from(room).unwrap_or(u32::MAX);
            let code = read(buffer.as_mut_ptr(), &mut count);
            if code == INSUFFICIENT_SIZE && room < 1 << 20 {
                // The list may grow between two calls.
                room = 2 * room.max(count as usize);
                continue;
            }
            self.check(name, code)?;
            buffer.truncate(count as usize);
            return Ok(buffer);
        }
    }

    /// A symbol that the library may lack.
    fn function<F: Copy, E>(&self, name: &'static str, symbol: &Result<F, E>) -> Result<Function<F>, GpuError> {
        match symbol {
            Ok(call) => Ok(Function { name, call: *call }),
            Err(_) => Err(self.missing(name)),
        }
    }

    fn missing(&self, symbol: &'static str) -> GpuError {
        let version = match &self.nvml.lib().nvmlSystemGetDriverVersion {
            Ok(_) => self.driver_version().ok(),
            Err(_) => None,
        };
        GpuError::Symbol { symbol, version: version.unwrap_or_else(|| "unknown".to_owned()) }
    }

    /// The answer of a call in our words.
    fn check(&self, call: &'static str, code: nvmlReturn_t) -> Result<(), GpuError> {
        Err(match code {
            SUCCESS => return Ok(()),
            INSUFFICIENT_RESOURCES => GpuError::NoRoom { call },
            IN_USE => GpuError::InUse { call },
            NOT_FOUND => GpuError::NotFound { call },
            NO_PERMISSION => GpuError::NoPermission { call },
            GPU_IS_LOST => GpuError::Lost { call },
            RESET_REQUIRED => GpuError::ResetRequired { call },
            _ => GpuError::Driver { call, code, text: self.error_text(code) },
        })
    }

    fn error_text(&self, code: nvmlReturn_t) -> String {
        let Ok(call) = &self.nvml.lib().nvmlErrorString else { return "unknown error".to_owned() };
        // SAFETY: takes any number.
        let text = unsafe { call(code) };
        if text.is_null() {
            return "unknown error".to_owned();
        }
        // SAFETY: not null, and NVML answers a static string that ends in NUL.
        unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
    }
}

impl Drop for Sample<'_> {
    fn drop(&mut self) {
        if let Ok(free) = &self.1.nvml.lib().nvmlGpmSampleFree {
            // SAFETY: this library allocated it, and nothing uses it after this.
            unsafe { free(self.0) };
        }
    }
}

/// All bits set stands for "does not apply" and for "not available".
fn process(info: &nvmlProcessInfo_t) -> GpuProcess {
    GpuProcess {
        pid: info.pid,
        instance: Some(info.gpuInstanceId).filter(|id| *id != u32::MAX),
        compute: Some(info.computeInstanceId).filter(|id| *id != u32::MAX),
        memory_mib: Some(info.usedGpuMemory).filter(|bytes| *bytes != u64::MAX).map(|bytes| bytes >> 20),
    }
}

/// Why loading or initialising failed.
fn init_reason(error: &NvmlError) -> String {
    match error {
        NvmlError::LibloadingError(error) => error.to_string(),
        NvmlError::FailedToLoadSymbol(error) => format!("not an NVIDIA management library: {error}"),
        // nvml-wrapper has no variant for the codes above 22.
        NvmlError::UnexpectedVariant(code) => format!("NVML error {code}"),
        error => error.to_string(),
    }
}

/// The version word of an NVML struct, as the macro NVML_STRUCT_VERSION of nvml.h makes it.
const fn struct_version<T>(version: u32) -> u32 {
    size_of::<T>() as u32 | version << 24
}

/// A C string in a buffer of its own.
fn text(buffer: &[c_char]) -> String {
    let bytes: Vec<u8> = buffer.iter().map(|c| c.to_ne_bytes()[0]).take_while(|byte| *byte != 0).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// A C struct that NVML fills.
///
/// # Safety
/// All zeroes must be a value of the type.
unsafe trait Plain {}

// SAFETY: integers and arrays of them.
unsafe impl Plain for nvmlPciInfo_t {}
// SAFETY: integers.
unsafe impl Plain for nvmlMemory_t {}
// SAFETY: integers.
unsafe impl Plain for nvmlMemory_v2_t {}
// SAFETY: integers.
unsafe impl Plain for nvmlDeviceAttributes_t {}
// SAFETY: integers, floating-point numbers and raw pointers.
unsafe impl Plain for nvmlGpmMetricsGet_t {}
// SAFETY: integers.
unsafe impl Plain for nvmlGpuInstanceProfileInfo_t {}
// SAFETY: integers and an array of them.
unsafe impl Plain for nvmlGpuInstanceProfileInfo_v2_t {}
// SAFETY: integers and a raw pointer.
unsafe impl Plain for nvmlGpuInstanceInfo_t {}
// SAFETY: integers.
unsafe impl Plain for nvmlComputeInstanceProfileInfo_t {}
// SAFETY: integers and raw pointers.
unsafe impl Plain for nvmlComputeInstanceInfo_t {}

fn zeroed<T: Plain>() -> T {
    // SAFETY: all zeroes is a value of every `Plain` type.
    unsafe { MaybeUninit::zeroed().assume_init() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn struct_versions_are_those_of_the_header() {
        assert_eq!(struct_version::<nvmlGpuInstanceProfileInfo_v2_t>(2), 0x0200_0098);
        assert_eq!(struct_version::<nvmlComputeInstanceProfileInfo_v2_t>(2), 0x0200_0088);
        assert_eq!(struct_version::<nvmlMemory_v2_t>(2), 0x0200_0028);
    }

    #[test]
    fn text_stops_at_nul_and_never_runs_past_the_buffer() {
        let bytes = |s: &[u8]| s.iter().map(|b| c_char::from_ne_bytes([*b])).collect::<Vec<_>>();
        assert_eq!(text(&bytes(b"MIG 1g.10gb\0rest")), "MIG 1g.10gb");
        assert_eq!(text(&bytes(b"full")), "full");
        assert_eq!(text(&bytes(b"\xff\0")), "\u{fffd}");
    }
}
