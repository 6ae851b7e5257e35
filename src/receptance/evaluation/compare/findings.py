"""The result of a comparison: figures with intervals, and curves."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Sequence

from receptance.data import TokenFiles
from receptance.data.ondisk import blocks
from receptance.evaluation.compare.comparing import Entry, Findings, Plan
from receptance.evaluation.compare.curves import PER_BYTE, curves, mean_loss, over_seeds
from receptance.evaluation.compare.runs import Record
from receptance.evaluation.compare.table import family
from receptance.evaluation.intervals import Estimate, mean, ratio
from receptance.evaluation.results import Figure, Result, Source, Subject, versions

LOSS = "held-out bits per byte"


def make_result(
    plan: Plan, corpus: TokenFiles, data: Sequence[str], found: Findings, processes: int
) -> Result:
    """Figures and curves of all models. ValueError if models of a size read different tokens."""
    _check_same_tokens(plan, found)
    options = plan.options
    return Result(
        kind="compare",
        what=(
            f"{' and '.join(options.models)} trained on the same "
            f"{' or '.join(f'{n:,}' for n in options.tokens)} tokens, "
            f"with equal {options.match}"
        ),
        models=[*_families(plan), *(_subject(plan, entry, found) for entry in plan.entries)],
        data=[_source(corpus, data)],
        figures=[figure for entry in plan.entries for figure in _figures(plan, entry, found)],
        curves=list(curves(plan, found)),
        options=dataclasses.asdict(options),
        seconds=sum(record.seconds for record in _all_runs(found)),
        notes=list(_notes(plan, found, processes)),
        details={
            "runs": [
                {
                    "name": record.name,
                    "tokens digest": record.digest,
                    "seconds": record.seconds,
                    "diverged at step": record.diverged,
                    PER_BYTE: None if record.diverged else record.bits_per_byte,
                }
                for record in _all_runs(found)
            ]
        },
        versions=versions("transformers"),
    )


def _check_same_tokens(plan: Plan, found: Findings) -> None:
    """All models must have read the same tokens in the same order, for each seed and length."""
    seen: dict[tuple[int, int], tuple[str, str]] = {}
    for name, records in found.records.items():
        for record in (x for x in records if x.diverged is None):
            seed, steps = record.job["train"]["seed"], record.job["train"]["steps"]
            first, digest = seen.setdefault((seed, steps), (name, record.digest))
            if record.digest != digest:
                raise ValueError(
                    f"{name} and {first} did not read the same tokens with seed {seed}; delete "
                    "the runs of one of them and repeat the command"
                )


def _all_runs(found: Findings) -> Iterator[Record]:
    for tried in found.searches.values():
        yield from tried.values()
    for records in found.records.values():
        yield from records


# ---- what was compared, on what -----------------------------------------------------------------


def _families(plan: Plan) -> Iterator[Subject]:
    for name in plan.options.models:
        yield Subject(name=name, about={"architecture": family(name).label})


def _subject(plan: Plan, entry: Entry, found: Findings) -> Subject:
    shape, cost = entry.shape, entry.counts
    about = {
        "architecture": entry.family,
        "width": shape.width,
        "layers": shape.layers,
        "feed-forward width": shape.ffn_width,
        "parameters": cost.parameters,
        "non-embedding parameters": cost.non_embedding,
        "training FLOPs per token": cost.training_flops,
        "learning rate": found.rates[entry.name],
        "training tokens": plan.options.tokens_of(entry.size),
        "seeds": len(found.records[entry.name]),
    }
    return Subject(name=entry.name, about=about)


def _source(corpus: TokenFiles, data: Sequence[str]) -> Source:
    digest = hashlib.sha256()
    for tokens in (corpus.train, corpus.validation):
        for block in blocks(tokens):
            digest.update(block.tobytes())
    tokenizer = corpus.tokenizer
    about = {
        "training tokens": len(corpus.train),
        "held-out tokens": len(corpus.validation),
        "tokenizer": None if tokenizer is None else tokenizer.kind,
        "vocabulary": None if tokenizer is None else tokenizer.vocab_size,
        "the digest is of": "all tokens, those for training first",
    }
    return Source(name=", ".join(data), digest=digest.hexdigest(), about=about)


# ---- figures ------------------------------------------------------------------------------------


def _figures(plan: Plan, entry: Entry, found: Findings) -> Iterator[Figure]:
    records = found.records[entry.name]
    if any(record.diverged is not None for record in records):
        return
    loss, named = mean_loss(records)
    yield _with_interval(LOSS, loss, named, entry, PER_BYTE)
    reference = f"{plan.options.models[0]} {entry.size}"
    others = found.records[reference]
    if reference != entry.name and all(x.diverged is None for x in others):
        yield _difference(plan, entry, records, others)
    carried = [x.carried for x in records if x.carried is not None]
    if carried:
        name = f"{LOSS}, state carried over the whole text"
        yield _with_interval(name, mean(carried), over_seeds(records), entry, PER_BYTE)
    if costs := found.costs.get(entry.name):
        speed = plan.options.batch * plan.options.context / costs.step
        yield Figure(
            name="training speed",
            value=speed,
            model=entry.name,
            unit="tokens/s",
            about={"size": entry.size},
        )


def _difference(
    plan: Plan, entry: Entry, records: Sequence[Record], others: Sequence[Record]
) -> Figure:
    """How much more loss than the reference: of the same seeds, or of the same pieces of text."""
    pairs = list(zip(records, others, strict=True))
    if len(pairs) > 1:
        differences = [ours.bits_per_byte - theirs.bits_per_byte for ours, theirs in pairs]
        found = mean(differences)
        named = f"95 % over {len(pairs)} pairs of runs with the same seed"
    else:
        ours, theirs = pairs[0]
        bits = [(a - b) / math.log(2) for a, b in zip(ours.nats, theirs.nats, strict=True)]
        found = ratio(bits, ours.byte_counts)
        named = f"95 % over {len(bits)} pieces of the held-out text, one seed"
    name = f"{LOSS}, more than {plan.options.models[0]}"
    return _with_interval(name, found, named, entry, PER_BYTE)


def _with_interval(name: str, found: Estimate, named: str, entry: Entry, unit: str) -> Figure:
    return Figure(
        name=name,
        value=found.value,
        model=entry.name,
        unit=unit,
        low=found.low,
        high=found.high,
        interval="" if found.low is None else named,
        about={"size": entry.size},
    )


# ---- what a reader needs to know ----------------------------------------------------------------


def _notes(plan: Plan, found: Findings, processes: int) -> Iterator[str]:
    options = plan.options
    equal = (
        "parameters without embedding and head"
        if options.match == "parameters"
        else ("FLOPs of training on a token")
    )
    yield (
        f"Matched are the {equal}, within 2 %, by the width of the feed-forward networks; width, "
        "layers, tokens and their order, tokenizer, optimizer, schedule, context and the type of "
        f"activations in training ({options.dtype}) are the same. Starting values are each "
        "architecture's own."
    )
    yield (
        f"The loss is that of windows of {options.context} tokens that each begin from nothing, "
        "so that no model sees more than this context, computed in float32."
    )
    if plan.searched:
        sizes = "at every size" if options.sweep_sizes == "all" else f"at {plan.smallest}"
        yield (
            f"Each architecture has its own best learning rate of a search {sizes}, in runs of "
            f"{options.sweep_share:.0%} of the tokens with the whole schedule and one seed."
        )
    else:
        yield "There was no search for learning rates: all models have the one that was given."
    for name, tried in found.searches.items():
        losses = {rate: tried[rate].bits_per_byte for rate in sorted(tried)}
        if min(losses, key=lambda rate: losses[rate]) in (min(losses), max(losses)):
            yield f"The best learning rate of {name} is at the end of those that were tried."
    for record in _all_runs(found):
        if record.diverged is not None:
            yield f"{record.name} diverged at step {record.diverged}."
    if not found.costs and processes > 1:
        yield (
            f"{processes} runs were trained side by side, which shared the processors: seconds "
            "compare models with each other, and each alone would have been faster."
        )
    if found.costs:
        yield (
            "Seconds of training are steps times the seconds of a step, which was measured for one "
            "model after another when all runs were done."
        )
        if len({json.dumps(x.machine, sort_keys=True) for x in found.costs.values()}) > 1:
            yield "The costs of the models were measured on different machines, or environments."
        yield (
            "Generation is greedy and of one row: RWKV with the engine of this package that is "
            "fastest here, Transformers with the cache of transformers. Beyond the trained context "
            "the cost alone is measured."
        )
