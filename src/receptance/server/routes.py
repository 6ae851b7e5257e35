"""The table of all routes: what answers, what it reads, and whether it needs a key."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Literal

import msgspec

from receptance.server import limits
from receptance.server.api import (
    about,
    chat,
    chat_schema,
    completions,
    embeddings,
    messages,
    messages_schema,
    named,
    responses,
    responses_schema,
)
from receptance.server.calls import Call, Reply, Streamed

Answering = Callable[[Call], Awaitable[Reply | Streamed]]


@dataclass(frozen=True)
class Endpoint:
    """One method of one path."""

    method: Literal["GET", "POST", "PUT", "DELETE"]
    path: str
    """Parts in braces are variable, as in /v1/models/{model}."""
    answer: Answering
    body: type[msgspec.Struct] | Literal["state"] | None = None
    """What the body holds: JSON of this kind, a state file, or nothing."""
    gives: type[msgspec.Struct] | None = None
    """What the answer holds, where it is JSON of one kind."""
    public: bool = False
    """Whether everybody may ask, without a key."""
    anthropic: bool = False
    """Whether errors have Anthropic's form."""

    @property
    def max_body(self) -> int | None:
        """The bytes that the body may have, if these are not those of the limits."""
        return limits.LARGEST_STATE if self.body == "state" else None


ENDPOINTS = (
    Endpoint("GET", "/health", about.health, public=True),
    Endpoint("GET", "/v1/models", about.models, gives=about.ModelList),
    Endpoint("GET", "/v1/models/{model:path}", about.model, gives=about.ModelInfo),
    Endpoint(
        "POST",
        "/v1/completions",
        completions.complete,
        completions.CompletionRequest,
        completions.Completion,
    ),
    Endpoint(
        "POST",
        "/v1/chat/completions",
        chat.chat,
        chat_schema.ChatRequest,
        chat_schema.ChatCompletion,
    ),
    Endpoint(
        "POST",
        "/v1/responses",
        responses.create,
        responses_schema.ResponseRequest,
        responses_schema.Response,
    ),
    Endpoint(
        "POST",
        "/v1/messages",
        messages.create,
        messages_schema.MessageRequest,
        messages_schema.AnswerMessage,
        anthropic=True,
    ),
    Endpoint(
        "POST",
        "/v1/messages/count_tokens",
        messages.count_tokens,
        messages_schema.CountRequest,
        messages_schema.TokenCount,
        anthropic=True,
    ),
    Endpoint(
        "POST",
        "/v1/embeddings",
        embeddings.embed,
        embeddings.EmbeddingRequest,
        embeddings.Embeddings,
    ),
    Endpoint("POST", "/tokenize", about.tokenize, about.TokenizeRequest, about.Tokens),
    Endpoint("POST", "/detokenize", about.detokenize, about.DetokenizeRequest, about.Detokenized),
    Endpoint("GET", "/tokenizer_info", about.tokenizer_info),
    Endpoint("POST", "/v1/load/{model:path}", about.load, gives=about.ModelInfo),
    Endpoint("POST", "/v1/unload/{model:path}", about.unload, gives=about.ModelInfo),
    Endpoint("GET", "/v1/states", named.states, gives=named.StateList),
    Endpoint("GET", "/v1/states/{name}", named.state, gives=named.StateInfo),
    Endpoint("GET", "/v1/states/{name}/file", named.download),
    Endpoint("PUT", "/v1/states/{name}/file", named.upload, "state", named.StateInfo),
    Endpoint("POST", "/v1/states/{name}/fork", named.fork, named.ForkRequest, named.StateInfo),
    Endpoint("DELETE", "/v1/states/{name}", named.delete),
)
