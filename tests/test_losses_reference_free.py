"""SimPO, ORPO, CPO and KTO, and the weights of LD-DPO and WPO, against their formulas in 60-digit arithmetic."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch
from mpmath import exp, log, log1p, mpf

import dpo_kernels
from dpo_kernels.losses import (
    KTOLoss,
    PreferenceLoss,
    cpo_loss,
    kto_kl,
    kto_loss,
    length_desensitized_weights,
    orpo_loss,
    simpo_loss,
    wpo_weights,
)

CHOSEN = torch.tensor([-30.0, -12.0, -55.0, -8.0], dtype=torch.float64)
REJECTED = torch.tensor([-25.0, -40.0, -41.0, -9.5], dtype=torch.float64)
CHOSEN_LENGTHS, REJECTED_LENGTHS = torch.tensor([10, 3, 40, 16]), torch.tensor([20, 25, 30, 4])
LENGTHS = {"chosen_lengths": CHOSEN_LENGTHS, "rejected_lengths": REJECTED_LENGTHS}
AVERAGES = {"chosen_lengths": 1, "rejected_lengths": 1}
MEAN_LENGTH = 69 / 4
EPS = 0.1


def log_sigma(x):
    return -log1p(exp(-x))


def sigma(x):
    return 1 / (1 + exp(-x))


def simpo(w, l_, len_w, len_l, beta=2.5, gamma=1.2):
    h = mpf(beta) * w / len_w - mpf(beta) * l_ / len_l - mpf(gamma)
    return -(1 - mpf(EPS)) * log_sigma(h) - mpf(EPS) * log_sigma(-h)


def orpo(w, l_, len_w, len_l, beta=0.2):
    p_w, p_l = exp(w / len_w), exp(l_ / len_l)
    odds_ratio = (p_w / (1 - p_w)) / (p_l / (1 - p_l))
    return -w / len_w - mpf(beta) * log_sigma(log(odds_ratio))


def cpo_sigmoid(w, l_, len_w, len_l, beta=0.15):
    h = mpf(beta) * (w - l_)
    nll = -w / mpf(MEAN_LENGTH)
    return -(1 - mpf(EPS)) * log_sigma(h) - mpf(EPS) * log_sigma(-h) + mpf(0.7) * nll


def cpo_hinge(w, l_, len_w, len_l, beta=0.15):
    return max(mpf(0), 1 - mpf(beta) * (w - l_)) - mpf(0.7) * w / mpf(MEAN_LENGTH)


def cpo_ipo(w, l_, len_w, len_l, beta=0.15):
    return (w / len_w - l_ / len_l - 1 / (2 * mpf(beta))) ** 2 - mpf(0.7) * w / mpf(MEAN_LENGTH)


CASES = {
    "simpo": (simpo, simpo_loss, {"beta": 2.5, "gamma": 1.2, "label_smoothing": EPS}),
    "orpo": (orpo, orpo_loss, {"beta": 0.2}),
    "cpo_sigmoid": (cpo_sigmoid, cpo_loss, {"beta": 0.15, "cpo_alpha": 0.7, "label_smoothing": EPS}),
    "cpo_hinge": (cpo_hinge, cpo_loss, {"beta": 0.15, "cpo_alpha": 0.7, "loss_type": "hinge"}),
    "cpo_ipo": (cpo_ipo, cpo_loss, {"beta": 0.15, "cpo_alpha": 0.7, "loss_type": "ipo"}),
}


def oracle(formula, chosen, rejected):
    """(losses, their derivatives to chosen and to rejected) as fp64 tensors."""
    rows = []
    with mpmath.workdps(60):
        for w, l_, len_w, len_l in zip(
            chosen, rejected, CHOSEN_LENGTHS.tolist(), REJECTED_LENGTHS.tolist(), strict=True
        ):
            w, l_, step = mpf(w.item()), mpf(l_.item()), mpf(10) ** -20
            to_w = (formula(w + step, l_, len_w, len_l) - formula(w - step, l_, len_w, len_l)) / (2 * step)
            to_l = (formula(w, l_ + step, len_w, len_l) - formula(w, l_ - step, len_w, len_l)) / (2 * step)
            rows.append([float(x) for x in (formula(w, l_, len_w, len_l), to_w, to_l)])
    return torch.tensor(rows, dtype=torch.float64).T


def values_and_gradients(function, chosen, rejected, **options):
    leaves = [chosen.clone().requires_grad_(), rejected.clone().requires_grad_()]
    losses = function(*leaves, **options).losses
    return losses.detach(), *torch.autograd.grad(losses.sum(), leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_are_those_of_the_published_formula(case, dtype):
    formula, function, options = CASES[case]
    actual = values_and_gradients(function, CHOSEN.to(dtype), REJECTED.to(dtype), **options, **LENGTHS)
    tolerance = {"rtol": 3e-6, "atol": 3e-7} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-13}
    for value, exact in zip(actual, oracle(formula, CHOSEN, REJECTED), strict=True):
        assert value.dtype == dtype
        torch.testing.assert_close(value.double(), exact, **tolerance)
    inputs = (CHOSEN.clone().requires_grad_(), REJECTED.clone().requires_grad_())
    assert torch.autograd.gradcheck(lambda *rows: function(*rows, **options, **LENGTHS).losses, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", CASES)
def test_extreme_margins(case, dtype):
    formula, function, options = CASES[case]
    # Sums of log-probabilities, so never positive; per token the gap is 1e4 either way.
    chosen = torch.tensor([-1e-3, -1e4, -1e4, -1e4], dtype=dtype) * CHOSEN_LENGTHS
    rejected = torch.tensor([-1e4, -1e-3, -1e4, -1.0], dtype=dtype) * REJECTED_LENGTHS
    actual = values_and_gradients(function, chosen, rejected, **options, **LENGTHS)
    for value, exact in zip(actual, oracle(formula, chosen, rejected), strict=True):
        torch.testing.assert_close(value.double(), exact, rtol=1e-6 if dtype == torch.float32 else 1e-12, atol=1e-30)


@pytest.mark.parametrize("case", CASES)
def test_rewards_and_types(case):
    _, function, options = CASES[case]
    output = function(CHOSEN.bfloat16().requires_grad_(), REJECTED.bfloat16(), **options, **LENGTHS)
    assert isinstance(output, PreferenceLoss)
    assert {tensor.dtype for tensor in output} == {torch.float32}
    averaged = case not in ("cpo_sigmoid", "cpo_hinge")
    chosen, rejected = CHOSEN.bfloat16().float(), REJECTED.bfloat16().float()
    if averaged:
        chosen, rejected = chosen / CHOSEN_LENGTHS, rejected / REJECTED_LENGTHS
    torch.testing.assert_close(output.chosen_rewards, options["beta"] * chosen)
    torch.testing.assert_close(output.rejected_rewards, options["beta"] * rejected)
    assert output.losses.requires_grad and not output.chosen_rewards.requires_grad


@pytest.mark.parametrize("function", [simpo_loss, orpo_loss])
def test_averages_and_sums_with_lengths_are_the_same(function):
    with_lengths = function(CHOSEN, REJECTED, **LENGTHS)
    averages = function(CHOSEN / CHOSEN_LENGTHS, REJECTED / REJECTED_LENGTHS, **AVERAGES)
    for a, b in zip(with_lengths, averages, strict=True):
        torch.testing.assert_close(a, b)


def test_gamma_is_inside_the_sigmoid_and_not_scaled_by_beta():
    """The reward margin at which the loss is log 2 is gamma itself."""
    output = simpo_loss(torch.tensor([-0.5]), torch.tensor([-1.5]), beta=2.0, gamma=2.0, **AVERAGES)
    torch.testing.assert_close(output.losses, torch.tensor([math.log(2)]))


def test_orpo_at_probability_one():
    """log p = 0 is a probability that rounded to 1: finite, and each gradient in its direction."""
    chosen = torch.tensor([0.0, -1.0, 0.0, -1e-30, 1e-7], requires_grad=True)
    rejected = torch.tensor([-1.0, 0.0, 0.0, -2.0, -2.0], requires_grad=True)
    losses = orpo_loss(chosen, rejected, beta=1.0, **AVERAGES).losses
    to_chosen, to_rejected = torch.autograd.grad(losses.sum(), (chosen, rejected))
    assert losses.isfinite().all() and to_chosen.isfinite().all() and to_rejected.isfinite().all()
    assert (to_chosen < 0).all() and (to_rejected > 0).all()
    # The odds-ratio term vanishes with a certain chosen response. At a certain rejected one it is the chosen NLL of 1,
    # minus the chosen log odds of log(1 / (e - 1)), plus log 1e6 and the tangent's 1.
    assert losses[0] < 1e-6
    torch.testing.assert_close(losses[1], torch.tensor(2 + math.log(math.e - 1) + math.log(1e6)))
    torch.testing.assert_close(losses[2], torch.tensor(math.log(2)))


def test_orpo_near_probability_one_is_exact():
    logp = torch.tensor([-2e-6], dtype=torch.float64, requires_grad=True)
    other = torch.tensor([-1.0], dtype=torch.float64)
    losses = orpo_loss(other, logp, beta=1.0, **AVERAGES).losses
    with mpmath.workdps(60):
        p_w, p_l = exp(mpf(-1)), exp(mpf(logp.item()))
        exact = 1 - log_sigma(log(p_w / (1 - p_w)) - log(p_l / (1 - p_l)))
        # d/d log p_l of -log sigma(log odds_w - log odds_l) is sigma(log odds_l - log odds_w) / (1 - p_l).
        slope = p_l / (1 - p_l) / (p_w / (1 - p_w) + p_l / (1 - p_l)) / (1 - p_l)
    assert losses.item() == pytest.approx(float(exact), rel=1e-13)
    assert torch.autograd.grad(losses.sum(), logp)[0].item() == pytest.approx(float(slope), rel=1e-12)


def test_cpo_nll_is_a_sum_without_lengths_and_a_token_mean_with_them():
    without = cpo_loss(CHOSEN, REJECTED, cpo_alpha=1.0).losses - cpo_loss(CHOSEN, REJECTED, cpo_alpha=0.0).losses
    torch.testing.assert_close(without, -CHOSEN)
    preference = cpo_loss(CHOSEN, REJECTED, cpo_alpha=0.0).losses
    per_token = cpo_loss(CHOSEN, REJECTED, chosen_lengths=CHOSEN_LENGTHS).losses - preference
    torch.testing.assert_close(per_token.mean(), -CHOSEN.sum() / CHOSEN_LENGTHS.sum())
    part = cpo_loss(CHOSEN[:1], REJECTED[:1], mean_chosen_length=MEAN_LENGTH).losses - preference[:1]
    torch.testing.assert_close(part, per_token[:1])


LABELS = torch.tensor([True, False, False, True])


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_kto_is_its_formula(loss_type):
    reference = torch.tensor([-32.0, -9.0, -60.0, -8.5], dtype=torch.float64)
    kl = torch.tensor(1.5, dtype=torch.float64, requires_grad=True) if loss_type == "kto" else None
    options = {"beta": 0.2, "desirable_weight": 1.3, "undesirable_weight": 0.8, "loss_type": loss_type, "kl": kl}
    logps = CHOSEN.clone().requires_grad_()
    output = kto_loss(logps, reference, LABELS, **options)
    assert isinstance(output, KTOLoss)
    losses, slopes = [], []
    with mpmath.workdps(60):
        for logp, ref, good in zip(CHOSEN.tolist(), reference.tolist(), LABELS.tolist(), strict=True):

            def loss(x, ref=ref, good=good):
                z0 = mpf(1.5) if loss_type == "kto" else mpf(0)
                value = sigma(mpf(0.2) * (x - ref - z0)) if good else sigma(mpf(0.2) * (z0 - (x - ref)))
                return mpf(1.3 if good else 0.8) * (1 - value)

            losses.append(float(loss(mpf(logp))))
            slopes.append(float(mpmath.diff(loss, mpf(logp))))
    torch.testing.assert_close(output.losses.detach(), torch.tensor(losses, dtype=torch.float64), rtol=1e-13, atol=0)
    (gradient,) = torch.autograd.grad(output.losses.sum(), logps, retain_graph=True)
    torch.testing.assert_close(gradient, torch.tensor(slopes, dtype=torch.float64), rtol=1e-12, atol=0)
    torch.testing.assert_close(output.rewards, 0.2 * (CHOSEN - reference))
    assert output.kl.shape == () and output.kl.item() == (1.5 if loss_type == "kto" else 0.0)
    assert not output.rewards.requires_grad and not output.kl.requires_grad
    assert not kto_loss(CHOSEN, reference.clone().requires_grad_(), LABELS, **options).losses.requires_grad
    if kl is not None:
        assert torch.autograd.grad(output.losses.sum(), kl, allow_unused=True) == (None,)
        torch.testing.assert_close(
            kto_loss(CHOSEN, reference, LABELS, **(options | {"kl": 1.5})).losses, output.losses.detach()
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("logratio", [1e4, 200.0, -200.0, -1e4])
def test_kto_at_extreme_logratios(logratio, dtype):
    logps = torch.full((4,), logratio, dtype=dtype, requires_grad=True)
    losses = kto_loss(logps, torch.zeros(4, dtype=dtype), LABELS, kl=0.0, beta=0.1).losses
    (gradient,) = torch.autograd.grad(losses.sum(), logps)
    sign = torch.where(LABELS, -1.0, 1.0).to(dtype)
    with mpmath.workdps(60):
        slope = float(mpf(0.1) * sigma(mpf(logratio) / 10) * sigma(-mpf(logratio) / 10))
    # 0.1 rounds differently in fp64 and in the oracle: at |h| = 20 that is 20 ulp.
    torch.testing.assert_close(gradient, sign * slope, rtol=100 * torch.finfo(dtype).eps, atol=1e-30)
    expected = (sign * logratio > 0).to(dtype)
    torch.testing.assert_close(losses.detach(), expected, rtol=0, atol=3e-9)


def test_kto_kl_is_a_clamped_mean_without_gradient():
    policy = torch.tensor([-3.0, -5.0], requires_grad=True)
    kl = kto_kl(policy, torch.tensor([-7.0, -4.0]))
    assert kl.item() == 1.5 and not kl.requires_grad and kl.shape == ()
    assert kto_kl(torch.tensor([-7.0, -4.0]), policy).item() == 0.0
    assert kto_kl(policy.bfloat16(), policy.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize(
    "nothing",
    [
        torch.zeros(0),
        torch.zeros(0, requires_grad=True),
        torch.zeros(0, dtype=torch.float64),
        torch.zeros(0, dtype=torch.bfloat16),
        torch.zeros(4)[4:],
        torch.zeros(3, requires_grad=True)[
            torch.zeros(3, dtype=torch.bool)
        ],  # what a batch without such examples leaves
    ],
    ids=lambda nothing: f"{nothing.dtype}, {nothing.requires_grad}",
)
def test_kto_kl_of_nothing_is_0(nothing):
    kl = dpo_kernels.kto_kl(nothing, nothing)
    assert kl.item() == 0 and kl.shape == () and not kl.requires_grad
    assert kl.dtype == (torch.float64 if nothing.dtype == torch.float64 else torch.float32)
    compiled = torch.compile(dpo_kernels.kto_kl, fullgraph=True, backend="eager")(nothing, nothing)
    assert compiled.item() == 0
    assert kto_loss(Z, Z, LABELS, kl=kl).losses.isfinite().all()


def test_length_desensitized_weights_against_explicit_loops():
    ignore = -100
    labels = torch.tensor(
        [
            [ignore, ignore, 5, 6, 7, ignore],  # chosen 0: 3 tokens against 2
            [ignore, 4, 5, ignore, ignore, ignore],  # chosen 1: 2 against 4
            [ignore, 9, ignore, ignore, ignore, 3],  # chosen 2: 2 against 0, a gap inside the response
            [ignore, 1, 2, ignore, ignore, ignore],
            [1, 2, 3, 4, ignore, ignore],
            [ignore] * 6,
        ]
    )
    weights = length_desensitized_weights(labels, 0.3)
    expected = torch.zeros(6, 6)
    counts = (labels != ignore).sum(dim=1).tolist()
    for row in range(6):
        shared, seen = min(counts[row], counts[(row + 3) % 6]), 0
        for position in range(6):
            if labels[row, position] != ignore:
                seen += 1
                expected[row, position] = 1.0 if seen <= shared else 0.3
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights, expected)
    torch.testing.assert_close(length_desensitized_weights(labels, 1.0), (labels != ignore).float())
    relabelled = labels.masked_fill(labels == ignore, 0)
    torch.testing.assert_close(length_desensitized_weights(relabelled, 0.3, ignore_index=0), expected)


def test_length_desensitized_sums_are_shared_part_plus_alpha_times_tail():
    """Two masks and two sums, as trainers write it, give the same sequence log-probabilities as the token weights."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(6, 9, generator=generator) < 0.7
    token_logps = -torch.rand(6, 9, generator=generator) * mask
    position, lengths = mask.cumsum(1), mask.sum(1)
    shared = torch.cat([torch.minimum(lengths[:3], lengths[3:])] * 2)[:, None]
    head, tail = (position > 0) & (position <= shared), position > shared
    expected = (token_logps * head).sum(1) + 0.25 * (token_logps * tail).sum(1)
    weights = length_desensitized_weights(torch.where(mask, 1, -100), 0.25)
    torch.testing.assert_close((token_logps * weights).sum(1), expected)
    assert (weights == 0.25).any()


def test_wpo_weights_from_distributions():
    generator = torch.Generator().manual_seed(0)
    log_probs = torch.log_softmax(2 * torch.randn(4, 5, 11, generator=generator, dtype=torch.float64), dim=-1)
    labels = torch.randint(0, 11, (4, 5), generator=generator)
    labels[0, :2] = labels[2, 3:] = labels[3, :] = -100
    token_logps = log_probs.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    log_sum_sq_probs = log_probs.exp().square().sum(-1).log()
    token_logps[0, 0] = -math.inf  # unlabelled positions may hold anything
    log_sum_sq_probs[2, 4] = math.nan

    weights = []
    for row in range(4):
        ratios = [
            math.log(
                math.exp(log_probs[row, t, labels[row, t]].item())
                / sum(p * p for p in log_probs[row, t].exp().tolist())
            )
            for t in range(5)
            if labels[row, t] != -100
        ]
        weights.append(math.exp(sum(ratios) / len(ratios)) if ratios else 1.0)
    token_logps.requires_grad_()
    actual = wpo_weights(token_logps, log_sum_sq_probs, labels)
    expected = torch.tensor([weights[0] * weights[2], weights[1] * weights[3]], dtype=torch.float64)
    torch.testing.assert_close(actual, expected)
    assert not actual.requires_grad
    half = wpo_weights(token_logps.detach().bfloat16(), log_sum_sq_probs.bfloat16(), labels)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.double(), expected, rtol=0.03, atol=0)


def test_no_value_of_a_tensor_is_read():
    """A meta tensor has no values: whatever asked for one, and so would synchronise a device, raises here."""
    chosen, rejected, lengths = (torch.ones(4, device="meta", requires_grad=True) for _ in range(3))
    both = {"chosen_lengths": lengths.detach(), "rejected_lengths": lengths.detach()}
    for _, function, options in CASES.values():
        assert function(chosen, rejected, **options, **both).losses.shape == (4,)
    labels = torch.ones(4, device="meta", dtype=torch.bool)
    assert kto_loss(chosen, rejected, labels, kl=kto_kl(chosen, rejected)).losses.shape == (4,)
    tokens = torch.ones(4, 6, device="meta", dtype=torch.int64)
    assert length_desensitized_weights(tokens, 0.5).shape == (4, 6)
    assert wpo_weights(tokens.float(), tokens.float(), tokens).shape == (2,)


Z = torch.zeros(4)
TOKENS = torch.zeros(4, 6, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: simpo_loss(Z, Z[:3], **AVERAGES), r"rejected_logps must have shape \(4,\) as chosen_logps has"),
        (lambda: simpo_loss(Z, Z, beta=-1.0, **AVERAGES), "beta must be a positive finite number, got -1.0"),
        (lambda: simpo_loss(Z, Z, gamma=math.nan, **AVERAGES), "gamma must be a finite number, got nan"),
        (lambda: simpo_loss(Z, Z, label_smoothing=0.7, **AVERAGES), r"label_smoothing must be a number in \[0, 0.5\)"),
        (lambda: simpo_loss(Z, Z, chosen_lengths=Z, rejected_lengths=None), "rejected_lengths must be .* got None"),
        (lambda: simpo_loss(Z, Z, chosen_lengths=2, rejected_lengths=Z), "chosen_lengths must be .* or 1 .* got 2"),
        (lambda: simpo_loss(Z, Z, chosen_lengths=Z, rejected_lengths=Z[:1]), "rejected_lengths must have shape"),
        (lambda: orpo_loss(Z, Z, beta=0, **AVERAGES), "beta must be a positive finite number, got 0"),
        (lambda: orpo_loss(Z, Z, chosen_lengths=None, rejected_lengths=Z), "chosen_lengths must be .* got None"),
        (lambda: orpo_loss(TOKENS[0], Z, **AVERAGES), "chosen_logps must be floating-point, got torch.int64"),
        (lambda: cpo_loss(Z, Z, loss_type="simpo"), "loss_type must be one of .*use simpo_loss"),
        (lambda: cpo_loss(Z, Z, loss_type="hing"), "did you mean 'hinge'"),
        (lambda: cpo_loss(Z, Z, loss_type="ipo"), "chosen_lengths and rejected_lengths are required"),
        (lambda: cpo_loss(Z, Z, loss_type="hinge", label_smoothing=0.1), "label_smoothing must be 0"),
        (lambda: cpo_loss(Z, Z, cpo_alpha=-0.5), "cpo_alpha must be a finite number of at least 0, got -0.5"),
        (lambda: kto_loss(Z, Z, LABELS), "kl is required for loss_type 'kto'"),
        (lambda: kto_loss(Z, Z, LABELS, kl=0.0, loss_type="apo_zero_unpaired"), "kl must be None"),
        (lambda: kto_loss(Z, Z, LABELS, kl=Z), r"kl must be a scalar, got shape \(4,\)"),
        (lambda: kto_loss(Z, Z, LABELS, kl=math.nan), "kl must be a finite scalar, got nan"),
        (lambda: kto_loss(Z, Z, LABELS.long(), kl=0.0), r"labels must be bool of shape \(4,\), got torch.int64"),
        (lambda: kto_loss(Z, Z, LABELS[:2], kl=0.0), "labels must be bool of shape"),
        (lambda: kto_loss(Z, Z, LABELS, kl=0.0, loss_type="bco"), "loss_type must be one of"),
        (lambda: kto_loss(Z, Z, LABELS, kl=0.0, desirable_weight=-1), "desirable_weight must be a finite number"),
        (lambda: kto_kl(Z, Z[:2]), "ref_kl_logps must have shape"),
        (lambda: kto_kl(Z[:0], Z[:1]), r"ref_kl_logps must have shape \(0,\) as kl_logps has, got \(1,\)"),
        (lambda: kto_kl(Z.view(2, 2), Z), r"kl_logps must have shape \[B\], got \(2, 2\)"),
        (lambda: kto_kl(Z.sum(), Z.sum()), r"kl_logps must have shape \[B\], got \(\)"),
        (lambda: kto_kl([], []), r"kl_logps must be a tensor of shape \[B\], got list"),
        (lambda: kto_kl(Z, None), r"ref_kl_logps must be a tensor of shape \[B\], got NoneType"),
        (lambda: kto_kl(LABELS, LABELS), "kl_logps must be floating-point, got torch.bool"),
        (lambda: length_desensitized_weights(TOKENS[:3], 0.5), r"labels must have shape \[2B, T\].*got \(3, 6\)"),
        (lambda: length_desensitized_weights(TOKENS, 1.5), r"ld_alpha must be a number in \[0, 1\], got 1.5"),
        (
            lambda: wpo_weights(TOKENS[:, 1:].float(), TOKENS.float(), TOKENS),
            "token_logps must have the shape of labels",
        ),
        (lambda: wpo_weights(Z, Z, Z), r"labels must have shape \[2B, T\]"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("loss", [simpo_loss, orpo_loss, cpo_loss])
def test_responses_without_a_labelled_token(loss):
    """Their log-probability is 0, and so is their average: not 0 / 0."""
    zero, lengths = torch.zeros(2, dtype=torch.float64, requires_grad=True), torch.tensor([0, 3])
    chosen, rejected = zero * 1.0, torch.tensor([0.0, -4.0], dtype=torch.float64)
    more = {"mean_chosen_length": 0.0} if loss is cpo_loss else {}
    out = loss(chosen, rejected, chosen_lengths=lengths, rejected_lengths=lengths, **more)
    (grad,) = torch.autograd.grad(out.losses.sum(), zero)
    assert torch.isfinite(out.losses).all() and torch.isfinite(grad).all()
