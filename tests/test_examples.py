"""Every example runs, offline and by itself."""

import importlib.util
import re

import forks
import pytest
from places import ROOT

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
LOSSES = re.compile(r"\bloss(?:'?: '?| )([0-9.]+)")  # as a trainer logs it, and as a loop prints it
NEEDS = {"trl_dpo.py": ("trl", "peft")}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_example_runs(path, tmp_path):
    for package in ("transformers", "datasets", "accelerate", *NEEDS.get(path.name, ())):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    done = forks.python(path, "--tiny", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    assert len(LOSSES.findall(done.stdout)) >= 2
    first, *_, last = [float(loss) for loss in LOSSES.findall(done.stdout)]
    assert last < first


def test_there_are_examples():
    assert {path.name for path in EXAMPLES} >= {"trl_dpo.py", "hand_written_loop.py", "transformers_trainer.py"}
