"""A training run in its folder: progress, reports, checkpoints, and a stop that loses nothing."""

from __future__ import annotations

import statistics
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console

from receptance import plots
from receptance.atomic import written
from receptance.data.ondisk import blocks
from receptance.inference.generation import generate
from receptance.inference.scoring import bits_per_byte
from receptance.progress import progress_bar, say
from receptance.storage.checkpoint import write_description
from receptance.storage.directories import (
    LEAST_KEPT,
    newest_checkpoint,
    put_aside,
    step_directories,
)
from receptance.training.devices import mfu, peak_flops
from receptance.training.logs import METRICS, MetricsLog, Value, has_report, open_logs
from receptance.training.notes import flat, notes
from receptance.training.saving import Saver, restore
from receptance.training.start import Start
from receptance.training.stopping import stop_requested
from receptance.training.trainer import SPIKE_MEMORY, NotFinite, StepReport

# Validation reads this many tokens, always the same; at the end of the run it reads all others too.
_QUICK_VALIDATION = 1 << 17
_SAMPLE_TOKENS = 80
# The run ends after this many bad steps in a row, because it no longer trains anything.
_BAD_STEPS = 10
# The run ends after this many rollbacks, because they evidently do not help.
_ROLLBACKS = 10


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What a run shows and keeps while it trains."""

    reports: int = 10
    """How often in the run to validate, print a sample, redraw the plot and save a checkpoint."""
    save_minutes: float = 15.0
    """Save a checkpoint also when there was none for so many minutes."""
    sample_prompt: str = ""
    """The text that the samples continue."""
    keep: int = 2
    """The number of checkpoints to keep."""
    log: tuple[Literal["tensorboard", "wandb", "wandb-offline"], ...] = ()
    """Where the figures go besides metrics.jsonl and loss.png."""

    def __post_init__(self) -> None:
        least = {"reports": 1, "keep": LEAST_KEPT, "save_minutes": 0}
        for name, value in least.items():
            if not getattr(self, name) >= value:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {value}")


class Run:
    """A training run in its folder: steps, reports, checkpoints.

    If there are several processes, all go through the same steps and the first one reports.
    """

    def __init__(
        self,
        out: Path,
        options: RunOptions,
        start: Start,
        console: Console,
    ) -> None:
        self.out, self.options, self.console = out, options, console
        self.start, self.trainer = start, start.trainer
        trainer = start.trainer
        self.saver = Saver(out, options.keep, self._describe, trainer.ranks, self._alarm)
        self.saver.saved_step = trainer.step or -1  # a resumed run begins with a checkpoint
        self.last_save = time.monotonic()
        self.bad_steps = self.rollbacks = 0
        self.plot_failure = ""
        self.peak = peak_flops(trainer.device) * trainer.ranks.count

    def _describe(self, folder: Path) -> dict[str, Any]:
        if self.trainer.adapter is None:
            write_description(self.trainer.model.config, folder, self.start.tokenizer)
        return notes(self.out, self.start.options, self.start.corpus)

    def go(self) -> bool:
        """Train to the end, or to the end of the step in which a stop was asked for.

        Returns whether it was the end. ValueError if the run cannot go on, or was not saved.
        """
        trainer, config = self.trainer, flat(self.start.options)
        kinds = self.options.log if trainer.ranks.first else ()
        self.logs = open_logs(self.out, kinds, trainer.step, config) if trainer.ranks.first else []
        with stop_requested() as stop:
            try:
                self._train(stop)
            finally:
                self.saver.wait()
                for log in self.logs:
                    log.close()
        self._conclude()
        return trainer.finished

    def _train(self, stop: threading.Event) -> None:
        trainer, reports = self.trainer, self.options.reports
        reported = int(trainer.progress * reports)
        if trainer.options.rollback and self.saver.saved_step < 0:
            self._save()  # something to go back to
        if not trainer.finished and self._was_cut_off():
            self._report(quick=True)
        with progress_bar(self.console) as bar:
            task = bar.add_task("training", total=1.0, note="")
            bar.update(task, completed=trainer.progress)
            while not (stopping := self._agree(stop.is_set())) and not trainer.finished:
                report = self._step()
                if report is not None:
                    bar.update(task, completed=trainer.progress, note=self._note(report))
                if not trainer.finished and int(trainer.progress * reports) > reported:
                    reported = int(trainer.progress * reports)
                    self._report(quick=True)
                elif self._agree(self._is_late() or self.saver.exhausted):
                    self._save()  # which ends the run if saving has failed too often
                self.saver.poll()
        if stopping:
            self.console.print(f"stopping after step {trainer.step}")
        if trainer.finished and not self._agree(self._is_reported()):
            self._report(quick=False)
        self._save_once()  # again, if the disk was full in the report

    def _is_late(self) -> bool:
        return time.monotonic() - self.last_save > 60 * self.options.save_minutes

    def _is_reported(self) -> bool:
        return self.trainer.ranks.first and has_report(self.out, self.trainer.step)

    def _was_cut_off(self) -> bool:
        """Whether the run was killed during the report of the step that it goes on from."""
        trainer, reports = self.trainer, self.options.reports
        total = trainer.options.total_steps
        before, now = max(0, trainer.step - 1) / total, trainer.step / total
        due = int(now * reports) > int(before * reports)
        return due and not self._agree(self._is_reported())

    def _agree(self, flag: bool) -> bool:
        """Whether the flag is set in any of the processes."""
        return self.trainer.ranks.sum([float(flag)], self.trainer.device)[0] > 0

    # ---- steps ----------------------------------------------------------------------------------

    def _step(self) -> StepReport | None:
        """Take and record one step; None if its update was skipped."""
        try:
            report = self.trainer.run_step()
        except NotFinite as error:
            self._leave_out(error)
            return None
        self.bad_steps = 0
        self._record({**asdict(report), "mfu": self._mfu(report)})
        if self._is_spike(report.loss):
            self._roll_back(report)
        else:
            self.trainer.losses.append(report.loss)
        return report

    def _leave_out(self, error: NotFinite) -> None:
        """Store the batch of a bad step, then skip it or, by default, end the run."""
        step = self.trainer.step + 1
        file = self.out / f"bad-step-{step:08d}.npz"
        where = f"the batch is in {file}"
        if self.trainer.ranks.first:
            try:
                with written(file) as stream:
                    np.savez(stream, **error.batch.arrays())
            except OSError as failure:  # a full disk is no reason to stop
                where = f"the batch is lost, {file} cannot be written: {failure.strerror}"
        self.bad_steps += 1
        if not self.trainer.options.skip_bad_steps or self.bad_steps >= _BAD_STEPS:
            raise ValueError(f"{error}; stopped before the update; {where}; {self._way_on()}")
        self._alarm(f"{error}; the step is left out; {where}")
        self.trainer.leave_out_step()
        self._record({"step": step, "left_out": str(error)})

    def _way_on(self) -> str:
        """The advice after bad steps. Weights that led to them are not worth a checkpoint."""
        again = "begin in another folder with a lower learning_rate or more warmup_steps"
        self.saver.wait()
        return f"resume with skip_bad_steps, or {again}" if step_directories(self.out) else again

    def _is_spike(self, loss: float) -> bool:
        limit, losses = self.trainer.options.rollback, self.trainer.losses
        if not limit or len(losses) < SPIKE_MEMORY:
            return False
        return loss > statistics.fmean(losses) + limit

    def _roll_back(self, report: StepReport) -> None:
        """Return to the newest checkpoint, and skip the batches that were read since then."""
        self.rollbacks += 1
        self.saver.wait()
        if self.rollbacks > _ROLLBACKS:
            raise ValueError(
                f"the loss has left its mean {self.rollbacks} times; resume with rollback 0, or "
                "begin another run with a lower learning_rate"
            )
        trainer = self.trainer
        reached = trainer.step + trainer.passed_over
        directory, _ = newest_checkpoint(self.out)
        trainer.ranks.wait()
        if trainer.ranks.first:
            put_aside(directory)
        restore(trainer, directory)
        trainer.passed_over = reached - trainer.step
        self.saver.saved_step = -1  # that checkpoint does not say which batches are skipped
        self._alarm(
            f"loss {report.loss:.3f} at step {report.step} is a spike: back to step {trainer.step}"
        )
        self._record({"step": trainer.step, "rolled_back_from": report.step})

    # ---- reports --------------------------------------------------------------------------------

    def _conclude(self) -> None:
        """Say how the run ended; ValueError if its last step is not saved."""
        if any(isinstance(log, MetricsLog) and log.unwritten for log in self.logs):
            self._alarm(f"the last records are missing in {self.out / METRICS}")
        if self.saver.saved_step != self.trainer.step:
            raise ValueError(f"the last step ({self.trainer.step}) is not saved; see above")
        if self.trainer.finished:
            newest = self.out / f"step-{self.trainer.step:08d}"
            say(self.console, f"done: {newest}  (plot: {self.out / 'loss.png'})")

    def _report(self, *, quick: bool) -> None:
        """Save, validate, sample, plot."""
        self._save_once()
        step = self.trainer.step
        whole = len(self.start.corpus.validation)
        self._validate(min(whole, _QUICK_VALIDATION), "validation")
        self._sample(step)
        if not quick and whole > _QUICK_VALIDATION:
            self._validate(whole, "whole validation")
        if self.trainer.ranks.first:
            self._draw()

    def _draw(self) -> None:
        """Draw the plot; if that fails, say why once."""
        try:
            plots.draw_losses(self.out / METRICS, self.out / "loss.png")
        # A plot must not end days of training, and matplotlib raises whatever its fonts, its cache
        # or its backend come across.
        except Exception as error:
            failure = " ".join(str(error).split()) or type(error).__name__
            if failure != self.plot_failure:
                say(self.console, f"no plot: {failure}")
            self.plot_failure = failure

    def _validate(self, limit: int, what: str) -> None:
        """Say and record the figure of so many tokens; little text may have none."""
        step, (name, value) = self.trainer.step, self._figure(limit)
        if value is None:
            self.console.print(f"step {step}: nothing to validate on; set validation higher")
            return
        self.console.print(f"step {step}: {what} {value:.4f} {name}")
        self._record({"step": step, f"{what} {name}".replace(" ", "_"): value})

    def _figure(self, limit: int) -> tuple[str, float | None]:
        """Bits per byte of text, or nats per token of the responses in examples."""
        corpus, mask = self.start.corpus, self.start.corpus.validation_mask
        tokens = np.asarray(corpus.validation[:limit])
        if mask is not None:
            return "nats per token", self.trainer.validate_examples(tokens, mask[:limit])
        nats = self.trainer.validate(tokens)
        # Blocks keep memory small: a list of all ids would take many times that of the text.
        texts = (block[block != corpus.end_of_text].tolist() for block in blocks(tokens))
        size = sum(len(self.start.tokenizer.decode_bytes(ids)) for ids in texts)
        return "bits per byte", bits_per_byte(nats, size) if size else None

    def _sample(self, step: int) -> None:
        """Print and record a continuation, unless no process holds the whole model."""
        trainer, prompt = self.trainer, self.options.sample_prompt
        if not trainer.ranks.first or trainer.sharded:
            return
        trainer.switch(training=False)
        state = trainer.adapter.initial_state(1) if trainer.adapter else None
        try:
            text = generate(
                trainer.model,
                self.start.tokenizer,
                prompt,
                max_tokens=_SAMPLE_TOKENS,
                top_p=0.9,
                seed=step,
                state=state,
            )
        except ValueError as error:  # the weights are not finite, as the next step will say
            self._alarm(f"no sample: {error}")
            return
        self.console.print(f"  {prompt + text!r}", style="dim", markup=False, highlight=False)
        self._record({"step": step, "sample": prompt + text})

    def _save_once(self) -> None:
        """Save this step unless it is saved, or being saved."""
        self.saver.wait()
        if self.saver.saved_step != self.trainer.step:
            self._save()

    def _save(self) -> None:
        self.saver.save(self.trainer)
        self.last_save = time.monotonic()

    def _record(self, values: dict[str, Value]) -> None:
        options = self.trainer.options
        tokens = int(values["step"]) * options.batch * options.context
        for log in self.logs:
            log.record({"tokens": tokens, **values})

    def _note(self, report: StepReport) -> str:
        speed = f"{report.tokens_per_second:,.0f} tokens/s ({self._mfu(report):.0%} mfu)"
        return f"step {report.step}  loss {report.loss:.3f}  {speed}"

    def _mfu(self, report: StepReport) -> float:
        return mfu(report.tokens_per_second, self.trainer.model.config, self.peak)

    def _alarm(self, line: str) -> None:
        say(self.console, line, style="bold red")
