//! What a GPU model offers: its profiles, placements and numbers.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A run of slices, in the unit that the driver counts in.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Span {
    /// First slice.
    pub start: u32,
    /// Number of slices.
    pub size: u32,
}

impl Span {
    /// Whether the two share a slice.
    pub fn overlaps(self, other: Self) -> bool {
        self.start < other.start + other.size && other.start < self.start + self.size
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.start, self.size)
    }
}

/// When a new MIG mode takes effect, and how long it lasts.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ModeRule {
    /// Ampere: pending until a GPU reset, kept in the InfoROM.
    ResetPersistent,
    /// Hopper and later: at once, lost with the kernel modules.
    Immediate,
}

/// Media engines.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Engines {
    /// NVDEC.
    pub decoders: u32,
    /// NVENC.
    pub encoders: u32,
    /// NVJPG.
    pub jpeg: u32,
    /// Optical flow.
    pub ofa: u32,
}

impl Engines {
    /// The sum of both.
    pub fn plus(self, other: Self) -> Self {
        Self {
            decoders: self.decoders + other.decoders,
            encoders: self.encoders + other.encoders,
            jpeg: self.jpeg + other.jpeg,
            ofa: self.ofa + other.ofa,
        }
    }

    /// Whether `all` holds at least these.
    pub fn fit(self, all: Self) -> bool {
        self.decoders <= all.decoders && self.encoders <= all.encoders && self.jpeg <= all.jpeg && self.ofa <= all.ofa
    }
}

/// A compute-instance profile within one GPU-instance profile.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CiProfile {
    /// Driver id, which for compute instances equals the enum index.
    pub id: u32,
    /// `NVML_COMPUTE_INSTANCE_PROFILE_*`.
    pub index: u32,
    /// For example `1c.3g.40gb`.
    pub name: String,
    /// Compute slices.
    pub slices: u32,
    /// Streaming multiprocessors.
    pub sm: u32,
    /// How many fit an empty GPU instance.
    pub count: u32,
    /// Where it may lie, in compute slices.
    pub placements: Vec<Span>,
}

/// A GPU-instance profile whose numbers are all known.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GiProfile {
    /// Driver id: what create, placement and list calls take.
    pub id: u32,
    /// `NVML_GPU_INSTANCE_PROFILE_*`: what the profile-info calls take.
    pub index: u32,
    /// For example `1g.10gb+me`.
    pub name: String,
    /// Compute slices.
    pub slices: u32,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Streaming multiprocessors.
    pub sm: u32,
    /// Copy engines.
    pub copy_engines: u32,
    /// Media engines.
    pub engines: Engines,
    /// How many fit an empty GPU.
    pub count: u32,
    /// Whether instances may use peer-to-peer.
    pub p2p: bool,
    /// Where it may lie, in memory slices.
    pub placements: Vec<Span>,
    /// Its compute-instance profiles.
    pub compute: Vec<CiProfile>,
}

impl GiProfile {
    /// The compute-instance profile that takes the whole GPU instance.
    pub fn whole(&self) -> Option<&CiProfile> {
        self.compute.iter().filter(|ci| ci.slices == self.slices).max_by_key(|ci| ci.sm)
    }
}

/// A profile that a board is known to have but whose numbers nobody has published.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Unsourced {
    /// Driver id.
    pub id: u32,
    /// `NVML_GPU_INSTANCE_PROFILE_*`.
    pub index: u32,
    /// For example `7g.180gb`.
    pub name: String,
}

/// What a whole board is built for, as its data sheet and nvidia-smi say it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Figures {
    /// CUDA cores.
    pub cores: u32,
    /// Width of the memory interface.
    pub memory_bus_bits: u32,
    /// PCI Express.
    pub pcie_generation: u32,
    /// Highest clock of the multiprocessors.
    pub max_sm_mhz: u32,
    /// Clock of the multiprocessors while nothing runs: the lowest.
    pub idle_sm_mhz: u32,
    /// Clock of the memory: it has one.
    pub memory_mhz: u32,
    /// Clocks of the video engines, while nothing runs and highest; unknown where nobody has published them.
    #[serde(default)]
    pub video_mhz: Option<(u32, u32)>,
    /// Lowest power limit that can be set.
    pub min_watts: u32,
    /// Highest power limit, and the default.
    pub max_watts: u32,
}

/// A GPU model.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Board {
    /// For example `a100-sxm4-80gb`.
    pub key: String,
    /// As `nvmlDeviceGetName` says it.
    pub name: String,
    /// For example `Hopper`.
    pub architecture: String,
    /// CUDA compute capability, major and minor.
    pub compute_capability: (i32, i32),
    /// Device id in the high half, vendor id in the low half.
    pub pci_device_id: u32,
    /// Memory in MiB; nominal where no capture shows it.
    pub memory_mib: u64,
    /// Positions on the placement axis: 8, 4 or 12.
    pub grid: u32,
    /// `nvmlDeviceGetMaxMigDeviceCount` with MIG on.
    pub max_mig_devices: u32,
    /// How the mode switches.
    pub mode: ModeRule,
    /// Figures of the whole board; unknown where nobody has published them.
    #[serde(default)]
    pub figures: Option<Figures>,
    /// Media engines that the instances share out; unknown where the full-size profile is unsourced.
    pub engines: Option<Engines>,
    /// Usable profiles.
    pub profiles: Vec<GiProfile>,
    /// Profiles that exist but answer `NOT_SUPPORTED` here.
    #[serde(default)]
    pub unsourced: Vec<Unsourced>,
}

impl Board {
    /// Whether it has eighths, quarters and halves as all boards with 7 compute slices have them: of the last eighth there
    /// is memory only.
    pub fn eighths(&self) -> bool {
        let usual = |span: Span| matches!(span.size, 1 | 2 | 4 | 8) && span.start.is_multiple_of(span.size);
        self.grid == 8 && self.places().all(|span| usual(span) && span != Span { start: 7, size: 1 })
    }

    /// Where instances may lie: the placements of all usable profiles.
    pub fn places(&self) -> impl Iterator<Item = Span> {
        self.profiles.iter().flat_map(|profile| profile.placements.iter().copied())
    }

    /// The usable profile with this driver id.
    pub fn profile(&self, id: u32) -> Option<&GiProfile> {
        self.profiles.iter().find(|profile| profile.id == id)
    }

    /// The usable profile with this enum index.
    pub fn profile_by_index(&self, index: u32) -> Option<&GiProfile> {
        self.profiles.iter().find(|profile| profile.index == index)
    }

    /// The usable profile with this name.
    pub fn profile_by_name(&self, name: &str) -> Option<&GiProfile> {
        self.profiles.iter().find(|profile| profile.name == name)
    }
}

/// Reads the published tables (`boards.json`).
pub fn parse(json: &str) -> serde_json::Result<Vec<Board>> {
    Ok(serde_json::from_str::<File>(json)?.gpus.into_iter().map(Raw::into_board).collect())
}

#[derive(Deserialize)]
struct File {
    gpus: Vec<Raw>,
}

#[derive(Deserialize)]
struct Raw {
    key: String,
    name: String,
    architecture: String,
    compute_capability: String,
    pci_device_ids: Vec<RawPci>,
    total_memory_mib: Option<u64>,
    memory_slices: u32,
    placement_grid: Option<u32>,
    max_mig_devices: u32,
    mig_mode: String,
    figures: Option<Figures>,
    profiles: Vec<RawProfile>,
}

#[derive(Deserialize)]
struct RawPci {
    id: String,
}

#[derive(Deserialize)]
struct RawProfile {
    id: u32,
    #[serde(rename = "enum")]
    index: u32,
    name: String,
    slice_count: u32,
    memory_size_mb: Option<u64>,
    sm: Option<u32>,
    copy_engines: Option<u32>,
    decoders: Option<u32>,
    encoders: Option<u32>,
    jpeg: Option<u32>,
    ofa: Option<u32>,
    instance_count: Option<u32>,
    is_p2p_supported: Option<u32>,
    placements: Option<Vec<Span>>,
    compute_profiles: Vec<RawCompute>,
}

#[derive(Deserialize)]
struct RawCompute {
    id: u32,
    #[serde(rename = "enum")]
    index: u32,
    name: Option<String>,
    slice_count: u32,
    sm: Option<u32>,
    instance_count: Option<u32>,
    placements: Option<Vec<Span>>,
}

impl RawCompute {
    fn sourced(&self) -> Option<CiProfile> {
        Some(CiProfile {
            id: self.id,
            index: self.index,
            name: self.name.clone()?,
            slices: self.slice_count,
            sm: self.sm?,
            count: self.instance_count?,
            placements: self.placements.clone()?,
        })
    }
}

impl RawProfile {
    fn sourced(&self) -> Option<GiProfile> {
        Some(GiProfile {
            id: self.id,
            index: self.index,
            name: self.name.clone(),
            slices: self.slice_count,
            memory_mib: self.memory_size_mb?,
            sm: self.sm?,
            copy_engines: self.copy_engines?,
            engines: Engines { decoders: self.decoders?, encoders: self.encoders?, jpeg: self.jpeg?, ofa: self.ofa? },
            count: self.instance_count?,
            p2p: self.is_p2p_supported? != 0,
            placements: self.placements.clone()?,
            compute: self.compute_profiles.iter().filter_map(RawCompute::sourced).collect(),
        })
    }

    /// The GiB of the name, for example 144 of `7g.144gb`.
    fn nominal_gib(&self) -> Option<u64> {
        self.name.split('.').nth(1)?.split("gb").next()?.parse().ok()
    }
}

impl Raw {
    fn into_board(self) -> Board {
        let largest = self.profiles.iter().max_by_key(|profile| profile.slice_count);
        let nominal = largest.and_then(RawProfile::nominal_gib).unwrap_or(0) * 1024;
        let engines = largest.and_then(RawProfile::sourced).map(|profile| profile.engines);
        let (major, minor) = self.compute_capability.split_once('.').unwrap_or(("0", "0"));
        let hex = self.pci_device_ids.first().map_or("0", |pci| pci.id.trim_start_matches("0x"));
        Board {
            key: self.key,
            name: self.name,
            architecture: self.architecture,
            compute_capability: (major.parse().unwrap_or(0), minor.parse().unwrap_or(0)),
            pci_device_id: u32::from_str_radix(hex, 16).unwrap_or(0),
            memory_mib: self.total_memory_mib.unwrap_or(nominal),
            grid: self.placement_grid.unwrap_or(self.memory_slices),
            max_mig_devices: self.max_mig_devices,
            mode: if self.mig_mode.starts_with("reset-required") {
                ModeRule::ResetPersistent
            } else {
                ModeRule::Immediate
            },
            figures: self.figures,
            engines,
            unsourced: self
                .profiles
                .iter()
                .filter(|profile| profile.sourced().is_none())
                .map(|profile| Unsourced { id: profile.id, index: profile.index, name: profile.name.clone() })
                .collect(),
            profiles: self.profiles.iter().filter_map(RawProfile::sourced).collect(),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn boards() -> Vec<Board> {
        parse(include_str!("../boards.json")).unwrap()
    }

    pub(crate) fn board(key: &str) -> Board {
        boards().into_iter().find(|board| board.key == key).unwrap()
    }

    #[test]
    fn all_fourteen_boards_load() {
        let boards = boards();
        assert_eq!(boards.len(), 14);
        for board in &boards {
            assert!(board.memory_mib > 20_000, "{}", board.key);
            assert!(board.pci_device_id & 0xffff == 0x10de, "{}", board.key);
            assert!(matches!(board.grid, 4 | 8 | 12), "{}", board.key);
            assert!(board.profiles.len() + board.unsourced.len() >= 5, "{}", board.key);
        }
    }

    #[test]
    fn a_null_refuses_only_the_profile_that_has_it() {
        let b200 = board("b200-180gb");
        assert!(b200.profile_by_name("1g.23gb").is_some());
        assert!(b200.profile_by_name("7g.180gb").is_none());
        assert!(b200.unsourced.iter().any(|profile| profile.name == "7g.180gb"));
        assert_eq!(b200.engines, None);
        assert_eq!(board("b300-sxm6").profiles, []);
        assert_eq!(board("gh200-144gb").memory_mib, 144 * 1024);
    }

    #[test]
    fn the_two_number_spaces_are_kept_apart() {
        let a100 = board("a100-sxm4-40gb");
        assert_eq!(a100.profile_by_index(9).unwrap().id, 15);
        assert_eq!(a100.profile(9).unwrap().name, "3g.20gb");
    }

    #[test]
    fn hopper_double_memory_slices_take_compute_profile_7() {
        let h100 = board("h100-sxm-80gb");
        let whole = h100.profile_by_name("1g.20gb").unwrap().whole().unwrap().clone();
        assert_eq!((whole.id, whole.sm), (7, 26));
        assert_eq!(board("a100-sxm4-80gb").profile_by_name("1g.20gb").unwrap().whole().unwrap().id, 0);
    }
}
