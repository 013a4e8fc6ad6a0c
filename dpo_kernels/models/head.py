"""The language-model head of a Hugging Face causal language model, as operands for the fused functions."""

from __future__ import annotations

import difflib
import inspect
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dpo_kernels.linear_dpo import LinearDPOOutput, linear_dpo_loss
from dpo_kernels.logps import SequenceLogps, linear_sequence_logps
from dpo_kernels.models import check
from dpo_kernels.models.operands import HeadOperands, as_taken_by, is_tensor_parallel, layer_operands, name_of
from dpo_kernels.models.segments import laid_out, refuse_restarts
from dpo_kernels.models.through_wrappers import Found, as_laid_out, computed_in, on_this_rank
from dpo_kernels.options import LinearDPOOptions, LogpsOptions, is_at_hand, refuse_unknown
from dpo_kernels.sequence_parallel import in_step

if TYPE_CHECKING:
    from typing_extensions import Unpack

LOGPS_OPTIONS, LINEAR_DPO_OPTIONS = (frozenset(kind.__annotations__) for kind in (LogpsOptions, LinearDPOOptions))

# Where configs keep the factor on the logits, the cap and the weight of the auxiliary loss, for every causal language
# model of transformers 5.23. MiniCPM3 and Inkling divide the hidden states instead, which is the same product.
_MULTIPLIERS = ("logit_scale", "output_multiplier", "lm_head_multiplier")
_DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
_AUX_LOSS_COEFS = ("router_aux_loss_coef", "aux_loss_coef")


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
                f"one inside PEFT, DistributedDataParallel or torch.compile; got {name_of(model)}"
            )
        if self.model.config.is_encoder_decoder:
            raise ValueError(f"model must be decoder-only, got the encoder-decoder {name_of(self.model)}")
        if not at_output_layer:
            self._base_models()  # a model without a base or a head is an error now rather than at the first step
        self.output_layer()
        self._checked: set[tuple[Any, ...]] = set()  # states of the model in which the head was found to be right
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
            check: run `check` now, a forward pass of some 130 tokens, in the mode that the model is in; and once in the
                other mode, when hidden states or losses are first asked for in it.

        Raises:
            ValueError: no head or base model is found; the hidden states cannot be had without the logits through what
                the model is wrapped in; or the check fails (`CheckFailed`, `NotFinite`).
        """
        if not isinstance(check, bool):
            raise ValueError(f"check: expected True or False, got {check!r}")
        head = cls(model)
        if check:
            head.check()
        return head

    def hidden_states(self, input_ids: Tensor | None = None, **inputs: Any) -> tuple[Tensor, Tensor | None]:
        """The last hidden states of the base model, without computing a logit.

        The model is called as a whole, through whatever wraps it, with a `logits_to_keep` that keeps no position, and
        the base model's output is caught on its way to the head. To call the base model by itself would be shorter,
        but would skip what happens around it: gradient synchronisation in DistributedDataParallel, the autocast that
        accelerate puts on the forward, PEFT's forward hooks, images that some models put into the text there, and the
        auxiliary loss, which each mixture-of-experts family computes its own way. Where forward has no
        `logits_to_keep`, the output layer is left out instead, and the model is taken by itself alone; and where its
        weight is in shards of the vocabulary, since DTensors do not multiply no positions.

        Args:
            input_ids: [S, T].
            **inputs: what else the model's forward takes, without labels. `use_cache` is set to False. In training,
                `output_router_logits` is True unless given, where the model has a weight for the auxiliary loss.

        Returns:
            hidden [S, T, H] in the model's dtype, and the auxiliary loss [] of mixture-of-experts models as in their
            ``outputs.aux_loss``, else None. It is unweighted: what goes into a loss is ``aux_loss_coef`` times it.

        Raises:
            ValueError: the hidden states cannot be had without the logits, or do not match the input's positions.
        """
        if input_ids is not None:
            inputs["input_ids"] = input_ids
        if self.at_output_layer:
            raise ValueError("at_output_layer: expected False for hidden_states, got True; such a head has in_forward")
        tokens = self._settle(inputs)
        self._refuse_unreachable()
        self._check_again()
        caught: list[Tensor] = []
        calls: Counter[nn.Module] = Counter()

        def catch(module: nn.Module, hidden: Tensor) -> None:
            calls[module] += 1
            caught.append(hidden)

        with self.with_last_hidden(catch):
            weight = getattr(self.output_layer(), "weight", None)
            if "logits_to_keep" in self._forward_parameters() and not is_tensor_parallel(weight):
                no_position = torch.empty(0, dtype=torch.long, device=tokens.device)
                outputs = self.wrapped(**inputs, logits_to_keep=no_position)
            else:
                with computed_in(self.output_layer(), lambda hidden: None, self._no_logits):
                    outputs = self.wrapped(**inputs)
        if not caught:
            raise ValueError(
                f"cannot get the hidden states of {name_of(self.model)} inside {name_of(self.wrapped)}: it runs the "
                "base model where it cannot be observed. Pass the bare model, and compile its layers rather than the "
                "whole"
            )
        if max(calls.values()) > 1:
            raise ValueError(
                f"{name_of(self.model)} runs its base model {max(calls.values())} times in a forward, expected once"
            )
        hidden = caught[-1]
        if hidden.shape[:2] != tokens.shape[:2]:
            raise ValueError(
                f"{name_of(self.wrapped)} has hidden states for {list(hidden.shape[:2])} positions, expected "
                f"{list(tokens.shape[:2])} as in its input (prompt-learning adapters are not supported)"
            )
        return hidden, getattr(outputs, "aux_loss", None)

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
            found = self.operands(hidden, in_shards=True)
            rows.append(found.weight.shape[0])
            return function(found)

        def no_logits(hidden: Tensor) -> Tensor:
            return hidden.new_empty(*hidden.shape[:-2], 0, rows[-1])

        with computed_in(self.output_layer(), computed, no_logits) as results:
            outputs = forward(**inputs)
        if len(results) != 1:
            raise ValueError(
                f"{name_of(self.model)} runs its output layer {len(results)} times in a forward, expected once"
            )
        return results[0], getattr(outputs, "aux_loss", None)

    def _no_logits(self, hidden: Tensor) -> Tensor:
        return hidden.new_empty(*hidden.shape[:-2], 0, self._config().vocab_size)

    def _settle(self, inputs: dict[str, Any]) -> Tensor:
        """Checks and completes the inputs of the model, and gives those that stand for its tokens."""
        tokens: Any = inputs.get("input_ids")
        if tokens is None:
            tokens = inputs.get("inputs_embeds")
        name, rank = ("input_ids", 2) if inputs.get("input_ids") is not None else ("inputs_embeds", 3)
        if tokens is not None and (not isinstance(tokens, Tensor) or tokens.dim() != rank):
            got = list(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
            raise ValueError(f"{name}: expected a tensor {'[S, T]' if rank == 2 else '[S, T, H]'}, got {got}")
        if tokens is not None and tokens.is_floating_point() == (rank == 2):
            raise ValueError(f"{name}: expected {'integers' if rank == 2 else 'floating point'}, got {tokens.dtype}")
        if rank == 2 and tokens is not None and is_at_hand(tokens) and tokens.numel():
            self._refuse_unknown_ids(tokens)
        self.refuse_misspelt(inputs)
        refuse_restarts(self.model, inputs.get("position_ids"), inputs.get("attention_mask"))
        if inputs.get("labels", ...) is None:
            del inputs["labels"]
        if tokens is None or "labels" in inputs or "logits_to_keep" in inputs:
            raise ValueError(
                "the model takes input_ids or inputs_embeds and its other inputs here, but not labels or "
                f"logits_to_keep; got {sorted(inputs)}"
            )
        inputs.update(self.no_cache())
        if self.has_router_loss and self.model.training:
            inputs.setdefault("output_router_logits", True)
        found: Tensor = tokens
        return found

    @property
    def has_router_loss(self) -> bool:
        """Whether `hidden_states` gives an auxiliary loss in training."""
        return bool(self.aux_loss_coef) and "output_router_logits" in self._forward_parameters()

    def operands(self, hidden: Tensor, *, in_shards: bool = False) -> HeadOperands:
        """The operands of the head's matrix product, differentiable with respect to all that goes into them.

        Args:
            hidden: [..., H] last hidden states. A head mixes no positions, so any of them will do.
            in_shards: where a tensor-parallel model shards the vocabulary, weight and bias are DTensors, which
                `linear_sequence_logps` and `linear_dpo_loss` take; else they are gathered.

        Returns:
            HeadOperands(hidden [..., H'], weight [V, H'], bias [V] or None), hidden in weight's dtype and on its
            device. H' is H, or H + r with LoRA of rank r on the head.

        Raises:
            ValueError: the weight is quantised, or in pieces (of FSDP2 and ZeRO-3, outside `in_forward`), or an adapter
                on the head is no fixed linear map.
        """
        _check_hidden(hidden)
        transform = self._transform()
        vocab_size = getattr(self._config(), "unpadded_vocab_size", None)
        hidden, weight, bias = layer_operands(
            self.output_layer(),
            transform(hidden) if transform else hidden,
            in_shards=in_shards and vocab_size is None,
        )
        if vocab_size is not None:  # Inkling drops the padding entries
            weight, bias = weight[:vocab_size], None if bias is None else bias[:vocab_size]
        return HeadOperands(hidden, weight, bias)

    @in_step
    def sequence_logps(
        self, hidden: Tensor, labels: Tensor, *, shift: bool = True, **options: Unpack[LogpsOptions]
    ) -> SequenceLogps:
        """`linear_sequence_logps` of hidden [S, T, H] with this head.

        Args:
            hidden: as `hidden_states` gives them.
            labels: [S, T], those of Hugging Face's models: labels[s, t] is the token at position t, which
                hidden[s, t - 1] predicts, or -100.
            shift: False: labels are aligned, and hidden[s, t] predicts labels[s, t].
            **options: more keywords of that function.
        """
        hidden, weight, bias = self._ready(hidden, "sequence_logps", options, LOGPS_OPTIONS)
        of_head: Any = {"bias": bias, "logit_scale": self.logit_scale, "softcap": self.softcap}
        return linear_sequence_logps(hidden, weight, labels, shift=shift, **of_head, **options)

    @in_step
    def dpo_loss(
        self,
        hidden: Tensor,
        labels: Tensor,
        ref_logps: Tensor,
        *,
        shift: bool = True,
        **options: Unpack[LinearDPOOptions],
    ) -> LinearDPOOutput:
        """`linear_dpo_loss` of hidden [S, T, H] and ref_logps [S] with this head.

        Args:
            hidden: as `hidden_states` gives them.
            labels: [S, T], those of Hugging Face's models: labels[s, t] is the token at position t, which
                hidden[s, t - 1] predicts, or -100.
            ref_logps: [S].
            shift: False: labels are aligned, and hidden[s, t] predicts labels[s, t].
            **options: more keywords of that function.
        """
        hidden, weight, bias = self._ready(hidden, "dpo_loss", options, LINEAR_DPO_OPTIONS)
        of_head: Any = {"bias": bias, "logit_scale": self.logit_scale, "softcap": self.softcap}
        return linear_dpo_loss(hidden, weight, labels, ref_logps, shift=shift, **of_head, **options)

    def _refuse_unknown_ids(self, tokens: Tensor) -> None:
        """Ids that have no embedding, but for those that the config knows, which may stand for images."""
        try:
            room = self.model.get_input_embeddings().weight.shape[0]  # 0 where ZeRO-3 has it in pieces
        except (AttributeError, NotImplementedError):  # a model that does not say: it finds out by itself
            return
        wrong = tokens[(tokens < 0) | (tokens >= room)].unique().tolist() if room else []
        if wrong and not set(wrong) <= set(check.numbers_of(self.model.config.to_dict())):
            raise ValueError(f"input_ids: expected ids in [0, {room}), got {wrong[:3]}")

    def refuse_misspelt(self, inputs: Mapping[str, Any]) -> None:
        """What a forward with `**kwargs` would take, and take no notice of."""
        parameters = self._forward_parameters()
        usual = {"input_ids", "attention_mask", "position_ids", "inputs_embeds"}.intersection(parameters) - set(inputs)
        for name in inputs:
            near = difflib.get_close_matches(name, usual, n=1, cutoff=0.75)
            if name not in parameters and near and not name.endswith(near[0]):  # decoder_attention_mask
                raise ValueError(
                    f"{name}: expected an input of {name_of(self.model)}, which has no such; did you mean {near[0]!r}?"
                )

    def _ready(self, hidden: Any, method: str, options: Mapping[str, Any], known: frozenset[str]) -> HeadOperands:
        """The operands, once it is clear that they can be had of what was given."""
        refuse_unknown(f"LMHead.{method}", options, known)
        _check_hidden(hidden)
        if hidden.dim() != 3 or not hidden.is_floating_point():
            raise ValueError(f"hidden: expected floating-point [S, T, H], got {list(hidden.shape)} of {hidden.dtype}")
        if hidden.is_meta:
            raise ValueError("hidden: expected values, got a tensor on the meta device, which has none")
        vocab_size, size = self._config().vocab_size, getattr(self._config(), "hidden_size", None)
        if size is not None and hidden.shape[-1] == vocab_size != size:
            raise ValueError(
                f"hidden: expected hidden states [S, T, {size}], got {list(hidden.shape)}, which are logits: those are "
                "for dpo_kernels.sequence_logps"
            )
        self._check_again()
        return self.operands(hidden, in_shards=True)

    def __repr__(self) -> str:
        layer = self.output_layer()
        checked = "checked" if self._checked else "not checked"
        return (
            f"LMHead({name_of(self.model)}, {name_of(layer)} {list(_weight_shape(layer))}, "
            f"logit_scale={self.logit_scale:g}, softcap={self.softcap}, {checked})"
        )

    @torch.compiler.disable  # it runs the model as it is, and once
    @torch.no_grad()
    def check(self, forward: Callable[..., Any] | None = None, inputs: dict[str, Any] | None = None) -> None:
        """Compares the head with the model's own logits, and settles scale and softcap by them.

        Hidden states of our choice are put in the place of the model's, on a text of some 130 tokens; every entry of
        the vocabulary is compared at some positions, and some entries at every position. Where scale and softcap of the
        config do not reproduce the logits, their other readings are tried: a multiplier that divides (or the reverse),
        and a value that the model does not use. The model is in the mode that it has, training or evaluation, but for
        its layers, whose output is replaced. Modes and random state are left as they were.

        Logits may differ by 1e-4 in fp32; otherwise by what the lowest precision rounds that the model's head computes
        in, and a row as a whole by one unit of it: in bf16 a factor of 1.01 shows. The model is run in full precision,
        or under the autocast that is active where it does not run otherwise.

        Args:
            forward: is called in place of the model, for what stands in the place of the model's own forward and so
                must not call the model.
            inputs: for a head at the output layer, what the model is run with if it does not run on text alone.

        Raises:
            CheckFailed: a ValueError: no reading reproduces the logits, or the model does not run.
            NotFinite: a ValueError: the head's logits are not finite.
        """
        self._run_check(forward, inputs, settled=False)

    @torch.compiler.disable
    @torch.no_grad()
    def ensure_checked(self, forward: Callable[..., Any] | None = None, inputs: dict[str, Any] | None = None) -> None:
        """`check`, unless it has passed in the mode that the model is in, with the output layer and the hooks that it
        has. What was settled then holds."""
        if self._state() not in self._checked:
            self._run_check(forward, inputs, settled=bool(self._checked))

    def _run_check(self, forward: Callable[..., Any] | None, inputs: dict[str, Any] | None, *, settled: bool) -> None:
        self._refuse_unreachable()
        state, given = self._state(), inputs if self.at_output_layer else None
        try:
            with laid_out(None):  # it is run on inputs of its own
                self.logit_scale, self.softcap = check.readings(self, forward or self.model, given, settled=settled)
        except check.NotFinite:  # the rest of it is right: said once
            self._checked.add(state)
            raise
        self._checked.add(state)

    def _check_again(self) -> None:
        """Where the head is to be checked, and something has changed since it was."""
        if self._checked and not self.at_output_layer:
            self.ensure_checked()

    def _state(self) -> tuple[Any, ...]:
        """What has to be as it was when the head was found to be right."""
        layer = self.output_layer()
        forwards = [vars(module).get("forward") for module in layer.modules()]
        return self.model.training, weakref.ref(layer), check.what_is_done_by(self.model, *layer.modules(), *forwards)

    def _refuse_unreachable(self) -> None:
        if not (self.at_output_layer or "logits_to_keep" in self._forward_parameters() or self.wrapped is self.model):
            raise ValueError(
                f"cannot get the hidden states of {name_of(self.model)} inside {name_of(self.wrapped)}: its forward "
                "has no logits_to_keep. Pass the bare model; or use add_fused_lm_head (dpo_kernels.models), which "
                "computes the head inside the forward, through adapters and other wrappers"
            )

    def _config(self) -> Any:
        return self.model.config.get_text_config()

    def _forward_parameters(self) -> Mapping[str, inspect.Parameter]:
        return inspect.signature(type(self.model).forward).parameters

    def no_cache(self) -> dict[str, bool]:
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
                f"no base model found on {name_of(self.model)}: tried its base_model_prefix "
                f"{self.model.base_model_prefix!r} and the attribute 'model'. add_fused_lm_head (dpo_kernels.models) "
                "needs none: it computes the head in the output layer's own place"
            )
        decoder = getattr(base, "decoder", None)
        return [base, decoder] if isinstance(decoder, nn.Module) else [base]

    def output_layer(self) -> nn.Module:
        """The module that the model multiplies its last hidden states by, with the adapters that it has."""
        layer = self.model.get_output_embeddings()
        if layer is None:
            layer = getattr(self.model, "lm_head", None)
        if layer is None:  # a model of several towers may leave it to the one for text
            parts = [part for part in self.model.children() if hasattr(part, "get_output_embeddings")]
            layers = [found for part in parts if (found := part.get_output_embeddings()) is not None]
            layer = layers[0] if len(layers) == 1 else None
        # The `weight` of PEFT's wrapper for trainable tokens is computed: a copy of the head, if it is gathered at all.
        if not isinstance(layer, nn.Module) or not hasattr(getattr(layer, "token_adapter", layer), "weight"):
            raise ValueError(
                f"no language-model head found on {name_of(self.model)}: tried get_output_embeddings() and the "
                f"attribute 'lm_head', and got {name_of(layer)}. Is it a model for causal language modelling?"
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
        if getattr(model, "decoder", None) is self.output_layer():  # ModernBertDecoder
            return container
        if container is not None and hasattr(container, "dense") and hasattr(container, "layer_norm"):  # RoBERTa family
            return lambda hidden: container.layer_norm(nn.functional.gelu(container.dense(hidden)))
        return None

    @contextmanager
    def with_last_hidden(self, function: Callable[[nn.Module, Tensor], Tensor | None]) -> Iterator[list[nn.Module]]:
        """Calls ``function`` on the last hidden states and the module that gives or takes them, whenever that is run,
        and puts what it returns, if anything, in their place. Gives these modules."""

        @torch.compiler.disable  # a new function each time would have a compiled model compiled again each time
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            replacement = function(module, output[0])
            if replacement is None:
                return None
            if isinstance(output, tuple):
                return (replacement, *output[1:])
            output.last_hidden_state = replacement
            return output

        @torch.compiler.disable
        def pre_hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
            hidden = function(module, on_this_rank(args[0])) if self.at_output_layer else None
            # An output layer in another precision than the model takes these only under autocast, or from here.
            return (as_taken_by(module, args[0] if hidden is None else as_laid_out(hidden, args[0])),)

        with ExitStack() as stack:
            layer = self.output_layer()
            stack.callback(layer.register_forward_pre_hook(pre_hook).remove)
            sources = [layer] if self.at_output_layer else self._base_models()
            for module in () if self.at_output_layer else sources:
                stack.callback(module.register_forward_hook(hook).remove)
            yield sources


def _check_hidden(hidden: object) -> None:
    if not isinstance(hidden, Tensor):
        hint = "; hidden_states gives two things: hidden, aux_loss" if isinstance(hidden, tuple) else ""
        raise ValueError(f"hidden: expected a tensor [S, T, H], got {type(hidden).__name__}{hint}")


def _weight_shape(layer: Any) -> tuple[int, ...]:
    return tuple(getattr(layer, "token_adapter", layer).weight.shape)


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
