"""The requests and answers of /v1/responses."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from receptance.server import limits
from receptance.server.api.options import Likeliest, StreamOptions

LOGPROBS = "message.output_text.logprobs"
"""The word in `include` that asks for the probabilities of an answer's tokens."""


class InputText(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A part of a message; only text is read."""

    type: Literal["input_text", "output_text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class InputItem(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A message, a call or its result; which of the fields are used depends on the type."""

    type: Literal["message", "function_call", "function_call_output", "reasoning"] = "message"
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: str | list[InputText] | None = None
    id: str | None = None
    status: str | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | None = None
    summary: list[Any] | None = None


class FunctionTool(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A function that may be called."""

    name: Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    type: Literal["function"] = "function"
    parameters: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None


class ToolName(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The function that is to be called."""

    name: str
    type: Literal["function"] = "function"


class TextFormat(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What the answer is: text, any JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    schema: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None


class TextSettings(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Settings of the text."""

    format: TextFormat | None = None
    verbosity: str | None = None


class ResponseRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A request for an answer."""

    model: str
    input: (
        Annotated[str, Meta(min_length=1)]
        | Annotated[list[InputItem], Meta(min_length=1, max_length=limits.MOST_MESSAGES)]
    )
    instructions: str | None = None
    max_output_tokens: Annotated[int, Meta(ge=1)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    stream: bool | None = None
    tools: Annotated[list[FunctionTool], Meta(max_length=limits.MOST_TOOLS)] | None = None
    tool_choice: Literal["auto", "required", "none"] | ToolName | None = None
    parallel_tool_calls: bool | None = None
    text: TextSettings | None = None
    previous_response_id: None = None
    """Answers are not kept; send the conversation again, which costs little."""
    background: Literal[False] | None = None
    truncation: Literal["disabled", "auto"] | None = None
    """Without effect, as there is no limit to what a prompt holds."""
    metadata: dict[str, str] | None = None
    store: bool | None = None
    user: str | None = None
    include: list[str] | None = None
    """What else to tell; of all that there may be, the probabilities of tokens are known here."""
    top_logprobs: Likeliest | None = None
    """How many other tokens to tell in each place, with their probabilities."""
    reasoning: dict[str, Any] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    max_tool_calls: int | None = None
    stream_options: StreamOptions | None = None
    seed: int | None = None
    """Not one of this interface's parameters."""
    cache_salt: Annotated[str, Meta(max_length=256)] | None = None
    """Not one of this interface's parameters."""

    def warnings(self) -> list[str]:
        """What the client said that has no effect."""
        idle = (
            *("store", "user", "reasoning", "service_tier", "safety_identifier"),
            *("prompt_cache_key", "prompt_cache_retention", "truncation", "max_tool_calls"),
        )
        given = [name for name in idle if getattr(self, name) is not None]
        given += [f"include of {word[:100]!r}" for word in self.include or () if word != LOGPROBS]
        if self.top_logprobs is not None and not self.logprobs:
            given.append(f"top_logprobs without include of {LOGPROBS!r}")
        return [f"{name} has no effect" for name in given]

    @property
    def logprobs(self) -> bool:
        """Whether the probabilities of tokens are wanted."""
        return LOGPROBS in (self.include or ())


class InputDetails(msgspec.Struct):
    """What is known of a prompt's tokens."""

    cached_tokens: int = 0


class OutputDetails(msgspec.Struct):
    """What is known of an answer's tokens."""

    reasoning_tokens: int = 0


class ResponseUsage(msgspec.Struct):
    """Numbers of tokens."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class Response(msgspec.Struct, kw_only=True):
    """An answer, or what is known of it while it is written."""

    id: str
    created_at: int
    model: str
    status: str
    output: list[Any]
    tools: list[Any]
    tool_choice: Any
    parallel_tool_calls: bool
    text: dict[str, Any]
    object: str = "response"
    error: dict[str, Any] | None = None
    incomplete_details: dict[str, str] | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    metadata: dict[str, str] = {}
    previous_response_id: None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: int = 0
    usage: ResponseUsage | None = None
    warnings: list[str] | None = None
