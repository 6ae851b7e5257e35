"""From sources to a corpus folder: several processes tokenize, and nothing is tokenized twice.

Each finished piece of work is a part on disk. A run that was stopped, in whatever way, goes on
with the pieces that have none, and what comes out has the same bits for any number of workers.
"""

from __future__ import annotations

import functools
import itertools
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from receptance.atomic import check_folder
from receptance.data.assemble import Division, Shard, assemble
from receptance.data.encode import is_utf8, tokenize_piece
from receptance.data.files import describe_left_out
from receptance.data.ondisk import token_dtype
from receptance.data.parts import PartReport, finished_part, map_part
from receptance.data.plan import Plan, PrepareOptions, begin, digest, make_plan, sample
from receptance.data.pool import in_processes, job
from receptance.data.sources import Piece, Source, cut_pieces, find_sources, stream_pieces
from receptance.data.tokens import TokenFiles, read_about
from receptance.ops.threads import available_cpus
from receptance.progress import progress_bar, say
from receptance.sealed import check_outside
from receptance.storage.directories import expanded
from receptance.storage.lock import RunLock
from receptance.tokenizer import BPETokenizer, Tokenizer, load_tokenizer
from receptance.tokenizer.files import BPE_CONFIG, BPE_FILE, WORLD_FILE

# Starting processes takes seconds, which is not worth it for less text than this many bytes.
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
    if isinstance(tokenizer, str) and _bpe_size(tokenizer) is None:
        tokenizer = load_tokenizer(tokenizer)
    left_out: dict[Path, str] = {}
    sources = find_sources(names, options.exclude, folder, left_out.setdefault)
    plan = make_plan(sources, tokenizer, options)
    if (folder / "data.json").exists():
        return _existing(folder, plan, console)
    _check_free(folder)
    parts = folder / "parts"
    try:
        parts.mkdir(parents=True, exist_ok=True)
        with RunLock(parts):
            if (folder / "data.json").exists():  # another process has made it meanwhile
                corpus = _opened(folder, plan, console)
            else:
                work = _Preparation(folder, plan, sources, left_out, options, console)
                work.tokenize(tokenizer)
                corpus = work.assemble()
            shutil.rmtree(parts, ignore_errors=True)
    except OSError as error:
        where = error.filename or folder
        raise ValueError(f"cannot write {where}: {error.strerror or error}") from error
    return corpus


def _existing(folder: Path, plan: Plan, console: Console) -> TokenFiles:
    """Open a corpus, and tidy up behind a call that was stopped right after it had made it."""
    corpus, parts = _opened(folder, plan, console), folder / "parts"
    if parts.is_dir():
        # Whoever holds the lock removes the parts itself, and a corpus may be on a read-only disk.
        with suppress(ValueError), RunLock(parts):
            shutil.rmtree(parts, ignore_errors=True)
    return corpus


def _opened(folder: Path, plan: Plan, console: Console) -> TokenFiles:
    if read_about(folder).get("plan") != digest(plan):
        raise ValueError(
            f"{folder} holds a corpus of other sources or options; choose another folder"
        )
    corpus = TokenFiles.open(folder)
    say(console, f"{folder} already holds this corpus")
    return corpus


def _check_free(folder: Path) -> None:
    """ValueError if files that no earlier call has begun would be overwritten."""
    check_folder(folder)
    check_outside(folder)
    if (folder / "parts/plan.json").exists():
        return
    if any(folder.glob("step-*")) or (folder / "metrics.jsonl").exists():
        raise ValueError(f"{folder} is the folder of a run; choose another folder")
    names = (BPE_FILE, BPE_CONFIG, WORLD_FILE)
    taken = [p for part in ("train", "validation") for p in folder.glob(f"{part}*")]
    taken += [folder / name for name in names if (folder / name).exists()]
    if taken:
        raise ValueError(f"{taken[0]} is in the way; choose another folder")


def _bpe_size(tokenizer: str) -> int | None:
    """The SIZE in "bpe:SIZE", or None for the name of a tokenizer that exists already."""
    if not tokenizer.startswith("bpe:"):
        return None
    size = tokenizer.removeprefix("bpe:")
    if not size.isdecimal():
        raise ValueError(f"tokenizer {tokenizer!r}: say how many tokens, for example bpe:2048")
    return int(size)


class _Preparation:
    """The work of making the corpus in one folder."""

    def __init__(
        self,
        folder: Path,
        plan: Plan,
        sources: Sequence[Source],
        left_out: Mapping[Path, str],
        options: PrepareOptions,
        console: Console,
    ) -> None:
        """left_out: files that are no text, which find_sources met, and what each is instead."""
        self.folder, self.parts, self.plan = folder, folder / "parts", plan
        self.sources, self.options, self.console = sources, options, console
        self.left_out = dict(left_out)
        self.pieces = cut_pieces(sources, options.validation, options.seed)
        self.reports: dict[int, PartReport] = {}

    def tokenize(self, tokenizer: Tokenizer | str) -> None:
        """Tokenize every piece that is not done yet."""
        if self.options.skip_bad and getattr(tokenizer, "kind", "bpe") != "bytes":
            self._leave_out_other_encodings()
        if self.left_out:
            say(self.console, describe_left_out(self.left_out))
        self.tokenizer, about = begin(self.parts, self.plan, lambda: self._made(tokenizer))
        self.dtype = token_dtype(self.tokenizer.vocab_size)
        known = ((piece.index, self._finished(piece.index, piece)) for piece in self.pieces)
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
        """Write the corpus, which consists of all parts in their order."""
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
            "skipped": sum(report.skipped for report in reports) + len(self.left_out),
            "files_left_out": Counter(self.left_out.values()),
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

    def _finished(self, index: int, piece: Piece | None = None) -> PartReport | None:
        """The report of a piece whose part is on disk and made with these options; else None.

        The piece is None for one of a stream.
        """
        report = finished_part(self.parts, index, self.dtype)
        if report is None or (report.skipped and not self.options.skip_bad):
            return None
        left_out = sum(span.left_out for span in piece.ranges) if piece else 0
        return report if report.ranges_left_out == left_out else None

    def _leave_out_other_encodings(self) -> None:
        """Mark the ranges of all texts that are not UTF-8 as left out.

        This happens before anything is tokenized, because a long text is cut into many pieces, and
        those before its first bad byte have to leave it out too. The numbers of the pieces stay as
        they are, so that the parts that an earlier call has finished can be used.
        """
        texts = [source for source in self.sources if source.kind == "text"]
        with self.console.status("looking for text that is not UTF-8"):
            bad = {source.path for source in texts if not is_utf8(source)}
        self.left_out |= {Path(path): "not UTF-8" for path in sorted(bad)}
        self.pieces = [
            replace(
                piece,
                ranges=tuple(
                    replace(span, left_out=span.source.path in bad) for span in piece.ranges
                ),
            )
            for piece in self.pieces
        ]

    @property
    def _streams(self) -> bool:
        return any(source.kind == "stream" for source in self.sources)

    def _workers(self) -> int:
        if self.options.workers is not None:
            return self.options.workers
        weight = sum(p.weight for p in self.pieces if p.index not in self.reports)
        return available_cpus() if weight > _WORTH_WORKERS or self._streams else 0


class _Shown:
    """The progress bar, which counts bytes of input; it has no end if there are streams."""

    def __init__(
        self, bar: Progress, pieces: Sequence[Piece], done: Mapping[int, Any], endless: bool
    ) -> None:
        self.bar, self.weights = bar, {piece.index: piece.weight for piece in pieces}
        self.before, self.num_tokens = sum(self.weights[index] for index in done), 0
        total = None if endless else sum(self.weights.values())
        self.task = bar.add_task("tokenizing", total=total, completed=self.before, note="")
        self.began, self.partly = time.perf_counter(), 0

    def inside(self, piece: Piece, size: int) -> None:
        """Show that so many more bytes of a piece are done."""
        self.partly = min(self.partly + size, piece.weight)
        self.bar.update(self.task, completed=self.before + self.partly)

    def finished(self, report: PartReport) -> None:
        """Show that all of a piece is done."""
        self.before, self.partly = self.before + self.weights.get(report.index, 0), 0
        self.num_tokens += report.num_tokens
        speed = self.num_tokens / (time.perf_counter() - self.began)
        self.bar.update(self.task, completed=self.before, note=f"{speed:,.0f} tokens/s")
