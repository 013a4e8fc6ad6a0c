"""dpo-kernels tune: each family of kernels proven and timed on this machine's own device.

heads.py      which heads are meant
worker.py     the process that computes: is it right, and how fast
process.py    the one that watches it, and ends it when it hangs
tune.py       from missing figures to a verdict; what trainers ask for before they begin
command.py    the command
"""

from dpo_kernels.tuning.trial import Untuned, tune, tune_first

__all__ = ["Untuned", "tune", "tune_first"]
