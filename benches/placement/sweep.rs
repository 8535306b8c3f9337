//! Many seeded streams of requests: what the product's choice changes, with paired intervals. Every policy sees the same
//! streams; what differs from seed to seed is taken out by comparing pairs.

use std::sync::atomic::{AtomicUsize, Ordering};

use mig_hook::placement::Policy;
use mig_hook::request::Want;

use super::random::Random;
use super::replays::baseline::Rule;
use super::replays::trace::{self, Request, Trace};
use super::replays::{Chooser, Outcome, replay};

const GPUS: [usize; 4] = [1, 4, 8, 16];
const LOADS: [f64; 4] = [0.6, 0.8, 1.0, 1.2];
const SEEDS: u64 = 8;
const REQUESTS: usize = 5_000;
const MEAN_LIFE_MS: f64 = 3_600_000.0;
/// Profiles with their memory slices, and how often each is asked for in each mix.
const PROFILES: [(&str, u32); 6] =
    [("1g.10gb", 1), ("1g.20gb", 2), ("2g.20gb", 2), ("3g.40gb", 4), ("4g.40gb", 4), ("7g.80gb", 8)];
const MIXES: [(&str, [f64; 6]); 4] = [
    ("uniform", [1.0 / 6.0; 6]),
    ("small", [0.30, 0.25, 0.20, 0.10, 0.10, 0.05]),
    ("big", [0.05, 0.10, 0.10, 0.20, 0.25, 0.30]),
    ("inference", [0.45, 0.10, 0.25, 0.20, 0.0, 0.0]),
];
/// The product's choice first, then what it is compared with.
const COMPARED: [(&str, Chooser); 7] = [
    ("scc", Chooser::Product(Policy::Scc)),
    ("ff_low", Chooser::Baseline(Rule::FirstFit)),
    ("ff_driver", Chooser::Product(Policy::Driver)),
    ("bf_driver", Chooser::Product(Policy::Binpack)),
    ("mfi", Chooser::Baseline(Rule::Mfi)),
    ("dcc", Chooser::Baseline(Rule::Dcc)),
    ("spread", Chooser::Product(Policy::Spread)),
];
/// 97.5 % of Student's t with SEEDS - 1 degrees of freedom are below this.
const STUDENT: f64 = 2.3646;

/// One stream.
#[derive(Debug, Clone, Copy)]
struct Run {
    gpus: usize,
    mix: usize,
    load: f64,
    seed: u64,
}

/// Runs all of it, on all processors, and prints the tables.
pub fn print() {
    let runs = runs();
    let outcomes = played(&runs);
    println!(
        "\nchange by scc, in percent (95 % interval over {SEEDS} seeds, paired): refusals / lost goodput / refusals by fragmentation"
    );
    let against = || COMPARED[1..].iter().map(|(name, _)| *name);
    println!("| GPUs | against {} |", against().collect::<Vec<_>>().join(" | against "));
    println!("|---|{}", "---|".repeat(COMPARED.len() - 1));
    let more = GPUS[1..].to_vec();
    for (name, gpus) in GPUS.iter().map(|gpus| (gpus.to_string(), vec![*gpus])).chain([("4, 8, 16".to_owned(), more)]) {
        let cells = (1..COMPARED.len()).map(|other| changes(&runs, &outcomes, &gpus, other));
        println!("| {name} | {} |", cells.collect::<Vec<_>>().join(" | "));
    }
    println!("\naccept / goodput / utilisation, means over the mixes and seeds");
    println!("| GPUs, load | ff_low | ff_driver | scc |\n|---|---|---|---|");
    for gpus in GPUS {
        for load in LOADS {
            let of = |policy: usize| {
                let here = |(run, _): &(&Run, &Vec<Outcome>)| run.gpus == gpus && run.load == load;
                let outcomes: Vec<&Outcome> =
                    runs.iter().zip(&outcomes).filter(here).map(|(_, outcomes)| &outcomes[policy]).collect();
                let mean = |value: &dyn Fn(&Outcome) -> f64| {
                    outcomes.iter().map(|outcome| value(outcome)).sum::<f64>() / outcomes.len() as f64
                };
                format!("{:.3} / {:.3} / {:.3}", mean(&|o| o.acc), mean(&|o| o.acc_w.unwrap()), mean(&|o| o.util))
            };
            println!("| {gpus}, {load} | {} | {} | {} |", of(1), of(2), of(0));
        }
    }
}

fn runs() -> Vec<Run> {
    let mut runs = Vec::new();
    for gpus in GPUS {
        for mix in 0..MIXES.len() {
            for load in LOADS {
                runs.extend((0..SEEDS).map(|seed| Run { gpus, mix, load, seed }));
            }
        }
    }
    runs
}

/// For each run, what became of it under each of `COMPARED`.
fn played(runs: &[Run]) -> Vec<Vec<Outcome>> {
    let next = AtomicUsize::new(0);
    let work = || {
        let mut done = Vec::new();
        while let Some((at, run)) = Some(next.fetch_add(1, Ordering::Relaxed)).and_then(|at| Some((at, runs.get(at)?)))
        {
            let trace = run.trace();
            done.push((at, COMPARED.map(|(_, chooser)| replay(&trace, chooser).unwrap()).to_vec()));
        }
        done
    };
    let workers = std::thread::available_parallelism().map_or(1, usize::from);
    let mut done: Vec<(usize, Vec<Outcome>)> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..workers).map(|_| scope.spawn(work)).collect();
        threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    });
    done.sort_by_key(|(at, _)| *at);
    done.into_iter().map(|(_, outcomes)| outcomes).collect()
}

impl Run {
    /// Poisson arrivals at such a rate that what is asked for is `load` times the memory there is; exponential lifetimes.
    fn trace(&self) -> Trace {
        let mix = MIXES[self.mix].1;
        // Neighbouring seeds of this generator are not alike.
        let mut random = Random(
            (self.seed << 32) ^ ((self.gpus as u64) << 16) ^ ((self.mix as u64) << 8) ^ (self.load * 10.0) as u64,
        );
        let slices: f64 = mix.iter().zip(PROFILES).map(|(share, (_, size))| share * f64::from(size)).sum();
        let pause_ms = MEAN_LIFE_MS * slices / (self.load * (8 * self.gpus) as f64);
        let mut now = 0.0;
        let request = |id: usize| {
            now += random.exponential() * pause_ms;
            let (at, life) = (now as u64, (random.exponential() * MEAN_LIFE_MS) as u64);
            let (name, _) = PROFILES[random.one_of(&mix)];
            Request { id: id as u64, at, end: at + life, wants: vec![Want::Profile(name.to_owned())] }
        };
        let devices = trace::node(&vec!["A100-80".to_owned(); self.gpus]).unwrap();
        Trace { devices, requests: (0..REQUESTS).map(request).collect(), warm: REQUESTS / 10 }
    }
}

/// What the first of `COMPARED` changes against another, on nodes of so many GPUs.
fn changes(runs: &[Run], outcomes: &[Vec<Outcome>], gpus: &[usize], other: usize) -> String {
    let sum = |seed: u64, policy: usize, value: &dyn Fn(&Outcome) -> f64| -> f64 {
        let here = |(run, _): &(&Run, &Vec<Outcome>)| run.seed == seed && gpus.contains(&run.gpus);
        runs.iter().zip(outcomes).filter(here).map(|(_, outcomes)| value(&outcomes[policy])).sum()
    };
    let change = |value: &dyn Fn(&Outcome) -> f64| {
        let each: Vec<f64> =
            (0..SEEDS).map(|seed| 100.0 * (sum(seed, 0, value) / sum(seed, other, value) - 1.0)).collect();
        let mean = each.iter().sum::<f64>() / SEEDS as f64;
        let variance = each.iter().map(|one| (one - mean).powi(2)).sum::<f64>() / (SEEDS - 1) as f64;
        format!("{mean:+.1} ± {:.1}", STUDENT * (variance / SEEDS as f64).sqrt())
    };
    let lost = |outcome: &Outcome| 1.0 - outcome.acc_w.unwrap();
    let refused = |outcome: &Outcome| outcome.refused as f64;
    let fragmented = |outcome: &Outcome| outcome.frag.unwrap() as f64;
    [change(&refused), change(&lost), change(&fragmented)].join(" / ")
}
