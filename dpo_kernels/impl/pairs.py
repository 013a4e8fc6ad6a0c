"""Sequences summed and compared in pairs: what the kernels for it are launched with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor

from dpo_kernels.impl.interface import PairTables, Rows


class Comparison(NamedTuple):
    """Tensors are dense, but for weights."""

    logps: Tensor  # [N]
    at: Rows
    token_logps: Tensor  # [S, T]
    weights: Tensor | None  # [S, T]
    sums: Tensor  # [S], to be written
    part: slice  # of the pairs whose rows these are; of the sequences, if these are summed alone
    slopes: Tensor | None  # [N], to be written
    tables: PairTables | None  # with the ones above; None: sequences are summed alone
    beta: float

    @property
    def pairs(self) -> int:
        return 0 if self.tables is None else self.tables.losses.shape[0]

    def of_pairs(self) -> tuple[Tensor | None, ...]:
        """What there is of sequences beside their sums, and of pairs: to be written but for the references."""
        if (t := self.tables) is None:
            return (None,) * 7
        return t.slopes, t.num_tokens, t.ref_logps, t.losses, t.chosen_rewards, t.rejected_rewards, t.loss

    def compiled(self, native: Any) -> tuple[Any, Any]:
        """The same as a compiled module takes it."""
        slopes, weights, of_pairs = self.slopes, self.weights, self.of_pairs()
        comparison = native.Comparison(
            self.token_logps.data_ptr(), self.token_logps.shape[1],
            native.Positions(0, 0, 0) if weights is None else native.Positions(weights.data_ptr(), *weights.stride()),
            self.sums.data_ptr(), *(0 if t is None else t.data_ptr() for t in of_pairs), self.beta, self.pairs,
            self.part.start, self.part.stop,
        )  # fmt: skip
        sequence, position = self.at
        rows = native.PairRows(
            sequence.data_ptr(), position.data_ptr(), self.logps.data_ptr(), 0 if slopes is None else slopes.data_ptr(),
            self.logps.shape[0],
        )  # fmt: skip
        return comparison, rows


Launch: TypeAlias = Callable[[Comparison], None]


def compare(launch: Launch, logps: Tensor, at: Rows, tables: PairTables, pairs: slice, beta: float) -> Tensor:
    """See `interface.TileKernels`, as of the next."""
    slopes, references = logps.new_empty(logps.shape), tables.ref_logps.resolve_neg().contiguous()
    assert references.dtype == logps.dtype
    tables = tables._replace(ref_logps=references)
    _launch(
        launch, logps, at, tables.token_logps, tables.token_weights, tables.logps, pairs, slopes, tables, float(beta)
    )
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
