"""Tiny comparisons: a text, its corpus, and jobs that train in a fraction of a second."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from tiny import TEXT

from receptance.data import TokenFiles
from receptance.evaluation.compare.comparing import Plan, make_plan
from receptance.evaluation.compare.options import CompareOptions
from receptance.evaluation.compare.runs import Job, make_job
from receptance.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()
SMALL = CompareOptions(
    sizes=("16x2",),
    seeds=(1,),
    tokenizer="bytes",
    tokens=(640,),
    context=16,
    batch=4,
    learning_rates=(1e-2,),
    held_out=256,
    points=2,
    contexts=(4, 40),
)


def small(**changes: Any) -> CompareOptions:
    return dataclasses.replace(SMALL, **changes)


def corpus(text: str = TEXT, end_of_text: int = 0) -> TokenFiles:
    """The bytes of a text, whose last tenth is held out."""
    tokens = np.frombuffer(text.encode(), np.uint8).astype(np.uint16)
    cut = len(tokens) * 9 // 10
    return TokenFiles(
        train=tokens[:cut],
        validation=tokens[cut:],
        train_mask=None,
        validation_mask=None,
        end_of_text=end_of_text,
        fingerprint="ab" * 32,
        tokenizer=TOKENIZER,
        path=Path("nowhere"),
    )


def plan(options: CompareOptions = SMALL) -> Plan:
    return make_plan(options, TOKENIZER.vocab_size)


def job(model: str, options: CompareOptions = SMALL, *, rate: float = 1e-2, seed: int = 0) -> Job:
    """The run of a model of the first size."""
    entry = next(x for x in plan(options).entries if x.family == model)
    return make_job(
        options, model, entry.shape, corpus().fingerprint, rate, seed=seed, search=False
    )
