"""Predicts, without one, what the paths take on a GPU: launches, bytes, products and how well these fill the machine.

    python benchmarks/gpu_model.py                                     # the four sizes of gpu.py's targets, an H200
    python benchmarks/gpu_model.py --rows 8192 --hidden 4096 --vocab 128256 --gpu H100 --impl cuda --launches

Predictions, not results: `x g` is the time over that of one product [N, H] x [H, V] of the library, in bf16 with all
rows labelled. *best* is what comes if kernels of ours that multiply run at the library's rate and their epilogues, and
sums that products read and write, hide behind them; *expected* takes the shares of ASSUMED. Shapes are those that the
code itself chooses (dpo_kernels/impl/waves.py, paths.py, exponential_paths.py); tests count that it launches what is
listed here.

Dimensions: N labelled rows, n of a block; H hidden size, V vocabulary size, v entries of a part of it.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from dpo_kernels.bench.report import aligned
from dpo_kernels.comparisons import Halves
from dpo_kernels.dispatch import load
from dpo_kernels.impl import exponential_paths, paths, waves
from dpo_kernels.impl.exponentials import DLOGITS_BYTES, EXP_BYTES, FIRST_COLUMNS
from dpo_kernels.impl.interface import Rows
from dpo_kernels.linear_dpo import DEFAULT_CHUNK_BYTES
from dpo_kernels.pair_groups import plan_groups


class GPU(NamedTuple):
    multiprocessors: int
    peak: float
    """FLOP/s of dense products in bf16, data sheet."""
    bandwidth: float
    """Bytes/s, data sheet."""
    clock: int
    """FLOP of such products a clock and multiprocessor."""
    cache: int
    """Bytes of the second level."""
    sm_90a: bool = False


MIB = 2**20
# NVIDIA's data sheets and architecture white papers
GPUS = {
    "H200": GPU(132, 989e12, 4.8e12, 4096, 50 * MIB, True),
    "H100": GPU(132, 989e12, 3.35e12, 4096, 50 * MIB, True),  # SXM
    "H100-PCIe": GPU(114, 756e12, 2.0e12, 4096, 50 * MIB, True),
    "A100": GPU(108, 312e12, 2.04e12, 2048, 40 * MIB),  # 80 GB, SXM
    "B200": GPU(148, 2250e12, 8.0e12, 8192, 126 * MIB),
    "L40S": GPU(142, 362e12, 0.864e12, 1024, 96 * MIB),
}
# What is reached of these by the library and by copying: 790 TFLOP/s and 4.3 TB/s of an H200.
OF_PEAK, OF_BANDWIDTH = 0.8, 0.9


class Assumed(NamedTuple):
    """What arithmetic cannot know."""

    rate: float
    """Of products whose epilogue is ours, in the library's."""
    exposed: float
    """Of these epilogues: what does not hide behind other products."""


# CUDA: two groups of warps, one of which may fold while the other multiplies; W in multicast boxes. Triton: all warps
# wait for the product, and W comes to each multiprocessor by itself, 9.3 TB/s of the second-level cache at full rate.
ASSUMED = {"cuda": Assumed(1.0, 0.5), "triton": Assumed(0.85, 1.0), "tiles": Assumed(1.0, 1.0)}
# A launch takes this at least, with what it does.
LAUNCH = 3e-6
# Clocks of a multiprocessor for an entry of an epilogue: an exponential (16 a clock); 14 others (128 a clock), which
# writing it takes besides.
FOLD, WRITE = 1 / 16, 14 / 128
# Small kernels of PyTorch's: of DPO's loss of pairs, with its slopes, on path D; and on path C, of rows that are sorted
# by parts.
OF_LOSS, SORTED = 25, 8
# What logits of a tile take.
TILE_BYTES = 2**27
CLUSTER, ROWS_TOGETHER = 2, 8  # of csrc/cuda/linear_fold.cu
GRADIENTS_TOGETHER = 8  # of csrc/cuda/linear_gradients.cu
PAIRS = 8  # that rows are spread over
FIELDS, STATE_FIELDS = 8, 6  # of each row and split, in fp32; of each row and tile, in fp64
# Rows that a multiprocessor reads at a time on path E.
ROWS_AT_ONCE = 4
TARGETS = {"A": 1.04, "B": 2.15, "C, 4 GiB": 3.25}
TARGET_OF_COPY = 90.0
SIZES = [(8192, h, v) for h in (4096, 2048) for v in (128256, 151936)]  # N, H, V


class Launch(NamedTuple):
    """Launches that are alike, of a kernel or of an operator of PyTorch's."""

    name: str
    count: int = 1
    bytes: float = 0
    """Of memory, each."""
    rounds: float = 0
    """Multiply-adds of the busiest multiprocessor, in products."""
    product: tuple[int, int, int] | None = None  # [m, k] x [k, n]
    own: bool = False
    """Whether the product's epilogue is ours."""
    epilogue: float = 0
    """Clocks of a multiprocessor for each entry."""
    sums: float = 0
    """Bytes that a product reads and writes beside its operands and results: fp32 sums that it adds to."""


class Weight(NamedTuple):
    """In the place of a tensor [V, H] that is not there."""

    shape: tuple[int, int]
    device: torch.device
    dtype: torch.dtype = torch.bfloat16

    def numel(self) -> int:
        return math.prod(self.shape)


class Prediction(NamedTuple):
    gpu: GPU
    impl: str
    size: tuple[int, int, int]
    launches: list[Launch]

    @property
    def count(self) -> int:
        return sum(launch.count for launch in self.launches)

    @property
    def bytes(self) -> float:
        return sum(launch.count * (launch.bytes + launch.sums) for launch in self.launches)

    def seconds(self, best: bool) -> float:
        return sum(launch.count * self.of(launch, best) for launch in self.launches)

    def of(self, launch: Launch, best: bool) -> float:
        """Seconds of one of these launches."""
        gpu, assumed = self.gpu, ASSUMED[self.impl]
        time = launch.rounds * 2 * gpu.multiprocessors / (gpu.peak * OF_PEAK)
        if launch.own and not best:
            time /= assumed.rate
        if launch.product is not None and not best:
            m, _, n = launch.product
            time += assumed.exposed * m * n * launch.epilogue * gpu.clock / gpu.peak
            time += launch.sums / (gpu.bandwidth * OF_BANDWIDTH)
        return max(time, (launch.bytes + launch.sums) / (gpu.bandwidth * OF_BANDWIDTH), LAUNCH)

    def over_g(self, best: bool = False) -> float:
        n, h, v = self.size
        g = waves.product_time(n, h, v, self.gpu.multiprocessors) * 2 * self.gpu.multiprocessors
        return self.seconds(best) * self.gpu.peak * OF_PEAK / g

    def of_copy(self, backward: bool = False) -> float:
        """Path E: percent of the bandwidth of a copy."""
        n, _, v = self.size
        passes = 3 if backward else 1
        return 100 * passes * 2 * n * v / (self.gpu.bandwidth * OF_BANDWIDTH) / self.seconds(best=False)

    @property
    def efficiency(self) -> float:
        """Of the multiprocessors' time in products, what is work."""
        products = [launch for launch in self.launches if launch.product is not None]
        work = sum(launch.count * math.prod(launch.product or ()) for launch in products)
        return work / self.gpu.multiprocessors / max(1, sum(launch.count * launch.rounds for launch in products))


class Model:
    """Of heads in bf16: N rows, all labelled; `cuda` on Hopper, `triton` anywhere, `tiles` of logits elsewhere."""

    def __init__(self, gpu: GPU, impl: str, n: int, h: int, v: int):
        self.gpu, self.impl, self.n, self.h, self.v = gpu, impl, n, h, v
        self.cluster = CLUSTER if impl == "cuda" else 1
        # where tiles are cut as on a GPU; exponentials are asked of a device that is there, or of a plan
        self.weight: Any = Weight((v, h), torch.device("cuda" if impl == "tiles" else "meta"))
        self.k = load("triton")  # whose exponentials lie as the CUDA ones do, and whose tiles are as large

    # What there is to launch

    def fused(self, name: str, n: int, v: int, epilogue: float, written: float = 0) -> Launch:
        """A product [n, H] x [H, v] with an epilogue of ours. W comes from memory once for all rows that take turns."""
        groups = _over(n, waves.TILE_ROWS * self.cluster)
        passes = _over(groups, ROWS_TOGETHER) if self.impl == "cuda" else 1
        parts = 4 * FIELDS * n * self.splits(n, v)
        moved = 2 * self.h * (passes * v + n * self.reads_of_x(n, v)) + written + parts
        time = waves.fold_time(n, v, self.h, self.gpu.multiprocessors, self.cluster)
        return Launch(name, 1, moved, time, (n, self.h, v), True, epilogue)

    def splits(self, n: int, v: int) -> int:
        groups, units = _over(n, waves.TILE_ROWS * self.cluster), self.gpu.multiprocessors // self.cluster
        return waves.splits_of(groups, _over(v, waves.TILE_COLUMNS), units)

    def reads_of_x(self, n: int, v: int) -> int:
        """How often x comes from memory: once, or where it does not stay in the second-level cache beside W, for each
        block of columns."""
        rows = waves.TILE_ROWS * self.cluster
        groups, units = _over(n, rows), self.gpu.multiprocessors // self.cluster
        together = min(ROWS_TOGETHER if self.impl == "cuda" else groups, groups)
        fits = waves.groups_together(groups, self.h, rows, units, self.gpu.cache) >= together
        return 1 if fits else _over(v, waves.TILE_COLUMNS)

    def product(self, m: int, k: int, n: int, out_bytes: int, accumulate: bool = False) -> list[Launch]:
        """The library's; a long sum in parts, which are then added."""
        in_parts = not accumulate and out_bytes == 4
        parts = waves.sum_parts(m, k, n, self.gpu.multiprocessors) if in_parts and k >= 2**14 else 1
        time = waves.product_rounds(m, n, self.gpu.multiprocessors, parts) * waves.TILE * k / parts
        moved = 2 * k * (m + n) + max(out_bytes, 4 * (parts > 1)) * m * n * parts
        sums = 8 * m * n if accumulate else 0
        found = [Launch("product", 1, moved, time, (m, k, n), sums=sums)]
        return found + [Launch("sum", 1, 4 * m * n * (parts + 1))] * (parts > 1)

    def found(self) -> list[Launch]:
        """Labelled rows are found and checked, where the host knows their number."""
        return [Launch("rows_kernel")]

    def compaction(self) -> list[Launch]:
        """Their hidden states are copied together."""
        return [*self.found(), Launch("gather_rows_kernel", 1, 4 * self.n * self.h)]

    def put_back(self) -> Launch:
        """Log-probabilities go to their places."""
        return Launch("index_put_")

    def dhidden_of_positions(self) -> list[Launch]:
        """From the gradient of rows to that of all positions."""
        return [Launch("new_zeros", 1, 2 * self.n * self.h), Launch("index_put_", 1, 4 * self.n * self.h)]

    def join(self, n: int) -> Launch:
        return Launch("join_kernel", 1, 4 * FIELDS * n * self.splits(n, self.v))

    def dhidden(self, out_bytes: int) -> Launch:
        """sums + label W_y"""
        return Launch("dhidden_kernel", 1, (4 + 2 + out_bytes) * self.n * self.h)

    def backward(self) -> list[Launch]:
        """What path B leaves for the backward: dX goes to its positions, times the gradient of its row, rounded."""
        return [Launch("new_zeros", 1, 2 * self.n * self.h), Launch("put_rows_kernel", 1, 6 * self.n * self.h)]

    # Paths

    def path_a(self) -> list[Launch]:
        if self.impl == "tiles":
            return self.tiles_a()
        # Triton's reads hidden states where they lie
        found = self.found() if self.impl == "triton" else self.compaction()
        return [*found, *self.folded(), Launch("sum_tokens")]

    def folded(self) -> list[Launch]:
        return [self.fused("linear_fold_fwd_kernel", self.n, self.v, FOLD), self.join(self.n)]

    def path_b(self) -> list[Launch]:
        if self.impl == "tiles":
            return self.tiles_b()
        rows = waves.rows_at_a_time(self.n, self.v, self.h, self.gpu.multiprocessors, EXP_BYTES, self.cluster)
        swept = self.exponentials_b(rows)
        return [*self.compaction(), *swept, Launch("sum_tokens"), *self.backward()]

    def exponentials_b(self, rows: int) -> list[Launch]:
        """Blocks of so many rows: exponentials are written, some again, and one product takes them."""
        found = [self.fused("linear_fold_fwd_kernel", self.n, min(FIRST_COLUMNS, self.v), FOLD)]
        for count, n in _blocks(self.n, rows):
            written = self.fused("linear_exp_fwd_kernel", n, self.v, WRITE, 2 * self.v * self.k.padded_rows(n))
            again = Launch("linear_exp_fwd_kernel", 1, 4 * n * self.splits(n, self.v))
            block = [written, again, *self.product(n, self.v, self.h, 4)]
            found += [launch._replace(count=count * launch.count) for launch in block]
        return [*found, self.join(self.n), self.dhidden(4)]

    def chunks(self, chunk_bytes: int) -> tuple[list[int], int | None]:
        """Rows of path C's, of pairs that are alike; none where path D is taken. Of how many vocabulary entries
        exponentials are stored; None: of all."""
        pair = torch.arange(self.n) % PAIRS
        options = {"dweight": True, "exponentials": self.impl != "tiles"}
        comparisons = Rows(pair, pair), Halves(PAIRS)
        groups = plan_groups(*comparisons, self.weight, torch.float32, chunk_bytes, "triton", **options)
        groups = groups or []
        return [group.rows.stop - group.rows.start for group in groups], groups[0].stored if groups else None

    def path_c(self, chunk_bytes: int = DEFAULT_CHUNK_BYTES) -> list[Launch]:
        chunks, stored = self.chunks(chunk_bytes)
        if not chunks:
            return [*self.path_d(), Launch("loss", OF_LOSS)]
        swept = self.tiles_c(chunks) if self.impl == "tiles" else self.exponentials_c(chunks, stored)
        found = [*self.compaction(), *[Launch("sorted", SORTED)] * (len(chunks) > 1)]
        compared = [Launch("compare_kernel", len(chunks), 50 * self.n // len(chunks))]
        return [*found, *swept, *compared, *self.scaled_gradients(), *self.dhidden_of_positions()]

    def exponentials_c(self, chunks: list[int], stored: int | None = None) -> list[Launch]:
        """Chunks of so many rows: exponentials are written, become dlogits, and two products take them; on CUDA they
        become dlogits on their way into two products of ours. Those of a single chunk lie in the memory of dW as far as
        they fit. What is not `stored` is computed again."""
        alone, h, stored = len(chunks) == 1, self.h, self.v if stored is None else stored
        stride = self.k.padded_rows(max(chunks))
        kept = exponential_paths.kept_columns(self.k, max(chunks), self.weight) if alone else 0
        step = waves.TILE_COLUMNS if self.impl == "cuda" else self.k.shift_columns(self.weight.device)
        blocks = [
            block.stop - block.start for block in exponential_paths.dw_blocks(self.v, h, kept, stride, step, stored)
        ]
        found = []
        for i, n in enumerate(chunks):
            parts = exponential_paths.part_sizes(stored, kept)
            logits = [size * self.k.padded_rows(n) for size in parts]
            found += [
                self.fused("linear_pack_fwd_kernel", n, size, WRITE, 2 * of)
                for size, of in zip(parts, logits, strict=True)
            ]
            if stored < self.v:
                found.append(self.fused("linear_pack_fwd_kernel", n, self.v - stored, FOLD))
            found.append(self.join(n))
            if self.impl == "cuda":
                together = 1
                if stored >= 2**14:
                    together = waves.sum_parts(n, stored, h, self.gpu.multiprocessors, self.cluster)
                found += [
                    Launch("weigh_kernel", 1, 8 * n * _over(stored, step)),
                    self.gradient(n, stored, 4 * n * h, 0, together),
                ]
                found += [Launch("sum", 1, 4 * n * h * (together + 1))] * (together > 1)
                sums = 0 if alone or i == 0 else 8
                written = 2 if alone else 0 if sums else 4
                found += [self.gradient(size, n, written * size * h, sums * size * h) for size in blocks]
                continue
            found += [Launch("exp_dlogits_kernel", 1, 4 * of) for of in logits]
            for part, size in enumerate(parts):
                found += self.product(n, size, h, 4, accumulate=part > 0)
            for size in blocks:
                found += self.product(size, n, h, 2 if alone else 4, accumulate=i > 0)
        if stored < self.v:
            found += self.recomputed(self.v - stored, True)
        return [*found, self.dhidden(2), *[self.rounding()] * (not alone)]

    def gradient(self, m: int, k: int, written: float, sums: float = 0, parts: int = 1) -> Launch:
        """A product [m, k] x [k, H] of exponentials that it weighs, in so many parts of its sum. Weighing hides behind
        the products of the stage before. What does not: of each tile the first stage, which nothing is before, about
        300 clocks; and that its results are stored, about 700, while both groups of warps are done with it. Of a tile's
        2^15 entries a 32nd of a clock each, of which nothing hides."""
        rows, columns = _over(m, waves.TILE_ROWS * self.cluster), _over(self.h, waves.TILE_COLUMNS)
        rounds = waves.product_rounds(m, self.h, self.gpu.multiprocessors, parts, self.cluster) * waves.TILE * k / parts
        read = 2 * k * (m * _over(columns, GRADIENTS_TOGETHER) + self.h * _over(rows, GRADIENTS_TOGETHER))
        epilogue = 1 / 32 / ASSUMED[self.impl].exposed
        return Launch("linear_gradient_kernel", 1, read + parts * written, rounds, (m, k, self.h), True, epilogue, sums)

    def scaled_gradients(self) -> list[Launch]:
        """The loss's own gradient: dX and dW are multiplied by it, in place, unless it is 1."""
        unless_one = 0 if self.impl in ("cuda", "triton") else 4
        return [Launch("scale_", 1, unless_one * size) for size in (self.n * self.h, self.v * self.h)]

    def path_d(self) -> list[Launch]:
        if self.impl == "tiles":
            return self.tiles_d()
        forward = [*self.compaction(), *self.folded(), self.put_back(), Launch("sum_tokens")]
        return [*forward, Launch("index"), *self.recomputed_d(), *self.dhidden_of_positions()]

    def recomputed_d(self) -> list[Launch]:
        return [*self.recomputed(self.v, False), self.dhidden(2)]

    def recomputed(self, of: int, accumulate: bool) -> list[Launch]:
        """Blocks of so much of the vocabulary: dlogits are written, and two products take them."""
        n, h, found = self.n, self.h, list[Launch]()
        columns = waves.columns_at_a_time(n, of, h, self.gpu.multiprocessors, DLOGITS_BYTES, self.cluster)
        first = min(columns, of)
        for count, v in [(1, first), *_blocks(of - first, columns)]:
            written = self.fused("linear_dlogits_kernel", n, v, FOLD, 2 * v * self.k.padded_rows(n))
            sums = accumulate or bool(found)
            block = [written, *self.product(v, n, h, 2), *self.product(n, v, h, 4, accumulate=sums)]
            found += [launch._replace(count=count * launch.count) for launch in block]
        return found

    def path_e(self, backward: bool = False) -> list[Launch]:
        """A row is read once; with the backward again, and its gradient written. The last rows leave some
        multiprocessors without work."""
        rounds = _over(self.n, self.gpu.multiprocessors * ROWS_AT_ONCE) * self.gpu.multiprocessors * ROWS_AT_ONCE
        moved = 2 * self.v * rounds
        found = [Launch("rows", 1, moved), Launch("_assert_async"), Launch("sum_tokens")]
        return [*found, Launch("sum_gradient"), Launch("dlogits", 1, 2 * moved)] if backward else found

    # Tiles of fp32 logits, where no kernel of ours multiplies: a product writes one, a kernel reads it

    def tiled(self, rows: int, of: int, columns: int, each: Callable[[int, int], list[Launch]]) -> list[Launch]:
        """Of so many rows, in blocks of some of them and of some columns."""
        found = []
        for row_count, n in _blocks(rows, of):
            for column_count, v in _blocks(self.v, columns):
                tile = [*self.product(n, self.h, v, 4), *each(n, v)]
                found += [launch._replace(count=row_count * column_count * launch.count) for launch in tile]
        return found

    def state(self, n: int) -> int:
        """Bytes of a fold's state, read and written."""
        return 2 * 8 * STATE_FIELDS * n

    def rounding(self) -> Launch:
        """Of sums of dW."""
        return Launch("copy_", 1, 6 * self.v * self.h)

    def tiles_a(self) -> list[Launch]:
        blocks = paths._traffic_blocks(self.n, self.v, torch.float32, TILE_BYTES)
        swept = self.tiled(self.n, *blocks, lambda n, v: [Launch("fold", 1, 4 * n * v + self.state(n))])
        return [*self.compaction(), *swept, Launch("finish"), self.put_back(), Launch("sum_tokens")]

    def tiles_b(self) -> list[Launch]:
        def each(n: int, v: int) -> list[Launch]:
            folded = Launch("fold_exp", 1, 6 * n * v + self.state(n))
            return [folded, *self.product(n, v, self.h, 4, accumulate=True)]

        blocks = paths._traffic_blocks(self.n, self.v, torch.float32, TILE_BYTES)
        label_rows = Launch("label rows", 2 * _over(self.n, paths.LABEL_ROWS), 16 * paths.LABEL_ROWS * self.h)
        swept = [
            *self.tiled(self.n, *blocks, each),
            Launch("finish"),
            Launch("mul_", 1, 8 * self.n * self.h),
            label_rows,
        ]
        return [*self.compaction(), *swept, self.put_back(), Launch("sum_tokens"), *self.backward()]

    def gradients(self, n: int, v: int, only: bool) -> list[Launch]:
        """dlogits of a tile that is read once, in place, with the labels' entries; and its two products. All rows in
        one tile round dW by its product."""
        found = [Launch("dlogits", 1, 6 * n * v), Launch("labels", 9)]
        found += self.product(n, v, self.h, 4, accumulate=True)
        return found + self.product(v, n, self.h, 2 if only else 4, accumulate=not only)

    def tiles_c(self, chunks: list[int]) -> list[Launch]:
        """Logits of a chunk are kept, those of a single one in the memory of dW if they fit."""
        found, alone = [], len(chunks) == 1
        rows, columns, _ = paths._grouped_blocks(self.k, max(chunks), self.weight, torch.float32, alone)
        only = alone and rows >= self.n

        def each(n: int, v: int) -> list[Launch]:
            return [Launch("fold", 1, 4 * n * v + self.state(n)), *self.gradients(n, v, only)]

        for n in chunks:
            found += [*self.tiled(n, rows, columns, each), Launch("finish")]
        return [*found, *[self.rounding()] * (not only), self.dhidden(2)]

    def tiles_d(self) -> list[Launch]:
        rows, columns = paths._blocks(self.n, self.v, self.h, torch.float32, TILE_BYTES)
        only = rows >= self.n
        swept = self.tiled(self.n, rows, columns, lambda n, v: self.gradients(n, v, only))
        swept += [*[self.rounding()] * (not only), self.dhidden(4), Launch("_to_copy", 1, 6 * self.n * self.h)]
        return [*self.tiles_a(), Launch("index"), *swept, *self.dhidden_of_positions()]


def _over(size: int, of: int) -> int:
    return -(-size // of)


def _blocks(size: int, block: int) -> list[tuple[int, int]]:
    """(how many, of which size)."""
    full, rest = divmod(size, block)
    return [(count, of) for count, of in ((full, block), (1, rest)) if count and of]


PATHS: dict[str, Callable[[Model], list[Launch]]] = {
    "A": Model.path_a,
    "B": Model.path_b,
    "C": Model.path_c,
    "C, 4 GiB": lambda model: model.path_c(2**32),
    "D": Model.path_d,
    "E": Model.path_e,
    "E, backward too": lambda model: model.path_e(backward=True),
}


def predict(path: str, impl: str, gpu: GPU, size: tuple[int, int, int]) -> Prediction:
    return Prediction(gpu, impl, size, PATHS[path](Model(gpu, impl, *size)))


def implementations(gpu: GPU) -> list[str]:
    return ["cuda", "triton"] if gpu.sm_90a else ["tiles", "triton"]


def table(gpu_name: str, impl: str, size: tuple[int, int, int]) -> str:
    gpu = GPUS[gpu_name]
    n, h, v = size
    lines = [["", "launches", "ms", "x g, best", "expected", "target", "% of copy", "GB moved", "% of waves"]]
    for path in PATHS:
        found = predict(path, impl, gpu, size)
        cells = [path, str(found.count), f"{1e3 * found.seconds(best=False):.2f}"]
        if path.startswith("E"):
            cells += [
                "",
                "",
                f">= {TARGET_OF_COPY:.0f}",
                f"{found.of_copy(path != 'E'):.0f}",
                f"{found.bytes / 1e9:.2f}",
                "",
            ]
        else:
            cells += [f"{found.over_g(best=True):.3f}", f"{found.over_g():.3f}"]
            cells += [f"<= {TARGETS[path]:.2f}" if path in TARGETS else "", ""]
            cells += [f"{found.bytes / 1e9:.2f}", f"{100 * found.efficiency:.1f}"]
        lines.append(cells)
    g = predict("A", impl, gpu, size)
    title = (
        f"{gpu_name}, {impl}: N {n}, H {h}, V {v}, bf16; predicted, g = {1e3 * g.seconds(True) / g.over_g(True):.2f} ms"
    )
    return "\n".join([title, *aligned(lines)])


def markdown(size: tuple[int, int, int], gpu_name: str = "H200") -> str:
    """As README.md has it: `x g` of the paths, best to expected."""
    gpu, impls = GPUS[gpu_name], ("cuda", "triton", "tiles")
    lines = ["| path | CUDA on Hopper | Triton | tiles of logits | target |", "|---|---|---|---|---|"]
    for path in ("A", "B", "C, 4 GiB", "D"):
        of_impls = [predict(path, impl, gpu, size) for impl in impls]
        cells = [f"{found.over_g(best=True):.2f} to {found.over_g():.2f}" for found in of_impls]
        lines.append("| " + " | ".join([path, *cells, f"{TARGETS[path]:.2f}" if path in TARGETS else ""]) + " |")
    return "\n".join(lines)


def listed(path: str, found: Prediction) -> str:
    """What is launched, in order."""
    lines = [[path, "launches", "product", "% of waves", "MB", "us, best", "expected"]]
    for launch in found.launches:
        shape = efficiency = ""
        if launch.product is not None:
            shape = "{} x {} x {}".format(*launch.product)
            work = math.prod(launch.product) / found.gpu.multiprocessors
            efficiency = f"{100 * work / launch.rounds:.1f}"
        times = [f"{1e6 * found.of(launch, best):.0f}" for best in (True, False)]
        moved = f"{(launch.bytes + launch.sums) / 1e6:.0f}"
        lines.append([launch.name, str(launch.count), shape, efficiency, moved, *times])
    return "\n".join(aligned(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--rows", type=int, help="labelled ones (default: the sizes that have targets)")
    add("--hidden", type=int, help="with --rows and --vocab")
    add("--vocab", type=int)
    add("--gpu", choices=GPUS, default="H200", help="default: %(default)s")
    add("--impl", choices=ASSUMED, help="default: what runs there")
    add("--launches", action="store_true", help="and each launch of each path")
    add("--markdown", action="store_true", help="the tables of README.md instead")
    args = parser.parse_args()
    given = (args.rows, args.hidden, args.vocab)
    if None in given and any(given) or any(size is not None and size < 1 for size in given):
        parser.error("--rows, --hidden and --vocab: all three, at least 1")
    gpu = GPUS[args.gpu]
    if args.impl and args.impl not in (*implementations(gpu), "tiles"):
        parser.error(f"--impl cuda: products with our epilogues are Hopper's; {args.gpu} has {implementations(gpu)}")
    sizes = [given] if args.rows else SIZES
    if args.markdown:
        if not gpu.sm_90a:
            parser.error("--markdown: of a Hopper GPU, where all implementations run")
        for size in sizes:
            print("N {}, H {}, V {}:\n\n{}\n".format(*size, markdown(size, args.gpu)))
        return
    for size in sizes:
        for impl in [args.impl] if args.impl else implementations(gpu):
            print(table(args.gpu, impl, size) + "\n")
            if args.launches:
                for path in PATHS:
                    print(listed(path, predict(path, impl, gpu, size)) + "\n")
    assumed = ", ".join(f"{impl} {a.rate:g} and {a.exposed:g}" for impl, a in ASSUMED.items() if impl != "tiles")
    print(
        f"{OF_PEAK:.0%} of the data sheet's products, {OF_BANDWIDTH:.0%} of its bandwidth, {1e6 * LAUNCH:g} us a launch"
    )
    print(f"at least; own products' rate in the library's and exposed share of their epilogues: {assumed}")


if __name__ == "__main__":
    main()
