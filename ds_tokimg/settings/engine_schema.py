"""What may stand in `ds_config.json`: the keys DeepSpeed 0.19.8 knows, the values that work with this trainer.

DeepSpeed ignores unknown top-level keys silently, and text in place of a number fails deep inside of it.
`check` finds such mistakes first and lists them all. No torch, no deepspeed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

from ds_tokimg.errors import nearest

AUTO = "auto"
# The places where "auto" may stand; ds_config.py decides what it becomes.
AUTO_PATHS = frozenset(
    (
        *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"),
        *("gradient_clipping", "fp16.enabled", "bf16.enabled", "torch_autocast.enabled"),
        *("zero_optimization.stage", "optimizer.params.lr", "scheduler.params.total_num_steps"),
        *("scheduler.params.warmup_num_steps", "tensorboard.output_path", "tensorboard.job_name"),
        *("csv_monitor.output_path", "csv_monitor.job_name"),
    )
)
# DeepSpeed's own "auto", which it understands itself.
ENGINE_AUTO_PATHS = frozenset(("data_types.keep_in_fp32_modules",))

# Kinds of values. A tuple of values means "one of these".
SWITCH = "true or false"
COUNT = "a whole number of at least 1"
WHOLE = "a whole number of at least 0"
POSITIVE = "a number above 0"
NUMBER = "a number of at least 0"
SHARE = "a number from 0 to 1"
SIZE = "a whole number of at least 0, such as 5e8"
BUCKET = "a whole number of at least 1, such as 5e8"
TEXT = "text"
LIST = "a list"
NAMES = "a list of names"
BLOCK = "an object {...}"
FREE = "any value"
# DeepSpeed takes these where the masters are its own, from ZeRO stage 1 on.
MASTERS_IN_HALF = (
    *("fp16.fp16_master_weights_and_grads", "bf16.bf16_master_weights_and_grads"),
    "bf16.bf16_optimizer_states",
)
LARGEST = 2**53  # of all numbers: beyond, whole ones are no longer exact as floats
PRECISIONS = ("bf16", "fp16", "torch_autocast")
DTYPES = ("fp32", "fp16", "bf16")


def _keys(kind, *names: str) -> dict:
    """Several keys, given as words, whose values are of one kind."""
    return dict.fromkeys(" ".join(names).split(), kind)


# Every top-level key that DeepSpeed reads (deepspeed/runtime/config.py), with the kind of its value.
TOP_LEVEL = {
    **_keys(COUNT, "train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps"),
    **_keys(COUNT, "steps_per_print vocabulary_size sequence_parallel_size"),
    **_keys(NUMBER, "gradient_clipping"),
    **_keys(POSITIVE, "gradient_predivide_factor"),
    **_keys(DTYPES, "communication_data_type seq_parallel_communication_data_type"),
    **_keys(SWITCH, "managed_gradient_accumulation prescale_gradients disable_allgather wall_clock_breakdown"),
    **_keys(SWITCH, "memory_breakdown dump_state disable_python_gc dataloader_drop_last"),
    **_keys(SWITCH, "use_data_before_expert_parallelism"),
    **_keys(SWITCH, "zero_allow_untested_optimizer zero_force_ds_cpu_optimizer"),
    **_keys(TEXT, "log_level gradient_allreduce_op"),
    **_keys(BLOCK, "optimizer scheduler fp16 bf16 bfloat16 torch_autocast zero_optimization"),
    **_keys(BLOCK, "activation_checkpointing tensorboard wandb comet csv_monitor comms_logger flops_profiler"),
    **_keys(BLOCK, "timers checkpoint data_types compile aio autotuning data_efficiency datastates_ckpt"),
    **_keys(BLOCK, "expert_parallel hybrid_engine pipeline tensor_parallel weight_quantization"),
}
KNOWN_KEYS = frozenset(TOP_LEVEL)

_ADAM = {**_keys(POSITIVE, "lr eps"), "betas": LIST, "weight_decay": NUMBER}
_ADAM |= _keys(SWITCH, "torch_adam adam_w_mode")
_SGD = {"lr": POSITIVE, **_keys(NUMBER, "momentum dampening weight_decay"), "nesterov": SWITCH}
OPTIMIZERS = {"AdamW": _ADAM, "Adam": _ADAM, "SGD": _SGD, "Muon": _ADAM | {"momentum": NUMBER}}

_WARMUP = {"warmup_num_steps": COUNT, "warmup_type": ("linear", "log")}
_WARMUP_LR = {**_WARMUP, "warmup_min_lr": NUMBER, "warmup_max_lr": POSITIVE}
SCHEDULERS = {
    "WarmupCosineLR": {
        **_WARMUP,
        "total_num_steps": COUNT,
        **_keys(NUMBER, "warmup_min_ratio cos_min_ratio"),
    },
    "WarmupDecayLR": {**_WARMUP_LR, "total_num_steps": COUNT},
    "WarmupLR": _WARMUP_LR,
}

# DeepSpeed knows these with and without the prefix "stage3_".
_STAGE_3 = {
    **_keys(SIZE, "prefetch_bucket_size param_persistence_threshold model_persistence_threshold"),
    **_keys(SIZE, "max_live_parameters max_reuse_distance module_granularity_threshold"),
    **_keys(SWITCH, "gather_16bit_weights_on_model_save use_all_reduce_for_fetch_params"),
    **_keys(SWITCH, "allgather_sequential"),
}
_OFFLOAD = {
    "device": ("none", "cpu", "nvme"),
    "nvme_path": TEXT,
    "buffer_count": WHOLE,
    "pin_memory": SWITCH,
}
_MONITOR = {"enabled": SWITCH, "output_path": TEXT, "job_name": TEXT}
# The keys of the blocks in which this trainer or DeepSpeed reads every key.
BLOCKS = {
    "optimizer": {"type": TEXT, "params": BLOCK},
    "scheduler": {"type": TEXT, "params": BLOCK},
    "fp16": {
        **_keys(SWITCH, "enabled auto_cast consecutive_hysteresis fp16_master_weights_and_grads"),
        **_keys(WHOLE, "initial_scale_power hysteresis"),
        **_keys(COUNT, "loss_scale_window min_loss_scale"),
        "loss_scale": NUMBER,
    },
    "bf16": _keys(
        SWITCH,
        "enabled immediate_grad_update check_grad_overflow",
        "bf16_master_weights_and_grads bf16_optimizer_states",
    ),
    "torch_autocast": {
        "enabled": SWITCH,
        "dtype": ("bfloat16", "float16"),
        "lower_precision_safe_modules": NAMES,
    },
    "zero_optimization": {
        "stage": (0, 1, 2, 3),
        **_keys(SWITCH, "contiguous_gradients reduce_scatter use_multi_rank_bucket_allreduce"),
        **_keys(SWITCH, "allgather_partitions overlap_comm compute_grad_norm load_from_fp32_weights"),
        **_keys(SWITCH, "elastic_checkpoint cpu_offload cpu_offload_param cpu_offload_use_pin_memory"),
        **_keys(SWITCH, "stage3_gather_fp16_weights_on_model_save legacy_stage1"),
        **_keys(SWITCH, "ignore_unused_parameters round_robin_gradients parameter_alignment"),
        **_keys(SWITCH, "zero_quantized_weights zero_quantized_nontrainable_weights"),
        **_keys(SWITCH, "zero_quantized_gradients memory_efficient_linear pipeline_loading_checkpoint"),
        **_keys(SWITCH, "override_module_apply log_trace_cache_warnings enable_sanity_checks"),
        **_keys(SWITCH, "save_muon_momentum_buffer_in_memory"),
        "reduce_bucket_size": BUCKET,
        **_keys(SIZE, "allgather_bucket_size sub_group_size zero_hpz_partition_size"),
        **_STAGE_3,
        **{f"stage3_{key}": kind for key, kind in _STAGE_3.items()},
        **_keys(BLOCK, "offload_param offload_optimizer zenflow leaf_module"),
    },
    "zero_optimization.offload_param": {**_OFFLOAD, **_keys(SIZE, "buffer_size max_in_cpu")},
    "zero_optimization.offload_optimizer": {
        **_OFFLOAD,
        **_keys(SWITCH, "pipeline_read pipeline_write fast_init super_offload"),
        **_keys(SHARE, "ratio cpuadam_cores_perc"),
    },
    "tensorboard": _MONITOR,
    "csv_monitor": _MONITOR,
    "wandb": {"enabled": SWITCH, **_keys(TEXT, "group team project")},
    "comet": {
        **_keys(SWITCH, "enabled online"),
        "samples_log_interval": COUNT,
        **_keys(TEXT, "project workspace api_key experiment_name experiment_key mode"),
    },
    "timers": {"throughput": BLOCK},
    "timers.throughput": _keys(SWITCH, "enabled synchronized"),
    "aio": {
        **_keys(COUNT, "block_size queue_depth intra_op_parallelism"),
        **_keys(SWITCH, "single_submit overlap_events use_gds"),
    },
    "compile": {
        **_keys(SWITCH, "deepcompile autoep_non_moe free_activation offload_activation offload_opt_states"),
        **_keys(SWITCH, "offload_activation_pin_memory double_buffer symmetric_memory debug_log"),
        **_keys(SWITCH, "offload_parameters sync_before_reduce sync_after_reduce sync_before_allgather"),
        **_keys(SWITCH, "sync_after_allgather keep_int_input_tensors keep_all_input_tensors"),
        "free_activation_threshold": WHOLE,
        "passes": NAMES,
    },
    "comms_logger": {**_keys(SWITCH, "enabled prof_all verbose debug"), "prof_ops": NAMES},
    "flops_profiler": {
        **_keys(SWITCH, "enabled detailed"),
        **_keys(COUNT, "profile_step top_modules"),
        **_keys(FREE, "module_depth output_file"),
        "recompute_fwd_factor": NUMBER,
    },
    "activation_checkpointing": {
        **_keys(SWITCH, "partition_activations contiguous_memory_optimization"),
        **_keys(SWITCH, "synchronize_checkpoint_boundary profile cpu_checkpointing"),
        "number_checkpoints": COUNT,
    },
    "hybrid_engine": {
        **_keys(SWITCH, "enabled release_inference_cache pin_parameters enable_cuda_graph"),
        **_keys(COUNT, "max_out_tokens inference_tp_size tp_gather_partition_size"),
    },
    "data_types": {
        **_keys(DTYPES, "grad_accum_dtype param_dtype buffer_dtype"),
        "keep_in_fp32_modules": NAMES,
    },
}

# Features that DeepSpeed once had: it raises on them.
REMOVED = frozenset(
    (
        *("amp", "compression_training", "curriculum_learning", "eigenvalue", "elasticity", "nebula"),
        *("graph_harvesting", "progressive_layer_drop", "quantize_training", "sparse_attention"),
        "sparse_gradients",
    )
)

# Values that DeepSpeed takes and that make a run of this trainer wrong: path, is it so, why or what instead.
_REFUSED = (
    ("bfloat16", lambda value: True, 'is the old name of the block "bf16": rename it'),
    ("gradient_allreduce_op", lambda value: value != "mean", 'must stay "mean": the loss counts all ranks'),
    (
        "sequence_parallel_size",
        lambda value: value != 1,
        "splits one text over ranks, which is not supported",
    ),
    ("tensor_parallel", lambda value: value != {}, "splits layers over ranks, which is not supported"),
    ("expert_parallel", lambda value: value != {}, "needs experts, which the model does not have"),
    ("weight_quantization", lambda value: value != {}, "is not supported in training"),
    ("hybrid_engine.enabled", bool, "is not supported: the samplers need no generation engine"),
    ("data_efficiency.enabled", bool, "acts on DeepSpeed's data loader, which is not used"),
    (
        "managed_gradient_accumulation",
        lambda value: not value,
        "must stay true: the engine counts micro-batches",
    ),
    ("compile.deepcompile", bool, "does not work with this engine: use the flag --compile"),
    ("compile.passes", bool, "are those of deepcompile, which does not work with this engine: delete the key"),
    ("checkpoint.load_universal", bool, "is not needed: --resume converts checkpoints by itself"),
    (
        "optimizer.params.torch_adam",
        lambda value: value is False,
        "must be true: no op is compiled for training",
    ),
    ("zero_allow_untested_optimizer", lambda value: value is False, "must be true: the optimiser is torch's"),
    ("zero_optimization.cpu_offload", bool, 'is an old name: write "offload_optimizer": {"device": "cpu"}'),
    ("zero_optimization.cpu_offload_param", bool, 'is an old name: write "offload_param": {"device": "cpu"}'),
    ("zero_optimization.legacy_stage1", bool, "is a ZeRO that DeepSpeed no longer has: delete the key"),
    (
        "zero_optimization.compute_grad_norm",
        lambda value: value is False,
        "must be true: steps that are not finite are known by their norm",
    ),
    (
        "bf16.check_grad_overflow",
        lambda value: value is False,
        "must be true: steps that are not finite would be taken",
    ),
)


def lookup(raw: dict, path: str):
    """The value at a dotted path, or None where there is none."""
    for key in path.split("."):
        raw = raw.get(key) if isinstance(raw, dict) else None
    return raw


def check(raw: dict) -> list[str]:
    """All mistakes in the JSON that can be seen without a run: one sentence each with path, value and fix.

    Unknown keys (with the nearest known one), removed features, values of a wrong kind or out of range,
    "auto" where nothing fills it, unsupported optimisers and schedules, combinations that do not train.
    """
    problems = _check_block("", raw, TOP_LEVEL)
    problems += _check_typed_block(raw, "optimizer", OPTIMIZERS)
    problems += _check_typed_block(raw, "scheduler", SCHEDULERS)
    for path, is_wrong, why in _REFUSED:
        value = lookup(raw, path)
        if value is not None and is_wrong(value):
            problems.append(f"{path} {shown(value)}: {why}")
    for path in _stray_autos("", raw):
        problems.append(f'{path} "auto" is not understood here: give a value or delete the key')
    return problems + _combination_problems(raw)


def shown(value) -> str:
    """A value as it stands in JSON, cut to a readable length."""
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _check_block(path: str, block: dict, known: dict) -> list[str]:
    """Problems of one block's keys and values, and of the blocks inside it whose keys are all known."""
    problems = []
    for key, value in block.items():
        place = f"{path}.{key}" if path else key
        if not path and key in REMOVED:
            problems.append(f"{place}: DeepSpeed has removed this feature; delete the key")
        elif key not in known:
            problems.append(f"{place}: unknown key{nearest(key, known) or '; delete it'}")
        elif value == AUTO:
            continue
        elif not fits(value, known[key]):
            kind = known[key]
            expected = "one of " + ", ".join(map(shown, kind)) if isinstance(kind, tuple) else kind
            problems.append(f"{place} {shown(value)}: expected {expected}")
        elif place in BLOCKS:
            problems += _check_block(place, value, BLOCKS[place])
    return problems


def fits(value, kind) -> bool:
    """Whether a JSON value is of a kind. A switch is not a number here, though Python thinks so."""
    if isinstance(kind, tuple):
        return any(value == choice and type(value) is type(choice) for choice in kind)
    if kind == NAMES:
        return isinstance(value, list) and all(isinstance(name, str) for name in value)
    types = {SWITCH: bool, TEXT: str, LIST: list, BLOCK: dict, FREE: object, COUNT: int, WHOLE: int}
    if not isinstance(value, types.get(kind, (int, float))):
        return False
    if kind not in (COUNT, WHOLE, POSITIVE, NUMBER, SHARE, SIZE, BUCKET):
        return True
    least = {COUNT: value >= 1, BUCKET: value >= 1, POSITIVE: value > 0}.get(kind, value >= 0)
    most = 1 if kind == SHARE else LARGEST
    whole = kind not in (SIZE, BUCKET) or value % 1 == 0
    return least and value <= most and whole and not isinstance(value, bool)


def _check_typed_block(raw: dict, name: str, known: dict) -> list[str]:
    """Problems of a block {"type": ..., "params": {...}}, whose parameters depend on its type."""
    block = raw.get(name)
    if name == "optimizer" and block is None:
        return ['optimizer is missing: give {"type": "AdamW", "params": {"lr": "auto"}}']
    if not isinstance(block, dict):
        return []
    kind, params, problems = block.get("type"), block.get("params", {}), []
    if kind is None:
        problems = [f"{name}.type is missing: choose one of {', '.join(known)}"]
    elif isinstance(kind, str) and kind not in known:
        hint = nearest(kind, known) or f"; choose one of {', '.join(known)}"
        problems = [f"{name}.type {shown(kind)} is not supported{hint}"]
    if not isinstance(params, dict):
        return problems
    union = {key: value for keys in known.values() for key, value in keys.items()}
    problems += _check_block(f"{name}.params", params, known.get(str(kind), union))
    betas = params.get("betas", [0.9, 0.95])
    in_range = isinstance(betas, list) and all(fits(beta, NUMBER) and beta < 1 for beta in betas)
    if not in_range or len(betas) != 2:
        problems.append(f"optimizer.params.betas {shown(betas)}: expected two numbers from 0 to below 1")
    return problems


def _stray_autos(path: str, value) -> Iterator[str]:
    """Paths of every "auto" that nothing would fill."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _stray_autos(f"{path}.{key}" if path else key, inner)
    elif value == AUTO and path not in AUTO_PATHS | ENGINE_AUTO_PATHS:
        yield path


def _combination_problems(raw: dict) -> list[str]:
    """Values that are fine alone and contradict each other."""
    problems = []
    on = [f"{name}.enabled" for name in PRECISIONS if lookup(raw, f"{name}.enabled") is True]
    if len(on) > 1:
        problems.append(f"{' and '.join(on)} are both true: a run has one precision")
    stage = lookup(raw, "zero_optimization.stage")
    if stage == 2 and (raw.get("prescale_gradients") or raw.get("gradient_predivide_factor", 1) != 1):
        problems.append("prescale_gradients and gradient_predivide_factor do not work with zero_optimization.stage 2")
    if lookup(raw, "bf16.bf16_master_weights_and_grads") and not offload_device(raw):
        problems.append("bf16.bf16_master_weights_and_grads needs zero_optimization.offload_optimizer")
    if lookup(raw, "bf16.bf16_optimizer_states") and not lookup(raw, "bf16.bf16_master_weights_and_grads"):
        problems.append("bf16.bf16_optimizer_states needs bf16.bf16_master_weights_and_grads")
    if offload_device(raw) and raw.get("zero_force_ds_cpu_optimizer"):
        problems.append("zero_force_ds_cpu_optimizer must be false with offload_optimizer: the optimiser is torch's")
    if offload_device(raw) and lookup(raw, "optimizer.type") == "Muon":
        problems.append("optimizer.type Muon puts whole matrices together on the device: not with offload_optimizer")
    if lookup(raw, "zero_optimization.offload_param.device") in ("cpu", "nvme") and stage != 3:
        problems.append(f"zero_optimization.offload_param needs stage 3, not {shown(stage)}")
    total, warmup = (lookup(raw, f"scheduler.params.{name}_num_steps") for name in ("total", "warmup"))
    if isinstance(total, int) and isinstance(warmup, int) and warmup >= total:
        problems.append(f"scheduler.params.warmup_num_steps {warmup} must be below total_num_steps {total}")
    return problems


def offload_device(raw: dict) -> str | None:
    """Where the optimiser's state is offloaded to ("cpu" or "nvme"), or None."""
    device = lookup(raw, "zero_optimization.offload_optimizer.device")
    return device if device in ("cpu", "nvme") else None
