"""All experiments of the paper, in its order."""

from __future__ import annotations

from receptance.reproduce.complexity import Complexity
from receptance.reproduce.decays import Decays
from receptance.reproduce.experiment import Experiment
from receptance.reproduce.inference import Inference
from receptance.reproduce.prompts import PromptOrder
from receptance.reproduce.sizes import Sizes
from receptance.reproduce.trace import CausalTrace

EXPERIMENTS: dict[str, type[Experiment]] = {
    kind.NAME: kind
    for kind in (
        Complexity,
        Sizes,
        Inference,
        Decays,
        CausalTrace,
        PromptOrder,
    )
}
"""The experiments by the names that the command has for them."""
