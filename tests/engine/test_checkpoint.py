"""Checkpoints: resumed bit for bit on the same topology, exactly on any other, and never torn."""

import argparse
import itertools
import json
import os
import random
import resource
import shutil
import signal
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from ds_tokimg.engine import checkpoint, elastic
from ds_tokimg.engine.engine import TrainEngine, ZeroStageEnum, fragment_address, read_engine_file
from ds_tokimg.errors import TrainingError, UserError
from ds_tokimg.settings import formats
from tests.support.distributed import (
    TinyModule,
    engine_config,
    full_state,
    run_ranks,
    start_ranks,
    tiny_engine,
    train,
)

RANKS = (1, 2, 4)
# (stage, ranks) before and after: all pairs of stages, all pairs of ranks, and on both sides each stage on each number
# of ranks. All 144 have been run once.
CHANGES = [
    ((before, RANKS[(before + after) % 3]), (after, RANKS[(2 * before + after) % 3]))
    for before, after in itertools.product(range(4), repeat=2)
]


def _train_and_save(dist, output_dir, stage, steps, more_steps, blocks):
    engine = tiny_engine(dist, stage, **blocks)
    train(engine, steps)
    engine.save(output_dir, {"epoch": 1})
    saved = full_state(engine)
    results = train(engine, more_steps)
    return [(r.loss, r.grad_norm, r.lr) for r in results], saved, full_state(engine)


def _resume(dist, output_dir, stage, more_steps, blocks):
    engine = tiny_engine(dist, stage, seed=77, **blocks)
    state = engine.load(checkpoint.find(output_dir, "latest", dist))
    assert state == {"epoch": 1, "step": engine.global_steps}
    loaded = full_state(engine)
    results = train(engine, more_steps)
    return [(r.loss, r.grad_norm, r.lr) for r in results], loaded, full_state(engine)


def _assert_equal(states, others):
    assert states.keys() == others.keys()
    for key, value in states.items():
        assert torch.equal(value, others[key]), key


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(stage, ranks) -> folder of a run saved after 4 steps, the states saved, the results and states 3 steps later."""
    runs = {}

    def run(source):
        if source not in runs:
            folder = tmp_path_factory.mktemp("run")
            runs[source] = folder, *run_ranks(source[1], _train_and_save, folder, source[0], 4, 3, {})[0]
        return runs[source]

    return run


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_same_topology_resumes_bit_for_bit(stage, trained):
    folder, expected, saved, final = trained((stage, 2))
    results, loaded, resumed_final = run_ranks(2, _resume, folder, stage, 3, {})[0]
    _assert_equal(saved, loaded)
    assert results == expected
    _assert_equal(final, resumed_final)


ODD_NAMES = ("run[1]", "*", "a?b", "{a,b} c", "é ß 図")  # DeepSpeed takes names for patterns


def _train_under_odd_names(dist, folder, stage):
    """Runs in folders whose names match a sibling's as patterns, one of them through a link, each saved and resumed on
    its own stage and on another -> (name, stage, whether it went on from its own weights)."""
    outcomes = []
    (folder / "link [x]").symlink_to(folder / ODD_NAMES[0])
    for index, name in enumerate(("run1", "aab", *ODD_NAMES, "link [x]")):
        engine = tiny_engine(dist, stage, seed=index)
        train(engine, 2)
        engine.save(folder / name, {})
        saved = full_state(engine)
        for target in (stage, 1 - stage):
            engine = tiny_engine(dist, target, seed=77)
            engine.load(checkpoint.find(folder / name, "latest", dist))
            loaded = full_state(engine)
            outcomes.append((name, target, all(torch.equal(loaded[key], value) for key, value in saved.items())))
    return outcomes


@pytest.mark.parametrize("stage", [0, 1])
def test_a_folder_of_any_name_resumes_from_its_own_weights(stage, tmp_path):
    outcomes = run_ranks(1, _train_under_odd_names, tmp_path, stage)[0]
    assert len(outcomes) == 16 and all(own for *_, own in outcomes), outcomes


@pytest.mark.parametrize("stage", [1, 3])
def test_bf16_resumes_bit_for_bit(stage, tmp_path):
    blocks = {"bf16": {"enabled": True}}
    expected, saved, final = run_ranks(2, _train_and_save, tmp_path, stage, 4, 3, blocks)[0]
    results, loaded, resumed_final = run_ranks(2, _resume, tmp_path, stage, 3, blocks)[0]
    _assert_equal(saved, loaded)
    assert results == expected
    _assert_equal(final, resumed_final)


def _assert_elastic(run, target):
    """States arrive exactly; the following steps differ by rounding alone."""
    folder, expected, saved, final = run
    results, loaded, resumed_final = run_ranks(target[1], _resume, folder, target[0], 3, {})[0]
    _assert_equal(saved, loaded)
    torch.testing.assert_close(torch.tensor(results), torch.tensor(expected), rtol=1e-5, atol=1e-6)
    for key, value in final.items():
        torch.testing.assert_close(resumed_final[key], value, rtol=1e-4, atol=1e-6)
    assert not list(folder.glob("checkpoints/.unfinished*"))


class RenamedModule(TinyModule):
    """A TinyModule of a version that calls `net` what was `model`."""

    model = property(lambda self: self.net)

    def __init__(self, seed):
        super().__init__(seed)
        self.net = self._modules.pop("model")


def _resume_renamed(dist, output_dir, stage, more_steps):
    """As `_resume`, by that version."""
    formats.RENAMED_PARAMETERS = {1: {"model": "net"}}
    engine = TrainEngine(RenamedModule(77), engine_config(stage, dist.world_size), 0.9, dist)
    engine.load(checkpoint.find(output_dir, "latest", dist))
    loaded = full_state(engine)
    return [(r.loss, r.grad_norm, r.lr) for r in train(engine, more_steps)], loaded


def _to_old_format(run_folder):
    """A checkpoint's state as format 0 wrote it, with a manifest that knows."""
    folder = checkpoint.find(run_folder)
    path = folder / "trainer_state.json"
    state = json.loads(path.read_text())
    assert state.pop("format") == formats.FORMAT
    path.write_text(json.dumps(state))
    manifest = json.loads((folder / "manifest.json").read_text())
    content = path.read_bytes()
    manifest["files"][path.name] = {"size": len(content), "crc32": zlib.crc32(content)}
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_parameters_with_new_names_find_their_weights_and_states(stage, trained, tmp_path, monkeypatch):
    source, expected, saved, _ = trained((stage, 2))
    shutil.copytree(source, tmp_path / "run")
    _to_old_format(tmp_path / "run")
    results, loaded = run_ranks(2, _resume_renamed, tmp_path / "run", stage, 3)[0]
    _assert_equal({name.replace("model.", "net."): value for name, value in saved.items()}, loaded)
    torch.testing.assert_close(torch.tensor(results), torch.tensor(expected), rtol=1e-5, atol=1e-6)
    weights = checkpoint.load_weights(checkpoint.find(tmp_path / "run"), "trained", prefix="")
    assert weights.keys() == {name.removesuffix("/fp32") for name in saved if name.endswith("/fp32")}
    monkeypatch.setattr(formats, "RENAMED_PARAMETERS", {1: {"model": "net"}})
    renamed = checkpoint.load_weights(checkpoint.find(tmp_path / "run"), "trained", prefix="net.")
    assert renamed.keys() == {name.removeprefix("model.") for name in weights}


@pytest.mark.parametrize(
    ("source", "target"),
    [((0, 2), (3, 1)), ((3, 2), (0, 1)), ((1, 2), (3, 4)), ((3, 2), (2, 1)), ((2, 2), (2, 4)), ((1, 2), (0, 2))],
)
def test_resumes_on_another_topology(source, target, trained):
    _assert_elastic(trained(source), target)


@pytest.mark.slow
@pytest.mark.parametrize(("source", "target"), CHANGES)
def test_resumes_on_every_topology(source, target, trained):
    _assert_elastic(trained(source), target)


HALF = {"bf16": {"bf16": {"enabled": True}}, "fp16": {"fp16": {"enabled": True, "initial_scale_power": 6}}}


def _in_half_precision(dist, run, *arguments):
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True  # in software, slowly
    return run(dist, *arguments)


@pytest.mark.parametrize(
    ("precision", "source", "target"),
    [
        ("bf16", (1, 2), (3, 1)),
        pytest.param("bf16", (3, 2), (2, 4), marks=pytest.mark.slow),
        pytest.param("bf16", (2, 4), (1, 1), marks=pytest.mark.slow),
        pytest.param("fp16", (3, 4), (1, 2), marks=pytest.mark.slow),
        ("fp16", (2, 1), (3, 2)),
    ],
)
def test_half_precision_resumes_on_another_topology(precision, source, target, tmp_path):
    """Masters and states arrive exactly; sums of halves depend on their order more than those of fp32."""
    blocks = HALF[precision]
    arguments = (_train_and_save, tmp_path, source[0], 4, 3, blocks)
    expected, saved, _ = run_ranks(source[1], _in_half_precision, *arguments)[0]
    results, loaded, _ = run_ranks(target[1], _in_half_precision, _resume, tmp_path, target[0], 3, blocks)[0]
    _assert_equal(saved, loaded)
    torch.testing.assert_close(torch.tensor(results), torch.tensor(expected), rtol=2e-2, atol=1e-4)


def _train_and_save_often(dist, output_dir, keep):
    """Checkpoints of steps 1 to 5; the second is the best."""
    engine = tiny_engine(dist, 1)
    for step in range(1, 6):
        train(engine, 1)
        engine.save(output_dir, {"consumed": 8 * step}, best=step == 2, keep=keep)
    return {name: engine.shards.full(p).clone() for name, p in engine.shards.params.items()}, full_state(engine)


@pytest.fixture(scope="module")
def untouched_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    run_ranks(1, _train_and_save_often, folder, 3)
    return folder


@pytest.fixture
def run_folder(untouched_run, tmp_path):
    """A run of five steps on one rank at stage 1, for a test to damage."""
    return shutil.copytree(untouched_run, tmp_path / "run")


def _steps(run_folder):
    return sorted(int(path.name.removeprefix("step_")) for path in run_folder.glob("checkpoints/step_*"))


def test_the_newest_and_the_best_are_kept(run_folder):
    assert _steps(run_folder) == [2, 3, 4, 5]
    assert checkpoint.find(run_folder, "latest").name == "step_00000005"
    assert checkpoint.find(run_folder, "best").name == "step_00000002"
    assert checkpoint.find("elsewhere", str(run_folder)).name == "step_00000005"
    third = run_folder / "checkpoints" / "step_00000003"
    assert checkpoint.find("elsewhere", str(third)) == third
    assert checkpoint.read_state(third)["consumed"] == 24


def test_weights_are_read_without_deepspeed(tmp_path):
    weights, state = run_ranks(2, _train_and_save_often, tmp_path, 1)[0]
    folder = checkpoint.find(tmp_path, "latest")
    trained = checkpoint.load_weights(folder, "trained", prefix="")
    averaged = checkpoint.load_weights(folder, prefix="")
    for name, value in weights.items():
        assert torch.equal(trained[name], value)
        assert torch.equal(averaged[name], state[f"{name}/ema_0.9"])
    assert checkpoint.load_weights(folder).keys() == {name.removeprefix("model.") for name in weights}


def _flip_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda folder: _flip_byte(folder / "mp_rank_00_model_states.pt"), "its checksum differs"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"torn"), "has 4 bytes"),
        (lambda folder: (folder / "rng.pt").unlink(), "rng.pt is missing"),
        (lambda folder: (folder / "manifest.json").unlink(), "never finished"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "never finished"),
    ],
)
def test_a_damaged_checkpoint_gives_way(run_folder, damage, problem, caplog):
    newest = run_folder / "checkpoints" / "step_00000005"
    damage(newest)
    assert checkpoint.find(run_folder, "latest").name == "step_00000004"
    assert problem in caplog.text
    with pytest.raises(UserError, match=problem):
        checkpoint.find(run_folder, str(newest))


def test_no_checkpoint_at_all(run_folder, tmp_path):
    with pytest.raises(UserError, match="no checkpoint in"):
        checkpoint.find(tmp_path / "nothing", "latest")
    with pytest.raises(UserError, match="there is no such folder"):
        checkpoint.find(tmp_path, "nothing/step_1")
    for folder in run_folder.glob("checkpoints/step_*"):
        (folder / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="is whole"):
        checkpoint.find(run_folder, "latest")
    with pytest.raises(UserError, match="is not a checkpoint"):
        checkpoint.load_weights(tmp_path)


def _find_together(dist, folder):
    try:
        return checkpoint.find(folder, "latest", dist).name
    except UserError as error:
        return str(error)


def test_all_ranks_hear_the_same(run_folder):
    assert run_ranks(2, _find_together, run_folder) == ["step_00000005"] * 2
    first, second = run_ranks(2, _find_together, run_folder / "nothing")
    assert first == second and first.startswith("no checkpoint in")


def _killed_while_saving(dist, folder, moment):
    engine = tiny_engine(dist, 1)
    train(engine, 1)
    engine.save(folder, {"epoch": 1})
    train(engine, 1)
    setattr(checkpoint, moment, lambda *args: os.kill(os.getpid(), signal.SIGKILL))
    engine.save(folder, {"epoch": 1})


@pytest.mark.parametrize(("moment", "last"), [("_save_weights", 1), ("_publish", 1), ("_prune", 2)])
def test_a_killed_save_leaves_whole_checkpoints(moment, last, tmp_path):
    processes, _ = start_ranks(1, _killed_while_saving, tmp_path, moment)
    processes[0].join(60)
    assert processes[0].exitcode == -signal.SIGKILL
    assert checkpoint.find(tmp_path, "latest").name == checkpoint.tag_of(last)
    run_ranks(1, _resume, tmp_path, 1, 1, {})  # and the run goes on from it


def _save_on_a_full_disk(dist, folder):
    engine = tiny_engine(dist, 0)
    train(engine, 1)
    engine.save(folder, {})
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048))  # no file may grow larger: as on a full disk
    train(engine, 1)
    try:
        engine.save(folder, {})
    except TrainingError as error:
        return str(error)


def test_a_full_disk_is_one_clear_message(tmp_path):
    message = run_ranks(1, _save_on_a_full_disk, tmp_path)[0]
    assert (
        message.startswith(f"cannot write into {tmp_path}: File too large")
        and "earlier checkpoints are as they were" in message
    )
    assert checkpoint.find(tmp_path, "latest").name == "step_00000001"


def _resume_after_changes(dist, folder, changes):
    """Resume with other settings -> the next step's loss and rate, or the message."""
    changes = dict(changes)
    ema_decay = changes.pop("ema_decay", 0.9)
    engine = tiny_engine(dist, changes.pop("stage", 1), ema_decay=ema_decay, **changes)
    try:
        engine.load(checkpoint.find(folder, "latest", dist), folder / "checkpoints")
    except UserError as error:
        return str(error)
    (result,) = train(engine, 1)
    engine.save(folder / "again", {})
    return result.loss, result.lr, engine.shards.keys


def test_what_may_change_between_runs(trained, tmp_path):
    folder, expected, *_ = trained((1, 2))
    loss, _, rate = expected[0]
    keys = ["ema_0.9", "exp_avg", "exp_avg_sq"]

    def resume(**changes):
        shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
        return run_ranks(2, _resume_after_changes, tmp_path, changes)[0]

    # precision, both ways through fp32 masters
    seen, lr, found = resume(bf16={"enabled": True})
    assert (seen, lr, found) == (pytest.approx(loss, rel=1e-2), rate, keys)
    # averages: one dropped, one new; on the same and on another topology
    for stage in (1, 3):
        seen, lr, found = resume(stage=stage, ema_decay=0.5)
        assert (seen, lr) == (pytest.approx(loss, rel=1e-5), rate)
        assert found == ["ema_0.5", "exp_avg", "exp_avg_sq"]
    # the JSON's learning rate and schedule are those of the new run
    faster = {"type": "AdamW", "params": {"lr": 2e-2, "weight_decay": 0.1}}
    for stage in (0, 1, 2):
        assert resume(stage=stage, optimizer=faster)[1] == pytest.approx(2 * rate)
    constant = resume(optimizer=faster, scheduler={"type": "WarmupLR", "params": {"warmup_num_steps": 2}})
    assert constant[1] == pytest.approx(2e-2)
    # but not another optimiser or model
    assert "was trained with AveragedAdamW" in resume(optimizer={"type": "SGD", "params": {"lr": 0.1}})


def _load_into_another_model(dist, folder):
    engine = tiny_engine(dist, 1)
    engine._shapes["model.0.weight"] = [14, 7]
    with pytest.raises(UserError, match=r"model.0.weight has shape \[13, 7\] there and \[14, 7\] here"):
        engine.load(checkpoint.find(folder))
    return True


def test_another_model_is_refused(run_folder):
    assert run_ranks(1, _load_into_another_model, run_folder) == [True]


def _conversion_refused(dist, folder, work_dir, free):
    engine = tiny_engine(dist, 3)
    if free is not None:
        usage = shutil.disk_usage(folder)
        elastic.shutil.disk_usage = lambda path: usage._replace(free=free)
    try:
        engine.load(checkpoint.find(folder), work_dir)
    except UserError as error:
        return str(error)


def test_conversion_needs_room_and_permission(run_folder, tmp_path):
    for message in run_ranks(2, _conversion_refused, run_folder, tmp_path, 100):
        assert "cannot convert" in message and "GiB are free" in message
    (tmp_path / "file").write_text("not a folder")
    for message in run_ranks(2, _conversion_refused, run_folder, tmp_path / "file" / "work", None):
        assert "cannot convert" in message and "Not a directory" in message


def _go_back(dist, folder, stage):
    """Three steps after a checkpoint, twice in one process."""
    engine = tiny_engine(dist, stage)
    train(engine, 2)
    engine.save(folder, {})
    seen = []
    for _ in range(2):
        seen.append(([result.loss for result in train(engine, 3)], full_state(engine)))
        assert engine.global_steps == 5
        engine.load(checkpoint.find(folder, "latest", dist))
    (losses, states), (losses_again, states_again) = seen
    return losses == losses_again and all(torch.equal(states[key], states_again[key]) for key in states)


@pytest.mark.parametrize("stage", range(4))
def test_an_engine_that_has_stepped_goes_back(stage, tmp_path):
    assert run_ranks(2, _go_back, tmp_path, stage) == [True, True]


def _save_nan(dist, folder, stage, where):
    engine = tiny_engine(dist, stage)
    train(engine, 1)
    engine.save(folder, {})
    if dist.rank == 1:  # at stages 1 to 3 the other rank has nothing of it
        tensor = engine.shards.stepped[0]
        target = tensor if where == "fp32" else engine.optimizer.state[tensor][where]
        with torch.no_grad():
            target.view(-1)[0] = float("nan")
    try:
        engine.save(folder, {})
    except checkpoint.NotFinite as error:
        return str(error), sorted(path.name for path in (folder / "checkpoints").iterdir())


@pytest.mark.parametrize(("stage", "where"), [(0, "fp32"), (1, "exp_avg_sq"), (2, "ema_0.9"), (3, "exp_avg")])
def test_what_is_not_finite_on_one_rank_is_saved_by_none(stage, where, tmp_path):
    first, second = run_ranks(2, _save_nan, tmp_path, stage, where)
    assert first == second and "step 1 is not saved: weights or states" in first[0]
    assert [name for name in first[1] if not name.endswith(".py")] == ["latest", "step_00000001"]  # DeepSpeed's script


class _Malicious:
    def __reduce__(self):
        return os.mkdir, ("/tmp/ds_tokimg_was_here",)


class _AsGetattr:
    """Pickled as getattr(owner, name)."""

    def __init__(self, owner, name):
        self.pair = (owner, name)

    def __reduce__(self):
        return getattr, self.pair


def test_files_of_an_early_python_3_11_are_read(tmp_path):
    """It wrote members of enumerations as getattr, which would reach far if it were allowed as such."""
    path = tmp_path / "file.pt"
    torch.save({"zero_stage": _AsGetattr(ZeroStageEnum, "weights")}, path)
    assert read_engine_file(path) == {"zero_stage": ZeroStageEnum.weights}
    for owner, name in ((ZeroStageEnum, "__init__"), (ZeroStageEnum, "mro"), (fragment_address, "__init__")):
        torch.save({"zero_stage": _AsGetattr(owner, name)}, path)
        with pytest.raises(UserError, match="does not belong into a checkpoint"):
            read_engine_file(path)


def _load_malicious(dist, folder):
    engine = tiny_engine(dist, 1)
    path = next(folder.glob("checkpoints/step_00000005/*optim_states.pt"))
    torch.save({"optimizer_state_dict": _Malicious()}, path)
    with pytest.raises(UserError, match=f"{path}: holds something else than tensors"):
        engine.load(path.parent)
    return Path("/tmp/ds_tokimg_was_here").exists()


def test_code_in_a_checkpoint_is_not_run(run_folder):
    assert run_ranks(1, _load_malicious, run_folder) == [False]


def _save_generators(dist, folder):
    engine = tiny_engine(dist, 0)
    torch.manual_seed(dist.rank + 1)
    np.random.seed(dist.rank + 2)
    random.seed(dist.rank + 3)
    engine.save(folder, {})
    return _draw()


def _resume_generators(dist, folder):
    engine = tiny_engine(dist, 0)
    engine.load(checkpoint.find(folder))
    return _draw()


def _draw():
    return torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()


def test_generators_go_on_where_they_were(tmp_path):
    assert run_ranks(2, _save_generators, tmp_path) == run_ranks(2, _resume_generators, tmp_path)


def _load_universal_with_deepspeed(dist, folder, saved, stage):
    """DeepSpeed's own loader, on what elastic.py wrote."""
    engine = tiny_engine(dist, stage)
    engine.shards.zero._load_universal_checkpoint(str(folder), True, False)
    keys = ("fp32", "exp_avg", "exp_avg_sq") if stage == 3 else ("fp32", "ema_0.9", "exp_avg", "exp_avg_sq")
    for name, param in engine.shards.params.items():
        for key in keys:
            assert torch.equal(engine.shards.full(param, key), saved[f"{name}/{key}"]), (name, key)
    return True


def _convert(source, folder):
    saved = checkpoint.read_state(source)["engine"]
    elastic.convert(source, saved, {name: name for name in saved["params"]}, folder, read_engine_file)


@pytest.mark.parametrize(("stage", "target"), [(0, 1), (2, 3), (3, 2)])
def test_deepspeed_reads_the_universal_form(stage, target, trained, tmp_path):
    folder, _, saved, _ = trained((stage, 2))
    source = checkpoint.find(folder)
    _convert(source, tmp_path)
    assert run_ranks(2, _load_universal_with_deepspeed, tmp_path, saved, target) == [True, True]


@pytest.mark.parametrize("stage", [1, 3])
def test_universal_form_is_that_of_deepspeeds_converter(stage, trained, tmp_path):
    from deepspeed.checkpoint import ds_to_universal

    folder, *_ = trained((stage, 2))
    source = checkpoint.find(folder)
    _convert(source, tmp_path / "ours")
    options = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": True}
    ds_to_universal.main(
        argparse.Namespace(
            input_folder=str(source), output_folder=str(tmp_path / "theirs"), inject_missing_state=True, **options
        )
    )
    theirs = sorted(path.relative_to(tmp_path / "theirs") for path in tmp_path.glob("theirs/zero/*/*.pt"))
    assert len(theirs) >= 6 * 3
    for path in theirs:
        expected = torch.load(tmp_path / "theirs" / path, weights_only=True)
        ours = torch.load(tmp_path / "ours" / path, weights_only=True)
        if path.name != "step.pt":
            ours, expected = ours["param"].flatten(), (expected if stage == 3 else expected["param"]).flatten()
        assert torch.equal(ours, expected), path
