"""Preference data: from files or the hub to rows of one form, to token ids, to batches."""

from typing import TYPE_CHECKING

from dpo_kernels.lazy import exports

if TYPE_CHECKING:
    from dpo_kernels.data.batching import PairCollator as PairCollator
    from dpo_kernels.data.loading import load_preferences as load_preferences
    from dpo_kernels.data.packing import PackedCollator as PackedCollator
    from dpo_kernels.data.rankings import group_rankings as group_rankings
    from dpo_kernels.data.tokenization import tokenize_preferences as tokenize_preferences

__all__ = ["PackedCollator", "PairCollator", "group_rankings", "load_preferences", "tokenize_preferences"]
__getattr__ = exports(
    __name__,
    {
        "PackedCollator": "packing",
        "PairCollator": "batching",
        "group_rankings": "rankings",
        "load_preferences": "loading",
        "tokenize_preferences": "tokenization",
    },
)
