"""Chat formats: the texts of the official cards, and blank lines that only end turns."""

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from receptance.data.templates import TEMPLATES, TURN_END, Message, find_template

every_template = pytest.mark.parametrize("name", TEMPLATES)
TALK = [Message("user", "Hi"), Message("assistant", "Hello"), Message("user", "Bye")]


def whole(name: str, *messages: Message) -> str:
    return "".join(text for text, _ in TEMPLATES[name].render(messages))


@pytest.mark.parametrize(
    ("name", "prompt", "answer"),
    [
        ("world", "User: Hi\n\nAssistant:", " Hello\n\n"),
        ("raven", "Bob: Hi\n\nAlice:", " Hello\n\n"),
        ("instruction", "# Instruction:\nHi\n\n# Response:\n", "Hello\n\n"),
        ("qa", "Question: Hi\n\nAnswer:", " Hello\n\n"),
    ],
)
def test_the_formats(name, prompt, answer):
    template = find_template(name)
    assert template.prompt("Hi") == prompt
    assert template.answer("Hello") == answer
    assert template.render(TALK[:2]) == [(prompt, False), (answer, True)]


def test_turns_follow_each_other():
    system = Message("system", "A talk.")
    text = "A talk.\n\nUser: Hi\n\nAssistant: Hello\n\nUser: Bye\n\n"
    assert whole("world", system, *TALK) == text


def test_material_has_a_heading_of_its_own():
    messages = [Message("user", "Sum up."), Message("input", "A text."), Message("assistant", "A.")]
    text = "# Instruction:\nSum up.\n\n# Input:\nA text.\n\n# Response:\nA.\n\n"
    assert whole("instruction", *messages) == text


# Lines of every kind and what a chat format could be confused by.
TEXT = st.lists(
    st.sampled_from(["a", "é b", "  indented", "", " ", "\t", "User:", "# Response:", "\r"]),
    min_size=1,
    max_size=8,
).map("\n".join)
SAID = TEXT.filter(str.strip)
MESSAGES = st.lists(
    st.builds(Message, st.sampled_from(["system", "user", "assistant"]), SAID), max_size=6
)


@every_template
@given(messages=MESSAGES)
def test_a_blank_line_ends_a_turn_and_nothing_else_does(name, messages):
    # The text ends with the last turn's blank line, so there is one part more.
    text = whole(name, *messages)
    assert len(re.split(r"\n\s*\n", text)) == len(messages) + 1
    assert text.count(TURN_END) == len(messages)


@every_template
@given(messages=MESSAGES)
def test_what_is_learned_are_the_answers(name, messages):
    template = TEMPLATES[name]
    pieces = template.render(messages)
    answers = [template.answer(m.text) for m in messages if m.role == "assistant"]
    assert [text for text, learned in pieces if learned] == answers
    flags = [learned for _, learned in pieces]
    assert all(one != two for one, two in itertools.pairwise(flags))


@every_template
@given(question=SAID, answer=SAID)
def test_a_prompt_is_the_part_before_the_answer(name, question, answer):
    template = TEMPLATES[name]
    (prompt, _), _ = template.render([Message("user", question), Message("assistant", answer)])
    assert prompt == template.prompt(question)
    assert not prompt.endswith(" ")


@given(text=SAID)
def test_of_a_message_only_blank_lines_are_lost(text):
    kept = [line.rstrip("\r") for line in text.split("\n") if line.strip()]
    said = TEMPLATES["instruction"].answer(text).removesuffix(TURN_END).split("\n")
    assert [line.strip() for line in said] == [line.strip() for line in kept]


@pytest.mark.parametrize(
    ("name", "message", "words"),
    [
        ("world", Message("tool", "x"), "role 'tool'; this template knows system, user and"),
        ("world", Message("input", "x"), "role 'input'; this template knows system, user and"),
        ("world", Message("user", " \n"), "the user message is empty"),
        ("raven", Message("assistant", ""), "the assistant message is empty"),
    ],
)
def test_refusals(name, message, words):
    with pytest.raises(ValueError, match=words):
        TEMPLATES[name].render([message])


def test_an_unknown_template():
    with pytest.raises(ValueError, match="no template 'chatml'; there are world, raven"):
        find_template("chatml")
