"""The semantic palette: near colours for tokens of similar use, learned once from the training tokens.

Tokens become vectors by what stands left and right of them: positive pointwise mutual information, factorised by a
truncated SVD (Levy and Goldberg, "Neural word embedding as implicit matrix factorization", 2014). The colour cube is
then filled by splits: it is halved (`tokens.tree`), the tokens are sorted along the direction in which they differ
most, and each half of the cube takes its share of them; and so on in each half. What a noisy colour gives away
first, which half of the cube it is in, thus is the coarsest fact about a token's use.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch

from ds_tokimg.tokens.tree import Halves, halves_of_code

# The most frequent tokens count as neighbours; rarer ones say little and cost memory.
_NEIGHBOURS = 2000
_DIMENSIONS = 32
# Tokens read; more do not change which tokens are alike.
_MAX_TOKENS = 1 << 23
# Below this many tokens the direction of a split is the coordinate of largest variance, not an eigenvector.
_SMALL_PART = 64


def semantic_palette(pieces: Iterable[np.ndarray], vocab_size: int, radix: int, token_size: int = 1) -> np.ndarray:
    """Which code each token id gets: a permutation of range(vocab_size), int64 [V], for `TokenCodec(palette=...)`.

    Args:
        pieces: the training tokens in order, in arrays (`TokenImageDataset.token_stream()`).
        vocab_size, radix, token_size: of the codec.

    The same tokens give the same palette. Tokens that do not occur fill the codes that are left.
    """
    vectors = torch.zeros(vocab_size, 1)
    stream = _first(pieces, _MAX_TOKENS)
    counts = np.bincount(stream, minlength=vocab_size)
    if len(stream) > 1:
        vectors = _embed(_mutual_information(stream, counts), _DIMENSIONS)
    palette = np.empty(vocab_size, dtype=np.int64)
    halves = halves_of_code(vocab_size, radix, 3 * token_size**2)
    for tokens, codes in _split(vectors.numpy(), halves):
        palette[tokens] = codes
    return palette


def _first(pieces: Iterable[np.ndarray], limit: int) -> np.ndarray:
    """The first `limit` tokens, int64."""
    taken, total = [], 0
    for piece in pieces:
        taken.append(np.asarray(piece[: limit - total], dtype=np.int64))
        total += len(taken[-1])
        if total >= limit:
            break
    return np.concatenate(taken or [np.zeros(0, np.int64)])


def _mutual_information(stream: np.ndarray, counts: np.ndarray) -> torch.Tensor:
    """Positive PMI of tokens and their neighbours, sparse float32 [V, 2 * neighbours]: left ones, then right ones.

    PMI(token, neighbour) = log(n(token, neighbour) * N / (n(token) * n(neighbour))).
    """
    frequent = np.argsort(-counts, kind="stable")[:_NEIGHBOURS]
    column = np.full(len(counts), -1)
    column[frequent] = np.arange(len(frequent))
    left, right = stream[:-1], stream[1:]
    keys = np.concatenate(
        [
            _keys(right, column[left], 2 * len(frequent)),
            _keys(left, column[right] + len(frequent), 2 * len(frequent), len(frequent)),
        ]
    )
    keys, together = np.unique(keys, return_counts=True)
    rows, columns = np.divmod(keys, 2 * len(frequent))
    expected = counts[rows] * counts[frequent[columns % len(frequent)]] / len(stream)
    values = np.log(together / expected)
    positive = values > 0
    return torch.sparse_coo_tensor(
        torch.from_numpy(np.stack([rows, columns])[:, positive]),
        torch.from_numpy(values[positive].astype(np.float32)),
        (len(counts), 2 * len(frequent)),
        check_invariants=False,
    ).coalesce()


def _keys(rows: np.ndarray, columns: np.ndarray, width: int, lowest: int = 0) -> np.ndarray:
    """Cells of a matrix as one number each; cells left of column `lowest` are neighbours too rare to count."""
    keep = columns >= lowest
    return rows[keep] * width + columns[keep]


def _embed(matrix: torch.Tensor, dimensions: int) -> torch.Tensor:
    """Rows as vectors [V, dimensions]: left singular vectors scaled by the square roots of the singular values."""
    rank = min(dimensions, *matrix.shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the randomised SVD starts from a random matrix
        left, values, _ = torch.svd_lowrank(matrix, q=rank, niter=4)
    return left * values.sqrt()


def _split(vectors: np.ndarray, halves: Halves) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields (tokens, codes) pairs of equal length that say which token gets which code."""
    node_of = {ends: node for node, ends in enumerate(zip(halves.first.tolist(), halves.last.tolist(), strict=True))}
    parts = [(np.arange(len(vectors)), 0, len(vectors) - 1)]
    while parts:
        tokens, first, last = parts.pop()
        direction = _main_direction(vectors[tokens])
        if direction is None:
            yield tokens, np.sort(halves.order[first : last + 1])
            continue
        tokens = tokens[np.argsort(vectors[tokens] @ direction, kind="stable")]
        node = node_of[first, last]
        size = node + 1 - first
        parts += [(tokens[:size], first, node), (tokens[size:], node + 1, last)]


def _main_direction(points: np.ndarray) -> np.ndarray | None:
    """The direction [dimensions] in which points [n, dimensions] differ most, None where they do not differ."""
    centred = points - points.mean(0)
    variance = np.square(centred).sum(0)
    if len(points) < 2 or variance.max() <= 1e-12:
        return None
    if len(points) <= _SMALL_PART:
        return (np.arange(points.shape[1]) == variance.argmax()).astype(points.dtype)
    direction = np.linalg.eigh(centred.T @ centred)[1][:, -1]
    return direction * np.sign(direction[np.abs(direction).argmax()])
