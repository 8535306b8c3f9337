#!/usr/bin/env bash
# Container engines of our own, for the demo and the tests: podman, docker and containerd with every store, socket,
# setting and cgroup in one scratch directory, inside a mount and a PID namespace of their own. The host's engines are
# neither used nor touched, and when the outermost process ends, however it ends, the kernel takes the rest with it.
#
#   source scripts/engines.sh                      the functions below
#   scripts/engines.sh isolate CMD [ARG...]        run CMD with $ENG_DIR set and $ENG_DIR/bin first in PATH, then clean up
#   scripts/engines.sh up [podman|docker]...       inside that: make the image, start daemons, write the wrappers
#   scripts/engines.sh dockerd DIR SETTINGS        become one more dockerd, at DIR/d.sock; its client: ENG_DOCKER=DIR bin/docker
#   scripts/engines.sh with 'podman docker' CMD... inside that: up, as far as it goes, then CMD; an engine that does not come
#                                                  up is noted in the file $MIG_TEST_SKIPS, and bin has no wrapper for it
#   scripts/engines.sh reload                      dockerd reads $ENG_DIR/daemon.json again
#   scripts/engines.sh stop                        the daemons end
#   scripts/engines.sh why-not                     why real containers can't run here: prints nothing when they can
#
# After `up`, $ENG_DIR holds
#   rootfs/             busybox and `mig-probe` (see eng_probe); rootfs.tar is the same, imported as $ENG_IMAGE
#   bin/podman          podman with every option set; ENG_HOOKS_DIR, ENG_CONF (instead of podman/containers.conf), ENG_RUNTIME
#                       (default runc) and ENG_STORE (a directory for a store of its own, without the image) are read at
#                       each call
#   bin/docker bin/ctr  clients of the private dockerd and its containerd; $ENG_DIR/daemon.json may be written before `up`
#   bin/crun            only on cgroup v2, where this crun can't run without help (see eng_crun)
#   logs/               what the daemons said
#
# Read by isolate (and why-not):
#   ENG_TMP             where the scratch directory goes; ENG_KEEP=1 keeps it
#   ENG_CGROUPS         2: /sys/fs/cgroup is cgroup v2 alone, whatever the machine has; 1: cgroup v1, or it is an error;
#                       neither: the machine's own, and v1 on one that has both
#   ENG_ROOT            a root directory with engines in it (scripts/test-engines makes them): the world is in there, with
#                       this tree, read-only, and the scratch directory where they are outside

# shellcheck disable=SC2034  # some names are for those who source this
ENG_IMAGE=localhost/busybox
ENG_SELF=$(realpath "${BASH_SOURCE[0]}")
ENG_TREE=${ENG_SELF%/*/*}

eng_say() { printf 'engines: %s\n' "$*" >&2; }
eng_die() {
    eng_say "$*"
    return 1
}

# Why containers can't run on this machine at all, one line; empty when they can.
eng_why_not() {
    if [[ $(id -u) -ne 0 ]]; then
        echo "not root"
    elif ! unshare --mount --pid --fork --mount-proc true 2>/dev/null; then
        echo "no new mount and PID namespaces allowed (a container without CAP_SYS_ADMIN?)"
    elif ! compgen -G '/sys/fs/cgroup/*' >/dev/null; then
        echo "no cgroups under /sys/fs/cgroup"
    elif [[ ! -w /sys/fs/cgroup/devices && ! -w /sys/fs/cgroup/cgroup.subtree_control ]]; then
        echo "the cgroup tree is read-only or has no device controller"
    elif [[ ${ENG_CGROUPS:-} == 1 ]] && eng_cgroup2; then
        echo "this machine has cgroup v2 alone"
    elif [[ ${ENG_CGROUPS:-} == 2 ]] && ! eng_on_cgroup2 test -w /sys/fs/cgroup/cgroup.procs; then
        echo "no cgroup v2 tree can be mounted"
    fi
}

# Is cgroup v2 what /sys/fs/cgroup shows, and all it shows?
eng_cgroup2() { [[ -e /sys/fs/cgroup/cgroup.controllers ]]; }

# Does this host have real NVIDIA devices? Prints what was found.
eng_real_nvidia() {
    if [[ -c /dev/nvidiactl ]]; then
        echo "/dev/nvidiactl is a device"
    elif grep -qE '^ *[0-9]+ nvidia' /proc/devices || grep -qE '^ *195 ' /proc/devices; then
        echo "/proc/devices names an NVIDIA driver"
    fi
}

# Waits until a command succeeds: eng_until SECONDS CMD...
eng_until() {
    local end=$((SECONDS + $1))
    shift
    until "$@" >/dev/null 2>&1; do
        ((SECONDS < end)) || return 1
        sleep 0.1
    done
}

# ---------------------------------------------------------------------------------------------------------------------
# Isolation

# A place for scratch files: containers are run from it (so not noexec), and unix sockets live below it (so short).
eng_scratch() {
    local base options
    for base in ${ENG_TMP:+"$ENG_TMP"} /tmp /var/tmp /root; do
        [[ -d $base && -w $base && ${#base} -le 40 ]] || continue
        options=$(findmnt --noheadings --output OPTIONS --target "$base" || true)
        [[ ,$options, == *,noexec,* ]] && continue
        eng_sweep "$base"
        mktemp -d "$base/mig-XXXXXX"
        return
    done
    eng_die "neither /tmp, /var/tmp nor /root can be written and executed from"
}

# Where engines keep things whatever they are told, and the leases of a mig-hook that is at work here. Covered by an empty
# tmpfs in the mount namespace, so that nothing of the host's is seen or changed.
eng_shadowed=(/run/mig-hook /run/runc /run/crun /run/containerd /run/docker /run/libpod /run/containers /run/mount
    /run/cdi /etc/cdi /var/lib/containers /var/lib/cni /etc/docker /etc/cni)

# Directories that have to be made for that. They are taken away again, if nothing moved in.
eng_make_shadowed() {
    local dir
    for dir in "${eng_shadowed[@]}"; do
        [[ -d $dir ]] || { mkdir "$dir" && echo "$dir" >>"$ENG_DIR/made"; }
    done
}

# Becomes a command in mount and PID namespaces of its own, which dies with its parent, and with it all that it started
# and mounted. A shell's background job is born with SIGINT and SIGQUIT ignored: undone.
eng_alone() {
    exec env --default-signal=INT,QUIT setpriv --pdeathsig KILL \
        unshare --mount --pid --fork --kill-child=KILL --mount-proc --propagation private "$@"
}

# Runs a command with the engines' world around it, then exits with its status. Everything is undone here, outside the
# namespaces, where killing the PID namespace's first process has left no process and no mount to stumble over.
eng_isolate() {
    local reason rc=0
    reason=$(eng_why_not)
    [[ -z $reason ]] || eng_die "can't run containers here: $reason" || exit
    # In a world of its own already: that one's engines are not meant.
    [[ -z ${ENG_DIR:-} ]] || PATH=${PATH#"$ENG_DIR/bin:"}
    ENG_DIR=$(eng_scratch) || exit
    export ENG_DIR
    world=
    exec {owner}>"$ENG_DIR/owner"
    flock "$owner"
    trap 'eng_clean' EXIT
    trap 'exit 129' HUP
    trap 'exit 130' INT
    trap 'exit 143' TERM
    mkdir -p "$ENG_DIR"/{bin,tmp,logs,home}
    # Some tests become an ordinary user.
    chmod 711 "$ENG_DIR" && chmod 1777 "$ENG_DIR/tmp"
    eng_make_shadowed
    eng_alone "$ENG_SELF" inside "$@" <&0 {owner}>&- &
    world=$!
    wait "$world" || rc=$?
    exit "$rc"
}

# What the first process of the namespaces does.
eng_inside() {
    local dir rc=0
    eng_cgroups || return
    if [[ -n ${ENG_ROOT:-} ]]; then
        eng_enter "$ENG_ROOT" || return
        unset ENG_ROOT
        PATH=/usr/local/sbin:/usr/local/bin:/usr/bin
    fi
    for dir in "${eng_shadowed[@]}"; do
        mount -n -t tmpfs -o mode=700 mig-shadow "$dir" || return
    done
    export PATH="$ENG_DIR/bin:$PATH:/usr/sbin:/sbin"
    # Not exec: as PID 1 this shell also reaps what conmon and the shims leave.
    "$@" || rc=$?
    return "$rc"
}

# Runs a command where cgroup v2 alone is seen.
eng_on_cgroup2() {
    ENG_CGROUPS=2 unshare --mount --propagation private "$ENG_SELF" view "$@" 2>/dev/null
}

# The cgroup tree that ENG_CGROUPS names.
eng_cgroups() {
    if [[ ${ENG_CGROUPS:-} == 2 ]]; then
        eng_cgroup2 || { umount -n -R /sys/fs/cgroup && mount -n -t cgroup2 mig-cgroup2 /sys/fs/cgroup; }
    elif mountpoint -q /sys/fs/cgroup/unified; then
        # Both: crun and newer engines refuse that while a controller lives on the unified tree. Without it: plain v1.
        umount -n /sys/fs/cgroup/unified
    fi
}

# Makes a directory the root. No file in it changes: what has to be written lies on tmpfs.
eng_enter() {
    local root here=$PWD dir
    root=$(realpath "$1") || return
    mount -n --bind "$root" "$root" || return
    for dir in /sys /dev; do mount -n --rbind "$dir" "$root$dir" || return; done
    mount -n -t proc proc "$root/proc" || return
    for dir in /tmp /run; do mount -n -t tmpfs -o mode=1777 mig-root "$root$dir" || return; done
    for dir in "$ENG_TREE" "$ENG_DIR"; do
        mkdir -p "$root$dir" && mount -n --bind "$dir" "$root$dir" || return
    done
    for dir in "$root" "$root$ENG_TREE"; do mount -n -o remount,bind,ro "$dir" || return; done
    # The old root ends up over the new one, and goes: pivot_root(2).
    cd "$root" && pivot_root . . && umount -n -l . && cd "$here" || return
    mkdir -p "${eng_shadowed[@]}"
}

eng_clean() {
    local rc=$?
    trap '' HUP INT TERM
    trap - EXIT
    if [[ -n $world ]]; then
        kill -KILL "$world" 2>/dev/null || true
        wait "$world" 2>/dev/null || true
    fi
    eng_remove "$ENG_DIR"
    # Whoever sourced this may have a last word.
    if declare -F eng_after >/dev/null; then eng_after "$rc" || exit; fi
    exit "$rc"
}

# What is left of a world when its processes are gone: cgroups, directories, files.
eng_remove() {
    local dir
    eng_until 10 eng_no_cgroups "$(basename "$1")" || eng_say "left behind: cgroups called $(basename "$1")"
    while read -r dir; do
        [[ $dir != */libpod_parent ]] || rmdir "$dir"/*/ 2>/dev/null || true
        rmdir "$dir" 2>/dev/null || true
    done < <(cat "$1/made" 2>/dev/null)
    if [[ ${ENG_KEEP:-} == 1 ]]; then
        rm -f "$1/owner" && eng_say "kept: $1"
    else
        rm -rf --one-file-system "$1" || eng_say "left behind: $1"
    fi
}

# Worlds whose outermost process was killed with SIGKILL: nobody holds the lock on `owner` any more.
eng_sweep() {
    local owner
    for owner in "$1"/mig-??????/owner; do
        [[ -e $owner ]] && flock --nonblock "$owner" true && eng_remove "$(dirname "$owner")"
    done
    return 0
}

# The cgroup of everything that our engines start, below every hierarchy; removes it, true when none is left.
eng_no_cgroups() {
    eng_rmdir_cgroups "$1" || return
    # Of v2 there may be no mount out here.
    [[ -n $(findmnt --noheadings --types cgroup2) ]] || ! eng_on_cgroup2 true || eng_on_cgroup2 "$ENG_SELF" rmdir-cgroups "$1"
}
eng_rmdir_cgroups() {
    # Slurm's are called after a node: slurm_$1...
    find /sys/fs/cgroup -depth -type d -path "*$1*" -exec rmdir {} + 2>/dev/null || true
    [[ -z $(find /sys/fs/cgroup -type d -name "*$1*" -print -quit 2>/dev/null) ]]
}

# ---------------------------------------------------------------------------------------------------------------------
# The image

# mig-probe, inside the container: what is there, and whether it opens. "allowed" is ENXIO: the container may open the
# node, only no driver answers, since the machine is simulated. "denied" is EPERM: the device cgroup said no.
eng_probe() {
    cat <<'PROBE'
#!/bin/sh
# mig-probe                  the NVIDIA nodes of this container with their verdicts, and its variables
# mig-probe MAJOR:MINOR...   make a node for a foreign device and try that
verdict() {
    said=$(dd if="$1" of=/dev/null bs=1 count=1 2>&1)
    case $said in
        *'No such device or address'*) echo allowed ;;
        *'Operation not permitted'*) echo denied ;;
        *"can't open"*) echo "unexpected: $said" ;;
        *) echo "opened: a driver answers" ;;
    esac
}
if [ $# -gt 0 ]; then
    for device; do
        mknod /tmp/foreign c "${device%:*}" "${device#*:}" || exit 1
        printf '%-32s %-8s %s\n' "foreign" "$device" "$(verdict /tmp/foreign)"
        rm /tmp/foreign
    done
    exit
fi
for node in /dev/nvidia* /dev/nvidia-caps/*; do
    [ -c "$node" ] || continue
    device=$(printf '%d:%d' 0x"$(stat -c %t "$node")" 0x"$(stat -c %T "$node")")
    printf '%-32s %-8s %s\n' "$node" "$device" "$(verdict "$node")"
done
env | grep -E '^(CUDA_VISIBLE_DEVICES|NVIDIA_VISIBLE_DEVICES|MIG_DEVICE_[A-Z]*)=' | sort
PROBE
}

# A busybox root, from the machine's own busybox (with its libraries, where it is not a static one).
eng_rootfs() {
    local root=$ENG_DIR/rootfs busybox applet lib
    busybox=$(command -v busybox) || eng_die "no busybox: run scripts/install-deps" || return
    mkdir -p "$root"/{bin,dev,etc,proc,sys,tmp}
    chmod 1777 "$root/tmp"
    cp "$busybox" "$root/bin/busybox"
    while read -r lib; do
        install -D "$lib" "$root$lib"
    done < <(ldd "$busybox" 2>/dev/null | grep -oE '/[^ ]+' || true)
    while read -r applet; do
        [[ $applet == busybox ]] || ln -s busybox "$root/bin/$applet"
    done < <("$busybox" --list)
    echo 'root:x:0:0:root:/:/bin/sh' >"$root/etc/passwd"
    echo 'root:x:0:' >"$root/etc/group"
    eng_probe >"$root/bin/mig-probe"
    chmod +x "$root/bin/mig-probe"
    tar -C "$root" --sort=name --owner=0 --group=0 --numeric-owner -cf "$ENG_DIR/rootfs.tar" .
}

# ---------------------------------------------------------------------------------------------------------------------
# crun

# On cgroup v2 crun 1.8 raises RLIMIT_MEMLOCK for its device program, and gives up where that is not allowed. Later ones
# go on, and so does this one when it isn't told. Whether it needs that is tried.
eng_crun() {
    local crun dir=$ENG_DIR/crun said
    eng_cgroup2 && crun=$(command -v crun) || return 0
    mkdir -p "$dir/bundle"
    crun spec --bundle "$dir/bundle" || eng_die "crun spec failed" || return
    jq --arg root "$ENG_DIR/rootfs" --arg group "/$(basename "$ENG_DIR")/crun" '.root.path = $root | .process.args = ["true"] |
        .process.terminal = false | del(.process.rlimits) | .linux.cgroupsPath = $group' \
        "$dir/bundle/config.json" >"$dir/config.json" && mv "$dir/config.json" "$dir/bundle/config.json" || return
    said=$(crun --root "$dir/root" --cgroup-manager cgroupfs run --bundle "$dir/bundle" try 2>&1 </dev/null) && return
    [[ $said == *MEMLOCK* ]] || return 0
    cat >"$dir/setrlimit.c" <<'C'
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>
int setrlimit(__rlimit_resource_t what, const struct rlimit *limit)
{
    long rc = syscall(SYS_prlimit64, 0, what, limit, 0);
    return what == RLIMIT_MEMLOCK ? 0 : rc;
}
C
    cc -shared -fPIC -D_GNU_SOURCE -o "$dir/setrlimit.so" "$dir/setrlimit.c" 2>"$ENG_DIR/logs/cc" ||
        eng_log_die cc "crun needs a library made by cc here" || return
    cat >"$ENG_DIR/bin/crun" <<WRAPPER
#!/bin/sh
LD_PRELOAD=$dir/setrlimit.so exec $crun "\$@"
WRAPPER
    chmod +x "$ENG_DIR/bin/crun"
}

# ---------------------------------------------------------------------------------------------------------------------
# podman

# podman before 5.0 asks for a million open files; where the hard limit is lower and may not be raised, the container
# would not start. Above 32768 processes conmon lowers its own limit first and then fails.
eng_ulimits() {
    local files tasks caps
    caps=$(sed -n 's/^CapEff:\t*//p' /proc/self/status)
    ((0x$caps >> 24 & 1)) && return
    files=$(prlimit --noheadings --raw --output HARD --nofile)
    tasks=$(prlimit --noheadings --raw --output HARD --nproc)
    [[ $files == unlimited ]] && files=1048576
    [[ $tasks == unlimited || $tasks -gt 32768 ]] && tasks=32768
    echo "default_ulimits = [\"nofile=$files:$files\", \"nproc=$tasks:$tasks\"]"
}

# A cgroup2 tree without the pids controller can't take podman's default limit.
eng_pids_limit() {
    local controllers=/sys/fs/cgroup/cgroup.controllers
    if [[ -e $controllers ]] && ! grep -qw pids "$controllers"; then echo 'pids_limit = 0'; fi
}

eng_podman() {
    local dir=$ENG_DIR/podman podman tree
    podman=$(PATH=${PATH#"$ENG_DIR/bin:"} command -v podman) || eng_die "no podman: run scripts/install-deps" || return
    mkdir -p "$dir/hooks.d" "$dir/cni"
    # `kube play` can't be told another parent for its pods.
    for tree in /sys/fs/cgroup /sys/fs/cgroup/*/; do
        [[ -e $tree/libpod_parent ]] || echo "$tree/libpod_parent" >>"$ENG_DIR/made"
    done
    cat >"$dir/containers.conf" <<CONF
[containers]
$(eng_ulimits)
$(eng_pids_limit)
netns = "none"
log_driver = "k8s-file"
http_proxy = false
[network]
network_config_dir = "$dir/cni"
[engine]
cgroup_manager = "cgroupfs"
events_logger = "none"
lock_type = "file"
infra_image = "$ENG_IMAGE"
hooks_dir = ["$dir/hooks.d"]
CONF
    cat >"$dir/storage.conf" <<CONF
[storage]
driver = "vfs"
graphroot = "$dir/root"
runroot = "$dir/run"
CONF
    cat >"$ENG_DIR/bin/podman" <<WRAPPER
#!/bin/sh
unset CONTAINER_HOST CONTAINER_CONNECTION CONTAINERS_CONF_OVERRIDE CONTAINERS_REGISTRIES_CONF STORAGE_DRIVER STORAGE_OPTS
export CONTAINERS_CONF="\${ENG_CONF:-$dir/containers.conf}" CONTAINERS_STORAGE_CONF=$dir/storage.conf
export HOME=$ENG_DIR/home TMPDIR=$ENG_DIR/tmp XDG_RUNTIME_DIR= PODMAN_IGNORE_CGROUPSV1_WARNING=1
# Members of a pod are in the pod's cgroup and may name no other; nor may what has none.
case "\$1 \$2 \$* " in
    'pod create '*) shift 2 && set -- pod create --cgroup-parent /$(basename "$ENG_DIR") "\$@" ;;
    'run '*' --pod '* | 'create '*' --pod '* | 'run '*' --cgroups=disabled '*) ;;
    'run '* | 'create '*) sub=\$1 && shift && set -- "\$sub" --cgroup-parent /$(basename "$ENG_DIR") "\$@" ;;
esac
store=\${ENG_STORE:-$dir} runtime=\${ENG_RUNTIME:-runc}
[ ! -x "$ENG_DIR/bin/\$runtime" ] || runtime=$ENG_DIR/bin/\$runtime
exec $podman --root "\$store/root" --runroot "\$store/run" --tmpdir "\$store/tmp" --storage-driver vfs \\
    --runtime "\$runtime" \${ENG_HOOKS_DIR:+--hooks-dir "\$ENG_HOOKS_DIR"} "\$@"
WRAPPER
    chmod +x "$ENG_DIR/bin/podman"
    # With a command, so that it serves as the first container of a pod too.
    "$ENG_DIR/bin/podman" import -q --change 'CMD ["/bin/sh", "-c", "trap exit TERM; sleep 2147483 & wait"]' \
        "$ENG_DIR/rootfs.tar" "$ENG_IMAGE" >"$ENG_DIR/logs/podman" 2>&1 ||
        eng_log_die podman "podman could not import the image"
}

# ---------------------------------------------------------------------------------------------------------------------
# docker, and the containerd below it

# A containerd of our own as well: dockerd would otherwise use the host's, where one runs.
eng_containerd() {
    local dir=$ENG_DIR/containerd plugins
    mkdir -p "$dir"
    # No CRI, and nothing that writes outside the scratch directory (/opt/containerd, /run/nri). Names of 1.x and 2.x.
    plugins='"io.containerd.grpc.v1.cri", "io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime",'
    plugins+=' "io.containerd.internal.v1.opt", "io.containerd.nri.v1.nri", "io.containerd.snapshotter.v1.aufs",'
    plugins+=' "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.devmapper",'
    plugins+=' "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.blockfile"'
    cat >"$dir/config.toml" <<CONF
version = 2
root = "$dir/root"
state = "$dir/state"
disabled_plugins = [$plugins]
[grpc]
  address = "$dir/c.sock"
[ttrpc]
  address = "$dir/c.ttrpc"
CONF
    cat >"$ENG_DIR/bin/ctr" <<WRAPPER
#!/bin/sh
exec $(command -v ctr) -a $dir/c.sock "\$@"
WRAPPER
    chmod +x "$ENG_DIR/bin/ctr"
    containerd --config "$dir/config.toml" >"$ENG_DIR/logs/containerd" 2>&1 </dev/null &
    eng_ready containerd $! "$ENG_DIR/bin/ctr" version
}

# Becomes a dockerd that keeps everything in one directory: eng_dockerd DIR SETTINGS
eng_dockerd() {
    mkdir -p "$1"
    export TMPDIR=$ENG_DIR/tmp HOME=$ENG_DIR/home
    exec dockerd --config-file "$2" --data-root "$1/data" --exec-root "$1/exec" --pidfile "$1/pid" -H "unix://$1/d.sock" \
        -G root --containerd "$ENG_DIR/containerd/c.sock" --containerd-namespace "$(tr / . <<<"${1#/}")" \
        --storage-driver vfs --exec-opt native.cgroupdriver=cgroupfs --cgroup-parent "/$(basename "$ENG_DIR")" \
        --shutdown-timeout 5 --bridge none --iptables=false --ip6tables=false --ip-forward=false --ip-masq=false \
        --userland-proxy=false
}

eng_docker() {
    local dir=$ENG_DIR/docker client
    command -v dockerd >/dev/null || eng_die "no dockerd: run scripts/install-deps" || return
    command -v containerd >/dev/null || eng_die "no containerd: run scripts/install-deps" || return
    # The client that came with the daemon, before any newer one that no longer speaks to it.
    client=/usr/bin/docker
    [[ -x $client ]] || client=$(PATH=${PATH#"$ENG_DIR/bin:"} command -v docker) || eng_die "no docker client" || return
    mkdir -p "$dir" "$ENG_DIR/home/docker"
    [[ -e $ENG_DIR/daemon.json ]] || echo '{"features": {"cdi": true}}' >"$ENG_DIR/daemon.json"
    cat >"$ENG_DIR/bin/docker" <<WRAPPER
#!/bin/sh
unset DOCKER_CONTEXT DOCKER_HOST DOCKER_TLS_VERIFY DOCKER_CERT_PATH DOCKER_API_VERSION
export DOCKER_CONFIG=$ENG_DIR/home/docker
case \$1 in
    run | create) sub=\$1 && shift && set -- "\$sub" --network none "\$@" ;;
esac
exec $client -H "unix://\${ENG_DOCKER:-$dir}/d.sock" "\$@"
WRAPPER
    chmod +x "$ENG_DIR/bin/docker"
    [[ -S $ENG_DIR/containerd/c.sock ]] || eng_containerd || return
    eng_dockerd "$dir" "$ENG_DIR/daemon.json" >"$ENG_DIR/logs/dockerd" 2>&1 </dev/null &
    eng_ready dockerd $! "$ENG_DIR/bin/docker" version || return
    "$ENG_DIR/bin/docker" import "$ENG_DIR/rootfs.tar" "$ENG_IMAGE" >"$ENG_DIR/logs/docker-import" 2>&1 ||
        eng_log_die docker-import "docker could not import the image"
}

# Waits for a daemon to answer: eng_ready NAME PID CMD...; says why when it ends instead.
eng_ready() {
    local name=$1 pid=$2 end=$((SECONDS + 60))
    shift 2
    echo "$pid" >"$ENG_DIR/logs/$name.pid"
    until "$@" >/dev/null 2>&1; do
        kill -0 "$pid" 2>/dev/null || eng_log_die "$name" "$name did not start" || return
        ((SECONDS < end)) || eng_log_die "$name" "$name does not answer" || return
        sleep 0.1
    done
}

# The end of a log, then an error.
eng_log_die() {
    tail -n 15 "$ENG_DIR/logs/$1" | cut -c -300 >&2
    eng_die "$2"
}

# Stops the daemons as an administrator would. Not needed for cleaning up: eng_isolate needs no one's cooperation.
eng_stop() {
    local name pid
    for name in dockerd containerd; do
        [[ -e $ENG_DIR/logs/$name.pid ]] || continue
        pid=$(<"$ENG_DIR/logs/$name.pid")
        kill -TERM "$pid" 2>/dev/null || continue
        eng_until 20 eng_gone "$pid" || eng_die "$name (pid $pid) does not stop" || return
        rm "$ENG_DIR/logs/$name.pid"
    done
}
eng_gone() { ! kill -0 "$1" 2>/dev/null || [[ $(sed 's/.*) //' "/proc/$1/stat" 2>/dev/null) == Z* ]]; }

# Makes dockerd read $ENG_DIR/daemon.json again: the runtimes in it can change while it runs.
eng_reload() {
    local before
    before=$(eng_reloads)
    kill -HUP "$(<"$ENG_DIR/logs/dockerd.pid")" && eng_until 10 eng_reloaded "$before"
}
eng_reloads() { grep -c 'Reloaded configuration' "$ENG_DIR/logs/dockerd" || true; }
eng_reloaded() { (($(eng_reloads) > $1)); }

eng_up() {
    local engine
    [[ -n ${ENG_DIR:-} ]] || eng_die "run this inside: scripts/engines.sh isolate" || return
    [[ -e $ENG_DIR/rootfs.tar ]] || { eng_rootfs && eng_crun; } || return
    for engine; do
        case $engine in
            podman) eng_podman || return ;;
            docker) eng_docker || return ;;
            *) eng_die "no engine called $engine" || return ;;
        esac
    done
}

# Runs a command with these engines, or with those of them that work: eng_with 'podman docker' CMD...
eng_with() {
    local engine
    export ENG_IMAGE TMPDIR=$ENG_DIR/tmp
    for engine in '' $1; do
        if ! eng_up ${engine:+"$engine"} 2>"$ENG_DIR/logs/up"; then
            cat "$ENG_DIR/logs/up" >&2
            echo "SKIP: ${engine:-all} containers: $(tail -n 1 "$ENG_DIR/logs/up")" >>"${MIG_TEST_SKIPS:-/dev/null}"
            rm -f "$ENG_DIR/bin/${engine:-none}"
        fi
    done
    shift
    "$@"
}

# ---------------------------------------------------------------------------------------------------------------------

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
    set -uo pipefail
    command=${1:-help}
    [[ $# -gt 0 ]] && shift
    case $command in
        isolate) eng_isolate "$@" ;;
        inside) eng_inside "$@" ;;
        view) eng_cgroups && "$@" ;;
        rmdir-cgroups) eng_rmdir_cgroups "$1" ;;
        up) eng_up "$@" ;;
        dockerd) eng_dockerd "$@" ;;
        with) eng_with "$@" ;;
        reload) eng_reload ;;
        stop) eng_stop ;;
        why-not) eng_why_not ;;
        *) sed -n '2,/^$/s/^# \{0,1\}//p' "$ENG_SELF" ;;
    esac
fi
