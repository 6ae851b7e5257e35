"""Checking on this machine that every form, kernel and engine of a model gives the same logits.

A difference is the largest one of any logit, divided by the largest logit.
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
from receptance.engine.native import NativeEngine, supports
from receptance.formats.names import some
from receptance.model import Model
from receptance.model.devices import resolve_device
from receptance.model.rwkv import fingerprint
from receptance.ops import available_backends, native, triton_launching
from receptance.quantize.packing import FLOATS, FloatKind, Kind, Packed, common_kind, pack
from receptance.state import State
from receptance.storage.checkpoint import read_opened
from receptance.storage.opening import look, open_path
from receptance.storage.quantized import dequantized_tensors, read_quantized

if TYPE_CHECKING:  # This module imports Triton, which is not installed everywhere.
    from receptance.engine.gpu import GpuEngine

FLOAT32_BOUND = 1e-4
"""The rounding errors of float32 stay below this in the deepest published models."""
INTEGER_BOUND = 2e-3
"""Kernels for integer weights round activations to 15 bits, which changes logits by about 1e-4."""
GPU_BOUNDS = {"float32": FLOAT32_BOUND, "float16": 0.02} | dict.fromkeys(
    ("bfloat16", "int8", "int4"), 0.05
)
"""The GPU engine rounds activations to the type of the weights, or to bfloat16 for integers.

It does so for several rows only; a single row is computed in float32.
"""
NARROWED_BOUNDS = {"bfloat16": 0.05, "float16": 0.02, "int8": 0.1, "int4": 0.5}
"""Bounds for a model that was rounded to one of these types after its logits were recorded."""

# This is more than one chunk of the parallel kernels, so that a border between two is tested.
_LENGTH = 40
_RAGGED = (_LENGTH, 1, 33, 16)
_CUTS = 3


@dataclass(frozen=True)
class Check:
    """The result of one comparison."""

    what: str
    measured: float
    bound: float
    """The largest difference that passes; 0 demands equal bits."""
    note: str = ""

    @property
    def passed(self) -> bool:
        """Whether the measured difference is within its bound; NaN never is."""
        return self.measured <= self.bound


class Reader(Protocol):
    """The interface that checks use: an engine, or a model that computes in float32."""

    @property
    def head(self) -> Callable[[Tensor], Tensor]:
        """The output layer: [...,C] -> [...,V]."""
        ...

    def features(
        self, tokens: Tensor, state: State | None = None, *, lengths: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """The features of tokens, and the state behind them: [B,T] -> [B,T,C]."""
        ...


@dataclass(frozen=True)
class Exact:
    """A torch model whose activations are float32, whatever the type of its weights."""

    model: Model

    @property
    def head(self) -> Callable[[Tensor], Tensor]:
        """The output layer: [...,C] -> [...,V] float32."""
        return self.model.head

    def features(
        self, tokens: Tensor, state: State | None = None, *, lengths: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """The features of tokens, and the state behind them: [B,T] -> [B,T,C] float32."""
        return self.model.features(tokens, state, lengths=lengths, dtype=torch.float32)


@dataclass(frozen=True)
class Subject:
    """The model that is checked."""

    path: Path
    """The path that was asked for: a file, a directory, or a run folder."""
    config: ModelConfig
    tensors: dict[str, Tensor]
    """The tensors by official name; quantized matrices are dequantized."""
    kind: Kind
    """The type of the weights as they are stored."""
    fingerprint: str
    matrices: dict[str, Packed]
    """The matrices packed for the native kernels; empty if there are no such kernels here."""

    @classmethod
    def open(cls, source: str | Path) -> Subject:
        """Read the model at a path or hub id. ValueError if there is none."""
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
        """The tokens that every check reads: [T] int64."""
        return probe_tokens(self.config.vocab_size)

    def model(self, device: str = "cpu") -> Exact:
        """The torch model, with no weight rounded."""
        wide = self.config.architecture.is_float32
        kind = common_kind(x for name, x in self.tensors.items() if not wide(name))
        dtype = FLOATS[kind]
        return Exact(Model.from_tensors(self.config, self.tensors, device=device, dtype=dtype))

    def engine(self, instruction_set: str) -> NativeEngine:
        """The engine with the native kernels for an instruction set."""
        vectors = {name: x for name, x in self.tensors.items() if name not in self.matrices}
        parts = self.config, self.matrices, vectors, self.fingerprint
        return NativeEngine(*parts, instruction_set=instruction_set)

    def gpu_engine(self, device: str) -> GpuEngine:
        """The engine with the Triton kernels."""
        from receptance.engine.gpu import GpuEngine

        matrices: Mapping[str, Tensor | Packed] = self.matrices or {
            name: self.tensors[name].to(FLOATS[self.kind])  # type: ignore[index]
            for name in self.config.architecture.layouts(self.config)
        }
        vectors = {name: x for name, x in self.tensors.items() if name not in matrices}
        return GpuEngine(self.config, matrices, vectors, self.fingerprint, device=device)


def probe_tokens(vocab_size: int, count: int = _LENGTH) -> Tensor:
    """Fixed ids that depend on the size of the vocabulary alone: [T] int64."""
    numbers = torch.arange(1, count + 1)
    return (numbers * numbers + 7919 * numbers) % vocab_size


def record(subject: Subject, file: Path) -> None:
    """Write the logits of fixed tokens, as `recorded.write` does."""
    with torch.no_grad():
        found = logits(subject.model(), subject.tokens)
    recorded.write(file, subject.tokens, found, model=subject.fingerprint, stored=subject.kind)


@torch.no_grad()
def verify(subject: Subject, file: Path | None = None, device: str = "cpu") -> Iterator[Check]:
    """Run all checks, one after another.

    file has recorded logits; None takes the one beside the model, if it exists.
    """
    device = str(resolve_device(device))
    if file is None and recorded.beside(subject.path).is_file():
        file = recorded.beside(subject.path)
    # The file is read before anything is computed, because it may be damaged.
    known = None if file is None else recorded.read(file)
    yield _weights_finite(subject)
    exact = subject.model(device)
    tokens = subject.tokens.to(device)
    reference = logits(exact, tokens)
    bad = int((~reference.isfinite()).sum())
    yield Check("logits finite", bad, 0, f"{reference.numel():,} values")
    yield from _laws(f"torch on {device}", exact, tokens, reference, FLOAT32_BOUND)
    yield from _backends(exact, tokens, device)
    for name in native.instruction_sets() if supports(subject.config) else ():
        engine, label = subject.engine(name), f"native {name}"
        found = logits(engine, subject.tokens)
        bound = FLOAT32_BOUND if subject.kind in FLOATS else INTEGER_BOUND
        yield Check(f"{label} = torch", difference(found, reference), bound, subject.kind)
        yield from _laws(label, engine, subject.tokens, found, 0)
    if subject.config.architecture.gpu_kernels is not None and _has_gpu_engine(device):
        yield from _gpu_engine(subject, device, reference)
    if known is not None:
        yield _as_recorded(subject, known, reference)


def logits(reader: Reader, tokens: Tensor, pieces: Iterable[int] = ()) -> Tensor:
    """The logits of a row that is read in pieces of these lengths: [T] -> [T,V] on the CPU.

    Tokens behind the last piece are read at once.
    """
    state, found, start = None, [], 0
    for length in (*pieces, len(tokens)):
        piece = tokens[None, start : start + length]
        if piece.numel():
            out, state = reader.features(piece, state)
            found.append(reader.head(out)[0].float().cpu())
        start += length
    return torch.cat(found)


def difference(found: Tensor, reference: Tensor) -> float:
    """The largest difference, divided by the largest value of reference; NaN if either has NaN."""
    return comparing.difference(reference, found).relative


def _packed(config: ModelConfig, tensors: dict[str, Tensor], kind: FloatKind) -> dict[str, Packed]:
    if not (native.is_available() and supports(config)):
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
    """Check that cutting a sequence, or batching it with others, does not change the logits."""
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
    """The largest difference between rows of several lengths in one batch and each row alone."""
    rows = torch.stack([tokens.roll(shift) for shift in range(len(_RAGGED))])
    features, _ = reader.features(rows, lengths=torch.tensor(_RAGGED, device=tokens.device))
    together = reader.head(features).float().cpu()
    return max(
        difference(together[row, :length], logits(reader, rows[row, :length]))
        for row, length in enumerate(_RAGGED)
    )


def _backends(exact: Exact, tokens: Tensor, device: str) -> Iterator[Check]:
    """Compare every kernel of the recurrence with the reference."""
    operator = exact.model.config.architecture.operator
    if operator is None:
        return
    exact.model.backend = "reference"
    wanted = logits(exact, tokens)
    for name in available_backends(device, operator):
        if name != "reference":
            exact.model.backend = name
            found = difference(logits(exact, tokens), wanted)
            yield Check(f"{operator} {name} = reference", found, FLOAT32_BOUND, device)
    exact.model.backend = None


def _has_gpu_engine(device: str) -> bool:
    return torch.device(device).type == "cuda" and triton_launching.is_available()


def _gpu_engine(subject: Subject, device: str, reference: Tensor) -> Iterator[Check]:
    """Compare the GPU engine with torch, for a single row and for several."""
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
