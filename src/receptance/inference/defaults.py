"""None as an option's value stands for the option's default."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def fill_defaults(options: DataclassInstance) -> None:
    """Replace every None in a frozen dataclass by its field's default value."""
    for field in fields(options):
        if getattr(options, field.name) is None:
            default = field.default
            if field.default_factory is not MISSING:
                default = field.default_factory()
            object.__setattr__(options, field.name, default)
