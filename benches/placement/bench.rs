//! How well slices are placed, and how fast: streams of requests are played to the placement as shipped, and to the rules of
//! others, which only this benchmark has. docs/performance.md has the tables.
//!
//! `make bench-placement` replays benches/traces, fails where a decision differs from what another program decided before
//! there was this one (benches/traces/expected.json), and then runs a seeded sweep. `ARGS='--trace FILE --json'` replays one
//! file instead, and prints an object a line for each policy.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout, clippy::print_stderr)]

#[path = "../boards/random.rs"]
mod random;
#[path = "mod.rs"]
mod replays;
mod sweep;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Parser;
use mig_hook::placement::Policy;
use replays::trace::{self, Trace};
use replays::{Chooser, Outcome, POLICIES, RECORDED, replay};

/// How well slices are placed, and how fast.
#[derive(Debug, Parser)]
struct Args {
    /// Replay this trace (JSON lines, plain or gzipped) and nothing else
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// Print an object a line for each policy
    #[arg(long, requires = "trace")]
    json: bool,
    /// Leave the sweep out
    #[arg(long, conflicts_with = "trace")]
    quick: bool,
    /// Where a relative FILE begins: cargo goes elsewhere
    #[arg(long, value_name = "DIR", default_value = "", hide = true)]
    from: PathBuf,
    /// What cargo says
    #[arg(long, hide = true)]
    bench: bool,
}

/// The product's other settings: no other program has decided by them.
const SETTINGS: [(&str, Chooser); 2] =
    [("first-fit", Chooser::Product(Policy::FirstFit)), ("spread", Chooser::Product(Policy::Spread))];

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench-placement: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<()> {
    if let Some(path) = &args.trace {
        let trace = trace::read(&args.from.join(path))?;
        return match args.json {
            true => objects(&trace),
            false => table(&trace, |_, _| Ok(())),
        };
    }
    for (name, packed) in RECORDED {
        println!("{name}");
        table(&trace::unpacked(packed)?, |policy, outcome| replays::check(name, policy, outcome))?;
        println!();
    }
    println!("all of it is as in expected.json, which does not have first-fit and spread");
    if !args.quick {
        sweep::print();
    }
    Ok(())
}

/// Replays by every policy that the node allows.
fn outcomes(trace: &Trace, policies: &[(&'static str, Chooser)]) -> Result<Vec<(&'static str, Outcome)>> {
    let is_known =
        |chooser: Chooser| chooser != Chooser::Repack || replays::packing::Packing::of(&trace.devices).is_some();
    let policies = policies.iter().filter(|(_, chooser)| is_known(*chooser));
    policies.map(|(name, chooser)| Ok((*name, replay(trace, *chooser)?))).collect()
}

fn objects(trace: &Trace) -> Result<()> {
    for (name, outcome) in outcomes(trace, &POLICIES)? {
        let mut object = serde_json::Map::from_iter([("policy".to_owned(), name.into())]);
        object.extend(serde_json::to_value(outcome)?.as_object().context("an outcome is an object")?.clone());
        println!("{}", serde_json::Value::Object(object));
    }
    Ok(())
}

fn table(trace: &Trace, check: impl Fn(&str, &Outcome) -> Result<()>) -> Result<()> {
    println!(
        "| policy | refused | accept | goodput | utilisation | by fragmentation | ns (99 %) | ns of a refusal (99 %) |"
    );
    println!("|---|---|---|---|---|---|---|---|");
    for (name, outcome) in outcomes(trace, &[POLICIES.as_slice(), &SETTINGS].concat())? {
        let ([placed, refused], [most_placed, most_refused]) =
            (outcome.time.quantile(0.5), outcome.time.quantile(0.99));
        println!(
            "| {name} | {} | {:.4} | {:.4} | {:.4} | {} | {placed} ({most_placed}) | {refused} ({most_refused}) |",
            outcome.refused,
            outcome.acc,
            outcome.acc_w.unwrap_or(f64::NAN),
            outcome.util,
            outcome.frag.map_or("-".to_owned(), |frag| frag.to_string()),
        );
        if POLICIES.iter().any(|(known, _)| *known == name) {
            check(name, &outcome)?;
        }
    }
    Ok(())
}
