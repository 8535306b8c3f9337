//! Other programs' versions: asked with a clean environment, a time limit and a limit to what they may say.

use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use crate::handover;

/// How long a program may take to tell its version.
const LIMIT: Duration = Duration::from_secs(2);
/// How much of what it says is read, in bytes.
const LENGTH: u64 = 64 << 10;

/// What a program prints. The reason, in words, where it can't be told.
pub(super) fn ask(program: &Path, args: &[&str]) -> Result<String, String> {
    refuse_if_writable_by_others(program)?;
    handover::close_on_exec_except(0..0);
    let mut command = Command::new(program);
    command.args(args).env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
    let spawned = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn();
    let mut child = spawned.map_err(|error| format!("could not be run: {error}"))?;
    let (sender, receiver) = mpsc::channel();
    if let Some(stdout) = child.stdout.take() {
        std::thread::spawn(move || {
            let mut said = Vec::new();
            let _ = stdout.take(LENGTH).read_to_end(&mut said);
            sender.send(said)
        });
    }
    let until = Instant::now() + LIMIT;
    let said = receiver.recv_timeout(LIMIT);
    while Instant::now() < until && matches!(child.try_wait(), Ok(None)) {
        std::thread::sleep(Duration::from_millis(5));
    }
    let ended = child.try_wait();
    if !matches!(ended, Ok(Some(_))) {
        let _ = child.kill();
        let _ = child.wait();
        return Err(format!("did not answer within {} s", LIMIT.as_secs()));
    }
    match (ended, said) {
        (Ok(Some(status)), Ok(said)) if status.success() => Ok(String::from_utf8_lossy(&said).into_owned()),
        (Ok(Some(status)), _) => Err(format!("ended with {status}")),
        _ => Err("could not be waited for".into()),
    }
}

/// We may be root, and what is run by a path in somebody's settings must not be anybody's.
fn refuse_if_writable_by_others(program: &Path) -> Result<(), String> {
    let meta = program.metadata().map_err(|error| format!("can't be read: {error}"))?;
    let ours = meta.uid() == 0 || meta.uid() == nix::unistd::geteuid().as_raw();
    match ours && meta.mode() & 0o022 == 0 {
        true => Ok(()),
        false => Err(format!("can be changed by others (owner {}, mode {:04o})", meta.uid(), meta.mode() & 0o7777)),
    }
}

/// A version as programs print it. A release candidate comes before its release.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Version {
    pub major: u32,
    pub minor: u32,
    pub patch: u32,
    candidate: u32,
}

impl Version {
    pub const fn new(major: u32, minor: u32, patch: u32) -> Version {
        Version { major, minor, patch, candidate: u32::MAX }
    }

    pub const fn candidate(self, candidate: u32) -> Version {
        Version { candidate, ..self }
    }

    /// The first version in a text: `runc version 1.1.5+ds1`, `containerd github.com/… 1.6.20~ds1 …`,
    /// `Docker version 20.10.24+dfsg1, build …`, `v1.4.0-rc.3`.
    pub fn find(text: &str) -> Option<Version> {
        text.split(|c: char| c.is_whitespace() || c == ',').find_map(Version::parse)
    }

    fn parse(word: &str) -> Option<Version> {
        let word = word.strip_prefix('v').unwrap_or(word);
        let end = word.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(word.len());
        let (numbers, rest) = word.split_at(end);
        let mut numbers = numbers.split('.').map(str::parse::<u32>);
        let (major, minor) = (numbers.next()?.ok()?, numbers.next()?.ok()?);
        let patch = numbers.next().and_then(Result::ok).unwrap_or(0);
        let candidate = rest.get(1..).and_then(|rest| rest.strip_prefix("rc"));
        let candidate = candidate.map(|n| n.trim_start_matches('.').chars().take_while(char::is_ascii_digit).collect());
        let candidate = candidate.map_or(Some(u32::MAX), |n: String| n.parse().ok())?;
        Some(Version { major, minor, patch, candidate })
    }
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)?;
        if self.candidate == u32::MAX { Ok(()) } else { write!(f, "-rc.{}", self.candidate) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn script(text: &str, mode: u32) -> (tempfile::TempDir, std::path::PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("p");
        std::fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        (dir, path)
    }

    #[test]
    fn what_a_program_says_and_how_it_can_refuse() {
        let ask = |text: &str| {
            let (_dir, path) = script(text, 0o755);
            super::ask(&path, &["--version"])
        };
        assert_eq!(ask("echo \"$1 $HOME.\"").unwrap(), "--version .\n");
        assert_eq!(ask("exit 3").unwrap_err(), "ended with exit status: 3");
        assert_eq!(ask("exec sleep 60").unwrap_err(), "did not answer within 2 s");
        assert_eq!(ask("exec >&-; exec sleep 60").unwrap_err(), "did not answer within 2 s");
        assert!(ask("exec yes").is_err(), "an endless answer is cut off");
        assert!(super::ask(Path::new("/nonexistent"), &[]).unwrap_err().starts_with("can't be read"));
        let (_dir, open) = script("echo 1.2.3", 0o777);
        assert!(super::ask(&open, &[]).unwrap_err().contains("mode 0777"));
    }

    #[test]
    fn versions_as_programs_print_them() {
        for (said, version) in [
            ("runc version 1.1.5+ds1\ncommit: 1.1.5+ds1-1+deb12u1\nspec: 1.0.2-dev", Version::new(1, 1, 5)),
            ("runc version 1.4.0-rc.3", Version::new(1, 4, 0).candidate(3)),
            ("runc version 1.0.0~rc93+ds1", Version::new(1, 0, 0).candidate(93)),
            ("crun version 1.8.1\ncommit: f8a096", Version::new(1, 8, 1)),
            ("crun version 1.27", Version::new(1, 27, 0)),
            ("youki version: 0.5.5", Version::new(0, 5, 5)),
            ("podman version 5.0.0-dev", Version::new(5, 0, 0)),
            ("Docker version 20.10.24+dfsg1, build 5d6db84", Version::new(20, 10, 24)),
            ("containerd github.com/containerd/containerd 1.6.20~ds1 1.6.20~ds1-1+deb12u3", Version::new(1, 6, 20)),
            ("containerd containerd.io v2.0.1 abc", Version::new(2, 0, 1)),
            ("NVIDIA Container Toolkit CLI version 1.17.8\ncommit: f202b80a", Version::new(1, 17, 8)),
        ] {
            assert_eq!(Version::find(said), Some(version), "{said}");
        }
        assert_eq!(Version::find("no version here, not 7 either"), None);
        assert!(Version::new(1, 4, 0).candidate(3) < Version::new(1, 4, 0));
        assert_eq!(Version::new(1, 4, 0).candidate(3).to_string(), "1.4.0-rc.3");
    }
}
