"""How a run begins, or goes on from a checkpoint: its corpus, its model and its trainer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from receptance.adapters import Adapter, StateTuningOptions, load_adapter, make_adapter
from receptance.config import ModelConfig
from receptance.data import Batches, PrepareOptions, ReadOptions, TokenFiles, is_corpus, prepare
from receptance.model import Model, starting_values
from receptance.model.devices import resolve_device
from receptance.progress import say
from receptance.storage import checkpoint
from receptance.storage.directories import (
    expanded,
    is_step,
    newest_checkpoint,
    pin,
    step_directories,
)
from receptance.storage.opening import is_run, look
from receptance.storage.pairing import check_tokenizer, no_tokenizer
from receptance.tokenizer import Tokenizer
from receptance.training.logs import METRICS
from receptance.training.notes import located, read_about
from receptance.training.options import StartOptions
from receptance.training.ranks import Ranks
from receptance.training.saving import restore
from receptance.training.sharding import build, whole_model
from receptance.training.trainer import Trainer

# The tokenizer of a new model if none is named.
NEW_TOKENIZER = "bpe:2048"


@dataclass(frozen=True)
class Start:
    """What a run is made of."""

    trainer: Trainer
    tokenizer: Tokenizer
    corpus: TokenFiles
    options: StartOptions


# ---- a new run ----------------------------------------------------------------------------------


def begin(
    out: Path,
    data: Sequence[str],
    options: StartOptions,
    ranks: Ranks,
    console: Console,
    device: torch.device | None = None,
) -> Start:
    """Read and tokenize the text, make a new model or take the given one.

    device is where to train if that is not simply what the options name.
    """
    if not data:
        raise ValueError("no data; name a text file, a folder or a glob, or resume a run")
    ranks.check_rows(options.train.batch)  # before any text is read
    given: Iterable[tuple[str, Tensor]] | None = None
    options = located(options)
    options = replace(options, train=options.train.with_rates(options.trained))
    tokenizer = options.named_tokenizer()
    if options.init is not None:
        init = base = options.init
        if options.tune != "all":
            base = ranks.share(lambda: _newest(init))
        sizes, tensors, tokenizer = checkpoint.read_model(base, tokenizer=tokenizer)
        if tokenizer is None and not (len(data) == 1 and is_corpus(data[0])):
            raise no_tokenizer(sizes, base)
        options.check_sizes(sizes)
        if options.tune != "all":
            adapter_size(sizes, options)  # refuses targets that do not exist
            options = replace(options, init=base)
            _keep(Path(base), out, ranks, console)
        given = tensors.items()
    else:
        options.sizes(1)  # refuses now what would be refused after the text has been tokenized
    with ranks.first_alone():  # the other processes find the corpus made
        corpus = _corpus(out, data, options, tokenizer, console)
    tokenizer = tokenizer or corpus.tokenizer
    assert tokenizer is not None
    if given is None:
        sizes = options.sizes(tokenizer.vocab_size)
        seed, bound = options.train.seed, options.train.rates[0]
        given = starting_values(sizes, seed=seed, embedding_bound=bound)
    trainer = _trainer(sizes, given, corpus, tokenizer, options, ranks, device)
    return Start(trainer, tokenizer, corpus, options)


def _keep(base: Path, out: Path, ranks: Ranks, console: Console) -> None:
    """Mark the checkpoint that an adapter is trained on, which its run keeps from now on.

    Otherwise the run would remove that checkpoint as it goes on, and no model would fit the adapter
    any more.
    """
    if not (is_step(base) and base.is_dir()):
        return
    if ranks.first:
        try:
            pin(base, f"needed by the adapter in {out.resolve()}")
        except OSError as error:
            say(
                console,
                f"{base} may be removed when its run goes on, and the adapter needs it: copy it "
                f"elsewhere ({error.strerror})",
                style="bold yellow",
            )
        else:
            say(console, f"the adapter is trained on {base}, which its run keeps from now on")


def _newest(init: str) -> str:
    """The newest whole checkpoint of a run's folder, any other name as it is."""
    path = expanded(init)
    return str(newest_checkpoint(path, optimizer=False)[0]) if is_run(path) else init


def check_new(out: Path, *, again: bool) -> None:
    """ValueError if a run is in the folder.

    With again, the metrics of a run that never saved anything are removed instead.
    """
    if out.is_dir() and step_directories(out):
        raise ValueError(f"{out} already holds a run; resume it, or choose another folder")
    if not (out / METRICS).exists():
        return
    if not again:
        raise ValueError(
            f"{out} holds a run without a checkpoint; delete it or choose another folder"
        )
    (out / METRICS).unlink(missing_ok=True)  # another process may have removed it already


def _corpus(
    out: Path,
    data: Sequence[str],
    options: StartOptions,
    tokenizer: Tokenizer | None,
    console: Console,
) -> TokenFiles:
    """The corpus that data names, or one made in the run folder of the text that data names."""
    if len(data) == 1 and is_corpus(data[0]):
        if options.read != ReadOptions() or options.exclude:
            raise ValueError(
                f"{data[0]} holds tokens already: text_field, template, skip_bad and exclude are "
                "about text, so leave them out"
            )
        end = tokenizer.end_of_text if tokenizer else 0
        corpus = TokenFiles.open(data[0], validation=options.validation, end_of_text=end)
        if tokenizer is None and corpus.tokenizer is None:
            raise ValueError(f"{data[0]} does not say which tokenizer made it; name that tokenizer")
        if tokenizer is None and options.tokenizer is not None:
            raise ValueError(
                f"{data[0]} has its own tokenizer; leave the tokenizer {options.tokenizer} out"
            )
        return corpus
    how = PrepareOptions(
        **asdict(options.read),
        validation=options.validation,
        exclude=options.exclude,
        seed=options.train.seed,
    )
    made = options.tokenizer or NEW_TOKENIZER
    return prepare(data, out / "data", tokenizer or made, how, console)


# ---- a run that goes on -------------------------------------------------------------------------


def resume(
    out: Path,
    directory: Path,
    data: Sequence[str],
    options: StartOptions,
    ranks: Ranks,
    device: torch.device | None = None,
) -> Start:
    """The run as a whole checkpoint has it.

    data may name a corpus of tokens, if that is elsewhere now; device is as for `begin`.
    ValueError if the options end the run before the step that it has reached.
    """
    about = read_about(directory)
    # A command that is repeated names its text again; the tokens of it are in the run's folder.
    path = Path(data[0]) if data and is_corpus(data[0]) else about.corpus
    corpus = TokenFiles.open(path, validation=options.validation, end_of_text=about.end_of_text)
    if corpus.fingerprint != about.fingerprint:
        raise ValueError(f"{path} is not the corpus that the run began with; give the path to that")
    if options.tune == "all":
        sizes, tokenizer = checkpoint.read_description(look(directory, verified=True))
        tensors = checkpoint.read_tensors(directory, "model")
    else:
        options = replace(options, init=_same_base(about.options, options))
        assert options.init is not None
        named = options.named_tokenizer()
        sizes, tensors, tokenizer = checkpoint.read_model(options.init, tokenizer=named)
    tokenizer = tokenizer or corpus.tokenizer
    if tokenizer is None:
        raise no_tokenizer(sizes, directory)
    trainer = _trainer(sizes, tensors.items(), corpus, tokenizer, options, ranks, device, directory)
    restore(trainer, directory, parameters=False)
    _check_end(about.options, trainer)
    return Start(trainer, tokenizer, corpus, options)


def _same_base(stored: StartOptions, given: StartOptions) -> str | None:
    """The model of an adapter's run: in a run's folder, the checkpoint that it was trained on."""
    if stored.init is None or given.init is None or not is_step(Path(stored.init)):
        return given.init
    same = Path(given.init) / Path(stored.init).name
    return str(same) if same.is_dir() else given.init


def _check_end(stored: StartOptions, trainer: Trainer) -> None:
    """ValueError if a run that goes on has passed the end that it is now given."""
    step, options = trainer.step, trainer.options
    if options.total_steps < step:
        raise ValueError(
            f"the run is at step {step} already and steps={options.total_steps} is behind it; give "
            "more steps, or leave steps out"
        )
    if options.minutes != stored.train.minutes and options.clock(trainer.seconds) > 1:
        raise ValueError(
            f"the run has trained for {trainer.seconds / 60:.1f} minutes already and "
            f"minutes={options.minutes:g} is less; give more minutes, or leave minutes out"
        )


# ---- both ---------------------------------------------------------------------------------------


def _trainer(
    sizes: ModelConfig,
    values: Iterable[tuple[str, Tensor]],
    corpus: TokenFiles,
    tokenizer: Tokenizer,
    options: StartOptions,
    ranks: Ranks,
    device: torch.device | None,
    saved: Path | None = None,
) -> Trainer:
    check_tokenizer(tokenizer, sizes)
    if corpus.tokenizer is not None and not corpus.tokenizer.same_as(tokenizer):
        raise ValueError(
            f"the corpus was made with another tokenizer ({corpus.tokenizer.kind}) than the one "
            f"to be used ({tokenizer.kind}); prepare the text again with that"
        )
    packing = "single" if options.tune == "state" else options.train.packing
    if packing in ("reset", "whole", "single"):
        corpus.check_documents()
    batches = Batches(
        corpus.train,
        context=options.train.context,
        batch=options.train.batch,
        seed=options.train.seed,
        mask=corpus.train_mask,
        packing=packing,
        end_of_text=corpus.end_of_text,
    )
    objective = build(
        sizes,
        values,
        options.train,
        device=device or resolve_device(options.device),
        ranks=ranks,
        parallel=options.parallel if options.tune == "all" else "none",
        offload=options.offload,
    )
    model = whole_model(objective)
    adapter = None
    if options.tune != "all":
        adapter = _adapter(model, options, saved).attach(model)
    return Trainer(model, batches, options.train, objective=objective, adapter=adapter, ranks=ranks)


def _adapter(model: Model, options: StartOptions, saved: Path | None) -> Adapter:
    if saved is not None:
        return load_adapter(saved, model)
    kind = options.lora if options.tune == "lora" else StateTuningOptions()
    return make_adapter(model, kind, seed=options.train.seed)


def adapter_size(sizes: ModelConfig, options: StartOptions) -> int:
    """The number of parameters of the adapter that the options ask for."""
    with torch.device("meta"):
        model = Model(sizes)
    return sum(x.numel() for x in _adapter(model, options, None).tensors().values())
