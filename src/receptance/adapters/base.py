"""`Adapter`, the base of all adapters: a few parameters that change what a frozen model does."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from receptance.atomic import check_replaceable, written
from receptance.errors import one_line
from receptance.model import Model
from receptance.state import State

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

FORMAT = "receptance-adapter"
FORMAT_VERSION = "1"
ABOUT = "about"


class Adapter(nn.Module, ABC):
    """A few float32 parameters, on the device of a frozen model, that are trained in its place.

    The model's own parameters keep their names and values. Every kind of adapter is used so:

        with adapter.attach(model):
            logits, state = model(tokens, adapter.initial_state(len(tokens)))
    """

    kind: ClassVar[str]

    def __init__(self, options: DataclassInstance) -> None:
        super().__init__()
        self.options = options
        self._hooks: list[RemovableHandle] = []
        self._frozen: list[nn.Parameter] | None = None

    @property
    def attached(self) -> bool:
        """Whether the adapter takes effect on a model."""
        return self._frozen is not None

    def attach(self, model: Model) -> Self:
        """Take effect on a model and freeze it, until `detach` or the end of a `with` block.

        A compiled model must not have been called before: its compiled code would ignore the
        adapter.
        """
        if self.attached:
            raise ValueError("this adapter is attached to a model already; detach it first")
        self.check_fits(model)
        self._hooks = self.hooks(model)
        self._frozen = [x for x in model.parameters() if x.requires_grad]
        for parameter in self._frozen:
            parameter.requires_grad_(False)
        return self

    def detach(self) -> None:
        """Give the model back the hooks and the trainable parameters it had before `attach`."""
        for hook in self._hooks:
            hook.remove()
        for parameter in self._frozen or []:
            parameter.requires_grad_(True)
        self._hooks, self._frozen = [], None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    @abstractmethod
    def check_fits(self, model: Model) -> None:
        """ValueError if the model does not have the sizes that this adapter was made for."""

    @abstractmethod
    def tensors(self) -> dict[str, nn.Parameter]:
        """The parameters, under the names that they have in a file."""

    def hooks(self, model: Model) -> list[RemovableHandle]:
        """Register hooks on the model's modules, for an adapter that changes what they compute."""
        return []

    def initial_state(self, batch: int = 1, dtype: torch.dtype = torch.float32) -> State | None:
        """The state in which rows begin, with its gradients; None if rows begin empty."""
        return None

    def changed(self) -> set[str]:
        """The names of the model's tensors that `merge` changes."""
        return set()

    def merge(self, model: Model, dtype: torch.dtype | None = None) -> Model:
        """Make a model, in dtype if given, that computes what model and adapter do together."""
        raise ValueError(
            f"an adapter of kind {self.kind!r} is no part of the weights and cannot be merged; "
            "load it beside the model"
        )

    def fingerprint(self, model_fingerprint: str) -> str:
        """The sha256 of a model and this adapter, which identifies the states that both make."""
        digest = hashlib.sha256(model_fingerprint.encode())
        digest.update(json.dumps(asdict(self.options), sort_keys=True).encode())
        for name, tensor in sorted(self.tensors().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def metadata(self, model_fingerprint: str) -> dict[str, str]:
        """The metadata of a file that holds this adapter's tensors.

        All of it is one string, because safetensors writes several in random order, and equal
        adapters should give equal files.
        """
        about = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "kind": self.kind,
            "options": json.dumps(asdict(self.options)),
            "model": model_fingerprint,
        }
        return {ABOUT: json.dumps(about)}

    def save(self, path: str | Path, model_fingerprint: str) -> None:
        """Write a safetensors file that knows its model (`Model.fingerprint()`), atomically.

        An earlier adapter is replaced. ValueError if anything else is at path: it stays as it is.
        """
        from safetensors.torch import save

        path = Path(path)
        check_replaceable(path, "the adapter", "an adapter", _is_adapter)
        tensors = {name: x.detach().cpu().contiguous() for name, x in self.tensors().items()}
        with one_line(path, "the adapter to "), written(path) as file:
            file.write(save(tensors, metadata=self.metadata(model_fingerprint)))


def _is_adapter(path: Path) -> bool:
    """Whether the file says that it is an adapter, of whatever kind and format version."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get(ABOUT, "{}"))
    except (SafetensorError, OSError, ValueError, RecursionError):
        return False
    return isinstance(about, dict) and about.get("format") == FORMAT
