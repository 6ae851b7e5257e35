"""receptance generate: continue a prompt, or several of different lengths as one batch."""

from __future__ import annotations

import os
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar

import tyro

from receptance.apps.console import say_device
from receptance.apps.options import parse
from receptance.apps.text import has_escapes, unescaped, visible
from receptance.apps.waiting import until_first, waiting
from receptance.engine import EngineOptions
from receptance.inference.generation import Generation
from receptance.inference.sampling import Sampling
from receptance.state import check_state_path, unread_text

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Continue prompts with a model."""

    COMMON: ClassVar[str] = (
        "--max-tokens --temperature --top-p --seed --stop --prompt-file --save-state "
        "--tokenizer --dtype --device"
    )
    EXAMPLES: ClassVar[tuple[str, ...]] = (
        'receptance generate runs/mine "Once upon a time" --top-p 0.8',
        'receptance generate model.pth "In a" --tokenizer 20B_tokenizer.json',
    )

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """The model: a checkpoint directory, training run, .pth file, Hugging Face directory or hub
    id."""
    prompts: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[PROMPT ...]")
    ] = ()
    """Continue these texts, each of which is one argument. Without one the model begins a text."""
    prompt_file: Path | None = None
    """Continue the text in this file, to its last byte; - means standard input."""
    escapes: bool = False
    r"""Read \n, \t, \\, \xNN and \uNNNN in prompts and stop strings as the characters they name."""
    max_tokens: int = 256
    """Generate at most this number of tokens for each prompt."""
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = field(default_factory=Sampling)
    seed: int = 0
    """Draw the random choices from this seed, 0 unless it is given: the same seed, the same text.
    Each prompt uses it independently of the others."""
    stop: tuple[str, ...] = ()
    """End a text before this string."""
    engine: Annotated[EngineOptions, tyro.conf.arg(name="")] = field(default_factory=EngineOptions)
    load_state: Path | None = None
    """Continue from this state file, which --save-state or a chat wrote (for one prompt)."""
    save_state: Path | None = None
    """Write the state that has read the prompt and its continuation to this file (one prompt)."""


def main(argv: list[str]) -> None:
    """Parse, generate, print the prompts with their continuations."""
    options = parse(Options, argv, "receptance generate")
    _check(options)
    prompts, stop = _prompts(options), _read(options, options.stop)
    with waiting(f"reading {options.model}"):
        engine, tokenizer = options.engine.load(options.model)
    state, before = None, ""
    if options.load_state:
        state = engine.load_state(options.load_state)
        before = unread_text(options.load_state)
    say_device(engine.device)
    generation = Generation(
        engine,
        tokenizer,
        # Prompts need not be UTF-8, so their bytes are encoded.
        [tokenizer.encode(os.fsencode(before + prompt)) for prompt in prompts],
        sampling=options.sampling,
        max_tokens=options.max_tokens,
        stop=stop,
        seed=options.seed,
        state=state,
        log_probabilities=False,
    )
    _print(generation, prompts)
    if options.save_state:
        engine.save_state(generation.final_state(), options.save_state)


def _check(options: Options) -> None:
    """Raise errors that would otherwise come only after loading a model or generating a text."""
    if options.prompt_file and options.prompts:
        raise ValueError("prompts are given twice; leave out --prompt-file or the others")
    if (options.load_state or options.save_state) and len(options.prompts) > 1:
        raise ValueError("a state file holds one text; give one prompt")
    if options.prompt_file and options.escapes and not options.stop:
        raise ValueError(
            "--escapes is for prompts and stop strings on the command line, and a file can hold "
            "the characters themselves; leave it out"
        )
    if not options.prompt_file:
        _check_continues(options, "".join(options.prompts))
    if file := options.save_state:
        if file.is_dir() or not file.parent.is_dir():
            raise ValueError(
                f"no state can be written to {file}; name a file in a folder that exists"
            )
        check_state_path(file)
    if len(options.prompts) > 1:
        print(
            f"receptance: note: {len(options.prompts)} prompts, each continued for itself; a "
            'prompt of several words is one in quotes: "Once upon a time"',
            file=sys.stderr,
        )


def _prompts(options: Options) -> tuple[str, ...]:
    """The texts to continue; bytes that are not UTF-8 become lone surrogates, as in arguments."""
    if options.prompt_file is None:
        return _read(options, options.prompts or ("",))
    if str(options.prompt_file) == "-":
        if sys.stdin is None:
            raise ValueError("there is no standard input to read a prompt from")
        content = sys.stdin.buffer.read()
    else:
        content = options.prompt_file.read_bytes()
    if content.startswith(_UTF_16):
        raise ValueError(
            f"{options.prompt_file}: this is UTF-16, which models do not read; save it as UTF-8"
        )
    text = os.fsdecode(content.removeprefix(_BYTE_ORDER_MARK))
    _check_continues(options, text)
    return (text,)


def _check_continues(options: Options, prompt: str) -> None:
    """ValueError if there is a state and nothing to continue it with."""
    if options.load_state and not prompt:
        raise ValueError("a state has read all of its text; give a prompt that continues it")


def _read(options: Options, texts: tuple[str, ...]) -> tuple[str, ...]:
    """The texts of the command line, with escapes replaced if the options say so."""
    if options.escapes:
        return tuple(map(unescaped, texts))
    if escaped := [text for text in texts if has_escapes(text)]:
        warnings.warn(
            f"{escaped[0]!r} is taken letter by letter, its backslash as well; add --escapes if "
            "\\n is to be a newline",
            stacklevel=1,
        )
    return texts


def _print(generation: Generation, prompts: tuple[str, ...]) -> None:
    """Print one text as it comes, or several when all are done.

    Control characters are spelled out on a terminal, which would obey them.
    """
    shown = visible if sys.stdout is not None and sys.stdout.isatty() else str
    if len(prompts) == 1:
        before = prompts[0]
        for token in until_first("reading the prompt", generation):
            print(shown(before + token.text), end="", flush=True)
            before = ""
        print(shown(before))
        return
    texts = list(prompts)
    with waiting(f"continuing {len(texts)} prompts"):
        for token in generation:
            texts[token.row] += token.text
    for number, text in enumerate(texts, start=1):
        print(f"--- {number} ---\n{shown(text)}")
