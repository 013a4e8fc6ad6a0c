"""What the head and the loss of a DPO step allocate, before they run: three ways, as functions of the shapes.

Dimensions: P positions, N of them labelled; H hidden size, V vocabulary size; n rows and v columns of a tile. Bytes a
number: e of hidden states and head, o of the operands of products, a of sums (4; 8 for fp64).

Every function goes through the moments of a forward (and backward) at which memory is highest, adds up what is alive,
and returns the highest. Counted is what PyTorch's allocator hands out after the call began: gradients included, the
inputs not, nor what libraries take past the allocator (cuBLAS' workspace is there before).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, cast

import torch

from dpo_kernels import linear_dpo
from dpo_kernels.comparisons import Halves
from dpo_kernels.dispatch import check_runs, choose, impl_of, is_fused, load
from dpo_kernels.impl import paths
from dpo_kernels.impl.interface import Rows, accumulate_dtype
from dpo_kernels.impl.products import parts_of_sum
from dpo_kernels.pair_groups import Group, plan_groups
from dpo_kernels.rows import PUT_ROWS

# [N]: where rows lie (16), labels (8), the running sums of a sweep (64) and what they are finished in
ROW_BYTES = 160
# [N]: what about 16 parts of the vocabulary leave of a row, eight numbers each
SPLIT_BYTES = 512
# [P]: labels, masks, log-probabilities
POSITION_BYTES = 32


class HeadMemory(NamedTuple):
    """Bytes allocated by one forward (and backward) of head and loss, beyond its inputs."""

    peak: int
    """The most that is alive at once, `returned` included."""
    returned: int
    """The gradients that stay: dX [P, H], and dW [V, H] of a trained head, in the dtype of the inputs."""
    moment: str
    """When the peak is."""
    products: float
    """Matrix products of [rows, H] by [H, V] that are computed, some perhaps of a part of the vocabulary."""
    rows: int
    """Rows that go through them: all positions, or the labelled ones."""
    path: str = ""
    """Ours: A, B, C or D."""
    why: str = ""
    """Why this path."""

    @property
    def temporary(self) -> int:
        return self.peak - self.returned


def ours_bytes(
    path: str,
    *,
    tokens: int,
    positions: int,
    hidden: int,
    vocab: int,
    dtype: torch.dtype,
    compute_dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    impl: str = "auto",
    chunk_bytes: int | None = None,
    pairs: int = 1,
    softcap: bool = False,
) -> HeadMemory:
    """What `linear_sequence_logps` (A without gradients, B with a frozen head, D) or `linear_dpo_loss` (C) allocates.

    - A: the labelled rows x [N, H], a tile of logits, operands of a tile where they must be converted, and what the
      library multiplies in.
    - B: the same and sums [N, H] in a; the backward multiplies and casts these.
    - C: x, dX in a, dW, its sums in a (a block of columns, or whole where pairs come in several groups), and the logits
      of a group: some in the memory of dW, the others in a buffer of a bytes a logit.
    - D: x, dX in a, dW, a block of its sums, and a tile, as in A.
    - B, C and D of kernels that store no logits: exponentials, or for D dlogits, in their place, 2 bytes each.

    At the end of each dX [N, H] is spread to [P, H]. How large tiles, groups and blocks are is asked of the functions
    that the call itself asks.

    Args:
        path: "A", "B", "C" or "D". "C" is D where `linear_dpo_loss` would take that, and says so in `path`.
        tokens, positions, hidden, vocab: N, P, H, V.
        dtype: of hidden states and head.
        compute_dtype: of autocast, where it is on.
        device: need not be there. Without a GPU at hand a fused forward is not assumed.
        chunk_bytes: as in `linear_dpo_loss`.
        pairs: that the labelled positions are spread over evenly.
        softcap: whether the logits have one.
    """
    if path not in ("A", "B", "C", "D"):
        raise ValueError(f"path: expected A, B, C or D, got {path!r}")
    device, of_products = torch.device(device), dtype if compute_dtype is None else compute_dtype
    check_runs(impl, device)

    def tiles(path: Any) -> _Tiles:
        family = choose(impl, device, path, of_products, vocab, hidden)
        return _Tiles(tokens, hidden, vocab, dtype, of_products, device, family, softcap)

    t = tiles(path)
    small = tokens * ROW_BYTES + positions * POSITION_BYTES
    if path in ("A", "B"):
        why = {"A": "nothing needs a gradient", "B": "the head is frozen: its sweep leaves dX"}[path]
        return _swept(t, positions, small, with_dhidden=path == "B")._replace(why=why)
    why = "for any loss"
    if path == "C":
        budget = linear_dpo.DEFAULT_CHUNK_BYTES if chunk_bytes is None else chunk_bytes
        groups, why = _groups(t, pairs, budget)
        if groups:
            return _grouped(t, groups, positions, small)._replace(why=why)
        t = tiles("D")
    return _recomputed(t, positions, small)._replace(why=why)


class _Weight(NamedTuple):
    """A trained head as far as decisions look at it, on a device that need not be there."""

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool = True

    def numel(self) -> int:
        return self.shape[0] * self.shape[1]

    def to(self, dtype: torch.dtype) -> _Weight:
        return self._replace(dtype=dtype)


class _Tiles:
    """How an implementation cuts N rows by V columns into tiles, and what it allocates beside a tile, in bytes."""

    def __init__(
        self, n: int, h: int, v: int, dtype: torch.dtype, compute_dtype: torch.dtype, device: torch.device, family: str,
        softcap: bool,
    ) -> None:  # fmt: skip
        self.family, self.impl = family, impl_of(family)
        self.k = cast(Any, load(family))
        self.n, self.h, self.v, self.dtype, self.device, self.softcap = n, h, v, dtype, device, softcap
        self.compute_dtype = compute_dtype
        self.acc = accumulate_dtype(self.compute_dtype)
        self.weight = cast(Any, _Weight((v, h), dtype, device))
        self.operand = self.k.operand(self.weight, self.compute_dtype).dtype
        self.e, self.a = dtype.itemsize, self.acc.itemsize
        self.set_blocks(*paths._blocks(n, v, h, self.acc, self.k.tile_bytes(device)))
        # PyTorch before 2.10 took two steps to add half-precision products to fp32 sums
        self.adds_apart = self.onednn or (self.operand != self.acc and torch.__version__ < "2.10")

    def set_blocks(self, rows: int, columns: int) -> None:
        self.rows, self.columns = rows, columns
        self.tile = rows * columns * self.a
        self.several = rows < self.n or columns < self.v
        self.x_rows, self.w = self.converted(rows), self.converted(columns)

    @property
    def onednn(self) -> bool:
        """Whether products are new tensors."""
        if self.acc != torch.float32 or not hasattr(self.k, "products_by"):
            return False
        return bool(self.k.products_by(self.rows * self.columns * self.h) == "oneDNN")

    def converted(self, rows: int) -> int:
        """Rows of x or W as operands, where they are not read in place."""
        if self.dtype == self.compute_dtype == self.operand:
            return 0
        return rows * self.h * self.operand.itemsize

    def made(self, rows: int) -> int:
        """An operand and what it is made from: under autocast the CPU takes two steps."""
        rounded = self.compute_dtype not in (self.dtype, self.operand)
        return self.converted(rows) + rounded * rows * self.h * self.compute_dtype.itemsize

    @property
    def next_w(self) -> int:
        """The next block's operand of W, made while the last one is alive."""
        return self.made(min(self.columns, self.v - self.columns))

    @property
    def operands(self) -> int:
        """Of x and W, at most: when the next one of either is made while the last one is alive."""
        blocks, last = math.ceil(self.n / self.rows), _last(self.n, self.rows)
        after_first = {1: self.rows if self.columns < self.v else 0, 2: last}.get(blocks, self.rows)
        return self.w + max(self.x_rows + self.made(after_first), self.converted(last) + self.next_w)

    @property
    def last_operands(self) -> int:
        """Those that are still there when the sweep is over."""
        return self.converted(_last(self.n, self.rows)) + self.converted(_last(self.v, self.columns))

    @property
    def label_rows(self) -> int:
        """W_y of a block of rows: as it is, in the compute dtype, and in that of sums, two of them at a time."""
        chain = [self.e] + [self.compute_dtype.itemsize] * (self.compute_dtype != self.dtype)
        chain += [self.a] * (self.acc != self.compute_dtype)
        most = max((x + y for x, y in zip(chain, chain[1:], strict=False)), default=self.e)
        return min(self.rows, paths.LABEL_ROWS) * self.h * most

    @property
    def apart(self) -> int:
        """What comes of a tile, in bytes a number, where it is not written over the tile."""
        a = torch.empty(1, self.columns, dtype=self.acc)
        return 0 if self.k.out_tile(a, self.operand).data_ptr() == a.data_ptr() else self.operand.itemsize

    @property
    def kept_product(self) -> int:
        """A product that stays where the library put it, beside the tile it was meant for."""
        return self.tile if self.onednn and self.h <= self.k.MAX_TERMS else 0

    @property
    def product(self) -> int:
        """x W^T: a sum of MAX_TERMS products, and the next one, with parts of both operands."""
        if not self.onednn:
            return 0
        part, rest = self.k.MAX_TERMS, min(self.h - self.k.MAX_TERMS, self.k.MAX_TERMS)
        if rest <= 0:
            return self.tile
        both = (self.rows + self.columns) * self.a
        return self.tile + max(both * part, self.tile + both * rest)

    @property
    def next_product(self) -> int:
        """The same beside one that was kept, which a first tile does not have."""
        return self.product if self.several or not self.kept_product else 0

    @property
    def added(self) -> int:
        """d W, where it is not added at once to what is there."""
        return self.rows * self.h * self.a if self.adds_apart else 0

    @property
    def dweight(self) -> int:
        """d^T x the same, and d^T in order."""
        return (self.columns * self.h * self.a if self.adds_apart else 0) + (self.tile if self.onednn else 0)

    @property
    def copy_of_kept(self) -> int:
        """A tile that is to stay as it is."""
        return self.tile if self.impl == "torch" else 0

    @property
    def slopes(self) -> int:
        """The softcap's part of the gradient."""
        return self.tile if self.impl == "torch" and self.softcap else 0

    def dw_sum(self, columns: int, one_group: bool) -> int:
        """The sums of dW, where dW itself is too narrow for them and is not rounded by a single product."""
        rounded_by_product = one_group and self.rows >= self.n and self.operand == self.dtype
        return 0 if self.dtype == self.acc or rounded_by_product else columns * self.h * self.a

    @property
    def exponentials(self) -> bool:
        """Whether paths B and C store these, and path D dlogits, and none of them logits."""
        weight = torch.empty(self.v, self.h, dtype=self.dtype, device="meta")
        return is_fused(self.family) and self.k.takes_exponentials(self.dtype, weight, self.compute_dtype)

    @property
    def sums_of_rows(self) -> int:
        """What the parts of the vocabulary leave of each row, and what that is put together in."""
        return self.n * SPLIT_BYTES

    @property
    def fused(self) -> bool:
        """Whether one kernel does the sweep of path A: where a GPU is there to ask."""
        halves = self.dtype == self.compute_dtype in (torch.bfloat16, torch.float16)
        wanted = halves and self.device.type == "cuda" and torch.cuda.is_available()
        return wanted and is_fused(self.family) and self.k.has_fused_forward(self.device)


def _last(size: int, step: int) -> int:
    """The length of the last span."""
    return size - (math.ceil(size / step) - 1) * step


def _groups(t: _Tiles, pairs: int, chunk_bytes: int) -> tuple[list[Group], str]:
    """Path C's groups, none where it is not taken, and why; the rows are spread evenly over the pairs."""
    if torch.float16 in (t.dtype, t.compute_dtype):
        return [], "gradients in fp16 are formed after the loss scale"
    pair = torch.arange(t.n) % pairs
    dweight, kept_as = t.weight.requires_grad, "exponentials" if t.exponentials else "logits"
    groups = plan_groups(
        Rows(pair, pair), Halves(pairs), t.weight, t.acc, chunk_bytes, t.family,
        dweight=dweight, exponentials=t.exponentials,
    )  # fmt: skip
    stored = None if groups is None else groups[0].stored
    if groups is not None and stored is None:
        which = "all pairs" if len(groups) == 1 else f"the pairs, in {len(groups)} groups,"
        return groups, f"the {kept_as} of {which} fit in chunk_bytes"
    kept = paths.kept_bytes(t.k, t.n, t.weight, t.acc, t.exponentials, dweight)
    sums = t.v * t.h * t.a if t.dtype != t.acc else 0
    # several groups whose exponentials fit may take longer than one with some
    least = kept.buffer if t.exponentials else min(kept.buffer, math.ceil(t.n / pairs) * kept.of_row + sums)
    in_one = " in one group" if t.exponentials else ""
    whole = f"path C, with 3 products{in_one}, needs {math.ceil(least / 2**20)} MiB of it"
    if groups is not None:
        return groups, f"the exponentials of {stored} of {t.v} vocabulary entries fit in chunk_bytes; {whole}"
    what = f"a pair's {kept_as}" + " and the sums of dW" * (sums > 0)
    return [], f"{what} exceed chunk_bytes; {whole}"


def _partial(t: _Tiles, rows: int, terms: int) -> int:
    """What the parts of a sum over the vocabulary are, before they are added to sums [rows, H]."""
    parts = parts_of_sum(rows, terms, t.h, t.device)
    return parts * rows * t.h * t.a * (parts > 1)


def _swept(t: _Tiles, positions: int, small: int, with_dhidden: bool) -> HeadMemory:
    """A and B."""
    if with_dhidden and t.n and t.exponentials:
        x, sums, rows = t.n * t.h * t.e, t.n * t.h * t.a, t.k.exponential_rows(t.n, t.v, t.h, t.device)
        moments = {
            "sums": small + x + sums + t.v * t.k.padded_rows(rows) * t.e + t.sums_of_rows + _partial(t, rows, t.v),
            "backward": small + sums + positions * t.h * t.e,
        }
        return _highest(moments, positions * t.h * t.e, 2, t.n, "B")
    if t.n and paths._reads_in_place(t.weight, t.compute_dtype):
        t.set_blocks(*paths._traffic_blocks(t.n, t.v, t.acc, t.k.tile_bytes(t.device)))
    x, sums = t.n * t.h * t.e, t.n * t.h * t.a * with_dhidden
    if not with_dhidden and t.fused:
        return HeadMemory(small + x, 0, "sweep", 1, t.n, "A")
    exps = t.rows * t.columns * t.apart * with_dhidden
    base = small + x + sums + t.tile + t.kept_product
    after = base + t.last_operands + exps
    moments = {"operands": base + t.operands + exps}
    base += t.x_rows + t.w
    moments |= {
        "logits": base + t.next_product + exps * t.several,
        "exponentials": base + exps * (1 + t.several) + t.slopes * with_dhidden,
    }
    if not with_dhidden:
        return _highest(moments, 0, 1, t.n, "A")
    dx = positions * t.h * t.e
    moments |= {
        "sums": base + exps + t.added,
        "label rows": after + t.label_rows,
        "backward": small + sums + dx + min(t.n, PUT_ROWS) * t.h * (t.a + t.e * (t.dtype != t.acc)),
    }
    return _highest(moments, dx, 2, t.n, "B")


def _recomputed(t: _Tiles, positions: int, small: int) -> HeadMemory:
    """D. Its forward is A's, with smaller tiles or equal ones."""
    x, dx_sum, dx, dw = (size * t.h for size in (t.n * t.e, t.n * t.a, positions * t.e, t.v * t.e))
    if t.n and t.exponentials:
        columns = min(t.v, t.k.recomputed_columns(t.n, t.v, t.h, t.device))
        sums = small + x + dx_sum + dw + columns * t.k.padded_rows(t.n) * t.e
        moments = {"sums": sums + _partial(t, t.n, columns), "cast": sums + x, "dX": small + dw + x + dx}
        moments["forward"] = _swept(t, positions, small, with_dhidden=False).peak
        return _highest(moments, dw + dx, 4, t.n, "D")
    d = t.rows * t.columns * t.apart
    base = small + x + dx_sum + dw + t.dw_sum(t.columns, True) + t.tile + t.kept_product
    after = base + t.last_operands + d
    moments = {"operands": base + t.operands + d}
    base += t.x_rows + t.w
    moments |= {
        "logits": base + t.next_product + d * t.several,
        "dlogits": base + d * (1 + t.several) + t.slopes,
        "dX sums": base + d + t.added,
        "dW": base + d + t.x_rows + t.dweight,
        "label rows": after + t.label_rows,
        "cast": after + (x if t.dtype != t.acc else 0),
        "dX": small + dw + x + dx,
    }
    moments["forward"] = _swept(t, positions, small, with_dhidden=False).peak
    return _highest(moments, dw + dx, 4, t.n, "D")


def _grouped(t: _Tiles, groups: list[Group], positions: int, small: int) -> HeadMemory:
    """C."""
    largest, alone = max(group.rows.stop - group.rows.start for group in groups), len(groups) == 1
    if t.exponentials:
        x, sums, dx, dw = (size * t.h for size in (t.n * t.e, t.n * t.a, positions * t.e, t.v * t.e))
        stored = groups[0].stored
        kept = paths.kept_bytes(t.k, largest, t.weight, t.acc, True, alone, stored).buffer
        base = small + x + sums + dw + (0 if alone else t.v * t.h * t.a) + kept + t.sums_of_rows
        moments = {"dX sums": base + _partial(t, largest, t.v), "cast": base + x}
        moments["dX"] = small + dw + x + dx
        products = 3 if stored is None else round(4 - stored / t.v, 2)
        return _highest(moments, dw + dx, products, t.n, "C")
    rows, columns, in_dw = paths._grouped_blocks(t.k, largest, t.weight, t.acc, alone)
    t.set_blocks(rows, columns)
    x, dx_sum, dx, dw = (size * t.h for size in (t.n * t.e, t.n * t.a, positions * t.e, t.v * t.e))
    logits = (largest - in_dw) * t.v * t.a
    scratch = in_dw * columns * t.operand.itemsize
    # dlogits of a block of columns; and of its last tile still when the next block's first is made
    d = max(largest - in_dw, 2 * rows * (in_dw < largest and columns < t.v)) * columns * t.apart
    base = small + x + dx_sum + dw + t.dw_sum(columns if alone else t.v, alone) + logits + scratch + t.w
    moments = {
        "operands": base + t.next_w + d,
        # the second sweep's first, beside the first one's last
        "operands again": base + t.made(_last(t.v, t.columns)),
        "logits": base + t.x_rows + t.kept_product + t.next_product + t.copy_of_kept,
        "dlogits": base + d + t.slopes,
        "dX sums": base + d + t.added,
        "dW": base + d + t.x_rows + t.dweight,
        "label rows": base + d + t.label_rows,
        "cast": base + d + (x if t.dtype != t.acc else 0),
        "dX": small + dw + x + dx,
    }
    return _highest(moments, dw + dx, 3, t.n, "C")


def _highest(moments: dict[str, int], returned: int, products: float, rows: int, path: str = "") -> HeadMemory:
    moment = max(moments, key=lambda name: moments[name])
    return HeadMemory(moments[moment], returned, moment, products, rows, path)


def eager_bytes(
    *,
    positions: int,
    hidden: int,
    vocab: int,
    dtype: torch.dtype,
    compute_dtype: torch.dtype | None = None,
    train_head: bool = True,
    backward: bool = True,
    softcap: bool = False,
) -> HeadMemory:
    """Logits of every position, as the original implementation of DPO has them: `logits.float().log_softmax(-1)`.

    A logit takes 4 bytes before and 4 after log_softmax. Its backward has three such tensors: what it left, the
    gradient that the gather spreads, and the logits' own; a softcap keeps its tanh in the compute dtype besides. After
    that these become gradients: dlogits cast to the compute dtype, dX and dW.
    """
    compute_dtype = dtype if compute_dtype is None else compute_dtype
    a, c, e = accumulate_dtype(compute_dtype).itemsize, compute_dtype.itemsize, dtype.itemsize
    logits = positions * vocab
    x, w = positions * hidden, vocab * hidden
    casts = (x + w) * c if compute_dtype != dtype else 0
    small = positions * POSITION_BYTES
    kept = logits * c if softcap else 0
    cast_logits = logits * c if c != a else 0
    moments = {
        "logits": small + casts + logits * a + cast_logits + kept * backward,
        "log_softmax": small + casts + 2 * logits * a + kept * backward,
    }
    if not backward:
        return _highest(moments, 0, 1, positions)
    dx, dw = x * e, w * e * train_head
    moments["log_softmax backward"] = small + casts + 3 * logits * a + kept
    formed = (x + w * train_head) * c
    moments["dX and dW"] = small + casts + logits * c + formed
    if compute_dtype != dtype:
        moments["dX and dW cast"] = small + w * train_head * c + dx + dw
    return _highest(moments, dx + dw, 3 if train_head else 2, positions)


# of trl.kernels.chunked_logprob and trl.trainer.utils, 1.15 and 1.16
TRL_ROWS, TRL_COLUMNS = 4096, 32768
# bytes that its torch functions hold for an entry of a tile in fp32, beside the tile
TRL_FORWARD, TRL_BACKWARD, TRL_SOFTCAP = 13, 29, 4


def trl_bytes(
    *,
    tokens: int,
    positions: int,
    hidden: int,
    vocab: int,
    dtype: torch.dtype,
    compute_dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    train_head: bool = True,
    backward: bool = True,
    softcap: bool = False,
) -> HeadMemory:
    """The head of TRL's `DPOTrainer` since 1.15, with the outputs that this asks for.

    A buffer of 4096 rows by 32768 columns in the compute dtype; in the backward dX and dW in fp32, for all rows, and at
    its end both once more in the dtype of the inputs. On a GPU the labelled rows alone go through it, copied, and
    kernels fold the buffer in place. Elsewhere all positions do, and PyTorch's functions hold, for an entry of a tile,

    - forward: logits 4, the positions before the target 1, exponentials 4, and their product with the logits 4;
    - backward: logits before and after scaling, their logarithms, probabilities and gradient 20, target mask 1, and two
      of what the gradient is added up from 8; with a softcap its tanh 4. Half-precision products for dX and dW then
      take the tile and its operands in fp32.
    """
    compute_dtype = dtype if compute_dtype is None else compute_dtype
    on_gpu = torch.device(device).type in ("cuda", "xpu")
    scored = tokens if on_gpu else positions
    c, e = compute_dtype.itemsize, dtype.itemsize
    n, v = min(scored, TRL_ROWS), min(vocab, TRL_COLUMNS)
    small = positions * POSITION_BYTES + scored * ROW_BYTES
    x = scored * hidden * e if on_gpu else 0
    converted = (n + v + min(v, vocab - v)) * hidden * c if compute_dtype != dtype else 0
    base = small + x + n * TRL_COLUMNS * c + converted
    moments = {"forward": base + (0 if on_gpu else n * v * TRL_FORWARD)}
    if not backward:
        return _highest(moments, 0, 1, scored)
    dx_sum, dw_sum = scored * hidden * 4, vocab * hidden * 4 * train_head
    dx, dw = positions * hidden * e, vocab * hidden * e * train_head
    base += dx_sum + dw_sum
    moments["backward"] = base
    if not on_gpu:
        wide = n * v * 4 + max(n, v) * hidden * 4 if c < 4 else 0
        moments["backward"] += max(n * v * (TRL_BACKWARD + TRL_SOFTCAP * softcap), wide)
    if e != 4:
        moments["cast"] = base + scored * hidden * e + dw
    moments["dX"] = small + dw + x + dx
    return _highest(moments, dx + dw, 4 if train_head else 3, scored)
