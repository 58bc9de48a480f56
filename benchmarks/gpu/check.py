"""The page of `benchmarks.gpu`, and the processes that its figures come from."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path

from benchmarks import ROOT

DATA = ROOT / "data" / "web_narrative.txt"
TASK_SECONDS = 240


class Failed(Exception):
    """A process did not end well; its last words."""


class Check:
    """The page, and how its figures are had."""

    def __init__(self, output: Path, folder: Path, dry: bool):
        self.output, self.folder, self.dry, self.failures = output, folder, dry, 0
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text("")
        try:
            self.machine = self.task("facts")
        except Failed as problem:
            raise SystemExit(f"nothing can be measured: {problem}") from None
        if self.machine["kind"] == "cpu" and not dry:
            raise SystemExit("this machine has no accelerator that torch can use: with --dry all of it runs on the CPU")

    # ---- the page ----

    def say(self, text: str = "") -> None:
        print(text, flush=True)
        with self.output.open("a") as file:
            file.write(text + "\n")

    def head(self, parts: list[str]) -> None:
        machine = self.machine
        memory = f", {machine['memory'] / 2**30:.0f} GiB" if "memory" in machine else ""
        rates = ", ".join(f"{rate / 1e12:.3g} TFLOP/s in {name}" for name, rate in machine["rates"].items())
        self.say("# On an accelerator\n")
        self.say(f"{date.today()}, {machine['count']} × {machine['name']}{memory}, torch {machine['torch']}.")
        self.say(f"Large matrix products: {rates}. Parts: {', '.join(parts)}.")
        if self.dry:
            self.say("\nA dry run: small sizes. None of its figures says anything of the machine.")

    def title(self, words: str, *head: str) -> None:
        self.say(f"\n## {words}\n\n| {' | '.join(head)} |\n|{'---|' * len(head)}")

    def row(self, *cells) -> None:
        self.failures += str(cells[-1]).startswith("FAILED")
        self.say(f"| {' | '.join(str(cell).replace('|', '/') for cell in cells)} |")

    def rows(self, names: Sequence, measure: Callable[[], Sequence[Sequence]]) -> None:
        """The rows that a measurement gives, each behind its names; one with the last words where it fails, whatever
        the reason: time on such a machine is dear, and the other rows are wanted."""
        try:
            found = measure()
        except Failed as problem:
            found = [(problem, "FAILED")]
        except Exception as error:
            traceback.print_exc()
            found = [(f"{type(error).__name__}: {error}", "FAILED")]
        for cells in found:
            self.row(*names, *cells)

    # ---- the processes ----

    def task(self, name: str, on_cpu: bool = False, **options) -> dict:
        """What a task of tasks.py found."""
        printed = self.run([sys.executable, "-m", "benchmarks.gpu.tasks", name, json.dumps(options)], on_cpu)
        lines = [line for line in printed.splitlines() if line.startswith("{")]
        if not lines:
            raise Failed("it printed nothing")
        return json.loads(lines[-1])

    def train(self, name: str, *flags: str, on_cpu: bool = False, ranks: int = 0) -> Path:
        """A run -> its folder. Of this many ranks; 0: without a launcher."""
        folder, program = self.folder / name, [sys.executable, "-m", "ds_tokimg"]
        if ranks:
            program = [sys.executable, "-m", "deepspeed.launcher.runner", "-q", "--no_local_rank"]
            program += ["--num_accelerators", str(ranks), "--master_port", str(free_port()), "--module", "ds_tokimg"]
        words = ["--data_path", str(DATA), "--output_dir", str(folder), "--num_samples", "0", *flags]
        self.run([*program, "train", *words], on_cpu)
        return folder

    def run(self, command: list[str], on_cpu: bool = False) -> str:
        """What a command printed. Where it fails, more of it goes to standard error."""
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = os.environ | {"PYTHONPATH": path, "MASTER_PORT": str(free_port())}
        if on_cpu:
            environment |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TASK_SECONDS
            )
        except subprocess.TimeoutExpired:
            raise Failed(f"took longer than {TASK_SECONDS} s") from None
        if done.returncode == 0:
            return done.stdout
        print(f"$ {' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}\n", file=sys.stderr, flush=True)
        last = (done.stderr.strip() or done.stdout.strip() or "no word").splitlines()[-1]
        raise Failed(" ".join(last.split())[:160])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
