"""What quantizing costs in quality: bits per byte and greedy tokens, format by format.

    python benchmarks/quantization.py MODEL [TEXT ...] [--calibrate TEXT] [--json FILE]
    python benchmarks/quantization.py MODEL --sums COUNT    of a model trained as sums.py says

Without a text MODEL is a run folder of `receptance train`, whose validation text is read, and
whose training text is calibrated with. Activations are float32 throughout. Checks that what was
written to disk is what was measured, prints a table, then JSON on the last line. With --sums it is
the share of right answers that the engine generates greedily, in float32, int8 and int4.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sums import questions
from torch import Tensor

import receptance
from receptance.apps.quantize import sample_text
from receptance.data import TokenFiles
from receptance.data.batches import Batch
from receptance.engine import load_engine
from receptance.inference.generation import generate
from receptance.inference.measure import machine
from receptance.inference.scoring import bits_per_byte, negative_log_likelihood, text_rows
from receptance.model import Model
from receptance.quantize import Quantized, quantize
from receptance.quantize.calibration import Calibration
from receptance.quantize.packing import Kind, pack
from receptance.quantize.weights import quantize_tensors
from receptance.storage.quantized import About, dequantized_tensors, read_quantized, write_quantized
from receptance.tokenizer import Tokenizer

CHUNK = 256
PIECES = 8  # of the training text, to calibrate with
ANSWERED: tuple[Kind, ...] = ("float32", "int8", "int4")
TOGETHER, DIGITS = 64, 4  # questions in a batch; digits of an answer, at most

Weights = dict[str, Tensor | Quantized]
Results = dict[str, Any]


@dataclass(frozen=True)
class Reading:
    """What a model says on a text."""

    nats: float
    """Total of the text, as negative_log_likelihood counts."""
    features: list[Tensor]
    """Chunks of [R,T,C], what goes into the head."""
    greedy: Tensor
    """[R,T] the likeliest token at each position."""
    divergence: float = 0.0
    """Total of the Kullback-Leibler divergence from the reference, in nats."""


def main() -> None:
    """Check, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path, nargs="*")
    parser.add_argument("--calibrate", type=Path)
    parser.add_argument("--calibration-tokens", type=int, default=8192)
    parser.add_argument("--tokens", type=int, default=100_000, help="of the text, at most")
    parser.add_argument("--sums", type=int, help="generate the answers to so many, instead")
    parser.add_argument("--json", type=Path, help="write the JSON to this file as well")
    options = parser.parse_args()
    if options.sums:
        right = track(ANSWERED, transient=True)
        results = [{"format": x, "right, %": answered(options, x)} for x in right]
        finish(options, results, {"questions": options.sums})
        return
    model, tokenizer = receptance.load(options.model, dtype=torch.float32)
    tokens, num_bytes = held_out(options, tokenizer)
    rows = text_rows(tokens, start=tokenizer.end_of_text)
    reference = read(model, rows)
    check(model, tokenizer, tokens, reference)
    calibration = calibrate(options, model, tokenizer)
    exact = {name: x.clone() for name, x in model.state_dict().items()}
    results = []
    names = set(model.config.architecture.layouts(model.config))
    for name, weights in track(list(formats(exact, names, calibration)), transient=True):
        found = weights()
        model.load_state_dict({n: floats(x) for n, x in found.items()})
        results.append({"format": name, "bits/weight": bits_per_weight(model, found)})
        results[-1] |= compare(read(model, rows, (exact, reference)), reference, rows, num_bytes)
    about = {"tokens": len(tokens), "bytes": num_bytes, "parameters": model.config.num_parameters}
    about |= {"calibration tokens": calibration.tokens.numel() if calibration else 0}
    finish(options, results, about)


def finish(options: argparse.Namespace, results: list[dict[str, Any]], about: Results) -> None:
    """Show the table, then everything as JSON."""
    show(results)
    whole = json.dumps({"results": results, **about, "machine": machine()})
    if options.json:
        options.json.write_text(whole + "\n")
    print(whole)


def answered(options: argparse.Namespace, dtype: Kind) -> float:
    """The share of held-out sums, in percent, whose greedy answers are right to the last digit."""
    engine, tokenizer = load_engine(options.model, dtype=dtype)
    asked = questions(options.sums)
    right = 0
    for at in range(0, len(asked), TOGETHER):
        part = asked[at : at + TOGETHER]
        prompts = [f"\n{question}" for question, _ in part]
        found = generate(
            engine, tokenizer, prompts, max_tokens=DIGITS + 1, temperature=0, stop=("\n",)
        )
        right += sum(text == answer for text, (_, answer) in zip(found, part, strict=True))
    return 100 * right / len(asked)


def held_out(options: argparse.Namespace, tokenizer: Tokenizer) -> tuple[np.ndarray, int]:
    """Tokens that the model was not trained on, and their bytes."""
    if options.text:
        ids = [tokenizer.encode(path.read_bytes()) for path in options.text]
        tokens = np.concatenate([np.array(x) for x in ids])
    else:
        tokens = np.asarray(TokenFiles.open(options.model / "data").validation)
    tokens = tokens[: options.tokens]
    inside = tokens[tokens != tokenizer.end_of_text] if not options.text else tokens
    return tokens, len(tokenizer.decode_bytes(inside.tolist()))


def calibrate(
    options: argparse.Namespace, model: Model, tokenizer: Tokenizer
) -> Calibration | None:
    """The text to calibrate with, read by a model of its own."""
    if options.calibrate:
        rows = sample_text(options.calibrate, tokenizer, options.calibration_tokens)
    elif options.text:
        return None
    else:
        train = TokenFiles.open(options.model / "data").train
        each = options.calibration_tokens // PIECES
        starts = np.linspace(0, len(train) - each, PIECES).astype(np.int64)
        rows = torch.tensor(np.stack([train[s : s + each].astype(np.int64) for s in starts]))
    copy = Model.from_tensors(model.config, {n: x.clone() for n, x in model.state_dict().items()})
    return Calibration(copy, rows)


@torch.no_grad()
def read(
    model: Model, rows: Batch, against: tuple[dict[str, Tensor], Reading] | None = None
) -> Reading:
    """Read the text's rows; against: the weights and the reading of the exact model."""
    state, nats, divergence = None, 0.0, 0.0
    features, greedy = [], []
    for number, at in enumerate(range(0, rows.inputs.shape[1], CHUNK)):
        piece = rows.part(time=slice(at, at + CHUNK))
        assert piece.mask is not None
        x, state = model.features(piece.inputs, state)
        scores = F.log_softmax(model.head(x), dim=-1)
        nats -= float(scores.gather(2, piece.targets[..., None])[..., 0][piece.mask].sum())
        if against:
            exact, reference = against
            head = exact["head.weight"]
            wanted = F.log_softmax(F.linear(reference.features[number], head), dim=-1)
            parts = (wanted.exp() * (wanted - scores)).sum(-1)
            divergence += float(parts[piece.mask].sum())
        features.append(x)
        greedy.append(scores.argmax(-1))
    return Reading(nats, features, torch.cat(greedy, dim=1), divergence)


def check(model: Model, tokenizer: Tokenizer, tokens: np.ndarray, reference: Reading) -> None:
    """The figure is that of scoring.py; a directory gives back what was put into it."""
    nats = negative_log_likelihood(model, tokens, start=tokenizer.end_of_text)
    assert math.isclose(reference.nats, nats, rel_tol=1e-5), (reference.nats, nats)
    names = set(model.config.architecture.layouts(model.config))
    for kind in ("int8", "int4"):
        weights = dict(quantize_tensors(model.state_dict(), kind, matrices=names))
        about = About(kind=kind, group=128 if kind == "int8" else 64, source=model.fingerprint())
        with tempfile.TemporaryDirectory() as folder:
            write_quantized(f"{folder}/x", model.config, tokenizer, about, weights.items())
            found = dequantized_tensors(read_quantized(f"{folder}/x"))
        assert all(torch.equal(found[name], floats(x)) for name, x in weights.items())


def formats(
    exact: dict[str, Tensor], names: Collection[str], calibration: Calibration | None
) -> Iterator[tuple[str, Callable[[], Weights]]]:
    """Every format's name, and what makes its weights; the matrices of these names have it."""

    def matrices(make: Callable[[str, Tensor], Tensor | Quantized]) -> Callable[[], Weights]:
        return lambda: {n: make(n, x) if n in names else x for n, x in exact.items()}

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        yield name, matrices(lambda _, x, dtype=dtype: x.to(dtype))
    yield "int8", matrices(lambda _, x: quantize(x, "int8"))
    for group in (32, 64, 128):
        yield (
            f"int4/{group} min-max",
            matrices(lambda _, x, g=group: quantize(x, "int4", g, search=False)),
        )
        yield f"int4/{group} searched", matrices(lambda _, x, g=group: quantize(x, "int4", g))
        if calibration:
            yield (
                f"int4/{group} weighted",
                matrices(lambda n, x, g=group: weighted(calibration, n, x, g)),
            )
            yield (
                f"int4/{group} calibrated",
                lambda g=group: dict(quantize_tensors(exact, "int4", g, calibration, names)),
            )


def weighted(calibration: Calibration, name: str, weight: Tensor, group: int) -> Quantized:
    """Searched with the mean square of each input as its weight, without feedback."""
    moments = calibration.moments(name)
    importance = None if moments is None else moments.diagonal()
    return quantize(weight, "int4", group, importance)


def floats(weight: Tensor | Quantized) -> Tensor:
    """What a weight stands for, in float32."""
    return weight.dequantize() if isinstance(weight, Quantized) else weight.float()


def bits_per_weight(model: Model, weights: Weights) -> float:
    """Of the matrices as they are packed, padding included."""
    packed = [
        pack(weights[name], layout)
        for name, layout in model.config.architecture.layouts(model.config).items()
    ]
    return 8 * sum(x.nbytes for x in packed) / sum(x.outputs * x.inputs for x in packed)


def compare(got: Reading, wanted: Reading, rows: Batch, num_bytes: int) -> dict[str, Any]:
    """The figures of one format."""
    agree = (got.greedy == wanted.greedy)[rows.mask]
    return {
        "bits/byte": bits_per_byte(got.nats, num_bytes),
        "over float32, %": 100 * (got.nats / wanted.nats - 1),
        "divergence, bits/byte": bits_per_byte(got.divergence, num_bytes),
        "same greedy token, %": 100 * float(agree.float().mean()),
    }


def show(results: list[dict[str, Any]]) -> None:
    """As a table."""
    table = Table(*results[0])
    for row in results:
        table.add_row(*(x if isinstance(x, str) else f"{x:.5f}" for x in row.values()))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
