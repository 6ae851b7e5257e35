"""receptance completion: a script by which a shell completes commands, options and their values."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import pkgutil
import re
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Union

import tyro

from receptance import apps
from receptance.apps.options import parse
from receptance.apps.waiting import waiting


@dataclass(frozen=True, kw_only=True)
class Options:
    """Print a script that makes a shell complete commands, options and their values."""

    EXAMPLES: ClassVar[tuple[str, ...]] = (
        "receptance completion bash >> ~/.bash_completion",
        "receptance completion zsh > ~/.zfunc/_receptance",
        "receptance completion fish > ~/.config/fish/completions/receptance.fish",
    )

    shell: Annotated[
        Literal["bash", "zsh", "fish"], tyro.conf.Positional, tyro.conf.arg(metavar="SHELL")
    ]
    """The shell: bash, zsh or fish."""


def main(argv: list[str]) -> None:
    """Parse, print the script."""
    shell = parse(Options, argv, "receptance completion").shell
    with waiting("gathering the options of all commands"):
        found = script(shell)
    print(found, end="")


def script(shell: str) -> str:
    """The completion script for all commands, as tyro writes it.

    Where nothing else fits, bash completes names of files. The options stand in one line of Python,
    whose strings get no line break, as the script prints one completion a line.
    """
    written = io.StringIO()
    with contextlib.redirect_stdout(written), contextlib.suppress(SystemExit):
        tyro.cli(_commands(), prog="receptance", args=["--tyro-print-completion", shell])
    text = written.getvalue().replace("complete -F ", "complete -o default -F ")
    return re.sub(r"^COMPLETION_SPEC = .*", _in_one_line, text, flags=re.MULTILINE)


def _in_one_line(spec: re.Match[str]) -> str:
    text = re.sub(r"(?<!\\)\\n", " ", spec[0])
    return text.replace("{None}|", "").replace("{None,", "{").replace(" (default: None)", "")


def _commands() -> Any:
    """The options of every command as one union, whose members have the commands' names."""
    names = sorted(module.name for module in pkgutil.iter_modules(apps.__path__))
    modules = {name: importlib.import_module(f"{apps.__name__}.{name}") for name in names}
    kinds = {}
    for name, module in modules.items():
        if hasattr(module, "COMMANDS"):
            inner = ("command", Annotated[_union(module.COMMANDS), tyro.conf.arg(name="")])
            kinds[name] = dataclasses.make_dataclass(name, [inner])
        elif hasattr(module, "Options"):
            kinds[name] = module.Options
    return _union(kinds)


def _union(kinds: dict[str, type]) -> Any:
    """The classes as a union of subcommands with these names."""
    return Union[  # noqa: UP007 - the members are not known before
        tuple(Annotated[kind, tyro.conf.subcommand(name)] for name, kind in kinds.items())
    ]
