//! The placement as shipped, on recorded streams of requests: the small form of `make bench-placement`, for every run of the
//! tests.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../benches/placement/mod.rs"]
mod replays;

use mig_hook::placement::Policy;
use replays::trace::{self, Trace};
use replays::{Chooser, POLICIES, check, recorded, replay};

fn traces() -> Vec<(String, Trace)> {
    let traces: Vec<_> = recorded().into_iter().map(|(name, path)| (name, trace::read(&path).unwrap())).collect();
    assert_eq!(traces.len(), 6);
    traces
}

#[test]
fn recorded_requests_go_where_another_program_put_them() {
    for (name, trace) in traces() {
        for (policy, chooser) in POLICIES {
            check(&name, policy, &replay(&trace, chooser).unwrap()).unwrap();
        }
    }
}
