"""python -m ds_tokimg chat: a model that was trained on prompts and answers, in the terminal.

Every line is a prompt and is answered by itself, in the tokenizer's chat template where the run used it. An empty line,
Ctrl-D or Ctrl-C ends it; lines may also come from a pipe.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ds_tokimg.commands.flags import parser_with_model
from ds_tokimg.console import starting
from ds_tokimg.errors import UserError
from ds_tokimg.inference.options import SamplingOptions

if TYPE_CHECKING:
    from ds_tokimg.inference.loading import TrainedModel


def main(argv: list[str]) -> int:
    arguments = _parser().parse_args(argv)
    options = _options(arguments)
    with starting():
        from ds_tokimg.inference.loading import load_trained

        trained = load_trained(arguments.checkpoint, arguments.weights, arguments.device)
    if not trained.format.enable_condition:
        raise UserError(
            f"{arguments.checkpoint} was trained without --enable_condition: it continues texts and answers nothing; "
            f"use ds-tokimg generate --checkpoint {arguments.checkpoint} --prompt TEXT"
        )
    at_terminal = sys.stdin.isatty()
    if at_terminal:
        print("Every line is answered by itself; an empty one ends.")
    try:
        for number, line in enumerate(_lines("> " if at_terminal else "")):
            # Who asks twice gets another answer.
            _answer(trained, line, dataclasses.replace(options, seed=options.seed + number), arguments.max_new_tokens)
    except KeyboardInterrupt:
        print()
    return 0


def _parser() -> argparse.ArgumentParser:
    trained = "a checkpoint, a run's folder (its best one) or an export, trained with --enable_condition"
    parser = parser_with_model("chat", __doc__, trained)
    add = parser.add_argument
    add("--max_new_tokens", type=int, metavar="N", help="length of an answer at most (default: as in training)")
    add("--num_inference_steps", type=int, metavar="N", help="network evaluations, of every block (as in generate)")
    add("--guidance_scale", type=float, default=1.0, metavar="S", help="above 1 exaggerates the prompt (default: 1)")
    add("--seed", type=int, default=0, metavar="N", help="of the first answer, one more each (default: 0)")
    return parser


def _options(arguments: argparse.Namespace) -> SamplingOptions:
    if arguments.max_new_tokens is not None and arguments.max_new_tokens < 1:
        raise UserError(f"--max_new_tokens {arguments.max_new_tokens}: at least 1")
    try:
        return SamplingOptions(
            steps=arguments.num_inference_steps, guidance_scale=arguments.guidance_scale, seed=arguments.seed
        )
    except ValueError as error:
        raise UserError(str(error)) from None


def _lines(invitation: str) -> Iterator[str]:
    """What is typed, up to an empty line or the end of the input."""
    with contextlib.suppress(ImportError):  # where there is one, lines can be edited and called back
        import readline  # noqa: F401
    while True:
        try:
            line = input(invitation)
            line.encode()
        except EOFError:
            if invitation:
                print()
            return
        except UnicodeError:
            raise UserError("a line is not UTF-8: chat reads text") from None
        if not line.strip():
            return
        yield line


def _answer(trained: TrainedModel, line: str, options: SamplingOptions, max_new_tokens: int | None) -> None:
    """Prints the answer while it is written."""
    from ds_tokimg.inference.texts import stream

    for piece in stream(trained, line, options, max_new_tokens):
        print(piece, end="", flush=True)
    print(flush=True)
