"""receptance train: train a model on text, watch it learn, stop and resume at any time."""

from __future__ import annotations

import contextlib
import shlex
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import torch
import tyro

from receptance.apps.console import Console
from receptance.apps.estimating import corpus_tokenizer, show_estimate
from receptance.apps.labeled import resumed, stored_task, train_labeled
from receptance.apps.options import parse
from receptance.apps.training_errors import training_errors
from receptance.config import PILE_VOCAB_SIZE
from receptance.data import ReadOptions, is_corpus
from receptance.evaluation.tasks.sources import SequenceOptions
from receptance.model.devices import described, resolve_device
from receptance.progress import counted, say
from receptance.sealed import check_outside
from receptance.storage.directories import expanded, newest_checkpoint, put_aside, step_directories
from receptance.storage.lock import RunLock
from receptance.training import TrainOptions, learning_rate
from receptance.training.estimate import DEFAULT_UTILIZATION
from receptance.training.logs import check_kinds
from receptance.training.notes import check_changes, located, read_about
from receptance.training.options import StartOptions
from receptance.training.ranks import Ranks, joined
from receptance.training.recipes import apply_recipe
from receptance.training.run import Run, RunOptions
from receptance.training.start import Start, begin, check_new, resume

_TRAINED = {
    "new": "a new model",
    "all": "all parameters of a given model",
    "lora": "LoRA",
    "state": "a state",
}


@dataclass(frozen=True, kw_only=True)
class _Start(StartOptions):
    """The options of training, as the command line shows them."""

    # On the command line these options have no prefix: --steps, not --train.steps.
    read: Annotated[ReadOptions, tyro.conf.arg(name="")] = field(default_factory=ReadOptions)
    train: Annotated[TrainOptions, tyro.conf.arg(name="")] = field(default_factory=TrainOptions)

    def __post_init__(self) -> None:
        """Skip the checks, because options of a recipe or a resumed run may still be missing."""

    def checked(self) -> StartOptions:
        """The same options for the library; ValueError if some of them do not go together."""
        return StartOptions(**{f.name: getattr(self, f.name) for f in fields(self)})

    @staticmethod
    def of(options: StartOptions) -> _Start:
        """The same options for the command line."""
        return _Start(**{f.name: getattr(options, f.name) for f in fields(options)})


@dataclass(frozen=True, kw_only=True)
class Options:
    """Train a model on text, records or tokens.

    The run folder gets checkpoints (step-*), metrics.jsonl (samples included) and loss.png.
    Ctrl-C finishes the step, saves and leaves; --resume goes on from there. On several GPUs or
    machines: torchrun --nproc-per-node N -m receptance train ...
    """

    COMMON: ClassVar[str] = (
        "--out --resume --recipe --dry-run --init --tune --task --tokenizer --version --width "
        "--layers --steps --minutes --batch --context --learning-rate --device"
    )
    EXAMPLES: ClassVar[tuple[str, ...]] = (
        "receptance train my-texts/ --out runs/mine --minutes 10",
        "receptance train --resume --out runs/mine",
        "receptance train chats.jsonl --init MODEL --tune lora --out runs/chat",
        "receptance train my-texts/ --recipe rwkv7-0.1b --dry-run",
    )

    data: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[DATA ...]")] = ()
    """Text files, folders, globs, .jsonl, .parquet, hf:NAME:SPLIT; or one corpus of tokens: a
    folder made by `receptance data prepare`, .npy, .bin/.idx. Not needed with --resume."""
    out: Path = Path("runs/model")
    """The run folder."""
    task: Literal["text", "classify", "regress", "forecast"] = "text"
    """Predict text, or answer about sequences with labels: their class, a number, what follows.
    DATA is then a .jsonl with labels, a NAME_TRAIN.ts, a .csv, or a benchmark's folder or name."""
    recipe: str | None = None
    """Take options from a recipe or a TOML file; options given on the command line replace them.
    Recipes: 169m to 14b, rwkv7-0.1b to rwkv7-13.3b, one-gpu, cpu-10min, context-2048 ..."""
    resume: bool = False
    """Continue the run in --out from its newest whole checkpoint; its data, tokenizer, sizes and
    training options stay. An option that would make it another run cannot change."""
    auto_resume: bool = False
    """Continue the run in --out if there is one, otherwise begin it. Schedulers and torchrun
    --max-restarts can then repeat one command."""
    dry_run: bool = False
    """Check that the data exists, print parameters, FLOPs, memory, steps and time, and stop."""
    on: str = "this-machine"
    """With --dry-run, estimate for this device, such as h200, a100-80g or rtx-4090."""
    devices: int = 1
    """With --dry-run, estimate for this number of devices."""
    mfu: float = DEFAULT_UTILIZATION
    """With --dry-run, assume that this share of the devices' peak FLOPs is reached."""
    start: Annotated[_Start, tyro.conf.arg(name="")] = field(default_factory=_Start)
    run: Annotated[RunOptions, tyro.conf.arg(name="")] = field(default_factory=RunOptions)
    sequence: Annotated[SequenceOptions, tyro.conf.arg(name="")] = field(
        default_factory=SequenceOptions
    )


def main(argv: list[str]) -> None:
    """Parse, prepare or resume, train, report."""
    options = _parsed(argv, Options())
    if options.recipe is not None:
        options = _parsed(argv, _recipe(options.recipe, options))
    if options.dry_run:
        if options.resume:
            raise ValueError("--dry-run is about a run to be begun; leave out --resume")
        if options.task != "text":
            raise ValueError("--dry-run is about text; leave it out with --task")
        _check_estimate(options)
        show_estimate(
            options.data,
            options.start.checked(),
            device=options.on,
            devices=options.devices,
            utilization=options.mfu,
        )
        return
    _check_not_estimated(options)
    out = expanded(options.out)
    check_outside(out)
    check_kinds(options.run.log)
    if options.resume and not out.is_dir():
        raise ValueError(f"no run in {out} to resume")
    if options.task != "text" or (_goes_on(options) and stored_task(out) is not None):
        if not _labeled(out, options, argv):
            _say_how_to_go_on(out, Console())
        return
    if options.sequence != SequenceOptions():
        raise ValueError("options of labeled sequences are set; name what to learn with --task")
    _text(out, options, argv)


def _check_estimate(options: Options) -> None:
    """ValueError if a device of an estimate cannot be meant."""
    if options.devices < 1:
        raise ValueError(f"--devices is {options.devices}; it must be at least 1")
    if not 0 < options.mfu <= 1:
        raise ValueError(f"--mfu is {options.mfu}; it must be above 0 and at most 1")


def _check_not_estimated(options: Options) -> None:
    """ValueError if an option of an estimate is set."""
    for name in ("on", "devices", "mfu"):
        if getattr(options, name) != getattr(Options(), name):
            raise ValueError(f"--{name} is for an estimate; add --dry-run, or leave it out")


def _text(out: Path, options: Options, argv: list[str]) -> None:
    """Learn to predict text, in a new run or one that goes on."""
    place = _place(out, options, argv)
    device = resolve_device(place.device)
    with contextlib.ExitStack() as stack:
        stack.enter_context(training_errors())
        ranks, device = stack.enter_context(joined(device, place.context_ranks))
        console = Console(quiet=not ranks.first)
        several = f", {ranks.count} processes" if ranks.count > 1 else ""
        say(console, f"training on {described(device)}{several}")
        if ranks.first:
            stack.enter_context(RunLock(out))
        ranks.wait()
        ranks.check_shared(out)
        parts = _start(out, options, argv, ranks, device, console)
        size = parts.trainer.model.config
        layers = counted(size.num_layers, "layer")
        console.print(
            f"{size.num_parameters:,} parameters ({layers} of {size.width}, vocabulary "
            f"{size.vocab_size}), {len(parts.corpus.train):,} training tokens"
        )
        if not Run(out, options.run, parts, console).go():
            _say_how_to_go_on(out, console)


def _say_how_to_go_on(out: Path, console: Console) -> None:
    command = shlex.join(["receptance", "train", "--resume", "--out", str(out)])
    say(console, f"continue with: {command}")


def _goes_on(options: Options) -> bool:
    return options.resume or options.auto_resume


def _labeled(out: Path, options: Options, argv: list[str]) -> bool:
    """Learn labeled sequences, in a new run or one that goes on; whether it came to its end."""
    task, data = options.task, options.data
    start, sequence = options.start.checked(), options.sequence
    stored = stored_task(out) if _goes_on(options) else None
    if stored is not None:

        def parsed(
            start: StartOptions, sequence: SequenceOptions
        ) -> tuple[StartOptions, SequenceOptions]:
            given = _parsed(argv, Options(start=_Start.of(start), sequence=sequence))
            return given.start.checked(), given.sequence

        if task not in ("text", stored["task"]):
            raise ValueError(f"the run in {out} was started with --task {stored['task']}")
        task, data, start, sequence = resumed(stored, data, parsed)
    elif options.resume:
        raise ValueError(f"no run of labeled sequences in {out} to resume")
    assert task != "text"
    with training_errors():
        return train_labeled(
            out,
            task,
            data,
            start,
            sequence,
            options.run,
            before=stored,
            again=options.auto_resume,
        )


def _start(
    out: Path,
    options: Options,
    argv: list[str],
    ranks: Ranks,
    device: torch.device,
    console: Console,
) -> Start:
    """Begin a new run, or resume the one in the folder from its newest whole checkpoint."""
    begun = ranks.share(lambda: "yes" if step_directories(out) else "")
    if not (options.resume or (options.auto_resume and begun)):
        check_new(out, again=options.auto_resume)
        given = options.start.checked()
        parts = begin(out, options.data, given, ranks, console, device)
        _say_rates(given, parts, console)
        return parts
    directory = Path(ranks.share(lambda: str(_newest(out, console))))
    stored = read_about(directory).options
    parts = resume(out, directory, options.data, _resumed(argv, stored), ranks, device)
    say(console, f"resumed {directory} at step {parts.trainer.step}")
    _say_changed_rate(stored.train, parts, console)
    _say_unread(options, console)
    return parts


def _say_rates(given: StartOptions, parts: Start, console: Console) -> None:
    """Say with which learning rates a run begins, and why if nobody named one."""
    first, last = parts.trainer.options.rates
    named = given.train.learning_rate is not None
    why = "" if named else f" (the default for {_TRAINED[given.trained]})"
    say(console, f"learning rate: {first:g} at the start, {last:g} at the end{why}")


def _say_changed_rate(stored: TrainOptions, parts: Start, console: Console) -> None:
    """Say how the learning rate jumps if a resumed run has other steps or minutes."""
    trainer, given = parts.trainer, parts.trainer.options
    if (stored.steps, stored.minutes) == (given.steps, given.minutes):
        return
    before, now = (
        learning_rate(trainer.step, options, options.clock(trainer.seconds))
        for options in (stored, given)
    )
    say(
        console,
        f"the schedule changes with steps and minutes: the learning rate was {before:.3g} and "
        f"continues at {now:.3g}",
    )


def _recipe(name: str, given: Options) -> Options:
    """The options of a recipe, without its tokenizer if the model or the corpus has one."""
    recipe = apply_recipe(Options(), name)
    start = given.start
    given_sizes = (start.size, start.version, start.width, start.layers)
    if start.init is not None or given_sizes != (None,) * 4:
        recipe = replace(recipe, start=_without_size(recipe.start, start))
    if given.start.init is None and corpus_tokenizer(given.data or recipe.data) is None:
        return recipe
    return replace(recipe, start=replace(recipe.start, tokenizer=None))


def _without_size(recipe: _Start, given: _Start) -> _Start:
    """The options of a recipe without sizes that a model or a size on the command line replaces.

    If only a width or a number of layers is given, the other one is that of the recipe.
    """
    if given.init is not None or given.size is not None:
        return replace(recipe, size=None, version=None, width=None, layers=None)
    if recipe.size is None:
        return recipe
    own = recipe.sizes(PILE_VOCAB_SIZE)
    version, width, layers = own.version, own.width, own.num_layers
    return replace(recipe, size=None, version=version, width=width, layers=layers)


def _parsed(argv: list[str], default: Options) -> Options:
    return parse(Options, argv, "receptance train", default)


def _say_unread(options: Options, console: Console) -> None:
    """Say which options have no effect because a resumed run keeps its own."""
    given = {"text": options.data and not is_corpus(options.data[0]), "recipe": options.recipe}
    for what in filter(given.get, given):
        say(console, f"the {what} given is not read: the run keeps its own")


def _newest(out: Path, console: Console) -> Path:
    """The newest whole checkpoint; newer ones that are damaged are reported and renamed."""
    directory, skipped = newest_checkpoint(out)
    for reason in skipped:
        say(console, f"skipped a damaged checkpoint: {reason}", style="bold yellow")
    for path in put_aside(directory):
        say(console, f"it is kept as {path}")
    return directory


def _place(out: Path, options: Options, argv: list[str]) -> StartOptions:
    """The options that say where to train, which processes need before they are joined.

    A resumed run has its own.
    """
    going_on = (options.resume or options.auto_resume) and out.is_dir()
    for directory in reversed(step_directories(out) if going_on else []):
        try:
            stored = read_about(directory).options
        except ValueError:  # The checkpoint is damaged, which `_newest` reports later.
            continue
        return _resumed(argv, stored)
    return options.start if options.resume else options.start.checked()


def _resumed(argv: list[str], stored: StartOptions) -> StartOptions:
    """The stored options, replaced by those given; ValueError if one of them must not change."""
    # The command line is parsed again with the stored options as defaults, so that only what was
    # given can differ.
    given = located(_parsed(argv, Options(start=_Start.of(stored))).start.checked())
    check_changes(stored, given)
    return given
