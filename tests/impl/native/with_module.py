"""`with_module.py MODULE SCRIPT ARGUMENTS`: runs a script with another build of the extension in its place."""

import importlib.util
import runpy
import sys

spec = importlib.util.spec_from_file_location("dpo_kernels._native", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
sys.modules["dpo_kernels._native"] = module
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
