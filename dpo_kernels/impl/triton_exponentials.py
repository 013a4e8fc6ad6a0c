"""What paths B, C and D of heads in bf16 are made of on Triton: `triton_shifted`, `triton_packed` and `triton_dlogits`
write exponentials, or the gradient of the logits, for other products; here is who launches them, and the end of dX.

Dimensions: N labelled rows, n of them in a block; H hidden size, V vocabulary size, v entries of a part of it; K
statistics. What is written lies as [v, n].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpo_kernels.impl import triton_linear, waves
from dpo_kernels.impl.exponentials import DLOGITS_BYTES, EXP_BYTES, FAR, FIRST_COLUMNS, padded_rows
from dpo_kernels.impl.interface import FoundRows, GradRows, LogitTransform
from dpo_kernels.impl.triton_dlogits import linear_dlogits_bwd_kernel
from dpo_kernels.impl.triton_join import FIELDS, STATS_FIELDS, TOP, Stored, join_splits
from dpo_kernels.impl.triton_linear import NUM_STAGES, NUM_WARPS
from dpo_kernels.impl.triton_math import run, transform_constants
from dpo_kernels.impl.triton_packed import exp_dlogits_kernel, linear_pack_fwd_kernel
from dpo_kernels.impl.triton_shifted import linear_exp_fwd_kernel

# A square of path B's exponentials stays far within fp32 as one of its part 2^-40.
SQUARED = 2.0**-40
# Columns of a block of products that become what is written at a time.
PIECE_COLUMNS = 32
# Of a thread: all that it can have. Without a limit, assemblers choose lower ones, and spill.
MAX_REGISTERS = 255
BLOCK_ROWS, MAX_BLOCK_H = 4, 1024
DLOGITS_BLOCK_V, DLOGITS_BLOCK_N = 8, 512
# Blocks of rows that path D's programs take by turns before they go to the next columns: what runs at the same time
# then reads about as much of x as of W.
GROUP = 16


@triton.jit(do_not_specialize=["N"], do_not_specialize_on_alignment=["y_ptr", "scale_ptr", "label_ptr"])
def dhidden_kernel(
    sums_ptr, w_ptr, y_ptr, scale_ptr, label_ptr, out_ptr, stride_wv, N, H, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr
):
    """scale (sums + label W_y), or without a scale; sums and out [N, H] may be the same."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    is_row = n < N
    inside = is_row[:, None] & (h < H)[None, :]
    y = tl.load(y_ptr + n, mask=is_row, other=0)
    w = tl.load(w_ptr + y[:, None] * stride_wv + h[None, :], mask=inside, other=0.0).to(tl.float32)
    place = n[:, None] * H + h[None, :]
    label = tl.load(label_ptr + n, mask=is_row, other=0.0)[:, None]
    d = tl.load(sums_ptr + place, mask=inside, other=0.0) + label * w
    if scale_ptr is not None:
        d *= tl.load(scale_ptr + n, mask=is_row, other=0.0)[:, None]
    tl.store(out_ptr + place, d.to(out_ptr.dtype.element_ty), mask=inside)


class _Part(NamedTuple):
    """Entries of the vocabulary whose exponentials lie in one tensor."""

    first: int
    weight: Tensor  # [v, H]
    bias: Tensor | None  # [v]
    blocks: int
    first_block: int
    first_split: int
    splits: int


def takes_exponentials(x_dtype: torch.dtype, weight: Tensor, compute_dtype: torch.dtype) -> bool:
    """Whether exponentials are in range as numbers of this dtype, and rows x of it and weight [V, H] can be read."""
    bf16 = x_dtype == weight.dtype == compute_dtype == torch.bfloat16
    known = weight.device.type in ("cuda", "cpu", "meta")  # a plan has no memory
    return bf16 and known and weight.shape[0] > 0 and triton_linear.can_take(weight, weight, compute_dtype)


def _columns(device: torch.device, plain: bool) -> int:
    """Of a block: registers hold less beside a softcap's logits and their slopes."""
    hopper, _ = triton_linear._machine(device)
    return triton_linear.block_v(False, not plain, hopper)


def pieces(columns: int, softcap: bool) -> int:
    """Of so many columns: smaller ones beside a softcap's logits and their slopes."""
    return max(1, columns // (PIECE_COLUMNS // 2 if softcap else PIECE_COLUMNS))


def packed_pieces(columns: int, softcap: bool, ampere: bool) -> int:
    """The same of path C. Ampere's tensor cores share a row among many threads, who put each piece's sums together."""
    count = pieces(columns, softcap)
    return max(1, count // 2) if ampere and not softcap else count


def shifted_pieces(columns: int) -> int:
    """The same of path B: with smaller ones a softcap's loop gets longer."""
    return max(4, columns // PIECE_COLUMNS)


def shift_columns(device: torch.device) -> int:
    """How many entries of the vocabulary share a shift of packed exponentials."""
    return _columns(device, True)


def exponential_rows(n: int, v: int, h: int, device: torch.device) -> int:
    """How many rows of exponentials path B has at a time."""
    _, multiprocessors = triton_linear._machine(device)
    return waves.rows_at_a_time(n, v, h, multiprocessors, EXP_BYTES)


def recomputed_columns(n: int, v: int, h: int, device: torch.device) -> int:
    """How many vocabulary entries of the gradient of n rows path D has at a time."""
    _, multiprocessors = triton_linear._machine(device)
    return waves.columns_at_a_time(n, v, h, multiprocessors, DLOGITS_BYTES)


def _readable(x: Tensor, weight: Tensor) -> Tensor:
    return x if triton_linear.can_take(x, weight, x.dtype) else x.resolve_neg().contiguous()


def _row_blocks(rows: int) -> int:
    return triton.cdiv(rows, triton_linear.BLOCK_N)


def _constants(transform: LogitTransform, bias: Tensor | None, columns: int) -> dict[str, Any]:
    # Other backends have no such limit.
    registers = {"maxnreg": MAX_REGISTERS} if torch.version.cuda else {}
    return registers | {
        **transform_constants(transform), "HAS_BIAS": bias is not None, "BLOCK_N": triton_linear.BLOCK_N,
        "BLOCK_V": columns, "BLOCK_H": triton_linear.BLOCK_H, "num_warps": NUM_WARPS, "num_stages": NUM_STAGES,
    }  # fmt: skip


def _dhidden(sums: Tensor, weight: Tensor, y: Tensor, scale: Tensor | None, label: Tensor, out: Tensor) -> Tensor:
    (n, h), block_h = sums.shape, min(triton.next_power_of_2(sums.shape[1]), MAX_BLOCK_H)
    assert sums.is_contiguous() and out.is_contiguous()
    run(
        dhidden_kernel, (triton.cdiv(n, BLOCK_ROWS), triton.cdiv(h, block_h)), sums,
        sums, weight, y, scale, label, out, weight.stride(0), n, h, BLOCK_N=BLOCK_ROWS, BLOCK_H=block_h,
    )  # fmt: skip
    return out


class Exponentials:
    """See `interface.Exponentials`."""

    def __init__(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, transform: LogitTransform,
        stats: Sequence[str], rows: int, sizes: Sequence[int], packed: bool,
    ):  # fmt: skip
        self.x = _readable(x, weight)
        self.y, self.weight, self.transform, self.names = y.contiguous(), weight, transform, tuple(stats)
        self.packed, self.rows = packed, rows
        _, multiprocessors = triton_linear._machine(x.device)
        # The same with statistics and without: a reference, which has none, is summed as its policy is.
        self.columns = _columns(x.device, packed or transform.softcap is None)
        n, v = x.shape[0], weight.shape[0]
        bias = None if bias is None else bias.to(weight.dtype).resolve_neg().contiguous()
        self.constants = _constants(transform, bias, self.columns)
        self.parts, first, self.blocks, self.splits = list[_Part](), 0, 0, 0
        for size in sizes:
            blocks = triton.cdiv(size, self.columns)
            splits = waves.splits_of(_row_blocks(rows), blocks, multiprocessors)
            here = slice(first, first + size)
            of_bias = None if bias is None else bias[here]
            self.parts.append(_Part(first, weight[here], of_bias, blocks, self.blocks, self.splits, splits))
            first, self.blocks, self.splits = first + size, self.blocks + blocks, self.splits + splits
        assert first == v
        self.sums = x.new_empty(STATS_FIELDS if stats else FIELDS, self.splits, n, dtype=torch.float32)
        self.joint, self.scale, self.label, self.missing = x.new_empty(4, n, dtype=torch.float32)
        self.shifts: Tensor | None = None  # [blocks, rows], of packed exponentials
        if not packed:
            self.shift = self._largest_of_first(bias)

    def _largest_of_first(self, bias: Tensor | None) -> Tensor:
        """[N] path B's shifts."""
        n, some = self.x.shape[0], slice(0, min(self.weight.shape[0], FIRST_COLUMNS))
        found = self.x.new_empty(FIELDS, 1, n, dtype=torch.float32)
        run(
            triton_linear.linear_fold_fwd_kernel, (_row_blocks(n), 1), self.x,
            self.x, self.weight[some], None if bias is None else bias[some], self.y, found, None,
            self.x.stride(0), self.weight.stride(0), n, some.stop, self.x.shape[1], STATS=False, **self.constants,
        )  # fmt: skip
        return found[TOP.value, 0]

    def write(self, rows: slice, out: Sequence[Tensor | None] | None) -> None:
        if not self.packed:
            count = shifted_pieces(self.columns)
            for again in (False, True):
                self._write(
                    linear_exp_fwd_kernel, rows, out, self.shift[rows],
                    [(self.splits,)] * len(self.parts), AGAIN=again, FAR=FAR, SQUARED=SQUARED, PIECES=count,
                )  # fmt: skip
            return
        if out is None:
            shifts = self.x.new_empty(1, 16, dtype=torch.float32)
        else:
            if self.shifts is None:
                blocks = sum(triton.cdiv(e.shape[0], self.columns) for e in out if e is not None)
                self.shifts = self.x.new_empty(blocks, padded_rows(self.rows), dtype=torch.float32)
            shifts, out = self.shifts, [None if e is None else e.view(torch.float16) for e in out]
        of_parts = [(shifts.stride(0), part.first_block) for part in self.parts]
        count = packed_pieces(self.columns, self.transform.softcap is not None, triton_linear.is_ampere(self.x.device))
        self._write(linear_pack_fwd_kernel, rows, out, shifts, of_parts, PIECES=count)

    def _write(
        self, kernel: Any, rows: slice, out: Sequence[Tensor | None] | None, shift: Tensor,
        of_parts: Sequence[tuple[int, ...]], **constants: Any,
    ) -> None:  # fmt: skip
        x, n = self.x[rows], rows.stop - rows.start
        # to where nothing is written: another kernel might round otherwise
        nowhere = x.new_empty(1, 16, dtype=torch.float16 if self.packed else x.dtype)
        places = [None] * len(self.parts) if out is None else out
        for part, place, of_part in zip(self.parts, places, of_parts, strict=True):
            e = nowhere if place is None else place
            run(
                kernel, (_row_blocks(n), part.splits), x,
                x, part.weight, part.bias, self.y[rows], shift, self.sums[:, :, rows], e,
                x.stride(0), part.weight.stride(0), e.stride(0), self.x.shape[0], self.sums.stride(0),
                n, part.weight.shape[0], x.shape[1], part.first, part.first_split,
                0 if place is None else padded_rows(n), *of_part, STATS=bool(self.names), **constants, **self.constants,
            )  # fmt: skip

    def finish(self, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        n = rows.stop - rows.start
        logp, norm = self.scale.new_empty(n), self.scale.new_empty(2, n)
        stats = self.scale.new_empty(len(self.names), n)
        self._join(rows, logp, stats, norm=norm)
        return logp, norm, stats

    def finish_at(self, found: FoundRows) -> None:
        self._join(slice(0, len(found.y)), found.token_logps, found.stats, places=found.places)

    def _join(self, rows: slice, logp: Tensor, stats: Tensor, **to: Tensor) -> None:
        join_splits(
            self.sums[:, :, rows], logp, stats, self.weight.shape[0], self.transform, self.names, **to,
            stored=Stored(self.joint[rows], self.scale[rows], self.label[rows]),
            squared=1.0 if self.packed else SQUARED,
        )  # fmt: skip

    def weigh(self, e: Sequence[Tensor], rows: slice, g: Tensor) -> None:
        assert self.shifts is not None
        n, g = rows.stop - rows.start, g.contiguous()
        for part, each in zip(self.parts, e, strict=False):
            run(
                exp_dlogits_kernel, (part.blocks, triton.cdiv(padded_rows(n), DLOGITS_BLOCK_N)), each,
                each.view(torch.float16), each, self.y[rows], g, self.shifts, self.joint[rows], self.scale[rows],
                self.label[rows], self.missing[rows], each.stride(0), self.shifts.stride(0), n, each.shape[0],
                part.first, part.first_block, padded_rows(n),
                COLUMNS=self.columns, BLOCK_N=DLOGITS_BLOCK_N, BLOCK_V=DLOGITS_BLOCK_V, num_warps=4,
            )  # fmt: skip

    def dhidden(self, sums: Tensor, out: Tensor) -> Tensor:
        scale, label = (None, self.missing) if self.packed else (self.scale, self.label)
        return _dhidden(sums, self.weight, self.y, scale, label, out)


class Recomputed:
    """See `interface.Recomputed`."""

    def __init__(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, of: GradRows, transform: LogitTransform,
        missing: Tensor | None = None,
    ):  # fmt: skip
        self.x, self.weight, self.transform = _readable(x, weight), weight, transform
        self.bias = None if bias is None else bias.to(weight.dtype).resolve_neg().contiguous()
        self.y, self.norm, self.logp, self.g = (t.contiguous() for t in of)
        self.missing = torch.empty_like(self.logp) if missing is None else missing
        columns = shift_columns(x.device)
        self.constants = _constants(transform, bias, columns)
        self.constants["PIECES"] = pieces(columns, transform.softcap is not None)

    def write(self, block: slice, out: Tensor) -> None:
        (n, h), v = self.x.shape, block.stop - block.start
        assert out.shape == (v, n) and out.stride() == (padded_rows(n), 1)
        weight, bias = self.weight[block], None if self.bias is None else self.bias[block]
        run(
            linear_dlogits_bwd_kernel, (_row_blocks(n) * triton.cdiv(v, self.constants["BLOCK_V"]),), self.x,
            self.x, weight, bias, self.y, self.norm, self.logp, self.g, self.missing, out,
            self.x.stride(0), weight.stride(0), out.stride(0), self.norm.stride(0), n, v, h, block.start,
            padded_rows(n), SLOPE=self.transform.slope, GROUP=GROUP, **self.constants,
        )  # fmt: skip

    def dhidden(self, sums: Tensor, out: Tensor) -> Tensor:
        return _dhidden(sums, self.weight, self.y, None, self.missing, out)
