"""Directories of quantized models, packed as the kernels read them: nothing is converted.

config.json                              sizes, tokenizer, format of the codes, their origin
weights.safetensors                      NAME and NAME:params for matrices, NAME for the rest
tokenizer.json or rwkv_vocab.txt         nothing for bytes
manifest.json                            see receptance.storage.manifest
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from receptance.config import ModelConfig
from receptance.formats.files import reason
from receptance.formats.names import some, tensor_shapes
from receptance.formats.safetensors import read_safetensors, write_safetensors
from receptance.formats.writing import Layout as Plan
from receptance.quantize import Quantized, QuantizedKind, check_group
from receptance.quantize.packing import Packed, dtypes, pack, shapes, unpack
from receptance.storage.directories import existing, write_directory
from receptance.storage.manifest import verify
from receptance.storage.pairing import check_tokenizer
from receptance.tokenizer import Tokenizer, stored_tokenizer

FORMAT = "receptance-quantised"
FORMAT_VERSION = 1
WEIGHTS = "weights.safetensors"
_PARAMS = ":params"


@dataclass(frozen=True, kw_only=True)
class About:
    """What the codes of a model are and whose they are."""

    kind: QuantizedKind
    group: int
    """Inputs that share a scale."""
    calibration_tokens: int = 0
    """Of the text that the codes were fitted to; 0 without one."""
    source: str
    """The fingerprint of the model that was quantized; its states go on here."""

    def __post_init__(self) -> None:
        if not isinstance(self.group, int):
            raise ValueError(f"group is {reprlib.repr(self.group)}; it must be a whole number")
        check_group(self.kind, self.group)
        if not isinstance(self.source, str):
            raise ValueError(f"source is a {type(self.source).__name__}; it must be a fingerprint")


class QuantizedModel(NamedTuple):
    """A directory's content; tensors stay mapped to its file."""

    config: ModelConfig
    tokenizer: Tokenizer
    matrices: dict[str, Packed]
    """By official name."""
    vectors: dict[str, Tensor]
    """All other tensors, float32 in official shapes."""
    about: About


def write_quantized(
    directory: str | Path,
    config: ModelConfig,
    tokenizer: Tokenizer,
    about: About,
    weights: Iterable[tuple[str, Quantized | Tensor]],
) -> None:
    """Write a model's tensors as they come (see quantize_tensors), packed, and its tokenizer.

    The directory appears whole or not at all (see write_directory).
    """
    check_tokenizer(tokenizer, config)
    plan = _plan(config, about)

    def write(folder: Path) -> None:
        write_safetensors(folder / WEIGHTS, plan, _packed(config, weights))
        fields = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "model": config.to_dict(),
            "tokenizer": {
                "kind": tokenizer.kind,
                "files": tokenizer.save(folder),
                "fingerprint": tokenizer.fingerprint,
            },
            "quantisation": asdict(about),
        }
        (folder / "config.json").write_text(json.dumps(fields, indent=1))

    write_directory(directory, write)


def read_quantized(directory: str | Path) -> QuantizedModel:
    """What `write_quantized` wrote; ValueError if a bit of it differs or it is something else."""
    directory = existing(directory)
    verify(directory)
    return open_quantized(directory)


def open_quantized(directory: Path) -> QuantizedModel:
    """The same for a directory that has been verified."""
    fields = _read_config(directory)
    try:
        config, about = ModelConfig.from_dict(fields["model"]), About(**fields["quantisation"])
        tokenizer = stored_tokenizer(directory, fields["tokenizer"])
    except (KeyError, TypeError) as error:
        file = directory / "config.json"
        raise ValueError(f"{file}: a field is wrong: {reason(error)}") from None
    tensors = read_safetensors(directory / WEIGHTS)
    if config.num_layers > len(tensors):  # before a plan is made for all of them
        raise ValueError(f"{directory / WEIGHTS} has fewer tensors than config.json has layers")
    _check(directory / WEIGHTS, tensors, _plan(config, about))
    wanted = tensor_shapes(config)
    matrices = {}
    for name, layout in config.architecture.layouts(config).items():
        outputs, inputs = wanted[name]
        parts = tensors[name], tensors[name + _PARAMS]
        matrices[name] = Packed(about.kind, layout, outputs, inputs, about.group, *parts)
    vectors = {name: tensors[name] for name in wanted if name not in matrices}
    return QuantizedModel(config, tokenizer, matrices, vectors, about)


def source_of(directory: Path) -> str:
    """The fingerprint of the model that was quantized; the directory has been verified."""
    return About(**_read_config(directory)["quantisation"]).source


def is_quantized(directory: str | Path) -> bool:
    """Whether there is a directory that `write_quantized` wrote, in whatever condition."""
    try:
        fields = json.loads((Path(directory) / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(fields, dict) and fields.get("format") == FORMAT


def dequantized_tensors(
    model: QuantizedModel, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """All tensors by official name, matrices as floats again: what Model.from_tensors wants."""
    found = dict(model.vectors)
    for name, packed in model.matrices.items():
        matrix = unpack(packed)
        assert isinstance(matrix, Quantized)
        found[name] = matrix.dequantize().to(dtype)
    return found


def _plan(config: ModelConfig, about: About) -> Plan:
    plan: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    layout_of = config.architecture.layouts(config)
    for name, shape in tensor_shapes(config).items():
        if (layout := layout_of.get(name)) is None:
            plan[name] = torch.float32, shape
            continue
        names = name, name + _PARAMS
        wanted = shapes(about.kind, layout, shape[0], shape[1], about.group)
        for part, dtype, size in zip(names, dtypes(about.kind), wanted, strict=True):
            assert dtype is not None
            assert size is not None
            plan[part] = dtype, size
    return plan


def _packed(
    config: ModelConfig, weights: Iterable[tuple[str, Quantized | Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    layout_of = config.architecture.layouts(config)
    for name, weight in weights:
        if isinstance(weight, Tensor):
            yield name, weight
            continue
        packed = pack(weight, layout_of[name])
        assert packed.params is not None
        yield name, packed.data
        yield name + _PARAMS, packed.params


def _read_config(directory: Path) -> dict[str, Any]:
    file = directory / "config.json"
    if not is_quantized(directory):
        raise ValueError(f"{directory} holds no model that `receptance quantize` wrote")
    fields: dict[str, Any] = json.loads(file.read_bytes())
    if (version := fields.get("format_version")) != FORMAT_VERSION:
        raise ValueError(
            f"{file} has format version {reprlib.repr(version)}; this release reads "
            f"{FORMAT_VERSION}, so update receptance"
        )
    return fields


def _check(file: Path, tensors: dict[str, Tensor], plan: Plan) -> None:
    """ValueError unless these are the tensors of the plan: kernels believe their addresses."""
    found = {name: (x.dtype, tuple(x.shape)) for name, x in tensors.items()}
    if wrong := [name for name in {**plan, **found} if plan.get(name) != found.get(name)]:
        raise ValueError(
            f"{file}: tensors are missing, unexpected or of the wrong shape: {some(wrong)}"
        )
