"""A stand-in for the module `pbs` of PBS's hooks: as much of it as packaging/hpc/pbs/mig_hook.py uses, in the form that
src/modules/python/pbs/v1 of OpenPBS gives it. The event comes from PBS_EVENT; what became of it goes to standard output."""

import json
import os
import sys

EXECJOB_BEGIN, EXECJOB_LAUNCH, EXECJOB_END, EXECHOST_PERIODIC, EXECHOST_STARTUP = range(1, 6)
EVENT_ERROR = 1

_told = {"deleted": False, "log": []}


class _Resources:
    def __init__(self, values):
        self._values = values

    def __getitem__(self, name):
        return self._values[name]


class _Job:
    def __init__(self, given):
        self.id = given["id"]
        self.euser = given["euser"]
        self.Resource_List = _Resources(given["resources"])

    def delete(self):
        _told["deleted"] = True


class _Event:
    def __init__(self, given):
        self.type = globals()[given["type"]]
        self.env = {}
        self.job_list = dict((name, None) for name in given.get("job_list", []))
        if "job" in given:
            self.job = _Job(given["job"])

    def _end(self, accepted, message):
        json.dump(dict(_told, accepted=accepted, message=message, env=self.env), sys.stdout)
        sys.exit(0)

    def accept(self):
        self._end(True, "")

    def reject(self, message=""):
        self._end(False, str(message))


_event = _Event(json.loads(os.environ["PBS_EVENT"]))


def event():
    return _event


def logmsg(_level, message):
    _told["log"].append(message)
