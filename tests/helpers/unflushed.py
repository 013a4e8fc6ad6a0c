"""Runs `unflushed.py MODULE ...` as `python -m MODULE ...`, where times mean nothing: what is written before each timed
call, to have caches of hundreds of megabytes hold nothing else, would take longer than all calls."""

import runpy
import sys

from dpo_kernels import measure

if __name__ == "__main__":
    measure.FLUSH_BYTES = 2**20
    sys.argv.pop(0)
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
