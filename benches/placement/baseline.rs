//! What the product is compared with: how others choose, by what is read in their sources and papers. None of it ships.

use std::collections::BTreeMap;

use mig_hook::gpu::{Device, Placement, Profile, ProfileId};
use mig_hook::profile;
use mig_hook::request::Want;

use super::node::{Node, Spot};

/// Placements that are tried for a request of several slices.
const TRIALS: u32 = 20_000;
/// What FGD takes for a typical request: shares, in twentieths, of the six plain profiles of an eight-slice board, smallest
/// first. On other boards all profiles count alike.
const TYPICAL: [u32; 6] = [6, 3, 4, 3, 2, 2];

/// A way to choose.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rule {
    /// First GPU, lowest start; several slices in the order of the request, and no choice is taken back (InstaSlice, and
    /// the first match of the NVIDIA DRA driver).
    FirstFit,
    /// First GPU, and there by a fixed list of starts: those first that lie in the way of the fewest placements.
    StaticStarts,
    /// Most free slices first; HAMi's starts: highest for 1g and 3g, else lowest. HAMi's default.
    HamiSpread,
    /// Fewest free slices first, HAMi's starts.
    HamiBinpack,
    /// Fewest free slices first, lowest start.
    BestFit,
    /// Least growth of a fragmentation score: over the profiles no larger than what is free, the sizes of their placements
    /// that are not free (MFI, arXiv 2511.18906).
    Mfi,
    /// Fewest placements lost.
    Dcc,
    /// Least growth of the free slices that a typical request cannot use (FGD, USENIX ATC 2023).
    Fgd,
}

/// The same on every GPU of a model.
#[derive(Debug)]
struct Board {
    profiles: BTreeMap<String, Profile>,
    slices: u32,
    /// What the rule keeps low, or high, for every mask of occupied slices.
    score: Vec<i64>,
}

/// What is taken on one GPU.
#[derive(Debug, Clone, Default)]
struct State {
    mask: u32,
    /// Instances of profiles with an attribute, of which there are fewer than placements.
    limited: Vec<ProfileId>,
}

/// A node on which such a rule decides.
#[derive(Debug)]
pub struct Baseline {
    rule: Rule,
    boards: Vec<Board>,
    states: Vec<State>,
}

impl Baseline {
    pub fn new(devices: &[Device], rule: Rule) -> Baseline {
        let boards: Vec<Board> = devices.iter().map(|device| Board::of(device, rule)).collect();
        Baseline { rule, states: vec![State::default(); boards.len()], boards }
    }

    fn place_from(&mut self, wants: &[&Want], order: &[usize], spots: &mut [Option<Spot>], trials: &mut u32) -> bool {
        let Some((&first, rest)) = order.split_first() else { return true };
        let mut options = self.options(wants[first]);
        if self.rule == Rule::FirstFit {
            options.truncate(1);
        }
        for (_, spot) in options {
            if *trials == 0 {
                return false;
            }
            *trials -= 1;
            let before = self.states[spot.gpu].clone();
            self.take(spot);
            spots[first] = Some(spot);
            if self.place_from(wants, rest, spots, trials) {
                return true;
            }
            self.states[spot.gpu] = before;
        }
        false
    }

    fn take(&mut self, spot: Spot) {
        let state = &mut self.states[spot.gpu];
        state.mask |= spot.at.mask();
        if self.boards[spot.gpu].is_limited(spot.profile) {
            state.limited.push(spot.profile);
        }
    }

    /// Every spot for one slice, best first.
    fn options(&self, want: &Want) -> Vec<([i64; 4], Spot)> {
        let mut options = Vec::new();
        for (gpu, (board, state)) in self.boards.iter().zip(&self.states).enumerate() {
            let Some(profile) = board.profiles.get(&want.to_string()) else { continue };
            let made = state.limited.iter().filter(|id| **id == profile.id).count();
            if made >= profile.max_instances as usize {
                continue;
            }
            for at in profile.placements.iter().filter(|at| at.mask() & state.mask == 0) {
                let spot = Spot { gpu, profile: profile.id, at: *at };
                options.push((self.cost(board, &profile.name, state.mask, spot), spot));
            }
        }
        options.sort_unstable_by_key(|(cost, _)| *cost);
        options
    }

    /// Lower is better; no two spots cost the same.
    fn cost(&self, board: &Board, name: &str, before: u32, spot: Spot) -> [i64; 4] {
        let (gpu, start) = (spot.gpu as i64, i64::from(spot.at.start));
        let free = i64::from(board.slices) - i64::from(before.count_ones());
        let change = || board.score[(before | spot.at.mask()) as usize] - board.score[before as usize];
        let hami = if name.starts_with("1g.") || name.starts_with("3g.") { -start } else { start };
        match self.rule {
            Rule::FirstFit => [gpu, start, 0, 0],
            Rule::StaticStarts => [gpu, board.score[0] - board.score[spot.at.mask() as usize], start, 0],
            Rule::HamiSpread => [-free, gpu, hami, 0],
            Rule::HamiBinpack => [free, gpu, hami, 0],
            Rule::BestFit => [free, gpu, start, 0],
            Rule::Mfi => [change(), gpu, start, 0],
            Rule::Dcc => [-change(), free, gpu, start],
            Rule::Fgd => [change(), free, gpu, start],
        }
    }
}

impl Node for Baseline {
    fn place(&mut self, wants: &[Want]) -> Option<Vec<Spot>> {
        let hardness = |want: &Want| {
            let name = want.to_string();
            let profiles = || self.boards.iter().filter_map(|board| board.profiles.get(&name));
            let size = profiles().filter_map(|p| p.placements.first()).map(|at| at.size).max();
            let starts = profiles().map(|p| p.placements.len()).min();
            (std::cmp::Reverse(size), starts, !profile::has_attribute(&name))
        };
        let mut order: Vec<usize> = (0..wants.len()).collect();
        if self.rule != Rule::FirstFit && wants.len() > 1 {
            order.sort_by_key(|n| hardness(&wants[*n]));
        }
        let mut spots = vec![None; wants.len()];
        let before = self.states.clone();
        if !self.place_from(&wants.iter().collect::<Vec<_>>(), &order, &mut spots, &mut TRIALS.clone()) {
            self.states = before;
            return None;
        }
        spots.into_iter().collect()
    }

    fn free(&mut self, _wants: &[Want], spots: &[Spot]) {
        for spot in spots {
            let state = &mut self.states[spot.gpu];
            state.mask &= !spot.at.mask();
            if let Some(at) = state.limited.iter().position(|id| *id == spot.profile) {
                state.limited.remove(at);
            }
        }
    }
}

impl Board {
    fn of(device: &Device, rule: Rule) -> Board {
        let windows = || device.profiles.iter().flat_map(|profile| &profile.placements);
        let slices = windows().map(|at| at.start + at.size).max().unwrap_or(0);
        let mut plain: Vec<&Profile> = device.profiles.iter().filter(|p| !profile::has_attribute(&p.name)).collect();
        plain.sort_by_key(|p| (p.placements.first().map(|at| at.size), p.slices));
        let score = |mask: u32| match rule {
            Rule::Mfi => fragmentation(&plain, slices, mask),
            Rule::Fgd => unusable(&plain, slices, mask),
            _ => plain.iter().flat_map(|p| &p.placements).filter(|at| at.mask() & mask == 0).count() as i64,
        };
        let profiles = device.profiles.iter().map(|profile| (profile.name.clone(), profile.clone())).collect();
        Board { profiles, slices, score: (0..1 << slices).map(score).collect() }
    }

    fn is_limited(&self, id: ProfileId) -> bool {
        self.profiles.values().any(|p| p.id == id && profile::has_attribute(&p.name))
    }
}

fn free_slices(slices: u32, mask: u32) -> u32 {
    slices - mask.count_ones()
}

fn fragmentation(plain: &[&Profile], slices: u32, mask: u32) -> i64 {
    let fitting = |at: &&Placement| at.size <= free_slices(slices, mask);
    let blocked = plain.iter().flat_map(|p| &p.placements).filter(fitting).filter(|at| at.mask() & mask != 0);
    blocked.map(|at| i64::from(at.size)).sum()
}

fn unusable(plain: &[&Profile], slices: u32, mask: u32) -> i64 {
    let share = |n: usize| if plain.len() == TYPICAL.len() { TYPICAL[n] } else { 1 };
    let of = |(n, profile): (usize, &&Profile)| {
        let usable = profile.placements.iter().map(|at| at.mask()).filter(|window| window & mask == 0);
        let usable = usable.fold(0, |all, window| all | window).count_ones();
        i64::from(share(n)) * i64::from(free_slices(slices, mask) - usable)
    };
    plain.iter().enumerate().map(of).sum()
}
