#!/usr/bin/env bash
# Trains on all hosts of a hostfile, started from one of them over ssh (pdsh where it is installed):
#   bash launch/multinode.sh HOSTFILE --data_path PATH [train flags]
# The hosts share this folder and the data under the same paths. LAUNCHER_FLAGS go to the deepspeed launcher.
set -euo pipefail
if [ $# -eq 0 ] || [ ! -f "$1" ]; then
    echo "usage: bash launch/multinode.sh HOSTFILE --data_path PATH [train flags]   (see launch/hostfile.example)" >&2
    exit 2
fi
hostfile=$(realpath "$1")
cd "$(dirname "$0")/.."
source launch/setup.sh

# The launcher hands only some variables on to the other hosts; these decide how ranks compute and talk.
env | grep -E '^(PATH|PYTHONPATH|DS_|DEEPSPEED_|OMP_|GLOO_|NCCL_|HF_)' >.deepspeed_env || true
launcher=$(command -v pdsh >/dev/null && echo pdsh || echo openmpi)
exec deepspeed -q --no_local_rank --hostfile "$hostfile" --launcher "${LAUNCHER:-$launcher}" ${LAUNCHER_FLAGS:-} \
    --module ds_tokimg train "${@:2}"
