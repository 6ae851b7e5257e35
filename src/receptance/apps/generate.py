"""receptance generate: continue a prompt, or several of different lengths as one batch."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from receptance.engine import load_engine
from receptance.generation import Generation
from receptance.sampling import Sampling
from receptance.state import State


@dataclass(frozen=True, kw_only=True)
class Options:
    """Continue prompts with a model."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A checkpoint directory, a training run, a .pth file, a Hugging Face directory or hub id."""
    prompts: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[PROMPT ...]")
    ] = ("",)
    """Texts to continue; without one the model begins from nothing."""
    max_tokens: int = 256
    """Tokens to generate for each prompt."""
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = field(default_factory=Sampling)
    seed: int = 0
    """Decides the random choices; every prompt uses it for itself."""
    stop: tuple[str, ...] = ()
    """Strings that end a text."""
    tokenizer: str | None = None
    """A tokenizer file, or "bytes", instead of the one beside the weights."""
    device: str = "cpu"
    """Where to run: cpu, cuda, ..."""
    dtype: Literal["float32", "bfloat16", "float16", "int8", "int4"] | None = None
    """Type of the weights; as in the file if not given. int8 and int4 are made on the fly."""
    backend: Literal["auto", "native", "torch"] = "auto"
    """What computes: auto takes the native kernels on a CPU where they were built."""
    threads: int | None = None
    """Threads of the native kernels; as many as torch has if not given."""
    adapter: Path | None = None
    """A fine-tuned adapter of this model: its file, or a directory with adapter.safetensors."""
    load_state: Path | None = None
    """Continue from a state file that --save-state wrote (for one prompt)."""
    save_state: Path | None = None
    """Write the state behind the generated text, all tokens read (for one prompt)."""


def main(argv: list[str]) -> None:
    """Parse, generate, print the prompts with their continuations."""
    options = tyro.cli(Options, args=argv, prog="receptance generate")
    if (options.load_state or options.save_state) and len(options.prompts) > 1:
        raise ValueError("a state file holds one text; give one prompt")
    if options.load_state and options.prompts == ("",):
        raise ValueError("a state has read all of its text; give a prompt that continues it")
    engine, tokenizer = load_engine(
        options.model,
        tokenizer=options.tokenizer,
        device=options.device,
        dtype=options.dtype,
        adapter=options.adapter,
        backend=options.backend,
        threads=options.threads,
    )
    state = None
    if options.load_state:
        state = State.load(options.load_state, engine.fingerprint()).to(options.device)
    generation = Generation(
        engine,
        tokenizer,
        [tokenizer.encode(os.fsencode(p)) for p in options.prompts],  # they need not be UTF-8
        sampling=options.sampling,
        max_tokens=options.max_tokens,
        stop=options.stop,
        seed=options.seed,
        state=state,
        log_probabilities=False,
    )
    _print(generation, options.prompts)
    if options.save_state and (after := generation.states[0]) is not None:
        with torch.no_grad():
            unread = torch.tensor([generation.unread[0]], device=options.device)
            _, after = engine.features(unread, after)
        after.save(options.save_state, engine.fingerprint())


def _print(generation: Generation, prompts: tuple[str, ...]) -> None:
    """One text as it comes; several when all are done."""
    if len(prompts) == 1:
        sys.stdout.write(prompts[0])
        for token in generation:
            sys.stdout.write(token.text)
            sys.stdout.flush()
        sys.stdout.write("\n")
        return
    texts = list(prompts)
    for token in generation:
        texts[token.row] += token.text
    for number, text in enumerate(texts, start=1):
        print(f"--- {number} ---\n{text}")
