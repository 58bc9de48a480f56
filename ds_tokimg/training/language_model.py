"""The object that a user of the Python package holds: a trained model that writes, answers, fills gaps and measures.

It stands beside the bound, which `bits` needs; everything else of it is `ds_tokimg.inference`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, Unpack

import numpy as np
from PIL import Image

from ds_tokimg.choices import WEIGHTS
from ds_tokimg.errors import UserError, nearest, shortened
from ds_tokimg.inference import fitness, texts
from ds_tokimg.inference.loading import TrainedModel, fetch, load_trained
from ds_tokimg.inference.options import SamplingOptions
from ds_tokimg.inference.pictures import Frame, draw
from ds_tokimg.tokens import tokenizer as tokenizers
from ds_tokimg.training.bound import BoundOptions, TextList, bound_of
from ds_tokimg.training.objective import TrainingLoss


def load(path: str | Path, device: str = "auto", weights: str = "ema") -> LanguageModel:
    """A trained model, ready to write.

    Args:
        path: an export, a checkpoint, a run's folder (its best checkpoint), or the name of an export on the Hugging
            Face hub (`owner/name`).
        device: as torch names it; `auto`: an accelerator if torch finds one, else the CPU.
        weights: of a checkpoint, `ema` for the averaged ones or `trained` for those of the last step.

    Raises UserError when there is no such model or device.
    """
    if not isinstance(path, str | Path):
        raise UserError(f"load({shortened(path)}): expected the path of a folder, or a name on the Hugging Face hub")
    for name, value in (("device", device), ("weights", weights)):
        _check_text(name, value)
    if weights not in WEIGHTS:
        raise UserError(f"weights is {weights!r}: expected one of {', '.join(WEIGHTS)}")
    return LanguageModel(load_trained(str(fetch(path)), weights, device))


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise UserError(f"{name} is {shortened(value)}: expected a text")


def _check_prompt(prompt: object) -> None:
    if prompt is not None:
        _check_text("the prompt", prompt)


class Sampling(TypedDict, total=False):
    """How to write, see `SamplingOptions`; the same options and seed give the same text.

    seed: of the noise, 0 where it is left out. temperature, top_k, top_p: of the distributions that tokens are drawn
    from. stop: a text, or several, before which what is written ends. num_inference_steps: network evaluations, of
    every block. guidance_scale: above 1 exaggerates what the prompt asks for (models that answer). sampler, eta,
    block_size, batch_size: as the flags of `generate`.
    """

    seed: int
    temperature: float
    top_k: int | None
    top_p: float
    stop: str | Sequence[str]
    num_inference_steps: int | None
    guidance_scale: float
    sampler: str
    eta: float
    block_size: int | None
    batch_size: int


@dataclass(frozen=True)
class Bits:
    """What a text costs under a model: a bound, as `evaluate` measures it."""

    total: float
    tokens: int  # the end of the text included
    bytes: int  # UTF-8
    loses_text: bool = False  # the tokenizer does not give the text back

    @property
    def per_token(self) -> float:
        return self.total / self.tokens

    @property
    def per_byte(self) -> float:
        """nan where the tokenizer loses text: what is lost is not paid for."""
        return math.nan if self.loses_text else self.total / self.bytes


@dataclass(frozen=True)
class LanguageModel:
    """A trained model. It writes the way it was trained to: left to right, or the whole image at once.

    All methods take the options of `Sampling`. Raises UserError for what the model cannot do.
    """

    trained: TrainedModel

    def __repr__(self) -> str:
        model = self.trained.model
        size = sum(p.numel() for p in model.parameters()) / 1e6
        block = model.writing.block_size
        way = f"blocks of {block} patch{'es' * (block > 1)} from left to right" if block else "the whole image at once"
        what = "answers prompts" if self.answers else "continues texts"
        return (
            f"<LanguageModel {self.trained.path}: {size:.2f} M parameters, {model.codec.vocab_size:,} tokens, writes "
            f"{way}, {what}, on {self.trained.device}>"
        )

    def __call__(
        self, prompt: str | None = None, max_new_tokens: int | None = None, **sampling: Unpack[Sampling]
    ) -> str:
        """What the model writes after a prompt (None: from noise alone): the continuation without the prompt, or,
        where it was trained on prompts and answers, the answer. At most `max_new_tokens` tokens, up to the text's end.
        """
        return "".join(self.stream(prompt, max_new_tokens, **sampling))

    def stream(
        self, prompt: str | None = None, max_new_tokens: int | None = None, **sampling: Unpack[Sampling]
    ) -> Iterator[str]:
        """The same text in pieces, as soon as each is written. A model that writes the whole image at once gives one
        piece, at the end."""
        _check_prompt(prompt)
        options = self._options(max_new_tokens, **sampling)
        fitness.check(self.trained, options, has_prompt=bool(prompt))
        return iter(texts.TextStream(self.trained, prompt, options))

    def generate(
        self, prompts: Sequence[str | None], max_new_tokens: int | None = None, **sampling: Unpack[Sampling]
    ) -> list[dict]:
        """Many texts together, one per prompt: dicts with `prompt`, `text`, `token_ids`, `num_tokens`, `finish_reason`
        ("stop" where a text ended, "length" where it was cut off) and `stop_reason` (the stop text, or None)."""
        if isinstance(prompts, str) or not isinstance(prompts, Sequence):
            raise UserError(
                f"prompts is {shortened(prompts)}: expected a list of texts (None for one from noise alone)"
            )
        for prompt in prompts:
            _check_prompt(prompt)
        options = self._options(max_new_tokens, **sampling)
        fitness.check(self.trained, options, has_prompt=any(prompts))
        written = texts.generate(self.trained, prompts, options)
        return [{key: value for key, value in text.items() if key != "image_ids"} for text in written]

    def answer(self, prompt: str, max_new_tokens: int | None = None, **sampling: Unpack[Sampling]) -> str:
        """The answer to a prompt, by a model that was trained on prompts and answers."""
        _check_text("the prompt", prompt)
        if not self.answers:
            raise UserError(
                "this model was trained without conditions: it continues texts and answers no prompts; call it with "
                "the text to continue, or train one with --enable_condition"
            )
        return self(prompt, max_new_tokens, **sampling)

    def infill(self, text: str, **sampling: Unpack[Sampling]) -> str:
        """The text with its gaps, written `<gap:N>` for N tokens, filled; all else stays as it is."""
        _check_text("the text", text)
        options = self._options(**sampling)
        if options.stop:
            raise UserError("stop ends a text, and a gap has its length: leave it out")
        fitness.check(self.trained, options)
        return str(texts.infill(self.trained, text, options)[0]["text"])

    def image(self, text: str) -> Image.Image:
        """A picture of the text as the model's token image, with its words."""
        _check_text("the text", text)
        layout = self.trained.layout
        ids = tokenizers.encode(self.trained.tokenizer, [text])[0].tolist()
        capacity = layout.codec.capacity(layout.img_size)
        if len(ids) > capacity:
            raise UserError(f"the text has {len(ids):,} tokens; an image holds {capacity:,}: shorten it")
        image, _ = layout.codec.encode(ids, layout.img_size, layout.layout, layout.patch_size)
        return draw(Frame(image, ids), layout, self.trained.tokenizer)

    def bits(self, text: str, prompt: str | None = None) -> Bits:
        """What the text costs, its end included, the way this model writes: the bound of `evaluate` on this text alone.

        prompt: what the text answers, for a model that was trained on prompts and answers. A text longer than an image
        is cut into several, as in training.
        """
        _check_text("the text", text)
        _check_prompt(prompt)
        if not text:
            raise UserError("an empty text has no bits: give one with at least one character")
        ids, condition = self._scored(text, prompt)
        size = self.trained.format.max_tokens
        starts = range(0, len(ids), size)
        pieces = [ids[start : start + size] for start in starts]
        prompts = [np.concatenate([condition, ids[:start]])[-size:] if prompt else condition for start in starts]
        num_bytes = len(text.encode())
        module = TrainingLoss(self.trained.model, self.trained.format.objective, self.trained.format.timesteps)
        options = BoundOptions(device=self.trained.device)
        bound = bound_of(module, self.trained.format, TextList(pieces, prompts, num_bytes), options=options)
        loses_text = bool(tokenizers.loss_of(self.trained.tokenizer, text))
        return Bits(float(bound.nats.sum()) / math.log(2), len(ids), num_bytes, loses_text)

    @property
    def answers(self) -> bool:
        """Whether the model was trained on prompts and answers."""
        return self.trained.format.enable_condition

    def _scored(self, text: str, prompt: str | None) -> tuple[np.ndarray, np.ndarray]:
        """The ids of a text as training scores them, with EOS, and those of its prompt."""
        tokenizer, text_format = self.trained.tokenizer, self.trained.format
        chat = text_format.use_chat_template and prompt is not None
        if prompt is not None and not self.answers:
            raise UserError("this model was trained without conditions: leave the prompt out, or put it into the text")
        opening, scored = prompt or "", text
        if chat:
            opening, scored = tokenizers.chat_format(tokenizer, [("user", opening), ("assistant", text)])
        condition = tokenizers.encode(tokenizer, [opening], parse_special=chat)[0]
        ids = tokenizers.encode(tokenizer, [scored], parse_special=chat)[0]
        return np.append(ids, text_format.eos_id), condition[-text_format.max_tokens :]

    def _options(self, max_new_tokens: int | None = None, **sampling: Unpack[Sampling]) -> SamplingOptions:
        values: dict[str, Any] = dict(sampling)
        known = Sampling.__annotations__
        unknown = next((name for name in values if name not in known), None)
        if unknown is not None:
            raise UserError(f"unknown option {unknown!r}{nearest(unknown, known)} (there are {', '.join(known)})")
        values = {name: value.item() if isinstance(value, np.generic) else value for name, value in values.items()}
        stop, steps = values.pop("stop", ()), values.pop("num_inference_steps", None)
        stops = (stop,) if isinstance(stop, str) else tuple(stop) if isinstance(stop, list | tuple) else stop
        try:
            return SamplingOptions(**values, steps=steps, stop=stops, max_new_tokens=max_new_tokens)
        except ValueError as error:
            raise UserError(str(error)) from None
