"""How a run looks in TensorBoard: the names of its curves, the charts that it opens on, its settings and its plan.

Curves are in four groups. A quantity that training and validation both have carries one name:

    train/  of the train batches: loss, bits_per_token, lr, grad_norm …
    val/    of the held-out texts, by the averaged weights: bits_per_token, bits_per_byte, loss, unigram_entropy …
    perf/   speed and memory
    data/   how much has been seen, and how full the batches are
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ds_tokimg.settings.config import SECTIONS, TrainConfig
from ds_tokimg.settings.setting import LAUNCH
from ds_tokimg.training.forecast import moments_of, precision_of
from ds_tokimg.training.memory import Footprint, rank_memory

if TYPE_CHECKING:
    from ds_tokimg.engine.ranks import Dist
    from ds_tokimg.training.assemble import Parts
    from ds_tokimg.training.objective import TrainingLoss

# Metrics that are not of the group `train`.
GROUPS = {
    "data": ("epoch", "consumed_samples", "tokens_seen", "valid_tokens", "padding_fraction"),
    "perf": (
        *("valid_tokens_per_second", "step_seconds", "data_wait", "model_flops_per_second", "peak_share"),
        *("peak_memory_bytes",),
    ),
}
GROUP_OF = {key: group for group, keys in GROUPS.items() for key in keys}
# What the loss of a validation is called where it is not the average of what the steps report, see `tags_of`.
LOSS_ON_PATH = "val/loss_on_path"
# What Markdown or HTML may take for its own: all punctuation of ASCII.
_MARK = re.compile(r"[!-/:-@\[-`{-~]")
# Settings that make no difference to what is learnt.
HOW_OFTEN = ("num_workers", "save_interval", "eval_interval", "log_interval", "keep_checkpoints", "num_samples")
COMPARED = ("val/bits_per_token", "val/bits_per_byte", "train/loss")


def scalars(row: Mapping[str, Any], tags: Mapping[str, str]) -> list[tuple[str, float]]:
    """(tag, number) pairs of a row of metrics: `train/lr`, `val/bits_per_token`, `val/token_accuracy/t400-500`.

    tags: of metrics with another tag than their own name in their group.
    """
    found = []
    for key, value in row.items():
        tag = tags.get(key) or _tag(key)
        items = [(f"{tag}/{name}", item) for name, item in value.items()] if isinstance(value, dict) else [(tag, value)]
        found += [(name, float(item)) for name, item in items if isinstance(item, int | float) and key != "step"]
    return found


def _tag(key: str) -> str:
    return f"val/{key.removeprefix('val_')}" if key.startswith("val_") else f"{GROUP_OF.get(key, 'train')}/{key}"


def tags_of(parts: Parts) -> dict[str, str]:
    """The tags of metrics that depend on the method.

    A validation's loss is of texts with one noise level, spread evenly over the band, of whose tokens none is given. A
    train batch may have samples with a noise level for every patch, or with tokens that are predicted in turn, and
    other noise levels: then its loss is another quantity, and larger or smaller for that alone.
    """
    draws, timesteps = parts.batch_maker.draws, parts.module.timesteps.kind
    same = timesteps in ("band", "uniform") and not (draws.patch_noise or draws.in_turn or draws.canvas)
    return {} if same else {"val_loss": LOSS_ON_PATH}


def step_bits(sums: Mapping[str, float], module: TrainingLoss) -> dict[str, float]:
    """The bits per token that a step's own texts tell, none where no text of the batch does, named for what they are:
    the bound of how the model writes, as validations measure it, or, where tokens are drawn in turn, which a step does
    not try, that of many small steps. The latter rests on few texts, each at one noise level: the mean of many rows
    tells something, a single row does not."""
    if not sums.get("bound_tokens"):
        return {}
    same = module.told == module.model.writing
    bits = sums["bound_nats"] / (math.log(2) * sums["bound_tokens"])
    return {"bits_per_token" if same else "bits_per_token_many_steps": bits}


def layout_of(tags: Mapping[str, str]) -> dict:
    """The charts of the tab Custom Scalars, for `SummaryWriter.add_custom_scalars`; curves are regular expressions."""

    def lines(*curves: str) -> list:
        return ["Multiline", [f"^{curve}$" for curve in curves]]

    levels = {
        "bits per token of each noise level, which add up": lines("val/bits_by_noise/.+"),
        "loss by noise level": lines("val/loss_by_noise/.+"),
        "share of tokens read correctly by noise level": lines("val/token_accuracy/.+"),
    }
    return {
        "What matters": {
            "bits per token, beside the unigram entropy": lines(
                "val/bits_per_token", "val/unigram_entropy", "train/bits_per_token"
            ),
            "bits per byte": lines("val/bits_per_byte"),
            "loss": lines("train/loss", tags.get("val_loss", "val/loss")),
        },
        "Noise levels of the held-out texts": levels,
        "Optimiser": {
            "learning rate": lines("train/lr"),
            "norm of the gradient, before clipping": lines("train/grad_norm"),
        },
        "Machine": {
            "tokens a second": lines("perf/valid_tokens_per_second"),
            "largest memory so far, in bytes": lines("perf/peak_memory_bytes"),
            "share of the time that waits for data": lines("perf/data_wait"),
        },
    }


def opening(config: TrainConfig, settings: dict, parts: Parts, dist: Dist) -> tuple[dict[str, str], list]:
    """What is told of a run as a whole when it begins: texts by name, and TensorBoard's messages (its settings for the
    tab HParams, which end with `closing`, and the charts of Custom Scalars)."""
    from torch.utils.tensorboard.summary import custom_scalars
    from torch.utils.tensorboard.summary import hparams as messages

    values = hparams(config, settings, dist.world_size)
    tags = tags_of(parts)
    experiment, start, _ = messages(values, dict.fromkeys((*COMPARED, tags.get("val_loss", "val/loss")), 0.0))
    texts = {"run/settings": settings_text(config, settings), "run/plan": plan_text(config, settings, parts, dist)}
    return texts, [custom_scalars(layout_of(tags)), experiment, start]


def closing(finished: bool) -> list:
    """TensorBoard's message that a run is complete; until then HParams calls it running."""
    from torch.utils.tensorboard.summary import hparams as messages

    return [messages({}, {})[2]] if finished else []


def hparams(config: TrainConfig, settings: dict, world_size: int) -> dict[str, str | float]:
    """The settings that tell runs apart, as numbers and words: not where it writes, nor how often."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(TrainConfig):
        if field.metadata["resume"] != LAUNCH and not field.metadata["is_path"] and field.name not in HOW_OFTEN:
            values[field.name] = getattr(config, field.name)
    values |= {
        "recipe": config.recipe,
        "train_batch_size": settings["train_batch_size"],
        "lr": settings["optimizer"]["params"]["lr"],
        "optimizer": settings["optimizer"]["type"],
        "zero_stage": settings["zero_optimization"]["stage"],
        "ranks": world_size,
    }
    known = {name: value for name, value in values.items() if value is not None}
    # TensorBoard would make a number of a bool.
    return {name: str(value).lower() if isinstance(value, bool) else value for name, value in known.items()}


def settings_text(config: TrainConfig, settings: dict) -> str:
    """All settings as Markdown: a table for each section of a recipe, and the engine's JSON."""
    parts = []
    for title, section in SECTIONS.items():
        rows = [(field.name, getattr(config, field.name)) for field in dataclasses.fields(section)]
        parts += [f"### {title}", table(("setting", "value"), [(f"`{name}`", _cell(value)) for name, value in rows])]
    return "\n\n".join([*parts, "### ds_config.json", f"```json\n{json.dumps(settings, indent=2)}\n```"])


def plan_text(config: TrainConfig, settings: dict, parts: Parts, dist: Dist) -> str:
    """Sizes, steps and memory of a run as Markdown."""
    train_set, eval_set, codec = parts.train_set, parts.eval_set, parts.layout.codec
    size = sum(p.ds_numel if hasattr(p, "ds_numel") else p.numel() for p in parts.module.parameters())
    batch, steps = settings["train_batch_size"], parts.steps_per_epoch(settings["train_batch_size"])
    total = steps * (config.epochs or 1)
    micro, accumulation = settings["train_micro_batch_size_per_gpu"], settings["gradient_accumulation_steps"]
    rows = [
        ("model", f"{config.model}, {size:,} parameters, {parts.module.model.num_patches:,} patches an image"),
        ("codec", f"{codec.vocab_size:,} token ids in {codec.radix} levels a channel"),
        ("training", f"{len(train_set):,} images, {train_set.num_tokens:,} tokens"),
        ("validation", f"{len(eval_set):,} images, {eval_set.num_tokens:,} tokens"),
        ("unigram entropy", f"{parts.unigram_entropy:.4f} bits per token"),
        (
            "train batch",
            f"{batch:,} = {micro:,} micro-batch × {accumulation:,} accumulation × {dist.world_size:,} ranks",
        ),
        ("steps", f"{steps:,} an epoch × {config.epochs} epochs; {min(total, config.max_steps or total):,} to run"),
        ("ZeRO stage", settings["zero_optimization"]["stage"]),
        *((f"GB of a rank: {name}", f"{value / 1e9:.3f}") for name, value in _memory(config, settings, parts, dist)),
    ]
    return table(("what", "how much"), rows) + "\n\nActivations come on top: `ds-tokimg plan` counts them."


def _memory(config: TrainConfig, settings: dict, parts: Parts, dist: Dist) -> list[tuple[str, int]]:
    """Bytes on one rank without activations, by what for."""
    size = sum(p.ds_numel if hasattr(p, "ds_numel") else p.numel() for p in parts.module.parameters())
    footprint = Footprint(
        parameters=size,
        precision=precision_of(settings),
        moments=moments_of(settings["optimizer"], parts.module, size),
        averages=int(config.ema_decay > 0),
        zero=settings["zero_optimization"],
        on_cpu=dist.device.type == "cpu",
        fixed=0,
        per_sample=0,
        accumulation=settings["gradient_accumulation_steps"],
    )
    memory = rank_memory(footprint, settings["zero_optimization"]["stage"], dist.world_size)
    names = ("weights", "gradients", "optimizer", "averages", "buffers")
    return [(name, getattr(memory, name)) for name in names] if memory is not None else []


def table(head: tuple, rows: list[tuple]) -> str:
    """A table in Markdown."""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _cell(value) -> str:
    words = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return "not given" if value is None else f"`{words}`".replace("|", "\\|")


def as_markdown(text: str) -> str:
    """Any text, shown as it stands: nothing in it is Markdown or HTML, and lines break where they do."""
    lines = text.replace("\r\n", "\n").replace("\t", "    ").split("\n")
    return "<br>".join(_kept_blanks(_MARK.sub(lambda mark: f"&#{ord(mark[0])};", line)) for line in lines)


def _kept_blanks(line: str) -> str:
    bare = line.lstrip(" ")
    return "&nbsp;" * (len(line) - len(bare)) + bare
