"""Temperature, top-k and top-p: frequencies of what is drawn against the textbook's definition, worked out by hand."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats

from ds_tokimg.inference.draws import inverse_of_cdf, reshaped
from ds_tokimg.inference.options import SamplingOptions
from ds_tokimg.inference.sampler import _Walk, sample
from ds_tokimg.model.heads.base import Prediction
from ds_tokimg.tokens.codec import TokenCodec
from tests.support.tiny import ExactModel, correlated_texts, tiny_model

CHOICES = [
    {"temperature": 0.5},
    {"temperature": 1.7},
    {"top_k": 3},
    {"top_p": 0.6},
    {"temperature": 0.7, "top_k": 6, "top_p": 0.8},
    {"temperature": 0.0},
]
TEXTS = 3000


def textbook(probabilities, temperature: float = 1.0, top_k: int | None = None, top_p: float = 1.0) -> np.ndarray:
    """The distribution [V] after temperature, top-k and top-p, one token at a time."""
    p = [float(value) for value in probabilities]
    if temperature == 0:
        return np.eye(len(p))[max(range(len(p)), key=lambda i: (p[i], -i))]
    p = [value ** (1 / temperature) for value in p]
    ranked = sorted(range(len(p)), key=lambda i: (-p[i], i))[: top_k or len(p)]
    total, kept, share = sum(p[i] for i in ranked), [], 0.0
    for token in ranked:
        if share >= top_p:
            break
        kept.append(token)
        share += p[token] / total
    result = np.zeros(len(p))
    result[kept] = [p[i] for i in kept]
    return result / result.sum()


def fits(drawn, expected: np.ndarray) -> bool:
    """Whether these draws may come from a distribution [V]: none that it forbids, and the right frequencies."""
    counts = np.bincount(np.asarray(drawn), minlength=len(expected))
    likely = expected * counts.sum() >= 5
    if counts[expected == 0].any():
        return False
    observed = [*counts[likely], counts[~likely].sum()]
    wanted = [*(expected[likely] * counts.sum()), max(expected[~likely].sum() * counts.sum(), 1e-9)]
    if wanted[-1] < 1:  # too rare to compare
        observed, wanted = observed[:-1], np.array(wanted[:-1]) / sum(wanted[:-1]) * sum(observed[:-1])
    return len(wanted) == 1 or stats.chisquare(observed, wanted, sum_check=False).pvalue > 1e-3


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_reshaped_is_the_textbooks(choice):
    rng = np.random.default_rng(0)
    rows = [rng.dirichlet(np.full(17, 0.5)) for _ in range(20)] + [
        [0.25] * 4 + [0.0] * 13,
        [0.4, 0.3, 0.3] + [0.0] * 14,
    ]
    logits = torch.tensor(np.array(rows)).log() + 3.0
    expected = np.stack([textbook(row, **choice) for row in rows])
    np.testing.assert_allclose(reshaped(logits, SamplingOptions(**choice)).softmax(-1), expected, atol=1e-12)


def test_hugging_face_agrees():
    from transformers.generation.logits_process import (
        LogitsProcessorList,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    logits = torch.randn(50, 40, generator=torch.Generator().manual_seed(1))
    theirs = LogitsProcessorList([TemperatureLogitsWarper(0.8), TopKLogitsWarper(12), TopPLogitsWarper(0.7)])
    ours = reshaped(logits, SamplingOptions(temperature=0.8, top_k=12, top_p=0.7))
    torch.testing.assert_close(ours.softmax(-1), theirs(None, logits).softmax(-1))


@pytest.mark.parametrize("top_p", [1e-9, 1e-300])
def test_the_likeliest_token_is_always_kept(top_p):
    logits = torch.randn(5, 40)
    kept = reshaped(logits, SamplingOptions(top_p=top_p)).softmax(-1)
    assert torch.equal(kept.argmax(-1), logits.argmax(-1)) and (kept.amax(-1) == 1).all()
    cold = reshaped(logits, SamplingOptions(temperature=1e-300)).softmax(-1)
    assert torch.equal(cold, kept)


def test_numbers_become_draws():
    logits = torch.tensor([0.0, -torch.inf, math.log(3), -torch.inf]).expand(5, 4)
    drawn = inverse_of_cdf(logits, torch.tensor([0.0, 0.2499, 0.2501, 0.7, 1 - 2**-53], dtype=torch.float64))
    assert drawn.tolist() == [0, 0, 2, 2, 2]


# ---- what the sampler draws ----


@pytest.mark.parametrize("choice", CHOICES, ids=str)
@pytest.mark.parametrize("posterior", ["tokens", "tree", "digits"])
def test_each_posterior_draws_the_textbooks_tokens(posterior, choice):
    """One posterior, the probabilities of its tokens enumerated from what it is made of, and many draws from it."""
    codec = TokenCodec(23, palette=np.random.default_rng(3).permutation(23))  # 27 codes
    model = tiny_model(codec, posterior=posterior, patch_size=1).eval()
    generator = torch.Generator().manual_seed(2)
    if posterior == "digits":
        logits = torch.randn(1, 1, 1, 3, 3, generator=generator)
        factors = logits[0, 0, 0].softmax(-1)
        digits = codec.digit_table.tolist()
        joint = np.array([math.prod(float(factors[k, d]) for k, d in enumerate(own)) for own in digits])
        joint /= joint.sum()
    else:
        logits = torch.randn(1, 1, 1, 23, generator=generator) * 1.5
        joint = logits.flatten().softmax(-1).numpy()
    walk = _Walk(model, [1] * TEXTS, range(TEXTS), SamplingOptions(**choice), None, None)
    chosen = walk._choose_all(Prediction.of_logits(model.head, logits.expand(TEXTS, *logits.shape[1:])))
    ids, invalid = codec.nearest(model.head.colours(chosen).unflatten(-1, (1, -1)))
    assert not invalid.any() and fits(ids.flatten(), textbook(joint, **choice))


def test_the_tree_gives_the_probabilities_of_its_walks():
    """Products of the choices on the way to every token, by hand: what temperature and top-k then reshape."""
    model = tiny_model(TokenCodec(23), posterior="tree", patch_size=1).eval()
    head = model.head
    output, noisy = torch.randn(1, 1, 1, head.outputs), torch.randn(1, 1, 3)
    evidence = head.evidence(noisy, torch.full((1, 1), 0.3), torch.full((1, 1), 0.9))
    up = (head.token_output(output) + head._filter(evidence, torch.arange(22))).sigmoid().flatten()
    by_hand = []
    for token in range(23):
        ways = zip(head.way[token], head.goes_up[token], head.on_way[token], strict=True)
        by_hand.append(math.prod(float(up[n] if goes_up else 1 - up[n]) for n, goes_up, on_way in ways if on_way))
    assert sum(by_hand) == pytest.approx(1)
    np.testing.assert_allclose(head.logits(output, evidence).flatten().exp().detach(), by_hand, rtol=1e-4)


@pytest.mark.parametrize("in_turn", [False, True], ids=["one after another", "in turn"])
@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_texts_written_in_one_step_a_token_follow_the_textbook(choice, in_turn):
    """Every token from its distribution given those before it, reshaped: both ways in which one step is exact."""
    source = correlated_texts(6, 2)
    options = SamplingOptions(steps=1, block_size=None if in_turn else 1, batch_size=TEXTS, **choice)
    model = ExactModel(TokenCodec(6), source, patch_size=2 if in_turn else 1, in_turn=in_turn)
    rows, _ = sample(model, [2] * TEXTS, options)
    first = np.array([sum(source[a, b] for b in range(6)) for a in range(6)])
    expected = np.zeros(36)
    for a, share in enumerate(textbook(first, **choice)):
        then = textbook([source[a, b] / first[a] for b in range(6)], **choice)
        expected[6 * a : 6 * a + 6] = share * then
    assert fits([6 * a + b for a, b in rows], expected)


def test_a_walk_becomes_surer_where_it_is_colder():
    source = correlated_texts(4, 2)
    model = ExactModel(TokenCodec(4), source)
    shares = []
    for temperature in (1.5, 1.0, 0.5, 0.0):
        rows, _ = sample(model, [2] * 300, SamplingOptions(steps=16, temperature=temperature, batch_size=300))
        counts = np.unique([4 * a + b for a, b in rows], return_counts=True)[1]
        shares.append((counts / 300 * np.log(300 / counts)).sum())
    assert all(warm > cold for warm, cold in itertools.pairwise(shares))


@pytest.mark.parametrize("head", [{"posterior": "tokens"}, {"posterior": "digits"}, {"posterior": "tree"}])
def test_a_text_that_is_drawn_otherwise_does_not_depend_on_its_batch(head):
    model = tiny_model(TokenCodec(50), **head).eval()
    lengths = [20, 3, 33]
    one, many = (
        sample(model, lengths, SamplingOptions(4, block_size=2, batch_size=size, top_p=0.8, temperature=0.9))
        for size in (1, 8)
    )
    assert one == many


@pytest.mark.parametrize("choice", [{"temperature": 1.0}, {"top_p": 1.0}, {"top_k": None}])
def test_options_that_change_nothing_change_no_text(choice):
    model = tiny_model(TokenCodec(50)).eval()
    assert sample(model, [20], SamplingOptions(4, **choice)) == sample(model, [20], SamplingOptions(4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1; it must be 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"top_k": 0}, "top_k is 0; it must be at least 1"),
        ({"top_p": 0.0}, "top_p is 0.0; it must be above 0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"temperature": 0.5, "sampler": "heun"}, "the sampler heun draws none"),
        ({"top_k": 5, "sampler": "euler"}, "the sampler euler draws none"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"stop": ("",)}, "stop is empty"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        SamplingOptions(**options)
