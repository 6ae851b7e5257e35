"""Training on sequences with answers: the loss, one step, and a score on the held-out part.

Any `Answering` model can be trained, so that a Transformer goes through the very same steps. What
`Run` and `Saver` ask of a `Trainer`, a `LabeledTrainer` answers as well.
"""

from __future__ import annotations

import collections
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from receptance.data.batches import Batch
from receptance.data.labeled import Examples, LabeledBatch, Problem, Split
from receptance.model.heads import Answering
from receptance.model.modes import evaluating
from receptance.training.options import TrainOptions, learning_rate
from receptance.training.ranks import Ranks
from receptance.training.trainer import (
    SPIKE_MEMORY,
    NotFinite,
    Snapshot,
    StepReport,
    make_optimizer,
)

# At most so many positions are evaluated at a time.
_POSITIONS_AT_ONCE = 1 << 14
# The options of TrainOptions that are about text, or about processes that share it.
_OF_TEXT = (
    *("context", "chunk", "carry", "packing", "max_logit_penalty", "z_loss", "compile"),
    "loader_workers",
)


@dataclass(frozen=True)
class Score:
    """How well examples were answered."""

    loss: float
    """The mean over answers: cross entropy in nats, or the squared error."""
    examples: np.ndarray
    """[N], for each example: the share of its answers that are right, or its mean squared error."""
    absolute: float | None = None
    """The mean absolute error of numbers."""

    @property
    def mean(self) -> float:
        """The mean over examples: accuracy, or mean squared error."""
        return float(self.examples.mean())


def errors(outputs: Tensor, answers: Tensor, problem: Problem) -> Tensor:
    """The loss of each answer, in float32: [N,K] and [N] classes or [N,K] numbers -> [N].

    Cross entropy in nats, or the squared error's mean over the K numbers.
    """
    outputs = outputs.float() if outputs.dtype != torch.float64 else outputs
    if problem.kind == "classify":
        return F.cross_entropy(outputs, answers, reduction="none")
    return (outputs - answers.to(outputs.dtype)).square().mean(dim=-1)


@torch.no_grad()
def score(
    model: Answering,
    batches: Iterable[LabeledBatch],
    problem: Problem,
    dtype: torch.dtype | None = None,
) -> Score:
    """Answer all examples, and compare with what they should be."""
    device = model.device
    losses, examples, absolute = [], [], []
    with evaluating(model):
        for batch in batches:
            for part in _pieces(batch):
                part = part.to(device)
                outputs = _answers(model, part, dtype)
                wanted = part.answers
                loss = errors(outputs, wanted, problem)
                losses.append(loss.double())
                if problem.kind == "classify":
                    value = (outputs.argmax(dim=-1) == wanted).double()
                else:
                    value = loss.double()
                    absolute.append((outputs - wanted).abs().double().mean(dim=-1))
                examples.append(_by_example(value, part))
    return Score(
        float(torch.cat(losses).mean()),
        torch.cat(examples).cpu().numpy(),
        float(torch.cat(absolute).mean()) if absolute else None,
    )


def _answers(model: Answering, batch: LabeledBatch, dtype: torch.dtype | None) -> Tensor:
    outputs: Tensor = model(batch.inputs, lengths=batch.lengths, places=batch.places, dtype=dtype)
    return outputs


def _pieces(batch: LabeledBatch) -> Iterator[LabeledBatch]:
    """The batch in pieces of so few positions that their activations fit into memory."""
    rows = max(1, len(batch.inputs) // max(1, batch.size))
    size = max(1, _POSITIONS_AT_ONCE // max(1, rows * batch.inputs.shape[1]))
    for at in range(0, batch.size, size):
        yield batch.part(slice(at, at + size))


def _by_example(values: Tensor, batch: LabeledBatch) -> Tensor:
    """The mean of each example's values: [N] -> [B]."""
    if batch.places is None:
        return values
    dense = torch.zeros(batch.places.shape, dtype=values.dtype, device=values.device)
    dense[batch.places] = values
    return dense.sum(dim=1) / batch.places.sum(dim=1).clamp(min=1)


class LabeledTrainer:
    """A model that learns to answer questions about sequences: its steps, and how they go on.

    A step is a pure function of the parameters, the optimizer's state and the step's number. One
    process trains. ValueError if options are set that are about text.
    """

    adapter = None
    """A checkpoint holds the whole model."""
    sharded = False
    shards = 1

    def __init__(self, model: Answering, examples: Examples, options: TrainOptions) -> None:
        plain = TrainOptions()
        for name in _OF_TEXT:
            if getattr(options, name) != getattr(plain, name):
                raise ValueError(f"{name} is about text and has no effect on labeled sequences")
        self.model, self.examples, self.options = model, examples, options
        self.ranks = Ranks()
        model.dropout, model.recompute = options.dropout, options.recompute
        self.device = model.device
        self.dtype = getattr(torch, options.dtype)
        self.parameters: dict[str, Tensor] = dict(model.named_parameters())
        scales = model.learning_rate_scales() if options.layerwise_rates else {}
        self.optimizer = make_optimizer(
            self.parameters.items(), scales, options, model.is_weight_decayed
        )
        self.step = 0
        self.seconds = 0.0
        self.positions = 0
        self.passed_over = 0
        self.losses: collections.deque[float] = collections.deque(maxlen=SPIKE_MEMORY)

    @property
    def problem(self) -> Problem:
        """What is asked about the sequences."""
        return self.examples.problem

    @property
    def progress(self) -> float:
        """The share of the run that is done, by steps or by the clock, whichever is further."""
        clock = self.options.clock(self.seconds)
        return min(1.0, max(self.step / self.options.total_steps, clock))

    @property
    def finished(self) -> bool:
        """Whether the steps or the minutes are used up."""
        return self.progress >= 1

    def run_step(self) -> StepReport:
        """Make one update.

        NotFinite, before anything is changed, if the loss or the gradient is not finite.
        """
        began = time.perf_counter()
        options = self.options
        batch = self.examples.train(self.step + self.passed_over, options.batch, options.seed)
        rate = learning_rate(self.step, options, options.clock(self.seconds))
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        self.switch(training=True)
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._gradients(batch)
        limit = options.clip or math.inf
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters.values(), limit))
        for what, value in (("loss", loss), ("gradient norm", norm)):
            if not math.isfinite(value):
                raise NotFinite(f"{what} is {value} at step {self.step + 1}", cast(Batch, batch))
        self.optimizer.step()
        self.step += 1
        took = time.perf_counter() - began
        self.seconds += took
        positions = batch.inputs.shape[0] * batch.inputs.shape[1]
        self.positions += positions
        return StepReport(self.step, loss, rate, norm, positions / took)

    def _gradients(self, batch: LabeledBatch) -> float:
        """Compute the gradients of a batch, in micro-batches, and return its mean loss."""
        size = self.options.micro_batch or batch.size
        total, loss = max(1, batch.learned), 0.0
        for number, at in enumerate(range(0, batch.size, size)):
            part = batch.part(slice(at, at + size)).to(self.device)
            with torch.random.fork_rng(self._devices, enabled=self.options.dropout > 0):
                if self.options.dropout:
                    place = (self.options.seed, self.step, number)
                    seed = np.random.SeedSequence(place).generate_state(1, np.uint64)
                    torch.manual_seed(int(seed[0]))
                outputs = _answers(self.model, part, self.dtype)
            value = errors(outputs, part.answers, self.problem).sum() / total
            value.backward()
            loss += float(value.detach())
        return loss

    @property
    def _devices(self) -> list[torch.device]:
        """The devices whose generators dropout draws from, besides the CPU's."""
        return [self.device] if self.device.type == "cuda" else []

    def switch(self, training: bool) -> None:
        """Put the model into training or evaluation mode: dropout on or off."""
        self.model.train(training)

    def leave_out_step(self) -> None:
        """Count a step whose update was not made."""
        self.step += 1

    def score(self, split: Split, most: int | None = None) -> Score:
        """Answer the examples of a split, or the first so many of its batches."""
        batches = self.examples.held_out(split, self.options.batch)
        chosen = (batch for number, batch in enumerate(batches) if most is None or number < most)
        return score(self.model, chosen, self.problem, self.dtype)

    def snapshot(self) -> Snapshot:
        """A copy of this step in host memory."""
        states = {
            f"{name}/{key}": tensor
            for name, parameter in self.parameters.items()
            for key, tensor in sorted(self.optimizer.state[parameter].items())
        }
        parameters, optimizer = _host(self.parameters), _host(states)
        return Snapshot("model", parameters, {"format": "pt"}, optimizer, self._about())

    def _about(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "examples": self.step * self.options.batch,
            "positions": self.positions,
            "passed_over": self.passed_over,
            "losses": list(self.losses) if self.options.rollback else [],
            # Without a time limit nothing depends on the clock, and equal runs are equal files.
            "seconds": self.seconds if self.options.minutes else None,
            "random": "batches and dropout are drawn from the seed and the step",
        }

    def restore(self, about: dict[str, Any], optimizer: Iterable[tuple[str, Tensor]]) -> None:
        """Continue from a snapshot; the parameters themselves are loaded already."""
        self.step, self.seconds = about["step"], about["seconds"] or 0.0
        self.passed_over, self.positions = about["passed_over"], about["positions"]
        self.losses.clear()
        self.losses.extend(about["losses"])
        self.optimizer.state.clear()
        for name, value in optimizer:
            name, _, key = name.rpartition("/")
            parameter = self.parameters[name]
            state = self.optimizer.state[parameter]
            state[key] = value.clone().to(parameter.device) if value.dim() else value.clone()


def _host(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.detach().to("cpu", copy=True).contiguous() for name, x in tensors.items()}
