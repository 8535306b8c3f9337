//! Slurm: whether a job gets its slices, sees them, gives them back, and whether Slurm counts what there is.
//!
//! Nothing of Slurm's is started or asked: its files say what its daemons read.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use glob::{MatchOptions, Pattern};

use super::gpus::Seen;
use super::root::Root;
use super::{Check, listed, quoted};
use crate::config::Settings;
use crate::gpu::MigMode;
use crate::slurm::conf::{self as slurm_conf, Conf};
use crate::slurm::counts::{ASKED, Board, Cluster, Node};

/// Where slurm.conf lies: packages, Debian before bookworm, built by hand, and the caches of slurmd without files of its own.
const DIRS: [&str; 7] = [
    "/etc/slurm",
    "/etc/slurm-llnl",
    "/usr/local/etc",
    "/run/slurm/conf",
    "/var/spool/slurmd/conf-cache",
    "/var/spool/slurm/conf-cache",
    "/var/lib/slurm/slurmd/conf-cache",
];
const SLURMD: [&str; 3] = ["/usr/sbin", "/usr/local/sbin", "/opt/slurm/sbin"];
/// How long Prolog and Epilog may take at least, in seconds: what they wait for a lock and for the driver.
const TIMEOUT: u64 = 30;
/// Where our scripts for Slurm lie, in any prefix.
const SCRIPTS: &str = "mig-hook/slurm/";
const LINES: &str = "migctl slurm config prints the lines for this node";

/// Slurm on this node, as its files say.
pub(super) struct Slurm {
    installed: bool,
    conf: Option<(PathBuf, Conf)>,
    /// gres.conf, also where there is no slurm.conf.
    pub gres: Option<(PathBuf, Conf)>,
    cgroup: Option<(PathBuf, Conf)>,
    oci: Option<(PathBuf, Conf)>,
    helpers: Option<(PathBuf, Conf)>,
    host: String,
}

pub(super) fn read(root: &Root) -> Slurm {
    let text = |path: &Path| root.read(path).ok();
    let at = |path: PathBuf| Some((path.clone(), Conf::read(&path, &text)?));
    let named = std::env::var_os("SLURM_CONF").map(PathBuf::from);
    let usual = || DIRS.iter().find_map(|dir| at(Path::new(dir).join("slurm.conf")));
    let conf = named.and_then(at).or_else(usual);
    let dir = conf.as_ref().and_then(|(path, _)| path.parent()).map(Path::to_owned);
    let beside = |name: &str| at(dir.as_ref()?.join(name));
    let gres = match &dir {
        Some(_) => beside("gres.conf"),
        None => DIRS.iter().find_map(|dir| at(Path::new(dir).join("gres.conf"))),
    };
    Slurm {
        installed: root.program("slurmd", &SLURMD).is_some(),
        gres,
        cgroup: beside("cgroup.conf"),
        oci: beside("oci.conf"),
        helpers: beside("helpers.conf"),
        conf,
        host: host(root),
    }
}

/// The name that slurmd looks for: that of the machine, up to the first dot.
fn host(root: &Root) -> String {
    let file = if root.is_here() { "/proc/sys/kernel/hostname" } else { "/etc/hostname" };
    let name = root.read(file).unwrap_or_default();
    name.trim().split('.').next().unwrap_or_default().to_owned()
}

pub(super) fn checks(slurm: &Slurm, root: &Root, settings: &Settings, gpus: &[Seen]) -> Vec<Check> {
    let id = "slurm.conf";
    let Some((file, conf)) = &slurm.conf else {
        return vec![match slurm.installed {
            false => Check::skip(id, "Slurm is not installed"),
            true => {
                Check::skip(id, format!("slurmd, but no slurm.conf in {}: SLURM_CONF names another", DIRS.join(", ")))
            }
        }];
    };
    let programs = ["prolog", "epilog", "task-prolog"].map(|stage| program(conf, file, root, stage));
    let in_oci = slurm.oci.as_ref().is_some_and(|(_, oci)| oci.value("runtimerun").is_some_and(ours));
    let types = conf.words("grestypes");
    if !programs.iter().any(Program::is_ours) && !in_oci && !types.iter().any(|name| name.starts_with(ASKED)) {
        return vec![Check::skip(
            id,
            format!("{}: Slurm knows nothing of mig-hook (migctl slurm config)", root.shown(file)),
        )];
    }
    let [prolog, epilog, task_prolog] = programs;
    let mut checks = vec![included(root, file, conf)];
    checks.push(calls("prolog", &prolog, Check::fail, "jobs get no slice"));
    checks.push(calls("epilog", &epilog, Check::warn, "what a job had is only found by gc, some time after its end"));
    checks.push(calls("task-prolog", &task_prolog, Check::fail, "jobs are not told which slice is theirs"));
    checks.extend([
        flags(conf),
        tracking(conf),
        task_plugin(conf),
        devices(slurm, root, settings.confine),
        submission(conf),
    ]);
    checks.push(timeouts(conf, settings.job_wait));
    let node = node_of(slurm, settings, gpus);
    let kinds = Cluster::of(std::slice::from_ref(&node)).kinds().to_vec();
    checks.push(types_of(&types, &kinds));
    checks.push(counts(conf, &node, &kinds));
    checks.extend(slurm.oci.as_ref().map(|(path, oci)| containers(&root.shown(path), oci, &|p| root.is_program(p))));
    checks.extend(reboots(conf, slurm.helpers.as_ref().map(|(_, helpers)| helpers)));
    checks
}

fn included(root: &Root, file: &Path, conf: &Conf) -> Check {
    let (id, file) = ("slurm.conf", root.shown(file));
    let unread: Vec<String> = conf.unread.iter().map(|path| root.shown(path)).collect();
    match unread.is_empty() {
        true => Check::ok(id, format!("{file} of cluster {}", conf.value("clustername").unwrap_or("(no name)"))),
        false => Check::warn(
            id,
            format!("{file} includes {}, which can't be read: what follows may be wrong", listed(&unread)),
            "put it there, or take the Include out: slurmd does not start like this",
        ),
    }
}

// ---- what Slurm runs ----

/// What is known of a program that Slurm runs for us.
enum Program {
    /// It is ours, or it calls ours.
    Ours(PathBuf),
    /// It is named and can't be run.
    Missing(String),
    /// Others can write it; that may be ours, or may not.
    Writable(String),
    /// None of those that are named calls us.
    Others(Vec<String>),
}

impl Program {
    fn is_ours(&self) -> bool {
        match self {
            Program::Ours(_) => true,
            Program::Missing(path) => path.contains(SCRIPTS),
            Program::Writable(_) | Program::Others(_) => false,
        }
    }
}

/// Who is run as Prolog, Epilog or TaskProlog: a file, or all that a pattern fits.
fn program(conf: &Conf, file: &Path, root: &Root, stage: &str) -> Program {
    let key = stage.replace('-', "");
    let named = conf.lines(&key).filter_map(|line| line.value(&key)).map(|name| file.with_file_name(name));
    let files: Vec<PathBuf> = named.flat_map(|path| matching(root, path)).collect();
    let mut others = Vec::new();
    let mut writable = None;
    for path in files {
        let shown = root.shown(&path);
        if !root.is_program(&path) {
            return Program::Missing(shown);
        }
        match (root.metadata(&path).is_ok_and(|meta| is_safe(meta.uid(), meta.mode())), root.read(&path)) {
            (true, Ok(text)) if mentions(&text, stage) => return Program::Ours(path),
            (false, _) => writable = Some(shown),
            _ => others.push(shown),
        }
    }
    writable.map_or(Program::Others(others), Program::Writable)
}

/// glob(7) in the last part of a path, as sites use it: `/etc/slurm/prolog.d/*`.
fn matching(root: &Root, path: PathBuf) -> Vec<PathBuf> {
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    if !name.contains(['*', '?', '[']) {
        return vec![path];
    }
    let (Some(dir), Ok(pattern)) = (path.parent(), Pattern::new(&name)) else { return vec![] };
    let options = MatchOptions { require_literal_leading_dot: true, ..MatchOptions::new() };
    let fits = |path: &PathBuf| pattern.matches_with(&path.file_name().unwrap_or_default().to_string_lossy(), options);
    root.list(dir).into_iter().filter(fits).filter(|path| root.is_program(path)).collect()
}

fn is_safe(uid: u32, mode: u32) -> bool {
    (uid == 0 || uid == nix::unistd::geteuid().as_raw()) && mode & 0o022 == 0
}

/// Whether a script calls us at a stage: `migctl slurm prolog`, or our script for it.
fn mentions(script: &str, stage: &str) -> bool {
    let lines = || script.lines().filter(|line| !line.trim_start().starts_with('#'));
    let any = |text: &str| lines().any(|line| line.contains(text));
    any(&format!("{SCRIPTS}{stage}")) || (any("migctl") && any(&format!("slurm {stage}")))
}

fn calls(stage: &str, program: &Program, wrong: fn(String, String, String) -> Check, without: &str) -> Check {
    let id = format!("slurm.{stage}");
    let key = match stage {
        "prolog" => "Prolog",
        "epilog" => "Epilog",
        _ => "TaskProlog",
    };
    let set =
        format!("{key}=/usr/libexec/mig-hook/slurm/{stage} in slurm.conf, or call migctl slurm {stage} from yours");
    match program {
        Program::Ours(path) => Check::ok(id, format!("{key} is {}, which calls mig-hook", path.display())),
        Program::Missing(path) => {
            Check::fail(id, format!("{key} is {path}, which is not there, or can't be run: {without}"), set)
        }
        Program::Writable(path) => Check::warn(
            id,
            format!("{key} is {path}, which others than root can write: it was not read"),
            format!("chown root:root {path} && chmod 755 {path}", path = quoted(path)),
        ),
        Program::Others(files) if files.is_empty() => wrong(id, format!("{key} is not set: {without}"), set),
        Program::Others(files) => {
            wrong(id, format!("{key} is {}, and does not call mig-hook: {without}", listed(files)), set)
        }
    }
}

// ---- how jobs live and what they see ----

fn flags(conf: &Conf) -> Check {
    let id = "slurm.prolog-flags";
    let flags = conf.words("prologflags");
    let has = |flag: &str| flags.iter().any(|word| word == flag);
    match has("contain") || has("x11") {
        true => Check::ok(id, "PrologFlags has Contain: a job has processes from its beginning to its end"),
        false => Check::fail(
            id,
            "PrologFlags has no Contain: an allocation without steps (salloc) shows no sign of life, and loses its slices",
            "PrologFlags=Contain in slurm.conf; it implies Alloc, which is too little",
        ),
    }
}

fn tracking(conf: &Conf) -> Check {
    let id = "slurm.proctrack";
    match conf.value("proctracktype").map(str::to_ascii_lowercase).as_deref() {
        // What the packages are built with where there are cgroups: slurm.conf(5).
        None | Some("proctrack/cgroup") => Check::ok(id, "ProctrackType is proctrack/cgroup"),
        Some(other) => Check::warn(
            id,
            format!("ProctrackType is {other}: what a job leaves running outlives it, and keeps its slice"),
            "ProctrackType=proctrack/cgroup in slurm.conf, when no job runs",
        ),
    }
}

fn task_plugin(conf: &Conf) -> Check {
    let id = "slurm.task-plugin";
    match conf.words("taskplugin").iter().any(|word| word == "cgroup") {
        true => Check::ok(id, "TaskPlugin has task/cgroup"),
        false => Check::warn(
            id,
            "TaskPlugin has no task/cgroup: Slurm keeps no device from a job",
            "TaskPlugin=task/cgroup,task/affinity in slurm.conf",
        ),
    }
}

/// Device rules of Slurm's own are about what gres.conf lists, which slices that come and go are not. Ours are put on the
/// cgroup that Slurm makes for its own, where cgroups are v1.
fn devices(slurm: &Slurm, root: &Root, confine: bool) -> Check {
    let id = "slurm.devices";
    let (file, constrains) = match &slurm.cgroup {
        Some((file, conf)) => (root.shown(file), conf.value("constraindevices").is_some_and(is_yes)),
        None => ("cgroup.conf (there is none)".to_owned(), false),
    };
    let open = "a job that does not use the slice it is told can open others'";
    match (constrains, confine) {
        (true, true) => Check::ok(
            id,
            format!("{file} has ConstrainDevices=yes, and jobs.confine is set: jobs open their own slices only"),
        ),
        (true, false) => Check::ok(
            id,
            format!("{file} has ConstrainDevices=yes, for what gres.conf lists; jobs.confine is for slices"),
        ),
        (false, true) => Check::warn(
            id,
            format!("{file} has no ConstrainDevices=yes, and jobs.confine is set: with cgroup v1 every job is refused"),
            format!("ConstrainDevices=yes in {file}"),
        ),
        (false, false) => Check::warn(
            id,
            format!("{file} has no ConstrainDevices=yes: {open}"),
            format!("ConstrainDevices=yes in {file}, and in the settings of mig-hook: [jobs] confine = true"),
        ),
    }
}

/// As Slurm's s_p_handle_boolean.
fn is_yes(value: &str) -> bool {
    ["yes", "up", "true", "1"].contains(&value.to_ascii_lowercase().as_str())
}

fn submission(conf: &Conf) -> Check {
    let id = "slurm.lua";
    let lua = |key: &str| conf.words(key).iter().any(|word| word == "lua");
    let missing: Vec<String> = [("jobsubmitplugins", "JobSubmitPlugins"), ("clifilterplugins", "CliFilterPlugins")]
        .iter()
        .filter(|(key, _)| !lua(key))
        .map(|(_, name)| (*name).to_owned())
        .collect();
    match missing.is_empty() {
        true => Check::ok(id, "JobSubmitPlugins (for the controller) and CliFilterPlugins have lua"),
        false => Check::warn(
            id,
            format!("{} has no lua: --gres=mig:PROFILE is not understood", listed(&missing)),
            "JobSubmitPlugins=lua and CliFilterPlugins=lua in slurm.conf; migctl slurm config prints both scripts",
        ),
    }
}

fn timeouts(conf: &Conf, wait: Duration) -> Check {
    let id = "slurm.timeout";
    let needed = TIMEOUT + wait.as_secs();
    let keys = ["PrologEpilogTimeout", "PrologTimeout", "EpilogTimeout"];
    let set = keys.iter().filter_map(|key| Some((key, conf.value(&key.to_ascii_lowercase())?.parse::<u64>().ok()?)));
    let short: Vec<String> = set.filter(|(_, s)| *s < needed).map(|(key, s)| format!("{key} is {s} s")).collect();
    match (short.is_empty(), wait.is_zero()) {
        (true, _) => Check::ok(id, format!("Prolog and Epilog may take {needed} s and more")),
        (false, true) => Check::warn(
            id,
            format!("{}: a driver that is slow to cut then drains the node", listed(&short)),
            format!("at least {needed} in slurm.conf, or leave it out"),
        ),
        (false, false) => Check::fail(
            id,
            format!(
                "{}, and jobs.wait {} s: a job that waits for room drains the node",
                listed(&short),
                wait.as_secs()
            ),
            format!("at least {needed} in slurm.conf, or leave it out; or a shorter jobs.wait in the settings"),
        ),
    }
}

// ---- what Slurm counts ----

fn types_of(types: &[String], kinds: &[String]) -> Check {
    let id = "slurm.gres-types";
    let wanted: Vec<String> = std::iter::once(ASKED.to_owned()).chain(kinds.iter().cloned()).collect();
    let missing: Vec<String> = wanted.iter().filter(|name| !types.contains(name)).cloned().collect();
    match missing.is_empty() {
        true => Check::ok(id, format!("GresTypes has {}", listed(&wanted))),
        false => Check::fail(
            id,
            format!("GresTypes has no {}: jobs that ask are refused, or are not counted", listed(&missing)),
            format!("GresTypes={} in slurm.conf, with what else it has; {LINES}", wanted.join(",")),
        ),
    }
}

/// Whether we cut it.
fn is_cut(gpu: &Seen) -> bool {
    gpu.managed && gpu.device.mig == MigMode::On
}

/// This host, as `migctl slurm config` sees it.
fn node_of(slurm: &Slurm, settings: &Settings, gpus: &[Seen]) -> Node {
    let cut = gpus.iter().filter(|gpu| is_cut(gpu));
    let boards = cut.filter_map(|gpu| Board::of(&gpu.device, settings.profiles.as_deref()));
    Node { node: slurm.host.clone(), cluster: String::new(), gpus: boards.collect() }
}

/// What slurm.conf says that this node has, beside what its GPUs can be cut into: what this node alone has to be counted by,
/// and what other nodes of the cluster make count.
fn counts(conf: &Conf, node: &Node, kinds: &[String]) -> Check {
    let (id, host) = ("slurm.node", &node.node);
    let Some((name, gres)) = gres_of(conf, host) else {
        return Check::skip(id, format!("slurm.conf has no NodeName={host}: this machine runs no jobs"));
    };
    if node.gpus.is_empty() {
        return Check::skip(id, format!("node {name}: no GPU to compare its Gres with"));
    }
    let mut said: BTreeMap<String, u64> = BTreeMap::new();
    for gres in slurm_conf::gres(&gres) {
        *said.entry(gres.name).or_default() += gres.count;
    }
    let there: BTreeMap<String, u64> = node.counts().into_iter().map(|(kind, n)| (kind, n.into())).collect();
    let of = |counts: &BTreeMap<String, u64>, kind: &String| counts.get(kind).copied().unwrap_or(0);
    let extra = said.keys().filter(|kind| !kinds.contains(kind) && there.contains_key(*kind));
    let counted: Vec<&String> = kinds.iter().chain(extra).collect();
    let written = |counts: &BTreeMap<String, u64>| {
        let all: Vec<String> = counted.iter().map(|kind| format!("{kind}:{}", of(counts, kind))).collect();
        all.join(",")
    };
    let (says, is) = (written(&said), written(&there));
    let remedy = format!("Gres={is} in slurm.conf; {LINES}");
    let any = |wrong: fn(u64, u64) -> bool| counted.iter().any(|kind| wrong(of(&said, kind), of(&there, kind)));
    if any(|said, there| said == 0 && there > 0) {
        let found = format!("node {name} has Gres={says}, and its GPUs {is}: jobs that ask never start here");
        return Check::fail(id, found, remedy);
    }
    if any(|said, there| said > there) {
        let found = format!(
            "node {name} has Gres={says}, and its GPUs only {is}: Slurm starts jobs for which there is no room"
        );
        return Check::fail(id, found, remedy);
    }
    match any(|said, there| said < there) {
        true => Check::warn(
            id,
            format!("node {name} has Gres={says}, and its GPUs {is}: the rest is never given out"),
            remedy,
        ),
        false => Check::ok(id, format!("node {name} has Gres={says}: what its GPUs can be cut into")),
    }
}

/// The name of this host's node and its resources.
fn gres_of(conf: &Conf, host: &str) -> Option<(String, String)> {
    let mut default = "";
    for line in conf.lines("nodename") {
        let name = line.value("nodename").unwrap_or_default();
        let gres = line.value("gres");
        if name.eq_ignore_ascii_case("default") {
            default = gres.unwrap_or(default);
        } else if slurm_conf::has(name, host) || line.value("nodehostname").is_some_and(|h| slurm_conf::has(h, host)) {
            return Some((name.to_owned(), gres.unwrap_or(default).to_owned()));
        }
    }
    None
}

/// What Slurm gives out by itself of GPUs that we cut: in words. From gres.conf, and from slurm.conf.
pub(super) fn given_out(slurm: &Slurm, gpus: &[Seen]) -> Vec<String> {
    let any = gpus.iter().any(is_cut);
    let mut found = Vec::new();
    for line in slurm.gres.iter().flat_map(|(_, conf)| conf.lines("name").chain(conf.lines("nodename"))) {
        let here = line.value("nodename").is_none_or(|nodes| slurm_conf::has(nodes, &slurm.host));
        if !here || !line.value("name").is_some_and(|name| name.eq_ignore_ascii_case("gpu")) {
            continue;
        }
        let files = line.value("multiplefiles").or(line.value("file")).unwrap_or_default();
        let node = |gpu: &&Seen| slurm_conf::has(files, &format!("/dev/nvidia{}", gpu.device.minor));
        let named: Vec<&Seen> = gpus.iter().filter(node).collect();
        let kind = line.value("type").unwrap_or("no type");
        let is_slice = is_mig(kind) || files.contains("/nvidia-caps/");
        if named.iter().any(|gpu| is_cut(gpu)) || (is_slice && named.is_empty() && any) {
            let what = if is_slice { format!("gpu of {kind}") } else { format!("gpu: {files}") };
            found.push(what);
        }
    }
    let (_, gres) = slurm.conf.as_ref().and_then(|(_, conf)| gres_of(conf, &slurm.host)).unwrap_or_default();
    let typed = slurm_conf::gres(&gres).into_iter().filter(|gres| gres.name == "gpu").filter_map(|gres| gres.kind);
    found.extend(typed.filter(|kind| any && is_mig(kind)).map(|kind| format!("gpu of {kind}")));
    found.sort();
    found.dedup();
    found
}

/// Whether a type of gpu is that of a slice: Slurm takes the name of a profile, or some part of it (`a100_3g.20gb`).
fn is_mig(kind: &str) -> bool {
    let kind = kind.to_ascii_lowercase();
    let last = kind.rsplit('_').next().unwrap_or(&kind);
    let number = last.split_once("g.").map(|(slices, memory)| (slices, memory.split("gb").next().unwrap_or_default()));
    number.is_some_and(|(slices, memory)| slices.parse::<u32>().is_ok() && memory.parse::<u32>().is_ok())
}

// ---- srun --container ----

fn is_runtime(word: &str) -> bool {
    Path::new(word).file_name().is_some_and(|name| name == "mig-runtime")
}

fn ours(command: &str) -> bool {
    command.split_whitespace().next().is_some_and(is_runtime)
}

fn containers(file: &str, oci: &Conf, is_program: &dyn Fn(&Path) -> bool) -> Check {
    let id = "slurm.oci";
    let command = |key: &str| oci.value(key).unwrap_or_default();
    let wrong = |found: String| Check::fail(id, found, format!("take the lines of migctl slurm config for {file}"));
    let run = command("runtimerun");
    if run.is_empty() && !command("runtimecreate").is_empty() {
        return wrong(format!(
            "{file} has RunTimeCreate and RunTimeStart: with runc the step hangs; RunTimeRun does not"
        ));
    }
    if !ours(run) {
        let found = format!("{file}: srun --container runs without mig-runtime, and gets no slice");
        return Check::warn(id, found, format!("migctl slurm config prints the lines for {file}"));
    }
    let program = Path::new(run.split_whitespace().next().unwrap_or_default());
    if program.is_absolute() && !is_program(program) {
        return wrong(format!("{file} names {}, which is not there: srun --container fails", program.display()));
    }
    if !run.split_whitespace().any(|word| word == "--mig-job" || word.starts_with("--mig-job=")) {
        return wrong(format!("RunTimeRun in {file} has no --mig-job: mig-runtime does not know whose slice to take"));
    }
    let around: Vec<String> = [("RunTimeQuery", "runtimequery"), ("RunTimeDelete", "runtimedelete")]
        .iter()
        .filter(|(_, key)| !command(key).is_empty() && !ours(command(key)))
        .map(|(name, _)| (*name).to_owned())
        .collect();
    if !around.is_empty() {
        let found =
            format!("{} in {file} goes around mig-runtime: every step of a container prints errors", listed(&around));
        return Check::warn(id, found, format!("take the lines of migctl slurm config for {file}"));
    }
    let kill = command("runtimekill");
    if !kill.split_whitespace().any(|word| ["KILL", "SIGKILL", "9", "-9"].contains(&word)) {
        return Check::warn(
            id,
            format!(
                "RunTimeKill in {file} does not say KILL: a container whose first process ignores TERM survives its job"
            ),
            "end it in KILL, as: RunTimeKill=\"/usr/bin/mig-runtime … kill %n.%u.%j.%s.%t KILL\"",
        );
    }
    Check::ok(id, format!("{file}: srun --container runs {}", program.display()))
}

/// helpers.conf(5) shows MIG as its example: a change of the feature reboots the node.
fn reboots(conf: &Conf, helpers: Option<&Conf>) -> Option<Check> {
    let features = helpers.into_iter().flat_map(|helpers| {
        let lines = helpers.lines("feature").chain(helpers.lines("nodename"));
        lines.filter_map(|line| line.value("feature")).map(str::to_ascii_lowercase).collect::<Vec<_>>()
    });
    let mig =
        features.flat_map(|list| list.split(',').map(str::to_owned).collect::<Vec<_>>()).find(|f| f.starts_with("mig"));
    let mig = mig.filter(|_| conf.words("nodefeaturesplugins").iter().any(|word| word == "helpers"))?;
    Some(Check::warn(
        "slurm.features",
        format!("helpers.conf has the feature {mig}: a job that asks for another one reboots the node"),
        "take the feature out of helpers.conf: slices are cut without a reboot",
    ))
}

#[cfg(test)]
mod tests {
    use super::super::Status;
    use super::*;
    use crate::gpu::{Engines, Placement, Profile, ProfileId};

    fn conf(text: &str) -> Conf {
        Conf::read(Path::new("/etc/slurm/slurm.conf"), &|_| Some(text.to_owned())).unwrap()
    }

    fn said(check: &Check) -> String {
        format!("{}\n{}", check.found, check.remedy.as_deref().unwrap_or_default())
    }

    fn nothing() -> Slurm {
        Slurm { installed: false, conf: None, gres: None, cgroup: None, oci: None, helpers: None, host: String::new() }
    }

    /// An A100, or an A30, as far as it matters here.
    fn gpu(index: u32, slices: u32, size: u32) -> Seen {
        let mut device = crate::gpu::tests::device(index);
        let profile = |slices, starts: &[u32], size| Profile {
            id: ProfileId(slices),
            name: format!("{slices}g.10gb"),
            slices,
            memory_mib: 9728,
            sms: 14,
            engines: Engines::default(),
            p2p: false,
            max_instances: 7,
            placements: starts.iter().map(|start| Placement { start: *start, size }).collect(),
        };
        device.profiles =
            vec![profile(1, &[0, 1, 2, 3], 1), Profile { max_instances: 1, ..profile(slices, &[0], size) }];
        Seen { device, managed: true, persistence: None, processes: vec![], users: vec![] }
    }

    #[test]
    fn a_script_calls_us_or_is_ours() {
        for (script, is) in [
            ("#!/bin/sh\nexec /usr/bin/migctl slurm prolog\n", true),
            ("MIGCTL=/usr/bin/migctl\n[ -x $MIGCTL ] && $MIGCTL slurm prolog || true\n", true),
            ("/usr/local/libexec/mig-hook/slurm/prolog\n", true),
            ("#!/bin/sh\n# migctl slurm prolog\nexit 0\n", false),
            ("echo the slurm prolog\n", false),
            ("migctl slurm epilog\n", false),
            ("", false),
        ] {
            assert_eq!(mentions(script, "prolog"), is, "{script}");
        }
    }

    #[test]
    fn programs_are_found_by_file_and_by_pattern() {
        let dir = tempfile::tempdir().unwrap();
        let put = |path: &str, text: &str, mode: u32| {
            let path = dir.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(&path, text).unwrap();
            std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(mode)).unwrap();
        };
        put("etc/slurm/prolog.d/10-site", "true", 0o755);
        put("etc/slurm/prolog.d/50-mig", "migctl slurm prolog", 0o755);
        put("etc/slurm/epilog.d/50-mig", "migctl slurm epilog", 0o644);
        put("etc/slurm/open", "migctl slurm prolog", 0o777);
        let root = Root::at(dir.path()).unwrap();
        let of = |text: &str, stage: &str| program(&conf(text), Path::new("/etc/slurm/slurm.conf"), &root, stage);
        assert!(of("Prolog=/etc/slurm/prolog.d/*", "prolog").is_ours());
        assert!(of("Prolog=prolog.d/50-mig", "prolog").is_ours(), "beside slurm.conf");
        assert!(of("Prolog=/gone/mig-hook/slurm/prolog", "prolog").is_ours(), "meant to be");
        assert!(matches!(of("Prolog=/gone", "prolog"), Program::Missing(_)));
        assert!(matches!(of("Prolog=/etc/slurm/open", "prolog"), Program::Writable(_)));
        assert!(matches!(of("Prolog=prolog.d/1*", "prolog"), Program::Others(files) if files.len() == 1));
        assert!(
            matches!(of("Epilog=epilog.d/*", "epilog"), Program::Others(files) if files.is_empty()),
            "not executable"
        );
        assert!(matches!(of("", "task-prolog"), Program::Others(files) if files.is_empty()));
        assert!(matches!(of("TaskProlog=/etc/slurm/prolog.d/[", "task-prolog"), Program::Others(_)));
    }

    #[test]
    fn settings_that_cost_slices_are_told() {
        for (text, check, status, part) in [
            ("PrologFlags=Alloc,Contain", flags as fn(&Conf) -> Check, Status::Ok, ""),
            ("PrologFlags=x11", flags, Status::Ok, ""),
            ("PrologFlags=Alloc", flags, Status::Fail, "PrologFlags=Contain"),
            ("", flags, Status::Fail, "salloc"),
            ("", tracking, Status::Ok, ""),
            ("ProctrackType=proctrack/linuxproc", tracking, Status::Warn, "proctrack/cgroup"),
            ("TaskPlugin=affinity,cgroup", task_plugin, Status::Ok, ""),
            ("TaskPlugin=task/none", task_plugin, Status::Warn, "task/cgroup"),
            ("JobSubmitPlugins=all,lua\nCliFilterPlugins=cli_filter/lua", submission, Status::Ok, ""),
            ("JobSubmitPlugins=lua", submission, Status::Warn, "CliFilterPlugins has no lua"),
        ] {
            let check = check(&conf(text));
            assert!(check.status == status && said(&check).contains(part), "{text}: {check:?}");
        }
        for (text, wait, status, part) in [
            ("", 600, Status::Ok, ""),
            ("PrologEpilogTimeout=30", 0, Status::Ok, ""),
            ("PrologEpilogTimeout=29\nEpilogTimeout=5", 0, Status::Warn, "is 29 s and EpilogTimeout is 5 s"),
            ("PrologTimeout=600", 600, Status::Fail, "at least 630"),
        ] {
            let check = timeouts(&conf(text), Duration::from_secs(wait));
            assert!(check.status == status && said(&check).contains(part), "{text}: {check:?}");
        }
        let kinds = ["migc".to_owned(), "migm".into(), "mig4g10gb".into()];
        let types = |names: &str| types_of(&names.split(',').map(str::to_owned).collect::<Vec<_>>(), &kinds);
        assert_eq!(types("gpu,mig,mig4g10gb,migc,migm").status, Status::Ok);
        assert!(said(&types("gpu,migc,migm")).contains("no mig and mig4g10gb"));
    }

    #[test]
    fn a_node_has_what_its_gpus_can_be_cut_into() {
        let slurm = Slurm { host: "n1".into(), ..nothing() };
        let gpus = [gpu(0, 7, 8), gpu(1, 4, 4), Seen { managed: false, ..gpu(2, 7, 8) }];
        let node = node_of(&slurm, &Settings::default(), &gpus);
        // Eleven compute slices are two of 4g, which fits once.
        let kinds = Cluster::of(std::slice::from_ref(&node)).kinds().to_vec();
        assert_eq!(kinds, ["migc", "migm", "mig4g10gb"]);
        let own = "mig4g10gb:1";
        for (text, status, part) in [
            (format!("NodeName=DEFAULT Gres=migc:11,migm:12,{own}\nNodeName=n[1-9] CPUs=4"), Status::Ok, "node n[1-9]"),
            (format!("NodeName=x NodeHostname=n1 Gres=gpu:2,migc:a:7,migc:b:4,migm:12,{own}"), Status::Ok, "node x"),
            (format!("NodeName=n1 Gres=migc:11,migm:12,{own},mig7g10gb:1,mig9:7"), Status::Ok, "mig7g10gb:1"),
            (format!("NodeName=n1 Gres=migc:11,migm:12,{own},mig7g10gb:2"), Status::Fail, "only migc:11,migm:12"),
            (format!("NodeName=n1 Gres=migc:18,migm:20,{own}"), Status::Fail, "only migc:11,migm:12"),
            (format!("NodeName=n1 Gres=migc:10,migm:12,{own}"), Status::Warn, "never given out"),
            ("NodeName=n1 Gres=migc:11,migm:12".to_owned(), Status::Fail, "mig4g10gb:0"),
            ("NodeName=n1".to_owned(), Status::Fail, "Gres=migc:11,migm:12,mig4g10gb:1 in slurm.conf"),
            (format!("NodeName=n2 Gres=migc:11,migm:12,{own}"), Status::Skip, "no NodeName=n1"),
        ] {
            let check = counts(&conf(&text), &node, &kinds);
            assert!(check.status == status && said(&check).contains(part), "{text}: {check:?}");
        }
        let none = node_of(&slurm, &Settings::default(), &gpus[2..]);
        assert_eq!(counts(&conf("NodeName=n1"), &none, &[]).status, Status::Skip);
    }

    #[test]
    fn what_slurm_gives_out_of_our_gpus_is_named() {
        let gpus = [gpu(0, 7, 8), Seen { managed: false, ..gpu(1, 7, 8) }];
        let found = |slurm: &str, gres: &str| {
            let at = |text: &str| Some((PathBuf::from("/etc/slurm/x.conf"), conf(text)));
            let slurm = Slurm { conf: at(slurm), gres: at(gres), host: "n1".into(), ..nothing() };
            given_out(&slurm, &gpus).join("; ")
        };
        assert_eq!(found("NodeName=n1 Gres=migc:7,migm:8", "Name=migc Count=7\nName=migm Count=8"), "");
        let slice = "Name=gpu Type=1g.10gb MultipleFiles=/dev/nvidia0,/dev/nvidia-caps/nvidia-cap21";
        assert_eq!(found("", slice), "gpu of 1g.10gb");
        assert_eq!(found("", &format!("NodeName=n[1-3] {slice}")), "gpu of 1g.10gb");
        assert_eq!(found("", &format!("NodeName=n2 {slice}")), "");
        assert_eq!(found("", &slice.replace("nvidia0", "nvidia1")), "", "a GPU that is not ours");
        assert_eq!(found("", "Name=gpu File=/dev/nvidia[0-1]"), "gpu: /dev/nvidia[0-1]");
        assert_eq!(found("", "Name=gpu File=/dev/nvidia1"), "");
        assert_eq!(found("NodeName=n1 Gres=gpu:a100_3g.20gb:2,gpu:a100:1", ""), "gpu of a100_3g.20gb");
        assert!(is_mig("1g.10gb+me") && is_mig("nvidia_a100_80gb_pcie_2g.20gb") && !is_mig("a100") && !is_mig("mig.g"));
    }

    #[test]
    fn containers_go_through_mig_runtime() {
        let right = "RunTimeQuery=\"/usr/bin/mig-runtime --mig-job slurm:x:%j state %n\"\nRunTimeKill=\"/usr/bin/mig-runtime \
                     kill %n KILL\"\nRunTimeRun=\"/usr/bin/mig-runtime --mig-job slurm:x:%j run %n -b %b\"\n";
        let check = |text: &str, there: bool| containers("oci.conf", &conf(text), &|_| there);
        assert_eq!(check(right, true).status, Status::Ok);
        for (text, there, status, part) in [
            (right.to_owned(), false, Status::Fail, "which is not there"),
            (
                right.replace("run %n -b", "RUN").replace("--mig-job slurm:x:%j RUN", "run -b"),
                true,
                Status::Fail,
                "--mig-job",
            ),
            (right.replace("RunTimeRun", "RunTimeCreate"), true, Status::Fail, "RunTimeRun does not"),
            (right.replace("n KILL", "n"), true, Status::Warn, "does not say KILL"),
            (right.replace("y=\"/usr/bin/mig-runtime", "y=\"runc"), true, Status::Warn, "RunTimeQuery"),
            ("RunTimeRun=\"runc run %n\"".to_owned(), true, Status::Warn, "without mig-runtime"),
        ] {
            let check = check(&text, there);
            assert!(check.status == status && said(&check).contains(part), "{text}: {check:?}");
        }
    }

    #[test]
    fn a_feature_that_reboots_is_told() {
        let helpers = conf("NodeName=n1 Feature=a,mig=on Helper=/usr/local/bin/mig");
        let plugin = conf("NodeFeaturesPlugins=node_features/helpers");
        assert!(said(&reboots(&plugin, Some(&helpers)).unwrap()).contains("the feature mig=on"));
        assert_eq!(reboots(&conf(""), Some(&helpers)), None);
        assert_eq!(reboots(&plugin, Some(&conf("Feature=nps1,nps2 Helper=/x"))), None);
        assert_eq!(reboots(&plugin, None), None);
    }
}
