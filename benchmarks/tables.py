"""The tables and the plot of what was learnt, made from benchmarks/learning.jsonl.

    python -m benchmarks.tables            writes them into the pages and the README
    python -m benchmarks.tables --check    only says which pages differ from the data (exit code 1)

A page holds a table between the lines `<!-- table NAME -->` and `<!-- end of table -->`; what stands between them is
replaced. So a figure of the README and the same figure of a page cannot drift apart.

Compute is told in FLOPs: those that a token costs in matrix products, forward and backward, as `ds_tokimg.model.flops`
counts them, times the tokens that were trained on. The data file counts transformer positions, which leave out the
modulation, the embeddings and the output layer.
"""

import argparse
import json
import math
import re
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "benchmarks" / "learning.jsonl"
RESULTS = ROOT / "benchmarks" / "results"
PLOT = RESULTS / "learning.png"
PAGES = (RESULTS / "results.md", RESULTS / "ablations.md", RESULTS / "log.md", ROOT / "README.md")
TABLE = re.compile(r"(<!-- table ([a-z-]+) -->\n).*?(\n<!-- end of table -->)", re.S)

# MFLOP a trained token at size XS, texts of 256 tokens, 1,024 ids; a test counts them again.
MEGAFLOPS = {
    "autoregressive, shift": 20.87,
    "autoregressive": 20.64,
    "masked": 20.64,
    "masked, shift": 21.09,
    "left-to-right": 28.91,
    "at-once": 9.74,
}
NAMES = {
    "autoregressive, shift": "autoregressive, with token shift",
    "autoregressive": "autoregressive",
    "masked, shift": "masked diffusion, with token shift",
    "masked": "masked diffusion",
    "left-to-right": "**`left-to-right`**",
    "at-once": "**`at-once`**",
    "reference": "`reference` (as published)",
    "repaired": "the same, balanced radix, noise in the band",
}
# Bits per token of a model that knows how often each token occurs, and nothing else.
UNIGRAM = {"web_narrative": 8.36, "python": 8.60}
# Bits per token of an interpolated Kneser-Ney 4-gram of the whole training texts (`python -m benchmarks.ngram`).
NGRAM = {"web_narrative": 4.08, "python": 4.51}
BUDGETS = (("web_narrative", 0.25), ("web_narrative", 0.5), ("web_narrative", 1), ("python", 1), ("python", 4))
# Rows from before recipes were files: the recipe that they became, and the settings that were not yet its defaults.
FORMER: dict[str, tuple[str, list[str]]] = {
    "ours": ("left-to-right", []),
    "plain": ("at-once", ["timesteps=entropic"]),
}
# Peak learning rates of recipes and references, where they are not 3e-3.
LEARNING_RATES = {"at-once": 6e-3}


@dataclass(frozen=True)
class Row:
    """A line of the data file: one trained system and the bounds that were measured of it."""

    system: str
    corpus: str
    settings: list[str]
    seed: int
    batch: int
    lr: float
    note: str
    optimizer: str
    weights: str
    positions: float
    tokens: int
    seconds: float
    bits: dict = field(repr=False)

    @property
    def best(self) -> dict:
        """The figures of the path that costs the fewest bits, which is the one that `generate` takes."""
        return min(self.bits.values(), key=lambda figures: figures["bits_per_byte"])

    @property
    def recipe(self) -> str | None:
        """The recipe or reference that the row measures; None for a trial of something else."""
        name, settings = FORMER.get(self.system, (self.system, []))
        usual = not self.note and self.optimizer == "AdamW" and self.weights == "ema"
        return name if usual and self.settings == settings and self.lr == LEARNING_RATES.get(name, 3e-3) else None

    @property
    def teraflops(self) -> float:
        """TFLOP of training, for rows of a recipe or reference."""
        return self.tokens * MEGAFLOPS[self.recipe or ""] / 1e6


def read_rows() -> list[Row]:
    """All rows of the data file, in its order."""
    usual = {"optimizer": "AdamW", "weights": "ema"}
    rows = []
    for line in DATA.read_text(encoding="utf-8").splitlines():
        values = usual | json.loads(line)
        values["settings"] = values.pop("set")
        rows.append(Row(**{name: values[name] for name in Row.__dataclass_fields__}))
    return rows


# ---- figures ----


def figure(rows: list[Row], recipe: str, corpus: str, million: float) -> float | None:
    """Bits per byte after a budget in million positions: of the best batch, the mean over its seeds."""
    budget = [row for row in rows if row.recipe == recipe and row.corpus == corpus]
    budget = [row for row in budget if abs(row.positions / 1e6 - million) < 0.02 * million]
    batches: dict[int, list[float]] = {}
    for row in budget:
        if path_of(row):
            batches.setdefault(row.batch, []).append(row.best["bits_per_byte"])
    return min(map(statistics.mean, batches.values())) if batches else None


def path_of(row: Row) -> bool:
    """Whether the row has the bound of what `generate` does; some rows have that of many small steps only."""
    return row.recipe not in ("left-to-right", "at-once") or any("," in path for path in row.bits)


def curve(rows: list[Row], recipe: str, corpus: str) -> list[tuple[float, float]]:
    """(TFLOP, bits per byte) with rising compute, as far as more of it helps."""
    points: list[tuple[float, float]] = []
    same = [row for row in rows if row.recipe == recipe and row.corpus == corpus and path_of(row)]
    for row in sorted(same, key=lambda row: (row.teraflops, row.best["bits_per_byte"])):
        if not points or row.best["bits_per_byte"] < points[-1][1]:
            points.append((row.teraflops, row.best["bits_per_byte"]))
    return points


def compute_gap(spent: float, bits_per_byte: float, reference: list[tuple[float, float]]) -> str:
    """How many times the compute of a reference at the same bits per byte: linear between its measurements, in the
    logarithm of the compute; a bound where it was not measured that far."""
    if not reference:
        return ""
    if bits_per_byte > reference[0][1]:
        return f"> {spent / reference[0][0]:.1f}"
    if bits_per_byte < reference[-1][1]:
        return f"< {spent / reference[-1][0]:.1f}"
    compute, bits = zip(*reversed(reference), strict=True)
    return f"{spent / math.exp(np.interp(bits_per_byte, bits, np.log(compute))):.1f}"


def bytes_a_token(rows: list[Row], corpus: str) -> float:
    """Of the corpus with its own tokenizer of 1,024 ids."""
    figures = next(row.best for row in rows if row.corpus == corpus and not row.settings)
    return figures["bits_per_token"] / figures["bits_per_byte"]


# ---- tables ----


def markdown(heads: list[str], lines: list[list]) -> str:
    rows = [heads, ["---"] * len(heads), *lines]
    return "\n".join("| " + " | ".join(str(cell) for cell in row) + " |" for row in rows).replace("|  ", "| ")


def results(rows: list[Row], budgets=BUDGETS) -> str:
    """System x budget, in bits per byte; the bounds of our recipes are those of what `generate` does."""
    heads = ["bits per byte of held-out text", "MFLOP a token"]
    heads += [f"{corpus.replace('web_narrative', 'bundled')}, {million:g} M" for corpus, million in budgets]
    lines = [[NAMES[recipe], f"{MEGAFLOPS[recipe]:.0f}", *_cells(rows, recipe, budgets)] for recipe in MEGAFLOPS]
    for name, bits in (("4-gram model of the whole texts", NGRAM), ("unigram frequencies", UNIGRAM)):
        lines.append([name, "", *(f"{bits[corpus] / bytes_a_token(rows, corpus):.2f}" for corpus, _ in budgets)])
    return markdown(heads, lines)


def _cells(rows: list[Row], recipe: str, budgets) -> list[str]:
    values = [figure(rows, recipe, corpus, million) for corpus, million in budgets]
    return ["" if value is None else f"{value:.2f}" for value in values]


def summary(rows: list[Row]) -> str:
    """The README's part of `results`."""
    return results(rows, (("web_narrative", 0.25), ("web_narrative", 1), ("python", 4)))


def gaps(rows: list[Row]) -> str:
    """How many times the FLOPs of the autoregressive references our recipes take for the same bits per byte."""
    heads = ["recipe", "corpus", "million positions", "TFLOP", "bits per byte"]
    heads += [f"against {NAMES[name]}" for name in ("autoregressive, shift", "autoregressive")]
    lines = []
    for recipe in ("left-to-right", "at-once"):
        for corpus, million in BUDGETS:
            same = [row for row in rows if (row.recipe, row.corpus) == (recipe, corpus) and path_of(row)]
            for row in [row for row in same if abs(row.positions / 1e6 - million) < 0.02 * million][:1]:
                bits = row.best["bits_per_byte"]
                curves = [curve(rows, name, corpus) for name in ("autoregressive, shift", "autoregressive")]
                cells = [compute_gap(row.teraflops, bits, points) or "not measured" for points in curves]
                lines.append([f"`{recipe}`", corpus, f"{million:g}", f"{row.teraflops:.1f}", f"{bits:.3f}", *cells])
    return markdown(heads, lines)


def vocabularies(rows: list[Row]) -> str:
    """The bundled corpus with larger tokenizers: bits per byte compare, bits per token do not."""
    heads = ["ids", "system", "settings", "seconds", "bits per token", "bits per byte"]
    sizes = {"web_narrative, smollm2": "49,152 (SmolLM2)", "web_narrative, qwen3": "151,669 (Qwen3)"}
    lines = []
    for corpus, ids in sizes.items():
        for row in sorted((row for row in rows if row.corpus == corpus), key=lambda row: row.best["bits_per_byte"]):
            name = NAMES[row.recipe].strip("*") if row.recipe else "`left-to-right`"
            best = [f"{row.best['bits_per_token']:.2f}", f"{row.best['bits_per_byte']:.3f}"]
            lines.append([ids, name, settings_of(row), f"{row.seconds:.0f}", *best])
    return markdown(heads, lines)


def settings_of(row: Row) -> str:
    """What differs from the system's usual settings."""
    settings = list(row.settings)
    rate = LEARNING_RATES.get(row.system, 3e-3)
    for name, value, usual in (("lr", row.lr, rate), ("optimizer", row.optimizer, "AdamW")):
        settings += [f"{name}={value}"] if value != usual else []
    settings += [f"weights={row.weights}"] if row.weights != "ema" else []
    return " ".join(settings) + (f" ({row.note})" if row.note else "")


def all_rows(rows: list[Row]) -> str:
    """Every row of the data file, by corpus, compute and bits."""
    heads = "corpus system settings seed batch positions tokens seconds path bits/token bits/byte".split()
    lines = []
    for row in sorted(rows, key=lambda row: (row.corpus, row.positions, row.best["bits_per_byte"])):
        for path, figures in row.bits.items():
            cells = [row.corpus, row.system, settings_of(row).strip(), row.seed, row.batch]
            cells += [f"{row.positions / 1e6:.2f} M", f"{row.tokens / 1e6:.2f} M", f"{row.seconds:.0f}"]
            cells += ["plain" + path[1:] if path[0] == "0" else f"blocks of {path}"]
            lines.append([*cells, f"{figures['bits_per_token']:.3f}", f"{figures['bits_per_byte']:.3f}"])
    return markdown(heads, lines)


# ---- ablations ----


@dataclass(frozen=True)
class Trial:
    """One row of the ablations: which row of the data file it is, and of which version of the code."""

    label: str
    settings: str  # as in the data file, separated by spaces
    lr: float = 3e-3
    note: str = ""
    version: str = "today's"
    path: str | None = None  # the bound to show (None: the one with the fewest bits)
    more: dict = field(default_factory=dict)  # values of other fields of the row


_BEFORE: dict[str, Any] = {"note": "no token MLP", "version": "without token MLP and turns"}
_FIRST: dict[str, Any] = {
    "note": "first version, no token MLP",
    "version": "without token MLP and turns, first version",
}
_EARLIER: dict[str, Any] = {"version": "without token MLP and turns"}
_RUNS_OF_4: dict[str, Any] = {"note": "runs of 4, to 0.4", "version": "turns in runs of 4, walk to 0.4"}
_STEPS: dict[str, Any] = {"path": "0"}
AT_ONCE_TRIALS = {
    "tokens in turn and how they are written": [
        Trial("the recipe: peak rate 6e-3, timesteps `entropic`, tokens drawn in turn", "timesteps=entropic", 6e-3),
        Trial("the same model, written in many small steps", "timesteps=entropic", 6e-3, **_STEPS),
        Trial("tokens not learnt in turn (`in_turn = 0`), many small steps", "timesteps=entropic in_turn=0", 6e-3),
    ],
    "turns in runs of 4 (a patch) instead of 16": [
        Trial("local window of 2", "timesteps=entropic in_turn=0.75", 6e-3, **_RUNS_OF_4),
        Trial("local window of 4", "timesteps=entropic in_turn=0.75 neighbours=4", 6e-3, **_RUNS_OF_4),
    ],
    "peak learning rate, in many small steps": [
        Trial("3e-3", "timesteps=entropic", **_BEFORE),
        Trial("6e-3", "timesteps=entropic", 6e-3, **_BEFORE),
        Trial("12e-3", "timesteps=entropic", 12e-3, **_BEFORE),
    ],
    "one change each, in many small steps, peak rate 3e-3": [
        Trial("none", "timesteps=entropic", **_BEFORE),
        Trial("timesteps `band`", "", **_BEFORE),
        Trial("no noise levels per patch (`patch_noise = 0`)", "timesteps=entropic patch_noise=0", **_BEFORE),
        Trial("layout `raster`", "timesteps=entropic layout=raster", **_BEFORE),
        Trial("palette `id`", "timesteps=entropic palette=id", **_BEFORE),
        Trial("objective `elbo`", "timesteps=entropic objective=elbo", **_BEFORE),
        Trial("one token a patch (`token_size = 2`)", "timesteps=entropic token_size=2 neighbours=2", **_BEFORE),
        Trial("optimizer Muon", "timesteps=entropic", **_BEFORE, more={"optimizer": "Muon"}),
        Trial("self-conditioning in half of the samples", "timesteps=entropic self_conditioning=0.5", **_BEFORE),
        Trial("local window of 1", "timesteps=entropic neighbours=1", **_FIRST),
        Trial("local window of 4", "timesteps=entropic neighbours=4", **_FIRST),
        Trial("no local window", "timesteps=entropic neighbours=0", **_EARLIER),
        Trial(
            "16 tokens a patch (`JiT-XS/4`), window of 1", "timesteps=entropic model=JiT-XS/4 neighbours=1", **_FIRST
        ),
    ],
    "one change each, without a local window, timesteps `band`": [
        Trial("none", "neighbours=0", **_EARLIER),
        Trial("no noise levels per patch", "patch_noise=0 neighbours=0", **_EARLIER),
        Trial("layout `raster`", "layout=raster neighbours=0", **_EARLIER),
        Trial("palette `id`", "palette=id neighbours=0", **_EARLIER),
        Trial("objective `elbo`", "objective=elbo neighbours=0", **_EARLIER),
        Trial("self-conditioning in half of the samples", "self_conditioning=0.5 neighbours=0", **_EARLIER),
    ],
}
_AT_FULL_COST: dict[str, Any] = {"version": "the last layer computed all of the clean patches"}
LEFT_TO_RIGHT_TRIALS = {
    "the recipe": [
        Trial("peak rate 3e-3, timesteps `noisy`, `noisy_depth` 1, drawn in one step", ""),
        Trial("the same model, written in many small steps", "", path="1"),
        Trial("last weights instead of averaged ones", "", more={"weights": "trained"}),
        Trial("peak rate 1.5e-3", "", 1.5e-3),
        Trial("peak rate 6e-3", "", 6e-3),
        Trial("optimizer Muon", "", more={"optimizer": "Muon"}),
        Trial("four tokens a patch (`token_size = 1`), batch 4", "token_size=1"),
        Trial("local window of 2", "neighbours=2", note="no token MLP", version="without token MLP"),
    ],
    "what the posterior is over (0.22 M positions)": [
        Trial("`tokens`", "", **_AT_FULL_COST, more={"positions": 0.223e6}),
        Trial("`tree`", "posterior=tree", **_AT_FULL_COST),
        Trial("`digits`, many small steps", "posterior=digits", **_AT_FULL_COST),
        Trial("`digits`, timesteps `band`, many small steps", "posterior=digits timesteps=band", **_AT_FULL_COST),
    ],
    "noisy patches in all layers (`noisy_depth = 0`), many small steps (0.23 M positions)": [
        Trial("none", "noisy_depth=0", **_AT_FULL_COST),
        Trial("timesteps `band`", "timesteps=band noisy_depth=0", **_AT_FULL_COST),
        Trial("palette `id`", "palette=id noisy_depth=0", **_AT_FULL_COST),
        Trial("posterior `digits`, timesteps `band`", "posterior=digits timesteps=band noisy_depth=0", **_AT_FULL_COST),
    ],
}


def ablations(rows: list[Row], system: str, trials: dict[str, list[Trial]]) -> str:
    """One row a setting; each beside the first of its group."""
    lines = []
    for group, members in trials.items():
        found = [_figures(rows, system, trial) for trial in members]
        for trial, bits in zip(members, found, strict=True):
            difference = "" if trial is members[0] else f"{round(bits - found[0], 2) + 0:+.2f}"
            lines.append([group, trial.label, f"{bits:.2f}", difference, trial.version])
            group = ""
    return markdown(["compared", "setting", "bits per token", "difference", "code"], lines)


def _figures(rows: list[Row], system: str, trial: Trial) -> float:
    """Bits per token of the trial: seed 0, about a quarter of a million positions of the bundled corpus."""
    wanted = {"optimizer": "AdamW", "weights": "ema", "positions": 0.25e6} | trial.more
    positions = wanted.pop("positions")
    wanted |= {"system": system, "corpus": "web_narrative", "seed": 0, "lr": trial.lr, "note": trial.note}
    same = [row for row in rows if all(getattr(row, name) == value for name, value in wanted.items())]
    same = [row for row in same if row.settings == trial.settings.split() and row.positions < 0.3e6]
    row = min(same, key=lambda row: (abs(row.positions - positions) > 5e3, row.best["bits_per_token"]))
    figures = row.best if trial.path is None else row.bits[trial.path]
    return figures["bits_per_token"]


TABLES: dict[str, Callable[[list[Row]], str]] = {
    "results": results,
    "summary": summary,
    "gaps": gaps,
    "vocabularies": vocabularies,
    "ablations-at-once": lambda rows: ablations(rows, "plain", AT_ONCE_TRIALS),
    "ablations-left-to-right": lambda rows: ablations(rows, "ours", LEFT_TO_RIGHT_TRIALS),
    "rows": all_rows,
}


def filled(text: str, rows: list[Row]) -> str:
    """A page with its tables as the data have them."""
    return TABLE.sub(lambda found: found[1] + "\n" + TABLES[found[2]](rows) + "\n" + found[3], text)


# ---- plot ----


def draw(rows: list[Row], path: Path) -> None:
    """Bits per byte for the FLOPs of training, a panel a corpus."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    styles = {
        "masked": ("#999999", ":"),
        "autoregressive": ("#4477aa", "--"),
        "autoregressive, shift": ("#4477aa", "-"),
        "left-to-right": ("#228833", "-"),
        "at-once": ("#cc3311", "-"),
    }
    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for panel, (corpus, title) in zip(panels, (("web_narrative", "bundled corpus"), ("python", "python")), strict=True):
        for recipe, (colour, line) in styles.items():
            if points := curve(rows, recipe, corpus):
                label = NAMES[recipe].replace("*", "").replace("`", "")
                panel.plot(*zip(*points, strict=True), line, color=colour, marker="o", markersize=4, label=label)
        for name, bits, side in (("4-gram model", NGRAM, 1), ("unigram frequencies", UNIGRAM, -1)):
            level = bits[corpus] / bytes_a_token(rows, corpus)
            panel.axhline(level, color="black", linewidth=0.8)
            above = "bottom" if side > 0 else "top"
            panel.annotate(name, (0.6, level), xytext=(0, 3 * side), textcoords="offset points", va=above)
        panel.set(xscale="log", xlabel="training compute, TFLOP", title=title)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("bits per byte of held-out text")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 where a page differs")
    check = parser.parse_args().check
    rows, stale = read_rows(), 0
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        if (new := filled(text, rows)) != text:
            stale += 1
            print(f"{page.relative_to(ROOT)}: {'differs from the data' if check else 'written'}")
            if not check:
                page.write_text(new, encoding="utf-8")
    if not check:
        draw(rows, PLOT)
    return stale if check else 0


if __name__ == "__main__":
    raise SystemExit(main())
