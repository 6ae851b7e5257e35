"""Making adapters from options, and reading what `Adapter.save` wrote."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import torch
from torch import Tensor

from receptance.adapters.base import ABOUT, FORMAT, FORMAT_VERSION, Adapter
from receptance.adapters.lora import LoRA, LoRAOptions
from receptance.adapters.state_tuning import StateTuning, StateTuningOptions
from receptance.directories import newest_checkpoint, step_directories
from receptance.model import Model

ADAPTER_FILE = "adapter.safetensors"
"""The name in a directory, where `load_adapter` looks for it."""

Options = LoRAOptions | StateTuningOptions
_OPTIONS: dict[str, type[Options]] = {
    LoRA.kind: LoRAOptions,
    StateTuning.kind: StateTuningOptions,
}


def make_adapter(model: Model, options: Options, *, seed: int = 0) -> Adapter:
    """A new adapter for a model, of the kind that the options are for; it changes nothing yet."""
    if isinstance(options, LoRAOptions):
        return LoRA(model, options, seed=seed)
    return StateTuning(model, options, seed=seed)


def load_adapter(path: str | Path, model: Model) -> Adapter:
    """The adapter in a file, a directory or the newest checkpoint of a run, in evaluation mode.

    ValueError if it is missing, damaged or of another model. Attach it to let it take effect.
    """
    path = Path(path).expanduser()
    if path.is_dir() and step_directories(path):
        path, skipped = newest_checkpoint(path)
        for reason in skipped:
            warnings.warn(f"passed over a damaged checkpoint: {reason}", stacklevel=2)
    path = path / ADAPTER_FILE if path.is_dir() else path
    about, tensors = _read(path)
    _check_model(path, about["model"], model)
    adapter = make_adapter(model, _options(path, about))
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
        raise ValueError(f"no adapter at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get(ABOUT, "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} is not a readable adapter file: {error}") from None
    ours = isinstance(about, dict) and about.get("format") == FORMAT
    ours = ours and {"kind", "options", "model"} <= about.keys()
    if not ours or about.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"{path} is not a Receptance adapter of format {FORMAT_VERSION}")
    return about, tensors


def _check_model(path: Path, wanted: str, model: Model) -> None:
    found = model.fingerprint()
    if found != wanted:
        raise ValueError(
            f"{path} was trained on model {wanted[:12]}, and this one is {found[:12]}; "
            "give the model that it was trained on"
        )


def _options(path: Path, about: dict[str, str]) -> Options:
    if about["kind"] not in _OPTIONS:
        raise ValueError(
            f"{path} is an adapter of kind {about['kind']!r}; this release reads "
            f"{' and '.join(_OPTIONS)}"
        )
    try:
        fields = json.loads(about["options"])
        lists = {name: tuple(x) for name, x in fields.items() if isinstance(x, list)}
        return _OPTIONS[about["kind"]](**fields | lists)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} has damaged options: {error}") from None
