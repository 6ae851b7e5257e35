"""Where the figures of a run go: metrics.jsonl always, TensorBoard and Weights & Biases if asked.

A log takes a mapping with the step in it, and whatever else there is to say about that step. None
of them ends a run: what a full disk refuses waits (metrics.jsonl) or is given up with a warning.
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

# Seconds after which a figure can be seen in TensorBoard.
_FLUSH_SECONDS = 10


class Log(Protocol):
    """One place that figures go to."""

    def record(self, values: Mapping[str, Value]) -> None:
        """Note the figures of values["step"]; a step may have several records."""

    def close(self) -> None:
        """Write what is still waiting. Nothing can be recorded afterwards."""


class MetricsLog:
    """Lines of JSON in metrics.jsonl, only ever added to.

    `unwritten` holds what a full disk has refused; it is tried again with every record.
    """

    def __init__(self, folder: Path, resumed_step: int | None = None) -> None:
        self.path = folder / METRICS
        self.unwritten = b""
        if resumed_step is not None and self.path.exists():
            _forget_after(self.path, resumed_step)

    def record(self, values: Mapping[str, Value]) -> None:
        """One line. What is not a finite number becomes null, which JSON has a word for."""
        finite = {name: _jsonable(value) for name, value in values.items()}
        self.unwritten += json.dumps(finite).encode() + b"\n"
        self._write()

    def close(self) -> None:
        """The last attempt to write what is waiting."""
        if self.unwritten:
            self._write()

    def _write(self) -> None:
        with suppress(OSError), self.path.open("ab", buffering=0) as file:
            self.unwritten = self.unwritten[file.write(self.unwritten) :]


class TensorBoardLog:
    """Event files in the run's folder `tensorboard`; watch with `tensorboard --logdir`."""

    def __init__(self, folder: Path, resumed_step: int | None = None) -> None:
        _need("tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        # TensorBoard forgets, when it reads, what earlier files have from this step on.
        again = None if resumed_step is None else resumed_step + 1
        self.writer: SummaryWriter | None = SummaryWriter(
            folder / "tensorboard", purge_step=again, flush_secs=_FLUSH_SECONDS
        )

    def record(self, values: Mapping[str, Value]) -> None:
        """A scalar for every number, a text for every string."""
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
        """Write the events of the last seconds."""
        if self.writer is None:
            return
        try:
            self.writer.close()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self.writer = None  # its thread has ended; another attempt would find nobody to write
        warnings.warn(f"nothing more for TensorBoard: {error}", stacklevel=3)


class WandbLog:
    """A run at Weights & Biases; a resumed one goes on in the same, by the id in `wandb-id`.

    offline keeps it in the run's folder, for `wandb sync`. W&B ignores a step that it has already:
    those that are done again after resuming stay as they were.
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
                # Its capture of the terminal and a progress bar get into each other's way.
                settings=wandb.Settings(console="off"),
            )
        except self.errors as error:
            raise ValueError(
                f"W&B did not start: {error}; log in with `wandb login`, or take wandb-offline"
            ) from None

    def record(self, values: Mapping[str, Value]) -> None:
        """Figures of one step are one row there."""
        if self.run is None:
            return
        figures = {name: value for name, value in values.items() if name != "step"}
        try:
            self.run.log(figures, step=int(values["step"]))
        except self.errors as error:
            self._give_up(error)

    def close(self) -> None:
        """Wait until all is uploaded, or written."""
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
    """metrics.jsonl and the other kinds for a run in its folder, in this order.

    resumed_step is the step that a resumed run continues after, None for a new run; later records
    are forgotten, because these steps are done and recorded again. config is what the run should
    be known by elsewhere. ValueError on a kind there is not, or that is not installed.
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
        raise ValueError(f"no log without {package}: pip install 'receptance[logs]'")


def _jsonable(value: Value) -> Value | None:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _forget_after(path: Path, step: int) -> None:
    """Keep the records up to a step; a line that is no record, half written say, goes as well."""
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
    """Whether metrics.jsonl has what a report of that step found."""
    with suppress(FileNotFoundError), (folder / METRICS).open("rb") as lines:
        found = (line for line in lines if b'"validation' in line or b'"sample"' in line)
        return any(_step(line) == step for line in found)
    return False


def _run_id(folder: Path) -> str:
    """The id of the folder's W&B run, a new one the first time."""
    path = folder / "wandb-id"
    if not path.exists():
        with written(path) as file:
            file.write(secrets.token_hex(8).encode())
    return path.read_text().strip()
