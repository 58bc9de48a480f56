"""The commands to go on with after a run: each can be copied as it stands, and keeps the run's method."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from pathlib import Path

from ds_tokimg.data.sources import weight_of
from ds_tokimg.settings.command_line import flags_of
from ds_tokimg.settings.config import TrainConfig
from ds_tokimg.training.automatic import left_open

# A size that is worth a larger machine, for each.
LARGER = {"XS": "B", "S": "B", "B": "L", "L": "H", "H": "H"}
# What a larger run decides for itself, or what belongs to this launch.
OF_THIS_RUN = (
    *("model", "output_dir", "resume", "accept_other_texts", "init_from", "max_steps", "profile", "verbose"),
    "eval_tokens",
)


def next_steps(config: TrainConfig, images: int, prompt: str | None, step: int) -> dict[str, str]:
    """{what for: command line}.

    Args:
        images: that the run is trained on.
        prompt: one to answer, of a run whose prompts are conditions.
        step: that the run has reached.
    """
    folder, program = config.output_dir, program_name()
    data = [config.eval_data_path] if config.eval_data_path else [weight_of(path)[0] for path in config.data_path]
    texts = ["--data_path", *data]
    if config.eval_fraction == 0 and config.eval_data_path is None:
        texts += ["--split", "all"]
    if config.cache_dir is not None:
        texts += ["--cache_dir", config.cache_dir]
    written = ["--num_samples", "4"] if prompt is None else ["--prompt", prompt]
    return {
        "TensorBoard": shlex.join(["tensorboard", "--logdir", f"{folder}/tensorboard"]),
        "resume": shlex.join(
            [*program, "train", "--resume", "latest", "--output_dir", folder, *_of_launch(config, step)]
        ),
        "generate": shlex.join([*program, "generate", "--checkpoint", folder, *written]),
        "evaluate": shlex.join([*program, "evaluate", "--checkpoint", folder, *texts]),
        "scale up": shlex.join(["deepspeed", "--module", "ds_tokimg", "train", *larger_run(config, images)]),
    }


def program_name() -> list[str]:
    """As this program was started."""
    return ["ds-tokimg"] if Path(sys.argv[0]).stem == "ds-tokimg" else ["python", "-m", "ds_tokimg"]


def larger_run(config: TrainConfig, images: int) -> list[str]:
    """Flags that train a larger model as this one was: the same recipe, texts and method."""
    if config.radix is not None and config.tokenizer_path is None:  # levels for the vocabulary of this run
        config = dataclasses.replace(config, tokenizer_path=f"{config.output_dir}/tokenizer")
    size, patch = config.model.removeprefix("JiT-").split("/")
    name = f"JiT-{LARGER.get(size, size)}/{patch}"
    flags = flags_of(dataclasses.replace(left_open(config, images), batch_size=None), *OF_THIS_RUN)
    return [*flags, "--model", name, "--output_dir", f"{config.output_dir}-{name.replace('/', '-')}"]


def _of_launch(config: TrainConfig, step: int) -> list[str]:
    """What this launch was told and a resumed run does not take over: how train batches are cut, and an end that is
    still ahead. One that is reached is left out: with it nothing would be left to train."""
    cut = {"--batch_size": config.batch_size, "--gradient_accumulation_steps": config.gradient_accumulation_steps}
    ahead = {"--max_steps": config.max_steps} if config.max_steps and step < config.max_steps else {}
    return [word for flag, value in (cut | ahead).items() if value is not None for word in (flag, str(value))]
