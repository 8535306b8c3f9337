//! Who uses the instances of the GPUs: the processes that the driver lists, and those that have a capability open.

use std::cell::{OnceCell, RefCell};
use std::collections::{BTreeMap, BTreeSet};

use crate::gpu::{ComputeInstance, GpuProcess, Instance};
use crate::host;

use super::{Engine, Failure};

/// One look at it for any number of instances, taken when it is first asked: every open file of every process is looked at.
pub(super) struct Users<'e> {
    engine: &'e Engine<'e>,
    /// By GPU UUID.
    listed: RefCell<BTreeMap<String, Vec<GpuProcess>>>,
    /// Pids with the capability minors that they have open.
    open: OnceCell<Vec<(u32, BTreeSet<u32>)>>,
}

impl Engine<'_> {
    pub(super) fn users(&self) -> Users<'_> {
        Users { engine: self, listed: RefCell::default(), open: OnceCell::new() }
    }
}

impl Users<'_> {
    /// A process that the driver lists in an instance, or that has one of its capabilities open.
    pub(super) fn of(&self, gpu: &str, gpu_minor: u32, instance: &Instance) -> Result<Option<u32>, Failure> {
        if !self.listed.borrow().contains_key(gpu) {
            let listed = self.engine.gpu.processes(gpu)?;
            self.listed.borrow_mut().insert(gpu.to_owned(), listed);
        }
        let listed = self.listed.borrow();
        if let Some(process) = listed.get(gpu).into_iter().flatten().find(|p| p.instance == Some(instance.id)) {
            return Ok(Some(process.pid));
        }
        // A capability without its /proc file is one that nobody can open.
        let host = &self.engine.host;
        let of_compute = |c: &ComputeInstance| host.compute_minor(gpu_minor, instance.id, c.id);
        let mut minors: BTreeSet<u32> = instance.compute.iter().flat_map(of_compute).collect();
        minors.extend(host.instance_minor(gpu_minor, instance.id));
        self.having_open(&minors)
    }

    /// A process that has one of these capabilities open.
    pub(super) fn having_open(&self, minors: &BTreeSet<u32>) -> Result<Option<u32>, Failure> {
        let open = match self.open.get() {
            Some(open) => open,
            None => {
                let caps = self.engine.host.majors()?.caps;
                self.open.get_or_init(|| host::openers_of(caps))
            }
        };
        Ok(open.iter().find(|(_, open)| !open.is_disjoint(minors)).map(|(pid, _)| *pid))
    }
}
