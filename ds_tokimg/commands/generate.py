"""python -m ds_tokimg generate: texts from noise, from a prompt, or around given tokens."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ds_tokimg.choices import SAMPLERS
from ds_tokimg.commands.flags import add_draws, answers_prompts, parser_with_model, sampling_options
from ds_tokimg.commands.output import check_outputs, say_written, write_json
from ds_tokimg.console import Work, starting
from ds_tokimg.errors import UserError
from ds_tokimg.inference.options import MAX_STEPS, STEPS_PER_TOKEN, SamplingOptions, guidance_problem
from ds_tokimg.settings.command_line import path
from ds_tokimg.settings.files import check_file

if TYPE_CHECKING:
    from ds_tokimg.inference.loading import TrainedModel

# Of a text, what goes into the file of --json.
KEYS = ("prompt", "text", "token_ids", "num_tokens", "finish_reason", "stop_reason")


def main(argv: list[str]) -> int:
    arguments = _parser().parse_args(argv)
    _check_together(arguments)
    prompts, options = _prompts(arguments), _options(arguments)
    _check_files(arguments)
    has_prompt = arguments.infill is not None or any(prompts)
    answers = answers_prompts(arguments.checkpoint)
    problem = None if answers is None else guidance_problem(options.guidance_scale, answers, has_prompt)
    if problem is not None:
        raise UserError(problem)
    with starting():
        from ds_tokimg.inference import fitness
        from ds_tokimg.inference.loading import load_trained

        trained = load_trained(arguments.checkpoint, arguments.weights, arguments.device)
    fitness.check(trained, options, has_prompt, ["eta"] if arguments.eta is not None else [])
    _say_of_weights(trained, arguments.weights)
    begun = time.perf_counter()
    texts, save_animation = _write(trained, prompts, options, arguments)
    _report_speed(texts, time.perf_counter() - begun)
    _save(trained, texts, save_animation, options, arguments)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = parser_with_model("generate", __doc__, "a checkpoint, a run's folder (its best one) or an export")
    add = parser.add_argument
    defaults = SamplingOptions()
    add("--prompt", metavar="TEXT", help="what to answer, or, without conditions in training, to continue")
    add("--prompt_file", type=path, metavar="FILE", help="one prompt a line")
    add("--infill", metavar="TEXT", help="fill gaps of N tokens, written <gap:N>; all else stays as it is")
    add("--num_samples", type=int, default=1, metavar="N", help="texts, per prompt (default: 1)")
    length = "length to write at most (default: to the end of the image, or of an answer's place in it)"
    add("--max_new_tokens", type=int, metavar="N", help=length)
    add_draws(parser)
    add(
        "--num_inference_steps",
        type=int,
        metavar="N",
        help=f"network evaluations, of every block (default: {MAX_STEPS}, or {STEPS_PER_TOKEN} a token of a block; "
        "1 where that is exact)",
    )
    add("--sampler", choices=SAMPLERS, default=defaults.sampler, help="default: %(default)s")
    add("--eta", type=float, metavar="X", help=f"noise that ancestral replaces (default: {defaults.eta})")
    add(
        "--block_size",
        type=int,
        metavar="N",
        help="patches written together, from left to right; 0: the whole image (default: as trained)",
    )
    add("--guidance_scale", type=float, default=defaults.guidance_scale, metavar="S", help="default: %(default)s")
    add("--seed", type=int, default=defaults.seed, metavar="N", help="default: %(default)s")
    add("--batch_size", type=int, metavar="N", help=f"texts at a time (default: {defaults.batch_size})")
    add("--stream", action="store_true", help="print each text while it is written, one after the other")
    add("--save_images", type=path, metavar="DIR", help="write the images there, as PNG (of a long text, the last one)")
    add("--animate", type=path, metavar="FILE.gif", help="show how the first text comes out of noise; FILE.png: stages")
    add("--json", type=path, metavar="FILE", help="write the texts there, with what they were written with")
    return parser


# ---- before anything is loaded ----


def _check_together(arguments: argparse.Namespace) -> None:
    """Raises UserError for flags that cannot be meant together: none is left out without a word."""
    given = [flag for flag, value in _given(arguments).items() if value]
    excluded = {
        "--prompt_file": (["--prompt"], "give one of the two"),
        "--infill": (
            ["--prompt", "--prompt_file", "--max_new_tokens", "--stop", "--stream"],
            "its text says what to write, and how much",
        ),
        "--stream": (["--animate", "--batch_size"], "texts are shown one by one, while they are written"),
    }
    for flag, (others, reason) in excluded.items():
        found = [other for other in others if other in given]
        if flag in given and found:
            raise UserError(f"{flag} and {', '.join(found)} do not go together: {reason}")
    if arguments.num_samples < 1:
        raise UserError(f"--num_samples is {arguments.num_samples}; it must be at least 1")


def _given(arguments: argparse.Namespace) -> dict[str, bool]:
    """Which flags the command line has."""
    default = {"stop": [], "stream": False}
    return {f"--{name}": value != default.get(name) for name, value in vars(arguments).items()}


def _check_files(arguments: argparse.Namespace) -> None:
    """A text must not be lost because its file cannot be written."""
    if arguments.animate is not None:
        file = Path(arguments.animate)
        if file.suffix.lower() != ".gif":
            raise UserError(f"--animate {file}: the file's name must end with .gif")
        for written in (file, file.with_suffix(".png")):
            check_file("--animate", written)
    check_outputs(arguments.json, arguments.save_images)


def _prompts(arguments: argparse.Namespace) -> list[str | None]:
    prompts = [arguments.prompt]
    if arguments.prompt_file is not None:
        prompts = _read_prompts(arguments.prompt_file)
    for text in (arguments.prompt, arguments.infill, *arguments.stop):
        _check_utf8(text or "")
    return [prompt for prompt in prompts for _ in range(arguments.num_samples)]


def _check_utf8(text: str) -> None:
    try:
        text.encode()
    except UnicodeError:
        raise UserError(f"{text[:40]!r} is not UTF-8: prompts, gaps and stop texts are text") from None


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


def _options(arguments: argparse.Namespace) -> SamplingOptions:
    given = {name: getattr(arguments, name) for name in ("eta", "batch_size") if getattr(arguments, name) is not None}
    return sampling_options(arguments, sampler=arguments.sampler, block_size=arguments.block_size, **given)


# ---- writing ----


def _say_of_weights(trained: TrainedModel, weights: str) -> None:
    from ds_tokimg.engine.checkpoint import MANIFEST
    from ds_tokimg.inference.texts import say

    if weights != "ema" and not (trained.path / MANIFEST).is_file():
        say(f"--weights {weights}: an export has one set of weights, and these are used")


def _write(
    trained: TrainedModel, prompts: list[str | None], options: SamplingOptions, arguments: argparse.Namespace
) -> tuple[list[dict], Callable[[], None]]:
    """Writes and prints the texts; and what saves the animation, once they are safe."""
    from ds_tokimg.inference.texts import generate, infill, show
    from ds_tokimg.inference.watching import Watcher

    if arguments.stream:
        return _stream(trained, prompts, options), lambda: None
    watcher = Watcher(trained.model, trained.format.eos_id) if arguments.animate else None
    with Work("writing"):
        if arguments.infill is not None:
            texts = infill(trained, arguments.infill, options, arguments.num_samples, watcher)
        else:
            texts = generate(trained, prompts, options, watcher)
    show(texts)
    sys.stdout.flush()
    if watcher is None:
        return texts, lambda: None

    def save_animation() -> None:
        file = Path(arguments.animate)
        watcher.save(file, trained.tokenizer)
        say_written(f"{file} and {file.with_suffix('.png').name}")

    return texts, save_animation


def _stream(trained: TrainedModel, prompts: list[str | None], options: SamplingOptions) -> list[dict]:
    """The texts of `generate`, each printed while it is written."""
    from ds_tokimg.inference.texts import TextStream, say, title_of

    if not trained.model.writing.asked(options.block_size).block_size:
        say("the whole image is written at once: its text comes in one piece")
    texts = []
    for place, prompt in enumerate(prompts):
        print(title_of(place, prompt), end=" ", flush=True)
        stream = TextStream(trained, prompt, options, place)
        for piece in stream:
            print(piece, end="", flush=True)
        print(f" ({stream.result['num_tokens']} tokens, {stream.result['finish_reason']})", flush=True)
        texts.append(stream.result)
    return texts


def _report_speed(texts: list[dict], seconds: float) -> None:
    tokens = sum(text["num_tokens"] for text in texts)
    texts_ = f"{len(texts):,} text{'s' if len(texts) > 1 else ''}"
    rate = f"{tokens / max(seconds, 1e-9):,.1f} tokens per second"
    print(f"{texts_}, {tokens:,} tokens in {seconds:,.1f} s: {rate}", file=sys.stderr)


def _save(
    trained: TrainedModel,
    texts: list[dict],
    save_animation: Callable[[], None],
    options: SamplingOptions,
    arguments: argparse.Namespace,
) -> None:
    """Writes the files that were asked for. One that cannot be written does not keep the others from it."""
    from ds_tokimg.inference.texts import save_images

    def save_pictures() -> None:
        save_images(trained, texts, Path(arguments.save_images))
        say_written(f"{arguments.save_images}, {len(texts)} image(s)")

    jobs: list[Callable[[], None]] = [save_animation]
    if arguments.json:
        jobs.append(lambda: write_json(arguments.json, _rows(trained, texts, options, arguments)))
    if arguments.save_images:
        jobs.append(save_pictures)
    problems = []
    for job in jobs:
        try:
            job()
        except UserError as error:
            problems.append(str(error))
        except OSError as error:
            problems.append(f"--save_images {arguments.save_images} cannot be written: {error.strerror or error}")
    if problems:
        raise UserError("\n".join(problems))


def _rows(
    trained: TrainedModel, texts: list[dict], options: SamplingOptions, arguments: argparse.Namespace
) -> list[dict]:
    """What --json holds of each text: the text, and all that it takes to write it again."""
    settings = {
        "temperature": options.temperature,
        "top_k": options.top_k,
        "top_p": options.top_p,
        "stop": list(options.stop),
        "max_new_tokens": options.max_new_tokens,
        "num_inference_steps": options.steps,
        "sampler": options.sampler,
        "eta": options.eta,
        "block_size": trained.model.writing.asked(options.block_size).block_size,
        "guidance_scale": options.guidance_scale,
        "weights": arguments.weights,
        "device": str(trained.device),
    }
    common = {"checkpoint": str(trained.path.resolve()), "seed": options.seed}
    return [
        {key: text[key] for key in KEYS} | common | {"index": index, "settings": settings}
        for index, text in enumerate(texts)
    ]
