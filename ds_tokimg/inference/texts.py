"""Writing texts with a trained model."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ds_tokimg.errors import UserError
from ds_tokimg.inference.loading import TrainedModel
from ds_tokimg.inference.sampler import SamplingOptions, Watch, sample, sample_stream
from ds_tokimg.tokens import tokenizer as tokenizers

GAP = re.compile(r"<gap:(\d+)>")


def generate(
    trained: TrainedModel,
    prompts: list[str | None],
    options: SamplingOptions,
    max_new_tokens: int | None = None,
    watch: Watch | None = None,
) -> list[dict]:
    """One text per prompt (None: from noise alone).

    A model trained with conditions answers a prompt; another continues it: the prompt's tokens are held fixed at the
    start of the image. Returns a dict each: prompt, text (up to EOS), token_ids (of the text, without EOS),
    num_tokens, image_ids (all tokens of the image). Raises UserError when a prompt leaves no room.
    """
    begin = _begin(trained, prompts, max_new_tokens)
    rows, invalid = sample(trained.model, begin.lengths, options, begin.conditions, begin.given, watch)
    _report(invalid)
    return [
        _as_text(trained, prompt, row, start) for prompt, row, start in zip(prompts, rows, begin.starts, strict=True)
    ]


def stream(
    trained: TrainedModel, prompt: str | None, options: SamplingOptions, max_new_tokens: int | None = None
) -> Iterator[str]:
    """The text that `generate` writes, in pieces, as its blocks are written; it ends with the text. A model that writes
    the whole image at once gives one piece. Raises UserError when the prompt leaves no room."""
    begin = _begin(trained, [prompt], max_new_tokens)
    condition = begin.conditions[0] if begin.conditions else None
    given = begin.given[0] if begin.given else None
    given_out, text = "", ""
    for row in sample_stream(trained.model, begin.lengths[0], options, condition, given):
        ids, ended = _text_ids(trained, row, begin.starts[0])
        text = trained.tokenizer.decode(ids, skip_special_tokens=True)
        # Bytes that are no whole character yet wait for the next block.
        if text.startswith(given_out) and not text.endswith("\ufffd") and text != given_out:
            yield text[len(given_out) :]
            given_out = text
        if ended:
            break
    if text != given_out:
        yield text.removeprefix(given_out)


@dataclass(frozen=True)
class _Begin:
    """What texts begin with, one item a text.

    lengths: tokens to write, with those that are given. starts: where the new ones begin.
    conditions, given: see `sample`.
    """

    lengths: list[int]
    starts: list[int]
    conditions: list[list[int]] | None = None
    given: list[dict[int, int]] | None = None


def _begin(trained: TrainedModel, prompts: list[str | None], max_new_tokens: int | None) -> _Begin:
    text_format = trained.format
    room = text_format.canvas * trained.layout.slots or text_format.max_tokens
    ids = [[] if prompt is None else _prompt_ids(trained, prompt) for prompt in prompts]
    length = _length(max_new_tokens, trained.layout.codec.capacity(trained.layout.img_size), room)
    if text_format.enable_condition:
        return _Begin([length] * len(ids), [0] * len(ids), conditions=ids)
    starts = [len(prompt) for prompt in ids]
    for prompt, start in zip(prompts, starts, strict=True):
        if start >= room:
            raise UserError(f"the prompt {prompt!r} has {start} tokens; the image holds {room}: shorten it")
    lengths = [min(room, start + length) for start in starts]
    return _Begin(lengths, starts, given=[dict(enumerate(prompt)) for prompt in ids] if any(starts) else None)


def infill(
    trained: TrainedModel, text: str, options: SamplingOptions, count: int = 1, watch: Watch | None = None
) -> list[dict]:
    """`count` fillings of a text with gaps (`<gap:N>`, N tokens each): dicts as those of `generate`.

    What stands between the gaps stays, token by token. A model sees both sides of a gap when the whole image is
    written at once (block_size 0), and only what stands before it from left to right. Raises UserError for a text
    without a gap, or one that does not fit, or a model that was trained to answer.
    """
    if trained.format.enable_condition:
        raise UserError("this model was trained with --enable_condition: it answers a prompt, and fills no gaps")
    known, length = _known_tokens(trained, text)
    if length > trained.format.max_tokens:
        raise UserError(f"{length} tokens with the gaps; the image holds {trained.format.max_tokens}: shorten the text")
    rows, invalid = sample(trained.model, [length] * count, options, given=[known] * count, watch=watch)
    _report(invalid)
    texts = [trained.tokenizer.decode(row, skip_special_tokens=True) for row in rows]
    return [
        {"prompt": text, "text": filled, "token_ids": row, "num_tokens": length, "image_ids": row}
        for filled, row in zip(texts, rows, strict=True)
    ]


def _known_tokens(trained: TrainedModel, text: str) -> tuple[dict[int, int], int]:
    """Of a text with gaps: {place: token id}, and how many tokens it has with its gaps."""
    pieces = GAP.split(text)  # text, N, text, N, … text
    gaps = [int(size) for size in pieces[1::2]]
    if not any(gaps):
        raise UserError(f"no gap to fill in {text[:40]!r}: write one of 8 tokens as <gap:8>")
    known: dict[int, int] = {}
    place = 0
    for number, (piece, gap) in enumerate(zip(pieces[::2], [*gaps, 0], strict=True)):
        ids = tokenizers.encode_part(trained.tokenizer, piece, inside=number > 0).tolist()
        known |= dict(enumerate(ids, start=place))
        place += len(ids) + gap
    return known, place


def _report(invalid: int) -> None:
    if invalid:
        print(f"{invalid} colours were no token; the nearest was taken")


def _prompt_ids(trained: TrainedModel, prompt: str) -> list[int]:
    ids = tokenizers.encode_prompt(trained.tokenizer, prompt, trained.format.use_chat_template).tolist()
    seen = trained.format.max_tokens
    if trained.format.enable_condition and len(ids) > seen:  # as in training
        print(f"the prompt {prompt[:40]!r}… has {len(ids):,} tokens; the last {seen:,} of them are seen (max_tokens)")
        return ids[-seen:]
    capacity = trained.layout.codec.capacity(trained.layout.img_size)
    if len(ids) > capacity:
        raise UserError(f"the prompt {prompt[:40]!r}… has {len(ids)} tokens; an image holds {capacity}: shorten it")
    return ids


def _length(max_new_tokens: int | None, capacity: int, room: int) -> int:
    if max_new_tokens is None:
        return room
    if not 1 <= max_new_tokens <= capacity:
        raise UserError(f"max_new_tokens is {max_new_tokens}; it must be between 1 and the image's {capacity}")
    return max_new_tokens


def _as_text(trained: TrainedModel, prompt: str | None, row: list[int], start: int) -> dict:
    ids, _ = _text_ids(trained, row, start)
    text = trained.tokenizer.decode(ids, skip_special_tokens=True)
    return {"prompt": prompt, "text": text, "token_ids": ids, "num_tokens": len(ids), "image_ids": row}


def _text_ids(trained: TrainedModel, row: list[int], start: int) -> tuple[list[int], bool]:
    """The tokens of the new text in an image's tokens, without its end, and whether it has ended."""
    eos = trained.format.eos_id
    ids = row[start:]
    while ids and ids[0] == eos and not trained.format.enable_condition and start == 0:
        ids = ids[1:]  # a packed image may open with the end of the text before
    return (ids[: ids.index(eos)], True) if eos in ids else (ids, False)


def show(texts: list[dict]) -> None:
    for number, text in enumerate(texts):
        title = f"[{number}]" if text["prompt"] is None else f"[{number}] {text['prompt']!r} ->"
        print(f"{title} ({text['num_tokens']} tokens) {text['text']}")


def images_of(trained: TrainedModel, texts: list[dict]) -> Tensor:
    """The images of generated texts, [n, 3, H, W] in [0, 1]."""
    layout = trained.layout
    options = (layout.img_size, layout.layout, layout.patch_size)
    return torch.stack([(layout.codec.encode(text["image_ids"], *options)[0] + 1) / 2 for text in texts])


def save_images(trained: TrainedModel, texts: list[dict], directory: Path) -> None:
    """Writes sample_0000.png, … into the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    layout = trained.layout
    for number, text in enumerate(texts):
        path = directory / f"sample_{number:04d}.png"
        layout.codec.save_png(path, text["image_ids"], layout.img_size, layout.layout, layout.patch_size)
