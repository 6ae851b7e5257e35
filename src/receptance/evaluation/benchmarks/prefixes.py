"""What stands before every context: the protocols of published numbers, and how text is encoded."""

from __future__ import annotations

from typing import Literal, get_args

from receptance.tokenizer import Tokenizer

Prefix = Literal["none", "newline", "token-0"]

PREFIXES: dict[Prefix, str] = {
    "none": "nothing before the context, as in lm-evaluation-harness",
    "newline": 'a newline before the context, as in the scripts of RWKV-4\'s authors ("\\n")',
    "token-0": "token 0 before the context, as in the demos of RWKV-7",
}
"""What each prefix is, in words for people who compare figures."""


def prefix_ids(prefix: Prefix, tokenizer: Tokenizer) -> list[int]:
    """The ids of a prefix, which are encoded by themselves. ValueError for an unknown prefix."""
    if prefix not in PREFIXES:
        raise ValueError(f"prefix is {prefix!r}; wanted one of {', '.join(get_args(Prefix))}")
    return {"none": [], "newline": tokenizer.encode("\n"), "token-0": [0]}[prefix]


def encode_pair(
    tokenizer: Tokenizer, context: str, continuation: str
) -> tuple[list[int], list[int]]:
    """The ids of a context that is not empty, and those of its continuation.

    As in `TemplateLM._encode_pair` of lm-evaluation-harness 0.4.13, white space at the end of the
    context goes to the continuation, and both are encoded together and cut where the context alone
    would end. So the context has no ids if it is white space, and the continuation has none if the
    tokenizer joins all of it with the end of the context.
    """
    kept = context.rstrip()
    continuation = context[len(kept) :] + continuation
    before = tokenizer.encode(kept)
    return before, tokenizer.encode(kept + continuation)[len(before) :]
