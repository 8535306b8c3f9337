//! The life of the library in one process, and what every call needs.

use std::any::Any;
use std::ffi::c_uint;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::unistd::geteuid;

use crate::abi::{Handle, Target, library};
use crate::board::Board;
use crate::calls;
use crate::code::{Code, Outcome};
use crate::state::{Ci, Config, Gi, Gpu, State};
use crate::store::{Error, Machine, Pass, Snapshot};

#[derive(Debug)]
struct Session {
    users: u32,
    // Kept over nvmlShutdown: the machine is found once, whatever happens to the working directory.
    machine: Option<Arc<Machine>>,
    first: Option<Arc<Snapshot>>,
}

static SESSION: Mutex<Session> = Mutex::new(Session { users: 0, machine: None, first: None });

fn session() -> MutexGuard<'static, Session> {
    SESSION.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One call on its way.
#[derive(Debug)]
pub struct Call {
    machine: Arc<Machine>,
    first: Option<Arc<Snapshot>>,
    pass: Pass,
}

/// Runs the body of an exported call with these arguments.
pub fn call(name: &'static str, args: &[&dyn Any], body: impl FnOnce(&mut Call) -> Outcome<()>) -> c_uint {
    answer(attached().and_then(|(machine, first)| run(name, args, machine, first, body)))
}

/// Runs nvmlInit and its kin.
pub fn init(name: &'static str) -> c_uint {
    answer(machine().and_then(|machine| {
        run(name, &[], machine, None, |call| {
            let now = call.now()?;
            let mut session = session();
            if session.users == 0 {
                session.first = Some(now);
            }
            session.users += 1;
            Ok(())
        })
    }))
}

/// Ends what one nvmlInit began.
pub fn shutdown() -> Outcome<()> {
    let mut session = session();
    session.users = session.users.checked_sub(1).ok_or(Code::UNINITIALIZED)?;
    Ok(())
}

fn run(
    name: &'static str,
    args: &[&dyn Any],
    machine: Arc<Machine>,
    first: Option<Arc<Snapshot>>,
    body: impl FnOnce(&mut Call) -> Outcome<()>,
) -> Outcome<()> {
    let pass = machine.pass(name, calls::names, |state| calls::gpu_of(&machine.config, state, name, args))?;
    let mut call = Call { machine, first, pass };
    let outcome = body(&mut call);
    call.machine.leave(&call.pass);
    outcome
}

fn answer(outcome: Outcome<()>) -> c_uint {
    outcome.err().map_or(0, |code| code.0)
}

fn attached() -> Outcome<(Arc<Machine>, Option<Arc<Snapshot>>)> {
    let session = session();
    match &session.machine {
        Some(machine) if session.users > 0 => Ok((Arc::clone(machine), session.first.clone())),
        _ => Err(Code::UNINITIALIZED),
    }
}

fn machine() -> Outcome<Arc<Machine>> {
    let mut session = session();
    if let Some(machine) = &session.machine {
        return Ok(Arc::clone(machine));
    }
    let library = library().ok_or(Code::DRIVER_NOT_LOADED)?;
    let machine = Machine::of_library(&library).map_err(|error| match error {
        Error::Io(_, error) if error.kind() == io::ErrorKind::NotFound => Code::DRIVER_NOT_LOADED,
        error => error.into(),
    })?;
    Ok(Arc::clone(session.machine.insert(Arc::new(machine))))
}

/// A device handle, resolved.
#[derive(Clone, Copy, Debug)]
pub enum Device<'s> {
    /// A GPU.
    Gpu(usize),
    /// A MIG device.
    Mig(usize, &'s Gi, &'s Ci),
}

impl Device<'_> {
    /// NVML index of the GPU, or of the GPU of the MIG device.
    pub fn gpu(&self) -> usize {
        match self {
            Self::Gpu(gpu) | Self::Mig(gpu, ..) => *gpu,
        }
    }
}

impl Call {
    /// The fixed part of the machine.
    pub fn config(&self) -> &Config {
        &self.machine.config
    }

    /// The machine as this call finds it.
    pub fn now(&self) -> Outcome<Arc<Snapshot>> {
        self.machine.view(&self.pass)
    }

    /// The machine as nvmlInit found it, for the one enumeration that the driver is said to cache.
    pub fn for_enumeration(&self) -> Outcome<Arc<Snapshot>> {
        let now = self.now()?;
        match &self.first {
            Some(first) if now.plan.stale => Ok(Arc::clone(first)),
            _ => Ok(now),
        }
    }

    /// Refuses all but root, and those who can open the capability for configuring.
    pub fn privileged(&self) -> Outcome<()> {
        let root = geteuid().is_root() && self.machine.belongs_to_root();
        if root || self.machine.may_configure() { Ok(()) } else { Err(Code::NO_PERMISSION) }
    }

    /// The index of a GPU handle; anything else is refused.
    pub fn gpu(&self, handle: Handle) -> Outcome<usize> {
        match handle.target()? {
            Target::Gpu(gpu) if gpu < self.config().gpus.len() => Ok(gpu),
            _ => Err(Code::INVALID_ARGUMENT),
        }
    }

    /// The board of a GPU.
    pub fn board(&self, gpu: usize) -> Outcome<&Board> {
        self.config().board(gpu).ok_or(Code::INVALID_ARGUMENT)
    }

    /// A GPU or MIG device.
    pub fn device<'s>(&self, state: &'s State, handle: Handle) -> Outcome<Device<'s>> {
        match handle.target()? {
            Target::Ci { device: true, .. } => ci(state, handle, true).map(|(gpu, gi, ci)| Device::Mig(gpu, gi, ci)),
            _ => self.gpu(handle).map(Device::Gpu),
        }
    }

    /// Changes the machine.
    pub fn change<T>(&mut self, gpu: usize, edit: impl FnOnce(&Config, &mut State) -> Outcome<T>) -> Outcome<T> {
        self.machine.change_slowly(&mut self.pass, gpu, edit)
    }
}

/// The state of a GPU whose MIG mode is on.
pub fn mig_gpu(state: &State, gpu: usize) -> Outcome<&Gpu> {
    match state.gpus.get(gpu) {
        Some(gpu) if gpu.current => Ok(gpu),
        Some(_) => Err(Code::NOT_SUPPORTED),
        None => Err(Code::INVALID_ARGUMENT),
    }
}

/// The GPU instance of a handle that is not stale.
pub fn gi(state: &State, handle: Handle) -> Outcome<(usize, &Gi)> {
    let Target::Gi { gpu, gi, birth } = handle.target()? else { return Err(Code::INVALID_ARGUMENT) };
    let found = state.gpus.get(gpu).and_then(|gpu| gpu.gi(gi)).filter(|gi| gi.birth == birth);
    Ok((gpu, found.ok_or(Code::INVALID_ARGUMENT)?))
}

/// The compute instance of a handle that is not stale; `device` asks for MIG-device handles.
pub fn ci(state: &State, handle: Handle, device: bool) -> Outcome<(usize, &Gi, &Ci)> {
    match handle.target()? {
        Target::Ci { gpu, gi, ci, birth, device: given } if given == device => state
            .gpus
            .get(gpu)
            .and_then(|gpu| gpu.gi(gi))
            .and_then(|gi| gi.cis.iter().find(|known| known.id == ci && known.birth == birth).map(|ci| (gpu, gi, ci)))
            .ok_or(Code::INVALID_ARGUMENT),
        _ => Err(Code::INVALID_ARGUMENT),
    }
}

/// The handle of a GPU instance.
pub fn gi_handle(gpu: usize, gi: &Gi) -> Handle {
    Handle::of(Target::Gi { gpu, gi: gi.id, birth: gi.birth })
}

/// The handle of a compute instance, or of its MIG device.
pub fn ci_handle(gpu: usize, gi: &Gi, ci: &Ci, device: bool) -> Handle {
    Handle::of(Target::Ci { gpu, gi: gi.id, ci: ci.id, birth: ci.birth, device })
}

/// The MIG devices of a GPU in the order of their index.
pub fn mig_devices(gpu: &Gpu) -> impl Iterator<Item = (&Gi, &Ci)> {
    gpu.gis.iter().flat_map(|gi| gi.cis.iter().map(move |ci| (gi, ci)))
}
