"""Looking inside a model: what it computes, reads from, remembers, and would say."""

from receptance.analysis.decays import (
    decay_result,
    half_lives,
    log_decays,
    retentions,
    starting_log_decays,
)
from receptance.analysis.effective import Attention, attention
from receptance.analysis.hooks import Cache, patch, record
from receptance.analysis.lens import Lens, logit_lens, state_lens
from receptance.analysis.occlusion import attribution
from receptance.analysis.places import names
from receptance.analysis.surgery import ablate, interpolate, parts, transplant
from receptance.analysis.tracing import EVERYTHING, OUTPUT, Trace, Tracer, causal_trace
from receptance.analysis.units import Activations, activations

__all__ = [
    "EVERYTHING",
    "OUTPUT",
    "Activations",
    "Attention",
    "Cache",
    "Lens",
    "Trace",
    "Tracer",
    "ablate",
    "activations",
    "attention",
    "attribution",
    "causal_trace",
    "decay_result",
    "half_lives",
    "interpolate",
    "log_decays",
    "logit_lens",
    "names",
    "parts",
    "patch",
    "record",
    "retentions",
    "starting_log_decays",
    "state_lens",
    "transplant",
]
