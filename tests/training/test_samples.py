"""What validations show: the averaged weights at every stage, a text at four noise levels, texts and files."""

import numpy as np
import pytest
import torch

from ds_tokimg.engine.engine import TrainEngine
from ds_tokimg.inference.loading import TrainedModel
from ds_tokimg.tokens.codec import TokenCodec
from ds_tokimg.training.objective import TrainingLoss
from ds_tokimg.training.samples import SHOWN_AT, as_lines, as_table, averaged_model, denoising
from tests.support.distributed import engine_config, run_ranks
from tests.support.tiny import maker_of, random_texts, tiny_model


class _Format:
    enable_condition = False


def _averaged(dist, stage):
    """After three steps: (the copy's weights, the engine's averaged ones, torch's generator untouched) of rank 0."""
    texts = random_texts(30, [40] * 8)
    module = TrainingLoss(tiny_model(TokenCodec(30)), "ce")
    maker, engine = maker_of(module), TrainEngine(module, engine_config(stage, dist.world_size), 0.5, dist)
    share = 8 // dist.world_size
    for _ in range(3):
        rows = np.arange(dist.rank * share, (dist.rank + 1) * share)
        engine.train_batch([maker(texts, rows, rows, 0)])
    state = torch.get_rng_state()
    model = averaged_model(module, engine)
    same = torch.equal(state, torch.get_rng_state())
    own = {name: engine.shards.full(p, engine.optimizer.average) for name, p in engine.shards.params.items()}
    trained = {name: engine.shards.full(p) for name, p in engine.shards.params.items()}
    if model is None:
        return None
    copied = {f"model.{name}": value for name, value in model.named_parameters()}
    differs = any(not torch.equal(own[name], trained[name]) for name in own)
    return set(copied) == set(own) and all(torch.equal(copied[name], own[name]) for name in own) and differs, same


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_the_averaged_weights_are_gathered_on_rank_0(stage):
    assert run_ranks(2, _averaged, stage) == [(True, True), None]


@pytest.mark.parametrize("options", [{}, {"head": "linear"}, {"layout": "raster"}, {"block_size": 1}])
def test_a_text_at_four_noise_levels(options):
    model, ids = tiny_model(TokenCodec(30), **options).eval(), np.arange(21) % 30
    rows = denoising(TrainedModel(None, model, None, _Format()), ids, np.zeros(0, np.int64))
    assert len(rows) == len(SHOWN_AT)
    image, mask = model.codec.encode(ids, 16, model.config.layout, 4)
    for clean, noisy, predicted in rows:
        assert clean.ids == ids.tolist() and torch.allclose(clean.image * mask, image * mask, atol=1e-6)
        assert len(noisy.ids) == len(predicted.ids) == len(predicted.certainty) == 21
    errors = [float(((noisy.image - image) * mask).norm()) for _, noisy, _ in rows]
    assert errors == sorted(errors, reverse=True)  # from much noise to little
    again = denoising(TrainedModel(None, model, None, _Format()), ids, np.zeros(0, np.int64))
    assert all(torch.equal(old[2].image, new[2].image) for old, new in zip(rows, again, strict=True))


def test_texts_keep_their_lines():
    texts = [{"prompt": None, "text": "a\n *b*"}, {"prompt": "c\nd", "text": "e|f"}]
    assert as_lines(texts) == "[0] noise alone\na\n *b*\n\n[1] 'c\\nd'\ne|f\n"
    assert len(as_table(texts).split("\n")) == 4  # a row each
