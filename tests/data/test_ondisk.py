"""Arrays in files, against numpy."""

import tempfile
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from receptance.data.ondisk import map_npy, npy_writer


@given(st.lists(st.lists(st.integers(0, 65535), max_size=50), max_size=5))
def test_a_npy_written_in_pieces_is_one_for_numpy(pieces):
    with tempfile.TemporaryDirectory() as folder:
        with npy_writer(Path(folder) / "x.npy", np.dtype("<u2")) as append:
            for piece in pieces:
                append(np.array(piece, np.uint16))
        wanted = [id for piece in pieces for id in piece]
        assert np.load(Path(folder) / "x.npy").tolist() == wanted
        assert map_npy(Path(folder) / "x.npy").tolist() == wanted
