"""Measurements: `python -m benchmarks.NAME`, from the root of the repository, prints the page NAME.md."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
