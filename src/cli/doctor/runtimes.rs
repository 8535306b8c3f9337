//! Low-level runtimes and the NVIDIA Container Toolkit: versions, and what is known to be wrong with them.

use std::path::PathBuf;

use super::Check;
use super::engines::Engines;
use super::program::{self, Version};
use super::root::Root;
use crate::config::Settings;
use crate::first::{RUNTIME_DIRS, RUNTIMES};

const TOOLKIT: &str = "NVIDIA Container Toolkit";

/// A flaw that a container, or its image, can use against the host.
struct Flaw {
    program: &'static str,
    names: &'static str,
    since: Version,
    /// The first version of each branch without it, oldest first.
    fixed: &'static [Version],
}

/// runc: GHSA-xr7r-f8xq-vfvv; GHSA-9493-h29p-rfm2, -qw9x-cqr3-wc7r, -cgrx-mc8f-2prm; GHSA-xjvp-4fhw-gc47. crun: its
/// release notes of 1.27 and 1.28. Toolkit: NVIDIA security bulletins 5582, 5616, 5659.
const FLAWS: [Flaw; 8] = [
    Flaw {
        program: "runc",
        names: "CVE-2024-21626",
        since: Version::new(1, 0, 0).candidate(93),
        fixed: &[Version::new(1, 1, 12)],
    },
    Flaw {
        program: "runc",
        names: "CVE-2025-31133, CVE-2025-52565, CVE-2025-52881",
        since: Version::new(0, 0, 0),
        fixed: &[Version::new(1, 2, 8), Version::new(1, 3, 3), Version::new(1, 4, 0).candidate(3)],
    },
    Flaw {
        program: "runc",
        names: "CVE-2026-41579",
        since: Version::new(0, 0, 0),
        fixed: &[Version::new(1, 3, 6), Version::new(1, 4, 3)],
    },
    Flaw { program: "crun", names: "CVE-2026-30892", since: Version::new(1, 19, 0), fixed: &[Version::new(1, 27, 0)] },
    Flaw { program: "crun", names: "CVE-2026-47766", since: Version::new(0, 0, 0), fixed: &[Version::new(1, 28, 0)] },
    Flaw {
        program: TOOLKIT,
        names: "CVE-2024-0132, CVE-2024-0133",
        since: Version::new(0, 0, 0),
        fixed: &[Version::new(1, 16, 2)],
    },
    Flaw { program: TOOLKIT, names: "CVE-2025-23359", since: Version::new(0, 0, 0), fixed: &[Version::new(1, 17, 4)] },
    Flaw {
        program: TOOLKIT,
        names: "CVE-2025-23266, CVE-2025-23267",
        since: Version::new(0, 0, 0),
        fixed: &[Version::new(1, 17, 8)],
    },
];

/// A program that was found.
pub(super) struct Found {
    path: PathBuf,
    /// What it says of itself; `None`: it was not asked.
    said: Option<Result<String, String>>,
}

pub(super) fn read(root: &Root, settings: &Settings, engines: &Engines) -> Vec<Found> {
    let mut paths: Vec<PathBuf> = RUNTIMES.iter().filter_map(|name| root.program(name, &RUNTIME_DIRS)).collect();
    paths.extend(settings.runtime.clone());
    paths.extend(engines.pinned());
    paths.extend(root.program("nvidia-ctk", &RUNTIME_DIRS));
    paths.retain(|path| root.is_program(path));
    let mut found: Vec<Found> = Vec::new();
    for path in paths {
        if found.iter().all(|known| known.path != path) {
            found.push(Found { said: root.is_here().then(|| program::ask(&path, &["--version"])), path });
        }
    }
    found
}

pub(super) fn checks(found: &[Found], root: &Root) -> Vec<Check> {
    let debian = root.exists("/var/lib/dpkg/status");
    let mut checks: Vec<Check> = found.iter().map(|program| verdict(program, debian)).collect();
    if !found.iter().any(|program| kind(program) != Some(TOOLKIT)) {
        checks.push(Check::fail(
            "runtime.any",
            format!("no low-level runtime: looked for {} in {}", RUNTIMES.join(", "), RUNTIME_DIRS.join(", ")),
            "install runc or crun, or name one in /etc/mig-hook/config.toml: [runtime] path = \"/opt/bin/runc\"",
        ));
    }
    checks
}

/// What a program is, by what it says, else by its name.
fn kind(found: &Found) -> Option<&'static str> {
    let said = found.said.as_ref().and_then(|said| said.as_deref().ok()).unwrap_or_default();
    let name = found.path.file_name().unwrap_or_default().to_string_lossy();
    if said.starts_with(TOOLKIT) || name == "nvidia-ctk" {
        return Some(TOOLKIT);
    }
    let is = |runtime: &&&str| said.starts_with(&format!("{runtime} version"));
    RUNTIMES.iter().find(is).or_else(|| RUNTIMES.iter().find(|runtime| **runtime == name)).copied()
}

fn verdict(found: &Found, debian: bool) -> Check {
    let kind = kind(found);
    let shown = found.path.display();
    let file = found.path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let id =
        format!("runtime.{}", kind.map_or(file.as_str(), |kind| if kind == TOOLKIT { "nvidia-toolkit" } else { kind }));
    let said = match &found.said {
        None => return Check::ok(id, format!("{shown} is there; its version was not asked")),
        Some(Err(reason)) => {
            return Check::warn(id, format!("{shown} --version {reason}"), format!("try it: {shown} --version"));
        }
        Some(Ok(said)) => said,
    };
    let (Some(kind), Some(version)) = (kind, Version::find(said)) else {
        return Check::ok(id, format!("{shown}: {}", said.lines().next().unwrap_or("says nothing of its version")));
    };
    let flaws: Vec<&Flaw> = FLAWS.iter().filter(|flaw| flaw.program == kind && affects(flaw, version)).collect();
    let Some(last) = flaws.last() else { return Check::ok(id, format!("{kind} {version} ({shown})")) };
    let names: Vec<&str> = flaws.iter().map(|flaw| flaw.names).collect();
    let fixed: Vec<String> = last.fixed.iter().map(Version::to_string).collect();
    let package = if kind == TOOLKIT { "nvidia-container-toolkit" } else { kind };
    let look = match debian {
        true => format!("zgrep CVE /usr/share/doc/{package}/changelog.Debian.gz"),
        false => format!("rpm -q --changelog {package} | grep CVE"),
    };
    Check::warn(
        id,
        format!(
            "{kind} {version} ({shown}) has {}, unless your distribution has backported the fixes",
            names.join(", ")
        ),
        format!("update it to {} or newer; what your package has fixed: {look}", fixed.join(", ")),
    )
}

fn affects(flaw: &Flaw, version: Version) -> bool {
    let same_branch = |fixed: &&Version| (fixed.major, fixed.minor) == (version.major, version.minor);
    let fixed = flaw.fixed.iter().find(same_branch).or(flaw.fixed.first());
    version >= flaw.since && fixed.is_some_and(|fixed| version < *fixed)
}

#[cfg(test)]
mod tests {
    use super::super::Status;
    use super::*;

    fn found(path: &str, said: &str) -> Found {
        Found { path: path.into(), said: Some(Ok(said.into())) }
    }

    #[test]
    fn every_branch_has_its_own_fix() {
        let affected = |program: &str, version: &str| {
            let version = Version::find(version).unwrap();
            let flaws = FLAWS.iter().filter(|flaw| flaw.program == program && affects(flaw, version));
            flaws.map(|flaw| flaw.names.split(", ").next().unwrap()).collect::<Vec<_>>().join(" ")
        };
        for (program, version, names) in [
            ("runc", "1.1.5+ds1", "CVE-2024-21626 CVE-2025-31133 CVE-2026-41579"),
            ("runc", "1.0.0-rc92", "CVE-2025-31133 CVE-2026-41579"),
            ("runc", "1.1.12", "CVE-2025-31133 CVE-2026-41579"),
            ("runc", "1.2.8", "CVE-2026-41579"),
            ("runc", "1.3.2", "CVE-2025-31133 CVE-2026-41579"),
            ("runc", "1.3.6", ""),
            ("runc", "1.4.0-rc.2", "CVE-2025-31133 CVE-2026-41579"),
            ("runc", "1.4.0-rc.3", "CVE-2026-41579"),
            ("runc", "1.4.3", ""),
            ("runc", "1.5.0", ""),
            ("crun", "1.8.1", "CVE-2026-47766"),
            ("crun", "1.26", "CVE-2026-30892 CVE-2026-47766"),
            ("crun", "1.28", ""),
            (TOOLKIT, "1.17.7", "CVE-2025-23266"),
            (TOOLKIT, "1.16.1", "CVE-2024-0132 CVE-2025-23359 CVE-2025-23266"),
            (TOOLKIT, "1.17.8", ""),
            ("youki", "0.5.5", ""),
        ] {
            assert_eq!(affected(program, version), names, "{program} {version}");
        }
    }

    #[test]
    fn an_old_program_says_what_is_wrong_and_how_to_see_what_is_backported() {
        let old = found("/usr/sbin/runc", "runc version 1.1.5+ds1\ncommit: 1.1.5+ds1-1+deb12u1\n");
        let check = verdict(&old, true);
        assert_eq!((check.id.as_str(), check.status), ("runtime.runc", Status::Warn));
        assert!(check.found.starts_with("runc 1.1.5 (/usr/sbin/runc) has CVE-2024-21626, CVE-2025-31133"), "{check:?}");
        let remedy = check.remedy.unwrap();
        assert!(remedy.contains("1.3.6, 1.4.3 or newer") && remedy.contains("/usr/share/doc/runc/changelog.Debian.gz"));
        assert!(verdict(&old, false).remedy.unwrap().contains("rpm -q --changelog runc"));
        let toolkit = found("/usr/bin/nvidia-ctk", "NVIDIA Container Toolkit CLI version 1.17.4\n");
        assert_eq!(verdict(&toolkit, true).id, "runtime.nvidia-toolkit");
        assert_eq!(verdict(&toolkit, true).status, Status::Warn);
    }

    #[test]
    fn programs_that_say_nothing_or_nothing_known() {
        assert_eq!(verdict(&found("/opt/kata", "kata 3\n"), true), Check::ok("runtime.kata", "/opt/kata: kata 3"));
        let silent = Found { path: "/usr/bin/crun".into(), said: Some(Err("ended with signal 9".into())) };
        assert_eq!((verdict(&silent, true).id.as_str(), verdict(&silent, true).status), ("runtime.crun", Status::Warn));
        let unasked = Found { path: "/usr/bin/crun".into(), said: None };
        assert_eq!(verdict(&unasked, true).status, Status::Ok);
        assert_eq!(kind(&found("/opt/my-runc", "runc version 1.4.3")), Some("runc"));
    }

    #[test]
    fn none_is_a_failure_and_the_toolkit_is_none() {
        let root = Root::at("/".as_ref()).unwrap();
        let toolkit = found("/usr/bin/nvidia-ctk", "NVIDIA Container Toolkit CLI version 1.19.0");
        assert_eq!(checks(&[toolkit], &root)[1].id, "runtime.any");
        assert_eq!(checks(&[], &root)[0].status, Status::Fail);
    }
}
