"""gpustat as a library and as a command, on an H100 with MIG on and an A100 with MIG off."""

import json
import os
import subprocess
import sys

import gpustat
from machine import run, same, sim


def before():
    sim("reset", "--gpu", 0)
    sim("make", "--gpu", 0, "--profile", "1g.10gb")
    sim("hold", "--gpu", 0, "--gi", 13, "--pid", os.getpid(), "--memory", 500)


def command(*words):
    return subprocess.run([sys.executable, "-m", "gpustat", *words], check=True, capture_output=True, text=True).stdout


def test_gpus_of_a_query():
    found = gpustat.new_query()
    same((len(found), found.driver_version), (2, "580.95.05"))
    same([gpu.name for gpu in found], ["NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB"])
    same([gpu.memory_total for gpu in found], [81559, 81920])


def test_mig_on_tells_no_utilization():
    mig, plain = gpustat.new_query()
    same((mig.utilization, plain.utilization), (None, 0))
    same((mig.utilization_enc, plain.utilization_enc), (None, 0))


def test_memory_and_processes():
    mig, plain = gpustat.new_query()
    same((mig.memory_used, [one["pid"] for one in mig.processes]), (500, [os.getpid()]))
    same((mig.processes[0]["gpu_memory_usage"], plain.memory_used, plain.processes), (500, 0, []))


def test_power_and_temperature():
    mig, plain = gpustat.new_query()
    same((mig.power_draw, mig.power_limit, plain.power_limit), (50, 700, 400))
    same((mig.temperature, mig.fan_speed), (30, None))


def test_json_of_the_command():
    shown = json.loads(command("--json"))
    same([gpu["index"] for gpu in shown["gpus"]], [0, 1])
    same(shown["gpus"][0]["memory.used"], 500)


def test_text_of_the_command():
    lines = command("--no-color", "--show-pid").splitlines()
    assert "580.95.05" in lines[0] and "500 / 81559 MB" in lines[1] and "0 / 81920 MB" in lines[2], lines
    assert str(os.getpid()) in lines[1], lines


def test_one_gpu_of_the_command():
    same(len(command("--no-color", "--no-header", "--id", "1").splitlines()), 1)


run(dict(globals()), before)
