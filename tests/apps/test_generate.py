"""receptance generate: what it prints, and states on disk."""

import io
from pathlib import Path

import pytest
import torch
from command import call
from tiny import make_model, small_bpe

from receptance import load, save
from receptance.apps.generate import Options, main
from receptance.engine import load_engine
from receptance.inference.generation import Generation, generate, prefill
from receptance.inference.sampling import Sampling
from receptance.state import State
from receptance.storage.manifest import verify
from receptance.tokenizer import ByteTokenizer

pytestmark = pytest.mark.usefixtures("folder")


def expect(prompt: str, **options: object) -> str:
    model, tokenizer = load("run")
    return prompt + generate(model, tokenizer, prompt, **options)


def test_a_prompt_with_its_continuation():
    result = call("generate", "run", "12 little", "--max-tokens", 20)
    assert (result.code, result.err) == (0, "")
    assert result.out == expect("12 little", max_tokens=20) + "\n"


def test_several_prompts_of_different_lengths():
    prompts = ("12 little", "", "a")
    result = call("generate", "run", *prompts, "--max-tokens", 20, "--top-p", 0.9, "--seed", 3)
    alone = [expect(prompt, max_tokens=20, top_p=0.9, seed=3) for prompt in prompts]
    assert result.out == "".join(f"--- {n} ---\n{text}\n" for n, text in enumerate(alone, start=1))


def test_one_text_is_shown_as_it_comes(monkeypatch):
    shown = []

    class Terminal(io.StringIO):
        def flush(self) -> None:
            shown.append(self.getvalue())

    monkeypatch.setattr("sys.stdout", Terminal())
    main(["run", "12 little", "--max-tokens", "20"])
    whole = expect("12 little", max_tokens=20)
    assert len(set(shown)) > 10
    assert all(whole.startswith(text) for text in shown)


def test_without_a_prompt_the_model_begins():
    assert call("generate", "run", "--max-tokens", 9).out == expect("", max_tokens=9) + "\n"


def test_every_option_has_an_effect():
    plain = call("generate", "run", "12", "--max-tokens", 40).out
    for option in (
        "--seed 1",
        "--temperature 0.5",
        "--top-p 0.5",
        "--top-k 3",
        "--repetition-penalty 1.5",
        "--presence-penalty 3",
        "--frequency-penalty 3",
    ):
        assert call("generate", "run", "12", "--max-tokens", 40, *option.split()).out != plain
    stop = plain[6:7]
    shorter = call("generate", "run", "12", "--max-tokens", 40, "--stop", stop).out
    assert shorter == plain[: plain.index(stop, 2)] + "\n"


def test_defaults_are_those_of_the_library():
    assert Options(model="run").sampling == Sampling()


def test_an_argument_need_not_be_utf8():
    result = call("generate", "run", "caf\udce9 12", "--max-tokens", 5)
    model, tokenizer = load("run")
    assert result.code == 0
    wanted = generate(model, tokenizer, [tokenizer.encode(b"caf\xe9 12")], max_tokens=5)
    assert result.out == "caf\udce9 12" + wanted[0] + "\n"


def test_dtype():
    """The text is the one that weights of the type give, and another one for each type."""
    save(make_model(), "mine", ByteTokenizer())
    texts = set()
    for dtype in ("float32", "bfloat16"):
        result = call("generate", "mine", "12", "--max-tokens", 200, "--dtype", dtype)
        assert (result.code, result.err) == (0, "")
        engine, tokenizer = load_engine("mine", dtype=dtype)
        assert result.out == "12" + generate(engine, tokenizer, "12", max_tokens=200) + "\n"
        texts.add(result.out)
    assert len(texts) == 2


def test_a_pth_with_a_tokenizer():
    torch.save(make_model(300).state_dict(), "model.pth")
    small_bpe().save(Path("elsewhere"))
    result = call("generate", "model.pth", "12 little", "--max-tokens", 5)
    assert result.code == 2
    assert "--tokenizer" in result.err
    argv = ("model.pth", "12 little", "--max-tokens", 5, "--tokenizer", "elsewhere/tokenizer.json")
    result = call("generate", *argv)
    assert (result.code, result.err) == (0, "")
    model, tokenizer = load("model.pth", tokenizer=small_bpe())
    assert result.out == "12 little" + generate(model, tokenizer, "12 little", max_tokens=5) + "\n"


def test_a_damaged_newest_checkpoint_is_passed_over_loudly():
    Path("run/step-00000012/config.json").unlink()
    result = call("generate", "run", "12", "--max-tokens", 5)
    assert result.code == 0
    assert result.err.startswith("receptance: warning: passed over a damaged checkpoint")
    assert "step-00000012/config.json is missing" in result.err
    assert result.err.count("\n") == 1


class TestPrompts:
    def test_a_list_option_before_the_prompt(self):
        plain = call("generate", "run", "12", "--max-tokens", 40).out
        stop = plain[6:8]
        result = call("generate", "run", "--max-tokens", 40, "--stop", stop, "12")
        assert (result.code, result.err) == (0, "")
        assert result.out == plain[: plain.index(stop, 2)] + "\n"

    def test_several_stop_strings(self):
        plain = call("generate", "run", "12", "--max-tokens", 40).out
        first, later = plain[5:7], plain[20:22]
        result = call("generate", "run", "12", "--max-tokens", 40, "--stop", later, "--stop", first)
        assert result.out == plain[: plain.index(first, 2)] + "\n"

    def test_words_without_quotes_are_said_to_be_several_prompts(self):
        result = call("generate", "run", "Once", "upon", "a", "--max-tokens", 1)
        assert result.err.startswith("receptance: note: 3 prompts, each continued for itself;")
        assert result.err.count("\n") == 1
        assert call("generate", "run", "Once upon a", "--max-tokens", 1).err == ""

    @pytest.mark.parametrize("content", [b"12 little\n", b"\xef\xbb\xbf12 little\n", b"12 \xe9\\n"])
    def test_from_a_file_to_the_byte(self, content):
        Path("prompt.txt").write_bytes(content)
        result = call("generate", "run", "--prompt-file", "prompt.txt", "--max-tokens", 9)
        model, tokenizer = load("run")
        prompt = content.removeprefix(b"\xef\xbb\xbf")
        (wanted,) = generate(model, tokenizer, [tokenizer.encode(prompt)], max_tokens=9)
        assert (result.code, result.err) == (0, "")
        assert result.out == prompt.decode("utf-8", "surrogateescape") + wanted + "\n"

    def test_from_standard_input(self, monkeypatch):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"12 little")))
        result = call("generate", "run", "--prompt-file", "-", "--max-tokens", 9)
        assert result.out == expect("12 little", max_tokens=9) + "\n"

    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            (("a", "--prompt-file", "text.txt"), "leave out --prompt-file or the others"),
            (("--prompt-file", "missing"), "missing: No such file"),
            (("--prompt-file", "text.txt", "--escapes"), "a file can hold the characters"),
            (("--prompt-file", "wide.txt"), "wide.txt: this is UTF-16"),
            (("--prompt-file", "."), "Is a directory"),
        ],
    )
    def test_files_that_cannot_be_prompts(self, argv, message):
        Path("wide.txt").write_text("12 foxes", encoding="utf-16")
        result = call("generate", "run", *argv)
        assert (result.code, result.err.count("\n")) == (2, 1)
        assert message in result.err

    def test_escapes_are_read_when_that_is_wanted(self):
        plain = expect("12\n", max_tokens=20)
        read = call("generate", "run", r"12\n", "--escapes", "--max-tokens", 20)
        assert (read.out, read.err) == (plain + "\n", "")
        stop = f"\\u{ord(plain[8]):04x}"
        ended = call("generate", "run", r"12\n", "--escapes", "--stop", stop, "--max-tokens", 20)
        assert ended.out == plain[: plain.index(plain[8], 3)] + "\n"
        wrong = call("generate", "run", r"12\d", "--escapes")
        assert (wrong.code, wrong.err.count("\n")) == (2, 1)
        assert "a backslash before 'd'" in wrong.err

    @pytest.mark.parametrize("argv", [(r"12\n",), ("12", "--stop", r"\n\n")])
    def test_otherwise_they_are_warned_of(self, argv):
        result = call("generate", "run", *argv, "--max-tokens", 3)
        assert result.out == expect(argv[0], max_tokens=3) + "\n"
        assert result.err.startswith("receptance: warning: ") and "--escapes" in result.err
        assert result.err.count("\n") == 1


class TestTerminal:
    WRITTEN = b"\x1b]0;pwned\x07 \xc2\x9b2J\r\n\tend"

    @pytest.fixture(autouse=True)
    def written(self, monkeypatch):
        """The model writes commands to a terminal, a byte at a time."""
        written = iter(self.WRITTEN * 2)
        monkeypatch.setattr(
            "receptance.inference.sampling.choose",
            lambda logits, *_: torch.tensor([next(written)] * len(logits)),
        )

    def show(self, monkeypatch, *argv: str, terminal: bool) -> str:
        class Output(io.StringIO):
            def isatty(self) -> bool:
                return terminal

        monkeypatch.setattr("sys.stdout", output := Output())
        main(["run", *argv, "--max-tokens", str(len(self.WRITTEN))])
        return output.getvalue()

    @pytest.mark.parametrize("prompts", [("a",), ("a\x1b", "b")])
    def test_gets_no_commands(self, prompts, monkeypatch):
        shown = self.show(monkeypatch, *prompts, terminal=True)
        assert "\\x1b]0;pwned\\x07 \\x9b2J\\x0d\n\tend" in shown
        assert set(shown) & {chr(n) for n in (*range(32), *range(127, 160))} == {"\n", "\t"}

    def test_a_file_gets_the_text(self, monkeypatch):
        assert self.show(monkeypatch, "a", terminal=False) == f"a{self.WRITTEN.decode()}\n"


class TestStates:
    GREEDY = ("--temperature", 0, "--max-tokens", 10)

    def test_what_is_saved_has_read_everything(self):
        assert call("generate", "run", "12 ", *self.GREEDY, "--save-state", "stäte").code == 0
        model, tokenizer = load("run")
        greedy = Generation(
            model, tokenizer, ["12 "], sampling=Sampling(temperature=0), max_tokens=10
        )
        read = tokenizer.encode("12 ") + [token.id for token in greedy]
        state = State.load("stäte", model.fingerprint())
        _, wanted = prefill(model, [read])
        assert state.tokens.tolist() == wanted.tokens.tolist() == [13]
        for name in ("time_shift", "channel_shift"):
            torch.testing.assert_close(state.tensors[name], wanted.tensors[name])
        second = call("generate", "run", "fox", *self.GREEDY, "--load-state", "stäte")
        prompt = read + tokenizer.encode("fox")
        (whole,) = generate(model, tokenizer, [prompt], temperature=0, max_tokens=10)
        assert second.out == f"fox{whole}\n"

    def test_weights_are_not_overwritten_and_nothing_is_loaded_before(self):
        save(make_model(), "mine", ByteTokenizer())
        weights = Path("mine/model.safetensors")
        before = weights.read_bytes()
        result = call("generate", "not a model", "hi", "--save-state", weights)
        assert result.code == 2
        assert f"cannot write the state to {weights}: what is there is not a state" in result.err
        assert weights.read_bytes() == before

    @pytest.mark.parametrize(
        "words",
        [
            ("generate", "run", "hi", "--save-state"),
            ("inspect", "run", "--plot"),
            ("evaluate", "run", "--text", "text.txt", "--out"),
            ("analyze", "run", "hi", "--out"),
        ],
    )
    def test_nothing_is_written_into_a_checkpoint(self, words):
        checkpoint = max(Path("run").glob("step-*"))
        result = call(*words, checkpoint / "new.png")
        assert result.code == 2 and f"{checkpoint} is a model or checkpoint" in result.err
        verify(checkpoint)

    def test_what_a_chat_has_not_read_comes_before_the_prompt(self):
        model, tokenizer = load("run")
        _, state = prefill(model, [tokenizer.encode("12 ")])
        state.save("s", model.fingerprint(), unread="fox")
        result = call("generate", "run", "es", *self.GREEDY, "--load-state", "s")
        assert result.out == expect("12 foxes", temperature=0, max_tokens=10)[6:] + "\n"

    def test_a_chain_of_states(self):
        for text in ("a", "b", "c"):
            load_state = ("--load-state", "s") if Path("s").exists() else ()
            argv = (text, *self.GREEDY, *load_state, "--save-state", "s")
            assert call("generate", "run", *argv).code == 0
        model, _ = load("run")
        assert State.load("s", model.fingerprint()).tokens.tolist() == [33]

    def test_a_state_of_another_model_is_refused(self):
        save(make_model(), "other", ByteTokenizer())
        assert call("generate", "other", "x", *self.GREEDY, "--save-state", "s").code == 0
        result = call("generate", "run", "x", "--load-state", "s")
        assert result.code == 2
        assert "belongs to model" in result.err

    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            (("a", "b", "--save-state", "s"), "give one prompt"),
            (("--load-state", "s"), "give a prompt"),
            (("--prompt-file", "empty.txt", "--load-state", "s"), "give a prompt"),
            (("a", "--load-state", "missing"), "no state file at missing"),
            (("a", "--load-state", "text.txt"), "text.txt is not a readable state file"),
            (("a", "--save-state", "no/where/s"), "no state can be written to no/where/s"),
            (("a", "--save-state", "."), "name a file in a folder that exists"),
            (("a", "--save-state", "text.txt"), "to text.txt: what is there is not a state"),
        ],
    )
    def test_refusals(self, argv, message):
        Path("empty.txt").touch()
        result = call("generate", "run", *argv, "--max-tokens", 2)
        assert result.code == 2
        assert message in result.err
        assert result.err.count("\n") == 1
