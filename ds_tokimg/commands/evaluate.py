"""python -m ds_tokimg evaluate: the bound of a checkpoint on texts, in bits per token and per byte."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ds_tokimg.commands.flags import parser_with_model
from ds_tokimg.commands.output import write_json
from ds_tokimg.errors import UserError
from ds_tokimg.settings.command_line import path

if TYPE_CHECKING:
    from ds_tokimg.data.dataset import TokenImageDataset
    from ds_tokimg.inference.loading import TrainedModel
    from ds_tokimg.training.bound import Bound

SPLITS = ("auto", "eval", "train", "all")


def main(argv: list[str]) -> int:
    arguments = _parser().parse_args(argv)
    if arguments.noise_levels is not None and arguments.noise_levels < 1:
        raise UserError(f"--noise_levels {arguments.noise_levels}: at least 1")
    from ds_tokimg.inference.loading import load_trained
    from ds_tokimg.training.bound import DEFAULT_LEVELS, BoundOptions, bound_of
    from ds_tokimg.training.objective import TrainingLoss

    trained = load_trained(arguments.checkpoint, arguments.weights, arguments.device)
    try:
        writing = trained.model.writing.asked(arguments.block_size, arguments.many_steps)
    except ValueError as error:
        raise UserError(f"--block_size {arguments.block_size}: {error}") from None
    dataset = open_texts(trained, arguments.data_path, arguments.split, arguments.cache_dir)
    if not len(dataset):
        raise UserError("no text to evaluate: the held-out part is empty (give --split all, or another --data_path)")
    module = TrainingLoss(trained.model, trained.format.objective, trained.format.timesteps)
    levels = arguments.noise_levels or DEFAULT_LEVELS
    options = BoundOptions(num_levels=levels, seed=arguments.seed, device=trained.device)
    bound = bound_of(module, trained.format, dataset, writing, options=options)
    for note in dataset.notes:
        print(f"note: {note}")
    report(bound, trained.path, " ".join(arguments.data_path))
    if arguments.json:
        write_json(arguments.json, as_json(bound))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = parser_with_model("evaluate", __doc__, "a checkpoint, a run's folder (its best one) or an export")
    add = parser.add_argument
    add("--data_path", type=path, nargs="+", required=True, metavar="PATH", help="texts, in any form that train takes")
    add("--json", type=path, metavar="FILE", help="write the figures there")
    add(
        "--split",
        choices=SPLITS,
        default="auto",
        help="which documents; auto: the held-out ones of the data the run was trained on, else all",
    )
    add("--noise_levels", type=int, metavar="N", help="levels per text (default: as in the validation in training)")
    add(
        "--block_size",
        type=int,
        metavar="N",
        help="patches that lose their noise together, from left to right; 0: the whole image (default: as trained)",
    )
    add(
        "--many_steps",
        action="store_true",
        help="the bound of sampling in many small steps to the end, also where generate draws tokens earlier",
    )
    add("--seed", type=int, default=0, help="of the noise (default: 0, that of the validation in training)")
    add("--cache_dir", type=path, metavar="DIR", help="where tokenised data is cached")
    return parser


def open_texts(trained: TrainedModel, data_path, split: str = "auto", cache_dir=None) -> TokenImageDataset:
    """The texts of a path, or of several, as the model's images."""
    from ds_tokimg.data.text_format import dataset_of

    data_path = [data_path] if isinstance(data_path, str | Path) else list(data_path)
    text_format = trained.format
    if split == "auto":
        # Held out by their own words, so that some of a run's paths hold the same ones as all of them.
        trained_on = text_format.was_trained_on([str(path) for path in data_path])
        split = "eval" if trained_on and text_format.eval_data_path is None else "all"
    return dataset_of(text_format, trained.layout, trained.tokenizer, data_path, split, cache_dir)


def as_json(bound: Bound) -> dict:
    """The figures of the contract, and what puts them into perspective."""
    return {
        "bits_per_token": bound.bits_per_token,
        "bits_per_byte": bound.bits_per_byte,
        "standard_error": bound.standard_error,
        "tokens": int(bound.tokens.sum()),
        "bytes": bound.num_bytes,
        "loss": bound.loss,
        "token_accuracy": bound.token_accuracy,
        "token_accuracy_by_timestep": bound.accuracy_per_level,
        "invalid_token_rate": bound.invalid_token_rate,
    }


def report(bound: Bound, checkpoint: Path, data_path: str) -> None:
    print(f"{checkpoint} on {data_path}: {len(bound.tokens)} images, {bound.tokens.sum():,} tokens")
    print(
        f"  bits per token {bound.bits_per_token:.4f} +- {1.96 * bound.standard_error:.4f} (95 %)   "
        f"bits per byte {bound.bits_per_byte:.4f}"
    )
    print(
        f"  loss {bound.loss:.4f}   token accuracy {bound.token_accuracy:.3f}   "
        f"colours that are no token {bound.invalid_token_rate:.2%}"
    )
