"""OpenAI's own client against the server: every endpoint, whole and streamed."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from tiny import small_bpe

from receptance.inference.generation import Generation
from receptance.inference.sampling import Sampling

openai = pytest.importorskip("openai", reason="the extra test is not installed")

TALK: list[Any] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is a fox?"},
]
SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "maximum": 9}, "of": {"enum": ["fox", "dog"]}},
    "required": ["n", "of"],
    "additionalProperties": False,
}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "count", "description": "c", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "stop"}},
]


def test_completions_are_those_of_generate(client, running):
    served = running.app.models.sources["tiny"].served
    found = client.completions.create(
        model="tiny", prompt="3 little foxes", max_tokens=12, seed=4, temperature=0.7, top_p=0.9
    )
    sampling = Sampling(temperature=0.7, top_p=0.9)
    tokens = list(
        Generation(
            served.engine,
            served.tokenizer,
            "3 little foxes",
            max_tokens=12,
            seed=4,
            sampling=sampling,
        )
    )
    [choice] = found.choices
    assert choice.text == "".join(token.text for token in tokens)
    assert choice.finish_reason in ("length", "stop")
    assert found.usage.completion_tokens == len(tokens)
    assert found.usage.total_tokens == found.usage.prompt_tokens + len(tokens)


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("prompt", ["fox", ["a fox", "naïvely 狐", ""], [5, 6, 7], [[5], [6, 7]]])
def test_streamed_completions_equal_whole_ones(client, prompt, echo):
    wanted = {
        "model": "tiny",
        "prompt": prompt,
        "n": 2,
        "seed": 7,
        "max_tokens": 6,
        "logprobs": 2,
        "echo": echo,
    }
    whole = client.completions.create(**wanted)
    choices: dict[int, Any] = {}
    for part in client.completions.create(**wanted, stream=True):
        for choice in part.choices:
            known = choices.setdefault(
                choice.index, {"text": "", "tokens": [], "logprobs": [], "top": [], "offsets": []}
            )
            known["text"] += choice.text
            known["tokens"] += choice.logprobs.tokens
            known["logprobs"] += choice.logprobs.token_logprobs
            known["top"] += choice.logprobs.top_logprobs
            known["offsets"] += choice.logprobs.text_offset
    assert (
        len(whole.choices)
        == len(choices)
        == 2 * (1 if prompt in ("fox", [5, 6, 7]) else len(prompt))
    )
    for choice in whole.choices:
        told, streamed = choice.logprobs, choices[choice.index]
        assert choice.text == streamed["text"]
        assert told.tokens == streamed["tokens"]
        assert told.token_logprobs == streamed["logprobs"]
        assert told.top_logprobs == streamed["top"]
        assert told.text_offset == streamed["offsets"]


def test_a_stream_without_tokens_ends_as_well(client):
    wanted = {"model": "tiny", "prompt": ["a", "b"], "max_tokens": 0, "logprobs": 0, "echo": True}
    ends = [
        (choice.index, choice.finish_reason)
        for part in client.completions.create(**wanted, stream=True)
        for choice in part.choices
        if choice.finish_reason is not None
    ]
    assert sorted(ends) == [(0, "length"), (1, "length")]


def test_the_prompt_is_scored_as_the_model_does(client, running):
    served = running.app.models.sources["tiny"].served
    ids = served.tokenizer.encode("4 little foxes jump over 16 lazy dogs")
    found = client.completions.create(
        model="tiny", prompt=[ids], max_tokens=1, logprobs=1, echo=True, temperature=0
    )
    told = found.choices[0].logprobs
    logits, _ = served.engine(torch.tensor([ids]))
    scores = logits[0, :-1].log_softmax(-1)
    wanted = scores.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
    assert told.token_logprobs[0] is None and told.top_logprobs[0] is None
    assert told.token_logprobs[1 : len(ids)] == pytest.approx(wanted, abs=2e-5)
    assert len(told.tokens) == len(ids) + 1
    likeliest = [max(top.values()) for top in told.top_logprobs[1 : len(ids)]]
    assert likeliest == pytest.approx(scores.amax(-1).tolist(), abs=2e-5)
    only = client.completions.create(model="tiny", prompt=ids, max_tokens=0, logprobs=1, echo=True)
    assert only.choices[0].logprobs.token_logprobs == told.token_logprobs[: len(ids)]


def collected(stream: Any) -> tuple[dict[int, dict[str, Any]], list[Any]]:
    """What a stream of chat says by choice, and its numbers of tokens."""
    choices: dict[int, dict[str, Any]] = {}
    numbers = []
    for part in stream:
        numbers += [part.usage] * (part.usage is not None)
        for choice in part.choices:
            known = choices.setdefault(
                choice.index, {"content": "", "logprobs": [], "reason": None, "calls": {}}
            )
            assert known["reason"] is None, "nothing may follow the end"
            known["content"] += choice.delta.content or ""
            known["logprobs"] += choice.logprobs.content if choice.logprobs else []
            known["reason"] = choice.finish_reason
            for call in choice.delta.tool_calls or ():
                own = known["calls"].setdefault(call.index, ["", ""])
                own[0] += call.function.name or ""
                own[1] += call.function.arguments or ""
    return choices, numbers


def test_streamed_chats_equal_whole_ones(client):
    wanted = {
        "model": "tiny",
        "messages": TALK,
        "n": 3,
        "seed": 5,
        "max_completion_tokens": 30,
        "logprobs": True,
        "top_logprobs": 2,
        "stop": ["foxes", "ov"],
    }
    whole = client.chat.completions.create(**wanted)
    options = {"include_usage": True}
    stream = client.chat.completions.create(**wanted, stream=True, stream_options=options)
    choices, numbers = collected(stream)
    for choice in whole.choices:
        streamed = choices[choice.index]
        assert choice.message.content == streamed["content"]
        assert choice.finish_reason == streamed["reason"]
        assert choice.logprobs.content == streamed["logprobs"]
        for token in choice.logprobs.content:
            assert token.bytes is not None and len(token.top_logprobs) == 2
    [usage] = numbers
    assert usage.completion_tokens == whole.usage.completion_tokens
    assert usage.prompt_tokens_details.cached_tokens > 0  # the second asked for the same


def test_the_second_turn_comes_from_the_cache(client):
    options = {"model": "tiny", "seed": 1, "max_tokens": 20, "temperature": 0}
    talk = [{"role": "user", "content": "Tell me about the foxes that jump over lazy dogs, please"}]
    first = client.chat.completions.create(messages=talk, **options)
    talk += [
        {"role": "assistant", "content": first.choices[0].message.content or "."},
        {"role": "user", "content": "And then?"},
    ]
    second = client.chat.completions.create(messages=talk, **options)
    # In deterministic mode this engine's states are kept at multiples of chunk_beside alone.
    cached = second.usage.prompt_tokens_details.cached_tokens
    assert cached >= (first.usage.prompt_tokens - 1) // 8 * 8 > 0
    salted = client.chat.completions.create(
        messages=talk, **options, extra_body={"cache_salt": "mine"}
    )
    assert salted.usage.prompt_tokens_details.cached_tokens == 0
    assert salted.choices[0].message.content == second.choices[0].message.content


@pytest.mark.parametrize("stream", [False, True])
def test_json_follows_its_schema(client, stream):
    form = {"type": "json_schema", "json_schema": {"name": "count", "schema": SCHEMA}}
    for seed in range(3):
        found = client.chat.completions.create(
            model="tiny", messages=TALK, seed=seed, response_format=form, stream=stream
        )
        text = collected(found)[0][0]["content"] if stream else found.choices[0].message.content
        value = json.loads(text)
        assert value.keys() == {"n", "of"} and value["of"] in ("fox", "dog") and value["n"] <= 9


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "count"}}]
)
def test_tools_are_called_with_arguments_of_their_schema(client, choice):
    options = {
        "model": "tiny",
        "messages": TALK,
        "tools": TOOLS,
        "tool_choice": choice,
        "parallel_tool_calls": False,
        "seed": 3,
        "max_tokens": 200,
        "logit_bias": {str(small_bpe().encode("}")[0]): 3},
    }
    whole = client.chat.completions.create(**options).choices[0]
    choices, _ = collected(client.chat.completions.create(**options, stream=True))
    [call] = whole.message.tool_calls
    assert whole.finish_reason == "tool_calls" and whole.message.content is None
    assert choices[0]["calls"] == {0: [call.function.name, call.function.arguments]}
    arguments = json.loads(call.function.arguments)
    if isinstance(choice, dict):
        assert call.function.name == "count" and arguments["of"] in ("fox", "dog")
    talk = [*TALK, whole.message, {"role": "tool", "tool_call_id": call.id, "content": "4"}]
    again = client.chat.completions.create(model="tiny", messages=talk, max_tokens=3)
    assert again.choices[0].finish_reason


def test_a_tool_may_have_the_name_of_a_choice(client):
    tools: list[Any] = [
        {"type": "function", "function": {"name": name, "parameters": SCHEMA}}
        for name in ("none", "auto")
    ]
    for tool in tools:
        chosen: Any = {"type": "function", "function": {"name": tool["function"]["name"]}}
        found = client.chat.completions.create(
            model="tiny", messages=TALK, tools=tools, tool_choice=chosen, seed=3
        )
        [call] = found.choices[0].message.tool_calls
        assert call.function.name == tool["function"]["name"]


def test_embeddings_have_length_one_in_both_encodings(client, running):
    served = running.app.models.sources["tiny"].served
    texts = ["a fox", "many lazy dogs"]
    found = client.embeddings.create(model="tiny", input=texts)  # base64 by default
    plain = client.embeddings.create(model="tiny", input=texts, encoding_format="float")
    for text, one, other in zip(texts, found.data, plain.data, strict=True):
        features, _ = served.engine.features(torch.tensor([served.tokenizer.encode(text)]))
        mean = features[0].mean(0)
        wanted = (mean / mean.norm()).tolist()
        assert one.embedding == pytest.approx(wanted, abs=1e-5)
        assert other.embedding == pytest.approx(wanted, abs=1e-5)
    last = client.embeddings.create(model="tiny", input=text, extra_body={"pooling": "last"})
    wanted = (features[0, -1] / features[0, -1].norm()).tolist()
    assert last.data[0].embedding == pytest.approx(wanted, abs=1e-5)


def test_models_are_listed(client):
    assert [model.id for model in client.models.list()] == ["tiny", "other"]
    found = client.models.retrieve("other")
    assert (found.id, found.object, found.owned_by) == ("other", "model", "receptance")


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"temperature": 3}, "temperature"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 10**9}, "max_tokens"),
        ({"n": 17}, "n"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": ""}, "stop"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"300": 1}}, "logit_bias"),
        ({"prompt": ["a", "b"], "extra_body": {"save_state": "x"}}, "save_state"),
        ({"logprobs": 21}, "logprobs"),
        ({"best_of": 2}, "best_of"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"extra_body": {"invented": 1}}, "invented"),
        ({"extra_body": {"repetition_penalty": 5e-324}}, "repetition_penalty"),
        ({"extra_body": {"top_k": 10**12}}, "top_k"),
        ({"extra_body": {"top_k": 10**400}}, "top_k"),
        ({"prompt": [1, "x"]}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [10**6]}, "prompt"),
        ({"prompt": [10**30]}, "prompt"),
        ({"suffix": "x"}, "suffix"),
    ],
)
def test_wrong_requests_are_refused_by_name(client, wrong, param):
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(**{"model": "tiny", "prompt": "x", **wrong})
    assert caught.value.param == param
    assert param in caught.value.message


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": " "}]}, "messages[0].content"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "extra_body": {"ignore_eos": True}}, "ignore_eos"),
        ({"tools": TOOLS, "response_format": {"type": "json_object"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
    ],
)
def test_wrong_chats_are_refused_by_name(client, wrong, param):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**{"model": "tiny", "messages": TALK, **wrong})
    assert caught.value.param == param


def test_an_answer_without_text_is_left_out_of_the_next_prompt(client):
    empty: dict[str, Any] = {"role": "assistant", "content": "", "reasoning_content": "Hm"}
    more: list[Any] = [TALK[1], empty, {"role": "user", "content": "Well?"}]
    fewer = [message for message in more if message is not empty]
    common = {"model": "tiny", "temperature": 0, "max_tokens": 3}
    found = [client.chat.completions.create(messages=talk, **common) for talk in (more, fewer)]
    assert found[0].usage.prompt_tokens == found[1].usage.prompt_tokens
    with pytest.raises(openai.BadRequestError, match="empty"):
        client.chat.completions.create(messages=[empty], **common)


def test_schemas_that_cannot_be_used_are_refused(client):
    deep: dict[str, Any] = {}
    for _ in range(40):
        deep = {"properties": {"x": deep}}
    unknown = {"properties": {"x": {"$ref": "#/nowhere"}}}
    large = {"enum": ["x" * 70_000]}
    for schema in (deep, unknown, large, {"$ref": "#"}):
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model="tiny", messages=TALK, response_format=form)
        assert caught.value.param == "response_format"


def test_tokens_are_where_their_text_is_though_some_was_held_back(client):
    """Every space may be the beginning of the stop string."""
    bias = {str(token): 40 for token in small_bpe().encode(" the")}
    found = client.completions.create(
        model="tiny", prompt="3", max_tokens=30, logprobs=0, seed=1, stop=[" !!"], logit_bias=bias
    ).choices[0]
    at = 0
    assert " " in found.text
    for token, offset in zip(found.logprobs.tokens, found.logprobs.text_offset, strict=True):
        assert offset == at
        at += len(token)


def test_unknown_fields_that_are_null_say_nothing(client):
    odd = {"role": "user", "content": "x", "toolset_name": None}
    talk: list[Any] = [odd, {"role": "assistant", "content": "y", "phase": None}, odd]
    client.chat.completions.create(model="tiny", messages=talk, max_tokens=1)
    items: list[Any] = [{"type": "message", **message} for message in talk]
    client.responses.create(model="tiny", input=items, max_output_tokens=1)
    for wrong in ({**odd, "phase": "x"}, {**odd, "phase": False}):
        with pytest.raises(openai.BadRequestError, match=r"messages\[3\].phase"):
            client.chat.completions.create(model="tiny", messages=[*talk, wrong])


def test_a_model_that_is_not_there(client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="gone", prompt="x")
    assert caught.value.code == "model_not_found"


def test_what_has_no_effect_is_said(client):
    found = client.completions.create(model="tiny", prompt="x", user="me")
    assert found.warnings == ["user has no effect"]
