"""A conversation of 100 turns: what is read for a turn does not grow with what was said before."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from running_server import Running, start
from tiny import make_model

from receptance.data.templates import TEMPLATES, Message, find_template
from receptance.server.api.chat import written_call
from receptance.server.cache import StateCache
from receptance.server.prompts import render
from receptance.server.reply_text import ReplyReader
from receptance.server.serving import Served
from receptance.server.tools import CALL_END
from receptance.tokenizer import ByteTokenizer

LETTERS = {str(byte): 100 for byte in b" abcdefghijklmnopqrstuvwxyz"}
TURNS = 100


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    template = find_template("world")
    yield from start([Served("m", make_model(), ByteTokenizer(), template, StateCache(1 << 24))])


@pytest.mark.slow  # 100 prompts of up to 6,000 tokens
def test_a_turn_reads_what_is_new_and_no_more(running):
    talk, asked, before, sizes = [], "And what did the fox do then?", "", []
    with running.client() as client:
        for turn in range(TURNS):
            talk.append({"role": "user", "content": asked})
            body = {"model": "m", "messages": talk, "max_tokens": 6, "seed": turn}
            found = client.post("/v1/chat/completions", json={**body, "logit_bias": LETTERS}).json()
            usage = found["usage"]
            read = usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"]
            said = found["choices"][0]["message"]["content"]
            # Where the model did not write the space before its answer, the answer is read again,
            # with the last token before it.
            assert read <= len(f": {before}\n\nUser: {asked}\n\nAssistant:")
            before = said or "."
            talk.append({"role": "assistant", "content": before})
            sizes.append(usage["prompt_tokens"])
    assert sizes[-1] > TURNS / 2 * sizes[0]


def test_a_call_that_is_cut_has_nothing_of_the_mark_behind_it():
    head, arguments = '<tool_call>\n{"name": "f", "arguments": ', '{"a": {"b": 0}}'
    whole = head + arguments + CALL_END
    for end in range(len(head), len(whole) + 1):
        reader = ReplyReader(tools=True)
        parts = [*reader.push(whole[:end]), *reader.finish()]
        found = "".join(part.text for part in parts if part.kind == "arguments")
        assert found == arguments[: end - len(head)]


def test_half_a_character_in_the_arguments_of_a_call_can_be_sent_back():
    assert "\ufffd" in written_call("f", '{"a": "\\ud83d"}')
    assert "\U0001f600" in written_call("f", '{"a": "\\ud83d\\ude00"}')


@pytest.mark.parametrize("name", TEMPLATES)
def test_answers_end_where_the_template_says(name):
    """Those of RWKV-7 G1 go on after a blank line."""
    found = render(find_template(name), ByteTokenizer(), [Message("user", "why?")])
    assert found.stops == find_template(name).stops
    assert ("\n\n" in found.stops) == (name != "g1")
