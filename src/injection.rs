//! Which of the driver's files a container gets, and where they appear in it.
//!
//! Nothing but mounts and a variable: no ldconfig and no program of ours runs in a container. Libraries go into a directory of
//! our own, which is looked through first, so that what an image brings does not come before them; and, since sessions
//! (`podman exec`) may lack the variable, under the names that programs ask for also into the directories that glibc looks
//! through by itself.

use std::path::PathBuf;

use serde_json::Value;

use crate::driver::{Bits, DriverFiles, Library, Other};

/// Our directory in a container, by kind of library. /dev is made for each container by its runtime: no image reaches it,
/// and it can be written where the image's file system can't.
const OWN_DIRS: [(Bits, &str); 2] =
    [(Bits::Sixtyfour, "/dev/mig-hook/lib64"), (Bits::Thirtytwo, "/dev/mig-hook/lib32")];
/// Above them.
pub const OWN_DIR: &str = "/dev/mig-hook/";
/// Where glibc looks by itself: on Debian, and on Fedora and SUSE.
const LOADER_DIRS: [&str; 2] = if cfg!(target_arch = "aarch64") {
    ["/usr/lib/aarch64-linux-gnu", "/usr/lib64"]
} else {
    ["/usr/lib/x86_64-linux-gnu", "/usr/lib64"]
};
const LOADER_DIRS_32: [&str; 2] = ["/usr/lib/i386-linux-gnu", "/usr/lib"];
/// The variable by which a container says what it needs of the driver.
pub const VARIABLE: &str = "NVIDIA_DRIVER_CAPABILITIES";

/// A part of the driver, in the words of the NVIDIA Container Toolkit (internal/config/image/capabilities.go).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Capability {
    /// nvidia-smi and the management library.
    Utility,
    /// CUDA and OpenCL.
    Compute,
    /// Encoding and decoding.
    Video,
    /// OpenGL, Vulkan, EGL, OptiX.
    Graphics,
    /// What X servers need; as graphics.
    Display,
    /// Deep learning in graphics.
    Ngx,
    /// Libraries for 32-bit programs, too.
    Compat32,
}

use Capability::{Compat32, Compute, Display, Graphics, Ngx, Utility, Video};

const ALL: [(&str, Capability); 7] = [
    ("compute", Compute),
    ("compat32", Compat32),
    ("graphics", Graphics),
    ("utility", Utility),
    ("video", Video),
    ("display", Display),
    ("ngx", Ngx),
];

/// What a container needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Capabilities(Vec<Capability>);

impl Default for Capabilities {
    /// As the toolkit has it.
    fn default() -> Capabilities {
        Capabilities(vec![Utility, Compute])
    }
}

impl Capabilities {
    /// Of a config's environment. A word that the toolkit does not know is an error, as it is there.
    pub fn of(config: &Value) -> Result<Capabilities, String> {
        let said = variable(config.pointer("/process/env"), VARIABLE).unwrap_or_default();
        let words: Vec<&str> = said.split(',').map(str::trim).filter(|word| !word.is_empty()).collect();
        if words.is_empty() {
            return Ok(Capabilities::default());
        }
        if words.contains(&"all") {
            return Ok(Capabilities(ALL.map(|(_, capability)| capability).to_vec()));
        }
        let known = |word: &&str| ALL.iter().find(|(name, _)| name == word).map(|(_, capability)| *capability);
        let unknown = words.iter().find(|word| known(word).is_none());
        if let Some(unknown) = unknown {
            let unknown: String = unknown.chars().take(40).collect();
            let valid: Vec<&str> = ALL.iter().map(|(name, _)| *name).collect();
            return Err(format!("{VARIABLE} has {unknown:?}; valid are {} and all", valid.join(", ")));
        }
        Ok(Capabilities(words.iter().filter_map(known).collect()))
    }

    /// The same and graphics, for a slice that can draw.
    pub fn with_graphics(mut self) -> Capabilities {
        self.0.push(Graphics);
        self
    }

    fn has(&self, needed: &[Capability]) -> bool {
        needed.iter().any(|one| self.0.contains(one))
    }
}

/// Beginnings of names, and what they belong to (libnvidia-container, src/nvc_info.c; drivers 535 to 580). What is not here
/// and carries the driver's version goes with compute: that is where new ones came.
const LIBRARIES: [(&str, &[Capability]); 35] = [
    ("libnvidia-ml.", &[Utility]),
    ("libnvidia-cfg.", &[Utility]),
    ("libnvidia-nscq.", &[Utility]),
    ("libnvidia-sandboxutils.", &[Utility]),
    ("libnvidia-gpucomp.", &[Compute, Graphics, Display]),
    ("libnvidia-allocator.", &[Compute, Graphics, Display]),
    ("libnvcuvid.", &[Video]),
    ("libnvidia-encode.", &[Video]),
    ("libnvidia-opticalflow.", &[Video]),
    ("libvdpau_nvidia.", &[Video]),
    ("libnvidia-ngx.", &[Ngx]),
    ("libEGL", &[Graphics, Display]),
    ("libGL", &[Graphics, Display]),
    ("libOpenGL.", &[Graphics, Display]),
    ("libglxserver_nvidia.", &[Display]),
    ("libnvidia-api.", &[Graphics, Display]),
    ("libnvidia-cbl.", &[Graphics, Display]),
    ("libnvidia-egl", &[Graphics, Display]),
    ("libnvidia-fbc.", &[Graphics, Display]),
    ("libnvidia-glcore.", &[Graphics, Display]),
    ("libnvidia-glsi.", &[Graphics, Display]),
    ("libnvidia-glvkspirv.", &[Graphics, Display]),
    ("libnvidia-gtk", &[Display]),
    ("libnvidia-ifr.", &[Graphics, Display]),
    ("libnvidia-present.", &[Graphics, Display]),
    ("libnvidia-rtcore.", &[Graphics, Display]),
    ("libnvidia-tls.", &[Graphics, Display]),
    ("libnvidia-vksc-core.", &[Graphics, Display]),
    ("libnvidia-vulkan-producer.", &[Graphics, Display]),
    ("libnvidia-wayland-client.", &[Display]),
    ("libnvidia-wfb.", &[Display]),
    ("libnvidia-xcontrol.", &[Display]),
    ("libnvoptix.", &[Graphics, Display]),
    ("libcuda.", &[Compute, Video, Graphics, Display]),
    ("libnvidia-ptxjitcompiler.", &[Compute, Graphics, Display]),
];

/// Parts of paths of other files; what is not here goes everywhere: firmware, sockets.
const OTHERS: [(&str, &[Capability]); 10] = [
    ("/nvidia-smi", &[Utility]),
    ("/nvidia-debugdump", &[Utility]),
    ("/bin/nvidia-persistenced", &[Utility]),
    ("/nvidia-cuda-mps-", &[Compute]),
    ("/OpenCL/", &[Compute]),
    ("/vulkan/", &[Graphics, Display]),
    ("/glvnd/", &[Graphics, Display]),
    ("/egl/", &[Graphics, Display]),
    ("/nvoptix.bin", &[Graphics, Display]),
    ("/X11/", &[Display]),
];

/// Names without a number by which some programs load a library (NVIDIA Container Toolkit, internal/discover/symlinks.go),
/// beside its SONAME.
const LINKS: [(&str, &str); 4] = [
    ("libcuda.so.1", "libcuda.so"),
    ("libnvidia-opticalflow.so.1", "libnvidia-opticalflow.so"),
    ("libGLX_nvidia.so.0", "libGLX_indirect.so.0"),
    ("libnvidia-ml.so.1", "libnvidia-ml.so"),
];

/// A bind mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// A file of the host, absolute.
    pub source: PathBuf,
    /// Where the container sees it, absolute.
    pub destination: String,
    /// Its options.
    pub options: Vec<String>,
}

/// What a container's config gets of the driver.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Injection {
    /// In order.
    pub mounts: Vec<Mount>,
    /// What its loader is to look through first.
    pub library_dirs: Vec<&'static str>,
}

/// Everything that is needed. `outside`: also where the image has files; otherwise only libraries, into our own directory.
pub fn injection(files: &DriverFiles, needed: &Capabilities, outside: bool) -> Injection {
    let mut injection = Injection::default();
    for (bits, dir) in OWN_DIRS {
        let libraries: Vec<&Library> = wanted(files, needed).filter(|library| library.bits == bits).collect();
        if libraries.is_empty() {
            continue;
        }
        injection.library_dirs.push(dir);
        for library in libraries {
            let names = [library.name.as_str()].into_iter().chain(names(library));
            injection.mounts.extend(names.map(|name| read_only(library, format!("{dir}/{name}"))));
        }
    }
    if outside {
        injection.mounts.extend(outside_mounts(files, needed));
    }
    let mut seen = std::collections::BTreeSet::new();
    injection.mounts.retain(|mount| seen.insert(mount.destination.clone()));
    injection
}

/// What needs no variable: the names that programs ask for, where glibc looks by itself, and everything else.
pub fn outside_mounts(files: &DriverFiles, needed: &Capabilities) -> Vec<Mount> {
    let mut mounts = Vec::new();
    for library in wanted(files, needed) {
        let dirs = if library.bits == Bits::Sixtyfour { LOADER_DIRS } else { LOADER_DIRS_32 };
        for dir in dirs {
            // Libraries with loaders of their own.
            let below = if library.name.starts_with("libvdpau") { "/vdpau" } else { "" };
            mounts.extend(names(library).map(|name| read_only(library, format!("{dir}{below}/{name}"))));
            if library.name.starts_with("libnvidia-allocator.") && needed.has(&[Graphics, Display]) {
                mounts.push(read_only(library, format!("{dir}/gbm/nvidia-drm_gbm.so")));
            }
        }
    }
    let of_part = |other: &&Other| {
        let part = OTHERS.iter().find(|(part, _)| other.destination.contains(part));
        part.is_none_or(|(_, capabilities)| needed.has(capabilities))
    };
    mounts.extend(files.others.iter().filter(of_part).map(|other| Mount {
        source: other.source.clone(),
        destination: other.destination.clone(),
        options: other.options.clone(),
    }));
    mounts
}

fn wanted<'a>(files: &'a DriverFiles, needed: &Capabilities) -> impl Iterator<Item = &'a Library> {
    files.libraries.iter().filter(move |library| {
        let part = LIBRARIES.iter().find(|(beginning, _)| library.name.starts_with(beginning));
        let capabilities = part.map_or(&[Compute][..], |(_, capabilities)| capabilities);
        needed.has(capabilities) && (library.bits == Bits::Sixtyfour || needed.has(&[Compat32]))
    })
}

/// The names by which programs ask for a library.
fn names(library: &Library) -> impl Iterator<Item = &str> {
    let links = LINKS.iter().filter(|(soname, _)| *soname == library.soname).map(|(_, link)| *link);
    [library.soname.as_str()].into_iter().chain(links)
}

fn read_only(library: &Library, destination: String) -> Mount {
    let options = ["ro", "nosuid", "nodev", "rbind", "rprivate"].map(str::to_owned).to_vec();
    Mount { source: library.source.clone(), destination, options }
}

/// The last value of a variable in a list of them: what a program finds.
pub fn variable<'a>(env: Option<&'a Value>, name: &str) -> Option<&'a str> {
    let vars = env.and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str);
    vars.filter_map(|var| var.split_once('=')).filter(|(key, _)| *key == name).map(|(_, value)| value).last()
}

/// The directories of ours that a config has mounts in.
pub fn library_dirs_in(config: &Value) -> Vec<&'static str> {
    let mounts = config.get("mounts").and_then(Value::as_array);
    let destinations = || mounts.into_iter().flatten().filter_map(|mount| mount.get("destination")?.as_str());
    let within = |dir: &str| destinations().any(|at| at.strip_prefix(dir).is_some_and(|rest| rest.starts_with('/')));
    OWN_DIRS.iter().map(|(_, dir)| *dir).filter(|dir| within(dir)).collect()
}
