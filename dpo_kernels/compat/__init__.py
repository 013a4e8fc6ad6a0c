"""What other libraries call, with their arguments and results, computed by this package.

    Liger                               LigerFusedLinearDPOLoss and its CPO, SimPO, ORPO and KTO classes
    the original implementation of DPO  get_batch_logps, preference_loss
    torchtune, OpenRLHF                 TorchtuneDPOLoss, OpenRLHFDPOLoss

All of it is computed and returned in fp32 (fp64 for fp64 inputs), whatever the dtype of the inputs, and 0 where nothing
is labelled. An argument of the wrong shape, dtype, device or value is a ValueError that names it.
"""

from dpo_kernels.compat.liger import (
    LigerFusedLinearCPOLoss,
    LigerFusedLinearDPOLoss,
    LigerFusedLinearKTOLoss,
    LigerFusedLinearORPOLoss,
    LigerFusedLinearSimPOLoss,
)
from dpo_kernels.compat.trainers import OpenRLHFDPOLoss, TorchtuneDPOLoss, get_batch_logps, preference_loss

__all__ = [
    "LigerFusedLinearCPOLoss",
    "LigerFusedLinearDPOLoss",
    "LigerFusedLinearKTOLoss",
    "LigerFusedLinearORPOLoss",
    "LigerFusedLinearSimPOLoss",
    "OpenRLHFDPOLoss",
    "TorchtuneDPOLoss",
    "get_batch_logps",
    "preference_loss",
]
