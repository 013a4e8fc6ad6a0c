"""TRL's preference trainers with this package's head.

    from dpo_kernels.trl import DPOTrainer      # instead of: from trl import DPOTrainer

The classes are subclasses of TRL's: same arguments, same configuration, same logs. For scripts and frameworks that
import TRL's own, `patch()` changes those where they are.

    class           in TRL                      what is replaced
    DPOTrainer      trl                         head and loss together (`linear_dpo_loss`); metrics in one transfer
    KTOTrainer      trl                         head
    CPOTrainer      trl.experimental.cpo        head; also SimPO
    ORPOTrainer     trl.experimental.orpo       head

Adapters on the head, which TRL refuses, are trained. A head that is sharded over devices (FSDP, ZeRO-3, tensor
parallel) is an error in the first step, and so is an encoder-decoder model. TRL 1.15 and 1.16 are tested. With another
version the first batch is computed by TRL's own code too, and training goes on only if both agree.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import MethodType, ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dpo_kernels.fused_forward import STATS, Preference, add_fused_lm_head
from dpo_kernels.head import unwrap
from dpo_kernels.losses import SMOOTHED_LOSSES, validate_dpo_options

try:
    import trl
    from trl.trainer import dpo_trainer as _dpo
    from trl.trainer import kto_trainer as _kto
except ImportError as error:
    raise ImportError("dpo_kernels.trl needs TRL 1.15 or newer: pip install 'dpo_kernels[trl]'") from error
if not (hasattr(_dpo, "add_fused_lm_head") and hasattr(_kto, "add_fused_lm_head")):
    raise ImportError(
        f"dpo_kernels.trl needs TRL 1.15 or newer, whose trainers score in the forward; got {trl.__version__}"
    )

if TYPE_CHECKING:
    from trl.experimental.cpo import CPOTrainer as CPOTrainer
    from trl.experimental.orpo import ORPOTrainer as ORPOTrainer

__all__ = ["CPOTrainer", "DPOTrainer", "KTOTrainer", "ORPOTrainer", "patch", "unpatch"]

TESTED = ("1.15", "1.16")
EXPERIMENTAL = {"CPOTrainer": "trl.experimental.cpo", "ORPOTrainer": "trl.experimental.orpo"}
F_DIVERGENCES = {"js_divergence": "js", "alpha_divergence": "alpha"}  # the others have the same name
NOT_INPUTS = frozenset({"completion_mask", "ref_chosen_logps", "ref_rejected_logps"})
TRLS_HEAD: Callable[..., None] = _dpo.add_fused_lm_head


class _NoLayer:
    """Stands where TRL looks whether an adapter is on the head, in order to refuse it."""


@contextmanager
def _replaced(owner: Any, **attributes: Any) -> Iterator[None]:
    before = {name: getattr(owner, name) for name in attributes}
    for name, value in attributes.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


def _with_our_head(init: Callable[..., None], module: ModuleType) -> Callable[..., None]:
    """The `__init__` of a trainer that adds a fused head to its models, which is ours."""

    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        refusal = {"BaseTunerLayer": _NoLayer} if hasattr(module, "BaseTunerLayer") else {}  # it is PEFT's
        with _replaced(module, add_fused_lm_head=add_fused_lm_head, **refusal):
            init(self, *args, **kwargs)
        if module is _dpo:
            validate_dpo_options(**_dpo_options(self))  # rather than in the first step

    return __init__


# DPO


def _dpo_options(trainer: Any) -> dict[str, Any]:
    """The trainer's settings as `linear_dpo_loss` takes them."""
    smoothed = not SMOOTHED_LOSSES.isdisjoint(trainer.loss_types)
    return {
        "beta": trainer.beta,
        "loss_type": tuple(trainer.loss_types),
        "loss_weights": tuple(trainer.loss_weights),
        "label_smoothing": trainer.label_smoothing if smoothed else 0.0,  # TRL's other losses take no notice of it
        "f_divergence": F_DIVERGENCES.get(trainer.f_divergence_type, trainer.f_divergence_type),
        "f_alpha": trainer.f_alpha_divergence_coef,
        "discopop_tau": trainer.args.discopop_tau,
        "ld_alpha": trainer.ld_alpha,
        "use_weighting": trainer.use_weighting,
    }


def _dpo_compute_loss(self: Any, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
    """TRL's `_compute_loss`, with the reference scored first: then the gradients of the head are formed in the forward,
    with three products instead of four. Dropout, which TRL turns off by default, draws other masks for that reason."""
    model_inputs = {name: value for name, value in inputs.items() if name not in NOT_INPUTS} | {"use_cache": False}
    labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
    if self.precompute_ref_logps:
        reference = inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
    else:
        reference = self.compute_ref_log_probs(self.model if self.ref_model is None else self.ref_model, inputs)
    preference = Preference(torch.cat(reference), _dpo_options(self))
    router = {"output_router_logits": True} if self.aux_loss_enabled else {}
    outputs = model(**model_inputs, **router, labels=labels, fused_lm_head=True, preference=preference)
    loss = outputs.preference.loss
    if self.aux_loss_enabled:
        loss = loss + self.router_aux_loss_coef * outputs.aux_loss
    _record(self, outputs, inputs["attention_mask"])
    if not return_outputs:
        return loss
    with torch.no_grad():
        return loss, model(**model_inputs)  # for `compute_metrics`: the only way to logits


# What a micro-batch says of itself, summed over its processes.
COUNTS = ("processes", "input_tokens", "pairs", "chosen_tokens", "rejected_tokens")
SUMS = (
    "entropy",
    "chosen_logits",
    "rejected_logits",
    "top1",
    "chosen_rewards",
    "rejected_rewards",
    "accurate",
    "chosen_logps",
    "rejected_logps",
    "aux_loss",
)


@torch.no_grad()
def _record(trainer: Any, outputs: Any, attention_mask: Tensor) -> None:
    """Keeps the sums of this micro-batch on the device until they are logged: nothing waits for it."""
    found = outputs.preference
    pairs = found.losses.shape[0]
    (chosen_logits, rejected_logits), (chosen_top1, _) = outputs.mean_logits.chunk(2), outputs.is_top1.chunk(2)
    chosen_logps, rejected_logps = found.logps.chunk(2)
    chosen_tokens, rejected_tokens = found.num_tokens.chunk(2)
    values = {
        "processes": 1,
        "input_tokens": attention_mask,
        "pairs": pairs,
        "chosen_tokens": chosen_tokens,
        "rejected_tokens": rejected_tokens,
        "entropy": outputs.entropy,
        "chosen_logits": chosen_logits,
        "rejected_logits": rejected_logits,
        "top1": chosen_top1,
        "chosen_rewards": found.chosen_rewards,
        "rejected_rewards": found.rejected_rewards,
        "accurate": found.chosen_rewards > found.rejected_rewards,
        "chosen_logps": chosen_logps,
        "rejected_logps": rejected_logps,
        "aux_loss": 0 if outputs.aux_loss is None else outputs.aux_loss,
    }
    device = found.losses.device
    wide = torch.float32 if device.type == "mps" else torch.float64
    sums = torch.stack([torch.as_tensor(values[name], device=device).sum(dtype=wide) for name in (*COUNTS, *SUMS)])
    everywhere = trainer.accelerator.gather(sums[None]).sum(0)
    _recorded(trainer)["train" if trainer.model.training else "eval"].append(everywhere)
    if trainer.model.training:  # evaluation logs them too, whenever it comes
        _recorded(trainer)["tokens"].append(everywhere[COUNTS.index("input_tokens")])


def _recorded(trainer: Any) -> dict[str, list[Tensor]]:
    if "_dpo_kernels_recorded" not in vars(trainer):  # TRL's __init__ knows nothing of it
        trainer._dpo_kernels_recorded = defaultdict(list)
    return trainer._dpo_kernels_recorded


def _metrics_of(row: Sequence[float]) -> dict[str, float]:
    """Of one micro-batch, under TRL's names."""
    of = dict(zip((*COUNTS, *SUMS), row, strict=True))

    def mean(name: str, count: float) -> float:
        return of[name] / count if count else 0.0

    metrics = {
        "entropy": mean("entropy", of["chosen_tokens"] + of["rejected_tokens"]),
        "mean_token_accuracy": mean("top1", of["chosen_tokens"]),
        "rewards/accuracies": mean("accurate", of["pairs"]),
        "aux_loss": mean("aux_loss", of["processes"]),
    }
    for side in ("chosen", "rejected"):
        metrics[f"logits/{side}"] = mean(f"{side}_logits", of[f"{side}_tokens"])
        metrics[f"rewards/{side}"] = mean(f"{side}_rewards", of["pairs"])
        metrics[f"logps/{side}"] = mean(f"{side}_logps", of["pairs"])
    return metrics | {"rewards/margins": metrics["rewards/chosen"] - metrics["rewards/rejected"]}


def _report(trainer: Any) -> None:
    """Hands what was recorded to TRL's `log`, which takes means over the micro-batches."""
    mode = "train" if trainer.model.training else "eval"
    rows = _recorded(trainer).pop(mode, [])
    if not rows:
        return
    metrics, tokens, width = trainer._metrics[mode], _recorded(trainer).pop("tokens", []), len(COUNTS) + len(SUMS)
    values = torch.cat([*rows, *(count[None] for count in tokens)]).tolist()
    trainer._total_train_tokens += sum(int(count) // trainer._tp_size for count in values[width * len(rows) :])
    for start in range(0, width * len(rows), width):
        row = values[start : start + width]
        for name, value in _metrics_of(row).items():
            if name != "aux_loss" or trainer.aux_loss_enabled:
                metrics[name].append(value)
    metrics["num_tokens"] = [trainer._total_train_tokens]


def _with_our_metrics(log: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(log)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> None:
        _report(self)
        log(self, *args, **kwargs)

    return wrapped


# CPO, SimPO and ORPO


def _with_added_head(init: Callable[..., None]) -> Callable[..., None]:
    """The `__init__` of a trainer that works on logits."""

    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        add_fused_lm_head(unwrap(self.model))

    return __init__


def _concatenated_forward(self: Any, model: Any, batch: dict[str, Any]) -> tuple[Tensor, ...]:
    """TRL's, but for the logits, of which it gives the means [] that are logged."""
    orpo = hasattr(self, "odds_ratio_loss")
    padding = self.padding_value if orpo else self.pad_token_id
    inputs = self.concatenated_inputs(batch, padding_value=padding, device=self.accelerator.device)
    pairs = batch["chosen_labels"].shape[0]
    tokens, mask = inputs["concatenated_input_ids"], inputs["concatenated_attention_mask"]
    labels = inputs["concatenated_labels"]
    scored = labels
    if orpo:  # whose likelihood is that of the prompt too
        scored = torch.cat([tokens[:pairs].masked_fill(mask[:pairs] != 1, -100), labels[pairs:]])
    router = {"output_router_logits": True} if self.aux_loss_enabled else {}
    out = model(
        input_ids=tokens, attention_mask=mask, **router, labels=scored, fused_lm_head=True, all_mean_logits=True
    )
    is_response = labels[:, 1:] != -100
    logps = (out.log_probs * is_response).sum(-1)
    if orpo or self.loss_type in ("ipo", "simpo"):
        logps = logps / is_response.sum(-1)
    nll = -out.log_probs[:pairs].sum() / (scored[:pairs, 1:] != -100).sum()
    if not orpo and self.cpo_alpha == 0:
        nll = torch.zeros_like(nll)
    logits = out.all_mean_logits[:, :-1] if orpo else out.all_mean_logits
    found = (*logps.split(pairs), *(half.mean() for half in logits.split(pairs)), nll)
    return (*found, out.aux_loss) if self.aux_loss_enabled else found


def _with_our_forward(own: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(own)
    def concatenated_forward(self: Any, model: Any, batch: dict[str, Any]) -> tuple[Tensor, ...]:
        found = _concatenated_forward(self, model, batch)
        if _is_to_be_verified(self):
            with torch.no_grad():
                by_trl = own(self, model, batch)
            names = ("logps/chosen", "logps/rejected", "logits/chosen", "logits/rejected", "nll_loss")
            ours, theirs = (dict(zip(names, map(torch.mean, of), strict=False)) for of in (found, by_trl))
            _compare(self, ours, theirs)
        return found

    return concatenated_forward


# Versions that are not tested


def _is_to_be_verified(trainer: Any) -> bool:
    tested = trl.__version__.startswith(tuple(f"{version}." for version in TESTED))
    return not tested and not getattr(trainer, "_dpo_kernels_verified", False)


def _verified(ours: Callable[..., Any], own: Callable[..., Any]) -> Callable[..., Any]:
    """A `_compute_loss` that is TRL's `own` or replaces it."""

    @functools.wraps(own)
    def _compute_loss(self: Any, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        result = ours(self, model, inputs, return_outputs)
        if _is_to_be_verified(self):
            loss = _everywhere(self, result[0] if return_outputs else result)
            _compare(self, {"loss": loss, **_latest(self)}, _by_trl(self, own, model, inputs))
        return result

    return _compute_loss


def _everywhere(trainer: Any, loss: Tensor) -> float:
    """The mean over processes, which then all come to the same verdict."""
    return trainer.accelerator.gather(loss.detach()[None]).mean().item()


def _latest(trainer: Any) -> dict[str, float]:
    """The metrics of the last micro-batch."""
    mode = "train" if trainer.model.training else "eval"
    if recorded := _recorded(trainer).get(mode):
        return _metrics_of(recorded[-1].tolist())
    return {name: values[-1] for name, values in trainer._metrics[mode].items()}


def _by_trl(trainer: Any, own: Callable[..., Any], model: Any, inputs: dict[str, Any]) -> dict[str, float]:
    """Loss and metrics of a micro-batch by TRL's own head and code."""
    models = [unwrap(each) for each in (trainer.model, trainer.ref_model) if each is not None]
    before = trainer._metrics, trainer._total_train_tokens
    kept = {mode: rows for mode, rows in _recorded(trainer).items()}
    _recorded(trainer).clear()
    trainer._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
    try:
        with ExitStack() as stack:
            for each in models:
                stack.enter_context(_replaced(each, forward=MethodType(type(each).forward, each)))
                TRLS_HEAD(each, outputs=("log_probs", *STATS))
            stack.enter_context(torch.random.fork_rng(enabled=trainer.accelerator.device.type in ("cpu", "cuda")))
            stack.enter_context(torch.no_grad())
            stack.enter_context(trainer.accelerator.autocast())
            loss = own(trainer, model, inputs, False)
        return {"loss": _everywhere(trainer, loss), **_latest(trainer)}
    finally:
        trainer._metrics, trainer._total_train_tokens = before
        _recorded(trainer).update(kept)


def _compare(trainer: Any, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    exact = trainer.args.bf16 is False and trainer.args.fp16 is False and trainer.model.dtype == torch.float32
    tolerance = 1e-3 if exact else 5e-2  # TRL rounds logits to the precision of the model
    theirs.pop("num_tokens", None)  # a count that goes on from batch to batch
    differing = [f"{name} is not known" for name in theirs.keys() - ours.keys()]
    for name in theirs.keys() & ours.keys():
        a, b = float(ours[name]), float(theirs[name])
        if name == "rewards/accuracies" and abs(float(theirs["rewards/margins"])) < 1e-3:
            continue  # policy and reference are still the same: rounding decides
        if not abs(a - b) <= tolerance * max(1.0, abs(b)):  # NaN differs too
            differing.append(f"{name} {a:.6g}, TRL's {b:.6g}")
    if differing:
        raise RuntimeError(
            f"dpo_kernels.trl is tested with TRL {' and '.join(TESTED)}, and does not fit {trl.__version__}: on the "
            f"first batch {'; '.join(sorted(differing))}. Use one of those, or TRL's own trainer"
        )
    warnings.warn(
        f"dpo_kernels.trl is tested with TRL {' and '.join(TESTED)}, not with {trl.__version__}; on the first batch "
        "it agreed with TRL's own head",
        stacklevel=2,
    )
    trainer._dpo_kernels_verified = True


# The classes. Their methods call TRL's by name and not through super(), so that `patch` may put them into TRL's own.


class DPOTrainer(trl.DPOTrainer):
    """TRL's `DPOTrainer`: same arguments, same `DPOConfig`, same logs."""

    __init__ = _with_our_head(trl.DPOTrainer.__init__, _dpo)
    _compute_loss = _verified(_dpo_compute_loss, trl.DPOTrainer._compute_loss)
    log = _with_our_metrics(trl.DPOTrainer.log)


class KTOTrainer(trl.KTOTrainer):
    """TRL's `KTOTrainer`: same arguments, same `KTOConfig`, same logs."""

    __init__ = _with_our_head(trl.KTOTrainer.__init__, _kto)
    _compute_loss = _verified(trl.KTOTrainer._compute_loss, trl.KTOTrainer._compute_loss)


def __getattr__(name: str) -> Any:
    """Makes the classes whose parents are experimental in TRL, which warns where those are imported."""
    if name not in EXPERIMENTAL:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    original = getattr(importlib.import_module(EXPERIMENTAL[name]), name)
    members = {
        "__doc__": f"TRL's `{name}`: same arguments, same `{name.removesuffix('Trainer')}Config`, same logs.",
        "__module__": __name__,
        "__init__": _with_added_head(original.__init__),
        "concatenated_forward": _with_our_forward(original.concatenated_forward),
    }
    globals()[name] = type(name, (original,), members)
    return globals()[name]


METHODS = ("__init__", "_compute_loss", "log", "concatenated_forward")
_originals: dict[type, dict[str, Any]] = {}  # what patch() replaced


def patch(*names: str) -> None:
    """Gives TRL's own classes this package's head, wherever they were imported and whatever inherits from them.

    Trainers that exist already stay as they are. To call it twice is to call it once.

    Args:
        names: of the classes: "DPOTrainer", "KTOTrainer", "CPOTrainer", "ORPOTrainer"; the first two if none is given.

    Raises:
        ValueError: a name that is none of these.
    """
    known = ("DPOTrainer", "KTOTrainer", *EXPERIMENTAL)
    for name in names or known[:2]:
        if name not in known:
            raise ValueError(f"names: expected some of {list(known)}, got {name!r}")
        ours: Any = globals().get(name) or __getattr__(name)
        trls = ours.__base__
        if trls not in _originals:
            _originals[trls] = {method: vars(trls)[method] for method in METHODS if method in vars(ours)}
            for method in _originals[trls]:
                setattr(trls, method, vars(ours)[method])


def unpatch() -> None:
    """Undoes `patch`."""
    while _originals:
        trls, methods = _originals.popitem()
        for method, original in methods.items():
            setattr(trls, method, original)
