import numpy as np
import pytest
import torch
from torch.distributions import Categorical, Normal

from ds_tokimg.model.heads.base import cross_entropy
from ds_tokimg.model.heads.digits import DigitHead
from ds_tokimg.model.heads.linear import LinearHead
from ds_tokimg.model.heads.tokens import TokenHead
from ds_tokimg.tokens.codec import TokenCodec

CODES = [TokenCodec(300), TokenCodec(30, token_size=2), TokenCodec(64, radix=256)]
ALPHA_SIGMA = torch.tensor([[0.999, 0.001], [0.95, 0.05], [0.5, 0.5], [0.02, 0.98]])


def noisy_patches(codec, slots, seed=0):
    """Clean ids [4, 3, K] and their noisy patches [4, 3, P] at the four levels of ALPHA_SIGMA."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(codec.vocab_size, (4, 3, slots), generator=generator)
    clean = codec.codebook[ids].flatten(2)
    alpha, sigma = ALPHA_SIGMA[:, :1, None], ALPHA_SIGMA[:, 1:, None]
    return ids, alpha * clean + sigma * torch.randn(clean.shape, generator=generator)


def normalised(log_likelihood):
    return log_likelihood.double().log_softmax(-1)


@pytest.mark.parametrize("codec", CODES, ids=repr)
def test_digit_likelihood_is_gaussian(codec):
    _, noisy = noisy_patches(codec, slots=2)
    result = DigitHead(codec, 2, 8).log_likelihood(noisy, ALPHA_SIGMA[:, :1], ALPHA_SIGMA[:, 1:])
    assert result.shape == (4, 3, 2, codec.digits_per_token, codec.radix) and result.dtype == torch.float32
    z = noisy.double().view(4, 3, 2, -1, 1)
    alpha, sigma = (ALPHA_SIGMA[:, i].double().view(4, 1, 1, 1, 1) for i in (0, 1))
    levels = torch.linspace(-1, 1, codec.radix, dtype=torch.float64)
    expected = Normal(alpha * levels, sigma).log_prob(z).log_softmax(-1)
    torch.testing.assert_close(normalised(result), expected, rtol=1e-4, atol=2e-3)


@pytest.mark.parametrize("codec", CODES, ids=repr)
def test_token_likelihood_is_the_product_of_its_digits(codec):
    _, noisy = noisy_patches(codec, slots=2)
    tokens = TokenHead(codec, 2, 8).log_likelihood(noisy, ALPHA_SIGMA[:, :1], ALPHA_SIGMA[:, 1:])
    assert tokens.shape == (4, 3, 2, codec.vocab_size) and tokens.dtype == torch.float32
    z = noisy.double().view(4, 3, 2, 1, -1)
    alpha, sigma = (ALPHA_SIGMA[:, i].double().view(4, 1, 1, 1, 1) for i in (0, 1))
    expected = Normal(alpha * codec.codebook.double(), sigma).log_prob(z).sum(-1).log_softmax(-1)
    # The expanded square cancels: 1e-7 of values of size 1 / sigma^2.
    for row, (_, spread) in enumerate(ALPHA_SIGMA.tolist()):
        error = (normalised(tokens[row]).exp() - expected[row].exp()).abs().max()
        assert error < 1e-5 + 1e-6 / spread**2, (row, error)


@pytest.mark.parametrize("head_type", [DigitHead, TokenHead])
def test_clean_patches_have_finite_and_certain_posteriors(head_type):
    """At t = 0 the noise is floored, so that prompts and known patches go through the same code."""
    for codec in (TokenCodec(151_643 if head_type is DigitHead else 3000), TokenCodec(2000, radix=256)):
        head, ids = head_type(codec, 1, 4), torch.arange(0, codec.vocab_size, 997).view(1, -1, 1)
        clean = codec.codebook[ids].flatten(2)
        result = head.log_likelihood(clean, torch.ones(1, 1), torch.zeros(1, 1))
        assert torch.isfinite(result).all()
        best = result.argmax(-1)
        assert torch.equal(best, ids if head_type is TokenHead else codec.digit_table[ids].long())
        assert result.softmax(-1).max(-1).values.min() > 1 - 1e-6
        torch.testing.assert_close(head.clean(result), clean, atol=1e-6, rtol=0)


@pytest.mark.parametrize("head_type", [DigitHead, TokenHead])
def test_clean_is_the_mean_of_the_posterior(head_type):
    codec = TokenCodec(300, palette=np.random.default_rng(0).permutation(300))
    head = head_type(codec, 2, 8)
    shape = (1, 3, 2, 300) if head_type is TokenHead else (1, 3, 2, 3, codec.radix)
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3
    result = head.clean(logits)
    shares = logits.double().exp() / logits.double().exp().sum(-1, keepdim=True)
    values = codec.codebook.double() if head_type is TokenHead else codec.levels.double()[:, None]
    expected = (shares[..., None] * values).sum(-2).reshape(1, 3, 6)
    torch.testing.assert_close(result.double(), expected, atol=1e-6, rtol=0)
    chosen = logits.argmax(-1)
    expected = (codec.codebook if head_type is TokenHead else codec.levels)[chosen].reshape(1, 3, 6)
    torch.testing.assert_close(head.colours(chosen), expected, atol=1e-6, rtol=0)


def test_cross_entropy():
    codec, generator = TokenCodec(300), torch.Generator().manual_seed(0)
    ids = torch.randint(300, (2, 3, 4), generator=generator)
    tokens = torch.randn(2, 3, 4, 300, generator=generator)
    torch.testing.assert_close(cross_entropy(tokens, ids, codec.digit_table), -Categorical(logits=tokens).log_prob(ids))
    digits = torch.randn(2, 3, 4, 3, 7, generator=generator)
    expected = torch.zeros(2, 3, 4)
    for k in range(3):
        expected -= Categorical(logits=digits[..., k, :]).log_prob(ids // 7**k % 7)
    torch.testing.assert_close(cross_entropy(digits, ids, codec.digit_table), expected)


@pytest.mark.parametrize("head_type", [DigitHead, TokenHead, LinearHead])
def test_untrained_heads_are_silent(head_type):
    """What the network adds is 0 at first, whatever it computes."""
    codec = TokenCodec(300)
    output = head_type(codec, 4, 8)(torch.randn(2, 5, 8))
    assert output.dtype == torch.float32 and not output.any()


@pytest.mark.parametrize("head_type", [DigitHead, TokenHead])
def test_autocast_changes_nothing(head_type):
    """Likelihoods and means are computed in float32 whatever the engine's precision."""
    codec = TokenCodec(300)
    head = head_type(codec, 2, 8)
    _, noisy = noisy_patches(codec, slots=2)

    def likelihood_and_mean():
        likelihood = head.log_likelihood(noisy, ALPHA_SIGMA[:, :1], ALPHA_SIGMA[:, 1:])
        return likelihood, head.clean(likelihood)

    plain = likelihood_and_mean()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = likelihood_and_mean()
    assert all(torch.equal(a, b) and b.dtype == torch.float32 for a, b in zip(plain, mixed, strict=True))
