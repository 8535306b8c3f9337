//! What a process inherits and what it hands on: signals, descriptors, environment, and the `execve` itself.
//!
//! The shim must be invisible to the runtime that it becomes. Rust's start-up sets SIGPIPE to "ignored" before `main`, and
//! `std::process::Command` sets it to "default" before exec: either way what the engine had chosen is lost (podman
//! ignores it). So our binaries take C's `main` through [`entry!`](crate::entry), and exec directly.

#![allow(unsafe_code)]

use std::ffi::{CString, OsStr, OsString};
use std::fs::File;
use std::io::{self, Seek, Write};
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

/// Defines C's `main` as a call of `$run(Vec<OsString>) -> i32`, without the signal changes of Rust's own start-up.
#[macro_export]
macro_rules! entry {
    ($run:path) => {
        /// The process entry; glibc has already kept argv for `std::env::args_os`.
        #[allow(unsafe_code)]
        #[unsafe(no_mangle)]
        pub extern "C" fn main(_argc: i32, _argv: *const *const u8) -> i32 {
            $crate::handover::claim_stdio();
            $run(std::env::args_os().collect())
        }
    };
}

/// Puts /dev/null in the place of a standard descriptor that was closed at start, as Rust's own start-up does: else the
/// next file that we open would be it, a lease or the driver. Close-on-exec, so that the next program finds it closed.
pub fn claim_stdio() {
    for fd in 0..=2 {
        // SAFETY: F_GETFD only asks; a closed descriptor gives EBADF.
        let open = unsafe { libc::fcntl(fd, libc::F_GETFD) } != -1;
        if !open {
            // SAFETY: a constant path; the lowest free descriptor is `fd`, since those below it are open by now.
            unsafe { libc::open(c"/dev/null".as_ptr(), libc::O_RDWR | libc::O_CLOEXEC) };
        }
    }
}

/// SIGPIPE as it was inherited, to be put back before the process becomes another program.
#[derive(Debug, Clone, Copy)]
pub struct Sigpipe(libc::sighandler_t);

impl Sigpipe {
    /// For a child that shall ignore it.
    pub fn ignored() -> Sigpipe {
        Sigpipe(libc::SIG_IGN)
    }

    /// Ignores SIGPIPE, so that a closed stderr can't kill us half-way, and remembers what it was.
    pub fn ignore() -> Sigpipe {
        // SAFETY: SIG_IGN installs no handler code; signal(2) has no memory effects.
        Sigpipe(unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) })
    }

    /// Puts the inherited disposition back.
    pub fn restore(self) {
        // SAFETY: the value came from signal(2) for the same signal in this process.
        unsafe { libc::signal(libc::SIGPIPE, self.0) };
    }

    /// Lets a child inherit it: `Command` itself sets SIGPIPE to the default.
    pub fn in_child(self, command: &mut Command) -> &mut Command {
        let restore = move || {
            self.restore();
            Ok(())
        };
        // SAFETY: between fork and exec only signal(2) is called, which is async-signal-safe.
        unsafe { command.pre_exec(restore) }
    }
}

/// The signals that a thread holds back. A child inherits them: whoever reads signals instead of obeying them gives it those
/// that it began with itself.
#[derive(Clone, Copy)]
pub struct SignalMask(libc::sigset_t);

impl SignalMask {
    /// Of this thread, now.
    pub fn now() -> SignalMask {
        // SAFETY: an all-zero sigset_t is a valid object for sigprocmask to fill in.
        let mut mask: libc::sigset_t = unsafe { std::mem::zeroed() };
        // SAFETY: without a new mask nothing is changed; `mask` is a live sigset_t.
        unsafe { libc::sigprocmask(libc::SIG_BLOCK, std::ptr::null(), &mut mask) };
        SignalMask(mask)
    }

    /// Gives it to a child.
    pub fn in_child(self, command: &mut Command) -> &mut Command {
        let set = move || {
            // SAFETY: the mask is initialised; the old one is not asked for.
            unsafe { libc::sigprocmask(libc::SIG_SETMASK, &self.0, std::ptr::null_mut()) };
            Ok(())
        };
        // SAFETY: between fork and exec only sigprocmask(2) is called, which is async-signal-safe.
        unsafe { command.pre_exec(set) }
    }
}

impl std::fmt::Debug for SignalMask {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SignalMask")
    }
}

/// Whether whoever started us has a signal ignored, as nohup(1) does with SIGHUP, and a shell without job control with the
/// SIGINT of what it starts in the background. One that is held back comes all the same.
pub fn is_ignored(signal: i32) -> bool {
    // SAFETY: an all-zero sigaction is a valid object for sigaction to fill in.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: without a new action nothing is changed; `action` is a live object.
    let asked = unsafe { libc::sigaction(signal, std::ptr::null(), &mut action) };
    asked == 0 && action.sa_sigaction == libc::SIG_IGN
}

/// Makes a child enter a cgroup before it becomes its program, and so all that it starts. `procs`: that cgroup's `cgroup.procs`,
/// open for writing; the kernel asks whether who opened it may do this, whoever the child is by then.
pub fn in_cgroup(command: &mut Command, procs: File) -> &mut Command {
    // To write 0 is to name oneself (cgroups(7)).
    let join = move || match (&procs).write(b"0")? {
        1 => Ok(()),
        _ => Err(io::ErrorKind::WriteZero.into()),
    };
    // SAFETY: between fork and exec only write(2) is called, which is async-signal-safe; no error here allocates.
    unsafe { command.pre_exec(join) }
}

/// Has the kernel kill a child as soon as the thread that started it ends, in whatever way. It is lost again when the child's
/// program is set-user-id or has capabilities of its own (PR_SET_PDEATHSIG(2const)).
pub fn dies_with_us(command: &mut Command) -> &mut Command {
    dies_with(std::process::id(), command)
}

fn dies_with(parent: u32, command: &mut Command) -> &mut Command {
    let ask = move || {
        // SAFETY: prctl(2) with this option takes a signal number and touches no memory.
        if unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) } != 0 {
            return Err(io::Error::last_os_error());
        }
        // Ended before it was asked: nobody will tell us any more.
        match std::os::unix::process::parent_id() == parent {
            true => Ok(()),
            false => Err(io::Error::from_raw_os_error(libc::ESRCH)),
        }
    };
    // SAFETY: between fork and exec only prctl(2) and getppid(2) are called, and no error here allocates.
    unsafe { command.pre_exec(ask) }
}

/// Has children stay until they are asked for, and SIGCHLD come: whoever started us may have chosen to ignore them.
pub fn notice_children() {
    // SAFETY: SIG_DFL installs no handler code; signal(2) has no memory effects.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_DFL) };
}

/// Unblocks every signal: crun runs hooks with all of them blocked.
pub fn unblock_signals() {
    // SAFETY: an all-zero sigset_t is a valid object for sigemptyset to initialise.
    let mut none: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: `none` is a live sigset_t.
    unsafe { libc::sigemptyset(&mut none) };
    // SAFETY: `none` is initialised; the old mask is not asked for.
    unsafe { libc::sigprocmask(libc::SIG_SETMASK, &none, std::ptr::null_mut()) };
}

/// Marks every descriptor from 3 on close-on-exec, except `keep`: a descriptor that leaks into a container's runtime is
/// a way out of the container (CVE-2024-21626).
pub fn close_on_exec_except(keep: std::ops::Range<RawFd>) {
    let gaps = if keep.is_empty() { [(3, RawFd::MAX), (1, 0)] } else { [(3, keep.start - 1), (keep.end, RawFd::MAX)] };
    for (first, last) in gaps.into_iter().filter(|(first, last)| first <= last) {
        // SAFETY: close_range only sets a flag on descriptors; CLOSE_RANGE_CLOEXEC closes none.
        let rc = unsafe { libc::syscall(libc::SYS_close_range, first, last, libc::CLOSE_RANGE_CLOEXEC) };
        if rc != 0 {
            return close_on_exec_one_by_one(&keep); // Linux before 5.11
        }
    }
}

fn close_on_exec_one_by_one(keep: &std::ops::Range<RawFd>) {
    let Ok(entries) = std::fs::read_dir("/proc/self/fd") else { return };
    let open = entries.flatten().filter_map(|e| e.file_name().to_str()?.parse::<RawFd>().ok());
    for fd in open.filter(|fd| *fd > 2 && !keep.contains(fd)) {
        // SAFETY: F_SETFD on a descriptor of this process; one closed meanwhile gives EBADF.
        unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) };
    }
}

/// Makes `bytes` the standard input of the next program: those that we have read from ours.
pub fn give_stdin(bytes: &[u8]) -> io::Result<()> {
    // SAFETY: memfd_create takes a name and flags and returns a new descriptor or -1.
    let mut file = own(unsafe { libc::syscall(libc::SYS_memfd_create, c"state".as_ptr(), libc::MFD_CLOEXEC) })?;
    file.write_all(bytes)?;
    file.rewind()?;
    // SAFETY: both are descriptors of this process; the copy outlives `file`.
    match unsafe { libc::dup2(file.as_raw_fd(), 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Becomes `program`. Returns only on failure. `env` holds whole `KEY=VALUE` strings.
pub fn exec(program: &Path, argv: &[OsString], env: &[OsString]) -> io::Error {
    let c = |s: &OsStr| CString::new(s.as_bytes()).map_err(io::Error::from);
    let prepared = || -> io::Result<_> {
        let all = |list: &[OsString]| list.iter().map(|s| c(s)).collect::<io::Result<Vec<_>>>();
        Ok((c(program.as_os_str())?, all(argv)?, all(env)?))
    };
    let (path, argv, env) = match prepared() {
        Ok(strings) => strings,
        Err(error) => return error,
    };
    let pointers =
        |list: &[CString]| list.iter().map(|s| s.as_ptr()).chain(std::iter::once(std::ptr::null())).collect::<Vec<_>>();
    let (argv_ptrs, env_ptrs) = (pointers(&argv), pointers(&env));
    // SAFETY: both arrays are null-terminated and point into strings that live until exec has replaced us or failed.
    unsafe { libc::execve(path.as_ptr(), argv_ptrs.as_ptr(), env_ptrs.as_ptr()) };
    io::Error::last_os_error()
}

/// Our environment as whole strings, in order, whatever their encoding.
pub fn environment() -> Vec<OsString> {
    std::env::vars_os()
        .map(|(key, value)| {
            let mut whole = key.into_vec();
            whole.push(b'=');
            whole.extend_from_slice(value.as_bytes());
            OsString::from_vec(whole)
        })
        .collect()
}

/// Hides an environment from the dynamic loader of the next program: `LD_PRELOAD=x` becomes `0=LD_PRELOAD=x`, which
/// neither ld.so nor libc nor Rust looks at. [`unwrap_environment`] gives it back for the low-level runtime.
pub fn wrap_environment(env: &[OsString]) -> Vec<OsString> {
    let wrap = |(n, whole): (usize, &OsString)| {
        let mut wrapped = OsString::from(format!("{n}="));
        wrapped.push(whole);
        wrapped
    };
    env.iter().enumerate().map(wrap).collect()
}

/// The environment that [`wrap_environment`] hid, in its first order.
pub fn unwrap_environment() -> Vec<OsString> {
    let mut numbered: Vec<(usize, OsString)> =
        std::env::vars_os().filter_map(|(key, whole)| Some((key.to_str()?.parse().ok()?, whole))).collect();
    numbered.sort_by_key(|(n, _)| *n);
    numbered.into_iter().map(|(_, whole)| whole).collect()
}

/// A process as a descriptor, which becomes readable when it ends (pidfd_open(2), Linux 5.3).
pub fn process(pid: u32) -> io::Result<File> {
    // SAFETY: pidfd_open takes two integers and returns a new descriptor or -1.
    own(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })
}

/// A copy of descriptor 2 of another process of ours (pidfd_getfd(2), Linux 5.6; needs ptrace rights on it).
pub fn stderr_of(pid: u32) -> io::Result<File> {
    let pidfd = process(pid)?;
    // SAFETY: pidfd_getfd takes three integers and returns a new descriptor or -1.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), 2, 0) };
    own(fd)
}

fn own(fd: libc::c_long) -> io::Result<File> {
    match RawFd::try_from(fd) {
        // SAFETY: the kernel has just returned this descriptor to us; nobody else owns it.
        Ok(fd) if fd >= 0 => Ok(unsafe { File::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrapped_environment_has_no_name_that_a_loader_reads() {
        let env: Vec<OsString> = vec!["LD_PRELOAD=/evil.so".into(), "GLIBC_TUNABLES=a=b".into()];
        assert_eq!(wrap_environment(&env), vec!["0=LD_PRELOAD=/evil.so", "1=GLIBC_TUNABLES=a=b"]);
    }

    #[test]
    fn a_child_dies_with_the_thread_that_started_it() {
        use std::os::unix::process::ExitStatusExt;
        let start = || dies_with_us(Command::new("/bin/sleep").arg("60")).spawn().unwrap();
        let mut child = std::thread::spawn(start).join().unwrap();
        assert_eq!(child.wait().unwrap().signal(), Some(libc::SIGKILL));
    }

    #[test]
    fn a_child_whose_parent_is_another_by_then_does_not_start() {
        let error = dies_with(std::process::id() + 1, &mut Command::new("/bin/true")).spawn().unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ESRCH));
    }

    #[test]
    fn a_child_writes_itself_into_the_file_of_a_cgroup() {
        let mut procs = tempfile::tempfile().unwrap();
        let status = in_cgroup(&mut Command::new("/bin/true"), procs.try_clone().unwrap()).status().unwrap();
        procs.rewind().unwrap();
        assert_eq!((status.success(), io::read_to_string(procs).unwrap().as_str()), (true, "0"));
        let full = File::options().write(true).open("/dev/full").unwrap();
        let error = in_cgroup(&mut Command::new("/bin/true"), full).spawn().unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENOSPC), "one that may not enter does not start");
    }

    #[test]
    fn exec_of_a_missing_program_returns_the_reason() {
        let error = exec(Path::new("/nonexistent/runc"), &["runc".into()], &[]);
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn a_nul_in_an_argument_is_refused_not_cut() {
        let error = exec(Path::new("/bin/true"), &["a\0b".into()], &[]);
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    }
}
