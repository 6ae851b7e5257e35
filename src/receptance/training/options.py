"""How to train: options, and the learning rate of every step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from receptance.data.batches import Packing

_DEFAULT_STEPS = 1000
# More steps than anyone will wait for.
_UNLIMITED = 10**9


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """How to train. Betas, epsilon, clipping and the schedule's form are those of the paper."""

    steps: int = 0
    """Updates in all; 0 means 1000 or, if --minutes is given, as many as that allows."""
    minutes: float = 0.0
    """Stop after this much training time if that comes first; the learning rate then follows the
    clock. 0 means no limit. A run with a limit is not reproducible to the bit."""
    batch: int = 8
    """Sequences per step, over all processes."""
    micro_batch: int = 0
    """Sequences at a time in a process; their gradients add up to the batch's. 0 means all."""
    context: int = 256
    """Tokens per sequence, T. The model itself has no limit."""
    chunk: int = 0
    """Tokens at a time: a longer sequence is read in pieces, its state handed from one to the
    next, in memory that does not grow with --context. 0 means all."""
    carry: Literal["gradient", "state"] = "gradient"
    """What crosses from one chunk to the next: the gradient as well (the same result as without
    chunks, a second forward pass), or the state alone (truncated backpropagation)."""
    packing: Packing = "auto"
    """What a sequence is. stream: a window of the text, whatever documents it cuts. reset: the
    same, each document from an empty state. whole: as many whole documents as fit. single: one
    document. auto: whole for examples (prompt and response, chats), otherwise stream."""
    learning_rate: float = 6e-4
    """At the start and through constant_steps."""
    final_learning_rate: float = 1e-5
    """At the last step, reached by exponential decay."""
    warmup_steps: int = 0
    """Steps over which the learning rate grows from a fifth of itself, as in RWKV-LM."""
    constant_steps: int = 0
    """Steps after the warm-up before the decay begins (the paper's 169M model: 4.5 % of all)."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Adam's decay rates."""
    epsilon: float = 1e-8
    """Adam's epsilon."""
    weight_decay: float = 0.0
    """On matrices only; the paper uses none."""
    clip: float = 1.0
    """Largest norm of the gradient; 0 means no clipping."""
    dropout: float = 0.0
    """Share of activations dropped after the embedding and each residual sum."""
    max_logit_penalty: float = 1e-4
    """Half of it times the square of each position's largest logit is added to the objective
    (RWKV-LM's L2Wrap); 0 means none."""
    z_loss: float = 0.0
    """This times the square of the softmax's log-normaliser is added (PaLM: 1e-4)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of activations. Parameters and optimizer stay float32."""
    recompute: bool = False
    """Keep only what goes into each block and compute the rest again for the gradient: about a
    third more work, far less memory (activation checkpointing)."""
    compile: bool = False
    """Compile the blocks with torch.compile."""
    loader_workers: int = 0
    """Threads that read batches ahead."""
    skip_bad_steps: bool = False
    """Leave out a step whose loss or gradient is not finite, instead of stopping."""
    rollback: float = 0.0
    """When the loss exceeds the mean of the last 100 steps by this many nats, go back to the newest
    checkpoint and pass over the batches since then. 0 means never."""
    seed: int = 0
    """Decides the starting values, the split, the order and the dropout."""

    def __post_init__(self) -> None:
        choices = {
            "carry": ("gradient", "state"),
            "packing": get_args(Packing),
            "dtype": ("float32", "bfloat16"),
        }
        wanted = {
            **{
                f"one of {', '.join(values)}": {name: getattr(self, name) in values}
                for name, values in choices.items()
            },
            "at least 1": {n: getattr(self, n) >= 1 for n in ("batch", "context")},
            "at least 0": {
                n: getattr(self, n) >= 0
                for n in (
                    "steps",
                    "minutes",
                    "micro_batch",
                    "chunk",
                    "max_logit_penalty",
                    "z_loss",
                    "loader_workers",
                    "rollback",
                    "warmup_steps",
                    "constant_steps",
                    "weight_decay",
                    "clip",
                )
            },
            "a number over 0": {
                n: 0 < getattr(self, n) < math.inf
                for n in ("learning_rate", "final_learning_rate", "epsilon")
            },
            "at least 0 and less than 1": {
                "dropout": 0 <= self.dropout < 1,
                "betas": all(0 <= beta < 1 for beta in self.betas),
            },
            "at least 0 and less than 2**32": {"seed": 0 <= self.seed < 1 << 32},
        }
        for limits, fields in wanted.items():
            for name, holds in fields.items():
                if not holds:
                    raise ValueError(f"{name} is {getattr(self, name)}; it must be {limits}")

    @property
    def total_steps(self) -> int:
        """`steps`, or what its 0 stands for."""
        return self.steps or (_UNLIMITED if self.minutes else _DEFAULT_STEPS)


def learning_rate(step: int, options: TrainOptions, clock: float = 0.0) -> float:
    """Of a step counted from 0: warm-up, constant, exponential decay (RWKV-v4neo, trainer.py).

    clock is the share of a time limit that is used up; the decay follows it if it is ahead.
    """
    warmup, constant = options.warmup_steps, options.constant_steps
    span = max(1, options.total_steps - constant - warmup)
    progress = min(1.0, max(0.0, clock, (step - constant - warmup + 1) / span))
    ratio = options.final_learning_rate / options.learning_rate
    rate = options.learning_rate * ratio**progress
    return rate * (0.2 + 0.8 * step / warmup) if step < warmup else rate
