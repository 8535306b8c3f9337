//! docker: a runtime in daemon.json.

use anyhow::Result;
use jsonc_parser::ParseOptions;
use jsonc_parser::cst::{CstInputValue, CstObject, CstRootNode};
use serde_json::Value;

use super::tables::is_shim;
use super::{Entry, Host};
use crate::report::Unusable;

/// What the entry must say. `--runtime` may name a runtime of this file.
pub(super) fn wanted(base: Option<&str>, host: &Host, notes: &mut Vec<String>) -> Result<Entry> {
    let settings = read(base.unwrap_or_default()).map_err(Unusable)?;
    let chained = match host.runtime {
        Some(name) => chained(&settings, name).map_err(Unusable)?,
        None => None,
    };
    let low_level = (host.low_level)(chained.or(host.runtime))?;
    let before = settings["default-runtime"].as_str();
    // An image's ENV must not count in a default runtime, whoever made it that.
    let default = host.default || before == Some(host.name);
    if let Some(before) = before.filter(|before| default && *before != host.name) {
        notes.push(format!("the default runtime was {before}: containers that need it must name it now"));
    }
    let mut args = Vec::new();
    if !default {
        args.push("--mig-env".to_owned());
    }
    args.push(format!("--mig-runtime={}", super::utf8(&low_level)?));
    args.extend(host.config.map(|file| format!("--mig-config={file}")));
    Ok(Entry { name: host.name.into(), shim: host.shim.into(), args, default, ..Entry::default() })
}

/// The program of a runtime that the file already has.
fn chained<'a>(settings: &'a Value, name: &str) -> Result<Option<&'a str>, String> {
    let entry = &settings["runtimes"][name];
    if entry.is_null() {
        return Ok(None);
    }
    let path = entry["path"].as_str().filter(|path| !path.is_empty());
    let path =
        path.ok_or_else(|| format!("the runtime {name} has no path: it is a containerd shim, no OCI runtime"))?;
    if entry["runtimeArgs"].as_array().is_some_and(|args| !args.is_empty()) {
        return Err(format!(
            "the runtime {name} has runtimeArgs, which mig-runtime can't hand on; put its command line into a script and \
             name that with --runtime"
        ));
    }
    match is_shim(path) {
        true => Err(format!("the runtime {name} is mig-runtime itself")),
        false => Ok(Some(path)),
    }
}

/// The runtimes that are ours.
pub(super) fn names(text: &str) -> Result<Vec<String>, String> {
    let settings = read(text)?;
    let runtimes = settings["runtimes"].as_object().into_iter().flatten();
    let ours = runtimes.filter(|(_, entry)| entry["path"].as_str().is_some_and(is_shim));
    Ok(ours.map(|(name, _)| name.clone()).collect())
}

pub(super) fn find(text: &str, name: &str) -> Result<Option<Entry>, String> {
    let settings = read(text)?;
    let entry = &settings["runtimes"][name];
    if entry.is_null() {
        return Ok(None);
    }
    let shim = entry["path"].as_str().unwrap_or_default();
    if !is_shim(shim) {
        return Err(format!("the runtime {name} is another's (path {shim:?}); choose a name of your own with --name"));
    }
    let args = entry["runtimeArgs"].as_array().map_or(&[][..], Vec::as_slice);
    let args = args.iter().filter_map(|arg| arg.as_str().map(str::to_owned)).collect();
    let default = settings["default-runtime"] == name;
    Ok(Some(Entry { name: name.into(), shim: shim.into(), args, default, ..Entry::default() }))
}

pub(super) fn apply(text: Option<&str>, entry: &Entry) -> Result<String, String> {
    let (root, settings) = tree(text.filter(|text| !text.trim().is_empty()).unwrap_or("{}\n"))?;
    let runtime = CstInputValue::Object(vec![
        ("path".into(), entry.shim.as_str().into()),
        ("runtimeArgs".into(), CstInputValue::Array(entry.args.iter().map(|a| a.as_str().into()).collect())),
    ]);
    set(&settings.object_value_or_set("runtimes"), &entry.name, runtime);
    if entry.default {
        set(&settings, "default-runtime", entry.name.as_str().into());
    }
    Ok(root.to_string())
}

pub(super) fn remove(text: &str, name: &str, original: Option<&str>) -> Result<String, String> {
    let original = read(original.unwrap_or_default()).unwrap_or_default();
    let (root, settings) = tree(text)?;
    if let Some(runtimes) = settings.object_value("runtimes") {
        runtimes.get(name).into_iter().for_each(|entry| entry.remove());
        if runtimes.properties().is_empty() && original["runtimes"].is_null() {
            settings.get("runtimes").into_iter().for_each(|empty| empty.remove());
        }
    }
    if read(text)?["default-runtime"] == name {
        match original["default-runtime"].as_str().filter(|before| *before != name) {
            Some(before) => set(&settings, "default-runtime", before.into()),
            None => settings.get("default-runtime").into_iter().for_each(|default| default.remove()),
        }
    }
    Ok(root.to_string())
}

/// dockerd that reloads changes what the file names and keeps what it no longer names: without any `runtimes`, or without
/// `default-runtime`, the old ones stay; an old default that is no runtime any more makes it panic (20.10, run).
pub(super) fn reload_is_enough(before: Option<&str>, after: Option<&str>) -> bool {
    let keys = |text: Option<&str>| read(text.unwrap_or_default()).unwrap_or_default();
    let (before, after) = (keys(before), keys(after));
    ["runtimes", "default-runtime"].iter().all(|key| before[key].is_null() || !after[key].is_null())
}

/// docker reads strict JSON, and so do we; an empty file is as good as none.
fn read(text: &str) -> Result<Value, String> {
    if text.trim().is_empty() {
        return Ok(Value::Object(serde_json::Map::new()));
    }
    let value: Value = serde_json::from_str(text).map_err(|error| format!("not valid JSON: {error}"))?;
    match value.is_object() && (value["runtimes"].is_null() || value["runtimes"].is_object()) {
        true => Ok(value),
        false => Err("it must be a JSON object, and \"runtimes\" in it another".into()),
    }
}

fn tree(text: &str) -> Result<(CstRootNode, CstObject), String> {
    read(text)?;
    let root = CstRootNode::parse(text, &ParseOptions::default()).map_err(|e| format!("not valid JSON: {e}"))?;
    let object = root.object_value().ok_or("it must be a JSON object")?;
    let count = |key| object.properties().iter().filter(|p| p.decoded_name().as_deref() == Some(key)).count();
    match ["runtimes", "default-runtime"].into_iter().find(|key| count(key) > 1) {
        Some(key) => Err(format!("the key {key:?} is there twice; leave one")),
        None => Ok((root, object)),
    }
}

fn set(object: &CstObject, key: &str, value: CstInputValue) {
    match object.get(key) {
        Some(property) => property.set_value(value),
        None => drop(object.append(key, value)),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::tests::host;
    use super::*;

    pub(in super::super) const FILES: &[&str] = &[
        "{}",
        "{\"experimental\": false}\n",
        "{\n  \"exec-opts\": [\"native.cgroupdriver=systemd\"],\n  \"log-driver\": \"json-file\",\n  \"log-opts\": {\n    \
         \"max-size\": \"100m\"\n  },\n  \"storage-driver\": \"overlay2\"\n}\n",
        // As nvidia-ctk leaves it.
        "{\n    \"runtimes\": {\n        \"nvidia\": {\n            \"args\": [],\n            \"path\": \
         \"nvidia-container-runtime\"\n        }\n    },\n    \"default-runtime\": \"nvidia\"\n}",
        "{\"runtimes\":{},\"data-root\":\"/srv/d\"}",
        "{\"runtimes\" : { \"kata\":{\"runtimeType\":\"io.containerd.kata.v2\"} } , \"x\":[ ]}\r\n",
    ];

    fn entry(base: &str, change: impl FnOnce(&mut Host)) -> (Entry, Vec<String>) {
        let mut host = host("mig", &[]);
        change(&mut host);
        let mut notes = vec![];
        (wanted(Some(base), &host, &mut notes).unwrap(), notes)
    }

    #[test]
    fn chosen_by_name_the_environment_counts_and_the_runtime_is_pinned() {
        let (entry, notes) = entry("{}", |host| host.config = Some("/x/c.toml"));
        assert_eq!(entry.args, ["--mig-env", "--mig-runtime=/usr/bin/runc", "--mig-config=/x/c.toml"]);
        assert!(!entry.default && notes.is_empty());
        let text = apply(Some("{\n    \"debug\": true\n}\n"), &entry).unwrap();
        assert_eq!(
            text,
            "{\n    \"debug\": true,\n    \"runtimes\": {\n        \"mig\": {\n            \"path\": \
             \"/usr/bin/mig-runtime\",\n            \"runtimeArgs\": [\"--mig-env\", \"--mig-runtime=/usr/bin/runc\", \
             \"--mig-config=/x/c.toml\"]\n        }\n    }\n}\n"
        );
    }

    #[test]
    fn in_a_default_runtime_the_environment_never_counts() {
        let (by_option, notes) = entry(r#"{"default-runtime": "nvidia"}"#, |host| host.default = true);
        assert_eq!(by_option.args, ["--mig-runtime=/usr/bin/runc"]);
        assert!(by_option.default && notes[0].contains("was nvidia"), "{notes:?}");
        let text = apply(Some(r#"{"default-runtime": "nvidia"}"#), &by_option).unwrap();
        assert_eq!(read(&text).unwrap()["default-runtime"], "mig");
        let back = remove(&text, "mig", Some(r#"{"default-runtime": "nvidia"}"#)).unwrap();
        assert_eq!(read(&back).unwrap(), serde_json::json!({"default-runtime": "nvidia"}));
        let unknown = remove(&text, "mig", None).unwrap();
        assert_eq!(read(&unknown).unwrap(), serde_json::json!({}));
        // Made the default by hand.
        let (by_hand, _) = entry(r#"{"default-runtime": "mig"}"#, |_| ());
        assert_eq!((by_hand.args, by_hand.default), (vec!["--mig-runtime=/usr/bin/runc".to_owned()], true));
    }

    #[test]
    fn a_runtime_of_the_file_can_be_chained() {
        let file = r#"{"runtimes": {
            "nvidia": {"path": "nvidia-container-runtime", "args": []},
            "abs": {"path": "/opt/rt", "runtimeArgs": []},
            "argued": {"path": "/opt/rt", "runtimeArgs": ["--x"]},
            "kata": {"runtimeType": "io.containerd.kata.v2"},
            "self": {"path": "/usr/bin/mig-runtime"}
        }}"#;
        let low_level = |name: &'static str| {
            let mut host = host("mig", &[]);
            host.runtime = Some(name);
            wanted(Some(file), &host, &mut vec![]).map(|entry| entry.args[1].clone()).map_err(|e| e.to_string())
        };
        assert_eq!(low_level("nvidia").unwrap(), "--mig-runtime=nvidia-container-runtime"); // the host finds it
        assert_eq!(low_level("abs").unwrap(), "--mig-runtime=/opt/rt");
        assert_eq!(low_level("/opt/other").unwrap(), "--mig-runtime=/opt/other");
        for (name, part) in [("argued", "runtimeArgs"), ("kata", "no path"), ("self", "mig-runtime itself")] {
            let error = low_level(name).unwrap_err();
            assert!(error.contains(name) && error.contains(part), "{error}");
        }
    }

    #[test]
    fn a_key_that_is_there_twice_is_refused() {
        let (entry, _) = entry("{}", |_| ());
        for text in [r#"{"runtimes": {}, "runtimes": {}}"#, r#"{"default-runtime": "a", "default-runtime": "b"}"#] {
            assert!(apply(Some(text), &entry).unwrap_err().contains("twice"));
        }
    }

    #[test]
    fn a_reload_makes_docker_forget_only_what_is_replaced() {
        let (ours, other) = (r#"{"runtimes": {"mig": {}}}"#, r#"{"runtimes": {"x": {}}}"#);
        assert!(reload_is_enough(None, Some(ours)) && reload_is_enough(Some(ours), Some(other)));
        assert!(!reload_is_enough(Some(ours), None) && !reload_is_enough(Some(ours), Some("{}")));
        assert!(!reload_is_enough(Some(r#"{"default-runtime": "mig"}"#), Some("{}")));
    }
}
