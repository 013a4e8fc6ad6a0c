"""What the kernels that take positions [S, T] as they are compute of whole sequences, and how much they launch."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from grids import covering
from places import DEVICE
from recording import Launched, Operators

from dpo_kernels import logps, ops, sequence_logps
from dpo_kernels.dispatch import default
from dpo_kernels.impl import positions
from dpo_kernels.impl.interface import STATS, Labels
from dpo_kernels.impl.reference import eager_stats, eager_token_logps

pytestmark = pytest.mark.usefixtures("impl")
BOTH = pytest.mark.parametrize("impl", ["triton", "cuda"], indirect=True)


def scattered(t):
    """The same numbers, apart in memory."""
    apart = torch.full((t.shape[1], 2 * t.shape[0]), 7, dtype=t.dtype)
    apart[:, ::2] = t.t()
    return apart[:, ::2].t()


def tokens(sequences, length, dtype, weighted, seed=0):
    """Log-probabilities, labels and weights, NaN where there is no label; none of them contiguous."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    labels = torch.randint(5, (sequences, length), generator=generator) - 1  # -1 is none
    logps = -torch.rand(sequences, length, dtype=dtype, generator=generator) * (labels != -1)
    weights = torch.rand(sequences, length, dtype=dtype, generator=generator).masked_fill(labels == -1, torch.nan)
    return scattered(logps), scattered(labels), scattered(weights) if weighted else None


def sum_tokens(logps, labels, weights=None, mean=False):
    return ops.sum_tokens(logps, labels, weights, -1, mean, default(torch.get_default_device()))


@pytest.mark.parametrize(
    ("impl", "shape", "dtype", "weighted", "mean"),
    covering(
        ["triton", "cuda"],
        [(3, 2500), (2, 1), (2, 0), (0, 3)],  # more than a program goes through at once; nothing to go through
        [torch.float32, torch.float64],
        [False, True],
        [False, True],
        full=2,
    ),
    indirect=["impl"],
)
def test_sums_lose_nothing(shape, dtype, weighted, mean):
    logps, labels, weights = tokens(*shape, dtype, weighted)
    sums, counts = sum_tokens(logps, labels, weights, mean)
    labelled = labels != -1
    products = logps if weights is None else logps * weights.masked_fill(~labelled, 0)
    expected = products.double().sum(1)
    if mean:
        expected /= labelled.sum(1).clamp(min=1)
    assert counts.dtype == torch.int64 and torch.equal(counts, labelled.sum(1))
    assert sums.dtype == dtype
    rtol = 2**-24 if dtype == torch.float32 else 1e-13  # half a last digit: rounded once
    torch.testing.assert_close(sums.double(), expected, rtol=rtol, atol=0)
    assert torch.equal(sums, sum_tokens(logps, labels, weights, mean)[0])


@BOTH
@pytest.mark.parametrize(("trained", "mean"), [((True, True), True), ((False, True), False), ((True, False), False)])
def test_gradients_of_sums(trained, mean):
    logps, labels, weights = tokens(2, 3, torch.float64, True)
    labels[1] = -1
    leaves = [t.detach().nan_to_num().requires_grad_(each) for t, each in zip((logps, weights), trained, strict=True)]
    assert torch.autograd.gradcheck(lambda p, w: sum_tokens(p, labels, w, mean)[0], leaves)
    assert torch.autograd.gradcheck(lambda p: sum_tokens(p, labels, None, mean)[0], [logps.detach().requires_grad_()])


@BOTH
def test_gradients_of_sums_in_several_blocks():
    """Of one number for all sequences, in as many blocks as a long response takes."""
    found = []
    for by_kernel in (True, False):
        logps, labels, weights = (t.detach() for t in tokens(2, 2500, torch.float32, True))
        logps.requires_grad_(), weights.requires_grad_()
        masked = weights.masked_fill(labels == -1, 0)
        sums = sum_tokens(logps, labels, weights)[0] if by_kernel else (logps * masked).sum(1)
        found.append(torch.autograd.grad(sums.sum(), [logps, weights]))
    for mine, other in zip(*found, strict=True):
        assert torch.equal(mine, other)


class Called:
    """In the place of a compiled module, of which each function launches one kernel: notes the calls."""

    def __init__(self, module, launches):
        self.module, self.launches = module, launches

    def __getattr__(self, name):
        found = getattr(self.module, name)
        if isinstance(found, type) or not callable(found):
            return found

        def call(*args):
            self.launches[name] += 1
            return found(*args)

        return call


class OperatorsInside(Operators):
    """Those of this package's operators too."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name() not in ops.IMPLEMENTATION_OF:
            return super().__torch_dispatch__(func, types, args, kwargs)
        with self:
            return ops.IMPLEMENTATION_OF[func.name()](*args)


@pytest.fixture
def launched(impl, monkeypatch):
    """Launches of this implementation's kernels by name."""
    launches = Counter()
    if impl.__name__.endswith("cuda"):
        monkeypatch.setattr(impl, "_cuda", Called(impl._cuda, launches))
    else:
        from dpo_kernels.impl import triton_sequences

        for module in (impl, triton_sequences):
            for name in [name for name in vars(module) if name.endswith("_kernel")]:
                monkeypatch.setattr(module, name, Launched(getattr(module, name), name, launches))
    return launches


# What calls of `sequence_logps` launch beside their kernels: PyTorch's operators.
CALLS = {
    "plain": ({}, []),
    "known": ({"num_labelled": 6}, []),
    "mean": ({"reduction": "mean"}, []),
    "stats": ({"stats": STATS}, ["gt"]),  # to bool
    "shift": ({"shift": True}, ["cat", "new_full"]),
    "in place": ({"inplace_backward": True}, []),
    "weights": ({"token_weights": torch.ones(2, 4, requires_grad=True)}, []),
}


@BOTH
@pytest.mark.parametrize("call", CALLS)
def test_what_path_e_launches(launched, monkeypatch, call):
    """Five at most: the rows and the sums, an assertion where nobody waits, and what aligns labels; and two in the
    backward."""
    options, others = CALLS[call]
    monkeypatch.setattr(logps, "is_at_hand", lambda tensor: False)  # as on a device
    labels = torch.tensor([[3, -100, 5, 0], [-100, 7, 9, 2]])
    logits = torch.randn(2, 4, 11, dtype=torch.bfloat16, requires_grad=True)
    with OperatorsInside(found := Counter()):
        out = sequence_logps(logits, labels, **options)
    asserted = DEVICE != "cpu" and "num_labelled" in options
    assert found.pop("_assert_async" if asserted else "item") == 1
    assert sum(launched.values()) == 2 and sorted(found.elements()) == others, (launched, found)
    assert sum(launched.values()) + found.total() + 1 <= 5

    launched.clear()
    wanted, g = [logits, *(t for t in options.values() if isinstance(t, torch.Tensor))], torch.ones(2)
    with OperatorsInside(found := Counter()):
        torch.autograd.grad(out.logps, wanted, g)
    assert found.total() == 0, found
    assert sum(launched.values()) == (2 if call in ("weights", "mean") else 1), launched


LAYOUTS = {
    "dense": lambda t: t.clone(),
    "vocabulary apart": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "wider rows": lambda t: torch.cat([t] * 5, dim=-1)[..., 3 : t.shape[-1] + 3].copy_(t),
    "positions before sequences": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
}
# V: one entry, fewer than a lane has, several blocks of a program and of a row, none a multiple of anything
ROWS = {"one entry": (2, 3, 1), "few": (3, 2, 5), "one row": (1, 1, 123), "blocks": (2, 3, 17001)}


@pytest.mark.parametrize(
    ("impl", "dtype", "layout", "shape", "inplace"),
    covering(
        ["triton", "cuda"],
        [torch.float32, torch.bfloat16, torch.float16, torch.float64],
        list(LAYOUTS),
        list(ROWS),
        [False, True],
        full=2,
    ),
    indirect=["impl"],
)
def test_path_e(dtype, layout, shape, inplace):
    """Against fp64. Logits that are not labelled are NaN: nobody reads them, and their gradient is 0."""
    sequences, length, v = ROWS[shape]
    generator = torch.Generator(DEVICE).manual_seed(0)
    exact = 4 * torch.randn(sequences, length, v, dtype=torch.float64, generator=generator)
    labels = scattered(torch.randint(v, (sequences, length), generator=generator))
    exact.scatter_(
        2, labels[..., None], 20.0 * (torch.arange(length) % 2).double()[None, :, None].expand_as(labels[..., None])
    )
    if shape != "one row":
        labels[0, 1] = labels[-1, 0] = -100
    exact = exact.to(dtype).double().requires_grad_()
    logits = LAYOUTS[layout](exact.detach().to(dtype).masked_fill((labels == -100)[..., None], torch.nan))
    assert layout == "dense" or not logits.is_contiguous() or 1 in (sequences, length, v)
    logits.requires_grad_()
    g = torch.linspace(-1.0, 2.0, labels.numel()).reshape(labels.shape).to(logits.dtype if inplace else torch.float64)

    out = sequence_logps(logits, labels, stats=STATS, inplace_backward=inplace)
    (mine,) = torch.autograd.grad(out.token_logps, logits, g.to(out.token_logps.dtype))
    truth = eager_token_logps(exact, labels)
    (best,) = torch.autograd.grad(truth, exact, g.double())
    fp64 = dtype == torch.float64
    exactly = {"rtol": 1e-12, "atol": 1e-14} if fp64 else {"rtol": 2e-6, "atol": 1e-12}
    torch.testing.assert_close(out.token_logps.double(), truth.detach(), **exactly)
    for name, value in eager_stats(exact.detach(), labels).items():
        found = out.stats[name].double()
        tolerance = 1e-10 if fp64 else 1e-5
        torch.testing.assert_close(
            found, value.double(), rtol=tolerance, atol=tolerance, msg=lambda t, at=name: f"{at}: {t}"
        )
    rounded = {"rtol": max(1e-5, torch.finfo(dtype).eps), "atol": 1e-7 if dtype == torch.float16 else 1e-37}
    torch.testing.assert_close(mine.double(), best, **(exactly if fp64 else rounded))
    assert (mine[labels == -100] == 0).all() and (mine.data_ptr() == logits.data_ptr()) == inplace


@BOTH
def test_a_sequence_has_the_gradients_of_its_tokens():
    """Which are not copied for each of them."""
    logits, labels = torch.randn(3, 4, 11, requires_grad=True), torch.randint(11, (3, 4))
    out, g = sequence_logps(logits, labels), torch.tensor([0.3, -0.7, 1.1])
    (mine,) = torch.autograd.grad(out.logps, logits, g, retain_graph=True)
    (other,) = torch.autograd.grad(out.token_logps, logits, g[:, None].expand(3, 4).contiguous())
    assert torch.equal(mine, other)


@BOTH
@pytest.mark.parametrize("num_labelled", [None, 7])
def test_labels_that_do_not_fit_are_named(num_labelled):
    logits = torch.randn(3, 4, 11)
    labels = torch.arange(12).reshape(3, 4).clamp(max=10)
    labels[0] = -1
    labels[2, 0] = -1
    for wrong in (11, 2**40, -100):
        labels[2, 1] = wrong
        with pytest.raises(
            ValueError, match=rf"labels: expected values in \[0, 11\).*got {wrong} for sequence 2, position 1"
        ):
            sequence_logps(logits, labels, ignore_index=-1, num_labelled=num_labelled)
    labels[2, 1] = 10
    assert sequence_logps(logits, labels, ignore_index=-1, num_labelled=num_labelled).num_tokens.tolist() == [0, 4, 3]


@BOTH
@pytest.mark.parametrize(("shape", "count"), [((2, 3), 5), ((2, 3), 0), ((2, 0), 1), ((0, 3), 1)])
def test_a_count_that_does_not_fit_is_named(shape, count):
    labels = torch.full(shape, 4)
    with pytest.raises(ValueError, match=f"num_labelled: expected (at most )?{labels.numel()}, .* got {count}"):
        sequence_logps(torch.randn(*shape, 11), labels, num_labelled=count)


@BOTH
def test_a_device_that_is_not_waited_for_asserts(monkeypatch):
    asserted = []
    monkeypatch.setattr(torch, "_assert_async", lambda *args: asserted.append(args))
    fit = torch.tensor(0)
    positions.check_labels(fit, Labels(SimpleNamespace(device=SimpleNamespace(type="cuda")), -100, 3), 11)
    assert asserted == [(fit, positions.DO_NOT_FIT)]


@BOTH
def test_nothing_is_labelled():
    for shape in ((2, 3), (2, 0), (0, 3)):
        logits = torch.full((*shape, 11), torch.nan, requires_grad=True)
        out = sequence_logps(logits, torch.full(shape, -100), stats=STATS, reduction="mean", num_labelled=0)
        assert out.logps.tolist() == [0.0] * shape[0] and out.num_tokens.tolist() == [0] * shape[0]
        assert all(torch.equal(t, torch.zeros_like(t)) for t in (out.token_logps, *out.stats.values()))
        assert torch.equal(torch.autograd.grad(out.logps.sum(), logits)[0], torch.zeros(*shape, 11))


@BOTH
def test_entries_of_minus_infinity_and_the_least_number():
    """Masked in either way: all but the label, whole blocks of a program, and all of a row alike."""
    least, v = torch.finfo(torch.float32).min, 9001
    for masked in (-torch.inf, least):
        logits = torch.full((1, 3, v), masked)
        labels = torch.tensor([[7, 9000, 3]])
        logits[0, 0, 7] = 1.0
        logits[0, 1, 9000], logits[0, 1, 8999] = 2.0, 3.0
        logits[0, 2] = least
        truth = logits.double().log_softmax(-1).gather(2, labels[..., None])[..., 0]
        out = sequence_logps(logits, labels, stats=("entropy", "is_top1"))
        torch.testing.assert_close(out.token_logps.double(), truth, rtol=1e-6, atol=1e-6)
        assert out.stats["is_top1"][0, :2].tolist() == [True, False]
        expected = torch.tensor([[0.0, torch.distributions.Bernoulli(logits=torch.tensor(1.0)).entropy(), 0.0]])
        expected[0, 2] = torch.tensor(v).log()
        torch.testing.assert_close(out.stats["entropy"], expected, rtol=1e-5, atol=1e-5)


@BOTH
def test_path_e_has_the_same_bits_twice(monkeypatch):
    """In whatever order threads run."""
    logits, labels = torch.randn(2, 3, 9001, requires_grad=True), torch.tensor([[5, -100, 9000], [0, 17, -100]])
    found = []
    for seed in range(3):
        monkeypatch.setenv("DPO_EMULATION_SEED", str(seed))
        out = sequence_logps(logits, labels, token_weights=torch.rand(2, 3, generator=torch.Generator().manual_seed(0)))
        found.append([out.logps.detach(), out.token_logps.detach(), *torch.autograd.grad(out.logps.sum(), logits)])
    assert all(torch.equal(mine, first) for other in found[1:] for mine, first in zip(other, found[0], strict=True))


@BOTH
def test_a_tangent_of_weights_is_not_lost(impl):
    """What no kernel knows is left to PyTorch's operators."""
    forward_ad, name = torch.autograd.forward_ad, default(torch.get_default_device())
    logits, labels, weights = torch.randn(2, 5, 9), torch.randint(9, (2, 5)), torch.rand(2, 5)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(weights, torch.ones(2, 5))
        found = sequence_logps(logits, labels, token_weights=dual, impl=name)
        tangent = forward_ad.unpack_dual(found.logps).tangent
    torch.testing.assert_close(tangent, found.token_logps.sum(1))


@BOTH
def test_a_statistic_that_is_asked_for_twice(impl):
    logits, labels = torch.randn(2, 5, 9), torch.randint(9, (2, 5))
    name = default(torch.get_default_device())
    once, twice = (sequence_logps(logits, labels, stats=["entropy"] * n, impl=name).stats for n in (1, 2))
    assert list(twice) == ["entropy"] and torch.equal(once["entropy"], twice["entropy"])
