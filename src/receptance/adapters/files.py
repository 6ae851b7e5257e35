"""Make adapters from options, and load the files that `Adapter.save` writes."""

from __future__ import annotations

import dataclasses
import json
import os
import reprlib
import warnings
from pathlib import Path

import torch
from torch import Tensor

from receptance.adapters.base import ABOUT, FORMAT, FORMAT_VERSION, Adapter
from receptance.adapters.lora import LoRA, LoRAOptions
from receptance.adapters.state_tuning import StateTuning, StateTuningOptions
from receptance.adapters.time_state import SUFFIXES, read_time_state
from receptance.formats.files import reason
from receptance.model import Model
from receptance.storage.directories import ABOUT as TRAINING
from receptance.storage.directories import expanded, newest_checkpoint, step_directories
from receptance.storage.opening import ADAPTER_FILE

Options = LoRAOptions | StateTuningOptions
_OPTIONS: dict[str, type[Options]] = {
    LoRA.kind: LoRAOptions,
    StateTuning.kind: StateTuningOptions,
}


def make_adapter(model: Model, options: Options, *, seed: int = 0) -> Adapter:
    """Make an adapter of the kind that the options belong to; it is not attached to the model."""
    if isinstance(options, LoRAOptions):
        return LoRA(model, options, seed=seed)
    return StateTuning(model, options, seed=seed)


def load_adapter(path: str | Path, model: Model) -> Adapter:
    """Load the adapter in a file, a directory or the newest checkpoint of a run.

    The adapter is in evaluation mode and takes effect when it is attached. A .pth file is one of
    the official files of learned states, which do not know their model. ValueError if the file is
    missing or damaged, or if the adapter was trained on another model.
    """
    path = expanded(path)
    if path.is_dir() and step_directories(path):
        path, skipped = newest_checkpoint(path)
        for reason in skipped:
            warnings.warn(f"passed over a damaged checkpoint: {reason}", stacklevel=2)
    path = path / ADAPTER_FILE if path.is_dir() else path
    if path.suffix in SUFFIXES:
        return read_time_state(path, model).eval()
    about, tensors = _read(path)
    _check_model(path, about["model"], model)
    adapter = make_adapter(model, _options(path, about, tensors))
    wanted = adapter.tensors()
    if _shapes(tensors) != _shapes(wanted):
        raise ValueError(f"{path} does not hold the tensors that its options ask for; get it again")
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(tensors[name])
    return adapter.eval()


def _shapes(tensors: dict[str, Tensor] | dict[str, torch.nn.Parameter]) -> dict[str, list[int]]:
    return {name: list(x.shape) for name, x in tensors.items()}


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise ValueError(f"no adapter at {path}; name an adapter file or its directory")
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get(ABOUT, "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    # Besides its own errors safetensors raises those of torch, such as one for an impossible view.
    except (SafetensorError, OSError, RuntimeError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is not a readable adapter file: {reason(error)}") from None
    ours = isinstance(about, dict) and about.get("format") == FORMAT
    ours = ours and all(isinstance(about.get(x), str) for x in ("kind", "options", "model"))
    if not ours or about.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"{path} is not a Receptance adapter of format {FORMAT_VERSION}")
    return about, tensors


def _check_model(path: Path, wanted: str, model: Model) -> None:
    found = model.fingerprint()
    if found != wanted:
        other = wanted[:12] if wanted[:12].isalnum() else repr(wanted[:12])
        raise ValueError(
            f"{path} was trained on model {other}{_whereabouts(path)}, and this one is "
            f"{found[:12]}; give the model that it was trained on"
        )


def _whereabouts(path: Path) -> str:
    """The path of an adapter's model, in parentheses, if the checkpoint beside it tells."""
    try:
        about = json.loads((path.parent / TRAINING).read_bytes())
        name = str(about["options"]["init"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""
    gone = os.path.isabs(name) and not os.path.exists(name)
    return f" ({name}{', which is no longer there' if gone else ''})"


def _options(path: Path, about: dict[str, str], tensors: dict[str, Tensor]) -> Options:
    """Read the options that the adapter was made with.

    ValueError if they are damaged, or ask for larger matrices than the file holds.
    """
    if about["kind"] not in _OPTIONS:
        raise ValueError(
            f"{path} is an adapter of kind {reprlib.repr(about['kind'])}; this release reads "
            f"{' and '.join(_OPTIONS)}"
        )
    try:
        fields = json.loads(about["options"])
        lists = {name: tuple(x) for name, x in fields.items() if isinstance(x, list)}
        options = _OPTIONS[about["kind"]](**fields | lists)
        _check_options(options, max((n for x in tensors.values() for n in x.shape), default=0))
    except ValueError as error:
        raise ValueError(f"{path} has damaged options: {error}") from None
    except (TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} has damaged options: {reason(error)}") from None
    return options


def _check_options(options: Options, largest: int) -> None:
    """ValueError if a field has a wrong type, or if the rank exceeds every axis in the file."""
    for field in dataclasses.fields(options):
        found, wanted = getattr(options, field.name), type(field.default)
        if not isinstance(found, wanted) and not (wanted is float and isinstance(found, int)):
            raise ValueError(f"{field.name} is a {type(found).__name__}, not a {wanted.__name__}")
        if isinstance(found, tuple) and not all(isinstance(x, str) for x in found):
            raise ValueError(f"{field.name} must hold strings only")
    if isinstance(options, LoRAOptions) and options.rank > largest:
        raise ValueError(f"rank is {reprlib.repr(options.rank)}; no tensor in the file is as wide")
