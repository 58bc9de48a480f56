#!/usr/bin/env bash
# Shows all runs below a folder in TensorBoard, each under the name of its folder, also those that begin later:
#   bash launch/tensorboard.sh [FOLDER] [tensorboard flags]
# Only this machine sees it; from another, `ssh -L 6006:localhost:6006 MACHINE`, or --bind_all for everybody.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/setup.sh

runs=$(realpath -m "${1:-runs}")
# TensorBoard calls a run by its path below --logdir: links leave out the `tensorboard` at the end of each.
links=$(mktemp -d)
link_runs() {
    { find -L "$runs" -name checkpoints -prune -o -type d -name tensorboard -print0 2>/dev/null || true; } |
        while IFS= read -r -d '' logs; do
            run=$(dirname "$logs")
            [ "$run" = "$runs" ] && name=$(basename "$run") || name=${run#"$runs"/}
            ln -sfn "$logs" "$links/${name//\//__}"
        done
}
link_runs
(
    while kill -0 $$ 2>/dev/null; do # as long as TensorBoard, which takes over this process
        sleep 5
        link_runs
    done
    rm -rf "$links"
) >/dev/null 2>&1 &

case " ${*:2}" in
    *" --bind_all"* | *" --host"*) place=() ;;
    *) place=(--host localhost) ;;
esac
exec tensorboard --logdir "$links" "${place[@]}" "${@:2}"
