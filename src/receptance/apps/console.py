"""The console on which commands print, by way of rich."""

from __future__ import annotations

import os
import sys
from contextlib import suppress

import torch
from rich.console import Console as RichConsole

from receptance.model.devices import described


def say_device(device: torch.device) -> None:
    """Name on standard error the device on which a model runs, unless that is the CPU."""
    if device.type != "cpu":
        print(f"receptance: running on {described(device)}", file=sys.stderr)


class Console(RichConsole):
    """A console whose loss does not end a command: its reader may go away, or its disk be full."""

    def on_broken_pipe(self) -> None:
        """Print nothing from now on, instead of ending the program with code 1 as rich does."""
        self.quiet = True
        with suppress(OSError):  # The file may have no descriptor.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())

    def _check_buffer(self) -> None:
        try:
            super()._check_buffer()
        except OSError as error:
            self.on_broken_pipe()
            with suppress(OSError):
                print(f"receptance: warning: no more output: {error.strerror}", file=sys.stderr)
