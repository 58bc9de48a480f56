"""Writing texts with a trained model: what they begin with, where they end, how they go on where an image is full."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ds_tokimg.errors import UserError
from ds_tokimg.inference.loading import TrainedModel
from ds_tokimg.inference.options import SamplingOptions
from ds_tokimg.inference.sampler import Part, Watch, sample, sample_stream
from ds_tokimg.tokens import tokenizer as tokenizers

GAP = re.compile(r"<gap:(\d+)>")

# A text, or, for models that were trained in a chat template, a conversation: (role, content) of each message.
Prompt = str | Sequence[tuple[str, str]] | None


def generate(
    trained: TrainedModel, prompts: Sequence[Prompt], options: SamplingOptions, watch: Watch | None = None
) -> list[dict]:
    """One text per prompt (None: from noise alone).

    A model trained with conditions answers a prompt; another continues it: the prompt's tokens are held fixed at the
    start of the image. A text that is longer than an image goes on in another one, which begins with the last half of
    the full one. Returns a dict each:

        prompt, text, num_tokens
        token_ids: of the text, without its end; with those of a stop text that ended it.
        finish_reason: "stop" where the text ended, by itself or at a stop text, "length" where it was cut off.
        stop_reason: the stop text that ended it, or None.
        image_ids: all tokens of its image (of the last one).

    Raises UserError when a prompt leaves no room.
    """
    texts = _begin(trained, prompts, options.max_new_tokens)
    image, invalid = 0, 0
    unfinished = texts
    while unfinished:
        lengths = [text.length for text in unfinished]
        ended = _Ended(trained, unfinished, options.stop)
        part = Part(image, [text.place for text in unfinished], ended)
        beginnings = (_conditions(unfinished), _given(unfinished))
        rows, bad = sample(trained.model, lengths, options, *beginnings, watch if image == 0 else None, part)
        for text, row in zip(unfinished, rows, strict=True):
            text.take(row)
        unfinished = [text for text in unfinished if not text.end(trained, options.stop).is_known and text.go_on()]
        image, invalid = image + 1, invalid + bad
    _report(invalid)
    return [text.result(trained, options.stop) for text in texts]


class TextStream:
    """The text that `generate` writes, in pieces, as its blocks are written; it ends with the text. A model that writes
    the whole image at once gives a piece an image. When the last piece is out, `result` is the dict of `generate`.

    Args:
        place: of the prompt in a list for `generate`, which gives the same text there.

    Raises UserError when the prompt leaves no room.
    """

    def __init__(self, trained: TrainedModel, prompt: Prompt, options: SamplingOptions, place: int = 0):
        self.trained, self.options = trained, options
        self.text = _begin(trained, [prompt], options.max_new_tokens)[0]
        self.text.place = place
        self.result: dict = {}

    def __iter__(self) -> Iterator[str]:
        given_out = ""
        for end in self._ends():
            text = end.text(self.trained)
            if end.is_known:
                break
            # What may be the beginning of a stop text, or of a character, waits for the next block.
            text = text[: len(text) - _waiting(text, self.options.stop)]
            if text.startswith(given_out) and not text.endswith("\ufffd") and text != given_out:
                yield text[len(given_out) :]
                given_out = text
        self.result = self.text.result(self.trained, self.options.stop)
        if self.result["text"] != given_out:
            yield self.result["text"].removeprefix(given_out)

    def _ends(self) -> Iterator[End]:
        """How far the text is, after each block of each image."""
        text, image = self.text, 0
        while True:
            part = Part(image, [text.place])
            given = dict(enumerate(text.context))
            for row in sample_stream(self.trained.model, text.length, self.options, text.condition, given, part):
                text.take(row)
                end = text.end(self.trained, self.options.stop)
                yield end
                if end.is_known:
                    return
            if not text.go_on():
                return
            image += 1


@dataclass
class _Text:
    """A text that is being written.

    place: in the list of prompts. wanted: new tokens at most. room: tokens that an image holds, those before the new
    ones included. kept: tokens of a full image that the next one begins with.
    condition: what it answers. context: tokens that stand before the new ones in the image at hand.
    before: new tokens of the images before it. new: those of this one. image_ids: all of this one.
    """

    place: int
    prompt: Prompt
    wanted: int
    room: int
    kept: int
    condition: list[int] | None = None
    context: list[int] = field(default_factory=list)
    before: list[int] = field(default_factory=list)
    new: list[int] = field(default_factory=list)
    image_ids: list[int] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Tokens of the image at hand, when it is written."""
        return min(self.room, len(self.context) + self.wanted - len(self.before))

    def take(self, row: list[int]) -> None:
        """What is written of the image at hand."""
        self.image_ids, self.new = row, row[len(self.context) :]

    def go_on(self) -> bool:
        """To the next image, where the one at hand is full; whether more is wanted."""
        self.before, self.new = self.before + self.new, []
        self.context = self.image_ids[-self.kept :]
        return len(self.before) < self.wanted and len(self.image_ids) == self.room

    def end(self, trained: TrainedModel, stops: Sequence[str]) -> End:
        may_open_with_end = self.condition is None and not self.prompt
        return find_end(trained, self.before + self.new, stops, may_open_with_end)

    def result(self, trained: TrainedModel, stops: Sequence[str]) -> dict:
        end = self.end(trained, stops)
        return {
            "prompt": self.prompt,
            "text": end.text(trained),
            "token_ids": end.ids,
            "num_tokens": len(end.ids),
            "finish_reason": "stop" if end.is_known else "length",
            "stop_reason": end.stop,
            "image_ids": self.image_ids,
        }


class _Ended:
    """Whether texts have ended, see `Part`."""

    def __init__(self, trained: TrainedModel, texts: list[_Text], stops: Sequence[str]):
        self.trained, self.texts, self.stops = trained, texts, stops

    def __call__(self, number: int, ids: list[int]) -> bool:
        text = self.texts[number]
        if not self.stops and ids[-1:] != [self.trained.format.eos_id] and self.trained.format.eos_id not in ids:
            return False
        text.take(ids)
        return text.end(self.trained, self.stops).is_known


# ---- ends ----


class End(NamedTuple):
    """Where a text ends, as far as it is written.

    ids: its tokens. is_known: no more will follow. stop: the stop text that ended it.
    """

    ids: list[int]
    is_known: bool
    stop: str | None = None

    def text(self, trained: TrainedModel) -> str:
        text = str(trained.tokenizer.decode(self.ids, skip_special_tokens=True))
        return text if self.stop is None else text[: text.index(self.stop)]


def find_end(trained: TrainedModel, ids: list[int], stops: Sequence[str], may_open_with_end: bool) -> End:
    """The end of a text of these new tokens: the end-of-text token, or the first token that completes a stop text.

    may_open_with_end: a packed image may open with the end of the text before, which is not this one's.
    """
    eos = trained.format.eos_id
    begin = 0
    while may_open_with_end and begin < len(ids) and ids[begin] == eos:
        begin += 1
    has_ended = eos in ids[begin:]
    ids = ids[begin : ids.index(eos, begin)] if has_ended else ids[begin:]
    if any(stop in trained.tokenizer.decode(ids, skip_special_tokens=True) for stop in stops):
        for length in range(1, len(ids) + 1):
            text = trained.tokenizer.decode(ids[:length], skip_special_tokens=True)
            found = [stop for stop in stops if stop in text]
            if found:
                return End(ids[:length], True, min(found, key=text.index))
    return End(ids, has_ended)


def _waiting(text: str, stops: Sequence[str]) -> int:
    """How many of the last characters may be the beginning of a stop text."""
    lengths = (n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
    return max(lengths, default=0)


# ---- beginnings ----


def _begin(trained: TrainedModel, prompts: Sequence[Prompt], max_new_tokens: int | None) -> list[_Text]:
    """Texts before anything is written. Says so where a prompt is cut, or a text will not fit into an image."""
    begin = _answer if trained.format.enable_condition else _continuation
    texts = [begin(trained, place, prompt, max_new_tokens) for place, prompt in enumerate(prompts)]
    longest = max((len(text.context) + text.wanted for text in texts), default=0)
    room, kept = (texts[0].room, texts[0].kept) if texts else (0, 0)
    if longest > room:
        say(
            f"an image holds {room:,} tokens: a text that is longer goes on in another one, and what is written there "
            f"is written from its last {kept:,} tokens"
        )
    return texts


def _answer(trained: TrainedModel, place: int, prompt: Prompt, max_new_tokens: int | None) -> _Text:
    """An answer has one image, as in training."""
    seen = trained.format.max_tokens
    room = trained.format.canvas * trained.layout.slots or seen
    capacity = trained.layout.codec.capacity(trained.layout.img_size)
    wanted = room if max_new_tokens is None else max_new_tokens
    if wanted > capacity:
        raise UserError(
            f"max_new_tokens is {wanted:,}; an answer has one image, and that holds {capacity:,}: take at most these"
        )
    if wanted > room and place == 0:
        say(f"answers had at most {room:,} tokens in training: after these the model cannot know how to go on")
    ids = [] if prompt is None else _prompt_ids(trained, prompt)
    if len(ids) > seen:  # as in training
        say(f"the prompt {_shortened(prompt)} has {len(ids):,} tokens; the last {seen:,} of them are seen (max_tokens)")
    return _Text(place, prompt, wanted, wanted, 0, condition=ids[-seen:])


def _continuation(trained: TrainedModel, place: int, prompt: Prompt, max_new_tokens: int | None) -> _Text:
    room = trained.format.max_tokens
    kept = room // 2 // trained.layout.slots * trained.layout.slots or room // 2  # whole patches, where there are some
    context = [] if prompt is None else _prompt_ids(trained, prompt)
    if len(context) >= room:
        if not kept:
            raise UserError(f"the prompt {_shortened(prompt)} has {len(context):,} tokens; the image holds {room:,}")
        say(
            f"the prompt {_shortened(prompt)} has {len(context):,} tokens; an image holds {room:,}: its last {kept:,} "
            "are seen"
        )
        context = context[-kept:]
    wanted = room - len(context) if max_new_tokens is None else max_new_tokens
    if not kept and len(context) + wanted > room:
        raise UserError(f"max_new_tokens is {wanted:,}; the image has room for {room - len(context):,}")
    return _Text(place, prompt, wanted, room, kept, context=context)


def _conditions(texts: list[_Text]) -> list[list[int]] | None:
    conditions = [text.condition for text in texts if text.condition is not None]
    return conditions or None


def _given(texts: list[_Text]) -> list[dict[int, int]] | None:
    return [dict(enumerate(text.context)) for text in texts] if any(text.context for text in texts) else None


def _prompt_ids(trained: TrainedModel, prompt: Prompt) -> list[int]:
    if isinstance(prompt, str):
        return tokenizers.encode_prompt(trained.tokenizer, prompt, trained.format.use_chat_template).tolist()
    return tokenizers.encode_conversation(trained.tokenizer, prompt or ()).tolist()


def _shortened(prompt: Prompt) -> str:
    text = prompt if isinstance(prompt, str) else prompt[-1][1] if prompt else ""
    return repr(text) if len(text) <= 40 else f"{text[:40]!r}…"


# ---- gaps ----


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
    if trained.model.writing.asked(options.block_size).block_size:
        say("this is written from left to right: a gap is filled from what stands before it, not from what follows")
    rows, invalid = sample(trained.model, [length] * count, options, given=[known] * count, watch=watch)
    _report(invalid)
    common = {"prompt": text, "num_tokens": length, "finish_reason": "length", "stop_reason": None}
    decode = trained.tokenizer.decode
    return [
        common | {"text": decode(row, skip_special_tokens=True), "token_ids": row, "image_ids": row} for row in rows
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


# ---- what is shown ----


def say(text: str) -> None:
    """A remark, beside what is written."""
    print(f"note: {text}", file=sys.stderr, flush=True)


def _report(invalid: int) -> None:
    if invalid:
        say(f"{invalid} colours were no token; the nearest was taken")


def title_of(number: int, prompt: Prompt) -> str:
    return f"[{number}]" if prompt is None else f"[{number}] {prompt!r} ->"


def show(texts: list[dict]) -> None:
    for number, text in enumerate(texts):
        end = f"{text['num_tokens']} tokens, {text['finish_reason']}"
        print(f"{title_of(number, text['prompt'])} ({end}) {text['text']}")


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
