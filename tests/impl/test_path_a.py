"""Path A of all positions on Triton and on CUDA: against fp64 and against rows that were compacted before, what is read
where it lies, what is wrong with it, and what is launched. Without a GPU Triton interprets its kernels, and CUDA's run
through the emulation in tests/impl/cuda."""

import pytest
import torch
from grids import covering
from places import DEVICE
from recording import Operators, launches_of

from dpo_kernels import dispatch, linear_sequence_logps, logps
from dpo_kernels.impl.interface import STATS, LogitTransform
from dpo_kernels.impl.reference import eager_logits, eager_stats, eager_token_logps
from dpo_kernels.testing import assert_within_budget, head_inputs

BF16 = torch.bfloat16
ALL = {"softcap": 5.0, "logit_scale": -0.7, "temperature": 1.3}


@pytest.fixture
def kernels(gpu_impl):
    return dispatch.load(gpu_impl)


@pytest.fixture
def taken(kernels, monkeypatch):
    """Whether each call was computed this way."""
    calls, of = [], kernels.linear_token_logps

    def linear_token_logps(*args, **options):
        found = of(*args, **options)
        calls.append(found is not None)
        return found

    monkeypatch.setattr(kernels, "linear_token_logps", linear_token_logps)
    return calls


@pytest.fixture
def both(gpu_impl, kernels, monkeypatch):
    """A function: this way, and that of rows that PyTorch finds and compacts."""

    def both(*args, **options):
        with torch.no_grad():
            ours = linear_sequence_logps(*args, impl=gpu_impl, **options)
            with monkeypatch.context() as without:
                without.setattr(kernels, "linear_token_logps", lambda *args, **options: None)
                without.setattr(kernels, "find_rows", lambda *args, **options: None)
                theirs = linear_sequence_logps(*args, impl=gpu_impl, **options)
        return ours, theirs

    return both


def assert_equal(ours, theirs):
    """To the bit: the same sums in the same order."""
    for name in ("logps", "num_tokens", "token_logps", *theirs.stats):
        mine, other = (getattr(out, name, out.stats.get(name)) for out in (ours, theirs))
        assert mine.dtype == other.dtype and torch.equal(mine, other), name


# [S, T, H, V] and the share that is labelled: blocks of positions and rows that nothing divides; one position; one row;
# rows that end with a block of 16; more splits than the join has at a time
SHAPES = {
    "tails": (5, 23, 48, 123, 0.6),
    "one position": (1, 1, 16, 32, 1.0),
    "one row": (2, 5, 16, 32, 0.1),
    "whole blocks": (4, 8, 64, 256, 1.0),
    "splits": (3, 4, 32, 1024, 0.6),
}


@pytest.mark.parametrize(
    ("shape", "transform", "stats", "dtype"),
    covering(list(SHAPES), [{}, ALL], [(), STATS, ("is_top1",)], [BF16, torch.float16]),
)
def test_against_fp64(both, gpu_impl, monkeypatch, taken, shape, transform, stats, dtype):
    *sizes, labelled = SHAPES[shape]
    inputs = head_inputs(*sizes, labelled=labelled, confident=0.3).to(dtype)
    if shape == "one row":
        inputs.labels.fill_(-100)[1, 2] = 7
    bias = inputs.bias if transform else None
    ours, theirs = both(*inputs[:3], bias=bias, stats=stats, **transform)
    assert taken == [True]
    assert_equal(ours, theirs)
    with torch.no_grad():
        eager = eager_token_logps(eager_logits(inputs.hidden, inputs.weight, bias=bias, **transform), inputs.labels)
        exact = inputs.to(torch.float64)
        logits = eager_logits(exact.hidden, exact.weight, bias=exact.bias if transform else None, **transform)
    best = eager_token_logps(logits, exact.labels)
    assert_within_budget(ours.token_logps, eager, best, "token_logps")
    torch.testing.assert_close(ours.logps.double(), best.sum(1), rtol=1e-6, atol=1e-5)
    assert torch.equal(ours.num_tokens, (inputs.labels >= 0).sum(1))
    expected = eager_stats(logits, exact.labels)
    for name in stats:
        mine, best = ours.stats[name].double(), expected[name].double()
        torch.testing.assert_close(mine, best, rtol=1e-5, atol=1e-5, msg=lambda text, at=name: f"{at}: {text}")


def lying(hidden, how):
    """The same hidden states [S, T, H] in other places."""
    s, t, h = hidden.shape
    if how == "transposed":
        return hidden.transpose(0, 1).contiguous().transpose(0, 1)
    wide = torch.zeros(s, t + 3, h + 32, dtype=hidden.dtype)
    wide[:, 2:-1, 16:-16] = hidden
    return wide[:, 2:-1, 16:-16]


@pytest.mark.parametrize("how", ["transposed", "part of more"])
def test_hidden_states_are_read_where_they_lie(both, gpu_impl, monkeypatch, taken, how):
    inputs = head_inputs(5, 7, 32, 67).to(BF16)
    hidden = lying(inputs.hidden.detach(), how)
    assert not hidden.is_contiguous() and torch.equal(hidden, inputs.hidden)
    monkeypatch.setattr(logps, "rows_of", None)
    with torch.no_grad():
        found = [linear_sequence_logps(x, *inputs[1:3], impl=gpu_impl) for x in (hidden, inputs.hidden)]
    assert taken == [True, True]
    assert_equal(*found)


@pytest.mark.parametrize(("shift", "reduction", "weighted"), covering([False, True], ["sum", "mean"], [False, True]))
def test_shift_weights_and_mean(both, gpu_impl, monkeypatch, taken, shift, reduction, weighted):
    """Also of labels of fewer bits, and where the label that counts for nothing is an entry."""
    inputs = head_inputs(3, 13, 32, 67).to(BF16)
    labels = inputs.labels.masked_fill(inputs.labels < 0, 7).int()
    weights = torch.linspace(-1, 2, labels.numel()).view(labels.shape) if weighted else None
    options = {"shift": shift, "reduction": reduction, "token_weights": weights, "stats": ("entropy",)}
    ours, theirs = both(*inputs[:2], labels, ignore_index=7, **options)
    assert taken == [True]
    assert_equal(ours, theirs)


@pytest.mark.parametrize("shift", [False, True])
def test_labels_that_cannot_hold_the_ignored_one(both, gpu_impl, monkeypatch, taken, shift):
    """-100 is 156 as a uint8: what is behind the last position is no row."""
    inputs = head_inputs(3, 13, 32, 300, labelled=1.0).to(BF16)
    labels = inputs.labels.clamp(max=255).to(torch.uint8)
    ours, theirs = both(*inputs[:2], labels, shift=shift, num_labelled=3 * (13 - shift))
    assert taken == [True] and ours.num_tokens.tolist() == 3 * [13 - shift]
    assert_equal(ours, theirs)


def test_a_bias_with_a_negative_bit(both, gpu_impl, monkeypatch, taken):
    inputs = head_inputs(3, 13, 32, 67).to(BF16)
    of_bits, plain = (both(*inputs[:3], bias=bias)[0] for bias in (torch._neg_view(inputs.bias.detach()), -inputs.bias))
    assert taken == [True, True]
    assert_equal(of_bits, plain)


@pytest.mark.parametrize("known", [False, True])
def test_predictors(both, gpu_impl, monkeypatch, taken, known):
    """Places that several labels share, and such as are none where there is no label."""
    inputs = head_inputs(4, 5, 32, 67).to(BF16)
    labels = inputs.labels
    draw = torch.Generator(labels.device).manual_seed(3)
    predictors = torch.randint(2 * 7, labels.shape, generator=draw).masked_fill(labels < 0, 99)
    hidden = head_inputs(2, 7, 32, 67, seed=5).to(BF16).hidden.detach()
    num_labelled = int((labels >= 0).sum()) if known else None
    options = {"predictors": predictors, "num_labelled": num_labelled, "stats": STATS}
    for x in (hidden, lying(hidden, "transposed")):
        assert_equal(*both(x, inputs.weight, labels, **options))
    assert taken == [True, True]
    picked = hidden.flatten(0, 1)[predictors.masked_fill(labels < 0, 0)]
    with torch.no_grad():
        copied = linear_sequence_logps(picked, inputs.weight, labels, impl=gpu_impl)
        assert torch.equal(
            copied.logps, linear_sequence_logps(hidden, inputs.weight, labels, impl=gpu_impl, **options).logps
        )


@pytest.mark.parametrize("shape", [(3, 5), (0, 5), (3, 0)])
@pytest.mark.parametrize("shift", [False, True])
def test_nothing_labelled(gpu_impl, monkeypatch, shape, shift):
    monkeypatch.setattr(torch, "empty_like", None)
    weight, labels = torch.randn(67, 32).to(BF16), torch.full(shape, -100)
    hidden = torch.full((*shape, 32), float("nan"), dtype=BF16)  # which nobody looks at
    for num_labelled in (None, 0):
        found = linear_sequence_logps(
            hidden, weight, labels, stats=STATS, shift=shift, reduction="mean", num_labelled=num_labelled, impl=gpu_impl
        )
        assert found.token_logps.shape == shape and (found.token_logps == 0).all()
        assert (found.logps == 0).all() and (found.num_tokens == 0).all() and found.logps.shape == shape[:1]
        assert all(value.shape == shape and (value == 0).all() for value in found.stats.values())


@pytest.mark.parametrize("wrong", [67, 2**40, -1])
@pytest.mark.parametrize(("s", "t", "shift"), [(0, 0, False), (2, 12, False), (1, 5, True)])
def test_a_label_that_is_no_entry(gpu_impl, wrong, s, t, shift):
    inputs = head_inputs(3, 13, 32, 67).to(BF16)
    inputs.labels[s, t] = wrong
    with torch.no_grad(), pytest.raises(ValueError, match=f"got {wrong} for sequence {s}, position {t - shift} "):
        linear_sequence_logps(*inputs[:3], shift=shift, impl=gpu_impl)


@pytest.mark.parametrize("wrong", [-1, 22])
def test_a_predictor_that_is_no_place(gpu_impl, wrong):
    inputs = head_inputs(4, 9, 48, 123, labelled=1.0).to(BF16)
    predictors = torch.arange(36).view(4, 9) % 22
    predictors[3, 8] = wrong
    with torch.no_grad(), pytest.raises(ValueError, match=f"0 to 21, got {wrong} for sequence 3, position 8"):
        linear_sequence_logps(
            inputs.hidden.flatten(0, 1)[:22].view(2, 11, 48), *inputs[1:3], predictors=predictors, impl=gpu_impl
        )


@pytest.mark.parametrize("off", [-1, 1])
@pytest.mark.skipif(DEVICE != "cpu", reason="there it is an assertion, which ends the process's use of the device")
def test_a_wrong_number_of_labels(gpu_impl, off):
    inputs = head_inputs(3, 13, 32, 67).to(BF16)
    count = int((inputs.labels >= 0).sum())
    with torch.no_grad(), pytest.raises(ValueError, match=f"num_labelled: expected {count}, .* got {count + off}"):
        linear_sequence_logps(*inputs[:3], num_labelled=count + off, impl=gpu_impl)


@pytest.mark.parametrize(
    ("value", "softcap", "shift"),  # a softcap makes finite logits of infinite ones
    covering([float("nan"), float("inf"), -float("inf")], [None, 5.0], [False, True]),
)
def test_hidden_states_that_are_not_finite(gpu_impl, taken, value, softcap, shift):
    inputs = head_inputs(3, 13, 32, 67, labelled=1.0).to(BF16)
    hidden = inputs.hidden.detach()
    hidden[1, 9, 5] = value
    hidden[2, 12] = value if shift else 0.0  # no label for the last one
    options = {"softcap": softcap, "shift": shift, "impl": gpu_impl}
    with torch.no_grad():
        with pytest.raises(ValueError, match=r"hidden: .* for sequence 1, position 9 \(1 such"):
            linear_sequence_logps(hidden, *inputs[1:3], **options)
        found = linear_sequence_logps(hidden, *inputs[1:3], check_hidden=False, **options)
    assert taken == [True, True]
    others = torch.arange(13) != 9
    assert found.token_logps[1, others].isfinite().all() and found.token_logps[0].isfinite().all()


def test_an_impossible_label_is_no_error(gpu_impl, taken):
    """Its own logit is not finite, and hidden states are."""
    inputs = head_inputs(2, 9, 48, 123, labelled=1.0).to(BF16)
    bias = inputs.bias.detach()
    bias[inputs.labels[1, 3]] = -torch.inf
    with torch.no_grad():
        found = linear_sequence_logps(*inputs[:3], bias=bias, stats=("is_top1",), impl=gpu_impl)
    assert taken == [True] and found.token_logps[1, 3] == -torch.inf and not found.stats["is_top1"][1, 3]
    assert found.token_logps[inputs.labels != inputs.labels[1, 3]].isfinite().all()


def test_logits_of_any_size(gpu_impl, taken):
    """The maximum is rounded where exponentials are taken relative to it, and nothing is lost by that."""
    inputs = head_inputs(4, 20, 64, 300, labelled=1.0, logit_std=60.0).to(torch.float16)
    with torch.no_grad():
        found = linear_sequence_logps(*inputs[:3], stats=("entropy",), impl=gpu_impl)
        exact = inputs.to(torch.float64)
        logits = eager_logits(exact.hidden, exact.weight)
    best = eager_token_logps(logits, exact.labels)
    assert taken == [True] and logits.abs().max() > 200
    # what fp32 sums of products of this size are off by, and no more
    assert ((found.token_logps - best).abs() < 2**-22 * logits.abs().amax(-1)).all()


def test_hidden_states_that_lie_anyhow(gpu_impl, taken):
    """Rows that begin at no multiple of 16 bytes, and a negative bit: copied by CUDA's kernel, or by Triton's before
    another way is gone."""
    inputs, hidden = head_inputs(2, 9, 32, 123).to(BF16), None
    odd = torch.zeros(2, 9, 37, dtype=BF16)
    odd[..., 3:35] = inputs.hidden.detach()
    apart = torch.zeros(2, 9, 32, 2, dtype=BF16)
    apart[..., 0] = inputs.hidden.detach()
    with torch.no_grad():
        expected = linear_sequence_logps(*inputs[:3], impl=gpu_impl)
        for hidden in (odd[..., 3:35], apart[..., 0], torch._neg_view(-inputs.hidden.detach())):
            found = linear_sequence_logps(hidden, *inputs[1:3], impl=gpu_impl)
            assert torch.equal(found.token_logps, expected.token_logps)
    assert taken == [True, *[gpu_impl == "cuda"] * 3]


def test_what_goes_the_other_way(gpu_impl, taken):
    inputs = head_inputs(2, 9, 32, 123).to(BF16)
    weights = torch.ones(2, 9, requires_grad=True)
    with torch.no_grad():
        expected = linear_sequence_logps(*inputs[:3], impl=gpu_impl)
        assert taken == [True]
        wide = torch.nn.functional.pad(inputs.weight.detach(), (0, 1))[:, :32]  # rows at no multiple of 16 bytes
        found = linear_sequence_logps(inputs.hidden, wide, inputs.labels, impl=gpu_impl)
        assert taken == [True, False]
        torch.testing.assert_close(found.token_logps, expected.token_logps, rtol=0, atol=2e-6)
    frozen = [inputs.hidden.detach(), inputs.weight.detach(), inputs.labels]
    found = linear_sequence_logps(*frozen, token_weights=weights, impl=gpu_impl)
    (dweights,) = torch.autograd.grad(found.logps.sum(), weights)
    assert len(taken) == 2 and torch.equal(dweights, expected.token_logps)
    for leaf in (0, 1):
        leaves = [t.clone().requires_grad_() if i == leaf else t for i, t in enumerate(frozen)]
        assert linear_sequence_logps(*leaves, impl=gpu_impl).logps.requires_grad
    assert len(taken) == 2


@pytest.mark.parametrize("how", ["a part of more", "with a negative bit"])
def test_weights_that_lie_anyhow(gpu_impl, how):
    """Rows of the weight begin where wide copies do, and those of a dense copy of 20 numbers do not; what is subtracted
    is not what lies in memory."""
    inputs, generator = head_inputs(4, 9, 20, 67).to(BF16), torch.Generator().manual_seed(1)
    wide = torch.randn(67, 24, generator=generator).to(BF16)
    weight = wide[:, :20] if how == "a part of more" else torch._neg_view(-wide[:, :20].contiguous())
    for trained in (False, True):
        hidden, of_weight = inputs.hidden.detach().requires_grad_(trained), weight.detach().requires_grad_(trained)
        found = linear_sequence_logps(hidden, of_weight, inputs.labels, impl=gpu_impl)
        expected = linear_sequence_logps(hidden, of_weight, inputs.labels, impl="torch")
        torch.testing.assert_close(found.token_logps, expected.token_logps, rtol=1e-5, atol=1e-5)
        if trained:
            mine, other = (torch.autograd.grad(out.logps.sum(), (hidden, of_weight)) for out in (found, expected))
            torch.testing.assert_close(mine, other, rtol=2e-2, atol=2e-2)


def test_the_same_bits_again(gpu_impl, taken):
    inputs = head_inputs(3, 13, 32, 150).to(BF16)
    with torch.no_grad():
        found = [linear_sequence_logps(*inputs[:3], stats=STATS, impl=gpu_impl) for _ in range(2)]
    assert taken == [True, True]
    assert_equal(*found)


ASKED = [{}, {"shift": True}, {"weights": True, "reduction": "mean"}, {"stats": True, **ALL}, {"predictors": True}]


@pytest.mark.parametrize(("known", "options"), covering([False, True], ASKED))
def test_what_a_call_launches(gpu_impl, monkeypatch, known, options):
    """Four kernels, five where hidden states are copied; and the copy to the host of whether these were finite. Nothing
    larger than such a copy comes to be."""
    inputs, options = head_inputs(4, 20, 64, 40).to(BF16), dict(options)
    labels, launches = inputs.labels, launches_of(monkeypatch, gpu_impl)
    if options.pop("stats", False):
        options["stats"] = ("entropy", "mean_logit", "log_sum_sq_probs")
    if options.pop("weights", False):
        options["token_weights"] = torch.rand(labels.shape)
        monkeypatch.setattr(logps, "is_at_hand", lambda t: False)
    if options.pop("predictors", False):
        options["predictors"] = torch.arange(labels.numel()).view(labels.shape)
    if known:
        options["num_labelled"] = int((labels[:, int(options.get("shift", False)) :] >= 0).sum())
    monkeypatch.setattr(logps, "check_head_is_finite", lambda *_: None)  # looks at nothing but a CPU's
    with torch.no_grad(), Operators(launches) as operators:
        found = linear_sequence_logps(*inputs[:3], impl=gpu_impl, **options)
    kernels = {
        "triton": ("rows_kernel", "linear_fold_fwd_kernel", "join_kernel", "sum_tokens_fwd_kernel"),
        "cuda": ("find_rows", "gather_rows", "linear_fold", "join", "sum_tokens"),
    }[gpu_impl]
    assert all(launches.pop(name) == 1 for name in kernels)
    assert launches.total() <= 1, launches
    copied = int(found.num_tokens.sum()) * 64 * 2  # hidden states, which Triton's reads where they lie
    assert operators.largest < copied + (gpu_impl == "cuda")
    assert (found.logps != 0).all()


def test_a_fold_that_is_finished_at_once(gpu_impl, kernels, monkeypatch):
    """Of rows that are compacted already, as the forward of path D has them: two launches beside those of a new fold;
    and what the backward needs of them, norm, is near enough the largest logit."""
    inputs, launches = head_inputs(4, 9, 48, 300, labelled=1.0).to(BF16), launches_of(monkeypatch, gpu_impl)
    x, y = inputs.hidden.detach().flatten(0, 1), inputs.labels.flatten()
    fold = kernels.new_fold(y, torch.float32, ())
    with Operators(launches):
        assert kernels.linear_fold_(fold, x, inputs.weight.detach(), None, LogitTransform(), BF16)
        logp, norm, _ = fold.finish(300, torch.float32)
    assert launches.total() == 2, launches
    logits = eager_logits(x.double(), inputs.weight.detach().double())
    torch.testing.assert_close(norm[0].double(), logits.amax(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(norm[0] + norm[1].double().log(), logits.logsumexp(1), rtol=0, atol=2e-5)
    assert torch.equal(logp, linear_sequence_logps(
        x[None], inputs.weight.detach(), y[None], impl=gpu_impl
    ).token_logps[0])  # fmt: skip
