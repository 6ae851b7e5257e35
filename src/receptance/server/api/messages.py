"""/v1/messages: conversations, as Anthropic's clients have them."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

from receptance.data.templates import Message
from receptance.server.api.chat import written_call
from receptance.server.api.messages_schema import (
    AnswerMessage,
    CountRequest,
    InputMessage,
    MessageRequest,
    MessageUsage,
    RedactedThinkingBlock,
    TextBlock,
    ThinkingBlock,
    TokenCount,
    ToolResultBlock,
    ToolUseBlock,
)
from receptance.server.api.options import TextOptions, stop_strings
from receptance.server.blocks import Block, Blocks, Change, stop_string
from receptance.server.calls import Call, Reply, Streamed, event, first, reply
from receptance.server.dialogue import Dialogue, Outcome, prepare, said
from receptance.server.errors import refusal
from receptance.server.serving import Group, Served, new_id
from receptance.server.tools import Choice, Tool, chosen, result_text


async def create(call: Call) -> Reply | Streamed:
    """Answer in a conversation, as Anthropic's interface does."""
    request = call.decode(MessageRequest)
    served = await call.models.served(request.model)
    maker = _Maker(request, served, await _dialogue(call, served, request))
    if request.stream:
        return Streamed(await first(maker.stream()), end=b"", anthropic=True)
    return reply(await maker.whole())


async def count_tokens(call: Call) -> Reply:
    """How many tokens the prompt of a conversation has."""
    request = call.decode(CountRequest)
    served = await call.models.served(request.model)
    dialogue = await _dialogue(call, served, request)
    return reply(TokenCount(len(dialogue.job.prompt)))


async def _dialogue(call: Call, served: Served, request: MessageRequest | CountRequest) -> Dialogue:
    options, limit = TextOptions(model=request.model), 1
    if isinstance(request, MessageRequest):
        options = TextOptions(
            model=request.model,
            temperature=request.temperature,
            top_p=request.top_p,
            top_k=request.top_k,
            stop=list(stop_strings(request.stop_sequences, "stop_sequences")),
            seed=request.seed,
            cache_salt=request.cache_salt,
        )
        limit = request.max_tokens
    messages = list(_messages(request))
    answer = ""
    if messages and messages[-1].role == "assistant":
        answer = messages.pop().text  # the answer goes on from here
    form = request.output_config.format if request.output_config is not None else None
    tools, choice, parallel = _tools(request)
    return await prepare(
        call,
        served,
        options,
        messages,
        max_tokens=limit,
        tools=tools,
        choice=choice,
        parallel=parallel,
        schema=form.schema if form is not None else None,
        answer=answer,
    )


def _messages(request: MessageRequest | CountRequest) -> Iterator[Message]:
    system = request.system
    if system is not None:
        text = system if isinstance(system, str) else "\n".join(b.text for b in system)
        if text.strip():
            yield Message("system", text)
    for place, message in enumerate(request.messages):
        text = "\n".join(_texts(message))
        if not text.strip() and message.role == "assistant":
            continue  # an answer that had no text, or ended inside of a thought
        if not text.strip():
            raise refusal(f"messages.{place}: the content is empty")
        yield Message(message.role, text)


def _texts(message: InputMessage) -> Iterator[str]:
    if isinstance(message.content, str):
        yield message.content
        return
    for block in message.content:
        match block:
            case TextBlock():
                yield block.text
            case ToolUseBlock():
                yield written_call(block.name, json.dumps(block.input))
            case ToolResultBlock(content=content):
                inner = content if isinstance(content, str) else "\n".join(b.text for b in content)
                yield result_text(f"Error: {inner}" if block.is_error else inner)
            case ThinkingBlock() | RedactedThinkingBlock():
                pass  # thoughts of earlier answers are not part of the prompt


def _tools(request: MessageRequest | CountRequest) -> tuple[list[Tool], Choice, bool]:
    tools = [Tool(t.name, t.description or "", t.input_schema) for t in request.tools or ()]
    choice = request.tool_choice
    if choice is None:
        return tools, "auto" if tools else "none", True
    if not tools and choice.type != "none":
        raise refusal("tool_choice is only allowed with tools")
    parallel = not choice.disable_parallel_tool_use
    if choice.type == "tool":
        return tools, chosen(tools, choice.name), parallel
    return tools, "required" if choice.type == "any" else choice.type, parallel


class _Maker:
    """What turns one request into an answer, at once or in events."""

    def __init__(self, request: MessageRequest, served: Served, dialogue: Dialogue) -> None:
        self.request, self.served, self.dialogue = request, served, dialogue
        self.blocks, self.outcome = Blocks({"call": "toolu_"}), Outcome()
        self.id = new_id("msg_")

    async def whole(self) -> AnswerMessage:
        """The answer at once."""
        async with self.served.submit([self.dialogue.job]) as group:
            async for _ in self._changes(group):
                pass
        content = [_content(block, block.text) for block in self.blocks.all]
        return self._answer(content, group, *self._stop())

    async def stream(self) -> AsyncIterator[bytes]:
        """The answer in events."""
        begun = False
        async with self.served.submit([self.dialogue.job]) as group:
            async for change in self._changes(group):
                if change == "begun":
                    begun = True
                    message = self._answer([], group, None, None)
                    yield _event("message_start", message=message)
                elif isinstance(change, str):
                    if begun:
                        yield _event("ping")
                else:
                    yield _changed(change)
            reason, stop = self._stop()
            delta = {"stop_reason": reason, "stop_sequence": stop}
            yield _event("message_delta", delta=delta, usage={"output_tokens": group.written})
            yield _event("message_stop")

    async def _changes(self, group: Group) -> AsyncIterator[Change | str]:
        async for index, step in said(group, self.dialogue):
            if step is None:
                yield "begun" if index >= 0 else "waiting"
                continue
            self.outcome.add(step)
            for part in step.parts:
                for change in self.blocks.add(part):
                    yield change
        for change in self.blocks.finish():
            yield change

    def _stop(self) -> tuple[str, str | None]:
        """Why the answer ended, and the stop string that ended it."""
        outcome, dialogue = self.outcome, self.dialogue
        if outcome.reason == "length":
            return "max_tokens", None
        if (stop := stop_string(outcome, dialogue.own_stops, self.served.tokenizer)) is not None:
            return "stop_sequence", stop
        return "tool_use" if outcome.calls else "end_turn", None

    def _answer(
        self, content: list[Any], group: Group, reason: str | None, stop: str | None
    ) -> AnswerMessage:
        usage = MessageUsage(group.prompt_tokens - group.cached, group.written, group.cached)
        warnings = self.request.warnings() or None
        return AnswerMessage(
            self.id, self.request.model, content, reason, stop, usage, warnings=warnings
        )


def _content(block: Block, text: str) -> dict[str, Any]:
    """A block as the interface writes it, with its text or the beginning of it."""
    if block.kind == "content":
        return {"type": "text", "text": text}
    if block.kind == "thought":
        return {"type": "thinking", "thinking": text, "signature": ""}
    try:
        arguments = json.loads(text) if text else {}
    except ValueError:  # the answer was cut off inside of the call
        arguments = {}
    return {"type": "tool_use", "id": block.id, "name": block.name, "input": arguments}


def _changed(change: Change) -> bytes:
    what, block, text = change
    if what == "open":
        begun = _content(block, "")
        return _event("content_block_start", index=block.index, content_block=begun)
    if what == "close":
        return _event("content_block_stop", index=block.index)
    kind, name = {
        "content": ("text_delta", "text"),
        "thought": ("thinking_delta", "thinking"),
        "call": ("input_json_delta", "partial_json"),
    }[block.kind]
    return _event("content_block_delta", index=block.index, delta={"type": kind, name: text})


def _event(kind: str, **fields: Any) -> bytes:
    return event({"type": kind, **fields}, kind)
