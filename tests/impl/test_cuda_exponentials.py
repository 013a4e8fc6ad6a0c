"""Paths A to D of bf16 heads on Hopper, whose product stores exponentials or dlogits and no logits: values and
gradients against fp64, rows that overflow, what is launched, and sums of a reference. Without a GPU the kernels run on
the CPU, through the emulation in tests/impl/cuda."""

import math
from collections import Counter

import pytest
import torch
from exponentials import Operators, assert_rows_within, by_eager, bytes_for_some, growing, hinge_coefficients
from grids import covering
from places import DEVICE
from torch.utils._python_dispatch import _disable_current_modes

from dpo_kernels import dispatch, linear_dpo_loss, linear_sequence_logps
from dpo_kernels.impl import exponential_paths, paths
from dpo_kernels.impl.blocks import spans
from dpo_kernels.impl.interface import STATS, GradRows, LogitTransform
from dpo_kernels.impl.reference import eager_logits, eager_stats, eager_token_logps
from dpo_kernels.linear_reference import linear_reference_logps
from dpo_kernels.testing import assert_within_budget, head_inputs

BF16 = torch.bfloat16
TRANSFORMS = {"plain": {}, "all": {"softcap": 5.0, "logit_scale": -0.7, "temperature": 1.3}}
NAMES = ("hidden", "weight", "bias")
NEED = {"head": ("hidden", "weight"), "all": NAMES, "head alone": ("weight", "bias"), "bias": ("hidden", "bias")}
# [S, T, H, V]: less than a block of each kind; one row; several blocks of rows, of columns and of depth
SHAPES = {"tails": (4, 9, 48, 123), "one row": (2, 1, 16, 300), "blocks": (4, 70, 72, 700)}
# More rows than the memory of dW has room for, so that pairs come in several groups.
SEVERAL = (4, 90, 16, 251)
# Exponentials lie in the memory of dW, which is written in three blocks.
KEPT = (4, 25, 48, 1300)
# One pair, the exponentials of some of whose entries lie there.
SOME = (2, 50, 48, 1300)


@pytest.fixture
def kernels(request, monkeypatch):
    """Hopper's, where tiles of logits are an error; and several blocks of each kind."""
    if DEVICE == "cpu":
        module = request.getfixturevalue("emulated_cuda")
    elif reason := dispatch.unavailable_reason("cuda", torch.device(DEVICE)):
        pytest.skip(reason)
    else:
        module = dispatch.load("cuda")
    if not module.has_fused_forward(torch.get_default_device()):
        pytest.skip("these kernels are Hopper's")
    monkeypatch.setattr(module.cuda_exponentials, "EXP_BYTES", 2**17)
    monkeypatch.setattr(module.cuda_exponentials, "FIRST_COLUMNS", 40)
    monkeypatch.setattr(exponential_paths, "DW_COLUMNS", 40)
    for name in ("fold_", "fold_exp_", "dlogits"):
        monkeypatch.setattr(module, name, None)
    return module


@pytest.mark.parametrize(
    ("transform", "stats", "shape", "confident"),
    covering(list(TRANSFORMS), [(), STATS, ("is_top1",)], list(SHAPES), [0.0, 0.7]),
)
def test_frozen_head(kernels, transform, stats, shape, confident):
    options, labelled = TRANSFORMS[transform], 1.0 if shape == "one row" else 0.8
    inputs = head_inputs(*SHAPES[shape], confident=confident, labelled=labelled).to(BF16)
    exact, coefficients = inputs.to(torch.float64), torch.linspace(-1.0, 2.0, inputs.labels.shape[0])
    bias = inputs.bias.detach() if options else None
    found = linear_sequence_logps(
        inputs.hidden, inputs.weight.detach(), inputs.labels, bias=bias, stats=stats, impl="cuda", **options
    )
    (mine,) = torch.autograd.grad((found.logps * coefficients).sum(), inputs.hidden)
    theirs, (eager,) = by_eager(inputs, coefficients, ["hidden"], options, bool(options))
    best, (oracle,) = by_eager(exact, coefficients, ["hidden"], options, bool(options))
    assert_within_budget(found.token_logps.detach(), theirs.detach(), best.detach(), "token_logps")
    assert_within_budget(mine, eager, oracle, "dhidden")
    labelled = inputs.labels >= 0
    assert_rows_within(mine[labelled], eager[labelled], oracle[labelled], "dhidden")
    logits = eager_logits(exact.hidden, exact.weight, bias=exact.bias if options else None, **options)
    expected = eager_stats(logits.detach(), exact.labels)
    for name in stats:
        mine, best = found.stats[name].double(), expected[name].double()
        torch.testing.assert_close(mine, best, rtol=1e-5, atol=1e-5, msg=lambda text, at=name: f"{at}: {text}")


def assert_gradients(inputs, need, mine, eager, oracle):
    """Within the budget as a whole, and each labelled row of hidden states and each label's row of the weight too."""
    for name, ours, theirs, exact in zip(need, mine, eager, oracle, strict=True):
        assert_within_budget(ours, theirs, exact, f"d{name}")
        if name == "hidden":
            labelled = inputs.labels >= 0
            assert_rows_within(ours[labelled], theirs[labelled], exact[labelled], "dhidden")
        elif name == "weight":  # of labels, where what was confident nearly cancels
            rows = inputs.labels[inputs.labels >= 0].unique()
            assert_rows_within(ours[rows], theirs[rows], exact[rows], "dweight")


def trained(inputs, need, transform, chunk_bytes=None, stats=()):
    """Path C's loss with row weights that do not depend on log-probabilities, and its gradients."""
    leaves = [getattr(inputs, name).detach().requires_grad_(name in need) for name in NAMES]
    out = linear_dpo_loss(
        *leaves[:2], inputs.labels, inputs.ref_logps, bias=leaves[2] if "bias" in need else None, loss_type="hinge",
        beta=0.001, chunk_bytes=chunk_bytes, stats=stats, impl="cuda", **transform,
    )  # fmt: skip
    return out, torch.autograd.grad(out.loss, [t for t in leaves if t.requires_grad])


def pair_bytes(kernels, monkeypatch, inputs, dweight):
    """What the longest pair takes, beside the sums of dW; less than all of them do. Where one part with some of its
    exponentials would be faster, there is none."""
    monkeypatch.setattr(exponential_paths, "stored_columns", lambda *_: 0)
    sizes = (inputs.labels >= 0).sum(1).view(2, -1).sum(0).tolist()
    of_row = paths.kept_bytes(kernels, 1, inputs.weight, torch.float32, True, False).of_row
    found = kernels.padded_rows(max(sizes)) * of_row + inputs.weight.numel() * 4 * dweight
    assert found < paths.kept_bytes(kernels, sum(sizes), inputs.weight, torch.float32, True, dweight).buffer
    return found


@pytest.mark.parametrize(
    ("transform", "need", "shape", "confident", "stats"),
    covering(
        *(list(TRANSFORMS), list(NEED), [SHAPES["tails"], SHAPES["blocks"], SEVERAL, KEPT], [0.0, 1.0], [(), STATS]),
        full=2,
    ),
)
def test_trained_head(kernels, monkeypatch, transform, need, shape, confident, stats):
    options, need = TRANSFORMS[transform], NEED[need]
    inputs = head_inputs(*shape, confident=confident, labelled=0.8).to(BF16)
    out, mine = trained(
        inputs,
        need,
        options,
        pair_bytes(kernels, monkeypatch, inputs, "weight" in need) if shape == SEVERAL else None,
        stats,
    )
    coefficients, with_bias = hinge_coefficients(inputs), "bias" in need
    _, eager = by_eager(inputs, coefficients, need, options, with_bias)
    best, oracle = by_eager(inputs.to(torch.float64), coefficients, need, options, with_bias)
    torch.testing.assert_close(out.logps.double(), best.sum(1).detach(), rtol=1e-5, atol=1e-5)
    assert_gradients(inputs, need, mine, eager, oracle)


@pytest.mark.parametrize(
    ("transform", "need", "buffer", "confident", "stats"),
    covering(list(TRANSFORMS), [*NEED, "bias alone"], [256, 512], [0.0, 1.0], [(), STATS], full=2),
)
def test_exponentials_of_some_entries(kernels, monkeypatch, transform, need, buffer, confident, stats):
    """In the memory of dW, where there is one, and in a buffer; with labels there, and among the entries whose products
    are computed again, in blocks, the last of which is smaller."""
    options, need = TRANSFORMS[transform], NEED.get(need, ("bias",))
    monkeypatch.setattr(kernels, "recomputed_columns", lambda n, v, h, device: min(v, 192))
    inputs, of = head_inputs(*SOME, confident=confident, labelled=0.8).to(BF16), kernels.recomputed
    chunk_bytes, stored = bytes_for_some(kernels, inputs, need, buffer)
    parts, used = sorted({0, stored - buffer, stored}), []
    of_labels = torch.bucketize(inputs.labels[inputs.labels >= 0], torch.tensor(parts), right=True)
    assert of_labels.unique().numel() == len(parts), "labels of each part"
    monkeypatch.setattr(kernels, "recomputed", lambda *args: used.append(args) or of(*args))
    out, mine = trained(inputs, need, options, chunk_bytes, stats)
    assert len(used) == 1, "path C"
    coefficients, with_bias = hinge_coefficients(inputs), "bias" in need
    _, eager = by_eager(inputs, coefficients, need, options, with_bias)
    best, oracle = by_eager(inputs.to(torch.float64), coefficients, need, options, with_bias)
    torch.testing.assert_close(out.logps.double(), best.sum(1).detach(), rtol=1e-5, atol=1e-5)
    assert_gradients(inputs, need, mine, eager, oracle)
    logits = eager_logits(*inputs.to(torch.float64)[:2], bias=inputs.bias.double() if with_bias else None, **options)
    for name, best in eager_stats(logits.detach(), inputs.labels).items():
        if name in stats:
            torch.testing.assert_close(out.stats[name].double(), best.double(), rtol=1e-5, atol=1e-5)
    again, gradients = trained(inputs, need, options, chunk_bytes, stats)
    assert torch.equal(out.logps, again.logps) and all(map(torch.equal, mine, gradients)), "the same bits"


@pytest.mark.parametrize(
    ("transform", "need", "shape", "confident"),
    covering(list(TRANSFORMS), [*NEED, "bias alone"], ["tails", "blocks"], [0.0, 1.0], full=2),
)
def test_any_loss_of_a_trained_head(kernels, monkeypatch, transform, need, shape, confident):
    """Path D, in blocks of the vocabulary."""
    monkeypatch.setattr(kernels, "recomputed_columns", lambda n, v, h, device: 64 if v < 256 else 320)
    options, need = TRANSFORMS[transform], NEED.get(need, ("bias",))
    inputs = head_inputs(*SHAPES[shape], confident=confident, labelled=0.8).to(BF16)
    leaves, with_bias = [getattr(inputs, name).detach().requires_grad_(name in need) for name in NAMES], "bias" in need
    coefficients = torch.linspace(-1.0, 2.0, inputs.labels.shape[0])
    found = linear_sequence_logps(
        *leaves[:2], inputs.labels, bias=leaves[2] if with_bias else None, impl="cuda", **options
    )
    mine = torch.autograd.grad((found.logps * coefficients).sum(), [t for t in leaves if t.requires_grad])
    _, eager = by_eager(inputs, coefficients, need, options, with_bias)
    best, oracle = by_eager(inputs.to(torch.float64), coefficients, need, options, with_bias)
    torch.testing.assert_close(found.logps.double(), best.sum(1).detach(), rtol=1e-5, atol=1e-5)
    assert_gradients(inputs, need, mine, eager, oracle)


@pytest.mark.parametrize("path", ["B", "C"])
@pytest.mark.parametrize("softcap", [None, 300.0])
def test_rows_that_would_overflow(kernels, path, softcap):
    """They alone have their exponentials written again in path B; in path C no exponential can overflow."""
    inputs, options = growing().to(BF16), {"softcap": softcap}
    coefficients = hinge_coefficients(inputs)
    if path == "B":
        found = linear_sequence_logps(
            inputs.hidden, inputs.weight.detach(), inputs.labels, stats=STATS, impl="cuda", **options
        )
        mine = torch.autograd.grad((found.logps * coefficients).sum(), inputs.hidden)
        assert all(torch.isfinite(t).all() for t in found.stats.values())
    else:
        found, mine = trained(inputs, ("hidden", "weight"), options)
    names = ("hidden", "weight")[: len(mine)]
    _, eager = by_eager(inputs, coefficients, names, options, False)
    best, oracle = by_eager(inputs.to(torch.float64), coefficients, names, options, False)
    torch.testing.assert_close(found.logps.double(), best.sum(1).detach(), rtol=1e-5, atol=1e-4)
    for name, ours, theirs, exact in zip(names, mine, eager, oracle, strict=True):
        assert_within_budget(ours, theirs, exact, f"d{name}")
    assert_rows_within(mine[0], eager[0], oracle[0], "dhidden")


@pytest.mark.parametrize("path", ["A", "B", "C", "D"])
@pytest.mark.parametrize(
    ("impossible", "softcap"),
    [(*at, None) for at in (["first columns"], ["some"], ["all but one more"], ["a block"])]
    + [("a block", 5.0), ("the last ones", 5.0)],
)
def test_entries_that_cannot_be(kernels, path, impossible, softcap):
    """A bias of -inf: in all of the columns that a shift is taken from, here and there, nearly everywhere, in all of a
    split's first block, and of its last. A softcap makes entries of them that can be."""
    options = {} if softcap is None else {"softcap": softcap}
    inputs = head_inputs(4, 9, 48, 523, confident=0.3).to(BF16)
    inputs.labels[inputs.labels >= 0] = 264 + inputs.labels[inputs.labels >= 0] % 2
    entries = torch.arange(523)
    out = {
        "first columns": entries < 50,
        "some": (entries % 3 == 0) & (entries != 264) & (entries != 265),
        "all but one more": (entries != 264) & (entries != 265),
        "a block": entries < 256,
        "the last ones": entries >= 512,
    }[impossible]
    bias = inputs.bias.detach().masked_fill(out, -torch.inf)
    inputs = inputs._replace(bias=bias.requires_grad_())
    # of two entries alone, chance decides how well the gradients of weight and bias are rounded
    need = () if path == "A" else NAMES[:1] if path == "B" or "more" in impossible else NAMES
    coefficients, mine = hinge_coefficients(inputs), ()
    if path == "C":
        found, mine = trained(inputs, NAMES, options)
    else:
        on = {"A": (), "B": NAMES[:1], "D": NAMES}[path]
        leaves = [getattr(inputs, name).detach().requires_grad_(name in on) for name in NAMES]
        found = linear_sequence_logps(*leaves[:2], inputs.labels, bias=leaves[2], impl="cuda", **options)
        if on:
            mine = torch.autograd.grad((found.logps * coefficients).sum(), [t for t in leaves if t.requires_grad])
    _, eager = by_eager(inputs, coefficients, NAMES, options, True)
    best, oracle = by_eager(inputs.to(torch.float64), coefficients, NAMES, options, True)
    torch.testing.assert_close(found.logps.double(), best.sum(1).detach(), rtol=1e-5, atol=1e-5)
    for name, ours, theirs, exact in zip(need, mine, eager, oracle, strict=False):  # the first ones
        assert_within_budget(ours, theirs, exact, f"d{name}")


@pytest.mark.parametrize("path", ["A", "C"])
def test_statistics_where_a_split_begins_with_the_least_numbers(kernels, path):
    """As masks write them: what is far below the row's maximum is 0 times a large distance."""
    inputs = head_inputs(2, 6, 16, 9 * 256, labelled=1.0).to(BF16)
    bias = inputs.bias.detach().masked_fill(torch.arange(9 * 256) // 256 % 2 == 0, torch.finfo(BF16).min)
    inputs.labels.fill_(300)
    if path == "A":
        found = linear_sequence_logps(
            inputs.hidden.detach(), inputs.weight.detach(), inputs.labels, bias=bias, stats=["entropy"], impl="cuda"
        )
    else:
        found, _ = trained(inputs._replace(bias=bias.requires_grad_()), NAMES, {}, stats=["entropy"])
    exact = inputs.to(torch.float64)
    logits = eager_logits(exact.hidden, exact.weight, bias=bias.double()).detach()
    best = eager_stats(logits, exact.labels)["entropy"]
    torch.testing.assert_close(found.stats["entropy"].double(), best, rtol=1e-5, atol=1e-5)


def flat(inputs):
    return inputs.hidden.detach().flatten(0, 1), inputs.weight.detach(), inputs.labels.flatten()


def padded(kernels, weight, n, value=math.nan):
    """Memory of what is stored for n rows; and what is behind these."""
    memory = weight.new_full((weight.shape[0], kernels.padded_rows(n)), value)
    return memory[:, :n], memory[:, n:]


def test_each_confident_row_keeps_its_digits(kernels):
    """Of dX before its last rounding. With the label's entry rounded the error is 1e-3 and more; what is left beside it
    is the rounding of the others, which their number averages."""
    inputs = head_inputs(4, 12, 64, 500, confident=1.0, labelled=1.0, logit_std=1.0).to(BF16)
    x, weight, y = flat(inputs)
    _, (best,) = by_eager(inputs.to(torch.float64), torch.ones(4), ["hidden"], {}, False)
    best = best.flatten(0, 1)
    out = paths.linear_logps_fwd(
        kernels, x, weight, None, y, LogitTransform(), compute_dtype=BF16, with_dhidden=True, fused=True
    )
    (e, _), rows, sums = padded(kernels, weight, 48), slice(0, 48), torch.empty(48, 64)
    sweep = kernels.exponentials(x, weight, None, y, LogitTransform(), (), 48, (500,), packed=True)
    sweep.write(rows, [e])
    logp, norm, _ = sweep.finish(rows)
    sweep.weigh([e], rows, torch.ones(48)).dhidden(sums)
    again = kernels.recomputed(x, weight, None, GradRows(y, norm, logp, torch.ones(48)), LogitTransform())
    d, _ = padded(kernels, weight, 48)
    again.write(slice(0, 500), d)
    found = [out.dhidden, sweep.dhidden(sums, torch.empty_like(sums))]
    found.append(again.dhidden(kernels.product(d.t(), weight, torch.empty_like(sums)), torch.empty_like(sums)))
    for dx in found:
        error = (dx.double() - best).norm(dim=1) / best.norm(dim=1)
        assert error.median() < 5e-4, error


@pytest.mark.parametrize("transform", [LogitTransform(), LogitTransform(-0.7, 5.0, 1.3)], ids=["", "softcap"])
def test_packed_exponentials(kernels, transform):
    """Each within 2^-11 of fp64's down to 2^-29 of the largest so far, none above it, 0 at the label; with the row's
    running maximum for each block of columns. Nothing is written behind the last row."""
    inputs = head_inputs(2, 20, 48, 700, labelled=1.0, logit_std=6.0).to(BF16)
    x, weight, y = flat(inputs)
    sizes, columns = (300, 400), [slice(0, 256), slice(256, 300), slice(300, 556), slice(556, 700)]
    sweep = kernels.exponentials(x, weight, None, y, transform, (), 40, sizes, packed=True)
    e, behind = padded(kernels, weight, 40)
    sweep.write(slice(0, 40), list(e.split(sizes)))
    assert behind.isnan().all()
    options = {"softcap": transform.softcap, "logit_scale": transform.scale, "temperature": transform.temperature}
    logits = eager_logits(x.double(), weight.double(), **options).T
    slope = 1.0 if transform.softcap is None else 1 - (logits * transform.temperature / transform.softcap) ** 2
    outer = abs(transform.slope) if transform.softcap is None else transform.softcap / transform.temperature
    others = torch.arange(700)[:, None] != y
    stored = e.view(torch.float16).double() / 2**15
    assert (stored[~others] == 0).all() and stored.max() <= 1
    for at, block in enumerate(columns):
        shift = outer * sweep.shift[at, :40].double()
        exact = (
            torch.exp(logits[block] - shift) * slope[block] if transform.softcap else torch.exp(logits[block] - shift)
        )
        large = others[block] & (exact > 2.0**-29)
        assert large.any() and ((stored[block] / exact - 1).abs()[large] < 2.0**-11 + 2e-5).all()
        assert (stored[block][others[block] & (exact < 2.0**-41)] == 0).all()
        beside = torch.where(others[block], logits[block], -torch.inf).amax(0)
        assert (shift > beside - 1e-5).all()
    top = torch.where(others, logits, -torch.inf).amax(0)
    torch.testing.assert_close(outer * sweep.shift[:, :40].amax(0).double(), top, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("size", [1e7, 1e12])
def test_logits_of_any_size(kernels, size):
    """Where what fp32 rounds of a logit is more than all that fp16 holds of its exponential."""
    x, weight, y = flat(head_inputs(2, 8, 48, 323, labelled=1.0, logit_std=size).to(BF16))
    e, _ = padded(kernels, weight, 16)
    for packed in (True, False):
        sweep = kernels.exponentials(x, weight, None, y, LogitTransform(), STATS, 16, (323,), packed=packed)
        sweep.write(slice(0, 16), [e])
        assert all(t.isfinite().all() for t in (*sweep.finish(slice(0, 16))[:2], sweep.scale, sweep.label, sweep.shift))
        assert (e.view(torch.float16) if packed else e).isfinite().all()


def test_weights_of_rows_of_any_size(kernels):
    """From coefficients that fp16 would not hold to such that a sum of squares overflows, in one batch."""
    inputs = head_inputs(4, 9, 48, 123, confident=0.5, labelled=1.0).to(BF16)
    exact = inputs.to(torch.float64)
    sizes = torch.tensor([1e-18, 1e-6, 1.0, 1e15])
    rows = [slice(9 * i, 9 * (i + 1)) for i in range(4)]
    x, weight, y = flat(inputs)
    for size, row in zip(sizes, rows, strict=True):
        dx, dw, _ = paths.linear_logps_grouped(
            kernels, x[row], weight, None, y[row], LogitTransform(), [slice(0, 9)],
            lambda i, logp, stats, size=size: torch.full_like(logp, float(size)),
            compute_dtype=BF16, need=(True, True, False), exponentials=True,
        )  # fmt: skip
        one = torch.where(torch.arange(4) == sizes.tolist().index(size), size.double(), 0.0)
        for name, ours in (("hidden", dx), ("weight", dw)):
            _, (theirs,) = by_eager(inputs, one, [name], {}, False)
            _, (best,) = by_eager(exact, one, [name], {}, False)
            theirs, best = (t.flatten(0, -2)[row] if name == "hidden" else t for t in (theirs, best))
            assert_within_budget(ours / size, theirs / size, best / size.double(), f"d{name} of {size:.0e}")


@pytest.mark.parametrize(
    ("shape", "sizes", "before", "parts"),
    [
        ((1, 20, 48, 123), (123,), 7, 3),
        ((1, 150, 8, 300), (300,), 0, 1),
        ((1, 150, 8, 300), (300,), 7, 3),
        ((1, 330, 264, 700), (300, 400), 0, 1),
        ((1, 140, 520, 1300), (576, 724), 7, 3),
    ],
)
def test_products_of_weighed_exponentials(kernels, monkeypatch, shape, sizes, before, parts):
    """From the kernels' own factors: each entry of dlogits is rounded once, labels' are in dW and not in dX, and sums
    are in fp32. Exponentials stay what they are, and nothing is written beside the blocks of dW that are asked for.
    `parts` of dX's sum are computed side by side."""
    monkeypatch.setattr(kernels.cuda_exponentials, "LONG_SUM", 1)
    monkeypatch.setattr(kernels.cuda_exponentials.waves, "sum_parts", lambda *_: min(parts, -(-shape[3] // 64)))
    transform, (_, count, h, v) = LogitTransform(-0.7, 5.0, 1.3), shape
    x, weight, y = flat(head_inputs(*shape, labelled=1.0, logit_std=4.0).to(BF16))
    rows, n = slice(before, count), count - before
    borders = torch.tensor([0, 127, 128, 255, 256, sizes[0] - 1, sizes[0], v - 1]).clamp(max=v - 1)
    y[before : before + len(borders)] = borders
    sweep = kernels.exponentials(x, weight, None, y, transform, (), n, sizes, packed=True)
    memory, behind = padded(kernels, weight, n)
    e, g = list(memory.split(sizes)), torch.linspace(-2.0, 3.0, n)
    sweep.write(rows, e)
    sweep.finish(rows)
    written, shift = memory.clone(), sweep.shift[:, :n].double()
    dlogits, factors = sweep.weigh(e, rows, g), sweep.shift[:, :n]
    exact = torch.exp(5.0 / 1.3 * (shift - sweep.top[rows])) * (g * sweep.scale[rows]).double() / 2**15
    torch.testing.assert_close(factors.double(), exact, rtol=2e-5, atol=0.0)
    torch.testing.assert_close(sweep.missing[rows], g * sweep.scale[rows] * sweep.label[rows], rtol=1e-6, atol=0.0)

    first_blocks = (0, -(-sizes[0] // 256))[: len(sizes)]
    block_of = torch.cat([at + torch.arange(size) // 256 for at, size in zip(first_blocks, sizes, strict=True)])
    wide, at_labels = memory.view(torch.float16).float() * factors[block_of], (y[rows], torch.arange(n))
    d = wide.to(BF16).double()
    assert (d[at_labels] == 0).all() and d.abs().max() > 0

    def assert_sums(found, a, b, more=0.0, rounded=0.0):
        """Those of a @ b in fp32, each beside the size of its terms."""
        a, b = a.double(), b.double()
        error, size = (found.double() - a @ b - more).abs(), a.abs() @ b.abs() + more
        assert (error <= 2e-6 * size + rounded * (a @ b).abs()).all(), (error / size).max()

    dx = torch.full((count, h), torch.nan)
    dlogits.dhidden(dx[rows])
    assert_sums(dx[rows], d.T, weight)
    assert dx[:before].isnan().all()

    d[at_labels], wide[at_labels] = sweep.missing[rows].to(BF16).double(), sweep.missing[rows]
    for part in (slice(0, sizes[0]), slice(sizes[0], v))[: len(sizes)]:
        blocks = [slice(part.start + s.start, part.start + s.stop) for s in spans(part.stop - part.start, 256)]
        beside = torch.ones(v, dtype=torch.bool)
        beside[part] = False
        for dtype, accumulate in ((BF16, False), (torch.float32, False), (torch.float32, True)):
            dw, db, alone = torch.full((v, h), 3.0, dtype=dtype), *torch.full((2, v), torch.nan)
            dlogits.dweight(blocks, dw, db, accumulate)
            dlogits.dweight([part], None, alone, False)
            assert_sums(dw[part], d[part], x[rows], 3.0 * accumulate, 2.0**-8 if dtype == BF16 else 0.0)
            assert_sums(db[part], wide[part], torch.ones(n))
            assert torch.equal(alone[part], db[part]), "without dW"
            assert (dw[beside] == 3).all() and db[beside].isnan().all()
    assert torch.equal(memory.view(torch.int16), written.view(torch.int16)) and behind.isnan().all()


@pytest.mark.parametrize("scale", [1.0, 717 / 1024])
def test_a_common_offset_costs_a_row_of_dlogits_nothing(kernels, scale):
    """Each entry is rounded at random; what a whole row is multiplied by is not."""
    x, weight = (torch.randn(size, 32, generator=torch.Generator().manual_seed(size)) for size in (70, 1024))
    x, weight, bias = (x / 20).to(BF16), weight.to(BF16), torch.full((1024,), 9984.0, dtype=BF16)
    y, of = torch.arange(70), LogitTransform(scale)
    # as the kernel rounds a product: what is left is the error of its exponentials
    z = (x.double() @ weight.double().t() + bias.double()).float().double() * scale
    found = paths.linear_logps_fwd(kernels, x, weight, bias, y, of, compute_dtype=BF16, fused=True)
    kept = (found.norm[0].double() - z.logsumexp(1)).exp() * found.norm[1]
    assert (kept - 1).square().mean().sqrt() < 1e-5
    d, _ = padded(kernels, weight, 70)
    sweep = kernels.recomputed(x, weight, bias, GradRows(y, found.norm, found.logp, torch.ones(70)), of)
    sweep.write(slice(0, 1024), d)
    exact = (scale * z.softmax(1)).scatter(1, y[:, None], 0)
    of_rows = -d.t().double().scatter(1, y[:, None], 0).sum(1) / exact.sum(1)
    assert (of_rows - 1).square().mean().sqrt() < 1e-4


@pytest.mark.parametrize("transform", list(TRANSFORMS))
@pytest.mark.parametrize("shape", [(1, 20, 48, 123), (1, 300, 72, 700)])
def test_recomputed_dlogits(kernels, transform, shape):
    """Of a block of the vocabulary at a time, each rounded once, labels too; 0 behind the last row. What rounding
    leaves of the labels is in dX."""
    inputs = head_inputs(*shape, confident=0.5, labelled=1.0, logit_std=4.0).to(BF16)
    (x, weight, y), options = flat(inputs), TRANSFORMS[transform]
    bias = inputs.bias.detach() if options else None
    of = LogitTransform(options.get("logit_scale", 1.0), options.get("softcap"), options.get("temperature", 1.0))
    found = paths.linear_logps_fwd(kernels, x, weight, bias, y, of, compute_dtype=BF16, fused=True)
    g = torch.linspace(-2.0, 3.0, len(y))
    sweep = kernels.recomputed(x, weight, bias, GradRows(y, found.norm, found.logp, g), of)
    d, behind = padded(kernels, weight, len(y))
    for block in spans(shape[-1], 256 if shape[-1] > 256 else 100):
        sweep.write(block, d[block])
    a = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    a.requires_grad_()
    z = a * of.scale if of.softcap is None else of.softcap * torch.tanh(a * of.scale / of.softcap)
    logp = (z / of.temperature).log_softmax(1).gather(1, y[:, None])[:, 0]
    (exact,) = torch.autograd.grad((logp * g).sum(), a)
    assert (behind == 0).all()
    large = exact.abs() > 1e-30
    assert ((d.t().double() - exact).abs()[large] <= exact.abs()[large] * (2.0**-8 + 5e-5)).all()
    left = (exact - d.t().double()).gather(1, y[:, None])[:, 0]
    torch.testing.assert_close(sweep.missing.double(), left, rtol=1e-2, atol=2e-6)
    dx = sweep.dhidden(torch.zeros(x.shape), torch.empty_like(x))
    torch.testing.assert_close(dx.double(), left[:, None] * weight[y].double(), rtol=2e-2, atol=1e-6)


@pytest.mark.parametrize("scale", [0.0, 1e-40, 1e-4])
def test_products_that_the_scale_makes_small(kernels, scale):
    inputs = head_inputs(2, 9, 64, 300, logit_std=1e4).to(BF16)
    results = []
    for impl in ("cuda", "torch"):
        for path in "ABC":
            hidden, weight = (
                t.detach().requires_grad_(path in on) for t, on in zip(inputs[:2], ("BC", "C"), strict=True)
            )
            if path == "C":
                out = linear_dpo_loss(hidden, weight, inputs.labels, inputs.ref_logps[:2], logit_scale=scale, impl=impl)
                results += [out.logps, *torch.autograd.grad(out.loss, (hidden, weight))]
            else:
                out = linear_sequence_logps(hidden, weight, inputs.labels, logit_scale=scale, impl=impl, stats=STATS)
                results += [out.token_logps, *out.stats.values()]
                if path == "B":
                    results += torch.autograd.grad(out.logps.sum(), hidden)
    half = len(results) // 2
    for ours, theirs in zip(results[:half], results[half:], strict=True):
        assert (ours.double() - theirs.double()).norm() <= 5e-3 * theirs.double().norm() + 1e-5


@pytest.mark.parametrize("path", ["B", "C"])
def test_no_labelled_rows(kernels, path):
    inputs = head_inputs(4, 5, 48, 123).to(BF16)
    inputs.labels[:] = -100
    inputs.weight.requires_grad_(path == "C")
    if path == "B":
        found = linear_sequence_logps(*inputs[:3], impl="cuda")
        (dx,) = torch.autograd.grad(found.logps.sum(), inputs.hidden)
        assert (dx == 0).all()
    else:
        found = linear_dpo_loss(*inputs[:3], torch.zeros(4), impl="cuda")
        assert all((t == 0).all() for t in torch.autograd.grad(found.loss, inputs[:2]))
    assert (found.logps == 0).all() and (found.num_tokens == 0).all()


@pytest.mark.parametrize("path", ["A", "B", "C"])
def test_the_first_of_equal_logits_is_the_top_one(kernels, monkeypatch, path):
    """Of one thread and of two, in one block of columns and in two, in one split and in two, and in two parts."""
    monkeypatch.setattr(kernels.cuda_linear, "splits_of", lambda *_: 2)
    for top in ((3, 5, 7), (2, 3, 259), (3, 12, 260), (3, 259, 515), (40, 300, 700), (255, 256, 511), (0, 1, 2)):
        weight = torch.zeros(768, 16, dtype=BF16)
        weight[:, 0] = -1.0
        weight[list(top), 0] = 1.0
        hidden, y = torch.ones(3, 16, dtype=BF16), torch.tensor(top)
        if path == "A":
            values = paths.linear_logps_fwd(
                kernels, hidden, weight, None, y, LogitTransform(), compute_dtype=BF16, stats=("is_top1",), fused=True
            ).stats
        else:
            sizes = (768,) if path == "B" else (272, 496)
            sweep = kernels.exponentials(
                hidden, weight, None, y, LogitTransform(), ("is_top1",), 3, sizes, packed=path == "C"
            )
            sweep.write(slice(0, 3), None)
            values = sweep.finish(slice(0, 3))[2]
        assert values.flatten().tolist() == [1.0, 0.0, 0.0], top


@pytest.mark.parametrize(
    ("gradients", "parts", "options", "stats"),
    covering(
        [("hidden",), ("hidden", "weight"), ("hidden", "weight", "bias"), ("hidden", "bias")],
        ["one", "several", "some"],
        [{}, {"softcap": 3.0, "logit_scale": 0.5, "temperature": 1.3}],
        [(), ("entropy",)],
        full=2,
    ),
)
def test_rewards_of_a_model_against_itself_are_zero(kernels, monkeypatch, gradients, parts, options, stats):
    """With statistics and without, which a reference never has."""
    inputs = head_inputs(*{"several": SEVERAL, "some": SOME}.get(parts, (4, 20, 48, 123)), logit_std=3.0).to(BF16)
    leaves = [getattr(inputs, name).detach().requires_grad_(name in gradients) for name in NAMES]
    given = {"bias": leaves[2], "impl": "cuda", **options}
    if parts == "several":
        given["chunk_bytes"] = pair_bytes(kernels, monkeypatch, inputs, "weight" in gradients)
    elif parts == "some":
        monkeypatch.setattr(kernels, "recomputed_columns", lambda n, v, h, device: min(v, 192))
        given["chunk_bytes"], _ = bytes_for_some(kernels, inputs, gradients, 256)
    sizes, of = set(), kernels.exponentials  # of parts, whose sums are joined
    monkeypatch.setattr(kernels, "exponentials", lambda *args, **by: sizes.add(tuple(args[7])) or of(*args, **by))
    reference = linear_reference_logps(*leaves[:2], inputs.labels, gradients=gradients, **given)
    found = linear_dpo_loss(*leaves[:2], inputs.labels, reference.logps, stats=stats, **given)
    assert torch.equal(found.logps, reference.logps) and len(sizes) == 1
    assert (found.chosen_rewards == 0).all() and (found.rejected_rewards == 0).all()
    assert found.loss.item() == pytest.approx(math.log(2), abs=1e-7)


def test_the_order_of_threads_and_copies_changes_nothing(kernels, monkeypatch):
    """Not even a bit, of all that is computed and stored. (On a GPU, where nobody can choose the order: from run to
    run.)"""
    inputs, found = growing(by=300.0, vocab=251).to(BF16), []
    x, weight, y = flat(inputs)
    for seed in range(5):
        monkeypatch.setenv("DPO_EMULATION_SEED", str(seed))
        results = []
        for packed in (True, False):
            sweep = kernels.exponentials(x, weight, None, y, LogitTransform(), STATS, 48, (251,), packed=packed)
            e, _ = padded(kernels, weight, 48)
            sweep.write(slice(0, 48), [e])
            logp, norm, stats = sweep.finish(slice(0, 48))
            if packed:
                dlogits, dw, db = sweep.weigh([e], slice(0, 48), torch.linspace(-1.0, 1.0, 48)), [], torch.empty(251)
                dx = torch.empty(x.shape)
                dlogits.dhidden(dx)
                for dtype in (BF16, torch.float32):
                    dw.append(torch.ones(weight.shape, dtype=dtype))
                    dlogits.dweight([slice(0, 251)], dw[-1], db, dtype == torch.float32)
                results += [sweep.missing, sweep.weights, dx, *dw, db]
            results += [e, logp, norm, stats, sweep.scale, sweep.label, sweep.shift]
        again = kernels.recomputed(x, weight, None, GradRows(y, norm, logp, torch.ones(48)), LogitTransform())
        e, _ = padded(kernels, weight, 48)
        again.write(slice(0, 251), e)
        found.append([*results, e, again.missing])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, found[0], strict=True))


def test_a_row_does_not_depend_on_its_neighbours(kernels):
    """On whether theirs is a block that is gone over again."""
    inputs, found = growing().to(BF16), []
    hidden = inputs.hidden.detach()
    tame = hidden.clone()
    tame[:, ::3, 0] = 0.0
    for given in (hidden, tame):
        given.requires_grad_()
        logps = linear_sequence_logps(given, inputs.weight.detach(), inputs.labels, impl="cuda").token_logps
        found.append([logps, torch.autograd.grad(logps.sum(), given)[0]])
    others = torch.arange(12) % 3 != 0
    for one, other in zip(*found, strict=True):
        assert torch.equal(one[:, others], other[:, others]) and not torch.equal(one, other)


def test_rows_of_far_logits_alone_are_gone_over_again(kernels, monkeypatch):
    """Pairs of blocks of rows that have one: others keep what they have."""
    inputs = head_inputs(1, 600, 16, 300, labelled=1.0).to(BF16)
    x, weight, y = flat(inputs)
    weight[260] = 16.0 * x[300].float().sign().to(BF16)  # behind the first columns, of one row in the second pair
    x[:256], x[512:] = 0.01 * x[:256], 0.01 * x[512:]
    sweep = kernels.exponentials(x, weight, None, y, LogitTransform(), (), 600, (300,), packed=False)
    e, _ = padded(kernels, weight, 600)
    linear_exp, written = kernels.cuda_exponentials._cuda.linear_exp, []

    class Native:
        def __getattr__(self, name):
            return getattr(kernels._cuda, name)

        def linear_exp(self, *args):
            e.fill_(7.0)
            linear_exp(*args)
            written.append((e != 7.0).any(0))

    monkeypatch.setattr(kernels.cuda_exponentials, "_cuda", Native())
    sweep.write(slice(0, 600), [e])
    assert written[0].all() and torch.equal(written[1], (torch.arange(600) // 256) == 1)
    assert sweep.far[::256].tolist() == [0, 1, 0]


def test_no_block_of_rows_is_gone_over_again_for_nothing(kernels, monkeypatch):
    """Wherever it begins."""
    x, weight, y = flat(head_inputs(1, 600, 16, 300, labelled=1.0).to(BF16))
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **options: new_empty(*args, **options).fill_(1))
    sweep = kernels.exponentials(x, weight, None, y, LogitTransform(), (), 384, (300,), packed=False)
    assert (sweep.far == 0).all()


@pytest.fixture
def recorded(kernels, monkeypatch):
    """Launches of kernels by name, and shapes of products."""
    launches, shapes, native = Counter(), [], kernels._cuda

    class Native:
        def __getattr__(self, name):
            of = getattr(native, name)
            if name[0].isupper():
                return of
            return lambda *args: launches.update([name]) or of(*args)

    for module in (kernels, kernels.cuda_linear, kernels.cuda_exponentials):
        monkeypatch.setattr(module, "_cuda", Native())

    def product(a, b, out, accumulate=False):
        assert a.dtype == b.dtype == BF16, "as a GPU multiplies them"
        assert out.dtype == torch.float32 or not accumulate, "a sum is rounded once"
        shapes.append((*a.shape, b.shape[1], accumulate))
        with _disable_current_modes():
            wide = a.float() @ b.float()
            return out.add_(wide) if accumulate else out.copy_(wide)

    monkeypatch.setattr(kernels, "product", product)
    return launches, shapes


@pytest.mark.parametrize("stats", [(), STATS])
def test_what_path_a_launches(kernels, recorded, stats):
    x, weight, y = flat(head_inputs(4, 20, 48, 251, labelled=1.0).to(BF16))
    with Operators() as operators:
        paths.linear_logps_fwd(
            kernels, x, weight, None, y, LogitTransform(), compute_dtype=BF16, stats=stats, fused=True
        )
    assert recorded[0] == {"linear_fold": 1, "join": 1} and not operators.count and not recorded[1]


def test_what_path_b_launches(kernels, recorded):
    """Three launches a block of rows, and a few more; and each product once."""
    launches, shapes = recorded
    x, weight, y = flat(head_inputs(4, 80, 48, 251, labelled=1.0).to(BF16))
    rows = kernels.exponential_rows(320, 251, 48, x.device)
    blocks = -(-320 // rows)
    assert blocks > 1
    with Operators() as operators:
        out = paths.linear_logps_fwd(
            kernels, x, weight, None, y, LogitTransform(), compute_dtype=BF16, with_dhidden=True, fused=True
        )
    assert out.dhidden.dtype == torch.float32 and out.dhidden.shape == (320, 48)
    assert launches == {"linear_fold": 1, "linear_exp": 2 * blocks, "join": 1, "dhidden": 1}
    assert sum(n * k * h for n, k, h, _ in shapes) == 320 * 251 * 48
    assert sum(launches.values()) + sum(operators.count.values()) + len(shapes) <= 4 + 3 * blocks, operators.count
    assert operators.largest < 320 * 251 / 2, "logits"


@pytest.mark.parametrize("groups", [1, 2])
def test_what_path_c_launches(kernels, recorded, groups):
    """A chunk's exponentials, its sums, what rows weigh, and two products; one more of some for each part, or block of
    dW."""
    launches, shapes = recorded
    x, weight, y = flat(head_inputs(4, 20, 48, 1300, labelled=1.0).to(BF16))
    kept = exponential_paths.kept_columns(kernels, 80, weight)
    blocks = list(exponential_paths.dw_blocks(1300, 48, kept, kernels.padded_rows(80), 256))
    assert kept > 256 and len(blocks) == 3
    of_rows = [slice(0, 80)] if groups == 1 else [slice(0, 40), slice(40, 80)]
    with Operators() as operators:
        dx, dw, _ = paths.linear_logps_grouped(
            kernels, x, weight, None, y, LogitTransform(), of_rows, lambda i, logp, stats: logp,
            compute_dtype=BF16, need=(True, True, False), exponentials=True,
        )  # fmt: skip
    assert dx.dtype == dw.dtype == BF16
    parts, of_dw = (2, len(blocks)) if groups == 1 else (1, groups)
    assert launches == {
        "linear_exp": parts * groups, "join": groups, "weigh": groups, "linear_dhidden": groups,
        "linear_dweight": of_dw, "dhidden": 1,
    }  # fmt: skip
    assert not shapes, "no product is a library's"
    assert sum(launches.values()) + sum(operators.count.values()) <= 4 + 4 * groups + of_dw, operators.count
    assert operators.largest < 80 * 1300 / 2 or groups > 1, "logits"


def test_what_path_d_launches(kernels, recorded, monkeypatch):
    """Three a block of the vocabulary, and one more. No tensor but the gradients and their sums is larger than a block
    of dlogits."""
    launches, shapes = recorded
    monkeypatch.setattr(kernels, "recomputed_columns", lambda n, v, h, device: 64)
    x, weight, y = flat(head_inputs(4, 20, 48, 251, labelled=1.0).to(BF16))
    norm, logp = torch.stack([torch.zeros(80), torch.full((80,), 251.0)]), torch.full((80,), -math.log(251))
    of = GradRows(y, norm, logp, torch.ones(80))
    with Operators() as operators:
        dx, dw, _ = paths.linear_logps_bwd(
            kernels, x, weight, None, of, LogitTransform(), compute_dtype=BF16, need=(True, True, False), fused=True
        )
    assert dx.dtype == dw.dtype == BF16 and launches == {"linear_dlogits": 4, "dhidden": 1}
    assert sum(a * b * c for a, b, c, _ in shapes) == 2 * 80 * 251 * 48 and len(shapes) == 8
    assert not operators.count and operators.largest == 80 * 48


def test_which_heads_it_takes(kernels, monkeypatch):
    weight = torch.zeros(300, 48, dtype=BF16)
    takes = kernels.takes_exponentials
    assert takes(BF16, weight, BF16) and takes(BF16, weight[7:], BF16) and takes(BF16, weight[:, :16], BF16)
    for refused in (weight.half(), weight.float(), weight[:, 1:41], weight[:, :15], weight.t()[:, :296], weight[:0]):
        assert not takes(refused.dtype, refused, refused.dtype)
    assert not takes(torch.float32, weight, BF16) and not takes(BF16, weight, torch.float32)
    monkeypatch.setattr(kernels.cuda_linear, "_machine", lambda device: (False, 132))  # another GPU
    assert not takes(BF16, weight, BF16) and not kernels.has_fused_forward(weight.device)


def test_heads_that_it_does_not_take_go_through_tiles(kernels, monkeypatch):
    """Under the same name."""
    inputs = head_inputs(4, 9, 48, 123).to(BF16)
    used = []
    monkeypatch.setattr(kernels, "fold_exp_", lambda *args: used.append(1) or of(*args))
    of = dispatch.load("torch").fold_exp_
    monkeypatch.setattr(kernels, "new_fold", dispatch.load("torch").new_fold)
    monkeypatch.setattr(kernels.cuda_linear, "_machine", lambda device: (False, 4))
    found = linear_sequence_logps(inputs.hidden, inputs.weight.detach(), inputs.labels, impl="cuda")
    best = eager_token_logps(eager_logits(inputs.hidden.double(), inputs.weight.double()), inputs.labels)
    assert used and dispatch.choose("cuda", inputs.hidden.device, "B", BF16, 123, 48) == "cuda_fused"
    torch.testing.assert_close(found.token_logps.double(), best, rtol=1e-5, atol=1e-5)


def test_operands_that_begin_anywhere(kernels):
    """Rows of x that no box has are copied; so is a bias that is not dense."""
    inputs = head_inputs(2, 9, 48, 123, labelled=1.0).to(BF16)
    dense, weight, y = flat(inputs)
    wide = torch.zeros(18, 53, dtype=BF16)
    wide[:, 3:51] = dense
    bias = torch.stack([inputs.bias.detach(), torch.zeros(123, dtype=BF16)], 1)[:, 0]
    found = [
        paths.linear_logps_fwd(
            kernels, x, weight, b, y, LogitTransform(), compute_dtype=BF16, with_dhidden=True, fused=True
        )
        for x, b in ((wide[:, 3:51], bias), (dense, bias.contiguous()))
    ]
    assert torch.equal(found[0].logp, found[1].logp) and torch.equal(found[0].dhidden, found[1].dhidden)
