//! `/proc/driver/nvidia/capabilities`, kept in step with the instances.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use nix::unistd::geteuid;

use crate::state::{Config, State, ci_cap_minor, gi_cap_minor};

/// Makes the gi and ci directories those of `state`, whatever an interrupted process left behind.
pub fn sync(root: &Path, config: &Config, state: &State) -> io::Result<()> {
    for (fixed, gpu) in config.gpus.iter().zip(&state.gpus) {
        let mig = root.join(format!("proc/driver/nvidia/capabilities/gpu{}/mig", fixed.minor));
        let gis = gpu.gis.iter().map(|gi| (format!("gi{}", gi.id), gi_cap_minor(fixed.minor, gi.id))).collect();
        match_dirs(&mig, &gis)?;
        for gi in &gpu.gis {
            let cis =
                gi.cis.iter().map(|ci| (format!("ci{}", ci.id), ci_cap_minor(fixed.minor, gi.id, ci.id))).collect();
            match_dirs(&mig.join(format!("gi{}", gi.id)), &cis)?;
        }
    }
    Ok(())
}

/// The three lines of a capability file.
pub fn access(minor: u32, mode: u32) -> String {
    format!("DeviceFileMinor: {minor}\nDeviceFileMode: {mode}\nDeviceFileModify: 1\n")
}

/// Writes a file with exactly this mode.
pub fn write(path: &Path, content: &str, mode: u32) -> io::Result<()> {
    fs::write(path, content)?;
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
}

/// Gives a finished directory of /proc its mode. Its owner would be shut out unless it is root.
pub fn seal(dir: &Path) -> io::Result<()> {
    let mode = if geteuid().is_root() { 0o555 } else { 0o755 };
    fs::set_permissions(dir, fs::Permissions::from_mode(mode))
}

fn match_dirs(parent: &Path, wanted: &BTreeMap<String, u32>) -> io::Result<()> {
    let mut missing = wanted.clone();
    let mut extra = Vec::new();
    for entry in fs::read_dir(parent)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if missing.remove(&name).is_none() && entry.file_type()?.is_dir() {
            extra.push(name);
        }
    }
    // Dots come first: what a killed process left under the names used below.
    extra.sort();
    for name in extra {
        let mut path = parent.join(&name);
        if !name.starts_with('.') {
            // Out of the way in one step: half a directory would pass for the next instance of that id.
            let old = parent.join(format!(".{name}.old"));
            fs::rename(&path, &old)?;
            path = old;
        }
        fs::remove_dir_all(path)?;
    }
    for (name, minor) in missing {
        // Complete before it is seen: readers take the directory as proof of the instance.
        let fresh = parent.join(format!(".{name}.new"));
        fs::create_dir(&fresh)?;
        write(&fresh.join("access"), &access(minor, 0o444), 0o444)?;
        seal(&fresh)?;
        fs::rename(&fresh, parent.join(name))?;
    }
    Ok(())
}
