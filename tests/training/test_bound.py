import math
import threading
from itertools import pairwise

import numpy as np
import pytest
import torch

from ds_tokimg.data.batch import Batch, Canvas
from ds_tokimg.diffusion.levels import NoiseLevels
from ds_tokimg.diffusion.path import bound_range, log_snr
from ds_tokimg.diffusion.writing import Writing
from ds_tokimg.tokens.codec import TokenCodec
from ds_tokimg.training.bound import BoundOptions, Share, bits_per_token, decoding_nats, estimate_bound, prior_nats
from ds_tokimg.training.objective import TrainingLoss
from tests.support.tiny import ExactModel, Texts, correlated_texts, layout_of, random_texts, tiny_model

# All patches are one block, drawn in one step whether that is exact or not.
ONE_STEP = Writing(16, exact_patches=16)


def bound_of(model, texts, objective="mse", writing=None, **options):
    """By the model's own path, or another one."""
    return bound_of_module(TrainingLoss(model, objective), texts, writing or model.writing, **options)


def bound_of_module(module, texts, writing, **options):
    def forward(batch):
        return module(batch, per_patch=True)

    return estimate_bound(forward, texts, layout_of(module.model), module.timesteps, writing, BoundOptions(**options))


def draw_texts(distribution: dict, count: int, seed: int = 0) -> Texts:
    chosen = np.random.default_rng(seed).choice(len(distribution), count, p=list(distribution.values()))
    return Texts([list(distribution)[i] for i in chosen])


# ---- known answers ----


@pytest.mark.parametrize(
    ("vocab_size", "options", "bits"),
    [
        (64, {"posterior": "tokens"}, 6.0),
        (64, {"posterior": "digits"}, 6.0),
        (512, {"posterior": "tokens", "layout": "raster"}, 9.0),
        (300, {"posterior": "tokens"}, math.log2(300)),  # knows that 43 of the 343 colours are no token
        (300, {"posterior": "digits"}, None),
        (64, {"posterior": "tree"}, 6.0),
        (300, {"posterior": "tree"}, math.log2(300)),
    ],
)
def test_an_untrained_posterior_head_needs_log2_of_the_vocabulary(vocab_size, options, bits):
    model = tiny_model(TokenCodec(vocab_size), trained=False, **options)
    writing = ONE_STEP if options["posterior"] == "tree" else None
    bound = bound_of(model, random_texts(vocab_size, [256] * 24 + [50, 7, 1]), writing=writing, num_levels=16)
    if bits is None:  # takes digits for uniform: the cross-entropy of their likelihoods, up to 3 log2(7)
        assert math.log2(300) < bound.bits_per_token < 3 * math.log2(7) + 4 * bound.standard_error
    else:
        assert abs(bound.bits_per_token - bits) < 4 * bound.standard_error + 1e-3
        assert bound.standard_error < 0.02 * bits


@pytest.mark.parametrize("vocab_size", [2, 3, 5, 8])
def test_exact_posterior_of_independent_tokens_gives_the_code_length(vocab_size):
    """Bayes' rule makes the bound an equality: -log p of the very texts, and the entropy of their source."""
    share = np.random.default_rng(vocab_size).dirichlet(np.ones(vocab_size))
    source = {(token,): p for token, p in enumerate(share)}
    check_code_length(source, TokenCodec(vocab_size))


@pytest.mark.parametrize(
    ("vocab_size", "length", "radix", "patch_size"), [(4, 2, None, 1), (3, 3, 5, 1), (4, 3, None, 2)]
)
def test_exact_posterior_of_correlated_tokens_gives_the_code_length(vocab_size, length, radix, patch_size):
    """What tokens say of each other counts too: the bound is far below that of the same tokens taken one by one."""
    source = correlated_texts(vocab_size, length)
    check_code_length(source, TokenCodec(vocab_size, radix=radix), patch_size)


@pytest.mark.parametrize("block_size", [1, 2, 4])
def test_exact_posterior_gives_the_code_length_from_left_to_right_too(block_size):
    """The chain rule: blocks given those before them cost together what the text costs."""
    check_code_length(correlated_texts(3, 4), TokenCodec(3), block_size=block_size)


def test_exact_posterior_gives_the_code_length_in_one_step_where_tokens_stand_alone():
    """Exactly: at full noise the posterior is the distribution of the next token."""
    source = correlated_texts(3, 4)
    texts = draw_texts(source, 100)
    model = ExactModel(TokenCodec(3), source, block_size=1)
    assert model.writing.one_step
    bound = bound_of(model, texts, num_levels=1)
    exact = [-math.log(source[tuple(text)]) for text in texts.texts]
    np.testing.assert_allclose(bound.nats, exact, rtol=0.02)
    assert bound.bits_per_token == pytest.approx(sum(exact) / math.log(2) / 400, rel=2e-3)


def test_one_step_cannot_make_tokens_agree():
    """The bound of drawing dependent tokens together in one step is the sum of their own entropies."""
    source = {(0, 0): 0.5, (1, 1): 0.5}
    bound = bound_of(ExactModel(TokenCodec(2), source), draw_texts(source, 200), writing=ONE_STEP, num_levels=1)
    assert bound.bits_per_token == pytest.approx(1.0, rel=0.02)  # together they have one bit, not two


@pytest.mark.parametrize(("vocab_size", "length"), [(4, 3), (3, 4)])
def test_exact_posterior_gives_the_code_length_where_tokens_are_drawn_in_turn(vocab_size, length):
    """The integral to the level where they are, and the chain rule from there."""
    check_code_length(correlated_texts(vocab_size, length), TokenCodec(vocab_size), patch_size=2, in_turn=True)


def test_in_turn_tokens_agree_in_one_step():
    """Which they cannot when they are drawn independently of each other (above)."""
    source = correlated_texts(4, 3)
    texts = draw_texts(source, 100)
    model = ExactModel(TokenCodec(4), source, patch_size=2, in_turn=True, block_size=4)
    assert model.writing.one_step
    bound = bound_of(model, texts, num_levels=1)
    exact = [-math.log(source[tuple(text)]) for text in texts.texts]
    np.testing.assert_allclose(bound.nats, exact, rtol=0.02)


def test_the_objective_is_averaged_over_the_levels_before_tokens_are_drawn():
    """An untrained head reads a token off its own noise: what is left to know is log V at first, and falls."""
    model = tiny_model(TokenCodec(64), trained=False, in_turn=True)
    texts = random_texts(64, [256] * 8)
    writings = (model.writing.asked(many_steps=many_steps) for many_steps in (True, False))
    whole, before = (bound_of(model, texts, "ce", writing, num_levels=16).loss for writing in writings)
    assert whole < before < math.log(64)


def check_code_length(source, codec, patch_size=1, block_size=0, in_turn=False):
    texts = draw_texts(source, 600)
    model = ExactModel(codec, source, patch_size, in_turn=in_turn)
    writing = Writing(block_size, in_turn)
    bound = bound_of(model, texts, writing=writing, num_levels=16)
    exact = np.array([-math.log(source[tuple(text)]) for text in texts.texts])
    error = bound.nats - exact
    assert abs(error.mean()) < 4 * error.std() / math.sqrt(600) + 1e-4
    assert error.std() / math.sqrt(600) < 0.05 * exact.mean()
    entropy = -sum(p * math.log2(p) for p in source.values()) / len(next(iter(source)))
    assert abs(bound.bits_per_token - entropy) < 4 * bound.standard_error


def test_a_wrong_model_needs_more():
    """The gap to the code length is the divergence of the models, here of two distributions of single tokens."""
    truth, belief = {(0,): 0.9, (1,): 0.1}, {(0,): 0.4, (1,): 0.6}
    bound = bound_of(ExactModel(TokenCodec(2), belief), draw_texts(truth, 1500))
    cross_entropy = -sum(p * math.log2(belief[token]) for token, p in truth.items())
    assert abs(bound.bits_per_token - cross_entropy) < 4 * bound.standard_error
    assert cross_entropy > 1.2 > -sum(p * math.log2(p) for p in truth.values())


@pytest.mark.parametrize("radix", [2, 5])
def test_the_terms_add_up_for_one_digit(radix):
    """Integral, prior and decoding by quadrature, for a digit with uniform levels: log of the radix."""
    levels, whole = np.linspace(-1, 1, radix), bound_range(radix)
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    weights = weights / weights.sum()
    grid = np.linspace(whole.low, whole.high, 1001)
    rate = []
    for value in grid:
        deviation = math.exp(-0.5 * value)
        z = levels[:, None] + deviation * nodes
        logits = -0.5 * ((z[..., None] - levels) / deviation) ** 2
        shares = np.exp(logits - logits.max(-1, keepdims=True))
        mean = (shares * levels).sum(-1) / shares.sum(-1)
        rate.append(0.5 * ((mean - levels[:, None]) ** 2 @ weights).mean() / deviation**2)
    prior = float(prior_nats(torch.from_numpy(levels)[:, None]).mean())
    total = np.trapezoid(rate, grid) + prior + decoding_nats()
    assert total == pytest.approx(math.log(radix), abs=2e-3)


def test_prior_is_the_divergence_of_two_normals():
    sigma2 = 1 / (1 + math.exp(-8.0))
    mean = torch.tensor([-1.0, 0.0, 0.7]) * math.sqrt(1 - sigma2)
    ours = torch.distributions.Normal(mean.double(), math.sqrt(sigma2))
    expected = torch.distributions.kl_divergence(ours, torch.distributions.Normal(0.0, 1.0).expand([3]))
    assert float(prior_nats(torch.tensor([-1.0, 0.0, 0.7]))) == pytest.approx(float(expected.sum()), rel=1e-6)


@pytest.mark.parametrize("radix", [2, 16, 256])
def test_decoding_term_is_an_upper_bound_and_negligible(radix):
    """-E log p(digit | z at the cleanest level) by quadrature, for a level in the middle: two neighbours."""
    deviation = math.exp(-0.5 * bound_range(radix).high)
    noise = np.linspace(-12, 12, 20_001)
    density = np.exp(-0.5 * noise**2) / math.sqrt(2 * math.pi)
    step = 2 / (radix - 1) / deviation  # between levels, in deviations
    ratio = np.exp(step * noise - 0.5 * step**2) + (np.exp(-step * noise - 0.5 * step**2) if radix > 2 else 0)
    exact = np.trapezoid(density * np.log1p(ratio), noise)
    assert exact <= decoding_nats() < 1e-6


# ---- the estimate ----


@pytest.mark.parametrize("radix", [2, 54])
def test_noise_levels_are_drawn_with_the_density_they_report(radix):
    levels, whole = NoiseLevels(radix), bound_range(radix)
    value, density = levels.quantile((np.arange(50_000) + 0.5) / 50_000)
    assert whole.low <= value[0] < value[-1] <= whole.high and (np.diff(value) > 0).all()
    # E[1 / density] over any part of the range is its length
    for low, high in [(whole.low, whole.high), (-2.0, 1.0), (whole.high - 1, whole.high)]:
        inside = (value >= low) & (value <= high)
        assert (inside / density).mean() == pytest.approx(high - low, rel=5e-3)
    assert density.min() > 0.1 / (whole.high - whole.low) * 0.99  # no weight is large
    ends, _ = levels.quantile(np.array([0.0, 1 - 1e-16]))
    assert ends == pytest.approx([whole.low, whole.high])


def test_the_standard_error_is_that_of_repeated_measurements():
    source = correlated_texts(4, 2)
    model, entropy = (
        ExactModel(TokenCodec(4), source),
        -sum(p * math.log2(p) for p in correlated_texts(4, 2).values()) / 2,
    )
    bounds = [bound_of(model, draw_texts(source, 60, seed), num_levels=4, seed=seed) for seed in range(40)]
    scores = np.array([(bound.bits_per_token - entropy) / bound.standard_error for bound in bounds])
    assert abs(scores.mean()) < 4 / math.sqrt(40) and 0.7 < scores.std() < 1.4
    assert math.isnan(bound_of(model, draw_texts(source, 1)).standard_error)


def test_more_levels_agree_and_err_less():
    model, texts = tiny_model(TokenCodec(64), trained=False), random_texts(64, [64] * 30)
    few, many = (bound_of(model, texts, num_levels=n) for n in (4, 32))
    assert many.nats.std() < 0.6 * few.nats.std()
    assert abs(few.bits_per_token - many.bits_per_token) < 4 * (few.standard_error + many.standard_error)


def test_the_path_from_left_to_right_of_one_block_is_the_plain_one():
    model, texts = tiny_model(TokenCodec(64)), random_texts(64, [64, 33, 7])
    plain, blocks = (bound_of(model, texts, writing=Writing(size), num_levels=64) for size in (0, 16))
    assert blocks.bits_per_token == pytest.approx(plain.bits_per_token, rel=1e-5)


def test_the_estimate_is_reproducible_and_does_not_depend_on_batches():
    model = tiny_model(TokenCodec(50), posterior="digits")
    texts = random_texts(50, [256, 100, 33, 32, 7, 1, 60, 61], [3, 0, 20, 60, 1, 2, 9, 5])
    for conditional in (False, True):
        options = {"conditional": conditional, "objective": "ce"}
        one = bound_of(model, texts, **options)
        assert np.array_equal(one.nats, bound_of(model, texts, **options).nats)
        for size in (1, 20):
            other = bound_of(model, texts, patches_per_batch=size, **options)
            np.testing.assert_allclose(other.nats, one.nats, rtol=1e-4)
            assert other.loss == pytest.approx(one.loss, rel=1e-4)
        assert not np.array_equal(one.nats, bound_of(model, texts, seed=1, **options).nats)
    assert one.tokens.tolist() == [256, 100, 33, 32, 7, 1, 60, 61]
    assert one.bits_per_byte == pytest.approx(one.bits_per_token / 3)


@pytest.mark.parametrize("world_size", [2, 3, 9])
def test_ranks_share_the_work(world_size):
    """Each rank computes its own texts, all go through the network equally often, and all get the same Bound."""
    model = tiny_model(TokenCodec(50))
    texts = random_texts(50, [100, 33, 32, 7, 1, 60, 61])
    alone = bound_of(model, texts, patches_per_batch=4)
    module, barrier = TrainingLoss(model, "mse"), threading.Barrier(world_size)
    parts, results, calls = [None] * world_size, [None] * world_size, [0] * world_size

    def work(rank):
        def forward(batch):
            calls[rank] += 1
            return module(batch, per_patch=True)

        def all_reduce(value):
            parts[rank] = value
            barrier.wait()
            total = torch.stack(parts).sum(0)
            barrier.wait()
            return total

        share = Share(rank, world_size, all_reduce)
        options = BoundOptions(patches_per_batch=4)
        layout = layout_of(model)
        results[rank] = estimate_bound(forward, texts, layout, module.timesteps, model.writing, options, share)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(calls)) == 1
    for result in results:
        np.testing.assert_allclose(result.nats, alone.nats, rtol=1e-9)
        for name in ("loss", "token_accuracy", "invalid_token_rate", "bits_per_token", "standard_error"):
            assert getattr(result, name) == pytest.approx(getattr(alone, name), rel=1e-9)


# ---- what comes with it ----


@pytest.mark.parametrize("timesteps", ["band", "uniform"])
@pytest.mark.parametrize("objective", ["ce", "mse", "elbo"])
def test_the_reported_loss_is_that_of_training(objective, timesteps):
    """The average over the training's own timesteps, found from other noise levels by importance weights; those
    outside the bound's integral (some of the `uniform` ones) are left out."""
    codec = TokenCodec(64)
    model, texts = tiny_model(codec, trained=False), random_texts(64, [64] * 60)
    module = TrainingLoss(model, objective, timesteps)
    reported = bound_of_module(module, texts, model.writing, num_levels=32).loss
    if objective == "elbo":
        # In expectation what the bound's integral is over the levels that are trained, all of it for `uniform`.
        expected = {"band": 0.99, "uniform": 1.0}[timesteps] * math.log(64)
    else:
        ids, mask = layout_of(model).pack(texts.texts)
        noise = torch.randn(60, 4, 48, generator=torch.Generator().manual_seed(0))
        values = []
        for k, t in enumerate(module.timesteps((torch.arange(60 * 20) + 0.5).double() / 1200).view(60, 20).T):
            rows = module(Batch(ids, mask, t, noise.roll(k, 0)), per_patch=True)["loss"]
            values.append(float((rows.sum(1) * bound_range(4).holds(log_snr(t))).sum().detach() / mask.sum()))
        expected = np.mean(values)
    assert reported == pytest.approx(expected, rel=0.03)


def test_accuracy_by_timestep():
    model, texts = tiny_model(TokenCodec(64), trained=False), random_texts(64, [256] * 12)
    bound = bound_of(model, texts, num_levels=32)
    accuracy = list(bound.accuracy_per_level.values())
    assert next(iter(bound.accuracy_per_level)) == "t0-100" and len(accuracy) == 10
    assert accuracy[0] > 0.99 and accuracy[-1] < 0.05 and bound.invalid_token_rate == 0
    assert all(a >= b - 0.02 for a, b in pairwise(accuracy))
    assert accuracy[-1] < bound.token_accuracy < accuracy[0]


def test_colours_of_no_token_are_counted():
    """An untrained reader of digits knows nothing of the tokens that there are."""
    model = tiny_model(TokenCodec(300), trained=False, posterior="digits")  # 43 of 343 colours are no token
    bound = bound_of(model, random_texts(300, [256] * 4))
    assert 0 < bound.invalid_token_rate < 43 / 343
    assert bound_of(tiny_model(TokenCodec(300)), random_texts(300, [256])).invalid_token_rate == 0


def test_an_answer_is_scored_with_the_end_tokens_after_it():
    """On its canvas: nats of the answer and of what fills it up, per token of the answer."""
    model = tiny_model(TokenCodec(64), trained=False)
    texts = random_texts(64, [5, 40, 20], [3, 3, 0])
    seen = []
    module = TrainingLoss(model, "mse")

    def forward(batch):
        seen.append(batch)
        return module(batch, per_patch=True)

    options = BoundOptions(num_levels=4, conditional=True, canvas=Canvas(2, 9), patches_per_batch=1)
    bound = estimate_bound(forward, texts, layout_of(model), module.timesteps, model.writing, options)
    assert bound.tokens.tolist() == [5, 40, 20]
    scored = sorted(int(batch.mask.sum()) for batch in seen[::4])
    assert scored == [20, 32, 48]  # no prompt: as it is; canvas of 2 patches; an answer longer than the canvas
    answer = next(batch for batch in seen if batch.mask.sum() == 32)
    assert (answer.ids.flatten()[5:] == 9).all()
    assert answer.prompt.ids[answer.prompt.mask].tolist() == texts.prompts[0].tolist()
    # 32 tokens of 6 bits each
    assert bound.nats[0] == pytest.approx(32 * math.log(64), rel=0.35)


def test_bits_per_token_of_lists():
    model = tiny_model(TokenCodec(64), trained=False)
    texts = [list(range(64)), [1, 2, 3]]
    value = bits_per_token(model.train(), texts, num_levels=32)
    assert value == pytest.approx(6.0, rel=0.1) and model.training
    assert value == bound_of(model.eval(), Texts(texts), num_levels=32).bits_per_token
    trained = tiny_model(TokenCodec(64))
    plain, given = bits_per_token(trained, texts), bits_per_token(trained, texts, prompts=[[5] * 20, []])
    assert plain != given
    from_left = bits_per_token(trained, texts, block_size=2)
    assert from_left == bound_of(trained.eval(), Texts(texts), writing=Writing(2)).bits_per_token != plain


def test_nothing_to_bound():
    with pytest.raises(ValueError, match="no validation texts"):
        bound_of(tiny_model(TokenCodec(64)), Texts([]))


@pytest.mark.parametrize("writing", [Writing(), Writing(in_turn=True), ONE_STEP, Writing(4)], ids=str)
def test_the_bits_of_all_noise_levels_add_up(writing):
    """And the loss of each is that of the whole, for an untrained head that reads a token off its own noise."""
    model = tiny_model(TokenCodec(64), trained=False, in_turn=writing.in_turn)
    bound = bound_of(model, random_texts(64, [64] * 20), "ce", writing, num_levels=8)
    assert sum(bound.bits_per_level.values()) == pytest.approx(bound.bits_per_token, rel=1e-9)
    assert ("drawn" in bound.bits_per_level) == (writing.in_turn or writing.one_step)
    assert list(bound.loss_per_level) == list(bound.accuracy_per_level)
    losses = list(bound.loss_per_level.values())
    assert losses == sorted(losses)  # the more noise, the less is known
    assert losses[-1] == pytest.approx(math.log(64), rel=0.01)
