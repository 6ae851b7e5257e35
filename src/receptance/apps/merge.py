"""receptance merge: write a model with an adapter's changes in its weights."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import torch
import tyro
from torch import Tensor

from receptance.adapters import StateTuning, load_adapter
from receptance.adapters.time_state import SUFFIXES, write_time_state
from receptance.apps.options import parse
from receptance.apps.waiting import waiting
from receptance.model import Model
from receptance.storage.checkpoint import load, save
from receptance.storage.directories import expanded

# Rounding in float32 may change a logit by this much, relative to the largest logit.
_FLOAT32_ERROR = 1e-4
# Rounding to bfloat16 may change logits by this share of the adapter's effect.
_BFLOAT16_LOSS = 0.1
# The rows and tokens whose logits are compared.
_PROBE = (2, 64)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Write a model with an adapter's changes in its weights, and check it.

    A learned state of RWKV-7 is no change of weights: it becomes a .pth file that other tools read
    beside the model.
    """

    EXAMPLES: ClassVar[tuple[str, ...]] = (
        "receptance merge base runs/chat --out chat",
        "receptance merge base runs/state --out state.pth",
    )

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """The model that the adapter was trained on, as for `receptance generate`."""
    adapter: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="ADAPTER")]
    """The file of the adapter, or a directory with adapter.safetensors."""
    out: Path
    """Write this checkpoint directory, or for a learned state this .pth file; it must not exist."""
    tokenizer: str | None = None
    """Use this tokenizer file, or "bytes", instead of the tokenizer beside the weights."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Write the merged weights in this type; the default is the type of the model."""


def main(argv: list[str]) -> None:
    """Parse, merge, write, read back, compare."""
    options = parse(Options, argv, "receptance merge")
    out = expanded(options.out)
    if out.exists():
        raise ValueError(f"{out} exists; give another name with --out")
    with waiting("merging"):
        done = _merge(options, out)
    print(f"{done} {out}")


def _merge(options: Options, out: Path) -> str:
    """Write what is asked for, and return what was done with it."""
    model, tokenizer = load(options.model, tokenizer=options.tokenizer)
    adapter = load_adapter(options.adapter, model)
    if isinstance(adapter, StateTuning) and out.suffix in SUFFIXES:
        write_time_state(out, adapter, model)
        return "the learned state is in"
    merged = adapter.merge(model, getattr(torch, options.dtype) if options.dtype else None)
    save(merged, out, tokenizer)
    del merged  # The copy on disk is the one that is checked.
    plain = _logits(model)
    with adapter.attach(model):
        wanted = _logits(model)
    del model
    result, _ = load(out)
    try:
        _check(wanted, _logits(result), plain, result.emb.weight.dtype)
    except ValueError:
        shutil.rmtree(out)
        raise
    return "merged into"


@torch.no_grad()
def _logits(model: Model) -> Tensor:
    """The model's logits [B,T,V], in float32, for tokens that are always the same."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, _PROBE, generator=generator)
    return model(tokens, dtype=torch.float32)[0]


def _check(wanted: Tensor, got: Tensor, plain: Tensor, dtype: torch.dtype) -> None:
    """Say how far the merged model is off; ValueError if that is too much."""
    difference, effect = _relative(got, wanted), _relative(plain, wanted)
    print(
        f"logits of the merged model against model and adapter: {difference:.1e} of the largest "
        f"(the adapter changes them by {effect:.1e})"
    )
    narrow = dtype != torch.float32
    limit = max(_FLOAT32_ERROR, _BFLOAT16_LOSS * effect) if narrow else _FLOAT32_ERROR
    if not difference <= limit:
        advice = "bfloat16 is too coarse for these changes; merge with --dtype float32"
        raise ValueError(
            f"the merged logits differ by {difference:.1e}, more than {limit:.1e}; nothing was "
            f"kept. {advice if narrow else 'Check the adapter for values that are not finite'}"
        )


def _relative(x: Tensor, reference: Tensor) -> float:
    return float((x - reference).abs().max() / reference.abs().max())
