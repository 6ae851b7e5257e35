"""What a checkpoint says about its run, and what may change when the run goes on."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any

from receptance.data import TokenFiles
from receptance.storage.directories import expanded
from receptance.training.options import StartOptions
from receptance.training.saving import read_training

# Options that a resumed run may change; the rest would make it another run.
MAY_CHANGE = (
    "steps",
    "minutes",
    "micro_batch",
    "recompute",
    "compile",
    "loader_workers",
    "skip_bad_steps",
    "rollback",
    "device",
    "parallel",
    "offload",
    "context_ranks",
)
# A resumed run of an adapter may be told where its model is now; it knows it by its fingerprint.
_OF_THE_MODEL = ("init", "tokenizer")


@dataclass(frozen=True)
class About:
    """What a checkpoint says about its run."""

    options: StartOptions
    corpus: Path
    fingerprint: str
    """The fingerprint of the corpus."""
    end_of_text: int


def notes(out: Path, options: StartOptions, corpus: TokenFiles) -> dict[str, Any]:
    """What training.json holds besides the trainer's own entries; `read_about` reads it."""
    path, out = corpus.path.resolve(), out.resolve()
    return {
        "options": asdict(options),
        "corpus": {
            # The path is relative inside the run folder, which may be moved.
            "path": str(path.relative_to(out) if path.is_relative_to(out) else path),
            "fingerprint": corpus.fingerprint,
            "end_of_text": corpus.end_of_text,
        },
    }


def read_about(directory: Path) -> About:
    """What `notes` put there; ValueError if the directory is no checkpoint of a run."""
    try:
        about = read_training(directory)
        corpus = about["corpus"]
        return About(
            restored_options(StartOptions(), about["options"]),
            directory.parent / corpus["path"],
            corpus["fingerprint"],
            corpus["end_of_text"],
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{directory} is not a checkpoint to resume from: {error}") from None


def restored_options(options: Any, fields: dict[str, Any]) -> Any:
    """The dataclass, of the same type as options, of which asdict and JSON made these fields."""
    changes = {}
    for name, value in fields.items():
        old = getattr(options, name)
        if is_dataclass(old):
            value = restored_options(old, value)
        changes[name] = tuple(value) if isinstance(value, list) else value
    return replace(options, **changes)


def flat(options: StartOptions) -> dict[str, Any]:
    """All options by name; those of LoRA are called lora.rank and so on."""
    fields = asdict(options)
    lora = {f"lora.{name}": value for name, value in fields.pop("lora").items()}
    return {**fields.pop("train"), **fields.pop("read"), **fields, **lora}


def located(options: StartOptions) -> StartOptions:
    """The same options with absolute paths: a run may be continued from another folder."""
    return replace(options, init=absolute(options.init), tokenizer=absolute(options.tokenizer))


def absolute(name: str | None) -> str | None:
    """The absolute path of a file or folder; any other name as it is."""
    if name is None or name == "bytes" or not expanded(name).exists():
        return name
    return os.path.abspath(expanded(name))


def check_changes(stored: StartOptions, given: StartOptions) -> None:
    """ValueError if the options given for a run that goes on make it another one."""
    may_change = MAY_CHANGE + (() if stored.tune == "all" else _OF_THE_MODEL)
    before, now = flat(stored), flat(given)
    for name, old in before.items():
        if now[name] != old and name not in may_change:
            raise ValueError(
                f"the run was started with {name} {old}, not {now[name]}; a resumed run keeps its "
                "options, so leave this one out or start another run"
            )
