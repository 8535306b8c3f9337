//! What a simulated machine is made of (fixed) and what happens to it (changing).

use serde::{Deserialize, Serialize};
use sha1::{Digest, Sha1};

use crate::board::{Board, Span};

/// Which GPU-instance id lies at which placement; it differs from chip to chip.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum IdMap {
    /// The lower half carries the lower ids.
    #[default]
    Canonical,
    /// The upper half carries the lower ids.
    Mirrored,
}

/// How MIG devices are named.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum UuidFormat {
    /// R470 and later: `MIG-xxxxxxxx-xxxx-5xxx-xxxx-xxxxxxxxxxxx`.
    #[default]
    New,
    /// Before R470: `MIG-GPU-…/gi/ci`.
    Old,
}

/// Whether the library resets an idle Ampere GPU by itself to bring a new mode into effect.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AmpereReset {
    /// The mode stays pending until `nvml-sim reset`.
    #[default]
    Manual,
    /// An idle GPU is reset at once.
    Auto,
}

/// The character-device majors of the machine.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Majors {
    /// `nvidia`, always 195.
    pub nvidia: u32,
    /// `nvidia-caps`
    pub caps: u32,
    /// `nvidia-uvm`
    pub uvm: u32,
    /// `nvidia-nvlink`
    pub nvlink: u32,
}

/// The fixed part of one GPU.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct GpuConfig {
    /// Place of its board in [`Config::boards`].
    pub board: usize,
    /// `GPU-…`
    pub uuid: String,
    /// The N of `/dev/nvidiaN`; need not equal the NVML index.
    pub minor: u32,
    /// PCI bus number, in domain 0.
    pub bus: u32,
    /// Board serial number.
    pub serial: String,
    /// Which ids its placements carry.
    pub id_map: IdMap,
}

impl GpuConfig {
    /// As NVML says it: `00000000:07:00.0`.
    pub fn bus_id(&self) -> String {
        format!("00000000:{:02X}:00.0", self.bus)
    }

    /// As the kernel says it: `0000:07:00.0`.
    pub fn kernel_bus_id(&self) -> String {
        format!("0000:{:02x}:00.0", self.bus)
    }
}

/// The fixed part of a machine, written once by `nvml-sim create`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Config {
    /// The driver root, relative to the directory of the library.
    pub root: String,
    /// For example `580.95.05`.
    pub driver_version: String,
    /// For example 13000.
    pub cuda_version: i32,
    /// How MIG devices are named.
    pub uuid_format: UuidFormat,
    /// Ampere mode switching.
    pub ampere_reset: AmpereReset,
    /// Device majors.
    pub majors: Majors,
    /// The boards in use.
    pub boards: Vec<Board>,
    /// In NVML index order.
    pub gpus: Vec<GpuConfig>,
    /// The library of a driver tree, from the root, and its size without what is shown behind it.
    #[serde(default)]
    pub window: Option<(String, u64)>,
}

impl Config {
    /// The board of a GPU, by NVML index.
    pub fn board(&self, gpu: usize) -> Option<&Board> {
        self.boards.get(self.gpus.get(gpu)?.board)
    }

    /// The UUID of the MIG device of a compute instance. It depends on nothing but its position, so a
    /// destroyed and re-created instance has the same one, as with the real driver.
    pub fn mig_uuid(&self, gpu: usize, gi: u32, ci: u32) -> String {
        let parent = self.gpus.get(gpu).map_or("", |gpu| gpu.uuid.as_str());
        match self.uuid_format {
            UuidFormat::New => format!("MIG-{}", uuid5(&format!("{parent}/SMC/{gi}/{ci}"))),
            UuidFormat::Old => old_mig_uuid(parent, gi, ci),
        }
    }

    /// The form before R470, which newer drivers still accept.
    pub fn old_mig_uuid(&self, gpu: usize, gi: u32, ci: u32) -> String {
        old_mig_uuid(self.gpus.get(gpu).map_or("", |gpu| gpu.uuid.as_str()), gi, ci)
    }
}

fn old_mig_uuid(parent: &str, gi: u32, ci: u32) -> String {
    format!("MIG-{parent}/{gi}/{ci}")
}

/// A UUID of RFC 4122 version-5 shape over `text`.
pub fn uuid5(text: &str) -> String {
    let mut hex: Vec<char> = Sha1::digest(text.as_bytes())
        .iter()
        .take(16)
        .flat_map(|b| format!("{b:02x}").chars().collect::<Vec<_>>())
        .collect();
    hex[12] = '5';
    hex[16] = ['8', '9', 'a', 'b'][hex[16].to_digit(16).unwrap_or(0) as usize & 3];
    let part = |from: usize, to: usize| hex[from..to].iter().collect::<String>();
    [part(0, 8), part(8, 12), part(12, 16), part(16, 20), part(20, 32)].join("-")
}

/// Minor of the capability node of a GPU instance.
pub fn gi_cap_minor(gpu_minor: u32, gi: u32) -> u32 {
    3 + 135 * gpu_minor + 9 * gi
}

/// Minor of the capability node of a compute instance.
pub fn ci_cap_minor(gpu_minor: u32, gi: u32, ci: u32) -> u32 {
    gi_cap_minor(gpu_minor, gi) + 1 + ci
}

/// What a GPU or an instance is said to be doing. Instances that go take it with them.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Load {
    /// Memory in use, in MiB.
    pub memory_mib: u64,
    /// Percent of the multiprocessors that are busy.
    pub sm: u32,
    /// Percent of the memory bandwidth.
    pub dram: u32,
    /// Uncorrected volatile errors of its SRAM.
    pub ecc: u64,
}

/// A compute instance.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Ci {
    /// 0 to 7, lowest free first.
    pub id: u32,
    /// Driver profile id.
    pub profile: u32,
    /// Compute slices within the GPU instance.
    pub span: Span,
    /// Tells it from its predecessors at the same place.
    pub birth: u32,
    /// What it is doing.
    #[serde(default)]
    pub load: Load,
}

/// A GPU instance.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Gi {
    /// Encodes size and position.
    pub id: u32,
    /// Driver profile id.
    pub profile: u32,
    /// Memory slices of the GPU.
    pub span: Span,
    /// Tells it from its predecessors at the same place.
    pub birth: u32,
    /// Its compute instances, by id.
    pub cis: Vec<Ci>,
    /// What it is doing beside them.
    #[serde(default)]
    pub load: Load,
}

/// The changing part of one GPU.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Gpu {
    /// MIG is on.
    pub current: bool,
    /// MIG will be on after the next reset.
    pub pending: bool,
    /// Its GPU instances, by id.
    pub gis: Vec<Gi>,
    /// Persistence mode.
    #[serde(default = "on")]
    pub persistence: bool,
    /// What it is doing beside them.
    #[serde(default)]
    pub load: Load,
}

fn on() -> bool {
    true
}

impl Gpu {
    /// A GPU without instances.
    pub fn new(mig: bool) -> Self {
        Self { current: mig, pending: mig, gis: Vec::new(), persistence: true, load: Load::default() }
    }

    /// The GPU instance with this id.
    pub fn gi(&self, id: u32) -> Option<&Gi> {
        self.gis.iter().find(|gi| gi.id == id)
    }
}

/// A client that keeps a GPU or an instance busy.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Hold {
    /// NVML index.
    pub gpu: usize,
    /// The whole GPU when absent.
    pub gi: Option<u32>,
    /// Not listed as a process when absent.
    pub pid: Option<u32>,
    /// Memory of that process in MiB; a 64th of the GPU's when absent.
    #[serde(default)]
    pub memory_mib: Option<u64>,
}

/// The changing part of a machine.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct State {
    /// Number of instances ever created.
    pub births: u32,
    /// In NVML index order.
    pub gpus: Vec<Gpu>,
    /// Clients.
    pub holds: Vec<Hold>,
}

impl State {
    /// Whether a client has this GPU instance open.
    pub fn held(&self, gpu: usize, gi: u32) -> bool {
        self.holds.iter().any(|hold| hold.gpu == gpu && hold.gi == Some(gi))
    }

    /// Whether a client runs on the GPU as a whole.
    pub fn held_whole(&self, gpu: usize) -> bool {
        self.holds.iter().any(|hold| hold.gpu == gpu && hold.gi.is_none())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uuid_has_the_shape_of_version_5() {
        let uuid = uuid5("GPU-1/SMC/7/0");
        assert_eq!(uuid.len(), 36);
        assert_eq!(uuid.as_bytes()[14], b'5');
        assert!(matches!(uuid.as_bytes()[19], b'8' | b'9' | b'a' | b'b'));
        assert_eq!(uuid, uuid5("GPU-1/SMC/7/0"));
        assert_ne!(uuid, uuid5("GPU-1/SMC/8/0"));
    }

    #[test]
    fn capability_minors_follow_the_published_rule() {
        assert_eq!(gi_cap_minor(0, 1), 12);
        assert_eq!([0, 1, 2].map(|ci| ci_cap_minor(0, 1, ci)), [13, 14, 15]);
        assert_eq!(ci_cap_minor(31, 14, 7), 4322);
    }
}
