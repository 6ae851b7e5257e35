"""One safetensors file. The format runs no code on load; only damage has to be dealt with."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from receptance.formats.files import check_file, reason


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a file under the names it gives them; they stay mapped, nothing is copied.

    ValueError, starting with the path, when the file can't be read or is damaged.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    check_file(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    # Besides its own error it passes on those of torch, asked for an impossible view of the bytes.
    except (SafetensorError, OSError, RuntimeError, ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path}: damaged, cut short or no safetensors file ({reason(error)}); get it again"
        ) from None
