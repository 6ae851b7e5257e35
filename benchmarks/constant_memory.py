"""Generating and reading a million tokens: does the last one cost what the first one did?

    python benchmarks/constant_memory.py [--tokens 1000000] [--size small] [--dtype int8]

Through `Generation`, text and sampling included. Every token is timed: medians of the first and the
last 1,000 and of tenths of the run, so that a machine that was busy for a while shows. What such a
machine cannot distort is the last comparison: the long text and a new one go on in turns, a token
of each. Then the peak of memory while prompts are read, of 1,000 tokens and of as many as were
generated. Linux only: memory is what /proc says. JSON on the last line.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from _common import report
from rich.progress import track
from safetensors.torch import save_file

from receptance.config import PUBLISHED_SIZES, ModelConfig
from receptance.engine import load_engine
from receptance.engine.base import Engine
from receptance.inference.generation import Generation, Token, prefill
from receptance.inference.measure import NumberedTokens, random_tensors, resident_bytes, seconds

SIZES = {"small": ModelConfig(vocab_size=1024, width=128, num_layers=3)} | PUBLISHED_SIZES
WINDOW = 1000
STEADY = 0.05
GROWTH_LIMIT = 1e6  # bytes; an allocator may take a page more or less


def main() -> None:
    """Load, generate, read, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--size", default="small", choices=SIZES)
    parser.add_argument("--dtype", default="float32", help="of the weights, as for load_engine")
    options = parser.parse_args()
    if options.tokens < 2 * WINDOW:
        parser.error(f"--tokens must be at least {2 * WINDOW}")
    sizes = SIZES[options.size]
    tokenizer = NumberedTokens(sizes.vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "random.safetensors")
        save_file(random_tensors(sizes), path)
        engine, _ = load_engine(path, tokenizer=tokenizer, dtype=options.dtype)
    results: dict[str, object] = {"model": f"{options.size}, {options.dtype}"}
    results |= generation(engine, tokenizer, options.tokens)
    results |= reading(engine, options.tokens)
    report(results)


def generation(engine: Engine, tokenizer: NumberedTokens, tokens: int) -> dict[str, object]:
    """Time per token, and resident memory, from one end of a long text to the other."""
    stream = start(engine, tokenizer, tokens + WINDOW)
    times = np.ones(tokens)  # written to, so that it is there before memory is looked at
    resident: list[int] = []
    for begin in track(range(0, tokens, WINDOW), description="generating"):
        for at in range(begin, min(begin + WINDOW, tokens)):
            times[at] = seconds(lambda: next(stream))
        resident.append(resident_bytes() or 0)
    growth = max(resident) - resident[0]
    first, last = milliseconds(times[:WINDOW]), milliseconds(times[-WINDOW:])
    long, new = in_turns(stream, start(engine, tokenizer, WINDOW + 1))
    return {
        "tokens generated": tokens,
        "ms/token, first 1,000": first,
        "ms/token, last 1,000": last,
        "last / first": last / first,
        "ms/token, tenths": [round(milliseconds(part), 4) for part in np.array_split(times, 10)],
        "in turns: 1,000 more / first 1,000 of a new text": long / new,
        "resident MB after 1,000": resident[0] / 1e6,
        "resident MB at the end": resident[-1] / 1e6,
        "growth at most, bytes": growth,
        "last / first within 5 %": abs(last / first - 1) <= STEADY,
        "in turns within 5 %": abs(long / new - 1) <= STEADY,
        "memory is constant": growth <= GROWTH_LIMIT,
    }


def start(engine: Engine, tokenizer: NumberedTokens, tokens: int) -> Iterator[Token]:
    """A text of its own."""
    return iter(Generation(engine, tokenizer, [[1]], max_tokens=tokens, ignore_end_of_text=True))


def in_turns(one: Iterator[Token], other: Iterator[Token]) -> tuple[float, float]:
    """Milliseconds per token of both, the median of 1,000."""
    next(other)  # its prompt
    pairs = [(seconds(lambda: next(one)), seconds(lambda: next(other))) for _ in range(WINDOW)]
    first, second = np.array(pairs).T
    return milliseconds(first), milliseconds(second)


def milliseconds(times: np.ndarray) -> float:
    """The median of seconds."""
    return float(np.median(times)) * 1e3


def reading(engine: Engine, tokens: int) -> dict[str, object]:
    """Peak memory over the loaded model while prompts are read."""
    prompt = [at * 7919 % engine.config.vocab_size for at in range(tokens)]
    prefill(engine, [prompt[:WINDOW]])
    found: dict[str, object] = {}
    for length in (WINDOW, tokens):
        piece = prompt[:length]
        before = resident_bytes() or 0
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        took = seconds(lambda piece=piece: prefill(engine, [piece]))
        found[f"prompt of {length:,}: tokens/s"] = length / took
        found[f"prompt of {length:,}: peak MB over the loaded model"] = (peak() - before) / 1e6
    return found


def peak() -> int:
    """The most bytes that were resident since the peak began."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024


if __name__ == "__main__":
    main()
