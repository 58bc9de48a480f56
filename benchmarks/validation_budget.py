"""What a validation costs beside training, and what a budget for it is best spent on: more texts, or more noise levels.

    python -m benchmarks.validation_budget --checkpoint runs/first > benchmarks/results/validation_budget.md

The checkpoint is one of the default recipe on the bundled corpus. First a token's cost in a training step, at one noise
level of the bound and where tokens are drawn in turn, taking turns; these are LEVEL_COST and DRAWN_COST of
training/budget.py. Then all held-out texts are bounded at several numbers of noise levels; from the spread of the texts
follows the standard error of as many of them as the same time pays for.
"""

import argparse
import math
import tempfile
from collections.abc import Callable
from dataclasses import replace

import torch

from benchmarks import ROOT
from benchmarks.timing import print_row, print_table, print_title, ratios, spread, take_turns
from benchmarks.trainer import join
from ds_tokimg.diffusion.levels import NoiseLevels, SamplingPath
from ds_tokimg.engine.engine import TrainEngine, machine_capabilities
from ds_tokimg.inference.loading import load_trained
from ds_tokimg.settings import engine_json
from ds_tokimg.settings.command_line import train_config
from ds_tokimg.training import automatic, budget
from ds_tokimg.training.assemble import assemble
from ds_tokimg.training.bound import BoundOptions, bound_of
from ds_tokimg.training.loop import Run
from ds_tokimg.training.objective import TrainingLoss
from ds_tokimg.training.validation import ValidationBatches

LEVELS = (1, 2, 4, 8)
STEPS = 10  # training steps a turn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", required=True, help="of the default recipe on the bundled corpus")
    parser.add_argument("--repetitions", type=int, default=3)
    args = parser.parse_args()
    dist = join()
    print_title("What a validation costs, and what its budget is best spent on")
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--data_path", str(ROOT / "data" / "web_narrative.txt"), "--output_dir", folder]
        run = run_of([*flags, "--init_from", args.checkpoint], dist)
        print_costs(run, args.repetitions)
        print_share(run, args.repetitions)
        print_errors(run, args.checkpoint)


def run_of(flags: list[str], dist) -> Run:
    """A run as `train` puts it together, before its first step."""
    config = train_config(flags)
    parts = assemble(config, dist, None)
    raw = engine_json.read(engine_json.SHIPPED) | {"tensorboard": {"enabled": False}}
    config, _ = automatic.decide(config, raw, len(parts.train_set), 1)
    settings, _ = engine_json.resolve(raw, config, machine_capabilities(), parts.steps_per_epoch)
    config, _ = budget.decide(replace(config, train_batch_size=settings["train_batch_size"]), parts)
    return Run(config, settings, parts, TrainEngine(parts.module, settings, config.ema_decay, dist), {})


def trainer(run: Run) -> Callable[[], None]:
    """STEPS training steps a call."""
    loader = run.loader()
    batches = loader.batches(0, run.schedule_steps)

    def train() -> None:
        for _ in range(STEPS):
            run.engine.train_batch(next(batches).micro_batches)

    return train


def print_costs(run: Run, repetitions: int) -> None:
    """Seconds a token, each as a share of its training."""
    parts = run.parts
    layout, module = parts.layout, parts.module
    path = SamplingPath(NoiseLevels.of(layout.codec.radix), module.model.writing)
    batches = ValidationBatches(run.validations.texts(0), layout, path)
    indices = batches.of_rank(0, 1, BoundOptions().patches_per_batch)[0]
    tokens = int(batches.text_tokens[indices].sum())
    trained = STEPS * budget.tokens_per_step(run.config, parts)
    log_snr, _ = path.quantile(batches.offsets(indices))

    def forward(batch) -> Callable[[], object]:
        return torch.no_grad()(lambda: run.engine.engine(batch, per_patch=True, with_mean=True))

    rivals: dict[str, Callable[[], object]] = {
        "training": trainer(run),
        "a noise level": forward(batches.make(indices, log_snr, 0)),
        "drawing in turn": forward(batches.drawn(indices, 1)),
    }
    seconds = take_turns(rivals, repetitions)
    each = {name: [s / (trained if name == "training" else tokens) for s in values] for name, values in seconds.items()}
    print_table("a token of", "ms", "beside training", "in training/budget.py")
    used = {"training": 1.0, "a noise level": budget.LEVEL_COST, "drawing in turn": budget.DRAWN_COST}
    for name, values in each.items():
        print_row(name, spread([1e3 * v for v in values], 3), spread(ratios(values, each["training"])), used[name])
    print()


def print_share(run: Run, repetitions: int) -> None:
    """Time of a run's validations beside that of its steps, with the budget and without one."""
    sampled = run.validations
    whole = budget.Validations(replace(run.config, eval_tokens=0), run.parts)

    def validate(validations: budget.Validations, step: int) -> Callable[[], None]:
        def rival() -> None:
            run.validations = validations
            run.engine.engine.global_steps = step
            run.validate()

        return rival

    last = run.schedule_steps
    rivals = {"steps": trainer(run), "way": validate(sampled, 1), "end": validate(sampled, last)}
    seconds = take_turns(rivals | {"all": validate(whole, last)}, repetitions, warm_up=0)
    step = [s / STEPS for s in seconds["steps"]]
    times = -(-last // run.config.eval_interval)
    cost = {
        "all texts, 8 levels each time": [times * s for s in seconds["all"]],
        f"the budget: {sampled.count} texts, {sampled.levels} level(s); at the end {len(sampled.texts(last))} texts": [
            (times - 1) * way + end for way, end in zip(seconds["way"], seconds["end"], strict=True)
        ],
    }
    print(f"{last:,} steps, {times} validations.\n")
    print_table("a validation reads", "time of all validations / time of all steps")
    for name, values in cost.items():
        print_row(name, spread(ratios(values, [last * s for s in step]), 3))
    print()


def print_errors(run: Run, checkpoint: str) -> None:
    """The standard error for the same time, by noise levels a text."""
    trained = load_trained(checkpoint)
    module = TrainingLoss(trained.model, trained.format.objective, trained.format.timesteps)
    texts, writing = run.parts.eval_set, trained.model.writing
    radix, used = trained.model.codec.radix, float(run.config.eval_tokens or 0)
    print_table("noise levels", "texts for the same time", "bits/token of all", "deviation of a text", "standard error")
    for levels in LEVELS:
        bound = bound_of(module, trained.format, texts, options=BoundOptions(levels))
        price = budget.token_cost(writing, radix, levels) / budget.token_cost(writing, radix)
        affordable = used / price / (texts.num_tokens / len(texts))
        deviation = bound.standard_error * math.sqrt(len(texts))
        error = deviation / math.sqrt(affordable)
        print_row(levels, f"{affordable:.1f}", f"{bound.bits_per_token:.4f}", f"{deviation:.3f}", f"{error:.4f}")


if __name__ == "__main__":
    main()
