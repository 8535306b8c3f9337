//! The edit of a config.json: nothing else is changed, what was valid stays valid, a second edit changes nothing, and no
//! other slice can be opened afterwards.

use std::path::Path;

use mig_hook::bundle;
use mig_hook::edits::{self, Edit, Given, HookCall, Node};
use mig_hook::host::Majors;
use mig_hook::injection::{Injection, Mount};
use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType, Spec};
use serde_json::{Value, json};

const MAJORS: Majors = Majors { nvidia: 195, caps: 240, uvm: Some(510) };
const TOKEN: &str = "0123456789abcdef0123456789abcdef";
const VARIABLES: [&str; 5] =
    ["CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "MIG_DEVICE_UUIDS", "MIG_DEVICE_PROFILES", "LD_LIBRARY_PATH"];
const LISTS: [&str; 4] = ["/linux/devices", "/linux/resources/devices", "/linux/maskedPaths", "/mounts"];

pub fn check(data: &[u8]) {
    let Ok(before) = bundle::parse(data, "config.json").and_then(|config| config.certain("config.json")) else {
        return;
    };
    let mut stripped = before.clone();
    edits::strip(&mut stripped, MAJORS);
    let closed = edits::open_rule(&stripped, MAJORS).is_none();
    let mut after = stripped.clone();
    if let Err(why) = apply(&mut after) {
        assert!(!why.is_empty());
        return;
    }
    nothing_else_changed(&before, &after);
    assert_eq!((edits::marked(&after), edits::carries_lease(&after, TOKEN)), (Some(TOKEN), true));

    let mut again = after.clone();
    edits::strip(&mut again, MAJORS);
    apply(&mut again).expect("what was edited can be edited again");
    assert_eq!(again.to_string(), after.to_string(), "a second edit changes nothing");

    if serde_json::from_value::<Spec>(before).is_ok() {
        let spec: Spec = serde_json::from_value(after.clone()).expect("what was valid stays valid");
        has_its_nodes_and_no_other(&spec, closed);
    }
}

fn nodes() -> Vec<Node> {
    edits::nodes(&[Given { gpu_minor: 1, caps: [156, 157] }], MAJORS, |_, _, _| None)
}

fn apply(config: &mut Value) -> Result<(), String> {
    let mount = |destination: &str| Mount {
        source: "/usr/lib/libcuda.so.1.2".into(),
        destination: destination.into(),
        options: vec!["ro".into(), "rbind".into()],
    };
    let driver = Injection {
        mounts: vec![mount("/dev/mig-hook/lib64/libcuda.so.1"), mount("/usr/lib64/libcuda.so.1")],
        library_dirs: vec!["/dev/mig-hook/lib64"],
    };
    let hooks = HookCall { program: Path::new("/x/mig-hook"), config: Some(Path::new("/c.toml")), token: TOKEN };
    let masked = edits::masked_paths(&[("0000:07:00.0".into(), 0), ("0000:0f:00.0".into(), 1)], [1]);
    let environment = edits::environment("MIG-a", "1g.10gb", false);
    let edit = Edit { nodes: &nodes(), environment: &environment, driver: &driver, masked: &masked, hooks, bind: true };
    edits::apply(config, &edit)
}

/// Keys, values and their order, but for what an edit is about.
fn nothing_else_changed(before: &Value, after: &Value) {
    assert_eq!(rest(before).to_string(), rest(after).to_string());
    for at in LISTS {
        let (was, is) = (others(before, at), others(after, at));
        let extra = usize::from(at == "/linux/resources/devices" && was.is_empty() && !is.is_empty());
        assert_eq!(is.get(extra..), Some(was.as_slice()), "{at}");
    }
    let stages = |config: &Value| config.get("hooks").and_then(Value::as_object).cloned().unwrap_or_default();
    for stage in stages(before).keys().chain(stages(after).keys()) {
        let at = format!("/hooks/{}", stage.replace('~', "~0").replace('/', "~1"));
        let kept =
            |config: &Value| config.pointer(&at).filter(|entries| !entries.is_array() && !entries.is_null()).cloned();
        assert_eq!(kept(before), kept(after), "{at}");
        assert_eq!(others(before, &at), others(after, &at), "{at}");
    }
    let variables = |config: &Value| -> Vec<Value> {
        let ours = |var: &Value| var.as_str().is_some_and(|var| VARIABLES.contains(&var.split('=').next().unwrap()));
        list(config, "/process/env").into_iter().filter(|var| !ours(var)).collect()
    };
    assert_eq!(variables(before), variables(after));
}

fn list(config: &Value, at: &str) -> Vec<Value> {
    config.pointer(at).and_then(Value::as_array).cloned().unwrap_or_default()
}

/// The entries of a list that have nothing to do with GPUs.
fn others(config: &Value, at: &str) -> Vec<Value> {
    let ours = |entry: &Value| {
        let text = entry.to_string();
        text.contains("nvidia")
            || text.contains("mig-hook")
            || text.contains("/usr/lib64/libcuda.so.1")
            || [195, 240, 510].iter().any(|major| entry.get("major") == Some(&json!(major)))
    };
    list(config, at).into_iter().filter(|entry| !ours(entry)).collect()
}

/// A config without what an edit is about; what it makes where nothing was (empty, or null) is left out, too.
fn rest(config: &Value) -> Value {
    let mut rest = config.clone();
    let mut without = |parent: &str, key: &str, only_empty: bool| {
        let Some(object) = rest.pointer_mut(parent).and_then(Value::as_object_mut) else { return };
        let empty = object.get(key).is_some_and(|value| value.is_null() || *value == json!({}));
        if !only_empty || empty {
            object.shift_remove(key);
        }
    };
    without("/annotations", "mig.lease", false);
    without("", "annotations", true);
    without("", "hooks", false);
    without("", "mounts", false);
    without("/process", "env", false);
    without("/linux", "devices", false);
    without("/linux", "maskedPaths", false);
    without("/linux/resources", "devices", false);
    without("/linux", "resources", true);
    without("", "linux", true);
    rest
}

fn has_its_nodes_and_no_other(spec: &Spec, closed: bool) {
    let linux = spec.linux().as_ref().unwrap();
    let devices = linux.devices().clone().unwrap_or_default();
    let gpu: Vec<(String, i64, i64)> = devices
        .iter()
        .filter(|d| d.typ() != LinuxDeviceType::B && [195, 240, 510].contains(&d.major()))
        .map(|d| (d.path().display().to_string(), d.major(), d.minor()))
        .collect();
    let own: Vec<(String, i64, i64)> =
        nodes().iter().map(|n| (format!("/dev/{}", n.name), n.major.into(), n.minor.into())).collect();
    assert_eq!(gpu, own, "its nodes, each once");
    if !closed {
        return; // refused by the callers unless the settings allow it
    }
    let rules = linux.resources().as_ref().and_then(|r| r.devices().clone()).unwrap_or_default();
    for (major, minors) in [(195, [0, 1, 2, 255]), (240, [1, 2, 156, 165]), (510, [0, 1, 2, 3])] {
        for minor in minors {
            let mine = own.iter().any(|(_, a, b)| (*a, *b) == (major, minor));
            for access in ['r', 'w'] {
                assert_eq!(allowed(&rules, major, minor, access), mine, "c {major}:{minor} {access} in {rules:?}");
            }
        }
    }
}

/// As the kernel is told: the last rule that fits decides; where none fits, nothing is denied.
fn allowed(rules: &[LinuxDeviceCgroup], major: i64, minor: i64, access: char) -> bool {
    let number = |wanted: Option<i64>, is: i64| wanted.is_none_or(|wanted| wanted < 0 || wanted == is);
    let fits = |rule: &&LinuxDeviceCgroup| {
        let kind = rule.typ().is_none_or(|kind| kind != LinuxDeviceType::B && kind != LinuxDeviceType::P);
        let how = rule.access().as_deref().unwrap_or("");
        kind && number(rule.major(), major) && number(rule.minor(), minor) && (how.is_empty() || how.contains(access))
    };
    rules.iter().rev().find(fits).is_none_or(|rule| rule.allow())
}
