"""Fine-tuning with few parameters: adapters beside a model that itself stays as it is."""

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
