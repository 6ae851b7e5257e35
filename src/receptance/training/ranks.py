"""Several processes that train one model: who reads what, and what they tell each other.

`torchrun` starts them. Rows of a batch are divided over `data` groups; with context parallelism
the time axis of a row is divided over `time` processes as well, each handing its state to the next.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.elastic.utils import get_env_variable_or_raise
from torch.distributed.rendezvous import rendezvous

# A process that is gone is noticed at once; this is for one that hangs.
_PATIENCE = datetime.timedelta(hours=4)


@dataclass(frozen=True)
class Ranks:
    """The place of this process: `rank` of `count`, `time_count` neighbors sharing a row."""

    rank: int = 0
    count: int = 1
    time_count: int = 1

    def __post_init__(self) -> None:
        if self.time_count < 1 or self.count % self.time_count:
            raise ValueError(
                f"context ranks are {self.time_count}; they must divide the {self.count} processes"
            )

    @property
    def data_count(self) -> int:
        """Groups that the rows of a batch are divided over."""
        return self.count // self.time_count

    @property
    def first(self) -> bool:
        """Whether this process is the one that speaks and writes for all."""
        return self.rank == 0

    @property
    def previous(self) -> int | None:
        """The process with the piece of the sequence before ours, None if ours is the first."""
        return self.rank - 1 if self.rank % self.time_count else None

    @property
    def next(self) -> int | None:
        """The process with the piece of the sequence after ours, None if ours is the last."""
        return self.rank + 1 if (self.rank + 1) % self.time_count else None

    def check_rows(self, batch: int) -> None:
        """ValueError if a batch is too small to be divided."""
        if batch < self.data_count:
            raise ValueError(
                f"batch is {batch}, fewer rows than the {self.data_count} processes that share "
                "them; give a larger --batch or start fewer"
            )

    def rows(self, batch: int) -> slice:
        """Our rows of a batch: neighbors, as even as can be."""
        return _share(batch, self.rank // self.time_count, self.data_count)

    def time(self, context: int) -> slice:
        """Our positions of a row."""
        return _share(context, self.rank % self.time_count, self.time_count)

    def sum(self, values: Sequence[float], device: torch.device) -> list[float]:
        """Each value summed over all processes."""
        if self.count == 1:
            return list(values)
        both = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(both)
        return [float(x) for x in both]

    def share(self, make: Callable[[], str]) -> str:
        """What the first process makes."""
        found = [make() if self.first else ""]
        if self.count > 1:
            dist.broadcast_object_list(found)
        return found[0]

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            dist.barrier()

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """A block that the first process goes through before the others enter it."""
        if not self.first:
            self.wait()
        yield
        if self.first:
            self.wait()

    def sum_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Gradients summed over all processes and divided by their groups, in place."""
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        work = [dist.all_reduce(p.grad, async_op=True) for p in parameters]
        for handle in work:
            handle.wait()
        for parameter in parameters:
            assert parameter.grad is not None
            parameter.grad /= self.data_count


def _share(length: int, index: int, count: int) -> slice:
    return slice(length * index // count, length * (index + 1) // count)


def send(tensors: dict[str, Tensor], to: int) -> None:
    """Hand a state, or its gradient, to another process."""
    for _, tensor in sorted(tensors.items()):
        dist.send(tensor.contiguous(), to)


def receive(like: dict[str, Tensor], source: int) -> dict[str, Tensor]:
    """What another process sent: tensors of the same names, shapes and dtypes as `like`."""
    found = {name: torch.empty_like(x).contiguous() for name, x in like.items()}
    for _, tensor in sorted(found.items()):
        dist.recv(tensor, source)
    return found


@contextmanager
def joined(device: str, context_ranks: int = 1) -> Iterator[tuple[Ranks, torch.device]]:
    """Join the processes that torchrun started with us, if it did, and leave them at the end."""
    if not dist.is_torchelastic_launched():
        if context_ranks > 1:
            raise ValueError(
                f"--context-ranks {context_ranks} needs as many processes; start them with "
                "torchrun --nproc-per-node N -m receptance train ..."
            )
        yield Ranks(), torch.device(device)
        return
    place = torch.device(device)
    if place.type == "cuda":
        place = torch.device("cuda", dist.get_node_local_rank())
        torch.cuda.set_device(place)
    # gloo beside nccl: checkpoints are gathered in host memory.
    backend = "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo"
    store, rank, count = next(rendezvous("env://", timeout=_PATIENCE))
    # torchrun starts processes again with the same store, and in it the addresses of the dead.
    attempt = get_env_variable_or_raise("TORCHELASTIC_RESTART_COUNT")
    store = dist.PrefixStore(f"attempt {attempt}", store)
    dist.init_process_group(backend, timeout=_PATIENCE, world_size=count, rank=rank, store=store)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), context_ranks), place
    finally:
        dist.destroy_process_group()
