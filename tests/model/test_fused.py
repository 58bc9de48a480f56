"""Gradients written by hand against finite differences, and against autograd of the plain formulas."""

import pytest
import torch
import torch.nn.functional as F

from ds_tokimg.model.kernels.fused import around, gated_silu, rms_norm, rotate


def draw(*shape: int, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype)


def angles(count: int, half: int, dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    turned = draw(1, 1, count, half, dtype=dtype)
    return turned.cos(), turned.sin()


def heads(x: torch.Tensor) -> torch.Tensor:
    """[B, N, H, d] as attention sees it: [B, H, N, d], not contiguous."""
    return x.transpose(1, 2)


CASES = {
    "norm": (lambda x, weight: rms_norm(x, weight, 1e-6), lambda: (draw(2, 3, 8), draw(8))),
    "norm of heads": (lambda x, weight: rms_norm(heads(x), weight, 1e-6), lambda: (draw(2, 3, 4, 6), draw(6))),
    "gated silu": (gated_silu, lambda: (draw(2, 3, 8),)),
    "rotation": (lambda x: rotate(heads(x), *angles(3, 4)), lambda: (draw(2, 3, 2, 8),)),
}


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_finite_differences(name):
    function, inputs = CASES[name]
    assert torch.autograd.gradcheck(function, [value.requires_grad_() for value in inputs()])


def plain_gated_silu(gate_up):
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def plain_rotate(x, cos, sin):
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("ours", "plain", "shapes"),
    [
        (lambda x, w: rms_norm(x, w, 1e-6), lambda x, w: F.rms_norm(x, w.shape, w, 1e-6), [(4, 50, 64), (64,)]),
        (gated_silu, plain_gated_silu, [(4, 50, 64)]),
        (
            lambda x: rotate(x, *angles(50, 8, x.dtype)),
            lambda x: plain_rotate(x, *angles(50, 8, x.dtype)),
            [(4, 2, 50, 16)],
        ),
    ],
    ids=["norm", "gated silu", "rotation"],
)
def test_values_and_gradients_are_those_of_the_plain_formulas(ours, plain, shapes, dtype):
    results = []
    for function in (ours, plain):
        inputs = [draw(*shape, dtype=dtype).requires_grad_() for shape in shapes]
        output = function(*inputs)
        output.backward(draw(*output.shape, dtype=dtype))
        assert output.dtype == dtype
        results.append([output.detach(), *(value.grad for value in inputs)])
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for mine, reference in zip(*results, strict=True):
        torch.testing.assert_close(mine, reference, rtol=tolerance, atol=tolerance * float(reference.abs().max()))


def test_a_norm_of_zeros_is_zeros_and_its_gradient_is_finite():
    x = torch.zeros(2, 8, requires_grad=True)
    result = rms_norm(x, torch.ones(8), 1e-6)
    result.sum().backward()
    assert not result.any() and torch.isfinite(x.grad).all()


@pytest.mark.parametrize(
    ("function", "inputs", "kept"),
    [
        (gated_silu, lambda: (draw(16, 64),), 16 * 64),
        (lambda x, w: rms_norm(x, w, 1e-6), lambda: (draw(16, 64), draw(64)), 16 * 64 + 64 + 16),
        (lambda x: rotate(x, *angles(3, 4)), lambda: (draw(2, 2, 3, 8),), 2 * 3 * 4),
    ],
    ids=["gated silu", "norm", "rotation"],
)
def test_no_more_is_kept_than_the_backward_pass_reads(function, inputs, kept):
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda value: seen.append(value.numel()) or value, lambda value: value
    ):
        function(*(value.requires_grad_() for value in inputs()))
    assert sum(seen) == kept


# ---- the tokens around a token ----

DISTANCES = [-2, -1, 1, 2]


def surroundings(before: int, versions: bool, gaps: bool, length: int = 7):
    """Arguments of `around` for two texts."""
    coin = torch.Generator().manual_seed(0)
    tokens, clean = draw(2, before + length, 3), draw(2, before + length, 3) + 10 if versions else None
    without_noise = torch.rand(len(DISTANCES), 2, length, generator=coin) < 0.5 if versions else None
    silent = torch.rand(len(DISTANCES), length, generator=coin) < 0.3 if gaps else None
    return tokens, clean, without_noise, silent, DISTANCES, length


@pytest.mark.parametrize("wanted", [slice(None), slice(3, None, 4), slice(6, None, 16)])
@pytest.mark.parametrize(("before", "versions", "gaps"), [(0, False, False), (0, True, True), (2, True, False)])
def test_tokens_around_are_picked_one_by_one(before, versions, gaps, wanted):
    tokens, clean, without_noise, silent, _, length = case = surroundings(before, versions, gaps)
    result = around(*case, wanted).unflatten(-1, (len(DISTANCES), 3))
    for row in range(2):
        for column, place in enumerate(range(length)[wanted]):
            for index, distance in enumerate(DISTANCES):
                source = before + place + distance
                expected = torch.zeros(3, dtype=tokens.dtype)
                if 0 <= source < before + length and not (gaps and silent[index, place]):
                    version = clean if versions and without_noise[index, row, place] else tokens
                    expected = version[row, source]
                assert torch.equal(result[row, column, index], expected)


@pytest.mark.parametrize("wanted", [slice(None), slice(1, None, 4)])
@pytest.mark.parametrize(("before", "versions", "gaps"), [(0, False, True), (0, True, True), (2, True, False)])
def test_tokens_around_have_the_gradients_of_finite_differences(before, versions, gaps, wanted):
    tokens, clean, *rest = surroundings(before, versions, gaps)
    inputs = [value.requires_grad_() for value in (tokens, clean) if value is not None]
    assert torch.autograd.gradcheck(lambda *values: around(*values, *[None] * (2 - len(values)), *rest, wanted), inputs)


def test_texts_shorter_than_the_reach():
    assert around(draw(1, 1, 3), None, None, None, DISTANCES, 1).tolist() == [[[0.0] * 12]]
