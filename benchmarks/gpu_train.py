"""Training steps on a GPU in bfloat16: tokens/s, MFU, memory, against transformers.

    python benchmarks/gpu_train.py [--sizes 169m 1.5b] [--times 1024 4096] [--json FILE]

A step is forward, loss, backward, clipping and AdamW on float32 masters, of `--tokens` in rows of
`--times`. Checks first that the loss and the gradients of a short text are those of the CPU in
float32. Times come from CUDA events, medians; MFU is the share of the data sheet's bfloat16 rate
that 6 FLOPs per parameter and token of all matrix products make. Peers: transformers' GPT-NeoX
(attention by SDPA; its MFU counts 12 L C T FLOPs of attention more, as PaLM does, without halving
them for what the mask leaves out) and, for the shorter texts, its RWKV. By estimate a size takes
four minutes, half of them to compile: where time is short, each is a command of its own. JSON on
the last line, also when it is interrupted, and after each measurement in a file.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from _common import gpu_tensors, report_as_found
from torch import Tensor
from train_step import NEOX, OURS, RWKV, Step, gpt_neox, our_step, their_step, transformers_rwkv

from receptance.config import ModelConfig, published
from receptance.inference.measure import random_tensors
from receptance.model import Model
from receptance.training import head_loss
from receptance.training.devices import peak_flops

# Their RWKV goes from token to token in Python.
_LONGEST_FOR_RWKV = 1024
_CHECKED = ModelConfig(vocab_size=1000, width=256, num_layers=4)
# What bfloat16 activations may change of a loss, and of a gradient's norm, as a share of it.
_LOSS_ERROR, _GRADIENT_ERROR = 2e-3, 3e-2
_STEPS = 10


def main() -> None:
    """Check, time, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["169m", "1.5b"])
    parser.add_argument("--times", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--tokens", type=int, default=32768, help="of a step")
    parser.add_argument("--peers", nargs="*", default=[NEOX, RWKV], choices=[NEOX, RWKV])
    parser.add_argument("--json", type=Path, help="a file for the results, from the first on")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("this needs an NVIDIA GPU, and torch sees none", file=sys.stderr)
        raise SystemExit(2)
    report_as_found(found(options), options.json)


def found(options: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each candidate at each size and length."""
    check()
    candidates = (f"{OURS}, compiled", OURS, *options.peers)
    for size, length, name in itertools.product(options.sizes, options.times, candidates):
        if name != RWKV or length <= _LONGEST_FOR_RWKV:
            rows = max(1, options.tokens // length)
            title = f"{size} B{rows} T{length} {name}"
            yield title, measure(name, published(size), rows, length)


def measure(name: str, sizes: ModelConfig, rows: int, length: int) -> dict[str, float]:
    """Tokens per second, MFU and peak memory of one candidate."""
    # Or else one candidate's graphs would be generalized for the widths and lengths of the next.
    torch.compiler.reset()
    gc.collect()  # a compiled block refers to itself
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(0)
    tokens = torch.randint(sizes.vocab_size, (rows, length + 1), device="cuda")
    try:
        step = make_step(name, sizes)
        speed = rows * length / seconds(step, tokens, 2 if name == RWKV else _STEPS)
    except torch.cuda.OutOfMemoryError:
        return {"out of memory": 1.0}
    share = speed * training_flops(name, sizes, length) / peak_flops("cuda")
    return {"tokens/s": speed, "MFU": share, "peak GB": torch.cuda.max_memory_allocated() / 1e9}


def training_flops(name: str, sizes: ModelConfig, length: int) -> int:
    """Per token, forward and backward."""
    if name != NEOX:
        return sizes.training_flops_per_token
    width, layers = sizes.width, sizes.num_layers
    matrices = layers * 12 * width**2 + sizes.vocab_size * width
    return 6 * matrices + 12 * layers * width * length


def make_step(name: str, sizes: ModelConfig) -> Step:
    """A training step of a candidate with its own model and optimizer."""
    if name == NEOX:
        with torch.device("cuda"):
            return their_step(gpt_neox(sizes), torch.bfloat16)
    model = Model.from_tensors(sizes, gpu_tensors(sizes), device="cuda").train()
    if name == RWKV:
        with torch.device("cuda"):
            return their_step(transformers_rwkv(model, sizes), torch.bfloat16)
    if name != OURS:
        for block in model.blocks:
            block.compile()
    return our_step(model, torch.bfloat16)


def seconds(step: Step, tokens: Tensor, rounds: int) -> float:
    """Median time of so many steps after a few that are not counted."""
    for _ in range(min(3, rounds)):
        step(tokens)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
    events[0].record()
    for event in events[1:]:
        step(tokens)
        event.record()
    torch.cuda.synchronize()
    pairs = itertools.pairwise(events)
    return statistics.median(a.elapsed_time(b) for a, b in pairs) / 1e3


def check() -> None:
    """The loss and the gradients of the CPU in float32, or no timing."""
    tokens = torch.randint(
        _CHECKED.vocab_size, (3, 130), generator=torch.Generator().manual_seed(0)
    )
    (loss, grads), (exact_loss, exact) = (
        loss_and_gradients(device, dtype, tokens)
        for device, dtype in (("cuda", torch.bfloat16), ("cpu", torch.float32))
    )
    if abs(loss - exact_loss) > _LOSS_ERROR * exact_loss:
        raise SystemExit(f"losses differ: {loss} on the GPU and {exact_loss} on the CPU")
    error = float((grads - exact).norm() / exact.norm())
    if error > _GRADIENT_ERROR:
        raise SystemExit(f"gradients differ by {error:.2%}")


def loss_and_gradients(device: str, dtype: torch.dtype, tokens: Tensor) -> tuple[float, Tensor]:
    """Of a small model: the cross entropy and all gradients in one vector on the CPU."""
    model = Model.from_tensors(_CHECKED, random_tensors(_CHECKED), device=device).train()
    tokens = tokens.to(device)
    features, _ = model.features(tokens[:, :-1], dtype=dtype)
    loss, entropy = head_loss(features, model.head.weight, tokens[:, 1:])
    loss.backward()
    grads = [p.grad.float().flatten().cpu() for p in model.parameters() if p.grad is not None]
    return float(entropy), torch.cat(grads)


if __name__ == "__main__":
    main()
