"""Forward and backward over a process's share of a batch.

The share is cut into micro-batches of rows, and rows into chunks of time. A chunk's gradient needs
the state before it, which is small, and the gradient of the state behind it: so the chunks are
read once for the states between them and then, from the last to the first, once more with
gradients, and no more than one chunk's activations exist at a time. With context parallelism the
first of these states comes from the process before ours and its gradient goes back there; while
the next process reads one micro-batch, we read the next one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from receptance.data.batches import Batch
from receptance.training.objective import Objective
from receptance.training.options import TrainOptions
from receptance.training.ranks import Ranks, receive, send

Tensors = dict[str, Tensor]


class Passes:
    """The gradients of a step, added up over micro-batches and chunks.

    `objective` may be wrapped by DDP or FSDP. `empty_state` gives the state that rows begin from,
    which may be learned.
    """

    def __init__(
        self,
        objective: Objective,
        empty_state: Callable[[int], Tensors],
        options: TrainOptions,
        ranks: Ranks,
        *,
        random: bool,
    ) -> None:
        """random says whether anything is dropped, and numbers need to be drawn."""
        self.random = random
        self.objective, self.empty_state = objective, empty_state
        self.options, self.ranks = options, ranks

    def run(self, batch: Batch, total: float, step: int) -> float:
        """Add the gradients of our rows to the parameters', and return our share of the entropy.

        Sums over positions are divided by total.
        """
        # All processes have the same number of micro-batches, some of them empty if need be,
        # because the passes of FSDP are joint work.
        most = -(-self.options.batch // self.ranks.data_count)
        rows = self.options.micro_batch or most
        parts = [batch.part(slice(at, at + rows)) for at in range(0, most, rows)]
        device = batch.inputs.device
        draws = [
            _Draws((self.options.seed, step, self.ranks.rank, number), self.random, device)
            for number in range(len(parts))
        ]
        sweeps = [_Sweep(self, *both, total) for both in zip(parts, draws, strict=True)]
        if self.ranks.time_count == 1:
            for sweep in sweeps:
                state, last = self.empty_state(len(sweep.chunks[0].inputs)), sweep is sweeps[-1]
                if self.options.carry == "state":
                    sweep.truncated(state, last=last)
                else:
                    sweep.forward(state, whole=False)
                    sweep.backward(None, last=last)
        else:
            self._in_turns(sweeps)
        return sum(sweep.entropy for sweep in sweeps)

    def _in_turns(self, sweeps: list[_Sweep]) -> None:
        """All micro-batches forward, then all backward, each after the neighbor's part of it."""
        before, after = self.ranks.previous, self.ranks.next
        carried = self.options.carry == "gradient"
        for sweep in sweeps:
            state = self.empty_state(len(sweep.chunks[0].inputs))
            if before is not None:
                state = _leaves(receive(state, before))
            sweep.forward(state, whole=after is not None)
            if after is not None:
                send(sweep.states[-1], after)
        for sweep in sweeps:
            grads = None
            if after is not None and carried:
                grads = receive(sweep.states[-1], after)
            sweep.backward(grads, last=False)
            if before is not None and carried:
                send(_gradients(sweep.states[0]), before)


class _Sweep:
    """One micro-batch: a forward pass for the states between chunks, then the backward passes."""

    def __init__(self, passes: Passes, batch: Batch, draws: _Draws, total: float) -> None:
        size = passes.options.chunk or batch.inputs.shape[1]
        self.chunks = [
            batch.part(time=slice(at, at + size)) for at in range(0, batch.inputs.shape[1], size)
        ]
        self.passes, self.draws, self.total = passes, draws, total
        self.states: list[Tensors] = []
        self.entropy = 0.0

    def truncated(self, state: Tensors, *, last: bool) -> None:
        """Go forward and backward through each chunk, with no gradient between chunks."""
        for number, chunk in enumerate(self.chunks):
            final = last and number == len(self.chunks) - 1
            with self.draws.of(number), _synchronized(self.passes.objective, final):
                value, entropy, after = self.passes.objective(chunk, state, self.total)
                if value.requires_grad:  # later chunks do not depend on a learned first state
                    value.backward()
            self.entropy += float(entropy)
            state = {name: x.detach() for name, x in after.items()}

    def forward(self, state: Tensors, *, whole: bool) -> None:
        """Compute the state before every chunk and, if whole is set, that behind the last one."""
        self.states = [state]
        for number, chunk in enumerate(self.chunks if whole else self.chunks[:-1]):
            with torch.no_grad(), self.draws.of(number):
                _, _, state = self.passes.objective(chunk, state, None)
            self.states.append(_leaves(state))

    def backward(self, grads: Tensors | None, *, last: bool) -> None:
        """Go backward from the last chunk to the first.

        grads are the gradients of the state behind the last chunk. Those of the first state end up
        in the tensors of that state.
        """
        objective = self.passes.objective
        for number in reversed(range(len(self.chunks))):
            with self.draws.of(number), _synchronized(objective, last and number == 0):
                chunk, state = self.chunks[number], self.states[number]
                value, entropy, after = objective(chunk, state, self.total)
                ends, weights = [value], [None]
                if grads is not None:
                    # What comes before an adapter's first matrix does not depend on it.
                    live = [name for name in grads if after[name].requires_grad]
                    ends += [after[name] for name in live]
                    weights += [grads[name] for name in live]  # type: ignore[misc]
                torch.autograd.backward(ends, weights)
            self.entropy += float(entropy)
            if number and self.passes.options.carry == "gradient":
                grads = _gradients(state)


class _Draws:
    """Dropout as a function of (seed, step, rank, micro-batch, chunk).

    torch's global generators are afterwards as they were before.
    """

    def __init__(self, place: tuple[int, ...], needed: bool, device: torch.device) -> None:
        self.place, self.needed = place, needed
        # By default torch would save the generators of all GPUs, also of those of other processes.
        self.devices = [device] if device.type == "cuda" else []

    @contextlib.contextmanager
    def of(self, chunk: int) -> Iterator[None]:
        """Seed torch's generators for a chunk, so that dropout is the same in every pass."""
        if not self.needed:
            yield
            return
        seed = np.random.SeedSequence((*self.place, chunk))
        with torch.random.fork_rng(self.devices):
            torch.manual_seed(int(seed.generate_state(1, np.uint64)[0]))
            yield


def _leaves(state: Tensors) -> Tensors:
    return {name: x.detach().requires_grad_() for name, x in state.items()}


def _gradients(state: Tensors) -> Tensors:
    return {n: torch.zeros_like(x) if x.grad is None else x.grad for n, x in state.items()}


def _synchronized(objective: Objective, last: bool) -> contextlib.AbstractContextManager[None]:
    """DDP exchanges gradients in the last backward pass of a step only."""
    if isinstance(objective, DistributedDataParallel) and not last:
        return objective.no_sync()
    return contextlib.nullcontext()
