//! Cutting what a Pending lease plans: done by whoever has claimed the lease, without the lock where others may go on.

use std::collections::BTreeSet;

use crate::gpu::GpuError;
use crate::lease::{Lease, State, Step};
use crate::store::Claim;

use super::{Engine, Failure, on};

/// Why a lease was not cut.
pub(super) struct NotCut {
    /// The reason.
    pub failure: Failure,
    /// The GPU that is to blame, if one is.
    pub gpu: Option<String>,
}

impl From<Failure> for NotCut {
    fn from(failure: Failure) -> NotCut {
        NotCut { failure, gpu: None }
    }
}

impl Engine<'_> {
    /// Creates what a Pending lease plans, and learns its minors. Undoing what a failure leaves is the caller's.
    pub(super) fn cut(&self, claim: &Claim, lease: &mut Lease) -> Result<(), NotCut> {
        for at in 0..lease.slices.len() {
            let gpu = Some(lease.slices[at].gpu.clone());
            self.cut_one(claim, lease, at).map_err(|failure| NotCut { failure, gpu })?;
        }
        Ok(())
    }

    fn cut_one(&self, claim: &Claim, lease: &mut Lease, at: usize) -> Result<(), Failure> {
        let (gpu, minor) = (lease.slices[at].gpu.clone(), lease.slices[at].gpu_minor);
        if lease.slices[at].step != Step::Whole {
            let there = lease.slices[..=at].iter().filter(|s| s.shares(&lease.slices[at])).find_map(|s| s.gi);
            let gi = match there {
                Some(gi) => gi,
                None => self.cut_instance(claim, lease, at)?,
            };
            lease.slices[at].gi = Some(gi);
            lease.slices[at].step = Step::CreatingCompute;
            self.store.put_claimed(claim, lease)?;
            let compute = self.gpu.create_compute(&gpu, gi, lease.slices[at].compute_slices);
            let compute = compute.map_err(on(&lease.slices[at]))?;
            lease.slices[at].ci = Some(compute.id);
            lease.slices[at].uuid = Some(compute.uuid);
            lease.slices[at].step = Step::Whole;
        }
        let slice = &mut lease.slices[at];
        if let (Some(gi), Some(ci)) = (slice.gi, slice.ci) {
            slice.gi_minor = Some(self.host.instance_minor(minor, gi)?);
            slice.ci_minor = Some(self.host.compute_minor(minor, gi, ci)?);
        }
        Ok(())
    }

    pub(super) fn cut_instance(&self, claim: &Claim, lease: &mut Lease, at: usize) -> Result<u32, Failure> {
        lease.slices[at].step = Step::CreatingInstance;
        self.store.put_claimed(claim, lease)?;
        let slice = &lease.slices[at];
        let created = self.gpu.create_instance(&slice.gpu, slice.profile, slice.placement);
        if let Err(GpuError::NoRoom { .. } | GpuError::InUse { .. } | GpuError::NoPermission { .. }) = created {
            lease.slices[at].step = Step::Planned; // what is at that place now is a rival's, not ours to undo
        }
        Ok(created.map_err(on(&lease.slices[at]))?.id)
    }

    /// Refuses capability minors that still belong to somebody: the driver gives an id again as soon as its instance has gone,
    /// also where its last holder lives on.
    pub(super) fn check_minors(&self, lease: &Lease, others: &[Lease]) -> Result<(), Failure> {
        for slice in &lease.slices {
            // A kept slice has the same minors as the lease of whoever gets it.
            let others = others.iter().filter(|other| slice.ours || other.state != State::Static);
            let others = others.filter(|other| other.token != lease.token);
            let minors: BTreeSet<u32> = [slice.gi_minor, slice.ci_minor].into_iter().flatten().collect();
            for other in others {
                let Some(minor) = other.minors().find(|minor| minors.contains(minor)) else { continue };
                // Destroyed a moment ago by somebody who is about to record that.
                if other.state == State::Releasing && self.store.is_claimed(&other.token) && !self.held(other) {
                    continue;
                }
                return Err(Failure::NoRoom(format!("capability minor {minor} still belongs to another lease")));
            }
        }
        Ok(())
    }
}
