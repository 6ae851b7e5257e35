"""Finding and downloading models by their name on the Hugging Face hub."""

from __future__ import annotations

import glob
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from receptance.formats.files import reason
from receptance.tokenizer.files import PATTERNS

PREFIX = "hf:"
"""The prefix of a hub name; it is required where the name could also be a path."""

_SUFFIXES = ("pth", "pt", "bin", "safetensors", "st", "gguf")
# The forms are checked here because names become parts of addresses and of paths in the cache.
_WORD = r"[A-Za-z0-9][\w.-]*"
_FILE = rf"(?:[^/\\@\s.][^/\\@\x00-\x1f]*/)*[^/\\@\s.][^/\\@\x00-\x1f]*\.(?:{'|'.join(_SUFFIXES)})"
_REVISION = re.compile(rf"{_WORD}(?:/{_WORD})*", re.ASCII)
_SOURCE = re.compile(rf"({_WORD}/{_WORD})(?:/({_FILE}))?(?:@(.+))?", re.ASCII)

_WITH_SAFETENSORS = (
    "config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    *PATTERNS,
)
_WITH_BIN = ("pytorch_model*.bin", "pytorch_model.bin.index.json")
# The folder in which runs are kept by custom: a name in it that is not there was mistyped.
_RUNS = "runs"


class DownloadWarning(UserWarning):
    """Issued before a download, so that nobody runs a stranger's model without knowing it."""


@dataclass(frozen=True)
class HubSource:
    """A model, or one file of a model, on the hub, perhaps at a revision.

    As text it is "owner/name" or "owner/name/file.pth", with or without "@revision" behind it and
    "hf:" before it.
    """

    name: str
    """The name of the repository, owner/name."""
    file: str | None = None
    """One file of weights in the repository."""
    revision: str | None = None
    """A branch, a tag or a commit; None for the newest."""

    @classmethod
    def parse(cls, text: str, revision: str | None = None) -> HubSource:
        """Read the text, and the revision given beside it; ValueError if it has another form."""
        found = _SOURCE.fullmatch(text.removeprefix(PREFIX))
        if found is None:
            raise ValueError(
                f"{text!r} is not a hub id; one looks like '{PREFIX}RWKV/rwkv-4-169m-pile'"
            )
        name, file, own = found.groups()
        if own is not None and revision not in (None, own):
            raise ValueError(f"{text!r} and revision {revision!r} disagree; give one of them")
        revision = own or revision
        if revision is not None and _REVISION.fullmatch(revision) is None:
            raise ValueError(
                f"{revision!r} is no revision of hub model {name!r}; wanted is a branch, a tag or "
                "a commit, such as 'main'"
            )
        return cls(name, file, revision)


def means_hub(source: str | Path) -> bool:
    """Whether this names a model of the hub and not a file or directory on this machine.

    A Path never does, and a str that begins with "hf:" always. Another str does if it has the form
    owner/name, owner/name/file.pth, or either with @revision, unless `owner` is a folder here or
    "runs": then a path was meant, whether or not it is there.
    """
    if not isinstance(source, str):
        return False
    if source.startswith(PREFIX):
        return True
    found = _SOURCE.fullmatch(source)
    if found is None:
        return False
    # Two words with the ending of a file of weights are a path, too.
    is_file = not found[2] and source.endswith(tuple(f".{suffix}" for suffix in _SUFFIXES))
    owner = source.partition("/")[0]
    return not is_file and owner != _RUNS and not Path(owner).is_dir()


def resolve(
    name: str,
    *,
    revision: str | None = None,
    endpoint: str | None = None,
    cache: str | Path | None = None,
) -> Path:
    """The path of a local copy of the files that this package reads of a hub model.

    Missing files are downloaded, and a DownloadWarning names the model before that.

    owner/name gives a directory as transformers has it, or the file of weights if there is a single
    one; owner/name/file.pth gives that file, with the tokenizer's beside it. @revision behind
    either, or `revision`, is a branch, a tag or a commit. Pickled weights are fetched only if they
    are named or if there are none as safetensors. `endpoint` and `cache` replace huggingface_hub's
    own. huggingface_hub shows progress on stderr, continues a broken download, uses the token of
    `hf auth login`, and takes the cached copy when there is no network or HF_HUB_OFFLINE is set.
    ValueError says what to do when there is no such model, no access or no network.
    """
    source = HubSource.parse(name, revision)
    from huggingface_hub import HfApi, constants, snapshot_download

    where = {"revision": source.revision, "endpoint": endpoint, "cache_dir": cache}
    fetch = partial(snapshot_download, source.name, **where)
    if not constants.HF_HUB_OFFLINE and not _is_cached(source, fetch):
        what = source.name if source.file is None else f"{source.name}/{source.file}"
        message = f"downloading {what} from the Hugging Face hub"
        warnings.warn(message, DownloadWarning, stacklevel=2)
    names = partial(HfApi(endpoint=endpoint).list_repo_files, source.name, revision=source.revision)
    try:
        return _fetch(source, fetch, names)
    except _Missing as missing:
        raise ValueError(str(missing)) from None
    # The exceptions that a broken connection raises depend on huggingface_hub's HTTP library.
    except Exception as error:
        raise ValueError(_advice(source, error)) from None


class _Missing(ValueError):
    """The repository is there, but the file that was wanted is not in it."""


def _is_cached(source: HubSource, fetch: Callable[..., str]) -> bool:
    """Whether weights of this model are on this machine already."""
    from huggingface_hub import errors

    wanted = _WITH_SAFETENSORS if source.file is None else (glob.escape(source.file),)
    try:
        directory = Path(fetch(local_files_only=True, allow_patterns=list(wanted)))
    except (errors.LocalEntryNotFoundError, OSError, ValueError):
        return False  # What is wrong with the name or the cache, the download will say.
    if source.file is not None:
        return (directory / source.file).is_file()
    return any(re.fullmatch(_FILE, file.name) for file in directory.rglob("*"))


def _fetch(source: HubSource, fetch: Callable[..., str], names: Callable[[], list[str]]) -> Path:
    if source.file is not None:
        return _fetch_file(source, source.file, fetch, names)
    directory = Path(fetch(allow_patterns=list(_WITH_SAFETENSORS)))
    if any(directory.glob("model*.safetensors")):
        return directory
    if (directory / "config.json").is_file():
        return Path(fetch(allow_patterns=[*_WITH_SAFETENSORS, *_WITH_BIN]))
    files = _weights(directory, names)
    if len(files) != 1:
        raise _Missing(
            f"hub model {source.name!r} is no directory of transformers: it has no config.json; "
            + _listed(source, files)
        )
    return _fetch_file(source, files[0], fetch, names)


def _fetch_file(
    source: HubSource, file: str, fetch: Callable[..., str], names: Callable[[], list[str]]
) -> Path:
    directory = Path(fetch(allow_patterns=[glob.escape(file), *PATTERNS]))
    if not (directory / file).is_file():
        listed = _listed(source, _weights(directory, names))
        raise _Missing(f"hub model {source.name!r} has no file {file!r}; {listed}")
    return directory / file


def _weights(directory: Path, names: Callable[[], list[str]]) -> list[str]:
    """The files of weights in the repository, or in the cached copy if the hub is out of reach."""
    from huggingface_hub import errors

    try:
        found = names()
    except (errors.OfflineModeIsEnabled, OSError):
        found = [path.relative_to(directory).as_posix() for path in directory.rglob("*")]
    return sorted(name for name in found if re.fullmatch(_FILE, name))


def _listed(source: HubSource, files: list[str]) -> str:
    if not files:
        return "there are no weights in it"
    shown = ", ".join(f"{source.name}/{file}" for file in files[:5])
    more = f" and {len(files) - 5} more" if len(files) > 5 else ""
    return f"name one of its files: {shown}{more}"


def _advice(source: HubSource, error: Exception) -> str:
    """The message for a user whose request for this model failed with this error."""
    from huggingface_hub import errors

    name = source.name
    if isinstance(error, errors.GatedRepoError):
        return f"hub model {name!r} is gated: ask for access on its page, then run `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"there is no hub model {name!r}, nor a local file or directory of that name; "
            "check the spelling, or run `hf auth login` if it is private"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return (
            f"hub model {name!r} has no revision {source.revision!r}; leave it out for the newest"
        )
    if isinstance(error, errors.LocalEntryNotFoundError):
        return (
            f"hub model {name!r} is not in the local cache, and the hub is out of reach; "
            "check the network and HF_HUB_OFFLINE, or give the path of a local copy"
        )
    return f"hub model {name!r} could not be fetched: {reason(error)}; try again"
