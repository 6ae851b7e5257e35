"""A model of facts that can pass through one place only, trained in seconds.

A prompt is a subject, fillers and a question, and the answer depends on the subject. Time mixing is
off in all layers but CARRIER. What is left of the others are their token shifts, each of which sees
one token back: together they reach REACH tokens. Beyond these the fact can only be in the state of
the carrier, so it is known where a causal trace must lead.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from receptance.config import ModelConfig
from receptance.model import Model

FACTS, CARRIER, LAYERS = 16, 1, 3
REACH = LAYERS + 1
FILLERS = 2 * REACH
TEXTS = ("subject", *("filler",) * FILLERS, "question")
_QUESTION, _FIRST_FILLER, _FIRST_ANSWER, _VOCABULARY = 16, 17, 32, 64
STEPS, _RATE = 150, 1e-2


def prompts() -> tuple[Tensor, Tensor]:
    """All prompts [FACTS,T] and their answers [FACTS]."""
    middle = [*range(_FIRST_FILLER, _FIRST_FILLER + FILLERS), _QUESTION]
    rows = [[subject, *middle] for subject in range(FACTS)]
    answers = torch.randperm(FACTS, generator=torch.Generator().manual_seed(0)) + _FIRST_ANSWER
    return torch.tensor(rows), answers


def trained(version: int = 4, *, carrier: bool = True) -> Model:
    """The model; without its carrier it cannot learn the facts."""
    config = ModelConfig(version=version, vocab_size=_VOCABULARY, width=32, num_layers=LAYERS)
    model = Model(config, seed=0)
    for layer, block in enumerate(model.blocks):
        # Time mixing begins as nothing, since its last matrix is zero, and so it stays.
        block.att.requires_grad_(layer == CARRIER and carrier)
    tokens, answers = prompts()
    optimizer = torch.optim.Adam((x for x in model.parameters() if x.requires_grad), lr=_RATE)
    for _ in range(STEPS):
        loss = F.cross_entropy(model(tokens)[0][:, -1], answers)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.requires_grad_(False).eval()
