//! A node that is asked for slices and gives them back: the product's placement, and those it is compared with.

use mig_hook::gpu::{Device, Instance, Placement, ProfileId};
use mig_hook::placement::{self, Policy, Room};
use mig_hook::request::Want;

/// Where a slice was put.
#[derive(Debug, Clone, Copy)]
pub struct Spot {
    pub gpu: usize,
    pub profile: ProfileId,
    pub at: Placement,
}

/// Who decides.
pub trait Node {
    /// A spot for each want in turn, which is taken; `None`: refused, and nothing is taken.
    fn place(&mut self, wants: &[Want]) -> Option<Vec<Spot>>;

    /// Gives back what `place` gave for these wants.
    fn free(&mut self, wants: &[Want], spots: &[Spot]);
}

/// The placement as shipped: every decision from what the driver would report, tables and all, and a refusal with its
/// reason and whose end would make room.
#[derive(Debug)]
pub struct Product {
    devices: Vec<Device>,
    policy: Policy,
    /// The refusals that it called fragmented.
    pub fragmented: Vec<bool>,
}

impl Product {
    pub fn new(devices: &[Device], policy: Policy) -> Product {
        Product { devices: devices.to_vec(), policy, fragmented: Vec::new() }
    }
}

impl Node for Product {
    fn place(&mut self, wants: &[Want]) -> Option<Vec<Spot>> {
        let rooms: Vec<Room<'_>> = self.devices.iter().map(|device| Room { device, occupied: vec![] }).collect();
        let placed = placement::candidates(&rooms, wants)
            .and_then(|candidates| placement::place(&rooms, &candidates, self.policy));
        let spot = |choice: &placement::Choice| {
            let gpu = self.devices.iter().position(|device| device.uuid == choice.gpu).unwrap();
            Spot { gpu, profile: choice.profile, at: choice.placement }
        };
        let spots: Vec<Spot> = match &placed {
            Ok(choices) => choices.iter().map(spot).collect(),
            Err(refusal) => {
                self.fragmented.push(refusal.reason == placement::Reason::Fragmented);
                return None;
            }
        };
        for spot in &spots {
            let instance = Instance { id: 0, profile: spot.profile, placement: spot.at, compute: vec![] };
            self.devices[spot.gpu].instances.push(instance);
        }
        Some(spots)
    }

    fn free(&mut self, _wants: &[Want], spots: &[Spot]) {
        for spot in spots {
            self.devices[spot.gpu].instances.retain(|instance| instance.placement != spot.at);
        }
    }
}
