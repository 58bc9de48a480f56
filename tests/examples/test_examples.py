"""Every example runs, cut short, and learns as far as that can be seen in so little time."""

import json
import os
import re
import shlex
import subprocess
import sys

import nbformat
import pytest
from nbclient import NotebookClient

from tests.support.runs import ROOT, write_corpus

EXAMPLES = ROOT / "examples"


@pytest.fixture
def call(tmp_path):
    """A function that runs a command at the root of the repository -> what it printed."""
    environment = os.environ | {
        "PATH": f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HF_DATASETS_CACHE": str(tmp_path / "cache"),
    }

    def run(command: str) -> str:
        done = subprocess.run(shlex.split(command), cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    return run


def test_the_readme_lists_all_examples():
    files = {file.name for file in EXAMPLES.iterdir() if file.suffix in (".py", ".sh", ".ipynb")}
    assert files == set(re.findall(r"\]\((.+?)\)", (EXAMPLES / "README.md").read_text()))


def test_the_plain_loop_learns(call):
    printed = call("python -m examples.plain_loop --steps 40")
    guessing, trained = map(float, re.findall(r"(\d+\.\d+) bits a character", printed))
    assert trained < guessing - 0.8
    assert "written: " in printed


@pytest.mark.slow
def test_own_texts(call, tmp_path):
    run = tmp_path / "run"
    short = "--max_steps 2 --train_batch_size 4 --model JiT-XS/4 --img_size 16 --num_samples 0 --vocab_size 300"
    printed = call(f"bash examples/own_texts.sh {write_corpus(tmp_path)} {run} {short} --max_tokens 64")
    assert re.search(r"exported: [\d,]+ parameters", printed)
    assert json.loads((run / "figures.json").read_text())["bits_per_token"] < 20
    assert len(list((run / "pictures").glob("*.png"))) == 2


@pytest.mark.slow
def test_prompts_and_answers(call, tmp_path):
    short = "--max_steps 2 --train_batch_size 8"
    printed = call(f"bash examples/prompts_and_answers.sh {tmp_path / 'sums'} {short}")
    assert re.search(r"\d+ of 200 held-out sums are right", printed)


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch):
    """Cut short; its cells show what they are there to show."""
    path = EXAMPLES / "first_model.ipynb"
    book = nbformat.read(path, as_version=4)
    assert path.stat().st_size < 300_000
    short = "--max_steps 3 --train_batch_size 4 --model JiT-XS/4 --img_size 16 --max_tokens 64 --vocab_size 300"
    short += " --eval_fraction 0.002"
    monkeypatch.setenv("NOTEBOOK_FLAGS", short)
    monkeypatch.setenv("NOTEBOOK_RUN", str(tmp_path / "run"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    NotebookClient(book, timeout=300, resources={"metadata": {"path": str(EXAMPLES)}}).execute()
    outputs = [output for cell in book.cells if cell.cell_type == "code" for output in cell.outputs]
    printed = "".join(output.text for output in outputs if output.output_type == "stream")
    assert "bits per byte" in printed and "license: mit" in printed and "saved " in printed
    shown = {kind for output in outputs if output.output_type == "display_data" for kind in output.data}
    assert {"image/png", "image/gif"} <= shown
