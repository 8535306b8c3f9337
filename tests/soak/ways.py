"""Ways in: how a container is planned, started, and ended by its engine."""

import os
import re
import subprocess
import time

from world import HANG, IMAGE, OURS, SITE, WORLD, Hang
from world import children_of, kill, memory_is_limited, migctl, now, ours_with, run, stat_of

# As often as it stands here.
REQUESTS = ["1g.10gb"] * 6 + ["2x1g.10gb"] * 3 + ["2g.20gb"] * 5 + ["2x2g.20gb"] * 2 + ["3g.40gb"] * 4
REQUESTS += ["4g.40gb"] * 2 + ["7g.80gb"]
# Whoever waits for these is watched: many small ones pass by.
LARGE = ["7g.80gb", "2x4g.40gb"]
ENDS = ["exit", "exit", "error", "stop", "kill", "kill-first", "kill-keeper", "rm"]
KEEPERS = ("conmon", "containerd-shim", "migctl")
MEMORY_IS_LIMITED = memory_is_limited()
MEMORY = str(32 << 20)


class Plan:
    """One container: what it asks for, what it does, and how it ends."""

    def __init__(self, number, way, rng):
        self.name = f"{way.prefix}-{number}"
        large = way.prefix == "run" and rng.random() < 0.25
        self.request = rng.choice(LARGE if large else REQUESTS)
        self.wait = rng.choice([90, 120]) if large else rng.choice([0, 0, 8, 15])
        self.end = rng.choice(way.ends + ["oom"] * (way.prefix != "run" and MEMORY_IS_LIMITED))
        self.life = rng.randint(2, 15)
        self.strike = rng.choice(way.strikes) if rng.random() < 0.12 else None
        self.strike_after = rng.uniform(0, 0.4)
        count, profile = re.fullmatch(r"(?:(\d+)x)?(.*)", self.request).groups()
        # What the checker finds in the environment.
        self.mark = " ".join([self.name] + [profile] * int(count or 1))

    def script(self):
        """What it does by itself; the others wait for what is done to them."""
        ends = {"exit": "exit 0", "error": "exit 3", "oom": "exec tail /dev/zero"}
        return f"sleep {self.life}; {ends[self.end]}" if self.end in ends else "sleep 600; exit 0"

    def annotations(self):
        asks = [f"mig.profile={self.request}"] + [f"mig.wait={self.wait}s"] * bool(self.wait)
        return [word for ask in asks for word in ("--annotation", ask)]


class Way:
    """One way in. `ends` and `strikes` are those that it knows: `engine` is what works of ours, `client` the command."""

    def processes(self, plan, first):
        """Of a running one: its first process, and what keeps that."""
        return first, (stat_of(first) or (0,))[0]

    def struck(self, words, plan, victims, **options):
        """Runs a command that starts a container; if the plan says so, somebody is killed meanwhile. Exit code, what it
        said, and whether somebody was."""
        with open(f"{SITE}/said/{plan.name}", "w+", encoding="utf-8", errors="replace") as log:
            child = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, **options)
            begun, hit = now(), False
            while child.poll() is None and now() < begun + HANG:
                if plan.strike and not hit and (found := victims(child)):
                    time.sleep(plan.strike_after)
                    hit = kill(child.pid if plan.strike == "client" else found[0])
                time.sleep(0.02)
            if child.poll() is None:
                child.kill()
                raise Hang(words)
            log.seek(0)
            return child.returncode, log.read(), hit


class Podman(Way):
    """With our precreate hook."""

    prefix, ends, strikes = "podman", ENDS, ["engine", "client"]

    def __init__(self, runtime):
        self.title = f"podman with {runtime}"
        self.options = {
            "env": {**os.environ, "ENG_RUNTIME": runtime, "ENG_CONF": f"{SITE}/containers.conf"},
            "cwd": SITE,  # conmon leaves a file there when memory runs out
        }

    def command(self, *words):
        return [f"{WORLD}/bin/podman", *words]

    def start(self, plan):
        memory = ["--memory", MEMORY, "--memory-swap", MEMORY] * (plan.end == "oom")
        options = ["-d", "--name", plan.name, *plan.annotations(), *memory, "-e", f"SOAK={plan.mark}"]
        words = self.command("run", *options, IMAGE, "sh", "-c", plan.script())
        return self.struck(words, plan, lambda child: children_of(child.pid, OURS), **self.options)

    def end(self, plan):
        words = {"stop": ["stop", "-t", "0"], "kill": ["kill"], "rm": ["rm", "-f", "-t", "0"]}[plan.end]
        run(self.command(*words, plan.name), **self.options)

    def remove(self, plan):
        run(self.command("rm", "-f", "-t", "0", plan.name), **self.options)


class Docker(Way):
    """With our shim as a runtime of docker's, and requests in the environment."""

    title, prefix, ends, strikes = "docker", "docker", ENDS, ["engine"]

    def command(self, *words):
        return [f"{WORLD}/bin/docker", *words]

    def start(self, plan):
        asks = ["-e", f"MIG_PROFILE={plan.request}"] + ["-e", f"MIG_WAIT={plan.wait}s"] * bool(plan.wait)
        memory = ["--memory", MEMORY, "--memory-swap", MEMORY] * (plan.end == "oom")
        options = ["--runtime", "mig-soak", "--name", plan.name, *asks, *memory, "-e", f"SOAK={plan.mark}"]
        code, said = run(self.command("create", *options, IMAGE, "sh", "-c", plan.script()))
        if code != 0:
            return code, said, False
        return self.struck(self.command("start", plan.name), plan, lambda _: ours_with(said.strip()))

    def end(self, plan):
        words = {"stop": ["stop", "-t", "0"], "kill": ["kill"], "rm": ["rm", "-f"]}[plan.end]
        run(self.command(*words, plan.name))

    def remove(self, plan):
        run(self.command("rm", "-f", plan.name))


class Containerd(Way):
    """By ctr, with our shim in runc's place."""

    title, prefix, strikes = "containerd", "ctr", ["engine", "client"]
    ends = [end for end in ENDS if end != "stop"]

    def command(self, *words):
        return [f"{WORLD}/bin/ctr", *words]

    def start(self, plan):
        memory = ["--memory-limit", MEMORY] * (plan.end == "oom")
        # ctr asks for CPU shares unless told not to, and a cgroup v2 tree may have no such controller.
        options = ["-d", "--null-io", "--cgroup", f"/{os.path.basename(WORLD)}/{plan.name}", "--cpu-shares", "0"]
        options += ["--runc-binary", f"{SITE}/mig-runtime", *plan.annotations(), *memory]
        options += ["--env", "PATH=/bin", "--env", f"SOAK={plan.mark}", "--rootfs", f"{WORLD}/rootfs"]
        words = self.command("run", *options, plan.name, "/bin/sh", "-c", plan.script())
        return self.struck(words, plan, lambda _: ours_with(f" {plan.name} "))

    def end(self, plan):
        words = {"kill": ["kill", "-s", "KILL"], "rm": ["rm", "-f"]}[plan.end]
        run(self.command("task", *words, plan.name))

    def remove(self, plan):
        for words in (["task", "kill", "-s", "KILL"], ["task", "rm", "-f"], ["container", "rm"]):
            run(self.command(*words, plan.name))


class Run(Way):
    """`migctl run`: a tree of processes, one of which stays a while when the first one has ended."""

    title, prefix, strikes = "migctl run", "run", ["client"]
    ends = ["exit", "exit", "error", "stop", "kill-first", "kill-keeper"]

    def __init__(self):
        self.running = {}

    def start(self, plan):
        # Called like the container, it is seen by that name in `migctl queue`.
        program = f"{SITE}/bin/{plan.name}"
        os.symlink("/bin/sh", program)
        wait = ["--wait", f"{plan.wait}s"] * bool(plan.wait)
        script = f"sleep {plan.life + 2} & {plan.script()}"
        words = migctl("run", *wait, plan.request, "--", program, "-c", script)
        with open(f"{SITE}/said/{plan.name}", "w+", encoding="utf-8", errors="replace") as log:
            environment = {**os.environ, "SOAK": plan.mark}
            child = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)
            self.running[plan.name] = child
            if plan.strike:
                time.sleep(plan.strike_after)
                kill(child.pid)
            until = now() + HANG + plan.wait
            while child.poll() is None and not children_of(child.pid, (plan.name,)):
                if now() > until:
                    raise Hang(words)
                time.sleep(0.05)
            log.seek(0)
            return child.poll() or 0, log.read(), plan.strike is not None

    def processes(self, plan, first):
        keeper = self.running[plan.name].pid
        return next(iter(children_of(keeper, (plan.name,))), 0), keeper

    def end(self, plan):
        self.running[plan.name].terminate()

    def remove(self, plan):
        child = self.running.pop(plan.name)
        child.kill()
        child.wait()
        os.unlink(f"{SITE}/bin/{plan.name}")
