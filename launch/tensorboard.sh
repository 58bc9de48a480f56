#!/usr/bin/env bash
# Shows all runs below a folder in TensorBoard: bash launch/tensorboard.sh [FOLDER] [tensorboard flags]
# Only this machine sees it; from another, `ssh -L 6006:localhost:6006 MACHINE`, or --bind_all for everybody.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/setup.sh

case " ${*:2}" in
    *" --bind_all"* | *" --host"*) place=() ;;
    *) place=(--host localhost) ;;
esac
exec tensorboard --logdir "${1:-runs}" "${place[@]}" "${@:2}"
