"""DPO losses against their published formulas, evaluated pair by pair with 60 digits and unbounded exponents.

The oracle knows nothing of tensors and overflow: it writes each formula down as its paper does, and its gradient is a
central difference, good to 40 digits.
"""

from __future__ import annotations

import inspect
import math
from typing import get_args

import mpmath
import pytest
import torch
from mpmath import exp, log, log1p, mpf
from torch._subclasses import FakeTensorMode

from dpo_kernels import DPOLoss, LinearDPOLoss, dispatch, linear_dpo_loss, linear_sequence_logps
from dpo_kernels.losses import (
    BATCH_LOSSES,
    EXP_LIMIT,
    F_DIVERGENCE_LOSSES,
    LOSSES,
    PreferenceLoss,
    dpo_loss,
    f_divergence_scores,
    logistic_loss,
    validate_dpo_options,
)
from dpo_kernels.options import Impl, LinearDPOOptions, LogpsOptions, LossOptions, LossType, PairLossOptions
from dpo_kernels.testing import head_inputs

BETA, EPS, TAU, ALPHA = 0.3, 0.1, 0.05, 0.4
CHOSEN_LENGTHS, REJECTED_LENGTHS = [3, 7, 1, 12], [5, 2, 9, 12]
OPTIONS = {
    "beta": BETA,
    "discopop_tau": TAU,
    "chosen_lengths": torch.tensor(CHOSEN_LENGTHS),
    "rejected_lengths": torch.tensor(REJECTED_LENGTHS),
}
# label_smoothing is an error where it has no effect.
SMOOTHED = {"cdpo", "robust", "exo_pair", "aot", "aot_unpaired"}
PAIR_LOSSES = [name for name in LOSSES if name not in BATCH_LOSSES]
CASES = [(name, "reverse_kl") for name in LOSSES] + [
    (name, divergence) for name in sorted(F_DIVERGENCE_LOSSES) for divergence in ("forward_kl", "js", "alpha")
]


def sigma(x):
    return 1 / (1 + exp(-x))


def log_sigma(x):
    # log(sigma(x)) would round sigma to 1; the range of exp is no concern, for an mpf has any exponent.
    return -log1p(exp(-x))


def f_prime(u, divergence):
    return {
        "reverse_kl": lambda: log(u),
        "forward_kl": lambda: 1 - 1 / u,
        "js": lambda: log(2 * u / (u + 1)),
        "alpha": lambda: (u ** (mpf(ALPHA) - 1) - 1) / (mpf(ALPHA) - 1),
    }[divergence]()


def pair_loss(name, logps, lengths, divergence, tau):
    (chosen, rejected, ref_chosen, ref_rejected), (len_w, len_l) = logps, lengths
    beta, eps = mpf(BETA), mpf(EPS)
    r_w, r_l = chosen - ref_chosen, rejected - ref_rejected
    s_w, s_l = f_prime(exp(r_w), divergence), f_prime(exp(r_l), divergence)
    h = beta * (s_w - s_l)
    return {
        "sigmoid": lambda: -log_sigma(h),
        "cdpo": lambda: -(1 - eps) * log_sigma(h) - eps * log_sigma(-h),
        "robust": lambda: (-(1 - eps) * log_sigma(h) + eps * log_sigma(-h)) / (1 - 2 * eps),
        "hinge": lambda: max(mpf(0), 1 - h),
        "ipo": lambda: (s_w / len_w - s_l / len_l - 1 / (2 * beta)) ** 2,
        "exo_pair": lambda: sigma(h) * (log_sigma(h) - log(1 - eps)) + sigma(-h) * (log_sigma(-h) - log(eps)),
        "nca_pair": lambda: -log_sigma(beta * r_w) - log_sigma(-beta * r_w) / 2 - log_sigma(-beta * r_l) / 2,
        "bco_pair": lambda: -log_sigma(beta * r_w) - log_sigma(-beta * r_l),
        "sppo_hard": lambda: (r_w - 1 / (2 * beta)) ** 2 + (r_l + 1 / (2 * beta)) ** 2,
        "apo_zero": lambda: sigma(-beta * r_w) + sigma(beta * r_l),
        "apo_down": lambda: sigma(beta * r_w) + sigma(-beta * (r_w - r_l)),
        "discopop": lambda: -log_sigma(h) * sigma(-h / tau) + exp(-h) * sigma(h / tau),
        "sft": lambda: -chosen * len(CHOSEN_LENGTHS) / sum(CHOSEN_LENGTHS),
        "sigmoid_norm": lambda: -log_sigma(beta * (s_w / len_w - s_l / len_l)),
        "plackett_luce": lambda: -log(exp(beta * s_w) / (exp(beta * s_w) + exp(beta * s_l))),
    }[name]()


def oracle_losses(name, logps, divergence, tau):
    """Losses of all pairs; logps is [chosen, rejected, ref_chosen, ref_rejected], each a list of mpf."""
    pairs = list(zip(*logps, strict=True))
    if name not in BATCH_LOSSES:
        lengths = list(zip(CHOSEN_LENGTHS, REJECTED_LENGTHS, strict=True))
        return [pair_loss(name, pair, length, divergence, tau) for pair, length in zip(pairs, lengths, strict=True)]
    if name == "aot":
        high, low = [p[0] - p[1] for p in pairs], [p[2] - p[3] for p in pairs]
    else:
        high, low = [p[0] - p[2] for p in pairs], [p[1] - p[3] for p in pairs]
    margins = [mpf(BETA) * (a - b) for a, b in zip(sorted(high), sorted(low), strict=True)]
    return [-(1 - mpf(EPS)) * log_sigma(d) - mpf(EPS) * log_sigma(-d) for d in margins]


def oracle(name, logps, divergence="reverse_kl", tau=TAU):
    """(losses, d sum(losses) / d chosen, d sum(losses) / d rejected), lists of mpf."""
    with mpmath.workdps(60):
        step = mpf(10) ** -20
        logps = [[mpf(float(x)) for x in row] for row in logps]
        gradients = ([], [])
        for side in (0, 1):
            for pair in range(len(logps[0])):
                sums = []
                for sign in (1, -1):
                    moved = [list(row) for row in logps]
                    moved[side][pair] += sign * step
                    sums.append(mpmath.fsum(oracle_losses(name, moved, divergence, mpf(tau))))
                gradients[side].append((sums[0] - sums[1]) / (2 * step))
        return oracle_losses(name, logps, divergence, mpf(tau)), *gradients


def options_for(name, divergence="reverse_kl"):
    smoothing = EPS if name in SMOOTHED else 0.0
    return OPTIONS | {
        "loss_type": name,
        "label_smoothing": smoothing,
        "f_divergence": divergence,
        "f_alpha": ALPHA,
    }


def ours(logps, **options):
    """(losses, gradient to chosen, gradient to rejected) of dpo_loss."""
    leaves = [torch.as_tensor(row).clone().requires_grad_() for row in logps]
    losses = dpo_loss(*leaves, **options).losses
    chosen, rejected = torch.autograd.grad(losses.sum(), leaves[:2], allow_unused=True)
    return losses.detach(), chosen, torch.zeros_like(losses) if rejected is None else rejected


def random_logps(dtype=torch.float64, seed=10):
    # With these seeds the margins have both signs, and the orders that the aot losses sort by all differ.
    generator = torch.Generator().manual_seed(seed)
    base = -30 + 5 * torch.randn(2, 4, generator=generator, dtype=torch.float64)
    policy = base + 3 * torch.randn(2, 4, generator=generator, dtype=torch.float64)
    return [row.to(dtype) for row in (*policy, *base)]


def as_floats(values):
    return torch.tensor([float(value) for value in values], dtype=torch.float64)


@pytest.mark.parametrize(("name", "divergence"), CASES)
def test_losses_and_gradients_are_those_of_the_published_formula(name, divergence):
    logps = random_logps()
    expected = oracle(name, logps, divergence)
    for actual, exact in zip(ours(logps, **options_for(name, divergence)), expected, strict=True):
        torch.testing.assert_close(actual, as_floats(exact), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(("name", "divergence"), CASES)
def test_fp32_loses_a_few_roundings_and_no_more(name, divergence):
    logps = random_logps(torch.float32)
    expected = oracle(name, logps, divergence)
    for actual, exact in zip(ours(logps, **options_for(name, divergence)), expected, strict=True):
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual.double(), as_floats(exact), rtol=3e-6, atol=3e-7)


@pytest.mark.parametrize(("name", "divergence"), CASES)
def test_gradcheck(name, divergence):
    policy, reference = random_logps(seed=8)[:2], random_logps(seed=8)[2:]
    options = options_for(name, divergence)
    inputs = [row.requires_grad_() for row in policy]
    assert torch.autograd.gradcheck(lambda *rows: dpo_loss(*rows, *reference, **options).losses, inputs)


# The four combinations of log-ratios of +-1e4: h very high, very low, and twice a tie.
EXTREME_RATIOS = [(1e4, -1e4), (-1e4, 1e4), (1e4, 1e4), (-1e4, -1e4)]


def extreme_logps(dtype):
    reference = torch.full((4,), -2e4, dtype=dtype)
    chosen, rejected = torch.tensor(EXTREME_RATIOS, dtype=dtype).T
    return [reference + chosen, reference + rejected, reference, reference]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", LOSSES)
def test_extreme_margins(name, dtype):
    """Signs, values and gradients of the formula, none of which over- or underflows in the oracle."""
    logps = extreme_logps(dtype)
    for actual, exact in zip(ours(logps, **options_for(name)), oracle(name, logps), strict=True):
        # What is below 1e-30 is the rounding of the oracle, or underflows.
        torch.testing.assert_close(actual.double(), as_floats(exact), rtol=8 * torch.finfo(dtype).eps, atol=1e-30)


def extreme_score(ratio, divergence):
    """Score and slope at +-1e4: exponentials are 0 on one side and on their tangent on the other."""
    if divergence == "js":
        return (math.log(2), 0.0) if ratio > 0 else (math.log(2) + ratio, 1.0)
    exponent = {"forward_kl": -1.0, "alpha": ALPHA - 1}[divergence]
    if ratio > 0:
        return -1 / exponent, 0.0
    edge = math.exp(EXP_LIMIT)
    return (edge * (1 + exponent * ratio - EXP_LIMIT) - 1) / exponent, edge


def extreme_slope(name, h):
    """d loss / d h at h far below 0, at 0 and far above."""
    above = 0.5 if h == 0 else float(h > 0)  # sigma(h)
    below = 1 - above
    return {
        "sigmoid": -below,
        "sigmoid_norm": -below,
        "plackett_luce": -below,
        "cdpo": -(1 - EPS) * below + EPS * above,
        "robust": (-(1 - EPS) * below - EPS * above) / (1 - 2 * EPS),
        "hinge": 0.0 if h > 0 else -1.0,
        "exo_pair": -below * above * math.log((1 - EPS) / EPS),
        # At a tie the modulation's own slope 1 / (4 tau) multiplies exp(0) - log 2.
        "discopop": -0.25 - 0.5 + (1 - math.log(2)) / (4 * TAU) if h == 0 else -below,
    }[name]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("divergence", ["forward_kl", "js", "alpha"])
@pytest.mark.parametrize("name", sorted(F_DIVERGENCE_LOSSES))
def test_extreme_margins_under_an_f_divergence(name, divergence, dtype):
    """exp(1e4) exists in neither type: the gradients are those of the formula with the exponential's tangent."""
    losses, *gradients = ours(extreme_logps(dtype), **options_for(name, divergence))
    assert losses.isfinite().all()
    expected = ([], [])
    for ratios, lengths in zip(EXTREME_RATIOS, zip(CHOSEN_LENGTHS, REJECTED_LENGTHS, strict=True), strict=True):
        if name == "sft":
            expected[0].append(-len(CHOSEN_LENGTHS) / sum(CHOSEN_LENGTHS))
            expected[1].append(0.0)
            continue
        len_w, len_l = lengths if name in {"ipo", "sigmoid_norm"} else (1, 1)
        (s_w, slope_w), (s_l, slope_l) = (extreme_score(ratio, divergence) for ratio in ratios)
        delta = s_w / len_w - s_l / len_l
        slope = 2 * (delta - 1 / (2 * BETA)) if name == "ipo" else BETA * extreme_slope(name, delta)
        expected[0].append(slope * slope_w / len_w)
        expected[1].append(-slope * slope_l / len_l)
    for gradient, exact in zip(gradients, expected, strict=True):
        rtol = 1e-6 if dtype == torch.float32 else 1e-13
        torch.testing.assert_close(gradient.double(), as_floats(exact), rtol=rtol, atol=1e-30)


@pytest.mark.parametrize("h", [-90.0, -40.0, -20.0, -17.0, 17.0, 20.0, 40.0, 80.0])
@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_fp32_gradients_in_the_saturated_range(name, h):
    """Where sigma rounds to 1 its slope is still e^-|h|: small, and not to be lost to 1 - 1 = 0."""
    chosen = [h / 2 / BETA + shift for shift in (0.0, 0.5, -0.5, 1.0)]
    logps = [torch.tensor(row, dtype=torch.float32) for row in (chosen, [-x for x in chosen], [0.0] * 4, [0.0] * 4)]
    _, *expected = oracle(name, logps)
    for gradient, exact in zip(ours(logps, **options_for(name))[1:], expected, strict=True):
        # The rounding of h itself moves e^-|h| by up to |h| 2^-23.
        torch.testing.assert_close(gradient.double(), as_floats(exact), rtol=3e-5, atol=1e-37)


def test_scores_continue_along_the_tangent():
    """Value and slope are continuous at the limit, the slope constant beyond, and nothing changes below."""
    limit = EXP_LIMIT
    ratios = -torch.tensor([0.0, limit - 1, limit, limit + 1, limit + 2, 1e4], dtype=torch.float64)
    ratios.requires_grad_()
    scores = f_divergence_scores(ratios, "forward_kl")
    (slopes,) = torch.autograd.grad(scores.sum(), ratios)
    edge = math.exp(limit)
    expected = [0.0, 1 - edge / math.e, 1 - edge, 1 - 2 * edge, 1 - 3 * edge, 1 - edge * (1 + 1e4 - limit)]
    torch.testing.assert_close(scores.detach(), torch.tensor(expected, dtype=torch.float64), rtol=1e-13, atol=0)
    torch.testing.assert_close(
        slopes, torch.tensor([1.0, edge / math.e, edge, edge, edge, edge], dtype=torch.float64), rtol=1e-13, atol=0
    )


def test_scores_have_accurate_values_and_slopes_on_both_sides():
    ratios = torch.tensor([-20.0, -1.0, -1e-4, 0.0, 1e-4, 1.0, 20.0], requires_grad=True)
    for divergence in ("forward_kl", "js", "alpha"):
        scores = f_divergence_scores(ratios, divergence, ALPHA)
        (slopes,) = torch.autograd.grad(scores.sum(), ratios)
        with mpmath.workdps(60):
            points = [mpf(x) for x in ratios.tolist()]
            exact = [f_prime(exp(x), divergence) for x in points]
            exact_slopes = [mpmath.diff(lambda x, d=divergence: f_prime(exp(x), d), x) for x in points]
        # js adds log 2 to log sigma, which rounds at 1e-7; the exponentials are exact at 0.
        atol = 1.2e-7 if divergence == "js" else 1e-12
        torch.testing.assert_close(scores.detach().double(), as_floats(exact), rtol=1e-6, atol=atol)
        torch.testing.assert_close(slopes.double(), as_floats(exact_slopes), rtol=3e-6, atol=0)


def test_alpha_divergence_has_forward_and_reverse_kl_as_its_ends():
    ratios = torch.linspace(-5, 5, 11, dtype=torch.float64)
    forward, reverse = f_divergence_scores(ratios, "forward_kl"), f_divergence_scores(ratios, "reverse_kl")
    assert torch.equal(f_divergence_scores(ratios, "alpha", 0.0), forward)
    assert torch.equal(f_divergence_scores(ratios, "alpha", 1.0), reverse)
    for near_one in (1 - 1e-9, 1 + 1e-9):
        torch.testing.assert_close(f_divergence_scores(ratios, "alpha", near_one), reverse, rtol=1e-7, atol=0)
    assert not torch.allclose(f_divergence_scores(ratios, "alpha", 0.5), reverse)


def test_discopop_with_a_temperature_above_one_grows_without_overflow():
    logps = random_logps()
    expected, *_ = oracle("discopop", logps, tau=2.0)
    actual = dpo_loss(*logps, **(options_for("discopop") | {"discopop_tau": 2.0})).losses
    torch.testing.assert_close(actual, as_floats(expected), rtol=1e-12, atol=0)
    losses, chosen, rejected = ours(extreme_logps(torch.float32), loss_type="discopop", discopop_tau=2.0, beta=BETA)
    assert losses.isfinite().all() and chosen.isfinite().all() and rejected.isfinite().all()
    assert chosen[1] < 0 < rejected[1]


@pytest.mark.parametrize("name", LOSSES)
def test_rewards_are_beta_times_the_logratio_whatever_the_loss(name):
    divergence = "js" if name in F_DIVERGENCE_LOSSES else "reverse_kl"
    logps = [row.requires_grad_() for row in random_logps()]
    output = dpo_loss(*logps, **options_for(name, divergence))
    assert isinstance(output, PreferenceLoss)
    assert torch.equal(output.chosen_rewards, BETA * (logps[0] - logps[2]).detach())
    assert torch.equal(output.rejected_rewards, BETA * (logps[1] - logps[3]).detach())
    assert output.losses.requires_grad
    assert not output.chosen_rewards.requires_grad and not output.rejected_rewards.requires_grad


def test_sft_is_the_mean_over_all_chosen_tokens():
    logps = random_logps()
    options = {"loss_type": "sft", "chosen_lengths": OPTIONS["chosen_lengths"]}
    losses = dpo_loss(*logps, **options).losses
    torch.testing.assert_close(losses.mean(), -logps[0].sum() / sum(CHOSEN_LENGTHS))
    # On a part of the batch with the whole batch's mean length the losses stay those of the whole batch.
    mean_length = sum(CHOSEN_LENGTHS) / len(CHOSEN_LENGTHS)
    for length in (mean_length, torch.tensor(mean_length)):
        part = dpo_loss(*(row[:2] for row in logps), loss_type="sft", mean_chosen_length=length).losses
        torch.testing.assert_close(part, losses[:2])
    plain = torch.arange(4, dtype=torch.float64, requires_grad=True)
    losses = dpo_loss(*logps, **options, sft_chosen_logps=plain).losses
    torch.testing.assert_close(losses.detach(), -plain.detach() / mean_length)
    torch.testing.assert_close(torch.autograd.grad(losses.sum(), plain)[0], torch.full((4,), -1 / mean_length).double())


def test_empty_responses_give_finite_losses_and_gradients():
    zeros = torch.zeros(2, dtype=torch.int64)
    for name in ("ipo", "sigmoid_norm", "sft"):
        rows = [torch.zeros(2, requires_grad=True) for _ in range(4)]
        losses = dpo_loss(*rows, loss_type=name, chosen_lengths=zeros, rejected_lengths=zeros).losses
        expected = {"ipo": 25.0, "sigmoid_norm": math.log(2), "sft": 0.0}[name]
        torch.testing.assert_close(losses.detach(), torch.full((2,), expected))
        assert torch.autograd.grad(losses.sum(), rows[0])[0].isfinite().all()


def test_several_losses_add_up_by_weight():
    logps = random_logps()
    shared = {key: value for key, value in OPTIONS.items() if key != "discopop_tau"}
    names, weights = ["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.5]
    combined = dpo_loss(*logps, loss_type=names, loss_weights=weights, **shared).losses
    single = [dpo_loss(*logps, loss_type=name, **shared).losses for name in names]
    torch.testing.assert_close(combined, 0.8 * single[0] + 0.2 * single[1] + 1.5 * single[2])
    torch.testing.assert_close(dpo_loss(*logps, loss_type=tuple(names), **shared).losses, sum(single))
    # label_smoothing serves the loss that takes it; sigmoid beside it stays as it is.
    both = dpo_loss(*logps, loss_type=["sigmoid", "robust"], label_smoothing=0.2, **shared).losses
    robust = dpo_loss(*logps, loss_type="robust", label_smoothing=0.2, **shared).losses
    torch.testing.assert_close(both, single[0] + robust)


def test_pair_weights_multiply_and_are_detached():
    logps = [row.requires_grad_() for row in random_logps()]
    weights = torch.tensor([0.5, 2.0, 0.0, 1.0], requires_grad=True)
    plain, weighted = dpo_loss(*logps).losses, dpo_loss(*logps, pair_weights=weights).losses
    torch.testing.assert_close(weighted, plain * weights.detach())
    assert torch.autograd.grad(weighted.sum(), weights, allow_unused=True) == (None,)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_inputs_are_upcast(name, dtype):
    logps = random_logps(dtype)
    half = dpo_loss(*logps, **options_for(name))
    full = dpo_loss(*(row.float() for row in logps), **options_for(name))
    for ours_half, ours_full in zip(half, full, strict=True):
        assert ours_half.dtype == torch.float32
        assert torch.equal(ours_half, ours_full)


def test_mixed_types_compute_in_the_widest():
    policy = [torch.zeros(2, dtype=torch.bfloat16)] * 2
    assert dpo_loss(*policy, torch.zeros(2), torch.zeros(2)).losses.dtype == torch.float32
    assert dpo_loss(*policy, torch.zeros(2), torch.zeros(2, dtype=torch.float64)).losses.dtype == torch.float64


@pytest.mark.parametrize("name", LOSSES)
def test_no_value_of_a_tensor_is_read(name):
    """A meta tensor has no values: whatever asked for one, and so would synchronise a device, raises here."""
    rows = [torch.zeros(4, device="meta", requires_grad=True) for _ in range(4)]
    options = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in options_for(name).items()}
    weights = None if name in BATCH_LOSSES else torch.ones(4, device="meta")
    dpo_loss(*rows, **options, pair_weights=weights).losses.sum().backward()
    assert rows[0].grad.shape == (4,)


def test_no_value_of_a_tensor_that_has_none_is_read_on_the_cpu():
    with FakeTensorMode():
        rows = [torch.zeros(4) for _ in range(4)]
        assert dpo_loss(*rows, pair_weights=torch.ones(4)).losses.shape == (4,)


def test_second_derivative_of_the_logistic_loss():
    h = torch.linspace(-6, 6, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(logistic_loss, h)
    per_sample = torch.func.vmap(torch.func.grad(logistic_loss))(h.detach())
    torch.testing.assert_close(per_sample, -1 / (1 + torch.exp(h.detach())))


@pytest.mark.parametrize("names", ["sigmoid", list(LOSSES)], ids=["sigmoid", "all"])
def test_compiles_without_graph_breaks(names):
    options = OPTIONS | {"loss_type": names, "label_smoothing": 0.0 if names == "sigmoid" else EPS}

    def loss(*rows):
        return dpo_loss(*rows, **options).losses

    logps = [*(row.requires_grad_() for row in random_logps()[:2]), *random_logps()[2:]]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(*logps)
    torch.testing.assert_close(compiled, loss(*logps), rtol=1e-14, atol=0)
    gradients = torch.autograd.grad(compiled.sum(), logps[:2])
    for actual, expected in zip(gradients, torch.autograd.grad(loss(*logps).sum(), logps[:2]), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-15)


def test_batch_losses_are_exactly_those_that_are_no_mean_over_pairs():
    logps = random_logps()
    depends_on_others = set()
    for name in LOSSES:
        options = options_for(name) | {"mean_chosen_length": 5.0}
        whole = dpo_loss(*logps, **options).losses
        parts = []
        for pair in range(4):
            row = slice(pair, pair + 1)
            one = options | {key: options[key][row] for key in ("chosen_lengths", "rejected_lengths")}
            parts.append(dpo_loss(*(x[row] for x in logps), **one).losses)
        if not torch.allclose(whole.mean(), torch.cat(parts).mean(), rtol=1e-12):
            depends_on_others.add(name)
    assert depends_on_others == BATCH_LOSSES


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "sigmod"}, "loss_type must be one of .*'sigmod'; did you mean 'sigmoid'"),
        ({"loss_type": "simpo"}, "use simpo_loss"),
        ({"loss_type": None}, "loss_type must be a name of .*got None"),
        ({"loss_type": 3}, "loss_type must be a name of .*got 3"),
        ({"loss_weights": 2.0}, "loss_weights must be a sequence of numbers.* got 2.0"),
        ({"beta": True}, "beta must be a positive finite number, got True"),
        ({"rpo_alpha": -1.0}, "rpo_alpha must be a finite number of at least 0, got -1.0"),
        ({"loss_type": []}, "loss_type must name at least one"),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, "loss_weights must have one weight for each"),
        ({"loss_weights": [math.nan]}, "loss_weights must be finite numbers, got nan"),
        ({"beta": 0.0}, "beta must be a positive finite number, got 0.0"),
        ({"beta": math.inf}, "beta must be a positive finite number, got inf"),
        ({"beta": torch.tensor(0.1)}, "beta must be a positive finite number, got tensor"),
        ({"discopop_tau": -1}, "discopop_tau must be a positive finite number, got -1"),
        ({"f_alpha": math.nan}, "f_alpha must be a finite number, got nan"),
        ({"label_smoothing": 0.1}, "label_smoothing must be 0 for loss_type 'sigmoid'.*'cdpo'.*'robust'"),
        ({"loss_type": "robust", "label_smoothing": 0.5}, r"label_smoothing must be a number in \[0, 0.5\), got 0.5"),
        ({"loss_type": "cdpo", "label_smoothing": -0.1}, r"label_smoothing must be a number in \[0, 0.5\), got -0.1"),
        ({"loss_type": "exo_pair"}, "label_smoothing must be above 0 for loss_type 'exo_pair'"),
        ({"f_divergence": "js_divergence"}, "f_divergence must be one of .*; did you mean 'js'"),
        ({"f_divergence": "alpha_divergence"}, "f_divergence must be one of .*; did you mean 'alpha'"),
        ({"f_divergence": "js", "loss_type": ["sigmoid", "bco_pair"]}, r"for loss_type \['bco_pair'\], got 'js'"),
        ({"ld_alpha": 1.5}, r"ld_alpha must be None or a number in \[0, 1\], got 1.5"),
        ({"use_weighting": True, "loss_type": "aot"}, "undefined for loss_type 'aot'"),
        ({"use_weighting": True, "loss_type": ["sigmoid", "aot"]}, "undefined for loss_type"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        validate_dpo_options(**options)
    if not options.keys() & {"ld_alpha", "use_weighting"}:
        with pytest.raises(ValueError, match=message):
            dpo_loss(*random_logps(), **options)


def test_valid_options_give_names_and_weights():
    assert validate_dpo_options() == [("sigmoid", 1.0)]
    assert validate_dpo_options(loss_type="hinge", loss_weights=[2]) == [("hinge", 2)]
    assert validate_dpo_options(loss_type=("ipo", "sft"), ld_alpha=0.0) == [("ipo", 1.0), ("sft", 1.0)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rejected_logps": torch.zeros(3)}, r"rejected_logps must have shape \(4,\) as chosen_logps has, got \(3,\)"),
        ({"chosen_logps": torch.zeros(4, 1)}, r"chosen_logps must have shape \[B\], got \(4, 1\)"),
        ({"ref_chosen_logps": torch.zeros(4, dtype=torch.int64)}, "ref_chosen_logps must be floating-point"),
        ({"loss_type": "ipo"}, "chosen_lengths and rejected_lengths are required for loss_type 'ipo'"),
        ({"loss_type": "sigmoid_norm", "chosen_lengths": torch.ones(4)}, "rejected_lengths are required"),
        ({"loss_type": "sft"}, "chosen_lengths or mean_chosen_length is required for loss_type 'sft'"),
        ({"chosen_lengths": torch.ones(3)}, r"chosen_lengths must have shape \(4,\), got \(3,\)"),
        ({"chosen_lengths": torch.ones(4) > 0}, "chosen_lengths must be numbers of tokens, got torch.bool"),
        ({"loss_type": "sft", "mean_chosen_length": torch.ones(4)}, r"mean_chosen_length must be a scalar, got shape"),
        ({"loss_type": "sft", "mean_chosen_length": -1.0}, "mean_chosen_length must be a scalar of at least 0"),
        ({"sft_chosen_logps": torch.zeros(1)}, "sft_chosen_logps must have shape"),
        ({"pair_weights": torch.ones(2)}, r"pair_weights must have shape \(4,\)"),
        ({"pair_weights": torch.ones(4), "loss_type": "aot_unpaired"}, "undefined for loss_type 'aot_unpaired'"),
    ],
)
def test_tensors_that_do_not_fit(change, message):
    names = ("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps")
    with pytest.raises(ValueError, match=message):
        dpo_loss(**(dict(zip(names, random_logps(), strict=True)) | change))


# Around the losses


def test_rpo_adds_the_chosen_likelihood_of_a_token():
    logps, lengths = random_logps(), OPTIONS["chosen_lengths"]
    for loss_type in ("sigmoid", "hinge", ("sigmoid", "sft")):
        more = {"loss_type": loss_type, "beta": BETA, "chosen_lengths": lengths}
        plain, rpo = dpo_loss(*logps, **more), dpo_loss(*logps, rpo_alpha=0.7, **more)
        torch.testing.assert_close(rpo.losses - plain.losses, -0.7 * logps[0] / lengths)
        assert torch.equal(rpo.chosen_rewards, plain.chosen_rewards)
    plain = torch.arange(4, dtype=torch.float64)  # where those of the loss are weighted by token
    rpo = dpo_loss(*logps, rpo_alpha=0.7, beta=BETA, chosen_lengths=lengths, sft_chosen_logps=plain)
    torch.testing.assert_close(rpo.losses - dpo_loss(*logps, beta=BETA).losses, -0.7 * plain / lengths)
    empty = dpo_loss(*[torch.zeros(2)] * 4, rpo_alpha=0.7, chosen_lengths=torch.zeros(2))
    torch.testing.assert_close(empty.losses, torch.full((2,), math.log(2)))
    with pytest.raises(ValueError, match="chosen_lengths are required for rpo_alpha"):
        dpo_loss(*logps, rpo_alpha=1.0)


def test_no_gradient_flows_into_the_reference():
    logps = [row.requires_grad_() for row in random_logps()]
    out = dpo_loss(*logps)
    torch.testing.assert_close(out.loss, out.losses.mean())
    out.loss.backward()
    assert [row.grad is None for row in logps] == [False, False, True, True]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_reference_that_is_not_finite_is_named(value):
    for row, name in ((2, "ref_chosen_logps"), (3, "ref_rejected_logps")):
        logps = random_logps()
        logps[row][2] = value
        with pytest.raises(ValueError, match=rf"{name}: expected finite .* got {value} for pair 2 \(1 such\)"):
            dpo_loss(*logps)


def test_losses_can_be_transformed():
    policy, rejected, *reference = random_logps()
    per_pair = torch.func.vmap(torch.func.grad(lambda w, *rest: dpo_loss(w[None], *(r[None] for r in rest)).loss))
    expected = torch.autograd.grad(dpo_loss(policy.requires_grad_(), rejected, *reference).losses.sum(), policy)
    torch.testing.assert_close(per_pair(policy.detach(), rejected, *reference), expected[0])


def test_names_are_those_of_the_types():
    assert set(LOSSES) == set(get_args(LossType))
    assert set(get_args(Impl)) == {"auto", *dispatch.IMPLEMENTATIONS}


@pytest.mark.parametrize(
    "function, options, besides",
    [
        (linear_sequence_logps, LogpsOptions, {"bias", "logit_scale", "softcap", "shift", "group"}),
        (linear_dpo_loss, LinearDPOOptions, {"bias", "logit_scale", "softcap", "shift", "group"}),
        (
            dpo_loss,
            PairLossOptions,
            {"chosen_lengths", "rejected_lengths", "mean_chosen_length", "sft_chosen_logps", "pair_weights"},
        ),
        (validate_dpo_options, LossOptions, set()),
    ],
)
def test_options_that_are_passed_on_are_those_of_the_function(function, options, besides):
    parameters = inspect.signature(function).parameters.values()
    keywords = {parameter.name: parameter for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}
    assert set(options.__annotations__) | besides == set(keywords)
    for name, annotation in options.__annotations__.items():
        assert annotation.__forward_arg__ == keywords[name].annotation, name


@pytest.mark.parametrize(
    ("unknown", "known"),
    [
        ("f_divergence_type", "f_divergence"),
        ("f_alpha_divergence_coef", "f_alpha"),
        ("label_pad_token_id", "ignore_index"),
        ("lin_weight", "weight"),
        ("_input", "hidden"),
        ("target", "labels"),
    ],
)
def test_unknown_names_of_other_libraries_are_answered(unknown, known):
    assert known in inspect.signature(linear_dpo_loss).parameters
    with pytest.raises(TypeError, match=f"linear_dpo_loss: no argument '{unknown}': it is {known}$"):
        linear_dpo_loss(**{"beta": 0.1, unknown: None})


MODULES = [
    DPOLoss(beta=0.3, loss_type="ipo"),
    DPOLoss(),
    DPOLoss(loss_type=("sigmoid", "sft"), loss_weights=(1.0, 0.5), rpo_alpha=0.2),
]


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_modules_are_the_functions(module):
    lengths = {key: OPTIONS[key] for key in ("chosen_lengths", "rejected_lengths")}
    expected = dpo_loss(*random_logps(), **module.options, **lengths)
    for mine, other in zip(module(*random_logps(), **lengths), expected, strict=True):
        assert torch.equal(mine, other)


def test_the_linear_module_is_the_function():
    inputs = head_inputs(4, 6)
    module = LinearDPOLoss(beta=0.3, softcap=20.0, ld_alpha=0.5, chunk_bytes=0)
    given = inputs.hidden, inputs.weight, inputs.labels, inputs.ref_logps
    expected = linear_dpo_loss(*given, bias=inputs.bias, beta=0.3, softcap=20.0, ld_alpha=0.5, chunk_bytes=0)
    assert torch.equal(module(*given, inputs.bias).loss, expected.loss)
    assert "beta=0.3" in repr(module) and not list(module.parameters())


def test_modules_give_on_all_that_they_are_given():
    """Each option and each argument is another than the default, and matters."""
    weights = torch.tensor([0.5, 2.0, 0.0, 1.0])
    given = {key: OPTIONS[key] for key in ("chosen_lengths", "rejected_lengths")}
    given |= {"mean_chosen_length": 2.5, "pair_weights": weights}
    options = {"loss_type": ("ipo", "sft"), "beta": 0.3}
    expected = dpo_loss(*random_logps(), **options, **given)
    assert torch.equal(DPOLoss(**options)(*random_logps(), **given).losses, expected.losses)
    inputs = head_inputs(8, 6)
    labels = inputs.labels.masked_fill(inputs.labels == -100, -1)
    options |= {"logit_scale": 0.5, "softcap": 20.0, "temperature": 1.5, "ignore_index": -1, "shift": True}
    options |= {"ld_alpha": 0.5, "differentiable": ("logps",)}
    given = {"token_weights": torch.rand(8, 6), "lengths": torch.arange(1.0, 9.0)}
    given |= {"mean_chosen_length": 2.5, "pair_weights": weights}
    tensors = inputs.hidden, inputs.weight, labels, inputs.ref_logps
    mine = LinearDPOLoss(**options)(*tensors, inputs.bias, **given)
    expected = linear_dpo_loss(*tensors, bias=inputs.bias, **options, **given)
    assert torch.equal(mine.loss, expected.loss) and torch.equal(mine.losses, expected.losses)
    assert torch.autograd.grad(mine.logps.sum(), inputs.weight)[0].any()


@pytest.mark.parametrize("make", [DPOLoss, LinearDPOLoss])
def test_modules_check_their_options_when_they_are_made(make):
    with pytest.raises(ValueError, match="beta must be a positive finite number, got -1"):
        make(beta=-1)
    with pytest.raises(TypeError, match=f"{make.__name__}: no argument 'betta'; did you mean 'beta'?"):
        make(betta=0.1)
    with pytest.raises(TypeError, match=f"{make.__name__}: no argument 'reference_free': .* zeros"):
        make(reference_free=True)
    for name in {"shift", "use_weighting"} if make is LinearDPOLoss else ():
        with pytest.raises(ValueError, match=f"{name}: expected True or False, got 'no'"):
            make(**{name: "no"})
