"""The texts of a run are known again by what they are, wherever they lie and however they are cut into files."""

import json

import numpy as np
import pytest

from ds_tokimg.data import run_texts
from ds_tokimg.data.corpus import load_corpus
from ds_tokimg.data.dataset import TokenImageDataset
from ds_tokimg.data.records import ReadOptions
from ds_tokimg.data.run_texts import Known, RunTexts
from ds_tokimg.data.sources import find_all
from ds_tokimg.errors import UserError
from ds_tokimg.tokens.tokenizer import train_tokenizer
from tests.support.exports import word_tokenizer

LINES = [f"the old house number {i} by the sea" for i in range(200)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(LINES, 280)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


def written(folder, name: str, lines=LINES):
    path = folder / name
    path.parent.mkdir(exist_ok=True, parents=True)
    rows = [json.dumps({"text": line}) for line in lines] if name.endswith("jsonl") else lines
    path.write_text("\n".join(rows) + "\n")
    return path


def fingerprint(path, tokenizer, **options):
    return load_corpus(find_all(path), tokenizer, **options).fingerprint


def test_the_same_texts_have_one_fingerprint(tokenizer, tmp_path):
    """Another name, format, several files, several processes."""
    plain = fingerprint(written(tmp_path, "x.txt"), tokenizer)
    assert fingerprint(written(tmp_path / "other", "y.jsonl"), tokenizer) == plain
    written(tmp_path / "shards", "0.txt", LINES[:70])
    written(tmp_path / "shards", "1.jsonl", LINES[70:])
    assert fingerprint(tmp_path / "shards", tokenizer) == plain


@pytest.mark.parametrize(
    "change",
    [
        lambda lines: lines[::-1],
        lambda lines: [*lines, "one more"],
        lambda lines: lines[:-1],
        lambda lines: [*lines[:5], lines[5].replace("sea", "see"), *lines[6:]],
        lambda lines: [*lines[:5], lines[5] + lines[6], *lines[7:]],
    ],
)
def test_other_texts_have_another(change, tokenizer, tmp_path):
    texts = (
        fingerprint(written(tmp_path, "x.txt"), tokenizer),
        fingerprint(written(tmp_path, "y.txt", change(LINES)), tokenizer),
    )
    assert texts[0].texts != texts[1].texts and texts[0].tokens != texts[1].tokens


def test_the_same_words_with_other_tokens(tokenizer, tmp_path):
    """Another tokenizer; a message of another role, which only the template tells."""
    path, other = written(tmp_path, "x.txt"), train_tokenizer(LINES, 270)
    one, two = fingerprint(path, tokenizer), fingerprint(path, other)
    assert one.texts == two.texts and one.tokens != two.tokens
    chats = []
    for role in ("user", "system"):
        messages = [{"role": role, "content": "the house"}, {"role": "assistant", "content": "by the sea"}]
        chats.append(tmp_path / f"{role}.jsonl")
        chats[-1].write_text(json.dumps({"messages": messages}))
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    one, two = (fingerprint(chat, tokenizer, use_chat_template=True) for chat in chats)
    assert one.texts == two.texts and one.tokens != two.tokens


def run_of(path, tokenizer, **options) -> RunTexts:
    options = {"img_size": 16, "max_tokens": 64} | options
    return RunTexts.of(*(TokenImageDataset(path, tokenizer, split=split, **options) for split in ("train", "eval")))


def test_a_run_is_known_from_its_file(tokenizer, tmp_path):
    texts = run_of([f"{written(tmp_path, 'x.txt')}:3", f"{written(tmp_path, 'y.txt', LINES[:50])}:1"], tokenizer)
    (tmp_path / "data.json").write_text(texts.description())
    again = RunTexts.load(tmp_path / "data.json")
    assert again.weights == texts.weights == (0.75, 0.25)
    assert again.changes(texts) == texts.changes(again) == [] and again.known.all
    assert np.array_equal(again.known.hashes, texts.known.hashes)
    assert RunTexts.load(tmp_path / "none.json") is None


@pytest.mark.parametrize(
    ("harm", "problem"),
    [
        (lambda values: values | {"known": "?"}, "damaged"),
        (lambda values: values | {"known": values["known"][:-4]}, "damaged"),
        (lambda values: values | {"known": ""}, "it knows no text"),
        (lambda values: values | {"training": ["a"]}, "damaged"),
        (lambda values: values | {"weights": "a"}, "weights is 'a'"),
        (lambda values: values | {"format": 99}, "newer ds_tokimg"),
    ],
)
def test_a_bad_file_is_named(harm, problem, tokenizer, tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps(harm(json.loads(run_of(written(tmp_path, "x.txt"), tokenizer).description()))))
    with pytest.raises(UserError, match=f"data.json: .*{problem}"):
        RunTexts.load(path)


def test_what_has_changed_is_named(tokenizer, tmp_path):
    x, y = written(tmp_path, "x.txt"), written(tmp_path, "y.txt", LINES[:50])
    (tmp_path / "split").mkdir()
    written(tmp_path / "split", "train.txt")
    written(tmp_path / "split", "validation.txt", LINES[:9])
    run = run_of(x, tokenizer)
    assert run_of(written(tmp_path, "z.txt", [*LINES, "more"]), tokenizer).changes(run) == [
        "the training texts, or their order, are others"
    ]
    assert run_of(x, train_tokenizer(LINES, 270)).changes(run) == [
        "the training texts are the same, but become other tokens than they did"
    ]
    assert run_of(tmp_path / "split", tokenizer).changes(run) == ["the validation texts, or their order, are others"]
    weighted = run_of([f"{x}:1", f"{y}:1"], tokenizer)
    assert run_of([f"{x}:2", f"{y}:2"], tokenizer).changes(weighted) == []
    assert run_of([f"{x}:2", f"{y}:1"], tokenizer).changes(weighted) == [
        "the weights of the data paths are 0.666667 0.333333; the run has 0.5 0.5"
    ]
    assert run_of([x, y], tokenizer).changes(weighted) == [
        "the weights of the data paths are none; the run has 0.5 0.5"
    ]


# ---- how many texts are among those of a run ----


def hashes(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**64, count, dtype=np.uint64)


def test_few_texts_are_counted():
    trained, new = hashes(1000), hashes(50, seed=1)
    known = Known.of(np.concatenate([trained, trained[:10]]))
    assert known.all and len(known.hashes) == 1000
    assert known.count(np.concatenate([trained[:70], new, trained[:5]])) == 75
    assert known.count(new) == 0


def test_many_texts_are_estimated(monkeypatch):
    monkeypatch.setattr(run_texts, "MOST_KNOWN", 1000)
    threshold = np.uint64(2**64 // 20)  # what lies below is held out
    everything = hashes(40_000)
    trained, held_out = everything[everything >= threshold], everything[everything < threshold]
    known = Known.of(trained)
    assert not known.all and len(known.hashes) == 1000
    assert known.count(held_out) == 0 and known.counts(held_out)
    assert known.count(trained) == len(trained) and not known.counts(trained)
    mixed = np.concatenate([trained[:6000], hashes(6000, seed=1)])
    assert known.count(mixed) == pytest.approx(6000, rel=0.15)


def test_a_run_that_went_on_with_other_texts_knows_both(monkeypatch):
    first, second = hashes(600), hashes(700, seed=1)
    both = Known.of(first).joined(Known.of(second))
    assert both.all and both.count(np.concatenate([first, second])) == 1300
    monkeypatch.setattr(run_texts, "MOST_KNOWN", 500)
    both = Known.of(first).joined(Known.of(second))
    assert not both.all
    assert both.count(np.concatenate([first, second, hashes(1300, seed=2)])) == pytest.approx(1300, rel=0.15)


# ---- tokenizers that lose text ----


@pytest.mark.parametrize(
    ("lowercase", "lines", "lost"),
    [
        (False, ["the old house", "by the sea"] * 30, ""),
        (False, [*["the old house"] * 999, "the old dog", *["by the sea"] * 999], "'the old dog' becomes"),
        (True, ["The old house"] * 30, "'The old ho' becomes 'the old ho'"),
    ],
    ids=["nothing", "a-word", "capitals"],
)
def test_a_tokenizer_that_loses_text_is_found(lowercase, lines, lost, tmp_path):
    path = written(tmp_path, "x.txt", lines)
    for _ in range(2):  # built, and from the cache
        corpus = load_corpus(find_all(path, ReadOptions(document="line")), word_tokenizer(lowercase))
        assert corpus.loses_text == bool(lost)
        told = [note for note in corpus.notes if "loses text" in note]
        assert len(told) == bool(lost) and all(lost in note for note in told)


def test_byte_level_tokenizers_lose_nothing(tokenizer, tmp_path):
    lines = ["Ünïcödé \t  blanks ", " leading", "日本語 🙂", "e\u0301 decomposed", "ﬁ ligature", "the END"]
    assert not load_corpus(find_all(written(tmp_path, "x.txt", lines)), tokenizer).loses_text
