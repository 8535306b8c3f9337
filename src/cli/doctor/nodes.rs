//! Device nodes of the host: numbers, and who may open what.

use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use super::gpus::Gpus;
use super::root::Root;
use super::{Check, counted, listed, quoted};
use crate::config::Settings;
use crate::host;

const A_DIRECTORY: &str = "a directory";

/// A node that should be there.
struct Expected {
    path: PathBuf,
    device: (u32, u32),
}

/// Mode and owner that the module's options give to nodes: `driver/nvidia/params`.
#[derive(Debug, Clone, Copy)]
struct Access {
    mode: u32,
    uid: u32,
    gid: u32,
}

impl Access {
    fn of(params: &str) -> Access {
        let number = |key| host::field(params, key);
        let mode = number("DeviceFileMode").unwrap_or(0o666) & 0o777;
        Access { mode, uid: number("DeviceFileUID").unwrap_or(0), gid: number("DeviceFileGID").unwrap_or(0) }
    }

    /// The command that makes a node.
    fn make(self, path: &str, (major, minor): (u32, u32)) -> String {
        let owner = match (self.uid, self.gid) {
            (0, 0) => String::new(),
            (uid, gid) => format!(" && chown {uid}:{gid} {path}"),
        };
        format!("mknod -m {:03o} {path} c {major} {minor}{owner}", self.mode)
    }
}

/// What lies in the place of a node.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Found {
    Nothing,
    /// A character device of these numbers and permission bits.
    Device((u32, u32), u32),
    /// In words.
    Other(&'static str),
}

/// A directory on the way to the capabilities.
struct Directory {
    path: PathBuf,
    /// Owner and mode; `None` where there is none.
    meta: Option<(u32, u32)>,
}

pub(super) fn checks(settings: &Settings, gpus: &Gpus, root: &Root) -> Vec<Check> {
    let devices = fs::read_to_string(settings.proc_root.join("devices")).unwrap_or_default();
    let number = |name: &str| host::major(&devices, name);
    let (Some(nvidia), Some(caps)) = (number("nvidia").or(number("nvidia-frontend")), number("nvidia-caps")) else {
        return vec![Check::skip("nodes.devices", "the driver has no device numbers: nothing to compare nodes with")];
    };
    let dev = &settings.dev_root;
    let expected = expected(dev, gpus, nvidia, number("nvidia-uvm"));
    let found: Vec<(Expected, Found)> = expected.into_iter().map(in_place).collect();
    let params = fs::read_to_string(settings.proc_root.join("driver/nvidia/params")).unwrap_or_default();
    let mut checks = devices_checks(&found, Access::of(&params));

    let directory = dev.join("nvidia-caps");
    let on_the_way = [dev, &directory].map(|path| Directory {
        path: path.to_owned(),
        meta: path.metadata().ok().map(|meta| (meta.uid(), meta.mode())),
    });
    checks.extend(directory_check(&on_the_way));
    if directory.exists() {
        checks.push(capabilities_check(caps, &directory, &capabilities(&directory)));
    }
    for (name, right) in [("config", "cut and destroy slices"), ("monitor", "see what runs in every slice")] {
        let file = settings.proc_root.join("driver/nvidia/capabilities/mig").join(name);
        let minor = fs::read_to_string(file).ok().as_deref().and_then(host::access_minor);
        checks.extend(minor.and_then(|minor| right_check(name, right, &directory.join(format!("nvidia-cap{minor}")))));
    }
    let numbers: Vec<(Expected, Found)> = found.into_iter().map(|(e, _)| by_number(dev, &e)).collect();
    checks.push(number_check(root.exists("/run/systemd/system"), &numbers));
    checks
}

fn expected(dev: &Path, gpus: &Gpus, nvidia: u32, uvm: Option<u32>) -> Vec<Expected> {
    let node = |name: &str, major, minor| Expected { path: dev.join(name), device: (major, minor) };
    let mut nodes = vec![node("nvidiactl", nvidia, 255)];
    let gpu = |gpu: &super::gpus::Seen| node(&format!("nvidia{}", gpu.device.minor), nvidia, gpu.device.minor);
    nodes.extend(gpus.seen().iter().map(gpu));
    nodes.extend(uvm.map(|major| node("nvidia-uvm", major, 0)));
    nodes
}

fn in_place(node: Expected) -> (Expected, Found) {
    let found = found(&node.path);
    (node, found)
}

fn found(path: &Path) -> Found {
    match path.symlink_metadata() {
        Ok(meta) => what(&meta),
        Err(_) => Found::Nothing,
    }
}

fn what(meta: &Metadata) -> Found {
    let kind = meta.file_type();
    let (major, minor) = (nix::sys::stat::major(meta.rdev()) as u32, nix::sys::stat::minor(meta.rdev()) as u32);
    match kind.is_char_device() {
        true => Found::Device((major, minor), meta.mode() & 0o777),
        false if kind.is_symlink() => Found::Other("a link"),
        false if kind.is_dir() => Found::Other(A_DIRECTORY),
        false => Found::Other("no character device"),
    }
}

fn name_of(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

fn remove(what: &str) -> &'static str {
    if what == A_DIRECTORY { "rm -r" } else { "rm" }
}

/// One line where all is well, and one for each node that is not.
fn devices_checks(nodes: &[(Expected, Found)], access: Access) -> Vec<Check> {
    let mut right = Vec::new();
    let mut faults = Vec::new();
    for (node, found) in nodes {
        let (path, (major, minor)) = (quoted(&node.path.to_string_lossy()), node.device);
        let id = format!("nodes.{}", name_of(&node.path));
        let make = access.make(&path, node.device);
        match found {
            Found::Device(device, _) if *device == node.device => right.push(name_of(&node.path)),
            Found::Nothing => {
                faults.push(Check::warn(id, format!("there is no {path}: programs on the host can't use it"), make))
            }
            Found::Device((other, number), _) => faults.push(Check::fail(
                id,
                format!("{path} is device {other}:{number}, and the driver's number is {major}:{minor}"),
                format!("rm {path} && {make}"),
            )),
            Found::Other(what) => faults.push(Check::fail(
                id,
                format!("{path} is {what}, not device {major}:{minor}"),
                format!("{} {path} && {make}", remove(what)),
            )),
        }
    }
    if !right.is_empty() {
        faults.insert(0, Check::ok("nodes.devices", format!("{} as the driver numbers them", listed(&right))));
    }
    faults
}

/// Both directories are root's to change and everybody's to pass: crun binds a slice's nodes with the user's rights
/// (crun issue 1047).
fn directory_check(directories: &[Directory]) -> Vec<Check> {
    let mut checks = Vec::new();
    for Directory { path, meta } in directories {
        let id = if path.ends_with("nvidia-caps") { "nodes.caps-directory" } else { "nodes.dev-directory" };
        let shown = quoted(&path.to_string_lossy());
        match meta {
            None => checks.push(Check::ok(id, format!("no {shown} yet: it is made when somebody needs it"))),
            Some((uid, mode)) if *uid != 0 || (mode & 0o022 != 0 && mode & 0o1000 == 0) => checks.push(Check::fail(
                id,
                format!("others can put devices into {shown} (owner {uid}, mode {:04o})", mode & 0o7777),
                format!("chown root:root {shown} && chmod 755 {shown}"),
            )),
            Some((_, mode)) if mode & 0o005 != 0o005 => checks.push(Check::warn(
                id,
                format!(
                    "{shown} is closed to users (mode {:04o}): rootless containers can't use a slice",
                    mode & 0o7777
                ),
                format!("chmod 755 {shown}"),
            )),
            Some(_) => {}
        }
    }
    checks
}

/// The nodes in a directory of capabilities, by name.
fn capabilities(directory: &Path) -> Vec<(String, Found)> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let mut nodes: Vec<_> = entries.map(|e| (name_of(&e.path()), found(&e.path()))).collect();
    nodes.sort_by(|a, b| a.0.cmp(&b.0));
    nodes
}

/// Minors of instances come again: a node with another number is another slice, or nothing.
fn capabilities_check(caps: u32, directory: &Path, nodes: &[(String, Found)]) -> Check {
    let id = "nodes.capabilities";
    let minor = |name: &str| name.strip_prefix("nvidia-cap")?.parse::<u32>().ok();
    // A file that is neither a device nor called like one does no harm.
    let matters = |(name, found): &&(String, Found)| minor(name).is_some() || matches!(found, Found::Device(..));
    let is_right = |(name, found): &&(String, Found)| match (minor(name), found) {
        (Some(minor), Found::Device(device, _)) => *device == (caps, minor),
        _ => false,
    };
    let (right, wrong): (Vec<_>, Vec<_>) = nodes.iter().filter(matters).partition(is_right);
    let Some((_, first)) = wrong.first() else {
        let number = counted(right.len(), "capability node");
        return Check::ok(id, format!("{number}, each with the number of its name (major {caps})"));
    };
    let names: Vec<String> = wrong.iter().map(|(name, _)| name.clone()).collect();
    let paths: Vec<String> = names.iter().map(|n| quoted(&directory.join(n).to_string_lossy())).collect();
    let example = match first {
        Found::Device((major, minor), _) => format!("device {major}:{minor}"),
        Found::Other(what) => (*what).to_owned(),
        Found::Nothing => "gone".into(),
    };
    Check::fail(
        id,
        format!(
            "{} not the capability of its name (major {caps}): {} is {example}; left from another boot, or made by hand",
            if names.len() == 1 { format!("{} is", names[0]) } else { format!("{} are", listed(&names)) },
            names[0],
        ),
        format!("rm -r {}\nwho needs it makes it again", paths.join(" ")),
    )
}

/// The rights to cut and to look into every slice are not everybody's.
fn right_check(name: &str, right: &str, path: &Path) -> Option<Check> {
    let Found::Device(_, mode) = found(path) else { return None };
    right_verdict(name, right, path, mode)
}

fn right_verdict(name: &str, right: &str, path: &Path, mode: u32) -> Option<Check> {
    let shown = quoted(&path.to_string_lossy());
    let open = format!("every user may {right}: {shown} has mode {mode:04o}");
    (mode & 0o006 != 0).then(|| Check::fail(format!("nodes.{name}"), open, format!("chmod 400 {shown}")))
}

/// What is found under /dev/char by the node's number. A link of udev's is followed.
fn by_number(dev: &Path, node: &Expected) -> (Expected, Found) {
    let path = dev.join(format!("char/{}:{}", node.device.0, node.device.1));
    let found = match path.metadata() {
        Err(error) if error.kind() == io::ErrorKind::NotFound && path.symlink_metadata().is_err() => Found::Nothing,
        Err(_) => Found::Other("a link that leads nowhere"),
        Ok(meta) => what(&meta),
    };
    (Expected { path, device: node.device }, found)
}

/// runc before 1.1.7 tells systemd only of devices that are found by number; mig-hook puts a slice's there when it is
/// cut, so only what is wrong matters.
fn number_check(systemd: bool, nodes: &[(Expected, Found)]) -> Check {
    let id = "nodes.by-number";
    if !systemd {
        return Check::skip(id, "no systemd here: nothing looks for devices in /dev/char");
    }
    let wrong = |(node, found): &&(Expected, Found)| match found {
        Found::Nothing => false,
        Found::Device(device, _) => *device != node.device,
        Found::Other(_) => true,
    };
    let wrong: Vec<String> = nodes.iter().filter(wrong).map(|(n, _)| quoted(&n.path.to_string_lossy())).collect();
    match wrong.is_empty() {
        true => Check::ok(id, "systemd finds devices by number; those of a slice are added when it is given"),
        false => Check::warn(
            id,
            format!("{} not the device of its number: systemd takes it from containers at a daemon-reload", {
                if wrong.len() == 1 { format!("{} is", wrong[0]) } else { format!("{} are", listed(&wrong)) }
            }),
            format!("rm {}\nthe next slice that is given makes it again", wrong.join(" ")),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Status;
    use super::*;

    fn node(name: &str, device: (u32, u32)) -> Expected {
        Expected { path: Path::new("/dev").join(name), device }
    }

    fn said(check: &Check) -> String {
        format!("{}\n{}", check.found, check.remedy.as_deref().unwrap_or_default())
    }

    #[test]
    fn a_node_is_right_missing_or_another() {
        let all = [
            (node("nvidiactl", (195, 255)), Found::Device((195, 255), 0o666)),
            (node("nvidia0", (195, 0)), Found::Nothing),
            (node("nvidia1", (195, 1)), Found::Device((195, 7), 0o666)),
            (node("nvidia2", (195, 2)), Found::Other("no character device")),
        ];
        let checks = devices_checks(&all, Access::of(""));
        assert_eq!(
            checks.iter().map(|c| (c.id.as_str(), c.status)).collect::<Vec<_>>(),
            [
                ("nodes.devices", Status::Ok),
                ("nodes.nvidia0", Status::Warn),
                ("nodes.nvidia1", Status::Fail),
                ("nodes.nvidia2", Status::Fail)
            ]
        );
        assert!(said(&checks[1]).contains("mknod -m 666 /dev/nvidia0 c 195 0"));
        assert!(said(&checks[2]).contains("is device 195:7") && said(&checks[2]).contains("rm /dev/nvidia1 && mknod"));
    }

    #[test]
    fn a_node_is_made_as_open_as_the_module_s_options_say() {
        let restricted = Access::of("ModifyDeviceFiles: 1\nDeviceFileUID: 0\nDeviceFileGID: 44\nDeviceFileMode: 432\n");
        let command = restricted.make("/dev/nvidia0", (195, 0));
        assert_eq!(command, "mknod -m 660 /dev/nvidia0 c 195 0 && chown 0:44 /dev/nvidia0");
    }

    #[test]
    fn directories_are_roots_to_change_and_everybodys_to_pass() {
        let directory = |name: &str, meta| Directory { path: Path::new(name).to_owned(), meta };
        let one = |meta| directory_check(&[directory("/dev/nvidia-caps", meta)]).pop();
        assert_eq!(one(Some((0, 0o040_755))), None);
        assert_eq!(one(None).unwrap().status, Status::Ok);
        assert!(said(&one(Some((0, 0o040_700))).unwrap()).contains("chmod 755 /dev/nvidia-caps"));
        assert_eq!(one(Some((0, 0o040_777))).unwrap().status, Status::Fail);
        assert_eq!(one(Some((1000, 0o040_755))).unwrap().status, Status::Fail);
        assert_eq!(directory_check(&[directory("/dev", Some((0, 0o041_777)))]), []);
        assert_eq!(directory_check(&[directory("/dev", Some((0, 0o040_750)))])[0].id, "nodes.dev-directory");
    }

    #[test]
    fn a_capability_has_the_number_of_its_name() {
        let check = |nodes: &[(&str, Found)]| {
            let nodes: Vec<_> = nodes.iter().map(|(name, found)| ((*name).to_owned(), found.clone())).collect();
            capabilities_check(236, Path::new("/dev/nvidia-caps"), &nodes)
        };
        let right = ("nvidia-cap12", Found::Device((236, 12), 0o444));
        assert_eq!(check(&[]).status, Status::Ok);
        assert!(said(&check(&[right.clone(), ("readme", Found::Other("x"))])).starts_with("1 capability node,"));
        let other = ("nvidia-cap13", Found::Device((235, 13), 0o444));
        let wrong = check(&[right.clone(), other]);
        assert!(wrong.status == Status::Fail && said(&wrong).contains("nvidia-cap13 is device 235:13"), "{wrong:?}");
        assert!(said(&wrong).contains("rm -r /dev/nvidia-caps/nvidia-cap13"), "{wrong:?}");
        assert_eq!(check(&[("nvidia-cap13", Found::Other("a link"))]).status, Status::Fail);
        assert_eq!(check(&[("spare", Found::Device((236, 13), 0o444))]).status, Status::Fail);
    }

    #[test]
    fn rights_over_all_slices_are_not_everybodys() {
        let at = |mode| right_verdict("config", "cut", Path::new("/dev/nvidia-caps/nvidia-cap1"), mode);
        assert_eq!((at(0o400), at(0o440)), (None, None));
        let open = at(0o444).unwrap();
        assert!(open.status == Status::Fail && said(&open).contains("chmod 400"), "{open:?}");
    }

    #[test]
    fn a_wrong_link_by_number_matters_to_systemd() {
        let found = |found| [(node("char/195:0", (195, 0)), found)];
        assert_eq!(number_check(false, &found(Found::Other("x"))).status, Status::Skip);
        assert_eq!(number_check(true, &found(Found::Nothing)).status, Status::Ok);
        assert_eq!(number_check(true, &found(Found::Device((195, 0), 0o600))).status, Status::Ok);
        let wrong = number_check(true, &found(Found::Device((195, 3), 0o600)));
        assert!(wrong.status == Status::Warn && said(&wrong).contains("rm /dev/char/195:0"), "{wrong:?}");
    }
}
