"""Whether a model does on this machine what it has to: every form, kernel and engine agree.

Differences are the largest of any logit, divided by the largest logit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from receptance import formats
from receptance.checking import recorded
from receptance.checking.contents import find
from receptance.checking.recorded import Recorded
from receptance.config import ModelConfig
from receptance.conversion import comparing
from receptance.engine.native import NativeEngine
from receptance.formats.names import some
from receptance.model import Model
from receptance.model.devices import resolve_device
from receptance.model.rwkv import fingerprint
from receptance.ops import available_backends, native, triton_wkv4
from receptance.quantize.packing import FLOATS, FloatKind, Kind, Packed, common_kind, pack
from receptance.state import State
from receptance.storage.checkpoint import read_opened
from receptance.storage.opening import look, open_path
from receptance.storage.quantized import dequantized_tensors, read_quantized

if TYPE_CHECKING:  # imports Triton
    from receptance.engine.gpu import GpuEngine

FLOAT32_BOUND = 1e-4
"""What the rounding of float32 may add up to in the deepest published models."""
INTEGER_BOUND = 2e-3
"""Kernels of integer weights round activations to 15 bits: about 1e-4 in one layer or many."""
GPU_BOUNDS = {"float32": FLOAT32_BOUND, "float16": 0.02} | dict.fromkeys(
    ("bfloat16", "int8", "int4"), 0.05
)
"""The engine for GPUs rounds several rows to the type of the weights, or to bfloat16; one never."""
NARROWED_BOUNDS = {"bfloat16": 0.05, "float16": 0.02, "int8": 0.1, "int4": 0.5}
"""Against logits recorded before the same weights were rounded to one of these types."""

# More than a chunk of the parallel kernels, so that two of them meet.
_LENGTH = 40
_RAGGED = (_LENGTH, 1, 33, 16)
_CUTS = 3


@dataclass(frozen=True)
class Check:
    """One comparison."""

    what: str
    measured: float
    bound: float
    """The most that is right; 0 where not even a bit may differ."""
    note: str = ""

    @property
    def passed(self) -> bool:
        """Whether it is within its bound; NaN never is."""
        return self.measured <= self.bound


class Reader(Protocol):
    """What all of them offer: an engine, or a model that computes in float32."""

    @property
    def head(self) -> Callable[[Tensor], Tensor]:
        """[...,C] -> [...,V]."""
        ...

    def features(
        self, tokens: Tensor, state: State | None = None, *, lengths: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """[B,T] -> [B,T,C], and the state."""
        ...


@dataclass(frozen=True)
class Exact:
    """A torch model whose activations are float32, whatever the type of its weights."""

    model: Model

    @property
    def head(self) -> Callable[[Tensor], Tensor]:
        """[...,C] -> [...,V] float32."""
        return self.model.head

    def features(
        self, tokens: Tensor, state: State | None = None, *, lengths: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """[B,T] -> [B,T,C] float32, and the state."""
        return self.model.features(tokens, state, lengths=lengths, dtype=torch.float32)


@dataclass(frozen=True)
class Subject:
    """The model that is looked at."""

    path: Path
    """What was named: a file, a directory, or the folder of a run."""
    config: ModelConfig
    tensors: dict[str, Tensor]
    """By official name, as floats."""
    kind: Kind
    """The type of the weights as they are stored."""
    fingerprint: str
    matrices: dict[str, Packed]
    """As native engines want them; empty where there are none."""

    @classmethod
    def open(cls, source: str | Path) -> Subject:
        """The model at a path or hub id. ValueError if there is none."""
        found = find(source)
        if found.config is None:
            what = "an adapter" if found.kind == "adapter" else f"a {found.kind}"
            raise ValueError(found.problem or f"{found.path}: this is {what}, no model")
        if found.kind == "quantized weights":
            model = read_quantized(found.path)
            kept = model.config, dequantized_tensors(model), model.about.kind, model.about.source
            return cls(found.named, *kept, model.matrices)
        if "checkpoint" in found.kind:
            verified = look(found.path, verified=True) if found.verified else None
            opened = verified or open_path(found.path)
            config, tensors, _ = read_opened(opened, found.path, None)
        else:
            weights = formats.read(found.path)
            config, tensors = weights.config, dict(weights.tensors)
        kind = common_kind(tensors[name] for name in config.architecture.layouts(config))
        whose = fingerprint(config, tensors)
        return cls(found.named, config, tensors, kind, whose, _packed(config, tensors, kind))

    @property
    def tokens(self) -> Tensor:
        """[T] int64."""
        return probe_tokens(self.config.vocab_size)

    def model(self, device: str = "cpu") -> Exact:
        """In torch, with no weight rounded."""
        wide = self.config.architecture.is_float32
        kind = common_kind(x for name, x in self.tensors.items() if not wide(name))
        dtype = FLOATS[kind]
        return Exact(Model.from_tensors(self.config, self.tensors, device=device, dtype=dtype))

    def engine(self, instruction_set: str) -> NativeEngine:
        """With the native kernels of an instruction set."""
        vectors = {name: x for name, x in self.tensors.items() if name not in self.matrices}
        parts = self.config, self.matrices, vectors, self.fingerprint
        return NativeEngine(*parts, instruction_set=instruction_set)

    def gpu_engine(self, device: str) -> GpuEngine:
        """With the Triton kernels."""
        from receptance.engine.gpu import GpuEngine

        matrices: Mapping[str, Tensor | Packed] = self.matrices or {
            name: self.tensors[name].to(FLOATS[self.kind])  # type: ignore[index]
            for name in self.config.architecture.layouts(self.config)
        }
        vectors = {name: x for name, x in self.tensors.items() if name not in matrices}
        return GpuEngine(self.config, matrices, vectors, self.fingerprint, device=device)


def probe_tokens(vocab_size: int, count: int = _LENGTH) -> Tensor:
    """The same ids everywhere and always, a function of the vocabulary's size alone: [T] int64."""
    numbers = torch.arange(1, count + 1)
    return (numbers * numbers + 7919 * numbers) % vocab_size


def record(subject: Subject, file: Path) -> None:
    """Write the logits of fixed tokens, as `recorded.write` does."""
    with torch.no_grad():
        found = logits(subject.model(), subject.tokens)
    recorded.write(file, subject.tokens, found, model=subject.fingerprint, stored=subject.kind)


@torch.no_grad()
def verify(subject: Subject, file: Path | None = None, device: str = "cpu") -> Iterator[Check]:
    """All checks, one after another.

    file has recorded logits; None: that beside the model, if there is one.
    """
    device = str(resolve_device(device))
    if file is None and recorded.beside(subject.path).is_file():
        file = recorded.beside(subject.path)
    known = None if file is None else recorded.read(file)  # first: it may be damaged
    yield _weights_finite(subject)
    exact = subject.model(device)
    tokens = subject.tokens.to(device)
    reference = logits(exact, tokens)
    bad = int((~reference.isfinite()).sum())
    yield Check("logits finite", bad, 0, f"{reference.numel():,} values")
    yield from _laws(f"torch on {device}", exact, tokens, reference, FLOAT32_BOUND)
    yield from _backends(exact, tokens, device)
    for name in native.instruction_sets():
        engine, label = subject.engine(name), f"native {name}"
        found = logits(engine, subject.tokens)
        bound = FLOAT32_BOUND if subject.kind in FLOATS else INTEGER_BOUND
        yield Check(f"{label} = torch", difference(found, reference), bound, subject.kind)
        yield from _laws(label, engine, subject.tokens, found, 0)
    if _has_gpu_engine(device):
        yield from _gpu_engine(subject, device, reference)
    if known is not None:
        yield _as_recorded(subject, known, reference)


def logits(reader: Reader, tokens: Tensor, pieces: Iterable[int] = ()) -> Tensor:
    """Of one row, read in pieces of these lengths and then the rest: [T] -> [T,V] on the CPU."""
    state, found, start = None, [], 0
    for length in (*pieces, len(tokens)):
        piece = tokens[None, start : start + length]
        if piece.numel():
            out, state = reader.features(piece, state)
            found.append(reader.head(out)[0].float().cpu())
        start += length
    return torch.cat(found)


def difference(found: Tensor, reference: Tensor) -> float:
    """The largest of any value, by the largest value; NaN if there is any in either."""
    return comparing.difference(reference, found).relative


def _packed(config: ModelConfig, tensors: dict[str, Tensor], kind: FloatKind) -> dict[str, Packed]:
    if not native.is_available():
        return {}
    return {
        name: pack(tensors[name].to(FLOATS[kind]), to)
        for name, to in config.architecture.layouts(config).items()
    }


def _weights_finite(subject: Subject) -> Check:
    bad = {name: int((~x.isfinite()).sum()) for name, x in subject.tensors.items()}
    wrong = [name for name, count in bad.items() if count]
    return Check("weights finite", sum(bad.values()), 0, some(wrong) if wrong else "")


def _laws(
    label: str,
    reader: Reader,
    tokens: Tensor,
    whole: Tensor,
    bound: float,
    step_bound: float | None = None,
) -> Iterator[Check]:
    """Cutting a sequence and batching it with others change nothing."""
    recurrent = difference(logits(reader, tokens, [1] * len(tokens)), whole)
    step_bound = bound if step_bound is None else step_bound
    yield Check(f"{label}: token by token", recurrent, step_bound)
    worst = max(difference(logits(reader, tokens, cut), whole) for cut in _random_cuts())
    yield Check(f"{label}: cut at random", worst, bound)
    yield Check(f"{label}: in a ragged batch", _ragged(reader, tokens), bound)


def _random_cuts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, _LENGTH // 2, (_CUTS, 2), generator=generator)
    return [[int(x) for x in row] for row in sizes]


def _ragged(reader: Reader, tokens: Tensor) -> float:
    """Rows of several lengths together, against each alone."""
    rows = torch.stack([tokens.roll(shift) for shift in range(len(_RAGGED))])
    features, _ = reader.features(rows, lengths=torch.tensor(_RAGGED, device=tokens.device))
    together = reader.head(features).float().cpu()
    return max(
        difference(together[row, :length], logits(reader, rows[row, :length]))
        for row, length in enumerate(_RAGGED)
    )


def _backends(exact: Exact, tokens: Tensor, device: str) -> Iterator[Check]:
    """Every kernel of the recurrence against its definition."""
    exact.model.backend = "reference"
    wanted = logits(exact, tokens)
    for name in available_backends(device):
        if name != "reference":
            exact.model.backend = name
            found = difference(logits(exact, tokens), wanted)
            yield Check(f"wkv4 {name} = reference", found, FLOAT32_BOUND, device)
    exact.model.backend = None


def _has_gpu_engine(device: str) -> bool:
    return torch.device(device).type == "cuda" and triton_wkv4.is_available()


def _gpu_engine(subject: Subject, device: str, reference: Tensor) -> Iterator[Check]:
    """The engine for GPUs against torch: one row, which it multiplies in float32, and several."""
    engine, label = subject.gpu_engine(device), f"triton on {device}"
    tokens, bound = subject.tokens.to(device), GPU_BOUNDS[subject.kind]
    found = difference(logits(engine, tokens), reference)
    yield Check(f"{label} = torch", found, bound, subject.kind)
    yield from _laws(label, engine, tokens, reference, bound, FLOAT32_BOUND)


def _as_recorded(subject: Subject, found: Recorded, reference: Tensor) -> Check:
    what, narrowed = "logits as recorded", found.stored != subject.kind
    bound = NARROWED_BOUNDS.get(subject.kind, FLOAT32_BOUND) if narrowed else FLOAT32_BOUND
    if found.model != subject.fingerprint:
        return Check(what, math.inf, bound, "of other weights")
    vocabulary = subject.config.vocab_size
    if not torch.equal(found.tokens, subject.tokens) or found.logits.shape[1] != vocabulary:
        return Check(what, math.inf, bound, "of other tokens")
    note = f"{subject.kind} weights, recorded of {found.stored}" if narrowed else ""
    return Check(what, difference(reference[found.positions], found.logits), bound, note)
