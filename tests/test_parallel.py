"""A head of which each rank has some entries of the vocabulary, in 2, 3 and 4 processes: `parallel_checks.py` says what
they look at. Here is what they found."""

import json
import sys
from pathlib import Path

import forks
import pytest
import torch
from two_processes import run_in

from dpo_kernels import dispatch, linear_dpo_loss, linear_sequence_logps
from dpo_kernels.testing import head_inputs

sys.path.append(str(Path(__file__).parent))
import parallel_checks

pytestmark = pytest.mark.skipif(dispatch.CPU_PROBLEM is not None, reason=f"impl 'cpu': {dispatch.CPU_PROBLEM}")


@pytest.fixture(scope="module")
def ready():
    found = forks.Forks("torch.distributed.tensor", "dpo_kernels", PYTHONPATH=forks.python_path(), TRITON_INTERPRET="0")
    yield found
    found.close()


# 2: a shard each; 3: one in the middle, and 123 is divisible; 4: two of them
@pytest.fixture(scope="module", params=[2, 3, 4], ids="{} ranks".format)
def found(request, ready, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    run_in(request.param, ready, parallel_checks.__file__, folder)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(request.param)]


@pytest.mark.parametrize("check", parallel_checks.CHECKS)
def test_ranks(found, check):
    for rank, of_rank in enumerate(found):
        assert of_rank[check] == "", f"rank {rank}: {of_rank[check]}"


@pytest.mark.parametrize("group", ["tp", object()])
def test_without_torch_distributed(group):
    inputs = head_inputs()
    for call in (
        lambda: linear_sequence_logps(inputs.hidden, inputs.weight, inputs.labels, group=group),
        lambda: linear_dpo_loss(*inputs[:3], inputs.ref_logps, group=group),
    ):
        with pytest.raises(ValueError, match=f"group: .* not initialised, got {type(group).__name__}"):
            call()
    assert not torch.distributed.is_initialized()
