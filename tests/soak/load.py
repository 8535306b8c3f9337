#!/usr/bin/env python3
"""Containers by all ways in on one simulated machine, many at once, with every kind of end. Prints counts, and a line for each
thing that must hold. scripts/soak starts it in the engines' world: load.py SECONDS SEED BINARIES LOGS."""

import collections
import glob
import itertools
import json
import os
import random
import re
import shutil
import sys
import threading
import time

from checker import Violations, left_over
from observer import Observer, Rival
from ways import KEEPERS, MEMORY_IS_LIMITED, Containerd, Docker, Plan, Podman, Run
from world import LOGS, OURS, SECONDS, SEED, SITE, WORLD
from world import environment_of, kill, machine, migctl, now, ours_with, pids, read, run, set_up, settings, skip, stat_of
from world import there, words_of

FOR_EACH_ENGINE, FOR_RUN = 5, 8
IDLE_TTL = 4
# Until the end of everything: the two looks at an orphan, a minute apart, and what no container was started with, 120 s.
SETTLE = 240
FULL = re.compile("no room|those who wait longer take what is free|does not make room")
# On a machine that has no time for us. crun tells a hook's exit code and keeps its words.
LATE = re.compile(r"was not free within \d+|error executing hook .*exit code: 75")


class Load:
    """Workers that start and end one container after the other, and who disturbs and watches them."""

    def __init__(self):
        self.rival = Rival(random.Random(f"{SEED}-rival"))
        self.observer = Observer(self.rival)
        self.violations = Violations()
        self.over = threading.Event()
        self.numbers = itertools.count(1)
        self.lock = threading.Lock()
        self.events = open(f"{LOGS}/events.jsonl", "w", encoding="utf-8")
        self.asked, self.started, self.refused, self.late = (collections.Counter() for _ in range(4))
        self.ends, self.strikes = collections.Counter(), collections.Counter()
        self.gcs = 0

    def note(self, **what):
        with self.lock:
            print(json.dumps({"at": round(now(), 3), **what}), file=self.events, flush=True)

    def count(self, counter, what):
        with self.lock:
            counter[what] += 1

    # -----------------------------------------------------------------------------------------------------------------
    # One container

    def work(self, way, rng):
        while not self.over.is_set():
            self.one(way, Plan(next(self.numbers), way, rng))
            self.over.wait(rng.uniform(0, 1))

    def one(self, way, plan):
        self.observer.asked[plan.name] = now()
        self.count(self.asked, way.title)
        self.note(ask=plan.name, request=plan.request, wait=plan.wait, end=plan.end, strike=plan.strike)
        try:
            code, said, hit = way.start(plan)
            self.note(name=plan.name, code=code, hit=hit, said=said[-400:])
            if hit:
                self.count(self.strikes, f"kill -9 of the {plan.strike} at the start")
            if code == 0:
                self.count(self.started, way.title)
                self.live(way, plan)
            elif FULL.search(said):
                self.count(self.refused, way.title)
            elif LATE.search(said):
                self.count(self.late, way.title)
            elif not hit:
                self.violations.add(now(), f"{plan.name} was not started, {code}: {said}")
        finally:
            way.remove(plan)
            # An engine forgets a container that outlives what was killed of it; and a command leaves processes.
            for pid in pids():
                if environment_of(pid).get("SOAK") == plan.mark:
                    kill(pid)
            self.note(removed=plan.name)

    def live(self, way, plan):
        until = now() + plan.life
        while now() < until and not self.over.is_set():
            time.sleep(0.1)
        first, keeper = way.processes(plan, self.observer.first.get(plan.name, 0))
        is_there, end = stat_of(first), plan.end
        if end in ("exit", "error", "oom"):
            while stat_of(first) and not self.over.is_set() and now() < until + 20:
                time.sleep(0.1)
            if stat_of(first):
                end = "end of the run"
        elif end == "kill-first":
            end = "kill -9 of the first process" if is_there and kill(first) else "gone before that"
        elif end == "kill-keeper":
            # What it kept lives on.
            name = (stat_of(keeper) or ("", "", ""))[2]
            end = f"kill -9 of {name}" if is_there and name in KEEPERS and kill(keeper) else "gone before that"
            time.sleep(1)
        else:
            way.end(plan)
        self.count(self.ends, end)

    # -----------------------------------------------------------------------------------------------------------------
    # What goes on beside them

    def collect(self, rng):
        while not self.over.wait(rng.uniform(2, 10)):
            self.gc()

    def gc(self):
        code, said = run(migctl("gc"))
        self.gcs += 1
        # 75: something is still in use.
        if code not in (0, 75):
            self.violations.add(now(), f"migctl gc: {code}: {said}")
        return said

    def strike_at_the_end(self, rng):
        """Kills what gives a slice back, now and then."""
        while not self.over.wait(rng.uniform(0, 0.05)):
            found = ours_with(" poststop ") + ours_with(" delete ")
            if found and rng.random() < 0.1 and kill(rng.choice(found)):
                self.count(self.strikes, "kill -9 of what gives a slice back")

    def every(self, pause, over, what):
        while not over.wait(pause):
            what()

    # -----------------------------------------------------------------------------------------------------------------
    # All of it

    def go(self):
        """What is left in the end."""
        watched = threading.Event()
        threading.excepthook = lambda failed: self.violations.add(now(), f"{failed.thread.name}: {failed.exc_value!r}")

        def thread(what, *arguments):
            started = threading.Thread(target=what, args=arguments)
            started.start()
            return started

        def rng(name):
            return random.Random(f"{SEED}-{name}")

        watch = [
            thread(self.every, 0.1, watched, self.observer.look),
            thread(self.every, 0.5, watched, self.observer.poll),
        ]
        ways = [way for way in engines() for _ in range(FOR_EACH_ENGINE)] + [Run()] * FOR_RUN
        work = [thread(self.work, way, rng(number)) for number, way in enumerate(ways)]
        work += [
            thread(self.rival.go, self.over),
            thread(self.collect, rng("gc")),
            thread(self.strike_at_the_end, rng("strikes")),
        ]
        for half in range(2):
            settings(idle_ttl=IDLE_TTL * half)
            time.sleep(SECONDS / 2)
        self.over.set()
        for one in work:
            one.join()
        left = self.settle()
        watched.set()
        for one in watch:
            one.join()
        return left

    def settle(self):
        """Everything has been ended. What there is yet goes within the bounds, by gc and nothing else."""
        until = now() + SETTLE
        while True:
            said, left = self.gc(), what_is_there()
            self.note(left=left, gc=said)
            if not left or now() > until:
                return left
            time.sleep(1)


def engines():
    """Those that this machine has."""
    ways = []
    for runtime in ("runc", "crun") if there("podman") else ():
        if shutil.which(runtime):
            ways.append(Podman(runtime))
        else:
            skip(f"podman with {runtime}", "not installed")
    ways += [Docker()] * there("docker") + [Containerd()] * there("ctr")
    if not MEMORY_IS_LIMITED:
        skip("out of memory", "there is no memory controller")
    return ways


def what_is_there():
    names = ["leases/*", "index/*", "intents/*", "claims/*", "holders/*", "public/*", "queue/*.json", "queue/*.bell"]
    files = [path for name in names for path in glob.glob(f"{SITE}/state/{name}")]
    cgroups = glob.glob(f"/sys/fs/cgroup/**/{os.path.basename(WORLD)}/**/mig-hook-*", recursive=True)
    processes = []
    for pid in pids():
        stat = stat_of(pid)
        # What is asked who waits has been started by this one.
        if stat and stat[0] != os.getpid() and (stat[2] in OURS or "SOAK" in environment_of(pid)):
            processes.append(f"{pid} {stat[2]}: {words_of(pid)[:200]}")
    return left_over(machine(), files, cgroups, processes)


def tell(load, seconds):
    checker, line = load.observer.checker, load.observer.line
    print(f"seed {SEED}, {SECONDS} s of load, {seconds:.0f} s until nothing was left")
    print(f"containers seen running: {len(checker.seen)}")
    for title, asked in sorted(load.asked.items()):
        refused = f"{load.refused[title]:4} refused for want of room, {load.late[title]} at the lock's bound"
        print(f"    {title:18} {asked:4} asked, {load.started[title]:4} started, {refused}")
    print(f"waited in line: {len(load.observer.tickets)}; one was overtaken {line.most} times, and {line.bound} is the bound")
    for title, counter in (("ends", load.ends), ("killed while they worked", load.strikes)):
        print(f"{title}: " + ", ".join(f"{count} {what}" for what, count in sorted(counter.items())))
    print(f"snapshots checked: {checker.snapshots}; at most {checker.most_holders} holders, {checker.most_slices} slices")
    print(f"memory slices in use, of 64: {checker.most_used} at most, {checker.used / checker.snapshots:.0f} on average")
    cut = json.loads(read(f"{SITE}/m/usr/lib/nvml-sim/state.json"))["births"] // 2
    again = sum(len(holders) - 1 for holders in checker.had.values())
    print(f"slices cut: {cut}, {load.rival.cut} of them by the rival; given again without a cut: {again}")
    print(f"migctl gc: {load.gcs} times")


def main():
    set_up()
    load = Load()
    begun = now()
    left = load.go()
    tell(load, now() - begun)
    rules = (
        ("no slice is shared, destroyed below its holder or taken from others", load.observer.checker.violations),
        ("nobody is overtaken more often than may be", load.observer.line.violations),
        ("whoever is not started is told why, and nothing hangs", load.violations),
        ("nothing is left over", left),
        ("containers ran by every way in", [title for title in load.asked if not load.started[title]]),
    )
    for name, wrong in rules:
        print("\n    ".join([f"test {name} ... {'FAILED' if wrong else 'ok'}", *wrong]))
    failed = sum(bool(wrong) for _, wrong in rules)
    print(f"test result: {'FAILED' if failed else 'ok'}. {len(rules) - failed} passed; {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
