"""The official files of learned states: the matrices of every layer, and nothing else.

BlinkDL's tools and others read them beside a model; a file does not say which model it belongs to.
"""

from __future__ import annotations

from pathlib import Path

import torch

from receptance.adapters.state_tuning import StateTuning, StateTuningOptions
from receptance.atomic import written
from receptance.errors import one_line
from receptance.formats.names import TIME_STATE, some
from receptance.formats.pth import read_pth, write_pth
from receptance.model import Model

SUFFIXES = (".pth", ".pt")
"""The endings of such files."""


def read_time_state(path: Path, model: Model) -> StateTuning:
    """The adapter whose learned state is in a file; ValueError if it does not fit the model."""
    adapter = StateTuning(model, StateTuningOptions())
    parameter = adapter.tensors()[_field(path, model)]
    names = [TIME_STATE.format(layer) for layer in range(len(parameter))]
    found = read_pth(path)
    if found.keys() != set(names):
        raise ValueError(
            f"{path} has the tensors {some(found)}; a learned state of this model has {some(names)}"
        )
    with torch.no_grad():
        for target, name in zip(parameter, names, strict=True):
            if found[name].shape != target.shape:
                raise ValueError(
                    f"{path}: {name} is {list(found[name].shape)}; this model wants "
                    f"{list(target.shape)}"
                )
            target.copy_(found[name])
    return adapter


def write_time_state(path: Path, adapter: StateTuning, model: Model) -> None:
    """Write the learned state of a model in float32; ValueError if its version has no such files.

    The path must not exist.
    """
    parameter = adapter.tensors()[_field(path, model)].detach().cpu()
    tensors = {TIME_STATE.format(layer): x.contiguous() for layer, x in enumerate(parameter)}
    layout = {name: (torch.float32, tuple(x.shape)) for name, x in tensors.items()}
    with one_line(path, "the state to "), written(path) as file:
        write_pth(file, layout, tensors)


def _field(path: Path, model: Model) -> str:
    field = model.config.architecture.time_state
    if field is None:
        raise ValueError(
            f"{path}: there are no .pth files of learned states for RWKV-{model.config.version}; "
            "take the directory or the .safetensors file of the adapter"
        )
    return field
