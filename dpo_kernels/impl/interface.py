"""What an implementation of the fused log-probabilities provides. Implementations never import one another.

Dimensions: N labelled rows, H hidden size, V vocabulary size, K requested statistics, n rows and v vocabulary entries
of one tile. What paths A to D give an implementation is compacted: row n has a label in [0, V). Path E and sums have S
sequences of T positions with ignored labels left in.

An implementation is a module with the functions of `TileKernels`. `paths.py` builds the algorithms A to D from the
first functions, the same for every implementation; `torch.py` is the one to read first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol, get_args

import torch
from torch import Tensor

from dpo_kernels.impl.fold import Fold
from dpo_kernels.options import Stat

STATS: tuple[Stat, ...] = get_args(Stat)


class LogitTransform(NamedTuple):
    """z = softcap(scale * a) / temperature with softcap(u) = cap * tanh(u / cap), for a = x.W + b."""

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    @property
    def slope(self) -> float:
        """dz/da at a = 0; elsewhere softcap multiplies it by 1 - tanh(scale * a / cap)^2."""
        return self.scale / self.temperature


class Rows(NamedTuple):
    """Where the labelled positions lie in [S, T]."""

    sequence: Tensor  # [N] int64
    position: Tensor  # [N] int64


class FoundRows(NamedTuple):
    """The labelled rows, in the order of positions, as a kernel finds them; and tables for what will be known of them,
    which hold 0 at all other positions already."""

    table: Tensor  # [5, N] int64, the fields below
    token_logps: Tensor  # [S, T] fp32
    stats: Tensor  # [K, S, T] fp32
    broken: Tensor  # [] int64, for `TokenLogps.broken`: 0 so far

    @property
    def rows(self) -> Rows:
        return Rows(self.table[0], self.table[1])

    @property
    def places(self) -> Tensor:
        """[N] in the flat [S T]."""
        return self.table[2]

    @property
    def y(self) -> Tensor:
        """[N] labels."""
        return self.table[3]

    @property
    def slots(self) -> Tensor:
        """[N] where their hidden states lie in the flat [R U], which is [S T] but for `predictors`."""
        return self.table[4]


class Labels(NamedTuple):
    """Of S sequences of T positions."""

    y: Tensor  # [S, T] int64, in [0, V), or `ignore_index`
    ignore_index: int
    num_labelled: int | None  # how many are not ignored, if the host knows: a CUDA device is then not waited for


class PairTables(NamedTuple):
    """What is known of S sequences and of their P pairs, of which n is chosen and n + P rejected; of one type, fp32 or
    fp64, and dense but for weights and references. What comes after `ref_logps` is written, once all pairs were
    compared."""

    token_logps: Tensor  # [S, T], 0 where there is no label
    token_weights: Tensor | None  # [S, T]; None: all are 1
    ref_logps: Tensor  # [S]
    num_tokens: Tensor  # [S] int64: labelled positions
    logps: Tensor  # [S], weighted sums of those of tokens
    slopes: Tensor  # [S], of the loss
    losses: Tensor  # [P]
    chosen_rewards: Tensor  # [P]
    rejected_rewards: Tensor  # [P]
    loss: Tensor  # [], their mean


class LinearLogps(NamedTuple):
    """What a pass over the vocabulary leaves for each row, in fp32 (fp64 for fp64 inputs)."""

    logp: Tensor  # [N]
    # [2, N]: a shift c near the largest logit, and sum_v exp(z_v - c). Apart, because lse = c + log(sum) in one number
    # rounds at the size of c, and every probability with it.
    norm: Tensor
    stats: Tensor  # [K, N], in the order asked for
    dhidden: Tensor | None  # [N, H] d logp_n / d x_n, same dtype as logp


class TokenLogps(NamedTuple):
    """What path A leaves of all positions, 0 at those without a label; fp32."""

    token_logps: Tensor  # [S, T]
    stats: Tensor  # [K, S, T], in the order asked for
    broken: Tensor  # [] not 0 if a hidden state is not finite; it may be so if a label's own x.W + b is not


class GradRows(NamedTuple):
    """What the gradients of n rows need of them beside their logits."""

    y: Tensor  # [n] int64, labels
    norm: Tensor  # [2, n] and
    logp: Tensor  # [n], as the forward left them
    g: Tensor  # [n] gradient with respect to logp

    def part(self, rows: slice) -> GradRows:
        if rows.stop - rows.start == self.y.shape[0]:
            return self
        return GradRows(self.y[rows], self.norm[:, rows], self.logp[rows], self.g[rows])


class GradPositions(NamedTuple):
    """The same of all positions; whatever these hold where they are ignored."""

    norm: Tensor  # [2, S, T]
    logp: Tensor  # [S, T]
    g: Tensor  # [S, T]


class Columns(NamedTuple):
    """A block of the vocabulary."""

    start: int
    bias: Tensor | None  # [v] in the accumulation dtype


class Shards(Protocol):
    """The other ranks, where each has consecutive entries of the vocabulary and all have the same rows. Labels are
    counted from the first entry that is here; one that matches none of these is another rank's."""

    vocab: int  # entries of the whole head

    def join_(self, fold: Fold) -> Tensor:
        """Makes the `fold` of the entries here one of all entries, the same on all ranks. Returns the factor [N] that
        brings what was accumulated here to the joint maximum."""

    def start_sum(self, t: Tensor) -> Callable[[], object]:
        """Begins to sum contiguous `t` over the ranks in place. Returns what waits for that."""


class Dlogits(Protocol):
    """The gradient of sum_n g_n logp_n with respect to x.W of n rows, [V, n], in products that read exponentials: each
    entry is rounded once to the dtype of an operand, on its way into the product, labels' entries too."""

    def dhidden(self, out: Tensor) -> None:
        """Its product with W, in `out` [n, H] in fp32. Of labels' entries it has all, or none: see
        `Exponentials.dhidden`."""

    def dweight(self, blocks: Iterable[slice], out: Tensor | None, dbias: Tensor | None, accumulate: bool) -> None:
        """Its product with x, in `out` [V, H]: rounded once, or in fp32, and then added to what is there with
        `accumulate`. Its sums over rows, in `dbias` [V] in fp32. Either may be None. `blocks` of the vocabulary are
        written one after another, each by products that read no exponentials but its own; a block lies in one part,
        where it begins with a new shift."""


class Exponentials(Protocol):
    """N rows of a sweep that stores no logits: what the product x.W^T writes is exp(z - c), times the softcap's part of
    dz/da. Sums come from what was not rounded; the label's entry is 0. Whatever the logits are, nothing overflows.

    Exponentials of n rows are a tensor [v, n] for each part of the vocabulary, in the dtype of an operand, whose rows
    are `padded_rows(n)` apart: operands of products as they are, with one shift c a row; or `packed`, in the same
    memory, with more digits, until they become dlogits. These have a shift for each block of the vocabulary and row,
    the largest logit of the row so far."""

    missing: Tensor
    """[N] in fp32: what products of dlogits of rows that were weighed lack of the label's entry, where its part was
    written."""

    def write(self, rows: slice, out: Sequence[Tensor | None] | None) -> None:
        """Goes over the vocabulary for these rows, and writes their exponentials to `out`; without it, nowhere, nor
        those of parts that have none there, which come behind all that do."""

    def finish(self, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        """logp [n], norm [2, n] and the statistics [K, n] of rows that were written; see `LinearLogps`."""

    def finish_at(self, found: FoundRows) -> None:
        """logp and the statistics of all rows, which were written, to their places in the tables of `found`. Of those
        that are not `packed`."""

    def weigh(self, e: Sequence[Tensor], rows: slice, g: Tensor) -> Dlogits | None:
        """What packed exponentials of rows, all that were written, with the gradient g [n] with respect to logp are as
        dlogits, until others are written or weighed; or None: they have become dlogits in their place, labels' entries
        too, each rounded once."""

    def dhidden(self, sums: Tensor, out: Tensor) -> Tensor:
        """From the sums [N, H] of exponentials times W over the vocabulary, d logp / dx; or dX, from those of dlogits:
        in `out` [N, H], which may be `sums`. What these lack of the labels' entries, `missing`, is added exactly."""


class Recomputed(Protocol):
    """N rows whose gradient of the logits is what the product x.W^T writes, a block of the vocabulary at a time."""

    def write(self, block: slice, out: Tensor) -> None:
        """The gradient with respect to x.W of all rows and of these entries, to `out` [v, N]: in the dtype of an
        operand, each rounded once, labels' entries too. Rows of `out` are `padded_rows(N)` apart, and what is between
        them becomes 0."""

    def dhidden(self, sums: Tensor, out: Tensor) -> Tensor:
        """dX, in `out` [N, H], which may be `sums`: from the sums [N, H] in fp32 of what was written for the whole
        vocabulary, times W. What rounding left of the labels' entries is added exactly."""


class TileKernels(Protocol):
    """The functions of an implementation. A tile `a` holds the products x.W of n rows and v vocabulary entries, in the
    accumulation dtype and contiguous; a row of it costs one read, and one write of what comes of it. That goes to `out`
    [n, v], in the dtype of an operand, which `out_tile` gave, or which is contiguous memory of its own."""

    def description(self) -> str:
        """What this machine runs it with, for people."""

    def tile_bytes(self, device: torch.device) -> int:
        """The size in bytes that no temporary tensor of paths A, B and D exceeds, whatever N and V, where
        they store tiles of logits."""

    def operand(self, t: Tensor, compute_dtype: torch.dtype) -> Tensor:
        """`t` rounded to the compute dtype, held in the dtype that the device multiplies in with fp32 accumulation."""

    def product(self, a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> Tensor:
        """a @ b without rounding below the dtype of `out`: in `out`, or beside it in a new tensor that is returned;
        out + a @ b, always in `out`, with `accumulate`."""

    def out_tile(self, a: Tensor, dtype: torch.dtype) -> Tensor:
        """Where `fold_exp_` and `dlogits` are to write what comes of tile `a`, as an operand of this dtype: the tile's
        own memory, or where they cannot do that, new memory."""

    def new_fold(self, y: Tensor, dtype: torch.dtype, stats: Sequence[str]) -> Fold:
        """What is kept of rows with labels y [N] during a sweep with tiles of `dtype`."""

    def linear_fold_(
        self,
        fold: Fold,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        transform: LogitTransform,
        compute_dtype: torch.dtype,
    ) -> bool:
        """Takes all of x.W^T [N, V] into a new `fold` in one kernel, without tiles, and says True; or False, having
        done nothing, where there is no such kernel or products of tiles are faster."""

    def linear_token_logps(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        transform: LogitTransform,
        *,
        compute_dtype: torch.dtype,
        ignore_index: int,
        shift: bool,
        stats: Sequence[str],
        num_labelled: int | None,
        predictors: Tensor | None,
    ) -> TokenLogps | None:
        """The same of all positions, labels [S, T] and hidden states [S, T, H], or [R, U, H] beside `predictors`: the
        labelled rows are found on the device, and copied once if at all. None where `find_rows` has none, or there is
        no such kernel for these operands. Of fused families alone."""

    def find_rows(
        self,
        labels: Tensor,
        vocab_size: int,
        *,
        ignore_index: int,
        shift: bool,
        num_labelled: int | None,
        predictors: Tensor | None,
        slots: int,
        stats: int,
    ) -> FoundRows | None:
        """The labelled rows of labels [S, T] of any integers, and tables for log-probabilities and so many statistics.
        `predictors` [S, T] lie among `slots` places. None where there is no kernel for these, or where labels,
        predictors or their number are found to be wrong; a device that is not waited for asserts that they are right.
        This function and the next need be there where `dispatch.finds_rows` says so."""

    def gather_rows(self, hidden: Tensor, slots: Tensor, broken: Tensor) -> Tensor:
        """[N, H] of hidden states [R, U, H] that lie anyhow, those in `slots` [N] of the flat [R U]. `broken` becomes 1
        if one of them is not finite."""

    def put_rows(self, rows: Tensor, g: Tensor, at: Rows, out: Tensor) -> None:
        """Writes each of rows [N, H] in fp32, times the number of g [S, T] at its position, to that position of `out`
        [S, T, H], which is contiguous; each is rounded once. Where `dispatch.puts_rows` says so."""

    def compare(self, logps: Tensor, at: Rows, tables: PairTables, pairs: slice, beta: float) -> Tensor:
        """DPO's loss, arXiv 2305.18290, Eq. 7, of some of the `pairs` of `tables`, all of whose rows have `logps` [n]:
        these go to their positions, what comes of them to the other tables. Rows of a sequence lie together. Returns
        [n] the slope of the mean over all pairs. This function and the next need be there where `dispatch.finds_rows`
        says so."""

    def sum_rows(self, logps: Tensor, at: Rows, token_logps: Tensor, weights: Tensor | None) -> Tensor:
        """[S] the weighted sums that `compare` makes of the `logps` of all rows, which go to their positions."""

    def takes_exponentials(self, x_dtype: torch.dtype, weight: Tensor, compute_dtype: torch.dtype) -> bool:
        """Whether there are `exponentials` and `recomputed` for rows of this dtype and this weight. The functions from
        here to `shift_columns` are not called, and need not be there, where there never are."""

    def exponentials(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        y: Tensor,
        transform: LogitTransform,
        stats: Sequence[str],
        rows: int,
        sizes: Sequence[int],
        packed: bool,
    ) -> Exponentials:
        """Of at least one row. `rows`: how many are written at once, at most; `sizes`: how many entries of the
        vocabulary each part has, multiples of 16 but for the last."""

    def recomputed(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        of: GradRows,
        transform: LogitTransform,
        missing: Tensor | None = None,
    ) -> Recomputed:
        """Of at least one row. `missing` is that of a sweep that wrote other entries' exponentials, whose `dhidden`
        is to follow: what rounding leaves of the labels' entries goes there."""

    def recomputed_columns(self, n: int, v: int, h: int, device: torch.device) -> int:
        """How many vocabulary entries path D is to write at once: a multiple of 64, but where there are fewer."""

    def exponential_rows(self, n: int, v: int, h: int, device: torch.device) -> int:
        """How many of n rows path B is to write at once."""

    def padded_rows(self, n: int) -> int:
        """How far apart exponentials [v, n] have their rows."""

    def shift_columns(self, device: torch.device) -> int:
        """How many vocabulary entries of a row share a shift of packed exponentials, which are kept beside them in
        fp32, as many rows apart. A part of the vocabulary begins with a new one."""

    def fold_(
        self, fold: Fold, a: Tensor, rows: slice, columns: Columns, transform: LogitTransform, keep: bool
    ) -> None:
        """Takes the tile of `rows` and `columns` into `fold`. `keep`: leaves the tile as it is."""

    def fold_exp_(
        self, fold: Fold, a: Tensor, out: Tensor, rows: slice, columns: Columns, transform: LogitTransform, sums: Tensor
    ) -> None:
        """The same, and writes exp(z - max), times the softcap's part of dz/da, to `out`, 0 at the label. Brings
        `sums` [n, H], what was accumulated of earlier blocks, to the new maximum."""

    def dlogits(self, a: Tensor, out: Tensor, of: GradRows, columns: Columns, transform: LogitTransform) -> Tensor:
        """Writes -g p dz/da to `out`, with 0 at the labels. Returns value [n] of the label's own entry
        g (1 - p_y) dz/da, 0 where the label lies in another block."""

    def put_labels_(self, a: Tensor, y: Tensor, start: int, value: Tensor) -> None:
        """Writes value [n] to the label's own entry, which is 0, of each row of a [n, v] whose label lies in this block
        of the vocabulary, that begins at `start`. `value` is 0 elsewhere."""

    def scale_(self, t: Tensor, factor: Tensor) -> None:
        """Multiplies a contiguous `t` by `factor` [], in its place. Nobody waits to see whether that is 1; where it is,
        kernels of ours leave `t` alone. Each product is rounded once."""

    def logps_fwd(self, logits: Tensor, labels: Labels, *, stats: Sequence[str] = ()) -> tuple[Tensor, Tensor, Tensor]:
        """Path E: logp [S, T], norm [2, S, T] and statistics [K, S, T], 0 at ignored positions, of one read of the
        labelled rows of logits [S, T, V]. Checks the labels; see `positions.labelled_rows`."""

    def logps_bwd_(self, logits: Tensor, labels: Labels, of: GradPositions, out: Tensor) -> None:
        """Path E: the gradient of sum g logp with respect to the logits, in `out` [S, T, V], which may be `logits`."""

    def sum_tokens(
        self, token_logps: Tensor, labels: Tensor, ignore_index: int, weights: Tensor | None, mean: bool
    ) -> tuple[Tensor, Tensor]:
        """[S] sums of token_logps [S, T], 0 at ignored positions, times weights [S, T] of their dtype, which count at
        labelled positions alone; or `mean`: divided by how many these are. And this number [S], int64. Summed in fp64,
        always in the same order. This function and the next are called, and need be there, where
        `dispatch.sums_tokens` says so: elsewhere PyTorch sums."""

    def sum_tokens_bwd(
        self,
        grad: Tensor,
        token_logps: Tensor,
        labels: Tensor,
        ignore_index: int,
        weights: Tensor | None,
        num_tokens: Tensor,
        mean: bool,
        need_dweights: bool,
    ) -> tuple[Tensor, Tensor]:
        """From the gradient [S] with respect to these sums, those [S, T] with respect to token_logps and weights; the
        latter without elements if it is not needed."""


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits, sums and log-probabilities: fp32, or fp64 for fp64 operands."""
    return torch.float64 if dtype == torch.float64 else torch.float32
