"""What the public functions can be asked for: names, as types, and the keywords that heads and forwards pass on."""

from __future__ import annotations

import difflib
import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, ParamSpec, TypedDict, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Impl = Literal["auto", "torch", "cpu", "triton", "cuda"]
Reduction = Literal["sum", "mean"]
Stat = Literal["entropy", "is_top1", "mean_logit", "log_sum_sq_probs"]
LossType = Literal[
    "sigmoid", "cdpo", "robust", "hinge", "ipo", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm", "plackett_luce",
]  # fmt: skip
FDivergence = Literal["reverse_kl", "forward_kl", "js", "alpha"]
Differentiable = Literal["logps", "losses"]


class LogpsOptions(TypedDict, total=False):
    """Keywords of `linear_sequence_logps` that are no part of a model's head."""

    temperature: float
    token_weights: Tensor | None
    ignore_index: int
    reduction: Reduction
    stats: Sequence[Stat]
    num_labelled: int | None
    check_hidden: bool
    predictors: Tensor | None
    sequence_group: ProcessGroup | None
    impl: Impl


class PairLossOptions(TypedDict, total=False):
    """Options of `dpo_loss` that are numbers and names."""

    beta: float
    loss_type: LossType | Sequence[LossType]
    loss_weights: Sequence[float] | None
    label_smoothing: float
    f_divergence: FDivergence
    f_alpha: float
    discopop_tau: float
    rpo_alpha: float | None


class LossOptions(PairLossOptions, total=False):
    """Options of `linear_dpo_loss` that make it another loss, and are numbers and names."""

    ld_alpha: float | None
    use_weighting: bool


class PreferenceOptions(LossOptions, total=False):
    """Keywords of `linear_dpo_loss` that are no part of a model's head, nor of the forward that it is in."""

    temperature: float
    mean_chosen_length: Tensor | float | None
    pairs: Sequence[tuple[int, int]] | Tensor | None
    token_weights: Tensor | None
    pair_weights: Tensor | None
    lengths: Tensor | None
    differentiable: Sequence[Differentiable]
    num_labelled: int | None
    chunk_bytes: int | None
    impl: Impl


class LinearDPOOptions(PreferenceOptions, total=False):
    """Keywords of `linear_dpo_loss` that are no part of a model's head."""

    ignore_index: int
    stats: Sequence[Stat]
    check_hidden: bool
    predictors: Tensor | None
    sequence_group: ProcessGroup | None


Parameters = ParamSpec("Parameters")
Returned = TypeVar("Returned")

# What other libraries call it, and what to write here.
AVERAGED = (
    "log-probabilities are averaged over tokens by loss_type 'ipo' or 'sigmoid_norm', by simpo_loss and orpo_loss"
)
LIKELIHOOD = "the weight of the negative log-likelihood is rpo_alpha, in cpo_loss cpo_alpha; orpo_loss has it as it is"
ELSEWHERE = {
    "reference_free": "for a reference that is uniform, give zeros as its log-probabilities",
    "average_log_prob": f"{AVERAGED}, and by reduction='mean' of sequence_logps and linear_sequence_logps",
    "length_normalized": f"{AVERAGED}, and by reduction='mean' of sequence_logps and linear_sequence_logps",
    "reduction": "the result's .loss is the mean over pairs, its .losses are those of each pair",
    "f_divergence_type": "it is f_divergence",
    "f_alpha_divergence_coef": "it is f_alpha",
    "tau": "IPO's tau is beta, DiscoPOP's is discopop_tau",
    "label_pad_token_id": "it is ignore_index",
    "ref_weight": "score the reference first, and give its log-probabilities as ref_logps",
    "ref_input": "score the reference first, and give its log-probabilities as ref_logps",
    "lin_weight": "it is weight",
    "gamma_beta_ratio": "it is gamma / beta: give gamma",
    "simpo_gamma": "it is gamma",
    "alpha": LIKELIHOOD,
    "sft_weight": LIKELIHOOD,
    "nll_loss": LIKELIHOOD,
    "logits": "logits are for sequence_logps",
    "ld_alpha": "it weighs tokens: linear_dpo_loss has it",
    "use_weighting": "it needs the distribution of each token: linear_dpo_loss has it",
    "token_weights": "the functions that take hidden states or logits have it",
    "attention_mask": "prompt and padding are left out by labels, which are ignore_index there",
    "loss_mask": "prompt and padding are left out by labels, which are ignore_index there",
    "ref_hidden": "score the reference first, and give its log-probabilities as ref_logps",
    "_input": "it is hidden",
    "target": "it is labels",
}


def explain_unknown(function: Callable[Parameters, Returned]) -> Callable[Parameters, Returned]:
    """A decorator: a keyword that the function does not have is answered with what to write instead."""
    known = frozenset(inspect.signature(function).parameters)

    @functools.wraps(function)
    def wrapped(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Returned:
        refuse_unknown(function.__name__, kwargs, known)
        return function(*args, **kwargs)

    return wrapped


def refuse_unknown(function: str, options: Mapping[str, object], known: frozenset[str]) -> None:
    """Raises `TypeError` for an option that is none of those known."""
    if known.issuperset(options):
        return
    name = min(set(options) - known)
    if name in ELSEWHERE:
        raise TypeError(f"{function}: no argument {name!r}: {ELSEWHERE[name]}")
    nearest = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else f", expected some of {sorted(known)}"
    raise TypeError(f"{function}: no argument {name!r}{hint}")


def is_at_hand(tensor: Tensor) -> bool:
    """Whether its values can be looked at now, without waiting for a device."""
    if torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return False
    return tensor.device.type == "cpu" and type(tensor) in (Tensor, torch.nn.Parameter)


def is_finite(t: Tensor) -> bool:
    """Whether all of it is. Waits for a device."""
    if math.isfinite(t.detach().sum().item()):
        return True
    # or their sum is too large for it; the extremes: NaN is passed on, and nothing of the size of t is made
    return all(math.isfinite(extreme.item()) for extreme in t.aminmax())
