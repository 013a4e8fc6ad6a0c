"""Values and gradients of the log-probabilities against the eager oracle in fp64."""

import pytest
import torch
from exponentials import Operators
from grids import covering
from places import DEVICE

from dpo_kernels import dispatch, linear_dpo_loss, linear_sequence_logps, rows, sequence_logps
from dpo_kernels.impl.reference import eager_logits, eager_stats, eager_token_logps
from dpo_kernels.testing import allocated, assert_within_budget, head_inputs, rms

pytestmark = pytest.mark.usefixtures("impl")
STATS = ("entropy", "is_top1", "mean_logit", "log_sum_sq_probs")
TRANSFORMS = {
    "plain": {},
    "scale": {"logit_scale": 0.3, "temperature": 0.7},  # Cohere, Granite; sampling temperature
    "softcap": {"softcap": 3.0},  # Gemma 2; low enough to bend these logits
    "all": {"logit_scale": -0.5, "softcap": 5.0, "temperature": 1.7},  # a negative scale turns the maximum around
}
SHAPES = {
    "odd": (4, 9, 31, 123),  # no dimension a multiple of anything
    "one token": (1, 1, 8, 17),
    "two entries": (2, 3, 4, 2),
    "one entry": (2, 3, 4, 1),  # no entry but the label: logp 0
    # several tiles in rows and columns under the small tile; 33 labelled rows, one more than a program of Triton's has
    # when interpreted, and more columns than the 512 of fp64 that a block of CUDA threads reads at once
    "long": (2, 28, 16, 600),
}
ONE_TILE = ("one token", "two entries", "one entry")  # under the small tile too


@pytest.fixture(params=[None, 16 * 1024], ids=["default tile", "16 KiB tile"])
def tile(request, set_tile_bytes):
    """The small tile splits rows and columns of the larger shapes; the default one takes each whole."""
    if request.param is not None:
        set_tile_bytes(request.param)


def oracle(inputs, **transform):
    return eager_token_logps(eager_logits(inputs.hidden, inputs.weight, **transform), inputs.labels)


@pytest.mark.parametrize(
    ("shape", "transform", "with_bias", "frozen"),
    covering(list(SHAPES), list(TRANSFORMS), [False, True], [False, True], full=2),
)
@pytest.mark.full(when=lambda tile, shape: tile is not None and shape in ONE_TILE)
def test_fp64_equals_eager(tile, shape, transform, with_bias, frozen):
    inputs, transform = head_inputs(*SHAPES[shape], dtype=torch.float64), TRANSFORMS[transform]
    bias = inputs.bias if with_bias else None
    expected = eager_token_logps(eager_logits(inputs.hidden, inputs.weight, bias=bias, **transform), inputs.labels)
    if frozen:
        inputs.weight.requires_grad_(False), inputs.bias.requires_grad_(False)
    out = linear_sequence_logps(inputs.hidden, inputs.weight, inputs.labels, bias=bias, **transform)

    torch.testing.assert_close(out.token_logps, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(out.logps, expected.sum(1), rtol=0, atol=1e-12)
    assert torch.equal(out.num_tokens, (inputs.labels != -100).sum(1))

    wanted = [t for t in (inputs.hidden, inputs.weight, bias) if t is not None and t.requires_grad]
    generator = torch.Generator(expected.device).manual_seed(1)
    weights = torch.randn(expected.shape, dtype=torch.float64, generator=generator)
    # through both outputs, with a coefficient of its own for each token
    ours = torch.autograd.grad((out.token_logps * weights).sum() + out.logps.square().sum(), wanted)
    theirs = torch.autograd.grad((expected * weights).sum() + expected.sum(1).square().sum(), wanted)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.full(when=lambda tile, shape: tile is not None and shape in ONE_TILE)
# without tiles there is little between a transform and the statistics
@pytest.mark.full(when=lambda tile, shape, transform: tile is None and shape == "long" and transform != "all")
def test_stats(tile, shape, transform):
    inputs, transform = head_inputs(*SHAPES[shape], dtype=torch.float64), TRANSFORMS[transform]
    logits = eager_logits(inputs.hidden, inputs.weight, **transform)
    expected = eager_stats(logits, inputs.labels)
    from_hidden = linear_sequence_logps(inputs.hidden, inputs.weight, inputs.labels, stats=STATS, **transform).stats
    from_logits = sequence_logps(logits, inputs.labels, stats=STATS).stats
    for name in STATS:
        for got in (from_hidden[name], from_logits[name]):
            assert got.dtype == (torch.bool if name == "is_top1" else torch.float64) and not got.requires_grad
            torch.testing.assert_close(got, expected[name], rtol=0, atol=1e-10)


@pytest.mark.parametrize("tile_bytes", [16, 2**20])  # four columns a tile: the tie lies in two of them
def test_is_top1_takes_the_first_of_equal_logits(tile_bytes, set_tile_bytes):
    set_tile_bytes(tile_bytes)
    # argmax semantics: entries 2, 5 and 7 tie for the maximum, only the label 2 is the first
    logits = torch.zeros(1, 3, 8)
    logits[..., [2, 5, 7]] = 1.0
    labels = torch.tensor([[2, 5, 0]])
    for out in (
        sequence_logps(logits, labels, stats=["is_top1"]),
        linear_sequence_logps(torch.ones(1, 3, 1), logits[0, 0, :, None], labels, stats=["is_top1"]),
    ):
        assert out.stats["is_top1"].tolist() == [[True, False, False]]


@pytest.mark.parametrize(
    ("reduction", "shift", "ignore_index"),
    covering(["sum", "mean"], [False, True], [-100, 5]),  # 5 is a vocabulary entry: it must be ignored, not computed
)
def test_reduction_shift_weights(reduction, shift, ignore_index):
    inputs = head_inputs(dtype=torch.float64, ignore_index=ignore_index)
    weights = torch.rand(inputs.labels.shape, dtype=torch.float64, requires_grad=True)
    logits, labels, used = eager_logits(inputs.hidden, inputs.weight), inputs.labels, weights
    if shift:
        logits, labels, used = logits[:, :-1], labels[:, 1:], weights[:, 1:]
    expected = (eager_token_logps(logits, labels, ignore_index) * used).sum(1)
    if reduction == "mean":
        expected = expected / (labels != ignore_index).sum(1)
    options = {"token_weights": weights, "reduction": reduction, "shift": shift, "ignore_index": ignore_index}
    all_logits = eager_logits(inputs.hidden, inputs.weight)
    for out in (
        linear_sequence_logps(inputs.hidden, inputs.weight, inputs.labels, **options),
        sequence_logps(all_logits, inputs.labels, **options),
    ):
        torch.testing.assert_close(out.logps, expected)
        assert torch.equal(out.num_tokens, (labels != ignore_index).sum(1))
        assert out.token_logps.shape == inputs.labels.shape
        wanted = (inputs.hidden, inputs.weight, weights)
        ours = torch.autograd.grad(out.logps.sum(), wanted, retain_graph=True)
        for mine, other in zip(ours, torch.autograd.grad(expected.sum(), wanted, retain_graph=True), strict=True):
            torch.testing.assert_close(mine, other)


def test_every_block_of_rows_has_its_own_first_of_equal_logits(set_tile_bytes):
    set_tile_bytes(4 * 1024)  # a few rows and columns at a time
    inputs = head_inputs(4, 10, 64, 150, labelled=1.0)
    with torch.no_grad():
        weight = inputs.weight.detach().clone()
        weight[[40, 41, 140]] = 20 * weight[40]  # the largest of all for half of the rows
        top = eager_logits(inputs.hidden, weight).argmax(-1)
        for shift in (0, 1, 100):
            labels = torch.where(top == 40, 40 + shift, 7)
            out = linear_sequence_logps(inputs.hidden, weight, labels, stats=("is_top1",))
            assert torch.equal(out.stats["is_top1"].bool(), (top == labels) & (shift == 0))
    assert 10 < (top == 40).sum() < 30


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_no_labelled_tokens(reduction):
    inputs = head_inputs(labelled=0.0)
    out = linear_sequence_logps(inputs.hidden, inputs.weight, inputs.labels, bias=inputs.bias, reduction=reduction)
    assert out.logps.tolist() == [0.0] * 4 and out.num_tokens.tolist() == [0] * 4
    for grad in torch.autograd.grad(out.logps.sum(), (inputs.hidden, inputs.weight, inputs.bias)):
        assert torch.equal(grad, torch.zeros_like(grad))
    logits = torch.randn(2, 3, 5, requires_grad=True)
    out = sequence_logps(logits, torch.full((2, 3), -100), reduction=reduction)
    assert out.logps.tolist() == [0.0, 0.0]
    assert torch.equal(torch.autograd.grad(out.logps.sum(), logits)[0], torch.zeros(2, 3, 5))


def test_gradients_without_a_hidden_gradient():
    # head-only training: hidden states come from a frozen trunk
    inputs = head_inputs(dtype=torch.float64)
    inputs.hidden.requires_grad_(False)
    out = linear_sequence_logps(inputs.hidden, inputs.weight, inputs.labels, bias=inputs.bias)
    expected = eager_token_logps(eager_logits(inputs.hidden, inputs.weight, bias=inputs.bias), inputs.labels)
    for mine, other in zip(
        torch.autograd.grad(out.logps.sum(), (inputs.weight, inputs.bias)),
        torch.autograd.grad(expected.sum(), (inputs.weight, inputs.bias)),
        strict=True,
    ):
        torch.testing.assert_close(mine, other)


def test_non_contiguous_inputs(tile):
    inputs = head_inputs(6, 20, 32, 99, dtype=torch.float64)
    hidden, labels = inputs.hidden[::2, 1::3, ::2], inputs.labels[::2, 1::3]
    weight = inputs.weight.detach().t().contiguous().t()[:, ::2].requires_grad_()
    assert not hidden.is_contiguous() and not weight.is_contiguous()
    out = linear_sequence_logps(hidden, weight, labels)
    expected = eager_token_logps(eager_logits(hidden, weight), labels)
    torch.testing.assert_close(out.token_logps, expected, rtol=0, atol=1e-12)
    for mine, other in zip(
        torch.autograd.grad(out.logps.sum(), (inputs.hidden, weight)),
        torch.autograd.grad(expected.sum(), (inputs.hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(mine, other)
    logits = torch.randn(4, 9, 50, dtype=torch.float64, requires_grad=True)
    view, labels = logits[:, :-1, ::2], torch.randint(25, (4, 8))
    (mine,) = torch.autograd.grad(sequence_logps(view, labels).logps.sum(), logits)
    (other,) = torch.autograd.grad(eager_token_logps(view, labels).sum(), logits)
    torch.testing.assert_close(mine, other)


@pytest.mark.parametrize(
    ("dtype", "transform", "frozen", "confident"),
    # confident rows by themselves: 1 - p_y cancels there
    covering([torch.float32, torch.bfloat16, torch.float16], list(TRANSFORMS), [False, True], [0.0, 1.0], full=2),
)
def test_error_budget(dtype, transform, frozen, confident):
    transform = TRANSFORMS[transform]
    exact = head_inputs(4, 40, 64, 500, confident=confident).to(dtype).to(torch.float64)
    ours, eager = exact.to(dtype), exact.to(dtype)
    if frozen:
        ours.weight.requires_grad_(False)
    out = linear_sequence_logps(ours.hidden, ours.weight, ours.labels, **transform)
    truth = oracle(exact, **transform)
    theirs = oracle(eager, **transform)
    assert out.logps.dtype == out.token_logps.dtype == torch.float32
    assert_within_budget(out.token_logps, theirs, truth, "token_logps")
    assert_within_budget(out.logps, theirs.sum(1), truth.sum(1), "logps")
    names = ["hidden"] if frozen else ["hidden", "weight"]
    c = torch.tensor([0.3, -0.7, 1.1, -0.2])
    got = torch.autograd.grad((out.logps * c).sum(), [getattr(ours, n) for n in names])
    eager_grads = torch.autograd.grad((theirs.sum(1) * c).sum(), [getattr(eager, n) for n in names])
    truth_grads = torch.autograd.grad((truth.sum(1) * c).sum(), [getattr(exact, n) for n in names])
    for name, mine, other, best in zip(names, got, eager_grads, truth_grads, strict=True):
        assert mine.dtype == dtype
        assert_within_budget(mine, other, best, f"d{name}")


@pytest.mark.parametrize(("dtype", "inplace"), covering([torch.float32, torch.bfloat16, torch.float16], [False, True]))
# path E of the kernels takes no tiles
@pytest.mark.full(when=lambda impl, tile: impl != "torch" and tile is not None)
def test_error_budget_from_logits(tile, dtype, inplace):
    inputs = head_inputs(4, 40, 64, 500, confident=0.5, dtype=dtype)
    logits = eager_logits(inputs.hidden, inputs.weight).detach()
    exact, eager, ours = (logits.to(d, copy=True).requires_grad_() for d in (torch.float64, dtype, dtype))
    out = sequence_logps(ours, inputs.labels, inplace_backward=inplace)
    truth, theirs = eager_token_logps(exact, inputs.labels), eager_token_logps(eager, inputs.labels)
    assert_within_budget(out.token_logps, theirs, truth, "token_logps")
    (mine,) = torch.autograd.grad(out.logps.sum(), ours)
    assert_within_budget(
        mine, torch.autograd.grad(theirs.sum(), eager)[0], torch.autograd.grad(truth.sum(), exact)[0], "dlogits"
    )
    assert mine.dtype == dtype and (mine.data_ptr() == ours.data_ptr()) == inplace


def test_confident_tokens_keep_their_digits():
    """Where p_y is almost 1, logp and its gradient are small numbers: they keep fp32's relative precision."""
    logits = torch.tensor([[[0.0, 18.0, 1.0], [0.0, 40.0, 2.0], [0.0, 90.0, 0.0]]], requires_grad=True)
    labels = torch.ones(1, 3, dtype=torch.int64)
    out = sequence_logps(logits, labels)
    exact = logits.detach().double().requires_grad_()
    truth = -torch.log1p((torch.exp(exact[..., [0, 2]] - exact[..., 1:2])).sum(-1))
    torch.testing.assert_close(out.token_logps.double(), truth, rtol=1e-6, atol=0)
    (mine,) = torch.autograd.grad(out.token_logps.sum(), logits)
    torch.testing.assert_close(mine.double(), torch.autograd.grad(truth.sum(), exact)[0], rtol=1e-6, atol=1e-44)


def test_bf16_logps_of_peaked_logits(impl):
    """bf16 inputs, logits of standard deviation 4 over 32768 entries: rms error at most 1e-5 nats, and the gradients no
    worse than eager's. Of fewer entries where kernels are interpreted."""
    interpreted = DEVICE == "cpu" and impl.__name__.rpartition(".")[2] in ("triton", "cuda")
    vocab = 4096 if interpreted else 32768
    inputs = head_inputs(2, 4, 128, vocab, dtype=torch.bfloat16, logit_std=4.0, labelled=1.0)
    exact, eager = inputs.to(torch.float64), inputs.to(torch.bfloat16)
    truth, theirs = oracle(exact), oracle(eager)
    out = linear_sequence_logps(inputs.hidden, inputs.weight, inputs.labels)
    assert rms(out.token_logps.double() - truth) <= 1e-5
    assert rms(theirs.double() - truth) > 1e-3  # what rounding the logits costs: the test tells them apart
    for name, mine, other, best in zip(
        ("hidden", "weight"),
        torch.autograd.grad(out.logps.sum(), inputs[:2]),
        torch.autograd.grad(theirs.sum(), eager[:2]),
        torch.autograd.grad(truth.sum(), exact[:2]),
        strict=True,
    ):
        assert_within_budget(mine, other, best, f"d{name}")


@pytest.mark.parametrize("frozen", [False, True])
def test_autocast_rounds_operands_and_keeps_fp32_logits(frozen):
    inputs = head_inputs(4, 40, 64, 500)
    inputs.weight.requires_grad_(not frozen)
    rounded = [t.detach().bfloat16().double().requires_grad_() for t in (inputs.hidden, inputs.weight)]
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        out = linear_sequence_logps(inputs.hidden, inputs.weight, inputs.labels)
    truth = eager_token_logps(eager_logits(*rounded), inputs.labels)
    assert out.logps.dtype == torch.float32
    assert rms(out.token_logps.double() - truth) < 1e-6
    wanted = (inputs.hidden,) if frozen else (inputs.hidden, inputs.weight)
    grads = torch.autograd.grad(out.logps.sum(), wanted)
    for mine, best in zip(grads, torch.autograd.grad(truth.sum(), rounded), strict=False):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine.double(), best, rtol=0, atol=1e-5)


def test_autocast_leaves_fp64_alone():
    inputs = head_inputs().to(torch.float64)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        out = linear_sequence_logps(inputs.hidden, inputs.weight, inputs.labels)
    assert torch.equal(out.logps, linear_sequence_logps(*inputs[:3]).logps)


def test_a_bias_alone_has_its_gradient():
    """With the weight frozen the bias still asks for a second pass."""
    inputs = head_inputs()
    hidden, weight = inputs.hidden.detach(), inputs.weight.detach()
    for x in (hidden, inputs.hidden):
        loss = linear_sequence_logps(x, weight, inputs.labels, bias=inputs.bias).logps.sum()
        (mine,) = torch.autograd.grad(loss, inputs.bias)
        best = eager_token_logps(eager_logits(hidden, weight, bias=inputs.bias), inputs.labels).sum()
        torch.testing.assert_close(mine, torch.autograd.grad(best, inputs.bias)[0])


def test_extreme_logits():
    """Logits of +-1e4 and masked entries of -inf leave everything finite and right."""
    inputs = head_inputs(dtype=torch.float32, logit_std=1e4)
    bias = torch.zeros(123)
    bias[100:] = -torch.inf
    labels = inputs.labels.where(inputs.labels < 100, torch.full_like(inputs.labels, 7))
    out = linear_sequence_logps(inputs.hidden, inputs.weight, labels, bias=bias)
    exact = inputs.to(torch.float64)
    truth = eager_token_logps(eager_logits(exact.hidden, exact.weight)[..., :100], labels)
    torch.testing.assert_close(out.token_logps.double(), truth, rtol=1e-5, atol=1e-2)
    for mine, best in zip(
        torch.autograd.grad(out.logps.sum(), (inputs.hidden, inputs.weight)),
        torch.autograd.grad(truth.sum(), (exact.hidden, exact.weight)),
        strict=True,
    ):
        assert torch.isfinite(mine).all()
        assert rms(mine.double() - best) <= 1e-5 * rms(best)


def test_same_bits_twice():
    inputs = head_inputs(4, 40, 64, 500)
    runs = []
    for _ in range(2):
        out = linear_sequence_logps(inputs.hidden, inputs.weight, inputs.labels, stats=STATS)
        grads = torch.autograd.grad(out.logps.sum(), (inputs.hidden, inputs.weight))
        runs.append((out.logps, *out.stats.values(), *grads))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_inplace_backward_is_noticed_by_autograd():
    leaf = torch.randn(2, 3, 5, requires_grad=True)
    logits = leaf * 2
    other_use = logits.square().sum()  # saved logits for its own backward
    loss = sequence_logps(logits, torch.ones(2, 3, dtype=torch.int64), inplace_backward=True).logps.sum()
    torch.autograd.grad(loss, logits, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other_use.backward()


def test_num_labelled():
    inputs = head_inputs()
    count = int((inputs.labels != -100).sum())
    with_count = linear_sequence_logps(inputs.hidden, inputs.weight, inputs.labels, num_labelled=count)
    assert torch.equal(with_count.logps, linear_sequence_logps(inputs.hidden, inputs.weight, inputs.labels).logps)
    with pytest.raises(ValueError, match=f"num_labelled: expected {count}.*got {count + 1}"):
        linear_sequence_logps(inputs.hidden, inputs.weight, inputs.labels, num_labelled=count + 1)


@pytest.mark.parametrize("frozen", [False, True])
def test_second_derivatives_are_refused(frozen):
    inputs = head_inputs()
    inputs.weight.requires_grad_(not frozen)
    logits = torch.randn(2, 3, 5, requires_grad=True)
    labels = torch.ones(2, 3, dtype=torch.int64)
    for loss, leaf in (
        (linear_sequence_logps(*inputs[:3]).logps.square().sum(), inputs.hidden),
        (linear_dpo_loss(*inputs[:3], inputs.ref_logps).loss, inputs.hidden),
        (sequence_logps(logits, labels).logps.square().sum(), logits),
    ):
        with pytest.raises(RuntimeError, match="no second derivatives"):
            torch.autograd.grad(loss, leaf, create_graph=True)


def test_empty_and_odd_shapes():
    assert linear_sequence_logps(*head_inputs(0, 9)[:3]).logps.shape == (0,)
    for shift in (False, True):
        out = linear_sequence_logps(*head_inputs(4, 0)[:3], shift=shift)
        assert out.logps.tolist() == [0.0] * 4 and out.token_logps.shape == (4, 0)
    inputs = head_inputs()
    as_int32 = linear_sequence_logps(inputs.hidden, inputs.weight, inputs.labels.int())
    assert torch.equal(as_int32.logps, linear_sequence_logps(*inputs[:3]).logps)


def test_what_ignored_positions_hold_does_not_matter():
    inputs = head_inputs()
    weights = torch.ones(inputs.labels.shape).masked_fill(inputs.labels == -100, torch.nan)
    out = linear_sequence_logps(*inputs[:3], token_weights=weights)
    assert torch.equal(out.logps, linear_sequence_logps(*inputs[:3]).logps)


def test_large_finite_hidden_states_are_no_error():
    hidden = torch.zeros(1, 1, 4)
    hidden[..., :2] = 3e38  # their sum is not finite, they are
    out = linear_sequence_logps(hidden, torch.zeros(5, 4), torch.zeros(1, 1, dtype=torch.int64))
    torch.testing.assert_close(out.logps, torch.tensor([5.0]).log().neg())


def broken(**changes):
    inputs = head_inputs()
    values = {"hidden": inputs.hidden, "weight": inputs.weight, "labels": inputs.labels, **changes}
    return linear_sequence_logps(
        values.pop("hidden"), values.pop("weight"), values.pop("labels"), **values
    )  # the rest are options


def test_errors_name_the_argument(monkeypatch):
    monkeypatch.setattr(dispatch, "CUDA_PROBLEM", "it was not built")
    inputs = head_inputs()
    labels = inputs.labels.clone()
    labels[2, 3] = 123
    nan = inputs.hidden.detach().clone()
    s, t = torch.nonzero(inputs.labels != -100)[5].tolist()
    nan[s, t, 7] = torch.nan
    cases = {
        r"labels: expected values in \[0, 123\).*got 123 for sequence 2, position 3": {"labels": labels},
        rf"hidden: expected finite.*sequence {s}, position {t} ": {"hidden": nan},
        rf"hidden: expected finite.*sequence {s}, position {t} \(": {"hidden": nan.nan_to_num(nan=torch.inf)},
        rf"hidden: expected finite.*sequence {s}, position {t} \(1": {"hidden": nan.nan_to_num(nan=-torch.inf)},
        r"hidden: expected shape \[S, T, H\]": {"hidden": inputs.hidden[0]},
        r"weight: expected shape \[V, 31\]": {"weight": inputs.weight[:, 1:]},
        r"weight: expected the dtype of hidden": {"weight": inputs.weight.double()},
        r"labels: expected shape \(4, 9\)": {"labels": inputs.labels[:, 1:]},
        r"hidden: expected float64.*got torch.float8_e5m2": {"hidden": inputs.hidden.to(torch.float8_e5m2)},
        r"labels: expected an integer": {"labels": inputs.labels.float()},
        r"bias: expected shape \[123\]": {"bias": inputs.bias[1:]},
        r"softcap: expected a positive": {"softcap": 0.0},
        r"temperature: expected a positive": {"temperature": 0.0},
        r"logit_scale: expected a finite": {"logit_scale": float("nan")},
        r"logit_scale: expected a finite number, got tensor": {"logit_scale": torch.ones(())},
        r"logit_scale: expected a finite number, got -inf": {"logit_scale": -float("inf")},
        r"softcap: expected a positive number or None, got inf": {"softcap": float("inf")},
        r"softcap: expected a positive number or None, got True": {"softcap": True},
        r"temperature: expected a positive number, got inf": {"temperature": float("inf")},
        r"ignore_index: expected an integer, got True": {"ignore_index": True},
        r"ignore_index: expected an integer of 64 bits, got 9": {"ignore_index": 2**63},
        r"shift: expected True or False, got 1": {"shift": 1},
        r"num_labelled: expected None or a count": {"num_labelled": -2},
        r"weight: expected a tensor, got NoneType": {"weight": None},
        r"hidden: expected a hidden size": {"hidden": inputs.hidden[..., :0], "weight": inputs.weight[:, :0]},
        r"reduction: expected": {"reduction": "none"},
        r"stats: expected": {"stats": ("entropi",)},
        r"token_weights: expected shape": {"token_weights": torch.ones(3)},
        r"impl: expected one of": {"impl": "eager"},
        r"impl: 'cuda' cannot run": {"impl": "cuda"},
    }
    for message, change in cases.items():
        with pytest.raises(ValueError, match=message):
            broken(**change)
    with pytest.raises(ValueError, match="inplace_backward: expected logits whose elements share no memory"):
        sequence_logps(torch.zeros(1, 1, 5).expand(2, 3, 5), torch.ones(2, 3).long(), inplace_backward=True)
    # hidden states that are not labelled may hold anything
    ignored = inputs.hidden.detach().clone()
    ignored[inputs.labels == -100] = torch.nan
    assert torch.isfinite(broken(hidden=ignored).logps).all()


def test_a_head_without_a_gradient_gets_none_without_labels(impl):
    inputs = head_inputs(2, 3, 8, 1000)
    hidden, weight, bias = inputs.hidden.detach(), inputs.weight.detach(), torch.zeros(1000, requires_grad=True)
    logps = linear_sequence_logps(hidden, weight, torch.full((2, 3), -100), bias=bias).logps
    with Operators() as operators:
        logps.sum().backward()
    assert torch.equal(bias.grad, torch.zeros(1000)) and operators.largest == 1000


@pytest.mark.parametrize("impl", ["torch", "cpu"])
@pytest.mark.parametrize("places", [None, torch.arange(128).view(2, 64)], ids=["in place", "predictors"])
@pytest.mark.skipif(DEVICE != "cpu", reason="memory of the CPU is measured")
def test_a_gradient_in_fp32_is_that_of_a_few_rows(impl, places, monkeypatch):
    """Of a frozen head: beside the gradient of hidden states there is no other one as large."""
    if reason := dispatch.unavailable_reason(impl, torch.device("cpu")):
        pytest.skip(reason)
    monkeypatch.setattr(rows, "PUT_ROWS", 16)
    hidden, weight = torch.randn(2, 64, 256).bfloat16().requires_grad_(), torch.randn(50, 256).bfloat16()
    loss = linear_sequence_logps(hidden, weight, torch.randint(50, (2, 64)), predictors=places, impl=impl).logps.sum()
    assert allocated(loss.backward).peak < 3 * hidden.numel()  # of 2 bytes
