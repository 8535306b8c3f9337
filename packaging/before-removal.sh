    # Containers, commands and jobs that hold slices end by calling mig-hook: with some runtimes they can't be deleted
    # without it, and nobody gives their slices back.
    timeout 60 migctl gc >/dev/null 2>&1 || true
    if held=$(migctl leases 2>&1); then
        held=$(printf '%s\n' "$held" | awk 'NR == 1 || $2 != "static"')
        [ "$(printf '%s\n' "$held" | wc -l)" -gt 1 ] || held=
    elif [ -z "$(find /run/mig-hook/leases -name '*.json' 2>/dev/null)" ]; then
        held=
    fi
    # Those of users without root; each user's own `migctl gc` clears what has ended.
    theirs=$(find /run/user/*/mig-hook/leases -name '*.json' 2>/dev/null || true)
    if [ -n "$held$theirs" ] && [ "${MIG_HOOK_REMOVE:-}" != anyway ]; then
        {
            echo "mig-hook stays: MIG slices are held, and would not be given back without it:"
            printf '%s\n%s\n' "$held" "$theirs" | sed '/^$/d; s/^/  /'
            echo "Stop those, then remove it; or, to leave their slices behind, with MIG_HOOK_REMOVE=anyway in the environment."
        } >&2
        exit 1
    fi

    # Containers of a runtime that is not there do not start: none at all where it is the default one. A node of Slurm whose
    # Prolog is not there is drained.
    for engine in podman docker containerd crio; do
        if ! said=$(migctl configure "$engine" --remove 2>&1); then
            printf 'mig-hook: %s is still registered with %s:\n%s\n' mig-runtime "$engine" "$said" >&2
        elif ! printf '%s' "$said" | grep -q 'nothing to remove'; then
            printf '%s\n' "$said" | grep -E '^(/|next: )' || true
        fi
    done
    left=$(grep -lE '^[^#]*(mig-runtime|mig-hook/(hooks.d|slurm))' /etc/docker/daemon.json /etc/containerd/config.toml \
        /etc/containers/containers.conf /etc/containers/containers.conf.d/*.conf \
        /etc/crio/crio.conf /etc/crio/crio.conf.d/*.conf /etc/slurm/*.conf 2>/dev/null || true)
    if [ -n "$left" ] && [ "${MIG_HOOK_REMOVE:-}" != anyway ]; then
        {
            echo "mig-hook stays: these files name what would not be there any more:"
            printf '%s\n' "$left" | sed 's/^/  /'
            echo "Take it out by migctl configure ENGINE --remove --name NAME, or by hand, then remove mig-hook."
        } >&2
        exit 1
    fi
