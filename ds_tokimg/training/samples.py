"""What a run shows of its model at every validation: how it cleans a text of noise, and what it writes.

The averaged weights are gathered on rank 0 into a model of its own, as a checkpoint would hold them: what is shown is
what `generate` would show, at every ZeRO stage. Texts, prompts and noise are the same each time, and every draw has a
generator of its own, so that training goes on as if nothing had been shown.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ds_tokimg.data.batch import Batch
from ds_tokimg.diffusion.levels import NoiseLevels, SamplingPath
from ds_tokimg.diffusion.path import NUM_TIMESTEPS, add_noise_to_timestep
from ds_tokimg.engine.shards import FP32
from ds_tokimg.inference.loading import TrainedModel
from ds_tokimg.inference.pictures import Frame, grid, strip
from ds_tokimg.inference.sampler import SamplingOptions
from ds_tokimg.inference.texts import generate
from ds_tokimg.inference.watching import Watcher, frame_of, stages
from ds_tokimg.model.jit import JiT
from ds_tokimg.settings.config import TrainConfig
from ds_tokimg.training.assemble import Parts
from ds_tokimg.training.bound import TextList
from ds_tokimg.training.dashboard import as_markdown, table
from ds_tokimg.training.objective import TrainingLoss
from ds_tokimg.training.signals import Interrupted, StopSignals
from ds_tokimg.training.tracking import Tracker
from ds_tokimg.training.validation import ValidationBatches

if TYPE_CHECKING:
    from ds_tokimg.engine.engine import TrainEngine

# What a validation may cost, whatever the size of an image: texts, tokens of each, and evaluations of a block of it.
MOST_TEXTS, MOST_TOKENS, MOST_STEPS = 8, 64, 16
PROMPT_TOKENS = 8  # of held-out texts, to be continued
# Where a text is shown between noise and image: after these shares of what a reader without context learns.
SHOWN_AT = (0.1, 0.35, 0.6, 0.85)
GRID_WIDTH = 1440  # of a picture of clean, noisy and predicted, in pixels


class Gallery:
    """Pictures and `--num_samples` short texts of the model as it is now, for the run's folder and TensorBoard."""

    def __init__(self, config: TrainConfig, parts: Parts, engine: TrainEngine, tracker: Tracker):
        self.config, self.parts, self.engine, self.tracker = config, parts, engine, tracker

    def show(self, signals: StopSignals) -> None:
        """Of this step. Collective: rank 0 shows, the others go on. A signal ends it."""
        if not self.config.num_samples or not len(self.parts.eval_set):
            return
        model = averaged_model(self.parts.module, self.engine)
        if model is not None:
            with contextlib.suppress(Interrupted), signals.interrupting():
                self._show(TrainedModel(Path(), model, self.parts.tokenizer, self.parts.text_format))

    def _show(self, trained: TrainedModel) -> None:
        step, tracker = self.engine.global_steps, self.tracker
        layout, tokenizer = trained.layout, trained.tokenizer
        rows = denoising(trained, *self._held_out_text())
        tracker.picture("denoising", grid(rows, layout, tokenizer, GRID_WIDTH), step)
        watcher = Watcher(trained.model, trained.format.eos_id)
        steps = None if trained.model.writing.block_size else MOST_STEPS
        # In one image: an answer has a place of its own there, what goes on with a beginning has the rest.
        room = trained.format.canvas * layout.slots or trained.format.max_tokens - self._beginning
        options = SamplingOptions(steps=steps, seed=self.config.seed, max_new_tokens=min(MOST_TOKENS, room))
        texts = generate(trained, self._prompts(), options, watcher)
        tracker.picture("from_noise", strip(stages(watcher.frames), layout, tokenizer), step)
        tracker.text("texts", as_lines(texts), step, as_table(texts))

    def _held_out_text(self) -> tuple[np.ndarray, np.ndarray]:
        """Ids of the text that is shown at every validation, and of its prompt."""
        texts = self.parts.eval_set
        return texts.ids(0)[:MOST_TOKENS], texts.prompt_ids(0)

    @property
    def _beginning(self) -> int:
        """Tokens of a held-out text that are to be continued. A character that is cut in two may become three tokens:
        they fit into the smallest image."""
        return min(PROMPT_TOKENS, self.parts.text_format.max_tokens // 4)

    def _prompts(self) -> list[str | None]:
        """Held-out prompts, of a model that answers. Else nothing, for texts from noise alone, and for every second
        text the beginning of one that is held out."""
        texts, decode = self.parts.eval_set, self.parts.tokenizer.decode
        numbers = [i % len(texts) for i in range(min(MOST_TEXTS, self.config.num_samples))]
        if self.config.enable_condition:
            return [decode(texts.prompt_ids(i)) for i in numbers]
        beginnings = [decode(texts.ids(i)[: self._beginning], skip_special_tokens=True) for i in numbers]
        return [text if place % 2 and text else None for place, text in enumerate(beginnings)]


def averaged_model(module: TrainingLoss, engine: TrainEngine) -> JiT | None:
    """A model with the averaged weights (the trained ones where none are kept), apart from the engine; on rank 0 alone,
    None elsewhere. Collective."""
    shards, own, first = engine.shards, {}, engine.dist.rank == 0
    key = engine.optimizer.average
    key = key if key in shards.keys else FP32  # before the first step there is no average
    for name, param in shards.params.items():
        value = shards.full(param, key)
        if first:
            own[name.removeprefix("model.")] = value.detach().float()
    if not first:
        return None
    with torch.random.fork_rng(devices=[]):  # the initial weights, which are replaced, are drawn from it
        model = JiT(module.model.codec, module.model.config)
    buffers = {name: value for name, value in module.model.state_dict().items() if name not in own}
    model.load_state_dict(own | buffers)
    model.writing = module.model.writing
    return model.eval().to(engine.dist.device)


@torch.no_grad()
def denoising(trained: TrainedModel, ids: np.ndarray, prompt: np.ndarray) -> list[list[Frame]]:
    """A text [clean, noisy, predicted] at each of SHOWN_AT, from much noise to little, with the same noise each time.

    The words of `noisy` are its nearest colours, those of `predicted` the model's likeliest tokens, as dark as it is
    certain of them. A model that writes blocks is given the clean ones before each of them.
    """
    model = trained.model
    levels = NoiseLevels.of(model.codec.radix)
    texts: Any = TextList([ids], [prompt])
    path, conditional = SamplingPath(levels, model.writing), trained.format.enable_condition
    batches = ValidationBatches(texts, model.layout, path, conditional=conditional)
    module = TrainingLoss(model, "ce" if model.head.features else "mse")
    rows = []
    for share in SHOWN_AT:
        batch = batches.make(np.zeros(1, int), levels.quantile(np.full((1, 1), share))[0], noise=0)
        frames = _cleaned(module, batch.to(trained.device))
        rows.append(
            [replace(frame, ids=frame.ids[: len(ids)], certainty=frame.certainty[: len(ids)]) for frame in frames]
        )
    return rows


def _cleaned(module: TrainingLoss, batch: Batch) -> list[Frame]:
    """A batch of one text with one noise level: clean, noisy and predicted."""
    model, clean = module.model, module.colours(batch.ids)
    noisy, _ = add_noise_to_timestep(clean, batch.t, batch.noise)
    prediction = module.predict(batch, clean)
    read = model.read(prediction)[0]
    share = float(batch.t.flatten()[0]) / NUM_TIMESTEPS
    alone, _ = model.codec.nearest((noisy / (1 - share)).unflatten(-1, (model.slots, -1)).cpu())
    right = float(((read == batch.ids) & batch.mask).sum() / batch.mask.sum())
    certain = torch.ones(batch.ids.shape)
    shown = {
        "clean": (clean, batch.ids, certain),
        f"noise {100 * share:.3g} %, each token by itself": (noisy, alone, certain),
        f"predicted, {right:.0%} right": (prediction.clean, read, prediction.certainty(batch.ids.shape)),
    }
    return [frame_of(model, title, *(part[0].cpu() for part in parts)) for title, parts in shown.items()]


def as_lines(texts: list[dict]) -> str:
    """Texts of `generate` for a file: each below a line that says what it follows on."""
    return "\n".join(f"[{number}] {_origin(text)}\n{text['text']}\n" for number, text in enumerate(texts))


def as_table(texts: list[dict]) -> str:
    """The same as Markdown."""
    rows = [(as_markdown(_origin(text)), as_markdown(text["text"])) for text in texts]
    return table(("from", "text"), rows)


def _origin(text: dict) -> str:
    return "noise alone" if text["prompt"] is None else repr(text["prompt"])
