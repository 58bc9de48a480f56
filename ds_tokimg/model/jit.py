"""JiT: a transformer that predicts the clean image from a noisy one, patch by patch.

After Li & He, "Back to Basics: Let Denoising Generative Models Denoise" (2025): x-prediction, RMSNorm, SwiGLU,
RoPE, qk-norm, adaLN-Zero. Changes: the modulation is computed once and shared by the blocks, each of which adds a
learned offset (adaLN-single, Chen et al., PixArt-alpha, 2023), because a noise level of its own for every patch would
otherwise cost half as much again as the blocks themselves; the patch embedding has no bottleneck, through which the
tokens of a patch can hardly be told apart; every patch shows the one before it; tokens that share a patch also hear
those next to them without going through its hidden state (`neighbours`), and have an MLP of their own; and from left to
right noisy patches may enter late (`noisy_depth`), with what the transformer has already made of the clean ones before
them.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ds_tokimg.choices import HEADS
from ds_tokimg.diffusion.band import readable_band
from ds_tokimg.diffusion.path import alpha_sigma, timestep_of_log_snr
from ds_tokimg.diffusion.writing import RUN
from ds_tokimg.model.config import JiTConfig, config_of_name
from ds_tokimg.model.context import CLEAN, NOISY, Memory, Segment, last_valid, seen_from_left_to_right
from ds_tokimg.model.heads.base import CandidateTokens
from ds_tokimg.model.heads.digits import DigitHead
from ds_tokimg.model.heads.linear import LinearHead
from ds_tokimg.model.heads.tokens import TokenHead
from ds_tokimg.model.heads.tree import TreeHead
from ds_tokimg.model.layers import Block, FinalLayer, RMSNorm, TimestepEmbedding, rope_frequencies
from ds_tokimg.model.local_window import InTurn, Neighbours, TokenMLP
from ds_tokimg.model.prediction import Prediction
from ds_tokimg.tokens.codec import TokenCodec, check_geometry, pixel_order

POSTERIORS = {"tokens": TokenHead, "digits": DigitHead, "tree": TreeHead}
# How many tokens on either side a token hears directly where several share a patch.
NEIGHBOURS = 2
# Up to this vocabulary weighing all tokens costs less than the transformer of the smallest model.
TOKEN_POSTERIOR_LIMIT = 4096


class JiT(nn.Module):
    """Noisy token images -> clean ones. See `forward` (images) and `predict` (patches, what training uses)."""

    def __init__(self, codec: TokenCodec, config: JiTConfig):
        super().__init__()
        check_geometry(config.img_size, codec.token_size, config.layout, config.patch_size)
        if config.head not in HEADS:
            raise ValueError(f"unknown head {config.head!r}; available: {', '.join(HEADS)}")
        if not 0 <= config.noisy_depth <= config.depth:
            raise ValueError(f"noisy_depth is {config.noisy_depth}; the model has {config.depth} blocks (0: all)")
        self.codec = codec
        self.slots = (config.patch_size // codec.token_size) ** 2  # K, tokens a patch
        self.num_patches = (config.img_size // config.patch_size) ** 2
        pixels = self.slots * codec.digits_per_token  # P
        self.head = build_head(codec, config, self.slots)
        if config.neighbours is None:
            config = replace(config, neighbours=NEIGHBOURS if self.slots > 1 and self.head.features else 0)
        elif config.neighbours and not self.head.features:
            raise ValueError("neighbours are heard through posteriors; the linear head has none")
        can_be_in_turn = isinstance(self.head, CandidateTokens) and self.slots > 1 and config.neighbours > 0
        if config.in_turn is None:
            config = replace(config, in_turn=can_be_in_turn)
        elif config.in_turn and not can_be_in_turn:
            raise ValueError(
                "in_turn is for patches of several tokens that hear their neighbours, and posteriors over whole tokens"
            )
        self.config = config
        self.patch_embed = nn.Linear(pixels + self.head.features, config.width)
        self.before_embed = nn.Linear(config.width, config.width, bias=False)
        self.segment_embed = nn.Embedding(2, config.width)  # by kind
        self.time_embed = TimestepEmbedding(config.width)
        # Beyond them nothing can be read, or everything, and most ways to draw noise levels never go there: sampling
        # and the bound, which do, must not depend on what the network makes of levels that it has not seen.
        with torch.device("cpu"):  # numbers also where the model is built without data (meta)
            band = readable_band(codec.radix)
            self.cleanest, self.noisiest = timestep_of_log_snr(torch.tensor([band.high, band.low])).tolist()
        self.blocks = nn.ModuleList(Block(config.width, config.heads) for _ in range(config.depth))
        # From left to right, noisy patches go through the blocks from this one on.
        self.entry = config.depth - config.noisy_depth if config.noisy_depth else 0
        if self.entry:
            self.read_norm = RMSNorm(config.width)
            self.read_embed = nn.Linear(config.width, config.width, bias=False)
        self.final = FinalLayer(config.width)
        self.neighbours = self.token_mlp = None
        if self.config.neighbours:
            features, outputs = self.head.features // self.slots, self.head.outputs
            self.neighbours = Neighbours(self.config.neighbours, features, outputs)
            self.token_mlp = TokenMLP(features, outputs, self.slots)
        nn.init.zeros_(self.segment_embed.weight)

    # ---- construction and files ----

    @classmethod
    def from_name(cls, name: str, codec: TokenCodec, img_size: int = 64, head: str = "posterior", **options) -> JiT:
        """A model by its name, "JiT-SIZE/PATCH" with SIZE one of XS, S, B, L, H and PATCH one of 2, 4, 8.

        `options` are further fields of JiTConfig. Raises ValueError for unknown names.
        """
        return cls(codec, config_of_name(name, img_size=img_size, head=head, **options))

    def save_pretrained(self, directory) -> None:
        """Writes model.json (shape and codec) and model.safetensors (float32 weights)."""
        from safetensors.torch import save_file

        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        weights = {name: value.detach().float().contiguous() for name, value in self.state_dict().items()}
        save_file(weights, directory / "model.safetensors")
        (directory / "model.json").write_text(self.description() + "\n")

    def description(self) -> str:
        """Shape and codec as JSON: the content of model.json."""
        return json.dumps({"model": asdict(self.config), "codec": self.codec.to_dict()})

    @classmethod
    def from_pretrained(cls, directory) -> JiT:
        """Reads what `save_pretrained` (or `python -m ds_tokimg export`) wrote; needs no DeepSpeed.

        Raises FileNotFoundError when the folder is not an export.
        """
        from safetensors.torch import load_file

        directory = Path(directory)
        description = json.loads((directory / "model.json").read_text())
        model = cls(TokenCodec.from_dict(description["codec"]), JiTConfig(**description["model"]))
        model.load_state_dict(load_file(directory / "model.safetensors"))
        return model.eval()

    @property
    def compute_dtype(self) -> torch.dtype:
        return self.final.modulation.weight.dtype

    # ---- images ----

    def forward(
        self,
        noisy: Tensor,
        t: Tensor,
        condition: Tensor | None = None,
        mask: Tensor | None = None,
        condition_mask: Tensor | None = None,
    ) -> Tensor:
        """Predicts clean images.

        Args:
            noisy: [B, 3, H, W], see `add_noise_to_timestep`.
            t: timesteps in [0, 1000), [B], or [B, patches] for a noise level per patch (reading order).
            condition: clean image [B, 3, H, W] whose patches are put before the noisy ones (a prompt), or None.
            mask: [B, H, W], pixels > 0 are valid; None: all. A patch without a valid pixel is not computed;
                cells without one are 0 in the result.
            condition_mask: the same for the condition; an image without a valid pixel is no condition.

        Returns clean_pred [B, 3, H, W] float32.
        """
        patches, slot_mask = self.patchify(noisy), self.slot_mask(mask, noisy)
        index, slot_mask = _valid_first(slot_mask)  # [B, n], [B, n, K]
        patches = _take(patches, index)
        if t.dim() == 2:
            t = t.gather(1, index)
        prompt = None
        if condition is not None:
            prompt_index, prompt_mask = _valid_first(self.slot_mask(condition_mask, condition))
            prompt = (_take(self.patchify(condition), prompt_index), prompt_mask)
        clean = self.predict(patches, t, slot_mask, condition=prompt, positions=index).clean
        clean = _mask_slots(clean.unflatten(-1, (self.slots, -1)), slot_mask).flatten(2)
        full = clean.new_zeros(len(noisy), self.num_patches, clean.shape[-1])
        return self.unpatchify(full.scatter(1, index[..., None].expand_as(clean), clean))

    def patchify(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> patches in rows [B, N, P], values of a patch ordered [slot, pixel, channel]."""
        order = self._pixels(images.device)
        return images.flatten(2)[:, :, order].permute(0, 2, 3, 1).flatten(2)

    def unpatchify(self, patches: Tensor) -> Tensor:
        """The inverse of `patchify`."""
        size = self.config.img_size
        order = self._pixels(patches.device).flatten()
        values = patches.unflatten(-1, (-1, 3)).flatten(1, 2).transpose(1, 2)  # [B, 3, H*W] in patch order
        images = torch.empty_like(values)
        images[:, :, order] = values
        return images.view(-1, 3, size, size)

    def slot_mask(self, mask: Tensor | None, images: Tensor) -> Tensor:
        """Pixel mask [B, H, W] -> token mask [B, N, K] bool: a slot is valid if any of its pixels is."""
        if mask is None:
            return torch.ones(len(images), self.num_patches, self.slots, dtype=torch.bool, device=images.device)
        return (mask.flatten(1)[:, self._pixels(mask.device)] > 0).unflatten(-1, (self.slots, -1)).any(-1)

    def _pixels(self, device) -> Tensor:
        size, patch = self.config.img_size, self.config.patch_size
        order = pixel_order(size, self.codec.token_size, "patch", patch)
        return order.view(self.num_patches, -1).to(device)  # [N, K * token_size^2]

    # ---- patches ----

    def predict(
        self,
        noisy: Tensor,
        t: Tensor,
        slot_mask: Tensor,
        condition: tuple[Tensor, Tensor] | None = None,
        positions: Tensor | None = None,
        context: tuple[Tensor, Tensor] | None = None,
        memory: Memory | None = None,
        in_turn: tuple[Tensor, Tensor | None] | None = None,
    ) -> Prediction:
        """Predicts clean patches.

        Args:
            noisy: [B, N, P] float32 patches, N at most the image's number of patches.
            t: [B] or [B, N].
            slot_mask: [B, N, K] bool, slots that hold a token. Patches without one are ignored by all others.
            condition: (clean patches [B, M, P], slot_mask [B, M, K]) or None.
            positions: [B, N] place of each patch in the image; None: 0, 1, 2, …
            context: (clean patches [B, N, P], blocks [N] int64, which block a patch belongs to) for prediction from
                left to right: a noisy patch sees the noisy patches of its own block and the clean ones of the blocks
                before it. All blocks are predicted at once: clean patches go through the whole transformer, noisy ones
                through its last `noisy_depth` blocks (0: all). None: every patch sees all noisy ones.
            memory: what `remember` has read before, or an empty one, for prediction from left to right: the patches
                are then those of one block.
            in_turn: (ids [B, N, K], which rows [B] bool or None: all), with `neighbours`: tokens are predicted as they
                are drawn in turn, each with those of earlier turns known to be these (`layers.InTurn`).
        """
        batch, count, _ = noisy.shape
        level = t if t.dim() == 2 else t[:, None]  # [B, N or 1]
        inputs, evidence, tokens = self._inputs(noisy, level, slot_mask)
        valid = slot_mask.any(-1)
        if positions is None:
            positions = torch.arange(count, device=noisy.device).expand(batch, count)
        shown = memory and memory.shown_to_noisy
        noisy_ones = self._segment(NOISY, inputs, tokens, level, valid, positions, shown)
        segments = [] if condition is None else [self._prompt_segment(*condition)]
        blocks, entry = None, 0 if memory is None else self.entry
        if context is not None:
            segments.append(self._clean_segment(context[0], slot_mask, positions))
            blocks, entry = context[1], self.entry
        parts = [self._embed(segment) for segment in segments]
        if context is not None:
            read = self._transform(torch.cat(parts, 1), segments, slice(entry), blocks)
            # The first patch of a block stands after a clean one.
            starts = torch.diff(blocks, prepend=blocks[:1] - 1) != 0
            before = torch.where(starts[:, None], self._shown_to_noisy(read, segments), noisy_ones.before)
            noisy_ones, parts = noisy_ones._replace(before=before), [read]
        x = torch.cat([*parts, self._embed(noisy_ones)], 1)
        memory = memory and memory.for_one_pass()
        x = self._transform(x, [*segments, noisy_ones], slice(entry, None), blocks, memory, wanted=count)
        hidden = self.head(self.final(x, noisy_ones.time))
        if self.neighbours is None:
            return Prediction(self.head, hidden, evidence)
        clean = context and (segments[-1].tokens, blocks.repeat_interleave(self.slots))
        outputs = partial(self._outputs, hidden, tokens, slot_mask, memory and memory.tokens, clean)
        of_turn = (lambda turn, ids: outputs((ids, None), slice(turn, None, RUN))) if self.config.in_turn else None
        return Prediction(self.head, lambda: outputs(in_turn).view(hidden.shape), evidence, of_turn)

    def _outputs(self, hidden, tokens, slot_mask, before, context, in_turn=None, wanted=slice(None)) -> Tensor:
        """Of tokens that hear their neighbours, those that are wanted, [B, L, …] (`hidden`: [B, N, K, …])."""
        if in_turn is not None:
            ids, rows = in_turn
            clean = context[0] if context else self._on_slots(self.head.embed_ids(ids), slot_mask).flatten(1, 2)
            in_turn = InTurn(clean, rows)
        near = self.neighbours(tokens, before, context, in_turn, wanted)
        hidden = hidden.flatten(1, 2)
        output = self.token_mlp(hidden.flatten(2)[:, wanted] + near, tokens[:, wanted])
        return output.view(*output.shape[:2], *hidden.shape[2:])

    def remember(self, memory: Memory | None, patches: Tensor, slot_mask: Tensor, positions: Tensor | None) -> Memory:
        """Reads a prompt (positions None) or the next block of clean patches [B, n, P], once for all steps to come.

        memory: what was read before, which becomes part of the result; None at the beginning.
        """
        memory = self.empty_memory(slot_mask) if memory is None else memory
        if positions is None:
            segment = self._prompt_segment(patches, slot_mask)
        else:
            segment = self._clean_segment(patches, slot_mask, positions, memory.shown)
        x = self._transform(self._embed(segment), [segment], slice(self.entry), memory=memory)
        memory.shown = None if positions is None else segment.shown[:, -1:]
        memory.shown_to_noisy = memory.shown
        if self.entry:
            memory.shown_to_noisy = self.read_embed(self.read_norm(last_valid(x, segment.valid)))
        self._transform(x, [segment], slice(self.entry, None), memory=memory)
        if self.neighbours is not None and positions is not None:
            memory.tokens = self.neighbours.last(segment.tokens, memory.tokens)
        memory.valid = torch.cat([memory.valid, segment.valid], 1)
        return memory

    def empty_memory(self, slot_mask: Tensor) -> Memory:
        """Of as many texts as slot_mask [B, N, K] has, before anything is read."""
        return Memory(len(self.blocks), len(slot_mask), slot_mask.device)

    def read(self, prediction: Prediction, chosen: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Tokens of a prediction: ids int64 [B, N, K], and bool [B, N, K]: the colour is no token.

        chosen: indices of the candidates along the last axis of the logits; None: the most likely ones.
        """
        if not self.head.features:
            return self.codec.nearest(prediction.clean.unflatten(-1, (self.slots, -1)))
        chosen = prediction.likeliest() if chosen is None else chosen
        colours = self.head.colours(chosen).unflatten(-1, (self.slots, -1))
        return self.codec.nearest(colours)

    def _inputs(self, noisy, level, slot_mask):
        """Features of the patches [B, N, F] (padding slots zeroed), the head's evidence (None for `linear`), and the
        features of the tokens [B, N * K, F'] if their neighbours are to hear them, else None."""
        parts, evidence, tokens = [noisy.unflatten(-1, (self.slots, -1))], None, None  # each [B, N, K, features]
        if self.head.features:
            evidence = self.head.evidence(noisy, *alpha_sigma(level))
            parts.append(self.head.features_of(evidence))
        parts = [self._on_slots(part, slot_mask) for part in parts]
        if self.neighbours is not None:
            tokens = parts[1].flatten(1, 2)
        return torch.cat([part.flatten(2) for part in parts], -1), evidence, tokens

    def _on_slots(self, features: Tensor, slot_mask: Tensor) -> Tensor:
        """Features [B, N, K, F] of tokens, zeroed where there is none."""
        return (features * slot_mask[..., None]).to(self.compute_dtype)

    def _segment(self, kind: int, inputs, tokens, level, valid, positions, first: Tensor | None = None) -> Segment:
        """Inputs [B, n, F] and features of their tokens at noise levels [B, n or 1], after a patch that shows `first`
        (None: after none).

        Every patch also shows the one before it, the shift of Peng et al., "RWKV" (2023), section 3.1: which token
        follows which need not be found by attention first. Between a prompt and a clean patch nothing is shown.
        """
        own = self.patch_embed(inputs)
        shown = self.before_embed(own)
        first = torch.zeros_like(shown[:, :1]) if first is None else first
        before = torch.cat([first, shown[:, :-1]], 1)
        time = self.time_embed(level if kind == CLEAN else level.clamp(self.cleanest, self.noisiest))
        return Segment(kind, own, shown, before, time, valid, positions, tokens)

    def _prompt_segment(self, patches: Tensor, slot_mask: Tensor) -> Segment:
        """The condition; its last patch gets position -1, so that it stands next to the image's first."""
        count = patches.shape[1]
        positions = torch.arange(count, device=patches.device) - slot_mask.any(-1).sum(1, keepdim=True)
        return self._clean_segment(patches, slot_mask, positions)

    def _clean_segment(self, patches: Tensor, slot_mask: Tensor, positions: Tensor, first=None) -> Segment:
        """Patches that are shown without noise and not predicted."""
        level = patches.new_zeros(len(patches), 1)
        inputs, _, tokens = self._inputs(patches, level, slot_mask)
        return self._segment(CLEAN, inputs, tokens, level, slot_mask.any(-1), positions, first)

    def _shown_to_noisy(self, read: Tensor, segments: list[Segment]) -> Tensor:
        """What noisy patches are shown of the clean one before them, [B, N, C].

        read: [B, M + N, C], a prompt and the image's clean patches (the segments) where the noisy ones enter. Entering
        late, they are shown what the transformer knows there: after a prompt, what it knows of that.
        """
        image = segments[-1]
        if not self.entry:
            return image.before
        count = image.own.shape[1]
        first = torch.zeros_like(read[:, :1])
        if len(segments) > 1:
            first = last_valid(read[:, :-count], segments[0].valid)
        return self.read_embed(self.read_norm(torch.cat([first, read[:, -count:-1]], 1)))

    def _transform(
        self, x: Tensor, segments: list[Segment], layers: slice, blocks=None, memory=None, wanted: int | None = None
    ) -> Tensor:
        """The segments' patches x [B, L, C] through some of the transformer's blocks.

        blocks: see `predict`. memory: earlier patches, which gets the keys and values of these. wanted: the last so
        many patches are all that is asked for: of the others the last block computes only keys and values.
        """
        passed = list(self.blocks)[layers]
        if not passed:
            return x
        valid = torch.cat([segment.valid for segment in segments], 1)
        positions = torch.cat([segment.positions for segment in segments], 1)
        time = segments[0].time
        if len(segments) > 1:
            time = torch.cat([s.time.expand(-1, s.own.shape[1], -1) for s in segments], 1)
        rotation = self._rotation(positions)
        keys = (valid if memory is None else torch.cat([memory.valid, valid], 1))[:, None, :]  # [B, 1 or L, M + L]
        if blocks is not None:
            keys = keys & seen_from_left_to_right(blocks, x.shape[1], segments[-1].kind == NOISY)
        # A row that sees nothing valid attends to everything: its output is ignored but must stay finite.
        keys = (keys | ~keys.any(-1, keepdim=True))[:, None]
        pasts = [None] * len(self.blocks) if memory is None else memory.past
        for block, past in zip(passed, pasts[layers], strict=True):
            only = wanted if block is passed[-1] and wanted != x.shape[1] else None
            if self.config.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, time, rotation, keys, None, only, use_reentrant=False)
            else:
                x = block(x, time, rotation, keys, past, only)
        return x

    def _embed(self, segment: Segment) -> Tensor:
        """[B, n, C]."""
        # Through the module's forward, not its weight: ZeRO-3 gathers parameters when a module is called.
        kind = self.segment_embed(torch.tensor(segment.kind, device=segment.own.device))
        return segment.own + segment.before + kind

    def _rotation(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of RoPE, each [B, 1, N, head_dim / 2] (Su et al. 2021)."""
        half = self.config.width // self.config.heads // 2
        angles = (positions[..., None] * rope_frequencies(half, positions.device))[:, None]
        return angles.cos().to(self.compute_dtype), angles.sin().to(self.compute_dtype)


def build_head(codec: TokenCodec, config: JiTConfig, slots: int) -> nn.Module:
    if config.head == "linear":
        return LinearHead(codec, slots, config.width)
    posterior = config.posterior
    if posterior == "auto":
        # A posterior mean costs a tree as much as weighing all tokens, and where tokens share a patch, every step of
        # sampling and every level of the bound needs one.
        large = "tree" if slots == 1 else "digits"
        posterior = "tokens" if codec.vocab_size <= TOKEN_POSTERIOR_LIMIT else large
    if posterior not in POSTERIORS:
        raise ValueError(f"unknown posterior {posterior!r}; available: auto, {', '.join(POSTERIORS)}")
    return POSTERIORS[posterior](codec, slots, config.width)


def _mask_slots(probabilities: Tensor, slot_mask: Tensor) -> Tensor:
    return probabilities * slot_mask.view(slot_mask.shape + (1,) * (probabilities.dim() - 3))


def _take(patches: Tensor, index: Tensor) -> Tensor:
    return patches.gather(1, index[..., None].expand(-1, -1, patches.shape[-1]))


def _valid_first(slot_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Indices [B, n] of each row's valid patches, in order, n the largest count of the batch (at least 1; shorter rows
    are filled up with invalid ones), and their slot masks [B, n, K]."""
    valid = slot_mask.any(-1)
    count = max(1, int(valid.sum(1).max()))
    index = torch.argsort((~valid).to(torch.uint8), dim=1, stable=True)[:, :count]
    return index, slot_mask.gather(1, index[..., None].expand(-1, -1, slot_mask.shape[-1]))
