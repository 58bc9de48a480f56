"""The shape of a model."""

from __future__ import annotations

from dataclasses import dataclass

#                 depth, width, heads
SIZES = {
    "XS": (6, 192, 6),
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "H": (32, 1280, 16),
}
PATCH_SIZES = (2, 4, 8)


@dataclass(frozen=True)
class JiTConfig:
    """The shape of a model: with the codec, all that `JiT` needs."""

    depth: int
    width: int
    heads: int
    patch_size: int = 4
    img_size: int = 64
    head: str = "posterior"
    posterior: str = "auto"
    layout: str = "patch"
    noisy_depth: int = 0
    neighbours: int | None = None
    in_turn: bool | None = False
    activation_checkpointing: bool = False


def model_names() -> list[str]:
    return [f"JiT-{size}/{patch}" for size in SIZES for patch in PATCH_SIZES]


def config_of_name(name: str, **options) -> JiTConfig:
    """JiTConfig of "JiT-SIZE/PATCH"; raises ValueError that lists the names there are."""
    size, _, patch = name.removeprefix("JiT-").partition("/")
    if not name.startswith("JiT-") or size not in SIZES or patch not in map(str, PATCH_SIZES):
        raise ValueError(f"unknown model {name!r}; available: {', '.join(model_names())}")
    return JiTConfig(*SIZES[size], patch_size=int(patch), **options)
