"""`State`, what a model remembers of a sequence: a value that is returned and never changed.

A state is forked by keeping it, batched with `State.cat`, split with `rows`, stored with `save`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from receptance.atomic import written
from receptance.errors import one_line

FORMAT = "receptance-state"
FORMAT_VERSION = "1"


@dataclass(frozen=True)
class State:
    """The recurrent tensors of B rows; their size does not depend on how much was read."""

    tensors: dict[str, Tensor]
    """The tensors, each [L,B,...], by the names of the fields in the version's LayerState."""
    tokens: Tensor
    """[B] int64, the number of tokens that each row has read."""

    @property
    def batch(self) -> int:
        """The number of rows, B."""
        return self.tokens.shape[0]

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors."""
        return sum(x.nbytes for x in self.tensors.values())

    def rows(self, index: int | slice | Sequence[int] | Tensor) -> State:
        """The state of the chosen rows, in that order; an integer gives a batch of one row."""
        if not isinstance(index, slice):
            index = torch.as_tensor(index, device=self.tokens.device).reshape(-1)
            if not index.numel():
                index = index.long()  # torch makes floats of an empty list.
            if index.is_floating_point() or (
                index.dtype == torch.bool and len(index) != self.batch
            ):
                raise ValueError(
                    f"rows are chosen by {index.dtype} {list(index.shape)}; wanted numbers of "
                    f"rows, or {self.batch} bools"
                )
            if index.dtype != torch.bool and index.numel():
                low, high = (int(x) for x in index.aminmax())
                if low < -self.batch or high >= self.batch:
                    missing = high if high >= self.batch else low
                    raise ValueError(f"no row {missing} in a state of {self.batch} rows")
        return self._map(lambda x: x[:, index], lambda x: x[index])

    @staticmethod
    def cat(states: Sequence[State]) -> State:
        """A state with the rows of several states, one after another, all of one model."""
        if not states:
            raise ValueError("State.cat needs at least one state")
        first = states[0]
        for other in states[1:]:
            if _row_shapes(other) != _row_shapes(first):
                raise ValueError(
                    f"states of different models: {_row_shapes(first)} and {_row_shapes(other)}"
                )
        return State(
            {name: torch.cat([s.tensors[name] for s in states], dim=1) for name in first.tensors},
            torch.cat([s.tokens for s in states]),
        )

    def to(self, device: torch.device | str) -> State:
        """The same state on a device."""
        return self._map(lambda x: x.to(device))

    def detach(self) -> State:
        """The same state without its autograd history, as truncated backpropagation needs it."""
        return self._map(lambda x: x.detach())

    def save(self, path: str | Path, fingerprint: str, *, unread: str = "") -> None:
        """Write a safetensors file, atomically, that holds the model's fingerprint as well.

        unread is text that the model has not read yet, because its tokens depend on the text that
        follows; `unread_text` returns it. A state at path is replaced. ValueError if anything else
        is there, and then it stays.
        """
        from safetensors.torch import save

        path = Path(path)
        check_replaceable(path)
        # Copies, because safetensors refuses tensors that share memory, as rows and layers may.
        tensors = {
            name: x.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, x in (self.tensors | {"tokens": self.tokens}).items()
        }
        about = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "model": fingerprint,
            "sha256": _digest(tensors),
            **({"unread": unread} if unread else {}),
        }
        with one_line(path, "the state to "), written(path) as file:
            file.write(save(tensors, metadata=about))

    @classmethod
    def load(cls, path: str | Path, fingerprint: str) -> State:
        """Read what `save` wrote; ValueError if it is damaged or belongs to another model."""
        from safetensors import SafetensorError, safe_open

        path = Path(path)
        if not os.path.isfile(path):  # Path.is_file raises where it may not look.
            raise ValueError(f"no state file at {path}")
        try:
            with safe_open(path, framework="pt") as file:
                about = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        # Besides its own errors safetensors raises those of torch, such as one for an impossible
        # view.
        except (SafetensorError, OSError, RuntimeError, ValueError, TypeError) as error:
            found = str(error).partition("\n")[0][:200]
            raise ValueError(f"{path} is not a readable state file: {found}") from error
        ours = about.get("format") == FORMAT and about.get("format_version") == FORMAT_VERSION
        if not ours or "model" not in about or "tokens" not in tensors:
            raise ValueError(f"{path} is not a Receptance state of format {FORMAT_VERSION}")
        if about["model"] != fingerprint:
            other = about["model"][:12]
            other = other if other.isalnum() else repr(other)
            raise ValueError(
                f"{path} belongs to model {other}, not to this one ({fingerprint[:12]}); load it "
                "with the model that wrote it"
            )
        if about.get("sha256") not in (None, _digest(tensors)):
            raise ValueError(f"{path} is damaged: it does not hold what was written")
        tokens = tensors.pop("tokens")
        if tokens.dtype != torch.int64 or not all(x.is_floating_point() for x in tensors.values()):
            raise ValueError(f"{path} is damaged: its tensors are not of the types of a state")
        rows = [*tokens.shape]
        if len(rows) != 1 or any([*x.shape[1:2]] != rows for x in tensors.values()):
            raise ValueError(f"{path} is damaged: its tensors do not have the same rows")
        return cls(tensors, tokens)

    def _map(
        self, change: Callable[[Tensor], Tensor], tokens: Callable[[Tensor], Tensor] | None = None
    ) -> State:
        tensors = {name: change(x) for name, x in self.tensors.items()}
        return State(tensors, (tokens or change)(self.tokens))


def unread_text(path: str | Path) -> str:
    """The text in a state file that the state has not read; the next text continues it."""
    return _about(Path(path)).get("unread", "")


def check_replaceable(path: Path) -> None:
    """ValueError if there is something at path that is no state file."""
    if os.path.lexists(path) and _about(path).get("format") != FORMAT:
        raise ValueError(
            f"cannot write the state to {path}: what is there is not a state; choose another name"
        )


def _about(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file; a dict without entries for any other file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError):
        return {}


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """The sha256 of the names, types, shapes and values of tensors."""
    digest = hashlib.sha256()
    for name, x in sorted(tensors.items()):
        digest.update(f"{name} {x.dtype} {list(x.shape)} ".encode())
        digest.update(x.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _row_shapes(state: State) -> dict[str, list[int]]:
    return {name: [x.shape[0], *x.shape[2:]] for name, x in state.tensors.items()}
