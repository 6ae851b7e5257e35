"""Anthropic's own client against the server."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

anthropic = pytest.importorskip("anthropic", reason="the extra test is not installed")

TALK: list[Any] = [{"role": "user", "content": "What is a fox?"}]
SCHEMA = {
    "type": "object",
    "properties": {"of": {"enum": ["fox", "dog"]}},
    "required": ["of"],
    "additionalProperties": False,
}
TOOLS: list[Any] = [{"name": "count", "description": "c", "input_schema": SCHEMA}]


@pytest.fixture
def client(running) -> Iterator[Any]:
    url = running.url
    with anthropic.Anthropic(base_url=url, api_key="x", max_retries=0, timeout=500) as client:
        yield client


def test_streamed_equals_whole(client):
    options = {
        "model": "tiny",
        "system": "Be brief.",
        "messages": TALK,
        "max_tokens": 20,
        "extra_body": {"seed": 3},
    }
    whole = client.messages.create(**options)
    with client.messages.stream(**options) as stream:
        text = "".join(stream.text_stream)
        message = stream.get_final_message()
    assert text == message.content[0].text == whole.content[0].text
    assert (message.stop_reason, whole.stop_reason) == ("max_tokens", "max_tokens")
    assert whole.usage.output_tokens == message.usage.output_tokens == 20
    # The first may have found what another test left in the cache.
    read = [x.usage.cache_read_input_tokens for x in (whole, message)]
    assert read[1] > 0
    assert read[0] + whole.usage.input_tokens == read[1] + message.usage.input_tokens


def test_a_stop_string_is_told(client):
    options = {"model": "tiny", "messages": TALK, "max_tokens": 60, "extra_body": {"seed": 3}}
    text = client.messages.create(**options).content[0].text
    stop = text[10:13]
    found = client.messages.create(**options, stop_sequences=["never said", stop])
    assert (found.stop_reason, found.stop_sequence) == ("stop_sequence", stop)
    assert text.startswith(found.content[0].text)


def test_an_answer_that_was_begun_goes_on(client):
    begun = [*TALK, {"role": "assistant", "content": "3 little foxes jump"}]
    number = client.messages.count_tokens(model="tiny", messages=begun).input_tokens
    assert number > client.messages.count_tokens(model="tiny", messages=TALK).input_tokens
    found = client.messages.create(model="tiny", messages=begun, max_tokens=4)
    assert found.usage.input_tokens + found.usage.cache_read_input_tokens == number


def test_tools_are_used(client):
    options: dict[str, Any] = {"model": "tiny", "tools": TOOLS, "max_tokens": 100}
    options |= {"tool_choice": {"type": "tool", "name": "count"}, "extra_body": {"seed": 1}}
    whole = client.messages.create(messages=TALK, **options)
    with client.messages.stream(messages=TALK, **options) as stream:
        message = stream.get_final_message()
    [block] = whole.content
    assert whole.stop_reason == message.stop_reason == "tool_use"
    assert block.input == message.content[0].input and block.input["of"] in ("fox", "dog")
    result = {"type": "tool_result", "tool_use_id": block.id, "content": "4"}
    answer = {"role": "assistant", "content": whole.content}
    talk = [*TALK, answer, {"role": "user", "content": [result]}]
    again = client.messages.create(model="tiny", messages=talk, tools=TOOLS, max_tokens=5)
    assert again.usage.output_tokens <= 5


def test_errors_have_their_classes(client):
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(model="gone", messages=TALK, max_tokens=5)
    with pytest.raises(anthropic.BadRequestError, match="invented"):
        client.messages.create(
            model="tiny", messages=TALK, max_tokens=5, extra_body={"invented": 1}
        )
    image: Any = [{"role": "user", "content": [{"type": "image", "source": {}}]}]
    with pytest.raises(anthropic.BadRequestError, match="image"):
        client.messages.create(model="tiny", messages=image, max_tokens=5)
