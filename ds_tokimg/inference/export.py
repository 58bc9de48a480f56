"""A trained model as a folder that needs neither DeepSpeed nor the run."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from ds_tokimg.data.run_texts import file_of
from ds_tokimg.inference.loading import TrainedModel
from ds_tokimg.settings import formats


def export(trained: TrainedModel, output: Path) -> None:
    """Writes the folder whole or not at all. An empty one that is there already (the folder one is in, a link to one, a
    disk of its own) is filled, model.json last: without it a folder is no export."""
    there = output.is_dir()
    place = output if there else output.parent
    place.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=place))
    try:
        trained.model.save_pretrained(staging)
        (staging / formats.TEXT).write_text(trained.format.description() + "\n", encoding="utf-8")
        trained.tokenizer.save_pretrained(staging / "tokenizer")
        known = file_of(trained.path)
        if known.is_file():
            shutil.copyfile(known, staging / formats.DATA)
        if there:
            for path in sorted(staging.iterdir(), key=lambda path: path.name == formats.MODEL):
                os.replace(path, output / path.name)
            staging.rmdir()
        else:
            staging.chmod(0o755)
            os.replace(staging, output)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
