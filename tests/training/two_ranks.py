"""What each of two processes does in test_distributed.py: everything, with one start of torch.

python two_ranks.py FOLDER PORT PORT: reads FOLDER/one (a checkpoint), writes FOLDER/found.json and
checkpoints of its own; then calls `receptance train` in FOLDER, meeting the other at the first
port, and at the second one once more, with a run folder that the two do not share.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from command import SMALL
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy
from training_cases import SIZES, TOKENS, make_batches, make_saver, small

from receptance import plots
from receptance.__main__ import main as command
from receptance.adapters import LoRAOptions, make_adapter
from receptance.model import Model, starting_values
from receptance.storage.checkpoint import read_tensors
from receptance.training import Trainer, sharding
from receptance.training import ranks as ranks_module
from receptance.training.ranks import Ranks, joined
from receptance.training.saving import restore
from receptance.training.sharding import build, gather, whole_model

MASK = (np.arange(len(TOKENS)) % 97 < 20).astype(np.uint8)
# Options of the trainer, and whether there is a mask; with one, counts differ between ranks.
CASES: dict[str, tuple[dict[str, Any], bool]] = {
    "plain": ({}, False),
    "odd batch": ({"batch": 3}, False),
    "odd micro-batches": ({"batch": 3, "micro_batch": 1}, False),
    "everything": (
        {"batch": 5, "micro_batch": 2, "chunk": 7, "recompute": True, "z_loss": 1e-3},
        True,
    ),
    "truncated": ({"chunk": 8, "carry": "state"}, True),
    "reset": ({"packing": "reset"}, False),
}
STEPS = 3
# What shares do on GPUs: here torch does it with the processor alone.
NARROW = {"dtype": "bfloat16"}


def make(mode: str, case: str, base: Ranks, **more: Any) -> Trainer:
    """A trainer of one process, or its part of one."""
    options, masked = CASES[case]
    trained = small(**{"batch": 4} | options | more)
    ranks = Ranks(base.rank, base.count, 2) if mode == "context" else base
    parallel = {"fsdp": "fsdp", "lora": "none"}.get(mode, "ddp")
    values = starting_values(SIZES)
    objective = build(SIZES, values, trained, ranks=ranks, parallel=parallel)
    model = whole_model(objective)
    adapter = make_adapter(model, LoRAOptions(rank=2)).attach(model) if mode == "lora" else None
    batches = make_batches(trained, mask=MASK if masked else None, end_of_text=10)
    seen = batches.at
    trainer = Trainer(model, batches, trained, objective=objective, adapter=adapter, ranks=ranks)
    assert trainer.batches.at == seen
    return trainer


def figures(trainer: Trainer) -> list[list[float]]:
    """Loss and gradient's norm of some steps, and a validation."""
    reports = [trainer.run_step() for _ in range(STEPS)]
    found = [[report.loss, report.gradient_norm] for report in reports]
    return [*found, [trainer.validate(TOKENS[:2100])]]


def whole(trainer: Trainer) -> dict[str, torch.Tensor]:
    """All parameters and the optimizer's state, gathered."""
    states = {
        f"{name}/{key}": x
        for name, parameter in trainer.parameters.items()
        for key, x in trainer.optimizer.state[parameter].items()
    }
    return {name: gather(x).clone() for name, x in (trainer.parameters | states).items()}


def agree(trainer: Trainer, directory: Path) -> bool:
    """Whether a trainer holds just what a checkpoint says."""
    wanted = read_tensors(directory, "model") | read_tensors(directory, "optimizer")
    found = whole(trainer)
    return found.keys() == wanted.keys() and all(torch.equal(found[n], wanted[n]) for n in wanted)


def share(trainer: Trainer) -> float:
    """The part of the parameters that this process holds."""
    held = [p.to_local() if hasattr(p, "to_local") else p for p in trainer.parameters.values()]
    return sum(p.numel() for p in held) / sum(p.numel() for p in Model(SIZES).parameters())


def main(folder: Path) -> None:
    """Everything; the first process tells."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    with joined("cpu") as (ranks, _):
        for mode in ("ddp", "fsdp", "context"):
            for case in CASES:
                trainer = make(mode, case, ranks)
                found[f"{mode}, {case}"] = figures(trainer)
            found[f"{mode} as written"] = agree(trainer, written(trainer, folder / mode))
            found[f"{mode} share"] = share(trainer)
        found["lora, plain"] = figures(make("lora", "plain", ranks))
        found["as on GPUs"] = as_on_gpus(folder, ranks)
        for source in ("one", "ddp", "fsdp", "context"):
            directory = folder / source / f"step-{STEPS:08d}"
            for mode in ("ddp", "fsdp"):
                trainer = make(mode, "reset", ranks)
                restore(trainer, directory)
                found[f"{source} read by {mode}"] = agree(trainer, directory)
                found[f"{source} continued by {mode}"] = figures(trainer)
        try:
            make_too_small(ranks)
        except ValueError as error:
            found["too small"] = str(error)
        if ranks.first:
            (folder / "found.json").write_text(json.dumps(found))
        dist.barrier()


def as_on_gpus(folder: Path, ranks: Ranks) -> dict[str, Any]:
    """Shares whose matrices travel in bfloat16, and that are kept apart from where they work."""

    def narrow(*, param_dtype: None, **more: Any) -> MixedPrecisionPolicy:
        return MixedPrecisionPolicy(param_dtype=torch.bfloat16, **more)

    def apart() -> CPUOffloadPolicy:
        return CPUOffloadPolicy(pin_memory=False)

    found: dict[str, Any] = {}
    with mock.patch.multiple(sharding, MixedPrecisionPolicy=narrow, OffloadPolicy=apart):
        for case in ("plain", "everything"):
            trainer = make("fsdp", case, ranks, **NARROW)
            found[case] = figures(trainer)
        mixing = trainer.model.blocks[0].att
        mixing.register_forward_pre_hook(lambda *_: found.update(vector=seen(mixing.time_decay)))
        mixing.key.register_forward_pre_hook(
            lambda *_: found.update(matrix=seen(mixing.key.weight))
        )
        found["saved"] = agree(trainer, written(trainer, folder / "narrow"))
        found["further"] = figures(trainer)
        once = make("fsdp", "plain", ranks, **NARROW, clip=0.0)
        figures(once)
        gradient = gather(once.parameters["blocks.0.ffn.value.weight"].grad)
        found["rounded"] = torch.equal(gradient, gradient.bfloat16().float())
        again = make("fsdp", "everything", ranks, **NARROW)
        restore(again, folder / "narrow" / f"step-{STEPS:08d}")
        found["again"] = figures(again)
        found["kept"] = sorted({str(x.dtype) for x in whole(again).values()})
    return found


def seen(parameter: torch.Tensor) -> str:
    """Its type, while it is used."""
    return str(parameter.dtype)


def written(trainer: Trainer, folder: Path) -> Path:
    """Its checkpoint."""
    saver = make_saver(trainer, folder)
    saver.save(trainer)
    saver.wait()
    return folder / f"step-{trainer.step:08d}"


def make_too_small(ranks: Ranks) -> None:
    """One row for two processes."""
    options = small(batch=1)
    Trainer(Model(SIZES), make_batches(options), options, ranks=ranks)


# With a checkpoint after every 20 steps.
COMMAND = f"train text.txt {SMALL} --batch 4 --steps 80 --reports 4 --auto-resume"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    os.chdir(sys.argv[1])
    os.environ["MASTER_PORT"] = sys.argv[2]
    plots.draw_losses = lambda metrics, picture: None  # type: ignore[assignment]
    code = command([*COMMAND.split(), "--out", "undisturbed"])
    os.environ["MASTER_PORT"] = sys.argv[3]
    with mock.patch.object(ranks_module, "_VISIBLE_SECONDS", 1.0):
        apart = command([*COMMAND.split(), "--out", f"of-{os.environ['RANK']}-alone"])
    sys.exit(code or (0 if apart == 2 else 1))
