//! GPU performance monitoring: samples of a process, and what two of them come to.

use std::collections::BTreeMap;
use std::ffi::c_uint;
use std::sync::{Mutex, MutexGuard, PoisonError};

use nvml_wrapper_sys::bindings as nvml;

use crate::board::Board;
use crate::code::{Code, Outcome};

/// The handle of a sample buffer. A number, never an address.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Sample(usize);

/// What a sample holds.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Counters {
    /// GPU and birth of the instance.
    pub source: (usize, u32),
    /// Percent of the multiprocessors that were busy.
    pub sm: f64,
    /// Percent of the memory bandwidth.
    pub dram: f64,
}

/// The fields of `nvmlGpmMetricsGet_t` before its metrics.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Request {
    version: c_uint,
    /// How many metrics follow.
    pub count: c_uint,
    /// The earlier sample.
    pub sample1: Sample,
    /// The later one.
    pub sample2: Sample,
}

struct Samples {
    last: usize,
    buffers: BTreeMap<Sample, Option<Counters>>,
}

static SAMPLES: Mutex<Samples> = Mutex::new(Samples { last: 0, buffers: BTreeMap::new() });

fn samples() -> MutexGuard<'static, Samples> {
    SAMPLES.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether a board has these counters: Hopper and later.
pub fn supported(board: &Board) -> bool {
    board.architecture != "Ampere"
}

/// A new, empty buffer.
pub fn allocate() -> Sample {
    let mut samples = samples();
    samples.last += 1;
    let sample = Sample(samples.last);
    samples.buffers.insert(sample, None);
    sample
}

/// Gives a buffer back.
pub fn free(sample: Sample) -> Outcome<()> {
    samples().buffers.remove(&sample).map(drop).ok_or(Code::INVALID_ARGUMENT)
}

/// Fills a buffer.
pub fn fill(sample: Sample, counters: Counters) -> Outcome<()> {
    *samples().buffers.get_mut(&sample).ok_or(Code::INVALID_ARGUMENT)? = Some(counters);
    Ok(())
}

/// What two filled buffers of the same instance hold.
pub fn pair(before: Sample, after: Sample) -> Outcome<(Counters, Counters)> {
    let samples = samples();
    let held = |sample| samples.buffers.get(&sample).copied().flatten().ok_or(Code::INVALID_ARGUMENT);
    let (before, after) = (held(before)?, held(after)?);
    if before.source == after.source { Ok((before, after)) } else { Err(Code::INVALID_ARGUMENT) }
}

/// One metric between two samples: the mean of what was going on.
pub fn metric(id: c_uint, before: Counters, after: Counters) -> Outcome<f64> {
    match id {
        nvml::nvmlGpmMetricId_t_NVML_GPM_METRIC_SM_UTIL | nvml::nvmlGpmMetricId_t_NVML_GPM_METRIC_GRAPHICS_UTIL => {
            Ok((before.sm + after.sm) / 2.0)
        }
        nvml::nvmlGpmMetricId_t_NVML_GPM_METRIC_DRAM_BW_UTIL => Ok((before.dram + after.dram) / 2.0),
        _ => Err(Code::NOT_SUPPORTED),
    }
}
