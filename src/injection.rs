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
const LIBRARIES: [(&str, &[Capability]); 33] = [
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
const LINKS: [(&str, &str); 3] = [
    ("libcuda.so.1", "libcuda.so"),
    ("libnvidia-opticalflow.so.1", "libnvidia-opticalflow.so"),
    ("libGLX_nvidia.so.0", "libGLX_indirect.so.0"),
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
    vars.filter_map(|var| var.split_once('=')).filter(|(key, _)| *key == name).map(|(_, value)| value).next_back()
}

/// The directories of ours that a config has mounts in.
pub fn library_dirs_in(config: &Value) -> Vec<&'static str> {
    let mounts = config.get("mounts").and_then(Value::as_array);
    let destinations = || mounts.into_iter().flatten().filter_map(|mount| mount.get("destination")?.as_str());
    let within = |dir: &str| destinations().any(|at| at.strip_prefix(dir).is_some_and(|rest| rest.starts_with('/')));
    OWN_DIRS.iter().map(|(_, dir)| *dir).filter(|dir| within(dir)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn library(name: &str, soname: &str, bits: Bits) -> Library {
        Library { source: format!("/host/{name}").into(), name: name.into(), soname: soname.into(), bits }
    }

    fn other(destination: &str) -> Other {
        Other { source: format!("/host{destination}").into(), destination: destination.into(), options: vec![] }
    }

    fn files() -> DriverFiles {
        let native = |name: &str, soname: &str| library(name, soname, Bits::Sixtyfour);
        DriverFiles {
            libraries: vec![
                native("libGLX_nvidia.so.580.1", "libGLX_nvidia.so.0"),
                native("libcuda.so.580.1", "libcuda.so.1"),
                native("libnvcuvid.so.580.1", "libnvcuvid.so.1"),
                native("libnvidia-allocator.so.580.1", "libnvidia-allocator.so.1"),
                native("libnvidia-brandnew.so.580.1", "libnvidia-brandnew.so.580.1"),
                native("libnvidia-ml.so.580.1", "libnvidia-ml.so.1"),
                native("libvdpau_nvidia.so.580.1", "libvdpau_nvidia.so.1"),
                library("libcuda.so.580.1", "libcuda.so.1", Bits::Thirtytwo),
            ],
            others: [
                "/usr/bin/nvidia-smi",
                "/usr/bin/nvidia-cuda-mps-server",
                "/run/nvidia-persistenced/socket",
                "/lib/firmware/nvidia/580.1/gsp_ga10x.bin",
                "/etc/OpenCL/vendors/nvidia.icd",
                "/usr/share/vulkan/icd.d/nvidia_icd.json",
            ]
            .map(other)
            .to_vec(),
        }
    }

    fn needed(said: &str) -> Capabilities {
        let env = if said.is_empty() { json!([]) } else { json!([format!("{VARIABLE}={said}")]) };
        Capabilities::of(&json!({"process": {"env": env}})).unwrap()
    }

    fn destinations(said: &str) -> Vec<String> {
        injection(&files(), &needed(said), true).mounts.into_iter().map(|mount| mount.destination).collect()
    }

    #[test]
    fn by_default_cuda_and_the_tools() {
        let triplet = LOADER_DIRS[0];
        let own = |name: &str| format!("/dev/mig-hook/lib64/{name}");
        let mut expected = vec![
            own("libcuda.so.580.1"),
            own("libcuda.so.1"),
            own("libcuda.so"),
            own("libnvidia-allocator.so.580.1"),
            own("libnvidia-allocator.so.1"),
            own("libnvidia-brandnew.so.580.1"),
            own("libnvidia-ml.so.580.1"),
            own("libnvidia-ml.so.1"),
        ];
        for names in [
            &["libcuda.so.1", "libcuda.so"][..],
            &["libnvidia-allocator.so.1"],
            &["libnvidia-brandnew.so.580.1"],
            &["libnvidia-ml.so.1"],
        ] {
            for dir in [triplet, "/usr/lib64"] {
                expected.extend(names.iter().map(|name| format!("{dir}/{name}")));
            }
        }
        expected.extend(
            [
                "/usr/bin/nvidia-smi",
                "/usr/bin/nvidia-cuda-mps-server",
                "/run/nvidia-persistenced/socket",
                "/lib/firmware/nvidia/580.1/gsp_ga10x.bin",
                "/etc/OpenCL/vendors/nvidia.icd",
            ]
            .map(str::to_owned),
        );
        assert_eq!(destinations(""), expected);
    }

    #[test]
    fn parts_are_what_a_container_asks_for() {
        let has = |said: &str, part: &str| destinations(said).iter().any(|at| at.contains(part));
        assert!(has("utility", "libnvidia-ml") && has("utility", "nvidia-smi"));
        assert!(!has("utility", "libcuda") && !has("utility", "OpenCL") && !has("utility", "mps"));
        assert!(has("utility", "socket") && has("utility", "firmware"), "these go everywhere");
        assert!(
            has("video", "libnvcuvid.so.1") && has("video", &format!("{}/vdpau/libvdpau_nvidia.so.1", LOADER_DIRS[0]))
        );
        assert!(has("graphics", "libGLX_indirect.so.0") && has("graphics", "vulkan"));
        assert!(has("graphics", "gbm/nvidia-drm_gbm.so") && !has("compute", "gbm"));
        assert!(!has("compute,utility,video", "libGLX"));
        assert!(!has("compute,graphics", "lib32") && has("compute, compat32", "/dev/mig-hook/lib32/libcuda.so.1"));
        assert!(has("all", "lib32") && has("all", "libGLX") && has("all", "nvcuvid"));
        assert!(has("all", "/usr/lib/i386-linux-gnu/libcuda.so.1") && has("all", "/usr/lib/libcuda.so.1"));
        assert!(!needed("").has(&[Graphics]) && needed("").with_graphics().has(&[Graphics]));
        assert_eq!(needed(""), needed(" ,"), "nothing said is the default");
    }

    #[test]
    fn an_unknown_part_is_an_error_that_names_the_others() {
        let config = json!({"process": {"env": ["NVIDIA_DRIVER_CAPABILITIES=compute,cuda"]}});
        let error = Capabilities::of(&config).unwrap_err();
        assert!(error.contains("\"cuda\"") && error.contains("compute, compat32, graphics, utility"), "{error}");
        assert!(Capabilities::of(&json!({"process": {"env": ["NVIDIA_DRIVER_CAPABILITIES=all,x"]}})).is_ok());
        assert_eq!(Capabilities::of(&json!({})).unwrap(), Capabilities::default());
    }

    #[test]
    fn where_the_image_cant_be_written_only_our_own_directory_is_used() {
        let injection = injection(&files(), &needed("compute,compat32"), false);
        assert!(injection.mounts.iter().all(|mount| mount.destination.starts_with(OWN_DIR)), "{injection:#?}");
        assert_eq!(injection.library_dirs, ["/dev/mig-hook/lib64", "/dev/mig-hook/lib32"]);
    }

    #[test]
    fn libraries_are_read_only_and_nothing_has_two_mounts() {
        let injection = injection(&files(), &needed("all"), true);
        let destinations: std::collections::BTreeSet<&str> =
            injection.mounts.iter().map(|mount| mount.destination.as_str()).collect();
        assert_eq!(destinations.len(), injection.mounts.len());
        let libraries = injection.mounts.iter().filter(|mount| mount.destination.contains(".so"));
        for mount in libraries {
            assert_eq!(mount.options, ["ro", "nosuid", "nodev", "rbind", "rprivate"], "{mount:?}");
        }
    }

    #[test]
    fn without_files_there_is_nothing() {
        assert_eq!(injection(&DriverFiles::default(), &needed("all"), true), Injection::default());
    }
}
