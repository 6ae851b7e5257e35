"""The logs of a run: metrics.jsonl always, TensorBoard and Weights & Biases if asked for.

A log takes mappings that hold the step and any figures of it. No log ends a run: what a full disk
refuses waits in memory (metrics.jsonl), or the log is given up with a warning.
"""

from __future__ import annotations

import importlib.util
import json
import math
import secrets
import warnings
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from receptance.atomic import written

Value = float | int | str
METRICS = "metrics.jsonl"
KINDS = ("tensorboard", "wandb", "wandb-offline")

# A figure can be seen in TensorBoard after this many seconds.
_FLUSH_SECONDS = 10


class Log(Protocol):
    """A place that figures are recorded in."""

    def record(self, values: Mapping[str, Value]) -> None:
        """Record figures of the step values["step"]; a step may have several records."""

    def close(self) -> None:
        """Write what still waits. Nothing can be recorded afterwards."""


class MetricsLog:
    """Lines of JSON that are appended to metrics.jsonl.

    `unwritten` holds what a full disk has refused; every further record tries to write it again.
    """

    def __init__(self, folder: Path, resumed_step: int | None = None) -> None:
        self.path = folder / METRICS
        self.unwritten = b""
        if resumed_step is not None and self.path.exists():
            _forget_after(self.path, resumed_step)

    def record(self, values: Mapping[str, Value]) -> None:
        """Append one line. JSON has no word for numbers that are not finite: they become null."""
        finite = {name: _jsonable(value) for name, value in values.items()}
        self.unwritten += json.dumps(finite).encode() + b"\n"
        self._write()

    def close(self) -> None:
        """Try a last time to write what waits."""
        if self.unwritten:
            self._write()

    def _write(self) -> None:
        with suppress(OSError), self.path.open("ab", buffering=0) as file:
            self.unwritten = self.unwritten[file.write(self.unwritten) :]


class TensorBoardLog:
    """Event files in the run's folder `tensorboard`, which TensorBoard reads."""

    def __init__(self, folder: Path, resumed_step: int | None = None) -> None:
        _need("tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        # When it reads, TensorBoard drops what earlier event files hold from this step on.
        again = None if resumed_step is None else resumed_step + 1
        self.writer: SummaryWriter | None = SummaryWriter(
            folder / "tensorboard", purge_step=again, flush_secs=_FLUSH_SECONDS
        )

    def record(self, values: Mapping[str, Value]) -> None:
        """Write a scalar for every number and a text for every string."""
        if self.writer is None:
            return
        step = int(values["step"])
        try:
            for name, value in values.items():
                if isinstance(value, str):
                    self.writer.add_text(name, value, step)
                elif name != "step":
                    self.writer.add_scalar(name, value, step)
        except OSError as error:
            self._give_up(error)

    def close(self) -> None:
        """Write the events that still wait."""
        if self.writer is None:
            return
        try:
            self.writer.close()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self.writer = None  # its thread has ended, so another attempt would wait for ever
        warnings.warn(f"nothing more for TensorBoard: {error}", stacklevel=3)


class WandbLog:
    """A run at Weights & Biases, whose id is in the file `wandb-id`, so that it can be resumed.

    offline keeps it in the run's folder, for `wandb sync`. W&B ignores steps that it has already:
    steps that are repeated after resuming stay as they were.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], *, offline: bool = False) -> None:
        _need("wandb")
        import wandb

        self.errors = (wandb.Error, OSError)
        self.run: wandb.Run | None = None
        try:
            self.run = wandb.init(
                project="receptance",
                name=folder.resolve().name,
                id=_run_id(folder),
                resume="allow",
                dir=folder,
                config=dict(config),
                mode="offline" if offline else None,
                # W&B's capture of the terminal would garble the progress bar.
                settings=wandb.Settings(console="off"),
            )
        except self.errors as error:
            raise ValueError(
                f"W&B did not start: {error}; log in with `wandb login`, or take wandb-offline"
            ) from None

    def record(self, values: Mapping[str, Value]) -> None:
        """Add the figures to the row of their step."""
        if self.run is None:
            return
        figures = {name: value for name, value in values.items() if name != "step"}
        try:
            self.run.log(figures, step=int(values["step"]))
        except self.errors as error:
            self._give_up(error)

    def close(self) -> None:
        """Wait until everything is uploaded, or written."""
        if self.run is None:
            return
        try:
            self.run.finish()
        except self.errors as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self.run = None
        warnings.warn(f"nothing more for W&B: {error}", stacklevel=3)


def open_logs(
    folder: Path, kinds: Iterable[str], resumed_step: int | None, config: Mapping[str, Any]
) -> list[Log]:
    """The logs of a run in its folder: metrics.jsonl, then the given kinds.

    resumed_step is the step that a resumed run continues after, None for a new run; later records
    are dropped, because those steps are repeated. config are the options that W&B shows. ValueError
    on a kind that does not exist or is not installed.
    """
    kinds = list(kinds)
    check_kinds(kinds)
    logs: list[Log] = [MetricsLog(folder, resumed_step)]
    for kind in kinds:
        if kind == "tensorboard":
            logs.append(TensorBoardLog(folder, resumed_step))
        else:
            logs.append(WandbLog(folder, config, offline=kind == "wandb-offline"))
    return logs


def check_kinds(kinds: Iterable[str]) -> None:
    """ValueError if one of the kinds does not exist or is not installed; opens nothing."""
    for kind in kinds:
        if kind not in KINDS:
            raise ValueError(f"no log {kind!r}; there are {', '.join(KINDS)}")
        _need(kind.removesuffix("-offline"))


def _need(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"no log without {package}: pip install {package}")


def _jsonable(value: Value) -> Value | None:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _forget_after(path: Path, step: int) -> None:
    """Keep the records up to a step; lines that are no records, such as half a line, go too."""
    with path.open("rb") as lines, written(path) as kept:
        for line in lines:
            if (found := _step(line)) is not None and found <= step:
                kept.write(line)


def _step(line: bytes) -> int | None:
    if not line.endswith(b"}\n"):
        return None
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError):
        return None


def has_report(folder: Path, step: int) -> bool:
    """Whether metrics.jsonl holds a report of that step."""
    with suppress(FileNotFoundError), (folder / METRICS).open("rb") as lines:
        found = (line for line in lines if b'"validation' in line or b'"sample"' in line)
        return any(_step(line) == step for line in found)
    return False


def _run_id(folder: Path) -> str:
    """The id of the folder's W&B run, which is made the first time."""
    path = folder / "wandb-id"
    if not path.exists():
        with written(path) as file:
            file.write(secrets.token_hex(8).encode())
    return path.read_text().strip()
