//! `migctl configure`: registers mig-runtime, or podman's hook, in an engine's own configuration, and takes it out again.
//!
//! What becomes of a file's text is decided in one file an engine, text in, text out; `file.rs` reads and writes.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use clap::ValueEnum;
use serde::Serialize;
use similar::TextDiff;

use crate::config::Settings;
use crate::first;
use crate::report::{Exit, Misused, Unusable};

mod containerd;
mod crio;
mod docker;
mod file;
pub(super) mod podman;
mod tables;

use file::Target;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The engine to configure
    engine: Engine,
    /// The file to edit [default: the engine's own, or a drop-in beside it]
    #[arg(long, value_name = "PATH")]
    file: Option<PathBuf>,
    /// Name of the runtime or handler
    #[arg(long, default_value = "mig")]
    name: String,
    /// The low-level runtime below mig-runtime: a path, a program's name, or (docker) a runtime of that file
    #[arg(long, value_name = "PATH|NAME", conflicts_with = "remove")]
    runtime: Option<String>,
    /// Make it docker's default runtime; requests in the environment do not count then
    #[arg(long, conflicts_with = "remove")]
    default: bool,
    /// Take it out again
    #[arg(long)]
    remove: bool,
    /// Show what would change, and change nothing
    #[arg(long)]
    dry_run: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub(super) enum Engine {
    /// A runtime in /etc/docker/daemon.json
    Docker,
    /// The precreate hook and a runtime, in /etc/containers/containers.conf.d/50-mig-hook.conf
    Podman,
    /// A runtime handler of CRI in /etc/containerd/config.toml
    Containerd,
    /// A runtime handler in /etc/crio/crio.conf.d/50-mig-hook.conf
    Crio,
}

/// What an entry of ours says: everything in it that is not the same in every entry of its engine.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Entry {
    pub name: String,
    /// mig-runtime. Empty: there is no runtime of that name, but another part of the entry.
    pub shim: String,
    /// docker's `runtimeArgs`.
    pub args: Vec<String>,
    /// docker: it is the default runtime. containerd: it comes with the handler that is built in otherwise.
    pub default: bool,
    /// podman's `hooks_dir`, ours among them.
    pub hooks: Vec<String>,
    /// Keys of a handler that are taken over from the engine's default one, each with its value as TOML.
    pub keys: Vec<(String, String)>,
}

/// What is known of the host when an entry is made up.
struct Host<'a> {
    name: &'a str,
    /// mig-runtime.
    shim: &'a str,
    /// The directory with podman's hook.
    hooks_dir: &'a str,
    /// A settings file other than the default one.
    config: Option<&'a str>,
    /// `--default`.
    default: bool,
    /// Files that the engine reads before the one that is edited.
    earlier: &'a [(PathBuf, String)],
    /// The low-level runtime by its name, path or default.
    low_level: &'a dyn Fn(Option<&str>) -> Result<PathBuf>,
    /// `--runtime`.
    runtime: Option<&'a str>,
}

/// The document of `migctl configure`.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(super) struct Report {
    engine: Engine,
    /// Of the runtime or handler.
    name: String,
    /// The file that is edited.
    file: PathBuf,
    outcome: Outcome,
    /// Nothing was written.
    dry_run: bool,
    /// Unified; empty where nothing changes.
    diff: String,
    /// The copy of the file as it was before, where there is one now.
    backup: Option<PathBuf>,
    /// What makes the engine read it.
    next: Option<String>,
    /// What an admin should know, in words.
    notes: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
enum Outcome {
    /// Our entry is in the file now.
    Configured,
    /// It was there already.
    Unchanged,
    /// The file is what it was before we came, byte for byte, or gone if there was none.
    Restored,
    /// Our entry is taken out of a file that somebody has changed since.
    Removed,
    /// There was nothing to remove.
    Absent,
}

enum Backup {
    /// The file as it is now.
    Make,
    Leave,
    Drop,
}

/// What is to become of the file.
struct Plan {
    outcome: Outcome,
    /// `None`: no file.
    after: Option<String>,
    backup: Backup,
    notes: Vec<String>,
}

pub(super) fn run(settings: &Settings, args: &Args, json: bool) -> Result<Exit> {
    check(args)?;
    let target = Target::open(args.file.as_deref().unwrap_or(Path::new(args.engine.file())))?;
    let plan = match args.remove {
        true => removal(args, &target),
        false => registration(settings, args, &target),
    };
    let plan = plan.with_context(|| format!("{} is unchanged", target.path.display()))?;
    let changes = !matches!(plan.outcome, Outcome::Unchanged | Outcome::Absent);
    if changes && !args.dry_run {
        target.carry_out(plan.after.as_deref(), &plan.backup)?;
    }
    let report = Report {
        engine: args.engine,
        name: args.name.clone(),
        file: target.path.clone(),
        outcome: plan.outcome,
        dry_run: args.dry_run,
        diff: diff(&target, plan.after.as_deref()),
        backup: target.backup.exists().then(|| target.backup.clone()),
        next: changes.then(|| args.engine.reload(target.text.as_deref(), plan.after.as_deref())).flatten(),
        notes: plan.notes,
    };
    super::print(&report, json, text)?;
    Ok(Exit::Ok)
}

fn check(args: &Args) -> Result<()> {
    if args.default && args.engine != Engine::Docker {
        bail!(Misused("--default is for docker only: other engines hand mig-runtime no options".into()));
    }
    // Engines know the low-level runtimes by their own names; an entry of ours would replace one.
    if !first::plain_name(&args.name) || first::RUNTIMES.contains(&args.name.as_str()) {
        let reason = format!("--name {:?} can't be used: a plain name that is no low-level runtime's own", args.name);
        bail!(Misused(reason));
    }
    Ok(())
}

/// The entries of ours in a file, and what is known of how they came there.
struct Known {
    present: Vec<Entry>,
    /// The one of this name was there before migctl came: made by hand.
    by_hand: bool,
    /// Those that are not in the backup: migctl's.
    ours: Vec<Entry>,
    /// The file is what `ours` makes of the backup, or of no file where there is no backup.
    untouched: bool,
}

impl Known {
    fn of(engine: Engine, target: &Target, name: &str) -> Result<Known, String> {
        let (text, backup) = (target.text.as_deref(), target.backup_text.as_deref());
        let present = engine.entries(text, name)?;
        let before = engine.entries(backup, name).unwrap_or_default();
        let ours: Vec<Entry> = present.iter().filter(|entry| !before.contains(entry)).cloned().collect();
        let untouched = !ours.is_empty() && engine.apply_all(backup, &ours).ok().as_deref() == text;
        Ok(Known { present, by_hand: before.iter().any(|entry| entry.name == name), ours, untouched })
    }
}

/// Puts our entry in. Where the file is as we left it, the entry is made anew from the file as it was before us.
fn registration(settings: &Settings, args: &Args, target: &Target) -> Result<Plan> {
    let engine = args.engine;
    let Known { present, mut ours, untouched, .. } = Known::of(engine, target, &args.name).map_err(Unusable)?;
    let base = if untouched { target.backup_text.as_deref() } else { target.text.as_deref() };
    let mut notes = Vec::new();
    let wanted = wanted(settings, args, target, base, &mut notes)?;
    if present.contains(&wanted) {
        return Ok(Plan { outcome: Outcome::Unchanged, after: target.text.clone(), backup: Backup::Leave, notes });
    }
    let backup = match untouched {
        true => Backup::Leave,
        false if target.text.is_none() && target.backup_text.is_some() => bail!(Unusable(format!(
            "the file is gone, but {} has what it was: move it back, or delete it, then run this again",
            target.backup.display()
        ))),
        false if ours.is_empty() || target.backup_text.is_none() => Backup::Make,
        false => Backup::Leave,
    };
    if !untouched {
        ours.clear(); // they are in the text already
    }
    if engine == Engine::Docker && wanted.default {
        ours.iter_mut().for_each(|entry| entry.default = false); // there is only one
    }
    match ours.iter_mut().find(|entry| entry.name == wanted.name) {
        Some(entry) => *entry = wanted.clone(),
        None => ours.push(wanted.clone()),
    }
    let after = engine.apply_all(base, &ours).map_err(Unusable)?;
    if engine.find(&after, &args.name).ok().flatten().as_ref() != Some(&wanted) {
        bail!("a mistake in mig-hook: what it would write can't be read back:\n{after}");
    }
    Ok(Plan { outcome: Outcome::Configured, after: Some(after), backup, notes })
}

/// What the entry must say on this host.
fn wanted(
    settings: &Settings,
    args: &Args,
    target: &Target,
    base: Option<&str>,
    notes: &mut Vec<String>,
) -> Result<Entry> {
    let engine = args.engine;
    let shim = shim()?;
    let hooks_dir = hooks_dir();
    let config = settings.file.as_deref().filter(|file| *file != Path::new(first::SETTINGS)).map(utf8).transpose()?;
    let host = Host {
        name: &args.name,
        shim: utf8(&shim)?,
        hooks_dir: utf8(&hooks_dir)?,
        config,
        default: args.default,
        earlier: &target.earlier(engine.reads_first(), engine == Engine::Podman)?,
        low_level: &|given| low_level(given, settings, &shim),
        runtime: args.runtime.as_deref(),
    };
    if engine == Engine::Docker {
        return docker::wanted(base, &host, notes);
    }
    let low_level = only_by_settings(engine, settings, &host, notes)?;
    if engine == Engine::Podman {
        podman_notes(&host, target, notes)?;
    }
    let entry = match engine {
        Engine::Podman => podman::wanted(base, &host),
        Engine::Containerd => containerd::wanted(base, &host, notes),
        _ => crio::wanted(&host, &low_level),
    };
    Ok(entry.map_err(Unusable)?)
}

fn removal(args: &Args, target: &Target) -> Result<Plan> {
    let engine = args.engine;
    let Known { present, by_hand, ours, untouched } = Known::of(engine, target, &args.name).map_err(Unusable)?;
    let plan = |outcome, after, backup, note: Option<String>| Plan {
        outcome,
        after,
        backup,
        notes: note.into_iter().collect(),
    };
    let (Some(text), true) = (&target.text, present.iter().any(|entry| entry.name == args.name)) else {
        let left = format!("{} is left from before; delete it if it is not needed", target.backup.display());
        let note = target.backup_text.as_ref().filter(|_| ours.is_empty()).map(|_| left);
        return Ok(plan(Outcome::Absent, target.text.clone(), Backup::Leave, note));
    };
    let others: Vec<Entry> = ours.into_iter().filter(|entry| entry.name != args.name).collect();
    let backup = if others.is_empty() { Backup::Drop } else { Backup::Leave };
    let before = target.backup_text.as_deref();
    if !untouched || by_hand {
        let after = engine.remove(text, &args.name, before).map_err(Unusable)?;
        let note = "the file is not as migctl left it: only what mig-hook needs was taken out, the rest stays";
        return Ok(plan(Outcome::Removed, Some(after), backup, Some(note.into())));
    }
    if others.is_empty() {
        return Ok(plan(Outcome::Restored, target.backup_text.clone(), backup, None));
    }
    let after = engine.apply_all(before, &others).map_err(Unusable)?;
    Ok(plan(Outcome::Removed, Some(after), backup, None))
}

impl Engine {
    fn file(self) -> &'static str {
        match self {
            Engine::Docker => "/etc/docker/daemon.json",
            Engine::Podman => "/etc/containers/containers.conf.d/50-mig-hook.conf",
            Engine::Containerd => "/etc/containerd/config.toml",
            Engine::Crio => "/etc/crio/crio.conf.d/50-mig-hook.conf",
        }
    }

    /// What it reads before a drop-in, besides that drop-in's own neighbours.
    fn reads_first(self) -> &'static [&'static str] {
        match self {
            Engine::Podman => &[
                "/usr/share/containers/containers.conf",
                "/etc/containers/containers.conf",
                "/etc/containers/containers.conf.d",
            ],
            _ => &[],
        }
    }

    /// The entry of that name, if it is ours; an error if it is another's or the text can't be read.
    fn find(self, text: &str, name: &str) -> Result<Option<Entry>, String> {
        match self {
            Engine::Docker => docker::find(text, name),
            Engine::Podman => podman::find(text, name),
            Engine::Containerd => containerd::find(text, name),
            Engine::Crio => crio::find(text, name),
        }
    }

    /// The text with that entry, whether or not one was there.
    fn apply(self, text: Option<&str>, entry: &Entry) -> Result<String, String> {
        match self {
            Engine::Docker => docker::apply(text, entry),
            Engine::Podman => podman::apply(text, entry),
            Engine::Containerd => containerd::apply(text, entry),
            Engine::Crio => crio::apply(text, entry),
        }
    }

    /// The text without our entry; `original` is the file before we came, if it is known.
    fn remove(self, text: &str, name: &str, original: Option<&str>) -> Result<String, String> {
        match self {
            Engine::Docker => docker::remove(text, name, original),
            Engine::Podman => podman::remove(text, name, original),
            Engine::Containerd => containerd::remove(text, name, original),
            Engine::Crio => crio::remove(text, name),
        }
    }

    /// Every entry of ours, in the order of the file; one of that name must not be another's.
    pub(super) fn entries(self, text: Option<&str>, name: &str) -> Result<Vec<Entry>, String> {
        let Some(text) = text else { return Ok(vec![]) };
        let mut names = match self {
            Engine::Docker => docker::names(text),
            Engine::Podman => podman::names(text),
            Engine::Containerd => containerd::names(text),
            Engine::Crio => crio::names(text),
        }?;
        if !names.iter().any(|known| known == name) {
            names.push(name.to_owned());
        }
        let found = names.iter().map(|name| self.find(text, name)).collect::<Result<Vec<_>, _>>()?;
        Ok(found.into_iter().flatten().collect())
    }

    fn apply_all(self, text: Option<&str>, entries: &[Entry]) -> Result<String, String> {
        let mut text = text.map(str::to_owned);
        for entry in entries {
            text = Some(self.apply(text.as_deref(), entry)?);
        }
        Ok(text.unwrap_or_default())
    }

    fn reload(self, before: Option<&str>, after: Option<&str>) -> Option<String> {
        match self {
            Engine::Docker if docker::reload_is_enough(before, after) => Some("systemctl reload docker".into()),
            Engine::Docker => Some("systemctl restart docker".into()),
            Engine::Podman => None,
            Engine::Containerd => Some("systemctl restart containerd".into()),
            Engine::Crio => Some("systemctl restart crio".into()),
        }
    }
}

/// mig-runtime, which is installed beside migctl.
pub(super) fn shim() -> Result<PathBuf> {
    let exe = std::env::current_exe().context("cannot tell where migctl itself is")?;
    let path = exe.with_file_name("mig-runtime");
    match path.is_file() {
        true => Ok(path),
        false => bail!(Unusable(format!("there is no {}; install mig-hook completely: make install", path.display()))),
    }
}

/// Where `make install` puts podman's hook, seen from migctl.
fn hooks_dir() -> PathBuf {
    let exe = std::env::current_exe().unwrap_or_default();
    let prefix = exe.parent().and_then(Path::parent).unwrap_or(Path::new("/usr"));
    let here = prefix.join(podman::HOOKS);
    if here.is_dir() { here } else { Path::new("/usr").join(podman::HOOKS) }
}

/// The low-level runtime that is named by its path or name, else by the settings, else the one that is installed.
pub(super) fn low_level(given: Option<&str>, settings: &Settings, shim: &Path) -> Result<PathBuf> {
    let path = match given {
        Some(path) if path.contains('/') => PathBuf::from(path),
        Some(name) => first::installed(name).ok_or_else(|| {
            Misused(format!("no low-level runtime {name}: neither a program where runtimes lie nor an absolute path"))
        })?,
        None => first::low_level_runtime(&first::Plan::default(), settings.runtime.as_deref()).map_err(Unusable)?,
    };
    if !path.is_absolute() || !path.is_file() {
        bail!(Misused(format!("the low-level runtime {} must be the absolute path of a program", path.display())));
    }
    if path.canonicalize().ok() == shim.canonicalize().ok() {
        bail!(Misused(format!("the low-level runtime {} is mig-runtime itself", path.display())));
    }
    Ok(path)
}

/// Engines that hand their runtime no options of ours: what an option would say must be in the settings.
fn only_by_settings(engine: Engine, settings: &Settings, host: &Host, notes: &mut Vec<String>) -> Result<PathBuf> {
    let engine = engine.to_possible_value().map_or_else(String::new, |v| v.get_name().to_owned());
    if let Some(config) = host.config {
        bail!(Misused(format!(
            "{engine} starts mig-runtime without options, so it reads {} only: put the settings of {config} there, and \
             leave out --config",
            first::SETTINGS
        )));
    }
    let path = (host.low_level)(host.runtime)?;
    if host.runtime.is_some() && settings.runtime.as_ref() != Some(&path) {
        bail!(Misused(format!(
            "{engine} starts mig-runtime without options: write [runtime] path = \"{}\" into {}, and leave out --runtime",
            path.display(),
            first::SETTINGS
        )));
    }
    if settings.runtime.is_none() {
        let shown = path.display();
        notes
            .push(format!("the low-level runtime is {shown}, as found; [runtime] path in {} pins it", first::SETTINGS));
    }
    Ok(path)
}

fn podman_notes(host: &Host, target: &Target, notes: &mut Vec<String>) -> Result<()> {
    if !podman::has_hook(Path::new(host.hooks_dir)) {
        notes.push(format!("no hook in {}: requests will be ignored until make install puts it there", host.hooks_dir));
    }
    for (path, text) in target.later()? {
        if podman::replaces(&text, host.hooks_dir).map_err(Unusable)? {
            let path = path.display();
            notes.push(format!("{path} is read later and sets hooks_dir, too: add \"{}\" to it", host.hooks_dir));
        }
    }
    if let Some(file) = std::env::var_os("CONTAINERS_CONF") {
        let file = Path::new(&file).display();
        notes.push(format!("CONTAINERS_CONF={file} is set here: podman reads that file and no drop-in while it is"));
    }
    notes.push(
        "users' own podman reads this file too, unless their ~/.config/containers sets hooks_dir; cutting a slice takes \
         root"
            .into(),
    );
    Ok(())
}

fn utf8(path: &Path) -> Result<&str> {
    path.to_str().ok_or_else(|| anyhow!(Misused(format!("{} is no UTF-8: configuration files are", path.display()))))
}

fn diff(target: &Target, after: Option<&str>) -> String {
    let before = target.text.as_deref();
    let name = |text: Option<&str>| text.map_or("/dev/null".to_owned(), |_| target.path.display().to_string());
    let (old, new) = (before.unwrap_or_default(), after.unwrap_or_default());
    TextDiff::from_lines(old, new).unified_diff().header(&name(before), &name(after)).to_string()
}

fn text(report: &Report) -> String {
    let (name, file) = (&report.name, report.file.display());
    let would = if report.dry_run { "would be " } else { "" };
    let mut out = report.diff.clone();
    out += &match report.outcome {
        Outcome::Configured => format!("{file}: {name} {would}configured\n"),
        Outcome::Unchanged => format!("{file}: {name} is already configured\n"),
        Outcome::Restored => format!("{file}: {would}as it was before {name} was configured\n"),
        Outcome::Removed => format!("{file}: {name} {would}removed\n"),
        Outcome::Absent => format!("{file}: {name} is not configured, nothing to remove\n"),
    };
    if let (Some(backup), Outcome::Configured) = (&report.backup, report.outcome) {
        out += &format!("before: {}\n", backup.display());
    }
    if let Some(next) = &report.next {
        out += &format!("next: {next}\n");
    }
    for note in &report.notes {
        out += &format!("note: {note}\n");
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A host with runc, where everything is installed below /usr.
    pub(super) fn host<'a>(name: &'a str, earlier: &'a [(PathBuf, String)]) -> Host<'a> {
        Host {
            name,
            shim: "/usr/bin/mig-runtime",
            hooks_dir: "/usr/share/mig-hook/hooks.d/podman",
            config: None,
            default: false,
            earlier,
            low_level: &|given| Ok(given.unwrap_or("/usr/bin/runc").into()),
            runtime: None,
        }
    }

    fn wanted(engine: Engine, base: Option<&str>, name: &str) -> Entry {
        let (host, mut notes) = (host(name, &[]), vec![]);
        match engine {
            Engine::Docker => docker::wanted(base, &host, &mut notes).unwrap(),
            Engine::Podman => podman::wanted(base, &host).unwrap(),
            Engine::Containerd => containerd::wanted(base, &host, &mut notes).unwrap(),
            Engine::Crio => crio::wanted(&host, Path::new("/usr/bin/runc")).unwrap(),
        }
    }

    /// What the text says, in whatever form; `None` for no file.
    fn meaning(engine: Engine, text: Option<&str>) -> serde_json::Value {
        let text = text.unwrap_or_default();
        match engine {
            Engine::Docker if text.trim().is_empty() => serde_json::json!({}),
            Engine::Docker => serde_json::from_str(text).unwrap(),
            _ => serde_json::to_value(toml::from_str::<toml::Table>(text).unwrap()).unwrap(),
        }
    }

    /// Everything that must hold for any file of an engine that has no entry of ours.
    fn holds(engine: Engine, original: Option<&str>) {
        let entry = wanted(engine, original, "mig");
        let after = engine.apply(original, &entry).unwrap();
        let shown = format!("{engine:?}\n{}\n-- after --\n{after}", original.unwrap_or("(none)"));
        assert_eq!(engine.find(&after, "mig").unwrap().as_ref(), Some(&entry), "{shown}");
        assert_eq!(engine.apply(Some(&after), &entry).unwrap(), after, "twice is once: {shown}");

        // A second name beside it.
        let second = wanted(engine, Some(&after), "second");
        let both = engine.apply(Some(&after), &second).unwrap();
        let entries = engine.entries(Some(&both), "mig").unwrap();
        assert_eq!(entries.len(), 2, "{both}\n{shown}");
        assert_eq!(engine.apply_all(original, &entries).as_ref(), Ok(&both), "what is there says how it came: {shown}");
        let one = engine.remove(&both, "second", original).unwrap();
        assert_eq!(engine.entries(Some(&one), "mig").unwrap(), [entry], "{both}\n{shown}");

        let mut before = meaning(engine, original);
        let mut left = meaning(engine, Some(&engine.remove(&after, "mig", original).unwrap()));
        for empty in [&mut before, &mut left] {
            prune(empty);
            // A file of ours gets a version; it keeps it.
            if engine == Engine::Containerd && original.is_none_or(|text| !text.contains("version")) {
                empty.as_object_mut().unwrap().remove("version");
            }
        }
        assert_eq!(left, before, "taken out again: {shown}");

        let text = original.unwrap_or_default();
        if !text.trim().is_empty() {
            assert_eq!(after.ends_with('\n'), text.ends_with('\n'), "{shown}");
        }
        if text.contains("\r\n") {
            assert_eq!(after.matches('\n').count(), after.matches("\r\n").count(), "{shown}");
        }
        for comment in text.lines().filter(|line| line.trim_start().starts_with('#')) {
            assert!(after.contains(comment), "{comment}: {shown}");
        }
    }

    /// Tables with nothing in them say nothing.
    fn prune(value: &mut serde_json::Value) {
        if let Some(object) = value.as_object_mut() {
            object.values_mut().for_each(prune);
            object.retain(|_, value| value.as_object().is_none_or(|inner| !inner.is_empty()));
        }
    }

    const ENGINES: [Engine; 4] = [Engine::Docker, Engine::Podman, Engine::Containerd, Engine::Crio];

    #[test]
    fn no_file_an_empty_one_and_one_of_blanks() {
        for engine in ENGINES {
            for text in [None, Some(""), Some("\n"), Some("  \n\n")] {
                holds(engine, text);
            }
        }
    }

    #[test]
    fn a_text_that_is_none_of_the_engines_is_refused() {
        for (engine, text) in [
            (Engine::Docker, "{\"a\": 1,}"),
            (Engine::Docker, "// no JSON for docker\n{}"),
            (Engine::Docker, "[]"),
            (Engine::Docker, "{\"runtimes\": []}"),
            (Engine::Podman, "[engine\n"),
            (Engine::Podman, "engine = 3\n"),
            (Engine::Podman, "engine = {}\n"),
            (Engine::Containerd, "version = 2\nplugins = 3\n"),
            (Engine::Containerd, "version = 9\n"),
            (Engine::Containerd, "root = \"/x\"\n"),
            (Engine::Containerd, "version = 1\n"),
            (Engine::Crio, "crio = \"x\"\n"),
        ] {
            let entry = Entry {
                name: "mig".into(),
                shim: "/usr/bin/mig-runtime".into(),
                hooks: vec!["/usr/share/mig-hook/hooks.d/podman".into()],
                ..Entry::default()
            };
            let error = engine.apply(Some(text), &entry).expect_err(text);
            assert!(error.len() > 20 && !error.contains('\n'), "{text}: {error}");
        }
        let error = Engine::Podman.find("[a]\nb = 1\n\n[engine\n", "mig").unwrap_err();
        assert!(error.contains("line 4"), "{error}");
    }

    #[test]
    fn what_is_anothers_is_refused_with_its_name() {
        for (engine, text) in [
            (Engine::Docker, r#"{"runtimes": {"mig": {"path": "/opt/other"}}}"#),
            (Engine::Docker, r#"{"runtimes": {"mig": {"runtimeType": "io.containerd.runc.v2"}}}"#),
            (Engine::Podman, "[engine.runtimes]\nmig = [\"/opt/other\"]\n"),
            (
                Engine::Containerd,
                "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.mig]\nruntime_type = \"x\"\n",
            ),
            (Engine::Crio, "[crio.runtime.runtimes.mig]\nruntime_path = \"/opt/other\"\n"),
        ] {
            let error = engine.find(text, "mig").expect_err(text);
            assert!(error.contains("mig is another's") && error.contains("--name"), "{error}");
            assert_eq!(engine.find(text, "else").unwrap(), None);
        }
    }

    #[test]
    fn real_files_keep_what_they_say() {
        for text in docker::tests::FILES {
            holds(Engine::Docker, Some(text));
        }
        for text in podman::tests::FILES {
            holds(Engine::Podman, Some(text));
        }
        for text in containerd::tests::FILES {
            holds(Engine::Containerd, Some(text));
        }
        for text in crio::tests::FILES {
            holds(Engine::Crio, Some(text));
        }
    }

    fn json() -> impl Strategy<Value = serde_json::Value> {
        let leaf = prop_oneof![
            Just(serde_json::Value::Null),
            any::<bool>().prop_map(Into::into),
            any::<i64>().prop_map(Into::into),
            "\\PC{0,8}".prop_map(Into::into),
        ];
        leaf.prop_recursive(3, 20, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Into::into),
                prop::collection::btree_map("[a-z\"\\\\é]{1,5}", inner, 0..4)
                    .prop_map(|map| serde_json::Value::Object(map.into_iter().collect())),
            ]
        })
    }

    /// A daemon.json: any keys, perhaps runtimes of others and a default one, in one of the forms that people write.
    fn daemon_json() -> impl Strategy<Value = String> {
        let others =
            prop::collection::btree_map("[a-l]{1,6}", Just(serde_json::json!({"path": "/bin/x", "y": [1]})), 0..3);
        let keys = prop::collection::vec(("[a-q-]{1,8}", json()), 0..5);
        (keys, prop::option::of(others), any::<bool>(), 0..5).prop_map(|(keys, others, default, form)| {
            let mut object: serde_json::Map<_, _> = keys.into_iter().collect();
            let at = object.len() / 2;
            if let Some(others) = others {
                object.shift_insert(at, "runtimes".into(), serde_json::to_value(others).unwrap());
            }
            if default {
                object.shift_insert(0, "default-runtime".into(), "a".into());
            }
            let pretty = serde_json::to_string_pretty(&object).unwrap();
            match form {
                0 => serde_json::to_string(&object).unwrap(),
                1 => pretty,
                2 => pretty.replace("\n  ", "\n\t") + "\n",
                3 => pretty.replace('\n', "\r\n") + "\r\n",
                _ => format!("\n{}  \n\n", pretty.replace(": ", " :   ")),
            }
        })
    }

    /// A TOML file of these pieces, each of which may be missing; a piece is whole tables, so any choice is a file.
    fn toml_file(head: &'static str, pieces: &'static [&'static str]) -> impl Strategy<Value = String> {
        (prop::sample::subsequence(pieces, 0..=pieces.len()), any::<bool>(), any::<bool>()).prop_map(
            move |(pieces, dos, open)| {
                let mut text = head.to_owned() + &pieces.concat();
                if open {
                    text.truncate(text.trim_end().len());
                }
                if dos { text.replace('\n', "\r\n") } else { text }
            },
        )
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn any_daemon_json(text in daemon_json()) {
            holds(Engine::Docker, Some(&text));
        }

        #[test]
        fn any_containerd_v2(text in toml_file("# top\nversion = 2 # two\n", containerd::tests::PIECES)) {
            holds(Engine::Containerd, Some(&text));
        }

        #[test]
        fn any_containers_conf(text in toml_file("# top\n", podman::tests::PIECES)) {
            holds(Engine::Podman, Some(&text));
        }

        #[test]
        fn any_crio_conf(text in toml_file("", crio::tests::PIECES)) {
            holds(Engine::Crio, Some(&text));
        }

        #[test]
        fn any_text_is_refused_or_edited_without_panic(text in "[\\[\\]{}a-b.=\", \n\r#0-9]{0,40}") {
            for engine in ENGINES {
                if engine.find(&text, "mig") == Ok(None) && !matches!(engine, Engine::Containerd) {
                    let entry = wanted(engine, None, "mig");
                    if let Ok(after) = engine.apply(Some(&text), &entry) {
                        prop_assert_eq!(engine.find(&after, "mig"), Ok(Some(entry)));
                    }
                }
            }
        }
    }
}
