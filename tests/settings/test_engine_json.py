"""The engine's JSON: what may stand in it, what "auto" becomes, what contradicts."""

import copy
import json

import pytest

from ds_tokimg.errors import UserError
from ds_tokimg.settings import engine_schema as ds_schema
from ds_tokimg.settings.config import DEFAULT_MAX_GRAD_NORM, TrainConfig
from ds_tokimg.settings.engine_json import CPU_BUCKET_SIZE, SHIPPED, Machine, read, resolve, resolve_batch, solve_batch
from ds_tokimg.settings.engine_schema import check

CPU = Machine(1, "cpu", bf16=True, fp16=False)
GPU = Machine(1, "cuda", bf16=True, fp16=True)


def shipped(**changes) -> dict:
    """The shipped JSON; `a__b=value` changes the key b of block a, a value of None deletes it."""
    raw = read(SHIPPED)
    for path, value in changes.items():
        *blocks, key = path.split("__")
        place = raw
        for block in blocks:
            place = place.setdefault(block, {})
        if value is None:
            place.pop(key, None)
        else:
            place[key] = value
    return raw


def settings(**values) -> TrainConfig:
    return TrainConfig(data_path="x", **values)


def resolved(raw: dict, machine: Machine = CPU, steps: int = 100, resumed: int | None = None, **values) -> dict:
    return resolve(raw, settings(**values), machine, lambda train: steps, resumed)[0]


def problems(raw: dict, machine: Machine = CPU, **values) -> str:
    with pytest.raises(UserError) as caught:
        resolve(raw, settings(**values), machine, lambda train: 100)
    return str(caught.value)


def test_the_shipped_json_has_no_problem():
    assert check(shipped()) == []
    assert read("ds_config.json") == shipped()


@pytest.mark.parametrize("machine", [CPU, GPU, Machine(2, "cpu", True, False), Machine(8, "cuda", False, True)])
def test_nothing_automatic_is_left(machine):
    raw = shipped()
    before = copy.deepcopy(raw)
    result, notes = resolve(raw, settings(), machine, lambda train: 100)
    assert '"auto"' not in json.dumps(result)
    assert raw == before
    assert check(result) == []
    assert notes == []


def test_defaults_stand_in_for_missing_flags():
    result = resolved(shipped())
    assert result["optimizer"]["params"]["lr"] == settings().lr_at_width_192
    assert result["gradient_clipping"] == DEFAULT_MAX_GRAD_NORM
    assert resolved(shipped(gradient_clipping=None))["gradient_clipping"] == DEFAULT_MAX_GRAD_NORM
    assert result["train_batch_size"] == result["train_micro_batch_size_per_gpu"] == settings().smallest_train_batch
    assert result["tensorboard"] == {"enabled": True, "output_path": "runs/default", "job_name": "tensorboard"}


def test_flags_fill_what_is_automatic():
    flags = {"lr": 2e-4, "max_grad_norm": 0.5, "batch_size": 2, "gradient_accumulation_steps": 3, "output_dir": "o"}
    result = resolved(shipped(), Machine(2, "cpu", True, False), **flags)
    assert (result["optimizer"]["params"]["lr"], result["gradient_clipping"]) == (2e-4, 0.5)
    assert (result["train_batch_size"], result["train_micro_batch_size_per_gpu"]) == (12, 2)
    assert result["gradient_accumulation_steps"] == 3
    assert result["tensorboard"]["output_path"] == "o"


def test_an_explicit_value_and_another_flag_are_an_error_that_names_both():
    raw = shipped(optimizer__params__lr=1e-3, gradient_clipping=1.0, train_micro_batch_size_per_gpu=4)
    message = problems(raw, lr=2e-3, max_grad_norm=0.1, batch_size=8)
    assert "optimizer.params.lr is 0.001 in the JSON and --lr is 0.002" in message
    assert "gradient_clipping is 1.0 in the JSON and --max_grad_norm is 0.1" in message
    assert "train_micro_batch_size_per_gpu is 4 in the JSON and --batch_size is 8" in message
    resolved(raw, lr=1e-3, max_grad_norm=1.0, batch_size=4)  # the same value twice is no contradiction


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((None, None, None, 1), (32, 32, 1)),
        ((None, None, None, 3), (32, 11, 1)),
        ((None, None, None, 64), (32, 1, 1)),
        ((None, None, 5, 3), (32, 3, 5)),
        ((3, None, None, 4), (3, 1, 1)),
        ((32, None, 4, 3), (32, 3, 4)),
        ((None, 8, None, 2), (16, 8, 1)),
        ((None, 8, 2, 2), (32, 8, 2)),
        ((48, None, None, 2), (48, 24, 1)),
        ((48, 4, None, 2), (48, 4, 6)),
        ((48, None, 6, 2), (48, 4, 6)),
        ((48, 4, 6, 2), (48, 4, 6)),
    ],
)
def test_batch_triple(given, expected):
    assert solve_batch(*given, 32) == expected


@pytest.mark.parametrize(
    ("given", "fix"),
    [
        ((10, 4, None, 1), "8 or 12"),
        ((10, 4, 2, 1), "8"),
        ((32, 64, None, 1), "64"),
        ((4, 1, None, 8), "8"),
        ((4, 1, 1, 8), "8"),
    ],
)
def test_batch_without_a_solution(given, fix):
    with pytest.raises(UserError, match=f"a train batch of {fix} would fit"):
        solve_batch(*given, 32)


def test_a_resumed_run_keeps_its_train_batch():
    assert resolve_batch(shipped(), settings(), 2, 48) == (48, 24, 1)
    assert resolve_batch(shipped(), settings(batch_size=4), 2, 48) == (48, 4, 6)
    with pytest.raises(UserError, match="train_batch_size is 16 and the checkpoint was trained with 48"):
        resolve_batch(shipped(train_batch_size=16), settings(), 1, 48)
    assert resolve_batch(shipped(), settings(), 5, 48) == (48, 10, 1)
    with pytest.raises(UserError, match=r"train_batch_size 48 is not .* 5 ranks"):
        resolve_batch(shipped(), settings(batch_size=4), 5, 48)
    assert resolved(shipped(), resumed=48)["train_batch_size"] == 48


@pytest.mark.parametrize(
    ("machine", "use_amp", "on", "stage"),
    [
        (CPU, None, None, 0),
        (CPU, True, "bf16", 1),
        (Machine(2, "cpu", True, False), None, None, 1),
        (GPU, None, "bf16", 1),
        (GPU, False, None, 0),
        (Machine(1, "cuda", False, True), None, "fp16", 1),
        (Machine(1, "odd", False, False), None, None, 0),
    ],
)
def test_automatic_precision_and_stage(machine, use_amp, on, stage):
    result = resolved(shipped(), machine, use_amp=use_amp)
    assert [name for name in ("bf16", "fp16") if result[name]["enabled"]] == ([on] if on else [])
    assert result["zero_optimization"]["stage"] == stage


def test_a_cpu_reduces_gradients_in_small_buckets():
    def bucket(raw, machine):
        return resolved(raw, machine)["zero_optimization"].get("reduce_bucket_size")

    two, gpus = Machine(2, "cpu", False, False), Machine(2, "cuda", True, True)
    assert bucket(shipped(), two) == CPU_BUCKET_SIZE and bucket(shipped(), gpus) is None
    assert bucket(shipped(zero_optimization={"stage": 2, "reduce_bucket_size": 7}), two) == 7
    assert bucket(shipped(), CPU) is None  # stage 0 has no buckets


def test_half_precision_at_stage_0_runs_as_stage_1_with_a_note():
    raw = shipped(zero_optimization__stage=0, bf16__enabled=True)
    result, notes = resolve(raw, settings(), CPU, lambda train: 100)
    assert result["zero_optimization"]["stage"] == 1
    assert any("running as stage 1" in note for note in notes)


def test_automatic_autocast():
    raw = shipped(bf16=None, fp16=None, torch_autocast={"enabled": "auto"})
    result = resolved(raw, use_amp=True)
    assert result["torch_autocast"] == {"enabled": True, "dtype": "bfloat16"}
    assert result["zero_optimization"]["stage"] == 0  # its parameters stay fp32
    assert resolved(raw)["torch_autocast"]["enabled"] is False


def test_precision_contradictions():
    assert "--no_use_amp asks for fp32" in problems(shipped(bf16__enabled=True), use_amp=False)
    off = shipped(bf16__enabled=False, fp16__enabled=False)
    assert "--use_amp has nothing to switch on" in problems(off, use_amp=True)
    assert "fp16.enabled is true, but cpu cannot" in problems(shipped(fp16__enabled=True))
    autocast = shipped(torch_autocast={"enabled": True, "dtype": "float16"}, zero_optimization__stage=2)
    assert "torch_autocast in float16 clips the scaled gradients" in problems(autocast, Machine(1, "cpu", True, True))


@pytest.mark.parametrize(
    ("steps", "epochs", "ratio", "total", "warmup"),
    [(100, 3, 0.05, 300, 15), (100, 1, 0.0, 100, 2), (1, 1, 0.05, 3, 2), (4, 1, 0.99, 4, 3)],
)
def test_automatic_schedule(steps, epochs, ratio, total, warmup):
    params = resolved(shipped(), steps=steps, epochs=epochs, warmup_ratio=ratio)["scheduler"]["params"]
    assert (params["total_num_steps"], params["warmup_num_steps"]) == (total, warmup)


def test_the_schedule_is_asked_for_with_the_train_batch():
    asked = []
    resolve(shipped(), settings(batch_size=4), Machine(2, "cpu", True, True), lambda train: asked.append(train) or 50)
    assert asked == [8]


def test_a_stated_schedule_is_kept_and_its_length_noted():
    raw = shipped(scheduler__params__total_num_steps=500)
    result, notes = resolve(raw, settings(), CPU, lambda train: 100)
    assert result["scheduler"]["params"]["total_num_steps"] == 500
    assert "scheduler: 500 steps long, and the run has 100" in notes
    message = problems(shipped(scheduler__params__total_num_steps=2))
    assert "scheduler.params.total_num_steps 2 must be more than" in message


def test_the_peak_of_warmup_schedules_is_the_learning_rate():
    raw = shipped(scheduler={"type": "WarmupDecayLR", "params": {"warmup_type": "linear"}})
    params = resolved(raw, lr=5e-4)["scheduler"]["params"]
    assert params == {"warmup_type": "linear", "total_num_steps": 100, "warmup_num_steps": 5, "warmup_max_lr": 5e-4}
    raw["scheduler"]["params"]["warmup_max_lr"] = 1e-2
    assert "warmup_max_lr is 0.01 and optimizer.params.lr is 0.0005" in problems(raw, lr=5e-4)


def test_no_schedule_is_a_constant_learning_rate():
    result, notes = resolve(shipped(scheduler=None), settings(), CPU, lambda train: 100)
    assert "scheduler" not in result
    assert any("stays constant" in note for note in notes)


def test_what_a_foreign_optimiser_needs():
    offload = shipped(zero_optimization={"stage": 2, "offload_optimizer": {"device": "cpu"}})
    result = resolved(offload)
    assert result["zero_allow_untested_optimizer"] is True
    assert result["zero_force_ds_cpu_optimizer"] is False
    assert "zero_force_ds_cpu_optimizer" not in resolved(shipped())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gradient_cliping": 1}, "gradient_cliping: unknown key; did you mean 'gradient_clipping'?"),
        ({"zero_optimization__stag": 1}, "zero_optimization.stag: unknown key; did you mean 'stage'?"),
        ({"optimizer__params__beta": 1}, "optimizer.params.beta: unknown key; did you mean 'betas'?"),
        ({"xyz": 1}, "xyz: unknown key; delete it"),
        ({"train_batch_size": "8"}, 'train_batch_size "8": expected a whole number of at least 1'),
        ({"train_batch_size": 8.0}, "train_batch_size 8.0: expected a whole number"),
        ({"train_batch_size": True}, "train_batch_size true: expected a whole number"),
        ({"steps_per_print": 0}, "steps_per_print 0: expected a whole number of at least 1"),
        ({"gradient_clipping": -1}, "gradient_clipping -1: expected a number of at least 0"),
        ({"gradient_clipping": float("nan")}, "gradient_clipping NaN: expected a number"),
        ({"bf16__enabled": "yes"}, 'bf16.enabled "yes": expected true or false'),
        ({"zero_optimization__stage": 4}, "zero_optimization.stage 4: expected one of 0, 1, 2, 3"),
        ({"zero_optimization__stage": True}, "zero_optimization.stage true: expected one of"),
        ({"zero_optimization": True}, "zero_optimization true: expected an object"),
        ({"optimizer": None}, "optimizer is missing"),
        ({"optimizer__type": None}, "optimizer.type is missing: choose one of AdamW, Adam, SGD"),
        (
            {"optimizer__type": "Muon", "zero_optimization__offload_optimizer": {"device": "cpu"}},
            "optimizer.type Muon puts whole matrices together on the device: not with offload_optimizer",
        ),
        ({"optimizer__type": "Lion"}, 'optimizer.type "Lion" is not supported; choose one of AdamW, Adam, SGD'),
        ({"scheduler__type": "WarmupCosinLR"}, "did you mean 'WarmupCosineLR'?"),
        ({"optimizer__params__betas": [0.9]}, "optimizer.params.betas [0.9]: expected two numbers"),
        ({"optimizer__params__betas": [0.9, 1.0]}, "optimizer.params.betas [0.9, 1.0]: expected two numbers"),
        ({"optimizer__params__torch_adam": False}, "optimizer.params.torch_adam false: must be true"),
        ({"zero_optimization__reduce_bucket_size": "auto"}, 'reduce_bucket_size "auto" is not understood here'),
        ({"xyz": "auto"}, 'xyz "auto" is not understood here'),
        ({"amp": {"enabled": True}}, "amp: DeepSpeed has removed this feature"),
        ({"sequence_parallel_size": 2}, "sequence_parallel_size 2: splits one text over ranks"),
        ({"gradient_allreduce_op": "sum"}, 'gradient_allreduce_op "sum": must stay "mean"'),
        ({"compile__deepcompile": True}, "compile.deepcompile true: does not work"),
        ({"zero_optimization__cpu_offload": True}, 'cpu_offload true: is an old name: write "offload_optimizer"'),
        ({"zero_optimization__cpu_offload_param": True}, 'cpu_offload_param true: is an old name: write "offload_p'),
        ({"zero_optimization__legacy_stage1": True}, "legacy_stage1 true: is a ZeRO that DeepSpeed no longer has"),
        ({"zero_optimization__compute_grad_norm": False}, "compute_grad_norm false: must be true"),
        ({"bf16__bf16_optimizer_states": True}, "bf16_optimizer_states needs bf16.bf16_master_weights_and_grads"),
        ({"bf16__check_grad_overflow": False}, "bf16.check_grad_overflow false: must be true"),
        ({"bf16__enabled": True, "fp16__enabled": True}, "bf16.enabled and fp16.enabled are both true"),
        ({"prescale_gradients": True, "zero_optimization__stage": 2}, "do not work with zero_optimization.stage 2"),
        ({"bf16__bf16_master_weights_and_grads": True}, "needs zero_optimization.offload_optimizer"),
        ({"scheduler__params__warmup_num_steps": 9, "scheduler__params__total_num_steps": 9}, "must be below"),
    ],
)
def test_check_names_the_path_the_value_and_the_fix(change, message):
    listed = check(shipped(**change))
    assert any(message in problem for problem in listed), listed
    problems(shipped(**change))  # and a run is refused, without a crash on the way


def test_everything_wrong_is_listed_at_once():
    raw = shipped(gradient_cliping=1, steps_per_print=0, scheduler=[1], pipeline={}, xyz="auto")
    message = problems({**raw, "train_micro_batch_size_per_gpu": 4, "train_batch_size": "a"}, batch_size=3)
    parts = ("gradient_cliping", "steps_per_print", "scheduler [1]", "xyz", "--batch_size is 3", '"a"', "pipeline: has")
    for part in parts:
        assert part in message


def test_monitors_need_their_packages(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    message = problems(shipped(comet={"enabled": True}))
    assert "comet.enabled needs `pip install comet_ml`" in message
    assert "tensorboard.enabled needs `pip install tensorboard`" in message


def test_leftovers_are_noted():
    raw = shipped(
        pipeline={},
        bf16={"enabled": False, "check_grad_overflow": True},
        zero_optimization={"stage": 0, "stage3_max_live_parameters": 9},
    )
    notes = resolve(raw, settings(), CPU, lambda train: 100)[1]
    assert "pipeline: has no effect, the model is not cut into pipeline stages" in notes
    assert "bf16.check_grad_overflow: no effect while bf16 is off" in notes
    assert "zero_optimization.stage3_max_live_parameters: no effect at stage 0" in notes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ('{"a": 1,\n "b" 2}', "not valid JSON at line 2, column 6"),
        ("[1]", "expected an object"),
        ('{"fp16": {"enabled": true, "enabled": false}}', "these keys stand twice in one object: enabled"),
    ],
)
def test_read(tmp_path, text, message):
    path = tmp_path / "engine.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message):
        read(path)


class Recorder(dict):
    """A dict that notes every key it is asked for: what DeepSpeed knows, from DeepSpeed itself."""

    asked: set

    def __init__(self, values: dict):
        super().__init__(values)
        self.asked = set()

    def get(self, key, default=None):
        self.asked.add(key)
        return super().get(key, default)

    def __contains__(self, key):
        self.asked.add(key)
        return super().__contains__(key)

    def keys(self):
        return self

    def __copy__(self):
        return self


def test_known_keys_are_those_that_deepspeed_reads():
    config = pytest.importorskip("deepspeed.runtime.config")
    recorder = Recorder({"train_batch_size": 1})
    config.DeepSpeedConfig(recorder)
    removed = set(config._REMOVED_TOP_LEVEL_CONFIG_KEYS)
    assert set(ds_schema.REMOVED) == removed
    # DeepSpeed looks for this key only once a process group exists.
    read_keys = (recorder.asked - removed) | {"sequence_parallel_size"}
    assert read_keys == set(ds_schema.KNOWN_KEYS)


@pytest.mark.parametrize("block", ["fp16", "bf16", "zero_optimization", "tensorboard", "csv_monitor", "wandb"])
def test_known_keys_of_blocks_are_those_of_deepspeed(block):
    config = pytest.importorskip("deepspeed.runtime.config").DeepSpeedConfig({"train_batch_size": 1})
    parts = {
        "fp16": config.float16_config,
        "bf16": config.bfloat16_config,
        "zero_optimization": config.zero_config,
        "tensorboard": config.monitor_config.tensorboard,
        "csv_monitor": config.monitor_config.csv_monitor,
        "wandb": config.monitor_config.wandb,
    }
    fields = type(parts[block]).model_fields
    names = set(fields) | {field.alias for field in fields.values() if field.alias}
    assert set(ds_schema.BLOCKS[block]) == names


@pytest.mark.parametrize("machine", [CPU, GPU, Machine(1, "cuda", False, True)])
def test_deepspeed_accepts_the_resolved_json(machine):
    deepspeed_config = pytest.importorskip("deepspeed.runtime.config")
    result = resolved(shipped(), machine)
    config = deepspeed_config.DeepSpeedConfig(result)
    assert config.train_batch_size == settings().smallest_train_batch
    assert config.zero_optimization_stage == result["zero_optimization"]["stage"]
    assert config.gradient_clipping == 1.0


@pytest.mark.parametrize("key", ["zero_quantized_weights", "zero_quantized_gradients"])
def test_quantised_weights_and_gradients_are_for_accelerators(key):
    raw = shipped(zero_optimization__stage=3, **{f"zero_optimization__{key}": True})
    assert f"zero_optimization.{key} true: needs kernels" in problems(raw, CPU)
    resolved(raw, GPU)
