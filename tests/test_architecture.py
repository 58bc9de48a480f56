"""The house rules: which package may import which, and who talks to DeepSpeed."""

import ast
import re
from pathlib import Path

import pytest

from tests.support.runs import ROOT

PACKAGE = ROOT / "ds_tokimg"
FILES = sorted(PACKAGE.rglob("*.py"))
# What a package may import besides itself; packages of one line do not know each other.
STOREYS = (
    ("errors", "choices", "console", "recipes", "diffusion"),
    ("settings", "tokens"),
    ("data", "engine", "model"),
    ("inference",),
    ("training",),
    ("commands",),
)
STOREY = {name: number for number, names in enumerate(STOREYS) for name in names}
# Help, mistakes and names are found without what takes seconds to import.
ENTRANCES = ("__init__", "__main__")


def imported(file: Path) -> list[str]:
    """The modules that a file imports, anywhere in it."""
    modules = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: relative import"
            modules += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return modules


def package_of(file: Path) -> str:
    return file.relative_to(PACKAGE).with_suffix("").parts[0]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(PACKAGE).as_posix())
def test_imports_go_one_way(file):
    own = package_of(file)
    if own in ENTRANCES:
        return
    parts = [module.split(".") for module in imported(file) if module.startswith("ds_tokimg.")]
    for name in {part[1] for part in parts} & set(STOREY) - {own}:
        assert name in ("errors", "choices", "console") or STOREY[name] < STOREY[own], f"{own} may not import {name}"


def test_every_package_has_its_storey():
    assert {package_of(file) for file in FILES} - set(ENTRANCES) <= set(STOREY)


def test_deepspeed_is_imported_by_the_engine_alone():
    for file in FILES:
        modules = {module.split(".")[0] for module in imported(file)}
        assert "deepspeed" not in modules or package_of(file) == "engine", file


# ---- functions ----

MOST_PARAMETERS = 7
# The public constructor of a data set keeps its keywords.
WITH_MORE = {"data/dataset.py: TokenImageDataset.__init__"}


def functions_of(node: ast.AST, name: str = ""):
    """(name, definition) of every function inside, methods as Class.method."""
    for child in ast.iter_child_nodes(node):
        own = f"{name}.{child.name}".lstrip(".") if hasattr(child, "name") else name
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield own, child
        yield from functions_of(child, own)


def parameters_of(function) -> list[str]:
    arguments = function.args
    named = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return [name for name in named if name not in ("self", "cls", "ctx")]


def test_no_function_has_more_parameters_than_one_can_hold():
    many = set()
    for file in FILES:
        for name, function in functions_of(ast.parse(file.read_text(encoding="utf-8"))):
            if len(parameters_of(function)) > MOST_PARAMETERS:
                many.add(f"{file.relative_to(PACKAGE).as_posix()}: {name}")
    assert many == WITH_MORE


def test_the_tour_names_files_that_exist():
    """CONTRIBUTING.md: five files, one after the other, and every package."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    files = re.findall(r"^\d\. \[`(.+?)`\]", text, re.M)
    assert len(files) == 5 and all((ROOT / file).is_file() for file in files)
    assert all(f"`{name}/`" in text or f"`{name}.py`" in text for name in set(STOREY))
