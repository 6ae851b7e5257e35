"""receptance train with --dry-run: what a run would take, before it is begun."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from receptance.apps.console import Console
from receptance.config import PILE_VOCAB_SIZE, WORLD_VOCAB_SIZE
from receptance.data import TokenFiles, check_sources, is_corpus
from receptance.storage import checkpoint
from receptance.storage.directories import expanded
from receptance.storage.pairing import no_tokenizer
from receptance.tokenizer import Tokenizer, load_tokenizer
from receptance.tokenizer.files import PILE_PUBLISHED, WORLD_PUBLISHED
from receptance.training.estimate import estimate, show
from receptance.training.notes import located
from receptance.training.options import StartOptions
from receptance.training.start import NEW_TOKENIZER, adapter_size

# The tokenizers of published models, which recipes name, and their numbers of tokens.
_VOCABULARIES = {PILE_PUBLISHED: PILE_VOCAB_SIZE, WORLD_PUBLISHED: WORLD_VOCAB_SIZE}


def show_estimate(
    data: Sequence[str], start: StartOptions, *, device: str, devices: int, utilization: float
) -> None:
    """Check that the data exists, and show parameters, FLOPs, memory, steps and time of a run."""
    start = located(start)
    own = corpus_tokenizer(data)
    if data and not is_one_corpus(data):
        check_sources(data, start.read, start.exclude)
    if start.init is not None:
        sizes, _, tokenizer = checkpoint.read_model(start.init, tokenizer=start.named_tokenizer())
        if tokenizer is None and not is_one_corpus(data):
            raise no_tokenizer(sizes, start.init)
        start.check_sizes(sizes)
    else:
        name = start.tokenizer or NEW_TOKENIZER
        sizes = start.sizes(_vocabulary(name) if own is None else own.vocab_size)
    found = estimate(
        sizes,
        start.train,
        ranks=devices,
        context_ranks=start.context_ranks,
        sharded=start.parallel == "fsdp",
        offload=start.offload,
        trained=None if start.tune == "all" else adapter_size(sizes, start),
        device_name=device,
        utilization=utilization,
    )
    show(Console(), found)


def _vocabulary(name: str) -> int:
    """The size of the vocabulary that the tokenizer of this name has, or will have."""
    kind, _, size = name.partition(":")
    if kind == "bpe" and size.isdecimal():
        return int(size)
    known = _VOCABULARIES.get(Path(name).name)
    if known is not None and not expanded(name).exists():
        return known  # The size is known, so an estimate does not need the file.
    return load_tokenizer(name).vocab_size


def corpus_tokenizer(data: Sequence[str]) -> Tokenizer | None:
    """The tokenizer of a corpus of tokens, if the corpus names it."""
    if is_one_corpus(data):
        return TokenFiles.open(data[0]).tokenizer
    return None


def is_one_corpus(data: Sequence[str]) -> bool:
    """Whether the data is a corpus of tokens, and not text."""
    return len(data) == 1 and is_corpus(data[0])
