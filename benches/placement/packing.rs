//! Whether slices fit when all may be moved: in closed form, on nodes of one model. Tells which refusals come from where
//! the running slices lie, and serves as reference: a node that repacks at no cost.

use std::collections::BTreeMap;

use mig_hook::gpu::{Device, Profile};
use mig_hook::profile;
use mig_hook::request::Want;

use super::node::{Node, Spot};

/// What runs on a node, wherever it lies.
#[derive(Debug, Clone)]
pub struct Packing {
    gpus: i64,
    profiles: Vec<Profile>,
    layout: Layout,
    /// Slices by name of profile.
    running: BTreeMap<String, i64>,
}

#[derive(Debug, Clone, Copy)]
enum Layout {
    /// The eight memory and seven compute slices of A100, H100 and their successors.
    Eighths,
    /// Every window is made of whole windows of the next smaller size, from the first slice to the last.
    Nested,
}

impl Packing {
    /// `None` for a node of several models, or of one whose layout is neither.
    pub fn of(devices: &[Device]) -> Option<Packing> {
        let first = devices.first()?;
        let profiles = first.profiles.clone();
        let packing = |layout| Packing { gpus: devices.len() as i64, profiles, layout, running: BTreeMap::new() };
        if devices.iter().any(|device| device.profiles != first.profiles) {
            return None;
        }
        let mut plain: Vec<_> = first.profiles.iter().filter(|p| !profile::has_attribute(&p.name)).collect();
        plain.sort_by_key(|p| (size(p), p.slices));
        let shape: Vec<(u32, u32)> = plain.iter().map(|p| (p.slices, size(p))).collect();
        let slices = slices_of(first);
        let tiles = |p: &&Profile| p.placements.iter().map(|at| at.start).eq((0..slices).step_by(size(p) as usize));
        let nested = plain.windows(2).all(|two| size(two[1]).is_multiple_of(size(two[0])));
        match shape.as_slice() {
            [(1, 1), (1, 2), (2, 2), (3, 4), (4, 4), (7, 8)] => Some(packing(Layout::Eighths)),
            _ if nested && plain.iter().all(tiles) => Some(packing(Layout::Nested)),
            _ => None,
        }
    }

    /// Whether these fit, too.
    pub fn fits(&self, wants: &[Want]) -> bool {
        let mut all = self.running.clone();
        for want in wants {
            *all.entry(want.to_string()).or_default() += 1;
        }
        // Those with an attribute take the room of the plain ones.
        let count = |slices: u32, memory: u32| -> i64 {
            let same = self.profiles.iter().filter(|p| (p.slices, size(p)) == (slices, memory));
            same.filter_map(|p| all.get(&p.name)).sum()
        };
        let limited = || self.profiles.iter().filter(|p| profile::has_attribute(&p.name));
        let attributed = |p: &Profile| all.get(&p.name).copied().unwrap_or(0);
        let gpus = self.gpus;
        match self.layout {
            Layout::Eighths => {
                let [n1, n1d, n2] = [count(1, 1), count(1, 2), count(2, 2)];
                let [n3, n4, n7] = [count(3, 4), count(4, 4), count(7, 8)];
                let media: i64 = limited().map(attributed).sum();
                n7 + n4 <= gpus
                    && 2 * n7 + n4 + n3 <= 2 * gpus
                    && 3 * n7 + 2 * n4 + n3 + n2 <= 3 * gpus
                    && 7 * n7 + 4 * n4 + 3 * n3 + 2 * n2 + n1d + n1 <= 7 * gpus
                    && 8 * n7 + 4 * n4 + 4 * n3 + 2 * n2 + 2 * n1d + n1 <= 8 * gpus
                    // One a GPU, and none where the whole, or two halves, take all of it.
                    && media + n7 <= gpus
                    && media + 2 * n7 + n4 + n3 <= 2 * gpus
            }
            Layout::Nested => {
                let slices = self.profiles.iter().map(size).max().map_or(0, i64::from);
                let taken: i64 = self.profiles.iter().map(|p| i64::from(size(p)) * attributed(p)).sum();
                taken <= slices * gpus && limited().all(|p| attributed(p) <= i64::from(p.max_instances) * gpus)
            }
        }
    }

    pub fn add(&mut self, wants: &[Want]) {
        for want in wants {
            *self.running.entry(want.to_string()).or_default() += 1;
        }
    }

    pub fn remove(&mut self, wants: &[Want]) {
        for want in wants {
            *self.running.entry(want.to_string()).or_default() -= 1;
        }
    }
}

/// As a node that takes whatever fits, moving the others at no cost.
impl Node for Packing {
    fn place(&mut self, wants: &[Want]) -> Option<Vec<Spot>> {
        self.fits(wants).then(|| self.add(wants)).map(|()| Vec::new())
    }

    fn free(&mut self, wants: &[Want], _spots: &[Spot]) {
        self.remove(wants);
    }
}

/// Memory slices of a profile's windows.
pub fn size(profile: &Profile) -> u32 {
    profile.placements.first().map_or(0, |at| at.size)
}

/// Memory slices of a GPU.
pub fn slices_of(device: &Device) -> u32 {
    device.profiles.iter().flat_map(|p| &p.placements).map(|at| at.start + at.size).max().unwrap_or(0)
}
