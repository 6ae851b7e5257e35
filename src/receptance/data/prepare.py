"""From sources to a corpus folder: tokenized by several processes, and never twice.

Each finished piece of work is a part on disk. A run that was stopped, in whatever way, goes on
with the pieces that have none, and what comes out has the same bits for any number of workers.
"""

from __future__ import annotations

import functools
import itertools
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from receptance.data.assemble import Division, Shard, assemble
from receptance.data.encode import tokenize_piece
from receptance.data.ondisk import token_dtype
from receptance.data.parts import PartReport, finished_part, map_part
from receptance.data.plan import Plan, PrepareOptions, begin, digest, make_plan, sample
from receptance.data.pool import in_processes, job
from receptance.data.sources import Piece, Source, cut_pieces, find_sources, stream_pieces
from receptance.data.tokens import TokenFiles, is_corpus, read_about
from receptance.ops.threads import available_cpus
from receptance.progress import progress_bar, say
from receptance.storage.directories import expanded
from receptance.storage.lock import RunLock
from receptance.tokenizer import BPETokenizer, Tokenizer, load_tokenizer

# Starting processes takes seconds; for less text than this it is not worth them.
_WORTH_WORKERS = 32 << 20


def prepare(
    names: Sequence[str],
    folder: str | Path,
    tokenizer: Tokenizer | str,
    options: PrepareOptions,
    console: Console,
) -> TokenFiles:
    """Tokenize sources into a corpus folder, or finish what an earlier call began there.

    names: files, folders, globs, hf:NAME[:CONFIG][:SPLIT]. tokenizer may be "bytes", "bpe:SIZE"
    (trained on the training text), a file or a folder. A folder that holds this very corpus is
    opened. ValueError names what cannot be read or written, or what differs from the work that was
    begun. With workers, a program of one's own needs `if __name__ == "__main__"` around the call.
    """
    folder = expanded(folder)
    if tokenized := [name for name in names if is_corpus(name)]:
        raise ValueError(f"{tokenized[0]} holds tokens already; receptance data merge takes those")
    if isinstance(tokenizer, str) and _bpe_size(tokenizer) is None:
        tokenizer = load_tokenizer(tokenizer)
    sources = find_sources(names, options.exclude, folder)
    plan = make_plan(sources, tokenizer, options)
    if (folder / "data.json").exists():
        return _existing(folder, plan, console)
    _check_free(folder)
    try:
        (folder / "parts").mkdir(parents=True, exist_ok=True)
        with RunLock(folder / "parts"):
            work = _Preparation(folder, plan, sources, options, console)
            work.tokenize(tokenizer)
            corpus = work.assemble()
    except OSError as error:
        where = error.filename or folder
        raise ValueError(f"cannot write {where}: {error.strerror or error}") from error
    shutil.rmtree(folder / "parts", ignore_errors=True)
    return corpus


def _existing(folder: Path, plan: Plan, console: Console) -> TokenFiles:
    if read_about(folder).get("plan") != digest(plan):
        raise ValueError(
            f"{folder} holds a corpus of other sources or options; choose another folder"
        )
    shutil.rmtree(folder / "parts", ignore_errors=True)
    say(console, f"{folder} already holds this corpus")
    return TokenFiles.open(folder)


def _check_free(folder: Path) -> None:
    """ValueError if files of unknown origin would be overwritten."""
    if (folder / "parts/plan.json").exists():
        return
    names = ("tokenizer.json", "rwkv_vocab.txt")
    taken = [p for part in ("train", "validation") for p in folder.glob(f"{part}*")]
    taken += [folder / name for name in names if (folder / name).exists()]
    if taken:
        raise ValueError(f"{taken[0]} is in the way; choose another folder")


def _bpe_size(tokenizer: str) -> int | None:
    """SIZE of "bpe:SIZE", None for the name of a tokenizer that exists."""
    if not tokenizer.startswith("bpe:"):
        return None
    size = tokenizer.removeprefix("bpe:")
    if not size.isdecimal():
        raise ValueError(f"tokenizer {tokenizer!r}: say how many tokens, for example bpe:2048")
    return int(size)


class _Preparation:
    """The work in one folder."""

    def __init__(
        self,
        folder: Path,
        plan: Plan,
        sources: Sequence[Source],
        options: PrepareOptions,
        console: Console,
    ) -> None:
        self.folder, self.parts, self.plan = folder, folder / "parts", plan
        self.sources, self.options, self.console = sources, options, console
        self.pieces = cut_pieces(sources, options.validation, options.seed)
        self.reports: dict[int, PartReport] = {}

    def tokenize(self, tokenizer: Tokenizer | str) -> None:
        """Do every piece that is not done yet."""
        self.tokenizer, about = begin(self.parts, self.plan, lambda: self._made(tokenizer))
        self.dtype = token_dtype(self.tokenizer.vocab_size)
        known = ((piece.index, self._finished(piece.index)) for piece in self.pieces)
        self.reports = {index: report for index, report in known if report}
        todo = (piece for piece in self.pieces if piece.index not in self.reports)
        with progress_bar(self.console) as bar:
            shown = _Shown(bar, self.pieces, self.reports, self._streams)
            try:
                for report in self._done(itertools.chain(todo, self._stream()), about, shown):
                    self.reports[report.index] = report
                    shown.finished(report)
            except KeyboardInterrupt:
                say(self.console, f"stopped; the same command goes on with {self.folder}")
                raise

    def assemble(self) -> TokenFiles:
        """The corpus of all parts, in their order."""
        reports = [self.reports[index] for index in sorted(self.reports)]
        if skipped := [report for report in reports if report.skipped]:
            total = sum(report.skipped for report in skipped)
            first = skipped[0].first_skipped
            say(self.console, f"bad records left out: {total:,}, the first: {first}")
        how = Division(
            end_of_text=self.tokenizer.end_of_text,
            vocab_size=self.tokenizer.vocab_size,
            masked=any(report.masked for report in reports),
            validation=self.options.validation,
            seed=self.options.seed,
            layout=self.options.format,
        )
        about = {
            "text_bytes": sum(report.text_bytes for report in reports),
            "skipped": sum(report.skipped for report in reports),
            "sources": [source["path"] for source in self.plan["sources"]],
            "plan": digest(self.plan),
        }
        shards = [
            Shard(report.part, functools.partial(map_part, self.parts, report, self.dtype))
            for report in reports
        ]
        with self.console.status("writing the corpus"):
            return assemble(self.folder, shards, how, self.tokenizer, about)

    def _done(
        self, todo: Iterator[Piece], about: Mapping[str, Any], shown: _Shown
    ) -> Iterator[PartReport]:
        if workers := self._workers():
            stored = (about["kind"], tuple(about["files"]), about["fingerprint"])
            work = functools.partial(job, self.parts, stored, self.options)
            yield from in_processes(todo, work, workers)
        for piece in todo:
            progress = functools.partial(shown.inside, piece)
            yield tokenize_piece(piece, self.tokenizer, self.options, self.parts, progress)

    def _made(self, tokenizer: Tokenizer | str) -> Tokenizer:
        if isinstance(tokenizer, Tokenizer):
            return tokenizer
        size = _bpe_size(tokenizer)
        assert size is not None
        with self.console.status(f"training a BPE of {size} tokens"):
            return BPETokenizer.train(sample(self.pieces, self.sources, self.options), size)

    def _stream(self) -> Iterator[Piece]:
        """The unfinished pieces of streams, as they arrive."""
        field = self.options.only_field
        for piece in stream_pieces(self.sources, field, len(self.pieces), self._finished):
            if report := self._finished(piece.index):
                self.reports[piece.index] = report
            else:
                yield piece

    def _finished(self, index: int) -> PartReport | None:
        report = finished_part(self.parts, index, self.dtype)
        return report if report and (self.options.skip_bad or not report.skipped) else None

    @property
    def _streams(self) -> bool:
        return any(source.kind == "stream" for source in self.sources)

    def _workers(self) -> int:
        if self.options.workers is not None:
            return self.options.workers
        weight = sum(p.weight for p in self.pieces if p.index not in self.reports)
        return available_cpus() if weight > _WORTH_WORKERS or self._streams else 0


class _Shown:
    """The work in a progress bar: bytes of input; without an end when streams have none."""

    def __init__(
        self, bar: Progress, pieces: Sequence[Piece], done: Mapping[int, Any], endless: bool
    ) -> None:
        self.bar, self.weights = bar, {piece.index: piece.weight for piece in pieces}
        self.before, self.tokens = sum(self.weights[index] for index in done), 0
        total = None if endless else sum(self.weights.values())
        self.task = bar.add_task("tokenizing", total=total, completed=self.before, note="")
        self.began, self.partly = time.perf_counter(), 0

    def inside(self, piece: Piece, size: int) -> None:
        """More of a piece is done."""
        self.partly = min(self.partly + size, piece.weight)
        self.bar.update(self.task, completed=self.before + self.partly)

    def finished(self, report: PartReport) -> None:
        """All of a piece is done."""
        self.before, self.partly = self.before + self.weights.get(report.index, 0), 0
        self.tokens += report.tokens
        speed = self.tokens / (time.perf_counter() - self.began)
        self.bar.update(self.task, completed=self.before, note=f"{speed:,.0f} tokens/s")
