//! The line with the real placement: the small form of `make bench-queue`, for every run of the tests.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../benches/queue/replay.rs"]
mod replay;

use replay::{MIXES, Replay};

#[test]
fn bounded_overtaking_fills_the_gpus_and_nobody_is_overtaken_more_often() {
    for (name, mix) in MIXES {
        let replay = |overtakes| Replay { gpus: 4, mix, requests: 400, backlog: 100, overtakes, seed: 1 }.run();
        let (strict, bounded) = (replay(0), replay(32));
        assert!(strict.most_overtaken == 0 && bounded.most_overtaken <= 32, "{name}: {strict:?} {bounded:?}");
        assert!(bounded.utilisation > strict.utilisation + 0.05, "{name}: {strict:?} {bounded:?}");
    }
}
