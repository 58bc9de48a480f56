"""The tree of colours, and the head that walks down it."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ds_tokimg.diffusion.path import alpha_sigma
from ds_tokimg.model.heads.tree import TreeHead
from ds_tokimg.tokens.codec import TokenCodec
from ds_tokimg.tokens.palette import semantic_palette
from ds_tokimg.tokens.tree import halve, halves_of_code

CODES = [TokenCodec(300), TokenCodec(1024, token_size=2), TokenCodec(3000, token_size=2), TokenCodec(70, radix=256)]


def tree_of(codec: TokenCodec):
    return halve(codec.digit_table.numpy())


@pytest.mark.parametrize("codec", CODES, ids=repr)
def test_every_node_parts_its_colours_by_one_digit(codec):
    tree, digits = tree_of(codec), codec.digit_table.numpy()
    assert np.array_equal(np.sort(tree.order), np.arange(codec.vocab_size))
    for node in range(codec.vocab_size - 1):
        lower = digits[tree.order[tree.first[node] : node + 1], tree.side[node]]
        upper = digits[tree.order[node + 1 : tree.last[node] + 1], tree.side[node]]
        assert (lower.min(), lower.max()) == (tree.least[node], tree.below[node])
        assert (upper.min(), upper.max()) == (tree.above[node], tree.most[node])
        assert tree.below[node] < tree.above[node]


@pytest.mark.parametrize("codec", CODES, ids=repr)
def test_the_way_to_a_colour(codec):
    """From the root on, each node holds the colour, and the last one parts it from all others."""
    tree = tree_of(codec)
    place = np.argsort(tree.order)
    for colour, way in enumerate(tree.way):
        nodes = way[way >= 0]
        assert (way[len(nodes) :] == -1).all()
        first, last = 0, codec.vocab_size - 1
        for node in nodes:
            assert (tree.first[node], tree.last[node]) == (first, last)
            first, last = (node + 1, last) if place[colour] > node else (first, node)
        assert first == last == place[colour]


@pytest.mark.parametrize("codec", CODES, ids=repr)
def test_the_tree_of_a_code_needs_no_codec(codec):
    tree = halves_of_code(codec.vocab_size, codec.radix, codec.digits_per_token)
    assert np.array_equal(tree.way, tree_of(codec).way) and np.array_equal(tree.order, tree_of(codec).order)


def test_a_full_cube_is_halved_evenly():
    assert tree_of(TokenCodec(4096, token_size=2)).way.shape == (4096, 12)
    assert (tree_of(TokenCodec(4096, token_size=2)).way >= 0).all()


def test_sides_are_columns_of_the_digits_also_behind_one_that_never_varies():
    tree = halve(np.array([[5, 0, 1], [5, 1, 0], [5, 0, 0]]))
    assert set(tree.side.tolist()) == {1, 2}


@pytest.mark.parametrize("count", [1, 2])
def test_the_smallest_trees(count):
    tree = tree_of(TokenCodec(count))
    assert tree.way.shape == (count, count - 1) and tree.order.tolist() == list(range(count))


def test_the_palette_fills_the_halves_of_the_tree():
    """Two kinds of tokens that take turns: the first choice on the way to a token is its kind."""
    rng = np.random.default_rng(0)
    stream = np.stack([rng.integers(0, 32, 4000), rng.integers(32, 64, 4000)], 1).ravel()
    codec = TokenCodec(64, palette=semantic_palette([stream], 64, 4))
    tree = tree_of(codec)
    upper = np.argsort(tree.order) > tree.way[:, 0]
    assert len(set(upper[:32])) == len(set(upper[32:])) == 1 and upper[0] != upper[32]


# ---- the head ----


def head_and_noisy(codec, t: float, slots: int = 2, width: int = 16):
    """A head with random weights, what it was told, and the evidence of noisy tokens [2, 3, slots]."""
    torch.manual_seed(0)
    head = TreeHead(codec, slots, width)
    torch.nn.init.normal_(head.token_output.weight)
    torch.nn.init.normal_(head.token_output.bias)
    ids = torch.randint(codec.vocab_size, (2, 3, slots))
    alpha, sigma = alpha_sigma(torch.full((2, 1), t))
    clean = codec.codebook[ids].flatten(2)
    noisy = alpha[..., None] * clean + sigma[..., None] * torch.randn(clean.shape)
    return head, head(torch.randn(2, 3, width)), head.evidence(noisy, alpha, sigma), ids


@pytest.mark.parametrize("t", [0.0, 200.0, 600.0, 999.0])
@pytest.mark.parametrize("codec", CODES, ids=repr)
def test_the_tree_is_a_distribution_over_tokens(codec, t):
    head, output, evidence, ids = head_and_noisy(codec, t)
    logits = head.logits(output, evidence)
    assert logits.shape == (2, 3, 2, codec.vocab_size) and logits.dtype == torch.float32
    torch.testing.assert_close(logits.logsumexp(-1), torch.zeros(2, 3, 2), atol=1e-5, rtol=0)
    if t == 0:
        assert torch.equal(logits.argmax(-1), ids)


@pytest.mark.parametrize("codec", CODES, ids=repr)
def test_the_loss_is_that_of_the_whole_distribution(codec):
    """Though only the way to the token is computed; gradients too."""
    head, output, evidence, ids = head_and_noisy(codec, 900.0)
    mask = torch.rand(2, 3, 2) < 0.7
    total, losses = head.loss_sum(output, evidence, ids, mask)
    expected = F.cross_entropy(head.logits(output, evidence).flatten(0, 2), ids.flatten(), reduction="none")
    expected = expected.view(ids.shape) * mask
    torch.testing.assert_close(losses, expected.detach(), atol=1e-4, rtol=1e-4)
    parameters = [*head.token_output.parameters(), *head.to_tokens.parameters()]
    own, theirs = (torch.autograd.grad(x, parameters, retain_graph=True) for x in (total, expected.sum()))
    for a, b in zip(own, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)


def test_at_a_node_speaks_the_matched_filter():
    """Without a network, two colours: their likelihood ratio, exactly."""
    codec = TokenCodec(2)
    head = TreeHead(codec, 1, 8)
    z = torch.tensor([[[0.3, 0.9, -0.2]]])
    alpha, sigma = torch.tensor([[0.6]]), torch.tensor([[0.4]])
    logits = head.logits(head(torch.randn(1, 1, 8)), head.evidence(z, alpha, sigma))
    expected = head.log_likelihood(z, alpha, sigma).log_softmax(-1)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_walking_finds_what_is_likely():
    """The likelier half at every node; without much noise that is the likeliest token."""
    codec = TokenCodec(3000, token_size=2)
    head, output, evidence, _ = head_and_noisy(codec, 100.0)
    assert torch.equal(head.walk(output, evidence), head.logits(output, evidence).argmax(-1))
    head, output, evidence, _ = head_and_noisy(codec, 999.0)
    chosen, expected = head.walk(output, evidence), []
    probabilities = head.logits(output, evidence).exp().flatten(0, 2).detach().numpy()
    tree = tree_of(codec)
    for row in probabilities:
        shares, first, last = row[tree.order], 0, codec.vocab_size - 1
        while first < last:
            node = next(n for n in range(first, last) if (tree.first[n], tree.last[n]) == (first, last))
            goes_up = shares[node + 1 : last + 1].sum() > shares[first : node + 1].sum()
            first, last = (node + 1, last) if goes_up else (first, node)
        expected.append(tree.order[first])
    assert chosen.flatten().tolist() == expected


def test_features_tell_the_token_as_far_as_it_can_be_read():
    codec = TokenCodec(300)
    head, _, evidence, ids = head_and_noisy(codec, 0.0)
    features = head.features_of(evidence)
    digits = F.one_hot(codec.digit_table[ids].long(), codec.radix).flatten(-2).float()
    torch.testing.assert_close(features, torch.cat([digits, head.token_input(ids)], -1), atol=1e-5, rtol=1e-5)
    _, _, evidence, _ = head_and_noisy(codec, 999.0)
    digits, token = head.features_of(evidence).split([3 * codec.radix, 16], -1)
    torch.testing.assert_close(digits, torch.full_like(digits, 1 / codec.radix), atol=0.01, rtol=0)
    assert token.abs().max() < 0.02


def test_certain_tokens_are_embedded_as_clean_ones():
    codec = TokenCodec(300)
    head, _, evidence, ids = head_and_noisy(codec, 0.0)
    torch.testing.assert_close(head.embed_ids(ids), head.features_of(evidence), atol=1e-5, rtol=1e-5)
