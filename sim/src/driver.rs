//! The user-space of a driver, as its installer lays it out on a Debian host: libraries of one version with their links, a
//! cache of them for the loader, programs, firmware, a socket, and the files by which other loaders find its parts.
//!
//! All but the management library and nvidia-smi only say their name.

use std::fs;
use std::io;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use crate::elf::{Bits, shared_object};
use crate::layout::LIBRARY;
use crate::ldcache::{self, Entry};

/// Where the libraries of this machine's architecture lie.
pub const LIBRARY_DIR: &str =
    if cfg!(target_arch = "aarch64") { "usr/lib/aarch64-linux-gnu" } else { "usr/lib/x86_64-linux-gnu" };
const LIBRARY_DIR_32: &str = "usr/lib/i386-linux-gnu";

/// A part that an administrator may have installed or not.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Part {
    /// The management library and its tools.
    Utility,
    /// CUDA and OpenCL.
    Compute,
    /// Encoding and decoding.
    Video,
    /// OpenGL, Vulkan and EGL.
    Graphics,
    /// The same for 32-bit programs.
    Compat32,
}

/// All of them.
pub const PARTS: [Part; 5] = [Part::Utility, Part::Compute, Part::Video, Part::Graphics, Part::Compat32];

/// Stem, part, what follows the SONAME's `.so.` (the driver's version where empty), whether there is one for 32 bits too.
/// As driver 580 has them.
const LIBRARIES: [(&str, Part, &str, bool); 32] = [
    ("libnvidia-cfg", Part::Utility, "1", false),
    ("libnvidia-sandboxutils", Part::Utility, "1", false),
    ("libcuda", Part::Compute, "1", true),
    ("libcudadebugger", Part::Compute, "1", false),
    ("libnvidia-allocator", Part::Compute, "1", true),
    ("libnvidia-gpucomp", Part::Compute, "", true),
    ("libnvidia-nvvm", Part::Compute, "4", true),
    ("libnvidia-opencl", Part::Compute, "1", true),
    ("libnvidia-pkcs11", Part::Compute, "", false),
    ("libnvidia-pkcs11-openssl3", Part::Compute, "", false),
    ("libnvidia-ptxjitcompiler", Part::Compute, "1", true),
    ("libnvcuvid", Part::Video, "1", true),
    ("libnvidia-encode", Part::Video, "1", true),
    ("libnvidia-opticalflow", Part::Video, "1", true),
    ("vdpau/libvdpau_nvidia", Part::Video, "1", true),
    ("libEGL_nvidia", Part::Graphics, "0", true),
    ("libGLESv1_CM_nvidia", Part::Graphics, "1", true),
    ("libGLESv2_nvidia", Part::Graphics, "2", true),
    ("libGLX_nvidia", Part::Graphics, "0", true),
    ("libnvidia-eglcore", Part::Graphics, "", true),
    ("libnvidia-fbc", Part::Graphics, "1", true),
    ("libnvidia-glcore", Part::Graphics, "", true),
    ("libnvidia-glsi", Part::Graphics, "", true),
    ("libnvidia-glvkspirv", Part::Graphics, "", true),
    ("libnvidia-gtk3", Part::Graphics, "", false),
    ("libnvidia-ngx", Part::Graphics, "1", false),
    ("libnvidia-present", Part::Graphics, "", false),
    ("libnvidia-rtcore", Part::Graphics, "", false),
    ("libnvidia-tls", Part::Graphics, "", true),
    ("libnvidia-vksc-core", Part::Graphics, "1", false),
    ("libnvidia-wayland-client", Part::Graphics, "", false),
    ("libnvoptix", Part::Graphics, "1", false),
];

/// Libraries with versions of their own: file, part and SONAME.
const OWN_VERSIONS: [(&str, Part, &str); 3] = [
    ("libnvidia-nvvm70.so.4", Part::Compute, "libnvidia-nvvm70.so.4"),
    ("libnvidia-egl-gbm.so.1.1.2", Part::Graphics, "libnvidia-egl-gbm.so.1"),
    ("libnvidia-egl-wayland.so.1.1.20", Part::Graphics, "libnvidia-egl-wayland.so.1"),
];

/// Those that programs are linked with by a name without a number.
const LINKED: [&str; 3] = ["libcuda", "libnvcuvid", "libnvidia-encode"];

const PROGRAMS: [(&str, Part); 4] = [
    ("nvidia-debugdump", Part::Utility),
    ("nvidia-persistenced", Part::Utility),
    ("nvidia-cuda-mps-control", Part::Compute),
    ("nvidia-cuda-mps-server", Part::Compute),
];

const TEXTS: [(&str, Part, &str); 6] = [
    ("etc/OpenCL/vendors/nvidia.icd", Part::Compute, "libnvidia-opencl.so.1\n"),
    (
        "usr/share/vulkan/icd.d/nvidia_icd.json",
        Part::Graphics,
        "{\"ICD\": {\"library_path\": \"libGLX_nvidia.so.0\"}}\n",
    ),
    ("usr/share/vulkan/implicit_layer.d/nvidia_layers.json", Part::Graphics, "{\"layers\": []}\n"),
    (
        "usr/share/glvnd/egl_vendor.d/10_nvidia.json",
        Part::Graphics,
        "{\"ICD\": {\"library_path\": \"libEGL_nvidia.so.0\"}}\n",
    ),
    (
        "usr/share/egl/egl_external_platform.d/15_nvidia_gbm.json",
        Part::Graphics,
        "{\"ICD\": {\"library_path\": \"libnvidia-egl-gbm.so.1\"}}\n",
    ),
    (
        "usr/share/egl/egl_external_platform.d/10_nvidia_wayland.json",
        Part::Graphics,
        "{\"ICD\": {\"library_path\": \"libnvidia-egl-wayland.so.1\"}}\n",
    ),
];

/// What a tree is to have.
#[derive(Debug)]
pub struct Tree<'a> {
    /// The driver's version.
    pub version: &'a str,
    /// Its parts.
    pub parts: &'a [Part],
    /// The management library, to be copied.
    pub library: &'a Path,
    /// What `nvidia-smi` is to be, to be copied.
    pub smi: Option<&'a Path>,
}

/// The file that [`lay_out`] makes of the management library, in a root.
pub fn library_file(version: &str) -> String {
    format!("{LIBRARY_DIR}/{}.{version}", LIBRARY.trim_end_matches(".1"))
}

/// Lays it out below a root.
pub fn lay_out(root: &Path, tree: &Tree) -> io::Result<()> {
    let mut entries = libraries(root, tree, Bits::Sixtyfour)?;
    if has(tree, Part::Compat32) {
        entries.extend(libraries(root, tree, Bits::Thirtytwo)?);
    }
    for (name, _) in PROGRAMS.iter().filter(|(_, part)| has(tree, *part)) {
        program(root, name, &format!("#!/bin/sh\necho \"{name} of nvml-sim {}\"\n", tree.version))?;
    }
    if let Some(smi) = tree.smi.filter(|_| has(tree, Part::Utility)) {
        let path = file(root, "usr/bin/nvidia-smi")?;
        fs::copy(smi, &path)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    }
    for (path, _, text) in TEXTS.iter().filter(|(_, part, _)| has(tree, *part)) {
        write(&file(root, path)?, text.as_bytes())?;
    }
    for name in ["gsp_ga10x.bin", "gsp_tu10x.bin"] {
        let path = file(root, &format!("usr/lib/firmware/nvidia/{}/{name}", tree.version))?;
        write(&path, format!("{name} of nvml-sim {}\n", tree.version).as_bytes())?;
    }
    socket(&file(root, "run/nvidia-persistenced/socket")?)?;
    // As merged-/usr hosts have it.
    if !root.join("lib").exists() {
        symlink("usr/lib", root.join("lib"))?;
    }
    write(&file(root, "etc/ld.so.conf")?, format!("/{LIBRARY_DIR}\n/{LIBRARY_DIR_32}\n").as_bytes())?;
    write(&file(root, "etc/ld.so.cache")?, &ldcache::text(&entries))
}

fn has(tree: &Tree, part: Part) -> bool {
    tree.parts.contains(&part)
}

/// The libraries of one kind, with their links. What a cache says of them.
fn libraries(root: &Path, tree: &Tree, bits: Bits) -> io::Result<Vec<Entry>> {
    let dir = if bits == Bits::Sixtyfour { LIBRARY_DIR } else { LIBRARY_DIR_32 };
    let mut entries = Vec::new();
    let mut add = |name: &str, target: &str| -> io::Result<()> {
        if name != target {
            symlink(target, file(root, &format!("{dir}/{name}"))?)?;
        }
        let known = Entry { name: name.to_owned(), path: format!("/{dir}/{name}"), bits };
        entries.push(known);
        Ok(())
    };
    let version = tree.version;
    for (stem, _, number, both) in LIBRARIES.iter().filter(|(_, part, ..)| has(tree, *part)) {
        if bits == Bits::Thirtytwo && !both {
            continue;
        }
        let (below, stem) = stem.rsplit_once('/').map_or(("", *stem), |(below, stem)| (below, stem));
        let whole = format!("{stem}.so.{version}");
        let soname = if number.is_empty() { whole.clone() } else { format!("{stem}.so.{number}") };
        stub(root, &format!("{dir}/{below}/{whole}"), bits, &soname, version)?;
        if !below.is_empty() {
            symlink(&whole, root.join(dir).join(below).join(soname))?;
            continue; // the loader doesn't look there
        }
        add(&soname, &whole)?;
        if LINKED.contains(&stem) {
            add(&format!("{stem}.so"), &soname)?;
        }
    }
    if has(tree, Part::Utility) {
        let whole = library_file(version);
        let name = whole.rsplit('/').next().unwrap_or_default();
        match bits {
            Bits::Sixtyfour => {
                let path = file(root, &whole)?;
                fs::copy(tree.library, &path)?;
                fs::set_permissions(&path, fs::Permissions::from_mode(0o644))?;
            }
            Bits::Thirtytwo => stub(root, &format!("{dir}/{name}"), bits, LIBRARY, version)?,
        }
        add(LIBRARY, name)?;
    }
    let native = OWN_VERSIONS.iter().filter(|(_, part, _)| bits == Bits::Sixtyfour && has(tree, *part));
    for (whole, _, soname) in native {
        stub(root, &format!("{dir}/{whole}"), bits, soname, version)?;
        add(soname, whole)?;
    }
    Ok(entries)
}

fn stub(root: &Path, path: &str, bits: Bits, soname: &str, version: &str) -> io::Result<()> {
    let name = path.rsplit('/').next().unwrap_or_default();
    let text = format!("{name} of nvml-sim {version}");
    write(&file(root, path)?, &shared_object(bits, soname, &text))
}

fn program(root: &Path, name: &str, text: &str) -> io::Result<()> {
    let path = file(root, &format!("usr/bin/{name}"))?;
    fs::write(&path, text)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))
}

/// A path below the root whose directory is there.
fn file(root: &Path, path: &str) -> io::Result<PathBuf> {
    let path = root.join(path);
    fs::create_dir_all(path.parent().unwrap_or(root))?;
    Ok(path)
}

fn write(path: &Path, content: &[u8]) -> io::Result<()> {
    fs::write(path, content)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o644))
}

/// A socket that nobody listens at. Its path may be too long for an address (unix(7)): so by way of the directory.
fn socket(path: &Path) -> io::Result<()> {
    use std::os::fd::AsRawFd;
    let dir = fs::File::open(path.parent().unwrap_or(Path::new("/")))?;
    let name = path.file_name().unwrap_or_default();
    UnixListener::bind(Path::new(&format!("/proc/self/fd/{}", dir.as_raw_fd())).join(name))?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o666))
}
