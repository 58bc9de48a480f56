"""Tiny models and texts for tests, and a model whose posterior is exact."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch import Tensor, nn

from ds_tokimg.data.batch import BatchMaker, BatchPacker, Draws
from ds_tokimg.diffusion.path import alpha_sigma
from ds_tokimg.diffusion.writing import RUN, Writing
from ds_tokimg.model.config import JiTConfig
from ds_tokimg.model.context import KVCache, Patches, TeacherForced, WholeImage
from ds_tokimg.model.heads.base import Prediction
from ds_tokimg.model.heads.tokens import TokenHead
from ds_tokimg.model.jit import JiT
from ds_tokimg.tokens.codec import TokenCodec
from ds_tokimg.tokens.layout import PatchLayout
from ds_tokimg.training.objective import TrainingLoss


def tiny_model(codec: TokenCodec, *, trained: bool = True, block_size: int = 0, **options) -> JiT:
    """A JiT of two small blocks. `trained`: every weight is random, so that no path through it is silent."""
    shape = {"depth": 2, "width": 32, "heads": 2, "patch_size": 4, "img_size": 16}
    torch.manual_seed(0)
    model = JiT(codec, JiTConfig(**shape | options), block_size)
    if trained:
        for name, parameter in model.named_parameters():
            nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)
    return model


def maker_of(module: TrainingLoss, seed: int = 0, **draws) -> BatchMaker:
    """Makes the batches that a module is trained on."""
    packer = BatchPacker(layout_of(module.model), module.model.writing.block_size)
    return BatchMaker(packer, module.timesteps, seed, Draws(**draws))


def layout_of(model) -> PatchLayout:
    config = model.config
    return PatchLayout(model.codec, config.img_size, config.patch_size, config.layout)


class Texts:
    """Token ids, and prompts, in the shape of a data set."""

    def __init__(self, texts, prompts=None):
        self.texts, self.prompts = texts, prompts
        self.num_bytes, self.loses_text = 3 * sum(map(len, texts)), False

    def __len__(self) -> int:
        return len(self.texts)

    def ids(self, index: int) -> np.ndarray:
        return np.asarray(self.texts[index], dtype=np.int64)

    def prompt_ids(self, index: int) -> np.ndarray:
        return np.asarray(self.prompts[index] if self.prompts else [], dtype=np.int64)


def random_texts(vocab_size: int, lengths, prompt_lengths=None, seed: int = 0) -> Texts:
    rng = np.random.default_rng(seed)
    texts = [rng.integers(0, vocab_size, n) for n in lengths]
    return Texts(texts, prompt_lengths and [rng.integers(0, vocab_size, n) for n in prompt_lengths])


class ExactModel(nn.Module):
    """Knows the distribution of texts and predicts by Bayes' rule over all of them: what training can at best reach.

    Args:
        codec: of a tiny vocabulary.
        texts: {text, a tuple of ids, all of one length: probability}.
        patch_size, img_size: of the images the texts are written into.
        in_turn: tokens are drawn in turn.
        block_size: as a JiT is written.
    """

    def __init__(
        self,
        codec: TokenCodec,
        texts: dict[tuple[int, ...], float],
        patch_size: int = 1,
        img_size: int = 4,
        in_turn: bool = False,
        block_size: int = 0,
    ):
        super().__init__()
        self.codec = codec
        shape = {"patch_size": patch_size, "img_size": img_size, "posterior": "tokens", "in_turn": in_turn}
        self.config = JiTConfig(1, 4, 1, **shape)
        self.slots = (patch_size // codec.token_size) ** 2
        self.head = TokenHead(codec, self.slots, 4)
        self.writing = Writing.of_model(block_size, self.slots, in_turn, whole_tokens=True)
        self.layout = layout_of(self)
        self.texts = torch.tensor(list(texts))  # [texts, length]
        self.log_prior = torch.tensor(list(texts.values()), dtype=torch.float64).log()  # [texts]
        self.evaluations: list[Tensor] = []  # the timesteps of all calls

    def predict(self, patches: Patches, seen=WholeImage(), drawn=None) -> Prediction:  # noqa: B008
        noisy, t, *_ = patches
        self.evaluations.append(t)
        if drawn is not None:
            known = self.posterior(noisy, t).flatten(1, 2)
            for turn in range(min(RUN, known.shape[1])):
                known[:, turn::RUN] = self.posterior(noisy, t, (turn, drawn.ids)).flatten(1, 2)[:, turn::RUN]
            return Prediction.of_logits(self.head, known.unflatten(1, (-1, self.slots)).log().float())
        if self.config.in_turn:
            return ExactInTurn(self, noisy, t)
        if isinstance(seen, KVCache):  # the patches so far, then these
            clean = seen.patches if seen.patches is not None else noisy[:, :0]
            level = torch.cat([t.new_zeros(clean.shape[:2]), t[:, None].expand(noisy.shape[:2])], 1)
            probabilities = self.posterior(torch.cat([clean, noisy], 1), level)[:, clean.shape[1] :]
        elif isinstance(seen, TeacherForced):
            probabilities = self._from_left_to_right(noisy, t, seen.clean, seen.blocks)
        else:
            probabilities = self.posterior(noisy, t)
        return Prediction.of_logits(self.head, probabilities.log().float())

    def empty_cache(self, slot_mask):
        cache = KVCache(0, len(slot_mask), slot_mask.device)
        cache.patches = None
        return cache

    def prefill(self, cache, patches, slot_mask, positions, blocks=None, ids=None):
        cache.patches = patches if cache.patches is None else torch.cat([cache.patches, patches], 1)

    def _from_left_to_right(self, noisy: Tensor, t: Tensor, clean: Tensor, blocks: Tensor) -> Tensor:
        """Block by block: what comes before it is shown without noise, what comes after it as nothing but noise."""
        result = torch.ones(())
        for block in blocks.unique():
            shown = torch.where((blocks < block)[:, None], clean, torch.where((blocks > block)[:, None], 0.0, noisy))
            level = torch.where(blocks < block, 0.0, torch.where(blocks > block, 1000.0, t))
            result = torch.where((blocks == block)[:, None, None], self.posterior(shown, level), result)
        return result

    def posterior(self, noisy: Tensor, t: Tensor, drawn: tuple[int, Tensor] | None = None) -> Tensor:
        """p(token at each place | noisy), float64 [B, N, K, V]; places behind the texts get even ones.

        drawn: (turn, ids [B, N, K]): the tokens of earlier turns are known to be these.
        """
        batch, patches, _ = noisy.shape
        length, vocab_size = self.texts.shape[1], self.codec.vocab_size
        level = (t if t.dim() == 2 else t[:, None].expand(batch, patches)).repeat_interleave(self.slots, 1)
        alpha, sigma = alpha_sigma(level.double()[:, :length, None])
        sigma = sigma.clamp(min=1e-4)
        z = noisy.double().unflatten(-1, (self.slots, -1)).flatten(1, 2)[:, :length]  # [B, length, D]
        places = z.shape[1]  # fewer than `length` when what comes after is not there yet
        centres = alpha[..., None] * self.codec.codebook.double()  # [B, length, V, D]
        per_token = torch.distributions.Normal(centres, sigma[..., None]).log_prob(z[:, :, None]).sum(-1)
        joint = self.log_prior + sum(per_token[:, i][:, self.texts[:, i]] for i in range(places))  # [B, texts]
        for place in range(places if drawn is not None else 0):
            if place % RUN < drawn[0]:
                is_other = self.texts[:, place] != drawn[1].flatten(1)[:, place, None]
                joint = joint.masked_fill(is_other, -torch.inf)
        weights = joint.softmax(-1)
        result = torch.full((batch, patches * self.slots, vocab_size), 1 / vocab_size, dtype=torch.float64)
        for place in range(places):
            result[:, place] = torch.zeros(batch, vocab_size).double().index_add_(1, self.texts[:, place], weights)
        return result.clamp(min=1e-300).unflatten(1, (patches, self.slots))

    read = JiT.read


class ExactInTurn(Prediction):
    """What an ExactModel says when it is asked for tokens in turn."""

    is_in_turn = True

    def __init__(self, model: ExactModel, noisy: Tensor, t: Tensor):
        super().__init__(model.head, None, None)
        self.posterior = lambda drawn=None: model.posterior(noisy, t, drawn).log().float()
        self.logits = self.posterior()

    def logits_in_turn(self, turn: int, ids: Tensor) -> Tensor:
        return self.posterior((turn, ids)).flatten(1, 2)[:, turn::RUN]


def correlated_texts(vocab_size: int, length: int, seed: int = 0) -> dict[tuple[int, ...], float]:
    """Every text of this length with a probability of its own: far from independent tokens."""
    rng = np.random.default_rng(seed)
    texts = list(itertools.product(range(vocab_size), repeat=length))
    share = rng.dirichlet(np.full(len(texts), 0.4)) + 1e-3
    return dict(zip(texts, share / share.sum(), strict=True))
