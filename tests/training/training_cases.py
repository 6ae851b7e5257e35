"""Small trainers, and what can be compared of them."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny import TEXT, make_model
from torch import Tensor

from receptance.adapters import Adapter
from receptance.config import ModelConfig
from receptance.data.batches import Batch, Batches
from receptance.model import Model
from receptance.storage.checkpoint import write_description
from receptance.tokenizer import ByteTokenizer
from receptance.training import StepReport, Trainer, TrainOptions
from receptance.training.ranks import Ranks
from receptance.training.recomputing import Recomputing
from receptance.training.saving import Saver

TOKENS = np.frombuffer(TEXT.encode(), np.uint8).astype(np.uint16)
SIZES = ModelConfig(vocab_size=256, width=16, num_layers=2)
SMALL: dict[str, Any] = {
    "batch": 2,
    "context": 16,
    "learning_rate": 1e-2,
    "final_learning_rate": 1e-3,
}


def small(**options: Any) -> TrainOptions:
    return TrainOptions(**SMALL | options)


def make_batches(options: TrainOptions, tokens: np.ndarray = TOKENS, **more: Any) -> Batches:
    return Batches(
        tokens,
        context=options.context,
        batch=options.batch,
        seed=options.seed,
        packing=options.packing,
        **more,
    )


def make_trainer(
    options: TrainOptions, tokens: np.ndarray = TOKENS, adapter: Any = None, **more: Any
) -> Trainer:
    """adapter makes one for a model, random everywhere; more goes to Batches."""
    model = Model(SIZES, seed=options.seed) if adapter is None else make_model()
    made: Adapter | None = None if adapter is None else adapter(model).attach(model)
    return Trainer(model, make_batches(options, tokens, **more), options, adapter=made)


def run(trainer: Trainer, steps: int) -> list[StepReport]:
    """The reports of so many steps, without the times."""
    reports = [trainer.run_step() for _ in range(steps)]
    return [dataclasses.replace(report, tokens_per_second=0.0) for report in reports]


def everything(trainer: Trainer) -> dict[str, Tensor]:
    """What is trained, and the optimizer."""
    state = {
        f"{name}/{key}": x
        for name, parameter in trainer.parameters.items()
        for key, x in trainer.optimizer.state[parameter].items()
    }
    both = trainer.parameters | state
    return {name: x.detach().clone() for name, x in both.items()}


def make_saver(trainer: Trainer, folder: Path, said: list[str] | None = None) -> Saver:
    """One whose checkpoints say nothing but what the trainer says."""

    def describe(directory: Path) -> dict[str, Any]:
        if trainer.adapter is None:
            write_description(SIZES, directory, ByteTokenizer())
        return {}

    lines = [] if said is None else said
    return Saver(folder, 2, describe, trainer.ranks or Ranks(), lines.append)


def save(trainer: Trainer, folder: Path) -> Path:
    """The checkpoint of the step that the trainer has reached."""
    saver = make_saver(trainer, folder)
    saver.save(trainer)
    saver.wait()
    assert saver.saved_step == trainer.step
    return folder / f"step-{trainer.step:08d}"


def same_files(one: Path, other: Path) -> bool:
    """Whether two checkpoints are the same, byte for byte."""
    return (one / "manifest.json").read_bytes() == (other / "manifest.json").read_bytes()


def random_batch(
    rows: int = 3, time: int = 13, *, masked: bool = False, reset: bool = False
) -> Batch:
    """Tokens, targets, and perhaps a mask and resets, drawn at random."""
    generator = torch.Generator().manual_seed(rows * 100 + time)

    def draw(high: int) -> Tensor:
        return torch.randint(high, (rows, time), generator=generator)

    return Batch(
        draw(256),
        draw(256),
        draw(3) > 0 if masked else None,
        draw(6) == 0 if reset else None,
    )


class Keeping(Recomputing):
    """Recomputing, or autograd as it is, that remembers every storage kept for backward passes."""

    def __init__(self, recomputing: bool = True) -> None:
        super().__init__()
        self.recomputing, self.kept = recomputing, {}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if not self.recomputing:
            return function(*args, **(kwargs or {}))
        return super().__torch_function__(function, types, args, kwargs)

    def _pack(self, saved):
        packed = super()._pack(saved)
        tensors = [packed] if isinstance(packed, torch.Tensor) else packed[0].arguments
        for x in tensors:
            if isinstance(x, torch.Tensor):
                self.kept[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return packed

    @property
    def nbytes(self) -> int:
        """Of all of them, each once."""
        return sum(storage.nbytes() for storage in self.kept.values())
