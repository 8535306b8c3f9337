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

pub mod elf;
pub mod ldcache;

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

/// The version of the driver that runs, by its own file below `proc_root`.
pub fn version(proc_root: &Path) -> Option<String> {
    let text = fs::read_to_string(proc_root.join("driver/nvidia/version")).ok()?;
    module_version(&text).map(str::to_owned)
}

/// `NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build` → `580.95.05`.
pub fn module_version(text: &str) -> Option<&str> {
    let line = text.lines().find(|line| line.starts_with("NVRM version:"))?;
    let version = |word: &&str| {
        let of_numbers = word.chars().all(|c| c.is_ascii_digit() || c == '.');
        of_numbers && word.contains('.') && word.starts_with(|c: char| c.is_ascii_digit())
    };
    line.split_whitespace().find(version)
}

/// Everything of that version below a root, and the sockets at these paths where they are.
pub fn discover(root: &Path, version: &str, sockets: &[&str]) -> DriverFiles {
    let root = Root::at(root);
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
    // Those with versions of their own may be a distribution's; and programs are of no use without their libraries.
    if !libraries.iter().any(|library| library.name.ends_with(version)) {
        return DriverFiles::default();
    }
    let mut others = root.programs();
    others.extend(root.firmware(version));
    let loader_files = LOADER_DIRS.iter().flat_map(|dir| LOADER_FILES.map(|file| format!("/{dir}/{file}")));
    others.extend(loader_files.filter_map(|path| root.other(&path, &path, Metadata::is_file)));
    others.extend(sockets.iter().filter_map(|socket| {
        let is_it = |meta: &Metadata| meta.file_type().is_socket() || meta.is_dir();
        let other = root.other(socket, socket, is_it)?;
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
        // Not a pipe, which would keep us waiting.
        match source.is_file().then(|| library(&source, name_of(&source))).flatten() {
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
struct Root<'a> {
    path: &'a Path,
    /// Whose files are to be trusted.
    owners: Vec<u32>,
}

impl Root<'_> {
    fn at(path: &Path) -> Root<'_> {
        let mut owners = vec![0, nix::unistd::geteuid().as_raw()];
        // In a user namespace everybody outside is the overflow uid, root too.
        owners.extend(first::rootless().map(|_| first::OVERFLOW_UID));
        Root { path, owners }
    }

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
                    match fs::read_link(self.path.join(&there)) {
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
        Some(self.path.join(place))
    }

    /// What lies there, if nobody else than root may change it.
    fn trusted(&self, path: &Path) -> Option<(PathBuf, Metadata)> {
        let source = self.resolve(path)?;
        let meta = source.symlink_metadata().ok()?;
        let ours = self.owners.contains(&meta.uid());
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
        let within = |name: &str| dir.strip_prefix(self.path).ok().map(|dir| dir.join(name));
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
        let mut names: Vec<String> = names.filter(|name| name.starts_with("gsp") && name.ends_with(".bin")).collect();
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};
    use std::os::unix::net::UnixListener;

    const V: &str = "580.95.05";
    const NATIVE: &str = "usr/lib/x86_64-linux-gnu";

    /// A root with what is put into it.
    struct Tree(tempfile::TempDir);

    impl Tree {
        fn new() -> Tree {
            Tree(tempfile::tempdir().unwrap())
        }

        fn path(&self, relative: &str) -> PathBuf {
            self.0.path().join(relative)
        }

        fn file(&self, relative: &str, bytes: &[u8], mode: u32) {
            let path = self.path(relative);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, bytes).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        }

        fn library(&self, relative: &str, soname: &str, bits: Bits) {
            self.file(relative, &elf::tests::library(bits, soname), 0o644);
        }

        fn link(&self, relative: &str, target: &str) {
            let path = self.path(relative);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            symlink(target, path).unwrap();
        }

        fn found(&self) -> DriverFiles {
            discover(self.0.path(), V, &["/run/nvidia-persistenced/socket"])
        }

        fn libraries(&self) -> Vec<(String, String)> {
            let shown = |path: &Path| path.strip_prefix(self.0.path()).unwrap().display().to_string();
            self.found().libraries.into_iter().map(|library| (library.soname, shown(&library.source))).collect()
        }
    }

    fn pairs(expected: &[(&str, &str)]) -> Vec<(String, String)> {
        expected.iter().map(|(soname, path)| ((*soname).to_owned(), (*path).to_owned())).collect()
    }

    #[test]
    fn only_the_running_version_counts() {
        let tree = Tree::new();
        tree.library(&format!("{NATIVE}/libcuda.so.{V}"), "libcuda.so.1", Bits::Sixtyfour);
        tree.library(&format!("{NATIVE}/libcuda.so.570.1.2"), "libcuda.so.1", Bits::Sixtyfour);
        tree.library(&format!("{NATIVE}/libnvidia-ml.so.570.1.2"), "libnvidia-ml.so.1", Bits::Sixtyfour);
        tree.library(&format!("{NATIVE}/libnvidia-nvvm70.so.4"), "libnvidia-nvvm70.so.4", Bits::Sixtyfour);
        tree.link(&format!("{NATIVE}/libcuda.so.1"), "libcuda.so.570.1.2");
        tree.file(&format!("{NATIVE}/libnvidia-text.so.{V}"), b"not a library", 0o644);
        fs::create_dir(tree.path(&format!("{NATIVE}/libnvidia-dir.so.{V}"))).unwrap();
        let cuda = format!("{NATIVE}/libcuda.so.{V}");
        let nvvm = format!("{NATIVE}/libnvidia-nvvm70.so.4");
        assert_eq!(tree.libraries(), pairs(&[("libcuda.so.1", &cuda), ("libnvidia-nvvm70.so.4", &nvvm)]));
        assert!(discover(tree.0.path(), "535.1.1", &[]).is_empty(), "what has a version of its own is not enough");
    }

    #[test]
    fn debians_alternatives_and_a_cache_lead_to_the_libraries() {
        let tree = Tree::new();
        let current = format!("{NATIVE}/nvidia/current");
        tree.library(&format!("{current}/libcuda.so.{V}"), "libcuda.so.1", Bits::Sixtyfour);
        tree.library(
            &format!("opt/gpu/libnvidia-ptxjitcompiler.so.{V}"),
            "libnvidia-ptxjitcompiler.so.1",
            Bits::Sixtyfour,
        );
        tree.library(&format!("opt/gpu/libnvidia-ml.so.{V}"), "libnvidia-ml.so.1", Bits::Sixtyfour);
        tree.library(&format!("opt/gpu/vdpau/libvdpau_nvidia.so.{V}"), "libvdpau_nvidia.so.1", Bits::Sixtyfour);
        tree.link(&format!("{NATIVE}/libcuda.so.1"), "/etc/alternatives/glx--libcuda.so.1-x86_64-linux-gnu");
        tree.link("etc/alternatives/glx--libcuda.so.1-x86_64-linux-gnu", &format!("/{current}/libcuda.so.1"));
        tree.link(&format!("{current}/libcuda.so.1"), &format!("libcuda.so.{V}"));
        tree.link("lib", "usr/lib");
        let cache = ldcache::tests::cache(&[
            ("libcuda.so.1", "/lib/x86_64-linux-gnu/libcuda.so.1"),
            ("libnvidia-ml.so.1", "/opt/gpu/libnvidia-ml.so.1"),
            ("libz.so.1", "/elsewhere/libz.so.1"),
        ]);
        tree.file("etc/ld.so.cache", &cache, 0o644);
        tree.link("opt/gpu/libnvidia-ml.so.1", &format!("libnvidia-ml.so.{V}"));
        let found = tree.libraries();
        let expected = [
            ("libcuda.so.1", format!("{current}/libcuda.so.{V}")),
            ("libnvidia-ml.so.1", format!("opt/gpu/libnvidia-ml.so.{V}")),
            ("libnvidia-ptxjitcompiler.so.1", format!("opt/gpu/libnvidia-ptxjitcompiler.so.{V}")),
            ("libvdpau_nvidia.so.1", format!("opt/gpu/vdpau/libvdpau_nvidia.so.{V}")),
        ];
        assert_eq!(found, expected.map(|(soname, path)| (soname.to_owned(), path)));
        fs::remove_file(tree.path("etc/ld.so.cache")).unwrap();
        assert_eq!(
            tree.libraries(),
            pairs(&[("libcuda.so.1", &format!("{current}/libcuda.so.{V}"))]),
            "without a cache"
        );
    }

    #[test]
    fn libraries_for_32_bits_are_told_apart() {
        let tree = Tree::new();
        tree.library(&format!("usr/lib64/libcuda.so.{V}"), "libcuda.so.1", Bits::Sixtyfour);
        tree.library(&format!("usr/lib/libcuda.so.{V}"), "libcuda.so.1", Bits::Thirtytwo);
        let bits: Vec<Bits> = tree.found().libraries.into_iter().map(|library| library.bits).collect();
        let both = [Bits::Sixtyfour, Bits::Thirtytwo];
        assert_eq!(bits, both[..if cfg!(target_arch = "aarch64") { 1 } else { 2 }]);
    }

    #[test]
    fn links_never_lead_out_of_the_root() {
        let outside = tempfile::tempdir().unwrap();
        let there = outside.path().join(format!("libcuda.so.{V}"));
        fs::write(&there, elf::tests::library(Bits::Sixtyfour, "libcuda.so.1")).unwrap();
        let tree = Tree::new();
        tree.link("usr/lib64", outside.path().to_str().unwrap());
        tree.link("usr/lib/x86_64-linux-gnu", "../../../../../../../../../../../../../../..");
        tree.link(&format!("usr/lib/libcuda.so.{V}"), there.to_str().unwrap());
        tree.link("lib64", "lib64");
        assert!(tree.found().is_empty(), "{:?}", tree.found());
        let root = Root::at(tree.0.path());
        assert_eq!(root.resolve(Path::new("usr/lib/x86_64-linux-gnu")), Some(tree.path("")));
        assert_eq!(root.resolve(Path::new("lib64/x")), None, "a loop");
        assert_eq!(root.resolve(Path::new("/../a/./b/../c")), Some(tree.path("a/c")));
    }

    #[test]
    fn what_others_could_change_is_left_out() {
        let tree = Tree::new();
        tree.library(&format!("usr/lib64/libcuda.so.{V}"), "libcuda.so.1", Bits::Sixtyfour);
        tree.library(&format!("usr/lib64/libnvidia-ml.so.{V}"), "libnvidia-ml.so.1", Bits::Sixtyfour);
        let mode = |relative: &str, mode| fs::set_permissions(tree.path(relative), fs::Permissions::from_mode(mode));
        mode(&format!("usr/lib64/libcuda.so.{V}"), 0o664).unwrap();
        assert_eq!(tree.libraries(), pairs(&[("libnvidia-ml.so.1", &format!("usr/lib64/libnvidia-ml.so.{V}"))]));
        mode(&format!("usr/lib64/libcuda.so.{V}"), 0o644).unwrap();
        if std::os::unix::fs::chown(tree.path(&format!("usr/lib64/libcuda.so.{V}")), Some(1000), None).is_ok() {
            assert_eq!(tree.libraries().len(), 1, "a user's");
        }
    }

    #[test]
    fn programs_firmware_sockets_and_what_other_loaders_read() {
        let tree = Tree::new();
        tree.library(&format!("usr/lib64/libcuda.so.{V}"), "libcuda.so.1", Bits::Sixtyfour);
        tree.file("usr/lib/nvidia/current/nvidia-smi", b"x", 0o755);
        tree.link("usr/bin/nvidia-smi", "/etc/alternatives/nvidia--nvidia-smi");
        tree.link("etc/alternatives/nvidia--nvidia-smi", "/usr/lib/nvidia/current/nvidia-smi");
        tree.file("usr/bin/nvidia-debugdump", b"x", 0o644);
        tree.file("usr/sbin/nvidia-persistenced", b"x", 0o755);
        tree.link("lib", "usr/lib");
        for name in ["gsp_tu10x.bin", "gsp_ga10x.bin", "other.bin"] {
            tree.file(&format!("usr/lib/firmware/nvidia/{V}/{name}"), b"x", 0o644);
        }
        tree.file("usr/lib/firmware/nvidia/570.1.2/gsp_ga10x.bin", b"x", 0o644);
        tree.file("etc/OpenCL/vendors/nvidia.icd", b"x", 0o644);
        tree.file("usr/share/vulkan/icd.d/nvidia_icd.json", b"x", 0o644);
        fs::create_dir_all(tree.path("run/nvidia-persistenced")).unwrap();
        let _listener = UnixListener::bind(tree.path("run/nvidia-persistenced/socket")).unwrap();
        let found = tree.found().others;
        let destinations: Vec<&str> = found.iter().map(|other| other.destination.as_str()).collect();
        let expected = [
            "/usr/bin/nvidia-smi",
            "/usr/bin/nvidia-persistenced",
            "/lib/firmware/nvidia/580.95.05/gsp_ga10x.bin",
            "/lib/firmware/nvidia/580.95.05/gsp_tu10x.bin",
            "/usr/share/vulkan/icd.d/nvidia_icd.json",
            "/etc/OpenCL/vendors/nvidia.icd",
            "/run/nvidia-persistenced/socket",
        ];
        assert_eq!(destinations, expected);
        assert_eq!(found[0].source, tree.path("usr/lib/nvidia/current/nvidia-smi"));
        assert!(found.iter().all(|other| other.source.starts_with(tree.0.path())));
        assert!(found[0].options.contains(&"ro".to_owned()) && !found[6].options.contains(&"ro".to_owned()));
        assert_eq!(discover(tree.0.path(), V, &[]).others.len(), 6, "sockets are those that are asked for");
    }

    #[test]
    fn the_version_is_the_kernel_modules() {
        let classic = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.261.03  Tue Jul 22";
        assert_eq!(module_version(classic), Some("535.261.03"));
        let open =
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build  (x)\nGCC version: 14.2";
        assert_eq!(module_version(open), Some("580.95.05"));
        assert_eq!((module_version("GCC version: 14.2.0"), version(Path::new("/nonexistent"))), (None, None));
        assert_eq!(module_version("NVRM version: .. x86_64"), None);
    }

    #[test]
    fn what_a_spec_names_must_be_there() {
        let tree = Tree::new();
        let (cuda, smi) = (tree.path("libcuda.so.1.2"), tree.path("nvidia-smi"));
        tree.library("libcuda.so.1.2", "libcuda.so.1", Bits::Sixtyfour);
        tree.file("nvidia-smi", b"x", 0o755);
        let entry = |path: &Path| (path.to_owned(), "/usr/bin/nvidia-smi".to_owned(), vec!["ro".to_owned()]);
        nix::unistd::mkfifo(&tree.path("pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        let files = named(vec![entry(&cuda), entry(&smi), entry(&tree.path("pipe"))]).unwrap();
        assert_eq!(
            (files.libraries[0].soname.as_str(), files.others[0].source.as_path()),
            ("libcuda.so.1", smi.as_path())
        );
        assert_eq!(named(vec![entry(&cuda), entry(Path::new("/nonexistent"))]), Err("/nonexistent".into()));
    }
}
