"""A model whose forward gives log-probabilities and losses instead of logits, through whatever is wrapped around it.

What trainers put around a model (autocast, gradient synchronisation, adapters, shards) works on its forward. So head
and loss are put there: `model(**inputs, labels=labels, fused_lm_head=True)` runs the model's own forward, in which the
output layer gives log-probabilities where there are labels. TRL's trainers call their own head this way, and so call
ours when it is there instead.
"""

from __future__ import annotations

import functools
import numbers
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from dpo_kernels.linear_dpo import check_options, linear_dpo_loss
from dpo_kernels.linear_reference import GRADIENTS, linear_reference_logps
from dpo_kernels.logps import linear_sequence_logps, sum_over_vocabulary
from dpo_kernels.models.check import NotFinite
from dpo_kernels.models.head import HeadOperands, LMHead, unwrap
from dpo_kernels.models.layered_forward import install, is_outermost, layers_of
from dpo_kernels.models.operands import name_of
from dpo_kernels.models.segments import refuse_restarts
from dpo_kernels.models.through_wrappers import is_of_a_library, split
from dpo_kernels.options import PreferenceOptions, Stat, refuse_unknown
from dpo_kernels.parallel import is_dtensor
from dpo_kernels.rows import shift_labels

if TYPE_CHECKING:
    from typing_extensions import Unpack

REFERENCE_OPTIONS = ("loss_type", "ld_alpha", "chunk_bytes", "token_weights")
PREFERENCE_OPTIONS = frozenset(PreferenceOptions.__annotations__)
# What TRL calls the statistics of a position, and what we do.
STATS: dict[str, Stat] = {
    "entropy": "entropy",
    "mean_logits": "mean_logit",
    "is_top1": "is_top1",
    "log_sum_sq_probs": "log_sum_sq_probs",
}


class Preference:
    """What the forward needs for the loss of DPO, on S = 2B sequences, chosen before rejected.

    Attributes:
        ref_logps: [S]. No tuple or dataclass, in which wrappers would find them and cast them to the model's precision.
        options: of `linear_dpo_loss`, weights of tokens and pairs among them: token_weights [S, T] is aligned with the
            `labels` of the call, pair_weights [B].

    Raises:
        ValueError: ref_logps is no tensor [S], or an option is not what `linear_dpo_loss` takes.
        TypeError: an option that there is not; the message says what to write instead.
    """

    def __init__(self, ref_logps: Tensor, **options: Unpack[PreferenceOptions]) -> None:
        refuse_unknown("Preference", options, PREFERENCE_OPTIONS)
        if not isinstance(ref_logps, Tensor) or ref_logps.dim() != 1 or not ref_logps.is_floating_point():
            got = f"{list(ref_logps.shape)} of {ref_logps.dtype}" if isinstance(ref_logps, Tensor) else repr(ref_logps)
            raise ValueError(f"ref_logps: expected a floating-point tensor [S], got {got}")
        check_options(options)
        for name in ("token_weights", "pair_weights", "lengths"):
            value = options.get(name)
            if value is not None and not isinstance(value, Tensor):
                raise ValueError(f"{name}: expected a tensor or None, got {type(value).__name__}")
        self.ref_logps, self.options = ref_logps, options


class Reference:
    """Asks for log-probabilities [S] of a reference, in the tiles and the order of the policy's
    (`linear_reference_logps`): where both are one model, rewards are 0 to the bit.

    Attributes:
        gradients: of which of "hidden", "weight" and "bias" the policy's call forms a gradient.
        options: of `linear_reference_logps`: loss_type, ld_alpha, chunk_bytes and token_weights of the policy's call.
    """

    def __init__(self, gradients: Sequence[str], options: dict[str, Any]) -> None:
        if isinstance(gradients, (str, Tensor)) or not set(gradients) <= set(GRADIENTS):
            raise ValueError(f"gradients: expected some of {list(GRADIENTS)}, got {gradients!r}")
        if not isinstance(options, Mapping) or not set(options) <= set(REFERENCE_OPTIONS):
            raise ValueError(f"options: expected a dictionary of some of {list(REFERENCE_OPTIONS)}, got {options!r}")
        self.gradients, self.options = gradients, options

    @classmethod
    def of(cls, policy: Any, options: dict[str, Any]) -> Reference:
        """For a policy, a model with a head by `add_fused_lm_head` in whatever wraps it, that is called with a
        `Preference` of these options while gradients are recorded as they are now."""
        model = _model_with_head(policy) if isinstance(policy, torch.nn.Module) else None
        if model is None:
            raise ValueError(
                f"policy: expected a model to which add_fused_lm_head has added a head, got {name_of(policy)}"
            )
        layer = layers_of(model)[-1].head.output_layer()
        trained = [name.rpartition(".")[2] for name, weight in layer.named_parameters() if weight.requires_grad]
        of_head = {"bias" if name == "bias" else "weight" for name in trained}
        gradients = ("hidden", *sorted(of_head)) if torch.is_grad_enabled() else ()
        return cls(gradients, {name: value for name, value in options.items() if name in REFERENCE_OPTIONS})


@dataclass
class FusedOutput(ModelOutput):
    """What the forward gives, with what is not asked for left out, in the precision in which it was computed whatever
    precision the model's outputs are cast to. (Gradients do go through that cast: under FSDP2 in fp16, one of a loss
    that is scaled by more than 32768 overflows.) Its items are for wrappers; what gathers or stores outputs should be
    given its attributes.

    Attributes:
        log_probs: [S, T - 1] of labels[:, 1:], with a gradient, and 0 where there is no label; of `shift_labels`
            [S, T].
        entropy, mean_logits, is_top1, log_sum_sq_probs: as long as `log_probs`, of the distributions of those labels, 0
            or False where there is none.
        label_mask: as long, whether there is a label.
        loss: [] negative log-likelihood of a label, the mean or over `num_items_in_batch`, and of a mixture of experts
            in training its auxiliary loss times its coefficient; or the loss of `preference`.
        preference: what `linear_dpo_loss` gives. Then there are no `log_probs`.
        logps: [S] of a `Reference`, summed.
        all_mean_logits: [S, T] the mean logit of every position, without a gradient.
        aux_loss: [] of a mixture of experts, without its coefficient, or None.
    """

    with_gradient: tuple[Tensor, ...]  # for wrappers, which hook and cast what they find
    join: Any = None  # gives the attributes, of what became of those

    def __getitem__(self, key: Any) -> Any:
        if not isinstance(key, str):
            return super().__getitem__(key)
        if key not in self:
            raise KeyError(f"{key!r}, expected one of {sorted(self._found)}")
        return getattr(self, key)

    def __contains__(self, key: object) -> bool:
        return super().__contains__(key) or ("join" in vars(self) and (key == "loss" or key in self._found))

    def get(self, key: str, default: Any = None) -> Any:
        found = key in self
        return self[key] if found else default

    def __getattr__(self, name: str) -> Any:
        if "join" not in vars(self):  # it is being made
            raise AttributeError(name)
        if name not in self._found:
            raise AttributeError(f"FusedOutput has {sorted(self._found)}, and no {name!r}")
        return self._found[name]

    @functools.cached_property
    def _found(self) -> dict[str, Any]:
        found: dict[str, Any] = self.join(self.with_gradient)
        return found

    @functools.cached_property
    def loss(self) -> Tensor:
        found = self._found
        if "preference" in found:
            loss: Tensor = found["preference"].loss
            return loss
        items = found["num_items_in_batch"]
        if items is None:
            items = found["label_mask"].sum().clamp(min=1)
        loss = 0.0 - found["log_probs"].sum() / items
        return loss if found["aux_loss"] is None else loss + found["aux_loss_coef"] * found["aux_loss"]


def add_fused_lm_head(model: Any, outputs: Sequence[str] = ("log_probs",), *, check: bool | None = None) -> None:
    """Makes `model(**inputs, labels=labels, fused_lm_head=True)` return a `FusedOutput`. Other calls are as before.

    Args:
        model: a transformers causal language model; in adapters, `torch.compile` or DistributedDataParallel it is the
            model inside that gets the head.
        outputs: "log_probs", and any of `STATS`.
        check: whether the head is checked against the model's own logits (`LMHead.check`), in the first such call in
            training, and in evaluation, when the model is where it will be, and again when hooks on its output layer
            have changed. None is what was said when a head was last added to this model, or else True.

    With `fused_lm_head=True` the forward takes by keyword what the model's own does, and

        labels: [S, T] token ids, -100 where a position's token has no label;
        shift_labels: [S, T] in their place: what each position predicts, -100 where that is nothing;
        predictors: [S, L] int64 beside shift_labels [S, L], for rows [R, T] within `laid_out`: the position, in the
            flat [R T], whose hidden state predicts each of them;
        outputs: in place of those above, for this call;
        num_items_in_batch: what `loss` divides by;
        preference: a `Preference`; or reference: a `Reference`;
        all_mean_logits: whether to give those too. With a softcap that is a product over all positions.

    A head that is there already, this one's or TRL's, is replaced: the latest options hold. A copy of the model, by
    `copy.deepcopy`, has a head of its own; `copy.copy` and the replicas of `nn.DataParallel` share the forward of the
    model that they come from, as with every forward that is set on a model. A model that was pickled comes back
    without. Forward hooks that the output layer has are not called in such a call, but for those of libraries that wrap
    or shard models: there are no logits to see, and where a hook, or one on the model, changes them the check refuses
    it. Hidden states that are not finite give log-probabilities that are not.

    Raises:
        ValueError: the model has no head, or `outputs` has a name that is none of the above; from the forward: the head
            is quantised, or sharded otherwise than by FSDP2, ZeRO-3 or tensor parallelism, or does not give the model's
            own logits, be it for a hook.
    """
    _check_outputs(outputs)
    model = unwrap(model)
    head = LMHead(model, at_output_layer=True)
    if check is None:
        check = next((layer.checks for layer in reversed(layers_of(model))), True)
    install(model, _Fused(head, outputs, check))


def restore_fused_lm_head(model: Any) -> None:
    """Adds a head, with all of `STATS`, to a model whose head was taken away or hidden by another one: TRL's trainers
    put theirs over it, accelerate unwraps forwards."""
    inner = _model_with_head(model)
    if inner is not None and not is_outermost(inner):
        add_fused_lm_head(inner, ("log_probs", *STATS))


def _model_with_head(wrapped: Any) -> Any:
    return next((module for module in wrapped.modules() if layers_of(module)), None)


def _check_outputs(outputs: Sequence[str]) -> None:
    if isinstance(outputs, str) or not isinstance(outputs, Collection):
        raise ValueError(f"outputs: expected some of {['log_probs', *STATS]}, got {outputs!r}")
    if unknown := sorted(set(outputs) - {"log_probs", *STATS}):
        raise ValueError(f"outputs: expected some of {['log_probs', *STATS]}, got {unknown}")


class _Fused:
    """The head of a model, and forwards that it had before. What refers to the model here refers to the copy in a copy
    of it."""

    original: Callable[..., Any]
    own: Callable[..., Any]

    def __init__(self, head: LMHead, outputs: Sequence[str], checks: bool) -> None:
        self.head, self.outputs, self.checks = head, tuple(outputs), checks

    def __call__(
        self,
        *args: Any,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        predictors: Tensor | None = None,
        outputs: Sequence[str] | None = None,
        num_items_in_batch: Tensor | int | None = None,
        preference: Preference | None = None,
        reference: Reference | None = None,
        all_mean_logits: bool = False,
        **inputs: Any,
    ) -> FusedOutput:
        if labels is not None and shift_labels is not None:
            raise ValueError("shift_labels: expected None beside labels, in whose place they are, got both")
        given = labels if shift_labels is None else shift_labels
        if args or given is None:
            raise ValueError(
                "fused_lm_head: expected labels or shift_labels, and all inputs by keyword, got "
                f"{'no labels' if given is None else 'labels'}, {len(args)} input(s) by position, and by keyword "
                f"{sorted(inputs)}"
            )
        if not isinstance(given, Tensor) or given.dim() != 2:
            shape = list(given.shape) if isinstance(given, Tensor) else type(given).__name__
            raise ValueError(f"labels, shift_labels: expected a tensor [S, T], got {shape}")
        if predictors is not None and shift_labels is None:
            raise ValueError(f"predictors: expected None without shift_labels, got {type(predictors).__name__}")
        refuse_restarts(self.head.model, inputs.get("position_ids"), inputs.get("attention_mask"))
        self._check_asked(preference, reference, num_items_in_batch, inputs)
        if outputs is not None:
            _check_outputs(outputs)
        target = _Target(given, shift_labels is not None)
        names = [name for name in STATS if name in (self.outputs if outputs is None else outputs)]
        if self.checks:
            self._check(inputs)

        def scored(operands: HeadOperands) -> dict[str, Any]:
            found = _scored(self.head, operands, target, names, predictors, preference, reference)
            return found | ({"all_mean_logits": mean_logits(self.head, operands)} if all_mean_logits else {})

        found, aux_loss = self.head.in_forward(self.own, scored, **inputs)
        parts = {"num_items_in_batch": num_items_in_batch, "aux_loss_coef": self.head.aux_loss_coef}
        return FusedOutput(*split({**found, **parts, "aux_loss": aux_loss}))

    def _check_asked(self, preference: Any, reference: Any, num_items_in_batch: Any, inputs: dict[str, Any]) -> None:
        for name, value, kind in (("preference", preference, Preference), ("reference", reference, Reference)):
            if value is not None and not isinstance(value, kind):
                raise ValueError(f"{name}: expected a {kind.__name__} or None, got {name_of(value)}")
        if preference is not None and reference is not None:
            raise ValueError("reference: expected None beside a preference, got both: they are two calls")
        items = 1 if num_items_in_batch is None or isinstance(num_items_in_batch, Tensor) else num_items_in_batch
        if not isinstance(items, numbers.Real) or items <= 0:
            raise ValueError(f"num_items_in_batch: expected a number above 0, got {items!r}")
        if of_loss := sorted(set(inputs) & (PREFERENCE_OPTIONS | {"ref_logps"})):
            raise ValueError(f"{', '.join(of_loss)}: expected in preference=Preference(ref_logps, ...), not beside it")
        self.head.refuse_misspelt(inputs)

    def _check(self, inputs: dict[str, Any]) -> None:
        try:
            self.head.ensure_checked(self._as_called, inputs)
        except NotFinite:
            # weights that are NaN by now give log-probabilities and losses that are, for a gradient scaler to see
            return

    def _as_called(self, **inputs: Any) -> Any:
        """The model's own forward, and what hooks on the model make of its output, but for those of what shards it."""
        model = self.head.model
        output = self.own(**inputs)
        for number, hook in list(model._forward_hooks.items()):
            if is_of_a_library(hook):
                continue
            with_inputs = number in model._forward_hooks_with_kwargs
            found = hook(model, (), inputs, output) if with_inputs else hook(model, (), output)
            output = output if found is None else found
        return output


class _Target:
    """Labels [S, T], and what belongs to them, at the positions that predict them."""

    def __init__(self, labels: Tensor, is_shifted: bool) -> None:
        self.is_shifted, self.unshifted = is_shifted, labels

    def labels(self, device: torch.device) -> Tensor:
        labels = self.unshifted.to(device)
        return labels if self.is_shifted else shift_labels(labels, -100)

    def cut(self, values: Tensor) -> Tensor:
        """[S, T] of all positions to those that may have a label."""
        return values if self.is_shifted else values[:, :-1]

    def options(self, options: dict[str, Any], device: torch.device) -> dict[str, Any]:
        """With tensors where they are needed, and weights of tokens [S, T'] at the same positions as labels, before
        which an adapter may have put virtual tokens."""
        moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in options.items()}
        weights = moved.get("token_weights")
        if weights is not None:
            missing = self.unshifted.shape[1] - weights.shape[1]
            weights = torch.nn.functional.pad(weights, (max(0, missing), 0))
            moved["token_weights"] = weights if self.is_shifted else torch.nn.functional.pad(weights[:, 1:], (0, 1))
        return moved


def _scored(
    head: LMHead,
    operands: HeadOperands,
    target: _Target,
    names: list[str],
    predictors: Tensor | None,
    preference: Preference | None,
    reference: Reference | None,
) -> dict[str, Any]:
    hidden, weight, bias = operands
    labels = target.labels(hidden.device)
    options: dict[str, Any] = {"bias": bias, "logit_scale": head.logit_scale, "softcap": head.softcap}
    options["check_hidden"] = False  # what is not finite goes on as NaN, as in the model's own loss
    options["predictors"] = predictors.to(hidden.device) if isinstance(predictors, Tensor) else predictors
    found: dict[str, Any] = {"label_mask": target.cut(labels) != -100}
    stats: dict[str, Tensor] = {}
    wanted = [STATS[name] for name in names]
    if preference is not None:
        ref_logps = preference.ref_logps.to(hidden.device)
        options |= target.options({**preference.options}, hidden.device)
        output = linear_dpo_loss(hidden, weight, labels, ref_logps, stats=wanted, **options)
        found["preference"], stats = output._replace(stats={}), output.stats
    elif reference is not None:
        options |= target.options(reference.options, hidden.device)
        scored = linear_reference_logps(hidden, weight, labels, gradients=reference.gradients, **options)
        found |= {"log_probs": target.cut(scored.token_logps), "logps": scored.logps}
        names = []
    else:
        scored = linear_sequence_logps(hidden, weight, labels, stats=wanted, **options)
        found["log_probs"], stats = target.cut(scored.token_logps).clone(), scored.stats  # FSDP2 warns of views
    return found | {name: target.cut(stats[STATS[name]]) for name in names}


@torch.no_grad()
def mean_logits(head: LMHead, operands: HeadOperands) -> Tensor:
    """[S, T] fp32: the mean over the vocabulary of the logits of every position, without computing them where they
    are linear in the hidden states."""
    hidden, weight, bias = operands
    if head.softcap is not None:
        every = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
        options: dict[str, Any] = {"bias": bias, "logit_scale": head.logit_scale, "softcap": head.softcap}
        options |= {"stats": ("mean_logit",), "check_hidden": False}
        return linear_sequence_logps(hidden, weight, every, **options).stats["mean_logit"]
    entries = weight.shape[0]
    here = weight.to_local() if is_dtensor(weight) else weight
    bias_here = bias.to_local() if is_dtensor(bias) else bias
    weight_sum, bias_sum = sum_over_vocabulary(here, bias_here, torch.float32)
    if is_dtensor(weight):
        sums = torch.cat([weight_sum, torch.as_tensor(bias_sum, device=weight_sum.device)[None]])
        torch.distributed.all_reduce(sums, group=weight.device_mesh.get_group())
        weight_sum, bias_sum = sums[:-1], sums[-1]
    with torch.autocast(hidden.device.type, enabled=False):
        return (hidden.float() @ weight_sum + bias_sum) * (head.logit_scale / entries)
