"""A text that is watched while it is written: the same text, and frames that end with it."""

import pytest
import torch
from PIL import Image

from ds_tokimg.diffusion.writing import Writing
from ds_tokimg.inference.options import SamplingOptions
from ds_tokimg.inference.sampler import sample
from ds_tokimg.inference.watching import MOST_FRAMES, Watcher, stages
from ds_tokimg.tokens.codec import TokenCodec
from ds_tokimg.tokens.tokenizer import train_tokenizer
from tests.support.tiny import tiny_model

LENGTH = 21


def watched(model, sampler="ancestral", **options):
    watcher = Watcher(model, eos_id=999)
    texts, _ = sample(model, [LENGTH, 9], SamplingOptions(sampler=sampler, steps=3, **options), watch=watcher)
    return watcher, texts


@pytest.mark.parametrize("options", [{}, {"head": "linear"}, {"posterior": "digits"}, {"layout": "raster"}])
@pytest.mark.parametrize("block_size", [0, 1, 2])
@pytest.mark.parametrize("sampler", ["ancestral", "heun"])
def test_watching_changes_nothing_and_ends_with_the_text(options, block_size, sampler):
    model = tiny_model(TokenCodec(30), **options).eval()
    model.writing = Writing(block_size)
    plain, _ = sample(model, [LENGTH, 9], SamplingOptions(sampler=sampler, steps=3))
    watcher, texts = watched(model, sampler)
    assert texts == plain
    last = watcher.frames[-1]
    assert last.ids[:LENGTH] == texts[0] and set(last.certainty) == {1.0}
    clean, mask = model.codec.encode(texts[0], 16, model.config.layout, 4)
    assert torch.allclose(last.image * mask, clean * mask, atol=1e-6)


def test_noise_becomes_certain_step_by_step():
    watcher, _ = watched(tiny_model(TokenCodec(30)).eval())
    titles = [frame.title for frame in watcher.frames]
    assert len(titles) == 4 and (titles[0], titles[-1]) == ("noise 99.9 %", "noise 0 %")
    assert all(0 <= value <= 1 for frame in watcher.frames for value in frame.certainty)


def test_blocks_that_are_written_stay_as_they_are():
    model = tiny_model(TokenCodec(30)).eval()
    model.writing = Writing(1)
    watcher, texts = watched(model)
    first = next(frame for frame in watcher.seen if len(frame.ids) > model.slots)
    assert first.ids[: model.slots] == texts[0][: model.slots]
    assert set(first.certainty[: model.slots]) == {1.0}


def test_what_was_written_after_the_end_is_not_shown():
    model = tiny_model(TokenCodec(30)).eval()
    watcher = Watcher(model, eos_id=0)
    patches = torch.zeros(1, model.layout.values)
    for t in (500.0, 0.0):
        watcher(0, t, patches, torch.arange(16).roll(3)[None], torch.ones(1, 16))
    assert [frame.ids for frame in watcher.frames] == [[13, 14, 15]] * 2


def test_an_animation_is_not_longer_than_one_can_watch(tmp_path):
    tokenizer = train_tokenizer(["the sea and the rain"] * 9, 270)
    model = tiny_model(TokenCodec(len(tokenizer))).eval()
    watcher = Watcher(model, eos_id=0)
    sample(model, [LENGTH], SamplingOptions(steps=2 * MOST_FRAMES), watch=watcher)
    assert len(watcher.frames) == MOST_FRAMES and len(stages(watcher.frames)) == 5
    watcher.save(tmp_path / "text.gif", tokenizer)
    with Image.open(tmp_path / "text.gif") as animation, Image.open(tmp_path / "text.png") as strip:
        assert animation.n_frames > 2 and strip.height > animation.height
