"""The n-gram model against its formula written token by token, and as a distribution."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest

from ds_tokimg.training.ngram import NGram

NOTHING = np.zeros(0, int)


def texts_of(rng, count: int, vocab_size: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Random texts of 1 to 9 tokens whose next token depends on the last; some have a prompt."""
    texts = []
    for number in range(count):
        ids = [int(rng.integers(vocab_size))]
        while len(ids) < 12:
            ids.append((ids[-1] * 2 + int(rng.random() < 0.3)) % vocab_size)
        prompt = number % 3
        texts.append((np.array(ids[:prompt], int), np.array(ids[prompt : prompt + 1 + number % 9])))
    return texts


class Plain:
    """Kneser-Ney by its definition: dictionaries, a token at a time."""

    def __init__(self, texts, vocab_size: int, order: int):
        self.vocab_size, self.order = vocab_size, order
        grams = [set() for _ in range(order + 1)]
        self.counts = [Counter() for _ in range(order + 1)]
        for given, ids in texts:
            line = [vocab_size] * (order - 1) + [*given, *ids]
            for place in range(order - 1 + len(given), len(line)):
                for length in range(1, order + 1):
                    grams[length].add(tuple(line[place + 1 - length : place + 1]))
                self.counts[order][tuple(line[place + 1 - order : place + 1])] += 1
        for length in range(1, order):
            self.counts[length] = Counter(gram[1:] for gram in grams[length + 1])

    def probability(self, history: tuple, token: int, length: int | None = None) -> float:
        length = self.order if length is None else length
        if length == 0:
            return 1 / self.vocab_size
        counts, context = self.counts[length], history[len(history) - length + 1 :]
        of_context = [count for gram, count in counts.items() if gram[:-1] == context]
        shorter = self.probability(history, token, length - 1)
        if not of_context:
            return shorter
        once, twice = (sum(count == n for count in counts.values()) for n in (1, 2))
        discount = once / (once + 2 * twice) if once and twice else 0.5
        kept = max(counts[(*context, token)] - discount, 0)
        return (kept + discount * len(of_context) * shorter) / sum(of_context)

    def nats(self, given, ids) -> float:
        line = [self.vocab_size] * (self.order - 1) + [*given, *ids]
        start = self.order - 1 + len(given)
        history = [tuple(line[place + 1 - self.order : place]) for place in range(start, len(line))]
        return -sum(math.log(self.probability(h, token)) for h, token in zip(history, line[start:], strict=True))


@pytest.mark.parametrize("order", [2, 3, 4])
def test_is_kneser_and_neys_formula(order):
    rng = np.random.default_rng(order)
    seen, new = texts_of(rng, 40, 7), texts_of(rng, 20, 7)
    model, plain = NGram(seen, 7, order), Plain(seen, 7, order)
    expected = [plain.nats(given.tolist(), ids.tolist()) for given, ids in new]
    np.testing.assert_allclose(model.nats(new), expected, rtol=1e-12)


def test_is_a_distribution():
    model = NGram(texts_of(np.random.default_rng(0), 30, 5), 5)
    for given in ((), (1,), (4, 4, 4), (0, 1, 2, 3)):
        texts = [(np.array(given, int), np.array(pair)) for pair in itertools.product(range(5), repeat=2)]
        assert np.exp(-model.nats(texts)).sum() == pytest.approx(1, abs=1e-12)


def test_tokens_that_never_occurred_cost_something_finite():
    model = NGram([(NOTHING, np.array([1, 2, 1, 2]))], 1000)
    assert np.isfinite(model.nats([(NOTHING, np.array([999, 0, 1]))])).all()


def test_approaches_the_entropy_of_a_source():
    rng = np.random.default_rng(1)
    flips = rng.random(60_000) < 0.1
    source = np.cumsum(flips) % 2  # changes with a probability of a tenth
    texts = [(NOTHING, source[i : i + 100]) for i in range(0, len(source), 100)]
    nats = NGram(texts[:500], 2).nats(texts[500:])
    entropy = -(0.1 * math.log(0.1) + 0.9 * math.log(0.9))
    assert nats.sum() / (100 * 100) == pytest.approx(entropy, rel=0.05)
