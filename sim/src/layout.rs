//! Lays out a machine as a driver root: library, /proc and /dev.

use std::fmt::Write;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};

use crate::board::Board;
use crate::branch;
use crate::driver::{self, Part, Tree};
use crate::hide::hide;
use crate::state::{
    AmpereReset, Config, Gpu, GpuConfig, IdMap, Majors, State, UuidFormat, ci_cap_minor, gi_cap_minor, uuid5,
};
use crate::store::Machine;
use crate::tree;

/// Where the library lies in a driver root.
pub const LIBRARY_DIR: &str = "usr/lib";
/// The name every client asks for.
pub const LIBRARY: &str = "libnvidia-ml.so.1";

/// GPU-instance ids that a GPU has.
pub const GI_IDS: u32 = 15;
/// GPUs, GPU-instance ids and compute-instance ids that mig-minors has room for.
const CAPS: (u32, u32, u32) = (32, GI_IDS, 8);

/// What a machine is to be.
#[derive(Debug)]
pub struct Spec {
    /// One per GPU, in NVML index order.
    pub boards: Vec<Board>,
    /// MIG is on from the start.
    pub mig: bool,
    /// One for all, or one per GPU.
    pub id_maps: Vec<IdMap>,
    /// Device minors in NVML index order; 0, 1, … when empty.
    pub minors: Vec<u32>,
    /// How MIG devices are named; as the driver version does when absent.
    pub uuid_format: Option<UuidFormat>,
    /// Ampere mode switching.
    pub ampere_reset: AmpereReset,
    /// For example `580.95.05`.
    pub driver_version: String,
    /// Same seed, same UUIDs.
    pub seed: String,
    /// The library to copy.
    pub library: PathBuf,
    /// The parts of the driver tree; none: the library alone.
    pub parts: Vec<Part>,
    /// What is to be `nvidia-smi` there.
    pub smi: Option<PathBuf>,
}

/// Makes the machine and returns what could not be done but need not stop anyone.
pub fn create(dir: &Path, spec: Spec) -> Result<Vec<String>> {
    if fs::read_dir(dir).is_ok_and(|mut entries| entries.next().is_some()) {
        bail!("{} is not empty; name a directory that does not exist yet, or remove it first", dir.display());
    }
    let real = fs::read_to_string("/proc/devices").context("reading /proc/devices")?;
    let mut config = config(&spec, majors(&real)?)?;
    let libraries = dir.join(LIBRARY_DIR);
    fs::create_dir_all(&libraries).with_context(|| format!("creating {}", libraries.display()))?;
    let library = libraries.join(LIBRARY);
    let copying = || format!("copying {} to {}", spec.library.display(), library.display());
    if spec.parts.contains(&Part::Utility) {
        let tree = Tree {
            version: &config.driver_version,
            parts: &spec.parts,
            library: &spec.library,
            smi: spec.smi.as_deref(),
        };
        driver::lay_out(dir, &tree).context("laying out the driver tree")?;
        let file = driver::library_file(tree.version);
        let size = fs::metadata(dir.join(&file)).with_context(copying)?.len();
        symlink(Path::new("../..").join(&file), &library).with_context(copying)?;
        config.window = Some((file, size));
    } else {
        fs::copy(&spec.library, &library).with_context(copying)?;
    }
    age(&library, branch(&config.driver_version)?)
        .with_context(|| format!("fitting {} to its driver", library.display()))?;
    let gpus = config.gpus.iter().map(|_| Gpu::new(spec.mig)).collect();
    let state = State { births: 0, gpus, holds: Vec::new() };
    proc(dir, &config, &real).context("writing the proc tree")?;
    let machine = Machine::create(&libraries, config, &state)?;
    let notices = nodes(dir, &machine.config, &real)?;
    Ok(notices)
}

/// What a reboot does to /dev: capability nodes are gone until somebody makes them again.
pub fn clear_cap_nodes(dir: &Path) -> Result<()> {
    let caps = dir.join("dev/nvidia-caps");
    if caps.exists() {
        fs::remove_dir_all(&caps).with_context(|| format!("removing {}", caps.display()))?;
    }
    Ok(())
}

fn config(spec: &Spec, majors: Majors) -> Result<Config> {
    let count = spec.boards.len();
    let branch = branch(&spec.driver_version)?;
    ensure!((1..=CAPS.0 as usize).contains(&count), "a machine has 1 to {} GPUs; give --gpu that many times", CAPS.0);
    let minors: Vec<u32> = if spec.minors.is_empty() { (0..count as u32).collect() } else { spec.minors.clone() };
    ensure!(minors.len() == count, "--minors names {} GPUs, but there are {count}; name each once", minors.len());
    for (place, minor) in minors.iter().enumerate() {
        ensure!(*minor < CAPS.0, "minor {minor} is too large; use 0 to {}", CAPS.0 - 1);
        ensure!(!minors[..place].contains(minor), "minor {minor} is given twice in --minors");
    }
    let id_maps = match spec.id_maps[..] {
        [] => vec![IdMap::default(); count],
        [one] => vec![one; count],
        ref each => each.to_vec(),
    };
    ensure!(id_maps.len() == count, "--gi-map names {} GPUs, but there are {count}; name one or each", id_maps.len());
    let mut boards: Vec<Board> = Vec::new();
    let mut gpus = Vec::new();
    for (index, board) in spec.boards.iter().enumerate() {
        let first = branch::first_for(&board.architecture);
        ensure!(branch >= first, "driver {branch} does not know {}; use {first} or later", board.architecture);
        let known = boards.iter().position(|known| known == board);
        let place = known.unwrap_or(boards.len());
        if known.is_none() {
            boards.push(board.clone());
        }
        gpus.push(GpuConfig {
            board: place,
            uuid: format!("GPU-{}", uuid5(&format!("{}/{index}", spec.seed))),
            minor: minors[index],
            bus: 7 + 8 * index as u32,
            serial: format!("1320921{:06}", 1 + index),
            id_map: id_maps[index],
        });
    }
    Ok(Config {
        root: "../..".into(),
        cuda_version: cuda_version(branch)?,
        driver_version: spec.driver_version.clone(),
        uuid_format: spec.uuid_format.unwrap_or(if branch < 470 { UuidFormat::Old } else { UuidFormat::New }),
        ampere_reset: spec.ampere_reset,
        majors,
        boards,
        gpus,
        window: None,
    })
}

fn branch(version: &str) -> Result<u32> {
    branch::of_version(version).with_context(|| format!("`{version}` is no driver version; write it like 580.95.05"))
}

/// Takes the calls out of a library that its driver lacks.
fn age(library: &Path, branch: u32) -> Result<()> {
    let missing = branch::missing(branch);
    if missing.is_empty() {
        return Ok(());
    }
    let mut image = fs::read(library)?;
    hide(&mut image, &missing)?;
    Ok(fs::write(library, image)?)
}

fn cuda_version(branch: u32) -> Result<i32> {
    let newest = [
        (450, 11000),
        (455, 11010),
        (460, 11020),
        (465, 11030),
        (470, 11040),
        (495, 11050),
        (510, 11060),
        (515, 11070),
        (520, 11080),
        (525, 12000),
        (530, 12010),
        (535, 12020),
        (545, 12030),
        (550, 12040),
        (555, 12050),
        (560, 12060),
        (565, 12070),
        (570, 12080),
        (575, 12090),
        (580, 13000),
        (590, 13010),
    ];
    let found = newest.iter().rev().find(|(from, _)| *from <= branch);
    found.map(|(_, cuda)| *cuda).with_context(|| format!("driver {branch} knows no MIG; use 450 or later"))
}

/// Name and number of the character devices in a `/proc/devices`.
fn characters(devices: &str) -> Vec<(u32, &str)> {
    let lines = devices.lines().skip_while(|line| !line.starts_with("Character")).skip(1);
    lines
        .take_while(|line| !line.starts_with("Block"))
        .filter_map(|line| line.trim().split_once(' '))
        .filter_map(|(major, name)| Some((major.parse().ok()?, name)))
        .collect()
}

fn is_nvidia(name: &str) -> bool {
    name.starts_with("nvidia")
}

/// Majors as the kernel hands them out, from 254 down and then from 511 down, none of which is in use here: a
/// node of this machine opens nothing.
fn majors(real: &str) -> Result<Majors> {
    let used = characters(real);
    let mut free =
        (234..=254).rev().chain((384..=511).rev()).filter(|major| used.iter().all(|(taken, _)| taken != major));
    let mut next = || free.next().context("no unused dynamic major is left in /proc/devices");
    Ok(Majors { nvidia: 195, nvlink: next()?, caps: next()?, uvm: next()? })
}

fn proc(dir: &Path, config: &Config, real: &str) -> Result<()> {
    let proc = dir.join("proc");
    let nvidia = proc.join("driver/nvidia");
    let caps = proc.join("driver/nvidia-caps");
    let capabilities = nvidia.join("capabilities");
    for made in [&caps, &capabilities.join("mig"), &nvidia.join("gpus")] {
        fs::create_dir_all(made)?;
    }
    tree::write(&proc.join("devices"), &devices(real, &config.majors), 0o444)?;
    let version = &config.driver_version;
    let text = format!(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {version}  Release Build  (nvml-sim)\n\
         GCC version:  gcc version 14.2.0 (simulated)\n"
    );
    tree::write(&nvidia.join("version"), &text, 0o444)?;
    tree::write(&nvidia.join("params"), PARAMS, 0o444)?;
    tree::write(&caps.join("mig-minors"), &mig_minors(), 0o444)?;
    tree::write(&caps.join("nvlink-minors"), "fabric-mgmt 0\n", 0o444)?;
    tree::write(&caps.join("sys-minors"), "fabric-imex-mgmt 4323\n", 0o444)?;
    tree::write(&capabilities.join("mig/config"), &tree::access(1, 0o400), 0o400)?;
    tree::write(&capabilities.join("mig/monitor"), &tree::access(2, 0o444), 0o444)?;
    for (gpu, board) in config.gpus.iter().zip((0..).map_while(|index| config.board(index))) {
        let home = nvidia.join("gpus").join(gpu.kernel_bus_id());
        fs::create_dir(&home)?;
        tree::write(&home.join("information"), &information(config, gpu, board), 0o444)?;
        tree::seal(&home)?;
        let mig = capabilities.join(format!("gpu{}/mig", gpu.minor));
        fs::create_dir_all(&mig)?;
        tree::seal(&mig)?;
    }
    for done in [&capabilities.join("mig"), &capabilities, &nvidia.join("gpus"), &nvidia, &caps] {
        tree::seal(done)?;
    }
    Ok(())
}

fn information(config: &Config, gpu: &GpuConfig, board: &Board) -> String {
    let (name, uuid, bus, minor) = (&board.name, &gpu.uuid, gpu.kernel_bus_id(), gpu.minor);
    format!(
        "Model: \t\t {name}\nIRQ:   \t\t {irq}\nGPU UUID: \t {uuid}\nVideo BIOS: \t 92.00.36.00.02\n\
         Bus Type: \t PCIe\nDMA Size: \t 47 bits\nDMA Mask: \t 0x7fffffffffff\nBus Location: \t {bus}\n\
         Device Minor: \t {minor}\nGPU Firmware: \t {firmware}\nGPU Excluded:\t No\n",
        irq = irq(minor),
        firmware = config.driver_version,
    )
}

/// The interrupt of a GPU.
pub fn irq(minor: u32) -> u32 {
    100 + minor
}

fn devices(real: &str, majors: &Majors) -> String {
    let mut all = characters(real);
    all.retain(|(_, name)| !is_nvidia(name));
    let ours = [
        (majors.nvidia, "nvidia"),
        (majors.nvlink, "nvidia-nvlink"),
        (majors.caps, "nvidia-caps"),
        (majors.uvm, "nvidia-uvm"),
    ];
    all.extend(ours);
    all.sort_by_key(|(major, _)| *major);
    let mut text = String::from("Character devices:\n");
    for (major, name) in all {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{major:3} {name}");
    }
    let blocks = real.find("Block devices:").map_or("Block devices:\n", |at| &real[at..]);
    text + "\n" + blocks
}

fn mig_minors() -> String {
    let (gpus, gis, cis) = CAPS;
    let mut text = String::from("config 1\nmonitor 2\n");
    for (gpu, gi) in (0..gpus).flat_map(|gpu| (0..gis).map(move |gi| (gpu, gi))) {
        let _ = writeln!(text, "gpu{gpu}/gi{gi}/access {}", gi_cap_minor(gpu, gi));
        for ci in 0..cis {
            let _ = writeln!(text, "gpu{gpu}/gi{gi}/ci{ci}/access {}", ci_cap_minor(gpu, gi, ci));
        }
    }
    text
}

fn nodes(dir: &Path, config: &Config, real: &str) -> Result<Vec<String>> {
    let dev = dir.join("dev");
    fs::create_dir(&dev).with_context(|| format!("creating {}", dev.display()))?;
    if characters(real).iter().any(|(_, name)| is_nvidia(name)) {
        return Ok(vec![
            "This host has an NVIDIA driver: no device nodes made, since they would reach real GPUs.".into(),
        ]);
    }
    let majors = config.majors;
    let mut wanted = vec![
        ("nvidiactl".to_owned(), majors.nvidia, 255),
        ("nvidia-uvm".to_owned(), majors.uvm, 0),
        ("nvidia-uvm-tools".to_owned(), majors.uvm, 1),
    ];
    wanted.extend(config.gpus.iter().map(|gpu| (format!("nvidia{}", gpu.minor), majors.nvidia, gpu.minor)));
    for (name, major, minor) in wanted {
        let path = dev.join(name);
        if let Err(errno) = mknod(&path, SFlag::S_IFCHR, Mode::empty(), makedev(major.into(), minor.into())) {
            return Ok(vec![format!("No device nodes in {}: {}.", dev.display(), errno.desc())]);
        }
        fs::set_permissions(&path, fs::Permissions::from_mode(0o666))
            .with_context(|| format!("setting the mode of {}", path.display()))?;
    }
    Ok(Vec::new())
}

const PARAMS: &str = "\
ResmanDebugLevel: 4294967295
RmLogonRC: 1
ModifyDeviceFiles: 1
DeviceFileUID: 0
DeviceFileGID: 0
DeviceFileMode: 438
InitializeSystemMemoryAllocations: 1
UsePageAttributeTable: 4294967295
EnableMSI: 1
EnablePCIeGen3: 0
EnableStreamMemOPs: 0
OpenRmEnableUnsupportedGpus: 1
";

#[cfg(test)]
mod tests {
    use super::*;

    const REAL: &str =
        "Character devices:\n  1 mem\n195 nvidia\n253 dimmctl\n254 nvidia-caps\n\nBlock devices:\n  7 loop\n";

    #[test]
    fn majors_are_those_nobody_uses() {
        let majors = majors(REAL).unwrap();
        assert_eq!((majors.nvidia, majors.nvlink, majors.caps, majors.uvm), (195, 252, 251, 250));
        let full: String = (234..=254).map(|major| format!("{major} x\n")).collect();
        assert_eq!(super::majors(&format!("Character devices:\n{full}")).unwrap().caps, 510);
    }

    #[test]
    fn devices_keep_the_hosts_lines_and_replace_its_nvidia_ones() {
        let text = devices(REAL, &majors(REAL).unwrap());
        assert_eq!(
            text,
            "Character devices:\n  1 mem\n195 nvidia\n250 nvidia-uvm\n251 nvidia-caps\n252 nvidia-nvlink\n\
             253 dimmctl\n\nBlock devices:\n  7 loop\n"
        );
    }

    #[test]
    fn mig_minors_run_to_4322() {
        let text = mig_minors();
        assert!(text.starts_with("config 1\nmonitor 2\ngpu0/gi0/access 3\ngpu0/gi0/ci0/access 4\n"));
        assert!(text.ends_with("gpu31/gi14/ci7/access 4322\n"));
    }

    #[test]
    fn the_cuda_version_follows_the_driver() {
        assert_eq!(cuda_version(branch("535.104.05").unwrap()).unwrap(), 12020);
        assert_eq!(cuda_version(branch("580.95.05").unwrap()).unwrap(), 13000);
        cuda_version(440).unwrap_err();
        branch("new").unwrap_err();
    }
}
