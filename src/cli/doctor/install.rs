//! This installation: every program of it, of one version.

use std::path::{Path, PathBuf};

use super::Check;
use super::root::Root;
use super::{listed, program};
use crate::config::HOOK_PLACES;
use crate::first::{ENGINES, VERSION};

/// Where packages and `make install` put migctl.
const BIN: [&str; 2] = ["/usr/bin", "/usr/local/bin"];
const OURS: &str = env!("CARGO_PKG_VERSION");

pub(super) fn checks(root: &Root) -> Vec<Check> {
    let Some(bin) = bin(root) else {
        let found =
            format!("mig-hook is not installed: no mig-runtime in {} below {}", BIN.join(" or "), root.shown("/"));
        return vec![Check::fail("install.programs", found, "install it: make build && make install")];
    };
    let parts = [("mig-runtime", &["mig-runtime"][..]), ("mig-engine", &ENGINES), ("mig-hook", &HOOK_PLACES)];
    let found = |places: &[&str]| places.iter().map(|place| bin.join(place)).find(|path| root.is_program(path));
    let parts: Vec<(&str, Option<PathBuf>)> = parts.iter().map(|(name, places)| (*name, found(places))).collect();
    let engine = parts.iter().find_map(|(name, path)| path.as_deref().filter(|_| *name == "mig-engine"));
    let said = engine.filter(|_| root.is_here()).map(|path| program::ask(path, &["--version"]));
    let mut checks = vec![programs(&bin, &parts)];
    checks.extend(said.and_then(|said| version(&said)));
    checks
}

/// The directory that the other programs are looked for from.
fn bin(root: &Root) -> Option<PathBuf> {
    if root.is_here() {
        let exe = std::env::current_exe().ok()?;
        return exe.canonicalize().unwrap_or(exe).parent().map(Path::to_owned);
    }
    BIN.iter().map(PathBuf::from).find(|bin| root.is_program(bin.join("mig-runtime")))
}

fn programs(bin: &Path, parts: &[(&str, Option<PathBuf>)]) -> Check {
    let id = "install.programs";
    let missing: Vec<String> =
        parts.iter().filter(|(_, path)| path.is_none()).map(|(name, _)| (*name).to_owned()).collect();
    match missing.is_empty() {
        true => Check::ok(id, format!("mig-hook {OURS}: all programs, seen from {}", bin.display())),
        false => Check::fail(
            id,
            format!("{} is missing, seen from {}: containers that ask do not start", listed(&missing), bin.display()),
            "install mig-hook completely: make build && make install",
        ),
    }
}

fn version(said: &Result<String, String>) -> Option<Check> {
    let found = match said {
        Ok(said) if said.trim() == format!("mig-engine {VERSION}") => return None,
        Ok(said) => format!("migctl is {VERSION}, and {}", said.lines().next().unwrap_or("mig-engine says nothing")),
        Err(reason) => format!("mig-engine {reason}"),
    };
    Some(Check::fail(
        "install.version",
        format!("{found}: the programs are not of one version"),
        "install mig-hook again, completely: make build && make install",
    ))
}

#[cfg(test)]
mod tests {
    use super::super::Status;
    use super::*;

    #[test]
    fn a_missing_program_and_another_version_are_named() {
        let parts = [("mig-runtime", Some("/usr/bin/mig-runtime".into())), ("mig-hook", None)];
        let check = programs(Path::new("/usr/bin"), &parts);
        assert!(check.status == Status::Fail && check.found.starts_with("mig-hook is missing"), "{check:?}");
        assert_eq!(programs(Path::new("/usr/bin"), &parts[..1]).status, Status::Ok);
        assert_eq!(version(&Ok(format!("mig-engine {VERSION}\n"))), None);
        assert!(version(&Ok("mig-engine 9.9.9".into())).unwrap().found.contains("mig-engine 9.9.9"));
        assert!(version(&Err("ended with 1".into())).unwrap().found.contains("ended with 1"));
    }

    #[test]
    fn another_root_is_looked_at_by_its_own_paths() {
        let dir = tempfile::tempdir().unwrap();
        let root = Root::at(dir.path()).unwrap();
        assert_eq!(checks(&root)[0].status, Status::Fail);
        for path in ["usr/bin/mig-runtime", "usr/libexec/mig-hook/mig-engine", "usr/libexec/oci/hooks.d/mig-hook"] {
            let path = dir.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(&path, "").unwrap();
            std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        }
        assert_eq!(checks(&root)[0].status, Status::Ok);
        std::fs::remove_file(dir.path().join("usr/libexec/mig-hook/mig-engine")).unwrap();
        assert!(checks(&root)[0].found.starts_with("mig-engine is missing"));
    }
}
