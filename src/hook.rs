//! `mig-hook STAGE`: podman's precreate (config on stdin, edited config on stdout), the createRuntime and poststop hooks
//! that an edited config carries, and those that were registered by hand (`classic`).

use std::ffi::OsString;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::Value;

use crate::bundle;
use crate::classic;
use crate::config::{self, DriverSource, Settings};
use crate::container::Cgroup;
use crate::driver::DriverFiles;
use crate::edits::{self, Edit, HookCall, Node};
use crate::engine::{self, Binding, Engine, Failure, Released};
use crate::first;
use crate::gpu::nvml::Nvml;
use crate::handover;
use crate::host::{self, Host, HostError, Majors};
use crate::injection::{self, Capabilities, Injection};
use crate::lease::{Holder, Lease, Way};
use crate::report::{self, Exit, Misused, Refused};
use crate::request::{self, Request};

/// A hook's command line.
struct Call {
    config: Option<PathBuf>,
    stage: String,
    lease: Option<String>,
    slice: Option<String>,
}

/// Runs a stage. poststop ends with 0 whatever happens: runc 1.3 and youki fail `delete` otherwise.
pub fn main(args: &[OsString]) -> Exit {
    handover::unblock_signals();
    let caller = host::parent(std::process::id());
    let poststop = args.iter().any(|a| a == "poststop");
    let outcome = parse(args).and_then(|call| {
        let settings = Settings::load(call.config.as_deref())?;
        report::start_logging(&settings, false);
        run(&call, &settings)
    });
    match outcome {
        Ok(()) => Exit::Ok,
        Err(error) => {
            let code = report::exit_code(&error);
            let precreate = !poststop && args.iter().any(|a| a == "precreate");
            tell(&report::sentence(&error), caller.filter(|_| precreate));
            if poststop { Exit::Ok } else { code }
        }
    }
}

fn run(call: &Call, settings: &Settings) -> Result<()> {
    match (call.stage.as_str(), &call.lease) {
        ("precreate", _) => precreate(settings),
        ("createRuntime", Some(token)) => bind(settings, token),
        ("poststop", Some(token)) => poststop(settings, token),
        ("createRuntime" | "prestart", None) => classic::create(settings, call.slice.as_deref()),
        ("poststop", None) => classic::end(settings, call.slice.as_deref()),
        // These run in the container's world, with its root, its environment or both.
        (stage @ ("createContainer" | "startContainer"), _) => Err(Refused(format!(
            "mig-hook does not run as a {stage} hook: that stage is under the container's control"
        ))
        .into()),
        (stage, _) => Err(Misused(format!(
            "unknown hook stage {stage:?}; valid are precreate, createRuntime, prestart and poststop"
        ))
        .into()),
    }
}

fn parse(args: &[OsString]) -> Result<Call> {
    let mut call = Call { config: None, stage: String::new(), lease: None, slice: None };
    let mut words = args.iter();
    while let Some(word) = words.next() {
        let mut value = || words.next().cloned().ok_or_else(|| Misused(format!("{} needs a value", word.display())));
        match word.to_str() {
            Some("--config") => call.config = Some(value()?.into()),
            Some("--lease") => {
                let token = value()?;
                let plain = token.to_str().filter(|t| first::plain_name(t));
                call.lease = Some(plain.ok_or_else(|| Misused("--lease is no lease token".into()))?.to_owned());
            }
            Some("--slice") => call.slice = Some(value()?.into_string().unwrap_or_default()),
            Some(stage) if !stage.starts_with('-') && call.stage.is_empty() => call.stage = stage.to_owned(),
            _ => {
                return Err(Misused(format!(
                    "unexpected argument {:?}; usage: mig-hook [--config FILE] STAGE [--lease TOKEN | --slice UUID]",
                    word
                ))
                .into());
            }
        }
    }
    Ok(call)
}

/// podman's precreate. stdout carries the config and nothing else; without a request it is the very bytes that came.
fn precreate(settings: &Settings) -> Result<()> {
    let shown = "the config on standard input";
    let bytes = bundle::read_limited(std::io::stdin().lock(), shown)?;
    let config = bundle::parse(&bytes, shown)?;
    let owner = host::parent(std::process::id()).context("cannot tell which process runs this hook")?;
    let mut holder = engine::new_holder(Way::Precreate, owner);
    describe(&mut holder, &config.value);
    let asked = request::from_annotations(annotations(&config.value), None);
    let asked = asked.inspect_err(|error| engine::audit_refusal(&holder, None, &error.to_string()));
    // Flushed by hand: C's `main` runs without what Rust's own does at the end.
    let print = |text: &[u8]| {
        let mut out = std::io::stdout().lock();
        out.write_all(text).and_then(|()| out.flush())
    };
    let Some(request) = asked? else { return Ok(print(&bytes)?) };
    let mut value = config.certain(shown)?;
    // podman names a cgroup for every container but one with --cgroups=disabled.
    let prepared = prepare(settings, &mut value, &holder, &request, holder.cgroup.is_some())?;
    let nvml = Nvml::at(&settings.nvml);
    let engine = Engine::open(settings, &nvml)?;
    let lease = engine.acquire(&request, &holder)?;
    let handed_on = edit(settings, &lease, prepared, &mut value, true).and_then(|()| {
        print(&serde_json::to_vec(&value)?).context("cannot write the edited config to standard output")
    });
    handed_on.inspect_err(|_| give_back(&engine, &lease.token))
}

/// What is known of a container before anything is acquired for it.
pub(crate) struct Prepared {
    majors: Majors,
    driver: Driver,
}

/// What a container may get of the driver's files.
pub(crate) struct Driver {
    files: DriverFiles,
    needed: Capabilities,
    /// Whether its runtime can make places for mounts in its root file system.
    writable: bool,
}

impl Driver {
    /// By the settings and by what the container says that it needs.
    pub(crate) fn of(settings: &Settings, config: &Value, bundle: Option<&Path>) -> Result<Driver> {
        let files = engine::driver_files(settings)?;
        let needed = match files.is_empty() {
            true => Capabilities::default(),
            false => Capabilities::of(config).map_err(Failure::BadRequest)?,
        };
        Ok(Driver { files, needed, writable: bundle::has_writable_root(config, bundle) })
    }

    /// For slices of these profiles.
    pub(crate) fn injection(self, profiles: &str) -> Injection {
        let needed = if profiles.contains("+gfx") { self.needed.with_graphics() } else { self.needed };
        injection::injection(&self.files, &needed, self.writable)
    }
}

/// Takes earlier edits out of a config, and refuses a container that could not be kept to its own slices: by its device
/// rules, or because it has no `cgroup` that would enforce them. Before anything is acquired.
pub(crate) fn prepare(
    settings: &Settings,
    config: &mut Value,
    holder: &Holder,
    request: &Request,
    cgroup: bool,
) -> Result<Prepared> {
    let prepared = check(settings, config, holder.bundle.as_deref(), cgroup, Host::majors);
    prepared.inspect_err(|error| engine::audit_refusal(holder, Some(request), &report::sentence(error)))
}

/// The same with the majors as they are asked for, and without a word to the audit log.
pub(crate) fn check(
    settings: &Settings,
    config: &mut Value,
    bundle: Option<&Path>,
    cgroup: bool,
    majors: impl FnOnce(&Host) -> Result<Majors, HostError>,
) -> Result<Prepared> {
    check_dev(config, bundle)?;
    if !edits::claimed(config).is_empty() {
        let twice = "the container asks by annotation or environment, and by --device; leave one of them out";
        return Err(Refused(twice.into()).into());
    }
    let majors = majors(&engine::host_of(settings))?;
    edits::strip(config, majors);
    check_rules(settings, config, majors, cgroup)?;
    Ok(Prepared { majors, driver: Driver::of(settings, config, bundle)? })
}

/// Refuses a container whose /dev is not made for it by the runtime.
pub(crate) fn check_dev(config: &Value, bundle: Option<&Path>) -> Result<()> {
    if let Some(why) = edits::bound_dev(config) {
        return Err(Refused(why).into());
    }
    if bundle::dev_is_link(config, bundle) {
        return Err(Refused("/dev in the image is a symbolic link; nodes are not made behind it".into()).into());
    }
    Ok(())
}

/// Refuses a container whose device rules would open other slices than its own, or that has no `cgroup` to enforce them,
/// unless the settings allow that.
pub(crate) fn check_rules(settings: &Settings, config: &Value, majors: Majors, cgroup: bool) -> Result<()> {
    // Without root nothing enforces them in any case (docs/engines.md).
    let open = if cgroup || settings.rootless.is_some() {
        edits::open_rule(config, majors)
    } else {
        Some("it runs without a cgroup, so nothing enforces its device rules".into())
    };
    match open {
        Some(why) if !settings.open_device_rules => Err(Refused(open_sentence(&why)).into()),
        _ => Ok(()),
    }
}

/// Refuses a user without root whom the modes of the host's nodes shut out: the runtime binds these, and CUDA would fail.
pub(crate) fn check_modes(settings: &Settings, nodes: &[Node]) -> Result<()> {
    settings.rootless.map_or(Ok(()), |uid| check_open(uid, &settings.dev_root, nodes))
}

/// The same for us, who are `uid`.
pub(crate) fn check_open(uid: u32, dev_root: &Path, nodes: &[Node]) -> Result<()> {
    let closed = nodes.iter().map(|node| dev_root.join(&node.name)).find(|path| !host::can_open(path));
    let Some(path) = closed.map(|path| path.display().to_string()) else { return Ok(()) };
    Err(Refused(format!("uid {uid} may not open {path}; an administrator can allow it: setfacl -m u:{uid}:rw {path}"))
        .into())
}

pub(crate) fn open_sentence(why: &str) -> String {
    format!(
        "the container would reach other slices than its own: {why}; start it without --privileged, wide \
         --device-cgroup-rule and --cgroups=disabled, or set requests.open_device_rules = true where that is meant"
    )
}

/// Writes a lease's slices into a prepared config.
pub(crate) fn edit(
    settings: &Settings,
    lease: &Lease,
    prepared: Prepared,
    config: &mut Value,
    bind: bool,
) -> Result<()> {
    let host = engine::host_of(settings);
    let majors = prepared.majors;
    if settings.rootless.is_some() || edits::has_user_namespace(config) {
        engine::make_host_nodes(&host, &lease.slices, majors)?;
    }
    if settings.rootless.is_none()
        && edits::has_systemd_cgroup(config)
        && let Err(error) = engine::make_known_to_systemd(&host, &lease.slices, majors)
    {
        tracing::warn!("a daemon-reload of systemd may take its slice from the container: {error}");
    }
    let nodes = engine::nodes_of(&host, &lease.slices, majors);
    check_modes(settings, &nodes)?;
    let environment = environment(settings, &lease.uuids(), &lease.profiles());
    let driver = prepared.driver.injection(&lease.profiles());
    let masked = edits::masked_paths(&host.gpus(), lease.slices.iter().map(|slice| slice.gpu_minor));
    let program = config::hook_program()?;
    let hooks = HookCall { program: &program, config: settings.file.as_deref(), token: &lease.token };
    let edit = Edit { nodes: &nodes, environment: &environment, driver: &driver, masked: &masked, hooks, bind };
    Ok(edits::apply(config, &edit).map_err(Failure::BadRequest)?)
}

/// The variables of the processes that have these slices.
pub(crate) fn environment(settings: &Settings, uuids: &str, profiles: &str) -> Vec<String> {
    edits::environment(uuids, profiles, settings.driver_files == DriverSource::None)
}

/// Releases what a failure after acquire leaves over.
pub(crate) fn give_back(engine: &Engine, token: &str) {
    if let Err(error) = engine.release(token, None, "the container could not be set up") {
        tracing::error!(token, "cannot give the slice back, migctl gc will: {error}");
    }
}

/// String annotations of a config.
pub(crate) fn annotations(config: &Value) -> impl Iterator<Item = (&str, &str)> {
    let object = config.get("annotations").and_then(Value::as_object);
    object.into_iter().flatten().filter_map(|(key, value)| Some((key.as_str(), value.as_str()?)))
}

/// The container's name in its pod, where the engine tells it: containerd by an annotation of its own, CRI-O by the
/// kubelet's label (internal/factory/container, SpecAddAnnotations; its ContainerName is a sandbox's).
pub(crate) fn container_name(config: &Value) -> Option<&str> {
    const NAME_KEYS: [&str; 2] = ["io.kubernetes.cri.container-name", "io.kubernetes.container.name"];
    annotations(config).find(|(key, _)| NAME_KEYS.contains(key)).map(|(_, name)| name)
}

/// Whether this is a pod's sandbox, which asks for nothing itself: the pod's annotations reach it too.
pub(crate) fn is_sandbox(config: &Value) -> bool {
    annotations(config).any(|(key, value)| first::SANDBOX_KEYS.contains(&key) && value == "sandbox")
}

/// What a config tells about its container besides the request.
pub(crate) fn describe(holder: &mut Holder, config: &Value) {
    const IMAGE_KEYS: [&str; 3] =
        ["io.kubernetes.cri.image-name", "io.kubernetes.cri-o.ImageName", "org.opencontainers.image.ref.name"];
    let annotated = |key: &&str| annotations(config).find(|(k, _)| k == key).map(|(_, image)| image);
    holder.image = IMAGE_KEYS.iter().find_map(annotated).map(|image| image.chars().take(256).collect());
    // `parent:prefix:name` is systemd's form: the scope's name says which it will be.
    let path = config.pointer("/linux/cgroupsPath").and_then(Value::as_str);
    holder.cgroup = path.map(|path| match path.splitn(3, ':').collect::<Vec<_>>().as_slice() {
        [_, prefix, name] => format!("/{prefix}-{name}.scope"),
        _ => format!("/{}", path.trim_start_matches('/')),
    });
}

/// The State that a runtime sends to a hook: what we need of it, and the whole for its annotations.
#[derive(Debug)]
pub struct State {
    /// The container's id, a plain name.
    pub id: String,
    /// Its first process, where there is one.
    pub pid: Option<u32>,
    /// Where it is to be believed: crun before 1.27 may say `/`.
    pub bundle: Option<PathBuf>,
    /// All of it.
    pub value: Value,
}

impl State {
    /// Reads its text. crun adds `root`, and in some stages has pid 0; the rest is none of our business.
    pub fn parse(bytes: &[u8], shown: &str) -> Result<State> {
        let state = bundle::parse(bytes, shown)?.value;
        let text = |key: &str| state.get(key).and_then(Value::as_str);
        let pid = state.get("pid").and_then(Value::as_u64).and_then(|pid| u32::try_from(pid).ok());
        let id = text("id").ok_or_else(|| Failure::BadRequest(format!("{shown} has no container id")))?;
        if !first::plain_name(id) {
            return Err(Refused("the container id in the State is not a plain name".into()).into());
        }
        let bundle = text("bundle").map(PathBuf::from).filter(|b| b.is_absolute() && b.parent().is_some());
        Ok(State { id: id.to_owned(), pid: pid.filter(|pid| *pid > 0), bundle, value: state })
    }
}

/// The State on standard input.
pub(crate) fn state() -> Result<State> {
    let shown = "the State on standard input";
    State::parse(&bundle::read_limited(std::io::stdin().lock(), shown)?, shown)
}

/// What the State of a createRuntime hook and the runtime that calls us tell about the container.
pub(crate) fn binding(state: &State) -> Result<Binding> {
    let no_pid =
        || Failure::BadRequest("the State on standard input has no pid: this is not a createRuntime hook".into());
    let pid = state.pid.ok_or_else(no_pid)?;
    let caller = host::parent(std::process::id()).unwrap_or(0);
    let words = host::command_line(caller);
    let plan = first::plan(words.get(1..).unwrap_or_default().iter().cloned());
    Ok(Binding {
        container: state.id.clone(),
        pid,
        bundle: state.bundle.clone(),
        runtime_root: plan.root,
        runtime: host::program(caller),
    })
}

/// createRuntime: tells the lease which container it became. A failure fails the container's create.
fn bind(settings: &Settings, token: &str) -> Result<()> {
    let binding = binding(&state()?)?;
    let nvml = Nvml::at(&settings.nvml);
    let engine = Engine::open(settings, &nvml)?;
    let lease = engine.confirm(token, &binding)?;
    check_live_rules(settings, binding.pid).inspect_err(|error| {
        engine::audit_refusal(&lease.holder, None, &report::sentence(error));
        give_back(&engine, token);
    })
}

/// Refuses a container in whose cgroup no device rules are in force, whatever its config says: youki 0.7 enforces none on
/// cgroup v2 unless it was built with cgroupsv2_devices (run). Where the cgroups can't be looked at, the config must do.
pub(crate) fn check_live_rules(settings: &Settings, pid: u32) -> Result<()> {
    if settings.rootless.is_some() || settings.open_device_rules {
        return Ok(());
    }
    match Cgroup::of(pid, None).and_then(|cgroup| cgroup.open()) {
        Ok(Some(why)) => Err(Refused(open_sentence(&why)).into()),
        Ok(None) => Ok(()),
        Err(error) => {
            tracing::debug!("the device rules in force can't be read: {error}");
            Ok(())
        }
    }
}

/// poststop: gives back what this very lease and container hold. May come twice, late, or for a container never seen.
fn poststop(settings: &Settings, token: &str) -> Result<()> {
    let state = state()?;
    let nvml = Nvml::at(&settings.nvml);
    release(&Engine::open(settings, &nvml)?, token, &state.id)
}

/// Releases what a container that has ended held.
pub(crate) fn release(engine: &Engine, token: &str, container: &str) -> Result<()> {
    match engine.release(token, Some(container), "its container has ended")? {
        Released::Busy { reason } => {
            tracing::warn!(token, "the slice is not free yet, the next acquire or migctl gc goes on with it: {reason}")
        }
        outcome => tracing::debug!(token, ?outcome, "poststop"),
    }
    Ok(())
}

/// Says why: to stderr and to the journal; and, since podman throws away what a precreate hook prints, to podman's own
/// stderr where the kernel lets us, if it still lives: whoever takes in the orphans of a killed podman did not ask.
fn tell(reason: &str, caller: Option<u32>) {
    eprintln!("mig-hook: {reason}");
    tracing::error!("{reason}");
    let caller = caller.filter(|_| host::parent(std::process::id()) == caller);
    if let Some(Ok(mut stderr)) = caller.map(handover::stderr_of) {
        let _ = writeln!(stderr, "mig-hook: {reason}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_containers_name_in_its_pod() {
        let name = |key: &str| container_name(&json!({"annotations": {"a": "b", key: "trainer"}})).map(str::to_owned);
        assert_eq!(name("io.kubernetes.cri.container-name").as_deref(), Some("trainer"));
        assert_eq!(name("io.kubernetes.container.name").as_deref(), Some("trainer"));
        assert_eq!(name("io.kubernetes.cri-o.ContainerName"), None, "k8s_POD_… of a sandbox");
        assert_eq!(container_name(&json!({})), None);
    }
}
