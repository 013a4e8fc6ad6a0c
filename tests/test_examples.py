"""Every example runs, offline and by itself."""

import os
import re
import subprocess
import sys

import pytest
from places import ROOT, python_path

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
LOSSES = re.compile(r"\bloss(?:'?: '?| )([0-9.]+)")  # as a trainer logs it, and as a loop prints it
NEEDS = {"trl_dpo.py": ("trl", "peft")}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_example_runs(path, tmp_path):
    for package in ("transformers", "datasets", "accelerate", *NEEDS.get(path.name, ())):
        pytest.importorskip(package)
    environment = {
        **os.environ,
        "PYTHONPATH": python_path(),
        "HF_HUB_OFFLINE": "1",
        "TRITON_INTERPRET": "0",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, str(path), "--tiny"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert len(LOSSES.findall(done.stdout)) >= 2
    first, *_, last = [float(loss) for loss in LOSSES.findall(done.stdout)]
    assert last < first


def test_there_are_examples():
    assert {path.name for path in EXAMPLES} >= {"trl_dpo.py", "hand_written_loop.py", "transformers_trainer.py"}
