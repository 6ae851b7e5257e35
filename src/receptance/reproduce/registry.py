"""All experiments of the paper, in its order."""

from __future__ import annotations

from receptance.reproduce.complexity import Complexity
from receptance.reproduce.decays import Decays
from receptance.reproduce.experiment import Experiment
from receptance.reproduce.gradients import Gradients
from receptance.reproduce.initialization import Initialization
from receptance.reproduce.scaling import Scaling
from receptance.reproduce.sizes import Sizes
from receptance.reproduce.small_init import SmallInit

EXPERIMENTS: dict[str, type[Experiment]] = {
    kind.NAME: kind
    for kind in (
        Complexity,
        Sizes,
        Scaling,
        Initialization,
        SmallInit,
        Gradients,
        Decays,
    )
}
"""The experiments by the names that the command has for them."""
