"""The command `receptance`, called in-process."""

import contextlib
import io
from dataclasses import dataclass

from receptance.__main__ import main

SMALL = "--tokenizer bytes --width 16 --layers 2 --batch 2 --context 32 --learning-rate 1e-2"


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


def call(*argv: object) -> Result:
    """What the command would have returned and printed."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code: int | str | None = main([str(word) for word in argv])
        except SystemExit as leaving:
            code = leaving.code
    assert isinstance(code, int)
    return Result(code, out.getvalue(), err.getvalue())
