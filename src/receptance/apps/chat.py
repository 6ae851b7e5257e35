"""receptance chat: talk with a model in the terminal; its state holds the conversation."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Annotated, ClassVar, Literal

import tyro

from receptance.apps.console import say_device
from receptance.apps.options import parse
from receptance.apps.text import visible
from receptance.apps.waiting import until_first, waiting
from receptance.data.templates import TEMPLATES, THINKING, TURN_END, Template
from receptance.engine import EngineOptions
from receptance.engine.base import Engine
from receptance.inference.generation import Generation, prefill
from receptance.inference.rows import Request
from receptance.inference.sampling import Sampling
from receptance.state import State, unread_text
from receptance.storage.directories import expanded
from receptance.tokenizer import Tokenizer

HELP = """/reset       forget the conversation
/retry       answer the last message again, differently
/save FILE   store the conversation's state
/load FILE   continue from a stored state
/help        this list
/quit        leave (so does Ctrl-D)

A line that ends with \\ goes on in the next one; a message of many lines stands
between two lines of \"""."""

_QUOTES, _MORE = '"""', "... "


@dataclass(frozen=True, kw_only=True)
class Options:
    """Talk with a model. During the conversation /help lists the commands."""

    COMMON: ClassVar[str] = (
        "--template --think --max-tokens --temperature --top-p --seed --tokenizer --dtype --device"
    )
    EXAMPLES: ClassVar[tuple[str, ...]] = (
        "receptance chat runs/mine",
        "receptance chat World.pth --tokenizer rwkv_vocab_v20230424.txt --dtype int8",
        "receptance chat hf:OWNER/RWKV7-G1 --template g1 --think long",
    )

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """The model: a checkpoint directory, training run, .pth file, Hugging Face directory or hub
    id."""
    template: Literal["world", "raven", "instruction", "qa", "g1"] = "world"
    """Write turns in this format; it should be the one that the model was trained with."""
    think: Literal["no", "short", "long"] = "no"
    """Begin each answer with nothing, an empty thought, or a thought; for RWKV-7 G1."""
    user: str | None = None
    """Call your side by this name instead of that of the template."""
    assistant: str | None = None
    """Call the model's side by this name instead of that of the template."""
    max_tokens: int = 500
    """End an answer after this number of tokens."""
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = field(
        # docs/generation.md says how these were chosen.
        default_factory=lambda: Sampling(top_p=0.7, presence_penalty=0.1, frequency_penalty=0.1)
    )
    seed: int = 0
    """Draw the random choices from this seed, 0 unless it is given; each answer has random numbers
    of its own."""
    engine: Annotated[EngineOptions, tyro.conf.arg(name="")] = field(default_factory=EngineOptions)


@dataclass(frozen=True)
class History:
    """The text of a conversation, and the state that has read the beginning of it."""

    text: bytes = b""
    ids: list[int] = field(default_factory=list)
    """The tokens that the state has read: those of the text, perhaps without the last ones."""
    state: State | None = None
    """The state behind these tokens; None if nothing has been read."""


class Chat:
    """A conversation that is kept as a state, so that earlier turns are not read again.

    The model reads the tokens that its training text would have: the conversation is encoded as one
    text. The last tokens of a turn may change when the next turn follows: in the Pile's vocabulary
    a blank line is one token at the end of a text and two before a word. So the state stops before
    them, and the tokens that it has read are compared with those of the whole text every time.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        options: Options,
    ) -> None:
        self.engine, self.tokenizer, self.options = engine, tokenizer, options
        self.template, self.thought = _template(options), THINKING[options.think]
        self.history = self._start = History()
        self.draws = 0
        self._last: tuple[History, str] | None = None

    def answer(self, message: str) -> Iterator[str]:
        """The answer to a message in pieces; the history changes when the last has been taken."""
        before = self.history
        # The message need not be UTF-8; _tolerate_any_text in __main__ keeps its bytes.
        prompt = self.template.prompt(message) + self.thought
        text = before.text + prompt.encode("utf-8", "surrogateescape")
        self._last = (before, message)
        ids = self.tokenizer.encode(text)
        known = self._beginning(ids, before)
        generation = Generation(
            self.engine,
            self.tokenizer,
            [ids[len(known.ids) :]],
            sampling=self.options.sampling,
            max_tokens=self.options.max_tokens,
            stop=self.template.stops,
            seed=(self.options.seed + self.draws) % (1 << 63),
            log_probabilities=False,
            state=known.state,
        )
        self.draws += 1
        reply = ""
        try:
            for token in generation:
                reply += token.text
                ids.append(token.id)
                yield token.text
        finally:  # After an interrupt, too, the history holds the text that was shown.
            read = ids[: len(ids) - len(generation.unread[0])]
            after = History(ids=read, state=generation.states[0])
            # Text that the model wrote behind the stop string is not part of the conversation.
            self._remember(text + (reply.rstrip() + TURN_END).encode(), after, known)

    def retry(self) -> Iterator[str]:
        """Another answer to the last message."""
        if self._last is None:
            raise ValueError("there is no message to answer again yet")
        self.history, message = self._last
        return self.answer(message)

    def reset(self) -> None:
        """Forget everything."""
        self.history = self._start = History()
        self._last = None

    def save(self, path: str) -> None:
        """Store the conversation's state, and the end of its text that the state has not read."""
        if not self.history.text and self.history.state is None:
            raise ValueError("nothing has been said yet")
        state, unread = self._separated()
        state.save(expanded(path), self.engine.fingerprint(), unread=unread)

    def load(self, path: str) -> None:
        """Continue from a stored state."""
        file = expanded(path)
        state = self.engine.load_state(file)
        if state.batch != 1:
            raise ValueError(f"{path} holds {state.batch} texts; a conversation is one")
        self._start = History(state=state)
        self.history = replace(self._start, text=unread_text(file).encode())
        self._last = None

    def _beginning(self, ids: list[int], *known: History) -> History:
        """The first history that has read the beginning of these tokens, but not all of them."""
        for history in known:
            read = history.ids
            if history.state is not None and len(read) < len(ids) and ids[: len(read)] == read:
                return history
        return self._start

    def _remember(self, text: bytes, *known: History) -> None:
        """Make this text the history, and read the tokens that cannot change any more."""
        alone = self.tokenizer.encode(text)
        followed = self.tokenizer.encode(text + self.template.prompt("x").encode())
        pairs = enumerate(zip(alone, followed, strict=False))
        certain = next((n for n, (one, other) in pairs if one != other), len(alone))
        begun = self._beginning(followed, *known)
        rest = followed[len(begun.ids) : certain]
        if not rest:
            self.history = replace(begun, text=text)
            return
        _, state = prefill(self.engine, [rest], begun.state)
        self.history = History(text, begun.ids + rest, state)

    def _separated(self) -> tuple[State, str]:
        """The state, and the end of the text that the state has not read."""
        text, ids, state = self.history.text, self.history.ids, self.history.state
        read = self.tokenizer.decode_bytes(ids)
        if state is not None and text.startswith(read):
            with suppress(UnicodeDecodeError):  # The rest may begin inside a character.
                return state, text[len(read) :].decode()
        whole = self.tokenizer.encode(text)
        _, state = prefill(self.engine, [whole], self._start.state)
        return state, ""


def _template(options: Options) -> Template:
    template = TEMPLATES[options.template]
    return replace(
        template,
        user=template.user if options.user is None else options.user,
        assistant=template.assistant if options.assistant is None else options.assistant,
    )


def main(argv: list[str]) -> None:
    """Parse, load, and talk until the input ends."""
    options = parse(Options, argv, "receptance chat")
    # A request checks its options; this happens before a model is read.
    Request(max_tokens=options.max_tokens, seed=options.seed)
    if not options.max_tokens:
        raise ValueError("max_tokens is 0; it must be at least 1 in a chat")
    with waiting(f"reading {options.model}"):
        engine, tokenizer = options.engine.load(options.model)
    say_device(engine.device)
    chat = Chat(engine, tokenizer, options)
    if sys.stdin is not None and sys.stdin.isatty():
        with suppress(ImportError):  # Windows has no readline.
            # After this import, input() edits lines and keeps a history.
            importlib.import_module("readline")
    print(f"{options.model}: type a message, or /help.")
    while (line := _ask(f"\n{chat.template.user}: ")) is not None:
        try:
            if not _turn(chat, line.strip()):
                break
        except ValueError as error:
            print(f"error: {visible(str(error), one_line=True)}")
        except KeyboardInterrupt:
            print("\n(interrupted)")


def _ask(prompt: str) -> str | None:
    """Read a message; None at the end of input or Ctrl-C.

    A message is one line, and the next one where a line ends with a backslash; or it is all lines
    between two lines of three double quotes.
    """
    try:
        line = input(prompt)
        if line.strip() == _QUOTES:
            return "\n".join(iter(lambda: input(_MORE), _QUOTES))
        lines = [line]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
            lines.append(input(_MORE))
        return "\n".join(lines)
    # input() raises RuntimeError when there is no standard input.
    except (EOFError, KeyboardInterrupt, RuntimeError):
        print()
        return None


def _turn(chat: Chat, line: str) -> bool:
    """Obey a command or answer a message; False means that the user wants to leave."""
    command, _, rest = line.partition(" ")
    match command:
        case "":
            pass
        case "/quit" | "/exit":
            return False
        case "/help":
            print(HELP)
        case "/reset":
            chat.reset()
            print("(forgotten)")
        case "/save" | "/load":
            if not rest.strip():
                raise ValueError(f"{command} needs a file name")
            (chat.save if command == "/save" else chat.load)(rest.strip())
            print(f"({command[1:]} {rest.strip()}: done)")
        case "/retry":
            _show(chat, chat.retry())
        case _ if command.startswith("/"):
            raise ValueError(f"unknown command {command}; /help lists them")
        case _:
            _show(chat, chat.answer(line))
    return True


def _show(chat: Chat, pieces: Iterator[str]) -> None:
    shown = visible if sys.stdout is not None and sys.stdout.isatty() else str
    print(f"\n{chat.template.assistant}:{chat.thought}", end="")
    try:
        for piece in until_first("reading the message", pieces):
            print(shown(piece), end="", flush=True)
    finally:
        pieces.close()  # type: ignore[attr-defined]
    print()
