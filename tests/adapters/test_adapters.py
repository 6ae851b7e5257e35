"""Adapters: beside an untouched model, the only thing that trains, and files that know theirs."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import make_model, same_bits
from torch import Tensor
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from receptance.adapters import (
    ADAPTER_FILE,
    Adapter,
    LoRA,
    LoRAOptions,
    StateTuning,
    StateTuningOptions,
    load_adapter,
    make_adapter,
)
from receptance.inference.generation import Generation, prefill
from receptance.inference.sampling import Sampling
from receptance.model import Model
from receptance.tokenizer import ByteTokenizer

TOKENS = torch.randint(256, (2, 12), generator=torch.Generator().manual_seed(5))
KINDS = {"lora": LoRAOptions(rank=3, alpha=5.0), "state": StateTuningOptions()}
every_kind = pytest.mark.parametrize("kind", KINDS)


def random_adapter(model: Model, kind: str, *, seed: int = 7) -> Adapter:
    """An adapter that has learned something, in the model's dtype."""
    adapter = make_adapter(model, KINDS[kind], seed=seed).to(model.emb.weight.dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return adapter.eval()


def bits(model: Model) -> dict[str, Tensor]:
    return {name: x.clone() for name, x in model.state_dict().items()}


def loss_of(model: Model, adapter: Adapter, tokens: Tensor = TOKENS) -> Tensor:
    dtype = model.emb.weight.dtype
    logits, _ = model(tokens[:, :-1], adapter.initial_state(len(tokens), dtype))
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


# ---- what all kinds have in common --------------------------------------------------------------


@every_kind
def test_only_the_adapter_trains(kind):
    model = make_model()
    before = bits(model)
    adapter = make_adapter(model, KINDS[kind])
    start = [x.detach().clone() for x in adapter.parameters()]
    with adapter.attach(model):
        optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            loss_of(model, adapter).backward()
            optimizer.step()
        assert all(x.grad is None and not x.requires_grad for x in model.parameters())
    moved = [not torch.equal(*pair) for pair in zip(start, adapter.parameters(), strict=True)]
    assert all(moved)
    assert same_bits(bits(model), before)
    assert all(x.requires_grad for x in model.parameters())


@pytest.mark.parametrize(("kind", "rate", "share"), [("lora", 0.03, 0.4), ("state", 0.1, 0.8)])
def test_it_learns(kind, rate, share):
    """Each row's next tokens; a state can only make some likelier, whatever was read."""
    model = make_model()
    tokens = torch.tensor([[n, n + 1, 200 + n % 3, 210] for n in range(30, 46)])
    adapter = make_adapter(model, KINDS[kind])
    with adapter.attach(model):
        first = float(loss_of(model, adapter, tokens).detach())
        optimizer = torch.optim.Adam(adapter.parameters(), lr=rate)
        for _ in range(40):
            optimizer.zero_grad()
            loss_of(model, adapter, tokens).backward()
            optimizer.step()
        assert float(loss_of(model, adapter, tokens).detach()) < share * first


@every_kind
def test_parameters_are_plain_and_the_models_names_stay(kind):
    model = make_model()
    names = list(model.state_dict())
    adapter = make_adapter(model, KINDS[kind])
    with adapter.attach(model):
        assert list(model.state_dict()) == names
    assert all(type(x) is torch.nn.Parameter and x.is_leaf for x in adapter.parameters())
    assert {id(x) for x in adapter.tensors().values()} == {id(x) for x in adapter.parameters()}


@every_kind
def test_after_the_block_the_model_is_as_before(kind):
    model = make_model()
    model.head.weight.requires_grad_(False)
    plain = model(TOKENS)[0]
    with random_adapter(model, kind).attach(model) as adapter:
        assert not torch.equal(model(TOKENS, adapter.initial_state(2))[0], plain)
        with pytest.raises(ValueError, match="attached to a model already"):
            adapter.attach(model)
    assert torch.equal(model(TOKENS)[0], plain)
    assert not model.head.weight.requires_grad
    assert model.emb.weight.requires_grad


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_law_holds(kind, dtype):
    """Batched with others, cut in two, or alone and whole: the same."""
    model = make_model().to(dtype)
    prompts = [list(range(n)) for n in (9, 1, 5)]
    with random_adapter(model, kind).attach(model) as adapter:
        logits, state = prefill(model, prompts, adapter.initial_state(3))
        for row, prompt in enumerate(prompts):
            alone, _ = prefill(model, [prompt], adapter.initial_state(1))
            after = None
            for token in prompt:
                cut, after = prefill(model, [[token]], after or adapter.initial_state(1))
            bar = 1e-5 if dtype == torch.float32 else 0.1
            for other in (alone, cut):
                torch.testing.assert_close(logits[row], other[0], rtol=bar, atol=bar)
            assert state.tokens[row] == len(prompt)


@every_kind
def test_generating_in_a_batch_is_generating_alone(kind):
    model, tokenizer = make_model(), ByteTokenizer()

    def texts(prompts: list[str]) -> list[str]:
        written = [""] * len(prompts)
        start = adapter.initial_state(len(prompts))
        options = Sampling(temperature=0)
        for token in Generation(
            model, tokenizer, prompts, max_tokens=6, state=start, sampling=options
        ):
            written[token.row] += token.text
        return written

    with random_adapter(model, kind).attach(model) as adapter:
        assert texts(["a", "long one"]) == texts(["a"]) + texts(["long one"])


# ---- LoRA ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_new_lora_changes_no_bit(dtype):
    model = make_model().to(dtype)
    logits, state = model(TOKENS)
    with make_adapter(model, LoRAOptions(dropout=0.5)).attach(model):
        again, after = model(TOKENS)
    assert torch.equal(again, logits)
    assert same_bits(after.tensors, state.tensors)


def materialized(model: Model, lora: Adapter) -> dict[str, Tensor]:
    """W + (alpha / r) B A, as the paper has it."""
    pairs, weights = lora.tensors(), dict(model.named_parameters())
    for name in [n.removesuffix(".lora_A") for n in pairs if n.endswith(".lora_A")]:
        product = pairs[f"{name}.lora_B"] @ pairs[f"{name}.lora_A"]
        weights[f"{name}.weight"] = weights[f"{name}.weight"] + 5.0 / 3 * product
    return weights


def test_gradients_are_those_of_the_materialized_sum():
    model = make_model().double()
    lora = random_adapter(model, "lora")
    assert len(lora.tensors()) == 2 * 2 * 7
    logits = functional_call(model, materialized(model, lora), (TOKENS[:, :-1],))[0]
    loss = F.cross_entropy(logits.flatten(0, 1), TOKENS[:, 1:].flatten())
    wanted = torch.autograd.grad(loss, list(lora.parameters()))
    with lora.attach(model):
        got = torch.autograd.grad(loss_of(model, lora), list(lora.parameters()))
    torch.testing.assert_close(got, wanted)


def test_recomputing_gives_the_same_gradients():
    model = make_model()
    lora = random_adapter(model, "lora").train()
    lora.dropout = 0.3
    parameters = list(lora.parameters())
    with lora.attach(model):

        def gradients(run: Callable[[], Tensor]) -> tuple[Tensor, ...]:
            with torch.random.fork_rng():
                torch.manual_seed(1)
                return torch.autograd.grad(run().square().sum(), parameters)

        plain = gradients(lambda: model(TOKENS)[0])
        again = gradients(lambda: checkpoint(lambda: model(TOKENS)[0], use_reentrant=False))
        model.recompute = True
        by_blocks = gradients(lambda: model(TOKENS)[0])
    torch.testing.assert_close(again, plain)
    torch.testing.assert_close(by_blocks, plain)


def test_dropout_acts_in_training_only():
    model = make_model()
    lora = LoRA(model, LoRAOptions(dropout=0.5))
    torch.nn.init.ones_(lora.pairs[0].up.weight)
    with lora.attach(model):
        lora.train()
        assert not torch.equal(model(TOKENS)[0], model(TOKENS)[0])
        lora.eval()
        assert torch.equal(model(TOKENS)[0], model(TOKENS)[0])


def test_the_seed_decides_the_start():
    model = make_model()
    one, same, other = (dict(LoRA(model, LoRAOptions(), seed=s).tensors()) for s in (1, 1, 2))
    assert same_bits(one, same)
    assert not same_bits(one, other)


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        (("blocks.*.att.value",), ["blocks.0.att.value", "blocks.1.att.value"]),
        (("blocks.1.ffn.[kv]*",), ["blocks.1.ffn.key", "blocks.1.ffn.value"]),
        (("*.0.att.key", "*.0.att.k*"), ["blocks.0.att.key"]),
    ],
)
def test_targets(targets, names):
    assert LoRA(make_model(), LoRAOptions(targets=targets)).names == names


@pytest.mark.parametrize("target", ["head", "emb", "blocks.0.ln1", "blocks.9.*", "BLOCKS.*"])
def test_a_target_that_is_no_matrix_of_the_blocks(target):
    with pytest.raises(ValueError, match=r"fits no matrix of the blocks; those are blocks.0.att.k"):
        LoRA(make_model(), LoRAOptions(targets=("blocks.*", target)))


def test_merging_gives_the_same_model_in_new_tensors():
    model = make_model()
    before = bits(model)
    lora = random_adapter(model, "lora")
    with lora.attach(model):
        wanted = model(TOKENS)[0]
    merged = lora.merge(model)
    torch.testing.assert_close(merged(TOKENS)[0], wanted, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        for parameter in merged.parameters():
            parameter.zero_()
    assert same_bits(bits(model), before)


def test_merging_keeps_the_dtype_or_takes_the_one_asked_for():
    model = make_model().bfloat16()
    lora = random_adapter(model, "lora").float()
    wide = lora.merge(model, torch.float32)
    for merged, dtype in ((lora.merge(model), torch.bfloat16), (wide, torch.float32)):
        assert merged.emb.weight.dtype == dtype
        assert merged.blocks[0].att.time_decay.dtype == torch.float32
    with lora.attach(model):
        wanted = model(TOKENS, dtype=torch.float32)[0]
    torch.testing.assert_close(wide(TOKENS)[0], wanted, rtol=1e-4, atol=1e-4)


# ---- state tuning -------------------------------------------------------------------------------


def test_the_gradient_is_that_of_finite_differences():
    model = make_model(width=4).double()
    adapter = random_adapter(model, "state")
    loss_of(model, adapter).backward()
    for name, parameter in adapter.named_parameters():
        for index in ((0, 1), (1, 2)):
            ends = []
            for step in (1e-5, -1e-5):
                with torch.no_grad():
                    kept = parameter[index].clone()
                    parameter[index] += step
                    ends.append(loss_of(model, adapter))
                    parameter[index] = kept
            assert parameter.grad is not None
            assert abs(parameter.grad[index]) > 1e-8, name
            slope = (ends[0] - ends[1]) / 2e-5
            torch.testing.assert_close(parameter.grad[index], slope, rtol=1e-5, atol=1e-10)


def test_the_state_is_that_of_a_token_that_was_read():
    """With e^key weight and the value as its average: what wkv makes of one token."""
    model = make_model()
    _, read = model(TOKENS[:, :1])
    adapter = StateTuning(model, StateTuningOptions())
    with torch.no_grad():
        adapter.time_shift.copy_(read.tensors["time_shift"][:, 0])
        adapter.channel_shift.copy_(read.tensors["channel_shift"][:, 0])
        adapter.value.copy_((read.tensors["numerator"] / read.tensors["denominator"])[:, 0])
        adapter.key.copy_((read.tensors["exponent"] + read.tensors["denominator"].log())[:, 0])
    got, _ = model(TOKENS[:1, 1:], adapter.initial_state())
    torch.testing.assert_close(got, model(TOKENS[:1])[0][:, 1:], rtol=1e-4, atol=1e-4)


def test_a_new_one_has_little_effect():
    model = make_model()
    plain = model(TOKENS)[0]
    with make_adapter(model, StateTuningOptions()).attach(model) as adapter:
        change = (model(TOKENS, adapter.initial_state(2))[0] - plain).abs().max()
    assert 0 < change < 0.1 * plain.abs().max()


def test_a_state_is_not_merged():
    model = make_model()
    with pytest.raises(ValueError, match="'state' is no part of the weights and cannot be merged"):
        random_adapter(model, "state").merge(model)


# ---- files --------------------------------------------------------------------------------------


@every_kind
def test_what_is_saved_comes_back(kind, tmp_path):
    model = make_model()
    adapter = random_adapter(model, kind)
    adapter.save(tmp_path / ADAPTER_FILE, model.fingerprint())
    assert [x.name for x in tmp_path.iterdir()] == [ADAPTER_FILE]
    for path in (tmp_path, tmp_path / ADAPTER_FILE, str(tmp_path)):
        again = load_adapter(path, model)
        assert same_bits(dict(again.tensors()), dict(adapter.tensors()))
        assert again.options == adapter.options
        assert not again.training
    # The same weights in another dtype are the same model.
    assert load_adapter(tmp_path, make_model().bfloat16()).options == adapter.options


def test_the_file_says_what_it_is(tmp_path):
    model = make_model()
    random_adapter(model, "lora").save(tmp_path / "a", model.fingerprint())
    with safe_open(tmp_path / "a", framework="pt") as file:
        about = json.loads(file.metadata()["about"])
        assert "blocks.1.ffn.value.lora_B" in file.keys()  # noqa: SIM118
    options = json.loads(about.pop("options"))
    assert (options["rank"], options["alpha"]) == (3, 5.0)
    assert options["targets"] == ["blocks.*.att.*", "blocks.*.ffn.*"]
    assert about == {
        "format": "receptance-adapter",
        "format_version": "1",
        "kind": "lora",
        "model": model.fingerprint(),
    }


def test_another_model_is_refused_naming_both(tmp_path):
    model, other = make_model(), make_model(seed=2)
    random_adapter(model, "lora").save(tmp_path / "a", model.fingerprint())
    with pytest.raises(ValueError) as caught:
        load_adapter(tmp_path / "a", other)
    assert model.fingerprint()[:12] in str(caught.value)
    assert other.fingerprint()[:12] in str(caught.value)


@every_kind
def test_attaching_to_other_sizes_is_refused(kind):
    adapter = random_adapter(make_model(), kind)
    with pytest.raises(ValueError, match=r"no matrix blocks.0.att.key|is for 2 layers of width 16"):
        adapter.attach(make_model(width=8))


def change(**about: str | None) -> Callable[[Path], None]:
    """Write the file again with other metadata."""

    def write(path: Path) -> None:
        with safe_open(path, framework="pt") as file:
            fields = json.loads(file.metadata()["about"]) | about
        kept = {name: x for name, x in fields.items() if x is not None}
        save_file(load_file(path), path, metadata={"about": json.dumps(kept)})

    return write


def drop_a_tensor(path: Path) -> None:
    with safe_open(path, framework="pt") as file:
        about = file.metadata()
    save_file(dict(sorted(load_file(path).items())[1:]), path, metadata=about)


DAMAGES = {
    "missing": (Path.unlink, "no adapter at"),
    "text": (lambda path: path.write_text("hello"), "not a readable adapter file"),
    "empty": (lambda path: path.write_bytes(b""), "not a readable adapter file"),
    "no metadata": (lambda path: save_file(load_file(path), path), "is not a Receptance adapter"),
    "no model": (change(model=None), "is not a Receptance adapter of format 1"),
    "version": (change(format_version="2"), "is not a Receptance adapter of format 1"),
    "kind": (change(kind="prefix"), "of kind 'prefix'; this release reads lora and state"),
    "rank": (change(options='{"rank": 0}'), "damaged options: rank is 0"),
    "rank text": (change(options='{"rank": "x"}'), "damaged options"),
    "field": (change(options='{"r": 1}'), "damaged options"),
    "json": (change(options="{"), "damaged options"),
    "list": (change(options="[]"), "damaged options"),
    "target": (change(options='{"targets": ["x"]}'), "target 'x' fits no matrix"),
    "sizes": (change(options='{"rank": 4}'), "does not hold the tensors that its options ask for"),
    "tensor": (drop_a_tensor, "does not hold the tensors that its options ask for"),
}


@pytest.mark.parametrize(("damage", "words"), DAMAGES.values(), ids=DAMAGES)
def test_damaged_files_are_refused_in_one_line(damage, words, tmp_path):
    model, path = make_model(), tmp_path / "a"
    random_adapter(model, "lora").save(path, model.fingerprint())
    damage(path)
    with pytest.raises(ValueError) as caught:
        load_adapter(path, model)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_truncated_files_are_refused(tmp_path):
    model, path, cut = make_model(), tmp_path / "a", tmp_path / "cut"
    random_adapter(model, "state").save(path, model.fingerprint())
    size = path.stat().st_size
    for length in range(0, size, 97):
        shutil.copy(path, cut)
        with cut.open("r+b") as file:
            file.truncate(length)
        with pytest.raises(ValueError, match="not a readable adapter file"):
            load_adapter(cut, model)


def test_a_file_that_cannot_be_written(tmp_path):
    with pytest.raises(ValueError, match=r"cannot write .*nowhere/a: No such"):
        random_adapter(make_model(), "lora").save(tmp_path / "nowhere" / "a", "x")


def test_only_an_adapter_is_replaced(tmp_path):
    model, path = make_model(), tmp_path / "a"
    adapter = random_adapter(model, "lora")
    for other in ("text", "weights", "state", "list", "folder", "link", "pipe"):
        something_else(other, path, model)
        before = path.read_bytes() if path.is_file() else [*tmp_path.iterdir()]
        with pytest.raises(ValueError, match="what is there is not an adapter; choose another"):
            adapter.save(path, model.fingerprint())
        assert before == (path.read_bytes() if path.is_file() else [*tmp_path.iterdir()])
        path.rmdir() if path.is_dir() else path.unlink()
    random_adapter(model, "state").save(path, model.fingerprint())
    adapter.save(path, model.fingerprint())
    assert load_adapter(path, model).kind == "lora"
    assert [*tmp_path.iterdir()] == [path]


def something_else(kind: str, path: Path, model: Model) -> None:
    """Put something at a path that is not an adapter."""
    if kind == "text":
        path.write_text("hello")
    elif kind == "weights":
        save_file(model.state_dict(), path)
    elif kind == "state":
        model.empty_state(1).save(path, model.fingerprint())
    elif kind == "list":
        save_file({"x": torch.zeros(1)}, path, metadata={"about": "[]"})
    elif kind == "folder":
        path.mkdir()
    elif kind == "link":
        path.symlink_to("nowhere")
    else:
        os.mkfifo(path)


def test_a_state_belongs_to_the_weights_that_made_it():
    model = make_model()
    own = model.fingerprint()
    one, other = (random_adapter(model, "lora", seed=n).fingerprint(own) for n in (1, 2))
    assert len({one, other, own}) == 3
    assert random_adapter(model, "state").fingerprint(own) == own


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: LoRAOptions(rank=0), "rank is 0; it must be at least 1"),
        (lambda: LoRAOptions(alpha=0), "alpha is 0; it must be over 0"),
        (lambda: LoRAOptions(alpha=float("nan")), "alpha is nan"),
        (lambda: LoRAOptions(dropout=1), "dropout is 1; it must be at least 0 and less than 1"),
        (lambda: LoRAOptions(targets=()), "no targets; name at least one"),
        (lambda: StateTuningOptions(start_key=float("inf")), "start_key is inf"),
    ],
)
def test_options_are_checked(make, words):
    with pytest.raises(ValueError, match=words):
        make()
