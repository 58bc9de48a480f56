"""How much of the held-out texts a validation reads, so that it costs little beside the training.

A budget is counted in tokens, never in seconds: ranks and restarts agree on it, and a run's figures can be had again.
What it affords follows from what a token costs in a validation beside a token that is trained on, for which two rough
figures stand below; benchmarks/validation_budget.py measures them.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from ds_tokimg.data.dataset import TokenImageDataset
from ds_tokimg.data.rng import Stream, generator
from ds_tokimg.diffusion.levels import NoiseLevels, SamplingPath
from ds_tokimg.diffusion.writing import Writing
from ds_tokimg.settings.config import TrainConfig
from ds_tokimg.training.assemble import Parts
from ds_tokimg.training.bound import DEFAULT_LEVELS

# What validations may cost, beside the training: each on the way, beside the steps since the one before; and the one at
# the end, beside the whole run, if it is to read all texts.
ON_THE_WAY, AT_END = 0.02, 0.04
# What a token costs at one noise level of the bound, and where tokens are drawn, beside its training.
LEVEL_COST, DRAWN_COST = 0.3, 0.35
# Noise levels at which a budget says most: fewer levels leave more error than more texts take away.
LEVELS = 4
# Fewer say nothing.
FEWEST_TEXTS = 16


def token_cost(writing: Writing, radix: int, levels: int = LEVELS) -> float:
    """What a token costs in a validation, beside a token that is trained on."""
    drawn = SamplingPath(NoiseLevels.of(radix), writing).drawn_at is not None
    return levels * LEVEL_COST + drawn * DRAWN_COST


def affordable(parts: Parts, paid_tokens: float) -> int:
    """Held-out tokens that cost what it costs to train on `paid_tokens`."""
    model = parts.module.model
    return int(paid_tokens / token_cost(model.writing, model.codec.radix))


def decide(config: TrainConfig, parts: Parts) -> tuple[TrainConfig, list[str]]:
    """The settings with `eval_tokens` filled where it was left open, and what was decided, in a few words."""
    total = parts.eval_set.num_tokens
    if config.eval_tokens is not None or not total:
        return config, []
    steps = min(config.eval_interval, _schedule_steps(config, parts))
    fewest = FEWEST_TEXTS * total / len(parts.eval_set)
    paid = ON_THE_WAY * steps * tokens_per_step(config, parts)
    tokens = round(max(affordable(parts, paid), min(fewest, total)))
    part = "all" if tokens >= total else f"{tokens:,}"
    words = f"validation on {part} of {total:,} held-out tokens"
    return dataclasses.replace(config, eval_tokens=tokens), [words]


def tokens_per_step(config: TrainConfig, parts: Parts) -> float:
    """Of an average train batch."""
    return config.train_batch_size * parts.train_set.num_tokens / len(parts.train_set)


def _schedule_steps(config: TrainConfig, parts: Parts) -> int:
    return parts.steps_per_epoch(config.train_batch_size) * config.epochs


@dataclass(frozen=True)
class Sample:
    """Some texts of a data set, in its shape."""

    dataset: TokenImageDataset
    indices: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    def ids(self, index: int) -> np.ndarray:
        return self.dataset.ids(int(self.indices[index]))

    def prompt_ids(self, index: int) -> np.ndarray:
        return self.dataset.prompt_ids(int(self.indices[index]))

    @property
    def loses_text(self) -> bool:
        return self.dataset.loses_text

    @property
    def num_bytes(self) -> int:
        """As many bytes a token as in the whole data set."""
        tokens = self.dataset.lengths[self.indices].sum()
        return round(self.dataset.num_bytes * float(tokens) / self.dataset.num_tokens)


class Validations:
    """What the validations of a run read: the same whole texts each time, drawn once without replacement by chance that
    no text can influence, and always with the same noise. So a figure is an unbiased one of all held-out texts, and two
    of them differ by what was learnt.

    The one at the end of the schedule reads all held-out texts, in the same order, where that is cheap beside the run:
    the first of them are then those of the others.

    Args:
        config: of the run, with nothing left open.

    count: texts that a validation reads. levels: noise levels of each; where the budget reads all texts twice, those of
        `evaluate`.
    """

    def __init__(self, config: TrainConfig, parts: Parts):
        self.dataset, texts = parts.eval_set, len(parts.eval_set)
        total, budget = self.dataset.num_tokens, config.eval_tokens
        self.count, self.levels = texts, DEFAULT_LEVELS
        self.at_end = True  # all texts are read, at the end of the schedule at least
        self.last_step = _schedule_steps(config, parts)
        if budget and texts:
            self.count = min(texts, max(1, round(budget * texts / total)))
            self.levels = DEFAULT_LEVELS if budget >= 2 * total else LEVELS
            self.at_end = affordable(parts, AT_END * self.last_step * tokens_per_step(config, parts)) >= total
        self.order = np.arange(texts)
        if self.count < texts:
            self.order = generator(0, Stream.VALIDATION_TEXTS, index=texts).permutation(texts)

    def reads_all(self, step: int) -> bool:
        """Whether the validation of a step reads all held-out texts."""
        return self.count == len(self.dataset) or (self.at_end and step == self.last_step)

    def texts(self, step: int) -> Sample:
        """What the validation of a step reads."""
        return Sample(self.dataset, self.order if self.reads_all(step) else self.order[: self.count])

    def tokens(self, step: int) -> int:
        """How many tokens that are, on average."""
        share = 1.0 if self.reads_all(step) else self.count / len(self.dataset)
        return round(share * self.dataset.num_tokens)

    def state(self) -> dict:
        """What must be equal for two figures to be compared: a part of the trainer's state."""
        return {"texts": self.count, "levels": self.levels}

    def were(self, state: dict) -> bool:
        """Whether the figures of an earlier launch, with this state of the trainer, compare with these."""
        return state.get("validations", {"texts": len(self.dataset), "levels": DEFAULT_LEVELS}) == self.state()
