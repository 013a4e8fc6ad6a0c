"""Preference losses on vectors of sequence log-probabilities: DPO and its variants, SimPO, ORPO, CPO and KTO.

Notation of the docstrings, for one pair with the chosen response y_w and the rejected response y_l:

    r_w, r_l    log pi(y) - log pi_ref(y), the log-ratio of policy to reference
    s_w, s_l    f'(exp(r)), the score that an f-divergence makes of the log-ratio; s = r for reverse_kl, which is DPO
    h           beta * (s_w - s_l), the margin
    sigma, L    the logistic function, and L(h) = -log sigma(h) = log(1 + exp(-h))
    eps         label_smoothing, the assumed share of pairs whose two labels are swapped

Everything is computed in fp32, or in fp64 where an input is fp64, and without a device synchronisation: what is
checked is shapes and Python numbers, and values of a tensor only on the CPU. The file is long because the formulas
stand side by side in one notation.
"""

from __future__ import annotations

import difflib
import functools
import math
import numbers
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_kernels.options import FDivergence, LossType, explain_unknown, is_at_hand, is_finite

if TYPE_CHECKING:
    from dpo_kernels.sequence_parallel import Whole

F_DIVERGENCES: tuple[FDivergence, ...] = get_args(FDivergence)

# The f-DPO reparameterization leaves a term in log Z(x) that cancels only in the difference of the two scores.
F_DIVERGENCE_LOSSES = frozenset(
    {"sigmoid", "cdpo", "robust", "hinge", "ipo", "exo_pair", "discopop", "sft", "sigmoid_norm", "plackett_luce"}
)
SMOOTHED_LOSSES = frozenset({"cdpo", "robust", "exo_pair", "aot", "aot_unpaired"})
LENGTH_NORMALIZED_LOSSES = frozenset({"ipo", "sigmoid_norm"})
# Of rankings, one loss a group: in `linear_dpo_loss` with `pairs`, and `dpo_kernels.listwise`.
LISTWISE_LOSSES = frozenset({"plackett_luce"})
# These sort across the batch, so they are no mean over pairs; every other loss is.
BATCH_LOSSES = frozenset({"aot", "aot_unpaired"})

# exp(x) goes on along its tangent from here. Log-ratios of +-1e4 then stay finite in fp32 even squared, as ipo does
# (exp(30) * 1e4 = 1e17), and unlike under a clamp the gradient keeps its sign: a clamp stops training on exactly the
# pairs that need it most. Below the limit nothing changes.
EXP_LIMIT = 30.0
# Odds p / (1 - p) are exact for log p up to minus this and go on along the tangent of their logarithm above it.
MIN_LOGP_GAP = 1e-6


class PreferenceLoss(NamedTuple):
    """losses [B] carry the gradient; chosen_rewards [B] and rejected_rewards [B] are detached."""

    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor

    @property
    def loss(self) -> Tensor:
        """[] their mean, which is what to minimise."""
        return self.losses.mean()


class KTOLoss(NamedTuple):
    """losses [S] carry the gradient; rewards [S] and kl [] are detached."""

    losses: Tensor
    rewards: Tensor
    kl: Tensor

    @property
    def loss(self) -> Tensor:
        """[] their mean, which is what to minimise."""
        return self.losses.mean()


class Pairs(NamedTuple):
    """What a loss of `LOSSES` sees: tensors [B] of one floating-point type, and the options that enter formulas."""

    chosen_logps: Tensor
    rejected_logps: Tensor
    ref_chosen_logps: Tensor
    ref_rejected_logps: Tensor
    chosen_logratios: Tensor  # r_w
    rejected_logratios: Tensor  # r_l
    chosen_scores: Tensor  # s_w
    rejected_scores: Tensor  # s_l
    margins: Tensor  # h
    beta: float
    label_smoothing: float  # eps
    discopop_tau: float
    chosen_lengths: Tensor | None  # in tokens
    rejected_lengths: Tensor | None
    mean_chosen_length: Tensor | float | None
    sft_chosen_logps: Tensor
    rpo_alpha: float | None


class _LogisticLoss(torch.autograd.Function):
    """L(h) = log(1 + exp(-h)) with dL/dh = -sigma(-h), which neither overflows nor cancels for any finite h."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        ctx.save_for_backward(h)
        return -F.logsigmoid(h)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:
        # Written in differentiable operations on h, so that a second derivative is right too.
        (h,) = ctx.saved_tensors
        return logistic_slope(h) * grad_output


class _TransformedLogisticLoss(torch.autograd.Function):
    """The same for `torch.func`, whose form of a function costs the host ten times as much."""

    generate_vmap_rule = True

    @staticmethod
    def forward(h: Tensor) -> Tensor:
        return -F.logsigmoid(h)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    backward = _LogisticLoss.backward


def logistic_loss(h: Tensor) -> Tensor:
    """L(h) = -log sigma(h), elementwise."""
    plain = torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active()
    if plain and not h.requires_grad:
        return -F.logsigmoid(h)
    return (_LogisticLoss if plain else _TransformedLogisticLoss).apply(h)


def logistic_slope(h: Tensor) -> Tensor:
    """dL/dh = -sigma(-h)."""
    return -torch.sigmoid(-h)


def _smoothed_logistic_loss(h: Tensor, label_smoothing: float) -> Tensor:
    return (1 - label_smoothing) * logistic_loss(h) + label_smoothing * logistic_loss(-h)


def _sigmoid(x: Tensor) -> Tensor:
    """sigma(x) through its logarithm: autograd has y (1 - y) for torch.sigmoid, which in fp32 is 0 from x = 17 on."""
    return torch.exp(F.logsigmoid(x))


def _exp(x: Tensor) -> Tensor:
    """exp(x), continued along its tangent above EXP_LIMIT."""
    return torch.exp(x.clamp(max=EXP_LIMIT)) + math.exp(EXP_LIMIT) * torch.relu(x - EXP_LIMIT)


def _expm1(x: Tensor) -> Tensor:
    """exp(x) - 1, continued likewise; expm1 only near 0, since its derivative y + 1 cancels for x far below."""
    return torch.where(x.abs() < 1, torch.expm1(x.clamp(-1, 1)), _exp(x) - 1)


def log_odds(logps: Tensor) -> Tensor:
    """log(p / (1 - p)) of log p, continued along its tangent above -MIN_LOGP_GAP, so that p = 1 stays finite."""
    log1mexp = torch.log(-torch.expm1(logps.clamp(max=-MIN_LOGP_GAP)))
    return logps - log1mexp + torch.relu(logps + MIN_LOGP_GAP) / math.expm1(MIN_LOGP_GAP)


def _token_nll(chosen_logps: Tensor, mean_chosen_length: Tensor | float) -> Tensor:
    """-log pi(y_w) / mean length: its mean over the pairs is the negative log-likelihood of a chosen token."""
    # Where no chosen token is labelled the log-probabilities are 0: any positive divisor gives 0 instead of NaN.
    if not isinstance(mean_chosen_length, Tensor):
        _check_number("mean_chosen_length", mean_chosen_length, "a scalar of at least 0", lambda x: 0 <= x < math.inf)
        return -chosen_logps / max(mean_chosen_length, 1e-6)
    if mean_chosen_length.dim() != 0:
        raise ValueError(f"mean_chosen_length must be a scalar, got shape {tuple(mean_chosen_length.shape)}")
    if is_at_hand(mean_chosen_length) and not 0 <= mean_chosen_length < math.inf:
        raise ValueError(f"mean_chosen_length must be a scalar of at least 0, got {mean_chosen_length.item()}")
    return -chosen_logps / mean_chosen_length.to(chosen_logps.dtype).clamp(min=1e-6)


def _per_token_margins(p: Pairs) -> Tensor:
    assert p.chosen_lengths is not None and p.rejected_lengths is not None
    # An empty response has the score 0, and 0 / 1 keeps it so.
    return p.chosen_scores / p.chosen_lengths.clamp(min=1) - p.rejected_scores / p.rejected_lengths.clamp(min=1)


def f_divergence_scores(logratios: Tensor, f_divergence: FDivergence, f_alpha: float = 0.5) -> Tensor:
    """f'(u) at u = exp(logratios): what f-DPO (arXiv 2309.16240) puts where DPO has log u.

    reverse_kl    log u
    forward_kl    1 - 1/u
    js            log(2u / (1 + u))
    alpha         (u^(a-1) - 1) / (a - 1) with a = f_alpha. This is the paper's alpha-divergence at alpha = 1 - a; it is
                  forward_kl at a = 0, and its limit at a = 1 is reverse_kl.

    Exponentials go on along their tangent where the exponent exceeds `EXP_LIMIT`.
    """
    _check_name("f_divergence", f_divergence, F_DIVERGENCES)
    if f_divergence == "js":
        return math.log(2) + F.logsigmoid(logratios)
    exponent = {"reverse_kl": 0.0, "forward_kl": -1.0, "alpha": f_alpha - 1.0}[f_divergence]
    if exponent == 0.0:
        return logratios
    return _expm1(exponent * logratios) / exponent


def sigmoid_loss(p: Pairs) -> Tensor:
    """DPO: L(h). arXiv 2305.18290, Eq. 7."""
    return logistic_loss(p.margins)


def cdpo_loss(p: Pairs) -> Tensor:
    """Conservative DPO: (1 - eps) L(h) + eps L(-h).

    E. Mitchell, "A note on DPO with noisy preferences & relationship to IPO" (2023), Eq. 3.
    """
    return _smoothed_logistic_loss(p.margins, p.label_smoothing)


def robust_loss(p: Pairs) -> Tensor:
    """Robust DPO: [(1 - eps) L(h) - eps L(-h)] / (1 - 2 eps), whose mean over swapped labels is L(h).

    arXiv 2403.00409, Section 3.1.
    """
    clean, swapped = logistic_loss(p.margins), logistic_loss(-p.margins)
    return ((1 - p.label_smoothing) * clean - p.label_smoothing * swapped) / (1 - 2 * p.label_smoothing)


def hinge_loss(p: Pairs) -> Tensor:
    """SLiC's hinge loss on the DPO margin: max(0, 1 - h). arXiv 2305.10425, Section 2; arXiv 2309.06657."""
    return torch.relu(1 - p.margins)


def ipo_loss(p: Pairs) -> Tensor:
    """IPO: (s_w / |y_w| - s_l / |y_l| - 1 / (2 beta))^2, where beta is the paper's tau. arXiv 2310.12036, Eq. 17.

    The paper writes sums; dividing by the lengths in tokens is how its authors ran it, and what TRL does.
    """
    return (_per_token_margins(p) - 1 / (2 * p.beta)) ** 2


def exo_pair_loss(p: Pairs) -> Tensor:
    """EXO for pairs: KL(q || [1 - eps, eps]) with q = [sigma(h), sigma(-h)]. arXiv 2402.00856, Eq. 16."""
    log_chosen, log_rejected = F.logsigmoid(p.margins), F.logsigmoid(-p.margins)
    chosen = log_chosen.exp() * (log_chosen - math.log1p(-p.label_smoothing))
    return chosen + log_rejected.exp() * (log_rejected - math.log(p.label_smoothing))


def nca_pair_loss(p: Pairs) -> Tensor:
    """NCA for pairs: L(beta r_w) + L(-beta r_w) / 2 + L(-beta r_l) / 2. arXiv 2402.05369, Section 4.1."""
    chosen, rejected = p.beta * p.chosen_logratios, p.beta * p.rejected_logratios
    return logistic_loss(chosen) + 0.5 * logistic_loss(-chosen) + 0.5 * logistic_loss(-rejected)


def bco_pair_loss(p: Pairs) -> Tensor:
    """BCO for pairs, without its reward shift: L(beta r_w) + L(-beta r_l). arXiv 2404.04656, Theorem 1."""
    return logistic_loss(p.beta * p.chosen_logratios) + logistic_loss(-p.beta * p.rejected_logratios)


def sppo_hard_loss(p: Pairs) -> Tensor:
    """SPPO with win probabilities 1 and 0: (r_w - 1/(2 beta))^2 + (r_l + 1/(2 beta))^2. arXiv 2405.00675, Eq. 4.7."""
    target = 0.5 / p.beta
    return (p.chosen_logratios - target) ** 2 + (p.rejected_logratios + target) ** 2


def aot_loss(p: Pairs) -> Tensor:
    """AOT on pairs: (1 - eps) L(d) + eps L(-d), where d is beta times the difference of order statistics

        sort(log pi(y_w) - log pi(y_l)) - sort(log pi_ref(y_w) - log pi_ref(y_l))

    over the batch, so entry i belongs to rank i and not to pair i. arXiv 2406.05882, Section 3.
    """
    policy, reference = p.chosen_logps - p.rejected_logps, p.ref_chosen_logps - p.ref_rejected_logps
    return _smoothed_logistic_loss(p.beta * (policy.sort().values - reference.sort().values), p.label_smoothing)


def aot_unpaired_loss(p: Pairs) -> Tensor:
    """AOT on two unpaired samples: as `aot` with d = beta (sort(r_w) - sort(r_l)). arXiv 2406.05882, Section 3."""
    chosen, rejected = p.chosen_logratios.sort().values, p.rejected_logratios.sort().values
    return _smoothed_logistic_loss(p.beta * (chosen - rejected), p.label_smoothing)


def apo_zero_loss(p: Pairs) -> Tensor:
    """APO-zero: 1 - sigma(beta r_w) + sigma(beta r_l). arXiv 2408.06266, Eq. 7.

    Raises chosen and lowers rejected: for chosen responses that are better than the model's own.
    """
    return _sigmoid(-p.beta * p.chosen_logratios) + _sigmoid(p.beta * p.rejected_logratios)


def apo_down_loss(p: Pairs) -> Tensor:
    """APO-down: sigma(beta r_w) + 1 - sigma(beta (r_w - r_l)). arXiv 2408.06266, Eq. 8.

    Lowers both, rejected more: for chosen responses that are worse than the model's own.
    """
    return _sigmoid(p.beta * p.chosen_logratios) + _sigmoid(-p.beta * (p.chosen_logratios - p.rejected_logratios))


def discopop_loss(p: Pairs) -> Tensor:
    """DiscoPOP (log-ratio modulated loss): (1 - m) L(h) + m exp(-h) with m = sigma(h / tau). arXiv 2406.08414, Eq. 5.

    exp(-h) m is one exponential of -h + log m, which for tau <= 1 is never positive; for tau > 1 it continues along
    its tangent above `EXP_LIMIT`.
    """
    exponential = _exp(F.logsigmoid(p.margins / p.discopop_tau) - p.margins)
    return _sigmoid(-p.margins / p.discopop_tau) * logistic_loss(p.margins) + exponential


def sft_loss(p: Pairs) -> Tensor:
    """Negative log-likelihood of a chosen token: -log pi(y_w) / mean over the batch of |y_w|.

    The mean over the pairs is the mean over all chosen tokens: the generation loss of MPO, arXiv 2411.10442.
    """
    assert p.mean_chosen_length is not None
    return _token_nll(p.sft_chosen_logps, p.mean_chosen_length)


def sigmoid_norm_loss(p: Pairs) -> Tensor:
    """Length-normalized DPO: L(beta (s_w / |y_w| - s_l / |y_l|)). arXiv 2411.15124 (Tulu 3), Section 5."""
    return logistic_loss(p.beta * _per_token_margins(p))


def plackett_luce_of_pair(p: Pairs) -> Tensor:
    """Plackett-Luce DPO of two answers, which is DPO: L(h). arXiv 2305.18290, Appendix A.3; of more answers it is
    `plackett_luce_loss`."""
    return logistic_loss(p.margins)


def rpo_term(p: Pairs) -> Tensor:
    """rpo_alpha times the negative log-likelihood of the chosen response's tokens, -log pi(y_w) / |y_w|, which RPO adds
    to the loss. arXiv 2404.19733, Eq. 1."""
    assert p.chosen_lengths is not None and p.rpo_alpha is not None
    return -p.rpo_alpha * p.sft_chosen_logps / p.chosen_lengths.clamp(min=1)


LOSSES: dict[LossType, Callable[[Pairs], Tensor]] = {
    "sigmoid": sigmoid_loss,
    "cdpo": cdpo_loss,
    "robust": robust_loss,
    "hinge": hinge_loss,
    "ipo": ipo_loss,
    "exo_pair": exo_pair_loss,
    "nca_pair": nca_pair_loss,
    "bco_pair": bco_pair_loss,
    "sppo_hard": sppo_hard_loss,
    "aot": aot_loss,
    "aot_unpaired": aot_unpaired_loss,
    "apo_zero": apo_zero_loss,
    "apo_down": apo_down_loss,
    "discopop": discopop_loss,
    "sft": sft_loss,
    "sigmoid_norm": sigmoid_norm_loss,
    "plackett_luce": plackett_luce_of_pair,
}


def loss_names(loss_type: LossType | Sequence[LossType]) -> list[LossType]:
    return [loss_type] if isinstance(loss_type, str) else list(loss_type)


def weighted_losses(
    loss_type: LossType | Sequence[LossType], loss_weights: Sequence[float] | None
) -> list[tuple[LossType, float]]:
    """Of options that are checked."""
    names = loss_names(loss_type)
    return list(zip(names, [1.0] * len(names) if loss_weights is None else loss_weights, strict=True))


def validate_dpo_options(
    *,
    beta: float = 0.1,
    loss_type: LossType | Sequence[LossType] = "sigmoid",
    loss_weights: Sequence[float] | None = None,
    label_smoothing: float = 0.0,
    f_divergence: FDivergence = "reverse_kl",
    f_alpha: float = 0.5,
    discopop_tau: float = 0.05,
    rpo_alpha: float | None = None,
    ld_alpha: float | None = None,
    use_weighting: bool = False,
) -> list[tuple[LossType, float]]:
    """Check the options of `dpo_loss` without any tensor, and return the losses as (name, weight).

    `ld_alpha` and `use_weighting` (WPO) are options of the callers that hold tokens; they are checked here with the
    rest. Raises ValueError naming the option, what it may be and what it was.
    """
    if not isinstance(loss_type, (str, Sequence)):
        raise ValueError(f"loss_type must be a name of {list(LOSSES)} or a sequence of names, got {loss_type!r}")
    names = loss_names(loss_type)
    if not names:
        raise ValueError(f"loss_type must name at least one loss of {list(LOSSES)}, got {loss_type!r}")
    for name in names:
        _check_name("loss_type", name, LOSSES)
    if loss_weights is not None and (isinstance(loss_weights, str) or not isinstance(loss_weights, Sequence)):
        raise ValueError(f"loss_weights must be a sequence of numbers, one for each of {names}, got {loss_weights!r}")
    weights = [1.0] * len(names) if loss_weights is None else list(loss_weights)
    if len(weights) != len(names):
        raise ValueError(f"loss_weights must have one weight for each of {names}, got {loss_weights!r}")
    for weight in weights:
        _check_number("loss_weights", weight, "finite numbers", _is_finite)

    _check_positive("beta", beta)
    _check_positive("discopop_tau", discopop_tau)
    _check_number("f_alpha", f_alpha, "a finite number", _is_finite)
    if rpo_alpha is not None:
        _check_weight("rpo_alpha", rpo_alpha)
    _check_smoothing(label_smoothing)
    if "exo_pair" in names and label_smoothing == 0:
        raise ValueError("label_smoothing must be above 0 for loss_type 'exo_pair' (its paper uses 1e-3), got 0")
    if label_smoothing != 0 and SMOOTHED_LOSSES.isdisjoint(names):
        raise ValueError(
            f"label_smoothing must be 0 for loss_type {loss_type!r}, which ignores it, got {label_smoothing!r}; "
            "the smoothed forms of 'sigmoid' are 'cdpo' (conservative) and 'robust' (unbiased)"
        )
    _check_name("f_divergence", f_divergence, F_DIVERGENCES)
    if f_divergence != "reverse_kl" and not F_DIVERGENCE_LOSSES.issuperset(names):
        raise ValueError(
            f"f_divergence must be 'reverse_kl' for loss_type {sorted(set(names) - F_DIVERGENCE_LOSSES)}, got "
            f"{f_divergence!r}; the others are defined for {sorted(F_DIVERGENCE_LOSSES)}"
        )
    if ld_alpha is not None:
        _check_number("ld_alpha", ld_alpha, "None or a number in [0, 1]", lambda x: 0 <= x <= 1)
    if use_weighting and not BATCH_LOSSES.isdisjoint(names):
        raise ValueError(f"weights per pair (WPO) are undefined for loss_type {loss_type!r}, which sorts the batch")
    return weighted_losses(loss_type, loss_weights)


@explain_unknown
def dpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
    loss_type: LossType | Sequence[LossType] = "sigmoid",
    loss_weights: Sequence[float] | None = None,
    label_smoothing: float = 0.0,
    f_divergence: FDivergence = "reverse_kl",
    f_alpha: float = 0.5,
    discopop_tau: float = 0.05,
    rpo_alpha: float | None = None,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    mean_chosen_length: Tensor | float | None = None,
    sft_chosen_logps: Tensor | None = None,
    pair_weights: Tensor | None = None,
) -> PreferenceLoss:
    """The DPO loss of each pair, or one of its variants, or a weighted sum of several.

    With the defaults this is

        h = beta * ((chosen_logps - ref_chosen_logps) - (rejected_logps - ref_rejected_logps))
        losses = -F.logsigmoid(h)

    Args:
        chosen_logps, rejected_logps: [B], log pi(y|x) summed over the response, in nats; any floating-point type.
        ref_chosen_logps, ref_rejected_logps: [B], the same under the reference. No gradient goes into them. For no
            reference, zeros.
        beta: strength of the leash to the reference.
        loss_type: a name of `LOSSES`, whose function gives formula and paper, or several names.
        loss_weights: one weight a name; None is 1 for each.
        label_smoothing: eps, for the losses of `SMOOTHED_LOSSES`; in [0, 0.5), above 0 for exo_pair.
        f_divergence, f_alpha: see `f_divergence_scores`; other than reverse_kl for `F_DIVERGENCE_LOSSES` alone.
        discopop_tau: tau of discopop.
        rpo_alpha: at least 0, the weight of the chosen response's negative log-likelihood a token, which RPO adds
            (arXiv 2404.19733, Eq. 1); each pair's own length divides. For one mean over all chosen tokens of the batch,
            as some trainers have it, take loss_type ("sigmoid", "sft") and loss_weights.
        chosen_lengths, rejected_lengths: [B], labelled tokens of each response; needed by ipo, sigmoid_norm and sft,
            chosen_lengths by rpo_alpha.
        mean_chosen_length: scalar, what sft divides by: the mean of chosen_lengths over the whole batch, for a caller
            that passes a part of it; None takes the mean of chosen_lengths.
        sft_chosen_logps: [B], what sft and rpo_alpha use in place of chosen_logps where those are weighted by token.
        pair_weights: [B], multiplies the losses (see `wpo_weights`) and is not divided out again; no gradient goes
            through. A mean over pairs that count differently is the caller's to take, as `linear_dpo_loss` does.

    Returns:
        PreferenceLoss, in fp32, or fp64 where an input is. Rewards are beta * r whatever the loss or the f-divergence.

    Raises:
        ValueError: an option outside its range, lengths missing, shapes that differ, or, on the CPU, log-probabilities
            of the reference that are not finite.
        TypeError: an argument that there is not; the message says what to write instead.
    """
    for name, logps in (("ref_chosen_logps", ref_chosen_logps), ("ref_rejected_logps", ref_rejected_logps)):
        check_finite_logps(name, logps, "pair")
    if isinstance(pair_weights, Tensor) and is_at_hand(pair_weights) and not _are_weights(pair_weights):
        raise ValueError(f"pair_weights must be finite and at least 0, got {pair_weights.tolist()}")
    losses_and_weights = validate_dpo_options(
        beta=beta,
        loss_type=loss_type,
        loss_weights=loss_weights,
        label_smoothing=label_smoothing,
        f_divergence=f_divergence,
        f_alpha=f_alpha,
        discopop_tau=discopop_tau,
        rpo_alpha=rpo_alpha,
        use_weighting=pair_weights is not None,
    )
    return losses_of_pairs(
        chosen_logps,
        rejected_logps,
        ref_chosen_logps,
        ref_rejected_logps,
        beta=beta,
        losses_and_weights=losses_and_weights,
        label_smoothing=label_smoothing,
        f_divergence=f_divergence,
        f_alpha=f_alpha,
        discopop_tau=discopop_tau,
        rpo_alpha=rpo_alpha,
        chosen_lengths=chosen_lengths,
        rejected_lengths=rejected_lengths,
        mean_chosen_length=mean_chosen_length,
        sft_chosen_logps=sft_chosen_logps,
        pair_weights=pair_weights,
    )


def losses_of_pairs(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float,
    losses_and_weights: Sequence[tuple[LossType, float]],
    label_smoothing: float,
    f_divergence: FDivergence,
    f_alpha: float,
    discopop_tau: float,
    rpo_alpha: float | None,
    chosen_lengths: Tensor | None,
    rejected_lengths: Tensor | None,
    mean_chosen_length: Tensor | float | None,
    sft_chosen_logps: Tensor | None,
    pair_weights: Tensor | None,
) -> PreferenceLoss:
    """`dpo_loss` of options that are checked, as `validate_dpo_options` returns them."""
    chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps = _as_vectors(
        chosen_logps=chosen_logps,
        rejected_logps=rejected_logps,
        ref_chosen_logps=ref_chosen_logps,
        ref_rejected_logps=ref_rejected_logps,
    )
    pairs = compared(
        chosen_logps,
        rejected_logps,
        ref_chosen_logps.detach(),
        ref_rejected_logps.detach(),
        beta=beta,
        losses_and_weights=losses_and_weights,
        label_smoothing=label_smoothing,
        f_divergence=f_divergence,
        f_alpha=f_alpha,
        discopop_tau=discopop_tau,
        rpo_alpha=rpo_alpha,
        chosen_lengths=chosen_lengths,
        rejected_lengths=rejected_lengths,
        mean_chosen_length=mean_chosen_length,
        sft_chosen_logps=sft_chosen_logps,
    )
    return losses_of(pairs, losses_and_weights, pair_weights)


def compared(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float,
    losses_and_weights: Sequence[tuple[LossType, float]],
    label_smoothing: float,
    f_divergence: FDivergence,
    f_alpha: float,
    discopop_tau: float,
    rpo_alpha: float | None,
    chosen_lengths: Tensor | None,
    rejected_lengths: Tensor | None,
    mean_chosen_length: Tensor | float | None,
    sft_chosen_logps: Tensor | None,
) -> Pairs:
    """What these losses see of vectors [B] of one type, the reference's without a graph, whatever the numbers are: what
    is not finite goes on."""
    if chosen_lengths is not None:
        chosen_lengths = _as_lengths("chosen_lengths", chosen_lengths, chosen_logps)
    if rejected_lengths is not None:
        rejected_lengths = _as_lengths("rejected_lengths", rejected_lengths, chosen_logps)
    for name, _ in losses_and_weights:
        if name in LENGTH_NORMALIZED_LOSSES and (chosen_lengths is None or rejected_lengths is None):
            raise ValueError(f"chosen_lengths and rejected_lengths are required for loss_type {name!r}, got None")
        if name == "sft" and chosen_lengths is None and mean_chosen_length is None:
            raise ValueError("chosen_lengths or mean_chosen_length is required for loss_type 'sft', got None")
    if rpo_alpha is not None and chosen_lengths is None:
        raise ValueError("chosen_lengths are required for rpo_alpha, got None")
    if (
        mean_chosen_length is None
        and chosen_lengths is not None
        and any(name == "sft" for name, _ in losses_and_weights)
    ):
        mean_chosen_length = chosen_lengths.mean()
    if sft_chosen_logps is None:
        sft_chosen_logps = chosen_logps
    else:
        _, sft_chosen_logps = _as_vectors(chosen_logps=chosen_logps, sft_chosen_logps=sft_chosen_logps)

    chosen_logratios = chosen_logps - ref_chosen_logps
    rejected_logratios = rejected_logps - ref_rejected_logps
    chosen_scores = f_divergence_scores(chosen_logratios, f_divergence, f_alpha)
    rejected_scores = f_divergence_scores(rejected_logratios, f_divergence, f_alpha)
    return Pairs(
        chosen_logps=chosen_logps,
        rejected_logps=rejected_logps,
        ref_chosen_logps=ref_chosen_logps,
        ref_rejected_logps=ref_rejected_logps,
        chosen_logratios=chosen_logratios,
        rejected_logratios=rejected_logratios,
        chosen_scores=chosen_scores,
        rejected_scores=rejected_scores,
        margins=beta * (chosen_scores - rejected_scores),
        beta=beta,
        label_smoothing=label_smoothing,
        discopop_tau=discopop_tau,
        chosen_lengths=chosen_lengths,
        rejected_lengths=rejected_lengths,
        mean_chosen_length=mean_chosen_length,
        sft_chosen_logps=sft_chosen_logps,
        rpo_alpha=rpo_alpha,
    )


def losses_of(
    pairs: Pairs, losses_and_weights: Sequence[tuple[LossType, float]], pair_weights: Tensor | None
) -> PreferenceLoss:
    terms = (
        LOSSES[name](pairs) if weight == 1 else weight * LOSSES[name](pairs) for name, weight in losses_and_weights
    )
    losses = functools.reduce(operator.add, terms)
    if pairs.rpo_alpha is not None:
        losses = losses + rpo_term(pairs)
    if pair_weights is not None:
        _, pair_weights = _as_vectors(chosen_logps=pairs.chosen_logps, pair_weights=pair_weights)
        losses = losses * pair_weights.detach()
    rewards = (pairs.beta * logratios.detach() for logratios in (pairs.chosen_logratios, pairs.rejected_logratios))
    return PreferenceLoss(losses, *rewards)


@explain_unknown
def simpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    *,
    chosen_lengths: Tensor | Literal[1],
    rejected_lengths: Tensor | Literal[1],
    beta: float = 2.0,
    gamma: float = 0.5,
    label_smoothing: float = 0.0,
) -> PreferenceLoss:
    """SimPO: L(h) with h = beta (a_w - a_l) - gamma, a = log pi(y) / |y|. arXiv 2405.14734, Eq. 6.

    `gamma` is the paper's target reward margin: it stands inside the sigmoid and is not multiplied by beta. TRL's
    `simpo_gamma` is the same number (it subtracts gamma / beta before multiplying by beta); the `gamma_beta_ratio` of
    the authors' code is gamma / beta.

    Args:
        chosen_logps, rejected_logps: [B], log pi(y|x) summed over the response, in nats.
        chosen_lengths, rejected_lengths: [B], in tokens, what the sums are divided by; 1 where they are averages over
            the response's tokens already.
        beta, gamma: the paper has beta from 2 to 2.5 and gamma from 0.3 to 1.6.
        label_smoothing: eps in [0, 0.5): (1 - eps) L(h) + eps L(-h), as for cdpo.

    Returns:
        PreferenceLoss, with rewards beta * a.
    """
    _check_positive("beta", beta)
    _check_number("gamma", gamma, "a finite number", _is_finite)
    _check_smoothing(label_smoothing)
    chosen, rejected = _length_averages(chosen_logps, rejected_logps, chosen_lengths, rejected_lengths)
    losses = _smoothed_logistic_loss(beta * (chosen - rejected) - gamma, label_smoothing)
    return PreferenceLoss(losses, beta * chosen.detach(), beta * rejected.detach())


@explain_unknown
def orpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    *,
    chosen_lengths: Tensor | Literal[1],
    rejected_lengths: Tensor | Literal[1],
    beta: float = 0.1,
) -> PreferenceLoss:
    """ORPO: -a_w + beta L(log odds(y_w) - log odds(y_l)), odds(y) = e^a / (1 - e^a), a = log pi(y) / |y|.

    arXiv 2403.07691, Eqs. 4 to 7, where beta is called lambda. The first term is the negative log-likelihood of the
    chosen response, averaged over its tokens, then over the pairs; TRL's trainer averages over all tokens of the
    batch, those of the prompt included. For a above -1e-6 the log odds continue along their tangent, so that a
    probability that rounds to 1 gives a finite loss and gradient.

    Args:
        chosen_logps, rejected_logps: [B], log pi(y|x) summed over the response, in nats.
        chosen_lengths, rejected_lengths: [B], in tokens, what the sums are divided by; 1 where they are averages over
            the response's tokens already.
        beta: weight of the odds-ratio term.

    Returns:
        PreferenceLoss, with rewards beta * a.
    """
    _check_positive("beta", beta)
    chosen, rejected = _length_averages(chosen_logps, rejected_logps, chosen_lengths, rejected_lengths)
    losses = beta * logistic_loss(log_odds(chosen) - log_odds(rejected)) - chosen
    return PreferenceLoss(losses, beta * chosen.detach(), beta * rejected.detach())


@explain_unknown
def cpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    *,
    beta: float = 0.1,
    cpo_alpha: float = 1.0,
    loss_type: Literal["sigmoid", "hinge", "ipo"] = "sigmoid",
    label_smoothing: float = 0.0,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    mean_chosen_length: Tensor | float | None = None,
) -> PreferenceLoss:
    """CPO: a preference term without a reference, plus cpo_alpha times the chosen response's NLL. arXiv 2401.08417.

        sigmoid    (1 - eps) L(h) + eps L(-h), h = beta (log pi(y_w) - log pi(y_l)): Eq. 3 at eps = 0
        hinge      max(0, 1 - h)
        ipo        (log pi(y_w) / |y_w| - log pi(y_l) / |y_l| - 1 / (2 beta))^2

    The paper's NLL is -log pi(y_w), a sum over tokens; without lengths it is that. With chosen_lengths or
    mean_chosen_length it is -log pi(y_w) / mean length, whose mean over the pairs is the mean over all chosen tokens,
    as trainers have it.

    Args:
        chosen_logps, rejected_logps: [B], sums over the response.
        beta, label_smoothing: as for `dpo_loss`; label_smoothing for sigmoid alone.
        cpo_alpha: weight of the NLL, at least 0.
        chosen_lengths, rejected_lengths: [B], in tokens; ipo needs both.
        mean_chosen_length: scalar, as for `dpo_loss`.

    Returns:
        PreferenceLoss, with rewards beta * log pi(y), divided by the length for ipo.
    """
    _check_name("loss_type", loss_type, ("sigmoid", "hinge", "ipo"))
    _check_positive("beta", beta)
    _check_weight("cpo_alpha", cpo_alpha)
    _check_smoothing(label_smoothing)
    if label_smoothing != 0 and loss_type != "sigmoid":
        raise ValueError(f"label_smoothing must be 0 for loss_type {loss_type!r}, got {label_smoothing!r}")
    if loss_type == "ipo" and (chosen_lengths is None or rejected_lengths is None):
        raise ValueError("chosen_lengths and rejected_lengths are required for loss_type 'ipo', got None")
    chosen, rejected = _as_vectors(chosen_logps=chosen_logps, rejected_logps=rejected_logps)
    nll = -chosen
    if rejected_lengths is not None:
        _as_lengths("rejected_lengths", rejected_lengths, rejected)
    if mean_chosen_length is None and chosen_lengths is not None:
        mean_chosen_length = _as_lengths("chosen_lengths", chosen_lengths, chosen).mean()
    if mean_chosen_length is not None:
        nll = _token_nll(chosen, mean_chosen_length)

    if loss_type == "ipo":
        assert chosen_lengths is not None and rejected_lengths is not None
        chosen, rejected = _length_averages(chosen, rejected, chosen_lengths, rejected_lengths)
        losses = (chosen - rejected - 1 / (2 * beta)) ** 2
    elif loss_type == "hinge":
        losses = torch.relu(1 - beta * (chosen - rejected))
    else:
        losses = _smoothed_logistic_loss(beta * (chosen - rejected), label_smoothing)
    return PreferenceLoss(losses + cpo_alpha * nll, beta * chosen.detach(), beta * rejected.detach())


@explain_unknown
def kto_kl(kl_logps: Tensor, ref_kl_logps: Tensor) -> Tensor:
    """KTO's baseline z_0 = max(0, mean(log pi(y') - log pi_ref(y'))) [], detached. arXiv 2402.01306, Section 4.

    kl_logps, ref_kl_logps [S] are the log-probabilities of mismatched responses: each prompt with the response of
    another. Of none (S = 0) it is 0. Over several processes, gather both first: the mean comes before the maximum.
    """
    check_finite_logps("ref_kl_logps", ref_kl_logps, "response")
    kl_logps, ref_kl_logps = _as_vectors(kl_logps=kl_logps, ref_kl_logps=ref_kl_logps)
    logratios = (kl_logps - ref_kl_logps).detach()
    return (logratios.sum() / max(1, len(logratios))).clamp(min=0)


@explain_unknown
def kto_loss(
    logps: Tensor,
    ref_logps: Tensor,
    labels: Tensor,
    *,
    kl: Tensor | float | None = None,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    loss_type: Literal["kto", "apo_zero_unpaired"] = "kto",
) -> KTOLoss:
    """KTO on responses that are each good or bad, not paired. arXiv 2402.01306, Eq. 7.

        good    desirable_weight * (1 - sigma(beta (r - z_0)))
        bad     undesirable_weight * (1 - sigma(beta (z_0 - r)))

    "apo_zero_unpaired" is the same with z_0 = 0: the unpaired form of APO-zero, arXiv 2408.06266, Eq. 7.

    Args:
        logps, ref_logps: [S], log pi(y|x) summed over the response, under the policy and the reference.
        labels: [S] bool, True for a good response.
        kl: scalar z_0, see `kto_kl`; no gradient goes through. Required for "kto" (0.0 leaves the baseline out),
            None for "apo_zero_unpaired".
        beta, desirable_weight, undesirable_weight: the weights are the paper's lambda_D and lambda_U.

    Returns:
        KTOLoss, with losses and rewards beta * r in the order of the inputs; the loss to minimise is losses.mean().
    """
    check_finite_logps("ref_logps", ref_logps, "response")
    return losses_of_responses(
        logps,
        ref_logps,
        labels,
        kl=kl,
        beta=beta,
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
        loss_type=loss_type,
    )


def losses_of_responses(
    logps: Tensor,
    ref_logps: Tensor,
    labels: Tensor,
    *,
    kl: Tensor | float | None,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
    loss_type: Literal["kto", "apo_zero_unpaired"],
) -> KTOLoss:
    """`kto_loss` of whatever the numbers are: what is not finite goes on."""
    _check_name("loss_type", loss_type, ("kto", "apo_zero_unpaired"))
    _check_positive("beta", beta)
    _check_weight("desirable_weight", desirable_weight)
    _check_weight("undesirable_weight", undesirable_weight)
    logps, ref_logps = _as_vectors(logps=logps, ref_logps=ref_logps)
    ref_logps = ref_logps.detach()
    if not isinstance(labels, Tensor):
        raise ValueError(f"labels must be a bool tensor of shape {tuple(logps.shape)}, got {type(labels).__name__}")
    if labels.dtype != torch.bool or labels.shape != logps.shape:
        raise ValueError(
            f"labels must be bool of shape {tuple(logps.shape)}, got {labels.dtype} of shape {tuple(labels.shape)}"
        )
    if labels.device != logps.device:
        raise ValueError(f"labels must be on {logps.device} as logps is, got {labels.device}")
    if loss_type == "kto" and kl is None:
        raise ValueError("kl is required for loss_type 'kto', got None: pass kto_kl(...), or 0.0 for no baseline")
    if loss_type == "apo_zero_unpaired" and kl is not None:
        raise ValueError(f"kl must be None for loss_type 'apo_zero_unpaired', which has no baseline, got {kl!r}")
    if not isinstance(kl, Tensor):
        kl = 0.0 if kl is None else kl
        _check_number("kl", kl, "a finite scalar", _is_finite)
        kl = logps.new_full((), kl)
    if kl.numel() != 1:
        raise ValueError(f"kl must be a scalar, got shape {tuple(kl.shape)}")
    baseline = kl.detach().to(logps.dtype).reshape(())

    logratios = logps - ref_logps
    advantages = beta * (logratios - baseline)
    losses = torch.where(
        labels,
        desirable_weight * _sigmoid(-advantages),
        undesirable_weight * _sigmoid(advantages),
    )
    return KTOLoss(losses, beta * logratios.detach(), baseline)


def length_desensitized_weights(
    labels: Tensor, ld_alpha: float, *, ignore_index: int = -100, whole: Whole | None = None
) -> Tensor:
    """Token weights of length-desensitized DPO, arXiv 2409.06411: 1 up to the pair's shorter length, then ld_alpha.

    Args:
        labels: [2B, T] int64, aligned with the predictions; rows 0..B-1 chosen, B..2B-1 rejected.
        ld_alpha: in [0, 1]; 1 is plain DPO, 0 leaves out what the longer response has in excess.
        whole: of the [2B] sequences whose part `labels` are, if others have more of them.

    Returns:
        [2B, T] fp32; 0 where the label is ignore_index.
    """
    _check_number("ld_alpha", ld_alpha, "a number in [0, 1]", lambda x: 0 <= x <= 1)
    _check_paired_rows("labels", labels)
    labelled = labels != ignore_index
    positions = labelled.cumsum(dim=1)  # 1 at the first labelled token
    lengths = labelled.sum(dim=1)
    if whole is not None:
        positions, lengths = positions + whole.before[:, None], whole.num_tokens
    chosen_lengths, rejected_lengths = lengths.chunk(2)
    shared_lengths = torch.minimum(chosen_lengths, rejected_lengths).repeat(2)
    return torch.where(positions <= shared_lengths[:, None], 1.0, ld_alpha) * labelled


def wpo_weights(
    token_logps: Tensor,
    log_sum_sq_probs: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    whole: Whole | None = None,
) -> Tensor:
    """Pair weights of weighted preference optimization: w(y_w) w(y_l), arXiv 2406.11827, Eq. 2, with

        w(y) = exp( mean over the tokens of y of [log pi(y_t) - log sum_v pi(v)^2] )

    Args:
        token_logps, log_sum_sq_probs: [2B, T]; rows 0..B-1 chosen, B..2B-1 rejected.
        labels: [2B, T], aligned with them; positions with ignore_index do not count.
        whole: of the [2B] sequences whose part these are, if others have more of them.

    Returns:
        [B] fp32 (fp64 where an input is), detached.
    """
    _check_paired_rows("labels", labels)
    for name, tensor in (("token_logps", token_logps), ("log_sum_sq_probs", log_sum_sq_probs)):
        if tensor.shape != labels.shape:
            raise ValueError(f"{name} must have the shape of labels, {tuple(labels.shape)}, got {tuple(tensor.shape)}")
    dtype = _compute_dtype(token_logps, log_sum_sq_probs)
    labelled = labels != ignore_index
    # where and not a product: what lies at positions without a label may be anything.
    log_weights = torch.where(labelled, token_logps.detach().to(dtype) - log_sum_sq_probs.detach().to(dtype), 0.0)
    sums, lengths = log_weights.sum(dim=1), labelled.sum(dim=1)
    if whole is not None:
        sums, lengths = whole.join(sums), whole.num_tokens
    weights = torch.exp(sums / lengths.clamp(min=1))
    chosen, rejected = weights.chunk(2)
    return chosen * rejected


def _check_name(argument: str, name: str, known: Iterable[str]) -> None:
    if isinstance(name, str) and name in known:
        return
    known = list(known)
    # Other libraries write 'js_divergence' and 'alpha_divergence'.
    nearest = difflib.get_close_matches(str(name).removesuffix("_divergence"), known, n=1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    if name == "dpo":
        hint = "; DPO's own is 'sigmoid'"
    if name in ("simpo", "orpo", "cpo", "kto"):
        hint = f"; use {name}_loss, which is a function of its own"
    raise ValueError(f"{argument} must be one of {known}, got {name!r}{hint}")


def _is_finite(x: float) -> bool:
    # not math.isfinite, which torch.compile cannot trace
    return -math.inf < x < math.inf


def _check_number(argument: str, value: object, expected: str, is_valid: Callable[[float], bool]) -> None:
    # a tensor neither: its gradient would be lost
    # float first, which is asked at once
    if not isinstance(value, (float, numbers.Real)) or isinstance(value, bool) or not is_valid(float(value)):
        raise ValueError(f"{argument} must be {expected}, got {value!r}")


def _check_positive(argument: str, value: object) -> None:
    _check_number(argument, value, "a positive finite number", lambda x: 0 < x < math.inf)


def _check_weight(argument: str, value: object) -> None:
    _check_number(argument, value, "a finite number of at least 0", lambda x: 0 <= x < math.inf)


def _check_smoothing(label_smoothing: object) -> None:
    _check_number("label_smoothing", label_smoothing, "a number in [0, 0.5)", lambda x: 0 <= x < 0.5)


def _check_paired_rows(argument: str, tensor: Tensor) -> None:
    if tensor.dim() != 2 or tensor.shape[0] % 2:
        raise ValueError(
            f"{argument} must have shape [2B, T], chosen rows then rejected rows, got {tuple(tensor.shape)}"
        )


def _compute_dtype(*tensors: Tensor) -> torch.dtype:
    """fp32, or fp64 where one of the tensors is."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def _as_vectors(**tensors: Tensor) -> list[Tensor]:
    """The tensors in their common compute type, once they are [B], floating-point and of one length."""
    first, *_ = tensors.items()
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            hint = "; without a reference, zeros" if name.startswith("ref_") and tensor is None else ""
            raise ValueError(f"{name} must be a tensor of shape [B], got {type(tensor).__name__}{hint}")
        if tensor.dim() != 1 or tensor.shape != first[1].shape:
            shape = f"{tuple(first[1].shape)} as {first[0]} has" if first[1].dim() == 1 else "[B]"
            raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating-point, got {tensor.dtype}")
        if tensor.device != first[1].device:
            raise ValueError(f"{name} must be on {first[1].device} as {first[0]} is, got {tensor.device}")
    dtype = _compute_dtype(*tensors.values())
    return [tensor.to(dtype) for tensor in tensors.values()]


def _as_lengths(name: str, lengths: Tensor, logps: Tensor) -> Tensor:
    if not isinstance(lengths, Tensor):
        raise ValueError(f"{name} must be a tensor of shape {tuple(logps.shape)}, got {lengths!r}")
    if lengths.shape != logps.shape:
        raise ValueError(f"{name} must have shape {tuple(logps.shape)}, got {tuple(lengths.shape)}")
    if lengths.is_complex() or lengths.dtype == torch.bool:
        raise ValueError(f"{name} must be numbers of tokens, got {lengths.dtype}")
    if lengths.device != logps.device:
        raise ValueError(f"{name} must be on {logps.device}, where the log-probabilities are, got {lengths.device}")
    if is_at_hand(lengths) and not _are_weights(lengths):
        raise ValueError(f"{name} must be finite and at least 0, got {lengths.tolist()}")
    return lengths.to(logps.dtype)


def _are_weights(values: Tensor) -> bool:
    """Finite and at least 0."""
    return bool(((values >= 0) & (values < math.inf)).all())


def _length_averages(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    chosen_lengths: Tensor | Literal[1],
    rejected_lengths: Tensor | Literal[1],
) -> tuple[Tensor, Tensor]:
    """Log-probabilities a token: sums divided by the lengths, or averages as they are."""
    chosen, rejected = _as_vectors(chosen_logps=chosen_logps, rejected_logps=rejected_logps)
    averages = []
    for name, logps, lengths in (
        ("chosen_lengths", chosen, chosen_lengths),
        ("rejected_lengths", rejected, rejected_lengths),
    ):
        if not isinstance(lengths, Tensor) and not (type(lengths) is int and lengths == 1):
            raise ValueError(
                f"{name} must be numbers of tokens, of shape {tuple(logps.shape)}, or 1 for log-probabilities that are "
                f"averages already, got {lengths!r}"
            )
        averages.append(
            logps / _as_lengths(name, lengths, logps).clamp(min=1) if isinstance(lengths, Tensor) else logps
        )
    return averages[0], averages[1]


def check_finite_logps(name: str, logps: Tensor, what: str) -> None:
    """Raises `ValueError` for NaN and infinity in log-probabilities [n], where looking is not waiting."""
    if isinstance(logps, Tensor) and is_at_hand(logps) and not is_finite(logps):
        wrong = ~torch.isfinite(logps)
        first = int(torch.nonzero(wrong.reshape(-1))[0])
        raise ValueError(
            f"{name}: expected finite log-probabilities, got {logps.reshape(-1)[first].item()} for {what} {first} "
            f"({int(wrong.sum())} such)"
        )
