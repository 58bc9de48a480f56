"""ds_tokimg: a language model that writes in pixels, trained in a DeepSpeed engine.

The names below are imported when first used, so that `import ds_tokimg` costs neither torch nor deepspeed.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "TokenCodec": "tokens.codec",
    "TokenImageDataset": "data.dataset",
    "add_noise_to_timestep": "diffusion.path",
    "masked_loss": "training.objective",
    "JiT": "model.jit",
    "load": "training.language_model",
    "bits_per_token": "training.bound",
    "UserError": "errors",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
