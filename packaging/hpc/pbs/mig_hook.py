"""OpenPBS and PBS Professional: a job on this host gets the MIG slices that its resource `mig` names.

As root at the server:

    qmgr -c "create resource mig type=string"
    qmgr -c "create hook mig_hook event='execjob_begin,execjob_launch,execjob_end,exechost_periodic,exechost_startup'"
    qmgr -c "set hook mig_hook alarm=120, freq=120"
    qmgr -c "import hook mig_hook application/x-python default mig_hook.py"

Then: qsub -l mig=1g.10gb. Runs as root in MoM, on every host of the job. docs/hpc.md tells how PBS counts slices, and what
was read of PBS and not run.
"""

import json
import os
import subprocess
import time

import pbs

MIGCTL = "/usr/bin/migctl"
RESOURCE = "mig"
# Exit codes of migctl: what is asked for is not offered, or not there; and no room now.
NOTHING = 65
NO_ROOM = 75
# Seconds in which a job that has just begun need not be in MoM's list yet.
YOUNG = 600


def migctl(*words):
    """Runs migctl: its exit code, and what it printed."""
    done = subprocess.run(
        (MIGCTL,) + words,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
        universal_newlines=True,
    )
    return done.returncode, (done.stdout if done.returncode == 0 else done.stderr).strip()


def key_of(job_id):
    return "pbs:%s" % job_id


def asked(job):
    try:
        return job.Resource_List[RESOURCE]
    except Exception:  # whatever PBS makes of a resource that nobody has created
        return None


def begin(event):
    """Before anything of the job runs here. No room: PBS queues it again, and holds it after some 20 tries."""
    job = event.job
    request = asked(job)
    if not request:
        return
    if not os.path.exists(MIGCTL):
        job.delete()
        event.reject("this host has no mig-hook, and the job asks each of its hosts for %s" % request)
    key = key_of(job.id)
    code, said = migctl("job", "start", "--key", key, "--uid", str(job.euser), "--", str(request))
    if code == 0:
        return
    migctl("job", "end", "--key", key)
    if code != NO_ROOM:
        job.delete()  # the same would come of every other try
    event.reject(said)


def launch(event):
    """Before the job's first process, and each that it starts through PBS. A refusal here ends the job."""
    code, said = migctl("job", "env", "--key", key_of(event.job.id), "--format", "docker")
    if code == NOTHING:
        return
    if code != 0:
        event.reject(said)
    for line in said.splitlines():
        name, value = line.split("=", 1)
        # A list of variables has commas between them: class pbs_env of the pbs module.
        event.env[name] = value.replace(",", "\\,")


def end(event):
    """After the last process of the job here, also of one that did not start. Success when it has nothing."""
    code, said = migctl("job", "end", "--key", key_of(event.job.id))
    if code != 0:
        pbs.logmsg(pbs.EVENT_ERROR, said)


def periodic(event):
    """Frees what jobs have left that MoM does not know any more: their end was never told."""
    known = set(key_of(job_id) for job_id in event.job_list.keys())
    code, said = migctl("leases", "--json")
    leases = json.loads(said)["leases"] if code == 0 else []
    now = time.clock_gettime(time.CLOCK_BOOTTIME)
    for lease in leases:
        key = lease["holder"].get("job") or ""
        old = now - lease["created_boot_ms"] / 1000.0 > YOUNG
        if key.startswith("pbs:") and key not in known and old:
            pbs.logmsg(pbs.EVENT_ERROR, "job %s is unknown here: its slices are freed" % key)
            migctl("job", "end", "--key", key)
    collect(event)


def collect(_event):
    code, said = migctl("gc")
    if code != 0:
        pbs.logmsg(pbs.EVENT_ERROR, said)


HANDLERS = {
    pbs.EXECJOB_BEGIN: begin,
    pbs.EXECJOB_LAUNCH: launch,
    pbs.EXECJOB_END: end,
    pbs.EXECHOST_PERIODIC: periodic,
    pbs.EXECHOST_STARTUP: collect,
}


def main():
    event = pbs.event()
    if event.type != pbs.EXECJOB_BEGIN and not os.path.exists(MIGCTL):
        event.accept()
    try:
        HANDLERS[event.type](event)
    except SystemExit:
        raise  # accept() and reject()
    except Exception as error:
        reason = "mig_hook: %s: %s" % (type(error).__name__, error)
        pbs.logmsg(pbs.EVENT_ERROR, reason)
        # What can't get its slices does not run; what ends, ends.
        if event.type in (pbs.EXECJOB_BEGIN, pbs.EXECJOB_LAUNCH):
            event.reject(reason)
    event.accept()


main()
