"""Labelled rows that a kernel finds, on Triton and on CUDA: which are found, what is wrong with them, what is launched,
and path A of all positions against fp64 and against rows that were compacted before. Without a GPU Triton interprets
its kernels, and CUDA's run through the emulation in tests/impl/cuda."""

import importlib

import pytest
import torch
from grids import covering
from places import DEVICE
from recording import Operators, launches_of

from dpo_kernels import dispatch, linear_dpo_loss, linear_sequence_logps, logps, sequence_logps
from dpo_kernels.impl import positions
from dpo_kernels.impl.interface import STATS, LogitTransform
from dpo_kernels.impl.reference import eager_logits, eager_stats, eager_token_logps
from dpo_kernels.linear_reference import linear_reference_logps
from dpo_kernels.testing import assert_within_budget, head_inputs

BF16 = torch.bfloat16
ALL = {"softcap": 5.0, "logit_scale": -0.7, "temperature": 1.3}


@pytest.fixture(params=["triton", "cuda"])
def impl(request, monkeypatch):
    """The name of one that finds rows; in blocks that an interpreter can do, without one in the blocks that ship."""
    if request.param == "cuda" and DEVICE == "cpu":
        request.getfixturevalue("emulated_cuda")
    if reason := dispatch.unavailable_reason(request.param, torch.get_default_device()):
        pytest.skip(reason)
    if not dispatch.load(request.param).has_fused_forward(torch.get_default_device()):
        pytest.skip("the fused forward is Hopper's")
    if request.param == "triton":
        monkeypatch.setitem(dispatch.FORWARD_OF, "triton", "triton_fused")
        if DEVICE == "cpu":
            linear = importlib.import_module("dpo_kernels.impl.triton_linear")
            monkeypatch.setattr(linear, "BLOCK_N", 16)
            monkeypatch.setattr(linear, "BLOCK_H", 32)
            monkeypatch.setattr(linear, "block_v", lambda stats, softcap, hopper: 32)
            monkeypatch.setattr(linear, "JOIN_SPLITS", 2)
            monkeypatch.setattr(importlib.import_module("dpo_kernels.impl.triton_rows"), "BLOCK_P", 16)
    return request.param


@pytest.fixture
def kernels(impl):
    return dispatch.load(impl)


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
def both(impl, kernels, monkeypatch):
    """A function: this way, and that of rows that PyTorch finds and compacts."""

    def both(*args, **options):
        with torch.no_grad():
            ours = linear_sequence_logps(*args, impl=impl, **options)
            with monkeypatch.context() as without:
                without.setattr(kernels, "linear_token_logps", lambda *args, **options: None)
                without.setattr(kernels, "find_rows", lambda *args, **options: None)
                theirs = linear_sequence_logps(*args, impl=impl, **options)
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
def test_against_fp64(both, impl, monkeypatch, taken, shape, transform, stats, dtype):
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
def test_hidden_states_are_read_where_they_lie(both, impl, monkeypatch, taken, how):
    inputs = head_inputs(5, 7, 32, 67).to(BF16)
    hidden = lying(inputs.hidden.detach(), how)
    assert not hidden.is_contiguous() and torch.equal(hidden, inputs.hidden)
    monkeypatch.setattr(logps, "rows_of", None)
    with torch.no_grad():
        found = [linear_sequence_logps(x, *inputs[1:3], impl=impl) for x in (hidden, inputs.hidden)]
    assert taken == [True, True]
    assert_equal(*found)


@pytest.mark.parametrize(("shift", "reduction", "weighted"), covering([False, True], ["sum", "mean"], [False, True]))
def test_shift_weights_and_mean(both, impl, monkeypatch, taken, shift, reduction, weighted):
    """Also of labels of fewer bits, and where the label that counts for nothing is an entry."""
    inputs = head_inputs(3, 13, 32, 67).to(BF16)
    labels = inputs.labels.masked_fill(inputs.labels < 0, 7).int()
    weights = torch.linspace(-1, 2, labels.numel()).view(labels.shape) if weighted else None
    options = {"shift": shift, "reduction": reduction, "token_weights": weights, "stats": ("entropy",)}
    ours, theirs = both(*inputs[:2], labels, ignore_index=7, **options)
    assert taken == [True]
    assert_equal(ours, theirs)


@pytest.mark.parametrize("shift", [False, True])
def test_labels_that_cannot_hold_the_ignored_one(both, impl, monkeypatch, taken, shift):
    """-100 is 156 as a uint8: what is behind the last position is no row."""
    inputs = head_inputs(3, 13, 32, 300, labelled=1.0).to(BF16)
    labels = inputs.labels.clamp(max=255).to(torch.uint8)
    ours, theirs = both(*inputs[:2], labels, shift=shift, num_labelled=3 * (13 - shift))
    assert taken == [True] and ours.num_tokens.tolist() == 3 * [13 - shift]
    assert_equal(ours, theirs)


def test_a_bias_with_a_negative_bit(both, impl, monkeypatch, taken):
    inputs = head_inputs(3, 13, 32, 67).to(BF16)
    of_bits, plain = (both(*inputs[:3], bias=bias)[0] for bias in (torch._neg_view(inputs.bias.detach()), -inputs.bias))
    assert taken == [True, True]
    assert_equal(of_bits, plain)


@pytest.mark.parametrize("known", [False, True])
def test_predictors(both, impl, monkeypatch, taken, known):
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
        copied = linear_sequence_logps(picked, inputs.weight, labels, impl=impl)
        assert torch.equal(
            copied.logps, linear_sequence_logps(hidden, inputs.weight, labels, impl=impl, **options).logps
        )


@pytest.mark.parametrize("shape", [(3, 5), (0, 5), (3, 0)])
@pytest.mark.parametrize("shift", [False, True])
def test_nothing_labelled(impl, monkeypatch, shape, shift):
    monkeypatch.setattr(torch, "empty_like", None)
    weight, labels = torch.randn(67, 32).to(BF16), torch.full(shape, -100)
    hidden = torch.full((*shape, 32), float("nan"), dtype=BF16)  # which nobody looks at
    for num_labelled in (None, 0):
        found = linear_sequence_logps(
            hidden, weight, labels, stats=STATS, shift=shift, reduction="mean", num_labelled=num_labelled, impl=impl
        )
        assert found.token_logps.shape == shape and (found.token_logps == 0).all()
        assert (found.logps == 0).all() and (found.num_tokens == 0).all() and found.logps.shape == shape[:1]
        assert all(value.shape == shape and (value == 0).all() for value in found.stats.values())


@pytest.mark.parametrize("wrong", [67, 2**40, -1])
@pytest.mark.parametrize(("s", "t", "shift"), [(0, 0, False), (2, 12, False), (1, 5, True)])
def test_a_label_that_is_no_entry(impl, wrong, s, t, shift):
    inputs = head_inputs(3, 13, 32, 67).to(BF16)
    inputs.labels[s, t] = wrong
    with torch.no_grad(), pytest.raises(ValueError, match=f"got {wrong} for sequence {s}, position {t - shift} "):
        linear_sequence_logps(*inputs[:3], shift=shift, impl=impl)


@pytest.mark.parametrize("wrong", [-1, 22])
def test_a_predictor_that_is_no_place(impl, wrong):
    inputs = head_inputs(4, 9, 48, 123, labelled=1.0).to(BF16)
    predictors = torch.arange(36).view(4, 9) % 22
    predictors[3, 8] = wrong
    with torch.no_grad(), pytest.raises(ValueError, match=f"0 to 21, got {wrong} for sequence 3, position 8"):
        linear_sequence_logps(
            inputs.hidden.flatten(0, 1)[:22].view(2, 11, 48), *inputs[1:3], predictors=predictors, impl=impl
        )


@pytest.mark.parametrize("off", [-1, 1])
@pytest.mark.skipif(DEVICE != "cpu", reason="there it is an assertion, which ends the process's use of the device")
def test_a_wrong_number_of_labels(impl, off):
    inputs = head_inputs(3, 13, 32, 67).to(BF16)
    count = int((inputs.labels >= 0).sum())
    with torch.no_grad(), pytest.raises(ValueError, match=f"num_labelled: expected {count}, .* got {count + off}"):
        linear_sequence_logps(*inputs[:3], num_labelled=count + off, impl=impl)


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("function", ["logps", "logits", "loss", "reference"])
def test_more_labels_than_positions(function, shift):
    """What the host knows by itself it does not leave to an assertion."""
    inputs = head_inputs(4, 13, 32, 67)
    operands = inputs.hidden, inputs.weight, inputs.labels
    call = {
        "logps": lambda n: linear_sequence_logps(*operands, shift=shift, num_labelled=n),
        "logits": lambda n: sequence_logps(inputs.hidden, inputs.labels % 32, shift=shift, num_labelled=n),
        "loss": lambda n: linear_dpo_loss(*operands, torch.zeros(4), shift=shift, num_labelled=n),
        "reference": lambda n: linear_reference_logps(*operands, gradients=(), shift=shift, num_labelled=n),
    }[function]
    most = 4 * (13 - shift)
    with pytest.raises(ValueError, match=f"num_labelled: expected at most {most}, .* got {most + 1}"):
        call(most + 1)


# What the kernels find


def found(kernels, labels, vocab=67, **options):
    of = {"ignore_index": -100, "shift": False, "num_labelled": None, "predictors": None, "slots": labels.numel()}
    return kernels.find_rows(labels, vocab, **{**of, "stats": 2, **options})


def assert_finds(kernels, labels, ignore_index=-100, shift=0, predictors=None, **options):
    """Fields in the order of positions, and zeros at the others."""
    s, t = labels.shape
    aligned = torch.full((s, t), ignore_index)
    aligned[:, : t - shift] = labels[:, shift:].long()
    is_row = aligned != ignore_index
    is_row[:, t - shift :] = False
    places = torch.nonzero(is_row.flatten())[:, 0]
    slots = places if predictors is None else predictors.flatten()[places]
    expected = [places // t, places % t, places, aligned.flatten()[places], slots]
    mine = found(kernels, labels, ignore_index=ignore_index, shift=bool(shift), predictors=predictors, **options)
    assert mine.table.dtype == torch.int64 and torch.equal(mine.table, torch.stack(expected))
    assert [*map(torch.equal, (*mine.rows, mine.places, mine.y, mine.slots), expected)] == [True] * 5
    for table in (mine.token_logps, *mine.stats):
        assert table.shape == labels.shape and table.dtype == torch.float32 and not table[~is_row].any()
    assert mine.broken.item() == 0


@pytest.fixture
def large(kernels, monkeypatch):
    """In blocks of positions as they ship."""
    if kernels.__name__.endswith("triton"):
        monkeypatch.setattr(importlib.import_module("dpo_kernels.impl.triton_rows"), "BLOCK_P", 4096)
    return kernels


def some_labels(s, t, dtype=torch.int64, share=0.5):
    draw = torch.Generator().manual_seed(s * t)
    labels = torch.randint(67, (s, t), generator=draw)
    return labels.masked_fill(torch.rand(s, t, generator=draw) > share, 7 if dtype == torch.uint8 else -100).to(dtype)


@pytest.fixture
def fills_memory(monkeypatch):
    """New memory holds numbers that are wrong wherever they are not overwritten."""
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **more: new_empty(*args, **more).fill_(77))


@pytest.mark.parametrize(
    ("dtype", "shift", "known"),
    covering([torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8], [0, 1], [False, True]),
)
def test_labels_of_any_integers_that_lie_anyhow(kernels, fills_memory, dtype, shift, known):
    labels = some_labels(5, 23, dtype)
    ignored = 7 if dtype == torch.uint8 else -100
    wide = torch.full((5, 50), 3, dtype=dtype)
    wide[:, 2:48:2] = labels
    for lying in (
        labels,
        labels.T.contiguous().T,
        wide[:, 2:48:2],
        labels[:1].expand(4, 23),
        labels[:, :1].expand(5, 9),
    ):
        count = int((lying[:, shift:] != ignored).sum())
        assert_finds(kernels, lying, ignored, shift, num_labelled=count if known else None)


# fewer than a block has, what fills blocks, one more; more blocks than there may be
SIZES = [(1, 1), (1, 3), (700, 1), (3, 1023), (2, 1024), (41, 100), (5, 2049), (3, 22000)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_rows_of_many_blocks(large, fills_memory, size, share):
    assert_finds(large, some_labels(*size, share=share))


@pytest.mark.parametrize("at", [(0, 0), (0, 2048), (2, 700), (2, 2048)])
@pytest.mark.parametrize("what", ["label", "predictor", "count"])
def test_what_does_not_fit_in_any_block_is_found(large, at, what):
    labels, predictors = some_labels(3, 2049), torch.arange(3 * 2049).view(3, 2049).flip(1)
    labels[at] = 5
    count = int((labels >= 0).sum())
    assert found(large, labels, predictors=predictors, num_labelled=count) is not None
    for wrong in (67, -1) if what == "label" else (labels.numel(), -1) if what == "predictor" else (-1, 1):
        changed, predicted, known = labels.clone(), predictors.clone(), count
        if what == "label":
            changed[at] = wrong
        elif what == "predictor":
            predicted[at] = wrong
        else:
            known += wrong
        assert found(large, changed, predictors=predicted, num_labelled=known) is None


def test_predictors_of_ignored_labels_may_be_anything(kernels, fills_memory):
    labels = some_labels(4, 9)
    predictors = torch.randint(50, (9, 4)).T.masked_fill(labels < 0, 2**40)
    assert_finds(kernels, labels, predictors=predictors, slots=50)


def test_the_order_of_threads_changes_nothing_that_is_found(impl, large, monkeypatch):
    labels = some_labels(3, 2049)
    tables = []
    for seed in range(4 if impl == "cuda" else 2):
        monkeypatch.setenv("DPO_EMULATION_SEED", str(seed))
        tables.append(found(large, labels).table)
    assert all(torch.equal(table, tables[0]) for table in tables)


def test_what_no_kernel_counts(kernels):
    """Is left to PyTorch, which says what is wrong."""
    labels = some_labels(2, 3)
    assert found(kernels, labels[:0]) is None and found(kernels, labels[:, :0]) is None
    assert found(kernels, labels.to(torch.uint16)) is None
    assert found(kernels, labels, predictors=torch.zeros(2, 3, dtype=torch.int32)) is None
    assert found(kernels, labels, predictors=torch.zeros(2, 3, dtype=torch.int64), shift=True) is None
    assert found(kernels, torch.zeros(1, dtype=torch.int64).expand(2, positions.MOST_POSITIONS // 2)) is None


@pytest.mark.parametrize(
    ("dtype", "h"), covering([BF16, torch.float16, torch.float32, torch.float64], [1, 9, 64, 5000])
)
def test_rows_are_copied_from_anywhere(kernels, dtype, h):
    whole = torch.randn(3, 9, h + 5, 2).to(dtype)
    slots = torch.tensor([0, 14, 7, 7, 3])
    broken = torch.zeros((), dtype=torch.int64)
    views = [whole[:, :5, :h, 0].contiguous(), whole[:, :5, :h, 0], whole[..., 0].contiguous()[:, :5, 5:]]
    views += [whole[:, 4:, 5:, 1].transpose(0, 1).contiguous().transpose(0, 1), torch._neg_view(whole[:, :5, 5:, 1])]
    for hidden in views:
        assert hidden.shape == (3, 5, h)
        copied = kernels.gather_rows(hidden, slots, broken)
        assert copied.is_contiguous() and torch.equal(copied, hidden.flatten(0, 1)[slots])
    assert broken.item() == 0 and kernels.gather_rows(views[0], slots[:0], broken).shape == (0, h)
    for wrong in (torch.nan, torch.inf, -torch.inf):
        for place, expected in ((14, 1), (13, 0)):  # of a row that is taken, and of one that is not
            hidden = views[0].clone()
            hidden.view(15, h)[place, h // 2] = wrong
            broken = torch.zeros((), dtype=torch.int64)
            assert torch.equal(kernels.gather_rows(hidden, slots, broken).isfinite().all(), torch.tensor(not expected))
            assert broken.item() == expected


# Errors and launches of a call


@pytest.mark.parametrize(
    ("value", "softcap", "shift"),  # a softcap makes finite logits of infinite ones
    covering([float("nan"), float("inf"), -float("inf")], [None, 5.0], [False, True]),
)
def test_hidden_states_that_are_not_finite(impl, taken, value, softcap, shift):
    inputs = head_inputs(3, 13, 32, 67, labelled=1.0).to(BF16)
    hidden = inputs.hidden.detach()
    hidden[1, 9, 5] = value
    hidden[2, 12] = value if shift else 0.0  # no label for the last one
    options = {"softcap": softcap, "shift": shift, "impl": impl}
    with torch.no_grad():
        with pytest.raises(ValueError, match=r"hidden: .* for sequence 1, position 9 \(1 such"):
            linear_sequence_logps(hidden, *inputs[1:3], **options)
        found = linear_sequence_logps(hidden, *inputs[1:3], check_hidden=False, **options)
    assert taken == [True, True]
    others = torch.arange(13) != 9
    assert found.token_logps[1, others].isfinite().all() and found.token_logps[0].isfinite().all()


def test_an_impossible_label_is_no_error(impl, taken):
    """Its own logit is not finite, and hidden states are."""
    inputs = head_inputs(2, 9, 48, 123, labelled=1.0).to(BF16)
    bias = inputs.bias.detach()
    bias[inputs.labels[1, 3]] = -torch.inf
    with torch.no_grad():
        found = linear_sequence_logps(*inputs[:3], bias=bias, stats=("is_top1",), impl=impl)
    assert taken == [True] and found.token_logps[1, 3] == -torch.inf and not found.stats["is_top1"][1, 3]
    assert found.token_logps[inputs.labels != inputs.labels[1, 3]].isfinite().all()


def test_logits_of_any_size(impl, taken):
    """The maximum is rounded where exponentials are taken relative to it, and nothing is lost by that."""
    inputs = head_inputs(4, 20, 64, 300, labelled=1.0, logit_std=60.0).to(torch.float16)
    with torch.no_grad():
        found = linear_sequence_logps(*inputs[:3], stats=("entropy",), impl=impl)
        exact = inputs.to(torch.float64)
        logits = eager_logits(exact.hidden, exact.weight)
    best = eager_token_logps(logits, exact.labels)
    assert taken == [True] and logits.abs().max() > 200
    # what fp32 sums of products of this size are off by, and no more
    assert ((found.token_logps - best).abs() < 2**-22 * logits.abs().amax(-1)).all()


def test_hidden_states_that_lie_anyhow(impl, taken):
    """Rows that begin at no multiple of 16 bytes, and a negative bit: copied by CUDA's kernel, or by Triton's before
    another way is gone."""
    inputs, hidden = head_inputs(2, 9, 32, 123).to(BF16), None
    odd = torch.zeros(2, 9, 37, dtype=BF16)
    odd[..., 3:35] = inputs.hidden.detach()
    apart = torch.zeros(2, 9, 32, 2, dtype=BF16)
    apart[..., 0] = inputs.hidden.detach()
    with torch.no_grad():
        expected = linear_sequence_logps(*inputs[:3], impl=impl)
        for hidden in (odd[..., 3:35], apart[..., 0], torch._neg_view(-inputs.hidden.detach())):
            found = linear_sequence_logps(hidden, *inputs[1:3], impl=impl)
            assert torch.equal(found.token_logps, expected.token_logps)
    assert taken == [True, *[impl == "cuda"] * 3]


def test_what_goes_the_other_way(impl, taken):
    inputs = head_inputs(2, 9, 32, 123).to(BF16)
    weights = torch.ones(2, 9, requires_grad=True)
    with torch.no_grad():
        expected = linear_sequence_logps(*inputs[:3], impl=impl)
        assert taken == [True]
        wide = torch.nn.functional.pad(inputs.weight.detach(), (0, 1))[:, :32]  # rows at no multiple of 16 bytes
        found = linear_sequence_logps(inputs.hidden, wide, inputs.labels, impl=impl)
        assert taken == [True, False]
        torch.testing.assert_close(found.token_logps, expected.token_logps, rtol=0, atol=2e-6)
    frozen = [inputs.hidden.detach(), inputs.weight.detach(), inputs.labels]
    found = linear_sequence_logps(*frozen, token_weights=weights, impl=impl)
    (dweights,) = torch.autograd.grad(found.logps.sum(), weights)
    assert len(taken) == 2 and torch.equal(dweights, expected.token_logps)
    for leaf in (0, 1):
        leaves = [t.clone().requires_grad_() if i == leaf else t for i, t in enumerate(frozen)]
        assert linear_sequence_logps(*leaves, impl=impl).logps.requires_grad
    assert len(taken) == 2


def test_the_same_bits_again(impl, taken):
    inputs = head_inputs(3, 13, 32, 150).to(BF16)
    with torch.no_grad():
        found = [linear_sequence_logps(*inputs[:3], stats=STATS, impl=impl) for _ in range(2)]
    assert taken == [True, True]
    assert_equal(*found)


ASKED = [{}, {"shift": True}, {"weights": True, "reduction": "mean"}, {"stats": True, **ALL}, {"predictors": True}]


@pytest.mark.parametrize(("known", "options"), covering([False, True], ASKED))
def test_what_a_call_launches(impl, monkeypatch, known, options):
    """Four kernels, five where hidden states are copied; and an assertion, or the copy to the host of whether these
    were finite. Nothing larger than such a copy comes to be."""
    inputs, options = head_inputs(4, 20, 64, 40).to(BF16), dict(options)
    labels, launches = inputs.labels, launches_of(monkeypatch, impl)
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
        found = linear_sequence_logps(*inputs[:3], impl=impl, **options)
    kernels = {
        "triton": ("rows_kernel", "linear_fold_fwd_kernel", "linear_join_kernel", "sum_tokens_fwd_kernel"),
        "cuda": ("find_rows", "gather_rows", "linear_fold", "join", "sum_tokens"),
    }[impl]
    assert all(launches.pop(name) == 1 for name in kernels)
    assert launches.total() <= 1, launches
    assert operators.largest <= found.num_tokens.sum() * 64 * 2
    assert (found.logps != 0).all()


def test_a_fold_that_is_finished_at_once(impl, kernels, monkeypatch):
    """Of rows that are compacted already, as the forward of path D has them: two launches beside those of a new fold;
    and what the backward needs of them, norm, is near enough the largest logit."""
    inputs, launches = head_inputs(4, 9, 48, 300, labelled=1.0).to(BF16), launches_of(monkeypatch, impl)
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
        x[None], inputs.weight.detach(), y[None], impl=impl
    ).token_logps[0])  # fmt: skip
