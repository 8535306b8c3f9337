//! How people name GPUs, slices and users on a command line, and a GPU instance as documents and texts show it.

use anyhow::{Result, bail};
use nix::unistd::User;
use serde::Serialize;

use crate::engine::Failure;
use crate::gpu::{Device, Instance};
use crate::lease::Slice;
use crate::profile;
use crate::report::Misused;
use crate::request::GpuSelector;

/// The GPU of that name.
pub(super) fn find_gpu<'a>(devices: &'a [Device], wanted: &GpuSelector) -> Result<&'a Device> {
    let Some(device) = devices.iter().find(|device| wanted.matches(device)) else {
        let there: Vec<String> = devices.iter().map(|d| format!("{} {}", d.label(), d.uuid)).collect();
        bail!(Failure::BadRequest(format!("there is no GPU {wanted}; there are {}", there.join(", "))));
    };
    Ok(device)
}

/// The GPUs of those names, each once; `all` is every one.
pub(super) fn find_gpus<'a>(devices: &'a [Device], names: &[String]) -> Result<Vec<&'a Device>> {
    let mut found: Vec<&Device> = Vec::new();
    for name in names {
        let named = match name.as_str() {
            "all" => devices.iter().collect(),
            name => {
                vec![find_gpu(devices, &super::gpu_selector(name).map_err(|why| Misused(format!("{name}: {why}")))?)?]
            }
        };
        found.extend(named);
    }
    found.sort_by_key(|device| device.index);
    found.dedup_by_key(|device| device.index);
    Ok(found)
}

/// A user by number, or by name as this machine knows it.
pub(super) fn user(text: &str) -> Result<u32, String> {
    if let Ok(uid) = text.parse() {
        return Ok(uid);
    }
    match User::from_name(text) {
        Ok(Some(user)) => Ok(user.uid.as_raw()),
        Ok(None) => Err("there is no such user here; a number will do".into()),
        Err(error) => Err(format!("cannot look the user up: {error}")),
    }
}

/// What a name of a slice means.
#[derive(Debug, Clone, Copy)]
pub(super) struct Found<'a> {
    pub(super) device: &'a Device,
    pub(super) instance: &'a Instance,
    /// The compute instance that was named, where it is one of several.
    pub(super) compute: Option<u32>,
}

/// Every slice on a GPU, or on all of them.
pub(super) fn every_slice<'a>(devices: &'a [Device], gpu: Option<&GpuSelector>) -> Result<Vec<Found<'a>>> {
    let devices: Vec<&Device> = match gpu {
        Some(gpu) => vec![find_gpu(devices, gpu)?],
        None => devices.iter().collect(),
    };
    let of =
        |device: &'a Device| device.instances.iter().map(move |instance| Found { device, instance, compute: None });
    Ok(devices.into_iter().flat_map(of).collect())
}

/// Whether a text names a slice that exists, rather than one that is wanted.
pub(super) fn is_existing(text: &str) -> bool {
    text.starts_with("MIG-") || text.contains('/') || text.bytes().all(|b| b.is_ascii_digit())
}

/// The slice of that name: `MIG-…`, `GPU/GI`, `GPU/GI/CI`, or `GI` beside the GPU.
pub(super) fn find_slice<'a>(devices: &'a [Device], name: &str, on: Option<&GpuSelector>) -> Result<Found<'a>> {
    let on = on.map(|wanted| find_gpu(devices, wanted)).transpose()?;
    if name.starts_with("MIG-") {
        return find_uuid(devices, name);
    }
    let wrong = || {
        Misused(format!(
            "'{name}' names no slice; write GPU/GI (0/7), GPU/GI/CI (0/7/1), GI beside --gpu, or MIG-…, as migctl list \
             shows them"
        ))
    };
    let number = |text: &str| text.parse::<u32>().map_err(|_| wrong());
    let parts: Vec<&str> = name.split('/').collect();
    let (device, gi, ci) = match (parts.as_slice(), on) {
        ([gi], Some(device)) => (device, number(gi)?, None),
        ([gi], None) => {
            number(gi)?;
            bail!(Misused(format!(
                "{name} is a GPU instance of which GPU? Write GPU/{name}, as 0/{name}, or add --gpu"
            )))
        }
        ([at, gi, rest @ ..], _) if rest.len() < 2 => {
            let device = find_gpu(devices, &super::gpu_selector(at).map_err(|_| wrong())?)?;
            if on.is_some_and(|on| on.uuid != device.uuid) {
                bail!(Misused(format!("{name} is on {}, not on the GPU of --gpu", device.label())));
            }
            (device, number(gi)?, rest.first().map(|ci| number(ci)).transpose()?)
        }
        _ => bail!(wrong()),
    };
    let Some(instance) = device.instances.iter().find(|instance| instance.id == gi) else {
        let there: Vec<String> = device.instances.iter().map(|i| format!("{}/{}", device.index, i.id)).collect();
        let there = if there.is_empty() { "none".to_owned() } else { there.join(", ") };
        bail!(Failure::BadRequest(format!("{} has no GPU instance {gi}; it has {there}", device.label())));
    };
    if let Some(ci) = ci.filter(|ci| instance.compute.iter().all(|c| c.id != *ci)) {
        bail!(Failure::BadRequest(format!("GPU instance {}/{gi} has no compute instance {ci}", device.index)));
    }
    Ok(Found { device, instance, compute: ci.filter(|_| instance.compute.len() > 1) })
}

fn find_uuid<'a>(devices: &'a [Device], uuid: &str) -> Result<Found<'a>> {
    for device in devices {
        for instance in &device.instances {
            if let Some(compute) = instance.compute.iter().find(|c| c.uuid.eq_ignore_ascii_case(uuid)) {
                let compute = Some(compute.id).filter(|_| instance.compute.len() > 1);
                return Ok(Found { device, instance, compute });
            }
        }
    }
    bail!(Failure::BadRequest(format!("there is no MIG slice {uuid}; migctl list shows those that are there")))
}

/// A GPU, and what the verb says of it.
#[derive(Debug, Clone, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(super) struct Named {
    /// NVML index.
    pub(super) index: u32,
    /// `GPU-…`.
    uuid: String,
    /// Product name.
    name: String,
}

impl Named {
    pub(super) fn of(device: &Device) -> Named {
        Named { index: device.index, uuid: device.uuid.clone(), name: device.name.clone() }
    }

    /// `GPU 0 (NVIDIA A100-SXM4-80GB)`, for messages.
    pub(super) fn label(&self) -> String {
        format!("GPU {} ({})", self.index, self.name)
    }
}

/// A GPU instance in the documents of the verbs that change one.
#[derive(Debug, Clone, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(super) struct Shown {
    /// NVML index of its GPU.
    pub(super) gpu_index: u32,
    /// `GPU-…`.
    pub(super) gpu: String,
    /// GPU-instance id; null for one that is not there yet.
    pub(super) gi: Option<u32>,
    /// Profile of the GPU instance.
    pub(super) profile: String,
    /// First memory slice.
    pub(super) start: u32,
    /// Memory slices.
    pub(super) size: u32,
    /// Of the profile.
    pub(super) memory_mib: u64,
    /// Its compute instances: one where it is whole.
    pub(super) devices: Vec<MigDevice>,
}

/// A compute instance, which is one MIG device.
#[derive(Debug, Clone, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(super) struct MigDevice {
    /// Compute-instance id; null for one that is not there yet.
    pub(super) ci: Option<u32>,
    /// `1g.10gb`, or `1c.3g.40gb` for one that shares its GPU instance.
    pub(super) profile: String,
    /// `MIG-…`; null for one that is not there yet.
    pub(super) uuid: Option<String>,
}

impl Shown {
    /// The GPU instance of a record's slices; `None` of none.
    pub(super) fn of_slices(slices: &[Slice]) -> Option<Shown> {
        let first = slices.first()?;
        let whole = profile::split_compute(&first.profile_name).map_or(first.profile_name.as_str(), |(_, whole)| whole);
        let device = |s: &Slice| MigDevice { ci: s.ci, profile: s.profile_name.clone(), uuid: s.uuid.clone() };
        Some(Shown {
            gpu_index: first.gpu_index,
            gpu: first.gpu.clone(),
            gi: first.gi,
            profile: whole.to_owned(),
            start: first.placement.start,
            size: first.placement.size,
            memory_mib: first.memory_mib,
            devices: slices.iter().map(device).collect(),
        })
    }

    /// A GPU instance as the driver reports it.
    pub(super) fn of_instance(device: &Device, instance: &Instance) -> Shown {
        let offered = device.profile(instance.profile);
        let name = offered.map_or_else(|| format!("profile {}", instance.profile.0), |p| p.name.clone());
        let devices = instance.compute.iter().map(|c| MigDevice {
            ci: Some(c.id),
            profile: offered.map_or_else(|| name.clone(), |p| profile::device_name(p, c)),
            uuid: Some(c.uuid.clone()),
        });
        Shown {
            gpu_index: device.index,
            gpu: device.uuid.clone(),
            gi: Some(instance.id),
            devices: devices.collect(),
            profile: name,
            start: instance.placement.start,
            size: instance.placement.size,
            memory_mib: offered.map_or(0, |p| p.memory_mib),
        }
    }

    /// `0/7`; `GPU 0` for one that is not there yet.
    pub(super) fn id(&self) -> String {
        self.gi.map_or_else(|| format!("GPU {}", self.gpu_index), |gi| format!("{}/{gi}", self.gpu_index))
    }

    /// A row for each MIG device, or one without.
    pub(super) fn rows(&self) -> Vec<Vec<String>> {
        let row = |id: String, profile: &str, uuid: Option<&str>| {
            let at = format!("at {}:{}", self.start, self.size);
            vec![format!("  {id}"), profile.to_owned(), at, uuid.unwrap_or_default().to_owned()]
        };
        match self.devices.as_slice() {
            [] => vec![row(self.id(), &self.profile, None)],
            [one] => vec![row(self.id(), &one.profile, one.uuid.as_deref())],
            several => several
                .iter()
                .map(|d| {
                    let id = d.ci.map_or_else(|| self.id(), |ci| format!("{}/{ci}", self.id()));
                    row(id, &d.profile, d.uuid.as_deref())
                })
                .collect(),
        }
    }

    /// The UUID of the only MIG device, where it has all of the GPU instance: what a container can be given.
    pub(super) fn whole(&self) -> Option<&str> {
        match self.devices.as_slice() {
            [one] => one.uuid.as_deref().filter(|_| one.profile == self.profile),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::{ComputeInstance, Placement, ProfileId};

    fn devices() -> Vec<Device> {
        let compute = |id, uuid: &str| ComputeInstance { id, slices: 1, sms: 14, uuid: uuid.into() };
        let instance =
            |id, compute| Instance { id, profile: ProfileId(9), placement: Placement { start: 0, size: 4 }, compute };
        let device = |index: u32, instances| Device {
            uuid: format!("GPU-0000000{index}-0000-0000-0000-000000000000"),
            instances,
            ..crate::gpu::tests::device(index)
        };
        vec![
            device(0, vec![instance(1, vec![compute(0, "MIG-a")])]),
            device(1, vec![instance(1, vec![compute(0, "MIG-b"), compute(1, "MIG-c")]), instance(2, vec![])]),
        ]
    }

    fn found(name: &str, on: Option<&str>) -> Result<(u32, u32, Option<u32>), String> {
        let devices = devices();
        let on = on.map(|on| crate::cli::gpu_selector(on).unwrap());
        find_slice(&devices, name, on.as_ref())
            .map(|f| (f.device.index, f.instance.id, f.compute))
            .map_err(|error| error.to_string())
    }

    #[test]
    fn every_way_to_name_a_slice() {
        assert_eq!(found("0/1", None), Ok((0, 1, None)));
        assert_eq!(found("1", Some("0")), Ok((0, 1, None)));
        assert_eq!(found("GPU-00000001-0000-0000-0000-000000000000/2", None), Ok((1, 2, None)));
        assert_eq!(found("01:00.0/1/1", None), Ok((1, 1, Some(1))));
        assert_eq!(found("0/1/0", None), Ok((0, 1, None)), "the only compute instance is the whole");
        assert_eq!(found("mig-a".to_uppercase().as_str(), None), Ok((0, 1, None)));
        assert_eq!(found("MIG-c", None), Ok((1, 1, Some(1))));
    }

    #[test]
    fn a_name_of_nothing_tells_what_there_is() {
        for (name, on, said) in [
            ("7", None, "of which GPU"),
            ("0/9", None, "it has 0/1"),
            ("9/1", None, "there is no GPU 9; there are GPU 0"),
            ("1/1/7", None, "no compute instance 7"),
            ("1/1", Some("0"), "not on the GPU of --gpu"),
            ("MIG-x", None, "there is no MIG slice MIG-x"),
            ("0/1/2/3", None, "names no slice"),
            ("x", None, "names no slice"),
        ] {
            let error = found(name, on).unwrap_err();
            assert!(error.contains(said), "{name}: {error}");
        }
    }

    #[test]
    fn gpus_by_name_and_all_of_them_once() {
        let devices = devices();
        let indices = |names: &[&str]| {
            let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
            find_gpus(&devices, &names).map(|found| found.iter().map(|d| d.index).collect::<Vec<_>>())
        };
        assert_eq!(indices(&["1", "all", "0"]).unwrap(), [0, 1]);
        assert!(indices(&["x"]).unwrap_err().to_string().contains("by its index"));
    }
}
