"""The proof that two runs are the same finds what differs, and nothing where nothing does."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from benchmarks import proof

ROWS = [{"step": 1, "loss": 2.5, "step_seconds": 0.1}, {"step": 2, "loss": 2.0, "val_loss": float("nan")}]


@pytest.fixture
def make_run(tmp_path):
    """A function that writes a run: its rows, and the weights of its last checkpoint."""

    def make(name: str, rows=ROWS, weight: float = 1.0, parameter: str = "w"):
        folder = tmp_path / name
        last = folder / "checkpoints" / "step_00000002"
        last.mkdir(parents=True)
        (folder / "checkpoints" / "step_00000001").mkdir()
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for file in ("model.safetensors", "ema_0.9999.safetensors"):
            save_file({parameter: np.full(3, weight, np.float32), "b": np.zeros(2, np.float32)}, last / file)
        return folder

    return make


def prove(capsys, *arguments) -> tuple[int, list[str]]:
    code = proof.main([str(argument) for argument in arguments])
    return code, capsys.readouterr().out.splitlines()


def test_equal_runs_are_the_same_whatever_the_clock_says(make_run, capsys):
    slower = [ROWS[0] | {"step_seconds": 9.9}, ROWS[1]]
    code, printed = prove(capsys, make_run("a"), make_run("b", slower))
    assert (code, printed) == (0, ["the same: 2 rows of metrics, ema_0.9999.safetensors, model.safetensors at step 2"])


def test_every_difference_is_listed(make_run, capsys):
    other = [ROWS[0] | {"loss": 2.5000000000000004}, ROWS[1] | {"more": 1}, ROWS[1]]
    code, printed = prove(
        capsys, make_run("a"), make_run("b", other, weight=np.nextafter(np.float32(1), np.float32(2)))
    )
    assert code == 1
    assert printed == [
        "metrics.jsonl: 2 rows before, 3 after",
        "metrics.jsonl, step 1, loss: 2.5 before, 2.5000000000000004 after",
        "metrics.jsonl, step 2, more: missing before, 1 after",
        "ema_0.9999.safetensors, w: not the same bits",
        "model.safetensors, w: not the same bits",
    ]


def test_other_names_count_unless_they_may_differ(make_run, capsys):
    runs = make_run("a"), make_run("b", parameter="v"), make_run("c", parameter="v", weight=2.0)
    code, printed = prove(capsys, *runs[:2])
    assert code == 1 and printed[:2] == [
        "ema_0.9999.safetensors, w: only before",
        "ema_0.9999.safetensors, v: only after",
    ]
    assert prove(capsys, *runs[:2], "--renamed")[0] == 0
    code, printed = prove(capsys, runs[0], runs[2], "--renamed")
    assert code == 1 and printed[0] == "ema_0.9999.safetensors: 1 parameters of before have no equal after"


def test_what_is_no_run_is_said(make_run, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        proof.main([str(make_run("a")), str(tmp_path / "missing")])
    assert ended.value.code == 2 and "is no run" in capsys.readouterr().err
