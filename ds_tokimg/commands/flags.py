"""Flags that commands share."""

from __future__ import annotations

from ds_tokimg.choices import WEIGHTS
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
