"""How processes share out the responses that a reference scores before training."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset

pytest.importorskip("accelerate", reason="the loop needs accelerate, which is not installed")

from dpo_kernels.training.config import TrainConfig
from dpo_kernels.training.pairs import Pairs
from dpo_kernels.training.reference_model import _score


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_each_response_is_scored_once(processes, sharded):
    """Where shards of a model are gathered, processes with fewer batches than others compute one again to meet them."""
    dataset = Dataset.from_dict(
        {f"{name}_ids": [[7] * (n + 1) for n in range(7)] for name in ("prompt", "chosen", "rejected")}
    )
    calls = []

    def logps(batch):  # of the rows of `batch`, chosen ones first
        calls.append(rank)
        return torch.cat([1.0 + batch, 101.0 + batch])

    config = TrainConfig(model="demo", dataset="demo", per_device_batch_size=2, progress_bar=False)
    reference = SimpleNamespace(config=config, logps=logps, sharded=object() if sharded else None)
    pairs = Pairs(None, dataset, None, torch.device("cpu"))
    pairs = SimpleNamespace(sizes=pairs.sizes, batch=lambda dataset, rows: torch.as_tensor(rows))
    found = torch.zeros(14)
    for rank in range(processes):
        accelerator = SimpleNamespace(
            process_index=rank, num_processes=processes, device=torch.device("cpu"), is_main_process=True,
            autocast=nullcontext, reduce=lambda t, how: t,
        )  # fmt: skip
        found += _score(reference, dataset, pairs, accelerator)
    assert found.view(-1, 2).tolist() == [[n + 1.0, n + 101.0] for n in range(7)]
    assert len(calls) == (processes * -(-4 // processes) if sharded else 4)
