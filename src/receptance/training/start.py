"""What a run begins with: a corpus, a model and a trainer; new, or as a checkpoint has them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.console import Console
from torch import Tensor

from receptance import checkpoint
from receptance.adapters import (
    Adapter,
    LoRAOptions,
    StateTuningOptions,
    load_adapter,
    make_adapter,
)
from receptance.config import ModelConfig, published
from receptance.data import Batches, PrepareOptions, ReadOptions, TokenFiles, is_corpus, prepare
from receptance.directories import step_directories
from receptance.model import Model, starting_values
from receptance.tokenizer import Tokenizer, load_tokenizer
from receptance.training.logs import METRICS
from receptance.training.options import TrainOptions
from receptance.training.ranks import Ranks
from receptance.training.saving import read_training, restore
from receptance.training.sharding import build, whole_model
from receptance.training.trainer import Trainer

# Of a model that is trained from nothing on text.
NEW_TOKENIZER = "bpe:2048"

# Options that a resumed run may change; the rest would make it another run.
MAY_CHANGE = (
    "steps",
    "minutes",
    "micro_batch",
    "recompute",
    "compile",
    "loader_workers",
    "skip_bad_steps",
    "rollback",
    "device",
    "parallel",
    "offload",
    "context_ranks",
)


@dataclass(frozen=True, kw_only=True)
class StartOptions:
    """What is trained, and where."""

    init: str | None = None
    """Start from this model (any that `receptance generate` reads) with its tokenizer: name that
    with --tokenizer if it is not beside the weights."""
    tune: Literal["all", "lora", "state"] = "all"
    """Train all parameters, or keep those of --init and train low-rank matrices beside them, or
    only the state that rows begin from."""
    lora: LoRAOptions = field(default_factory=LoRAOptions)
    tokenizer: str | None = None
    """bytes, bpe:SIZE (trained on the text), or a tokenizer file: bpe:2048 unless --init or the
    corpus has one."""
    size: str | None = None
    """A published size (169m, 430m, 1.5b, 3b, 7b, 14b) instead of --width and --layers."""
    width: int | None = None
    """Channels, C: 256 unless --size or --init says otherwise."""
    layers: int | None = None
    """Blocks, L: 6 unless --size or --init says otherwise."""
    validation: float = 0.02
    """Share of the text that is kept for validation."""
    exclude: tuple[str, ...] = ()
    """Leave out files with a path component like this, e.g. site-packages."""
    device: str = "cpu"
    """Where to train: cpu, cuda, ..."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """With torchrun: every process has the model, or a share of every tensor."""
    offload: bool = False
    """With fsdp: keep the shares in the host's memory."""
    context_ranks: int = 1
    """With torchrun and ddp: neighbours that share a sequence, each a piece of it."""
    read: Annotated[ReadOptions, tyro.conf.arg(name="")] = field(default_factory=ReadOptions)
    train: Annotated[TrainOptions, tyro.conf.arg(name="")] = field(default_factory=TrainOptions)

    def __post_init__(self) -> None:
        if self.tune != "all" and (self.parallel == "fsdp" or self.context_ranks > 1):
            raise ValueError(f"tune is {self.tune!r}; it works with ddp and one context rank")
        if self.tune != "all" and self.init is None:
            raise ValueError(f"tune is {self.tune!r}; say which model with --init")
        if self.tune == "state" and self.train.packing not in ("auto", "single"):
            raise ValueError("tune is 'state': every row is one document, so leave --packing out")
        if self.offload and self.parallel != "fsdp":
            raise ValueError(
                "offload is for the shares of --parallel fsdp; add that, or --no-offload"
            )
        if self.parallel == "fsdp" and self.context_ranks > 1:
            raise ValueError("context ranks hold the whole model; leave out --parallel fsdp")

    def named_tokenizer(self) -> Tokenizer | None:
        """One that exists already. ValueError if the model of --init is to have a new one."""
        name = self.tokenizer
        if name is None or not name.startswith("bpe:"):
            return None if name is None else load_tokenizer(name)
        if self.init is not None:
            raise ValueError(f"the model of --init has its own tokenizer; leave {name} out")
        return None

    def sizes(self, vocab_size: int) -> ModelConfig:
        """Those of a new model. ValueError if they are said twice."""
        if self.size is not None:
            model = replace(published(self.size), vocab_size=vocab_size)
            if (self.width, self.layers) != (None, None):
                raise ValueError(f"size {self.size!r} says width and layers; leave those out")
            return model
        width = 256 if self.width is None else self.width
        layers = 6 if self.layers is None else self.layers
        return ModelConfig(vocab_size=vocab_size, width=width, num_layers=layers)

    def check_sizes(self, found: ModelConfig) -> None:
        """ValueError if other sizes were asked for than the model of --init has."""
        wanted = self.sizes(found.vocab_size)
        for name, said in {"width": self.width, "num_layers": self.layers}.items():
            asked, has = getattr(wanted, name), getattr(found, name)
            if (self.size or said is not None) and asked != has:
                raise ValueError(
                    f"the model of --init has {name.removeprefix('num_')} {has}, not {asked}; "
                    "leave --size, --width and --layers out, on the command line and in a recipe"
                )


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
    given: Iterable[tuple[str, Tensor]] | None = None
    tokenizer = options.named_tokenizer()
    if options.init is not None:
        model, tokenizer = checkpoint.load(options.init, tokenizer=tokenizer, dtype=torch.float32)
        options.check_sizes(model.config)
        sizes, given = model.config, model.state_dict().items()
    else:
        options.sizes(1)  # before any text is read
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


@dataclass(frozen=True)
class About:
    """What a checkpoint says about its run."""

    options: StartOptions
    corpus: Path
    fingerprint: str
    """Of the corpus."""
    end_of_text: int


def notes(out: Path, start: Start) -> dict[str, Any]:
    """What a checkpoint has to say besides what the trainer says; `read_about` reads it."""
    path, out = start.corpus.path.resolve(), out.resolve()
    return {
        "options": asdict(start.options),
        "corpus": {
            # A run folder may be moved with all that is in it.
            "path": str(path.relative_to(out) if path.is_relative_to(out) else path),
            "fingerprint": start.corpus.fingerprint,
            "end_of_text": start.corpus.end_of_text,
        },
    }


def read_about(directory: Path) -> About:
    """What `notes` put there; ValueError if the directory is no checkpoint of a run."""
    try:
        about = read_training(directory)
        corpus = about["corpus"]
        return About(
            _restored(StartOptions(), about["options"]),
            directory.parent / corpus["path"],
            corpus["fingerprint"],
            corpus["end_of_text"],
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{directory} is not a checkpoint to resume from: {error}") from None


def _restored(options: Any, fields: dict[str, Any]) -> Any:
    """A dataclass with the values that asdict and JSON made of one."""
    changes = {}
    for name, value in fields.items():
        old = getattr(options, name)
        if is_dataclass(old):
            value = _restored(old, value)
        changes[name] = tuple(value) if isinstance(value, list) else value
    return replace(options, **changes)


def flat(options: StartOptions) -> dict[str, Any]:
    """All of them by name, those of LoRA as lora.rank and so on."""
    fields = asdict(options)
    lora = {f"lora.{name}": value for name, value in fields.pop("lora").items()}
    return {**fields.pop("train"), **fields.pop("read"), **fields, **lora}


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
        values = checkpoint.read_tensors(directory, "model").items()
    else:
        assert options.init is not None
        named = options.named_tokenizer()
        model, tokenizer = checkpoint.load(options.init, tokenizer=named, dtype=torch.float32)
        sizes, values = model.config, model.state_dict().items()
    trainer = _trainer(sizes, values, corpus, tokenizer, options, ranks, directory)
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
    checkpoint.check_tokenizer(tokenizer, sizes)
    if corpus.tokenizer is not None and corpus.tokenizer.fingerprint != tokenizer.fingerprint:
        raise ValueError(
            f"the corpus was made with another tokenizer ({corpus.tokenizer.kind}) than the one "
            f"to be used ({tokenizer.kind}); prepare the text again with that"
        )
    batches = Batches(
        corpus.train,
        context=options.train.context,
        batch=options.train.batch,
        seed=options.train.seed,
        mask=corpus.train_mask,
        packing="single" if options.tune == "state" else options.train.packing,
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
