"""The piecewise layers against the same computed whole, through autograd."""

import pytest
import torch
import torch.nn.functional as F

from ds_tokimg.model.kernels import posterior
from ds_tokimg.model.kernels.posterior import TokenInput, TokenOutput

VOCABULARY, WIDTH, ROWS = 50, 8, (3, 5, 7)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """105 tokens in pieces of 32, the last one short."""
    monkeypatch.setattr(posterior, "_PIECE_ON_CPU", 1)


def example(scale=30.0, seed=0):
    """evidence [.., 4], book [V, 4], tokens [.., W], ids, mask; log-likelihoods of up to a few times `scale`."""
    generator = torch.Generator().manual_seed(seed)
    evidence = torch.randn(*ROWS, 4, generator=generator) * scale
    book, tokens = torch.randn(VOCABULARY, 4, generator=generator), torch.randn(*ROWS, WIDTH, generator=generator)
    ids = torch.randint(VOCABULARY, ROWS, generator=generator)
    return evidence, book, tokens.requires_grad_(), ids, torch.rand(ROWS, generator=generator) < 0.7


def gradients(value, *inputs):
    return torch.autograd.grad(value, inputs)


@pytest.mark.parametrize("scale", [0.1, 1000.0])
def test_cross_entropy_and_its_gradients(scale):
    evidence, book, tokens, ids, mask = example(scale)
    layer = TokenOutput(WIDTH, VOCABULARY)
    parameters = (tokens, layer.weight, layer.bias)
    loss, each = layer(tokens, (evidence, book, ids, mask))
    logits = (layer(tokens) + evidence @ book.T).double()
    losses = F.cross_entropy(logits.flatten(0, 2), ids.flatten(), reduction="none").view(ROWS) * mask
    expected = losses.sum()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(each.double(), losses.detach(), rtol=1e-5, atol=max(1e-5, 1e-6 * scale))
    assert not each.requires_grad
    # The factor stands for all that happens to the loss after it: the engine's scale, say.
    pairs = zip(gradients(loss * 0.3, *parameters), gradients(expected * 0.3, *parameters), strict=True)
    for found, right in pairs:
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)


def test_embedding_of_evidence():
    evidence, book, *_ = example()
    layer = TokenInput(VOCABULARY, WIDTH, bias=False)
    found, expected = layer(evidence, book), F.linear((evidence @ book.T).softmax(-1), layer.weight)
    torch.testing.assert_close(found, expected)
    factor = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    (gradient,), (right,) = (gradients((value * factor).sum(), layer.weight) for value in (found, expected))
    torch.testing.assert_close(gradient, right)


def test_nothing_valid_gives_zero_and_finite_gradients():
    evidence, book, tokens, ids, mask = example(1e6)
    layer = TokenOutput(WIDTH, VOCABULARY)
    loss, _ = layer(tokens, (evidence, book, ids, mask & False))
    assert loss == 0
    assert not any(gradient.any() for gradient in gradients(loss, tokens, layer.weight, layer.bias))


def test_without_gradients_the_loss_is_the_same():
    evidence, book, tokens, ids, mask = example()
    layer = TokenOutput(WIDTH, VOCABULARY)
    with torch.no_grad():
        value, _ = layer(tokens, (evidence, book, ids, mask))
    assert not value.requires_grad and torch.equal(value, layer(tokens, (evidence, book, ids, mask))[0])


@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision_rounds_the_context_only(autocast):
    """Products with the weights in bfloat16, evidence and softmax in float32, gradients as the parameters."""
    evidence, book, tokens, ids, mask = example(1000.0)
    inputs, outputs = TokenInput(VOCABULARY, WIDTH, bias=False), TokenOutput(WIDTH, VOCABULARY)
    exact = outputs(tokens, (evidence, book, ids, mask))[0], inputs(evidence, book)
    if not autocast:
        inputs, outputs, tokens = inputs.bfloat16(), outputs.bfloat16(), tokens.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss, features = outputs(tokens, (evidence, book, ids, mask))[0], inputs(evidence, book)
    assert loss.dtype == torch.float32 and features.dtype == torch.bfloat16
    torch.testing.assert_close(loss, exact[0], rtol=0.01, atol=0)
    torch.testing.assert_close(features.float(), exact[1], rtol=0, atol=0.02)
    (loss + features.float().sum()).backward()
    for parameter in (tokens, inputs.weight, outputs.weight, outputs.bias):
        assert parameter.grad.dtype == parameter.dtype and torch.isfinite(parameter.grad).all()
