"""python -m ds_tokimg preview: the data as they will be trained.

Takes every flag of `train`. Reads and tokenises the data as the run would, and prints texts, tokens, lengths, how full
the images are, what is cut or left out, and how much noise the tokens' code stands; `--save_images` draws some images.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ds_tokimg.commands.output import check_outputs, say_written, write_json
from ds_tokimg.console import starting
from ds_tokimg.errors import UserError
from ds_tokimg.settings import engine_json
from ds_tokimg.settings.command_line import Parser, build_parser, parse, path
from ds_tokimg.settings.unused import unused_flags

if TYPE_CHECKING:
    from ds_tokimg.training.assemble import Parts

BAR, SHOWN = 40, 200  # characters of the longest bar, and of a text that is shown


def main(argv: list[str]) -> int:
    config, arguments = parse(_parser(argv), argv)
    if config.resume is not None:
        raise UserError("preview shows the data of a run from its first step: leave --resume out")
    if arguments.num_texts < 0:
        raise UserError(f"--num_texts {arguments.num_texts}: at least 0")
    check_outputs(arguments.json, arguments.save_images)
    raw = engine_json.read(config.deepspeed_config)
    if not arguments.save_images:  # learning colours takes time, and nobody would see them
        config = dataclasses.replace(config, palette="id")
    with starting():
        from ds_tokimg.training.survey import survey

    report, parts = survey(config, raw, arguments.num_texts)
    report["notes"] = [*unused_flags(config, argv), *report["notes"]]
    if arguments.save_images and not arguments.num_texts:
        report["notes"].insert(0, "--save_images has no effect: --num_texts 0 shows no image")
    print(as_text(report))
    if arguments.save_images:
        _save_images(parts, arguments.num_texts, Path(arguments.save_images))
    if arguments.json:
        write_json(arguments.json, report)
    return 0


def _parser(argv: Sequence[str] = ()) -> Parser:
    parser = build_parser("preview", "Show the data as they will be trained.", argv)
    group = parser.add_argument_group("preview")
    group.add_argument("--num_texts", type=int, default=3, metavar="N", help="images to show (default: %(default)s)")
    group.add_argument("--save_images", type=path, metavar="DIR", help="write pictures of these images there, as PNG")
    group.add_argument("--json", type=path, metavar="FILE", help="write the figures and the texts there")
    return parser


def _save_images(parts: Parts, count: int, folder: Path) -> None:
    from ds_tokimg.training.survey import pictures

    try:
        folder.mkdir(parents=True, exist_ok=True)
        for number, picture in enumerate(pictures(parts, count)):
            picture.save(folder / f"image_{number:04d}.png")
    except OSError as error:
        raise UserError(f"--save_images {folder} cannot be written: {error.strerror or error}") from None
    if count:
        say_written(f"{folder}, pictures of {count} image(s)")


def as_text(report: dict) -> str:
    """The report as a person reads it."""
    texts, tokens, images = report["texts"], report["tokens"], report["images"]
    prompts = f", {texts['with_prompts']:,} with a prompt of its own" if texts["with_prompts"] else ""
    lines = [
        f"recipe      {report['recipe']}",
        f"texts       {texts['train']:,} to train on, {texts['held_out']:,} held out{prompts}; "
        f"{texts['bytes']:,} bytes",
        f"tokens      {tokens['train']:,}, of {tokens['vocab_size']:,} ids {tokens['ids_in_use']:,} occur; "
        f"{tokens['unigram_entropy']:.2f} bits a token by frequency alone",
        f"a token     {tokens['characters_per_token']:.2f} characters, {tokens['bytes_per_token']:.2f} bytes",
        f"images      {images['train']:,} to train on, {images['held_out']:,} held out; {images['img_size']} x "
        f"{images['img_size']} pixels hold {images['capacity']:,} tokens",
        f"an image    {images['tokens_per_image']:.1f} tokens: {images['max_tokens_used']:.1%} of max_tokens "
        f"({images['max_tokens']:,}), {images['capacity_used']:.1%} of its capacity",
        f"padding     {images['padding_fraction']:.1%} of the computed token places",
        "",
        f"tokens a text (median {texts['median_tokens']:,.0f}, longest {texts['longest_tokens']:,})",
        *_bars(report["lengths"]),
        "",
        *_noise_lines(report["noise"]),
    ]
    for number, sample in enumerate(report["samples"]):
        title = f"[{number}] {sample['num_tokens']:,} tokens" + (" that answer" if sample["prompt"] else "")
        parts = [f"  {_shortened(part)}" for part in (sample["prompt"], sample["text"]) if part is not None]
        lines += ["", title, *parts]
    if report["notes"]:
        lines += ["", *(f"note: {note}" for note in report["notes"])]
    return "\n".join(lines)


def _bars(lengths: list[dict]) -> list[str]:
    most = max(row["texts"] for row in lengths)
    lines = []
    for row in lengths:
        bar = "#" * -(-BAR * row["texts"] // most)
        lines.append(f"{row['from']:>10,} - {row['to']:<10,}{row['texts']:>10,} {bar}".rstrip())
    return lines


def _noise_lines(noise: dict) -> list[str]:
    """How much noise the code stands."""
    values = f"{noise['values_per_token']} values of {noise['levels']} levels a token"
    lines = [f"noise at which a reader without context still reads a share of the tokens ({values})"]
    for share, t in noise["read"].items():
        at = "never fewer, by chance" if t is None else f"{t / 10:.2f} % noise"
        lines.append(f"{float(share):>10.0%} {at}")
    low, high = (t / 10 for t in noise["band"])
    return [*lines, f"context helps between {low:.2f} % and {high:.2f} % noise: what training is about"]


def _shortened(text: str) -> str:
    text = text.replace("\n", "\\n")
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."
