"""The training loop: what happens in a step, after it now and then, and at the end of a run."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from ds_tokimg.console import given_up
from ds_tokimg.data.loader import BatchLoader, LoadedBatch, Part, StreamLoader
from ds_tokimg.data.order import TrainBatchSampler
from ds_tokimg.data.stream import Place
from ds_tokimg.engine import checkpoint as checkpoints
from ds_tokimg.engine.allocator import peak_memory
from ds_tokimg.engine.engine import StepResult, TrainEngine
from ds_tokimg.engine.saving import CannotWrite, Saving
from ds_tokimg.engine.skipping import LOSS_SCALE
from ds_tokimg.errors import TrainingError
from ds_tokimg.inference.loading import TOKENIZER
from ds_tokimg.inference.texts import show
from ds_tokimg.model.flops import matmul_peak
from ds_tokimg.settings import formats
from ds_tokimg.settings.command_line import GIVEN_JSON
from ds_tokimg.settings.config import TrainConfig
from ds_tokimg.settings.files import write_text
from ds_tokimg.training import dashboard, ngram
from ds_tokimg.training.assemble import Parts
from ds_tokimg.training.bound import Bound, BoundOptions, Share, Stopped, bound_of
from ds_tokimg.training.budget import Validations
from ds_tokimg.training.ending import prompt_to_try, write_samples
from ds_tokimg.training.health import Health, check_folder, describe_skip, where_to_go_on
from ds_tokimg.training.next_steps import next_steps
from ds_tokimg.training.profiling import profiled
from ds_tokimg.training.report import Report, Speedometer, timed, times_due
from ds_tokimg.training.samples import Gallery, as_lines, as_table
from ds_tokimg.training.scores import Scores, row_of
from ds_tokimg.training.signals import Interrupted, StopSignals
from ds_tokimg.training.tracking import Meter, Tracker


class Run:
    """The training loop: what is done at every step, now and then, and at the end."""

    def __init__(self, config: TrainConfig, settings: dict, parts: Parts, engine: TrainEngine, state: dict):
        self.config, self.parts, self.engine, self.dist = config, parts, engine, engine.dist
        self.train_batch_size = settings["train_batch_size"]
        self.schedule_steps = parts.steps_per_epoch(self.train_batch_size) * config.epochs
        self.last_step = min(self.schedule_steps, config.max_steps or self.schedule_steps)
        self.first_step = state.get("step", 0)
        self.validations = Validations(config, parts)
        self.scores = Scores(self.validations, state, self._is_kept)
        first_rank, steps = self.dist.rank == 0, (self.first_step, self.last_step)
        self.report = Report(first_rank, config.verbose, steps, self._ahead)
        self.health = Health(config, state.get("health") or {})
        self.tracker = Tracker(config.output_dir, engine, self.first_step, dashboard.tags_of(parts))
        self.tracker.describe(*dashboard.opening(config, settings, parts, self.dist))
        self.gallery = Gallery(config, parts, engine, self.tracker)
        self.meter = Meter(self.tracker.last_row(), self.first_step)
        # All ranks at once, as they compute.
        self.peak = self.dist.sum([matmul_peak(self.dist.device, engine.compute_dtype)])[0]
        self.speed = Speedometer(self.report.watch)
        self.saved_step = self.first_step
        self.epoch = state.get("epoch", 0)
        self.place = Place(*state["place"]) if state.get("place") else None  # of a stream
        self.validation_due = state.get("validation_due", False) and len(parts.eval_set) > 0  # at its step
        self.signals, self.stopped = StopSignals(engine), False
        self.schedule = parts.module.schedule
        if self.schedule is not None and state:
            self.schedule.load_state(state["schedule"])

    def _is_kept(self, step: int) -> bool:
        root = Path(self.config.output_dir) / checkpoints.FOLDER
        return self.dist.broadcast((root / checkpoints.tag_of(step)).is_dir())

    def loop(self) -> None:
        loader = self.loader()
        with profiled(self.config.profile, self.config.output_dir, self.dist) as tick, self.report.progress:
            self.stopped = self.validation_due and not self._validate_now()  # what an earlier launch gave up
            for loaded in () if self.stopped else self._batches(loader):
                self.stopped = self.step(loaded)
                self.report.passed(self.engine.global_steps)
                if self.stopped:
                    break
                tick()
        if self.stopped:
            self.log(f"stopped by a signal at step {self.engine.global_steps}")

    def loader(self) -> BatchLoader:
        """What prepares this rank's batches."""
        parts, size = self.parts, self.train_batch_size
        part = Part(self.dist.world_size, self.dist.rank, self.engine.accumulation)
        how = {"num_workers": self.config.num_workers, "pin_memory": self.dist.device.type != "cpu"}
        if parts.stream:
            return StreamLoader(parts.stream, size, parts.batch_maker, part, **how)
        train_set = parts.train_set
        sampler = TrainBatchSampler(train_set.lengths, size, self.config.seed, mixture=train_set.mixture)
        return BatchLoader(train_set, sampler, parts.batch_maker, part, **how)

    def _batches(self, loader: BatchLoader) -> Iterator[LoadedBatch]:
        """Those of the steps that are left. A run that goes back leaves out the data that it has seen since."""
        left_out = None
        while left_out != self.health.batches_left_out:
            left_out = self.health.batches_left_out
            steps = (self.engine.global_steps + left_out, self.last_step + left_out)
            loader.place = self.place
            with contextlib.closing(loader.batches(*steps)) as batches:
                for loaded in batches:
                    yield loaded
                    if left_out != self.health.batches_left_out:
                        break

    def step(self, loaded) -> bool:
        """One optimiser step and what is due after it; True when the run is asked to end."""
        number, self.epoch, self.place = self.engine.global_steps + 1, loaded.epoch, loaded.place
        is_due = self._due(number)
        # 1. forward, backward, update
        self.parts.module.measure_bound = "log" in is_due
        result = self.engine.train_batch(loaded.micro_batches, self.health.guard)
        self.health.add(result)
        if self.schedule is not None and not result.skipped:
            self.schedule.update(result.sums)
        self.speed.add(result, loaded.wait_seconds)
        self.meter.add(result)
        # 2. log, keep, measure: a validation may take long, and what was trained is safe before it
        said = self._examine(result, loaded.samples.tolist())
        if said or is_due & {"log", "eval"}:
            row = self._metrics(result, loaded.epoch) | said
            self.tracker.log(row)
            self.report.step(row)
        if self.health.goes_back():
            self._go_back()
            return False
        self.health.check_patience(result, self.config.output_dir)
        self.validation_due, stop = "eval" in is_due and len(self.parts.eval_set) > 0, result.stop
        must_save = stop or number == self.last_step
        if must_save or ((self.health.owes_save or "save" in is_due) and not self.health.postpones(result)):
            self.save(must=must_save)
            stop = stop or self.engine.asked_to_stop()
        if self.validation_due and not stop:
            stop = not self._validate_now()
        if is_due & {"save", "eval"}:
            self.speed.restart()
        return stop

    def _examine(self, result: StepResult, samples: list[int]) -> dict:
        """Says what is wrong with a step, of these samples, or with the run; more for the step's row of metrics."""
        diverged = self.health.divergence(self.config.output_dir)
        if diverged:
            self.log(diverged)
        if result.skipped in ("", LOSS_SCALE):
            return {}
        self.log(describe_skip(result, samples))
        return {"skipped": result.skipped, "skipped_images": samples}

    def _go_back(self) -> None:
        """To the last good checkpoint, and on with other data. TrainingError where there is none."""
        left = self.engine.global_steps
        folder = self.dist.on_first_rank(lambda: checkpoints.newest_sane(self.config.output_dir))
        if folder is None:
            raise TrainingError(
                f"{self.health.in_a_row} steps in a row were skipped, up to step {left}, and there is no checkpoint to "
                "go back to"
            )
        state = self.engine.load(checkpoints.find(self.config.output_dir, str(folder), self.dist))
        self.first_step = self.saved_step = state["step"]
        self.health.went_back(self.first_step, state.get("health") or {}, left)
        self.scores.go_back(state)
        if self.schedule is not None:
            self.schedule.load_state(state["schedule"])
        self.tracker.go_back(self.first_step)
        self.speed.restart()
        self.log(f"gone back to {folder}; the data of steps {self.first_step + 1} to {left} are left out")

    def _due(self, step: int) -> set[str]:
        last = step == self.last_step
        config = self.config
        intervals = {"log": config.log_interval, "eval": config.eval_interval, "save": config.save_interval}
        return {name for name, every in intervals.items() if last or step % every == 0 or (step, name) == (1, "log")}

    def _ahead(self, step: int) -> dict[str, float]:
        """What lies between a step and the end of the run, as `Stopwatch` counts it."""
        config, read = self.config, self.validations.tokens
        validations, saves = (times_due(step, self.last_step, n) for n in (config.eval_interval, config.save_interval))
        tokens = (validations - 1) * read(self.first_step) + read(self.last_step) if validations else 0
        return {"step": self.last_step - step, "validated": tokens, "save": saves}

    def _metrics(self, result, epoch: int) -> dict:
        sums, pace = result.sums, self.speed.read()
        # A machine that was busy when its peak was measured has done better since.
        self.peak = max(self.peak, pace.flops / pace.seconds)
        row = {
            "step": result.step,
            "epoch": epoch,
            "consumed_samples": (result.step + self.health.batches_left_out) * self.train_batch_size,
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
            "tokens_seen": self.meter.tokens_seen(),
            "peak_memory_bytes": peak_memory(self.dist.device),
        }
        return row | dashboard.step_bits(sums, self.parts.module)

    def _validate_now(self) -> bool:
        """The validation that is due, and what follows from it. False when a signal ended it: then the step is saved,
        and the validation is the first thing that the run does when it goes on."""
        step, scores = self.engine.global_steps, self.scores
        try:
            bound = self.validate()
        except Stopped:
            self.log("the validation is given up; it is done when the run goes on")
            if self.saved_step != step:
                self.save(must=True)
            return False
        self.validation_due = False
        self.tracker.complete(step, row_of(bound, self.parts.unigram_entropy))
        self.report.validation(bound)
        best_before = scores.best, scores.best_step
        try:
            self._keep_validation(step, scores.add(bound, step))
        except CannotWrite as problem:
            scores.best, scores.best_step = best_before
            self.log(str(problem))
        self.gallery.show(self.signals)
        return True

    def _keep_validation(self, step: int, improved: bool) -> None:
        """A checkpoint of this step learns what it is worth; the best one is saved if it is not yet. CannotWrite where
        that fails."""
        add = partial(checkpoints.add_validation, self.config.output_dir, step, self.scores.state(), improved)
        saving = Saving(Path(self.config.output_dir), self.dist)
        saved = self.saved_step == step and saving.on_first_rank(add)
        if improved and saved:
            self.log(f"{checkpoints.tag_of(step)} is the best so far")
        elif improved:
            self.save(improved, must=True)

    def validate(self) -> Bound:
        """The bound of the averaged weights on held-out texts; all ranks share the work. Stopped on a signal."""
        parts, engine, step = self.parts, self.engine.engine, self.engine.global_steps
        texts, tokens = self.validations.texts(step), self.validations.tokens(step)
        if len(texts) > self.validations.count:
            self.log(f"the last validation reads all {len(texts):,} held-out texts")
        options = BoundOptions(self.validations.levels, device=self.dist.device, shown="validating")
        share = Share(self.dist.rank, self.dist.world_size, self.dist.sum_tensor, self.engine.asked_to_stop)
        engine.eval()
        try:
            with self.engine.averaged_weights(), self.report.watch.taking("validated", tokens):
                return bound_of(parts.module, parts.text_format, texts, forward=engine, options=options, share=share)
        finally:
            engine.train()

    @timed("save")
    def save(self, improved: bool = False, must: bool = False) -> None:
        """A checkpoint of this step, the best so far where the validation has `improved`. Collective.

        Where it cannot be written, the run goes on; but where it `must` be, CannotWrite. TrainingError where there is
        nothing worth saving, as NaN has got into the weights.
        """
        try:
            folder = self._save(improved)
        except checkpoints.NotFinite as problem:
            raise TrainingError(f"{problem}. {where_to_go_on(self.config.output_dir)}") from problem
        except CannotWrite as problem:
            if must:
                raise
            every, step = self.config.save_interval, self.engine.global_steps
            again = min(self.last_step, (step // every + 1) * every)
            self.log(f"step {step} is not saved: {problem}. The run goes on and tries again at step {again}")
            return
        self.saved_step = self.engine.global_steps
        self.log(f"saved {folder}" + (" (best)" if improved else ""))

    def _save(self, improved: bool) -> Path:
        check_folder(self.config.output_dir, self.dist)
        samples = (self.engine.global_steps + self.health.batches_left_out) * self.train_batch_size
        state = {
            "epoch": self.epoch,
            "consumed_samples": samples,
            "train_batch_size": self.train_batch_size,
            "place": self.place,
            **self.scores.state(),
            "validation_due": self.validation_due,
            "validations": self.validations.state(),
            "schedule": self.schedule.state() if self.schedule else None,
            "health": self.health.state(),
            "sane": self.health.is_sane,
        }
        first = self.saved_step == self.first_step
        return checkpoints.save(
            *(self.engine, self.config.output_dir, state),
            write=self._write_parts,
            best=improved,
            keep=self.config.keep_checkpoints,
            back_at=self.first_step if first else None,
        )

    def _write_parts(self, folder: Path) -> None:
        """Into a checkpoint: all that is needed to use it, or to go on from it, elsewhere than in its run."""
        write_text(folder / formats.MODEL, self.parts.module.model.description())
        write_text(folder / formats.TEXT, self.parts.text_format.description())
        self.parts.tokenizer.save_pretrained(folder / TOKENIZER)
        self.config.located().save(folder / formats.CONFIG)
        for name in (GIVEN_JSON, formats.DATA):
            shutil.copyfile(Path(self.config.output_dir) / name, folder / name)

    # ---- words ----

    def log(self, line: str) -> None:
        """On rank 0."""
        self.report.say(line)

    def introduce(self, decided: list[str], notes: list[str], resumed: Path | None) -> None:
        """What the run is: `decided`, what was left open and is now known; `notes`, what its user should know."""
        unhealthy = self.health.note(self.first_step, self.config.output_dir)
        self.report.begin(self.config, decided, [*notes, unhealthy] if unhealthy else notes, resumed)
        engine = (
            f"{self.dist.world_size} rank(s) on {self.dist.device.type}, ZeRO stage {self.engine.stage}, train batch "
            f"{self.train_batch_size} = {self.engine.accumulation} micro-batch(es) a rank; "
            f"{self.last_step} of {self.schedule_steps} steps"
        )
        self.report.describe(self.parts, self.config.model, engine)
        if self.first_step >= self.last_step:
            end = "its schedule" if self.last_step == self.schedule_steps else "--max_steps"
            self.log(f"nothing is left to train: step {self.first_step} is reached, and {end} ends at {self.last_step}")
        if not self.scores.compares:
            self.log("validations read other texts than before: the best checkpoint is found anew")

    def finish(self) -> None:
        """Shows what the run can do, and the commands to go on with it."""
        complete = self.engine.global_steps >= self.last_step
        if self.dist.rank == 0 and self.config.num_samples and complete:
            try:
                with self.signals.interrupting():
                    self._show_samples()
            except Interrupted:
                self.log("no more samples: the run is complete, and saved")
        self.tracker.close(*dashboard.closing(complete))
        self.dist.barrier()
        prompt, step = prompt_to_try(self.config, self.parts), self.engine.global_steps
        commands = next_steps(self.config, self.parts.images, prompt, step)
        counted, bound = None, self.scores.bound
        if bound is not None and self.dist.rank == 0:
            counted = ngram.measure(self.parts.train_set, self.parts.eval_set)
        self.report.end(bound, self.parts.unigram_entropy, counted, commands)

    def _show_samples(self) -> None:
        self.dist.progress.doing, self.dist.progress.open_ended = "writing samples", True
        folder = Path(self.config.output_dir) / checkpoints.FOLDER / checkpoints.tag_of(self.saved_step)
        texts = write_samples(self.config, self.parts, folder)
        self.tracker.text("at_the_end", as_lines(texts), self.engine.global_steps, as_table(texts))
        with given_up():  # last: nobody may be reading any more
            print("\nsamples:")
            show(texts)
