"""Elementwise parts of the network with gradients written by hand.

Beside the matrix products of a small model they are a third of a step, and memory is what they wait for. Against what
autograd makes of the same formulas, these read and write it fewer times and keep fewer tensors for the backward pass.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., C] / sqrt(mean of x^2 over C + eps) * weight [C], Zhang & Sennrich (2019), eq. 4."""
    if x.device.type == "cpu" and torch.finfo(x.dtype).bits >= 32:
        # Without gradient the same operations, without what autograd adds to a call: most of it for a single token.
        return _RMSNorm.apply(x, weight, eps) if torch.is_grad_enabled() else _normed(x, weight, eps)[0]
    return F.rms_norm(x, weight.shape, weight, eps)  # one kernel on accelerators; sums half precision in single


def _normed(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The result, and what x is multiplied by, [..., 1]."""
    squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
    scale = squares.div_(x.shape[-1]).add_(eps).rsqrt_()
    return (x * scale).mul_(weight), scale


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        result, scale = _normed(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight, scale = ctx.saved_tensors
        products = torch.mul(grad, x, out=torch.empty(x.shape, dtype=x.dtype, device=x.device)).flatten(0, -2)
        to_weight = products.t() @ scale.flatten()
        along = (products @ weight).view(scale.shape)  # how much of the gradient points along x
        to_x = (grad * weight).mul_(scale)
        to_x.addcmul_(x, along.mul_(scale**3).div_(x.shape[-1]), value=-1)
        return to_x, to_weight, None


def gated_silu(gate_up: Tensor) -> Tensor:
    """[..., 2H] -> silu(first half) * second half [..., H], of Shazeer, "GLU variants improve transformer" (2020)."""
    return _GatedSiLU.apply(gate_up) if torch.is_grad_enabled() else _gated(gate_up)


def _gated(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate).mul_(up)


class _GatedSiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        return _gated(gate_up)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, -1)
        result = torch.empty_like(gate_up)
        to_gate, to_up = result.chunk(2, -1)
        torch.mul(grad, F.silu(gate), out=to_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=to_gate)
        return result


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates channel pairs (i, i + d/2) of x [B, heads, N, d] by the angles of cos and sin, which need no gradient."""
    return _Rotation.apply(x, cos, sin) if torch.is_grad_enabled() else _rotated(x, cos, sin, 1)


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, sin, -1), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    first, second = x.chunk(2, -1)
    turned = (first * cos).addcmul_(second, sin, value=-direction)
    return torch.cat([turned, (second * cos).addcmul_(first, sin, value=direction)], -1)


def around(
    tokens: Tensor,
    clean: Tensor | None,
    without_noise: Tensor | None,
    silent: Tensor | None,
    distances: list[int],
    length: int,
    wanted: slice = slice(None),
) -> Tensor:
    """Of each of the last `length` tokens those at the given distances, side by side; zeros where there is none.

    Args:
        tokens, clean: [B, M + length, F], a noisy and a clean version; `clean` None: there is no other.
        without_noise: where the clean one is taken, bool [D, B or 1, length]; with `clean`.
        silent: where neither is, bool [D, length], or None: nowhere.
        wanted: which of the last `length` tokens.

    Returns [B, wanted, D * F].
    """
    return _Around.apply(tokens, clean, without_noise, silent, distances, length, wanted)


class _Around(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tokens, clean, without_noise, silent, distances, length, wanted) -> Tensor:
        ctx.save_for_backward(without_noise, silent)
        ctx.shape, ctx.places = tokens.shape, _places(tokens.shape[1], length, distances, wanted)
        ctx.wanted = wanted
        count = len(range(length)[wanted])
        result = tokens.new_empty(len(tokens), count, len(distances), tokens.shape[-1])
        for index, (into, source) in enumerate(ctx.places):
            result[:, : into.start, index] = 0
            result[:, into.stop :, index] = 0
            if clean is None:
                result[:, into, index] = tokens[:, source]
            else:
                choice = without_noise[index][:, wanted][:, into, None]
                torch.where(choice, clean[:, source], tokens[:, source], out=result[:, into, index])
        if silent is not None:
            result.masked_fill_(silent[:, wanted].t()[..., None], 0)
        return result.flatten(2)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        without_noise, silent = ctx.saved_tensors
        grad = grad.unflatten(-1, (len(ctx.places), -1))
        if silent is not None:
            grad = grad.masked_fill(silent[:, ctx.wanted].t()[..., None], 0)
        to_tokens = grad.new_zeros(ctx.shape)
        to_clean = None if without_noise is None else grad.new_zeros(ctx.shape)
        for index, (into, source) in enumerate(ctx.places):
            part = grad[:, into, index]
            if to_clean is None:
                to_tokens[:, source] += part
            else:
                choice = without_noise[index][:, ctx.wanted][:, into, None].to(grad.dtype)
                to_clean[:, source].addcmul_(part, choice)
                to_tokens[:, source].addcmul_(part, 1 - choice)
        return to_tokens, to_clean, None, None, None, None, None


def _places(total: int, length: int, distances: list[int], wanted: slice) -> list[tuple[slice, slice]]:
    """For each distance, which of the wanted tokens have one so far away, and where that is among all of them."""
    start, _, step = wanted.indices(length)
    count, first = len(range(length)[wanted]), total - length + start
    result = []
    for distance in distances:
        low = max(0, -((first + distance) // step))  # the first with first + low * step + distance >= 0
        high = max(low, min(count, -((first + distance - total) // step)))
        at = first + distance + low * step
        result.append((slice(low, high), slice(at, at + (high - low) * step, step) if high > low else slice(0, 0)))
    return result
