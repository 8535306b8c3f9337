//! Where a process can be killed: at each call of the driver, and at each system call that may change something. One recorded
//! run tells which these are, so that a call that is new in the code is among them.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use crate::common::{World, binaries, skip};

/// Every call that changes a GPU: what it has done may be durable when its caller dies.
pub const MUTATORS: [&str; 5] = [
    "nvmlDeviceCreateGpuInstance",
    "nvmlDeviceCreateGpuInstanceWithPlacement",
    "nvmlGpuInstanceCreateComputeInstance",
    "nvmlComputeInstanceDestroy",
    "nvmlGpuInstanceDestroy",
];

/// System calls that change nothing outside of the process that makes them. Every other one counts.
const HARMLESS: [&str; 87] = [
    "access",
    "arch_prctl",
    "brk",
    "capget",
    "chdir",
    "clock_getres",
    "clock_gettime",
    "clock_nanosleep",
    "close",
    "close_range",
    "connect",
    "dup",
    "dup2",
    "dup3",
    "epoll_create1",
    "epoll_ctl",
    "epoll_wait",
    "eventfd2",
    "faccessat",
    "faccessat2",
    "fchdir",
    "fcntl",
    "fstat",
    "fstatfs",
    "futex",
    "getcwd",
    "getdents64",
    "getegid",
    "geteuid",
    "getgid",
    "getgroups",
    "getpeername",
    "getpgid",
    "getpid",
    "getppid",
    "getpriority",
    "getrandom",
    "getresgid",
    "getresuid",
    "getrlimit",
    "getsid",
    "getsockname",
    "getsockopt",
    "gettid",
    "gettimeofday",
    "getuid",
    "lseek",
    "lstat",
    "madvise",
    "membarrier",
    "mmap",
    "mprotect",
    "mremap",
    "munmap",
    "nanosleep",
    "newfstatat",
    "pidfd_open",
    "pipe",
    "pipe2",
    "poll",
    "ppoll",
    "prctl",
    "pread64",
    "prlimit64",
    "pselect6",
    "read",
    "readlink",
    "readlinkat",
    "readv",
    "restart_syscall",
    "rseq",
    "rt_sigaction",
    "rt_sigprocmask",
    "rt_sigreturn",
    "sched_getaffinity",
    "sched_yield",
    "set_robust_list",
    "set_tid_address",
    "sigaltstack",
    "signalfd4",
    "socket",
    "stat",
    "statfs",
    "statx",
    "umask",
    "uname",
    "wait4",
];

/// Flags of an open that makes or empties something; every other one only looks.
const OPENED_TO_CHANGE: [&str; 2] = ["O_CREAT", "O_TRUNC"];

/// One place to kill a process at.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Point {
    /// Before the n-th system call of that name, as strace counts them: for each process by itself.
    System(String, usize),
    /// Before the n-th call of any function of the driver.
    Before(usize),
    /// When that call has done its work, the n-th of its kind.
    After(&'static str, usize),
}

impl std::fmt::Display for Point {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Point::System(call, nth) => write!(f, "at {call} {nth}"),
            Point::Before(nth) => write!(f, "at call {nth} of the driver"),
            Point::After(call, nth) => write!(f, "past {call} {nth}"),
        }
    }
}

/// A system call that a program of ours made, and changed something or meant to.
pub struct Change {
    pub point: Point,
    /// As strace shows it, descriptors by their paths.
    pub line: String,
}

/// Whether processes can be killed and failed at their system calls here.
pub fn has_strace(what: &str) -> bool {
    let works = Command::new("strace").args(["-f", "-qqq", "-o", "/dev/null", "/bin/true"]).output();
    let works = works.is_ok_and(|output| output.status.success());
    if !works {
        skip(what, "strace is not installed, or may not trace here");
    }
    works
}

/// strace's words that come before a program, to have all its changing calls recorded in files `record.PID`.
pub fn recorder(record: &Path) -> Vec<OsString> {
    let calls: Vec<String> = HARMLESS.iter().map(|call| format!("?{call}")).collect();
    let mut words: Vec<OsString> =
        vec!["strace".into(), "-ff".into(), "-y".into(), "-s".into(), "200".into(), "-qqq".into()];
    words.extend(["-o".into(), record.into(), "-e".into(), format!("trace=!{}", calls.join(",")).into()]);
    words
}

/// The same to have something happen at one system call, as `signal=SIGKILL` or `error=EIO`.
pub fn injector(call: &str, nth: usize, what: &str) -> Vec<OsString> {
    let trace = format!("trace={call}");
    let inject = format!("inject={call}:{what}:when={nth}");
    ["strace", "-f", "-qqq", "-o", "/dev/null", "-e", &trace, "-e", &inject].map(Into::into).into()
}

/// What was recorded: the changing calls of programs of ours, less those by which the simulator keeps its machine, which a
/// real driver does in the kernel.
pub fn changes(world: &World, record: &Path) -> Vec<Change> {
    let prefix = format!("{}.", record.file_name().unwrap().to_str().unwrap());
    let files = std::fs::read_dir(record.parent().unwrap()).unwrap().map(|entry| entry.unwrap().path());
    let traced: Vec<(String, String)> = files
        .filter_map(|path| Some((path.file_name()?.to_str()?.strip_prefix(&prefix)?.to_owned(), path)))
        .map(|(pid, path)| (pid, taken(&path)))
        .collect();
    let children: BTreeSet<&str> = traced.iter().flat_map(|(_, text)| text.lines()).filter_map(child).collect();
    let machine = [world.path("m/usr"), world.path("m/proc")].map(|path| path.display().to_string());
    let ours = format!("execve(\"{}/", binaries().display());
    let mut changes: Vec<Change> = Vec::new();
    for (pid, text) in &traced {
        // What one has started is a copy of it until it has become something else.
        let first = !children.contains(pid.as_str());
        let mut of_us = true;
        let mut counts = std::collections::BTreeMap::new();
        for (at, line) in text.lines().enumerate() {
            let Some((call, _)) = line.split_once('(').filter(|(call, _)| !call.contains(' ')) else { continue };
            if call == "execve" && line.ends_with("= 0") {
                let become_ours = line.starts_with(&ours);
                // strace does not count the one by which it begins.
                if first && at == 0 {
                    assert!(become_ours, "{line}");
                    continue;
                }
                *counts.entry(call).or_insert(0) += 1;
                if of_us {
                    changes.push(Change { point: Point::System(call.into(), counts[call]), line: line.into() });
                }
                of_us = become_ours;
                continue;
            }
            *counts.entry(call).or_insert(0) += 1;
            let looks = call.starts_with("open") && !OPENED_TO_CHANGE.iter().any(|flag| line.contains(flag));
            if of_us && !looks && !machine.iter().any(|dir| line.contains(dir.as_str())) {
                changes.push(Change { point: Point::System(call.into(), counts[call]), line: line.into() });
            }
        }
    }
    changes.sort_by(|a, b| a.point.cmp(&b.point));
    changes.dedup_by(|a, b| a.point == b.point);
    changes
}

fn taken(path: &PathBuf) -> String {
    let text = std::fs::read(path).unwrap();
    std::fs::remove_file(path).unwrap();
    String::from_utf8_lossy(&text).into_owned()
}

/// The process that a line says was started.
fn child(line: &str) -> Option<&str> {
    let starts = ["clone(", "clone3(", "fork(", "vfork("].iter().any(|call| line.starts_with(call));
    starts.then(|| line.rsplit_once("= ").map(|(_, pid)| pid.trim()))?
}

/// Every call of the driver that was counted: before each, and after those that change a GPU.
pub fn driver_calls(world: &World) -> Vec<Point> {
    let counts: Value = serde_json::from_str(&world.sim("counts", &["--json"])).unwrap();
    let counts = counts.as_object().unwrap();
    let count = |value: &Value| usize::try_from(value.as_u64().unwrap()).unwrap();
    let before = (1..=counts.values().map(count).sum()).map(Point::Before);
    let after = |call: &'static str| (1..=counts.get(call).map_or(0, count)).map(move |nth| Point::After(call, nth));
    before.chain(MUTATORS.into_iter().flat_map(after)).collect()
}
