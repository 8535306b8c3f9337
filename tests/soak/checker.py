"""What must hold while containers come and go, said from outside: by what the simulated driver shows, what processes have in
their environment and their /dev, and who was seen to wait and to start. Pure: observer.py looks."""

from collections import namedtuple

# What a process has. `asked` are the profiles that its holder was started with; `caps` and `gpus` the minors of the nodes in
# its /dev, None where that is the host's.
View = namedtuple("View", "holder asked uuids caps gpus")
# `born`: the driver's numbers of the GPU instance and the compute instance, which never come again.
Slice = namedtuple("Slice", "gpu gpu_minor gi profile place caps born")


def slices_of(machine):
    """Every compute instance of the machine, by its UUID."""
    return {
        ci["uuid"]: Slice(
            gpu["index"],
            gpu["minor"],
            gi["id"],
            gi["profile"],
            range(gi["placement"]["start"], gi["placement"]["start"] + gi["placement"]["size"]),
            frozenset((gi["cap_minor"], ci["cap_minor"])),
            (gi["birth"], ci["birth"]),
        )
        for gpu in machine["gpus"]
        for gi in gpu["gpu_instances"]
        for ci in gi["compute_instances"]
    }


class Violations(list):
    """Each is told when it is first seen."""

    def __init__(self):
        super().__init__()
        self._told = set()

    def add(self, at, what):
        if what not in self._told:
            self._told.add(what)
            self.append(f"{at:.3f}: {what}")


class Checker:
    """Holds every look at the machine against the rules, and against the looks before it."""

    def __init__(self):
        self.violations = Violations()
        self.snapshots = 0
        self.most_holders = self.most_slices = self.most_used = self.used = 0
        self.seen = set()
        self.had = {}  # holders by slice, by the driver's numbers: several, one after the other, where it was not cut anew
        self._born = {}  # (holder, UUID) or (GPU, GPU instance) of a foreign slice: the driver's numbers

    def look(self, at, before, machine, after, foreign):
        """`before`: View by process, read before the machine was; `after`: those of these processes that lived when it had
        been read; `foreign`: (GPU, GPU instance) of what the rival had all the time. Only who lived all the time counts."""
        slices = slices_of(machine)
        live = {view.holder: (process, view) for process, view in before.items() if process in after}
        self.snapshots += 1
        self.seen.update(live)
        self.most_holders = max(self.most_holders, len(live))
        self.most_slices = max(self.most_slices, sum(len(view.uuids) for _, view in live.values()))
        used = sum(len(slice.place) for slice in slices.values())
        self.used += used
        self.most_used = max(self.most_used, used)
        taken = {}
        for holder, (process, view) in live.items():
            who = f"{holder} (process {process[0]})"
            there = {uuid: slices[uuid] for uuid in view.uuids if uuid in slices}
            for uuid in set(view.uuids) - set(there):
                self.violations.add(at, f"{who} lives, and its slice {uuid} does not exist")
            if len(there) == len(view.uuids):
                self._has_what_it_asked(at, who, view, there.values())
            for uuid, slice in there.items():
                self.had.setdefault(slice.born, set()).add(holder)
                if self._born.setdefault((holder, uuid), slice.born) != slice.born:
                    self.violations.add(at, f"{who} lives, and its slice {uuid} was destroyed and made anew")
                if (slice.gpu, slice.gi) in foreign:
                    self.violations.add(at, f"{who} has {uuid}, which is foreign")
                places = {f"memory slice {n} of GPU {slice.gpu}" for n in slice.place}
                for thing in places | {uuid} | {f"capability {minor}" for minor in view.caps or slice.caps}:
                    other = taken.setdefault(thing, who)
                    if other != who:
                        self.violations.add(at, f"{other} and {who} both live and have {thing}")
        self._foreign(at, machine, foreign)

    def _has_what_it_asked(self, at, who, view, slices):
        got = sorted(slice.profile for slice in slices)
        if got != sorted(view.asked):
            self.violations.add(at, f"{who} asked for {view.asked} and has {got}")
        if view.caps is not None:
            caps = frozenset(minor for slice in slices for minor in slice.caps)
            gpus = frozenset(slice.gpu_minor for slice in slices)
            if (view.caps, view.gpus) != (caps, gpus):
                nodes = f"capabilities {sorted(view.caps)} and GPUs {sorted(view.gpus)}"
                self.violations.add(at, f"{who} has nodes of {nodes}, not of {sorted(caps)} and {sorted(gpus)}")

    def _foreign(self, at, machine, foreign):
        there = {
            (gpu["index"], gi["id"]): (gi["birth"], tuple(ci["birth"] for ci in gi["compute_instances"]))
            for gpu in machine["gpus"]
            for gi in gpu["gpu_instances"]
        }
        for known in foreign:
            if known not in there:
                self.violations.add(at, f"foreign slice {known} was destroyed")
            elif self._born.setdefault(known, there[known]) != there[known]:
                self.violations.add(at, f"foreign slice {known} was changed")
        for gone in [key for key in self._born if isinstance(key[0], int) and key not in foreign]:
            del self._born[gone]


class Line:
    """How often those who wait are overtaken, by what is seen. Counted is only what was an overtake in any order of events: B
    was asked for when A had been seen waiting, and B was seen alive before A was last seen waiting, without its turn. So it
    may be more than this, and never less."""

    def __init__(self, bound):
        self.bound = bound
        self.violations = Violations()
        self.most = 0
        self._starts = []  # (asked, seen, who)
        self._waiting = {}  # name: [when it was first seen in this stretch, overtaken in stretches before, in this one]

    def started(self, who, asked, seen):
        """One that was asked for and seen alive at these times, on a GPU that whoever waits could have used."""
        self._starts.append((asked, seen, who))

    def poll(self, begun, ended, waiting):
        """`waiting`: names of those who waited, and whether their turn had come, at a time between these two."""
        for name in [name for name in self._waiting if name not in waiting]:
            del self._waiting[name]
        for name, has_turn in waiting.items():
            state = self._waiting.setdefault(name, [ended, 0, 0])
            since, before, _ = state
            by = [start for start in self._starts if start[0] >= since and start[1] <= begun]
            if has_turn:
                # From here on what starts may have been let pass: one that does not take its turn is asleep.
                state[:] = [ended, before + state[2], 0]
                continue
            state[2] = len(by)
            overtaken = before + len(by)
            if overtaken > max(self.bound, self.most):
                names = ", ".join(f"{who} (asked at {asked:.3f}, alive at {seen:.3f})" for asked, seen, who in by)
                what = f"was overtaken {overtaken} times, and {self.bound} is the bound: {names}"
                self.violations.add(begun, f"{name}, waiting since before {since:.3f}, {what}")
            self.most = max(self.most, overtaken)


def left_over(machine, files, cgroups, processes):
    """What should not be there when everything has ended, in words."""
    left = [f"GPU {slice.gpu}: {slice.profile}, {uuid}" for uuid, slice in slices_of(machine).items()]
    for gpu in machine["gpus"]:
        half_made = [gi["id"] for gi in gpu["gpu_instances"] if not gi["compute_instances"]]
        left += [f"GPU {gpu['index']}: GPU instance {gi}, half made" for gi in half_made]
    for kind, things in (("file", files), ("cgroup", cgroups), ("process", processes)):
        left += [f"{kind} {thing}" for thing in things]
    return left
