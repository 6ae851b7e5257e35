"""The config.json of transformers directories: what the versions of RWKV are called there.

RWKV-4 has the fields of transformers' RwkvForCausalLM, RWKV-5.2 and RWKV-6 those of the code beside
the weights in the repositories of RWKV, RWKV-7 those of flash-linear-attention.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from typing import Any

import torch

from receptance.config import ModelConfig

MODEL_TYPES: dict[str, float] = {"rwkv": 4, "rwkv5": 5.2, "rwkv6": 6, "rwkv7": 7}
"""The versions by their model_type."""
SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "width",
    "num_hidden_layers": "num_layers",
    "intermediate_size": "ffn_width",
}
"""The fields that the shapes of the tensors decide, too, and those of a ModelConfig."""
RESCALE_EVERY = 6
"""The number of blocks after which transformers halves weights, unless config.json says
otherwise."""

# The extras of RWKV-7 under the names of flash-linear-attention.
_EXTRAS_7 = {
    "head_dim": "head_size",
    "decay_low_rank_dim": "decay_rank",
    "a_low_rank_dim": "rate_rank",
    "v_low_rank_dim": "value_rank",
    "gate_low_rank_dim": "gate_rank",
}
_DIVISOR, _USUAL_DIVISOR = "head_size_divisor", 8
_DIVIDED_EPSILON = 1e-5  # The code of RWKV-5 and RWKV-6 has it built in.


def told(config: ModelConfig, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a ModelConfig that only config.json tells: epsilons, and a hidden rank."""
    found: dict[str, Any] = {}
    name = "norm_eps" if "norm_eps" in fields else "layer_norm_epsilon"
    if (epsilon := fields.get(name)) is not None:
        if not isinstance(epsilon, float):
            raise ValueError(f"{name} is {reprlib.repr(epsilon)}; it must be a number like 1e-5")
        found["layer_norm_epsilon"] = epsilon
    extras = dict(config.extras)
    rank = fields.get("v_low_rank_dim")
    if config.version == 7 and config.num_layers == 1 and isinstance(rank, int):
        extras["value_rank"] = rank
    if config.version == 7 and name == "norm_eps" and epsilon is not None:
        # The rule of the packages with this field. Official code has a constant instead.
        extras["group_norm_epsilon"] = epsilon * extras["head_size"]
    if 5 <= config.version < 7 and (divisor := fields.get(_DIVISOR)) is not None:
        if not isinstance(divisor, int) or divisor < 1:
            raise ValueError(f"{_DIVISOR} is {reprlib.repr(divisor)}; it must be a number like 8")
        if divisor != _USUAL_DIVISOR:  # Else the epsilon would differ in the last digit.
            extras["group_norm_epsilon"] = _DIVIDED_EPSILON * divisor**2
    return found | {"extras": extras}


def check_hf(config: ModelConfig) -> None:
    """ValueError if config.json cannot say what this model computes."""
    if config.version not in MODEL_TYPES.values():
        known = ", ".join(f"RWKV-{number}" for number in MODEL_TYPES.values())
        raise ValueError(
            f"packages for transformers have no RWKV-{config.version}, only {known}; use another "
            "format"
        )
    if config.version == 7:
        rule = "the size of a head times the epsilon of layer norms"
        usual = config.layer_norm_epsilon * config.extras["head_size"]
    else:
        rule, usual = "a constant", 64e-5
    epsilon = config.extras.get("group_norm_epsilon", usual)
    if not math.isclose(epsilon, usual, rel_tol=1e-9):
        raise ValueError(
            f"the group_norm_epsilon is {epsilon}, and the packages that read this format take "
            f"{rule}, {usual:.3g}; use another format"
        )
    ranks = {"mix_rank", "decay_rank"} & config.extras.keys() if config.version == 6 else ()
    usual_sizes = config.architecture.default_extras(config.width)
    for rank in sorted(ranks):
        if config.extras[rank] != usual_sizes[rank]:
            raise ValueError(
                f"the {rank} is {config.extras[rank]}, and the code that reads this format takes "
                f"{usual_sizes[rank]} at this width; use another format"
            )


def config_fields(config: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The fields of config.json for a model whose matrices are of this type."""
    if config.version == 7:
        own = _fields_7(config)
    else:
        own = _fields_4(config, dtype) if config.version == 4 else _fields_5_and_6(config, dtype)
    return {
        **{theirs: getattr(config, ours) for theirs, ours in SIZES.items()},
        **own,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def _fields_4(config: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "architectures": ["RwkvForCausalLM"],
        "model_type": "rwkv",
        "attention_hidden_size": config.width,
        "layer_norm_epsilon": config.layer_norm_epsilon,
        # With any other value than 0, transformers divides weights when it evaluates the model, and
        # epsilon then acts on smaller numbers. In float16 models overflow without that.
        "rescale_every": RESCALE_EVERY if dtype == torch.float16 else 0,
    }


def _fields_5_and_6(config: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Those of modeling_rwkv5.py and modeling_rwkv6.py, which divide weights as for RWKV-4."""
    number = int(config.version)
    head_size = config.extras["head_size"]
    return {
        "architectures": [f"Rwkv{number}ForCausalLM"],
        "model_type": f"rwkv{number}",
        "attention_hidden_size": config.width,
        "head_size": head_size,
        # The code takes this for the size of a head in one place; published files say 64 as well.
        "num_attention_heads": head_size,
        _DIVISOR: _USUAL_DIVISOR,
        "layer_norm_epsilon": config.layer_norm_epsilon,
        "rescale_every": RESCALE_EVERY if dtype == torch.float16 else 0,
    }


def _fields_7(config: ModelConfig) -> dict[str, Any]:
    """Those of flash-linear-attention, whose defaults are not those of published models."""
    return {
        "architectures": ["RWKV7ForCausalLM"],
        "model_type": "rwkv7",
        **{theirs: config.extras[ours] for theirs, ours in _EXTRAS_7.items()},
        "num_heads": config.width // int(config.extras["head_size"]),
        "hidden_ratio": config.ffn_width / config.width,
        "value_dim": [config.width] * config.num_layers,
        "hidden_act": "sqrelu",
        "norm_eps": config.layer_norm_epsilon,
        "norm_bias": True,
        "norm_first": True,
        "fuse_norm": False,  # The fused norm has another epsilon.
        "pad_token_id": 0,
    }
