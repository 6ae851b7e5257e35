"""What to train and how: options, and the learning rate of every step."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from receptance.adapters import LoRAOptions
from receptance.config import ModelConfig, published
from receptance.data import ReadOptions
from receptance.data.batches import Packing
from receptance.model.versions import architecture
from receptance.tokenizer import Tokenizer, load_tokenizer

_DEFAULT_STEPS = 1000
# A run that only the clock limits never reaches this many steps.
_UNLIMITED = 10**9
# Whole numbers stay below what indices of tensors can be; rates below what float32 can be.
_LARGEST, _LARGEST_RATE = 1 << 31, 1e38
# Default learning rates at the start and at the end, by what is trained.
_RATES = {
    "new": (6e-4, 1e-5),  # the paper's 169M model, appendix G
    "all": (2e-5, 1e-5),  # RWKV-LM advises 1e-5 to 3e-5 for fine-tuning
    "lora": (2e-4, 1e-5),  # GPT-2 and GPT-3 in the LoRA paper, arXiv 2106.09685, appendix D
    "state": (1e-1, 1e-3),  # few numbers, whose gradients are small: see docs/fine-tuning.md
}
SECTION = {"section": True}
"""Metadata of a field whose options have its name before theirs, as in `lora.rank`."""


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """How to train. Betas, epsilon, clipping and the schedule's form are those of the paper."""

    steps: int = 0
    """Updates in all; 0 means 1000 or, if minutes is given, as many as that allows."""
    minutes: float = 0.0
    """Stop after this much training time if that comes first; the learning rate then follows the
    clock. 0 means no limit. A run with a limit is not reproducible to the bit."""
    batch: int = 8
    """Sequences per step, over all processes."""
    micro_batch: int = 0
    """Sequences that a process computes at a time; their gradients add up to the batch's. 0 means
    all."""
    context: int = 256
    """Tokens per sequence, T. The model itself has no limit."""
    chunk: int = 0
    """Tokens that are computed at a time: a longer sequence is read in pieces, its state handed
    from one to the next, in memory that does not grow with the context. 0 means all."""
    carry: Literal["gradient", "state"] = "gradient"
    """What crosses from one chunk to the next: the gradient as well (the same result as without
    chunks, a second forward pass), or the state alone (truncated backpropagation)."""
    packing: Packing = "auto"
    """What a sequence is. stream: a window of the text, whatever documents it cuts. reset: the
    same, each document from an empty state. whole: as many whole documents as fit. single: one
    document. auto: whole for examples (prompt and response, chats), otherwise stream."""
    learning_rate: float | None = None
    """The rate at the start and through constant_steps. The default depends on what is trained:
    6e-4 for a new model, 2e-5 for all of a given one, 2e-4 for LoRA, 0.1 for a state."""
    final_learning_rate: float | None = None
    """The rate at the last step. The default is 1e-5 (1e-3 for a state), or the rate at the start
    if that is lower."""
    schedule: Literal["exponential", "cosine"] = "exponential"
    """The form of the decay between these two: that of RWKV-4, or that of RWKV-7."""
    warmup_steps: int = 0
    """Steps over which the learning rate grows from a fifth of itself, as in RWKV-LM."""
    constant_steps: int = 0
    """Steps after the warm-up before the decay begins (the paper's 169M model: 4.5 % of all)."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Adam's decay rates."""
    epsilon: float = 1e-8
    """Adam's epsilon."""
    layerwise_rates: bool = True
    """Whether some vectors learn faster: decays twice as fast, in RWKV-4 also the bonus three times
    (RWKV-LM's layerwise_lr)."""
    weight_decay: float = 0.0
    """Decay of the weights, which acts on matrices only; the paper uses none."""
    clip: float = 1.0
    """Largest norm of the gradient; 0 means no clipping."""
    dropout: float = 0.0
    """Share of activations that are dropped after the embedding and each residual sum."""
    max_logit_penalty: float = 1e-4
    """Half of it times the square of each position's largest logit is added to the objective
    (RWKV-LM's L2Wrap); 0 means none."""
    z_loss: float = 0.0
    """This times the square of the softmax's log-normalizer is added (PaLM: 1e-4)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """The type of activations. Parameters and optimizer stay float32."""
    recompute: bool = False
    """Keep only the inputs of each block and recompute the rest in the backward pass: about a third
    more work, far less memory (activation checkpointing)."""
    compile: bool = False
    """Compile the blocks with torch.compile."""
    loader_workers: int = 0
    """Threads that read batches ahead."""
    skip_bad_steps: bool = False
    """Skip a step whose loss or gradient is not finite, instead of stopping."""
    rollback: float = 0.0
    """When the loss exceeds the mean of the last 100 steps by this many nats, go back to the newest
    checkpoint and skip the batches that were read since then. 0 means never."""
    seed: int = 0
    """Decides the starting values, the split, the order and the dropout."""

    def __post_init__(self) -> None:
        choices = {
            "carry": ("gradient", "state"),
            "packing": get_args(Packing),
            "dtype": ("float32", "bfloat16"),
            "schedule": ("exponential", "cosine"),
        }
        wanted = {
            **{
                f"one of {', '.join(values)}": {name: getattr(self, name) in values}
                for name, values in choices.items()
            },
            f"at least 1 and less than {_LARGEST:,}": {
                n: 1 <= getattr(self, n) < _LARGEST for n in ("batch", "context")
            },
            f"at least 0 and less than {_LARGEST:,}": {
                n: 0 <= getattr(self, n) < _LARGEST
                for n in (
                    "steps",
                    "micro_batch",
                    "chunk",
                    "loader_workers",
                    "warmup_steps",
                    "constant_steps",
                )
            },
            f"at least 0 and less than {_LARGEST_RATE:g}": {
                n: 0 <= getattr(self, n) < _LARGEST_RATE
                for n in (
                    "minutes",
                    "max_logit_penalty",
                    "z_loss",
                    "rollback",
                    "weight_decay",
                    "clip",
                )
            },
            f"over 0 and less than {_LARGEST_RATE:g}": {
                n: 0 < getattr(self, n) < _LARGEST_RATE
                for n in ("learning_rate", "final_learning_rate", "epsilon")
                if getattr(self, n) is not None
            },
            "at least 0 and less than 1": {
                "dropout": 0 <= self.dropout < 1,
                "betas": all(0 <= beta < 1 for beta in self.betas),
            },
            "at least 0 and less than 2**32": {"seed": 0 <= self.seed < 1 << 32},
        }
        if self.carry == "state" and not self.chunk:
            raise ValueError("carry is 'state', and without a chunk nothing is carried; set chunk")
        for limits, fields in wanted.items():
            for name, holds in fields.items():
                if not holds:
                    raise ValueError(f"{name} is {getattr(self, name)}; it must be {limits}")

    @property
    def total_steps(self) -> int:
        """`steps`, or what its 0 stands for."""
        return self.steps or (_UNLIMITED if self.minutes else _DEFAULT_STEPS)

    @property
    def rates(self) -> tuple[float, float]:
        """The learning rates at the start and at the end; those of a new model by default."""
        return self._rates("new")

    def _rates(self, trained: str) -> tuple[float, float]:
        first, last = _RATES[trained]
        first = first if self.learning_rate is None else self.learning_rate
        last = min(last, first) if self.final_learning_rate is None else self.final_learning_rate
        return first, last

    def with_rates(self, trained: Literal["new", "all", "lora", "state"]) -> TrainOptions:
        """The same options with the default rates for what is trained written out."""
        first, last = self._rates(trained)
        return replace(self, learning_rate=first, final_learning_rate=last)

    def clock(self, seconds: float) -> float:
        """The share of the time limit that is used up after so many seconds of training."""
        return seconds / (60 * self.minutes) if self.minutes else 0.0


@dataclass(frozen=True, kw_only=True)
class StartOptions:
    """What is trained, and where."""

    init: str | None = None
    """Start from this model, in any format that `receptance generate` reads, with its tokenizer;
    name that as tokenizer if it is not beside the weights."""
    tune: Literal["all", "lora", "state"] = "all"
    """Train all parameters, or keep those of init and train low-rank matrices beside them, or
    only the state that rows begin from."""
    lora: LoRAOptions = field(default_factory=LoRAOptions, metadata=SECTION)
    tokenizer: str | None = None
    """bytes, bpe:SIZE (trained on the text), or a tokenizer file: bpe:2048 unless init or the
    corpus has one."""
    version: float | None = None
    """The version of RWKV of a new model, 4, 5.0 to 5.2, 6 or 7: 4 unless size says otherwise."""
    size: str | None = None
    """A published size (169m to 14b, rwkv5-0.1b to rwkv7-13.3b) instead of width and layers."""
    width: int | None = None
    """Channels, C: 256 unless size or init says otherwise."""
    layers: int | None = None
    """Blocks, L: 6 unless size or init says otherwise."""
    validation: float = 0.02
    """Share of the text that is kept for validation."""
    exclude: tuple[str, ...] = ()
    """Leave out files with a path component like this, e.g. site-packages."""
    device: str = "auto"
    """Where to train: cpu, cuda, ...; auto takes a GPU if there is one, otherwise the CPU."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """With torchrun: every process has the model, or a share of every tensor."""
    offload: bool = False
    """With fsdp: keep the shares in the host's memory."""
    context_ranks: int = 1
    """With torchrun and ddp: neighbors that share a sequence, each a piece of it."""
    read: ReadOptions = field(default_factory=ReadOptions)
    train: TrainOptions = field(default_factory=TrainOptions)

    def __post_init__(self) -> None:
        if self.version is not None:  # A flag makes 7.0 of 7.
            object.__setattr__(self, "version", architecture(self.version).number)
        if self.tune != "all" and (self.parallel == "fsdp" or self.context_ranks > 1):
            raise ValueError(f"tune is {self.tune!r}; it works with ddp and one context rank")
        if self.tune != "all" and self.init is None:
            raise ValueError(f"tune is {self.tune!r}; say which model with init")
        if self.tune != "lora" and self.lora != LoRAOptions():
            raise ValueError(
                f"tune is {self.tune!r}: options of lora have no effect; set tune to lora, or "
                "leave them out"
            )
        if self.tune == "state" and self.train.packing not in ("auto", "single"):
            raise ValueError("tune is 'state': every row is one document, so leave packing out")
        if self.offload and self.parallel != "fsdp":
            raise ValueError(
                "offload is for the shares of fsdp: set parallel to fsdp, or leave offload out"
            )
        if not 1 <= self.context_ranks <= self.train.context:
            raise ValueError(
                f"context_ranks is {self.context_ranks}; it must be at least 1, and at most the "
                f"context ({self.train.context}), of which each has a piece"
            )
        if self.parallel == "fsdp" and self.context_ranks > 1:
            raise ValueError(
                f"context_ranks is {self.context_ranks}: each holds the whole model, so set "
                "parallel to ddp"
            )

    @property
    def trained(self) -> Literal["new", "all", "lora", "state"]:
        """What is trained: a new model, all of a given one, or an adapter of it."""
        return "new" if self.init is None else self.tune

    def named_tokenizer(self) -> Tokenizer | None:
        """The tokenizer, if one that exists already is named.

        ValueError if the model of init is to have a new one.
        """
        name = self.tokenizer
        if name is None or not name.startswith("bpe:"):
            return None if name is None else load_tokenizer(name)
        if self.init is not None:
            raise ValueError(
                f"the model of init has its own tokenizer; leave {name} out, or name the file of "
                "that tokenizer if it is not beside the weights"
            )
        return None

    def sizes(self, vocab_size: int) -> ModelConfig:
        """The sizes of a new model. ValueError if they are said twice."""
        if self.size is not None:
            model = replace(published(self.size), vocab_size=vocab_size)
            if (self.width, self.layers) != (None, None):
                raise ValueError(f"size {self.size!r} says width and layers; leave those out")
            if self.version not in (None, model.version):
                raise ValueError(
                    f"size {self.size!r} is one of RWKV-{model.version}; leave version out"
                )
            return model
        width = 256 if self.width is None else self.width
        layers = 6 if self.layers is None else self.layers
        version = 4 if self.version is None else self.version
        return ModelConfig(version=version, vocab_size=vocab_size, width=width, num_layers=layers)

    def check_sizes(self, found: ModelConfig) -> None:
        """ValueError if other sizes were asked for than the model of init has."""
        wanted = self.sizes(found.vocab_size)
        given = {"version": self.version, "width": self.width, "num_layers": self.layers}
        for name, said in given.items():
            asked, has = getattr(wanted, name), getattr(found, name)
            if (self.size or said is not None) and asked != has:
                raise ValueError(
                    f"the model of init has {name.removeprefix('num_')} {has}, not {asked}; "
                    "leave version, size, width and layers out, of a recipe as well"
                )


def learning_rate(step: int, options: TrainOptions, clock: float = 0.0) -> float:
    """The rate of a step counted from 0: warm-up, constant, decay.

    The formula is that of RWKV-v4neo's trainer.py, or has the cosine of RWKV-v7's. clock is the
    share of a time limit that is used up; the decay follows it if it is ahead of the steps.
    """
    warmup, constant = options.warmup_steps, options.constant_steps
    span = max(1, options.total_steps - constant - warmup)
    progress = min(1.0, max(0.0, clock, (step - constant - warmup + 1) / span))
    first, last = options.rates
    if options.schedule == "cosine":
        rate = last + (first - last) * (1 + math.cos(math.pi * progress)) / 2
    else:
        rate = first * (last / first) ** progress
    return rate * (0.2 + 0.8 * step / warmup) if step < warmup else rate
