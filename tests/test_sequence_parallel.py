"""Sequences of which each rank has a part, in 2, 3 and 4 processes: `sequence_checks.py` says what they look at."""

import json
import sys
from pathlib import Path

import pytest
import torch
from two_processes import run_in_two

from dpo_kernels import dispatch, linear_dpo_loss, linear_sequence_logps
from dpo_kernels.testing import head_inputs

sys.path.append(str(Path(__file__).parent))
import sequence_checks

pytestmark = pytest.mark.skipif(dispatch.CPU_PROBLEM is not None, reason=f"impl 'cpu': {dispatch.CPU_PROBLEM}")


# 2: a part each; 3: one in the middle; 4: with the vocabulary over the other dimension of a mesh, too
@pytest.mark.full(when=lambda processes: processes != 3)
@pytest.mark.parametrize("processes", [2, 3, 4])
def test_ranks(processes, tmp_path):
    run_in_two(sequence_checks.__file__, tmp_path, processes=processes)
    for rank in range(processes):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        outcomes = {check: found.get(check, "not run, after an earlier failure") for check in sequence_checks.CHECKS}
        assert not any(outcomes.values()), (rank, {check: said for check, said in outcomes.items() if said})


def test_within_a_compiled_graph(monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(RuntimeError, match="not computed under torch.compile"):
        linear_dpo_loss(*head_inputs()[:3], None, sequence_group="cp")


def test_without_torch_distributed():
    inputs = head_inputs()
    for call in (
        lambda: linear_sequence_logps(inputs.hidden, inputs.weight, inputs.labels, sequence_group="cp"),
        lambda: linear_dpo_loss(*inputs[:3], inputs.ref_logps, sequence_group="cp"),
    ):
        with pytest.raises(ValueError, match="sequence_group: .* not initialised, got str"):
            call()
    assert not torch.distributed.is_initialized()
