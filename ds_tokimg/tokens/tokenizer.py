"""Tokenizers: load one, train one, and turn texts into ids at the speed of the Rust library.

`transformers` and `tokenizers` are imported when first needed.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from array import array
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from ds_tokimg.errors import UserError

END_OF_TEXT = "<|endoftext|>"

# Texts handed to Rust at a time. Larger batches fall out of the CPU's cache (4,000 lines: 10-20 % slower), smaller
# ones pay for the call.
_BATCH_TEXTS = 1000
_BATCH_CHARACTERS = 1_000_000

_BYTE_ALPHABET = 256

# Put before a text to see how it is written in the middle of another; the first that it does not merge with is taken.
_LEADS = ("\n", ".", "a", "1")

# New in every process, so that no text can hold them: what stands for the name of a control token that is text, and
# for one that is a control token.
_GUARD, _CONTROL = secrets.token_hex(12), secrets.token_hex(12)
_SECRET = re.compile(f"{_GUARD}x(\\d+)x")


class RefusedConversation(UserError, ValueError):
    """A chat template that raises an error for a conversation: a bad record, or a user's mistake."""


def load_tokenizer(path_or_name: str | Path):
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


def train_tokenizer(texts: Iterable[str], vocab_size: int = 1024):
    """Trains a byte-level BPE: id 0 is `<|endoftext|>` (EOS and padding), then the 256 bytes, then merges.

    A small corpus may have fewer merges than asked for. Raises UserError when the bytes alone do not fit.
    """
    if vocab_size < _BYTE_ALPHABET + 1:
        raise UserError(
            f"vocab_size {vocab_size} is too small for a byte-level tokenizer: {_BYTE_ALPHABET} bytes and one "
            f"end-of-text token need at least {_BYTE_ALPHABET + 1}"
        )
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def ensure_special_tokens(tokenizer):
    """The same tokenizer, with EOS and padding tokens added where it has none."""
    if tokenizer.eos_token_id is None:
        tokenizer.add_special_tokens({"eos_token": END_OF_TEXT})
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def vocab_size(tokenizer) -> int:
    """V, the highest id + 1 (added tokens included; ids may have gaps)."""
    return max(tokenizer.get_vocab().values()) + 1


def fingerprint(tokenizer) -> str:
    """Hex digest of all that decides which ids a text gets: equal for a tokenizer and its saved copy."""
    backend = _backend(tokenizer)
    if backend is not None:
        definition = backend.to_str()
    else:
        definition = json.dumps([type(tokenizer).__name__, tokenizer.get_vocab()], sort_keys=True)
    content = f"{tokenizer.eos_token_id}\n{definition}"
    return hashlib.blake2b(content.encode(errors="surrogatepass"), digest_size=16).hexdigest()


def encode(tokenizer, texts: Sequence[str], parse_special: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Texts -> their ids end to end, int32 [total], and the length of each, int64 [len(texts)].

    Nothing is added: no BOS, no EOS. With `parse_special=False` a text that happens to contain `<|endoftext|>` is
    spelt out as plain characters, so that no document can forge the end of a text; chat templates need True, and
    guard what their messages contain (`guarded`).

    Raises UserError for a text that the tokenizer cannot write.
    """
    encode_batch = _batch_encoder(tokenizer, parse_special)
    values, lengths = array("i"), array("q")
    for batch in _batches(texts):
        # One text at a time: Python's integers are gone again before they fall out of the CPU's cache.
        for ids in _all_or_error(tokenizer, encode_batch, batch):
            values.fromlist(ids)
            lengths.append(len(ids))
    result = np.array(values, dtype=np.int32), np.array(lengths, dtype=np.int64)
    return result if parse_special else _without_control(tokenizer, texts, *result)


def encode_part(tokenizer, text: str, inside: bool) -> np.ndarray:
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


def _batch_encoder(tokenizer, parse_special: bool):
    """A function list of texts -> lists of ids, made when they are asked for."""
    backend = _backend(tokenizer)
    if backend is None:
        return lambda batch: tokenizer(batch, add_special_tokens=False, split_special_tokens=not parse_special)[
            "input_ids"
        ]
    backend.encode_special_tokens = not parse_special
    if not parse_special:
        return lambda batch: (e.ids for e in backend.encode_batch_fast(batch, add_special_tokens=False))

    def with_guards(batch: Sequence[str]):
        plain = [text if _GUARD not in text else "" for text in batch]
        found = backend.encode_batch_fast(plain, add_special_tokens=False)
        for text, encoding in zip(batch, found, strict=True):
            yield encoding.ids if _GUARD not in text else _spell(tokenizer, text)

    return with_guards


def _all_or_error(tokenizer, encode_batch, batch: Sequence[str]):
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
                    f"the tokenizer {_name(tokenizer)} cannot write the text {unguarded(tokenizer, text)[:60]!r}: "
                    f"{reason}; give a --tokenizer_path that has a token for what is unknown"
                ) from reason
        raise UserError(f"the tokenizer {_name(tokenizer)} failed: {error}") from error


def _name(tokenizer) -> str:
    return repr(tokenizer.name_or_path or "(trained here)")


# ---- control tokens that texts spell ----


def control_tokens(tokenizer) -> dict[str, int]:
    """Names and ids of the tokens that mean something beyond their characters: the end of a text, a chat's turns, …

    The one for unknown words is none of them, unless it is also the end of a text.
    """
    return _control_tokens(tokenizer, len(tokenizer), tokenizer.eos_token)


@lru_cache(maxsize=4)
def _control_tokens(tokenizer, _number: int, _end: str) -> dict[str, int]:
    """Found once for a tokenizer, until it gets others."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    tokens = {str(token): number for number, token in added.items() if token.special}
    tokens |= dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    backend = getattr(tokenizer, "backend_tokenizer", None)
    for unknown in (tokenizer.unk_token, getattr(getattr(backend, "model", None), "unk_token", None)):
        if unknown is not None and unknown != tokenizer.eos_token:
            tokens.pop(unknown, None)
    return tokens


def guarded(tokenizer, content: str) -> str:
    """What goes into a chat template as someone's words: names of control tokens in it stay text when the whole is
    encoded with `parse_special`. Unchanged where it holds none."""
    names = list(control_tokens(tokenizer))
    return _pattern(tuple(names)).sub(lambda match: _secret(names.index(match[0])), content) if names else content


def unguarded(tokenizer, text: str) -> str:
    """A text with `guarded` parts as people read it."""
    if _GUARD not in text:
        return text
    names = list(control_tokens(tokenizer))
    return _SECRET.sub(lambda match: names[int(match[1])], text)


def _secret(number: int) -> str:
    return f"{_GUARD}x{number}x"


@lru_cache(maxsize=8)
def _pattern(names: tuple[str, ...]) -> re.Pattern:
    return re.compile("|".join(re.escape(name) for name in sorted(names, key=len, reverse=True)))


def _without_control(tokenizer, texts: Sequence[str], ids: np.ndarray, lengths: np.ndarray):
    """The ids with no control token among them. Vocabularies of whole pieces (Unigram, WordLevel) hold their names as
    pieces of text too: the texts in which one was found are spelt again without these."""
    control = np.fromiter(control_tokens(tokenizer).values(), np.int32)
    forged = np.flatnonzero(np.isin(ids, control))
    if not len(forged):
        return ids, lengths
    ends = np.cumsum(lengths)
    parts = np.split(ids, ends[:-1])
    for i in np.unique(np.searchsorted(ends, forged, side="right")):
        parts[i] = np.array(_spell(tokenizer, texts[i], plain=True), dtype=np.int32)
        if tokenizer.eos_token_id in parts[i]:
            raise UserError(
                f"the tokenizer {_name(tokenizer)} writes words that it does not know as {tokenizer.eos_token!r}, its "
                f"end-of-text token; one is in the text {texts[i][:60]!r}: use a tokenizer with another token for them"
            )
    return np.concatenate(parts), np.array([len(part) for part in parts], dtype=np.int64)


def _spell(tokenizer, text: str, plain: bool = False) -> list[int]:
    """The ids of one text by a copy of the tokenizer whose control tokens go by names that no text can hold.

    `plain`: nothing in the text is a control token; otherwise what is not `guarded` is.
    """
    names = tuple(control_tokens(tokenizer))
    backend = _backend(tokenizer)
    if backend is None:
        raise UserError(
            f"the tokenizer {_name(tokenizer)} cannot keep the name of a control token as text, in "
            f"{unguarded(tokenizer, text)[:60]!r}: leave that text out, or use a tokenizer with a tokenizer.json"
        )
    if not plain:
        marked = _pattern(names).sub(lambda match: f"{_CONTROL}x{names.index(match[0])}x", text)
        text = unguarded(tokenizer, marked)
    return _renamed(backend.to_str(), names).encode(text, add_special_tokens=False).ids


@lru_cache(maxsize=2)
def _renamed(definition: str, names: tuple[str, ...]):
    """A tokenizer like the one that is defined, in which control tokens are called by `_CONTROL` and their number."""
    from tokenizers import Tokenizer

    new = {name: f"{_CONTROL}x{number}x" for number, name in enumerate(names)}
    content = json.loads(definition)
    model = content["model"]
    for token in content["added_tokens"]:
        token["content"] = new.get(token["content"], token["content"])
    if model.get("unk_token") in new:  # where it is also the end of a text
        model["unk_token"] = new[model["unk_token"]]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {new.get(piece, piece): number for piece, number in model["vocab"].items()}
    else:
        model["vocab"] = [[new.get(piece, piece), score] for piece, score in model["vocab"]]
    if "merges" in model:
        pairs = ((pair, pair.split(" ") if isinstance(pair, str) else pair) for pair in model["merges"])
        model["merges"] = [pair for pair, parts in pairs if not {"".join(parts), *parts} & new.keys()]
    content["post_processor"] = None  # it adds control tokens, which is never asked for
    return Tokenizer.from_str(json.dumps(content))


def _backend(tokenizer):
    """The Rust tokenizer with truncation and padding off (its file may ask for them), or None."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        backend.no_truncation()
        backend.no_padding()
    return backend


def _batches(texts: Sequence[str]):
    """Cuts texts into lists of at most _BATCH_TEXTS texts and about _BATCH_CHARACTERS characters."""
    start, characters = 0, 0
    for i, text in enumerate(texts):
        characters += len(text)
        if i + 1 - start >= _BATCH_TEXTS or characters >= _BATCH_CHARACTERS:
            yield texts[start : i + 1]
            start, characters = i + 1, 0
    if start < len(texts):
        yield texts[start:]


def require_chat_template(tokenizer) -> None:
    """Raises UserError when the tokenizer has no chat template."""
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            f"--use_chat_template: the tokenizer {tokenizer.name_or_path or '(trained here)'!r} has no chat "
            "template; leave the flag out (prompt and answer are then joined by a line break) or give a "
            "tokenizer that has one"
        )


def chat_format(tokenizer, messages: Sequence[tuple[str, str]]) -> tuple[str, str]:
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


def chat_prompt(tokenizer, prompt: str) -> str:
    """A prompt in the tokenizer's chat template, up to where the assistant speaks."""
    return _rendered(tokenizer, [("user", prompt)], add_generation_prompt=True)


def _rendered(tokenizer, messages: Sequence[tuple[str, str]], add_generation_prompt: bool = False) -> str:
    written = [{"role": role, "content": guarded(tokenizer, content)} for role, content in messages]
    try:
        return tokenizer.apply_chat_template(written, tokenize=False, add_generation_prompt=add_generation_prompt)
    except Exception as error:  # templates raise what they like, for example for a role that they do not know
        roles = ", ".join(role for role, _ in messages)
        raise RefusedConversation(
            f"the chat template of {_name(tokenizer)} refuses a conversation of {roles}: {error}"
        ) from error


def encode_prompt(tokenizer, prompt: str, use_chat_template: bool = False) -> np.ndarray:
    """The ids of a prompt as training saw them: int32 [m]."""
    if use_chat_template:
        require_chat_template(tokenizer)
        prompt = chat_prompt(tokenizer, prompt)
    return encode(tokenizer, [prompt], parse_special=use_chat_template)[0]
