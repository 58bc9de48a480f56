"""The object of `load`: the texts of `generate`, the bits of `evaluate`, and one clear message for what cannot be."""

import json
import math
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from ds_tokimg import UserError, load
from ds_tokimg.__main__ import main
from ds_tokimg.inference import texts
from ds_tokimg.inference.options import SamplingOptions
from ds_tokimg.inference.texts import generate
from tests.support.exports import word_tokenizer, write_export

KINDS = {
    "left-to-right": {"block_size": 1},
    "at-once": {},
    "raster": {"block_size": 2, "layout": "raster"},
    "answers": {"enable_condition": True, "block_size": 1},
    "chat": {"enable_condition": True, "use_chat_template": True},
}


@pytest.fixture(scope="module", params=KINDS)
def export(request, tmp_path_factory):
    return write_export(tmp_path_factory.mktemp(request.param) / "export", **KINDS[request.param])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports")
    return {kind: write_export(folder / kind, **KINDS[kind]) for kind in ("left-to-right", "at-once", "answers")}


@pytest.mark.parametrize("prompt", [None, "the cat sat"])
@pytest.mark.parametrize("seed", [0, 3])
def test_it_writes_what_generate_writes_in_pieces(export, prompt, seed):
    lm = load(export)
    options = SamplingOptions(steps=2, seed=seed, max_new_tokens=40)
    expected = generate(lm.trained, [prompt], options)[0]["text"]
    pieces = list(lm.stream(prompt, 40, seed=seed, num_inference_steps=2))
    assert "".join(pieces) == expected == lm(prompt, 40, seed=seed, num_inference_steps=2)
    assert all(pieces) and (len(pieces) <= 1 or lm.trained.model.writing.block_size)


def test_writing_goes_on_while_one_reads_and_stops_at_the_end(folders):
    lm = load(folders["left-to-right"])
    evaluated, predict = [], lm.trained.model.predict
    lm.trained.model.predict = lambda *args: evaluated.append(1) or predict(*args)
    pieces = lm.stream("the cat", num_inference_steps=2)
    next(pieces)
    for_one_piece = len(evaluated)
    assert list(pieces) and len(evaluated) > for_one_piece
    first_token = generate(lm.trained, ["the cat"], SamplingOptions(steps=2))[0]["token_ids"][0]
    evaluated.clear()
    lm.trained.format = replace(lm.trained.format, eos_id=first_token)
    assert lm("the cat", num_inference_steps=2) == ""
    assert len(evaluated) <= for_one_piece


def test_characters_of_several_tokens_come_whole(folders, monkeypatch):
    lm = load(folders["left-to-right"])
    ids = lm.trained.tokenizer("Ä 鳥!")["input_ids"]
    assert len(ids) > len("Ä 鳥!")
    monkeypatch.setattr(texts, "sample_stream", lambda *args: (ids[: n + 1] for n in range(len(ids))))
    assert list(lm.stream()) == ["Ä", " ", "鳥", "!"]
    monkeypatch.setattr(texts, "sample_stream", lambda *args: iter([ids[:-2]]))
    assert list(lm.stream()) == ["Ä \ufffd"]


@pytest.mark.parametrize("kind", ["left-to-right", "at-once"])
def test_bits_are_those_of_evaluate(kind, folders, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    text = "the old dog ran to the sea " * 12  # longer than an image
    (tmp_path / "text.txt").write_text(text + "\n")
    files = ["--data_path", str(tmp_path / "text.txt"), "--json", str(tmp_path / "bits.json")]
    assert main(["evaluate", "--checkpoint", str(folders[kind]), *files]) == 0
    expected = json.loads((tmp_path / "bits.json").read_text())
    bits = load(folders[kind]).bits(text)
    assert (bits.tokens, bits.bytes) == (expected["tokens"], expected["bytes"])
    assert bits.per_token == pytest.approx(expected["bits_per_token"])
    assert bits.per_byte == pytest.approx(expected["bits_per_byte"])


@pytest.mark.parametrize(("text", "lost"), [("the old house by the sea", False), ("the old dog by the sea", True)])
def test_no_bits_per_byte_where_the_tokenizer_loses_text(text, lost, tmp_path, monkeypatch, capsys):
    """ "dog" is [UNK], which costs little, and so would the text."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = write_export(tmp_path / "export", tokenizer=word_tokenizer())
    (tmp_path / "text.txt").write_text(text)
    files = ["--data_path", str(tmp_path / "text.txt"), "--json", str(tmp_path / "bits.json")]
    assert main(["evaluate", "--checkpoint", str(folder), *files]) == 0
    printed, figures = capsys.readouterr().out, json.loads((tmp_path / "bits.json").read_text())
    assert ("'the old dog by th' becomes" in printed) == ("bits per byte not given" in printed) == lost
    assert (figures["bits_per_byte"] is None) == lost and figures["bits_per_token"] > 0
    bits = load(folder).bits(text)
    assert math.isnan(bits.per_byte) == lost and bits.per_token == pytest.approx(figures["bits_per_token"])


@pytest.mark.parametrize("chat", [False, True])
def test_bits_of_an_answer_are_those_of_evaluate(chat, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = write_export(tmp_path / "export", enable_condition=True, use_chat_template=chat)
    (tmp_path / "pair.jsonl").write_text(json.dumps({"prompt": "the sea?", "answer": "it slept all day"}))
    files = ["--data_path", str(tmp_path / "pair.jsonl"), "--json", str(tmp_path / "bits.json")]
    assert main(["evaluate", "--checkpoint", str(folder), *files]) == 0
    expected = json.loads((tmp_path / "bits.json").read_text())
    bits = load(folder).bits("it slept all day", prompt="the sea?")
    assert bits.tokens == expected["tokens"]
    assert bits.per_token == pytest.approx(expected["bits_per_token"])


def test_options_and_texts_of_many_prompts(folders):
    """`lm.generate` gives what `lm` gives one by one, and why each text ended."""
    lm = load(folders["left-to-right"])
    sampling = {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "num_inference_steps": 2, "seed": 3}
    plain = lm("the cat", 40, **sampling)
    assert plain != lm("the cat", 40, num_inference_steps=2, seed=3)
    first, second = lm.generate(["the cat", None], 40, **sampling)
    assert first["text"] == plain and second["text"] != plain
    assert set(first) == {"prompt", "text", "token_ids", "num_tokens", "finish_reason", "stop_reason"}
    piece = re.findall("[ -~]{2}", plain)[1]
    for stop in (piece, [piece, "zebra"]):
        assert lm("the cat", 40, stop=stop, **sampling) == plain[: plain.index(piece)]


def test_gaps_answers_and_pictures(folders):
    lm = load(folders["at-once"])
    filled = lm.infill("the old <gap:3> by the sea", num_inference_steps=2)
    assert filled.startswith("the old ") and filled.endswith(" by the sea")
    picture = lm.image("the old house by the sea")
    assert picture.mode == "RGB" and len(picture.getcolors(1 << 16)) > 5
    answering = load(folders["answers"])
    assert answering.answer("the sea?", seed=1) == answering("the sea?", seed=1)


@pytest.mark.parametrize(
    ("kind", "call", "message"),
    [
        ("at-once", lambda lm: lm.answer("the sea?"), "without conditions"),
        ("at-once", lambda lm: lm("the sea", guidance_scale=2.0), "without conditions"),
        ("at-once", lambda lm: lm.bits("it", prompt="the sea?"), "without conditions"),
        ("at-once", lambda lm: lm.bits(""), "empty"),
        ("at-once", lambda lm: lm.infill("no gap"), "<gap:8>"),
        ("at-once", lambda lm: lm("the sea", num_inference_steps=0), "steps"),
        ("at-once", lambda lm: lm("the sea", max_new_tokens=0), "max_new_tokens is 0"),
        ("at-once", lambda lm: lm("the sea", temperature=-1), "temperature is -1"),
        (
            "at-once",
            lambda lm: lm("the sea", temprature=0.5),
            "unknown option 'temprature'; did you mean 'temperature'",
        ),
        ("at-once", lambda lm: lm("the sea", steps=2), "unknown option 'steps'"),
        ("at-once", lambda lm: lm("the sea", stop=""), "stop is empty"),
        ("at-once", lambda lm: lm.infill("the <gap:3>", stop="a"), "leave it out"),
        ("answers", lambda lm: lm(guidance_scale=2.0), "there is no prompt to follow"),
        ("at-once", lambda lm: lm.image("the sea " * 999), "shorten"),
        ("answers", lambda lm: lm.infill("the <gap:3>"), "fills no gaps"),
    ],
)
def test_mistakes(kind, call, message, folders):
    with pytest.raises(UserError, match=message):
        call(load(folders[kind]))


@pytest.mark.parametrize(
    ("path", "device", "message"),
    [("no_such_folder", "auto", "no such folder"), (".", "auto", "neither a checkpoint"), (None, "gpu9", "gpu9")],
)
def test_what_cannot_be_loaded(path, device, message, folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        load(path or folders["at-once"], device)


def test_a_name_of_the_hub_is_downloaded_once(folders, tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name: str(folders["at-once"]))
    assert load("someone/model").trained.path == folders["at-once"]
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name: 1 / 0)
    with pytest.raises(UserError, match="not found on the Hugging Face hub"):
        load("someone/model")


def test_loading_needs_no_deepspeed(folders):
    program = "import sys, ds_tokimg; ds_tokimg.load(sys.argv[1]); print('deepspeed' in sys.modules)"
    printed = subprocess.run([sys.executable, "-c", program, folders["at-once"]], capture_output=True, text=True)
    assert printed.stdout.strip() == "False", printed.stderr


CALLS = {
    "load(None)": lambda lm: load(None),
    "device is 3: expected a text": lambda lm: load("x", device=3),
    "weights is 'last': expected one of ema, trained": lambda lm: load("x", weights="last"),
    "the prompt is 5: expected a text": lambda lm: lm(5),
    "the prompt is ['a']: expected a text": lambda lm: lm(["a"]),
    "prompts is 'some text': expected a list of texts": lambda lm: lm.generate("some text"),
    "the prompt is 3: expected a text": lambda lm: lm.generate(["a", 3]),
    "the text is None: expected a text": lambda lm: lm.bits(None),
    "the text is b'a': expected a text": lambda lm: lm.image(b"a"),
    "the text is 1: expected a text": lambda lm: lm.infill(1),
    "top_k is 1.5; it must be a whole number or None": lambda lm: lm(top_k=1.5),
    "seed is 'a'; it must be a whole number": lambda lm: lm(seed="a"),
    "temperature is '1'; it must be a number": lambda lm: lm(temperature="1"),
    "num_inference_steps is True; it must be a whole number or None": lambda lm: lm(num_inference_steps=True),
    "max_new_tokens is 2.0; it must be a whole number or None": lambda lm: lm("a", 2.0),
    "stop is (1,); it must be a text, or several": lambda lm: lm(stop=[1]),
    "stop is 7; it must be a text, or several": lambda lm: lm(stop=7),
    "unknown option 'topk'; did you mean 'top_k'? (there are seed,": lambda lm: lm(topk=3),
}


@pytest.mark.parametrize("words", CALLS)
def test_a_value_of_another_type_is_one_clear_sentence(words, folders):
    lm = load(folders["left-to-right"])
    with pytest.raises(UserError, match=re.escape(words)):
        CALLS[words](lm)


def test_numbers_of_numpy_are_numbers(folders):
    lm = load(folders["left-to-right"])
    assert lm("the cat", 4, seed=np.int64(3), top_k=np.int32(5)) == lm("the cat", 4, seed=3, top_k=5)


def test_it_says_in_a_line_what_it_is(folders):
    words = repr(load(folders["left-to-right"], device="cpu"))
    assert "\n" not in words and len(words) < 300
    assert str(folders["left-to-right"]) in words and "writes blocks of 1 patch from left to right" in words
    assert "answers prompts, on cpu" in repr(load(folders["answers"], device="cpu"))
