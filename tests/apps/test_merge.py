"""Adapters through the commands: receptance merge, and --adapter of generate and chat."""

import builtins
import shutil
from pathlib import Path

import pytest
import torch
from command import call
from tiny import make_model

from receptance import Model, load, save
from receptance.adapters import (
    ADAPTER_FILE,
    LoRAOptions,
    StateTuningOptions,
    load_adapter,
    make_adapter,
)
from receptance.apps.chat import Chat, Options
from receptance.apps.merge import _check
from receptance.engine.adapted import AdaptedModel
from receptance.inference.generation import Generation, generate, prefill
from receptance.inference.sampling import Sampling
from receptance.tokenizer import ByteTokenizer

BYTES = ByteTokenizer()
every_kind = pytest.mark.parametrize("kind", ["lora", "state"])
GREEDY = ("--temperature", 0, "--max-tokens", 8)


def write_adapter(model: Model, kind: str, scale: float = 0.3) -> None:
    options = LoRAOptions(rank=2) if kind == "lora" else StateTuningOptions()
    adapter = make_adapter(model, options)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    Path(kind).mkdir()
    adapter.save(Path(kind, ADAPTER_FILE), model.fingerprint())


@pytest.fixture(autouse=True)
def model(tmp_path, monkeypatch) -> Model:
    """A model at `model`, and an adapter of each kind beside it."""
    monkeypatch.chdir(tmp_path)
    model = make_model()
    save(model, "model", BYTES)
    for kind in ("lora", "state"):
        write_adapter(model, kind)
    return model


class TestMerge:
    def test_the_merged_model_needs_no_adapter(self):
        result = call("merge", "model", "lora", "--out", "merged")
        assert (result.code, result.err) == (0, "")
        assert "logits of the merged model against model and adapter: " in result.out
        assert float(result.out.split("adapter: ")[1].split()[0]) < 1e-5
        alone = call("generate", "merged", "a fox", *GREEDY).out
        assert alone == call("generate", "model", "a fox", *GREEDY, "--adapter", "lora").out
        assert alone != call("generate", "model", "a fox", *GREEDY).out

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_dtype(self, dtype, model):
        save(model.bfloat16(), "narrow", BYTES)
        argv = ("narrow", f"lora/{ADAPTER_FILE}", "--out", "merged", "--dtype", dtype)
        assert call("merge", *argv).code == 0
        assert load("merged")[0].emb.weight.dtype == getattr(torch, dtype)

    def test_a_change_that_bfloat16_would_lose(self, model):
        model.bfloat16()
        save(model, "narrow", BYTES)
        shutil.rmtree("lora")
        write_adapter(model, "lora", scale=0.003)
        result = call("merge", "narrow", "lora", "--out", "merged")
        assert result.code == 2
        assert "bfloat16 is too coarse for these changes; merge with --dtype float32" in result.err
        assert result.err.count("\n") == 1
        assert not Path("merged").exists()
        argv = ("narrow", "lora", "--out", "merged", "--dtype", "float32")
        assert call("merge", *argv).code == 0

    def test_a_difference_in_float32_is_an_error(self, capsys):
        wanted = torch.tensor([1.0, 2.0])
        _check(wanted, wanted + 1e-4, wanted, torch.float32)
        for wrong in (3e-4, torch.nan):
            with pytest.raises(ValueError, match=r"more than 1\.0e-04; nothing was kept"):
                _check(wanted, wanted + wrong, wanted, torch.float32)
        assert capsys.readouterr().out.count("logits of the merged model") == 3

    @pytest.mark.parametrize(
        ("argv", "words"),
        [
            (("model", "state", "--out", "merged"), "kind 'state' is no part of the weights"),
            (("model", "lora", "--out", "model"), "model exists; give another name with --out"),
            (("model", "nowhere", "--out", "merged"), "no adapter at nowhere"),
            (("other", "lora", "--out", "merged"), "was trained on model"),
        ],
    )
    def test_refusals(self, argv, words, model):
        save(make_model(seed=2), "other", BYTES)
        files = sorted(p.name for p in Path().rglob("*"))
        result = call("merge", *argv)
        assert result.code == 2
        assert words in result.err
        assert result.err.count("\n") == 1
        assert sorted(p.name for p in Path().rglob("*")) == files
        assert load("model")[0].fingerprint() == model.fingerprint()


class TestGenerate:
    @every_kind
    def test_with_an_adapter(self, kind, model):
        prompts = ("a fox", "b")
        with load_adapter(kind, model).attach(model) as adapter:
            start = adapter.initial_state(2)
            texts = generate(model, BYTES, list(prompts), temperature=0, max_tokens=8, state=start)
        result = call("generate", "model", *prompts, *GREEDY, "--adapter", kind)
        assert result.code == 0
        wanted = [p + text for p, text in zip(prompts, texts, strict=True)]
        assert result.out == "".join(f"--- {n} ---\n{x}\n" for n, x in enumerate(wanted, start=1))
        assert result.out != call("generate", "model", *prompts, *GREEDY).out

    @every_kind
    def test_states_go_on_with_the_same_adapter(self, kind, model):
        argv = ("--temperature", 0, "--max-tokens", 4, "--adapter", kind)
        assert call("generate", "model", "a fox", *argv, "--save-state", "s").code == 0
        second = call("generate", "model", "b", *argv, "--load-state", "s")
        with load_adapter(kind, model).attach(model) as adapter:
            start, greedy = adapter.initial_state(), Sampling(temperature=0)
            first = Generation(model, BYTES, ["a fox"], sampling=greedy, max_tokens=4, state=start)
            ids = BYTES.encode("a fox") + [token.id for token in first] + BYTES.encode("b")
            whole = generate(model, BYTES, [ids], temperature=0, max_tokens=4, state=start)
        assert second.out == f"b{whole[0]}\n"
        without = call("generate", "model", "b", *GREEDY, "--load-state", "s")
        assert without.code == (2 if kind == "lora" else 0)

    def test_an_adapter_of_another_model(self):
        save(make_model(seed=2), "other", BYTES)
        result = call("generate", "other", "a", "--adapter", "lora")
        assert result.code == 2
        assert "give the model that it was trained on" in result.err


class TestChat:
    def test_a_conversation_begins_in_the_tuned_state(self, model):
        adapter = load_adapter("state", model)
        chat = Chat(AdaptedModel(model, adapter), BYTES, Options(model="", max_tokens=6))
        for _ in range(2):
            reply = "".join(chat.answer("hi"))
            text = BYTES.encode(f"User: hi\n\nAssistant:{reply.rstrip()}\n\n")
            _, wanted = prefill(model, [text], adapter.initial_state())
            assert chat.history.state is not None
            for name, tensor in wanted.tensors.items():
                torch.testing.assert_close(
                    chat.history.state.tensors[name], tensor, rtol=1e-4, atol=1e-4
                )
            chat.reset()
        adapter.detach()

    @every_kind
    def test_through_the_command(self, kind, monkeypatch):
        def talk(*argv: object) -> str:
            lines = iter(["hi", "/save s", "/load s", "more"])

            def ask(_: str) -> str:
                if (line := next(lines, None)) is None:
                    raise EOFError
                return line

            monkeypatch.setattr(builtins, "input", ask)
            result = call("chat", "model", "--max-tokens", 8, "--template", "raven", *argv)
            assert (result.code, result.err) == (0, "")
            return result.out

        out = talk("--adapter", kind)
        assert out.count("\nAlice:") == 2
        assert "(load s: done)" in out
        assert out != talk()
