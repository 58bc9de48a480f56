"""What the diffusion model is compared with: the same transformer blocks as an autoregressive and as a masked model.

One token a position, a learned embedding in and a linear layer out. Both give the figures of the benchmark: the loss
of a batch, and the bits that held-out texts cost.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ds_tokimg.model.layers import Layer, Past, RMSNorm, rope_frequencies


class TokenTransformer(nn.Module):
    """Blocks as in `JiT` (without noise levels) between a token embedding and a softmax over the vocabulary.

    shift: every token also shows those so far from it, -1 the one before, as the patches of `JiT` do.
    """

    def __init__(self, vocab_size: int, inputs: int, depth: int, width: int, heads: int, shift: tuple[int, ...] = ()):
        super().__init__()
        self.embed = nn.Embedding(inputs, width)
        self.shift = shift
        self.shown = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in shift)
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(depth))
        self.norm, self.out = RMSNorm(width), nn.Linear(width, vocab_size)
        self.half_head = width // heads // 2
        nn.init.normal_(self.embed.weight, std=0.02)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    @staticmethod
    def _inside(length: int, distance: int) -> Tensor:
        """Whether there is a token so far from each of them: [length, 1]."""
        place = torch.arange(length)[:, None] + distance
        return (place >= 0) & (place < length)

    def forward(self, ids: Tensor, visible: Tensor | None, past: list[Past] | None = None) -> Tensor:
        """ids [B, L], visible [B, 1, 1 or L, L] (who sees whom; None: all) -> logits [B, L, V].

        past: earlier positions, one a layer, which these are added to (see `Attention`).
        """
        own = x = self.embed(ids)
        for distance, shown in zip(self.shift, self.shown, strict=True):
            x = x + shown(own.roll(-distance, 1) * self._inside(ids.shape[1], distance))
        first = past[0].length if past else 0
        places = torch.arange(first, first + ids.shape[1])
        angles = places[:, None] * rope_frequencies(self.half_head, ids.device)
        rotation = (angles.cos()[None, None], angles.sin()[None, None])
        no_noise = x.new_zeros(1, 1, 6 * x.shape[-1])
        for index, layer in enumerate(self.layers):
            x = layer(x, no_noise, rotation, visible, None if past is None else past[index])
        return self.out(self.norm(x))


class Autoregressive(nn.Module):
    """Next-token prediction. The first token is predicted from EOS, so that every token is paid for."""

    def __init__(self, vocab_size: int, eos_id: int, shape: tuple[int, int, int], shift: bool = False):
        super().__init__()
        self.model, self.eos_id = TokenTransformer(vocab_size, vocab_size, *shape, (-1,) if shift else ()), eos_id

    def token_nats(self, ids: Tensor, mask: Tensor) -> Tensor:
        """-log p of every token, 0 in padding: [B, L]."""
        before = F.pad(ids, (1, 0), value=self.eos_id)[:, :-1]
        causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()[None, None]
        logits = self.model(before, causal).float()
        return F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none").view(ids.shape) * mask

    loss_of = token_nats

    @torch.no_grad()
    def bound_nats(self, ids: Tensor, mask: Tensor, draws: int) -> Tensor:
        """-log p of each text, exact: [B]."""
        return self.token_nats(ids, mask).double().sum(1)

    @torch.no_grad()
    def sample(self, count: int, length: int, seed: int) -> Tensor:
        """Texts of `length` ids: [count, length]. Not with `shift`: the step does not see the token before its own."""
        assert not self.model.shift
        generator = torch.Generator().manual_seed(seed)
        past = [Past() for _ in self.model.layers]
        ids = [torch.full((count, 1), self.eos_id)]
        for _ in range(length):
            logits = self.model(ids[-1], None, past)[:, -1].float()
            ids.append(torch.multinomial(logits.softmax(-1), 1, generator=generator))
        return torch.cat(ids[1:], 1)


class MaskedDiffusion(nn.Module):
    """Absorbing-state diffusion with the linear schedule (Sahoo et al. 2024, Shi et al. 2024): a share t of the tokens
    is masked, and -log p <= E_t [sum over masked tokens of their cross-entropy / t]."""

    def __init__(self, vocab_size: int, eos_id: int, shape: tuple[int, int, int], shift: bool = False):
        super().__init__()
        sides = (-1, 1) if shift else ()
        self.model, self.mask_id = TokenTransformer(vocab_size, vocab_size + 1, *shape, sides), vocab_size

    def _weighted(self, ids: Tensor, mask: Tensor, t: Tensor, generator=None) -> Tensor:
        hidden = (torch.rand(ids.shape, generator=generator) < t) & mask
        keys = (mask | ~mask.any(1, keepdim=True))[:, None, None]
        logits = self.model(ids.masked_fill(hidden, self.mask_id), keys).float()
        nats = F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none").view(ids.shape)
        return nats * hidden / t

    def loss_of(self, ids: Tensor, mask: Tensor) -> Tensor:
        """The bound's integrand at one t a text, stratified over the batch: [B, L]."""
        t = (torch.arange(len(ids)) + torch.rand(1)) / len(ids)
        return self._weighted(ids, mask, t[:, None].clamp(min=1e-3))

    @torch.no_grad()
    def bound_nats(self, ids: Tensor, mask: Tensor, draws: int) -> Tensor:
        """The bound of each text: [B], from `draws` stratified t with fixed masks."""
        generator, total = torch.Generator().manual_seed(0), torch.zeros(len(ids), dtype=torch.float64)
        for draw in range(draws):
            t = (draw + torch.rand(len(ids), 1, generator=generator)) / draws
            total = total + self._weighted(ids, mask, t.clamp(min=1e-3), generator).double().sum(1) / draws
        return total


def bits(nats: float) -> float:
    return nats / math.log(2)
