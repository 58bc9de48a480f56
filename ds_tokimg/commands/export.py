"""python -m ds_tokimg export: a checkpoint as a folder that needs neither DeepSpeed nor the run.

`JiT.from_pretrained(folder)` and `AutoTokenizer.from_pretrained(folder / "tokenizer")` read it; so do `evaluate`,
`generate` and `train --init_from`. Its README.md is a model card, and no file in it tells where the run or
its texts lay.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from ds_tokimg.commands.flags import parser_with_model
from ds_tokimg.errors import UserError
from ds_tokimg.settings.command_line import path

_LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]*")


def main(argv: list[str]) -> int:
    arguments = _parser().parse_args(argv)
    output = Path(arguments.output)
    if output.exists() and any(output.iterdir() if output.is_dir() else [output]):
        raise UserError(f"--output {output} exists and is not empty: choose another folder")
    if arguments.license is not None and not _LICENSE.fullmatch(arguments.license):
        raise UserError(f"--license {arguments.license!r}: expected a name as on the hub, such as mit or cc-by-4.0")
    from ds_tokimg.inference.export import export, origin_of, push_to_hub
    from ds_tokimg.inference.loading import load_trained

    trained = load_trained(arguments.checkpoint, arguments.weights)
    origin = origin_of(trained.path, arguments.weights)
    name = arguments.push_to_hub or output.resolve().name
    try:
        export(trained, output, origin, name, arguments.license)
    except OSError as error:
        raise UserError(f"--output {output} cannot be written: {error.strerror}") from None
    size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file()) / 1e6
    print(f"exported {trained.path} ({arguments.weights} weights) to {output}: {size:.1f} MB")
    if arguments.license is None:
        print(f"note: its licence is not filled in: give --license, or edit {output / 'README.md'}")
    if arguments.push_to_hub:
        print(f"pushed to {push_to_hub(output, arguments.push_to_hub)}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = parser_with_model("export", __doc__, "a checkpoint, or a run's folder (its best one)", device=False)
    add = parser.add_argument
    add("--output", type=path, required=True, metavar="DIR", help="a new folder")
    add("--license", metavar="NAME", help="for the model card, as the Hugging Face hub names it: mit, cc-by-4.0, …")
    add(
        "--push_to_hub",
        type=path,
        metavar="NAME",
        help="also upload it to the hub, as owner/name, with the login of `hf auth login`; a new repository is private",
    )
    return parser
