//! `/etc/mig-hook/config.toml`: a fragment as written becomes validated [`Settings`]. Every path of the outside world
//! is here; an ordinary host needs no file at all.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;

use crate::first::{self, SETTINGS};

/// Where the driver's library may lie under `driver.root`, in order.
const LIBRARY_DIRS: [&str; 6] =
    ["usr/lib/x86_64-linux-gnu", "usr/lib/aarch64-linux-gnu", "usr/lib64", "usr/lib", "lib64", "lib"];
const LIBRARY: &str = "libnvidia-ml.so.1";

/// A settings file as written. Unknown keys are refused with the nearest valid one.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Fragment {
    state_dir: Option<PathBuf>,
    driver: DriverFragment,
    runtime: RuntimeFragment,
    limits: LimitsFragment,
    slices: SlicesFragment,
    placement: PlacementFragment,
    requests: RequestsFragment,
    log: LogFragment,
    cdi: CdiFragment,
    queue: QueueFragment,
    jobs: JobsFragment,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct DriverFragment {
    root: Option<PathBuf>,
    nvml: Option<PathBuf>,
    proc_root: Option<PathBuf>,
    dev_root: Option<PathBuf>,
    files: DriverSource,
    cdi_spec: Option<PathBuf>,
    sockets: Option<Vec<Socket>>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct RuntimeFragment {
    path: Option<PathBuf>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct LimitsFragment {
    profiles: Option<Vec<String>>,
    slices_per_container: Option<u32>,
    gpus: Option<Vec<String>>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct SlicesFragment {
    foreign: Foreign,
    idle_ttl: Option<String>,
    agents: Option<Vec<PathBuf>>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct PlacementFragment {
    policy: Option<String>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct RequestsFragment {
    environment: Option<bool>,
    open_device_rules: Option<bool>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct LogFragment {
    level: Option<String>,
    socket: Option<PathBuf>,
    audit_file: Option<PathBuf>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct CdiFragment {
    spec: Option<PathBuf>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct QueueFragment {
    overtakes: Option<u32>,
    max_wait: Option<String>,
    length: Option<u32>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct JobsFragment {
    confine: bool,
    wait: Option<String>,
}

/// Every key, for "did you mean". Kept equal to the structs above by a test.
const KEYS: [&str; 27] = [
    "state_dir",
    "driver.root",
    "driver.nvml",
    "driver.proc_root",
    "driver.dev_root",
    "driver.files",
    "driver.cdi_spec",
    "driver.sockets",
    "runtime.path",
    "limits.profiles",
    "limits.slices_per_container",
    "limits.gpus",
    "slices.foreign",
    "slices.idle_ttl",
    "slices.agents",
    "placement.policy",
    "requests.environment",
    "requests.open_device_rules",
    "log.level",
    "log.socket",
    "log.audit_file",
    "cdi.spec",
    "queue.overtakes",
    "queue.max_wait",
    "queue.length",
    "jobs.confine",
    "jobs.wait",
];
/// Names of placement policies; the first is the default.
pub const POLICIES: [&str; 5] = ["scc", "first-fit", "driver", "binpack", "spread"];
/// Where the packages of DCGM, its exporter and nvidia-persistenced have their programs.
const AGENTS: [&str; 3] = ["/usr/bin/nv-hostengine", "/usr/bin/dcgm-exporter", "/usr/bin/nvidia-persistenced"];
const LEVELS: [&str; 5] = ["error", "warn", "info", "debug", "trace"];

/// Who says which of the driver's files a container gets.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DriverSource {
    /// We: what is found of the running version.
    #[default]
    Auto,
    /// A CDI spec of NVIDIA's.
    Cdi,
    /// A stacked NVIDIA runtime, which is told the slices.
    None,
}

/// A socket by which the driver's daemons are spoken to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Socket {
    /// nvidia-persistenced's.
    Persistenced,
    /// nvidia-fabricmanager's.
    Fabricmanager,
    /// The directory of the MPS control daemon's pipes.
    Mps,
}

impl Socket {
    /// Where it is, on the host and in a container.
    pub fn path(self) -> &'static str {
        match self {
            Socket::Persistenced => "/run/nvidia-persistenced/socket",
            Socket::Fabricmanager => "/run/nvidia-fabricmanager/socket",
            Socket::Mps => "/tmp/nvidia-mps",
        }
    }
}

/// What may be done with slices that we did not create.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Foreign {
    /// They are occupied room and nothing else.
    #[default]
    Refuse,
    /// One with no lease, no process and no open device may be given to a container. Never destroyed.
    Idle,
}

/// Validated settings. `file` is kept so that hooks that we write into a config use the same one.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The file that was read, or named; `None` where the default one does not exist.
    pub file: Option<PathBuf>,
    /// Leases and the lock (`state_dir`).
    pub state_dir: PathBuf,
    /// The driver's user-space root (`driver.root`).
    pub driver_root: PathBuf,
    /// The NVIDIA management library, absolute (`driver.nvml`).
    pub nvml: PathBuf,
    /// Where the driver's /proc files are (`driver.proc_root`). Pids are always read from the real /proc.
    pub proc_root: PathBuf,
    /// Where the host's device nodes are (`driver.dev_root`).
    pub dev_root: PathBuf,
    /// `driver.files`.
    pub driver_files: DriverSource,
    /// The CDI spec of the driver (`driver.cdi_spec`); `None`: the first that is found.
    pub driver_cdi_spec: Option<PathBuf>,
    /// Sockets that containers get where they are (`driver.sockets`).
    pub sockets: Vec<Socket>,
    /// The low-level runtime (`runtime.path`).
    pub runtime: Option<PathBuf>,
    /// Profiles that may be asked for (`limits.profiles`); `None`: all.
    pub profiles: Option<Vec<String>>,
    /// Slices that one container may hold (`limits.slices_per_container`).
    pub slices_per_container: u32,
    /// GPUs that we manage, by index, UUID or PCI address (`limits.gpus`); `None`: all.
    pub gpus: Option<Vec<String>>,
    /// `slices.foreign`.
    pub foreign: Foreign,
    /// How long what an ended holder had is kept for the next request of its profile (`slices.idle_ttl`); zero: not at all.
    pub idle_ttl: Duration,
    /// Programs that watch GPUs (`slices.agents`): a slice whose holder has ended and that only these have open stays for the next
    /// request of its profile.
    pub agents: Vec<PathBuf>,
    /// `placement.policy`.
    pub policy: String,
    /// Whether requests in the environment count at all (`requests.environment`).
    pub environment: bool,
    /// Whether containers whose device rules allow every NVIDIA device may have a slice (`requests.open_device_rules`).
    pub open_device_rules: bool,
    /// `log.level`.
    pub level: String,
    /// Datagram socket of journald or syslogd (`log.socket`).
    pub log_socket: PathBuf,
    /// JSON lines of grants, refusals and releases, besides the log (`log.audit_file`).
    pub audit_file: Option<PathBuf>,
    /// The CDI spec that is kept true (`cdi.spec`); `None`: none is.
    pub cdi_spec: Option<PathBuf>,
    /// How often later requests may start before one that waits (`queue.overtakes`); `None`: 8 for each GPU.
    pub overtakes: Option<u32>,
    /// Longest that a request may wait for room (`queue.max_wait`).
    pub max_wait: Duration,
    /// Requests that may wait at the same time (`queue.length`).
    pub queue_length: u32,
    /// Whether a command or a job is kept from opening other slices than its own (`jobs.confine`).
    pub confine: bool,
    /// How long a job waits for room when it starts (`jobs.wait`).
    pub job_wait: Duration,
    /// The uid outside of one who is root in a user namespace only: no setting. Then state is the user's own, and what is
    /// root's to write, audit file and CDI spec, is left out.
    pub rootless: Option<u32>,
}

/// A settings file that can't be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// It can't be read.
    #[error("cannot read the settings file {path}: {source}")]
    Read {
        /// The file.
        path: String,
        /// Why.
        source: std::io::Error,
    },
    /// Somebody other than root could change it.
    #[error(
        "settings file {path} can be written by others (owner {uid}, mode {mode:04o}); make it root-owned with mode 0644"
    )]
    Writable {
        /// The file.
        path: String,
        /// Its owner.
        uid: u32,
        /// Its mode bits.
        mode: u32,
    },
    /// A program of ours is not where it should be.
    #[error("mig-hook is neither in {dir} nor in libexec/oci/hooks.d; is it installed completely?")]
    Incomplete {
        /// Where this program lies.
        dir: String,
    },
    /// A user without root has no directory for leases.
    #[error(
        "{dir} is not there: the leases of a user without root live in it; log in through a session, or have an \
         administrator run: loginctl enable-linger"
    )]
    NoSession {
        /// The directory.
        dir: String,
    },
    /// Its content is wrong.
    #[error("settings file {path}: {reason}")]
    Invalid {
        /// The file.
        path: String,
        /// What and what would be valid.
        reason: String,
    },
}

impl Settings {
    /// Reads `file`, or the default one, which may be missing. A file that is named must exist.
    pub fn load(file: Option<&Path>) -> Result<Settings, ConfigError> {
        let path = file.unwrap_or(Path::new(SETTINGS));
        let shown = path.display().to_string();
        let state = first::state_dir(None);
        if let Some(dir) = state.parent().filter(|dir| first::rootless().is_some() && !dir.is_dir()) {
            return Err(ConfigError::NoSession { dir: dir.display().to_string() });
        }
        match std::fs::read_to_string(path) {
            Ok(text) => {
                refuse_if_writable_by_others(path, &shown)?;
                let mut settings =
                    Settings::parse(&text).map_err(|reason| ConfigError::Invalid { path: shown.clone(), reason })?;
                let absolute = std::path::absolute(path).map_err(|source| ConfigError::Read { path: shown, source })?;
                settings.file = Some(absolute);
                Ok(settings)
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound && file.is_none() => Ok(Settings::default()),
            Err(source) => Err(ConfigError::Read { path: shown, source }),
        }
    }

    /// Settings of a file's text. Pure but for finding the library under `driver.root`.
    pub fn parse(text: &str) -> Result<Settings, String> {
        let table: toml::Table = text.parse().map_err(|e: toml::de::Error| e.to_string().trim_end().to_owned())?;
        if let Some(unknown) = unknown_key(&table) {
            return Err(format!(
                "unknown key {unknown}; the nearest valid one is {}; valid are {}",
                nearest(&unknown, &KEYS),
                KEYS.join(", ")
            ));
        }
        let fragment: Fragment = toml::from_str(text).map_err(|e| e.to_string().trim_end().to_owned())?;
        Settings::from_fragment(fragment)
    }

    fn from_fragment(fragment: Fragment) -> Result<Settings, String> {
        let Fragment { state_dir, driver, runtime, limits, slices, placement, requests, log, cdi, queue, jobs } =
            fragment;
        let default = Settings::under(absolute("driver.root", driver.root)?.unwrap_or_else(|| "/".into()));
        let one_of = |key: &str, value: Option<String>, default: String, valid: &[&str]| match value {
            None => Ok(default),
            Some(v) if valid.contains(&v.as_str()) => Ok(v),
            Some(v) => Err(format!("{key} = \"{v}\" is not valid; it may be {}", valid.join(", "))),
        };
        if limits.slices_per_container == Some(0) {
            return Err(
                "limits.slices_per_container = 0 would refuse every request; leave it out or give at least 1".into()
            );
        }
        let roots = |path: Option<PathBuf>| path.filter(|_| default.rootless.is_none());
        Ok(Settings {
            file: None,
            rootless: default.rootless,
            state_dir: first::state_dir(absolute("state_dir", state_dir)?),
            nvml: absolute("driver.nvml", driver.nvml)?.unwrap_or(default.nvml),
            proc_root: absolute("driver.proc_root", driver.proc_root)?.unwrap_or(default.proc_root),
            dev_root: absolute("driver.dev_root", driver.dev_root)?.unwrap_or(default.dev_root),
            driver_root: default.driver_root,
            driver_files: driver.files,
            driver_cdi_spec: absolute("driver.cdi_spec", driver.cdi_spec)?,
            sockets: driver.sockets.unwrap_or(default.sockets),
            runtime: absolute("runtime.path", runtime.path)?,
            profiles: limits.profiles,
            slices_per_container: limits.slices_per_container.unwrap_or(default.slices_per_container),
            gpus: limits.gpus,
            foreign: slices.foreign,
            idle_ttl: time("slices.idle_ttl", slices.idle_ttl)?.unwrap_or(default.idle_ttl),
            agents: programs("slices.agents", slices.agents)?.unwrap_or(default.agents),
            policy: one_of("placement.policy", placement.policy, default.policy, &POLICIES)?,
            environment: requests.environment.unwrap_or(default.environment),
            open_device_rules: requests.open_device_rules.unwrap_or(default.open_device_rules),
            level: one_of("log.level", log.level, default.level, &LEVELS)?,
            log_socket: absolute("log.socket", log.socket)?.unwrap_or(default.log_socket),
            audit_file: roots(absolute("log.audit_file", log.audit_file)?),
            cdi_spec: roots(spec_file(absolute("cdi.spec", cdi.spec)?)?),
            overtakes: queue.overtakes,
            max_wait: time("queue.max_wait", queue.max_wait)?.unwrap_or(default.max_wait),
            queue_length: queue.length.unwrap_or(default.queue_length),
            confine: jobs.confine,
            job_wait: time("jobs.wait", jobs.wait)?.unwrap_or(default.job_wait),
        })
    }

    /// The defaults for a driver whose user-space root is `driver_root`.
    fn under(driver_root: PathBuf) -> Settings {
        Settings {
            file: None,
            state_dir: first::state_dir(None),
            nvml: find_library(&driver_root),
            proc_root: "/proc".into(),
            dev_root: driver_root.join("dev"),
            driver_root,
            driver_files: DriverSource::Auto,
            driver_cdi_spec: None,
            sockets: vec![Socket::Persistenced],
            runtime: None,
            profiles: None,
            slices_per_container: 8,
            gpus: None,
            foreign: Foreign::Refuse,
            idle_ttl: Duration::ZERO,
            agents: AGENTS.map(PathBuf::from).to_vec(),
            policy: POLICIES[0].to_owned(),
            environment: true,
            open_device_rules: false,
            level: "info".to_owned(),
            log_socket: "/dev/log".into(),
            audit_file: None,
            cdi_spec: None,
            overtakes: None,
            max_wait: Duration::from_secs(3600),
            queue_length: 1000,
            confine: false,
            job_wait: Duration::ZERO,
            rootless: first::rootless(),
        }
    }
}

impl Default for Settings {
    /// What an ordinary host has without any file.
    fn default() -> Settings {
        Settings::under("/".into())
    }
}

fn absolute(key: &str, path: Option<PathBuf>) -> Result<Option<PathBuf>, String> {
    match path {
        Some(p) if !p.is_absolute() => Err(format!("{key} = \"{}\" must be an absolute path", p.display())),
        other => Ok(other),
    }
}

fn programs(key: &str, paths: Option<Vec<PathBuf>>) -> Result<Option<Vec<PathBuf>>, String> {
    let Some(paths) = paths else { return Ok(None) };
    paths.into_iter().map(|path| absolute(key, Some(path))).collect()
}

fn time(key: &str, text: Option<String>) -> Result<Option<Duration>, String> {
    let parse = |text: String| {
        humantime::parse_duration(&text).map_err(|e| format!("{key} = \"{text}\" is no time, as 30s, 5m or 1h: {e}"))
    };
    text.map(parse).transpose()
}

/// Engines read nothing else in their CDI directories.
fn spec_file(path: Option<PathBuf>) -> Result<Option<PathBuf>, String> {
    match path {
        Some(p) if p.extension().is_none_or(|e| e != "json") => {
            Err(format!("cdi.spec = \"{}\" must end in .json: engines read no other CDI specs", p.display()))
        }
        other => Ok(other),
    }
}

/// Where mig-hook lies, seen from the directory of another program of ours.
pub const HOOK_PLACES: [&str; 3] = ["mig-hook", "../oci/hooks.d/mig-hook", "../libexec/oci/hooks.d/mig-hook"];

/// `mig-hook` as the hooks that we write name it: beside this program, or where `make install` puts it, seen from
/// PREFIX/libexec/mig-hook and from PREFIX/bin.
pub fn hook_program() -> Result<PathBuf, ConfigError> {
    let this = std::env::current_exe();
    let dir = this.as_deref().ok().and_then(Path::parent).unwrap_or(Path::new("/"));
    let found = HOOK_PLACES.iter().find_map(|place| dir.join(place).canonicalize().ok());
    found.ok_or_else(|| ConfigError::Incomplete { dir: dir.display().to_string() })
}

fn find_library(root: &Path) -> PathBuf {
    let found = LIBRARY_DIRS.iter().map(|dir| root.join(dir).join(LIBRARY)).find(|path| path.exists());
    found.unwrap_or_else(|| root.join(LIBRARY_DIRS[0]).join(LIBRARY))
}

fn refuse_if_writable_by_others(path: &Path, shown: &str) -> Result<(), ConfigError> {
    let Ok(meta) = path.metadata() else { return Ok(()) };
    // In a user namespace everybody outside is the overflow uid, root too. Who sits there could name another file anyway.
    let outside = first::rootless().is_some() && meta.uid() == first::OVERFLOW_UID;
    let ours = outside || meta.uid() == 0 || meta.uid() == nix::unistd::geteuid().as_raw();
    match ours && meta.mode() & 0o022 == 0 {
        true => Ok(()),
        false => Err(ConfigError::Writable { path: shown.into(), uid: meta.uid(), mode: meta.mode() & 0o7777 }),
    }
}

fn unknown_key(table: &toml::Table) -> Option<String> {
    table.iter().find_map(|(name, value)| match value {
        toml::Value::Table(inner) if KEYS.iter().any(|k| k.starts_with(&format!("{name}."))) => {
            inner.keys().map(|k| format!("{name}.{k}")).find(|k| !KEYS.contains(&k.as_str()))
        }
        _ => (!KEYS.contains(&name.as_str()) && !KEYS.iter().any(|k| k.starts_with(&format!("{name}."))))
            .then(|| name.clone()),
    })
}

/// The valid key that looks most like `unknown`.
fn nearest<'a>(unknown: &str, valid: &[&'a str]) -> &'a str {
    let last = |key: &str| key.rsplit('.').next().unwrap_or(key).to_owned();
    let likeness = |key: &&&str| {
        let whole = strsim::normalized_damerau_levenshtein(unknown, key);
        let tail = strsim::normalized_damerau_levenshtein(&last(unknown), &last(key));
        ((whole + tail) * 1e6) as u64
    };
    valid.iter().max_by_key(likeness).copied().unwrap_or("state_dir")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_file_is_an_ordinary_host() {
        let settings = Settings::parse("").unwrap();
        assert_eq!(settings.state_dir, Path::new("/run/mig-hook"));
        assert_eq!(settings.proc_root, Path::new("/proc"));
        assert_eq!(settings.dev_root, Path::new("/dev"));
        assert_eq!(settings.policy, "scc");
        assert!(settings.environment && !settings.open_device_rules);
        assert!(settings.nvml.is_absolute());
    }

    #[test]
    fn every_listed_key_is_accepted_and_no_other() {
        for key in KEYS {
            let value = match key {
                "limits.slices_per_container" => "2",
                "limits.profiles" | "limits.gpus" => "[\"0\"]",
                "slices.agents" => "[\"/x\"]",
                "slices.foreign" => "\"idle\"",
                "driver.files" => "\"cdi\"",
                "driver.sockets" => "[\"mps\"]",
                "placement.policy" => "\"binpack\"",
                "requests.environment" | "requests.open_device_rules" | "jobs.confine" => "true",
                "log.level" => "\"debug\"",
                "cdi.spec" => "\"/x.json\"",
                "queue.overtakes" | "queue.length" => "0",
                "slices.idle_ttl" | "queue.max_wait" | "jobs.wait" => "\"90s\"",
                _ => "\"/x\"",
            };
            Settings::parse(&format!("{key} = {value}")).unwrap_or_else(|e| panic!("{key}: {e}"));
        }
    }

    /// The lines of the installed settings file that name a key, with the comment above each.
    fn installed_file() -> Vec<(String, String, String)> {
        let text = include_str!("../packaging/dist/etc/mig-hook/config.toml");
        let (mut table, mut comment, mut found) = (String::new(), String::new(), vec![]);
        for line in text.lines() {
            if let Some(name) = line.strip_prefix('[') {
                table = name.trim_end_matches(']').to_owned() + ".";
            } else if let Some(words) = line.strip_prefix("# ") {
                comment += if comment.is_empty() { "" } else { " " };
                comment += words;
            } else if let Some((key, value)) = line.strip_prefix('#').and_then(|line| line.split_once(" = ")) {
                found.push((format!("{table}{key}"), value.to_owned(), std::mem::take(&mut comment)));
            } else {
                assert_eq!(line, "", "neither a table, a comment nor a key");
                comment.clear();
            }
        }
        found
    }

    #[test]
    fn the_installed_file_has_every_key_with_its_default() {
        let keys: Vec<String> = installed_file().into_iter().map(|(key, ..)| key).collect();
        assert_eq!(keys, KEYS);
        let default = format!("{:?}", Settings::default());
        for (key, value, comment) in installed_file() {
            let set = Settings::parse(&format!("{key} = {value}")).unwrap_or_else(|e| panic!("{key}: {e}"));
            let is_default = format!("{set:?}") == default;
            let says_so = !comment.contains("No default");
            // An example may be what is found on this machine.
            assert!(is_default == says_so || key == "driver.nvml", "{key} = {value}: {comment}");
        }
        let untouched = Settings::parse(include_str!("../packaging/dist/etc/mig-hook/config.toml")).unwrap();
        assert_eq!(format!("{untouched:?}"), default, "it changes nothing");
    }

    /// docs/settings.md. What it says is what the file that is installed says, which the test above holds against the code.
    fn reference() -> String {
        let more = |key: &str| match key {
            "driver.root" | "driver.files" => " ([driver-files.md](driver-files.md))",
            "placement.policy" => " ([performance.md](performance.md))",
            "log.audit_file" => " ([state.md](state.md#audit-lines))",
            "cdi.spec" => " ([engines.md](engines.md#cdi-slices-by---device))",
            "queue.overtakes" => " ([queue.md](queue.md))",
            "jobs.confine" => " ([slurm.md](slurm.md))",
            _ => "",
        };
        let row = |(key, value, comment): (String, String, String)| {
            let (comment, default) = match comment.split_once(" No default: ") {
                Some((comment, default)) => {
                    (format!("{comment} Example: `{value}`"), default.trim_end_matches('.').to_owned())
                }
                None => (comment, format!("`{value}`")),
            };
            format!("| `{key}` | {default} | {comment}{} |\n", more(&key))
        };
        let rows: String = installed_file().into_iter().map(row).collect();
        format!(
            "# Settings\n\nMade from the code (`UPDATE_SETTINGS=1 cargo test --lib config`). They are read from \
             `/etc/mig-hook/config.toml`, anew each time; `--config FILE`, for\nmig-runtime `--mig-config FILE`, names \
             another one. An ordinary host needs none of them, nor the file. It must be root's, and written by nobody\n\
             else. An unknown key is refused, with the nearest valid one, and so is a value that makes no sense: then \
             containers that ask for a slice\ndo not start. A file that is no TOML at all stops only these; the others \
             run with the runtime that is found, not with `runtime.path`.\nPaths are absolute; times are written as \
             `30s`, `5m` or `1h`. mig-hook-config(5) says more of each.\n\n| key | default | |\n|---|---|---|\n{rows}"
        )
    }

    #[test]
    fn the_reference_is_what_the_code_has() {
        let published = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/settings.md");
        if std::env::var_os("UPDATE_SETTINGS").is_some() {
            std::fs::write(&published, reference()).unwrap();
        }
        assert!(
            std::fs::read_to_string(published).unwrap() == reference(),
            "docs/settings.md is not what the code has; after UPDATE_SETTINGS=1 cargo test --lib config it is"
        );
    }

    #[test]
    fn the_manual_page_has_every_key_with_its_default() {
        let page = include_str!("../docs/man/mig-hook-config.5").replace("\\-", "-").replace("\\(dq", "\"");
        let entries: Vec<&str> = page.lines().filter_map(|line| line.strip_prefix(".BR ")).collect();
        let wanted: Vec<String> = installed_file()
            .iter()
            .map(|(key, value, comment)| match comment.contains("No default") {
                true => format!("{key} \" (no default)\""),
                false if key == "driver.dev_root" => format!("{key} \" (default: {value}, or dev below driver.root)\""),
                false => format!("{key} \" (default: {value})\""),
            })
            .collect();
        assert_eq!(entries[..wanted.len()], wanted);
    }

    #[test]
    fn a_typo_names_the_nearest_key() {
        for (typo, meant) in [
            ("statedir = \"/x\"", "state_dir"),
            ("[driver]\nnvlm = \"/x\"", "driver.nvml"),
            ("[limits]\nprofile = []", "limits.profiles"),
            ("[runtimes]\npath = \"/x\"", "runtime.path"),
        ] {
            let error = Settings::parse(typo).unwrap_err();
            assert!(error.contains(&format!("nearest valid one is {meant};")), "{typo}: {error}");
        }
    }

    #[test]
    fn wrong_values_name_the_key_and_what_is_valid() {
        for (text, part) in [
            ("state_dir = \"rel\"", "absolute path"),
            ("placement.policy = \"best\"", "scc, first-fit"),
            ("limits.slices_per_container = 0", "at least 1"),
            ("slices.foreign = \"all\"", "idle"),
            ("driver.files = \"all\"", "cdi"),
            ("driver.sockets = [\"x\"]", "fabricmanager"),
            ("cdi.spec = \"/etc/cdi/x\"", ".json"),
            ("queue.max_wait = \"long\"", "queue.max_wait = \"long\" is no time, as 30s, 5m or 1h"),
            ("jobs.wait = \"long\"", "jobs.wait"),
            ("slices.idle_ttl = \"long\"", "slices.idle_ttl"),
            ("slices.agents = [\"dcgm\"]", "slices.agents = \"dcgm\" must be an absolute path"),
            ("state_dir = ", "state_dir"),
        ] {
            let error = Settings::parse(text).unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
    }
}
