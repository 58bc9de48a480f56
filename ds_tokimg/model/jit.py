"""JiT: a transformer that predicts the clean image from a noisy one, patch by patch.

After Li & He, "Back to Basics: Let Denoising Generative Models Denoise" (2025): x-prediction, RMSNorm, SwiGLU,
RoPE, qk-norm, adaLN-Zero. Changes: the modulation is computed once and shared by the layers, each of which adds a
learned offset (adaLN-single, Chen et al., PixArt-alpha, 2023), because a noise level of its own for every patch would
otherwise cost half as much again as the layers themselves; the patch embedding has no bottleneck, through which the
tokens of a patch can hardly be told apart; every patch also gets the embedding of the one before it (`token_shift`);
tokens that share a patch also get the features of those next to them without going through its hidden state
(`local_window`), and have an MLP of their own; and from left to right noisy patches may enter late (`noisy_depth`),
with what the transformer has already made of the clean ones before them (`context_shift`).
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
from ds_tokimg.diffusion.path import alpha_sigma, readable_band, timestep_of_log_snr
from ds_tokimg.diffusion.writing import RUN, Writing
from ds_tokimg.errors import UserError
from ds_tokimg.model.config import JiTConfig, check_shape, config_of_name
from ds_tokimg.model.context import (
    CLEAN,
    NOISY,
    Drawn,
    KVCache,
    Patches,
    Prompt,
    Segment,
    TeacherForced,
    WholeImage,
    last_valid,
    visible_mask,
)
from ds_tokimg.model.files import WEIGHTS, check_export, check_weights, codec_of, read_weights, shape_of, writing_of
from ds_tokimg.model.heads.base import CandidateTokens, Prediction
from ds_tokimg.model.heads.build import build_head
from ds_tokimg.model.images import ImagePatches, mask_slots, take, valid_first
from ds_tokimg.model.layers import (
    FinalLayer,
    InTurn,
    Layer,
    LocalWindow,
    RMSNorm,
    TimestepEmbedding,
    TokenMLP,
    rope_frequencies,
)
from ds_tokimg.settings import formats
from ds_tokimg.settings.tensors import write_weights
from ds_tokimg.tokens.codec import TokenCodec, check_geometry
from ds_tokimg.tokens.layout import PatchLayout

# Tokens on either side in a token's local window, where several share a patch.
LOCAL_WINDOW = 2
ALONE = WholeImage()


class JiT(ImagePatches, nn.Module):
    """Noisy token images -> clean ones. See `forward` (images) and `predict` (patches, what training uses).

    Args:
        codec: between tokens and colours.
        config: the shape.
        block_size: patches that lose their noise together, see `Writing`; what else belongs to that, the model decides.
    """

    def __init__(self, codec: TokenCodec, config: JiTConfig, block_size: int = 0):
        super().__init__()
        check_shape(config)
        check_geometry(config.img_size, codec.token_size, config.layout, config.patch_size)
        if config.head not in HEADS:
            raise ValueError(f"unknown head {config.head!r}; available: {', '.join(HEADS)}")
        self.codec = codec
        self.slots = (config.patch_size // codec.token_size) ** 2  # K, tokens a patch
        self.num_patches = (config.img_size // config.patch_size) ** 2
        pixels = self.slots * codec.digits_per_token  # P
        self.head = build_head(codec, config, self.slots)
        if config.local_window is None:
            config = replace(config, local_window=LOCAL_WINDOW if self.slots > 1 and self.head.features else 0)
        elif config.local_window and not self.head.features:
            raise ValueError("a local window is over posteriors, and the linear head has none")
        can_be_in_turn = isinstance(self.head, CandidateTokens) and self.slots > 1 and config.local_window > 0
        if config.in_turn is None:
            config = replace(config, in_turn=can_be_in_turn)
        elif config.in_turn and not can_be_in_turn:
            raise ValueError(
                "in_turn is for patches of several tokens with a local window, and posteriors over whole tokens"
            )
        self.config = config
        whole_tokens = isinstance(self.head, CandidateTokens)
        self.writing = Writing.of_model(block_size, self.slots, config.in_turn, whole_tokens)
        self.patch_embed = nn.Linear(pixels + self.head.features, config.width)
        self.token_shift = nn.Linear(config.width, config.width, bias=False)
        self.segment_embed = nn.Embedding(2, config.width)  # by kind
        self.time_embed = TimestepEmbedding(config.width)
        # Beyond them nothing can be read, or everything, and most ways to draw noise levels never go there: sampling
        # and the bound, which do, must not depend on what the network makes of levels that it has not seen.
        with torch.device("cpu"):  # numbers also where the model is built without data (meta)
            band = readable_band(codec.radix)
            self.cleanest, self.noisiest = timestep_of_log_snr(torch.tensor([band.high, band.low])).tolist()
        self.layers = nn.ModuleList(Layer(config.width, config.heads) for _ in range(config.depth))
        # From left to right, noisy patches go through the layers from this one on.
        self.entry = config.depth - config.noisy_depth if config.noisy_depth else 0
        if self.entry:
            self.context_norm = RMSNorm(config.width)
            self.context_shift = nn.Linear(config.width, config.width, bias=False)
        self.final = FinalLayer(config.width)
        self.local_window = self.token_mlp = None
        if self.config.local_window:
            features, outputs = self.head.features // self.slots, self.head.outputs
            self.local_window = LocalWindow(self.config.local_window, features, outputs)
            self.token_mlp = TokenMLP(features, outputs, self.slots)
        nn.init.zeros_(self.segment_embed.weight)

    # ---- construction and files ----

    @classmethod
    def from_name(cls, name: str, codec: TokenCodec, img_size: int = 64, head: str = "posterior", **options) -> JiT:
        """A model by its name, "JiT-SIZE/PATCH" with SIZE one of XS, S, B, L, H and PATCH one of 2, 4, 8.

        `options` are further fields of JiTConfig, and `block_size`. Raises ValueError for unknown names.
        """
        block_size = options.pop("block_size", 0)
        return cls(codec, config_of_name(name, img_size=img_size, head=head, **options), block_size)

    def save_pretrained(self, directory) -> None:
        """Writes model.json (see `description`) and model.safetensors (float32 weights)."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        weights = {name: value.detach().float().contiguous() for name, value in self.state_dict().items()}
        write_weights(weights, directory / WEIGHTS)
        (directory / formats.MODEL).write_text(self.description() + "\n", encoding="utf-8")

    def description(self) -> str:
        """Shape, codec and way of writing as JSON: the content of model.json."""
        parts = {"model": asdict(self.config), "codec": self.codec.to_dict(), "writing": asdict(self.writing)}
        return json.dumps({"format": formats.FORMAT, **parts})

    @classmethod
    def from_files(cls, values: dict, path: Path, weights: dict[str, Tensor], weights_path: Path) -> JiT:
        """A model of a description with these weights, which say how large it can be.

        Args:
            values: of the file `path`, a model.json, in today's format.

        Raises UserError when they describe no model, or the weights are another's.
        """
        codec, config = codec_of(values, path), shape_of(values, path)
        if config.depth > len(weights):
            raise UserError(f"{path}: depth is {config.depth}, and {weights_path} has only {len(weights)} parameters")
        with formats.blaming(path):
            try:
                with torch.device("meta"):  # no memory for sizes that the file may only claim
                    shape = cls(codec, config).state_dict()
            except (RuntimeError, OverflowError, TypeError) as error:
                raise UserError(f"{path}: no model can have these sizes ({str(error).splitlines()[0]})") from None
            check_weights(shape, weights, weights_path)
            model = cls(codec, config)
            model.writing = writing_of(values, path)
            if model.writing.in_turn and not model.config.in_turn:
                raise ValueError("writing.in_turn is true, and the model has not learnt to draw tokens in turn")
        model.load_state_dict(weights)
        return model

    @classmethod
    def from_pretrained(cls, directory) -> JiT:
        """Reads what `save_pretrained` (or `python -m ds_tokimg export`) wrote; needs no DeepSpeed.

        Raises FileNotFoundError when the folder is not an export, UserError when its files are broken, or of a newer
        version than this one.
        """
        directory = Path(directory)
        for name in (formats.MODEL, WEIGHTS):
            if not (directory / name).is_file():
                raise FileNotFoundError(f"{directory} is no export of a model: there is no {name} in it")
        written = formats.read_together(formats.files_of(directory, formats.MODEL, may_have=[formats.TEXT]))
        weights = read_weights(directory / WEIGHTS, written.format)
        values = written.files[formats.MODEL]
        model = cls.from_files(values, directory / formats.MODEL, weights, directory / WEIGHTS)
        check_export(directory)
        return model.eval()

    @property
    def layout(self) -> PatchLayout:
        """How token ids lie in the patches of its images."""
        return PatchLayout(self.codec, self.config.img_size, self.config.patch_size, self.config.layout)

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
        patches = self.patchify(noisy)
        index, slot_mask = valid_first(self.slot_mask(mask, noisy))  # [B, n], [B, n, K]
        if t.dim() == 2:
            t = t.gather(1, index)
        prompt = None
        if condition is not None:
            prompt_index, prompt_mask = valid_first(self.slot_mask(condition_mask, condition))
            prompt = (take(self.patchify(condition), prompt_index), prompt_mask)
        clean = self.predict(Patches(take(patches, index), t, slot_mask, index), WholeImage(prompt)).clean
        clean = mask_slots(clean.unflatten(-1, (self.slots, -1)), slot_mask).flatten(2)
        full = clean.new_zeros(len(noisy), self.num_patches, clean.shape[-1])
        return self.unpatchify(full.scatter(1, index[..., None].expand_as(clean), clean))

    # ---- patches ----

    def predict(
        self, patches: Patches, seen: WholeImage | TeacherForced | KVCache = ALONE, drawn: Drawn | None = None
    ) -> Prediction:
        """Predicts clean patches.

        Args:
            patches: the noisy ones.
            seen: what they see besides themselves: nothing or a prompt, the clean patches of all blocks before theirs
                (training), or those that are in a cache (sampling).
            drawn: tokens that are drawn in turn, for models that have learnt that; None: all are predicted together.
        """
        levels, mask = patches.levels, patches.slot_mask
        inputs, evidence, tokens = self._inputs(patches.noisy, levels, mask)
        before = seen.shift_to_noisy if isinstance(seen, KVCache) else None
        time = self._modulation(levels.clamp(self.cleanest, self.noisiest), seen)
        noisy = self._segment(NOISY, inputs, tokens, time, mask.any(-1), patches.places, before)
        preceding = clean = None  # features of tokens without noise: of those before these, and of these
        if isinstance(seen, KVCache):
            x, preceding = self._after_cache(noisy, seen), seen.tokens
        elif isinstance(seen, TeacherForced):
            x, clean = self._teacher_forced(noisy, patches, seen)
        else:
            x = self._whole_image(noisy, seen.prompt)
        hidden = self.head(self.final(x, noisy.time))
        if self.local_window is None:
            return Prediction(self.head, hidden, evidence)
        outputs = partial(self._outputs, hidden, tokens, mask, preceding, clean)
        of_turn = (lambda turn, ids: outputs(Drawn(ids), slice(turn, None, RUN))) if self.config.in_turn else None
        return Prediction(self.head, lambda: outputs(drawn).view(hidden.shape), evidence, of_turn)

    def _whole_image(self, noisy: Segment, prompt: Prompt | None) -> Tensor:
        """The noisy patches after the transformer, which sees all of them together: [B, N, C]."""
        segments = [noisy] if prompt is None else [self._prompt_segment(*prompt), noisy]
        x = torch.cat([self._embed(segment) for segment in segments], 1)
        return self._transform(x, segments, slice(None), wanted=noisy.own.shape[1])

    def _teacher_forced(self, noisy: Segment, patches: Patches, seen: TeacherForced) -> tuple[Tensor, tuple]:
        """The same, from left to right, all blocks at once; and the features of the clean tokens for the local window,
        [B, N * K, F], with the blocks they belong to, [N * K]."""
        segments = [] if seen.prompt is None else [self._prompt_segment(*seen.prompt)]
        clean = self._clean_segment(seen.clean, patches.slot_mask, patches.places)
        segments.append(clean)
        x = torch.cat([self._embed(segment) for segment in segments], 1)
        x = self._transform(x, segments, slice(self.entry), seen.blocks)
        # The first patch of a block stands after a clean one.
        starts = torch.diff(seen.blocks, prepend=seen.blocks[:1] - 1) != 0
        shift = torch.where(starts[:, None], self._shift_to_noisy(x, segments), noisy.shift)
        noisy = noisy._replace(shift=shift)
        x = torch.cat([x, self._embed(noisy)], 1)
        count = noisy.own.shape[1]
        x = self._transform(x, [*segments, noisy], slice(self.entry, None), seen.blocks, wanted=count)
        return x, (clean.tokens, seen.blocks.repeat_interleave(self.slots))

    def _after_cache(self, noisy: Segment, cache: KVCache) -> Tensor:
        """The same, of the block after what is in the cache, to which nothing is added."""
        cache, layers = cache.for_one_pass(), slice(self.entry, None)
        return self._transform(self._embed(noisy), [noisy], layers, cache=cache, wanted=noisy.own.shape[1])

    def _outputs(self, hidden, tokens, slot_mask, preceding, context, drawn=None, wanted=slice(None)) -> Tensor:
        """Where tokens share a patch: what the head needs of those that are wanted, [B, L, …] (`hidden`:
        [B, N, K, …])."""
        in_turn = None
        if drawn is not None:
            ids, rows = drawn
            clean = context[0] if context else self._on_slots(self.head.embed_ids(ids), slot_mask).flatten(1, 2)
            in_turn = InTurn(clean, rows)
        near = self.local_window(tokens, preceding, context, in_turn, wanted)
        hidden = hidden.flatten(1, 2)
        output = self.token_mlp(hidden.flatten(2)[:, wanted] + near, tokens[:, wanted])
        return output.view(*output.shape[:2], *hidden.shape[2:])

    def empty_cache(self, slot_mask: Tensor) -> KVCache:
        """For as many texts as slot_mask [B, N, K] has, before anything is read."""
        return KVCache(len(self.layers), len(slot_mask), slot_mask.device)

    def prefill(
        self,
        cache: KVCache,
        patches: Tensor,
        slot_mask: Tensor,
        positions: Tensor | None = None,
        blocks: Tensor | None = None,
        ids: Tensor | None = None,
    ) -> None:
        """Reads a prompt (positions None) or the next block of clean patches [B, n, P] into the cache, once for all
        steps to come. `blocks`: int64 [n], of several blocks, the one that each patch belongs to. `ids`: the tokens
        [B, n, K] of a block, from which its features are had for less."""
        if positions is None:
            segment = self._prompt_segment(patches, slot_mask)
        else:
            segment = self._clean_segment(patches, slot_mask, positions, cache, ids)
        x = self._transform(self._embed(segment), [segment], slice(self.entry), blocks, cache)
        cache.shift = None if positions is None else segment.shifted[:, -1:]
        cache.shift_to_noisy = cache.shift
        if self.entry:
            cache.shift_to_noisy = self.context_shift(self.context_norm(last_valid(x, segment.valid)))
        self._transform(x, [segment], slice(self.entry, None), blocks, cache, wanted=0)
        if self.local_window is not None and positions is not None:
            cache.tokens = self.local_window.last(segment.tokens, cache.tokens)
        cache.valid = torch.cat([cache.valid, segment.valid], 1)

    def read(self, prediction: Prediction, chosen: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Tokens of a prediction: ids int64 [B, N, K], and bool [B, N, K]: the colour is no token.

        chosen: indices of the candidates along the last axis of the logits; None: the most likely ones.
        """
        if not self.head.features:
            return self.codec.nearest(prediction.clean.unflatten(-1, (self.slots, -1)))
        chosen = prediction.likeliest() if chosen is None else chosen
        colours = self.head.colours(chosen).unflatten(-1, (self.slots, -1))
        return self.codec.nearest(colours)

    def _inputs(self, noisy, level, slot_mask, ids=None):
        """Features of the patches [B, N, F] (padding slots zeroed), the head's evidence (None for `linear`), and the
        features of the tokens [B, N * K, F'] for the local window, or None where there is none. ids: of tokens
        [B, N, K] that are certain, whose evidence is not needed."""
        parts, evidence, tokens = [noisy.unflatten(-1, (self.slots, -1))], None, None  # each [B, N, K, features]
        if ids is not None and isinstance(self.head, CandidateTokens):
            parts.append(self.head.embed_ids(ids))
        elif self.head.features:
            evidence = self.head.evidence(noisy, *alpha_sigma(level))
            parts.append(self.head.features_of(evidence))
        parts = [self._on_slots(part, slot_mask) for part in parts]
        if self.local_window is not None:
            tokens = parts[1].flatten(1, 2)
        return torch.cat([part.flatten(2) for part in parts], -1), evidence, tokens

    def _on_slots(self, features: Tensor, slot_mask: Tensor) -> Tensor:
        """Features [B, N, K, F] of tokens, zeroed where there is none."""
        return (features * slot_mask[..., None]).to(self.compute_dtype)

    def _modulation(self, levels: Tensor, seen=None) -> Tensor:
        """Of noise levels [B, n]: [B, n, 6C]. Token after token has the same ones, which a KV cache remembers."""
        if not isinstance(seen, KVCache):
            return self.time_embed(levels)
        for known, time in seen.modulations:
            if torch.equal(known, levels):
                return time
        time = self.time_embed(levels)
        seen.modulations = [*seen.modulations[-1:], (levels, time)]
        return time

    def _segment(self, kind: int, inputs, tokens, time, valid, positions, before: Tensor | None = None) -> Segment:
        """Inputs [B, n, F] and features of their tokens, with the modulation [B, n or 1, 6C] of their noise levels,
        after a patch from which `before` is shifted (None: after none).

        The token shift of Peng et al., "RWKV" (2023), section 3.1: which token follows which need not be found by
        attention first. Between a prompt and a clean patch nothing is shifted.
        """
        own = self.patch_embed(inputs)
        shifted = self.token_shift(own)
        before = torch.zeros_like(shifted[:, :1]) if before is None else before
        shift = torch.cat([before, shifted[:, :-1]], 1)
        return Segment(kind, own, shifted, shift, time, valid, positions, tokens)

    def _prompt_segment(self, patches: Tensor, slot_mask: Tensor) -> Segment:
        """The prompt; its last patch gets position -1, so that it stands next to the image's first."""
        count = patches.shape[1]
        positions = torch.arange(count, device=patches.device) - slot_mask.any(-1).sum(1, keepdim=True)
        return self._clean_segment(patches, slot_mask, positions)

    def _clean_segment(self, patches: Tensor, slot_mask: Tensor, positions: Tensor, cache=None, ids=None) -> Segment:
        """Patches without noise, which are not predicted; after those in a cache."""
        level = patches.new_zeros(len(patches), 1)
        inputs, _, tokens = self._inputs(patches, level, slot_mask, ids)
        time, before = self._modulation(level, cache), None if cache is None else cache.shift
        return self._segment(CLEAN, inputs, tokens, time, slot_mask.any(-1), positions, before)

    def _shift_to_noisy(self, read: Tensor, segments: list[Segment]) -> Tensor:
        """What is shifted to noisy patches from the clean one before them, [B, N, C].

        read: [B, M + N, C], a prompt and the image's clean patches (the segments) where the noisy ones enter. Where
        they enter late it is what the transformer knows there: after a prompt, what it knows of that.
        """
        image = segments[-1]
        if not self.entry:
            return image.shift
        count = image.own.shape[1]
        first = torch.zeros_like(read[:, :1])
        if len(segments) > 1:
            first = last_valid(read[:, :-count], segments[0].valid)
        return self.context_shift(self.context_norm(torch.cat([first, read[:, -count:-1]], 1)))

    def _transform(
        self, x: Tensor, segments: list[Segment], layers: slice, blocks=None, cache=None, wanted: int | None = None
    ) -> Tensor:
        """The segments' patches x [B, L, C] through some of the transformer's layers.

        blocks: see `TeacherForced`. cache: earlier patches, which gets the keys and values of these. wanted: the last
        so many patches are all that is asked for: of the others the last layer computes only keys and values.
        """
        passed = list(self.layers)[layers]
        if not passed:
            return x
        valid, positions, time = segments[0].valid, segments[0].positions, segments[0].time
        if len(segments) > 1:
            valid = torch.cat([segment.valid for segment in segments], 1)
            positions = torch.cat([segment.positions for segment in segments], 1)
            time = torch.cat([s.time.expand(-1, s.own.shape[1], -1) for s in segments], 1)
        rotation = self._rotation(positions)
        valid = valid if cache is None else torch.cat([cache.valid, valid], 1)
        visible = None
        if cache is None or blocks is not None or not valid.all():
            visible = visible_mask(valid, blocks, segments[-1].kind == NOISY)[..., -x.shape[1] :, :]
        pasts = [None] * len(self.layers) if cache is None else cache.past
        for layer, past in zip(passed, pasts[layers], strict=True):
            only = wanted if layer is passed[-1] and wanted != x.shape[1] else None
            if self.config.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, time, rotation, visible, None, only, use_reentrant=False)
            else:
                x = layer(x, time, rotation, visible, past, only)
        return x

    def _embed(self, segment: Segment) -> Tensor:
        """[B, n, C]."""
        # Through the module's forward, not its weight: ZeRO-3 gathers parameters when a module is called.
        kind = self.segment_embed(torch.full((), segment.kind, dtype=torch.int64, device=segment.own.device))
        return segment.own + segment.shift + kind

    def _rotation(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of RoPE, each [B, 1, N, head_dim / 2] (Su et al. 2021)."""
        if len(positions) > 1 and positions.stride(0) == 0:  # the same in all rows
            positions = positions[:1]
        half = self.config.width // self.config.heads // 2
        angles = (positions[..., None] * rope_frequencies(half, positions.device))[:, None]
        return angles.cos().to(self.compute_dtype), angles.sin().to(self.compute_dtype)
