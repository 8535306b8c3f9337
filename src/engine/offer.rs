//! Slices that exist, offered by name: the CDI spec.

use std::path::Path;

use crate::cdi::{self, Claim, Offer, Spec};
use crate::cdi_file;
use crate::config::{self, Foreign};
use crate::edits::{self, Given, Node};
use crate::gpu::Device;
use crate::host::{Host, HostError, Majors};
use crate::injection::{self, Capabilities, Mount};
use crate::lease::{Lease, Slice, State};
use crate::store::Lock;

use super::{ACQUIRE_LOCK_WAIT, Engine, Failure, driver_files};

impl Engine<'_> {
    /// The CDI spec of the slices that a container may name; `None` when there is none. With a lease, of what that holds
    /// already: without hooks, since who uses it runs within that lease.
    pub fn cdi_spec(&self, lease: Option<&Lease>) -> Result<Option<Spec>, Failure> {
        let Some(lease) = lease else { return self.spec_of_slices(&self.managed_devices()?, &self.leases()?) };
        if lease.state != State::Active {
            return Err(Failure::Stale(format!("lease {} holds nothing that could be used", lease.token)));
        }
        let majors = self.host.majors()?;
        self.make_nodes(&lease.slices, majors);
        let nodes = nodes_of(&self.host, &lease.slices, majors);
        let (uuids, profiles) = (lease.uuids(), lease.profiles());
        let offer = Offer { name: &lease.token, nodes, uuids: &uuids, profiles: &profiles, claim: None };
        Ok(cdi::spec(&[offer], &self.settings.dev_root, self.driver_mounts()?))
    }

    /// What any container gets of the driver by a spec, which can't put a directory before others in a variable and does not
    /// know what the container says that it needs.
    fn driver_mounts(&self) -> Result<Vec<Mount>, Failure> {
        Ok(injection::outside_mounts(&driver_files(self.settings)?, &Capabilities::default()))
    }

    /// Makes that spec the content of a file, under the lock; removes the file when there is none. True when it is there.
    pub fn write_cdi_spec(&self, path: &Path, lease: Option<&Lease>) -> Result<bool, Failure> {
        let _lock = self.store.lock(ACQUIRE_LOCK_WAIT)?;
        write(path, self.cdi_spec(lease)?.as_ref())
    }

    /// Brings the file of the setting `cdi.spec` up to date, under the lock. Release need not: what a container's end
    /// destroys was never offered. A failure stops no container.
    pub(super) fn publish(&self, _lock: &Lock, devices: &[Device], leases: &[Lease]) {
        let Some(path) = &self.settings.cdi_spec else { return };
        let written = self.spec_of_slices(devices, leases).and_then(|spec| write(path, spec.as_ref()));
        if let Err(failure) = written {
            tracing::warn!("the CDI spec is not up to date: {failure}");
        }
    }

    fn spec_of_slices(&self, devices: &[Device], leases: &[Lease]) -> Result<Option<Spec>, Failure> {
        let slices = self.offered(devices, leases);
        if slices.is_empty() {
            return Ok(None);
        }
        let (majors, program) = (self.host.majors()?, config::hook_program()?);
        self.make_nodes(&slices, majors);
        let claim = Some(Claim { program: &program, config: self.settings.file.as_deref() });
        let offers = slices.iter().filter_map(|slice| {
            let uuid = slice.uuid.as_deref()?;
            let nodes = nodes_of(&self.host, std::slice::from_ref(slice), majors);
            Some(Offer { name: uuid, nodes, uuids: uuid, profiles: &slice.profile_name, claim })
        });
        Ok(cdi::spec(&offers.collect::<Vec<_>>(), &self.settings.dev_root, self.driver_mounts()?))
    }

    /// A spec names its nodes by number, so that most engines do without the host's: where they can't be made, it is true
    /// all the same.
    fn make_nodes(&self, slices: &[Slice], majors: Majors) {
        if let Err(error) = make_host_nodes(&self.host, slices, majors) {
            tracing::warn!("containers with a user namespace can't have what the CDI spec offers: {error}");
        }
    }

    /// The slices that a container may name, as `locate` would give them. Whether one is free is asked when it is taken:
    /// so a spec changes with the slices, not with every container, and a second container gets our reason, not the
    /// engine's "unresolvable".
    fn offered(&self, devices: &[Device], leases: &[Lease]) -> Vec<Slice> {
        let mut offered = Vec::new();
        for device in devices {
            for instance in &device.instances {
                let [compute] = instance.compute.as_slice() else { continue };
                let mut of_it = leases.iter().filter(|lease| lease.is_at(&device.uuid, instance));
                let kept = of_it.clone().any(|lease| lease.state == State::Static);
                let cut_for_one = of_it.any(|lease| lease.has_cut(&device.uuid, instance));
                if !kept && (cut_for_one || self.settings.foreign == Foreign::Refuse) {
                    continue;
                }
                let Some(mut slice) = Slice::located(device, instance, compute) else { continue };
                slice.gi_minor = self.host.instance_minor(device.minor, instance.id).ok();
                slice.ci_minor = self.host.compute_minor(device.minor, instance.id, compute.id).ok();
                // Without its /proc files it has gone since it was listed.
                if slice.gi_minor.is_some() && slice.ci_minor.is_some() {
                    offered.push(slice);
                }
            }
        }
        offered
    }
}

/// The nodes of some slices, with the modes of the host's.
pub fn nodes_of(host: &Host, slices: &[Slice], majors: Majors) -> Vec<Node> {
    let given = |s: &Slice| Some(Given { gpu_minor: s.gpu_minor, caps: [s.gi_minor?, s.ci_minor?] });
    let given: Vec<Given> = slices.iter().filter_map(given).collect();
    edits::nodes(&given, majors, |name, major, minor| host.node_mode(name, major, minor))
}

/// Makes those of the same nodes that the host lacks, for those who take them from there.
pub fn make_host_nodes(host: &Host, slices: &[Slice], majors: Majors) -> Result<(), HostError> {
    for node in nodes_of(host, slices, majors).iter().filter(|node| node.major != majors.caps) {
        host.make_device(&node.name, node.major, node.minor)?;
    }
    for slice in slices {
        if let (Some(gi), Some(ci)) = (slice.gi, slice.ci) {
            host.make_capability(majors.caps, slice.gpu_minor, gi, None)?;
            host.make_capability(majors.caps, slice.gpu_minor, gi, Some(ci))?;
        }
    }
    Ok(())
}

/// Has the devices of those slices found by their numbers: runc before 1.1.7 tells systemd only of what is in /dev/char, and
/// at the next daemon-reload systemd closes the rest (libcontainer/cgroups/systemd/common.go).
pub fn make_known_to_systemd(host: &Host, slices: &[Slice], majors: Majors) -> Result<(), HostError> {
    nodes_of(host, slices, majors).iter().try_for_each(|node| host.number_device(node.major, node.minor))
}

fn write(path: &Path, spec: Option<&Spec>) -> Result<bool, Failure> {
    let failed = |source| Failure::Spec { path: path.display().to_string(), source };
    let text = spec.map(Spec::text).transpose().map_err(|error| failed(error.into()))?;
    cdi_file::publish(path, text.as_deref(), cdi::is_ours).map_err(failed)?;
    Ok(text.is_some())
}
