//! A CDI spec for slices that exist: what `--device mig-hook.io/slice=…` of docker, podman, containerd and Apptainer
//! reads; and what a spec of NVIDIA's says of the driver's files. Fields and versions: cncf-tags/container-device-interface,
//! SPEC.md.
//!
//! Own structs: the crate `container-device-interface` brings a JSON-schema engine, YAML and clap.

use std::path::{Component, Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::edits::{self, HOOK_ENVIRONMENT, Node, POSTSTOP_TIMEOUT, hook_words};
use crate::injection;

/// Vendor and class of our devices.
pub const KIND: &str = "mig-hook.io/slice";
/// Seconds that a runtime gives the hook that takes the slice: as podman gives precreate, since it does the same.
const CLAIM_TIMEOUT: i64 = 120;

/// A whole spec. Engines refuse unknown fields, and a spec without devices.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Spec {
    cdi_version: &'static str,
    kind: &'static str,
    devices: Vec<Device>,
    #[serde(skip_serializing_if = "Option::is_none")]
    container_edits: Option<CommonEdits>,
}

/// What every device of the spec brings: the driver's files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct CommonEdits {
    mounts: Vec<Mount>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
struct Mount {
    host_path: PathBuf,
    container_path: String,
    options: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
struct Device {
    name: String,
    container_edits: ContainerEdits,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
struct ContainerEdits {
    env: Vec<String>,
    device_nodes: Vec<DeviceNode>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    hooks: Vec<Hook>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
struct DeviceNode {
    path: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    host_path: Option<String>,
    r#type: &'static str,
    major: u32,
    minor: u32,
    file_mode: u32,
    permissions: &'static str,
    uid: u32,
    gid: u32,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
struct Hook {
    hook_name: &'static str,
    path: String,
    args: Vec<String>,
    env: [&'static str; 1],
    timeout: i64,
}

/// One device of a spec: a slice, or all that a lease holds.
#[derive(Debug, Clone)]
pub struct Offer<'a> {
    /// What stands behind `mig-hook.io/slice=`.
    pub name: &'a str,
    /// Its nodes.
    pub nodes: Vec<Node>,
    /// UUIDs, comma-separated.
    pub uuids: &'a str,
    /// Names of their profiles, likewise.
    pub profiles: &'a str,
    /// How hooks of the spec take the slice for the container and give it back; `None` where a lease holds it already.
    pub claim: Option<Claim<'a>>,
}

/// How a spec's hooks call us.
#[derive(Debug, Clone, Copy)]
pub struct Claim<'a> {
    /// `mig-hook`, absolute.
    pub program: &'a Path,
    /// The settings file, absolute, where one is in use.
    pub config: Option<&'a Path>,
}

/// The spec of these devices; `None` when there are none. `dev_root`: where the host's nodes are; `driver`: what a container
/// gets of the driver with any of them.
pub fn spec(offers: &[Offer], dev_root: &Path, driver: Vec<injection::Mount>) -> Option<Spec> {
    let devices: Vec<Device> = offers.iter().map(|offer| device(offer, dev_root)).collect();
    let digit_first = devices.iter().any(|d| d.name.starts_with(|c: char| c.is_ascii_digit()));
    let elsewhere = devices.iter().flat_map(|d| &d.container_edits.device_nodes).any(|n| n.host_path.is_some());
    // The lowest that has what is used: an engine refuses a version that it does not know. Both came with 0.5.0.
    let cdi_version = if digit_first || elsewhere { "0.5.0" } else { "0.3.0" };
    let mount = |mount: injection::Mount| Mount {
        host_path: mount.source,
        container_path: mount.destination,
        options: mount.options,
    };
    let mounts: Vec<Mount> = driver.into_iter().map(mount).collect();
    let container_edits = (!mounts.is_empty()).then_some(CommonEdits { mounts });
    (!devices.is_empty()).then_some(Spec { cdi_version, kind: KIND, devices, container_edits })
}

fn device(offer: &Offer, dev_root: &Path) -> Device {
    let node = |node: &Node| DeviceNode {
        path: format!("/dev/{}", node.name),
        host_path: (dev_root != Path::new("/dev")).then(|| dev_root.join(&node.name).display().to_string()),
        r#type: "c",
        major: node.major,
        minor: node.minor,
        file_mode: node.mode.mode,
        permissions: "rw",
        uid: node.mode.uid,
        gid: node.mode.gid,
    };
    let hook = |claim: &Claim, hook_name: &'static str, timeout| Hook {
        hook_name,
        path: claim.program.display().to_string(),
        args: hook_words(claim.config, hook_name, ["--slice", offer.uuids]),
        env: [HOOK_ENVIRONMENT],
        timeout,
    };
    let hooks = |claim| [hook(claim, "createRuntime", CLAIM_TIMEOUT), hook(claim, "poststop", POSTSTOP_TIMEOUT)];
    Device {
        // UUIDs of drivers before branch 470 have slashes, which no device name may.
        name: offer.name.replace('/', "."),
        container_edits: ContainerEdits {
            env: edits::environment(offer.uuids, offer.profiles, false),
            device_nodes: offer.nodes.iter().map(node).collect(),
            hooks: offer.claim.as_ref().map(hooks).into_iter().flatten().collect(),
        },
    }
}

impl Spec {
    /// The text of its file.
    pub fn text(&self) -> serde_json::Result<String> {
        Ok(serde_json::to_string_pretty(self)? + "\n")
    }
}

/// Whether a file's text is a spec of ours, which may be replaced.
pub fn is_ours(text: &str) -> bool {
    let spec: Option<serde_json::Value> = serde_json::from_str(text).ok();
    spec.is_some_and(|spec| spec.get("kind").is_some_and(|kind| kind == KIND))
}

/// Kind of the specs that `nvidia-ctk cdi generate` writes.
pub const NVIDIA_KIND: &str = "nvidia.com/gpu";
/// Below these nothing of a driver's files belongs.
const NO_FILES: [&str; 3] = ["/dev", "/proc", "/sys"];

/// A file of the driver that a spec names: where it is, where a container has it, and the mount's options.
pub type NamedFile = (PathBuf, String, Vec<String>);

/// The driver's files in the text (JSON or YAML) of a spec of NVIDIA's: the mounts that all its devices have in common.
/// `None` where it is another vendor's or has none. Nodes and hooks are left alone: nodes are given one by one, and
/// NVIDIA's hooks run as root in the container's own file system, for what is done here without (links, ldconfig).
pub fn driver_files(text: &str) -> Result<Option<Vec<NamedFile>>, String> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Spec {
        #[serde(default)]
        kind: String,
        #[serde(default)]
        container_edits: Edits,
    }
    #[derive(Default, Deserialize)]
    struct Edits {
        #[serde(default)]
        mounts: Vec<Mount>,
    }
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Mount {
        host_path: PathBuf,
        container_path: String,
        #[serde(default)]
        options: Vec<String>,
    }
    let spec: Spec = serde_saphyr::from_str(text).map_err(|error| error.without_snippet().to_string())?;
    if spec.kind != NVIDIA_KIND {
        return Ok(None);
    }
    let is_file = |mount: &Mount| {
        let path = Path::new(&mount.container_path);
        let plain = path.is_absolute()
            && path.parent().is_some()
            && !path.components().any(|part| part == Component::ParentDir);
        let bind = mount.options.iter().any(|option| option == "bind" || option == "rbind");
        plain && bind && mount.host_path.is_absolute() && !NO_FILES.iter().any(|below| path.starts_with(below))
    };
    let files = spec.container_edits.mounts.into_iter().filter(is_file);
    let files: Vec<NamedFile> = files.map(|mount| (mount.host_path, mount.container_path, mount.options)).collect();
    Ok((!files.is_empty()).then_some(files))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::NodeMode;
    use serde_json::{Value, json};

    const UUID: &str = "MIG-3f0a51c2-d4e6-5b7a-8c9d-0123456789ab";

    fn offer<'a>(name: &'a str, claim: Option<Claim<'a>>) -> Offer<'a> {
        let mode = |mode| NodeMode { mode, uid: 0, gid: 44 };
        let nodes = vec![
            Node { name: "nvidia-uvm".into(), major: 510, minor: 0, mode: mode(0o660) },
            Node { name: "nvidia-caps/nvidia-cap12".into(), major: 240, minor: 12, mode: mode(0o444) },
        ];
        Offer { name, nodes, uuids: UUID, profiles: "1g.10gb", claim }
    }

    fn claim() -> Claim<'static> {
        Claim { program: Path::new("/x/mig-hook"), config: Some(Path::new("/c.toml")) }
    }

    fn value(offers: &[Offer], dev_root: &str) -> Value {
        serde_json::from_str(&spec(offers, Path::new(dev_root), vec![]).unwrap().text().unwrap()).unwrap()
    }

    #[test]
    fn a_slice_field_by_field() {
        let hook = |stage: &str, timeout: u32| {
            json!({
                "hookName": stage, "path": "/x/mig-hook", "timeout": timeout, "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"],
                "args": ["mig-hook", "--config", "/c.toml", stage, "--slice", UUID],
            })
        };
        let expected = json!({
            "cdiVersion": "0.3.0",
            "kind": "mig-hook.io/slice",
            "devices": [{
                "name": UUID,
                "containerEdits": {
                    "env": [
                        format!("CUDA_VISIBLE_DEVICES={UUID}"), "NVIDIA_VISIBLE_DEVICES=void",
                        format!("MIG_DEVICE_UUIDS={UUID}"), "MIG_DEVICE_PROFILES=1g.10gb",
                    ],
                    "deviceNodes": [
                        {"path": "/dev/nvidia-uvm", "type": "c", "major": 510, "minor": 0, "fileMode": 0o660,
                         "permissions": "rw", "uid": 0, "gid": 44},
                        {"path": "/dev/nvidia-caps/nvidia-cap12", "type": "c", "major": 240, "minor": 12,
                         "fileMode": 0o444, "permissions": "rw", "uid": 0, "gid": 44},
                    ],
                    "hooks": [hook("createRuntime", 120), hook("poststop", 20)],
                },
            }],
        });
        assert_eq!(value(&[offer(UUID, Some(claim()))], "/dev"), expected);
    }

    #[test]
    fn what_a_lease_holds_is_not_claimed_again() {
        let spec = value(&[offer("3f0a51c2", None)], "/dev");
        assert_eq!((&spec["cdiVersion"], &spec["devices"][0]["name"]), (&json!("0.5.0"), &json!("3f0a51c2")));
        assert_eq!(spec["devices"][0]["containerEdits"].get("hooks"), None);
    }

    #[test]
    fn nodes_of_another_root_are_named_and_cost_a_newer_version() {
        let spec = value(&[offer(UUID, None)], "/run/driver/dev");
        let node = &spec["devices"][0]["containerEdits"]["deviceNodes"][1];
        assert_eq!(node["hostPath"], "/run/driver/dev/nvidia-caps/nvidia-cap12");
        assert_eq!((&node["path"], &spec["cdiVersion"]), (&json!("/dev/nvidia-caps/nvidia-cap12"), &json!("0.5.0")));
    }

    /// The grammar of device names (SPEC.md, "Kind"): letters, digits and `_-.:`, a letter or digit at both ends.
    #[test]
    fn names_are_device_names() {
        for name in [UUID, "MIG-GPU-3f0a51c2-d4e6-5b7a-8c9d-0123456789ab/13/0", "0123456789abcdef0123456789abcdef"] {
            let spec = value(&[offer(name, Some(claim()))], "/dev");
            let name = spec["devices"][0]["name"].as_str().unwrap();
            assert!(name.chars().all(|c| c.is_ascii_alphanumeric() || "_-.:".contains(c)), "{name}");
            assert!(name.starts_with(|c: char| c.is_ascii_alphanumeric()), "{name}");
            assert!(name.ends_with(|c: char| c.is_ascii_alphanumeric()), "{name}");
        }
    }

    #[test]
    fn no_device_is_no_spec_and_ours_are_known() {
        assert_eq!(spec(&[], Path::new("/dev"), vec![]), None);
        assert!(is_ours(&spec(&[offer(UUID, None)], Path::new("/dev"), vec![]).unwrap().text().unwrap()));
        assert!(!is_ours("{\"cdiVersion\": \"0.5.0\", \"kind\": \"nvidia.com/gpu\"}") && !is_ours("text"));
    }

    #[test]
    fn the_drivers_files_of_a_spec_are_its_common_bind_mounts() {
        let mount = |at: &str, options: &[&str]| json!({"hostPath": "/h/x", "containerPath": at, "options": options});
        let spec = json!({
            "cdiVersion": "0.5.0", "kind": "nvidia.com/gpu", "x-new": 1,
            "devices": [{"name": "0", "containerEdits": {"mounts": [mount("/of/one", &["rbind"])]}}],
            "containerEdits": {
                "hooks": [{"hookName": "createContainer", "path": "/usr/bin/nvidia-cdi-hook"}],
                "mounts": [
                    mount("/usr/lib/libcuda.so.1", &["ro", "rbind"]),
                    mount("/dev/nvidia1", &["rbind"]),
                    mount("/proc/driver/nvidia/params", &["bind"]),
                    mount("//dev/./nvidia1", &["bind"]),
                    mount("/dev", &["bind"]),
                    mount("/", &["bind"]),
                    mount("/usr/../dev/nvidia1", &["bind"]),
                    mount("relative", &["bind"]),
                    mount("/tmpfs", &["mode=755"]),
                ],
            },
        });
        let own = ["ro", "rbind"].map(str::to_owned).to_vec();
        let expected = vec![(PathBuf::from("/h/x"), "/usr/lib/libcuda.so.1".to_owned(), own)];
        assert_eq!(driver_files(&spec.to_string()), Ok(Some(expected)));
        assert_eq!(driver_files("kind: example.com/gpu"), Ok(None));
        assert_eq!(driver_files("kind: nvidia.com/gpu"), Ok(None), "without files");
        assert!(driver_files("- a\n- [").is_err());
    }

    #[test]
    fn what_every_device_brings_stands_once() {
        let mount = injection::Mount {
            source: "/h/libcuda.so.1.2".into(),
            destination: "/usr/lib64/libcuda.so.1".into(),
            options: vec!["ro".into(), "rbind".into()],
        };
        let spec = spec(&[offer(UUID, None)], Path::new("/dev"), vec![mount]).unwrap();
        let spec: Value = serde_json::from_str(&spec.text().unwrap()).unwrap();
        let expected = json!({"mounts": [
            {"hostPath": "/h/libcuda.so.1.2", "containerPath": "/usr/lib64/libcuda.so.1", "options": ["ro", "rbind"]},
        ]});
        assert_eq!(spec["containerEdits"], expected);
    }
}
