"""Where texts end and how they go on: end of text, stop texts, lengths, images that are full, texts in pieces."""

import re
from dataclasses import replace

import pytest

from ds_tokimg.errors import UserError
from ds_tokimg.inference import sampler, texts
from ds_tokimg.inference.loading import load_trained
from ds_tokimg.inference.options import SamplingOptions
from ds_tokimg.inference.texts import TextStream, find_end, generate
from tests.support.exports import write_export

KINDS = {
    "left-to-right": {"block_size": 1},
    "late": {"block_size": 1, "noisy_depth": 1, "patch_size": 2},
    "at-once": {},
    "raster": {"block_size": 2, "layout": "raster"},
    "answers": {"enable_condition": True, "block_size": 1},
}
ROOM = 64  # tokens of an image


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports")
    return {kind: load_trained(str(write_export(folder / kind, **shape))) for kind, shape in KINDS.items()}


def options(**values) -> SamplingOptions:
    return SamplingOptions(**{"steps": 2} | values)


def ended_by(trained, token: int):
    """The same model, whose end-of-text token is another: random weights would end texts by chance."""
    return replace(trained, format=replace(trained.format, eos_id=token))


def endless(trained):
    return ended_by(trained, 10**6)


@pytest.fixture(scope="module")
def ending(models):
    """A left-to-right model whose texts end at different places."""
    trained = endless(models["left-to-right"])
    written = [text["token_ids"] for text in generate(trained, ["the cat", "a", None], options())]
    common = set(written[0]) & set(written[1]) & set(written[2])
    return ended_by(trained, max(common, key=lambda token: min(row.index(token) for row in written)))


# ---- ends ----


PROMPTS = ["the cat", "a", None, "the old house by the sea"]


def test_texts_that_end_are_those_of_texts_that_go_on_cut_there(ending):
    """And nothing else changes: not for a text that ends late, not by what is written beside it."""
    eos = ending.format.eos_id
    ended = generate(ending, PROMPTS, options())
    whole = generate(endless(ending), PROMPTS, options())
    lengths = set()
    for text, long in zip(ended, whole, strict=True):
        ids = long["token_ids"]
        assert text["token_ids"] == (ids[: ids.index(eos)] if eos in ids else ids)
        assert text["finish_reason"] == ("stop" if eos in ids else "length") and text["stop_reason"] is None
        lengths.add(text["num_tokens"])
    assert len(lengths) > 2
    for size in (1, 3):
        assert generate(ending, PROMPTS, options(batch_size=size)) == ended


def test_what_has_ended_is_written_no_further(ending):
    """Rows leave the batch when they end, and the writing stops with the last one."""
    rows, predict = [], ending.model.predict
    ending.model.predict = lambda patches, *args: rows.append(len(patches.noisy)) or predict(patches, *args)
    try:
        texts_ = generate(ending, [None] * 6, options())
    finally:
        del ending.model.predict
    slots = ending.layout.slots
    blocks = [-(-(text["num_tokens"] + 1) // slots) for text in texts_]
    expected = [sum(min(blocks_, ROOM // slots) > number for blocks_ in blocks) for number in range(max(blocks))]
    assert rows == [count for count in expected for _ in range(2) if count]
    assert rows[-1] < rows[0]


@pytest.mark.parametrize(
    ("stops", "text", "stop"),
    [
        (["sat"], "the cat ", "sat"),
        (["zebra", "at s"], "the c", "at s"),
        (["mat", "cat"], "the ", "cat"),
        (["t", "cat"], "", "t"),
        (["zebra"], "the cat sat", None),
    ],
)
def test_a_text_ends_before_its_stop(stops, text, stop, models):
    trained = models["at-once"]
    ids = trained.tokenizer("the cat sat")["input_ids"]
    end = find_end(trained, ids, stops, False)
    assert (end.text(trained), end.stop, end.is_known) == (text, stop, stop is not None)
    if stop is not None:
        assert stop in trained.tokenizer.decode(end.ids) and stop not in trained.tokenizer.decode(end.ids[:-1])


@pytest.mark.parametrize("kind", KINDS)
def test_stop_texts_cut_what_would_have_been_written(kind, models):
    trained = models[kind]
    plain = generate(trained, ["the cat"], options())[0]
    stop = re.findall("[ -~]{2}", plain["text"])[1]
    text = generate(trained, ["the cat"], options(stop=("no such text", stop)))[0]
    assert text["text"] == plain["text"][: plain["text"].index(stop)]
    assert (text["finish_reason"], text["stop_reason"]) == ("stop", stop)
    count = text["num_tokens"]
    assert text["token_ids"] == plain["token_ids"][:count] and count < plain["num_tokens"]


# ---- lengths ----


@pytest.mark.parametrize("kind", ["left-to-right", "late", "at-once", "raster"])
def test_a_text_goes_on_where_its_image_is_full(kind, models, capsys):
    """In another image, after the last half of the full one, as a continuation of that half would be written."""
    trained = endless(models[kind])
    (long,) = generate(trained, ["the cat"], options(max_new_tokens=100))
    assert long["num_tokens"] == 100 and long["finish_reason"] == "length"
    note = "an image holds 64 tokens: a text that is longer goes on in another one"
    assert note in capsys.readouterr().err
    start = len(trained.tokenizer("the cat")["input_ids"])
    (first,) = generate(trained, ["the cat"], options())
    assert long["token_ids"][: ROOM - start] == first["token_ids"] and not capsys.readouterr().err
    kept = long["image_ids"][:32]
    begin = 100 - (len(long["image_ids"]) - 32)
    assert long["token_ids"][begin - 32 : begin] == kept and long["token_ids"][begin:] == long["image_ids"][32:]
    for size in (1, 2):
        both = generate(trained, ["the cat", "a"], options(max_new_tokens=100, batch_size=size))
        assert both[0] == long and both[1]["num_tokens"] == 100


def test_other_images_have_other_noise(models):
    """A text whose halves are alike would else repeat itself."""
    (text,) = generate(endless(models["at-once"]), [None], options(max_new_tokens=160))
    parts = [text["token_ids"][start : start + 32] for start in (64, 96, 128)]
    assert parts[0] != parts[1] != parts[2] != parts[0]


@pytest.mark.parametrize("kind", ["left-to-right", "at-once"])
def test_of_a_prompt_that_is_too_long_the_last_half_image_is_seen(kind, models, capsys):
    trained = endless(models[kind])
    prompt = "the cat sat on a mat and the dog ran " * 9
    ids = trained.tokenizer(prompt)["input_ids"]
    (text,) = generate(trained, [prompt], options())
    said = capsys.readouterr().err
    assert f"has {len(ids)} tokens; an image holds 64: its last 32 are seen" in said and said.count("\n") == 1
    assert text["image_ids"][:32] == ids[-32:] and text["num_tokens"] == 32


def test_an_answer_has_one_image(models, capsys):
    trained = models["answers"]
    with pytest.raises(UserError, match="max_new_tokens is 300; an answer has one image, and that holds 256"):
        generate(trained, ["the sea?"], options(max_new_tokens=300))
    (text,) = generate(trained, ["the sea?"], options(max_new_tokens=40))
    assert len(text["image_ids"]) <= 40
    assert "answers had at most 32 tokens in training" in capsys.readouterr().err


def test_prompts_are_read_at_once_and_texts_are_as_if_read_one_by_one(models, monkeypatch):
    trained = endless(models["late"])
    prompts = ["the old house by the sea where it slept all day long and the cat", "the cat sat on a mat and a dog"]
    read, prefill = [], trained.model.prefill
    monkeypatch.setattr(trained.model, "prefill", lambda *args: read.append(args[1].shape[1]) or prefill(*args))
    together = generate(trained, prompts, options())
    assert max(read) > 1
    monkeypatch.setattr(sampler._Walk, "_prefill_known", lambda walk: 0)
    read.clear()
    assert generate(trained, prompts, options()) == together and set(read) == {1}


# ---- pieces ----


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("more", [{}, {"max_new_tokens": 20}, {"top_k": 5}, {"stop": ("e",)}], ids=str)
def test_pieces_are_the_text_of_generate(kind, more, models):
    trained = models[kind]
    if kind == "raster" and more == {"stop": ("e",)}:
        more = {"stop": ("a",)}
    written = generate(trained, ["the cat", "the sea"], options(**more))
    for place, prompt in enumerate(["the cat", "the sea"]):
        stream = TextStream(trained, prompt, options(**more), place)
        assert "".join(stream) == written[place]["text"]
        assert stream.result["token_ids"] == written[place]["token_ids"]
        assert stream.result["finish_reason"] == written[place]["finish_reason"]


@pytest.mark.parametrize("kind", ["left-to-right", "at-once"])
def test_pieces_go_on_where_an_image_is_full(kind, models):
    trained = endless(models[kind])
    pieces = list(TextStream(trained, "the cat", options(max_new_tokens=100)))
    assert "".join(pieces) == generate(trained, ["the cat"], options(max_new_tokens=100))[0]["text"]
    assert len(pieces) > 1 or kind == "at-once"  # whose first image may end in half a character


def test_what_may_become_a_stop_waits(models, monkeypatch):
    trained = models["left-to-right"]
    ids = trained.tokenizer("a cat sat on the sea")["input_ids"]
    monkeypatch.setattr(texts, "sample_stream", lambda *args: ([*ids[: n + 1]] for n in range(len(ids))))
    pieces = list(TextStream(trained, None, options(stop=("t on",))))
    assert "".join(pieces) == "a cat sa" and not any(piece.endswith("t on") for piece in pieces)
    assert "".join(TextStream(trained, None, options(stop=("the sea!",)))) == "a cat sat on the sea"
