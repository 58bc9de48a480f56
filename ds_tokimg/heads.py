"""What goes into the transformer beside the raw pixels, and how its output becomes a prediction of the clean image.

A noisy channel value z = alpha x + sigma noise has a known likelihood under every level x of the code. The posterior
heads hand this to the network as input (softmax of the log-likelihoods) and add it to its output, so that the network
only has to learn what the *context* says (the matched filter; cf. Chen et al., "Analog Bits", 2022, for digits as
targets):

    logits     = network(z, t, ...) + log_likelihood(z | candidate)
    clean_pred = sum softmax(logits) * colour(candidate)                 the posterior mean, in [-1, 1]

The candidates are the `radix` levels of a digit (`digits`, any vocabulary) or all V tokens (`tokens`, which also
knows how the digits of a token hang together; small vocabularies). All of it is computed in float32 whatever the
engine's precision. Patch values are ordered [slot, digit]: P = K * D.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ds_tokimg.codec import TokenCodec
from ds_tokimg.layers import RUN
from ds_tokimg.posterior import TokenInput, TokenOutput
from ds_tokimg.tree import Halves, TreeOutput, halves_of_code

# Noise below this is treated as this: finite log-likelihoods for clean patches, and still hundreds of nats between
# neighbouring levels of the finest code (radix 256).
MIN_SIGMA = 1e-4
# Numbers that stand for a token, in and out: enough that a thousand tokens are told apart from the start, few enough
# that the head of a wide model with many tokens a patch costs less than its blocks.
MAX_TOKEN_WIDTH = 192


class DigitHead(nn.Module):
    """Posterior over the levels of every digit. Logits are [B, N, K, D, radix]."""

    def __init__(self, codec: TokenCodec, slots: int, width: int):
        super().__init__()
        self.shape = (slots, codec.digits_per_token, codec.radix)
        self.radix = codec.radix
        self.features = math.prod(self.shape)
        self.outputs = self.features // slots  # numbers of a token
        # Integers, because an engine in half precision casts floating-point buffers.
        self.register_buffer("digit_table", codec.digit_table, persistent=False)  # [V, D] uint8
        self.output = nn.Linear(width, self.features)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def levels(self, device) -> Tensor:
        return torch.linspace(-1.0, 1.0, self.radix, device=device)

    def log_likelihood(self, noisy: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """noisy [B, N, P], alpha and sigma broadcasting to [B, N, 1] -> [B, N, K, D, radix], up to a constant."""
        z = noisy.unflatten(-1, self.shape[:2])[..., None]  # [B, N, K, D, 1]
        alpha, sigma = alpha[..., None, None, None], sigma[..., None, None, None].clamp(min=MIN_SIGMA)
        return -0.5 * ((z - alpha * self.levels(noisy.device)) / sigma) ** 2

    def evidence(self, noisy: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """What a noisy patch says, in the form that `features_of`, `logits` and `loss_sum` take."""
        return self.log_likelihood(noisy, alpha, sigma)

    def features_of(self, evidence: Tensor) -> Tensor:
        """The posterior without context, as input: [B, N, K, features / K]."""
        return self.embed(evidence.softmax(-1))

    def embed(self, probabilities: Tensor) -> Tensor:
        """[B, N, K, D, radix] -> features [B, N, K, D * radix]."""
        return probabilities.flatten(3)

    def forward(self, hidden: Tensor) -> Tensor:
        """What the context adds to the log-likelihood: [B, N, C] -> [B, N, K, D, radix], float32."""
        return self.output(hidden).float().unflatten(-1, self.shape)

    def logits(self, output: Tensor, evidence: Tensor) -> Tensor:
        """Of the posterior given the context: [B, N, K, D, radix]."""
        return output + evidence

    def loss_sum(self, output: Tensor, evidence: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy in nats, summed over the tokens whose mask [B, N, K] is True: scalar, float32; and that of each
        token, [B, N, K], without gradient."""
        losses = cross_entropy(self.logits(output, evidence), ids, self.digit_table) * mask
        return losses.sum(), losses.detach()

    def clean(self, logits: Tensor) -> Tensor:
        """The posterior mean, [B, N, P] in [-1, 1]."""
        with full_precision(logits):
            return (logits.softmax(-1) @ self.levels(logits.device)).flatten(2)

    def colours(self, digits: Tensor) -> Tensor:
        """Chosen digits [B, N, K, D] -> clean patches [B, N, P]."""
        return self.levels(digits.device)[digits].flatten(2)


class CandidateTokens(nn.Module):
    """What posteriors over whole tokens share. Logits are [B, N, K, V], up to a constant a token; `to_tokens` takes the
    hidden state [B, N, C] to the tokens of a patch [B, N, K * token_width]."""

    def __init__(self, codec: TokenCodec, slots: int):
        super().__init__()
        self.slots, self.radix, self.digits_per_token = slots, codec.radix, codec.digits_per_token
        self.register_buffer("digit_table", codec.digit_table, persistent=False)  # [V, D] uint8, see DigitHead

    def codebook(self) -> Tensor:
        """Colours of the tokens, [V, D] float32."""
        return self.digit_table.float() * (2.0 / (self.radix - 1)) - 1.0

    def evidence(self, noisy: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """What a noisy patch says: [B, N, K, D + 1], whose products with `book` are the log-likelihoods."""
        z = noisy.unflatten(-1, (self.slots, self.digits_per_token))  # [B, N, K, D]
        # A larger floor than the digits': the expanded square cancels in float32.
        alpha, sigma = alpha[..., None, None], sigma[..., None, None].clamp(min=10 * MIN_SIGMA)
        square = ((alpha / sigma) ** 2).expand(*z.shape[:-1], 1)
        return torch.cat([z * (alpha / sigma**2), square], -1)

    def book(self) -> Tensor:
        """The candidates as `evidence` meets them: colour and minus half its squared norm, [V, D + 1]."""
        book = self.codebook()
        return torch.cat([book, -0.5 * book.square().sum(-1, keepdim=True)], -1)

    def log_likelihood(self, noisy: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """noisy [B, N, P], alpha and sigma broadcasting to [B, N, 1] -> [B, N, K, V], up to a constant."""
        with full_precision(noisy):
            return self.evidence(noisy, alpha, sigma) @ self.book().T

    def forward(self, hidden: Tensor) -> Tensor:
        """What the context says of the tokens: [B, N, C] -> [B, N, K, token_width]."""
        return self.to_tokens(hidden).unflatten(-1, (self.slots, -1))

    def clean(self, logits: Tensor) -> Tensor:
        """The posterior mean, [B, N, P] in [-1, 1]."""
        with full_precision(logits):
            return (logits.softmax(-1) @ self.codebook()).flatten(2)

    def colours(self, ids: Tensor) -> Tensor:
        """Chosen tokens [B, N, K] -> clean patches [B, N, P]."""
        return self.codebook()[ids].flatten(2)


class TokenHead(CandidateTokens):
    """Posterior over whole tokens, all of which are weighed. Tokens of a patch share one embedding, in and out."""

    def __init__(self, codec: TokenCodec, slots: int, width: int):
        super().__init__(codec, slots)
        token_width = min(width, MAX_TOKEN_WIDTH)
        self.features, self.outputs = slots * token_width, token_width
        self.token_input = TokenInput(codec.vocab_size, token_width, bias=False)
        # A product of two matrices learns slower than one: where the hidden state has the tokens' width, it is they.
        is_direct = slots * token_width == width
        self.to_tokens = nn.Identity() if is_direct else nn.Linear(width, slots * token_width)
        self.token_output = TokenOutput(token_width, codec.vocab_size)
        # A token alone in its patch outweighs the noise of the raw values from the start. Tokens that share a patch
        # mix anyhow, and learn sooner when steps of the usual size move them far. (Each is worse off with the other.)
        nn.init.normal_(self.token_input.weight, std=3.0 if slots == 1 else 0.2)
        nn.init.normal_(self.token_output.weight, std=token_width**-0.5)
        # At first the context says nothing.
        nn.init.zeros_(self.token_output.weight if is_direct else self.to_tokens.weight)
        nn.init.zeros_(self.token_output.bias)
        if not is_direct:
            nn.init.zeros_(self.to_tokens.bias)

    def features_of(self, evidence: Tensor) -> Tensor:
        """The posterior without context, as input: [B, N, K, token_width]."""
        return self.token_input(evidence, self.book())

    def embed(self, probabilities: Tensor) -> Tensor:
        """[B, N, K, V] -> features [B, N, K, token_width]."""
        return self.token_input(probabilities)

    def embed_ids(self, ids: Tensor) -> Tensor:
        """Tokens that are certain [B, N, K] -> features [B, N, K, token_width]."""
        return self.token_input(ids)

    def logits(self, output: Tensor, evidence: Tensor) -> Tensor:
        """Of the posterior given the context: [B, N, K, V], float32."""
        context = self.token_output(output).float()
        with full_precision(evidence):
            return context + evidence @ self.book().T

    def loss_sum(self, output: Tensor, evidence: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy in nats, summed over the tokens whose mask [B, N, K] is True: scalar, float32; and that of each
        token, [B, N, K], without gradient."""
        return self.token_output(output, (evidence, self.book(), ids, mask))


class TreeHead(CandidateTokens):
    """Posterior over whole tokens as walks down the tree of their colours (`ds_tokimg.tree`), for vocabularies that are
    too large to weigh every token: training computes the log2(V) choices on the way to the token that is there.

    At a node the network's logit is added to the matched filter of the digit that parts its halves: what the noisy
    value says of the nearest level in the one and in the other.
    """

    def __init__(self, codec: TokenCodec, slots: int, width: int):
        super().__init__(codec, slots)
        token_width = min(width, MAX_TOKEN_WIDTH)
        self.codec = codec
        self.features = slots * (codec.digits_per_token * codec.radix + token_width)
        self.outputs = token_width
        self.token_input = nn.Embedding(codec.vocab_size, token_width)
        self.to_tokens = nn.Identity() if slots * token_width == width else nn.Linear(width, slots * token_width)
        self.token_output = TreeOutput(token_width, codec.vocab_size - 1)
        nn.init.normal_(self.token_input.weight, std=3.0 if slots == 1 else 0.2)
        halves = halves_of_code(codec.vocab_size, codec.radix, codec.digits_per_token)
        nn.init.zeros_(self.token_output.weight)
        with torch.no_grad():  # at first every token is as likely
            self.token_output.bias.copy_(torch.from_numpy(halves.log_odds()))
        self._register_tree(halves, codec)

    def _register_tree(self, halves: Halves, codec: TokenCodec) -> None:
        """Tables of the tree. A choice is a node (its lower half) or a node + V - 1 (its upper half)."""
        colour = np.arange(codec.vocab_size)  # of each token; a model without data (meta) has no palette
        if codec.palette is not None and not codec.palette.is_meta:
            colour = codec.palette.numpy()
        way, nodes = halves.way[colour], len(halves.side)
        goes_up = np.argsort(halves.order)[colour, None] > way  # [V, depth]
        depth = (way >= 0).sum(1)
        choice = way + goes_up * nodes
        tables = {"way": way.clip(0), "goes_up": goes_up, "on_way": way >= 0}
        tables |= {name: getattr(halves, name) for name in ("side", "least", "below", "above", "most")}
        # Which choice leads to a node and to a token, and where a choice leads: to a node or to ~token.
        to_token, to_node = choice[np.arange(len(depth)), depth - 1], np.zeros_like(halves.side)
        for level in range(1, way.shape[1]):
            reached = depth > level
            to_node[way[reached, level]] = choice[reached, level - 1]
        leads_to = np.empty(2 * nodes, np.int64)
        inner = np.setdiff1d(np.arange(nodes), way[:1, 0])  # all but the root
        leads_to[to_node[inner]], leads_to[to_token] = inner, ~np.arange(len(depth))
        tables |= {"to_node": to_node, "to_token": to_token, "leads_to": leads_to}
        for name, table in tables.items():
            self.register_buffer(name, torch.from_numpy(table).to(self.digit_table.device), persistent=False)
        self.node_levels = [np.unique(way[depth > k, k]) for k in range(way.shape[1])]

    def features_of(self, evidence: Tensor) -> Tensor:
        """The digits' posteriors without context and, as far as they are certain of it, the token that is read:
        [B, N, K, D * radix + token_width]."""
        levels = torch.linspace(-1.0, 1.0, self.radix, device=evidence.device)
        filtered = evidence[..., :-1, None] * levels - 0.5 * evidence[..., -1:, None] * levels**2
        digits = filtered.softmax(-1)  # [B, N, K, D, radix]
        certain, best = digits.max(-1)
        ids, invalid = self.codec.nearest(levels[best])
        return self._features(digits.flatten(-2), ids, certain.prod(-1) * ~invalid)

    def embed(self, probabilities: Tensor) -> Tensor:
        """[B, N, K, V] -> features as those of `features_of`."""
        digits = F.one_hot(self.digit_table.long(), self.radix).flatten(1).to(probabilities.dtype)
        certain, ids = probabilities.max(-1)
        return self._features(probabilities @ digits, ids, certain)

    def embed_ids(self, ids: Tensor) -> Tensor:
        """Tokens that are certain [B, N, K] -> features as those of `features_of`."""
        digits = F.one_hot(self.digit_table[ids].long(), self.radix).flatten(-2)
        return self._features(digits, ids, torch.ones(ids.shape, device=ids.device))

    def _features(self, digits: Tensor, ids: Tensor, certain: Tensor) -> Tensor:
        token = self.token_input(ids)
        return torch.cat([digits.to(token.dtype), token * certain[..., None].to(token.dtype)], -1)

    def logits(self, output: Tensor, evidence: Tensor) -> Tensor:
        """Of the posterior given the context: log-probabilities [B, N, K, V], float32. Costs as much as weighing every
        token."""
        nodes = torch.arange(len(self.side), device=evidence.device)
        up = self.token_output(output) + self._filter(evidence, nodes)
        up = up.flatten(0, -2).T  # [V - 1, rows]
        choices = torch.cat([F.logsigmoid(-up), F.logsigmoid(up)])  # lower, then upper
        reached = torch.zeros_like(up)
        for level in self.node_levels[1:]:
            level = torch.from_numpy(level).to(up.device)
            choice = self.to_node[level]
            reached[level] = reached[choice % len(up)] + choices[choice]
        tokens = reached[self.to_token % len(up)] + choices[self.to_token]
        return tokens.T.unflatten(0, output.shape[:-1])

    def walk(self, output: Tensor, evidence: Tensor) -> Tensor:
        """Down the tree by the likelier half at every node: tokens [B, N, K]."""
        place = self.way[0, 0].expand(output.shape[:-1]).clone()  # a node, or ~token
        for _ in self.node_levels:
            node = place.clamp(min=0)[..., None]
            up = self.token_output(output, node) + self._filter(evidence, node)
            choice = node + (up > 0) * len(self.side)
            place = torch.where(place >= 0, self.leads_to[choice[..., 0]], place)
        return ~place

    def _filter(self, evidence: Tensor, nodes: Tensor) -> Tensor:
        """What the noisy value says at nodes [m] or [..., m]: log-likelihood ratio of the nearest levels, [..., m]."""
        side = self.side[nodes].expand(*evidence.shape[:-1], -1)
        z, square = evidence.gather(-1, side), evidence[..., -1:]
        nearest = ((z / square + 1) * (0.5 * (self.radix - 1))).round()
        step = 2.0 / (self.radix - 1)
        lower = nearest.clamp(self.least[nodes].float(), self.below[nodes].float()) * step - 1
        upper = nearest.clamp(self.above[nodes].float(), self.most[nodes].float()) * step - 1
        return (upper - lower) * (z - 0.5 * (upper + lower) * square)

    def loss_sum(self, output: Tensor, evidence: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy in nats, summed over the tokens whose mask [B, N, K] is True: scalar, float32; and that of each
        token, [B, N, K], without gradient."""
        nodes = self.way[ids]  # [B, N, K, depth]
        up = self.token_output(output, nodes) + self._filter(evidence, nodes)
        losses = F.softplus(torch.where(self.goes_up[ids], -up, up)) * self.on_way[ids]
        losses = losses.sum(-1) * mask
        return losses.sum(), losses.detach()


class LinearHead(nn.Module):
    """The plain JiT output (baseline): colours by regression, no candidates."""

    features = 0

    def __init__(self, codec: TokenCodec, slots: int, width: int):
        super().__init__()
        self.output = nn.Linear(width, slots * codec.digits_per_token)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, N, C] -> clean patches [B, N, P], float32."""
        return self.output(hidden).float()


def draws_in_one_step(head: nn.Module, block_size: int, in_turn: bool = False) -> bool:
    """Blocks of so many patches are one token each, of which the head has a posterior, or tokens that are drawn in turn
    (one run of them): the first posterior, at full noise, is already the right one to draw from."""
    return isinstance(head, CandidateTokens) and 0 < block_size * head.slots <= (RUN if in_turn else 1)


def full_precision(like: Tensor) -> torch.autocast:
    """Switches autocast off: it would round the operands of a matrix product to half precision."""
    return torch.autocast(like.device.type, enabled=False)


def cross_entropy(logits: Tensor, ids: Tensor, digit_table: Tensor) -> Tensor:
    """-log p(token) in nats of logits [B, N, K, V] or [B, N, K, D, radix] (digits summed) -> [B, N, K]."""
    if logits.dim() == 4:
        return F.cross_entropy(logits.flatten(0, 2), ids.flatten(), reduction="none").view(ids.shape)
    digits = digit_table[ids].long()  # [B, N, K, D]
    losses = F.cross_entropy(logits.flatten(0, 3), digits.flatten(), reduction="none")
    return losses.view(digits.shape).sum(-1)
