"""What memory a training step will need, before it is run."""

from dpo_kernels.planning.batches import Batching, measured_batching
from dpo_kernels.planning.step import Step, footprint, largest_batch, plan

__all__ = ["Batching", "Step", "footprint", "largest_batch", "measured_batching", "plan"]
