//! How a reason reaches people: exit codes, stderr, the journal, and the `--log` file that docker and containerd read.

use std::fmt::Write as _;
use std::fs::OpenOptions;
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};

use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields, MakeWriter};
use tracing_subscriber::registry::LookupSpan;

use crate::bundle::BundleError;
use crate::config::{ConfigError, Settings};
use crate::container::ContainerError;
use crate::engine::Failure;
use crate::gpu::GpuError;
use crate::host::HostError;
use crate::mig_parted::ConfigFault;
use crate::request::RequestError;
use crate::store::StoreError;

/// Exit codes of every binary, after sysexits.h. podman shows nothing but the code of a precreate hook.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// Done, or nothing to do.
    Ok = 0,
    /// `migctl assert`: it is not so. `migctl doctor`: slices are given, but something should be mended.
    NotSo = 1,
    /// Wrong command line.
    Usage = 64,
    /// The request or the config.json can't be understood, or no GPU here offers what it asks for.
    BadRequest = 65,
    /// The driver, the low-level runtime or a part of this installation is missing or failing.
    Unavailable = 69,
    /// A mistake of ours.
    Internal = 70,
    /// A file could not be read or written.
    Io = 74,
    /// No room now; another time it may fit.
    NoRoom = 75,
    /// The settings, or the lack of privilege, forbid it.
    NotAllowed = 77,
    /// The settings file is wrong.
    Config = 78,
    /// SIGINT ended it.
    Interrupted = 130,
    /// SIGTERM ended it.
    Terminated = 143,
}

/// The exit code for an error: that of the first cause in its chain that has one.
pub fn exit_code(error: &anyhow::Error) -> Exit {
    error.chain().find_map(code_of).unwrap_or(Exit::Internal)
}

fn code_of(cause: &(dyn std::error::Error + 'static)) -> Option<Exit> {
    if let Some(failure) = cause.downcast_ref::<Failure>() {
        return Some(match failure {
            Failure::BadRequest(_) => Exit::BadRequest,
            Failure::NotAllowed(_) => Exit::NotAllowed,
            Failure::NoRoom(_) | Failure::Stale(_) => Exit::NoRoom,
            Failure::Interrupted => Exit::Interrupted,
            Failure::RolledBack { failure, .. } => return code_of(failure.as_ref()),
            Failure::Host(host) => return code_of(host),
            Failure::Gpu(gpu) | Failure::OnGpu { error: gpu, .. } => return code_of(gpu),
            Failure::Store(store) => return code_of(store),
            Failure::Setup(setup) => return code_of(setup),
            Failure::Cgroup(cgroup) => return code_of(cgroup),
            Failure::Driver(_) => Exit::Unavailable,
            Failure::Spec { .. } => Exit::Io,
        });
    }
    if let Some(gpu) = cause.downcast_ref::<GpuError>() {
        return Some(match gpu {
            GpuError::NoPermission { .. } => Exit::NotAllowed,
            GpuError::NoRoom { .. } | GpuError::InUse { .. } => Exit::NoRoom,
            GpuError::NotOffered(_) => Exit::BadRequest,
            _ => Exit::Unavailable,
        });
    }
    if cause.is::<HostError>() {
        return Some(Exit::Unavailable);
    }
    if let Some(store) = cause.downcast_ref::<StoreError>() {
        return Some(match store {
            StoreError::Busy { .. } => Exit::NoRoom,
            StoreError::NotRoot { .. } => Exit::NotAllowed,
            _ => Exit::Io,
        });
    }
    if let Some(bundle) = cause.downcast_ref::<BundleError>() {
        return Some(match bundle {
            BundleError::Read { .. } | BundleError::Replace { .. } => Exit::Io,
            _ => Exit::BadRequest,
        });
    }
    if let Some(container) = cause.downcast_ref::<ContainerError>() {
        return Some(match container {
            ContainerError::Refused(_) => Exit::NotAllowed,
            ContainerError::Failed { .. } => Exit::Io,
        });
    }
    if cause.is::<RequestError>() || cause.is::<ConfigFault>() {
        return Some(Exit::BadRequest);
    }
    if let Some(config) = cause.downcast_ref::<ConfigError>() {
        return Some(match config {
            ConfigError::Incomplete { .. } | ConfigError::NoSession { .. } => Exit::Unavailable,
            _ => Exit::Config,
        });
    }
    if cause.is::<Refused>() {
        return Some(Exit::NotAllowed);
    }
    if cause.is::<Unusable>() {
        return Some(Exit::BadRequest);
    }
    if let Some(io) = cause.downcast_ref::<io::Error>() {
        let forbidden = matches!(io.kind(), io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem);
        return Some(if forbidden { Exit::NotAllowed } else { Exit::Io });
    }
    cause.is::<Misused>().then_some(Exit::Usage)
}

/// A refusal for safety's sake.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Refused(pub String);

/// A file, or a part of this installation, that can't be used as it is.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Unusable(pub String);

/// A wrong command line.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Misused(pub String);

/// Has a panic reported like any other error: on stderr and in the journal.
pub fn report_panics() {
    std::panic::set_hook(Box::new(|info| {
        let line = format!("a mistake in mig-hook: {info}");
        eprintln!("mig-hook: {line}");
        to_socket(Path::new("/dev/log"), Level::ERROR, &line);
    }));
}

/// Where log lines and audit lines of one process go.
struct Lines {
    /// A person's command: log lines go to stderr.
    person: bool,
    /// Log lines beyond it are left out; audit lines never are.
    level: Level,
    /// journald's or syslogd's datagram socket.
    socket: PathBuf,
    /// `log.audit_file`.
    audit: Option<PathBuf>,
}

/// Starts logging: to stderr for a person's command, to the journal for a hook or shim. Audit lines (target `audit`) also
/// go to the journal whatever the way in, and to `log.audit_file`.
pub fn start_logging(settings: &Settings, person: bool) {
    let level = settings.level.parse().unwrap_or(Level::INFO);
    let lines = Lines { person, level, socket: settings.log_socket.clone(), audit: settings.audit_file.clone() };
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(level.max(Level::INFO)) // of audit lines
        .with_ansi(false)
        .event_format(Plain)
        .with_writer(lines)
        .finish();
    let _ = tracing::subscriber::set_global_default(subscriber); // a second call in a test process changes nothing
}

/// One event as `message key=value`: no time and no level, journald has them.
struct Plain;

impl<S: Subscriber + for<'a> LookupSpan<'a>, N: for<'a> FormatFields<'a> + 'static> FormatEvent<S, N> for Plain {
    fn format_event(&self, _: &FmtContext<'_, S, N>, mut writer: Writer<'_>, event: &Event<'_>) -> std::fmt::Result {
        struct Fields {
            message: String,
            rest: String,
        }
        impl Visit for Fields {
            fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
                let _ = match field.name() {
                    "message" => write!(self.message, "{value:?}"),
                    name => write!(self.rest, " {name}={value:?}"),
                };
            }
        }
        let mut fields = Fields { message: String::new(), rest: String::new() };
        event.record(&mut fields);
        writeln!(writer, "{}{}", fields.message, fields.rest)
    }
}

impl<'a> MakeWriter<'a> for Lines {
    type Writer = Line<'a>;
    fn make_writer(&'a self) -> Line<'a> {
        Line { lines: self, level: Level::INFO, audit: false }
    }
    fn make_writer_for(&'a self, meta: &tracing::Metadata<'_>) -> Line<'a> {
        Line { lines: self, level: *meta.level(), audit: meta.target() == "audit" }
    }
}

/// Writes one event. tracing gives it whole, in one call.
struct Line<'a> {
    lines: &'a Lines,
    level: Level,
    audit: bool,
}

impl io::Write for Line<'_> {
    fn write(&mut self, text: &[u8]) -> io::Result<usize> {
        if !self.audit && self.level > self.lines.level {
            return Ok(text.len());
        }
        let line = String::from_utf8_lossy(text);
        match self.lines.person && !self.audit {
            true => eprint!("migctl: {line}"),
            false => to_socket(&self.lines.socket, self.level, line.trim_end()),
        }
        if let Some(path) = self.lines.audit.as_deref().filter(|_| self.audit) {
            let append =
                OpenOptions::new().append(true).create(true).mode(0o640).custom_flags(libc::O_NOFOLLOW).open(path);
            // One write: lines of concurrent processes don't mix.
            append.and_then(|mut file| file.write_all(text))?;
        }
        Ok(text.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// One line to journald or syslogd (RFC 3164, facility daemon). Never waits and never fails: a full or missing log must
/// not stop a container.
fn to_socket(path: &Path, level: Level, line: &str) {
    let severity = match level {
        Level::ERROR => 3,
        Level::WARN => 4,
        Level::INFO => 6,
        _ => 7,
    };
    let message = format!("<{}>mig-hook[{}]: {line}", (3 << 3) | severity, std::process::id());
    if let Ok(socket) = UnixDatagram::unbound() {
        let _ = socket.set_nonblocking(true);
        let _ = socket.send_to(message.as_bytes(), path);
    }
}

/// The whole cause chain on one line; a cause that the sentence before it quotes already is not said twice.
pub fn sentence(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if !text.contains(&cause) {
            let joint = if text.is_empty() { "" } else { ": " };
            text.extend([joint, &cause]);
        }
    }
    text.replace('\n', " ")
}

/// Appends a runc-style error record to the runtime's `--log` file, the only place where docker and containerd look. The
/// file may lie in a directory of the engine's: a link in its place is not followed.
pub fn to_runtime_log(log: &Path, json: bool, message: &str) {
    let time = humantime::format_rfc3339_seconds(std::time::SystemTime::now());
    let line = match json {
        true => serde_json::json!({"level": "error", "msg": message, "time": time.to_string()}).to_string(),
        false => format!("time=\"{time}\" level=error msg={message:?}"),
    };
    let mut options = OpenOptions::new();
    options.append(true).create(true).mode(0o644).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
    let _ = options.open(log).and_then(|mut file| writeln!(file, "{line}"));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_record_is_one_that_containerd_reads() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log.json");
        to_runtime_log(&log, true, "no room for \"7g.80gb\"");
        let record: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(&log).unwrap()).unwrap();
        assert_eq!(
            (record["level"].as_str(), record["msg"].as_str()),
            (Some("error"), Some("no room for \"7g.80gb\""))
        );
    }

    #[test]
    fn a_link_in_the_logs_place_is_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let canary = dir.path().join("canary");
        std::fs::write(&canary, "").unwrap();
        std::os::unix::fs::symlink(&canary, dir.path().join("log.json")).unwrap();
        to_runtime_log(&dir.path().join("log.json"), true, "x");
        assert_eq!(std::fs::read_to_string(&canary).unwrap(), "");
    }

    #[test]
    fn codes_tell_the_kinds_apart() {
        let code = |failure: Failure| exit_code(&anyhow::Error::from(failure).context("while"));
        assert_eq!(code(Failure::BadRequest("x".into())), Exit::BadRequest);
        assert_eq!(code(Failure::NoRoom("x".into())), Exit::NoRoom);
        assert_eq!(code(Failure::Gpu(GpuError::NoPermission { call: "x" })), Exit::NotAllowed);
        assert_eq!(code(Failure::Gpu(GpuError::Lost { call: "x" })), Exit::Unavailable);
        assert_eq!(exit_code(&anyhow::anyhow!("x")), Exit::Internal);
    }

    #[test]
    fn a_missing_log_socket_stops_nothing() {
        to_socket(Path::new("/nonexistent/log"), Level::INFO, "x");
    }
}
