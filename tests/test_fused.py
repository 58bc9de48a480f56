"""Gradients written by hand against finite differences, and against autograd of the plain formulas."""

import pytest
import torch
import torch.nn.functional as F

from ds_tokimg.fused import gated_silu, rms_norm, rotate


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
