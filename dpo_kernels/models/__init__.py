"""The head of a Hugging Face causal LM: found, checked, and computed inside the model's own forward; and rows in which
responses share a prompt, for the model beneath it."""

from typing import TYPE_CHECKING

from dpo_kernels.lazy import exports
from dpo_kernels.models.head import LMHead

if TYPE_CHECKING:
    from dpo_kernels.models.fused_forward import FusedOutput as FusedOutput
    from dpo_kernels.models.fused_forward import Preference as Preference
    from dpo_kernels.models.fused_forward import Reference as Reference
    from dpo_kernels.models.fused_forward import add_fused_lm_head as add_fused_lm_head
    from dpo_kernels.models.layouts import use_layouts as use_layouts
    from dpo_kernels.models.segments import hidden_of_responses as hidden_of_responses
    from dpo_kernels.models.segments import laid_out as laid_out

__all__ = [
    "FusedOutput",
    "LMHead",
    "Preference",
    "Reference",
    "add_fused_lm_head",
    "hidden_of_responses",
    "laid_out",
    "use_layouts",
]
__getattr__ = exports(
    __name__,
    dict.fromkeys(["FusedOutput", "Preference", "Reference", "add_fused_lm_head"], "fused_forward")
    | {"use_layouts": "layouts", "laid_out": "segments", "hidden_of_responses": "segments"},
)
