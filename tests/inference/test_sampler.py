import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats

from ds_tokimg.choices import SAMPLERS
from ds_tokimg.diffusion.path import START
from ds_tokimg.inference.options import SamplingOptions
from ds_tokimg.inference.sampler import _Walk, sample, timestep_grid
from ds_tokimg.model.context import Patches, WholeImage
from ds_tokimg.tokens.codec import TokenCodec
from tests.support.tiny import ExactModel, correlated_texts, tiny_model

HEADS = [{"posterior": "tokens"}, {"posterior": "digits"}, {"posterior": "tree"}, {"head": "linear"}]
CODEC = TokenCodec(50)


def chi_square_p(rows, distribution: dict) -> float:
    """How likely these texts are, or worse ones, when they come from the distribution; rare texts are put together."""
    counts = dict.fromkeys(distribution, 0)
    for row in rows:
        counts[tuple(row)] += 1
    observed, expected, rest = [], [], [0.0, 0.0]
    for text, share in distribution.items():
        if share * len(rows) >= 8:
            observed.append(counts[text])
            expected.append(share * len(rows))
        else:
            rest[0], rest[1] = rest[0] + counts[text], rest[1] + share * len(rows)
    if rest[1]:
        observed, expected = [*observed, rest[0]], [*expected, rest[1]]
    return stats.chisquare(observed, expected).pvalue


# ---- distributions ----


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(("vocab_size", "length", "patch_size"), [(4, 2, 1), (3, 3, 2)])
def test_texts_come_with_their_frequencies(sampler, vocab_size, length, patch_size):
    """With the exact posterior every sampler reproduces a distribution of tokens that depend on each other."""
    source = correlated_texts(vocab_size, length)
    model = ExactModel(TokenCodec(vocab_size), source, patch_size)
    rows, invalid = sample(model, [length] * 1500, SamplingOptions(steps=96, sampler=sampler, batch_size=1500))
    assert chi_square_p(rows, source) > 1e-3 and invalid == 0


@pytest.mark.parametrize("eta", [0.0, 1.0, 4.0])
def test_frequencies_do_not_depend_on_how_much_noise_is_replaced(eta):
    source = correlated_texts(4, 2)
    model = ExactModel(TokenCodec(4), source)
    rows, _ = sample(model, [2] * 1500, SamplingOptions(steps=96, eta=eta, batch_size=1500))
    assert chi_square_p(rows, source) > 1e-3


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("block_size", [1, 2])
def test_texts_from_left_to_right_come_with_their_frequencies(sampler, block_size):
    source = correlated_texts(3, 3)
    model = ExactModel(TokenCodec(3), source)
    options = SamplingOptions(steps=64, sampler=sampler, block_size=block_size, batch_size=1500)
    rows, invalid = sample(model, [3] * 1500, options)
    assert chi_square_p(rows, source) > 1e-3 and invalid == 0


def test_one_step_a_token_is_exact_from_left_to_right():
    """A block of one token needs no walk: its posterior at full noise is what it is drawn from."""
    source = correlated_texts(4, 2)
    model = ExactModel(TokenCodec(4), source)
    rows, _ = sample(model, [2] * 1500, SamplingOptions(steps=1, block_size=1, batch_size=1500))
    assert chi_square_p(rows, source) > 1e-3 and len(model.evaluations) == 2


@pytest.mark.parametrize("steps", [1, 4, 32])
@pytest.mark.parametrize(("vocab_size", "length"), [(4, 3), (2, 8)])
def test_tokens_drawn_in_turn_come_with_their_frequencies(vocab_size, length, steps):
    """Those of one run, of a patch or of several, however few the steps."""
    source = correlated_texts(vocab_size, length)
    model = ExactModel(TokenCodec(vocab_size), source, patch_size=2, in_turn=True)
    rows, invalid = sample(model, [length] * 1500, SamplingOptions(steps=steps, batch_size=1500))
    assert chi_square_p(rows, source) > 1e-3 and invalid == 0 and len(model.evaluations) == steps


def test_tokens_drawn_independently_need_more_steps_than_one():
    source = correlated_texts(4, 3)
    model = ExactModel(TokenCodec(4), source, patch_size=2)
    rows, _ = sample(model, [3] * 1500, SamplingOptions(steps=1, batch_size=1500))
    assert chi_square_p(rows, source) < 1e-6


def given_second(sampler: str, patch_size: int):
    """The first of two tokens, the second given: sampled texts, and the frequencies to expect."""
    source = correlated_texts(4, 2)
    model = ExactModel(TokenCodec(4), source, patch_size)
    rows, _ = sample(model, [2] * 1500, SamplingOptions(64, sampler, batch_size=1500), given=[{1: 2}] * 1500)
    assert all(row[1] == 2 for row in rows)
    total = sum(p for (_, second), p in source.items() if second == 2)
    return rows, {text: p / total for text, p in source.items() if text[1] == 2}


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_given_patches_condition_the_others(sampler):
    """Infilling: a patch that is known as a whole is shown clean, and the others come as they do beside it."""
    rows, conditional = given_second(sampler, patch_size=1)
    assert chi_square_p(rows, conditional) > 1e-3


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_given_tokens_in_a_shared_patch_condition_in_part(sampler):
    """Known tokens are as noisy as the patch they share, so that the others hear of them late: frequencies lie between
    those beside the known token and those beside any."""
    rows, conditional = given_second(sampler, patch_size=2)
    first = np.bincount([row[0] for row in rows], minlength=4) / len(rows)
    beside = np.array([conditional[token, 2] for token in range(4)])
    anywhere = np.zeros(4)
    for (token, _), p in correlated_texts(4, 2).items():
        anywhere[token] += p
    assert np.abs(first - beside).sum() < 0.8 * np.abs(anywhere - beside).sum()


# ---- steps ----


class GaussianWalk(_Walk):
    """Data are normal with deviation 0.5: the posterior mean is linear, and the flow has a closed form."""

    def __init__(self):
        self.times = []

    @staticmethod
    def deviation(t):
        return np.sqrt((1 - t / 1000) ** 2 * 0.25 + (t / 1000) ** 2)

    def _predict(self, z, t):
        self.times.append(t)
        return SimpleNamespace(clean=(1 - t / 1000) * 0.25 * z / self.deviation(t) ** 2)


@pytest.mark.parametrize(("step", "order"), [("_euler", 1), ("_heun", 2)])
def test_convergence_order(step, order):
    start, end = 999.0, 20.0
    errors = []
    for steps in (20, 40, 80):
        walk, z = GaussianWalk(), torch.tensor([1.0], dtype=torch.float64)
        for t, s in itertools.pairwise(np.linspace(start, end, steps + 1)):
            z = getattr(walk, step)(z, t, s)
        exact = walk.deviation(end) / walk.deviation(start)
        errors.append(abs(float(z) - exact))
    rates = np.log2(np.array(errors[:-1]) / errors[1:])
    assert rates == pytest.approx([order, order], abs=0.25) and errors[-1] < 0.02


def test_euler_is_exact_while_the_prediction_stays():
    clean, noise = torch.rand(5).double(), torch.randn(5).double()
    z = 0.1 * clean + 0.9 * noise
    moved = GaussianWalk()._euler(z, 900.0, 250.0, clean)
    torch.testing.assert_close(moved, 0.75 * clean + 0.25 * noise)


@pytest.mark.parametrize(
    # Of noise that is kept: all; as much as z_t shares with z_s when it is z_s, scaled down, plus noise; less; none.
    ("eta", "kept"),
    [(0.0, 1.0), (1.0, 2 / 7), (1.02, (1 - 1.02**2 * 45 / 49) ** 0.5), (5.0, 0.0)],
)
def test_ancestral_step_keeps_the_noising_path(eta, kept):
    """From q(z_t | clean) to q(z_s | clean): mean and deviation of the path, and the right correlation of the two."""
    generator = torch.Generator().manual_seed(0)
    clean = torch.full((400_000,), 0.6).double()
    walk = GaussianWalk()
    walk._draw = lambda prediction: clean
    walk._normal = lambda: torch.randn(clean.shape, generator=generator, dtype=torch.float64)
    alpha, sigma = 0.3, 0.7
    z = alpha * clean + sigma * torch.randn(clean.shape, generator=generator, dtype=torch.float64)
    moved = walk._ancestral(z, 700.0, 400.0, eta)
    assert float(moved.mean()) == pytest.approx(0.6 * 0.6, abs=4 * 0.4 / 632)
    assert float(moved.std()) == pytest.approx(0.4, rel=0.01)
    covariance = float(torch.cov(torch.stack([z, moved]))[0, 1])
    assert covariance == pytest.approx(kept * 0.7 * 0.4, abs=4 * 0.7 * 0.4 / 632)


@pytest.mark.parametrize("radix", [2, 54])
def test_time_runs_from_noise_to_clean(radix):
    for steps in (1, 2, 7, 64):
        grid = timestep_grid(radix, steps)
        assert len(grid) == steps + 1 and grid[0] == START == 999 and grid[-1] == 0
        assert (grid.diff() < 0).all()


@pytest.mark.parametrize(
    ("sampler", "steps"), [("ancestral", 16), ("euler", 16), ("heun", 16), ("heun", 1), ("euler", 1)]
)
def test_evaluations(sampler, steps):
    """As many as asked for, one after the other down the grid, never back to more noise."""
    model = ExactModel(TokenCodec(4), correlated_texts(4, 2))
    sample(model, [2], SamplingOptions(steps=steps, sampler=sampler))
    times = [float(t) for t in model.evaluations]
    assert times[0] == 999 and all(a >= b for a, b in itertools.pairwise(times))
    if sampler == "heun":  # two a step, at its ends; the last step has one
        assert len(times) == max(1, steps - 1) and len(set(times)) == max(1, steps // 2)
    else:
        assert len(times) == len(set(times)) == steps


@pytest.mark.parametrize(("block_size", "steps"), [(0, 64), (1, 16), (2, 32), (16, 64)])
def test_evaluations_unless_told(block_size, steps):
    """Four for each token of a block, whose patches hold four, 64 at most."""
    model = tiny_model(CODEC, patch_size=2).eval()
    times, original = [], model.predict
    model.predict = lambda patches, *a: times.append(float(patches.t[0])) or original(patches, *a)
    sample(model, [4], SamplingOptions(block_size=block_size))
    assert len(times) == len(set(times)) == steps


@pytest.mark.parametrize(
    ("sampler", "posterior", "steps"),
    [
        ("ancestral", "tokens", 1),
        ("ancestral", "tree", 1),
        ("ancestral", "digits", 4),
        ("euler", "tokens", 4),
        ("heun", "tokens", 3),
    ],
)
def test_a_token_alone_is_drawn_in_one_step_where_that_is_exact(sampler, posterior, steps):
    """Not from a posterior over digits, and not by the most likely one."""
    model = tiny_model(TokenCodec(50, token_size=2), patch_size=2, posterior=posterior).eval()
    calls, original = [], model.predict
    model.predict = lambda *a: calls.append(1) or original(*a)
    sample(model, [2], SamplingOptions(block_size=1, sampler=sampler))
    assert len(calls) == 2 * steps


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_states_follow_the_noising_path(sampler):
    """At each noise level the mean square of the state is that of the path: signal there, noise there."""
    source = {(0, 3): 0.5, (3, 0): 0.5}
    model = ExactModel(TokenCodec(4), source)
    states, original = [], model.predict
    model.predict = lambda patches, *a: (
        states.append((float(patches.t[0]), patches.noisy[:, :2])) or original(patches, *a)
    )
    sample(model, [2] * 1500, SamplingOptions(steps=32, sampler=sampler, batch_size=1500))
    for t, z in states:
        sigma = t / 1000
        expected = (1 - sigma) ** 2 + sigma**2  # every colour is at a corner: clean^2 = 1
        assert float(z.square().mean()) == pytest.approx(expected, rel=0.08), t


# ---- contracts ----


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(
    "head", [{"posterior": "tokens"}, {"posterior": "digits"}, {"posterior": "tree"}, {"head": "linear"}]
)
@pytest.mark.parametrize("block_size", [0, 2])
def test_a_text_does_not_depend_on_its_batch(sampler, head, block_size):
    """Lengths, prompts and given tokens of the neighbours make no difference."""
    model = tiny_model(CODEC, **head).eval()
    lengths = [40, 3, 17, 60, 16, 33]
    prompts = [[1, 2, 3], [], [5] * 30, [], [7], [8, 9]]
    given = [{}, {0: 4}, {}, dict.fromkeys(range(20), 7), {}, {30: 1}]
    results = [
        sample(model, lengths, SamplingOptions(8, sampler, block_size, 1.5, batch_size=size), prompts, given)
        for size in (1, 4, 64)
    ]
    assert results[0] == results[1] == results[2]
    assert [len(row) for row in results[0][0]] == lengths
    assert all(0 <= token < 50 and type(token) is int for row in results[0][0] for token in row)
    other = sample(model, lengths, SamplingOptions(8, sampler, block_size, seed=1), prompts, given)
    assert other[0] != results[0][0]


def test_a_block_is_written_after_those_before_it():
    """Other tokens in front change what follows, and nothing that comes later changes what is in front."""
    model, options = tiny_model(CODEC).eval(), SamplingOptions(8, block_size=1)
    start = dict.fromkeys(range(16), 3)
    (text,), _ = sample(model, [64], options, given=[start])
    (other,), _ = sample(model, [64], options, given=[start | {0: 30}])
    (later,), _ = sample(model, [64], options, given=[start | {60: 7}])
    (shorter,), _ = sample(model, [32], options, given=[start])
    assert text[16:32] != other[16:32]
    assert text[:48] == later[:48] and text[:32] == shorter


def test_one_block_is_the_whole_image():
    model = tiny_model(CODEC).eval()
    plain, block = (sample(model, [64, 20], SamplingOptions(8, block_size=size)) for size in (0, 16))
    assert plain == block


def test_the_global_generator_is_left_alone():
    model, state = tiny_model(CODEC), torch.get_rng_state()
    sample(model, [5], SamplingOptions(2))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("layout", ["patch", "raster"])
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(
    "head", [{"posterior": "tokens"}, {"posterior": "digits"}, {"posterior": "tree"}, {"head": "linear"}]
)
@pytest.mark.parametrize("block_size", [0, 3])
def test_given_tokens_stay(head, sampler, layout, block_size):
    codec = TokenCodec(50, palette=np.random.default_rng(0).permutation(50))
    model = tiny_model(codec, layout=layout, **head)
    rng, lengths = np.random.default_rng(1), [256, 70, 33]
    given = [{int(i): int(rng.integers(50)) for i in rng.choice(n, n // 2, replace=False)} for n in lengths]
    given[2] = {i: 49 - i for i in range(33)}
    rows, _ = sample(model, lengths, SamplingOptions(4, sampler, block_size), given=given)
    for row, known in zip(rows, given, strict=True):
        assert all(row[place] == token for place, token in known.items())
    assert rows[2] == [49 - i for i in range(33)]


@pytest.mark.parametrize("head", HEADS)
def test_given_tokens_are_shown_at_the_level_they_have(head):
    """Patches that are known as a whole without noise, others on their own noising path."""
    model, shown = tiny_model(CODEC, **head), []
    original = model.predict

    def predict(patches, *args):
        shown.append((patches.noisy, patches.t))
        return original(patches, *args)

    model.predict = predict
    sample(model, [48], SamplingOptions(16, "euler"), given=[dict.fromkeys(range(20), 7)])
    colour = CODEC.codebook[7].repeat(16)
    path = []
    for z, t in shown:
        assert t[0, 0] == 0 and t[0, 1] == t[0, 2] > 0
        torch.testing.assert_close(z[0, 0], colour)
        sigma = float(t[0, 1]) / 1000
        path.append((z[0, 1, :12] - (1 - sigma) * colour[:12]) / sigma)  # the noise in what is known of the second
    assert all(torch.allclose(noise, path[1], atol=2e-2) for noise in path)


def test_guidance():
    """0 is the model without condition, 1 with it, 2 goes as far again; only the last costs two evaluations."""
    model = tiny_model(CODEC).eval()
    lengths, prompts = [40, 16], [[1, 2, 3], [5] * 20]
    calls, original = [], model.predict
    model.predict = lambda patches, seen: calls.append(seen.prompt) or original(patches, seen)

    def texts(scale, prompts):
        calls.clear()
        return sample(model, lengths, SamplingOptions(8, guidance_scale=scale), prompts)[0]

    assert texts(0.0, prompts) == texts(1.0, None) and len(calls) == 8 and calls[0] is None
    plain = texts(0.0, None)
    followed = texts(1.0, prompts)
    assert followed != plain and len(calls) == 8 and all(condition is not None for condition in calls)
    assert texts(2.0, prompts) not in (plain, followed) and len(calls) == 16


@pytest.mark.parametrize("head", [{"posterior": "digits"}, {"head": "linear"}])
def test_guidance_extrapolates_the_predictions(head):
    model = tiny_model(CODEC, **head).eval()
    walk = _Walk(model, [40], range(1), SamplingOptions(guidance_scale=2.5), [[1, 2, 3]], None)
    z = walk._normal()
    guided, z = walk._predict(z, 500.0), z.float()
    t = torch.tensor([500.0])
    patches = Patches(z, t, walk.mask)
    without, given = (model.predict(patches, WholeImage(prompt)) for prompt in (None, walk.condition))
    name = "clean" if head.get("head") else "logits"
    a, b = getattr(without, name), getattr(given, name)
    torch.testing.assert_close(getattr(guided, name), a + 2.5 * (b - a))


def test_an_untrained_posterior_writes_uniform_tokens():
    """Only the palette and the code decide then; every token is as likely as any other."""
    codec = TokenCodec(8, palette=np.random.default_rng(0).permutation(8))
    rows, invalid = sample(tiny_model(codec, trained=False), [256] * 8, SamplingOptions(32))
    counts = np.bincount(np.concatenate(rows), minlength=8)
    assert stats.chisquare(counts).pvalue > 1e-3 and invalid == 0


def test_colours_of_no_token_are_counted_in_the_texts_only():
    model = tiny_model(CODEC, posterior="digits", trained=False)
    with torch.no_grad():  # every digit the highest: code 63 of 50 tokens
        model.head.output.bias.view(-1, 4)[:, 3] = 1e6
    rows, invalid = sample(model, [5, 20], SamplingOptions(2))
    assert invalid == 25 and rows == [[49] * 5, [49] * 20]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": "ddim"}, "unknown sampler 'ddim'; available: ancestral, euler, heun"),
        ({"steps": 0}, "at least 1"),
        ({"batch_size": 0}, "at least 1"),
        ({"eta": -0.5}, "eta is -0.5"),
        ({"eta": float("nan")}, "eta is nan"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        SamplingOptions(**options)
