"""What is compared: architectures, sizes, data, training and the search for learning rates."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, field
from typing import Literal

from receptance.data import ReadOptions

# The seed of the runs that search for learning rates, and the first one of the others.
FIRST_SEED = 0
# Some tokens are generated after each context to measure them, and the next is longer than that.
APART = 32


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """What a comparison trains and measures.

    The first of the models is the reference, to which the others are matched.
    """

    models: tuple[str, ...] = ("rwkv4", "neox", "llama")
    """Architectures: rwkv4 (each version of RWKV has its own), neox (Pythia's), llama (RMSNorm,
    SwiGLU, rotary embedding). The others are matched to the first."""
    sizes: tuple[str, ...] = ("128x4",)
    """Sizes, as WIDTHxLAYERS. All models of a size have this width and this number of layers."""
    seeds: tuple[int, ...] = (3,)
    """The number of seeds, of all sizes or, if repeated, of each in turn. A seed decides the
    starting values and the order of the text."""
    match: Literal["parameters", "flops"] = "parameters"
    """Make this equal by the width of the feed-forward networks: the parameters without embedding
    and head, or the FLOPs of training on a token."""
    tokenizer: str = "bpe:4096"
    """The tokenizer of all models: bytes, bpe:SIZE (trained on the text) or a file."""
    tokens: tuple[int, ...] = (2_000_000,)
    """Tokens that each run reads, repetitions included: of all sizes or, if repeated, of each in
    turn."""
    context: int = 256
    """Tokens per sequence."""
    batch: int = 8
    """Sequences per step."""
    learning_rates: tuple[float, ...] = (5e-4, 1e-3, 2e-3, 4e-3)
    """Learning rates to try. If the best is the lowest or the highest, the next one beyond it is
    tried as well, up to three times."""
    sweep_share: float = 0.2
    """Share of the tokens that a run of the search for learning rates reads. Such a run has the
    whole schedule, only shorter."""
    sweep_sizes: Literal["smallest", "all"] = "smallest"
    """Search at the smallest size, whose best rates then hold for all sizes, or at every size."""
    final_share: float = 0.1
    """The learning rate at the last step, as a share of the first."""
    warmup_share: float = 0.02
    """Share of the steps over which the learning rate grows."""
    weight_decay: float = 0.0
    """Decay of the weights in matrices; the paper uses none."""
    clip: float = 1.0
    """Largest norm of the gradient; 0 means no clipping."""
    max_logit_penalty: float = 1e-4
    """The penalty on the largest logit, as in `receptance train`, for all models."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """The type of activations in training, for all models. Parameters and optimizer stay float32,
    and models are judged in it."""
    validation: float = 0.01
    """Share of the text that is held out, by whole documents where there are any."""
    held_out: int = 1 << 17
    """Tokens of the text that is held out, at most, on which a finished run is judged."""
    points: int = 20
    """How often each run is judged on an eighth of these tokens, for the curves."""
    contexts: tuple[int, ...] = (256, 512, 1024, 2048, 4096, 8192, 16384)
    """Contexts at which generation is measured."""
    costs: bool = True
    """Measure, when all runs are done, the seconds of a step of training, and seconds and memory
    per generated token, of one model after another."""
    exclude: tuple[str, ...] = ()
    """Leave out files with a path component like this, e.g. site-packages."""
    read: ReadOptions = field(default_factory=ReadOptions)

    def __post_init__(self) -> None:
        for name in ("models", "sizes", "seeds", "tokens", "learning_rates"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty; name at least one")
        for name in ("models", "sizes", "learning_rates", "contexts"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"{name} is {_shown(values)}; each must be named once")
        for size in self.sizes:
            parse_size(size)
        for wanted, fields in self._limits().items():
            for name, holds in fields.items():
                if not holds:
                    raise ValueError(
                        f"{name} is {_shown(getattr(self, name))}; it must be {wanted}"
                    )
        if min(self.tokens) < self.batch * self.context:
            raise ValueError(
                f"tokens is {min(self.tokens)}; a step alone reads {self.batch * self.context} "
                "(batch times context)"
            )

    def _limits(self) -> dict[str, dict[str, bool]]:
        """What holds of each field, by what is wanted of it."""
        numbers = ("context", "batch", "held_out", "points")
        lists = ("seeds", "tokens", "contexts")
        shares = ("sweep_share", "final_share")
        return {
            "at least 1": {
                **{name: getattr(self, name) >= 1 for name in numbers},
                **{name: all(n >= 1 for n in getattr(self, name)) for name in lists},
            },
            "above 0 and below 1": {
                "learning_rates": all(0 < rate < 1 for rate in self.learning_rates),
                "validation": 0 < self.validation < 1,
            },
            "above 0 and at most 1": {name: 0 < getattr(self, name) <= 1 for name in shares},
            "at least 0 and below 1": {"warmup_share": 0 <= self.warmup_share < 1},
            f"at least {APART} apart": {
                "contexts": all(
                    b - a >= APART for a, b in itertools.pairwise(sorted(self.contexts))
                )
            },
            "float32 or bfloat16": {"dtype": self.dtype in ("float32", "bfloat16")},
            "parameters or flops": {"match": self.match in ("parameters", "flops")},
            "smallest or all": {"sweep_sizes": self.sweep_sizes in ("smallest", "all")},
        }

    def seeds_of(self, size: str) -> range:
        """The seeds of the runs of one size."""
        return range(FIRST_SEED, FIRST_SEED + self._of(size, self.seeds))

    def tokens_of(self, size: str) -> int:
        """The tokens that each run of one size reads."""
        return self._of(size, self.tokens)

    def _of(self, size: str, numbers: tuple[int, ...]) -> int:
        return numbers[self.sizes.index(size) if len(numbers) > 1 else 0]


def parse_size(size: str) -> tuple[int, int]:
    """Width and layers of "128x4"; ValueError if the text is no such thing."""
    found = re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,3})", size)
    if not found:
        raise ValueError(f"sizes has {size!r}; wanted WIDTHxLAYERS, as in 128x4")
    return int(found[1]), int(found[2])


def _shown(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
