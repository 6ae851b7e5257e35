"""Fine-tuning with few parameters: an adapter trains beside a model whose weights are frozen."""

from receptance.adapters.base import Adapter
from receptance.adapters.files import ADAPTER_FILE, load_adapter, make_adapter
from receptance.adapters.lora import LoRA, LoRAOptions
from receptance.adapters.state_tuning import StateTuning, StateTuningOptions

__all__ = [
    "ADAPTER_FILE",
    "Adapter",
    "LoRA",
    "LoRAOptions",
    "StateTuning",
    "StateTuningOptions",
    "load_adapter",
    "make_adapter",
]
