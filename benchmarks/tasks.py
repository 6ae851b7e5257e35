"""Recall, state tracking, Long Range Arena and series: RWKV against a Transformer of its budget.

    python benchmarks/tasks.py mqar --settings pairs=4 pairs=8,length=128 --out results/mqar
    python benchmarks/tasks.py listops --settings train=20000,max_length=600 --out results/listops
    python benchmarks/tasks.py images --source fashion-mnist/ --out results/images

Each architecture is trained with every learning rate, and tested with the one that validates best.
What has been run is kept in --out, which gets result.json and pictures at the end; the same command
goes on after Ctrl-C. Before anything is trained, the tasks are drawn and their splits compared.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.console import Console

from receptance.evaluation.tasks.base import draw
from receptance.evaluation.tasks.comparing import TaskOptions, run_task
from receptance.evaluation.tasks.registry import DRAWN, make_task
from receptance.ops.threads import usable_threads
from receptance.training import TrainOptions

_COMPARED = 256  # questions of each split that are compared


def check_splits(options: TaskOptions) -> None:
    """RuntimeError if a question of the test can be drawn for training."""
    for setting in options.settings if options.task in DRAWN else ():
        task = make_task(options.task, setting, options.source)
        found = [
            {row.tobytes() for row in draw(task, split, _COMPARED, (0,)).question}
            for split in ("train", "test")
        ]
        if found[0] & found[1]:
            raise RuntimeError(f"{options.task} {setting}: a question is in both parts")


def main() -> None:
    """Parse, check, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("task")
    add("--out", type=Path, required=True)
    add("--settings", nargs="+", default=[""])
    add("--source")
    add("--columns", nargs="+", default=[])
    add("--models", nargs="+", default=["rwkv4", "transformer"])
    add("--widths", nargs="+", type=int, default=[64])
    add("--layers", type=int, default=2)
    add("--pooling", default="mean")
    add("--bidirectional", action="store_true")
    add("--rates", nargs="+", type=float, default=[1e-3, 3e-3])
    add("--seeds", type=int, default=1)
    add("--beyond", nargs="+", type=int, default=[1, 2, 4])
    add("--held-out", type=int, default=1000)
    add("--steps", type=int, default=2000)
    add("--batch", type=int, default=64)
    add("--warmup", type=int, default=0)
    add("--weight-decay", type=float, default=0.0)
    add("--dropout", type=float, default=0.0)
    add("--device", default="cpu")
    add("--threads", type=int, default=usable_threads())
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    options = TaskOptions(
        task=given.task,
        settings=tuple(given.settings),
        source=given.source,
        columns=tuple(given.columns),
        models=tuple(given.models),
        widths=tuple(given.widths),
        layers=given.layers,
        pooling=given.pooling,
        bidirectional=given.bidirectional,
        learning_rates=tuple(given.rates),
        seeds=given.seeds,
        beyond=tuple(given.beyond),
        held_out=given.held_out,
        device=given.device,
        train=TrainOptions(
            steps=given.steps,
            batch=given.batch,
            warmup_steps=given.warmup,
            weight_decay=given.weight_decay,
            dropout=given.dropout,
            betas=(0.9, 0.999),
        ),
    )
    check_splits(options)
    given.out.mkdir(parents=True, exist_ok=True)
    found = run_task(options, given.out, Console())
    for figure in found.figures:
        where = {name: figure.about[name] for name in ("pairs", "length") if name in figure.about}
        low, high = figure.low, figure.high
        interval = "" if low is None or high is None else f"({low:.3f} to {high:.3f})"
        print(f"{figure.model or '':28} {figure.name} {figure.value:.4f} {interval} {where or ''}")


if __name__ == "__main__":
    main()
