"""Directories of quantized models, packed as the kernels read them, so that loading is mapping.

config.json                         the sizes, the tokenizer, the format and origin of the codes
weights.safetensors                 NAME and NAME:params for matrices, NAME for other tensors
tokenizer.json or rwkv_vocab.txt    the tokenizer; the byte tokenizer has no file
manifest.json                       the digests (see receptance.storage.manifest)
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
    """The format of a model's integer codes, and the model that they came from."""

    kind: QuantizedKind
    group: int
    """The number of inputs that share a scale."""
    calibration_tokens: int = 0
    """The tokens of the text that the codes were fitted to; 0 if there was none."""
    source: str
    """The fingerprint of the model that was quantized; states of that model fit this one."""

    def __post_init__(self) -> None:
        if not isinstance(self.group, int):
            raise ValueError(f"group is {reprlib.repr(self.group)}; it must be a whole number")
        check_group(self.kind, self.group)
        if not isinstance(self.source, str):
            raise ValueError(f"source is a {type(self.source).__name__}; it must be a fingerprint")


class QuantizedModel(NamedTuple):
    """The content of a directory; its tensors stay mapped to the file."""

    config: ModelConfig
    tokenizer: Tokenizer | None
    matrices: dict[str, Packed]
    """The packed matrices, by official name."""
    vectors: dict[str, Tensor]
    """All other tensors, float32 in their official shapes, by official name."""
    about: About


def write_quantized(
    directory: str | Path,
    config: ModelConfig,
    tokenizer: Tokenizer | None,
    about: About,
    weights: Iterable[tuple[str, Quantized | Tensor]],
) -> None:
    """Pack and write a model's tensors, one after another, and its tokenizer.

    `weights` is what quantize_tensors yields. The directory appears whole or not at all (see
    write_directory).
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
    """Read what `write_quantized` wrote; ValueError if that is damaged or something else."""
    return open_quantized(open_path(directory))


def open_quantized(opened: Opened) -> QuantizedModel:
    """Read what `write_quantized` wrote, from what `open_path` found."""
    directory, fields = opened.path, opened.fields
    _check_kind(opened)
    try:
        config, about = ModelConfig.from_dict(fields["model"]), quantization_of(opened)
        tokenizer = tokenizer_in(directory, fields["tokenizer"])
    except (KeyError, TypeError) as error:
        file = directory / "config.json"
        raise ValueError(f"{file}: a field is wrong: {reason(error)}") from None
    tensors = read_safetensors(directory / WEIGHTS)
    if config.num_layers > len(tensors):  # A damaged number would make the plan endless.
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
    """Read the format and origin of the codes; ValueError if fields are missing or wrong."""
    try:
        return About(**opened.fields["quantisation"])  # The format keeps the older, British name.
    except (KeyError, TypeError) as error:
        file = opened.path / "config.json"
        raise ValueError(f"{file}: a field is wrong: {reason(error)}") from None


def is_quantized(directory: str | Path) -> bool:
    """Whether `write_quantized` wrote the directory, even if it is damaged by now."""
    try:
        return look(Path(directory)).kind == "quantized"
    except ValueError:
        return False


def dequantized_tensors(
    model: QuantizedModel, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """All tensors by official name, with matrices dequantized, as Model.from_tensors wants them."""
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
    """ValueError unless the tensors fit the plan: kernels would read past the end of others."""
    found = {name: (x.dtype, tuple(x.shape)) for name, x in tensors.items()}
    if wrong := [name for name in {**plan, **found} if plan.get(name) != found.get(name)]:
        raise ValueError(
            f"{file}: tensors are missing, unexpected or of the wrong shape: {some(wrong)}"
        )
