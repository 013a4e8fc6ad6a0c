"""The head of a Hugging Face causal LM: found, checked, and computed inside the model's own forward."""

from typing import TYPE_CHECKING

from dpo_kernels.lazy import exports
from dpo_kernels.models.head import LMHead

if TYPE_CHECKING:
    from dpo_kernels.models.fused_forward import FusedOutput as FusedOutput
    from dpo_kernels.models.fused_forward import Preference as Preference
    from dpo_kernels.models.fused_forward import Reference as Reference
    from dpo_kernels.models.fused_forward import add_fused_lm_head as add_fused_lm_head

__all__ = ["FusedOutput", "LMHead", "Preference", "Reference", "add_fused_lm_head"]
__getattr__ = exports(
    __name__, dict.fromkeys(["FusedOutput", "Preference", "Reference", "add_fused_lm_head"], "fused_forward")
)
