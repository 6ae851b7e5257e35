"""Estimates against the paper's table, published speeds, and memory that was measured."""

import dataclasses
import io
import math
from collections.abc import Iterator
from itertools import count
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from training_cases import Keeping

from receptance.config import PUBLISHED_SIZES, ModelConfig, published
from receptance.model import Model
from receptance.training import TrainOptions, devices
from receptance.training.devices import (
    DEVICES,
    Device,
    by_torch_name,
    find_device,
    mfu,
    peak_flops,
    this_machine,
)
from receptance.training.estimate import estimate, memory, show
from receptance.training.recipes import load_recipe

PILE_TOKENS = 332_076_810_240
# The paper's table 2: parameters, and FLOPs of a forward pass per token.
TABLE_2 = {
    "169m": (169_342_464, 2.613e8),
    "430m": (430_397_440, 7.573e8),
    "1.5b": (1_515_106_304, 2.823e9),
    "3b": (2_984_627_200, 5.710e9),
    "7b": (7_392_649_216, 1.437e10),
    "14b": (14_148_597_760, 2.778e10),
}


def options(name: str) -> TrainOptions:
    names = {f.name for f in dataclasses.fields(TrainOptions)}
    return TrainOptions(**{k: v for k, v in load_recipe(name).items() if k in names})


def shown(found) -> str:
    console = Console(file=io.StringIO(), width=120)
    show(console, found)
    return console.file.getvalue()


class TestPublishedSizes:
    @pytest.mark.parametrize("name", TABLE_2)
    def test_parameters_and_flops(self, name):
        found = estimate(published(name), options(name), device_name="h100")
        parameters, forward = TABLE_2[name]
        assert found.config.num_parameters == parameters
        assert found.tokens == PILE_TOKENS
        assert found.flops / found.tokens == pytest.approx(3 * forward, rel=1e-3)

    def test_the_table_of_14b(self):
        """With what RWKV-LM's README reports of 64 A100: 114,000 tokens/s, a share of 0.476."""
        found = estimate(
            published("14b"),
            options("14b"),
            ranks=64,
            sharded=True,
            device_name="a100-80g",
            utilization=0.476,
        )
        assert found.tokens_per_second == pytest.approx(114e3, rel=0.01)
        assert found.days == pytest.approx(332.08e9 / 114e3 / 86400, rel=0.01)
        text = shown(found)
        for words in (
            "14,148,597,760 (40 layers of 5120, vocabulary 50,277)",
            "2.77e+22 (8.333e+10 per token",
            "2,533,545 of 131,072 tokens",
            "332,076,810,240",
            "33.7 days on 64 × a100-80g",
            "(2 × 1,024 tokens)",
        ):
            assert words in text
        assert "does not fit" not in text

    def test_what_is_offloaded_is_not_on_the_device(self):
        on, off = (
            estimate(
                published("14b"),
                options("14b"),
                ranks=8,
                sharded=True,
                offload=offload,
                device_name="rtx-4090",
            )
            for offload in (False, True)
        )
        shares = 16 * 14_148_597_760 / 8
        assert off.memory.total == pytest.approx(on.memory.total - shares)
        assert off.fits and not on.fits

    def test_the_recipes_of_single_gpus(self):
        found = estimate(published("169m"), options("one-gpu"), device_name="rtx-4090")
        assert found.days == pytest.approx(1, rel=0.05)
        assert found.fits

    @pytest.mark.parametrize(
        ("name", "ranks"), [("169m", 1), ("430m", 1), ("1.5b", 1), ("3b", 8), ("7b", 8), ("14b", 8)]
    )
    def test_the_recipes_fit(self, name, ranks):
        sharded = load_recipe(name).get("parallel") == "fsdp"
        found = estimate(
            published(name), options(name), ranks=ranks, sharded=sharded, device_name="a100-80g"
        )
        assert found.fits

    def test_14b_on_one_device_does_not(self):
        found = estimate(published("14b"), options("14b"), device_name="h200")
        assert not found.fits
        assert "does not fit into the 141.00 GB of h200" in shown(found)


def bytes_kept(
    model: Model, batch: int, time: int, dtype: torch.dtype, *, recomputing: bool = True
) -> int:
    """What a forward pass keeps for the backward pass beside the parameters, each storage once."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, (batch, time), generator=generator)
    with Keeping(recomputing) as keeping:
        features, _ = model.features(tokens, dtype=dtype)
    assert features.requires_grad
    for address in own & keeping.kept.keys():
        del keeping.kept[address]
    return keeping.nbytes


class TestMemory:
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize(
        ("width", "layers", "ffn", "batch", "time"),
        [(64, 3, 0, 2, 128), (32, 1, 0, 1, 300), (64, 2, 96, 3, 64), (128, 5, 0, 1, 40)],
    )
    def test_what_a_forward_pass_keeps(self, dtype, width, layers, ffn, batch, time):
        config = ModelConfig(vocab_size=50, width=width, num_layers=layers, ffn_width=ffn)
        measured = bytes_kept(Model(config).train(), batch, time, getattr(torch, dtype))
        found = memory(config, TrainOptions(dtype=dtype), (batch, time))
        assert found.activations + found.weights == pytest.approx(measured, rel=0.05)

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize(
        ("width", "layers", "ffn", "batch", "time"), [(128, 4, 0, 2, 512), (192, 4, 256, 1, 400)]
    )
    def test_what_rwkv_7_keeps(self, dtype, width, layers, ffn, batch, time):
        """The first layer mixes no other layer's value into its own, and keeps a little less."""
        config = ModelConfig(
            version=7, vocab_size=50, width=width, num_layers=layers, ffn_width=ffn
        )
        measured = bytes_kept(Model(config).train(), batch, time, getattr(torch, dtype))
        found = memory(config, TrainOptions(dtype=dtype), (batch, time))
        assert found.activations + found.weights == pytest.approx(measured, rel=0.05)

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_with_recomputation(self, dtype):
        """The inputs of the blocks, measured, and what one block keeps while it is computed again:
        the difference that another layer makes without recomputation."""
        config = ModelConfig(vocab_size=50, width=64, num_layers=6)
        model = Model(config).train()
        model.recompute = True
        inputs = bytes_kept(model, 2, 128, getattr(torch, dtype))
        two, one = (
            bytes_kept(
                Model(dataclasses.replace(config, num_layers=n)).train(),
                2,
                128,
                getattr(torch, dtype),
                recomputing=False,
            )
            for n in (2, 1)
        )
        found = memory(config, TrainOptions(dtype=dtype, recompute=True), (2, 128))
        measured = inputs + two - one
        assert found.activations + found.weights == pytest.approx(measured, rel=0.1)

    @given(
        micro=st.integers(1, 16),
        chunk=st.sampled_from([0, 64, 128]),
        context=st.sampled_from([128, 256, 1024]),
        ranks=st.sampled_from([1, 2, 4]),
    )
    def test_only_a_piece_is_in_memory(self, micro, chunk, context, ranks):
        config = ModelConfig(vocab_size=100, width=64, num_layers=3)
        given = TrainOptions(batch=16, micro_batch=micro, chunk=chunk, context=context)
        found = estimate(config, given, ranks=ranks, device_name="t4")
        piece = min(micro, 16 // ranks), min(chunk or context, context)
        assert found.positions == piece
        assert found.memory == memory(config, given, piece)

    def test_context_ranks_share_a_row(self):
        config = ModelConfig(vocab_size=100, width=64, num_layers=3)
        given = TrainOptions(batch=2, context=1000)
        found = estimate(config, given, ranks=8, context_ranks=4, device_name="t4")
        assert found.positions == (1, 250)

    def test_masters_gradients_and_moments(self):
        config = published("7b")
        whole, share = (memory(config, options("7b"), (1, 1), shares=n) for n in (1, 8))
        for name, size in (("parameters", 4), ("gradients", 4), ("moments", 8)):
            assert getattr(whole, name) == size * config.num_parameters
            assert getattr(share, name) == size * config.num_parameters / 8
        assert whole.total == pytest.approx(sum(dataclasses.asdict(whole).values()))

    @pytest.mark.parametrize("shares", [1, 8])
    def test_14b_by_hand(self, shares):
        """Two rows of 1,024 in bfloat16, each block's inputs kept, and one block at a time."""
        vocabulary, width, hidden, positions = 50277, 5120, 20480, 2048
        matrices = 5 * width**2 + 2 * width * hidden
        block = 2 * (18 * width + 2 * hidden) + 12 * width / 16
        found = memory(published("14b"), options("14b"), (2, 1024), shares=shares)
        # Embedding and head are gathered in float32 together with two blocks in bfloat16.
        gathered = 4 * 2 * vocabulary * width + 2 * 2 * matrices
        assert found.weights == (gathered if shares > 1 else 2 * matrices)
        assert found.activations == positions * (40 * 2 * width + block + 2 * 2 * width)
        # 2**24 logits: three copies in float32 and one in bfloat16; a narrow head; two gradients.
        head = 14 * 2**24 + 2 * vocabulary * width + 2 * 4 * vocabulary * width
        assert found.head == head + 2 * positions * width

    def test_the_head_in_float32_by_hand(self):
        """Logits and their errors, the gradients of both ends, and that of what the head reads."""
        config = ModelConfig(vocab_size=100, width=64, num_layers=1)
        found = memory(config, TrainOptions(), (2, 8))
        assert found.head == 2 * 4 * 1600 + 2 * 4 * 6400 + 4 * 16 * 64
        assert found.weights == 0

    def test_longer_contexts_in_chunks_cost_no_more(self):
        found = [
            estimate(published("1.5b"), options(f"context-{n}"), device_name="h100").memory.total
            for n in (2048, 4096, 8192)
        ]
        assert found[0] == found[1] == found[2]

    def test_a_block_in_bfloat16(self):
        """By hand: 14 or 26 vectors of 2 bytes, and 12 bytes for 16 positions of a channel."""
        config = ModelConfig(vocab_size=9, width=32, num_layers=1)
        kept = config.architecture.kept_per_position
        assert kept(config, 2, inputs=False) == 32 * (14 * 2 + 12 / 16)
        assert kept(config, 2, inputs=True) == 32 * (26 * 2 + 12 / 16)


class TestTime:
    def test_a_limit_in_minutes(self):
        config = ModelConfig(vocab_size=2048, width=256, num_layers=4)
        given = TrainOptions(minutes=10, batch=4, context=256)
        found = estimate(config, given, device_name="t4", utilization=0.1)
        per_second = 65e12 * 0.1 / config.training_flops_per_token
        assert found.steps == math.ceil(600 * per_second / 1024)
        assert found.days == pytest.approx(10 / 60 / 24, rel=1e-3)
        assert "10.0 minutes on 1 × t4" in shown(found)
        fewer = estimate(config, dataclasses.replace(given, steps=3), device_name="t4")
        assert fewer.steps == 3

    def test_more_ranks_take_less(self):
        one, eight = (
            estimate(published("169m"), options("169m"), ranks=n, device_name="h100")
            for n in (1, 8)
        )
        assert one.days == pytest.approx(8 * eight.days)
        assert one.tokens == eight.tokens

    @pytest.mark.parametrize(
        ("wrong", "refusal"),
        [
            ({"ranks": 0}, "ranks is 0"),
            ({"ranks": 129}, "ranks is 129; it must be between 1 and the batch"),
            ({"ranks": 8, "context_ranks": 3}, "context_ranks is 3; it must divide the 8"),
            ({"utilization": 0.0}, "utilization is 0"),
            ({"utilization": 1.5}, "utilization is 1.5; it must be over 0 and at most 1"),
            ({"device_name": "h1000"}, r"unknown device 'h1000'; did you mean h100\?"),
        ],
    )
    def test_refusals(self, wrong, refusal):
        with pytest.raises(ValueError, match=refusal):
            estimate(published("169m"), options("169m"), **{"device_name": "h100"} | wrong)


class TestDevices:
    @pytest.mark.parametrize(
        ("torch_name", "name"),
        [
            ("NVIDIA H200", "h200"),
            ("NVIDIA H100 80GB HBM3", "h100"),
            ("NVIDIA H100 PCIe", "h100-pcie"),
            ("NVIDIA A100-SXM4-80GB", "a100-80g"),
            ("NVIDIA A100 80GB PCIe", "a100-80g"),
            ("NVIDIA A100-SXM4-40GB", "a100-40g"),
            ("NVIDIA L4", "l4"),
            ("NVIDIA L40S", "l40s"),
            ("NVIDIA GeForce RTX 4090", "rtx-4090"),
            ("NVIDIA GeForce RTX 3090", "rtx-3090"),
            ("Tesla V100-SXM2-32GB", "v100"),
            ("Tesla T4", "t4"),
        ],
    )
    def test_names(self, torch_name, name):
        assert by_torch_name(torch_name) == DEVICES[name] == find_device(name)

    @pytest.mark.parametrize(
        "torch_name",
        ["NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA L40"],
    )
    def test_a_variant_is_not_taken_for_the_device(self, torch_name):
        assert by_torch_name(torch_name) is None

    def test_a_gpu_is_looked_up(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
        assert peak_flops("cuda:1") == 989e12

    @pytest.fixture
    def _unmeasured(self) -> Iterator[None]:
        devices._measured.cache_clear()
        yield
        devices._measured.cache_clear()

    @pytest.mark.usefixtures("_unmeasured")
    def test_a_cpu_is_measured_once(self, monkeypatch):
        """By a clock that goes on by a millisecond whenever somebody looks at it."""
        looks = count()
        clock = SimpleNamespace(perf_counter=lambda: next(looks) / 1000)
        monkeypatch.setattr(devices, "time", clock)
        monkeypatch.setattr(devices, "_MEASURING_SECONDS", 0.02)
        found = peak_flops("cpu")
        assert found == pytest.approx(2 * 512**3 * 1000)
        measured = next(looks)
        assert peak_flops(torch.device("cpu")) == found
        if not torch.cuda.is_available():
            here = this_machine()
            assert here == Device("this CPU", found, here.memory) == find_device("this-machine")
            assert here.memory > 1e8
        assert next(looks) == measured + 1

    @pytest.mark.parametrize(
        ("speed", "size", "count", "share"),
        [(106e3, "1.5b", 8, 0.36), (114e3, "14b", 64, 0.476)],
    )
    def test_utilization_of_rwkv_lm(self, speed, size, count, share):
        """Speeds from its README, on A100s; the paper's FLOPs."""
        assert mfu(speed, published(size), count * 312e12) == pytest.approx(share, abs=0.002)

    @given(st.sampled_from([*PUBLISHED_SIZES]), st.sampled_from([*DEVICES]), st.floats(0.01, 1))
    def test_mfu_is_the_inverse_of_the_estimate(self, size, device, share):
        found = estimate(published(size), TrainOptions(), device_name=device, utilization=share)
        assert mfu(found.tokens_per_second, found.config, found.device.flops) == pytest.approx(
            share
        )


class TestAdapters:
    def test_only_what_is_trained_has_gradients_and_moments(self):
        sizes, run = published("7b"), TrainOptions(batch=4, dtype="bfloat16")
        whole = estimate(sizes, run, device_name="h100")
        small = estimate(sizes, run, device_name="h100", trained=10**6)
        assert (small.memory.gradients, small.memory.moments) == (4e6, 8e6)
        assert small.memory.parameters == whole.memory.parameters + 4e6
        assert small.memory.head < whole.memory.head
        assert small.flops == pytest.approx(2 / 3 * whole.flops)
        assert small.fits and not whole.fits
        assert "1,000,000" in shown(small)
