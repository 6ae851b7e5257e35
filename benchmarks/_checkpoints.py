"""Checkpoints whose every number is known, for benchmarks that do them harm."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

import torch

from receptance.config import ModelConfig
from receptance.model import Model
from receptance.storage import checkpoint
from receptance.storage.directories import prune, write_directory
from receptance.storage.manifest import verify
from receptance.tokenizer import ByteTokenizer

_SIZES = ModelConfig(vocab_size=256, width=32, num_layers=2)


def tensors(step: int) -> dict[str, torch.Tensor]:
    """What the model holds after that step: numbers drawn from it."""
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(shape, generator=generator) for name, shape in _shapes().items()}


@functools.cache
def _shapes() -> dict[str, torch.Size]:
    """Names and shapes of the model's tensors."""
    return {name: x.shape for name, x in Model(_SIZES).state_dict().items()}


def write(partial: Path, step: int) -> None:
    """Everything that a training run puts into a checkpoint."""
    checkpoint.write_description(_SIZES, partial, ByteTokenizer())
    checkpoint.write_tensors(tensors(step), partial, "model")
    checkpoint.write_tensors(tensors(-step), partial, "optimizer")
    (partial / "training.json").write_text(json.dumps({"step": step}))


def save(path: Path, step: int) -> None:
    """A checkpoint at path."""
    write_directory(path, lambda partial: write(partial, step))


def save_step(run: Path, step: int) -> None:
    """A checkpoint of a run, and one fewer of the old ones."""
    save(run / f"step-{step:08d}", step)
    prune(run / f"step-{step:08d}", keep=2)


def step_of(directory: Path) -> int:
    """The step of a checkpoint that is whole and holds exactly what was saved at that step."""
    verify(directory)
    step = int(json.loads((directory / "training.json").read_text())["step"])
    model, _ = checkpoint.load(directory)
    for found, wanted in (
        (model.state_dict(), tensors(step)),
        (checkpoint.read_tensors(directory, "optimizer"), tensors(-step)),
    ):
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted), directory
    return step


def refusal(call: Callable[[], object]) -> str:
    """The line with which a call refuses; nothing if it does not."""
    try:
        call()
    except ValueError as error:
        return str(error)
    return ""
