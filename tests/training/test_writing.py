"""How a text is written is decided once: training's log, the bound, the sampler and the files all go by it."""

import itertools
from types import SimpleNamespace

import pytest

from ds_tokimg.diffusion.levels import NoiseLevels, SamplingPath
from ds_tokimg.diffusion.path import LOG_SNR_START
from ds_tokimg.diffusion.writing import RUN, Writing
from ds_tokimg.inference.sampler import SamplingOptions, sample
from ds_tokimg.model.jit import JiT
from ds_tokimg.tokens.codec import TokenCodec
from ds_tokimg.training.bound import BoundOptions, bits_per_token, bound_of
from ds_tokimg.training.objective import TrainingLoss
from tests.support.tiny import Texts, maker_of, random_texts, tiny_model

PLAIN_TEXTS = SimpleNamespace(enable_condition=False, answers=None)
# Tokens of a patch by their size, in patches of 2 x 2 pixels.
SLOTS = {1: 4, 2: 1}
WAYS = [
    (posterior, token_size, in_turn, block_size)
    for posterior, token_size, in_turn, block_size in itertools.product(
        ("tokens", "tree", "digits"), (1, 2), (True, False), (0, 1, 4, 5)
    )
    if not in_turn or (SLOTS[token_size] > 1 and posterior != "digits")
]


def model_of(posterior, token_size, in_turn, block_size) -> JiT:
    codec = TokenCodec(50, token_size)
    options = {"posterior": posterior, "in_turn": in_turn, "noisy_depth": 1 if block_size else 0}
    return tiny_model(codec, patch_size=2, img_size=8, block_size=block_size, **options).eval()


def counted(model) -> list:
    """What each prediction of the model was asked with, filled as it is."""
    calls, original = [], model.predict

    def predict(patches, *others):
        calls.append((patches, others))
        return original(patches, *others)

    model.predict = predict
    return calls


@pytest.mark.parametrize(("posterior", "token_size", "in_turn", "block_size"), WAYS)
def test_every_place_agrees(posterior, token_size, in_turn, block_size, tmp_path):
    model = model_of(posterior, token_size, in_turn, block_size)
    writing, slots = model.writing, SLOTS[token_size]
    tokens_in_a_step = (RUN if in_turn else 1) if posterior != "digits" else 0
    assert writing.one_step == (0 < block_size * slots <= tokens_in_a_step)
    assert (writing.block_size, writing.in_turn) == (block_size, in_turn)
    # the files
    model.save_pretrained(tmp_path)
    assert JiT.from_pretrained(tmp_path).writing == writing
    # training
    module, texts = TrainingLoss(model, timesteps="noisy"), random_texts(50, [8, 5])
    batch = maker_of(module)(texts, [0, 1], [0, 1], 0)
    assert (batch.blocks is None) == (block_size == 0)
    assert module.told.one_step == writing.one_step
    # the bound, by the Python API and as `evaluate` and validation measure it
    path = SamplingPath(NoiseLevels.of(model.codec.radix), writing)
    assert (path.drawn_at is not None) == (writing.one_step or in_turn)
    assert (path.noisiest == LOG_SNR_START) == writing.one_step
    calls = counted(model)
    bits = bits_per_token(model, texts.texts, num_levels=1)
    assert len(calls) == 1 + (path.drawn_at is not None)
    assert (calls[-1][1][1] is not None) == in_turn  # tokens drawn in turn, where they are drawn
    assert bits == bound_of(module, PLAIN_TEXTS, texts, options=BoundOptions(num_levels=1)).bits_per_token
    # the sampler
    calls.clear()
    sample(model, [8], SamplingOptions())
    blocks = -(-8 // slots // block_size) if block_size else 1
    assert (len(calls) == blocks) == writing.one_step


@pytest.mark.parametrize("block_size", [0, 1, 4])
@pytest.mark.parametrize("many_steps", [False, True])
@pytest.mark.parametrize("trained_with", [0, 1])
def test_what_is_asked_for_is_what_a_model_trained_so_would_do(block_size, many_steps, trained_with):
    """Only that many small steps never draw tokens earlier."""
    asked = model_of("tokens", 1, True, trained_with).writing.asked(block_size, many_steps)
    assert asked == (Writing(block_size) if many_steps else model_of("tokens", 1, True, block_size).writing)
    assert asked.asked() == asked


@pytest.mark.parametrize("timesteps", ["noisy", "band"])
def test_training_tells_the_bits_of_one_step_where_it_trains_that(timesteps):
    one, at_once = (model_of("tokens", 1, True, block_size).writing for block_size in (1, 0))
    assert one.told_by_training(timesteps) == (one if timesteps == "noisy" else Writing(1))
    assert at_once.told_by_training(timesteps) == Writing()
    alone = model_of("tokens", 2, False, 1).writing
    assert alone.told_by_training(timesteps) == alone


def test_the_path_of_a_model_is_not_another():
    """Of a left-to-right model of single tokens: many small steps, or the whole image, cost other bits."""
    model = model_of("tokens", 2, False, 1)
    texts = [[3, 1, 4, 1, 5, 9, 2, 6]]
    own = bits_per_token(model, texts)
    assert own == bits_per_token(model, texts, block_size=1) != bits_per_token(model, texts, block_size=0)
    module = TrainingLoss(model)
    many = bound_of(module, PLAIN_TEXTS, Texts(texts), model.writing.asked(many_steps=True)).bits_per_token
    assert many != own


def test_negative_sizes():
    with pytest.raises(ValueError, match="block_size is -1"):
        Writing().asked(-1)
