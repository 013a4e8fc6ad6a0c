"""That the logits never exist: no tensor beyond the documented bounds is made, and each path does its matrix products
and no more."""

import pytest
import torch
from grids import covering

from dpo_kernels import linear_dpo_loss, linear_sequence_logps, sequence_logps
from dpo_kernels.impl import paths
from dpo_kernels.impl.reference import eager_logits, eager_token_logps
from dpo_kernels.testing import Record, SavedBytes, head_inputs

TILE = 8 * 1024
STATS = ("entropy", "is_top1", "mean_logit", "log_sum_sq_probs")
# [S, T, H, V]: the logits are 12 tiles and 12 times the head; then more rows, which are two blocks, and more columns
SHAPES = {"base": (4, 12, 4, 512), "rows": (4, 24, 4, 512), "columns": (4, 12, 4, 1024)}


@pytest.fixture(autouse=True)
def small_tile(set_tile_bytes):
    set_tile_bytes(TILE)


def make(shape, frozen, dtype, labelled=0.5):
    inputs = head_inputs(*shape, dtype=dtype, labelled=labelled)
    inputs.weight.requires_grad_(not frozen)
    inputs.bias.requires_grad_(not frozen)
    return inputs


def products(record, inputs):
    """Whole head products [N, H] x [H, V] done."""
    rows = int((inputs.labels != -100).sum())
    return record.multiplications / (rows * inputs.weight.numel())


def run(fn, inputs, backward=True):
    """Record of the forward and backward, and the bytes saved between them."""
    with Record() as record, SavedBytes(*inputs) as saved:
        loss = fn(inputs)
        if backward:
            wanted = [t for t in (inputs.hidden, inputs.weight, inputs.bias) if t.requires_grad]
            torch.autograd.grad(loss, wanted)
    return record, saved.total


def logps_loss(inputs, **options):
    return linear_sequence_logps(inputs.hidden, inputs.weight, inputs.labels, bias=inputs.bias, **options).logps.sum()


def dpo_loss(inputs, **options):
    return linear_dpo_loss(
        inputs.hidden, inputs.weight, inputs.labels, inputs.ref_logps, bias=inputs.bias, **options
    ).loss


def results_bytes(inputs, dtype):
    """The largest result any path returns: a gradient, or fp32 [S, T, H]."""
    sizes = [inputs.hidden.numel() * 4]
    if inputs.weight.requires_grad:
        sizes.append(inputs.weight.numel() * dtype.itemsize)
    return max(sizes)


@pytest.mark.parametrize(
    ("path", "shape", "dtype"),
    covering(["A", "B", "D", "D for the loss"], list(SHAPES), [torch.float32, torch.bfloat16], full=2),
)
def test_tile_bounds_paths_a_b_d(path, shape, dtype):
    inputs, softcap = make(SHAPES[shape], frozen=path in "AB", dtype=dtype), 4.0 if dtype == torch.bfloat16 else None
    if path == "A":
        with torch.no_grad():
            record, saved = run(lambda i: logps_loss(i, softcap=softcap, stats=STATS), inputs, backward=False)
    elif path == "D for the loss":
        record, saved = run(lambda i: dpo_loss(i, softcap=softcap, chunk_bytes=0), inputs)
    else:
        record, saved = run(lambda i: logps_loss(i, softcap=softcap, stats=STATS), inputs)
    logits_bytes = inputs.labels.numel() * inputs.weight.shape[0] * 4
    bound = max(TILE, results_bytes(inputs, dtype))
    assert bound * 10 < logits_bytes, "the bound must tell the logits apart"
    assert record.largest[0] <= bound, f"{record.largest} exceeds {bound}"
    assert products(record, inputs) == pytest.approx({"A": 1, "B": 2}.get(path, 4))
    rows = int((inputs.labels != -100).sum())
    # what is saved: the labelled hidden states (D) or their fp32 gradients (B), and a few numbers a position
    assert saved <= rows * inputs.hidden.shape[2] * 4 + 64 * inputs.labels.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("groups", [1, 3])
def test_chunk_bytes_bounds_path_c(dtype, softcap, groups):
    inputs = make((12, 8, 4, 256), frozen=False, dtype=dtype)
    rows = int((inputs.labels != -100).sum())
    accumulator = inputs.weight.numel() * 4 if dtype != torch.float32 and groups > 1 else 0
    chunk_bytes = rows * 256 * 4 // groups + 8 * 256 * 4 + accumulator  # of about 8 rows a pair
    record, saved = run(lambda i: dpo_loss(i, softcap=softcap, chunk_bytes=chunk_bytes), inputs)
    assert products(record, inputs) == pytest.approx(3)
    assert record.largest[0] <= max(chunk_bytes - accumulator, results_bytes(inputs, torch.float32))
    assert saved <= 64 * inputs.labels.numel()


def test_chunk_bytes_that_a_pair_just_fits_in():
    inputs = make((12, 8, 4, 256), frozen=False, dtype=torch.float32, labelled=1.0)
    for missing, expected in ((0, 3), (1, 4)):  # of 16 rows a pair
        record, _ = run(lambda i, size=16 * 256 * 4 - missing: dpo_loss(i, chunk_bytes=size), inputs)
        assert products(record, inputs) == pytest.approx(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("labelled", [0.5, 1.0])
@pytest.mark.usefixtures("not_interpreted")
def test_path_c_keeps_logits_in_the_memory_of_dw(dtype, labelled, set_tile_bytes):
    """H = 288 rows of fp32 logits fit in fp32 dW, and half of them in bf16, which are more than the 128 that it is done
    for: what is left is the buffer, and with a byte less for it the rows come in several groups, or their logits are
    computed again."""
    set_tile_bytes(64 * 288 * 4)
    inputs = make((4, 72, 288, 768), frozen=False, dtype=dtype, labelled=labelled)
    rows = int((inputs.labels != -100).sum())
    fit = 288 if dtype == torch.float32 else 143  # one less for alignment
    left = 0 if rows <= fit else rows - fit // 64 * 64  # whole tiles, of 64 rows
    chunk_bytes = max(1, left * 768 * 4)
    record, _ = run(lambda i: dpo_loss(i, chunk_bytes=chunk_bytes), inputs)
    assert products(record, inputs) == pytest.approx(3)
    assert record.largest[0] == max(chunk_bytes, inputs.weight.numel() * dtype.itemsize)
    if left:
        record, _ = run(lambda i: dpo_loss(i, chunk_bytes=chunk_bytes - 1), inputs)
        assert products(record, inputs) == pytest.approx(4) or record.largest[0] != chunk_bytes


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 3),
        ({"loss_type": "ipo"}, 3),
        ({"loss_type": ("sigmoid", "sft"), "ld_alpha": 0.3}, 3),
        ({"use_weighting": True}, 3),
        ({"rpo_alpha": 1.0}, 3),
        ({"differentiable": ("logps",)}, 4),
        ({"chunk_bytes": 0}, 4),  # no pair fits
        ({"chunk_bytes": 512 * 4}, 4),  # one row fits, a pair does not
        ({"loss_type": "aot"}, 4),  # sorts the batch: no mean over pairs
        ({"loss_type": ("sigmoid", "aot_unpaired")}, 4),
    ],
)
# How an option is routed is the same for all implementations: the slow ones take one for path C and one for path D.
@pytest.mark.full(when=lambda impl, options: impl in ("triton", "cuda") and options not in ({}, {"chunk_bytes": 0}))
def test_products_of_the_fused_op(options, expected):
    inputs = make(SHAPES["base"], frozen=False, dtype=torch.float32)
    record, _ = run(lambda i: dpo_loss(i, **options), inputs)
    assert products(record, inputs) == pytest.approx(expected)
    frozen = make(SHAPES["base"], frozen=True, dtype=torch.float32)
    assert products(run(lambda i: dpo_loss(i, **options), frozen)[0], frozen) == pytest.approx(2)
    with torch.no_grad():
        assert products(run(lambda i: dpo_loss(i, **options), inputs, backward=False)[0], inputs) == pytest.approx(1)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.usefixtures("not_interpreted")
def test_from_logits_makes_no_second_logits(inplace):
    labels = head_inputs(4, 50).labels
    logits = torch.randn(4, 50, 4000, dtype=torch.bfloat16, requires_grad=True)
    with Record() as forward:
        loss = sequence_logps(logits, labels, stats=STATS, inplace_backward=inplace).logps.sum()
    assert forward.largest[0] <= TILE
    with Record() as backward:
        torch.autograd.grad(loss, logits)
    assert backward.largest[0] <= (TILE if inplace else logits.numel() * 2)


def peak_bytes(fn):
    """The most memory that the allocator had handed out at once while `fn` ran, beyond what was there before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = fn()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    running = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        running += event.nbytes()
        peak = max(peak, running)
    return peak, result


@pytest.mark.parametrize(
    ("path", "dtype", "softcap"), covering(["A", "B", "C", "D"], [torch.float32, torch.bfloat16], [None, 4.0], full=2)
)
def test_peak_memory(path, dtype, softcap, set_tile_bytes):
    """All that is alive at once: at most four tiles, [N, H] a few times, the bias's gradient, what is returned, and
    `chunk_bytes` for C."""
    tile = 2**13
    set_tile_bytes(tile)
    inputs = make((12, 8, 8, 1000), frozen=path in "AB", dtype=dtype)  # two blocks of rows, 16 of columns; six pairs
    rows = int((inputs.labels != -100).sum())
    logits_bytes = rows * 1000 * 4
    chunk_bytes = {"C": logits_bytes // 3 + 4 * inputs.weight.numel() * (dtype != torch.float32), "D": 0}.get(path)

    def step():
        if path == "A":
            with torch.no_grad():
                return [logps_loss(inputs, softcap=softcap)]
        loss = dpo_loss(inputs, softcap=softcap, chunk_bytes=chunk_bytes)
        return torch.autograd.grad(loss, [t for t in inputs[:2] if t.requires_grad])

    peak, results = peak_bytes(step)
    bound = 4 * tile + 4 * rows * 8 * 4 + 64 * inputs.labels.numel() + sum(t.nbytes for t in results)
    bound += inputs.bias.numel() * 4 * inputs.bias.requires_grad + (chunk_bytes or 0)
    assert peak <= bound < logits_bytes + sum(t.nbytes for t in results), (
        f"{peak / tile:.1f} of {bound / tile:.1f} tiles"
    )


def test_more_rows_and_columns_make_no_larger_tensor():
    """Twice the rows or columns leave the largest tensor as it was."""
    largest = set()
    for shape in SHAPES.values():
        inputs = make(shape, frozen=True, dtype=torch.bfloat16, labelled=1.0)
        with torch.no_grad():
            largest.add(run(logps_loss, inputs, backward=False)[0].largest[0])
    assert largest == {TILE}


def test_the_record_sees_eager_logits():
    """The instrument itself: eager code is caught, with its 3 products over every position."""
    inputs = make(SHAPES["base"], frozen=False, dtype=torch.float32, labelled=1.0)
    record, saved = run(
        lambda i: eager_token_logps(eager_logits(i.hidden, i.weight), i.labels).sum() + 0 * i.bias.sum(), inputs
    )
    logits_bytes = inputs.labels.numel() * SHAPES["base"][3] * 4
    assert record.largest[0] >= logits_bytes and saved >= logits_bytes
    assert products(record, inputs) == pytest.approx(3)


def test_blocks_hold_no_more_than_a_tile():
    """Also of few rows with a large H, where the columns of W are what is large."""
    for n, v, h in [(8192, 128256, 4096), (8, 32000, 4096), (300, 151936, 64), (1, 50, 100_000), (7, 5, 3)]:
        for tile in (2**12, 2**20, 2**27):
            rows, columns = paths._blocks(n, v, h, torch.float32, tile)
            assert 1 <= rows <= n and 1 <= columns <= v
            assert rows == 1 or rows * max(columns, h) <= tile // 4, (n, v, h, tile)
            assert columns == 1 or columns * max(rows, h) <= tile // 4, (n, v, h, tile)


def test_blocks_of_operands_that_are_read_in_place():
    """The tile is full and never overfull, and rows have equal shares; the traffic is near the least there is."""
    for n, v, tile in [
        (8192, 128256, 2**27),
        (1, 256000, 2**27),
        (300, 151936, 2**27),
        (32768, 1000, 2**20),
        (7, 5, 64),
    ]:
        rows, columns = paths._traffic_blocks(n, v, torch.float32, tile)
        numel = tile // 4
        assert 1 <= rows <= n and 1 <= columns <= v and rows * columns <= numel
        assert rows - -(-n // -(-n // rows)) < 2, "equal shares"
        shapes = [(rows, columns), *((r, min(v, numel // r)) for r in range(1, n + 1) if numel // r)]
        traffic = [8 * n * -(-v // c) + 2 * v * -(-n // r) for r, c in shapes]
        assert traffic[0] <= 1.5 * min(traffic), (n, v)
