//! What people call their containers: looked up in the files of the engines, only when something is to be shown.
//!
//! Only files that root (or whoever asks) owns are read, none larger than `LIMIT`, and no link is followed at their end. What
//! is missing or looks odd is simply not known. Where each engine keeps its names was looked up in running ones: docker 28,
//! podman 4.3, containerd 1.6; of CRI-O and nerdctl in their sources (`io.kubernetes.container.name`, `pkg/labels/labels.go`).

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{File, OpenOptions};
use std::io::Read;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// Most bytes read of one file: podman's list has about 500 for each container.
const LIMIT: u64 = 16 << 20;
/// Most characters of a name: those of a Kubernetes pod are the longest, with 253.
const LONGEST: usize = 253;
/// containerd keeps bundles in `…/io.containerd.runtime.v2.task/NAMESPACE/ID`.
const CONTAINERD_TASKS: &str = "io.containerd.runtime.v2.task";

/// A container as its engine knows it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Named {
    /// `docker`, `podman`, `containerd` or `cri-o`.
    pub engine: Option<String>,
    /// The name that it was given or got.
    pub name: Option<String>,
    /// Its pod in Kubernetes, as `NAMESPACE/POD`.
    pub pod: Option<String>,
}

/// What is of interest in a bundle's config.json.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Config {
    annotations: BTreeMap<String, String>,
    mounts: Vec<Mount>,
}

#[derive(Debug, Deserialize)]
struct Mount {
    destination: PathBuf,
    #[serde(default)]
    source: PathBuf,
}

/// What is known of the container with this id whose bundle is, or was, there.
pub fn look_up(bundle: &Path, id: &str) -> Named {
    if Path::new(id).file_name() != Some(OsStr::new(id)) {
        return Named::default(); // it becomes a part of paths
    }
    let config: Config = read(&bundle.join("config.json")).unwrap_or_default();
    let found = if let Some(containers) = storage(bundle, id) {
        of_storage(containers, id, &config)
    } else if let Some(namespace) = containerd_namespace(bundle) {
        of_containerd(namespace, id, &config)
    } else {
        Named { name: docker_name(id, &config), ..Named::default() }
    };
    let printable =
        |text: &String| !text.is_empty() && text.chars().count() <= LONGEST && !text.chars().any(char::is_control);
    Named { engine: found.engine, name: found.name.filter(printable), pod: found.pod.filter(printable) }
}

/// `…/overlay-containers` of a bundle `…/overlay-containers/ID/userdata`: podman's and CRI-O's.
fn storage<'a>(bundle: &'a Path, id: &str) -> Option<&'a Path> {
    let container = bundle.parent().filter(|_| bundle.file_name() == Some(OsStr::new("userdata")))?;
    let containers = container.parent().filter(|_| container.file_name() == Some(OsStr::new(id)))?;
    containers.file_name()?.to_str()?.ends_with("-containers").then_some(containers)
}

fn of_storage(containers: &Path, id: &str, config: &Config) -> Named {
    if config.annotations.get("io.container.manager").is_some_and(|manager| manager == "cri-o") {
        return Named {
            engine: Some("cri-o".into()),
            name: config.annotations.get("io.kubernetes.container.name").cloned(),
            pod: pod(config, "io.kubernetes.pod.namespace", "io.kubernetes.pod.name"),
        };
    }
    Named { engine: Some("podman".into()), name: stored_name(containers, id), pod: None }
}

/// The name that containers/storage keeps; of `podman run --rm` newer versions keep it in a list of its own.
fn stored_name(containers: &Path, id: &str) -> Option<String> {
    #[derive(Deserialize)]
    struct Stored {
        id: String,
        #[serde(default)]
        names: Vec<String>,
    }
    ["containers.json", "volatile-containers.json"].iter().find_map(|list| {
        let stored: Vec<Stored> = read(&containers.join(list))?;
        stored.into_iter().find(|one| one.id == id)?.names.into_iter().next()
    })
}

fn containerd_namespace(bundle: &Path) -> Option<&str> {
    let namespace = bundle.parent()?;
    let tasks = namespace.parent()?;
    (tasks.file_name() == Some(OsStr::new(CONTAINERD_TASKS))).then(|| namespace.file_name()?.to_str())?
}

fn of_containerd(namespace: &str, id: &str, config: &Config) -> Named {
    let of_docker = docker_name(id, config);
    if namespace == "moby" || of_docker.is_some() {
        return Named { engine: Some("docker".into()), name: of_docker, pod: None };
    }
    let cri = config.annotations.get("io.kubernetes.cri.container-name").cloned();
    // `ctr` has ids only, and people choose them.
    let chosen = || (id.len() < 64).then(|| id.to_owned());
    Named {
        engine: Some("containerd".into()),
        name: cri.or_else(|| config.annotations.get("nerdctl/name").cloned()).or_else(chosen),
        pod: pod(config, "io.kubernetes.cri.sandbox-namespace", "io.kubernetes.cri.sandbox-name"),
    }
}

fn pod(config: &Config, namespace: &str, name: &str) -> Option<String> {
    Some(format!("{}/{}", config.annotations.get(namespace)?, config.annotations.get(name)?))
}

/// The name in docker's own file of the container. Where docker's data lie, the mount of /etc/hostname tells.
fn docker_name(id: &str, config: &Config) -> Option<String> {
    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct Kept {
        #[serde(rename = "ID")]
        id: String,
        name: String,
    }
    let hostname = config.mounts.iter().find(|mount| mount.destination == Path::new("/etc/hostname"));
    let told = hostname.and_then(|mount| mount.source.parent());
    let usual = Path::new("/var/lib/docker/containers").join(id);
    let kept_in = told.filter(|dir| dir.file_name() == Some(OsStr::new(id))).unwrap_or(&usual);
    let kept: Kept = read(&kept_in.join("config.v2.json"))?;
    (kept.id == id).then(|| kept.name.trim_start_matches('/').to_owned())
}

/// A JSON file of an engine.
fn read<T: DeserializeOwned>(path: &Path) -> Option<T> {
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path).ok()?;
    let about = file.metadata().ok()?;
    let trusted = about.uid() == 0 || about.uid() == nix::unistd::geteuid().as_raw();
    if !about.is_file() || !trusted || about.len() > LIMIT {
        return None;
    }
    serde_json::from_slice(&bytes(file)?).ok()
}

fn bytes(file: File) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    file.take(LIMIT).read_to_end(&mut bytes).ok()?;
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "063e7bf9e1daa2a14b585d211c0944140e5e86c319e14eea6aa5afb0a0c28bad";

    fn write(path: &Path, text: &str) {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }

    fn named(engine: &str, name: &str, pod: Option<&str>) -> Named {
        Named { engine: Some(engine.into()), name: Some(name.into()), pod: pod.map(str::to_owned) }
    }

    #[test]
    fn podman_names_are_in_its_storage() {
        let dir = tempfile::tempdir().unwrap();
        let containers = dir.path().join("overlay-containers");
        let bundle = containers.join(ID).join("userdata");
        assert_eq!(look_up(&bundle, ID), Named { engine: Some("podman".into()), ..Named::default() });
        write(&bundle.join("config.json"), r#"{"annotations":{"io.container.manager":"libpod"},"mounts":[]}"#);
        let list = format!(
            r#"[{{"id":"{}","names":["other"]}},{{"id":"{ID}","names":["web","web2"],"image":"27d4","metadata":"{{}}","flags":{{}}}}]"#,
            ID.replace('0', "1")
        );
        write(&containers.join("containers.json"), &list);
        assert_eq!(look_up(&bundle, ID), named("podman", "web", None));
        // podman run --rm of newer versions.
        std::fs::rename(containers.join("containers.json"), containers.join("volatile-containers.json")).unwrap();
        assert_eq!(look_up(&bundle, ID), named("podman", "web", None));
        assert_eq!(look_up(&bundle, "other").name, None, "not this container's bundle");
    }

    #[test]
    fn docker_names_are_where_its_data_are() {
        let dir = tempfile::tempdir().unwrap();
        let bundle = dir.path().join("run").join(CONTAINERD_TASKS).join("moby").join(ID);
        let data = dir.path().join("docker/containers").join(ID);
        let config = format!(
            r#"{{"ociVersion":"1.2.0","mounts":[{{"destination":"/proc","type":"proc"}},
               {{"destination":"/etc/hostname","type":"bind","source":"{}/hostname","options":["rbind"]}}]}}"#,
            data.display()
        );
        write(&bundle.join("config.json"), &config);
        assert_eq!(look_up(&bundle, ID), Named { engine: Some("docker".into()), ..Named::default() });
        write(&data.join("config.v2.json"), &format!(r#"{{"ID":"{ID}","Name":"/trainer","Config":{{"Image":"x"}}}}"#));
        assert_eq!(look_up(&bundle, ID), named("docker", "trainer", None));
        // A dockerd with a containerd namespace of its own.
        let other = bundle.parent().unwrap().parent().unwrap().join("tmp.docker").join(ID);
        write(&other.join("config.json"), &config);
        assert_eq!(look_up(&other, ID), named("docker", "trainer", None));
    }

    #[test]
    fn kubernetes_names_come_with_their_pod() {
        let dir = tempfile::tempdir().unwrap();
        let bundle = dir.path().join(CONTAINERD_TASKS).join("k8s.io").join(ID);
        write(
            &bundle.join("config.json"),
            r#"{"annotations":{"io.kubernetes.cri.container-name":"trainer","io.kubernetes.cri.container-type":"container",
               "io.kubernetes.cri.sandbox-name":"train-0","io.kubernetes.cri.sandbox-namespace":"ml"}}"#,
        );
        assert_eq!(look_up(&bundle, ID), named("containerd", "trainer", Some("ml/train-0")));
        let bundle = dir.path().join("overlay-containers").join(ID).join("userdata");
        write(
            &bundle.join("config.json"),
            r#"{"annotations":{"io.container.manager":"cri-o","io.kubernetes.container.name":"trainer",
               "io.kubernetes.pod.name":"train-0","io.kubernetes.pod.namespace":"ml"}}"#,
        );
        assert_eq!(look_up(&bundle, ID), named("cri-o", "trainer", Some("ml/train-0")));
    }

    #[test]
    fn other_containerd_clients_name_by_annotation_or_id() {
        let dir = tempfile::tempdir().unwrap();
        let tasks = dir.path().join(CONTAINERD_TASKS).join("default");
        write(&tasks.join(ID).join("config.json"), r#"{"annotations":{"nerdctl/name":"nginx-8d1f"}}"#);
        assert_eq!(look_up(&tasks.join(ID), ID), named("containerd", "nginx-8d1f", None));
        assert_eq!(look_up(&tasks.join("p2"), "p2"), named("containerd", "p2", None));
        assert_eq!(look_up(&dir.path().join("bundle"), ID), Named::default(), "a bare runtime's");
        assert_eq!(look_up(&tasks.join("p2"), "../p2"), Named::default());
    }

    #[test]
    fn odd_files_tell_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let containers = dir.path().join("overlay-containers");
        let bundle = containers.join(ID).join("userdata");
        let list = containers.join("containers.json");
        let unknown = Named { engine: Some("podman".into()), ..Named::default() };
        for text in ["", "{}", "[1]", r#"[{"id":7}]"#, "nonsense"] {
            write(&list, text);
            assert_eq!(look_up(&bundle, ID), unknown, "{text}");
        }
        for name in ["", "a\\u001b[31mb", &"x".repeat(LONGEST + 1)] {
            write(&list, &format!(r#"[{{"id":"{ID}","names":["{name}"]}}]"#));
            assert_eq!(look_up(&bundle, ID), unknown, "{name}");
        }
        write(&dir.path().join("real"), &format!(r#"[{{"id":"{ID}","names":["web"]}}]"#));
        std::fs::remove_file(&list).unwrap();
        std::os::unix::fs::symlink(dir.path().join("real"), &list).unwrap();
        assert_eq!(look_up(&bundle, ID), unknown, "links are not followed");
        std::fs::remove_file(&list).unwrap();
        nix::sys::stat::mknod(&list, nix::sys::stat::SFlag::S_IFIFO, nix::sys::stat::Mode::S_IRUSR, 0).unwrap();
        assert_eq!(look_up(&bundle, ID), unknown, "nor is a pipe waited for");
        std::fs::remove_file(&list).unwrap();
        File::create(&list).unwrap().set_len(LIMIT + 1).unwrap();
        assert_eq!(look_up(&bundle, ID), unknown, "nor is a huge file read");
    }
}
