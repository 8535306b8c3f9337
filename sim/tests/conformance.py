"""Drives the simulated library through NVIDIA's own Python bindings (PyPI nvidia-ml-py).

Run with LD_LIBRARY_PATH at the library of a fresh machine of two GPUs, an A100 80GB and an H100 SXM, MIG on.
"""

import pynvml as nv


def fails(code, call, *args):
    try:
        call(*args)
    except nv.NVMLError as error:
        assert error.value == code, f"{call.__name__}: {error} instead of {code}"
    else:
        raise AssertionError(f"{call.__name__} succeeded, {code} expected")


fails(nv.NVML_ERROR_UNINITIALIZED, nv.nvmlDeviceGetCount)
nv.nvmlInit()
assert nv.nvmlSystemGetDriverVersion() == "580.95.05"
assert nv.nvmlSystemGetCudaDriverVersion() == 13000
assert nv.nvmlDeviceGetCount() == 2
a100, h100 = (nv.nvmlDeviceGetHandleByIndex(index) for index in range(2))
assert nv.nvmlDeviceGetName(a100) == "NVIDIA A100-SXM4-80GB"
assert nv.nvmlDeviceGetUUID(a100).startswith("GPU-")
assert nv.nvmlDeviceGetMigMode(a100) == [1, 1]
assert nv.nvmlDeviceGetMaxMigDeviceCount(a100) == 7
assert nv.nvmlDeviceGetMemoryInfo(a100).total == 81920 << 20
assert nv.nvmlDeviceGetMemoryInfo(a100, version=nv.nvmlMemory_v2).total == 81920 << 20
pci = nv.nvmlDeviceGetPciInfo(a100)
assert pci.busId == "00000000:07:00.0" and pci.busIdLegacy == "0000:07:00.0", pci
by_bus = nv.nvmlDeviceGetHandleByPciBusId(pci.busId)
assert nv.nvmlDeviceGetUUID(by_bus) == nv.nvmlDeviceGetUUID(a100)
assert nv.nvmlDeviceGetIndex(nv.nvmlDeviceGetHandleByUUID(nv.nvmlDeviceGetUUID(h100))) == 1

# The enum index and the driver id are two number spaces.
profiles = {}
for index in range(nv.NVML_GPU_INSTANCE_PROFILE_COUNT):
    try:
        info = nv.nvmlDeviceGetGpuInstanceProfileInfo(a100, index, version=2)
    except nv.NVMLError as error:
        assert error.value == nv.NVML_ERROR_NOT_SUPPORTED
        continue
    name = info.name.decode() if isinstance(info.name, bytes) else info.name
    profiles[name] = info
assert {name: info.id for name, info in profiles.items()} == {
    "MIG 1g.10gb": 19, "MIG 2g.20gb": 14, "MIG 3g.40gb": 9, "MIG 4g.40gb": 5, "MIG 7g.80gb": 0,
    "MIG 1g.10gb+me": 20, "MIG 1g.20gb": 15,
}, profiles
assert profiles["MIG 3g.40gb"].memorySizeMB == 40192
fails(nv.NVML_ERROR_INVALID_ARGUMENT, nv.nvmlDeviceGetGpuInstanceProfileInfo, a100, 99)

count = nv.c_uint()
nv.nvmlDeviceGetGpuInstancePossiblePlacements(a100, 9, None, nv.byref(count))
assert count.value == 2
room = (nv.c_nvmlGpuInstancePlacement_t * count.value)()
nv.nvmlDeviceGetGpuInstancePossiblePlacements(a100, 9, room, nv.byref(count))
assert [(place.start, place.size) for place in room] == [(0, 4), (4, 4)]
assert nv.nvmlDeviceGetGpuInstanceRemainingCapacity(a100, 19) == 7

gi = nv.nvmlDeviceCreateGpuInstance(a100, 9)
about = nv.nvmlGpuInstanceGetInfo(gi)
assert (about.profileId, about.placement.start, about.placement.size) == (9, 4, 4)
assert nv.nvmlDeviceGetGpuInstanceRemainingCapacity(a100, 9) == 1
fails(nv.NVML_ERROR_NOT_FOUND, nv.nvmlDeviceGetMigDeviceHandleByIndex, a100, 0)
whole = nv.nvmlGpuInstanceGetComputeInstanceProfileInfo(
    gi, nv.NVML_COMPUTE_INSTANCE_PROFILE_3_SLICE, nv.NVML_COMPUTE_INSTANCE_ENGINE_PROFILE_SHARED, version=2
)
assert (whole.id, whole.sliceCount, whole.multiprocessorCount) == (2, 3, 42)
ci = nv.nvmlGpuInstanceCreateComputeInstance(gi, whole.id)
mig = nv.nvmlComputeInstanceGetInfo(ci).device
uuid = nv.nvmlDeviceGetUUID(mig)
assert uuid.startswith("MIG-") and uuid[18] == "5", uuid
assert nv.nvmlDeviceGetName(mig) == "NVIDIA A100-SXM4-80GB MIG 3g.40gb"
assert nv.nvmlDeviceIsMigDeviceHandle(mig).value == 1
assert nv.nvmlDeviceGetGpuInstanceId(mig) == about.id
assert nv.nvmlDeviceGetComputeInstanceId(mig) == 0
assert nv.nvmlDeviceGetAttributes(mig).memorySizeMB == 40192
assert nv.nvmlDeviceGetMemoryInfo(mig).total == 40192 << 20
assert nv.nvmlDeviceGetUUID(nv.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(mig)) == nv.nvmlDeviceGetUUID(a100)
assert nv.nvmlDeviceGetUUID(nv.nvmlDeviceGetHandleByUUID(uuid)) == uuid
assert nv.nvmlDeviceGetUUID(nv.nvmlDeviceGetMigDeviceHandleByIndex(a100, 0)) == uuid
assert nv.nvmlDeviceGetComputeRunningProcesses(a100) == []

fails(nv.NVML_ERROR_IN_USE, nv.nvmlGpuInstanceDestroy, gi)
nv.nvmlComputeInstanceDestroy(ci)
nv.nvmlGpuInstanceDestroy(gi)
fails(nv.NVML_ERROR_INVALID_ARGUMENT, nv.nvmlGpuInstanceGetInfo, gi)
fails(nv.NVML_ERROR_NOT_FOUND, nv.nvmlDeviceGetHandleByUUID, uuid)

# Seven singles in the driver's own order.
singles = [nv.nvmlDeviceCreateGpuInstance(a100, 19) for _ in range(7)]
assert [nv.nvmlGpuInstanceGetInfo(single).id for single in singles] == [13, 11, 12, 7, 8, 9, 10]
fails(nv.NVML_ERROR_INSUFFICIENT_RESOURCES, nv.nvmlDeviceCreateGpuInstance, a100, 19)
buffer = (nv.c_nvmlGpuInstance_t * 7)()
nv.nvmlDeviceGetGpuInstances(a100, 19, buffer, nv.byref(count))
assert count.value == 7
for single in singles:
    nv.nvmlGpuInstanceDestroy(single)

# Hopper: the double-memory single has compute profile 7, and the mode changes at once.
gi = nv.nvmlDeviceCreateGpuInstance(h100, 15)
info = nv.nvmlGpuInstanceGetComputeInstanceProfileInfo(gi, 7, 0, version=2)
assert (info.id, info.multiprocessorCount) == (7, 26)
nv.nvmlGpuInstanceDestroy(gi)
assert nv.nvmlDeviceSetMigMode(h100, 0) == 0
assert nv.nvmlDeviceGetMigMode(h100) == [0, 0]
assert nv.nvmlDeviceGetMaxMigDeviceCount(h100) == 0
fails(nv.NVML_ERROR_NOT_SUPPORTED, nv.nvmlDeviceCreateGpuInstance, h100, 19)
assert nv.nvmlDeviceSetMigMode(h100, 1) == 0

nv.nvmlShutdown()
fails(nv.NVML_ERROR_UNINITIALIZED, nv.nvmlDeviceGetCount)
print("nvidia-ml-py", getattr(nv, "__version__", "?"), "agrees")
