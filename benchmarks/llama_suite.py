"""llama.cpp's tests of llama-server, run against it and against `receptance serve`.

    python benchmarks/llama_suite.py SUITE --llama-server FILE [--tests WORD ...] [--json FILE]

SUITE is the folder tools/server/tests of llama.cpp, and FILE its llama-server of the same version.
Both servers have the same small RWKV-7 with random weights, as a GGUF file that `receptance
convert` wrote. So whatever the tests expect of the words of their own models fails with both.
Between the tests and our server stands _llama_shim.py, which translates flags, paths and names.
Tests that the suite calls slow are left out; they download large models.

Prints what llama-server passes and our server does not, with the reasons of _llama_reasons.py, and
the counts, then JSON. Ends with status 1 if a reason is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from _llama_reasons import reason

from receptance import Model, ModelConfig, save
from receptance.inference.measure import machine
from receptance.tokenizer import WorldTokenizer

HERE = Path(__file__).parent
_PATIENCE = 3600
"""Seconds for the suite with one server."""


def make_model(folder: Path) -> Path:
    """A GGUF file with a small RWKV-7 of random weights and a World vocabulary.

    The vocabulary holds all bytes and syllables. The ends of texts and of turns, and bytes that are
    not printed, are made unlikely, as tests count the tokens of answers and read them.
    """
    consonants, vowels = "bcdfghjklmnprstvw", "aeiou"
    pieces = [f"{c}{v}" for c in consonants for v in vowels]
    pieces += [f" {piece}" for piece in pieces] + ["\n\n"]
    tokens = [bytes([n]) for n in range(256)] + [piece.encode() for piece in pieces]
    lines = (f"{n} {token!r} {len(token)}\n" for n, token in enumerate(tokens, 1))
    tokenizer = WorldTokenizer("".join(lines).encode())
    config = ModelConfig(version=7, vocab_size=512, width=128, num_layers=2)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = Model(config)
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter += 0.1 * torch.randn_like(parameter)
        tensors = dict(model.named_parameters())
        tensors["ln_out.bias"] += 0.5
        tensors["head.weight"][[0, *(1 + n for n in range(256) if not 32 <= n < 127)]] = -0.5
        tensors["head.weight"][len(tokens) :] = -0.5
    save(model, folder / "model", tokenizer)
    command = [sys.executable, "-m", "receptance", "convert", folder / "model"]
    file = folder / "model.gguf"
    subprocess.run([*command, file], check=True, stdout=subprocess.DEVNULL)
    return file


def outcomes(suite: Path, model: Path, words: list[str], server: Path | None) -> dict[str, str]:
    """What became of each test, "passed", "failed" or "skipped", by name; None means our server."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "_llama_plugin", "-p", "no:randomly"]
        command += ["-p", "no:cacheprovider", "-m", "not slow", "-c", str(suite / "pytest.ini")]
        command += [f"--local-model={model}", f"--junitxml={report}", *words]
        command += ["--ours"] if server is None else []
        paths = [str(HERE), os.environ.get("PYTHONPATH", "")]
        variables = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
        variables |= {"LLAMA_SERVER_BIN_PATH": str(server), "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(
            command, cwd=suite, env=variables, capture_output=True, text=True, timeout=_PATIENCE
        )
        if not report.exists():
            raise SystemExit(f"the suite did not run: {(done.stdout + done.stderr)[-2000:]}")
        return read(report)


def read(report: Path) -> dict[str, str]:
    """The outcomes in a report of pytest, by the names of the tests."""
    return dict(map(_outcome, ElementTree.parse(report).iter("testcase")))


def _outcome(case: ElementTree.Element) -> tuple[str, str]:
    kinds = {child.tag for child in case}
    name = f"{case.attrib['classname'].rpartition('.')[2]}::{case.attrib['name']}"
    if kinds & {"failure", "error"}:
        return name, "failed"
    return name, "skipped" if "skipped" in kinds else "passed"


def compared(theirs: dict[str, str], ours: dict[str, str]) -> dict[str, Any]:
    """What both servers pass, and what one of them alone does."""
    first, second = ({n for n, found in of.items() if found == "passed"} for of in (theirs, ours))
    return {
        "what": "llama.cpp's tests of llama-server on one RWKV-7 with random weights",
        "machine": machine(),
        "counts": {"llama-server": Counter(theirs.values()), "receptance": Counter(ours.values())},
        "llama-server alone passes": {n: reason(n) for n in theirs if n in first - second},
        "receptance alone passes": [n for n in ours if n in second - first],
        "both pass": [n for n in theirs if n in first & second],
    }


def main() -> None:
    """Run the suite twice and compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("suite", type=Path)
    parser.add_argument("--llama-server", type=Path, required=True, metavar="FILE")
    parser.add_argument("--tests", nargs="+", default=["unit"], metavar="WORD")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    suite, server = options.suite.resolve(), options.llama_server.resolve()
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder))
        theirs = outcomes(suite, model, options.tests, server)
        ours = outcomes(suite, model, options.tests, None)
    results = compared(theirs, ours)
    behind = results["llama-server alone passes"]
    for name, why in behind.items():
        print(f"{name}: {why or 'NO REASON'}")
    print(json.dumps(results["counts"]))
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    if missing := [name for name, why in behind.items() if why is None]:
        raise SystemExit(f"{len(missing)} tests should pass")


if __name__ == "__main__":
    main()
