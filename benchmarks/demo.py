"""What `make demo` ends with: how good the model is, and that running it costs constant memory.

    python benchmarks/demo.py RUN [--seconds 15]

Prints a table, writes it to RUN/demo.json, draws RUN/constant.png (milliseconds per token and
memory of the process against the tokens generated), and says what to try next.
"""

from __future__ import annotations

import argparse
import bz2
import json
import lzma
import shlex
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.progress import Progress

from receptance.data import TokenFiles
from receptance.engine import load_engine
from receptance.engine.base import Engine
from receptance.inference.generation import Generation
from receptance.inference.measure import machine, resident_bytes
from receptance.inference.scoring import bits_per_byte, negative_log_likelihood, unigram_entropy
from receptance.tokenizer import Tokenizer

PICTURE, FIGURES = "constant.png", "demo.json"
WINDOW = 250  # tokens over which time is averaged


def main() -> None:
    """Measure, draw, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--seconds", type=float, default=15, help="how long to generate")
    options = parser.parse_args()
    engine, tokenizer = load_engine(options.run)
    assert tokenizer is not None
    results = quality(engine, tokenizer, options.run / "data")
    results |= forms(engine, options.run / "data")
    windows = generate(engine, tokenizer, options.seconds)
    results |= windows.figures()
    draw(windows, options.run / PICTURE)
    width = max(map(len, results))
    print()
    for name, value in results.items():
        print(f"{name:{width}}  {value:.4g}")
    (options.run / FIGURES).write_text(json.dumps(results | {"machine": machine()}))
    print(advice(options.run))


def quality(engine: Engine, tokenizer: Tokenizer, data: Path) -> dict[str, float]:
    """Bits per byte of the validation text: the model, and compressors on the same bytes."""
    corpus = TokenFiles.open(data)
    documents = corpus.validation[corpus.validation != corpus.end_of_text]
    text = tokenizer.decode_bytes(documents.tolist())
    nats = negative_log_likelihood(engine, corpus.validation, start=tokenizer.end_of_text)
    compressed = lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)
    return {
        "bits/byte, this model": bits_per_byte(nats, len(text)),
        "bits/byte, xz -9e": 8 * len(compressed) / len(text),
        "bits/byte, bzip2 -9": 8 * len(bz2.compress(text, 9)) / len(text),
        "bits/byte, byte frequencies": unigram_entropy(text),
        "validation text, kB": len(text) / 1000,
    }


@torch.no_grad()
def forms(engine: Engine, data: Path) -> dict[str, float]:
    """The parallel form over 512 tokens against the recurrent form, one token at a time."""
    tokens = torch.tensor(TokenFiles.open(data).validation[:512].astype("int64"))[None]
    whole, _ = engine(tokens)
    state, steps = None, []
    for t in range(tokens.shape[1]):
        logits, state = engine(tokens[:, t : t + 1], state)
        steps.append(logits)
    difference = (torch.cat(steps, 1) - whole).abs().max()
    return {"parallel - recurrent, largest logit difference": float(difference)}


@dataclass
class Windows:
    """What each WINDOW of generated tokens took."""

    milliseconds: list[float] = field(default_factory=list)
    """Per token."""
    megabytes: list[float] = field(default_factory=list)
    """Of the process, behind the window."""

    def figures(self) -> dict[str, float]:
        """The first window, the last one, and all of them."""
        found = {}
        for place in (0, -1):
            tokens = WINDOW if place == 0 else WINDOW * len(self.milliseconds)
            found[f"ms/token, after {tokens:,} tokens"] = self.milliseconds[place]
            found[f"resident MB, after {tokens:,} tokens"] = self.megabytes[place]
        mean = sum(self.milliseconds) / len(self.milliseconds)
        return found | {"tokens/s, whole run": 1000 / mean}


def generate(engine: Engine, tokenizer: Tokenizer, seconds: float) -> Windows:
    """Time per token and resident memory of one text that goes on for some seconds."""
    generation = Generation(
        engine,
        tokenizer,
        ["import "],
        max_tokens=1 << 40,
        ignore_end_of_text=True,
        log_probabilities=False,
    )
    windows = Windows()
    with Progress(transient=True) as bar:
        task = bar.add_task("generating", total=seconds)
        began = time.perf_counter()
        while (start := time.perf_counter()) - began < seconds or not windows.milliseconds:
            for _ in range(WINDOW):
                next(generation)
            windows.milliseconds.append((time.perf_counter() - start) / WINDOW * 1000)
            windows.megabytes.append((resident_bytes() or 0) / 1e6)
            bar.update(task, completed=time.perf_counter() - began)
    return windows


def draw(windows: Windows, picture: Path) -> None:
    """Time and memory against the tokens generated, both from zero."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    time_axes = figure.subplots()
    memory_axes = time_axes.twinx()
    tokens = [WINDOW * (at + 1) for at in range(len(windows.milliseconds))]
    time_axes.plot(tokens, windows.milliseconds, color="tab:blue", linewidth=1)
    memory_axes.plot(tokens, windows.megabytes, color="tab:orange")
    for axes, label, values, color in (
        (time_axes, "milliseconds per token", windows.milliseconds, "tab:blue"),
        (memory_axes, "memory of the process, MB", windows.megabytes, "tab:orange"),
    ):
        axes.set_ylabel(label, color=color)
        axes.set_ylim(0, 1.5 * sorted(values)[len(values) * 9 // 10])
    time_axes.set_xlabel("tokens generated so far")
    time_axes.set_title("the next token costs what the first one did")
    figure.savefig(picture, dpi=120)


def advice(run: Path) -> str:
    """Where the pictures are, and three things to do next."""
    command = shlex.quote(str(Path(sys.executable).with_name("receptance")))
    return f"""
pictures   {run / "loss.png"} (training), {run / PICTURE} (constant time and memory)
chat       {command} chat {shlex.quote(str(run))}
your text  {command} train my-texts/ --out runs/mine --minutes 10
weights    {command} generate RWKV-4-Pile-430M.pth "In a" --tokenizer 20B_tokenizer.json"""


if __name__ == "__main__":
    main()
