"""What an export says of itself: README.md, the model card of the Hugging Face hub, with what is known and no more."""

from __future__ import annotations

import json
from dataclasses import dataclass

from ds_tokimg import __version__
from ds_tokimg.inference.loading import TrainedModel
from ds_tokimg.settings.config import TrainConfig

_FIGURES = ("step", "bits_per_token", "standard_error", "bits_per_byte", "texts", "tokens")
# Without it the hub shows the model without a licence, and nobody else may use it.
_FILL_IN = "unknown  # to fill in: the licence under which others may use the weights, such as mit or cc-by-4.0"
_WRITES = {
    True: "from left to right, {block_size} patch(es) at a time",
    False: "the whole image at once, out of noise",
}


@dataclass(frozen=True)
class Origin:
    """What is known of the run that a model comes from; None for what is not."""

    settings: TrainConfig | None = None
    step: int | None = None  # optimiser steps of the checkpoint
    weights: str | None = None  # "ema", averaged over the steps, or "trained"
    figures: dict | None = None  # of the run's last validation before the checkpoint, see `Run.validate`
    best: tuple[float, int] | None = None  # bits per token of its best validation up to here, and the step


def card(trained: TrainedModel, origin: Origin, name: str, licence: str | None) -> str:
    """The model card, Markdown.

    Args:
        trained: whose format names its data, without their places. name: of the model; on the hub `owner/name`.
        licence: as the hub names it; None leaves it to be filled in.
    """
    parts = [_front_matter(trained, origin, name, licence), f"# {name.split('/')[-1]}", _introduction(trained)]
    parts += ["## Use", _use(trained, name), "## What it is", _table(_facts(trained, origin))]
    parts += ["## What held-out text costs", _costs(origin)]
    parts += ["## Limits", _limits(trained), "## Licence", _licence(licence)]
    return "\n\n".join(parts) + "\n"


def _front_matter(trained: TrainedModel, origin: Origin, name: str, licence: str | None) -> str:
    lines = ["---", f"license: {licence or _FILL_IN}", "library_name: ds_tokimg", "pipeline_tag: text-generation"]
    lines += ["tags:", "- ds_tokimg", "- diffusion", "- token-images"]
    figures, texts = _whole(origin.figures), ", ".join(trained.format.data_path)
    if figures:
        lines += [
            "model-index:",
            f"- name: {json.dumps(name.split('/')[-1])}",
            "  results:",
            "  - task: {type: text-generation}",
            f"    dataset: {{type: text, name: {json.dumps(f'validation texts of {texts}')}}}",
            "    metrics:",
            *(
                f"    - {{type: {key}, name: {key.replace('_', ' ')}, value: {figures[key]:.4f}}}"
                for key in ("bits_per_token", "bits_per_byte")
            ),
        ]
    return "\n".join([*lines, "---"])


def _introduction(trained: TrainedModel) -> str:
    parameters = sum(parameter.numel() for parameter in trained.model.parameters())
    what = "answers prompts" if trained.format.enable_condition else "continues texts"
    side = trained.model.config.img_size
    return (
        f"A language model that writes in pixels and {what}: text becomes tokens, every token the colour of a cell of "
        f"a {side}×{side} image, and a transformer of {parameters:,} parameters turns noise into such images. Trained "
        f"on {_data(trained)} with ds_tokimg {__version__}."
    )


def _use(trained: TrainedModel, name: str) -> str:
    call = 'lm.answer("…")' if trained.format.enable_condition else 'lm("…")'
    place = "" if "/" in name else "  # this folder"
    return (
        "With ds_tokimg installed (`pip install .` in its repository):\n\n"
        f'```python\nfrom ds_tokimg import load\n\nlm = load("{name}"){place}\nprint({call})\n```\n\n'
        "The files are checked against `manifest.json`; none of them holds code."
    )


def _facts(trained: TrainedModel, origin: Origin) -> dict[str, str]:
    model, text, settings = trained.model, trained.format, origin.settings
    shape, codec = model.config, model.codec
    palette = "learned" if codec.palette is not None else "plain"
    blocks = model.writing.block_size
    facts = {
        "transformer": f"{shape.depth} layers, {shape.width} wide, {shape.heads} heads",
        "patches": f"{shape.patch_size} pixels wide",
        "head": shape.head,
        "code": f"{codec.vocab_size:,} tokens, cells {codec.token_size} pixels wide, {codec.radix} levels a channel",
        "palette, layout": f"{palette}, {shape.layout}",
        "tokens an image": f"at most {text.max_tokens:,}",
        "writes": _WRITES[blocks > 0].format(block_size=blocks),
        "objective": f"{text.objective}, noise levels {text.timesteps}",
        "data": _data(trained),
    }
    if origin.step is not None:
        facts["training"] = f"{origin.step:,} optimiser steps"
    if origin.weights is not None:
        facts["weights"] = "moving average" if origin.weights == "ema" else "of the last step"
    if settings is not None:
        facts["recipe"] = str(settings.recipe)
        facts["train batch"] = str(settings.train_batch_size)
        facts["peak learning rate"] = str(settings.lr)
        facts["seed"] = str(settings.seed)
    return facts


def _table(facts: dict[str, str]) -> str:
    rows = [f"| {key} | {value.replace('|', '/')} |" for key, value in facts.items()]
    return "\n".join(["| | |", "|---|---|", *rows])


def _costs(origin: Origin) -> str:
    figures = _whole(origin.figures)
    if figures is None:
        known = "No figures are stored with these weights."
        if origin.best is not None:  # by an earlier version, which kept no errors
            known = f"The best validation of the run: {origin.best[0]:.4f} bits per token, at step {origin.best[1]:,}."
        return f"{known} `ds-tokimg evaluate` measures them on texts of your choice."
    error = figures["standard_error"]
    spread = "" if error is None else f" ± {1.96 * error:.4f} (95 %, over the texts)"
    where = "these weights" if figures["step"] == origin.step else f"the same run at step {figures['step']:,}"
    lines = [
        f"{figures['bits_per_token']:.4f}{spread} bits per token, {figures['bits_per_byte']:.4f} bits per byte: the "
        f"upper bound of `ds-tokimg evaluate` for {where}, on {figures['texts']:,} images of validation texts with "
        f"{figures['tokens']:,} tokens."
    ]
    if origin.best is not None and origin.best[1] != figures["step"]:
        bits, step = origin.best
        lines.append(f"The best validation of the run so far: {bits:.4f} bits per token, at step {step:,}.")
    return "\n\n".join(lines)


def _limits(trained: TrainedModel) -> str:
    return (
        "A research model. It writes what is likely after its training texts, true or not, with whatever they hold; "
        f"nothing is filtered. It knows nothing but {_data(trained)}."
    )


def _licence(licence: str | None) -> str:
    own = f"The weights: {licence}." if licence else "The weights: to fill in, here and in the first lines of the file."
    return f"{own} The texts that the model was trained on have licences of their own."


def _data(trained: TrainedModel) -> str:
    return ", ".join(f"`{name}`" for name in trained.format.data_path) or "texts that are not named"


def _whole(figures: dict | None) -> dict | None:
    """Figures of a validation, if they are all there; a stranger's file may hold anything."""
    if figures is None or set(_FIGURES) - figures.keys():
        return None
    numbers = [figures[key] for key in _FIGURES if not (key == "standard_error" and figures[key] is None)]
    return figures if all(isinstance(number, int | float) for number in numbers) else None
