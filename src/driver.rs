//! The driver's user-space on the host: the libraries of the running version, its programs, and what goes with them.
//!
//! Found as a loader finds them: by the cache under `driver.root`, else where distributions put them. Links are followed
//! within that root only. What somebody else than root could change is left out, since every container would run it.

use std::collections::BTreeSet;
use std::fs::{self, File, Metadata};
use std::io::Read;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Component, Path, PathBuf};

use crate::first;

mod elf;
mod ldcache;

pub use elf::Bits;

/// Where libraries are when no cache says so.
const LIBRARY_DIRS: [&str; 10] = [
    "usr/lib/x86_64-linux-gnu",
    "usr/lib/x86_64-linux-gnu/nvidia/current",
    "usr/lib/aarch64-linux-gnu",
    "usr/lib/aarch64-linux-gnu/nvidia/current",
    "usr/lib/i386-linux-gnu",
    "usr/lib/i386-linux-gnu/nvidia/current",
    "usr/lib64",
    "usr/lib",
    "lib64",
    "usr/lib32",
];
/// Below them: the VDPAU back end is found there by its own loader.
const BELOW: &str = "vdpau";
/// Libraries of the driver with versions of their own.
const OTHER_VERSIONS: [&str; 5] = [
    "libnvidia-nvvm70.so.",
    "libnvidia-egl-gbm.so.",
    "libnvidia-egl-wayland.so.",
    "libnvidia-egl-xcb.so.",
    "libnvidia-egl-xlib.so.",
];
const PROGRAM_DIRS: [&str; 6] = ["usr/bin", "usr/sbin", "bin", "sbin", "usr/local/bin", "usr/local/sbin"];
const PROGRAMS: [&str; 5] =
    ["nvidia-smi", "nvidia-debugdump", "nvidia-persistenced", "nvidia-cuda-mps-control", "nvidia-cuda-mps-server"];
/// Files by which other loaders find the driver, where they are (NVIDIA Container Toolkit, internal/discover/graphics.go).
const LOADER_DIRS: [&str; 2] = ["usr/share", "etc"];
const LOADER_FILES: [&str; 11] = [
    "OpenCL/vendors/nvidia.icd",
    "vulkan/icd.d/nvidia_icd.json",
    "vulkan/icd.d/nvidia_icd.x86_64.json",
    "vulkan/icd.d/nvidia_icd.aarch64.json",
    "vulkan/implicit_layer.d/nvidia_layers.json",
    "glvnd/egl_vendor.d/10_nvidia.json",
    "egl/egl_external_platform.d/10_nvidia_wayland.json",
    "egl/egl_external_platform.d/15_nvidia_gbm.json",
    "egl/egl_external_platform.d/20_nvidia_xcb.json",
    "egl/egl_external_platform.d/20_nvidia_xlib.json",
    "nvidia/nvoptix.bin",
];
/// Links that are followed in one path, as the kernel does (path_resolution(7)).
const LINKS: usize = 40;
/// Who owns what has no owner in our user namespace (user_namespaces(7)).
const OVERFLOW_UID: u32 = 65534;

/// A library of the driver.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Library {
    /// The file, absolute, without links.
    pub source: PathBuf,
    /// Its own name, as `libcuda.so.580.95.05`.
    pub name: String,
    /// What programs ask for, as `libcuda.so.1`; of some libraries the same.
    pub soname: String,
    /// For which processes.
    pub bits: Bits,
}

/// Another file of the driver, and where programs look for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Other {
    /// The file, absolute, without links.
    pub source: PathBuf,
    /// Absolute, as a container has it.
    pub destination: String,
    /// Mount options; those of a socket don't make it read-only.
    pub options: Vec<String>,
}

/// What there is to give to a container.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DriverFiles {
    /// By name, 64-bit ones first.
    pub libraries: Vec<Library>,
    /// Programs, firmware, sockets, and what other loaders read.
    pub others: Vec<Other>,
}

impl DriverFiles {
    /// Whether nothing was found.
    pub fn is_empty(&self) -> bool {
        self.libraries.is_empty() && self.others.is_empty()
    }
}

/// A socket by which the driver's daemons are spoken to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Socket {
    /// nvidia-persistenced's.
    Persistenced,
    /// nvidia-fabricmanager's.
    Fabricmanager,
    /// The directory of the MPS control daemon's pipes.
    Mps,
}

impl Socket {
    fn path(self) -> &'static str {
        match self {
            Socket::Persistenced => "/run/nvidia-persistenced/socket",
            Socket::Fabricmanager => "/run/nvidia-fabricmanager/socket",
            Socket::Mps => "/tmp/nvidia-mps",
        }
    }
}

/// The version of the driver that runs, by its own file below `proc_root`.
pub fn version(proc_root: &Path) -> Option<String> {
    let text = fs::read_to_string(proc_root.join("driver/nvidia/version")).ok()?;
    module_version(&text).map(str::to_owned)
}

/// `NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build` → `580.95.05`.
pub fn module_version(text: &str) -> Option<&str> {
    let line = text.lines().find(|line| line.starts_with("NVRM version:"))?;
    let version = |word: &&str| word.contains('.') && word.chars().all(|c| c.is_ascii_digit() || c == '.');
    line.split_whitespace().find(version)
}

/// Everything of that version below a root, and these sockets where they are.
pub fn discover(root: &Path, version: &str, sockets: &[Socket]) -> DriverFiles {
    let root = Root(root);
    let mut libraries: Vec<Library> = Vec::new();
    for dir in root.library_dirs() {
        for below in ["", BELOW] {
            libraries.extend(root.libraries_in(&dir.join(below), version));
        }
    }
    // A name found twice is the one that a loader would find: the first.
    let mut seen = BTreeSet::new();
    libraries.retain(|library| seen.insert((library.bits, library.name.clone())));
    libraries.sort_by(|a, b| (a.bits, &a.name).cmp(&(b.bits, &b.name)));
    if libraries.is_empty() {
        return DriverFiles::default(); // programs without their libraries are of no use
    }
    let mut others = root.programs();
    others.extend(root.firmware(version));
    let loader_files = LOADER_DIRS.iter().flat_map(|dir| LOADER_FILES.map(|file| format!("/{dir}/{file}")));
    others.extend(loader_files.filter_map(|path| root.other(&path, &path, Metadata::is_file)));
    others.extend(sockets.iter().filter_map(|socket| {
        let is_it = |meta: &Metadata| meta.file_type().is_socket() || meta.is_dir();
        let other = root.other(socket.path(), socket.path(), is_it)?;
        Some(Other { options: options(&["nosuid", "nodev", "noexec", "rbind", "rprivate"]), ..other })
    }));
    DriverFiles { libraries, others }
}

/// What lies at these paths of this machine, as a CDI spec names them: source, destination and mount options of each. The
/// first that is not there is an error.
pub fn named(mounts: Vec<(PathBuf, String, Vec<String>)>) -> Result<DriverFiles, PathBuf> {
    let mut files = DriverFiles::default();
    for (source, destination, options) in mounts {
        if !source.exists() {
            return Err(source);
        }
        match library(&source, name_of(&source)) {
            Some(library) if library.name.contains(".so") => files.libraries.push(library),
            _ => files.others.push(Other { source, destination, options }),
        }
    }
    Ok(files)
}

fn options(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

fn name_of(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// Below which everything is looked for, links too.
struct Root<'a>(&'a Path);

impl Root<'_> {
    /// Where `path` leads within the root: without links, and never out of it.
    fn resolve(&self, path: &Path) -> Option<PathBuf> {
        let mut links = 0;
        let mut place = PathBuf::new();
        let mut rest: Vec<PathBuf> = vec![path.to_owned()];
        while let Some(next) = rest.pop() {
            let mut parts = next.components();
            let Some(part) = parts.next() else { continue };
            rest.push(parts.as_path().to_owned());
            match part {
                Component::RootDir => place.clear(),
                Component::ParentDir => drop(place.pop()),
                Component::Normal(name) => {
                    let there = place.join(name);
                    match fs::read_link(self.0.join(&there)) {
                        Ok(target) => {
                            links += 1;
                            if links > LINKS {
                                return None;
                            }
                            rest.push(target);
                        }
                        Err(_) => place = there,
                    }
                }
                Component::CurDir | Component::Prefix(_) => {}
            }
        }
        Some(self.0.join(place))
    }

    /// What lies there, if nobody else than root may change it.
    fn trusted(&self, path: &Path) -> Option<(PathBuf, Metadata)> {
        let source = self.resolve(path)?;
        let meta = source.symlink_metadata().ok()?;
        // In a user namespace everybody outside is the overflow uid, root too.
        let outside = first::rootless().is_some() && meta.uid() == OVERFLOW_UID;
        let ours = outside || meta.uid() == 0 || meta.uid() == nix::unistd::geteuid().as_raw();
        // A socket's mode says who may speak to it.
        if meta.file_type().is_socket() || meta.is_dir() || (ours && meta.mode() & 0o022 == 0) {
            return Some((source, meta));
        }
        tracing::warn!("{} can be changed by others than root and is left out", source.display());
        None
    }

    fn other(&self, path: &str, destination: &str, is_it: impl Fn(&Metadata) -> bool) -> Option<Other> {
        let (source, meta) = self.trusted(Path::new(path))?;
        let options = options(&["ro", "nosuid", "nodev", "rbind", "rprivate"]);
        is_it(&meta).then(|| Other { source, destination: destination.to_owned(), options })
    }

    /// Directories of the driver's libraries, in the order of a loader: those of CUDA and of the management library in the
    /// cache, by name and where its links lead (Debian's alternatives); else the usual ones.
    fn library_dirs(&self) -> Vec<PathBuf> {
        let mut dirs: Vec<PathBuf> = Vec::new();
        for path in self.cached() {
            let resolved = self.resolve(&path).and_then(|found| found.parent().map(Path::to_owned));
            let named = path.parent().and_then(|dir| self.resolve(dir));
            dirs.extend([resolved, named].into_iter().flatten());
        }
        if dirs.is_empty() {
            dirs = LIBRARY_DIRS.iter().filter_map(|dir| self.resolve(Path::new(dir))).collect();
        }
        let mut seen = BTreeSet::new();
        dirs.retain(|dir| seen.insert(dir.clone()));
        dirs
    }

    fn cached(&self) -> Vec<PathBuf> {
        let mut bytes = Vec::new();
        let cache = self.resolve(Path::new("etc/ld.so.cache")).and_then(|path| File::open(path).ok());
        if cache.is_none_or(|file| file.take(ldcache::LIMIT).read_to_end(&mut bytes).is_err()) {
            return Vec::new();
        }
        let key = |name: &str| name.starts_with("libcuda.so.") || name.starts_with("libnvidia-ml.so.");
        let entries = ldcache::entries(&bytes).into_iter().filter(|(name, _)| key(name));
        entries.map(|(_, path)| PathBuf::from(path)).collect()
    }

    /// Libraries that carry the driver's version, or one of their own, in a resolved directory.
    fn libraries_in(&self, dir: &Path, version: &str) -> Vec<Library> {
        let suffix = format!(".so.{version}");
        let entries = fs::read_dir(dir).into_iter().flatten().flatten();
        let named = entries.filter_map(|entry| entry.file_name().into_string().ok()).filter(|name| {
            let ours = name.starts_with("lib") && name.ends_with(&suffix);
            ours || OTHER_VERSIONS.iter().any(|beginning| name.starts_with(beginning))
        });
        let within = |name: &str| dir.strip_prefix(self.0).ok().map(|dir| dir.join(name));
        let found = named.filter_map(|name| {
            let (source, meta) = self.trusted(&within(&name)?)?;
            // A link to it has another name, and is made anew from the SONAME.
            (meta.is_file() && source.file_name()? == name.as_str()).then(|| library(&source, name))?
        });
        found.collect()
    }

    fn programs(&self) -> Vec<Other> {
        let find = |name: &str| {
            let paths = PROGRAM_DIRS.iter().map(|dir| format!("/{dir}/{name}"));
            let executable = |meta: &Metadata| meta.is_file() && meta.mode() & 0o111 != 0;
            paths.into_iter().find_map(|path| self.other(&path, &format!("/usr/bin/{name}"), executable))
        };
        PROGRAMS.iter().filter_map(|name| find(name)).collect()
    }

    fn firmware(&self, version: &str) -> Vec<Other> {
        let dir = format!("/lib/firmware/nvidia/{version}");
        let Some(found) = self.resolve(Path::new(&dir)) else { return Vec::new() };
        let entries = fs::read_dir(found).into_iter().flatten().flatten();
        let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
        let mut names: Vec<String> =
            names.filter(|name| name.starts_with("gsp") && name.ends_with(".bin")).collect();
        names.sort();
        let path = |name: &String| format!("{dir}/{name}");
        names.iter().filter_map(|name| self.other(&path(name), &path(name), Metadata::is_file)).collect()
    }
}

fn library(source: &Path, name: String) -> Option<Library> {
    let (bits, soname) = elf::read(&File::open(source).ok()?)?;
    let soname = soname.unwrap_or_else(|| name.clone());
    Some(Library { source: source.to_owned(), name, soname, bits })
}
