"""python -m ds_tokimg train: one run, from the command line to the last checkpoint.

Read `training.run.train` for the order of things, then training/loop.py (what happens in a step),
training/objective.py, model/jit.py (the network) and engine/engine.py (the optimiser step).
"""

from __future__ import annotations

import logging
import sys

from ds_tokimg.console import say, speaks, starting
from ds_tokimg.engine.allocator import keep_freed_memory
from ds_tokimg.engine.startup import quiet
from ds_tokimg.errors import TrainingError, UserError, raise_problems
from ds_tokimg.settings import engine_json
from ds_tokimg.settings.command_line import train_config
from ds_tokimg.settings.config import TrainConfig
from ds_tokimg.settings.engine_schema import check
from ds_tokimg.settings.unused import unused_flags
from ds_tokimg.training.restarts import flags
from ds_tokimg.training.signals import before_training


def main(argv: list[str]) -> int:
    config = train_config(flags(argv))
    raw = engine_json.read(config.deepspeed_config)
    raise_problems(f"{config.deepspeed_config} cannot be used:", check(raw))
    for note in unused_flags(config, argv) if speaks() else ():
        say(f"note: {note}")
    keep_freed_memory()
    with before_training():
        return run(config, raw)


def run(config: TrainConfig, raw: dict) -> int:
    """The run in this process, which is one of its ranks -> its exit code."""
    # Torch and DeepSpeed take seconds to import: help and mistakes are answered before.
    with starting(), quiet():
        from ds_tokimg.engine.engine import init_distributed
        from ds_tokimg.engine.mistakes import Mistakes
        from ds_tokimg.engine.watch import report
        from ds_tokimg.training.run import train

        try:
            dist = init_distributed()
        except TrainingError as error:
            report(f"error: {error}")
            return 1
    logging.basicConfig(format="%(message)s", stream=sys.stdout)
    logging.raiseExceptions = False  # a run goes on where nobody reads its log any more
    logging.getLogger("ds_tokimg").setLevel(logging.INFO if dist.rank == 0 else logging.ERROR)
    mistakes = Mistakes(dist)
    try:
        train(config, raw, dist)
    except UserError as mistake:
        mistakes.tell(mistake)
        dist.leave()
        mistakes.wait()
        raise
    except RuntimeError as error:  # a rank that has left
        if mistakes.found_elsewhere():
            return 2
        if not isinstance(error, TrainingError):
            raise
        dist.watch.tell(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        dist.leave()
        raise
    return 0
