"""Trained models on sources whose entropy is known: no figure lies below it, and training comes close to it."""

import math
from functools import partial

import numpy as np
import pytest
import torch

from benchmarks.references import Autoregressive, MaskedDiffusion, bits
from ds_tokimg.model.config import JiTConfig
from ds_tokimg.model.jit import JiT
from ds_tokimg.tokens.codec import TokenCodec
from ds_tokimg.training.bound import BoundOptions, estimate_bound
from ds_tokimg.training.objective import TrainingLoss
from tests.support.tiny import Texts, layout_of, maker_of

VOCAB_SIZE = 8
# Tokens a text, training steps, their learning rate: one distribution is learnt sooner than eight.
TRAINING = {"independent": (16, 150, 6e-3), "markov": (32, 1000, 4e-3)}


class Source:
    """Texts from a Markov chain that starts in its stationary distribution; equal rows make it i.i.d."""

    def __init__(self, kind: str):
        self.length, self.steps, self.peak = TRAINING[kind]
        rng = np.random.default_rng(3)
        rows = rng.dirichlet(np.full(VOCAB_SIZE, 0.3), size=1 if kind == "independent" else VOCAB_SIZE)
        self.transition = np.broadcast_to(rows, (VOCAB_SIZE, VOCAB_SIZE)) * 0.98 + 0.02 / VOCAB_SIZE
        self.start = np.linalg.matrix_power(self.transition, 200)[0]

    def texts(self, count: int, seed: int) -> Texts:
        rng = np.random.default_rng(seed)
        ids = np.zeros((count, self.length), dtype=np.int64)
        for place in range(self.length):
            shares = self.transition[ids[:, place - 1]] if place else np.broadcast_to(self.start, (count, VOCAB_SIZE))
            ids[:, place] = (shares.cumsum(1) < rng.random((count, 1))).sum(1).clip(max=VOCAB_SIZE - 1)
        return Texts(ids)

    def code_length(self, texts: Texts) -> float:
        """Bits per token of these very texts under their source: what no model can beat but by luck."""
        ids = np.asarray(texts.texts)
        nats = -np.log(self.start[ids[:, 0]]).sum() - np.log(self.transition[ids[:, :-1], ids[:, 1:]]).sum()
        return nats / math.log(2) / ids.size


def train(module, loss_of, source: Source) -> None:
    optimizer = torch.optim.AdamW(module.parameters(), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, source.peak, source.steps)
    for step in range(source.steps):
        loss_of(np.arange(32) + 32 * step).backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    module.eval()


def bound_of_ours(source: Source, held_out: Texts, block_size: int, in_turn: bool = False) -> tuple[float, float]:
    """Bits per token of a model trained on the source, and their standard error."""
    texts = source.texts(32 * source.steps, seed=0)
    torch.manual_seed(0)
    shape = {"patch_size": 2, "img_size": 16, "noisy_depth": 1 if block_size else 0, "in_turn": in_turn}
    model = JiT(TokenCodec(VOCAB_SIZE), JiTConfig(2, 48, 2, **shape), block_size)
    module = TrainingLoss(model)
    maker = maker_of(module, patch_noise=0.0 if block_size else 0.5, in_turn=0.5 if in_turn else 0.0)

    def loss_of(indices):
        batch = maker(texts, indices, indices, 0)
        return module(batch)["loss_sum"] / module.count(batch)

    train(module, loss_of, source)
    forward, options = partial(module, per_patch=True), BoundOptions(num_levels=16)
    with torch.no_grad():
        bound = estimate_bound(forward, held_out, layout_of(model), module.timesteps, model.writing, options)
    return bound.bits_per_token, bound.standard_error


def bound_of_reference(kind: type, source: Source, held_out: Texts) -> float:
    texts = torch.from_numpy(np.asarray(source.texts(32 * source.steps, seed=0).texts))
    mask = torch.ones(32, source.length, dtype=torch.bool)
    torch.manual_seed(0)
    model = kind(VOCAB_SIZE, 0, (2, 48, 2))
    train(model, lambda indices: model.loss_of(texts[indices], mask).mean(), source)
    ids = torch.from_numpy(np.asarray(held_out.texts))
    nats = model.bound_nats(ids, torch.ones_like(ids, dtype=torch.bool), 64).sum()
    return bits(float(nats)) / ids.numel()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["independent", "markov"])
def test_trained_bounds_come_close_to_the_entropy_from_above(kind):
    source = Source(kind)
    held_out = source.texts(400, seed=1)
    entropy = source.code_length(held_out)
    figures = {"autoregressive": (bound_of_reference(Autoregressive, source, held_out), 0.0)}
    figures["masked"] = (bound_of_reference(MaskedDiffusion, source, held_out), 0.02)
    for block_size in (0, 1):
        figures[f"blocks of {block_size}"] = bound_of_ours(source, held_out, block_size)
    figures["in turn"] = bound_of_ours(source, held_out, 0, in_turn=True)
    for name, (figure, error) in figures.items():
        assert figure > entropy - 3 * error, (name, figure, entropy)
        assert figure < entropy + 3 * error + 0.12, (name, figure, entropy)
