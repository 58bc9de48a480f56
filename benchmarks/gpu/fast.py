"""Is it fast? Steps of three sizes in all recipes, what they wait for, and what they spend their time on."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from statistics import median

from benchmarks.gpu.check import Check, Failed
from benchmarks.gpu.right import metrics

# On full images, with one token a patch from left to right.
RECIPES = {
    "at-once": ["--recipe", "at-once", "--max_tokens", "4096"],
    "left-to-right": ["--recipe", "left-to-right", "--token_size", "4", "--max_tokens", "256"],
    "reference": ["--recipe", "reference", "--max_tokens", "4096"],
}
IMAGES = {"JiT-XS/4": 128, "JiT-B/4": 64, "JiT-L/4": 16}  # of a step
COMPILED = "JiT-B/4"  # also measured with --compile
MFU_TARGET = 0.45  # of JiT-B/4 in bf16


def sizes(check: Check) -> dict[str, int]:
    """Models and the images of a step."""
    return {"JiT-XS/8": 1} if check.dry else IMAGES


def recipes(check: Check) -> list[str]:
    return list(RECIPES)[: 1 if check.dry else None]


def recipe_flags(check: Check, recipe: str, model: str) -> list[str]:
    flags = RECIPES[recipe] if not check.dry else ["--recipe", recipe, "--img_size", "16", "--max_tokens", "16"]
    return [*flags, "--model", model]


def count_waits(check: Check) -> None:
    check.title("Where a step waits for the accelerator", "recipe", "place", "times a step")

    def measure(recipe: str) -> list[tuple]:
        found = check.task("waits", flags=recipe_flags(check, recipe, next(iter(sizes(check)))))
        if not found["known"]:
            return [("only CUDA tells", "")]
        return [(place, f"{times:g}") for place, times in found["places"].items()] or [("nowhere", "0")]

    for recipe in recipes(check):
        check.rows((recipe,), partial(measure, recipe))


def measure_speed(check: Check) -> None:
    head = ("recipe", "model", "compiled", "images", "ms a step", "valid tokens/s", "share of peak (MFU)", "target")
    check.title("Steps on full images of 64 × 64", *head, "GB, planned", "GB, measured")

    def measure(recipe: str, model: str, images: int, compiled: bool) -> list[tuple]:
        flags = recipe_flags(check, recipe, model) + (["--compile"] if compiled else [])
        found = check.task("step", flags=flags, images=images, repetitions=1 if check.dry else 10)
        seconds = median(found["seconds"])
        mfu = found["flops"] / seconds / found["rate"]
        aimed = f"≥ {MFU_TARGET}" if model == "JiT-B/4" and recipe != "reference" else ""
        figures = (f"{1e3 * seconds:.1f}", f"{found['tokens'] / seconds:,.0f}", f"{mfu:.2f} ({found['dtype']})", aimed)
        return [(*figures, f"{found['planned'] / 1e9:.2f}", f"{found['memory'] / 1e9:.2f}")]

    for model, images in sizes(check).items():
        for recipe in recipes(check):
            for compiled in (False, True) if model == COMPILED else (False,):
                names = (recipe, model, "yes" if compiled else "no", images)
                check.rows(names, partial(measure, recipe, model, images, compiled))


def show_kernels(check: Check) -> None:
    model, images = list(sizes(check).items())[min(1, len(sizes(check)) - 1)]
    check.title(f"What a step of {model} spends its time on", "recipe", "kernel", "share")

    def measure(recipe: str) -> list[tuple]:
        found = check.task("profile", flags=recipe_flags(check, recipe, model), images=images)
        rows = [(f"`{name[:100]}`", f"{share:.3f}") for name, share in found["top"]]
        kernels = ", ".join(f"`{name[:80]}`" for name, _ in found["attention"]) or "no kernel of that name"
        return [*rows, (f"attention: {kernels}", f"{sum(share for _, share in found['attention']):.3f}")]

    for recipe in recipes(check)[:2]:
        check.rows((recipe,), partial(measure, recipe))


def measure_data(check: Check) -> None:
    """Real runs: how long their steps wait for a batch."""
    model, steps = (next(iter(sizes(check))), "4") if check.dry else ("JiT-B/4", "60")
    check.title("A real run: is data waited for?", "recipe", "model", "share of the time", "target")

    def measure(recipe: str) -> list[tuple]:
        flags = ["--max_steps", steps, "--log_interval", "2", "--epochs", "8", "--eval_fraction", "0"]
        rows = metrics(check.train(f"data_{recipe}", *recipe_flags(check, recipe, model), *flags))
        return [(f"{median(row['data_wait'] for row in rows[len(rows) // 2 :]):.3f}", "≤ 0.01")]

    for recipe in recipes(check)[:2]:
        check.rows((recipe, model), partial(measure, recipe))


def other_script(name: str, *flags: str) -> Callable[[Check], None]:
    """A part that is a script of its own, whose page becomes a section."""

    def part(check: Check) -> None:
        small = ["--model", "JiT-XS/8", "--repetitions", "1"]
        small += ["--batch", "1", "--tokens", "64"] if name == "overhead" else ["--images", "2"]
        try:
            page = check.run([sys.executable, "-m", f"benchmarks.{name}", *(small if check.dry else flags)])
        except Failed as problem:
            check.failures += 1
            page = f"# `benchmarks.{name}`\n\nFAILED: {problem}\n"
        check.say("\n" + page.replace("\n## ", "\n### ").replace("# ", "## ", 1).rstrip())

    return part
