"""The checks before a commit run clean on the project, with the tools of the environment alone."""

import importlib.util
import os
import shutil
import subprocess
import sys

import pytest

from tests.support.runs import ROOT

MISSING = [name for name in ("pre_commit", "pre_commit_hooks") if importlib.util.find_spec(name) is None]


def git(folder, *arguments: str) -> str:
    command = ["git", "-c", "safe.directory=*", *arguments]  # a checkout may belong to another user
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout


@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (requirements-dev.txt)")
@pytest.mark.skipif(not (ROOT / ".git").exists() or shutil.which("git") is None, reason="no git checkout: which files?")
def test_pre_commit_finds_nothing(tmp_path):
    """On a copy of the files as they are: hooks may write, and git is asked which files there are."""
    for name in git(ROOT, "ls-files").splitlines():
        if (ROOT / name).is_file():
            (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / "copy" / name)
    git(tmp_path / "copy", "init", "-q")
    git(tmp_path / "copy", "add", "-A")
    path = f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [sys.executable, "-m", "pre_commit", "run", "--all-files", "--color", "never"],
        cwd=tmp_path / "copy",
        env=os.environ | {"PRE_COMMIT_HOME": str(tmp_path / "home"), "PATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Passed" in done.stdout and "Failed" not in done.stdout
