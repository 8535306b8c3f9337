//! Keeps the layers of src/lib.rs true, and `unsafe` where it belongs.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Rows from top to bottom; a file may use rows below its own, and its own row where that is said.
const ROWS: [(&str, &[&str], bool); 5] = [
    ("ways in", &["cli", "hook", "classic", "shim", "report"], true),
    ("engine", &["engine"], false),
    (
        "pure",
        &[
            "request",
            "cut",
            "profile",
            "placement",
            "lease",
            "job",
            "slurm",
            "queue",
            "inventory",
            "layout",
            "mig_parted",
            "edits",
            "injection",
            "cdi",
            "history",
            "metrics",
        ],
        true,
    ),
    (
        "edges",
        &["gpu", "store", "host", "names", "bundle", "runtime", "config", "container", "driver", "cdi_file"],
        false,
    ),
    ("start", &["first", "handover"], true),
];

fn sources(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap().flatten() {
        match entry.path() {
            path if path.is_dir() => found.extend(sources(&path)),
            path if path.extension().is_some_and(|e| e == "rs") => found.push(path),
            _ => {}
        }
    }
    found.sort();
    found
}

/// `src/gpu/nvml.rs` → `gpu`.
fn module(src: &Path, file: &Path) -> String {
    let first = file.strip_prefix(src).unwrap().components().next().unwrap();
    Path::new(first.as_os_str()).file_stem().unwrap().to_str().unwrap().to_owned()
}

/// Modules named after `crate::`, in `use` lines and elsewhere; not in comments, nor in tests, which may reach down for a
/// helper.
fn uses(text: &str) -> Vec<String> {
    let product = text.split("#[cfg(test)]").next().unwrap();
    let code: Vec<&str> = product.lines().filter(|line| !line.trim_start().starts_with("//")).collect();
    let product = code.join("\n");
    let mut found = Vec::new();
    for rest in product.split("crate::").skip(1) {
        let names: Vec<&str> = match rest.strip_prefix('{') {
            Some(list) => list.split('}').next().unwrap().split(',').collect(),
            None => vec![rest],
        };
        for name in names {
            let end = name.trim().find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(name.trim().len());
            found.push(name.trim()[..end].to_owned());
        }
    }
    found
}

#[test]
fn rows_use_rows_below_only() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let rows: BTreeMap<&str, (usize, bool)> = ROWS
        .iter()
        .enumerate()
        .flat_map(|(n, (_, modules, own))| modules.iter().map(move |m| (*m, (n, *own))))
        .collect();
    let mut wrong = Vec::new();
    let mut seen = 0;
    for file in sources(&src).iter().filter(|f| !f.starts_with(src.join("bin")) && !f.ends_with("lib.rs")) {
        let this = module(&src, file);
        let (row, own) = *rows
            .get(this.as_str())
            .unwrap_or_else(|| panic!("{} has no row in the diagram of src/lib.rs", file.display()));
        for used in uses(&std::fs::read_to_string(file).unwrap()).iter().filter(|used| **used != this) {
            let Some((below, _)) = rows.get(used.as_str()) else { continue };
            seen += 1;
            if *below < row || (*below == row && !own) {
                wrong.push(format!("{} uses {used}", file.strip_prefix(&src).unwrap().display()));
            }
        }
    }
    assert!(wrong.is_empty(), "against the layers of src/lib.rs: {wrong:#?}");
    assert!(seen > 30, "the reader of use lines found only {seen}: it is broken");
}

#[test]
fn first_stages_use_nothing_but_the_start_row() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    for file in ["first.rs", "handover.rs"] {
        let text = std::fs::read_to_string(src.join(file)).unwrap();
        for used in uses(&text) {
            assert!(["first", "handover"].contains(&used.as_str()), "{file} uses {used}");
        }
    }
}

#[test]
fn unsafe_is_in_three_files() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let word = |text: &str| {
        text.lines().any(|line| {
            let code = line.split("//").next().unwrap();
            code.split(|c: char| !c.is_alphanumeric() && c != '_').any(|w| w == "unsafe")
        })
    };
    let with: Vec<String> = sources(&src)
        .iter()
        .filter(|file| word(&std::fs::read_to_string(file).unwrap()))
        .map(|file| file.strip_prefix(&src).unwrap().display().to_string())
        .collect();
    assert_eq!(with, ["container/bpf.rs", "gpu/ffi.rs", "handover.rs"]);
}
