"""The trainer as the benchmarks drive it: an engine as the shipped JSON makes it, and batches of random texts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch

from ds_tokimg.data.batch import Batch, BatchMaker, BatchPacker, Draws
from ds_tokimg.engine.allocator import keep_freed_memory
from ds_tokimg.engine.engine import TrainEngine, init_distributed, machine_capabilities
from ds_tokimg.model.jit import JiT
from ds_tokimg.settings import engine_json
from ds_tokimg.settings.config import TrainConfig
from ds_tokimg.tokens.codec import TokenCodec
from ds_tokimg.training.assemble import in_turn_share
from ds_tokimg.training.objective import TrainingLoss


class Texts:
    """Random tokens in the shape of a data set without prompts."""

    def __init__(self, vocab_size: int, lengths: Sequence[int] | np.ndarray):
        rng = np.random.default_rng(0)
        self.lengths = np.asarray(lengths, dtype=np.int32)
        self.texts = [rng.integers(0, vocab_size, n) for n in lengths]

    def __len__(self) -> int:
        return len(self.texts)

    def ids(self, index: int) -> np.ndarray:
        return self.texts[index]


@lru_cache(maxsize=1)
def join():
    """The process group of one rank, in a process that keeps its memory as `train` does."""
    keep_freed_memory()
    return init_distributed()


def settings_of(config: TrainConfig, **blocks) -> dict:
    """The shipped JSON, resolved as for a run of 1,000 steps without TensorBoard; `blocks` replace its entries."""
    raw = engine_json.read(engine_json.SHIPPED) | {"tensorboard": {"enabled": False}} | blocks
    return engine_json.resolve(raw, config, machine_capabilities(), lambda train_batch_size: 1000)[0]


def module_of(config: TrainConfig) -> TrainingLoss:
    """Model and objective with random weights, for random texts of the config's vocabulary."""
    torch.manual_seed(0)
    codec = TokenCodec(config.vocab_size, config.token_size)
    names = ("activation_checkpointing", "posterior", "noisy_depth", "block_size")
    options = {name: getattr(config, name) for name in names}
    model = JiT.from_name(config.model, codec, config.img_size, in_turn=None, **options)
    return TrainingLoss(model, config.objective, config.timesteps)


def engine_of(config: TrainConfig, **blocks) -> TrainEngine:
    """The engine of a run on this machine; see `settings_of`."""
    dist = join()
    return TrainEngine(module_of(config), settings_of(config, **blocks), config.ema_decay, dist)


def maker_of(module: TrainingLoss, config: TrainConfig) -> BatchMaker:
    model = module.model
    draws = Draws(patch_noise=config.patch_noise, in_turn=in_turn_share(config, model))
    return BatchMaker(BatchPacker(model.layout, model.writing.block_size), module.timesteps, config.seed, draws)


def batch_of(module: TrainingLoss, config: TrainConfig, lengths: Sequence[int]) -> Batch:
    """One micro-batch of random texts of these lengths, as the loader makes them."""
    texts, indices = Texts(module.model.codec.vocab_size, lengths), np.arange(len(lengths))
    return maker_of(module, config)(texts, indices, indices, epoch=0)
