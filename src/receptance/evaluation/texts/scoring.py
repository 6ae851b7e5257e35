"""Documents to sums of losses, kept on disk as they are computed, so that a run can be resumed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from receptance.engine.base import Engine
from receptance.evaluation.journal import Journal
from receptance.evaluation.texts.documents import Document
from receptance.evaluation.texts.passages import Key, Passage, Reader, Unfinished

Layout = Callable[[Document], Iterable[Passage]]
"""A function from a document to the passages that are read of it."""
Progress = Callable[[float], object]
"""A function that is told how many bytes of text were read in all."""

# While long passages are read, the place and the state are kept every so many seconds.
_PATIENCE = 20.0


@dataclass
class Scores:
    """Documents and the sums of their losses."""

    bytes: list[int] = field(default_factory=list)
    characters: list[int] = field(default_factory=list)
    words: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    """One number for each document."""
    sums: list[NDArray[np.float64]] = field(default_factory=list)
    """The sums of each document [buckets] in nats, added up over its passages."""

    @property
    def nats(self) -> NDArray[np.float64]:
        """The loss of each document [documents]."""
        return np.array([sums.sum() for sums in self.sums], np.float64)

    def note(self, document: Document) -> None:
        """Take note of the sizes of a document that is read next."""
        self.bytes.append(document.bytes)
        self.characters.append(document.characters)
        self.words.append(document.words)
        self.tokens.append(len(document.tokens))


def score(
    engine: Engine,
    documents: Iterable[Document],
    layout: Layout,
    *,
    journal: Journal | None = None,
    progress: Progress = lambda done: None,
) -> Scores:
    """Read the passages of all documents, except for those that the journal has.

    The journal gets every passage as it ends and, during long ones and on Ctrl-C, the state behind
    what was read, in a file beside it. Its identity has to decide the documents and the layout.
    """
    run = _Run(engine, journal, progress)
    scores = Scores()

    def passages() -> Iterator[Passage]:
        for document in documents:
            scores.note(document)
            for passage in layout(document):
                run.weights[passage.key] = document.bytes / max(1, len(document.tokens))
                if not run.is_done(passage):
                    yield passage

    run.read(passages())
    scores.sums = [np.zeros(0)] * len(scores.bytes)
    for (number, _), sums in sorted(run.done.items()):
        before = scores.sums[number]
        scores.sums[number] = before + sums if len(before) else sums
    return scores


class _Run:
    def __init__(self, engine: Engine, journal: Journal | None, progress: Progress) -> None:
        self.engine, self.journal, self.progress = engine, journal, progress
        self.done: dict[Key, NDArray[np.float64]] = {}
        self.weights: dict[Key, float] = {}
        self._bytes = 0.0
        self._ends: dict[Key, int] = {}
        self._states = 0
        records = [] if journal is None else journal.records
        for record in records:
            if "passage" in record:
                number, part = record["passage"]
                self.done[number, part] = np.asarray(record["sums"], np.float64)
        self._unfinished = self._found(records)

    def is_done(self, passage: Passage) -> bool:
        """Whether the journal has a passage; counts it as read if so."""
        if passage.key not in self.done:
            self._ends[passage.key] = int(passage.edges[-1])
            return False
        self._bytes += self.weights.pop(passage.key) * int(passage.edges[-1])
        return True

    def read(self, passages: Iterable[Passage]) -> None:
        """Read all passages and keep what was found, and where reading stands."""
        reader = Reader(self.engine, passages, self._unfinished)
        try:
            kept = time.monotonic()
            while (ended := reader.step()) is not None:
                for key, sums in ended:
                    self._end(key, sums)
                self.progress(self._bytes + self._inside(reader.unfinished))
                if time.monotonic() - kept > _PATIENCE:
                    self._keep(reader.unfinished)
                    kept = time.monotonic()
        except KeyboardInterrupt:
            self._keep(reader.unfinished)
            raise
        for path in self._state_files():
            path.unlink(missing_ok=True)

    def _end(self, key: Key, sums: NDArray[np.float64]) -> None:
        self.done[key] = sums
        self._bytes += self.weights.pop(key) * self._ends.pop(key)
        if self.journal is not None:
            self.journal.add({"passage": list(key), "sums": sums.tolist()})

    def _inside(self, unfinished: Unfinished | None) -> float:
        if unfinished is None:
            return 0.0
        places = zip(unfinished.keys, unfinished.at, strict=True)
        return sum(self.weights[key] * at for key, at in places)

    def _keep(self, unfinished: Unfinished | None) -> None:
        """Write the state to a new file, then say so in the journal, then delete older files."""
        if self.journal is None or unfinished is None:
            return
        older, path = self._state_files(), self._state_file(self._states)
        while path in older:
            self._states += 1
            path = self._state_file(self._states)
        self.engine.save_state(unfinished.state, path)
        about = {"keys": unfinished.keys, "at": unfinished.at, "sums": unfinished.sums}
        self.journal.add({"unfinished": about, "state": path.name})
        for old in older:
            old.unlink(missing_ok=True)

    def _state_file(self, number: int) -> Path:
        assert self.journal is not None
        return self.journal.path.with_name(f"{self.journal.path.name}.state-{number}")

    def _state_files(self) -> list[Path]:
        if self.journal is None:
            return []
        path = self.journal.path
        return [
            file for file in path.parent.iterdir() if file.name.startswith(f"{path.name}.state-")
        ]

    def _found(self, records: list[dict[str, Any]]) -> Unfinished | None:
        """Where an earlier run stopped, if its state can be read."""
        last = next((record for record in reversed(records) if "unfinished" in record), None)
        if last is None or self.journal is None:
            return None
        about = last["unfinished"]
        with suppress(ValueError):  # Without the state these passages are read again.
            state = self.engine.load_state(self.journal.path.with_name(last["state"]))
            keys = [(number, part) for number, part in about["keys"]]
            return Unfinished(state, keys, about["at"], about["sums"])
        return None
