"""The requests and answers of /v1/messages."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from receptance.server import limits


class TextBlock(msgspec.Struct, tag="text", kw_only=True, forbid_unknown_fields=True):
    """A text."""

    text: str
    cache_control: dict[str, Any] | None = None
    citations: list[Any] | None = None


class PlainText(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A text where nothing else may stand."""

    type: Literal["text"]
    text: str
    cache_control: dict[str, Any] | None = None
    citations: list[Any] | None = None


class ToolUseBlock(msgspec.Struct, tag="tool_use", kw_only=True, forbid_unknown_fields=True):
    """A call of a tool."""

    id: str
    name: str
    input: dict[str, Any]
    cache_control: dict[str, Any] | None = None
    caller: dict[str, Any] | None = None


class ToolResultBlock(msgspec.Struct, tag="tool_result", kw_only=True, forbid_unknown_fields=True):
    """The result of a call."""

    tool_use_id: str
    content: str | list[PlainText] = ""
    is_error: bool | None = None
    cache_control: dict[str, Any] | None = None


class ThinkingBlock(msgspec.Struct, tag="thinking", kw_only=True, forbid_unknown_fields=True):
    """A thought of an earlier answer."""

    thinking: str
    signature: str = ""


class RedactedThinkingBlock(
    msgspec.Struct, tag="redacted_thinking", kw_only=True, forbid_unknown_fields=True
):
    """A thought of an earlier answer that nobody can read."""

    data: str


Block = TextBlock | ToolUseBlock | ToolResultBlock | ThinkingBlock | RedactedThinkingBlock


class InputMessage(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """One message of a conversation."""

    role: Literal["user", "assistant"]
    content: str | list[Block]


class InputTool(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A tool that may be called."""

    name: Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    input_schema: dict[str, Any]
    description: str | None = None
    type: Literal["custom"] | None = None
    cache_control: dict[str, Any] | None = None


class InputToolChoice(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Whether a tool is called, or which one."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class JsonFormat(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The answer is JSON of a schema."""

    type: Literal["json_schema"]
    schema: dict[str, Any]


class OutputConfig(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What the answer has to be."""

    format: JsonFormat | None = None
    effort: str | None = None
    """Accepted and without effect."""


class _Conversation(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A conversation, and the tools that may be called in it."""

    model: str
    messages: Annotated[list[InputMessage], Meta(min_length=1, max_length=limits.MOST_MESSAGES)]
    system: str | list[PlainText] | None = None
    tools: Annotated[list[InputTool], Meta(max_length=limits.MOST_TOOLS)] | None = None
    tool_choice: InputToolChoice | None = None
    output_config: OutputConfig | None = None
    thinking: dict[str, Any] | None = None
    """Accepted and without effect."""
    cache_control: dict[str, Any] | None = None
    """Accepted and without effect here and in messages, as what can be of use is always kept."""


class CountRequest(_Conversation, kw_only=True, forbid_unknown_fields=True):
    """A request for the number of tokens of a prompt."""


class MessageRequest(_Conversation, kw_only=True, forbid_unknown_fields=True):
    """A request for an answer in a conversation."""

    max_tokens: Annotated[int, Meta(ge=1)]
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: Annotated[float, Meta(ge=0, le=1)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=0, le=1 << 31)] | None = None
    metadata: dict[str, Any] | None = None
    """Accepted and without effect."""
    service_tier: str | None = None
    """Accepted and without effect."""
    seed: int | None = None
    """Not one of Anthropic's parameters."""
    cache_salt: Annotated[str, Meta(max_length=256)] | None = None
    """Not one of Anthropic's parameters."""

    def warnings(self) -> list[str]:
        """What the client said that has no effect."""
        idle = ("thinking", "metadata", "service_tier")
        given = [name for name in idle if getattr(self, name) is not None]
        if self.output_config is not None and self.output_config.effort is not None:
            given.append("output_config.effort")
        if self.cache_control is not None or any(self._cache_marks()):
            given.append("cache_control")
        return [f"{name} has no effect" for name in given]

    def _cache_marks(self) -> Iterator[bool]:
        """Whether each part that may have cache_control has it."""
        blocks = (m.content for m in self.messages if isinstance(m.content, list))
        system = self.system if isinstance(self.system, list) else []
        for part in (*chain.from_iterable(blocks), *system, *(self.tools or ())):
            yield getattr(part, "cache_control", None) is not None


class MessageUsage(msgspec.Struct):
    """Numbers of tokens; the prompt has those of input and cache together."""

    input_tokens: int
    output_tokens: int
    cache_read_input_tokens: int = 0
    cache_creation_input_tokens: int = 0


class AnswerMessage(msgspec.Struct, omit_defaults=True):
    """A whole answer."""

    id: str
    model: str
    content: list[Any]
    stop_reason: str | None
    stop_sequence: str | None
    usage: MessageUsage
    type: str = msgspec.field(default_factory=lambda: "message")
    role: str = msgspec.field(default_factory=lambda: "assistant")
    warnings: list[str] | None = None


class TokenCount(msgspec.Struct):
    """The number of tokens of a prompt."""

    input_tokens: int
