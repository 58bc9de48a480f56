#!/usr/bin/env bash
# Sets up a virtual environment (once) and runs linter, type checker and tests. --all adds the slow tests; other flags go
# to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
requirements=requirements-dev.txt
source launch/setup.sh

workers=$(env -u OMP_NUM_THREADS nproc) # which would count that variable's threads
export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
ruff check .
ruff format --check .
python -m mypy
# A worker a core, a file of tests each; most tests use one thread. Files in their order: the long ones are not the last.
exec python -m pytest -n "$workers" --maxprocesses 4 --dist loadfile --no-loadscope-reorder "$@"
