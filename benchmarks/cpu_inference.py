"""Inference on a CPU against rwkv.cpp, llama.cpp, the `rwkv` package and transformers: one run.

    python benchmarks/cpu_inference.py [--rwkv-cpp PATH/librwkv.so] [--peers rwkv transformers]
                                       [--sizes 169m rwkv7-0.1b] [--budget SECONDS] [--json FILE]

Peers take part in the versions that they run: llama.cpp in RWKV-6 and RWKV-7, the `rwkv` package
up to RWKV-6, transformers in RWKV-4.

All run the same random weights, each in a process of its own, in turns, with the better of the
given numbers of threads; in every turn the rate of reading memory is measured, too. Logits are
compared before anything is timed. Who takes longer than the budget is stopped, and reported with
what was measured until then. Prints tables, the bars, and JSON on the last line, after Ctrl-C, too.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from _bars import BUS, OURS, bars, show
from _common import Progress, stop_once
from _peers import (
    CPP,
    HF,
    INSTALL,
    LIMITS,
    LLAMA,
    LLAMA_LIMITS,
    PACKAGE,
    PEER_LIMIT,
    PEERS,
    TORCH,
    VERSIONS,
)
from _weights import QUANTIZED, SIZES, Files
from _workers import Budget, Contestant, Failed, Way, in_turns, noted, working
from rich.console import Console

from receptance.inference.measure import machine

CHUNKS = (16, 32, 64, 128)
BATCHES, BATCHED = (1, 2, 4, 8, 16, 32), "int8"
PROMPTS = {4: (256, 2048)}  # of other versions:
PROMPT = (512,)
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
    """The sections, for one size; each fills the dict that it is given as it goes."""

    def __init__(self, files: Files, options: argparse.Namespace, say: Progress) -> None:
        self.files, self.options, self.say = files, options, say
        self.stopped: dict[str, str] = {}  # peers that were not found correct, and why
        self.failed = False
        self.version = SIZES[files.size].version

    def way(self, engine: str, kind: str, command: dict[str, Any], *, sparse: bool = False) -> Way:
        """An engine with the model in a type of weights; kind is the engine's own name for it."""
        if engine == CPP:
            library = self.options.rwkv_cpp
            return Way(engine, kind, lambda: self.files.ggmf(kind), command, library)
        if engine == PACKAGE:
            return Way(engine, kind, self.files.pth, command)
        if engine == LLAMA or (engine == TORCH and kind in LLAMA_LIMITS):
            return Way(engine, kind, lambda: self.files.gguf(kind), command)
        return Way(engine, kind, lambda: self.files.ours(kind, sparse=sparse), command)

    def budget(self) -> Budget:
        """For a measurement of ours, or for a peer's check."""
        return Budget(self.options.budget)

    def turns(
        self,
        title: str,
        contestants: dict[str, list[Way]],
        found: dict[str, Any],
        budgets: dict[str, Budget] | None = None,
    ) -> None:
        """A contest, with the memory bus among the contestants."""
        ways = {BUS: [Way(BUS, "", str, {"do": "read"})]} | contestants
        with ExitStack() as stack:
            running = []
            for name, those in ways.items():
                found[name] = {}
                if why := self.stopped.get(those[0].engine):
                    found[name]["stopped"] = why
                    continue
                budget = (budgets or {}).get(those[0].engine) or self.budget()
                share = stack.enter_context(budget.share())
                what = f"{self.files.size} {title}, {name}"
                running.append(Contestant(what, those, share, found[name], self.say))
            in_turns(running, rounds=self.options.rounds, threads=self.options.threads)
        self.tell(title, found)

    def tell(self, title: str, found: dict[str, dict[str, Any]]) -> None:
        """Print what became of each, in a line."""
        line = ", ".join(f"{name} {_shown(x)}" for name, x in found.items())
        self.say.console.print(f"{title}: {line}", highlight=False, markup=False, soft_wrap=True)
        self.failed |= any(x.get("stopped", "").startswith("failed") for x in found.values())

    def peers(self, dtype: str) -> dict[str, str]:
        """Those that take part, with the type that is compared with ours."""
        return {name: kind for name, kind in PEERS[dtype].items() if self.has(name)}

    def has(self, peer: str) -> bool:
        """Whether a peer is here and runs this version."""
        return peer in self.options.peers and self.version in VERSIONS[peer]

    def check(self, errors: dict[str, Any]) -> None:
        """Logits against the torch model's, or no timing."""
        ours = {}
        for dtype, limit in LIMITS.items():
            wanted, ours[dtype] = self.logits(TORCH, dtype), self.logits(OURS, dtype)
            errors[f"{OURS} {dtype}"] = _error(ours[dtype], wanted, limit, dtype)
        peers = [(name, kind) for name, kind in self.peers("float32").items() if name != LLAMA]
        if self.has(LLAMA):
            peers += [(LLAMA, kind) for kind in LLAMA_LIMITS]
        for name, kind in peers:
            if name in self.stopped:
                continue
            note: dict[str, Any] = {}
            with noted(note, self.budget()):
                found = self.logits(name, kind)
            if "stopped" in note:
                errors[f"{name} {kind}"] = note
                self.stopped[name] = f"not checked: {note['stopped']}"
                self.tell("logits", {f"{name} {kind}": note})
            else:
                wanted = self.logits(TORCH, kind) if name == LLAMA else ours["float32"]
                limit = LLAMA_LIMITS[kind] if name == LLAMA else PEER_LIMIT
                errors[f"{name} {kind}"] = _error(found, wanted, limit, f"{name} {kind}")

    def logits(self, engine: str, kind: str) -> torch.Tensor:
        """For what follows a fixed prompt."""
        self.say(f"{self.files.size} checking the logits of {engine} {kind}")
        with working(self.way(engine, kind, {"do": "logits"}), 1) as worker:
            return torch.tensor(worker.ask()["logits"])

    def decode(self, found: dict[str, Any]) -> None:
        """Tokens per second at batch 1, by type."""
        command = {"do": "decode", "tokens": self.options.tokens}
        parts = {name: sum(name in theirs for theirs in PEERS.values()) for name in INSTALL}
        budgets = {name: Budget(self.options.budget, count) for name, count in parts.items()}
        for dtype in PEERS:
            engines = {OURS: dtype} | self.peers(dtype)
            ways = {name: [self.way(name, kind, command)] for name, kind in engines.items()}
            self.turns(f"decode {dtype}", ways, found.setdefault(dtype, {}), budgets)

    def sparse(self, found: dict[str, Any]) -> None:
        """The same where 85 % of the activations of channel mixing are zero."""
        command = {"do": "decode", "tokens": self.options.tokens}
        for dtype in PEERS:
            self.files.ours(dtype, sparse=True)
            ways = {OURS: [self.way(OURS, dtype, command, sparse=True)]}
            self.turns(f"sparse {dtype}", ways, found.setdefault(dtype, {}))

    def batches(self, found: dict[str, Any]) -> None:
        """Tokens per second of all rows together."""
        command = {"do": "decode", "tokens": 8}
        contestants = {
            str(rows): [self.way(OURS, BATCHED, command | {"batch": rows})] for rows in BATCHES
        }
        self.turns(f"batches {BATCHED}", contestants, found.setdefault(BATCHED, {}))

    def prefill(self, found: dict[str, Any]) -> None:
        """Tokens per second of reading a prompt, everyone with the type that suits best."""
        prompts = PROMPTS.get(self.version, PROMPT)
        parts = {PACKAGE: 2 * len(prompts), CPP: len(prompts), LLAMA: len(prompts)}
        budgets = {name: Budget(self.options.budget, count) for name, count in parts.items()}
        for length in prompts:
            command = {"do": "prefill", "tokens": length}
            contestants = {OURS: [self.way(OURS, dtype, command) for dtype in PEERS]}
            if self.has(PACKAGE):
                for dtype in ("float32", "bfloat16"):
                    contestants[f"{PACKAGE} {dtype}"] = [self.way(PACKAGE, dtype, command)]
            if self.has(LLAMA):
                contestants[LLAMA] = [self.way(LLAMA, kind, command) for kind in LLAMA_LIMITS]
            if self.has(CPP):
                contestants[CPP] = [
                    self.way(CPP, kind, command | {"chunk": chunk})
                    for kind in ("FP32", "FP16", "Q8_0", "Q4_0")
                    for chunk in CHUNKS
                ]
            self.turns(
                f"prompt of {length}", contestants, found.setdefault(str(length), {}), budgets
            )

    def load(self, found: dict[str, Any]) -> None:
        """Seconds from a quantized directory, in the cache of the system, to a token."""
        for dtype in QUANTIZED:
            path, figures = self.files.ours(dtype), found.setdefault(dtype, {})
            inside, whole = [], []
            with noted(figures, self.budget()):
                for number in range(1 + self.options.rounds):
                    self.say(
                        f"{self.files.size} load {dtype}: round {number} of {self.options.rounds}"
                    )
                    began = time.perf_counter()
                    done = subprocess.run(
                        [sys.executable, "-c", FIRST_TOKEN, path],
                        check=True,
                        capture_output=True,
                        text=True,
                    )
                    whole.append(time.perf_counter() - began)
                    inside.append(float(done.stdout))
                    if number:
                        figures["first token s"] = statistics.median(inside[1:])
                        figures["whole process s"] = statistics.median(whole[1:])
        self.tell("load", found)

    def memory(self, found: dict[str, Any]) -> None:
        """Resident memory after 100 tokens, in bytes: the process, and it before it had a model."""
        for dtype in PEERS:
            self.say(f"{self.files.size} memory {dtype}")
            way, figures = self.way(OURS, dtype, {"do": "memory"}), found.setdefault(dtype, {})
            with (
                noted(figures, self.budget()),
                working(way, max(self.options.threads)) as worker,
            ):
                figures.update(worker.loaded | worker.ask())
        self.tell("memory", found)


def _error(found: torch.Tensor, wanted: torch.Tensor, limit: float, what: str) -> float:
    error = float((found - wanted).square().mean().sqrt() / wanted.square().mean().sqrt())
    if not error <= limit:
        raise SystemExit(f"{what}: logits are off by {error:.1e} of theirs, more than {limit:.0e}")
    return error


def _shown(found: dict[str, Any]) -> str:
    """A contestant's figure, and why it is not better founded."""
    words = []
    if "rate" in found:
        words.append(f"{found['rate']:,.4g}")
    if "first token s" in found:
        words.append(f"{found['first token s']:.2f} s")
    if "resident" in found:
        words.append(f"{found['resident'] / 1e6:,.0f} MB")
    if "stopped" in found:
        rounds = f" after {len(found['rates'])} rounds" if found.get("rates") else ""
        words.append(f"({found['stopped']}{rounds})")
    return " ".join(words)


SECTIONS: dict[str, Callable[[Run, dict[str, Any]], None]] = {
    "decode": Run.decode,
    "sparse": Run.sparse,
    "batches": Run.batches,
    "prefill": Run.prefill,
    "load": Run.load,
    "memory": Run.memory,
}


def _seconds(word: str) -> float:
    value = float(word)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{word} is not a positive number of seconds")
    return value


def parsed(argv: Sequence[str] | None) -> tuple[argparse.Namespace, dict[str, str]]:
    """What is asked for, and how to get each peer of that which is not here."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rwkv-cpp", metavar="PATH", help="librwkv.so of a build of rwkv.cpp")
    parser.add_argument("--peers", nargs="*", choices=INSTALL, help="default: all installed")
    parser.add_argument("--sizes", nargs="+", default=["169m", "430m"], choices=SIZES)
    parser.add_argument("--sections", nargs="+", default=list(SECTIONS), choices=SECTIONS)
    parser.add_argument(
        "--budget",
        type=_seconds,
        default=60.0,
        metavar="SECONDS",
        help="for a peer in a section, or in the check, and for Receptance in a measurement (60)",
    )
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=48, help="that are decoded in a turn")
    parser.add_argument("--tokenizer", help="to store with the models; else a made-up vocabulary")
    parser.add_argument("--folder", type=Path, help="keep the model files here, and use them again")
    parser.add_argument("--json", type=Path, metavar="FILE", help="written after every section")
    options = parser.parse_args(argv)
    if options.rwkv_cpp and not Path(options.rwkv_cpp).is_file():
        parser.error(f"--rwkv-cpp: there is no file {options.rwkv_cpp}")
    if options.json and not options.json.absolute().parent.is_dir():
        parser.error(f"--json: there is no folder {options.json.absolute().parent}")
    here = {CPP: options.rwkv_cpp, PACKAGE: find_spec(PACKAGE), HF: find_spec(HF)}
    here[LLAMA] = find_spec("llama_cpp")
    versions = {SIZES[size].version for size in options.sizes}
    wanted = [x for x in options.peers or INSTALL if versions & set(VERSIONS[x])]
    wanted = wanted if options.peers != [] else []
    options.peers = [name for name in wanted if here[name]]
    return options, {name: INSTALL[name] for name in wanted if not here[name]}


def main(argv: Sequence[str] | None = None) -> None:
    """Check, time, compare with the bars, report; exit code 1 if an engine failed."""
    options, missing = parsed(argv)
    console = Console(width=100)
    for name, how in missing.items():
        console.print(f"{name} is left out, because it is not here: {how}", soft_wrap=True)
    results: dict[str, Any] = {}
    kind = machine()["instructions"]
    report = {"results": results, "left out": missing, "complete": False, "machine": machine()}
    code = 0

    def write() -> None:
        report["bars"] = bars(results)
        if options.json:
            options.json.write_text(json.dumps(report))

    stop_once()
    kept = nullcontext(options.folder) if options.folder else tempfile.TemporaryDirectory()
    try:
        with kept as folder, Progress(console) as say:
            for size in options.sizes:
                console.rule(size)
                run = Run(
                    Files(Path(folder), size, options.tokenizer, options.rwkv_cpp, say),
                    options,
                    say,
                )
                found = results[size] = {"sizes": SIZES[size].to_dict(), "instructions": kind}
                run.check(found.setdefault("logits, relative error", {}))
                for name in options.sections:
                    SECTIONS[name](run, found.setdefault(name, {}))
                    write()
                code |= run.failed
        report["complete"] = True
    except KeyboardInterrupt:
        code = 130
        console.print("interrupted; this was measured until then:")
    except Failed as failed:
        raise SystemExit(f"{say.what} failed: {failed}") from None
    finally:
        write()
        show(console, results, report["bars"])
        print(json.dumps(report), flush=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
