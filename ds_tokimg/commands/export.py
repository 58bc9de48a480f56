"""python -m ds_tokimg export: a checkpoint as a folder that needs neither DeepSpeed nor the run.

`JiT.from_pretrained(folder)` and `AutoTokenizer.from_pretrained(folder / "tokenizer")` read it; so do `evaluate`,
`generate` and `train --init_from`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ds_tokimg.commands.flags import parser_with_model
from ds_tokimg.console import starting
from ds_tokimg.settings.command_line import path
from ds_tokimg.settings.files import check_folder


def main(argv: list[str]) -> int:
    arguments = _parser().parse_args(argv)
    output = Path(arguments.output)
    check_folder("--output", output, empty=True)
    with starting():
        from ds_tokimg.inference.export import export
        from ds_tokimg.inference.loading import load_trained

        trained = load_trained(arguments.checkpoint, arguments.weights)
    export(trained, output)
    size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file()) / 1e6
    print(f"exported {trained.path} ({arguments.weights} weights) to {output}: {size:.1f} MB")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = parser_with_model("export", __doc__, "a checkpoint, or a run's folder (its best one)", device=False)
    add = parser.add_argument
    add("--output", type=path, required=True, metavar="DIR", help="a new folder")
    return parser
