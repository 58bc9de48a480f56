#!/usr/bin/env bash
# Sets up a virtual environment (once) and trains on the bundled corpus. Further flags go to the trainer:
#   bash launch/train.sh --recipe left-to-right --epochs 8 --output_dir runs/longer
# RANKS=N starts N ranks; without it, one on a CPU and one per GPU elsewhere. They meet at MASTER_PORT, or any free port.
# --max_restarts N: after a failure the run goes on from its newest checkpoint, up to N times, as long as it gains steps.
set -euo pipefail
cd "$(dirname "$0")/.."

# What is started here is a process group of its own: a signal to this script goes to all of it, and nothing is left.
set -m
job= asked=
end() {
    asked=yes
    [ -z "$job" ] || kill -TERM -- "-$job" 2>/dev/null || true
}
trap end TERM INT
run() { # the status of a command, once all that it started has ended
    [ -z "$asked" ] || return 143
    local status=0 waited=0
    "$@" &
    job=$!
    [ -z "$asked" ] || end # it came in between
    wait "$job" || status=$?
    while kill -0 -- "-$job" 2>/dev/null && [ $waited -lt 600 ]; do # a trap ends a wait; ranks may be saving yet
        wait "$job" 2>/dev/null || true
        sleep 0.2
        waited=$((waited + 1))
    done
    job=
    return $status
}
step=run
source launch/setup.sh

restarts=0 flags=()
while [ $# -gt 0 ]; do
    case $1 in
        --max_restarts) restarts=${2-} && shift $(($# > 1 ? 2 : 1)) ;;
        --max_restarts=*) restarts=${1#*=} && shift ;;
        *) flags+=("$1") && shift ;;
    esac
done
[[ $restarts =~ ^[0-9]+$ ]] || { echo "error: --max_restarts takes a whole number, not '$restarts'" >&2; exit 2; }

if ! command -v nvidia-smi >/dev/null; then
    export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu} RANKS=${RANKS:-1}
fi
free_port='import socket; place = socket.socket(); place.bind(("127.0.0.1", 0)); print(place.getsockname()[1])'
output_dir=runs/$(date +%Y%m%d-%H%M%S)
export DS_TOKIMG_SCRIPT=$$ # ranks notice when this script is killed
for ((number = 0; number <= restarts; number++)); do
    export DS_TOKIMG_RESTART=$number
    [ $number = 0 ] || echo "restart $number of at most $restarts: the run goes on from its newest checkpoint"
    status=0
    run deepspeed -q --no_local_rank ${RANKS:+--num_accelerators "$RANKS"} \
        --master_port "${MASTER_PORT:-$(python -c "$free_port")}" --module ds_tokimg train \
        --data_path data/web_narrative.txt \
        --eval_interval 400 --save_interval 400 \
        --output_dir "$output_dir" \
        ${flags[@]+"${flags[@]}"} || status=$?
    # The launcher's own status says nothing where it was signalled: the ranks have said how they ended.
    [ -z "$asked" ] || exit 0
    [ $status != 0 ] && [ $status != 2 ] || break # 2: a mistake of the user, which would be one again
done
exit $status
