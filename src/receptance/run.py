"""A training run in its folder: progress, reports, checkpoints, and a stop that loses nothing."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from receptance import checkpoint, plots
from receptance.data import TokenFiles
from receptance.generation import generate
from receptance.scoring import bits_per_byte, negative_log_likelihood
from receptance.tokenizer import Tokenizer
from receptance.training import StepReport, Trainer

# Validation looks at this many tokens, the same ones every time; the end of a run at all as well.
_QUICK_VALIDATION = 1 << 17
_SAMPLE_TOKENS = 80
# After this many saves that failed in a row the run gives up.
_FAILED_SAVES = 3


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What a run shows and keeps while it trains."""

    reports: int = 10
    """Times in the run to validate, print a sample, redraw the plot and save a checkpoint."""
    sample_prompt: str = ""
    """What the samples continue."""
    keep: int = 2
    """Checkpoints to keep."""

    def __post_init__(self) -> None:
        for name in ("reports", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")


class Run:
    """A training run in its folder: steps, reports, checkpoints."""

    def __init__(
        self,
        out: Path,
        options: RunOptions,
        trainer: Trainer,
        tokenizer: Tokenizer,
        corpus: TokenFiles,
        console: Console,
    ) -> None:
        self.out, self.options, self.console = out, options, console
        self.trainer, self.tokenizer, self.corpus = trainer, tokenizer, corpus
        self.metrics = out / "metrics.jsonl"
        self.failed_saves = 0
        self.unwritten = b""  # metrics that a full disk refused
        self.saved_step = trainer.step or -1  # a resumed run begins with a checkpoint

    def go(self) -> None:
        """Train to the end, or to the step in which a stop was asked for."""
        trainer, reports = self.trainer, self.options.reports
        self._forget_metrics_after(trainer.step)
        reported = int(trainer.progress * reports)
        with _stop_requested() as stop:
            with progress_bar(self.console) as bar:
                task = bar.add_task("training", total=1.0, note="")
                bar.update(task, completed=trainer.progress)
                while not trainer.finished and not stop.is_set():
                    report = trainer.run_step()
                    self._record(asdict(report))
                    bar.update(task, completed=trainer.progress, note=_describe(report))
                    if not trainer.finished and int(trainer.progress * reports) > reported:
                        reported = int(trainer.progress * reports)
                        self._report(quick=True)
            if stop.is_set():
                self.console.print(f"stopping after step {trainer.step}")
            if self.saved_step != trainer.step:
                if trainer.finished:
                    self._report(quick=False)
                else:
                    self._save()
        self._conclude()

    def _conclude(self) -> None:
        """Say how the run ended and what to do next."""
        if self.unwritten:
            say(self.console, f"the last records are missing in {self.metrics}", style="bold red")
        if self.failed_saves:
            raise ValueError(f"the last step ({self.trainer.step}) is not saved; see above")
        if self.trainer.finished:
            say(self.console, f"done: {self._newest()}  (plot: {self.out / 'loss.png'})")
        else:
            command = shlex.join(["receptance", "train", "--resume", "--out", str(self.out)])
            say(self.console, f"continue with: {command}")

    def _report(self, *, quick: bool) -> None:
        """Save, validate, sample, plot."""
        self._save()
        step = self.trainer.step
        bits = self._validate(_QUICK_VALIDATION)
        sample = generate(
            self.trainer.model.eval(),
            self.tokenizer,
            self.options.sample_prompt,
            max_tokens=_SAMPLE_TOKENS,
            top_p=0.9,
            seed=step,
        )
        sample = self.options.sample_prompt + sample
        self.console.print(f"step {step}: validation {bits:.4f} bits per byte")
        self.console.print(f"  {sample!r}", style="dim", markup=False, highlight=False)
        self._record({"step": step, "validation_bits_per_byte": bits, "sample": sample})
        if not quick and len(self.corpus.validation) > _QUICK_VALIDATION:
            bits = self._validate(len(self.corpus.validation))
            self.console.print(f"all of the validation text: {bits:.4f} bits per byte")
            self._record({"step": step, "whole_validation_bits_per_byte": bits})
        try:
            plots.draw_losses(self.metrics, self.out / "loss.png")
        except (OSError, ValueError) as error:
            say(self.console, f"no plot: {error}")

    def _validate(self, limit: int) -> float:
        tokens = np.asarray(self.corpus.validation[:limit])
        end = self.tokenizer.end_of_text
        size = len(self.tokenizer.decode_bytes(tokens[tokens != end].tolist()))
        nats = negative_log_likelihood(
            self.trainer.model, tokens, start=end, dtype=self.trainer.dtype
        )
        return bits_per_byte(nats, max(1, size))

    def _save(self) -> None:
        """A new checkpoint, then fewer old ones; a full disk costs neither the run nor those."""
        trainer = self.trainer
        directory = self.out / f"step-{trainer.step:08d}"

        def write(partial: Path) -> None:
            checkpoint.write_model(trainer.model, partial, self.tokenizer)
            trainer.write(partial)

        try:
            checkpoint.write_directory(directory, write)
            checkpoint.verify(directory)
        except ValueError as error:
            self.failed_saves += 1
            say(self.console, f"checkpoint not saved: {error}", style="bold red")
            if self.failed_saves >= _FAILED_SAVES:
                raise ValueError(f"{_FAILED_SAVES} saves failed in a row: {error}") from None
            return
        self.failed_saves, self.saved_step = 0, trainer.step
        for old in checkpoint.step_directories(self.out)[: -self.options.keep]:
            shutil.rmtree(old, ignore_errors=True)

    def _newest(self) -> Path:
        return checkpoint.step_directories(self.out)[-1]

    def _record(self, values: dict[str, Any]) -> None:
        """Append to the metrics; what a full disk refuses waits for the next time."""
        tokens = values["step"] * self.trainer.options.batch * self.trainer.options.context
        self.unwritten += json.dumps({"tokens": tokens, **values}).encode() + b"\n"
        with suppress(OSError), self.metrics.open("ab", buffering=0) as file:
            self.unwritten = self.unwritten[file.write(self.unwritten) :]

    def _forget_metrics_after(self, step: int) -> None:
        """Steps that are done again are recorded again."""
        if not self.metrics.exists():
            return
        lines = self.metrics.read_text().splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("}\n")]
        kept = [line for line in whole if json.loads(line)["step"] <= step]
        partial = self.metrics.with_name("metrics.jsonl.partial")
        partial.write_text("".join(kept))
        os.replace(partial, self.metrics)


def say(console: Console, line: str, style: str | None = None) -> None:
    """Print a line with paths in it: not wrapped, not styled, brackets left alone."""
    console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)


def _describe(report: StepReport) -> str:
    return f"step {report.step}  loss {report.loss:.3f}  {report.tokens_per_second:,.0f} tokens/s"


def progress_bar(console: Console) -> Progress:
    """A bar with a note, the time so far and the time that is left."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f}%  {task.fields[note]}"),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        console=console,
    )


@contextmanager
def _stop_requested() -> Iterator[threading.Event]:
    """An event that Ctrl-C or SIGTERM sets; a second Ctrl-C interrupts at once."""
    stop = threading.Event()

    def ask(signum: int, frame: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
