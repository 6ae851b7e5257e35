"""Looking inside a model: what it computes, reads from, remembers, and would say."""

from receptance.analysis.effective import Attention, attention
from receptance.analysis.hooks import Cache, patch, record
from receptance.analysis.lens import Lens, logit_lens, state_lens
from receptance.analysis.occlusion import attribution
from receptance.analysis.places import names
from receptance.analysis.surgery import ablate, interpolate, parts, transplant
from receptance.analysis.units import Activations, activations

__all__ = [
    "Activations",
    "Attention",
    "Cache",
    "Lens",
    "ablate",
    "activations",
    "attention",
    "attribution",
    "interpolate",
    "logit_lens",
    "names",
    "parts",
    "patch",
    "record",
    "state_lens",
    "transplant",
]
