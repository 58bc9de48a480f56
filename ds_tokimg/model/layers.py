"""The layers of the transformer: attention and SwiGLU, modulated by the noise level."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ds_tokimg.diffusion.path import log_snr
from ds_tokimg.model.kernels.fused import gated_silu, rms_norm, rotate


class TimestepEmbedding(nn.Module):
    """Noise level -> the modulation that all blocks share. Fed with log-SNR, in which tokens become readable."""

    def __init__(self, width: int, frequencies: int = 64):
        super().__init__()
        self.frequencies = frequencies
        self.mlp = nn.Sequential(nn.Linear(2 * frequencies, width), nn.SiLU(), nn.Linear(width, width))
        self.modulation = nn.Linear(width, 6 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, t: Tensor) -> Tensor:
        """t [B, n] -> [B, n, 6C]."""
        value = log_snr(t)[..., None]
        # Periods from 0.25 to 60 in log-SNR: from a small part of the band to all of it.
        rates = torch.exp(torch.linspace(math.log(25.0), math.log(0.1), self.frequencies, device=t.device))
        waves = torch.cat([(value * rates).cos(), (value * rates).sin()], -1)
        return self.modulation(F.silu(self.mlp(waves.to(self.modulation.weight.dtype))))


class Block(nn.Module):
    """Attention and SwiGLU, each modulated by the noise level and gated by zero at the start (adaLN-Zero)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        hidden = 64 * round(width * 8 / 3 / 64)  # SwiGLU has three matrices where an MLP has two: 4C * 2/3
        self.norm1, self.norm2 = RMSNorm(width), RMSNorm(width)
        self.attention = Attention(width, heads)
        self.mlp = SwiGLU(width, hidden)
        self.offset = nn.Parameter(torch.zeros(6 * width))  # [6C]
        for parameter in self.parameters():
            parameter.hidden_matrix = parameter.ndim == 2  # type: ignore[attr-defined]  # see `ds_tokimg.engine.muon`

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        rotation,
        keys: Tensor | None,
        past: list | None = None,
        wanted: int | None = None,
    ) -> Tensor:
        """x [B, N, C]; time [B, N or 1, 6C]; see `Attention`. `wanted`: the result is of the last so many positions."""
        # Each [B, N or 1, C], by one operation: the gradient of a slice is a slice in zeros as wide as the whole.
        shift1, scale1, gate1, shift2, scale2, gate2 = (time + self.offset).chunk(6, -1)
        mixed = self.attention(torch.addcmul(shift1, self.norm1(x), 1 + scale1), rotation, keys, past, wanted)
        if wanted is not None:
            x, gate1, shift2, scale2, gate2 = (part[:, -wanted:] for part in (x, gate1, shift2, scale2, gate2))
        x = torch.addcmul(x, gate1, mixed)
        return torch.addcmul(x, gate2, self.mlp(torch.addcmul(shift2, self.norm2(x), 1 + scale2)))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_norm, self.k_norm = RMSNorm(width // heads), RMSNorm(width // heads)
        self.out = nn.Linear(width, width)

    def forward(
        self, x: Tensor, rotation, keys: Tensor | None, past: list[Tensor] | None = None, wanted: int | None = None
    ) -> Tensor:
        """x [B, N, C]; keys bool, broadcasting to [B, heads, N, M + N]; past: keys and values of M earlier positions,
        each [B, heads, M, d], which these N come after; the list is brought up to date. `wanted`: the last so many
        positions ask, all are asked; the result is [B, wanted, C]."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each [B, heads, N, d]
        asking = rotation
        if wanted is not None:
            q, asking = q[:, :, -wanted:], [part[..., -wanted:, :] for part in rotation]
            keys = keys if keys is None else keys[..., -wanted:, :]
        q, k = rotate(self.q_norm(q), *asking), rotate(self.k_norm(k), *rotation)
        if past is not None:
            past[:] = k, v = [torch.cat(parts, 2) for parts in zip(past, (k, v), strict=True)] if past else (k, v)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=keys)
        return self.out(mixed.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """Shazeer, "GLU variants improve transformer" (2020)."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(gated_silu(self.gate_up(x)))


class RMSNorm(nn.Module):
    """Zhang & Sennrich (2019)."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        # Under autocast x may be in half precision; the weight has to be alike.
        return rms_norm(x, self.weight.to(x.dtype), 1e-6)


class FinalLayer(nn.Module):
    """The last norm, modulated by the noise level through the same embedding as the blocks."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = RMSNorm(width)
        self.modulation = nn.Linear(6 * width, 2 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        shift, scale = self.modulation(F.silu(time)).chunk(2, -1)
        return torch.addcmul(shift, self.norm(x), 1 + scale)


def rope_frequencies(count: int, device) -> Tensor:
    """Angles a position of RoPE turns its channel pairs by: float32 [count]."""
    return 10_000.0 ** (-torch.arange(count, device=device) / count)
