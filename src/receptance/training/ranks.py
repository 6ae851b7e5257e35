"""Several processes that train one model: who reads what, and what they tell each other.

`torchrun` starts them. Rows of a batch are divided over `data` groups; with context parallelism
the time axis of a row is divided over `time` processes as well, each handing its state to the next.
"""

from __future__ import annotations

import datetime
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.elastic.utils import get_env_variable_or_raise
from torch.distributed.rendezvous import rendezvous

# How long a process waits for another one that hangs; one that has died is noticed at once.
_PATIENCE = datetime.timedelta(hours=4)
# Seconds until a file that one node has written must be visible on the others: a node with NFS
# may remember for 60 of them (acdirmax) that a folder was not there.
_VISIBLE_SECONDS = 65.0


@dataclass(frozen=True)
class Ranks:
    """The place of this process, `rank` of `count`; `time_count` neighbors share a row."""

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
        """The number of groups that the rows of a batch are divided over."""
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
                "them; give a larger batch or start fewer processes"
            )

    def rows(self, batch: int) -> slice:
        """This process's rows of a batch: the batch is cut into pieces as even as can be."""
        return _share(batch, self.rank // self.time_count, self.data_count)

    def time(self, context: int) -> slice:
        """This process's positions of a row."""
        return _share(context, self.rank % self.time_count, self.time_count)

    def sum(self, values: Sequence[float], device: torch.device) -> list[float]:
        """Each value summed over all processes."""
        if self.count == 1:
            return list(values)
        both = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(both)
        return [float(x) for x in both]

    def share(self, make: Callable[[], str]) -> str:
        """The text that the first process makes, in all processes."""
        found = [make() if self.first else ""]
        if self.count > 1:
            dist.broadcast_object_list(found)
        return found[0]

    def wait(self) -> None:
        """Wait until all processes have called this."""
        if self.count > 1:
            dist.barrier()

    def check_shared(self, folder: Path) -> None:
        """ValueError in all processes if one of them does not see the first one's folder."""
        if self.count == 1:
            return
        # A new name, because a node may show an old file of the same name for a while.
        token = folder / self.share(lambda: f".seen-{secrets.token_hex(8)}")
        try:
            if self.first:
                token.touch()
            self.wait()
            blind = self.sum([float(not _appears(token))], torch.device("cpu"))[0]
        finally:
            if self.first:
                token.unlink(missing_ok=True)
        if blind:
            raise ValueError(
                f"{folder} is not one folder for all processes: {blind:.0f} of {self.count} do not "
                "see what the first one writes there; name a folder on a disk that all nodes share"
            )

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


def _appears(path: Path) -> bool:
    """Whether a file is there, or comes in the time that a network's disk may take to show it."""
    end = time.monotonic() + _VISIBLE_SECONDS
    while not path.exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def _share(length: int, index: int, count: int) -> slice:
    return slice(length * index // count, length * (index + 1) // count)


def send(tensors: dict[str, Tensor], to: int) -> None:
    """Hand a state, or its gradient, to another process."""
    for _, tensor in sorted(tensors.items()):
        dist.send(tensor.contiguous(), to)


def receive(like: dict[str, Tensor], source: int) -> dict[str, Tensor]:
    """The tensors that another process sent, of the same names, shapes and dtypes as `like`."""
    found = {name: torch.empty_like(x).contiguous() for name, x in like.items()}
    for _, tensor in sorted(found.items()):
        dist.recv(tensor, source)
    return found


@contextmanager
def joined(
    device: torch.device | str, context_ranks: int = 1
) -> Iterator[tuple[Ranks, torch.device]]:
    """Join the processes of torchrun if it started this one, and leave them at the end.

    Yields the place of this process among them and the device that falls to it.
    """
    place = torch.device(device)
    if not dist.is_torchelastic_launched():
        if context_ranks > 1:
            raise ValueError(
                f"context_ranks is {context_ranks}, which needs as many processes; start them with "
                "torchrun"
            )
        yield Ranks(), place
        return
    if place.type == "cuda":
        place = torch.device("cuda", dist.get_node_local_rank())
        torch.cuda.set_device(place)
    # Checkpoints are gathered in host memory, with gloo.
    backend = "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo"
    store, rank, count = next(rendezvous("env://", timeout=_PATIENCE))
    # torchrun restarts processes with the same store, which holds the addresses of the dead ones.
    attempt = get_env_variable_or_raise("TORCHELASTIC_RESTART_COUNT")
    store = dist.PrefixStore(f"attempt {attempt}", store)
    dist.init_process_group(backend, timeout=_PATIENCE, world_size=count, rank=rank, store=store)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), context_ranks), place
    finally:
        dist.destroy_process_group()
