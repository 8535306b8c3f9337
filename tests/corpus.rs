//! Everything that is fuzzed (fuzz/src), with every file of fuzz/corpus and with variants of each; and the model of the
//! runtimes' command lines against the runtimes that are installed. `make fuzz` does the same with libFuzzer.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../fuzz/src/lib.rs"]
mod fuzz;

use std::path::Path;

/// Variants of each file.
const VARIANTS: u64 = 100;

/// Another text made of this one: bytes changed, left out, doubled, or taken from elsewhere in it.
fn variant(text: &[u8], seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut below = |limit: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % limit.max(1) as u64) as usize
    };
    let mut text = text.to_vec();
    for _ in 0..=below(4) {
        let at = below(text.len() + 1);
        let end = (at + below(12)).min(text.len());
        let piece = text[at..end].to_vec();
        match below(5) {
            0 => text[at..end].iter_mut().for_each(|byte| *byte ^= 1 << below(8)),
            1 => drop(text.drain(at..end)),
            2 => drop(text.splice(at..at, piece)),
            3 => drop(text.splice(at..at, *b"\0\n\" {}[],:-/=x1"[below(15)..].first_chunk::<1>().unwrap())),
            _ => {
                let to = below(text.len() + 1);
                drop(text.splice(to..to, piece));
            }
        }
    }
    text
}

fn replay(target: &str, check: fn(&[u8])) {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target);
    let mut files: Vec<_> = std::fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    assert!(!files.is_empty(), "{} is empty", dir.display());
    for file in files {
        let text = std::fs::read(&file).unwrap();
        for seed in 0..=VARIANTS {
            let input = if seed == 0 { text.clone() } else { variant(&text, seed) };
            if std::panic::catch_unwind(|| check(&input)).is_err() {
                panic!("{}, variant {seed}: {:?}", file.display(), String::from_utf8_lossy(&input));
            }
        }
    }
}

macro_rules! targets {
    ($($target:ident)*) => { $(#[test] fn $target() { replay(stringify!($target), fuzz::$target::check) })* };
}

targets! { cdi config elf layout ldcache lease names plan proc request settings state }
