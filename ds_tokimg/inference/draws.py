"""Distributions over tokens as they are drawn from: temperature, top-k and top-p."""

from __future__ import annotations

import torch
from torch import Tensor

from ds_tokimg.inference.options import SamplingOptions


def reshaped(logits: Tensor, options: SamplingOptions) -> Tensor:
    """The logits [..., V] of a distribution after temperature, top-k and top-p, in this order; -inf for tokens that are
    never drawn.

    top_k keeps the k likeliest tokens. top_p keeps the fewest likeliest tokens whose probabilities, as top_k left them,
    sum to p at least (Holtzman et al., "The curious case of neural text degeneration", 2020). Of equally likely tokens
    the lower id counts as the likelier one, so exactly k are kept, and temperature 0 draws one.
    """
    if options.is_as_trained:
        return logits
    if options.temperature == 0:
        likeliest = logits.argmax(-1, keepdim=True)
        return torch.full_like(logits, -torch.inf).scatter_(-1, likeliest, 0.0)
    scaled = (logits - logits.amax(-1, keepdim=True)) / max(options.temperature, 1e-30)  # which float32 still holds
    if options.top_k is None and options.top_p == 1:
        return scaled
    ordered, ids = scaled.sort(dim=-1, descending=True, stable=True)
    if options.top_k is not None:
        ordered[..., options.top_k :] = -torch.inf
    if options.top_p < 1:
        shares = ordered.double().softmax(-1)
        ordered[shares.cumsum(-1) - shares >= options.top_p] = -torch.inf
    return torch.empty_like(scaled).scatter_(-1, ids, ordered)


def inverse_of_cdf(logits: Tensor, uniform: Tensor) -> Tensor:
    """Draws from softmax(logits) [..., V] by one number in [0, 1) each, uniform [...]: indices int64 [...]."""
    sums = logits.double().softmax(-1).cumsum(-1)
    # The last sum may be a rounding error below 1, and tokens without probability must not be found.
    found = torch.searchsorted(sums, (uniform * sums[..., -1].clamp(max=1.0))[..., None], right=True)[..., 0]
    return found.clamp(max=logits.shape[-1] - 1)
