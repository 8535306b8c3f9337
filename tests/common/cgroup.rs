//! Cgroups of a test's own, as an engine or a batch system makes them.

use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::atomic::{AtomicU32, Ordering};

use mig_hook::container::Own;
use mig_hook::handover;

use super::skip;

/// Where cgroup v1 has device rules.
pub const V1: &str = "/sys/fs/cgroup/devices";

/// A cgroup below the one in which this process is. Removed with the value.
pub struct Cgroup(Own);

impl Cgroup {
    /// `None`, and noted, where none can be made.
    pub fn new(what: &str) -> Option<Cgroup> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        // Its end alone names it in one test: nothing else on this machine may be called so.
        let us = std::process::id();
        let name = format!("batch_{us}/job_{us}.{}", NUMBER.fetch_add(1, Ordering::Relaxed));
        let made = Own::at(&own_cgroup().join(name));
        made.inspect_err(|error| skip(what, &format!("no cgroup can be made here: {error}"))).ok().map(Cgroup)
    }

    /// One at this directory, made if need be.
    pub fn at(dir: &Path) -> Cgroup {
        Cgroup(Own::at(dir).unwrap())
    }

    /// As /proc/PID/cgroup has it.
    pub fn path(&self) -> String {
        self.0.path()
    }

    pub fn dir(&self) -> PathBuf {
        self.0.dir()
    }

    pub fn start(&self, command: &mut Command) -> Child {
        handover::in_cgroup(command, self.0.procs().unwrap()).spawn().unwrap()
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let _ = self.0.remove();
        let _ = std::fs::remove_dir(self.0.dir().parent().unwrap());
    }
}

/// The directory of the cgroup in which this process is, as far as device rules go.
pub fn own_cgroup() -> PathBuf {
    let text = std::fs::read_to_string("/proc/self/cgroup").unwrap();
    let path = |wanted: fn(&str) -> bool| {
        let mut lines = text.lines().map(|line| line.splitn(3, ':').collect::<Vec<_>>());
        lines.find(|f| wanted(f[1])).map(|f| f[2].trim_start_matches('/').to_owned())
    };
    match Path::new(V1).is_dir() {
        true => Path::new(V1).join(path(|name| name == "devices").unwrap()),
        false => Path::new("/sys/fs/cgroup").join(path(str::is_empty).unwrap()),
    }
}
