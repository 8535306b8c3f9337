//! The driver: kernel module, management library, nvidia-uvm and capabilities.

use std::path::{Path, PathBuf};

use super::Check;
use super::program::Version;
use crate::cli::counted;
use crate::config::{DriverSource, Settings};
use crate::driver::{DriverFiles, module_version};
use crate::engine;
use crate::gpu::nvml::Nvml;
use crate::gpu::{Gpu, GpuError};
use crate::host;

/// The oldest branch that is supported.
const OLDEST: u32 = 535;

struct Facts {
    /// `driver/nvidia/version` below proc_root, and what it says.
    version_file: PathBuf,
    version: Option<String>,
    library: PathBuf,
    library_exists: bool,
    /// The version in the name of the file that the library's name leads to.
    library_file: Option<String>,
    /// What NVML says is the driver's version.
    nvml: Result<String, GpuError>,
    /// `devices` below proc_root.
    devices: Option<String>,
    modprobe: PathBuf,
    modprobe_exists: bool,
    /// Who says what containers get of the driver, and what that is, or why it can't be told.
    source: DriverSource,
    files: Result<DriverFiles, String>,
    root: PathBuf,
}

pub(super) fn checks(settings: &Settings, nvml: &Nvml) -> Vec<Check> {
    let version_file = settings.proc_root.join("driver/nvidia/version");
    let modprobe = settings.driver_root.join("usr/bin/nvidia-modprobe");
    verdict(&Facts {
        version: std::fs::read_to_string(&version_file).ok(),
        version_file,
        library: settings.nvml.clone(),
        library_exists: settings.nvml.exists(),
        library_file: settings.nvml.canonicalize().ok().and_then(|path| version_in_name(&path)),
        nvml: nvml.driver_version(),
        devices: std::fs::read_to_string(settings.proc_root.join("devices")).ok(),
        modprobe_exists: modprobe.exists(),
        modprobe,
        source: settings.driver_files,
        files: engine::driver_files(settings).map_err(|failure| failure.to_string()),
        root: settings.driver_root.clone(),
    })
}

/// `libnvidia-ml.so.580.95.05` → `580.95.05`; `None` for `libnvidia-ml.so.1`.
fn version_in_name(path: &Path) -> Option<String> {
    let (_, version) = path.file_name()?.to_str()?.split_once(".so.")?;
    version.contains('.').then(|| version.to_owned())
}

fn verdict(facts: &Facts) -> Vec<Check> {
    let module = facts.version.as_deref().and_then(module_version);
    let mut checks = vec![module_check(facts, module), library_check(facts)];
    checks.extend(version_check(facts, module));
    match (module, &facts.devices) {
        (Some(_), Some(devices)) => {
            checks.push(uvm_check(facts, devices));
            checks.push(capabilities_check(devices));
        }
        _ => checks.push(Check::skip("driver.uvm", "nvidia-uvm and capabilities come with the kernel module")),
    }
    checks.push(files_check(facts));
    checks
}

/// What containers get of the driver's user-space.
fn files_check(facts: &Facts) -> Check {
    let id = "driver.files";
    match (facts.source, &facts.files) {
        (_, Err(why)) => {
            let (found, remedy) = why.rsplit_once("; ").unwrap_or((why, "see docs/driver-files.md"));
            Check::fail(id, found, remedy)
        }
        (DriverSource::None, _) => Check::ok(id, "containers get the driver's files from the NVIDIA runtime"),
        (_, Ok(files)) if files.is_empty() => {
            let version = facts.version.as_deref().and_then(module_version).unwrap_or("the running version");
            let found = format!("no library of {version} is below {}", facts.root.display());
            Check::skip(id, format!("{found}: containers get none of the driver's files, and must bring them"))
        }
        (_, Ok(files)) => {
            let libraries = files.libraries.len();
            let all = counted(libraries + files.others.len(), "file");
            Check::ok(
                id,
                format!("containers get what they need of {all} of the driver, {libraries} of them libraries"),
            )
        }
    }
}

fn module_check(facts: &Facts, module: Option<&str>) -> Check {
    let id = "driver.module";
    match module {
        Some(version) => Check::ok(id, format!("kernel module {version}")),
        None => Check::fail(
            id,
            format!("the NVIDIA kernel module is not loaded: there is no {}", facts.version_file.display()),
            match facts.library_exists {
                true => "run: modprobe nvidia\nif that fails, the module is not built for this kernel: dkms status",
                false => "install the NVIDIA driver, branch 535 or newer, then run: modprobe nvidia",
            },
        ),
    }
}

fn library_check(facts: &Facts) -> Check {
    let id = "driver.library";
    let path = facts.library.display();
    match &facts.nvml {
        Ok(version) => Check::ok(id, format!("NVML {} ({path})", facts.library_file.as_deref().unwrap_or(version))),
        Err(_) if !facts.library_exists => Check::fail(
            id,
            format!("there is no NVML: {path}"),
            "install the driver's libraries (Debian: libnvidia-ml1), or name the file in /etc/mig-hook/config.toml: \
             [driver] nvml = \"/usr/lib64/libnvidia-ml.so.1\"",
        ),
        Err(GpuError::Library { reason, .. }) => Check::fail(
            id,
            format!("NVML can't be used: {path}: {reason}"),
            match facts.version {
                Some(_) => "see what the driver says: dmesg | grep -i nvrm",
                None => "load the kernel module first: modprobe nvidia",
            },
        ),
        Err(error @ GpuError::Symbol { .. }) => {
            Check::fail(id, error.to_string(), format!("install a driver of branch {OLDEST} or newer, then reboot"))
        }
        Err(error) => Check::fail(id, format!("NVML fails: {error}"), "see what the driver says: dmesg | grep -i nvrm"),
    }
}

/// Whether library and module are of one version, as they must be, and of one that is supported.
fn version_check(facts: &Facts, module: Option<&str>) -> Option<Check> {
    let id = "driver.version";
    let library = facts.library_file.as_deref().or(facts.nvml.as_ref().ok().map(String::as_str));
    let (module, library) = (module?, library?);
    if module != library {
        return Some(Check::fail(
            id,
            format!("the kernel module is {module} and NVML {library}: the driver was changed and not loaded again"),
            "reboot; or stop what uses the GPUs and run: modprobe -r nvidia_uvm nvidia_drm nvidia_modeset nvidia && \
             modprobe nvidia",
        ));
    }
    let old = Version::find(module).is_some_and(|version| version.major < OLDEST);
    old.then(|| {
        Check::warn(
            id,
            format!(
                "driver {module} is older than branch {OLDEST}, the oldest that is supported: slices are cut and given back \
                 there, but memory in use counts what the driver keeps for itself"
            ),
            format!("install a driver of branch {OLDEST} or newer, then reboot"),
        )
    })
}

fn uvm_check(facts: &Facts, devices: &str) -> Check {
    let id = "driver.uvm";
    let tool = super::quoted(&facts.modprobe.to_string_lossy());
    match (host::major(devices, "nvidia-uvm"), facts.modprobe_exists) {
        (Some(major), _) => Check::ok(id, format!("nvidia-uvm is loaded (major {major})")),
        (None, true) => Check::warn(
            id,
            "nvidia-uvm, which CUDA needs, is not loaded: the first container that asks has it loaded",
            format!("to load it now, run: {tool} -u -c 0"),
        ),
        (None, false) => Check::fail(
            id,
            format!("nvidia-uvm, which CUDA needs, is not loaded, and there is no {tool} to load it"),
            "run: modprobe nvidia-uvm\nat every boot: echo nvidia-uvm > /etc/modules-load.d/nvidia-uvm.conf",
        ),
    }
}

fn capabilities_check(devices: &str) -> Check {
    let id = "driver.capabilities";
    match host::major(devices, "nvidia-caps") {
        Some(major) => Check::ok(id, format!("capabilities have devices (major {major})")),
        None => Check::fail(
            id,
            "the kernel module has no capability devices (nvidia-caps): slices can't be given one by one",
            format!("install a driver of branch {OLDEST} or newer, then reboot"),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Status;
    use super::*;
    use crate::driver::{Bits, Library};

    const DEVICES: &str = "Character devices:\n195 nvidia\n236 nvidia-caps\n510 nvidia-uvm\n";

    fn whole() -> Facts {
        Facts {
            version_file: "/proc/driver/nvidia/version".into(),
            version: Some(
                "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build  (x)\nGCC version:  \
                 gcc version 14.2.0\n"
                    .into(),
            ),
            library: "/usr/lib/libnvidia-ml.so.1".into(),
            library_exists: true,
            library_file: Some("580.95.05".into()),
            nvml: Ok("580.95.05".into()),
            devices: Some(DEVICES.into()),
            modprobe: "/usr/bin/nvidia-modprobe".into(),
            modprobe_exists: true,
            source: DriverSource::None,
            files: Ok(DriverFiles::default()),
            root: "/".into(),
        }
    }

    /// Statuses by id, and the remedy of the only check that is neither ok nor skipped.
    fn fault(facts: &Facts) -> (String, Status, String) {
        let checks = verdict(facts);
        let mut faults = checks.iter().filter(|check| check.remedy.is_some());
        let fault = faults.next().unwrap_or_else(|| panic!("{checks:#?}"));
        assert!(faults.next().is_none(), "{checks:#?}");
        (fault.id.clone(), fault.status, format!("{}\n{}", fault.found, fault.remedy.as_ref().unwrap()))
    }

    #[test]
    fn a_whole_driver_is_well() {
        assert!(verdict(&whole()).iter().all(|check| check.status == Status::Ok));
        assert_eq!(version_in_name(Path::new("/usr/lib/libnvidia-ml.so.580.95.05")).as_deref(), Some("580.95.05"));
        assert_eq!(version_in_name(Path::new("/usr/lib/libnvidia-ml.so.1")), None);
    }

    #[test]
    fn each_fault_has_its_remedy() {
        let library = |reason: &str| GpuError::Library { path: "/l".into(), reason: reason.into() };
        for (facts, id, status, said) in [
            (Facts { version: None, ..whole() }, "driver.module", Status::Fail, "modprobe nvidia\n"),
            (
                Facts { nvml: Err(library("driver/library version mismatch")), library_file: None, ..whole() },
                "driver.library",
                Status::Fail,
                "version mismatch\nsee what the driver says",
            ),
            (
                Facts {
                    nvml: Err(GpuError::Symbol { symbol: "nvmlX", version: "450.1".into() }),
                    library_file: None,
                    ..whole()
                },
                "driver.library",
                Status::Fail,
                "535 or newer",
            ),
            (Facts { library_file: Some("570.1.2".into()), ..whole() }, "driver.version", Status::Fail, "reboot"),
            (
                Facts { devices: Some("195 nvidia\n236 nvidia-caps\n".into()), ..whole() },
                "driver.uvm",
                Status::Warn,
                "-u",
            ),
            (
                Facts { devices: Some("195 nvidia\n236 nvidia-caps\n".into()), modprobe_exists: false, ..whole() },
                "driver.uvm",
                Status::Fail,
                "modprobe nvidia-uvm",
            ),
            (
                Facts { devices: Some("195 nvidia\n510 nvidia-uvm\n".into()), ..whole() },
                "driver.capabilities",
                Status::Fail,
                "nvidia-caps",
            ),
        ] {
            let found = fault(&facts);
            assert!(found.0 == id && found.1 == status && found.2.contains(said), "{id}: {found:?}");
        }
        let old = whole().version.unwrap().replace("580.95.05", "470.82.01");
        let old = Facts { version: Some(old), library_file: Some("470.82.01".into()), ..whole() };
        assert_eq!(fault(&old).0, "driver.version");
    }

    #[test]
    fn what_containers_get_of_the_driver() {
        let check = |source, files| files_check(&Facts { source, files, ..whole() });
        let none = check(DriverSource::Auto, Ok(DriverFiles::default()));
        assert!(none.status == Status::Skip && none.found.contains("no library of 580.95.05 is below /:"), "{none:?}");
        let spec = "no CDI spec is in /etc/cdi; write one with: nvidia-ctk";
        let missing = check(DriverSource::Cdi, Err(spec.into()));
        assert_eq!((missing.status, missing.remedy.as_deref()), (Status::Fail, Some("write one with: nvidia-ctk")));
        let library = Library {
            source: "/x".into(),
            name: "libcuda.so.1".into(),
            soname: "libcuda.so.1".into(),
            bits: Bits::Sixtyfour,
        };
        let some = check(DriverSource::Auto, Ok(DriverFiles { libraries: vec![library], others: vec![] }));
        assert_eq!(some.found, "containers get what they need of 1 file of the driver, 1 of them libraries");
    }

    #[test]
    fn without_any_driver_two_things_are_missing() {
        let facts = Facts {
            version: None,
            library_exists: false,
            library_file: None,
            nvml: Err(GpuError::Library { path: "/l".into(), reason: "no such file".into() }),
            ..whole()
        };
        let checks = verdict(&facts);
        assert_eq!(
            checks.iter().map(|c| (c.id.as_str(), c.status)).collect::<Vec<_>>(),
            [
                ("driver.module", Status::Fail),
                ("driver.library", Status::Fail),
                ("driver.uvm", Status::Skip),
                ("driver.files", Status::Ok)
            ]
        );
        assert!(checks[0].remedy.as_ref().unwrap().starts_with("install the NVIDIA driver"));
    }
}
