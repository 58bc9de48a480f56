""""""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ds_tokimg.model.heads.base import MAX_TOKEN_WIDTH, CandidateTokens
from ds_tokimg.tokens.codec import TokenCodec
from ds_tokimg.tokens.tree import Halves, halves_of_code


class TreeOutput(nn.Linear):
    """Embeddings of tokens -> what the context says at the nodes of a tree: logits of going up; see `forward`."""

    def forward(self, tokens: Tensor, nodes: Tensor | None = None) -> Tensor:
        """tokens [..., W] -> float32 logits at all nodes [..., V - 1], or at these nodes [..., m] of each token."""
        if nodes is None:
            return super().forward(tokens).float()
        rows, bias = F.embedding(nodes.flatten(0, -2), self.weight), self.bias[nodes]
        said = rows @ tokens.flatten(0, -2)[..., None].to(rows.dtype)  # [rows, m, 1]
        return said.view(nodes.shape).float() + bias.float()


class TreeHead(CandidateTokens):
    """Posterior over whole tokens as walks down the tree of their colours (`tokens.tree`), for vocabularies that are
    too large to weigh every token: training computes the log2(V) choices on the way to the token that is there.

    At a node the network's logit is added to the matched filter of the digit that parts its halves: what the noisy
    value says of the nearest level in the one and in the other.
    """

    # Tables of the tree, see `_register_tree` and `tokens.tree.Halves`.
    way: Tensor
    goes_up: Tensor
    on_way: Tensor
    side: Tensor
    least: Tensor
    below: Tensor
    above: Tensor
    most: Tensor
    to_node: Tensor
    to_token: Tensor
    leads_to: Tensor

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
        for nodes_of_level in self.node_levels[1:]:
            level = torch.from_numpy(nodes_of_level).to(up.device)
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
