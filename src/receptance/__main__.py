"""The command `receptance`: picks an app, imports only that one, turns errors into one line."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import io
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from types import ModuleType

from receptance.apps.text import as_flags, visible
from receptance.apps.waiting import waiting
from receptance.errors import out_of_memory
from receptance.version import __version__

APPS = {
    "data": "make corpora of tokens, look into them, put them together",
    "train": "train a model on text, or resume a run",
    "generate": "continue a prompt, or several as one batch",
    "chat": "talk with a model in the terminal",
    "serve": "answer over HTTP, with a page to chat",
    "merge": "write a model with an adapter's changes in its weights",
    "convert": "write a model in another format, and check it",
    "quantize": "write a model with its matrices as int8 or int4",
    "inspect": "say what a file or directory of weights is",
    "verify": "check a model on this machine: every form, kernel and engine",
    "evaluate": "say how good a model is: texts, positions, benchmarks",
    "compare": "train RWKV and Transformers alike, and compare them",
    "reproduce": "redo the experiments of the RWKV paper",
    "report": "make a page of the results in a folder",
    "analyze": "show in a web page what a model does with a text",
    "bench": "measure how fast a model runs on this machine",
    "completion": "print a script for the completion of commands in a shell",
    "doctor": "say what this machine and installation can do",
}


_INTERRUPTED = 130  # the exit code that shells report for a program that ended with Ctrl-C


def main(argv: list[str] | None = None) -> int:
    """Run one app; 0 if it went well, 2 after bad input, 130 after Ctrl-C."""
    try:
        try:
            return _run(sys.argv[1:] if argv is None else argv)
        finally:
            if sys.stdout is not None:  # The parent process may have closed it.
                sys.stdout.flush()  # A failure here can still be reported.
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:  # The reader went away, so the rest of the output is dropped.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        reason = error.strerror or str(error)
        return _fail(f"{error.filename}: {reason}" if error.filename else reason)
    except ValueError as error:
        return _fail(str(error))
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        return _fail("not enough memory; take a smaller batch or model, or fewer bits a weight")


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage())
        return 0 if argv else 2
    name, *rest = argv
    if name == "--version":
        print(f"receptance {__version__}")
        return 0
    if name not in APPS:
        near = difflib.get_close_matches(name, APPS, 1)
        known = f"did you mean {near[0]}?" if near else f"there are {', '.join(APPS)}"
        return _fail(f"unknown command {name!r}; {known}")
    with _quick_interrupts(), waiting("loading torch"):
        app = importlib.import_module(f"receptance.apps.{name}")
    _tolerate_any_text()
    _use_what_there_is()
    with warnings.catch_warnings():
        warnings.filterwarnings("always", category=UserWarning, module=r"receptance\.")
        warnings.showwarning = _warn
        try:
            app.main(rest)
        except ValueError as error:
            raise ValueError(as_flags(str(error), _flags(app))) from error
    return 0


def _flags(app: ModuleType) -> dict[str, str]:
    """The flags of an app, or of its commands, by the arguments of the library that they are."""
    from receptance.apps.options import flags

    classes = app.COMMANDS.values() if hasattr(app, "COMMANDS") else [app.Options]
    return {name: flag for each in classes for name, flag in flags(each).items()}


@contextlib.contextmanager
def _quick_interrupts() -> Iterator[None]:
    """Make Ctrl-C end the program at once and in one line while modules are imported.

    An exception would be raised in the middle of another package, which may turn it into another
    error, or lose it. Nothing has been begun yet that would have to be cleaned up.
    """
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return

    def leave(*_: object) -> None:
        os.write(2, b"\ninterrupted\n")
        os._exit(_INTERRUPTED)

    signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _use_what_there_is() -> None:
    """Limit torch's threads to the CPUs that this process may use; a container may have few."""
    if "torch" in sys.modules:
        import torch

        from receptance.ops.threads import usable_threads

        torch.set_num_threads(usable_threads())


def _warn(message: Warning | str, *_: object, **__: object) -> None:
    """Print a warning as one line, without its place in the code."""
    _say("warning", as_flags(str(message)))


def _tolerate_any_text() -> None:
    """Accept any bytes and any characters, since models and users may write anything.

    A character that the terminal's encoding lacks is shown as a question mark. Input bytes that are
    not UTF-8 become lone surrogates, as they do in arguments.
    """
    streams = {sys.stdin: "surrogateescape", sys.stdout: "replace", sys.stderr: "replace"}
    for stream, errors in streams.items():
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors=errors)


def _usage() -> str:
    lines = [f"  {name:10} {what}" for name, what in APPS.items()]
    return "\n".join(
        [
            "usage: receptance COMMAND [OPTIONS]    (receptance COMMAND --help lists them)",
            "",
            *lines,
            "",
            "receptance --version prints the version.",
        ]
    )


def _fail(message: str) -> int:
    _say("error", message)
    return 2


def _say(kind: str, message: str) -> None:
    with contextlib.suppress(OSError):  # a full disk under standard error
        line = visible(" ".join(message.split()), one_line=True)  # names of files and tensors
        print(f"receptance: {kind}: {line}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
