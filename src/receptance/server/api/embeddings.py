"""/v1/embeddings: texts as vectors."""

from __future__ import annotations

import asyncio
import base64
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from msgspec import Meta

from receptance.server.api.completions import read_prompts
from receptance.server.calls import Call, Reply, reply
from receptance.server.errors import refusal
from receptance.server.jobs import Job, Looked


class EmbeddingRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A request for the vectors of texts."""

    model: str
    input: str | list[str | int | list[int]]
    """A text, token ids, or a list of texts or of token ids."""
    encoding_format: Literal["float", "base64"] | None = None
    """Whether a vector is a list of numbers or the base64 of float32 numbers."""
    pooling: Literal["mean", "last"] | None = None
    """Whether a vector is the mean of the features at all positions, which is the default, or those
    at the last one. Not one of OpenAI's parameters."""
    dimensions: Annotated[int, Meta(ge=1)] | None = None
    """It must be the width of the model."""
    user: str | None = None
    """Accepted and without effect."""


class Embedding(msgspec.Struct):
    """The vector of one text."""

    index: int
    embedding: list[float] | str
    object: str = "embedding"


class EmbeddingUsage(msgspec.Struct):
    """Numbers of tokens."""

    prompt_tokens: int
    total_tokens: int


class Embeddings(msgspec.Struct, omit_defaults=True):
    """The vectors of all texts."""

    object: str
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage
    warnings: list[str] | None = None


async def embed(call: Call) -> Reply:
    """The vectors of texts: the features of the model, with length 1."""
    request = call.decode(EmbeddingRequest)
    served = await call.models.served(request.model)
    width = served.engine.config.width
    if request.dimensions not in (None, width):
        raise refusal(f"dimensions must be {width}, the width of this model", "dimensions")
    _, prompts = await asyncio.to_thread(read_prompts, request.input, served.tokenizer, "input")
    look = request.pooling or "mean"
    jobs = [Job(prompt=ids, client=call.owner, look=look) for ids in prompts]
    vectors: dict[int, np.ndarray] = {}
    async with served.submit(jobs) as group:
        async for item in group.events():
            if item is not None and isinstance(item[1], Looked):
                assert item[1].features is not None
                found = item[1].features.numpy()
                vectors[item[0]] = found / max(float(np.linalg.norm(found)), 1e-12)
        count = group.prompt_tokens
    data = [
        Embedding(index, _encoded(vectors[index], request.encoding_format))
        for index in range(len(jobs))
    ]
    warnings = ["user has no effect"] if request.user is not None else None
    usage = EmbeddingUsage(count, count)
    return reply(Embeddings("list", data, request.model, usage, warnings))


def _encoded(vector: np.ndarray, kind: str | None) -> Any:
    if kind == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode("ascii")
    return vector.tolist()
