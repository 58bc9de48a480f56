"""The models that ours is compared with: what they cost is what they say."""

import functools
import math

import pytest
import torch
from torch import nn

from benchmarks.references import Autoregressive, MaskedDiffusion, TokenTransformer
from ds_tokimg.model.layers import Past

SHAPE = (2, 32, 2)
IDS = torch.randint(20, (3, 12), generator=torch.Generator().manual_seed(0))
MASK = torch.arange(12) < torch.tensor([[12], [12], [5]])


def trained(kind):
    torch.manual_seed(0)
    model = kind(20, 0, SHAPE)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.mark.parametrize("kind", [Autoregressive, MaskedDiffusion])
def test_an_untrained_model_pays_for_every_token(kind):
    nats = kind(20, 0, SHAPE).bound_nats(IDS, MASK, 400)
    torch.testing.assert_close(nats, MASK.sum(1).double() * math.log(20), rtol=0.08, atol=0)


SHIFTED = functools.partial(Autoregressive, shift=True)


@pytest.mark.parametrize("kind", [Autoregressive, SHIFTED])
def test_the_next_token_does_not_see_what_follows(kind):
    model = trained(kind)
    nats, changed = (model.token_nats(ids, MASK) for ids in (IDS, torch.cat([IDS[:, :6], IDS[:, 6:].flip(1)], 1)))
    assert torch.equal(nats[:, :6], changed[:, :6]) and not torch.equal(nats[:, 7:], changed[:, 7:])
    assert not nats[~MASK].any()


@pytest.mark.parametrize("kind", [Autoregressive, SHIFTED])
def test_the_chain_rule_holds_over_all_texts(kind):
    """The probabilities of all texts of two tokens sum to one."""
    model = trained(kind)
    texts = torch.cartesian_prod(torch.arange(20), torch.arange(20))
    nats = model.bound_nats(texts, torch.ones_like(texts, dtype=torch.bool), 1)
    assert float((-nats).exp().sum()) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("shift", [(), (-1, 1)])
def test_tokens_show_those_beside_them(shift):
    """Where nobody attends to anybody else, only what is shown can matter."""
    torch.manual_seed(0)
    model = TokenTransformer(20, 20, *SHAPE, shift)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    changed = IDS.clone()
    changed[:, 5] += 1
    alone = torch.eye(12, dtype=torch.bool)[None, None]
    differs = (model(IDS, alone) != model(changed % 20, alone)).any(-1).all(0)
    assert differs.nonzero().flatten().tolist() == ([4, 5, 6] if shift else [5])


@pytest.mark.parametrize("kind", [MaskedDiffusion, functools.partial(MaskedDiffusion, shift=True)])
def test_the_masked_bound_is_the_mean_over_all_masks(kind):
    """One token: it is masked or not, so that -log p is exact; two: the bound averages both orders."""
    model = trained(kind)
    one, mask = IDS[:1, :1], torch.ones(1, 1, dtype=torch.bool)
    with torch.no_grad():
        hidden = model.model(torch.full((1, 1), 20), mask[:, None, None]).log_softmax(-1)
    exact = -float(hidden[0, 0, one[0, 0]])
    assert float(model.bound_nats(one, mask, 1000)) == pytest.approx(exact, rel=0.08)


def test_sampling_remembers_what_it_has_read():
    """One token at a time with remembered keys and values gives the logits of the whole text at once."""
    model = trained(Autoregressive).model
    causal = torch.ones(12, 12, dtype=torch.bool).tril()[None, None]
    past = [Past() for _ in model.layers]
    one_by_one = torch.cat([model(IDS[:, [place]], None, past) for place in range(12)], 1)
    torch.testing.assert_close(one_by_one, model(IDS, causal), rtol=1e-4, atol=1e-4)


def test_samples_come_from_the_model():
    model = trained(Autoregressive)
    samples = model.sample(2000, 1, seed=0)[:, 0]
    first = model.model(torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1, 1, 1, dtype=torch.bool))
    expected = 2000 * first.softmax(-1)[0, 0]
    counts = torch.bincount(samples, minlength=20)
    common = expected > 8
    assert ((counts - expected)[common] ** 2 / expected[common]).sum() < 45
