//! A cgroup that we make for bare processes: for those of `migctl run`, or for a job before its batch system starts it.

use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::path::{Component, Path, PathBuf};

use nix::fcntl::ResolveFlag;

use super::cgroup::{Mount, Place, Version, hierarchy, place};
use super::{ContainerError, directory, failed, own_directory, refused};

/// What the names of our cgroups begin with, so that none of anybody else's is taken away.
const PREFIX: &str = "mig-hook-";

/// A cgroup of bare processes, in the hierarchy where device rules live.
#[derive(Debug)]
pub struct Own {
    pub(super) place: Place,
}

impl Own {
    /// Makes `mig-hook-TOKEN` in the cgroup that we are in ourselves, whose limits hold for it too. `record` is told its
    /// [path](Own::path) before it is made, so that it is found should this process die then.
    pub fn make<E: From<ContainerError>>(token: &str, record: impl FnOnce(&str) -> Result<(), E>) -> Result<Own, E> {
        let place = Own::beside_us(token)?;
        record(&place.path())?;
        Ok(Own::at_place(place)?)
    }

    fn beside_us(token: &str) -> Result<Place, ContainerError> {
        let ours = read("/proc/self/cgroup")?;
        let Some(ours) = place(&mountinfo()?, &ours) else {
            return Err(refused("no cgroup tree with device rules is mounted here in which we are"));
        };
        let below = format!("{}/{PREFIX}{token}", ours.below.trim_end_matches('/'));
        Ok(Place { below, ..ours })
    }

    /// The cgroup at `path`, made where it is missing, and those above it. `path` is either that of its directory or, if
    /// nothing is mounted there, the one by which its processes will know it (/proc/PID/cgroup).
    pub fn at(path: &Path) -> Result<Own, ContainerError> {
        Own::at_place(named(&mountinfo()?, path)?)
    }

    fn at_place(place: Place) -> Result<Own, ContainerError> {
        let make = || -> io::Result<File> {
            let top = directory(File::open("/")?, &place.mount, ResolveFlag::RESOLVE_NO_SYMLINKS)?;
            place.below.split('/').filter(|name| !name.is_empty()).try_fold(top, |dir, name| own_directory(&dir, name))
        };
        make().map_err(failed(format!("make the cgroup {}", place.dir().display())))?;
        Ok(Own { place })
    }

    /// Its directory.
    pub fn dir(&self) -> PathBuf {
        self.place.dir()
    }

    /// As it stands in the /proc/PID/cgroup of its processes.
    pub fn path(&self) -> String {
        self.place.path()
    }

    /// Its `cgroup.procs`, for [`crate::handover::in_cgroup`].
    pub fn procs(&self) -> Result<File, ContainerError> {
        let file = self.dir().join("cgroup.procs");
        File::options().write(true).open(&file).map_err(failed(format!("open {}", file.display())))
    }

    /// Takes it away, with what its processes have made in it. `false`: a process is still in it. One that has gone is no error.
    pub fn remove(&self) -> Result<bool, ContainerError> {
        remove_directory(&self.dir())
    }
}

/// Takes away an [`Own::make`] cgroup that was left behind, by its [`Own::path`], with what its processes have made in it.
/// `false`: a process is still in it.
/// One that has gone is no error, one with a name that is not ours is.
pub fn remove(path: &str) -> Result<bool, ContainerError> {
    let place = named(&mountinfo()?, Path::new(path))?;
    match place.below.rsplit('/').next().is_some_and(|name| name.starts_with(PREFIX)) {
        true => remove_directory(&place.dir()),
        false => Err(refused(format!("the cgroup {path} is not called {PREFIX}…: it is left to whoever made it"))),
    }
}

/// Takes away the cgroup of a job without processes, with those in it (Slurm 22.05 leaves its steps' when a container was
/// killed), and its user's above it when that is empty then. What stands against that is left as it is.
pub fn remove_job(path: &str) {
    if let Ok(place) = mountinfo().and_then(|mounts| named(&mounts, Path::new(path))) {
        let dir = place.dir();
        remove_empty(&dir);
        if let Some(above) = dir.parent().filter(|_| !dir.exists()) {
            let _ = fs::remove_dir(above);
        }
    }
}

/// Takes away a cgroup and those in it, as far as no process is in them.
fn remove_empty(dir: &Path) {
    for entry in dir.read_dir().into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_empty(&entry.path());
        }
    }
    let _ = fs::remove_dir(dir);
}

/// A cgroup as it stands in the /proc/PID/cgroup of its processes, or the end of that. `name`: the same, or its directory.
pub fn path_of(name: &str) -> Result<String, ContainerError> {
    path_of_named(&mountinfo()?, Path::new(name))
}

fn path_of_named(mountinfo: &str, name: &Path) -> Result<String, ContainerError> {
    let path: PathBuf = name.components().collect();
    let (_, mounts) = hierarchy(mountinfo);
    let is_directory = mounts.iter().any(|mount| first(&mount.at) == first(&path));
    match plain(&path).filter(|text| !is_directory && *text != "/") {
        Some(text) => Ok(text.to_owned()),
        None => named(mountinfo, name).map(|place| place.path()),
    }
}

/// Whether there is a cgroup of that path in any hierarchy: slurmd makes its own in that of the device rules with its first
/// job only (seen with 22.05), in v1's freezer at its start.
pub fn is_cgroup(path: &str) -> bool {
    let mounts = mountinfo().unwrap_or_default();
    let is_there = |mount: Mount<'_>| mount.place(Version::One, path).is_some_and(|place| place.dir().is_dir());
    mounts.lines().filter_map(Mount::read).filter(|mount| mount.kind.starts_with("cgroup")).any(is_there)
}

fn remove_directory(dir: &Path) -> Result<bool, ContainerError> {
    let below = fs::read_dir(dir).into_iter().flatten().flatten();
    for inner in below.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())) {
        if !remove_directory(&inner.path())? {
            return Ok(false);
        }
    }
    match fs::remove_dir(dir) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(true),
        Err(error) if error.kind() == ErrorKind::ResourceBusy => Ok(false),
        Err(error) => Err(failed(format!("remove the cgroup {}", dir.display()))(error)),
    }
}

/// The cgroup that someone names by its directory or by its path in the hierarchy.
fn named(mountinfo: &str, path: &Path) -> Result<Place, ContainerError> {
    let path: PathBuf = path.components().collect(); // without what means nothing, as a slash at the end
    let shown = path.display();
    let Some(text) = plain(&path) else {
        return Err(refused(format!("{shown} names no cgroup: it must begin with / and have no .. in it")));
    };
    let (version, mounts) = hierarchy(mountinfo);
    let by_directory = mounts.iter().find_map(|mount| Some((mount, path.strip_prefix(&mount.at).ok()?.to_str()?)));
    let found = match by_directory {
        Some((mount, below)) => mount.place(version, &format!("{}/{below}", mount.root.trim_end_matches('/'))),
        // Another hierarchy, or the file system above them all.
        None if mounts.iter().any(|mount| first(&mount.at) == first(&path)) => None,
        None => mounts.iter().find_map(|mount| mount.place(version, text)),
    };
    let Some(found) = found else {
        let at: Vec<String> = mounts.iter().map(|mount| mount.at.display().to_string()).collect();
        return Err(refused(match at.is_empty() {
            true => "no cgroup tree with device rules is mounted here".into(),
            false => format!("{shown} is not below {}, where cgroups have device rules", at.join(" or ")),
        }));
    };
    match found.below.trim_matches('/').is_empty() {
        true => Err(refused(format!("{shown} is the whole cgroup tree, not one cgroup in it"))),
        false => Ok(found),
    }
}

/// The text of an absolute path without `..`.
fn plain(path: &Path) -> Option<&str> {
    let named = |part: Component| matches!(part, Component::RootDir | Component::Normal(_));
    path.to_str().filter(|_| path.is_absolute() && path.components().all(named))
}

fn first(path: &Path) -> Option<Component<'_>> {
    path.components().nth(1)
}

fn mountinfo() -> Result<String, ContainerError> {
    read("/proc/self/mountinfo")
}

fn read(path: &str) -> Result<String, ContainerError> {
    fs::read_to_string(path).map_err(failed(format!("read {path}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    use crate::{handover, host};

    const V1: &str = "31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755\n\
                      35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n\
                      36 31 0:33 / /sys/fs/cgroup/devices rw,relatime shared:9 - cgroup cgroup rw,devices\n\
                      41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n";
    const PART: &str = "41 31 0:38 /pod /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n";

    /// Path and directory.
    fn found(mounts: &str, name: &str) -> Result<(String, PathBuf), String> {
        named(mounts, Path::new(name)).map(|place| (place.path(), place.dir())).map_err(|error| error.to_string())
    }

    #[test]
    fn a_cgroup_is_named_by_its_directory_or_by_its_path_in_the_hierarchy() {
        let there = Ok(("/slurm/job_15".into(), "/sys/fs/cgroup/devices/slurm/job_15".into()));
        for name in ["/slurm/job_15", "/slurm/job_15/", "/sys/fs/cgroup/devices/slurm/job_15"] {
            assert_eq!(found(V1, name), there, "{name}");
        }
        let there = Ok(("/pod/a/b".into(), "/sys/fs/cgroup/a/b".into()));
        for name in ["/pod/a/b", "/sys/fs/cgroup/a/b", "//pod/a/./b"] {
            assert_eq!(found(PART, name), there, "{name}");
        }
    }

    #[test]
    fn the_cgroup_of_a_job_may_be_named_by_the_end_of_its_path_too() {
        let path = |mounts: &str, name: &str| path_of_named(mounts, Path::new(name)).map_err(|error| error.to_string());
        for name in ["/pbs/job_15", "/pbs/job_15/", "/sys/fs/cgroup/devices/pbs/job_15"] {
            assert_eq!(path(V1, name), Ok("/pbs/job_15".into()), "{name}");
        }
        assert_eq!(path(PART, "/job_15"), Ok("/job_15".into()), "the end of /pod/…/job_15");
        assert_eq!(path("", "/job_15"), Ok("/job_15".into()));
        for name in ["", "/", "//", "job_15", "/a/../b", "/sys/fs/cgroup/memory/job_15", "/sys/fs/cgroup/devices"] {
            assert!(path(V1, name).is_err(), "{name:?}");
        }
    }

    #[test]
    fn what_is_no_cgroup_with_device_rules_is_refused() {
        for name in ["slurm", "", "/a/../b", "/sys/fs/cgroup/devices/../memory/a"] {
            assert!(found(V1, name).unwrap_err().contains("must begin with /"), "{name}");
        }
        for name in ["/sys/fs/cgroup/memory/a", "/sys/fs/cgroup/a", "/sys", "/sys/fs/cgroup/unified/a"] {
            assert!(found(V1, name).unwrap_err().contains("is not below /sys/fs/cgroup/devices"), "{name}");
        }
        for name in ["/", "/sys/fs/cgroup/devices", "/sys/fs/cgroup/devices/"] {
            assert!(found(V1, name).unwrap_err().contains("the whole cgroup tree"), "{name}");
        }
        assert!(found(PART, "/podium/a").unwrap_err().contains("is not below /sys/fs/cgroup"));
        assert!(found("", "/a").unwrap_err().contains("no cgroup tree"));
    }

    /// Gone after the test, whatever its end.
    struct Made(Own);

    impl std::ops::Deref for Made {
        type Target = Own;
        fn deref(&self) -> &Own {
            &self.0
        }
    }

    impl Drop for Made {
        fn drop(&mut self) {
            let _ = self.0.remove();
        }
    }

    /// `None`, and noted, where we may make no cgroup.
    fn own(name: &str) -> Option<Made> {
        let token = format!("test-{name}-{}", std::process::id());
        Own::make(&token, |_| Ok::<(), ContainerError>(()))
            .map(Made)
            .inspect_err(|error| eprintln!("SKIP: no cgroup can be made here: {error}"))
            .ok()
    }

    #[test]
    fn a_child_lives_in_it_and_it_goes_when_empty() {
        let Some(own) = own("child") else { return };
        let mut sleep = Command::new("/bin/sleep");
        let mut child = handover::in_cgroup(sleep.arg("60"), own.procs().unwrap()).spawn().unwrap();
        assert_eq!(host::processes_in(&own.path()), [child.id()]);
        assert!(!own.remove().unwrap() && !remove(&own.path()).unwrap(), "a process is in it");
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(own.remove().unwrap() && !own.dir().exists());
        assert!(own.remove().unwrap() && remove(&own.path()).unwrap(), "one that has gone is no error");
    }

    #[test]
    fn what_is_left_of_a_job_goes_with_its_steps_unless_a_process_is_in_one() {
        let Some(own) = own("job") else { return };
        let job = format!("{}/uid_1/job_2", own.path());
        let step = Own::at(Path::new(&format!("{job}/step_0/task_0"))).unwrap();
        let mut sleep = Command::new("/bin/sleep");
        let mut child = handover::in_cgroup(sleep.arg("60"), step.procs().unwrap()).spawn().unwrap();
        remove_job(&job);
        assert!(step.dir().exists(), "a process is in it");
        child.kill().unwrap();
        child.wait().unwrap();
        remove_job(&job);
        assert!(!own.dir().join("uid_1").exists() && own.dir().exists());
        remove_job(&job);
        assert!(own.remove().unwrap());
    }

    #[test]
    fn one_that_was_left_behind_goes_by_its_path_unless_it_is_somebody_elses() {
        let Some(own) = own("left") else { return };
        let theirs = Own::at(Path::new(&format!("{}/theirs/inner", own.path()))).unwrap();
        assert!(theirs.dir().join("cgroup.procs").exists());
        let error = remove(&theirs.path()).unwrap_err().to_string();
        assert!(error.contains("is left to whoever made it"), "{error}");
        let mut sleep = Command::new("/bin/sleep");
        let theirs = Own::at(&theirs.dir()).expect("made already, and named by its directory");
        let mut child = handover::in_cgroup(sleep.arg("60"), theirs.procs().unwrap()).spawn().unwrap();
        assert!(!remove(&own.path()).unwrap() && theirs.dir().exists(), "a process is further below");
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(remove(&own.path()).unwrap() && !own.dir().exists(), "with what was made in it");
    }

    #[test]
    fn a_file_of_the_kernel_is_no_cgroup() {
        let Some(own) = own("file") else { return };
        let error = Own::at(&own.dir().join("cgroup.procs/x")).unwrap_err().to_string();
        assert!(error.contains("cgroup.procs is a link or a file"), "{error}");
    }
}
