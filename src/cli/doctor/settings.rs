//! The settings file, and who may ask for slices.

use std::path::{Path, PathBuf};

use super::engines::Engines;
use super::gpus::Gpus;
use super::root::Root;
use super::{Check, listed, quoted};
use crate::config::{ConfigError, Settings};
use crate::first::SETTINGS;
use crate::request::GpuSelector;

/// The settings of that file, else of the default one below a root; and which file it is.
pub(super) fn load(root: &Root, config: Option<&Path>) -> (Result<Settings, ConfigError>, PathBuf) {
    let default = PathBuf::from(root.shown(SETTINGS));
    match config {
        Some(file) => (Settings::load(Some(file)), file.to_owned()),
        None if root.is_here() => (Settings::load(None), default),
        None if !root.exists(SETTINGS) => (Ok(Settings::default()), default),
        None => (Settings::load(Some(&default)), default),
    }
}

pub(super) fn checks(read: Result<&Settings, &ConfigError>, file: &Path, gpus: &Gpus) -> Vec<Check> {
    let settings = match read {
        Err(error) => return vec![unusable(error, file)],
        Ok(settings) => settings,
    };
    let mut checks = vec![Check::ok(
        "settings.file",
        match &settings.file {
            Some(file) => format!("{} is valid", file.display()),
            None => format!("no {}: the defaults hold", file.display()),
        },
    )];
    checks.extend(runtime(settings, file));
    checks.extend(unknown_gpus(settings, gpus));
    checks.extend(log(&settings.log_socket, settings.log_socket.exists()));
    checks
}

fn unusable(error: &ConfigError, file: &Path) -> Check {
    let shown = quoted(&file.to_string_lossy());
    let remedy = match error {
        ConfigError::Writable { .. } => format!("chown root:root {shown} && chmod 644 {shown}"),
        ConfigError::NoSession { .. } => "log in through a session, or run as root: loginctl enable-linger".into(),
        ConfigError::Read { .. } => format!("make {shown} readable, or remove it: the defaults do for most hosts"),
        _ => format!("correct {shown}; until then every container that asks is refused (here the defaults are used)"),
    };
    Check::fail("settings.file", error.to_string(), remedy)
}

fn runtime(settings: &Settings, file: &Path) -> Option<Check> {
    let path = settings.runtime.as_deref()?;
    (!path.is_file()).then(|| {
        Check::fail(
            "settings.runtime",
            format!("runtime.path = {} is not there: no container starts through mig-runtime", path.display()),
            format!("name an installed runtime in {}, or take runtime.path out", file.display()),
        )
    })
}

/// Names in limits.gpus that mean no GPU here. That none does is told with the GPUs.
fn unknown_gpus(settings: &Settings, gpus: &Gpus) -> Option<Check> {
    let seen = gpus.seen();
    let known = |name: &&String| {
        let selector = GpuSelector::parse(name);
        selector.is_some_and(|selector| seen.iter().any(|gpu| selector.matches(&gpu.device)))
    };
    let unknown: Vec<String> = settings.gpus.iter().flatten().filter(|name| !known(name)).cloned().collect();
    (!unknown.is_empty() && seen.iter().any(|gpu| gpu.managed)).then(|| {
        let found = format!("limits.gpus names what is not here: {}", listed(&unknown));
        Check::warn("settings.gpus", found, "migctl list shows the GPUs by index and UUID")
    })
}

fn log(socket: &Path, exists: bool) -> Option<Check> {
    (!exists).then(|| {
        Check::warn(
            "settings.log",
            format!("there is no {}: refusals and audit lines reach no journal", socket.display()),
            "run journald or a syslog daemon, or name its socket in the settings: [log] socket = \"/run/log.sock\"",
        )
    })
}

/// What lets containers ask that perhaps should not.
pub(super) fn exposure(settings: &Settings, engines: &Engines) -> Vec<Check> {
    let by_name = engines.with_environment();
    let by_default = engines.default_with_environment();
    vec![environment(settings.environment, by_name, by_default), device_rules(settings.open_device_rules)]
}

fn environment(counts: bool, by_name: Vec<String>, by_default: Vec<String>) -> Check {
    let id = "exposure.environment";
    if !counts {
        return Check::ok(id, "requests in the environment do not count: requests.environment = false");
    }
    if !by_default.is_empty() {
        return Check::fail(
            id,
            format!(
                "{} takes requests from the environment and is the default: every image's ENV can take a slice",
                listed(&by_default)
            ),
            "take --mig-env out of its runtimeArgs, or run: migctl configure docker --default",
        );
    }
    match by_name.is_empty() {
        true => Check::ok(id, "no runtime takes requests from the environment"),
        false => Check::ok(
            id,
            format!("requests in the environment count for containers that name {}, no other", listed(&by_name)),
        ),
    }
}

fn device_rules(open: bool) -> Check {
    let id = "exposure.device-rules";
    match open {
        false => Check::ok(id, "containers that could reach every device (--privileged) get no slice"),
        true => Check::warn(
            id,
            "requests.open_device_rules: a container with --privileged gets a slice, and reaches all others' too",
            "take requests.open_device_rules out of the settings, unless every such container is trusted",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Status;
    use super::*;

    #[test]
    fn a_file_that_cannot_be_used_says_what_is_wrong_with_it() {
        let error = ConfigError::Invalid { path: "/c".into(), reason: "unknown key statedir".into() };
        let check = unusable(&error, Path::new("/c"));
        assert!(check.status == Status::Fail && check.found.contains("unknown key statedir"), "{check:?}");
        let error = ConfigError::Writable { path: "/c".into(), uid: 7, mode: 0o666 };
        assert!(unusable(&error, Path::new("/c")).remedy.unwrap().contains("chmod 644 /c"));
    }

    #[test]
    fn settings_that_name_what_is_not_there() {
        let settings = Settings { runtime: Some("/nowhere/runc".into()), ..Settings::default() };
        assert_eq!(runtime(&settings, Path::new("/c")).unwrap().id, "settings.runtime");
        assert_eq!(runtime(&Settings::default(), Path::new("/c")), None);
        assert_eq!(log(Path::new("/dev/log"), true), None);
        assert_eq!(log(Path::new("/dev/log"), false).unwrap().status, Status::Warn);
    }

    #[test]
    fn the_environment_counts_where_a_runtime_is_chosen_by_name() {
        let docker = || vec!["docker's mig".to_owned()];
        assert_eq!(environment(true, docker(), vec![]).status, Status::Ok);
        assert_eq!(environment(true, vec![], vec![]).status, Status::Ok);
        assert_eq!(environment(false, docker(), docker()).status, Status::Ok);
        let open = environment(true, docker(), docker());
        assert!(open.status == Status::Fail && open.found.contains("every image's ENV"), "{open:?}");
        assert_eq!((device_rules(false).status, device_rules(true).status), (Status::Ok, Status::Warn));
    }
}
