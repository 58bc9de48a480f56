"""The preview against the data set that a run trains on, and its noise figures against a reader that really reads."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from ds_tokimg.__main__ import main
from ds_tokimg.diffusion.path import add_noise_to_timestep
from ds_tokimg.engine.ranks import OnlyRank
from ds_tokimg.settings.command_line import train_config
from ds_tokimg.tokens.codec import TokenCodec
from ds_tokimg.training.assemble import assemble
from ds_tokimg.training.survey import histogram, noise_at, read_share
from tests.support.runs import small_flags, write_corpus

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def previewed(folder, corpus, *flags) -> dict:
    flags = small_flags(corpus, folder / "run", *flags)
    assert main(["preview", *flags, "--json", str(folder / "preview.json")]) == 0
    assert not (folder / "run").exists()
    return json.loads((folder / "preview.json").read_text(encoding="utf-8"))


def test_the_figures_are_those_of_the_run(corpus, tmp_path):
    report = previewed(tmp_path, corpus)
    parts = assemble(train_config(small_flags(corpus, tmp_path / "run")), OnlyRank(), None)
    train_set = parts.train_set
    assert report["texts"]["train"] + report["texts"]["held_out"] == 400
    assert report["tokens"]["train"] == train_set.num_tokens
    assert report["images"]["capacity_used"] == pytest.approx(train_set.lengths.mean() / 256)
    assert report["images"]["max_tokens_used"] == pytest.approx(train_set.lengths.mean() / 64)
    assert sum(row["texts"] for row in report["lengths"]) == 400
    text = corpus.read_text()
    expected = len(text.replace("\n", "")) / train_set.corpus.lengths.sum()
    assert report["tokens"]["characters_per_token"] == pytest.approx(expected, rel=0.02)
    assert report["samples"][0]["text"] == parts.tokenizer.decode(train_set.ids(0))


def test_padding_and_texts_that_are_longer_than_an_image(corpus, tmp_path):
    report = previewed(tmp_path, corpus, "--no_packing", "--max_tokens", 16)
    longer = sum(row["texts"] for row in report["lengths"] if row["from"] > 16)
    note = next(note for note in report["notes"] if "longer than max_tokens, 16" in note)
    assert 0 < longer <= int(note.split()[0]) < 400
    assert 0 < report["images"]["padding_fraction"] < 1


def test_prompts_pictures_and_what_is_left_out(tmp_path, capsys):
    data = tmp_path / "texts"
    data.mkdir()
    pairs = [{"prompt": f"What is {i}?", "answer": f"{i} is a\nnumber"} for i in range(60)]
    lines = [*map(json.dumps, pairs), '{"question": 1}']
    (data / "pairs.jsonl").write_text("\n".join(lines))
    (data / "notes.pdf").write_text("x")
    flags = ["--enable_condition", "--skip_bad_records", "--save_images", tmp_path / "images", "--num_texts", 2]
    flags += ["--vocab_size", 2000]
    report = previewed(tmp_path, data, *flags)
    assert report["texts"]["with_prompts"] == 60
    assert any(
        note.endswith("tokens and not 2,000 (--vocab_size): the texts are too short for more")
        for note in report["notes"]
    )
    assert report["samples"][0]["prompt"].startswith("What is")
    assert any("1 bad record" in note for note in report["notes"]) and any(
        "notes.pdf" in note for note in report["notes"]
    )
    assert sorted(file.name for file in (tmp_path / "images").iterdir()) == ["image_0000.png", "image_0001.png"]
    with Image.open(tmp_path / "images" / "image_0000.png") as picture:
        assert len(picture.getcolors(1 << 16)) > 5
    printed, told = capsys.readouterr()
    assert told.splitlines()[-2:] == [
        f"written: {tmp_path / 'images'}, pictures of 2 image(s)",
        f"written: {tmp_path / 'preview.json'}",
    ]
    assert "What is" in printed and "is a\\nnumber" in printed


@pytest.mark.parametrize("flag", ["--json", "--save_images"])
def test_what_cannot_be_written_is_one_message(flag, corpus, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    flags = [*small_flags(corpus, tmp_path / "run"), flag, str(tmp_path / "file" / "inside")]
    assert main(["preview", *flags]) == 2
    assert f"{flag} {tmp_path}" in capsys.readouterr().err


def test_lengths_by_powers_of_two():
    rows = histogram(np.array([3, 4, 7, 8, 40]))
    assert [(row["from"], row["to"], row["texts"]) for row in rows] == [
        (2, 3, 1),
        (4, 7, 2),
        (8, 15, 1),
        (16, 31, 0),
        (32, 63, 1),
    ]


@pytest.mark.parametrize(
    "codec", [TokenCodec(300), TokenCodec(300, radix=256), TokenCodec(4096, token_size=2)], ids=repr
)
def test_noise_is_read_as_well_as_was_said(codec):
    counts = 1 + np.arange(codec.vocab_size)[::-1] ** 2
    draw = np.random.default_rng(0)
    ids = torch.from_numpy(draw.choice(codec.vocab_size, 20_000, p=counts / counts.sum()))
    for share in (0.99, 0.5, 0.1):
        t = noise_at(codec, counts, share)
        assert read_share(codec, counts, t) == pytest.approx(share, abs=1e-6)
        torch.manual_seed(0)
        noisy, _ = add_noise_to_timestep(codec.codebook[ids], torch.full((len(ids),), t))
        read, _ = codec.nearest(noisy / (1 - t / 1000))
        assert float((read == ids).float().mean()) == pytest.approx(share, abs=0.02)


def test_a_code_that_is_guessed_more_often_has_no_such_noise():
    assert noise_at(TokenCodec(8), np.ones(8), 0.01) is None
