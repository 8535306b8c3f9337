//! The host as the driver and the kernel describe it: device numbers, capability minors, processes, boot.
//!
//! The driver's files lie under settable roots; pids, start times and the boot id always come from the real /proc.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

mod agents;
mod nodes;

pub use agents::is_agent;
pub use nodes::field;

/// Where the driver's files are.
#[derive(Debug, Clone)]
pub struct Host {
    proc_root: PathBuf,
    dev_root: PathBuf,
    driver_root: PathBuf,
}

/// Character-device majors of the driver, from /proc/devices. All but 195 differ from boot to boot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Majors {
    /// `nvidia` (or `nvidia-frontend` before branch 550): GPUs and nvidiactl.
    pub nvidia: u32,
    /// `nvidia-caps`: GPU- and compute-instance capabilities.
    pub caps: u32,
    /// `nvidia-uvm`; absent until the module is loaded.
    pub uvm: Option<u32>,
}

/// A process, named so that a reused pid is not mistaken for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct ProcessId {
    /// Host pid.
    pub pid: u32,
    /// Field 22 of /proc/PID/stat: start time in clock ticks since boot.
    pub start: u64,
}

/// The capability of a GPU instance, or of a compute instance in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capability {
    /// Minor of its node.
    pub minor: u32,
    /// Minor of the GPU.
    pub gpu: u32,
    /// GPU-instance id.
    pub gi: u32,
    /// Compute-instance id.
    pub ci: Option<u32>,
}

/// Mode, owner and group of a node on the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NodeMode {
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

/// A file of the driver that is missing or not as the driver writes it.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// Unreadable.
    #[error("cannot read {path}: {source}; is the NVIDIA driver loaded?")]
    Read {
        /// The file.
        path: String,
        /// Why.
        source: io::Error,
    },
    /// It lacks something.
    #[error("{path} {what}")]
    Content {
        /// The file.
        path: String,
        /// What is missing and what to do.
        what: String,
    },
    /// A device node that is needed on the host is not there, and can't be made.
    #[error("the host has no device node {path}, and it cannot be made: {source}; an administrator can: {remedy}")]
    Node {
        /// The node.
        path: String,
        /// Why.
        source: io::Error,
        /// A command.
        remedy: String,
    },
}

impl Host {
    /// The driver's files under these roots.
    pub fn at(proc_root: &Path, dev_root: &Path, driver_root: &Path) -> Host {
        Host { proc_root: proc_root.into(), dev_root: dev_root.into(), driver_root: driver_root.into() }
    }

    /// The driver's majors as they are: nvidia-uvm may have none yet.
    pub fn known_majors(&self) -> Result<Majors, HostError> {
        self.read_majors()
    }

    /// The driver's majors. Loads nvidia-uvm by the host's nvidia-modprobe where it is not loaded: CUDA needs it.
    pub fn majors(&self) -> Result<Majors, HostError> {
        let majors = self.read_majors()?;
        if majors.uvm.is_some() {
            return Ok(majors);
        }
        let tool = self.driver_root.join("usr/bin/nvidia-modprobe");
        let ran = std::process::Command::new(&tool).args(["-u", "-c", "0"]).env_clear().status();
        let majors = self.read_majors()?;
        match (majors.uvm, ran) {
            (Some(_), _) => Ok(majors),
            (None, ran) => {
                let outcome = ran.map_or_else(|e| format!("could not be run: {e}"), |s| format!("ended with {s}"));
                Err(HostError::Content {
                    path: self.proc_root.join("devices").display().to_string(),
                    what: format!(
                        "has no nvidia-uvm, which CUDA needs, and {} -u -c 0 {outcome}; load the module with: modprobe nvidia-uvm",
                        tool.display()
                    ),
                })
            }
        }
    }

    fn read_majors(&self) -> Result<Majors, HostError> {
        let path = self.proc_root.join("devices");
        let text = read(&path)?;
        let number = |names: &[&str]| names.iter().find_map(|name| major(&text, name));
        let need = |found: Option<u32>, name: &str| {
            found.ok_or_else(|| HostError::Content {
                path: path.display().to_string(),
                what: format!(
                    "has no character device {name}: the NVIDIA driver is not loaded; load it with: modprobe nvidia"
                ),
            })
        };
        Ok(Majors {
            nvidia: need(number(&["nvidia", "nvidia-frontend"]), "nvidia")?,
            caps: need(number(&["nvidia-caps"]), "nvidia-caps")?,
            uvm: number(&["nvidia-uvm"]),
        })
    }

    /// Minor of a GPU instance's capability. `gpu` is the N of /dev/nvidiaN.
    pub fn instance_minor(&self, gpu: u32, gi: u32) -> Result<u32, HostError> {
        self.access(&format!("gpu{gpu}/mig/gi{gi}/access"))
    }

    /// Minor of a compute instance's capability.
    pub fn compute_minor(&self, gpu: u32, gi: u32, ci: u32) -> Result<u32, HostError> {
        self.access(&format!("gpu{gpu}/mig/gi{gi}/ci{ci}/access"))
    }

    /// Minors of all capabilities of MIG that the driver may ever give on the GPUs here, those of configuration and monitoring
    /// among them.
    pub fn capability_minors(&self) -> Result<Vec<u32>, HostError> {
        let path = self.proc_root.join("driver/nvidia-caps/mig-minors");
        let text = read(&path)?;
        // What is not understood is not left out: whoever is to be kept from all of them must be.
        let listed = listed_minors(&text).map_err(|line| HostError::Content {
            path: path.display().to_string(),
            what: format!("has the line {line:?}, where the name and the minor of a capability were expected"),
        })?;
        // The driver lists them for 32 GPUs, wherever so many are.
        let capabilities = self.proc_root.join("driver/nvidia/capabilities");
        let is_here = |name: &str| !name.starts_with("gpu") || capabilities.join(name).is_dir();
        Ok(listed.into_iter().filter(|(name, _)| is_here(name)).map(|(_, minor)| minor).collect())
    }

    /// Every GPU by the driver's files: the name of its directory, which is its PCI address, and its minor.
    pub fn gpus(&self) -> Vec<(String, u32)> {
        let entries = fs::read_dir(self.proc_root.join("driver/nvidia/gpus")).into_iter().flatten().flatten();
        let of_entry = |entry: fs::DirEntry| {
            let text = fs::read_to_string(entry.path().join("information")).ok()?;
            Some((entry.file_name().into_string().ok()?, field(&text, "Device Minor")?))
        };
        let mut gpus: Vec<(String, u32)> = entries.filter_map(of_entry).collect();
        gpus.sort();
        gpus
    }

    fn access(&self, relative: &str) -> Result<u32, HostError> {
        let path = self.proc_root.join("driver/nvidia/capabilities").join(relative);
        access_minor(&read(&path)?).ok_or_else(|| HostError::Content {
            path: path.display().to_string(),
            what: "has no DeviceFileMinor line".into(),
        })
    }

    /// Mode and owner of a node of the host, where it is there and really that device: sites restrict /dev/nvidia* by
    /// module options, and a regular file may lie in a node's place.
    pub fn node_mode(&self, relative: &str, major: u32, minor: u32) -> Option<NodeMode> {
        let meta = self.dev_root.join(relative).symlink_metadata().ok()?;
        let ours = meta.file_type().is_char_device() && device(meta.rdev()) == (major, minor);
        ours.then(|| NodeMode { mode: meta.mode() & 0o777, uid: meta.uid(), gid: meta.gid() })
    }
}

/// Whether we may read a node, as the kernel would decide.
pub fn can_open(node: &Path) -> bool {
    nix::unistd::access(node, nix::unistd::AccessFlags::R_OK).is_ok()
}

fn read(path: &Path) -> Result<String, HostError> {
    fs::read_to_string(path).map_err(|source| HostError::Read { path: path.display().to_string(), source })
}

/// Major and minor of a `dev_t`, as makedev(3) packs them.
fn device(dev: u64) -> (u32, u32) {
    (nix::sys::stat::major(dev) as u32, nix::sys::stat::minor(dev) as u32)
}

/// Major of a character device in the text of /proc/devices.
pub fn major(devices: &str, name: &str) -> Option<u32> {
    let characters = devices.lines().take_while(|line| !line.starts_with("Block devices"));
    characters.filter_map(|line| line.trim().split_once(' ')).find(|(_, n)| n.trim() == name)?.0.parse().ok()
}

/// The minor in the text of a capability's `access` file.
pub fn access_minor(text: &str) -> Option<u32> {
    text.lines().find_map(|line| line.strip_prefix("DeviceFileMinor:")?.trim().parse().ok())
}

/// What the lines of mig-minors are of (`gpu0`, `config`), and the minors; or the line that has none.
fn listed_minors(text: &str) -> Result<Vec<(&str, u32)>, &str> {
    let of_line = |line| {
        let (name, minor): (&str, &str) = str::split_once(line, ' ')?;
        Some((name.split('/').next()?, minor.parse().ok()?))
    };
    text.lines().map(|line| of_line(line).ok_or(line)).collect()
}

/// The process with that pid, if it is alive. A zombie is dead: kill(pid, 0) says otherwise.
pub fn process(pid: u32) -> Option<ProcessId> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    start_time(&stat).map(|start| ProcessId { pid, start })
}

/// Start time from the text of /proc/PID/stat; `None` for a zombie or a dead process. The name in parentheses may
/// itself hold spaces and parentheses.
fn start_time(stat: &str) -> Option<u64> {
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    match fields.first() {
        Some(&"Z" | &"X" | &"x") | None => None,
        Some(_) => fields.get(19)?.parse().ok(),
    }
}

/// Whether that very process is still alive. One that can't be looked at is taken for alive: where memory or descriptors have run
/// out, nobody has died of it.
pub fn alive(process_id: ProcessId) -> bool {
    match fs::read_to_string(format!("/proc/{}/stat", process_id.pid)) {
        Ok(stat) => start_time(&stat) == Some(process_id.start),
        // ESRCH: it ended between open and read.
        Err(error) => error.kind() != io::ErrorKind::NotFound && error.raw_os_error() != Some(libc::ESRCH),
    }
}

/// What a pid file says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PidFile {
    /// Inode and change time: another value after it was written again.
    pub stamp: String,
    /// The process that it names, if that is alive.
    pub process: Option<ProcessId>,
    /// Whether that process, by the clocks, started only after the file was written, and so has only got the number again.
    /// Wrong after the clock was set: never enough by itself.
    pub seems_reused: bool,
}

/// Reads a pid file that belongs to us; `None` where there is none.
pub fn pid_file(path: &Path) -> Option<PidFile> {
    let meta = path.symlink_metadata().ok()?;
    if !meta.is_file() || meta.uid() != nix::unistd::geteuid().as_raw() {
        return None;
    }
    let process = fs::read_to_string(path).ok()?.trim().parse().ok().and_then(process);
    let age_ms = meta.modified().ok()?.elapsed().map_or(0, |age| u64::try_from(age.as_millis()).unwrap_or(u64::MAX));
    let written_ms = boot_ms().saturating_sub(age_ms);
    // Field 22 counts in USER_HZ, which is 100 on every Linux (proc_pid_stat(5), sysconf(_SC_CLK_TCK)).
    let seems_reused = process.is_some_and(|p| p.start * 10 > written_ms + 2_000);
    Some(PidFile { stamp: format!("{}:{}.{}", meta.ino(), meta.ctime(), meta.ctime_nsec()), process, seems_reused })
}

/// Parent of a process.
pub fn parent(pid: u32) -> Option<u32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
}

/// Whether a process is a copy of another one by fork(2) that runs on in the same program: code, stack and arguments lie where
/// they do there. execve(2) places them anew, at random.
pub fn is_copy(pid: u32, of: u32) -> bool {
    let layout = |pid: u32| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
        // startcode, endcode, startstack; arg_start to env_end (proc_pid_stat(5): 26 to 28, 48 to 51; the first here is 3)
        Some([fields.get(23..26)?, fields.get(45..49)?].concat().join(" "))
    };
    layout(pid).is_some_and(|own| layout(of) == Some(own))
}

/// Command line of a process.
pub fn command_line(pid: u32) -> Vec<std::ffi::OsString> {
    use std::os::unix::ffi::OsStringExt;
    let bytes = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let words = bytes.split(|b| *b == 0).map(|w| std::ffi::OsString::from_vec(w.to_vec()));
    let mut words: Vec<_> = words.collect();
    words.pop(); // after the last NUL
    words
}

/// Name of a process as the kernel has it, at most 15 characters; empty when it has gone. It chooses that itself: without
/// what a terminal would obey.
pub fn process_name(pid: u32) -> String {
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    name.trim().chars().filter(|c| !steers(*c)).collect()
}

/// Whether a terminal would obey a character, or show what follows it the other way round (Unicode's UAX #9). Names that
/// containers choose must not reach one with it.
pub fn steers(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// A living process of root's whose command line begins so. Others can call themselves what they like.
pub fn process_called(beginning: &str) -> Option<ProcessId> {
    let is_it = |pid: &u32| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        line.starts_with(beginning.as_bytes()) && fs::metadata(format!("/proc/{pid}")).is_ok_and(|m| m.uid() == 0)
    };
    pids().into_iter().filter(is_it).find_map(process)
}

/// Program file of a process: what it runs, else what it was called by (crun runs from a sealed copy of itself, and its
/// engine calls it by an absolute path).
pub fn program(pid: u32) -> Option<PathBuf> {
    let runs = fs::read_link(format!("/proc/{pid}/exe")).ok();
    let called = command_line(pid).into_iter().next().map(PathBuf::from);
    [runs, called].into_iter().flatten().find(|path| path.is_absolute() && path.is_file())
}

/// Login uid of a process, else its real uid: who asked.
pub fn user(pid: u32) -> Option<u32> {
    let login = fs::read_to_string(format!("/proc/{pid}/loginuid")).ok().and_then(|t| t.trim().parse().ok());
    let real = || fs::metadata(format!("/proc/{pid}")).ok().map(|m| m.uid());
    login.filter(|uid| *uid != u32::MAX).or_else(real)
}

/// Name of a user, where the machine knows it.
pub fn user_name(uid: u32) -> Option<String> {
    let user = nix::unistd::User::from_uid(nix::unistd::Uid::from_raw(uid)).ok()??;
    Some(user.name).filter(|name| !name.chars().any(char::is_control))
}

/// The own group of a user, where the machine knows that user.
pub fn group_of(uid: u32) -> Option<u32> {
    Some(nix::unistd::User::from_uid(nix::unistd::Uid::from_raw(uid)).ok()??.gid.as_raw())
}

/// Mount namespace of a process, as `mnt:[4026531841]`.
pub fn mount_namespace(pid: u32) -> Option<String> {
    Some(fs::read_link(format!("/proc/{pid}/ns/mnt")).ok()?.to_string_lossy().into_owned())
}

/// The cgroup of a container's process; `None` when it shares ours, as with `podman --cgroups=disabled`: who else lives
/// there says nothing about the container.
pub fn own_cgroup(pid: u32) -> Option<String> {
    cgroup(pid).filter(|theirs| Some(theirs) != cgroup(std::process::id()).as_ref())
}

/// The cgroup of a process in which its device rules live: the v1 `devices` hierarchy, else the unified one.
fn cgroup(pid: u32) -> Option<String> {
    device_cgroup(&fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?)
}

fn device_cgroup(text: &str) -> Option<String> {
    let lines = text.lines().filter_map(|line| {
        let mut fields = line.splitn(3, ':');
        Some((fields.next()?, fields.next()?, fields.next()?))
    });
    let lines: Vec<_> = lines.collect();
    let devices = lines.iter().find(|(_, controllers, _)| controllers.split(',').any(|c| c == "devices"));
    let unified = lines.iter().find(|(id, _, _)| *id == "0");
    // In the root of one hierarchy it may still be told apart by the other: cgroup2 mounted alone on a hybrid host.
    let found = [devices, unified].into_iter().flatten().map(|(_, _, path)| *path).find(|path| *path != "/");
    found.map(str::to_owned)
}

/// Every pid. A process may end while we look at it: all readers here take that for "not there".
fn pids() -> Vec<u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|e| e.file_name().to_str()?.parse().ok()).collect()
}

/// Whether a process is in a cgroup, named whole or by the end of its path, or below it.
pub fn is_in_cgroup(pid: u32, wanted: &str) -> bool {
    cgroup(pid).is_some_and(|c| c.ends_with(wanted) || c.contains(&format!("{wanted}/")))
}

/// Every process by pid and name.
pub fn processes() -> Vec<(u32, String)> {
    pids().into_iter().map(|pid| (pid, process_name(pid))).collect()
}

/// Living processes in a cgroup. Read from /proc/PID/cgroup, so that it does not matter where, or whether, the cgroup file
/// system is mounted for us.
pub fn processes_in(wanted: &str) -> Vec<u32> {
    pids().into_iter().filter(|pid| is_in_cgroup(*pid, wanted) && process(*pid).is_some()).collect()
}

/// Processes that have a device with this major and one of these minors open.
pub fn holders_of(major: u32, minors: &BTreeSet<u32>) -> Vec<u32> {
    let has = |(pid, open): (u32, BTreeSet<u32>)| (!open.is_disjoint(minors)).then_some(pid);
    openers_of(major).into_iter().filter_map(has).collect()
}

/// Processes that have devices with this major open, each with their minors. Looks at every open file of every process.
/// O_PATH opens nothing, and no device rule keeps a container with CAP_MKNOD from it: that must not hold another's slice.
pub fn openers_of(major: u32) -> Vec<(u32, BTreeSet<u32>)> {
    let open = |pid: u32| {
        let fds = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
        let devices = fds.filter_map(|fd| {
            let (at, minor) = char_device(&fd.path())?;
            (at == major && !is_path_only(pid, &fd.file_name())).then_some(minor)
        });
        Some((pid, devices.collect::<BTreeSet<u32>>())).filter(|(_, open)| !open.is_empty())
    };
    pids().into_iter().filter_map(open).collect()
}

/// Major and minor of a character device. Asks no file system that answers from elsewhere (statx(2), AT_STATX_DONT_SYNC): one of
/// FUSE whose server is a container's, or dead, would keep us for ever.
fn char_device(path: &Path) -> Option<(u32, u32)> {
    use rustix::fs::{AtFlags, CWD, FileType, StatxFlags, statx};
    let meta = statx(CWD, path, AtFlags::STATX_DONT_SYNC, StatxFlags::TYPE).ok()?;
    let is_char_device = FileType::from_raw_mode(meta.stx_mode.into()) == FileType::CharacterDevice;
    is_char_device.then_some((meta.stx_rdev_major, meta.stx_rdev_minor))
}

/// Whether a descriptor is an O_PATH one (proc_pid_fdinfo(5): `flags:` in octal). One that can't be looked at is taken for open.
fn is_path_only(pid: u32, fd: &OsStr) -> bool {
    let text = fs::read_to_string(Path::new(&format!("/proc/{pid}/fdinfo")).join(fd)).unwrap_or_default();
    let flags = text.lines().find_map(|line| line.strip_prefix("flags:"));
    flags.and_then(|octal| i32::from_str_radix(octal.trim(), 8).ok()).is_some_and(|flags| flags & libc::O_PATH != 0)
}

/// The kernel's id of this boot.
pub fn boot_id() -> Result<String, HostError> {
    Ok(read(Path::new("/proc/sys/kernel/random/boot_id"))?.trim().to_owned())
}

/// This machine's name up to the first dot, as Slurm takes it for a node's.
pub fn name() -> Result<String, HostError> {
    let name = read(Path::new("/proc/sys/kernel/hostname"))?;
    Ok(name.trim().split('.').next().unwrap_or_default().to_owned())
}

/// A new lease token: 128 random bits as hex.
pub fn token() -> Result<String, HostError> {
    let uuid = read(Path::new("/proc/sys/kernel/random/uuid"))?;
    Ok(uuid.chars().filter(char::is_ascii_hexdigit).collect())
}

/// Milliseconds since boot, sleep included. Never goes back, whatever happens to the clock.
pub fn boot_ms() -> u64 {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME);
    now.map_or(0, |t| t.tv_sec() as u64 * 1000 + t.tv_nsec() as u64 / 1_000_000)
}

/// Milliseconds since 1970, for people.
pub fn wall_ms() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEVICES: &str = "Character devices:\n  1 mem\n195 nvidia\n195 nvidia-modeset\n236 nvidia-caps\n510 nvidia-uvm\n\nBlock devices:\n  7 loop\n200 nvidia-x\n";

    #[test]
    fn majors_come_from_the_character_half() {
        assert_eq!(major(DEVICES, "nvidia"), Some(195));
        assert_eq!(major(DEVICES, "nvidia-caps"), Some(236));
        assert_eq!(major(DEVICES, "nvidia-x"), None);
        assert_eq!(major("", "nvidia"), None);
    }

    #[test]
    fn the_capability_file_as_the_driver_writes_it() {
        assert_eq!(access_minor("DeviceFileMinor: 12\nDeviceFileMode: 292\nDeviceFileModify: 1\n"), Some(12));
        assert_eq!(access_minor("DeviceFileMode: 292\n"), None);
    }

    #[test]
    fn capabilities_are_those_of_the_gpus_here() {
        let dir = tempfile::tempdir().unwrap();
        let of = |name: &str| dir.path().join("driver").join(name);
        fs::create_dir_all(of("nvidia/capabilities/gpu0")).unwrap();
        fs::create_dir_all(of("nvidia-caps")).unwrap();
        let text = "config 1\nmonitor 2\ngpu0/gi0/access 3\ngpu0/gi0/ci0/access 4\ngpu1/gi0/access 138\n";
        fs::write(of("nvidia-caps/mig-minors"), text).unwrap();
        let host = Host::at(dir.path(), dir.path(), dir.path());
        assert_eq!(host.capability_minors().unwrap(), [1, 2, 3, 4]);
        fs::write(of("nvidia-caps/mig-minors"), format!("{text}gpu1 gi0/access 9\n")).unwrap();
        assert!(host.capability_minors().is_err(), "no part of a line is left out");
        fs::write(of("nvidia-caps/mig-minors"), format!("{text}gpu1/gi0/access none\n")).unwrap();
        let error = host.capability_minors().unwrap_err().to_string();
        assert!(error.contains("mig-minors has the line \"gpu1/gi0/access none\""), "{error}");
    }

    #[test]
    fn a_name_with_parentheses_and_a_zombie() {
        let tail = (4..=19).map(|n| n.to_string()).collect::<Vec<_>>().join(" ");
        let stat = |state: &str| format!("7 (a) b (c) {state} 1 2 {tail} 4242 0 0");
        assert_eq!(start_time(&stat("S")), Some(4242));
        assert_eq!(start_time(&stat("Z")), None);
        assert_eq!(start_time("garbage"), None);
    }

    #[test]
    fn we_are_alive_and_nobody_else_is_us() {
        let me = process(std::process::id()).unwrap();
        assert!(alive(me));
        assert!(!alive(ProcessId { start: me.start + 1, ..me }));
        assert!(process(u32::MAX).is_none());
    }

    #[test]
    fn a_zombie_is_dead() {
        let mut child = std::process::Command::new("/bin/true").spawn().unwrap();
        while process(child.id()).is_some() {
            std::thread::yield_now();
        }
        assert!(Path::new(&format!("/proc/{}", child.id())).exists());
        child.wait().unwrap();
    }

    #[test]
    fn a_pid_file_names_a_living_process_and_tells_when_it_was_written_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pid");
        assert_eq!(pid_file(&path), None);
        fs::write(&path, std::process::id().to_string()).unwrap();
        let first = pid_file(&path).unwrap();
        assert_eq!((first.process, first.seems_reused), (process(std::process::id()), false));
        fs::write(dir.path().join("new"), "no pid").unwrap();
        fs::rename(dir.path().join("new"), &path).unwrap();
        let second = pid_file(&path).unwrap();
        assert_eq!(second.process, None);
        assert_ne!(first.stamp, second.stamp);
    }

    #[test]
    fn a_process_younger_than_the_file_has_only_got_the_number_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pid");
        let mut young = std::process::Command::new("/bin/sleep").arg("5").spawn().unwrap();
        fs::write(&path, young.id().to_string()).unwrap();
        let before = std::time::SystemTime::now() - std::time::Duration::from_millis(boot_ms() / 2);
        fs::File::options().write(true).open(&path).unwrap().set_modified(before).unwrap();
        assert!(pid_file(&path).unwrap().seems_reused);
        young.kill().unwrap();
        young.wait().unwrap();
    }

    #[test]
    fn the_cgroup_of_the_device_rules() {
        assert_eq!(device_cgroup("5:devices:/docker/c1\n0::/x\n").as_deref(), Some("/docker/c1"));
        assert_eq!(device_cgroup("0::/libpod_parent/libpod-1\n").as_deref(), Some("/libpod_parent/libpod-1"));
        assert_eq!(device_cgroup("5:devices:/\n0::/docker/c1\n").as_deref(), Some("/docker/c1"));
        assert_eq!(device_cgroup("5:devices:/\n0::/\n"), None);
    }

    #[test]
    fn open_devices_are_found() {
        let _null = fs::File::open("/dev/null").unwrap();
        assert!(holders_of(1, &BTreeSet::from([3])).contains(&std::process::id()));
    }

    #[test]
    fn a_host_without_the_driver_says_so() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("devices"), "Character devices:\n  1 mem\n").unwrap();
        let host = Host::at(dir.path(), dir.path(), dir.path());
        let error = host.majors().unwrap_err().to_string();
        assert!(error.contains("modprobe nvidia"), "{error}");
    }

    #[test]
    fn uvm_is_loaded_by_the_hosts_tool_or_named() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let devices = dir.path().join("devices");
        fs::write(&devices, "Character devices:\n195 nvidia\n236 nvidia-caps\n").unwrap();
        let host = Host::at(dir.path(), dir.path(), dir.path());
        let error = host.majors().unwrap_err().to_string();
        assert!(error.contains("modprobe nvidia-uvm"), "{error}");
        let tool = dir.path().join("usr/bin/nvidia-modprobe");
        fs::create_dir_all(tool.parent().unwrap()).unwrap();
        fs::write(
            &tool,
            format!("#!/bin/sh\n[ \"$*\" = '-u -c 0' ] && echo '510 nvidia-uvm' >> {}\n", devices.display()),
        )
        .unwrap();
        fs::set_permissions(&tool, fs::Permissions::from_mode(0o755)).unwrap();
        assert_eq!(host.majors().unwrap().uvm, Some(510));
    }

    #[test]
    fn a_regular_file_is_no_node() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("nvidia0"), "").unwrap();
        let host = Host::at(dir.path(), dir.path(), dir.path());
        assert_eq!(host.node_mode("nvidia0", 195, 0), None);
        assert!(Host::at(dir.path(), Path::new("/dev"), dir.path()).node_mode("null", 1, 3).is_some());
    }
}
