//! Programs of the host that watch GPUs, and so keep slices open that nobody has.

use std::fs::{self, Metadata};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Uids from here on are people's (login.defs(5), SYS_UID_MAX).
const FIRST_USER: u32 = 1000;

/// Whether a process runs one of these programs as the host has it: that very file, under our root directory, in our pid and user
/// namespaces, as root or a system account. By its name, or from an image, anybody could.
pub fn is_agent(pid: u32, programs: &[PathBuf]) -> bool {
    let process = Path::new("/proc").join(pid.to_string());
    let us = Path::new("/proc/self");
    let is_same = |a: &Path, b: &Path| file(a).is_some_and(|a| file(b) == Some(a));
    let shares = |name: &str| is_same(&process.join(name), &us.join(name));
    let is_system = |meta: Metadata| meta.uid() < FIRST_USER;
    programs.iter().any(|program| is_same(&process.join("exe"), program))
        && ["root", "ns/pid", "ns/user"].into_iter().all(shares)
        && fs::metadata(&process).is_ok_and(is_system)
}

/// What tells a file from all others.
fn file(path: &Path) -> Option<(u64, u64)> {
    fs::metadata(path).ok().map(|meta| (meta.dev(), meta.ino()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::CommandExt;
    use std::process::Command;

    /// Whether a process is taken for the agent `nv-hostengine`, a program in `dir`.
    fn counts(dir: &Path, command: &mut Command) -> bool {
        let mut child = command.arg("60").spawn().unwrap();
        let counts = is_agent(child.id(), &["/no/such/program".into(), dir.join("nv-hostengine")]);
        child.kill().unwrap();
        child.wait().unwrap();
        counts
    }

    #[test]
    fn an_agent_is_the_hosts_program_run_by_the_host() {
        let dir = tempfile::tempdir().unwrap();
        let (program, other) = (dir.path().join("nv-hostengine"), dir.path().join("other"));
        fs::copy("/bin/sleep", &program).unwrap();
        fs::copy("/bin/sleep", &other).unwrap();
        let user = Metadata::uid(&fs::metadata(&program).unwrap());
        assert_eq!(counts(dir.path(), &mut Command::new(&program)), user < FIRST_USER);
        assert!(!counts(dir.path(), &mut Command::new(&other)), "another program");
        assert!(!counts(dir.path(), Command::new(&other).arg0(&program)), "one that only calls itself so");
        assert!(!is_agent(u32::MAX, std::slice::from_ref(&program)), "no process");
        if user == 0 {
            let opened = std::os::unix::fs::PermissionsExt::from_mode(0o755);
            fs::set_permissions(dir.path(), opened).unwrap();
            assert!(counts(dir.path(), Command::new(&program).uid(999)), "a system account");
            assert!(!counts(dir.path(), Command::new(&program).uid(1000)), "a user, who can have it do what he likes");
        }
    }
}
