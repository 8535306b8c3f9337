//! The exported calls.

use std::ffi::{c_char, c_int, c_uint};
use std::fs;

use nvml_wrapper_sys::bindings as nvml;

use crate::abi::{Array, Handle, In, InText, Out, Target, Text, Versioned, exports, exports_bare, name_field};
use crate::board::{Board, CiProfile, GiProfile, Span};
use crate::code::{self, Code, Outcome};
use crate::rules;
use crate::session::{self, Call, Device, ci, ci_handle, gi, gi_handle, mig_devices, mig_gpu};
use crate::state::{Gi, State};
use crate::stubs;

/// `NVML_GPU_INSTANCE_PROFILE_COUNT` of drivers that know 3_SLICE_GFX.
const GI_PROFILE_COUNT: u32 = 18;
/// `NVML_COMPUTE_INSTANCE_PROFILE_COUNT`
const CI_PROFILE_COUNT: u32 = 9;
const NOT_APPLICABLE: u32 = u32::MAX;
const MIB: u64 = 1 << 20;
/// `sizeof` in the low bytes, the version in the top one, as `NVML_STRUCT_VERSION` makes it.
const GI_INFO_V2: u32 = 0x0200_0098;
const GI_INFO_V3: u32 = 0x0300_0098;
const CI_INFO_V2: u32 = 0x0200_0088;
const CI_INFO_V3: u32 = 0x0300_008c;
const MEMORY_V2: u32 = 0x0200_0028;
const UUID_V1: u32 = 0x0100_0034;

/// The names of all calls that answer with a code, in the order in which they are counted.
pub fn names() -> Vec<&'static str> {
    let inits = ["nvmlInit_v2", "nvmlInit", "nvmlInitWithFlags"];
    inits.iter().chain(NAMES).chain(stubs::NAMES).copied().collect()
}

exports_bare! {
    fn nvmlInit_v2() -> c_uint { session::init("nvmlInit_v2") }
    fn nvmlInit() -> c_uint { session::init("nvmlInit") }
    fn nvmlInitWithFlags(_flags: c_uint) -> c_uint { session::init("nvmlInitWithFlags") }
    fn nvmlErrorString(result: c_uint) -> *const c_char { code::text(result).as_ptr() }
}

exports! {
    fn nvmlShutdown() |_call| { session::shutdown() }

    fn nvmlSystemGetDriverVersion(version: Text, length: c_uint) |call| {
        version.put(&call.config().driver_version, length)
    }

    fn nvmlSystemGetNVMLVersion(version: Text, length: c_uint) |call| {
        let config = call.config();
        version.put(&format!("{}.{}", config.cuda_version / 1000, config.driver_version), length)
    }

    fn nvmlSystemGetCudaDriverVersion(version: Out<c_int>) |call| { version.put(call.config().cuda_version) }

    fn nvmlSystemGetCudaDriverVersion_v2(version: Out<c_int>) |call| { version.put(call.config().cuda_version) }

    fn nvmlSystemGetProcessName(pid: c_uint, name: Text, length: c_uint) |_call| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).map_err(|_| Code::NOT_FOUND)?;
        let first = line.split(|byte| *byte == 0).next().unwrap_or_default();
        let cut = first.get(..(length as usize).saturating_sub(1)).unwrap_or(first);
        name.put(&String::from_utf8_lossy(cut), length)
    }

    fn nvmlDeviceGetCount_v2(count: Out<c_uint>) |call| { count.put(call.config().gpus.len() as u32) }

    fn nvmlDeviceGetCount(count: Out<c_uint>) |call| { count.put(call.config().gpus.len() as u32) }

    fn nvmlDeviceGetHandleByIndex_v2(index: c_uint, device: Out<Handle>) |call| { by_index(call, index, &device) }

    fn nvmlDeviceGetHandleByIndex(index: c_uint, device: Out<Handle>) |call| { by_index(call, index, &device) }

    fn nvmlDeviceGetHandleByUUID(uuid: InText, device: Out<Handle>) |call| {
        device.put(by_uuid(call, &uuid.get()?)?)
    }

    #[cfg(not(feature = "old-driver"))]
    fn nvmlDeviceGetHandleByUUIDV(uuid: Versioned, device: Out<Handle>) |call| {
        if uuid.version()? != UUID_V1 {
            return Err(Code::INVALID_ARGUMENT);
        }
        // nvmlUUID_v1_t: version, type, 41 bytes of text or 16 of binary.
        let words: [u8; 49] = uuid.get()?;
        let text = match words[4] {
            1 => String::from_utf8_lossy(&words[8..]).trim_end_matches('\0').to_owned(),
            2 => binary_uuid(&words[8..24]),
            _ => return Err(Code::INVALID_ARGUMENT),
        };
        device.put(by_uuid(call, &text)?)
    }

    #[cfg(not(feature = "old-driver"))]
    fn nvmlDeviceGetHandleByPciBusId_v2(bus_id: InText, device: Out<Handle>) |call| {
        by_bus_id(call, &bus_id.get()?, &device)
    }

    fn nvmlDeviceGetHandleByPciBusId(bus_id: InText, device: Out<Handle>) |call| {
        by_bus_id(call, &bus_id.get()?, &device)
    }

    fn nvmlDeviceGetUUID(device: Handle, uuid: Text, length: c_uint) |call| {
        let now = call.now()?;
        match call.device(&now.state, device)? {
            Device::Gpu(gpu) => uuid.put(&call.config().gpus[gpu].uuid, length),
            Device::Mig(gpu, gi, ci) => uuid.put(&call.config().mig_uuid(gpu, gi.id, ci.id), length),
        }
    }

    fn nvmlDeviceGetName(device: Handle, name: Text, length: c_uint) |call| {
        let now = call.now()?;
        let device = call.device(&now.state, device)?;
        let board = call.board(device.gpu())?;
        match device {
            Device::Gpu(_) => name.put(&board.name, length),
            Device::Mig(_, gi, ci) => {
                let profile = rules::ci_profile(owner(board, gi)?, ci.profile, Code::UNKNOWN)?;
                name.put(&format!("{} MIG {}", board.name, profile.name), length)
            }
        }
    }

    fn nvmlDeviceGetIndex(device: Handle, index: Out<c_uint>) |call| {
        let now = call.now()?;
        match call.device(&now.state, device)? {
            Device::Gpu(gpu) => index.put(gpu as u32),
            Device::Mig(gpu, gi, ci) => {
                let place = mig_devices(&now.state.gpus[gpu]).position(|known| known == (gi, ci));
                index.put(place.ok_or(Code::UNKNOWN)? as u32)
            }
        }
    }

    fn nvmlDeviceGetMinorNumber(device: Handle, minor: Out<c_uint>) |call| {
        let now = call.now()?;
        match call.device(&now.state, device)? {
            Device::Gpu(gpu) => minor.put(call.config().gpus[gpu].minor),
            Device::Mig(..) => Err(Code::NOT_SUPPORTED),
        }
    }

    fn nvmlDeviceGetSerial(device: Handle, serial: Text, length: c_uint) |call| {
        let gpu = parent(call, device)?;
        serial.put(&call.config().gpus[gpu].serial, length)
    }

    fn nvmlDeviceGetVbiosVersion(device: Handle, version: Text, length: c_uint) |call| {
        parent(call, device)?;
        version.put("92.00.36.00.02", length)
    }

    fn nvmlDeviceGetBrand(device: Handle, brand: Out<c_uint>) |call| {
        parent(call, device)?;
        brand.put(nvml::nvmlBrandType_enum_NVML_BRAND_NVIDIA)
    }

    fn nvmlDeviceGetArchitecture(device: Handle, architecture: Out<c_uint>) |call| {
        let board = call.board(parent(call, device)?)?;
        architecture.put(match board.architecture.as_str() {
            "Ampere" => nvml::NVML_DEVICE_ARCH_AMPERE,
            "Hopper" => nvml::NVML_DEVICE_ARCH_HOPPER,
            _ => nvml::NVML_DEVICE_ARCH_BLACKWELL,
        })
    }

    fn nvmlDeviceGetCudaComputeCapability(device: Handle, major: Out<c_int>, minor: Out<c_int>) |call| {
        let capability = call.board(parent(call, device)?)?.compute_capability;
        minor.check()?;
        major.put(capability.0)?;
        minor.put(capability.1)
    }

    fn nvmlDeviceGetPersistenceMode(device: Handle, mode: Out<c_uint>) |call| {
        parent(call, device)?;
        mode.put(1)
    }

    fn nvmlDeviceGetTemperature(device: Handle, _sensor: c_uint, celsius: Out<c_uint>) |call| {
        call.gpu(device)?;
        celsius.put(30)
    }

    fn nvmlDeviceGetPowerUsage(device: Handle, milliwatts: Out<c_uint>) |call| {
        call.gpu(device)?;
        milliwatts.put(50_000)
    }

    fn nvmlDeviceGetUtilizationRates(device: Handle, rates: Out<nvml::nvmlUtilization_t>) |call| {
        let gpu = call.gpu(device)?;
        if call.now()?.state.gpus[gpu].current {
            return Err(Code::NOT_SUPPORTED);
        }
        rates.put(nvml::nvmlUtilization_t { gpu: 0, memory: 0 })
    }

    fn nvmlDeviceGetMemoryInfo(device: Handle, memory: Out<nvml::nvmlMemory_t>) |call| {
        let total = memory_bytes(call, device)?;
        memory.put(nvml::nvmlMemory_t { total, free: total, used: 0 })
    }

    #[cfg(not(feature = "old-driver"))]
    fn nvmlDeviceGetMemoryInfo_v2(device: Handle, memory: Versioned) |call| {
        if memory.version()? != MEMORY_V2 {
            return Err(Code::INVALID_ARGUMENT);
        }
        let total = memory_bytes(call, device)?;
        memory.put(nvml::nvmlMemory_v2_t { version: MEMORY_V2, total, reserved: 0, free: total, used: 0 })
    }

    fn nvmlDeviceGetBAR1MemoryInfo(device: Handle, memory: Out<nvml::nvmlBAR1Memory_t>) |call| {
        let now = call.now()?;
        let device = call.device(&now.state, device)?;
        let board = call.board(device.gpu())?;
        let all = board.memory_mib.next_power_of_two() * MIB;
        // An eighth of an H100 PCIe shows 16383 MiB.
        let total = match device {
            Device::Gpu(_) => all,
            Device::Mig(_, gi, _) => all * u64::from(gi.span.size) / u64::from(board.grid) - MIB,
        };
        memory.put(nvml::nvmlBAR1Memory_t { bar1Total: total, bar1Free: total, bar1Used: 0 })
    }

    fn nvmlDeviceGetPciInfo_v3(device: Handle, pci: Out<nvml::nvmlPciInfo_t>) |call| {
        pci.put(pci_info(call, parent(call, device)?)?)
    }

    fn nvmlDeviceGetPciInfo_v2(device: Handle, pci: Out<PciInfoV1>) |call| {
        pci.put(PciInfoV1::of(&pci_info(call, parent(call, device)?)?))
    }

    fn nvmlDeviceGetPciInfo(device: Handle, pci: Out<PciInfoV1>) |call| {
        pci.put(PciInfoV1::of(&pci_info(call, parent(call, device)?)?))
    }

    #[cfg(not(feature = "old-driver"))]
    fn nvmlDeviceGetComputeRunningProcesses_v3(
        device: Handle, count: Out<c_uint>, infos: Array<nvml::nvmlProcessInfo_v2_st>,
    ) |call| {
        let now = call.now()?;
        let device = call.device(&now.state, device)?;
        list(&processes(call, &now.state, device), &count, &infos)
    }

    #[cfg(not(feature = "old-driver"))]
    fn nvmlDeviceGetGraphicsRunningProcesses_v3(
        device: Handle, count: Out<c_uint>, infos: Array<nvml::nvmlProcessInfo_v2_st>,
    ) |call| {
        parent(call, device)?;
        list(&[], &count, &infos)
    }

    #[cfg(not(feature = "old-driver"))]
    fn nvmlDeviceGetMPSComputeRunningProcesses_v3(
        device: Handle, count: Out<c_uint>, infos: Array<nvml::nvmlProcessInfo_v2_st>,
    ) |call| {
        parent(call, device)?;
        list(&[], &count, &infos)
    }

    fn nvmlDeviceGetMigMode(device: Handle, current: Out<c_uint>, pending: Out<c_uint>) |call| {
        let gpu = call.gpu(device)?;
        let now = call.now()?;
        pending.check()?;
        current.put(now.state.gpus[gpu].current.into())?;
        pending.put(now.state.gpus[gpu].pending.into())
    }

    #[cfg(not(feature = "old-driver"))]
    fn nvmlDeviceSetMigMode(device: Handle, mode: c_uint, activation: Out<c_uint>) |call| {
        activation.check()?;
        let gpu = call.gpu(device)?;
        if mode > 1 {
            return Err(Code::INVALID_ARGUMENT);
        }
        call.privileged()?;
        let status = call.change(gpu, |config, state| rules::set_mode(config, state, gpu, mode == 1))?;
        activation.put(status.err().map_or(0, |code| code.0))
    }

    #[cfg(not(feature = "old-driver"))]
    fn nvmlDeviceGetMaxMigDeviceCount(device: Handle, count: Out<c_uint>) |call| {
        let gpu = call.gpu(device)?;
        let on = call.now()?.state.gpus[gpu].current;
        count.put(if on { call.board(gpu)?.max_mig_devices } else { 0 })
    }

    #[cfg(not(feature = "old-driver"))]
    fn nvmlDeviceGetMigDeviceHandleByIndex(device: Handle, index: c_uint, mig: Out<Handle>) |call| {
        mig.check()?;
        let gpu = call.gpu(device)?;
        let seen = call.for_enumeration()?;
        let owner = mig_gpu(&seen.state, gpu)?;
        if index >= call.board(gpu)?.max_mig_devices {
            return Err(Code::INVALID_ARGUMENT);
        }
        let (gi, ci) = mig_devices(owner).nth(index as usize).ok_or(Code::NOT_FOUND)?;
        mig.put(ci_handle(gpu, gi, ci, true))
    }

    #[cfg(not(feature = "old-driver"))]
    fn nvmlDeviceIsMigDeviceHandle(device: Handle, is_mig: Out<c_uint>) |call| {
        let now = call.now()?;
        is_mig.put(matches!(call.device(&now.state, device)?, Device::Mig(..)).into())
    }

    #[cfg(not(feature = "old-driver"))]
    fn nvmlDeviceGetDeviceHandleFromMigDeviceHandle(mig: Handle, device: Out<Handle>) |call| {
        device.put(Handle::of(Target::Gpu(mig_only(call, mig)?.0)))
    }

    #[cfg(not(feature = "old-driver"))]
    fn nvmlDeviceGetGpuInstanceId(device: Handle, id: Out<c_uint>) |call| { id.put(mig_only(call, device)?.1) }

    #[cfg(not(feature = "old-driver"))]
    fn nvmlDeviceGetComputeInstanceId(device: Handle, id: Out<c_uint>) |call| { id.put(mig_only(call, device)?.2) }

    #[cfg(not(feature = "old-driver"))]
    fn nvmlDeviceGetAttributes_v2(device: Handle, attributes: Out<nvml::nvmlDeviceAttributes_t>) |call| {
        attributes.put(mig_attributes(call, device)?)
    }

    #[cfg(not(feature = "old-driver"))]
    fn nvmlDeviceGetAttributes(device: Handle, attributes: Out<nvml::nvmlDeviceAttributes_t>) |call| {
        attributes.put(mig_attributes(call, device)?)
    }

    fn nvmlDeviceGetGpuInstanceProfileInfo(
        device: Handle, profile: c_uint, info: Out<nvml::nvmlGpuInstanceProfileInfo_t>,
    ) |call| {
        let profile = gi_profile_by_index(call.board(call.gpu(device)?)?, profile)?;
        info.put(nvml::nvmlGpuInstanceProfileInfo_t {
            id: profile.id,
            isP2pSupported: profile.p2p.into(),
            sliceCount: profile.slices,
            instanceCount: profile.count,
            multiprocessorCount: profile.sm,
            copyEngineCount: profile.copy_engines,
            decoderCount: profile.engines.decoders,
            encoderCount: profile.engines.encoders,
            jpegCount: profile.engines.jpeg,
            ofaCount: profile.engines.ofa,
            memorySizeMB: profile.memory_mib,
        })
    }

    #[cfg(not(feature = "old-driver"))]
    fn nvmlDeviceGetGpuInstanceProfileInfoV(device: Handle, profile: c_uint, info: Versioned) |call| {
        put_gi_profile(gi_profile_by_index(call.board(call.gpu(device)?)?, profile)?, &info)
    }

    #[cfg(not(feature = "old-driver"))]
    fn nvmlDeviceGetGpuInstanceProfileInfoByIdV(device: Handle, profile: c_uint, info: Versioned) |call| {
        let board = call.board(call.gpu(device)?)?;
        put_gi_profile(rules::profile(board, profile, Code::NOT_SUPPORTED)?, &info)
    }

    fn nvmlDeviceGetGpuInstancePossiblePlacements_v2(
        device: Handle, profile: c_uint, placements: Array<nvml::nvmlGpuInstancePlacement_t>, count: Out<c_uint>,
    ) |call| {
        gi_placements(call, device, profile, &placements, &count)
    }

    fn nvmlDeviceGetGpuInstancePossiblePlacements(
        device: Handle, profile: c_uint, placements: Array<nvml::nvmlGpuInstancePlacement_t>, count: Out<c_uint>,
    ) |call| {
        gi_placements(call, device, profile, &placements, &count)
    }

    #[cfg(not(feature = "old-driver"))]
    fn nvmlDeviceGetGpuInstanceRemainingCapacity(device: Handle, profile: c_uint, count: Out<c_uint>) |call| {
        let gpu = call.gpu(device)?;
        call.privileged()?;
        let now = call.now()?;
        let (state, board) = (mig_gpu(&now.state, gpu)?, call.board(gpu)?);
        count.put(rules::gi_capacity(board, state, rules::profile(board, profile, Code::NOT_SUPPORTED)?))
    }

    #[cfg(not(feature = "old-driver"))]
    fn nvmlDeviceCreateGpuInstance(device: Handle, profile: c_uint, instance: Out<Handle>) |call| {
        create_gi(call, device, profile, None, &instance)
    }

    fn nvmlDeviceCreateGpuInstanceWithPlacement(
        device: Handle, profile: c_uint, placement: In<nvml::nvmlGpuInstancePlacement_t>, instance: Out<Handle>,
    ) |call| {
        let nvml::nvmlGpuInstancePlacement_t { start, size } = placement.get()?;
        create_gi(call, device, profile, Some(Span { start, size }), &instance)
    }

    fn nvmlGpuInstanceDestroy(instance: Handle) |call| {
        let Target::Gi { gpu, .. } = instance.target()? else { return Err(Code::INVALID_ARGUMENT) };
        call.privileged()?;
        call.change(gpu, |_, state| {
            let id = gi(state, instance)?.1.id;
            rules::destroy_gi(state, gpu, id)
        })
    }

    fn nvmlDeviceGetGpuInstances(
        device: Handle, profile: c_uint, instances: Array<Handle>, count: Out<c_uint>,
    ) |call| {
        let gpu = call.gpu(device)?;
        call.privileged()?;
        let now = call.now()?;
        let state = mig_gpu(&now.state, gpu)?;
        rules::profile(call.board(gpu)?, profile, Code::INVALID_ARGUMENT)?;
        count.check()?;
        if instances.is_null() {
            return Err(Code::INVALID_ARGUMENT);
        }
        let found: Vec<Handle> =
            state.gis.iter().filter(|gi| gi.profile == profile).map(|gi| gi_handle(gpu, gi)).collect();
        instances.fill(&found)?;
        count.put(found.len() as u32)
    }

    fn nvmlDeviceGetGpuInstanceById(device: Handle, id: c_uint, instance: Out<Handle>) |call| {
        let gpu = call.gpu(device)?;
        call.privileged()?;
        let now = call.now()?;
        let found = mig_gpu(&now.state, gpu)?.gi(id).ok_or(Code::NOT_FOUND)?;
        instance.put(gi_handle(gpu, found))
    }

    fn nvmlGpuInstanceGetInfo(instance: Handle, info: Out<nvml::nvmlGpuInstanceInfo_t>) |call| {
        let now = call.now()?;
        let (gpu, gi) = gi(&now.state, instance)?;
        info.put(nvml::nvmlGpuInstanceInfo_t {
            device: Handle::of(Target::Gpu(gpu)).device(),
            id: gi.id,
            profileId: gi.profile,
            placement: nvml::nvmlGpuInstancePlacement_t { start: gi.span.start, size: gi.span.size },
        })
    }

    fn nvmlGpuInstanceGetComputeInstanceProfileInfo(
        instance: Handle, profile: c_uint, engines: c_uint, info: Out<nvml::nvmlComputeInstanceProfileInfo_t>,
    ) |call| {
        let (owner, profile) = ci_profile_by_index(call, instance, profile, engines)?;
        info.put(nvml::nvmlComputeInstanceProfileInfo_t {
            id: profile.id,
            sliceCount: profile.slices,
            instanceCount: profile.count,
            multiprocessorCount: profile.sm,
            sharedCopyEngineCount: owner.copy_engines,
            sharedDecoderCount: owner.engines.decoders,
            sharedEncoderCount: owner.engines.encoders,
            sharedJpegCount: owner.engines.jpeg,
            sharedOfaCount: owner.engines.ofa,
        })
    }

    #[cfg(not(feature = "old-driver"))]
    fn nvmlGpuInstanceGetComputeInstanceProfileInfoV(
        instance: Handle, profile: c_uint, engines: c_uint, info: Versioned,
    ) |call| {
        let (owner, profile) = ci_profile_by_index(call, instance, profile, engines)?;
        put_ci_profile(&owner, &profile, &info)
    }

    #[cfg(not(feature = "old-driver"))]
    fn nvmlGpuInstanceGetComputeInstanceRemainingCapacity(
        instance: Handle, profile: c_uint, count: Out<c_uint>,
    ) |call| {
        call.privileged()?;
        let now = call.now()?;
        let (gpu, gi) = gi(&now.state, instance)?;
        let owner = owner(call.board(gpu)?, gi)?;
        count.put(rules::ci_capacity(owner, gi, rules::ci_profile(owner, profile, Code::NOT_SUPPORTED)?))
    }

    #[cfg(not(feature = "old-driver"))]
    fn nvmlGpuInstanceGetComputeInstancePossiblePlacements(
        instance: Handle, profile: c_uint, placements: Array<nvml::nvmlComputeInstancePlacement_t>,
        count: Out<c_uint>,
    ) |call| {
        call.privileged()?;
        let now = call.now()?;
        let (gpu, gi) = gi(&now.state, instance)?;
        let profile = rules::ci_profile(owner(call.board(gpu)?, gi)?, profile, Code::NOT_SUPPORTED)?;
        count.put(profile.placements.len() as u32)?;
        let spans = profile.placements.iter();
        let all: Vec<_> =
            spans.map(|span| nvml::nvmlComputeInstancePlacement_t { start: span.start, size: span.size }).collect();
        if placements.is_null() { Ok(()) } else { placements.fill(&all) }
    }

    fn nvmlGpuInstanceCreateComputeInstance(instance: Handle, profile: c_uint, compute: Out<Handle>) |call| {
        create_ci(call, instance, profile, None, &compute)
    }

    #[cfg(not(feature = "old-driver"))]
    fn nvmlGpuInstanceCreateComputeInstanceWithPlacement(
        instance: Handle, profile: c_uint, placement: In<nvml::nvmlComputeInstancePlacement_t>, compute: Out<Handle>,
    ) |call| {
        let nvml::nvmlComputeInstancePlacement_t { start, size } = placement.get()?;
        create_ci(call, instance, profile, Some(Span { start, size }), &compute)
    }

    fn nvmlComputeInstanceDestroy(compute: Handle) |call| {
        let Target::Ci { gpu, .. } = compute.target()? else { return Err(Code::INVALID_ARGUMENT) };
        call.privileged()?;
        call.change(gpu, |_, state| {
            let (_, gi, ci) = ci(state, compute, false)?;
            let (gi, ci) = (gi.id, ci.id);
            rules::destroy_ci(state, gpu, gi, ci)
        })
    }

    fn nvmlGpuInstanceGetComputeInstances(
        instance: Handle, profile: c_uint, computes: Array<Handle>, count: Out<c_uint>,
    ) |call| {
        call.privileged()?;
        let now = call.now()?;
        let (gpu, gi) = gi(&now.state, instance)?;
        rules::ci_profile(owner(call.board(gpu)?, gi)?, profile, Code::INVALID_ARGUMENT)?;
        count.check()?;
        if computes.is_null() {
            return Err(Code::INVALID_ARGUMENT);
        }
        let found: Vec<Handle> =
            gi.cis.iter().filter(|ci| ci.profile == profile).map(|ci| ci_handle(gpu, gi, ci, false)).collect();
        computes.fill(&found)?;
        count.put(found.len() as u32)
    }

    fn nvmlGpuInstanceGetComputeInstanceById(instance: Handle, id: c_uint, compute: Out<Handle>) |call| {
        call.privileged()?;
        let now = call.now()?;
        let (gpu, gi) = gi(&now.state, instance)?;
        let found = gi.cis.iter().find(|ci| ci.id == id).ok_or(Code::NOT_FOUND)?;
        compute.put(ci_handle(gpu, gi, found, false))
    }

    fn nvmlComputeInstanceGetInfo_v2(compute: Handle, info: Out<nvml::nvmlComputeInstanceInfo_t>) |call| {
        info.put(ci_info(call, compute)?)
    }

    fn nvmlComputeInstanceGetInfo(compute: Handle, info: Out<nvml::nvmlComputeInstanceInfo_t>) |call| {
        info.put(ci_info(call, compute)?)
    }
}

/// What `nvmlDeviceGetPciInfo` and `_v2` fill at least; their reserved tail is left alone.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct PciInfoV1 {
    bus_id: [c_char; 16],
    domain: c_uint,
    bus: c_uint,
    device: c_uint,
    device_id: c_uint,
    subsystem_id: c_uint,
}

impl PciInfoV1 {
    fn of(info: &nvml::nvmlPciInfo_t) -> Self {
        Self {
            bus_id: info.busIdLegacy,
            domain: info.domain,
            bus: info.bus,
            device: info.device,
            device_id: info.pciDeviceId,
            subsystem_id: info.pciSubSystemId,
        }
    }
}

fn pci_info(call: &Call, gpu: usize) -> Outcome<nvml::nvmlPciInfo_t> {
    let fixed = &call.config().gpus[gpu];
    Ok(nvml::nvmlPciInfo_t {
        busIdLegacy: name_field(&fixed.bus_id()[4..]),
        domain: 0,
        bus: fixed.bus,
        device: 0,
        pciDeviceId: call.board(gpu)?.pci_device_id,
        pciSubSystemId: 0x1463_10de,
        busId: name_field(&fixed.bus_id()),
    })
}

fn by_index(call: &Call, index: u32, device: &Out<Handle>) -> Outcome<()> {
    if index as usize >= call.config().gpus.len() {
        return Err(Code::INVALID_ARGUMENT);
    }
    device.put(Handle::of(Target::Gpu(index as usize)))
}

fn by_uuid(call: &Call, uuid: &str) -> Outcome<Handle> {
    let config = call.config();
    if let Some(gpu) = config.gpus.iter().position(|gpu| gpu.uuid == uuid) {
        return Ok(Handle::of(Target::Gpu(gpu)));
    }
    if !uuid.starts_with("GPU-") && !uuid.starts_with("MIG-") {
        return Err(Code::INVALID_ARGUMENT);
    }
    let now = call.now()?;
    for (gpu, state) in now.state.gpus.iter().enumerate() {
        for (gi, ci) in mig_devices(state) {
            if uuid == config.mig_uuid(gpu, gi.id, ci.id) || uuid == config.old_mig_uuid(gpu, gi.id, ci.id) {
                return Ok(ci_handle(gpu, gi, ci, true));
            }
        }
    }
    Err(Code::NOT_FOUND)
}

/// A binary UUID names GPUs only: it has no room for the `GPU-` or `MIG-` that tells them apart.
#[cfg(not(feature = "old-driver"))]
fn binary_uuid(bytes: &[u8]) -> String {
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("GPU-{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])
}

fn by_bus_id(call: &Call, text: &str, device: &Out<Handle>) -> Outcome<()> {
    let parse = |text: &str| u32::from_str_radix(text, 16).map_err(|_| Code::INVALID_ARGUMENT);
    let mut parts = text.rsplitn(3, ':');
    let slot = parts.next().unwrap_or_default();
    let bus = parse(parts.next().ok_or(Code::INVALID_ARGUMENT)?)?;
    let domain = parts.next().map_or(Ok(0), parse)?;
    let slot = parse(slot.split('.').next().unwrap_or_default())?;
    let found = call.config().gpus.iter().position(|gpu| domain == 0 && slot == 0 && gpu.bus == bus);
    device.put(Handle::of(Target::Gpu(found.ok_or(Code::NOT_FOUND)?)))
}

/// The GPU of a GPU or MIG handle.
fn parent(call: &Call, device: Handle) -> Outcome<usize> {
    let now = call.now()?;
    Ok(call.device(&now.state, device)?.gpu())
}

/// GPU, GI id and CI id of a MIG handle; a GPU's is the wrong kind.
#[cfg(not(feature = "old-driver"))]
fn mig_only(call: &Call, device: Handle) -> Outcome<(usize, u32, u32)> {
    let now = call.now()?;
    match call.device(&now.state, device)? {
        Device::Gpu(_) => Err(Code::NOT_SUPPORTED),
        Device::Mig(gpu, gi, ci) => Ok((gpu, gi.id, ci.id)),
    }
}

#[cfg(not(feature = "old-driver"))]
fn mig_attributes(call: &Call, device: Handle) -> Outcome<nvml::nvmlDeviceAttributes_t> {
    let now = call.now()?;
    let Device::Mig(gpu, gi, ci) = call.device(&now.state, device)? else { return Err(Code::NOT_SUPPORTED) };
    let owner = owner(call.board(gpu)?, gi)?;
    let profile = rules::ci_profile(owner, ci.profile, Code::UNKNOWN)?;
    Ok(nvml::nvmlDeviceAttributes_t {
        multiprocessorCount: profile.sm,
        sharedCopyEngineCount: owner.copy_engines,
        sharedDecoderCount: owner.engines.decoders,
        sharedEncoderCount: owner.engines.encoders,
        sharedJpegCount: owner.engines.jpeg,
        sharedOfaCount: owner.engines.ofa,
        gpuInstanceSliceCount: owner.slices,
        computeInstanceSliceCount: profile.slices,
        memorySizeMB: owner.memory_mib,
    })
}

fn memory_bytes(call: &Call, device: Handle) -> Outcome<u64> {
    let now = call.now()?;
    let device = call.device(&now.state, device)?;
    let board = call.board(device.gpu())?;
    match device {
        Device::Gpu(_) => Ok(board.memory_mib * MIB),
        Device::Mig(_, gi, _) => Ok(owner(board, gi)?.memory_mib * MIB),
    }
}

#[cfg(not(feature = "old-driver"))]
fn processes(call: &Call, state: &State, device: Device<'_>) -> Vec<nvml::nvmlProcessInfo_v2_st> {
    let holds = state.holds.iter().filter(|hold| match device {
        Device::Gpu(gpu) => hold.gpu == gpu,
        Device::Mig(gpu, gi, ci) => hold.gpu == gpu && hold.gi == Some(gi.id) && first_ci(gi) == ci.id,
    });
    holds
        .filter_map(|hold| {
            let gi = hold.gi.and_then(|id| state.gpus.get(hold.gpu)?.gi(id));
            Some(nvml::nvmlProcessInfo_v2_st {
                pid: hold.pid?,
                usedGpuMemory: call.board(hold.gpu).map_or(0, |board| board.memory_mib) * MIB / 64,
                gpuInstanceId: gi.map_or(NOT_APPLICABLE, |gi| gi.id),
                computeInstanceId: gi.map_or(NOT_APPLICABLE, first_ci),
            })
        })
        .collect()
}

/// A client holds a GPU instance through its first compute instance.
#[cfg(not(feature = "old-driver"))]
fn first_ci(gi: &Gi) -> u32 {
    gi.cis.first().map_or(NOT_APPLICABLE, |ci| ci.id)
}

#[cfg(not(feature = "old-driver"))]
fn list<T: Copy>(all: &[T], count: &Out<c_uint>, room: &Array<T>) -> Outcome<()> {
    let given = count.get()? as usize;
    count.put(all.len() as u32)?;
    if given < all.len() || (room.is_null() && !all.is_empty()) {
        return Err(Code::INSUFFICIENT_SIZE);
    }
    room.fill(all)
}

fn owner<'b>(board: &'b Board, gi: &Gi) -> Outcome<&'b GiProfile> {
    rules::profile(board, gi.profile, Code::UNKNOWN)
}

fn gi_profile_by_index(board: &Board, index: u32) -> Outcome<&GiProfile> {
    if index >= GI_PROFILE_COUNT {
        return Err(Code::INVALID_ARGUMENT);
    }
    board.profile_by_index(index).ok_or(Code::NOT_SUPPORTED)
}

#[cfg(not(feature = "old-driver"))]
fn put_gi_profile(profile: &GiProfile, info: &Versioned) -> Outcome<()> {
    let name = name_field(&format!("MIG {}", profile.name));
    match info.version()? {
        GI_INFO_V2 => info.put(nvml::nvmlGpuInstanceProfileInfo_v2_t {
            version: GI_INFO_V2,
            id: profile.id,
            isP2pSupported: profile.p2p.into(),
            sliceCount: profile.slices,
            instanceCount: profile.count,
            multiprocessorCount: profile.sm,
            copyEngineCount: profile.copy_engines,
            decoderCount: profile.engines.decoders,
            encoderCount: profile.engines.encoders,
            jpegCount: profile.engines.jpeg,
            ofaCount: profile.engines.ofa,
            memorySizeMB: profile.memory_mib,
            name,
        }),
        GI_INFO_V3 => info.put(nvml::nvmlGpuInstanceProfileInfo_v3_t {
            version: GI_INFO_V3,
            id: profile.id,
            sliceCount: profile.slices,
            instanceCount: profile.count,
            multiprocessorCount: profile.sm,
            copyEngineCount: profile.copy_engines,
            decoderCount: profile.engines.decoders,
            encoderCount: profile.engines.encoders,
            jpegCount: profile.engines.jpeg,
            ofaCount: profile.engines.ofa,
            memorySizeMB: profile.memory_mib,
            name,
            // NVML_GPU_INSTANCE_PROFILE_CAPS_P2P and _GFX.
            capabilities: u32::from(profile.p2p) | u32::from(profile.name.ends_with("+gfx")) << 1,
        }),
        _ => Err(Code::INVALID_ARGUMENT),
    }
}

fn gi_placements(
    call: &Call,
    device: Handle,
    profile: u32,
    placements: &Array<nvml::nvmlGpuInstancePlacement_t>,
    count: &Out<c_uint>,
) -> Outcome<()> {
    let gpu = call.gpu(device)?;
    call.privileged()?;
    mig_gpu(&call.now()?.state, gpu)?;
    let profile = rules::profile(call.board(gpu)?, profile, Code::NOT_SUPPORTED)?;
    count.put(profile.placements.len() as u32)?;
    let spans = profile.placements.iter();
    let all: Vec<_> =
        spans.map(|span| nvml::nvmlGpuInstancePlacement_t { start: span.start, size: span.size }).collect();
    if placements.is_null() { Ok(()) } else { placements.fill(&all) }
}

fn create_gi(call: &mut Call, device: Handle, profile: u32, at: Option<Span>, out: &Out<Handle>) -> Outcome<()> {
    out.check()?;
    let gpu = call.gpu(device)?;
    call.privileged()?;
    let handle = call.change(gpu, |config, state| {
        let id = rules::create_gi(config, state, gpu, profile, at)?;
        state.gpus[gpu].gi(id).map(|gi| gi_handle(gpu, gi)).ok_or(Code::UNKNOWN)
    })?;
    out.put(handle)
}

fn create_ci(call: &mut Call, instance: Handle, profile: u32, at: Option<Span>, out: &Out<Handle>) -> Outcome<()> {
    out.check()?;
    let Target::Gi { gpu, .. } = instance.target()? else { return Err(Code::INVALID_ARGUMENT) };
    call.privileged()?;
    let handle = call.change(gpu, |config, state| {
        let owner = gi(state, instance)?.1.id;
        let id = rules::create_ci(config, state, gpu, owner, profile, at)?;
        let (_, owner) = gi(state, instance)?;
        owner.cis.iter().find(|ci| ci.id == id).map(|ci| ci_handle(gpu, owner, ci, false)).ok_or(Code::UNKNOWN)
    })?;
    out.put(handle)
}

fn ci_profile_by_index(call: &Call, instance: Handle, index: u32, engines: u32) -> Outcome<(GiProfile, CiProfile)> {
    // NVML_COMPUTE_INSTANCE_ENGINE_PROFILE_SHARED is the only one.
    if index >= CI_PROFILE_COUNT || engines != 0 {
        return Err(Code::INVALID_ARGUMENT);
    }
    let now = call.now()?;
    let (gpu, gi) = gi(&now.state, instance)?;
    let owner = owner(call.board(gpu)?, gi)?;
    let profile = owner.compute.iter().find(|profile| profile.index == index).ok_or(Code::NOT_SUPPORTED)?;
    Ok((owner.clone(), profile.clone()))
}

#[cfg(not(feature = "old-driver"))]
fn put_ci_profile(owner: &GiProfile, profile: &CiProfile, info: &Versioned) -> Outcome<()> {
    let v2 = nvml::nvmlComputeInstanceProfileInfo_v2_t {
        version: CI_INFO_V2,
        id: profile.id,
        sliceCount: profile.slices,
        instanceCount: profile.count,
        multiprocessorCount: profile.sm,
        sharedCopyEngineCount: owner.copy_engines,
        sharedDecoderCount: owner.engines.decoders,
        sharedEncoderCount: owner.engines.encoders,
        sharedJpegCount: owner.engines.jpeg,
        sharedOfaCount: owner.engines.ofa,
        name: name_field(&format!("MIG {}", profile.name)),
    };
    match info.version()? {
        CI_INFO_V2 => info.put(v2),
        CI_INFO_V3 => info.put(nvml::nvmlComputeInstanceProfileInfo_v3_t {
            version: CI_INFO_V3,
            id: v2.id,
            sliceCount: v2.sliceCount,
            instanceCount: v2.instanceCount,
            multiprocessorCount: v2.multiprocessorCount,
            sharedCopyEngineCount: v2.sharedCopyEngineCount,
            sharedDecoderCount: v2.sharedDecoderCount,
            sharedEncoderCount: v2.sharedEncoderCount,
            sharedJpegCount: v2.sharedJpegCount,
            sharedOfaCount: v2.sharedOfaCount,
            name: v2.name,
            // NVML_COMPUTE_INSTANCE_PROFILE_CAPS_GFX.
            capabilities: owner.name.ends_with("+gfx").into(),
        }),
        _ => Err(Code::INVALID_ARGUMENT),
    }
}

fn ci_info(call: &Call, compute: Handle) -> Outcome<nvml::nvmlComputeInstanceInfo_t> {
    let now = call.now()?;
    let (gpu, gi, ci) = ci(&now.state, compute, false)?;
    Ok(nvml::nvmlComputeInstanceInfo_t {
        device: ci_handle(gpu, gi, ci, true).device(),
        gpuInstance: gi_handle(gpu, gi).gpu_instance(),
        id: ci.id,
        profileId: ci.profile,
        placement: nvml::nvmlComputeInstancePlacement_t { start: ci.span.start, size: ci.span.size },
    })
}
