"""Sequences of which each rank has a part, in 2, 3 and 4 processes: `sequence_checks.py` says what they look at."""

import sys
from pathlib import Path

import pytest
import torch

from dpo_kernels import dispatch, linear_dpo_loss, linear_sequence_logps
from dpo_kernels.testing import head_inputs

sys.path.append(str(Path(__file__).parent))
import sequence_checks
from parallel_checks import assert_ranks_found_nothing

pytestmark = pytest.mark.skipif(dispatch.CPU_PROBLEM is not None, reason=f"impl 'cpu': {dispatch.CPU_PROBLEM}")


# 2: a part each; 3: one in the middle; 4: with the vocabulary over the other dimension of a mesh, too
@pytest.mark.full(when=lambda processes: processes != 3)
@pytest.mark.parametrize("processes", [2, 3, 4])
def test_ranks(processes, tmp_path):
    assert_ranks_found_nothing(sequence_checks, tmp_path, processes)


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
