//! What a granted slice changes in a config.json, and the proof that nothing else of the GPUs is reachable afterwards.
//!
//! Works on [`serde_json::Value`]: fields that we do not know survive in their order.

use std::path::Path;

use oci_spec::OciSpecError;
use oci_spec::runtime::{HookBuilder, LinuxDeviceBuilder, LinuxDeviceCgroupBuilder, LinuxDeviceType, MountBuilder};
use serde_json::{Value, json};

use crate::host::{Majors, NodeMode};
use crate::injection::{self, Injection};

/// Annotation that marks an edited config with the lease's token.
pub const LEASE: &str = "mig.lease";
/// Minor of /dev/nvidiactl (open-gpu-kernel-modules, nv.h).
const CTL_MINOR: u32 = 255;
/// Variables that we set, and remove before: an image's own value must not survive beside ours.
const VARIABLES: [&str; 4] =
    ["CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "MIG_DEVICE_UUIDS", "MIG_DEVICE_PROFILES"];
/// Seconds that a runtime gives our hooks: the lock wait (15 s and 5 s) and the driver calls that follow.
const BIND_TIMEOUT: i64 = 30;
/// The same for poststop.
pub const POSTSTOP_TIMEOUT: i64 = 20;
/// A hook without `env` inherits the runtime's, and under runc 1.1 in createContainer even the image's (CVE-2025-23266): so
/// it is never left out.
pub const HOOK_ENVIRONMENT: &str = "PATH=/usr/sbin:/usr/bin:/sbin:/bin";

/// A device node for the container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// Path below /dev, as `nvidia-caps/nvidia-cap12`.
    pub name: String,
    /// Major number.
    pub major: u32,
    /// Minor number.
    pub minor: u32,
    /// Mode and owner.
    pub mode: NodeMode,
}

/// One granted slice, as far as a container sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Given {
    /// Minor of the parent GPU.
    pub gpu_minor: u32,
    /// Capability minors of the GPU and the compute instance.
    pub caps: [u32; 2],
}

/// The nodes of some slices: nvidiactl, the parents, uvm, and exactly their capabilities (0444), never cap1 or cap2. `host`
/// tells mode and owner of a node on the host, which sites restrict by module options.
pub fn nodes(given: &[Given], majors: Majors, host: impl Fn(&str, u32, u32) -> Option<NodeMode>) -> Vec<Node> {
    let open = NodeMode { mode: 0o666, uid: 0, gid: 0 };
    let node = |name: String, major, minor| {
        let mode = host(&name, major, minor).unwrap_or(open);
        Node { name, major, minor, mode }
    };
    let mut nodes = vec![node("nvidiactl".into(), majors.nvidia, CTL_MINOR)];
    for slice in given {
        nodes.push(node(format!("nvidia{}", slice.gpu_minor), majors.nvidia, slice.gpu_minor));
    }
    if let Some(uvm) = majors.uvm {
        nodes.push(node("nvidia-uvm".into(), uvm, 0));
        nodes.push(node("nvidia-uvm-tools".into(), uvm, 1));
    }
    let cap = NodeMode { mode: 0o444, uid: 0, gid: 0 };
    for minor in given.iter().flat_map(|slice| slice.caps) {
        nodes.push(Node { name: format!("nvidia-caps/nvidia-cap{minor}"), major: majors.caps, minor, mode: cap });
    }
    let mut seen = std::collections::BTreeSet::new();
    nodes.retain(|n| seen.insert(n.name.clone()));
    nodes
}

/// The variables that a slice's processes get. `delegate`: a stacked NVIDIA runtime is to bring the driver's files, for
/// just these slices; otherwise it is kept from adding every GPU again.
pub fn environment(uuids: &str, profiles: &str, delegate: bool) -> Vec<String> {
    let values = [uuids, if delegate { uuids } else { "void" }, uuids, profiles];
    VARIABLES.iter().zip(values).map(|(key, value)| format!("{key}={value}")).collect()
}

/// Puts variables into a process object (of a config, or of `exec --process`), replacing those of the same names.
pub fn set_environment(process: &mut Value, variables: &[String]) -> Result<(), String> {
    let object = process.as_object_mut().ok_or("process is not an object")?;
    let env = object.entry("env").or_insert(Value::Array(vec![]));
    if env.is_null() {
        *env = Value::Array(vec![]);
    }
    let env = env.as_array_mut().ok_or("process.env is not an array")?;
    let key = |v: &str| v.split('=').next().unwrap_or_default().to_owned();
    let ours: Vec<String> = variables.iter().map(|v| key(v)).collect();
    env.retain(|v| v.as_str().is_none_or(|v| !ours.contains(&key(v))));
    env.extend(variables.iter().cloned().map(Value::String));
    Ok(())
}

/// Variable of directories that a loader looks through first; musl's too.
const LIBRARY_PATH: &str = "LD_LIBRARY_PATH";

/// Puts directories of ours before those that a process object has its loader look through.
pub fn prepend_library_path(process: &mut Value, dirs: &[&str]) -> Result<(), String> {
    if dirs.is_empty() {
        return Ok(());
    }
    let theirs = injection::variable(process.get("env"), LIBRARY_PATH).unwrap_or_default();
    let theirs = theirs.split(':').filter(|dir| !dirs.contains(dir)).collect::<Vec<_>>().join(":");
    let mut path = dirs.join(":");
    // An empty part would be the working directory.
    if !theirs.is_empty() {
        path += &format!(":{theirs}");
    }
    let object = process.as_object_mut().ok_or("process is not an object")?;
    if let Some(env) = object.get_mut("env").and_then(Value::as_array_mut) {
        env.retain(|var| var.as_str().and_then(|var| var.split_once('=')).is_none_or(|(key, _)| key != LIBRARY_PATH));
    }
    set_environment(process, &[format!("{LIBRARY_PATH}={path}")])
}

/// What hides the GPUs that a container has nothing of: the driver's files are the same in every /proc.
pub fn masked_paths(gpus: &[(String, u32)], own: impl IntoIterator<Item = u32>) -> Vec<String> {
    let own: Vec<u32> = own.into_iter().collect();
    let others = gpus.iter().filter(|(_, minor)| !own.contains(minor));
    others.flat_map(|(address, minor)| [format!("{MASKED_GPUS}{address}"), format!("{MASKED_CAPS}{minor}")]).collect()
}

const MASKED_GPUS: &str = "/proc/driver/nvidia/gpus/";
const MASKED_CAPS: &str = "/proc/driver/nvidia/capabilities/gpu";

/// How the hooks that we write call us: nothing of the container's, everything absolute.
#[derive(Debug, Clone, Copy)]
pub struct HookCall<'a> {
    /// `mig-hook`, absolute.
    pub program: &'a Path,
    /// The settings file, absolute, where one is in use.
    pub config: Option<&'a Path>,
    /// The lease.
    pub token: &'a str,
}

impl HookCall<'_> {
    fn entry(&self, stage: &str, timeout: i64) -> Result<Value, String> {
        let hook = HookBuilder::default()
            .path(self.program)
            .args(hook_words(self.config, stage, ["--lease", self.token]))
            .env([HOOK_ENVIRONMENT.to_owned()])
            .timeout(timeout);
        value_of(hook.build())
    }
}

/// The command line of a hook of ours.
pub fn hook_words(config: Option<&Path>, stage: &str, option: [&str; 2]) -> Vec<String> {
    let mut words = vec!["mig-hook".to_owned()];
    if let Some(config) = config {
        words.extend(["--config".into(), config.display().to_string()]);
    }
    words.extend([stage, option[0], option[1]].map(str::to_owned));
    words
}

/// Everything that [`apply`] puts into a config.
#[derive(Debug, Clone, Copy)]
pub struct Edit<'a> {
    /// Device nodes.
    pub nodes: &'a [Node],
    /// Variables.
    pub environment: &'a [String],
    /// The driver's files.
    pub driver: &'a Injection,
    /// Paths that are hidden.
    pub masked: &'a [String],
    /// Our hooks.
    pub hooks: HookCall<'a>,
    /// Whether a createRuntime hook must bind the container: where no pid file will tell who it is.
    pub bind: bool,
}

/// Takes every edit of ours out of a config: the mark, our hooks, NVIDIA nodes, rules and mounts, by path and by major.
/// What a config carries of these came from an earlier life of the container, or from somebody who forged it.
pub fn strip(config: &mut Value, majors: Majors) {
    if let Some(annotations) = config.pointer_mut("/annotations").and_then(Value::as_object_mut) {
        annotations.shift_remove(LEASE);
    }
    if let Some(hooks) = config.pointer_mut("/hooks").and_then(Value::as_object_mut) {
        for entries in hooks.values_mut().filter_map(Value::as_array_mut) {
            entries.retain(|hook| !is_our_hook(hook));
        }
    }
    let list = |config: &mut Value, at: &str, keep: &dyn Fn(&Value) -> bool| {
        if let Some(entries) = config.pointer_mut(at).and_then(Value::as_array_mut) {
            entries.retain(|entry| keep(entry));
        }
    };
    let is_nvidia_path = |v: &Value, key: &str| v.get(key).and_then(Value::as_str).is_some_and(nvidia_path);
    list(config, "/linux/devices", &|d| !is_nvidia_path(d, "path") && !of_major(d, majors));
    list(config, "/linux/resources/devices", &|r| !of_major(r, majors) || r.get("allow") == Some(&Value::Bool(false)));
    let is_ours =
        |m: &Value| m.get("destination").and_then(Value::as_str).is_some_and(|at| at.starts_with(injection::OWN_DIR));
    list(config, "/mounts", &|m| !is_nvidia_path(m, "destination") && !is_ours(m));
    let is_mask = |p: &Value| p.as_str().is_some_and(|p| p.starts_with(MASKED_GPUS) || p.starts_with(MASKED_CAPS));
    list(config, "/linux/maskedPaths", &|p| !is_mask(p));
}

/// Whether a config's hooks are those of this very lease: what makes its `mig.lease` believable.
pub fn carries_lease(config: &Value, token: &str) -> bool {
    let hooks = config.pointer("/hooks/createRuntime").and_then(Value::as_array);
    let with_token = |hook: &Value| {
        let args = hook.get("args").and_then(Value::as_array);
        is_our_hook(hook) && args.is_some_and(|a| a.iter().any(|arg| arg.as_str() == Some(token)))
    };
    hooks.is_some_and(|hooks| hooks.iter().any(with_token))
}

/// The slices that a CDI spec's hooks in a config will take, in their order.
pub fn claimed<'a>(config: &'a Value) -> Vec<&'a str> {
    let hooks = config.pointer("/hooks/createRuntime").and_then(Value::as_array).into_iter().flatten();
    let slice = |hook: &'a Value| {
        let mut args = hook.get("args")?.as_array()?.iter().filter_map(Value::as_str);
        args.find(|arg| *arg == "--slice").and_then(|_| args.next())
    };
    hooks.filter(|hook| is_our_hook(hook)).filter_map(slice).collect()
}

/// Takes the rules for just these nodes out of a config, so that [`open_rule`] sees the others.
pub fn drop_rules_of(config: &mut Value, nodes: &[Node]) {
    let number = |rule: &Value, key: &str| rule.get(key).and_then(Value::as_u64);
    let exactly = |rule: &Value, node: &Node| {
        (number(rule, "major"), number(rule, "minor")) == (Some(node.major.into()), Some(node.minor.into()))
    };
    if let Some(rules) = config.pointer_mut("/linux/resources/devices").and_then(Value::as_array_mut) {
        rules.retain(|rule| kind(rule) != "c" || !nodes.iter().any(|node| exactly(rule, node)));
    }
}

/// The token that an edited config is marked with.
pub fn marked(config: &Value) -> Option<&str> {
    config.pointer("/annotations")?.get(LEASE)?.as_str()
}

fn is_our_hook(hook: &Value) -> bool {
    let path = hook.get("path").and_then(Value::as_str).unwrap_or_default();
    Path::new(path).file_name().is_some_and(|name| name == "mig-hook")
}

fn nvidia_path(path: &str) -> bool {
    let rest = path.trim_start_matches('/').strip_prefix("dev/").map(|r| r.trim_start_matches('/'));
    rest.is_some_and(|r| r.starts_with("nvidia"))
}

fn of_major(entry: &Value, majors: Majors) -> bool {
    let major = entry.get("major").and_then(Value::as_i64);
    let kind = entry.get("type").and_then(Value::as_str);
    kind != Some("b") && major.is_some_and(|m| nvidia_majors(majors).any(|ours| i64::from(ours) == m))
}

fn nvidia_majors(majors: Majors) -> impl Iterator<Item = u32> {
    [Some(majors.nvidia), Some(majors.caps), majors.uvm].into_iter().flatten()
}

/// Writes a grant into a config that was [`strip`]ped.
pub fn apply(config: &mut Value, edit: &Edit) -> Result<(), String> {
    make_nodes(config, edit.nodes)?;
    set_environment(config.get_mut("process").ok_or("config has no process")?, edit.environment)?;
    give_driver(config, edit.driver, edit.masked)?;
    let annotations = as_object(config)?.entry("annotations").or_insert(json!({}));
    if annotations.is_null() {
        *annotations = json!({});
    }
    as_object(annotations)?.insert(LEASE.into(), edit.hooks.token.into());
    let hooks = object_at(config, "hooks")?;
    if edit.bind {
        array_at(hooks, "createRuntime")?.push(edit.hooks.entry("createRuntime", BIND_TIMEOUT)?);
    }
    array_at(hooks, "poststop")?.push(edit.hooks.entry("poststop", POSTSTOP_TIMEOUT)?);
    Ok(())
}

/// Has the runtime make these nodes, and its device rules allow them.
pub fn make_nodes(config: &mut Value, nodes: &[Node]) -> Result<(), String> {
    let linux = object_at(config, "linux")?;
    let devices = array_at(linux, "devices")?;
    for node in nodes {
        let device = LinuxDeviceBuilder::default()
            .path(format!("/dev/{}", node.name))
            .typ(LinuxDeviceType::C)
            .major(node.major)
            .minor(node.minor)
            .file_mode(node.mode.mode)
            .uid(node.mode.uid)
            .gid(node.mode.gid);
        devices.push(value_of(device.build())?);
    }
    let rules = array_at(object_at(linux, "resources")?, "devices")?;
    if rules.is_empty() {
        // `podman --uidmap` writes no rules: without a deny-all ours would allow nothing that was not allowed before.
        rules.push(json!({"allow": false, "access": "rwm"}));
    }
    for node in nodes {
        // After every deny, and no `m`: the runtime makes the nodes, nobody inside needs to.
        let rule = LinuxDeviceCgroupBuilder::default()
            .allow(true)
            .typ(LinuxDeviceType::C)
            .major(node.major)
            .minor(node.minor)
            .access("rw");
        rules.push(value_of(rule.build())?);
    }
    Ok(())
}

/// Mounts the host's nodes in the place of those that a runtime in a user namespace can't make. It does as much itself with
/// `linux.devices`, but only from /dev.
pub fn bind_nodes(config: &mut Value, nodes: &[Node], dev_root: &Path) -> Result<(), String> {
    let mounts = array_at(config, "mounts")?;
    for node in nodes {
        let mount = MountBuilder::default()
            .destination(format!("/dev/{}", node.name))
            .typ("bind")
            .source(dev_root.join(&node.name))
            // Nothing more: other flags are a remount, which a user namespace may not be allowed (mount_namespaces(7)).
            .options(["bind".to_owned()]);
        mounts.push(value_of(mount.build())?);
    }
    Ok(())
}

/// Mounts the driver's files, has the loader look there first, and hides these paths.
pub fn give_driver(config: &mut Value, driver: &Injection, masked: &[String]) -> Result<(), String> {
    if !masked.is_empty() {
        let paths = array_at(object_at(config, "linux")?, "maskedPaths")?;
        paths.extend(masked.iter().cloned().map(Value::String));
    }
    if !driver.mounts.is_empty() {
        let mounts = array_at(config, "mounts")?;
        let of_ours = |at: &str| driver.mounts.iter().any(|ours| ours.destination == at);
        mounts.retain(|m| !m.get("destination").and_then(Value::as_str).is_some_and(of_ours));
        for mount in &driver.mounts {
            let mount = MountBuilder::default()
                .destination(&mount.destination)
                .typ("bind")
                .source(&mount.source)
                .options(mount.options.clone());
            mounts.push(value_of(mount.build())?);
        }
    }
    let process = config.get_mut("process").ok_or("config has no process")?;
    prepend_library_path(process, &driver.library_dirs)
}

/// A part that we build ourselves, typed by oci-spec, as it goes into a config.
fn value_of<T: serde::Serialize>(built: Result<T, OciSpecError>) -> Result<Value, String> {
    let built = built.map_err(|e| e.to_string())?;
    serde_json::to_value(built).map_err(|e| e.to_string())
}

fn as_object(value: &mut Value) -> Result<&mut serde_json::Map<String, Value>, String> {
    value.as_object_mut().ok_or_else(|| "config.json: an object was expected where another value stands".into())
}

fn object_at<'a>(parent: &'a mut Value, key: &str) -> Result<&'a mut Value, String> {
    let value = as_object(parent)?.entry(key).or_insert(Value::Null);
    if value.is_null() {
        *value = json!({});
    }
    match value.is_object() {
        true => Ok(value),
        false => Err(format!("config.json: {key} is not an object")),
    }
}

fn array_at<'a>(parent: &'a mut Value, key: &str) -> Result<&'a mut Vec<Value>, String> {
    let value = as_object(parent)?.entry(key).or_insert(Value::Null);
    if value.is_null() {
        *value = json!([]);
    }
    value.as_array_mut().ok_or_else(|| format!("config.json: {key} is not an array"))
}

/// A sentence about the first rule of a [`strip`]ped config that allows reading or writing NVIDIA devices; `None` when there
/// is none, or no rule at all, since [`apply`] then begins with deny-all. A rule that is narrowed again by later, smaller
/// denials still counts.
pub fn open_rule(config: &Value, majors: Majors) -> Option<String> {
    let rules = config.pointer("/linux/resources/devices").and_then(Value::as_array).filter(|r| !r.is_empty())?;
    let last_deny_all = rules.iter().rposition(|r| !allows(r) && is_wildcard(r) && kind(r) == "a" && is_whole(r));
    let Some(last) = last_deny_all else {
        return Some("its device rules deny nothing".into());
    };
    rules[last..].iter().filter(|r| allows(r) && touches(r)).find_map(|rule| {
        let number = |key: &str| rule.get(key).and_then(Value::as_i64).filter(|n| *n >= 0);
        let concerned =
            kind(rule) != "b" && number("major").is_none_or(|m| nvidia_majors(majors).any(|ours| i64::from(ours) == m));
        concerned.then(|| {
            let part = |key| number(key).map_or("*".to_owned(), |n| n.to_string());
            format!("its device rules allow \"{} {}:{}\"", kind(rule), part("major"), part("minor"))
        })
    })
}

/// A sentence where /dev itself is mounted from elsewhere: no runtime makes nodes there then, and the container would start
/// without its slice.
pub fn bound_dev(config: &Value) -> Option<String> {
    let mount = mounts_at(config, "/dev").find(|m| is_bind(m))?;
    let source = mount.get("source").and_then(Value::as_str).unwrap_or_default();
    Some(format!("{source} is mounted over the container's /dev, where its slice's nodes would have to be made"))
}

/// Whether the container has a user namespace: then the runtime can't make nodes and binds the host's.
pub fn has_user_namespace(config: &Value) -> bool {
    let namespaces = config.pointer("/linux/namespaces").and_then(Value::as_array);
    namespaces.is_some_and(|all| all.iter().any(|n| n.get("type").is_some_and(|kind| kind == "user")))
}

/// Whether systemd makes the container's cgroup: `slice:prefix:name` (runc, docs/systemd.md).
pub fn has_systemd_cgroup(config: &Value) -> bool {
    let path = config.pointer("/linux/cgroupsPath").and_then(Value::as_str);
    path.is_some_and(|path| path.matches(':').count() == 2)
}

/// Whether the last mount at that place is a tmpfs made for this container.
pub fn has_tmpfs(config: &Value, at: &str) -> bool {
    let last = mounts_at(config, at).last();
    last.is_some_and(|m| m.get("type").and_then(Value::as_str) == Some("tmpfs") && !is_bind(m))
}

fn mounts_at<'a>(config: &'a Value, at: &str) -> impl Iterator<Item = &'a Value> {
    let mounts = config.get("mounts").and_then(Value::as_array).into_iter().flatten();
    mounts.filter(move |m| {
        let destination = m.get("destination").and_then(Value::as_str).unwrap_or_default();
        Path::new(destination).components().eq(Path::new(at).components())
    })
}

fn is_bind(mount: &Value) -> bool {
    let options = mount.get("options").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str);
    mount.get("type").and_then(Value::as_str) == Some("bind")
        || options.into_iter().any(|o| o == "bind" || o == "rbind")
}

fn allows(rule: &Value) -> bool {
    rule.get("allow") == Some(&Value::Bool(true))
}

fn kind(rule: &Value) -> &str {
    rule.get("type").and_then(Value::as_str).filter(|t| !t.is_empty()).unwrap_or("a")
}

fn is_wildcard(rule: &Value) -> bool {
    let any = |key: &str| rule.get(key).and_then(Value::as_i64).is_none_or(|n| n < 0);
    any("major") && any("minor")
}

/// Both reading and writing. A runtime may take one that denies only the one at its word (crun, on cgroup v2).
fn is_whole(rule: &Value) -> bool {
    let access = rule.get("access").and_then(Value::as_str).unwrap_or_default();
    access.is_empty() || (access.contains('r') && access.contains('w'))
}

/// Reads or writes. Engines allow `c *:* m` by default: mknod without open reaches nothing.
fn touches(rule: &Value) -> bool {
    rule.get("access").and_then(Value::as_str).is_none_or(|a| a.is_empty() || a.contains(['r', 'w']))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MAJORS: Majors = Majors { nvidia: 195, caps: 240, uvm: Some(510) };

    fn own() -> Vec<Node> {
        nodes(&[Given { gpu_minor: 1, caps: [156, 157] }], MAJORS, |_, _, _| None)
    }

    fn edited(mut config: Value) -> Value {
        let hooks = HookCall { program: Path::new("/x/mig-hook"), config: Some(Path::new("/c.toml")), token: "t1" };
        let environment = environment("MIG-a", "1g.10gb", false);
        strip(&mut config, MAJORS);
        let masked = masked_paths(&[("0000:07:00.0".into(), 0), ("0000:0f:00.0".into(), 1)], [1]);
        let driver = driver();
        let edit =
            Edit { nodes: &own(), environment: &environment, driver: &driver, masked: &masked, hooks, bind: true };
        apply(&mut config, &edit).unwrap();
        config
    }

    fn driver() -> Injection {
        let mount = |source: &str, destination: &str| injection::Mount {
            source: source.into(),
            destination: destination.into(),
            options: vec!["ro".into(), "rbind".into()],
        };
        Injection {
            mounts: vec![
                mount("/usr/lib/libcuda.so.1.2", "/dev/mig-hook/lib64/libcuda.so.1"),
                mount("/usr/lib/libcuda.so.1.2", "/usr/lib64/libcuda.so.1"),
            ],
            library_dirs: vec!["/dev/mig-hook/lib64"],
        }
    }

    fn bare<'a>(nodes: &'a [Node], environment: &'a [String], hooks: HookCall<'a>) -> Edit<'a> {
        static NOTHING: Injection = Injection { mounts: vec![], library_dirs: vec![] };
        Edit { nodes, environment, driver: &NOTHING, masked: &[], hooks, bind: true }
    }

    fn docker_like() -> Value {
        json!({
            "ociVersion": "1.0.2", "x-unknown": [1, {"deep": null}],
            "process": {"env": ["PATH=/bin", "NVIDIA_VISIBLE_DEVICES=all", "CUDA_VISIBLE_DEVICES=0"], "x-p": 1},
            "linux": {
                "resources": {"devices": [
                    {"allow": false, "access": "rwm"},
                    {"allow": true, "type": "c", "access": "m"}, {"allow": true, "type": "b", "access": "m"},
                    {"allow": true, "type": "c", "major": 1, "minor": 3, "access": "rwm"},
                    {"allow": true, "type": "c", "major": 195, "minor": 0, "access": "rwm"}]},
                "devices": [{"path": "/dev/nvidia0", "type": "c", "major": 195, "minor": 0}, {"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229}],
            },
            "hooks": {"prestart": [{"path": "/usr/bin/libnetwork"}], "poststop": [{"path": "/old/mig-hook", "args": ["mig-hook"]}]},
            "annotations": {"mig.profile": "1g.10gb", "mig.lease": "forged"},
        })
    }

    #[test]
    fn a_slice_has_exactly_its_nodes() {
        let all: Vec<(String, u32, u32, u32)> =
            own().into_iter().map(|n| (n.name, n.major, n.minor, n.mode.mode)).collect();
        let expected = [
            ("nvidiactl", 195, 255, 0o666),
            ("nvidia1", 195, 1, 0o666),
            ("nvidia-uvm", 510, 0, 0o666),
            ("nvidia-uvm-tools", 510, 1, 0o666),
            ("nvidia-caps/nvidia-cap156", 240, 156, 0o444),
            ("nvidia-caps/nvidia-cap157", 240, 157, 0o444),
        ];
        assert_eq!(all, expected.map(|(n, a, b, m)| (n.to_owned(), a, b, m)));
    }

    #[test]
    fn two_slices_of_one_gpu_share_its_node_and_the_hosts_mode_is_kept() {
        let given = [Given { gpu_minor: 1, caps: [156, 157] }, Given { gpu_minor: 1, caps: [165, 166] }];
        let restricted = NodeMode { mode: 0o660, uid: 0, gid: 44 };
        let all = nodes(&given, MAJORS, |name, _, _| (name == "nvidia1").then_some(restricted));
        assert_eq!(all.iter().filter(|n| n.name == "nvidia1").map(|n| n.mode).collect::<Vec<_>>(), [restricted]);
        assert_eq!(all.len(), 8);
    }

    #[test]
    fn an_edit_keeps_what_it_does_not_know_and_replaces_what_was_ours() {
        let config = edited(docker_like());
        assert_eq!(config["x-unknown"], json!([1, {"deep": null}]));
        assert_eq!(config["process"]["x-p"], 1);
        assert_eq!(
            config["process"]["env"],
            json!([
                "PATH=/bin",
                "CUDA_VISIBLE_DEVICES=MIG-a",
                "NVIDIA_VISIBLE_DEVICES=void",
                "MIG_DEVICE_UUIDS=MIG-a",
                "MIG_DEVICE_PROFILES=1g.10gb",
                "LD_LIBRARY_PATH=/dev/mig-hook/lib64"
            ])
        );
        assert_eq!(config["annotations"], json!({"mig.profile": "1g.10gb", "mig.lease": "t1"}));
        assert_eq!(config["hooks"]["prestart"], json!([{"path": "/usr/bin/libnetwork"}]));
        assert_eq!(config["hooks"]["poststop"].as_array().unwrap().len(), 1);
        let paths: Vec<&str> =
            config["linux"]["devices"].as_array().unwrap().iter().map(|d| d["path"].as_str().unwrap()).collect();
        assert_eq!(paths[..3], ["/dev/fuse", "/dev/nvidiactl", "/dev/nvidia1"]);
        assert!(!paths.contains(&"/dev/nvidia0"));
        let rules = config["linux"]["resources"]["devices"].as_array().unwrap();
        assert_eq!(rules[0], json!({"allow": false, "access": "rwm"}));
        assert!(rules.iter().all(|r| r["major"] != 195 || r["minor"] != 0));
    }

    #[test]
    fn the_hosts_dev_over_ours_is_seen() {
        let bound = |mount: Value| bound_dev(&json!({"mounts": [mount]}));
        assert!(
            bound(json!({"destination": "/dev/", "type": "bind", "source": "/dev"}))
                .unwrap()
                .contains("/dev is mounted")
        );
        assert!(bound(json!({"destination": "/dev", "source": "/x", "options": ["ro", "rbind"]})).is_some());
        assert_eq!(bound(json!({"destination": "/dev", "type": "tmpfs", "source": "tmpfs"})), None);
        assert_eq!(bound(json!({"destination": "/dev/shm", "type": "bind", "source": "/x"})), None);
    }

    #[test]
    fn what_hooks_of_a_cdi_spec_claim_is_read_and_their_own_rules_are_not_foreign() {
        let hook = |path: &str, words: &[&str]| json!({"path": path, "args": words});
        let mut config = json!({
            "hooks": {"createRuntime": [
                hook("/x/other", &["other", "--slice", "MIG-x"]),
                hook("/x/mig-hook", &["mig-hook", "createRuntime", "--slice", "MIG-a"]),
                hook("/x/mig-hook", &["mig-hook", "createRuntime", "--slice", "MIG-b"]),
                hook("/x/mig-hook", &["mig-hook", "createRuntime", "--slice"]),
            ]},
            "linux": {"resources": {"devices": [{"allow": false, "access": "rwm"}]}},
        });
        assert_eq!(claimed(&config), ["MIG-a", "MIG-b"]);
        let rules = config["linux"]["resources"]["devices"].as_array_mut().unwrap();
        for node in own() {
            rules.push(json!({"allow": true, "type": "c", "major": node.major, "minor": node.minor, "access": "rw"}));
        }
        assert!(open_rule(&config, MAJORS).is_some());
        let mut clean = config.clone();
        drop_rules_of(&mut clean, &own());
        assert_eq!(open_rule(&clean, MAJORS), None);
        let more = json!({"allow": true, "type": "c", "major": 240, "minor": 30, "access": "r"});
        config["linux"]["resources"]["devices"].as_array_mut().unwrap().push(more);
        drop_rules_of(&mut config, &own());
        assert!(open_rule(&config, MAJORS).unwrap().contains("c 240:30"));
    }

    #[test]
    fn a_user_namespace_is_seen() {
        let of = |kind: &str| has_user_namespace(&json!({"linux": {"namespaces": [{"type": "pid"}, {"type": kind}]}}));
        assert!(of("user") && !of("mount") && !has_user_namespace(&json!({"linux": null})));
    }

    #[test]
    fn the_drivers_files_are_mounted_once_and_found_first() {
        let mut config = docker_like();
        config["mounts"] = json!([
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs"},
            {"destination": "/usr/lib64/libcuda.so.1", "type": "bind", "source": "/theirs", "options": ["bind"]},
            {"destination": "/dev/mig-hook/lib64/libold.so.1", "type": "bind", "source": "/old", "options": ["bind"]},
        ]);
        config["process"]["env"] = json!(["LD_LIBRARY_PATH=/a", "LD_LIBRARY_PATH=/usr/local/cuda/compat::/b"]);
        let config = edited(config);
        let mount = |at: &str| json!({"destination": at, "type": "bind", "source": "/usr/lib/libcuda.so.1.2", "options": ["ro", "rbind"]});
        let expected = [
            json!({"destination": "/dev", "type": "tmpfs", "source": "tmpfs"}),
            mount("/dev/mig-hook/lib64/libcuda.so.1"),
            mount("/usr/lib64/libcuda.so.1"),
        ];
        assert_eq!(config["mounts"], json!(expected));
        let env = config["process"]["env"].as_array().unwrap();
        let path: Vec<&Value> = env.iter().filter(|v| v.as_str().unwrap().starts_with("LD_LIBRARY_PATH")).collect();
        assert_eq!(path, ["LD_LIBRARY_PATH=/dev/mig-hook/lib64:/usr/local/cuda/compat::/b"]);
        assert_eq!(injection::library_dirs_in(&config), ["/dev/mig-hook/lib64"]);
        let mut process = json!({"env": ["A=b"]});
        prepend_library_path(&mut process, &["/dev/mig-hook/lib64"]).unwrap();
        assert_eq!(process["env"], json!(["A=b", "LD_LIBRARY_PATH=/dev/mig-hook/lib64"]));
        prepend_library_path(&mut process, &[]).unwrap();
        assert_eq!(process["env"].as_array().unwrap().len(), 2);
    }

    #[test]
    fn other_gpus_are_hidden_and_ones_own_is_not() {
        let mut config = docker_like();
        config["linux"]["maskedPaths"] = json!(["/proc/kcore", "/proc/driver/nvidia/gpus/0000:0f:00.0"]);
        let masked = ["/proc/kcore", "/proc/driver/nvidia/gpus/0000:07:00.0", "/proc/driver/nvidia/capabilities/gpu0"];
        assert_eq!(edited(config)["linux"]["maskedPaths"], json!(masked));
    }

    #[test]
    fn a_stacked_runtime_is_told_the_slices_where_it_brings_the_driver() {
        let visible = |delegate| environment("MIG-a,MIG-b", "x", delegate)[1].clone();
        assert_eq!(visible(false), "NVIDIA_VISIBLE_DEVICES=void");
        assert_eq!(visible(true), "NVIDIA_VISIBLE_DEVICES=MIG-a,MIG-b");
    }

    #[test]
    fn an_edit_of_an_edited_config_is_the_same_edit() {
        let once = edited(docker_like());
        assert_eq!(edited(once.clone()), once);
    }

    #[test]
    fn every_hook_that_we_write_has_an_environment_and_absolute_paths() {
        let config = edited(docker_like());
        for stage in ["createRuntime", "poststop"] {
            let hook = config["hooks"][stage].as_array().unwrap().last().unwrap();
            assert!(!hook["env"].as_array().unwrap().is_empty());
            assert!(hook["path"].as_str().unwrap().starts_with('/'));
            assert_eq!(hook["args"], json!(["mig-hook", "--config", "/c.toml", stage, "--lease", "t1"]));
            assert!(hook["timeout"].as_u64().unwrap() > 0);
        }
        assert!(config["hooks"].get("createContainer").is_none() && config["hooks"].get("startContainer").is_none());
    }

    #[test]
    fn a_config_without_rules_gets_a_deny_all_first() {
        let config = edited(json!({"process": {}, "linux": {"resources": null}, "annotations": null}));
        assert_eq!(config["linux"]["resources"]["devices"][0], json!({"allow": false, "access": "rwm"}));
    }

    #[test]
    fn rules_that_open_a_neighbour_are_seen() {
        let deny = json!({"allow": false, "access": "rwm"});
        let cases = [
            (json!([deny, {"allow": true, "access": "rwm"}]), Some("a *:*")),
            (json!([{"allow": true, "access": "rwm"}]), Some("deny nothing")),
            (json!([{"allow": false, "access": "r"}]), Some("deny nothing")),
            (json!([{"allow": false, "access": "wr"}]), None),
            (json!([{"allow": false}]), None),
            (json!([deny, {"allow": true, "type": "c", "access": "rwm"}]), Some("c *:*")),
            (json!([deny, {"allow": true, "type": "c", "major": -1, "minor": -1, "access": "r"}]), Some("c *:*")),
            (json!([deny, {"allow": true, "type": "c", "major": 240, "access": "r"}]), Some("c 240:*")),
            (json!([deny, {"allow": true, "type": "c", "major": 240, "minor": 1}]), Some("c 240:1")),
            (json!([deny, {"allow": true, "type": "c", "major": 195, "minor": 0, "access": "rw"}]), Some("c 195:0")),
            (json!([deny, {"allow": true, "type": "c", "minor": 156, "access": "rw"}]), Some("c *:156")),
            (json!([deny, {"allow": true, "type": "c", "access": "m"}]), None),
            (json!([deny, {"allow": true, "type": "b", "access": "rwm"}]), None),
            (json!([]), None),
            (json!([{"allow": true, "access": "rwm"}, deny]), None),
        ];
        for (rules, expected) in cases {
            let config = json!({"linux": {"resources": {"devices": rules}}});
            let found = open_rule(&config, MAJORS);
            match expected {
                Some(part) => assert!(found.as_deref().is_some_and(|f| f.contains(part)), "{rules}: {found:?}"),
                None => assert_eq!(found, None, "{rules}"),
            }
        }
    }

    #[test]
    fn a_lease_is_believed_only_with_its_own_hooks() {
        let config = edited(docker_like());
        assert_eq!(marked(&config), Some("t1"));
        assert!(carries_lease(&config, "t1"));
        assert!(!carries_lease(&config, "t2"));
        assert!(!carries_lease(&json!({"annotations": {"mig.lease": "t1"}}), "t1"));
    }

    #[test]
    fn wrong_shapes_are_errors_not_panics() {
        let hooks = HookCall { program: Path::new("/x/mig-hook"), config: None, token: "t1" };
        for config in [
            json!([]),
            json!({}),
            json!({"process": []}),
            json!({"process": {"env": 7}}),
            json!({"process": {}, "linux": []}),
            json!({"process": {}, "hooks": {"poststop": {}}}),
        ] {
            let mut config = config;
            strip(&mut config, MAJORS);
            assert!(apply(&mut config, &bare(&own(), &["A=b".into()], hooks)).is_err(), "{config}");
        }
    }

    fn any_json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::Bool),
            any::<i64>().prop_map(Value::from),
            "[a-z/.]{0,12}".prop_map(Value::String)
        ];
        leaf.prop_recursive(4, 48, 6, |inner| {
            let key = prop_oneof![
                Just("linux"),
                Just("resources"),
                Just("devices"),
                Just("hooks"),
                Just("poststop"),
                Just("process"),
                Just("env"),
                Just("annotations"),
                Just("mounts"),
                Just("major"),
                Just("x")
            ];
            prop_oneof![
                proptest::collection::vec(inner.clone(), 0..5).prop_map(Value::Array),
                proptest::collection::vec((key.prop_map(str::to_owned), inner), 0..6)
                    .prop_map(|v| Value::Object(v.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn no_config_makes_it_panic_and_none_keeps_a_neighbour_open_unseen(config in any_json()) {
            let mut config = config;
            strip(&mut config, MAJORS);
            let seen = open_rule(&config, MAJORS).is_some();
            let hooks = HookCall { program: Path::new("/x/mig-hook"), config: None, token: "t1" };
            if apply(&mut config, &Edit { bind: false, ..bare(&own(), &[], hooks) }).is_ok() {
                let rules = config["linux"]["resources"]["devices"].as_array().unwrap();
                let foreign = rules.iter().any(|r| allows(r) && r["major"] == 195 && r["minor"] == 0);
                prop_assert!(!foreign || seen);
            }
        }
    }
}
