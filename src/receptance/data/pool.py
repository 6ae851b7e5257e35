"""Work on pieces in several processes: bounded, interruptible, none left behind."""

from __future__ import annotations

import functools
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TypeVar

from receptance.data.encode import ReadOptions, tokenize_piece
from receptance.data.parts import PartReport
from receptance.data.sources import Piece
from receptance.tokenizer import Tokenizer, stored_tokenizer

Item = TypeVar("Item")
Report = TypeVar("Report")


def in_processes(
    pieces: Iterable[Item], job: Callable[[Item], Report], workers: int
) -> Iterator[Report]:
    """Yield the reports of a picklable job on all pieces, in the order in which they come.

    Two pieces per worker are taken ahead. When the caller stops early, the processes end at once
    and the pieces that they are working on are lost.
    """
    others = set(multiprocessing.active_children())
    # A fork would copy locks that threads of this process hold, so new processes are spawned.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_start) as pool:
        pending: set[Future[Report]] = set()
        try:
            for piece in pieces:
                pending.add(pool.submit(job, piece))
                if len(pending) > 2 * workers:
                    done, pending = wait(pending, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in done)
            while pending:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        except BrokenProcessPool:
            raise ValueError(
                "a worker died, perhaps for lack of memory; run again to continue, with fewer "
                "workers if it was that"
            ) from None
        finally:
            if pending:
                for process in set(multiprocessing.active_children()) - others:
                    process.terminate()
            pool.shutdown(cancel_futures=True)


def job(
    parts: Path, tokenizer: tuple[str, tuple[str, ...], str], options: ReadOptions, piece: Piece
) -> PartReport:
    """Tokenize a piece with the tokenizer (kind, files, fingerprint) that is stored in parts."""
    return tokenize_piece(piece, _tokenizer(parts, *tokenizer), options, parts)


@functools.cache
def _tokenizer(parts: Path, kind: str, files: tuple[str, ...], fingerprint: str) -> Tokenizer:
    return stored_tokenizer(parts, {"kind": kind, "files": list(files), "fingerprint": fingerprint})


def _start() -> None:
    """Make a worker leave Ctrl-C to the process that hands out work, and end with that process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
