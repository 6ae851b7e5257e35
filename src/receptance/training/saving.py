"""Checkpoints of a training run, written in the background by one process or by all.

Every process writes the whole tensors that fall to it into a file of its own, so that any number
of processes can read them again.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from receptance.errors import one_line
from receptance.sealed import Entries
from receptance.storage.checkpoint import read_tensors, write_index, write_tensors
from receptance.storage.directories import ABOUT, Draft, prune
from receptance.training.ranks import Ranks
from receptance.training.sharding import assign
from receptance.training.trainer import Snapshot, Trainer
from receptance.version import __version__

# The run ends after this many failed saves in a row.
FAILED_SAVES = 3


class Saver:
    """Saves a trainer's steps into the run's folder, in the background, and removes old ones.

    `describe` puts the files that are not the trainer's into the directory, and returns further
    entries of training.json. All processes must call the same methods.
    """

    def __init__(
        self,
        run: Path,
        keep: int,
        describe: Callable[[Path], dict[str, Any]],
        ranks: Ranks,
        say: Callable[[str], object],
    ) -> None:
        self.run, self.keep, self.describe, self.ranks, self.say = run, keep, describe, ranks, say
        # The threads that save have a process group of their own, apart from those that train.
        self._group = dist.new_group(backend="gloo") if ranks.count > 1 else None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._under_way: tuple[int, Future[None]] | None = None
        self.shards = 1
        self.failed = 0
        self.saved_step = -1

    def save(self, trainer: Trainer) -> None:
        """Copy this step and begin to write it; ValueError if the last saves all failed."""
        self.wait()
        if self.exhausted:
            raise ValueError(f"{self.failed} saves failed in a row; see above")
        snapshot, self.shards = trainer.snapshot(), trainer.shards
        path = self.run / f"step-{trainer.step:08d}"
        self._under_way = (trainer.step, self._pool.submit(self._write, path, snapshot))

    @property
    def exhausted(self) -> bool:
        """Whether saving has failed too often for the run to go on."""
        return self.failed >= FAILED_SAVES

    def poll(self) -> None:
        """If a save has ended since the last call, take note of it, and report a failure."""
        if self._under_way is None or not self._under_way[1].done():
            return
        (step, task), self._under_way = self._under_way, None
        try:
            task.result()
        except ValueError as error:
            self.failed += 1
            self.say(f"checkpoint not saved: {error}")
        else:
            self.failed, self.saved_step = 0, step

    def wait(self) -> None:
        """Wait until the save that is under way has ended."""
        if self._under_way is not None:
            futures.wait([self._under_way[1]])
        self.poll()

    def _write(self, path: Path, snapshot: Snapshot) -> None:
        draft = self._begin(path)
        try:
            entries = self._all(lambda: self._ours(draft, snapshot))
            self._first(lambda: draft.finish(self._rest(draft, snapshot, entries)))
        finally:
            if self.ranks.first:
                draft.discard()
        if self.ranks.first:
            prune(path, self.keep)

    def _begin(self, path: Path) -> Draft:
        found = self._first(lambda: str(Draft.begin(path).folder))
        return Draft(path, Path(found))

    def _ours(self, draft: Draft, snapshot: Snapshot) -> Entries:
        """Write the files of this process, and return their manifest entries."""
        if self.ranks.rank >= self.shards:
            return {}
        files = {snapshot.stem: snapshot.parameters, "optimizer": snapshot.optimizer}
        place = {"shard": self.ranks.rank, "shards": self.shards}
        with one_line(draft.path):
            about = {snapshot.stem: snapshot.metadata}
            names = [
                write_tensors(tensors, draft.folder, stem, metadata=about.get(stem), **place)
                for stem, tensors in files.items()
            ]
        return draft.seal(names)

    def _rest(self, draft: Draft, snapshot: Snapshot, shards: list[Entries]) -> Entries:
        """Write the files of the first process alone, and return the entries of all files."""
        entries = {name: entry for part in shards for name, entry in part.items()}
        with one_line(draft.path):
            if self.shards > 1:
                for stem in (snapshot.stem, "optimizer"):
                    parts = [n for n in entries if n.startswith(f"{stem}-")]
                    write_index(draft.folder, stem, parts)
            about = snapshot.about | {"versions": _versions()} | self.describe(draft.folder)
            (draft.folder / ABOUT).write_text(json.dumps(about, indent=1))
        names = {file.name for file in draft.folder.iterdir()} - entries.keys()
        return entries | draft.seal(names)

    def _all(self, work: Callable[[], Any]) -> list[Any]:
        """What `work` returns in each process; ValueError in all of them if it failed in one."""
        try:
            found, error = work(), None
        except ValueError as failure:
            found, error = None, str(failure)
        everyone = [(found, error)]
        if self._group is not None:
            everyone *= self.ranks.count
            dist.all_gather_object(everyone, (found, error), group=self._group)
        for _, failed in everyone:
            if failed is not None:
                raise ValueError(failed)
        return [part for part, _ in everyone]

    def _first(self, work: Callable[[], Any]) -> Any:
        """What `work` returns in the first process, which alone does it; errors as in `_all`."""
        return self._all(lambda: work() if self.ranks.first else None)[0]


def _versions() -> dict[str, str]:
    return {
        "receptance": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def read_training(directory: Path) -> dict[str, Any]:
    """The content of a checkpoint's training.json; ValueError if it cannot be read."""
    try:
        about = json.loads((directory / ABOUT).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{directory} is not a checkpoint to resume from: {error}") from None
    if not isinstance(about, dict):
        raise ValueError(f"{directory} is not a checkpoint to resume from")
    return about


def restore(trainer: Trainer, directory: Path, *, parameters: bool = True) -> None:
    """Continue a trainer from a whole checkpoint.

    parameters=False leaves out the parameters, which are then loaded already.
    """
    if parameters:
        stem = "model" if trainer.adapter is None else "adapter"
        for name, value in read_tensors(directory, stem).items():
            assign(trainer.parameters[name], value)
    trainer.restore(read_training(directory), read_tensors(directory, "optimizer").items())
