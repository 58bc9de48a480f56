"""The documentation: it builds without a warning, its commands parse, its paths exist, its figures are the data's."""

import dataclasses
import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import tables
from ds_tokimg.__main__ import COMMANDS
from ds_tokimg.settings import engine_schema
from ds_tokimg.settings.command_line import build_parser
from ds_tokimg.settings.config import TrainConfig
from tests.support.runs import ROOT, metrics, small_flags, train_in_ranks, write_corpus

PAGES = sorted([*(ROOT / "docs").rglob("*.md"), ROOT / "README.md"])
FIVE_FILES = [
    "ds_tokimg/recipes/at-once.toml",
    "ds_tokimg/training/loop.py",
    "ds_tokimg/training/objective.py",
    "ds_tokimg/model/jit.py",
    "ds_tokimg/engine/engine.py",
]
PACKAGE = ROOT / "ds_tokimg"


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def commands(page: Path) -> list[list[str]]:
    """The words of every command in the page's bash blocks, indented ones too."""
    blocks = re.findall(r"^ *```bash\n(.*?)^ *```", page.read_text(encoding="utf-8"), re.S | re.M)
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", "").splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line]


def flags_of(words: list[str]) -> tuple[str, list[str]] | None:
    """The trainer's command and flags in a command line; None where it starts something else."""
    if words[0] == "ds-tokimg":
        return words[1], words[2:]
    if words[:2] == ["bash", "launch/train.sh"]:
        own = words.index("--max_restarts") if "--max_restarts" in words else len(words)  # the script's own flag
        return "train", ["--data_path", "x", *words[2:own], *words[own + 2 :]]
    if "ds_tokimg" in words:
        place = words.index("ds_tokimg")
        return words[place + 1], words[place + 2 :]
    return None


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_have_flags_that_exist(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where no run is, whose settings a resumed one would take
    for words in commands(page):
        if (found := flags_of(words)) is None:
            continue
        command, flags = found
        module = importlib.import_module(f"ds_tokimg.commands.{command}")
        if command in ("train", "plan", "preview"):
            unknown = parser_of(command).parse_known_args(flags)[1]
            assert not unknown, f"{words}: {unknown}"
        else:
            module._parser().parse_args(flags)


def parser_of(command: str):
    if command != "train":
        return importlib.import_module(f"ds_tokimg.commands.{command}")._parser([])
    return build_parser(command, "", [])


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_and_paths_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    generated = ("measured/", "reference/commands.md", "reference/settings.md", "reference/engine-json.md")
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        inside = (page.parent / target).resolve()
        made = inside.is_relative_to(ROOT / "docs") and name_of(inside).removeprefix("docs/").startswith(generated)
        assert "://" in target or made or inside.exists(), f"{target}: no such file"
    for line in re.findall(r"^→ (.*(?:\n`.*)*)", text, re.M):
        for path in re.findall(r"`([^`]+)`", line):
            assert (PACKAGE / path).exists(), f"{path}: no such file of ds_tokimg"


def test_generated_pages_have_every_flag_and_key(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    pages = importlib.import_module("generate").pages()
    for field in dataclasses.fields(TrainConfig):
        assert f"| `--{field.name}`" in pages["reference/settings.md"]
    for command in COMMANDS:
        assert f"## {command}\n" in pages["reference/commands.md"]
    for key in {key for keys in (engine_schema.TOP_LEVEL, *engine_schema.BLOCKS.values()) for key in keys}:
        assert f"| `{key}` |" in pages["reference/engine-json.md"]


def test_the_readme_names_the_five_files_in_order():
    numbered = re.findall(r"^\d\. \[`([^`]+)`\]", (ROOT / "README.md").read_text(encoding="utf-8"), re.M)
    assert numbered == FIVE_FILES
    assert all((ROOT / file).is_file() for file in FIVE_FILES)


def test_the_readme_maps_every_package():
    named = re.findall(r"^\| `(\w+)/` \|", (ROOT / "README.md").read_text(encoding="utf-8"), re.M)
    packages = {file.parent.name for file in PACKAGE.glob("*/__init__.py")}
    assert len(named) == len(set(named)) and set(named) == packages


@pytest.mark.parametrize("page", tables.PAGES, ids=name_of)
def test_tables_are_those_of_the_data(page):
    text = page.read_text(encoding="utf-8")
    assert tables.TABLE.search(text)
    assert tables.filled(text, tables.read_rows()) == text, "run python -m benchmarks.tables"


@pytest.mark.slow
def test_a_run_leaves_what_the_reference_says(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    run = tmp_path / "run"
    train_in_ranks(1, small_flags(write_corpus(tmp_path), run, "--num_samples", 1))
    page = (ROOT / "docs" / "reference" / "run-folder.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", page, re.M)
    named = {key for row in rows for key in re.findall(r"\w+", row)}
    of_others = {"bits_per_token", "skipped", "skipped_images"}  # of other methods, and of runs that skip steps
    assert {key for row in metrics(run) for key in row} == named - of_others
    tree = re.search(r"^    config\.json.*?^$", page, re.S | re.M)[0]
    files = {re.split(" {2,}", line.strip())[0].rstrip("/") for line in tree.splitlines()}
    checkpoint = next((run / "checkpoints").glob("step_*"))
    folders = (run, run / "checkpoints", checkpoint, run / "samples", run / "samples" / checkpoint.name)
    left = {path.name for folder in folders for path in folder.iterdir()}
    engine_files = {name for name in left if name.endswith("_states.pt")}
    assert left - {checkpoint.name} - engine_files == files - {"step_00001000", "…"}


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    for module in ("material", "mkdocstrings"):
        pytest.importorskip(module, reason=f"{module} is not installed")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    settings = (tmp_path / "site" / "reference" / "settings" / "index.html").read_text(encoding="utf-8")
    assert "--data_path" in settings
    for page in (tmp_path / "site").rglob("*.html"):
        loaded = re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="(https?://[^"]+)', page.read_text("utf-8"))
        assert not loaded, f"{page}: loads {loaded}"
