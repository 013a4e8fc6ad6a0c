"""`pairs` of `linear_dpo_loss`, and the loss of whole rankings, against pairs and rankings written out one by one."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

import dpo_kernels
from dpo_kernels.comparisons import Groups, Halves, comparisons_of
from dpo_kernels.linear_dpo import linear_dpo_loss
from dpo_kernels.linear_reference import linear_reference_logps
from dpo_kernels.listwise import plackett_luce_loss

# Of 9 sequences: a ranking of three and all its pairs, a pair, the best of three against each, and a pair across: the
# groups are not one after the other, nor are their pairs, nor is the chosen first.
PAIRS = [(0, 2), (4, 3), (1, 8), (0, 5), (2, 5), (1, 6), (7, 6)]
GROUPS = [[0, 2, 5], [1, 6, 7, 8], [3, 4]]
S, T, H, V = 9, 6, 12, 31
HALVED = ["aot", "aot_unpaired"]
LOSSES = [name for name in dpo_kernels.losses.LOSSES if name != "plackett_luce"]


def inputs(dtype=torch.float64, seed=0):
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(S, T, H, generator=draw, dtype=dtype).requires_grad_()
    weight = torch.randn(V, H, generator=draw, dtype=dtype).requires_grad_()
    bias = torch.randn(V, generator=draw, dtype=dtype).requires_grad_()
    labels = torch.randint(V, (S, T), generator=draw)
    labels[torch.rand(S, T, generator=draw) < 0.3] = -100
    labels[:, 0] = 1
    ref_logps = torch.randn(S, generator=draw, dtype=torch.float64) - 15
    return hidden, weight, labels, ref_logps, bias


def options_of(name):
    return {"exo_pair": {"label_smoothing": 0.1}, "cdpo": {"label_smoothing": 0.2}}.get(name, {}) | {"loss_type": name}


def expanded(given, t):
    """Both sides of each pair, chosen first."""
    return torch.cat([t[[i for i, _ in given]], t[[j for _, j in given]]])


def assert_same(out, expected, of, gradients):
    for name in ("loss", "losses", "chosen_rewards", "rejected_rewards"):
        torch.testing.assert_close(getattr(out, name), getattr(expected, name), rtol=1e-10, atol=1e-12)
    for tensor, gradient in zip(of, gradients, strict=True):
        torch.testing.assert_close(tensor.grad, gradient, rtol=1e-9, atol=1e-12)


def backward(loss, of):
    for tensor in of:
        tensor.grad = None
    loss.backward()
    return [tensor.grad.clone() for tensor in of]


# None: every group in one part. What holds about two sequences' logits: several parts. 0: the path of four products
@pytest.mark.parametrize("chunk_bytes", [None, 30 * V * 8, 0])
@pytest.mark.parametrize("name", LOSSES)
def test_pairs_are_as_if_each_were_written_out(name, chunk_bytes):
    hidden, weight, labels, ref_logps, bias = inputs()
    of, options = (hidden, weight, bias), options_of(name)
    expected = linear_dpo_loss(
        expanded(PAIRS, hidden), weight, expanded(PAIRS, labels), expanded(PAIRS, ref_logps), bias=bias, **options
    )
    gradients = backward(expected.loss, of)
    out = linear_dpo_loss(hidden, weight, labels, ref_logps, bias=bias, pairs=PAIRS, chunk_bytes=chunk_bytes, **options)
    backward(out.loss, of)
    assert_same(out, expected, of, gradients)
    assert out.logps.shape == out.num_tokens.shape == (S,)


@pytest.mark.parametrize("chunk_bytes", [None, 30 * V * 8, 0])
@pytest.mark.parametrize(
    "more",
    [
        {"use_weighting": True},
        {"rpo_alpha": 0.7},
        {"f_divergence": "js"},
        {"loss_type": ("sigmoid", "sft", "ipo"), "loss_weights": (1.0, 0.5, 0.25)},
        {"weights": True},
        {"weights": True, "loss_type": "sft"},
        {"token_weights": True, "loss_type": "ipo", "lengths": True},
    ],
)
def test_options_with_pairs(more, chunk_bytes):
    hidden, weight, labels, ref_logps, bias = inputs(seed=1)
    more, of = dict(more), (hidden, weight, bias)
    both: dict = {}
    if more.pop("weights", False):
        both["pair_weights"] = torch.tensor([1.0, 0.0, 2.5, 0.5, 0.0, 3.0, 1.0], dtype=torch.float64)
    by_sequence = {}
    if more.pop("token_weights", False):
        by_sequence["token_weights"] = torch.rand(S, T, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    if more.pop("lengths", False):
        by_sequence["lengths"] = torch.arange(1.0, S + 1)
    written = {name: expanded(PAIRS, t) for name, t in by_sequence.items()}
    expected = linear_dpo_loss(
        expanded(PAIRS, hidden), weight, expanded(PAIRS, labels), expanded(PAIRS, ref_logps), bias=bias,
        **more, **both, **written,
    )  # fmt: skip
    gradients = backward(expected.loss, of)
    out = linear_dpo_loss(
        hidden, weight, labels, ref_logps, bias=bias, pairs=PAIRS, chunk_bytes=chunk_bytes,
        **more, **both, **by_sequence,
    )  # fmt: skip
    backward(out.loss, of)
    assert_same(out, expected, of, gradients)


def test_halves_written_as_pairs():
    hidden, weight, labels, ref_logps, bias = (t.detach() for t in inputs())
    hidden, labels, ref_logps, weight = hidden[:8], labels[:8], ref_logps[:8], weight.requires_grad_()
    expected = linear_dpo_loss(hidden, weight, labels, ref_logps, bias=bias)
    out = linear_dpo_loss(hidden, weight, labels, ref_logps, bias=bias, pairs=[(n, n + 4) for n in range(4)])
    torch.testing.assert_close(out.losses, expected.losses)
    for given in (torch.tensor, np.array):
        as_array = given([[n, n + 4] for n in range(4)])
        assert torch.equal(linear_dpo_loss(hidden, weight, labels, ref_logps, bias=bias, pairs=as_array).loss, out.loss)


def ranking_loss(scores, pairs, groups):
    """By the product of the paper's appendix, where pairs are all of a ranking."""
    found = []
    for group in groups:
        of_group = [pair for pair in pairs if pair[0] in group]
        total = torch.zeros((), dtype=scores.dtype)
        for best in dict.fromkeys(i for i, _ in of_group):
            beaten = [j for i, j in of_group if i == best]
            total = total - torch.log(scores[best].exp() / (scores[best].exp() + scores[beaten].exp().sum()))
        found.append(total)
    return torch.stack(found)


@pytest.mark.parametrize("chunk_bytes", [None, 30 * V * 8, 0])
@pytest.mark.parametrize("weights", [None, [1.0, 0.0, 2.5]])
def test_plackett_luce_straight_from_hidden_states(chunk_bytes, weights):
    hidden, weight, labels, ref_logps, bias = inputs(seed=2)
    of = hidden, weight, bias
    logps = dpo_kernels.linear_sequence_logps(hidden, weight, labels, bias=bias).logps
    losses = ranking_loss(0.3 * (logps - ref_logps), PAIRS, GROUPS)
    shares = torch.tensor(weights or [1.0] * 3, dtype=torch.float64)
    gradients = backward((losses * shares).sum() / shares.sum(), of)
    given = {} if weights is None else {"pair_weights": shares}
    out = linear_dpo_loss(
        hidden, weight, labels, ref_logps, bias=bias, pairs=PAIRS, chunk_bytes=chunk_bytes, beta=0.3,
        loss_type="plackett_luce", **given,
    )  # fmt: skip
    backward(out.loss, of)
    torch.testing.assert_close(out.losses, losses.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(out.chosen_rewards, 0.3 * (logps - ref_logps).detach()[[i for i, _ in PAIRS]])
    for tensor, gradient in zip(of, gradients, strict=True):
        torch.testing.assert_close(tensor.grad, gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("count", range(2, 8))
def test_plackett_luce_is_the_probability_of_the_ranking(count):
    """The probabilities of all orders of the answers sum to 1."""
    logps = torch.randn(count, dtype=torch.float64, generator=torch.Generator().manual_seed(count))
    total = 0.0
    for order in itertools.permutations(range(min(count, 5))):
        pairs = [(order[i], order[j]) for i in range(len(order)) for j in range(i + 1, len(order))]
        logps_of = logps[: len(order)]
        total += plackett_luce_loss(logps_of, torch.zeros_like(logps_of), pairs, beta=0.5).losses.neg().exp().item()
    assert total == pytest.approx(1, abs=1e-12)


def test_plackett_luce_of_pairs_is_dpo():
    logps = torch.randn(8, dtype=torch.float64, requires_grad=True)
    ref_logps = torch.randn(8, dtype=torch.float64)
    out = plackett_luce_loss(logps, ref_logps, beta=0.2)
    expected = dpo_kernels.dpo_loss(*logps.chunk(2), *ref_logps.chunk(2), beta=0.2)
    torch.testing.assert_close(out.losses, expected.losses)
    assert torch.equal(out.rewards, torch.cat([expected.chosen_rewards, expected.rejected_rewards]))
    assert not out.rewards.requires_grad
    torch.testing.assert_close(out.loss, expected.loss)
    pairs = [(0, 1), (0, 2), (3, 4), (5, 6), (7, 6)]
    assert torch.autograd.gradcheck(lambda x: plackett_luce_loss(x, ref_logps, pairs), logps)


def test_scores_far_apart_have_finite_gradients():
    logps = torch.tensor([0.0, 1e4, -1e4, 30.0], requires_grad=True)
    plackett_luce_loss(logps, torch.zeros(4), list(itertools.combinations(range(4), 2)), beta=1.0).loss.backward()
    torch.testing.assert_close(logps.grad, torch.tensor([-1.0, 1.0, -1.0, 1.0]))


@pytest.mark.parametrize("gradients", [("hidden", "weight"), ("hidden",), ()])
@pytest.mark.parametrize("chunk_bytes", [None, 30 * V * 4])
def test_the_same_model_as_reference_gives_rewards_of_0_to_the_bit(gradients, chunk_bytes):
    hidden, weight, labels, _, _ = (t.detach() for t in inputs(torch.float32))
    hidden.requires_grad_("hidden" in gradients), weight.requires_grad_("weight" in gradients)
    more = {"pairs": PAIRS, "chunk_bytes": chunk_bytes}
    ref_logps = linear_reference_logps(hidden.detach(), weight.detach(), labels, gradients=gradients, **more).logps
    out = linear_dpo_loss(hidden, weight, labels, ref_logps, **more)
    assert out.chosen_rewards.eq(0).all() and out.rejected_rewards.eq(0).all()
    listed = linear_dpo_loss(hidden, weight, labels, ref_logps, loss_type="plackett_luce", **more)
    assert listed.losses[2].item() == pytest.approx(math.log(2), rel=1e-6)
    assert listed.losses[0].item() == pytest.approx(math.log(6), rel=1e-6)  # one of 3! orders


def test_a_sequence_costs_its_rows_once(monkeypatch):
    from dpo_kernels import linear_dpo

    seen = []
    plan = linear_dpo.plan_groups

    def counted(rows, *args, **options):
        seen.append(len(rows.sequence))
        return plan(rows, *args, **options)

    monkeypatch.setattr(linear_dpo, "plan_groups", counted)
    hidden, weight, labels, ref_logps, _ = inputs()
    linear_dpo_loss(hidden, weight, labels, ref_logps, pairs=PAIRS)
    assert seen == [int((labels != -100).sum())]


@pytest.mark.parametrize(
    "pairs, message",
    [
        ([], r"pairs: expected pairs \(chosen, rejected\) of two different sequences from 0 to 8, got \[\]"),
        ("0 1", "pairs: expected pairs"),
        (3, "pairs: expected pairs"),
        (torch.ones(3, 2), "pairs: expected pairs"),
        ([(0, 1, 2)], "as pair 0"),
        ([(0, 1), 2], "got 2 as pair 1"),
        ([(0, 1.5)], r"got \(0, 1.5\) as pair 0"),
        ([(False, True)], r"got \(False, True\) as pair 0"),
        ([(0, 1), (1, 9)], r"got \(1, 9\) as pair 1"),
        ([(-1, 1)], r"got \(-1, 1\) as pair 0"),
        ([(2, 2)], r"of two different sequences from 0 to 8, got \(2, 2\) as pair 0"),
        (PAIRS[:-1], "expected every sequence in some pair, got none with sequence 7"),
    ],
)
def test_what_are_no_pairs(pairs, message):
    hidden, weight, labels, ref_logps, _ = inputs()
    with pytest.raises(ValueError, match=message):
        linear_dpo_loss(hidden, weight, labels, ref_logps, pairs=pairs)
    with pytest.raises(ValueError, match=message):
        plackett_luce_loss(ref_logps, ref_logps, pairs)


def test_what_does_not_go_with_pairs():
    hidden, weight, labels, ref_logps, _ = inputs()
    with pytest.raises(ValueError, match="hidden: expected an even number of sequences, chosen then rejected, got 9"):
        linear_dpo_loss(hidden, weight, labels, ref_logps)
    with pytest.raises(ValueError, match="logps: expected an even number"):
        plackett_luce_loss(ref_logps, ref_logps)
    with pytest.raises(ValueError, match="ld_alpha: expected None with pairs"):
        linear_dpo_loss(hidden, weight, labels, ref_logps, pairs=PAIRS, ld_alpha=0.5)
    for more in ({"use_weighting": True}, {"rpo_alpha": 1.0}, {"loss_type": ("plackett_luce", "sft")}):
        with pytest.raises(ValueError, match="expected 'plackett_luce' alone"):
            dpo_kernels.LinearDPOLoss(**({"loss_type": "plackett_luce"} | more))
        with pytest.raises(ValueError, match="expected 'plackett_luce' alone"):
            linear_dpo_loss(hidden, weight, labels, ref_logps, pairs=PAIRS, **({"loss_type": "plackett_luce"} | more))
    with pytest.raises(ValueError, match=r"pair_weights: expected shape \[7\]"):
        linear_dpo_loss(hidden, weight, labels, ref_logps, pairs=PAIRS, pair_weights=torch.ones(3))
    with pytest.raises(ValueError, match=r"pair_weights: expected shape \[3\], one a group, got \[7\]"):
        linear_dpo_loss(
            hidden, weight, labels, ref_logps, pairs=PAIRS, pair_weights=torch.ones(7), loss_type="plackett_luce"
        )
    with pytest.raises(ValueError, match=r"ref_logps: expected \[9\]"):
        plackett_luce_loss(ref_logps, ref_logps[:8], PAIRS)
    ref_logps[3] = torch.nan
    for function, given in ((linear_dpo_loss, (hidden, weight, labels)), (plackett_luce_loss, (torch.zeros(S),))):
        with pytest.raises(ValueError, match="ref_logps: expected finite"):
            function(*given, ref_logps, pairs=PAIRS)


def test_a_compiled_call_with_pairs():
    hidden, weight, labels, ref_logps, _ = inputs(torch.float32)
    call = torch.compile(linear_dpo_loss, backend="aot_eager", fullgraph=True)
    out = call(hidden, weight, labels, ref_logps, pairs=PAIRS)
    torch.testing.assert_close(out.loss, linear_dpo_loss(hidden, weight, labels, ref_logps, pairs=PAIRS).loss)


def test_parts_of_groups_number_sequences_as_they_take_them():
    groups = comparisons_of(PAIRS, S, torch.device("cpu"))
    assert isinstance(groups, Groups) and groups.groups == 3 and groups.pairs == 7
    t, of = torch.arange(S) * 10, slice(1, 3)
    assert groups.take(t, of).tolist() == [10, 60, 70, 80, 30, 40]
    assert groups.local(torch.tensor([1, 6, 7, 8, 3, 4]), of).tolist() == list(range(6))
    assert groups.pairs_of(of).tolist() == [2, 5, 6, 1]
    assert groups.part(of).stages == [[[0, 3, 1], [2, 1]], [[5, 4]]]
    whole = torch.zeros(S, dtype=torch.int64)
    groups.put(whole, of, groups.take(t, of))
    assert whole.tolist() == [0, 10, 0, 30, 40, 0, 60, 70, 80]
    assert groups.spread(torch.ones(7)).tolist() == [2, 2, 2, 1, 1, 2, 2, 1, 1]
    assert Halves(2).stages == [[[0, 2]], [[1, 3]]]


@pytest.mark.parametrize("chunk_bytes", [None, 30 * V * 8, 0])
@pytest.mark.parametrize(
    ("loss_type", "weights"), [("sigmoid", [1.0, 2.0, 0, 0.5, 1.0, 0, 0]), ("plackett_luce", [1.0, 0, 2.0])]
)
def test_references_of_what_weighs_nothing_may_be_anything(loss_type, weights, chunk_bytes):
    """Of the second group, all of whose pairs have weight 0."""
    hidden, weight, labels, ref_logps, bias = inputs(seed=4)
    of = hidden, weight, bias
    more = {"pairs": PAIRS, "pair_weights": torch.tensor(weights), "loss_type": loss_type, "chunk_bytes": chunk_bytes}
    expected = linear_dpo_loss(hidden, weight, labels, ref_logps, bias=bias, **more)
    gradients = backward(expected.loss, of)
    assert all(hidden.grad[n].eq(0).all() for n in GROUPS[1])
    ref_logps[GROUPS[1]] = torch.nan
    out = linear_dpo_loss(hidden, weight, labels, ref_logps, bias=bias, **more)
    assert torch.equal(out.loss, expected.loss)
    for ours, theirs in zip(backward(out.loss, of), gradients, strict=True):
        assert torch.equal(ours, theirs)
    ref_logps[3] = torch.nan
    with pytest.raises(ValueError, match="ref_logps: expected finite"):
        linear_dpo_loss(hidden, weight, labels, ref_logps, **more)


@pytest.mark.parametrize(
    ("pairs", "stages"),
    [
        ([(0, 2), (1, 2)], [[[0, 2], [1, 2]]]),  # by what both are preferred to
        ([(3, 2), (1, 0), (2, 1)], [[[1, 0], [2, 1], [3, 2]]]),  # parts that are joined at last
        ([(2, 0), (3, 1)], [[[2, 0]], [[3, 1]]]),
        ([(0, 1), (0, 1)], [[[0, 1, 1]]]),  # twice
    ],
)
def test_a_group_is_what_pairs_connect(pairs, stages):
    assert comparisons_of(pairs, 1 + max(map(max, pairs)), torch.device("cpu")).stages == stages
