//! What GPUs and instances are said to be doing. Nothing here runs; `nvml-sim load` sets the figures.

use crate::board::{Board, GiProfile};
use crate::state::{Gi, Gpu, Hold, Load, State};

/// Memory that a client has which was not told how much, in MiB.
pub fn client_mib(board: &Board, hold: &Hold) -> u64 {
    hold.memory_mib.unwrap_or(board.memory_mib / 64)
}

/// Memory in use in a GPU instance, in MiB: its compute instances share it.
pub fn used_by_instance(board: &Board, state: &State, gpu: usize, gi: &Gi) -> u64 {
    let own = gi.load.memory_mib + gi.cis.iter().map(|ci| ci.load.memory_mib).sum::<u64>();
    let room = board.profile(gi.profile).map_or(0, |profile| profile.memory_mib);
    (own + used_by_clients(board, state, gpu, Some(gi.id))).min(room)
}

/// Memory in use on a GPU and in its instances, in MiB.
pub fn used_by_gpu(board: &Board, state: &State, index: usize, gpu: &Gpu) -> u64 {
    let inside: u64 = gpu.gis.iter().map(|gi| used_by_instance(board, state, index, gi)).sum();
    (gpu.load.memory_mib + inside + used_by_clients(board, state, index, None)).min(board.memory_mib)
}

fn used_by_clients(board: &Board, state: &State, gpu: usize, gi: Option<u32>) -> u64 {
    let listed = state.holds.iter().filter(|hold| (hold.gpu, hold.gi) == (gpu, gi) && hold.pid.is_some());
    listed.map(|hold| client_mib(board, hold)).sum()
}

/// How busy a GPU instance is, in percent of what it has: multiprocessors, memory bandwidth.
pub fn busy(owner: &GiProfile, gi: &Gi) -> (f64, f64) {
    let sms = |profile: u32| owner.compute.iter().find(|known| known.id == profile).map_or(0, |known| known.sm);
    let parts: f64 = gi.cis.iter().map(|ci| f64::from(ci.load.sm) * f64::from(sms(ci.profile))).sum();
    let sm = f64::from(gi.load.sm) + parts / f64::from(owner.sm.max(1));
    let dram = f64::from(gi.load.dram) + gi.cis.iter().map(|ci| f64::from(ci.load.dram)).sum::<f64>();
    (sm.min(100.0), dram.min(100.0))
}

/// Changes the figures that are given.
pub fn set(load: &mut Load, memory_mib: Option<u64>, sm: Option<u32>, dram: Option<u32>, ecc: Option<u64>) {
    load.memory_mib = memory_mib.unwrap_or(load.memory_mib);
    load.sm = sm.unwrap_or(load.sm);
    load.dram = dram.unwrap_or(load.dram);
    load.ecc = ecc.unwrap_or(load.ecc);
}
