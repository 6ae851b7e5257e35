"""Records to ids and masks."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import small_bpe

from receptance.data.examples import encode_record, is_example
from receptance.data.templates import TEMPLATES
from receptance.tokenizer import ByteTokenizer, Tokenizer, WorldTokenizer

BYTES = ByteTokenizer()
WORLD = Path(__file__).parents[3] / "shared/data/rwkv_vocab_v20230424.txt"
PAIR = {"prompt": "Hi", "response": "Hello"}


@pytest.fixture(scope="module", params=["bytes", "bpe", "world"])
def tokenizer(request) -> Tokenizer:
    if request.param == "world":
        if not WORLD.exists():
            pytest.skip("the World vocabulary is not here")
        return WorldTokenizer.from_file(WORLD)
    return BYTES if request.param == "bytes" else small_bpe()


def learned(ids: list[int], mask: list[int], tokenizer: Tokenizer) -> str:
    return tokenizer.decode(i for i, m in zip(ids, mask, strict=True) if m)


def text_of(record: dict, template: str = "world") -> str:
    return BYTES.decode(encode_record(record, BYTES, template)[0])


@pytest.mark.parametrize(
    "record",
    [
        PAIR,
        {"prompt": "Hi", "completion": "Hello"},
        {"instruction": "Hi", "output": "Hello", "input": ""},
        {"instruction": "Hi", "output": "Hello", "input": None, "messages": None},
        {
            "messages": [
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Hello"},
            ]
        },
        {
            "conversations": [
                {"from": "system", "value": ""},
                {"from": "human", "value": "Hi"},
                {"from": "gpt", "value": "Hello"},
            ]
        },
    ],
)
def test_all_forms_say_the_same(record):
    ids, mask = encode_record(record, BYTES, "world")
    assert BYTES.decode(ids) == "User: Hi\n\nAssistant: Hello\n\n"
    assert learned(ids, mask, BYTES) == " Hello\n\n"
    assert is_example(record)


def test_material_beside_the_instruction():
    record = {"instruction": "Sum up.", "input": "A\n\ntext.", "output": "A."}
    headed = "# Instruction:\nSum up.\n\n# Input:\nA\ntext.\n\n# Response:\nA.\n\n"
    assert text_of(record, "instruction") == headed
    assert text_of(record, "raven") == "Bob: Sum up.\nA\ntext.\n\nAlice: A.\n\n"


WORDS = st.text("ab é狐\n.:", min_size=1).filter(str.strip)
TURNS = st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=4)


@pytest.mark.parametrize("name", TEMPLATES)
@given(turns=TURNS)
def test_learned_tokens_are_the_answers_and_the_ends_of_their_turns(name, tokenizer, turns):
    template = TEMPLATES[name]
    said = [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    ids, mask = encode_record({"messages": said}, tokenizer, name)
    assert learned(ids, mask, tokenizer) == "".join(template.answer(a) for _, a in turns)
    # What inference would read before each answer, to the token.
    at = 0
    for question, answer in turns:
        for text, flag in ((template.prompt(question), 0), (template.answer(answer), 1)):
            piece = tokenizer.encode(text)
            assert ids[at : at + len(piece)] == piece
            assert mask[at : at + len(piece)] == [flag] * len(piece)
            at += len(piece)
    assert at == len(ids) == len(mask)


def test_no_token_crosses_the_border():
    bpe = small_bpe()
    ids, mask = encode_record({"prompt": "12", "response": "little foxes"}, bpe, "world")
    at = mask.index(1)
    assert ids[:at] == bpe.encode("User: 12\n\nAssistant:")
    assert 0 not in mask[at:]


def test_a_question_without_an_answer_is_left_out():
    turns = [("user", "Hi"), ("assistant", "Hello"), ("user", "Bye")]
    said = [{"role": role, "content": text} for role, text in turns]
    assert encode_record({"messages": said}, BYTES, "world") == encode_record(PAIR, BYTES, "world")


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({}, "no prompt and response, and no messages: the record has none"),
        ({"text": "x", "prompt": "y"}, "the record has text, prompt; wanted are prompt/instruc"),
        ({"prompt": "x", "response": 3}, "response is int; it must be a text"),
        ({"prompt": [], "response": "x"}, "prompt is list; it must be a text"),
        ({"prompt": " ", "response": "x"}, "the user message is empty"),
        ({"prompt": "x", "response": "\n"}, "the assistant message is empty"),
        ({"messages": "x"}, "messages is str; it must be a list"),
        ({"messages": ["x"]}, r"messages\[1\] is str; it must be an object"),
        ({"messages": [{"role": "tool"}]}, r"messages\[1\] has role 'tool'; known: system, user"),
        ({"messages": [{"role": ["x"]}]}, r"messages\[1\] has role \['x'\]; known"),
        ({"messages": [{"role": "user"}]}, r"messages\[1\].content is NoneType; it must be a text"),
        ({"messages": [{"role": "user", "content": "x"}]}, "no assistant message, so nothing to"),
        ({"conversations": []}, "no assistant message, so nothing to learn"),
    ],
)
def test_refusals(record, words):
    with pytest.raises(ValueError, match=words):
        encode_record(record, BYTES, "world")


def test_an_unknown_template():
    with pytest.raises(ValueError, match="no template 'chatml'"):
        encode_record(PAIR, BYTES, "chatml")


@pytest.mark.parametrize("record", [{}, {"text": "x"}, {"prompt": "x"}, {"output": "x"}])
def test_what_is_no_example(record):
    assert not is_example(record)
