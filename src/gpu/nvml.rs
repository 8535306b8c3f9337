//! `Gpu` over libnvidia-ml.

use std::cell::{OnceCell, RefCell};
use std::cmp::Reverse;
use std::collections::HashMap;
use std::path::PathBuf;
use std::rc::Rc;

use super::ffi::{self, ComputeProfile, DeviceHandle, ErrorsIn, GpuInstance, GpuInstanceProfile, Library};
use super::ffi::{FUNCTION_NOT_FOUND, INVALID_ARGUMENT, NOT_SUPPORTED, VERSION_MISMATCH};
use super::{
    Activation, ComputeInstance, Device, Gpu, GpuError, GpuProcess, Instance, MigMode, Placement, Profile, ProfileId,
};
use super::{MigDevice, Reading, Sample, Split, Utilisation};

/// Enum indices probed for GPU-instance profiles: past the 17 of NVML 13.0, so that a newer driver's are found.
const GPU_INSTANCE_PROFILES: u32 = 32;
/// Enum indices probed for compute-instance profiles: NVML 13.0 has 8.
const COMPUTE_INSTANCE_PROFILES: u32 = 16;

type Splits = HashMap<(String, ProfileId), Rc<[ComputeProfile]>>;

/// The NVIDIA driver of this machine. Loaded at the first call, and only once: initialising takes milliseconds, or
/// seconds where no other client keeps the GPUs awake.
#[derive(Debug)]
pub struct Nvml {
    path: PathBuf,
    library: OnceCell<Library>,
    /// Profiles by GPU UUID. What a GPU offers does not change while the driver is loaded.
    offers: RefCell<HashMap<String, Rc<[Profile]>>>,
    /// What the last look at all GPUs left out.
    left_out: RefCell<Vec<(u32, String)>>,
    /// Compute-instance profiles by GPU UUID and GPU-instance profile, largest first; asked of the first instance met.
    splits: RefCell<Splits>,
}

impl Nvml {
    /// The driver behind that `libnvidia-ml.so.1`; an absolute path. Loads nothing yet.
    pub fn at(path: impl Into<PathBuf>) -> Nvml {
        Nvml {
            path: path.into(),
            library: OnceCell::new(),
            offers: RefCell::default(),
            left_out: RefCell::default(),
            splits: RefCell::default(),
        }
    }

    fn library(&self) -> Result<&Library, GpuError> {
        if let Some(library) = self.library.get() {
            return Ok(library);
        }
        let library = Library::open(&self.path)?;
        Ok(self.library.get_or_init(|| library))
    }

    fn read_device(&self, library: &Library, index: u32, handle: &DeviceHandle<'_>) -> Result<Device, GpuError> {
        let (pci_bus_id, pci_device_id) = library.pci(handle)?;
        let mut device = Device {
            uuid: library.uuid(handle)?,
            name: library.name(handle)?,
            index,
            minor: library.minor(handle)?,
            pci_bus_id,
            pci_device_id,
            mig: read_mode(library, handle)?,
            profiles: Vec::new(),
            instances: Vec::new(),
        };
        if is_on(device.mig) {
            let offered = self.offer(library, handle, &device.uuid)?;
            device.instances = unless_forbidden(self.read_instances(library, handle, &device.uuid, &offered))?;
            device.profiles = offered.to_vec();
        }
        Ok(device)
    }

    fn offer(&self, library: &Library, device: &DeviceHandle<'_>, uuid: &str) -> Result<Rc<[Profile]>, GpuError> {
        if let Some(offered) = self.offers.borrow().get(uuid) {
            return Ok(Rc::clone(offered));
        }
        let offered: Rc<[Profile]> = read_profiles(library, device)?.into();
        self.offers.borrow_mut().insert(uuid.to_owned(), Rc::clone(&offered));
        Ok(offered)
    }

    fn compute_profiles(
        &self,
        library: &Library,
        instance: &GpuInstance<'_>,
        gpu: &str,
        of: ProfileId,
    ) -> Result<Rc<[ComputeProfile]>, GpuError> {
        let key = (gpu.to_owned(), of);
        if let Some(profiles) = self.splits.borrow().get(&key) {
            return Ok(Rc::clone(profiles));
        }
        let mut profiles = Vec::new();
        for index in 0..COMPUTE_INSTANCE_PROFILES {
            profiles.extend(library.compute_profile(instance, index)?);
        }
        profiles.sort_by_key(|p| Reverse(p.slices));
        let profiles: Rc<[ComputeProfile]> = profiles.into();
        // None at all: the instance has just gone.
        if !profiles.is_empty() {
            self.splits.borrow_mut().insert(key, Rc::clone(&profiles));
        }
        Ok(profiles)
    }

    fn read_instances(
        &self,
        library: &Library,
        device: &DeviceHandle<'_>,
        gpu: &str,
        offered: &[Profile],
    ) -> Result<Vec<Instance>, GpuError> {
        let mut instances = Vec::new();
        for profile in offered {
            for handle in library.gpu_instances(device, profile.id, profile.max_instances)? {
                instances.extend(self.read_instance(library, &handle, gpu)?);
            }
        }
        instances.sort_by_key(|instance| instance.id);
        Ok(instances)
    }

    /// `None` for one that has just gone.
    fn read_instance(
        &self,
        library: &Library,
        handle: &GpuInstance<'_>,
        gpu: &str,
    ) -> Result<Option<Instance>, GpuError> {
        let Some(info) = unless_gone(library.gpu_instance_info(handle))? else { return Ok(None) };
        let mut instance = bare(info);
        let offered = self.compute_profiles(library, handle, gpu, instance.profile)?;
        // The first one is the whole instance.
        let mut slices = offered.first().map_or(0, |whole| whole.slices);
        for profile in offered.iter() {
            // Largest first: the usual single compute instance leaves no room for one of another profile.
            if profile.slices > slices {
                continue;
            }
            for compute in unless_gone(library.compute_instances(handle, profile))?.unwrap_or_default() {
                slices = slices.saturating_sub(profile.slices);
                instance.compute.extend(unless_gone(read_compute(library, &compute, profile))?);
            }
        }
        instance.compute.sort_by_key(|compute| compute.id);
        Ok(Some(instance))
    }
}

impl Gpu for Nvml {
    fn driver_version(&self) -> Result<String, GpuError> {
        self.library()?.driver_version()
    }

    /// A GPU that has fallen off the bus, can't be opened, or fails otherwise is left out with a warning, so that the others
    /// stay usable; when none is left, its error is the answer. Without permission to see placements and instances, as a user,
    /// those lists are empty.
    fn devices(&self) -> Result<Vec<Device>, GpuError> {
        let library = self.library()?;
        let mut devices = Vec::new();
        let mut unusable = None;
        self.left_out.borrow_mut().clear();
        for index in 0..library.device_count()? {
            match library.device_by_index(index).and_then(|handle| self.read_device(library, index, &handle)) {
                Ok(device) => devices.push(device),
                Err(error) => {
                    tracing::warn!("GPU {index} is left out: {error}");
                    self.left_out.borrow_mut().push((index, error.to_string()));
                    unusable.get_or_insert(error);
                }
            }
        }
        match unusable {
            Some(error) if devices.is_empty() => return Err(error),
            _ => {}
        }
        // NVML writes bus ids in upper-case hex of fixed width, so their order is the order of the text.
        devices.sort_by(|a, b| a.pci_bus_id.cmp(&b.pci_bus_id));
        Ok(devices)
    }

    fn left_out(&self) -> Vec<(u32, String)> {
        self.left_out.borrow().clone()
    }

    fn instances(&self, gpu: &str) -> Result<Vec<Instance>, GpuError> {
        let library = self.library()?;
        let device = library.device_by_uuid(gpu)?;
        if !is_on(read_mode(library, &device)?) {
            return Ok(Vec::new());
        }
        self.read_instances(library, &device, gpu, &self.offer(library, &device, gpu)?)
    }

    fn instance(&self, gpu: &str, id: u32) -> Result<Option<Instance>, GpuError> {
        let library = self.library()?;
        let device = library.device_by_uuid(gpu)?;
        if !is_on(read_mode(library, &device)?) {
            return Ok(None);
        }
        let Some(handle) = unless_gone(library.gpu_instance_by_id(&device, id))? else { return Ok(None) };
        self.read_instance(library, &handle, gpu)
    }

    fn instance_of(&self, slice: &str) -> Result<Option<(String, Instance)>, GpuError> {
        let library = self.library()?;
        let Some(device) = unless_gone(library.device_by_uuid(slice))? else { return Ok(None) };
        let parent = library.parent(&device)?;
        let (gpu, name) = (library.uuid(&parent)?, library.name(&device)?);
        let offer = self.offer(library, &parent, &gpu)?;
        let named = |profile: &&Profile| name.ends_with(&format!(" MIG {}", profile.name));
        let Some(profile) = offer.iter().find(named) else { return Ok(None) };
        let compute = ComputeInstance {
            id: library.compute_instance_id(&device)?,
            slices: profile.slices,
            sms: profile.sms,
            uuid: library.uuid(&device)?,
        };
        let id = library.gpu_instance_id(&device)?;
        Ok(Some((gpu, Instance { id, profile: profile.id, placement: Placement::UNKNOWN, compute: vec![compute] })))
    }

    fn create_instance(&self, gpu: &str, profile: ProfileId, at: Placement) -> Result<Instance, GpuError> {
        let library = self.library()?;
        let device = library.device_by_uuid(gpu)?;
        let instance = library.create_gpu_instance(&device, profile, at)?;
        match library.gpu_instance_info(&instance) {
            Ok(info) => Ok(bare(info)),
            Err(error) => {
                undo(library.destroy_gpu_instance(instance));
                Err(error)
            }
        }
    }

    fn create_compute(&self, gpu: &str, instance: u32, slices: Option<u32>) -> Result<ComputeInstance, GpuError> {
        let library = self.library()?;
        let device = library.device_by_uuid(gpu)?;
        let instance = library.gpu_instance_by_id(&device, instance)?;
        let made_with = library.gpu_instance_info(&instance)?.profile;
        let offered = self.compute_profiles(library, &instance, gpu, made_with)?;
        // The id is not the slice count: a 1g.20gb of an H100 needs id 7, which has all 26 multiprocessors, not id 0.
        let wanted = slices.or(offered.first().map(|whole| whole.slices));
        let fitting = offered.iter().filter(|p| Some(p.slices) == wanted);
        let Some(profile) = fitting.max_by_key(|p| (p.sms, Reverse(p.id))) else {
            let sizes: Vec<String> = offered.iter().map(|p| format!("{}c", p.slices)).collect();
            let offer = self.offer(library, &device, gpu)?;
            let name = offer.iter().find(|p| p.id == made_with).map_or("?", |p| p.name.as_str());
            return Err(GpuError::NotOffered(match slices {
                Some(slices) => {
                    format!("{name} has no compute instance of {slices}c; it offers {}", sizes.join(", "))
                }
                None => format!("no compute-instance profile fills a GPU instance of {name}"),
            }));
        };
        let compute = library.create_compute_instance(&instance, profile)?;
        match read_compute(library, &compute, profile) {
            Ok(made) => Ok(made),
            Err(error) => {
                undo(library.destroy_compute_instance(compute));
                Err(error)
            }
        }
    }

    fn destroy_compute(&self, gpu: &str, instance: u32, compute: u32) -> Result<(), GpuError> {
        let library = self.library()?;
        let device = library.device_by_uuid(gpu)?;
        let instance = library.gpu_instance_by_id(&device, instance)?;
        library.destroy_compute_instance(library.compute_instance_by_id(&instance, compute)?)
    }

    fn destroy_instance(&self, gpu: &str, instance: u32) -> Result<(), GpuError> {
        let library = self.library()?;
        let device = library.device_by_uuid(gpu)?;
        library.destroy_gpu_instance(library.gpu_instance_by_id(&device, instance)?)
    }

    fn processes(&self, gpu: &str) -> Result<Vec<GpuProcess>, GpuError> {
        let library = self.library()?;
        library.processes(&library.device_by_uuid(gpu)?)
    }

    fn set_mig_mode(&self, gpu: &str, on: bool) -> Result<Activation, GpuError> {
        let library = self.library()?;
        library.set_mig_mode(&library.device_by_uuid(gpu)?, on)
    }

    fn splits(&self, gpu: &str, instance: u32) -> Result<Vec<Split>, GpuError> {
        let library = self.library()?;
        let device = library.device_by_uuid(gpu)?;
        let instance = library.gpu_instance_by_id(&device, instance)?;
        let profile = library.gpu_instance_info(&instance)?.profile;
        let offered = self.compute_profiles(library, &instance, gpu, profile)?;
        let split = |p: &ComputeProfile| Split { slices: p.slices, sms: p.sms, max_instances: p.max_instances };
        Ok(offered.iter().map(split).collect())
    }

    fn mig_devices(&self, gpu: &str) -> Result<Vec<MigDevice>, GpuError> {
        let library = self.library()?;
        let device = library.device_by_uuid(gpu)?;
        let mut found = Vec::new();
        for index in 0..told(library.max_mig_devices(&device))?.unwrap_or(0) {
            let Some(mig) = told(library.mig_device(&device, index))?.flatten() else { continue };
            found.extend(unless_gone(read_mig_device(library, index, &mig))?);
        }
        Ok(found)
    }

    /// "On MIG-enabled GPUs, per instance information can be queried using specific MIG device handles. Per instance
    /// information is currently only supported for non-DRAM uncorrectable volatile errors. Querying volatile errors
    /// using device handles is currently not supported" (nvml.h, nvmlDeviceGetMemoryErrorCounter).
    fn reading(&self, uuid: &str) -> Result<Reading, GpuError> {
        let library = self.library()?;
        let device = library.device_by_uuid(uuid)?;
        let memory = match told(library.memory_of_clients(&device))? {
            Some(memory) => Some(memory),
            None => told(library.memory(&device))?,
        };
        let sram = told(library.uncorrected_errors(&device, ErrorsIn::Sram))?;
        let mut reading = Reading {
            memory_used_mib: memory.map(|(used, _)| used >> 20),
            memory_total_mib: memory.map(|(_, total)| total >> 20),
            ..Reading::default()
        };
        if uuid.starts_with("MIG-") {
            let attributes = told(library.attributes(&device))?;
            reading.ecc_errors = sram;
            reading.sms = attributes.map(|(sms, _)| sms);
            reading.engines = attributes.map(|(_, engines)| engines);
        } else {
            let dram = told(library.uncorrected_errors(&device, ErrorsIn::Dram))?;
            reading.ecc_errors = sram.zip(dram).map(|(sram, dram)| sram.saturating_add(dram));
            reading.ecc = told(library.ecc(&device))?;
            reading.persistence = told(library.persistence(&device))?;
        }
        Ok(reading)
    }

    fn sample(&self, gpu: &str, instance: u32) -> Result<Option<Sample<'_>>, GpuError> {
        let library = self.library()?;
        let device = library.device_by_uuid(gpu)?;
        if told(library.counts_performance(&device))? != Some(true) {
            return Ok(None);
        }
        Ok(told(library.sample(&device, instance))?.map(Sample))
    }

    fn utilisation(&self, before: &Sample<'_>, after: &Sample<'_>) -> Result<Utilisation, GpuError> {
        self.library()?.utilisation(&before.0, &after.0)
    }
}

fn read_mig_device(library: &Library, index: u32, mig: &DeviceHandle<'_>) -> Result<MigDevice, GpuError> {
    let name = library.name(mig)?;
    Ok(MigDevice {
        index,
        instance: library.gpu_instance_id(mig)?,
        compute: library.compute_instance_id(mig)?,
        uuid: library.uuid(mig)?,
        profile: name.rsplit_once(" MIG ").map_or(name.as_str(), |(_, profile)| profile).to_owned(),
    })
}

fn read_mode(library: &Library, device: &DeviceHandle<'_>) -> Result<MigMode, GpuError> {
    Ok(match library.mig_mode(device)? {
        None => MigMode::Unsupported,
        Some((false, false)) => MigMode::Off,
        Some((true, true)) => MigMode::On,
        Some((false, true)) => MigMode::EnablePending,
        Some((true, false)) => MigMode::DisablePending,
    })
}

fn is_on(mode: MigMode) -> bool {
    matches!(mode, MigMode::On | MigMode::DisablePending)
}

fn read_profiles(library: &Library, device: &DeviceHandle<'_>) -> Result<Vec<Profile>, GpuError> {
    let mut profiles = Vec::new();
    for index in 0..GPU_INSTANCE_PROFILES {
        let Some(offered) = library.gpu_instance_profile(device, index)? else { continue };
        let mut placements = unless_forbidden(library.placements(device, offered.id))?;
        placements.sort_unstable();
        let name = match offered.name.as_deref().map(|name| name.strip_prefix("MIG ").unwrap_or(name)) {
            Some(name) if !name.is_empty() => name.to_owned(),
            _ => profile_name(index, &offered, library.memory(device)?.1),
        };
        profiles.push(Profile {
            id: offered.id,
            name,
            slices: offered.slices,
            memory_mib: offered.memory_mib,
            sms: offered.sms,
            engines: offered.engines,
            p2p: offered.p2p,
            max_instances: offered.max_instances,
            placements,
        });
    }
    Ok(profiles)
}

fn read_compute(
    library: &Library,
    compute: &ffi::ComputeInstance<'_>,
    profile: &ComputeProfile,
) -> Result<ComputeInstance, GpuError> {
    let (id, device) = library.compute_instance_info(compute)?;
    Ok(ComputeInstance { id, slices: profile.slices, sms: profile.sms, uuid: library.uuid(&device)? })
}

fn bare(info: ffi::GpuInstanceInfo) -> Instance {
    Instance { id: info.id, profile: info.profile, placement: info.placement, compute: Vec::new() }
}

/// `None` for what another client destroyed since it was listed: its handle is then unknown, or refused as no handle.
fn unless_gone<T>(read: Result<T, GpuError>) -> Result<Option<T>, GpuError> {
    match read {
        Ok(value) => Ok(Some(value)),
        Err(GpuError::NotFound { .. } | GpuError::Driver { code: INVALID_ARGUMENT, .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

/// `None` for what this driver, board or mode does not tell, or not to this user.
fn told<T>(read: Result<T, GpuError>) -> Result<Option<T>, GpuError> {
    match read {
        Ok(value) => Ok(Some(value)),
        Err(GpuError::Symbol { .. } | GpuError::NoPermission { .. }) => Ok(None),
        Err(GpuError::Driver { code: NOT_SUPPORTED | INVALID_ARGUMENT, .. }) => Ok(None),
        Err(GpuError::Driver { code: FUNCTION_NOT_FOUND | VERSION_MISMATCH, .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

/// An empty list where this user may not look.
fn unless_forbidden<T>(read: Result<Vec<T>, GpuError>) -> Result<Vec<T>, GpuError> {
    match read {
        Err(GpuError::NoPermission { .. }) => Ok(Vec::new()),
        read => read,
    }
}

/// The half that was made is taken back; if that fails too, the caller finds it at its placement.
fn undo(destroyed: Result<(), GpuError>) {
    if let Err(error) = destroyed {
        tracing::warn!("a half-made slice stays: {error}");
    }
}

/// The name that the driver itself would give, for drivers that do not report names: NVIDIA's own tools compute it so
/// (go-nvlib, `pkg/nvlib/device/mig_profile.go`).
fn profile_name(index: u32, profile: &GpuInstanceProfile, total_bytes: u64) -> String {
    let total_bytes = total_bytes.max(1);
    let eighths = (u128::from(profile.memory_mib) * (8 << 20)).div_ceil(u128::from(total_bytes));
    let total_gib = u128::from(total_bytes.div_ceil(1 << 30));
    let gb = (eighths * total_gib + 4) / 8;
    // NVML_GPU_INSTANCE_PROFILE_* of nvml.h; REV2, double memory, has no suffix.
    let suffix = match index {
        7 | 8 => "+me",
        10..=12 | 17 => "+gfx",
        13 | 14 => "-me",
        15 | 16 => "+me.all",
        _ => "",
    };
    format!("{}g.{gb}gb{suffix}", profile.slices)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::Engines;

    #[test]
    fn names_are_those_that_newer_drivers_report() {
        let name = |index, slices, memory_mib, total_mib: u64| {
            let (engines, p2p) = (Engines::default(), false);
            let (id, max_instances, sms, name) = (ProfileId(0), 1, 0, None);
            let profile = GpuInstanceProfile { id, slices, max_instances, sms, engines, p2p, memory_mib, name };
            profile_name(index, &profile, total_mib << 20)
        };
        // A100-SXM4-40GB, A100-SXM4-80GB, H100 80GB HBM3, A30.
        assert_eq!(name(0, 1, 4864, 40960), "1g.5gb");
        assert_eq!(name(7, 1, 4864, 40960), "1g.5gb+me");
        assert_eq!(name(2, 3, 40192, 81920), "3g.40gb");
        assert_eq!(name(9, 1, 20096, 81559), "1g.20gb");
        assert_eq!(name(4, 7, 81037, 81559), "7g.80gb");
        assert_eq!(name(8, 2, 11968, 24576), "2g.12gb+me");
    }

    #[test]
    fn a_relative_path_is_refused() {
        let error = Nvml::at("libnvidia-ml.so.1").driver_version().unwrap_err();
        assert!(matches!(&error, GpuError::Library { reason, .. } if reason == "the path is not absolute"), "{error}");
    }
}
