"""The masked objectives, each as (sum over valid pixels, count of valid pixels), and the module that is trained.

The engine divides the sums by the valid pixels of the whole train batch (all ranks, all micro-batches), so that the
gradient does not depend on how the batch was cut up.
"""

from __future__ import annotations

from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ds_tokimg.choices import OBJECTIVES
from ds_tokimg.data.batch import Batch
from ds_tokimg.diffusion.path import TimestepSampler, add_noise_to_timestep
from ds_tokimg.diffusion.schedule import EntropicSchedule
from ds_tokimg.model.context import Drawn, Patches, TeacherForced, WholeImage
from ds_tokimg.model.flops import BatchShape, train_flops
from ds_tokimg.model.heads.base import Prediction, cross_entropy
from ds_tokimg.model.jit import JiT


def masked_loss(clean_pred: Tensor, clean: Tensor, mask: Tensor) -> Tensor:
    """The reference loss of a micro-batch: squared error over valid pixels, channels summed.

    clean_pred and clean [B, 3, H, W], mask [B, H, W] -> scalar, 0 when no pixel is valid.
    """
    squared_error = (clean_pred - clean) ** 2
    return (squared_error * mask[:, None]).sum() / (mask[:, None].sum() + 1e-8)


def shape_of(batch: Batch) -> BatchShape:
    """What decides the operations that a batch costs."""
    samples, patches, _ = batch.ids.shape
    prompt = None if batch.prompt is None else batch.prompt.ids.shape[1]
    levels = patches if batch.t.dim() == 2 else 1
    return BatchShape(samples, patches, prompt, levels, batch.blocks is not None)


class Target(NamedTuple):
    """What a prediction is compared with."""

    clean: Tensor  # [B, N, P]
    ids: Tensor  # [B, N, K]
    t: Tensor  # [B, N or 1]
    elbo_weight: Tensor  # [B, N or 1], see `TimestepSampler.elbo_weight`
    digit_table: Tensor  # [V, D]


def token_losses(objective: str, prediction: Prediction, target: Target) -> Tensor:
    """What each token contributes to the objective's sum: [B, N, K], float32.

    `mse`: squared error, digits summed. `elbo`: the same times SNR(t) / 2 and divided by the density of log-SNR with
    which t was drawn: in expectation the bound's integral in nats (Kingma et al., "Variational diffusion models", 2021,
    eq. 18).
    `ce`: cross-entropy of the token (of its digits, summed) in nats; the same minimiser, less variance at low noise.
    """
    if objective == "ce":
        return cross_entropy(prediction.logits, target.ids, target.digit_table)
    slots = target.ids.shape[-1]
    squared_error = ((prediction.clean - target.clean) ** 2).unflatten(-1, (slots, -1)).sum(-1)  # [B, N, K]
    if objective == "mse":
        return squared_error
    return squared_error * target.elbo_weight[..., None]


class TrainingLoss(nn.Module):
    """Model and objective in one module, so that one engine owns both. Batches are those of `ds_tokimg.data.batch`.

    Raises ValueError for an unknown objective, or for `ce` with a head that has no posterior.
    """

    def __init__(self, model: JiT, objective: str = "ce", timesteps: str = "band"):
        super().__init__()
        if objective not in OBJECTIVES:
            raise ValueError(f"unknown objective {objective!r}; available: {', '.join(OBJECTIVES)}")
        if objective == "ce" and not model.head.features:
            raise ValueError("objective ce needs head posterior; the linear head has no distribution over tokens")
        self.model, self.objective = model, objective
        self.told = model.writing.told_by_training(timesteps)  # whose bits the log tells
        self.measure_bound = False  # costs a softmax over all candidates that cross-entropy does not need
        if timesteps == "entropic" and not model.head.features:
            raise ValueError("timesteps entropic needs head posterior: it follows the cross-entropy of tokens")
        self.timesteps = TimestepSampler(timesteps, model.codec.radix)
        self.schedule = EntropicSchedule(self.timesteps.band) if timesteps == "entropic" else None
        self._flops_of = cache(partial(train_flops, model))  # most batches have the shapes of others
        self.register_buffer("digit_table", model.codec.digit_table, persistent=False)  # [V, D] uint8

    def forward(self, batch: Batch, per_patch: bool = False, with_mean: bool = True) -> dict[str, Tensor]:
        """One micro-batch -> {"loss_sum": scalar, float32, with gradient} and sums for the log.

        With `per_patch` the result has sums over each patch's valid tokens instead, each [B, N]: "loss" (the
        objective), "nats" (cross-entropy; heads with a posterior), "squared_error" (digits summed; `with_mean`: of the
        posterior mean, which may cost more than the rest), "correct" and "invalid" (tokens).
        """
        if self.schedule is not None and not per_patch:  # the bound brings noise levels of its own
            batch = batch.replace(t=self.schedule.warp(batch.t))
        clean = self.colours(batch.ids)
        prediction = self.predict(batch, clean)
        level = batch.t if batch.t.dim() == 2 else batch.t[:, None]
        target = Target(clean, batch.ids, level, self._elbo_weight(level), self.digit_table)
        if per_patch:
            tokens = self._per_token(prediction, target, batch.mask, with_mean)
            return {name: value.double().sum(-1) for name, value in tokens.items()}
        loss_sum, nats = self._loss_sum(prediction, target, batch.mask)
        seen = {} if self.schedule is None else self.schedule.seen(target.t, nats.sum(-1), batch.mask.sum(-1))
        return {"loss_sum": loss_sum} | self._progress(prediction, target, batch, nats) | seen

    def predict(self, batch: Batch, clean: Tensor) -> Prediction:
        """What the model makes of the batch's noisy texts, which are `clean` without noise."""
        noisy, _ = add_noise_to_timestep(clean, batch.t, batch.noise)
        prompt = None if batch.prompt is None else (self.colours(batch.prompt.ids), batch.prompt.mask)
        seen = WholeImage(prompt) if batch.blocks is None else TeacherForced(clean, batch.blocks, prompt)
        drawn = None if batch.in_turn is None else Drawn(batch.ids, batch.in_turn)
        return self.model.predict(Patches(noisy, batch.t, batch.mask), seen, drawn)

    def _per_token(self, prediction: Prediction, target: Target, mask: Tensor, with_mean: bool) -> dict[str, Tensor]:
        """What `forward` sums over the tokens of a patch, each [B, N, K]."""
        tokens = {}
        if with_mean:
            tokens["squared_error"] = token_losses("mse", prediction, target) * mask
        if self.model.head.features:
            tokens["nats"] = prediction.loss_sum(target.ids, mask)[1]
        if self.objective == "ce":
            tokens["loss"] = tokens["nats"]
        else:
            tokens["loss"] = token_losses(self.objective, prediction, target) * mask
        ids, invalid = self.model.read(prediction)
        return tokens | {"correct": (ids == target.ids) & mask, "invalid": invalid & mask}

    @torch.no_grad()
    def _progress(self, prediction: Prediction, target: Target, batch: Batch, nats) -> dict[str, Tensor]:
        """Sums for the log: tokens, slots and operations; when asked for, also the bound in nats and its tokens: of
        those at full noise where a token is drawn in one step (their `nats`, if they are known), else of the samples
        with one noise level whose tokens are not predicted in turn, over the noise levels that are trained."""
        mask = batch.mask
        # Filled on the device: a tensor that is made of a number here would have to be sent, and waited for.
        number = partial(mask.new_full, (), dtype=torch.float64)
        sums = {"valid_tokens": mask.sum(), "slots": number(mask.numel()), "flops": number(self.flops(batch))}
        if self.measure_bound and nats is not None and self.told.one_step:
            noisiest = (target.t >= self.model.noisiest - 1e-2)[..., None] & mask
            if batch.in_turn is not None:
                noisiest = noisiest & batch.in_turn[:, None, None]
            sums["bound_nats"], sums["bound_tokens"] = (nats * noisiest).sum(), noisiest.sum()
        elif self.measure_bound:
            whole = self._follows_the_path(target.t, batch)
            if batch.in_turn is not None:
                whole = whole & ~batch.in_turn
            whole = whole[:, None, None] & mask
            sums["bound_nats"] = (token_losses("elbo", prediction, target) * whole).sum()
            sums["bound_tokens"] = whole.sum()
        return sums

    def _elbo_weight(self, level: Tensor) -> Tensor:
        """For the density with which this batch's noise levels were drawn."""
        density = self.timesteps.density(level) if self.schedule is None else self.schedule.density(level)
        return self.timesteps.elbo_weight(level, density)

    def _loss_sum(self, prediction: Prediction, target: Target, mask: Tensor) -> tuple[Tensor, Tensor | None]:
        """The objective's sum; and the cross-entropy of each token [B, N, K] in nats, if a schedule asks for it."""
        if self.objective == "ce":
            return prediction.loss_sum(target.ids, mask)
        loss_sum = (token_losses(self.objective, prediction, target) * mask).sum()
        if self.schedule is None:
            return loss_sum, None
        with torch.no_grad():
            return loss_sum, token_losses("ce", prediction, target) * mask

    def _follows_the_path(self, t: Tensor, batch: Batch) -> Tensor:
        """Samples whose patches have one noise level, or one a block, as the bound's path asks for: bool [B]."""
        first = torch.zeros_like(batch.mask[0, :, 0], dtype=torch.int64)  # [N], the first patch of each one's block
        if batch.blocks is not None:
            first = torch.searchsorted(batch.blocks, batch.blocks)
        # Padding's levels do not count, or the width of a micro-batch would decide which samples do.
        padding = ~batch.mask.any(-1)  # [B, N]
        t = t.expand(padding.shape)
        return ((t == t[:, first]) | padding).all(1)

    def flops(self, batch: Batch) -> int:
        """Operations of the forward and backward of a micro-batch."""
        return self._flops_of(shape_of(batch))

    def count(self, batch: Batch) -> int:
        """Valid pixels of a micro-batch."""
        return int(batch.mask.sum()) * self.model.codec.token_size**2

    def colours(self, ids: Tensor) -> Tensor:
        """ids [B, N, K] -> clean patches [B, N, P] float32 in [-1, 1]."""
        return (self.digit_table[ids].float() * (2.0 / (self.model.codec.radix - 1)) - 1.0).flatten(2)
