"""A stream reads every training text once an epoch, goes on from any place, and holds no more for more texts."""

import contextlib
import gzip
import itertools
import json
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from ds_tokimg.data import files, stream, tokenise
from ds_tokimg.data.corpus import read_texts
from ds_tokimg.data.dataset import TokenImageDataset
from ds_tokimg.data.records import ReadOptions
from ds_tokimg.data.sources import find_all
from ds_tokimg.data.stream import Place, Sampled, TextStream, stream_of
from ds_tokimg.data.tokenise import Settings
from ds_tokimg.errors import UserError
from ds_tokimg.tokens.tokenizer import train_tokenizer

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture(scope="module")
def tokenizer(corpus):
    return train_tokenizer(read_texts(corpus), 300)


@pytest.fixture
def small(monkeypatch):
    """Groups and blocks of about 1000 bytes, windows of 2000 tokens, a sample of 4000 bytes."""
    monkeypatch.setattr(files, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(tokenise, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(stream, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(stream, "WINDOW_TOKENS", 2000)
    monkeypatch.setattr(stream, "SAMPLE_BYTES", 4000)


def opened(path, tokenizer, **options) -> TextStream:
    read = options.pop("read", ReadOptions())
    options = {"max_tokens": 64, "img_size": 16, "split": "train"} | options
    sample = TokenImageDataset(path, tokenizer, read=read, load=Sampled(), **options)
    settings = Settings(False, options.get("enable_condition", False))
    return stream_of(sample, find_all(path, read), tokenizer, settings, seed=1)


def epoch_of(texts: TextStream, epoch: int = 0, ahead: bool = True) -> list[TokenImageDataset]:
    """The windows of an epoch."""
    found = []
    with contextlib.closing(texts._windows(Place(epoch=epoch), ahead)) as windows:
        for dataset, begin, _ in windows:
            if begin.epoch > epoch:
                return found
            found += [dataset] if dataset is not None else []
    raise AssertionError


def hashes_of(windows: list[TokenImageDataset]) -> list[int]:
    return np.concatenate([dataset.hashes for dataset in windows]).tolist()


def first(texts: TextStream, count: int, place: Place = Place(), ahead: bool = True) -> list:  # noqa: B008
    """(tokens of each sample, place) of train batches of 8."""
    with contextlib.closing(texts.batches(place, 8, ahead)) as batches:
        return [
            ([data.ids(int(i)).tolist() for i in samples], place)
            for data, samples, place in itertools.islice(batches, count)
        ]


def test_an_epoch_has_every_training_text_once_and_no_held_out_one(small, corpus, tokenizer):
    texts, whole = opened(corpus, tokenizer), TokenImageDataset(corpus, tokenizer, split="all")
    held_out = TokenImageDataset(corpus, tokenizer, split="eval", load=Sampled(), max_tokens=64, img_size=16)
    limit = texts.sample.held_out_below
    windows = epoch_of(texts)
    assert len(windows) > 3 and texts.sample.corpus.share < 0.5
    seen = hashes_of(windows)
    assert sorted(seen) == sorted(h for h in whole.hashes.tolist() if h >= limit)
    assert len(held_out) and not set(seen) & set(held_out.hashes.tolist())
    again = hashes_of(epoch_of(texts, 1))
    assert sorted(again) == sorted(seen) and again != seen


def test_held_out_texts_are_those_of_the_cached_corpus(corpus, tokenizer):
    streamed = TokenImageDataset(corpus, tokenizer, split="eval", load=Sampled())
    assert streamed.hashes.tolist() == TokenImageDataset(corpus, tokenizer, split="eval").hashes.tolist()


@pytest.mark.parametrize("ending", [".txt", ".txt.gz"])
def test_every_place_leads_to_the_same_batches(small, ending, corpus, tokenizer, tmp_path):
    """A packed file is one group, and places are inside it."""
    path = tmp_path / f"texts{ending}"
    path.write_bytes(gzip.compress(corpus.read_bytes()) if ending.endswith("gz") else corpus.read_bytes())
    texts = opened(path, tokenizer)
    straight = first(texts, 40)
    assert straight[-1][1].epoch >= 1 and len({place.window for _, place in straight}) > 6
    for begun in range(0, 39, 7):
        place = Place(*json.loads(json.dumps(straight[begun][1])))
        assert first(opened(path, tokenizer), 2, place, ahead=begun % 2 == 0) == straight[begun + 1 : begun + 3]


def test_prompts_stay_apart(tmp_path, tokenizer):
    """One window: the images of the cached corpus, with their conditions."""
    records = [{"prompt": f"say {i}", "answer": "the cat " * i} for i in range(1, 40)] + ["plain text"]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    options = {"enable_condition": True, "max_tokens": 64, "img_size": 16, "split": "train"}
    (window,), cached = epoch_of(opened(path, tokenizer, **options)), TokenImageDataset(path, tokenizer, **options)
    assert len(window) == len(cached) > 40 and window.prompt_lengths.any()
    for i in range(len(cached)):
        assert np.array_equal(window.ids(i), cached.ids(i))
        assert np.array_equal(window.prompt_ids(i), cached.prompt_ids(i))


def test_a_validation_split_is_not_streamed_and_its_train_split_is_whole(small, tmp_path, tokenizer):
    (tmp_path / "train.txt").write_text("".join(f"a text for training {i}\n" for i in range(200)))
    (tmp_path / "validation.txt").write_text("".join(f"held out {i}\n" for i in range(30)))
    seen = hashes_of(epoch_of(opened(tmp_path, tokenizer)))
    held_out = TokenImageDataset(tmp_path, tokenizer, split="eval", load=Sampled())
    assert len(set(seen)) == 200 and not set(seen) & set(held_out.hashes.tolist()) and held_out.num_documents == 30


def test_the_images_of_an_epoch_are_about_what_the_sample_says(small, corpus, tokenizer):
    texts = opened(corpus, tokenizer)
    counted = sum(map(len, epoch_of(texts)))
    assert 0.8 < texts.images / counted < 1.25
    assert "of a sample" in texts.sample.notes[0] and f"about {texts.images:,}" in texts.notes[0]


def test_memory_does_not_grow_with_the_corpus(small, corpus, tokenizer, tmp_path):
    def peak(times: int) -> int:
        path = tmp_path / f"{times}.txt"
        path.write_bytes(corpus.read_bytes() * times)
        texts, most = opened(path, tokenizer), 0
        tracemalloc.start()
        with contextlib.closing(texts.batches(Place(), 8)) as batches:
            for _, _, place in batches:
                if place.epoch:
                    break
                most = max(most, pa.total_allocated_bytes())
        python = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most + python

    peak(1)  # what libraries keep is taken now
    one, eight = peak(1), peak(8)
    assert eight < 1.5 * one


def test_other_texts_have_another_fingerprint(small, corpus, tokenizer, tmp_path):
    def fingerprint(name: str, content: bytes):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.txt").write_bytes(content)
        return opened(tmp_path / name / "x.txt", tokenizer).sample.corpus.fingerprint

    content = corpus.read_bytes()
    one = fingerprint("a", content)
    assert fingerprint("b", content) == one
    assert fingerprint("c", content + b"one more\n").texts != one.texts
    assert fingerprint("d", content.replace(b"the", b"thy", 1)).texts != one.texts


def test_a_bad_record_behind_the_sample_is_named(small, corpus, tokenizer, tmp_path):
    lines = [json.dumps(line) for line in corpus.read_text().splitlines()]
    lines[150] = '{"text": 3}'
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(lines) + "\n")
    texts = opened(path, tokenizer)
    with pytest.raises(UserError, match=r"x\.jsonl, line 151: .*must be a string"):
        epoch_of(texts)
    skipping = opened(path, tokenizer, read=ReadOptions(skip_bad_records=True))
    assert len(hashes_of(epoch_of(skipping))) > 300


def test_weights_are_refused(corpus, tokenizer, tmp_path):
    other = Path(tmp_path / "other.txt")
    other.write_text("some\nother\ntexts\n")
    with pytest.raises(UserError, match="--streaming reads all its paths as one corpus"):
        opened([f"{corpus}:1", f"{other}:2"], tokenizer)
    assert len(set(hashes_of(epoch_of(opened([corpus, other], tokenizer))))) > 350


def test_an_empty_corpus_is_refused(tmp_path, tokenizer):
    (tmp_path / "x.txt").write_text("\n\n")
    with pytest.raises(UserError, match="is empty"):
        opened(tmp_path / "x.txt", tokenizer)
