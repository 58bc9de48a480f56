"""Watching a text come out of noise: the frames of the first text that a sampler writes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ds_tokimg.errors import UserError
from ds_tokimg.inference.pictures import Frame, save_animation, strip
from ds_tokimg.model.jit import JiT

MOST_FRAMES = 32  # of an animation: more would make it long and the file large


class Watcher:
    """Called by `sample` with what stands at each noise level; `frames` are then what there was to see.

    Args:
        model: that writes.
        eos_id: where a text ends; what the model wrote after it is not shown.
    """

    def __init__(self, model: JiT, eos_id: int):
        self.model, self.eos_id = model, eos_id
        self.seen: list[Frame] = []
        # Of the blocks that are written: colours [n, P], tokens and their certainty [n, K].
        self._written: list[Tensor] = []

    def __call__(self, first_patch: int, t: float, state: Tensor, ids: Tensor, certainty: Tensor) -> None:
        """One noise level of a block of patches.

        first_patch: where in the image the block begins. t: timestep in [0, 1000); 0: the block is written.
        state: [N, P] noisy patches. ids, certainty: [N, K], the tokens read there and how certain each of them is.
        """
        parts = [part.cpu() for part in (state.float(), ids, certainty.float())]
        if first_patch:
            parts = [torch.cat([old[:first_patch], new]) for old, new in zip(self._written, parts, strict=True)]
        if t == 0:
            self._written = parts
        self.seen.append(frame_of(self.model, f"noise {t / 10:.3g} %", *parts))

    @property
    def frames(self) -> list[Frame]:
        """At most MOST_FRAMES of what was seen, the first and the last among them, up to the text's end."""
        chosen = np.unique(np.linspace(0, len(self.seen) - 1, MOST_FRAMES).round().astype(int))
        return [self._up_to_the_end(self.seen[i]) for i in chosen]

    def save(self, path: Path, tokenizer) -> None:
        """Writes the animation, a .gif, and a few of its stages below each other, a .png of the same name.

        Raises UserError when they cannot be written.
        """
        frames = self.frames
        try:
            save_animation(frames, path, self.model.layout, tokenizer)
            strip(stages(frames), self.model.layout, tokenizer).save(path.with_suffix(".png"))
        except OSError as error:
            raise UserError(f"--animate {path} cannot be written: {error.strerror or error}") from None

    def _up_to_the_end(self, frame: Frame) -> Frame:
        final = self.seen[-1].ids
        length = final.index(self.eos_id, 1) if self.eos_id in final[1:] else len(final)
        return Frame(frame.image, frame.ids[:length], frame.certainty[:length], frame.title)


def frame_of(model: JiT, title: str, patches: Tensor, ids: Tensor, certainty: Tensor) -> Frame:
    """What stands in the first n patches of an image: patches [n, P], ids and certainty [n, K], on the host. The image
    is 0 behind them."""
    whole = torch.zeros(1, model.num_patches, patches.shape[1])
    whole[0, : len(patches)] = patches
    order = torch.argsort(model.layout.order[: len(ids)].flatten())  # of the text, not of the patches
    read, sure = ids.flatten()[order].tolist(), certainty.flatten()[order].tolist()
    return Frame(model.unpatchify(whole)[0], read, sure, title)


def stages(frames: list[Frame], count: int = 5) -> list[Frame]:
    """`count` of the frames (at most), from the first to the last: sampling steps lie where equally much is learnt, so
    they are equally far apart."""
    return [frames[i] for i in np.unique(np.linspace(0, len(frames) - 1, count).round().astype(int))]
