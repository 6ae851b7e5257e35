"""/v1/completions: texts that are continued."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from receptance.inference.rows import Likeliest
from receptance.server import limits
from receptance.server.api.options import Likeliest as LikeliestCount
from receptance.server.api.options import TextOptions, allowed_tokens
from receptance.server.api.tokens import Usage, logprob, token_text, usage
from receptance.server.calls import STILL_HERE, Call, Reply, Streamed, event, first, reply
from receptance.server.errors import refusal
from receptance.server.jobs import Begun, Job, Looked, Score, Wrote
from receptance.server.serving import Group, Served, new_id
from receptance.tokenizer import Tokenizer

_DEFAULT_TOKENS = 16


class CompletionRequest(TextOptions, kw_only=True, forbid_unknown_fields=True):
    """A request to continue texts."""

    prompt: str | list[str | int | list[int]] | None = None
    """A text, token ids, or a list of texts or of token ids; None begins a text."""
    max_tokens: Annotated[int, Meta(ge=0)] | None = None
    """Write at most this many tokens, 16 by default."""
    logprobs: LikeliestCount | None = None
    """Tell the probabilities of the tokens, and of this many others in each place."""
    echo: bool | None = None
    """Whether the answer begins with the prompt."""
    best_of: Annotated[int, Meta(ge=1, le=limits.MOST_CHOICES)] | None = None
    """It must be equal to n."""
    suffix: None = None
    """Text behind the answer is not supported."""


class CompletionLogprobs(msgspec.Struct):
    """Tokens, their probabilities, those of others, and where in the text they begin."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(msgspec.Struct):
    """One continuation, or a piece of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None


class Completion(msgspec.Struct, omit_defaults=True):
    """The answer, or one event of it."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    object: str = ""
    usage: Usage | None = None
    warnings: list[str] | None = None


@dataclass
class _Choice:
    """One continuation that is being written; every step gives a piece of it."""

    index: int
    tokenizer: Tokenizer
    likeliest: int | None
    offset: int = 0

    def __post_init__(self) -> None:
        self.decoder = self.tokenizer.stream()

    def echo(self, text: str, ids: list[int], looked: Looked | None) -> CompletionChoice:
        """The piece with the prompt."""
        scores: list[Score | None] = [None, *looked.scores] if looked else []
        decoder = self.tokenizer.stream()
        told: CompletionLogprobs | None = None
        if self.likeliest is not None and looked is not None:
            told = CompletionLogprobs([], [], [], [])
            for token, score in zip(ids, scores, strict=True):
                told.tokens.append(token_text(self.tokenizer, token))
                told.text_offset.append(self.offset)
                self.offset += len(decoder.push(token))
                value, best = None, None
                if score is not None:
                    value = logprob(score.log_probability)
                    best = self._best(token, score.log_probability, score.likeliest)
                told.token_logprobs.append(value)
                told.top_logprobs.append(best)
        self.offset = len(text)
        return CompletionChoice(self.index, text, told, None)

    def push(self, wrote: Wrote) -> CompletionChoice:
        """The piece with one more token."""
        token, told = wrote.token, None
        if self.likeliest is not None and token.id >= 0:
            best = self._best(token.id, token.log_probability, token.likeliest)
            told = CompletionLogprobs(
                [token_text(self.tokenizer, token.id)],
                [logprob(token.log_probability)],
                [best],
                [self.offset],
            )
            # Not the length of token.text, which may have been held back for a stop string.
            self.offset += len(self.decoder.push(token.id))
        return CompletionChoice(self.index, token.text, told, finish_reason(token.finish_reason))

    def _best(self, token: int, own: float | None, likeliest: Likeliest) -> dict[str, float]:
        best = {token_text(self.tokenizer, other): logprob(score) for other, score in likeliest}
        if self.likeliest:
            best.setdefault(token_text(self.tokenizer, token), logprob(own))
        return best


def finish_reason(reason: str | None) -> str | None:
    """Why an answer ended, in OpenAI's words."""
    return "stop" if reason == "end_of_text" else reason


async def complete(call: Call) -> Reply | Streamed:
    """Continue texts."""
    request = call.decode(CompletionRequest)
    request.check_stream()
    served = await call.models.served(request.model)
    read = await asyncio.to_thread(read_prompts, request.prompt, served.tokenizer)
    maker = _Maker(call, request, served, *read)
    if request.stream:
        return Streamed(await first(maker.stream()))
    return reply(await maker.whole())


class _Maker:
    """What turns one request into an answer, at once or in events."""

    def __init__(
        self,
        call: Call,
        request: CompletionRequest,
        served: Served,
        texts: list[str],
        prompts: list[list[int]],
    ) -> None:
        self.request, self.served, self.texts, self.prompts = request, served, texts, prompts
        self.count = request.n or 1
        if request.best_of not in (None, self.count):
            raise refusal("best_of must be equal to n", "best_of")
        bounds = served.limits
        asked = request.max_tokens
        self.max_tokens = allowed_tokens(asked, _DEFAULT_TOKENS, bounds, "max_tokens")
        if request.save_state is not None and len(prompts) > 1:
            raise refusal("save_state is for one prompt, and there are several", "save_state")
        self.beginning = call.models.beginning(call.owner, served, request)
        self.jobs = [self._job(prompt) for prompt in self.prompts]
        self.head: dict[str, Any] = {
            "id": new_id("cmpl-"),
            "created": int(time.time()),
            "model": request.model,
            "system_fingerprint": f"fp_{served.fingerprint[:12]}",
        }
        self.object = "text_completion"

    def _job(self, prompt: list[int]) -> Job:
        request = self.request
        requests = request.requests(
            self.max_tokens,
            self.served.tokenizer.vocab_size,
            likeliest=request.logprobs,
            constraints=[None] * self.count,
        )
        scored, kept = request.echo and request.logprobs is not None, request.save_state is not None
        return Job(
            prompt=prompt,
            requests=requests if self.max_tokens or kept or not scored else (),
            namespace=self.beginning.namespace,
            state=self.beginning.state,
            client=self.beginning.client,
            look="scores" if scored else None,
            likeliest=request.logprobs or 0,
            keep=kept,
        )

    async def pieces(self, group: Group) -> AsyncIterator[CompletionChoice | None]:
        """All pieces of all continuations."""
        request, tokenizer = self.request, self.served.tokenizer
        choices = [
            _Choice(index, tokenizer, request.logprobs)
            for index in range(len(self.jobs) * self.count)
        ]
        async for item in group.events():
            if item is None:
                yield None
                continue
            place, happened = item
            own = choices[place * self.count : (place + 1) * self.count]
            begun = isinstance(happened, Begun) and self.jobs[place].look is None
            if begun or isinstance(happened, Looked):
                looked = happened if isinstance(happened, Looked) else None
                for choice in own if request.echo else ():
                    yield choice.echo(self.texts[place], self.prompts[place], looked)
            elif isinstance(happened, Wrote):
                yield own[happened.index].push(happened)

    async def whole(self) -> Completion:
        """The answer at once."""
        choices = [
            CompletionChoice(index, "", None, "length")
            for index in range(len(self.jobs) * self.count)
        ]
        async with self.served.submit(self.jobs) as group:
            async for piece in self.pieces(group):
                if piece is not None:
                    _join(choices[piece.index], piece)
            self.beginning.save(group)
            return self._answer(choices, usage=self._usage(group))

    async def stream(self) -> AsyncIterator[bytes]:
        """The answer in events."""
        begun, unended = False, dict.fromkeys(range(len(self.jobs) * self.count))
        async with self.served.submit(self.jobs) as group:
            async for piece in self.pieces(group):
                if piece is not None:
                    begun = True
                    if piece.finish_reason is not None:
                        del unended[piece.index]
                    yield event(self._answer([piece]))
                elif begun:
                    yield STILL_HERE
            for index in unended:  # they were to have no tokens
                yield event(self._answer([CompletionChoice(index, "", None, "length")]))
            self.beginning.save(group)
            options = self.request.stream_options
            if options is not None and options.include_usage:
                yield event(self._answer([], usage=self._usage(group)))

    def _usage(self, group: Group) -> Usage:
        return usage(group.prompt_tokens, group.written, group.cached)

    def _answer(self, choices: list[CompletionChoice], **rest: Any) -> Completion:
        warnings = self.request.warnings() or None
        return Completion(
            **self.head, choices=choices, object=self.object, warnings=warnings, **rest
        )


def _join(whole: CompletionChoice, piece: CompletionChoice) -> None:
    """Add a piece to a continuation."""
    whole.text += piece.text
    whole.finish_reason = piece.finish_reason or whole.finish_reason
    if (more := piece.logprobs) is None:
        return
    if (told := whole.logprobs) is None:
        whole.logprobs = more
        return
    told.tokens += more.tokens
    told.token_logprobs += more.token_logprobs
    told.text_offset += more.text_offset
    told.top_logprobs += more.top_logprobs


def read_prompts(
    prompt: str | list[str | int | list[int]] | None, tokenizer: Tokenizer, name: str = "prompt"
) -> tuple[list[str], list[list[int]]]:
    """The texts of a request and their token ids; an empty text is the end of another one."""
    items: list[Any] = [prompt or ""] if prompt is None or isinstance(prompt, str) else prompt
    if not items:
        raise refusal(f"{name}: an empty list", name)
    if isinstance(items[0], int):
        items = [items]
    kinds = {type(item) for item in items}
    if len(kinds) > 1 or not all(isinstance(x, int) for i in items for x in i if kinds == {list}):
        raise refusal(
            f"{name}: wanted a text, token ids, or a list of texts or of lists of token ids", name
        )
    if len(items) > limits.MOST_PROMPTS:
        raise refusal(f"{name}: {len(items)} of them; at most {limits.MOST_PROMPTS}", name)
    texts, ids = [], []
    for item in items:
        given = tokenizer.encode(item) if isinstance(item, str) else item
        try:
            texts.append(item if isinstance(item, str) else tokenizer.decode(given))
        except ValueError as error:
            raise refusal(f"{name}: {error}", name) from None
        ids.append(given or [tokenizer.end_of_text])
    return texts, ids
