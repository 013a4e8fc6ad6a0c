"""Paths B, C and D of half-precision heads on Triton, which store no logits: values and gradients against
fp64, rows that overflow, what is launched and allocated, and sums of a reference."""

import math
from collections import Counter

import pytest
import torch
from exponentials import Operators, assert_rows_within, by_eager, bytes_for_some, growing, hinge_coefficients
from grids import covering
from places import DEVICE
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from dpo_kernels import dispatch, linear_dpo_loss, linear_sequence_logps
from dpo_kernels.impl import exponential_paths, paths
from dpo_kernels.impl.blocks import spans
from dpo_kernels.impl.interface import STATS, GradRows, LogitTransform
from dpo_kernels.impl.reference import eager_logits, eager_stats
from dpo_kernels.linear_reference import linear_reference_logps
from dpo_kernels.testing import assert_within_budget, head_inputs

pytest.importorskip("triton", reason="Triton is not installed")
if reason := dispatch.unavailable_reason("triton", torch.get_default_device()):
    pytest.skip(reason, allow_module_level=True)
kernels = dispatch.load("triton")
linear = pytest.importorskip("dpo_kernels.impl.triton_linear")
join = pytest.importorskip("dpo_kernels.impl.triton_join")
exponentials = pytest.importorskip("dpo_kernels.impl.triton_exponentials")
BF16 = torch.bfloat16
TRANSFORMS = {"plain": {}, "all": {"softcap": 5.0, "logit_scale": -0.7, "temperature": 1.3}}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks that an interpreter can do, and several of each kind: of rows, of columns, and of dW."""
    if DEVICE == "cpu":
        monkeypatch.setattr(linear, "BLOCK_N", 16)
        monkeypatch.setattr(linear, "BLOCK_H", 32)
        monkeypatch.setattr(linear, "block_v", lambda stats, softcap, hopper: 32 // (2 if stats else 1))
        monkeypatch.setattr(exponentials, "PIECE_COLUMNS", 16)
    monkeypatch.setattr(exponentials, "EXP_BYTES", 2**13)
    monkeypatch.setattr(exponentials, "FIRST_COLUMNS", 40)
    monkeypatch.setattr(exponential_paths, "DW_COLUMNS", 40)
    monkeypatch.setattr(exponential_paths, "ALIGNED", 16)


@pytest.fixture(autouse=True)
def no_tiles(monkeypatch):
    for name in ("fold_", "fold_exp_", "dlogits"):
        monkeypatch.setattr(kernels, name, None)


# [S, T, H, V]: a vocabulary that no block divides; one row; several blocks of rows, and of the vocabulary's parts
SHAPES = {"tails": (4, 9, 48, 123), "one row": (2, 1, 16, 123), "blocks": (4, 13, 64, 187)}
# More rows than the memory of dW has room for, so that pairs come in several groups.
SEVERAL = (4, 28, 16, 75)
# One pair, and more rows than H: the memory of dW has room for the exponentials of some entries alone.
SOME = (2, 22, 16, 187)


@pytest.mark.parametrize(
    ("transform", "stats", "shape", "confident"),
    covering(list(TRANSFORMS), [(), STATS, ("is_top1",)], list(SHAPES), [0.0, 0.7]),
)
def test_frozen_head(transform, stats, shape, confident):
    options, labelled = TRANSFORMS[transform], 1.0 if shape == "one row" else 0.6
    inputs = head_inputs(*SHAPES[shape], confident=confident, labelled=labelled).to(BF16)
    exact, coefficients = inputs.to(torch.float64), torch.linspace(-1.0, 2.0, inputs.labels.shape[0])
    bias = inputs.bias.detach() if options else None
    found = linear_sequence_logps(
        inputs.hidden, inputs.weight.detach(), inputs.labels, bias=bias, stats=stats, impl="triton", **options
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


def trained(inputs, need, transform, chunk_bytes=None, stats=()):
    """Path C's loss with row weights that do not depend on log-probabilities, and its gradients."""
    leaves = [getattr(inputs, name).detach().requires_grad_(name in need) for name in NAMES]
    out = linear_dpo_loss(
        *leaves[:2], inputs.labels, inputs.ref_logps, bias=leaves[2] if "bias" in need else None, loss_type="hinge",
        beta=0.001, chunk_bytes=chunk_bytes, stats=stats, impl="triton", **transform,
    )  # fmt: skip
    return out, torch.autograd.grad(out.loss, [t for t in leaves if t.requires_grad])


NAMES = ("hidden", "weight", "bias")
NEED = {"head": ("hidden", "weight"), "all": NAMES, "head alone": ("weight", "bias"), "bias": ("hidden", "bias")}


def pair_bytes(monkeypatch, inputs, dweight):
    """What the longest pair takes, beside the sums of dW; less than all of them do. Where one part with some of its
    exponentials would be faster, there is none."""
    monkeypatch.setattr(exponential_paths, "stored_columns", lambda *_: 0)
    sizes = (inputs.labels >= 0).sum(1).view(2, -1).sum(0).tolist()
    of_row = paths.kept_bytes(kernels, 1, inputs.weight, torch.float32, True, False).of_row
    found = kernels.padded_rows(max(sizes)) * of_row + inputs.weight.numel() * 4 * dweight
    assert found < paths.kept_bytes(kernels, sum(sizes), inputs.weight, torch.float32, True, dweight).buffer
    return found


@pytest.mark.parametrize(
    ("transform", "need", "shape", "confident"),
    covering(list(TRANSFORMS), list(NEED), [SHAPES["tails"], SHAPES["blocks"], SEVERAL], [0.0, 1.0], full=2),
)
def test_trained_head(monkeypatch, transform, need, shape, confident):
    options, need = TRANSFORMS[transform], NEED[need]
    inputs = head_inputs(*shape, confident=confident, labelled=0.8).to(BF16)
    chunk_bytes = None
    if shape == SEVERAL:
        chunk_bytes = pair_bytes(monkeypatch, inputs, "weight" in need)
    out, mine = trained(inputs, need, options, chunk_bytes)
    coefficients, with_bias = hinge_coefficients(inputs), "bias" in need
    _, eager = by_eager(inputs, coefficients, need, options, with_bias)
    best, oracle = by_eager(inputs.to(torch.float64), coefficients, need, options, with_bias)
    torch.testing.assert_close(out.logps.double(), best.sum(1).detach(), rtol=1e-5, atol=1e-5)
    for name, ours, theirs, exact in zip(need, mine, eager, oracle, strict=True):
        assert_within_budget(ours, theirs, exact, f"d{name}")
        if name == "hidden":
            labelled = inputs.labels >= 0
            assert_rows_within(ours[labelled], theirs[labelled], exact[labelled], "dhidden")
        elif name == "weight":  # of labels, where what was confident nearly cancels
            rows = inputs.labels[inputs.labels >= 0].unique()
            assert_rows_within(ours[rows], theirs[rows], exact[rows], "dweight")


@pytest.mark.parametrize(
    ("transform", "need", "buffer", "confident", "stats"),
    covering(list(TRANSFORMS), [*NEED, "bias alone"], [32, 64], [0.0, 1.0], [(), STATS], full=2),
)
def test_exponentials_of_some_entries(monkeypatch, transform, need, buffer, confident, stats):
    """In the memory of dW, where there is one, and in a buffer; with labels there, and among the entries whose products
    are computed again, in blocks, the last of which is smaller."""
    options, need = TRANSFORMS[transform], NEED.get(need, ("bias",))
    monkeypatch.setattr(kernels, "recomputed_columns", lambda n, v, h, device: min(v, 32))
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
    for name, ours, theirs, exact in zip(need, mine, eager, oracle, strict=True):
        assert_within_budget(ours, theirs, exact, f"d{name}")
        if name == "hidden":
            labelled = inputs.labels >= 0
            assert_rows_within(ours[labelled], theirs[labelled], exact[labelled], "dhidden")
        elif name == "weight":
            rows = inputs.labels[inputs.labels >= 0].unique()
            assert_rows_within(ours[rows], theirs[rows], exact[rows], "dweight")
    logits = eager_logits(*inputs.to(torch.float64)[:2], bias=inputs.bias.double() if with_bias else None, **options)
    for name, best in eager_stats(logits.detach(), inputs.labels).items():
        if name in stats:
            torch.testing.assert_close(out.stats[name].double(), best.double(), rtol=1e-5, atol=1e-5)
    if buffer == 32:
        again, gradients = trained(inputs, need, options, chunk_bytes, stats)
        assert torch.equal(out.logps, again.logps) and all(map(torch.equal, mine, gradients)), "the same bits"


@pytest.mark.parametrize(
    ("transform", "need", "shape", "confident"),
    covering(list(TRANSFORMS), [*NEED, "bias alone"], ["tails", "blocks"], [0.0, 1.0], full=2),
)
def test_any_loss_of_a_trained_head(transform, need, shape, confident):
    options, need = TRANSFORMS[transform], NEED.get(need, ("bias",))
    inputs = head_inputs(*SHAPES[shape], confident=confident, labelled=0.8).to(BF16)
    leaves, with_bias = [getattr(inputs, name).detach().requires_grad_(name in need) for name in NAMES], "bias" in need
    coefficients = torch.linspace(-1.0, 2.0, inputs.labels.shape[0])
    found = linear_sequence_logps(
        *leaves[:2], inputs.labels, bias=leaves[2] if with_bias else None, impl="triton", **options
    )
    mine = torch.autograd.grad((found.logps * coefficients).sum(), [t for t in leaves if t.requires_grad])
    _, eager = by_eager(inputs, coefficients, need, options, with_bias)
    best, oracle = by_eager(inputs.to(torch.float64), coefficients, need, options, with_bias)
    torch.testing.assert_close(found.logps.double(), best.sum(1).detach(), rtol=1e-5, atol=1e-5)
    for name, ours, theirs, exact in zip(need, mine, eager, oracle, strict=True):
        assert_within_budget(ours, theirs, exact, f"d{name}")
        if name == "hidden":
            labelled = inputs.labels >= 0
            assert_rows_within(ours[labelled], theirs[labelled], exact[labelled], "dhidden")
        elif name == "weight":
            rows = inputs.labels[inputs.labels >= 0].unique()
            assert_rows_within(ours[rows], theirs[rows], exact[rows], "dweight")


def of_path(inputs, path, bias=None, **options):
    """Log-probabilities of sequences, and the gradients of a sum over them."""
    coefficients = hinge_coefficients(inputs)
    weight = inputs.weight.detach() if path == "B" else inputs.weight
    if path == "C":
        return trained(inputs, NAMES if bias is not None else NAMES[:2], options)
    found = linear_sequence_logps(
        inputs.hidden, weight, inputs.labels, bias=bias.detach() if path == "B" and bias is not None else bias,
        stats=STATS if path == "B" and bias is None else (), impl="triton", **options,
    )  # fmt: skip
    wanted = [t for t in (inputs.hidden, weight, bias) if t is not None and t.requires_grad][: 1 if path == "B" else 3]
    return found, torch.autograd.grad((found.logps * coefficients).sum(), wanted)


@pytest.mark.parametrize("path", ["B", "C", "D"])
@pytest.mark.parametrize("softcap", [None, 300.0])
def test_rows_that_would_overflow(path, softcap):
    """They alone have path B's exponentials written again; in path C others come to be of no size."""
    inputs, options = growing(vocab=251).to(BF16), {"softcap": softcap}
    coefficients = hinge_coefficients(inputs)
    found, mine = of_path(inputs, path, **options)
    assert all(torch.isfinite(t).all() for t in found.stats.values())
    names = NAMES[: len(mine)]
    _, eager = by_eager(inputs, coefficients, names, options, False)
    best, oracle = by_eager(inputs.to(torch.float64), coefficients, names, options, False)
    torch.testing.assert_close(found.logps.double(), best.sum(1).detach(), rtol=1e-5, atol=1e-4)
    for name, ours, theirs, exact in zip(names, mine, eager, oracle, strict=True):
        assert_within_budget(ours, theirs, exact, f"d{name}")
    assert_rows_within(mine[0], eager[0], oracle[0], "dhidden")


@pytest.mark.parametrize("path", ["B", "C", "D"])
@pytest.mark.parametrize("impossible", ["first columns", "some", "all but one more"])
def test_entries_that_cannot_be(path, impossible):
    """A bias of -inf: in all of the columns that a shift is taken from, here and there, and nearly everywhere."""
    inputs = head_inputs(4, 9, 48, 123, confident=0.3).to(BF16)
    inputs.labels[inputs.labels >= 0] = 64 + inputs.labels[inputs.labels >= 0] % 2
    entries = torch.arange(123)
    out = {
        "first columns": entries < 50,
        "some": (entries % 3 == 0) & (entries != 64) & (entries != 65),
        "all but one more": (entries != 64) & (entries != 65),
    }[impossible]
    bias = inputs.bias.detach().masked_fill(out, -torch.inf)
    inputs = inputs._replace(bias=bias.requires_grad_())
    # of two entries alone, chance decides how well the gradient of the bias is rounded
    need = NAMES[:1] if path == "B" else NAMES[:2] if impossible == "all but one more" else NAMES
    coefficients = hinge_coefficients(inputs)
    found, mine = of_path(inputs, path, inputs.bias)
    mine = mine[: len(need)]
    _, eager = by_eager(inputs, coefficients, need, {}, True)
    best, oracle = by_eager(inputs.to(torch.float64), coefficients, need, {}, True)
    torch.testing.assert_close(found.logps.double(), best.sum(1).detach(), rtol=1e-5, atol=1e-5)
    for name, ours, theirs, exact in zip(need, mine, eager, oracle, strict=True):
        assert_within_budget(ours, theirs, exact, f"d{name}")


def test_each_confident_row_keeps_its_digits():
    """Of dX before its last rounding. With the label's entry rounded the error is 1e-3 and more; what is left beside it
    is the rounding of the others, which their number averages."""
    inputs = head_inputs(4, 12, 64, 500, confident=1.0, labelled=1.0, logit_std=1.0).to(BF16)
    x, weight, y = inputs.hidden.detach().flatten(0, 1), inputs.weight.detach(), inputs.labels.flatten()
    _, (best,) = by_eager(inputs.to(torch.float64), torch.ones(4), ["hidden"], {}, False)
    best = best.flatten(0, 1)
    out = paths.linear_logps_fwd(
        kernels, x, weight, None, y, LogitTransform(), compute_dtype=BF16, with_dhidden=True, fused=True
    )
    rows, d = slice(0, 48), weight.new_empty(500, 48)
    sweep = kernels.exponentials(x, weight, None, y, LogitTransform(), (), 48, (500,), packed=True)
    sweep.write(rows, [d])
    sweep.finish(rows)
    sweep.weigh([d], rows, torch.ones(48))
    sums = kernels.product(d.t(), weight, torch.empty(48, 64))
    again = kernels.recomputed(x, weight, None, GradRows(y, out.norm, out.logp, torch.ones(48)), LogitTransform())
    again.write(slice(0, 500), d)
    sums_again = kernels.product(d.t(), weight, torch.empty(48, 64))
    for dx in (
        out.dhidden, sweep.dhidden(sums, torch.empty(48, 64)), again.dhidden(sums_again, torch.empty(48, 64))
    ):  # fmt: skip
        error = (dx.double() - best).norm(dim=1) / best.norm(dim=1)
        assert error.median() < 5e-4, error


def packed(inputs, transform):
    """Packed exponentials [V, N], the shift of each, in powers of two, and its logit in fp64 [N, V]."""
    x, weight, y = inputs.hidden.detach().flatten(0, 1), inputs.weight.detach(), inputs.labels.flatten()
    (n, v), sizes = (x.shape[0], weight.shape[0]), (48, weight.shape[0] - 48)
    sweep = kernels.exponentials(x, weight, None, y, transform, (), n, sizes, packed=True)
    out = weight.new_empty(v, kernels.padded_rows(n))
    e = out[:, :n]
    sweep.write(slice(0, n), list(e.split(sizes)))
    block = sweep.columns
    of_entry = [(0 if at < 48 else -(-48 // block)) + (at if at < 48 else at - 48) // block for at in range(v)]
    options = {"softcap": transform.softcap, "logit_scale": transform.scale, "temperature": transform.temperature}
    logits = eager_logits(x.double(), weight.double(), **options)
    return e.view(torch.float16).double(), sweep.shifts[of_entry, :n].double(), logits


@pytest.mark.parametrize("transform", [LogitTransform(), LogitTransform(-0.7, 5.0, 1.3)])
def test_packed_exponentials_have_more_digits(transform):
    """Each within 2^-11 of fp32's, where bf16 has 2^-8, from 2^-29 of the largest so far on."""
    inputs = head_inputs(2, 8, 48, 123, labelled=1.0, logit_std=6.0).to(BF16)
    e, shifts, logits = packed(inputs, transform)
    others = torch.arange(123)[:, None] != inputs.labels.flatten()
    slope = 1.0 if transform.softcap is None else 1 - (logits.T * transform.temperature / transform.softcap) ** 2
    exact = torch.exp2(logits.T * math.log2(math.e) - shifts) * slope
    large = others & (exact >= 2.0**-14)
    assert (e[~others] == 0).all() and e.max() <= 2**15
    assert large.any() and ((e / exact - 1).abs()[large] < 2.0**-11 + 2e-5).all()
    logits = torch.where(others, logits.T, -torch.inf) * math.log2(math.e) - 15
    assert (shifts >= logits - 1e-4).all() and (shifts <= logits.max(0).values + 1e-4).all()
    assert (shifts[1:] < shifts[:-1]).any(), "of parts of the vocabulary"


@pytest.mark.parametrize("size", [1e3, 1e7, 1e12])
def test_packed_exponentials_of_logits_of_any_size(size):
    """Where what fp32 rounds of a logit is more than all that fp16 holds of its exponential."""
    e, shifts, logits = packed(head_inputs(2, 8, 48, 123, labelled=1.0, logit_std=size).to(BF16), LogitTransform())
    assert e.isfinite().all() and shifts.isfinite().all() and e.max() <= 2**15 and logits.abs().max() > size


def test_weights_of_rows_of_any_size():
    """From coefficients that fp16 would not hold to such that a sum of squares overflows, in one batch."""
    inputs = head_inputs(4, 9, 48, 123, confident=0.5, labelled=1.0).to(BF16)
    exact = inputs.to(torch.float64)
    sizes = torch.tensor([1e-18, 1e-6, 1.0, 1e15])
    rows = [slice(9 * i, 9 * (i + 1)) for i in range(4)]
    x, y = inputs.hidden.detach().view(36, 48), inputs.labels.flatten()
    for size, row in zip(sizes, rows, strict=True):
        dx, dw, _ = paths.linear_logps_grouped(
            kernels, x[row], inputs.weight.detach(), None, y[row], LogitTransform(), [slice(0, 9)],
            lambda i, logp, stats, size=size: torch.full_like(logp, float(size)),
            compute_dtype=BF16, need=(True, True, False), exponentials=True,
        )  # fmt: skip
        one = torch.where(torch.arange(4) == sizes.tolist().index(size), size.double(), 0.0)
        for name, ours in (("hidden", dx), ("weight", dw)):
            _, (theirs,) = by_eager(inputs, one, [name], {}, False)
            _, (best,) = by_eager(exact, one, [name], {}, False)
            theirs, best = (t.flatten(0, -2)[row] if name == "hidden" else t for t in (theirs, best))
            assert_within_budget(ours / size, theirs / size, best / size.double(), f"d{name} of {size:.0e}")


@pytest.mark.parametrize("path", ["B", "C"])
def test_no_labelled_rows(path, monkeypatch):
    inputs = head_inputs(4, 5, 48, 123).to(BF16)
    inputs.labels[:] = -100
    inputs.weight.requires_grad_(path == "C")
    if path == "B":
        found = linear_sequence_logps(*inputs[:3], impl="triton")
        (dx,) = torch.autograd.grad(found.logps.sum(), inputs.hidden)
        assert (dx == 0).all()
    else:
        found = linear_dpo_loss(*inputs[:3], torch.zeros(4), impl="triton")
        assert all((t == 0).all() for t in torch.autograd.grad(found.loss, inputs[:2]))
    assert (found.logps == 0).all() and (found.num_tokens == 0).all()


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
def test_rewards_of_a_model_against_itself_are_zero(monkeypatch, gradients, parts, options, stats):
    """With statistics and without, which a reference never has."""
    inputs = head_inputs(*{"several": SEVERAL, "some": SOME}.get(parts, (4, 20, 48, 123)), logit_std=3.0).to(BF16)
    leaves = [getattr(inputs, name).detach().requires_grad_(name in gradients) for name in NAMES]
    given = {"bias": leaves[2], "impl": "triton", **options}
    if parts == "several":
        given["chunk_bytes"] = pair_bytes(monkeypatch, inputs, "weight" in gradients)
    elif parts == "some":
        monkeypatch.setattr(kernels, "recomputed_columns", lambda n, v, h, device: min(v, 32))
        given["chunk_bytes"], _ = bytes_for_some(kernels, inputs, gradients, 32)
    sizes, of = set(), kernels.exponentials  # of parts, whose sums are joined
    monkeypatch.setattr(kernels, "exponentials", lambda *args, **by: sizes.add(tuple(args[7])) or of(*args, **by))
    reference = linear_reference_logps(*leaves[:2], inputs.labels, gradients=gradients, **given)
    found = linear_dpo_loss(*leaves[:2], inputs.labels, reference.logps, stats=stats, **given)
    assert torch.equal(found.logps, reference.logps) and len(sizes) == 1
    assert (found.chosen_rewards == 0).all() and (found.rejected_rewards == 0).all()
    assert found.loss.item() == pytest.approx(math.log(2), abs=1e-7)


@pytest.mark.parametrize("several", [False, True])
def test_the_same_bits_again(monkeypatch, several):
    inputs = head_inputs(*SEVERAL if several else (4, 9, 48, 123), confident=0.5).to(BF16)
    chunk_bytes = pair_bytes(monkeypatch, inputs, True) if several else None
    results = []
    for _ in range(2):
        leaves = [t.detach().requires_grad_() for t in inputs[:2]]
        out = linear_dpo_loss(
            *leaves, inputs.labels, inputs.ref_logps, stats=STATS, chunk_bytes=chunk_bytes, impl="triton"
        )
        results.append([out.logps, *out.stats.values(), *torch.autograd.grad(out.loss, leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_row_does_not_depend_on_its_neighbours():
    """On whether theirs is a block that is gone over again."""
    inputs, found = growing().to(BF16), []
    hidden = inputs.hidden.detach()
    tame = hidden.clone()
    tame[:, ::3, 0] = 0.0
    for given in (hidden, tame):
        given.requires_grad_()
        logps = linear_sequence_logps(given, inputs.weight.detach(), inputs.labels, impl="triton").token_logps
        found.append([logps, torch.autograd.grad(logps.sum(), given)[0]])
    others = torch.arange(12) % 3 != 0
    for one, other in zip(*found, strict=True):
        assert torch.equal(one[:, others], other[:, others]) and not torch.equal(one, other)


class Launched:
    """In the place of a kernel: notes its launches."""

    def __init__(self, kernel, name, launches):
        self.kernel, self.name, self.launches = kernel, name, launches

    def __getitem__(self, grid):
        def launch(*args, **constants):
            self.launches[self.name] += 1
            with _disable_current_modes():  # an interpreter's own
                return self.kernel[grid](*args, **constants)

        return launch


@pytest.fixture
def recorded(monkeypatch):
    """Launches of kernels by name, and shapes of products."""
    launches, shapes = Counter(), []
    for module in (linear, join, exponentials):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Launched(getattr(module, name), name, launches))

    def product(a, b, out, accumulate=False):
        assert a.dtype == b.dtype == BF16, "as a GPU multiplies them"
        assert out.dtype == torch.float32 or not accumulate, "a sum is rounded once"
        shapes.append((*a.shape, b.shape[1], accumulate))
        with _disable_current_modes():
            wide = a.float() @ b.float()
            return out.add_(wide) if accumulate else out.copy_(wide)

    monkeypatch.setattr(kernels, "product", product)
    return launches, shapes


def test_what_path_b_launches(recorded):
    """Three launches a block of rows, and four more: no more than 6 + 3 a block; and each product once."""
    launches, shapes = recorded
    inputs = head_inputs(4, 20, 48, 251, labelled=1.0).to(BF16)
    x, weight, y = inputs.hidden.detach().flatten(0, 1), inputs.weight.detach(), inputs.labels.flatten()
    rows = kernels.exponential_rows(80, 251, 48, x.device)
    blocks = -(-80 // rows)
    assert blocks > 1
    with Operators() as operators:
        out = paths.linear_logps_fwd(
            kernels, x, weight, None, y, LogitTransform(), compute_dtype=BF16, with_dhidden=True, fused=True
        )
    assert out.dhidden.dtype == torch.float32 and out.dhidden.shape == (80, 48)
    assert launches == {
        "linear_fold_fwd_kernel": 1, "linear_exp_fwd_kernel": 2 * blocks, "join_kernel": 1, "dhidden_kernel": 1
    }  # fmt: skip
    assert len(shapes) == blocks and all(k == 251 and h == 48 and not more for _, k, h, more in shapes)
    assert sum(n for n, *_ in shapes) == 80
    assert sum(launches.values()) + sum(operators.count.values()) + len(shapes) <= 6 + 3 * blocks, operators.count
    assert operators.largest < 80 * 251 / 2, "logits"


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_what_path_c_launches(recorded, groups, with_bias):
    """At most 8 + 5 a chunk, and one more for each block of dW beyond its first, where exponentials are in its memory;
    of a bias, one more a chunk, or two, and two. The coefficients' own are not counted."""
    launches, shapes = recorded
    inputs = head_inputs(4, 24, 48, 251, labelled=1.0).to(BF16)
    x, weight, y = inputs.hidden.detach().flatten(0, 1), inputs.weight.detach(), inputs.labels.flatten()
    of_rows = list(spans(96, 96 // groups))
    with Operators() as operators:
        dx, dw, db = paths.linear_logps_grouped(
            kernels, x, weight, inputs.bias.detach() if with_bias else None, y, LogitTransform(), of_rows,
            lambda i, logp, stats: logp, compute_dtype=BF16, need=(True, True, True), exponentials=True,
        )  # fmt: skip
    assert dx.dtype == dw.dtype == BF16 and (db is not None) == with_bias
    parts, of_dw = 1, 1
    if groups == 1:
        kept = exponential_paths.kept_columns(kernels, 96, weight)
        parts, of_dw = 2, len(list(exponential_paths.dw_blocks(251, 48, kept, 96, 32)))
        assert kept > 0 and of_dw > 2
    assert launches == {
        "linear_pack_fwd_kernel": parts * groups, "join_kernel": groups, "exp_dlogits_kernel": parts * groups,
        "dhidden_kernel": 1,
    }  # fmt: skip
    assert len(shapes) == groups * (parts + of_dw)
    work = sum(a * b * c for a, b, c, _ in shapes)
    assert work == 2 * 96 * 251 * 48, "each product once"
    total = sum(launches.values()) + sum(operators.count.values()) + len(shapes)
    of_bias = (parts * groups + 2) * with_bias
    assert total <= 8 + 5 * groups + (of_dw - 1) + of_bias, (launches, operators.count)
    assert operators.largest < 96 * 251 / 2 or groups > 1, "logits"


@pytest.mark.parametrize("with_bias", [False, True])
def test_what_path_d_launches(recorded, monkeypatch, with_bias):
    """Three a block of the vocabulary, and one more; of a bias one a block, and one. No tensor but the gradients and
    their sums is larger than a block of dlogits."""
    launches, shapes = recorded
    monkeypatch.setattr(kernels, "recomputed_columns", lambda n, v, h, device: 64)
    inputs = head_inputs(4, 20, 48, 251, labelled=1.0).to(BF16)
    x, weight, y = inputs.hidden.detach().flatten(0, 1), inputs.weight.detach(), inputs.labels.flatten()
    bias = inputs.bias.detach() if with_bias else None
    norm, logp = torch.stack([torch.zeros(80), torch.full((80,), 251.0)]), torch.full((80,), -math.log(251))
    of = GradRows(y, norm, logp, torch.ones(80))
    with Operators() as operators:
        dx, dw, db = paths.linear_logps_bwd(
            kernels, x, weight, bias, of, LogitTransform(), compute_dtype=BF16, need=(True, True, True), fused=True
        )
    assert dx.dtype == dw.dtype == BF16 and (db is not None) == with_bias
    blocks = 4
    assert launches == {"linear_dlogits_bwd_kernel": blocks, "dhidden_kernel": 1}
    of_dw, of_dx = ([shape for shape in shapes if shape[1] == 80], [shape for shape in shapes if shape[0] == 80])
    assert sum(v for v, *_ in of_dw) == sum(v for _, v, *_ in of_dx) == 251 and len(shapes) == 2 * blocks
    assert not any(more for *_, more in of_dw) and [more for *_, more in of_dx] == [False, True, True, True]
    total = sum(launches.values()) + sum(operators.count.values()) + len(shapes)
    assert total <= 3 * blocks + 1 + (blocks + 1) * with_bias, (launches, operators.count)
    assert operators.largest == 80 * 48, "logits"


def test_blocks_of_dlogits_are_bounded():
    """By 256 MiB, for heads of every size; and no small one is left at the end."""
    for n, v, h in [(8192, 128256, 4096), (100, 32000, 2048), (100_000, 262144, 3584), (1, 50, 64)]:
        columns = kernels.recomputed_columns(n, v, h, torch.device(DEVICE))
        assert columns % 64 == 0 and 2 * columns * kernels.padded_rows(n) <= 2**28
        assert columns >= v or 2 * (v % columns or columns) >= columns


@pytest.mark.parametrize("v, h, n", [(128256, 4096, 8192), (128256, 2048, 8192), (32000, 4096, 100), (5003, 48, 48)])
@pytest.mark.parametrize("ahead", [64, 2048])
def test_blocks_of_dw_overwrite_nothing_that_is_still_read(monkeypatch, v, h, n, ahead):
    monkeypatch.setattr(exponential_paths, "DW_COLUMNS", ahead)
    monkeypatch.setattr(exponential_paths, "ALIGNED", 64)
    weight = torch.empty(v, h, dtype=BF16, device="meta")
    kept, stride = exponential_paths.kept_columns(kernels, n, weight), kernels.padded_rows(n)
    begins = v * h - kept * stride
    blocks = list(exponential_paths.dw_blocks(v, h, kept, stride, 64))
    assert kept > 0 and begins % 16 == 0
    assert [block.start for block in blocks] == [0, *(block.stop for block in blocks[:-1])] and blocks[-1].stop == v
    for block in blocks[:-1]:
        assert block.stop * h <= begins + block.start * stride
        assert block.stop - block.start >= min(ahead, kept - block.start) and block.start % 64 == 0
    assert blocks[-1].start == kept


def test_default_chunk_of_a_common_head(monkeypatch):
    """8192 rows of Llama 3's head are one group within 1 GiB, shifts with them: dW comes of one sum."""
    monkeypatch.undo()  # blocks of their true size
    weight = torch.empty(128256, 4096, dtype=BF16, device="meta")
    assert 2**29 < paths.kept_bytes(kernels, 8192, weight, torch.float32, True, True).buffer <= 2**30


class Allocated(TorchDispatchMode):
    """Counts the bytes of tensors that are made without a value."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if "empty" in func.name():
            self.bytes += out.nbytes
        return out


@pytest.mark.parametrize("need", ["head", "bias"])
@pytest.mark.parametrize("buffer", [32, 64])
def test_exponentials_of_some_entries_keep_to_the_budget(recorded, monkeypatch, buffer, need):
    """All that is made beside the gradients, the sums of dX and what each row takes; what is computed again is made in
    their place."""
    monkeypatch.setattr(kernels, "recomputed_columns", lambda n, v, h, device: min(v, 32))
    inputs = head_inputs(*SOME, labelled=1.0).to(BF16)
    x, weight, y = inputs.hidden.detach().flatten(0, 1), inputs.weight.detach(), inputs.labels.flatten()
    (n, h), v, of_head = x.shape, weight.shape[0], need == "head"
    chunk_bytes, stored = bytes_for_some(kernels, inputs, NEED[need], buffer)
    with Allocated() as made:
        paths.linear_logps_grouped(
            kernels, x, weight, inputs.bias.detach(), y, LogitTransform(), [slice(0, n)], lambda i, logp, stats: logp,
            compute_dtype=BF16, need=(True, of_head, not of_head), exponentials=True, stored=stored,
        )  # fmt: skip
    splits = kernels.exponentials(
        x,
        weight,
        None,
        y,
        LogitTransform(),
        (),
        n,
        exponential_paths.part_sizes(v, stored - buffer, stored),
        packed=True,
    ).splits
    of_rows = 4 * n * (exponentials.FIELDS * splits + 8) + 64
    gradients = (2 + 4) * n * h + (2 * v * h if of_head else 4 * v)
    assert chunk_bytes < made.bytes - gradients <= chunk_bytes + of_rows
    launches, shapes = recorded
    blocks = -(-(v - stored) // 32)
    assert launches["linear_dlogits_bwd_kernel"] == blocks > 1 and launches["linear_pack_fwd_kernel"] == 2 + of_head
    assert sum(a * b * c for a, b, c, _ in shapes) == (1 + of_head) * n * v * h, "each product of dlogits once"


def test_operands_that_begin_anywhere():
    """Rows of x that no wide load takes are copied; so is a bias that is not dense."""
    inputs = head_inputs(2, 9, 48, 123, labelled=1.0).to(BF16)
    dense = inputs.hidden.detach().flatten(0, 1)
    wide = torch.zeros(18, 53, dtype=BF16)
    wide[:, 3:51] = dense
    bias = torch.stack([inputs.bias.detach(), torch.zeros(123, dtype=BF16)], 1)[:, 0]
    found = [
        paths.linear_logps_fwd(
            kernels, x, inputs.weight.detach(), b, inputs.labels.flatten(), LogitTransform(),
            compute_dtype=BF16, with_dhidden=True, fused=True,
        )
        for x, b in ((wide[:, 3:51], bias), (dense, bias.contiguous()))
    ]  # fmt: skip
    assert torch.equal(found[0].logp, found[1].logp) and torch.equal(found[0].dhidden, found[1].dhidden)
