"""Running an experiment: piece by piece, each of them kept, up to a result and its pictures."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from receptance.errors import one_line
from receptance.evaluation.journal import Journal, journal_path
from receptance.evaluation.results import Result, versions
from receptance.inference.measure import seconds
from receptance.plots.panels import draw_panels
from receptance.plots.pictures import check_picture
from receptance.progress import progress_bar
from receptance.reproduce.experiment import Experiment, Piece, Work, caption

Record = dict[str, Any]
"""One piece that was done: "piece", "found", and the "seconds" that it took."""
Measured = Callable[[Experiment, Path, Sequence[Piece], Callable[[str, float], object]], Any]
"""A function that does pieces and yields their records in any order; it is told whom to note."""


def run(experiment: Experiment, out: Path, measured: Measured, console: Console) -> Result:
    """Do what is not done yet, and write NAME.json, NAME.png and NAME.svg in the folder out.

    A result that is there with the same options is taken as it is. ValueError if it has other
    options, if a package is missing, or for whatever the experiment refuses.
    """
    check_packages(experiment)
    path = out / f"{experiment.NAME}.json"
    for picture in pictures(path):
        check_picture(picture)
    with progress_bar(console) as bar:
        shown = _Shown(experiment.NAME, bar)
        found = there(experiment, path)
        if found is None:
            with one_line(out, "what is computed to "):
                found = _run(experiment, path, measured, shown)
        shown.note("drawing", 0.0)
        draw(experiment, found, path)
        shown.finish()
    return found


class _Shown:
    """What a terminal shows of an experiment."""

    def __init__(self, name: str, bar: Progress) -> None:
        self._bar = bar
        self._task = bar.add_task(name, total=None, note="preparing")
        self._done, self._total = 0.0, 1.0

    def begin(self, done: float, total: float) -> None:
        """So much of the whole work was done before."""
        self._done, self._total = done, total
        self._bar.update(self._task, total=total, completed=done)

    def note(self, what: str, more: float) -> None:
        """Say what is being done, and how much of its piece is done."""
        self._bar.update(self._task, note=what, completed=self._done + more)

    def add(self, cost: float) -> None:
        """A piece is done."""
        self._done += cost
        self.note("", 0.0)

    def finish(self) -> None:
        """All is done."""
        self._bar.update(self._task, total=self._total, completed=self._total, note="")


def there(experiment: Experiment, path: Path) -> Result | None:
    """The result of an earlier run with these options; ValueError if it had others."""
    if not path.exists():
        return None
    found = Result.load(path)
    for name, now in _identity(experiment).items():
        was = found.details.get("identity", {}).get(name, found.options.get(name))
        if found.details.get("experiment") != experiment.NAME or was != now:
            raise ValueError(
                f"{path} is of an experiment with {name} {was}, and now it is {now}; choose "
                "another out, or delete that file"
            )
    return found


def _identity(experiment: Experiment) -> Record:
    """All that decides what is found, as JSON."""
    about: Record = json.loads(json.dumps({**asdict(experiment), **experiment.identity()}))
    return about


def _run(experiment: Experiment, path: Path, measured: Measured, shown: _Shown) -> Result:
    pieces = {_key(piece): piece for piece in experiment.pieces()}
    about = {"experiment": experiment.NAME, **_identity(experiment)}
    experiment.prepare(Work(path.with_suffix("")))
    with Journal(journal_path(path), about) as journal:
        done = {_key(record["piece"]): record for record in journal.records}
        left = [piece for key, piece in pieces.items() if key not in done]
        total = sum(map(experiment.cost, pieces.values()))
        shown.begin(total - sum(map(experiment.cost, left)), total)
        folder = path.with_suffix("")
        for record in measured(experiment, folder, left, shown.note) if left else ():
            journal.add(record)
            done[_key(record["piece"])] = record
            shown.add(experiment.cost(record["piece"]))
        kept = [done[key] for key in pieces]
        result = experiment.result(
            [(record["piece"], record["found"]) for record in kept],
            sum(record["seconds"] for record in kept),
            versions=versions(*experiment.PACKAGES),
        )
        result.save(path)
        journal.remove()
    with suppress(OSError):  # Most experiments keep nothing there.
        folder.rmdir()
    return result


def measure_here(
    experiment: Experiment,
    folder: Path,
    pieces: Iterable[Piece],
    note: Callable[[str, float], object] = lambda what, more: None,
    device: str = "cpu",
) -> Iterable[Record]:
    """Do the pieces one after another in this process."""
    for piece in pieces:
        cost = experiment.cost(piece)
        note(label(piece), 0.0)

        def told(what: str, share: float, cost: float = cost) -> None:
            note(what, share * cost)

        yield measure_piece(experiment, Work(folder, told, device), piece)


def measure_piece(experiment: Experiment, work: Work, piece: Piece) -> Record:
    """Do one piece."""
    found: dict[str, Any] = {}
    took = seconds(lambda: found.update(experiment.measure(piece, work)))
    return {"piece": piece, "found": found, "seconds": took}


def label(piece: Mapping[str, Any]) -> str:
    """A piece in a few words."""
    return ", ".join(str(value) for value in piece.values())


def _key(piece: Mapping[str, Any]) -> str:
    return json.dumps(piece, sort_keys=True)


def pictures(path: Path) -> list[Path]:
    """The files of the pictures beside a result."""
    return [path.with_suffix(".png"), path.with_suffix(".svg")]


def draw(experiment: Experiment, result: Result, path: Path) -> None:
    """Draw the pictures of a result, unless all of them are there."""
    if all(picture.exists() for picture in pictures(path)):
        return
    if panels := experiment.panels(result):
        draw_panels(panels, pictures(path), caption(result))


def check_packages(experiment: Experiment) -> None:
    """ValueError for the first package that the experiment needs and that is not installed."""
    for name in ("matplotlib", *experiment.PACKAGES):
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"{experiment.NAME} needs {name}: pip install {name}")
