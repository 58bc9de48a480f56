"""Attention, blocks and what tokens hear of each other, against formulas."""

import pytest
import torch
from torch import Tensor, nn

from ds_tokimg.model.kernels.fused import rotate
from ds_tokimg.model.layers import LocalWindow, Past, TokenMLP
from ds_tokimg.tokens.codec import TokenCodec
from tests.support.tiny import tiny_model

CODEC = TokenCodec(50)  # radix 4


def test_a_token_hears_those_next_to_it():
    """One by one: its own block as it is, earlier ones without noise, later ones not at all."""
    local_window = LocalWindow(reach=2, features=3, outputs=5)
    nn.init.normal_(local_window.output.weight)
    tokens, clean, before = torch.randn(2, 7, 3), torch.randn(2, 7, 3), torch.randn(2, 2, 3)
    blocks = torch.tensor([0, 0, 1, 1, 1, 1, 2])

    def expected(heard) -> Tensor:
        rows = [torch.cat([heard(i, i + d) for d in (-2, -1, 1, 2)], -1) for i in range(7)]
        return local_window.output(torch.stack(rows, 1))

    silence = torch.zeros(2, 3)
    torch.testing.assert_close(local_window(tokens), expected(lambda i, j: tokens[:, j] if 0 <= j < 7 else silence))
    torch.testing.assert_close(
        local_window(tokens, before),
        expected(lambda i, j: before[:, j] if j < 0 else tokens[:, j] if j < 7 else silence),
    )

    def in_blocks(i: int, j: int) -> Tensor:
        if not 0 <= j < 7 or blocks[j] > blocks[i]:
            return silence
        return (tokens if blocks[j] == blocks[i] else clean)[:, j]

    torch.testing.assert_close(local_window(tokens, context=(clean, blocks)), expected(in_blocks))


def test_the_mlp_of_a_token_hears_that_token_alone():
    """Nothing at first; then what an output adds depends on the token's own features, and on no other token."""
    mlp = TokenMLP(features=3, outputs=6, slots=4)
    outputs, tokens = torch.randn(2, 5, 6), torch.randn(2, 5, 3)
    assert torch.equal(mlp(outputs, tokens), outputs)
    nn.init.normal_(mlp.mlp.down.weight)
    same, other = mlp(outputs, tokens) - outputs, mlp(outputs, tokens + torch.eye(5)[:, :1]) - outputs
    assert ((same != other).any(-1) == (torch.arange(5) == 0)).all()


@pytest.mark.parametrize(("slots", "hidden"), [(1, 256), (4, 256), (16, 64), (64, 64)])
def test_many_tokens_of_a_patch_share_the_units_of_their_mlps(slots, hidden):
    assert TokenMLP(192, 192, slots).mlp.down.in_features == hidden


@pytest.mark.parametrize("before", [None, torch.randn(1, 3, 4)])
def test_the_last_tokens_are_those_that_the_next_ones_hear(before):
    """However few come at a time."""
    tokens = torch.arange(20.0).view(1, 5, 4)
    local_window = LocalWindow(reach=3, features=4, outputs=2)
    together = local_window.last(tokens, before)
    one_by_one = before
    for i in range(5):
        one_by_one = local_window.last(tokens[:, i : i + 1], one_by_one)
    assert torch.equal(one_by_one, together) and torch.equal(together, tokens[:, 2:])


def test_rotation_makes_scores_relative():
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 6, 16, generator=generator, dtype=torch.float64)
    places, rates = torch.arange(6).double(), 10_000.0 ** (-torch.arange(8).double() / 8)

    def scores(offset):
        angles = (places + offset)[:, None] * rates
        turned_q, turned_k = rotate(q, angles.cos(), angles.sin()), rotate(k, angles.cos(), angles.sin())
        torch.testing.assert_close(turned_q.norm(dim=-1), q.norm(dim=-1))
        return turned_q @ turned_k.transpose(-1, -2)

    torch.testing.assert_close(scores(0.0), scores(37.0))
    # The pair (0, 1) of the formula, by complex multiplication.
    turned = torch.view_as_complex(torch.stack(q.chunk(2, -1), -1)) * torch.exp(1j * places[:, None] * rates)
    mine = rotate(q, (places[:, None] * rates).cos(), (places[:, None] * rates).sin())
    torch.testing.assert_close(torch.view_as_complex(torch.stack(mine.chunk(2, -1), -1)), turned)


def test_attention_is_the_formula():
    torch.manual_seed(0)
    attention = tiny_model(CODEC).layers[0].attention.double()
    x, rates = torch.randn(2, 5, 32).double(), torch.rand(1, 1, 5, 8).double()
    visible = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
    result = attention(x, (rates.cos(), rates.sin()), visible[:, None, None])

    def normalised(v, weight):
        return v / (v.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    q, k, v = (x @ attention.qkv.weight.T).view(2, 5, 3, 2, 16).unbind(2)
    q, k = (rotate(normalised(a, n.weight).transpose(1, 2), rates.cos(), rates.sin())
            for a, n in ((q, attention.q_norm), (k, attention.k_norm)))  # fmt: skip
    scores = q @ k.transpose(-1, -2) / 16**0.5
    scores = scores.masked_fill(~visible[:, None, None], -torch.inf).softmax(-1)
    expected = (scores @ v.transpose(1, 2)).transpose(1, 2).reshape(2, 5, 32)
    expected = expected @ attention.out.weight.T + attention.out.bias
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("per_position", [False, True])
def test_a_layer_asked_for_its_last_positions_gives_just_these(per_position):
    layer = tiny_model(CODEC).layers[0].double()
    x, time = torch.randn(2, 5, 32).double(), torch.randn(2, 5 if per_position else 1, 192).double()
    visible = torch.ones(2, 1, 5 if per_position else 1, 5, dtype=torch.bool).tril()
    rotation = tuple(torch.randn(2, 1, 5, 8).double() for _ in range(2))
    torch.testing.assert_close(layer(x, time, rotation, visible, wanted=2), layer(x, time, rotation, visible)[:, -2:])


def test_gradients_of_a_layer():
    layer = tiny_model(CODEC).layers[0].double()
    generator = torch.Generator().manual_seed(0)
    x, time, angles = (torch.randn(shape, generator=generator).double() for shape in ((1, 3, 32), (1, 3, 192), (3, 8)))
    visible = torch.tensor([True, True, False])[None, None, None]
    rotation = (angles.cos(), angles.sin())
    inputs = (x.requires_grad_(), time.requires_grad_())
    assert torch.autograd.gradcheck(lambda a, b: layer(a, b, rotation, visible), inputs, fast_mode=True)


def test_past_holds_what_was_added_whatever_one_pass_adds():
    parts = torch.randn(9, 3, 2, 3, 4)  # each [B, heads, n, d], three texts
    past, so_far = Past(), []
    for part in parts:
        once = past.for_one_pass()
        keys, values = once.add(part + 1, part + 2)
        assert torch.equal(keys, torch.cat([*so_far, part + 1], 2))
        so_far.append(part)
        keys, values = past.add(part, -part)
        assert torch.equal(keys, torch.cat(so_far, 2)) and torch.equal(values, -keys)
    chosen = torch.tensor([True, False, True])
    keys, _ = past.select(chosen).add(parts[0][chosen], parts[0][chosen])
    assert torch.equal(keys, torch.cat([*so_far, parts[0]], 2)[chosen]) and past.length == 27
