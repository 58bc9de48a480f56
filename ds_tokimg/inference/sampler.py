"""Samplers: from noise to tokens along the model's own noising path.

With noisy = alpha clean + sigma noise the probability-flow step from t to s < t, given a prediction of clean, is
z_s = (sigma_s / sigma_t) z + (alpha_s - alpha_t sigma_s / sigma_t) clean_pred: Euler in sigma, exact while the
prediction stays the same. `heun` corrects it with the prediction at s (Karras et al., "Elucidating the design
space", 2022, algorithm 1). `ancestral` draws clean from the predicted posterior, token by token, and then z_s with
fresh noise for a part of the old, more of it the larger eta (Song et al., "Denoising diffusion implicit models",
2021, eqs. 12 and 16; eta 1: from q(z_s | z_t, clean), Ho et al. 2020, eq. 6): a walk that ends with the right
distribution as steps become small, and unlike the flow forgets its mistakes. Where the model has learnt to draw tokens
in turn, each knowing those before it, `ancestral` does so in every step, and ends at the level where the bound of this
path does. States are float64.

All patches lose their noise together, or, with a block size, one block of patches after another, from left to right:
what was written before is then read once, into a KV cache.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from ds_tokimg.data.rng import Stream, generator
from ds_tokimg.diffusion.levels import DRAWN_SHARE, NoiseLevels
from ds_tokimg.diffusion.path import START, alpha_sigma, timestep_of_log_snr
from ds_tokimg.diffusion.writing import RUN
from ds_tokimg.inference.draws import inverse_of_cdf, reshaped
from ds_tokimg.inference.options import MAX_STEPS, STEPS_PER_TOKEN, SamplingOptions
from ds_tokimg.model.context import KVCache, Patches, WholeImage
from ds_tokimg.model.heads.base import ChangedPrediction, Prediction
from ds_tokimg.model.heads.digits import DigitHead
from ds_tokimg.model.jit import JiT

# See `inference.watching.Watcher`.
Watch = Callable[[int, float, Tensor, Tensor, Tensor], None]

# Known patches are read into the KV cache so many at a time, over all texts: what is computed of a token on the way may
# be as large as the vocabulary. Tokens whose digits are drawn together fill pieces of so many numbers.
_PREFILLED, _PIECE = 4096, 1 << 24


@dataclass(frozen=True)
class Part:
    """Which texts are written, for those who want only some of a list, or only as much as is needed.

    image: 0; of texts that go on where an image is full, 1, 2, … for their next ones: each has noise of its own.
    places: of each text in the whole list, which its noise follows from; None: 0, 1, 2, …
    has_ended: whether nothing is wanted after the ids of a text (its number here, and what is written so far); such a
        text is written no further, from left to right. None: all that was asked for is.
    """

    image: int = 0
    places: Sequence[int] | None = None
    has_ended: Callable[[int, list[int]], bool] | None = None


ALL = Part()


def timestep_grid(radix: int, steps: int, in_turn: bool = False) -> Tensor:
    """Timesteps START > … > 0, float64 [steps + 1], close together where tokens of this code become readable.

    in_turn: the last prediction, from which tokens are read, is at `NoiseLevels.drawn_at`.
    """
    levels = NoiseLevels.of(radix)
    if in_turn:
        quantiles = DRAWN_SHARE * (np.arange(steps - 1) + 1) / max(1, steps - 1)
    else:
        quantiles = (np.arange(steps - 1) + 0.5) / max(1, steps - 1)
    inner = timestep_of_log_snr(torch.from_numpy(levels.quantile(quantiles)[0]))
    return torch.cat([torch.tensor([START], dtype=torch.float64), inner, torch.zeros(1, dtype=torch.float64)])


@torch.no_grad()
def sample(
    model: JiT,
    lengths: list[int],
    options: SamplingOptions,
    prompts: list | None = None,
    given: list[dict[int, int]] | None = None,
    watch: Watch | None = None,
    part: Part = ALL,
) -> tuple[list[list[int]], int]:
    """Writes texts.

    Args:
        model: in eval mode, on its device.
        lengths: tokens to write, one number per text (a text may end earlier with EOS, which is the caller's to see).
        prompts: token ids per text that the model is conditioned on, or None.
        given: per text {place: token id} of tokens that are known and stay fixed (infilling), or None. Patches that
            are known as a whole are shown without noise; a known token that shares its patch with unknown ones is as
            noisy as these, so that early on they hardly depend on it.
        watch: called with what stands at every noise level of the first text, see `inference.watching`; or None.
        part: which texts these are, and how far they are wanted.

    Returns the ids of each text, and how many of all sampled colours were no token. A text depends on the options'
    seed and its place in the list, not on the batch it was sampled in.
    """
    texts, invalid = [], 0
    for start in range(0, len(lengths), options.batch_size):
        rows = range(start, min(len(lengths), start + options.batch_size))
        walk = _Walk(model, lengths, rows, options, prompts, given, part)
        walk.watch = watch if start == 0 else None
        ids, bad = walk.run()
        texts += ids
        invalid += bad
    return texts, invalid


@torch.no_grad()
def sample_stream(
    model: JiT,
    length: int,
    options: SamplingOptions,
    prompt: list[int] | None = None,
    given: dict[int, int] | None = None,
    part: Part = ALL,
) -> Iterator[list[int]]:
    """Writes the text that `sample` writes first, and gives its ids so far whenever a block of patches is written: at
    once, all together. Arguments as those of `sample`, of one text. Who stops listening stops the writing."""
    prompts, known = None if prompt is None else [prompt], [given] if given else None
    walk = _Walk(model, [length], range(1), options, prompts, known, part)
    for _ in walk.states():
        yield list(walk.texts[0])


class _Walk:
    """One batch on its way from noise to tokens."""

    def __init__(self, model, lengths, rows, options, prompts, given, part: Part = ALL):
        self.model, self.options, self.writing = model, options, model.writing.asked(options.block_size)
        self.device = next(model.parameters()).device
        self.layout = layout = model.layout
        self.lengths = [lengths[i] for i in rows]
        _, mask = layout.pack([np.zeros(n, np.int64) for n in self.lengths])
        self.mask = mask.to(self.device)  # [B, N, K]
        self.patches = layout.num_patches(self.lengths)  # [B]
        places = rows if part.places is None else [part.places[i] for i in rows]
        self.draws = [generator(options.seed, Stream.GENERATION, part.image, i) for i in places]
        self.has_ended, self.rows = part.has_ended, rows
        self.condition = self._condition([prompts[i] for i in rows]) if prompts is not None else None
        self.fixed_ids, self.fixed = self._given([given[i] for i in rows] if given is not None else None)
        self.fixed_clean = self._colours(self.fixed_ids)  # [B, N, P], meaningful where fixed
        self.positions = torch.arange(self.mask.shape[1], device=self.device).expand(self.mask.shape[:2])
        # With and without the condition: what has been written before the block at hand.
        self.caches: dict[bool, KVCache] = {}
        self.watch: Watch | None = None
        self.first_patch = 0  # of the block at hand
        self.texts: list[list[int]] = [[] for _ in rows]  # the ids so far

    def _condition(self, prompts):
        ids, mask = self.layout.pack([np.asarray(prompt, np.int64) for prompt in prompts])
        return self._colours(ids), mask.to(self.device)

    def _colours(self, ids: Tensor) -> Tensor:
        return self.model.codec.codebook[ids.cpu()].flatten(2).to(self.device)  # [B, N, P]

    def _given(self, given) -> tuple[Tensor, Tensor]:
        """Known tokens: ids [B, N, K] (0 elsewhere) and where they are, bool [B, N, K]."""
        if given is None:
            return torch.zeros_like(self.mask, dtype=torch.int64), torch.zeros_like(self.mask)
        texts, known = [], []
        for length, places in zip(self.lengths, given, strict=True):
            text, where = np.zeros(length, np.int64), np.zeros(length, np.int64)
            for place, token in places.items():
                text[place], where[place] = token, 1
            texts.append(text)
            known.append(where)
        return self.layout.pack(texts)[0].to(self.device), self.layout.pack(known)[0].to(self.device) > 0

    def _normal(self) -> Tensor:
        """Standard normal [B, N, P], float64."""
        shape = (self.mask.shape[1], self.layout.values)
        return self._random(shape, self.patches, lambda draw, shape: draw.standard_normal(shape))

    def _random(self, shape: tuple[int, ...], own, draw_from: Callable) -> Tensor:
        """[B, *shape] from each text's own generator, for its own first rows only: independent of the batch."""
        values = np.ones((len(self.draws), *shape))
        for row, draw, count in zip(values, self.draws, own, strict=True):
            row[:count] = draw_from(draw, (count, *shape[1:]))
        return torch.from_numpy(values).to(self.device)

    def run(self) -> tuple[list[list[int]], int]:
        """The texts' ids, and how many colours were no token."""
        invalid = deque(self.states(), maxlen=1).pop()
        return self.texts, int(invalid)

    def states(self) -> Iterator[int]:
        """Whenever patches are written, and `texts` with them: how many colours were no token so far."""
        if self.writing.block_size:
            yield from self._from_left_to_right()
        else:
            ids, invalid = self._denoise()
            self._take(ids, range(len(ids)))
            yield int((invalid & self.mask).sum())

    def _from_left_to_right(self) -> Iterator[int]:
        """Block after block, until every text is as long as it should be or has ended."""
        self._prefill_condition()
        ids, invalid = torch.zeros_like(self.fixed_ids), 0
        open_rows = torch.arange(len(ids), device=self.device)  # the texts that are still written
        start = self._prefill_known()
        ids[:, :start] = self.fixed_ids[:, :start]
        self._watch_written(0, ids[0, :start])
        while len(open_rows):
            block = self._block(slice(start, start + self.writing.block_size))
            now = slice(start, start + block.mask.shape[1])
            written = block.fixed_ids
            if not (block.fixed | ~block.mask).all():
                written, no_token = block._denoise()
                invalid += int((no_token & block.mask).sum())
            else:
                self._watch_written(start, written[0])
            ids[open_rows, now] = written
            self._take(ids[:, : now.stop], open_rows.tolist())
            yield invalid
            wanted = self._unfinished(open_rows.tolist(), now.stop)
            if not wanted.all():
                open_rows, written = open_rows[wanted], written[wanted]
                self._keep(wanted)
            if len(open_rows):
                self._prefill(written, now)
            start = now.stop

    def _take(self, ids: Tensor, rows) -> None:
        """Brings the texts of these rows up to date with what is written, ids [B, n, K]."""
        places, in_text = self.layout.order[: ids.shape[1]].flatten().sort()
        if self.layout.layout == "patch":
            known = len(places)
        else:  # raster order leaves gaps between blocks
            known = int((places == torch.arange(len(places))).cumprod(0).sum())
        begin = min((len(self.texts[row]) for row in rows), default=0)
        new = ids.flatten(1)[:, in_text[begin:known].to(ids.device)].tolist()
        for row in rows:
            text, end = self.texts[row], self.lengths[row]
            text += new[row][len(text) - begin : max(0, end - begin)]

    def _unfinished(self, rows: list[int], patches: int) -> Tensor:
        """Which of these texts have more than so many patches and have not ended: bool [rows]."""
        wanted = torch.from_numpy(self.patches > patches)
        for number, row in enumerate(rows):
            if wanted[number] and self.has_ended is not None:
                wanted[number] = not self.has_ended(self.rows[row], self.texts[row])
        return wanted.to(self.device)

    def _keep(self, wanted: Tensor) -> None:
        """Goes on with these texts alone, bool [B]."""
        for name in ("mask", "fixed", "fixed_ids", "fixed_clean"):
            setattr(self, name, getattr(self, name)[wanted])
        self.positions = self.positions[: len(self.mask)]  # the same for all
        self.caches = {key: cache.select(wanted) for key, cache in self.caches.items()}
        if self.condition is not None:
            self.condition = tuple(part[wanted] for part in self.condition)
        chosen = wanted.tolist()
        self.watch = self.watch if chosen[0] else None  # it looks at the first text
        self.patches = self.patches[chosen]
        self.draws = [draw for draw, is_kept in zip(self.draws, chosen, strict=True) if is_kept]

    def _block(self, now: slice) -> _Walk:
        """The walk of some patches after those in the caches."""
        block = copy.copy(self)
        for name in ("mask", "fixed", "fixed_ids", "fixed_clean", "positions"):
            setattr(block, name, getattr(self, name)[:, now])
        block.first_patch = now.start
        block.patches = np.clip(self.patches - now.start, 0, block.mask.shape[1])
        return block

    def _prefill_condition(self) -> None:
        scale = self.options.guidance_scale
        if self.condition is not None and scale != 0:
            self.caches[True] = self.model.empty_cache(self.mask)
            self.model.prefill(self.caches[True], *self.condition)
        if self.condition is None or scale != 1:
            self.caches[False] = self.model.empty_cache(self.mask)

    def _prefill_known(self) -> int:
        """Reads the blocks that are known as a whole in all texts and that every text goes on after, many at a time.
        Returns how many patches they are."""
        size, shortest = self.writing.block_size, int(self.patches.min())
        known = self.fixed.all(-1).all(0).long().cumprod(0).sum().item()
        stop = min(int(known), shortest - 1) // size * size
        piece = max(1, _PREFILLED // (len(self.mask) * size)) * size
        for start in range(0, stop, piece):
            now = slice(start, min(stop, start + piece))
            self._prefill(self.fixed_ids[:, now], now)
        return stop

    def _prefill(self, ids: Tensor, now: slice) -> None:
        """Reads some patches [B, n, K] that are written, in whole blocks."""
        blocks, size = None, self.writing.block_size
        if now.stop - now.start > size:
            blocks = torch.arange(now.start, now.stop, device=self.device) // size
        clean, mask, positions = self._colours(ids), self.mask[:, now], self.positions[:, now]
        for cache in self.caches.values():
            self.model.prefill(cache, clean, mask, positions, blocks, ids)

    def _denoise(self) -> tuple[Tensor, Tensor]:
        """From noise to tokens: ids [B, N, K], and bool [B, N, K], the colour is no token."""
        in_turn = self.options.sampler == "ancestral" and self.writing.in_turn
        grid = timestep_grid(self.model.codec.radix, self._num_steps(), in_turn)
        ancestral = partial(self._ancestral, eta=self.options.eta)
        step: Callable = {"euler": self._euler, "heun": self._heun, "ancestral": ancestral}[self.options.sampler]
        z = self._normal()
        for t, s in pairwise(grid[:-1].tolist()):
            z = step(z, t, s)
        ids, invalid = self._last(z, float(grid[-2]))
        ids = torch.where(self.fixed, self.fixed_ids, ids)
        self._watch_written(self.first_patch, ids[0])
        return ids, invalid

    def _watch_written(self, first_patch: int, ids: Tensor) -> None:
        """Shows patches [n, K] of the first text that are written, or known from the start."""
        if self.watch is not None and len(ids):
            self.watch(first_patch, 0.0, self._colours(ids[None])[0], ids, torch.ones(ids.shape))

    def _num_steps(self) -> int:
        steps = self.options.steps
        if steps is None:
            block = self.writing.block_size * self.layout.slots
            steps = min(MAX_STEPS, STEPS_PER_TOKEN * block) if block else MAX_STEPS
            steps = 1 if self.options.sampler == "ancestral" and self.writing.one_step else steps
        return max(1, steps // 2) if self.options.sampler == "heun" else steps

    # ---- predictions ----

    def _predict(self, z: Tensor, t: float) -> Prediction:
        """The guided prediction at timestep t, certain of the known tokens."""
        scale = self.options.guidance_scale
        if self.condition is None or scale == 0:
            prediction = self._network(z, t, None)
        else:
            prediction = self._network(z, t, self.condition)
            if scale != 1:
                prediction = self._guide(self._network(z, t, None), prediction, scale)
        prediction = self._with_given(prediction)
        if self.watch is not None:
            certainty, ids = prediction.certainty(self.fixed_ids.shape), self.model.read(prediction)[0]
            self.watch(self.first_patch, t, z[0], ids[0], certainty[0])
        return prediction

    def _network(self, z: Tensor, t: float, condition) -> Prediction:
        levels = torch.full(self.mask.shape[:2], t, device=self.device)
        # A patch that is known as a whole is shown without noise, as prompts are in training.
        levels = levels.masked_fill((self.fixed | ~self.mask).all(-1) & self.fixed.any(-1), 0.0)
        z = torch.where((levels == 0)[..., None], self.fixed_clean.to(z.dtype), z)
        t_in = levels if self.fixed.any() else levels[:, 0]
        patches = Patches(z.float(), t_in, self.mask, self.positions)
        seen = self.caches[condition is not None] if self.caches else WholeImage(condition)
        return self.model.predict(patches, seen)

    def _guide(self, without: Prediction, given: Prediction, scale: float) -> Prediction:
        head = self.model.head
        if not head.features:
            return Prediction(head, without.clean + scale * (given.clean - without.clean), None)
        return ChangedPrediction(head, lambda _, old, new: old + scale * (new - old), without, given)

    def _with_given(self, prediction: Prediction) -> Prediction:
        """The same where nothing is known. Every step moves towards what is predicted, so that the states of known
        tokens stay on their own noising path."""
        if not self.fixed.any():
            return prediction
        head = self.model.head
        if not head.features:
            where = self.fixed.repeat_interleave(self.model.codec.digits_per_token, -1)
            return Prediction(head, torch.where(where, self.fixed_clean, prediction.clean), None)
        # What a clean colour says of its token: hundreds of nats for the one, against all others.
        certain = head.log_likelihood(self.fixed_clean, *alpha_sigma(torch.zeros(1, 1, device=self.device)))
        where = self.fixed.view(self.fixed.shape + (1,) * (certain.dim() - 3))
        certain = (certain * where).flatten(1, 2)
        return ChangedPrediction(head, lambda tokens, logits: logits + certain[:, tokens], prediction)

    # ---- steps ----

    def _euler(self, z: Tensor, t: float, s: float, clean: Tensor | None = None) -> Tensor:
        clean = self._predict(z, t).clean.double() if clean is None else clean
        ratio = s / t  # sigma_s / sigma_t
        return ratio * z + ((1 - s / 1000) - (1 - t / 1000) * ratio) * clean

    def _heun(self, z: Tensor, t: float, s: float) -> Tensor:
        here = self._predict(z, t).clean.double()
        there = self._predict(self._euler(z, t, s, here), s).clean.double()
        return self._euler(z, t, s, 0.5 * (here + there))

    def _ancestral(self, z: Tensor, t: float, s: float, eta: float = 1.0) -> Tensor:
        clean = self._draw(self._predict(z, t)).double()
        alpha_t, sigma_t, alpha_s, sigma_s = 1 - t / 1000, t / 1000, 1 - s / 1000, s / 1000
        old = (z - alpha_t * clean) / sigma_t
        # The deviation of q(z_s | z_t, clean) is sigma_s times this root.
        fresh = min(1.0, eta * (1 - (alpha_t * sigma_s / (alpha_s * sigma_t)) ** 2) ** 0.5)
        return alpha_s * clean + sigma_s * ((1 - fresh**2) ** 0.5 * old + fresh * self._normal())

    def _draw(self, prediction: Prediction) -> Tensor:
        """Clean patches drawn from the posterior (the mean itself for the linear head, which has no posterior)."""
        if not self.model.head.features:
            return prediction.clean
        return self.model.head.colours(self._choose_all(prediction))

    def _choose_all(self, prediction: Prediction) -> Tensor:
        """Candidates drawn for every token: independently, or in turn."""
        if not prediction.is_in_turn:
            if isinstance(self.model.head, DigitHead) and not self.options.is_as_trained:
                return self._choose_digits(self.model.head, prediction.logits)
            return self._choose(prediction.logits, self.patches)
        ids = torch.zeros_like(self.fixed_ids)
        tokens = ids.view(len(ids), -1)
        for turn in range(min(RUN, tokens.shape[1])):
            own = [len(range(turn, count * self.layout.slots, RUN)) for count in self.patches]
            tokens[:, turn::RUN] = self._choose(prediction.logits_in_turn(turn, ids), own)
        return ids

    def _choose(self, logits: Tensor, own) -> Tensor:
        """Draws from softmax(logits) [B, n, …] along the last axis, reshaped as the options say (Gumbel maximum, noise
        from each text's own generator, for its `own` first rows of n)."""
        exponential = self._random(logits.shape[1:], own, lambda draw, shape: draw.standard_exponential(shape))
        return (reshaped(logits, self.options) - exponential.log()).argmax(-1)

    def _choose_digits(self, head: DigitHead, logits: Tensor) -> Tensor:
        """Draws whole tokens from the posterior of their digits [B, N, K, D, radix], reshaped as the options say; the
        digits of these, [B, N, K, D]. In pieces, for all of the vocabulary is weighed."""
        uniform = self._random(logits.shape[1:3], self.patches, lambda draw, shape: draw.random(shape))
        rows, uniform = logits.flatten(0, 2), uniform.flatten()
        size = max(1, _PIECE // len(head.digit_table))
        ids = [
            inverse_of_cdf(reshaped(head.token_logits(of_rows), self.options), numbers)
            for of_rows, numbers in zip(rows.split(size), uniform.split(size), strict=True)
        ]
        return head.digit_table[torch.cat(ids)].long().view(logits.shape[:-1])

    def _last(self, z: Tensor, t: float) -> tuple[Tensor, Tensor]:
        """Reads the tokens off the cleanest state: `ancestral` draws them, the others take the most likely."""
        prediction = self._predict(z, t)
        is_drawn = self.options.sampler == "ancestral" and self.model.head.features
        return self.model.read(prediction, self._choose_all(prediction) if is_drawn else None)
