//! What waiting in line costs and wins: the share of a node's memory slices that is in use while more is asked for than it
//! has, in strict order and with bounded overtaking, by the real queue and the real placement. docs/queue.md has the table.
//!
//! `make bench-queue` compares it with the reference figures and fails where one is off by more than 0.03.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout)]

#[path = "queue/replay.rs"]
mod replay;

use replay::{MIXES, Replay};

/// GPUs, and for each mix: in strict order, with 8 overtakes a GPU. Simulated before there was this code, by another
/// program (three seeds, 5,000 requests, lifetimes exponential, a backlog of 200).
const REFERENCE: [(u32, [(f64, f64); 3]); 2] =
    [(4, [(0.781, 0.912), (0.765, 0.885), (0.836, 0.933)]), (8, [(0.818, 0.950), (0.795, 0.922), (0.864, 0.951)])];
const TOLERANCE: f64 = 0.03;
const SEEDS: u64 = 3;

fn main() {
    println!("| GPUs, mix | strict order (reference) | 8 overtakes a GPU (reference) | without a bound |");
    println!("|---|---|---|---|");
    let mut off = vec![];
    for (gpus, reference) in REFERENCE {
        for ((name, mix), (strict, bounded)) in MIXES.into_iter().zip(reference) {
            let mean = |overtakes: u32| {
                let replay = |seed| Replay { gpus, mix, requests: 5_000, backlog: 200, overtakes, seed }.run();
                let outcomes: Vec<_> = (1..=SEEDS).map(replay).collect();
                assert!(outcomes.iter().all(|outcome| outcome.most_overtaken <= overtakes), "{outcomes:?}");
                outcomes.iter().map(|outcome| outcome.utilisation).sum::<f64>() / SEEDS as f64
            };
            let measured = (mean(0), mean(8 * gpus), mean(u32::MAX));
            println!(
                "| {gpus} {name} | {:.3} ({strict:.3}) | {:.3} ({bounded:.3}) | {:.3} |",
                measured.0, measured.1, measured.2
            );
            for (measured, reference) in [(measured.0, strict), (measured.1, bounded)] {
                if (measured - reference).abs() > TOLERANCE {
                    off.push(format!("{gpus} GPUs, {name}: {measured:.3} instead of {reference:.3}"));
                }
            }
        }
    }
    assert!(off.is_empty(), "more than {TOLERANCE} off: {off:#?}");
}
