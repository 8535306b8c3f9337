//! Device nodes of the host, made where something takes them from there: a runtime that binds them into a user namespace,
//! or whoever reads a CDI spec. The driver makes none; its tools do (nvidia-modprobe.c), and like them we remove none.

use std::fs::{self, DirBuilder, OpenOptions, Permissions};
use std::io::{self, Seek, SeekFrom, Write};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt, lchown};
use std::path::Path;

use nix::sys::stat::{Mode, SFlag, makedev, mknod};

use super::{Capability, Host, HostError, NodeMode, access_minor, read};

impl Host {
    /// Makes a node of the GPUs or of uvm where it is missing or another device, with the mode and owner of the module's
    /// options.
    pub fn make_device(&self, name: &str, major: u32, minor: u32) -> Result<(), HostError> {
        self.make(name, major, minor, &self.proc_root.join("driver/nvidia/params"))
    }

    /// The same for the capability of a GPU instance, or of a compute instance in it, with the mode of its `access` file.
    pub fn make_capability(&self, major: u32, gpu: u32, gi: u32, ci: Option<u32>) -> Result<(), HostError> {
        let compute = ci.map_or(String::new(), |ci| format!("ci{ci}/"));
        let file = self.proc_root.join(format!("driver/nvidia/capabilities/gpu{gpu}/mig/gi{gi}/{compute}access"));
        let minor = access_minor(&read(&file)?).ok_or_else(|| no_minor(&file))?;
        self.make(&format!("nvidia-caps/nvidia-cap{minor}"), major, minor, &file)
    }

    /// Gives the node of a capability to one user alone (0400), made anew so that no other access stays, or with `None` back
    /// to everybody (0444, as the driver has it). nvidia-modprobe, which every user may call, sets mode and owner back
    /// unless the capability's file says that they are not to be modified (nvidia-modprobe-utils.c, mknod_helper; nv-caps.c,
    /// nv_cap_procfs_release). The instance may have gone.
    pub fn own_capability(&self, major: u32, of: Capability, owner: Option<u32>) -> Result<(), HostError> {
        let modify = i32::from(owner.is_none());
        let compute = of.ci.map_or(String::new(), |ci| format!("ci{ci}/"));
        let access = format!("driver/nvidia/capabilities/gpu{}/mig/gi{}/{compute}access", of.gpu, of.gi);
        set_modify(&self.proc_root.join(access), modify)?;
        let name = format!("nvidia-caps/nvidia-cap{}", of.minor);
        let (mode, uid) = (if owner.is_some() { 0o400 } else { 0o444 }, owner.unwrap_or(0));
        let is_so = |now: NodeMode| now.mode == mode && now.uid == uid;
        match self.node_mode(&name, major, of.minor) {
            Some(now) if is_so(now) => return Ok(()),
            None if owner.is_none() => return Ok(()), // nobody can open what is not there
            _ => {}
        }
        let path = self.dev_root.join(name);
        place(&path, (major, of.minor), mode, (Some(uid), None)).map_err(|source| HostError::Node {
            path: path.display().to_string(),
            source,
            remedy: format!(
                "mknod -m {mode:o} {path} c {major} {}; chown {uid} {path}",
                of.minor,
                path = path.display()
            ),
        })
    }

    /// Makes /dev/char/MAJOR:MINOR, where udev keeps links to the devices that it knows, if nothing there is that device. For
    /// root alone: it is there to be found, not to be opened.
    pub fn number_device(&self, major: u32, minor: u32) -> Result<(), HostError> {
        let name = format!("char/{major}:{minor}");
        let path = self.dev_root.join(&name);
        let device = makedev(major.into(), minor.into());
        if path.metadata().is_ok_and(|meta| meta.file_type().is_char_device() && meta.rdev() == device) {
            return Ok(());
        }
        place(&path, (major, minor), 0o600, (None, None)).map_err(|source| HostError::Node {
            path: path.display().to_string(),
            source,
            remedy: format!("mknod -m 600 {} c {major} {minor}", path.display()),
        })
    }

    fn make(&self, name: &str, major: u32, minor: u32, file: &Path) -> Result<(), HostError> {
        if self.node_mode(name, major, minor).is_some() {
            return Ok(());
        }
        let text = read(file)?;
        let number = |key| field(&text, key);
        let mode = number("DeviceFileMode").unwrap_or(0o444) & 0o777;
        let path = self.dev_root.join(name);
        let failed = |source| HostError::Node {
            path: path.display().to_string(),
            source,
            remedy: format!("mknod -m {mode:o} {} c {major} {minor}", path.display()),
        };
        if number("DeviceFileModify").or(number("ModifyDeviceFiles")) == Some(0) {
            return Err(failed(io::Error::other(format!(
                "{} says that device files are not to be made",
                file.display()
            ))));
        }
        let owner = (number("DeviceFileUID"), number("DeviceFileGID"));
        place(&path, (major, minor), mode, owner).map_err(failed)?;
        match self.node_mode(name, major, minor) {
            Some(_) => Ok(()),
            None => Err(failed(io::Error::other("another device is in its place"))),
        }
    }
}

/// Made beside its place and renamed there: no moment with a wrong mode, and what lies there, a link too, is replaced and
/// not followed.
fn place(path: &Path, device: (u32, u32), mode: u32, owner: (Option<u32>, Option<u32>)) -> io::Result<()> {
    let dir = path.parent().unwrap_or(Path::new("/"));
    match DirBuilder::new().mode(0o755).create(dir) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        Ok(()) => fs::set_permissions(dir, Permissions::from_mode(0o755))?, // whatever the umask
        Err(_) if !dir.symlink_metadata()?.is_dir() => return Err(io::ErrorKind::NotADirectory.into()),
        Err(_) => {}
    }
    let temporary = path.with_extension(format!("{}.tmp", std::process::id()));
    let _ = fs::remove_file(&temporary); // of an earlier process with our pid
    mknod(&temporary, SFlag::S_IFCHR, Mode::empty(), makedev(device.0.into(), device.1.into()))?;
    let done = lchown(&temporary, owner.0.or(Some(0)), owner.1.or(Some(0)))
        .and_then(|()| fs::set_permissions(&temporary, Permissions::from_mode(mode)))
        .and_then(|()| fs::rename(&temporary, path));
    done.inspect_err(|_| drop(fs::remove_file(&temporary)))
}

/// Writes its last line into a capability's file, at its own place: the driver reads what is written, wherever, and takes
/// only that line. Of an instance that has gone there is none.
fn set_modify(file: &Path, value: i32) -> Result<(), HostError> {
    let failed = |source| HostError::Read { path: file.display().to_string(), source };
    let text = match fs::read_to_string(file) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed(error)),
    };
    let line = format!("DeviceFileModify: {value}\n");
    let Some(at) = text.find("DeviceFileModify:").filter(|_| !text.contains(&line)) else { return Ok(()) };
    let write = || {
        let mut file = OpenOptions::new().write(true).open(file)?;
        file.seek(SeekFrom::Start(at as u64))?;
        file.write_all(line.as_bytes())
    };
    write().map_err(failed)
}

/// A number in the driver's files of `Key: value` lines.
pub fn field(text: &str, key: &str) -> Option<u32> {
    text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':')?.trim().parse().ok())
}

fn no_minor(file: &Path) -> HostError {
    HostError::Content { path: file.display().to_string(), what: "has no DeviceFileMinor line".into() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    /// A capability with this file; `None` where no node can be made.
    fn host(access: &str) -> Option<(tempfile::TempDir, Host)> {
        let dir = tempfile::tempdir().unwrap();
        let at = |relative: &str| dir.path().join(relative);
        fs::create_dir_all(at("dev")).unwrap();
        if mknod(&at("dev/probe"), SFlag::S_IFCHR, Mode::empty(), makedev(240, 1)).is_err() {
            eprintln!("SKIP: no device nodes can be made here");
            return None;
        }
        fs::create_dir_all(at("proc/driver/nvidia/capabilities/gpu0/mig/gi1/ci0")).unwrap();
        fs::write(at("proc/driver/nvidia/capabilities/gpu0/mig/gi1/ci0/access"), access).unwrap();
        fs::write(at("proc/driver/nvidia/params"), "ModifyDeviceFiles: 1\nDeviceFileGID: 44\nDeviceFileMode: 432\n")
            .unwrap();
        let host = Host::at(&at("proc"), &at("dev"), Path::new("/"));
        Some((dir, host))
    }

    const ACCESS: &str = "DeviceFileMinor: 13\nDeviceFileMode: 292\nDeviceFileModify: 1\n";

    #[test]
    fn a_missing_node_is_made_as_the_driver_says() {
        let Some((dir, host)) = host(ACCESS) else { return };
        host.make_capability(240, 0, 1, Some(0)).unwrap();
        let path = dir.path().join("dev/nvidia-caps/nvidia-cap13");
        let meta = path.symlink_metadata().unwrap();
        assert!(meta.file_type().is_char_device());
        assert_eq!((super::super::device(meta.rdev()), meta.mode() & 0o777), ((240, 13), 0o444));
        assert_eq!(path.parent().unwrap().metadata().unwrap().mode() & 0o777, 0o755);
        host.make_device("nvidia1", 195, 1).unwrap();
        let meta = dir.path().join("dev/nvidia1").symlink_metadata().unwrap();
        assert_eq!((super::super::device(meta.rdev()), meta.mode() & 0o777, meta.gid()), ((195, 1), 0o660, 44));
    }

    #[test]
    fn what_is_right_stays_and_what_is_stale_is_replaced() {
        let Some((dir, host)) = host(ACCESS) else { return };
        let path = dir.path().join("dev/nvidia-caps/nvidia-cap13");
        let canary = dir.path().join("canary");
        fs::write(&canary, "x").unwrap();
        fs::create_dir(path.parent().unwrap()).unwrap();
        symlink(&canary, &path).unwrap();
        host.make_capability(240, 0, 1, Some(0)).unwrap();
        assert_eq!(fs::read_to_string(&canary).unwrap(), "x");
        let inode = path.symlink_metadata().unwrap().ino();
        // An administrator's own mode is kept.
        fs::set_permissions(&path, Permissions::from_mode(0o400)).unwrap();
        host.make_capability(240, 0, 1, Some(0)).unwrap();
        let meta = path.symlink_metadata().unwrap();
        assert_eq!((meta.ino(), meta.mode() & 0o777), (inode, 0o400));
        // The caps major is another one after a reboot, on a /dev that is kept.
        host.make_capability(241, 0, 1, Some(0)).unwrap();
        assert_eq!(super::super::device(path.symlink_metadata().unwrap().rdev()), (241, 13));
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1, "nothing temporary is left");
    }

    #[test]
    fn a_reserved_node_is_one_users_alone_until_it_is_given_back() {
        let Some((dir, host)) = host(ACCESS) else { return };
        let (path, access) = (
            dir.path().join("dev/nvidia-caps/nvidia-cap13"),
            "proc/driver/nvidia/capabilities/gpu0/mig/gi1/ci0/access",
        );
        let of = Capability { minor: 13, gpu: 0, gi: 1, ci: Some(0) };
        let seen = || path.symlink_metadata().map(|meta| (meta.uid(), meta.mode() & 0o777));
        host.own_capability(240, of, None).unwrap();
        assert!(seen().is_err(), "what is not there is open to nobody");
        host.own_capability(240, of, Some(1000)).unwrap();
        assert_eq!(seen().unwrap(), (1000, 0o400));
        let closed = ACCESS.replace("Modify: 1", "Modify: 0");
        assert_eq!(fs::read_to_string(dir.path().join(access)).unwrap(), closed);
        let inode = path.symlink_metadata().unwrap().ino();
        host.own_capability(240, of, Some(1000)).unwrap();
        assert_eq!(path.symlink_metadata().unwrap().ino(), inode);
        // As nvidia-modprobe leaves it that was called in between.
        fs::set_permissions(&path, Permissions::from_mode(0o444)).unwrap();
        host.own_capability(240, of, Some(1000)).unwrap();
        assert_eq!(seen().unwrap(), (1000, 0o400));
        host.own_capability(240, of, None).unwrap();
        assert_eq!(seen().unwrap(), (0, 0o444));
        assert_eq!(fs::read_to_string(dir.path().join(access)).unwrap(), ACCESS);
        host.own_capability(240, of, Some(1000)).unwrap();
        fs::remove_file(dir.path().join(access)).unwrap();
        host.own_capability(240, of, None).unwrap();
        assert_eq!(seen().unwrap(), (0, 0o444), "the instance has gone, and its number comes again");
    }

    #[test]
    fn a_directory_that_is_a_link_and_a_driver_that_forbids_it() {
        let Some((dir, host)) = host(&ACCESS.replace("Modify: 1", "Modify: 0")) else { return };
        let error = host.make_capability(240, 0, 1, Some(0)).unwrap_err().to_string();
        assert!(error.contains("not to be made") && error.contains("c 240 13"), "{error}");
        let elsewhere = dir.path().join("elsewhere");
        fs::create_dir(&elsewhere).unwrap();
        symlink(&elsewhere, dir.path().join("dev/nvidia-caps")).unwrap();
        host.make_device("nvidia-caps/x", 240, 13).unwrap_err();
        assert_eq!(fs::read_dir(&elsewhere).unwrap().count(), 0);
    }

    #[test]
    fn a_device_is_found_by_its_number_and_opened_by_root_alone() {
        let Some((dir, host)) = host(ACCESS) else { return };
        let path = dir.path().join("dev/char/240:13");
        host.number_device(240, 13).unwrap();
        let meta = path.symlink_metadata().unwrap();
        assert_eq!((meta.rdev(), meta.mode() & 0o777), (makedev(240, 13), 0o600));
        // A link of udev's stays, one that leads elsewhere does not.
        for (target, stays) in [("../probe", true), ("240:13", false)] {
            fs::create_dir_all(dir.path().join("dev/char")).unwrap();
            let (number, path) = ((240, 1), dir.path().join("dev/char/240:1"));
            let _ = fs::remove_file(&path);
            symlink(target, &path).unwrap();
            host.number_device(number.0, number.1).unwrap();
            assert_eq!(path.symlink_metadata().unwrap().is_symlink(), stays, "{target}");
            assert_eq!(path.metadata().unwrap().rdev(), makedev(240, 1));
        }
    }
}
