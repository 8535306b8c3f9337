"""What the load is about: a simulated machine and its settings, programs that are run, and processes as /proc shows them."""

import glob
import json
import os
import shutil
import signal
import subprocess
import sys
import time

SECONDS, SEED, DIST, LOGS = int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4]
WORLD, IMAGE = os.environ["ENG_DIR"], os.environ["ENG_IMAGE"]
TREE = os.path.realpath(f"{__file__}/../../..")
SITE = f"{WORLD}/soak"
CONFIG = f"{SITE}/config.toml"

GPUS = ["a100-sxm4-80gb"] * 4 + ["h100-sxm-80gb"] * 4
RIVALS_GPU = 7
OVERTAKES = 6
# What the driver takes for a cut and for a destruction: the time in which a kill hits something half done.
LATENCY_MS = (("nvmlDeviceCreateGpuInstance*", 120), ("nvmlGpuInstanceDestroy", 60))
# Beyond all bounds of docs/reliability.md together: nothing takes longer than this.
HANG = 180
OURS = ("mig-hook", "mig-engine", "mig-runtime", "migctl")

now = time.monotonic

# ---------------------------------------------------------------------------------------------------------------------
# Programs


class Hang(Exception):
    """What did not end, however long it had."""

    def __init__(self, words):
        super().__init__(f"{' '.join(words)[:300]}: did not end within {HANG} s")


def run(words, **options):
    """Exit code, and what was said."""
    options.update(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    with subprocess.Popen(words, **options) as child:
        try:
            said, _ = child.communicate(timeout=HANG)
        except subprocess.TimeoutExpired:
            child.kill()
            raise Hang(words) from None
        return child.returncode, said


def must(words):
    code, said = run(words)
    if code != 0:
        raise RuntimeError(f"{words}: {code}: {said}")
    return said


def nvml_sim(verb, *words):
    return [f"{DIST}/nvml-sim", verb, f"{SITE}/m", *words]


def migctl(*words):
    return [f"{DIST}/migctl", "--config", CONFIG, *words]


def machine():
    return json.loads(must(nvml_sim("show", "--json")))


def there(program):
    """One that does not work here has no wrapper in the world, and was noted as skipped."""
    return os.path.exists(f"{WORLD}/bin/{program}")


def skip(what, why):
    """For the summary of scripts/soak."""
    with open(os.environ["MIG_TEST_SKIPS"], "a", encoding="utf-8") as file:
        print(f"SKIP: {what}: {why}", file=file)


# ---------------------------------------------------------------------------------------------------------------------
# Settings


def read(path):
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read()


def write(path, text):
    """At once: some are read at any time."""
    with open(f"{path}.tmp", "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(f"{path}.tmp", path)


def settings(idle_ttl):
    """Read anew by each program that starts."""
    write(
        CONFIG,
        f'state_dir = "{SITE}/state"\n'
        f'[driver]\nroot = "{SITE}/m"\nproc_root = "{SITE}/m/proc"\ndev_root = "{SITE}/m/dev"\n'
        f'[runtime]\npath = "{shutil.which("runc")}"\n'
        f'[log]\naudit_file = "{LOGS}/audit.jsonl"\nsocket = "{SITE}/no-log"\n'
        f'[queue]\novertakes = {OVERTAKES}\n[slices]\nidle_ttl = "{idle_ttl}s"\n',
    )


def set_up():
    """The machine, and engines that know mig-hook."""
    for name in ("said", "bin", "hooks.d"):
        os.makedirs(f"{SITE}/{name}")
    must(nvml_sim("create", "--seed", SEED, *(f"--gpu={board}" for board in GPUS)))
    for call, ms in LATENCY_MS:
        must(nvml_sim("latency", "--call", call, "--ms", str(ms)))
    settings(0)
    hook = json.loads(read(f"{TREE}/hooks/mig-hook-precreate.json.in"))
    hook["hook"].update(path=f"{DIST}/mig-hook", args=["mig-hook", "--config", CONFIG, "precreate"])
    write(f"{SITE}/hooks.d/mig-hook-precreate.json", json.dumps(hook))
    # ctr takes a runtime's path and no options for it.
    write(f"{SITE}/mig-runtime", f'#!/bin/sh\nexec {DIST}/mig-runtime --mig-config {CONFIG} "$@"\n')
    os.chmod(f"{SITE}/mig-runtime", 0o755)
    if there("podman"):
        conf = read(f"{WORLD}/podman/containers.conf")
        write(f"{SITE}/containers.conf", conf.replace(f"{WORLD}/podman/hooks.d", f"{SITE}/hooks.d"))
    if there("docker"):
        daemon = json.loads(read(f"{WORLD}/daemon.json"))
        options = [f"--mig-config={CONFIG}", "--mig-env"]
        daemon["runtimes"] = {"mig-soak": {"path": f"{DIST}/mig-runtime", "runtimeArgs": options}}
        write(f"{WORLD}/daemon.json", json.dumps(daemon))
        must([f"{TREE}/scripts/engines.sh", "reload"])


def memory_is_limited():
    """Whether a container's memory can be limited here."""
    if os.path.isdir("/sys/fs/cgroup/memory"):
        return True
    controllers = "/sys/fs/cgroup/cgroup.controllers"
    return os.path.exists(controllers) and "memory" in read(controllers).split()


# ---------------------------------------------------------------------------------------------------------------------
# Processes


def pids():
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def stat_of(pid):
    """Parent, start time and name of a process; None of a zombie."""
    try:
        name, rest = read(f"/proc/{pid}/stat").split("(", 1)[1].rsplit(")", 1)
    except OSError:
        return None
    words = rest.split()
    return None if words[0] in "ZX" else (int(words[1]), int(words[19]), name)


def environment_of(pid):
    """Empty of one that is about to be no more: its memory goes before its files."""
    try:
        return dict(word.split("=", 1) for word in read(f"/proc/{pid}/environ").split("\0") if "=" in word)
    except OSError:
        return {}


def words_of(pid):
    try:
        return read(f"/proc/{pid}/cmdline").replace("\0", " ") + " "
    except OSError:
        return ""


def nodes_in(pid):
    """The capability minors and the GPU minors of the nodes in the /dev of a process."""

    def minors(pattern):
        return frozenset(os.minor(os.stat(path).st_rdev) for path in glob.glob(f"/proc/{pid}/root/dev/{pattern}"))

    return minors("nvidia-caps/nvidia-cap*"), minors("nvidia[0-9]*")


def children_of(pid, names):
    stats = ((child, stat_of(child)) for child in pids())
    return [child for child, stat in stats if stat and stat[0] == pid and stat[2] in names]


def ours_with(words):
    """Programs of ours with these words in their command lines."""
    return [pid for pid in pids() if (stat := stat_of(pid)) and stat[2] in OURS and words in words_of(pid)]


def kill(pid):
    try:
        os.kill(pid, signal.SIGKILL)
        return True
    except OSError:
        return False
