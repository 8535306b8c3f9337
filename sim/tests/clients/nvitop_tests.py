"""nvitop's device API, on an H100 with two MIG devices, one of which a process uses, and an A100 with MIG off."""

import os

import nvitop
from machine import raises, run, same, sim
from nvitop import CudaDevice, Device, MigDevice, NA, PhysicalDevice, ResourceMetricCollector

MIB = 1 << 20


def before():
    sim("reset", "--gpu", 0)
    sim("make", "--gpu", 0, "--profile", "2g.20gb")
    sim("make", "--gpu", 0, "--profile", "1g.10gb")
    sim("hold", "--gpu", 0, "--gi", 13, "--pid", os.getpid(), "--memory", 500)


def used():
    """The MIG device with a process."""
    return MigDevice(index=(0, 1))


def test_versions():
    same((Device.driver_version(), Device.cuda_driver_version()), ("580.95.05", "13.0"))


def test_counts():
    same((Device.count(), PhysicalDevice.count(), MigDevice.count()), (2, 2, 2))


def test_devices_by_index_uuid_and_bus():
    first, second = Device.all()
    same((first.index, second.name()), (0, "NVIDIA A100-SXM4-80GB"))
    same(Device(uuid=second.uuid()).index, 1)
    same(Device(bus_id=second.bus_id()).index, 1)
    same([device.index for device in Device.from_indices([(0, 1), 1])], [(0, 1), 1])


def test_mig_mode():
    first, second = Device.all()
    same((first.mig_mode(), second.mig_mode()), ("Enabled", "Disabled"))
    same((first.is_mig_mode_enabled(), second.is_mig_mode_enabled()), (True, False))
    same((first.max_mig_device_count(), second.max_mig_device_count()), (7, 0))


def test_mig_devices():
    devices = Device(0).mig_devices()
    board = "NVIDIA H100 80GB HBM3 MIG"
    told = [(mig.index, mig.gpu_instance_id(), mig.compute_instance_id(), mig.name()) for mig in devices]
    same(told, [((0, 0), 5, 0, f"{board} 2g.20gb"), ((0, 1), 13, 0, f"{board} 1g.10gb")])
    same(Device(1).mig_devices(), [])


def test_mig_device_and_its_gpu():
    mig = used()
    assert mig.uuid().startswith("MIG-") and mig.is_mig_device() and not mig.parent.is_mig_device()
    same((mig.parent.index, Device(uuid=mig.uuid()).index), (0, (0, 1)))
    same(mig.to_leaf_devices(), [mig])
    same([leaf.index for leaf in Device(0).to_leaf_devices()], [(0, 0), (0, 1)])


def test_memory():
    same((used().memory_used(), used().memory_total()), (500 * MIB, 9984 * MIB))
    same((Device(0).memory_used(), Device(1).memory_used()), (500 * MIB, 0))
    same(used().memory_percent(), 5.0)


def test_bar1_memory():
    assert used().bar1_memory_total() > 0 and Device(0).bar1_memory_total() > used().bar1_memory_total()


def test_utilization():
    sim("load", "--gpu", 1, "--sm", 75, "--dram", 40)
    same((Device(1).gpu_utilization(), Device(1).memory_utilization()), (75, 40))
    sim("load", "--gpu", 1, "--off")
    same(Device(1).gpu_utilization(), 0)
    same((Device(0).gpu_utilization(), used().gpu_utilization()), (NA, NA))


def test_clocks_power_and_temperature():
    gpu = Device(0)
    same((gpu.max_sm_clock(), gpu.memory_clock(), gpu.power_limit(), gpu.temperature()), (1980, 2619, 700_000, 30))
    same((used().sm_clock(), used().power_usage(), used().temperature()), (NA, NA, NA))


def test_modes_and_links():
    gpu = Device(0)
    same((gpu.compute_mode(), gpu.display_mode(), gpu.persistence_mode()), ("Default", "Disabled", "Enabled"))
    same((gpu.performance_state(), gpu.fan_speed()), ("P0", NA))
    same((gpu.cuda_compute_capability(), gpu.pcie_tx_throughput()), ((9, 0), 0))


def test_errors():
    sim("load", "--gpu", 1, "--ecc", 3)
    same([gpu.total_volatile_uncorrected_ecc_errors() for gpu in Device.all()], [NA, 3])
    sim("load", "--gpu", 1, "--off")


def test_processes():
    process = used().processes()[os.getpid()]
    same((process.gpu_memory(), process.type, process.pid), (500 * MIB, "C", os.getpid()))
    same((process.gpu_instance_id(), process.compute_instance_id()), (13, 0))
    assert "python" in process.command()
    same((MigDevice(index=(0, 0)).processes(), Device(1).processes()), ({}, {}))
    same(list(Device(0).processes()), [os.getpid()])


def test_snapshots():
    shown = used().as_snapshot()
    same((shown.memory_used, shown.mig_index, shown.gpu_instance_id), (500 * MIB, 1, 13))
    same([snapshot.real.index for snapshot in nvitop.take_snapshots(Device.all()).devices], [0, 1])


def test_metrics_of_a_collector():
    with ResourceMetricCollector(Device.all()).context("run") as collector:
        metrics = collector.collect()
    assert any(key.endswith("memory_used (MiB)/mean") and value >= 500 for key, value in metrics.items()), metrics


def test_cuda_visible_devices():
    os.environ["CUDA_VISIBLE_DEVICES"] = used().uuid()
    try:
        same([device.index for device in CudaDevice.from_indices()], [(0, 1)])
    finally:
        del os.environ["CUDA_VISIBLE_DEVICES"]


def test_what_is_not_there():
    raises(nvitop.libnvml.NVMLError_InvalidArgument, Device, 2)
    raises(nvitop.libnvml.NVMLError_NotFound, MigDevice, (0, 2))


run(dict(globals()), before)
