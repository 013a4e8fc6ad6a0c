"""Parts of rows and of the vocabulary."""

from __future__ import annotations

from collections.abc import Iterator

# Columns of a tile are a multiple of this, but for the last: its rows then begin where wide loads and products like it.
ALIGNED = 64


def spans(size: int, step: int, first: int = 0) -> Iterator[slice]:
    return (slice(start, min(start + step, size)) for start in range(first, size, step))
