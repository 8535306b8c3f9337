"""Who looks at processes, the machine, and processes again, and tells the checker; and the rival on that machine."""

import json
import re
import threading

from checker import Checker, Line, View
from world import OVERTAKES, RIVALS_GPU, environment_of, machine, migctl, must, nodes_in, now, nvml_sim, pids, run, stat_of


class Rival:
    """Another tool, which cuts and destroys slices on one of the GPUs and knows of nobody."""

    def __init__(self, rng):
        self.rng = rng
        self.slices = frozenset()  # (GPU, GPU instance): from after it was cut until before it is destroyed
        self.cut = 0

    def go(self, over):
        while not over.wait(self.rng.uniform(0.5, 3)):
            if self.slices and (len(self.slices) == 3 or self.rng.random() < 0.5):
                self.destroy(self.rng.choice(sorted(self.slices)))
                continue
            profile = self.rng.choice(["1g.10gb", "1g.10gb", "2g.20gb", "3g.40gb"])
            _, said = run(nvml_sim("make", "--gpu", str(RIVALS_GPU), "--profile", profile))
            if made := re.match(r"gi(\d+) at", said):
                self.slices |= {(RIVALS_GPU, int(made.group(1)))}
                self.cut += 1
        for foreign in self.slices:
            self.destroy(foreign)

    def destroy(self, foreign):
        self.slices -= {foreign}
        must(nvml_sim("destroy", "--gpu", str(foreign[0]), "--gi", str(foreign[1])))


class Observer:
    """Looks by itself; `asked` is told to it, before a container is asked for."""

    def __init__(self, rival):
        self.rival = rival
        self.checker, self.line = Checker(), Line(OVERTAKES)
        self.asked = {}  # holder: when
        self.first = {}  # holder: its first process that was seen
        self.tickets = set()  # of all who were seen to wait
        self._lock = threading.Lock()  # of the line
        self._views = {}  # of processes that were given slices

    def look(self):
        before = {}
        for pid in pids():
            stat = stat_of(pid)
            if stat and (view := self._view((pid, stat[1]))):
                before[(pid, stat[1])] = view
        foreign = self.rival.slices
        shown = machine()
        at = now()
        foreign &= self.rival.slices
        after = {process for process in before if self._is_there(process)}
        new = {view.holder: view for process, view in before.items() if process in after}
        new = {holder: view for holder, view in new.items() if holder not in self.checker.seen}
        self.checker.look(at, before, shown, after, foreign)
        for process in sorted(after):
            self.first.setdefault(before[process].holder, process[0])
        for holder, view in new.items():
            self._started(holder, view, shown)
        self._views = before

    def _view(self, process):
        """None where there are no slices. What is no container yet has another environment then."""
        if process in self._views:
            return self._views[process]
        environment = environment_of(process[0])
        if "SOAK" not in environment or "MIG_DEVICE_UUIDS" not in environment:
            return None
        holder, *asked = environment["SOAK"].split()
        try:
            caps, gpus = (None, None) if holder.startswith("run-") else nodes_in(process[0])
        except OSError:
            return None  # it has just ended
        return View(holder, tuple(asked), tuple(environment["MIG_DEVICE_UUIDS"].split(",")), caps, gpus)

    def _is_there(self, process):
        stat = stat_of(process[0])
        return stat is not None and stat[1] == process[1] and bool(environment_of(process[0]))

    def _started(self, holder, view, shown):
        """Those on the rival's GPU take nothing from one who waits for a GPU that is free of foreign slices."""
        others = [gpu for gpu in shown["gpus"] if gpu["index"] != RIVALS_GPU]
        instances = [ci for gpu in others for gi in gpu["gpu_instances"] for ci in gi["compute_instances"]]
        if any(ci["uuid"] in view.uuids for ci in instances):
            with self._lock:
                self.line.started(holder, self.asked[holder], now())

    def poll(self):
        """Who waits is what `migctl queue` says; how often they are overtaken is seen."""
        begun = now()
        rows = json.loads(must(migctl("queue", "--json")))["waiting"]
        with self._lock:
            self.tickets.update(row["ticket"] for row in rows)
            names = ((re.search(r"\brun-\d+\b", row["holder"]), row["waits_for"] is None) for row in rows)
            self.line.poll(begun, now(), {name.group(): has_turn for name, has_turn in names if name})
            for row in rows:
                if row["overtaken"] > OVERTAKES:
                    self.line.violations.add(begun, f"migctl queue says so, too, of ticket {row['ticket']}")
