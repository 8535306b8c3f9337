#!/usr/bin/env bash
# Root directories with a Debian suite and container engines, for tests: target/engines/SUITE, made by debootstrap from the
# mirror that this machine's apt has, and kept for the next time: remove one to get newer engines. As root.
#
#   source scripts/engines.sh; source scripts/roots.sh; root_make SUITE DIR      with $tmp, a directory for scratch files
#   scripts/roots.sh make SUITE      the one that the tests use

# Those that a suite's apt doesn't know are left out. cc is for tests that build a library.
root_packages=(podman crun runc conmon containerd docker.io docker-cli nftables netavark nerdctl docker-compose cri-tools
    busybox-static jq procps iproute2 strace util-linux findutils catatonit gcc libc6-dev curl systemd dbus make
    uidmap rpm musl-tools python3 python3-yaml acl charliecloud-runtime)

# Where apt gets Debian from here: the first such mirror that has the suite.
# shellcheck disable=SC2016,SC2154  # $tmp is of who sources this
root_mirror() {
    local uri
    while read -r uri; do
        if /usr/lib/apt/apt-helper download-file "${uri%/}/dists/$1/InRelease" "$tmp/release" >"$tmp/apt" 2>&1; then
            echo "${uri%/}" && return
        fi
    done < <(apt-get indextargets --format '$(REPO_URI)' 'Identifier: Packages' 'Origin: Debian' | sort -u)
    return 1
}

# Makes the root directory, or says why there is none. A half-made one never gets its name.
root_make() {
    local suite=$1 root=$2 from
    exec {making}>"$root.lock"
    flock "$making"
    [[ $(cat "$root/etc/mig-engines" 2>/dev/null) != "${root_packages[*]}" ]] || return 0
    scripts/install-deps debootstrap gpgv || eng_die "debootstrap can't be installed" || return
    from=$(root_mirror "$suite") || eng_die "no mirror in apt's sources has the Debian suite $suite" || return
    echo "making $root from $from (a minute or two)"
    rm -rf --one-file-system "$root" "$root.part" || return
    mkdir -p "$root.part/etc/dpkg/dpkg.cfg.d"
    printf '%s\n' force-unsafe-io 'path-exclude=/usr/share/'{doc,man,locale}'/*' >"$root.part/etc/dpkg/dpkg.cfg.d/mig-engines"
    # A mirror that stalls must not hold up a whole CI run.
    if ! (eng_alone timeout 900 scripts/roots.sh fill "$suite" "$root.part" "$from") >"$root.log" 2>&1; then
        tail -n 15 "$root.log" >&2
        eng_die "debootstrap $suite failed: $(grep -E '^[EW]: ' "$root.log" | tail -n 1)" || return
    fi
    echo "${root_packages[*]}" >"$root.part/etc/mig-engines"
    mv "$root.part" "$root"
}

# In namespaces of its own.
root_fill() {
    local suite=$1 root=$2 from=$3 script=$1 known=() name
    # A suite younger than this debootstrap is made as sid is.
    [[ -e /usr/share/debootstrap/scripts/$suite ]] || script=sid
    debootstrap --variant=minbase --force-check-gpg "$suite" "$root" "$from" "$script" || return
    mount -t proc proc "$root/proc" || return
    printf '#!/bin/sh\nexit 101\n' >"$root/usr/sbin/policy-rc.d" && chmod +x "$root/usr/sbin/policy-rc.d" || return
    mkdir -p "${eng_shadowed[@]/#/$root}"
    export DEBIAN_FRONTEND=noninteractive LC_ALL=C.UTF-8 PATH=/usr/sbin:/usr/bin:/sbin:/bin
    # A mirror may lag behind what it promised.
    chroot "$root" apt-get -o Acquire::Check-Valid-Until=false update || return
    for name in "${root_packages[@]}"; do
        [[ $(chroot "$root" apt-cache policy "$name") != *'Candidate: '[!\(]* ]] || known+=("$name")
    done
    chroot "$root" apt-get install -y --no-install-recommends "${known[@]}" || return
    # containerd 2 starts no pod without it.
    [[ -e $root/etc/hosts ]] || echo '127.0.0.1 localhost' >"$root/etc/hosts"
    chroot "$root" apt-get clean
}

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
    set -uo pipefail
    cd "$(dirname "$(realpath "$0")")/.." || exit
    # shellcheck source=scripts/engines.sh
    source scripts/engines.sh
    case ${1:-} in
        fill) shift && root_fill "$@" ;;
        make)
            tmp=$(mktemp -d)
            trap 'rm -rf "$tmp"' EXIT
            mkdir -p target/engines && root_make "$2" "$PWD/target/engines/$2"
            ;;
        *) sed -n '2,/^$/s/^# \{0,1\}//p' "$0" >&2 && exit 2 ;;
    esac
fi
