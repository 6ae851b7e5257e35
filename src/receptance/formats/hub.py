"""Models by the id they have on the Hugging Face hub."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

from receptance.formats.files import reason

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)

_WITH_SAFETENSORS = (
    "config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "20B_tokenizer.json",
    "rwkv_vocab*.txt",
)
_WITH_BIN = ("pytorch_model*.bin", "pytorch_model.bin.index.json")


def is_hub_id(name: str) -> bool:
    """Whether this has the form owner/name."""
    return _ID.fullmatch(name) is not None


def resolve(
    name: str,
    *,
    revision: str | None = None,
    endpoint: str | None = None,
    cache: str | Path | None = None,
) -> Path:
    """A local directory with what we read of the model owner/name, downloaded when it is not there.

    Pickled weights are fetched only if there are none as safetensors. Revision is a branch, a tag
    or a commit; endpoint and cache replace huggingface_hub's own. Without a network the cached
    copy is used, and so it is when HF_HUB_OFFLINE is set, which huggingface_hub heeds by itself.
    ValueError says what to do when there is no such model, no access or no network.
    """
    if not is_hub_id(name):
        raise ValueError(f"{name!r} is not a hub id; one looks like 'RWKV/rwkv-4-169m-pile'")
    from huggingface_hub import snapshot_download

    fetch = partial(snapshot_download, name, revision=revision, endpoint=endpoint, cache_dir=cache)
    try:
        directory = Path(fetch(allow_patterns=list(_WITH_SAFETENSORS)))
        if not any(directory.glob("model*.safetensors")):
            fetch(allow_patterns=[*_WITH_SAFETENSORS, *_WITH_BIN])
    # Which exceptions a broken connection raises depends on huggingface_hub's HTTP library.
    except Exception as error:
        raise ValueError(_advice(name, revision, error)) from None
    if not (directory / "config.json").is_file():
        raise ValueError(
            f"hub model {name!r} has no config.json; if it has .pth files, "
            "download the one you want and give its path"
        )
    return directory


def _advice(name: str, revision: str | None, error: Exception) -> str:
    """What to tell someone who asked for this model and got this error."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return f"hub model {name!r} is gated: ask for access on its page, then run `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"there is no hub model {name!r}, nor a local file or directory of that name; "
            "check the spelling, or run `hf auth login` if it is private"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"hub model {name!r} has no revision {revision!r}; leave it out for the newest"
    if isinstance(error, errors.LocalEntryNotFoundError):
        return (
            f"hub model {name!r} is not in the local cache, and the hub is out of reach; "
            "check the network and HF_HUB_OFFLINE, or give the path of a local copy"
        )
    return f"hub model {name!r} could not be fetched: {reason(error)}; try again"
