"""The real trainer, cut up in every way: ranks, micro-batches and ZeRO stages change the loss curve by rounding."""

import json
from pathlib import Path

import pytest

from tests.support.runs import WORDS, metrics, small_flags, train_in_ranks

pytestmark = pytest.mark.usefixtures("cache")

SHIPPED = json.loads((Path(__file__).parents[2] / "ds_config.json").read_text())
STEPS, BATCH, EVAL_INTERVAL = 16, 8, 4  # an epoch of `mixed` ends within them
REFERENCE = (0, 1, 8)  # ZeRO stage, ranks, micro-batch
# What is left of 8 samples after ranks and micro-batch is accumulation. All of {0, 1, 2, 3} x {(1, 8), (2, 4), (4, 2),
# (1, 4), (2, 2), (4, 1), (1, 2), (2, 1)} have been run once, over 50 steps; these are every stage on every number of
# ranks, and every stage with and without accumulation.
MIXED = [(0, 1, 2), (0, 2, 2), (0, 4, 2), (1, 1, 4), (1, 2, 4), (1, 4, 1)]
MIXED += [(2, 1, 8), (2, 2, 1), (2, 4, 2), (3, 1, 4), (3, 2, 2), (3, 4, 2)]
FEW = [(0, 4, 2), (2, 2, 2), (3, 4, 2)]
QUICK = [("few", 1, 2, 2)]
MUON = [(0, 2, 4), (1, 1, 4), (3, 4, 2)]
# Relative, over all steps. Measured over these at most: loss 4.8e-7, gradient norm 9.2e-7, bits per token 1.3e-6,
# validation 1.7e-7; rounding grows to ten times as much in 50 steps. Bits of a step are those of two samples.
LOSS_TOLERANCE = 2e-6
NORM_TOLERANCE = 5e-6
BITS_TOLERANCE = 1e-5


def words(count: int, start: int) -> str:
    return " ".join(WORDS[(start * 7 + i * (1 + start % 3)) % len(WORDS)] for i in range(count))


def write_records(path: Path, lengths: list[int]) -> Path:
    """One text of each length in words; every third one is the answer to a prompt."""
    with open(path, "w", encoding="utf-8") as file:
        for number, length in enumerate(lengths):
            text = f"{words(length, number)} {number}"
            record = {"text": text} if number % 3 else {"prompt": words(1 + number % 9, number), "answer": text}
            file.write(json.dumps(record) + "\n")
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, Path]:
    """`mixed`: texts of 1 to 120 words; `few`: three, fewer than micro-batches, so that some hold padding alone."""
    folder = tmp_path_factory.mktemp("data")
    mixed = write_records(folder / "mixed.jsonl", [1 + (i * i * 31) % (120 if i % 4 == 0 else 12) for i in range(84)])
    return {"mixed": mixed, "few": write_records(folder / "few.jsonl", [1, 20, 110])}


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """(name of the data, stage, ranks, micro-batch; optimiser) -> folder of a run, trained once."""
    folders = {}

    def train(name: str, *cut: int, optimizer: str = "AdamW") -> Path:
        case = (name, *cut, optimizer)
        if case not in folders:
            folders[case] = tmp_path_factory.mktemp("run")
            train_once(folders[case], data, name, cut, optimizer=optimizer)
        return folders[case] / "run"

    return train


def settings_file(folder: Path, stage: int, micro_batch: int, optimizer: str = "AdamW") -> list:
    path = folder / f"stage_{stage}_{micro_batch}.json"
    changes = {"train_micro_batch_size_per_gpu": micro_batch, "zero_optimization": {"stage": stage}}
    changes["optimizer"] = SHIPPED["optimizer"] | {"type": optimizer}
    path.write_text(json.dumps(SHIPPED | changes))
    return ["--deepspeed_config", path]


def train_once(folder: Path, data: dict[str, Path], name: str, cut, *more, steps=STEPS, optimizer="AdamW") -> None:
    stage, ranks, micro_batch = cut
    epochs = STEPS if name == "few" else 3
    flags = small_flags(data[name], folder / "run", *settings_file(folder, stage, micro_batch, optimizer))
    flags += f"--eval_data_path {data['few']} --max_tokens 256 --epochs {epochs} --max_steps {steps} --lr 2e-3".split()
    flags.append("--no_packing")
    flags += "--enable_condition --ema_decay 0.9".split()
    flags += f"--train_batch_size {BATCH} --eval_interval {EVAL_INTERVAL} --save_interval 1000".split()
    train_in_ranks(ranks, [*flags, *map(str, more)])


def largest_difference(rows: list[dict], others: list[dict], key: str) -> float:
    """Relative, over all rows that have the value."""
    assert [row["step"] for row in rows] == [row["step"] for row in others]
    pairs = [(a[key], b[key]) for a, b in zip(rows, others, strict=True) if key in a or key in b]
    return max(abs(a - b) / abs(b) for a, b in pairs)


def assert_same_curve(folder: Path, reference: Path, record) -> None:
    rows, expected = metrics(folder), metrics(reference)
    assert len(expected) == STEPS
    for key in ("step", "epoch", "consumed_samples", "lr", "valid_tokens"):
        assert [row[key] for row in rows] == [row[key] for row in expected], key
    in_one_step = any("bits_per_token" in row for row in expected)  # else steps measure another bound
    for key, tolerance in {
        "loss": LOSS_TOLERANCE,
        "grad_norm": NORM_TOLERANCE,
        "bits_per_token" if in_one_step else "bits_per_token_many_steps": BITS_TOLERANCE,
        "val_loss": LOSS_TOLERANCE,
        "val_bits_per_token": LOSS_TOLERANCE,
    }.items():
        difference = largest_difference(rows, expected, key)
        record(key, difference)
        assert difference < tolerance, key
    assert best(folder) == pytest.approx(best(reference), rel=LOSS_TOLERANCE)


def best(folder: Path) -> tuple[int, float]:
    """Step and value of the best validation."""
    root = folder / "checkpoints"
    state = json.loads((root / (root / "best").read_text().strip() / "trainer_state.json").read_text())
    return state["step"], state["best"]


@pytest.fixture
def record(record_property, capsys):
    """Reports a difference beside the test's name."""

    def report(key: str, difference: float) -> None:
        record_property(key, difference)
        with capsys.disabled():
            print(f"  {key} {difference:.1e}", end="")

    return report


@pytest.mark.parametrize(
    ("name", "stage", "ranks", "micro_batch"),
    QUICK
    + [pytest.param("mixed", *case, marks=pytest.mark.slow) for case in MIXED]
    + [pytest.param("few", *case, marks=pytest.mark.slow) for case in FEW],
)
def test_every_partition_gives_one_loss_curve(name, stage, ranks, micro_batch, run, record):
    assert_same_curve(run(name, stage, ranks, micro_batch), run(name, *REFERENCE), record)


@pytest.mark.slow
def test_from_left_to_right_too(data, record, tmp_path):
    flags = ("--block_size", 1, "--noisy_depth", 1, "--timesteps", "noisy")
    for folder, cut in ((tmp_path / "whole", REFERENCE), (tmp_path / "cut", (3, 2, 2))):
        folder.mkdir()
        train_once(folder, data, "few", cut, *flags)
    assert_same_curve(tmp_path / "cut" / "run", tmp_path / "whole" / "run", record)


def train_batch_of_four(folder: Path, data: dict[str, Path], ranks: int, stage: str) -> list[dict]:
    """A short run whose micro-batch and accumulation are left open -> its metrics."""
    path = folder / "stage.json"
    path.write_text(json.dumps(SHIPPED | {"zero_optimization": {"stage": stage}}))
    flags = small_flags(
        data["mixed"], folder / "run", "--train_batch_size", 4, "--no_packing", "--deepspeed_config", path
    )
    train_in_ranks(ranks, [*flags, "--eval_data_path", str(data["few"]), "--timesteps", "entropic"])
    resolved = json.loads((folder / "run" / "ds_config.json").read_text())
    assert resolved["train_batch_size"] == json.loads((folder / "run" / "config.json").read_text())["train_batch_size"]
    assert resolved["train_batch_size"] == 4
    assert resolved["train_micro_batch_size_per_gpu"] == -(-4 // ranks)
    return metrics(folder / "run")


@pytest.fixture(scope="module")
def on_one_rank(data, tmp_path_factory) -> list[dict]:
    return train_batch_of_four(tmp_path_factory.mktemp("one"), data, 1, "auto")


@pytest.mark.parametrize(
    "cut", [(3, 2), (5, "auto"), *(pytest.param(cut, marks=pytest.mark.slow) for cut in [(2, "auto"), (5, 3)])], ids=str
)
def test_a_train_batch_of_four_is_the_same_run_on_any_number_of_ranks(cut, data, on_one_rank, record, tmp_path):
    """Also where they cannot share it evenly, or where there are more ranks than texts."""
    rows = train_batch_of_four(tmp_path, data, *cut)
    assert len(rows) == 4 and [row["consumed_samples"] for row in rows] == [4, 8, 12, 16]
    assert [row["valid_tokens"] for row in rows] == [row["valid_tokens"] for row in on_one_rank]
    for key, tolerance in (("loss", LOSS_TOLERANCE), ("grad_norm", NORM_TOLERANCE), ("val_loss", LOSS_TOLERANCE)):
        difference = largest_difference(rows, on_one_rank, key)
        record(key, difference)
        assert difference < tolerance, key


@pytest.mark.parametrize("cut", [(2, 2, 2), *(pytest.param(c, marks=pytest.mark.slow) for c in MUON)])
def test_muon_puts_matrices_together(cut, run, record):
    """What ZeRO cuts up is made orthogonal as a whole."""
    folders = (run("mixed", *each, optimizer="Muon") for each in (cut, REFERENCE))
    assert_same_curve(*folders, record)


@pytest.mark.parametrize(
    ("optimizer", "cuts"),
    [
        ("AdamW", [(2, 2, 4), (0, 1, 8)]),
        pytest.param("AdamW", [(0, 2, 4), (3, 4, 2), (1, 1, 2), (2, 4, 1)], marks=pytest.mark.slow),
        # Matrices have one moment and the rest has two, wherever they go.
        pytest.param("Muon", [(0, 2, 4), (3, 2, 4), (1, 1, 2), (2, 2, 2)], marks=pytest.mark.slow),
    ],
)
def test_resuming_on_other_ranks_and_stages_goes_on_with_the_same_curve(optimizer, cuts, data, run, record, tmp_path):
    """Data position, noise, schedule, optimiser state and averages (which are validated) survive every change."""
    ends = [STEPS * number // len(cuts) for number in range(1, len(cuts) + 1)]
    train_once(tmp_path, data, "mixed", cuts[0], steps=ends[0], optimizer=optimizer)
    for (stage, ranks, micro_batch), end in zip(cuts[1:], ends[1:], strict=True):
        flags = ["--resume", "latest", "--output_dir", tmp_path / "run", "--max_steps", end]
        flags += settings_file(tmp_path, stage, micro_batch, optimizer)
        printed = train_in_ranks(ranks, list(map(str, flags)))
        assert "resumed" in printed
    assert_same_curve(tmp_path / "run", run("mixed", *REFERENCE, optimizer=optimizer), record)
