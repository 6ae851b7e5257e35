"""All experiments of the paper, in its order."""

from __future__ import annotations

from receptance.reproduce.complexity import Complexity
from receptance.reproduce.decays import Decays
from receptance.reproduce.experiment import Experiment
from receptance.reproduce.gradients import Gradients
from receptance.reproduce.inference import Inference
from receptance.reproduce.initialization import Initialization
from receptance.reproduce.prompts import PromptOrder
from receptance.reproduce.scaling import Scaling
from receptance.reproduce.sizes import Sizes
from receptance.reproduce.small_init import SmallInit
from receptance.reproduce.trace import CausalTrace

EXPERIMENTS: dict[str, type[Experiment]] = {
    kind.NAME: kind
    for kind in (
        Complexity,
        Sizes,
        Inference,
        Scaling,
        SmallInit,
        Decays,
        CausalTrace,
        Initialization,
        Gradients,
        PromptOrder,
    )
}
"""The experiments by the names that the command has for them."""
