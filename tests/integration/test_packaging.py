"""The package as people install it: the wheel, its program from another folder, every Python that it is for."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import ds_tokimg
from ds_tokimg.settings import engine_json
from tests.support.runs import ROOT, write_corpus

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Commands whose help and mistakes need nothing but Python itself.
WITHOUT_TORCH = """
import sys
from ds_tokimg.__main__ import main
from ds_tokimg.errors import UserError
from ds_tokimg.settings import engine_json, formats
from ds_tokimg.settings.config import TrainConfig

def help_of(*words):
    try:
        return main([*words, "--help"])
    except SystemExit as end:
        return end.code

assert help_of() == help_of("train") == help_of("plan") == help_of("preview") == help_of("chat") == 0
assert main(["train", "--epochs", "0"]) == main(["trian"]) == 2
engine_json.read(engine_json.SHIPPED)
TrainConfig(data_path="x").save("config.json")
assert TrainConfig.load("config.json") == TrainConfig(data_path="x")
open("broken.json", "w").write('{"data_pth": 1}')
for path, error in (("broken.json", "data_path"), ("missing.json", "cannot be read")):
    try:
        TrainConfig.load(path)
    except UserError as problem:
        assert error in str(problem)
    else:
        raise AssertionError(path)
assert not {"torch", "numpy", "deepspeed", "transformers"} & set(sys.modules)
"""


def _run(*command, cwd: Path, **environment) -> subprocess.CompletedProcess:
    names = ("PYTHONPATH", "PYTHONHOME")
    clean = {key: value for key, value in os.environ.items() if key not in names} | environment
    return subprocess.run(list(map(str, command)), cwd=cwd, env=clean, capture_output=True, text=True, timeout=300)


def test_the_shipped_json_is_the_one_that_users_edit():
    """One file: the package's is a link to the root's (or, where links were lost in copying, its exact copy)."""
    assert engine_json.SHIPPED.read_bytes() == (ROOT / "ds_config.json").read_bytes()
    if (ROOT / ".git").exists():
        assert engine_json.SHIPPED.is_symlink()
        assert engine_json.SHIPPED.resolve() == (ROOT / "ds_config.json").resolve()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, because a build leaves its folder behind."""
    pytest.importorskip("setuptools", reason="a build without a network needs setuptools here")
    folder = tmp_path_factory.mktemp("build")
    project = folder / "project"
    project.mkdir()
    for name in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE", "ds_config.json"):
        shutil.copy(ROOT / name, project)
    shutil.copytree(ROOT / "ds_tokimg", project / "ds_tokimg", symlinks=True)
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--wheel-dir", folder)
    built = _run(sys.executable, "-m", "pip", "wheel", *options, project, cwd=folder)
    assert built.returncode == 0, built.stderr
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The wheel without its dependencies, in a folder of its own."""
    folder = tmp_path_factory.mktemp("installed")
    options = ("--quiet", "--no-deps", "--no-index", "--disable-pip-version-check", "--target", folder)
    done = _run(sys.executable, "-m", "pip", "install", *options, wheel, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_the_wheel_is_whole(wheel):
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.startswith("ds_tokimg/")}
        metadata = Parser().parsestr(archive.read(f"ds_tokimg-{ds_tokimg.__version__}.dist-info/METADATA").decode())
        shipped = archive.read("ds_tokimg/settings/ds_config.json")
    here = {path.relative_to(ROOT).as_posix() for path in (ROOT / "ds_tokimg").rglob("*") if path.is_file()}
    assert packed == {name for name in here if "__pycache__" not in name}
    assert shipped == (ROOT / "ds_config.json").read_bytes()
    lines = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    assert metadata.get_all("Requires-Dist") == [line for line in lines if line]
    assert metadata["Requires-Python"] == ">=3.11"


@pytest.mark.slow
def test_the_program_runs_from_another_folder(installed, tmp_path):
    program, corpus = installed / "bin" / "ds-tokimg", write_corpus(tmp_path)
    environment = {"PYTHONPATH": str(installed), "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    flags = "--model JiT-XS/4 --img_size 16 --max_tokens 64 --vocab_size 300 --train_batch_size 4 --max_steps 1"
    help_ = _run(program, "--help", cwd=tmp_path, **environment)
    assert help_.returncode == 0 and help_.stdout.startswith("usage: ds-tokimg COMMAND")
    wrong = _run(program, "train", "--epochs", cwd=tmp_path, **environment)
    assert wrong.returncode == 2 and wrong.stderr.endswith("(see ds-tokimg train --help)\n")
    run = _run(
        program, "train", "--data_path", corpus.name, "--num_samples", "0", *flags.split(), cwd=tmp_path, **environment
    )
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "runs" / "default" / "checkpoints" / "latest").is_file()
    plan = _run(program, "plan", "--data_path", corpus.name, *flags.split(), cwd=tmp_path, **environment)
    assert plan.returncode == 0 and "GB per rank" in plan.stdout, plan.stderr
    export = _run(program, "export", "--checkpoint", "runs/default", "--output", "model", cwd=tmp_path, **environment)
    assert export.returncode == 0 and (tmp_path / "model" / "model.safetensors").is_file(), export.stderr


def _interpreter(version: str) -> str | None:
    """A Python of this version: on the PATH, or one of pyenv's."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for candidate in (shutil.which(f"python{version}"), *pyenv.glob(f"{version}.*/bin/python{version}")):
        if candidate and subprocess.run([candidate, "-c", ""], capture_output=True).returncode == 0:
            return str(candidate)
    return None


def _stated_versions() -> list[str]:
    prefix = "Programming Language :: Python :: "
    return [line.removeprefix(prefix) for line in PROJECT["classifiers"] if line.startswith(prefix)]


def test_the_oldest_python_is_the_one_that_is_required():
    assert PROJECT["requires-python"] == f">={_stated_versions()[0]}"


@pytest.mark.parametrize("version", _stated_versions())
def test_every_python_reads_the_code_and_answers_without_torch(version, tmp_path):
    python = _interpreter(version)
    if python is None:
        pytest.skip(f"no Python {version} here")
    package = shutil.copytree(ROOT / "ds_tokimg", tmp_path / "ds_tokimg", ignore=shutil.ignore_patterns("__pycache__"))
    compiled = _run(python, "-W", "error", "-m", "compileall", "-q", package, cwd=tmp_path)
    assert compiled.returncode == 0, compiled.stdout + compiled.stderr
    done = _run(python, "-W", "error", "-c", WITHOUT_TORCH, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
