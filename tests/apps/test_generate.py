"""receptance generate: what it prints, and states on disk."""

import io
from pathlib import Path

import pytest
import torch
from command import call
from tiny import make_model, small_bpe

from receptance import load, save
from receptance.apps.generate import Options, main
from receptance.inference.generation import Generation, generate, prefill
from receptance.inference.sampling import Sampling
from receptance.state import State
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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtype(dtype):
    result = call("generate", "run", "12", "--max-tokens", 5, "--dtype", dtype)
    assert (result.code, result.err) == (0, "")
    assert len(result.out) > len("12\n")


def test_a_pth_with_a_tokenizer():
    torch.save(make_model(300).state_dict(), "model.pth")
    small_bpe().save(Path("elsewhere"))
    result = call("generate", "model.pth", "12 little", "--max-tokens", 5)
    assert result.code == 2
    assert "--tokenizer" in result.err
    argv = ("model.pth", "12 little", "--max-tokens", 5, "--tokenizer", "elsewhere/tokenizer.json")
    assert call("generate", *argv).code == 0


def test_a_damaged_newest_checkpoint_is_passed_over_loudly():
    Path("run/step-00000012/config.json").unlink()
    result = call("generate", "run", "12", "--max-tokens", 5)
    assert result.code == 0
    assert result.err.startswith("receptance: warning: passed over a damaged checkpoint")
    assert "step-00000012/config.json is missing" in result.err
    assert result.err.count("\n") == 1


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

    def test_a_chain_of_states(self):
        for text in ("a", "b", "c"):
            load_state = ("--load-state", "s") if Path("s").exists() else ()
            argv = (text, *self.GREEDY, *load_state, "--save-state", "s")
            assert call("generate", "run", *argv).code == 0
        model, _ = load("run")
        assert State.load("s", model.fingerprint()).tokens.tolist() == [33]

    def test_a_state_of_another_model_is_refused(self):
        save(make_model(), "other", ByteTokenizer())
        call("generate", "other", "x", *self.GREEDY, "--save-state", "s")
        result = call("generate", "run", "x", "--load-state", "s")
        assert result.code == 2
        assert "belongs to model" in result.err

    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            (("a", "b", "--save-state", "s"), "give one prompt"),
            (("--load-state", "s"), "give a prompt"),
            (("a", "--load-state", "missing"), "no state file at missing"),
            (("a", "--load-state", "text.txt"), "text.txt is not a readable state file"),
            (("a", "--save-state", "no/where/s"), "no state can be written to no/where/s"),
            (("a", "--save-state", "."), "name a file in a folder that exists"),
        ],
    )
    def test_refusals(self, argv, message):
        result = call("generate", "run", *argv, "--max-tokens", 2)
        assert result.code == 2
        assert message in result.err
        assert result.err.count("\n") == 1
