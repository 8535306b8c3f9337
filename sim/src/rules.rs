//! What the driver allows: placements, ids, budgets, mode switching. Nothing here touches a file.

use std::cmp::Reverse;
use std::collections::BTreeSet;

use crate::board::{Board, CiProfile, Engines, GiProfile, ModeRule, Span};
use crate::code::{Code, Outcome};
use crate::state::{AmpereReset, Ci, Config, Gi, Gpu, IdMap, Load, State};

/// Most compute instances of one GPU instance: ids 0 to 7.
pub const MAX_CIS: u32 = 8;

/// The GPU-instance id at a placement.
pub fn gi_id(board: &Board, map: IdMap, span: Span) -> Option<u32> {
    if board.eighths() {
        return eighths_id(map, span);
    }
    // Largest first, from the left.
    let places: BTreeSet<_> = board.places().map(|span| (Reverse(span.size), span.start)).collect();
    places.into_iter().position(|place| place == (Reverse(span.size), span.start)).map(|id| id as u32)
}

/// The ids of boards that count in eighths: they depend on the chip, too.
fn eighths_id(map: IdMap, span: Span) -> Option<u32> {
    let Span { start, size } = span;
    let mirror = |position: u32, offset: u32| match map {
        IdMap::Canonical => position,
        IdMap::Mirrored => (position + offset) % (2 * offset),
    };
    match size {
        8 => Some(0),
        4 => Some(1 + mirror(start / 4, 1)),
        2 => Some(3 + mirror(start / 2, 2)),
        1 => Some(7 + mirror(start, 4)),
        _ => None,
    }
}

/// The placements that the driver tries, in its order, when none is asked for.
fn in_order(board: &Board, profile: &GiProfile) -> Vec<Span> {
    let size = profile.placements.first().map_or(0, |span| span.size);
    let starts: &[u32] = match (board.eighths(), size) {
        (true, 4) => &[4, 0],
        (true, 2) => &[4, 0, 2, 6],
        (true, 1) => &[6, 4, 5, 0, 1, 2, 3],
        _ => return profile.placements.clone(),
    };
    let spans = starts.iter().map(|&start| Span { start, size });
    spans.filter(|span| profile.placements.contains(span)).collect()
}

/// A usable profile by driver id, or the code that says why not: `unknown` for an id the board lacks.
pub fn profile(board: &Board, id: u32, unknown: Code) -> Outcome<&GiProfile> {
    match board.profile(id) {
        Some(profile) => Ok(profile),
        None if board.unsourced.iter().any(|profile| profile.id == id) => Err(Code::NOT_SUPPORTED),
        None => Err(unknown),
    }
}

fn free(gpu: &Gpu, span: Span) -> bool {
    gpu.gis.iter().all(|gi| !gi.span.overlaps(span))
}

fn made(gpu: &Gpu, profile: &GiProfile) -> u32 {
    gpu.gis.iter().filter(|gi| gi.profile == profile.id).count() as u32
}

/// Whether the media engines that are left suffice: what keeps a plain 1g out beside a `+me.all`.
fn engines_left(board: &Board, gpu: &Gpu, profile: &GiProfile) -> bool {
    let Some(all) = board.engines else { return true };
    let taken = gpu
        .gis
        .iter()
        .filter_map(|gi| board.profile(gi.profile))
        .fold(Engines::default(), |sum, profile| sum.plus(profile.engines));
    taken.plus(profile.engines).fit(all)
}

/// `nvmlDeviceGetGpuInstanceRemainingCapacity`: the free placements, capped by the profile's count.
pub fn gi_capacity(board: &Board, gpu: &Gpu, profile: &GiProfile) -> u32 {
    if !engines_left(board, gpu, profile) {
        return 0;
    }
    let free = profile.placements.iter().filter(|span| free(gpu, **span)).count() as u32;
    free.min(profile.count.saturating_sub(made(gpu, profile)))
}

/// Creates a GPU instance and returns its id.
pub fn create_gi(config: &Config, state: &mut State, index: usize, id: u32, at: Option<Span>) -> Outcome<u32> {
    let (fixed, board) = gpu_config(config, index)?;
    let busy = state.held_whole(index);
    let gpu = state.gpus.get_mut(index).ok_or(Code::INVALID_ARGUMENT)?;
    if !gpu.current {
        return Err(Code::NOT_SUPPORTED);
    }
    let profile = profile(board, id, Code::INVALID_ARGUMENT)?;
    if at.is_some_and(|span| !profile.placements.contains(&span)) {
        return Err(Code::INVALID_ARGUMENT);
    }
    // kmigmgrCreateGPUInstanceCheck: the first instance needs an idle GPU.
    if gpu.gis.is_empty() && busy {
        return Err(Code::IN_USE);
    }
    if made(gpu, profile) >= profile.count || !engines_left(board, gpu, profile) {
        return Err(Code::INSUFFICIENT_RESOURCES);
    }
    let span = match at {
        Some(span) => Some(span).filter(|span| free(gpu, *span)),
        None => in_order(board, profile).into_iter().find(|span| free(gpu, *span)),
    }
    .ok_or(Code::INSUFFICIENT_RESOURCES)?;
    let id = gi_id(board, fixed.id_map, span).ok_or(Code::UNKNOWN)?;
    state.births += 1;
    gpu.gis.push(Gi { id, profile: profile.id, span, birth: state.births, cis: Vec::new(), load: Load::default() });
    gpu.gis.sort_by_key(|gi| gi.id);
    Ok(id)
}

/// Destroys a GPU instance.
pub fn destroy_gi(state: &mut State, index: usize, id: u32) -> Outcome<()> {
    let held = state.held(index, id);
    let gpu = state.gpus.get_mut(index).ok_or(Code::INVALID_ARGUMENT)?;
    let gi = gpu.gi(id).ok_or(Code::INVALID_ARGUMENT)?;
    if held || !gi.cis.is_empty() {
        return Err(Code::IN_USE);
    }
    gpu.gis.retain(|gi| gi.id != id);
    Ok(())
}

fn ci_free(gi: &Gi, span: Span) -> bool {
    gi.cis.iter().all(|ci| !ci.span.overlaps(span))
}

/// Whether the slices and the SMs of the GPU instance leave room for one more of `profile`.
fn ci_budget(owner: &GiProfile, gi: &Gi, profile: &CiProfile) -> bool {
    let taken = |what: fn(&CiProfile) -> u32| -> u32 {
        gi.cis.iter().filter_map(|ci| owner.compute.iter().find(|known| known.id == ci.profile)).map(what).sum()
    };
    taken(|ci| ci.slices) + profile.slices <= owner.slices
        && taken(|ci| ci.sm) + profile.sm <= owner.sm
        && (gi.cis.len() as u32) < MAX_CIS
}

/// A compute-instance profile by driver id.
pub fn ci_profile(owner: &GiProfile, id: u32, unknown: Code) -> Outcome<&CiProfile> {
    owner.compute.iter().find(|profile| profile.id == id).ok_or(unknown)
}

/// `nvmlGpuInstanceGetComputeInstanceRemainingCapacity`.
pub fn ci_capacity(owner: &GiProfile, gi: &Gi, profile: &CiProfile) -> u32 {
    if !ci_budget(owner, gi, profile) {
        return 0;
    }
    let made = gi.cis.iter().filter(|ci| ci.profile == profile.id).count() as u32;
    let free = profile.placements.iter().filter(|span| ci_free(gi, **span)).count() as u32;
    free.min(profile.count.saturating_sub(made))
}

/// Creates a compute instance and returns its id.
pub fn create_ci(config: &Config, state: &mut State, index: usize, gi: u32, id: u32, at: Option<Span>) -> Outcome<u32> {
    let (_, board) = gpu_config(config, index)?;
    let gpu = state.gpus.get_mut(index).ok_or(Code::INVALID_ARGUMENT)?;
    let gi = gpu.gis.iter_mut().find(|known| known.id == gi).ok_or(Code::INVALID_ARGUMENT)?;
    let owner = profile(board, gi.profile, Code::UNKNOWN)?;
    let profile = ci_profile(owner, id, Code::INVALID_ARGUMENT)?;
    if at.is_some_and(|span| !profile.placements.contains(&span)) {
        return Err(Code::INVALID_ARGUMENT);
    }
    if ci_capacity(owner, gi, profile) == 0 {
        return Err(Code::INSUFFICIENT_RESOURCES);
    }
    let span = match at {
        Some(span) => Some(span).filter(|span| ci_free(gi, *span)),
        None => profile.placements.iter().copied().find(|span| ci_free(gi, *span)),
    }
    .ok_or(Code::INSUFFICIENT_RESOURCES)?;
    let id = (0..MAX_CIS).find(|id| gi.cis.iter().all(|ci| ci.id != *id)).ok_or(Code::INSUFFICIENT_RESOURCES)?;
    state.births += 1;
    gi.cis.push(Ci { id, profile: profile.id, span, birth: state.births, load: Load::default() });
    gi.cis.sort_by_key(|ci| ci.id);
    Ok(id)
}

/// Destroys a compute instance.
pub fn destroy_ci(state: &mut State, index: usize, gi: u32, ci: u32) -> Outcome<()> {
    let held = state.held(index, gi);
    let gpu = state.gpus.get_mut(index).ok_or(Code::INVALID_ARGUMENT)?;
    let gi = gpu.gis.iter_mut().find(|known| known.id == gi).ok_or(Code::INVALID_ARGUMENT)?;
    if gi.cis.iter().all(|known| known.id != ci) {
        return Err(Code::INVALID_ARGUMENT);
    }
    if held {
        return Err(Code::IN_USE);
    }
    gi.cis.retain(|known| known.id != ci);
    Ok(())
}

/// Asks for a MIG mode and returns the activation status: `Ok` when it is in effect.
pub fn set_mode(config: &Config, state: &mut State, index: usize, on: bool) -> Outcome<Outcome<()>> {
    let (_, board) = gpu_config(config, index)?;
    let clients = state.holds.iter().any(|hold| hold.gpu == index);
    let gpu = state.gpus.get_mut(index).ok_or(Code::INVALID_ARGUMENT)?;
    if gpu.current == on {
        gpu.pending = on;
        return Ok(Ok(()));
    }
    let busy = clients || !gpu.gis.is_empty();
    match board.mode {
        ModeRule::Immediate if busy => Ok(Err(Code::IN_USE)),
        ModeRule::Immediate => {
            (gpu.current, gpu.pending) = (on, on);
            Ok(Ok(()))
        }
        ModeRule::ResetPersistent => {
            gpu.pending = on;
            if busy {
                return Ok(Err(Code::IN_USE));
            }
            if config.ampere_reset == AmpereReset::Manual {
                return Ok(Err(Code::RESET_REQUIRED));
            }
            gpu.current = on;
            Ok(Ok(()))
        }
    }
}

/// Resets a GPU: its instances and clients are gone, the pending mode is in effect.
pub fn reset(state: &mut State, index: usize) -> Outcome<()> {
    let gpu = state.gpus.get_mut(index).ok_or(Code::INVALID_ARGUMENT)?;
    gpu.gis.clear();
    gpu.load = Load::default();
    gpu.current = gpu.pending;
    state.holds.retain(|hold| hold.gpu != index);
    Ok(())
}

/// Reboots the machine: Ampere remembers its mode, later GPUs come up with MIG off.
pub fn reboot(config: &Config, state: &mut State) -> Outcome<()> {
    for index in 0..state.gpus.len() {
        let (_, board) = gpu_config(config, index)?;
        if let (ModeRule::Immediate, Some(gpu)) = (board.mode, state.gpus.get_mut(index)) {
            gpu.pending = false;
        }
        reset(state, index)?;
    }
    Ok(())
}

fn gpu_config(config: &Config, index: usize) -> Outcome<(&crate::state::GpuConfig, &Board)> {
    config.gpus.get(index).zip(config.board(index)).ok_or(Code::INVALID_ARGUMENT)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::board::tests::board;
    use crate::state::{GpuConfig, Hold, Majors, UuidFormat};

    fn machine(key: &str, id_map: IdMap) -> (Config, State) {
        let config = Config {
            root: "../..".into(),
            driver_version: "580.95.05".into(),
            cuda_version: 13000,
            uuid_format: UuidFormat::New,
            ampere_reset: AmpereReset::Manual,
            majors: Majors { nvidia: 195, caps: 511, uvm: 510, nvlink: 509 },
            boards: vec![board(key)],
            gpus: vec![GpuConfig { board: 0, uuid: "GPU-x".into(), minor: 0, bus: 7, serial: "1".into(), id_map }],
            window: None,
        };
        let state = State { births: 0, gpus: vec![Gpu::new(true)], holds: Vec::new() };
        (config, state)
    }

    /// Creates each profile in turn without a placement, as `nvidia-smi mig -cgi` does with a list.
    fn series(key: &str, map: IdMap, profiles: &[u32]) -> Vec<Outcome<u32>> {
        let (config, mut state) = machine(key, map);
        profiles.iter().map(|&profile| create_gi(&config, &mut state, 0, profile, None)).collect()
    }

    fn ids(ids: &[u32]) -> Vec<Outcome<u32>> {
        ids.iter().copied().map(Ok).collect()
    }

    use IdMap::{Canonical, Mirrored};

    #[test]
    fn both_id_maps_cover_every_placement_once() {
        let starts = |map, size: u32, starts: &[u32]| -> Vec<u32> {
            starts.iter().map(|&start| eighths_id(map, Span { start, size }).unwrap()).collect()
        };
        assert_eq!(starts(Canonical, 4, &[0, 4]), [1, 2]);
        assert_eq!(starts(Mirrored, 4, &[0, 4]), [2, 1]);
        assert_eq!(starts(Canonical, 2, &[0, 2, 4, 6]), [3, 4, 5, 6]);
        assert_eq!(starts(Mirrored, 2, &[0, 2, 4, 6]), [5, 6, 3, 4]);
        assert_eq!(starts(Canonical, 1, &[0, 1, 2, 3, 4, 5, 6]), [7, 8, 9, 10, 11, 12, 13]);
        assert_eq!(starts(Mirrored, 1, &[0, 1, 2, 3, 4, 5, 6]), [11, 12, 13, 14, 7, 8, 9]);
    }

    #[test]
    fn a_board_of_other_places_numbers_them_from_the_largest_on() {
        let mut board = board("a100-sxm4-40gb");
        assert!(board.eighths());
        let last = Span { start: 7, size: 1 };
        board.profiles.iter_mut().find(|profile| profile.id == 19).unwrap().placements.push(last);
        assert!(!board.eighths());
        let ids = |spans: &[(u32, u32)]| -> Vec<Option<u32>> {
            spans.iter().map(|&(start, size)| gi_id(&board, Mirrored, Span { start, size })).collect()
        };
        assert_eq!(ids(&[(0, 8), (0, 4), (4, 4), (6, 2), (0, 1), (7, 1)]), [0, 1, 2, 6, 7, 14].map(Some));
        assert_eq!(ids(&[(1, 2)]), [None]);
    }

    #[test]
    fn four_slice_and_twelfth_boards_ascend() {
        assert_eq!(series("a30-24gb", Canonical, &[14, 14, 5]), ids(&[3, 4, 2]));
        assert_eq!(series("rtx-pro-6000-blackwell-se", Canonical, &[14, 5, 14]), ids(&[3, 2, 4]));
        assert_eq!(series("a30-24gb", Canonical, &[0]), ids(&[0]));
    }

    #[test]
    fn capacity_is_free_placements_capped_by_count() {
        let (config, mut state) = machine("a100-sxm4-40gb", Canonical);
        create_gi(&config, &mut state, 0, 5, Some(Span { start: 0, size: 4 })).unwrap();
        let left = [19, 20, 15, 14, 9, 5, 0].map(|id| {
            let board = &config.boards[0];
            gi_capacity(board, &state.gpus[0], board.profile(id).unwrap())
        });
        assert_eq!(left, [3, 1, 2, 1, 1, 0, 0]);
    }

    #[test]
    fn two_singles_and_a_double_shut_out_a_half() {
        let (config, mut state) = machine("a100-sxm4-40gb", Canonical);
        for profile in [19, 19, 14] {
            create_gi(&config, &mut state, 0, profile, None).unwrap();
        }
        assert_eq!(gi_capacity(&config.boards[0], &state.gpus[0], config.boards[0].profile(9).unwrap()), 0);
    }

    #[test]
    fn media_engines_are_shared_out() {
        let short = Err(Code::INSUFFICIENT_RESOURCES);
        assert_eq!(series("a100-sxm4-40gb", Canonical, &[20, 20]), [Ok(13), short]);
        assert_eq!(series("a30-24gb", Canonical, &[21, 6]), [Ok(3), short]);
        assert_eq!(series("rtx-pro-6000-blackwell-se", Canonical, &[65, 14, 67]), [Ok(3), short, Ok(4)]);
    }

    #[test]
    fn an_explicit_placement_is_checked_before_it_is_taken() {
        let (config, mut state) = machine("a100-sxm4-40gb", Canonical);
        let mut make = |profile, start, size| create_gi(&config, &mut state, 0, profile, Some(Span { start, size }));
        assert_eq!(make(19, 0, 1), Ok(7));
        assert_eq!(make(19, 0, 1), Err(Code::INSUFFICIENT_RESOURCES));
        assert_eq!(make(9, 0, 4), Err(Code::INSUFFICIENT_RESOURCES));
        assert_eq!(make(5, 4, 4), Err(Code::INVALID_ARGUMENT));
        assert_eq!(make(14, 1, 2), Err(Code::INVALID_ARGUMENT));
        assert_eq!(make(3, 0, 1), Err(Code::INVALID_ARGUMENT));
    }

    #[test]
    fn an_unsourced_profile_is_not_supported() {
        assert_eq!(series("b200-180gb", Canonical, &[0, 19]), [Err(Code::NOT_SUPPORTED), Ok(13)]);
    }

    #[test]
    fn ids_are_reused_and_births_are_not() {
        let (config, mut state) = machine("a100-sxm4-40gb", Canonical);
        assert_eq!(create_gi(&config, &mut state, 0, 19, None), Ok(13));
        let first = state.gpus[0].gi(13).unwrap().birth;
        destroy_gi(&mut state, 0, 13).unwrap();
        assert_eq!(create_gi(&config, &mut state, 0, 19, None), Ok(13));
        assert_ne!(state.gpus[0].gi(13).unwrap().birth, first);
    }

    #[test]
    fn compute_instances_share_the_slices_of_their_owner() {
        let (config, mut state) = machine("a100-sxm4-40gb", Canonical);
        let gi = create_gi(&config, &mut state, 0, 9, None).unwrap();
        assert_eq!(create_ci(&config, &mut state, 0, gi, 0, None), Ok(0));
        assert_eq!(create_ci(&config, &mut state, 0, gi, 0, None), Ok(1));
        assert_eq!(create_ci(&config, &mut state, 0, gi, 2, None), Err(Code::INSUFFICIENT_RESOURCES));
        destroy_ci(&mut state, 0, gi, 0).unwrap();
        assert_eq!(create_ci(&config, &mut state, 0, gi, 0, None), Ok(0));
        assert_eq!(create_ci(&config, &mut state, 0, gi, 0, None), Ok(2));
        assert_eq!(create_ci(&config, &mut state, 0, gi, 0, None), Err(Code::INSUFFICIENT_RESOURCES));
        assert_eq!(create_ci(&config, &mut state, 0, gi, 3, None), Err(Code::INVALID_ARGUMENT));
    }

    #[test]
    fn compute_instances_share_the_sms_of_their_owner() {
        let (config, mut state) = machine("h100-sxm-80gb", Canonical);
        let gi = create_gi(&config, &mut state, 0, 15, None).unwrap();
        assert_eq!(create_ci(&config, &mut state, 0, gi, 0, None), Err(Code::INVALID_ARGUMENT));
        assert_eq!(create_ci(&config, &mut state, 0, gi, 7, None), Ok(0));
        assert_eq!(create_ci(&config, &mut state, 0, gi, 7, None), Err(Code::INSUFFICIENT_RESOURCES));
    }

    #[test]
    fn clients_and_children_keep_an_instance_in_use() {
        let (config, mut state) = machine("a100-sxm4-40gb", Canonical);
        state.holds.push(Hold { gpu: 0, gi: None, pid: None, memory_mib: None });
        assert_eq!(create_gi(&config, &mut state, 0, 19, None), Err(Code::IN_USE));
        state.holds.clear();
        let gi = create_gi(&config, &mut state, 0, 19, None).unwrap();
        state.holds.push(Hold { gpu: 0, gi: None, pid: None, memory_mib: None });
        assert_eq!(create_gi(&config, &mut state, 0, 19, None), Ok(11));
        create_ci(&config, &mut state, 0, gi, 0, None).unwrap();
        assert_eq!(destroy_gi(&mut state, 0, gi), Err(Code::IN_USE));
        state.holds.push(Hold { gpu: 0, gi: Some(gi), pid: None, memory_mib: None });
        assert_eq!(destroy_ci(&mut state, 0, gi, 0), Err(Code::IN_USE));
        state.holds.clear();
        assert_eq!(destroy_ci(&mut state, 0, gi, 0), Ok(()));
        assert_eq!(destroy_gi(&mut state, 0, gi), Ok(()));
    }

    #[test]
    fn ampere_waits_for_a_reset_and_remembers() {
        let (mut config, mut state) = machine("a100-sxm4-40gb", Canonical);
        assert_eq!(set_mode(&config, &mut state, 0, false), Ok(Err(Code::RESET_REQUIRED)));
        assert_eq!((state.gpus[0].current, state.gpus[0].pending), (true, false));
        create_gi(&config, &mut state, 0, 19, None).unwrap();
        reset(&mut state, 0).unwrap();
        assert_eq!((state.gpus[0].current, state.gpus[0].gis.len()), (false, 0));
        set_mode(&config, &mut state, 0, true).unwrap().unwrap_err();
        reboot(&config, &mut state).unwrap();
        assert!(state.gpus[0].current);
        create_gi(&config, &mut state, 0, 19, None).unwrap();
        assert_eq!(set_mode(&config, &mut state, 0, false), Ok(Err(Code::IN_USE)));
        config.ampere_reset = AmpereReset::Auto;
        reset(&mut state, 0).unwrap();
        assert_eq!(set_mode(&config, &mut state, 0, true), Ok(Ok(())));
        assert!(state.gpus[0].current);
    }

    #[test]
    fn hopper_switches_at_once_and_forgets() {
        let (config, mut state) = machine("h100-sxm-80gb", Canonical);
        create_gi(&config, &mut state, 0, 19, None).unwrap();
        assert_eq!(set_mode(&config, &mut state, 0, false), Ok(Err(Code::IN_USE)));
        assert_eq!((state.gpus[0].current, state.gpus[0].pending), (true, true));
        destroy_gi(&mut state, 0, 13).unwrap();
        assert_eq!(set_mode(&config, &mut state, 0, false), Ok(Ok(())));
        assert_eq!(set_mode(&config, &mut state, 0, true), Ok(Ok(())));
        reboot(&config, &mut state).unwrap();
        assert!(!state.gpus[0].current);
        assert_eq!(create_gi(&config, &mut state, 0, 19, None), Err(Code::NOT_SUPPORTED));
    }
}
