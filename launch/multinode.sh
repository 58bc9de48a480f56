#!/usr/bin/env bash
# Trains on all hosts of a hostfile, started from one of them over ssh:
#   bash launch/multinode.sh HOSTFILE --data_path PATH [train flags]
# The hosts share this folder and the data under the same paths. With pdsh (or LAUNCHER=NAME, see `deepspeed --help`)
# the deepspeed launcher reaches the hosts; without it, or with LAUNCHER=ssh, it is started on each of them over ssh.
# LAUNCHER_FLAGS go to it. SIGTERM lets all ranks save and leave.
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
# A host that is gone is noticed within a minute.
alive="-o BatchMode=yes -o ServerAliveInterval=15 -o ServerAliveCountMax=4"
launch=(deepspeed -q --no_local_rank --hostfile "$hostfile")
train=(--module ds_tokimg train "${@:2}")

launcher=${LAUNCHER:-$(command -v pdsh >/dev/null && echo pdsh || echo ssh)}
if [ "$launcher" != ssh ]; then
    export PDSH_SSH_ARGS_APPEND="${PDSH_SSH_ARGS_APPEND:-} $alive"
    exec "${launch[@]}" --launcher "$launcher" ${LAUNCHER_FLAGS:-} "${train[@]}"
fi

mapfile -t hosts < <(sed -E 's/#.*//; /^\s*$/d; s/\s.*//' "$hostfile")
mapfile -t variables <.deepspeed_env
address=$(ssh -n $alive "${hosts[0]}" hostname -I | cut -d ' ' -f 1)
# What is started on a host is one session, whose number is kept there so that it can be asked to end.
session=/tmp/ds_tokimg_$(hostname)_$$
for rank in "${!hosts[@]}"; do
    command=(env "${variables[@]}" "${launch[@]}" --no_ssh --node_rank "$rank" --master_addr "$address")
    command+=(${LAUNCHER_FLAGS:-} "${train[@]}")
    file=$session.$rank
    ssh -n $alive "${hosts[rank]}" \
        "echo \$\$ >$file && cd ${PWD@Q} && ${command[*]@Q}; status=\$?; rm -f $file; exit \$status" &
done
end() {
    for rank in "${!hosts[@]}"; do
        ssh -n $alive "${hosts[rank]}" "kill -TERM -- -\$(cat $session.$rank) && rm -f $session.$rank" 2>/dev/null || true
    done
}
trap end TERM INT
for _ in "${hosts[@]}"; do
    wait -n || { status=$?; end; wait; exit $status; }
done
