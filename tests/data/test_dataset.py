"""TokenImageDataset: samples against a plain reimplementation from the texts."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from ds_tokimg.data import corpus as corpora
from ds_tokimg.data.dataset import TokenImageDataset
from ds_tokimg.errors import UserError
from ds_tokimg.tokens.tokenizer import encode, load_tokenizer, train_tokenizer

EOS = 0


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["text and more text, line after line, words and words"] * 9, 300)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def texts() -> list[str]:
    return [f"line {i}: " + "words and " * (i * 7 % 23) for i in range(400)]


@pytest.fixture
def data(tmp_path, texts) -> Path:
    path = tmp_path / "data.txt"
    path.write_text("\n".join(texts))
    return path


def with_eos(tokenizer, text: str) -> list[int]:
    return [*encode(tokenizer, [text])[0].tolist(), EOS]


def samples(dataset) -> list[list[int]]:
    return [dataset.ids(i).tolist() for i in range(len(dataset))]


def chunks(ids: list[int], size: int) -> list[list[int]]:
    return [ids[i : i + size] for i in range(0, len(ids), size)]


def test_packed_images_are_full_and_hold_every_document(data, texts, tokenizer):
    dataset = TokenImageDataset(data, tokenizer, img_size=16)
    stream = [token for text in texts for token in with_eos(tokenizer, text)]
    assert samples(dataset) == chunks(stream, 256)
    assert dataset.lengths.tolist() == [len(s) for s in samples(dataset)]
    assert dataset.lengths[:-1].min() == dataset.max_tokens == 256
    assert (dataset.num_tokens, dataset.num_documents) == (len(stream), len(texts))
    assert dataset.num_bytes == sum(len(text.encode()) for text in texts)


def test_without_packing_an_image_holds_one_text_and_long_ones_are_cut_not_dropped(data, texts, tokenizer):
    dataset = TokenImageDataset(data, tokenizer, img_size=16, max_tokens=20, packing=False)
    assert samples(dataset) == [part for text in texts for part in chunks(with_eos(tokenizer, text), 20)]
    assert dataset.lengths.tolist() == [len(s) for s in samples(dataset)]
    assert dataset.lengths.min() >= 1 and dataset.lengths.max() == 20


@pytest.mark.parametrize("packing", [True, False])
def test_splits_share_no_document_and_lose_none(data, texts, tokenizer, packing):
    options = {"img_size": 16, "packing": packing, "eval_fraction": 0.2}
    train, held_out = (TokenImageDataset(data, tokenizer, split=s, **options) for s in ("train", "eval"))
    whole = TokenImageDataset(data, tokenizer, split="all", **options)
    documents = [{tuple(d) for d in _documents(dataset)} for dataset in (train, held_out, whole)]
    assert documents[0].isdisjoint(documents[1])
    assert documents[0] | documents[1] == documents[2] == {tuple(with_eos(tokenizer, t)) for t in texts}
    assert 40 < held_out.num_documents < 120
    assert train.num_tokens + held_out.num_tokens == whole.num_tokens
    assert train.num_bytes + held_out.num_bytes == whole.num_bytes


def _documents(dataset) -> list[list[int]]:
    stream = [token for sample in samples(dataset) for token in sample]
    ends = [i + 1 for i, token in enumerate(stream) if token == EOS]
    return [stream[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def test_a_document_keeps_its_split_when_others_and_the_tokenizer_change(data, texts, tokenizer, tmp_path):
    def held_out(path, tokenizer) -> set[str]:
        dataset = TokenImageDataset(path, tokenizer, img_size=16, split="eval", eval_fraction=0.2)
        return {tokenizer.decode(d[:-1]) for d in _documents(dataset)}

    shorter = tmp_path / "shorter.txt"
    shorter.write_text("\n".join(reversed(texts[:300])))
    other = train_tokenizer(["quite different"] * 4, 260)
    assert held_out(shorter, other) == held_out(data, tokenizer) & set(texts[:300])


def test_a_small_corpus_still_gives_a_validation_text(tokenizer, tmp_path):
    path = tmp_path / "data.txt"
    path.write_text("one\ntwo\n")
    sizes = {
        split: TokenImageDataset(path, tokenizer, split=split, eval_fraction=1e-9).num_documents
        for split in ("train", "eval")
    }
    assert sizes == {"train": 1, "eval": 1}
    path.write_text("one and only\n")
    assert len(TokenImageDataset(path, tokenizer)) == 1
    assert len(TokenImageDataset(path, tokenizer, split="train", eval_fraction=0)) == 1
    assert len(TokenImageDataset(path, tokenizer, split="eval", eval_fraction=0)) == 0
    for split in ("train", "eval"):
        with pytest.raises(UserError, match=r"cannot be split.*--eval_data_path.*--eval_fraction 0"):
            TokenImageDataset(path, tokenizer, split=split)
    empty = TokenImageDataset(path, tokenizer, split="eval", eval_fraction=0)
    assert (len(empty), empty.num_tokens, empty.num_bytes, list(empty.token_stream())) == (0, 0, 0, [])


@pytest.mark.parametrize(("layout", "token_size"), [("patch", 1), ("raster", 1), ("patch", 2), ("raster", 4)])
def test_images_decode_to_the_ids(data, tokenizer, layout, token_size):
    dataset = TokenImageDataset(data, tokenizer, img_size=16, layout=layout, token_size=token_size)
    for i in (0, len(dataset) // 2, len(dataset) - 1):
        sample = dataset[i]
        assert sample["clean"].shape == (3, 16, 16) and sample["mask"].shape == (16, 16)
        assert sample["clean"].dtype == sample["mask"].dtype == torch.float32
        assert sample["mask"].sum() == dataset.lengths[i] * token_size**2
        decoded = dataset.codec.decode(sample["clean"], sample["mask"], layout, 4)
        assert decoded == dataset.ids(i).tolist()


def test_samples_fit_the_default_collate_of_a_data_loader(data, tokenizer):
    loader = torch.utils.data.DataLoader(TokenImageDataset(data, tokenizer, img_size=16), batch_size=3)
    batch = next(iter(loader))
    assert batch["clean"].shape == (3, 3, 16, 16) and batch["mask"].shape == (3, 16, 16)


def test_indices_count_from_either_end(data, tokenizer):
    dataset = TokenImageDataset(data, tokenizer, img_size=16)
    assert torch.equal(dataset[-1]["clean"], dataset[len(dataset) - 1]["clean"])
    for i in (len(dataset), -len(dataset) - 1):
        with pytest.raises(IndexError):
            dataset[i]
    assert sum(1 for _ in dataset) == len(dataset)


# ---- several paths ----


@pytest.fixture
def two_paths(tmp_path) -> list[Path]:
    paths = [tmp_path / "large.txt", tmp_path / "small.txt"]
    paths[0].write_text("".join(f"large {i} " + "word " * 20 + "\n" for i in range(90)))
    paths[1].write_text("".join(f"small {i} " + "small " * 20 + "\n" for i in range(10)))
    return paths


@pytest.mark.parametrize("packing", [True, False])
def test_paths_without_weights_are_one_corpus_in_images_of_their_own(two_paths, tokenizer, packing):
    options = {"img_size": 16, "max_tokens": 50, "packing": packing}
    both = TokenImageDataset(two_paths, tokenizer, **options)
    alone = [TokenImageDataset(path, tokenizer, **options) for path in two_paths]
    assert samples(both) == [*samples(alone[0]), *samples(alone[1])]
    assert both.mixture is None
    with pytest.raises(IndexError):
        both.ids(len(both))


def test_splits_of_several_paths_are_those_of_their_texts(two_paths, tokenizer):
    options = {"img_size": 16, "eval_fraction": 0.2, "packing": False}
    for split in ("train", "eval"):
        both = TokenImageDataset(two_paths, tokenizer, split=split, **options)
        alone = [TokenImageDataset(path, tokenizer, split=split, **options) for path in two_paths]
        assert samples(both) == [*samples(alone[0]), *samples(alone[1])]
    # A path of one text, none of which is held out, is no mistake beside another.
    two_paths[1].write_text("one text\n")
    sizes = [TokenImageDataset(two_paths, tokenizer, split=s, **options).num_documents for s in ("train", "eval")]
    assert sum(sizes) == 91


@pytest.mark.parametrize("condition", [False, True])
def test_weights_are_shares_of_the_images_of_an_epoch(two_paths, tokenizer, tmp_path, condition):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps({"prompt": f"q{i}", "answer": f"pairs {i}"}) + "\n" for i in range(30)))
    paths = [f"{two_paths[0]}:1", f"{two_paths[1]}:2", f"{pairs}:1"]
    options = {"img_size": 16, "max_tokens": 50, "enable_condition": condition}
    dataset = TokenImageDataset(paths, tokenizer, **options)
    drawn = dataset.mixture.draw(seed=1, epoch=3)
    assert len(drawn) == len(dataset) and len(set(drawn.tolist())) == len(drawn)
    seen = [tokenizer.decode(dataset.ids(int(i))) for i in drawn]
    small = sum("small" in text for text in seen)
    assert abs(small - len(dataset) / 2) <= 1
    if condition:
        prompted = [i for i in drawn.tolist() if len(dataset.prompt_ids(i))]
        assert abs(len(prompted) - len(dataset) / 4) <= 1
    assert max(drawn) >= len(dataset)  # a text that is seen again has a number of its own
    assert TokenImageDataset(paths, tokenizer, split="eval", **options).mixture is None


def test_a_path_with_a_weight_and_nothing_to_train_on(two_paths, tokenizer):
    held_out = TokenImageDataset(two_paths[1], tokenizer, split="eval", eval_fraction=0.3, packing=False)
    two_paths[1].write_text(tokenizer.decode(held_out.ids(0)[:-1]) + "\n")
    paths = [f"{two_paths[0]}:1", f"{two_paths[1]}:1"]
    with pytest.raises(UserError, match=r"no text of .*small\.txt is left to train on"):
        TokenImageDataset(paths, tokenizer, split="train", eval_fraction=0.3)


def test_a_repository_trains_and_validates_on_its_own_splits(tokenizer, tmp_path):
    for split, count in (("train", 30), ("validation", 7), ("test", 5)):
        (tmp_path / "repository").mkdir(exist_ok=True)
        (tmp_path / "repository" / f"{split}.txt").write_text("".join(f"{split} {i}\n" for i in range(count)))
    other = tmp_path / "other.txt"
    other.write_text("".join(f"other {i}\n" for i in range(100)))

    def words(path, split, **options) -> list[str]:
        dataset = TokenImageDataset(path, tokenizer, img_size=16, split=split, **options)
        return [tokenizer.decode(d[:-1]) for d in _documents(dataset)]

    repository = tmp_path / "repository"
    assert words(repository, "train") == words(repository, "all") == [f"train {i}" for i in range(30)]
    assert words(repository, "eval") == [f"validation {i}" for i in range(7)]
    assert words(repository, "train", eval_fraction=0) == words(repository, "all")
    assert words(repository, "eval", eval_fraction=0) == []
    held_out = words([repository, other], "eval", eval_fraction=0.2)
    assert held_out[:7] == words(repository, "eval") and 5 < len(held_out) - 7 < 40
    trained = words([repository, other], "train", eval_fraction=0.2)
    assert trained[:30] == words(repository, "train") and not set(trained) & set(held_out)
    notes = TokenImageDataset(repository, tokenizer, img_size=16).notes[:3]
    assert [note.split(": ")[1].split(" (")[0] for note in notes] == [
        "trains on its train split", "its validation split is used for validation", "neither trained nor validated on"
    ]  # fmt: skip


# ---- conditions ----

PAIRS = [("q" * n, "answer " * m) for n, m in ((1, 1), (3, 40), (90, 2), (40, 30))]


@pytest.fixture
def mixed(tmp_path) -> Path:
    path = tmp_path / "mixed.jsonl"
    rows = [{"prompt": p, "answer": a} for p, a in PAIRS]
    rows[1:1] = [{"text": "plain text " * 9}, "more plain text"]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def conditioned(tokenizer, prompt: str, answer: str, size: int) -> list[tuple[list[int], list[int]]]:
    """(prompt ids, ids) of each image of a pair."""
    ids, context = with_eos(tokenizer, answer), encode(tokenizer, [prompt])[0].tolist()
    parts = []
    for part in chunks(ids, size):
        parts.append((context[-size:], part))
        context = context + part
    return parts


def test_conditions_and_packed_texts(mixed, tokenizer):
    dataset = TokenImageDataset(mixed, tokenizer, img_size=16, max_tokens=24, enable_condition=True)
    plain = with_eos(tokenizer, "plain text " * 9) + with_eos(tokenizer, "more plain text")
    expected = [([], part) for part in chunks(plain, 24)]
    expected += [part for pair in PAIRS for part in conditioned(tokenizer, *pair, 24)]
    assert [(dataset.prompt_ids(i).tolist(), dataset.ids(i).tolist()) for i in range(len(dataset))] == expected
    assert dataset.prompt_lengths.tolist() == [len(prompt) for prompt, _ in expected]
    assert dataset.lengths.tolist() == [len(ids) for _, ids in expected]
    assert dataset.num_bytes == len("plain text " * 9 + "more plain text") + sum(len(a) for _, a in PAIRS)


def test_conditions_without_packing_keep_the_order_of_the_records(mixed, tokenizer):
    dataset = TokenImageDataset(mixed, tokenizer, enable_condition=True, packing=False)
    prompts = [PAIRS[0][0], "", "", *(p for p, _ in PAIRS[1:])]
    assert [tokenizer.decode(dataset.prompt_ids(i)) for i in range(len(dataset))] == prompts


def test_prompts_that_are_cut_are_counted(mixed, tokenizer):
    options = {"img_size": 16, "enable_condition": True}
    (note,) = TokenImageDataset(mixed, tokenizer, max_tokens=24, **options).notes
    assert note == "2 of 4 prompts are longer than max_tokens, 24; of these the last 24 tokens are seen"
    assert TokenImageDataset(mixed, tokenizer, max_tokens=120, **options).notes == []
    assert TokenImageDataset(mixed, tokenizer, img_size=16, max_tokens=24).notes == []


def test_condition_images(mixed, tokenizer):
    dataset = TokenImageDataset(mixed, tokenizer, img_size=16, enable_condition=True, packing=False)
    first, plain = dataset[0], dataset[1]
    assert dataset.codec.decode(first["condition"], first["condition_mask"]) == dataset.prompt_ids(0).tolist()
    assert plain["condition_mask"].sum() == 0
    without = TokenImageDataset(mixed, tokenizer, img_size=16)
    assert set(without[0]) == {"clean", "mask"} and len(without.prompt_ids(0)) == 0
    assert without.prompt_lengths.max() == 0


# ---- what else the trainer needs ----


def test_token_counts_and_stream(data, tokenizer, monkeypatch):
    dataset = TokenImageDataset(data, tokenizer, img_size=16, split="train")
    stream = np.concatenate([dataset.ids(i) for i in range(len(dataset))])
    monkeypatch.setattr("ds_tokimg.data.dataset._PIECE", 1000)
    pieces = list(dataset.token_stream())
    assert len(pieces) == -(-len(stream) // 1000) and np.array_equal(np.concatenate(pieces), stream)
    assert np.array_equal(dataset.token_counts(), np.bincount(stream, minlength=dataset.codec.vocab_size))


def test_a_second_data_set_tokenises_nothing(data, tokenizer, monkeypatch):
    TokenImageDataset(data, tokenizer)
    monkeypatch.setattr(corpora, "_build", lambda *_: pytest.fail("tokenised again"))
    TokenImageDataset(data, tokenizer, img_size=16, packing=False, split="eval", max_tokens=5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens is 0, but an image holds 1 to 4096"),
        ({"max_tokens": 257, "img_size": 16}, "max_tokens is 257, but an image holds 1 to 256"),
        ({"img_size": 0}, "must be at least 1"),
        ({"img_size": 30}, "img_size 30 is not a multiple of patch_size 4"),
        ({"token_size": 3}, "patch_size 4 is not a multiple of token_size 3"),
        ({"layout": "spiral"}, "unknown layout 'spiral'; available: patch, raster"),
        ({"radix": 3}, "use at least"),
        ({"palette": [0, 1]}, "palette must be a permutation"),
        ({"split": "test"}, "unknown split 'test'; available: all, train, eval"),
        ({"split": "eval", "eval_fraction": 1.0}, "eval_fraction is 1.0"),
        ({"use_chat_template": True}, "no chat template"),
    ],
)
def test_options_that_do_not_work(data, tokenizer, options, message):
    with pytest.raises(UserError, match=message):
        TokenImageDataset(data, tokenizer, **options)


def test_missing_and_empty_files(tokenizer, tmp_path):
    with pytest.raises(UserError, match="no such file"):
        TokenImageDataset(tmp_path / "missing.txt", tokenizer)
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(UserError, match="is empty"):
        TokenImageDataset(tmp_path / "empty.txt", tokenizer)


@pytest.mark.parametrize("name", ["qwen3", "smollm2"])
def test_real_vocabularies(shared_tokenizers, data, texts, name):
    tokenizer = load_tokenizer(shared_tokenizers / name)
    dataset = TokenImageDataset(data, tokenizer, img_size=32)
    sample = dataset[1]
    decoded = dataset.codec.decode(sample["clean"], sample["mask"])
    assert decoded == dataset.ids(1).tolist() and len(decoded) == 1024
    stream = [int(t) for i in range(len(dataset)) for t in dataset.ids(i)]
    assert tokenizer.decode(stream).replace(tokenizer.eos_token, "\n") == "\n".join(texts) + "\n"
