//! A container that its runtime is just creating: device nodes and files put into its mount namespace, device rules widened
//! in its cgroup. For the classic hook; the other ways in edit the config instead.
//!
//! Nothing enters a namespace: `/proc/PID/root` leads to what init sees before it pivots, and every step below it is taken
//! by descriptor, with openat2(2), so that no link of the image leads out.
//!
//! And the cgroups of those who have no container, bare processes and jobs: [`Own`].

mod bpf;
mod cgroup;
mod confine;
mod own;
mod program;

pub use cgroup::Cgroup;
pub use own::{Own, is_cgroup, path_of, remove, remove_job};

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag, openat2, readlinkat};
use nix::sys::stat::{Mode, SFlag, makedev, mkdirat, mknodat, umask};
use nix::sys::statfs::{TMPFS_MAGIC, fstatfs};
use nix::unistd::{Gid, Uid, UnlinkatFlags, fchownat, symlinkat, unlinkat};

/// Where a container finds what its environment can't tell it. A link to [`OWN_DIR`].
const PUBLIC: &str = "mig-hook";
/// Our directory in the container's own /dev: nobody else's, gone with the container, and never part of an image.
const OWN_DIR: &str = "/dev/mig-hook";

/// A container that can't be given its slices in this way.
#[derive(Debug, thiserror::Error)]
pub enum ContainerError {
    /// It is not made so that this could be done safely.
    #[error("{0}")]
    Refused(String),
    /// The kernel or systemd would not.
    #[error("cannot {what}: {source}")]
    Failed {
        /// What was tried.
        what: String,
        /// Why not.
        source: io::Error,
    },
}

/// A device node for the container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// Path below /dev: a name, or a directory and a name.
    pub path: String,
    /// Major number.
    pub major: u32,
    /// Minor number.
    pub minor: u32,
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

/// A container's root and /dev, as its first process sees them between the mounts and the pivot.
#[derive(Debug)]
pub struct Live {
    root: File,
    dev: File,
    run_is_own: bool,
}

impl Live {
    /// Of the process `pid`, whose root file system will be `rootfs` (absolute). `run_is_own`: a tmpfs of its own is at /run.
    pub fn of(pid: u32, rootfs: &Path, run_is_own: bool) -> Result<Live, ContainerError> {
        let shared =
            |kind| same_namespace(pid, kind).map_err(failed(format!("look at the namespaces of process {pid}")));
        if shared("mnt")? {
            return Err(refused(format!("process {pid} shares the host's file systems: it is no container")));
        }
        if !shared("user")? {
            return Err(refused(
                "it has a user namespace, in which device nodes that are made from outside don't open; let podman's \
                 precreate hook or mig-runtime give it its slice",
            ));
        }
        let world = File::open(format!("/proc/{pid}/root")).map_err(failed(format!("look into process {pid}")))?;
        let inside = rootfs.strip_prefix("/").unwrap_or(rootfs);
        let root = directory(&world, inside, ResolveFlag::RESOLVE_IN_ROOT)
            .map_err(failed(format!("find {} in the mount namespace of process {pid}", rootfs.display())))?;
        let dev = directory(&root, "dev", ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_SYMLINKS);
        let dev = dev.map_err(failed("open the container's /dev"))?;
        let device =
            |file: &File| file.metadata().map(|meta| meta.dev()).map_err(failed("look at the container's /dev"));
        let host = std::fs::metadata("/dev").map_err(failed("look at the host's /dev"))?.dev();
        let is_tmpfs = fstatfs(&dev).is_ok_and(|fs| fs.filesystem_type() == TMPFS_MAGIC);
        if !is_tmpfs || [host, device(&root)?].contains(&device(&dev)?) {
            return Err(refused("its /dev is no tmpfs of its own, so its slice's nodes can't be made there"));
        }
        Ok(Live { root, dev, run_is_own })
    }

    /// Makes device nodes in the container's /dev, in the place of whatever lies there.
    pub fn make_nodes(&self, nodes: &[Node]) -> Result<(), ContainerError> {
        let make = |node| self.make_node(node).map_err(failed(format!("make /dev/{} in the container", node.path)));
        with_exact_modes(|| nodes.iter().try_for_each(make))
    }

    fn make_node(&self, node: &Node) -> io::Result<()> {
        let (below, name) =
            node.path.split_once('/').map_or((None, node.path.as_str()), |(dir, name)| (Some(dir), name));
        let below = below.map(|name| own_directory(&self.dev, name)).transpose()?;
        let dir = below.as_ref().unwrap_or(&self.dev);
        make_room(dir, name)?;
        let mode = Mode::from_bits_truncate(node.mode & 0o777);
        mknodat(dir, name, SFlag::S_IFCHR, mode, makedev(node.major.into(), node.minor.into()))?;
        let (uid, gid) = (Uid::from_raw(node.uid), Gid::from_raw(node.gid));
        fchownat(dir, name, Some(uid), Some(gid), AtFlags::AT_SYMLINK_NOFOLLOW)?;
        let meta = step(dir, name, OFlag::O_NOFOLLOW, ResolveFlag::RESOLVE_BENEATH)?.metadata()?;
        let is = (meta.file_type().is_char_device(), meta.rdev(), meta.mode() & 0o777, meta.uid(), meta.gid());
        let wanted = (true, makedev(node.major.into(), node.minor.into()), node.mode & 0o777, node.uid, node.gid);
        if is == wanted { Ok(()) } else { Err(io::Error::other("what is there now is another")) }
    }

    /// Puts `name` with that text into /run/mig-hook, for each of these files.
    pub fn tell(&self, files: &[(&str, String)]) -> Result<(), ContainerError> {
        let write = || {
            let dir = own_directory(&self.dev, PUBLIC)?;
            files.iter().try_for_each(|(name, text)| write_file(&dir, name, text))
        };
        with_exact_modes(write).map_err(failed(format!("write to {OWN_DIR} in the container")))?;
        with_exact_modes(|| self.link()).map_err(failed(
            "make the link /run/mig-hook in the container, which tells it its slice; a /run of its own helps, as with \
             --tmpfs /run",
        ))
    }

    /// The link is the same in every container: several may have one root file system.
    fn link(&self) -> io::Result<()> {
        let one_mount = ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_XDEV;
        let in_image = || directory(&self.root, "run", one_mount);
        let run = match in_image() {
            Err(Errno::ENOENT) => {
                mkdirat(&self.root, "run", Mode::from_bits_truncate(0o755))?;
                in_image()?
            }
            Err(Errno::EXDEV) if self.run_is_own => {
                let run =
                    directory(&self.root, "run", ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_SYMLINKS)?;
                // A later mount may be there under a name that the config spells otherwise.
                let host = std::fs::metadata("/run")?.dev();
                if !fstatfs(&run).is_ok_and(|fs| fs.filesystem_type() == TMPFS_MAGIC) || run.metadata()?.dev() == host {
                    return Err(io::Error::other("/run is mounted from elsewhere"));
                }
                run
            }
            Err(Errno::EXDEV) => return Err(io::Error::other("/run is mounted from elsewhere")),
            other => other?,
        };
        if readlinkat(&run, PUBLIC).is_ok_and(|target| target == OWN_DIR) {
            return Ok(());
        }
        make_room(&run, PUBLIC)?;
        Ok(symlinkat(OWN_DIR, &run, PUBLIC)?)
    }
}

/// Makes things with the modes that are asked for: the caller's umask is none of the container's business.
fn with_exact_modes<T>(make: impl FnOnce() -> T) -> T {
    let mask = umask(Mode::empty());
    let made = make();
    umask(mask);
    made
}

/// Whether a process is in our namespace of that kind.
fn same_namespace(pid: u32, kind: &str) -> io::Result<bool> {
    let of = |who: &str| std::fs::metadata(format!("/proc/{who}/ns/{kind}")).map(|meta| (meta.dev(), meta.ino()));
    Ok(of(&pid.to_string())? == of("self")?)
}

/// An O_PATH descriptor of what lies at `path` below `dir`. Magic links are never followed.
fn step(dir: impl AsFd, path: impl AsRef<Path>, flags: OFlag, resolve: ResolveFlag) -> nix::Result<File> {
    let how = OpenHow::new()
        .flags(flags | OFlag::O_PATH | OFlag::O_CLOEXEC)
        .resolve(resolve | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    // The kernel asks for another try when something anywhere was renamed while it walked over `..` (openat2(2)).
    let mut tries = std::iter::repeat_with(|| openat2(&dir, path.as_ref(), how)).take(64);
    tries.find(|result| !matches!(result, Err(Errno::EAGAIN))).unwrap_or(Err(Errno::EAGAIN)).map(File::from)
}

fn directory(dir: impl AsFd, path: impl AsRef<Path>, resolve: ResolveFlag) -> nix::Result<File> {
    step(dir, path, OFlag::O_DIRECTORY, resolve)
}

/// The directory `name` in `dir`, made where it isn't there. Not behind a link, and nothing may be mounted on it.
fn own_directory(dir: &File, name: &str) -> io::Result<File> {
    match mkdirat(dir, name, Mode::from_bits_truncate(0o755)) {
        Ok(()) | Err(Errno::EEXIST) => {}
        Err(error) => return Err(error.into()),
    }
    let here = ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS | ResolveFlag::RESOLVE_NO_XDEV;
    directory(dir, name, here).map_err(|error| match error {
        Errno::EXDEV => io::Error::other(format!("something is mounted on {name}")),
        Errno::ELOOP | Errno::ENOTDIR => io::Error::other(format!("{name} is a link or a file")),
        error => error.into(),
    })
}

/// Takes away what lies at `name`: a file, a link or an empty directory, but nothing that is mounted.
fn make_room(dir: &File, name: &str) -> io::Result<()> {
    let there = step(dir, name, OFlag::O_NOFOLLOW, ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_XDEV);
    let flag = match there {
        Err(Errno::ENOENT) => return Ok(()),
        Err(Errno::EXDEV) => return Err(io::Error::other("something is mounted there")),
        Err(error) => return Err(error.into()),
        Ok(file) if file.metadata()?.is_dir() => UnlinkatFlags::RemoveDir,
        Ok(_) => UnlinkatFlags::NoRemoveDir,
    };
    Ok(unlinkat(dir, name, flag)?)
}

fn write_file(dir: &File, name: &str, text: &str) -> io::Result<()> {
    make_room(dir, name)?;
    let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let file = nix::fcntl::openat(dir, name, flags, Mode::from_bits_truncate(0o644))?;
    File::from(file).write_all(text.as_bytes())
}

fn refused(why: impl Into<String>) -> ContainerError {
    ContainerError::Refused(why.into())
}

fn failed<E: Into<io::Error>>(what: impl Into<String>) -> impl FnOnce(E) -> ContainerError {
    let what = what.into();
    |source| ContainerError::Failed { what, source: source.into() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;
    use std::sync::atomic::{AtomicBool, Ordering};

    /// A directory with a canary that nothing may change.
    fn tree() -> (tempfile::TempDir, File) {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("in")).unwrap();
        std::fs::write(dir.path().join("canary"), "as it was").unwrap();
        let open = File::open(dir.path().join("in")).unwrap();
        (dir, open)
    }

    fn canary(dir: &tempfile::TempDir) -> String {
        std::fs::read_to_string(dir.path().join("canary")).unwrap()
    }

    #[test]
    fn a_file_takes_the_place_of_a_link_not_of_what_it_points_to() {
        let (dir, inside) = tree();
        symlink(dir.path().join("canary"), dir.path().join("in/uuids")).unwrap();
        write_file(&inside, "uuids", "MIG-1\n").unwrap();
        assert_eq!(std::fs::read_to_string(dir.path().join("in/uuids")).unwrap(), "MIG-1\n");
        assert_eq!(canary(&dir), "as it was");
    }

    #[test]
    fn a_directory_is_not_looked_for_behind_a_link() {
        let (dir, inside) = tree();
        symlink(dir.path(), dir.path().join("in/nvidia-caps")).unwrap();
        let error = own_directory(&inside, "nvidia-caps").unwrap_err().to_string();
        assert!(error.contains("nvidia-caps is a link"), "{error}");
        assert!(own_directory(&inside, "fresh").unwrap().metadata().unwrap().is_dir());
        assert!(own_directory(&inside, "fresh").is_ok(), "it may be there");
    }

    #[test]
    fn a_root_that_leads_out_by_links_is_not_left() {
        let (dir, inside) = tree();
        symlink(dir.path(), dir.path().join("in/absolute")).unwrap();
        symlink("../..", dir.path().join("in/up")).unwrap();
        assert!(directory(&inside, "absolute", ResolveFlag::RESOLVE_IN_ROOT).is_err());
        let up = directory(&inside, "up", ResolveFlag::RESOLVE_IN_ROOT).unwrap();
        assert_eq!(up.metadata().unwrap().ino(), inside.metadata().unwrap().ino());
    }

    /// Exchanges two entries until it is told to stop. How often it did.
    fn exchange(one: &Path, two: &Path, stop: &AtomicBool) -> u32 {
        let (here, mut rounds) = (nix::fcntl::AT_FDCWD, 0);
        while !stop.load(Ordering::Relaxed) {
            let done = nix::fcntl::renameat2(here, one, here, two, nix::fcntl::RenameFlags::RENAME_EXCHANGE);
            rounds += u32::from(done.is_ok());
        }
        rounds
    }

    /// What is looked for by name is exchanged for a link to the host all the while: each step comes to what is inside, or fails.
    #[test]
    fn five_thousand_rounds_against_who_exchanges_what_we_make() {
        let (dir, inside) = tree();
        let path = |name: &str| dir.path().join(name);
        std::fs::create_dir(path("host")).unwrap();
        std::fs::write(path("host/uuids"), "as it was").unwrap();
        std::fs::create_dir_all(path("in/mig-hook")).unwrap();
        std::fs::create_dir_all(path("in/etc/run")).unwrap();
        symlink(path("host"), path("in/swap")).unwrap();
        symlink(path("host"), path("in/etc/swap")).unwrap();
        let stop = AtomicBool::new(false);
        let mut ends = [0; 2];
        std::thread::scope(|scope| {
            let swaps = [("in/mig-hook", "in/swap"), ("in/etc/run", "in/etc/swap")];
            let swaps = swaps.map(|(one, two)| (path(one), path(two)));
            let threads = swaps.map(|(one, two)| {
                scope.spawn({
                    let stop = &stop;
                    move || exchange(&one, &two, stop)
                })
            });
            // On a busy machine until both ends were met.
            for round in 0..1_000_000 {
                if round >= 5000 && ends.iter().all(|end| *end > 0) {
                    break;
                }
                let told = own_directory(&inside, PUBLIC).and_then(|own| write_file(&own, "uuids", "MIG-1\n"));
                ends[usize::from(told.is_ok())] += 1;
                // As the way to /run: links are followed, within the root.
                if let Ok(run) = directory(&inside, "etc/run", ResolveFlag::RESOLVE_IN_ROOT) {
                    let _ = make_room(&run, PUBLIC);
                    let _ = symlinkat(OWN_DIR, &run, PUBLIC);
                }
            }
            stop.store(true, Ordering::Relaxed);
            let rounds = threads.map(|thread| thread.join().unwrap());
            assert!(rounds.iter().all(|rounds| *rounds > 0), "{rounds:?}");
        });
        assert!(ends.iter().all(|end| *end > 0), "both states were met: {ends:?}");
        let left: Vec<_> = std::fs::read_dir(path("host")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left, ["uuids"]);
        assert_eq!(std::fs::read_to_string(path("host/uuids")).unwrap(), "as it was");
        assert_eq!(canary(&dir), "as it was");
    }

    #[test]
    fn full_directories_are_not_taken_away() {
        let (dir, inside) = tree();
        std::fs::create_dir_all(dir.path().join("in/theirs/x")).unwrap();
        assert!(make_room(&inside, "theirs").is_err());
        std::fs::remove_dir(dir.path().join("in/theirs/x")).unwrap();
        assert!(make_room(&inside, "theirs").is_ok() && make_room(&inside, "theirs").is_ok());
    }

    #[test]
    fn our_own_process_is_no_container() {
        let error = Live::of(std::process::id(), Path::new("/"), false).unwrap_err().to_string();
        assert!(error.contains("shares the host's"), "{error}");
    }
}
