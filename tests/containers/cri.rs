//! What the kubelet says to an engine: the calls of the Container Runtime Interface that the tests make, with the fields
//! that they need, by their numbers in k8s.io/cri-api runtime/v1.
//!
//! gRPC is HTTP/2 and five bytes before the message: curl speaks it.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::process::Command;

use prost::Message;
use serde_json::Value;

use crate::Probe;
use crate::common::{feed, text};

/// `NODE` of NamespaceMode: pods on the host's network need no CNI.
const HOST_NETWORK: i32 = 2;

/// Why curl can't do it here.
pub(crate) fn why_not() -> Option<&'static str> {
    let spoken = Command::new("curl").arg("--version").output();
    let spoken = spoken.is_ok_and(|output| String::from_utf8_lossy(&output.stdout).contains("HTTP2"));
    (!spoken).then_some("no curl that speaks HTTP/2, to talk to the engine as the kubelet does")
}

/// An engine, at its socket.
pub(crate) struct Cri {
    pub(crate) socket: PathBuf,
    pub(crate) image: String,
}

/// A pod that runs.
pub(crate) struct Pod {
    pub(crate) id: String,
    config: PodSandboxConfig,
}

/// What a container is to do.
#[derive(Default)]
pub(crate) struct Task<'a> {
    pub(crate) name: &'a str,
    pub(crate) command: &'a [&'a str],
    pub(crate) env: &'a [(&'a str, &'a str)],
    /// How often the kubelet has started it before.
    pub(crate) attempt: u32,
    pub(crate) privileged: bool,
}

impl Cri {
    /// One call. The engine's own sentence when it fails.
    fn call<A: Message + Default>(&self, method: &str, question: &impl Message) -> Result<A, String> {
        let body = question.encode_to_vec();
        let mut frame = vec![0];
        frame.extend(u32::try_from(body.len()).unwrap().to_be_bytes());
        frame.extend(body);
        let mut curl = Command::new("curl");
        curl.args(["--disable", "--silent", "--show-error", "--http2-prior-knowledge", "--dump-header", "/dev/stderr"])
            .args(["--header", "content-type: application/grpc", "--header", "te: trailers"])
            .args(["--data-binary", "@-", "--unix-socket"])
            .arg(&self.socket)
            .arg(format!("http://localhost/runtime.v1.{method}"));
        let output = feed(&mut curl, &frame);
        let headers = String::from_utf8_lossy(&output.stderr).into_owned();
        let header = |name: &str| headers.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
        match header("grpc-status:") {
            Some("0") => Ok(A::decode(&output.stdout[5..]).unwrap()),
            Some(_) => Err(header("grpc-message:").unwrap_or_default().to_owned()),
            None => panic!("{method}: no answer; does the engine serve the CRI? See its log. {}", text(&output)),
        }
    }

    fn must<A: Message + Default>(&self, method: &str, question: &impl Message) -> A {
        self.call(method, question).unwrap_or_else(|error| panic!("{method}: {error}"))
    }

    /// Whether it answers, and its image is there.
    pub(crate) fn ready(&self) -> bool {
        let question = ImageStatusRequest { image: Some(ImageSpec { image: self.image.clone() }) };
        let answer: Result<ImageStatusResponse, String> = self.call("ImageService/ImageStatus", &question);
        answer.is_ok_and(|answer| answer.image.is_some())
    }

    /// Starts a pod's sandbox. An empty handler is the default one, as for a pod without a RuntimeClass.
    pub(crate) fn pod(
        &self,
        name: &str,
        handler: &str,
        cgroup: &str,
        annotations: &[(&str, &str)],
        privileged: bool,
    ) -> Pod {
        let owned = |(key, value): &(&str, &str)| ((*key).to_owned(), (*value).to_owned());
        let config = PodSandboxConfig {
            metadata: Some(PodMetadata {
                name: name.into(),
                uid: name.into(),
                namespace: "default".into(),
                attempt: 0,
            }),
            log_directory: self.socket.parent().unwrap().join("pods").display().to_string(),
            annotations: annotations.iter().map(owned).collect(),
            linux: Some(PodLinux {
                cgroup_parent: cgroup.into(),
                security: Some(PodSecurity { namespaces: Some(Namespaces { network: HOST_NETWORK }), privileged }),
            }),
        };
        let question = RunPodSandboxRequest { config: Some(config.clone()), runtime_handler: handler.into() };
        let answer: Id = self.must("RuntimeService/RunPodSandbox", &question);
        Pod { id: answer.id, config }
    }

    pub(crate) fn create(&self, pod: &Pod, task: &Task<'_>) -> String {
        let variable = |(key, value): &(&str, &str)| KeyValue { key: (*key).into(), value: (*value).into() };
        let config = ContainerConfig {
            metadata: Some(ContainerMetadata { name: task.name.into(), attempt: task.attempt }),
            image: Some(ImageSpec { image: self.image.clone() }),
            command: task.command.iter().map(|word| (*word).to_owned()).collect(),
            env: task.env.iter().map(variable).collect(),
            log_path: format!("{}-{}.log", task.name, task.attempt),
            linux: Some(ContainerLinux {
                security: Some(ContainerSecurity {
                    privileged: task.privileged,
                    namespaces: Some(Namespaces { network: HOST_NETWORK }),
                }),
            }),
        };
        let question =
            CreateContainerRequest { pod: pod.id.clone(), config: Some(config), pod_config: Some(pod.config.clone()) };
        let answer: Id = self.must("RuntimeService/CreateContainer", &question);
        answer.id
    }

    /// A verb that takes an id and answers nothing: StartContainer, RemovePodSandbox and so on.
    pub(crate) fn try_verb(&self, verb: &str, id: &str) -> Result<(), String> {
        self.call::<Nothing>(&format!("RuntimeService/{verb}"), &Id { id: id.to_owned() }).map(|_| ())
    }

    pub(crate) fn verb(&self, verb: &str, id: &str) {
        self.try_verb(verb, id).unwrap_or_else(|error| panic!("{verb} {id}: {error}"));
    }

    /// Creates and starts a container that waits. Its id.
    pub(crate) fn start(&self, pod: &Pod, name: &str, attempt: u32) -> String {
        let id = self.create(pod, &Task { name, command: &["/bin/sleep", "600"], attempt, ..Task::default() });
        self.verb("StartContainer", &id);
        id
    }

    /// Standard output of a command in a container.
    pub(crate) fn exec(&self, id: &str, command: &[&str]) -> String {
        let command = command.iter().map(|word| (*word).to_owned()).collect();
        let question = ExecSyncRequest { id: id.to_owned(), command, timeout: 30 };
        let answer: ExecSyncResponse = self.must("RuntimeService/ExecSync", &question);
        let said = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        assert_eq!(answer.exit_code, 0, "{:?}: {}", question.command, said(&answer.stderr));
        said(&answer.stdout)
    }

    /// What a session in a container sees.
    pub(crate) fn probe(&self, id: &str) -> Probe {
        Probe::read(&self.exec(id, &["/bin/mig-probe"]))
    }

    /// Makes a node for each device in a container and tries to open it: device to verdict.
    pub(crate) fn try_devices(&self, id: &str, devices: &[String]) -> BTreeMap<String, String> {
        let mut words = vec!["/bin/mig-probe"];
        words.extend(devices.iter().map(String::as_str));
        Probe::verdicts(&self.exec(id, &words))
    }

    /// The first process of a container; containerd tells it to those who ask for everything.
    pub(crate) fn pid(&self, id: &str) -> u32 {
        let question = ContainerStatusRequest { id: id.to_owned(), verbose: true };
        let answer: ContainerStatusResponse = self.must("RuntimeService/ContainerStatus", &question);
        let info: Value = serde_json::from_str(&answer.info["info"]).unwrap();
        u32::try_from(info["pid"].as_u64().unwrap()).unwrap()
    }
}

/// Messages of which only the first field is an id.
#[derive(Clone, PartialEq, Message)]
struct Id {
    #[prost(string, tag = "1")]
    id: String,
}

#[derive(Clone, PartialEq, Message)]
struct Nothing {}

#[derive(Clone, PartialEq, Message)]
struct ImageSpec {
    #[prost(string, tag = "1")]
    image: String,
}

#[derive(Clone, PartialEq, Message)]
struct ImageStatusRequest {
    #[prost(message, optional, tag = "1")]
    image: Option<ImageSpec>,
}

#[derive(Clone, PartialEq, Message)]
struct ImageStatusResponse {
    #[prost(message, optional, tag = "1")]
    image: Option<Id>,
}

#[derive(Clone, PartialEq, Message)]
struct RunPodSandboxRequest {
    #[prost(message, optional, tag = "1")]
    config: Option<PodSandboxConfig>,
    #[prost(string, tag = "2")]
    runtime_handler: String,
}

#[derive(Clone, PartialEq, Message)]
struct PodSandboxConfig {
    #[prost(message, optional, tag = "1")]
    metadata: Option<PodMetadata>,
    #[prost(string, tag = "3")]
    log_directory: String,
    #[prost(map = "string, string", tag = "7")]
    annotations: HashMap<String, String>,
    #[prost(message, optional, tag = "8")]
    linux: Option<PodLinux>,
}

#[derive(Clone, PartialEq, Message)]
struct PodMetadata {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(string, tag = "2")]
    uid: String,
    #[prost(string, tag = "3")]
    namespace: String,
    #[prost(uint32, tag = "4")]
    attempt: u32,
}

#[derive(Clone, PartialEq, Message)]
struct PodLinux {
    #[prost(string, tag = "1")]
    cgroup_parent: String,
    #[prost(message, optional, tag = "2")]
    security: Option<PodSecurity>,
}

#[derive(Clone, PartialEq, Message)]
struct PodSecurity {
    #[prost(message, optional, tag = "1")]
    namespaces: Option<Namespaces>,
    #[prost(bool, tag = "6")]
    privileged: bool,
}

#[derive(Clone, PartialEq, Message)]
struct Namespaces {
    #[prost(int32, tag = "1")]
    network: i32,
}

#[derive(Clone, PartialEq, Message)]
struct CreateContainerRequest {
    #[prost(string, tag = "1")]
    pod: String,
    #[prost(message, optional, tag = "2")]
    config: Option<ContainerConfig>,
    #[prost(message, optional, tag = "3")]
    pod_config: Option<PodSandboxConfig>,
}

#[derive(Clone, PartialEq, Message)]
struct ContainerConfig {
    #[prost(message, optional, tag = "1")]
    metadata: Option<ContainerMetadata>,
    #[prost(message, optional, tag = "2")]
    image: Option<ImageSpec>,
    #[prost(string, repeated, tag = "3")]
    command: Vec<String>,
    #[prost(message, repeated, tag = "6")]
    env: Vec<KeyValue>,
    #[prost(string, tag = "11")]
    log_path: String,
    #[prost(message, optional, tag = "15")]
    linux: Option<ContainerLinux>,
}

#[derive(Clone, PartialEq, Message)]
struct ContainerMetadata {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(uint32, tag = "2")]
    attempt: u32,
}

#[derive(Clone, PartialEq, Message)]
struct KeyValue {
    #[prost(string, tag = "1")]
    key: String,
    #[prost(string, tag = "2")]
    value: String,
}

#[derive(Clone, PartialEq, Message)]
struct ContainerLinux {
    #[prost(message, optional, tag = "2")]
    security: Option<ContainerSecurity>,
}

#[derive(Clone, PartialEq, Message)]
struct ContainerSecurity {
    #[prost(bool, tag = "2")]
    privileged: bool,
    #[prost(message, optional, tag = "3")]
    namespaces: Option<Namespaces>,
}

#[derive(Clone, PartialEq, Message)]
struct ExecSyncRequest {
    #[prost(string, tag = "1")]
    id: String,
    #[prost(string, repeated, tag = "2")]
    command: Vec<String>,
    #[prost(int64, tag = "3")]
    timeout: i64,
}

#[derive(Clone, PartialEq, Message)]
struct ExecSyncResponse {
    #[prost(bytes = "vec", tag = "1")]
    stdout: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    stderr: Vec<u8>,
    #[prost(int32, tag = "3")]
    exit_code: i32,
}

#[derive(Clone, PartialEq, Message)]
struct ContainerStatusRequest {
    #[prost(string, tag = "1")]
    id: String,
    #[prost(bool, tag = "2")]
    verbose: bool,
}

#[derive(Clone, PartialEq, Message)]
struct ContainerStatusResponse {
    #[prost(map = "string, string", tag = "2")]
    info: HashMap<String, String>,
}
