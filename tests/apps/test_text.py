"""Control characters on their way to a terminal, and escapes on their way from one."""

import unicodedata

import pytest

from receptance.apps.text import has_escapes, unescaped, visible


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
