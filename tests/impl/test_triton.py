"""The Triton kernels beyond what every implementation is tested for: the fused forward, blocks of every kind, how often
they are compiled, and the machine code that they become on each generation of GPUs, which needs none."""

import json
from pathlib import Path

import forks
import pytest
import torch
from grids import covering
from places import DEVICE

from dpo_kernels import dispatch, linear_dpo_loss, linear_sequence_logps, sequence_logps
from dpo_kernels.impl.interface import STATS, Columns, GradRows, LogitTransform
from dpo_kernels.impl.reference import eager_logits, eager_stats, eager_token_logps
from dpo_kernels.testing import assert_within_budget, head_inputs

triton = pytest.importorskip("triton", reason="Triton is not installed")
if reason := dispatch.unavailable_reason("triton", torch.get_default_device()):
    pytest.skip(reason, allow_module_level=True)
kernels = dispatch.load("triton")
torch_kernels = dispatch.load("torch")
linear = pytest.importorskip("dpo_kernels.impl.triton_linear")
join = pytest.importorskip("dpo_kernels.impl.triton_join")
pairs = pytest.importorskip("dpo_kernels.impl.triton_pairs")
rows = pytest.importorskip("dpo_kernels.impl.triton_rows")
sequences = pytest.importorskip("dpo_kernels.impl.triton_sequences")
COMPILE = Path(__file__).with_name("compile_triton.py")
TRANSFORMS = {"plain": {}, "all": {"softcap": 5.0, "logit_scale": -0.7, "temperature": 1.3}}


@pytest.fixture
def fused(monkeypatch):
    """The fused forward, in blocks that an interpreter can do; without one in the blocks that ship."""
    monkeypatch.setitem(dispatch.FORWARD_OF, "triton", "triton_fused")
    if DEVICE == "cpu":
        monkeypatch.setattr(linear, "BLOCK_N", 16)
        monkeypatch.setattr(linear, "BLOCK_H", 32)
        monkeypatch.setattr(linear, "block_v", lambda stats, softcap, hopper: 32)


@pytest.fixture
def no_tiles(monkeypatch):
    monkeypatch.setattr(kernels, "fold_", None)


@pytest.fixture
def small_tile_blocks(monkeypatch):
    monkeypatch.setattr(kernels, "MAX_BLOCK_BYTES", 128)
    monkeypatch.setattr(kernels, "MAX_BLOCK_H", 32)


def assert_same_results(ours, theirs, **tolerances):
    for name in ("token_logps", *theirs.stats):
        found, expected = (getattr(out, name, out.stats.get(name)) for out in (ours, theirs))
        torch.testing.assert_close(found, expected, **tolerances, msg=lambda text, at=name: f"{at}: {text}")


# [S, T, H, V]; of what ships where that is quick
SHAPES = {"tails": (4, 9, 48, 123), "one row": (2, 1, 16, 32), "blocks of rows": (2, 20, 64, 700)}
if DEVICE != "cpu":
    SHAPES |= {"what ships": (4, 100, 208, 1000), "more of it": (8, 100, 256, 5003)}


@pytest.mark.parametrize(
    "dtype, transform, stats, shape",
    covering(["bfloat16", "float16"], list(TRANSFORMS), ["no stats", "stats"], list(SHAPES)),
)
def test_fused_forward(fused, no_tiles, dtype, transform, stats, shape):
    transform, stats = TRANSFORMS[transform], STATS if stats == "stats" else ()
    inputs = head_inputs(*SHAPES[shape], confident=0.3).to(getattr(torch, dtype))
    bias = inputs.bias if transform else None
    with torch.no_grad():
        out = linear_sequence_logps(*inputs[:3], bias=bias, stats=stats, impl="triton", **transform)
        eager = eager_token_logps(eager_logits(inputs.hidden, inputs.weight, bias=bias, **transform), inputs.labels)
        exact = inputs.to(torch.float64)
        logits = eager_logits(exact.hidden, exact.weight, bias=exact.bias if transform else None, **transform)
    assert_within_budget(out.token_logps, eager, eager_token_logps(logits, exact.labels), "token_logps")
    expected = eager_stats(logits, exact.labels)
    for name in stats:
        torch.testing.assert_close(
            out.stats[name].double(), expected[name].double(), rtol=1e-5, atol=1e-5, msg=lambda t, at=name: f"{at}: {t}"
        )


def test_fused_forward_does_not_depend_on_the_splits(fused, no_tiles, monkeypatch):
    inputs = head_inputs(2, 9, 48, 300).to(torch.float16)
    found = []
    for splits in (1, 2, 3, 10):
        monkeypatch.setattr(linear, "splits_of", lambda *_, splits=splits: splits)
        with torch.no_grad():
            found.append(linear_sequence_logps(*inputs[:3], stats=("is_top1", "entropy"), impl="triton"))
    for other in found[1:]:
        torch.testing.assert_close(other.token_logps, found[0].token_logps, rtol=0, atol=2e-6)
        assert torch.equal(other.stats["is_top1"], found[0].stats["is_top1"])
        torch.testing.assert_close(other.stats["entropy"], found[0].stats["entropy"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["one tile", "tiles", "fused"])
def test_the_first_of_equal_logits_is_the_top_one(request, monkeypatch, kind):
    """Be it the label or not, and wherever tiles, blocks and splits end."""
    request.getfixturevalue("fused" if kind == "fused" else "small_tile_blocks")
    monkeypatch.setattr(linear, "splits_of", lambda *_: 4)
    if kind == "tiles":
        monkeypatch.setattr(kernels, "tile_bytes", lambda device: 4096)
    weight = torch.zeros(1024, 16, dtype=torch.float16)
    weight[:, 0] = -1.0
    for top in ((40, 50, 70), (20, 385, 900)):
        tied = weight.clone()
        tied[list(top), 0] = 1.0
        hidden = torch.ones(3, 1, 16, dtype=torch.float16)
        with torch.no_grad():
            labels = torch.tensor(top)[:, None]
            out = linear_sequence_logps(hidden, tied, labels, stats=("is_top1",), impl="triton")
        assert out.stats["is_top1"].flatten().tolist() == [1.0, 0.0, 0.0], top


@pytest.mark.parametrize("value", [float("-inf"), -1e30])
def test_a_split_of_impossible_entries_alone(fused, no_tiles, monkeypatch, value):
    monkeypatch.setattr(linear, "splits_of", lambda *_: 4)
    inputs = head_inputs(2, 9, 48, 1024, confident=0.3).to(torch.bfloat16)
    inputs.labels.clamp_(max=255)
    stats = ("entropy", "is_top1", "log_sum_sq_probs")  # the mean logit is the value's
    for impossible in (slice(256, 512), slice(256, None)):
        bias = inputs.bias.detach().clone()
        bias[impossible] = value
        with torch.no_grad():
            ours = linear_sequence_logps(*inputs[:3], bias=bias, stats=STATS, impl="triton")
            theirs = linear_sequence_logps(*inputs[:3], bias=bias, stats=stats, impl="torch")
        assert_same_results(ours, theirs, rtol=1e-5, atol=1e-5)
        assert ours.stats["mean_logit"][inputs.labels >= 0].lt(-1e29).all()


def test_norm_far_from_zero(fused, no_tiles):
    """Its largest logit is one, and its sum is of exponentials by that, not by what rounds to it."""
    x, weight = (torch.randint(-2, 3, shape).to(torch.bfloat16) for shape in ((20, 16), (123, 16)))
    bias, y = torch.full((123,), 9984.0, dtype=torch.bfloat16), torch.randint(123, (20,))
    fold = kernels.new_fold(y, torch.float32, ())
    assert kernels.linear_fold_(fold, x, weight, bias, LogitTransform(), torch.bfloat16)
    logp, norm, _ = fold.finish(123, torch.float32)
    logits = x.double() @ weight.double().T + 9984
    assert torch.equal(norm[0].double(), logits.amax(1))
    torch.testing.assert_close(norm[1].double(), (logits - logits.amax(1, True)).exp().sum(1), rtol=2e-6, atol=0)
    torch.testing.assert_close(logp.double(), logits.log_softmax(1)[torch.arange(20), y], rtol=2e-6, atol=2e-6)


def test_a_strided_bias_in_the_fused_forward(fused, no_tiles):
    inputs = head_inputs(2, 9, 48, 123).to(torch.bfloat16)
    bias = torch.stack([inputs.bias, -inputs.bias], 1)[:, 0]
    with torch.no_grad():
        ours, theirs = (linear_sequence_logps(*inputs[:3], bias=bias, impl=impl) for impl in ("triton", "torch"))
    assert_same_results(ours, theirs, rtol=0, atol=5e-6)


def test_what_the_fused_forward_takes():
    def takes(shape, stride, dtype=torch.bfloat16, compute_dtype=torch.bfloat16):
        x = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
        w = torch.empty(100, shape[1], dtype=compute_dtype, device="meta")
        return linear.can_take(x, w, compute_dtype) and linear.can_take(w[:, : shape[1]], x, compute_dtype)

    assert takes((5, 48), (48, 1)) and takes((5, 48), (64, 1)) and takes((1, 16), (16, 1))
    assert takes((5, 48), (48, 1), torch.float16, torch.float16)
    assert not takes((5, 48), (48, 1), torch.float16, torch.bfloat16)
    assert not takes((5, 48), (48, 1), torch.float32, torch.float32)
    assert not takes((5, 40), (48, 1))  # hidden size
    assert not takes((5, 48), (56, 1))  # from row to row
    assert not takes((5, 48), (1, 16))  # from entry to entry
    assert takes((5, 48), (2**22, 1)) and not takes((5, 48), (2**23, 1))  # 256 rows beyond int32
    x = torch.zeros(5, 64, dtype=torch.bfloat16)
    assert not linear.can_take(torch._neg_view(x), x, x.dtype) and not linear.can_take(x, torch._neg_view(x), x.dtype)
    assert linear.can_take(x[:, 8:56], x[:, 8:56], x.dtype) and not linear.can_take(x[:, 4:52], x[:, 4:52], x.dtype)


@pytest.mark.parametrize("hidden_size, dtype, autocast", [(31, "bfloat16", False), (32, "float32", True)])
def test_other_matrices_go_through_tiles(fused, hidden_size, dtype, autocast):
    """Rows that begin anywhere, and other dtypes than the one to multiply in."""
    inputs = head_inputs(2, 9, hidden_size, 123).to(getattr(torch, dtype))
    with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        results = [linear_sequence_logps(*inputs[:3], bias=inputs.bias, impl=impl) for impl in ("triton", "torch")]
    assert_same_results(*results, rtol=0, atol=5e-6)


def test_fused_forward_under_autocast(fused, no_tiles):
    inputs = head_inputs(2, 9, 32, 123).to(torch.bfloat16)
    with torch.no_grad():
        expected = linear_sequence_logps(*inputs[:3], bias=inputs.bias, impl="torch")
        with torch.autocast(DEVICE, torch.bfloat16):
            found = linear_sequence_logps(*inputs[:3], bias=inputs.bias, impl="triton")
    assert_same_results(found, expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize(
    "dtype, hidden_size, autocast", [("bfloat16", 31, False), ("float16", 32, False), ("float32", 32, True)]
)
def test_gradients_of_other_matrices_go_through_tiles(monkeypatch, dtype, hidden_size, autocast):
    for name in ("exponentials", "recomputed"):
        monkeypatch.setattr(kernels, name, None)
    inputs = head_inputs(4, 9, hidden_size, 123).to(getattr(torch, dtype))
    for path in ("B", "C", "D"):
        results = []
        for impl in ("triton", "torch"):
            leaves = [inputs.hidden.detach().requires_grad_(), inputs.weight.detach().requires_grad_(path != "B")]
            chunk_bytes = 0 if path == "D" else None
            with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
                out = linear_dpo_loss(*leaves, inputs.labels, inputs.ref_logps, chunk_bytes=chunk_bytes, impl=impl)
            results.append(torch.autograd.grad(out.loss, [t for t in leaves if t.requires_grad]))
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-4)


def test_a_verdict_can_take_tiles(monkeypatch):
    """Of paths B to D, too: the two ways are two families."""
    for name in ("exponentials", "recomputed"):
        monkeypatch.setattr(kernels, name, None)
    inputs = head_inputs(4, 9, 48, 123).to(torch.bfloat16)
    for chunk_bytes in (None, 0):
        with dispatch.taking("triton"):
            linear_dpo_loss(*inputs[:3], inputs.ref_logps, chunk_bytes=chunk_bytes).loss.backward()
        with dispatch.taking("triton_fused"), pytest.raises(TypeError, match="NoneType"):
            linear_dpo_loss(*inputs[:3], inputs.ref_logps, chunk_bytes=chunk_bytes).loss.backward()
    device = inputs.hidden.device
    assert [dispatch.choose("triton", device, path, torch.bfloat16, 123, 48) for path in "ABCDE"] == [
        "triton", "triton_fused", "triton_fused", "triton_fused", "triton",
    ]  # fmt: skip


@pytest.mark.parametrize("n, v", [(1, 256000), (300, 151936), (8192, 128256), (32768, 32000), (8192, 100)])
def test_splits_keep_the_multiprocessors_busy(n, v):
    """The busiest goes through at most an eighth more blocks than if all had equal shares, or has one block alone."""
    row_blocks, column_blocks = -(-n // 128), -(-v // 256)
    splits = linear.splits_of(row_blocks, column_blocks, 132)
    busiest = -(-row_blocks * splits // 132) * -(-column_blocks // splits)
    assert 1 <= splits <= column_blocks
    assert busiest <= max(1.125 * row_blocks * column_blocks / 132, 1) or busiest == -(-row_blocks // 132)


@pytest.mark.parametrize("is_fused", [False, True], ids=["tiles", "fused"])
def test_a_scale_of_0_keeps_its_softcap(request, is_fused):
    """Then every logit is 0, and every gradient."""
    if is_fused:
        request.getfixturevalue("fused")
        request.getfixturevalue("no_tiles")
    inputs = head_inputs(2, 3, 16, 67).to(torch.bfloat16 if is_fused else torch.float32)
    results = []
    for impl in ("triton", "torch"):
        with torch.set_grad_enabled(not is_fused):
            out = linear_sequence_logps(*inputs[:3], logit_scale=0.0, softcap=4.0, temperature=1.3, impl=impl)
        gradients = [] if is_fused else torch.autograd.grad(out.logps.sum(), inputs[:2])
        results.append([out.token_logps.detach(), *gradients])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def wide_softcap_error(impl, inputs):
    """Of tokens' log-probabilities where tanh u / u is 1 but for the last digits, against fp64."""
    exact = inputs.to(torch.float64)
    logits = eager_logits(exact.hidden, exact.weight, softcap=1e4)
    with torch.no_grad():
        ours = linear_sequence_logps(*inputs[:3], softcap=1e4, impl=impl).token_logps
    return (ours - eager_token_logps(logits, exact.labels)).abs().max().item()


def test_a_wide_softcap(impl):
    name = impl.__name__.rpartition(".")[2].replace("native", "cpu")
    assert wide_softcap_error(name, head_inputs(2, 9, 31, 123)) < 1e-5


def test_a_wide_softcap_in_the_fused_forward(fused, no_tiles):
    assert wide_softcap_error("triton", head_inputs(2, 9, 32, 123).to(torch.float16)) < 1e-5


@pytest.mark.parametrize("block_n", [1, 4])
@pytest.mark.parametrize("block_v", [8, 64])
@pytest.mark.parametrize("frozen", [False, True])
def test_rows_of_several_blocks(monkeypatch, block_n, block_v, frozen):
    monkeypatch.setattr(kernels, "BLOCK_N", block_n)
    monkeypatch.setattr(kernels, "MAX_BLOCK_BYTES", 4 * block_v)
    monkeypatch.setattr(kernels, "MAX_BLOCK_H", block_v)
    inputs = head_inputs(2, 3, 12, 67, confident=0.3)
    inputs.weight.requires_grad_(not frozen)
    wanted = [t for t in (inputs.hidden, inputs.weight) if t.requires_grad]
    results = []
    for impl in ("triton", "torch"):
        out = linear_sequence_logps(*inputs[:3], softcap=4.0, stats=STATS, impl=impl)
        results.append([out.token_logps, *out.stats.values(), *torch.autograd.grad(out.logps.sum(), wanted)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_follow_the_maximum(small_tile_blocks, dtype):
    """Three blocks of the vocabulary, the second of which leaves half of the maxima as they are; the sums are a part of
    a wider tensor."""
    n, v, h = 5, 70, 67
    tiles = torch.randn(3, n, v, dtype=dtype)
    tiles[1, ::2] -= 50
    tiles[2] += 3
    y = torch.tensor([0, 69, 70, 150, 209])
    wide = torch.randn(n, h + 5, dtype=dtype)
    results = []
    for k in (kernels, torch_kernels):
        fold, around = k.new_fold(y, dtype, ()), wide.clone()
        sums = around[:, 2:-3].zero_()
        for i, tile in enumerate(tiles):
            a = tile.clone()
            assert k.fold_exp_(fold, a, a, slice(0, n), Columns(i * v, None), LogitTransform(), sums) is None
            sums += a[:, :h]
        results.append([around, *fold.finish(3 * v, dtype)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-6 if dtype == torch.float32 else 1e-13, atol=1e-7)


def test_vectors_of_any_strides():
    """Labels, log-probabilities and their gradients."""

    def spread(t):
        return torch.stack([t, torch.zeros_like(t)], -1)[..., 0]

    n, v = 5, 70
    tile, y, g = torch.randn(n, v), spread(torch.randint(v, (n,))), torch.tensor(0.7).expand(n)
    results = []
    for k in (kernels, torch_kernels):
        a = tile.clone()
        fold = k.new_fold(y, a.dtype, ())
        k.fold_(fold, a, slice(0, n), Columns(0, None), LogitTransform(), keep=True)
        logp, norm, _ = fold.finish(v, a.dtype)
        of = GradRows(y, norm, spread(logp), g)
        value = k.dlogits(a, a, of, Columns(0, None), LogitTransform())
        results.append([logp, norm, a, value])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-6)


class Launches:
    """Instead of a kernel, or before it `runs`: keeps what Triton would compile it for on Hopper."""

    def __init__(self, kernel, runs=False):
        from triton.backends.compiler import GPUTarget
        from triton.compiler import make_backend
        from triton.runtime.jit import JITFunction, create_function_from_signature

        original = kernel
        if not isinstance(kernel, JITFunction):  # interpreted
            kernel = JITFunction(kernel.fn, **kernel.kwargs)
        backend = make_backend(GPUTarget("cuda", 90, 32))
        self.bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        self.kernel = original if runs else None
        self.variants = set()

    def __getitem__(self, grid):
        def launch(*args, **options):
            self.variants.add(str(self.bind(*args, **options)[1:]))
            if self.kernel is not None:
                self.kernel[grid](*args, **options)

        return launch


@pytest.mark.parametrize("path", ["A", "fused", "B", "C", "D", "E"])
def test_kernels_are_not_compiled_for_every_batch(monkeypatch, path):
    """But for a whole block of the vocabulary, and for the last one; or where memory is a multiple of 16, and not."""
    launches = {}
    for module, name in (
        (kernels, "fold_fwd_kernel"),
        (kernels, "dlogits_bwd_kernel"),
        (kernels, "logits_fwd_kernel"),
        (kernels, "logits_bwd_kernel"),
        (sequences, "sum_tokens_fwd_kernel"),
        (sequences, "sum_tokens_bwd_kernel"),
        (linear, "linear_fold_fwd_kernel"),
        (join, "join_kernel"),
        (rows, "rows_kernel"),
        (rows, "gather_rows_kernel"),
        (rows, "put_rows_kernel"),
        (pairs, "compare_kernel"),
    ):
        launches[name] = Launches(getattr(module, name), runs=module is rows)
        monkeypatch.setattr(module, name, launches[name])
    monkeypatch.setitem(dispatch.FORWARD_OF, "triton", "triton_fused" if path == "fused" else "triton")
    monkeypatch.setattr(kernels, "MAX_BLOCK_BYTES", 256)
    monkeypatch.setattr(kernels, "tile_bytes", lambda device: 2**17)
    for seed in range(12):
        inputs = head_inputs(4, 40 + 7 * seed, 32, 1001, seed=seed, labelled=0.9 - 0.05 * seed)
        if path in ("A", "fused"):
            with torch.no_grad():
                linear_sequence_logps(*inputs.to(torch.bfloat16)[:3], stats=("is_top1",), impl="triton")
        elif path == "C":
            linear_dpo_loss(*inputs[:3], inputs.ref_logps, chunk_bytes=2**18, impl="triton").loss.backward()
        elif path == "E":
            logits = torch.randn(4, 40 + seed, 1001, requires_grad=True)
            sequence_logps(logits, inputs.labels[:, : 40 + seed], impl="triton").logps.sum().backward()
        else:
            inputs.weight.requires_grad_(path == "D")
            linear_sequence_logps(*inputs[:3], impl="triton").logps.sum().backward()
    used = {name: len(found.variants) for name, found in launches.items() if found.variants}
    assert used and max(used.values()) <= (1 if path == "fused" else 2), used


MORE = 0 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7) else 64  # bytes that older assemblers spill
SHARED_MEMORY = {80: 163, 90: 227, 100: 227}  # KiB of a block
# Instructions for an entry of a row in the loop that folds it: the loop waits for them as soon as for memory.
# (A third of those without a softcap are gone through in two blocks of a row alone, the label's and the last.)
INSTRUCTIONS = {"plain": 12, "plain stats": 20.5, "softcap": 38, "softcap stats": 46.5}


ONE_OF_EACH = [
    "fold fp32 plain",
    "dlogits fp32 plain",
    "fold logits bf16",
    "dlogits logits bf16",
    "linear fold bf16 plain slots",
    "linear exp plain",
    "linear pack plain",
    "linear dlogits plain",
    "shifts",
]


@pytest.mark.parametrize(
    ("sm", "names", "expected"),
    [
        (90, ONE_OF_EACH, 9),
        pytest.param(90, ["without", *ONE_OF_EACH], 30, marks=pytest.mark.full),
        pytest.param(80, [], 8, marks=pytest.mark.release),
        pytest.param(100, [], 9, marks=pytest.mark.release),
    ],
)
def test_machine_code(sm, names, expected, tmp_path):
    """Nothing spills, nothing is atomic, tiles move in 16 bytes, and the fused forward runs on tensor cores."""
    done = forks.python(COMPILE, sm, *names, TRITON_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr[-4000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len({row["kernel"] for row in rows}) == len(rows) == expected
    for row in rows:
        kernel = row["kernel"]
        assert row["stack"] <= MORE and row["local"] == row["atomics"] == 0, row
        if kernel.startswith("linear"):
            assert row["tensor_core"] > 0 and row["copy_to_shared"] > 0, row
            assert (row["hgmma"] > 0) == (sm == 90), row
            assert row["shared"] <= SHARED_MEMORY[sm] * 1024, row
            assert (row["store128"] > 0) == ("fold" not in kernel), row
            continue
        if kernel == "shifts":
            assert row["add"] == 1, row  # what is subtracted is rounded before
            continue
        assert row["asserts"] == kernel.endswith("asserts"), row
        assert row["barriers"] == (4 if kernel == "rows compared" else 0), row  # between what it writes and reads again
        # a number of each row at a time
        if kernel in ("rows join", "rows found", "rows found asserts", "rows compared"):
            continue
        assert row["load128"] > 0, row
        assert row["store128"] > 0 or (kernel.startswith("fold") and "exp" not in kernel), row
        if "fp64" in kernel:  # for gradients' checks
            continue
        assert row["registers"] <= 128, row  # two blocks of 8 warps a multiprocessor at least
        if kernel.startswith("fold"):
            entries = kernels.MAX_BLOCK_BYTES // (2 if "bf16" in kernel else 4) // (8 * 32)  # of a thread
            kind = kernel.split(maxsplit=2)[2].removesuffix(" exp")
            of_logits = kernel.startswith("fold logits")  # of which labels are counted first
            limit = INSTRUCTIONS["plain stats" if of_logits and "stats" in kind else "plain" if of_logits else kind]
            assert row["loops"][of_logits] <= limit * entries, row


@pytest.mark.skipif(not dispatch.HAS_TRITON, reason="Triton is not installed")
@pytest.mark.parametrize(("value", "works"), [("1", True), ("0", False), ("", False), (None, False)])
def test_the_interpreter_is_asked_for_by_its_one_value(monkeypatch, value, works):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if value is not None:
        monkeypatch.setenv("TRITON_INTERPRET", value)
    reason = dispatch.unavailable_reason("triton", torch.device("cpu"))
    assert (reason is None) == works and (works or "TRITON_INTERPRET=1" in reason)
