//! The calls that every client may require: see `optional` for the others.

use std::any::Any;
use std::ffi::{c_char, c_int, c_uint, c_ulonglong};
use std::fs;

use nvml_wrapper_sys::bindings as nvml;

use crate::abi::{Array, Handle, In, InText, Out, Target, Text, exports, exports_bare, name_field};
use crate::board::{Board, CiProfile, GiProfile, Span};
use crate::code::{self, Code, Outcome};
use crate::idle;
use crate::load;
use crate::optional;
use crate::rules;
use crate::session::{self, Call, Device, ci, ci_handle, gi, gi_handle, mig_devices, mig_gpu};
use crate::state::{Config, Gi, State};
use crate::stubs;

/// `NVML_GPU_INSTANCE_PROFILE_COUNT` of drivers that know 3_SLICE_GFX.
pub(crate) const GI_PROFILE_COUNT: u32 = 18;
/// `NVML_COMPUTE_INSTANCE_PROFILE_COUNT`
pub(crate) const CI_PROFILE_COUNT: u32 = 9;
pub(crate) const MIB: u64 = 1 << 20;

/// The names of all calls that answer with a code, in the order in which they are counted.
pub fn names() -> Vec<&'static str> {
    let inits = ["nvmlInit_v2", "nvmlInit", "nvmlInitWithFlags"];
    inits.iter().chain(NAMES).chain(optional::NAMES).chain(idle::NAMES).chain(stubs::NAMES).copied().collect()
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
        let gpu = parent(call, device)?;
        mode.put(call.now()?.state.gpus[gpu].persistence.into())
    }

    fn nvmlDeviceGetUtilizationRates(device: Handle, rates: Out<nvml::nvmlUtilization_t>) |call| {
        let gpu = call.gpu(device)?;
        let now = call.now()?;
        let gpu = &now.state.gpus[gpu];
        if gpu.current {
            return Err(Code::NOT_SUPPORTED);
        }
        rates.put(nvml::nvmlUtilization_t { gpu: gpu.load.sm, memory: gpu.load.dram })
    }

    fn nvmlDeviceGetMemoryInfo(device: Handle, memory: Out<nvml::nvmlMemory_t>) |call| {
        let (used, total) = memory_bytes(call, device)?;
        memory.put(nvml::nvmlMemory_t { total, free: total - used, used })
    }

    fn nvmlDeviceGetEccMode(device: Handle, current: Out<c_uint>, pending: Out<c_uint>) |call| {
        call.gpu(device)?;
        pending.check()?;
        current.put(1)?;
        pending.put(1)
    }

    fn nvmlDeviceGetMemoryErrorCounter(
        device: Handle, kind: c_uint, counter: c_uint, place: c_uint, count: Out<c_ulonglong>,
    ) |call| {
        use nvml::{
            nvmlEccCounterType_enum_NVML_VOLATILE_ECC as VOLATILE,
            nvmlMemoryErrorType_enum_NVML_MEMORY_ERROR_TYPE_UNCORRECTED as UNCORRECTED,
            nvmlMemoryLocation_enum_NVML_MEMORY_LOCATION_DRAM as DRAM,
            nvmlMemoryLocation_enum_NVML_MEMORY_LOCATION_SRAM as SRAM,
        };
        let now = call.now()?;
        let volatile = counter == VOLATILE;
        let found = match call.device(&now.state, device)? {
            Device::Mig(_, gi, ci) if (kind, volatile, place) == (UNCORRECTED, true, SRAM) => gi.load.ecc + ci.load.ecc,
            Device::Gpu(gpu) if volatile && !now.state.gpus[gpu].current => match (kind, place) {
                (UNCORRECTED, SRAM) => now.state.gpus[gpu].load.ecc,
                (_, SRAM | DRAM) => 0,
                _ => return Err(Code::NOT_SUPPORTED),
            },
            _ => return Err(Code::NOT_SUPPORTED),
        };
        count.put(found)
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

    fn nvmlDeviceGetMigMode(device: Handle, current: Out<c_uint>, pending: Out<c_uint>) |call| {
        let gpu = call.gpu(device)?;
        let now = call.now()?;
        pending.check()?;
        current.put(now.state.gpus[gpu].current.into())?;
        pending.put(now.state.gpus[gpu].pending.into())
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

    fn nvmlGpuInstanceCreateComputeInstance(instance: Handle, profile: c_uint, compute: Out<Handle>) |call| {
        create_ci(call, instance, profile, None, &compute)
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

pub(crate) fn by_uuid(call: &Call, uuid: &str) -> Outcome<Handle> {
    of_uuid(call.config(), &call.now()?.state, uuid)
}

fn of_uuid(config: &Config, state: &State, uuid: &str) -> Outcome<Handle> {
    if let Some(gpu) = config.gpus.iter().position(|gpu| gpu.uuid == uuid) {
        return Ok(Handle::of(Target::Gpu(gpu)));
    }
    if !uuid.starts_with("GPU-") && !uuid.starts_with("MIG-") {
        return Err(Code::INVALID_ARGUMENT);
    }
    for (gpu, state) in state.gpus.iter().enumerate() {
        for (gi, ci) in mig_devices(state) {
            if uuid == config.mig_uuid(gpu, gi.id, ci.id) || uuid == config.old_mig_uuid(gpu, gi.id, ci.id) {
                return Ok(ci_handle(gpu, gi, ci, true));
            }
        }
    }
    Err(Code::NOT_FOUND)
}

pub(crate) fn by_bus_id(call: &Call, text: &str, device: &Out<Handle>) -> Outcome<()> {
    device.put(of_bus_id(call.config(), text)?)
}

fn of_bus_id(config: &Config, text: &str) -> Outcome<Handle> {
    let parse = |text: &str| u32::from_str_radix(text, 16).map_err(|_| Code::INVALID_ARGUMENT);
    let mut parts = text.rsplitn(3, ':');
    let slot = parts.next().unwrap_or_default();
    let bus = parse(parts.next().ok_or(Code::INVALID_ARGUMENT)?)?;
    let domain = parts.next().map_or(Ok(0), parse)?;
    let slot = parse(slot.split('.').next().unwrap_or_default())?;
    let found = config.gpus.iter().position(|gpu| domain == 0 && slot == 0 && gpu.bus == bus);
    Ok(Handle::of(Target::Gpu(found.ok_or(Code::NOT_FOUND)?)))
}

/// The GPU that a call is about, by its arguments.
pub(crate) fn gpu_of(config: &Config, state: &State, name: &str, args: &[&dyn Any]) -> Option<usize> {
    args.iter().find_map(|arg| {
        if let Some(handle) = arg.downcast_ref::<Handle>() {
            return handle.gpu().ok();
        }
        if let Some(text) = arg.downcast_ref::<InText>() {
            let text = text.get().ok()?;
            return of_uuid(config, state, &text).or_else(|_| of_bus_id(config, &text)).ok()?.gpu().ok();
        }
        let index = arg.downcast_ref::<c_uint>().filter(|_| name.starts_with("nvmlDeviceGetHandleByIndex"));
        index.map(|index| *index as usize)
    })
}

/// The GPU of a GPU or MIG handle.
pub(crate) fn parent(call: &Call, device: Handle) -> Outcome<usize> {
    let now = call.now()?;
    Ok(call.device(&now.state, device)?.gpu())
}

/// Used and total.
pub(crate) fn memory_bytes(call: &Call, device: Handle) -> Outcome<(u64, u64)> {
    let now = call.now()?;
    let device = call.device(&now.state, device)?;
    let board = call.board(device.gpu())?;
    let (used, total) = match device {
        Device::Gpu(gpu) => (load::used_by_gpu(board, &now.state, gpu, &now.state.gpus[gpu]), board.memory_mib),
        Device::Mig(gpu, gi, _) => (load::used_by_instance(board, &now.state, gpu, gi), owner(board, gi)?.memory_mib),
    };
    Ok((used * MIB, total * MIB))
}

pub(crate) fn owner<'b>(board: &'b Board, gi: &Gi) -> Outcome<&'b GiProfile> {
    rules::profile(board, gi.profile, Code::UNKNOWN)
}

pub(crate) fn gi_profile_by_index(board: &Board, index: u32) -> Outcome<&GiProfile> {
    if index >= GI_PROFILE_COUNT {
        return Err(Code::INVALID_ARGUMENT);
    }
    board.profile_by_index(index).ok_or(Code::NOT_SUPPORTED)
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

pub(crate) fn create_gi(
    call: &mut Call,
    device: Handle,
    profile: u32,
    at: Option<Span>,
    out: &Out<Handle>,
) -> Outcome<()> {
    out.check()?;
    let gpu = call.gpu(device)?;
    call.privileged()?;
    let handle = call.change(gpu, |config, state| {
        let id = rules::create_gi(config, state, gpu, profile, at)?;
        state.gpus[gpu].gi(id).map(|gi| gi_handle(gpu, gi)).ok_or(Code::UNKNOWN)
    })?;
    out.put(handle)
}

pub(crate) fn create_ci(
    call: &mut Call,
    instance: Handle,
    profile: u32,
    at: Option<Span>,
    out: &Out<Handle>,
) -> Outcome<()> {
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

pub(crate) fn ci_profile_by_index(
    call: &Call,
    instance: Handle,
    index: u32,
    engines: u32,
) -> Outcome<(GiProfile, CiProfile)> {
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
