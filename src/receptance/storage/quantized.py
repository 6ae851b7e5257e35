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
from typing import NamedTuple

import torch
from torch import Tensor

from receptance.config import ModelConfig
from receptance.formats.files import reason
from receptance.formats.names import some, tensor_shapes
from receptance.formats.safetensors import read_safetensors, write_safetensors
from receptance.formats.writing import Schema
from receptance.quantize import Quantized, QuantizedKind, check_group
from receptance.quantize.packing import Packed, dtypes, pack, shapes, unpack
from receptance.storage.directories import write_directory
from receptance.storage.opening import FORMAT_VERSION, QUANTIZED_FORMAT, Opened, look, open_path
from receptance.storage.pairing import check_tokenizer, stored_with, tokenizer_in
from receptance.tokenizer import Tokenizer

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
    tokenizer: Tokenizer | None
    matrices: dict[str, Packed]
    """By official name."""
    vectors: dict[str, Tensor]
    """All other tensors, float32 in official shapes."""
    about: About


def write_quantized(
    directory: str | Path,
    config: ModelConfig,
    tokenizer: Tokenizer | None,
    about: About,
    weights: Iterable[tuple[str, Quantized | Tensor]],
) -> None:
    """Write a model's tensors as they come (see quantize_tensors), packed, and its tokenizer.

    The directory appears whole or not at all (see write_directory).
    """
    if tokenizer is not None:
        check_tokenizer(tokenizer, config)
    plan = _plan(config, about)

    def write(folder: Path) -> None:
        write_safetensors(folder / WEIGHTS, plan, _packed(config, weights))
        fields = {
            "format": QUANTIZED_FORMAT,
            "format_version": FORMAT_VERSION,
            "model": config.to_dict(),
            "tokenizer": stored_with(config, folder, tokenizer),
            "quantisation": asdict(about),
        }
        (folder / "config.json").write_text(json.dumps(fields, indent=1))

    write_directory(directory, write)


def read_quantized(directory: str | Path) -> QuantizedModel:
    """What `write_quantized` wrote; ValueError if a bit of it differs or it is something else."""
    return open_quantized(open_path(directory))


def open_quantized(opened: Opened) -> QuantizedModel:
    """The same of what `open_path` found."""
    directory, fields = opened.path, opened.fields
    _check_kind(opened)
    try:
        config, about = ModelConfig.from_dict(fields["model"]), quantization_of(opened)
        tokenizer = tokenizer_in(directory, fields["tokenizer"])
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


def quantization_of(opened: Opened) -> About:
    """What the codes in a directory are, and whose; TypeError or KeyError if it does not say."""
    return About(**opened.fields["quantisation"])  # The files are older than this spelling.


def is_quantized(directory: str | Path) -> bool:
    """Whether there is a directory that `write_quantized` wrote, in whatever condition."""
    try:
        return look(Path(directory)).kind == "quantized"
    except ValueError:
        return False


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


def _plan(config: ModelConfig, about: About) -> Schema:
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


def _check_kind(opened: Opened) -> None:
    if opened.kind != "quantized":
        raise ValueError(f"{opened.path} holds no model that `receptance quantize` wrote")
    opened.check_version()


def _check(file: Path, tensors: dict[str, Tensor], plan: Schema) -> None:
    """ValueError unless these are the tensors of the plan: kernels believe their addresses."""
    found = {name: (x.dtype, tuple(x.shape)) for name, x in tensors.items()}
    if wrong := [name for name in {**plan, **found} if plan.get(name) != found.get(name)]:
        raise ValueError(
            f"{file}: tensors are missing, unexpected or of the wrong shape: {some(wrong)}"
        )
