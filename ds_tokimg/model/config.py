"""The shape of a model."""

from __future__ import annotations

from dataclasses import dataclass

from ds_tokimg.choices import SIZES

PATCH_SIZES = (2, 4, 8)
LARGEST = (
    1 << 20
)  # depth, width, heads: far above any model, and products of two of them are numbers that torch can count


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
    local_window: int | None = None
    in_turn: bool | None = False
    activation_checkpointing: bool = False


def check_shape(config: JiTConfig) -> None:
    """Raises ValueError for sizes that no transformer can have."""
    for name in ("depth", "width", "heads"):
        if not 1 <= getattr(config, name) <= LARGEST:
            raise ValueError(f"{name} is {getattr(config, name)}: expected at least 1 and at most {LARGEST:,}")
    if config.width % (2 * config.heads):
        raise ValueError(f"width {config.width} is not a multiple of twice the {config.heads} heads")
    if not 0 <= config.noisy_depth <= config.depth:
        raise ValueError(f"noisy_depth is {config.noisy_depth}; the model has {config.depth} blocks (0: all)")
    if config.local_window is not None and not 0 <= config.local_window <= LARGEST:
        raise ValueError(f"local_window is {config.local_window}: expected 0 or more, and at most {LARGEST:,}")


def model_names() -> list[str]:
    return [f"JiT-{size}/{patch}" for size in SIZES for patch in PATCH_SIZES]


def config_of_name(name: str, **options) -> JiTConfig:
    """JiTConfig of "JiT-SIZE/PATCH"; raises ValueError that lists the names there are."""
    size, _, patch = name.removeprefix("JiT-").partition("/")
    if not name.startswith("JiT-") or size not in SIZES or patch not in map(str, PATCH_SIZES):
        raise ValueError(f"unknown model {name!r}; available: {', '.join(model_names())}")
    return JiTConfig(*SIZES[size], patch_size=int(patch), **options)
