"""What a run's learning rate, train batch and epochs are where neither flags nor the engine's JSON say.

They follow from the recipe, the model's width and the size of the corpus, never from the number of ranks.
"""

from __future__ import annotations

import dataclasses
import math

from ds_tokimg.data.order import steps_per_epoch
from ds_tokimg.model.config import config_of_name
from ds_tokimg.settings import engine_json
from ds_tokimg.settings.config import TrainConfig
from ds_tokimg.settings.engine_schema import AUTO, lookup

# The width for which recipes give their learning rate: that of JiT-XS.
WIDTH = 192
# Of the peak, with --init_from.
FINE_TUNING_SHARE = 0.5
# Training images for which a recipe's smallest train batch is right: about those of the bundled corpus.
FEW_IMAGES = 2000
# Larger ones have not been measured.
LARGEST_TRAIN_BATCH = 64
# Shorter schedules hardly leave the warm-up behind.
SHORT_SCHEDULE = 200


def peak_learning_rate(config: TrainConfig) -> float:
    """The best peak halves as the width doubles (Yang et al., "Tensor programs V", 2022, for the hidden matrices), and
    weights that have learnt already want half of it."""
    share = FINE_TUNING_SHARE if config.init_from else 1.0
    return share * config.lr_at_width_192 * (WIDTH / config_of_name(config.model).width)


def train_batch(config: TrainConfig, images: int) -> int:
    """Twice as many texts for four times the training images, up to a bound."""
    doublings = max(0, math.floor(math.log(images / FEW_IMAGES, 4)))
    return max(config.smallest_train_batch, min(config.smallest_train_batch * 2**doublings, LARGEST_TRAIN_BATCH))


def epochs(config: TrainConfig, images: int, train_batch_size: int) -> int:
    """As many as the wanted optimiser steps need."""
    needed = math.ceil(config.wanted_steps / steps_per_epoch(images, train_batch_size))
    return min(needed, config.most_epochs)


def decide(
    config: TrainConfig, raw: dict, images: int, world_size: int, resumed_train_batch: int | None = None
) -> tuple[TrainConfig, list[str]]:
    """The settings with what was left open filled, and in a few words each what was decided and why.

    Args:
        raw: the engine's JSON, whose explicit values are left alone.
        images: to train on.
        resumed_train_batch: that of the checkpoint to go on from.
    """
    decided = []
    if config.lr is None and lookup(raw, "optimizer.params.lr") in (None, AUTO):
        config = dataclasses.replace(config, lr=peak_learning_rate(config))
        start = " from trained weights" if config.init_from else ""
        decided.append(f"lr {config.lr:g} for {config.model}{start}")
    if resumed_train_batch is None and _batch_is_open(config, raw):
        config = dataclasses.replace(config, train_batch_size=train_batch(config, images))
        decided.append(f"train batch {config.train_batch_size} for {images:,} images")
    if config.epochs is None:
        size = engine_json.resolve_batch(raw, config, world_size, resumed_train_batch)[0]
        config = dataclasses.replace(config, epochs=epochs(config, images, size))
        steps = config.epochs * steps_per_epoch(images, size)
        decided.append(f"{config.epochs} epoch(s) for {steps:,} steps")
    return config, decided


def _batch_is_open(config: TrainConfig, raw: dict) -> bool:
    """Whether neither a train batch nor a micro-batch is given, which fixes it too."""
    keys = {"train_batch_size": config.train_batch_size, "train_micro_batch_size_per_gpu": config.batch_size}
    return all(flag is None and lookup(raw, key) in (None, AUTO) for key, flag in keys.items())


def left_open(config: TrainConfig, images: int) -> TrainConfig:
    """The settings without what would be decided like this anyway: what a command line need not say."""
    open_again = dataclasses.replace(config, lr=None, train_batch_size=None, batch_size=None, epochs=None)
    again = decide(open_again, {}, images, world_size=1)[0]
    same = {name: None for name in ("lr", "train_batch_size") if getattr(again, name) == getattr(config, name)}
    if config.epochs == epochs(config, images, config.train_batch_size or again.train_batch_size):
        same["epochs"] = None
    return dataclasses.replace(config, **same)


def short_schedule(steps: int, config: TrainConfig) -> list[str]:
    """What is to be said of a schedule of so many optimiser steps."""
    if steps >= SHORT_SCHEDULE:
        return []
    size = config.train_batch_size
    smaller = f"a --train_batch_size smaller than {size}, " if size > 1 else ""
    return [
        f"the schedule has only {steps:,} optimiser steps, too few to learn much: give --epochs above {config.epochs}, "
        f"{smaller}or more text"
    ]
