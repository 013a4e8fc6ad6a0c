"""Hopper's product x.W^T whose epilogue folds logits and stores none, and what the CUDA kernels are given: addresses
and sizes.

Dimensions: N labelled rows, H hidden size, V vocabulary size, K requested statistics.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import dpo_kernels._cuda as _cuda
from dpo_kernels.impl import waves
from dpo_kernels.impl.fold import stats_numbers
from dpo_kernels.impl.interface import FoundRows, LogitTransform


def address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def type_name(t: Tensor) -> str:
    return str(t.dtype).removeprefix("torch.")


def stream(t: Tensor) -> int:
    """The current one of its device. (On the CPU, where tests run the kernels, there is none.)"""
    return torch.cuda.current_stream(t.device).cuda_stream if t.device.type == "cuda" else 0


def matrix(t: Tensor) -> _cuda.Matrix:
    return _cuda.Matrix(address(t), t.shape[0], t.shape[1], t.stride(0))


def native(transform: LogitTransform) -> _cuda.Transform:
    scale, softcap, temperature = transform
    return _cuda.Transform(scale, softcap or 0.0, temperature)


def _machine(device: torch.device) -> tuple[bool, int]:
    """Whether it is a Hopper GPU, and its number of multiprocessors. What has no memory is asked for a plan: of the
    GPU that is here, or else of an H200."""
    if device.type == "cpu":  # the tests' emulation
        return True, 4
    if not torch.cuda.is_available():
        return True, waves.PLANNED
    if device.type == "meta":
        device = torch.device("cuda", torch.cuda.current_device())
    properties = torch.cuda.get_device_properties(device)
    return properties.major == 9, properties.multi_processor_count


def splits_of(n: int, v: int, multiprocessors: int) -> int:
    """How many parts of the vocabulary keep the clusters busiest."""
    clusters = max(1, multiprocessors // _cuda.CLUSTER_BLOCKS)
    return waves.splits_of(math.ceil(n / _cuda.CLUSTER_ROWS), math.ceil(v / _cuda.BLOCK_COLUMNS), clusters)


def rounded_bias(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if bias is None else bias.to(dtype).resolve_neg().contiguous()


def can_be_copied_in_boxes(t: Tensor, dtype: torch.dtype) -> bool:
    """What the tensor memory accelerator asks of a matrix."""
    rows = t.stride(0) >= t.shape[1] and t.stride(0) * t.itemsize % 16 == 0
    return t.dtype == dtype and t.stride(1) == 1 and rows and t.data_ptr() % 16 == 0 and not t.is_neg()


def can_fold(x: Tensor, weight: Tensor, compute_dtype: torch.dtype) -> bool:
    """Whether there is such a product for x [N, H] and weight [V, H] as they lie."""
    hopper, _ = _machine(x.device)
    half = compute_dtype in (torch.bfloat16, torch.float16)
    return hopper and half and all(can_be_copied_in_boxes(t, compute_dtype) for t in (x, weight))


def product(
    x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, first: int, transform: LogitTransform, splits: int
) -> _cuda.LinearProduct:
    """Of entries of the vocabulary that begin at `first`; `bias` [v] is contiguous, of the dtype of the operands."""
    return _cuda.LinearProduct(
        matrix(x), matrix(weight), address(bias), address(y), first, native(transform), splits
    )  # fmt: skip


class Sums(NamedTuple):
    """What the splits of the vocabulary leave of N rows, in fp32; the fields are those of csrc/cuda/kernels.h."""

    splits: Tensor  # [fields, splits, N]
    label: Tensor  # [fields, N]

    @classmethod
    def empty(cls, n: int, splits: int, stats: bool, like: Tensor) -> Sums:
        of_split, of_label = (
            (_cuda.PART_STATS_FIELDS, _cuda.LABEL_STATS_FIELDS) if stats else (_cuda.PART_FIELDS, _cuda.LABEL_FIELDS)
        )
        return cls(
            like.new_empty(of_split, splits, n, dtype=torch.float32), like.new_empty(of_label, n, dtype=torch.float32)
        )

    def of(self, rows: slice) -> Sums:
        return Sums(self.splits[:, :, rows], self.label[:, rows])

    @property
    def max(self) -> Tensor:
        """[splits, N], without the factor of `csrc/cuda/exponentials.cuh`."""
        return self.splits[0]

    def native(self) -> _cuda.Parts:
        splits, label = self.splits, self.label
        return _cuda.Parts(address(splits), splits.stride(1), splits.stride(0), address(label), label.stride(0))

    def join(
        self,
        vocab_size: int,
        transform: LogitTransform,
        stats: Sequence[str],
        *,
        shift: Tensor | None = None,
        far: float = 0.0,
        top: Tensor | None = None,
        scale: Tensor | None = None,
        label: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """logp [N], norm [2, N] and the statistics [K, N]; see `LinearLogps`. The others are those of
        `csrc/cuda/kernels.h`."""
        n = self.label.shape[1]
        logp, norm, values = (self.label.new_empty(*shape) for shape in ((n,), (2, n), (len(stats), n)))
        of_rows = (address(top), address(scale), address(label), 0, n)
        self._join(vocab_size, transform, stats, shift, far, (address(logp), address(norm), address(values)), of_rows)
        return logp, norm, values

    def join_at(
        self,
        found: FoundRows,
        vocab_size: int,
        transform: LogitTransform,
        stats: Sequence[str],
        *,
        shift: Tensor | None = None,
        far: float = 0.0,
        top: Tensor | None = None,
        scale: Tensor | None = None,
        label: Tensor | None = None,
    ) -> None:
        """logp and the statistics go to the rows' places in the tables of `found`."""
        to = (address(found.token_logps), 0, address(found.stats))
        of_rows = (address(top), address(scale), address(label), address(found.places), found.token_logps.numel())
        self._join(vocab_size, transform, stats, shift, far, to, of_rows)

    def _join(
        self,
        vocab_size: int,
        transform: LogitTransform,
        stats: Sequence[str],
        shift: Tensor | None,
        far: float,
        to: tuple[int, int, int],
        of_rows: tuple[int, int, int, int, int],
    ) -> None:
        with torch.cuda.device_of(self.label):
            _cuda.join(
                native(transform), self.native(), self.splits.shape[1], self.label.shape[1], vocab_size,
                stats_numbers(stats), address(shift), far, *to, *of_rows, stream(self.label),
            )  # fmt: skip


def fold(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    transform: LogitTransform,
    stats: bool,
    *,
    splits: int | None = None,
    far: Tensor | None = None,
) -> Sums:
    """Of all of x.W^T [N, V], for at least one row; in `splits` parts, or as many as suit the machine. `far`: as
    csrc/cuda/kernels.h has it."""
    _, multiprocessors = _machine(x.device)
    splits = splits or splits_of(x.shape[0], weight.shape[0], multiprocessors)
    sums = Sums.empty(x.shape[0], splits, stats, x)
    with torch.cuda.device_of(x):
        _cuda.linear_fold(
            type_name(x), product(x, weight, bias, y, 0, transform, splits), sums.native(), stats, address(far),
            multiprocessors, stream(x),
        )  # fmt: skip
    return sums
