"""Tokenizers: load one, train one, and turn texts into ids at the speed of the Rust library.

`transformers` and `tokenizers` are imported when first needed.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ds_tokimg.errors import UserError
from ds_tokimg.tokens.control import control_tokens, guarded, is_guarded, name_of, spell, unguarded

END_OF_TEXT = "<|endoftext|>"

# Texts handed to Rust at a time. Larger batches fall out of the CPU's cache (4,000 lines: 10-20 % slower), smaller
# ones pay for the call.
_BATCH_TEXTS = 1000
_BATCH_CHARACTERS = 1_000_000

_BYTE_ALPHABET = 256

# A text is encoded in parts of so many characters. Where it can be cut is tried out on so many around the place.
_LONG = 1_000_000
_AROUND = 200
_TRIALS = 20
_BETWEEN_WORDS = (re.compile(r"(?<=\w)(?= \w)"), re.compile(r"(?<=\S)(?=\s)"), re.compile(r"(?<=[^\w\s])(?=\w)"))

# Put before a text to see how it is written in the middle of another; the first that it does not merge with is taken.
_LEADS = ("\n", ".", "a", "1")


class RefusedConversation(UserError, ValueError):
    """A chat template that raises an error for a conversation: a bad record, or a user's mistake."""


class Tokenizer(Protocol):
    """What the trainer uses of a Hugging Face tokenizer (`PreTrainedTokenizerBase`), EOS and padding present."""

    eos_token: str
    eos_token_id: int
    pad_token: str
    pad_token_id: int
    chat_template: Any
    name_or_path: str
    unk_token: str | None
    all_special_tokens: list[str]
    all_special_ids: list[int]

    def __call__(self, text: Any, **options: Any) -> Any: ...
    def __len__(self) -> int: ...
    def get_vocab(self) -> dict[str, int]: ...
    def add_special_tokens(self, special_tokens_dict: dict[str, Any]) -> int: ...
    def apply_chat_template(self, conversation: list[dict[str, str]], **options: Any) -> Any: ...
    def decode(self, token_ids: Any, **options: Any) -> Any: ...
    def save_pretrained(self, save_directory: Any) -> Any: ...


def load_tokenizer(path_or_name: str | Path) -> Tokenizer:
    """A tokenizer from a folder or a hub name, with EOS and padding tokens.

    A tokenizer without EOS gets `<|endoftext|>` (one more id unless it knows the word); without padding token, EOS
    pads. Code that comes with a tokenizer is never run, and a folder is never looked up on the network.

    Raises UserError when there is no such tokenizer or it cannot be read.
    """
    from transformers import AutoTokenizer

    local = Path(path_or_name).expanduser()
    source = str(local) if local.exists() else str(path_or_name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, local_files_only=local.exists())
    except Exception as error:  # the library raises whatever its parsers and the network raise
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(
            f"cannot load the tokenizer {str(path_or_name)!r}: {reason}. Give a folder that AutoTokenizer can "
            "read (tokenizer.json, tokenizer_config.json) or a Hugging Face name; without --tokenizer_path one "
            "is trained."
        ) from error
    return ensure_special_tokens(tokenizer)


def tokenizer_in(folder: Path) -> Tokenizer:
    """The tokenizer in a folder that belongs to a model: never one of the hub that has the folder's name.

    Raises UserError when there is none, or it cannot be read.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder, and the model cannot be used without its tokenizer")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder.absolute()), trust_remote_code=False, local_files_only=True
        )
        tokenizer = ensure_special_tokens(tokenizer)
        fingerprint(tokenizer)
    except BaseException as error:  # a panic of the Rust library is no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
        raise UserError(f"{folder}: this tokenizer cannot be read ({reason})") from None
    return tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int = 1024) -> Tokenizer:
    """Trains a byte-level BPE: id 0 is `<|endoftext|>` (EOS and padding), then the 256 bytes, then merges.

    A small corpus may have fewer merges than asked for. Raises UserError when the bytes alone do not fit.
    """
    if vocab_size < _BYTE_ALPHABET + 1:
        raise UserError(
            f"vocab_size {vocab_size} is too small for a byte-level tokenizer: {_BYTE_ALPHABET} bytes and one "
            f"end-of-text token need at least {_BYTE_ALPHABET + 1}"
        )
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    tokenizer: Tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )
    return tokenizer


def ensure_special_tokens(tokenizer: Tokenizer) -> Tokenizer:
    """The same tokenizer, with EOS and padding tokens added where it has none."""
    if tokenizer.eos_token_id is None:
        tokenizer.add_special_tokens({"eos_token": END_OF_TEXT})
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def vocab_size(tokenizer: Tokenizer) -> int:
    """V, the highest id + 1 (added tokens included; ids may have gaps)."""
    return max(tokenizer.get_vocab().values()) + 1


def fingerprint(tokenizer: Tokenizer) -> str:
    """Hex digest of all that decides which ids a text gets: equal for a tokenizer and its saved copy."""
    backend = _backend(tokenizer)
    if backend is not None:
        definition = backend.to_str()
    else:
        definition = json.dumps([type(tokenizer).__name__, tokenizer.get_vocab()], sort_keys=True)
    content = f"{tokenizer.eos_token_id}\n{definition}"
    return hashlib.blake2b(content.encode(errors="surrogatepass"), digest_size=16).hexdigest()


def encode(tokenizer: Tokenizer, texts: Sequence[str], parse_special: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Texts -> their ids end to end, int32 [total], and the length of each, int64 [len(texts)].

    Nothing is added: no BOS, no EOS. With `parse_special=False` a text that happens to contain `<|endoftext|>` is
    spelt out as plain characters, so that no document can forge the end of a text; chat templates need True, and
    guard what their messages contain (`guarded`).

    Raises UserError for a text that the tokenizer cannot write.
    """
    encode_batch = _batch_encoder(tokenizer, parse_special)
    values, lengths = array("i"), array("q")
    parts = [[text] if parse_special else _parts(tokenizer, text) for text in texts]
    for batch in _batches([part for text in parts for part in text]):
        # One text at a time: Python's integers are gone again before they fall out of the CPU's cache.
        for ids in _all_or_error(tokenizer, encode_batch, batch):
            values.fromlist(ids)
            lengths.append(len(ids))
    result = np.array(values, dtype=np.int32), _sums(lengths, [len(text) for text in parts])
    return result if parse_special else _without_control(tokenizer, texts, *result)


def encode_part(tokenizer: Tokenizer, text: str, inside: bool) -> np.ndarray:
    """The ids of a part of a text, int32 [n]. `inside`: it does not begin the text, so it gets no blank (or mark of a
    word's beginning) that it does not have, which many tokenizers put at the start.

    Says so where the tokenizer cannot write the part as it is.
    """
    plain = encode(tokenizer, [text])[0]
    if not text or (not inside and tokenizer.decode(plain) == text):
        return plain
    for lead in _LEADS if inside else ():
        before = encode(tokenizer, [lead])[0]
        if tokenizer.decode(before) != lead:
            continue
        if tokenizer.decode(np.concatenate([before, plain])) == lead + text:
            return plain
        whole = encode(tokenizer, [lead + text])[0]
        if np.array_equal(whole[: len(before)], before) and tokenizer.decode(whole) == lead + text:
            return whole[len(before) :]
    print(f"the tokenizer writes {text!r} as {tokenizer.decode(plain)!r}")
    return plain


def _batch_encoder(tokenizer: Tokenizer, parse_special: bool) -> Callable[[Sequence[str]], Iterable[list[int]]]:
    """A function list of texts -> lists of ids, made when they are asked for."""
    backend = _backend(tokenizer)
    if backend is None:
        return lambda batch: tokenizer(batch, add_special_tokens=False, split_special_tokens=not parse_special)[
            "input_ids"
        ]
    backend.encode_special_tokens = not parse_special
    if not parse_special:
        return lambda batch: (e.ids for e in backend.encode_batch_fast(batch, add_special_tokens=False))

    def with_guards(batch: Sequence[str]) -> Iterator[list[int]]:
        plain = [text if not is_guarded(text) else "" for text in batch]
        found = backend.encode_batch_fast(plain, add_special_tokens=False)
        for text, encoding in zip(batch, found, strict=True):
            yield encoding.ids if not is_guarded(text) else spell(tokenizer, backend, text)

    return with_guards


def _all_or_error(
    tokenizer: Tokenizer, encode_batch: Callable[[Sequence[str]], Iterable[list[int]]], batch: Sequence[str]
) -> Iterator[list[int]]:
    """The ids of each text. The Rust library raises plain exceptions, for example without token for unknown words."""
    try:
        yield from encode_batch(batch)
    except UserError:
        raise
    except Exception as error:
        for text in batch:
            try:
                list(encode_batch([text]))
            except Exception as reason:
                raise UserError(
                    f"the tokenizer {name_of(tokenizer)} cannot write the text {unguarded(tokenizer, text)[:60]!r}: "
                    f"{reason}; give a --tokenizer_path that has a token for what is unknown"
                ) from reason
        raise UserError(f"the tokenizer {name_of(tokenizer)} failed: {error}") from error


def _without_control(
    tokenizer: Tokenizer, texts: Sequence[str], ids: np.ndarray, lengths: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The ids with no control token among them. Vocabularies of whole pieces (Unigram, WordLevel) hold their names as
    pieces of text too: the texts in which one was found are spelt again without these."""
    control = np.fromiter(control_tokens(tokenizer).values(), np.int32)
    forged = np.flatnonzero(np.isin(ids, control))
    if not len(forged):
        return ids, lengths
    ends = np.cumsum(lengths)
    parts = np.split(ids, ends[:-1])
    for i in np.unique(np.searchsorted(ends, forged, side="right")):
        parts[i] = np.array(spell(tokenizer, _backend(tokenizer), texts[i], plain=True), dtype=np.int32)
        if tokenizer.eos_token_id in parts[i]:
            raise UserError(
                f"the tokenizer {name_of(tokenizer)} writes words that it does not know as {tokenizer.eos_token!r}, "
                f"its end-of-text token; one is in the text {texts[i][:60]!r}: use a tokenizer with another for them"
            )
    return np.concatenate(parts), np.array([len(part) for part in parts], dtype=np.int64)


def _backend(tokenizer: Tokenizer) -> Any:
    """The Rust tokenizer with truncation and padding off (its file may ask for them), or None."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        backend.no_truncation()
        backend.no_padding()
    return backend


def _sums(lengths: Sequence[int], counts: list[int]) -> np.ndarray:
    """Of lengths of parts, and how many parts each text has, the lengths of the texts, int64."""
    ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])[np.cumsum([0, *counts])]
    return np.diff(ends)


def _parts(tokenizer: Tokenizer, text: str) -> list[str]:
    """A long text in parts of about _LONG characters that have, one by one, the ids of the whole.

    The Rust library takes some 160 bytes for every byte of a text. Parts begin at a blank (else after a sign), where a
    trial on the characters around it shows that the tokenizer does not see across.
    """
    parts, begin = [], 0
    while len(text) - begin > 2 * _LONG:
        end = _cut(tokenizer, text, begin + _LONG)
        if end is None:
            break
        parts.append(text[begin:end])
        begin = end
    return [*parts, text[begin:]]


def _cut(tokenizer: Tokenizer, text: str, start: int) -> int | None:
    """A place from `start` on where a text can be cut without another id; None where none of a few will do."""
    encode_batch = _batch_encoder(tokenizer, parse_special=False)
    for between in _BETWEEN_WORDS:
        places = (match.start() for match in between.finditer(text, start, start + _LONG // 2))
        for place in itertools.islice(places, _TRIALS):
            before, after = text[max(0, place - _AROUND) : place], text[place : place + _AROUND]
            whole, first, second = map(list, encode_batch([before + after, before, after]))
            if first + second == whole:
                return place
    return None


def _batches(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """Cuts texts into lists of at most _BATCH_TEXTS texts and about _BATCH_CHARACTERS characters."""
    start, characters = 0, 0
    for i, text in enumerate(texts):
        characters += len(text)
        if i + 1 - start >= _BATCH_TEXTS or characters >= _BATCH_CHARACTERS:
            yield texts[start : i + 1]
            start, characters = i + 1, 0
    if start < len(texts):
        yield texts[start:]


def require_chat_template(tokenizer: Tokenizer) -> None:
    """Raises UserError when the tokenizer has no chat template."""
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            f"--use_chat_template: the tokenizer {tokenizer.name_or_path or '(trained here)'!r} has no chat "
            "template; leave the flag out (prompt and answer are then joined by a line break) or give a "
            "tokenizer that has one"
        )


def chat_format(tokenizer: Tokenizer, messages: Sequence[tuple[str, str]]) -> tuple[str, str]:
    """A conversation as (role, content) in the chat template: (all up to where the assistant's last message begins,
    the rest), with `guarded` contents.

    The rest comes without the template's own end-of-text, which the caller appends as an id. Raises UserError for a
    template that cannot write it.
    """
    opening = _rendered(tokenizer, messages[:-1], add_generation_prompt=True)
    whole = _rendered(tokenizer, messages)
    if not whole.startswith(opening):
        raise UserError(
            f"the chat template of {tokenizer.name_or_path!r} writes a conversation differently once the "
            "answer is there, so prompt and answer cannot be told apart; leave --use_chat_template out"
        )
    reply = whole[len(opening) :]
    if reply.rstrip().endswith(tokenizer.eos_token):
        reply = reply.rstrip().removesuffix(tokenizer.eos_token)
    return opening, reply


def chat_prompt(tokenizer: Tokenizer, prompt: str) -> str:
    """A prompt in the tokenizer's chat template, up to where the assistant speaks."""
    return _rendered(tokenizer, [("user", prompt)], add_generation_prompt=True)


def _rendered(tokenizer: Tokenizer, messages: Sequence[tuple[str, str]], add_generation_prompt: bool = False) -> str:
    written = [{"role": role, "content": guarded(tokenizer, content)} for role, content in messages]
    try:
        return str(tokenizer.apply_chat_template(written, tokenize=False, add_generation_prompt=add_generation_prompt))
    except Exception as error:  # templates raise what they like, for example for a role that they do not know
        roles = ", ".join(role for role, _ in messages)
        raise RefusedConversation(
            f"the chat template of {name_of(tokenizer)} refuses a conversation of {roles}: {error}"
        ) from error


def encode_prompt(tokenizer: Tokenizer, prompt: str, use_chat_template: bool = False) -> np.ndarray:
    """The ids of a prompt as training saw them: int32 [m]."""
    if use_chat_template:
        require_chat_template(tokenizer)
        prompt = chat_prompt(tokenizer, prompt)
    return encode(tokenizer, [prompt], parse_special=use_chat_template)[0]
