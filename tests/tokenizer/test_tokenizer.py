"""The three tokenizers: each against an oracle, on text, on broken text and on a lot of text."""

import gc
import hashlib
import json
import pickle
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny import make_model

import receptance
from receptance.tokenizer import (
    BPETokenizer,
    ByteTokenizer,
    StreamDecoder,
    Tokenizer,
    WorldTokenizer,
    load_tokenizer,
    stored_tokenizer,
)
from receptance.tokenizer import bpe as module

SHARED = Path(__file__).parents[3] / "shared/data"
WORLD_FILE = SHARED / "rwkv_vocab_v20230424.txt"
PILE_FILE = SHARED / "20B_tokenizer.json"

SINGLE_BYTES = [bytes([value]) for value in range(256)]
NO_LIMIT = settings(deadline=None, max_examples=60)
ANY_TEXT = st.text(st.characters(exclude_categories=()))  # lone surrogates too

# Pieces that UTF-8 decoders trip over: cut characters, stray and overlong bytes, surrogates.
UTF8_PIECES = st.one_of(
    st.binary(max_size=4),
    st.sampled_from([*"aé中😀"]).map(str.encode),
    st.sampled_from([b"\xc3", b"\xe4\xb8", b"\xf0\x9f\x98", b"\x80", b"\xed\xa0\x80"]),
    st.sampled_from([b"\xe4", b"\xf0", b"\xf4\x90", b"\xc0\x80", b"\xff", b""]),
)

TRAINING_TEXT = [
    "the cat sat on the mat, the cat ran\n\n" * 4,
    "naïve café 中文 中文 😀😀 " * 4,
    "aaaaaaaa ======== --- --- bbb bbb\n\n\n\n" * 4,
]


def vocabulary(*tokens: bytes) -> bytes:
    """A World vocabulary file of all single bytes and the given longer tokens."""
    return "".join(f"{i} {t!r} {len(t)}\n" for t, i in numbered(*tokens).items()).encode()


def longest_match(token_ids: dict[bytes, int], data: bytes) -> list[int]:
    """Greedy longest match as the definition has it."""
    ids, longest = [], max(map(len, token_ids))
    while data:
        starts = (data[:size] for size in range(longest, 0, -1))
        token = next(start for start in starts if start in token_ids)
        ids.append(token_ids[token])
        data = data[len(token) :]
    return ids


def numbered(*tokens: bytes) -> dict[bytes, int]:
    return {token: i for i, token in enumerate([*SINGLE_BYTES, *tokens], start=1)}


def is_nfc(data: bytes) -> bool:
    return unicodedata.is_normalized("NFC", data.decode("utf-8", errors="ignore"))


def lines_run(call: Callable[[], object]) -> int:
    """How many lines of Python a call runs: its work, by no clock."""
    count = 0

    def trace(frame: FrameType, event: str, argument: object) -> Callable:
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return count


class Library:
    """The library's tokenizer; it counts the characters that it is given to encode."""

    def __init__(self, library: tokenizers.Tokenizer) -> None:
        self.library, self.read = library, 0

    def encode(self, text: str, **options: bool) -> tokenizers.Encoding:
        self.read += len(text)
        return self.library.encode(text, **options)

    def encode_batch_fast(self, texts: list[str], **options: bool) -> list[tokenizers.Encoding]:
        self.read += sum(map(len, texts))
        return self.library.encode_batch_fast(texts, **options)

    def __getattr__(self, name: str) -> object:
        return getattr(self.library, name)


@pytest.fixture
def characters_read(monkeypatch) -> Callable[[BPETokenizer, str], int]:
    """How many characters of a text the library reads."""

    def read(tokenizer: BPETokenizer, text: str) -> int:
        with monkeypatch.context() as patch:
            patch.setattr(tokenizer, "_library", library := Library(tokenizer._library))
            assert tokenizer.decode(tokenizer.encode(text)) == text
        return library.read

    return read


@pytest.fixture(scope="module")
def bpe() -> BPETokenizer:
    return BPETokenizer.train(TRAINING_TEXT, 400)


@pytest.fixture(scope="module")
def bpe_json(bpe, tmp_path_factory) -> str:
    directory = tmp_path_factory.mktemp("bpe")
    bpe.save(directory)
    return (directory / "tokenizer.json").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def library(bpe_json) -> tokenizers.Tokenizer:
    """The `tokenizers` library with the file of `bpe`: the oracle."""
    return tokenizers.Tokenizer.from_str(bpe_json)


@pytest.fixture(scope="module")
def small_world() -> WorldTokenizer:
    return WorldTokenizer(vocabulary(b"the", b" the", "中".encode(), b"\xb8\xad\xe4", b"\n\n"))


@pytest.fixture(scope="module", params=["bytes", "world", "bpe"])
def any_tokenizer(request, bpe, small_world) -> Tokenizer:
    return {"bytes": ByteTokenizer(), "world": small_world, "bpe": bpe}[request.param]


@pytest.fixture(scope="module")
def world() -> WorldTokenizer:
    if not WORLD_FILE.exists():
        pytest.skip(f"{WORLD_FILE} is not there")
    return WorldTokenizer.from_file(WORLD_FILE)


@pytest.fixture(scope="module")
def pile() -> BPETokenizer:
    if not PILE_FILE.exists():
        pytest.skip(f"{PILE_FILE} is not there")
    return BPETokenizer.from_file(PILE_FILE)


class TestEveryTokenizer:
    @NO_LIMIT
    @given(data=st.lists(UTF8_PIECES).map(b"".join))
    def test_bytes_survive(self, any_tokenizer, data):
        assert any_tokenizer.decode_bytes(any_tokenizer.encode(data)) == data

    @NO_LIMIT
    @given(text=ANY_TEXT)
    @example(text="\ud800 lone \udcff")
    def test_text_survives_even_with_lone_surrogates(self, any_tokenizer, text):
        data = any_tokenizer.decode_bytes(any_tokenizer.encode(text))
        assert data.decode("utf-8", errors="surrogatepass") == text

    @NO_LIMIT
    @given(data=st.lists(UTF8_PIECES).map(b"".join))
    def test_text_and_its_bytes_have_the_same_ids(self, any_tokenizer, data):
        text = data.decode("utf-8", errors="replace")
        assert any_tokenizer.encode(text) == any_tokenizer.encode(text.encode("utf-8"))

    def test_each_id_decodes_and_no_other(self, any_tokenizer):
        assert any_tokenizer.decode_bytes(range(any_tokenizer.vocab_size))
        for wrong in (any_tokenizer.vocab_size, -1):
            with pytest.raises(
                ValueError, match=rf"token id {wrong} .*{any_tokenizer.kind}.* 0 to"
            ):
                any_tokenizer.decode([0, wrong])

    def test_nothing_is_nothing(self, any_tokenizer):
        assert any_tokenizer.encode("") == any_tokenizer.encode(b"") == []
        assert any_tokenizer.decode([]) == any_tokenizer.stream().flush() == ""

    def test_fingerprint_is_of_the_kind_and_the_content(self, any_tokenizer, tmp_path):
        names = any_tokenizer.save(tmp_path)
        content = b"".join((tmp_path / name).read_bytes() for name in names) or b"bytes"
        digest = hashlib.sha256(any_tokenizer.kind.encode() + content).hexdigest()
        assert any_tokenizer.fingerprint == digest

    def test_survives_pickling(self, any_tokenizer):
        copy = pickle.loads(pickle.dumps(any_tokenizer))
        assert copy.fingerprint == any_tokenizer.fingerprint
        assert copy.encode("the cat 中") == any_tokenizer.encode("the cat 中")

    def test_zero_ends_a_text(self, any_tokenizer):
        assert any_tokenizer.end_of_text == 0


class TestStream:
    @NO_LIMIT
    @given(pieces=st.lists(UTF8_PIECES))
    def test_joined_pieces_are_the_decoded_whole(self, pieces):
        class Pieces(ByteTokenizer):
            def __init__(self):
                Tokenizer.__init__(self, pieces, b"")

        ids = range(len(pieces))
        stream = Pieces().stream()
        streamed = "".join(map(stream.push, ids)) + stream.flush()
        assert streamed == b"".join(pieces).decode("utf-8", errors="replace")

    @NO_LIMIT
    @given(data=st.data())
    def test_any_ids_of_any_tokenizer(self, any_tokenizer, data):
        ids = data.draw(st.lists(st.integers(0, any_tokenizer.vocab_size - 1)))
        stream = any_tokenizer.stream()
        assert "".join(map(stream.push, ids)) + stream.flush() == any_tokenizer.decode(ids)

    def test_holds_back_only_unfinished_characters(self):
        stream = ByteTokenizer().stream()
        assert isinstance(stream, StreamDecoder)
        assert [stream.push(byte) for byte in "aé中".encode()] == ["a", "", "é", "", "", "中"]
        assert [stream.push(byte) for byte in b"\xe4\xb8a"] == ["", "", "\ufffda"]
        assert stream.push(0xE4) + stream.flush() == "\ufffd"
        assert stream.push(ord("b")) + stream.flush() == "b"


class TestBytes:
    def test_each_byte_is_its_own_id(self):
        tokenizer = ByteTokenizer()
        assert (tokenizer.kind, tokenizer.vocab_size) == ("bytes", 256)
        assert tokenizer.encode("é\0") == [0xC3, 0xA9, 0]
        assert tokenizer.decode_bytes([0, 255]) == b"\0\xff"

    def test_saves_nothing_and_loads_by_name(self, tmp_path):
        assert load_tokenizer("bytes").save(tmp_path) == []
        assert list(tmp_path.iterdir()) == []


class TestWorld:
    @settings(deadline=None, max_examples=150)
    @given(
        longer=st.lists(st.text("ab ", min_size=2, max_size=9).map(str.encode), unique=True),
        text=st.text("ab c", max_size=60).map(str.encode),
    )
    def test_is_greedy_longest_match(self, longer, text):
        ids = WorldTokenizer(vocabulary(*longer)).encode(text)
        assert ids == longest_match(numbered(*longer), text)

    @NO_LIMIT
    @given(
        longer=st.lists(st.binary(min_size=2, max_size=4), unique=True),
        noise=st.binary(max_size=8),
        order=st.randoms(use_true_random=False),
    )
    def test_is_greedy_longest_match_of_bytes_that_are_no_text(self, longer, noise, order):
        pieces = [*longer, *longer, *(token[:-1] for token in longer), noise]
        order.shuffle(pieces)
        data = b"".join(pieces)
        ids = WorldTokenizer(vocabulary(*longer)).encode(data)
        assert ids == longest_match(numbered(*longer), data)

    def test_reads_no_byte_twice_where_a_plain_trie_does(self):
        """After every `a` a plain trie walks on over thousands of them, in vain."""
        tokenizer = WorldTokenizer(vocabulary(b"a" * 5000 + b"b"))
        assert lines_run(lambda: tokenizer.encode(b"a" * 20_000)) < 10 * 20_000
        assert tokenizer.encode(b"a" * 6000 + b"b") == [98] * 1000 + [257]

    @pytest.mark.parametrize("byte", [b"a", b"\0"])
    def test_every_byte_of_a_long_run_takes_a_few_lines(self, small_world, byte):
        assert lines_run(lambda: small_world.encode(byte * 50_000)) < 10 * 50_000
        assert small_world.decode_bytes(small_world.encode(byte * 50_000)) == byte * 50_000

    def test_file_comes_back_byte_for_byte(self, tmp_path):
        content = vocabulary(b"the").replace(b"\n", b"\r\n")  # as git leaves it on Windows
        tokenizer = WorldTokenizer(content)
        assert tokenizer.save(tmp_path / "new") == ["rwkv_vocab.txt"]
        assert (tmp_path / "new" / "rwkv_vocab.txt").read_bytes() == content
        assert load_tokenizer(tmp_path / "new").encode("the") == [257]

    def test_literals_are_str_or_bytes(self):
        content = vocabulary() + "257 '中\\n' 4\n258 b'\\xe4\\xb8' 2".encode()
        assert WorldTokenizer(content).encode("中\n".encode() + b"\xe4\xb8") == [257, 258]

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("257 'ab' 3", "'ab' has 2 bytes where the line says 3"),
            ("256 'ab' 2", "id 256 follows 256; ids must increase"),
            ("0 'ab' 2", "id 0 follows 256; ids must increase"),
            ("4294967296 'ab' 2", "id 4294967296 follows 256; ids must increase, up to 4194304"),
            ("257 'a' 1", "b'a' is there twice"),
            ("257 '' 1", "'' has 0 bytes where the line says 1"),
            ("257 12 2", "12 is not a str or bytes literal"),
            ("257 'ab 2", "'ab is not a str or bytes literal"),
            ("257 __import__('os') 2", "not a str or bytes literal"),
            ("257 '\\ud800' 3", "surrogates not allowed"),
            ("257 'ab'", "is not `id literal length`"),
            ("", "is not `id literal length`"),
        ],
    )
    def test_damage_is_named_with_its_line(self, line, message):
        content = vocabulary() + line.encode() + b"\n"
        with pytest.raises(ValueError) as caught:
            WorldTokenizer(content, "some/vocab.txt")
        assert str(caught.value).startswith("some/vocab.txt, line 257: ")
        assert message in str(caught.value) and "\n" not in str(caught.value)

    @pytest.mark.parametrize("filler", ["257 '' 0\n", "257 b'' 0\r\n", ""])
    def test_ids_may_stand_for_nothing(self, filler):
        """Vocabularies that are around leave out an id, or end with empty tokens."""
        content = vocabulary() + f"{filler}259 'ab' 2\n".encode()
        tokenizer = WorldTokenizer(content)
        assert tokenizer.vocab_size == 260
        assert tokenizer.encode("cab") == [100, 259]
        assert tokenizer.decode_bytes([259, 257, 258, 0, 259]) == b"abab"
        padded = WorldTokenizer(content + b"260 '' 0\n261 '' 0\n")
        assert padded.vocab_size == 262
        assert padded.encode("cab") == [100, 259] and padded.decode([261, 98]) == "a"

    @pytest.mark.parametrize("enabled", [True, False])
    def test_garbage_is_collected_again_as_before(self, enabled):
        before = gc.isenabled()
        (gc.enable if enabled else gc.disable)()
        try:
            WorldTokenizer(vocabulary())
            with pytest.raises(ValueError):
                WorldTokenizer(b"")
            assert gc.isenabled() == enabled
        finally:
            (gc.enable if before else gc.disable)()

    def test_a_line_that_is_not_utf8(self):
        with pytest.raises(ValueError, match=r"v\.txt, line 257: .*utf-8"):
            WorldTokenizer(vocabulary() + b"257 '\xff' 1\n", "v.txt")

    def test_all_single_bytes_are_needed(self):
        with pytest.raises(ValueError, match=r"v\.txt: 255 of the 256 single bytes .* b'\\x00'"):
            WorldTokenizer(b"1 'a' 1\n", "v.txt")


class TestOfficialWorld:
    def test_known_ids(self, world):
        assert (world.kind, world.vocab_size) == ("world", 65530)
        assert world.encode("今天天气不错") == [10381, 11639, 11639, 13655, 10260, 17631]
        assert (world.encode("\n"), world.encode("\n\n")) == ([11], [261])
        assert world.encode(bytes(range(0x80, 0x100)))[-1] == 256

    def test_zero_is_no_text_and_padding_rows_are_errors(self, world):
        assert world.decode([0, 261, 0]) == "\n\n"
        with pytest.raises(ValueError, match=r"65530 has no text; .* 0 to 65529"):
            world.decode([65530])

    def test_every_token_encodes_to_itself(self, world):
        tokens = [world.decode_bytes([i]) for i in range(1, world.vocab_size)]
        assert [world.encode(token) for token in tokens] == [
            [i] for i in range(1, world.vocab_size)
        ]

    def test_is_greedy_longest_match(self, world):
        token_ids = {world.decode_bytes([i]): i for i in range(1, world.vocab_size)}
        data = Path(__file__).read_bytes()[:20_000] + bytes(range(256)) + " 今天 naïve 😀".encode()
        assert world.encode(data) == longest_match(token_ids, data)

    @pytest.mark.parametrize("byte", [b"0", b"\xef"])
    def test_every_byte_of_a_long_run_takes_a_few_lines(self, world, byte):
        assert lines_run(lambda: world.encode(byte * 50_000)) < 10 * 50_000
        assert world.decode_bytes(world.encode(byte * 50_000)) == byte * 50_000


class TestBPE:
    @NO_LIMIT
    @given(text=st.one_of(st.text(), st.text("thecat 中é\n=<|>", max_size=40)))
    @example(text="a<|endoftext|>b")
    def test_has_the_ids_of_the_library(self, bpe, library, text):
        assert bpe.encode(text) == library.encode(text).ids

    def test_bytes_that_are_no_text_are_base_byte_tokens(self, bpe):
        ids = bpe.encode(b"the\xff\xe4 cat")
        assert ids == [*bpe.encode("the"), *bpe.encode(b"\xff"), *bpe.encode(b"\xe4"), *ids[-1:]]
        assert ids[-1:] == bpe.encode(" cat")

    def test_end_of_text_is_id_0_and_decodes(self, bpe):
        assert bpe.encode("a<|endoftext|>")[-1] == 0
        assert bpe.decode([0]) == "<|endoftext|>"
        assert bpe.stream().push(0) == "<|endoftext|>"

    def test_end_of_text_may_have_another_id(self, bpe_json):
        spec = json.loads(bpe_json)
        spec["model"]["vocab"]["<|endoftext|>"] = last = len(spec["model"]["vocab"])
        spec["model"]["vocab"]["unused"] = 0
        spec["added_tokens"][0]["id"] = last
        tokenizer = BPETokenizer(json.dumps(spec).encode())
        assert tokenizer.end_of_text == last and tokenizer.encode("<|endoftext|>") == [last]

    def test_training_again_gives_the_same_file(self, bpe):
        again = BPETokenizer.train(iter(TRAINING_TEXT), 400)
        assert again.fingerprint == bpe.fingerprint

    def test_trained_sizes(self):
        assert BPETokenizer.train(["the the the"] * 9, 259).vocab_size == 259
        assert BPETokenizer.train(["the the the"] * 9, 5000).vocab_size < 270
        assert BPETokenizer.train([], 300).vocab_size == 257
        assert BPETokenizer.train(["abcd"], 300).vocab_size == 257
        assert BPETokenizer.train(["abcd"], 300, min_frequency=1).vocab_size == 260

    def test_impossible_training(self):
        with pytest.raises(ValueError, match="vocab_size is 256; it must be at least 257"):
            BPETokenizer.train(["text"], 256)
        with pytest.raises(ValueError, match="documents is one str"):
            BPETokenizer.train("text", 300)

    def test_saved_file_loads_with_the_same_ids(self, bpe, tmp_path):
        assert bpe.save(tmp_path) == ["tokenizer.json"]
        loaded = load_tokenizer(tmp_path)
        assert (loaded.kind, loaded.fingerprint) == ("bpe", bpe.fingerprint)
        assert loaded.encode("the cat") == bpe.encode("the cat")

    def test_nothing_is_cut_padded_or_added(self, bpe, bpe_json):
        library = tokenizers.Tokenizer.from_str(bpe_json)
        library.enable_truncation(2)
        library.enable_padding(length=50)
        library.post_processor = tokenizers.processors.TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
        )
        tokenizer = BPETokenizer(library.to_str().encode())
        assert tokenizer.encode("the cat sat on") == bpe.encode("the cat sat on")

    def test_a_pattern_that_backtracks_is_one_line(self, bpe_json):
        """The library's answer is a panic of Rust, which no `except Exception` catches."""
        library = tokenizers.Tokenizer.from_str(bpe_json)
        library.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
            [
                tokenizers.pre_tokenizers.Split(tokenizers.Regex("(a+)+$"), "isolated"),
                tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        tokenizer = BPETokenizer(library.to_str().encode())
        assert tokenizer.decode(tokenizer.encode("aab")) == "aab"
        with pytest.raises(ValueError, match="by a regular expression that failed"):
            tokenizer.encode("a" * 40 + "b")

    def test_importing_the_module_leaves_the_library_alone(self):
        code = (
            "import sys; from receptance.tokenizer import ByteTokenizer; ByteTokenizer(); "
            "print('tokenizers' in sys.modules)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.stdout.strip() == "False", done.stderr


def with_special(bpe_json: str, *names: str, plain: tuple[str, ...] = ()) -> bytes:
    """The same byte-level BPE with these added tokens behind all others; id 0 is "!"."""
    spec = json.loads(bpe_json)
    vocab = {token: i - 1 for token, i in spec["model"]["vocab"].items() if i > 0}
    assert vocab["!"] == 0
    spec["model"]["vocab"], spec["added_tokens"] = vocab, []
    library = tokenizers.Tokenizer.from_str(json.dumps(spec))
    library.add_special_tokens(list(names))
    library.add_tokens(list(plain))
    return library.to_str().encode()


class TestEndOfText:
    """Which token ends a text, in files without "<|endoftext|>" where id 0 is "!"."""

    @pytest.mark.parametrize(
        ("names", "end"),
        [
            (["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"], "<|end_of_text|>"),
            (["<s>", "</s>", "<unk>"], "</s>"),
            (["<|im_end|>", "<|endoftext|>", "</s>"], "<|endoftext|>"),
            (["<|doc|>"], "<|doc|>"),
        ],
    )
    def test_the_special_tokens_of_the_file_tell(self, bpe_json, names, end):
        tokenizer = BPETokenizer(with_special(bpe_json, *names, plain=("<plain>",)))
        assert tokenizer.decode([tokenizer.end_of_text]) == end
        assert tokenizer.encode(f"a!{end}")[-1] == tokenizer.end_of_text > 300

    def test_a_token_for_unknown_text_ends_none(self, bpe_json):
        spec = json.loads(with_special(bpe_json, "<unk>"))
        spec["model"]["unk_token"] = "<unk>"
        with pytest.raises(ValueError, match="none of its tokens is known to end a text"):
            BPETokenizer(json.dumps(spec).encode())

    @pytest.mark.parametrize("names", [[], ["<|im_start|>", "<|im_end|>"]])
    def test_a_file_that_does_not_tell_is_refused_unless_it_is_told(self, bpe_json, names):
        content = with_special(bpe_json, *names, plain=("<stop>",))
        with pytest.raises(ValueError) as caught:
            BPETokenizer(content, "some.json")
        assert str(caught.value) == (
            "some.json: none of its tokens is known to end a text; say which one does with "
            "end_of_text, or as eos_token in a tokenizer_config.json beside it"
        )
        for end in ("<stop>", "!", "\n\n"):
            tokenizer = BPETokenizer(content, end_of_text=end)
            assert tokenizer.decode([tokenizer.end_of_text]) == end
        for wrong in ("<none>", ""):
            with pytest.raises(ValueError, match=f"end_of_text is '{wrong}', but it has no such"):
                BPETokenizer(content, end_of_text=wrong)

    def test_what_was_told_survives_saving(self, bpe_json, tmp_path):
        """In a checkpoint and in a prepared corpus alike, which know a tokenizer by `about`."""
        content = with_special(bpe_json, "<s>", "</s>", "<sep>")
        told = BPETokenizer(content, end_of_text="<sep>")
        assert told.save(tmp_path) == ["tokenizer.json", "tokenizer_config.json"]
        about = {"kind": "bpe", "files": ["tokenizer.json"], "fingerprint": told.fingerprint}
        for again in (
            load_tokenizer(tmp_path),
            load_tokenizer(tmp_path / "tokenizer.json"),
            stored_tokenizer(tmp_path, about),
            pickle.loads(pickle.dumps(told)),
        ):
            assert again.end_of_text == told.end_of_text != BPETokenizer(content).end_of_text
            assert again.fingerprint == told.fingerprint and again.same_as(told)
        (tmp_path / "tokenizer_config.json").unlink()
        with pytest.raises(ValueError, match="holds another tokenizer"):
            stored_tokenizer(tmp_path, about)

    def test_what_was_told_survives_in_a_checkpoint(self, bpe_json, tmp_path):
        told = BPETokenizer(with_special(bpe_json, "<a>", "<b>"), end_of_text="<b>")
        receptance.save(make_model(told.vocab_size), tmp_path / "mine", told)
        _, again = receptance.load(tmp_path / "mine")
        assert again.end_of_text == told.end_of_text

    def test_what_the_file_says_itself_is_not_stored_beside_it(self, bpe, bpe_json, tmp_path):
        """So the fingerprint in a directory written by an older release stays the same."""
        told = BPETokenizer(bpe_json.encode(), end_of_text="<|endoftext|>")
        assert told.fingerprint == bpe.fingerprint
        assert told.save(tmp_path) == ["tokenizer.json"]

    @pytest.mark.parametrize("eos", ["<|im_end|>", {"content": "<|im_end|>", "lstrip": False}])
    def test_the_config_beside_the_file_tells(self, bpe_json, tmp_path, eos):
        content = with_special(bpe_json, "<|im_start|>", "<|im_end|>")
        (tmp_path / "tokenizer.json").write_bytes(content)
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
        tokenizer = load_tokenizer(tmp_path)
        assert tokenizer.decode([tokenizer.end_of_text]) == "<|im_end|>"
        told = load_tokenizer(tmp_path, end_of_text="<|im_start|>")
        assert told.decode([told.end_of_text]) == "<|im_start|>"
        tokenizer.save(tmp_path / "new")
        assert load_tokenizer(tmp_path / "new").fingerprint == tokenizer.fingerprint

    def test_the_end_of_a_turn_is_not_that_of_a_document(self, bpe_json, tmp_path):
        (tmp_path / "tokenizer.json").write_bytes(with_special(bpe_json, "<|im_end|>", "</s>"))
        (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
        tokenizer = load_tokenizer(tmp_path)
        assert tokenizer.decode([tokenizer.end_of_text]) == "</s>"

    @pytest.mark.parametrize("said", ["{", "[]", '{"eos_token": 3}', '{"eos_token": "<gone>"}'])
    def test_a_config_that_does_not_tell(self, bpe_json, tmp_path, said):
        (tmp_path / "tokenizer.json").write_bytes(with_special(bpe_json))
        (tmp_path / "tokenizer_config.json").write_text(said)
        problem = "cannot be read as JSON" if said == "{" else "none of its tokens is known"
        with pytest.raises(ValueError, match=problem):
            load_tokenizer(tmp_path)

    def test_other_tokenizers_have_no_choice(self, tmp_path):
        (tmp_path / "rwkv_vocab.txt").write_bytes(vocabulary())
        for source in ("bytes", tmp_path):
            with pytest.raises(ValueError, match="token 0 always ends a text of the "):
                load_tokenizer(source, end_of_text="a")


class TestSameTokenizer:
    """What a tokenizer does counts, not the bytes of its file."""

    def test_layout_of_the_json_does_not_matter(self, bpe, bpe_json):
        spec = json.loads(bpe_json)
        # Older releases of the library write merges as one text each.
        merges = [merge if isinstance(merge, str) else " ".join(merge)
                  for merge in spec["model"]["merges"]]  # fmt: skip
        vocab = dict(sorted(spec["model"]["vocab"].items()))
        other = spec | {"model": spec["model"] | {"merges": merges, "vocab": vocab}}
        for same in (json.dumps(spec, indent=4), json.dumps(other, ensure_ascii=False)):
            tokenizer = BPETokenizer(same.encode())
            assert tokenizer.fingerprint != bpe.fingerprint
            assert tokenizer.same_as(bpe) and bpe.same_as(tokenizer)

    def test_what_is_done_around_a_text_does_not_matter(self, bpe, bpe_json):
        library = tokenizers.Tokenizer.from_str(bpe_json)
        library.enable_truncation(5)
        library.post_processor = tokenizers.processors.ByteLevel(trim_offsets=True)
        assert BPETokenizer(library.to_str().encode()).same_as(bpe)

    def test_other_ids_are_another_tokenizer(self, bpe, bpe_json):
        spec = json.loads(bpe_json)
        merges = spec["model"]["merges"]
        fewer = spec | {"model": spec["model"] | {"merges": merges[:-1]}}
        normalized = spec | {"normalizer": {"type": "NFC"}}
        for other in (fewer, normalized):
            assert not BPETokenizer(json.dumps(other).encode()).same_as(bpe)
        assert not BPETokenizer(bpe_json.encode(), end_of_text="the").same_as(bpe)

    def test_world_files_of_other_line_ends_literals_and_padding(self, small_world):
        content = small_world._content
        assert small_world.same_as(WorldTokenizer(content.replace(b"\n", b"\r\n")))
        assert small_world.same_as(WorldTokenizer(content.replace(b" b'a' ", b" 'a' ")))
        padded = content + b"262 '' 0\n270 '' 0\n"
        assert small_world.same_as(WorldTokenizer(padded))
        assert not small_world.same_as(WorldTokenizer(content + b"262 'ab' 2\n"))
        swapped = content.replace(b"65 b'@' 1", b"65 b'A' 1").replace(b"66 b'A' 1", b"66 b'@' 1")
        assert swapped != content and not small_world.same_as(WorldTokenizer(swapped))

    def test_kinds_are_never_the_same(self, any_tokenizer, bpe, small_world):
        same = [any_tokenizer.same_as(other) for other in (ByteTokenizer(), small_world, bpe)]
        assert same.count(True) == 1

    def test_a_checkpoint_accepts_its_tokenizer_in_other_bytes(self, bpe, bpe_json, tmp_path):
        receptance.save(make_model(bpe.vocab_size), tmp_path / "mine", bpe)
        indented = BPETokenizer(json.dumps(json.loads(bpe_json), indent=1).encode())
        _, found = receptance.load(tmp_path / "mine", tokenizer=indented)
        assert found.fingerprint == bpe.fingerprint
        other = BPETokenizer.train(["another text, of other words"] * 4, bpe.vocab_size)
        with pytest.raises(ValueError, match="is not the bpe one given; leave out tokenizer="):
            receptance.load(tmp_path / "mine", tokenizer=other)


class TestLongRuns:
    """Runs of one character are shortened before the library sees them; the ids must not tell."""

    @settings(deadline=None, max_examples=150)
    @given(data=st.data())
    def test_ids_are_those_of_the_library(self, bpe, library, data):
        piece = st.one_of(
            st.text("a=-b '<\n中é😀s", max_size=6),
            st.tuples(st.sampled_from("a=-b '<\n中é😀s"), st.integers(100, 300)).map(
                lambda run: run[0] * run[1]
            ),
        )
        text = "".join(data.draw(st.lists(piece, max_size=6)))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "_BLOCK", 24)
            assert bpe.encode(text) == library.encode(text).ids

    @NO_LIMIT
    @given(
        char=st.characters(exclude_categories=["Cs"]),
        left=st.text(max_size=2),
        right=st.text(max_size=2),
    )
    @example(char="\u0301", left="e", right="\u0323")  # marks that NFC joins and sorts
    @example(char="\u0958", left="", right="\u0301")  # one character that NFC makes two
    @example(char="\u0f73", left="", right="")  # a run of it is not sorted one by one
    @example(char="\u1161", left="\u1100", right="\u11a8")  # Hangul parts
    def test_normalizing_does_not_matter(self, bpe_json, char, left, right):
        library = tokenizers.Tokenizer.from_str(bpe_json)
        library.normalizer = tokenizers.normalizers.NFC()
        text = left + char * 301 + right
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "_BLOCK", 24)
            ids = BPETokenizer(library.to_str().encode()).encode(text)
        assert ids == library.encode(text).ids

    @pytest.mark.parametrize("stretch", ["lstrip", "rstrip"])
    def test_added_tokens_do_not_matter(self, bpe_json, stretch):
        library = tokenizers.Tokenizer.from_str(bpe_json)
        library.add_tokens(["aaaaa", tokenizers.AddedToken("<eat>", **{stretch: True})])
        tokenizer = BPETokenizer(library.to_str().encode())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "_BLOCK", 24)
            for text in ("a" * 301, " " * 301 + "<eat>" + "\n" * 301, "<" * 301 + "eat>"):
                assert tokenizer.encode(text) == library.encode(text).ids

    def test_other_rules_than_those_understood_are_left_to_the_library(self, bpe_json):
        library = tokenizers.Tokenizer.from_str(bpe_json)
        library.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
            [
                tokenizers.pre_tokenizers.Split(tokenizers.Regex(".{1,7}"), "isolated"),
                tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        tokenizer = BPETokenizer(library.to_str().encode())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "_BLOCK", 24)
            assert tokenizer.encode("a" * 301) == library.encode("a" * 301).ids

    @pytest.mark.parametrize("char", ["a", "中"])
    def test_of_two_megabytes_of_one_character_little_is_read(self, bpe, char, characters_read):
        text = char * (2_000_000 // len(char.encode()))
        assert characters_read(bpe, text) <= 5 * module._BLOCK < len(text) / 10


class TestPile:
    def test_known_ids(self, pile):
        assert (pile.kind, pile.vocab_size, pile.end_of_text) == ("bpe", 50277, 0)
        assert (pile.encode("\n"), pile.encode("\n\n")) == ([187], [535])
        assert pile.encode(" Paris") == [7785]
        assert len(pile.encode("The Eiffel Tower is located in the city of")) == 11
        assert pile.decode([0]) == "<|endoftext|>"

    def test_runs_of_spaces_are_added_tokens(self, pile):
        for length in range(2, 25):
            assert pile.encode(" " * length) == [50278 - length]
            assert pile.decode([50278 - length]) == " " * length

    def test_text_becomes_nfc(self, pile):
        assert pile.decode(pile.encode("e\u0301")) == "\u00e9"

    @NO_LIMIT
    @given(data=st.lists(UTF8_PIECES).map(b"".join).filter(is_nfc))
    def test_bytes_survive_or_are_refused(self, pile, data):
        if set(data) & {0xC0, 0xC1, *range(0xF5, 0x100)}:
            with pytest.raises(ValueError, match="is not UTF-8 and has no token"):
                pile.encode(data)
        else:
            assert pile.decode_bytes(pile.encode(data)) == data

    @pytest.mark.parametrize("char", ["a", "-"])
    def test_of_two_megabytes_of_one_character_little_is_read(self, pile, char, characters_read):
        assert characters_read(pile, char * 2_000_000) <= 5 * module._BLOCK

    def test_a_long_run_of_spaces_is_read_once(self, pile, characters_read):
        """Those are added tokens, which the library cuts off before it merges anything."""
        assert characters_read(pile, " " * 2_000_000) <= 2_000_000 + 5 * module._BLOCK

    @pytest.mark.parametrize("char", ["a", "é"])
    def test_long_runs_have_the_ids_of_the_library(self, pile, char):
        library = tokenizers.Tokenizer.from_file(str(PILE_FILE))
        text = f"x {char * 70_001}\n\ny {char * 60_000} z"
        assert pile.encode(text) == library.encode(text).ids


class TestLoading:
    def refuse(self, content: str, message: str, tmp_path: Path) -> None:
        path = tmp_path / "some.json"
        path.write_text(content, encoding="utf-8")
        with pytest.raises(ValueError, match=message) as caught:
            load_tokenizer(path)
        assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)

    def test_a_file_is_known_by_its_content(self, bpe_json, tmp_path):
        (tmp_path / "a").write_text(bpe_json, encoding="utf-8")
        (tmp_path / "b").write_bytes(vocabulary())
        assert load_tokenizer(tmp_path / "a").kind == "bpe"
        assert load_tokenizer(str(tmp_path / "b")).kind == "world"

    def test_in_a_directory_exact_names_go_first(self, bpe_json, tmp_path):
        (tmp_path / "tokenizer_config.json").write_text("{}")
        (tmp_path / "rwkv_vocab_v1.txt").write_bytes(vocabulary())
        assert load_tokenizer(tmp_path).kind == "world"
        (tmp_path / "tokenizer.json").write_text(bpe_json, encoding="utf-8")
        assert load_tokenizer(tmp_path).kind == "bpe"

    def test_other_names_in_a_directory(self, bpe_json, tmp_path):
        (tmp_path / "20B_tokenizer.json").write_text(bpe_json, encoding="utf-8")
        assert load_tokenizer(tmp_path).kind == "bpe"

    def test_two_in_a_directory_are_refused(self, bpe, small_world, tmp_path):
        bpe.save(tmp_path)
        small_world.save(tmp_path)
        with pytest.raises(ValueError, match=r"rwkv_vocab\.txt, tokenizer\.json are all"):
            load_tokenizer(tmp_path)

    def test_missing(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="nowhere: no such file; wanted is"):
            load_tokenizer(tmp_path / "nowhere")
        with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json and no rwkv_vocab"):
            load_tokenizer(tmp_path)

    def test_neither_kind(self, tmp_path):
        (tmp_path / "notes.md").write_text("# Notes\n")
        with pytest.raises(ValueError, match=r"notes\.md: neither a World vocabulary"):
            load_tokenizer(tmp_path / "notes.md")
        (tmp_path / "empty.txt").write_text("")
        with pytest.raises(ValueError, match=r"empty\.txt, line 1: b'' is not `id literal"):
            load_tokenizer(tmp_path / "empty.txt")

    @pytest.mark.parametrize("content", ["", "[]", "{}", '{"model_max_length": 5}'])
    def test_json_of_something_else(self, content, tmp_path):
        self.refuse(content, "not a usable tokenizer.json: .*line 1", tmp_path)

    def test_json_cut_short(self, bpe_json, tmp_path):
        self.refuse(bpe_json[: len(bpe_json) // 2], "EOF while parsing.* line", tmp_path)

    def test_json_that_is_not_utf8(self):
        with pytest.raises(ValueError, match=r"t\.json: not a usable .*utf-8"):
            BPETokenizer(b'{"\xff', "t.json")

    def test_another_model(self, tmp_path):
        library = tokenizers.Tokenizer(tokenizers.models.WordPiece({"[UNK]": 0}))
        self.refuse(library.to_str(), "its model is WordPiece; wanted is", tmp_path)

    def test_another_pre_tokenizer(self, bpe_json, tmp_path):
        spec = json.loads(bpe_json)
        spec["pre_tokenizer"] = {"type": "Whitespace"}
        self.refuse(json.dumps(spec), "its pre-tokenizer is Whitespace, not ByteLevel", tmp_path)
        spec["pre_tokenizer"] = None
        self.refuse(json.dumps(spec), "its pre-tokenizer is missing", tmp_path)

    def test_a_space_before_every_text(self, bpe_json, tmp_path):
        changed = bpe_json.replace('"add_prefix_space":false', '"add_prefix_space":true')
        self.refuse(changed, "a space before every text", tmp_path)

    def test_merges_that_are_left_out_at_random(self, bpe_json, tmp_path):
        spec = json.loads(bpe_json)
        spec["model"]["dropout"] = 0.5
        self.refuse(json.dumps(spec), "merges at random", tmp_path)

    def test_a_vocabulary_without_a_byte_or_an_id(self, bpe_json, tmp_path):
        spec = json.loads(bpe_json)
        spec["model"]["merges"] = []
        kept = dict(list(spec["model"]["vocab"].items())[:257])
        spec["model"]["vocab"] = {token: i for token, i in kept.items() if token != "!"}
        self.refuse(json.dumps(spec), "no token for byte 0x21", tmp_path)
        spec["model"]["vocab"] = {**kept, "!!": 300}
        self.refuse(json.dumps(spec), "id 257 has no token", tmp_path)
        spec["model"]["vocab"] = {**kept, "▁a": 257}
        self.refuse(json.dumps(spec), "token 257 contains '▁'", tmp_path)
