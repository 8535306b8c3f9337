//! What a driver tree has as `nvidia-smi`: the GPUs and MIG devices that this process can open.
//!
//! `make build` links it statically, so that it runs in any container. A static program can't load a library: it finds the
//! management library where a loader would, and reads there what the library itself would answer from.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};

use nvidia_ml::code::Code;
use nvidia_ml::layout::LIBRARY;
use nvidia_ml::rules;
use nvidia_ml::store::Machine;

/// Where glibc looks when no variable says more, on Debian and on Fedora.
const DIRS: [&str; 6] =
    ["/lib/x86_64-linux-gnu", "/usr/lib/x86_64-linux-gnu", "/lib64", "/usr/lib64", "/lib", "/usr/lib"];

fn main() -> ExitCode {
    match run() {
        Ok(text) => {
            // Not println!, which panics when the reader has had enough.
            let _ = std::io::stdout().write_all(text.as_bytes());
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("nvidia-smi (nvml-sim): {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<String> {
    let library = library().with_context(|| format!("no {LIBRARY} where a loader looks for it"))?;
    let machine = Machine::of_library(&std::fs::canonicalize(&library)?)?;
    let snapshot = machine.snapshot()?;
    let mut text = format!("nvml-sim, driver {}, library {}\n", machine.config.driver_version, library.display());
    for (index, gpu) in snapshot.state.gpus.iter().enumerate() {
        let board = machine.config.board(index).context("a GPU without a board")?;
        text += &format!("GPU {index}: {} (UUID: {})\n", board.name, machine.config.gpus[index].uuid);
        let devices = gpu.gis.iter().flat_map(|gi| gi.cis.iter().map(move |ci| (gi, ci)));
        for (place, (gi, ci)) in devices.enumerate() {
            let owner = board.profile(gi.profile).context("a GPU instance without a profile")?;
            let name = rules::ci_profile(owner, ci.profile, Code::UNKNOWN).map(|profile| &profile.name);
            let name = name.ok().context("a compute instance without a profile")?;
            let uuid = machine.config.mig_uuid(index, gi.id, ci.id);
            text += &format!("  MIG {name:15} Device {place:2}: (UUID: {uuid})\n");
        }
    }
    Ok(text)
}

/// The management library, where a loader would find it.
fn library() -> Option<PathBuf> {
    let named = std::env::var_os("LD_LIBRARY_PATH").unwrap_or_default();
    let mut dirs: Vec<PathBuf> = std::env::split_paths(&named).collect();
    dirs.extend(DIRS.map(PathBuf::from));
    dirs.iter().map(|dir| dir.join(LIBRARY)).find(|path| Path::new(path).is_file())
}
