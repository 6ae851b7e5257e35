"""Tokens and their probabilities, as OpenAI's interfaces write them."""

from __future__ import annotations

import msgspec

from receptance.inference.rows import Likeliest
from receptance.tokenizer import Tokenizer

# JSON has no infinity; this is what OpenAI writes for a token that cannot come.
_LEAST = -9999.0


class CachedTokens(msgspec.Struct):
    """What is known of a prompt's tokens."""

    cached_tokens: int = 0


class WrittenTokens(msgspec.Struct):
    """What is known of an answer's tokens."""

    reasoning_tokens: int = 0


class Usage(msgspec.Struct):
    """Numbers of tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens
    completion_tokens_details: WrittenTokens


def usage(prompt: int, written: int, cached: int, reasoning: int = 0) -> Usage:
    """The numbers of tokens of one request."""
    details = CachedTokens(cached), WrittenTokens(reasoning)
    return Usage(prompt, written, prompt + written, *details)


class Alternative(msgspec.Struct):
    """A token that could have been written."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(msgspec.Struct):
    """A token that was written, and those that could have been."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[Alternative]


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """A token as text; where it is no whole text, its bytes as in "bytes:\\xe4\\xbd"."""
    content = tokenizer.decode_bytes([token])
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


def logprob(value: float | None) -> float:
    """A log-probability as JSON can hold it."""
    return _LEAST if value is None else max(value, _LEAST)


def token_logprob(
    tokenizer: Tokenizer, token: int, value: float | None, likeliest: Likeliest
) -> TokenLogprob:
    """A token with its probability and those of others."""
    others = [
        Alternative(
            token_text(tokenizer, other), logprob(score), list(tokenizer.decode_bytes([other]))
        )
        for other, score in likeliest
    ]
    own = list(tokenizer.decode_bytes([token]))
    return TokenLogprob(token_text(tokenizer, token), logprob(value), own, others)
