//! The calls that a client can do without. Some driver lacks some of them: see `branch`.

use std::ffi::c_uint;

use nvml_wrapper_sys::bindings as nvml;

use crate::abi::{Array, Handle, In, InText, Out, Target, Versioned, exports, name_field};
use crate::board::{CiProfile, GiProfile, Span};
use crate::calls::{
    MIB, by_bus_id, by_uuid, ci_profile_by_index, create_ci, create_gi, gi_profile_by_index, memory_bytes, owner,
    parent,
};
use crate::code::{Code, Outcome};
use crate::gpm;
use crate::load;
use crate::rules;
use crate::session::{Call, Device, ci_handle, gi, mig_devices, mig_gpu};
use crate::state::{Gi, State};

const NOT_APPLICABLE: u32 = u32::MAX;
/// `sizeof` in the low bytes, the version in the top one, as `NVML_STRUCT_VERSION` makes it.
const GI_INFO_V2: u32 = 0x0200_0098;
const GI_INFO_V3: u32 = 0x0300_0098;
const CI_INFO_V2: u32 = 0x0200_0088;
const CI_INFO_V3: u32 = 0x0300_008c;
const MEMORY_V2: u32 = 0x0200_0028;
const UUID_V1: u32 = 0x0100_0034;

exports! {
    fn nvmlDeviceGetHandleByUUIDV(uuid: Versioned, device: Out<Handle>) |call| {
        if uuid.version()? != UUID_V1 {
            return Err(Code::INVALID_ARGUMENT);
        }
        // nvmlUUID_v1_t: version, type, 41 bytes of text or 16 of binary.
        let words: [u8; 49] = uuid.get()?;
        let text = match words[4] {
            1 => String::from_utf8_lossy(&words[8..]).split('\0').next().unwrap_or_default().to_owned(),
            2 => binary_uuid(&words[8..24]),
            _ => return Err(Code::INVALID_ARGUMENT),
        };
        device.put(by_uuid(call, &text)?)
    }

    fn nvmlDeviceGetHandleByPciBusId_v2(bus_id: InText, device: Out<Handle>) |call| {
        by_bus_id(call, &bus_id.get()?, &device)
    }

    fn nvmlDeviceGetMemoryInfo_v2(device: Handle, memory: Versioned) |call| {
        if memory.version()? != MEMORY_V2 {
            return Err(Code::INVALID_ARGUMENT);
        }
        let (used, total) = memory_bytes(call, device)?;
        memory.put(nvml::nvmlMemory_v2_t { version: MEMORY_V2, total, reserved: 0, free: total - used, used })
    }

    fn nvmlDeviceGetComputeRunningProcesses(
        device: Handle, count: Out<c_uint>, infos: Array<nvml::nvmlProcessInfo_v1_t>,
    ) |call| {
        let now = call.now()?;
        let found = processes(call, &now.state, call.device(&now.state, device)?);
        let short = |one: &nvml::nvmlProcessInfo_v2_st| nvml::nvmlProcessInfo_v1_t {
            pid: one.pid,
            usedGpuMemory: one.usedGpuMemory,
        };
        list(&found.iter().map(short).collect::<Vec<_>>(), &count, &infos)
    }

    fn nvmlDeviceGetComputeRunningProcesses_v2(
        device: Handle, count: Out<c_uint>, infos: Array<nvml::nvmlProcessInfo_v2_st>,
    ) |call| {
        let now = call.now()?;
        list(&processes(call, &now.state, call.device(&now.state, device)?), &count, &infos)
    }

    fn nvmlDeviceGetComputeRunningProcesses_v3(
        device: Handle, count: Out<c_uint>, infos: Array<nvml::nvmlProcessInfo_v2_st>,
    ) |call| {
        let now = call.now()?;
        list(&processes(call, &now.state, call.device(&now.state, device)?), &count, &infos)
    }

    fn nvmlDeviceGetGraphicsRunningProcesses(
        device: Handle, count: Out<c_uint>, infos: Array<nvml::nvmlProcessInfo_v1_t>,
    ) |call| {
        parent(call, device)?;
        list(&[], &count, &infos)
    }

    fn nvmlDeviceGetGraphicsRunningProcesses_v2(
        device: Handle, count: Out<c_uint>, infos: Array<nvml::nvmlProcessInfo_v2_st>,
    ) |call| {
        parent(call, device)?;
        list(&[], &count, &infos)
    }

    fn nvmlDeviceGetGraphicsRunningProcesses_v3(
        device: Handle, count: Out<c_uint>, infos: Array<nvml::nvmlProcessInfo_v2_st>,
    ) |call| {
        parent(call, device)?;
        list(&[], &count, &infos)
    }

    fn nvmlDeviceGetMPSComputeRunningProcesses(
        device: Handle, count: Out<c_uint>, infos: Array<nvml::nvmlProcessInfo_v1_t>,
    ) |call| {
        parent(call, device)?;
        list(&[], &count, &infos)
    }

    fn nvmlDeviceGetMPSComputeRunningProcesses_v2(
        device: Handle, count: Out<c_uint>, infos: Array<nvml::nvmlProcessInfo_v2_st>,
    ) |call| {
        parent(call, device)?;
        list(&[], &count, &infos)
    }

    fn nvmlDeviceGetMPSComputeRunningProcesses_v3(
        device: Handle, count: Out<c_uint>, infos: Array<nvml::nvmlProcessInfo_v2_st>,
    ) |call| {
        parent(call, device)?;
        list(&[], &count, &infos)
    }

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

    fn nvmlDeviceGetMaxMigDeviceCount(device: Handle, count: Out<c_uint>) |call| {
        let gpu = call.gpu(device)?;
        let on = call.now()?.state.gpus[gpu].current;
        count.put(if on { call.board(gpu)?.max_mig_devices } else { 0 })
    }

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

    fn nvmlDeviceIsMigDeviceHandle(device: Handle, is_mig: Out<c_uint>) |call| {
        let now = call.now()?;
        is_mig.put(matches!(call.device(&now.state, device)?, Device::Mig(..)).into())
    }

    fn nvmlDeviceGetDeviceHandleFromMigDeviceHandle(mig: Handle, device: Out<Handle>) |call| {
        device.put(Handle::of(Target::Gpu(mig_only(call, mig)?.0)))
    }

    fn nvmlDeviceGetGpuInstanceId(device: Handle, id: Out<c_uint>) |call| { id.put(mig_only(call, device)?.1) }

    fn nvmlDeviceGetComputeInstanceId(device: Handle, id: Out<c_uint>) |call| { id.put(mig_only(call, device)?.2) }

    fn nvmlDeviceGetAttributes_v2(device: Handle, attributes: Out<nvml::nvmlDeviceAttributes_t>) |call| {
        attributes.put(mig_attributes(call, device)?)
    }

    fn nvmlDeviceGetAttributes(device: Handle, attributes: Out<nvml::nvmlDeviceAttributes_t>) |call| {
        attributes.put(mig_attributes(call, device)?)
    }

    fn nvmlDeviceGetGpuInstanceProfileInfoV(device: Handle, profile: c_uint, info: Versioned) |call| {
        put_gi_profile(gi_profile_by_index(call.board(call.gpu(device)?)?, profile)?, &info)
    }

    fn nvmlDeviceGetGpuInstanceProfileInfoByIdV(device: Handle, profile: c_uint, info: Versioned) |call| {
        let board = call.board(call.gpu(device)?)?;
        put_gi_profile(rules::profile(board, profile, Code::NOT_SUPPORTED)?, &info)
    }

    fn nvmlDeviceGetGpuInstanceRemainingCapacity(device: Handle, profile: c_uint, count: Out<c_uint>) |call| {
        let gpu = call.gpu(device)?;
        call.privileged()?;
        let now = call.now()?;
        let (state, board) = (mig_gpu(&now.state, gpu)?, call.board(gpu)?);
        count.put(rules::gi_capacity(board, state, rules::profile(board, profile, Code::NOT_SUPPORTED)?))
    }

    fn nvmlDeviceCreateGpuInstance(device: Handle, profile: c_uint, instance: Out<Handle>) |call| {
        create_gi(call, device, profile, None, &instance)
    }

    fn nvmlGpuInstanceGetComputeInstanceProfileInfoV(
        instance: Handle, profile: c_uint, engines: c_uint, info: Versioned,
    ) |call| {
        let (owner, profile) = ci_profile_by_index(call, instance, profile, engines)?;
        put_ci_profile(&owner, &profile, &info)
    }

    fn nvmlGpuInstanceGetComputeInstanceRemainingCapacity(
        instance: Handle, profile: c_uint, count: Out<c_uint>,
    ) |call| {
        call.privileged()?;
        let now = call.now()?;
        let (gpu, gi) = gi(&now.state, instance)?;
        let owner = owner(call.board(gpu)?, gi)?;
        count.put(rules::ci_capacity(owner, gi, rules::ci_profile(owner, profile, Code::NOT_SUPPORTED)?))
    }

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

    fn nvmlGpmQueryDeviceSupport(device: Handle, support: Versioned) |call| {
        if support.version()? != nvml::NVML_GPM_SUPPORT_VERSION {
            return Err(Code::INVALID_ARGUMENT);
        }
        let supported = gpm::supported(call.board(call.gpu(device)?)?).into();
        support.put(nvml::nvmlGpmSupport_t { version: nvml::NVML_GPM_SUPPORT_VERSION, isSupportedDevice: supported })
    }

    fn nvmlGpmSampleAlloc(sample: Out<gpm::Sample>) |_call| {
        sample.check()?;
        sample.put(gpm::allocate())
    }

    fn nvmlGpmSampleFree(sample: gpm::Sample) |_call| { gpm::free(sample) }

    fn nvmlGpmMigSampleGet(device: Handle, instance: c_uint, sample: gpm::Sample) |call| {
        let gpu = call.gpu(device)?;
        let board = call.board(gpu)?;
        if !gpm::supported(board) {
            return Err(Code::NOT_SUPPORTED);
        }
        let now = call.now()?;
        let gi = mig_gpu(&now.state, gpu)?.gi(instance).ok_or(Code::INVALID_ARGUMENT)?;
        let (sm, dram) = load::busy(owner(board, gi)?, gi);
        gpm::fill(sample, gpm::Counters { source: (gpu, gi.birth), sm, dram })
    }

    fn nvmlGpmMetricsGet(request: Versioned) |_call| {
        if request.version()? != nvml::NVML_GPM_METRICS_GET_VERSION {
            return Err(Code::INVALID_ARGUMENT);
        }
        // Clients were built against headers with more or fewer metrics: no more than they ask for is touched.
        let asked: gpm::Request = request.get()?;
        let (before, after) = gpm::pair(asked.sample1, asked.sample2)?;
        let metrics: Array<nvml::nvmlGpmMetric_t> = request.array_after::<gpm::Request, _>();
        let mut wanted = metrics.read(asked.count as usize)?;
        for metric in &mut wanted {
            let found = gpm::metric(metric.metricId, before, after);
            metric.nvmlReturn = found.err().map_or(0, |code| code.0);
            metric.value = found.unwrap_or(0.0);
        }
        metrics.fill(&wanted)
    }

    fn nvmlGpuInstanceCreateComputeInstanceWithPlacement(
        instance: Handle, profile: c_uint, placement: In<nvml::nvmlComputeInstancePlacement_t>, compute: Out<Handle>,
    ) |call| {
        let nvml::nvmlComputeInstancePlacement_t { start, size } = placement.get()?;
        create_ci(call, instance, profile, Some(Span { start, size }), &compute)
    }
}

/// A binary UUID names GPUs only: it has no room for the `GPU-` or `MIG-` that tells them apart.
fn binary_uuid(bytes: &[u8]) -> String {
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("GPU-{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])
}

/// GPU, GI id and CI id of a MIG handle; a GPU's is the wrong kind.
fn mig_only(call: &Call, device: Handle) -> Outcome<(usize, u32, u32)> {
    let now = call.now()?;
    match call.device(&now.state, device)? {
        Device::Gpu(_) => Err(Code::NOT_SUPPORTED),
        Device::Mig(gpu, gi, ci) => Ok((gpu, gi.id, ci.id)),
    }
}

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
                usedGpuMemory: call.board(hold.gpu).map_or(0, |board| load::client_mib(board, hold)) * MIB,
                gpuInstanceId: gi.map_or(NOT_APPLICABLE, |gi| gi.id),
                computeInstanceId: gi.map_or(NOT_APPLICABLE, first_ci),
            })
        })
        .collect()
}

/// A client holds a GPU instance through its first compute instance.
fn first_ci(gi: &Gi) -> u32 {
    gi.cis.first().map_or(NOT_APPLICABLE, |ci| ci.id)
}

fn list<T: Copy>(all: &[T], count: &Out<c_uint>, room: &Array<T>) -> Outcome<()> {
    let given = count.get()? as usize;
    count.put(all.len() as u32)?;
    if given < all.len() || (room.is_null() && !all.is_empty()) {
        return Err(Code::INSUFFICIENT_SIZE);
    }
    room.fill(all)
}

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
