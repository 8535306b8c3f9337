//! `migctl doctor`: looks at everything that a slice depends on, says what is wrong, and what mends it.
//!
//! One file a group of checks. Each gathers its facts, whatever is missing or forbidden, and has a pure function say
//! what they mean. Nothing here changes anything, and nothing here fails.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anstyle::{AnsiColor, Style};
use anyhow::Result;
use serde::Serialize;

use crate::config::Settings;
use crate::engine::leases_in;
use crate::gpu::nvml::Nvml;
use crate::report::{self, Exit, Misused};

use super::counted;

mod driver;
mod engines;
mod gpus;
mod holders;
mod install;
mod nodes;
mod program;
mod rivals;
mod root;
mod runtimes;
mod settings;
mod slurm;
mod state;
mod system;

use root::Root;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Look at configuration and programs below DIR: a mounted image, or the host seen from a container
    ///
    /// Driver, GPUs, state and processes stay those of the settings and of this machine. Programs below DIR are not
    /// started.
    #[arg(long, value_name = "DIR")]
    root: Option<PathBuf>,
}

/// The document of `migctl doctor`.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(super) struct Report {
    /// Of the worst check.
    status: Status,
    /// Below what configuration and programs were looked for.
    root: PathBuf,
    /// In the order of the text.
    checks: Vec<Check>,
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
struct Check {
    /// `gpu.0.mig-mode`: the same in every version. Its first word is the group.
    id: String,
    /// How it stands.
    status: Status,
    /// What was found, in words.
    found: String,
    /// What mends it, in words; lines are apart by a line feed. Always there with `warn` and `fail`.
    remedy: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
enum Status {
    /// As it should be.
    Ok,
    /// Not looked at, or not there and not needed.
    Skip,
    /// Containers get slices, but something should be mended.
    Warn,
    /// Containers get no slices, some of them, or more than they should.
    Fail,
}

impl Check {
    fn new(id: impl Into<String>, status: Status, found: impl Into<String>, remedy: Option<String>) -> Check {
        Check { id: id.into(), status, found: found.into(), remedy }
    }

    fn ok(id: impl Into<String>, found: impl Into<String>) -> Check {
        Check::new(id, Status::Ok, found, None)
    }

    fn skip(id: impl Into<String>, found: impl Into<String>) -> Check {
        Check::new(id, Status::Skip, found, None)
    }

    fn warn(id: impl Into<String>, found: impl Into<String>, remedy: impl Into<String>) -> Check {
        Check::new(id, Status::Warn, found, Some(remedy.into()))
    }

    fn fail(id: impl Into<String>, found: impl Into<String>, remedy: impl Into<String>) -> Check {
        Check::new(id, Status::Fail, found, Some(remedy.into()))
    }

    fn group(&self) -> &str {
        self.id.split('.').next().unwrap_or_default()
    }
}

/// Looks at everything. Takes no settings: a file that can't be used is one of the things to tell.
pub(super) fn run(config: Option<&Path>, args: &Args, json: bool) -> Result<Exit> {
    let root = Root::at(args.root.as_deref().unwrap_or(Path::new("/")))
        .map_err(|error| Misused(format!("--root can't be looked at: {error}")))?;
    let (read, file) = settings::load(&root, config);
    let settings = read.as_ref().map_or_else(|_| Settings::default(), Clone::clone);
    report::start_logging(&Settings { level: "error".into(), ..settings.clone() }, true);

    let nvml = Nvml::at(&settings.nvml);
    let store = super::readable_state(&settings).ok().flatten();
    let leases = store.as_ref().and_then(|store| leases_in(store).ok()).unwrap_or_default();
    let gpus = gpus::read(&nvml, &settings);

    let mut checks = system::checks();
    checks.extend(driver::checks(&settings, &nvml));
    let cordons = store.as_ref().and_then(|store| store.cordons().ok()).unwrap_or_default();
    checks.extend(gpus::checks(&gpus, &settings, &leases, &cordons));
    checks.extend(nodes::checks(&settings, &gpus, &root));
    checks.extend(settings::checks(read.as_ref(), &file, &gpus));
    checks.extend(state::checks(&settings, &nvml));
    checks.extend(install::checks(&root));
    let engines = engines::read(&root);
    let runtimes = runtimes::read(&root, &settings, &engines);
    checks.extend(engines::checks(&engines, &root));
    checks.extend(runtimes::checks(&runtimes, &root));
    checks.extend(settings::exposure(&settings, &engines));
    let slurm = slurm::read(&root);
    checks.extend(slurm::checks(&slurm, &root, &settings, gpus.seen()));
    checks.extend(rivals::checks(&root, &slurm, gpus.seen()));
    checks.extend(holders::checks(&gpus, &settings, &leases));

    tell_apart(&mut checks);
    let report = Report { status: worst(&checks), root: root.path().to_owned(), checks };
    super::print(&report, json, text)?;
    Ok(match report.status {
        Status::Ok | Status::Skip => Exit::Ok,
        Status::Warn => Exit::NotSo,
        Status::Fail => Exit::Unavailable,
    })
}

/// Two findings of one kind (two files, two runtimes) get two ids: the second ends in `-2`.
fn tell_apart(checks: &mut [Check]) {
    let mut seen: BTreeMap<String, usize> = BTreeMap::new();
    for check in checks {
        let times = seen.entry(check.id.clone()).and_modify(|times| *times += 1).or_insert(1);
        if *times > 1 {
            check.id = format!("{}-{times}", check.id);
        }
    }
}

fn worst(checks: &[Check]) -> Status {
    let worst = checks.iter().map(|check| check.status).max().unwrap_or(Status::Ok);
    if worst == Status::Skip { Status::Ok } else { worst }
}

/// Titles of the groups, in order of first use.
fn title(group: &str) -> &str {
    match group {
        "gpu" => "GPUs",
        "nodes" => "device nodes",
        "install" => "mig-hook",
        "engine" => "container engines",
        "runtime" => "low-level runtimes",
        "exposure" => "who may ask",
        "slurm" => "Slurm",
        "rival" => "others that cut or give out slices",
        "holder" => "who holds slices",
        other => other,
    }
}

fn text(report: &Report) -> String {
    let mut out = String::new();
    let mut group = "";
    for check in &report.checks {
        if check.group() != group {
            group = check.group();
            out += &super::styled(Style::new().bold(), title(group));
            out.push('\n');
        }
        out += &format!("  {}  {}\n", label(check.status), super::printable(&check.found));
        for line in check.remedy.iter().flat_map(|remedy| remedy.lines()) {
            out += &format!("          {}\n", super::printable(line));
        }
    }
    out + &format!("{}\n", summary(&report.checks))
}

fn label(status: Status) -> String {
    let (word, style) = match status {
        Status::Ok => ("ok  ", AnsiColor::Green.on_default()),
        Status::Skip => ("-   ", Style::new().dimmed()),
        Status::Warn => ("warn", AnsiColor::Yellow.on_default()),
        Status::Fail => ("fail", AnsiColor::Red.on_default().bold()),
    };
    super::styled(style, word)
}

fn summary(checks: &[Check]) -> String {
    let count = |status| checks.iter().filter(|check| check.status == status).count();
    match (count(Status::Fail), count(Status::Warn)) {
        (0, 0) => "all is well".into(),
        (fails, warns) => format!("{}, {}", counted(fails, "failure"), counted(warns, "warning")),
    }
}

/// `a, b and c`, for sentences.
fn listed(words: &[String]) -> String {
    match words {
        [] => "nothing".into(),
        [one] => one.clone(),
        [first @ .., last] => format!("{} and {last}", first.join(", ")),
    }
}

/// A word as a shell reads it, for commands in remedies.
fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "_-./:=@,+%".contains(c);
    match !word.is_empty() && word.chars().all(plain) {
        true => word.to_owned(),
        false => format!("'{}'", word.replace('\'', r"'\''")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        let checks = vec![
            Check::ok("driver.module", "kernel module 580.95.05"),
            Check::fail("gpu.0.mig-mode", "MIG is off", "migctl mode on 0\nthen reset it"),
            Check::skip("gpu.1.mig-mode", "no MIG"),
        ];
        Report { status: worst(&checks), root: "/".into(), checks }
    }

    #[test]
    fn each_line_is_a_check_with_its_remedy_below() {
        let expected = "driver\n  ok    kernel module 580.95.05\nGPUs\n  fail  MIG is off\n          migctl mode on 0\n          \
                        then reset it\n  -     no MIG\n1 failure, 0 warnings\n";
        assert_eq!(crate::cli::plain(&text(&report())), expected);
        assert!(text(&report()).contains("\x1b[1m\x1b[31mfail\x1b[0m"), "{}", text(&report()));
        let mut hostile = report();
        hostile.checks[0].found = "a\x1b[2Jb\nc".into();
        assert!(text(&hostile).contains("a\u{fffd}[2Jb\u{fffd}c\n"));
    }

    #[test]
    fn the_worst_counts_and_what_was_left_out_does_not() {
        assert_eq!(report().status, Status::Fail);
        assert_eq!(worst(&[Check::skip("a.b", ""), Check::ok("a.c", "")]), Status::Ok);
        assert_eq!(worst(&[Check::warn("a.b", "", ""), Check::ok("a.c", "")]), Status::Warn);
    }

    #[test]
    fn no_id_is_there_twice() {
        let mut checks = [Check::ok("a.b", "1"), Check::ok("a.c", "2"), Check::ok("a.b", "3"), Check::ok("a.b", "4")];
        tell_apart(&mut checks);
        assert_eq!(checks.map(|check| check.id), ["a.b", "a.c", "a.b-2", "a.b-3"]);
    }

    #[test]
    fn words_in_commands_are_what_a_shell_reads() {
        assert_eq!(quoted("/dev/nvidia0"), "/dev/nvidia0");
        assert_eq!(quoted("/a b/it's"), r"'/a b/it'\''s'");
        assert_eq!(listed(&["a".into(), "b".into(), "c".into()]), "a, b and c");
    }
}
