"""What a complete run shows of its model."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ds_tokimg.console import Work
from ds_tokimg.inference.loading import load_trained
from ds_tokimg.inference.sampler import SamplingOptions
from ds_tokimg.inference.texts import generate
from ds_tokimg.settings.config import TrainConfig
from ds_tokimg.training.assemble import Parts


def write_samples(config: TrainConfig, parts: Parts, checkpoint: Path) -> list[dict]:
    """`num_samples` texts as a user would get them, from the averaged weights of a checkpoint on the disk."""
    trained = load_trained(str(checkpoint))
    with Work("writing samples"):
        return generate(trained, _prompts(config, parts), SamplingOptions(seed=config.seed))


def _prompts(config: TrainConfig, parts: Parts) -> list[str | None]:
    """Held-out ones where prompts are conditions, else none."""
    count, held_out = config.num_samples, parts.eval_set
    if not config.enable_condition or not len(held_out):
        return [None] * count
    return [parts.tokenizer.decode(held_out.prompt_ids(i)) for i in range(min(count, len(held_out)))]


def prompt_to_try(config: TrainConfig, parts: Parts) -> str | None:
    """Of a run whose prompts are conditions: one that its model can be asked to answer."""
    if not config.enable_condition:
        return None
    for texts in (parts.eval_set, parts.train_set):
        asked = np.flatnonzero(texts.prompt_lengths)
        if len(asked):
            return parts.tokenizer.decode(texts.prompt_ids(int(asked[0])))
    return None
