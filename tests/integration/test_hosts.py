"""Two hosts on one machine: the launch scripts run the trainer across them, lose one, and go on with the other."""

import re
import shlex
import shutil
import sys
import time
from pathlib import Path

import pytest

from tests.support.hosts import ADDRESSES, Hosts, skip_without_hosts
from tests.support.runs import copy_project, learned, metrics, write_corpus

pytestmark = pytest.mark.slow
STEPS = 30
LOST_AT = 8  # a host is lost once this step is saved


@pytest.fixture(scope="module")
def hosts():
    skip_without_hosts()
    with Hosts() as hosts:
        yield hosts


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """The folder that the hosts share: the project, a corpus, a hostfile, and the runs."""
    project = copy_project(tmp_path_factory.mktemp("hosts"))
    write_corpus(project)
    (project / "hostfile").write_text("# two of them\n" + "".join(f"{host} slots=1\n" for host in ADDRESSES))
    return project


@pytest.fixture(scope="module")
def environment(project) -> dict[str, str]:
    return {
        "VENV": sys.prefix,
        "PATH": f"{sys.prefix}/bin:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
        "PYTHONPATH": str(project),
        "HF_DATASETS_CACHE": str(project / "cache"),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
    }


def flags(run: str) -> str:
    sizes = "--model JiT-XS/4 --img_size 16 --max_tokens 64 --vocab_size 300 --train_batch_size 8 --no_packing"
    intervals = f"--log_interval 1 --eval_interval 1000 --save_interval 4 --num_samples 0 --max_steps {STEPS}"
    return f"--data_path corpus.txt --output_dir {run} {sizes} {intervals}"


def multinode(run: str) -> str:
    return f"bash launch/multinode.sh hostfile {flags(run)}"


def saved(run: Path) -> int:
    """The last step that is saved, 0 before the first."""
    latest = run / "checkpoints" / "latest"
    return int(latest.read_text().removeprefix("step_")) if latest.is_file() else 0


def wait_for_step(run: Path, step: int, calls) -> None:
    deadline = time.monotonic() + 300
    while saved(run) < step:
        for call in calls:
            assert call.poll() is None, call.communicate()[0]
        assert time.monotonic() < deadline, f"{run} does not get to step {step}"
        time.sleep(0.05)


def end_of(call, timeout: float = 240) -> tuple[int, str]:
    printed, _ = call.communicate(timeout=timeout)
    return call.returncode, printed


def wait_for_the_end(hosts, names, seconds: float = 120) -> None:
    """Until no process of a run is left on these hosts."""
    deadline = time.monotonic() + seconds
    while any("ds_tokimg train" in hosts.run(name, "ps -eo args") for name in names):
        assert time.monotonic() < deadline, "ranks were left behind"
        time.sleep(0.5)


@pytest.fixture(scope="module")
def reference(hosts, project, environment) -> list[dict]:
    """What an uninterrupted run learns: torchrun on both hosts."""
    command = f"torchrun --nnodes 2 --rdzv_backend c10d --rdzv_id 1 --rdzv_endpoint {ADDRESSES['node1']}:29400 "
    command += f"-m ds_tokimg train {flags('torchrun')}"
    calls = [hosts.start(host, command, project, environment) for host in ADDRESSES]
    for call in calls:
        code, printed = end_of(call)
        assert code == 0, printed
    assert [row["step"] for row in metrics(project / "torchrun")] == list(range(1, STEPS + 1))
    return learned(metrics(project / "torchrun"))


@pytest.mark.parametrize("launcher", ["pdsh", "ssh"])
def test_a_signal_to_multinode_saves_on_all_hosts(launcher, hosts, project, environment, reference):
    if launcher == "pdsh" and shutil.which("pdsh") is None:
        pytest.skip("pdsh is not installed")
    run, sessions = project / f"signal-{launcher}", set(Path("/tmp").glob("ds_tokimg.*"))
    command = f"echo $$ >pid && exec {multinode(run.name)}"
    call = hosts.start("node1", command, project, environment | {"LAUNCHER": launcher})
    wait_for_step(run, 4, [call])
    hosts.run("node1", f"kill -TERM $(cat {shlex.quote(str(project / 'pid'))})")
    _, printed = end_of(call)
    assert "stopped by a signal" in printed or launcher == "pdsh", printed  # pdsh leaves before its hosts are done
    wait_for_the_end(hosts, ADDRESSES)
    rows = learned(metrics(run))
    assert 4 <= len(rows) < STEPS and rows == reference[: len(rows)]
    assert saved(run) == len(rows)
    assert set(Path("/tmp").glob("ds_tokimg.*")) <= sessions


def test_a_folder_that_is_not_shared_is_refused(hosts, project, environment):
    hosts.restart()
    (project / "private").mkdir()
    assert hosts.run("node2", f"mount -t tmpfs none {project / 'private'}") == ""
    call = hosts.start("node1", multinode("private/run"), project, environment | {"LAUNCHER": "ssh"})
    code, printed = end_of(call)
    assert code == 2 and "--output_dir private/run is not visible on every node" in printed, printed
    assert not (project / "private" / "run" / "checkpoints").exists()


@pytest.mark.parametrize("launcher", ["ssh", "pdsh"])
def test_a_lost_host_ends_the_run_and_the_other_resumes_it_alone(launcher, hosts, project, environment, reference):
    if launcher == "pdsh" and shutil.which("pdsh") is None:
        pytest.skip("pdsh is not installed")
    hosts.restart()
    run = project / f"lost-{launcher}"
    call = hosts.start("node1", multinode(run.name), project, environment | {"LAUNCHER": launcher})
    wait_for_step(run, LOST_AT, [call])
    hosts.kill("node2")
    code, printed = end_of(call)
    assert code != 0 and re.search(r"rank 1 \(process \d+ on node2\) is gone, at step \d+", printed), printed
    wait_for_the_end(hosts, ["node1"])
    step = saved(run)
    assert LOST_AT <= step < STEPS
    command = f"python -m ds_tokimg train --resume latest --output_dir {run} --max_steps {STEPS}"
    resume = hosts.start("node1", command, project, environment)
    code, printed = end_of(resume)
    assert code == 0 and re.search(rf"step_0*{step}\b.* was written by 2 ranks.*this run has 1 rank", printed), printed
    rows = learned(metrics(run))
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert rows[:step] == reference[:step]
    for row, expected in zip(rows[step:], reference[step:], strict=True):
        for key in ("loss", "grad_norm", "lr", "bits_per_token_many_steps", "valid_tokens"):
            assert row[key] == pytest.approx(expected[key], rel=1e-4), (row["step"], key)
