//! MIG mode: never changed by a container's start, only by `migctl mode`.

use std::collections::BTreeSet;

use serde::Serialize;
use serde_json::json;

use crate::gpu::{Activation, Device, GpuError, MigMode};
use crate::host;
use crate::lease::Way;
use crate::store::Lock;

use super::{Engine, Failure, audit, new_holder};

/// What became of a change of the MIG mode.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Changed {
    /// It was so already; the driver was not asked.
    Already,
    /// It is in effect.
    Done,
    /// It waits for a reset of the GPU, or a reboot.
    Pending,
    /// Nothing has changed, or it stays pending, for the reason given: clients are in the way.
    InUse(Vec<Client>),
    /// The driver took it and did nothing, for the reason given.
    Refused(String),
}

/// A process that has a GPU open.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Client {
    /// Host pid.
    pub pid: u32,
    /// Its name.
    pub name: String,
}

impl Engine<'_> {
    /// Why the MIG mode of a GPU can't become that, if it can't: known without asking the driver to try.
    pub fn why_not_mode(&self, device: &Device, on: bool) -> Option<Failure> {
        if device.mig == MigMode::Unsupported {
            return Some(Failure::BadRequest(format!("{} has no MIG", device.label())));
        }
        if on || device.instances.is_empty() {
            return None;
        }
        let names: Vec<String> = device.instances.iter().map(|i| format!("{}/{}", device.index, i.id)).collect();
        Some(Failure::NoRoom(format!(
            "{} still has the GPU instances {}; migctl destroy --all --gpu {} takes them away",
            device.label(),
            names.join(", "),
            device.index
        )))
    }

    /// Turns the MIG mode of a GPU on or off. The driver's success says little: what counts is the mode read afterwards.
    pub fn set_mode(&self, gpu: &str, on: bool) -> Result<(Changed, Device), Failure> {
        self.set_mode_locked(&self.lock_for_change()?, gpu, on)
    }

    /// The same under a lock that is held already.
    pub(super) fn set_mode_locked(&self, _lock: &Lock, gpu: &str, on: bool) -> Result<(Changed, Device), Failure> {
        let device = self.read(gpu)?;
        if let Some(why) = self.why_not_mode(&device, on) {
            return Err(why);
        }
        let (wanted, pending) = match on {
            true => (MigMode::On, MigMode::EnablePending),
            false => (MigMode::Off, MigMode::DisablePending),
        };
        if device.mig == wanted {
            return Ok((Changed::Already, device));
        }
        let activation = match device.mig == pending {
            true => Activation::ResetRequired, // asked for before
            false => match self.gpu.set_mig_mode(gpu, on) {
                Err(GpuError::InUse { .. }) => Activation::InUse,
                activation => activation?,
            },
        };
        let before = device.mig;
        let device = self.read(gpu)?;
        let changed = match activation {
            _ if device.mig == wanted => Changed::Done,
            Activation::InUse => Changed::InUse(self.clients(&device)?),
            Activation::Other(why) if device.mig != pending => Changed::Refused(why),
            Activation::Other(_) | Activation::ResetRequired if device.mig == pending => Changed::Pending,
            Activation::Done | Activation::ResetRequired | Activation::Other(_) => {
                Changed::Refused("the driver called it done, and the mode is what it was".into())
            }
        };
        if device.mig != before {
            let what = json!({"gpu": gpu, "before": before, "after": device.mig});
            audit("mode", &new_holder(Way::Create, std::process::id()), what);
        }
        Ok((changed, device))
    }

    /// Processes that keep a GPU from a reset or a change of its mode: those that the driver lists, and those that have its
    /// node open (agents are not listed).
    pub fn clients(&self, device: &Device) -> Result<Vec<Client>, Failure> {
        let mut pids: BTreeSet<u32> =
            self.gpu.processes(&device.uuid)?.into_iter().map(|process| process.pid).collect();
        pids.extend(host::holders_of(self.host.majors()?.nvidia, &BTreeSet::from([device.minor])));
        pids.remove(&std::process::id());
        Ok(pids.into_iter().map(|pid| Client { pid, name: host::process_name(pid) }).collect())
    }

    fn read(&self, gpu: &str) -> Result<Device, Failure> {
        let found = self.managed_gpus()?.into_iter().find(|device| device.uuid == gpu);
        found.ok_or_else(|| Failure::BadRequest(format!("there is no GPU {gpu} any more")))
    }
}
