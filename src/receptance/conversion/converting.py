"""Converting weights from one format to another, tensor by tensor, and checking the result.

The ordinary reader reads what was written, and that is compared with the source before it gets its
name. The conversion takes a few hundred megabytes of memory besides the largest tensor.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from receptance.conversion.comparing import (
    Difference,
    Same,
    difference,
    differing,
    equal,
    near,
    probe,
)
from receptance.conversion.source import Note, Source, Streamed, open_source
from receptance.conversion.target import DIRECTORIES, Target
from receptance.errors import one_line
from receptance.formats import hf
from receptance.formats.ggmf import check_ggmf, decay_parameter, stored_decay, write_ggmf
from receptance.formats.ggml import BLOCK, KINDS
from receptance.formats.gguf import check_gguf, write_gguf
from receptance.formats.hf_config import check_hf
from receptance.formats.names import some
from receptance.formats.pth import write_pth
from receptance.formats.safetensors import write_safetensors
from receptance.formats.writing import Schema
from receptance.sealed import MANIFEST
from receptance.storage.checkpoint import write_description
from receptance.storage.directories import Draft, existing
from receptance.storage.manifest import sync, write_manifest
from receptance.storage.pairing import found_tokenizer
from receptance.tokenizer import Tokenizer
from receptance.tokenizer.files import (
    BPE_CONFIG,
    BPE_FILE,
    WORLD_FILE,
    WORLD_PUBLISHED,
    find_tokenizer,
)

PASSES = 5
"""The number of times that values are read: three times from the source, twice from the copy."""

_USUAL_EPSILON = 1e-5
# The formats of which the tokenizer is a part.
_WITH_TOKENIZER = ("receptance", "gguf")

# The largest difference of a logit, relative to the largest logit, that a type of the copy allows:
# a quantized type, a narrower float type, and a type that holds the source exactly.
_LIMITS = {"Q4_0": 1.0, "Q8_0": 0.2}
_NARROWED, _EXACT = 0.1, 1e-5
# The largest difference of a quantized value, relative to the largest value in its block: one step
# of the codes, and 1 % of it for the rounding of scales to float16.
_STEPS = {"Q4_0": 1.01 / 8, "Q8_0": 1.01 / 127}


@dataclass(frozen=True)
class Report:
    """The result of a conversion."""

    difference: Difference
    """The difference between the logits of the source and of the copy, both in float32."""
    bytes: int
    """The size of everything that was written."""
    dtypes: tuple[str, ...]
    """The types of the matrices in the copy."""
    decays_rounded: bool
    """Whether some decays changed in their last bit, as rwkv.cpp files hold their exponentials."""


def convert(source: Source, target: Target, note: Note = lambda name, values: None) -> Report:
    """Write a model in another format, read it back, compare it, and only then give it its name.

    The tokenizer is written too, into the directory or beside the file. ValueError when something
    is at the target's path, when the format cannot hold the model, or when the copy differs from
    the source by more than its types explain; nothing is kept then.
    """
    check(source, target)
    with one_line(target.path):
        draft = Draft.begin(target.path)
        try:
            return _convert(source, target, draft, note)
        finally:
            draft.discard()


def check(source: Source, target: Target) -> None:
    """ValueError when it is known before anything is written that the conversion would fail."""
    _check_absent(target.path)
    config = source.config
    if target.format not in DIRECTORIES and config.layer_norm_epsilon != _USUAL_EPSILON:
        raise ValueError(
            f"the layer_norm_epsilon of {source.path} is {config.layer_norm_epsilon}, and a file "
            f"has no place for it: every reader takes {_USUAL_EPSILON}; "
            'use format="hf" or format="receptance"'
        )
    if target.format == "hf":
        check_hf(config)
    if target.format == "ggmf":
        check_ggmf(config)
    if target.format == "gguf":
        check_gguf(config, target.dtype)
    if target.format not in DIRECTORIES:
        _check_beside(source, target)


# ---- steps --------------------------------------------------------------------------------------


def _convert(source: Source, target: Target, draft: Draft, note: Note) -> Report:
    layout = target.layout(source)
    path = draft.folder if target.format in DIRECTORIES else draft.folder / target.path.name
    entries = None
    try:
        _write(source, target, path, Streamed(source, note))
        if target.format == "receptance":
            entries = draft.seal()
            write_manifest(draft.folder, entries)
        found = _compare(source, target, open_source(path), note)
    except ValueError as error:
        # The message names the final path, not the temporary one.
        raise ValueError(str(error).replace(str(path), str(target.path))) from None
    size = sum(file.stat().st_size for file in draft.folder.iterdir())
    if entries is not None:
        _check_absent(target.path)
        draft.finish(entries)
    else:
        _publish(draft.folder, source, target)
    rounded = target.format == "ggmf" and _decays_rounded(source)
    return Report(found, size, _matrix_types(target, layout), rounded)


def _write(source: Source, target: Target, path: Path, tensors: Streamed) -> None:
    layout = target.layout(source)
    folder = path if target.format in DIRECTORIES else path.parent
    ordered = ((name, tensors[name]) for name in layout)
    if target.format == "hf":
        hf.write_hf(path, source.config, layout, tensors, target.shard_bytes)
    elif target.format == "receptance":
        write_safetensors(path / "model.safetensors", layout, ordered)
        write_description(source.config, path, source.tokenizer)
    elif target.format == "ggmf":
        write_ggmf(path, source.config, tensors, target.kind(source))
    elif target.format == "gguf":
        write_gguf(path, source.config, tensors, target.kinds(source), source.tokenizer)
    elif target.format == "pth":
        write_pth(path, layout, tensors)
    else:
        write_safetensors(path, layout, ordered)
    if source.tokenizer is not None and target.format not in _WITH_TOKENIZER:
        _write_tokenizer(folder, source.tokenizer, target)


def _write_tokenizer(folder: Path, tokenizer: Tokenizer, target: Target) -> None:
    names = tokenizer.save(folder)
    if target.format == "hf" and WORLD_FILE in names:
        # Packages for transformers, and llama.cpp, look for the published name alone.
        (folder / WORLD_FILE).rename(folder / WORLD_PUBLISHED)
    if target.format == "hf" and BPE_FILE in names:
        file = folder / BPE_CONFIG
        own = json.loads(file.read_bytes()) if BPE_CONFIG in names else {}
        fields = hf.tokenizer_fields(tokenizer.decode([tokenizer.end_of_text])) | own
        file.write_text(json.dumps(fields, indent=2) + "\n")


def _compare(source: Source, target: Target, written: Source, note: Note) -> Difference:
    if written.config != source.config:
        raise ValueError(f"{written.path}: read back, it has other sizes; nothing was kept")
    there, here = Streamed(source, note), Streamed(written, note)
    found = _compare_logits(source, target, written, there, here)
    if wrong := differing(source.config, there, here, _same(source, target)):
        raise ValueError(
            f"{written.path}: read back, these tensors differ: {some(wrong)}; nothing was kept"
        )
    return found


def _compare_logits(
    source: Source, target: Target, written: Source, there: Streamed, here: Streamed
) -> Difference:
    wanted = probe(source.config, there)
    if not wanted.isfinite().all():
        raise ValueError(
            f"the logits of {source.path} are not all finite, so there is nothing to compare with;"
            " receptance inspect names the tensors"
        )
    found = difference(wanted, probe(written.config, here))
    if not found.relative <= (limit := _limit(source, target)):
        raise ValueError(
            f"{written.path}: its logits differ by {found.relative:.1e} of the largest, more than "
            f"{limit:.0e}; nothing was kept; choose a wider dtype="
        )
    return found


def _limit(source: Source, target: Target) -> float:
    if target.dtype in _LIMITS:
        return _LIMITS[target.dtype]
    for name, (dtype, _) in target.layout(source).items():
        if torch.promote_types(dtype, source.dtypes[name]) != dtype:
            return _NARROWED
    return _EXACT


def _same(source: Source, target: Target) -> Same:
    """A comparison of each tensor with its copy: exact, or near for quantized tensors."""
    layout, version = target.layout(source), source.config.architecture
    # Directories of transformers have no place for them, and llama.cpp wants others instead.
    dropped = version.unused(source.config) if target.format in ("hf", "gguf") else ()
    kinds = target.kinds(source) if target.format in ("gguf", "ggmf") else {}

    def same(name: str, there: Tensor, here: Tensor) -> bool:
        if name in dropped:
            return True
        dtype, _ = layout[name]
        if (stored := kinds.get(name)) in _STEPS:
            return near(there, here, BLOCK, _STEPS[stored])
        if target.format == "ggmf" and version.is_static_decay(name):
            number = source.config.version
            there = decay_parameter(stored_decay(there, number), name, number)
        return equal(there, here, dtype)

    return same


def _decays_rounded(source: Source) -> bool:
    tensors, version = source.open(), source.config.architecture
    decays = [(name, tensors[name]) for name in tensors if version.is_static_decay(name)]
    number = source.config.version
    return any(
        not torch.equal(decay_parameter(stored_decay(x, number), n, number), x.float())
        for n, x in decays
    )


def _publish(folder: Path, source: Source, target: Target) -> None:
    """Sync the files of the folder and move them to their place, weights after the tokenizer."""
    for file in folder.iterdir():
        sync(file)
    _check_absent(target.path)
    parent = target.path.parent
    if target.format in DIRECTORIES:
        sync(folder)
        os.rename(folder, target.path)
    else:
        if find_tokenizer(parent, source.config.vocab_size) is None:
            for file in set(folder.iterdir()) - {folder / target.path.name}:
                os.rename(file, parent / file.name)
        os.rename(folder / target.path.name, target.path)
    sync(parent)


# ---- checks -------------------------------------------------------------------------------------


def _check_absent(path: Path) -> None:
    if os.path.lexists(path) or existing(path).exists():
        raise ValueError(f"{path} exists; give another name")


def _check_beside(source: Source, target: Target) -> None:
    """ValueError when a file must not be added to the folder.

    It would damage a checkpoint, or be read with the tokenizer of another model.
    """
    folder = target.path.parent
    if (folder / MANIFEST).is_file():
        raise ValueError(f"{folder} is a checkpoint, which takes no more files; write elsewhere")
    if source.tokenizer is None or target.format in _WITH_TOKENIZER or not folder.is_dir():
        return
    beside = find_tokenizer(folder, source.config.vocab_size)
    found = found_tokenizer(beside, source.config)
    if beside and found and not found.same_as(source.tokenizer):
        raise ValueError(
            f"{beside} is the tokenizer of another model, and readers would use it for this one; "
            "write to a folder of its own"
        )


def _matrix_types(target: Target, layout: Schema) -> tuple[str, ...]:
    if target.dtype in KINDS:
        return (str(target.dtype),)
    types = {dtype for dtype, shape in layout.values() if len(shape) == 2}
    return tuple(sorted(str(dtype).removeprefix("torch.") for dtype in types))
