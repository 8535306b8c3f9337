//! What becomes of a stream of requests under each policy: those of the product by its own placement, others by rules
//! that only this benchmark has.

#[path = "../boards/mod.rs"]
pub mod boards;

pub mod baseline;
pub mod node;
pub mod packing;
pub mod trace;

use std::collections::BinaryHeap;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use mig_hook::gpu::Device;
use mig_hook::placement::Policy;
use mig_hook::request::Want;
use serde::Serialize;
use sha2::{Digest, Sha256};

use baseline::{Baseline, Rule};
use node::{Node, Product, Spot};
use packing::Packing;
use trace::Trace;

/// Who decides on a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Chooser {
    /// Nobody: everything may be moved at any time, at no cost. No upper bound on the number of accepted requests.
    Repack,
    /// The product, with that policy.
    Product(Policy),
    /// A rule that only the benchmark has.
    Baseline(Rule),
}

/// By their names in expected.json.
pub const POLICIES: [(&str, Chooser); 12] = [
    ("repack", Chooser::Repack),
    ("ff_low", Chooser::Baseline(Rule::FirstFit)),
    ("ff_driver", Chooser::Product(Policy::Driver)),
    ("ff_static", Chooser::Baseline(Rule::StaticStarts)),
    ("hami_spread", Chooser::Baseline(Rule::HamiSpread)),
    ("hami_binpack", Chooser::Baseline(Rule::HamiBinpack)),
    ("bf_low", Chooser::Baseline(Rule::BestFit)),
    ("bf_driver", Chooser::Product(Policy::Binpack)),
    ("mfi", Chooser::Baseline(Rule::Mfi)),
    ("dcc", Chooser::Baseline(Rule::Dcc)),
    ("fgd", Chooser::Baseline(Rule::Fgd)),
    ("scc", Chooser::Product(Policy::Scc)),
];

/// What became of a trace. Names and meaning as in expected.json; what is counted begins after the warm-up.
#[derive(Debug, Clone, Serialize)]
pub struct Outcome {
    /// Requests.
    pub offered: usize,
    /// Those of them that got nothing.
    pub refused: usize,
    /// Share that got what it wanted.
    pub acc: f64,
    /// The same, each request weighted by its memory and time; none where nothing took any time.
    pub acc_w: Option<f64>,
    /// Occupied share of the memory, from the first counted arrival to the last.
    pub util: f64,
    /// Refusals that would have fitted with the running slices moved; none on nodes for which that is not known.
    pub frag: Option<usize>,
    /// Requests that got what they wanted, the warm-up among them.
    pub accepted_all: usize,
    /// Of every decision, the warm-up's too: `ID:GPU/START[,…]` or `ID:-`, a line each; SHA-256, its first 16 digits.
    pub digest: Option<String>,
    #[serde(skip)]
    pub time: Time,
    /// Refusals that the product itself called fragmented.
    #[serde(skip)]
    pub called_fragmented: Option<usize>,
}

/// What each decision took, in ns.
#[derive(Debug, Clone, Default)]
pub struct Time {
    placed: Vec<u128>,
    refused: Vec<u128>,
}

impl Time {
    /// Below which that share of the decisions stays: of those that placed something, and of the refusals.
    pub fn quantile(&self, share: f64) -> [u128; 2] {
        [&self.placed, &self.refused].map(|times| {
            let mut times = times.clone();
            times.sort_unstable();
            times.get((times.len() as f64 * share) as usize).copied().unwrap_or(0)
        })
    }
}

/// The end of an accepted request: the earliest is the greatest.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct End {
    at: std::cmp::Reverse<u64>,
    number: std::cmp::Reverse<usize>,
}

/// Plays a trace to one who decides.
pub fn replay(trace: &Trace, chooser: Chooser) -> Result<Outcome> {
    match chooser {
        Chooser::Repack => {
            let Some(mut packing) = Packing::of(&trace.devices) else {
                bail!("there is no closed form for what fits on this node");
            };
            Ok(Outcome { digest: None, ..play(trace, &mut packing) })
        }
        Chooser::Baseline(rule) => Ok(play(trace, &mut Baseline::new(&trace.devices, rule))),
        Chooser::Product(policy) => {
            let mut product = Product::new(&trace.devices, policy);
            let outcome = play(trace, &mut product);
            let counted = product.fragmented.len() - outcome.refused;
            let called_fragmented = product.fragmented[counted..].iter().filter(|fragmented| **fragmented).count();
            Ok(Outcome { called_fragmented: Some(called_fragmented), ..outcome })
        }
    }
}

fn play(trace: &Trace, node: &mut impl Node) -> Outcome {
    let weights = Weights::of(&trace.devices);
    let (first, last) = (trace.requests[trace.warm].at, trace.requests[trace.requests.len() - 1].at);
    let mut packing = Packing::of(&trace.devices);
    let mut spots: Vec<Vec<Spot>> = vec![Vec::new(); trace.requests.len()];
    let (mut ends, mut digest, mut time) = (BinaryHeap::<End>::new(), Sha256::new(), Time::default());
    let (mut refused, mut fragmented, mut accepted_all) = (0, 0, 0);
    let (mut offered_work, mut accepted_work, mut occupied) = (0_u128, 0_u128, 0_u128);
    for (number, request) in trace.requests.iter().enumerate() {
        while ends.peek().is_some_and(|end| end.at.0 <= request.at) {
            let std::cmp::Reverse(ended) = ends.pop().unwrap().number;
            node.free(&trace.requests[ended].wants, &spots[ended]);
            packing.iter_mut().for_each(|packing| packing.remove(&trace.requests[ended].wants));
        }
        let is_counted = number >= trace.warm;
        let memory: u128 = request.wants.iter().map(|want| weights.of_want(want)).sum();
        let work = memory * u128::from(request.end - request.at);
        offered_work += if is_counted { work } else { 0 };
        let begun = Instant::now();
        let placed = node.place(&request.wants);
        let took = begun.elapsed().as_nanos();
        if placed.is_some() {
            time.placed.push(took)
        } else {
            time.refused.push(took)
        }
        digest.update(format!("{}:", request.id));
        let Some(placed) = placed else {
            digest.update("-\n");
            let would_fit = packing.as_ref().is_some_and(|packing| packing.fits(&request.wants));
            refused += usize::from(is_counted);
            fragmented += usize::from(is_counted && would_fit);
            continue;
        };
        let shown: Vec<String> = placed.iter().map(|spot| format!("{}/{}", spot.gpu, spot.at.start)).collect();
        digest.update(shown.join(",") + "\n");
        spots[number] = placed;
        packing.iter_mut().for_each(|packing| packing.add(&request.wants));
        ends.push(End { at: std::cmp::Reverse(request.end), number: std::cmp::Reverse(number) });
        accepted_all += 1;
        accepted_work += if is_counted { work } else { 0 };
        occupied += memory * u128::from(request.end.min(last).saturating_sub(request.at.max(first)));
    }
    let offered = trace.requests.len() - trace.warm;
    let share = |part: u128, whole: u128| (whole > 0).then(|| part as f64 / whole as f64);
    Outcome {
        offered,
        refused,
        acc: (offered - refused) as f64 / offered as f64,
        acc_w: share(accepted_work, offered_work),
        util: share(occupied, weights.capacity * u128::from(last - first)).unwrap_or(0.0),
        frag: packing.map(|_| fragmented),
        accepted_all,
        digest: Some(digest.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect()),
        time,
        called_fragmented: None,
    }
}

/// What a slice of each profile weighs: its memory slices, on a node with several sizes of these in GB.
struct Weights {
    by_name: std::collections::BTreeMap<String, u128>,
    capacity: u128,
}

impl Weights {
    fn of(devices: &[Device]) -> Weights {
        let gigabytes = |device: &Device| {
            let largest =
                device.profiles.iter().max_by_key(|p| packing::size(p)).map_or(0, |p| boards::gigabytes(&p.name));
            (2 * largest + packing::slices_of(device)) / (2 * packing::slices_of(device)).max(1)
        };
        let of_one_size = devices.iter().all(|device| gigabytes(device) == gigabytes(&devices[0]));
        let weight = |device: &Device| if of_one_size { 1 } else { u128::from(gigabytes(device)) };
        let weighed = |device: &Device| {
            let weight = weight(device);
            let one = |p: &mig_hook::gpu::Profile| (p.name.clone(), u128::from(packing::size(p)) * weight);
            device.profiles.iter().map(one).collect::<Vec<_>>()
        };
        Weights {
            by_name: devices.iter().rev().flat_map(weighed).collect(),
            capacity: devices.iter().map(|device| u128::from(packing::slices_of(device)) * weight(device)).sum(),
        }
    }

    fn of_want(&self, want: &Want) -> u128 {
        self.by_name.get(&want.to_string()).copied().unwrap_or(0)
    }
}

/// Streams that were recorded with what was expected of them, by name.
pub const RECORDED: [(&str, &[u8]); 6] = [
    ("p1-uniform-8gpu", include_bytes!("../traces/p1-uniform-8gpu.jsonl.gz")),
    ("p2-small-4gpu-heavy", include_bytes!("../traces/p2-small-4gpu-heavy.jsonl.gz")),
    ("p3-big-16gpu", include_bytes!("../traces/p3-big-16gpu.jsonl.gz")),
    ("p4-inference-1gpu", include_bytes!("../traces/p4-inference-1gpu.jsonl.gz")),
    ("p5-multi-8gpu", include_bytes!("../traces/p5-multi-8gpu.jsonl.gz")),
    ("p6-media-drift-8gpu", include_bytes!("../traces/p6-media-drift-8gpu.jsonl.gz")),
];

/// Holds an outcome against expected.json, which another program wrote before there was this one.
pub fn check(trace: &str, policy: &str, outcome: &Outcome) -> Result<()> {
    let expected: serde_json::Value = serde_json::from_str(include_str!("../traces/expected.json"))?;
    let expected = expected[trace][policy].as_object().with_context(|| format!("{trace} {policy} is not expected"))?;
    let found = serde_json::to_value(outcome)?;
    for (key, wanted) in expected {
        let found = &found[key];
        let same = match (wanted.as_f64(), found.as_f64()) {
            (Some(wanted), Some(found)) => (wanted - found).abs() < 1e-9,
            _ => wanted == found,
        };
        ensure!(same, "{trace}, {policy}: {key} is {found}, expected {wanted}");
    }
    // Profiles with an attribute are packed by the product, and taken to be packable by the closed form.
    if let (Some(called), false) = (outcome.called_fragmented, trace.contains("media")) {
        let frag = outcome.frag.unwrap_or(0);
        ensure!(called == frag, "{trace}, {policy}: {called} refusals are called fragmented, and {frag} are");
    }
    Ok(())
}
