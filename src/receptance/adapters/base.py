"""What every adapter is: a few parameters that change what a frozen model does."""

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
    """Its parameters are the only ones that train: plain, float32, on the model's device.

    The model's own parameters keep their names and values. Whatever the kind, use it so:

        with adapter.attach(model):
            logits, state = model(tokens, adapter.initial_state(len(tokens)))
    """

    kind: ClassVar[str]

    def __init__(self, options: DataclassInstance) -> None:
        super().__init__()
        self.options = options
        self._hooks: list[RemovableHandle] = []
        self._frozen: list[nn.Parameter] | None = None

    def attach(self, model: Model) -> Self:
        """Take effect on a model and freeze it, until `detach` or the end of a `with` block.

        A compiled model has to be called after this for the first time: it would not notice.
        """
        if self._frozen is not None:
            raise ValueError("this adapter is attached to a model already; detach it first")
        self.check_fits(model)
        self._hooks = self.hooks(model)
        self._frozen = [x for x in model.parameters() if x.requires_grad]
        for parameter in self._frozen:
            parameter.requires_grad_(False)
        return self

    def detach(self) -> None:
        """Leave the model as it was before `attach`."""
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
        """ValueError if the model has not the sizes that this adapter was made for."""

    @abstractmethod
    def tensors(self) -> dict[str, nn.Parameter]:
        """The parameters under the names that files give them."""

    def hooks(self, model: Model) -> list[RemovableHandle]:
        """Hooks on the model's modules, for an adapter that works inside of it."""
        return []

    def initial_state(self, batch: int = 1, dtype: torch.dtype = torch.float32) -> State | None:
        """The state in which rows begin, with gradients; None if they begin empty."""
        return None

    def merge(self, model: Model, dtype: torch.dtype | None = None) -> Model:
        """A new model that does alone what this one does with the adapter, in dtype if given."""
        raise ValueError(
            f"an adapter of kind {self.kind!r} is no part of the weights and cannot be merged; "
            "use it as it is, beside the model"
        )

    def fingerprint(self, model_fingerprint: str) -> str:
        """sha256 of a model together with this adapter: whose the states are that both make."""
        digest = hashlib.sha256(model_fingerprint.encode())
        digest.update(json.dumps(asdict(self.options), sort_keys=True).encode())
        for name, tensor in sorted(self.tensors().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def metadata(self, model_fingerprint: str) -> dict[str, str]:
        """What a file with its tensors has to say about itself.

        One word: safetensors writes several in any order, and equal adapters are to be equal files.
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
