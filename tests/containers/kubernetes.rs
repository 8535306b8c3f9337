//! Pods as the kubelet makes them, in containerd's CRI, with the settings and the pods of docs/kubernetes.md.

use std::process::Command;

use serde_json::json;
use yaml_rust2::{Yaml, YamlLoader};

use crate::common::wait_for;
use crate::containerd::{Containerd, shim_of};
use crate::cri::{self, Cri, Pod, Task};
use crate::{SOON, Site, cgroup_v2, kill, must, skip};

const DOCS: &str = include_str!("../../docs/kubernetes.md");
const ASK: &[(&str, &str)] = &[("mig.profile", "1g.10gb")];

/// The block of docs/kubernetes.md that begins with this line.
fn documented(first_line: &str) -> &'static str {
    let start = DOCS.find(&format!("\n{first_line}\n")).unwrap_or_else(|| panic!("no {first_line:?} in the docs")) + 1;
    let block = &DOCS[start..];
    &block[..block.find("\n```").unwrap()]
}

/// The pods' world: settings, and our shim where the documentation has /usr/bin/mig-runtime.
fn site() -> Option<Site> {
    let site = Site::new(&["containerd", "curl", "sha256sum", "tar"])?;
    if let Some(why) = cri::why_not() {
        return skip(why);
    }
    let controllers = std::fs::read_to_string("/sys/fs/cgroup/cgroup.controllers").unwrap_or_default();
    if cgroup_v2() && !controllers.split_whitespace().any(|controller| controller == "cpu") {
        return skip("a pod's sandbox asks for CPU shares, and this cgroup v2 tree has no cpu controller");
    }
    site.wrapper("");
    Some(site)
}

/// A node: containerd with the handler `mig` as documented, and what this machine needs to run pods at all.
struct Node<'a> {
    site: &'a Site,
    containerd: Containerd<'a>,
    cri: Cri,
}

impl<'a> Node<'a> {
    fn new(site: &'a Site) -> Node<'a> {
        let image = "localhost/busybox:latest";
        let (config, here) = match Containerd::major() {
            1 => (
                "# containerd 1.x: /etc/containerd/config.toml",
                format!(
                    "[plugins.\"io.containerd.grpc.v1.cri\"]\nrestrict_oom_score_adj = true\nsandbox_image = \"{image}\"\n\
                     [plugins.\"io.containerd.grpc.v1.cri\".containerd]\nsnapshotter = \"native\"\n"
                ),
            ),
            _ => (
                "# containerd 2.x: /etc/containerd/config.toml",
                format!(
                    "[plugins.'io.containerd.cri.v1.runtime']\nrestrict_oom_score_adj = true\n\
                     [plugins.'io.containerd.cri.v1.images']\nsnapshotter = \"native\"\n\
                     [plugins.'io.containerd.cri.v1.images'.pinned_images]\nsandbox = \"{image}\"\n"
                ),
            ),
        };
        let (_, config) = documented(config).split_once('\n').unwrap();
        let config = config.replace("/usr/bin/mig-runtime", &site.shown("mig-runtime"));
        assert!(config.contains(&site.shown("mig-runtime")), "{config}");
        let containerd = Containerd::with(site, &format!("{config}\n{here}"));
        let archive = archive(site, image);
        must(&mut containerd.ctr(&["--namespace", "k8s.io", "images", "import", "--no-unpack", &archive]));
        let cri = Cri { socket: containerd.socket(), image: image.to_owned() };
        let node = Node { site, containerd, cri };
        node.wait();
        node
    }

    fn wait(&self) {
        wait_for("the image is there", SOON, || self.cri.ready());
    }

    fn pod(&self, name: &str, handler: &str, annotations: &[(&str, &str)]) -> Pod {
        self.cri.pod(name, handler, &self.site.cgroup(name), annotations, false)
    }

    fn remove(&self, pod: &Pod) {
        self.cri.verb("StopPodSandbox", &pod.id);
        self.cri.verb("RemovePodSandbox", &pod.id);
    }
}

/// busybox as an image that does nothing for ever: for sandboxes too.
fn archive(site: &Site, name: &str) -> String {
    let layer = site.path("image/layer.tar");
    std::fs::create_dir_all(layer.parent().unwrap()).unwrap();
    std::fs::copy(site.dir.join("rootfs.tar"), &layer).unwrap();
    let sum = must(Command::new("sha256sum").arg(&layer));
    let digest = format!("sha256:{}", sum.split_whitespace().next().unwrap());
    let config = json!({
        "architecture": if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" },
        "os": "linux",
        "config": {"Env": ["PATH=/bin"], "Entrypoint": ["/bin/sleep", "86400"]},
        "rootfs": {"type": "layers", "diff_ids": [digest]},
    });
    site.write("image/config.json", &config.to_string());
    let manifest = json!([{"Config": "config.json", "RepoTags": [name], "Layers": ["layer.tar"]}]);
    site.write("image/manifest.json", &manifest.to_string());
    let archive = site.shown("image.tar");
    let files = ["manifest.json", "config.json", "layer.tar"];
    must(Command::new("tar").args(["-cf", &archive, "-C"]).arg(layer.parent().unwrap()).args(files));
    archive
}

#[test]
fn a_container_gets_what_its_pod_asks_for_and_the_sandbox_nothing() {
    let Some(site) = site() else { return };
    let node = Node::new(&site);
    let pod = node.pod("train", "mig", ASK);
    assert!(!site.path("state").exists(), "the sandbox asked for a slice");
    let id = node.cri.create(&pod, &Task { name: "trainer", command: &["/bin/sleep", "600"], ..Task::default() });
    assert!(!site.path("state").exists(), "CreateContainer is not yet the runtime's create");
    node.cri.verb("StartContainer", &id);
    assert_eq!(site.lease()["holder"]["container"], json!(id));

    // Beside it: a pod of the same handler that asks for nothing, and one of the default handler that asks in vain.
    let quiet = node.pod("quiet", "mig", &[]);
    let quiet_id = node.cri.start(&quiet, "c", 0);
    let plain = node.pod("plain", "", ASK);
    let plain_id = node.cri.start(&plain, "c", 0);
    // A variable of the pod's may as well be the image's: it counts for nothing.
    let task =
        Task { name: "e", command: &["/bin/sleep", "600"], env: &[("MIG_PROFILE", "1g.10gb")], ..Task::default() };
    let env_id = node.cri.create(&quiet, &task);
    node.cri.verb("StartContainer", &env_id);
    for other in [&quiet_id, &plain_id, &env_id] {
        let nothing = node.cri.probe(other);
        assert!(nothing.is_empty(), "{nothing:?}");
    }

    let seen = node.cri.probe(&id);
    site.assert_given(&seen, &["1g.10gb"]);
    site.assert_confined(&seen, |devices| node.cri.try_devices(&id, devices));
    let grants: Vec<_> = site.audit().into_iter().filter(|line| line["event"] == "grant").collect();
    assert_eq!(grants.len(), 1, "{grants:#?}");
    assert_eq!(grants[0]["image"], json!(node.cri.image), "{grants:#?}");

    for verb in ["StopContainer", "RemoveContainer"] {
        node.cri.verb(verb, &id);
        site.assert_clean(&format!("when {verb} returns"));
    }
    for pod in [&pod, &quiet, &plain] {
        node.remove(pod);
        site.assert_clean("after the pod");
    }
    assert_eq!((site.audited("grant"), site.audited("release")), (1, 1));
}

#[test]
fn every_end_gives_the_slice_back() {
    let Some(site) = site() else { return };
    let node = Node::new(&site);
    let pod = node.pod("ends", "mig", ASK);
    // Each start is the kubelet's next attempt in the same pod: a restart is a new container with a new slice.
    for (attempt, end) in ["StopContainer", "RemoveContainer"].into_iter().enumerate() {
        let id = node.cri.start(&pod, "c", u32::try_from(attempt).unwrap());
        assert_eq!(site.leases().len(), 1);
        node.cri.verb(end, &id);
        site.assert_clean(&format!("when {end} returns"));
    }
    let id = node.cri.start(&pod, "c", 2);
    kill(node.cri.pid(&id));
    site.clean("after kill -9 of its first process, without gc");
    let exits = Task { name: "c", command: &["/bin/sh", "-c", "exit 3"], attempt: 3, ..Task::default() };
    let id = node.cri.create(&pod, &exits);
    node.cri.verb("StartContainer", &id);
    wait_for("its slice", SOON, || site.audited("grant") == 4);
    site.clean("after an exit");
    let fails = Task { name: "c", command: &["/nonexistent"], attempt: 4, ..Task::default() };
    let id = node.cri.create(&pod, &fails);
    let error = node.cri.try_verb("StartContainer", &id).unwrap_err();
    assert!(error.contains("/nonexistent"), "{error}");
    site.assert_clean("after a command that is not there");
    node.cri.start(&pod, "c", 5);
    assert_eq!(site.leases().len(), 1);
    node.cri.verb("StopPodSandbox", &pod.id);
    site.assert_clean("when StopPodSandbox returns");
    node.cri.verb("RemovePodSandbox", &pod.id);
    let pod = node.pod("removed", "mig", ASK);
    node.cri.start(&pod, "c", 0);
    node.cri.verb("RemovePodSandbox", &pod.id);
    site.assert_clean("when RemovePodSandbox of a running pod returns");
    assert_eq!(site.audited("grant"), site.audited("release"));
}

#[test]
fn a_refusal_is_in_the_kubelets_error() {
    let Some(site) = site() else { return };
    let node = Node::new(&site);
    for (n, (annotations, words)) in [
        (&[("mig.profile", "3g.13gb")][..], &["mig: ", "3g.13gb", "1g.10gb"][..]),
        (&[("mig.profil", "1g.10gb")], &["mig: ", "unknown annotation mig.profil", "mig.profile"]),
        (&[("mig.profile", "8x7g.80gb")], &["mig: ", "8x7g.80gb"]),
    ]
    .into_iter()
    .enumerate()
    {
        let pod = node.pod(&format!("bad{n}"), "mig", annotations);
        let id = node.cri.create(&pod, &Task { name: "c", command: &["/bin/true"], ..Task::default() });
        let error = node.cri.try_verb("StartContainer", &id).unwrap_err();
        for word in words {
            assert!(error.contains(word), "{word:?} is not in {error}");
        }
        site.assert_clean("after a refusal");
        node.remove(&pod);
    }
    let pod = node.cri.pod("privileged", "mig", &site.cgroup("privileged"), ASK, true);
    let task = Task { name: "c", command: &["/bin/true"], privileged: true, ..Task::default() };
    let error = node.cri.try_verb("StartContainer", &node.cri.create(&pod, &task)).unwrap_err();
    assert!(error.contains("mig: ") && error.contains("other slices than its own"), "{error}");
    site.assert_clean("after a refusal");
    node.remove(&pod);
    assert_eq!((site.audited("refusal"), site.audited("grant")), (4, 0));
}

#[test]
fn a_killed_shim_frees_the_slices_of_its_pod() {
    let Some(site) = site() else { return };
    let node = Node::new(&site);
    let pod = node.pod("shim", "mig", ASK);
    for name in ["one", "two"] {
        node.cri.start(&pod, name, 0);
    }
    assert_eq!(site.leases().len(), 2, "a slice for each container");
    // One shim, named after the sandbox, for the whole pod.
    kill(shim_of(&pod.id));
    if Containerd::major() > 1 {
        // containerd 2 deletes the sandbox, whose end is the end of its PID namespace, but not the containers (2.1.9).
        wait_for("what nobody calls delete for is freed by gc", SOON, || {
            site.gc();
            site.leases().is_empty()
        });
    }
    site.clean("after kill -9 of the containerd shim, before containerd 2 without gc");
    wait_for("containerd notices", SOON, || node.cri.try_verb("RemovePodSandbox", &pod.id).is_ok());
}

#[test]
fn a_pod_outlives_a_killed_containerd_and_keeps_its_slice_until_it_ends() {
    let Some(site) = site() else { return };
    let mut node = Node::new(&site);
    let pod = node.pod("outlives", "mig", ASK);
    let id = node.cri.start(&pod, "c", 0);
    let before = site.lease()["token"].clone();
    node.containerd.kill();
    assert_eq!(site.gc(), ["kept"], "its first process lives");
    node.containerd.start_again();
    node.wait();
    assert_eq!(site.gc(), ["kept"]);
    assert_eq!(site.lease()["token"], before);
    site.assert_given(&node.cri.probe(&id), &["1g.10gb"]);
    node.cri.verb("StopContainer", &id);
    site.assert_clean("when StopContainer returns");
    node.remove(&pod);
}

/// A RuntimeClass and a pod of the documentation, as the kubelet hands them to the engine.
#[test]
fn the_pod_of_the_documentation() {
    let Some(site) = site() else { return };
    let class = &YamlLoader::load_from_str(documented("# runtimeclass.yaml")).unwrap()[0];
    assert_eq!((class["kind"].as_str(), class["apiVersion"].as_str()), (Some("RuntimeClass"), Some("node.k8s.io/v1")));
    let pod = &YamlLoader::load_from_str(documented("# pod.yaml")).unwrap()[0];
    assert_eq!(pod["spec"]["runtimeClassName"], class["metadata"]["name"]);
    let text = |yaml: &Yaml| yaml.as_str().unwrap().to_owned();
    let annotations = pod["metadata"]["annotations"].as_hash().unwrap();
    let annotations: Vec<_> = annotations.iter().map(|(key, value)| (text(key), text(value))).collect();
    let annotations: Vec<_> = annotations.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
    assert_eq!(annotations, [("mig.profile/trainer", "2g.20gb"), ("mig.profile/server", "1g.10gb")]);

    let node = Node::new(&site);
    let running = node.pod("documented", class["handler"].as_str().unwrap(), &annotations);
    let names: Vec<String> = pod["spec"]["containers"].as_vec().unwrap().iter().map(|c| text(&c["name"])).collect();
    assert_eq!(names, ["trainer", "server", "logger"]);
    let ids: Vec<String> = names.iter().map(|name| node.cri.start(&running, name, 0)).collect();
    site.assert_given(&node.cri.probe(&ids[0]), &["2g.20gb"]);
    site.assert_given(&node.cri.probe(&ids[1]), &["1g.10gb"]);
    assert!(node.cri.probe(&ids[2]).is_empty(), "no key names it");
    assert_eq!(site.leases().len(), 2);
    node.remove(&running);
    site.assert_clean("after the pod");
}

/// The other examples are at least what they say they are.
#[test]
fn the_examples_of_the_documentation_parse() {
    for line in ["# containerd 1.x: /etc/containerd/config.toml", "# containerd 2.x: /etc/containerd/config.toml"] {
        let config: toml::Table = documented(line).parse().unwrap();
        let (_, plugin) = config["plugins"].as_table().unwrap().iter().next().unwrap();
        let handler = &plugin["containerd"]["runtimes"]["mig"];
        assert_eq!(handler["pod_annotations"], handler["container_annotations"]);
        assert_eq!(handler["options"]["BinaryName"].as_str(), Some("/usr/bin/mig-runtime"));
    }
    let config: toml::Table = documented("# CRI-O: /etc/crio/crio.conf.d/50-mig-hook.conf").parse().unwrap();
    let handler = &config["crio"]["runtime"]["runtimes"]["mig"];
    assert_eq!(handler["runtime_path"].as_str(), Some("/usr/bin/mig-runtime"));
    for (line, key) in [("# crictl: pod.yaml", "annotations"), ("# crictl: container.yaml", "command")] {
        assert!(!YamlLoader::load_from_str(documented(line)).unwrap()[0][key].is_badvalue(), "{line}");
    }
}
