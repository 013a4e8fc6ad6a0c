"""TRL's preference trainers with this package's head.

    from dpo_kernels.trl import DPOTrainer      # instead of: from trl import DPOTrainer

The classes are subclasses of TRL's: same arguments, same configuration, same logs. For scripts and frameworks that
import TRL's own, `patch()` changes those where they are.

    class           in TRL                      what is replaced
    DPOTrainer      trl                         head and loss together (`linear_dpo_loss`)
    KTOTrainer      trl                         head
    CPOTrainer      trl.experimental.cpo        head; also SimPO
    ORPOTrainer     trl.experimental.orpo       head

Metrics stay on the device until something reads them, `log` or a subclass, and take one transfer then.

Where a model is its own reference, rewards are 0 to the bit: both are summed alike. A batch may carry `token_weights`
[2B, T] and `pair_weights` [B] for `DPOTrainer`. Settings that `linear_dpo_loss` and `kto_loss` refuse and TRL takes
(beta of 0 and less, `ld_alpha` outside [0, 1], a `label_smoothing` of 0.5 and more) warn, and leave the loss to TRL.
Hidden states that are not finite give a loss that is not, and no error.

Adapters on the head, which TRL refuses, are trained. Models may be sharded by FSDP2, ZeRO-3 or tensor parallelism. An
encoder-decoder model is an error. TRL 1.15 and 1.16 are tested. With another version the first batch is computed by
TRL's own code too, and training goes on only if both agree.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Literal, get_args

try:
    import trl
    from trl.trainer import dpo_trainer as _dpo_trainer
    from trl.trainer import kto_trainer as _kto_trainer
except ImportError as error:
    raise ImportError("dpo_kernels.trl needs TRL 1.15 or newer: pip install 'dpo_kernels[trl]'") from error
if not (hasattr(_dpo_trainer, "add_fused_lm_head") and hasattr(_kto_trainer, "add_fused_lm_head")):
    raise ImportError(
        f"dpo_kernels.trl needs TRL 1.15 or newer, whose trainers score in the forward; got {trl.__version__}"
    )

from dpo_kernels.trl import _batching, _dpo, _kto, _reference_free
from dpo_kernels.trl._head import of_our_trainers, with_added_head, with_our_head
from dpo_kernels.trl._metrics import TotalTokens
from dpo_kernels.trl._verify import verified_loss, verified_metrics, with_our_forward

if TYPE_CHECKING:
    from trl.experimental.cpo import CPOTrainer as CPOTrainer
    from trl.experimental.orpo import ORPOTrainer as ORPOTrainer

__all__ = ["CPOTrainer", "DPOTrainer", "KTOTrainer", "ORPOTrainer", "is_patched", "patch", "unpatch"]

TrainerName = Literal["DPOTrainer", "KTOTrainer", "CPOTrainer", "ORPOTrainer"]
TRAINERS: tuple[TrainerName, ...] = get_args(TrainerName)
EXPERIMENTAL = {"CPOTrainer": "trl.experimental.cpo", "ORPOTrainer": "trl.experimental.orpo"}


# Methods call TRL's by name and not through super(), so that `patch` may put them into TRL's own classes.


class DPOTrainer(trl.DPOTrainer):
    """TRL's `DPOTrainer`: same `DPOConfig`, same logs, and same arguments, but for one more, by keyword:

    Args:
        batching: how pairs go through the models. "concatenated" is as in TRL: `[prompt, response]` a row, padded.
            "padding_free" has no padding, "shared_prefix" each prompt once, `[prompt, chosen, rejected]` a row, and
            "packed_shared_prefix" both. "auto" is the last, or else the first, with a warning that says why not.

    With all but "concatenated", models get an attention that reads such rows, and keep it; it is compared on a few
    tokens first. The collator is this package's, on TRL's examples, cut and padded as TRL does. With
    `remove_unused_columns=False` a `weight`, `chosen_token_weights` and `rejected_token_weights` of an example count.
    Metrics are TRL's; the auxiliary loss of a mixture of experts counts a shared prompt once. `predict` is an error:
    there are no logits. `trainer.batching` is what came of "auto".

    Raises:
        ValueError: no such batching, or one that cannot be: beside a `data_collator`, `compute_metrics`, NEFTune or an
            attention that was asked for, with images, `torch_compile`, DeepSpeed, FSDP or parallelism other than of
            data, with settings that TRL's own loss alone takes, with a version of TRL that is not tested, and with a
            model that gives other hidden states.
    """

    __init__ = _batching.with_batching(
        with_our_head(
            _dpo.with_known_losses(trl.DPOTrainer.__init__), _dpo_trainer, _dpo.check_options, _batching.set_up
        )
    )
    _compute_loss = of_our_trainers(
        verified_loss(_dpo.compute_loss, trl.DPOTrainer._compute_loss),
        trl.DPOTrainer._compute_loss,
        _dpo.check_options,
    )
    compute_ref_log_probs = of_our_trainers(
        _dpo.compute_ref_log_probs, trl.DPOTrainer.compute_ref_log_probs, _dpo.check_options
    )
    _total_train_tokens = TotalTokens()


class KTOTrainer(trl.KTOTrainer):
    """TRL's `KTOTrainer`: same arguments, same `KTOConfig`, same logs."""

    __init__ = with_our_head(trl.KTOTrainer.__init__, _kto_trainer, _kto.check_options)
    _compute_loss = of_our_trainers(
        verified_loss(_kto.compute_loss, trl.KTOTrainer._compute_loss),
        trl.KTOTrainer._compute_loss,
        _kto.check_options,
    )
    compute_ref_log_probs = of_our_trainers(
        _kto.compute_ref_log_probs, trl.KTOTrainer.compute_ref_log_probs, _kto.check_options
    )
    _total_train_tokens = TotalTokens()


def __getattr__(name: str) -> Any:
    """Makes the classes whose parents are experimental in TRL, which warns where those are imported."""
    if name not in EXPERIMENTAL:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    original = getattr(importlib.import_module(EXPERIMENTAL[name]), name)
    forward = with_our_forward(_reference_free.concatenated_forward, original.concatenated_forward)
    metrics = verified_metrics(_reference_free.get_batch_loss_metrics, original.get_batch_loss_metrics)
    members = {
        "__doc__": f"TRL's `{name}`: same arguments, same `{name.removesuffix('Trainer')}Config`, same logs.",
        "__module__": __name__,
        "__init__": with_added_head(original.__init__),
        "concatenated_forward": of_our_trainers(forward, original.concatenated_forward),
        "get_batch_loss_metrics": of_our_trainers(metrics, original.get_batch_loss_metrics),
        "store_metrics": of_our_trainers(_reference_free.store_metrics, original.store_metrics),
    }
    globals()[name] = type(name, (original,), members)
    return globals()[name]


MEMBERS = (
    *("__init__", "_compute_loss", "compute_ref_log_probs", "_total_train_tokens"),
    *("concatenated_forward", "get_batch_loss_metrics", "store_metrics"),
)
_originals: dict[type, dict[str, Any]] = {}  # what patch() replaced, None where there was nothing


def patch(*names: TrainerName) -> None:
    """Gives TRL's own classes this package's head, wherever they were imported and whatever inherits from them.

    Trainers that exist already stay as they are. To call it twice is to call it once. `is_patched` says what it did.

    Args:
        names: of the classes: "DPOTrainer", "KTOTrainer", "CPOTrainer", "ORPOTrainer"; the first two if none is given.

    Raises:
        ValueError: a name that is none of these.
    """
    for name in _known(names) or TRAINERS[:2]:
        ours: Any = globals().get(name) or __getattr__(name)
        trls = ours.__base__
        if trls not in _originals:
            replacing = {name: vars(ours)[name] for name in MEMBERS if name in vars(ours)}
            _originals[trls] = {member: vars(trls).get(member) for member in replacing}
            for member, value in replacing.items():
                setattr(trls, member, value)


def is_patched(*names: TrainerName) -> bool:
    """Whether TRL's own classes of these names have this package's head; of no names, whether any has.

    Raises:
        ValueError: a name that is none of TRL's trainers here.
    """
    patched = {trls.__name__ for trls in _originals}
    return patched.issuperset(_known(names)) and bool(patched)


def _known(names: tuple[str, ...]) -> tuple[str, ...]:
    for name in names:
        if name not in TRAINERS:
            raise ValueError(f"names: expected some of {list(TRAINERS)}, got {name!r}")
    return names


def unpatch() -> None:
    """Undoes `patch`. Trainers that were made before go on with TRL's loss, on this package's log-probabilities; those
    with a `batching` of their own cannot, since TRL's loss does not know such batches."""
    while _originals:
        trls, members = _originals.popitem()
        for member, original in members.items():
            if original is None:
                delattr(trls, member)
            else:
                setattr(trls, member, original)
