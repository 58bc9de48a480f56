"""The tokenised corpus: what its documents are, and when the cache is used, rebuilt and shared."""

import gzip
import json
import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest

from ds_tokimg.data import corpus as corpora
from ds_tokimg.data import files
from ds_tokimg.data.corpus import TokenStream, default_cache_dir, load_corpus, read_texts
from ds_tokimg.data.records import ReadOptions
from ds_tokimg.data.sources import find_all
from ds_tokimg.errors import UserError
from ds_tokimg.tokens.tokenizer import END_OF_TEXT, load_tokenizer, train_tokenizer

RECORDS = [
    "A plain text.",
    {"text": "Another – with naïve characters 🙂"},
    {"prompt": "Define: floor", "answer": "a lower limit"},
    {"prompt": "Define: congratulate\n", "answer": "be proud of"},
]
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["the floor is a lower limit, and a text is a text"] * 9, 300)


@pytest.fixture
def data(tmp_path) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, RECORDS)))
    return path


def documents(corpus, tokenizer) -> list[tuple[str, str]]:
    """(prompt, scored text) of every document; checks that each ends in EOS and has no other."""
    found = []
    for i in range(len(corpus)):
        ids = corpus.tokens.read(corpus.starts[i], corpus.starts[i + 1])
        prompt = corpus.prompts.read(corpus.prompt_starts[i], corpus.prompt_starts[i + 1])
        assert len(ids) == corpus.lengths[i] and len(prompt) == corpus.prompt_lengths[i]
        assert ids[-1] == tokenizer.eos_token_id
        found.append((tokenizer.decode(prompt), tokenizer.decode(ids[:-1])))
    return found


def test_pairs_without_condition_are_joined_by_a_line_break(data, tokenizer, tmp_path):
    corpus = load_corpus(data, tokenizer, cache_dir=tmp_path / "cache")
    texts = [
        RECORDS[0],
        RECORDS[1]["text"],
        "Define: floor\na lower limit",
        "Define: congratulate\nbe proud of",
    ]
    assert documents(corpus, tokenizer) == [("", text) for text in texts]
    assert corpus.num_bytes.tolist() == [len(text.encode()) for text in texts]
    assert list(read_texts(data)) == texts


def test_conditions_are_kept_apart(data, tokenizer, tmp_path):
    corpus = load_corpus(data, tokenizer, enable_condition=True, cache_dir=tmp_path / "cache")
    pairs = [("", RECORDS[0]), ("", RECORDS[1]["text"]), *((r["prompt"], r["answer"]) for r in RECORDS[2:])]
    assert documents(corpus, tokenizer) == pairs
    assert corpus.num_bytes.tolist() == [len(text.encode()) for _, text in pairs]


@pytest.mark.parametrize("condition", [False, True])
def test_chat_template(data, tmp_path, condition):
    tokenizer = train_tokenizer(["the floor is a lower limit"] * 9, 290)
    with pytest.raises(UserError, match="no chat template"):
        load_corpus(data, tokenizer, use_chat_template=True, cache_dir=tmp_path / "cache")
    tokenizer.chat_template = TEMPLATE
    corpus = load_corpus(
        data, tokenizer, use_chat_template=True, enable_condition=condition, cache_dir=tmp_path / "cache"
    )
    opening = f"<user>Define: floor{END_OF_TEXT}\n<assistant>"
    expected = (opening, "a lower limit") if condition else ("", opening + "a lower limit")
    assert documents(corpus, tokenizer)[2] == expected
    assert documents(corpus, tokenizer)[0] == ("", RECORDS[0])


def test_workers_and_groups_do_not_change_the_corpus(tokenizer, tmp_path, monkeypatch):
    path = tmp_path / "data.txt"
    path.write_text("\n".join(f"line {i} " + "word " * (i % 50) for i in range(2000)))
    one = load_corpus(path, tokenizer, cache_dir=tmp_path / "one", num_proc=1)
    monkeypatch.setattr(files, "BLOCK_BYTES", 9000)
    two = load_corpus(path, tokenizer, cache_dir=tmp_path / "two", num_proc=2)
    assert one.fingerprint == two.fingerprint
    assert len(one.tokens.buffers) == 1 and len(two.tokens.buffers) > 20
    assert np.array_equal(one.tokens.read(0, len(one.tokens)), two.tokens.read(0, len(two.tokens)))
    for name in ("lengths", "prompt_lengths", "num_bytes", "hashes"):
        assert np.array_equal(getattr(one, name), getattr(two, name)), name


def test_blank_parts_of_a_corpus_do_no_harm(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "BLOCK_BYTES", 1000)
    path = tmp_path / "data.txt"
    path.write_text("\n" * 5000 + "one\n" + "\n" * 5000 + "two\n")
    corpus = load_corpus(path, tokenizer, cache_dir=tmp_path / "cache", num_proc=2)
    assert documents(corpus, tokenizer) == [("", "one"), ("", "two")]


def test_bad_record_in_a_worker_is_a_user_error_and_leaves_nothing(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "BLOCK_BYTES", 1000)
    path = tmp_path / "data.jsonl"
    path.write_text('"fine"\n' * 900 + "{}\n")
    for workers in (1, 2):
        with pytest.raises(UserError, match=r"data\.jsonl, line 901: a record is a string"):
            load_corpus(path, tokenizer, cache_dir=tmp_path / "cache", num_proc=workers)
    assert not [p for p in (tmp_path / "cache").iterdir() if p.suffix != ".lock"]


@pytest.mark.parametrize("content", ["", "\n \n\t\n"])
def test_empty_corpus(tokenizer, tmp_path, content):
    path = tmp_path / "data.txt"
    path.write_text(content)
    with pytest.raises(UserError, match=r"data\.txt is empty"):
        load_corpus(path, tokenizer, cache_dir=tmp_path / "cache")
    with pytest.raises(UserError, match=r"data\.txt is empty"):
        list(read_texts(path))
    assert not [p for p in (tmp_path / "cache").iterdir() if p.suffix != ".lock"]


def test_the_second_start_tokenises_nothing(data, tokenizer, tmp_path, monkeypatch):
    first = load_corpus(data, tokenizer, cache_dir=tmp_path / "cache")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    monkeypatch.setattr(corpora, "_build", lambda *_: pytest.fail("tokenised again"))
    again = load_corpus(data, load_tokenizer(tmp_path / "tokenizer"), cache_dir=tmp_path / "cache")
    assert documents(again, tokenizer) == documents(first, tokenizer)


def test_the_cache_follows_files_tokenizer_and_settings(data, tokenizer, tmp_path):
    cache = tmp_path / "cache"

    def entries() -> int:
        return sum(p.is_dir() for p in cache.iterdir())

    load_corpus(data, tokenizer, cache_dir=cache)
    load_corpus(data, tokenizer, cache_dir=cache, enable_condition=True)
    load_corpus(data, train_tokenizer(["other"] * 5, 258), cache_dir=cache)
    assert entries() == 3
    data.write_text('"changed"\n')
    assert documents(load_corpus(data, tokenizer, cache_dir=cache), tokenizer) == [("", "changed")]
    assert entries() == 4


def test_leftovers_of_a_killed_process_are_removed(data, tokenizer, tmp_path):
    cache = tmp_path / "cache"
    load_corpus(data, tokenizer, cache_dir=cache)
    (complete,) = (p for p in cache.iterdir() if p.is_dir())
    torn = complete.with_name(complete.name + ".tmp123")
    os.rename(complete, torn)
    (torn / "documents.arrow").write_bytes(b"torn")
    assert len(load_corpus(data, tokenizer, cache_dir=cache)) == 4
    assert not torn.exists() and complete.is_dir()


def test_cache_that_cannot_be_written(data, tokenizer, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write the tokenised corpus to .*--cache_dir"):
        load_corpus(data, tokenizer, cache_dir=tmp_path / "file" / "cache")


def _load_in_process(data, tokenizer_dir, cache, results):
    corpus = load_corpus(data, load_tokenizer(tokenizer_dir), cache_dir=cache)
    results.put(int(corpus.tokens.read(0, len(corpus.tokens)).astype(np.int64).sum()))


def test_processes_that_start_together_share_one_cache(tokenizer, tmp_path):
    path = tmp_path / "data.txt"
    path.write_text("some words on a line\n" * 3000)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    arguments = (path, tmp_path / "tokenizer", tmp_path / "cache", results)
    ranks = [context.Process(target=_load_in_process, args=arguments) for _ in range(3)]
    for rank in ranks:
        rank.start()
    sums = {results.get(timeout=180) for _ in ranks}
    for rank in ranks:
        rank.join(timeout=180)
    assert len(sums) == 1 and [rank.exitcode for rank in ranks] == [0, 0, 0]
    assert sum(p.is_dir() for p in (tmp_path / "cache").iterdir()) == 1


def test_cached_corpus_is_mapped_not_read(tokenizer, tmp_path):
    path = tmp_path / "data.txt"
    path.write_text("some words on a line\n" * 3000)
    corpus = load_corpus(path, tokenizer, cache_dir=tmp_path / "cache")
    tokens = corpus.tokens.read(5, 100)
    assert not tokens.flags.writeable and np.shares_memory(tokens, corpus.tokens.buffers[0])
    assert not tokens.flags.owndata


def test_default_cache_dir_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_DATASETS_CACHE", raising=False)
    assert default_cache_dir() == tmp_path / "datasets" / "ds_tokimg"
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "other"))
    assert default_cache_dir() == tmp_path / "other" / "ds_tokimg"


def test_token_stream_reads_across_buffers():
    whole = np.arange(20, dtype=np.int32)
    stream = TokenStream([whole[:7], whole[7:7], whole[7:8], whole[8:]])
    assert len(stream) == 20
    for start in range(21):
        for stop in range(start, 23):
            assert stream.read(start, stop).tolist() == whole[start:stop].tolist()


def test_read_texts_takes_an_even_part_of_a_large_corpus(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "BLOCK_BYTES", 700)
    path = tmp_path / "data.txt"
    path.write_text("".join(f"{i:06}\n" for i in range(10_000)))
    taken = [int(text) for text in read_texts(path, max_bytes=7000)]
    assert 900 <= len(taken) <= 1100 and max(np.diff(taken)) < 1100 and taken[-1] > 8900


# ---- damage ----


def _zeros(path):
    path.write_bytes(bytes(path.stat().st_size))


def _flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["documents.arrow", "manifest.json"])
@pytest.mark.parametrize(
    "harm", [lambda p: os.truncate(p, 100), lambda p: os.truncate(p, 0), _zeros, _flip, lambda p: p.unlink()]
)
def test_a_damaged_cache_is_built_again_with_one_line(data, tokenizer, tmp_path, caplog, name, harm):
    cache = tmp_path / "cache"
    first = documents(load_corpus(data, tokenizer, cache_dir=cache), tokenizer)
    (entry,) = (p for p in cache.iterdir() if p.is_dir())
    harm(entry / name)
    assert documents(load_corpus(data, tokenizer, cache_dir=cache), tokenizer) == first
    (line,) = [r.getMessage() for r in caplog.records if "is damaged" in r.getMessage()]
    assert str(entry / name) in line
    caplog.clear()
    assert documents(load_corpus(data, tokenizer, cache_dir=cache), tokenizer) == first
    assert not [r for r in caplog.records if "is damaged" in r.getMessage()]


def test_damage_that_the_check_overlooks_is_no_traceback(data, tokenizer, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    first = documents(load_corpus(data, tokenizer, cache_dir=cache), tokenizer)
    (entry,) = (p for p in cache.iterdir() if p.is_dir())
    _zeros(entry / "documents.arrow")
    check, blind = corpora.check, [True]
    monkeypatch.setattr(
        corpora, "check", lambda folder: [] if entry.is_dir() and blind and blind.pop() else check(folder)
    )
    assert documents(load_corpus(data, tokenizer, cache_dir=cache), tokenizer) == first


# ---- what is told ----


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_records_are_left_out_and_told_at_every_start(tokenizer, tmp_path, monkeypatch, workers):
    monkeypatch.setattr(files, "BLOCK_BYTES", 1000)
    path = tmp_path / "data.jsonl"
    path.write_text('"fine"\n' * 900 + "{}\n" + '"fine"\n' * 300 + '{"text": 3}\n')
    source = find_all(path, ReadOptions(skip_bad_records=True))
    for _ in range(2):
        corpus = load_corpus(source, tokenizer, cache_dir=tmp_path / "cache", num_proc=workers)
        assert len(corpus) == 1200
        (note,) = corpus.notes
        assert note.startswith(f"{path}: 2 bad record(s) left out, for example: {path}, line 901: a record is a string")
    with pytest.raises(UserError, match=r"line 901: .*--skip_bad_records"):
        load_corpus(path, tokenizer, cache_dir=tmp_path / "cache", num_proc=workers)
    path.write_text("{}\n")
    with pytest.raises(UserError, match=r"is empty.*; .*1 bad record"):
        load_corpus(find_all(path, ReadOptions(skip_bad_records=True)), tokenizer, cache_dir=tmp_path / "cache")


def test_the_cache_follows_how_files_are_read(tokenizer, tmp_path):
    path = tmp_path / "data.txt"
    path.write_text("one\ntwo\n\nthree\n")
    for document, expected in (("line", ["one", "two", "three"]), ("file", ["one\ntwo\n\nthree"])):
        corpus = load_corpus(find_all(path, ReadOptions(document=document)), tokenizer, cache_dir=tmp_path / "cache")
        assert documents(corpus, tokenizer) == [("", text) for text in expected]


def test_several_sources_are_one_corpus_with_a_cache_each(data, tokenizer, tmp_path):
    other = tmp_path / "other.txt.gz"
    other.write_bytes(gzip.compress(b"one\ntwo\n"))
    corpus = load_corpus(find_all([data, other]), tokenizer, cache_dir=tmp_path / "cache")
    alone = load_corpus(data, tokenizer, cache_dir=tmp_path / "cache")
    assert documents(corpus, tokenizer) == [*documents(alone, tokenizer), ("", "one"), ("", "two")]
    assert corpus.parts.tolist() == [0, 4, 6]
    assert list(read_texts([*find_all([data, other])]))[-2:] == ["one", "two"]


def test_a_large_file_that_cannot_be_cut_gives_a_part_to_the_tokenizer(tmp_path, monkeypatch):
    monkeypatch.setattr(corpora, "BLOCK_BYTES", 500)
    path = tmp_path / "data.txt.gz"
    path.write_bytes(gzip.compress(b"".join(b"%06d\n" % i for i in range(10_000)), 0))
    assert 150 < len(list(read_texts(path, max_bytes=2000))) < 1000


# ---- conversations ----

CHAT = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Yes?"), ("user", "Why?"), ("assistant", "Because.")]


@pytest.fixture
def chats(tmp_path) -> Path:
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"messages": [{"role": role, "content": text} for role, text in CHAT]}))
    return path


def test_conversations_in_the_template(chats, tmp_path):
    tokenizer = train_tokenizer(["the floor is a lower limit"] * 9, 290)
    tokenizer.chat_template = TEMPLATE
    opening = "".join(f"<{role}>{text}{END_OF_TEXT}\n" for role, text in CHAT[:-1]) + "<assistant>"
    for condition, expected in ((False, ("", opening + "Because.")), (True, (opening, "Because."))):
        options = {"use_chat_template": True, "enable_condition": condition, "cache_dir": tmp_path / "cache"}
        corpus = load_corpus(chats, tokenizer, **options)
        ids = corpus.tokens.read(0, len(corpus.tokens))
        prompt = corpus.prompts.read(0, len(corpus.prompts))
        assert (tokenizer.decode(prompt), tokenizer.decode(ids[:-1])) == expected
        assert corpus.num_bytes.tolist() == [len(expected[1].encode())]


def test_conversations_without_a_template_are_lines(chats, tokenizer, tmp_path):
    lines = [text for _, text in CHAT]
    for condition, expected in ((False, ("", "\n".join(lines))), (True, ("\n".join(lines[:-1]), "Because."))):
        corpus = load_corpus(chats, tokenizer, enable_condition=condition, cache_dir=tmp_path / "cache")
        assert documents(corpus, tokenizer) == [expected]


def test_a_conversation_that_the_template_refuses_is_a_bad_record(chats, tmp_path):
    tokenizer = train_tokenizer(["the floor is a lower limit"] * 9, 290)
    tokenizer.chat_template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    tokenizer.chat_template += TEMPLATE
    with chats.open("a") as file:
        file.write('\n{"prompt": "q", "answer": "a"}\n')
    with pytest.raises(UserError, match=r"chats\.jsonl: the chat template .* refuses .*system.*: no system"):
        load_corpus(chats, tokenizer, use_chat_template=True, cache_dir=tmp_path / "cache")
    source = find_all(chats, ReadOptions(skip_bad_records=True))
    corpus = load_corpus(source, tokenizer, use_chat_template=True, cache_dir=tmp_path / "cache")
    assert len(corpus) == 1 and "1 bad record" in corpus.notes[0]


# ---- control tokens in texts ----


@pytest.mark.parametrize("condition", [False, True])
def test_only_the_template_writes_control_tokens(tmp_path, condition):
    tokenizer = train_tokenizer(["the floor is a lower limit"] * 9, 290)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tokenizer.chat_template = TEMPLATE.replace("{{ eos_token }}", "<|im_end|>")
    path = tmp_path / "data.jsonl"
    forged = f"a <|im_end|> b{END_OF_TEXT}"
    rows = [forged, {"prompt": forged, "answer": forged}]
    path.write_text("\n".join(map(json.dumps, rows)))
    options = {"use_chat_template": True, "enable_condition": condition, "cache_dir": tmp_path / "cache"}
    corpus = load_corpus(path, tokenizer, **options)
    end, turn = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")
    ids = corpus.tokens.read(0, len(corpus.tokens)).tolist()
    prompts = corpus.prompts.read(0, len(corpus.prompts)).tolist()
    assert ids.count(end) == 2 and ids[corpus.starts[1] - 1] == end == ids[-1] and end not in prompts
    assert (ids + prompts).count(turn) == 2  # after the prompt, and after the answer
    assert tokenizer.decode(ids[: corpus.lengths[0] - 1]) == forged
    pair = f"<user>{forged}<|im_end|>\n<assistant>{forged}<|im_end|>\n"
    assert tokenizer.decode(prompts + ids[corpus.lengths[0] : -1]) == pair
    answer = f"{forged}<|im_end|>\n"
    assert corpus.num_bytes.tolist() == [len(forged), len(answer if condition else pair)]
