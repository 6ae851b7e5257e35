"""receptance generate: continue a prompt, or several of different lengths as one batch."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
import tyro

from receptance.engine import EngineOptions
from receptance.inference.generation import Generation
from receptance.inference.sampling import Sampling
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
    engine: Annotated[EngineOptions, tyro.conf.arg(name="")] = field(default_factory=EngineOptions)
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
    if (file := options.save_state) and (file.is_dir() or not file.parent.is_dir()):
        raise ValueError(f"no state can be written to {file}; name a file in a folder that exists")
    engine, tokenizer = options.engine.load(options.model)
    state = None
    if options.load_state:
        state = State.load(options.load_state, engine.fingerprint()).to(engine.device)
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
            unread = torch.tensor([generation.unread[0]], device=engine.device)
            _, after = engine.features(unread, after)
        after.save(options.save_state, engine.fingerprint())


def _print(generation: Generation, prompts: tuple[str, ...]) -> None:
    """One text as it comes; several when all are done."""
    if len(prompts) == 1:
        before = prompts[0]
        for token in generation:
            print(before + token.text, end="", flush=True)
            before = ""
        print(before)
        return
    texts = list(prompts)
    for token in generation:
        texts[token.row] += token.text
    for number, text in enumerate(texts, start=1):
        print(f"--- {number} ---\n{text}")
