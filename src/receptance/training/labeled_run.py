"""A run that trains on sequences with answers, in a folder like those of language models.

Checkpoints, metrics, the plot, Ctrl-C and what happens to bad steps are those of `Run`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from rich.console import Console

from receptance.storage.directories import newest_checkpoint, put_aside, step_directories
from receptance.training.devices import mfu
from receptance.training.labeled import LabeledTrainer, Score
from receptance.training.logs import Value
from receptance.training.options import StartOptions
from receptance.training.run import Run, RunOptions
from receptance.training.saving import read_training, restore
from receptance.training.start import Start
from receptance.training.trainer import StepReport

# Reports while the run goes on read at most so many batches of the validation part.
_QUICK_BATCHES = 16


@dataclass(frozen=True)
class LabeledStart:
    """What a run on labeled sequences is made of."""

    trainer: LabeledTrainer
    options: StartOptions
    describe: Callable[[Path], None]
    """Puts what belongs to the model besides its weights into a checkpoint."""
    notes: Mapping[str, Any]
    """What training.json says besides the trainer's own entries and the options."""


class LabeledRun(Run):
    """A run of a `LabeledTrainer` in its folder: steps, reports, checkpoints."""

    def __init__(
        self, out: Path, options: RunOptions, start: LabeledStart, console: Console
    ) -> None:
        # A labeled run has everything that `Run` asks of a start, save for text.
        super().__init__(out, options, cast(Start, start), console)
        self.labeled = start

    def restored(self) -> LabeledRun:
        """The same run, which goes on from its newest whole checkpoint if there is one."""
        if step_directories(self.out):
            directory, skipped = newest_checkpoint(self.out)
            for reason in skipped:
                self._alarm(f"skipped a damaged checkpoint: {reason}")
            put_aside(directory)
            restore(self.trainer, directory)
            self.saver.saved_step = self.trainer.step
        return self

    def validate(self, *, quick: bool) -> Score:
        """Answer the validation part, or a beginning of it."""
        return self.labeled.trainer.score("validation", _QUICK_BATCHES if quick else None)

    def _describe(self, folder: Path) -> dict[str, Any]:
        self.labeled.describe(folder)
        return {"options": asdict(self.labeled.options), **self.labeled.notes}

    def _report(self, *, quick: bool) -> None:
        """Save, validate, plot."""
        self._save_once()
        step, found = self.trainer.step, self.validate(quick=quick)
        kind = self.labeled.trainer.problem.kind
        name = "accuracy" if kind == "classify" else "squared error"
        what = f"validation {found.mean:.4f} {name}, loss {found.loss:.4f}"
        self.console.print(f"step {step}: {what} ({len(found.examples)} examples)")
        values = {f"validation_{name}".replace(" ", "_"): found.mean, "validation_loss": found.loss}
        self._record({"step": step, **values})
        self._draw()

    def _record(self, values: dict[str, Value]) -> None:
        for log in self.logs:
            log.record({"tokens": self.labeled.trainer.positions, **values})

    def _mfu(self, report: StepReport) -> float:
        return mfu(report.tokens_per_second, self.labeled.trainer.model, self.peak)


def labeled_notes(directory: Path) -> dict[str, Any] | None:
    """What a checkpoint's training.json holds, if it is one of a labeled run; None if not."""
    about = read_training(directory)
    return about if "positions" in about else None
