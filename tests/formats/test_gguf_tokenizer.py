"""The tokenizer inside a file of llama.cpp: as that writes it, and back without a loss."""

import ast
import json
from pathlib import Path

import jinja2.sandbox
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import TEXT, small_bpe

from receptance.data.templates import TEMPLATES, Message
from receptance.formats.gguf_header import MAGIC, read_header
from receptance.formats.gguf_package import write_header
from receptance.formats.gguf_tokenizer import read_tokenizer, tokenizer_fields
from receptance.tokenizer import BPETokenizer, ByteTokenizer, Tokenizer, WorldTokenizer

PUBLISHED = Path(__file__).parents[3] / "shared/data/rwkv_vocab_v20230424.txt"
PILE = Path(__file__).parents[3] / "shared/data/20B_tokenizer.json"
SINGLE = [bytes([n]) for n in range(256)]
MESSAGES = [
    Message("user", "What is it?"),
    Message("assistant", "A fox."),
    Message("user", "  And:\n- why?\n"),
]


def world(*more: bytes, first: int = 1, step: int = 1) -> WorldTokenizer:
    """All single bytes and some longer tokens; ids need not follow each other."""
    lines = (f"{first + step * n} {x!r} {len(x)}\n" for n, x in enumerate([*SINGLE, *more]))
    return WorldTokenizer("".join(lines).encode())


def through(folder: Path, fields: dict) -> Tokenizer | None:
    write_header(folder / "x.gguf", "rwkv7", fields, {})
    found, _ = read_header(np.fromfile(folder / "x.gguf", np.uint8))
    return read_tokenizer(found, "x.gguf")


def again(folder: Path, tokenizer: Tokenizer, rows: int) -> Tokenizer | None:
    return through(folder, tokenizer_fields(tokenizer, rows))


# ---- World --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not PUBLISHED.is_file(), reason="the published vocabulary is not here")
def test_the_published_vocabulary_comes_back_to_the_byte(tmp_path):
    tokenizer = WorldTokenizer.from_file(PUBLISHED)
    fields = tokenizer_fields(tokenizer, 65536)
    # The rules of llama.cpp's conversion, for the same file.
    lines = PUBLISHED.read_text(encoding="utf-8").splitlines()
    literals = [ast.literal_eval(" ".join(line.split(" ")[1:-1])) for line in lines]
    tokens = [x.encode() if isinstance(x, str) else x for x in literals]
    wanted = [b"<s>", *(repr(x)[2:-1].encode() for x in tokens)]
    wanted += [f"[PAD{n}]".encode() for n in range(len(wanted), 65536)]
    assert fields["tokenizer.ggml.tokens"] == wanted
    assert fields["tokenizer.ggml.token_type"] == [3] + [1] * len(tokens) + [5] * 6
    assert fields["tokenizer.ggml.eot_token_id"] == 261
    found = through(tmp_path, fields)
    assert found.content == tokenizer.content and found.fingerprint == tokenizer.fingerprint


@settings(max_examples=20)
@given(st.lists(st.binary(min_size=2, max_size=9), unique=True, max_size=20), st.integers(0, 9))
def test_any_vocabulary_comes_back(tmp_path_factory, more, unused):
    tokenizer = world(*more)
    found = again(tmp_path_factory.getbasetemp(), tokenizer, tokenizer.vocab_size + unused)
    assert found.same_as(tokenizer)


def test_quotes_and_backslashes_and_ids_that_are_left_out(tmp_path):
    more = b"it's", b'"', b"'\"", b"\\n", b"\n\n", b"\\x41", b"\\", b"[PAD]", b"\xe7\x8b\x90"
    tokenizer = world(*(x for x in more if len(x) > 1), first=3, step=2)
    fields = tokenizer_fields(tokenizer, tokenizer.vocab_size)
    assert fields["tokenizer.ggml.tokens"][4] == b"[PAD4]"
    assert fields["tokenizer.ggml.eot_token_id"] == tokenizer.encode("\n\n")[0]
    found = through(tmp_path, fields)
    assert found.same_as(tokenizer)
    text = "it's \"'\"' \\n \\x41 狐\n\n"
    assert found.encode(text) == tokenizer.encode(text)


def test_bytes(tmp_path):
    fields = tokenizer_fields(ByteTokenizer(), 256)
    assert fields["tokenizer.ggml.tokens"][:2] == [b"\\x00", b"\\x01"]
    assert isinstance(through(tmp_path, fields), ByteTokenizer)


def test_a_token_that_stands_for_something_else_in_llama_cpp():
    for token in (b"<s>", b"[PAD258]"):
        with pytest.raises(ValueError, match=r"which llama\.cpp has for another purpose"):
            tokenizer_fields(world(token), 259)


# ---- BPE ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("end_of_text", [None, "!"])
def test_bpe_comes_back_to_the_byte(tmp_path, end_of_text):
    tokenizer = BPETokenizer(small_bpe().content, end_of_text=end_of_text)
    fields = tokenizer_fields(tokenizer, 320)
    assert len(fields["tokenizer.ggml.tokens"]) == len(fields["tokenizer.ggml.token_type"]) == 320
    assert fields["tokenizer.ggml.eos_token_id"] == tokenizer.end_of_text
    found = through(tmp_path, fields)
    assert found.content == tokenizer.content and found.fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize("published", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_bpe_is_built_of_tokens_and_merges_alone(tmp_path, published):
    if published and not PILE.is_file():
        pytest.skip("the tokenizer of the Pile is not here")
    tokenizer = BPETokenizer.from_file(PILE) if published else small_bpe()
    fields = tokenizer_fields(tokenizer, 50304 if published else 300)
    del fields["tokenizer.huggingface.json"]
    found = through(tmp_path, fields)
    assert found.vocab_size == tokenizer.vocab_size and found.end_of_text == tokenizer.end_of_text
    text = TEXT + "<|endoftext|>    \n\n  it's 12,345"
    assert found.encode(text) == tokenizer.encode(text)
    for token_id in range(found.vocab_size):
        assert found.decode_bytes([token_id]) == tokenizer.decode_bytes([token_id])


def test_rules_without_a_name_are_not_written():
    spec = json.loads(small_bpe().content)
    split = {"type": "Split", "pattern": {"Regex": "\\d"}, "behavior": "Isolated", "invert": False}
    spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, spec["pre_tokenizer"]]}
    tokenizer = BPETokenizer(json.dumps(spec).encode())
    with pytest.raises(ValueError, match="cuts text by other rules than GPT-2's"):
        tokenizer_fields(tokenizer, 300)


# ---- the rest -----------------------------------------------------------------------------------


def test_no_tokenizer(tmp_path):
    assert through(tmp_path, tokenizer_fields(None, 256)) is None
    assert through(tmp_path, {}) is None


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"model": "llama"}, "its tokenizer is 'llama'; this release reads rwkv and gpt2"),
        ({"pre": "qwen2"}, "cuts text as 'qwen2' does"),
        ({"token_type": [1, 2, 3]}, "300 tokens and 3 types"),
        ({"eos_token_id": 300}, "eos_token_id is 300; it must be one of 300"),
        ({"tokens": [1, 2]}, "tokens' is no list of texts"),
        ({"merges": "a b"}, "merges' is no list"),
        ({"merges": [b"a b c"]}, "x.gguf: not a usable tokenizer.json"),
        ({"tokens": [b"x"] * 300}, "x.gguf: "),
    ],
)
def test_what_cannot_be_built_is_told(tmp_path, changed, words):
    fields = tokenizer_fields(small_bpe(), 300)
    del fields["tokenizer.huggingface.json"]
    fields |= {f"tokenizer.ggml.{name}": value for name, value in changed.items()}
    with pytest.raises(ValueError) as caught:
        through(tmp_path, fields)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_world_vocabulary_without_some_bytes(tmp_path):
    fields = tokenizer_fields(world(), 257)
    fields["tokenizer.ggml.tokens"] = fields["tokenizer.ggml.tokens"][:200]
    with pytest.raises(ValueError, match=r"^x\.gguf: 57 of the 256 single bytes are missing"):
        through(tmp_path, fields)


def test_the_chat_template_writes_what_our_own_does():
    template = tokenizer_fields(ByteTokenizer(), 256)["tokenizer.chat_template"]
    # This is how llama.cpp recognizes the format where it does not interpret templates.
    assert "{{- 'User: ' + message['content']|trim + '\\n\\n' -}}" in template
    compiled = jinja2.sandbox.ImmutableSandboxedEnvironment().from_string(template)
    messages = [{"role": message.role, "content": message.text} for message in MESSAGES]
    ours = "".join(piece for piece, _ in TEMPLATES["world"].render(MESSAGES))
    assert compiled.render(messages=messages) == ours
    prompt = TEMPLATES["world"].prompt("why?")
    question = {"role": "user", "content": "why?"}
    assert compiled.render(messages=[question], add_generation_prompt=True) == prompt
    thought = {"role": "assistant", "content": "<think>hm\n</think> Yes."}
    assert compiled.render(messages=[thought]) == "Assistant: Yes.\n\n"
    system = {"role": "system", "content": "Be brief."}
    assert compiled.render(messages=[system]) == "System: Be brief.\n\n"


def test_the_file_begins_as_it_must(tmp_path):
    write_header(tmp_path / "x.gguf", "rwkv7", {}, {})
    assert (tmp_path / "x.gguf").read_bytes().startswith(MAGIC)
