"""What is left of a run that is killed again and again.

    python -m benchmarks.faults [--kills 100] [--seed 0] [--ranks 2] > benchmarks/results/faults.md

Forked ranks save every other step. At moments that the seed decides, half of them inside a save, SIGKILL ends one rank
or all, and `--resume auto` goes on. In the end all metrics, weights and names of checkpoints are compared with those of
a run that nobody killed.
"""

import argparse
import os
import tempfile
from pathlib import Path

from benchmarks.timing import print_row, print_table, print_title
from tests.support import kills
from tests.support.runs import write_corpus

PLACES = {"start": "before the first step", "step": "at a step", "save": "in a save", "validation": "in a validation"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=2)
    args = parser.parse_args()
    print_title("Faults")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_DATASETS_CACHE"] = f"{folder}/cache"
        corpus, killed, whole = write_corpus(Path(folder)), Path(folder, "killed"), Path(folder, "whole")
        outcomes = kills.kill_again_and_again(corpus, killed, kills.draw(args.seed, args.kills, args.ranks), args.ranks)
        last = max([row["step"] for outcome in outcomes for row in outcome.rows], default=0) + kills.VALIDATE
        for run in (killed, whole):
            kills.finish(corpus, run, last, args.ranks)
        show(outcomes, kills.rows_of(whole), args.ranks)
        same = kills.rows_of(killed) == kills.rows_of(whole) and kills.weights_of(killed) == kills.weights_of(whole)
        left = ", ".join(kills.leftovers(killed)) or "nothing"
    print(f"\nIn the end, at step {last:,}, metrics, weights and checkpoints are ", end="")
    print(f"{'the same bits' if same else 'NOT the same'}; left behind: {left}.")


def show(outcomes: list[kills.Outcome], expected: list[dict], ranks: int) -> None:
    """One row for each place where kills fell."""
    print_table("killed", "one rank", f"all {ranks} ranks", "logged steps identical", "processes left")
    for place, words in PLACES.items():
        here = [outcome for outcome in outcomes if outcome.place == place]
        everyone = sum(len(outcome.victims) == ranks for outcome in here)
        identical = sum(kills.same_so_far(outcome.rows, expected) for outcome in here)
        orphans = sum(outcome.orphans for outcome in here)
        print_row(words, len(here) - everyone, everyone, f"{identical} of {len(here)}", orphans)


if __name__ == "__main__":
    main()
