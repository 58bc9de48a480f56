"""A tokenised corpus on disk: built once, memory-mapped ever after.

`datasets` maps the tokeniser over the corpus in parallel and writes Arrow files; a later start opens these without
importing `datasets`. Documents lie end to end in a few large buffers, so a stretch of tokens is a slice of the file
and nothing is copied. The cache's key is made of the files (path, size, time), how they are read, the tokenizer and
the settings; what the texts are, wherever they lie, says their fingerprint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ds_tokimg.console import Work, given_up, on_terminal, speaks
from ds_tokimg.data.cache import DamagedCache, check, seal, sync
from ds_tokimg.data.files import BLOCK_BYTES
from ds_tokimg.data.records import Tally, joined
from ds_tokimg.data.sources import Source, find_all
from ds_tokimg.data.tokenise import Settings, Tokenise
from ds_tokimg.errors import UserError
from ds_tokimg.tokens import tokenizer as tokenizers

logger = logging.getLogger(__name__)

_FORMAT_VERSION = 3
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


class Fingerprint(NamedTuple):
    """Digests of a corpus: equal for the same documents in the same order, wherever they lie and however they are cut
    into files."""

    texts: str  # of the records' words
    tokens: str  # of the ids that they became, of prompts and texts

    @classmethod
    def of(cls, batches: list[Any]) -> Fingerprint:
        """Reads all of a corpus once."""
        columns = {"texts": ["hash"], "tokens": ["ids", "prompt_ids"]}
        return cls(
            **{kind: _digest([_column_digest(batches, name) for name in names]) for kind, names in columns.items()}
        )

    @classmethod
    def joined(cls, parts: list[Fingerprint]) -> Fingerprint:
        """Of several corpora, one after the other."""
        return parts[0] if len(parts) == 1 else cls(*map(_digest, zip(*parts, strict=True)))


def _digest(parts: Iterable[str]) -> str:
    return hashlib.blake2b(" ".join(parts).encode(), digest_size=16).hexdigest()


def _column_digest(batches: list[Any], name: str) -> str:
    """The same however the column is cut into batches."""
    values, lengths = hashlib.blake2b(), hashlib.blake2b()
    for column in (batch.column(name) for batch in batches):
        is_list = hasattr(column, "offsets")
        values.update(_array(column.values if is_list else column).data)
        if is_list:
            lengths.update(np.diff(_array(column.offsets)).data)
    return values.hexdigest() + lengths.hexdigest()


class Corpus:
    """The documents of one source or of several, as columns of memory-mapped Arrow batches.

    tokens: each document's scored ids, EOS at its end. prompts: its prompt's ids.
    lengths, prompt_lengths: int32 [documents].
    parts: where the documents of each source begin, int64 [sources + 1]. notes: what a person should know about them.
    fingerprint: what the texts are. loses_text: whether the tokenizer does not give all of the text back.
    share: of the texts that there are, about: below 1 for the sample of a stream.
    """

    share = 1.0

    def __init__(self, batches: list[Any], fingerprint: Fingerprint, loses_text: bool, notes: Sequence[str] = ()):
        self._batches, self.fingerprint, self.loses_text, self.notes = batches, fingerprint, loses_text, list(notes)
        self.tokens, self.lengths = self._texts("ids")
        self.prompts, self.prompt_lengths = self._texts("prompt_ids")
        self.parts = np.array([0, len(self)])

    @classmethod
    def joined(cls, corpora: list[Corpus]) -> Corpus:
        """One corpus with the documents of all, one after the other."""
        if len(corpora) == 1:
            return corpora[0]
        whole = cls(
            [batch for corpus in corpora for batch in corpus._batches],
            Fingerprint.joined([corpus.fingerprint for corpus in corpora]),
            any(corpus.loses_text for corpus in corpora),
            [note for corpus in corpora for note in corpus.notes],
        )
        whole.parts = np.cumsum([0, *map(len, corpora)])
        return whole

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
    data: str | Path | list[Source],
    tokenizer: tokenizers.Tokenizer,
    *,
    use_chat_template: bool = False,
    enable_condition: bool = False,
    cache_dir: str | Path | None = None,
    num_proc: int | None = None,
) -> Corpus:
    """The tokenised corpus of a data path, or of the sources that were found, from the cache or built now.

    With `enable_condition` the prompt of a prompt/answer record is kept apart and its answer scored (of a conversation
    the last answer); otherwise the record is one text: in the chat template with `use_chat_template`, else joined by
    line breaks. Texts without prompt stay as they are. Several processes may call this at once: one builds, the others
    wait. A damaged cache is built again.

    num_proc: processes that tokenise; None takes the cores there are, fewer for a small corpus.
    Raises UserError for missing files, bad records, an empty corpus, or a cache folder that cannot be written.
    """
    settings = Settings(use_chat_template, enable_condition)
    settings.check(tokenizer)
    sources = data if isinstance(data, list) else find_all(data)
    root = Path(cache_dir).expanduser() if cache_dir else default_cache_dir()
    return Corpus.joined([_load(Tokenise(source, tokenizer, settings), root, num_proc) for source in sources])


def _load(tokenise: Tokenise, root: Path, num_proc: int | None) -> Corpus:
    """The corpus of one source."""
    folder = root / _cache_key(tokenise)
    try:
        return _open(folder, tokenise.source)
    except DamagedCache:
        pass  # or not there yet: whoever gets the lock looks again
    with _writing_to(root), Work(f"tokenising {tokenise.source.name}"):  # or waiting for who does
        from filelock import FileLock

        root.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            try:
                return _open(folder, tokenise.source)
            except DamagedCache as error:
                if folder.is_dir():
                    logger.warning("the tokenised corpus is damaged and made again: %s", error)
                    shutil.rmtree(folder)
                _build(tokenise, folder, num_proc)
    return _open(folder, tokenise.source)


def default_cache_dir() -> Path:
    """Beside the caches of `datasets`, whose environment variables decide."""
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    return Path(os.environ.get("HF_DATASETS_CACHE") or home / "datasets").expanduser() / "ds_tokimg"


def read_texts(data: str | Path | list[Source], max_bytes: int = 50 << 20) -> Iterator[str]:
    """The texts of a corpus as strings, to train a tokenizer on: all of them, or parts spread evenly over it.

    Raises UserError for missing files, bad records or an empty corpus.
    """
    sources = data if isinstance(data, list) else find_all(data)
    total = sum(source.num_bytes for source in sources)
    step = max(1, -(-total // max_bytes))
    empty = True
    for source in sources:
        chosen = range(0, len(source.groups), step)
        room = max(2 * BLOCK_BYTES, max_bytes // max(1, len(chosen)))  # a large file that cannot be cut is one group
        for group in chosen:
            for text in _up_to(room, map(joined, source.read(group))):
                empty = False
                yield text
    if empty:
        raise empty_corpus(" ".join(source.name for source in sources))


def _up_to(characters: int, texts: Iterable[str]) -> Iterator[str]:
    """The first texts, until they have so many characters."""
    for text in texts:
        yield text
        characters -= len(text)
        if characters <= 0:
            return


# ---- building ----


def _cache_key(tokenise: Tokenise) -> str:
    source, tokenizer, settings = tokenise.source, tokenise.tokenizer, tokenise.settings
    parts = [
        _FORMAT_VERSION,
        source.fingerprint,
        dataclasses.astuple(source.options),
        tokenizers.fingerprint(tokenizer),
    ]
    parts += [settings.enable_condition, tokenizer.chat_template if settings.use_chat_template else None]
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=12).hexdigest()


@contextlib.contextmanager
def _writing_to(root: Path) -> Iterator[None]:
    """Turns a full disk or a read-only folder into a message that names it."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write the tokenised corpus to {root}: {error.strerror or error}; give another --cache_dir"
        ) from error


def _build(tokenise: Tokenise, folder: Path, num_proc: int | None) -> None:
    """Tokenises into a temporary folder that gets its name only when all of it is on the disk."""
    for torn in folder.parent.glob(f"{folder.name}.tmp*"):
        shutil.rmtree(torn)  # left by a process that was killed: we hold the lock
    temporary = folder.with_name(f"{folder.name}.tmp{os.getpid()}")
    temporary.mkdir()
    source = tokenise.source
    try:
        tokenise = dataclasses.replace(tokenise, tallies=temporary)
        documents = _map(tokenise, temporary, num_proc or _processes(source))
        tally = _collect(temporary)
        if documents == 0:
            raise empty_corpus(source.name, tally.notes(source.name))
        fingerprint = Fingerprint.of(_batches(temporary))
        seal(temporary, {"tally": dataclasses.asdict(tally), "fingerprint": fingerprint})
        os.replace(temporary, folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _collect(folder: Path) -> Tally:
    """What the groups came upon."""
    whole = Tally()
    for file in sorted(folder.glob("*.tally")):
        whole.add(Tally(**json.loads(file.read_text())))
        file.unlink()
    return whole


def empty_corpus(name: str, told: Sequence[str] = ()) -> UserError:
    """What is said of a corpus without texts. told: what else is to be known of it."""
    return UserError("; ".join((f"the corpus {name} is empty: it holds no text that is not blank", *told)))


def _processes(source: Source) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, len(source.groups), source.num_bytes // _BYTES_PER_PROCESS))


def _map(tokenise: Tokenise, folder: Path, num_proc: int) -> int:
    """Runs the tokeniser over all groups and returns the number of documents."""
    source = tokenise.source
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
    hide = not (on_terminal() and speaks()) or megabytes < 5
    shown = not datasets.are_progress_bars_disabled()
    if hide:
        datasets.disable_progress_bars()
    try:
        with contextlib.nullcontext() if hide else given_up():
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


def _open(folder: Path, source: Source) -> Corpus:
    """Maps the Arrow files; of the tokens `check` reads some. Raises DamagedCache when it is not whole."""
    import pyarrow as pa

    told = check(folder)
    try:
        tally, fingerprint = Tally(**told["tally"]), Fingerprint(*told["fingerprint"])
        notes = [*source.notes, *tally.notes(source.name)]
        return Corpus(_batches(folder), fingerprint, bool(tally.lost), notes)
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedCache(f"{folder}: {error}") from None


def _batches(folder: Path) -> list[Any]:
    """The memory-mapped Arrow batches of a folder, in order."""
    import pyarrow as pa

    batches: list[Any] = []
    for file in sorted(folder.glob("*.arrow")):
        with pa.ipc.open_stream(pa.memory_map(str(file))) as reader:
            batches += [batch for batch in reader if batch.num_rows]
    return batches
