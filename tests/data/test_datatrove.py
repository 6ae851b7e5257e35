"""The pipeline of docs/data.md, and files that datatrove itself wrote."""

import io
import json

import numpy as np
import pytest
from rich.console import Console
from tiny import small_bpe

from receptance.data import PrepareOptions, TokenFiles, merge, prepare

pytest.importorskip("datatrove")
pytest.importorskip("orjson", reason="datatrove reads JSON with it")

RECORDS = [{"text": f"record {n}: naïve 狐", "id": str(n)} for n in range(40)]


@pytest.fixture
def folder(tmp_path):
    """Two files of records and a tokenizer."""
    (tmp_path / "in").mkdir()
    for part in range(2):
        lines = "".join(json.dumps(r) + "\n" for r in RECORDS[part::2])
        (tmp_path / f"in/{part}.jsonl").write_text(lines)
    small_bpe().save(tmp_path)
    return tmp_path


def execute(folder, step) -> None:
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader

    LocalPipelineExecutor(
        pipeline=[JsonlReader(str(folder / "in"), doc_progress=False), step],
        tasks=2,
        workers=1,
        logging_dir=str(folder / "logs"),
    ).run()


def expected(folder) -> TokenFiles:
    names = [str(folder / f"in/{part}.jsonl") for part in range(2)]
    console = Console(file=io.StringIO())
    return prepare(names, folder / "plain", small_bpe(), PrepareOptions(workers=0), console)


def test_our_step_writes_what_prepare_writes(folder):
    from receptance.data.pipeline import TokenShards

    execute(folder, TokenShards(folder / "shards", str(folder / "tokenizer.json")))
    assert sorted(p.name for p in (folder / "shards").iterdir()) == ["00000.npy", "00001.npy"]
    corpus = merge([folder / "shards"], folder / "out", small_bpe())
    assert corpus.fingerprint == expected(folder).fingerprint


def test_datatroves_own_pairs_are_read(folder):
    """An .idx that nobody here wrote."""
    from datatrove.pipeline.tokens import MegatronDocumentTokenizer

    pairs, tokenizer = str(folder / "pairs"), str(folder / "tokenizer.json")
    execute(folder, MegatronDocumentTokenizer(pairs, tokenizer_name_or_path=tokenizer))
    assert len(list((folder / "pairs").glob("*.idx"))) == 2
    corpus = merge([folder / "pairs"], folder / "out", small_bpe())
    assert np.array_equal(corpus.train, expected(folder).train)
