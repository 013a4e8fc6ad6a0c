"""Batches without padding, and in which a prompt is there once: `[prompt | response 1 | ... | response K]`.

What sees what is a layout, as `dpo_kernels.models.segments` reads it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dpo_kernels.data.batching import PairCollator, Tokenized


class _Segment(NamedTuple):
    """Tokens that see one another, and a prompt."""

    ids: Tensor
    position: int  # of the first
    prompt: int  # tokens of the group's prompt that they see
    sequence: int | None = None  # whose response they end with
    response: int = 0  # how many of them that is


@dataclass
class PackedCollator(PairCollator):
    """Collates B pairs, or rankings, so that no slot of a row is wasted, nor a prompt computed twice.

    Takes the examples of `PairCollator`, and its options.

    Args:
        packed: all pairs in one row, without padding (but for `pad_to_multiple_of`); False: one pair a row.
        shared_prefix: a pair is `[prompt | chosen | rejected]`; False: `[prompt, chosen] [prompt, rejected]`.

    Returns a dict with, for S sequences, which are 2B, chosen first, or those of rankings, one after the other,
        `input_ids` `[R, T]` int64: one pair after the other, then padding; R is 1 or B;
        `position_ids` `[R, T]` int64: those of each response go on from the prompt's end;
        `attention_mask` `[R, T]` int64: 0 on padding;
        `layout` `[R, 1, T, 4]` int32: what each slot sees;
        `predictors` `[S, L]` int64: for each token of each response the slot of the flat `[R T]` whose hidden state
            predicts it: all first tokens are predicted by the last slot of their prompt;
        `labels` `[S, L]` int64: these tokens, aligned with `predictors`, not shifted; `ignore_index` where a response
            has ended, where a token's weight is 0, and where nothing comes before the token;
        `token_weights` `[S, L]`, `pairs`, `pair_weights`, `group_weights`, `ref_logps`, `index`: as of `PairCollator`,
            aligned alike;
        `num_labelled` int: of labels.

    Raises `ValueError` as `PairCollator` does.
    """

    packed: bool = True
    shared_prefix: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("packed", "shared_prefix"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}: expected True or False, got {getattr(self, name)!r}")

    def assemble(self, tokens: Tokenized) -> dict[str, Any]:
        sequences = len(tokens.responses)
        groups = self._segments(tokens)
        rows = [[segment for group in groups for segment in group]] if self.packed else groups
        slots = max(sum(len(segment.ids) for segment in row) for row in rows)
        if self.pad_to_multiple_of is not None:
            slots = -(-slots // self.pad_to_multiple_of) * self.pad_to_multiple_of

        input_ids = torch.full((len(rows), slots), self.pad_token_id, dtype=torch.int64)
        attention_mask, position_ids = torch.zeros(2, len(rows), slots, dtype=torch.int64)
        slot = torch.arange(slots, dtype=torch.int32)
        layout = torch.stack([slot, slot, slot, torch.zeros_like(slot)], dim=-1).repeat(
            len(rows), 1, 1, 1
        )  # of padding
        longest = max(1, *map(len, tokens.responses))
        predictors = torch.zeros(sequences, longest, dtype=torch.int64)
        labels = torch.full((sequences, longest), self.ignore_index, dtype=torch.int64)
        token_weights = torch.zeros(sequences, longest, dtype=torch.float32)
        for row, segments in enumerate(rows):
            begin = prompt_end = 0
            for ids, position, prompt, sequence, response in segments:
                end = begin + len(ids)
                here = slice(begin, end)
                positions = torch.arange(position, position + len(ids))
                input_ids[row, here], position_ids[row, here], attention_mask[row, here] = ids, positions, 1
                seen = (prompt_end - prompt, prompt_end) if prompt else (begin, begin)
                layout[row, 0, here, 0], layout[row, 0, here, 1], layout[row, 0, here, 2] = *seen, begin
                layout[row, 0, here, 3] = positions.to(torch.int32)
                if sequence is None:
                    prompt_end = end
                elif response:
                    before = torch.arange(end - response - 1, end - 1)
                    if response == len(ids):  # the first is predicted by what is not before it
                        before[0] = seen[1] - 1 if prompt else begin
                    given = tokens.weights[sequence]
                    weights = torch.ones(response) if given is None else given.clone()
                    if position + len(ids) == response:  # nothing predicts the first of all
                        weights[0] = 0
                    predictors[sequence, :response] = row * slots + before
                    token_weights[sequence, :response] = weights
                    labels[sequence, :response] = ids[-response:].masked_fill(weights == 0, self.ignore_index)
                begin = end

        labelled = token_weights != 0
        batch: dict[str, Any] = {
            "input_ids": input_ids,
            "position_ids": position_ids,
            "attention_mask": attention_mask,
            "layout": layout,
            "predictors": predictors,
            "labels": labels,
            "num_labelled": int(labelled.sum()),
        }
        if bool(((token_weights != 1) & labelled).any()):
            batch["token_weights"] = token_weights
        return batch

    def _segments(self, tokens: Tokenized) -> list[list[_Segment]]:
        """Of each example."""
        groups = [[_Segment(prompt, 0, 0)] if self.shared_prefix else [] for prompt in tokens.prompts]
        for sequence, (number, ids) in enumerate(zip(tokens.prompt_of, tokens.responses, strict=True)):
            prompt = tokens.prompts[number]
            if self.shared_prefix:
                groups[number].append(_Segment(ids, len(prompt), len(prompt), sequence, len(ids)))
            else:
                groups[number].append(_Segment(torch.cat([prompt, ids]), 0, 0, sequence, len(ids)))
        return groups
