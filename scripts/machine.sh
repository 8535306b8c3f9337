#!/usr/bin/env bash
# A machine for tests, booted from a root directory that scripts/roots.sh has made: under an overlay in memory, so that nothing
# of it changes, with its own systemd as first process, in namespaces of its own, also for the network, and on cgroup v2.
# As root. It is gone when the script that started it ends, however that ends.
#
#   source scripts/engines.sh; source scripts/roots.sh; source scripts/machine.sh; source scripts/tally.sh
#   machine_start SUITE || ...     why it can't be had is in $tmp/why, and the last line of that says it in short
#   there CMD...                   on it, as root; its root directory as seen from here is $at
#   machine_podman                 podman as it works in there, and the image $ENG_IMAGE
#   machine_gpus BOARD...          a simulated driver in /srv/gpus, with its files, which the installed settings then name
#   machine_stop                   false when cgroups are left behind

machine='' first='' at='' machine_dir=''

# Boots the suite's root directory.
# shellcheck disable=SC2154  # $tmp is scripts/tally.sh's
machine_start() {
    local suite=$1 root=$PWD/target/engines/$1 reason
    mkdir -p "${root%/*}"
    reason=$(ENG_CGROUPS=2 eng_why_not)
    if [[ -n $reason ]]; then
        echo "$reason" >"$tmp/why"
        return 1
    fi
    if ! root_make "$suite" "$root" 2>"$tmp/why"; then
        sed -i 's/^engines: //' "$tmp/why"
        return 1
    fi
    machine_dir=$(mktemp -d "$tmp/mig-XXXXXX")
    setpriv --pdeathsig KILL unshare --mount --propagation private scripts/machine.sh outer "$root" "$machine_dir" \
        >"$tmp/machine" 2>&1 </dev/null &
    machine=$!
    eng_until 60 machine_decided && machine_up && return
    { cat "$tmp/machine" && echo "systemd does not come up in namespaces"; } >"$tmp/why"
    return 1
}
machine_decided() { machine_up || eng_gone "$machine"; }
machine_up() {
    first=$(tr -d ' ' <"/proc/$machine/task/$machine/children") && [[ -n $first ]] || return
    at=/proc/$first/root
    [[ $(there systemctl is-system-running) == @(running|degraded) ]]
}

machine_stop() {
    [[ -n $machine ]] || return 0
    kill -KILL "$machine" 2>/dev/null
    wait "$machine" 2>/dev/null
    machine=
    eng_until 10 eng_no_cgroups "$(basename "$machine_dir")"
}

# Runs a command on it.
there() {
    nsenter -m -p -C -u -i -n -t "$first" env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8 \
        DEBIAN_FRONTEND=noninteractive ${ANYWAY:+MIG_HOOK_REMOVE=anyway} "$@"
}

machine_podman() {
    [[ -e $tmp/rootfs.tar ]] || ENG_DIR=$tmp eng_rootfs || return
    mkdir -p "$at/etc/containers/containers.conf.d"
    cat >"$at/etc/containers/containers.conf.d/10-tests.conf" <<CONF
[containers]
$(eng_ulimits)
pids_limit = 0
netns = "none"
log_driver = "k8s-file"
http_proxy = false
[engine]
runtime = "runc"
events_logger = "none"
CONF
    printf '[storage]\ndriver = "vfs"\nrunroot = "/run/containers/storage"\ngraphroot = "/var/lib/containers/storage"\n' >"$at/etc/containers/storage.conf"
    there podman import -q - "$ENG_IMAGE" <"$tmp/rootfs.tar" && there podman run --rm "$ENG_IMAGE" true
}

# Its nodes are in /dev, as a real driver's: there systemd looks for devices. What the file of settings shows is a default: it is
# enough to take the mark away, and to name another place.
machine_gpus() {
    there nvml-sim create /srv/gpus --driver-files "${@/#/--gpu=}" && there cp -a /srv/gpus/dev/. /dev &&
        there sed -i -e 's|^#root = .*|root = "/srv/gpus"|; s|^#proc_root = .*|proc_root = "/srv/gpus/proc"|' \
            -e 's|^#dev_root|dev_root|; s|^#audit_file|audit_file|' /etc/mig-hook/config.toml
}

# ---------------------------------------------------------------------------------------------------------------------
# What becomes its first process

# In a mount namespace: the overlay, and a cgroup, which is the root of the machine's.
machine_outer() {
    local root=$1 dir=$2
    umount -R /sys/fs/cgroup && mount -t cgroup2 none /sys/fs/cgroup && mkdir "/sys/fs/cgroup/$(basename "$dir")" &&
        echo $$ >"/sys/fs/cgroup/$(basename "$dir")/cgroup.procs" && mount -t tmpfs -o mode=755 none "$dir" &&
        mkdir "$dir/upper" "$dir/work" "$dir/root" &&
        mount -t overlay -o "lowerdir=$root,upperdir=$dir/upper,workdir=$dir/work" none "$dir/root" || return
    exec unshare --mount --pid --fork --kill-child=KILL --cgroup --uts --ipc --net "$0" inner "$dir/root"
}

machine_inner() {
    local root=$1 unit node
    cd "$root" && mount --make-rprivate / && hostname packages && mount -t proc proc proc && mount --rbind /sys sys &&
        umount -R sys/fs/cgroup && mount -t cgroup2 none sys/fs/cgroup &&
        mount -t tmpfs -o mode=755 none dev && mount -t tmpfs -o mode=755 none run && mount -t tmpfs -o mode=1777 none tmp &&
        mkdir dev/pts dev/shm dev/mqueue && mount -t devpts -o newinstance,ptmxmode=666,mode=620 none dev/pts &&
        mount -t tmpfs none dev/shm && ln -s pts/ptmx dev/ptmx && ln -s /proc/self/fd dev/fd || return
    # What is this machine's, and no namespace's.
    mount --bind proc/sys proc/sys && mount -o remount,bind,ro proc/sys && mount -o remount,bind,ro sys || return
    for node in null zero full random urandom tty kmsg; do cp -a "/dev/$node" dev || return; done
    # Engines that the root directory has: who needs one unmasks it. And what debootstrap's caller left out.
    for unit in docker.service docker.socket containerd.service podman{,-restart,-auto-update}.{service,socket,timer}; do
        ln -sf /dev/null "etc/systemd/system/$unit"
    done
    rm -f etc/dpkg/dpkg.cfg.d/mig-engines usr/sbin/policy-rc.d
    pivot_root . . && umount -l . || return
    exec env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin container=packages \
        /lib/systemd/systemd --system --unit=multi-user.target --log-target=null --show-status=no
}

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
    set -uo pipefail
    what=machine_$1
    shift
    "$what" "$@"
fi
