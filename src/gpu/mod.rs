//! What a partitionable accelerator offers and holds, in our words. No NVML type crosses this line.

use serde::{Deserialize, Serialize};

mod ffi;
pub mod nvml;

/// A window of memory slices on one GPU, in the driver's own units: eighths on most boards, quarters on an A30,
/// twelfths on an RTX PRO 6000. Never derived from an instance id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Placement {
    /// First memory slice.
    pub start: u32,
    /// Memory slices covered.
    pub size: u32,
}

impl Placement {
    /// What a user who may not ask knows of an existing instance. Covers nothing.
    pub const UNKNOWN: Placement = Placement { start: 0, size: 0 };

    /// The occupied slices as a bit mask, bit n for slice n.
    pub fn mask(self) -> u32 {
        let ones = if self.size >= 32 { u32::MAX } else { (1 << self.size) - 1 };
        ones.checked_shl(self.start).unwrap_or(0)
    }
}

impl std::fmt::Display for Placement {
    /// `4:4`, as `nvidia-smi mig -lgi` prints it: start, then size.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.start, self.size)
    }
}

/// The driver's profile id (`nvmlGpuInstanceProfileInfo_t.id`): what create and list calls take. Not the enum index.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(transparent)]
pub struct ProfileId(pub u32);

/// A GPU-instance profile that one GPU offers, as its driver reports it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Profile {
    /// The driver's id.
    pub id: ProfileId,
    /// `1g.10gb`, `1g.10gb+me`: without NVML's `MIG ` prefix.
    pub name: String,
    /// Compute slices (the `1` of `1g`).
    pub slices: u32,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Streaming multiprocessors.
    pub sms: u32,
    /// Engines beside them.
    pub engines: Engines,
    /// Whether its instances may reach other GPUs' memory (P2P).
    pub p2p: bool,
    /// How many may exist at once on this GPU (`instanceCount`).
    pub max_instances: u32,
    /// Every placement that this GPU allows for it, occupied or not, ascending by start.
    pub placements: Vec<Placement>,
}

/// A compute instance and the MIG device that it makes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ComputeInstance {
    /// Compute-instance id, unique in its GPU instance, reused.
    pub id: u32,
    /// Compute slices: fewer than its profile's where it shares the GPU instance (the `1c` of `1c.3g.40gb`).
    pub slices: u32,
    /// Streaming multiprocessors.
    pub sms: u32,
    /// `MIG-…`. Deterministic: a slice made again at the same place has the same UUID again.
    pub uuid: String,
}

/// A GPU instance that exists now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Instance {
    /// GPU-instance id, reused at once after a destroy.
    pub id: u32,
    /// The profile that it was made with.
    pub profile: ProfileId,
    /// Where it sits.
    pub placement: Placement,
    /// Its compute instances; empty for a half-made or half-destroyed slice.
    pub compute: Vec<ComputeInstance>,
}

/// MIG mode of a GPU: current and pending, read together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum MigMode {
    /// The board has no MIG.
    Unsupported,
    /// Off, and staying off.
    Off,
    /// On, and staying on.
    On,
    /// Off until the next GPU reset.
    EnablePending,
    /// On until the next GPU reset.
    DisablePending,
}

/// One GPU with what it offers and holds at the moment of reading.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    /// `GPU-…`.
    pub uuid: String,
    /// Product name, as `NVIDIA A100-SXM4-80GB`.
    pub name: String,
    /// NVML index. Not the minor.
    pub index: u32,
    /// The N of `/dev/nvidiaN`.
    pub minor: u32,
    /// `00000000:07:00.0`.
    pub pci_bus_id: String,
    /// PCI device id in the upper half, vendor's in the lower: `0x20B210DE` is an A100-SXM4-80GB.
    pub pci_device_id: u32,
    /// MIG mode now.
    pub mig: MigMode,
    /// Profiles offered; empty unless MIG is on.
    pub profiles: Vec<Profile>,
    /// GPU instances that exist, in id order; empty unless MIG is on.
    pub instances: Vec<Instance>,
}

impl Instance {
    /// Whether it is one slice: a single compute instance that has all of it. Only such a one is given to containers.
    pub fn is_whole(&self, profile: &Profile) -> bool {
        matches!(self.compute.as_slice(), [compute] if compute.slices == profile.slices)
    }
}

/// What became of a change of the MIG mode that the driver accepted (`activationStatus` of nvmlDeviceSetMigMode). Success
/// says little: the mode is what [`Gpu::devices`] reads afterwards.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Activation {
    /// It is in effect.
    Done,
    /// It waits for a reset of the GPU (Ampere).
    ResetRequired,
    /// Clients are in the way: a running CUDA program, a monitoring agent, an instance that exists.
    InUse,
    /// Anything else, in NVML's words.
    Other(String),
}

impl Device {
    /// The offered profile of that driver id.
    pub fn profile(&self, id: ProfileId) -> Option<&Profile> {
        self.profiles.iter().find(|p| p.id == id)
    }

    /// Whether the driver hides placements and instances from us: then we may not cut.
    pub fn is_closed(&self) -> bool {
        !self.profiles.is_empty() && self.profiles.iter().all(|p| p.placements.is_empty())
    }

    /// `GPU 0 (NVIDIA A100-SXM4-80GB)`, for messages.
    pub fn label(&self) -> String {
        format!("GPU {} ({})", self.index, self.name)
    }
}

/// A process that the driver lists on a GPU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GpuProcess {
    /// Host pid.
    pub pid: u32,
    /// GPU instance, when it runs in one.
    pub instance: Option<u32>,
    /// Compute instance in that GPU instance, when it runs in one.
    pub compute: Option<u32>,
    /// GPU memory that it uses, in MiB; `None` where the driver does not tell.
    pub memory_mib: Option<u64>,
}

/// A MIG device as every user may see it: no placement.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MigDevice {
    /// Its index on its GPU now, as `nvidia-smi` shows it. It changes when another device goes.
    pub index: u32,
    /// GPU instance.
    pub instance: u32,
    /// Compute instance in it.
    pub compute: u32,
    /// `MIG-…`.
    pub uuid: String,
    /// Profile of the compute instance: `1g.10gb`, or `1c.3g.40gb` where it has a part of its GPU instance only.
    pub profile: String,
}

/// What a GPU, or a MIG device, tells of itself at one moment. What driver or board do not tell is `None`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Reading {
    /// Memory in use, in MiB. A MIG device shares it with the other compute instances of its GPU instance.
    pub memory_used_mib: Option<u64>,
    /// Memory there is, in MiB.
    pub memory_total_mib: Option<u64>,
    /// Uncorrected ECC errors since the driver was loaded. Of a MIG device those of its SRAM (caches, registers) alone,
    /// and of a GPU with MIG on none: the driver counts no others.
    pub ecc_errors: Option<u64>,
    /// Whether ECC is on. Asked of whole GPUs only.
    pub ecc: Option<bool>,
    /// Whether the driver keeps the GPU awake while nobody uses it. Asked of whole GPUs only.
    pub persistence: Option<bool>,
    /// Multiprocessors, of MIG devices only.
    pub sms: Option<u32>,
    /// Engines, shared by the compute instances of a GPU instance; of MIG devices only.
    pub engines: Option<Engines>,
}

/// Engines of a slice beside its multiprocessors.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Engines {
    /// Copy engines (CE).
    pub copy: u32,
    /// Video decoders (NVDEC).
    pub decoders: u32,
    /// Video encoders (NVENC).
    pub encoders: u32,
    /// JPEG decoders (NVJPG).
    pub jpeg: u32,
    /// Optical-flow accelerators (OFA).
    pub ofa: u32,
}

/// A way to give a part of a GPU instance to a compute instance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Split {
    /// Compute slices (the `1` of `1c`).
    pub slices: u32,
    /// Streaming multiprocessors.
    pub sms: u32,
    /// How many such parts there may be in one GPU instance.
    pub max_instances: u32,
}

/// The performance counters of a GPU instance at one moment; two of them make a [`Utilisation`]. The driver's buffer is
/// freed with it.
#[derive(Debug)]
pub struct Sample<'gpu>(ffi::Sample<'gpu>);

/// How busy a GPU instance was between two samples, in percent of what it has.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Utilisation {
    /// Multiprocessors that were busy.
    pub sm: Option<f64>,
    /// Time in which any compute or graphics work ran.
    pub graphics: Option<f64>,
    /// Memory bandwidth used.
    pub dram: Option<f64>,
}

/// Why a driver call failed, as far as somebody branches on it.
#[derive(Debug, thiserror::Error)]
pub enum GpuError {
    /// The library could not be loaded or initialised.
    #[error(
        "cannot load the NVIDIA management library {path}: {reason}; is the driver installed and loaded? (setting driver.nvml names another file)"
    )]
    Library {
        /// The file that was tried.
        path: String,
        /// The loader's or driver's words.
        reason: String,
    },
    /// The driver is too old to export a function that we need.
    #[error("the NVIDIA driver {version} has no {symbol}; a driver of branch 535 or newer is needed")]
    Symbol {
        /// The missing function.
        symbol: &'static str,
        /// Driver version, or `unknown`.
        version: String,
    },
    /// NVML_ERROR_INSUFFICIENT_RESOURCES (23): the placement is taken or the profile's limit reached.
    #[error("{call}: no room (insufficient resources)")]
    NoRoom {
        /// The NVML function.
        call: &'static str,
    },
    /// A compute instance of a size that its GPU instance does not offer, with those that it does.
    #[error("{0}")]
    NotOffered(String),
    /// NVML_ERROR_IN_USE (19).
    #[error("{call}: in use by another client")]
    InUse {
        /// The NVML function.
        call: &'static str,
    },
    /// NVML_ERROR_NOT_FOUND (6).
    #[error("{call}: not found")]
    NotFound {
        /// The NVML function.
        call: &'static str,
    },
    /// NVML_ERROR_NO_PERMISSION (4).
    #[error("{call}: insufficient permissions; creating and destroying MIG slices needs root")]
    NoPermission {
        /// The NVML function.
        call: &'static str,
    },
    /// NVML_ERROR_GPU_IS_LOST (15).
    #[error("{call}: the GPU is lost; it needs a reset or a reboot")]
    Lost {
        /// The NVML function.
        call: &'static str,
    },
    /// NVML_ERROR_LIB_RM_VERSION_MISMATCH (18) at the start.
    #[error(
        "the NVIDIA driver was changed and not loaded again: {path} does not fit the kernel module; reboot, or stop what uses the \
         GPUs and run: modprobe -r nvidia_uvm nvidia_drm nvidia_modeset nvidia && modprobe nvidia"
    )]
    Changed {
        /// The library.
        path: String,
    },
    /// NVML_ERROR_RESET_REQUIRED (16).
    #[error("{call}: the GPU must be reset: end what runs on it, then run: nvidia-smi --gpu-reset")]
    ResetRequired {
        /// The NVML function.
        call: &'static str,
    },
    /// Anything else, with NVML's number and words.
    #[error("{call}: {text} (NVML error {code}); the driver may say more: dmesg | grep -i nvrm")]
    Driver {
        /// The NVML function.
        call: &'static str,
        /// `nvmlReturn_t`.
        code: u32,
        /// `nvmlErrorString`.
        text: String,
    },
}

/// The one door to the hardware. Every call names the GPU by UUID; ids are read again, never remembered across a destroy.
pub trait Gpu: std::fmt::Debug {
    /// Driver version, as `580.82.07`.
    fn driver_version(&self) -> Result<String, GpuError>;
    /// Every GPU, in PCI bus order, with offered profiles and existing instances.
    fn devices(&self) -> Result<Vec<Device>, GpuError>;
    /// The GPUs that the last `devices` had to leave out: index, and why.
    fn left_out(&self) -> Vec<(u32, String)>;
    /// GPU instances of one GPU now, in id order, half-made ones included.
    fn instances(&self, gpu: &str) -> Result<Vec<Instance>, GpuError>;
    /// One of them by its id; `None` where there is none.
    fn instance(&self, gpu: &str, id: u32) -> Result<Option<Instance>, GpuError>;
    /// The instance behind a MIG device, with the UUID of its GPU, as every user may ask: placed at [`Placement::UNKNOWN`].
    fn instance_of(&self, slice: &str) -> Result<Option<(String, Instance)>, GpuError>;
    /// Creates a GPU instance at exactly that placement. The answer has no compute instance yet.
    fn create_instance(&self, gpu: &str, profile: ProfileId, at: Placement) -> Result<Instance, GpuError>;
    /// Creates a compute instance of that many compute slices in a GPU instance; `None`: the one that has all of it.
    fn create_compute(&self, gpu: &str, instance: u32, slices: Option<u32>) -> Result<ComputeInstance, GpuError>;
    /// Destroys a compute instance.
    fn destroy_compute(&self, gpu: &str, instance: u32, compute: u32) -> Result<(), GpuError>;
    /// Destroys a GPU instance that has no compute instance left.
    fn destroy_instance(&self, gpu: &str, instance: u32) -> Result<(), GpuError>;
    /// Processes on a GPU: compute, graphics and MPS. An empty list does not prove that an instance can be destroyed.
    fn processes(&self, gpu: &str) -> Result<Vec<GpuProcess>, GpuError>;
    /// Asks for MIG mode on or off. Needs root, and no client on the GPU.
    fn set_mig_mode(&self, gpu: &str, on: bool) -> Result<Activation, GpuError>;
    /// The ways in which a GPU instance may be shared by compute instances, the largest first.
    fn splits(&self, gpu: &str, instance: u32) -> Result<Vec<Split>, GpuError>;
    /// MIG devices of one GPU in index order, as every user may list them; none where MIG is off or the driver too old.
    fn mig_devices(&self, gpu: &str) -> Result<Vec<MigDevice>, GpuError>;
    /// What the GPU or MIG device of that UUID tells of itself.
    fn reading(&self, uuid: &str) -> Result<Reading, GpuError>;
    /// The counters of a GPU instance now; `None` where there are none to read: before Hopper, with an older driver, or
    /// without permission. Keep it, and take the next one at least 100 ms later.
    fn sample(&self, gpu: &str, instance: u32) -> Result<Option<Sample<'_>>, GpuError>;
    /// What happened between two samples of one GPU instance.
    fn utilisation(&self, before: &Sample<'_>, after: &Sample<'_>) -> Result<Utilisation, GpuError>;
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A GPU with MIG on that offers and holds nothing.
    pub(crate) fn device(index: u32) -> Device {
        Device {
            uuid: format!("GPU-{index}"),
            name: "A100".into(),
            index,
            minor: index,
            pci_bus_id: format!("00000000:{index:02X}:00.0"),
            pci_device_id: 0x20b2_10de,
            mig: MigMode::On,
            profiles: Vec::new(),
            instances: Vec::new(),
        }
    }
}
