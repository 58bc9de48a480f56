#!/usr/bin/env bash
# Is the trainer right and fast on this machine's GPUs? Prints tables and writes benchmarks/results/gpu.md, in about 15
# minutes on one GPU:
#   bash launch/gpu.sh [--parts losses runs ...] [--output FILE]
# --dry runs all of it small, also on a CPU. Where the machine's own Python (or PYTHON) has torch and deepspeed already, as
# images for GPUs do, it is used as it is: another build of torch may not know the card.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
if ! "$python" -c 'import datasets, deepspeed, torch, transformers' 2>/dev/null; then
    source launch/setup.sh
    python=python
fi
exec "$python" -m benchmarks.gpu "$@"
