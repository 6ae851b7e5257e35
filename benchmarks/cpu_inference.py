"""Inference on a CPU against rwkv.cpp, the `rwkv` package and transformers: the bars of one run.

    python benchmarks/cpu_inference.py --rwkv-cpp PATH/librwkv.so [--sizes 169m 430m]

All run the same random weights, each in a process of its own, in turns, with the better of the
given numbers of threads; in every turn the rate of reading memory is measured, too. Logits are
compared before anything is timed. Without rwkv.cpp (https://github.com/RWKV/rwkv.cpp) the others
are compared alone. Prints tables, the bars, and JSON on the last line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from _bars import bars, show
from _weights import QUANTIZED, SIZES, Files
from _workers import Way, in_turns, working
from rich.console import Console

from receptance.inference.measure import machine

OURS, TORCH, CPP, PACKAGE, HF = "receptance", "torch", "rwkv.cpp", "rwkv", "transformers"
# Our type of weights, and what of each peer it is compared with.
PEERS = {
    "float32": {CPP: "FP32", PACKAGE: "float32", HF: "float32"},
    "bfloat16": {CPP: "FP16", PACKAGE: "bfloat16", HF: "bfloat16"},
    "float16": {CPP: "FP16"},
    "int8": {CPP: "Q8_0"},
    "int4": {CPP: "Q4_0"},
}
# Root mean square difference of logits, relative to theirs, from the torch model in float32 with
# the same, rounded weights. Products with integers round the activations, too.
LIMITS = {"float32": 1e-5, "bfloat16": 1e-5, "float16": 1e-5, "int8": 2e-3, "int4": 2e-3}
PEER_LIMIT = 1e-5
CHUNKS = (16, 32, 64, 128)
BATCHES, BATCHED = (1, 2, 4, 8, 16, 32), "int8"
PROMPTS = (256, 2048)
FIRST_TOKEN = """
import sys, time
from receptance.engine import load_engine
from receptance.inference.generation import generate
began = time.perf_counter()
engine, tokenizer = load_engine(sys.argv[1])
generate(engine, tokenizer, "a", max_tokens=1, temperature=0)
print(time.perf_counter() - began)
"""


class Run:
    """The sections, for one size."""

    def __init__(self, files: Files, options: argparse.Namespace, console: Console) -> None:
        self.files, self.options, self.console = files, options, console

    def way(self, engine: str, kind: str, command: dict[str, Any], *, sparse: bool = False) -> Way:
        """An engine with the model in a type of weights; kind is the engine's own name for it."""
        if engine == CPP:
            path, library = self.files.ggmf(kind), self.options.rwkv_cpp
            return Way.of(engine, command, path=path, dtype=kind, library=library)
        path = self.files.pth() if engine == PACKAGE else self.files.ours(kind, sparse=sparse)
        return Way.of(engine, command, path=path, dtype=kind)

    def turns(self, title: str, contestants: dict[str, list[Way]]) -> dict[str, Any]:
        """The summaries of a contest."""
        with self.console.status(title):
            found = in_turns(contestants, rounds=self.options.rounds, threads=self.options.threads)
        rates = ", ".join(f"{name} {x.rate:,.4g}" for name, x in found.items())
        self.console.print(f"{title}: {rates}", highlight=False)
        return {name: x.summary() for name, x in found.items()}

    def peers(self, dtype: str) -> dict[str, str]:
        """Those that are here, with the type that is compared with ours."""
        present = PEERS[dtype].items()
        return {name: kind for name, kind in present if name != CPP or self.options.rwkv_cpp}

    def check(self) -> dict[str, float]:
        """Logits against the torch model's, or no timing."""
        errors = {}
        for dtype, limit in LIMITS.items():
            wanted = self.logits(TORCH, dtype)
            errors[f"{OURS} {dtype}"] = _error(self.logits(OURS, dtype), wanted, limit, dtype)
        for name, kind in self.peers("float32").items():
            wanted = self.logits(OURS, "float32")
            errors[f"{name} {kind}"] = _error(self.logits(name, kind), wanted, PEER_LIMIT, name)
        return errors

    def logits(self, engine: str, kind: str) -> torch.Tensor:
        """For what follows a fixed prompt."""
        with working(self.way(engine, kind, {"do": "logits"}), 1) as worker:
            return torch.tensor(worker.ask()["logits"])

    def decode(self) -> dict[str, Any]:
        """Tokens per second at batch 1, by type."""
        command = {"do": "decode", "tokens": self.options.tokens}
        return {
            dtype: self.turns(
                f"decode {dtype}",
                {OURS: [self.way(OURS, dtype, command)]}
                | {
                    name: [self.way(name, kind, command)]
                    for name, kind in self.peers(dtype).items()
                },
            )
            for dtype in PEERS
        }

    def sparse(self) -> dict[str, Any]:
        """The same where 85 % of the activations of channel mixing are zero."""
        command = {"do": "decode", "tokens": self.options.tokens}
        return {
            dtype: self.turns(
                f"sparse {dtype}", {OURS: [self.way(OURS, dtype, command, sparse=True)]}
            )
            for dtype in PEERS
        }

    def batches(self) -> dict[str, Any]:
        """Tokens per second of all rows together."""
        command = {"do": "decode", "tokens": 8}
        contestants = {
            str(rows): [self.way(OURS, BATCHED, command | {"batch": rows})] for rows in BATCHES
        }
        return {BATCHED: self.turns(f"batches {BATCHED}", contestants)}

    def prefill(self) -> dict[str, Any]:
        """Tokens per second of reading a prompt, everyone with the type that suits best."""
        return {str(length): self._prefill(length) for length in PROMPTS}

    def _prefill(self, length: int) -> dict[str, Any]:
        command = {"do": "prefill", "tokens": length}
        contestants = {OURS: [self.way(OURS, dtype, command) for dtype in PEERS]}
        for dtype in ("float32", "bfloat16"):
            contestants[f"{PACKAGE} {dtype}"] = [self.way(PACKAGE, dtype, command)]
        if self.options.rwkv_cpp:
            contestants[CPP] = [
                self.way(CPP, kind, command | {"chunk": chunk})
                for kind in ("FP32", "FP16", "Q8_0", "Q4_0")
                for chunk in CHUNKS
            ]
        return self.turns(f"prompt of {length}", contestants)

    def load(self) -> dict[str, Any]:
        """Seconds from a quantized directory, in the cache of the system, to a token."""
        return {dtype: self._load(self.files.ours(dtype)) for dtype in QUANTIZED}

    def _load(self, path: str) -> dict[str, float]:
        inside, whole = [], []
        for _ in range(1 + self.options.rounds):
            began = time.perf_counter()
            done = subprocess.run(
                [sys.executable, "-c", FIRST_TOKEN, path],
                check=True,
                capture_output=True,
                text=True,
            )
            whole.append(time.perf_counter() - began)
            inside.append(float(done.stdout))
        return {
            "first token s": statistics.median(inside[1:]),
            "whole process s": statistics.median(whole[1:]),
        }

    def memory(self) -> dict[str, Any]:
        """Resident memory after 100 tokens, in bytes: the process, and it before it had a model."""
        found = {}
        for dtype in PEERS:
            way = self.way(OURS, dtype, {"do": "memory"})
            with working(way, max(self.options.threads)) as worker:
                found[dtype] = worker.loaded | worker.ask()
        return found


def _error(found: torch.Tensor, wanted: torch.Tensor, limit: float, what: str) -> float:
    error = float((found - wanted).square().mean().sqrt() / wanted.square().mean().sqrt())
    if not error <= limit:
        raise SystemExit(f"{what}: logits are off by {error:.1e} of theirs, more than {limit:.0e}")
    return error


SECTIONS: dict[str, Callable[[Run], dict[str, Any]]] = {
    "decode": Run.decode,
    "sparse": Run.sparse,
    "batches": Run.batches,
    "prefill": Run.prefill,
    "load": Run.load,
    "memory": Run.memory,
}


def main() -> None:
    """Check, time, compare with the bars, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rwkv-cpp", metavar="PATH", help="librwkv.so of a build of rwkv.cpp")
    parser.add_argument("--sizes", nargs="+", default=["169m", "430m"], choices=SIZES)
    parser.add_argument("--sections", nargs="+", default=list(SECTIONS), choices=SECTIONS)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=48, help="that are decoded in a turn")
    parser.add_argument("--tokenizer", help="to store with the models; else a made-up vocabulary")
    parser.add_argument("--folder", type=Path, help="keep the model files here, and use them again")
    options = parser.parse_args()
    console = Console(width=100)
    if not options.rwkv_cpp:
        console.print("rwkv.cpp is absent: its bars are not compared (--rwkv-cpp PATH)")
    results: dict[str, Any] = {}
    kept = nullcontext(options.folder) if options.folder else tempfile.TemporaryDirectory()
    with kept as folder:
        for size in options.sizes:
            files = Files(Path(folder), size, options.tokenizer, options.rwkv_cpp)
            run = Run(files, options, console)
            console.rule(size)
            results[size] = {"logits, relative error": run.check()}
            for name in options.sections:
                results[size][name] = SECTIONS[name](run)
            results[size]["sizes"] = SIZES[size].to_dict()
    verdicts = bars(results)
    show(console, results, verdicts)
    print(json.dumps({"results": results, "bars": verdicts, "machine": machine()}))


if __name__ == "__main__":
    main()
