"""What implementations of `interface.Exponentials` have in common on the host: sizes and limits.

Dimensions: N labelled rows, n rows of a block, H hidden size, V vocabulary size. Exponentials lie as [V, n].
"""

from __future__ import annotations

# An exponential in bf16 has one shift a row: the largest of its first logits, so many of them. No logit is more than
# FAR above it, so that exponentials, their sums and what these are divided by stay within what bf16 and fp32 hold. Rows
# of which one is are gone over again.
FIRST_COLUMNS = 256
FAR = 60.0
# A block of path B's exponentials takes this at most.
EXP_BYTES = 2**29
# A block of path D's gradient of the logits takes this at most.
DLOGITS_BYTES = 2**28


def padded_rows(rows: int) -> int:
    """The distance of entries in memory: so that each begins where wide loads and stores like it."""
    return -(-rows // 16) * 16
