"""python -m ds_tokimg generate: texts from noise, from a prompt, or around given tokens."""

from __future__ import annotations

import argparse
from pathlib import Path

from ds_tokimg.choices import SAMPLERS
from ds_tokimg.commands.flags import parser_with_model
from ds_tokimg.commands.output import check_outputs, write_json
from ds_tokimg.console import Work, starting
from ds_tokimg.errors import UserError
from ds_tokimg.inference.options import MAX_STEPS, STEPS_PER_TOKEN, SamplingOptions
from ds_tokimg.settings.command_line import path


def main(argv: list[str]) -> int:
    arguments = _parser().parse_args(argv)
    prompts, options = _prompts(arguments), _options(arguments)
    check_outputs(arguments.json, arguments.save_images)
    with starting():
        from ds_tokimg.inference.loading import load_trained
        from ds_tokimg.inference.texts import generate, infill, save_images, show
        from ds_tokimg.inference.watching import Watcher

        trained = load_trained(arguments.checkpoint, arguments.weights, arguments.device)
    watcher = Watcher(trained.model, trained.format.eos_id) if arguments.animate else None
    with Work("writing"):
        if arguments.infill is not None:
            texts = infill(trained, arguments.infill, options, arguments.num_samples, watcher)
        else:
            texts = generate(trained, prompts, options, arguments.max_new_tokens, watcher)
    show(texts)
    if watcher is not None:
        watcher.save(Path(arguments.animate), trained.tokenizer)
    if arguments.save_images:
        save_images(trained, texts, Path(arguments.save_images))
    if arguments.json:
        keys = ("prompt", "text", "token_ids", "num_tokens")
        rows = [{key: text[key] for key in keys} for text in texts]
        write_json(arguments.json, rows)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = parser_with_model("generate", __doc__, "a checkpoint, a run's folder (its best one) or an export")
    add = parser.add_argument
    defaults = SamplingOptions()
    add("--prompt", metavar="TEXT", help="what to answer, or, without conditions in training, to continue")
    add("--prompt_file", type=path, metavar="FILE", help="one prompt a line")
    add("--infill", metavar="TEXT", help="fill gaps of N tokens, written <gap:N>; all else stays as it is")
    add("--num_samples", type=int, default=1, metavar="N", help="texts, per prompt (default: 1)")
    add(
        "--num_inference_steps",
        type=int,
        metavar="N",
        help=f"network evaluations, of every block (default: {MAX_STEPS}, or {STEPS_PER_TOKEN} a token of a block; "
        "1 where that is exact)",
    )
    add("--sampler", choices=SAMPLERS, default=defaults.sampler, help="default: %(default)s")
    add(
        "--eta",
        type=float,
        default=defaults.eta,
        metavar="X",
        help="noise that ancestral replaces (default: %(default)s)",
    )
    add(
        "--block_size",
        type=int,
        metavar="N",
        help="patches written together, from left to right; 0: the whole image (default: as trained)",
    )
    add("--guidance_scale", type=float, default=defaults.guidance_scale, metavar="S", help="default: %(default)s")
    add("--seed", type=int, default=defaults.seed, metavar="N", help="default: %(default)s")
    add("--max_new_tokens", type=int, metavar="N", help="length to write at most (default: the image, or the answer)")
    add("--batch_size", type=int, default=defaults.batch_size, metavar="N", help="texts at a time")
    add("--save_images", type=path, metavar="DIR", help="write the images there, as PNG")
    add("--animate", type=path, metavar="FILE.gif", help="show how the first text comes out of noise; FILE.png: stages")
    add("--json", type=path, metavar="FILE", help="write the texts there")
    return parser


def _prompts(arguments) -> list[str | None]:
    if arguments.prompt is not None and arguments.prompt_file is not None:
        raise UserError("give --prompt or --prompt_file, not both")
    if arguments.infill is not None and (arguments.prompt or arguments.prompt_file or arguments.max_new_tokens):
        raise UserError("--infill takes its length from its text, and no --prompt, --prompt_file or --max_new_tokens")
    if arguments.animate is not None:
        _check_animation(Path(arguments.animate))
    if arguments.num_samples < 1:
        raise UserError(f"--num_samples {arguments.num_samples}: at least 1")
    prompts = [arguments.prompt]
    if arguments.prompt_file is not None:
        prompts = _read_prompts(arguments.prompt_file)
    return [prompt for prompt in prompts for _ in range(arguments.num_samples)]


def _check_animation(file: Path) -> None:
    """Before anything is written: a text must not be lost because its picture cannot be kept."""
    if file.suffix.lower() != ".gif":
        raise UserError(f"--animate {file}: the file's name must end with .gif")
    if not file.parent.is_dir():
        raise UserError(f"--animate {file}: there is no folder {file.parent}")


def _read_prompts(path: str) -> list[str]:
    """One prompt a line of a UTF-8 file. Lines end in \\n or \\r\\n alone: whatever else breaks lines on a screen is
    part of a prompt. Raises UserError for a file that cannot be read or holds none."""
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompt_file {path}: {error}") from None
    if not text:
        raise UserError(f"--prompt_file {path}: no prompt in it")
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]


def _options(arguments) -> SamplingOptions:
    try:
        return SamplingOptions(
            steps=arguments.num_inference_steps,
            sampler=arguments.sampler,
            block_size=arguments.block_size,
            guidance_scale=arguments.guidance_scale,
            seed=arguments.seed,
            batch_size=arguments.batch_size,
            eta=arguments.eta,
        )
    except ValueError as error:
        raise UserError(str(error)) from None
