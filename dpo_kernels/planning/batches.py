"""What is computed of a batch of pairs, by the way in which they go through the model (`dpo_kernels.data.packing`)."""

from __future__ import annotations

from typing import NamedTuple

from dpo_kernels.data.lengths import Lengths, blank_labels, real_lengths

BATCHING = ("auto", "concatenated", "padding_free", "shared_prefix", "packed_shared_prefix")
# To measure shares: pairs in a batch at most, since larger ones are padded alike; tokens in both responses that are
# more than most pairs have.
MEASURED_PAIRS, RESPONSE_TOKENS = 150, 4096


class Batching(NamedTuple):
    """How B pairs go through a model, and what that comes to: shares of the P = 2 B T positions of the batch that is
    "concatenated", chosen and rejected padded to T tokens, or of the P T scores of a head of its attention."""

    name: str = "concatenated"  # or another of `BATCHING`, but "auto"
    computed: float = 1.0
    """Of P: positions that go through the layers, padding included."""
    copied: float = 0.0
    """Of P: keys of prompts and responses, copied side by side for each response."""
    masked: float = 1.0
    """Of P T: scores that a mask is added to."""
    attended: float = 1.0
    """Of P T: scores of the blocks that attention is computed in."""

    @property
    def in_blocks(self) -> bool:
        """Whether the attention is that of `dpo_kernels.models.segments`."""
        return self.name != "concatenated"


PADDED = Batching()


def batching_of(name: str, lengths: Lengths, seq: int) -> Batching:
    """What `name`, one of `BATCHING` but "auto", comes to in a batch of pairs of such lengths, where T = `seq`.

    Raises `ValueError` for another name.
    """
    if name not in BATCHING[1:]:
        raise ValueError(f"batching: expected one of {BATCHING[1:]}, got {name!r}")
    if name == "concatenated":
        return PADDED
    sequences = 2 * len(lengths)
    positions, scores = sequences * seq, sequences * seq**2
    apart = [prompt + response for prompt, *responses in lengths for response in responses]
    if name == "padding_free":
        of_blocks = sum(length**2 for length in apart) / scores
        return Batching(name, sum(apart) / positions, copied=0, masked=0, attended=of_blocks)
    rows = [prompt + chosen + rejected for prompt, chosen, rejected in lengths]
    computed = sum(rows) if name == "packed_shared_prefix" else len(rows) * max(rows)
    masked = sum(response * (prompt + response) for prompt, *responses in lengths for response in responses)
    attended = masked + sum(prompt**2 for prompt, *_ in lengths)
    return Batching(name, computed / positions, sum(apart) / positions, masked / scores, attended / scores)


def measured_batches(pairs: int, seq: int) -> list[Lengths]:
    """Batches of so many real preference pairs, cut at `seq` tokens."""
    pairs = min(pairs, MEASURED_PAIRS)
    lengths = real_lengths(min(2 * seq, RESPONSE_TOKENS) * MEASURED_PAIRS, seq)
    return [lengths[i : i + pairs] for i in range(0, len(lengths) - pairs + 1, pairs)]


def measured_share(pairs: int, seq: int) -> float:
    """The share of positions with a label in padded batches of so many real preference pairs, cut at `seq` tokens."""
    batches = [blank_labels(0, 0, lengths) for lengths in measured_batches(pairs, seq)]
    return sum(int((labels == 0).sum()) for labels in batches) / sum(labels.numel() for labels in batches)


def measured_batching(name: str, pairs: int, seq: int) -> Batching:
    """The most of everything that `batching_of` finds in the same batches, where T is the longest of their pairs.

    Raises `ValueError` as it does.
    """
    batches = measured_batches(pairs, seq)
    longest = max(prompt + max(responses) for lengths in batches for prompt, *responses in lengths)
    found = [batching_of(name, lengths, longest) for lengths in batches]
    return Batching(name, *(max(shares) for shares in list(zip(*found, strict=True))[1:]))
