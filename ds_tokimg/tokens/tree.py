"""The colours of a code as a binary tree, and distributions over tokens as walks down it.

The colour cube is halved across its widest side, each half again across its own, until every colour is alone. Where a
token's probability is the product of the choices on the way to its colour, it costs log2(V) choices instead of V
logits (the hierarchical softmax of Morin and Bengio, "Hierarchical probabilistic neural network language model",
2005), and the probabilities sum to one whatever the network says. The semantic palette fills the cube along the same
halves, so that each choice is between tokens of different use, which is what makes such a tree good (Mnih and Hinton,
"A scalable hierarchical distributed language model", 2008).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@dataclass(frozen=True)
class Halves:
    """The tree over V colours, which has V - 1 inner nodes.

    Node i parts the colours `order[first[i]]` … `order[i]`, the lower half, from `order[i + 1]` … `order[last[i]]` by
    the digit `side[i]`, which runs from `least[i]` to `below[i]` in the lower half and from `above[i]` to `most[i]` in
    the upper one. `order` is int64 [V], the others are int64 [V - 1].

    way: int64 [V, depth], the nodes on the way to each colour, -1 behind the last one.
    """

    order: np.ndarray
    first: np.ndarray
    last: np.ndarray
    side: np.ndarray
    least: np.ndarray
    below: np.ndarray
    above: np.ndarray
    most: np.ndarray
    way: np.ndarray

    def log_odds(self) -> np.ndarray:
        """Of the upper half at every node, if all colours are as likely: float64 [V - 1]."""
        node = np.arange(len(self.side))
        return np.log((self.last - node) / (node + 1 - self.first))


@lru_cache(maxsize=4)
def halves_of_code(vocab_size: int, radix: int, digits: int) -> Halves:
    """The tree of the first `vocab_size` colours of a code: what `TokenCodec` writes, whatever its palette."""
    # A power above V marks digits that are 0 in all of them.
    powers = np.array([min(radix**k, 1 << 40) for k in range(digits)])
    return halve(np.arange(vocab_size)[:, None] // powers % radix)


def halve(digits: np.ndarray) -> Halves:
    """The tree of colours with these digits, integers [V, D], all different: a part is halved across the side on which
    its digits differ most (the first of these)."""
    varying = np.flatnonzero((digits != digits[:1]).any(0))
    digits = digits[:, varying].astype(np.int16)
    order, starts = np.arange(len(digits)), np.zeros(1, np.int64)  # places of the parts' first colours
    names = ("first", "last", "side", "least", "below", "above", "most")
    nodes = {name: np.zeros(len(order) - 1, np.int64) for name in names}
    ways = []
    while len(starts) < len(order):
        rows = digits[order]
        sizes = np.diff(starts, append=len(order))
        part = np.repeat(np.arange(len(starts)), sizes)
        lowest, highest = np.minimum.reduceat(rows, starts), np.maximum.reduceat(rows, starts)  # [parts, D]
        side = (highest - lowest).argmax(1)
        least, most = (ends[np.arange(len(side)), side] for ends in (lowest, highest))
        digit = rows[np.arange(len(rows)), side[part]]
        upper = 2 * digit > (least + most)[part]
        below = np.maximum.reduceat(np.where(upper, -1, digit), starts)
        above = np.minimum.reduceat(np.where(upper, digit, digits.max() + 1), starts)
        order = order[np.argsort(2 * part + upper, kind="stable")]
        halved = sizes > 1
        middle = (starts + sizes - np.add.reduceat(upper, starts))[halved]  # where the upper halves begin
        found = (starts, starts + sizes - 1, varying[side], least, below, above, most)
        for name, value in zip(names, found, strict=True):
            nodes[name][middle - 1] = value[halved]
        node_of_part = np.full(len(starts), -1)
        node_of_part[halved] = middle - 1
        way = np.empty(len(order), np.int64)
        way[order] = node_of_part[part]
        ways.append(way)
        starts = np.union1d(starts, middle)
    return Halves(order, **nodes, way=np.stack(ways, 1) if ways else np.zeros((len(order), 0), np.int64))
