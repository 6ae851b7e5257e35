"""A small model that knows facts which can pass through one place only.

Each prompt is a subject, three fillers and a question, and the answer depends on the subject. In
the layer CARRIER alone can a token learn anything of an earlier one, and there from the state of
the recurrence: token shifts are off everywhere, and so is the time mixing of the other layers.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from receptance.config import ModelConfig
from receptance.model import Model

FACTS, CARRIER, LAYERS = 16, 1, 3
LENGTH = 5
_FILLERS, _QUESTION = (20, 21, 22), 23

# No token shift: time_mix_ is a share of the current token, x_ one of the token before. And no way
# past the stream in version 7, where the first layer's value is handed to all others.
_FIXED = {"time_mix_": 1.0, "x_": 0.0, "v0": -30.0, "v1": 0.0, "v2": 0.0}


def prompts() -> tuple[Tensor, Tensor]:
    """All prompts [FACTS,LENGTH] and their answers [FACTS]."""
    rows = [[subject, *_FILLERS, _QUESTION] for subject in range(FACTS)]
    answers = torch.randperm(FACTS, generator=torch.Generator().manual_seed(0)) + 32
    return torch.tensor(rows), answers


@functools.cache
def planted(version: int = 4, *, carrier: bool = True) -> Model:
    """The model, trained for a second or so; without its carrier it cannot learn the facts."""
    config = ModelConfig(version=version, vocab_size=64, width=32, num_layers=LAYERS)
    model = Model(config, seed=0)
    trained = []
    for name, parameter in model.named_parameters():
        own = name.rpartition(".")[2]
        fixed = next((x for start, x in _FIXED.items() if own.startswith(start)), None)
        layer = int(name.split(".")[1]) if name.startswith("blocks") else None
        mute = name.endswith("att.output.weight") and (layer != CARRIER or not carrier)
        if fixed is not None or mute:
            parameter.data.fill_(fixed or 0.0)
            parameter.requires_grad_(False)
        elif parameter.requires_grad:
            trained.append(parameter)
    tokens, answers = prompts()
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    for _ in range(100):
        loss = F.cross_entropy(model(tokens)[0][:, -1], answers)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.requires_grad_(False).eval()
