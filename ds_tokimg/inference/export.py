"""A trained model as a folder that needs neither DeepSpeed nor the run."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from ds_tokimg.inference.loading import TrainedModel
from ds_tokimg.settings import formats


def export(trained: TrainedModel, output: Path) -> None:
    """Writes the folder whole or not at all."""
    output.parent.mkdir(parents=True, exist_ok=True)
    if output.is_dir():
        output.rmdir()
    staging = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        trained.model.save_pretrained(staging)
        (staging / formats.TEXT).write_text(trained.format.description() + "\n", encoding="utf-8")
        trained.tokenizer.save_pretrained(staging / "tokenizer")
        staging.chmod(0o755)
        os.replace(staging, output)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
