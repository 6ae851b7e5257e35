"""Records to ids and masks."""

import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import small_bpe

from receptance.data.examples import encode_record, is_example
from receptance.data.templates import TEMPLATES
from receptance.tokenizer import ByteTokenizer, Tokenizer, WorldTokenizer, load_tokenizer

BYTES = ByteTokenizer()
SHARED = Path(__file__).parents[3] / "shared/data"
WORLD, PILE = SHARED / "rwkv_vocab_v20230424.txt", SHARED / "20B_tokenizer.json"
PAIR = {"prompt": "Hi", "response": "Hello"}
HELLO = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def vocabulary(path: Path) -> Tokenizer:
    if not path.exists():
        pytest.skip(f"{path.name} is not here")
    return load_tokenizer(path)


@pytest.fixture(scope="module", params=["bytes", "bpe", "world", "pile"])
def tokenizer(request) -> Tokenizer:
    if request.param in ("world", "pile"):
        return vocabulary(WORLD if request.param == "world" else PILE)
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


CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}


@pytest.mark.parametrize(
    "turns",
    [
        [
            {
                "role": "user",
                "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}],
            }
        ],
        [{"role": "user", "content": ["H", {"text": "i", "image_url": None, "type": None}]}],
        [{"from": "human", "value": "Hi"}],
        [{"from": "human", "content": "Hi", "value": None}],
        [{"role": "user", "content": "Hi"}, CALL],
        [{"role": "user", "content": "Hi"}, {**CALL, "content": ""}],
        [CALL, {"role": "tool", "content": "Hi"}],
        [CALL, {"role": "function", "name": "f", "content": "Hi"}],
        [{"role": "user", "content": "Hi"}, CALL, {"role": "tool", "content": None}],
        [{"role": "developer", "content": " "}, {"role": "user", "content": "Hi"}],
    ],
)
@pytest.mark.parametrize("name", ["messages", "conversations"])
def test_chats_as_they_are_found(turns, name):
    for role in ("assistant", "gpt", "chatgpt", "bing", "bard", "bot", "model"):
        record = {name: [*turns, {"role": role, "content": [{"type": "text", "text": "Hello"}]}]}
        assert encode_record(record, BYTES, "world") == encode_record(PAIR, BYTES, "world")


def test_a_developer_speaks_as_the_system():
    record = {"messages": [{"role": "developer", "content": "Be kind."}, *HELLO]}
    assert text_of(record).startswith("Be kind.\n\nUser: Hi")


def test_a_call_with_text_is_learned_as_that_text():
    said = [{"role": "user", "content": "Hi"}, {**CALL, "content": "Let me see."}]
    said += [{"role": "tool", "content": "7"}, {"role": "assistant", "content": "Seven."}]
    ids, mask = encode_record({"messages": said}, BYTES, "world")
    assert BYTES.decode(ids) == (
        "User: Hi\n\nAssistant: Let me see.\n\nUser: 7\n\nAssistant: Seven.\n\n"
    )
    assert learned(ids, mask, BYTES) == " Let me see.\n\n Seven.\n\n"


def test_material_beside_the_instruction():
    record = {"instruction": "Sum up.", "input": "A\n\ntext.", "output": "A."}
    headed = "# Instruction:\nSum up.\n\n# Input:\nA\ntext.\n\n# Response:\nA.\n\n"
    assert text_of(record, "instruction") == headed
    assert text_of(record, "raven") == "Bob: Sum up.\nA\ntext.\n\nAlice: A.\n\n"


WORDS = st.text("ab é狐\n.:", min_size=1).filter(str.strip)
TURNS = st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=4)


def conversation(turns: list[tuple[str, str]]) -> dict:
    said = zip(itertools.cycle(("user", "assistant")), itertools.chain(*turns))
    return {"messages": [{"role": role, "content": text} for role, text in said]}


@pytest.mark.parametrize("name", TEMPLATES)
@given(turns=TURNS)
def test_the_ids_are_those_of_the_whole_text(name, tokenizer, turns):
    template = TEMPLATES[name]
    ids, mask = encode_record(conversation(turns), tokenizer, name)
    whole = "".join(template.prompt(q) + template.answer(a) for q, a in turns)
    assert ids == tokenizer.encode(whole)
    assert learned(ids, mask, tokenizer) == tokenizer.decode(
        i for _, a in turns for i in tokenizer.encode(template.answer(a))
    )
    # Inference reads the first prompt before there is an answer: the same ids, none is learned.
    prompt = tokenizer.encode(template.prompt(turns[0][0]))
    assert ids[: len(prompt)] == prompt
    assert mask[: len(prompt) + 1] == [0] * len(prompt) + [1]


def test_two_newlines_between_turns_are_those_that_the_model_reads():
    """The Pile's vocabulary has a token for both, which it uses only at the end of a text."""
    ids, mask = encode_record(conversation([("Hi", "a"), ("b", "c")]), vocabulary(PILE), "world")
    assert ids.count(187) == 6 and ids[-1] == 535 and ids.count(535) == 1
    newlines = [m for i, m in zip(ids, mask, strict=True) if i == 187]
    assert newlines == [0, 0, 1, 1, 0, 0] and mask[-1] == 1


@pytest.mark.parametrize("text", ["e\u0301 x", "\u212b" * 3 + "\u0344", "\u0958\u0958", "\ud800é"])
def test_a_normalizer_that_changes_lengths_moves_no_border(text, tokenizer):
    """The Pile's is NFC: it makes some texts shorter and others longer."""
    turns = [(text, f"{text} A"), (text, "B")]
    ids, mask = encode_record(conversation(turns), tokenizer, "world")
    template = TEMPLATES["world"]
    assert ids == tokenizer.encode(
        "".join(template.prompt(q) + template.answer(a) for q, a in turns)
    )
    heard = learned(ids, mask, tokenizer)
    assert heard.startswith(" ") and heard.endswith(" A\n\n B\n\n") and "User" not in heard
    assert heard == tokenizer.decode(
        i for _, a in turns for i in tokenizer.encode(template.answer(a))
    )


def test_a_token_across_the_border_is_not_learned():
    """It begins in the prompt, where a model is never asked to go on."""
    tokens = [*(bytes([value]) for value in range(256)), b"\na"]
    lines = [f"{n} {token!r} {len(token)}\n" for n, token in enumerate(tokens, start=1)]
    crossing = WorldTokenizer("".join(lines).encode())
    ids, mask = encode_record({"prompt": "1", "response": "abc"}, crossing, "instruction")
    assert ids == crossing.encode("# Instruction:\n1\n\n# Response:\nabc\n\n")
    assert ids.count(257) == 1 and mask[ids.index(257)] == 0
    assert learned(ids, mask, crossing) == "bc\n\n"


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
        (
            {"messages": [{"role": "critic"}]},
            r"messages\[1\] has role 'critic'; known: system, dev",
        ),
        ({"messages": [{"content": "x"}]}, r"messages\[1\] has role None; known: system"),
        (
            {"messages": [{"role": "gpt", "content": None}]},
            "content is NoneType; it must be a text",
        ),
        ({"messages": [{"role": "gpt", "content": ""}]}, "the assistant message is empty"),
        ({"messages": [{"role": "gpt", "content": "", "tool_calls": []}]}, "message is empty"),
        (
            {"messages": [{"role": "user", "content": [3]}]},
            "content has a part that is int; it must",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "text is NoneType; it must",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "has a part of type 'image_url'; only text can be learned",
        ),
        ({"messages": [CALL]}, "no assistant message, so nothing to learn"),
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
