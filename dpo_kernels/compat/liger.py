"""Liger's classes of losses on hidden states and a head, without the `[S, T, V]` logits.

Labelled positions alone are scored: by one matrix product for the reference, and for the policy by two where the head
is frozen, three where it is trained by DPO, CPO or SimPO, and four for ORPO and KTO, for the losses that
`linear_dpo_loss` has four for, and on averages for all but DPO's "sigmoid", "ipo", "sigmoid_norm" and "sft", and CPO
and SimPO without label smoothing. Where there are three, gradients are formed in the forward, as in `linear_dpo_loss`,
and a second backward is an error.

S sequences of T positions, H hidden size, V vocabulary size. Pairs are S = 2B sequences: rows 0..B-1 chosen, rows
B..2B-1 rejected. `target` is aligned: target[s, t] is the token that _input[s, t] predicts. Results are in fp32 (fp64
for fp64 inputs), and the loss alone carries a gradient, for `_input`, `lin_weight` and `bias`. Under autocast operands
of products are rounded to its dtype. Log-probabilities, averages and NLLs of no tokens are 0.
"""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor, nn

from dpo_kernels.compat.arguments import described, renamed
from dpo_kernels.compat.scoring import (
    POLICY_NAMES,
    LossAndOutputs,
    check_options,
    check_sequences,
    logit_sums,
    pair_loss,
    pair_outputs,
    reference_logps,
    zero_logps,
)
from dpo_kernels.logps import check_labels, linear_sequence_logps, sum_tokens
from dpo_kernels.losses import SMOOTHED_LOSSES, kto_loss, log_odds, logistic_loss


class LigerFusedLinearDPOLoss(nn.Module):
    """Liger's class of this name: DPO (arXiv 2305.18290, Eq. 7) and its variants, with an NLL term on request.

        loss = mean over the pairs of dpo_loss(...) + alpha * nll_loss
        nll_loss = -(sum of the chosen responses' log-probabilities) / (number of their labelled tokens)

    Args:
        ignore_index: value of `target` at positions that do not count.
        beta: strength of the leash to the reference.
        alpha: weight of the NLL.
        compute_nll_loss: add the NLL of the chosen responses.
        compiled, chunk_size: have no effect; nothing is compiled, and memory is bounded without chunks to choose.
        use_ref_model: score a reference; without one its log-probabilities are 0.
        average_log_prob: the loss, the rewards and what is returned take log-probabilities averaged over a response's
            tokens, those of the reference too, instead of sums. The NLL is the same either way.
        loss_type: a name of `dpo_kernels.losses.LOSSES`, whose function gives formula and paper: Liger's, and "ipo",
            "cdpo", "aot", "aot_unpaired", "sft" and "sigmoid_norm". "ipo" and "sigmoid_norm" are on averages in any
            case.
        label_smoothing: for "cdpo", "robust", "exo_pair", "aot" and "aot_unpaired"; a warning says so with another
            loss, which takes no notice of it, as in Liger.
        discopop_tau: tau of "discopop".
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        compute_nll_loss: bool = False,
        compiled: bool = True,
        use_ref_model: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
        loss_type: str = "sigmoid",
        label_smoothing: float = 0.0,
        discopop_tau: float = 0.05,
    ) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self.beta = beta
        self.alpha = alpha
        self.compute_nll_loss = compute_nll_loss
        self.compiled = compiled
        self.use_ref_model = use_ref_model
        self.average_log_prob = average_log_prob
        self.chunk_size = chunk_size
        self.loss_type = loss_type
        self.label_smoothing = label_smoothing
        self.discopop_tau = discopop_tau
        check_options(beta, alpha, loss_type, self._effective_smoothing(), discopop_tau)
        if label_smoothing != self._effective_smoothing():
            warnings.warn(
                f"label_smoothing={label_smoothing!r} has no effect on loss_type {loss_type!r}; the smoothed forms of "
                "'sigmoid' are 'cdpo' (conservative) and 'robust' (unbiased)",
                stacklevel=2,
            )

    def _effective_smoothing(self) -> float:
        return self.label_smoothing if self.loss_type in SMOOTHED_LOSSES else 0.0

    def forward(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
    ) -> LossAndOutputs:
        """
        Args:
            lin_weight: [V, H], same dtype as `_input` (any under autocast).
            _input: [2B, T, H] floating point, the policy's last hidden states.
            target: [2B, T] integers in [0, V), or `ignore_index`.
            bias: [V].
            ref_input, ref_weight, ref_bias: [2B, T, H'], [V, H'] and [V] of the reference; no gradient goes through.
                Not looked at without `use_ref_model`.

        Returns:
            loss [], (chosen_logps [B], rejected_logps [B], chosen_logits_mean [], rejected_logits_mean [],
            nll_loss [], chosen_rewards [B], rejected_rewards [B]). The means are over all positions, labelled or not,
            and the vocabulary; rewards are beta * (logps - reference logps); nll_loss is 0 unless computed.
        """
        check_sequences(_input, target)
        reference = zero_logps(_input)
        if self.use_ref_model:
            reference = reference_logps(
                ref_input, ref_weight, target, ref_bias, ignore_index=self.ignore_index, average=self.average_log_prob
            )
        return pair_loss(
            _input,
            lin_weight,
            target,
            bias,
            reference,
            ignore_index=self.ignore_index,
            average=self.average_log_prob,
            alpha=self.alpha if self.compute_nll_loss else None,
            loss_type=self.loss_type,
            beta=self.beta,
            label_smoothing=self._effective_smoothing(),
            discopop_tau=self.discopop_tau,
        )


class LigerFusedLinearCPOLoss(nn.Module):
    """Liger's class of this name: CPO, arXiv 2401.08417, Eq. 3, with label smoothing.

        loss = mean over the pairs of [(1 - eps) L(h) + eps L(-h)] + alpha * nll_loss
        h = beta * (log pi(y_w) - log pi(y_l)), L(h) = -log sigmoid(h), eps = label_smoothing in [0, 0.5)

    The other options are those of `LigerFusedLinearDPOLoss`.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        label_smoothing: float = 0.0,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
    ) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self.beta = beta
        self.alpha = alpha
        self.label_smoothing = label_smoothing
        self.compute_nll_loss = compute_nll_loss
        self.compiled = compiled
        self.average_log_prob = average_log_prob
        self.chunk_size = chunk_size
        check_options(beta, alpha, "cdpo", label_smoothing)

    def forward(self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None) -> LossAndOutputs:
        """Arguments and results of `LigerFusedLinearDPOLoss`; rewards are beta * logps."""
        check_sequences(_input, target)
        return pair_loss(
            _input,
            lin_weight,
            target,
            bias,
            zero_logps(_input),
            ignore_index=self.ignore_index,
            average=self.average_log_prob,
            alpha=self.alpha if self.compute_nll_loss else None,
            loss_type="cdpo" if self.label_smoothing else "sigmoid",
            beta=self.beta,
            label_smoothing=self.label_smoothing,
        )


class LigerFusedLinearSimPOLoss(nn.Module):
    """Liger's class of this name: SimPO, arXiv 2405.14734, Eq. 6, with label smoothing and an NLL term.

    CPO on log-probabilities averaged over a response's tokens, with h = beta * (a_w - a_l) - gamma. The options are
    those of `LigerFusedLinearCPOLoss`, and

        gamma: the paper's target reward margin, inside the sigmoid and not multiplied by beta.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        label_smoothing: float = 0.0,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        gamma: float = 0.5,
        chunk_size: int = 1,
    ) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self.beta = beta
        self.alpha = alpha
        self.label_smoothing = label_smoothing
        self.compute_nll_loss = compute_nll_loss
        self.compiled = compiled
        self.gamma = gamma
        self.chunk_size = chunk_size
        check_options(beta, alpha, "cdpo", label_smoothing)
        if not isinstance(gamma, (int, float)) or not -math.inf < gamma < math.inf:
            raise ValueError(f"gamma must be a finite number, got {gamma!r}")

    def forward(self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None) -> LossAndOutputs:
        """Arguments and results of `LigerFusedLinearCPOLoss`; logps are averages, rewards beta times those."""
        pairs = check_sequences(_input, target) // 2
        # The margin is DPO's for a reference that gives every chosen token gamma / beta.
        reference = zero_logps(_input)
        reference[:pairs] = self.gamma / self.beta
        loss, outputs = pair_loss(
            _input,
            lin_weight,
            target,
            bias,
            reference,
            ignore_index=self.ignore_index,
            average=True,
            alpha=self.alpha if self.compute_nll_loss else None,
            loss_type="cdpo" if self.label_smoothing else "sigmoid",
            beta=self.beta,
            label_smoothing=self.label_smoothing,
        )
        return loss, (*outputs[:5], *(self.beta * logps for logps in outputs[:2]))


class LigerFusedLinearORPOLoss(nn.Module):
    """Liger's class of this name: ORPO, arXiv 2403.07691, Eqs. 6 and 7, where beta is called lambda.

        loss = beta * mean over the pairs of L(log odds(y_w) - log odds(y_l)) + nll_loss
        odds(y) = e^a / (1 - e^a), a = log pi(y) averaged over the tokens of y, L(h) = -log sigmoid(h)

    The options are those of `LigerFusedLinearDPOLoss`. For a above -1e-6 the log odds continue along their tangent, so
    that a probability that rounds to 1 gives a finite loss.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        chunk_size: int = 1,
    ) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self.beta = beta
        self.compute_nll_loss = compute_nll_loss
        self.compiled = compiled
        self.chunk_size = chunk_size
        check_options(beta)

    def forward(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        nll_target: Tensor | None = None,
    ) -> LossAndOutputs:
        """
        Args:
            lin_weight, _input, target, bias: as for `LigerFusedLinearDPOLoss`.
            nll_target: [2B, T] integers in [0, V), or `ignore_index`: what the NLL is of, in the rows of the chosen
                responses, for instance the prompt too. `target` if None.

        Returns:
            The seven outputs of `LigerFusedLinearDPOLoss`, where logps are averages and rewards beta times those, and
            log_odds_ratio [], the mean of log sigmoid(h), and log_odds_chosen [], the mean of h, for h = log odds(y_w)
            - log odds(y_l).
        """
        pairs = check_sequences(_input, target) // 2
        hidden, labels = _input, target
        chosen = nll_labels = target[:pairs]
        names = POLICY_NAMES
        if self.compute_nll_loss and nll_target is not None:
            renamed({"labels": "nll_target"}, check_labels, _input, nll_target, "_input", "[2B, T, H]")
            nll_labels = nll_target[:pairs]
            # Behind the 2B sequences, what the NLL asks for in addition: no token is scored twice.
            more = nll_labels.masked_fill(nll_labels == chosen, self.ignore_index)
            hidden, labels = torch.cat([_input, _input[:pairs]]), torch.cat([target, more])
            names = {**POLICY_NAMES, "labels": f"target (from sequence {2 * pairs} on, nll_target)"}
        token_logps = renamed(
            names, linear_sequence_logps, hidden, lin_weight, labels, bias=bias, ignore_index=self.ignore_index
        ).token_logps
        num_tokens = (target != self.ignore_index).sum(1)
        logps = sum_tokens(token_logps[: 2 * pairs]) / num_tokens.clamp(min=1)
        log_odds_ratio = torch.sub(*log_odds(logps).chunk(2))
        losses = logistic_loss(log_odds_ratio)
        nll = logps.new_zeros(())
        if self.compute_nll_loss:
            shared = token_logps[:pairs].masked_fill(nll_labels != chosen, 0)
            nll_sums = torch.cat([sum_tokens(shared), sum_tokens(token_logps[2 * pairs :])])
            nll = -nll_sums.sum() / (nll_labels != self.ignore_index).sum().clamp(min=1)
        loss = self.beta * losses.mean() + nll
        outputs = pair_outputs(logps.detach(), nll.detach(), _input, lin_weight, bias)
        rewards = (self.beta * logps.detach()).chunk(2)
        return loss, (*outputs, *rewards, -losses.detach().mean(), log_odds_ratio.detach().mean())


class LigerFusedLinearKTOLoss(nn.Module):
    """Liger's class of this name: KTO, arXiv 2402.01306, Eq. 7, on responses that are each good or bad, not paired.

        loss = mean over the sequences of 1 - sigmoid(beta * (r - kl))   where the response is good,
                                          1 - sigmoid(beta * (kl - r))   where it is bad,
        r = log pi(y) - log pi_ref(y)

    The options are those of `LigerFusedLinearDPOLoss`.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        compiled: bool = True,
        use_ref_model: bool = False,
        average_log_prob: bool = False,
        chunk_size: int = 1,
    ) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self.beta = beta
        self.compiled = compiled
        self.use_ref_model = use_ref_model
        self.average_log_prob = average_log_prob
        self.chunk_size = chunk_size
        check_options(beta)

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        preference_labels: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        kl: Tensor | float | None = None,
    ) -> LossAndOutputs:
        """
        Args:
            _input, lin_weight, target, bias, ref_input, ref_weight, ref_bias: as for `LigerFusedLinearDPOLoss`, with
                any number S of sequences in place of 2B.
            preference_labels: [S] bool, True for a good response. Required.
            kl: scalar or [S], the baseline, see `dpo_kernels.losses.kto_kl`; no gradient goes through. 0 if None. [S]
                is one a sequence here; in Liger it is so where `chunk_size` takes all sequences at once.

        Returns:
            loss [], (chosen_logps_sum [], rejected_logps_sum [], chosen_logits_sum [], rejected_logits_sum [],
            chosen_rewards_sum [], rejected_rewards_sum []): sums over good and over bad sequences; of logits over all
            positions, labelled or not, and the vocabulary. Rewards are beta * r.
        """
        sequences = check_sequences(_input, target, paired=False)
        given = described(preference_labels)
        if preference_labels is None or given != f"torch.bool of shape [{sequences}]":
            raise ValueError(f"preference_labels: expected torch.bool of shape [{sequences}], got {given}")
        reference = zero_logps(_input)
        if self.use_ref_model:
            reference = reference_logps(
                ref_input, ref_weight, target, ref_bias, ignore_index=self.ignore_index, average=self.average_log_prob
            )
        logps = renamed(
            POLICY_NAMES,
            linear_sequence_logps,
            _input,
            lin_weight,
            target,
            bias=bias,
            ignore_index=self.ignore_index,
            reduction="mean" if self.average_log_prob else "sum",
        ).logps
        if kl is not None and not isinstance(kl, (int, float, Tensor)):
            raise ValueError(f"kl: expected a scalar or shape [{sequences}], got {described(kl)}")
        baseline = torch.as_tensor(0.0 if kl is None else kl, dtype=logps.dtype, device=logps.device).detach()
        if baseline.numel() == 1:
            baseline = baseline.reshape(1).expand(sequences)
        if baseline.shape != (sequences,):
            raise ValueError(f"kl: expected a scalar or shape [{sequences}], got {described(kl)}")
        logratios = logps - reference
        # kto_loss has one baseline for all; for the loss, one a sequence is as a reference of the log-ratio.
        losses = kto_loss(logratios, baseline, preference_labels, kl=0.0, beta=self.beta).losses
        values = (logps.detach(), logit_sums(_input, lin_weight, bias), self.beta * logratios.detach())
        sums = [v.masked_fill(others, 0).sum() for v in values for others in (~preference_labels, preference_labels)]
        return losses.mean(), tuple(sums)
