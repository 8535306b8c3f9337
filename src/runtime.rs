//! The low-level runtime as a child process: for `delete` of a leased container, for orphans, and for what root is asked to
//! do with a container of a user's.

use std::ffi::OsString;
use std::io;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use crate::handover::{self, Sigpipe};

mod state;

pub use state::{State, look};

/// Runs the runtime with our own stdio, the given environment and the SIGPIPE that we inherited, does something `meanwhile`,
/// and waits. The exit code, or 128 + signal.
pub fn run(
    runtime: &Path,
    args: &[OsString],
    env: &[OsString],
    pipe: Sigpipe,
    meanwhile: impl FnOnce(),
) -> io::Result<i32> {
    let mut child = pipe.in_child(&mut command(runtime, args, env)).spawn()?;
    meanwhile();
    Ok(code_of(child.wait()?))
}

/// Waits for a child at most so long, then kills it. The exit code, or 128 + signal; `None`: it was not over by then.
pub fn end_within(limit: Duration, child: &mut Child) -> io::Result<Option<i32>> {
    let until = Instant::now() + limit;
    let mut pause = Duration::from_millis(1);
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(code_of(status)));
        }
        if Instant::now() >= until {
            child.kill()?;
            child.wait()?;
            return Ok(None);
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(16));
    }
}

fn code_of(status: ExitStatus) -> i32 {
    status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}

/// `status` of a container as `RUNTIME --root ROOT state ID` tells it; `None` where it knows no such container.
pub fn status(runtime: &Path, root: Option<&Path>, id: &str) -> Option<String> {
    let mut args = root_args(root);
    args.extend(["state".into(), id.into()]);
    let output = command(runtime, &args, &[]).stdin(Stdio::null()).stderr(Stdio::null()).output().ok()?;
    let state: serde_json::Value = serde_json::from_slice(&output.stdout).ok()?;
    Some(state.get("status")?.as_str()?.to_owned())
}

/// `RUNTIME --root ROOT delete --force ID`. True when it ended with 0.
///
/// With SIGPIPE ignored, as engines have it: where the bundle is gone, crun 1.8.1 was seen to die of it when the container
/// was killed and its state not yet removed.
pub fn delete_force(runtime: &Path, root: Option<&Path>, id: &str) -> bool {
    let mut args = root_args(root);
    args.extend(["delete".into(), "--force".into(), id.into()]);
    let mut command = command(runtime, &args, &[]);
    Sigpipe::ignored()
        .in_child(&mut command)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .status()
        .is_ok_and(|s| s.success())
}

fn root_args(root: Option<&Path>) -> Vec<OsString> {
    root.map_or_else(Vec::new, |root| vec!["--root".into(), root.into()])
}

/// The runtime with these arguments and no other environment.
pub fn command(runtime: &Path, args: &[OsString], env: &[OsString]) -> Command {
    use std::os::unix::ffi::OsStrExt;
    let pairs = env.iter().filter_map(|whole| {
        let at = whole.as_bytes().iter().position(|b| *b == b'=')?;
        let (key, value) = (&whole.as_bytes()[..at], &whole.as_bytes()[at + 1..]);
        Some((std::ffi::OsStr::from_bytes(key), std::ffi::OsStr::from_bytes(value)))
    });
    // Descriptors are close-on-exec already: the shim marks them before it starts anything.
    handover::close_on_exec_except(0..0);
    let mut command = Command::new(runtime);
    command.arg0(runtime).args(args).env_clear().envs(pairs);
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_exit_code_is_the_runtimes() {
        let sh = |script: &str| {
            let (args, env) = (["-c".into(), script.into()], ["A=b".into()]);
            run(Path::new("/bin/sh"), &args, &env, Sigpipe::ignore(), || ()).unwrap()
        };
        assert_eq!(sh("exit 7"), 7);
        assert_eq!(sh("kill -9 $$"), 128 + 9);
        assert_eq!(sh("test \"$A\" = b && test -z \"$HOME\""), 0);
    }

    #[test]
    fn a_forced_delete_outlives_a_hook_that_reads_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let script = dir.path().join("runtime");
        std::fs::write(&script, "#!/bin/sh\ngrep -q '^SigIgn:.*[13579bdf]...$' /proc/self/status\n").unwrap();
        std::fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        assert!(delete_force(&script, None, "c1"), "SIGPIPE (13) is ignored");
    }

    #[test]
    fn one_that_does_not_end_is_killed() {
        let start = |script: &str| command(Path::new("/bin/sh"), &["-c".into(), script.into()], &[]).spawn().unwrap();
        assert_eq!(end_within(Duration::from_secs(60), &mut start("exit 7")).unwrap(), Some(7));
        let mut sleeping = start("trap '' TERM; while :; do :; done");
        assert_eq!(end_within(Duration::from_millis(50), &mut sleeping).unwrap(), None);
        assert_eq!(sleeping.try_wait().unwrap().map(code_of), Some(128 + 9));
    }

    #[test]
    fn a_runtime_that_is_missing_knows_no_container() {
        assert_eq!(status(Path::new("/nonexistent/runc"), None, "c1"), None);
        assert!(!delete_force(Path::new("/nonexistent/runc"), None, "c1"));
    }
}
