"""What a new run takes over from the model that it starts from (`--init_from`): an export, a checkpoint or a run.

The weights decide the shape, the codec and the vocabulary: a flag that says otherwise is a mistake. The method is the
model's own where neither a flag nor a recipe says more. No torch: the files are read as they stand, and checked in full
when the weights are loaded.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from ds_tokimg import recipes
from ds_tokimg.choices import SIZES
from ds_tokimg.errors import UserError
from ds_tokimg.settings import formats
from ds_tokimg.settings.config import SMALLEST_VOCABULARY, TrainConfig
from ds_tokimg.settings.files import runs_around

# Settings that the config.json beside the model answers for, besides those that a recipe fixes.
_OF_THE_TEXTS = ("max_tokens", "enable_condition", "use_chat_template")


@dataclass(frozen=True)
class Start:
    """Settings that a model gives: `shape`, which its weights decide, and `method`, which may be changed."""

    recipe: str
    shape: dict[str, object]
    method: dict[str, object]


def start_of(source: str) -> Start | None:
    """What the model of a folder gives; None where there is none (loading it says so).

    Raises UserError where its files are broken, or describe a model that a run cannot have.
    """
    folder = _folder(Path(source))
    if folder is None:
        return None
    paths = formats.files_of(folder, formats.MODEL, formats.TEXT)
    files = formats.read_together(paths).files
    try:
        shape = _shape(files[formats.MODEL], source)
        method = _method(files[formats.MODEL], files[formats.TEXT])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{paths[formats.MODEL]}: describes no model ({type(error).__name__}: {error})") from None
    settings = _settings(folder)
    if settings is None:
        return Start(_recipe_like(shape, method), shape, method)
    fields = {field.name: field for field in dataclasses.fields(TrainConfig)}
    names = [name for name, field in fields.items() if field.metadata["of_recipe"] or name in _OF_THE_TEXTS]
    method = {name: getattr(settings, name) for name in names} | method
    shape["vocab_size"] = settings.vocab_size  # of a small corpus the tokenizer may have become smaller
    known = settings.recipe in recipes.names()
    return Start(settings.recipe if known else _recipe_like(shape, method), shape, method)


def _folder(source: Path) -> Path | None:
    """The folder with the model's files: this one, or that of a run's best checkpoint, else its latest."""
    named = [source / "checkpoints" / pointer for pointer in ("best", "latest")]
    tags = [path.read_bytes()[:100].decode(errors="replace").strip() for path in named if path.is_file()]
    places = [source, *(source / "checkpoints" / Path(tag).name for tag in tags)]
    found = (place for place in places if (place / formats.MODEL).is_file() and (place / formats.TEXT).is_file())
    return next(found, None)


def _settings(folder: Path) -> TrainConfig | None:
    """The settings of the run that made the model: in its folder, or around a checkpoint of an earlier version."""
    places = [folder / formats.CONFIG, *(run / formats.CONFIG for run in runs_around(folder))]
    return next((TrainConfig.load(place) for place in places if place.is_file()), None)


def _shape(model: dict, source: str) -> dict[str, object]:
    size, codec = model["model"], model["codec"]
    name = {shape: name for name, shape in SIZES.items()}.get((size["depth"], size["width"], size["heads"]))
    if name is None:
        raise UserError(
            f"--init_from {source}: no size of --model has its {size['depth']} layers, {size['width']} wide, with "
            f"{size['heads']} heads (there are {', '.join(SIZES)})"
        )
    taken = {key: size[key] for key in ("head", "posterior", "noisy_depth", "local_window")}
    taken |= {"token_size": codec["token_size"], "radix": codec["radix"]}
    taken["palette"] = "id" if codec["palette"] is None else "semantic"
    if codec["vocab_size"] >= SMALLEST_VOCABULARY:
        taken["vocab_size"] = codec["vocab_size"]
    return {"model": f"JiT-{name}/{size['patch_size']}", **taken}


def _method(model: dict, text: dict) -> dict[str, object]:
    taken = {key: text[key] for key in ("objective", "timesteps", *_OF_THE_TEXTS)}
    taken |= {key: model["model"][key] for key in ("img_size", "layout")}
    if not model["model"]["in_turn"]:
        taken["in_turn"] = 0.0
    return taken | {"block_size": model["writing"]["block_size"]}


def _recipe_like(shape: dict, method: dict) -> str:
    """The recipe that a model was most likely trained by: the one whose settings are most like its own."""
    values = {**shape, **method}

    def alike(name: str) -> int:
        content = {key: value for section in recipes.read(name).values() for key, value in section.items()}
        return sum(content.get(key) == value for key, value in values.items())

    return max([recipes.DEFAULT, *recipes.names()], key=alike)
