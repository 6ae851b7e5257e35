"""Load a model from a path or a hub id into the engine that runs it fastest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from receptance.adapters import load_adapter
from receptance.config import ModelConfig
from receptance.engine.adapted import AdaptedModel, with_adapter
from receptance.engine.base import Engine
from receptance.engine.memory import Arena, room
from receptance.engine.native import NativeEngine, check_supported, supports
from receptance.engine.wide import widen
from receptance.formats import check_kind
from receptance.formats.hub import means_hub
from receptance.model.devices import resolve_device
from receptance.model.rwkv import fingerprint
from receptance.ops import native
from receptance.quantize import Quantized, check_group, quantize
from receptance.quantize.packing import FLOATS, KINDS, Kind, Packed, common_kind, pack
from receptance.state import State
from receptance.storage.checkpoint import as_model, read_opened
from receptance.storage.directories import existing
from receptance.storage.opening import Opened, look, open_path
from receptance.storage.pairing import chosen_tokenizer, no_tokenizer
from receptance.storage.quantized import QuantizedModel, open_quantized, quantization_of
from receptance.tokenizer import Tokenizer, load_tokenizer

Backend = Literal["auto", "native", "triton", "torch"]
# The first passes read weights from their mapped file; then these are copied to huge pages. Where
# fresh memory is slow, the copy costs as much as generating dozens of tokens.
_MAPPED_PASSES = 8
_TORCH_DTYPES = ("float32", "bfloat16")
MOST_THREADS = 1024


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """The engine of a model: the arguments of load_engine, and options of every command."""

    tokenizer: str | None = None
    """A tokenizer file, or "bytes", instead of the one beside the weights."""
    device: str = "auto"
    """The device to run on: cpu, cuda, ...; auto takes a GPU where there is one."""
    dtype: Kind | None = None
    """Type of the weights, by default that of the file; int8 and int4 quantize while loading."""
    group: int | None = None
    """Weights that share a scale when loading quantizes to int4: 32, 64 (the default) or 128."""
    backend: Backend = "auto"
    """The kernels: auto takes the native ones on a CPU where they were built, those in Triton on an
    NVIDIA GPU, and otherwise torch."""
    threads: int | None = None
    """Threads of the native kernels; by default as many as torch uses."""
    adapter: Path | None = None
    """A fine-tuned adapter of this model: its file, or a directory with adapter.safetensors."""

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in KINDS:
            raise ValueError(f"dtype is {self.dtype!r}; wanted one of {', '.join(KINDS)}")
        if self.group is not None:
            if self.dtype in FLOATS:
                raise ValueError(
                    f"group is {self.group}; {self.dtype} weights have none, so leave out group="
                )
            check_group(self.dtype or "int4", self.group)
        check_threads(self.threads)

    def check(self, source: str | Path) -> None:
        """ValueError for what can be told without reading or downloading a model."""
        check_backend(self.backend, resolve_device(self.device))
        if self.adapter is not None and not self.adapter.exists():
            raise ValueError(f"{self.adapter} does not exist; name the file of an adapter")
        if not means_hub(source):
            check_kind(path := existing(source))
            if (found := look(path)).kind == "quantized":
                _check_quantized(found, self)

    def load(self, source: str | Path, beside: Engine | None = None) -> tuple[Engine, Tokenizer]:
        """Load the engine and the model's tokenizer; ValueError if the model has none.

        `beside` is that of load_engine.
        """
        engine, tokenizer = load_engine(source, **vars(self), beside=beside)
        if tokenizer is None:
            raise no_tokenizer(engine.config, source)
        return engine, tokenizer


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
    beside: Engine | None = None,
) -> tuple[Engine, Tokenizer | None]:
    """Load an engine and its tokenizer from a source, which is whatever `receptance.load` opens.

    backend "auto" takes the native kernels on a CPU where they were built, and the Triton kernels
    on an NVIDIA GPU; elsewhere, and for versions of RWKV that these do not run, it takes a torch
    `Model`. dtype is the type of the weights, by default that of the file; int8 and int4 quantize
    here, unless `receptance quantize` did before (in int4 `group` inputs share a scale). An adapter
    becomes part of the engine. `beside` may be an engine of the same model without an adapter; the
    matrices that the adapter leaves as they are are then shared with it, if both run natively with
    weights of one type. ValueError says in one line what is wrong; options that would have no
    effect are refused too.
    """
    options = EngineOptions(
        device=str(device),
        dtype=dtype,
        group=group,
        adapter=adapter,
        backend=backend,
        threads=threads,
    )
    if isinstance(tokenizer, str | Path):
        tokenizer = load_tokenizer(tokenizer)
    place = resolve_device(device)
    check_backend(backend, place)
    opened = open_path(source)
    if opened.kind == "quantized":
        _check_quantized(opened, options)
        if adapter is None:
            packed = open_quantized(opened)
            if (chosen := _choose(backend, place, packed.config)) != "torch":
                _check_effect(options, chosen, packed.config)
                own = packed.tokenizer
                found = chosen_tokenizer(opened.path, packed.config, own, tokenizer)
                return _packed_engine(packed, chosen, place, options), found
    config, tensors, found = read_opened(opened, source, tokenizer)
    chosen = _choose(backend, place, config)
    _check_effect(options, chosen, config)
    if chosen == "torch":
        return _torch_engine(opened, config, tensors, place, options), found
    return _kernel_engine(config, tensors, chosen, place, options, beside), found


def check_threads(threads: int | None) -> None:
    """ValueError for a number of threads below 1, or so high that it would exhaust a machine."""
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
    shared: Mapping[str, Packed] | None = None,
) -> NativeEngine:
    """Make an engine of a model's tensors under official names, in any float type.

    With kind None the matrices keep their type if all have the same one, otherwise they become
    float32. The dict `tensors` is emptied on the way, so that a tensor that nobody else holds is
    freed once it was packed. `shared` has matrices that are packed already; those of another
    kind or group are passed over.
    """
    states_of = own_fingerprint or fingerprint(config, tensors)
    wanted = config.architecture.layouts(config)
    kind = kind or common_kind(tensors[name] for name in wanted)
    if kind in FLOATS and group is not None:
        raise ValueError(f"group is {group}; {kind} weights have none, so leave out group=")
    group = 0 if kind in FLOATS else check_group(kind, group)
    shared = shared or {}
    matrices = {n: m for n, m in shared.items() if (m.kind, m.group) == (kind, group)}
    for name in matrices:
        del tensors[name]
    wanted = {name: to for name, to in wanted.items() if name not in matrices}
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
    return NativeEngine(config, matrices, vectors, states_of, threads=threads, initial=initial)


def _quantize(name: str, weight: Tensor, kind: Kind, group: int) -> Quantized:
    try:
        return quantize(weight, kind, group)  # type: ignore[arg-type]
    except ValueError as error:
        raise ValueError(f"{name} cannot be quantized: {error}") from None


def check_backend(backend: Backend, device: torch.device) -> None:
    """ValueError if a backend is unknown, or was named and cannot run on the device."""
    if backend not in (known := get_args(Backend)):
        raise ValueError(f"backend is {backend!r}; wanted one of {', '.join(known)}")
    if backend == "native" and not (device.type == "cpu" and native.is_available()):
        reason = "were not built" if device.type == "cpu" else f"run on the CPU, not on {device}"
        raise ValueError(f"the native kernels {reason}; `receptance doctor` says more")
    if backend == "triton" and not (device.type == "cuda" and _has_triton()):
        reason = (
            "want Triton" if device.type == "cuda" else f"run on an NVIDIA GPU, not on {device}"
        )
        raise ValueError(f"the GPU kernels {reason}; `receptance doctor` says more")


def _choose(backend: Backend, device: torch.device, config: ModelConfig) -> Backend:
    """Choose the backend for a model; a backend that was named refuses versions it does not run."""
    if backend == "native":
        check_supported(config)
    if backend != "auto":
        return backend
    if device.type == "cpu":
        return "native" if native.is_available() and supports(config) else "torch"
    supported = config.architecture.gpu_kernels is not None
    return "triton" if device.type == "cuda" and _has_triton() and supported else "torch"


def _has_triton() -> bool:
    return find_spec("triton") is not None


def _check_effect(options: EngineOptions, chosen: Backend, config: ModelConfig) -> None:
    """ValueError for options that the chosen backend would ignore."""
    if options.threads is not None and chosen != "native":
        raise ValueError(
            f"threads is {options.threads}; only the native kernels take that, and this model runs "
            f"with {chosen}, so leave out threads="
        )
    if chosen == "torch" and options.group is not None:
        raise ValueError(
            f"group is {options.group}; torch runs no integer weights, so leave out group="
        )
    if chosen == "torch" and options.dtype not in (None, *_TORCH_DTYPES):
        kernels = (
            "run the others on a CPU (`receptance doctor` says if they were built)"
            if supports(config)
            else f"do not run RWKV-{config.version}"
        )
        raise ValueError(
            f"dtype is {options.dtype}; torch runs {' and '.join(_TORCH_DTYPES)} only, and the "
            f"native kernels {kernels}"
        )


def _check_quantized(opened: Opened, options: EngineOptions) -> None:
    """ValueError if options ask for other weights than a quantized directory holds."""
    opened.check_version()
    about = quantization_of(opened)
    if options.adapter is not None:
        if options.dtype is None:
            raise ValueError(
                f"{opened.path} holds {about.kind} weights, which become floats when an adapter "
                "is added; choose their type with dtype=, or load the model that was quantized"
            )
        return
    if options.backend != "torch" and options.dtype not in (None, about.kind):
        raise ValueError(
            f"{opened.path} holds {about.kind} weights and {options.dtype} was asked for; leave "
            "out dtype=, or load the model that was quantized"
        )
    if options.group not in (None, about.group):
        raise ValueError(
            f"{opened.path} has groups of {about.group} and {options.group} was asked for; leave "
            "out group="
        )


def _packed_engine(
    found: QuantizedModel, chosen: Backend, device: torch.device, options: EngineOptions
) -> Engine:
    parts = found.config, found.matrices, found.vectors, found.about.source
    if chosen == "native":
        return NativeEngine(*parts, threads=options.threads, copy_at_pass=_MAPPED_PASSES + 1)
    from receptance.engine.gpu import GpuEngine  # This module imports Triton.

    return GpuEngine(*parts, device=device)


def _torch_engine(
    opened: Opened,
    config: ModelConfig,
    tensors: dict[str, Tensor],
    device: torch.device,
    options: EngineOptions,
) -> Engine:
    dtype = None if options.dtype is None else FLOATS[options.dtype]  # type: ignore[index]
    model = as_model(config, tensors, device, dtype)
    widen(model)
    if options.adapter is not None:
        return AdaptedModel(model, load_adapter(options.adapter, model))
    if opened.kind == "quantized":
        model.origin = quantization_of(opened).source
    return model


def _kernel_engine(
    config: ModelConfig,
    tensors: dict[str, Tensor],
    chosen: Backend,
    device: torch.device,
    options: EngineOptions,
    beside: Engine | None,
) -> Engine:
    initial = states_of = shared = None
    kind = options.dtype or common_kind(tensors[n] for n in config.architecture.layouts(config))
    if options.adapter is not None:
        base = as_model(config, tensors)
        adapter, own = load_adapter(options.adapter, base), base.fingerprint()
        if isinstance(beside, NativeEngine) and chosen == "native" and beside.fingerprint() == own:
            changed = adapter.changed()
            shared = {name: m for name, m in beside.packed.items() if name not in changed}
        model, states_of, initial = with_adapter(base, adapter, own)
        tensors = dict(model.state_dict())
    if chosen == "native":
        return native_engine(
            config,
            tensors,
            kind,
            group=options.group,
            threads=options.threads,
            initial=initial,
            own_fingerprint=states_of,
            shared=shared,
        )
    from receptance.engine.gpu import gpu_engine  # This module imports Triton.

    return gpu_engine(
        config,
        tensors,
        kind,
        group=options.group,
        device=device,
        initial=initial,
        own_fingerprint=states_of,
    )
