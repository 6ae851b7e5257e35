"""Requests per second of a 4-choice, 5-shot task: `receptance evaluate` against the harness's HFLM.

The opponents are lm-evaluation-harness's own class over transformers' RWKV, with the same weights,
and over GPT-NeoX of the same size, in the same run and in float32. The weights are random, with the
shape of the 169M model. Before anything is timed, our scores are compared with those of HFLM over
the same weights, request by request. The shots are those of the harness's sampler `first_n`, which
are the same for all documents, and with --own-shots others for every document, as by default.
"""

from __future__ import annotations

import argparse
import gc
import logging
import random
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from _common import Progress, report
from rich.console import Console

from receptance.config import PILE_VOCAB_SIZE, ModelConfig
from receptance.engine import native_engine
from receptance.evaluation.benchmarks.answers import Answers
from receptance.evaluation.benchmarks.harness import EngineLM
from receptance.formats.hf import write_hf
from receptance.inference.measure import random_tensors
from receptance.storage.checkpoint import load
from receptance.tokenizer import Tokenizer

WORDS = (
    *("file", "line", "class", "value", "name", "list", "test", "return", "string", "path"),
    *("write", "error", "open", "data"),
)
BOUND = 1e-3
BARS = {"transformers RWKV": 4.0, "transformers GPT-NeoX": 2.0}

Answer = Callable[[], list[tuple[float, bool]]]


def documents(count: int, shots: int, own: bool) -> list[tuple[str, str]]:
    """Contexts and continuations of so many questions with four choices each."""
    draw = random.Random(0)

    def words(least: int, most: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(least, most)))

    def example() -> str:
        return f"Question: {words(20, 60)}?\nAnswer: {words(2, 8)}\n\n"

    common = "".join(example() for _ in range(shots))
    found = []
    for _ in range(count):
        before = "".join(example() for _ in range(shots)) if own else common
        context = f"{before}Question: {words(20, 60)}?\nAnswer:"
        found += [(context, f" {words(2, 8)}") for _ in range(4)]
    return found


def instances(pairs: Sequence[tuple[str, str]]) -> list[Any]:
    """The requests as the harness makes them."""
    from lm_eval.api.instance import Instance

    return [
        Instance("loglikelihood", {}, pair, number % 4, ("task", number // 4, 1))
        for number, pair in enumerate(pairs)
    ]


def hf_lm(model: Any, tokenizer: Tokenizer, folder: Path, batch: int) -> Any:
    """The harness's own class over a model of transformers."""
    from lm_eval.models.huggingface import HFLM
    from transformers import PreTrainedTokenizerFast

    file = str(folder / tokenizer.save(folder)[0])
    end = "<|endoftext|>"
    theirs = PreTrainedTokenizerFast(tokenizer_file=file, eos_token=end, pad_token=end)
    return HFLM(pretrained=model, tokenizer=theirs, batch_size=batch, device="cpu", max_length=8192)


def transformers_rwkv(config: ModelConfig, tensors: dict[str, torch.Tensor], folder: Path) -> Any:
    """transformers' RWKV with these weights."""
    from transformers import AutoModelForCausalLM

    layout = {name: (x.dtype, tuple(x.shape)) for name, x in tensors.items()}
    write_hf(folder, config, layout, tensors, shard_bytes=1e10)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def transformers_neox(config: ModelConfig) -> Any:
    """GPT-NeoX of the same width and depth, as in Pythia."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    sizes = GPTNeoXConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.width,
        num_hidden_layers=config.num_layers,
        num_attention_heads=max(1, config.width // 64),
        intermediate_size=4 * config.width,
        max_position_embeddings=8192,
    )
    return GPTNeoXForCausalLM(sizes).eval()


def seconds(answer: Answer, rounds: int) -> float:
    """The least time of several rounds."""
    times = []
    for _ in range(rounds):
        gc.collect()
        began = time.perf_counter()
        answer()
        times.append(time.perf_counter() - began)
    return min(times)


def measure(options: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    """The figures, after the scores were compared."""
    config = ModelConfig(vocab_size=PILE_VOCAB_SIZE, width=options.width, num_layers=options.layers)
    tensors = random_tensors(config)
    tokenizer = load("tiny-python")[1]
    assert tokenizer is not None
    requests = instances(documents(options.documents, options.shots, options.own_shots))
    lengths = [len(tokenizer.encode("".join(request.args))) for request in requests]
    results: dict[str, Any] = {
        "requests": len(requests),
        "tokens per request": sum(lengths) / len(lengths),
        "shots": "own" if options.own_shots else "common",
        "sizes": f"{options.layers} layers, {options.width} wide",
    }
    with tempfile.TemporaryDirectory(prefix="receptance-bench-") as folder:
        progress("making models")
        rwkv = transformers_rwkv(config, tensors, Path(folder))
        engine = native_engine(config, tensors, "float32")
        spared: list[float] = []

        def ours() -> list[tuple[float, bool]]:
            answers = Answers(engine, tokenizer)
            found = EngineLM(answers).loglikelihood(requests)
            spared.append(answers.tokens_spared / (answers.tokens_read + answers.tokens_spared))
            return found

        def theirs(model: Any) -> Answer:
            lm = hf_lm(model, tokenizer, Path(folder), options.batch)
            return lambda: lm.loglikelihood(requests, disable_tqdm=True)

        progress("comparing scores")
        few = requests[: options.compared]
        lm = hf_lm(rwkv, tokenizer, Path(folder), options.batch)
        wanted = lm.loglikelihood(few, disable_tqdm=True)
        found = EngineLM(Answers(engine, tokenizer)).loglikelihood(few)
        worst = max(abs(a - b) for (a, _), (b, _) in zip(found, wanted, strict=True))
        results["largest difference of a score"] = worst
        if worst > BOUND * max(1.0, *(abs(score) for score, _ in wanted)):
            sys.exit(f"the scores differ by {worst:.2g}; nothing was timed")
        progress("timing receptance")
        speed = len(requests) / seconds(ours, options.rounds)
        results["receptance requests/s"] = speed
        results["share of tokens spared"] = spared[-1]
        for name, model in (
            ("transformers RWKV", lambda: rwkv),
            ("transformers GPT-NeoX", lambda: transformers_neox(config)),
        ):
            progress(f"timing HFLM over {name}")
            other = len(requests) / seconds(theirs(model()), options.peer_rounds)
            results |= {f"{name} requests/s": other, f"receptance / {name}": speed / other}
            results[f"bar of {name}"] = f">= {BARS[name]:g}"
    return results


def main() -> None:
    """Parse, measure, report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--documents", type=int, default=16)
    parser.add_argument("--shots", type=int, default=5)
    parser.add_argument("--own-shots", action="store_true", help="other shots in every document")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--batch", type=int, default=8, help="the batch of HFLM")
    parser.add_argument("--compared", type=int, default=8, help="requests that are compared")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer-rounds", type=int, default=1)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    with Progress(Console(stderr=True)) as progress:
        results = measure(options, progress)
    report(results)


if __name__ == "__main__":
    main()
