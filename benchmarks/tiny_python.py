"""How well the model that comes with the package knows Python: bits per byte of held-out modules.

    python benchmarks/tiny_python.py [MODEL ...] [--json results/tiny_python.json]

The modules are those of the standard library that the recipe tiny-python leaves out of the training
text. Each is read from an empty state behind an end-of-text token, a long one in several pieces,
which makes the figures a little worse. Beside the models (tiny-python if none is named) stands
`xz -9e` on each module alone, and on all of them as one file. Needs the library of Python 3.11, on
which the model was trained: in others the modules differ a little.
Prints a table, then JSON on the last line.
"""

from __future__ import annotations

import argparse
import json
import lzma
import sys
import sysconfig
from pathlib import Path
from typing import Any

import torch
from _common import rounded
from rich.progress import track

from receptance.engine import load_engine
from receptance.inference.measure import machine
from receptance.inference.scoring import bits_per_byte, negative_log_likelihood
from receptance.training.recipes import load_recipe


def main() -> None:
    """Read every module with every model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=["tiny-python"])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    texts = held_out(Path(sysconfig.get_path("stdlib")))
    whole = b"".join(texts.values())
    rows: dict[str, Any] = {
        "xz -9e, each alone": {name: compressed(text) for name, text in texts.items()},
    }
    for model in options.models:
        rows[model] = dict(score(model, texts))
    total = {
        name: sum(own[file] * len(texts[file]) for file in texts) / len(whole)
        for name, own in rows.items()
    }
    total["xz -9e, as one file"] = compressed(whole)
    for name in texts:
        print(f"{name:20}", *(f"{own[name]:8.3f}" for own in rows.values()))
    print(f"{'all':20}", *(f"{total[name]:8.3f}" for name in rows))
    found = {
        "what": "bits per byte of modules of Python's library that were not trained on",
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "machine": machine(),
        "bytes": {name: len(text) for name, text in texts.items()},
        "total": total,
        "by module": rows,
    }
    if options.json is not None:
        options.json.write_text(json.dumps(rounded(found), indent=1) + "\n")
    print(json.dumps(rounded(found)))


def held_out(library: Path) -> dict[str, bytes]:
    """The modules that the recipe leaves out by name, and their source text."""
    names = [name for name in load_recipe("tiny-python")["exclude"] if name.endswith(".py")]
    return {name: (library / name).read_bytes() for name in sorted(names)}


def compressed(text: bytes) -> float:
    """Bits per byte under xz -9e."""
    return 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text)


def score(model: str, texts: dict[str, bytes]) -> list[tuple[str, float]]:
    """Bits per byte of each text under a model."""
    engine, tokenizer = load_engine(model)
    assert tokenizer is not None, f"{model} has no tokenizer"
    found = []
    for name, text in track(texts.items(), description=model, transient=True):
        tokens = torch.tensor(tokenizer.encode(text))
        nats = negative_log_likelihood(engine, tokens, start=tokenizer.end_of_text)
        found.append((name, bits_per_byte(nats, len(text))))
    return found


if __name__ == "__main__":
    main()
