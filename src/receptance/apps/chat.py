"""receptance chat: a conversation in the terminal, its history kept as the model's state."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

import tyro

from receptance.data.templates import TEMPLATES, TURN_END, Template
from receptance.engine import EngineOptions
from receptance.engine.base import Engine
from receptance.inference.generation import Generation, prefill
from receptance.inference.rows import Request
from receptance.inference.sampling import Sampling
from receptance.state import State
from receptance.storage.directories import expanded
from receptance.tokenizer import Tokenizer

HELP = """/reset       forget the conversation
/retry       answer the last message again, differently
/save FILE   store the conversation's state
/load FILE   continue from a stored state
/help        this list
/quit        leave (so does Ctrl-D)"""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Talk with a model. Type /help for the commands."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A checkpoint directory, a training run, a .pth file, a Hugging Face directory or hub id."""
    template: Literal["world", "raven", "instruction", "qa"] = "world"
    """The format of turns: the one that the model was trained with."""
    user: str | None = None
    """Name of your side, instead of the template's."""
    assistant: str | None = None
    """Name of the model's side, instead of the template's."""
    max_tokens: int = 500
    """Longest answer."""
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = field(
        default_factory=lambda: Sampling(top_p=0.7, presence_penalty=0.4, frequency_penalty=0.4)
    )
    seed: int = 0
    """Decides the random choices; each answer has its own numbers."""
    engine: Annotated[EngineOptions, tyro.conf.arg(name="")] = field(default_factory=EngineOptions)


class Chat:
    """A conversation, kept as `state`: earlier turns are never read again."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        options: Options,
    ) -> None:
        self.engine, self.tokenizer, self.options = engine, tokenizer, options
        self.template = _template(options)
        self.state: State | None = None  # nothing has been said
        self.draws = 0
        self._last: tuple[State | None, str] | None = None

    def answer(self, message: str) -> Iterator[str]:
        """Pieces of the answer to a message; the state moves on when the last has been taken."""
        # What was typed need not be UTF-8: see the command's _tolerate_any_text.
        text = self.template.prompt(message).encode("utf-8", "surrogateescape")
        prompt = self.tokenizer.encode(text)
        before = self.state
        self._last = (before, message)
        generation = Generation(
            self.engine,
            self.tokenizer,
            [prompt],
            sampling=self.options.sampling,
            max_tokens=self.options.max_tokens,
            stop=(TURN_END,),
            seed=(self.options.seed + self.draws) % (1 << 63),
            log_probabilities=False,
            state=before,
        )
        self.draws += 1
        reply = ""
        try:
            for token in generation:
                reply += token.text
                yield token.text
        finally:  # also when interrupted: the history then holds what was shown
            # Whatever the model wrote behind the stop is not part of the conversation.
            turn = prompt + self.tokenizer.encode(reply.rstrip() + TURN_END)
            _, self.state = prefill(self.engine, [turn], before)

    def retry(self) -> Iterator[str]:
        """Another answer to the last message."""
        if self._last is None:
            raise ValueError("there is no message to answer again yet")
        self.state, message = self._last
        return self.answer(message)

    def reset(self) -> None:
        """Forget everything."""
        self.state, self._last = None, None

    def save(self, path: str) -> None:
        """Store the conversation's state."""
        if self.state is None:
            raise ValueError("nothing has been said yet")
        self.state.save(expanded(path), self.engine.fingerprint())

    def load(self, path: str) -> None:
        """Continue from a stored state."""
        state = State.load(expanded(path), self.engine.fingerprint())
        if state.batch != 1:
            raise ValueError(f"{path} holds {state.batch} texts; a conversation is one")
        self.state, self._last = state.to(self.engine.device), None


def _template(options: Options) -> Template:
    template = TEMPLATES[options.template]
    return replace(
        template,
        user=template.user if options.user is None else options.user,
        assistant=template.assistant if options.assistant is None else options.assistant,
    )


def main(argv: list[str]) -> None:
    """Parse, load, and talk until the input ends."""
    options = tyro.cli(Options, args=argv, prog="receptance chat")
    Request(max_tokens=options.max_tokens, seed=options.seed)  # checks them before a model is read
    if not options.max_tokens:
        raise ValueError("max_tokens is 0; an answer needs at least 1")
    engine, tokenizer = options.engine.load(options.model)
    chat = Chat(engine, tokenizer, options)
    print(f"{options.model}: type a message, or /help.")
    while (line := _ask(f"\n{chat.template.user}: ")) is not None:
        try:
            if not _turn(chat, line.strip()):
                break
        except ValueError as error:
            print(f"error: {error}")
        except KeyboardInterrupt:
            print("\n(interrupted)")


def _ask(prompt: str) -> str | None:
    """A line, or None at the end of input or Ctrl-C."""
    try:
        return input(prompt)
    except (EOFError, KeyboardInterrupt, RuntimeError):  # the last: there is no standard input
        print()
        return None


def _turn(chat: Chat, line: str) -> bool:
    """Obey a command or answer a message; False to leave."""
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
    print(f"\n{chat.template.assistant}:", end="")
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
    finally:
        pieces.close()  # type: ignore[attr-defined]
    print()
