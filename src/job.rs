//! A job of a batch system: its key, what others than root may know of it, and what its processes get. Pure.
//!
//! On disk: `public/KEY.json`, described field by field in docs/state.md.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::first;
use crate::lease::{Lease, Slice};
use crate::request::{GpuSelector, Request, Want};

/// Version of the public record. Another one on disk is refused.
pub const VERSION: u64 = 1;
/// Variable that tells a job's processes its key.
pub const KEY: &str = "MIG_JOB";

/// What a batch system calls a job, as `slurm:CLUSTER:ID`. A plain file name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Key(String);

impl Key {
    /// Letters, digits and `._:@+-[]`, at most 128 of them, without a dot in front.
    ///
    /// # Errors
    /// A sentence that says what is wrong.
    pub fn parse(text: &str) -> Result<Key, String> {
        match first::job_key(text) {
            true => Ok(Key(text.to_owned())),
            false => Err("a job's key has 1 to 128 letters, digits and ._:@+-[] and does not begin with a dot, as \
                          slurm:cluster:15"
                .into()),
        }
    }

    /// A Slurm job's. Without its restart count: the Epilog of a requeued job sees another one than its Prolog did.
    ///
    /// # Errors
    /// As [`Key::parse`].
    pub fn of_slurm(cluster: &str, id: &str) -> Result<Key, String> {
        Key::parse(&format!("slurm:{cluster}:{id}"))
    }

    /// As it is written.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What the job's own processes may know of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Public {
    /// Of the record: [`VERSION`].
    pub version: u64,
    /// The job's key.
    pub key: String,
    /// Its user.
    pub uid: u32,
    /// Its lease; `None` when it was refused.
    pub token: Option<String>,
    /// Its slices, in the order asked.
    pub slices: Vec<Part>,
    /// The device nodes that it needs. They are there on the host.
    pub nodes: Vec<Node>,
    /// Why it has got nothing.
    pub refusal: Option<String>,
}

/// One of its slices.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Part {
    /// `MIG-…`.
    pub uuid: String,
    /// Its profile, as the driver names it.
    pub profile: String,
    /// `GPU-…` of the parent.
    pub gpu: String,
    /// Its NVML index.
    pub gpu_index: u32,
    /// Memory of the profile in MiB.
    pub memory_mib: u64,
}

/// A device node on the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Node {
    /// Path below the host's /dev: `nvidia0`, `nvidia-caps/nvidia-cap12`.
    pub path: String,
    /// Major number.
    pub major: u32,
    /// Minor number.
    pub minor: u32,
}

impl Public {
    /// Of a job that has its slices.
    pub fn granted(key: &Key, uid: u32, lease: &Lease, nodes: Vec<Node>) -> Public {
        let part = |slice: &Slice| {
            Some(Part {
                uuid: slice.uuid.clone()?,
                profile: slice.profile_name.clone(),
                gpu: slice.gpu.clone(),
                gpu_index: slice.gpu_index,
                memory_mib: slice.memory_mib,
            })
        };
        let slices = lease.slices.iter().filter_map(part).collect();
        Public { token: Some(lease.token.clone()), slices, nodes, ..Public::refused(key, uid, None) }
    }

    /// Of one that has got none.
    pub fn refused(key: &Key, uid: u32, refusal: Option<String>) -> Public {
        let (key, version) = (key.to_string(), VERSION);
        Public { version, key, uid, token: None, slices: Vec::new(), nodes: Vec::new(), refusal }
    }

    /// What its processes get; its key, too, so that they are known for its.
    pub fn environment(&self) -> Vec<(&'static str, String)> {
        let mut variables = environment(&self.uuids(), &self.profiles(), self.token.as_deref().unwrap_or_default());
        variables.push((KEY, self.key.clone()));
        variables
    }

    /// Whether what it has is what is asked for: all of it, nothing more. A memory size is met by any that is as large.
    pub fn meets(&self, request: &Request) -> bool {
        let of_gpu = |part: &Part| match &request.gpu {
            Some(GpuSelector::Index(index)) => part.gpu_index == *index,
            Some(GpuSelector::Uuid(uuid)) => part.gpu.eq_ignore_ascii_case(uuid),
            Some(GpuSelector::Pci(_)) | None => true, // addresses are not public
        };
        let is = |part: &Part, want: &Want| match want {
            Want::Profile(name) => part.profile.eq_ignore_ascii_case(name),
            Want::Memory { bytes } => part.memory_mib.saturating_mul(1 << 20) >= *bytes,
            Want::Uuid(uuid) => part.uuid.eq_ignore_ascii_case(uuid),
        };
        let all = |wants: &Vec<Want>| {
            let mut left: Vec<&Part> = self.slices.iter().filter(|part| of_gpu(part)).collect();
            let taken = wants.iter().all(|want| match left.iter().position(|part| is(part, want)) {
                Some(at) => {
                    left.remove(at);
                    true
                }
                None => false,
            });
            taken && left.is_empty() && wants.len() == self.slices.len()
        };
        request.alternatives.iter().any(all)
    }

    /// The UUIDs of its slices, comma-separated.
    pub fn uuids(&self) -> String {
        self.slices.iter().map(|part| part.uuid.as_str()).collect::<Vec<_>>().join(",")
    }

    /// Their profiles, comma-separated.
    pub fn profiles(&self) -> String {
        self.slices.iter().map(|part| part.profile.as_str()).collect::<Vec<_>>().join(",")
    }
}

/// What the processes of a command or a job get. Unlike in a container, NVIDIA_VISIBLE_DEVICES has the UUIDs: what is
/// started there (enroot, Sarus, Apptainer's nvccli) gives its container what it says.
pub fn environment(uuids: &str, profiles: &str, token: &str) -> Vec<(&'static str, String)> {
    let uuid = ["CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "MIG_UUID", "MIG_DEVICE_UUIDS"];
    let mut variables: Vec<_> = uuid.into_iter().map(|name| (name, uuids.to_owned())).collect();
    variables.push(("MIG_DEVICE_PROFILES", profiles.to_owned()));
    variables.push(("MIG_LEASE", token.to_owned()));
    variables
}

/// Variables that somebody else's slices have left in an environment: a job that is submitted from within another one, or
/// from `migctl run`, inherits them. `value` tells a variable's.
pub fn inherited(value: impl Fn(&str) -> Option<String>) -> Vec<&'static str> {
    let ours = value("MIG_UUID").filter(|_| value("MIG_LEASE").is_some());
    let Some(uuids) = ours else { return Vec::new() };
    let is_ours = |name: &&str| match *name {
        "CUDA_VISIBLE_DEVICES" | "NVIDIA_VISIBLE_DEVICES" => value(name).is_some_and(|value| value == uuids),
        _ => value(name).is_some(),
    };
    let names = environment("", "", "").into_iter().map(|(name, _)| name).chain([KEY]);
    names.filter(is_ours).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request;

    #[test]
    fn a_key_is_a_plain_file_name() {
        for good in ["slurm:mini:15", "pbs:123[4].server", "lsf:77[3]", "a"] {
            assert_eq!(Key::parse(good).unwrap().as_str(), good);
        }
        let long = "x".repeat(129);
        for bad in ["", ".x", "..", "a/b", "a b", "ä", "a\nb", long.as_str()] {
            assert!(Key::parse(bad).is_err(), "{bad:?}");
        }
        assert_eq!(Key::of_slurm("mini", "15").unwrap().as_str(), "slurm:mini:15");
        assert!(Key::of_slurm("../x", "15").is_err());
    }

    #[test]
    fn only_what_we_have_set_is_taken_out_of_an_environment() {
        let of = |pairs: &[(&str, &str)]| {
            let pairs: Vec<(String, String)> = pairs.iter().map(|(a, b)| ((*a).into(), (*b).into())).collect();
            inherited(|name| pairs.iter().find(|(key, _)| key == name).map(|(_, value)| value.clone()))
        };
        assert!(of(&[("CUDA_VISIBLE_DEVICES", "0"), ("MIG_UUID", "MIG-1")]).is_empty());
        assert_eq!(
            of(&[
                ("CUDA_VISIBLE_DEVICES", "MIG-1"),
                ("NVIDIA_VISIBLE_DEVICES", "all"),
                ("MIG_UUID", "MIG-1"),
                ("MIG_LEASE", "t")
            ]),
            ["CUDA_VISIBLE_DEVICES", "MIG_UUID", "MIG_LEASE"]
        );
        assert_eq!(
            of(&[("MIG_UUID", "MIG-1"), ("MIG_LEASE", "t"), ("MIG_JOB", "k")]),
            ["MIG_UUID", "MIG_LEASE", "MIG_JOB"]
        );
    }

    #[test]
    fn what_a_job_has_is_compared_as_a_whole() {
        let part = |profile: &str, memory_mib| Part {
            uuid: "MIG-1".into(),
            profile: profile.into(),
            gpu: "GPU-1".into(),
            gpu_index: 0,
            memory_mib,
        };
        let job = Public {
            slices: vec![part("1g.10gb", 9728), part("2g.20gb", 19968)],
            ..Public::refused(&Key::parse("k").unwrap(), 0, None)
        };
        for (text, is_met) in [
            ("2g.20gb,1g.10gb", true),
            ("7g.80gb|1g.10gb,2g.20gb", true),
            ("1g.10gb", false),
            ("2x1g.10gb", false),
            ("1g.10gb,2g.20gb,1g.10gb", false),
        ] {
            assert_eq!(job.meets(&request::typed(text, None).unwrap()), is_met, "{text}");
        }
        assert!(job.meets(&request::typed("9GiB,9GiB", None).unwrap()));
        assert!(!job.meets(&request::typed("9GiB,29GiB", None).unwrap()));
    }
}
