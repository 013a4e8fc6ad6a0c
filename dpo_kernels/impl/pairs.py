"""Sequences summed and compared in pairs: what the kernels for it are launched with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from dpo_kernels.impl.interface import PairTables, Rows


class Comparison(NamedTuple):
    """Tensors are dense, but for weights and labels."""

    logps: Tensor  # [N]
    at: Rows
    token_logps: Tensor  # [S, T]
    weights: Tensor | None  # [S, T]
    sums: Tensor  # [S], to be written
    part: slice  # of the pairs whose rows these are; of the sequences, if these are summed alone
    slopes: Tensor | None  # [N], to be written
    tables: PairTables | None  # with the ones above; None: sequences are summed alone
    beta: float

    def compiled(self, native: Any) -> tuple[Any, Any]:
        """The same as a compiled module takes it."""

        def positions(t: Tensor | None) -> Any:
            return native.Positions(0, 0, 0) if t is None else native.Positions(t.data_ptr(), *t.stride())

        labels, ignore_index, pairs, counts, others = None, 0, 0, 0, [0] * 6
        if (tables := self.tables) is not None:
            labels, ignore_index, references, num_tokens, _, *of_pairs = tables[2:]
            others = [t.data_ptr() for t in (of_pairs[0], references, *of_pairs[1:])]
            counts, pairs = num_tokens.data_ptr(), tables.losses.shape[0]
        comparison = native.Comparison(
            self.token_logps.data_ptr(), self.token_logps.shape[1], positions(self.weights), positions(labels),
            ignore_index, counts, self.sums.data_ptr(), *others, self.beta, pairs, self.part.start, self.part.stop,
        )  # fmt: skip
        slopes = 0 if self.slopes is None else self.slopes.data_ptr()
        of_rows = (*map(Tensor.data_ptr, (*self.at, self.logps)), slopes)
        return comparison, native.PairRows(*of_rows, self.logps.shape[0])


Launch: TypeAlias = Callable[[Comparison], None]


def compare(launch: Launch, logps: Tensor, at: Rows, tables: PairTables, pairs: slice, beta: float) -> Tensor:
    """See `interface.TileKernels`, as of the next."""
    slopes = logps.new_empty(logps.shape)
    references, labels = tables.ref_logps.resolve_neg().contiguous(), tables.labels.resolve_neg()
    assert labels.dtype == torch.int64 and references.dtype == logps.dtype
    tables = tables._replace(labels=labels, ref_logps=references)
    _launch(launch, logps, at, tables.token_logps, tables.token_weights, tables.logps, pairs, slopes, tables, beta)
    return slopes


def sum_rows(launch: Launch, logps: Tensor, at: Rows, token_logps: Tensor, weights: Tensor | None) -> Tensor:
    sums = token_logps.new_empty(token_logps.shape[0])
    _launch(launch, logps, at, token_logps, weights, sums, slice(0, sums.shape[0]), None, None, 0.0)
    return sums


def _launch(
    launch: Launch, logps: Tensor, at: Rows, token_logps: Tensor, weights: Tensor | None, sums: Tensor, part: slice,
    slopes: Tensor | None, tables: PairTables | None, beta: float,
) -> None:  # fmt: skip
    assert token_logps.is_contiguous() and token_logps.dtype == logps.dtype
    weights, at = None if weights is None else weights.resolve_neg(), Rows(*map(Tensor.contiguous, at))
    launch(Comparison(logps.contiguous(), at, token_logps, weights, sums, part, slopes, tables, beta))
