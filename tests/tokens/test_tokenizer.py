"""Tokenizers: training, loading, and encoding against transformers' own."""

import json
import random
import socket

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ds_tokimg.errors import UserError
from ds_tokimg.tokens.tokenizer import (
    END_OF_TEXT,
    chat_format,
    encode,
    encode_prompt,
    ensure_special_tokens,
    fingerprint,
    load_tokenizer,
    require_chat_template,
    train_tokenizer,
    vocab_size,
)

TEXTS = ["In the beginning was the word.", "The word was with him, and the beginning was good."] * 20
AWKWARD = ["", " ", "\n\n", "naïve café – “quoted” 日本語 🙂‍🚀", "tab\tnul\0end", "\u2028\u0085 lines", "x" * 5000]
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def trained():
    return train_tokenizer(TEXTS, 300)


def word_tokenizer(**special) -> PreTrainedTokenizerFast:
    """A word-level tokenizer with the special tokens that are named, and no others."""
    backend = Tokenizer(models.WordLevel({"the": 0, "word": 1, "was": 2, "?": 3}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def split(ids: np.ndarray, lengths: np.ndarray) -> list[list[int]]:
    return [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])]


def test_trained_tokenizer_has_end_of_text_as_id_0_and_pads_with_it(trained):
    assert trained.eos_token == trained.pad_token == END_OF_TEXT
    assert trained.eos_token_id == trained.pad_token_id == 0
    assert vocab_size(trained) == len(trained) <= 300


@pytest.mark.parametrize("text", AWKWARD)
def test_trained_tokenizer_writes_any_text_and_reads_it_back(trained, text):
    assert trained.decode(encode(trained, [text])[0]) == text


def test_training_is_reproducible_and_learns_merges(trained):
    assert fingerprint(train_tokenizer(iter(TEXTS), 300)) == fingerprint(trained)
    assert len(encode(trained, [TEXTS[0]])[0]) < len(TEXTS[0]) / 2


def test_training_needs_room_for_the_bytes():
    with pytest.raises(UserError, match=r"vocab_size 256 is too small.*at least 257"):
        train_tokenizer(TEXTS, 256)
    assert vocab_size(train_tokenizer(TEXTS, 257)) == 257


def test_a_saved_tokenizer_loads_with_the_same_fingerprint_and_without_network(trained, tmp_path, monkeypatch):
    def no_network(*_):
        raise AssertionError("tried to reach the network")

    trained.save_pretrained(tmp_path)
    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    loaded = load_tokenizer(tmp_path)
    assert fingerprint(loaded) == fingerprint(trained)
    assert (loaded.eos_token_id, loaded.pad_token_id) == (0, 0)


def test_fingerprint_tells_tokenizers_apart(trained):
    assert fingerprint(train_tokenizer(TEXTS, 280)) != fingerprint(trained)
    other_end = train_tokenizer(TEXTS, 300)
    other_end.add_special_tokens({"eos_token": "the"})
    assert fingerprint(other_end) != fingerprint(trained)


def test_fingerprint_does_not_depend_on_use(trained):
    before = fingerprint(trained)
    trained(TEXTS[:4], padding=True, truncation=True, max_length=7)
    encode(trained, TEXTS, parse_special=True)
    assert fingerprint(trained) == before


def test_loading_nonsense_is_a_user_error(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "tokenizer.json").write_text("{not json")
    for wrong in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UserError, match="cannot load the tokenizer"):
            load_tokenizer(wrong)


def test_missing_special_tokens_are_added():
    bare = word_tokenizer()
    assert bare.eos_token_id is None
    tokenizer = ensure_special_tokens(bare)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == (END_OF_TEXT, 4)
    assert tokenizer.pad_token_id == 4 and vocab_size(tokenizer) == 5


def test_existing_special_tokens_are_kept():
    tokenizer = ensure_special_tokens(word_tokenizer(eos_token="was", pad_token="?"))
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, vocab_size(tokenizer)) == (2, 3, 4)


def test_truncation_and_padding_of_the_tokenizer_file_are_ignored(trained, tmp_path):
    trained.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text())
    content["truncation"] = {
        "direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0
    }  # fmt: skip
    content["padding"] = {
        "strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 0, "pad_type_id": 0, "pad_token": END_OF_TEXT,
    }  # fmt: skip
    file.write_text(json.dumps(content))
    loaded = load_tokenizer(tmp_path)
    for text in ("a", TEXTS[1]):
        assert encode(loaded, [text])[0].tolist() == encode(trained, [text])[0].tolist()


def test_a_text_cannot_forge_the_end_of_a_text(trained):
    text = f"before {END_OF_TEXT} after"
    plain, special = encode(trained, [text])[0], encode(trained, [text], parse_special=True)[0]
    assert 0 not in plain and trained.decode(plain) == text
    assert np.count_nonzero(special == 0) == 1


def test_encode_keeps_texts_apart_across_batches(trained):
    rng = random.Random(0)
    texts = ["".join(rng.choices("the word\n", k=rng.randrange(30))) for _ in range(2500)] + ["y " * 600_000, ""]
    ids, lengths = encode(trained, texts)
    assert ids.dtype == np.int32 and lengths.sum() == len(ids)
    assert [trained.decode(part) for part in split(ids, lengths)] == texts


def test_encode_of_nothing(trained):
    ids, lengths = encode(trained, [])
    assert len(ids) == len(lengths) == 0


@pytest.mark.parametrize("name", ["qwen3", "smollm2"])
def test_encode_equals_transformers(shared_tokenizers, name):
    tokenizer = load_tokenizer(shared_tokenizers / name)
    texts = TEXTS[:2] + AWKWARD + ["<|im_start|>user <|im_end|>", "<think>\n1,234.50 €"]
    for special in (False, True):
        expected = [
            tokenizer(t, add_special_tokens=False, split_special_tokens=not special)["input_ids"] for t in texts
        ]
        assert split(*encode(tokenizer, texts, parse_special=special)) == expected


@pytest.mark.parametrize(("name", "size"), [("qwen3", 151_669), ("smollm2", 49_152)])
def test_real_vocabularies(shared_tokenizers, tmp_path, name, size):
    tokenizer = load_tokenizer(shared_tokenizers / name)
    assert vocab_size(tokenizer) == size
    tokenizer.save_pretrained(tmp_path)
    assert fingerprint(load_tokenizer(tmp_path)) == fingerprint(tokenizer)


def test_chat_format_splits_where_the_assistant_speaks(trained):
    tokenizer = train_tokenizer(TEXTS, 300)
    with pytest.raises(UserError, match="has no chat template"):
        require_chat_template(tokenizer)
    tokenizer.chat_template = TEMPLATE
    require_chat_template(tokenizer)
    opening, reply = chat_format(tokenizer, [("user", "Why?"), ("assistant", "Because.")])
    assert (opening, reply) == (f"<user>Why?{END_OF_TEXT}\n<assistant>", "Because.")
    expected = tokenizer(opening, add_special_tokens=False)["input_ids"]
    assert encode_prompt(tokenizer, "Why?", use_chat_template=True).tolist() == expected
    assert trained.decode(encode_prompt(tokenizer, "Why?")) == "Why?"


def test_a_template_that_rewrites_the_prompt_is_refused(trained):
    tokenizer = train_tokenizer(TEXTS, 300)
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(UserError, match="cannot be told apart"):
        chat_format(tokenizer, [("user", "Why?"), ("assistant", "Because.")])


@pytest.mark.parametrize("name", ["qwen3", "smollm2"])
def test_chat_format_of_real_templates(shared_tokenizers, name):
    tokenizer = AutoTokenizer.from_pretrained(shared_tokenizers / name)
    opening, reply = chat_format(tokenizer, [("user", "Define: floor"), ("assistant", "a lower limit")])
    assert opening.endswith("<|im_start|>assistant\n") and "Define: floor<|im_end|>" in opening
    assert reply.endswith("a lower limit") and "<|im_end|>" not in reply
