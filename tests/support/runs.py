"""Small runs of the real trainer for tests: real text, a model of a few thousand parameters, forked ranks."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from pathlib import Path

from tests.support.distributed import run_ranks

ROOT = Path(__file__).parents[2]
WORDS = "the cat sat on a mat and the dog ran to the old house by the sea where it slept all day long".split()


def write_corpus(folder: Path, documents: int = 400) -> Path:
    """Lines of 3 to 30 words, all different: folder/corpus.txt."""
    lines = [
        " ".join(WORDS[(i * 7 + j * (1 + i % 3)) % len(WORDS)] for j in range(3 + i % 28)) for i in range(documents)
    ]
    path = folder / "corpus.txt"
    path.write_text("".join(f"{line} {i}\n" for i, line in enumerate(lines)), encoding="utf-8")
    return path


def copy_project(folder: Path) -> Path:
    """A copy of the project's files, without tests, in which launch scripts may write: folder/ds_tokimg."""
    project = folder / "ds_tokimg"
    project.mkdir()
    for name in ("ds_tokimg", "launch", "data", "ds_config.json", "requirements.txt", "requirements-dev.txt"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, project / name)
    return project


def small_flags(data_path, output_dir, *more) -> list[str]:
    """Flags of a run that takes a few seconds; later flags win."""
    defaults = "--model JiT-XS/4 --img_size 16 --max_tokens 64 --vocab_size 300 --train_batch_size 8 --seed 1"
    defaults += " --timesteps band --lr 1e-3 --epochs 1"
    intervals = "--log_interval 1 --eval_interval 4 --save_interval 4 --num_samples 0 --max_steps 4"
    intervals += " --eval_tokens 0"  # all of the few held-out texts, as `evaluate` reads them
    paths = ["--data_path", str(data_path), "--output_dir", str(output_dir)]
    return [*paths, *defaults.split(), *intervals.split(), *map(str, more)]


def train_in_ranks(world_size: int, flags: list[str], timeout: float = 300.0) -> str:
    """`python -m ds_tokimg train FLAGS` on forked ranks with a tiny model -> what rank 0 printed."""
    return run_ranks(world_size, _train, flags, timeout=timeout)[0]


def _train(dist, flags: list[str]) -> str:
    from ds_tokimg.model import config as shapes
    from ds_tokimg.settings import engine_json
    from ds_tokimg.settings.command_line import train_config
    from ds_tokimg.training.run import train

    shapes.SIZES["XS"] = (2, 32, 2)
    config = train_config(flags)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        train(config, engine_json.read(config.deepspeed_config), dist)
    return printed.getvalue()


def metrics(output_dir) -> list[dict]:
    return [json.loads(line) for line in (Path(output_dir) / "metrics.jsonl").read_text().splitlines()]


def learned(rows: list[dict]) -> list[dict]:
    """The rows without what depends on the clock."""
    clock = ("seconds", "second", "data_wait", "flops", "peak")
    return [{k: v for k, v in row.items() if not any(word in k for word in clock)} for row in rows]
