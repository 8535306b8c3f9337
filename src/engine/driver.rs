//! What containers get of the driver's user-space, by the settings. Touches neither lock nor GPU.

use std::path::{Path, PathBuf};

use crate::cdi;
use crate::cdi_file;
use crate::config::{DriverSource, Settings};
use crate::driver::{self, DriverFiles};

use super::Failure;

/// The driver's files that there are to give. None is no failure where we look ourselves: then images bring what they need.
pub fn driver_files(settings: &Settings) -> Result<DriverFiles, Failure> {
    match settings.driver_files {
        DriverSource::None => Ok(DriverFiles::default()),
        DriverSource::Auto => {
            let sockets: Vec<&str> = settings.sockets.iter().map(|socket| socket.path()).collect();
            let version = driver::version(&settings.proc_root);
            Ok(version.map(|v| driver::discover(&settings.driver_root, &v, &sockets)).unwrap_or_default())
        }
        DriverSource::Cdi => from_cdi(settings),
    }
}

fn from_cdi(settings: &Settings) -> Result<DriverFiles, Failure> {
    const REMEDY: &str = "write one with: nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml";
    let failed = |path: &Path, why: String| {
        Failure::Driver(format!("driver.files = \"cdi\", and the CDI spec {}: {why}; {REMEDY}", path.display()))
    };
    let (path, files) = match &settings.driver_cdi_spec {
        Some(path) => {
            let text = cdi_file::text(path).map_err(|error| failed(path, format!("cannot be read: {error}")))?;
            let files = cdi::driver_files(&text).map_err(|error| failed(path, format!("cannot be read: {error}")))?;
            let none = || failed(path, format!("has no driver files of the kind {}", cdi::NVIDIA_KIND));
            (path.clone(), files.ok_or_else(none)?)
        }
        None => {
            let found: Option<(PathBuf, _)> = cdi_file::texts(&cdi_file::DIRS.map(Path::new))
                .find_map(|(path, text)| Some((path, cdi::driver_files(&text).ok()??)));
            found.ok_or_else(|| {
                let dirs = cdi_file::DIRS.join(" and ");
                Failure::Driver(format!(
                    "driver.files = \"cdi\", and no CDI spec of the kind {} is in {dirs}; {REMEDY}",
                    cdi::NVIDIA_KIND
                ))
            })?
        }
    };
    let stale = |missing: PathBuf| {
        failed(&path, format!("names {}, which is not there: it is of another driver", missing.display()))
    };
    driver::named(files).map_err(stale)
}
