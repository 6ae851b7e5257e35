"""The requests and answers of /v1/chat/completions."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import Meta

from receptance.server import limits
from receptance.server.api.options import Likeliest, TextOptions
from receptance.server.api.tokens import TokenLogprob, Usage


class TextPart(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A part of a message; only text is read."""

    type: Literal["text"]
    text: str


class FunctionCall(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A call of a function, with its arguments as JSON."""

    name: str
    arguments: str


class ToolCall(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A call of a tool."""

    id: str
    function: FunctionCall
    type: Literal["function"] = "function"
    index: int | msgspec.UnsetType = msgspec.UNSET


class ChatMessage(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    """A thought of an earlier answer, which is left out of the prompt."""
    refusal: None = None
    annotations: list[dict[str, Any]] | None = None
    audio: None = None
    function_call: None = None


class JsonSchema(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A JSON schema with a name."""

    name: str
    schema: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What the answer is: text, any JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class Function(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A function that may be called."""

    name: Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolDefinition(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A tool that may be called."""

    function: Function
    type: Literal["function"] = "function"


class NamedFunction(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The name of a function."""

    name: str


class NamedTool(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The tool that is to be called."""

    function: NamedFunction
    type: Literal["function"] = "function"


class ChatRequest(TextOptions, kw_only=True, forbid_unknown_fields=True):
    """A request for an answer in a conversation."""

    messages: Annotated[list[ChatMessage], Meta(min_length=1, max_length=limits.MOST_MESSAGES)]
    """The conversation, the oldest message first."""
    max_tokens: Annotated[int, Meta(ge=1)] | None = None
    """Write at most this many tokens."""
    max_completion_tokens: Annotated[int, Meta(ge=1)] | None = None
    """The newer name of max_tokens."""
    logprobs: bool | None = None
    """Whether to tell the probabilities of the tokens."""
    top_logprobs: Likeliest | None = None
    """How many others to tell in each place."""
    response_format: ResponseFormat | None = None
    """What the answer has to be."""
    tools: Annotated[list[ToolDefinition], Meta(max_length=limits.MOST_TOOLS)] | None = None
    """The tools that may be called."""
    tool_choice: Literal["auto", "required", "none"] | NamedTool | None = None
    """Whether a tool is called, or which one."""
    parallel_tool_calls: bool | None = None
    """Whether one answer may have several calls."""
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    """Accepted and without effect."""
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    verbosity: Literal["low", "medium", "high"] | None = None
    modalities: list[Literal["text"]] | None = None

    IDLE: ClassVar[tuple[str, ...]] = (
        *TextOptions.IDLE,
        *("reasoning_effort", "metadata", "store", "service_tier", "safety_identifier"),
        *("prompt_cache_key", "prompt_cache_retention", "verbosity"),
    )

    def warnings(self) -> list[str]:
        """What the client said that has no effect."""
        named = any(message.name is not None for message in self.messages)
        return super().warnings() + ["messages[].name has no effect"] * named


class FunctionDelta(msgspec.Struct, omit_defaults=True):
    """A piece of a call's arguments, with the name first."""

    arguments: str
    name: str | None = None


class ToolCallDelta(msgspec.Struct, omit_defaults=True):
    """A piece of a call."""

    index: int
    function: FunctionDelta
    id: str | None = None
    type: str | None = None


class Delta(msgspec.Struct, omit_defaults=True):
    """A piece of an answer."""

    role: str | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class Logprobs(msgspec.Struct):
    """The tokens of an answer with their probabilities."""

    content: list[TokenLogprob]
    refusal: None = None


class ChunkChoice(msgspec.Struct):
    """A piece of one answer."""

    index: int
    delta: Delta
    logprobs: Logprobs | None = None
    finish_reason: str | None = None


class AnswerMessage(msgspec.Struct, omit_defaults=True):
    """A whole answer."""

    role: str
    content: str | None
    refusal: str | None = msgspec.field(default=None)
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(msgspec.Struct):
    """One whole answer."""

    index: int
    message: AnswerMessage
    logprobs: Logprobs | None = None
    finish_reason: str | None = None


class ChatCompletion(msgspec.Struct, omit_defaults=True):
    """Whole answers, or one event of them."""

    id: str
    object: str
    created: int
    model: str
    choices: list[Any]
    system_fingerprint: str
    usage: Usage | None = None
    warnings: list[str] | None = None
