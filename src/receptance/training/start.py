"""What a run begins with: a corpus, a model and a trainer; new, or as a checkpoint has them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from receptance.adapters import Adapter, StateTuningOptions, load_adapter, make_adapter
from receptance.config import ModelConfig
from receptance.data import Batches, PrepareOptions, TokenFiles, is_corpus, prepare
from receptance.model import Model, starting_values
from receptance.storage import checkpoint
from receptance.storage.directories import step_directories
from receptance.storage.pairing import check_tokenizer
from receptance.tokenizer import Tokenizer
from receptance.training.logs import METRICS
from receptance.training.notes import located, read_about
from receptance.training.options import StartOptions
from receptance.training.ranks import Ranks
from receptance.training.saving import restore
from receptance.training.sharding import build, whole_model
from receptance.training.trainer import Trainer

# Of a model that is trained from nothing on text.
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
    out: Path, data: Sequence[str], options: StartOptions, ranks: Ranks, console: Console
) -> Start:
    """Read and tokenize the text, make a new model or take the given one."""
    if not data:
        raise ValueError("no data; name a text file, a folder or a glob, or use --resume")
    ranks.check_rows(options.train.batch)  # before any text is read
    given: Iterable[tuple[str, Tensor]] | None = None
    options = located(options)
    tokenizer = options.named_tokenizer()
    if options.init is not None:
        sizes, tensors, tokenizer = checkpoint.read_model(options.init, tokenizer=tokenizer)
        options.check_sizes(sizes)
        given = tensors.items()
    else:
        options.sizes(1)  # the same
    with ranks.first_alone():  # the others find it done
        corpus = _corpus(out, data, options, tokenizer, console)
    tokenizer = tokenizer or corpus.tokenizer
    assert tokenizer is not None
    if given is None:
        sizes = options.sizes(tokenizer.vocab_size)
        seed, bound = options.train.seed, options.train.learning_rate
        given = starting_values(sizes, seed=seed, embedding_bound=bound)
    trainer = _trainer(sizes, given, corpus, tokenizer, options, ranks)
    return Start(trainer, tokenizer, corpus, options)


def check_new(out: Path, *, again: bool) -> None:
    """ValueError if a run is in the folder; again clears one away that never saved anything."""
    if out.is_dir() and step_directories(out):
        raise ValueError(f"{out} already holds a run; add --resume, or choose another --out")
    if not (out / METRICS).exists():
        return
    if not again:
        raise ValueError(
            f"{out} holds a run without a checkpoint; delete it or choose another --out"
        )
    (out / METRICS).unlink(missing_ok=True)  # another process may be faster


def _corpus(
    out: Path,
    data: Sequence[str],
    options: StartOptions,
    tokenizer: Tokenizer | None,
    console: Console,
) -> TokenFiles:
    """The tokens that are named, or those of the text that is, in the run folder."""
    if len(data) == 1 and is_corpus(data[0]):
        end = tokenizer.end_of_text if tokenizer else 0
        corpus = TokenFiles.open(data[0], validation=options.validation, end_of_text=end)
        if tokenizer is None and corpus.tokenizer is None:
            raise ValueError(
                f"{data[0]} does not say which tokenizer made it; give it with --tokenizer"
            )
        if tokenizer is None and options.tokenizer is not None:
            raise ValueError(f"{data[0]} has its own tokenizer; leave {options.tokenizer} out")
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
    out: Path, directory: Path, data: Sequence[str], options: StartOptions, ranks: Ranks
) -> Start:
    """Everything as a whole checkpoint of the run has it.

    data may name a corpus of tokens, if that is elsewhere now.
    """
    about = read_about(directory)
    # Text is given again by a command that is repeated; its tokens are in the run's folder.
    path = Path(data[0]) if data and is_corpus(data[0]) else about.corpus
    corpus = TokenFiles.open(path, validation=options.validation, end_of_text=about.end_of_text)
    if corpus.fingerprint != about.fingerprint:
        raise ValueError(f"{path} is not the corpus that the run began with; give the path to that")
    if options.tune == "all":
        sizes, tokenizer = checkpoint.read_description(directory)
        tensors = checkpoint.read_tensors(directory, "model")
    else:
        assert options.init is not None
        named = options.named_tokenizer()
        sizes, tensors, tokenizer = checkpoint.read_model(options.init, tokenizer=named)
    trainer = _trainer(sizes, tensors.items(), corpus, tokenizer, options, ranks, directory)
    restore(trainer, directory, parameters=False)
    return Start(trainer, tokenizer, corpus, options)


# ---- both ---------------------------------------------------------------------------------------


def _trainer(
    sizes: ModelConfig,
    values: Iterable[tuple[str, Tensor]],
    corpus: TokenFiles,
    tokenizer: Tokenizer,
    options: StartOptions,
    ranks: Ranks,
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
        device=options.device,
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
    """Numbers in the adapter that the options ask for."""
    with torch.device("meta"):
        model = Model(sizes)
    return sum(x.numel() for x in _adapter(model, options, None).tensors().values())
