"""Words into options: lists that take one value each, and every mistake in one line."""

import contextlib
import io
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Literal

import pytest
import tyro
from command import call

from receptance.apps import bench, convert, data, generate, train
from receptance.apps.options import parse


@dataclass(frozen=True)
class Inner:
    """The inner options."""

    rank: int = 8
    """How many."""
    targets: tuple[str, ...] = ("a", "b")
    """Which ones."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank is {self.rank}; it must be at least 1")
        if len(self.targets) > 3:
            raise ValueError("too many targets")


@dataclass(frozen=True)
class Flat:
    """Options without a prefix."""

    names: tuple[str, ...] = ("n",)
    """Some names."""


@dataclass(frozen=True)
class Options:
    """Do something with a model."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """What to work on."""
    prompts: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Texts."""
    stop: tuple[str, ...] = ()
    """Where to end."""
    sizes: tuple[int, ...] = (1, 4)
    """Numbers."""
    kinds: tuple[Literal["x", "y"], ...] = ()
    """Types."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Two numbers."""
    name: str | None = None
    """A name."""
    kind: Literal["x"] | Literal["y"] | None = None
    """A type."""
    max_count: int = 3
    """A number."""
    fast: bool = False
    """A switch."""
    inner: Inner = field(default_factory=Inner)
    flat: Annotated[Flat, tyro.conf.arg(name="")] = field(default_factory=Flat)

    def __post_init__(self) -> None:
        if self.max_count < 0:
            raise ValueError(f"max_count is {self.max_count}; it must be at least 0")


def said(*words: str, default: Options | None = None) -> Options:
    return parse(Options, words, "receptance test", default)


class TestLists:
    def test_an_option_for_a_list_leaves_the_prompt_alone(self):
        found = said("m", "--stop", "END", "Once upon")
        assert (found.stop, found.prompts) == (("END",), ("Once upon",))

    def test_it_is_repeated_and_replaces_the_default(self):
        found = said("m", "--sizes", "5", "--stop=--", "--sizes=7", "--inner.targets", "c", "p")
        assert found.sizes == (5, 7)
        assert found.stop == ("--",)
        assert found.inner == Inner(targets=("c",))
        assert (found.flat, found.prompts) == (Flat(), ("p",))

    def test_what_is_not_given_is_the_default(self):
        assert said("m") == Options("m")
        stored = Options("other", stop=("END",), inner=Inner(rank=3, targets=("c",)))
        assert said("m", default=stored).inner == stored.inner
        assert said("m", "--stop", "a", default=stored).stop == ("a",)

    def test_the_dataclass_checks_what_was_given(self):
        words = [word for target in "abcd" for word in ("--inner.targets", target)]
        with pytest.raises(ValueError, match=r"^too many targets$"):
            said("m", *words)

    @pytest.mark.parametrize(
        ("words", "flag", "other"),
        [
            (("m", "a prompt", "--stop", "A", "B"), "--stop", "B"),
            (("m", "--sizes", "5", "6"), "--sizes", "6"),
            (("--kinds", "x", "y", "m"), "--kinds", "y"),
        ],
    )
    def test_a_second_value_is_refused_where_it_can_be_told(self, words, flag, other):
        with pytest.raises(ValueError, match=f"^{flag} takes one value, and '{other}' follows it;"):
            said(*words)

    @pytest.mark.parametrize(
        ("kind", "words", "found"),
        [
            (generate.Options, "M --stop END text", lambda o: (o.stop, o.prompts)),
            (train.Options, "--exclude END text", lambda o: (o.start.exclude, o.data)),
            (train.Options, "--lora.targets END text", lambda o: (o.start.lora.targets, o.data)),
            (data.Prepare, "--out x --tokenizer y --exclude END text",
             lambda o: (o.options.exclude, o.sources)),
        ],
    )  # fmt: skip
    def test_in_the_commands(self, kind: type, words: str, found: Callable):
        assert found(parse(kind, words.split(), "receptance")) == (("END",), ("text",))

    def test_in_the_commands_with_lists_of_names_and_numbers(self):
        words = "--batches 2 --dtypes int8 --prefill 3 --prefill 4 model"
        found = parse(bench.Options, words.split(), "receptance bench")
        assert (found.model, found.dtypes) == ("model", ("int8",))
        assert (found.batches, found.prefill) == ((2,), (3, 4))
        chosen = parse(train.Options, ["--log", "wandb", "text"], "receptance train")
        assert (chosen.run.log, chosen.data) == (("wandb",), ("text",))
        betas = parse(train.Options, ["--betas", "0.5", "0.6", "text"], "receptance train")
        assert (betas.start.train.betas, betas.data) == ((0.5, 0.6), ("text",))


class TestMistakes:
    @pytest.mark.parametrize(
        ("words", "message"),
        [
            ((), "MODEL is missing; receptance test --help says more"),
            (("m", "--stpo", "x"), "unknown option --stpo; did you mean --stop?"),
            (("m", "--Zq"), "unknown option --Zq; receptance test --help lists them; a text that "
             "begins with a dash comes last, behind --"),
            (("m", "-Hname", "x"), "unknown option -Hname; did you mean --name?"),
            (("m", "--max-count", "x"), "--max-count is 'x'; it must be a whole number"),
            (("m", "--betas", "0.5", "x"), "--betas is 'x'; it must be a number"),
            (("m", "--betas", "0.5"), "--betas wants 2 values"),
            (("m", "--sizes", "x"), "--sizes is 'x'; it must be a whole number"),
            (("m", "--kind", "z"), "--kind is 'z'; it must be one of x, y"),
            (("m", "--kinds", "z"), "--kinds is 'z'; it must be one of x, y"),
            (("m", "--name"), "--name wants a value"),
            (("m", "--name", "--fast"), "--name wants a value"),
            (("m", "--name", "-x"), "--name wants a value; if -x is meant, write --name=-x"),
            (("m", "--fast=3"), "--fast takes no value; leave out =3"),
            (("m", "--max-count", "-1"), "--max-count is -1; it must be at least 0"),
            (("m", "--inner.rank", "0"), "--inner.rank is 0; it must be at least 1"),
        ],
    )  # fmt: skip
    def test_is_one_line_that_names_the_flag(self, words, message):
        with pytest.raises(ValueError) as refusal:
            said(*words)
        assert str(refusal.value) == message

    def test_a_word_too_many(self):
        with pytest.raises(ValueError, match=r"^a word too many: \S+ convert takes SRC DST$"):
            parse(convert.Options, ["a", "b", "c"], "receptance convert")

    def test_what_has_to_be_named(self):
        with pytest.raises(ValueError, match=r"^--out and --tokenizer are missing; "):
            parse(data.Prepare, ["text"], "receptance data prepare")

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("train x --init m --tune lora --lora.rank 0", "--lora.rank is 0; it must be at least"),
            ("generate m --top-p 2", "--top-p is 2.0; it must be between 0 and 1"),
            ("train x --steps -1", "--steps is -1; it must be at least 0"),
            ("bench --dtypes int9", "--dtypes is 'int9'; it must be one of float32, "),
            ("data nothing", "unknown command 'nothing'; there are prepare, inspect, merge"),
            ("data", "no command; there are prepare, inspect, merge"),
        ],
    )
    def test_in_the_commands(self, line, message):
        result = call(*line.split())
        assert (result.code, result.out) == (2, "")
        assert result.err.startswith(f"receptance: error: {message}")
        assert result.err.count("\n") == 1


class TestWords:
    def test_dashes(self):
        assert said("m", "--", "--fast", "-x").prompts == ("--fast", "-x")
        assert said("m", "- item", "-5").prompts == ("- item", "-5")
        assert said("m", "--name=--fast").name == "--fast"

    def test_underscores_are_hyphens(self):
        assert said("m", "--max_count", "5").max_count == 5

    def test_later_values_win(self):
        assert said("m", "--name", "a", "--name", "b", "--fast", "--no-fast") == Options(
            "m", name="b"
        )

    @pytest.mark.parametrize("kind", [Options, train.Options, bench.Options, data.Prepare])
    def test_help_is_readable(self, kind, monkeypatch):
        monkeypatch.setenv("COLUMNS", "80")
        shown = io.StringIO()
        with contextlib.redirect_stdout(shown), pytest.raises(SystemExit) as leaving:
            parse(kind, ["--help-all"], "receptance test")
        assert leaving.value.code == 0
        assert max(map(len, shown.getvalue().splitlines())) <= 80
        assert "None}" not in shown.getvalue()
        defaults = re.findall(r"\(default:\s*([^)]*?)\s*\)", shown.getvalue())
        assert defaults and not set(defaults) & {"", "None"}

    def test_help_shows_one_value_of_a_list(self, capsys):
        with pytest.raises(SystemExit):
            said("-h")
        shown = capsys.readouterr().out
        assert "--name STR" in shown
        assert "--sizes INT (repeatable)" in shown
        assert "(default: 1 4)" in shown
        assert "--kinds {x,y} (repeatable)" in shown
