"""The emulation of CUDA that the kernels are tested with: it computes what they say, and finds what is wrong."""

import ctypes

import emulation
import pytest
import torch

if emulation.unavailable_reason() is not None:
    pytest.skip(emulation.unavailable_reason(), allow_module_level=True)

SEEDS = range(6)
MISTAKES = ["none", "no full wait", "no empty wait", "release early", "no release", "read early", "write early"]
MISTAKES += ["no fence", "no sync"]
FAULTS = {
    "missing thread": "deadlock.*ended, threads from 40.*__syncthreads, threads from 41",
    "missing arrival": "deadlock.*barrier at offset 0 for parity 0",
    "missing lane": "deadlock.*__shfl_sync",
    "foreign lane": "a lane that calls is not in the mask",
    "two meetings": "lanes of a warp meet in __s.* and in __s",
    "not initialized": "before it was initialized",
    "too many arrivals": "more arrivals at a barrier than it expects",
    "past the end": "wrote past its shared memory",
    "unaligned": "a barrier must be aligned",
}


@pytest.fixture(autouse=True)
def on_the_host():
    with torch.device("cpu"):
        yield


@pytest.fixture(scope="module")
def library():
    library = ctypes.CDLL(str(emulation.build(emulation.HERE)))
    for name in "block_sums", "shuffles", "product", "product_of_registers", "box", "transpose", "faulty", "nothing":
        getattr(library, f"run_{name}").restype = ctypes.c_char_p
    return library


def pointer(tensor):
    return ctypes.c_void_p(tensor.data_ptr())


@pytest.fixture
def run(library, monkeypatch):
    """Calls a function of the library with tensors and integers; raises what it says."""

    def call(name, *args, seed=0):
        monkeypatch.setenv("DPO_EMULATION_SEED", str(seed))
        error = getattr(library, f"run_{name}")(*[pointer(a) if isinstance(a, torch.Tensor) else a for a in args])
        if error is not None:
            raise RuntimeError(error.decode())

    return call


def block_sums(run, seed, synchronized=True):
    values, sums = torch.arange(4 * 3 * 200, dtype=torch.float32).view(4, 3, 200), torch.empty(4, 3)
    run("block_sums", values, sums, 3, 4, 96, 200, synchronized, seed=seed)
    return torch.equal(sums, values.sum(-1))


@pytest.mark.parametrize("seed", SEEDS)
def test_reduction_over_the_threads_of_a_block(run, seed):
    assert block_sums(run, seed)


def test_without_a_barrier_the_sums_are_wrong(run):
    assert not all(block_sums(run, seed, synchronized=False) for seed in SEEDS)


@pytest.mark.parametrize("dtype", [torch.int32, torch.float32, torch.float64, torch.int64])
def test_shuffles_and_votes(run, dtype):
    x, out, votes = torch.randint(-50, 50, (64,)).to(dtype), torch.empty(4, 2, 32, dtype=dtype), torch.empty(2, 64)
    votes = votes.to(torch.int32)
    types = [torch.int32, torch.float32, torch.float64, torch.int64]
    run("shuffles", types.index(dtype), x, out, votes, seed=3)
    lanes = torch.arange(32)
    down, up = torch.where(lanes + 7 < 32, lanes + 7, lanes), torch.where(lanes % 16 >= 2, lanes - 2, lanes)
    sources = torch.stack([lanes ^ 5, torch.full_like(lanes, 3), down, up])
    x = x.view(2, 32)
    assert torch.equal(out, x[:, sources].transpose(0, 1))
    ballots = ((x > 0).long() << lanes).sum(-1)
    assert torch.equal(votes[0].view(2, 32).long() & 0xFFFFFFFF, ballots[:, None].expand(2, 32))
    anyone = (x.view(4, 16) > 20).any(-1).int()
    assert torch.equal(votes[1].view(4, 16), anyone[:, None].expand(4, 16))


def product(run, seed, mistake="none", dtype=torch.bfloat16, cluster=1, rows=64, depth=320):
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(n, depth, generator=generator).to(dtype) for n in (rows, 256))
    out = torch.full((rows, 256), float("nan"))
    run("product", dtype == torch.float16, cluster, a, b, out, rows, depth, MISTAKES.index(mistake), seed=seed)
    return out, a.double() @ b.double().T


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cluster, rows, depth", [(1, 64, 128), (1, 100, 200), (2, 192, 264)])
def test_product_of_tiles(run, seed, dtype, cluster, rows, depth):
    """Copies, barriers and products together; edges that lie outside are zero, blocks of a cluster share copies."""
    out, expected = product(run, seed, dtype=dtype, cluster=cluster, rows=rows, depth=depth)
    torch.testing.assert_close(out.double(), expected, atol=1e-4, rtol=1e-5)


REGISTER_MISTAKES = ["none", "stride and leading", "no leading", "rewrite early", "k-major"]


def product_of_registers(run, seed, mistake="none", transposed=False, depth=192):
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(*shape, generator=generator).bfloat16() for shape in ((64, depth), (depth, 256)))
    out, given = torch.full((64, 256), float("nan")), a.T.contiguous() if transposed else a
    run("product_of_registers", transposed, given, b, out, depth, REGISTER_MISTAKES.index(mistake), seed=seed)
    return out.double(), a.double() @ b.double()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("depth", [64, 200])
def test_product_of_registers(run, seed, transposed, depth):
    """Loaded as rows, and as columns, of swizzled tiles; the other operand's columns lie together. Edges are zero."""
    out, expected = product_of_registers(run, seed, transposed=transposed, depth=depth)
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("mistake", ["stride and leading", "no leading", "k-major"])
def test_a_wrong_descriptor_of_columns_shows(run, mistake):
    """The strides the other way round; one that rows of terms have none of; and taken for rows of terms."""
    try:
        out, expected = product_of_registers(run, 0, mistake)
    except RuntimeError as error:
        assert "an operand outside of shared memory" in str(error)
    else:
        assert not torch.allclose(out, expected, atol=1e-1)


@pytest.mark.parametrize("seed", SEEDS)
def test_registers_that_are_written_before_they_were_read_are_named(run, seed):
    with pytest.raises(RuntimeError, match="registers of an operand were written while a wgmma was under way"):
        product_of_registers(run, seed, "rewrite early")


@pytest.mark.parametrize("mistake", ["no full wait", "no empty wait", "release early", "read early"])
def test_an_operation_out_of_order_shows(run, mistake):
    """Wrong numbers or an error, for some seed at least: what is asynchronous has no fixed time."""

    def is_right(seed):
        try:
            out, expected = product(run, seed, mistake)
        except RuntimeError as error:
            assert "emulation: " in str(error)
            return False
        return torch.allclose(out.double(), expected, atol=1e-3)

    assert not all(is_right(seed) for seed in SEEDS)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    "mistake, cluster, message",
    [
        (
            "no release",
            1,
            "deadlock.* barrier at offset 81920 for parity 1, threads from 0; .* 81936 for parity 0, threads from 128",
        ),
        ("no release", 2, "deadlock.*block .1, 0, 0.: barrier"),
        ("write early", 1, "written while a wgmma was under way"),
        ("no fence", 1, "without a wgmma_fence"),
    ],
)
def test_a_mistake_is_named(run, seed, mistake, cluster, message):
    with pytest.raises(RuntimeError, match=message):
        product(run, seed, mistake, cluster=cluster, rows=64 * cluster)
    out, expected = product(run, seed)  # the next launch is none the worse
    torch.testing.assert_close(out.double(), expected, atol=1e-4, rtol=1e-5)


def test_blocks_of_a_cluster_must_meet_before_they_use_one_anothers_barriers(run):
    with pytest.raises(RuntimeError, match="before it was initialized"):
        for seed in SEEDS:
            product(run, seed, "no sync", cluster=2, rows=128)


@pytest.mark.parametrize("row, column", [(0, 0), (3, 5), (-2, -7), (17, 30), (40, 0)])
def test_what_lies_outside_of_a_tensor_is_zero(run, row, column):
    tensor, out = torch.randn(20, 36), torch.empty(8, 32)
    padded = torch.zeros(100, 200)
    padded[30:50, 50:83] = tensor[:, :33]
    run("box", tensor, out, 20, 33, 36, column, row, False)
    assert torch.equal(out, padded[30 + row : 38 + row, 50 + column : 82 + column])


def test_swizzled_rows_of_128_bytes(run):
    """16 bytes at address a go to a with bits 4 to 6 xor bits 7 to 9: chunk c of row r to place c xor r % 8."""
    tensor, out = torch.randn(8, 32), torch.empty(8, 8, 4)
    run("box", tensor, out, 8, 32, 32, 0, 0, True)
    chunks = torch.arange(8)[:, None] ^ torch.arange(8)
    assert torch.equal(out, tensor.view(8, 8, 4)[torch.arange(8)[:, None], chunks])


STORE_MISTAKES = ["none", "no fence", "no wait", "no end", "unaligned"]


def transpose(run, seed, mistake="none"):
    """64 rows of 128 numbers to [rows, 20] of memory whose rows have 24; and what is expected there."""
    numbers, out = torch.arange(64 * 128, dtype=torch.int16).view(64, 128), torch.full((90, 24), -1, dtype=torch.int16)
    run("transpose", numbers, out, 90, 20, 24, 128, STORE_MISTAKES.index(mistake), seed=seed)
    expected = torch.full_like(out, -1)
    expected[:, :20] = numbers.T[16:106, 8:28]
    return out, expected


@pytest.mark.parametrize("seed", SEEDS)
def test_numbers_are_transposed_on_their_way_to_a_box(run, seed):
    """Through swizzled shared memory, which is written anew while it may still be read; outside of the tensor nothing
    is written."""
    assert torch.equal(*transpose(run, seed))


@pytest.mark.parametrize(
    "mistake, message",
    [("no fence", "without fence_before_stores"), ("no end", "under way"), ("unaligned", "not aligned")],
)
def test_a_mistake_in_storing_is_named(run, mistake, message):
    for seed in SEEDS:
        with pytest.raises(RuntimeError, match=message):
            transpose(run, seed, mistake)


def test_shared_memory_that_is_written_before_it_was_read_shows(run):
    assert not all(torch.equal(*transpose(run, seed, "no wait")) for seed in SEEDS)


def test_a_tensor_map_is_refused_as_the_driver_refuses_it(library):
    good = {"address": 1 << 20, "rows": 100, "columns": 72, "stride": 144, "box_rows": 256, "box_columns": 64}
    bad = {"address": (1 << 20) + 8, "rows": 0, "stride": 152, "box_rows": 257, "box_columns": 128}

    def encode(address, rows, columns, stride, *box):
        return library.run_encode(*map(ctypes.c_uint64, (address, rows, columns, stride)), *box)

    assert encode(*good.values()) == 0
    assert [encode(*{**good, name: value}.values()) for name, value in bad.items()] == [1] * len(bad)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(run, fault, seed):
    run("faulty", 0, seed=seed)
    with pytest.raises(RuntimeError, match=FAULTS[fault]):
        run("faulty", 1 + list(FAULTS).index(fault), seed=seed)


def test_a_launch_is_refused_as_the_device_refuses_it(run):
    kib = 1024
    for grid, threads, cluster, shared, allowed in [(4, 1024, 2, 227 * kib, 227 * kib), (3, 1, 1, 48 * kib, 0)]:
        run("nothing", grid, threads, cluster, ctypes.c_size_t(shared), allowed)
    for refused, message in [
        ((0, 32, 1, 0, 0), "invalid configuration"),
        ((1, 1025, 1, 0, 0), "invalid configuration"),
        ((3, 32, 2, 0, 0), "cluster"),
        ((1, 32, 1, 49 * kib, 0), "invalid argument"),
        ((1, 32, 1, 101 * kib, 100 * kib), "invalid argument"),
        ((1, 32, 1, 0, 228 * kib), "invalid argument"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            run("nothing", *refused[:3], ctypes.c_size_t(refused[3]), refused[4])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_conversions(library, dtype):
    """To nearest even, like PyTorch's, for all 16-bit numbers, the middles between them, and their neighbours."""
    numbers = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype).float()
    numbers = numbers[~numbers.isnan()].sort().values
    middles = (numbers[1:].double() / 2 + numbers[:-1].double() / 2).float()
    x = torch.cat([numbers, middles, middles.nextafter(torch.tensor(1e38)), middles.nextafter(torch.tensor(-1e38))])
    x = torch.cat([x[~x.isnan()], torch.tensor([65519.0, 65520.0, 1e30, -1e-30, float("nan")])])
    narrow, wide = torch.empty(len(x), dtype=torch.int16), torch.empty(len(x))
    library.convert(dtype == torch.float16, pointer(x), pointer(narrow), pointer(wide), ctypes.c_size_t(len(x)))
    torch.testing.assert_close(narrow.view(dtype), x.to(dtype), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(wide, x.to(dtype).float(), rtol=0, atol=0, equal_nan=True)
