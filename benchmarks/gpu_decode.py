"""Decoding on a GPU by graphs: tokens/s, bytes and bandwidth, batch 1 to 1024, by weight type.

    python benchmarks/gpu_decode.py [--sizes 169m 1.5b] [--dtypes bfloat16 int8 int4]
    python benchmarks/gpu_decode.py --tune       products alone, over several ways to cut them

Checks first that steps and whole passes give the logits of a float32 model on the CPU. A step feeds
every row the likeliest token and includes the head. Times come from CUDA events, medians. Bytes are
what a step has to move: all weights but the embedding once, and each row's state twice. Peers, at
batch 1 in bfloat16: transformers' RWKV, and its GPT-NeoX (attention by SDPA) behind 1024 tokens.
JSON on the last line.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import statistics
import sys
from collections.abc import Callable, Iterator

import torch
from _common import report
from torch import Tensor

from receptance.config import ModelConfig, published
from receptance.engine.packing import FLOATS
from receptance.formats.names import tensor_shapes
from receptance.measure import decoder, random_tensors
from receptance.model import Model
from receptance.quantize import Quantised, check_group, quantise

KINDS = ("bfloat16", "float16", "float32", "int8", "int4")
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
OVER_ANY_CACHE = 1 << 30
STEPS, ROUNDS = 8, 9
CONTEXT = 1024  # of the Transformer
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
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("this needs an NVIDIA GPU, and torch sees none", file=sys.stderr)
        raise SystemExit(2)
    results = bandwidth()
    if options.tune:
        report(results | tune(published(options.sizes[-1]), options.dtypes, results["copy GB/s"]))
        return
    for kind in options.dtypes:
        check(kind)
    for size, kind in itertools.product(options.sizes, options.dtypes):
        results |= measure(size, kind, options.batches, results["copy GB/s"])
    if importlib.util.find_spec("transformers"):
        for size in options.sizes:
            results |= peers(size)
    report(results)


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
    one = torch.ones(OVER_ANY_CACHE // 4, device="cuda")
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
    return quantise(tensor, kind).dequantise()


def measure(size: str, kind: str, batches: list[int], copied: float) -> dict[str, float]:
    """Speed at every batch."""
    from receptance.engine.gpu import GpuEngine

    config = published(size)
    shapes = tensor_shapes(config)
    matrices = {name: random(s, kind) for name, s in shapes.items() if len(s) == 2}
    vectors = {name: torch.full(s, 0.5) for name, s in shapes.items() if len(s) != 2}
    engine = GpuEngine(config, matrices, vectors, "")
    results: dict[str, float] = {}
    for batch in batches:
        advance = decoder(engine, batch)
        took = seconds(lambda advance=advance: advance(STEPS)) / STEPS
        state = 5 * 4 * config.num_layers * config.width * batch
        moved = (engine.bytes_per_token + 2 * state) / took / 1e9
        title = f"{size} {kind} B{batch}"
        results |= {
            f"{title}: tokens/s": batch / took,
            f"{title}: MB a step": (engine.bytes_per_token + 2 * state) / 1e6,
            f"{title}: GB/s": moved,
            f"{title}: of copy": moved / copied,
        }
        print(title, f"{batch / took:,.0f} tokens/s", f"{moved / copied:.0%}", flush=True)
    return results


def random(shape: tuple[int, ...], kind: str) -> Tensor | Quantised:
    """A matrix with outputs near one, made on the GPU; codes are drawn, not searched."""
    if kind in FLOATS:
        noise = torch.randn(shape, device="cuda") / shape[-1] ** 0.5
        return noise.to(FLOATS[kind])
    group, (outputs, inputs) = check_group(kind, None), shape
    low, high, dtype = (-127, 128, torch.int8) if kind == "int8" else (0, 16, torch.uint8)
    codes = torch.randint(low, high, shape, device="cuda", dtype=dtype)
    step = (12 / inputs) ** 0.5 / (high - low)  # uniform numbers deviate by their range / sqrt(12)
    scale = torch.full((outputs, -(-inputs // group)), step, device="cuda", dtype=torch.bfloat16)
    return Quantised(kind, group, codes, scale, None if kind == "int8" else -7.5 * scale)


# ---- products alone -----------------------------------------------------------------------------


def tune(config: ModelConfig, kinds: list[str], copied: float) -> dict[str, float | str]:
    """The fastest way to cut every product of a model, for one row and for several."""
    from triton.runtime.errors import OutOfResources

    from receptance.engine.gpu_weights import stacked
    from receptance.ops.triton_products import product

    results: dict[str, float | str] = {}
    width, hidden = config.width, config.ffn_width
    shapes = {"square": (width, width), "key": (hidden, width), "value": (width, hidden)}
    shapes["head"] = config.vocab_size, width
    for kind, (name, shape), batch in itertools.product(kinds, shapes.items(), (1, 4, 16, 64)):
        one = stacked([random(shape, kind)], torch.device("cuda"))
        copies = [one] + [stacked([random(shape, kind)], torch.device("cuda"))
                          for _ in range(OVER_ANY_CACHE // 4 // one.nbytes)]  # fmt: skip
        x, out = (torch.randn(1, batch, n, device="cuda") for n in shape[::-1])
        best = (0.0, "")
        for tiles in cuts(batch):

            def run(tiles=tiles, copies=copies, x=x, out=out) -> None:
                for weights in copies:
                    product(weights, x, out, tiles=tiles)

            graph = torch.cuda.CUDAGraph()
            try:
                run()
            except OutOfResources:  # this GPU has less shared memory than these tiles want
                continue
            with torch.cuda.graph(graph):
                run()
            speed = len(copies) * one.nbytes / seconds(graph.replay, 5) / 1e9
            best = max(best, (speed, str(tiles)))
        title = f"{kind} {name} B{batch}"
        results |= {f"{title}: GB/s": best[0], f"{title}: of copy": best[0] / copied,
                    f"{title}: cut": best[1]}  # fmt: skip
        print(title, f"{best[0]:,.0f} GB/s", best[1], flush=True)
    return results


def cuts(batch: int) -> Iterator[object]:
    """Ways to cut a product."""
    from receptance.ops.triton_products import Tiles

    for warps in (2, 4, 8):
        if batch == 1:
            for rows, groups in itertools.product((1, 2, 4, 8), (4, 8, 16)):
                yield Tiles(rows=rows, groups=groups, warps=warps)
        else:
            for rows, stages in itertools.product((16, 32, 64), (3, 5)):
                yield Tiles(dot_rows=rows, stages=stages, warps=warps)


# ---- peers --------------------------------------------------------------------------------------


@torch.no_grad()
def peers(size: str) -> dict[str, float]:
    """Greedy decoding of one row with transformers."""
    from train_step import gpt_neox, transformers_rwkv

    config = published(size)
    ours = Model.from_tensors(config, random_tensors(config))
    rwkv = transformers_rwkv(ours, config).to("cuda", torch.bfloat16).eval()
    text = torch.ones(1, CONTEXT, dtype=torch.int64, device="cuda")
    token, state = text[:, :1], rwkv(text[:, :1], use_cache=True).state  # updated in place
    took = seconds(lambda: rwkv(token, state=state, use_cache=True).logits.argmax(-1))
    results = {f"{size} transformers RWKV: tokens/s": 1 / took}
    neox = gpt_neox(config).to("cuda", torch.bfloat16).eval()
    cache = neox(text, use_cache=True).past_key_values
    took = seconds(lambda: neox(token, past_key_values=cache, use_cache=True).logits.argmax(-1))
    return results | {f"{size} transformers GPT-NeoX: tokens/s": 1 / took}


if __name__ == "__main__":
    main()
