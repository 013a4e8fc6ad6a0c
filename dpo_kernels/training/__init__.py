"""The training loop, its settings, and what a run leaves behind."""

from typing import TYPE_CHECKING

from dpo_kernels.lazy import exports

if TYPE_CHECKING:
    from dpo_kernels.training.config import TrainConfig as TrainConfig
    from dpo_kernels.training.loop import train as train

__all__ = ["TrainConfig", "train"]
__getattr__ = exports(__name__, {"TrainConfig": "config", "train": "loop"})
