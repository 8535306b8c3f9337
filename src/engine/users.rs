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
    /// A process that the driver lists in an instance, or that has one of its capabilities open: the driver may not destroy it.
    pub(super) fn of(&self, gpu: &str, gpu_minor: u32, instance: &Instance) -> Result<Option<u32>, Failure> {
        self.find(gpu, gpu_minor, instance, |_| true)
    }

    /// The same, but no agent: who only watches keeps nobody from being given it.
    pub(super) fn besides_agents(
        &self,
        gpu: &str,
        gpu_minor: u32,
        instance: &Instance,
    ) -> Result<Option<u32>, Failure> {
        self.find(gpu, gpu_minor, instance, |pid| !self.is_agent(pid))
    }

    fn find(
        &self,
        gpu: &str,
        gpu_minor: u32,
        instance: &Instance,
        counts: impl Fn(u32) -> bool,
    ) -> Result<Option<u32>, Failure> {
        if !self.listed.borrow().contains_key(gpu) {
            let listed = self.engine.gpu.processes(gpu)?;
            self.listed.borrow_mut().insert(gpu.to_owned(), listed);
        }
        let listed = self.listed.borrow();
        let mut inside = listed.get(gpu).into_iter().flatten().filter(|p| p.instance == Some(instance.id));
        if let Some(process) = inside.find(|process| counts(process.pid)) {
            return Ok(Some(process.pid));
        }
        // A capability without its /proc file is one that nobody can open.
        let host = &self.engine.host;
        let of_compute = |c: &ComputeInstance| host.compute_minor(gpu_minor, instance.id, c.id);
        let mut minors: BTreeSet<u32> = instance.compute.iter().flat_map(of_compute).collect();
        minors.extend(host.instance_minor(gpu_minor, instance.id));
        self.having_open(&minors, counts)
    }

    /// A process that counts and has one of these capabilities open.
    fn having_open(&self, minors: &BTreeSet<u32>, counts: impl Fn(u32) -> bool) -> Result<Option<u32>, Failure> {
        let open = match self.open.get() {
            Some(open) => open,
            None => {
                let caps = self.engine.host.majors()?.caps;
                self.open.get_or_init(|| host::openers_of(caps))
            }
        };
        let mut having = open.iter().filter(|(_, open)| !open.is_disjoint(minors)).map(|(pid, _)| *pid);
        Ok(having.find(|pid| counts(*pid)))
    }

    /// A process, but no agent, that has one of these capabilities open.
    pub(super) fn keeping_open(&self, minors: &BTreeSet<u32>) -> Result<Option<u32>, Failure> {
        self.having_open(minors, |pid| !self.is_agent(pid))
    }

    /// An agent that has a GPU open: a handle of one of its instances is not to be seen from outside, and the driver lists none
    /// (NVIDIA/DCGM#276, NVIDIA/go-nvml#146).
    pub(super) fn agent_on(&self, gpu_minor: u32) -> Result<Option<u32>, Failure> {
        let major = self.engine.host.known_majors()?.nvidia;
        Ok(host::holders_of(major, &BTreeSet::from([gpu_minor])).into_iter().find(|pid| self.is_agent(*pid)))
    }

    fn is_agent(&self, pid: u32) -> bool {
        host::is_agent(pid, &self.engine.settings.agents)
    }
}
