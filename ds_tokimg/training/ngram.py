"""An n-gram model of tokens: what counting alone reaches on a run's texts, beside which its own figure is read.

Interpolated Kneser-Ney smoothing with one discount an order (Kneser and Ney, "Improved backing-off for m-gram language
modeling", 1995; interpolated as in Chen and Goodman, "An empirical study of smoothing techniques for language
modeling", 1998, section 3.4):

    p(w | h) = max(c(h w) - D, 0) / c(h .) + D N(h .) / c(h .) * p(w | h without its first token)

c counts occurrences at the highest order and different tokens to the left below it; N(h .) is how many different tokens
follow h; D = n1 / (n1 + 2 n2) from the numbers of grams counted once and twice. The unigrams fall back on the uniform
distribution, so every text has a finite cost.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from ds_tokimg.data.dataset import TokenImageDataset

ORDER = 4  # corpora of 10^5 to 10^7 tokens do not pay for a longer context
MOST_TOKENS = 2_000_000  # that are counted, and that are scored: a few seconds

Text = tuple[np.ndarray, np.ndarray]  # tokens that are given (a prompt), tokens that are scored


@dataclass(frozen=True)
class Grams:
    """All different grams of one length n, numbered 0 … K-1 in the order of their keys.

    keys: int64 [K], ascending: the number of the last n-1 tokens times (V + 1), plus the first token.
    counts: [K], of each gram. totals, followers: of each context (a gram of length n-1), by its number: the sum of its
    grams' counts, and how many different ones there are.
    """

    keys: np.ndarray
    counts: np.ndarray
    totals: np.ndarray
    followers: np.ndarray

    @property
    def discount(self) -> float:
        once, twice = (np.count_nonzero(self.counts == times) for times in (1, 2))
        return once / (once + 2 * twice) if once and twice else 0.5

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Numbers of grams by their keys, -1 for one that never occurred."""
        places = np.searchsorted(self.keys, keys).clip(max=len(self.keys) - 1)
        return np.where(self.keys[places] == keys, places, -1)

    def probabilities(self, grams: np.ndarray, contexts: np.ndarray, shorter: np.ndarray) -> np.ndarray:
        """p(last token | the others) of grams, by their and their contexts' numbers; `shorter`: the same of the grams
        without their first token."""
        totals = np.where(contexts < 0, 0, self.totals[contexts])
        counts = np.where(grams < 0, 0, self.counts[grams])
        kept = np.maximum(counts - self.discount, 0)
        given_away = self.discount * self.followers[contexts]
        return np.where(totals > 0, (kept + given_away * shorter) / np.maximum(totals, 1), shorter)


class NGram:
    """A model of texts, each read from its own beginning.

    Args:
        texts: what is counted, at least one scored token; ids below `vocab_size`.
        order: tokens of the longest gram, at least 2.
    """

    def __init__(self, texts: Iterable[Text], vocab_size: int, order: int = ORDER):
        self.vocab_size, self.order = vocab_size, order
        tokens, scored, _ = self._line_up(texts)
        numbers: list[np.ndarray] = [np.zeros(len(tokens), np.int64)]
        keys: list[np.ndarray] = []
        first: list[np.ndarray] = []
        for length in range(1, order + 1):
            unique = np.unique(self._keys(numbers[-1], tokens, length), return_index=True, return_inverse=True)
            for values, value in zip((keys, first, numbers), unique, strict=True):
                values.append(value)
        occurrences = [np.bincount(numbers[n + 1][scored], minlength=len(keys[n])) for n in range(order)]
        self.grams = []
        for n in range(order):
            counts = occurrences[n]
            if n + 1 < order:  # different tokens to the left
                longer = keys[n + 1][occurrences[n + 1] > 0]
                counts = np.bincount(longer // (vocab_size + 1), minlength=len(keys[n]))
            contexts = _before(numbers[n])[first[n]]
            totals = np.bincount(contexts, counts, minlength=int(numbers[n].max()) + 1)
            followers = np.bincount(contexts, counts > 0, minlength=len(totals))
            self.grams.append(Grams(keys[n], counts, totals, followers))

    def nats(self, texts: Iterable[Text]) -> np.ndarray:
        """-log p of the scored tokens of each text, float64 [texts]."""
        tokens, scored, of_text = self._line_up(texts)
        numbers = np.zeros(len(tokens), np.int64)
        probabilities = np.full(len(tokens), 1 / self.vocab_size)
        for length, grams in enumerate(self.grams, 1):
            contexts = _before(numbers)
            numbers = grams.find(self._keys(numbers, tokens, length))
            probabilities = grams.probabilities(numbers, contexts, probabilities)
        return np.bincount(of_text[scored], -np.log(probabilities[scored]), int(of_text.max()) + 1)

    def _line_up(self, texts: Iterable[Text]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Texts end to end, each behind `order` - 1 marks of a beginning (id V): tokens [n], which are scored [n], the
        number of their text [n]."""
        marks = np.full(self.order - 1, self.vocab_size)
        pieces, scored, lengths = [], [], []
        for given, ids in texts:
            pieces += [marks, given, ids]
            scored += [np.zeros(len(marks) + len(given), bool), np.ones(len(ids), bool)]
            lengths.append(len(marks) + len(given) + len(ids))
        tokens = np.concatenate(pieces).astype(np.int64)
        return tokens, np.concatenate(scored), np.repeat(np.arange(len(lengths)), lengths)

    def _keys(self, shorter: np.ndarray, tokens: np.ndarray, length: int) -> np.ndarray:
        """Keys of the grams of a length that end at each place, by the numbers of those that are a token shorter."""
        first = np.full(len(tokens), self.vocab_size)
        first[length - 1 :] = tokens[: len(tokens) - length + 1]
        return np.where(shorter < 0, -1, shorter * (self.vocab_size + 1) + first)


def _before(numbers: np.ndarray) -> np.ndarray:
    """Numbers of the contexts: of the grams that end a place earlier. Nothing is scored at the first place."""
    return np.concatenate([numbers[:1], numbers[:-1]])


@dataclass(frozen=True)
class Figure:
    """What an n-gram model of `tokens` training tokens reaches on held-out texts."""

    bits_per_token: float
    tokens: int

    def __str__(self) -> str:
        size = f"{self.tokens / 1e6:.1f} M" if self.tokens >= 1e6 else f"{self.tokens / 1e3:.0f} k"
        return f"{ORDER}-gram model of {size} tokens {self.bits_per_token:.3f}"


def measure(train_set: TokenImageDataset, eval_set: TokenImageDataset, most_tokens: int = MOST_TOKENS) -> Figure | None:
    """Of the held-out images, by an n-gram model of the training images; None where there are none of either.

    It sees of a text what the trained model sees: an image from its beginning, and its prompt. Of a set with more than
    `most_tokens` tokens, images spread evenly over it are taken.
    """
    seen, held_out = _texts(train_set, most_tokens), _texts(eval_set, most_tokens)
    if not seen or not held_out:
        return None
    nats = NGram(seen, train_set.codec.vocab_size).nats(held_out)
    return Figure(float(nats.sum() / math.log(2) / _num_tokens(held_out)), _num_tokens(seen))


def _texts(dataset: TokenImageDataset, most_tokens: int) -> list[Text]:
    every = -(-dataset.num_tokens // most_tokens)
    return [(dataset.prompt_ids(i), dataset.ids(i)) for i in range(0, len(dataset), max(1, every))]


def _num_tokens(texts: list[Text]) -> int:
    return sum(len(ids) for _, ids in texts)
