"""A corpus that is tokenised while it is trained on: windows of its texts, one after another, and a sample.

Nothing is written to the disk, and no more than two windows and the sample are held, however large the corpus is. An
epoch goes through the groups of its files in an order of its own; as many texts as make a window are read, and then
are a data set like any other: packed, shuffled and cut into train batches by the code that does it for a cached corpus.
A corpus of one window and one group is thus trained on as from the cache, bit for bit.

What has to be known of the texts before training (tokenizer, colours, lengths, held-out texts) is told by a sample:
groups spread evenly over the corpus.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import threading
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ds_tokimg.console import Work
from ds_tokimg.data.corpus import Corpus, Fingerprint, empty_corpus
from ds_tokimg.data.dataset import TokenImageDataset
from ds_tokimg.data.files import BLOCK_BYTES
from ds_tokimg.data.order import TrainBatchSampler
from ds_tokimg.data.records import Tally
from ds_tokimg.data.sources import Source
from ds_tokimg.data.tokenise import Settings, Tokenise
from ds_tokimg.errors import UserError
from ds_tokimg.tokens import tokenizer as tokenizers

# Tokens of a window, prompts included, and about how many bytes of text the sample has. Each is about 32 MB of memory.
WINDOW_TOKENS = 1 << 23
SAMPLE_BYTES = 16 << 20


class Place(NamedTuple):
    """Where a stream stands; what follows depends on it, the texts, the seed and the train batch alone.

    window: number since the run began; it keys all draws of its samples. epoch, group, block: where the window begins
    in the texts: the place in the epoch's order of groups, and blocks of that group before it. batch: train batches
    of the window that have been seen.
    """

    window: int = 0
    epoch: int = 0
    group: int = 0
    block: int = 0
    batch: int = 0


class StreamBatch(NamedTuple):
    """A train batch of a window: `samples` of its data set, and the place behind it."""

    dataset: TokenImageDataset
    samples: np.ndarray
    place: Place


class Sampled:
    """Makes the corpus of a sample, in memory, as `load_corpus` makes one of all texts in the cache."""

    def __init__(self) -> None:
        self._made: dict[tuple[str, ...], Corpus] = {}

    def __call__(
        self,
        sources: list[Source],
        tokenizer: tokenizers.Tokenizer,
        *,
        use_chat_template: bool,
        enable_condition: bool,
        **of_the_cache: object,
    ) -> Corpus:
        """The same each time. Raises UserError as `load_corpus` does. What is said of a cache is of no use."""
        key = tuple(source.fingerprint for source in sources)
        if key not in self._made:
            settings = Settings(use_chat_template, enable_condition)
            settings.check(tokenizer)
            with Work("tokenising a sample of the texts"):
                self._made[key] = _sample_of([Tokenise(source, tokenizer, settings) for source in sources])
        return self._made[key]


def _sample_of(all_of_them: list[Tokenise]) -> Corpus:
    step = -(-sum(each.source.num_bytes for each in all_of_them) // SAMPLE_BYTES) or 1
    parts = [_part_of_sample(each, step) for each in all_of_them]
    corpus = Corpus.joined([part for part, _ in parts])
    total = sum(sum(each.source.sizes) for each in all_of_them)
    corpus.share = sum(read for _, read in parts) / total if step > 1 else 1.0
    if corpus.share < 1:
        name = " ".join(each.source.name for each in all_of_them)
        corpus.notes.insert(
            0,
            f"{name}: streamed: the figures, and the held-out texts, are of a sample, {corpus.share:.2%} of the texts",
        )
    corpus.fingerprint = _fingerprint(corpus.fingerprint, [each.source for each in all_of_them])
    return corpus


def _part_of_sample(tokenise: Tokenise, step: int) -> tuple[Corpus, int]:
    """Every `step`th group of a source, and about how many of its bytes these are. Of a group that is large, as a
    packed file is, what comes first."""
    source, tally, tables, read = tokenise.source, Tally(tokenise.source.options.skip_bad_records), [], 0
    chosen = range(0, len(source.groups), step)
    most_blocks = None if step == 1 else max(2, SAMPLE_BYTES // BLOCK_BYTES // max(1, len(chosen)))
    for group in chosen:
        found = list(_first(tokenise.blocks(group, tally), most_blocks))
        cut = most_blocks is not None and len(found) == most_blocks
        read += min(source.sizes[group], len(found) * BLOCK_BYTES) if cut else source.sizes[group]
        tables += found
    if not any(len(table) for table in tables):
        raise empty_corpus(source.name, tally.notes(source.name))
    notes = [*source.notes, *tally.notes(source.name)]
    batches = _batches(tables)
    return Corpus(batches, Fingerprint.of(batches), bool(tally.lost), notes), read


def _first(blocks: Iterator[Any], most: int | None) -> Iterator[Any]:
    for number, block in enumerate(blocks, 1):
        yield block
        if number == most:
            return


def _batches(tables: list[Any]) -> list[Any]:
    """Arrow tables as one batch; none where they have no row."""
    import pyarrow as pa

    return [batch for batch in pa.concat_tables(tables).combine_chunks().to_batches() if len(batch)] if tables else []


def _fingerprint(of_sample: Fingerprint, sources: list[Source]) -> Fingerprint:
    """Of a corpus that is not read: its sample, and the names and sizes of its files and how they are cut, which decide
    the order of what is read."""
    digest = hashlib.blake2b(digest_size=16)
    for source in sources:
        for group, size in zip(source.groups, source.sizes, strict=True):
            spans = [(Path(span.path).name, span.start, span.stop) for span in group]
            digest.update(repr((spans, size)).encode())
    return Fingerprint(
        *(hashlib.blake2b(part.encode() + digest.digest(), digest_size=16).hexdigest() for part in of_sample)
    )


@dataclass
class TextStream:
    """The training texts of a run, read again and again, each epoch in another order.

    Args:
        sample: the data set of the sample, whose shape those of the windows have.
        parts: the sources with what tokenises them.
        seed: of the order.
    """

    sample: TokenImageDataset
    parts: list[Tokenise]
    seed: int
    groups: list[tuple[int, int]] = field(init=False, repr=False)  # (part, group of its source)

    def __post_init__(self) -> None:
        self.groups = [(i, group) for i, part in enumerate(self.parts) for group in range(len(part.source.groups))]

    @property
    def images(self) -> int:
        """Images of an epoch, about: as many as the sample makes likely; exact where it has all texts and one window
        holds them."""
        return max(1, round(len(self.sample) / self.sample.corpus.share))

    @property
    def notes(self) -> list[str]:
        """What a person should know about a stream."""
        return [] if self.sample.corpus.share == 1 else [f"an epoch has about {self.images:,} training images"]

    def batches(self, place: Place, train_batch_size: int, ahead: bool = True) -> Generator[StreamBatch, None, None]:
        """The train batches that follow a place, without end. ahead: the next window is made in a thread meanwhile.

        Each window leaves out what does not fill a train batch; one with fewer images is left out, unless it is the
        only one of its epoch. Closing the iterator ends the thread. Raises UserError for texts that cannot be read.
        """
        with contextlib.closing(self._windows(place, ahead)) as windows:
            for dataset, begin, end in windows:
                only = begin.group == begin.block == 0 and end.epoch > begin.epoch
                if dataset is None or (len(dataset) < train_batch_size and not only):
                    continue
                sampler = TrainBatchSampler(dataset.lengths, train_batch_size, self.seed)
                for number, samples in enumerate(sampler.batches(begin.window, begin.batch), begin.batch):
                    yield StreamBatch(dataset, samples, begin._replace(batch=number + 1))

    def _windows(
        self, place: Place, ahead: bool
    ) -> Generator[tuple[TokenImageDataset | None, Place, Place], None, None]:
        """(data set, where it begins, where the next one does) of each window from a place on."""
        ended = threading.Event()
        pool = ThreadPoolExecutor(1, thread_name_prefix="windows") if ahead else None
        try:
            upcoming = pool.submit(self._window, place, ended) if pool else None
            while True:
                dataset, end = upcoming.result() if upcoming else self._window(place, ended)
                if pool:
                    upcoming = pool.submit(self._window, end, ended)
                yield dataset, place, end
                place = end
        finally:
            ended.set()
            if pool:
                pool.shutdown(wait=True, cancel_futures=True)

    def _window(self, place: Place, ended: threading.Event) -> tuple[TokenImageDataset | None, Place]:
        """The texts of the window that begins at a place, None for none, and where the next one begins."""
        tables, tokens, end = [], 0, Place(place.window + 1, place.epoch + 1)
        for group, block, table in self._blocks(place):
            tables.append(table)
            tokens += sum(len(chunk.values) for name in ("ids", "prompt_ids") for chunk in table[name].chunks)
            if tokens >= WINDOW_TOKENS or ended.is_set():
                end = Place(place.window + 1, place.epoch, group, block + 1)
                break
        batches = _batches(tables)
        if not batches:
            return None, end
        corpus = Corpus(batches, self.sample.corpus.fingerprint, self.sample.loses_text)
        return self.sample.of(corpus), end

    def _blocks(self, place: Place) -> Iterator[tuple[int, int, Any]]:
        """(place of the group in the order, number of the block in it, table of its training texts) of each block of
        the rest of an epoch."""
        order = np.random.default_rng([self.seed, place.epoch]).permutation(len(self.groups))
        start = place.block
        for number in range(place.group, len(order)):
            part, group = self.groups[order[number]]
            tokenise = self.parts[part]
            tally = Tally(tokenise.source.options.skip_bad_records)
            for block, table in enumerate(tokenise.blocks(group, tally, start), start):
                yield number, block, self._trained(part, table)
            start = 0

    def _trained(self, part: int, table: Any) -> Any:
        """Without the held-out texts."""
        if self.sample.own[part] or not self.sample.held_out_below:
            return table
        import pyarrow as pa

        hashes = table["hash"].to_numpy()
        return table.filter(pa.array(hashes >= np.uint64(self.sample.held_out_below)))


def stream_of(
    sample: TokenImageDataset, sources: list[Source], tokenizer: tokenizers.Tokenizer, settings: Settings, seed: int
) -> TextStream:
    """The stream of which a data set holds the sample. Raises UserError for sources with weights."""
    if sample.weights:
        raise UserError("--streaming reads all its paths as one corpus: give no weights, or leave --streaming out")
    own = copy.deepcopy(tokenizer)  # a thread uses it, while texts are written with the other
    return TextStream(sample, [Tokenise(source, own, settings) for source in sources], seed)
