#!/usr/bin/env bash
# Sets up a virtual environment (once) and runs linter, type checker and tests. --all adds the slow tests; other flags go
# to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
requirements=requirements-dev.txt
source launch/setup.sh

export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
ruff check .
ruff format --check .
python -m mypy
exec python -m pytest "$@"
