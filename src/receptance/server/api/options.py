"""What requests for text have in common: the sampler's options, limits, stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar

import msgspec
from msgspec import Meta

from receptance.inference.rows import Request
from receptance.inference.sampling import Sampling
from receptance.inference.steering import Constraint
from receptance.server import limits
from receptance.server.errors import refusal
from receptance.server.limits import Limits
from receptance.server.serving import new_seed

Stop = str | list[str] | None
Count = Annotated[int, Meta(ge=1, le=limits.MOST_CHOICES)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Likeliest = Annotated[int, Meta(ge=0, le=limits.MOST_LIKELIEST)]


class StreamOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """How a stream is written."""

    include_usage: bool | None = None
    """Whether a last event tells the numbers of tokens."""
    include_obfuscation: bool | None = None
    """Accepted for clients that send it; events are never padded."""


class TextOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Options that all of OpenAI's endpoints for text take."""

    model: str
    """The name of a model, as /v1/models lists them."""
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    """Probabilities are raised to 1/temperature; 0 takes the likeliest token."""
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    """Keep the likeliest tokens whose probabilities add up to this."""
    top_k: Annotated[int, Meta(ge=0, le=1 << 31)] | None = None
    """Keep at most this many tokens; 0 keeps all. Not one of OpenAI's parameters."""
    presence_penalty: Penalty | None = None
    """Subtract this from the logits of tokens that were written before."""
    frequency_penalty: Penalty | None = None
    """Subtract this from a token's logit for each time that it was written before."""
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=100)] | None = None
    """Divide positive and multiply negative logits of tokens written before. Not one of OpenAI's
    parameters."""
    penalty_decay: Annotated[float, Meta(ge=0, le=1)] | None = None
    """The factor by which counts fade with every token, 1 by default. Not one of OpenAI's
    parameters."""
    seed: int | None = None
    """Requests that are equal in all else and have one seed get one answer."""
    n: Count | None = None
    """How many answers to write."""
    stop: Stop = None
    """Strings that end an answer and are not part of it."""
    logit_bias: dict[str, Annotated[float, Meta(ge=-100, le=100)]] | None = None
    """What to add to the logits of tokens, by their ids."""
    stream: bool | None = None
    """Whether to send the answer as server-sent events while it is written."""
    stream_options: StreamOptions | None = None
    """How the stream is written; only with stream."""
    ignore_eos: bool | None = None
    """Whether to go on behind an end-of-text token. Not one of OpenAI's parameters."""
    cache_salt: Annotated[str, Meta(max_length=256)] | None = None
    """Only requests with this salt share cached states with this one. Not one of OpenAI's
    parameters."""
    state: Annotated[str, Meta(max_length=128)] | None = None
    """The name of a saved state in which the prompt begins. Not one of OpenAI's parameters."""
    save_state: Annotated[str, Meta(max_length=128)] | None = None
    """A name under which to save the state behind the answer. Not one of OpenAI's parameters."""
    user: str | None = None
    """Accepted and without effect."""

    IDLE: ClassVar[tuple[str, ...]] = ("user",)

    def warnings(self) -> list[str]:
        """What the client said that has no effect."""
        given = [name for name in self.IDLE if getattr(self, name) is not None]
        return [f"{name} has no effect" for name in given]

    def sampling(self) -> Sampling:
        """The sampler's options, with OpenAI's defaults; ApiError for what it does not take."""
        try:
            return Sampling(
                temperature=_or(self.temperature, 1.0),
                top_p=_or(self.top_p, 1.0),
                top_k=self.top_k or 0,
                presence_penalty=self.presence_penalty or 0.0,
                frequency_penalty=self.frequency_penalty or 0.0,
                repetition_penalty=_or(self.repetition_penalty, 1.0),
                penalty_decay=_or(self.penalty_decay, 1.0),
                count_digits=True,
            )
        except ValueError as error:
            raise refusal(str(error), str(error).partition(" ")[0]) from None

    def requests(
        self,
        max_tokens: int,
        vocab_size: int,
        *,
        likeliest: int | None,
        stops: Sequence[str] = (),
        constraints: Sequence[Constraint | None] = (None,),
    ) -> tuple[Request, ...]:
        """One request of the engine for each answer, with further stop strings.

        `likeliest` None leaves log-probabilities out. There is one constraint, or None, for each
        answer.
        """
        seed = new_seed() if self.seed is None else self.seed
        sampling, bias = self.sampling(), self._bias(vocab_size)
        return tuple(
            Request(
                sampling=sampling,
                max_tokens=max_tokens,
                stop=(*stop_strings(self.stop), *stops),
                seed=(seed + number) % (1 << 63),
                ignore_end_of_text=bool(self.ignore_eos),
                log_probabilities=likeliest is not None,
                likeliest=likeliest or 0,
                bias=bias,
                constraint=constraint,
            )
            for number, constraint in enumerate(constraints)
        )

    def check_stream(self) -> None:
        """ApiError if there are options for a stream and none is wanted."""
        if self.stream_options is not None and not self.stream:
            raise refusal("stream_options is only allowed with stream", "stream_options")

    def _bias(self, vocab_size: int) -> dict[int, float]:
        given = self.logit_bias or {}
        if len(given) > limits.MOST_BIASES:
            raise refusal(f"logit_bias has more than {limits.MOST_BIASES} entries", "logit_bias")
        found = {}
        for name, value in given.items():
            plain = name.isascii() and name.isdigit() and len(name) < 10
            if not plain or int(name) >= vocab_size:
                raise refusal(
                    f"logit_bias names the token {name[:20]!r}; the ids of tokens are 0 to "
                    f"{vocab_size - 1}",
                    "logit_bias",
                )
            found[int(name)] = value
        return found


def stop_strings(stop: Stop, name: str = "stop") -> tuple[str, ...]:
    """The stop strings of a request; ApiError if there are too many, or an empty one."""
    strings = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if len(strings) > limits.MOST_STOPS:
        raise refusal(f"{name} has {len(strings)} strings; at most {limits.MOST_STOPS}", name)
    if not all(strings):
        raise refusal(f"{name} has an empty string, which would end every answer", name)
    if max(map(len, strings), default=0) > limits.LONGEST_STOP:
        raise refusal(f"{name} has a string of over {limits.LONGEST_STOP} characters", name)
    return strings


def allowed_tokens(asked: int | None, default: int, bounds: Limits, name: str) -> int:
    """The number of tokens that an answer may have; ApiError if more are asked for."""
    number = default if asked is None else asked
    if not 0 <= number <= bounds.max_tokens:
        raise refusal(f"{name} is {number}; wanted at most {bounds.max_tokens}", name)
    return number


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
