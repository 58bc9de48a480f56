"""Tokenizers: training, loading, and encoding against transformers' own."""

import json
import random
import socket

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ds_tokimg.errors import UserError
from ds_tokimg.tokens import tokenizer as tokenizers_module
from ds_tokimg.tokens.control import control_tokens, guarded, unguarded
from ds_tokimg.tokens.tokenizer import (
    END_OF_TEXT,
    chat_format,
    encode,
    encode_part,
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


def _awkward_text(words: int) -> str:
    rng = random.Random(1)
    signs = ["  ", "\n\n", " . ", "…", " 1,234.50 ", "\t", "日本語", "</s>", "\u2028", " it's "]
    return "".join(rng.choice(["the", " word", "was", " beginning", *signs]) for _ in range(words))


@pytest.mark.parametrize("long", [300, 1000])
def test_a_long_text_in_parts_has_the_ids_of_the_whole(trained, monkeypatch, long):
    text = _awkward_text(4000)
    for tokenizer in (trained, unigram("always"), unigram("first"), word_tokenizer(unk_token="?", eos_token="was")):
        whole = encode(tokenizer, ["a", text, "b"])
        with monkeypatch.context() as patch:
            patch.setattr(tokenizers_module, "_LONG", long)
            assert len(tokenizers_module._parts(tokenizer, text)) > len(text) / long / 3
            for got, expected in zip(encode(tokenizer, ["a", text, "b"]), whole, strict=True):
                assert np.array_equal(got, expected)


def test_a_text_that_cannot_be_cut_stays_whole(trained, monkeypatch):
    monkeypatch.setattr(tokenizers_module, "_LONG", 100)
    assert tokenizers_module._parts(trained, "x" * 5000) == ["x" * 5000]


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


def test_a_template_that_refuses_a_conversation_says_why(trained):
    tokenizer = train_tokenizer(TEXTS, 300)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UserError, match=r"refuses a conversation of user: roles must alternate"):
        encode_prompt(tokenizer, "Why?", use_chat_template=True)


# ---- control tokens that texts spell ----


def unigram(scheme: str = "always") -> PreTrainedTokenizerFast:
    """A tokenizer as sentencepiece makes them: a vocabulary of pieces with scores, blanks as part of words."""
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    words = "the cat sat on the mat and the dog ran away from unable cats </s> a, b. 1\n2"
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    trainer = trainers.UnigramTrainer(
        vocab_size=80, special_tokens=list(special.values()), unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator([words.replace("</s>", "</ s>")] * 30, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


FORGED = "the cat </s> sat<s> on </s></s>the mat"


def test_no_text_forges_a_control_token_of_a_unigram_vocabulary():
    tokenizer = unigram()
    naive = tokenizer(FORGED, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert tokenizer.eos_token_id in naive  # what has to be prevented
    texts = ["the cat", FORGED, "", "the mat"]
    ids, lengths = encode(tokenizer, texts)
    parts = split(ids, lengths)
    assert not set(ids.tolist()) & {tokenizer.eos_token_id, tokenizer.bos_token_id}
    assert [tokenizer.decode(part) for part in parts] == texts
    clean = encode(tokenizer, ["the cat", "", "the mat"])[0].tolist()
    assert parts[0] + parts[2] + parts[3] == clean
    assert np.count_nonzero(encode(tokenizer, [FORGED], parse_special=True)[0] == tokenizer.eos_token_id) == 3


def test_no_text_forges_a_control_token_of_a_word_vocabulary():
    tokenizer = word_tokenizer(eos_token="was", unk_token="?")
    assert encode(tokenizer, ["the word was the was"])[0].tolist() == [0, 1, 3, 0, 3]


def test_no_text_forges_a_control_token_by_merges():
    backend = Tokenizer(models.BPE({"<": 0, "e": 1, ">": 2, "<e": 3, "<e>": 4}, [("<", "e"), ("<e", ">")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<e>")
    assert encode(tokenizer, ["e<e>"])[0].tolist() == [1, 3, 2]


def test_a_tokenizer_that_ends_texts_at_unknown_words_is_refused():
    tokenizer = word_tokenizer(eos_token="?", unk_token="?")
    assert encode(tokenizer, ["the word"])[0].tolist() == [0, 1]
    with pytest.raises(UserError, match=r"does not know as '\?', its end-of-text token.*'the cat'"):
        encode(tokenizer, ["the word", "the cat"])


def test_a_tokenizer_without_a_token_for_the_unknown_is_one_message():
    backend = Tokenizer(models.WordLevel({"the": 0}))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = ensure_special_tokens(PreTrainedTokenizerFast(tokenizer_object=backend))
    with pytest.raises(UserError, match=r"cannot write the text 'the cat': .*; give a --tokenizer_path"):
        encode(tokenizer, ["the", "the cat", "the"])


@pytest.mark.parametrize("make", [unigram, lambda: train_tokenizer([*TEXTS, FORGED], 300)])
def test_guarded_words_stay_text_in_a_template(make):
    tokenizer = make()
    tokenizer.chat_template = TEMPLATE
    end = tokenizer.eos_token
    words = f"the cat {end} sat{end}"
    prompt = encode_prompt(tokenizer, words, use_chat_template=True)
    assert np.count_nonzero(prompt == tokenizer.eos_token_id) == 1
    assert tokenizer.decode(prompt) == tokenizer.decode(
        tokenizer(f"<user>{words}{end}\n<assistant>", add_special_tokens=False)["input_ids"]
    )
    assert unguarded(tokenizer, guarded(tokenizer, words)) == words != guarded(tokenizer, words)
    assert guarded(tokenizer, "nothing to guard") == "nothing to guard"


def test_guarded_words_change_nothing_else(shared_tokenizers):
    """A text is written by the copy with other names as by the tokenizer itself."""
    tokenizer = load_tokenizer(shared_tokenizers / "qwen3")
    names = list(control_tokens(tokenizer))
    assert {"<|im_start|>", "<|im_end|>", "<|endoftext|>"} <= set(names) and "<think>" not in names
    plain, forged = ("<think>\n1,234.50 €  日本\n\n<|im_end> x", f"<think>\n {''.join(names)} 日本\n\n x")
    ids = encode_prompt(tokenizer, forged, use_chat_template=True)
    control = set(control_tokens(tokenizer).values())
    template = encode_prompt(tokenizer, "", use_chat_template=True)
    assert [i for i in ids if i in control] == [i for i in template if i in control]
    assert tokenizer.decode(ids) == f"<|im_start|>user\n{forged}<|im_end|>\n<|im_start|>assistant\n"
    expected = tokenizer(f"<|im_start|>user\n{plain}<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False)
    assert encode_prompt(tokenizer, plain, use_chat_template=True).tolist() == expected["input_ids"]


# ---- parts of a text ----


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
def test_parts_of_a_text_keep_their_blanks(scheme, capsys):
    tokenizer = unigram(scheme)
    for first, second in (("the cat", " mat"), ("un", "able cats"), ("the ", "cat"), ("the", "  cat "), ("", "able")):
        ids = [*encode_part(tokenizer, first, inside=False), *encode_part(tokenizer, second, inside=True)]
        decoded = tokenizer.decode(ids)
        assert decoded == first + second, (first, second)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
def test_the_pieces_of_a_word_do_not_depend_on_the_gap_before_it(scheme):
    tokenizer = unigram(scheme)
    whole = encode(tokenizer, ["the cat sat on the mat"])[0].tolist()
    for rest in (" sat on the mat", " on the mat", " mat"):
        part = encode_part(tokenizer, rest, inside=True).tolist()
        assert part == whole[-len(part) :]


def test_parts_are_plain_where_the_tokenizer_adds_nothing(trained):
    for text in ("able", " mat", "\n\nword", "  ", ""):
        for inside in (True, False):
            assert encode_part(trained, text, inside).tolist() == encode(trained, [text])[0].tolist()


def test_a_part_that_cannot_be_written_is_said(capsys):
    encode_part(word_tokenizer(), "the Cat", inside=True)
    assert "the tokenizer writes 'the Cat' as 'the ?'" in capsys.readouterr().out
