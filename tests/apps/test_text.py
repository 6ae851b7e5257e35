"""Control characters on their way to a terminal, and escapes on their way from one."""

import unicodedata

import pytest

from receptance.apps.text import as_flags, has_escapes, unescaped, visible


class TestVisible:
    def test_controls_are_spelled_out(self):
        assert visible("a\x1b]0;title\x07b\x9b2J\r\x7f") == "a\\x1b]0;title\\x07b\\x9b2J\\x0d\\x7f"

    def test_all_of_them_and_nothing_else(self):
        for code in range(0x11000):
            character = chr(code)
            kept = unicodedata.category(character) != "Cc" or character in "\n\t"
            assert (visible(character) == character) == kept

    def test_one_line(self):
        assert visible("a\n\tb", one_line=True) == "a\\x0a\\x09b"

    def test_pieces_make_the_whole(self):
        text = "naïve \x1b[31mred\x1b[0m\n狐"
        assert "".join(map(visible, text)) == visible(text)


class TestFlags:
    """Arguments that the library's messages name, as a command calls them."""

    @pytest.mark.parametrize(
        ("said", "meant"),
        [
            ("there; pass tokenizer=FILE", "there; pass --tokenizer FILE"),
            ("leave out tokenizer=", "leave out --tokenizer"),
            ("leave out tokenizer=; or", "leave out --tokenizer; or"),
            ("set recompute=True, or x=False.", "set --recompute, or --no-x."),
            ("(max_tokens=N)", "(--max-tokens N)"),
            ('say dtype="float32"', "say --dtype float32"),
            ("line 1: set skip_bad to leave", "line 1: set --skip-bad to leave"),
            ("it was started with learning_rate 2", "it was started with --learning-rate 2"),
            (
                "max_tokens is -1; it must be at least 0",
                "--max-tokens is -1; it must be at least 0",
            ),
            ("max_tokens is a word; it is 1", "max_tokens is a word; it is 1"),
        ],
    )
    def test_are_named(self, said, meant):
        names = ("max_tokens", "skip_bad", "learning_rate")
        flags = {name: "--" + name.replace("_", "-") for name in names}
        assert as_flags(said, flags) == meant

    @pytest.mark.parametrize(
        "text",
        [
            "no such file or directory: runs/a=b",
            "no such file or directory: a=b",
            "runs/a=: no such file",
            "./x=FILE: no such file",
            "wanted a JSON object, found key=value in line 3",
            "context is 32; wanted 64",
            "a == b and c >= 3",
            "no such file or directory: my_text",
            "my_text: no such file",
            "vocab_size is 100; it must be at least 257",
            "beside my_text is no tokenizer",
        ],
    )
    def test_other_words_stay_as_they_are(self, text):
        assert as_flags(text) == text


class TestEscapes:
    @pytest.mark.parametrize(
        ("text", "meant"),
        [
            (r"\n\n", "\n\n"),
            (r"a\tb", "a\tb"),
            (r"a\\n", r"a\n"),
            (r"\x41\u72d0\xe9", "A狐é"),
            ("plain \n", "plain \n"),
        ],
    )
    def test_are_what_they_name(self, text, meant):
        assert unescaped(text) == meant
        assert has_escapes(text) == (text != meant)

    @pytest.mark.parametrize("text", [r"C:\dir", "end\\", r"\xg1", r"\u12", "a\\\nb"])
    def test_others_are_refused(self, text):
        assert not has_escapes(text)
        with pytest.raises(ValueError, match="holds a backslash before"):
            unescaped(text)
