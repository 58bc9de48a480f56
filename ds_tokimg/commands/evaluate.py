"""python -m ds_tokimg evaluate: the bound of a checkpoint on texts, in bits per token and per byte."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ds_tokimg.commands.flags import parser_with_model
from ds_tokimg.commands.output import check_outputs, write_json
from ds_tokimg.console import starting
from ds_tokimg.errors import UserError, raise_problems
from ds_tokimg.settings.command_line import path

if TYPE_CHECKING:
    from ds_tokimg.data.dataset import TokenImageDataset
    from ds_tokimg.data.run_texts import RunTexts
    from ds_tokimg.inference.loading import TrainedModel
    from ds_tokimg.training.bound import Bound

SPLITS = ("auto", "eval", "train", "all")


def main(argv: list[str]) -> int:
    arguments = _parser().parse_args(argv)
    _check_numbers(arguments)
    check_outputs(arguments.json)
    with starting():
        from ds_tokimg.inference.loading import load_trained
        from ds_tokimg.training.bound import DEFAULT_LEVELS, BoundOptions, bound_of
        from ds_tokimg.training.objective import TrainingLoss

        trained = load_trained(arguments.checkpoint, arguments.weights, arguments.device)
    try:
        writing = trained.model.writing.asked(arguments.block_size, arguments.many_steps)
    except ValueError as error:
        raise UserError(f"--block_size {arguments.block_size}: {error}") from None
    dataset, measured = open_texts(trained, arguments.data_path, arguments.split, arguments.cache_dir)
    if not len(dataset):
        raise UserError("no text to evaluate: the held-out part is empty (give --split all, or another --data_path)")
    module = TrainingLoss(trained.model, trained.format.objective, trained.format.timesteps)
    levels = arguments.noise_levels or DEFAULT_LEVELS
    options = BoundOptions(num_levels=levels, seed=arguments.seed, device=trained.device, shown="evaluating")
    bound = bound_of(module, trained.format, dataset, writing, options=options)
    for note in [*_without_effect(arguments, trained), *dataset.notes]:
        print(f"note: {note}")
    print(measured.sentence())
    report(bound, trained.path, " ".join(arguments.data_path))
    if arguments.json:
        write_json(arguments.json, as_json(bound) | dataclasses.asdict(measured))
    return 0


def _check_numbers(arguments: argparse.Namespace) -> None:
    """One UserError for all numbers that no model can be measured with."""
    least = {"noise_levels": 1, "block_size": 0}
    given = {name: getattr(arguments, name) for name in least}
    raise_problems(
        "these cannot be used:",
        [
            f"--{name} {value}: at least {least[name]}"
            for name, value in given.items()
            if value is not None and value < least[name]
        ],
    )


def _without_effect(arguments: argparse.Namespace, trained: TrainedModel) -> list[str]:
    """Flags that change nothing of this model."""
    own, notes = trained.model.writing, []
    if arguments.many_steps and own.asked(arguments.block_size) == own.asked(arguments.block_size, many_steps=True):
        notes.append("--many_steps has no effect: texts of this model are written in many small steps anyway")
    if arguments.noise_levels is not None and own.asked(arguments.block_size, arguments.many_steps).one_step:
        notes.append("--noise_levels has no effect on the bits, which are of one step, but on loss and accuracy")
    if arguments.weights == "trained" and not (trained.path / "manifest.json").is_file():
        notes.append("--weights trained has no effect: an export holds one set of weights")
    return notes


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


@dataclass(frozen=True)
class Measured:
    """On which texts a model was measured.

    split: train, eval or all. texts: how many. texts_of: how many there are, in all splits.
    texts_in_training: how many of them the model was trained on, None where that is not known. exact: whether that
        is counted, not estimated.
    """

    split: str
    texts: int
    texts_of: int
    texts_in_training: int | None
    exact: bool

    def sentence(self) -> str:
        """What was measured on, in one line."""
        which = {"all": "all", "eval": "the held-out", "train": "the training"}[self.split]
        line = f"measured on {which} texts: {self.texts:,} of {self.texts_of:,}; "
        if self.texts_in_training is None:
            return line + "whether they were in training is not known of this model"
        if not self.texts_in_training:
            return line + ("" if self.exact else "as far as can be told, ") + "none of them was in training"
        about = "" if self.exact else "about "
        return f"{line}{about}{self.texts_in_training:,} of them WERE IN TRAINING: new text costs more than this"


def open_texts(
    trained: TrainedModel, data_path, split: str = "auto", cache_dir=None
) -> tuple[TokenImageDataset, Measured]:
    """The texts of a path, or of several, as the model's images, and which texts these are.

    `auto`: where some of the texts were in training, those that were held out; else all. They are known by their
    content, wherever they lie. Of a model of a streamed run the texts are a sample, and nothing is cached.
    """
    from ds_tokimg.data.run_texts import RunTexts, file_of
    from ds_tokimg.data.stream import Sampled
    from ds_tokimg.data.text_format import dataset_of

    data_path = [data_path] if isinstance(data_path, str | Path) else list(data_path)
    how = {"load": Sampled()} if trained.format.streaming else {"cache_dir": cache_dir}
    open_split = partial(dataset_of, trained.format, trained.layout, trained.tokenizer, data_path, **how)
    texts, whole = RunTexts.load(file_of(trained.path)), open_split(split="all")
    if split == "auto":
        split = "eval" if _holds_training_texts(trained, texts, whole, data_path) else "all"
    dataset = whole if split == "all" else open_split(split=split)
    hashes = dataset.hashes
    count = None if texts is None else texts.count_in_training(hashes)
    of = whole.num_documents + (dataset.num_documents if split == "eval" and dataset.own.any() else 0)
    return dataset, Measured(split, dataset.num_documents, of, count, texts is None or texts.known.counts(hashes))


def _holds_training_texts(trained: TrainedModel, texts: RunTexts | None, whole: TokenImageDataset, data_path) -> bool:
    """Whether some of the texts were in training and others were held out of it. By the path where the run does not
    say more: of a run's paths some hold the same held-out texts as all of them."""
    if trained.format.eval_data_path is not None:
        return False
    if texts is None:
        return trained.format.was_trained_on([str(path) for path in data_path])
    return texts.known.count(whole.hashes) > 0


def as_json(bound: Bound) -> dict:
    """The figures of the contract, and what puts them into perspective."""
    return {
        "bits_per_token": bound.bits_per_token,
        "bits_per_byte": None if bound.loses_text else bound.bits_per_byte,
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
    per_byte = "not given: the tokenizer loses text" if bound.loses_text else f"{bound.bits_per_byte:.4f}"
    print(
        f"  bits per token {bound.bits_per_token:.4f} +- {1.96 * bound.standard_error:.4f} (95 %)   "
        f"bits per byte {per_byte}"
    )
    print(
        f"  loss {bound.loss:.4f}   token accuracy {bound.token_accuracy:.3f}   "
        f"colours that are no token {bound.invalid_token_rate:.2%}"
    )
