"""Which sampling writes most like people: repetition, variety and likelihood beside held-out text.

    python benchmarks/sampling.py RUN [--rows N] [--json FILE]

RUN is a run folder of `receptance train`. Pieces of its validation text are prompts; the model
continues them under each setting, and what people wrote there is measured the same way. Sampling
from the whole distribution is less likely than people's text, and greedy decoding repeats itself
(Holtzman et al., arXiv 1904.09751), so a setting close to people is wanted. The distance is the
mean over the three measures of the difference from people's mean in standard deviations of people's
texts. Prints a line for each setting, then JSON.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _common import report_as_found
from torch import Tensor

import receptance
from receptance.data import TokenFiles
from receptance.engine.base import Engine
from receptance.inference.generation import Generation
from receptance.inference.sampling import Sampling
from receptance.tokenizer import Tokenizer

PROMPT, CONTINUATION = 96, 192  # tokens
TOP_P = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
PENALTIES = (0.0, 0.1, 0.2, 0.4)  # for presence and frequency alike
MEASURES = ("repeated", "distinct", "nats")


def main() -> None:
    """Measure people's text, then each setting."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--rows", type=int, default=128, help="prompts")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    options = parser.parse_args()
    engine, tokenizer = receptance.load_engine(options.run)
    windows = held_out(TokenFiles.open(options.run / "data"), options.rows)
    report_as_found(trials(engine, tokenizer, windows), options.json)


def trials(
    engine: Engine, tokenizer: Tokenizer, windows: Tensor
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The measures of people's text, then those of each setting with its distance from people."""
    people = measure(engine, windows)
    mean, deviation = people.mean(0), people.std(0)
    yield "people", figures(mean)
    distances = {}
    for top_p, penalty in itertools.product(TOP_P, PENALTIES):
        sampling = Sampling(top_p=top_p, presence_penalty=penalty, frequency_penalty=penalty)
        written = measure(engine, continued(engine, tokenizer, windows[:, :PROMPT], sampling))
        distance = ((written.mean(0) - mean).abs() / deviation).mean()
        name = f"top_p {top_p}, both penalties {penalty}"
        distances[name] = float(distance)
        yield name, figures(written.mean(0)) | {"distance": float(distance)}
    closest = min(distances, key=distances.__getitem__)
    yield "closest", {closest: distances[closest]}


def figures(means: Tensor) -> dict[str, float]:
    """The measures [3] by name."""
    return dict(zip(MEASURES, means.tolist(), strict=True))


def held_out(corpus: TokenFiles, rows: int) -> Tensor:
    """Windows of the validation text [R, PROMPT + CONTINUATION], spread evenly over it."""
    text = torch.from_numpy(corpus.validation.astype("int64"))
    length = PROMPT + CONTINUATION
    starts = torch.linspace(0, len(text) - length, min(rows, len(text) // length)).long()
    return torch.stack([text[start : start + length] for start in starts])


def continued(engine: Engine, tokenizer: Tokenizer, prompts: Tensor, sampling: Sampling) -> Tensor:
    """Prompts [R, PROMPT], each with its continuation by the model: [R, PROMPT + CONTINUATION]."""
    rows = [prompt.tolist() for prompt in prompts]
    generation = Generation(
        engine,
        tokenizer,
        rows,
        sampling=sampling,
        max_tokens=CONTINUATION,
        seed=range(len(rows)),
        ignore_end_of_text=True,
        log_probabilities=False,
    )
    for token in generation:
        rows[token.row].append(token.id)
    return torch.tensor(rows)


@torch.no_grad()
def measure(engine: Engine, windows: Tensor) -> Tensor:
    """The measures [R, 3] of the continuations in windows [R, PROMPT + CONTINUATION].

    repeated: the share of the sequences of four tokens that the continuation had before. distinct:
    the share of the tokens that are different ones. nats: the mean surprise of the model per token.
    """
    logits, _ = engine(windows[:, :-1])
    written = windows[:, PROMPT:]
    surprise = F.cross_entropy(
        logits[:, PROMPT - 1 :].float().flatten(0, 1), written.flatten(), reduction="none"
    )
    rows = []
    for tokens, nats in zip(written, surprise.view(written.shape), strict=True):
        pieces = list(map(tuple, tokens.unfold(0, 4, 1).tolist()))
        repeated = 1 - len(set(pieces)) / len(pieces)
        rows.append([repeated, len(tokens.unique()) / len(tokens), float(nats.mean())])
    return torch.tensor(rows)


if __name__ == "__main__":
    main()
