"""Where precision is easily lost: confident tokens, logits far from zero, and operands rounded to half precision."""

import math

import pytest
import torch
from grids import covering

from dpo_kernels import linear_dpo_loss, linear_sequence_logps, sequence_logps
from dpo_kernels.impl.reference import eager_logits, eager_token_logps
from dpo_kernels.testing import assert_within_budget, head_inputs

pytestmark = pytest.mark.usefixtures("impl")
# C and D with all rows in one tile: dW comes out of one product
PATHS = ("B", "C", "C in groups", "D")


@pytest.fixture
def half_precision_operands(impl, monkeypatch):
    """Rounds where a GPU does: operands of every product stay in half precision, the product is fp32."""
    in_fp32 = impl.__name__ == "dpo_kernels.impl.native"  # whose tiles have no other dtype: rounded on their way in
    rounded_to = []

    def operand(t, compute_dtype):
        rounded_to[:] = [compute_dtype]
        return t.to(compute_dtype).to(torch.float32) if in_fp32 else t.to(compute_dtype)

    def mm(a, b, out, accumulate=False):
        compute_dtype = rounded_to[0] if rounded_to else torch.bfloat16  # exponentials are operands as they are
        assert a.dtype == b.dtype == (torch.float32 if in_fp32 else compute_dtype), "no GPU multiplies others"
        a, b = (t.to(compute_dtype).to(torch.promote_types(out.dtype, torch.float32)) for t in (a, b))
        product = a @ b
        return out.add_(product) if accumulate else out.copy_(product)

    monkeypatch.setattr(impl, "product", mm)
    monkeypatch.setattr(impl, "operand", operand)


def margin(logps, ref_logps):
    """A loss that is a mean over pairs and linear in logps, so that every path has the same row weights."""
    chosen, rejected = (logps - ref_logps).chunk(2)
    return torch.relu(1 - 0.001 * (chosen - rejected)).mean()


def gradients(inputs, path, **transform):
    frozen = path == "B"
    # A byte less than all logits take: a pair or two at a time have a place beside dW in fp32. (With H = 320 they still
    # are one group, for dW has a place for all rows.)
    logits_bytes = int((inputs.labels != -100).sum()) * inputs.weight.shape[0] * 4
    chunk_bytes = {"C in groups": logits_bytes - 1, "D": 0}.get(path)
    inputs.weight.requires_grad_(not frozen)
    loss = linear_dpo_loss(
        *inputs[:3], inputs.ref_logps, loss_type="hinge", beta=0.001, chunk_bytes=chunk_bytes, **transform
    ).loss
    return torch.autograd.grad(loss, [inputs.hidden] if frozen else [inputs.hidden, inputs.weight])


def eager_gradients(inputs, path, **transform):
    logps = eager_token_logps(eager_logits(inputs.hidden, inputs.weight, **transform), inputs.labels).sum(1)
    wanted = [inputs.hidden] if path == "B" else [inputs.hidden, inputs.weight]
    return torch.autograd.grad(margin(logps, inputs.ref_logps), wanted)


@pytest.mark.parametrize(
    ("path", "size", "dtype", "confident", "transform"),
    covering(
        PATHS,
        # H = 320: path C keeps logits in the memory of dW; V = 504: half-precision results may go where the logits were
        [(64, 500), (64, 504), (320, 504)],
        [torch.bfloat16, torch.float16],
        [0.0, 1.0],
        [{}, {"softcap": 5.0, "logit_scale": 0.7}],
        full=2,
    ),
)
def test_half_precision_operands_stay_in_the_budget(half_precision_operands, path, size, dtype, confident, transform):
    hidden_size, vocab_size = size
    exact = head_inputs(8, 20, hidden_size, vocab_size, confident=confident).to(dtype).to(torch.float64)
    mine = gradients(exact.to(dtype), path, **transform)
    theirs, best = eager_gradients(exact.to(dtype), path, **transform), eager_gradients(exact, path, **transform)
    # fp16: coefficients of about 1e-4 leave the range where it keeps its digits, without a loss scale, on both sides
    epsilon = 1e-6 if dtype == torch.bfloat16 else 2e-4
    for name, ours, eager, oracle in zip(("hidden", "weight"), mine, theirs, best, strict=False):
        assert_within_budget(ours, eager, oracle, f"d{name}", epsilon)


@pytest.mark.parametrize("path", PATHS)
def test_each_confident_row_keeps_its_digits(half_precision_operands, path):
    """dX of a row with p_y near 1 is a small difference of large terms. With the label's entry rounded into the tile
    its relative error is about 1e-3 (that is eager's); apart, what is left is the rounding of the result to bf16."""
    exact = head_inputs(4, 40, 64, 500, confident=1.0, labelled=1.0).to(torch.bfloat16).to(torch.float64)
    (mine, *_), (best, *_) = gradients(exact.to(torch.bfloat16), path), eager_gradients(exact, path)
    error = (mine.double() - best).norm(dim=-1) / best.norm(dim=-1)
    assert error.median() < 2.2e-3 and error.max() < 4e-3  # bf16 rounds by at most 2**-8 = 3.9e-3 an entry


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("softcap", "tiles"), [(None, False), (6.0, False), (6.0, True)])
def test_each_confident_row_keeps_its_digits_in_fp32(path, softcap, tiles, set_tile_bytes):
    if tiles:
        set_tile_bytes(32 * 1024)  # 128 of the 500 columns
    exact = head_inputs(4, 40, 64, 500, confident=1.0, labelled=1.0, logit_std=3.0).to(torch.float64)
    (mine, *_) = gradients(exact.to(torch.float32), path, softcap=softcap)
    (best, *_) = eager_gradients(exact, path, softcap=softcap)
    error = (mine.double() - best).norm(dim=-1) / best.norm(dim=-1)
    assert error.max() < 1e-4, error.max()


@pytest.mark.parametrize("offset", [30.0, 1000.0, 1e4])
def test_a_common_offset_of_the_logits_costs_nothing(offset):
    """lse in one number would round at the size of the offset, and with it every probability."""
    inputs = head_inputs(2, 20, 32, 300)
    logits = (eager_logits(inputs.hidden, inputs.weight) + offset).detach()
    exact, eager, ours = (
        logits.to(d, copy=True).requires_grad_() for d in (torch.float64, torch.float32, torch.float32)
    )
    truth, theirs = eager_token_logps(exact, inputs.labels), eager_token_logps(eager, inputs.labels)
    out = sequence_logps(ours, inputs.labels, stats=("entropy", "log_sum_sq_probs"))
    assert_within_budget(out.token_logps, theirs, truth, "token_logps")
    grads = [torch.autograd.grad(t.sum(), leaf)[0] for t, leaf in ((out.logps, ours), (theirs, eager), (truth, exact))]
    assert_within_budget(*grads, "dlogits")
    labelled = inputs.labels != -100
    p = exact.detach().softmax(-1)
    for name, best in (("entropy", torch.special.entr(p).sum(-1)), ("log_sum_sq_probs", p.square().sum(-1).log())):
        torch.testing.assert_close(out.stats[name][labelled].double(), best[labelled], rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [-torch.inf, -1e30, -1e9, 1e9, 1e30])  # -inf: the least number
def test_rows_of_one_number_that_is_huge(dtype, value):
    """As of masked entries alone: all are equally likely, and the first one is the top one."""
    value, v = max(value, torch.finfo(dtype).min), 4097
    labels = torch.tensor([[0], [5], [v - 1]])
    logits = torch.full((3, 1, v), value, dtype=dtype, requires_grad=True)
    out = sequence_logps(logits, labels, stats=("is_top1", "entropy", "log_sum_sq_probs"))
    (gradient,) = torch.autograd.grad(out.logps.sum(), logits)
    assert out.stats["is_top1"].flatten().tolist() == [1, 0, 0]
    for found, sign in ((out.token_logps, -1), (out.stats["entropy"], 1), (out.stats["log_sum_sq_probs"], -1)):
        torch.testing.assert_close(found.detach(), torch.full((3, 1), sign * math.log(v)), rtol=2e-6, atol=0)
    expected = torch.full(logits.shape, -1 / v).scatter_(2, labels[..., None], 1 - 1 / v)
    torch.testing.assert_close(gradient, expected.to(dtype), rtol=max(2e-6, torch.finfo(dtype).eps), atol=0)


def test_the_first_of_least_products(impl, set_tile_bytes):
    """As of a bias that masks all entries, in several tiles."""
    set_tile_bytes(8 * 16 * 4)
    bias = torch.full((50,), torch.finfo(torch.float32).min)
    hidden, weight, labels = torch.zeros(3, 1, 8), torch.zeros(50, 8), torch.tensor([[0], [5], [49]])
    out = linear_sequence_logps(hidden, weight, labels, bias=bias, stats=("is_top1",))
    assert out.stats["is_top1"].flatten().tolist() == [True, False, False]


@pytest.mark.parametrize("value", [-torch.inf, -1e30, -1e10])
def test_huge_numbers_beside_others(value):
    """As of a vocabulary that is padded: nothing is left of them, wherever a kernel sees no others."""
    exact = torch.randn(4, 1, 9001, dtype=torch.float64)
    exact[:2, :, 300:], exact[2:, :, :-300] = (max(value, torch.finfo(torch.float32).min),) * 2
    labels = torch.tensor([[0], [299], [9000], [8800]])
    logits = exact.float().requires_grad_()
    out = sequence_logps(logits, labels, stats=("is_top1", "entropy", "log_sum_sq_probs"))
    p = exact.softmax(-1)
    torch.testing.assert_close(
        out.token_logps.double(), p.log().gather(2, labels[..., None])[..., 0], rtol=2e-6, atol=2e-6
    )
    for name, best in (("entropy", torch.special.entr(p).sum(-1)), ("log_sum_sq_probs", p.square().sum(-1).log())):
        torch.testing.assert_close(out.stats[name].double(), best, rtol=2e-6, atol=2e-6)
    (gradient,) = torch.autograd.grad(out.logps.sum(), logits)
    expected = -p.scatter_add(2, labels[..., None], torch.full((4, 1, 1), -1.0, dtype=torch.float64))
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("frozen", [True, False])
def test_a_saturated_softcap_keeps_its_slope(frozen):
    """Where tanh has reached 1 in fp32, 1 - tanh^2 is 0; 1 / cosh^2 is the small number that it should be."""
    hidden, labels = torch.full((2, 3, 4), 0.25), torch.tensor([[0, 1, 2], [3, 4, 5]])
    weight = torch.tensor([9.0, 10.0, 11.0, 12.0, -9.0, -11.0])[:, None].expand(6, 4)
    found = []
    for dtype in (torch.float32, torch.float64):
        x, w = hidden.to(dtype).requires_grad_(), weight.to(dtype).contiguous().requires_grad_(not frozen)
        if dtype == torch.float32:
            logps = linear_sequence_logps(x, w, labels, softcap=1.0).token_logps
        else:
            logps = eager_token_logps(eager_logits(x, w, softcap=1.0), labels)
        found.append(torch.autograd.grad(logps.sum(), [x] if frozen else [x, w]))
    for mine, best in zip(*found, strict=True):
        torch.testing.assert_close(mine.double(), best, rtol=1e-3, atol=0)


def test_statistics_of_entries_that_are_masked():
    """A bias or a logit of -inf takes an entry out: nothing is left of it, not 0 * -inf either."""
    inputs = head_inputs(2, 6, 16, 60)
    bias, inside = torch.zeros(60), torch.arange(60) % 7 != 3
    labels = torch.where(inputs.labels % 7 == 3, 0, inputs.labels)
    logits = eager_logits(inputs.hidden, inputs.weight)
    names = ("entropy", "log_sum_sq_probs")
    best = linear_sequence_logps(inputs.hidden, inputs.weight[inside], torch.where(labels < 0, -100, 0), stats=names)
    with torch.no_grad():
        fused = linear_sequence_logps(
            inputs.hidden, inputs.weight, labels, bias=bias.where(inside, -torch.inf), stats=names
        )
        folded = sequence_logps(logits.where(inside, -torch.inf), labels, stats=names)
    grown = linear_sequence_logps(
        inputs.hidden.requires_grad_(), inputs.weight, labels, bias=bias.where(inside, -torch.inf), stats=names
    )
    for out in (fused, folded, grown):
        for name in names:
            torch.testing.assert_close(out.stats[name], best.stats[name], rtol=1e-5, atol=1e-5)


def test_entropy_of_a_label_that_cannot_be():
    logits = torch.tensor([[[0.0, 1.0, -torch.inf]]])
    out = sequence_logps(logits, torch.tensor([[2]]), stats=("entropy",))
    assert out.logps.item() == -torch.inf
    torch.testing.assert_close(out.stats["entropy"], torch.special.entr(logits.softmax(-1)).sum(-1))


def test_long_sums_are_wide():
    """A thousand tokens of 1e-4 beside one of 1e4: fp32 sums would lose them all."""
    logits = torch.zeros(1, 2001, 2)
    logits[..., 1] = -9.0  # log p of label 0 is about -1.2e-4
    logits[0, 0, 1] = 1e4
    out = sequence_logps(logits, torch.zeros(1, 2001, dtype=torch.int64))
    assert out.logps.item() == torch.tensor(-1e4 + 2000 * out.token_logps[0, 1].item()).item()


def test_uninitialised_memory_is_never_read(monkeypatch, set_tile_bytes):
    """Every buffer made without contents holds NaN first."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    set_tile_bytes(16 * 1024)
    torch.use_deterministic_algorithms(True)
    try:
        inputs = head_inputs(6, 12, 15, 323, labelled=0.4)  # two tiles of rows, and two of columns
        inputs.labels[1] = -100
        results = []
        for reduction in ("sum", "mean"):
            out = linear_sequence_logps(*inputs[:3], bias=inputs.bias, reduction=reduction, softcap=4.0)
            grads = torch.autograd.grad(out.logps.sum(), (inputs.hidden, inputs.weight, inputs.bias))
            results += [out.logps, *grads]
        for chunk_bytes in (None, 20_000, 0):  # one group; several; none
            options = {"bias": inputs.bias, "stats": ["entropy", "mean_logit"], "chunk_bytes": chunk_bytes}
            *fused, stats = linear_dpo_loss(*inputs[:3], inputs.ref_logps, **options)
            results += [*fused, *stats.values()]
            results += torch.autograd.grad(fused[0], (inputs.hidden, inputs.weight, inputs.bias))
        frozen = linear_sequence_logps(inputs.hidden, inputs.weight.detach(), inputs.labels)
        results += torch.autograd.grad(frozen.logps.sum(), inputs.hidden)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.isfinite(t).all() for t in results)
