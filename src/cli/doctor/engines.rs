//! Container engines: whether mig-hook is registered with each, and what it names is there.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;

use super::program::{self, Version};
use super::root::Root;
use super::{Check, listed};
use crate::cli::configure::podman;
use crate::cli::configure::{Engine, Entry};

const DIRS: [&str; 5] = ["/usr/bin", "/usr/sbin", "/usr/local/bin", "/usr/local/sbin", "/usr/libexec/crio"];
/// podman's oldest version with which the precreate hook was tested.
const PODMAN: Version = Version::new(4, 0, 0);
/// CRI-O's own directories for hooks (its pkg/config, `DefaultHooksDir`), and podman's.
const HOOKS: [&str; 2] = ["/usr/share/containers/oci/hooks.d", "/etc/containers/oci/hooks.d"];
/// HTTP/1.0: the answer comes in one piece and ends with the connection.
const REQUEST: &[u8] = b"GET /info HTTP/1.0\r\nHost: docker\r\n\r\n";
/// How long dockerd may take to answer, and how much is read of it.
const ANSWER: Duration = Duration::from_secs(2);
const LENGTH: u64 = 1 << 20;

/// The engines of a machine.
pub(super) struct Engines {
    list: Vec<Found>,
    /// The runtimes that a running dockerd knows.
    dockerd: Option<Vec<String>>,
    /// hooks.d files of podman that name mig-hook.
    hooks: Vec<HookFile>,
    /// Files in CRI-O's own directories with a stage that it refuses.
    precreate: Vec<PathBuf>,
}

struct Found {
    engine: Engine,
    program: Option<PathBuf>,
    version: Option<Version>,
    entries: Vec<Entry>,
    /// Files that can't be understood, and why.
    unreadable: Vec<(PathBuf, String)>,
}

/// A hooks.d file that names mig-hook.
struct HookFile {
    file: PathBuf,
    program: PathBuf,
    exists: bool,
}

impl Engines {
    fn docker(&self, default: bool) -> Vec<String> {
        let docker = self.list.iter().filter(|found| found.engine == Engine::Docker);
        let entries = docker.flat_map(|found| &found.entries);
        let env = |entry: &&Entry| entry.default == default && entry.args.iter().any(|arg| arg == "--mig-env");
        entries.filter(env).map(|entry| format!("docker's runtime {}", entry.name)).collect()
    }

    /// Runtimes whose containers may ask by environment, which a user names.
    pub fn with_environment(&self) -> Vec<String> {
        self.docker(false)
    }

    /// Those that nobody has to name.
    pub fn default_with_environment(&self) -> Vec<String> {
        self.docker(true)
    }

    /// Low-level runtimes that entries of ours name.
    pub fn pinned(&self) -> Vec<PathBuf> {
        let entries = self.list.iter().flat_map(|found| &found.entries);
        entries.filter_map(|entry| option(entry, "--mig-runtime=")).map(PathBuf::from).collect()
    }
}

fn option<'a>(entry: &'a Entry, name: &str) -> Option<&'a str> {
    entry.args.iter().find_map(|arg| arg.strip_prefix(name))
}

fn name(engine: Engine) -> &'static str {
    match engine {
        Engine::Docker => "docker",
        Engine::Podman => "podman",
        Engine::Containerd => "containerd",
        Engine::Crio => "crio",
    }
}

/// Its programs, the daemon first, and the files that it reads, a directory for all `*.conf` in it.
fn known(engine: Engine) -> (&'static [&'static str], &'static [&'static str]) {
    match engine {
        Engine::Docker => (&["dockerd"], &["/etc/docker/daemon.json"]),
        Engine::Podman => (
            &["podman"],
            &[
                "/usr/share/containers/containers.conf",
                "/etc/containers/containers.conf",
                "/etc/containers/containers.conf.d",
            ],
        ),
        Engine::Containerd => (&["containerd"], &["/etc/containerd/config.toml"]),
        Engine::Crio => (&["crio"], &["/etc/crio/crio.conf", "/etc/crio/crio.conf.d"]),
    }
}

pub(super) fn read(root: &Root) -> Engines {
    let list: Vec<Found> =
        [Engine::Podman, Engine::Docker, Engine::Containerd, Engine::Crio].map(|engine| found(root, engine)).into();
    let directories = podman::directories(&texts(root, Engine::Podman)).unwrap_or_default();
    let socket = Path::new("/run/docker.sock");
    Engines {
        dockerd: root.exists(socket).then(|| runtimes_of_dockerd(Path::new(&root.shown(socket)))).flatten(),
        hooks: directories.iter().flat_map(|dir| hook_files(root, Path::new(dir))).collect(),
        precreate: HOOKS.iter().flat_map(|dir| precreate_files(root, Path::new(dir))).collect(),
        list,
    }
}

fn found(root: &Root, engine: Engine) -> Found {
    let program = known(engine).0.iter().find_map(|name| root.program(name, &DIRS));
    let said = program.as_deref().filter(|_| root.is_here()).and_then(|path| program::ask(path, &["--version"]).ok());
    let mut found = Found {
        engine,
        program,
        version: said.as_deref().and_then(Version::find),
        entries: vec![],
        unreadable: vec![],
    };
    for (path, text) in texts(root, engine) {
        match engine.entries(Some(&text), "mig") {
            Ok(entries) => found.entries.extend(entries),
            Err(reason) => found.unreadable.push((path, reason)),
        }
    }
    found
}

fn texts(root: &Root, engine: Engine) -> Vec<(PathBuf, String)> {
    let files = known(engine).1.iter().flat_map(|path| match path.ends_with(".d") {
        true => root.list(path).into_iter().filter(|p| p.extension().is_some_and(|e| e == "conf")).collect(),
        false => vec![PathBuf::from(path)],
    });
    files.filter_map(|path| Some((path.clone(), root.read(&path).ok()?))).collect()
}

fn json_files(root: &Root, dir: &Path) -> Vec<(PathBuf, Value)> {
    let files = root.list(dir).into_iter().filter(|path| path.extension().is_some_and(|e| e == "json"));
    files.filter_map(|file| Some((file.clone(), serde_json::from_str(&root.read(&file).ok()?).ok()?))).collect()
}

fn hook_files(root: &Root, dir: &Path) -> Vec<HookFile> {
    let hook = |(file, value): (PathBuf, Value)| {
        let program = PathBuf::from(value["hook"]["path"].as_str()?);
        let exists = root.is_program(&program);
        program.ends_with("mig-hook").then_some(HookFile { file, program, exists })
    };
    json_files(root, dir).into_iter().filter_map(hook).collect()
}

fn precreate_files(root: &Root, dir: &Path) -> Vec<PathBuf> {
    let has = |value: &Value| value["stages"].as_array().is_some_and(|s| s.iter().any(|stage| stage == "precreate"));
    json_files(root, dir).into_iter().filter(|(_, value)| has(value)).map(|(file, _)| file).collect()
}

/// The names of the runtimes that the dockerd behind a socket has, by its API (`GET /info`, any version).
fn runtimes_of_dockerd(socket: &Path) -> Option<Vec<String>> {
    let mut stream = UnixStream::connect(socket).ok()?;
    stream.set_read_timeout(Some(ANSWER)).ok()?;
    stream.set_write_timeout(Some(ANSWER)).ok()?;
    stream.write_all(REQUEST).ok()?;
    let mut answer = Vec::new();
    stream.take(LENGTH).read_to_end(&mut answer).ok()?;
    let answer = String::from_utf8_lossy(&answer);
    let (_, body) = answer.split_once("\r\n\r\n")?;
    let info: Value = serde_json::from_str(body).ok()?;
    Some(info["Runtimes"].as_object()?.keys().cloned().collect())
}

pub(super) fn checks(engines: &Engines, root: &Root) -> Vec<Check> {
    let exists = |path: &Path| root.exists(path);
    let mut checks = Vec::new();
    for found in &engines.list {
        for (path, reason) in &found.unreadable {
            let id = format!("engine.{}.file", name(found.engine));
            let remedy = format!("correct it, then run: migctl configure {}", name(found.engine));
            checks.push(Check::warn(id, format!("{}: {reason}", root.shown(path)), remedy));
        }
        let dockerd = engines.dockerd.as_deref().filter(|_| found.engine == Engine::Docker);
        checks.extend(found.entries.iter().filter(|e| !e.shim.is_empty()).map(|e| entry(found, e, dockerd, &exists)));
        if found.engine == Engine::Podman {
            checks.extend(engines.hooks.iter().map(|hook| hook_check(root, hook)));
            checks.extend(podman_version(found, !engines.hooks.is_empty()));
        }
        if found.engine == Engine::Crio && found.program.is_some() {
            checks.extend(crio_hooks(root, &engines.precreate));
        }
        if !is_registered(found, &engines.hooks) && found.unreadable.is_empty() {
            checks.push(unregistered(found));
        }
    }
    checks.extend(any(engines));
    checks
}

fn is_registered(found: &Found, hooks: &[HookFile]) -> bool {
    found.entries.iter().any(|entry| !entry.shim.is_empty()) || (found.engine == Engine::Podman && !hooks.is_empty())
}

fn called(found: &Found) -> String {
    let version = found.version.map_or(String::new(), |version| format!(" {version}"));
    format!("{}{version}", name(found.engine))
}

fn unregistered(found: &Found) -> Check {
    let id = format!("engine.{}", name(found.engine));
    match found.program {
        None => Check::skip(id, format!("{} is not installed", name(found.engine))),
        Some(_) => Check::skip(
            id,
            format!("{}: mig-hook is not registered (migctl configure {})", called(found), name(found.engine)),
        ),
    }
}

fn any(engines: &Engines) -> Option<Check> {
    let installed: Vec<&Found> = engines.list.iter().filter(|found| found.program.is_some()).collect();
    let registered = engines.list.iter().any(|found| is_registered(found, &engines.hooks));
    if registered || installed.is_empty() {
        return None;
    }
    let commands: Vec<String> = installed.iter().map(|f| format!("migctl configure {}", name(f.engine))).collect();
    let found = "mig-hook is registered with no container engine: their containers start without a slice";
    Some(Check::warn("engine.any", found, format!("run: {}", commands.join(", or "))))
}

/// One entry of ours: everything that it names must be there, and the running daemon must know it.
fn entry(found: &Found, entry: &Entry, dockerd: Option<&[String]>, exists: &dyn Fn(&Path) -> bool) -> Check {
    let engine = name(found.engine);
    let id = format!("engine.{engine}.{}", entry.name);
    let again = format!("migctl configure {engine} --name {}", super::quoted(&entry.name));
    let names = |path: &str, what: &str| {
        format!(
            "{engine}'s runtime {} names {path} {what}, which is not there: its containers do not start",
            entry.name
        )
    };
    if !exists(Path::new(&entry.shim)) {
        return Check::fail(id, names(&entry.shim, "as its program"), format!("install mig-hook, then run: {again}"));
    }
    for (name, what) in [("--mig-runtime=", "as low-level runtime"), ("--mig-config=", "as settings")] {
        if let Some(path) = option(entry, name).filter(|path| !exists(Path::new(path))) {
            return Check::fail(id, names(path, what), format!("put it back, or run: {again}"));
        }
    }
    let passes = |key: &str| {
        let value = entry.keys.iter().find(|(name, _)| name == key).map_or("", |(_, value)| value);
        value.contains("\"mig.") || value.contains("\"*\"")
    };
    if found.engine == Engine::Containerd && !passes("pod_annotations") && !passes("container_annotations") {
        let text =
            format!("containerd's handler {} gets no mig.* annotations: requests of pods are not seen", entry.name);
        return Check::warn(id, text, format!("run: {again} && systemctl restart containerd"));
    }
    if dockerd.is_some_and(|known| !known.contains(&entry.name)) {
        let text = format!("the running dockerd does not know the runtime {} of its file yet", entry.name);
        return Check::warn(id, text, "run: systemctl reload docker");
    }
    let over = option(entry, "--mig-runtime=").map_or(String::new(), |path| format!(", over {path}"));
    let default = if found.engine == Engine::Docker && entry.default { ", the default" } else { "" };
    Check::ok(id, format!("{}: runtime {} is {}{over}{default}", called(found), entry.name, entry.shim))
}

fn hook_check(root: &Root, hook: &HookFile) -> Check {
    let (id, file) = ("engine.podman.hook", root.shown(&hook.file));
    match hook.exists {
        true => Check::ok(id, format!("podman: hook {file} runs {}", hook.program.display())),
        false => Check::fail(
            id,
            format!(
                "podman: hook {file} names {}, which is not there: containers that ask do not start",
                hook.program.display()
            ),
            "install mig-hook completely: make build && make install; or correct \"path\" in that file",
        ),
    }
}

fn podman_version(found: &Found, hooked: bool) -> Option<Check> {
    let version = found.version.filter(|version| hooked && *version < PODMAN)?;
    Some(Check::warn(
        "engine.podman.version",
        format!("podman {version} is older than {PODMAN}, the oldest that is tested with the precreate hook"),
        "update podman; or use its runtime: podman --runtime mig",
    ))
}

/// CRI-O does not start when it finds a stage that it does not know.
fn crio_hooks(root: &Root, files: &[PathBuf]) -> Option<Check> {
    let files: Vec<String> = files.iter().map(|file| root.shown(file)).collect();
    (!files.is_empty()).then(|| {
        Check::fail(
            "engine.crio.hooks",
            format!("{}: CRI-O reads it, does not know the stage precreate, and does not start", listed(&files)),
            "move it to a directory of podman's own: migctl configure podman names one",
        )
    })
}

#[cfg(test)]
mod tests {
    use super::super::Status;
    use super::*;

    fn installed(engine: Engine) -> Found {
        let program = Some(PathBuf::from("/usr/bin/x"));
        Found { engine, program, version: Some(Version::new(3, 4, 4)), entries: vec![], unreadable: vec![] }
    }

    fn ours(args: &[&str], default: bool) -> Entry {
        let args = args.iter().map(|arg| (*arg).to_owned()).collect();
        Entry { name: "mig".into(), shim: "/usr/bin/mig-runtime".into(), args, default, ..Entry::default() }
    }

    fn said(check: &Check) -> String {
        format!("{}\n{}", check.found, check.remedy.as_deref().unwrap_or_default())
    }

    #[test]
    fn what_an_entry_names_must_be_there() {
        let docker = installed(Engine::Docker);
        let pinned = ours(&["--mig-env", "--mig-runtime=/usr/bin/runc", "--mig-config=/etc/mine.toml"], false);
        let check = |missing: &str| entry(&docker, &pinned, None, &|path| path != Path::new(missing));
        let well = check("");
        assert_eq!((well.status, well.id.as_str()), (Status::Ok, "engine.docker.mig"));
        assert_eq!(well.found, "docker 3.4.4: runtime mig is /usr/bin/mig-runtime, over /usr/bin/runc");
        for missing in ["/usr/bin/mig-runtime", "/usr/bin/runc", "/etc/mine.toml"] {
            let check = check(missing);
            assert!(check.status == Status::Fail && said(&check).contains(missing), "{check:?}");
            assert!(said(&check).contains("migctl configure docker --name mig"), "{check:?}");
        }
    }

    #[test]
    fn a_dockerd_that_was_not_reloaded_is_told() {
        let check = |known: &[&str]| {
            let known: Vec<String> = known.iter().map(|name| (*name).to_owned()).collect();
            entry(&installed(Engine::Docker), &ours(&[], false), Some(&known), &|_| true)
        };
        assert_eq!(check(&["runc", "mig"]).status, Status::Ok);
        assert!(said(&check(&["runc"])).contains("systemctl reload docker"));
    }

    #[test]
    fn containerd_must_pass_annotations() {
        let containerd = installed(Engine::Containerd);
        let with = |keys: &[(&str, &str)]| Entry {
            keys: keys.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect(),
            ..ours(&[], true)
        };
        let check = |keys: &[(&str, &str)]| entry(&containerd, &with(keys), None, &|_| true).status;
        assert_eq!(check(&[("pod_annotations", "[\"mig.*\", \"mig.*/*\"]")]), Status::Ok);
        assert_eq!(check(&[("container_annotations", "[\"*\"]")]), Status::Ok);
        assert_eq!(check(&[("pod_annotations", "[\"io.*\"]")]), Status::Warn);
        assert_eq!(check(&[]), Status::Warn);
    }

    #[test]
    fn docker_s_default_with_the_environment_is_told_apart() {
        let mut docker = installed(Engine::Docker);
        docker.entries = vec![ours(&["--mig-env", "--mig-runtime=/r"], false), ours(&["--mig-env"], true)];
        let engines = Engines { list: vec![docker], dockerd: None, hooks: vec![], precreate: vec![] };
        assert_eq!((engines.with_environment().len(), engines.default_with_environment().len()), (1, 1));
        assert_eq!(engines.pinned(), [Path::new("/r")]);
    }

    #[test]
    fn an_engine_that_knows_nothing_of_us_is_no_fault_but_none_at_all_is() {
        let engines = |list| Engines { list, dockerd: None, hooks: vec![], precreate: vec![] };
        assert_eq!(unregistered(&installed(Engine::Podman)).status, Status::Skip);
        let none = any(&engines(vec![installed(Engine::Podman)])).unwrap();
        assert!(none.status == Status::Warn && said(&none).contains("migctl configure podman"), "{none:?}");
        let docker = Found { entries: vec![ours(&[], false)], ..installed(Engine::Docker) };
        assert_eq!(any(&engines(vec![installed(Engine::Podman), docker])), None);
        assert_eq!(podman_version(&installed(Engine::Podman), true).unwrap().status, Status::Warn);
        assert_eq!(podman_version(&installed(Engine::Podman), false), None);
    }

    #[test]
    fn dockerd_is_asked_by_its_socket() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("docker.sock");
        let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = vec![0; REQUEST.len()];
            stream.read_exact(&mut request).unwrap();
            stream.write_all(b"HTTP/1.0 200 OK\r\nA: b\r\n\r\n{\"Runtimes\": {\"runc\": {}, \"mig\": {}}}").unwrap();
            request
        });
        assert_eq!(runtimes_of_dockerd(&socket).unwrap(), ["runc", "mig"]);
        assert_eq!(server.join().unwrap(), REQUEST);
        assert_eq!(runtimes_of_dockerd(Path::new("/nowhere")), None);
    }
}
