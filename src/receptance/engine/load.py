"""From a path or a hub id to what runs it fastest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from receptance.adapters import load_adapter
from receptance.config import ModelConfig
from receptance.engine.adapted import AdaptedModel
from receptance.engine.base import Engine
from receptance.engine.memory import Arena, room
from receptance.engine.native import NativeEngine
from receptance.engine.wide import widen
from receptance.model.rwkv import fingerprint
from receptance.ops import native
from receptance.quantize import Quantized, check_group, quantize
from receptance.quantize.packing import FLOATS, KINDS, Kind, Packed, common_kind, pack
from receptance.state import State
from receptance.storage import quantized as files
from receptance.storage.checkpoint import check_device, load, read_model
from receptance.storage.directories import existing
from receptance.storage.pairing import check_same
from receptance.tokenizer import Tokenizer, load_tokenizer

Backend = Literal["auto", "native", "triton", "torch"]
# Passes over a mapped file. A copy takes as long as some tokens, where fresh memory is slow as
# dozens: whoever wants one or two need not wait for it.
_MAPPED_PASSES = 8
_TORCH_DTYPES = ("float32", "bfloat16")
MOST_THREADS = 1024


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """What every command that runs a model lets its user choose: the arguments of load_engine."""

    tokenizer: str | None = None
    """A tokenizer file, or "bytes", instead of the one beside the weights."""
    device: str = "cpu"
    """Where to run: cpu, cuda, ..."""
    dtype: Kind | None = None
    """Type of the weights; as in the file if not given. int8 and int4 are made on the fly."""
    backend: Backend = "auto"
    """What computes: auto takes the native kernels on a CPU where they were built, and those in
    Triton on an NVIDIA GPU."""
    threads: int | None = None
    """Threads of the native kernels; as many as torch has if not given."""
    adapter: Path | None = None
    """A fine-tuned adapter of this model: its file, or a directory with adapter.safetensors."""

    def load(self, source: str | Path) -> tuple[Engine, Tokenizer]:
        """What they choose, and the model's tokenizer."""
        return load_engine(source, **vars(self))


def load_engine(
    source: str | Path,
    *,
    tokenizer: str | Path | Tokenizer | None = None,
    device: torch.device | str = "cpu",
    dtype: Kind | None = None,
    group: int | None = None,
    adapter: Path | None = None,
    backend: Backend = "auto",
    threads: int | None = None,
) -> tuple[Engine, Tokenizer]:
    """What runs a model, and its tokenizer; source is whatever `receptance.load` opens.

    On a CPU the native kernels, where they were built, on an NVIDIA GPU those in Triton; elsewhere,
    or with backend "torch", a torch `Model`. dtype is that of the weights, None that of the file;
    int8 and int4 are made here unless `receptance quantize` has made them (int4 with one scale for
    `group` inputs). An adapter becomes part of the engine. ValueError says in one line what is
    wrong.
    """
    check_device(device)
    if dtype is not None and dtype not in KINDS:
        raise ValueError(f"dtype is {dtype!r}; wanted one of {', '.join(KINDS)}")
    check_threads(threads)
    chosen = _choose(backend, device)
    if chosen == "torch":
        return _torch_engine(source, tokenizer, device, dtype, adapter)
    make: Callable[..., Engine] = partial(native_engine, threads=threads)
    if chosen == "triton":
        from receptance.engine.gpu import gpu_engine  # imports Triton

        make = partial(gpu_engine, device=device)
    if adapter is not None:
        return _adapted(source, tokenizer, dtype, group, adapter, make)
    path = existing(source)
    if files.is_quantized(path):
        on_gpu = device if chosen == "triton" else None
        return _quantized(path, dtype, group, tokenizer, threads, on_gpu)
    config, tensors, found = read_model(source, tokenizer=tokenizer)
    return make(config, tensors, dtype, group=group), found


def check_threads(threads: int | None) -> None:
    """ValueError for a number of threads that makes no sense, or would bring a machine down."""
    if threads is not None and not 1 <= threads <= MOST_THREADS:
        raise ValueError(f"threads is {threads}; wanted 1 to {MOST_THREADS}")


def native_engine(
    config: ModelConfig,
    tensors: dict[str, Tensor],
    kind: Kind | None = None,
    *,
    group: int | None = None,
    threads: int | None = None,
    initial: State | None = None,
    own_fingerprint: str | None = None,
) -> NativeEngine:
    """An engine of a model's tensors under official names, in any float type.

    kind None is the one that all matrices have, else float32. tensors is emptied on the way, so
    that a tensor that nobody else holds is freed once it is packed.
    """
    whose = own_fingerprint or fingerprint(config, tensors)
    matrices: dict[str, Packed] = {}
    wanted = config.architecture.layouts(config)
    kind = kind or common_kind(tensors[name] for name in wanted)
    if kind in FLOATS and group is not None:
        raise ValueError(f"group is {group}; {kind} weights have none, so leave it out")
    group = 0 if kind in FLOATS else check_group(kind, group)
    sizes = ((to, tensors[name].shape) for name, to in wanted.items())
    arena = Arena(sum(room(kind, to, size[0], size[1], group) for to, size in sizes))
    for name, layout in wanted.items():
        weight = tensors.pop(name).detach()
        if kind in FLOATS:
            matrices[name] = arena.hold_packed(pack(weight.to(FLOATS[kind]), layout))
        else:
            codes = _quantize(name, weight, kind, group)
            matrices[name] = arena.hold_packed(pack(codes, layout))
    vectors = {name: x.detach() for name, x in tensors.items()}
    return NativeEngine(config, matrices, vectors, whose, threads=threads, initial=initial)


def _quantize(name: str, weight: Tensor, kind: Kind, group: int) -> Quantized:
    try:
        return quantize(weight, kind, group)  # type: ignore[arg-type]
    except ValueError as error:
        raise ValueError(f"{name} cannot be quantized: {error}") from None


def _choose(backend: Backend, device: torch.device | str) -> Backend:
    on_cpu = torch.device(device).type == "cpu"
    if backend == "native" and not (on_cpu and native.is_available()):
        reason = f"run on the CPU, not on {device}" if not on_cpu else "were not built"
        raise ValueError(f"the native kernels {reason}; `receptance doctor` says more")
    on_gpu, has_triton = torch.device(device).type == "cuda", find_spec("triton") is not None
    if backend == "triton" and not (on_gpu and has_triton):
        reason = f"run on an NVIDIA GPU, not on {device}" if not on_gpu else "want Triton"
        raise ValueError(f"the GPU kernels {reason}; `receptance doctor` says more")
    if backend == "auto" and on_cpu:
        return "native" if native.is_available() else "torch"
    if backend == "auto":
        return "triton" if on_gpu and has_triton else "torch"
    return backend


def _quantized(
    path: Path,
    dtype: Kind | None,
    group: int | None,
    tokenizer: str | Path | Tokenizer | None,
    threads: int | None,
    on_gpu: torch.device | str | None,
) -> tuple[Engine, Tokenizer]:
    found = files.read_quantized(path)
    if dtype not in (None, found.about.kind):
        raise ValueError(
            f"{path} holds {found.about.kind} weights and {dtype} was asked for; leave the type "
            "out, or begin from the model that was quantized"
        )
    if group not in (None, found.about.group):
        raise ValueError(
            f"{path} has groups of {found.about.group} and {group} was asked for; leave that out"
        )
    if isinstance(tokenizer, str | Path):
        tokenizer = load_tokenizer(tokenizer)
    check_same(path, found.tokenizer, tokenizer)
    if on_gpu is not None:
        from receptance.engine.gpu import GpuEngine

        parts = found.config, found.matrices, found.vectors, found.about.source
        return GpuEngine(*parts, device=on_gpu), found.tokenizer
    parts = found.config, found.matrices, found.vectors, found.about.source
    return NativeEngine(*parts, threads=threads, copy_before=_MAPPED_PASSES + 1), found.tokenizer


def _torch_engine(
    source: str | Path,
    tokenizer: str | Path | Tokenizer | None,
    device: torch.device | str,
    dtype: Kind | None,
    adapter: Path | None,
) -> tuple[Engine, Tokenizer]:
    if dtype is not None and dtype not in _TORCH_DTYPES:
        raise ValueError(
            f"{dtype} weights want the native kernels on a CPU (`receptance doctor` says whether "
            f"they are there); torch takes {' and '.join(_TORCH_DTYPES)}"
        )
    kind = None if dtype is None else FLOATS[dtype]  # type: ignore[index]
    model, found = load(source, tokenizer=tokenizer, device=device, dtype=kind)
    widen(model)
    if adapter is not None:
        return AdaptedModel(model, load_adapter(adapter, model)), found
    if files.is_quantized(path := existing(source)):
        model.origin = files.source_of(path)
    return model, found


def _adapted(
    source: str | Path,
    tokenizer: str | Path | Tokenizer | None,
    dtype: Kind | None,
    group: int | None,
    adapter: Path,
    make: Callable[..., Engine],
) -> tuple[Engine, Tokenizer]:
    model, found = load(source, tokenizer=tokenizer)
    tuned = load_adapter(adapter, model)
    own = tuned.fingerprint(model.fingerprint())
    initial = tuned.initial_state()
    if initial is None:
        model = tuned.merge(model)
    engine = make(
        model.config,
        dict(model.state_dict()),
        dtype,
        group=group,
        initial=None if initial is None else initial.detach(),
        own_fingerprint=own,
    )
    return engine, found
