"""Floating-point operations of training, counted exactly, and what the machine could do.

Counted are the matrix products that the model's definition asks for, 2 per multiply-add:

    forward     2 · rows · in · out of every linear layer, 4 · B · L² · C a layer for attention (L: positions)
    backward    the same for the inputs and the same for the weights of each product, where gradients go there

Left out are what an implementation does on top of that (recomputing activations or scores), everything that is not a
matrix product (norms, softmax, the optimiser), and the matched filter, D + 1 multiply-adds a candidate. Positions that
are computed but hold padding do count: `padding_fraction` is the share of the work that is lost on them.
"""

from __future__ import annotations

import time
from typing import NamedTuple

import torch
from torch import nn

from ds_tokimg.model.heads.tree import TreeHead
from ds_tokimg.model.jit import JiT

PEAK_SECONDS = 0.2
_PEAK_SIZE_CPU, _PEAK_SIZE_ELSEWHERE = 1024, 4096


class BatchShape(NamedTuple):
    """What of a micro-batch decides how much is computed."""

    samples: int
    patches: int  # of a text
    prompt: int | None  # patches of a prompt; None: there are no prompts
    levels: int  # noise levels of a text: 1, or one a patch
    from_left: bool  # blocks from left to right, beside clean patches


def train_flops(model: JiT, shape: BatchShape) -> int:
    """Of the forward and backward of one micro-batch as `TrainingLoss` takes it."""
    samples, patches, slots = shape.samples, shape.patches, model.slots
    clean = (shape.prompt or 0) + (patches if shape.from_left else 0)
    length = patches + clean
    positions = samples * length
    levels = samples * shape.levels
    times = levels + samples * ((shape.prompt is not None) + shape.from_left)  # what is clean has a level too
    data, hidden = 2, 3  # passes over a product whose input is data, or needs a gradient

    def linear(layer: nn.Linear, rows: int, passes: int = hidden) -> int:
        return 2 * layer.in_features * layer.out_features * rows * passes

    learned_input = hasattr(model.head, "token_input")
    flops = linear(model.patch_embed, positions, hidden if learned_input else data)
    flops += linear(model.token_shift, positions)
    flops += linear(model.time_embed.mlp[0], times, data) + linear(model.time_embed.mlp[2], times)
    flops += linear(model.time_embed.modulation, times)
    entry = model.entry if shape.from_left else 0
    if entry:
        flops += linear(model.context_shift, samples * patches)
    for index, layer in enumerate(model.layers):
        inside = clean if index < entry else length
        asking = patches if layer is model.layers[-1] else inside
        flops += linear(layer.attention.qkv, samples * inside)
        for product in (layer.attention.out, layer.mlp.gate_up, layer.mlp.down):
            flops += linear(product, samples * asking)
        flops += 4 * samples * asking * inside * model.config.width * hidden
    flops += linear(model.final.modulation, levels)
    if model.local_window is not None:
        for product in (model.local_window.output, model.token_mlp.own):
            flops += linear(product, samples * patches * slots, hidden if learned_input else data)
        for product in (model.token_mlp.mlp.gate_up, model.token_mlp.mlp.down):
            flops += linear(product, samples * patches * slots)
    if not learned_input:
        return flops + linear(model.head.output, samples * patches)
    if isinstance(model.head.to_tokens, nn.Linear):
        flops += linear(model.head.to_tokens, samples * patches)
    if isinstance(model.head, TreeHead):
        width, depth = model.head.token_output.in_features, model.head.way.shape[1]
        return flops + 2 * samples * patches * slots * width * depth * hidden
    flops += linear(model.head.token_input, positions * slots, data)
    return flops + linear(model.head.token_output, samples * patches * slots)


def matmul_peak(device: torch.device, dtype: torch.dtype, seconds: float = PEAK_SECONDS) -> float:
    """Floating-point operations a second of large matrix products, the best of those that fit in `seconds`."""
    size = _PEAK_SIZE_CPU if device.type == "cpu" else _PEAK_SIZE_ELSEWHERE
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    result, best, begun = torch.empty_like(left), float("inf"), time.perf_counter()
    torch.mm(left, right, out=result)  # the first one sets up the library
    while True:
        _wait(device)
        start = time.perf_counter()
        torch.mm(left, right, out=result)
        _wait(device)
        now = time.perf_counter()
        best = min(best, now - start)
        if now - begun > seconds:
            return 2 * size**3 / best


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()
