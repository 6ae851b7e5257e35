"""A conversation on its way to an answer, for all interfaces that have conversations."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from receptance.data.templates import Message
from receptance.inference.rows import Token
from receptance.server.api.options import TextOptions, allowed_tokens
from receptance.server.calls import Call
from receptance.server.errors import refusal
from receptance.server.grammar import Grammar
from receptance.server.jobs import Begun, Job, Wrote
from receptance.server.models import Beginning
from receptance.server.prompts import encode, render
from receptance.server.reply_text import Part, ReplyReader
from receptance.server.serving import Group, Served
from receptance.server.tools import Choice, Tool, calls_grammar, told

_DEFAULT_TOKENS = 2048


@dataclass(frozen=True)
class Dialogue:
    """A prompt with all that is needed to read its answers."""

    messages: Sequence[Message]
    job: Job
    beginning: Beginning
    thinking: bool
    tools: bool
    own_stops: tuple[str, ...]
    """The stop strings of the client, without those of the template."""


@dataclass(frozen=True, slots=True)
class Step:
    """What one more token says."""

    token: Token
    parts: list[Part]
    reason: str | None


@dataclass
class Outcome:
    """One answer, as far as it has been written."""

    content: str = ""
    thought: str = ""
    calls: list[tuple[str, str]] = field(default_factory=list)
    """The names of tools with their arguments as JSON."""
    reason: str | None = None
    thought_tokens: int = 0
    text: str = ""
    """All of its text, as the engine gave it."""
    ids: list[int] = field(default_factory=list)

    def add(self, step: Step) -> None:
        """Go on by a step."""
        self.reason = step.reason or self.reason
        self.text += step.token.text
        self.ids.append(step.token.id)
        for part in step.parts:
            match part.kind:
                case "content":
                    self.content += part.text
                case "thought":
                    self.thought += part.text
                case "call":
                    self.calls.append((part.text, ""))
                case "arguments":
                    name, before = self.calls[part.call]
                    self.calls[part.call] = name, before + part.text
        self.thought_tokens += bool(self.thought and not self.content and not self.calls)


async def prepare(
    call: Call,
    served: Served,
    options: TextOptions,
    messages: Sequence[Message],
    *,
    max_tokens: int | None,
    likeliest: int | None = None,
    tools: Sequence[Tool] = (),
    choice: Choice = "none",
    parallel: bool = True,
    schema: dict[str, Any] | None = None,
    answer: str = "",
) -> Dialogue:
    """The job of a conversation; ApiError if something in it cannot be done.

    `schema` is that of the answer if it has to be JSON, and `answer` the text with which it begins.
    """
    bounds = served.limits
    number = allowed_tokens(
        max_tokens, min(_DEFAULT_TOKENS, bounds.max_tokens), bounds, "max_tokens"
    )
    calls = bool(tools) and choice != "none"
    if calls and schema is not None:
        raise refusal("JSON of a schema and tools cannot be used together", "response_format")
    if options.ignore_eos and (calls or schema is not None):
        raise refusal("JSON and tools end where a text ends; leave out ignore_eos", "ignore_eos")
    if calls:
        messages = _with_tools(messages, told(tools))
    # In a thread, as a tokenizer takes seconds for megabytes.
    rendered = await asyncio.to_thread(
        render, served.template, served.tokenizer, messages, answer=answer
    )
    grammar = None
    if calls or schema is not None:
        grammar = await asyncio.to_thread(
            _grammar, call, served, tools, choice, parallel, schema, rendered.thinking
        )
    count = options.n or 1
    requests = options.requests(
        number,
        served.tokenizer.vocab_size,
        likeliest=likeliest,
        stops=rendered.stops,
        constraints=[grammar.begin() if grammar else None for _ in range(count)],
    )
    beginning = call.models.beginning(call.owner, served, options)
    job = Job(
        prompt=rendered.ids,
        requests=requests,
        namespace=beginning.namespace,
        marks=rendered.marks,
        state=beginning.state,
        client=beginning.client,
    )
    stops = tuple(stop for stop in requests[0].stop if stop not in rendered.stops)
    return Dialogue(messages, job, beginning, rendered.thinking, calls, stops)


async def save(dialogue: Dialogue, served: Served, answer: str) -> None:
    """Save the state behind a conversation with its answer, if that is wanted.

    An answer may end inside of a token, or before its turn does, so the conversation is read once
    more, with the end of the turn. Most of it comes from the cache.
    """
    beginning = dialogue.beginning
    if beginning.save_as is None:
        return
    answered = [Message("assistant", answer)] if answer.strip() else []
    ids = await asyncio.to_thread(
        encode, served.template, served.tokenizer, [*dialogue.messages, *answered]
    )
    job = replace(dialogue.job, prompt=ids, requests=(), marks=(), keep=True)
    async with served.submit([job]) as group:
        async for _ in group.events():
            pass
        beginning.save(group)


def _with_tools(messages: Sequence[Message], about: str) -> list[Message]:
    """The messages with what is said of tools at the end of the first system message."""
    if messages and messages[0].role == "system":
        return [Message("system", f"{messages[0].text}\n{about}"), *messages[1:]]
    return [Message("system", about), *messages]


def _grammar(
    call: Call,
    served: Served,
    tools: Sequence[Tool],
    choice: Choice,
    parallel: bool,
    schema: dict[str, Any] | None,
    thinking: bool,
) -> Grammar:
    grammars = call.models.grammars(served)
    if schema is not None:
        return grammars.of_json(schema, "response_format", thinking=thinking)
    for tool in tools:
        grammars.check(tool.parameters, "tools")
    return grammars.compile(calls_grammar(tools, choice, parallel=parallel), "tools")


async def said(group: Group, dialogue: Dialogue) -> AsyncIterator[tuple[int, Step | None]]:
    """What each token of each answer says.

    No step, with the number 0, means that the answer has begun; with -1, that time passes.
    """
    readers = [
        ReplyReader(thinking=dialogue.thinking, tools=dialogue.tools) for _ in dialogue.job.requests
    ]
    async for item in group.events():
        if item is None:
            yield -1, None
        elif isinstance(item[1], Begun):
            yield 0, None
        elif isinstance(happened := item[1], Wrote):
            token = happened.token
            parts = readers[happened.index].push(token.text)
            if token.finish_reason is not None:
                parts += readers[happened.index].finish()
            yield happened.index, Step(token, parts, token.finish_reason)
