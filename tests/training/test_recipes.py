"""Recipes: the paper's figures, options that exist, and refusals that name what is wrong."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from command import call
from hypothesis import given
from hypothesis import strategies as st

from receptance.apps.train import Options as TrainCommand
from receptance.training import TrainOptions, learning_rate
from receptance.training.options import SECTION
from receptance.training.recipes import apply_recipe, load_recipe, option_names, recipe_names

# Appendix G of the paper: first learning rate, mini-epochs before the decay, last learning rate.
PAPER = {
    "169m": (6e-4, 361, 1e-5),
    "430m": (4e-4, 411, 1e-5),
    "1.5b": (3e-4, 443, 1e-5),
    "3b": (1.5e-4, 451, 1e-5),
    "7b": (1.5e-4, 465, 1e-5),
    "14b": (1e-4, 544, 7e-6),
}
# The model card of BlinkDL/rwkv-7-pile: both learning rates and the rows of a step.
RWKV_7 = {
    "rwkv7-0.1b": (8e-4, 3e-5, 240),
    "rwkv7-0.4b": (6e-4, 2e-5, 240),
    "rwkv7-1.5b": (5e-4, 1.5e-5, 360),
    **dict.fromkeys(("rwkv7-2.9b", "rwkv7-7.2b", "rwkv7-13.3b"), (5e-4, 1.5e-5, 360)),
}
# A comment in RWKV-v5/train.py names the rates of three sizes; the larger ones have the last.
RWKV_5_AND_6 = {
    **{f"rwkv{number}-0.1b": 6e-4 for number in (5, 6)},
    **{f"rwkv{number}-0.4b": 4e-4 for number in (5, 6)},
    **dict.fromkeys(("rwkv5-1.5b", "rwkv5-3b", "rwkv5-7b"), 3e-4),
    **dict.fromkeys(("rwkv6-1.6b", "rwkv6-3b", "rwkv6-7b", "rwkv6-14b"), 3e-4),
}
MINI_EPOCH = 40_320 * 1024  # samples, tokens each
# Section 5.2: context and tokens of each extension.
EXTENSIONS = {
    "context-2048": (2048, 10e9),
    "context-4096": (4096, 100e9),
    "context-8192": (8192, 100e9),
}


def parts(options: object) -> Iterator[object]:
    """A dataclass and every dataclass in it."""
    yield options
    for value in vars(options).values():
        if dataclasses.is_dataclass(value):
            yield from parts(value)


def trained(name: str) -> TrainOptions:
    """The training options that `receptance train --recipe` would take."""
    found = parts(apply_recipe(TrainCommand(), name))
    return next(part for part in found if isinstance(part, TrainOptions))


def tokens_per_step(options: TrainOptions) -> int:
    return options.batch * options.context


def test_the_names():
    arena = {f"lra-{task}" for task in ("listops", "text", "retrieval", "image", "pathfinder")}
    others = {"cpu-10min", "one-gpu", "tiny-python", "enwik8-6", "enwik8-12"}
    assert set(recipe_names()) == {*PAPER, *EXTENSIONS, *RWKV_7, *RWKV_5_AND_6, *arena, *others}


@pytest.mark.parametrize("name", recipe_names())
def test_every_key_is_an_option(name):
    """And its value arrives there."""
    options = apply_recipe(TrainCommand(), name)
    found = {key: value for part in parts(options) for key, value in vars(part).items()}
    for key, value in load_recipe(name).items():
        assert found[key] == (tuple(value) if isinstance(value, list) else value), key


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_says_how_to_use_it(name):
    """The example is the command of this recipe, and the file explains its figures."""
    import receptance.training.recipes

    text = (Path(receptance.training.recipes.__file__).parent / f"{name}.toml").read_text()
    assert "receptance train" in text.split("\n\n")[0]
    assert f"--recipe {name} " in text.split("\n\n")[0]
    assert max(map(len, text.splitlines())) <= 100


def test_the_command_says_what_14b_costs():
    words = "train --recipe 14b --dry-run --on a100-80g --devices 64 --mfu 0.476"
    result = call(*words.split())
    assert result.code == 0, result.err
    assert "14,148,597,760" in result.out
    assert "33.7 days on 64 × a100-80g" in result.out


def test_the_command_line_comes_first():
    result = call("train", "--recipe", "169m", "--dry-run", "--on", "h100", "--steps", 10)
    assert "10 of 131,072 tokens" in result.out


@pytest.mark.parametrize("name", RWKV_7)
def test_rwkv_7_is_trained_as_its_authors_say(name):
    first, last, rows = RWKV_7[name]
    recipe, options = load_recipe(name), trained(name)
    assert recipe["size"] == name
    assert (options.learning_rate, options.final_learning_rate) == (first, last)
    assert (options.batch, options.context, options.weight_decay) == (rows, 4096, 0.1)
    assert options.steps * tokens_per_step(options) == pytest.approx(332_115_325_534, rel=1e-5)
    assert learning_rate(options.warmup_steps, options) == pytest.approx(first)
    middle = learning_rate((options.steps + options.warmup_steps) // 2, options)
    assert middle == pytest.approx((first + last) / 2, rel=1e-3)
    assert learning_rate(options.steps - 1, options) == pytest.approx(last)


@pytest.mark.parametrize("name", RWKV_5_AND_6)
def test_rwkv_5_and_6_are_trained_at_the_rates_of_the_official_code(name):
    first, options = RWKV_5_AND_6[name], trained(name)
    assert load_recipe(name)["size"] == name
    assert options.learning_rate == first
    assert options.final_learning_rate == pytest.approx(first / 100)
    assert options.steps * tokens_per_step(options) == pytest.approx(1.12e12, rel=1e-5)


class TestPublishedSizes:
    @pytest.mark.parametrize("name", PAPER)
    def test_are_trained_as_the_paper_says(self, name):
        first, constant, last = PAPER[name]
        recipe, options = load_recipe(name), trained(name)
        assert recipe["size"] == name
        assert (options.learning_rate, options.final_learning_rate) == (first, last)
        assert options.constant_steps * tokens_per_step(options) == constant * MINI_EPOCH
        assert options.steps * tokens_per_step(options) == 8043 * MINI_EPOCH
        assert options.context == 1024
        assert options.batch in (128, 256)
        assert options.betas == (0.9, 0.99)
        assert (options.weight_decay, options.clip, options.dtype) == (0, 1, "bfloat16")
        assert options.max_logit_penalty == 1e-4

    def test_read_the_pile_once(self):
        options = trained("14b")
        assert options.steps * tokens_per_step(options) == pytest.approx(332.1e9, rel=1e-3)

    @pytest.mark.parametrize("name", PAPER)
    def test_their_schedule_is_that_of_rwkv_lm(self, name):
        """Constant through the last step of the mini-epochs named, at the end rate at the end."""
        first, _, last = PAPER[name]
        options = trained(name)
        assert learning_rate(0, options) == first
        assert learning_rate(options.constant_steps - 1, options) == first
        assert learning_rate(options.constant_steps, options) < first
        assert learning_rate(options.steps - 1, options) == pytest.approx(last)


class TestContextExtension:
    @pytest.mark.parametrize("name", EXTENSIONS)
    def test_budgets_and_rates(self, name):
        context, budget = EXTENSIONS[name]
        options = trained(name)
        assert options.context == context
        assert options.steps * tokens_per_step(options) == pytest.approx(budget, rel=1e-5)
        assert options.steps * tokens_per_step(options) >= budget
        assert {learning_rate(s, options) for s in (100, 10_000, 70_000)} == {1e-5}

    @pytest.mark.parametrize("name", EXTENSIONS)
    def test_memory_and_steps_stay_as_they_were(self, name):
        options = trained(name)
        assert options.chunk == 1024
        assert options.carry == "gradient"
        assert tokens_per_step(options) == tokens_per_step(trained("169m"))

    @pytest.mark.parametrize("name", EXTENSIONS)
    def test_sizes_come_from_the_checkpoint(self, name):
        assert not {"size", "width", "layers", "tokenizer"} & load_recipe(name).keys()


@dataclass(frozen=True, kw_only=True)
class Inner:
    steps: int = 1
    rate: float = 0.5
    betas: tuple[float, float] = (0.1, 0.2)
    kind: Literal["one", "other"] = "one"

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ValueError(f"steps is {self.steps}; it must be at least 0")


@dataclass(frozen=True, kw_only=True)
class Named:
    rank: int = 8
    rate: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Outer:
    size: str | None = None
    init: Path | None = None
    flag: bool = False
    data: tuple[str, ...] = ()
    inner: Inner = field(default_factory=Inner)
    low: Named = field(default_factory=Named, metadata=SECTION)


class TestAppliedToOptions:
    def apply(self, folder: Path, text: str) -> Outer:
        path = folder / "mine.toml"
        path.write_text(text)
        return apply_recipe(Outer(), path)

    def test_values_arrive_as_their_fields_hold_them(self, tmp_path):
        found = self.apply(
            tmp_path,
            'size = "x"\ninit = "a/b"\nflag = true\ndata = ["a", "b", "c"]\n'
            'steps = 7\nrate = 1\nbetas = [0, 0.5]\nkind = "other"\n[low]\nrate = 0.25\n',
        )
        inner = Inner(steps=7, rate=1.0, betas=(0.0, 0.5), kind="other")
        assert found == Outer(
            size="x",
            init=Path("a/b"),
            flag=True,
            data=("a", "b", "c"),
            inner=inner,
            low=Named(rate=0.25),
        )
        assert isinstance(found.inner.rate, float)

    def test_a_file_as_windows_writes_it(self, tmp_path):
        (tmp_path / "mine.toml").write_bytes(b"\xef\xbb\xbfsteps = 3\r\n")
        assert apply_recipe(Outer(), tmp_path / "mine.toml").inner.steps == 3
        (tmp_path / "mine.toml").write_text('size = "x"', encoding="utf-16")
        with pytest.raises(ValueError, match=r"^recipe .*mine\.toml: 'utf-8' codec can't decode"):
            load_recipe(tmp_path / "mine.toml")

    def test_an_empty_recipe_changes_nothing(self, tmp_path):
        assert self.apply(tmp_path, "# nothing\n") == Outer()

    @pytest.mark.parametrize(
        ("text", "refusal"),
        [
            ("stepps = 3", "no option 'stepps'; did you mean steps?"),
            ("inner = 3", "no option 'inner'; there are betas, "),
            ("[lo]\nrank = 3", "no option 'lo.rank'; did you mean low.rank?"),
            ("rank = 3", "no option 'rank'; did you mean "),
            (
                "xyz = 3",
                "no option 'xyz'; there are betas, data, flag, init, kind, low.rank, low.",
            ),
            ("steps = 1.5", "steps is 1.5; it must be a whole number"),
            ("steps = true", "steps is True; it must be a whole number"),
            ("flag = 1", "flag is 1; it must be true or false"),
            ('rate = "much"', "rate is 'much'; it must be a number"),
            ("size = 3", "size is 3; it must be a text"),
            ("betas = [0.9]", "betas has 1 values; it takes 2"),
            ("betas = 0.9", "betas is 0.9; it must be a list"),
            ('data = ["a", 1]', "an item of data is 1; it must be a text"),
            ('recipe = "169m"', "it names another recipe; copy that one's options into it"),
            ('kind = "third"', "kind is 'third'; it must be one of one, other"),
            ("steps = -1", "steps is -1; it must be at least 0"),
            ("[inner]\nsteps = 3", "no option 'inner.steps'; did you mean steps?"),
            ("[low]\nrank = 1.5", "low.rank is 1.5; it must be a whole number"),
            ("[low.rank]\nx = 1", "low.rank is {'x': 1}; it must be a whole number"),
            ("steps = ", "Invalid value"),
        ],
    )
    def test_refusals(self, text, refusal, tmp_path):
        with pytest.raises(ValueError) as caught:
            self.apply(tmp_path, text)
        assert refusal in str(caught.value)
        assert str(caught.value).startswith(f"recipe {tmp_path / 'mine.toml'}: ")

    def test_a_name_there_is_not(self, tmp_path):
        with pytest.raises(ValueError, match=r"^no recipe '168m'; did you mean 169m\?$"):
            load_recipe("168m")
        with pytest.raises(ValueError, match=r"^no recipe '.*nothing.toml'; there are 1.5b, 14b"):
            load_recipe(tmp_path / "nothing.toml")

    @given(
        st.fixed_dictionaries(
            {},
            optional={
                "steps": st.integers(0, 10**9),
                "rate": st.floats(0, 1),
                "flag": st.booleans(),
                "size": st.text("abcdé \\\"'#=[]", max_size=8),
            },
        )
    )
    def test_what_is_written_is_what_is_read(self, tmp_path_factory, values):
        words = {str: lambda x: '"' + x.replace("\\", "\\\\").replace('"', '\\"') + '"'}
        words |= {bool: lambda x: str(x).lower()}
        lines = [f"{k} = {words.get(type(v), repr)(v)}\n" for k, v in values.items()]
        found = self.apply(tmp_path_factory.mktemp("recipe"), "".join(lines))
        assert {**vars(found), **vars(found.inner)}.items() >= values.items()


def test_the_names_of_nested_options():
    nested = {f.name for f in dataclasses.fields(Inner)}
    assert (
        set(option_names(Outer()))
        == {"size", "init", "flag", "data", "low.rank", "low.rate"} | nested
    )
