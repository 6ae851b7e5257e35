"""Sequence models on disk: a sealed directory with sizes, weights and what the answers mean."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from receptance.model.devices import resolve_device
from receptance.model.heads import SequenceConfig
from receptance.model.sequences import SequenceModel
from receptance.storage.checkpoint import read_tensors
from receptance.storage.opening import FORMAT_VERSION, SEQUENCE_FORMAT, open_path


def write_sequence_description(
    config: SequenceConfig, directory: Path, about: Mapping[str, Any]
) -> None:
    """Put a model's sizes, and what its answers mean, into a directory that is being written."""
    fields = {
        "format": SEQUENCE_FORMAT,
        "format_version": FORMAT_VERSION,
        "model": config.to_dict(),
        "about": dict(about),
    }
    (directory / "config.json").write_text(json.dumps(fields, indent=1))


def load_sequence_model(
    source: str | Path, *, device: torch.device | str = "cpu"
) -> tuple[SequenceModel, dict[str, Any]]:
    """Load a classifier, regressor or forecaster, in evaluation mode, and what its answers mean.

    source is a checkpoint of `receptance train`, or the folder of its run, whose newest whole
    checkpoint is read. ValueError if it is anything else or damaged.
    """
    opened = open_path(source)
    if opened.kind != "sequences":
        raise ValueError(
            f"{opened.path} holds no classifier, regressor or forecaster; name a run that trained "
            "one"
        )
    opened.check_version()
    config = SequenceConfig.from_dict(opened.fields.get("model"))
    model = SequenceModel(config)
    tensors = read_tensors(opened.path, "model")
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{opened.path}: weights and sizes do not fit: {reason}") from None
    return model.to(resolve_device(device)).eval(), dict(opened.fields.get("about") or {})
