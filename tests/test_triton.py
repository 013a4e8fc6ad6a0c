"""The Triton kernels beyond what every implementation is tested for: the fused forward, blocks of every kind, and the
machine code that they become on each generation of GPUs, which needs none."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dpo_kernels import dispatch, linear_sequence_logps
from dpo_kernels.impl.interface import STATS
from dpo_kernels.impl.reference import eager_logits, eager_token_logps
from dpo_kernels.testing import assert_within_budget, head_inputs

triton = pytest.importorskip("triton", reason="Triton is not installed")
if reason := dispatch.unavailable_reason("triton", torch.get_default_device()):
    pytest.skip(reason, allow_module_level=True)
kernels = dispatch.load("triton")
linear = pytest.importorskip("dpo_kernels.impl.triton_linear")
COMPILE = Path(__file__).with_name("gpu") / "compile.py"
ALL = {"softcap": 5.0, "logit_scale": -0.7, "temperature": 1.3}


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(linear, "BLOCK_N", 16)
    monkeypatch.setattr(linear, "BLOCK_H", 16)
    monkeypatch.setattr(linear, "block_v", lambda stats, hopper: 32)


def statistics(logits, labels):
    """Of fp64 logits [S, T, V], at the labelled positions."""
    logp = logits.log_softmax(-1)
    found = {
        "entropy": -(logp.exp() * logp).sum(-1),
        "is_top1": (logits.argmax(-1) == labels).double(),
        "mean_logit": logits.mean(-1),
        "log_sum_sq_probs": (2 * logp).logsumexp(-1),
    }
    return {name: found[name][labels != -100] for name in STATS}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transform", [{}, ALL], ids=["plain", "all"])
@pytest.mark.parametrize("stats", [(), STATS], ids=["", "stats"])
@pytest.mark.parametrize("shape", [(4, 9, 31, 123), (2, 1, 16, 32), (2, 20, 40, 700)], ids=str)  # tails, one, many
def test_fused_forward(small_blocks, monkeypatch, dtype, transform, stats, shape):
    monkeypatch.setattr(kernels, "FUSED_FORWARD", True)
    monkeypatch.setattr(kernels, "fold_", None)  # no tiles
    inputs = head_inputs(*shape, confident=0.3).to(dtype)
    bias = inputs.bias if transform else None
    with torch.no_grad():
        out = linear_sequence_logps(*inputs[:3], bias=bias, stats=stats, impl="triton", **transform)
        eager = eager_token_logps(eager_logits(inputs.hidden, inputs.weight, bias=bias, **transform), inputs.labels)
        exact = inputs.to(torch.float64)
        logits = eager_logits(exact.hidden, exact.weight, bias=exact.bias if transform else None, **transform)
    assert_within_budget(out.token_logps, eager, eager_token_logps(logits, exact.labels), "token_logps")
    if stats:
        for name, expected in statistics(logits, exact.labels).items():
            got = out.stats[name][exact.labels != -100].double()
            torch.testing.assert_close(
                got, expected, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
            )


def test_fused_forward_does_not_depend_on_the_splits(small_blocks, monkeypatch):
    monkeypatch.setattr(kernels, "FUSED_FORWARD", True)
    inputs = head_inputs(2, 9, 31, 300).to(torch.float16)
    found = []
    for splits in (1, 2, 3, 10):
        monkeypatch.setattr(linear, "splits_of", lambda *_, splits=splits: splits)
        with torch.no_grad():
            found.append(linear_sequence_logps(*inputs[:3], stats=("is_top1", "entropy"), impl="triton"))
    for other in found[1:]:
        torch.testing.assert_close(other.token_logps, found[0].token_logps, rtol=0, atol=2e-6)
        assert torch.equal(other.stats["is_top1"], found[0].stats["is_top1"])
        torch.testing.assert_close(other.stats["entropy"], found[0].stats["entropy"], rtol=1e-5, atol=1e-5)


def test_equal_maxima_of_two_splits(small_blocks, monkeypatch):
    """The first of equal logits is the top one, be it the label (40) or the other (70)."""
    monkeypatch.setattr(kernels, "FUSED_FORWARD", True)
    monkeypatch.setattr(linear, "splits_of", lambda *_: 4)
    weight = torch.zeros(128, 16, dtype=torch.float16)
    weight[:, 0] = -1.0
    weight[[40, 70], 0] = 1.0
    hidden = torch.ones(2, 1, 16, dtype=torch.float16)
    with torch.no_grad():
        out = linear_sequence_logps(hidden, weight, torch.tensor([[40], [70]]), stats=("is_top1",), impl="triton")
    assert out.stats["is_top1"].flatten().tolist() == [1.0, 0.0]


def test_a_frozen_heads_gradient_needs_tiles(small_blocks, monkeypatch):
    monkeypatch.setattr(kernels, "FUSED_FORWARD", True)
    inputs = head_inputs(2, 9, 31, 123).to(torch.bfloat16)
    inputs.weight.requires_grad_(False)
    found = []
    for impl in ("triton", "torch"):
        logps = linear_sequence_logps(*inputs[:3], impl=impl).logps
        found.append(torch.autograd.grad(logps.sum(), inputs.hidden)[0])
    torch.testing.assert_close(*found, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("n, v", [(1, 256000), (300, 151936), (8192, 128256), (32768, 32000), (8192, 100)])
def test_splits_keep_the_multiprocessors_busy(n, v):
    """The busiest goes through at most an eighth more blocks than if all had equal shares, or has one block alone."""
    row_blocks, column_blocks = -(-n // linear.BLOCK_N), -(-v // 256)
    splits = linear.splits_of(n, v, 132, 256)
    busiest = -(-row_blocks * splits // 132) * -(-column_blocks // splits)
    assert 1 <= splits <= column_blocks
    assert busiest <= max(1.125 * row_blocks * column_blocks / 132, 1) or busiest == -(-row_blocks // 132)


@pytest.mark.parametrize("block_n", [1, 4])
@pytest.mark.parametrize("block_v", [8, 64])
@pytest.mark.parametrize("frozen", [False, True])
def test_rows_of_several_blocks(monkeypatch, block_n, block_v, frozen):
    monkeypatch.setattr(kernels, "BLOCK_N", block_n)
    monkeypatch.setattr(kernels, "MAX_BLOCK_V", {"fold": block_v, "dlogits": block_v})
    inputs = head_inputs(2, 3, 8, 67, confident=0.3)
    inputs.weight.requires_grad_(not frozen)
    wanted = [t for t in (inputs.hidden, inputs.weight) if t.requires_grad]
    results = []
    for impl in ("triton", "torch"):
        out = linear_sequence_logps(*inputs[:3], softcap=4.0, stats=STATS, impl=impl)
        results.append([out.token_logps, *out.stats.values(), *torch.autograd.grad(out.logps.sum(), wanted)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-6)


SHARED_MEMORY = {80: 163, 90: 227, 100: 227}  # KiB of a block


@pytest.mark.parametrize("sm", SHARED_MEMORY)
def test_machine_code(sm, tmp_path):
    """Nothing spills, nothing is atomic, tiles move in 16 bytes, and the fused forward runs on tensor cores."""
    env = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    env["PYTHONPATH"] = os.pathsep.join([str(Path(dispatch.__file__).parents[1]), env.get("PYTHONPATH", "")])
    command = [sys.executable, str(COMPILE), str(sm)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len({row["kernel"] for row in rows}) == len(rows) == 30
    for row in rows:
        kernel = row["kernel"]
        assert row["stack"] == row["local"] == row["atomics"] == 0, row
        if kernel.startswith("linear"):
            assert row["tensor_core"] > 0 and row["copy_to_shared"] > 0, row
            assert (row["hgmma"] > 0) == (sm == 90), row
            assert row["shared"] <= SHARED_MEMORY[sm] * 1024, row
            continue
        assert row["load128"] > 0, row
        assert row["store128"] > 0 or (kernel.startswith("fold") and "exp" not in kernel), row
        # two blocks of 8 warps a multiprocessor at least; fp64 is for gradients' checks
        assert row["registers"] <= 128 or "fp64" in kernel, row
