//! A container's device rules where they hold: in the `devices` hierarchy of cgroup v1, or in the device programs of v2.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::{ContainerError, Node, bpf, failed, program, refused};

/// Where systemd's own unit is asked to allow a device. Absolute: nothing is looked up in a PATH.
const SYSTEMCTL: &str = "/usr/bin/systemctl";
/// There where systemd is the init (sd_booted(3)).
const SYSTEMD: &str = "/run/systemd/system";
/// How often a program that systemd swaps under our hands is read again.
const TRIES: u32 = 5;

/// The cgroups that are a container's own, from the one that the runtime was told to make down to that of its first process.
#[derive(Debug)]
pub struct Cgroup {
    version: Version,
    dirs: Vec<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Version {
    One,
    Two,
}

impl Cgroup {
    /// Of process `pid`. `named`: linux.cgroupsPath of the config, which tells where the container's own cgroups begin.
    pub fn of(pid: u32, named: Option<&str>) -> Result<Cgroup, ContainerError> {
        let text = |path: String| fs::read_to_string(&path).map_err(failed(format!("read {path}")));
        let mounts = text("/proc/self/mountinfo".into())?;
        let theirs = place(&mounts, &text(format!("/proc/{pid}/cgroup"))?);
        let ours = place(&mounts, &text("/proc/self/cgroup".into())?);
        let Some(theirs) = theirs else {
            let missing = io::Error::other("it is not below a cgroup tree that is mounted here");
            return Err(failed(format!("find the cgroup of process {pid}"))(missing));
        };
        if theirs.below == "/" || ours.is_some_and(|ours| ours.below == theirs.below) {
            return Err(refused("it has no cgroup of its own, so no device rules of its own"));
        }
        let own = own(&theirs.below, named);
        let dirs = own.iter().map(|below| theirs.mount.join(below.trim_start_matches('/'))).collect();
        Ok(Cgroup { version: theirs.version, dirs })
    }

    /// A sentence where the rules that hold now deny nothing, whatever the config says.
    pub fn open(&self) -> Result<Option<String>, ContainerError> {
        let denies = match self.version {
            Version::One => {
                let list = self.dirs.last().map(|dir| dir.join("devices.list")).unwrap_or_default();
                let text = fs::read_to_string(&list).map_err(failed(format!("read {}", list.display())))?;
                !text.lines().any(|line| line.starts_with("a "))
            }
            Version::Two => {
                // crun from 1.22 on has systemd attach its program to the scope, and puts init one below it.
                let above = self.dirs.first().and_then(|dir| dir.parent());
                let scope = above.filter(|dir| dir.extension().is_some_and(|e| e == "scope"));
                let each = self.dirs.iter().map(PathBuf::as_path).chain(scope).map(has_programs);
                each.collect::<Result<Vec<_>, _>>()?.contains(&true)
            }
        };
        Ok((!denies).then(|| "the device rules of its cgroup deny nothing".into()))
    }

    /// Lets these devices be read and written, and keeps every other rule as it is.
    /// What was allowed already stays so when a later step fails: then the container's create fails too.
    pub fn allow(&self, nodes: &[Node]) -> Result<(), ContainerError> {
        // First systemd's own record: it makes rules of that at once and at every reload.
        if let Some(unit) = self.unit().filter(|_| Path::new(SYSTEMD).exists()) {
            allow_in_unit(unit, nodes)?;
        }
        for dir in &self.dirs {
            match self.version {
                Version::One => allow_in_list(dir, nodes)?,
                Version::Two => allow_in_programs(dir, nodes)?,
            }
        }
        Ok(())
    }

    /// The systemd unit that the uppermost own cgroup is.
    fn unit(&self) -> Option<&str> {
        let name = self.dirs.first()?.file_name()?.to_str()?;
        (name.ends_with(".scope") || name.ends_with(".service")).then_some(name)
    }
}

/// A cgroup in the hierarchy where device rules live.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) version: Version,
    /// Where that hierarchy, or the part of it that begins at `root`, is mounted.
    pub(super) mount: PathBuf,
    /// As it stands in /proc/PID/cgroup: empty for the whole of it.
    pub(super) root: String,
    /// Below `root`, beginning with a slash.
    pub(super) below: String,
}

impl Place {
    pub(super) fn dir(&self) -> PathBuf {
        self.mount.join(self.below.trim_start_matches('/'))
    }

    /// As it stands in /proc/PID/cgroup.
    pub(super) fn path(&self) -> String {
        format!("{}{}", self.root, self.below)
    }
}

/// The version of the cgroups in which device rules live, and the mounts of that hierarchy: the text of mountinfo.
pub(super) fn hierarchy(mountinfo: &str) -> (Version, Vec<Mount<'_>>) {
    let all = || mountinfo.lines().filter_map(Mount::read);
    let v1: Vec<Mount> =
        all().filter(|m| m.kind == "cgroup" && m.options.split(',').any(|option| option == "devices")).collect();
    match v1.is_empty() {
        false => (Version::One, v1),
        true => (Version::Two, all().filter(|mount| mount.kind == "cgroup2").collect()),
    }
}

/// Where the device rules of a process hold: the text of mountinfo, the text of its /proc/PID/cgroup.
pub(super) fn place(mountinfo: &str, cgroup: &str) -> Option<Place> {
    let (version, mounts) = hierarchy(mountinfo);
    let path = cgroup.lines().find_map(|line| {
        let (number, rest) = line.split_once(':')?;
        let (controllers, path) = rest.split_once(':')?;
        let wanted = match version {
            Version::One => controllers.split(',').any(|c| c == "devices"),
            Version::Two => number == "0",
        };
        wanted.then_some(path)
    })?;
    mounts.iter().find_map(|mount| mount.place(version, path))
}

/// A line of mountinfo (proc_pid_mountinfo(5)).
pub(super) struct Mount<'a> {
    pub(super) root: &'a str,
    pub(super) at: PathBuf,
    pub(super) kind: &'a str,
    options: &'a str,
}

impl Mount<'_> {
    /// A cgroup by its path in the hierarchy, where that is in the part that is mounted here.
    pub(super) fn place(&self, version: Version, path: &str) -> Option<Place> {
        let root = self.root.trim_end_matches('/');
        let below = path.strip_prefix(root)?;
        let inside = below.starts_with('/') && !below.split('/').any(|part| part == "..");
        inside.then(|| Place { version, mount: self.at.clone(), root: root.to_owned(), below: below.to_owned() })
    }

    pub(super) fn read(line: &str) -> Option<Mount<'_>> {
        let (mount, fs) = line.split_once(" - ")?;
        let mut mount = mount.split(' ').skip(3);
        let mut fs = fs.split(' ');
        let (root, at) = (mount.next()?, mount.next()?);
        Some(Mount { root, at: at.replace("\\040", " ").into(), kind: fs.next()?, options: fs.nth(1)? })
    }
}

/// The container's own cgroups among `path` and its ancestors, uppermost first: down from the one whose name is the last
/// of linux.cgroupsPath, or the unit that this stands for; only `path` where none is called so. What lies above is shared.
fn own<'a>(path: &'a str, named: Option<&str>) -> Vec<&'a str> {
    let names = match named.map(|named| named.splitn(3, ':').collect::<Vec<_>>()).as_deref() {
        // `slice:prefix:name` is systemd's form (runc docs/systemd.md).
        Some([_, prefix, name]) => vec![format!("{prefix}-{name}.scope"), format!("{name}.scope"), (*name).to_owned()],
        Some([path, ..]) => path.rsplit('/').find(|name| !name.is_empty()).map(str::to_owned).into_iter().collect(),
        _ => vec![],
    };
    let ends = path.match_indices('/').map(|(at, _)| at).skip(1).chain([path.len()]);
    let all: Vec<&str> = ends.map(|end| &path[..end]).collect();
    let is_named = |whole: &&str| whole.rsplit('/').next().is_some_and(|last| names.iter().any(|name| name == last));
    let top = all.iter().rposition(is_named).unwrap_or(all.len() - 1);
    all[top..].to_vec()
}

/// Adds to the unit's own rules, where it has some. A unit without (crun 1.8 makes such) must stay so: with one
/// DeviceAllow= systemd would deny every other device.
fn allow_in_unit(unit: &str, nodes: &[Node]) -> Result<(), ContainerError> {
    let shown = systemctl(&["show", "--property=DevicePolicy,DeviceAllow", "--", unit])?;
    if !shown.lines().any(|line| !matches!(line, "DevicePolicy=auto" | "DeviceAllow=" | "")) {
        return Ok(());
    }
    // By number: the node need not exist on the host (systemd 240 and later).
    let rules = nodes.iter().map(|n| format!("DeviceAllow=/dev/char/{}:{} rw", n.major, n.minor));
    let words: Vec<String> =
        ["set-property", "--runtime", "--", unit].into_iter().map(str::to_owned).chain(rules).collect();
    systemctl(&words).map(drop)
}

fn systemctl(words: &[impl AsRef<OsStr>]) -> Result<String, ContainerError> {
    let output = Command::new(SYSTEMCTL).args(words).env_clear().stdin(Stdio::null()).output();
    let output = output.map_err(failed(format!("start {SYSTEMCTL}")))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let said = String::from_utf8_lossy(&output.stderr).trim().replace('\n', "; ");
    Err(failed("have systemd allow its devices to the container's scope")(io::Error::other(said)))
}

fn allow_in_list(dir: &Path, nodes: &[Node]) -> Result<(), ContainerError> {
    let file = dir.join("devices.allow");
    for node in nodes {
        let rule = format!("c {}:{} rw", node.major, node.minor);
        // One write is one rule.
        fs::write(&file, &rule).map_err(failed(format!(
            "write {rule:?} to {}; does a cgroup above it deny this device?",
            file.display()
        )))?;
    }
    Ok(())
}

/// Does something again that failed because a program was gone by then: systemd swaps its own in its own time.
pub(super) fn again<T>(attempt: impl Fn() -> io::Result<T>) -> io::Result<T> {
    for _ in 1..TRIES {
        match attempt() {
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            settled => return settled,
        }
    }
    attempt()
}

fn has_programs(dir: &Path) -> Result<bool, ContainerError> {
    let found = again(|| Ok(!bpf::attached(&File::open(dir)?)?.is_empty()));
    found.map_err(failed(format!("read the device programs of {}", dir.display())))
}

fn allow_in_programs(dir: &Path, nodes: &[Node]) -> Result<(), ContainerError> {
    let devices: Vec<(u32, u32)> = nodes.iter().map(|node| (node.major, node.minor)).collect();
    let widened = again(|| {
        let cgroup = File::open(dir)?;
        for old in bpf::attached(&cgroup)? {
            let instructions = old.instructions()?;
            if !program::is_wide(&instructions, &devices) {
                bpf::replace(&cgroup, &old, &program::widen(&instructions, &devices).map_err(io::Error::other)?)?;
            }
        }
        Ok(())
    });
    widened.map_err(failed(format!("widen the device programs of {}", dir.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    const V1: &str = "31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755\n\
                      36 31 0:33 / /sys/fs/cgroup/devices rw,relatime shared:9 - cgroup cgroup rw,devices\n\
                      41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n";
    const V2: &str = "41 31 0:38 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw,nsdelegate\n";

    fn found(mounts: &str, cgroup: &str) -> Option<(Version, String)> {
        place(mounts, cgroup).map(|place| (place.version, place.dir().display().to_string()))
    }

    #[test]
    fn rules_hold_in_the_devices_hierarchy_where_one_is_mounted() {
        let cgroup = "9:pids:/p\n5:cpu,devices:/d/c1\n0::/u/c1\n";
        assert_eq!(found(V1, cgroup), Some((Version::One, "/sys/fs/cgroup/devices/d/c1".into())));
        assert_eq!(found(V2, cgroup), Some((Version::Two, "/sys/fs/cgroup/u/c1".into())));
        assert_eq!(found("", cgroup), None);
        assert_eq!(found(V2, "5:devices:/d\n"), None);
    }

    #[test]
    fn a_part_of_a_tree_serves_what_is_in_it() {
        let part = "41 31 0:38 /engine /cg rw - cgroup2 cgroup2 rw\n";
        assert_eq!(found(part, "0::/engine/c1\n"), Some((Version::Two, "/cg/c1".into())));
        assert_eq!(found(part, "0::/engineering/c1\n"), None);
        assert_eq!(found(part, "0::/other/c1\n"), None);
        assert_eq!(found(V2, "0::/../c1\n"), None, "outside of our cgroup namespace");
    }

    #[test]
    fn own_begins_where_the_config_says() {
        let path = "/machine.slice/libpod-c1.scope/container";
        let scope = "/machine.slice/libpod-c1.scope";
        assert_eq!(own(path, Some("machine.slice:libpod:c1")), [scope, path]);
        assert_eq!(own(scope, Some("machine.slice:libpod:c1")), [scope]);
        assert_eq!(own("/a/b/c1", Some("/a/b/c1")), ["/a/b/c1"]);
        assert_eq!(own("/user.slice/x.scope/c1", Some("c1/")), ["/user.slice/x.scope/c1"]);
        // Not called so anywhere, or not called at all: nothing above the cgroup itself.
        assert_eq!(own(path, Some("/a/other")), [path]);
        assert_eq!(own(path, None), [path]);
        // The name nearest to the container counts: one of the same name further up is another's.
        assert_eq!(own("/c1/x/c1", Some("/c1/x/c1")), ["/c1/x/c1"]);
    }

    #[test]
    fn a_unit_is_the_uppermost_own_cgroup() {
        let unit = |dirs: &[&str]| {
            let cgroup = Cgroup { version: Version::Two, dirs: dirs.iter().map(PathBuf::from).collect() };
            cgroup.unit().map(str::to_owned)
        };
        assert_eq!(unit(&["/s/libpod-c1.scope", "/s/libpod-c1.scope/container"]).as_deref(), Some("libpod-c1.scope"));
        assert_eq!(unit(&["/s/session-3.scope/c1"]), None);
    }
}
