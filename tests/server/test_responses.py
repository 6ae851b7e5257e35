"""/v1/responses, asked by OpenAI's own client."""

from __future__ import annotations

import json
from typing import Any

from test_openai import SCHEMA, TALK


def test_responses_stream_what_they_say(client):
    options = {"model": "tiny", "instructions": "Be brief.", "max_output_tokens": 12}
    options = {**options, "input": "What is a fox?", "extra_body": {"seed": 6}}
    whole = client.responses.create(**options)
    text, events = "", []
    for event in client.responses.create(**options, stream=True):
        events.append(event)
        text += event.delta if event.type == "response.output_text.delta" else ""
    assert whole.output_text == text == events[-1].response.output_text
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[0].type == "response.created"
    assert events[-1].type == f"response.{whole.status}"
    assert whole.usage.output_tokens == 12 or whole.status == "completed"


def test_responses_tell_the_probabilities_that_chats_tell(client):
    common = {"model": "tiny", "temperature": 0}
    chat = client.chat.completions.create(
        **common, messages=TALK, max_tokens=8, logprobs=True, top_logprobs=2
    )
    wanted = [token.to_dict() for token in chat.choices[0].logprobs.content]
    asked = {"input": TALK, "max_output_tokens": 8, "top_logprobs": 2}
    include = ["message.output_text.logprobs"]
    whole = client.responses.create(**common, **asked, include=include)
    [message] = whole.output
    [part] = message.content
    assert [token.to_dict() for token in part.logprobs] == wanted
    assert whole.top_logprobs == 2 and not getattr(whole, "warnings", None)
    streamed, done = [], None
    for event in client.responses.create(**common, **asked, include=include, stream=True):
        if event.type == "response.output_text.delta":
            streamed += [token.to_dict() for token in event.logprobs]
        elif event.type == "response.output_text.done":
            done = [token.to_dict() for token in event.logprobs]
    assert streamed == done == wanted
    without = client.responses.create(**common, **asked)
    assert without.output[0].content[0].logprobs == []
    assert "top_logprobs" in without.warnings[0]


def test_responses_call_functions_and_read_results(client):
    tool = {"type": "function", "name": "count", "parameters": SCHEMA}
    options: dict[str, Any] = {"model": "tiny", "tools": [tool], "tool_choice": "required"}
    options |= {"parallel_tool_calls": False, "extra_body": {"seed": 2}}
    found = client.responses.create(input="How many?", **options)
    [call] = found.output
    assert call.type == "function_call" and json.loads(call.arguments)["of"] in ("fox", "dog")
    arguments = ""
    for event in client.responses.create(input="How many?", **options, stream=True):
        if event.type == "response.function_call_arguments.delta":
            arguments += event.delta
    assert arguments == call.arguments
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "3"}
    talk: list[Any] = [{"role": "user", "content": "How many?"}, call, result]
    again = client.responses.create(model="tiny", input=talk, max_output_tokens=3)
    assert again.usage.output_tokens <= 3
