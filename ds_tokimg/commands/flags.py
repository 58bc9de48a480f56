"""Flags that commands share."""

from __future__ import annotations

import argparse
from pathlib import Path

from ds_tokimg.choices import WEIGHTS
from ds_tokimg.errors import UserError
from ds_tokimg.inference.options import SamplingOptions
from ds_tokimg.settings import formats
from ds_tokimg.settings.command_line import Parser, path


def parser_with_model(command: str, description: str | None, model: str, device: bool = True) -> Parser:
    """A parser of the flags that name a trained model: --checkpoint (`model` says which are taken), --weights and
    --device."""
    parser = Parser(prog=f"ds-tokimg {command}", description=description, allow_abbrev=False)
    add = parser.add_argument
    add("--checkpoint", type=path, required=True, metavar="DIR", help=model)
    add("--weights", choices=WEIGHTS, default="ema", help="averaged weights, or those of the last step (default: ema)")
    if device:
        where = "where to compute (default: an accelerator if there is one, else cpu)"
        add("--device", default="auto", metavar="NAME", help=where)
    return parser


def add_draws(parser: Parser) -> None:
    """The flags of `generate` and `chat` that say what is drawn and where a text ends."""
    add = parser.add_argument
    add("--temperature", type=float, default=1.0, metavar="X", help="below 1 likelier tokens, 0 the likeliest one")
    add("--top_k", type=int, metavar="N", help="draw from the N likeliest tokens alone (default: all)")
    add("--top_p", type=float, default=1.0, metavar="P", help="from the fewest that are P likely together (default: 1)")
    add("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given several times")


def sampling_options(arguments: argparse.Namespace, **more) -> SamplingOptions:
    """Of `add_draws`, of the flags that generate and chat share, and `more`. Raises UserError for what cannot be."""
    try:
        return SamplingOptions(
            steps=arguments.num_inference_steps,
            guidance_scale=arguments.guidance_scale,
            seed=arguments.seed,
            temperature=arguments.temperature,
            top_k=arguments.top_k,
            top_p=arguments.top_p,
            max_new_tokens=arguments.max_new_tokens,
            stop=tuple(arguments.stop),
            **more,
        )
    except ValueError as error:
        raise UserError("\n".join(f"--{problem}" for problem in str(error).split("\n"))) from None


def answers_prompts(checkpoint: str) -> bool | None:
    """Whether a model was trained with conditions, by a small file of it: torch takes seconds to import, weights more.
    None where the folder does not say; loading it tells what is wrong."""
    for name in (formats.TEXT, formats.CONFIG):  # of a checkpoint or an export; of a run
        file = Path(checkpoint) / name
        if file.is_file():
            try:
                value = formats.read_object(file).get("enable_condition")
            except UserError:
                return None
            return value if isinstance(value, bool) else None
    return None
