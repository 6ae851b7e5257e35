"""receptance train with --task classify, regress or forecast: sequences with answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch

from receptance.apps.console import Console
from receptance.config import ModelConfig
from receptance.evaluation.results import Figure, Result, Source, Subject
from receptance.evaluation.tasks.runs import interval_of
from receptance.evaluation.tasks.sources import Labeled, Learned, SequenceOptions, open_labeled
from receptance.model.devices import described, resolve_device
from receptance.model.heads import SequenceConfig
from receptance.model.sequences import SequenceModel
from receptance.progress import counted, say
from receptance.storage.directories import step_directories
from receptance.storage.lock import RunLock
from receptance.storage.sequences import write_sequence_description
from receptance.training.labeled import LabeledTrainer
from receptance.training.labeled_run import LabeledRun, LabeledStart, labeled_notes
from receptance.training.notes import absolute, check_changes, restored_options
from receptance.training.options import StartOptions
from receptance.training.run import RunOptions
from receptance.training.start import check_new

RESULT = "result.json"
# The options of StartOptions and RunOptions that labeled sequences have as well.
_START = ("size", "width", "layers", "device", "train")


def stored_task(out: Path) -> dict[str, Any] | None:
    """What the newest checkpoint in a folder says, if its run learned labeled sequences."""
    for directory in reversed(step_directories(out) if out.is_dir() else []):
        try:
            return labeled_notes(directory)
        except ValueError:  # It is damaged, which is reported when the run goes on.
            continue
    return None


def train_labeled(
    out: Path,
    task: Learned,
    data: tuple[str, ...],
    start: StartOptions,
    sequence: SequenceOptions,
    run: RunOptions,
    *,
    before: dict[str, Any] | None,
    again: bool,
) -> bool:
    """Train in a folder, test, and write result.json there; whether the run came to its end.

    before is what the run says that goes on, None for a new one; again tells whether metrics of a
    run that saved nothing may be removed. ValueError says what cannot be done.
    """
    _check(start, run)
    if len(data) != 1:
        raise ValueError(f"{len(data)} sources; labeled sequences come from one")
    console = Console()
    device = resolve_device(start.device)
    say(console, f"training on {described(device)}")
    start = replace(start, train=start.train.with_rates("new"))
    labeled = open_labeled(data[0], task, sequence, start.train.seed)
    about = json.loads(json.dumps(dict(labeled.examples.about)))  # as a checkpoint has it
    if before is not None and before["examples"] != about:
        raise ValueError(f"{data[0]} does not hold what the run was started with; restore that")
    with RunLock(out):
        if before is None:
            check_new(out, again=again)
        sizes = _sizes(labeled, start, sequence)
        train = start.train
        model = SequenceModel(sizes, seed=train.seed, embedding_bound=train.rates[0]).to(device)
        trainer = LabeledTrainer(model, labeled.examples, train)

        def describe(folder: Path) -> None:
            write_sequence_description(sizes, folder, _meaning(task, labeled))

        notes = {
            "task": task,
            "sequence": asdict(sequence),
            "source": absolute(data[0]),
            "examples": about,
        }
        begun = LabeledRun(out, run, LabeledStart(trainer, start, describe, notes), console)
        begun = begun.restored()
        _say_sizes(model, labeled, console)
        if trainer.step:
            say(console, f"resumed at step {trainer.step}")
        if not begun.go():
            return False
        _test(out, task, trainer, labeled, start, console)
    return True


def resumed(
    stored: dict[str, Any],
    data: tuple[str, ...],
    parsed: Callable[[StartOptions, SequenceOptions], tuple[StartOptions, SequenceOptions]],
) -> tuple[Learned, tuple[str, ...], StartOptions, SequenceOptions]:
    """Task, source and options of a run that goes on, with those that were given anew.

    parsed reads the command line with the stored options as defaults. ValueError if an option is
    changed that would make it another run.
    """
    before = restored_options(StartOptions(), stored["options"])
    sequence = restored_options(SequenceOptions(), stored["sequence"])
    given, now = parsed(before, sequence)
    check_changes(before, given)
    if now != sequence:
        raise ValueError("a resumed run keeps how it reads its sequences; leave these options out")
    source = stored["source"]
    if data and absolute(data[0]) != source:
        say(Console(), f"the data given is not read: the run keeps its own, {source}")
    return stored["task"], (source,), given, sequence


def _check(start: StartOptions, run: RunOptions) -> None:
    """ValueError if an option is set that has no effect on labeled sequences."""
    plain = StartOptions()
    for option in fields(StartOptions):
        name = option.name
        if name not in _START and getattr(start, name) != getattr(plain, name):
            why = f"{name} is about text"
            if name == "version":
                why = "sequences with labels are learned by RWKV-4 alone, so version has no effect"
            raise ValueError(f"{why}; leave it out when sequences have labels")
    if run.sample_prompt:
        raise ValueError("sample_prompt is about text; leave it out when sequences have labels")
    if torch.distributed.is_torchelastic_launched():
        raise ValueError("labeled sequences are trained on by one process; leave torchrun out")


def _sizes(labeled: Labeled, start: StartOptions, sequence: SequenceOptions) -> SequenceConfig:
    problem = labeled.examples.problem
    stack: ModelConfig = start.sizes(problem.vocab_size)
    return SequenceConfig(
        stack=stack,
        outputs=problem.outputs,
        channels=problem.channels,
        pooling="every" if problem.every else labeled.pooling,
        bidirectional=sequence.bidirectional,
        pairs=problem.pairs,
    )


def _meaning(task: Learned, labeled: Labeled) -> dict[str, Any]:
    """What the answers of the model mean, for those who load it."""
    found: dict[str, Any] = {
        "task": task,
        "names": labeled.classes,
        "data": dict(labeled.examples.about),
    }
    for name in ("mean", "deviation"):  # how a series was scaled
        if (values := getattr(labeled.examples, name, None)) is not None:
            found[name] = [float(x) for x in values]
    return found


def _say_sizes(model: SequenceModel, labeled: Labeled, console: Console) -> None:
    stack, examples = model.config.stack, labeled.examples
    console.print(
        f"{model.num_parameters:,} parameters "
        f"({counted(stack.num_layers, 'layer')} of {stack.width}, "
        f"{model.config.outputs} outputs), {examples.count('train'):,} examples to train on, "
        f"{examples.count('validation'):,} for validation, {examples.count('test'):,} for the test"
    )


def _test(
    out: Path,
    task: Learned,
    trainer: LabeledTrainer,
    labeled: Labeled,
    start: StartOptions,
    console: Console,
) -> None:
    """Answer the test part, say how well, and write the result."""
    examples, problem = labeled.examples, labeled.examples.problem
    found = trainer.score("test")
    low, high, interval = interval_of(found, problem.kind)
    name = "accuracy" if problem.kind == "classify" else "mean squared error"
    say(console, f"test: {name} {found.mean:.4f} ({low:.4f} to {high:.4f}, {interval})")
    about: dict[str, Any] = {"part": "test", "loss": found.loss}
    if found.absolute is not None:
        about["mean absolute error"] = found.absolute
    figure = Figure(
        name=name,
        value=found.mean,
        model=out.name,
        low=low,
        high=high,
        interval=interval,
        about=about,
    )
    notes = [] if examples.chance is None else [f"Guessing gives {examples.chance:.4g}."]
    data = dict(examples.about)
    result = Result(
        kind="task",
        what=f"{task}: a model trained on {data.get('task', 'labeled sequences')}",
        models=[Subject(name=out.name, about={"parameters": trainer.model.num_parameters})],
        data=[Source(name=str(data.get("task")), digest=data.get("sha256"), about=data)],
        figures=[figure],
        options=asdict(start.train),
        seed=start.train.seed,
        seconds=trainer.seconds,
        notes=notes,
    )
    result.save(out / RESULT)
    say(console, f"result: {out / RESULT}")
