"""What memory a training step will need, before it is run."""

from dpo_kernels.planning.step import Step, footprint, largest_batch, plan

__all__ = ["Step", "footprint", "largest_batch", "plan"]
