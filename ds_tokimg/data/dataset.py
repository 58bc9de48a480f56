"""TokenImageDataset: a corpus as images of tokens.

A sample is a stretch of a stream of tokens, so the whole index of a data set is where the samples and the
stretches begin. Nothing is read before it is asked for.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike

from ds_tokimg.data.corpus import Corpus, load_corpus
from ds_tokimg.data.order import Mixture
from ds_tokimg.data.records import AS_USUAL, ReadOptions
from ds_tokimg.data.sources import Source, find_all
from ds_tokimg.errors import UserError
from ds_tokimg.tokens.codec import TokenCodec, check_geometry
from ds_tokimg.tokens.tokenizer import Tokenizer, ensure_special_tokens, vocab_size

SPLITS = ("all", "train", "eval")

_PIECE = 1 << 20


class TokenImageDataset(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Texts as images [3, H, W] in [-1, 1] with a mask [H, W] that is 1 where a token stands.

    Every document ends in EOS, which is scored like any token. With `packing` documents follow each other
    without gap and every image but the last is full; without it each image begins with a document, and one
    longer than `max_tokens` goes on in the next image.

    With `enable_condition` a document with a prompt has images of its own, and the prompt is their condition.
    An answer that needs several images is conditioned on what precedes each: the prompt and the answer so
    far, the last `max_tokens` of it.

    Args:
        data_path: file, folder or Hugging Face data set name (see `ds_tokimg.data.sources`), or a list of them, each
            with `:WEIGHT` at its end or none.
        tokenizer: a Hugging Face tokenizer; it gets an EOS token if it has none.
        img_size: pixels a side.
        use_chat_template: write prompt/answer pairs in the tokenizer's chat template.
        max_tokens: tokens an image may hold; None for its capacity, (img_size / token_size)².
        token_size, radix, palette: of the `TokenCodec`. layout, patch_size: where it puts the tokens.
        packing: fill images with several documents.
        enable_condition: keep prompts apart as conditions.
        split: "train", "eval" or "all" documents. A document goes to "eval" by the hash of its text, in
            `eval_fraction` of cases, whatever else the corpus holds; where a folder or data set has a validation split
            of its own, that is "eval" and all others are "train". With an `eval_fraction` of 0 "eval" is empty.
        read: how files become records.
        cache_dir: where tokenised corpora are kept; None for a folder beside the caches of `datasets`.
        num_proc: processes that tokenise; None for what suits the corpus and the machine.
        load: makes the corpus of the sources.

    notes: what a person should know about the texts: files left out, bad records, prompts cut.
    loses_text: whether the tokenizer does not give all of the text back. weights: of the paths, where they have any.
    own: bool [paths], which of them set texts apart for validation. held_out_below: texts with smaller hashes are held
    out of the other paths.
    mixture: how an epoch draws on data paths with weights; None without.

    Raises UserError for a path, record, size or option that does not work.
    """

    def __init__(
        self,
        data_path: str | Path | Sequence[str | Path],
        tokenizer: Tokenizer,
        img_size: int = 64,
        use_chat_template: bool = False,
        max_tokens: int | None = None,
        *,
        token_size: int = 1,
        radix: int | None = None,
        palette: ArrayLike | torch.Tensor | None = None,
        layout: str = "patch",
        patch_size: int = 4,
        packing: bool = True,
        enable_condition: bool = False,
        split: str = "all",
        eval_fraction: float = 0.05,
        cache_dir: str | Path | None = None,
        num_proc: int | None = None,
        read: ReadOptions = AS_USUAL,
        load: Callable[..., Corpus] = load_corpus,
    ):
        tokenizer = ensure_special_tokens(tokenizer)
        self.tokenizer, self.img_size, self.layout, self.patch_size = tokenizer, img_size, layout, patch_size
        try:
            check_geometry(img_size, token_size, layout, patch_size)
            self.codec = TokenCodec(vocab_size(tokenizer), token_size, radix, palette)
        except ValueError as error:
            raise UserError(str(error)) from error
        self.max_tokens = _check_max_tokens(max_tokens, self.codec.capacity(img_size))
        sources = find_all(data_path, read)
        self.own = np.array([source.validation is not None for source in sources])
        self.weights = [source.weight for source in sources if source.weight is not None]
        if split == "eval" and eval_fraction:
            sources = [source.validation or source for source in sources]
        corpus = load(
            sources,
            tokenizer,
            use_chat_template=use_chat_template,
            enable_condition=enable_condition,
            cache_dir=cache_dir,
            num_proc=num_proc,
        )
        self.enable_condition, self.packing = enable_condition, packing
        name = " ".join(source.name for source in sources)
        self.held_out_below = _limit(corpus, self.own, split, eval_fraction, name)
        self._take(corpus, partial(_split, corpus, self.own, split, self.held_out_below))
        self.mixture = None if split == "eval" else self._mixture(sources)

    def of(self, corpus: Corpus) -> TokenImageDataset:
        """All texts of another corpus, in the shape of these."""
        other = copy.copy(self)
        other._take(corpus, partial(np.arange, len(corpus)))
        other.mixture = None
        return other

    def _take(self, corpus: Corpus, chosen: Callable[[], np.ndarray]) -> None:
        """Makes the documents `chosen` of a corpus those of this data set."""
        self.corpus, self.loses_text, self._chosen = corpus, corpus.loses_text, chosen
        documents = chosen()
        self.num_documents = len(documents)
        self.num_bytes = int(self.corpus.num_bytes[documents].sum(dtype=np.int64))  # UTF-8, of the scored text
        self._build_index(documents, self.packing)
        self.notes = [*self.corpus.notes, *self._cut_prompts(documents)]

    def _mixture(self, sources: list[Source]) -> Mixture | None:
        if not self.weights:
            return None
        counts = np.bincount(self._source_of, minlength=len(sources))
        empty = [source.name for source, count in zip(sources, counts, strict=True) if not count]
        if empty:
            raise UserError(f"no text of {', '.join(empty)} is left to train on: leave it out, or give no weights")
        return Mixture(self._source_of, self.weights)

    def _cut_prompts(self, documents: np.ndarray) -> list[str]:
        """Says how many prompts are longer than an image."""
        lengths = self.corpus.prompt_lengths[documents]
        cut = np.count_nonzero(lengths > self.max_tokens)
        if not cut or not self.enable_condition:
            return []
        of = np.count_nonzero(lengths)
        return [
            f"{cut:,} of {of:,} prompts are longer than max_tokens, {self.max_tokens:,}; of these the last "
            f"{self.max_tokens:,} tokens are seen"
        ]

    def _build_index(self, documents: np.ndarray, packing: bool) -> None:
        """Lays the documents end to end in a stream and cuts it into samples at `_bounds` [samples + 1].

        `_run_starts` [runs + 1] are places in the stream, `_run_sources` [runs] the places in the corpus'
        tokens where the same stretch is found.
        """
        documents, num_packed = self._packed_first(documents, packing)
        lengths = self.corpus.lengths[documents]
        starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        begins = np.flatnonzero(np.diff(documents, prepend=-2) != 1)  # neighbours in the corpus make one run
        self._run_starts = np.append(starts[begins], starts[-1])
        self._run_sources = self.corpus.starts[documents[begins]]

        # Images are filled from one source each.
        parts = np.searchsorted(documents[:num_packed], self.corpus.parts)
        packed = [np.arange(begin, end, self.max_tokens) for begin, end in itertools.pairwise(starts[parts])]
        self._num_packed = sum(map(len, packed))
        pieces = -(-lengths[num_packed:].astype(np.int64) // self.max_tokens)  # images of each other text
        piece = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)  # 0, 1, … within a text
        separate = np.repeat(starts[num_packed:-1], pieces) + piece * self.max_tokens
        self._bounds = np.concatenate([*packed, separate, starts[-1:]])
        others = np.searchsorted(self.corpus.parts, documents[num_packed:], side="right") - 1
        self._source_of = np.repeat([*range(len(packed)), *others], [*map(len, packed), *pieces])  # [samples]
        if self.enable_condition:
            self._document_of = np.repeat(documents[num_packed:], pieces)  # of the samples that are not packed
            self._tokens_before = piece * self.max_tokens  # how much of the document earlier images hold

    def _packed_first(self, documents: np.ndarray, packing: bool) -> tuple[np.ndarray, int]:
        """The documents in the order of the stream, and how many of them are packed: those come first."""
        if not packing:
            return documents, 0
        if not self.enable_condition:
            return documents, len(documents)
        prompted = self.corpus.prompt_lengths[documents] > 0
        return np.concatenate([documents[~prompted], documents[prompted]]), int(np.count_nonzero(~prompted))

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        """`clean` [3, H, W] and `mask` [H, W], float32; with conditions also `condition` and `condition_mask`."""
        clean, mask = self._image(self.ids(i))
        sample = {"clean": clean, "mask": mask}
        if self.enable_condition:
            sample["condition"], sample["condition_mask"] = self._image(self.prompt_ids(i))
        return sample

    def _image(self, ids: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        return self.codec.encode(ids, self.img_size, self.layout, self.patch_size)

    def ids(self, i: int) -> np.ndarray:
        """The tokens of a sample, int32 [n], 1 ≤ n ≤ max_tokens; read-only. With weights `i` may be len · k more than
        the sample's number: its k-th repetition in an epoch (see `Mixture`)."""
        i = self._check_index(i)
        return self._read(int(self._bounds[i]), int(self._bounds[i + 1]))

    def prompt_ids(self, i: int) -> np.ndarray:
        """The tokens of a sample's condition, int32 [m], 0 ≤ m ≤ max_tokens: empty where there is no prompt."""
        i = self._check_index(i)
        if not self.enable_condition or i < self._num_packed:
            return np.zeros(0, np.int32)
        corpus, document = self.corpus, int(self._document_of[i - self._num_packed])
        prompt = corpus.prompts.read(*corpus.prompt_starts[document : document + 2].tolist())
        before = int(self._tokens_before[i - self._num_packed])
        if before and len(prompt):
            begin = int(corpus.starts[document])
            prompt = np.concatenate([prompt, corpus.tokens.read(begin, begin + before)])
        return prompt[-self.max_tokens :]

    def _check_index(self, i: int) -> int:
        if not -len(self) <= i < len(self) * (self.mixture.most_passes if self.mixture else 1):
            raise IndexError(f"sample {i} of a data set of {len(self)}")
        return i % len(self)

    def _read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start … stop-1 of the stream."""
        tokens, pieces = self.corpus.tokens, []
        run = int(np.searchsorted(self._run_starts, start, side="right")) - 1
        while start < stop:
            end = min(stop, int(self._run_starts[run + 1]))
            source = int(self._run_sources[run]) + start - int(self._run_starts[run])
            pieces.append(tokens.read(source, source + end - start))
            start, run = end, run + 1
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sample, int32 [samples]."""
        return np.diff(self._bounds).astype(np.int32)

    @property
    def prompt_lengths(self) -> np.ndarray:
        """Tokens of each sample's condition, int32 [samples]."""
        lengths = np.zeros(len(self), np.int32)
        if self.enable_condition:
            prompts = self.corpus.prompt_lengths[self._document_of]
            whole = np.where(prompts > 0, prompts + self._tokens_before, 0)
            lengths[self._num_packed :] = np.minimum(whole, self.max_tokens)
        return lengths

    @property
    def hashes(self) -> np.ndarray:
        """Of each document, see `Corpus.hashes`. Read from the file each time."""
        return self.corpus.hashes[self._chosen()]

    @property
    def num_tokens(self) -> int:
        """Scored tokens, EOS included."""
        return int(self._bounds[-1])

    def token_stream(self) -> Iterator[np.ndarray]:
        """All scored tokens in order, in pieces of at most 2^20, int32."""
        for start in range(0, self.num_tokens, _PIECE):
            yield self._read(start, min(start + _PIECE, self.num_tokens))

    def token_counts(self) -> np.ndarray:
        """How often each id occurs among the scored tokens, int64 [V]."""
        counts = np.zeros(self.codec.vocab_size, np.int64)
        for piece in self.token_stream():
            counts += np.bincount(piece, minlength=len(counts))
        return counts


def _check_max_tokens(max_tokens: int | None, capacity: int) -> int:
    if max_tokens is None:
        return capacity
    if not 1 <= max_tokens <= capacity:
        raise UserError(
            f"max_tokens is {max_tokens}, but an image holds 1 to {capacity} tokens; leave it out to fill the "
            "image, or change --img_size or --token_size"
        )
    return max_tokens


def _limit(corpus: Corpus, own: np.ndarray, split: str, eval_fraction: float, name: str) -> int:
    """The hash below which a text is held out; 0: none is. A small corpus of which chance picks none, or all, holds one
    text out.

    own: bool [sources], whether a source has validation texts of its own: then chance alone decides.
    """
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}; available: {', '.join(SPLITS)}")
    if not 0 <= eval_fraction < 1:
        raise UserError(f"eval_fraction is {eval_fraction}, but must be at least 0 and less than 1")
    if split == "all" or eval_fraction == 0:
        return 0
    limit = max(1, int(eval_fraction * 2.0**64))
    if own.any():
        return limit
    least, most = int(corpus.hashes.min()), int(corpus.hashes.max())
    if least == most:
        raise UserError(
            f"the corpus {name} cannot be split into training and validation: it holds {len(corpus)} text(s), and "
            f"eval_fraction is {eval_fraction}; give --eval_data_path, or more different texts, or --eval_fraction "
            "0 (no validation)"
        )
    return limit if least < limit <= most else least + 1


def _split(corpus: Corpus, own: np.ndarray, split: str, limit: int) -> np.ndarray:
    """The documents of a split, int64. A source with validation texts of its own has them all in "eval", and all others
    in "train"."""
    if not limit:  # nothing is held out
        return np.arange(0 if split == "eval" else len(corpus))
    apart = np.repeat(own, np.diff(corpus.parts))
    held_out = (corpus.hashes < np.uint64(limit)) & ~apart
    return np.flatnonzero(held_out | apart if split == "eval" else ~held_out)
