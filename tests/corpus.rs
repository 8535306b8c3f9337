//! Everything that is fuzzed (fuzz/src), with every file of fuzz/corpus and with variants of each; and the model of the
//! runtimes' command lines against the runtimes that are installed. `make fuzz` does the same with libFuzzer.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;
#[path = "../fuzz/src/lib.rs"]
mod fuzz;

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::{run, skip, text};
use fuzz::runtimes::{CRUN, Opt, RUNC, Runtime, Takes};
use mig_hook::first::{self, Verb};

/// Variants of each file.
const VARIANTS: u64 = 300;

/// Numbers below a limit, the same for the same seed (xorshift64).
fn dice(seed: u64) -> impl FnMut(usize) -> usize {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    move |limit| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % limit.max(1) as u64) as usize
    }
}

/// Another text made of this one: bytes changed, left out, doubled, or taken from elsewhere in it.
fn variant(text: &[u8], seed: u64) -> Vec<u8> {
    let mut below = dice(seed);
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

// ---- the model of runc and crun ----

/// The installed runtimes, each with its model and the version that the tables are of.
fn runtimes() -> Vec<(PathBuf, &'static Runtime, bool)> {
    let known = [("runc", &RUNC, "runc version 1.1."), ("crun", &CRUN, "crun version 1.8.")];
    let found = known.into_iter().filter_map(|(name, model, version)| match first::installed(name) {
        Some(path) => {
            let same = text(&run(Command::new(&path).arg("--version"))).contains(version);
            Some((path, model, same))
        }
        None => {
            skip(&format!("the command line of {name} against its model"), "it is not installed");
            None
        }
    });
    found.collect()
}

/// The options in a help text, by each of their names: `--bundle value, -b value` (runc), `-b, --bundle=DIR` (crun).
fn options_in(help: &str) -> BTreeSet<(String, bool)> {
    let lines = help.lines().map(str::trim).filter(|line| line.starts_with('-'));
    lines
        .flat_map(|line| {
            let forms = line.split("  ").next().unwrap();
            let value = !forms.contains('[') && (forms.contains('=') || forms.contains(" value"));
            let name = |form: &str| form.trim_start_matches('-').split(['=', ' ', '[']).next().unwrap().to_owned();
            forms.split(", ").map(|form| (name(form), value)).collect::<Vec<_>>()
        })
        .filter(|(name, _)| !["help", "h", "?", "usage", "version", "v", "V"].contains(&name.as_str()))
        .collect()
}

fn options_of(table: &[Opt]) -> BTreeSet<(String, bool)> {
    let names = |option: &Opt| {
        let value = option.takes == Takes::Value;
        [Some(option.long.to_owned()), option.short.map(String::from)]
            .into_iter()
            .flatten()
            .map(move |name| (name, value))
    };
    let told = |(name, _): &(String, bool)| !["help", "h", "?", "usage", "version", "v"].contains(&name.as_str());
    table.iter().flat_map(names).filter(told).collect()
}

#[test]
fn the_shim_and_the_model_know_every_option_that_the_installed_runtimes_print() {
    for (path, model, same) in runtimes() {
        let help = |words: &[&str]| options_in(&text(&run(Command::new(&path).args(words).arg("--help"))));
        let word = |name: &str| if name.len() == 1 { format!("-{name}") } else { format!("--{name}") };
        let read = |words: &[&str]| first::plan(words.iter().map(OsString::from));
        let globals = help(&[]);
        assert!(globals.len() > 5, "{}: {globals:?}", path.display());
        assert!(!same || globals == options_of(model.globals), "{}: {globals:?}", path.display());
        for (name, value) in &globals {
            let option = word(name);
            let words: &[&str] = if *value { &[&option, "run", "state", "c1"] } else { &[&option, "state", "c1"] };
            let plan = read(words);
            assert_eq!((plan.verb, plan.id), (Verb::State, Some("c1".into())), "{} {words:?}", path.display());
        }
        for (verb, table) in model.verbs {
            let options = help(&[verb]);
            if !same || (*verb == "restore" && options.is_empty()) {
                continue; // another version, or one without CRIU
            }
            assert_eq!(options, options_of(table), "{} {verb}", path.display());
        }
        for verb in ["create", "run", "exec"] {
            for (name, value) in help(&[verb]) {
                let option = word(&name);
                let words: &[&str] = if value { &[verb, &option, "1", "c1"] } else { &[verb, &option, "c1"] };
                assert_eq!(read(words).id, Some("c1".into()), "{} {words:?}", path.display());
            }
        }
    }
}

/// Lines of words that mean something to a runtime, in any order; what it does with them is seen by the bundle that it tries to
/// enter, which is nowhere.
#[test]
fn the_installed_runtimes_read_lines_as_the_model_does() {
    const LINES: u64 = 200;
    const WORDS: [&str; 28] = [
        "--bundle",
        "-b",
        "/nb1",
        "/nb2",
        "--bundle=/nb3",
        "-b=/nb4",
        "-b/nb5",
        "--bund",
        "-db",
        "-d",
        "--detach",
        "c1",
        "create",
        "run",
        "--",
        "-",
        "--pid-file",
        "--pid-f=x",
        "-pid-file",
        "x",
        "--no-pivot",
        "-no-new-keyring",
        "--preserve-fds=0",
        "-fconfig.json",
        "--config=config.json",
        "--console-socket=x",
        "-bundle",
        "--b",
    ];
    for (path, model, same) in runtimes() {
        if !same {
            skip(&format!("how {} reads lines", path.display()), "the model is of another version");
            continue;
        }
        let dir = tempfile::tempdir().unwrap();
        let mut accepted = 0;
        for seed in 1..=LINES {
            let mut below = dice(seed);
            let mut words = vec![if below(2) == 0 { "create" } else { "run" }];
            // Half of them from what is mostly right.
            if below(2) == 0 {
                words.extend([["--bundle", "/nb1"], ["-b", "/nb2"]][below(2)]);
            }
            words.extend((0..below(5)).map(|_| WORDS[below(WORDS.len())]));
            let at = 1 + below(words.len());
            match below(4) {
                0 => {}
                1 => words.insert(at, "c1"),
                _ => words.push("c1"),
            }
            let output = run(Command::new(&path).arg("--root").arg(dir.path()).args(&words).current_dir(dir.path()));
            let said = text(&output);
            let entered = said.split("chdir ").nth(1).map(|rest| {
                let rest = rest.trim_start_matches('`');
                rest[..rest.find(['`', '\'', ':']).unwrap()].to_owned()
            });
            let entered = entered.or_else(|| {
                let rest = said.split("realpath `").nth(1)?;
                Some(rest[..rest.find('`')?].to_owned())
            });
            let meant = model.read(&words).and_then(|line| line.value("bundle"));
            assert_eq!(entered, meant, "{} {words:?}: {said}", path.display());
            accepted += usize::from(meant.is_some());
        }
        assert!(accepted > LINES as usize / 8, "only {accepted} of the lines mean anything to {}", path.display());
    }
}
