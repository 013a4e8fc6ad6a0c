"""Hidden states that lie otherwise than their labels, against copies of them that lie as these do."""

import pytest
import torch

from dpo_kernels import linear_dpo_loss, linear_sequence_logps
from dpo_kernels.linear_reference import linear_reference_logps
from dpo_kernels.rows import GatherRows, LabelledRows

S, L, R, U, H, V = 4, 5, 2, 7, 12, 31


def inputs(dtype=torch.float64):
    """Both responses of a prompt begin with what its last hidden state predicts, so that places come twice."""
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(R, U, H, generator=draw, dtype=dtype).requires_grad_()
    weight = torch.randn(V, H, generator=draw, dtype=dtype).requires_grad_()
    labels = torch.randint(V, (S, L), generator=draw)
    labels[0, 3:] = labels[2, 1] = -100
    predictors = torch.tensor([[2, 3, 4, 99, -7], [9, 10, 11, 12, 13], [2, 5, 6, 0, 1], [9, 8, 7, 4, 0]])
    return hidden, weight, labels, predictors


def copied(hidden, labels, predictors):
    return hidden.flatten(0, 1)[predictors.masked_fill(labels == -100, 0)]


CALLS = {
    "logps, frozen head": lambda x, w, y, **more: linear_sequence_logps(x, w.detach(), y, **more).logps.sum(),
    "logps": lambda x, w, y, **more: linear_sequence_logps(x, w, y, **more).logps.sum(),
    "loss": lambda x, w, y, **more: linear_dpo_loss(x, w, y, torch.full((S,), -15.0), **more).loss,
    "loss, two parts": lambda x, w, y, **more: (
        linear_dpo_loss(x, w, y, torch.full((S,), -15.0), chunk_bytes=10 * V * 8, **more).loss
    ),
    "loss, four products": lambda x, w, y, **more: (
        linear_dpo_loss(x, w, y, torch.full((S,), -15.0), chunk_bytes=0, **more).loss
    ),
    "pairs": lambda x, w, y, **more: (
        linear_dpo_loss(x, w, y, torch.full((S,), -15.0), pairs=[(0, 2), (0, 1), (3, 1)], **more).loss
    ),
}


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_as_if_copied(call, known):
    hidden, weight, labels, predictors = inputs()
    more = {"num_labelled": int((labels != -100).sum())} if known else {}
    expected = call(copied(hidden, labels, predictors), weight, labels, **more)
    expected.backward()
    gradients = [t.grad for t in (hidden, weight)]
    hidden.grad = weight.grad = None
    found = call(hidden, weight, labels, predictors=predictors, **more)
    found.backward()
    assert torch.equal(found, expected)
    for ours, theirs in zip((hidden.grad, weight.grad), gradients, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("gradients", [("hidden", "weight"), ("hidden",), ()])
def test_a_reference_is_summed_as_the_policy(gradients):
    hidden, weight, labels, predictors = inputs(torch.float32)
    hidden, weight = (t.detach().requires_grad_(n in gradients) for t, n in ((hidden, "hidden"), (weight, "weight")))
    more = {"predictors": predictors, "gradients": gradients}
    reference = linear_reference_logps(hidden.detach(), weight.detach(), labels, **more).logps
    out = linear_dpo_loss(hidden, weight, labels, reference, predictors=predictors)
    assert out.chosen_rewards.eq(0).all() and out.rejected_rewards.eq(0).all()


def test_only_labelled_rows_are_copied(monkeypatch):
    """A sequence much longer than the others makes no copy of theirs as long."""
    seen = []
    copy = LabelledRows.copy
    monkeypatch.setattr(LabelledRows, "copy", lambda *args: seen.append(copy(*args)) or seen[-1])
    hidden, weight, labels, predictors = inputs()
    linear_dpo_loss(hidden, weight, labels, torch.zeros(S), predictors=predictors)
    assert [rows.shape for rows in seen] == [(int((labels != -100).sum()), H)]


def test_compiled():
    hidden, weight, labels, predictors = inputs(torch.float32)
    call = torch.compile(linear_sequence_logps, backend="aot_eager", fullgraph=True)
    out = call(hidden, weight, labels, predictors=predictors)
    torch.testing.assert_close(out.logps, linear_sequence_logps(hidden, weight, labels, predictors=predictors).logps)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.int(), "predictors: expected int64, got torch.int32"),
        (lambda p: p[:, :3], r"predictors: expected shape \[4, 5\], got \[4, 3\]"),
        (lambda p: p.tolist(), "predictors: expected a tensor or None, got list"),
        (lambda p: p + 5, "predictors: expected places of hidden states, 0 to 13, got 14 for sequence 1, position 0"),
        (lambda p: p - 8, "predictors: expected places of hidden states, 0 to 13, got -6 for sequence 0, position 0"),
    ],
)
@pytest.mark.parametrize("function", [linear_sequence_logps, linear_dpo_loss, linear_reference_logps])
def test_what_are_no_places(function, change, message):
    hidden, weight, labels, predictors = inputs()
    more = {"gradients": ()} if function is linear_reference_logps else {}
    given = (hidden, weight, labels, torch.zeros(S)) if function is linear_dpo_loss else (hidden, weight, labels)
    with pytest.raises(ValueError, match=message):
        function(*given, predictors=change(predictors), **more)
    with pytest.raises(ValueError, match="shift: expected False beside predictors"):
        function(*given, predictors=predictors, shift=True, **more)


def of_slots(hidden, slots):
    return GatherRows.apply(hidden, slots, slots, slots, lambda t: t.flatten(0, 1)[slots])


def test_one_slot_for_many_labels_has_the_sum_of_their_gradients():
    hidden = torch.randn(1, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: of_slots(x, torch.tensor([1, 1, 2, 1])), hidden)


def test_slots_that_nothing_took_have_no_gradient(monkeypatch):
    """Also where memory held something before."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    hidden = torch.randn(1, 3, 2, requires_grad=True)
    torch.use_deterministic_algorithms(True)
    try:
        of_slots(hidden, torch.tensor([1, 1])).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert hidden.grad.tolist() == [[[0, 0], [2, 2], [0, 0]]]
