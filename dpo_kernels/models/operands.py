"""The operands of an output layer's matrix product, plain or with PEFT's adapters."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dpo_kernels.parallel import is_dtensor


class HeadOperands(NamedTuple):
    """What a head multiplies: ``logits = softcap(logit_scale * (hidden @ weight.T + bias))``."""

    hidden: Tensor  # [..., H']
    weight: Tensor  # [V, H']
    bias: Tensor | None  # [V]


def layer_operands(layer: Any, hidden: Tensor, *, in_shards: bool = False) -> HeadOperands:
    """Operands of an output layer that may be wrapped by PEFT. `in_shards`: those of a plain layer of a tensor-parallel
    model may be DTensors, in which the vocabulary is sharded."""
    if "peft" in sys.modules:  # else nothing in the model can be PEFT's
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper

        if isinstance(layer, TrainableTokensWrapper):
            return layer_operands(layer.token_adapter, hidden)
        if isinstance(layer, ModulesToSaveWrapper):
            adapters = layer.active_adapters
            inactive = layer.disable_adapters or not adapters or adapters[0] not in layer.modules_to_save
            return layer_operands(layer.original_module if inactive else layer.modules_to_save[adapters[0]], hidden)
        if isinstance(layer, BaseTunerLayer):
            return _adapter_operands(layer, hidden)
    bias = getattr(layer, "bias", None)
    if in_shards and _is_vocabulary_parallel(layer.weight, bias):
        return HeadOperands(hidden.to(layer.weight.device, layer.weight.dtype), layer.weight, bias)
    weight: Tensor = _whole(layer.weight)
    matrix = weight.dim() == 2 and weight.is_floating_point() and weight.element_size() > 1  # of 1 byte: quantised
    matrix = matrix and not weight.is_meta and not hasattr(weight, "device_mesh")
    if matrix and weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"the output layer {name_of(layer)} takes {weight.shape[1]} features a position, and the hidden states "
            f"have {hidden.shape[-1]}: there is a dense transform, or another layer, between them"
        )
    if not matrix:
        raise ValueError(
            f"the output layer's weight must be a floating-point matrix [V, {hidden.shape[-1]}] in one piece; that of "
            f"{name_of(layer)} is a {name_of(weight)} {list(weight.shape)} of {weight.dtype} on {weight.device} "
            "(quantised, sharded or offloaded?)"
        )
    return HeadOperands(hidden.to(weight), weight, None if bias is None else _whole(bias))


def _is_vocabulary_parallel(weight: Any, bias: Any) -> bool:
    """Whether each process of a tensor-parallel model has some rows, and computes the same hidden states and labels."""
    return all(is_tensor_parallel(t) and t.placements[0].is_shard(0) for t in (weight, bias) if t is not None)


def is_tensor_parallel(weight: Any) -> bool:
    """By the name of its mesh: what FSDP2 has sharded looks the same."""
    return is_dtensor(weight) and weight.device_mesh.mesh_dim_names == ("tp",)


def _whole(weight: Any) -> Any:
    """The parameter, gathered where the model is tensor parallel. Each process computes the same from all of it then,
    and of the gradient takes its own rows. What FSDP2 has sharded differs by process and by its own hooks alone is
    gathered and reduced, so that stays as it is."""
    return weight.full_tensor() if is_tensor_parallel(weight) else weight


def _adapter_operands(layer: Any, hidden: Tensor) -> HeadOperands:
    from peft.tuners.lora.layer import Linear as LoraLinear
    from peft.tuners.trainable_tokens.layer import TrainableTokensLayer

    if layer.disable_adapters and layer.merged:
        layer.unmerge()  # as the layer's own forward would
    if layer.disable_adapters or layer.merged or not layer.active_adapters:
        return layer_operands(layer.base_layer, hidden)
    if isinstance(layer, TrainableTokensLayer):
        weight = layer.get_merged_weights(layer.active_adapters)
        return HeadOperands(hidden.to(weight), weight, None)  # this layer leaves out the bias of a Linear that it wraps
    variants = getattr(layer, "lora_variant", {})
    kinds = {name_of(variants[adapter]) for adapter in layer.active_adapters if adapter in variants}
    if class_of(layer) is LoraLinear and not kinds:
        return _lora_operands(layer, hidden)
    if kinds - {"DoraLinearVariant"}:
        raise ValueError(
            f"{' and '.join(sorted(kinds))} on the head is not supported: it may be no fixed linear map of the hidden "
            "states. Use plain LoRA or DoRA there, or leave the head out of target_modules"
        )
    return _measured_operands(layer, hidden)


def class_of(layer: nn.Module) -> type:
    """Its class before FSDP2, if at all, made one of its own from that."""
    if torch.distributed.is_available():
        from torch.distributed.fsdp import FSDPModule

        if isinstance(layer, FSDPModule):
            return type(layer).__mro__[2]
    return type(layer)


def _lora_operands(layer: Any, hidden: Tensor) -> HeadOperands:
    """LoRA as a wider product: ``x Wᵀ + s·dropout(x) Aᵀ Bᵀ = [x, s·dropout(x) Aᵀ] [W, B]ᵀ``.

    Unlike a merged weight ``W + s·B A`` this holds with dropout too, and a small update is not lost in the rounding of
    W. Both cost one copy of W.
    """
    hidden, weight, bias = layer_operands(layer.base_layer, hidden)
    hiddens, weights = [hidden], [weight]
    for adapter in layer.active_adapters:
        if adapter in layer.lora_A:
            lora_a, lora_b, scaling = layer.lora_A[adapter], layer.lora_B[adapter], layer.scaling[adapter]
            dropped = layer.lora_dropout[adapter](hidden.to(lora_a.weight.dtype))
            hiddens.append((lora_a(dropped) * scaling).to(hidden))
            weights.append(lora_b.weight.to(weight))
            if lora_b.bias is not None:
                lora_bias = (lora_b.bias * scaling).to(weight)
                bias = lora_bias if bias is None else bias + lora_bias
    if len(weights) == 1:
        return HeadOperands(hidden, weight, bias)
    return HeadOperands(torch.cat(hiddens, dim=-1), torch.cat(weights, dim=1), bias)


def _measured_operands(layer: Any, hidden: Tensor) -> HeadOperands:
    """Any other adapter (DoRA, LoHa, IA³, OFT, ...): without dropout it is an affine map, so its forward tells which.

    ``layer(0)`` is the bias and ``layer(I)`` the transposed weight plus the bias, differentiable in whatever parameters
    the adapter has. That costs a product of H rows.
    """
    for module in layer.modules():
        rates = [getattr(module, "p", 0), *getattr(module, "rank_dropout", {}).values()]
        rates += getattr(module, "module_dropout", {}).values()
        if layer.training and any(isinstance(rate, float) and rate > 0 for rate in rates):
            raise ValueError(
                f"{name_of(layer)} with dropout on the head is not supported: its product cannot be told from its "
                "weights. Set the adapter's dropout to 0, use plain LoRA there, or leave the head out of target_modules"
            )
    identity = torch.eye(hidden.shape[-1], dtype=hidden.dtype, device=layer.get_base_layer().weight.device)
    # Not a call of the layer, which may itself be in one: hooks that gather its weights and hook its outputs ran there.
    outputs = layer.forward(torch.cat([torch.zeros_like(identity[:1]), identity]))
    bias = outputs[0]
    return HeadOperands(hidden.to(outputs), (outputs[1:] - bias).T, bias)


def as_taken_by(layer: Any, hidden: Tensor) -> Tensor:
    """The hidden states in the precision of the layer that is to multiply them, where that is another."""
    inner = layer.get_base_layer() if hasattr(layer, "get_base_layer") else getattr(layer, "original_module", layer)
    dtype = getattr(getattr(inner, "weight", None), "dtype", hidden.dtype)
    return hidden.to(dtype) if dtype.is_floating_point and dtype.itemsize > 1 else hidden


def name_of(thing: Any) -> str:
    return thing.__name__ if isinstance(thing, type) else type(thing).__name__
