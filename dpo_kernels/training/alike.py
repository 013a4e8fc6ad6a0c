"""What the processes of a run must have alike: with what differs, each would train a model of its own, or one would
wait for what another never does."""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_kernels.training.config import TrainConfig

if TYPE_CHECKING:
    from accelerate import Accelerator


def check_settings(config: TrainConfig, accelerator: Accelerator) -> None:
    """Raises `ValueError`, in all processes, where they were started with other settings."""
    check_alike(dataclasses.asdict(config), accelerator)


def check_alike(values: Mapping[str, Any], accelerator: Accelerator) -> None:
    """Raises `ValueError`, in all processes, that names the first of these values which is not the same in all."""
    everyone = _of_all(dict(values), accelerator)
    for name, value in everyone[0].items():
        for rank, other in enumerate(everyone):
            if other.get(name) != value:
                raise ValueError(
                    f"{name}: expected the same in all processes, got {value!r:.200} in process 0 and "
                    f"{other.get(name)!r:.200} in process {rank}"
                )


def check_shared(output_dir: Path, accelerator: Accelerator) -> None:
    """Raises `ValueError`, in all processes, where a folder that is there is not the same for all of them: of shards,
    each would write its own into another one."""
    (name,) = _of_all(f".{uuid.uuid4().hex}.tmp", accelerator)[:1]
    mark = output_dir / name
    if accelerator.is_main_process:
        mark.touch()
    accelerator.wait_for_everyone()
    seen = _of_all(mark.exists(), accelerator)
    if accelerator.is_main_process:
        mark.unlink()
    if not all(seen):
        blind = [rank for rank, sees in enumerate(seen) if not sees]
        raise ValueError(
            f"output_dir: expected one folder that all processes see, got another {output_dir} in process(es) {blind}: "
            "give a path on a file system that their machines share"
        )


def _of_all(mine: Any, accelerator: Accelerator) -> list[Any]:
    from accelerate.utils import gather_object

    return gather_object([mine]) if accelerator.num_processes > 1 else [mine]
