"""Labeled sequences by where they are: the name of a generated benchmark, a folder, a file."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from receptance.data.idx import is_idx_folder
from receptance.data.labeled import Examples
from receptance.data.labeled_records import read_labeled_records
from receptance.data.series import SeriesWindows, read_archive, read_columns
from receptance.evaluation.tasks.benchmarks import BENCHMARKS, GENERATED, benchmark
from receptance.model.heads import Pooling

Learned = Literal["classify", "regress", "forecast"]

# The file or folder by which the folder of a benchmark is known.
_MARKS = {
    "basic_train.tsv": "listops",
    "new_aan_pairs.train.tsv": "retrieval",
    "train/pos": "text",
    "data_batch_1.bin": "image",
    "metadata": "pathfinder",
}
_PLAIN_HISTORY, _PLAIN_HORIZON = 96, 24


@dataclass(frozen=True, kw_only=True)
class SequenceOptions:
    """What to learn about labeled sequences, and how a model reads them."""

    setting: str = ""
    """The difficulty of a benchmark that is generated, such as train=10000,max_length=600."""
    pooling: Literal["mean", "last"] = "mean"
    """What the answer is made of: the mean of a sequence's features, or the last one."""
    bidirectional: bool = False
    """Add a second stack of blocks, which reads each sequence from its end."""
    max_length: int = 0
    """Cut texts after so many bytes; 0 means as the benchmark does, or never."""
    history: int = _PLAIN_HISTORY
    """How many values a forecast is made from."""
    horizon: int = _PLAIN_HORIZON
    """How many values ahead are forecast."""
    columns: tuple[str, ...] = ()
    """Forecast these columns; without any, all columns of numbers."""

    def __post_init__(self) -> None:
        for name, least in (("history", 1), ("horizon", 1), ("max_length", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")

    def check(self, task: Learned) -> None:
        """ValueError if an option is set that has no effect on this task."""
        plains = {"history": _PLAIN_HISTORY, "horizon": _PLAIN_HORIZON, "columns": ()}
        for name, plain in plains.items():
            if task != "forecast" and getattr(self, name) != plain:
                raise ValueError(f"{name} is for forecasts, and the task is to {task}")
        own = {"history": self.history, "horizon": self.horizon, "columns": self.columns}
        if task == "forecast" and self != SequenceOptions(**own):  # type: ignore[arg-type]
            raise ValueError(
                "a forecast is made at every position from what stands before it: leave setting, "
                "pooling, bidirectional and max_length out"
            )


@dataclass(frozen=True)
class Labeled:
    """Examples, and what their answers mean."""

    examples: Examples
    classes: list[str] = field(default_factory=list)
    """The names of the classes, where the source has names."""
    pooling: Pooling = "mean"


def open_labeled(source: str, task: Learned, options: SequenceOptions, seed: int) -> Labeled:
    """The examples at a source, and the names of their classes; seed decides what is held out.

    ValueError says what was found there and what was wanted.
    """
    assert task in get_args(Learned)
    options.check(task)
    path = Path(source).expanduser()
    if source in GENERATED and not path.exists():
        _only("classify", task, source)
        return Labeled(benchmark(source, options.setting, None, seed), [], options.pooling)
    if options.setting:
        raise ValueError(f"setting is for benchmarks that are generated: {', '.join(GENERATED)}")
    if not path.exists():
        raise ValueError(
            f"there is nothing at {source}, and no benchmark of this name is generated; there are "
            f"{', '.join(GENERATED)}"
        )
    if task == "forecast":
        values, columns = read_columns(path, options.columns)
        about = {"task": "forecast", "columns": ", ".join(columns)}
        windows = SeriesWindows(
            values, history=options.history, horizon=options.horizon, about=about
        )
        return Labeled(windows, columns, "every")
    if path.suffix in (".jsonl", ".ts"):
        examples, classes = (
            read_labeled_records(path, task, max_length=options.max_length, seed=seed)
            if path.suffix == ".jsonl"
            else read_archive(path, task, seed=seed)
        )
        return Labeled(examples, classes, options.pooling)
    _only("classify", task, source)
    name = _benchmark_at(path)
    setting = f"max_length={options.max_length}" if options.max_length else ""
    return Labeled(benchmark(name, setting, source, seed), [], options.pooling)


def _only(wanted: str, task: str, source: str) -> None:
    if task != wanted:
        raise ValueError(f"{source} has classes; the task must be to {wanted}, not to {task}")


def _benchmark_at(path: Path) -> str:
    """The benchmark whose files are in a folder."""
    for mark, name in _MARKS.items():
        if (path / mark).exists():
            return name
    if path.is_dir() and is_idx_folder(path):
        return "images"
    known = "; ".join(f"{name}: {what}" for name, what in BENCHMARKS.items())
    raise ValueError(
        f"{path} holds no labeled sequences that can be read. Wanted a .jsonl with labels, a "
        f"NAME_TRAIN.ts, a .csv for a forecast, or the files of a benchmark ({known})"
    )
