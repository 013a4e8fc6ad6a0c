"""DPO log-probabilities and losses straight from hidden states: the vocabulary-sized logits never exist."""

from dpo_kernels.linear_dpo import LinearDPOOutput, linear_dpo_loss
from dpo_kernels.listwise import RankingLoss, plackett_luce_loss
from dpo_kernels.logps import SequenceLogps, linear_sequence_logps, sequence_logps
from dpo_kernels.losses import (
    KTOLoss,
    PreferenceLoss,
    cpo_loss,
    dpo_loss,
    kto_kl,
    kto_loss,
    orpo_loss,
    simpo_loss,
)
from dpo_kernels.models import LMHead
from dpo_kernels.modules import DPOLoss, LinearDPOLoss

__version__ = "0.1.0"

__all__ = [
    "DPOLoss",
    "KTOLoss",
    "LMHead",
    "LinearDPOLoss",
    "LinearDPOOutput",
    "PreferenceLoss",
    "RankingLoss",
    "SequenceLogps",
    "cpo_loss",
    "dpo_loss",
    "kto_kl",
    "kto_loss",
    "linear_dpo_loss",
    "linear_sequence_logps",
    "orpo_loss",
    "plackett_luce_loss",
    "sequence_logps",
    "simpo_loss",
]
