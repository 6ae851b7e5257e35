"""How long a comparison takes, by the seconds of a step of each model."""

from __future__ import annotations

from receptance.evaluation.compare.comparing import Entry, Plan
from receptance.evaluation.compare.training import JUDGED_PART


def estimate(plan: Plan, entry: Entry, step: float) -> float:
    """The seconds of all known runs of a model, if a step takes so many."""
    options = plan.options
    # Judging is a forward pass, a third of a step's work.
    judged = options.held_out * (1 + options.points / JUDGED_PART) / 3
    positions = options.batch * options.context
    return sum(
        count * (options.tokens_of(entry.size) * share + judged) / positions * step
        for each, share, count in plan.runs()
        if each is entry
    )
