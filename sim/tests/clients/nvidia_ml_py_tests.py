"""The life of MIG instances through NVIDIA's own Python bindings, on an A100 80GB and an H100 SXM with MIG on."""

import os
import uuid

import pynvml as nv
from machine import DIR, raises, run, same, sim

SINGLES = [13, 11, 12, 7, 8, 9, 10]


def before():
    for gpu in range(2):
        sim("mode", "--gpu", gpu, "on")
        sim("reset", "--gpu", gpu)
    sim("clear-faults", "--all")
    nv.nvmlInit()


def gpu(index=0):
    return nv.nvmlDeviceGetHandleByIndex(index)


def fails(code, call, *args):
    same(raises(nv.NVMLError, call, *args).value, code)


def text(name):
    return name.decode() if isinstance(name, bytes) else name


def placements(device, profile):
    count = nv.c_uint()
    nv.nvmlDeviceGetGpuInstancePossiblePlacements(device, profile, None, nv.byref(count))
    room = (nv.c_nvmlGpuInstancePlacement_t * count.value)()
    nv.nvmlDeviceGetGpuInstancePossiblePlacements(device, profile, room, nv.byref(count))
    return [(place.start, place.size) for place in room]


def cut(device, profile, compute=0):
    """A GPU instance with a compute instance, and its MIG device."""
    gi = nv.nvmlDeviceCreateGpuInstance(device, profile)
    ci = nv.nvmlGpuInstanceCreateComputeInstance(gi, compute)
    return gi, ci, nv.nvmlComputeInstanceGetInfo(ci).device


def test_nothing_answers_before_init():
    while True:
        try:
            nv.nvmlShutdown()
        except nv.NVMLError:
            break
    fails(nv.NVML_ERROR_UNINITIALIZED, nv.nvmlDeviceGetCount)


def test_driver_and_inventory():
    same(nv.nvmlSystemGetDriverVersion(), "580.95.05")
    same(nv.nvmlSystemGetNVMLVersion(), "13.580.95.05")
    same(nv.nvmlSystemGetCudaDriverVersion(), 13000)
    same(nv.nvmlDeviceGetCount(), 2)
    same([nv.nvmlDeviceGetName(gpu(index)) for index in range(2)], ["NVIDIA A100-SXM4-80GB", "NVIDIA H100 80GB HBM3"])
    same(nv.nvmlDeviceGetMemoryInfo(gpu()).total, 81920 << 20)
    same(nv.nvmlDeviceGetMemoryInfo(gpu(), version=nv.nvmlMemory_v2).total, 81920 << 20)
    same(nv.nvmlDeviceGetMinorNumber(gpu(1)), 1)


def test_handles_by_bus_and_uuid():
    pci = nv.nvmlDeviceGetPciInfo(gpu())
    same((pci.busId, pci.busIdLegacy), ("00000000:07:00.0", "0000:07:00.0"))
    same(nv.nvmlDeviceGetIndex(nv.nvmlDeviceGetHandleByPciBusId(pci.busId)), 0)
    same(nv.nvmlDeviceGetIndex(nv.nvmlDeviceGetHandleByUUID(nv.nvmlDeviceGetUUID(gpu(1)))), 1)
    fails(nv.NVML_ERROR_NOT_FOUND, nv.nvmlDeviceGetHandleByUUID, f"GPU-{uuid.UUID(int=1)}")


def test_mode_of_ampere_waits_for_a_reset():
    same(nv.nvmlDeviceGetMigMode(gpu()), [1, 1])
    same(nv.nvmlDeviceSetMigMode(gpu(), 0), nv.NVML_ERROR_RESET_REQUIRED)
    same(nv.nvmlDeviceGetMigMode(gpu()), [1, 0])
    sim("reset", "--gpu", 0)
    same(nv.nvmlDeviceGetMigMode(gpu()), [0, 0])


def test_mode_of_hopper_changes_at_once():
    hopper = gpu(1)
    same(nv.nvmlDeviceSetMigMode(hopper, 0), 0)
    same(nv.nvmlDeviceGetMigMode(hopper), [0, 0])
    same(nv.nvmlDeviceGetMaxMigDeviceCount(hopper), 0)
    fails(nv.NVML_ERROR_NOT_SUPPORTED, nv.nvmlDeviceCreateGpuInstance, hopper, 19)
    same(nv.nvmlDeviceSetMigMode(hopper, 1), 0)
    same(nv.nvmlDeviceGetMaxMigDeviceCount(hopper), 7)


def test_mode_is_kept_by_an_instance():
    cut(gpu(1), 19)
    same(nv.nvmlDeviceSetMigMode(gpu(1), 0), nv.NVML_ERROR_IN_USE)
    same(nv.nvmlDeviceGetMigMode(gpu(1)), [1, 1])


def test_profiles_by_enum_and_by_id():
    found = {}
    for index in range(nv.NVML_GPU_INSTANCE_PROFILE_COUNT):
        try:
            info = nv.nvmlDeviceGetGpuInstanceProfileInfo(gpu(), index, version=2)
        except nv.NVMLError as error:
            same(error.value, nv.NVML_ERROR_NOT_SUPPORTED)
            continue
        found[text(info.name)] = info.id
        same(nv.nvmlDeviceGetGpuInstanceProfileInfo(gpu(), index, version=1).id, info.id)
        same(text(nv.nvmlDeviceGetGpuInstanceProfileInfoById(gpu(), info.id).name), text(info.name))
    same(found, {"MIG 1g.10gb": 19, "MIG 2g.20gb": 14, "MIG 3g.40gb": 9, "MIG 4g.40gb": 5, "MIG 7g.80gb": 0,
                 "MIG 1g.10gb+me": 20, "MIG 1g.20gb": 15})
    fails(nv.NVML_ERROR_INVALID_ARGUMENT, nv.nvmlDeviceGetGpuInstanceProfileInfo, gpu(), 99)


def test_possible_placements():
    same(placements(gpu(), 9), [(0, 4), (4, 4)])
    same(placements(gpu(), 5), [(0, 4)])
    same(placements(gpu(), 19), [(start, 1) for start in range(7)])
    fails(nv.NVML_ERROR_NOT_SUPPORTED, placements, gpu(), 999)


def test_remaining_capacity_after_a_published_capture():
    place = nv.c_nvmlGpuInstancePlacement_t(0, 4)
    nv.nvmlDeviceCreateGpuInstanceWithPlacement(gpu(), 5, nv.byref(place))
    left = [nv.nvmlDeviceGetGpuInstanceRemainingCapacity(gpu(), profile) for profile in (19, 20, 15, 14, 9, 5, 0)]
    same(left, [3, 1, 2, 1, 1, 0, 0])


def test_instances_in_the_drivers_own_order():
    made = [nv.nvmlDeviceCreateGpuInstance(gpu(), 19) for _ in range(7)]
    same([nv.nvmlGpuInstanceGetInfo(gi).id for gi in made], SINGLES)
    fails(nv.NVML_ERROR_INSUFFICIENT_RESOURCES, nv.nvmlDeviceCreateGpuInstance, gpu(), 19)
    room, count = (nv.c_nvmlGpuInstance_t * 7)(), nv.c_uint()
    nv.nvmlDeviceGetGpuInstances(gpu(), 19, room, nv.byref(count))
    same(count.value, 7)


def test_instance_at_a_place():
    place = nv.c_nvmlGpuInstancePlacement_t(2, 2)
    gi = nv.nvmlDeviceCreateGpuInstanceWithPlacement(gpu(), 14, nv.byref(place))
    about = nv.nvmlGpuInstanceGetInfo(gi)
    same((about.id, about.profileId, about.placement.start, about.placement.size), (4, 14, 2, 2))
    same(nv.nvmlDeviceGetIndex(about.device), 0)
    same(nv.nvmlGpuInstanceGetInfo(nv.nvmlDeviceGetGpuInstanceById(gpu(), 4)).placement.start, 2)
    fails(nv.NVML_ERROR_INSUFFICIENT_RESOURCES, nv.nvmlDeviceCreateGpuInstanceWithPlacement, gpu(), 14, nv.byref(place))
    wrong = nv.c_nvmlGpuInstancePlacement_t(1, 2)
    fails(nv.NVML_ERROR_INVALID_ARGUMENT, nv.nvmlDeviceCreateGpuInstanceWithPlacement, gpu(), 14, nv.byref(wrong))
    fails(nv.NVML_ERROR_NOT_FOUND, nv.nvmlDeviceGetGpuInstanceById, gpu(), 7)


def test_compute_instances_share_an_instance():
    gi = nv.nvmlDeviceCreateGpuInstance(gpu(), 9)
    whole = nv.nvmlGpuInstanceGetComputeInstanceProfileInfo(gi, nv.NVML_COMPUTE_INSTANCE_PROFILE_3_SLICE, 0, version=2)
    same((whole.id, whole.sliceCount, whole.multiprocessorCount), (2, 3, 42))
    same(nv.nvmlGpuInstanceGetComputeInstanceRemainingCapacity(gi, 0), 3)
    cis = [nv.nvmlGpuInstanceCreateComputeInstance(gi, 0) for _ in range(2)]
    same([nv.nvmlComputeInstanceGetInfo(ci).id for ci in cis], [0, 1])
    fails(nv.NVML_ERROR_INSUFFICIENT_RESOURCES, nv.nvmlGpuInstanceCreateComputeInstance, gi, 2)
    same(nv.nvmlGpuInstanceGetComputeInstanceRemainingCapacity(gi, 0), 1)
    same(nv.nvmlComputeInstanceGetInfo(nv.nvmlGpuInstanceGetComputeInstanceById(gi, 1)).id, 1)


def test_compute_instance_at_a_place():
    gi = nv.nvmlDeviceCreateGpuInstance(gpu(), 9)
    place = nv.c_nvmlComputeInstancePlacement_t(1, 1)
    ci = nv.nvmlGpuInstanceCreateComputeInstanceWithPlacement(gi, 0, nv.byref(place))
    same(nv.nvmlComputeInstanceGetInfo(ci).placement.start, 1)


def test_mig_device_of_a_compute_instance():
    fails(nv.NVML_ERROR_NOT_FOUND, nv.nvmlDeviceGetMigDeviceHandleByIndex, gpu(), 0)
    gi, _, mig = cut(gpu(), 9, 2)
    name = nv.nvmlDeviceGetUUID(mig)
    same((name[:4], uuid.UUID(name[4:]).version), ("MIG-", 5))
    same(nv.nvmlDeviceGetName(mig), "NVIDIA A100-SXM4-80GB MIG 3g.40gb")
    same((nv.nvmlDeviceIsMigDeviceHandle(mig).value, nv.nvmlDeviceIsMigDeviceHandle(gpu()).value), (1, 0))
    same(nv.nvmlDeviceGetGpuInstanceId(mig), nv.nvmlGpuInstanceGetInfo(gi).id)
    same(nv.nvmlDeviceGetComputeInstanceId(mig), 0)
    about = nv.nvmlDeviceGetAttributes(mig)
    same((about.memorySizeMB, about.multiprocessorCount, about.gpuInstanceSliceCount), (40192, 42, 3))
    same(nv.nvmlDeviceGetMemoryInfo(mig).total, 40192 << 20)
    same(nv.nvmlDeviceGetIndex(nv.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(mig)), 0)
    same(nv.nvmlDeviceGetUUID(nv.nvmlDeviceGetHandleByUUID(name)), name)
    same(nv.nvmlDeviceGetUUID(nv.nvmlDeviceGetMigDeviceHandleByIndex(gpu(), 0)), name)


def test_the_same_place_has_the_same_uuid():
    gi, ci, mig = cut(gpu(), 19)
    name = nv.nvmlDeviceGetUUID(mig)
    nv.nvmlComputeInstanceDestroy(ci)
    nv.nvmlGpuInstanceDestroy(gi)
    fails(nv.NVML_ERROR_NOT_FOUND, nv.nvmlDeviceGetHandleByUUID, name)
    same(nv.nvmlDeviceGetUUID(cut(gpu(), 19)[2]), name)


def test_double_memory_of_hopper_takes_compute_profile_7():
    gi = nv.nvmlDeviceCreateGpuInstance(gpu(1), 15)
    info = nv.nvmlGpuInstanceGetComputeInstanceProfileInfo(gi, 7, 0, version=2)
    same((info.id, info.multiprocessorCount), (7, 26))


def test_destroy_in_use_by_a_compute_instance():
    gi, ci, _ = cut(gpu(), 19)
    fails(nv.NVML_ERROR_IN_USE, nv.nvmlGpuInstanceDestroy, gi)
    nv.nvmlComputeInstanceDestroy(ci)
    nv.nvmlGpuInstanceDestroy(gi)
    fails(nv.NVML_ERROR_INVALID_ARGUMENT, nv.nvmlGpuInstanceGetInfo, gi)


def test_destroy_in_use_by_a_process():
    gi, ci, mig = cut(gpu(), 19)
    sim("hold", "--gpu", 0, "--gi", 13, "--pid", os.getpid(), "--memory", 100)
    running = nv.nvmlDeviceGetComputeRunningProcesses(mig)
    same([(one.pid, one.gpuInstanceId, one.usedGpuMemory >> 20) for one in running], [(os.getpid(), 13, 100)])
    same(len(nv.nvmlDeviceGetComputeRunningProcesses(gpu())), 1)
    fails(nv.NVML_ERROR_IN_USE, nv.nvmlComputeInstanceDestroy, ci)
    sim("unhold", "--gpu", 0, "--gi", 13)
    nv.nvmlComputeInstanceDestroy(ci)
    nv.nvmlGpuInstanceDestroy(gi)


def test_an_error_that_was_ordered():
    sim("fault", "--call", "nvmlDeviceCreateGpuInstance", "--fail", "GPU_IS_LOST")
    fails(nv.NVML_ERROR_GPU_IS_LOST, nv.nvmlDeviceCreateGpuInstance, gpu(), 19)
    nv.nvmlDeviceCreateGpuInstance(gpu(), 19)


def test_access_files_come_and_go():
    path = os.path.join(DIR, "proc/driver/nvidia/capabilities/gpu0/mig/gi13/ci0/access")
    gi, ci, _ = cut(gpu(), 19)
    same(open(path).read().split("\n")[0], "DeviceFileMinor: 121")
    nv.nvmlComputeInstanceDestroy(ci)
    nv.nvmlGpuInstanceDestroy(gi)
    assert not os.path.exists(path)


run(dict(globals()), before)
