"""The training loop: what happens in a step, after it now and then, and at the end of a run."""

from __future__ import annotations

import contextlib
import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ds_tokimg.data.loader import BatchLoader, Part
from ds_tokimg.data.order import TrainBatchSampler
from ds_tokimg.engine import checkpoint as checkpoints
from ds_tokimg.engine.engine import StepResult, TrainEngine
from ds_tokimg.inference.loading import TOKENIZER, load_trained
from ds_tokimg.inference.sampler import SamplingOptions
from ds_tokimg.inference.texts import generate, images_of, show
from ds_tokimg.model.flops import matmul_peak
from ds_tokimg.settings import formats
from ds_tokimg.settings.command_line import GIVEN_JSON
from ds_tokimg.settings.config import TrainConfig
from ds_tokimg.settings.files import write_text
from ds_tokimg.training.assemble import Parts
from ds_tokimg.training.bound import Bound, BoundOptions, Share, Stopped, bound_of
from ds_tokimg.training.next_steps import next_steps
from ds_tokimg.training.profiling import profiled
from ds_tokimg.training.signals import Interrupted, StopSignals
from ds_tokimg.training.tracking import Tracker


class Run:
    """The training loop with its clock: what is done at every step, now and then, and at the end."""

    def __init__(self, config: TrainConfig, settings: dict, parts: Parts, engine: TrainEngine, state: dict):
        self.config, self.parts, self.engine, self.dist = config, parts, engine, engine.dist
        self.train_batch_size = settings["train_batch_size"]
        self.sampler = TrainBatchSampler(
            parts.train_set.lengths, self.train_batch_size, config.seed, mixture=parts.train_set.mixture
        )
        self.schedule_steps = self.sampler.steps_per_epoch * config.epochs
        self.last_step = min(self.schedule_steps, config.max_steps or self.schedule_steps)
        self.first_step = state.get("step", 0)
        self.best, self.best_step = self._best_before(state)
        self.tracker = Tracker(config.output_dir, engine, self.first_step)
        # All ranks at once, as they compute.
        self.peak = self.dist.sum([matmul_peak(self.dist.device, engine.compute_dtype)])[0]
        self.speed = Speedometer()
        self.bound: Bound | None = None
        self.figures = state.get("figures")  # of the last validation, for the model card of an export
        self.saved_step = self.first_step
        self.epoch = state.get("epoch", 0)
        self.validation_due = state.get("validation_due", False)  # at the step of the checkpoint
        self.signals, self.stopped = StopSignals(engine), False
        self.schedule = parts.module.schedule
        if self.schedule is not None and state:
            self.schedule.load_state(state["schedule"])

    def _best_before(self, state: dict) -> tuple[float, int | None]:
        """The best validation before this launch, and its step. One whose checkpoint is gone (of a branch that the run
        goes back to) counts no more: a new best is found."""
        step, root = state.get("best_step"), Path(self.config.output_dir) / checkpoints.FOLDER
        if state.get("best") is None:
            return math.inf, None
        kept = step is None or self.dist.broadcast((root / checkpoints.tag_of(step)).is_dir())
        return (state["best"], step) if kept else (math.inf, None)

    def loop(self) -> None:
        loader = BatchLoader(
            self.parts.train_set,
            self.sampler,
            self.parts.batch_maker,
            Part(self.dist.world_size, self.dist.rank, self.engine.accumulation),
            num_workers=self.config.num_workers,
            pin_memory=self.dist.device.type != "cpu",
        )
        with profiled(self.config.profile, self.config.output_dir, self.dist) as tick:
            self.stopped = self.validation_due and not self._validate_now()  # what an earlier launch gave up
            for loaded in () if self.stopped else loader.batches(self.first_step, self.last_step):
                self.stopped = self.step(loaded)
                if self.stopped:
                    break
                tick()
        if self.stopped:
            self.log(f"stopped by a signal at step {self.engine.global_steps}")

    def step(self, loaded) -> bool:
        """One optimiser step and what is due after it; True when the run is asked to end."""
        number, self.epoch = self.engine.global_steps + 1, loaded.epoch
        is_due = self._due(number)
        # 1. forward, backward, update
        self.parts.module.measure_bound = "log" in is_due
        result = self.engine.train_batch(loaded.micro_batches)
        if self.schedule is not None and not result.skipped:
            self.schedule.update(result.sums)
        self.speed.add(result, loaded.wait_seconds)
        # 2. log, keep, measure: a validation may take long, and what was trained is safe before it
        if is_due & {"log", "eval"}:
            row = self._metrics(result, loaded.epoch)
            self.tracker.log(row)
            self._print(row, number)
        self.validation_due, stop = "eval" in is_due and len(self.parts.eval_set) > 0, result.stop
        if "save" in is_due or stop:
            self.save()
            stop = stop or self.engine.asked_to_stop()
        if self.validation_due and not stop:
            stop = not self._validate_now()
        if is_due & {"save", "eval"}:
            self.speed.restart()
        return stop

    def _due(self, step: int) -> set[str]:
        last = step == self.last_step
        config = self.config
        intervals = {"log": config.log_interval, "eval": config.eval_interval, "save": config.save_interval}
        return {name for name, every in intervals.items() if last or step % every == 0 or (step, name) == (1, "log")}

    def _metrics(self, result, epoch: int) -> dict:
        sums, pace = result.sums, self.speed.read()
        # A machine that was busy when its peak was measured has done better since.
        self.peak = max(self.peak, pace.flops / pace.seconds)
        row = {
            "step": result.step,
            "epoch": epoch,
            "consumed_samples": result.step * self.train_batch_size,
            "loss": result.loss,
            "lr": result.lr,
            "grad_norm": result.grad_norm,
            "loss_scale": result.loss_scale,
            "skipped_steps": self.engine.skipped_steps,
            "valid_tokens": int(sums["valid_tokens"]),
            "valid_tokens_per_second": pace.valid_tokens / pace.seconds,
            "step_seconds": pace.seconds / pace.steps,
            "data_wait": pace.waited / pace.seconds,
            "model_flops_per_second": pace.flops / pace.seconds,
            "peak_share": pace.flops / pace.seconds / self.peak,
            "padding_fraction": 1 - sums["valid_tokens"] / max(1.0, sums["slots"]),
        }
        if sums.get("bound_tokens"):
            row["bits_per_token"] = sums["bound_nats"] / (math.log(2) * sums["bound_tokens"])
        return row

    def _validate_now(self) -> bool:
        """The validation that is due, and what follows from it. False when a signal ended it: then the step is saved,
        and the validation is the first thing that the run does when it goes on."""
        step = self.engine.global_steps
        try:
            figures = self.validate()
        except Stopped:
            self.log("the validation is given up; it is done when the run goes on")
            if self.saved_step != step:
                self.save()
            return False
        self.validation_due = False
        if figures:
            self.tracker.complete(step, figures)
            self._print_validation(figures)
            self._keep_validation(step, self._improved(figures))
        return True

    def _keep_validation(self, step: int, improved: bool) -> None:
        """A checkpoint of this step learns what it is worth; the best one is saved if it is not yet."""
        saved = self.saved_step == step and self.dist.on_first_rank(
            lambda: checkpoints.add_validation(self.config.output_dir, step, self._validation_state(), improved)
        )
        if improved and saved:
            self.log(f"{checkpoints.tag_of(step)} is the best so far")
        elif improved:
            self.save(improved)

    def validate(self) -> dict:
        """The bound of the averaged weights on the held-out texts; all ranks share the work. Stopped on a signal."""
        if not len(self.parts.eval_set):
            return {}
        parts, engine = self.parts, self.engine.engine
        options = BoundOptions(device=self.dist.device)
        share = Share(self.dist.rank, self.dist.world_size, self.dist.sum_tensor, self.engine.asked_to_stop)
        engine.eval()
        try:
            with self.engine.averaged_weights():
                self.bound = bound_of(
                    parts.module, parts.text_format, parts.eval_set, forward=engine, options=options, share=share
                )
        finally:
            engine.train()
        self.figures = {"step": self.engine.global_steps, **self.bound.figures()}
        return {
            "val_loss": self.bound.loss,
            "val_bits_per_token": self.bound.bits_per_token,
            "val_bits_per_byte": self.bound.bits_per_byte,
            "val_token_accuracy": self.bound.accuracy_per_level,
        }

    def _improved(self, row: dict) -> bool:
        value = row.get("val_bits_per_token", math.inf)
        if not value < self.best:
            return False
        self.best, self.best_step = value, self.engine.global_steps
        return True

    def _validation_state(self) -> dict:
        return {
            "best": self.best if math.isfinite(self.best) else None,
            "best_step": self.best_step,
            "bits_per_token": self.bound.bits_per_token if self.bound else None,
            "figures": self.figures,
        }

    def save(self, improved: bool = False) -> None:
        """A checkpoint of this step, the best so far where the validation has `improved`. Collective."""
        state = {
            "epoch": self.epoch,
            "consumed_samples": self.engine.global_steps * self.train_batch_size,
            "train_batch_size": self.train_batch_size,
            **self._validation_state(),
            "validation_due": self.validation_due,
            "schedule": self.schedule.state() if self.schedule else None,
        }
        first = self.saved_step == self.first_step
        folder = checkpoints.save(
            *(self.engine, self.config.output_dir, state),
            write=self._write_parts,
            best=improved,
            keep=self.config.keep_checkpoints,
            back_at=self.first_step if first else None,
        )
        self.saved_step = self.engine.global_steps
        self.log(f"saved {folder}" + (" (best)" if improved else ""))

    def _write_parts(self, folder: Path) -> None:
        """Into a checkpoint: all that is needed to use it, or to go on from it, elsewhere than in its run."""
        write_text(folder / formats.MODEL, self.parts.module.model.description())
        write_text(folder / formats.TEXT, self.parts.text_format.description())
        self.parts.tokenizer.save_pretrained(folder / TOKENIZER)
        self.config.save(folder / formats.CONFIG)
        shutil.copyfile(Path(self.config.output_dir) / GIVEN_JSON, folder / GIVEN_JSON)

    # ---- words ----

    def log(self, line: str) -> None:
        """On rank 0. The run goes on when nobody listens any more (the launcher has ended, the terminal is closed)."""
        if self.dist.rank == 0:
            with contextlib.suppress(OSError):
                print(line, flush=True)

    def introduce(self, decided: list[str], notes: list[str], resumed: Path | None) -> None:
        """What the run is: `decided`, what was left open and is now known; `notes`, what its user should know."""
        parts, config = self.parts, self.config
        size = sum(p.ds_numel if hasattr(p, "ds_numel") else p.numel() for p in parts.module.parameters())
        if decided:
            self.log(f"automatic: {', '.join(decided)}")
        for note in notes:
            self.log(f"note: {note}")
        if resumed:
            self.log(f"resumed {resumed} at step {self.first_step}")
        self.log(
            f"{config.model}: {size / 1e6:.2f} M parameters; {parts.layout.codec}\n"
            f"{len(parts.train_set):,} training images with {parts.train_set.num_tokens:,} tokens, "
            f"{len(parts.eval_set):,} validation images with {parts.eval_set.num_tokens:,}; "
            f"unigram entropy {parts.unigram_entropy:.3f} bits per token\n"
            f"{self.dist.world_size} rank(s) on {self.dist.device.type}, ZeRO stage {self.engine.stage}, train batch "
            f"{self.train_batch_size} = {self.engine.accumulation} micro-batch(es) a rank; "
            f"{self.last_step} of {self.schedule_steps} steps"
        )
        if parts.module.told != parts.module.model.writing:
            self.log("bits/token of a step are those of many small steps; validations draw tokens in turn: fewer bits")

    def _print(self, row: dict, step: int) -> None:
        left = self.speed.time_left(self.last_step - step)
        words = [f"step {step}/{self.last_step}", f"epoch {row['epoch'] + 1}", f"loss {row['loss']:.4f}"]
        if "bits_per_token" in row:
            words.append(f"bits/token {row['bits_per_token']:.2f}")
        words += [f"lr {row['lr']:.2e}", f"grad norm {row['grad_norm']:.2f}"]
        words += [f"{row['valid_tokens_per_second']:,.0f} tokens/s"]
        words += [
            f"{row['model_flops_per_second'] / 1e9:,.0f} GFLOP/s ({row['peak_share']:.0%} of peak)",
            f"{left} left",
        ]
        self.log("  ".join(words))

    def _print_validation(self, figures: dict) -> None:
        self.log(
            f"validation: loss {figures['val_loss']:.4f}  bits/token {figures['val_bits_per_token']:.4f}  "
            f"bits/byte {figures['val_bits_per_byte']:.4f}"
        )

    def finish(self) -> None:
        """Shows what the run can do, and the commands to go on with it."""
        finished = self.engine.global_steps >= self.last_step and not self.engine.stop_requested
        if self.dist.rank == 0 and self.config.num_samples and finished:
            try:
                with self.signals.interrupting():
                    self._show_samples()
            except Interrupted:
                self.log("no more samples: the run is complete, and saved")
        self.tracker.close()
        self.dist.barrier()
        if self.bound is not None:
            self.log(
                f"\nvalidation: {self.bound.bits_per_token:.4f} bits per token "
                f"(unigram entropy {self.parts.unigram_entropy:.4f}), {self.bound.bits_per_byte:.4f} bits per byte"
            )
        for what, command in next_steps(self.config, len(self.parts.train_set), self._a_prompt()).items():
            self.log(f"{what + ':':<14}{command}")

    def _show_samples(self) -> None:
        """Texts from the last checkpoint as a user would get them, from the averaged weights on the disk."""
        folder = Path(self.config.output_dir) / checkpoints.FOLDER / checkpoints.tag_of(self.saved_step)
        trained = load_trained(str(folder))
        texts = generate(trained, self._prompts(), SamplingOptions(seed=self.config.seed))
        print("\nsamples:")
        show(texts)
        step = self.engine.global_steps
        self.tracker.images("samples", images_of(trained, texts), step)
        lines = [f"- {text['prompt'] or ''} → {text['text']}" for text in texts]
        self.tracker.text("samples", "\n".join(lines), step)

    def _a_prompt(self) -> str | None:
        """Of a run whose prompts are conditions: one that its model can be asked to answer."""
        if not self.config.enable_condition:
            return None
        for texts in (self.parts.eval_set, self.parts.train_set):
            asked = np.flatnonzero(texts.prompt_lengths)
            if len(asked):
                return self.parts.tokenizer.decode(texts.prompt_ids(int(asked[0])))
        return None

    def _prompts(self) -> list[str | None]:
        count, held_out = self.config.num_samples, self.parts.eval_set
        if not self.config.enable_condition or not len(held_out):
            return [None] * count
        decode = self.parts.tokenizer.decode
        return [decode(held_out.prompt_ids(i)) for i in range(min(count, len(held_out)))]


@dataclass
class Pace:
    """What was done in `steps` steps that took `seconds`, `waited` of them for data: sums over all ranks."""

    steps: int
    seconds: float
    waited: float
    valid_tokens: float
    flops: float


class Speedometer:
    """What was done since the last reading, and the pace of the whole run."""

    def __init__(self) -> None:
        self.all_steps, self.all_seconds = 0, 0.0
        self.restart()

    def add(self, result: StepResult, wait_seconds: float) -> None:
        """A step. Its sums stay where they are: no accelerator is waited for."""
        self.results.append(result)
        self.waited += wait_seconds

    def read(self) -> Pace:
        """Of the steps since the last reading, at least one."""
        sums = [result.sums for result in self.results]
        tokens, flops = (sum(values[name] for values in sums) for name in ("valid_tokens", "flops"))
        seconds = time.perf_counter() - self.begun
        pace = Pace(len(sums), seconds, self.waited, tokens, flops)
        self.all_steps, self.all_seconds = self.all_steps + pace.steps, self.all_seconds + seconds
        self.restart()
        return pace

    def restart(self) -> None:
        """Leaves what happened since the last reading (a validation, say) out of the next."""
        self.results: list[StepResult] = []
        self.waited, self.begun = 0.0, time.perf_counter()

    def time_left(self, steps: int) -> str:
        seconds = round(steps * self.all_seconds / max(1, self.all_steps))
        hours, minutes = seconds // 3600, seconds // 60 % 60
        return f"{hours}:{minutes:02d}:{seconds % 60:02d}" if hours else f"{minutes}:{seconds % 60:02d}"
