"""Decoding on a GPU by graphs: tokens/s, bytes and bandwidth, batch 1 to 1024, by weight type.

    python benchmarks/gpu_decode.py [--sizes 169m 1.5b] [--dtypes bfloat16 int8 int4] [--json FILE]
    python benchmarks/gpu_decode.py --tune --dtypes int4      products alone, cut in several ways

Checks first that steps and whole passes give the logits of a float32 model on the CPU. A step feeds
every row the likeliest token and includes the head. Times come from CUDA events, medians. Bytes are
what a step has to move: all weights but the embedding once, and each row's state twice. Peers, at
batch 1 in bfloat16: transformers' RWKV, and its GPT-NeoX (attention by SDPA) behind 1024 tokens.
By estimate a size takes four minutes, and to tune one type of weights (of the last size) three:
where time is short, each is a command of its own. JSON on the last line, also when it is
interrupted, and after each measurement in a file.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from _common import gpu_tensors, report_as_found
from torch import Tensor

from receptance.config import ModelConfig, published
from receptance.formats.names import tensor_shapes
from receptance.inference.measure import decoder, random_tensors
from receptance.model import Model
from receptance.quantize import Quantized, check_group, quantize
from receptance.quantize.packing import FLOATS

if TYPE_CHECKING:
    from receptance.ops.triton_products import Tiles
    from receptance.ops.triton_weights import Weights

KINDS = ("bfloat16", "float16", "float32", "int8", "int4")
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
OVER_ANY_CACHE = 1 << 30
STEPS, ROUNDS = 8, 9
CONTEXT = 1024  # of the Transformer
# What the present `Tiles` are compared with: rows and steps of products with one row, and
# dot_rows, shared memory and warps of those with several.
ONE_ROW_CUTS = ((1, 5), (4, 5), (1, 3), (2, 3), (4, 3), (2, 2), (2, 10))
MORE_CUTS = ((32, 64, 4), (64, 64, 4), (16, 32, 4), (32, 32, 4), (32, 64, 8))
CHECKED = ModelConfig(vocab_size=1000, width=256, num_layers=4)
# Of the largest logit: one row is multiplied in float32, more of them in the type of the weights.
ONE_ROW, MORE = 1e-3, 4e-2


def main() -> None:
    """Check, time, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["169m", "1.5b"])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "int8", "int4"], choices=KINDS)
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES))
    parser.add_argument("--tune", action="store_true", help="time products alone")
    parser.add_argument("--json", type=Path, help="a file for the results, from the first on")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("this needs an NVIDIA GPU, and torch sees none", file=sys.stderr)
        raise SystemExit(2)
    report_as_found(found(options), options.json)


def found(options: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """Everything that was asked for."""
    rates = bandwidth()
    yield "bandwidth", rates
    if options.tune:
        for kind in options.dtypes:
            yield from tune(published(options.sizes[-1]), kind, rates["copy GB/s"])
        return
    for kind in options.dtypes:
        check(kind)
    for size, kind in itertools.product(options.sizes, options.dtypes):
        yield from measure(size, kind, options.batches, rates["copy GB/s"])
    if importlib.util.find_spec("transformers"):
        for size in options.sizes:
            yield from peers(size)


def seconds(run: Callable[[], object], rounds: int = ROUNDS) -> float:
    """Median time between two events around a call, after one that is not counted."""
    run()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(events)) / 1e3


def bandwidth() -> dict[str, float]:
    """What this GPU copies and reads."""
    one = torch.randn(OVER_ANY_CACHE // 4, device="cuda")
    other = torch.empty_like(one)
    copied = 2 * one.nbytes / seconds(lambda: other.copy_(one))
    return {"copy GB/s": copied / 1e9, "read GB/s": one.nbytes / seconds(one.sum) / 1e9}


# ---- engines ------------------------------------------------------------------------------------


@torch.no_grad()
def check(kind: str) -> None:
    """The logits of a model with the same weights in float32, or no timing."""
    from receptance.engine.gpu import gpu_engine

    tensors = random_tensors(CHECKED)
    engine = gpu_engine(CHECKED, dict(tensors), kind)  # type: ignore[arg-type]
    exact = Model.from_tensors(CHECKED, {n: as_stored(x, kind) for n, x in tensors.items()})
    for rows in (1, 2, 5, 16, 64, 100):
        ids = torch.arange(rows * 8).view(rows, 8) * 7919 % CHECKED.vocab_size
        wanted, _ = exact(ids)
        logits, state = engine(ids[:, :5].cuda())
        pieces = [logits]
        for token in ids[:, 5:].cuda().split(1, dim=1):
            logits, state = engine(token, state)
            pieces.append(logits)
        whole = torch.cat(pieces, dim=1).cpu()
        agree(f"{kind}, {rows} rows", whole, wanted, MORE)
        if rows == 1:
            _, before = exact(ids[:, :5])
            agree(f"{kind}, a step", engine(ids[:, 5:6].cuda(), before.to("cuda"))[0].cpu(),
                  wanted[:, 5:6], ONE_ROW)  # fmt: skip


def agree(what: str, found: Tensor, wanted: Tensor, limit: float) -> None:
    """Exit when logits differ by more than a share of the largest."""
    error = float((found - wanted).abs().max() / wanted.abs().max())
    if not error <= limit:
        raise SystemExit(f"{what}: logits differ by {error:.1e} of the largest (> {limit})")


def as_stored(tensor: Tensor, kind: str) -> Tensor:
    """What the engine's weights stand for."""
    if tensor.dim() != 2:
        return tensor
    if kind in FLOATS:
        return tensor.to(FLOATS[kind]).float()
    return quantize(tensor, kind).dequantize()


def measure(
    size: str, kind: str, batches: list[int], copied: float
) -> Iterator[tuple[str, dict[str, float]]]:
    """Speed at every batch."""
    from receptance.engine.gpu import GpuEngine

    config = published(size)
    shapes = tensor_shapes(config)
    matrices = {name: random(s, kind) for name, s in shapes.items() if len(s) == 2}
    vectors = {name: torch.full(s, 0.5) for name, s in shapes.items() if len(s) != 2}
    engine = GpuEngine(config, matrices, vectors, "")
    for batch in batches:
        advance = decoder(engine, batch)
        took = seconds(lambda advance=advance: advance(STEPS)) / STEPS
        moved = engine.bytes_per_token + 2 * 5 * 4 * config.num_layers * config.width * batch
        yield (
            f"{size} {kind} B{batch}",
            {
                "tokens/s": batch / took,
                "MB a step": moved / 1e6,
                "GB/s": moved / took / 1e9,
                "of copy": moved / took / 1e9 / copied,
            },
        )


def random(shape: tuple[int, ...], kind: str) -> Tensor | Quantized:
    """A matrix with outputs near one, made on the GPU; codes are drawn, not searched."""
    if kind in FLOATS:
        noise = torch.randn(shape, device="cuda") / shape[-1] ** 0.5
        return noise.to(FLOATS[kind])
    group, (outputs, inputs) = check_group(kind, None), shape
    low, high, dtype = (-127, 128, torch.int8) if kind == "int8" else (0, 16, torch.uint8)
    codes = torch.randint(low, high, shape, device="cuda", dtype=dtype)
    step = (12 / inputs) ** 0.5 / (high - low)  # uniform numbers deviate by their range / sqrt(12)
    scale = torch.full((outputs, -(-inputs // group)), step, device="cuda", dtype=torch.bfloat16)
    return Quantized(kind, group, codes, scale, None if kind == "int8" else -7.5 * scale)


# ---- products alone -----------------------------------------------------------------------------


def tune(
    config: ModelConfig, kind: str, copied: float
) -> Iterator[tuple[str, dict[str, float | str]]]:
    """GB/s of every way to cut every product of a model, for one row and for several."""
    from receptance.engine.gpu_weights import stacked
    from receptance.ops.triton_products import Tiles

    width, hidden = config.width, config.ffn_width
    shapes = {"square": (width, width), "key": (hidden, width), "value": (width, hidden)}
    shapes["head"] = config.vocab_size, width
    batches = [batch for batch in (1, 4, 16, 64) if batch <= Tiles().most(kind)]
    for (name, shape), batch in itertools.product(shapes.items(), batches):
        copies = [stacked([random(shape, kind)], torch.device("cuda"))]
        for _ in range(OVER_ANY_CACHE // 4 // copies[0].nbytes):
            copies.append(stacked([random(shape, kind)], torch.device("cuda")))
        x, out = (torch.randn(1, batch, n, device="cuda") for n in shape[::-1])
        speeds = {
            cut: len(copies) * copies[0].nbytes / product_seconds(copies, x, out, tiles) / 1e9
            for cut, tiles in cuts(batch)
        }
        best = max(speeds, key=lambda cut: speeds[cut])
        shares = {"best": best, "of copy": speeds[best] / copied}
        yield f"{kind} {name} B{batch}: GB/s", speeds | shares


def product_seconds(copies: list[Weights], x: Tensor, out: Tensor, tiles: Tiles) -> float:
    """Time of the products with all of them; infinite where such tiles cannot be compiled."""
    from triton.errors import TritonError

    from receptance.ops.triton_products import product

    def run() -> None:
        for weights in copies:
            product(weights, x, out, tiles=tiles)

    try:
        run()
    except (TritonError, RuntimeError) as error:  # this GPU lacks shared memory, or ptxas fails
        print(f"{tiles}: {str(error).partition(chr(10))[0]}", flush=True)
        return math.inf
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return seconds(graph.replay, 5)


def cuts(batch: int) -> Iterator[tuple[str, Tiles]]:
    """Ways to cut a product and their names, the present one first."""
    from receptance.ops.triton_products import Tiles

    fields = ("rows", "row_steps") if batch == 1 else ("dot_rows", "shared", "warps")
    present = tuple(getattr(Tiles(), field) for field in fields)
    for sizes in (present, *(ONE_ROW_CUTS if batch == 1 else MORE_CUTS)):
        yield "/".join(map(str, sizes)), Tiles(**dict(zip(fields, sizes, strict=True)))


# ---- peers --------------------------------------------------------------------------------------


@torch.no_grad()
def peers(size: str) -> Iterator[tuple[str, dict[str, float]]]:
    """Greedy decoding of one row with transformers."""
    from train_step import gpt_neox, transformers_rwkv

    config = published(size)
    text = torch.ones(1, CONTEXT, dtype=torch.int64, device="cuda")
    token = text[:, :1]
    ours = Model.from_tensors(config, gpu_tensors(config), device="cuda")
    with torch.device("cuda"):
        rwkv = transformers_rwkv(ours, config).to(torch.bfloat16).eval()
    state = rwkv(token, use_cache=True).state  # updated in place
    took = seconds(lambda: rwkv(token, state=state, use_cache=True).logits.argmax(-1))
    yield f"{size} transformers RWKV", {"tokens/s": 1 / took}
    with torch.device("cuda"):
        neox = gpt_neox(config).to(torch.bfloat16).eval()
    cache = neox(text, use_cache=True).past_key_values
    took = seconds(lambda: neox(token, past_key_values=cache, use_cache=True).logits.argmax(-1))
    yield f"{size} transformers GPT-NeoX", {"tokens/s": 1 / took}


if __name__ == "__main__":
    main()
