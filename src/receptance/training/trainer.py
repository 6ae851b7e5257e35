"""Training: one step, and everything that a checkpoint must hold to continue.

A step is a pure function of the parameters, the optimizer's state and the step's number: batches
and dropout are drawn from (seed, step), so a run that stopped continues as if it had not.
"""

from __future__ import annotations

import collections
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from receptance.adapters import Adapter
from receptance.data.batches import Batch, Batches, Prefetcher
from receptance.inference.scoring import text_rows
from receptance.model import Model
from receptance.training.objective import Objective
from receptance.training.options import TrainOptions, learning_rate
from receptance.training.passes import Passes
from receptance.training.ranks import Ranks
from receptance.training.sharding import assign, gather, working_device

# A spike of the loss is measured against the mean of this many steps.
SPIKE_MEMORY = 100
# Validation reads this many positions of each row of a text, or rows of examples, at a time.
_VALIDATION_CHUNK, _VALIDATION_ROWS = 256, 16


def make_optimizer(
    parameters: Iterable[tuple[str, Tensor]],
    scales: dict[str, float],
    options: TrainOptions,
    is_decayed: Callable[[str, torch.Size], bool] = lambda name, shape: _is_matrix(shape),
) -> torch.optim.AdamW:
    """AdamW with one group per (learning-rate scale, decayed or not).

    scales are multipliers of the learning rate by parameter name; the default is 1. is_decayed says
    of a name and shape whether weight decay acts there; the default is on matrices.
    """
    groups: dict[tuple[float, bool], list[Tensor]] = {}
    for name, parameter in parameters:
        decayed = is_decayed(name, parameter.shape)
        groups.setdefault((scales.get(name, 1.0), decayed), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": group, "scale": scale, "weight_decay": options.weight_decay * decayed}
            for (scale, decayed), group in groups.items()
        ],
        lr=options.rates[0],
        betas=options.betas,
        eps=options.epsilon,
        fused=True,
    )


def _is_matrix(shape: torch.Size) -> bool:
    return sum(size > 1 for size in shape) >= 2


@dataclass(frozen=True)
class StepReport:
    """The figures of one step."""

    step: int
    """The number of steps done so far, this one included."""
    loss: float
    """The mean cross entropy of the batch before the update, in nats per token."""
    learning_rate: float
    gradient_norm: float
    """The norm before clipping."""
    tokens_per_second: float
    """The speed of all processes together."""


class NotFinite(ValueError):
    """A loss or gradient is not finite, so nothing was changed; `batch` is what led to it."""

    def __init__(self, message: str, batch: Batch) -> None:
        super().__init__(message)
        self.batch = batch


@dataclass(frozen=True)
class Snapshot:
    """A copy of a step in host memory: the part of a checkpoint that this process writes."""

    stem: str
    """The name of the file with the parameters: "model" or "adapter"."""
    parameters: dict[str, Tensor]
    """The whole tensors by name."""
    metadata: dict[str, str]
    """The entries of that file's header."""
    optimizer: dict[str, Tensor]
    about: dict[str, Any]


class Trainer:
    """A model in training: its steps, and everything needed to continue them.

    Only the adapter is trained if there is one. objective is what `sharding.build` returned for the
    same options; without it, the model trains in this process alone.
    """

    def __init__(
        self,
        model: Model,
        batches: Batches,
        options: TrainOptions,
        *,
        objective: Objective | None = None,
        adapter: Adapter | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        if (batches.batch, batches.context) != (options.batch, options.context):
            raise ValueError(
                f"the batches have {batches.batch} rows of context {batches.context}, the options "
                f"say {options.batch} and {options.context}; make both from the same numbers"
            )
        if adapter is not None and not adapter.attached:
            raise ValueError("the adapter is not attached; call adapter.attach(model) before")
        if adapter is None and not any(x.requires_grad for x in model.parameters()):
            raise ValueError("no parameter is trained; if an adapter is attached, pass adapter=")
        self.model, self.batches, self.options = model, batches, options
        self.adapter, self.ranks = adapter, ranks or Ranks()
        self.device = working_device(model.emb.weight)
        # Whether no process holds the whole model. This is asked before the first forward pass,
        # for which FSDP makes whole tensors of some parameters.
        self.sharded = isinstance(model.emb.weight, DTensor)
        if objective is None:
            model.dropout, model.recompute = options.dropout, options.recompute
            objective = Objective(model, options)
        self.objective = objective
        self.dtype = getattr(torch, options.dtype)
        self.ranks.check_rows(options.batch)
        scales: dict[str, float] = {}
        self.parameters: dict[str, Tensor] = {}
        if adapter is None:
            self.parameters.update(model.named_parameters())
            scales = model.learning_rate_scales() if options.layerwise_rates else {}
        else:
            self.parameters.update(adapter.tensors())
        is_decayed = model.config.architecture.is_weight_decayed
        rules = () if adapter else (is_decayed,)
        # Some versions have parameters that no model uses.
        learning = ((n, x) for n, x in self.parameters.items() if x.requires_grad)
        self.optimizer = make_optimizer(learning, scales, options, *rules)
        random = options.dropout > 0 or adapter is not None  # an adapter may drop as well
        self._passes = Passes(self.objective, self._empty_state, options, self.ranks, random=random)
        self._base = model.fingerprint() if adapter else ""
        self._read = Prefetcher(batches, options.loader_workers)
        self.step = 0
        self.seconds = 0.0
        self.passed_over = 0
        self.losses: collections.deque[float] = collections.deque(maxlen=SPIKE_MEMORY)

    @property
    def progress(self) -> float:
        """The share of the run that is done, by steps or by the clock, whichever is further."""
        return min(1.0, max(self.step / self.options.total_steps, self._clock))

    @property
    def _clock(self) -> float:
        return self.options.clock(self.seconds)

    @property
    def finished(self) -> bool:
        """Whether the steps or the minutes are used up."""
        return self.progress >= 1

    def run_step(self) -> StepReport:
        """Make one update.

        NotFinite, before anything is changed, if the loss or the gradient is not finite.
        """
        began = time.perf_counter()
        batch = self._read.at(self.step + self.passed_over)
        rate = self._set_learning_rate()
        self.switch(training=True)
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._gradients(batch)
        norm = self._clip()
        for what, value in (("loss", loss), ("gradient norm", norm)):
            if not math.isfinite(value):
                raise NotFinite(f"{what} is {value} at step {self.step + 1}", batch)
        self.optimizer.step()
        self.step += 1
        took = self.ranks.sum([time.perf_counter() - began], self.device)[0] / self.ranks.count
        self.seconds += took
        return StepReport(self.step, loss, rate, norm, batch.inputs.numel() / took)

    def switch(self, training: bool) -> None:
        """Put model and adapter into training or evaluation mode: dropout on or off."""
        self.model.train(training)
        if self.adapter is not None:
            self.adapter.train(training)

    def leave_out_step(self) -> None:
        """Count a step whose update was not made."""
        self.step += 1

    def _gradients(self, batch: Batch) -> float:
        """Compute the gradients over all processes, and return the batch's mean cross entropy."""
        ranks = self.ranks
        ours = batch.part(ranks.rows(self.options.batch), ranks.time(batch.inputs.shape[1]))
        # Groups of processes are averaged, so each divides by its share of the positions.
        total = max(1, batch.learned) / ranks.data_count
        entropy = self._passes.run(self._here(ours), total, self.step)
        if ranks.count > 1 and (ranks.time_count > 1 or self.adapter is not None):
            ranks.sum_gradients([x for x in self.parameters.values() if x.requires_grad])
        return ranks.sum([entropy], self.device)[0] / ranks.data_count

    def _here(self, batch: Batch) -> Batch:
        """The batch on this process's device.

        ValueError names an id that the model lacks: on a GPU it would be a crash without a reason.
        """
        known = self.model.config.vocab_size
        for ids in (batch.inputs, batch.targets):
            wrong = ids[(ids < 0) | (ids >= known)]
            if len(wrong):
                raise ValueError(
                    f"the corpus has the token id {int(wrong[0])} and the model knows 0 to "
                    f"{known - 1}; name the tokenizer that the corpus was made with"
                )
        return batch.to(self.device)

    def _clip(self) -> float:
        limit = self.options.clip or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), limit)
        return float(gather(norm))

    def _set_learning_rate(self) -> float:
        rate = learning_rate(self.step, self.options, self._clock)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        return rate

    def _empty_state(self, rows: int) -> dict[str, Tensor]:
        state = None if self.adapter is None else self.adapter.initial_state(rows, self.dtype)
        return (state or self.model.empty_state(rows, dtype=self.dtype)).tensors

    @torch.no_grad()
    def validate(self, tokens: np.ndarray) -> float:
        """The negative log-likelihood of all tokens of a text [N], in nats.

        The text is cut into a few long rows, which are read side by side and divided over the
        processes.
        """
        self.switch(training=False)
        whole = text_rows(tokens, start=self.batches.end_of_text)
        ours = whole.part(Ranks(self.ranks.rank, self.ranks.count).rows(len(whole.inputs)))
        state, total = self._empty_state(len(ours.inputs)), 0.0
        for at in range(0, ours.inputs.shape[1], _VALIDATION_CHUNK):
            piece = self._here(ours.part(time=slice(at, at + _VALIDATION_CHUNK)))
            _, entropy, state = self.objective(piece, state, 1.0)
            total += float(entropy)
        return self.ranks.sum([total], self.device)[0]

    @torch.no_grad()
    def validate_examples(self, tokens: np.ndarray, mask: np.ndarray) -> float | None:
        """The mean cross entropy, in nats, of the tokens [N] whose mask [N] is 1.

        They are read in the rows in which training reads them, all of them by every process. None
        if there is nothing to predict.
        """
        if not mask[1:].any():
            return None
        self.switch(training=False)
        like, total, count = self.batches, 0.0, 0
        rows = Batches(
            tokens,
            context=min(like.context, len(tokens) - 1),
            batch=1,
            seed=0,
            mask=mask,
            packing=like.packing,
            end_of_text=like.end_of_text,
        )
        for at in range(0, rows.windows, _VALIDATION_ROWS):
            batch = self._here(rows.rows(at, at + _VALIDATION_ROWS))
            state = self._empty_state(len(batch.inputs))
            _, entropy, _ = self.objective(batch, state, 1.0)
            total, count = total + float(entropy), count + batch.learned
        return total / count if count else None

    def snapshot(self) -> Snapshot:
        """A copy of this step in host memory, of which each process gets some whole tensors.

        All processes must call it, because shards are gathered.
        """
        states = {
            f"{name}/{key}": tensor
            for name, parameter in self.parameters.items()
            for key, tensor in sorted(self.optimizer.state.get(parameter, {}).items())
        }
        stem, metadata = "model", {"format": "pt"}
        if self.adapter is not None:
            stem, metadata = "adapter", self.adapter.metadata(self._base)
        parameters, optimizer = self._host(self.parameters), self._host(states)
        return Snapshot(stem, parameters, metadata, optimizer, self._about())

    @property
    def shards(self) -> int:
        """The number of processes that write a share of the tensors: one for a small adapter."""
        return self.ranks.count if self.adapter is None else 1

    def _host(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Whole copies, in host memory, of those tensors that fall to this process."""
        copies = {}
        for number, (name, tensor) in enumerate(tensors.items()):
            whole = gather(tensor)
            if number % self.shards == self.ranks.rank:
                copies[name] = whole.to("cpu", copy=True).contiguous()
        return copies

    def _about(self) -> dict[str, Any]:
        at = self.step + self.passed_over
        return {
            "step": self.step,
            "tokens": self.step * self.options.batch * self.options.context,
            "epoch": self.batches.epoch(at),
            "position": self.batches.position(at),
            "passed_over": self.passed_over,
            "losses": list(self.losses) if self.options.rollback else [],
            # Without a time limit nothing depends on the clock, and equal runs are equal files.
            "seconds": self.seconds if self.options.minutes else None,
            "random": "batches and dropout are drawn from the seed and the step",
        }

    def restore(self, about: dict[str, Any], optimizer: Iterable[tuple[str, Tensor]]) -> None:
        """Continue from a snapshot; the trained parameters themselves are loaded already."""
        self.step, self.seconds = about["step"], about["seconds"] or 0.0
        self.passed_over = about["passed_over"]
        self.losses.clear()
        self.losses.extend(about["losses"])
        self.optimizer.state.clear()
        for name, value in optimizer:
            name, _, key = name.rpartition("/")
            parameter = self.parameters[name]
            state = self.optimizer.state[parameter]
            state[key] = torch.zeros_like(parameter) if value.dim() else value.to(parameter.device)
            assign(state[key], value)
