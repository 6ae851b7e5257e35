"""From a path or a hub id to what runs it fastest."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from receptance.adapters import load_adapter
from receptance.checkpoint import check_device, check_same, load, read_model
from receptance.config import ModelConfig
from receptance.directories import existing
from receptance.engine import files
from receptance.engine.adapted import AdaptedModel
from receptance.engine.base import Engine
from receptance.engine.native import NativeEngine, layouts
from receptance.engine.packing import FLOATS, KINDS, Kind, Packed, pack
from receptance.model.rwkv import fingerprint
from receptance.ops import native
from receptance.quantize import quantise
from receptance.state import State
from receptance.tokenizer import Tokenizer, load_tokenizer

Backend = Literal["auto", "native", "torch"]
_TORCH_DTYPES = ("float32", "bfloat16")


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

    On a CPU the native kernels, where they were built; elsewhere, or with backend "torch", a torch
    `Model`. dtype is that of the weights, None that of the file; int8 and int4 are made here
    unless `receptance quantize` has made them (int4 with one scale for `group` inputs). An adapter
    becomes part of the engine. ValueError says in one line what is wrong.
    """
    check_device(device)
    if dtype is not None and dtype not in KINDS:
        raise ValueError(f"dtype is {dtype!r}; wanted one of {', '.join(KINDS)}")
    if _choose(backend, device) == "torch":
        return _torch_engine(source, tokenizer, device, dtype, adapter)
    if adapter is not None:
        return _adapted(source, tokenizer, dtype, group, adapter, threads)
    path = existing(Path(source).expanduser())
    if files.is_quantised(path):
        return _quantised(path, dtype, tokenizer, threads)
    config, tensors, found = read_model(source, tokenizer=tokenizer)
    return native_engine(config, tensors, dtype, group=group, threads=threads), found


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

    kind None is that of the embedding. tensors is emptied on the way, so that a tensor that nobody
    else holds is freed once it is packed.
    """
    whose = own_fingerprint or fingerprint(config, tensors)
    matrices: dict[str, Packed] = {}
    kind = kind or _kind_of(tensors["emb.weight"])
    for name, layout in layouts(config).items():
        weight = tensors.pop(name).detach()
        if kind in FLOATS:
            matrices[name] = pack(weight.to(FLOATS[kind]), layout)
        else:
            matrices[name] = pack(quantise(weight, kind, group), layout)  # type: ignore[arg-type]
    vectors = {name: x.detach() for name, x in tensors.items()}
    return NativeEngine(config, matrices, vectors, whose, threads=threads, initial=initial)


def _choose(backend: Backend, device: torch.device | str) -> Backend:
    on_cpu = torch.device(device).type == "cpu"
    if backend == "native" and not (on_cpu and native.is_available()):
        reason = f"run on the CPU, not on {device}" if not on_cpu else "were not built"
        raise ValueError(f"the native kernels {reason}; `receptance doctor` says more")
    if backend == "auto":
        return "native" if on_cpu and native.is_available() else "torch"
    return backend


def _kind_of(tensor: Tensor) -> Kind:
    return next((kind for kind, dtype in FLOATS.items() if dtype == tensor.dtype), "float32")


def _quantised(
    path: Path, dtype: Kind | None, tokenizer: str | Path | Tokenizer | None, threads: int | None
) -> tuple[Engine, Tokenizer]:
    found = files.read_quantised(path)
    if dtype not in (None, found.about.kind):
        raise ValueError(
            f"{path} holds {found.about.kind} weights and {dtype} was asked for; leave the type "
            "out, or begin from the model that was quantised"
        )
    if isinstance(tokenizer, str | Path):
        tokenizer = load_tokenizer(tokenizer)
    check_same(path, found.tokenizer, tokenizer)
    parts = found.config, found.matrices, found.vectors, found.about.source
    return NativeEngine(*parts, threads=threads), found.tokenizer


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
    return (model if adapter is None else AdaptedModel(model, load_adapter(adapter, model))), found


def _adapted(
    source: str | Path,
    tokenizer: str | Path | Tokenizer | None,
    dtype: Kind | None,
    group: int | None,
    adapter: Path,
    threads: int | None,
) -> tuple[Engine, Tokenizer]:
    model, found = load(source, tokenizer=tokenizer)
    tuned = load_adapter(adapter, model)
    own = tuned.fingerprint(model.fingerprint())
    initial = tuned.initial_state()
    if initial is None:
        model = tuned.merge(model)
    engine = native_engine(
        model.config,
        dict(model.state_dict()),
        dtype,
        group=group,
        threads=threads,
        initial=None if initial is None else initial.detach(),
        own_fingerprint=own,
    )
    return engine, found
