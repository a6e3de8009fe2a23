"""One member of an archive, zip or tar alike."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

BLOCK_BYTES = 1 << 20

Kind = Literal["file", "folder", "link", "special"]
"""special: a device or pipe."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """A member's name as stored, its kind, and its announced size in bytes."""

    name: str
    kind: Kind
    size: int
    blocks: Callable[[], Iterator[bytes]]
    """Read the content. Raises UserError unless it is exactly as long as announced."""
