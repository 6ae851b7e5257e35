"""What `make demo` ends with: how good the model is, and that running it costs constant memory.

    python benchmarks/demo.py RUN

Prints a table, then JSON on the last line.
"""

from __future__ import annotations

import argparse
import bz2
import itertools
import json
import lzma
import os
import subprocess
import time
from pathlib import Path

import torch
from rich.progress import track

import receptance
from receptance.data import TokenFiles
from receptance.inference.generation import Generation
from receptance.inference.scoring import bits_per_byte, negative_log_likelihood, unigram_entropy
from receptance.model import Model
from receptance.tokenizer import Tokenizer

WINDOW = 1000  # tokens over which time is averaged


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--tokens", type=int, default=50_000, help="tokens to generate")
    options = parser.parse_args()
    model, tokenizer = receptance.load(options.run)
    results = quality(model, tokenizer, options.run / "data")
    results |= forms(model, options.run / "data")
    results |= constant_cost(model, tokenizer, options.tokens)
    width = max(map(len, results))
    print()
    for name, value in results.items():
        print(f"{name:{width}}  {value:.4g}")
    print(json.dumps(results))


def quality(model: Model, tokenizer: Tokenizer, data: Path) -> dict[str, float]:
    """Bits per byte of the validation text: the model, and compressors on the same bytes."""
    corpus = TokenFiles.open(data)
    documents = corpus.validation[corpus.validation != corpus.end_of_text]
    text = tokenizer.decode_bytes(documents.tolist())
    nats = negative_log_likelihood(model, corpus.validation, start=tokenizer.end_of_text)
    return {
        "bits/byte, this model": bits_per_byte(nats, corpus.validation_bytes),
        "bits/byte, xz -9e": 8
        * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))
        / len(text),
        "bits/byte, bzip2 -9": 8 * len(bz2.compress(text, 9)) / len(text),
        "bits/byte, byte frequencies": unigram_entropy(text),
        "validation text, kB": len(text) / 1000,
    }


@torch.no_grad()
def forms(model: Model, data: Path) -> dict[str, float]:
    """The parallel form over 512 tokens against the recurrent form, one token at a time."""
    tokens = torch.tensor(TokenFiles.open(data).validation[:512].astype("int64"))[None]
    whole, _ = model(tokens)
    state, steps = None, []
    for t in range(tokens.shape[1]):
        logits, state = model(tokens[:, t : t + 1], state)
        steps.append(logits)
    difference = (torch.cat(steps, 1) - whole).abs().max()
    return {"parallel - recurrent, largest logit difference": float(difference)}


def constant_cost(model: Model, tokenizer: Tokenizer, tokens: int) -> dict[str, float]:
    """Time per token and resident memory around the 1,000th and the last generated token."""
    windows = max(1, tokens // WINDOW)
    generation = Generation(
        model, tokenizer, ["import "], max_tokens=windows * WINDOW, ignore_end_of_text=True
    )
    stream = iter(generation)
    times, results = [], {}
    for window in track(range(windows), description="generating", transient=True):
        began = time.perf_counter()
        for _ in itertools.islice(stream, WINDOW):
            pass
        times.append(time.perf_counter() - began)
        if window in (0, windows - 1):
            at = f"after {(window + 1) * WINDOW:,} tokens"
            results[f"ms/token, {at}"] = times[-1] / WINDOW * 1000
            results[f"resident MB, {at}"] = resident_megabytes()
    results["tokens/s, whole run"] = windows * WINDOW / sum(times)
    return results


def resident_megabytes() -> float:
    """Memory of this process that is in RAM."""
    output = subprocess.run(
        ["ps", "-o", "rss=", "-p", str(os.getpid())], capture_output=True, text=True, check=True
    )
    return int(output.stdout) / 1024


if __name__ == "__main__":
    main()
