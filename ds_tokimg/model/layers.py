"""The layers of the transformer (attention and SwiGLU, modulated by the noise level), and what tokens that share a
patch learn from those next to them (local window, token MLP)."""

from __future__ import annotations

import copy
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ds_tokimg.diffusion.path import log_snr
from ds_tokimg.diffusion.writing import RUN
from ds_tokimg.model.kernels.fused import around, gated_silu, rms_norm, rotate


class TimestepEmbedding(nn.Module):
    """Noise level -> the modulation that all layers share. Fed with log-SNR, in which tokens become readable."""

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


class Layer(nn.Module):
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
        visible: Tensor | None,
        past: Past | None = None,
        wanted: int | None = None,
    ) -> Tensor:
        """x [B, N, C]; time [B, N or 1, 6C]; see `Attention`. `wanted`: the result is of the last so many positions (0:
        of none, these are only remembered)."""
        # Each [B, N or 1, C], by one operation: the gradient of a slice is a slice in zeros as wide as the whole.
        shift1, scale1, gate1, shift2, scale2, gate2 = (time + self.offset).chunk(6, -1)
        mixed = self.attention(torch.addcmul(shift1, self.norm1(x), 1 + scale1), rotation, visible, past, wanted)
        if wanted == 0:
            return x[:, :0]
        if wanted is not None:
            x, gate1, shift2, scale2, gate2 = (part[:, -wanted:] for part in (x, gate1, shift2, scale2, gate2))
        x = torch.addcmul(x, gate1, mixed)
        return torch.addcmul(x, gate2, self.mlp(torch.addcmul(shift2, self.norm2(x), 1 + scale2)))


class Past:
    """Keys and values of earlier positions, which attention adds to: [B, heads, M, d] each, in buffers with room for
    more, so that a position costs what it is, not what all before it are."""

    def __init__(self) -> None:
        self.length = 0  # M
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def add(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Positions [B, heads, n, d] -> all of them, [B, heads, M + n, d]."""
        begin, self.length = self.length, self.length + keys.shape[2]
        if self.keys is None or self.values is None:
            self.keys, self.values = keys, values
        if self.length > self.keys.shape[2]:
            self.keys, self.values = (_longer(part, begin, 2 * self.length) for part in (self.keys, self.values))
        if begin:
            self.keys[:, :, begin : self.length], self.values[:, :, begin : self.length] = keys, values
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def for_one_pass(self) -> Past:
        """What may be added to once without changing this: it writes behind what is here."""
        return copy.copy(self)

    def select(self, rows: Tensor) -> Past:
        """Of these texts alone, bool [B]."""
        past = copy.copy(self)
        if self.keys is not None and self.values is not None:
            past.keys, past.values = self.keys[rows], self.values[rows]
        return past


def _longer(part: Tensor, used: int, length: int) -> Tensor:
    """The same [B, heads, used, d] in a buffer of another length."""
    longer = part.new_empty(*part.shape[:2], length, part.shape[3])
    longer[:, :, :used] = part[:, :, :used]
    return longer


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_norm, self.k_norm = RMSNorm(width // heads), RMSNorm(width // heads)
        self.out = nn.Linear(width, width)

    def forward(
        self, x: Tensor, rotation, visible: Tensor | None, past: Past | None = None, wanted: int | None = None
    ) -> Tensor:
        """x [B, N, C]; visible bool, broadcasting to [B, heads, N, M + N], the positions that each may attend to (None:
        all); past: M earlier positions, which these N come after, and are added to. `wanted`: queries of the last so
        many positions alone; the result is [B, wanted, C]."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each [B, heads, N, d]
        k, asking = rotate(self.k_norm(k), *rotation), rotation
        if past is not None:
            k, v = past.add(k, v)
        if wanted == 0:
            return x[:, :0]
        if wanted is not None:
            q, asking = q[:, :, -wanted:], [part[..., -wanted:, :] for part in rotation]
            visible = visible if visible is None else visible[..., -wanted:, :]
        q = rotate(self.q_norm(q), *asking)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
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
    """The last norm, modulated by the noise level through the same embedding as the layers."""

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


class InTurn(NamedTuple):
    """Tokens that are drawn one after another: the first ones of all runs, then the second ones, …"""

    clean: Tensor  # [B, L, F], features of the tokens that were drawn; those of later turns are not looked at
    rows: Tensor | None = None  # [B] bool, texts that are drawn so; None: all

    def known(self, distances: Tensor, places: Tensor) -> Tensor:
        """Whether tokens at these places of their blocks, [L], have those so far away without noise, because they were
        drawn before them: bool [D, B or 1, L]."""
        earlier = ((places + distances[:, None]) % RUN < places % RUN)[:, None]
        return earlier if self.rows is None else earlier & self.rows[:, None]


class LocalWindow(nn.Module):
    """What follows for a token from the tokens around it, straight from their features to its output.

    Tokens that share a patch share one hidden state, through which their pairs can hardly be told; here they need not.

    Args:
        reach: how many tokens on either side.
        features, outputs: numbers of a token, in and out.
    """

    def __init__(self, reach: int, features: int, outputs: int):
        super().__init__()
        self.reach = reach
        self.output = nn.Linear(2 * reach * features, outputs, bias=False)
        nn.init.zeros_(self.output.weight)

    def forward(
        self,
        tokens: Tensor,
        before: Tensor | None = None,
        context: tuple[Tensor, Tensor] | None = None,
        in_turn: InTurn | None = None,
        wanted: slice = slice(None),
    ) -> Tensor:
        """tokens [B, L, F] -> [B, L, outputs].

        before: [B, reach, F], tokens that precede these; None: none do.
        context: (the same tokens without noise [B, L, F], blocks [L]): a token's window then holds those of its
            own block, those of earlier blocks without noise, and none of later ones.
        in_turn: those of its own block that were drawn before it are without noise.
        wanted: the tokens that the result is of.
        """
        length, device = tokens.shape[1], tokens.device
        sides = [*range(-self.reach, 0), *range(1, self.reach + 1)]
        distances = torch.cat([torch.arange(*ends, device=device) for ends in ((-self.reach, 0), (1, self.reach + 1))])
        places = torch.arange(length, device=device)
        clean: Tensor | None = None
        without_noise: Tensor | None = None
        silent: Tensor | None = None
        if context is not None:
            clean, blocks = context
            others = blocks[(places + distances[:, None]).clamp(0, length - 1)] - blocks  # [D, L]
            without_noise, silent = (others < 0)[:, None], others > 0
            places = places - torch.searchsorted(blocks, blocks)
        if in_turn is not None:
            clean, drawn = in_turn.clean, in_turn.known(distances, places)
            without_noise = drawn if without_noise is None else drawn & (others == 0)[:, None] | without_noise
        if before is not None:
            tokens = torch.cat([before, tokens], 1)
            clean = None if clean is None else torch.cat([before, clean], 1)
        return self.output(around(tokens, clean, without_noise, silent, sides, length, wanted))

    def last(self, tokens: Tensor, before: Tensor | None) -> Tensor:
        """Of tokens [B, L, F], after those `before`, what is in the window of the next ones: [B, reach, F]."""
        preceding = tokens if before is None else torch.cat([before, tokens], 1)
        return F.pad(preceding, (0, 0, self.reach, 0))[:, -self.reach :]


class TokenMLP(nn.Module):
    """What follows for a token from its own features and its local window, added to its output.

    Args:
        features, outputs: numbers of a token, in and out.
        slots: tokens of a patch.
    """

    def __init__(self, features: int, outputs: int, slots: int):
        super().__init__()
        self.own = nn.Linear(features, outputs, bias=False)
        self.norm = RMSNorm(outputs)
        # Half as wide as a layer's, for every token has to pay for it; where more than four share a patch, narrower,
        # or they would cost a small model more than its layers.
        self.mlp = SwiGLU(outputs, 64 * max(1, round(outputs * 16 / 3 / max(4, slots) / 64)))
        nn.init.zeros_(self.mlp.down.weight)
        nn.init.zeros_(self.mlp.down.bias)

    def forward(self, output: Tensor, tokens: Tensor) -> Tensor:
        """output [B, L, outputs], tokens [B, L, features] -> [B, L, outputs]."""
        return output + self.mlp(self.norm(output.to(tokens.dtype) + self.own(tokens)))
