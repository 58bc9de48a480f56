"""Bits per token: a bound on the likelihood of text under the diffusion model.

A Gaussian diffusion model bounds the likelihood of what it generates (Kingma et al., "Variational diffusion models",
2021, eqs. 11-18; in variance-preserving scaling, where SNR = exp(log_snr)):

    -log p(tokens) <=   1/2 * integral of SNR * ||clean - clean_pred(z)||^2 over log_snr     (diffusion)
                      + KL(q(z at the noisiest level) || N(0, 1))                             (prior)
                      - E log p(tokens | z at the cleanest level)                             (decoding)

The integral is estimated on stratified noise levels with fixed noise per sample, so the figure is reproducible. Our
noising path is another scaling of the same process: SNR and clean_pred, hence the bound, do not depend on it.

That is the bound of sampling in many small steps. Of a single step, from pure noise straight to the tokens, it is the
last two terms, both at the noise level where sampling starts (the same theory, eq. 11 with T = 1). Where tokens are
drawn in turn, the integral ends at the level where they are, and the decoding term is their cross-entropy there, each
given those drawn before it (the chain rule).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ds_tokimg.data.batch import Batch, Canvas
from ds_tokimg.data.text_format import TextFormat
from ds_tokimg.diffusion.levels import NoiseLevels, SamplingPath
from ds_tokimg.diffusion.path import LOG_SNR_MIN, MARGIN, TimestepSampler
from ds_tokimg.diffusion.writing import Writing
from ds_tokimg.tokens.layout import PatchLayout
from ds_tokimg.training.objective import TrainingLoss
from ds_tokimg.training.validation import ValidationBatches

# Noise levels a text is evaluated at, in training and by `evaluate`.
DEFAULT_LEVELS = 8
# The share of correctly read tokens is reported between these timesteps.
ACCURACY_BINS = (0, 100, 200, 300, 400, 500, 600, 700, 800, 900, 1000)


@dataclass(frozen=True)
class Bound:
    """The estimate, and what comes with it."""

    nats: np.ndarray  # [samples] bound on -log p of each text
    tokens: np.ndarray  # [samples] valid tokens
    num_bytes: int  # UTF-8 bytes of the texts
    loss: float  # the objective on the same texts, per valid pixel, over the trained noise levels within the integral;
    # where tokens are drawn in turn, its average over those before they are
    token_accuracy: float  # share of tokens read correctly, averaged over the noise levels of the integral
    accuracy_per_level: dict[str, float]  # the same by timestep, "t0-100" …
    invalid_token_rate: float  # share of predictions whose colour is no token

    @property
    def bits_per_token(self) -> float:
        return float(self.nats.sum() / (math.log(2) * self.tokens.sum()))

    @property
    def bits_per_byte(self) -> float:
        return float(self.nats.sum() / (math.log(2) * self.num_bytes))

    def figures(self) -> dict[str, float | None]:
        """What a checkpoint keeps of it, as JSON values."""
        error = self.standard_error
        return {
            "bits_per_token": self.bits_per_token,
            "standard_error": error if math.isfinite(error) else None,
            "bits_per_byte": self.bits_per_byte,
            "texts": len(self.tokens),
            "tokens": int(self.tokens.sum()),
        }

    @property
    def standard_error(self) -> float:
        """Standard error of bits_per_token over the texts (a ratio estimator); nan for a single text."""
        if len(self.nats) < 2:
            return math.nan
        residual = self.nats / math.log(2) - self.bits_per_token * self.tokens
        return float(residual.std(ddof=1) * math.sqrt(len(residual)) / self.tokens.sum())


@dataclass(frozen=True)
class BoundOptions:
    """How a bound is measured.

    num_levels: noise levels a text is evaluated at, stratified within the text and across texts.
    seed: of the noise.
    conditional, canvas: the texts are answers to prompts, on a canvas, see `ValidationBatches`.
    patches_per_batch: size of the batches that are evaluated.
    device: where the forward takes its batches.
    """

    num_levels: int = DEFAULT_LEVELS
    seed: int = 0
    conditional: bool = False
    canvas: Canvas | None = None
    patches_per_batch: int = 1024
    device: torch.device | str = "cpu"


@dataclass(frozen=True)
class Share:
    """Which of the texts this rank computes: they are dealt over the ranks.

    all_reduce: sums a float64 tensor over them.
    stopped: whether to give up, asked before each forward; the same answer on every rank.
    """

    rank: int = 0
    world_size: int = 1
    all_reduce: Callable[[Tensor], Tensor] = lambda value: value
    stopped: Callable[[], bool] = lambda: False


class Stopped(Exception):
    """A bound was given up because `Share.stopped` said so, on all ranks."""


DEFAULT_OPTIONS, WHOLE = BoundOptions(), Share()


def estimate_bound(
    forward: Callable[[Batch], dict[str, Tensor]],
    dataset,
    layout: PatchLayout,
    timesteps: TimestepSampler,
    writing: Writing,
    options: BoundOptions = DEFAULT_OPTIONS,
    share: Share = WHOLE,
) -> Bound:
    """Bounds -log p of every text of a data set.

    Args:
        forward: `TrainingLoss.forward` with per_patch=True (or the engine around it); a bound of one step does not
            need its mean.
        dataset: has `len`, `.ids(i)`, `.num_bytes`, and, with `options.conditional`, `.prompt_ids(i)`.
        timesteps: those of training; weight the reported objective as training does.
        writing: the path. At once, or block after block, each given the clean ones before it; in many small steps, to
            the end or to the level `NoiseLevels.drawn_at`, where tokens are drawn in turn; or in one step, which is an
            upper bound for any model with a posterior, and tight where the step is exact.

    All ranks return the same Bound. Raises ValueError for a data set without texts, and Stopped when asked to give up.
    """
    if not len(dataset):
        raise ValueError("there are no validation texts to bound")
    path, num_levels = SamplingPath(NoiseLevels.of(layout.codec.radix), writing), options.num_levels
    batches = ValidationBatches(dataset, layout, path, options.seed, options.conditional, options.canvas)
    sums = _Sums(path, timesteps, len(dataset))

    @torch.no_grad()
    def measure(batch: Batch) -> dict[str, Tensor]:
        if share.stopped():
            raise Stopped
        result = forward(batch.to(options.device))
        return {name: value.double().cpu() for name, value in result.items()}  # sums per patch [B, N]

    for indices in batches.of_rank(share.rank, share.world_size, options.patches_per_batch):
        for level in range(num_levels):
            log_snr, density = path.quantile((level + batches.offsets(indices)) / num_levels)
            batch = batches.make(indices, log_snr, noise=level)
            sums.add_level(indices, batch, measure(batch), log_snr, density * num_levels)
        if path.drawn_at is not None:
            sums.add_nats(indices, measure(batches.drawn(indices, noise=num_levels))["nats"])
    sums.reduce(share.all_reduce)
    pixels = int(batches.scored_tokens.sum()) * layout.codec.token_size**2
    correct, invalid, seen = sums.reading.sum(0).tolist()
    bins = zip(ACCURACY_BINS, ACCURACY_BINS[1:], sums.reading.tolist(), strict=False)
    return Bound(
        nats=sums.nats.numpy() + _fixed_nats(batches, layout.codec),
        tokens=batches.text_tokens,
        num_bytes=dataset.num_bytes,
        loss=float(sums.objective.sum()) / path.trained(timesteps) / pixels,
        token_accuracy=correct / seen,
        accuracy_per_level={f"t{low}-{high}": c / n for low, high, (c, _, n) in bins if n},
        invalid_token_rate=invalid / seen,
    )


def prior_nats(clean: Tensor, log_snr: float = LOG_SNR_MIN) -> Tensor:
    """KL(q(z at log_snr) || N(0, 1)) of clean values [..., D], summed over the last axis, in nats."""
    alpha2 = 1.0 / (1.0 + math.exp(-log_snr))
    sigma2 = 1.0 - alpha2
    return 0.5 * (alpha2 * clean.double() ** 2 + sigma2 - 1.0 - math.log(sigma2)).sum(-1)


def decoding_nats() -> float:
    """An upper bound on -E log p(digit | z at the cleanest level) for a reader without context, in nats a digit.

    -log p = log(1 + sum of likelihood ratios); neighbours at distance 2 MARGIN deviations dominate, and
    E log(1 + r) <= P(wrong side) * its mean size; both tails together stay below 2 Q(MARGIN) * (1 + MARGIN^2).
    """
    return math.erfc(MARGIN / math.sqrt(2)) * (1.0 + MARGIN**2)


def _fixed_nats(batches: ValidationBatches, codec) -> np.ndarray:
    """The terms of each text's bound that need no network."""
    nats = np.zeros(len(batches))
    for index in range(len(nats)):
        colours = codec.codebook[torch.tensor(batches.ids(index))]
        nats[index] = prior_nats(colours, batches.path.noisiest).sum()
        if batches.path.drawn_at is None:
            nats[index] += colours.numel() * decoding_nats()
    return nats


class _Sums:
    """What is added up over batches, float64."""

    def __init__(self, path: SamplingPath, timesteps, texts: int):
        self.path, self.timesteps = path, timesteps
        self.nats, self.objective = (torch.zeros(texts, dtype=torch.float64) for _ in range(2))
        # By timestep: tokens read correctly, colours that are no token, tokens.
        self.reading = torch.zeros(len(ACCURACY_BINS) - 1, 3, dtype=torch.float64)

    def add_level(self, indices, batch, result, log_snr: np.ndarray, weight: np.ndarray) -> None:
        """Adds one batch's integrand to its texts. log_snr, weight (density times levels a text): [B, N or 1]."""
        if not len(indices):
            return
        t = batch.t.double().view(len(indices), -1)
        snr, weight = torch.from_numpy(np.exp(log_snr)), torch.from_numpy(weight)
        if not self.path.writing.one_step:
            self.add_nats(indices, 0.5 * snr / weight * result["squared_error"])
        # The objective is an average over the training's noise levels: importance weights turn ours into those.
        self.objective[indices] += (self.timesteps.density(t).double() / weight * result["loss"]).sum(1)
        bins = torch.bucketize(t, torch.tensor(ACCURACY_BINS[1:-1]).double(), right=True).expand_as(result["loss"])
        counts = torch.stack([result["correct"], result["invalid"], batch.mask.sum(-1).double()], -1)
        self.reading.index_add_(0, bins.flatten(), counts.flatten(0, 1))

    def add_nats(self, indices, nats: Tensor) -> None:
        """nats: [B, N]."""
        self.nats[indices] += nats.sum(1)[: len(indices)]

    def reduce(self, all_reduce: Callable[[Tensor], Tensor]) -> None:
        self.nats, self.objective, self.reading = map(all_reduce, (self.nats, self.objective, self.reading))


class TextList:
    """A list of token id lists in the shape of a data set."""

    def __init__(self, texts, prompts=None, num_bytes: int | None = None):
        self._texts = [np.asarray(text, dtype=np.int64) for text in texts]
        self._prompts = None if prompts is None else [np.asarray(prompt, dtype=np.int64) for prompt in prompts]
        self.num_bytes = num_bytes or 0

    def __len__(self) -> int:
        return len(self._texts)

    def ids(self, index: int) -> np.ndarray:
        return self._texts[index]

    def prompt_ids(self, index: int) -> np.ndarray:
        return self._prompts[index]


def bits_per_token(
    model, texts, prompts=None, *, num_levels: int = DEFAULT_LEVELS, block_size: int | None = None, seed: int = 0
) -> float:
    """The bound of a model on texts, in bits per token, as `generate` would write them.

    Args:
        model: a `JiT`.
        texts: lists of token ids (each at most the image's capacity).
        prompts: a list of token ids per text that the model is conditioned on, or None.
        num_levels: noise levels a text is evaluated at; more give a smaller error.
        block_size: of another path than the model's own, see `Writing`; None: its own.
    """
    from ds_tokimg.training.objective import TrainingLoss

    module = TrainingLoss(model, "ce" if model.head.features else "mse")
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    options = BoundOptions(num_levels, seed, conditional=prompts is not None, device=device)
    bound = _bound(module, TextList(texts, prompts), model.writing.asked(block_size), module, options, WHOLE)
    model.train(was_training)
    return bound.bits_per_token


def bound_of(
    module: TrainingLoss,
    text_format: TextFormat,
    dataset,
    writing: Writing | None = None,
    forward: Callable | None = None,
    options: BoundOptions = DEFAULT_OPTIONS,
    share: Share = WHOLE,
) -> Bound:
    """The bound of a model on a data set in its text format, as `generate` would write it.

    Args:
        writing: another path than the model's own.
        forward: an engine around the module; None: the module.
        options: all but what the text format says.
    """
    options = replace(options, conditional=text_format.enable_condition, canvas=text_format.answers)
    return _bound(module, dataset, writing or module.model.writing, forward or module, options, share)


def _bound(module: TrainingLoss, dataset, writing: Writing, forward, options: BoundOptions, share: Share) -> Bound:
    forward = partial(forward, per_patch=True, with_mean=not writing.one_step)
    return estimate_bound(forward, dataset, module.model.layout, module.timesteps, writing, options, share)
