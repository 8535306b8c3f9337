//! The first stage: is anything asked? If not, become the low-level runtime at once.
//!
//! Runs at every container start, so it is small and static: no NVML, clap or tracing, no lock, and nothing that a
//! dynamic loader could be talked into (docs/security.md). What it decides: where the verb of a runtime's command line
//! stands ([`plan`]), whether a config asks for a slice ([`asked`]), whether a container holds a lease.

use std::borrow::Cow;
use std::ffi::{OsStr, OsString};
use std::fs::{File, OpenOptions, TryLockError};
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use serde::Deserialize;
use serde::de::{IgnoredAny, MapAccess, SeqAccess, Visitor};

use crate::handover;

/// What `--version` says of every program: version, commit where `make build` knew it, target.
pub const VERSION: &str = env!("MIG_HOOK_VERSION");
/// Where the settings are looked for when no option names a file.
pub const SETTINGS: &str = "/etc/mig-hook/config.toml";
/// Where leases live when the settings name nothing else.
pub const STATE_DIR: &str = "/run/mig-hook";
/// Where the leases of a user without root live: below it, by uid (pam_systemd makes it, 0700).
const USER_STATE: &str = "/run/user";
/// Where mig-engine lies, seen from the directory of the first stage: beside it, or as `make install` puts them, from
/// PREFIX/bin and from PREFIX/libexec/oci/hooks.d.
pub const ENGINES: [&str; 3] = ["mig-engine", "../libexec/mig-hook/mig-engine", "../../mig-hook/mig-engine"];
/// Largest config.json that is read, in bytes. Real ones are 3–60 KB.
pub const CONFIG_LIMIT: u64 = 16 << 20;
/// Low-level runtimes in order of preference.
pub const RUNTIMES: [&str; 3] = ["runc", "crun", "youki"];
/// Where they are looked for. Never `$PATH`: docker's begins with directories of its own.
pub const RUNTIME_DIRS: [&str; 5] = ["/usr/bin", "/usr/sbin", "/usr/local/bin", "/usr/local/sbin", "/usr/libexec/crio"];

/// Options of our own, which stand before the runtime's and are not handed on.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Own {
    /// `--mig-env`: requests in the environment count.
    pub env: bool,
    /// `--mig-config FILE`.
    pub config: Option<PathBuf>,
    /// `--mig-runtime PATH`: the low-level runtime, pinned.
    pub runtime: Option<PathBuf>,
    /// `--mig-job KEY`: the container is one of that job of a batch system.
    pub job: Option<OsString>,
    /// `--mig-version`: our own version. `--version` is the runtime's, as engines read it.
    pub version: bool,
    /// Options that begin with `--mig-` and are none of ours.
    pub unknown: Vec<String>,
}

impl Own {
    /// Whether they can't be meant so: a job's containers ask for nothing themselves.
    pub fn are_wrong(&self) -> bool {
        !self.unknown.is_empty() || (self.env && self.job.is_some())
    }
}

/// A runtime's command line, as far as we care.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    /// Our own options.
    pub own: Own,
    /// The command line without our options and without argv\[0\].
    pub rest: Vec<OsString>,
    /// `--root`.
    pub root: Option<PathBuf>,
    /// `--log`.
    pub log: Option<PathBuf>,
    /// `--log-format json`.
    pub log_json: bool,
    /// crun's `--cgroup-manager disabled`.
    pub no_cgroup: bool,
    /// What is to be done.
    pub verb: Verb,
    /// `--bundle`; the current directory without it.
    pub bundle: Option<PathBuf>,
    /// crun's `create --config FILE`.
    pub config_file: Option<PathBuf>,
    /// `--pid-file`.
    pub pid_file: Option<PathBuf>,
    /// `exec --process FILE`.
    pub process: Option<PathBuf>,
    /// `--preserve-fds`.
    pub preserve_fds: u32,
    /// The container id: the first word after the verb's options.
    pub id: Option<OsString>,
}

/// The verbs that concern us. Everything else passes untouched.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Verb {
    /// `create`: the config may be edited.
    Create,
    /// `run`: the same.
    Run,
    /// `restore`: reuses a config that may carry edits of ours.
    Restore,
    /// `delete`.
    Delete,
    /// `exec`.
    Exec,
    /// `state`.
    State,
    /// `kill`.
    Kill,
    /// Anything else.
    #[default]
    Other,
}

/// Global options that take a value: runc, crun and youki together.
const GLOBAL_VALUES: [&str; 7] = ["root", "log", "log-format", "log-level", "criu", "rootless", "cgroup-manager"];
/// Options of create, run, restore, delete and exec that take a value: runc, crun and youki together.
const VERB_VALUES: [&str; 27] = [
    "bundle",
    "config",
    "console-socket",
    "pid-file",
    "preserve-fds",
    "process",
    "image-path",
    "work-path",
    "parent-path",
    "manage-cgroups-mode",
    "empty-ns",
    "status-fd",
    "page-server",
    "lsm-profile",
    "lsm-mount-context",
    "cwd",
    "env",
    "user",
    "additional-gids",
    "process-label",
    "apparmor",
    "cap",
    "cgroup",
    "criu",
    "root",
    "log",
    "log-format",
];
/// Flags of theirs that may be written with one dash, and are not letters written together then.
const VERB_FLAGS: [&str; 17] = [
    "all",
    "auto-dedup",
    "detach",
    "ext-unix-sk",
    "file-locks",
    "force",
    "help",
    "ignore-paused",
    "keep",
    "lazy-pages",
    "no-new-keyring",
    "no-new-privs",
    "no-pivot",
    "no-subreaper",
    "shell-job",
    "tcp-established",
    "tty",
];
/// Options of crun, which takes the beginning of a name for the name where no other begins so.
const CRUN_GLOBALS: [&str; 12] = [
    "cgroup-manager",
    "debug",
    "help",
    "log",
    "log-format",
    "log-level",
    "program-name",
    "root",
    "rootless",
    "systemd-cgroup",
    "usage",
    "version",
];
const CRUN_CREATES: [&str; 12] = [
    "bundle",
    "config",
    "console-socket",
    "detach",
    "help",
    "no-new-keyring",
    "no-pivot",
    "no-subreaper",
    "pid-file",
    "preserve-fds",
    "program-name",
    "usage",
];
const CRUN_EXEC: [&str; 17] = [
    "apparmor",
    "cap",
    "cgroup",
    "console-socket",
    "cwd",
    "detach",
    "env",
    "help",
    "no-new-privs",
    "pid-file",
    "preserve-fds",
    "process",
    "process-label",
    "program-name",
    "tty",
    "usage",
    "user",
];
const CRUN_OTHERS: [&str; 6] = ["all", "force", "help", "program-name", "regex", "usage"];
/// Every verb of runc, crun and youki: what tells an unknown option's value from the verb.
const VERBS: [&str; 20] = [
    "checkpoint",
    "create",
    "delete",
    "events",
    "exec",
    "features",
    "help",
    "init",
    "kill",
    "list",
    "mounts",
    "pause",
    "ps",
    "restore",
    "resume",
    "run",
    "spec",
    "start",
    "state",
    "update",
];

/// Reads a runtime's command line without argv\[0\]. Pure. A container may be named `create`, and `exec ID CMD --log x`
/// belongs to CMD: so options are skipped with their values and the verb is taken at its place, never searched for.
pub fn plan(args: impl IntoIterator<Item = OsString>) -> Plan {
    let mut words: Vec<OsString> = args.into_iter().collect();
    let mut plan = Plan { own: take_own_options(&mut words), rest: words, ..Plan::default() };
    let words = plan.rest.clone();
    let mut at = 0;
    while let Some(word) = words.get(at) {
        let Some(option) = Opt::read(word, &CRUN_GLOBALS) else { break };
        at += 1;
        if option.name.is_empty() {
            break; // `--`
        }
        let value = match option.value {
            Some(value) => Some(value),
            None if GLOBAL_VALUES.contains(&option.name) || matches!(option.name, "r" | "l") => {
                at += 1;
                words.get(at - 1).cloned()
            }
            // An option of a runtime newer than this list: a word that is no verb must be its value.
            None => {
                let next_is_verb = words.get(at).is_none_or(|w| w.as_bytes().starts_with(b"-") || is_verb(w));
                at += usize::from(!next_is_verb);
                None
            }
        };
        match (option.name, value) {
            ("root" | "r", Some(v)) => plan.root = Some(v.into()),
            ("log" | "l", Some(v)) => plan.log = Some(v.into()),
            ("log-format", Some(v)) => plan.log_json = v == "json",
            ("cgroup-manager", Some(v)) => plan.no_cgroup = v == "disabled",
            _ => {}
        }
    }
    plan.verb = match words.get(at).and_then(|w| w.to_str()) {
        Some("create") => Verb::Create,
        Some("run") => Verb::Run,
        Some("restore") => Verb::Restore,
        Some("delete") => Verb::Delete,
        Some("exec") => Verb::Exec,
        Some("state") => Verb::State,
        Some("kill") => Verb::Kill,
        _ => return plan,
    };
    at += 1;
    let creates = matches!(plan.verb, Verb::Create | Verb::Run | Verb::Restore);
    while let Some(word) = words.get(at) {
        let Some(options) = Opt::of_verb(word, plan.verb) else {
            // runc takes options after the id, too, as Slurm's examples have them; crun refuses them.
            if !creates || plan.id.is_some() {
                break;
            }
            plan.id = Some(word.clone());
            at += 1;
            continue;
        };
        at += 1;
        if options.iter().any(|option| option.name.is_empty()) {
            break;
        }
        for option in options {
            let takes_value = VERB_VALUES.contains(&option.name) || short_takes_value(plan.verb, option.name);
            let value = option.value.or_else(|| {
                let value = takes_value.then(|| words.get(at).cloned())?;
                at += 1;
                value
            });
            match (option.name, value) {
                ("bundle" | "b", Some(v)) => plan.bundle = Some(v.into()),
                ("config" | "f", Some(v)) if creates => plan.config_file = Some(v.into()),
                ("pid-file", Some(v)) => plan.pid_file = Some(v.into()),
                ("p", Some(v)) if creates => plan.pid_file = Some(v.into()),
                ("process" | "p", Some(v)) if plan.verb == Verb::Exec => plan.process = Some(v.into()),
                ("preserve-fds", Some(v)) => plan.preserve_fds = v.to_str().and_then(|v| v.parse().ok()).unwrap_or(0),
                // `delete --regex` of crun names many containers: their poststop hooks release them.
                ("regex" | "r", _) if matches!(plan.verb, Verb::Delete | Verb::State | Verb::Kill) => {
                    plan.verb = Verb::Other
                }
                _ => {}
            }
        }
    }
    plan.id = plan.id.or_else(|| words.get(at).cloned());
    if plan.verb == Verb::Kill {
        plan.id = behind_all(words.get(at..).unwrap_or_default()).cloned().or(plan.id);
    }
    plan
}

/// The container of runc's `kill 9 --all ID`: it takes an option to the front with the word behind it, though this one has no
/// value.
fn behind_all(words: &[OsString]) -> Option<&OsString> {
    let is_all = |word: &OsString| ["--all", "-all", "-a", "--a"].iter().any(|all| word == all);
    let before_end = words.split(|word| word == "--").next().unwrap_or_default();
    before_end.windows(2).find_map(|pair| match pair {
        [all, word] if is_all(all) && !is_all(word) => Some(word),
        _ => None,
    })
}

/// Single letters with a value: `-b DIR` everywhere, `-f FILE` of crun's create (but runc's `delete -f` is a flag), and
/// youki's `-c`, `-p`.
fn short_takes_value(verb: Verb, name: &str) -> bool {
    match verb {
        Verb::Create | Verb::Run | Verb::Restore => matches!(name, "b" | "f" | "c" | "p"),
        Verb::Exec => matches!(name, "e" | "u" | "g" | "p" | "c"),
        _ => false,
    }
}

fn is_verb(word: &OsStr) -> bool {
    word.to_str().is_some_and(|w| VERBS.contains(&w))
}

fn take_own_options(words: &mut Vec<OsString>) -> Own {
    let mut own = Own::default();
    while words.first().is_some_and(|word| word.as_bytes().starts_with(b"--mig-")) {
        let word = words.remove(0);
        let mut parts = word.as_bytes().splitn(2, |b| *b == b'=');
        let name = String::from_utf8_lossy(parts.next().unwrap_or_default()).into_owned();
        let given = parts.next().map(|value| OsStr::from_bytes(value).to_owned());
        let mut value = || given.clone().or_else(|| (!words.is_empty()).then(|| words.remove(0)));
        match name.as_str() {
            "--mig-env" if given.is_none() => own.env = true,
            "--mig-version" if given.is_none() => own.version = true,
            "--mig-config" => own.config = value().map(PathBuf::from),
            "--mig-runtime" => own.runtime = value().map(PathBuf::from),
            "--mig-job" => own.job = value(),
            _ => own.unknown.push(name),
        }
    }
    own
}

/// One option. Go's flag package takes `-root` for `--root`.
struct Opt<'a> {
    name: &'a str,
    value: Option<OsString>,
}

impl<'a> Opt<'a> {
    /// The option that a word is. `known`: those that may be cut short.
    fn read(word: &'a OsStr, known: &[&'static str]) -> Option<Opt<'a>> {
        let body = word.as_bytes().strip_prefix(b"-").filter(|body| !body.is_empty())?;
        let (body, whole) = match body.strip_prefix(b"-") {
            Some(body) => (body, true),
            None => (body, false),
        };
        let (name, value) = match body.iter().position(|b| *b == b'=') {
            Some(at) => (&body[..at], Some(OsStr::from_bytes(&body[at + 1..]).to_owned())),
            None => (body, None),
        };
        let name = std::str::from_utf8(name).unwrap_or("?");
        let mut near = known.iter().filter(|known| whole && !name.is_empty() && known.starts_with(name));
        match (near.next(), near.next()) {
            (Some(only), None) => Some(Opt { name: only, value }),
            _ => Some(Opt { name, value }),
        }
    }

    /// The options that a word after the verb is: one, or as many as there are letters behind one dash, of which the last may
    /// carry its value (`-db/b`).
    fn of_verb(word: &'a OsStr, verb: Verb) -> Option<Vec<Opt<'a>>> {
        let known: &[&str] = match verb {
            Verb::Create | Verb::Run | Verb::Restore => &CRUN_CREATES,
            Verb::Exec => &CRUN_EXEC,
            _ => &CRUN_OTHERS,
        };
        let option = Opt::read(word, known)?;
        let bytes = word.as_bytes();
        let one = bytes.starts_with(b"--") || option.name.len() == 1;
        if one || VERB_VALUES.contains(&option.name) || VERB_FLAGS.contains(&option.name) {
            return Some(vec![option]);
        }
        let mut letters = Vec::new();
        for at in 1..bytes.len() {
            let name = std::str::from_utf8(&bytes[at..=at]).unwrap_or("?");
            let rest = OsStr::from_bytes(&bytes[at + 1..]);
            let takes_value = short_takes_value(verb, name);
            let value = (takes_value && !rest.is_empty()).then(|| rest.to_owned());
            letters.push(Opt { name, value });
            if takes_value || (verb == Verb::Exec && name == "t") {
                break; // crun's `-t` may have a value, too
            }
        }
        Some(letters)
    }
}

/// What the first stage needs of the settings. Everything else, and every mistake in them, is the engine's business.
#[derive(Debug, Default, Deserialize)]
pub struct Outline {
    /// `state_dir`.
    pub state_dir: Option<PathBuf>,
    /// `[runtime]`.
    #[serde(default)]
    pub runtime: RuntimeOutline,
}

/// The part of the settings that names the low-level runtime.
#[derive(Debug, Default, Deserialize)]
pub struct RuntimeOutline {
    /// `path`.
    pub path: Option<PathBuf>,
}

impl Outline {
    /// A broken or missing file gives the defaults: it must never stop `state`, `kill` or `delete`.
    pub fn read(config: Option<&Path>) -> Outline {
        let text = std::fs::read_to_string(config.unwrap_or(Path::new(SETTINGS))).unwrap_or_default();
        if text.is_empty() { Outline::default() } else { toml::from_str(&text).unwrap_or_default() }
    }
}

/// What a config asks for, at a glance.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Asked {
    /// Nothing of ours: hand over, untouched.
    Nothing,
    /// A slice, or it carries edits of ours.
    Something,
    /// Unreadable, or not what it should be: the engine says what is wrong.
    Unclear,
}

/// Looks at a config.json for a request. `env`: requests in the environment count. A Kubernetes sandbox asks for nothing.
pub fn asked(config: &[u8], env: bool) -> Asked {
    match serde_json::from_slice::<Peek>(config) {
        Ok(peek) => {
            let keys = peek.annotations.unwrap_or_default();
            let vars = env && peek.process.and_then(|p| p.env).is_some_and(|e| e.asks);
            match (keys.asks || vars) && !keys.sandbox {
                true => Asked::Something,
                false => Asked::Nothing,
            }
        }
        Err(_) => Asked::Unclear,
    }
}

/// Annotations that say `sandbox` of a Kubernetes pod's sandbox: containerd's and CRI-O's.
pub const SANDBOX_KEYS: [&str; 2] = ["io.kubernetes.cri.container-type", "io.kubernetes.cri-o.ContainerType"];

/// The variables that ask for a slice: the keys upper-cased, dots to underscores.
pub const REQUEST_VARIABLES: [&str; 5] = ["MIG_PROFILE", "MIG_MEMORY", "MIG_GPU", "MIG_UUID", "MIG_WAIT"];

#[derive(Deserialize)]
struct Peek {
    annotations: Option<Keys>,
    process: Option<PeekProcess>,
}

#[derive(Deserialize)]
struct PeekProcess {
    env: Option<Vars>,
}

#[derive(Default)]
struct Keys {
    asks: bool,
    sandbox: bool,
}

#[derive(Default)]
struct Vars {
    asks: bool,
}

impl<'de> Deserialize<'de> for Keys {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Keys, D::Error> {
        struct KeysVisitor;
        impl<'de> Visitor<'de> for KeysVisitor {
            type Value = Keys;
            fn expecting(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
                f.write_str("an object of annotations")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Keys, A::Error> {
                let mut keys = Keys::default();
                while let Some(Text(key)) = map.next_key()? {
                    match key.as_ref() {
                        known if SANDBOX_KEYS.contains(&known) => {
                            keys.sandbox |= map.next_value::<Text>()?.0 == "sandbox";
                        }
                        other => {
                            keys.asks |= ours(other);
                            map.next_value::<IgnoredAny>()?;
                        }
                    }
                }
                Ok(keys)
            }
        }
        d.deserialize_map(KeysVisitor)
    }
}

impl<'de> Deserialize<'de> for Vars {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Vars, D::Error> {
        struct VarsVisitor;
        impl<'de> Visitor<'de> for VarsVisitor {
            type Value = Vars;
            fn expecting(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
                f.write_str("an array of variables")
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Vars, A::Error> {
                let mut vars = Vars::default();
                while let Some(Text(var)) = seq.next_element()? {
                    vars.asks |= var.split_once('=').is_some_and(|(key, _)| REQUEST_VARIABLES.contains(&key));
                }
                Ok(vars)
            }
        }
        d.deserialize_seq(VarsVisitor)
    }
}

/// Whether a key of the annotations is under `mig.`, be it to be refused: `--annotation '"mig.profile=…"'`, which podman
/// before 5.0 needs for a value with commas (it read the option as CSV), leaves the quotes in with later ones.
pub fn ours(key: &str) -> bool {
    key.trim_start_matches('"').starts_with("mig.")
}

/// A string, borrowed where it has no escapes.
#[derive(Deserialize)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

/// A plain name: what may become a file name. Container ids come from the engines; none needs more than this.
pub fn plain_name(name: &str) -> bool {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-' | b'+' | b'@' | b':');
    !name.is_empty() && name.len() <= 200 && name != "." && name != ".." && name.bytes().all(plain)
}

/// What a job of a batch system may be called, as `slurm:CLUSTER:15` or `lsf:77[3]`: a plain file name, not hidden, of at
/// most 128 bytes.
pub fn job_key(key: &str) -> bool {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"._:@+-[]".contains(&b);
    !key.is_empty() && key.len() <= 128 && !key.starts_with('.') && key.bytes().all(plain)
}

/// Name in `index/` of the container `id` under a runtime root: ids alone are not unique (containerd namespaces, several
/// roots). FNV-1a, 64 bit, of the root; the id itself stays readable. `None` where the id is no plain name.
pub fn index_name(root: Option<&Path>, id: &str) -> Option<String> {
    let root = root.unwrap_or(Path::new("")).as_os_str().as_bytes();
    let trimmed = root.strip_suffix(b"/").unwrap_or(root);
    let hash = trimmed.iter().fold(0xcbf2_9ce4_8422_2325_u64, |h, b| (h ^ u64::from(*b)).wrapping_mul(0x100_0000_01b3));
    plain_name(id).then(|| format!("{id}.{hash:016x}"))
}

/// Who owns what has no owner in our user namespace (user_namespaces(7); every distribution keeps the default).
pub const OVERFLOW_UID: u32 = 65534;

/// Who we are outside, where we are uid 0 only in the user namespace of somebody else (rootless podman): that uid. Hooks
/// have no environment to tell them.
pub fn rootless() -> Option<u32> {
    static OUTSIDE: OnceLock<Option<u32>> = OnceLock::new();
    *OUTSIDE.get_or_init(|| outside_uid(&std::fs::read_to_string("/proc/self/uid_map").ok()?))
}

/// From the text of a uid_map: a line for each range, first uid inside, first outside, how many.
fn outside_uid(map: &str) -> Option<u32> {
    let ranges = map.lines().map(|line| line.split_whitespace().flat_map(str::parse).collect::<Vec<u32>>());
    let of_root = ranges.filter(|range| range.first() == Some(&0)).find_map(|range| range.get(1).copied());
    of_root.filter(|outside| *outside != 0)
}

/// Where leases live: as the settings say, and for a user without root in a directory of the user's.
pub fn state_dir(configured: Option<PathBuf>) -> PathBuf {
    // Root of a system container (LXD) owns its /run; in the namespace of a user, the host's root does.
    let user = rootless().filter(|_| !std::fs::metadata("/run").is_ok_and(|meta| meta.uid() == 0));
    match user {
        Some(uid) => Path::new(USER_STATE).join(uid.to_string()).join("mig-hook"),
        None => state_dir_of_root(configured),
    }
}

/// Where the leases of the host's root live, also seen from the namespace of a user.
pub fn state_dir_of_root(configured: Option<PathBuf>) -> PathBuf {
    configured.unwrap_or_else(|| STATE_DIR.into())
}

/// Whether that container holds a lease: one look-up.
fn leased(state_dir: &Path, plan: &Plan) -> bool {
    let id = plan.id.as_ref().and_then(|id| id.to_str());
    let name = id.and_then(|id| index_name(plan.root.as_deref(), id));
    name.is_some_and(|name| state_dir.join("index").join(name).symlink_metadata().is_ok())
}

/// Whether the engine must look at a container of a job: something is public of that job, or that can't be told. Where the
/// directory is closed to us, nothing was ever made public. Nor does root start anything in a directory that may be a user's.
fn in_job(state_dir: &Path, key: &OsStr) -> bool {
    let published = |key: &str| state_dir.join("public").join(format!("{key}.json")).symlink_metadata().is_ok();
    let is_root = || std::fs::metadata("/proc/self").is_ok_and(|meta| meta.uid() == 0);
    key.to_str().filter(|key| job_key(key)).is_none_or(published) || is_root()
}

/// `mig-runtime`: returns only when neither the runtime nor the engine could be started.
pub fn runtime(args: Vec<OsString>) -> i32 {
    let given = args.get(1..).unwrap_or_default().to_vec();
    let plan = plan(given.clone());
    if plan.own.version {
        println!("mig-runtime {VERSION}");
        return 0;
    }
    let outline = Outline::read(plan.own.config.as_deref());
    let state_dir = || state_dir(outline.state_dir.clone());
    let asks = || plan.own.are_wrong() || asked_by_bundle(&plan) != Asked::Nothing;
    let ours = match (plan.verb, &plan.own.job) {
        (Verb::Create | Verb::Run, Some(key)) if !in_job(&state_dir(), key) => asks(),
        (_, Some(_)) => true,
        (Verb::Create | Verb::Run | Verb::Restore, None) => asks(),
        (Verb::Delete, None) => leased(&state_dir(), &plan),
        (Verb::Exec, None) => plan.process.is_some() && leased(&state_dir(), &plan),
        (Verb::State | Verb::Kill | Verb::Other, None) => false,
    };
    if ours {
        return become_engine("shim", &given, &handover::wrap_environment(&handover::environment()));
    }
    fail("mig-runtime", &hand_over(&plan, outline.runtime.path.as_deref(), &handover::environment()))
}

/// The config.json that `create` or `run` will read. Another name given to crun is one seen from the working directory.
pub fn config_path(plan: &Plan) -> PathBuf {
    let bundle = plan.bundle.as_deref().unwrap_or(Path::new("."));
    match &plan.config_file {
        Some(file) if file.as_os_str() != "config.json" => file.clone(),
        _ => bundle.join("config.json"),
    }
}

fn asked_by_bundle(plan: &Plan) -> Asked {
    let mut bytes = Vec::new();
    let read = File::open(config_path(plan)).and_then(|f| f.take(CONFIG_LIMIT + 1).read_to_end(&mut bytes));
    match read {
        Ok(n) if n as u64 <= CONFIG_LIMIT => asked(&bytes, plan.own.env),
        _ => Asked::Unclear,
    }
}

/// Becomes the low-level runtime with the command line that is its own. Returns the reason when that failed.
pub fn hand_over(plan: &Plan, configured: Option<&Path>, env: &[OsString]) -> String {
    let runtime = match low_level_runtime(plan, configured) {
        Ok(runtime) => runtime,
        Err(reason) => return reason,
    };
    let mut argv = vec![runtime.clone().into_os_string()];
    argv.extend(plan.rest.iter().cloned());
    handover::close_on_exec_except(3..passed_on_purpose(plan, env));
    let error = handover::exec(&runtime, &argv, env);
    format!("cannot start the low-level runtime {}: {error}; set [runtime] path or --mig-runtime", runtime.display())
}

/// First descriptor that is not for the container: stdio, then `LISTEN_FDS`, then `--preserve-fds`, as runc counts them.
fn passed_on_purpose(plan: &Plan, env: &[OsString]) -> i32 {
    let listen = env.iter().filter_map(|v| v.to_str()?.strip_prefix("LISTEN_FDS=")?.parse::<u32>().ok()).next_back();
    i32::try_from(3_u32.saturating_add(listen.unwrap_or(0)).saturating_add(plan.preserve_fds)).unwrap_or(i32::MAX)
}

/// The runtime to become: `--mig-runtime`, else the settings, else the one that has this container's state under its
/// default root, else the first that is installed.
pub fn low_level_runtime(plan: &Plan, configured: Option<&Path>) -> Result<PathBuf, String> {
    if let Some(pinned) = plan.own.runtime.as_deref().or(configured) {
        return match pinned.is_absolute() {
            true => Ok(pinned.to_owned()),
            false => Err(format!("the low-level runtime must be an absolute path, not {}", pinned.display())),
        };
    }
    let has_state = |name: &str| match (&plan.root, plan.id.as_ref().and_then(|id| id.to_str())) {
        (None, Some(id)) if plain_name(id) => Path::new("/run").join(name).join(id).exists(),
        _ => false,
    };
    let with_state = RUNTIMES.iter().filter(|name| has_state(name)).find_map(|name| installed(name));
    with_state.or_else(|| RUNTIMES.iter().find_map(|name| installed(name))).ok_or_else(|| {
        format!(
            "no low-level runtime found: looked for {} in {}; install one, or name it by [runtime] path in {SETTINGS}",
            RUNTIMES.join(", "),
            RUNTIME_DIRS.join(", ")
        )
    })
}

/// An executable of that name, where runtimes lie, which is not ourselves under another name.
pub fn installed(name: &str) -> Option<PathBuf> {
    let ourselves = std::fs::metadata("/proc/self/exe").map(|m| (m.dev(), m.ino())).ok();
    RUNTIME_DIRS.iter().map(|dir| Path::new(dir).join(name)).find(|path| {
        path.metadata()
            .is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0 && Some((m.dev(), m.ino())) != ourselves)
    })
}

/// `mig-hook [--config FILE] STAGE [--lease TOKEN | --slice UUID]`. A late or second poststop, whose lease is gone, ends
/// here, and one whose lease the shim is about to release; so does a hook without either, as an administrator registers it for every container, where nothing is asked.
pub fn hook(args: Vec<OsString>) -> i32 {
    handover::unblock_signals();
    let given = args.get(1..).unwrap_or_default().to_vec();
    if given == ["--version"] {
        println!("mig-hook {VERSION}");
        return 0;
    }
    let has = |word: &str| given.iter().any(|a| a == word);
    let after = |name: &str| given.iter().position(|a| a == name).and_then(|at| given.get(at + 1));
    if has("poststop") && has("--lease") {
        let outline = Outline::read(after("--config").map(Path::new));
        let state_dir = state_dir(outline.state_dir);
        let token = after("--lease").and_then(|t| t.to_str()).filter(|t| plain_name(t));
        let is_over = |token: &str| !state_dir.join("leases").join(format!("{token}.json")).exists();
        if token.is_some_and(|token| is_over(token) || is_taken(&state_dir, token)) {
            drain();
            return 0;
        }
    } else if ["createRuntime", "prestart", "poststop"].iter().any(|stage| has(stage))
        && !["--lease", "--slice"].iter().any(|name| has(name))
    {
        let mut state = Vec::new();
        let read = std::io::stdin().lock().take(CONFIG_LIMIT + 1).read_to_end(&mut state);
        if read.is_ok() && asked(&state, false) == Asked::Nothing {
            drain();
            return 0;
        }
        if let Err(error) = handover::give_stdin(&state) {
            return fail("mig-hook", &format!("cannot hand the State on to mig-engine: {error}"));
        }
    }
    become_engine("hook", &given, &[])
}

/// Whether the shim waits for the runtime that has called us, and releases by itself (`Store::take_end`).
fn is_taken(state_dir: &Path, token: &str) -> bool {
    is_locked(&state_dir.join("intents").join(format!("{token}.ready")))
}

/// Whether somebody has that file locked (flock(2)) for himself alone. Takes the lock for a moment where nobody has.
pub fn is_locked(path: &Path) -> bool {
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW).open(path);
    file.is_ok_and(|file| matches!(file.try_lock_shared(), Err(TryLockError::WouldBlock)))
}

/// Reads standard input to its end, or the runtime that writes the State gets EPIPE; crun 1.28 writes many lines.
fn drain() {
    let _ = std::io::copy(&mut std::io::stdin().lock(), &mut std::io::sink());
}

/// Becomes `mig-engine WAY ARGS…` with an environment that no loader reads.
fn become_engine(way: &str, args: &[OsString], wrapped: &[OsString]) -> i32 {
    let dir = std::fs::read_link("/proc/self/exe").ok().and_then(|exe| Some(exe.parent()?.to_owned()));
    let dir = dir.unwrap_or_else(|| "/usr/bin".into());
    let found = ENGINES.iter().map(|place| dir.join(place)).find(|path| path.is_file());
    let engine = found.unwrap_or_else(|| dir.join(ENGINES[1]));
    let mut argv = vec![OsString::from("mig-engine"), way.into()];
    argv.extend(args.iter().cloned());
    let error = handover::exec(&engine, &argv, wrapped);
    let reason = format!("cannot start {}: {error}; is mig-hook installed completely?", engine.display());
    fail(if way == "hook" { "mig-hook" } else { "mig-runtime" }, &reason)
}

fn fail(who: &str, reason: &str) -> i32 {
    eprintln!("{who}: {reason}");
    69 // EX_UNAVAILABLE, as in report::Exit
}

#[cfg(test)]
mod tests {
    use super::*;

    fn planned(line: &str) -> Plan {
        plan(line.split_whitespace().map(OsString::from))
    }

    #[test]
    fn real_command_lines() {
        let cases: &[(&str, Verb, Option<&str>, Option<&str>)] = &[
            // docker and containerd
            (
                "--root /r --log /b/log.json --log-format json create --bundle /b --pid-file /b/init.pid c1",
                Verb::Create,
                Some("/b"),
                Some("c1"),
            ),
            (
                "--root /r --log /b/log.json --log-format json --systemd-cgroup create --bundle /b c1",
                Verb::Create,
                Some("/b"),
                Some("c1"),
            ),
            ("--root /r --log=/b/log.json --log-format=json start c1", Verb::Other, None, None),
            ("--root /r delete --force c1", Verb::Delete, None, Some("c1")),
            ("--root /r exec --process /tmp/p --detach --pid-file /tmp/f c1", Verb::Exec, None, Some("c1")),
            // conmon
            (
                "create --bundle /b --pid-file /p --console-socket /s --preserve-fds 2 c1",
                Verb::Create,
                Some("/b"),
                Some("c1"),
            ),
            ("kill c1 15", Verb::Kill, None, Some("c1")),
            ("kill --all c1 15", Verb::Kill, None, Some("c1")),
            ("kill c1 15 --all", Verb::Kill, None, Some("c1")),
            ("kill 15 --all c1", Verb::Kill, None, Some("c1")),
            (
                "restore --bundle /b --pid-file /p --detach --image-path /i --work-path /w c1",
                Verb::Restore,
                Some("/b"),
                Some("c1"),
            ),
            // by hand
            ("run c1", Verb::Run, None, Some("c1")),
            ("create -b /b create", Verb::Create, Some("/b"), Some("create")),
            ("create -b/b c1", Verb::Create, Some("/b"), Some("c1")),
            ("-root /r run -bundle /b delete", Verb::Run, Some("/b"), Some("delete")),
            ("--debug create -- c1", Verb::Create, None, Some("c1")),
            ("--root create start c1", Verb::Other, None, None),
            ("--root=/r state create", Verb::State, None, Some("create")),
            ("exec c1 sh --log x create", Verb::Exec, None, Some("c1")),
            ("exec -e A=b -u 0 c1 create", Verb::Exec, None, Some("c1")),
            ("delete -f c1", Verb::Delete, None, Some("c1")),
            ("delete --regex c.*", Verb::Other, None, Some("c.*")),
            ("kill -r c.* 9", Verb::Other, None, Some("c.*")),
            // Slurm's oci.conf
            ("--rootless=true --root=/r/alice state n1.alice.7.0.-1", Verb::State, None, Some("n1.alice.7.0.-1")),
            ("--rootless=true --root=/r/alice run n1.alice.7.0.0 -b /b", Verb::Run, Some("/b"), Some("n1.alice.7.0.0")),
            ("create -f other.json -b /b c1", Verb::Create, Some("/b"), Some("c1")),
            ("--brand-new value create -b /b c1", Verb::Create, Some("/b"), Some("c1")),
            ("--brand-new create -b /b c1", Verb::Create, Some("/b"), Some("c1")),
            ("--version", Verb::Other, None, None),
            ("checkpoint --help", Verb::Other, None, None),
            ("", Verb::Other, None, None),
            ("--root", Verb::Other, None, None),
            ("create --bundle", Verb::Create, None, None),
        ];
        for (line, verb, bundle, id) in cases {
            let plan = planned(line);
            assert_eq!(plan.verb, *verb, "{line}");
            assert_eq!(plan.bundle.as_deref(), bundle.map(Path::new), "{line}");
            assert_eq!(plan.id.as_deref(), id.map(OsStr::new), "{line}");
            assert_eq!(plan.rest, line.split_whitespace().map(OsString::from).collect::<Vec<_>>(), "{line}");
        }
    }

    #[test]
    fn names_cut_short_and_letters_written_together_are_read_as_crun_does() {
        let plan = planned("--log-f=json --cgroup-m disabled run --bund /b --pid-f /p --pre 3 -df other.json c1");
        assert!(plan.log_json && plan.no_cgroup);
        assert_eq!((plan.verb, plan.preserve_fds), (Verb::Run, 3));
        assert_eq!((plan.bundle.as_deref(), plan.pid_file.as_deref()), (Some(Path::new("/b")), Some(Path::new("/p"))));
        assert_eq!(
            (plan.config_file.as_deref(), plan.id.as_deref()),
            (Some(Path::new("other.json")), Some(OsStr::new("c1")))
        );
        assert_eq!(planned("run -db/b c1").bundle.as_deref(), Some(Path::new("/b")));
        assert_eq!(planned("exec -tdp /p c1").process.as_deref(), None, "-t may have a value");
        assert_eq!(planned("exec -dp/p c1").process.as_deref(), Some(Path::new("/p")));
        assert_eq!(planned("delete -fr c.*").verb, Verb::Other);
        assert_eq!(planned("delete --reg c.*").verb, Verb::Other);
        // runc's way of writing them is not mistaken for that.
        let plan = planned("run -no-pivot -detach -pid-file /p c1");
        assert_eq!((plan.bundle, plan.pid_file, plan.id), (None, Some("/p".into()), Some("c1".into())));
    }

    #[test]
    fn another_config_is_seen_from_the_working_directory() {
        let path = |line| config_path(&planned(line));
        assert_eq!(path("create -b /b c1"), Path::new("/b/config.json"));
        assert_eq!(path("create c1"), Path::new("./config.json"));
        assert_eq!(path("create -f config.json -b /b c1"), Path::new("/b/config.json"));
        assert_eq!(path("create -f other.json -b /b c1"), Path::new("other.json"));
        assert_eq!(path("create -f /c/other.json -b /b c1"), Path::new("/c/other.json"));
    }

    #[test]
    fn globals_are_read_only_before_the_verb() {
        let plan = planned("--root /r --log /l --log-format json exec c1 --root /evil --log /evil");
        assert_eq!((plan.root, plan.log), (Some("/r".into()), Some("/l".into())));
        assert!(plan.log_json);
    }

    #[test]
    fn own_options_are_stripped_and_only_in_front() {
        let plan = planned("--mig-env --mig-config=/c --mig-runtime /usr/bin/crun --root /r create c1 --mig-env");
        assert_eq!(plan.own.config.as_deref(), Some(Path::new("/c")));
        assert_eq!(plan.own.runtime.as_deref(), Some(Path::new("/usr/bin/crun")));
        assert!(plan.own.env && plan.own.unknown.is_empty());
        assert_eq!(plan.rest.join(OsStr::new(" ")), "--root /r create c1 --mig-env");
        assert_eq!(planned("--mig-typo create c1").own.unknown, ["--mig-typo"]);
        assert!(planned("--mig-version").own.version && !planned("--version").own.version);
        assert!(!planned("create --mig-env c1").own.env);
        let odd = |bytes: &[u8]| super::plan([OsStr::from_bytes(bytes).to_owned(), "create".into(), "c1".into()]);
        let not_utf_8 = odd(b"--mig-config=/\xff");
        assert_eq!(not_utf_8.own.config.as_deref(), Some(Path::new(OsStr::from_bytes(b"/\xff"))));
        assert_eq!((not_utf_8.verb, odd(b"--mig-\xff").own.unknown.len()), (Verb::Create, 1));
    }

    #[test]
    fn a_job_is_named_before_the_runtimes_options() {
        for line in ["--mig-job slurm:mini:7 --root=/r state c1", "--mig-job=slurm:mini:7 --root=/r state c1"] {
            let plan = planned(line);
            assert_eq!((plan.own.job.as_deref(), plan.verb), (Some(OsStr::new("slurm:mini:7")), Verb::State), "{line}");
            assert_eq!(plan.rest.join(OsStr::new(" ")), "--root=/r state c1");
            assert!(!plan.own.are_wrong());
        }
        assert_eq!(planned("--mig-job= run c1").own.job.as_deref(), Some(OsStr::new("")));
        assert_eq!(planned("run --mig-job k c1").own.job, None);
        assert!(planned("--mig-env --mig-job k run c1").own.are_wrong());
    }

    #[test]
    fn a_job_of_which_nothing_is_public_is_no_business_of_the_engine() {
        let dir = tempfile::tempdir().unwrap();
        let is_root = std::fs::metadata("/proc/self").unwrap().uid() == 0;
        assert_eq!(in_job(dir.path(), OsStr::new("slurm:mini:7")), is_root);
        std::fs::create_dir(dir.path().join("public")).unwrap();
        std::fs::write(dir.path().join("public/slurm:mini:7.json"), "").unwrap();
        assert!(in_job(dir.path(), OsStr::new("slurm:mini:7")));
        for odd in ["", "../leases/x", ".hidden", "a b", "ä"] {
            assert!(in_job(dir.path(), OsStr::new(odd)), "{odd:?} is the engine's to refuse");
        }
    }

    #[test]
    fn a_glance_at_configs() {
        let cases: &[(&str, bool, Asked)] = &[
            (r#"{"annotations":{"mig.profile":"1g.10gb"}}"#, false, Asked::Something),
            (r#"{"annotations":{"mig.profile/train":"1g.10gb"}}"#, false, Asked::Something),
            (r#"{"annotations":{"mig\u002eprofile":"1g.10gb"}}"#, false, Asked::Something),
            (r#"{"annotations":{"\"mig.profile":"1g.10gb,1g.10gb\""}}"#, false, Asked::Something),
            (r#"{"annotations":{"migx":"1","x.mig.y":"2"}}"#, true, Asked::Nothing),
            (r#"{"annotations":null,"process":{"env":null}}"#, true, Asked::Nothing),
            (r#"{}"#, true, Asked::Nothing),
            (r#"{"process":{"env":["MIG_PROFILE=1g.10gb"]}}"#, true, Asked::Something),
            (r#"{"process":{"env":["MIG_PROFILE=1g.10gb"]}}"#, false, Asked::Nothing),
            (r#"{"process":{"env":["MIG_OTHER=1","PATH=/bin"]}}"#, true, Asked::Nothing),
            (
                r#"{"annotations":{"mig.profile":"1g.10gb","io.kubernetes.cri.container-type":"sandbox"}}"#,
                true,
                Asked::Nothing,
            ),
            (
                r#"{"annotations":{"io.kubernetes.cri-o.ContainerType":"sandbox","mig.profile":"x"}}"#,
                true,
                Asked::Nothing,
            ),
            (
                r#"{"annotations":{"io.kubernetes.cri.container-type":"container","mig.profile":"x"}}"#,
                false,
                Asked::Something,
            ),
            (r#"{"annotations":{"mig.x":"1"},"annotations":{}}"#, false, Asked::Unclear),
            (r#"{"annotations":[]}"#, false, Asked::Unclear),
            (r#"{"#, false, Asked::Unclear),
            ("", false, Asked::Unclear),
        ];
        for (config, env, answer) in cases {
            assert_eq!(asked(config.as_bytes(), *env), *answer, "{config}");
        }
    }

    #[test]
    fn uid_0_of_a_user_namespace_is_somebody_else_outside() {
        assert_eq!(outside_uid("         0          0 4294967295\n"), None);
        assert_eq!(outside_uid("         0       1000          1\n         1     100000      65536\n"), Some(1000));
        assert_eq!(outside_uid("1000 0 1\n0 1 1000\n"), Some(1));
        assert_eq!(outside_uid(""), None);
    }

    #[test]
    fn only_plain_names_become_file_names() {
        assert!(plain_name("3f0a_b.c-d"));
        for bad in ["", ".", "..", "a/b", "../x", "a\0", "a b", "ä", &"x".repeat(201)] {
            assert!(!plain_name(bad), "{bad:?}");
        }
    }

    #[test]
    fn the_index_tells_roots_apart_and_ignores_a_trailing_slash() {
        let name = |root: &str| index_name(Some(Path::new(root)), "c1");
        assert_ne!(name("/run/runc"), name("/run/docker/runtime-runc/moby"));
        assert_eq!(name("/run/runc"), name("/run/runc/"));
        assert_ne!(name(""), None);
        assert_eq!(index_name(None, "../c1"), None);
    }

    #[test]
    fn descriptors_for_the_container_are_counted_as_runc_does() {
        let plan = planned("create --preserve-fds 2 c1");
        assert_eq!(passed_on_purpose(&plan, &["LISTEN_FDS=1".into()]), 6);
        assert_eq!(passed_on_purpose(&planned("create c1"), &[]), 3);
    }

    #[test]
    fn a_relative_runtime_is_refused() {
        let error = low_level_runtime(&planned("state c1"), Some(Path::new("runc"))).unwrap_err();
        assert!(error.contains("absolute path"), "{error}");
    }
}
