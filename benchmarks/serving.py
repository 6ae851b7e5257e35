"""What HTTP costs: tokens per second of `receptance serve` beside those of its engine alone.

    python benchmarks/serving.py MODEL [--streams N ...] [--tokens N] [--json FILE]

For each number of streams the engine first continues that many prompts by itself, through `Slots`.
Then a server with as many slots, in a process of its own, streams the same continuations to as
many clients, and every text is compared with that of the engine. Clients and server share this
machine. Prints tokens per second of both, the time to the first token and the time between tokens
(median and 99th percentile, in seconds), then JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from _common import report_as_found
from _servers import server

import receptance
from receptance.inference.batching import Slots
from receptance.inference.rows import Request
from receptance.inference.sampling import Sampling


def main() -> None:
    """Measure each number of streams."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--streams", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--tokens", type=int, default=128, help="tokens of each answer")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    options = parser.parse_args()
    report_as_found(trials(options.model, options.streams, options.tokens), options.json)


def trials(model: str, streams: list[int], tokens: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """The figures of each number of streams."""
    engine, tokenizer = receptance.load_engine(model)
    assert tokenizer is not None, f"{model} has no tokenizer"
    for count in streams:
        prompts = [f"def f{number}(x):" for number in range(count)]
        texts, alone = by_engine(engine, tokenizer, prompts, tokens)
        with server(model, "--slots", str(count)) as found:
            served = asyncio.run(by_server(found.url, prompts, tokens, texts))
        share = served["tokens/s"] / alone
        yield f"{count} streams", {"engine tokens/s": alone, **served, "share": share}


def request(tokens: int) -> Request:
    """What the engine is asked, and the server as well."""
    greedy = Sampling(temperature=0)
    return Request(
        max_tokens=tokens, sampling=greedy, ignore_end_of_text=True, log_probabilities=False
    )


def by_engine(
    engine: Any, tokenizer: Any, prompts: list[str], tokens: int
) -> tuple[list[str], float]:
    """The continuations and the tokens per second of the engine alone."""
    slots = Slots(engine, tokenizer, len(prompts))
    for prompt in prompts:
        slots.admit(prompt, request(tokens))
    texts, began = [""] * len(prompts), time.perf_counter()
    while slots.active or slots.waiting:
        for token in slots.step():
            texts[token.row] += token.text
    return texts, len(prompts) * tokens / (time.perf_counter() - began)


async def by_server(
    url: str, prompts: list[str], tokens: int, texts: list[str]
) -> dict[str, float]:
    """The figures of the server; its texts have to be those of the engine."""
    limits = httpx.Limits(max_connections=len(prompts))
    async with httpx.AsyncClient(base_url=url, timeout=None, limits=limits) as client:
        await asyncio.gather(*(stream(client, prompt, 2) for prompt in prompts))  # warm
        began = time.perf_counter()
        found = await asyncio.gather(*(stream(client, prompt, tokens) for prompt in prompts))
        seconds = time.perf_counter() - began
    for (text, _), wanted in zip(found, texts, strict=True):
        assert text == wanted, "the server wrote another text than the engine"
    first = [times[0] for _, times in found]
    gaps = np.concatenate([np.diff(times) for _, times in found])
    return {
        "tokens/s": len(prompts) * tokens / seconds,
        "first token, median": float(np.median(first)),
        "first token, 99 %": float(np.quantile(first, 0.99)),
        "between tokens, median": float(np.median(gaps)),
        "between tokens, 99 %": float(np.quantile(gaps, 0.99)),
    }


async def stream(client: httpx.AsyncClient, prompt: str, tokens: int) -> tuple[str, list[float]]:
    """The text of one stream, and when each of its events came."""
    body = {"model": "model", "prompt": prompt, "max_tokens": tokens, "temperature": 0}
    body |= {"ignore_eos": True, "stream": True}
    text, times, began = "", [], time.perf_counter()
    async with client.stream("POST", "/v1/completions", json=body) as response:
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                times.append(time.perf_counter() - began)
                text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
    return text, times


if __name__ == "__main__":
    main()
