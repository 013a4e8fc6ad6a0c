"""Where things are: the repository, data that may lie beside it, and the device that tests run on."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HELPERS = ROOT / "tests" / "helpers"
SHARED = ROOT.parent / "shared"
DEVICE = os.environ.get("DPO_KERNELS_TEST_DEVICE", "cpu")


def python_path(*more):
    """PYTHONPATH for another process: the package and these helpers before what is there."""
    return os.pathsep.join(map(str, [ROOT, HELPERS, *more, os.environ.get("PYTHONPATH", "")]))
