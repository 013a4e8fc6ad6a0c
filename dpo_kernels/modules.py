"""The losses as modules, for whoever configures a loss as an object. Their options are checked where they are made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from dpo_kernels.linear_dpo import LinearDPOOutput, check_options, linear_dpo_loss
from dpo_kernels.losses import PreferenceLoss, dpo_loss, validate_dpo_options
from dpo_kernels.options import Differentiable, Impl, LossOptions, PairLossOptions, refuse_unknown

if TYPE_CHECKING:
    from typing_extensions import Unpack

PAIR_LOSS_OPTIONS, LOSS_OPTIONS = (frozenset(kind.__annotations__) for kind in (PairLossOptions, LossOptions))


class DPOLoss(nn.Module):
    """`dpo_loss` with its options: `DPOLoss(beta=0.1)(chosen_logps, rejected_logps, ref_chosen_logps, ...)`.

    Args:
        **options: of `dpo_loss`, those that are numbers and names.

    Raises:
        ValueError, TypeError: as `dpo_loss`, here already.
    """

    def __init__(self, **options: Unpack[PairLossOptions]) -> None:
        super().__init__()
        refuse_unknown("DPOLoss", options, PAIR_LOSS_OPTIONS)
        validate_dpo_options(**options)
        self.options = options

    def forward(
        self,
        chosen_logps: Tensor,
        rejected_logps: Tensor,
        ref_chosen_logps: Tensor,
        ref_rejected_logps: Tensor,
        *,
        chosen_lengths: Tensor | None = None,
        rejected_lengths: Tensor | None = None,
        mean_chosen_length: Tensor | float | None = None,
        pair_weights: Tensor | None = None,
    ) -> PreferenceLoss:
        """Tensors [B], as in `dpo_loss`."""
        return dpo_loss(
            chosen_logps,
            rejected_logps,
            ref_chosen_logps,
            ref_rejected_logps,
            chosen_lengths=chosen_lengths,
            rejected_lengths=rejected_lengths,
            mean_chosen_length=mean_chosen_length,
            pair_weights=pair_weights,
            **self.options,
        )

    def extra_repr(self) -> str:
        return _listed(self.options)


class LinearDPOLoss(nn.Module):
    """`linear_dpo_loss` with its options: `LinearDPOLoss(beta=0.1)(hidden, weight, labels, ref_logps)`.

    Args:
        logit_scale, softcap, temperature, ignore_index, shift, differentiable, chunk_bytes, impl: as in
            `linear_dpo_loss`.
        **options: more of `linear_dpo_loss`, those that are numbers and names.

    Raises:
        ValueError, TypeError: as `linear_dpo_loss`, of the options here already.
    """

    def __init__(
        self,
        *,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        temperature: float = 1.0,
        ignore_index: int = -100,
        shift: bool = False,
        differentiable: Sequence[Differentiable] = (),
        chunk_bytes: int | None = None,
        impl: Impl = "auto",
        **options: Unpack[LossOptions],
    ) -> None:
        super().__init__()
        refuse_unknown("LinearDPOLoss", options, LOSS_OPTIONS)
        self.options: dict[str, Any] = {
            "logit_scale": logit_scale,
            "softcap": softcap,
            "temperature": temperature,
            "ignore_index": ignore_index,
            "shift": shift,
            "differentiable": differentiable,
            "chunk_bytes": chunk_bytes,
            "impl": impl,
            **options,
        }
        check_options(self.options)

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        ref_logps: Tensor,
        bias: Tensor | None = None,
        *,
        pairs: Sequence[tuple[int, int]] | Tensor | None = None,
        token_weights: Tensor | None = None,
        pair_weights: Tensor | None = None,
        lengths: Tensor | None = None,
        mean_chosen_length: Tensor | float | None = None,
    ) -> LinearDPOOutput:
        """hidden [S, T, H], weight [V, H], labels [S, T], ref_logps [S], bias [V], as in `linear_dpo_loss`."""
        return linear_dpo_loss(
            hidden,
            weight,
            labels,
            ref_logps,
            bias=bias,
            pairs=pairs,
            token_weights=token_weights,
            pair_weights=pair_weights,
            lengths=lengths,
            mean_chosen_length=mean_chosen_length,
            **self.options,
        )

    def extra_repr(self) -> str:
        return _listed(self.options)


def _listed(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in options.items())
