"""What a server has, and its tokenizers: /v1/models, /tokenize, /detokenize, /tokenizer_info."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from receptance.server.calls import Call, Reply, reply
from receptance.server.errors import ApiError, refusal
from receptance.server.models import Models, Source
from receptance.server.serving import Served


class ModelInfo(msgspec.Struct):
    """A model that may be asked."""

    id: str
    created: int
    loaded: bool
    object: str = "model"
    owned_by: str = "receptance"


class ModelList(msgspec.Struct):
    """All models."""

    data: list[ModelInfo]
    object: str = "list"


class TokenizeRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A text to be cut into tokens."""

    prompt: str
    model: str | None = None
    """The model whose tokenizer is used, by default the first one."""
    add_special_tokens: bool | None = None
    """Accepted: none are ever added."""
    return_token_strs: bool | None = None
    """Whether to tell the texts of the tokens."""


class Tokens(msgspec.Struct, omit_defaults=True):
    """The tokens of a text."""

    tokens: list[int]
    count: int
    max_model_len: int
    token_strs: list[str] | None = None


class DetokenizeRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Tokens whose text is wanted."""

    tokens: list[Annotated[int, Meta(ge=0)]]
    model: str | None = None
    """The model whose tokenizer is used, by default the first one."""


class Detokenized(msgspec.Struct):
    """The text of tokens."""

    prompt: str


# There is no limit to what a recurrent model reads; clients want a number.
_LONGEST = 1 << 30


def _info(source: Source) -> ModelInfo:
    return ModelInfo(source.name, source.created, source.served is not None)


async def models(call: Call) -> Reply:
    """All models."""
    return reply(ModelList([_info(source) for source in call.models.sources.values()]))


async def model(call: Call) -> Reply:
    """One model."""
    return reply(_info(call.models.source(call.path["model"])))


async def load(call: Call) -> Reply:
    """Load a model."""
    await call.models.served(call.path["model"])
    return reply(_info(call.models.source(call.path["model"])))


async def unload(call: Call) -> Reply:
    """Free a model's memory."""
    source = call.models.source(call.path["model"])
    if source.served is not None and not await call.models.unload(source.name):
        raise ApiError(409, "the model is in use", code="model_in_use")
    return reply(_info(source))


async def tokenize(call: Call) -> Reply:
    """The tokens of a text."""
    request = call.decode(TokenizeRequest)
    tokenizer = (await _served(call.models, request.model)).tokenizer
    ids = await asyncio.to_thread(tokenizer.encode, request.prompt)
    texts = [tokenizer.decode([token]) for token in ids] if request.return_token_strs else None
    return reply(Tokens(ids, len(ids), _LONGEST, texts))


async def detokenize(call: Call) -> Reply:
    """The text of tokens."""
    request = call.decode(DetokenizeRequest)
    tokenizer = (await _served(call.models, request.model)).tokenizer
    try:
        return reply(Detokenized(tokenizer.decode(request.tokens)))
    except ValueError as error:
        raise refusal(f"tokens: {error}", "tokens") from None


async def tokenizer_info(call: Call) -> Reply:
    """What lm-evaluation-harness wants to know of a tokenizer.

    The end of text is told as a text whose first token it is; the one of some vocabularies has no
    text of its own, and then nothing is told.
    """
    served = await _served(call.models, None)
    tokenizer = served.tokenizer
    end = tokenizer.decode([tokenizer.end_of_text])
    known = end if end and tokenizer.encode(end)[:1] == [tokenizer.end_of_text] else None
    info: dict[str, Any] = {
        "tokenizer_class": f"{tokenizer.kind}",
        "vocab_size": tokenizer.vocab_size,
        "eos_token": known,
        "eos_token_id": tokenizer.end_of_text,
        "bos_token": None,
        "pad_token": None,
        "chat_template": None,
    }
    return reply(info)


async def health(call: Call) -> Reply:
    """Whether the server can answer."""
    dead = [served.name for served in call.models.loaded() if not served.thread.alive]
    if dead:
        return reply({"status": "failed"}, 503)
    return reply({"status": "ok"})


async def _served(models: Models, name: str | None) -> Served:
    return await models.served(next(iter(models.sources)) if name is None else name)
