"""The language-model head of a Hugging Face causal language model, as operands for the fused functions."""

from __future__ import annotations

import inspect
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dpo_kernels.linear_dpo import LinearDPOOutput, linear_dpo_loss
from dpo_kernels.logps import SequenceLogps, linear_sequence_logps
from dpo_kernels.models.through_wrappers import Found, computed_in

# Where configs keep the factor on the logits, the cap and the weight of the auxiliary loss, for every causal language
# model of transformers 5.23. MiniCPM3 and Inkling divide the hidden states instead, which is the same product.
_MULTIPLIERS = ("logit_scale", "output_multiplier", "lm_head_multiplier")
_DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
_AUX_LOSS_COEFS = ("router_aux_loss_coef", "aux_loss_coef")


class HeadOperands(NamedTuple):
    """What a head multiplies: ``logits = softcap(logit_scale * (hidden @ weight.T + bias))``."""

    hidden: Tensor  # [..., H']
    weight: Tensor  # [V, H']
    bias: Tensor | None  # [V]


class LMHead:
    """The head of a causal language model: all that stands between its last hidden states and its logits.

    For every supported model, plain or with PEFT adapters, the model's logits are::

        hidden, weight, bias = head.operands(hidden)  # dense transform and adapters applied
        logits = softcap(head.logit_scale * (hidden @ weight.T + bias))  # softcap(a) = cap * tanh(a / cap)

    Nothing is copied from the model. Its modules are looked up at each call, so the operands follow optimiser steps,
    ``set_adapter``, ``disable_adapter()``, merging, and the training mode that adapter dropout depends on.

    Attributes:
        model: the causal language model itself, out of whatever it was wrapped in.
        logit_scale: factor on the logits, before the softcap.
        softcap: cap on the logits, or None.
        aux_loss_coef: the model's own weight for the auxiliary loss of `hidden_states`; 0.0 where it has none.
        at_output_layer: whether `operands` and `in_forward` take the hidden states that go into the output layer, after
            any dense transform. Otherwise they are those of the base model, which `hidden_states` gives.
    """

    def __init__(self, model: nn.Module, *, at_output_layer: bool = False) -> None:
        self.wrapped = model
        self.at_output_layer = at_output_layer
        self.model: Any = unwrap(model)
        if not hasattr(self.model, "get_output_embeddings") or not hasattr(self.model, "config"):
            raise ValueError(
                "model must be a transformers causal language model (with a config and get_output_embeddings()), or "
                f"one inside PEFT, DistributedDataParallel or torch.compile; got {_name(model)}"
            )
        if self.model.config.is_encoder_decoder:
            raise ValueError(f"model must be decoder-only, got the encoder-decoder {_name(self.model)}")
        self._base_models()  # a model without a base or a head is an error now rather than at the first step
        self._output_layer()
        config = self._config()
        divisor = _number(config, _DIVISORS) or 1.0
        if config.model_type.startswith("hyperclovax"):  # the one family that multiplies by its `logits_scaling`
            divisor = 1 / divisor
        self.logit_scale = (_number(config, _MULTIPLIERS) or 1.0) / divisor
        self.softcap = _number(config, _SOFTCAPS)
        self.aux_loss_coef = _number(config, _AUX_LOSS_COEFS) or 0.0

    @classmethod
    def from_model(cls, model: nn.Module, *, check: bool = True) -> LMHead:
        """Finds the head of ``model`` and, unless ``check`` is False, compares it with the model's own logits.

        Args:
            model: a transformers causal language model, or a PEFT model, DistributedDataParallel or compiled module
                around one.
            check: run `check` once: a forward pass of three tokens.

        Raises:
            ValueError: no head or base model is found, or the check fails.
        """
        head = cls(model)
        if check:
            head.check()
        return head

    def hidden_states(self, **inputs: Any) -> tuple[Tensor, Tensor | None]:
        """The last hidden states of the base model, without computing a logit.

        The model is called as a whole, through whatever wraps it, with a `logits_to_keep` that keeps no position, and
        the base model's output is caught on its way to the head. To call the base model by itself would be shorter,
        but would skip what happens around it: gradient synchronisation in DistributedDataParallel, the autocast that
        accelerate puts on the forward, PEFT's forward hooks, and the auxiliary loss, which each mixture-of-experts
        family computes its own way. Only where forward has no `logits_to_keep` is the base model called.

        Args:
            **inputs: what the model's forward takes, without labels. `use_cache` is set to False. In training,
                `output_router_logits` is True unless given, where the model has a weight for the auxiliary loss.

        Returns:
            hidden [S, T, H] in the model's dtype, and the auxiliary loss [] of mixture-of-experts models as in their
            ``outputs.aux_loss``, else None. It is unweighted: what goes into a loss is ``aux_loss_coef`` times it.

        Raises:
            ValueError: the hidden states cannot be had without the logits, or do not match the input's positions.
        """
        if self.at_output_layer:
            raise ValueError("at_output_layer: expected False for hidden_states, got True; such a head has in_forward")
        tokens = self._settle(inputs)
        caught: list[Tensor] = []
        aux_loss = None
        if "logits_to_keep" in self._forward_parameters():
            no_position = torch.empty(0, dtype=torch.long, device=tokens.device)
            with self._last_hidden_hook(caught.append):
                outputs = self.wrapped(**inputs, logits_to_keep=no_position)
            aux_loss = getattr(outputs, "aux_loss", None)
        elif self.wrapped is self.model:
            caught.append(self._base_models()[0](**inputs)[0])
        if not caught:
            raise ValueError(
                f"cannot get the hidden states of {_name(self.model)} inside {_name(self.wrapped)}: its forward has no "
                "logits_to_keep, or runs the base model where it cannot be observed. Pass the bare model, and compile "
                "its layers rather than the whole"
            )
        hidden = caught[-1]
        if hidden.shape[:2] != tokens.shape[:2]:
            raise ValueError(
                f"{_name(self.wrapped)} has hidden states for {list(hidden.shape[:2])} positions, expected "
                f"{list(tokens.shape[:2])} as in its input (prompt-learning adapters are not supported)"
            )
        return hidden, aux_loss

    def in_forward(
        self, forward: Callable[..., Any], function: Callable[[HeadOperands], Found], /, **inputs: Any
    ) -> tuple[Found, Tensor | None]:
        """`function` of the operands, computed in the output layer's own place when `forward` comes to it: what shards
        the model over devices (FSDP2, ZeRO-3) has gathered the weights there, and gathers them again for the backward.
        For a head made with `at_output_layer`, and a `forward` in which the model is called as a whole.

        Returns:
            What the function gave, and the auxiliary loss as `hidden_states` does.

        Raises:
            ValueError: the inputs are none for `hidden_states`, or the forward does not run the output layer once.
        """
        self._settle(inputs)
        rows = []

        def computed(hidden: Tensor) -> Found:
            found = self.operands(hidden)
            rows.append(found.weight.shape[0])
            return function(found)

        def no_logits(hidden: Tensor) -> Tensor:
            return hidden.new_empty(*hidden.shape[:-2], 0, rows[-1])

        with computed_in(self._output_layer(), computed, no_logits) as results:
            outputs = forward(**inputs)
        if len(results) != 1:
            raise ValueError(
                f"{_name(self.model)} runs its output layer {len(results)} times in a forward, expected once"
            )
        return results[0], getattr(outputs, "aux_loss", None)

    def _settle(self, inputs: dict[str, Any]) -> Tensor:
        """Checks and completes the inputs of the model, and gives those that stand for its tokens."""
        tokens: Tensor | None = inputs.get("input_ids", inputs.get("inputs_embeds"))
        if tokens is None or "labels" in inputs or "logits_to_keep" in inputs:
            raise ValueError(
                "the model takes input_ids or inputs_embeds and its other inputs here, but not labels or "
                f"logits_to_keep; got {sorted(inputs)}"
            )
        inputs.update(self._no_cache())
        if "output_router_logits" in self._forward_parameters() and self.model.training and self.aux_loss_coef:
            inputs.setdefault("output_router_logits", True)
        return tokens

    def operands(self, hidden: Tensor) -> HeadOperands:
        """The operands of the head's matrix product, differentiable with respect to all that goes into them.

        Args:
            hidden: [..., H] last hidden states. A head mixes no positions, so any of them will do.

        Returns:
            HeadOperands(hidden [..., H'], weight [V, H'], bias [V] or None), hidden in weight's dtype and on its
            device. H' is H, or H + r with LoRA of rank r on the head.

        Raises:
            ValueError: the weight is quantised, or in pieces (of FSDP2 and ZeRO-3, outside `in_forward`), or an adapter
                on the head is no fixed linear map.
        """
        transform = self._transform()
        hidden, weight, bias = _layer_operands(self._output_layer(), transform(hidden) if transform else hidden)
        vocab_size = getattr(self._config(), "unpadded_vocab_size", None)
        if vocab_size is not None:  # Inkling drops the padding entries
            weight, bias = weight[:vocab_size], None if bias is None else bias[:vocab_size]
        return HeadOperands(hidden, weight, bias)

    def sequence_logps(self, hidden: Tensor, labels: Tensor, **options: Any) -> SequenceLogps:
        """`linear_sequence_logps` of hidden [S, T, H] and labels [S, T] with this head; it takes ``options``."""
        hidden, weight, bias = self.operands(hidden)
        return linear_sequence_logps(
            hidden, weight, labels, bias=bias, logit_scale=self.logit_scale, softcap=self.softcap, **options
        )

    def dpo_loss(self, hidden: Tensor, labels: Tensor, ref_logps: Tensor, **options: Any) -> LinearDPOOutput:
        """`linear_dpo_loss` of hidden [S, T, H], labels [S, T] and ref_logps [S] with this head; it takes
        ``options``."""
        hidden, weight, bias = self.operands(hidden)
        return linear_dpo_loss(
            hidden, weight, labels, ref_logps, bias=bias, logit_scale=self.logit_scale, softcap=self.softcap, **options
        )

    @torch.no_grad()
    def check(self, forward: Callable[..., Any] | None = None) -> None:
        """Compares the operands with the model's own logits, in evaluation mode, and settles scale and softcap by them.

        Hidden states of our choice are put in the place of the model's, so that nothing hangs on what it happens
        to produce: a row of zeros shows the bias, one row gives logits of unit size, and one gives logits so large that
        no softcap goes unnoticed. Where scale and softcap of the config do not reproduce the logits, their other
        readings are tried: a multiplier that divides (or the reverse), and a value that the model does not use.

        The tolerance is 4 units of the lowest precision that the model's own head computes in, relative to the largest
        logit of a row. Training mode and random state of the model are left as they were. `forward` is called in place
        of the model, for what stands in the place of the model's own forward and so must not call the model.

        Raises:
            ValueError: no reading reproduces the logits.
        """
        layer = self._output_layer()
        measured = []
        layer_dtypes: list[torch.dtype] = []  # the logits' own dtype does not show a rounding before an upcast

        def substitute(hidden: Tensor) -> Tensor:
            probe = self._probe(hidden)
            found = self.operands(probe[0])
            entries = _some_entries(found.weight)
            dtypes = {found.hidden.dtype, found.weight.dtype}
            measured.append((_products(found, entries), entries, found.weight.shape[0], dtypes, found.bias is not None))
            return probe

        with ExitStack() as stack:
            cuda = [device for device in {p.device for p in self.model.parameters()} if device.type == "cuda"]
            stack.enter_context(torch.random.fork_rng(devices=cuda, device_type="cuda"))
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(_eval_mode(self.model))
            stack.enter_context(self._last_hidden_hook(substitute))
            record_dtype = layer.register_forward_hook(lambda _, __, output: layer_dtypes.append(output.dtype))
            stack.callback(record_dtype.remove)
            tokens = torch.arange(3, device=self.model.get_input_embeddings().weight.device).unsqueeze(0)
            model_logits = (forward or self.model)(input_ids=tokens, **self._no_cache()).logits[0]
        if not measured:
            unused = layer if self.at_output_layer else self._base_models()[0]
            raise ValueError(f"{_name(self.model)} makes its logits without running {_name(unused)}")
        products, entries, rows, dtypes, has_bias = measured[-1]
        if model_logits.shape[-1] != rows:
            raise ValueError(
                f"{_name(self.model)} has {model_logits.shape[-1]} logits a position, but {rows} rows in its output "
                f"layer {_name(layer)}"
            )

        expected = model_logits[:, entries.to(model_logits.device)].cpu().double()
        dtypes |= {model_logits.dtype, *layer_dtypes}
        # 1e-4 allows for sums in another order; on a GPU, products in single precision may be TF32.
        tolerance = max(1e-4, 4 * max(torch.finfo(dtype).eps for dtype in dtypes), 4 * 2.0**-10 if cuda else 0.0)
        differences = []
        for scale, cap in itertools.product((self.logit_scale, 1 / self.logit_scale, 1.0), (self.softcap, None)):
            logits = scale * products if cap is None else cap * torch.tanh(scale * products / cap)
            difference = (logits - expected).abs().amax(-1)
            largest = torch.maximum(logits.abs(), expected.abs()).amax(-1)
            if bool((difference <= tolerance * largest + 1e-6).all()):  # not so with a NaN on either side
                self.logit_scale, self.softcap = scale, cap
                return
            differences.append(float(difference.max()))
        raise ValueError(
            f"the head found on {_name(self.model)} does not give the model's own logits: the largest difference is "
            f"{differences[0]:.3g}, with logits up to {float(expected.abs().max()):.3g}. Found: output layer "
            f"{_name(layer)}, logit_scale {self.logit_scale:g}, softcap {self.softcap}, "
            f"{'a bias' if has_bias else 'no bias'}, "
            f"{'a dense transform' if self._transform() else 'no dense transform'} before it. The model does something "
            "else to its logits. If that is a factor or a cap, set logit_scale or softcap on "
            "LMHead.from_model(model, check=False) and call check(); otherwise compute the logits and pass them to "
            "sequence_logps"
        )

    def _config(self) -> Any:
        return self.model.config.get_text_config()

    def _forward_parameters(self) -> Mapping[str, inspect.Parameter]:
        return inspect.signature(type(self.model).forward).parameters

    def _no_cache(self) -> dict[str, bool]:
        parameters = self._forward_parameters()
        accepted = "use_cache" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        return {"use_cache": False} if accepted else {}

    def _base_models(self) -> list[nn.Module]:
        """The base model, and the decoder in it that OPT and the BART family call past it."""
        base = self.model.base_model
        if base is self.model:  # Llama 4 and Mllama text models name another prefix than the attribute they have
            base = getattr(self.model, "model", None)
        if not isinstance(base, nn.Module):
            raise ValueError(
                f"no base model found on {_name(self.model)}: tried its base_model_prefix "
                f"{self.model.base_model_prefix!r} and the attribute 'model'"
            )
        decoder = getattr(base, "decoder", None)
        return [base, decoder] if isinstance(decoder, nn.Module) else [base]

    def _output_layer(self) -> nn.Module:
        layer = self.model.get_output_embeddings()
        if layer is None:
            layer = getattr(self.model, "lm_head", None)
        # The `weight` of PEFT's wrapper for trainable tokens is computed: a copy of the head, if it is gathered at all.
        if not isinstance(layer, nn.Module) or not hasattr(getattr(layer, "token_adapter", layer), "weight"):
            raise ValueError(
                f"no language-model head found on {_name(self.model)}: tried get_output_embeddings() and the attribute "
                f"'lm_head', and got {_name(layer)}. Is it a model for causal language modelling?"
            )
        return layer

    def _transform(self) -> Callable[[Tensor], Tensor] | None:
        """What the model does to the hidden states before the output layer, beside multiplying them by a number."""
        model = self.model
        if self.at_output_layer:
            return None
        if hasattr(model, "generator_predictions"):  # ELECTRA
            return model.generator_predictions
        if hasattr(model, "cls"):  # BERT and most of its family
            return getattr(model.cls.predictions, "transform", None)
        container = getattr(model, "lm_head", None)
        if getattr(model, "decoder", None) is self._output_layer():  # ModernBertDecoder
            return container
        if container is not None and hasattr(container, "dense") and hasattr(container, "layer_norm"):  # RoBERTa family
            return lambda hidden: container.layer_norm(nn.functional.gelu(container.dense(hidden)))
        return None

    @contextmanager
    def _last_hidden_hook(self, function: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
        """Calls ``function`` on each of the hidden states, and puts what it returns, if anything, in their place."""

        @torch.compiler.disable  # a new function each time would have a compiled model compiled again each time
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            replacement = function(output[0])
            if replacement is None:
                return None
            if isinstance(output, tuple):
                return (replacement, *output[1:])
            output.last_hidden_state = replacement
            return output

        def pre_hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor] | None:
            replacement = function(args[0])
            return None if replacement is None else (replacement,)

        with ExitStack() as stack:
            if self.at_output_layer:
                stack.callback(self._output_layer().register_forward_pre_hook(pre_hook).remove)
            else:
                for module in self._base_models():
                    stack.callback(module.register_forward_hook(hook).remove)
            yield

    def _probe(self, hidden: Tensor) -> Tensor:
        """Three rows like hidden [1, 3, H]: zeros, one for logits of unit size, one for logits as large as the cap."""
        rows = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0)).to(hidden)
        found = self.operands(rows[0])
        products = _products(found._replace(bias=None), _some_entries(found.weight))
        size = float(products.square().mean().sqrt()) * abs(self.logit_scale) or 1.0
        # 30 is the usual cap, for the case that the model has one which the config keeps under a name unknown to us.
        return rows * rows.new_tensor([0.0, 1.0, self.softcap or 30.0]).div(size).unsqueeze(-1)


def _layer_operands(layer: Any, hidden: Tensor) -> HeadOperands:
    """Operands of an output layer that may be wrapped by PEFT."""
    if "peft" in sys.modules:  # else nothing in the model can be PEFT's
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper

        if isinstance(layer, TrainableTokensWrapper):
            return _layer_operands(layer.token_adapter, hidden)
        if isinstance(layer, ModulesToSaveWrapper):
            adapters = layer.active_adapters
            inactive = layer.disable_adapters or not adapters or adapters[0] not in layer.modules_to_save
            return _layer_operands(layer.original_module if inactive else layer.modules_to_save[adapters[0]], hidden)
        if isinstance(layer, BaseTunerLayer):
            return _adapter_operands(layer, hidden)
    weight: Tensor = _whole(layer.weight)
    whole = weight.dim() == 2 and weight.shape[1] == hidden.shape[-1] and not hasattr(weight, "device_mesh")
    if not whole or not weight.is_floating_point() or weight.is_meta:
        raise ValueError(
            f"the output layer's weight must be a floating-point matrix [V, {hidden.shape[-1]}] in one piece; that of "
            f"{_name(layer)} is a {_name(weight)} {list(weight.shape)} of {weight.dtype} on {weight.device} "
            "(quantised, sharded or offloaded?)"
        )
    bias = getattr(layer, "bias", None)
    return HeadOperands(hidden.to(weight), weight, None if bias is None else _whole(bias))


def _whole(weight: Any) -> Any:
    """The parameter, gathered where the model is tensor parallel. Each process computes the same from all of it then,
    and of the gradient takes its own rows. What FSDP2 has sharded differs by process and by its own hooks alone is
    gathered and reduced, so that stays as it is."""
    names = getattr(getattr(weight, "device_mesh", None), "mesh_dim_names", None)
    return weight.full_tensor() if names == ("tp",) else weight


def _adapter_operands(layer: Any, hidden: Tensor) -> HeadOperands:
    from peft.tuners.lora.layer import Linear as LoraLinear
    from peft.tuners.trainable_tokens.layer import TrainableTokensLayer

    if layer.disable_adapters and layer.merged:
        layer.unmerge()  # as the layer's own forward would
    if layer.disable_adapters or layer.merged or not layer.active_adapters:
        return _layer_operands(layer.base_layer, hidden)
    if isinstance(layer, TrainableTokensLayer):
        weight = layer.get_merged_weights(layer.active_adapters)
        return HeadOperands(hidden.to(weight), weight, None)  # this layer leaves out the bias of a Linear that it wraps
    variants = getattr(layer, "lora_variant", {})
    kinds = {_name(variants[adapter]) for adapter in layer.active_adapters if adapter in variants}
    if _class_of(layer) is LoraLinear and not kinds:
        return _lora_operands(layer, hidden)
    if kinds - {"DoraLinearVariant"}:
        raise ValueError(
            f"{' and '.join(sorted(kinds))} on the head is not supported: it may be no fixed linear map of the hidden "
            "states. Use plain LoRA or DoRA there, or leave the head out of target_modules"
        )
    return _measured_operands(layer, hidden)


def _class_of(layer: nn.Module) -> type:
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
    hidden, weight, bias = _layer_operands(layer.base_layer, hidden)
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
                f"{_name(layer)} with dropout on the head is not supported: its product cannot be told from its "
                "weights. Set the adapter's dropout to 0, use plain LoRA there, or leave the head out of target_modules"
            )
    identity = torch.eye(hidden.shape[-1], dtype=hidden.dtype, device=layer.get_base_layer().weight.device)
    # Not a call of the layer, which may itself be in one: hooks that gather its weights and hook its outputs ran there.
    outputs = layer.forward(torch.cat([torch.zeros_like(identity[:1]), identity]))
    bias = outputs[0]
    return HeadOperands(hidden.to(outputs), (outputs[1:] - bias).T, bias)


def _products(found: HeadOperands, entries: Tensor) -> Tensor:
    """hidden @ weight.T + bias in fp64 for some entries of the vocabulary."""
    products = found.hidden.cpu().double() @ found.weight[entries].cpu().double().T
    return products if found.bias is None else products + found.bias[entries].cpu().double()


def _some_entries(weight: Tensor) -> Tensor:
    """At most 4096 entries of the vocabulary, spread over it, the first and the last among them."""
    return torch.linspace(0, weight.shape[0] - 1, min(weight.shape[0], 4096), device=weight.device).round().long()


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and then for each module the mode that it had."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, training in modes:
            module.training = training


def unwrap(model: Any) -> Any:
    """The model inside torch.compile (`_orig_mod`), DistributedDataParallel and its like (`module`), and PEFT."""
    children = getattr(model, "_modules", {})
    if isinstance(model, nn.parallel.DistributedDataParallel) and model.static_graph:
        raise ValueError(
            "model: expected DistributedDataParallel without static_graph, which reduces gradients only of losses made "
            "from the model's own outputs, got static_graph=True"
        )
    for name in ("_orig_mod", "module"):
        if name in children:
            return unwrap(children[name])
    return unwrap(model.get_base_model()) if hasattr(model, "get_base_model") else model


def _number(config: Any, names: tuple[str, ...]) -> float | None:
    """The first number other than zero that ``config`` has under one of ``names`` (MPT's `logit_scale` may be text)."""
    values = (getattr(config, name, None) for name in names)
    return next((float(value) for value in values if isinstance(value, (int, float)) and value), None)


def _name(thing: Any) -> str:
    return thing.__name__ if isinstance(thing, type) else type(thing).__name__
