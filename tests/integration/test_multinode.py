"""What launch/multinode.sh hands to other hosts and leaves behind. `ssh` and `deepspeed` are stand-ins that write down
what they get; test_hosts.py runs the real ones."""

import os
import shlex
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from tests.support.runs import ROOT

SSH = """#!/usr/bin/env bash
while [ "$1" != -- ]; do shift; done
echo "$2" >>"$SEEN/hosts"
shift 2
printf '%s\\n' "$*" >>"$SEEN/commands"
exec bash -c "$*"
"""
DEEPSPEED = """#!/usr/bin/env bash
name=$SEEN/$$
env -0 >"$name.environment"
printf '%s\\0' "$@" >"$name.words"
if [ -n "${DS_ENV_FILE:-}" ]; then
    cp "$DS_ENV_FILE" "$SEEN/file"
    stat -c %a "$DS_ENV_FILE" "$(dirname "$DS_ENV_FILE")" >"$SEEN/modes"
else
    stat -c %a "$TMPDIR"/ds_tokimg.*.[01] >>"$SEEN/modes" || : # the other one may have ended by now
fi
"""
SECRETS = ("HF_TOKEN", "WANDB_API_KEY", "DS_SECRET", "NCCL_PASSWORD_FILE", "HF_MY_KEY", "OMP_TOKEN")


@pytest.fixture
def project(tmp_path) -> Path:
    """launch/ in a folder with a blank and a quote in its name, and an environment that holds the stand-ins."""
    project = tmp_path / "it's a project"
    shutil.copytree(ROOT / "launch", project / "launch")
    for file in ("requirements.txt", "requirements-dev.txt"):
        shutil.copy(ROOT / file, project)
    tools = tmp_path / "venv" / "bin"
    tools.mkdir(parents=True)
    stamp = b"".join(file.read_bytes() for file in sorted(project.glob("requirements*.txt")))
    (tmp_path / "venv" / "requirements.txt.installed").write_bytes(stamp)
    for name, script in {
        "ssh": SSH,
        "deepspeed": DEEPSPEED,
        "pdsh": "#!/bin/sh\n",
        "hostname": "#!/bin/sh\necho 10.0.0.1\n",
    }.items():
        (tools / name).write_text(script)
        (tools / name).chmod(0o755)
    (project / "hostfile").write_text("  node1 slots=1\n# no host\nnode2 slots=1\n")
    (tmp_path / "seen").mkdir()
    (tmp_path / "tmp").mkdir()
    return project


def start(project: Path, launcher: str, *words: str, **variables: str) -> Path:
    """Runs the script -> the folder with what the stand-ins saw."""
    top = project.parent
    environment = {
        "PATH": f"{top / 'venv' / 'bin'}:/usr/bin:/bin",
        "HOME": str(top),
        "VENV": str(top / "venv"),
        "SEEN": str(top / "seen"),
        "TMPDIR": str(top / "tmp"),
        "LAUNCHER": launcher,
        "NCCL_DEBUG": "a b; touch pwned",
        **dict.fromkeys(SECRETS, "s3cret"),
        **variables,
    }
    command = ["bash", "launch/multinode.sh", "hostfile", *words]
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    return top / "seen"


WORDS = ["--data_path", "a b", "--recipe", "it's; touch pwned", "--seed", "", "$(touch pwned)", 'say "x" `y` \\z $H']


def test_words_and_variables_arrive_as_they_are(project):
    seen = start(project, "ssh", *WORDS)
    # The first one also for its address; they are started together.
    assert sorted((seen / "hosts").read_text().split()) == ["node1", "node1", "node2"]
    words = [file.read_bytes().decode().split("\0")[:-1] for file in seen.glob("*.words")]
    assert len(words) == 2 and all(each[-len(WORDS) :] == WORDS for each in words)
    assert {each[each.index("--node_rank") + 1] for each in words} == {"0", "1"}
    for file in seen.glob("*.environment"):
        variables = file.read_bytes().decode().split("\0")
        assert "NCCL_DEBUG=a b; touch pwned" in variables
    assert not list(project.rglob("pwned"))


@pytest.mark.parametrize("launcher", ["ssh", "pdsh"])
def test_tokens_and_keys_stay_here_unless_they_are_named(launcher, project):
    (project / ".deepspeed_env").write_text("HF_TOKEN=of an earlier version\n")
    seen = start(project, launcher, "--data_path", "x")
    given = "commands" if launcher == "ssh" else "file"
    assert "s3cret" not in (seen / given).read_text()
    assert not (project / ".deepspeed_env").exists()
    for file in seen.iterdir():
        file.unlink()
    seen = start(project, launcher, "--data_path", "x", PASS_ENV="HF_TOKEN")
    if launcher == "ssh":
        assert "s3cret" not in (seen / "commands").read_text()  # which everybody on a host can read
        variables = next(seen.glob("*.environment")).read_bytes().decode().split("\0")
        assert "HF_TOKEN=s3cret" in variables
    else:
        lines = (seen / "file").read_text().splitlines()
        assert "HF_TOKEN=s3cret" in lines and not any(line.startswith(SECRETS[1:]) for line in lines)


@pytest.mark.parametrize("launcher", ["ssh", "pdsh"])
def test_what_is_left_in_tmp_is_for_its_owner_alone_and_goes(launcher, project):
    seen = start(project, launcher, "--data_path", "x")
    modes = set((seen / "modes").read_text().split())
    assert modes == ({"700"} if launcher == "ssh" else {"600", "700"})
    assert not list((project.parent / "tmp").iterdir())


def test_pdsh_gets_words_that_survive_a_shell(project):
    """DeepSpeed puts words with blanks between double quotes, and nothing else; then a shell reads them."""
    seen = start(project, "pdsh", *WORDS)
    words = next(seen.glob("*.words")).read_bytes().decode().split("\0")[:-1]
    given = words[words.index("train") + 1 :]
    line = " ".join('"{}"'.format(word.replace('"', '\\"')) if " " in word else word for word in given)
    printed = subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, cwd=project).stdout
    assert printed.decode().split("\0")[:-1] == WORDS
    lines = "; ".join(f"export {line}" for line in (seen / "file").read_text().splitlines())
    echoed = subprocess.run(
        ["bash", "-c", f'{lines}; printf %s "$NCCL_DEBUG"'], capture_output=True, text=True, cwd=project
    )
    assert echoed.stdout == "a b; touch pwned" and not list(project.rglob("pwned"))


@pytest.mark.parametrize("name", ["-oProxyCommand=x", "a;b", "$(x)", "a'b"])
def test_a_hostfile_holds_names(name, project):
    (project / "hostfile").write_text(f"{name} slots=1\n")
    command = ["bash", "launch/multinode.sh", "hostfile", "--data_path", "x"]
    environment = os.environ | {"VENV": str(project.parent / "venv")}
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "is no host name" in done.stderr


@pytest.mark.parametrize(
    ("words", "expected"), [([], ["--host", "localhost"]), (["runs", "--bind_all"], ["--bind_all"])]
)
def test_tensorboard_is_for_this_machine_unless_told_otherwise(words, expected, project):
    tool = project.parent / "venv" / "bin" / "tensorboard"
    tool.write_text('#!/bin/sh\necho "$@"\n')
    tool.chmod(stat.S_IRWXU)
    environment = os.environ | {"VENV": str(project.parent / "venv")}
    command = ["bash", "launch/tensorboard.sh", *words]
    printed = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True).stdout
    assert shlex.split(printed)[:1] + shlex.split(printed)[2:] == ["--logdir", *expected]  # links to the runs between
