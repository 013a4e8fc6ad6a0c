"""The CUDA kernels beyond what every implementation is tested for: the fused forward of Hopper, rows of every
alignment, and the machine code of each generation of GPUs. Without a GPU they run on the CPU, through the emulation in
tests/impl/cuda."""

import functools
import importlib.machinery
import importlib.util
import math
import sys
from types import SimpleNamespace

import machine_code
import pytest
import torch
from grids import covering
from places import DEVICE

from dpo_kernels import dispatch, env, linear_sequence_logps, sequence_logps, verdicts
from dpo_kernels.impl.interface import STATS, Columns, GradRows, LogitTransform
from dpo_kernels.impl.reference import eager_logits, eager_stats, eager_token_logps
from dpo_kernels.testing import assert_within_budget, head_inputs

TRANSFORMS = {
    "plain": {},
    "all": {"softcap": 5.0, "logit_scale": -0.7, "temperature": 1.3},
    "negative": {"logit_scale": -0.7, "temperature": 1.3},
}


@pytest.fixture
def kernels(request):
    if DEVICE == "cpu":
        return request.getfixturevalue("emulated_cuda")
    if reason := dispatch.unavailable_reason("cuda", torch.device(DEVICE)):
        pytest.skip(reason)
    return dispatch.load("cuda")


@pytest.fixture
def fused(kernels, monkeypatch):
    """The same, where a forward that is not fused is an error."""
    if not kernels.has_fused_forward(torch.get_default_device()):
        pytest.skip("the fused forward is Hopper's")
    monkeypatch.setattr(kernels, "fold_", None)
    return kernels


# [S, T, H, V]; whole blocks of H and V, and more rows than a cluster has
SHAPES = {"tails": (4, 9, 40, 123), "one row": (2, 1, 72, 600), "whole blocks": (4, 80, 128, 512)}


@pytest.mark.parametrize(
    "dtype, transform, stats, shape",
    covering(["bfloat16", "float16"], list(TRANSFORMS), ["no stats", "stats"], list(SHAPES)),
)
def test_fused_forward(fused, dtype, transform, stats, shape):
    transform, stats = TRANSFORMS[transform], STATS if stats == "stats" else ()
    inputs = head_inputs(*SHAPES[shape], confident=0.3).to(getattr(torch, dtype))
    bias = inputs.bias if transform else None
    with torch.no_grad():
        out = linear_sequence_logps(*inputs[:3], bias=bias, stats=stats, impl="cuda", **transform)
        eager = eager_token_logps(eager_logits(inputs.hidden, inputs.weight, bias=bias, **transform), inputs.labels)
        exact = inputs.to(torch.float64)
        logits = eager_logits(exact.hidden, exact.weight, bias=exact.bias if transform else None, **transform)
    assert_within_budget(out.token_logps, eager, eager_token_logps(logits, exact.labels), "token_logps")
    expected = eager_stats(logits, exact.labels)
    for name in stats:
        torch.testing.assert_close(
            out.stats[name].double(), expected[name].double(), rtol=1e-5, atol=1e-5, msg=lambda t, at=name: f"{at}: {t}"
        )


@pytest.mark.parametrize("stats", [(), ("is_top1", "entropy")], ids=["", "stats"])
def test_the_splits_change_nothing(fused, monkeypatch, stats):
    inputs = head_inputs(4, 150, 24, 1500, labelled=1.0).to(torch.float16)  # three pairs of blocks of rows
    found = []
    for splits in (1, 2, 5, 6):
        monkeypatch.setattr(fused.cuda_linear, "splits_of", lambda *_, splits=splits: splits)
        with torch.no_grad():
            found.append(linear_sequence_logps(*inputs[:3], stats=stats, impl="cuda"))
    for other in found[1:]:
        torch.testing.assert_close(other.token_logps, found[0].token_logps, rtol=0, atol=2e-6)
        for name in stats:
            torch.testing.assert_close(other.stats[name], found[0].stats[name], rtol=1e-5, atol=1e-5)


def test_the_order_of_threads_and_copies_changes_nothing(fused, monkeypatch):
    """Not even a bit. (On a GPU, where nobody can choose the order: from run to run.)"""
    inputs = head_inputs(4, 80, 296, 700, labelled=1.0).to(torch.bfloat16)
    found = []
    for seed in range(6):
        monkeypatch.setenv("DPO_EMULATION_SEED", str(seed))
        with torch.no_grad():
            found.append(linear_sequence_logps(*inputs[:3], impl="cuda").token_logps)
    assert all(torch.equal(other, found[0]) for other in found[1:])


def test_a_weight_whose_rows_lie_apart(fused):
    """Read in place, as a part of a larger matrix."""
    inputs = head_inputs(2, 20, 40, 300, labelled=1.0).to(torch.bfloat16)
    apart = torch.full((300, 96), torch.nan, dtype=torch.bfloat16)
    apart[:, :40] = inputs.weight
    with torch.no_grad():
        together, read_in_place = (
            linear_sequence_logps(inputs.hidden, weight, inputs.labels, impl="cuda").token_logps
            for weight in (inputs.weight, apart[:, :40])
        )
    assert torch.equal(together, read_in_place)


def test_the_order_of_threads_changes_no_row(kernels, monkeypatch):
    """The same of the kernels on rows, whose statistics go through one shared memory one after the other."""
    logits, labels = torch.randn(1, 3, 1500), torch.tensor([[3, 700, 1499]])
    found = []
    for seed in range(6):
        monkeypatch.setenv("DPO_EMULATION_SEED", str(seed))
        out = sequence_logps(logits, labels, stats=STATS, impl="cuda")
        found.append(torch.stack([out.token_logps, *(out.stats[name].float() for name in STATS)]))
    assert all(torch.equal(other, found[0]) for other in found[1:])


@pytest.mark.parametrize("splits", [1, 3])
def test_the_first_of_equal_logits_is_the_top_one(fused, monkeypatch, splits):
    monkeypatch.setattr(fused.cuda_linear, "splits_of", lambda *_: splits)
    # of one thread and of two, in one block of columns and in two, in one split and in two
    for top in ((3, 5, 7), (2, 3, 259), (3, 12, 260), (3, 259, 515), (40, 300, 700), (255, 256, 511), (0, 1, 2)):
        weight = torch.zeros(768, 16, dtype=torch.float16)
        weight[:, 0] = -1.0
        weight[list(top), 0] = 1.0
        hidden = torch.ones(3, 1, 16, dtype=torch.float16)
        with torch.no_grad():
            out = linear_sequence_logps(hidden, weight, torch.tensor(top)[:, None], stats=("is_top1",), impl="cuda")
        assert out.stats["is_top1"].flatten().tolist() == [1.0, 0.0, 0.0], top


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_first_of_equal_entries_of_a_row_is_the_top_one(kernels, dtype):
    for top in ((3, 5, 6), (3, 12, 2000), (9, 9 + 4096, 9 + 8192), (9, 9 + 8192, 9 + 16384), (0, 1, 20000)):
        logits = torch.zeros(3, 1, 20001, dtype=dtype)
        logits[:, :, list(top)] = 1.0
        out = sequence_logps(logits, torch.tensor(top)[:, None], stats=("is_top1",), impl="cuda")
        assert out.stats["is_top1"].flatten().tolist() == [1.0, 0.0, 0.0], top


@pytest.mark.parametrize("options", [{}, {"softcap": 4.0}], ids=["", "softcap"])
@pytest.mark.parametrize("scale", [0.0, 1e-4])
def test_products_that_the_scale_makes_small(kernels, options, scale):
    inputs = head_inputs(2, 9, 64, 300, logit_std=1e4).to(torch.bfloat16)
    results = []
    for impl in ("cuda", "torch"):
        with torch.no_grad():
            out = linear_sequence_logps(*inputs[:3], logit_scale=scale, stats=STATS, impl=impl, **options)
        results.append([out.token_logps, *out.stats.values()])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_label_that_is_not_a_number(fused):
    inputs = head_inputs(2, 9, 64, 600, labelled=1.0).to(torch.bfloat16)
    bias = torch.zeros(600, dtype=torch.bfloat16)
    bias[inputs.labels[1, 2]] = torch.nan
    with torch.no_grad():
        out = linear_sequence_logps(*inputs[:3], bias=bias, check_hidden=False, impl="cuda")
    assert out.token_logps.isnan().all()


@pytest.mark.parametrize("stride, rows", [(24, 1), (17, 1), (17, 300), (0, 300)])
def test_rows_that_no_box_has(kernels, stride, rows):
    weight = torch.ones(rows * max(stride, 16), dtype=torch.bfloat16).as_strided((rows, 16), (stride, 1))
    hidden = torch.randn(1, 3, 16, dtype=torch.bfloat16)
    with torch.no_grad():
        out = linear_sequence_logps(hidden, weight, torch.zeros(1, 3, dtype=torch.int64), impl="cuda")
    torch.testing.assert_close(out.token_logps, torch.full((1, 3), -math.log(rows)))


def test_matrices_that_cannot_be_copied_in_boxes_go_through_tiles(kernels, monkeypatch):
    """Rows that begin anywhere, other dtypes than the one to multiply in, and gradients of hidden states."""
    folded = []
    fold = kernels.fold_
    monkeypatch.setattr(kernels, "fold_", lambda *args, **options: folded.append(1) or fold(*args, **options))
    inputs = head_inputs(2, 9, 31, 123).to(torch.bfloat16)  # 62 bytes from row to row
    with torch.no_grad():
        odd = linear_sequence_logps(*inputs[:3], impl="cuda").token_logps
        assert folded
        padded = [torch.nn.functional.pad(t, (0, 1)) for t in inputs[:2]]
        even = linear_sequence_logps(*padded, inputs.labels, impl="cuda").token_logps
    torch.testing.assert_close(odd, even, rtol=0, atol=2e-6)


@pytest.mark.parametrize("n, v", [(1, 256000), (300, 151936), (8192, 128256), (32768, 32000), (8192, 100)])
def test_splits_keep_the_clusters_busy(kernels, n, v):
    row_pairs, column_blocks = -(-n // 256), -(-v // 256)
    splits = kernels.cuda_linear.splits_of(n, v, 132)
    busiest = -(-row_pairs * splits // 66) * -(-column_blocks // splits)
    assert 1 <= splits <= column_blocks
    assert busiest <= max(1.1 * row_pairs * column_blocks / 66, 1) or busiest == -(-row_pairs // 66)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_rows_of_every_alignment(kernels, dtype):
    """Rows that begin anywhere within 16 bytes, of fewer and of more entries than a block takes at once."""
    for v in (1, 7, 64, 5003, 40000):
        whole = torch.randn(2, 2, v + 9, dtype=torch.float32).to(dtype) * 3
        labels = torch.randint(v, (2, 2))
        for start in (0, 1, 3, 8):
            logits = whole[:, :, start : start + v].detach().requires_grad_()
            before = whole.clone()
            results = []
            for impl in ("cuda", "torch"):
                out = sequence_logps(logits, labels, stats=STATS, impl=impl)
                results.append([out.token_logps, *out.stats.values(), *torch.autograd.grad(out.logps.sum(), logits)])
            for ours, theirs in zip(*results, strict=True):
                torch.testing.assert_close(ours, theirs, msg=lambda text, at=(v, start): f"{at}: {text}")
            assert torch.equal(whole, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_backward_in_place_writes_its_rows_alone(kernels, dtype):
    whole = torch.randn(2, 5, 307).to(dtype)
    labels = torch.randint(300, (2, 5))
    labels[0, 1] = labels[1, 4] = -100
    expected = torch.autograd.grad(
        sequence_logps(logits := whole[:, :, 5:305].clone().requires_grad_(), labels, impl="torch").logps.sum(), logits
    )[0]
    found = whole.clone()
    logits = found[:, :, 5:305].requires_grad_()
    out = sequence_logps(logits, labels, inplace_backward=True, impl="cuda")
    (gradient,) = torch.autograd.grad(out.logps.sum(), logits)
    torch.testing.assert_close(gradient, expected)
    assert torch.equal(found[:, :, :5].detach(), whole[:, :, :5]) and torch.equal(found[:, :, 305:], whole[:, :, 305:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("v", [8, 10008])  # less than a block reads at once, and more than twice
@pytest.mark.parametrize("seed", range(3))
def test_half_precision_results_in_the_memory_of_the_tile(kernels, monkeypatch, dtype, v, seed):
    monkeypatch.setenv("DPO_EMULATION_SEED", str(seed))
    a, y = 3 * torch.randn(5, v), torch.randint(v, (5,))
    logp, g, norm = -torch.rand(5), torch.randn(5), torch.stack([torch.full((5,), 9.0), torch.full((5,), v / 2)])
    of, columns, transform = GradRows(y, norm, logp, g), Columns(0, None), LogitTransform(softcap=5.0)
    found = []
    for inside in (True, False):
        exp, dlogits = a.clone(), a.clone()
        at = [kernels.out_tile(t, dtype) if inside else torch.empty(5, v, dtype=dtype) for t in (exp, dlogits)]
        assert (at[0].data_ptr() == exp.data_ptr()) == inside
        fold = kernels.new_fold(y, torch.float32, ())
        sums = torch.ones(5, 7)
        kernels.fold_exp_(fold, exp, at[0], slice(0, 5), columns, transform, sums)
        value = kernels.dlogits(dlogits, at[1], of, columns, transform)
        found.append([*at, value, fold.state])
        assert torch.equal(sums, torch.zeros(5, 7))  # of no earlier blocks: the least maximum there is
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


def test_sums_are_brought_to_a_new_maximum_alone(kernels):
    y = torch.tensor([0, 0, 2])
    fold = kernels.new_fold(y, torch.float32, ())
    sums = torch.ones(3, 2500)
    for first, expected in ((1.0, [0.0, 0.0, 0.0]), (2.0, [math.exp(-1), 1.0, math.exp(-1)])):
        a = torch.zeros(3, 4)
        a[:, 1] = torch.tensor([first, 1.0, first])
        kernels.fold_exp_(fold, a, a, slice(0, 3), Columns(0, None), LogitTransform(), sums.fill_(1.0))
        torch.testing.assert_close(sums, torch.tensor(expected)[:, None].expand(3, 2500))


@functools.cache
def machine_code_of(generation):
    """The kernels for a generation of GPUs in the module that was built with this package, by architecture."""
    spec = importlib.util.find_spec("dpo_kernels._cuda")
    if spec is None:
        pytest.skip("the CUDA kernels were not built: no nvcc")
    if machine_code.disassembler() is None:
        pytest.skip("no cuobjdump: Triton is not installed")
    found = {}
    for kernel in machine_code.kernels(spec.origin, "-arch", f"sm_{generation}"):
        found.setdefault(kernel["arch"], []).append(kernel)
    return found


@pytest.mark.full
@pytest.mark.parametrize("arch", ["80", "90", "100"])
def test_machine_code_of_the_row_kernels(arch):
    """Nothing spills, nothing is atomic, and rows move in 16 bytes; results in half precision of fp32 in 8."""
    sums = ("sum_tokens_kernel", "sum_tokens_bwd_kernel")
    of_rows = ("fold_kernel", "logits_fwd_kernel", "dlogits_kernel", "logits_bwd_kernel")
    found = ("find_rows_kernel", "gather_rows_kernel", "put_rows_kernel")
    counts = dict.fromkeys((*of_rows, "finish_kernel", "scale_kernel", "compare_kernel", *sums, *found), 0)
    for kernel in machine_code_of(arch)[arch]:
        (name,) = (name for name in counts if name in kernel["function"])
        counts[name] += 1
        assert kernel["local"] == kernel["atomics"] == 0, kernel
        assert kernel["stack"] <= (8 if name in sums else 0), kernel  # of a division in fp64, once a sequence
        # two blocks of 8 warps a multiprocessor at least, or one of 32
        assert kernel["registers"] <= (64 if name in ("find_rows_kernel", "compare_kernel") else 128), kernel
        if name in (*of_rows, "scale_kernel", *found[1:]):
            assert kernel["load128"] >= 4, kernel  # in flight at once
        if name in ("dlogits_kernel", "logits_bwd_kernel", "scale_kernel", *found[1:]):
            assert kernel["store128"] + kernel["store64"] >= 4, kernel
    assert counts == {
        "fold_kernel": 12, "logits_fwd_kernel": 8, "dlogits_kernel": 4, "logits_bwd_kernel": 4, "finish_kernel": 2,
        "scale_kernel": 4, "sum_tokens_kernel": 2, "sum_tokens_bwd_kernel": 2, "find_rows_kernel": 5,
        "gather_rows_kernel": 4, "put_rows_kernel": 4, "compare_kernel": 2,
    }  # fmt: skip


@pytest.mark.full
def test_machine_code_of_the_fused_product():
    """Its products are Hopper's, operands come in multicast boxes, and the accumulators stay in registers. What is
    stored is transposed on its way to shared memory, and leaves that in boxes."""
    kernels = [kernel for kernel in machine_code_of("90")["90a"] if "linear_fold_kernel" in kernel["function"]]
    # folds of two dtypes; exponentials of two formats; dlogits, which have no statistics
    assert len(kernels) == 8 + 8 + 2
    for kernel in kernels:
        assert kernel["hgmma"] > 0 and kernel["multicast"] > 0, kernel
        assert kernel["stack"] == kernel["local"] == kernel["atomics"] == 0, kernel
        # what a block of 384 threads starts with; the kernel then gives 232 to those that multiply
        assert kernel["registers"] == 168, kernel
        folds = "EpilogueE0" in kernel["function"]
        assert kernel["transposed_store"] == (0 if folds else 16) and kernel["box_store"] == (0 if folds else 4), kernel
        assert kernel["store128"] == 0, kernel


@pytest.mark.full
def test_machine_code_of_the_products_of_exponentials():
    """An operand comes from registers, where it was weighed while the product before was under way: two sets of these
    take turns, and the only waits are for all products but one, and for the last."""
    kernels = [kernel for kernel in machine_code_of("90")["90a"] if "linear_gradient_kernel" in kernel["function"]]
    # dX; dW in bf16 and in fp32, with sums for a bias and without
    assert len(kernels) == 1 + 4
    for kernel in kernels:
        assert kernel["hgmma"] == 2 * 4 and kernel["multicast"] > 0, kernel
        assert kernel["load_matrices"] == 2 * 4 and kernel["wgmma_waits"] == 2 + 1, kernel
        assert kernel["stack"] == kernel["local"] == kernel["atomics"] == 0, kernel
        # what a block of 384 threads starts with; the kernel then gives 232 to those that multiply
        assert kernel["registers"] == 168, kernel


@pytest.mark.full
def test_machine_code_between_hoppers_products():
    """What reads rows does so 16 bytes at a time, and several in flight."""
    names = ("join_kernel", "weigh_kernel", "dhidden_kernel")
    counts = dict.fromkeys(names, 0)
    for kernel in machine_code_of("90")["90a"]:
        if "linear_fold_kernel" in kernel["function"] or "linear_gradient_kernel" in kernel["function"]:
            continue
        (name,) = (name for name in counts if name in kernel["function"])
        counts[name] += 1
        assert kernel["stack"] == kernel["local"] == kernel["atomics"] == 0, kernel
        if name == "dhidden_kernel":
            assert kernel["load128"] >= 4 and kernel["store128"] + kernel["store64"] >= 4, kernel
    assert counts == {"join_kernel": 1, "weigh_kernel": 1, "dhidden_kernel": 2}


@pytest.mark.parametrize(
    ("built", "driver", "reason"),
    [
        (13000, 12040, "built with CUDA 13.0, for drivers from 580 on, and the driver here takes CUDA up to 12.4"),
        (12090, 11080, "built with CUDA 12.9, for drivers from 525 on, and the driver here takes CUDA up to 11.8"),
        (12090, 12040, None),  # within a major version
        (13000, 13010, None),
        (13000, 0, None),  # nothing can be asked
    ],
)
def test_a_driver_that_is_too_old_is_named(monkeypatch, built, driver, reason):
    spec = importlib.machinery.ModuleSpec("dpo_kernels._cuda", None)
    monkeypatch.setitem(sys.modules, spec.name, SimpleNamespace(CUDA_VERSION=built, __spec__=spec))
    monkeypatch.setattr(dispatch, "CUDA_PROBLEM", None)
    monkeypatch.setattr(verdicts, "cuda_of_driver", lambda: driver)
    found = dispatch.unavailable_reason("cuda", torch.device("cuda"))
    assert reason in found if reason else found is None
    monkeypatch.setattr(verdicts, "driver", lambda device: "470.1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert f"take drivers from {dispatch.driver_needed()} on" in env.report()
    assert "NVIDIA's driver 470.1 is here, and PyTorch sees no GPU with it" in env.report()
