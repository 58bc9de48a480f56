"""Which head a model gets."""

from __future__ import annotations

from torch import nn

from ds_tokimg.model.config import JiTConfig
from ds_tokimg.model.heads.digits import DigitHead
from ds_tokimg.model.heads.linear import LinearHead
from ds_tokimg.model.heads.tokens import TokenHead
from ds_tokimg.model.heads.tree import TreeHead
from ds_tokimg.tokens.codec import TokenCodec

POSTERIORS = {"tokens": TokenHead, "digits": DigitHead, "tree": TreeHead}
# Up to this vocabulary weighing all tokens costs less than the transformer of the smallest model.
TOKEN_POSTERIOR_LIMIT = 4096


def build_head(codec: TokenCodec, config: JiTConfig, slots: int) -> nn.Module:
    """The head of a shape, for patches of so many tokens. Raises ValueError for an unknown posterior."""
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
