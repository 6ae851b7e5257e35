"""Text to tokens on disk, and the order in which training reads them.

The modules, in reading order:

    ondisk      arrays of tokens on disk, written in pieces, mapped
    templates   chat formats: how turns become one text
    binidx      the .bin/.idx pairs of RWKV-LM and Megatron
    tokens      a corpus folder: what `prepare` makes and training reads
    batches     rows of tokens in a seeded order
    files       paths, folders and globs to files; which documents are kept for validation
    parquet     rows of parquet files           hub    rows of data sets
    sources     files and data sets, cut into pieces of work
    examples    records of prompts and responses to tokens and what of them is learned
    parts       the tokens of one piece of work, on disk
    encode      a piece of work to a part
    plan        what decides a corpus: written down first, compared when the work goes on
    pool        pieces of work in several processes
    assemble    parts, or token files of any kind, to a corpus folder
    check       whether sources can be prepared, by a look at their beginnings
    prepare     all of this, from sources to a corpus folder
    pipeline    the same work as a step of datatrove
"""

from receptance.data.assemble import merge
from receptance.data.batches import Batches
from receptance.data.check import check_sources
from receptance.data.encode import ReadOptions
from receptance.data.plan import PrepareOptions
from receptance.data.prepare import prepare
from receptance.data.tokens import TokenFiles, is_corpus

__all__ = [
    "Batches",
    "PrepareOptions",
    "ReadOptions",
    "TokenFiles",
    "check_sources",
    "is_corpus",
    "merge",
    "prepare",
]
