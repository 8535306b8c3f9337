//! A node that is asked for more than it has, served by the real queue and the real placement: what reference figures of
//! bounded overtaking are compared with.

#[path = "../boards/mod.rs"]
mod boards;
#[path = "../boards/random.rs"]
mod random;

use mig_hook::gpu::{Device, Instance, Placement};
use mig_hook::placement::{self, Policy, Room};
use mig_hook::queue::{Gpus, Turn, Waiter, scan};
use mig_hook::request::Want;
use random::Random;

/// The profiles that are asked for, and the mixes: how often each is.
const PROFILES: [&str; 6] = ["1g.10gb", "1g.20gb", "2g.20gb", "3g.40gb", "4g.40gb", "7g.80gb"];
pub const MIXES: [(&str, [f64; 6]); 3] = [
    ("uniform", [1.0 / 6.0; 6]),
    ("small", [0.30, 0.25, 0.20, 0.10, 0.10, 0.05]),
    ("inference", [0.45, 0.10, 0.25, 0.20, 0.0, 0.0]),
];
/// Memory slices of the board.
const SLICES: u32 = 8;

/// What is replayed: on so many GPUs, so many requests of a mix, with a backlog that is always kept.
#[derive(Debug, Clone, Copy)]
pub struct Replay {
    pub gpus: u32,
    pub mix: [f64; 6],
    pub requests: usize,
    pub backlog: usize,
    pub overtakes: u32,
    pub seed: u64,
}

/// What came of it.
#[derive(Debug)]
pub struct Outcome {
    /// Occupied share of the memory slices, from the first tenth of the requests on.
    pub utilisation: f64,
    /// The most often that anybody was overtaken.
    pub most_overtaken: u32,
}

/// Finds room for a profile on the GPUs that are not closed, and takes it: GPU and start.
fn place(devices: &mut [Device], profile: usize, closed: &Gpus) -> Option<(usize, Placement)> {
    let open: Vec<Device> = devices.iter().filter(|device| !closed.contains(&device.uuid)).cloned().collect();
    let rooms: Vec<Room<'_>> = open.iter().map(|device| Room { device, occupied: vec![] }).collect();
    let wants = placement::candidates(&rooms, &[Want::Profile(PROFILES[profile].to_owned())]).ok()?;
    let choice = placement::place(&rooms, &wants, Policy::Scc).ok()?.remove(0);
    let gpu = devices.iter().position(|device| device.uuid == choice.gpu)?;
    let instance = Instance { id: 0, profile: choice.profile, placement: choice.placement, compute: vec![] };
    devices[gpu].instances.push(instance);
    Some((gpu, choice.placement))
}

impl Replay {
    pub fn run(&self) -> Outcome {
        let mut random = Random(self.seed);
        let mut devices = boards::devices("a100-sxm4-80gb", 0..self.gpus).unwrap();
        let usable: Gpus = devices.iter().map(|device| device.uuid.clone()).collect();
        let mut line: Vec<Waiter> = vec![];
        let mut running: Vec<(f64, usize, Placement)> = vec![]; // its end, GPU, where
        let (mut now, mut came, mut most_overtaken) = (0.0, 0, 0);
        let (mut measured_from, mut occupied_time) = (None, 0.0);
        while came < self.requests {
            // Whoever starts makes room in the backlog for another: until nobody starts.
            loop {
                while line.len() < self.backlog && came < self.requests {
                    let wish = random.one_of(&self.mix);
                    let (usable, limit) = (usable.clone(), self.overtakes);
                    line.push(Waiter { wish, usable, overtaken: 0, limit, asleep: false });
                    came += 1;
                }
                let mut placed: Vec<(usize, Placement)> = vec![];
                let scanned = scan(&line, |at, closed| {
                    let (gpu, placement) = place(&mut devices, line[at].wish, closed)?;
                    placed.push((gpu, placement));
                    Some(Gpus::from([devices[gpu].uuid.clone()]))
                });
                most_overtaken = scanned.overtaken.iter().copied().max().unwrap_or(0).max(most_overtaken);
                for (waiter, overtaken) in line.iter_mut().zip(&scanned.overtaken) {
                    waiter.overtaken = *overtaken;
                }
                let mut turns = scanned.turns.iter();
                line.retain(|_| !matches!(turns.next(), Some(Turn::Now(_))));
                if placed.is_empty() {
                    break;
                }
                running.extend(placed.into_iter().map(|(gpu, placement)| (now + random.exponential(), gpu, placement)));
            }
            if measured_from.is_none() && came >= self.requests / 10 {
                measured_from = Some(now);
            }
            let first = (0..running.len()).min_by(|a, b| running[*a].0.total_cmp(&running[*b].0)).unwrap();
            let occupied: u32 = running.iter().map(|(_, _, placement)| placement.size).sum();
            let (end, gpu, placement) = running.swap_remove(first);
            if measured_from.is_some() {
                occupied_time += f64::from(occupied) * (end - now);
            }
            now = end;
            devices[gpu].instances.retain(|instance| instance.placement != placement);
        }
        let measured = now - measured_from.unwrap();
        Outcome { utilisation: occupied_time / measured / f64::from(SLICES * self.gpus), most_overtaken }
    }
}
