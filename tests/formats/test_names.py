"""The name tables, and what infer_config makes of any set of tensors."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from receptance.config import PUBLISHED_SIZES, ModelConfig
from receptance.formats.names import conform, infer_config, tensor_shapes
from receptance.formats.names_hf import from_hf, is_hf, to_hf, to_official

CONFIG = ModelConfig(vocab_size=19, width=8, num_layers=3, ffn_width=24)
SHAPES = tensor_shapes(CONFIG)

sizes = st.integers(1, 40)


@given(v=sizes, c=sizes, layers=st.integers(1, 5), f=sizes)
def test_the_configuration_is_read_back_from_the_shapes(v: int, c: int, layers: int, f: int):
    config = ModelConfig(vocab_size=v, width=c, num_layers=layers, ffn_width=f)
    shapes = tensor_shapes(config)
    assert len(shapes) == 18 * layers + 6
    assert infer_config(shapes) == config


@pytest.mark.parametrize("name", PUBLISHED_SIZES)
def test_published_sizes_have_as_many_parameters_as_their_tensors(name: str):
    config = PUBLISHED_SIZES[name]
    counts = [torch.Size(shape).numel() for shape in tensor_shapes(config).values()]
    assert sum(counts) == config.num_parameters


def test_names_and_shapes_are_those_of_transformers():
    from transformers import RwkvConfig, RwkvForCausalLM

    theirs = RwkvForCausalLM(
        RwkvConfig(vocab_size=19, hidden_size=8, num_hidden_layers=3, intermediate_size=24)
    ).state_dict()
    assert {to_hf(name): shape for name, shape in SHAPES.items()} == {
        name: tuple(tensor.shape) for name, tensor in theirs.items()
    }
    assert [from_hf(to_hf(name)) for name in SHAPES] == list(SHAPES)
    assert is_hf(theirs) and not is_hf(SHAPES)


def test_two_names_for_one_tensor_are_refused():
    both = {"rwkv.embeddings.weight": torch.zeros(1), "emb.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"two names each: 'emb.weight'"):
        to_official(both)


@given(name=st.sampled_from(sorted(SHAPES)))
def test_any_missing_tensor_is_named(name: str):
    with pytest.raises(ValueError, match=f"missing are '{name}'"):
        infer_config({other: shape for other, shape in SHAPES.items() if other != name})


@given(name=st.sampled_from(sorted(SHAPES)), extra=st.integers(1, 3))
def test_any_wrong_shape_is_told_apart(name: str, extra: int):
    shape = SHAPES[name]
    told = "RWKV-[35]" if name.endswith("time_decay") else r"has the shape \(.*must be \("
    with pytest.raises(ValueError, match=told):
        infer_config(SHAPES | {name: (*shape, extra)})
    # One matrix of another size: some tensor no longer fits, whichever decided the sizes.
    if name not in ("emb.weight", "blocks.0.ffn.key.weight"):
        with pytest.raises(ValueError, match=rf"{name} has the shape"):
            infer_config(SHAPES | {name: (shape[0] + extra, *shape[1:])})


def test_squeezed_time_mix_is_taken_and_given_back_in_the_official_shape():
    tensors = {name: torch.ones(shape).squeeze() for name, shape in SHAPES.items()}
    config, official = conform(tensors, Path("some.pth"))
    assert config == CONFIG
    assert {name: tuple(tensor.shape) for name, tensor in official.items()} == SHAPES
    mix = "blocks.1.ffn.time_mix_k"
    assert official[mix].data_ptr() == tensors[mix].data_ptr()


def test_weights_that_are_not_floats_are_refused_by_name_of_file_and_tensor():
    tensors = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    tensors["head.weight"] = tensors["head.weight"].to(torch.int8)
    with pytest.raises(ValueError, match=r"^some.pth: head.weight is of type torch.int8"):
        conform(tensors, Path("some.pth"))


def block(*names: str) -> dict[str, tuple[int, ...]]:
    """A file with these tensors beside those that every version has."""
    common = {"emb.weight": (9, 8), "head.weight": (9, 8), "blocks.0.att.key.weight": (8, 8)}
    return common | {f"blocks.0.{name}": (8,) for name in names}


FOREIGN = {
    "RWKV-2 file": block("att.time_decay", "att.time_first", "att.time_mix"),
    "RWKV-3 file": block("att.time_first", "att.time_mix_k") | {"blocks.0.att.time_decay": (8, 1)},
    "a whole RWKV-5.0 model": block(
        "att.time_decay", "att.time_first", "att.ln_x.weight", "att.ln_x.bias"
    ),
    "a whole RWKV-5.2 model": block("att.time_faaaa", "att.ln_x.weight", "att.gate.weight")
    | {"blocks.0.att.time_decay": (2, 4)},
    "a whole RWKV-6 model": block(
        "att.time_maa_x", "att.time_maa_w1", "att.time_decay_w1", "att.ln_x.bias"
    ),
    "a whole RWKV-7 model": block("att.x_r", "att.w0", "att.a0", "att.r_k", "ffn.x_k"),
    "RWKV-8 file": block("att.x_r", "att.w0", "att.r_k", "ffn.enn.weight"),
    "RWKV-4a": SHAPES | {"blocks.2.tiny_q.weight": (8, 8), "blocks.2.tiny_mask": (8, 8)},
    "RWKV-4b": SHAPES | {"blocks.0.att.qq.weight": (8, 8), "blocks.0.att.time_mix_qq": (1, 1, 8)},
    "pre_ffn": block("ffnPre.key.weight", "ffnPre.time_mix_k"),
    "head_qk": SHAPES | {"head_q.weight": (8, 8), "head_k.weight": (8, 8), "copy_mask": (9, 9)},
    "MishGLU": block("ffn.aa.weight", "ffn.bb.weight"),
    "LoRA adapter": {"base_model.model.blocks.0.att.key.lora_A.default.weight": (4, 8)},
    "start with 'module.'": {f"module.{name}": shape for name, shape in SHAPES.items()},
    "start with '_forward_module.'": {f"_forward_module.{name}": (8,) for name in SHAPES},
    "no RWKV model": {"model.embed_tokens.weight": (9, 8), "lm_head.weight": (9, 8)},
    "there are 0 tensors": {},
}


@pytest.mark.parametrize("what", FOREIGN)
def test_other_files_are_told_what_they_are(what: str):
    with pytest.raises(ValueError, match=what):
        infer_config(FOREIGN[what])


@pytest.mark.parametrize(
    ("what", "name"),
    [
        ("a whole RWKV-5.1 model", "rwkv.blocks.0.attention.gate.weight"),
        ("a whole RWKV-6 model", "rwkv.blocks.0.attention.time_maa_w"),
        ("RWKV-6 of flash-linear-attention file", "model.layers.0.attn.x_bias"),
    ],
)
def test_versions_are_recognized_by_their_names_in_transformers_and_fla(what, name):
    tensors = {name: torch.zeros(8), "lm_head.weight": torch.zeros(9, 8)}
    with pytest.raises(ValueError, match=f"other.bin: .*{what}"):
        conform(tensors, Path("other.bin"))


def test_variants_name_their_tensors():
    with pytest.raises(ValueError, match=r"'blocks.2.tiny_q.weight', 'blocks.2.tiny_mask'"):
        infer_config(FOREIGN["RWKV-4a"])


def test_names_from_files_cannot_break_the_line_or_the_terminal():
    names = ["a\nb", "\x1b[31mred", "x" * 5000, *map(str, range(50))]
    with pytest.raises(ValueError) as caught:
        infer_config(dict.fromkeys(names, (1,)))
    message = str(caught.value)
    assert "\n" not in message and "\x1b" not in message and len(message) < 600
    assert "and 50 more" in message


def test_a_huge_block_number_is_only_an_unexpected_name():
    with pytest.raises(ValueError, match=r"unexpected are 'blocks.1000000000000.ln1.weight'"):
        infer_config(SHAPES | {"blocks.1000000000000.ln1.weight": (8,)})
