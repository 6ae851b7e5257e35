"""How long a comparison takes on this machine, by a few steps of each model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from receptance.data import TokenFiles
from receptance.evaluation.compare.comparing import Entry, Plan
from receptance.evaluation.compare.options import FIRST_SEED
from receptance.evaluation.compare.runs import make_job
from receptance.evaluation.compare.training import JUDGED_PART, Training
from receptance.inference.measure import NumberedTokens, seconds

# So many steps of each model are measured, after one to warm up.
_TIMED_STEPS = 3


def step_seconds(plan: Plan, entry: Entry) -> float:
    """The seconds of the fastest of some steps on this machine, on tokens drawn at random."""
    options, vocab_size = plan.options, entry.shape.vocab_size
    count = (_TIMED_STEPS + 2) * options.batch * options.context + 1
    tokens = np.random.default_rng(FIRST_SEED).integers(vocab_size, size=count, dtype=np.uint32)
    tokenizer = NumberedTokens(vocab_size)
    corpus = TokenFiles(
        train=tokens,
        validation=tokens[: options.context + 1],
        train_mask=None,
        validation_mask=None,
        end_of_text=0,
        fingerprint="",
        tokenizer=tokenizer,
        path=Path(),
    )
    rate = options.learning_rates[0]
    job = make_job(options, entry.family, entry.shape, "", rate, seed=FIRST_SEED, search=False)
    training = Training(job, corpus, tokenizer, torch.device("cpu"))
    training.run_step()
    return min(seconds(training.run_step) for _ in range(_TIMED_STEPS))


def estimate(plan: Plan, entry: Entry, step: float) -> float:
    """The seconds of all known runs of a model, if a step takes so many."""
    options = plan.options
    # Judging is a forward pass, a third of a step's work.
    judged = options.held_out * (1 + options.points / JUDGED_PART) / 3
    positions = options.batch * options.context
    return sum(
        count * (options.tokens * share + judged) / positions * step
        for each, share, count in plan.runs()
        if each is entry
    )
