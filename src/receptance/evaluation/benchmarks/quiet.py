"""Calling a library that prints, warns, logs and draws as it likes, without any trace of it."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from random import getstate, setstate
from types import ModuleType
from typing import Any

import torch
from numpy.random import get_state, set_state


@contextlib.contextmanager
def silent(loggers: Sequence[str]) -> Iterator[None]:
    """Drop what the block prints on standard output and error, its warnings, and these loggers.

    A console that is to be seen nevertheless has to hold the stream itself, not look it up.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        stack.enter_context(warnings.catch_warnings(record=True, action="ignore"))
        for name in loggers:
            stack.enter_context(_muted(logging.getLogger(name)))
        yield


@contextlib.contextmanager
def _muted(logger: logging.Logger) -> Iterator[None]:
    level, propagate = logger.level, logger.propagate
    logger.setLevel(logging.CRITICAL + 1)
    logger.propagate = False
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.propagate = propagate


@contextlib.contextmanager
def own_random_numbers() -> Iterator[None]:
    """Let the block draw from the global generators; afterwards they are as they were."""
    python, numpy = getstate(), get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        setstate(python)
        set_state(numpy)


@contextlib.contextmanager
def replaced(module: ModuleType, name: str, value: Any) -> Iterator[None]:
    """Let a module have another value under a name inside the block."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)
