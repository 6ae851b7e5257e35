"""/v1/chat/completions: conversations that are continued."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from receptance.data.templates import Message
from receptance.server.api.chat_schema import (
    AnswerMessage,
    ChatChoice,
    ChatCompletion,
    ChatRequest,
    ChunkChoice,
    Delta,
    FunctionCall,
    FunctionDelta,
    Logprobs,
    TextPart,
    ToolCall,
    ToolCallDelta,
)
from receptance.server.api.completions import finish_reason
from receptance.server.api.tokens import Usage, token_logprob, usage
from receptance.server.calls import STILL_HERE, Call, Reply, Streamed, event, first, reply
from receptance.server.dialogue import Dialogue, Outcome, prepare, said, save
from receptance.server.errors import ApiError, refusal
from receptance.server.reply_text import Part
from receptance.server.serving import Group, Served, new_id
from receptance.server.tools import Choice, Tool, call_text, chosen, result_text


async def chat(call: Call) -> Reply | Streamed:
    """Answer in a conversation."""
    request = call.decode(ChatRequest)
    request.check_stream()
    served = await call.models.served(request.model)
    maker = await _Maker.make(call, request, served)
    if request.stream:
        return Streamed(await first(maker.stream()))
    return reply(await maker.whole())


def messages_of(request: ChatRequest) -> list[Message]:
    """The messages as a template takes them; ApiError for one that says nothing."""
    found = []
    for place, message in enumerate(request.messages):
        text = _content(message.content)
        role = {"developer": "system", "tool": "user"}.get(message.role, message.role)
        if message.role == "tool":
            text = result_text(text)
        for made in message.tool_calls or ():
            call = written_call(made.function.name, made.function.arguments)
            text = f"{text}\n{call}" if text else call
        if not text.strip() and role == "assistant":
            continue  # an answer that had no text, or ended inside of a thought
        if not text.strip():
            raise refusal(f"messages[{place}] is empty", f"messages[{place}].content")
        found.append(Message(role, text))
    return found


def _said_back(outcome: Outcome) -> str:
    """An answer as it is part of later prompts, if the client sends it back as it is."""
    texts = [outcome.content]
    for name, arguments in outcome.calls:
        with suppress(ApiError):  # they were cut, so that nobody can send them back
            texts.append(written_call(name, arguments))
    return "\n".join(filter(str.strip, texts))


def _content(content: str | list[TextPart] | None) -> str:
    return "".join(p.text for p in content) if isinstance(content, list) else content or ""


def written_call(name: str, arguments: str) -> str:
    """A call of an earlier answer in the form in which the model wrote it."""
    try:
        compact = json.dumps(json.loads(arguments), ensure_ascii=False, separators=(",", ":"))
    except (ValueError, RecursionError):
        raise refusal("the arguments of a tool call are not JSON", "messages") from None
    # An answer may have been cut between the two escapes of one character.
    whole = compact.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return call_text(name, whole)


def tools_of(request: ChatRequest) -> tuple[list[Tool], Choice]:
    """The tools of a request and whether they are called."""
    tools = [
        Tool(t.function.name, t.function.description or "", t.function.parameters or {})
        for t in request.tools or ()
    ]
    choice = request.tool_choice
    if choice is None:
        return tools, "auto" if tools else "none"
    if not tools and choice != "none":
        raise refusal("tool_choice is only allowed with tools", "tool_choice")
    if isinstance(choice, str):
        return tools, choice
    return tools, chosen(tools, choice.function.name)


@dataclass
class _Choice:
    """One answer that is being written."""

    index: int
    call_ids: list[str] = field(default_factory=list)

    def delta(self, part: Part) -> Delta:
        """A part as the interface writes it."""
        if part.kind == "content":
            return Delta(content=part.text)
        if part.kind == "thought":
            return Delta(reasoning_content=part.text)
        if part.kind == "arguments":
            piece = ToolCallDelta(part.call, FunctionDelta(part.text))
            return Delta(tool_calls=[piece])
        self.call_ids.append(new_id("call_"))
        head = FunctionDelta("", part.text)
        return Delta(tool_calls=[ToolCallDelta(part.call, head, self.call_ids[-1], "function")])


class _Maker:
    """What turns one request into an answer, at once or in events."""

    def __init__(self, request: ChatRequest, served: Served, dialogue: Dialogue) -> None:
        self.request, self.served, self.dialogue = request, served, dialogue
        self.count = request.n or 1
        self.head: dict[str, Any] = {
            "id": new_id("chatcmpl-"),
            "created": int(time.time()),
            "model": request.model,
            "system_fingerprint": f"fp_{served.fingerprint[:12]}",
        }

    @classmethod
    async def make(cls, call: Call, request: ChatRequest, served: Served) -> _Maker:
        """Check a request and prepare its prompt."""
        if request.top_logprobs is not None and not request.logprobs:
            raise refusal("top_logprobs is only allowed with logprobs", "top_logprobs")
        if request.max_tokens is not None and request.max_completion_tokens is not None:
            raise refusal("give max_completion_tokens or max_tokens, not both", "max_tokens")
        tools, choice = tools_of(request)
        kind = request.response_format
        schema: dict[str, Any] | None = None
        if kind is not None and kind.type != "text":
            schema = {"type": "object"}
            if kind.type == "json_schema":
                if kind.json_schema is None or kind.json_schema.schema is None:
                    raise refusal("response_format: json_schema is missing", "response_format")
                schema = kind.json_schema.schema
        asked = request.max_completion_tokens
        dialogue = await prepare(
            call,
            served,
            request,
            messages_of(request),
            max_tokens=request.max_tokens if asked is None else asked,
            likeliest=(request.top_logprobs or 0) if request.logprobs else None,
            tools=tools,
            choice=choice,
            parallel=request.parallel_tool_calls is not False,
            schema=schema,
        )
        return cls(request, served, dialogue)

    async def whole(self) -> ChatCompletion:
        """The answers at once."""
        outcomes = [Outcome() for _ in range(self.count)]
        logprobs: list[Logprobs | None] = [None] * self.count
        async with self.served.submit([self.dialogue.job]) as group:
            async for index, step in said(group, self.dialogue):
                if step is None:
                    continue
                outcomes[index].add(step)
                if (more := self._logprobs(step)) is not None:
                    known = logprobs[index]
                    logprobs[index] = more if known is None else known
                    if known is not None:
                        known.content += more.content
        await save(self.dialogue, self.served, _said_back(outcomes[0]))
        choices = [
            ChatChoice(index, _message(outcome), logprobs[index], _reason(outcome))
            for index, outcome in enumerate(outcomes)
        ]
        return self._answer("chat.completion", choices, usage=self._usage(group, outcomes))

    async def stream(self) -> AsyncIterator[bytes]:
        """The answers in events."""
        choices = [_Choice(index) for index in range(self.count)]
        outcomes = [Outcome() for _ in choices]
        begun = False
        async with self.served.submit([self.dialogue.job]) as group:
            async for index, step in said(group, self.dialogue):
                if step is None:
                    if begun:
                        yield STILL_HERE
                    elif index >= 0:
                        begun = True
                        for choice in choices:
                            yield self._event(choice.index, Delta(role="assistant", content=""))
                    continue
                outcomes[index].add(step)
                told = self._logprobs(step)
                for part in step.parts:
                    yield self._event(index, choices[index].delta(part), told)
                    told = None
                if told is not None:
                    yield self._event(index, Delta(content=""), told)
                if step.reason is not None:
                    yield self._event(index, Delta(), None, _reason(outcomes[index]))
        await save(self.dialogue, self.served, _said_back(outcomes[0]))
        options = self.request.stream_options
        if options is not None and options.include_usage:
            yield event(self._answer(_CHUNK, [], usage=self._usage(group, outcomes)))

    def _event(
        self, index: int, delta: Delta, told: Logprobs | None = None, reason: str | None = None
    ) -> bytes:
        return event(self._answer(_CHUNK, [ChunkChoice(index, delta, told, reason)]))

    def _logprobs(self, step: Any) -> Logprobs | None:
        token = step.token
        if not self.request.logprobs or token.id < 0 or token.finish_reason == "end_of_text":
            return None
        tokenizer = self.served.tokenizer
        told = token_logprob(tokenizer, token.id, token.log_probability, token.likeliest)
        return Logprobs([told])

    def _usage(self, group: Group, outcomes: list[Outcome]) -> Usage:
        thought = sum(outcome.thought_tokens for outcome in outcomes)
        return usage(group.prompt_tokens, group.written, group.cached, thought)

    def _answer(self, kind: str, choices: list[Any], **rest: Any) -> ChatCompletion:
        warnings = self.request.warnings() or None
        return ChatCompletion(**self.head, object=kind, choices=choices, warnings=warnings, **rest)


_CHUNK = "chat.completion.chunk"


def _message(outcome: Outcome) -> AnswerMessage:
    calls = [
        ToolCall(id=new_id("call_"), function=FunctionCall(name=name, arguments=arguments))
        for name, arguments in outcome.calls
    ]
    content = outcome.content if outcome.content or not calls else None
    return AnswerMessage(
        "assistant",
        content,
        reasoning_content=outcome.thought or None,
        tool_calls=calls or None,
    )


def _reason(outcome: Outcome) -> str | None:
    reason = finish_reason(outcome.reason)
    return "tool_calls" if reason == "stop" and outcome.calls else reason
