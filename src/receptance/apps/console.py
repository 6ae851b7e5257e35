"""Where commands print: standard output or a progress bar's standard error, by way of rich."""

from __future__ import annotations

import os
import sys
from contextlib import suppress

import torch
from rich.console import Console as RichConsole

from receptance.model.devices import described


def say_device(device: torch.device) -> None:
    """Say on standard error where a model runs, if that is not the CPU."""
    if device.type != "cpu":
        print(f"receptance: running on {described(device)}", file=sys.stderr)


class Console(RichConsole):
    """A console without which the work goes on: its reader may go away, or its disk be full."""

    def on_broken_pipe(self) -> None:
        """Print nothing any more, instead of ending the program with 1 as rich does."""
        self.quiet = True
        with suppress(OSError):  # a file without a descriptor
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())

    def _check_buffer(self) -> None:
        try:
            super()._check_buffer()
        except OSError as error:
            self.on_broken_pipe()
            with suppress(OSError):
                print(f"receptance: warning: no more output: {error.strerror}", file=sys.stderr)
