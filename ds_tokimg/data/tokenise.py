"""Tokenise: the records of a corpus as rows of token ids, what a worker does with its part."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ds_tokimg.data.files import BLOCK_BYTES
from ds_tokimg.data.records import Conversation, Record, Tally, joined, parts_of
from ds_tokimg.data.sources import Source
from ds_tokimg.tokens import tokenizer as tokenizers

# Of every block of texts so many are tried, and of each so many characters: whether the tokenizer gives them back.
_TRIED, _TRIED_CHARACTERS = 32, 1000


@dataclass(frozen=True)
class Settings:
    """How a record is written: in the chat template or not, its prompt apart or not."""

    use_chat_template: bool
    enable_condition: bool

    def check(self, tokenizer: tokenizers.Tokenizer) -> None:
        """UserError where the tokenizer has no chat template and one is needed."""
        if self.use_chat_template:
            tokenizers.require_chat_template(tokenizer)


@dataclass
class Tokenise:
    """Tokenises one group of spans; `datasets` sends copies of it to its workers.

    tallies: the folder where a group that came upon something says so.
    """

    source: Source
    tokenizer: tokenizers.Tokenizer
    settings: Settings
    tallies: Path | None = None

    def __call__(self, table: Any) -> Any:
        """An Arrow table with one row, `group` -> the group's documents, a row each."""
        import pyarrow as pa

        tables: list[Any] = []
        for group in table["group"].to_pylist():
            tally = Tally(self.source.options.skip_bad_records)
            tables += self.blocks(group, tally)
            if self.tallies and tally != Tally(tally.skip_bad):
                (self.tallies / f"{group:08}.tally").write_text(json.dumps(dataclasses.asdict(tally)))
        return pa.concat_tables(tables or [self._documents([], Tally())])

    def blocks(self, group: int, tally: Tally, start: int = 0) -> Iterator[Any]:
        """The group's documents from block number `start` on, as Arrow tables of at most about BLOCK_BYTES characters.
        The blocks before are read but not tokenised."""
        blocks = itertools.islice(_blocks(self._pairs(group, tally)), start, None)
        return (self._documents(block, tally) for block in blocks)

    def _pairs(self, group: int, tally: Tally) -> Iterator[tuple[Record, str, str]]:
        """(record, prompt that conditions, text that is scored) of each record of a group."""
        for record in self.source.read(group, tally):
            try:
                scored = self._scored(record)
            except ValueError as error:
                tally.reject(lambda: self.source.groups[group][0].path, str(error))
            else:
                yield record, *scored

    def _documents(self, found: list[tuple[Record, str, str]], tally: Tally) -> Any:
        """Records -> an Arrow table of their documents."""
        import pyarrow as pa

        texts = [text for _, _, text in found]
        ids, lengths = self._encode(texts)
        prompts, prompt_lengths = self._encode([prompt for _, prompt, _ in found])
        self._count_lost([record for record, _, _ in found], ids, lengths, tally)
        sizes = [len(tokenizers.unguarded(self.tokenizer, text).encode()) for text in texts]
        columns = {
            "ids": _list_array(*_end_each(ids, lengths, self.tokenizer.eos_token_id)),
            "prompt_ids": _list_array(prompts, prompt_lengths),
            "num_bytes": pa.array(sizes, pa.int32()),
            "hash": pa.array(_hashes([record for record, _, _ in found]), pa.uint64()),
        }
        return pa.table(columns)

    def _count_lost(self, records: list[Record], ids: np.ndarray, lengths: np.ndarray, tally: Tally) -> None:
        """Records that the tokenizer does not give back: all with its token for the unknown, and of the others those
        that are found when some are tried."""
        tokenizer, unknown = self.tokenizer, np.zeros(len(records), bool)
        if tokenizer.unk_token_id not in (None, tokenizer.eos_token_id):
            places = np.flatnonzero(ids == tokenizer.unk_token_id)
            unknown[np.searchsorted(np.cumsum(lengths), places, side="right")] = True
        tally.lost += int(unknown.sum())
        tried = {*range(0, len(records), -(-len(records) // _TRIED) or 1), *np.flatnonzero(unknown)[:1].tolist()}
        for i in sorted(tried):
            text = joined(records[i])
            loss = tokenizers.loss_of(tokenizer, text if unknown[i] else text[:_TRIED_CHARACTERS])
            tally.lost += bool(loss) and not unknown[i]
            tally.lost_example = tally.lost_example or loss

    def _encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        if not any(texts):
            return np.zeros(0, np.int32), np.zeros(len(texts), np.int64)
        return tokenizers.encode(self.tokenizer, texts, parse_special=self.settings.use_chat_template)

    def _scored(self, record: Record) -> tuple[str, str]:
        """A record as (prompt that conditions, text that is scored), guarded where a chat template writes it. Raises
        ValueError for a conversation that the template refuses."""
        apart, chat = self.settings.enable_condition, self.settings.use_chat_template
        if isinstance(record, str):
            return "", tokenizers.guarded(self.tokenizer, record) if chat else record
        if not chat:
            return parts_of(record) if apart else ("", joined(record))
        messages = record.messages if isinstance(record, Conversation) else _turns(*record)
        prompt, answer = tokenizers.chat_format(self.tokenizer, messages)
        return (prompt, answer) if apart else ("", prompt + answer)


def _turns(prompt: str, answer: str) -> tuple[tuple[str, str], ...]:
    return ("user", prompt), ("assistant", answer)


def _blocks(rows: Iterable[tuple[Record, str, str]]) -> Iterator[list[tuple[Record, str, str]]]:
    """Cuts rows into lists of about BLOCK_BYTES characters, so that no more than one of them is held as strings."""
    block, room = [], BLOCK_BYTES
    for row in rows:
        block.append(row)
        room -= len(row[1]) + len(row[2])
        if room <= 0:
            yield block
            block, room = [], BLOCK_BYTES
    if block:
        yield block


def _end_each(ids: np.ndarray, lengths: np.ndarray, eos: int) -> tuple[np.ndarray, np.ndarray]:
    """Puts EOS after each document."""
    return np.insert(ids, np.cumsum(lengths), eos).astype(np.int32), lengths + 1


def _list_array(values: np.ndarray, lengths: np.ndarray) -> Any:
    import pyarrow as pa

    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))


def _hashes(records: list[Record]) -> np.ndarray:
    """uint64 [n], from a record's words and not its tokens: a split survives a change of tokenizer."""
    digests = b"".join(hashlib.blake2b(_words(record).encode(), digest_size=8).digest() for record in records)
    return np.frombuffer(digests, dtype="<u8")


def _words(record: Record) -> str:
    if isinstance(record, str):
        return record
    return "\0".join(text for _, text in record.messages) if isinstance(record, Conversation) else "\0".join(record)
