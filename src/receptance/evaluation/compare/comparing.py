"""A whole comparison: the search for learning rates, the runs of all seeds, generation."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from receptance.data import TokenFiles
from receptance.evaluation.compare import costs
from receptance.evaluation.compare.costs import Costs, Measurement
from receptance.evaluation.compare.families import Shape
from receptance.evaluation.compare.matching import Counts, counts, matched
from receptance.evaluation.compare.options import FIRST_SEED, CompareOptions, parse_size
from receptance.evaluation.compare.runs import Job, Record, finished, make_job
from receptance.evaluation.compare.table import family
from receptance.evaluation.compare.training import MODELS, steps_done
from receptance.progress import progress_bar

Runner = Callable[[Sequence[Job]], Iterable[Record]]
"""Runs jobs in any order, and gives the record of each as it is finished."""
Measurer = Callable[[Measurement], Costs]
"""Measures a model in a process of its own."""

# So often a search goes beyond the learning rates that were named.
_EXTENSIONS = 3
_LOOK_SECONDS = 0.5


@dataclass(frozen=True)
class Entry:
    """One model: an architecture at a size."""

    family: str
    size: str
    shape: Shape
    counts: Counts

    @property
    def name(self) -> str:
        """Its name in the results."""
        return f"{self.family} {self.size}"


@dataclass(frozen=True)
class Plan:
    """The models of a comparison, and the runs that can be known before it begins."""

    options: CompareOptions
    entries: list[Entry]

    @property
    def searched(self) -> list[Entry]:
        """The models whose learning rates are searched: none if there is only one rate."""
        if len(self.options.learning_rates) < 2:
            return []
        everywhere = self.options.sweep_sizes == "all"
        return [entry for entry in self.entries if everywhere or entry.size == self.smallest]

    @property
    def smallest(self) -> str:
        """The size with the fewest parameters."""
        return min(self.entries, key=lambda entry: entry.counts.non_embedding).size

    def measurement(self, entry: Entry, model: Path) -> Measurement:
        """What measures the costs of a model that lies there."""
        return Measurement(model, entry.family, entry.shape, self.options)

    def runs(self) -> Iterator[tuple[Entry, float, int]]:
        """Each known run: its model, the share of the tokens, and how many there are like it."""
        for entry in self.searched:
            yield entry, self.options.sweep_share, len(self.options.learning_rates)
        for entry in self.entries:
            yield entry, 1.0, len(self.options.seeds_of(entry.size))


@dataclass
class Findings:
    """What the runs of a comparison found."""

    searches: dict[str, dict[float, Record]] = field(default_factory=dict)
    """The runs of each search by the name of the model, then by learning rate."""
    rates: dict[str, float] = field(default_factory=dict)
    """The learning rate of each model."""
    records: dict[str, list[Record]] = field(default_factory=dict)
    """The runs of each model, one for each seed."""
    costs: dict[str, Costs] = field(default_factory=dict)
    """What each model costs, by its name."""


def make_plan(options: CompareOptions, vocab_size: int) -> Plan:
    """The models with their sizes; ValueError if there are none such, or they cannot match."""
    for name, numbers in (("seeds", options.seeds), ("tokens", options.tokens)):
        if len(numbers) not in (1, len(options.sizes)):
            raise ValueError(
                f"{name}= has {len(numbers)} numbers; give one, or one for each of the "
                f"{len(options.sizes)} sizes"
            )
    families = [family(name) for name in options.models]
    reference, entries = families[0], []
    for size in options.sizes:
        width, layers = parse_size(size)
        usual = reference.usual_ffn_width(width)
        shape = Shape(vocab_size=vocab_size, width=width, layers=layers, ffn_width=usual)
        for each in families:
            each.check(shape)
            fitted = matched(each, reference, shape, options.context, options.match)
            found = counts(each, fitted, options.context)
            entries.append(Entry(each.name, size, fitted, found))
    return Plan(options, entries)


def compare(
    plan: Plan,
    corpus: TokenFiles,
    out: Path,
    run: Runner,
    measure: Measurer,
    console: Console,
) -> Findings:
    """Run everything that is not finished in the folder yet, and gather what was found.

    ValueError if the folder holds runs of other options, or if no learning rate works.
    """
    if corpus.train_mask is not None:
        raise ValueError(
            f"{corpus.path} holds examples of which a part is learned; compare models on plain text"
        )
    found = Findings()
    with progress_bar(console) as bar:
        work = _Comparison(plan, corpus, out, run, bar)
        work.search(found)
        work.train(found)
    if plan.options.costs:
        _measure_costs(plan, found, out, measure, console)
    return found


class _Comparison:
    """The runs of a comparison, with a progress bar that counts FLOPs."""

    def __init__(
        self, plan: Plan, corpus: TokenFiles, out: Path, run: Runner, bar: Progress
    ) -> None:
        self.plan, self.options, self.corpus, self.out = plan, plan.options, corpus, out
        self.runner, self.bar, self.done = run, bar, 0.0
        self.flops = {(x.family, x.size): x.counts.training_flops for x in plan.entries}
        self.total = sum(
            self.options.tokens_of(entry.size) * share * count * entry.counts.training_flops
            for entry, share, count in self.plan.runs()
        )
        self.task = bar.add_task("comparing", total=self.total, note="")

    def _job(self, entry: Entry, rate: float, seed: int, *, search: bool) -> Job:
        return make_job(
            self.options,
            entry.family,
            entry.shape,
            self.corpus.fingerprint,
            rate,
            seed=seed,
            search=search,
        )

    # ---- learning rates -------------------------------------------------------------------------

    def search(self, found: Findings) -> None:
        """Find the best learning rate of each architecture, and go on where it is the last one."""
        searched = self.plan.searched
        rates = {entry.name: sorted(self.options.learning_rates) for entry in searched}
        found.searches = {entry.name: {} for entry in searched}
        for attempt in itertools.count():
            new = {
                self._job(entry, rate, FIRST_SEED, search=True): (entry.name, rate)
                for entry in searched
                for rate in rates[entry.name]
                if rate not in found.searches[entry.name]
            }
            if not new:
                break
            for job, record in self._run(list(new), "learning rates"):
                name, rate = new[job]
                found.searches[name][rate] = record
            if attempt < _EXTENSIONS:
                for entry in searched:
                    rates[entry.name] = extended(found.searches[entry.name])
        smallest = self.plan.smallest
        for entry in self.plan.entries:
            everywhere = self.options.sweep_sizes == "all"
            like = f"{entry.family} {entry.size if everywhere else smallest}"
            tried = found.searches.get(like)
            found.rates[entry.name] = best(like, tried) if tried else self.options.learning_rates[0]

    # ---- all runs -------------------------------------------------------------------------------

    def train(self, found: Findings) -> None:
        """Train every model with every seed."""
        jobs = {
            self._job(entry, found.rates[entry.name], seed, search=False): entry.name
            for entry in self.plan.entries
            for seed in self.options.seeds_of(entry.size)
        }
        records = dict(self._run(list(jobs), "training"))
        for job, name in jobs.items():
            found.records.setdefault(name, []).append(records[job])

    def _run(self, jobs: list[Job], what: str) -> Iterator[tuple[Job, Record]]:
        """Each job with its record; the bar shows those that are under way."""
        known = {job: finished(self.out, job) for job in jobs}
        left = {job.name: job for job, record in known.items() if record is None}
        for job, record in known.items():
            if record is not None:
                self._finish(job)
                yield job, record
        self.bar.update(self.task, description=what)
        with self._looking(left):
            # Large models first: at the end no process waits for one of them alone.
            order = sorted(left.values(), key=self._cost, reverse=True)
            for record in self.runner(order) if order else ():
                job = left.pop(record.name)
                self._finish(job)
                yield job, record

    def _cost(self, job: Job) -> float:
        return float(job.tokens * self.flops[job.family, job.size])

    def _finish(self, job: Job) -> None:
        self.done += self._cost(job)
        # Learning rates beyond those that were named make the work longer than was planned.
        self.total = max(self.total, self.done)
        self.bar.update(self.task, completed=self.done, total=self.total)

    @contextmanager
    def _looking(self, left: dict[str, Job]) -> Iterator[None]:
        """Show the steps of unfinished runs while the block waits for them."""
        ended = threading.Event()

        def look() -> None:
            while not ended.wait(_LOOK_SECONDS):
                steps = {job: steps_done(self.out, job) for job in list(left.values())}
                partly = sum(
                    self._cost(job) * n / job.train.total_steps for job, n in steps.items()
                )
                running = [f"{job.name} step {n}" for job, n in steps.items() if n]
                note = ", ".join(running) or f"{len(left)} runs left"
                self.bar.update(self.task, completed=self.done + partly, note=note)

        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


def extended(tried: dict[float, Record]) -> list[float]:
    """The learning rates of a search, and one more if the best is the lowest or the highest."""
    rates = sorted(tried)
    losses = [tried[rate].bits_per_byte for rate in rates]
    place = losses.index(min(losses))
    if place == 0:
        rates.insert(0, _rounded(rates[0] ** 2 / rates[1]))
    elif place == len(rates) - 1:
        rates.append(_rounded(rates[-1] ** 2 / rates[-2]))
    return rates


def best(name: str, tried: dict[float, Record]) -> float:
    """The learning rate with the lowest loss; ValueError if all runs diverged."""
    rate = min(tried, key=lambda rate: tried[rate].bits_per_byte)
    if math.isinf(tried[rate].bits_per_byte):
        raise ValueError(
            f"{name} diverged at all learning_rates ({', '.join(f'{x:g}' for x in tried)}); "
            "name lower ones"
        )
    return rate


def _rounded(rate: float) -> float:
    return float(f"{rate:.3g}")


# ---- costs --------------------------------------------------------------------------------------


def _measure_costs(
    plan: Plan, found: Findings, out: Path, measure: Measurer, console: Console
) -> None:
    """Measure what the first run of each model costs that did not diverge, one after another."""
    with progress_bar(console) as bar:
        task = bar.add_task("costs", total=len(plan.entries), note="")
        for entry in plan.entries:
            kept = [x for x in found.records[entry.name] if x.diverged is None]
            if kept:
                name = kept[0].name
                bar.update(task, note=entry.name)
                known = costs.stored(out, name, plan.options.contexts)
                if known is None:
                    known = measure(plan.measurement(entry, out / MODELS / name))
                    costs.store(out, name, known)
                found.costs[entry.name] = known
            bar.update(task, advance=1)
