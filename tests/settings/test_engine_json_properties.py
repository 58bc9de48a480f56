"""Random engine JSONs: either what is made of them suits DeepSpeed's own models, or one UserError says why not."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ds_tokimg.errors import UserError
from ds_tokimg.settings import engine_json
from ds_tokimg.settings.config import TrainConfig
from ds_tokimg.settings.engine_schema import (
    BLOCK,
    BLOCKS,
    BUCKET,
    COUNT,
    LIST,
    NAMES,
    NUMBER,
    OPTIMIZERS,
    POSITIVE,
    SCHEDULERS,
    SHARE,
    SIZE,
    SWITCH,
    TEXT,
    TOP_LEVEL,
    WHOLE,
)

BOUNDED = settings(deadline=None, derandomize=True, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
SCALARS = st.none() | st.booleans() | st.integers(-3, 10**9) | st.just(10**400) | st.floats() | st.text(max_size=6)
JUNK = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner))
FITTING = {
    SWITCH: st.booleans(),
    COUNT: st.integers(1, 64),
    WHOLE: st.integers(0, 64),
    POSITIVE: st.floats(1e-6, 1e3),
    NUMBER: st.integers(0, 10**6) | st.floats(0, 1e6),
    TEXT: st.sampled_from(["", "mean", "AdamW", "WarmupLR", "x"]),
    LIST: st.lists(st.floats(0, 1.2), max_size=3),
    NAMES: st.lists(st.text(max_size=5), max_size=3),
    SHARE: st.floats(0, 1),
    SIZE: st.integers(0, 10**6) | st.just(5e8),
    BUCKET: st.integers(1, 10**6) | st.just(5e8),
    BLOCK: st.builds(dict),
}


def values(kind) -> st.SearchStrategy:
    """Values of a kind for the most part, and now and then anything."""
    fitting = st.sampled_from(kind) if isinstance(kind, tuple) else FITTING.get(kind, JUNK)
    return st.sampled_from([fitting] * 12 + [st.just("auto"), JUNK]).flatmap(lambda chosen: chosen)


def blocks(keys: dict, most: int = 4) -> st.SearchStrategy:
    """Objects with some of these keys, and now and then an unknown one."""
    pairs = st.sampled_from(sorted(keys)).flatmap(lambda key: st.tuples(st.just(key), values(keys[key])))
    unknown = st.tuples(st.text(max_size=5), JUNK)
    return st.lists(st.sampled_from([pairs] * 15 + [unknown]).flatmap(lambda kind: kind), max_size=most).map(dict)


def typed(kinds: dict) -> st.SearchStrategy:
    """{"type": …, "params": …} of one of these kinds."""
    return st.sampled_from(sorted(kinds)).flatmap(
        lambda name: st.fixed_dictionaries({"type": st.just(name), "params": blocks(kinds[name])})
    )


TYPED = {"optimizer": typed(OPTIMIZERS), "scheduler": typed(SCHEDULERS)}
INNER = {name: blocks(keys) | TYPED.get(name, st.nothing()) for name, keys in BLOCKS.items() if "." not in name}


@st.composite
def jsons(draw) -> dict:
    raw = draw(blocks({key: kind for key, kind in TOP_LEVEL.items() if key not in INNER}))
    raw |= {name: draw(INNER[name]) for name in draw(st.sets(st.sampled_from(sorted(INNER)), max_size=3))}
    return raw | {"optimizer": draw(st.just({"type": "AdamW"}) | TYPED["optimizer"])}


MACHINES = st.builds(
    engine_json.Machine, st.sampled_from([1, 2, 3]), st.sampled_from(["cpu", "cuda"]), st.booleans(), st.booleans()
)


@BOUNDED
@given(jsons(), MACHINES, st.none() | st.booleans(), st.none() | st.integers(1, 64))
def test_a_json_is_refused_in_words_or_suits_deepspeed(raw, machine, use_amp, batch):
    deepspeed_config = pytest.importorskip("deepspeed.runtime.config")
    config = TrainConfig(data_path="x", use_amp=use_amp, train_batch_size=batch)
    before = json.dumps(raw)
    try:
        resolved, _ = engine_json.resolve(raw, config, machine, lambda train: 100)
    except UserError:
        return
    finally:
        assert json.dumps(raw) == before
    # What the engine tells DeepSpeed: ranks need not share a train batch evenly (see TrainEngine).
    micro, accumulation = resolved["train_micro_batch_size_per_gpu"], resolved["gradient_accumulation_steps"]
    deepspeed_config.DeepSpeedConfig(resolved | {"train_batch_size": micro * accumulation})


@BOUNDED
@given(
    st.binary(max_size=60)
    | st.just(b"[" * 10**5)
    | st.just(b'{"a":' * 90 + b"1" + b"}" * 90)
    | JUNK.map(lambda value: json.dumps(value).encode())
)
def test_any_file_is_an_object_or_a_user_error(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "engine.json"
    path.write_bytes(data)
    try:
        assert isinstance(engine_json.read(path), dict)
    except UserError as error:
        assert str(path) in str(error)
