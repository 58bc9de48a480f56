"""Prompt -> answer that can be checked: sums of numbers below 100, a fifth of all pairs held out.

    python -m benchmarks.arithmetic [--steps 1 8] [--guidance 0 1 2] [train flag ...]

Trains with the trainer as a user would, writes the answers of all held-out problems, and prints a row of
arithmetic.md for each way of sampling: the share of answers that are right to the last character.
"""

import argparse
import itertools
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import ROOT
from ds_tokimg.inference.sampler import SamplingOptions

# Bytes are the tokens, one a patch; an answer is up to three digits and the end of the text.
RECIPE = ["--model", "JiT-XS/2", "--token_size", "2", "--vocab_size", "257", "--max_tokens", "16"]
RECIPE += ["--enable_condition", "--no_packing", "--epochs", "20", "--train_batch_size", "128", "--lr", "3e-3"]
RECIPE += ["--timesteps", "band"]
RECIPE += ["--eval_interval", "100000", "--save_interval", "100000", "--num_samples", "0"]


def problems(seed: int = 0) -> tuple[list[dict], list[dict]]:
    """All sums of two numbers below 100, shuffled: four fifths to train on, and the rest."""
    pairs = [(a, b) for a in range(100) for b in range(100)]
    random.Random(seed).shuffle(pairs)
    records = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a, b in pairs]
    cut = len(records) * 4 // 5
    return records[:cut], records[cut:]


def write(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def run(*command: str) -> float:
    """Runs `python -m ds_tokimg ...` and returns the seconds it took."""
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-m", "ds_tokimg", *command], cwd=ROOT, check=True, stdout=sys.stderr)
    return time.perf_counter() - begun


def exact_match(checkpoint: Path, folder: Path, held_out: list[dict], flags: list[str]) -> float:
    """Share of the held-out problems whose written answer is the right one."""
    prompts = folder / "prompts.txt"
    prompts.write_text("".join(record["prompt"] + "\n" for record in held_out))
    answers = folder / "answers.json"
    run("generate", "--checkpoint", str(checkpoint), "--prompt_file", str(prompts), "--json", str(answers), *flags)
    texts = [answer["text"] for answer in json.loads(answers.read_text())]
    return sum(text == record["answer"] for text, record in zip(texts, held_out, strict=True)) / len(held_out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, nargs="*", default=[4, 8, 32], help="numbers of sampling steps")
    parser.add_argument("--samplers", nargs="*", default=["ancestral"])
    parser.add_argument("--guidance", nargs="*", default=["1"], help="guidance scales")
    parser.add_argument(
        "--eta", nargs="*", default=[str(SamplingOptions.eta)], help="how much noise the sampler replaces"
    )
    arguments, flags = parser.parse_known_args()
    train, held_out = problems()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        data = ["--data_path", str(write(folder / "train.jsonl", train))]
        data += ["--eval_data_path", str(write(folder / "held_out.jsonl", held_out))]
        output = folder / "run"
        seconds = run("train", *data, "--output_dir", str(output), *RECIPE, *flags)
        choices = (arguments.samplers, arguments.steps, arguments.guidance, arguments.eta)
        for sampler, steps, scale, eta in itertools.product(*choices):
            options = ["--sampler", sampler, "--num_inference_steps", str(steps)]
            options += ["--guidance_scale", scale, "--eta", eta]
            share = exact_match(output, folder, held_out, options)
            cells = [" ".join(flags), f"{seconds:.0f}", sampler, steps, scale, eta, f"{100 * share:.1f} %"]
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    main()
