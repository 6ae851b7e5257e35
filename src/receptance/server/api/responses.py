"""/v1/responses: OpenAI's newer interface, without its store of answers."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

from receptance.data.templates import Message
from receptance.server.api.chat import written_call
from receptance.server.api.options import TextOptions
from receptance.server.api.responses_schema import (
    InputDetails,
    InputItem,
    OutputDetails,
    Response,
    ResponseRequest,
    ResponseUsage,
)
from receptance.server.api.tokens import TokenLogprob, token_logprob
from receptance.server.blocks import Block, Blocks, Change
from receptance.server.calls import STILL_HERE, Call, Reply, Streamed, event, first, reply
from receptance.server.dialogue import Dialogue, Outcome, Step, prepare, said
from receptance.server.errors import refusal
from receptance.server.serving import Group, Served, new_id
from receptance.server.tools import Choice, Tool, chosen, result_text

_IDS = {"content": "msg_", "thought": "rs_", "call": "fc_"}
"""How the ids of an answer's parts begin in OpenAI's interface."""


async def create(call: Call) -> Reply | Streamed:
    """Answer, as OpenAI's newer interface does."""
    request = call.decode(ResponseRequest)
    if request.stream_options is not None and not request.stream:
        raise refusal("stream_options is only allowed with stream", "stream_options")
    served = await call.models.served(request.model)
    options = TextOptions(
        model=request.model,
        temperature=request.temperature,
        top_p=request.top_p,
        seed=request.seed,
        cache_salt=request.cache_salt,
    )
    tools, choice = _tools(request)
    dialogue = await prepare(
        call,
        served,
        options,
        list(_messages(request)),
        max_tokens=request.max_output_tokens,
        likeliest=(request.top_logprobs or 0) if request.logprobs else None,
        tools=tools,
        choice=choice,
        parallel=request.parallel_tool_calls is not False,
        schema=_schema(request),
    )
    maker = _Maker(request, served, dialogue)
    if request.stream:
        return Streamed(await first(maker.stream()), end=b"")
    return reply(await maker.whole())


def _messages(request: ResponseRequest) -> Iterator[Message]:
    if request.instructions:
        yield Message("system", request.instructions)
    if isinstance(request.input, str):
        yield Message("user", request.input)
        return
    for place, item in enumerate(request.input):
        if item.type == "reasoning":
            continue  # thoughts of earlier answers are not part of the prompt
        role, text = _item(item, f"input[{place}]")
        if not text.strip() and role == "assistant":
            continue  # an answer that had no text
        if not text.strip():
            raise refusal(f"input[{place}] is empty", f"input[{place}]")
        yield Message({"developer": "system"}.get(role, role), text)


def _item(item: InputItem, place: str) -> tuple[str, str]:
    """Who says what in an item of the input."""
    if item.type == "function_call":
        if item.name is None or item.arguments is None:
            raise refusal(f"{place}: name and arguments are missing", place)
        return "assistant", written_call(item.name, item.arguments)
    if item.type == "function_call_output":
        if item.output is None:
            raise refusal(f"{place}: output is missing", place)
        return "user", result_text(item.output)
    if item.role is None:
        raise refusal(f"{place}: role is missing", place)
    content = item.content or ""
    return item.role, content if isinstance(content, str) else "".join(p.text for p in content)


def _tools(request: ResponseRequest) -> tuple[list[Tool], Choice]:
    tools = [Tool(t.name, t.description or "", t.parameters or {}) for t in request.tools or ()]
    choice = request.tool_choice
    if choice is None:
        return tools, "auto" if tools else "none"
    if not tools and choice != "none":
        raise refusal("tool_choice is only allowed with tools", "tool_choice")
    if isinstance(choice, str):
        return tools, choice
    return tools, chosen(tools, choice.name)


def _schema(request: ResponseRequest) -> dict[str, Any] | None:
    form = request.text.format if request.text is not None else None
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return {"type": "object"}
    if form.schema is None:
        raise refusal("text.format: schema is missing", "text.format")
    return form.schema


class _Maker:
    """What turns one request into an answer, at once or in events."""

    def __init__(self, request: ResponseRequest, served: Served, dialogue: Dialogue) -> None:
        self.request, self.served, self.dialogue = request, served, dialogue
        self.blocks, self.outcome = Blocks(_IDS), Outcome()
        self.id, self.created, self.number = new_id("resp_"), int(time.time()), -1
        self.untold: list[TokenLogprob] = []  # tokens whose text has not come out yet
        self.fresh: list[TokenLogprob] = []  # those of the last piece of text

    async def whole(self) -> Response:
        """The answer at once."""
        async with self.served.submit([self.dialogue.job]) as group:
            async for _ in self._changes(group):
                pass
        return self._response(group)

    async def stream(self) -> AsyncIterator[bytes]:
        """The answer in events."""
        begun = False
        async with self.served.submit([self.dialogue.job]) as group:
            async for change in self._changes(group):
                if change == "begun":
                    begun = True
                    for kind in ("response.created", "response.in_progress"):
                        yield self._event(kind, response=self._response(None))
                elif isinstance(change, str):
                    if begun:
                        yield STILL_HERE
                else:
                    for piece in self._changed(change):
                        yield piece
            whole = self._response(group)
            yield self._event(f"response.{whole.status}", response=whole)

    async def _changes(self, group: Group) -> AsyncIterator[Change | str]:
        async for index, step in said(group, self.dialogue):
            if step is None:
                yield "begun" if index >= 0 else "waiting"
                continue
            self.outcome.add(step)
            self._note(step)
            for part in step.parts:
                for change in self.blocks.add(part):
                    yield self._told(change)
                self.untold = []
        for change in self.blocks.finish():
            if self.untold and change[1].kind == "content":
                yield self._told(("more", change[1], ""))
            yield change

    def _note(self, step: Step) -> None:
        """Remember a token until its text comes out."""
        token = step.token
        if self.request.logprobs and token.id >= 0 and token.finish_reason != "end_of_text":
            told = token_logprob(
                self.served.tokenizer, token.id, token.log_probability, token.likeliest
            )
            self.untold.append(told)

    def _told(self, change: Change) -> Change:
        """The same change; if it is more of a text, that has the tokens until here."""
        what, block, _ = change
        if what == "more" and block.kind == "content":
            self.fresh, self.untold = self.untold, []
            block.logprobs += self.fresh
        return change

    def _response(self, group: Group | None) -> Response:
        """The answer; without a group, what is known of it at its beginning."""
        request, length = self.request, self.outcome.reason == "length"
        usage = None
        if group is not None:
            usage = ResponseUsage(
                group.prompt_tokens,
                InputDetails(group.cached),
                group.written,
                OutputDetails(self.outcome.thought_tokens),
                group.prompt_tokens + group.written,
            )
        status = "in_progress" if group is None else "incomplete" if length else "completed"
        form = request.text.format if request.text is not None else None
        return Response(
            id=self.id,
            created_at=self.created,
            model=request.model,
            status=status,
            output=[] if group is None else [_item_of(b, "completed") for b in self.blocks.all],
            tools=list(request.tools or ()),
            tool_choice=request.tool_choice or "auto",
            parallel_tool_calls=request.parallel_tool_calls is not False,
            text={"format": form or {"type": "text"}},
            incomplete_details={"reason": "max_output_tokens"} if length else None,
            instructions=request.instructions,
            max_output_tokens=request.max_output_tokens,
            metadata=request.metadata or {},
            temperature=request.temperature,
            top_p=request.top_p,
            top_logprobs=request.top_logprobs or 0,
            usage=usage,
            warnings=request.warnings() or None,
        )

    def _changed(self, change: Change) -> Iterator[bytes]:
        """The events of one change."""
        what, block, text = change
        place = {"item_id": block.id, "output_index": block.index}
        part = {**place, "content_index": 0}
        if what == "open":
            item = _item_of(block, "in_progress", empty=True)
            yield self._event("response.output_item.added", output_index=block.index, item=item)
            if block.kind == "content":
                yield self._event(
                    "response.content_part.added", **part, part=_text_part(Block(0, "content"))
                )
            return
        kind = {
            "content": "response.output_text",
            "thought": "response.reasoning_text",
            "call": "response.function_call_arguments",
        }[block.kind]
        where = place if block.kind == "call" else part
        extra: dict[str, Any] = {"logprobs": block.logprobs} if block.kind == "content" else {}
        if what == "more":
            extra = {"logprobs": self.fresh} if extra else {}
            yield self._event(f"{kind}.delta", **where, delta=text, **extra)
            return
        if block.kind == "call":
            yield self._event(f"{kind}.done", **where, arguments=block.text, name=block.name)
        else:
            yield self._event(f"{kind}.done", **where, text=block.text, **extra)
        if block.kind == "content":
            yield self._event("response.content_part.done", **part, part=_text_part(block))
        item = _item_of(block, "completed")
        yield self._event("response.output_item.done", output_index=block.index, item=item)

    def _event(self, kind: str, **fields: Any) -> bytes:
        self.number += 1
        return event({"type": kind, "sequence_number": self.number, **fields}, kind)


def _text_part(block: Block) -> dict[str, Any]:
    told = block.logprobs
    return {"type": "output_text", "text": block.text, "annotations": [], "logprobs": told}


def _item_of(block: Block, status: str, *, empty: bool = False) -> dict[str, Any]:
    """A block as the interface writes it."""
    text = "" if empty else block.text
    if block.kind == "call":
        return {
            "type": "function_call",
            "id": block.id,
            "call_id": block.id.replace(_IDS["call"], "call_"),
            "name": block.name,
            "arguments": text,
            "status": status,
        }
    if block.kind == "thought":
        content = [] if empty else [{"type": "reasoning_text", "text": text}]
        return {"type": "reasoning", "id": block.id, "summary": [], "content": content}
    content = [] if empty else [_text_part(block)]
    return {
        "type": "message",
        "id": block.id,
        "role": "assistant",
        "status": status,
        "content": content,
    }
