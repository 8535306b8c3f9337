//! What a GPU tells of itself while nobody uses it: fixed figures of its board, and what is off, empty or nought.
//!
//! A board whose figures nobody has published answers NOT_SUPPORTED. Video engines, cores and sampled figures of a whole
//! GPU can't be asked for while MIG is on.

use std::ffi::{c_int, c_uint, c_ulong, c_ulonglong};
use std::fs;
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nvml_wrapper_sys::bindings as nvml;
use nvml_wrapper_sys::bindings::field_id::{NVML_FI_DEV_ECC_CURRENT, NVML_FI_DEV_ECC_PENDING};

use crate::abi::{Array, Handle, In, Out, Target, Text, Versioned, exports};
use crate::board::Figures;
use crate::code::{Code, Outcome};
use crate::session::Call;

/// Lanes of a board.
const LANES: u32 = 16;
/// What nvidia-smi shows as `Accounting Mode Buffer Size`.
const ACCOUNTING_BUFFER: u32 = 4000;
/// Period in which video engines are sampled, in microseconds.
const SAMPLED: u32 = 167_000;
/// `sizeof` in the low bytes, the version in the top one.
const TEMPERATURE_V1: u32 = 0x0100_000c;
const CELSIUS: u32 = 30;
/// `NVML_GSP_FIRMWARE_VERSION_BUF_SIZE`
const GSP_VERSION: u32 = 0x40;

exports! {
    fn nvmlDeviceGetBusType(device: Handle, kind: Out<c_uint>) |call| { tell(call, device, &kind, nvml::NVML_BUS_TYPE_PCIE) }

    fn nvmlDeviceGetBoardId(device: Handle, id: Out<c_uint>) |call| {
        let gpu = call.gpu(device)?;
        id.put(call.config().gpus[gpu].bus << 8)
    }

    fn nvmlDeviceGetMultiGpuBoard(device: Handle, several: Out<c_uint>) |call| { tell(call, device, &several, 0) }

    fn nvmlDeviceGetIrqNum(device: Handle, irq: Out<c_uint>) |call| {
        let gpu = call.gpu(device)?;
        irq.put(crate::layout::irq(call.config().gpus[gpu].minor))
    }

    fn nvmlDeviceGetNumGpuCores(device: Handle, cores: Out<c_uint>) |call| {
        mig_off(call, device)?;
        cores.put(figures(call, device)?.cores)
    }

    fn nvmlDeviceGetMemoryBusWidth(device: Handle, bits: Out<c_uint>) |call| {
        bits.put(figures(call, device)?.memory_bus_bits)
    }

    fn nvmlDeviceGetMaxPcieLinkGeneration(device: Handle, generation: Out<c_uint>) |call| {
        generation.put(figures(call, device)?.pcie_generation)
    }

    fn nvmlDeviceGetGpuMaxPcieLinkGeneration(device: Handle, generation: Out<c_uint>) |call| {
        generation.put(figures(call, device)?.pcie_generation)
    }

    fn nvmlDeviceGetCurrPcieLinkGeneration(device: Handle, generation: Out<c_uint>) |call| {
        generation.put(figures(call, device)?.pcie_generation)
    }

    fn nvmlDeviceGetMaxPcieLinkWidth(device: Handle, lanes: Out<c_uint>) |call| { tell(call, device, &lanes, LANES) }

    fn nvmlDeviceGetCurrPcieLinkWidth(device: Handle, lanes: Out<c_uint>) |call| { tell(call, device, &lanes, LANES) }

    fn nvmlDeviceGetPcieLinkMaxSpeed(device: Handle, speed: Out<c_uint>) |call| {
        // NVML_PCIE_LINK_MAX_SPEED_*: numbered by the generation.
        speed.put(figures(call, device)?.pcie_generation)
    }

    fn nvmlDeviceGetPcieSpeed(device: Handle, megabits: Out<c_uint>) |call| {
        let generation = figures(call, device)?.pcie_generation;
        megabits.put(if generation < 5 { 16_000 } else { 32_000 })
    }

    fn nvmlDeviceGetPcieReplayCounter(device: Handle, count: Out<c_uint>) |call| { tell(call, device, &count, 0) }

    fn nvmlDeviceGetPcieThroughput(device: Handle, _counter: c_uint, kilobytes: Out<c_uint>) |call| {
        tell(call, device, &kilobytes, 0)
    }

    fn nvmlDeviceGetComputeMode(device: Handle, mode: Out<c_uint>) |call| {
        tell(call, device, &mode, nvml::nvmlComputeMode_enum_NVML_COMPUTEMODE_DEFAULT)
    }

    fn nvmlDeviceGetDisplayMode(device: Handle, connected: Out<c_uint>) |call| { tell(call, device, &connected, 0) }

    fn nvmlDeviceGetDisplayActive(device: Handle, active: Out<c_uint>) |call| { tell(call, device, &active, 0) }

    fn nvmlDeviceGetPerformanceState(device: Handle, state: Out<c_uint>) |call| { tell(call, device, &state, 0) }

    fn nvmlDeviceGetPowerState(device: Handle, state: Out<c_uint>) |call| { tell(call, device, &state, 0) }

    fn nvmlDeviceGetSupportedPerformanceStates(device: Handle, states: Array<c_uint>, bytes: c_uint) |call| {
        call.gpu(device)?;
        let room = bytes as usize / size_of::<c_uint>();
        let mut all = vec![nvml::nvmlPStates_enum_NVML_PSTATE_UNKNOWN; room];
        *all.first_mut().ok_or(Code::INSUFFICIENT_SIZE)? = 0;
        states.fill(&all)
    }

    fn nvmlDeviceGetCurrentClocksEventReasons(device: Handle, reasons: Out<c_ulonglong>) |call| {
        tell(call, device, &reasons, u64::from(nvml::nvmlClocksEventReasonGpuIdle))
    }

    fn nvmlDeviceGetCurrentClocksThrottleReasons(device: Handle, reasons: Out<c_ulonglong>) |call| {
        tell(call, device, &reasons, u64::from(nvml::nvmlClocksEventReasonGpuIdle))
    }

    fn nvmlDeviceGetSupportedClocksEventReasons(device: Handle, reasons: Out<c_ulonglong>) |call| {
        tell(call, device, &reasons, REASONS)
    }

    fn nvmlDeviceGetSupportedClocksThrottleReasons(device: Handle, reasons: Out<c_ulonglong>) |call| {
        tell(call, device, &reasons, REASONS)
    }

    fn nvmlDeviceGetClockInfo(device: Handle, kind: c_uint, mhz: Out<c_uint>) |call| {
        mhz.put(clocks(&figures(call, device)?, kind)?.0)
    }

    fn nvmlDeviceGetMaxClockInfo(device: Handle, kind: c_uint, mhz: Out<c_uint>) |call| {
        mhz.put(clocks(&figures(call, device)?, kind)?.1)
    }

    fn nvmlDeviceGetMinMaxClockOfPState(
        device: Handle, kind: c_uint, state: c_uint, least: Out<c_uint>, most: Out<c_uint>,
    ) |call| {
        let (idle, highest) = clocks(&figures(call, device)?, kind)?;
        if state != 0 {
            return Err(Code::NOT_SUPPORTED);
        }
        most.check()?;
        least.put(idle)?;
        most.put(highest)
    }

    fn nvmlDeviceGetTemperature(device: Handle, _sensor: c_uint, celsius: Out<c_uint>) |call| {
        tell(call, device, &celsius, CELSIUS)
    }

    fn nvmlDeviceGetTemperatureV(device: Handle, asked: Versioned) |call| {
        call.gpu(device)?;
        if asked.version()? != TEMPERATURE_V1 {
            return Err(Code::INVALID_ARGUMENT);
        }
        let mut answer: nvml::nvmlTemperature_v1_t = asked.get()?;
        answer.temperature = CELSIUS as c_int;
        asked.put(answer)
    }

    fn nvmlDeviceGetPowerUsage(device: Handle, milliwatts: Out<c_uint>) |call| { tell(call, device, &milliwatts, 50_000) }

    fn nvmlDeviceGetTotalEccErrors(device: Handle, kind: c_uint, counter: c_uint, count: Out<c_ulonglong>) |call| {
        mig_off(call, device)?;
        let gpu = call.gpu(device)?;
        let volatile = counter == nvml::nvmlEccCounterType_enum_NVML_VOLATILE_ECC;
        let uncorrected = kind == nvml::nvmlMemoryErrorType_enum_NVML_MEMORY_ERROR_TYPE_UNCORRECTED;
        count.put(if volatile && uncorrected { call.now()?.state.gpus[gpu].load.ecc } else { 0 })
    }

    fn nvmlDeviceGetPowerManagementMode(device: Handle, on: Out<c_uint>) |call| { tell(call, device, &on, 1) }

    fn nvmlDeviceGetPowerSource(device: Handle, source: Out<c_uint>) |call| { tell(call, device, &source, 0) }

    fn nvmlDeviceGetPowerManagementLimit(device: Handle, milliwatts: Out<c_uint>) |call| {
        milliwatts.put(1000 * figures(call, device)?.max_watts)
    }

    fn nvmlDeviceGetPowerManagementDefaultLimit(device: Handle, milliwatts: Out<c_uint>) |call| {
        milliwatts.put(1000 * figures(call, device)?.max_watts)
    }

    fn nvmlDeviceGetEnforcedPowerLimit(device: Handle, milliwatts: Out<c_uint>) |call| {
        milliwatts.put(1000 * figures(call, device)?.max_watts)
    }

    fn nvmlDeviceGetPowerManagementLimitConstraints(device: Handle, least: Out<c_uint>, most: Out<c_uint>) |call| {
        let figures = figures(call, device)?;
        most.check()?;
        least.put(1000 * figures.min_watts)?;
        most.put(1000 * figures.max_watts)
    }

    fn nvmlDeviceGetNumFans(device: Handle, fans: Out<c_uint>) |call| { tell(call, device, &fans, 0) }

    fn nvmlDeviceGetGspFirmwareVersion(device: Handle, version: Text) |call| {
        call.gpu(device)?;
        version.put(&call.config().driver_version, GSP_VERSION)
    }

    fn nvmlDeviceGetGspFirmwareMode(device: Handle, on: Out<c_uint>, by_default: Out<c_uint>) |call| {
        call.gpu(device)?;
        by_default.check()?;
        on.put(1)?;
        by_default.put(1)
    }

    fn nvmlDeviceGetVirtualizationMode(device: Handle, mode: Out<c_uint>) |call| {
        tell(call, device, &mode, nvml::nvmlGpuVirtualizationMode_NVML_GPU_VIRTUALIZATION_MODE_NONE)
    }

    fn nvmlDeviceGetAccountingMode(device: Handle, on: Out<c_uint>) |call| { tell(call, device, &on, 0) }

    fn nvmlDeviceGetAccountingBufferSize(device: Handle, size: Out<c_uint>) |call| {
        tell(call, device, &size, ACCOUNTING_BUFFER)
    }

    fn nvmlDeviceGetAccountingPids(device: Handle, count: Out<c_uint>, _pids: Array<c_uint>) |call| {
        tell(call, device, &count, 0)
    }

    fn nvmlDeviceGetAccountingStats(device: Handle, _pid: c_uint, _stats: Out<nvml::nvmlAccountingStats_t>) |call| {
        call.gpu(device)?;
        Err(Code::NOT_FOUND)
    }

    fn nvmlDeviceGetEncoderUtilization(device: Handle, percent: Out<c_uint>, microseconds: Out<c_uint>) |call| {
        sampled(call, device, &percent, &microseconds)
    }

    fn nvmlDeviceGetDecoderUtilization(device: Handle, percent: Out<c_uint>, microseconds: Out<c_uint>) |call| {
        sampled(call, device, &percent, &microseconds)
    }

    fn nvmlDeviceGetJpgUtilization(device: Handle, percent: Out<c_uint>, microseconds: Out<c_uint>) |call| {
        sampled(call, device, &percent, &microseconds)
    }

    fn nvmlDeviceGetOfaUtilization(device: Handle, percent: Out<c_uint>, microseconds: Out<c_uint>) |call| {
        sampled(call, device, &percent, &microseconds)
    }

    fn nvmlDeviceGetEncoderStats(
        device: Handle, sessions: Out<c_uint>, frames: Out<c_uint>, microseconds: Out<c_uint>,
    ) |call| {
        call.gpu(device)?;
        frames.check()?;
        microseconds.check()?;
        sessions.put(0)?;
        frames.put(0)?;
        microseconds.put(0)
    }

    fn nvmlDeviceGetEncoderSessions(
        device: Handle, count: Out<c_uint>, _sessions: Array<nvml::nvmlEncoderSessionInfo_t>,
    ) |call| {
        tell(call, device, &count, 0)
    }

    fn nvmlDeviceGetFBCStats(device: Handle, stats: Out<nvml::nvmlFBCStats_t>) |call| {
        tell(call, device, &stats, nvml::nvmlFBCStats_t { sessionsCount: 0, averageFPS: 0, averageLatency: 0 })
    }

    fn nvmlDeviceGetFBCSessions(
        device: Handle, count: Out<c_uint>, _sessions: Array<nvml::nvmlFBCSessionInfo_t>,
    ) |call| {
        tell(call, device, &count, 0)
    }

    fn nvmlDeviceGetViolationStatus(device: Handle, _policy: c_uint, time: Out<nvml::nvmlViolationTime_t>) |call| {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        tell(call, device, &time, nvml::nvmlViolationTime_t { referenceTime: now.as_micros() as u64, violationTime: 0 })
    }

    fn nvmlDeviceGetFieldValues(device: Handle, count: c_int, values: Array<nvml::nvmlFieldValue_t>) |call| {
        let now = call.now()?;
        call.device(&now.state, device)?;
        if count < 1 {
            return Err(Code::INVALID_ARGUMENT);
        }
        let mut asked = values.read(count as usize)?;
        for value in &mut asked {
            value.nvmlReturn = match value.fieldId {
                NVML_FI_DEV_ECC_CURRENT | NVML_FI_DEV_ECC_PENDING => {
                    value.valueType = nvml::nvmlValueType_enum_NVML_VALUE_TYPE_UNSIGNED_INT;
                    value.value = nvml::nvmlValue_t { uiVal: 1 };
                    0
                }
                _ => Code::NOT_SUPPORTED.0,
            };
        }
        values.fill(&asked)
    }

    fn nvmlDeviceGetMemoryAffinity(device: Handle, words: c_uint, nodes: Array<c_ulong>, _scope: c_uint) |call| {
        call.gpu(device)?;
        nodes.fill(&bits(&online("node"), words)?)
    }

    fn nvmlDeviceGetCpuAffinityWithinScope(device: Handle, words: c_uint, cpus: Array<c_ulong>, _scope: c_uint) |call| {
        call.gpu(device)?;
        cpus.fill(&bits(&online("cpu"), words)?)
    }

    fn nvmlDeviceGetCpuAffinity(device: Handle, words: c_uint, cpus: Array<c_ulong>) |call| {
        call.gpu(device)?;
        cpus.fill(&bits(&online("cpu"), words)?)
    }

    fn nvmlSystemGetTopologyGpuSet(_cpu: c_uint, count: Out<c_uint>, devices: Array<Handle>) |call| {
        let all: Vec<Handle> = (0..call.config().gpus.len()).map(|gpu| Handle::of(Target::Gpu(gpu))).collect();
        some(&all, &count, &devices)
    }

    fn nvmlDeviceGetTopologyNearestGpus(
        device: Handle, level: c_uint, count: Out<c_uint>, devices: Array<Handle>,
    ) |call| {
        let own = call.gpu(device)?;
        // All are below one host bridge, each in a slot of its own.
        let near = level == nvml::nvmlGpuLevel_enum_NVML_TOPOLOGY_HOSTBRIDGE;
        let others = (0..call.config().gpus.len()).filter(|gpu| near && *gpu != own);
        some(&others.map(|gpu| Handle::of(Target::Gpu(gpu))).collect::<Vec<_>>(), &count, &devices)
    }

    fn nvmlSystemGetHicVersion(count: Out<c_uint>, _cards: Array<nvml::nvmlHwbcEntry_t>) |_call| { count.put(0) }

    fn nvmlUnitGetCount(count: Out<c_uint>) |_call| { count.put(0) }

    fn nvmlGetExcludedDeviceCount(count: Out<c_uint>) |_call| { count.put(0) }

    fn nvmlGetExcludedDeviceInfoByIndex(_index: c_uint, _info: Out<nvml::nvmlExcludedDeviceInfo_t>) |_call| {
        Err(Code::INVALID_ARGUMENT)
    }

    fn nvmlDeviceQueryDrainState(pci: In<nvml::nvmlPciInfo_t>, draining: Out<c_uint>) |call| {
        let wanted = pci.get()?;
        let known = call.config().gpus.iter().any(|gpu| wanted.domain == 0 && gpu.bus == wanted.bus);
        if known { draining.put(0) } else { Err(Code::NOT_FOUND) }
    }

    fn nvmlDeviceDiscoverGpus(pci: In<nvml::nvmlPciInfo_t>) |call| {
        call.privileged()?;
        pci.get().map(drop)
    }

    fn nvmlDeviceGetSupportedEventTypes(device: Handle, kinds: Out<c_ulonglong>) |call| {
        tell(call, device, &kinds, EVENTS)
    }

    fn nvmlEventSetCreate(events: Out<usize>) |_call| { events.put(EVENT_SET) }

    fn nvmlDeviceRegisterEvents(device: Handle, kinds: c_ulonglong, events: usize) |call| {
        call.gpu(device)?;
        event_set(events)?;
        if kinds & !EVENTS == 0 { Ok(()) } else { Err(Code::NOT_SUPPORTED) }
    }

    fn nvmlEventSetWait_v2(events: usize, _data: Out<nvml::nvmlEventData_t>, milliseconds: c_uint) |_call| {
        event_set(events)?;
        thread::sleep(Duration::from_millis(milliseconds.into()));
        Err(Code::TIMEOUT)
    }

    fn nvmlEventSetFree(events: usize) |_call| { event_set(events) }
}

/// Idle, application clocks, power, hardware slowdown, sync boost, thermal and brake slowdown, display: all there are.
const REASONS: u64 = 0x1ff;
/// Memory errors, performance state, XID and clock changes.
const EVENTS: u64 = 0x1f;
/// The handle of every set of events: nothing ever happens, so they are all alike.
const EVENT_SET: usize = 0x4e;

fn event_set(handle: usize) -> Outcome<()> {
    if handle == EVENT_SET { Ok(()) } else { Err(Code::INVALID_ARGUMENT) }
}

/// Answers the same for every GPU.
fn tell<T: Copy>(call: &Call, device: Handle, out: &Out<T>, value: T) -> Outcome<()> {
    call.gpu(device)?;
    out.put(value)
}

fn figures(call: &Call, device: Handle) -> Outcome<Figures> {
    call.board(call.gpu(device)?)?.figures.ok_or(Code::NOT_SUPPORTED)
}

fn mig_off(call: &Call, device: Handle) -> Outcome<()> {
    let gpu = call.gpu(device)?;
    if call.now()?.state.gpus[gpu].current { Err(Code::NOT_SUPPORTED) } else { Ok(()) }
}

fn sampled(call: &Call, device: Handle, percent: &Out<c_uint>, microseconds: &Out<c_uint>) -> Outcome<()> {
    mig_off(call, device)?;
    microseconds.check()?;
    percent.put(0)?;
    microseconds.put(SAMPLED)
}

/// The clock of an idle board, and the highest.
fn clocks(figures: &Figures, kind: u32) -> Outcome<(u32, u32)> {
    match kind {
        nvml::nvmlClockType_enum_NVML_CLOCK_GRAPHICS | nvml::nvmlClockType_enum_NVML_CLOCK_SM => {
            Ok((figures.idle_sm_mhz, figures.max_sm_mhz))
        }
        nvml::nvmlClockType_enum_NVML_CLOCK_MEM => Ok((figures.memory_mhz, figures.memory_mhz)),
        nvml::nvmlClockType_enum_NVML_CLOCK_VIDEO => figures.video_mhz.ok_or(Code::NOT_SUPPORTED),
        _ => Err(Code::INVALID_ARGUMENT),
    }
}

/// A list that is asked for twice: how many, then which.
fn some(all: &[Handle], count: &Out<c_uint>, devices: &Array<Handle>) -> Outcome<()> {
    count.put(all.len() as u32)?;
    if devices.is_null() { Ok(()) } else { devices.fill(all) }
}

/// Processors (`cpu`) or memory nodes (`node`) of this host, as `0-3,8`.
fn online(what: &str) -> String {
    fs::read_to_string(format!("/sys/devices/system/{what}/online")).unwrap_or_else(|_| "0".into())
}

/// A list of numbers as the bits of words; numbers beyond them are left out.
fn bits(list: &str, words: c_uint) -> Outcome<Vec<c_ulong>> {
    let mut bits: Vec<c_ulong> = vec![0; words as usize];
    for range in list.trim().split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (Ok(first), Ok(last)) = (first.parse::<usize>(), last.parse::<usize>()) else { return Err(Code::UNKNOWN) };
        for number in first..=last {
            if let Some(word) = bits.get_mut(number / 64) {
                *word |= 1 << (number % 64);
            }
        }
    }
    if bits.is_empty() { Err(Code::INVALID_ARGUMENT) } else { Ok(bits) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::board::tests::board;

    #[test]
    fn a_list_of_processors_is_a_set_of_bits() {
        assert_eq!(bits("0-3,8\n", 1), Ok(vec![0x10f]));
        assert_eq!(bits("63-64", 2), Ok(vec![1 << 63, 1]));
        assert_eq!(bits("0-200", 1), Ok(vec![u64::MAX]));
        assert_eq!((bits("0", 0), bits("none", 1)), (Err(Code::INVALID_ARGUMENT), Err(Code::UNKNOWN)));
    }

    #[test]
    fn clocks_are_those_of_the_board_and_the_kind() {
        let figures = board("h100-sxm-80gb").figures.unwrap();
        let found = [0, 1, 2, 3, 4].map(|kind| clocks(&figures, kind));
        assert_eq!(found[..2], [Ok((345, 1980)), Ok((345, 1980))]);
        assert_eq!(found[2..], [Ok((2619, 2619)), Ok((765, 1545)), Err(Code::INVALID_ARGUMENT)]);
        let other = board("h100-pcie-80gb").figures.unwrap();
        assert_eq!(clocks(&other, nvml::nvmlClockType_enum_NVML_CLOCK_VIDEO), Err(Code::NOT_SUPPORTED));
        assert_eq!(board("b200-180gb").figures, None);
    }
}
