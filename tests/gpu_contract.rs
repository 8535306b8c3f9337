//! What `Gpu` promises, held against the simulated driver: the real loader, the real C ABI, no GPU.
//!
//! `cargo build -p mig-hook-sim` first; `MIG_TEST_SIM_DIR` names another directory with `nvml-sim` and
//! `libnvidia_ml.so`.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::slice;

use mig_hook::gpu::nvml::Nvml;
use mig_hook::gpu::{Device, Gpu, GpuError, GpuProcess, Instance, MigMode, Placement, Profile, ProfileId};
use mig_hook::gpu::{Reading, Utilisation};
use tempfile::TempDir;

/// A machine laid out by `nvml-sim`, gone with the value.
struct Machine {
    dir: TempDir,
}

impl Machine {
    /// Boards by key in NVML index order, MIG on.
    fn with(boards: &[&str]) -> Machine {
        Machine::created(boards, &[])
    }

    fn created(boards: &[&str], options: &[&str]) -> Machine {
        let machine = Machine { dir: TempDir::new().unwrap() };
        let boards = boards.iter().flat_map(|board| ["--gpu", board]);
        machine.sim(&["create"].into_iter().chain(boards).chain(options.iter().copied()).collect::<Vec<_>>());
        machine
    }

    /// Makes a call of NVML fail from now on, for ever.
    fn fault(&self, call: &str, code: &str) {
        self.sim(&["fault", "--call", call, "--fail", code, "--times", "forever"]);
    }

    /// `nvml-sim VERB DIR REST…`; what it printed.
    fn sim(&self, args: &[&str]) -> String {
        let program = sim_dir().join("nvml-sim");
        let output = Command::new(&program)
            .arg(args[0])
            .arg(self.dir.path())
            .args(&args[1..])
            .output()
            .unwrap_or_else(|e| panic!("{}: {e}; run `cargo build -p mig-hook-sim` first", program.display()));
        assert!(output.status.success(), "nvml-sim {args:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    fn library(&self) -> PathBuf {
        self.dir.path().join("usr/lib/libnvidia-ml.so.1")
    }

    fn gpu(&self) -> Nvml {
        Nvml::at(self.library())
    }
}

fn sim_dir() -> PathBuf {
    let beside_tests = || std::env::current_exe().unwrap().ancestors().nth(2).map(Path::to_path_buf);
    std::env::var_os("MIG_TEST_SIM_DIR").map(PathBuf::from).or_else(beside_tests).unwrap()
}

fn counted(machine: &Machine, read: impl FnOnce()) -> u64 {
    machine.sim(&["count", "on"]);
    read();
    let counts: serde_json::Value = serde_json::from_str(&machine.sim(&["counts", "--json"])).unwrap();
    counts.as_object().unwrap().values().map(|count| count.as_u64().unwrap()).sum()
}

fn only(gpu: &Nvml) -> Device {
    let mut devices = gpu.devices().unwrap();
    assert_eq!(devices.len(), 1);
    devices.remove(0)
}

fn named<'a>(device: &'a Device, name: &str) -> &'a Profile {
    let found = device.profiles.iter().find(|p| p.name == name);
    found.unwrap_or_else(|| panic!("no {name} in {:?}", device.profiles))
}

fn cut(gpu: &Nvml, device: &Device, profile: &str, start: u32) -> Result<Instance, GpuError> {
    let profile = named(device, profile);
    let at = profile.placements.iter().find(|p| p.start == start).expect("an offered placement");
    gpu.create_instance(&device.uuid, profile.id, *at)
}

#[test]
fn devices_come_in_pci_order_with_their_own_numbers() {
    let machine = Machine::created(&["a100-sxm4-80gb", "h100-sxm-80gb", "a30-24gb"], &["--minors", "1,2,0"]);
    // The order of bus ids that some machines have: not that of the indices.
    let file = machine.dir.path().join("usr/lib/nvml-sim/machine.json");
    let mut config: serde_json::Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    for (index, bus) in [0xc7, 0x0f, 0x4e].into_iter().enumerate() {
        config["gpus"][index]["bus"] = bus.into();
    }
    std::fs::write(&file, config.to_string()).unwrap();

    let gpu = machine.gpu();
    let devices = gpu.devices().unwrap();
    let told: Vec<_> = devices.iter().map(|d| (d.pci_bus_id.as_str(), d.index, d.minor, d.name.as_str())).collect();
    assert_eq!(
        told,
        [
            ("00000000:0F:00.0", 1, 2, "NVIDIA H100 80GB HBM3"),
            ("00000000:4E:00.0", 2, 0, "NVIDIA A30"),
            ("00000000:C7:00.0", 0, 1, "NVIDIA A100-SXM4-80GB"),
        ]
    );
    assert!(devices.iter().all(|d| d.uuid.starts_with("GPU-") && d.mig == MigMode::On && d.instances.is_empty()));
    assert_eq!(gpu.driver_version().unwrap(), "580.95.05");
}

#[test]
fn profiles_are_the_drivers_without_its_prefix() {
    let machine = Machine::with(&["a100-sxm4-80gb"]);
    let device = only(&machine.gpu());

    let mut names: Vec<&str> = device.profiles.iter().map(|p| p.name.as_str()).collect();
    names.sort_unstable();
    assert_eq!(names, ["1g.10gb", "1g.10gb+me", "1g.20gb", "2g.20gb", "3g.40gb", "4g.40gb", "7g.80gb"]);
    let half = named(&device, "3g.40gb");
    assert_eq!((half.id, half.slices, half.memory_mib, half.sms, half.max_instances), (ProfileId(9), 3, 40192, 42, 2));
    assert_eq!(half.placements, [Placement { start: 0, size: 4 }, Placement { start: 4, size: 4 }]);
}

#[test]
fn every_offered_placement_takes_a_slice_and_gives_it_back() {
    let machine = Machine::with(&["a100-sxm4-80gb", "h100-sxm-80gb", "a30-24gb", "rtx-pro-6000-blackwell-se"]);
    let gpu = machine.gpu();
    for device in gpu.devices().unwrap() {
        let uuid = device.uuid.as_str();
        for profile in &device.profiles {
            assert!(profile.placements.is_sorted(), "{profile:?}");
            for at in &profile.placements {
                let made = gpu.create_instance(uuid, profile.id, *at).unwrap();
                assert_eq!((made.profile, made.placement, made.compute.len()), (profile.id, *at, 0));
                assert_eq!(gpu.instances(uuid).unwrap(), slice::from_ref(&made), "a half-made slice must be seen");

                let compute = gpu.create_compute(uuid, made.id, None).unwrap();
                assert!(compute.uuid.starts_with("MIG-"), "{compute:?}");
                let whole = Instance { compute: vec![compute.clone()], ..made };
                assert_eq!(gpu.instances(uuid).unwrap(), slice::from_ref(&whole));
                assert!(gpu.devices().unwrap().iter().any(|d| d.uuid == uuid && d.instances == [whole.clone()]));

                gpu.destroy_compute(uuid, whole.id, compute.id).unwrap();
                assert_eq!(gpu.instances(uuid).unwrap()[0].compute, []);
                gpu.destroy_instance(uuid, whole.id).unwrap();
                assert_eq!(gpu.instances(uuid).unwrap(), []);
            }
        }
    }
}

#[test]
fn a_full_gpu_lists_every_instance_in_id_order() {
    let machine = Machine::with(&["h100-sxm-80gb"]);
    let gpu = machine.gpu();
    let device = only(&gpu);
    for start in (0..7).rev() {
        let made = cut(&gpu, &device, "1g.10gb", start).unwrap();
        gpu.create_compute(&device.uuid, made.id, None).unwrap();
    }

    let instances = gpu.instances(&device.uuid).unwrap();
    assert_eq!(instances.len(), 7);
    assert!(instances.is_sorted_by(|a, b| a.id < b.id), "{instances:?}");
    let mut uuids: Vec<&str> = instances.iter().flat_map(|i| &i.compute).map(|c| c.uuid.as_str()).collect();
    uuids.sort_unstable();
    uuids.dedup();
    assert_eq!(uuids.len(), 7);
}

#[test]
fn taken_room_is_no_room() {
    let machine = Machine::with(&["a100-sxm4-80gb"]);
    let gpu = machine.gpu();
    let device = only(&gpu);
    let made = cut(&gpu, &device, "2g.20gb", 2).unwrap();

    for (profile, start) in [("2g.20gb", 2), ("1g.10gb", 3), ("1g.10gb", 2), ("3g.40gb", 0), ("7g.80gb", 0)] {
        let refused = cut(&gpu, &device, profile, start).unwrap_err();
        assert!(matches!(refused, GpuError::NoRoom { .. }), "{profile} at {start}: {refused}");
    }
    cut(&gpu, &device, "1g.10gb+me", 0).unwrap();
    let second = cut(&gpu, &device, "1g.10gb+me", 1).unwrap_err();
    assert!(matches!(second, GpuError::NoRoom { .. }), "only one +me may exist: {second}");

    gpu.create_compute(&device.uuid, made.id, None).unwrap();
    let second = gpu.create_compute(&device.uuid, made.id, None).unwrap_err();
    assert!(matches!(second, GpuError::NoRoom { .. }), "the first one fills the instance: {second}");
}

#[test]
fn an_instance_is_in_use_while_it_has_a_compute_instance() {
    let machine = Machine::with(&["a100-sxm4-80gb"]);
    let gpu = machine.gpu();
    let device = only(&gpu);
    let made = cut(&gpu, &device, "3g.40gb", 4).unwrap();
    let compute = gpu.create_compute(&device.uuid, made.id, None).unwrap();

    let refused = gpu.destroy_instance(&device.uuid, made.id).unwrap_err();
    assert!(matches!(refused, GpuError::InUse { call: "nvmlGpuInstanceDestroy" }), "{refused}");
    gpu.destroy_compute(&device.uuid, made.id, compute.id).unwrap();
    gpu.destroy_instance(&device.uuid, made.id).unwrap();
}

#[test]
fn what_is_gone_is_not_found() {
    let machine = Machine::with(&["a100-sxm4-80gb"]);
    let gpu = machine.gpu();
    let device = only(&gpu);
    let uuid = device.uuid.as_str();
    let made = cut(&gpu, &device, "1g.10gb", 0).unwrap();
    let compute = gpu.create_compute(uuid, made.id, None).unwrap();
    gpu.destroy_compute(uuid, made.id, compute.id).unwrap();

    let not_found = |error| matches!(error, GpuError::NotFound { .. });
    assert!(not_found(gpu.destroy_compute(uuid, made.id, compute.id).unwrap_err()));
    gpu.destroy_instance(uuid, made.id).unwrap();
    assert!(not_found(gpu.destroy_instance(uuid, made.id).unwrap_err()));
    assert!(not_found(gpu.destroy_compute(uuid, made.id, compute.id).unwrap_err()));
    assert!(not_found(gpu.create_compute(uuid, made.id, None).unwrap_err()));
    for gone in ["GPU-00000000-0000-0000-0000-000000000000", "GPU-\0"] {
        assert!(not_found(gpu.instances(gone).unwrap_err()), "{gone:?}");
    }
}

#[test]
fn a_slice_made_again_has_its_uuid_again() {
    let machine = Machine::with(&["a100-sxm4-80gb"]);
    let make_and_destroy = |start| {
        let gpu = machine.gpu();
        let device = only(&gpu);
        let made = cut(&gpu, &device, "1g.10gb", start).unwrap();
        let compute = gpu.create_compute(&device.uuid, made.id, None).unwrap();
        gpu.destroy_compute(&device.uuid, made.id, compute.id).unwrap();
        gpu.destroy_instance(&device.uuid, made.id).unwrap();
        (made.id, compute.uuid)
    };

    let first = make_and_destroy(3);
    assert_eq!(make_and_destroy(3), first);
    assert_ne!(make_and_destroy(4).1, first.1);
}

#[test]
fn one_reader_sees_what_another_made() {
    let machine = Machine::with(&["a100-sxm4-80gb"]);
    let (maker, reader) = (machine.gpu(), machine.gpu());
    let device = only(&reader);
    let made = cut(&maker, &device, "1g.10gb", 6).unwrap();
    assert_eq!(reader.instances(&device.uuid).unwrap(), slice::from_ref(&made));
    maker.destroy_instance(&device.uuid, made.id).unwrap();
    assert_eq!(reader.instances(&device.uuid).unwrap(), []);
}

#[test]
fn the_whole_of_a_hopper_double_memory_slice_is_compute_profile_7() {
    let machine = Machine::with(&["h100-sxm-80gb"]);
    let gpu = machine.gpu();
    let device = only(&gpu);
    let made = cut(&gpu, &device, "1g.20gb", 2).unwrap();
    gpu.create_compute(&device.uuid, made.id, None).unwrap();
    let shown: serde_json::Value = serde_json::from_str(&machine.sim(&["show", "--json"])).unwrap();
    assert_eq!(shown["gpus"][0]["gpu_instances"][0]["compute_instances"][0]["profile_id"], 7);
}

#[test]
fn slices_of_other_tools_are_listed_too() {
    let machine = Machine::with(&["a100-sxm4-80gb"]);
    let gpu = machine.gpu();
    let device = only(&gpu);
    machine.sim(&["make", "--gpu", "0", "--profile", "3g.40gb", "--start", "4"]);
    machine.sim(&["make", "--gpu", "0", "--profile", "2g.20gb", "--start", "0", "--no-ci"]);
    let found = gpu.instances(&device.uuid).unwrap();
    let found: Vec<_> = found.iter().map(|i| (i.profile, i.placement.to_string(), i.compute.len())).collect();
    let (half, quarter) = (named(&device, "3g.40gb").id, named(&device, "2g.20gb").id);
    assert_eq!(found, [(half, "4:4".to_owned(), 1), (quarter, "0:2".to_owned(), 0)]);
}

#[test]
fn with_mig_off_nothing_is_offered_and_nothing_can_be_made() {
    let machine = Machine::created(&["h100-sxm-80gb"], &["--mig", "off"]);
    let gpu = machine.gpu();
    let device = only(&gpu);
    assert_eq!((device.mig, device.profiles.len(), device.instances.len()), (MigMode::Off, 0, 0));
    assert_eq!(gpu.instances(&device.uuid).unwrap(), []);
    let refused = gpu.create_instance(&device.uuid, ProfileId(19), Placement { start: 0, size: 1 }).unwrap_err();
    assert!(matches!(refused, GpuError::Driver { code: 3, .. }), "{refused}");

    machine.sim(&["mode", "--gpu", "0", "on"]);
    let device = only(&gpu);
    assert_eq!(device.mig, MigMode::On);
    cut(&gpu, &device, "1g.10gb", 0).unwrap();
}

#[test]
fn a_mode_that_waits_for_a_reset_changes_nothing_yet() {
    let machine = Machine::created(&["a100-sxm4-80gb"], &["--mig", "off"]);
    let gpu = machine.gpu();
    machine.sim(&["mode", "--gpu", "0", "on"]);
    let waiting = only(&gpu);
    assert_eq!((waiting.mig, waiting.profiles.len()), (MigMode::EnablePending, 0));
    machine.sim(&["reset", "--gpu", "0"]);
    assert_eq!(only(&gpu).mig, MigMode::On);
    machine.sim(&["mode", "--gpu", "0", "off"]);
    let waiting = only(&gpu);
    assert_eq!((waiting.mig, waiting.profiles.len()), (MigMode::DisablePending, 7));
}

#[test]
fn a_busy_instance_is_in_use_and_its_listed_processes_are_told() {
    let machine = Machine::with(&["a100-sxm4-80gb"]);
    let gpu = machine.gpu();
    let device = only(&gpu);
    let uuid = device.uuid.as_str();
    let made = cut(&gpu, &device, "1g.10gb", 0).unwrap();
    let compute = gpu.create_compute(uuid, made.id, None).unwrap();
    assert_eq!(gpu.processes(uuid).unwrap(), []);

    let gi = made.id.to_string();
    machine.sim(&["hold", "--gpu", "0", "--gi", &gi]);
    assert_eq!(gpu.processes(uuid).unwrap(), [], "a monitoring agent is not listed");
    let refused = gpu.destroy_compute(uuid, made.id, compute.id).unwrap_err();
    assert!(matches!(refused, GpuError::InUse { .. }), "{refused}");

    for pid in 1000..1070 {
        machine.sim(&["hold", "--gpu", "0", "--gi", &gi, "--pid", &pid.to_string()]);
    }
    let listed = gpu.processes(uuid).unwrap();
    assert_eq!(listed.len(), 70, "more than fit the first buffer");
    assert!(listed.iter().zip(1000..).all(|(p, pid)| p.pid == pid && p.instance == Some(made.id)), "{listed:?}");

    machine.sim(&["unhold", "--gpu", "0", "--gi", &gi]);
    gpu.destroy_compute(uuid, made.id, compute.id).unwrap();
    gpu.destroy_instance(uuid, made.id).unwrap();
}

#[test]
fn mig_devices_are_told_in_index_order_with_what_they_have() {
    let machine = Machine::with(&["h100-sxm-80gb"]);
    let gpu = machine.gpu();
    let uuid = only(&gpu).uuid;
    assert_eq!(gpu.mig_devices(&uuid).unwrap(), []);
    let device = only(&gpu);
    let small = cut(&gpu, &device, "1g.20gb", 0).unwrap();
    let large = cut(&gpu, &device, "3g.40gb", 4).unwrap();
    let small_uuid = gpu.create_compute(&uuid, small.id, None).unwrap().uuid;
    let large_uuid = gpu.create_compute(&uuid, large.id, None).unwrap().uuid;
    let listed: Vec<_> = gpu.mig_devices(&uuid).unwrap().into_iter().map(|d| (d.index, d.profile, d.uuid)).collect();
    // By instance id: the upper half of this GPU carries id 2, its first quarter 3.
    let expected = [(0, "3g.40gb".to_owned(), large_uuid), (1, "1g.20gb".to_owned(), small_uuid.clone())];
    assert_eq!(listed, expected);

    let reading = gpu.reading(&small_uuid).unwrap();
    let profile = named(&device, "1g.20gb");
    assert_eq!((reading.sms, reading.memory_total_mib), (Some(profile.sms), Some(profile.memory_mib)));
    assert!(reading.engines.is_some_and(|engines| engines.copy > 0), "{reading:?}");
    assert_eq!((reading.ecc, reading.persistence), (None, None), "these are the whole GPU's");
    let whole = gpu.reading(&uuid).unwrap();
    assert_eq!((whole.sms, whole.engines), (None, None), "these are a MIG device's");
    assert!(whole.memory_total_mib > reading.memory_total_mib && whole.persistence.is_some(), "{whole:?}");
    assert!(matches!(gpu.reading("GPU-0"), Err(GpuError::NotFound { .. })));
}

#[test]
fn readings_tell_what_runs_and_nothing_that_the_driver_does_not_tell() {
    let machine = Machine::with(&["h100-sxm-80gb", "a100-sxm4-80gb"]);
    let gpu = machine.gpu();
    let devices = gpu.devices().unwrap();
    let made = devices.iter().map(|device| {
        let made = cut(&gpu, device, "1g.10gb", 0).unwrap();
        let uuid = gpu.create_compute(&device.uuid, made.id, None).unwrap().uuid;
        let index = device.index.to_string();
        let (figures, id) = (["--memory", "700", "--sm", "60", "--dram", "20", "--ecc", "2"], made.id.to_string());
        machine.sim(&[&["load", "--gpu", &index, "--gi", &id][..], &figures].concat());
        machine.sim(&["hold", "--gpu", &index, "--gi", &id, "--pid", "77", "--memory", "300"]);
        (made.id, uuid)
    });
    let made: Vec<(u32, String)> = made.collect();
    for (device, (instance, uuid)) in devices.iter().zip(&made) {
        let reading = gpu.reading(uuid).unwrap();
        assert_eq!((reading.memory_used_mib, reading.ecc_errors), (Some(1000), Some(2)));
        let whole = gpu.reading(&device.uuid).unwrap();
        assert_eq!((whole.memory_used_mib, whole.ecc_errors, whole.ecc), (Some(1000), None, Some(true)));
        let held = GpuProcess { pid: 77, instance: Some(*instance), compute: Some(0), memory_mib: Some(300) };
        assert_eq!(gpu.processes(&device.uuid).unwrap(), [held]);
    }

    let hopper = devices.iter().position(|device| device.name.contains("H100")).unwrap();
    let sample = |at: usize| gpu.sample(&devices[at].uuid, made[at].0).unwrap();
    let (before, after) = (sample(hopper).unwrap(), sample(hopper).unwrap());
    let busy = Utilisation { sm: Some(60.0), graphics: Some(60.0), dram: Some(20.0) };
    assert_eq!(gpu.utilisation(&before, &after).unwrap(), busy);
    assert!(sample(1 - hopper).is_none(), "Ampere has no such counters");
    assert!(gpu.sample(&devices[hopper].uuid, 1).unwrap().is_none(), "nor has an instance that is not there");
    // Every buffer is given back.
    machine.sim(&["count", "on"]);
    drop((sample(hopper), before, after));
    let counts: serde_json::Value = serde_json::from_str(&machine.sim(&["counts", "--json"])).unwrap();
    assert_eq!((&counts["nvmlGpmSampleAlloc"], &counts["nvmlGpmSampleFree"]), (&1.into(), &3.into()));

    // What one driver can't, or does not tell this user, is unknown, not an error and not 0.
    let uuid = &made[hopper].1;
    for (call, code) in [("nvmlDeviceGetMemoryInfo*", "NOT_SUPPORTED"), ("nvmlDeviceGetAttributes_v2", "NO_PERMISSION")]
    {
        machine.fault(call, code);
    }
    let reading = gpu.reading(uuid).unwrap();
    assert_eq!(reading, Reading { ecc_errors: Some(2), ..Reading::default() });
    machine.fault("nvmlDeviceGetMemoryErrorCounter", "GPU_IS_LOST");
    assert!(matches!(gpu.reading(uuid), Err(GpuError::Lost { .. })));
}

#[test]
fn errors_keep_their_meaning() {
    let machine = Machine::with(&["a100-sxm4-80gb"]);
    let gpu = machine.gpu();
    let device = only(&gpu);
    let made = cut(&gpu, &device, "1g.10gb", 0).unwrap();
    let destroy = |code| {
        machine.sim(&["fault", "--call", "nvmlGpuInstanceDestroy", "--fail", code]);
        gpu.destroy_instance(&device.uuid, made.id).unwrap_err()
    };
    assert!(matches!(destroy("IN_USE"), GpuError::InUse { call: "nvmlGpuInstanceDestroy" }));
    assert!(matches!(destroy("NO_PERMISSION"), GpuError::NoPermission { .. }));
    assert!(matches!(destroy("GPU_IS_LOST"), GpuError::Lost { .. }));
    assert!(matches!(destroy("INSUFFICIENT_RESOURCES"), GpuError::NoRoom { .. }));
    assert_eq!(
        destroy("TIMEOUT").to_string(),
        "nvmlGpuInstanceDestroy: Timeout (NVML error 10); the driver may say more: dmesg | grep -i nvrm"
    );
    gpu.destroy_instance(&device.uuid, made.id).unwrap();
}

#[test]
fn what_cannot_be_described_is_not_left_behind() {
    let machine = Machine::with(&["a100-sxm4-80gb"]);
    let gpu = machine.gpu();
    let device = only(&gpu);
    machine.sim(&["fault", "--call", "nvmlGpuInstanceGetInfo", "--fail", "UNKNOWN"]);
    cut(&gpu, &device, "1g.10gb", 0).unwrap_err();
    assert_eq!(gpu.instances(&device.uuid).unwrap(), []);

    let made = cut(&gpu, &device, "1g.10gb", 0).unwrap();
    machine.sim(&["fault", "--call", "nvmlComputeInstanceGetInfo_v2", "--fail", "UNKNOWN"]);
    gpu.create_compute(&device.uuid, made.id, None).unwrap_err();
    assert_eq!(gpu.instances(&device.uuid).unwrap(), [made]);
}

#[test]
fn an_instance_that_goes_while_it_is_listed_is_left_out() {
    let machine = Machine::with(&["a100-sxm4-80gb"]);
    let gpu = machine.gpu();
    let device = only(&gpu);
    cut(&gpu, &device, "1g.10gb", 0).unwrap();
    let stays = cut(&gpu, &device, "2g.20gb", 2).unwrap();
    for code in ["NOT_FOUND", "INVALID_ARGUMENT"] {
        machine.sim(&["fault", "--call", "nvmlGpuInstanceGetInfo", "--fail", code]);
        assert_eq!(gpu.instances(&device.uuid).unwrap(), slice::from_ref(&stays));
    }
    assert_eq!(gpu.instances(&device.uuid).unwrap().len(), 2);
}

#[test]
fn a_lost_gpu_does_not_take_the_others_with_it() {
    let machine = Machine::with(&["a100-sxm4-80gb", "a30-24gb"]);
    let calls = ["nvmlDeviceGetHandleByIndex_v2", "nvmlDeviceGetUUID", "nvmlDeviceGetGpuInstances"];
    for (call, code) in calls.into_iter().zip(["GPU_IS_LOST", "RESET_REQUIRED", "UNKNOWN"]) {
        machine.sim(&["fault", "--call", call, "--fail", code]);
        let gpu = machine.gpu();
        let left = gpu.devices().unwrap();
        assert_eq!(left.iter().map(|d| d.index).collect::<Vec<_>>(), [1], "{call}");
        let out = gpu.left_out();
        assert!(matches!(out.as_slice(), [(0, why)] if why.contains(call)), "{out:?}");
        gpu.devices().unwrap();
        assert_eq!(gpu.left_out(), [], "of the last look");
    }
    machine.fault("nvmlDeviceGetHandleByIndex_v2", "GPU_IS_LOST");
    let error = machine.gpu().devices().unwrap_err();
    assert!(matches!(error, GpuError::Lost { .. }), "{error}");
}

#[test]
fn a_user_sees_gpus_and_profiles_but_no_placements_and_instances() {
    let machine = Machine::with(&["a100-sxm4-80gb"]);
    machine.sim(&["make", "--gpu", "0", "--profile", "1g.10gb"]);
    for call in ["nvmlDeviceGetGpuInstancePossiblePlacements_v2", "nvmlDeviceGetGpuInstances"] {
        machine.fault(call, "NO_PERMISSION");
    }
    let gpu = machine.gpu();
    let device = only(&gpu);
    assert_eq!((device.profiles.len(), device.instances.len()), (7, 0));
    assert!(device.profiles.iter().all(|p| p.placements.is_empty()));
    let refused = gpu.instances(&device.uuid).unwrap_err();
    assert!(
        matches!(refused, GpuError::NoPermission { .. }),
        "the engine must not take that for an empty GPU: {refused}"
    );
    assert!(device.is_closed());
    // What everybody may ask: the instance behind a UUID, without its place.
    let shown: serde_json::Value = serde_json::from_str(&machine.sim(&["show", "--json"])).unwrap();
    let made = &shown["gpus"][0]["gpu_instances"][0];
    let uuid = made["compute_instances"][0]["uuid"].as_str().unwrap();
    let (parent, instance) = gpu.instance_of(uuid).unwrap().unwrap();
    assert_eq!((&parent, instance.placement), (&device.uuid, Placement::UNKNOWN));
    assert_eq!((instance.id.into(), &instance.compute[0].uuid), (made["id"].as_u64().unwrap(), &uuid.to_owned()));
    assert_eq!(device.profile(instance.profile).unwrap().name, "1g.10gb");
    assert_eq!(gpu.instance_of("MIG-00000000-0000-5000-8000-000000000000").unwrap(), None);
}

#[test]
fn older_drivers_offer_the_same_names() {
    let boards = ["a100-sxm4-40gb", "h100-pcie-80gb", "a30-24gb", "rtx-pro-6000-blackwell-se"];
    let machine = Machine::with(&boards);
    let names = || -> Vec<Vec<String>> {
        let devices = machine.gpu().devices().unwrap();
        devices.into_iter().map(|d| d.profiles.into_iter().map(|p| p.name).collect()).collect()
    };
    let reported = names();
    for refusal in ["INVALID_ARGUMENT", "FUNCTION_NOT_FOUND", "ARGUMENT_VERSION_MISMATCH"] {
        machine.sim(&["clear-faults"]);
        machine.fault("nvmlDeviceGetGpuInstanceProfileInfoV", refusal);
        assert_eq!(names(), reported, "{refusal}");
    }
}

#[test]
fn reading_an_empty_machine_stays_cheap() {
    let machine = Machine::with(&["a100-sxm4-80gb", "a100-sxm4-80gb"]);
    let gpu = machine.gpu();
    gpu.driver_version().unwrap();
    // The number of GPUs; for each: 6 of its identity, 32 profile indices, 7 offered profiles' placements and instances.
    assert_eq!(counted(&machine, || drop(gpu.devices().unwrap())), 1 + 2 * (6 + 32 + 7 + 7));
    assert_eq!(counted(&machine, || drop(gpu.devices().unwrap())), 1 + 2 * (6 + 7), "offers are read once");
}

#[test]
fn a_library_that_is_not_there_is_named_with_the_reason() {
    let error = Nvml::at("/nonexistent/libnvidia-ml.so.1").devices().unwrap_err();
    assert!(matches!(&error, GpuError::Library { path, .. } if path == "/nonexistent/libnvidia-ml.so.1"), "{error}");
    assert!(error.to_string().contains("No such file"), "{error}");
}

#[test]
fn a_file_that_is_no_library_is_named_with_the_reason() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("libnvidia-ml.so.1");
    std::fs::write(&path, "#!/bin/sh\n").unwrap();
    let error = Nvml::at(&path).devices().unwrap_err();
    assert!(matches!(&error, GpuError::Library { reason, .. } if reason.contains("file too short")), "{error}");
}
