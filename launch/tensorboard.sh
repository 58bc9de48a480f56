#!/usr/bin/env bash
# Shows all runs below a folder in TensorBoard: bash launch/tensorboard.sh [FOLDER] [tensorboard flags]
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/setup.sh

exec tensorboard --logdir "${1:-runs}" "${@:2}"
