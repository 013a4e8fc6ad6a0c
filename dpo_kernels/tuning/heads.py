"""The head of a model, as kernels are timed for it."""

from __future__ import annotations

from typing import Any

import torch

from dpo_kernels.models.head import LMHead
from dpo_kernels.verdicts import Head

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def head_of(model: Any, mixed_precision: str = "no") -> Head:
    """Of a causal language model of transformers, in the dtype that it is multiplied in. Of one whose weights are not
    whole here, since they are sharded or packed, as its configuration says."""
    head = LMHead(model, at_output_layer=True)
    layer: Any = head.output_layer()
    weight = getattr(layer, "token_adapter", layer).weight
    shape = tuple(getattr(weight, "ds_shape", weight.shape))
    config = head.model.config.get_text_config(decoder=True)
    if len(shape) != 2 or shape[1] != config.hidden_size:
        shape = config.vocab_size, config.hidden_size
    own = weight.dtype if weight.dtype.is_floating_point else head.model.dtype
    dtype = AUTOCAST.get(mixed_precision, own)
    return Head(str(dtype).removeprefix("torch."), shape[1], shape[0], head.softcap)
