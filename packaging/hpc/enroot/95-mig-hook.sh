#!/usr/bin/env bash
# enroot, and pyxis, which starts it: a container that is started in a job gets the job's slices. For /etc/enroot/hooks.d, in
# front of 98-nvidia.sh, which makes the devices and the driver's files from what is written here. Runs as the user.
set -euo pipefail -f

# MIG_JOB is in the environment of what migctl gave a slice to. pyxis hands on only Slurm's own variables.
if [ -z "${MIG_JOB-}${SLURM_JOB_ID-}" ]; then
    exit 0
fi
# Whoever says void or none wants no GPU.
case ${NVIDIA_VISIBLE_DEVICES-} in void | none) exit 0 ;; esac

code=0
lines=$(/usr/bin/migctl job env --format docker 2>&1) || code=$?
case ${code} in
0) ;;
65) exit 0 ;; # a job that has no slice here
*)
    printf '95-mig-hook: %s\n' "${lines#migctl: }" >&2
    exit 1
    ;;
esac

uuids=$(sed -n 's/^NVIDIA_VISIBLE_DEVICES=//p' <<<"${lines}")
printf '%s\n' "${lines}" >>"${ENROOT_ENVIRON}"

# To 98-nvidia.sh a variable of enroot's own environment says more than that file. So it may name some of the job's slices
# (one for each rank), and nothing else.
if [ -n "${NVIDIA_VISIBLE_DEVICES-}" ]; then
    for device in ${NVIDIA_VISIBLE_DEVICES//,/ }; do
        case ,${uuids}, in
        *,"${device}",*) ;;
        *)
            printf '95-mig-hook: NVIDIA_VISIBLE_DEVICES=%s is no slice of this job, which has %s: unset it\n' \
                "${NVIDIA_VISIBLE_DEVICES}" "${uuids}" >&2
            exit 1
            ;;
        esac
    done
    printf '%s\n' "NVIDIA_VISIBLE_DEVICES=${NVIDIA_VISIBLE_DEVICES}" "CUDA_VISIBLE_DEVICES=${NVIDIA_VISIBLE_DEVICES}" \
        >>"${ENROOT_ENVIRON}"
fi
