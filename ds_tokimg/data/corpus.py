"""A tokenised corpus on disk: built once, memory-mapped ever after.

`datasets` maps the tokeniser over the corpus in parallel and writes Arrow files; a later start opens these without
importing `datasets`. Documents lie end to end in a few large buffers, so a stretch of tokens is a slice of the file
and nothing is copied. The cache's key is made of the files (path, size, time), the tokenizer and the settings.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ds_tokimg.data.records import Record, Source, find
from ds_tokimg.errors import UserError
from ds_tokimg.tokens import tokenizer as tokenizers

logger = logging.getLogger(__name__)

_FORMAT_VERSION = 1
# Below this a second process costs more to start than it saves; the Rust library's threads then share the work.
_BYTES_PER_PROCESS = 8 << 20
# `datasets` cuts what it writes into pieces of this many rows: never, long buffers are the point.
_WHOLE = 1 << 30


class TokenStream:
    """Documents' ids end to end, in memory-mapped buffers that read as one."""

    def __init__(self, buffers: list[np.ndarray]):
        self.buffers = buffers
        self.starts = np.cumsum([0] + [len(b) for b in buffers], dtype=np.int64)  # [buffers + 1]

    def __len__(self) -> int:
        return int(self.starts[-1])

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start … stop-1, int32. A view of the file where they lie in one buffer."""
        pieces, stop = [], min(stop, len(self))
        i = int(np.searchsorted(self.starts, start, side="right")) - 1
        while start < stop:
            end = min(stop, int(self.starts[i + 1]))
            pieces.append(self.buffers[i][start - self.starts[i] : end - self.starts[i]])
            start, i = end, i + 1
        if len(pieces) == 1:
            return pieces[0]
        return np.concatenate(pieces) if pieces else np.zeros(0, np.int32)


def _array(column: Any) -> np.ndarray:
    """An Arrow column's numbers where they are. (`to_numpy` would import pandas first.)"""
    return np.from_dlpack(column)


class Corpus:
    """The documents of a corpus, as columns of memory-mapped Arrow batches.

    tokens: each document's scored ids, EOS at its end. prompts: its prompt's ids.
    lengths, prompt_lengths: int32 [documents].
    """

    def __init__(self, batches: list[Any]):
        self._batches = batches
        self.tokens, self.lengths = self._texts("ids")
        self.prompts, self.prompt_lengths = self._texts("prompt_ids")

    def _texts(self, name: str) -> tuple[TokenStream, np.ndarray]:
        columns = [batch.column(name) for batch in self._batches]
        stream = TokenStream([_array(column.values) for column in columns])
        if len(stream) == 0:  # no prompts: a length array without memory
            return stream, np.broadcast_to(np.int32(0), sum(map(len, columns)))
        return stream, np.concatenate([np.diff(_array(column.offsets)) for column in columns])

    def _numbers(self, name: str) -> np.ndarray:
        return np.concatenate([_array(batch.column(name)) for batch in self._batches])

    @property
    def num_bytes(self) -> np.ndarray:
        """UTF-8 bytes of each document's scored text, int32 [documents]. Read from the file each time."""
        return self._numbers("num_bytes")

    @property
    def hashes(self) -> np.ndarray:
        """uint64 [documents], uniform, equal for equal documents. Read from the file each time."""
        return self._numbers("hash")

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    def starts(self) -> np.ndarray:
        """Where each document begins in `tokens`, int64 [documents + 1]."""
        return np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])

    @cached_property
    def prompt_starts(self) -> np.ndarray:
        """Where each prompt begins in `prompts`, int64 [documents + 1]."""
        return np.concatenate([[0], np.cumsum(self.prompt_lengths, dtype=np.int64)])


def load_corpus(
    data_path: str | Path,
    tokenizer: tokenizers.Tokenizer,
    *,
    use_chat_template: bool = False,
    enable_condition: bool = False,
    cache_dir: str | Path | None = None,
    num_proc: int | None = None,
) -> Corpus:
    """The tokenised corpus of a data path, from the cache or built now.

    With `enable_condition` the prompt of a prompt/answer record is kept apart and its answer scored; otherwise the
    two are one text: in the chat template with `use_chat_template`, else joined by a line break. Texts without
    prompt stay as they are. Several processes may call this at once: one builds, the others wait.

    num_proc: processes that tokenise; None takes the cores there are, fewer for a small corpus.
    Raises UserError for missing files, bad records, an empty corpus, or a cache folder that cannot be written.
    """
    if use_chat_template:
        tokenizers.require_chat_template(tokenizer)
    source = find(data_path)
    settings = _Settings(use_chat_template, enable_condition)
    root = Path(cache_dir).expanduser() if cache_dir else default_cache_dir()
    folder = root / _cache_key(source, tokenizer, settings)
    if not folder.is_dir():
        with _writing_to(root):
            from filelock import FileLock

            root.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{folder}.lock"):
                if not folder.is_dir():
                    _build(source, _Tokenise(source, tokenizer, settings), folder, num_proc)
    return _open(folder)


def default_cache_dir() -> Path:
    """Beside the caches of `datasets`, whose environment variables decide."""
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    return Path(os.environ.get("HF_DATASETS_CACHE") or home / "datasets").expanduser() / "ds_tokimg"


def read_texts(data_path: str | Path, max_bytes: int = 50 << 20) -> Iterator[str]:
    """The texts of a corpus as strings, to train a tokenizer on: all of them, or parts spread evenly over it.

    Raises UserError for missing files, bad records or an empty corpus.
    """
    source = find(data_path)
    step = max(1, -(-source.num_bytes // max_bytes))
    empty = True
    for group in range(0, len(source.groups), step):
        for record in source.read(group):
            empty = False
            yield record if isinstance(record, str) else joined(*record)
    if empty:
        raise _empty(source)


def joined(prompt: str, answer: str) -> str:
    """Prompt and answer as one text: the answer on a new line."""
    return prompt + answer if prompt.endswith("\n") else f"{prompt}\n{answer}"


# ---- building ----


@dataclass(frozen=True)
class _Settings:
    use_chat_template: bool
    enable_condition: bool


def _cache_key(source: Source, tokenizer: tokenizers.Tokenizer, settings: _Settings) -> str:
    parts = [_FORMAT_VERSION, source.fingerprint, tokenizers.fingerprint(tokenizer)]
    parts += [settings.enable_condition, tokenizer.chat_template if settings.use_chat_template else None]
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=12).hexdigest()


@dataclass
class _Tokenise:
    """Tokenises one group of spans; `datasets` sends copies of it to its workers."""

    source: Source
    tokenizer: tokenizers.Tokenizer
    settings: _Settings

    def __call__(self, table: Any) -> Any:
        """An Arrow table with one row, `group` -> the group's documents, a row each."""
        import pyarrow as pa

        records = [r for group in table["group"].to_pylist() for r in self.source.read(group)]
        pairs = [self._scored(record) for record in records]
        texts = [text for _, text in pairs]
        ids, lengths = self._encode(texts)
        prompts, prompt_lengths = self._encode([prompt for prompt, _ in pairs])
        columns = {
            "ids": _list_array(*_end_each(ids, lengths, self.tokenizer.eos_token_id)),
            "prompt_ids": _list_array(prompts, prompt_lengths),
            "num_bytes": pa.array([len(text.encode()) for text in texts], pa.int32()),
            "hash": pa.array(_hashes(records), pa.uint64()),
        }
        return pa.table(columns)

    def _encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        if not any(texts):
            return np.zeros(0, np.int32), np.zeros(len(texts), np.int64)
        return tokenizers.encode(self.tokenizer, texts, parse_special=self.settings.use_chat_template)

    def _scored(self, record: Record) -> tuple[str, str]:
        """A record as (prompt that conditions, text that is scored)."""
        if isinstance(record, str):
            return "", record
        if self.settings.use_chat_template:
            prompt, answer = tokenizers.chat_format(self.tokenizer, *record)
            return (prompt, answer) if self.settings.enable_condition else ("", prompt + answer)
        return record if self.settings.enable_condition else ("", joined(*record))


def _end_each(ids: np.ndarray, lengths: np.ndarray, eos: int) -> tuple[np.ndarray, np.ndarray]:
    """Puts EOS after each document."""
    return np.insert(ids, np.cumsum(lengths), eos).astype(np.int32), lengths + 1


def _list_array(values: np.ndarray, lengths: np.ndarray) -> Any:
    import pyarrow as pa

    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))


def _hashes(records: list[Record]) -> np.ndarray:
    """uint64 [n], from a record's words and not its tokens: a split survives a change of tokenizer."""
    texts = (record if isinstance(record, str) else "\0".join(record) for record in records)
    digests = b"".join(hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts)
    return np.frombuffer(digests, dtype="<u8")


@contextlib.contextmanager
def _writing_to(root: Path) -> Iterator[None]:
    """Turns a full disk or a read-only folder into a message that names it."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write the tokenised corpus to {root}: {error.strerror or error}; give another --cache_dir"
        ) from error


def _build(source: Source, tokenise: _Tokenise, folder: Path, num_proc: int | None) -> None:
    """Tokenises into a temporary folder that gets its name only when it is complete."""
    for torn in folder.parent.glob(f"{folder.name}.tmp*"):
        shutil.rmtree(torn)  # left by a process that was killed: we hold the lock
    temporary = folder.with_name(f"{folder.name}.tmp{os.getpid()}")
    temporary.mkdir()
    try:
        if _map(source, tokenise, temporary, num_proc or _processes(source)) == 0:
            raise _empty(source)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _empty(source: Source) -> UserError:
    return UserError(f"the corpus {source.name} is empty: it holds no text that is not blank")


def _processes(source: Source) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, len(source.groups), source.num_bytes // _BYTES_PER_PROCESS))


def _map(source: Source, tokenise: _Tokenise, folder: Path, num_proc: int) -> int:
    """Runs the tokeniser over all groups and returns the number of documents."""
    if not source.groups:
        return 0
    import datasets

    number, ids = datasets.Value("int32"), datasets.List(datasets.Value("int32"))
    columns = {"ids": ids, "prompt_ids": ids, "num_bytes": number, "hash": datasets.Value("uint64")}
    megabytes = source.num_bytes / 1e6
    logger.info("tokenising %s (%.1f MB) in %d processes", source.name, megabytes, num_proc)
    groups = datasets.Dataset.from_dict({"group": list(range(len(source.groups)))}).with_format("arrow")
    with _quiet_progress(datasets, megabytes), _one_thread_each(num_proc):
        documents = groups.map(
            tokenise,
            batched=True,
            batch_size=1,
            writer_batch_size=_WHOLE,
            remove_columns=["group"],
            features=datasets.Features(columns),
            num_proc=num_proc if num_proc > 1 else None,
            cache_file_name=str(folder / "documents.arrow"),
            new_fingerprint=folder.name.split(".")[0],
            desc="tokenising",
        )
    return len(documents)


@contextlib.contextmanager
def _quiet_progress(datasets: Any, megabytes: float) -> Iterator[None]:
    """No progress bar where nobody watches it, or where it would be over at once."""
    hide = not sys.stderr.isatty() or megabytes < 5
    shown = not datasets.are_progress_bars_disabled()
    if hide:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if hide and shown:
            datasets.enable_progress_bars()


@contextlib.contextmanager
def _one_thread_each(num_proc: int) -> Iterator[None]:
    """With several processes one Rust thread each: threads do not survive a fork, and no core is idle."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false" if num_proc > 1 else "true"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


# ---- opening ----


def _open(folder: Path) -> Corpus:
    """Maps the Arrow files; of the tokens nothing is read."""
    import pyarrow as pa

    batches = []
    for file in sorted(folder.glob("*.arrow")):
        with pa.ipc.open_stream(pa.memory_map(str(file))) as reader:
            batches += [batch for batch in reader if batch.num_rows]
    return Corpus(batches)
