"""What accelerate is set up to shard with, as the loop's own setting `sharding`."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from dpo_kernels.training.config import TrainConfig

logger = logging.getLogger(__name__)

# What `accelerate launch` leaves in the environment
FSDP, DEEPSPEED = "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"
OFF = ("", "none", "false", "0", "auto")


@contextmanager
def as_launched(config: TrainConfig) -> Iterator[TrainConfig]:
    """The settings with accelerate's FSDP2 or DeepSpeed stage 2 or 3 as `sharding`, if it is set up for one of these.
    The loop calls them by itself, so meanwhile accelerate and transformers are not told of them.

    Raises `ValueError` that names what the loop does otherwise than accelerate is told to.
    """
    asked = {name for name in (FSDP, DEEPSPEED) if os.environ.get(name, "").lower() in ("true", "1")}
    if not asked:
        yield config
        return
    sharding = _fsdp(config) if FSDP in asked else _deepspeed(config)
    _refuse_other("ACCELERATE_MIXED_PRECISION", "mixed_precision", config.mixed_precision)
    if config.sharding not in ("none", sharding):
        raise ValueError(f"sharding: accelerate is set up for {sharding}, got {config.sharding!r}")
    if os.environ.get("RANK", "0") == "0":  # one voice is enough
        logger.info("sharding: %s, for which accelerate is set up", sharding)
    hidden = {name: os.environ.pop(name) for name in asked}
    try:
        yield replace(config, sharding=sharding)
    finally:
        os.environ.update(hidden)


def _fsdp(config: TrainConfig) -> str:
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise ValueError(f"fsdp_version: accelerate is set up for {version}, and the loop knows 2 alone")
    _refuse(
        FSDP_OFFLOAD_PARAMS="weights stay on their device",
        FSDP_IGNORED_MODULES="all weights are sharded",
        FSDP_TRANSFORMER_CLS_TO_WRAP="a model's layers are those that it names itself: leave it out",
    )
    if not config.gradient_checkpointing:
        _refuse(FSDP_ACTIVATION_CHECKPOINTING="that is gradient_checkpointing here")
    if os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() not in ("true", "full_shard"):
        _refuse(FSDP_RESHARD_AFTER_FORWARD="layers are gathered again for the backward", off=())
    policy = os.environ.get("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP")
    if policy != "TRANSFORMER_BASED_WRAP":
        _refuse(FSDP_AUTO_WRAP_POLICY="a model's layers are gathered one by one", off=())
    return "fsdp2"


def _deepspeed(config: TrainConfig) -> str:
    stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    _refuse(
        ACCELERATE_DEEPSPEED_CONFIG_FILE="the loop has no place for DeepSpeed's own settings",
        ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE="moments stay on their device",
        ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE="weights stay on their device",
        ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES="layers are gathered part by part",
    )
    if stage not in ("2", "3"):
        raise ValueError(f"zero_stage: accelerate is set up for {stage}, and the loop knows 2 and 3")
    _refuse_other("ACCELERATE_GRADIENT_CLIPPING", "max_grad_norm", config.max_grad_norm)
    steps = config.gradient_accumulation_steps
    _refuse_other("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "gradient_accumulation_steps", steps)
    return f"zero{stage}"


def _refuse_other(name: str, ours: str, value: str | float) -> None:
    """What accelerate and the loop are both told, and accelerate otherwise."""
    given = os.environ.get(name, "").lower()
    if given in ("", "no", "none", "auto"):
        return
    same = given == value if isinstance(value, str) else float(given) == value
    if not same:
        _refuse(**{name: f"the loop's {ours} is {value}: give both the same, or accelerate none"}, off=())


def _refuse(off: tuple[str, ...] = OFF, **reasons: str) -> None:
    for name, reason in reasons.items():
        given = os.environ.get(name, "")
        if given.lower() not in off:
            setting = name.removeprefix("ACCELERATE_").removeprefix("DEEPSPEED_").lower()
            raise ValueError(f"{setting}: accelerate is set up for {given!r}, which the loop does not do: {reason}")
