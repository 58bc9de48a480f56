#!/usr/bin/env bash
# Sets up a virtual environment (once) and trains on the bundled corpus. Further flags go to the trainer:
#   bash launch/train.sh --recipe left-to-right --epochs 8 --output_dir runs/longer
# RANKS=N starts N ranks; without it, one on a CPU and one per GPU elsewhere. They meet at MASTER_PORT, or any free port.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/setup.sh

if ! command -v nvidia-smi >/dev/null; then
    export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu} RANKS=${RANKS:-1}
fi
free_port='import socket; place = socket.socket(); place.bind(("127.0.0.1", 0)); print(place.getsockname()[1])'
deepspeed -q --no_local_rank ${RANKS:+--num_accelerators "$RANKS"} \
    --master_port "${MASTER_PORT:-$(python -c "$free_port")}" --module ds_tokimg train \
    --data_path data/web_narrative.txt \
    --eval_interval 400 --save_interval 400 \
    --output_dir "runs/$(date +%Y%m%d-%H%M%S)" \
    "$@" &
# On SIGTERM the launcher would leave its ranks behind: hand it to the process that it started for them, and they save.
launcher=$!
trap 'kill -TERM $(</proc/$launcher/task/$launcher/children) || true; wait $launcher' TERM INT
wait $launcher
