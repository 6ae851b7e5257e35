"""receptance serve: answer over HTTP as OpenAI's and Anthropic's servers do, with a chat page."""

from __future__ import annotations

import sys
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal
from urllib.parse import quote

import tyro

from receptance.apps.options import parse
from receptance.apps.waiting import waiting
from receptance.data.templates import find_template
from receptance.engine import EngineOptions
from receptance.server.limits import Limits
from receptance.server.scheduler import SchedulerOptions
from receptance.storage.directories import expanded

if TYPE_CHECKING:
    from receptance.server.app import App

_LOOPBACK = ("127.0.0.1", "::1", "localhost")
_MIB = 1 << 20
# The engine's thread and that of the sockets take turns after this many seconds. With Python's 5 ms
# each of many streams would wait so long for every piece that it sends.
_TURN = 2e-4


@dataclass(frozen=True, kw_only=True)
class Options:
    """Serve models over HTTP, with the interfaces of OpenAI and Anthropic and a page to chat.

    The models are loaded once and asked by their names: that of the file or directory, or NAME in
    NAME=MODEL. The first one is loaded at once, the others when they are asked for.
    """

    COMMON: ClassVar[str] = (
        "--host --port --keys --template --slots --cache --cache-dir --deterministic "
        "--tokenizer --dtype --device"
    )
    EXAMPLES: ClassVar[tuple[str, ...]] = (
        "receptance serve runs/mine",
        "receptance serve chat=World.pth --host 0.0.0.0 --keys keys.txt",
    )

    models: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="MODEL [MODEL ...]")
    ] = ()
    """The models: checkpoint directories, training runs, .pth files, Hugging Face directories or
    hub ids."""
    host: str = "127.0.0.1"
    """Listen at this address; any but that of this machine alone needs --keys."""
    port: int = 8000
    """Listen at this port; 0 takes a free one."""
    keys: Path | None = None
    """Answer only requests with a key in this file, which has one on each line."""
    anyone: bool = False
    """Answer everybody who can reach the server, without a key."""
    origins: tuple[str, ...] = ()
    """Let pages of this origin ask, such as https://example.org."""
    template: Literal["world", "raven", "instruction", "qa", "g1"] = "world"
    """Write conversations in this format; it should be the one that the model was trained with."""
    adapters: tuple[str, ...] = ()
    """Serve the first model with an adapter as well, as NAME=PATH."""
    budget: int | None = None
    """Keep at most this number of MiB of weights in memory, and unload models for others."""
    cache: int = 1024
    """Keep states of earlier texts in at most this number of MiB of memory."""
    cache_dir: Path | None = None
    """Keep states of earlier texts in this directory as well, for the next start."""
    cache_disk: int = 16384
    """Use at most this number of MiB of that directory."""
    quiet: bool = False
    """Print no line for each answer."""
    scheduler: Annotated[SchedulerOptions, tyro.conf.arg(name="")] = field(
        default_factory=SchedulerOptions
    )
    limits: Annotated[Limits, tyro.conf.arg(name="")] = field(default_factory=Limits)
    engine: Annotated[EngineOptions, tyro.conf.arg(name="")] = field(default_factory=EngineOptions)

    def __post_init__(self) -> None:
        if not 0 <= self.port < 1 << 16:
            raise ValueError(f"port is {self.port}; it must be at least 0 and less than 65536")
        for name in ("cache", "cache_disk", "budget"):
            if (value := getattr(self, name)) is not None and value < 0:
                raise ValueError(f"{name} is {value}; it must be at least 0")


def main(argv: list[str]) -> None:
    """Parse, load the first model, and serve until a signal."""
    options = parse(Options, argv, "receptance serve")
    _check_doors(options)
    _serve(make_app(options), options)


def _sources(options: Options) -> dict[str, tuple[str, EngineOptions]]:
    """What is served, by name: the source of a model and the options to load it with."""
    if not options.models:
        raise ValueError("MODEL is missing; name a model, such as tiny-python")
    found: dict[str, tuple[str, EngineOptions]] = {}
    for word in options.models:
        name, equals, source = word.partition("=")
        source = source if equals and name else word
        name = name if equals and name else Path(word.rstrip("/")).name or word
        if name in (".", ".."):
            raise ValueError(f"{name!r} cannot be the name of a model; write NAME=MODEL")
        if name in found:
            raise ValueError(f"two models are named {name}; give them names, as in NAME=MODEL")
        found[name] = source, options.engine
    first, (source, engine) = next(iter(found.items()))
    for word in options.adapters:
        name, equals, path = word.partition("=")
        if not (name and path):
            raise ValueError(f"--adapters is {word!r}; it must be NAME=PATH")
        if f"{first}:{name}" in found:
            raise ValueError(f"two adapters are named {name}; give each a name of its own")
        found[f"{first}:{name}"] = source, replace(engine, adapter=expanded(Path(path)))
    return found


def _check_doors(options: Options) -> None:
    """ValueError if strangers could ask without a key, and nobody said that they may."""
    if options.keys is not None and options.anyone:
        raise ValueError("--keys and --anyone contradict each other; leave one out")
    if options.host not in _LOOPBACK and options.keys is None and not options.anyone:
        raise ValueError(
            f"at {options.host} others can reach the server; give --keys FILE with the keys of "
            "those who may ask, or --anyone if all may"
        )


def make_app(options: Options) -> App:
    """The application that options describe, whose first model is loaded; ValueError as `main`."""
    sources = _sources(options)
    try:
        import msgspec  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"the server needs {error.name}: "
            "pip install starlette uvicorn msgspec prometheus-client"
        ) from None
    from receptance.server.app import App
    from receptance.server.cache import StateCache
    from receptance.server.keys import Keys
    from receptance.server.models import Models, Source, weight_bytes
    from receptance.server.serving import Served
    from receptance.server.shelf import StateDirectory
    from receptance.storage.lock import RunLock

    keys = Keys.read(expanded(options.keys)) if options.keys is not None else None
    template = find_template(options.template)

    listed: list[Source] = []

    def load(name: str) -> Served:
        source, engine_options = sources[name]
        base = listed[0].served if engine_options.adapter is not None else None
        engine, tokenizer = engine_options.load(source, base.engine if base is not None else None)
        with ExitStack() as stack:
            shelf = None
            if options.cache_dir is not None:
                place = expanded(options.cache_dir) / quote(name, safe="")
                stack.enter_context(RunLock(place))
                shelf = StateDirectory(place, options.cache_disk * _MIB)
                stack.callback(shelf.close)
            return Served(
                name,
                engine,
                tokenizer,
                template,
                StateCache(options.cache * _MIB, shelf),
                options=options.scheduler,
                limits=options.limits,
                closing=stack.pop_all().close,
            )

    first, *others = sources
    for name in others:  # They are loaded when somebody asks for them.
        source, engine = sources[name]
        engine.check(source)
    with waiting(f"reading {sources[first][0]}"):
        served = load(first)
    listed += [Source(name, partial(load, name)) for name in sources]
    listed[0].served = served
    budget = None if options.budget is None else options.budget * _MIB
    if budget is not None and (size := weight_bytes([served.engine])) > budget:
        raise ValueError(
            f"--budget is {options.budget} MiB and {first} has {size / _MIB:,.1f} MiB of weights; "
            "name a larger one, or leave it out"
        )
    return App(
        Models(listed, options.limits, budget),
        keys=keys,
        origins=options.origins,
        hosts=None if options.anyone else frozenset(("localhost", "127.0.0.1", "[::1]")),
        log=None if options.quiet else _log,
    )


def _serve(app: App, options: Options) -> None:
    from receptance.server.running import serve

    sys.setswitchinterval(_TURN)
    try:
        serve(app, host=options.host, port=options.port, ready=_say)
    finally:
        for served in app.models.loaded():
            served.stop()  # where the address was in use, nothing else has


def _say(address: str) -> None:
    print(f"receptance: serving at {address} (the page to chat, and /v1 for clients)", flush=True)


def _log(line: str) -> None:
    with suppress(OSError):
        print(f"receptance: {line}", file=sys.stderr, flush=True)
