"""The curves of a comparison: the loss against whatever was spent, and what generation costs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence

from receptance.evaluation.compare.comparing import Findings, Plan
from receptance.evaluation.compare.costs import Cost, Costs
from receptance.evaluation.compare.runs import Point, Record
from receptance.evaluation.intervals import Estimate, mean, ratio
from receptance.evaluation.results import Curve

PER_BYTE = "bits per byte"
_SEARCH = "search for the learning rate"


def curves(plan: Plan, found: Findings) -> Iterator[Curve]:
    """All curves; those of models of one size say so in `about`, and belong into one picture."""
    if len(plan.options.sizes) > 1:
        yield from _against_parameters(plan, found)
    yield from _loss_curves(plan, found)
    yield from _searches(plan, found)
    yield from _generation(plan, found, "seconds per generated token", lambda x: x.seconds, "s")
    what = "memory of the text that was read (state, or keys and values)"
    yield from _generation(plan, found, what, lambda x: x.remembered, "bytes")
    yield from _generation(plan, found, "memory of the process", lambda x: x.resident, "bytes")


def mean_loss(records: Sequence[Record]) -> tuple[Estimate, str]:
    """The mean over seeds with its interval; the interval of one seed is over pieces of text."""
    if len(records) > 1:
        return mean([record.bits_per_byte for record in records]), over_seeds(records)
    only = records[0]
    bits = [nats / math.log(2) for nats in only.nats]
    found = ratio(bits, only.byte_counts)
    return found, f"95 % over {len(bits)} pieces of the held-out text, one seed"


def over_seeds(records: Sequence[Record]) -> str:
    """The name of the interval of a mean over seeds; nothing for a single seed."""
    return f"95 % over {len(records)} seeds" if len(records) > 1 else ""


def _loss_curves(plan: Plan, found: Findings) -> Iterator[Curve]:
    """The loss on the held-out text against tokens, FLOPs and seconds; that of training."""
    for entry in plan.entries:
        records = [x for x in found.records[entry.name] if x.diverged is None]
        if not records:
            continue
        flops = entry.counts.training_flops
        steps = list(zip(*(x.points for x in records), strict=True))
        places = {
            "tokens": [float(at[0].tokens) for at in steps],
            "training FLOPs": [float(at[0].tokens * flops) for at in steps],
            "seconds of training": _seconds(plan, found.costs.get(entry.name), steps),
        }
        losses = [[p.bits_per_byte for p in at] for at in steps]
        for x_name, x in places.items():
            name = f"loss against {x_name}"
            yield _curve(name, x_name, x, PER_BYTE, losses, entry.name, entry.size, records)
        training = [[p.training for p in at] for at in steps]
        yield _curve(
            "training loss",
            "tokens",
            places["tokens"],
            "nats per token",
            training,
            entry.name,
            entry.size,
            records,
        )


def _seconds(plan: Plan, costs: Costs | None, steps: Sequence[Sequence[Point]]) -> list[float]:
    """The seconds until each point: by the step that was measured, or as the runs had them."""
    if costs is None:
        return [statistics.fmean(point.seconds for point in at) for at in steps]
    each = costs.step / (plan.options.batch * plan.options.context)
    return [at[0].tokens * each for at in steps]


def _curve(
    name: str,
    x_name: str,
    x: list[float],
    y_name: str,
    values: Sequence[Sequence[float]],
    model: str,
    size: str,
    records: Sequence[Record],
) -> Curve:
    """The means of the values at each place, with their intervals if there are several seeds."""
    found = [mean(at) for at in values]
    several = len(records) > 1
    return Curve(
        name=name,
        x_name=x_name,
        x=x,
        y_name=y_name,
        y=[at.value for at in found],
        model=model,
        low=[float(at.low or 0) for at in found] if several else None,
        high=[float(at.high or 0) for at in found] if several else None,
        interval=over_seeds(records),
        about={"size": size},
    )


def _searches(plan: Plan, found: Findings) -> Iterator[Curve]:
    for entry in plan.searched:
        tried = found.searches[entry.name]
        rates = sorted(rate for rate in tried if tried[rate].diverged is None)
        yield Curve(
            name=_SEARCH,
            x_name="learning rate",
            x=rates,
            y_name=PER_BYTE,
            y=[tried[rate].bits_per_byte for rate in rates],
            model=entry.name,
            about={"size": entry.size},
        )


def _against_parameters(plan: Plan, runs: Findings) -> Iterator[Curve]:
    for name in plan.options.models:
        entries = [x for x in plan.entries if x.family == name]
        entries = [x for x in entries if all(r.diverged is None for r in runs.records[x.name])]
        entries.sort(key=lambda x: x.counts.non_embedding)
        means = [mean_loss(runs.records[entry.name]) for entry in entries]
        whole = bool(means) and all(found.low is not None for found, _ in means)
        yield Curve(
            name="loss against parameters",
            x_name="non-embedding parameters",
            x=[float(entry.counts.non_embedding) for entry in entries],
            y_name=PER_BYTE,
            y=[found.value for found, _ in means],
            model=name,
            low=[float(found.low or 0) for found, _ in means] if whole else None,
            high=[float(found.high or 0) for found, _ in means] if whole else None,
            interval="; ".join(dict.fromkeys(named for _, named in means)) if whole else "",
        )


def _generation(
    plan: Plan, found: Findings, name: str, value: Callable[[Cost], float | None], unit: str
) -> Iterator[Curve]:
    for entry in plan.entries:
        costs = found.costs.get(entry.name)
        at = [(x.context, value(x)) for x in (costs.generation if costs else [])]
        known = [(float(context), float(cost)) for context, cost in at if cost is not None]
        if known:
            yield Curve(
                name=name,
                x_name="context, tokens",
                x=[context for context, _ in known],
                y_name=unit,
                y=[cost for _, cost in known],
                model=entry.name,
                about={"size": entry.size},
            )
