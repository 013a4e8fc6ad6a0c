"""TRL's preference trainers with this package's head.

    from dpo_kernels.trl import DPOTrainer      # instead of: from trl import DPOTrainer

The classes are subclasses of TRL's: same arguments, same configuration, same logs. For scripts and frameworks that
import TRL's own, `patch()` changes those where they are.

    class           in TRL                      what is replaced
    DPOTrainer      trl                         head and loss together (`linear_dpo_loss`)
    KTOTrainer      trl                         head
    CPOTrainer      trl.experimental.cpo        head; also SimPO
    ORPOTrainer     trl.experimental.orpo       head

Metrics stay on the device until they are logged, and take one transfer then. What `CPOTrainer` and `ORPOTrainer` hand
to `store_metrics` are therefore tensors [].

Adapters on the head, which TRL refuses, are trained. Models may be sharded by FSDP2, ZeRO-3 or tensor parallelism. An
encoder-decoder model is an error. TRL 1.15 and 1.16 are tested. With another version the first batch is computed by
TRL's own code too, and training goes on only if both agree.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

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

from dpo_kernels.trl import _dpo, _kto, _reference_free
from dpo_kernels.trl._head import with_added_head, with_our_head
from dpo_kernels.trl._metrics import with_floats, with_report
from dpo_kernels.trl._verify import verified_loss, verified_metrics, with_our_forward

if TYPE_CHECKING:
    from trl.experimental.cpo import CPOTrainer as CPOTrainer
    from trl.experimental.orpo import ORPOTrainer as ORPOTrainer

__all__ = ["CPOTrainer", "DPOTrainer", "KTOTrainer", "ORPOTrainer", "patch", "unpatch"]

EXPERIMENTAL = {"CPOTrainer": "trl.experimental.cpo", "ORPOTrainer": "trl.experimental.orpo"}


# Methods call TRL's by name and not through super(), so that `patch` may put them into TRL's own classes.


class DPOTrainer(trl.DPOTrainer):
    """TRL's `DPOTrainer`: same arguments, same `DPOConfig`, same logs."""

    __init__ = _dpo.with_valid_options(with_our_head(trl.DPOTrainer.__init__, _dpo_trainer))
    _compute_loss = verified_loss(_dpo.compute_loss, trl.DPOTrainer._compute_loss)
    log = with_report(trl.DPOTrainer.log)


class KTOTrainer(trl.KTOTrainer):
    """TRL's `KTOTrainer`: same arguments, same `KTOConfig`, same logs."""

    __init__ = with_our_head(trl.KTOTrainer.__init__, _kto_trainer)
    _compute_loss = verified_loss(_kto.compute_loss, trl.KTOTrainer._compute_loss)
    log = with_report(trl.KTOTrainer.log)


def __getattr__(name: str) -> Any:
    """Makes the classes whose parents are experimental in TRL, which warns where those are imported."""
    if name not in EXPERIMENTAL:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    original = getattr(importlib.import_module(EXPERIMENTAL[name]), name)
    members = {
        "__doc__": f"TRL's `{name}`: same arguments, same `{name.removesuffix('Trainer')}Config`, same logs.",
        "__module__": __name__,
        "__init__": with_added_head(original.__init__),
        "concatenated_forward": with_our_forward(_reference_free.concatenated_forward, original.concatenated_forward),
        "get_batch_loss_metrics": verified_metrics(
            _reference_free.get_batch_loss_metrics, original.get_batch_loss_metrics
        ),
        "log": with_floats(original.log),
    }
    globals()[name] = type(name, (original,), members)
    return globals()[name]


METHODS = ("__init__", "_compute_loss", "log", "concatenated_forward", "get_batch_loss_metrics")
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
