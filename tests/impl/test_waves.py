"""Shapes of products: what they leave idle, and that nothing else among what was to choose from leaves less."""

import itertools

import pytest

from dpo_kernels.impl import waves

ROWS = (1000, 2048, 8192, 16384)
HIDDEN = (1024, 2048, 3072, 4096, 5120, 8192)
VOCAB = (32000, 50257, 128256, 151936, 256000)
MULTIPROCESSORS = {"A100": 108, "H100 PCIe": 114, "H200": 132, "B200": 148}
HALF_GIB = 2**29


def share_of_work(n, v, h, products, multiprocessors, time):
    """Of the machine's time, what products of this size need."""
    return products * n * v * h / multiprocessors / time


def by_counting(groups, blocks, units, splits):
    """Blocks of columns of the busiest unit, program by program, neighbours with the same columns and other rows."""
    load = [0] * units
    for item in range(groups * splits):
        split = item // groups
        load[item % units] += blocks // splits + (split < blocks % splits)
    return max(load)


@pytest.mark.parametrize(
    "groups, blocks, units", [(1, 501, 132), (8, 501, 132), (32, 594, 66), (64, 7, 148), (3, 1, 4)]
)
def test_splits_keep_units_busy(groups, blocks, units):
    rounds = [by_counting(groups, blocks, units, splits) for splits in range(1, blocks + 1)]
    assert rounds == [waves.fold_rounds(groups, blocks, units, splits) for splits in range(1, blocks + 1)]
    splits = waves.splits_of(groups, blocks, units)
    # a program more in turn takes a start more
    assert rounds[splits - 1] <= min(rounds) + waves.START * -(-groups * splits // units)
    assert splits <= 4 * units and all(rounds[fewer - 1] > rounds[splits - 1] for fewer in range(1, splits))


@pytest.mark.parametrize("multiprocessors", MULTIPROCESSORS.values(), ids=list(MULTIPROCESSORS))
def test_parts_of_a_sum(multiprocessors):
    """Of products that have fewer tiles than there are multiprocessors. Partial sums take 4 of the tiles at most."""
    for rows, h in itertools.product((128, 384, 1024, 2048, 8192), HIDDEN):
        parts = waves.sum_parts(rows, 128256, h, multiprocessors)
        tiles = -(-rows // 128) * -(-h // 256)
        assert parts == 1 or tiles < multiprocessors and parts <= max(4, multiprocessors // tiles)
        idle = [-(-tiles * each // multiprocessors) / each - tiles / multiprocessors for each in (1, 2, 3, 4)]
        if tiles < multiprocessors:
            assert -(-tiles * parts // multiprocessors) / parts - tiles / multiprocessors <= min(idle) + 0.02
    assert waves.sum_parts(1024, 64, 1024, multiprocessors) == 1, "what is added at the end would take longer"


def test_parts_of_common_sums():
    assert waves.sum_parts(1024, 151936, 2048, 132) == 2, "128 of 132, with 64 tiles"
    assert waves.sum_parts(1024, 128256, 4096, 132) == 1, "128 of 132 as it is"
    assert waves.sum_parts(1024, 128256, 3072, 132) == 4, "384 of 396, with 96 tiles"
    assert waves.sum_parts(0, 128256, 3072, 132) == 1
    assert waves.sum_parts(1024, 128256, 2048, 132, cluster=2) == 2, "64 of 66 pairs, with 32 tiles"
    assert waves.sum_parts(2048, 128256, 2048, 132, cluster=2) == 1, "64 of 66 as it is"


@pytest.mark.parametrize("cluster", [1, 2], ids=["Triton", "CUDA"])
@pytest.mark.parametrize("multiprocessors", MULTIPROCESSORS.values(), ids=list(MULTIPROCESSORS))
def test_rows_of_path_b(multiprocessors, cluster):
    for n, h, v in itertools.product(ROWS, HIDDEN, VOCAB):
        rows = waves.rows_at_a_time(n, v, h, multiprocessors, HALF_GIB, cluster)
        assert 2 * v * rows <= HALF_GIB and rows % 16 == 0
        blocks = -(-n // rows)
        last = n - (blocks - 1) * rows
        assert last > 0 and (blocks - 1) * rows + last == n
        assert last >= 0.5 * rows, f"{n, h, v}: a small block of {last} after blocks of {rows}"
        # nothing that has room leaves much less idle
        time = waves.rows_time(n, v, h, multiprocessors, rows, cluster)
        others = [each for each in range(128, n + 1, 128) if 2 * v * each <= HALF_GIB and n % each == 0]
        best = min(waves.rows_time(n, v, h, multiprocessors, each, cluster) for each in [rows, *others])
        assert time <= (1 + waves.NEARLY) * best + 1e-6, (n, h, v, rows)


@pytest.mark.parametrize("cluster", [1, 2], ids=["Triton", "CUDA"])
@pytest.mark.parametrize("h", [2048, 4096])
@pytest.mark.parametrize("v", [128256, 151936])
def test_path_b_leaves_little_idle_at_sizes_that_matter(v, h, cluster):
    """At most 5 % of an H200, of both products together; for H = 4096 with 263 to 311 MB of exponentials."""
    rows = waves.rows_at_a_time(8192, v, h, 132, HALF_GIB, cluster)
    assert rows == 1024 or h == 2048
    assert share_of_work(8192, v, h, 2, 132, waves.rows_time(8192, v, h, 132, rows, cluster)) >= 0.95


@pytest.mark.parametrize("multiprocessors, least", [(108, 0.92), (114, 0.88), (132, 0.93), (148, 0.87)])
def test_path_b_on_other_machines(multiprocessors, least):
    """From 2048 rows on, what is had."""
    for n, h, v in itertools.product(ROWS[1:], HIDDEN, VOCAB[2:]):
        rows = waves.rows_at_a_time(n, v, h, multiprocessors, HALF_GIB)
        share = share_of_work(n, v, h, 2, multiprocessors, waves.rows_time(n, v, h, multiprocessors, rows))
        assert share >= least, (n, h, v, rows, share)


@pytest.mark.parametrize("n", [1, 5, 16, 100, 129])
def test_few_rows_are_one_block(n):
    assert waves.rows_at_a_time(n, 128256, 4096, 132, HALF_GIB) == -(-n // 16) * 16


def test_little_memory_has_fewer_rows():
    assert waves.rows_at_a_time(8192, 128256, 4096, 132, 2 * 128256 * 48) == 48
    assert waves.rows_at_a_time(100, 128256, 4096, 132, 2 * 128256 * 48) == 48
    assert waves.rows_at_a_time(60, 128256, 4096, 132, 2 * 128256 * 48) == 32
    assert waves.rows_at_a_time(60, 128256, 4096, 132, 1) == 16, "the least there is"
    assert waves.columns_at_a_time(8192, 128256, 4096, 132, 1) == 64


@pytest.mark.parametrize("multiprocessors", MULTIPROCESSORS.values(), ids=list(MULTIPROCESSORS))
def test_columns_of_path_d(multiprocessors):
    for n, h, v in itertools.product(ROWS, HIDDEN, VOCAB):
        columns = waves.columns_at_a_time(n, v, h, multiprocessors, HALF_GIB // 2)
        assert columns % 64 == 0 and 2 * columns * n <= HALF_GIB // 2
        blocks = -(-v // columns)
        last = v - (blocks - 1) * columns
        assert last >= columns - 64 * blocks, f"{n, h, v}: a small block of {last} after blocks of {columns}"
        time = waves.columns_time(n, v, h, multiprocessors, columns)
        others = [each for each in range(64, v + 64, 64) if 2 * n * each <= HALF_GIB // 2 and v // each == v / each]
        assert time <= min(waves.columns_time(n, v, h, multiprocessors, each) for each in [columns, *others])


@pytest.mark.parametrize("cluster", [1, 2], ids=["Triton", "CUDA"])
@pytest.mark.parametrize("h", [2048, 4096])
@pytest.mark.parametrize("v", [128256, 151936])
def test_path_d_leaves_little_idle_at_sizes_that_matter(v, h, cluster):
    """At most 5 % of an H200, of three products and the sums [N, H] read and written beside them."""
    columns = waves.columns_at_a_time(8192, v, h, 132, HALF_GIB // 2, cluster)
    assert share_of_work(8192, v, h, 3, 132, waves.columns_time(8192, v, h, 132, columns, cluster)) >= 0.95


@pytest.mark.parametrize("h", HIDDEN)
def test_rows_that_take_turns_stay_in_the_cache(h):
    """H100's of 50 MiB, in clusters of 256 rows: what eight of them take is the least, and fits up to H = 5120."""
    cache = 50 * 2**20

    def size(together):
        return 2 * h * 256 * (together + -(-66 // together))

    together = waves.groups_together(32, h, 256, 66, cache)
    if h <= 5120:
        assert size(together) <= 0.9 * cache < size(together + 1) or together == 32
    else:
        assert size(together) == min(map(size, range(1, 33))) > cache
    assert waves.groups_together(1, h, 256, 66, cache) == 1
